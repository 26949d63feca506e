"""A toy base, random but complete, for every test that needs a pipeline."""

from dataclasses import replace

import pytest
import torch

import clip_feedback
import muse as muse_
import vqgan as vqgan_
from styledrop import StyleDrop, save_model

torch.set_num_threads(1)                                    # toy sizes: more threads only wait for each other


def shake(module, std=0.2, seed=0):
    """Every weight of a module drawn anew, large enough that each input matters (vectors are left)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() > 1:
                p.normal_(std=std, generator=generator)
    return module


def toy_vqgan(seed=0):
    torch.manual_seed(seed)
    vqgan = vqgan_.VQGAN(vqgan_.PRESETS["toy"]).eval()
    images = torch.rand(16, 3, 16, 16) * 2 - 1
    with torch.no_grad():                                   # an untrained codebook is all zeros: start it on data
        z = vqgan.encoder(images)
        vqgan.quantizer.update(z, vqgan.quantizer(z)[1], torch.Generator().manual_seed(seed))
    return vqgan.requires_grad_(False)


def toy_clip(seed=0):
    torch.manual_seed(seed)
    tokenizer = clip_feedback.Tokenizer(clip_feedback.train_merges(["a cat", "a house in flat style"], 8))
    config = replace(clip_feedback.PRESETS["toy"], vocab_size=tokenizer.vocab_size)
    return clip_feedback.CLIP(config, tokenizer).eval().requires_grad_(False)


def toy_muse(seed=0, **changes):
    return shake(muse_.Muse(replace(muse_.PRESETS["toy"], **changes)), seed=seed).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def pipe():
    return StyleDrop(toy_vqgan(), toy_clip(), toy_muse())


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A weights folder with a toy base, as train.py writes it."""
    folder = tmp_path_factory.mktemp("weights")
    clip = toy_clip()
    save_model(folder / "vqgan.pt", "vqgan", toy_vqgan(), {})
    save_model(folder / "clip.pt", "clip", clip, {}, merges=[" ".join(pair) for pair in clip.tokenizer.merges])
    save_model(folder / "muse.pt", "muse", toy_muse(), {})
    return folder
