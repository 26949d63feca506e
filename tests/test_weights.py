"""The shipped base: whole files that say where they come from, fit each other, know drawings."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import train
from data import styles
from human_feedback import rounds
from styledrop import StyleDrop, Tuning, to_tensor
from pretrain.vqgan import psnr

FOLDER = Path(train.__file__).parent / "weights" / "tiny"


@pytest.fixture(scope="module")
def pipe():
    return StyleDrop.load(FOLDER, "cpu")


def drawn(art, picks):
    """Drawings as they are: (count, 3, 64, 64)."""
    rng = np.random.default_rng(0)
    images = [styles.apply(styles.Style(), art.drawings[i], rng) for i in picks]
    return to_tensor(np.stack(images))


def openmoji():
    """One drawing in twelve of the held-out set, and their names."""
    art = data.Art(role="held-out")
    return drawn(art, range(0, len(art.names), 12)), art.names[::12]


def test_files_are_small_and_say_where_they_come_from():
    files = list(FOLDER.rglob("*.pt"))
    assert sum(file.stat().st_size for file in files) < 64e6
    for stage in (file.stem for file in files):
        saved = torch.load(FOLDER / f"{stage}.pt", weights_only=True)
        assert saved["kind"] == stage
        assert {"stage", "steps", "images", "minutes", "machine", "data",
                "seed"} <= set(saved["provenance"])
        assert {w.dtype for w in saved["weights"].values()} <= {torch.half, torch.long}
        assert (FOLDER / f"{stage}.jsonl").read_text().count("\n") > 5


def test_its_words_are_those_of_the_captions(pipe):
    """Of the drawings as data/ has them now. Trap: a vocabulary of an earlier grammar."""
    assert pipe.words == {word.lower() for word in data.words()}
    assert all(len(pipe.tokenizer.encode(word)) == 1 for word in pipe.words if word.isalpha())


def test_adapter_is_below_one_percent(pipe):
    """Of the default shape, and of a later round's."""
    count = lambda model: sum(p.numel() for p in model.parameters())
    for how in (Tuning(), Tuning(d_prj=rounds.ROUND["d_prj"], is_shared=False)):
        assert 0 < count(pipe.new_adapter(how, "", None)) < 0.01 * count(pipe.muse)


def test_openmoji_survives_the_tokenizer(pipe):
    """70 drawings by a hand that no training saw: 21 dB, where their mean colours give 11."""
    images = openmoji()[0]
    assert psnr(images, pipe.vqgan.decode(pipe.vqgan.encode(images))) > 21


@torch.no_grad()
def test_clip_names_openmoji(pipe):
    """The right name first among all 837, where chance has 0.1 %: more than one time in six."""
    images, names = openmoji()
    guesses = train.guess_content(pipe, images)
    assert np.mean([guess == data.content_phrase(name)
                    for guess, name in zip(guesses, names)]) > 1 / 6


@torch.no_grad()
def test_muse_listens_to_the_text(pipe):
    """With all masked, the right name makes a drawing's tokens likelier than another name."""
    art = data.Art()
    picks = np.random.default_rng(0).choice(len(art.names), 32, replace=False)
    ids, names = pipe.vqgan.encode(drawn(art, picks)).flatten(1), [art.content(i) for i in picks]
    masked = torch.full_like(ids, pipe.muse.config.mask_id)
    loss = lambda prompts: F.cross_entropy(
        pipe.muse(masked, *pipe.embed(pipe.muse, prompts)).flatten(0, 1), ids.flatten())
    assert loss(names) < loss(names[1:] + names[:1]) - 0.1
