"""The shipped base: whole files that say where they come from, fit each other, and know drawings.

A test that is marked with NEW_BASE needs the base that was trained on the drawings of today.
`python -m pytest -m new_base` runs these alone.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import styledrop
import train
from clip_feedback import image_features
from data import styles
from data.styles import Style
from muse import random_mask
from pretrain.vqgan import psnr
from styledrop import ROUND_1, ROUND_2, StyleDrop, style_prompt, to_tensor

NEW_BASE = pytest.mark.new_base
FOLDER = Path(train.__file__).parent / "weights" / "tiny"
FILES = ["clip", "muse", "superres", "vqgan"]
MOST_BYTES = 64 * 2 ** 20              # of all files, which everybody downloads


@pytest.fixture(scope="module")
def pipe():
    return StyleDrop.load(FOLDER, "cpu")


def drawings(role, step, sets=None):
    """Every step-th drawing as it is, (count, 3, 64, 64), and the content phrases."""
    art = data.Art(sets=sets, role=role)
    rng = np.random.default_rng(0)
    images = [styles.apply(Style(), rgba, rng) for rgba in art.drawings[::step]]
    return to_tensor(np.stack(images)), [data.content_phrase(name) for name in art.names[::step]]


# -- files

def test_the_folder_holds_a_base_and_its_logs():
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(
        [f"{name}.pt" for name in FILES] + [f"{name}.jsonl" for name in FILES]
        + ["muse_wide.jsonl", "superres_wide.jsonl"])
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MOST_BYTES


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_where_it_comes_from(name):
    provenance = torch.load(FOLDER / f"{name}.pt", weights_only=True)["provenance"]
    assert provenance.keys() >= {"stage", "steps", "images", "minutes", "machine", "data", "seed"}
    assert provenance["stage"] == name
    assert provenance["data"] == "data/"
    log = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8")
    assert log.count("\n") > 5


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("stage, tuning", [
    ("muse", ROUND_1), ("muse", ROUND_2), ("superres", styledrop.SUPERRES)])
def test_an_adapter_is_below_one_percent_of_its_base(pipe, stage, tuning):
    G = getattr(pipe, stage)
    adapter = pipe.new_adapter(G, tuning, torch.Generator().manual_seed(0))
    assert 0 < count(adapter) < 0.01 * count(G)


# -- words

@NEW_BASE
def test_its_words_are_those_of_the_captions(pipe):
    """Of the drawings as data/ has them now. Trap: the vocabulary of an earlier grammar."""
    assert pipe.words == {word.lower() for word in data.words()}


@NEW_BASE
def test_every_word_is_one_token(pipe):
    """In both stages, which share their merges. Trap: a new word is read letter by letter."""
    for word in data.words():
        if word.isalpha():
            assert len(pipe.tokenizer.encode(word)) == 1, word


# -- what it knows

def test_openmoji_survives_the_tokenizer(pipe):
    """An icon set that was never trained on: 21 dB, where its drawings' mean colours give 11."""
    images, _ = drawings("held-out", 12)
    reconstructed = pipe.vqgan.decode(pipe.vqgan.encode(images))
    assert psnr(images, reconstructed) > 21
    flat = images.mean((2, 3), keepdim=True).expand_as(images)
    assert psnr(images, flat) < 12


@torch.no_grad()
def test_clip_names_openmoji(pipe):
    """The right name first among hundreds, where chance has 0.2 %: more than one time in four."""
    images, names = drawings("held-out", 12)
    others = [data.content_phrase(name) for name in data.names()[::3]]
    phrases = sorted({*names, *others})
    ids = pipe.clip.tokenize(phrases)
    texts = torch.cat([pipe.clip.encode_text(part) for part in ids.split(128)])
    scores = image_features(pipe.clip, images) @ F.normalize(texts, dim=-1).T
    found = [phrases[i] for i in scores.argmax(1)]
    assert np.mean([one == name for one, name in zip(found, names)]) > 1 / 4


def loss_of(pipe, ids, prompts, mask):
    """The cross-entropy of tokens at the masked places, by the first stage: (B,)."""
    masked = ids.masked_fill(mask, pipe.muse.config.mask_id)
    logits = pipe.muse(masked, *pipe.embed(pipe.muse, prompts))
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
    return (loss * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def test_muse_listens_to_the_text(pipe):
    """With all masked, the right name makes a drawing's tokens more probable than another."""
    images, names = drawings("training", 50, ("twemoji",))
    ids = pipe.vqgan.encode(images).flatten(1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    right = loss_of(pipe, ids, names, mask).mean()
    wrong = loss_of(pipe, ids, names[1:] + names[:1], mask).mean()
    assert right < wrong - 0.1


@NEW_BASE
@torch.no_grad()
def test_muse_reads_a_style(pipe):
    """Of nine styles, the words of an image's own mostly make its tokens most probable."""
    art = data.Art(sets=("twemoji",))
    rgba = art.drawings[art.find("house", "twemoji")]
    nine = [Style(medium=medium, ground=ground)
            for medium in ("watercolor", "embroidery", "halftone")
            for ground in ("cream", "red", "blue and cream gradient")]
    prompts = [style_prompt("a house", styles.phrase(style)) for style in nine]
    mask = random_mask(1, 256, torch.Generator().manual_seed(0), power=2).expand(9, -1)
    right = 0
    for i in (0, 2, 4, 6, 8):
        image = styles.apply(nine[i], rgba, np.random.default_rng(0))
        ids = pipe.vqgan.encode(to_tensor(image[None])).flatten(1).expand(9, -1)
        right += loss_of(pipe, ids, prompts, mask).argmin().item() == i
    assert right >= 4
