"""The shipped base: whole files that say where they come from, fit each other, know drawings."""

from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
from data import styles
from styledrop import StyleDrop, Tuning, load_model, to_tensor
from vqgan import VQGAN, VQGANConfig, psnr

FOLDER = Path(train.__file__).parent / "weights" / "tiny"


@pytest.fixture(scope="module")
def pipe():
    return StyleDrop.load(FOLDER, "cpu")


def openmoji():
    """One drawing in twelve, as it is: (70, 3, 64, 64), and their names."""
    art = data.Art(role="held-out")
    drawn = [
        styles.apply(styles.Style(), drawing, np.random.default_rng(0))
        for drawing in art.drawings[::12]
    ]
    return to_tensor(np.stack(drawn)), art.names[::12]


def test_files_are_small_and_say_where_they_come_from():
    files = list(FOLDER.rglob("*.pt"))
    assert sum(file.stat().st_size for file in files) < 64e6
    for stage in (file.stem for file in files):
        saved = torch.load(FOLDER / f"{stage}.pt", weights_only=True)
        assert saved["kind"] == stage
        assert {"stage", "steps", "images", "minutes", "machine", "data",
                "seed"} <= set(saved["provenance"])
        assert all(tensor.dtype == torch.half for tensor in saved["weights"].values()
                   if tensor.is_floating_point())
        assert (FOLDER / f"{stage}.jsonl").read_text().count("\n") > 5


def test_its_words_are_those_of_the_captions(pipe):
    """Of the drawings as data/ has them now. Trap: a vocabulary of an earlier grammar."""
    assert pipe.words == {word.lower() for word in data.words()}
    assert all(len(pipe.tokenizer.encode(word)) == 1 for word in pipe.words if word.isalpha())


def test_adapter_is_below_one_percent(pipe):
    """Of the default shape, and of a later round's."""
    count = lambda model: sum(p.numel() for p in model.parameters())
    for how in (Tuning(), Tuning(d_prj=train.ROUND["d_prj"], is_shared=False)):
        assert 0 < count(pipe.new_adapter(how, "", None)) < 0.01 * count(pipe.muse)


def test_openmoji_survives_the_tokenizer():
    """70 drawings by a hand that no training saw: 21 dB,
    where the mean colour of each picture gives 11.
    """
    images = openmoji()[0]
    vqgan, _ = load_model(FOLDER / "vqgan.pt", "vqgan", VQGANConfig, VQGAN)
    assert psnr(images, vqgan.decode(vqgan.encode(images))) > 21


@torch.no_grad()
def test_clip_names_openmoji(pipe):
    """The right name first among all 837, where chance has 0.1 %: more than one time in six."""
    images, names = openmoji()
    guesses = train.guess_content(pipe, images)
    assert np.mean([guess == data.content_phrase(name)
                    for guess, name in zip(guesses, names)]) > 1 / 6


@torch.no_grad()
def test_muse_listens_to_the_text(pipe):
    """With everything masked, the right name makes the tokens of a drawing likelier than another's.
    
    """
    art, rng = data.Art(), np.random.default_rng(0)
    picks = rng.choice(len(art.names), 32, replace=False)
    images = to_tensor(np.stack([styles.apply(styles.Style(), art.drawings[i], rng)
                                 for i in picks]))
    ids = pipe.vqgan.encode(images).flatten(1)
    masked = torch.full_like(ids, pipe.muse.config.mask_id)
    names = [art.content(i) for i in picks]

    def loss(prompts):
        return torch.nn.functional.cross_entropy(
            pipe.muse(masked, *pipe.embed(pipe.muse, prompts)).flatten(0, 1), ids.flatten()).item()

    assert loss(names) < loss(names[1:] + names[:1]) - 0.1
