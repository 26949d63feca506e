"""Section 4.4.4: four references that differ in one small thing, one phrase for all of them.

Each of four variants of a style teaches an adapter of its own. Of a picture we ask which variant of
the wanted drawing it is nearest to, 1/4 by chance; rounds of feedback, by an oracle that picks of
each prompt's pictures the one nearest to the variant, should raise that.
"""

import numpy as np
import torch
from PIL import Image

import data
from experiments.claims.setting import at_side, distances, drawing, pool_names
from experiments.quality import give_back
from human_feedback.rounds import ROUND
from styledrop import to_tensor

PER = 2                                 # pictures of each prompt of a pool
ROUNDS = (1, 2, 3)


# ---------------------------------------------------------------------------------------------
# Variants: uint8 (H, W, 3) -> the same, a little different

def shifted(image):
    """Every hue turned by a twelfth of the circle."""
    hsv = np.array(Image.fromarray(image).convert("HSV"))
    hsv[..., 0] += np.uint8(21)                              # wraps round
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def shaded(image):
    """Darker from top to bottom."""
    return (image * np.linspace(1.0, 0.6, len(image))[:, None, None]).round().astype(np.uint8)


def rounded(image):
    """Blocks of 2 x 2 pixels: no fine edge is left."""
    half = Image.fromarray(image).resize((len(image) // 2,) * 2, Image.BOX)
    return np.asarray(half.resize((len(image),) * 2, Image.NEAREST))


VARIANTS = (lambda image: image, shifted, shaded, rounded)


def drawn(u, names, variant):
    """The wanted drawings in a variant of the unit's style: (B, 3, 64, 64)."""
    images = [VARIANTS[variant](drawing(u.art, name, u.subject.style)) for name in names]
    return to_tensor(np.stack(images))


# ---------------------------------------------------------------------------------------------

def adapter(u, variant, turn):
    """Of one variant after `turn` rounds; kept."""
    def make():
        if turn == 1:
            names, how = u.subject.references[:1], {}
            images = drawn(u, names, variant)
        else:
            names, how = pool_names(u.art), ROUND | dict(is_shared=False)
            pool = u.sample(adapter(u, variant, turn - 1), names, PER, seed=10 * turn + variant)
            truth = drawn(u, names, variant).repeat_interleave(PER, 0)
            best = distances(pool, truth)["distance"].view(-1, PER).argmin(1)
            images = pool[best + PER * torch.arange(len(names))]
        prompts = [data.content_phrase(name) for name in names]
        return u.tune(images, prompts, u.subject.words, **how)
    return u.kept(f"fine, variant {variant}, round {turn}", make)


def arms(u):
    """{arm: function that draws the things by all four adapters, one after the other}."""
    def draw(turn):
        return torch.cat([u.sample(adapter(u, v, turn)) for v in range(len(VARIANTS))])
    def ceiling():
        images = torch.cat([drawn(u, u.subject.things, v) for v in range(len(VARIANTS))])
        return give_back(u.pipe, at_side(images, u.pipe.vqgan.config.resolution))
    found = {"fine, as wanted": ceiling}                     # as the tokenizer gives them back
    return found | {f"fine, round {turn}": lambda turn=turn: draw(turn) for turn in ROUNDS}


def measure_arm(u, make):
    """Draw an arm -> {"own": 1 where its adapter's variant is the nearest}, its pictures."""
    images, things = make(), u.subject.things
    far = []
    for v in range(len(VARIANTS)):
        truth = drawn(u, things, v).repeat(len(VARIANTS), 1, 1, 1)
        far.append(distances(at_side(images, 64), truth)["distance"])
    own = torch.arange(len(VARIANTS)).repeat_interleave(len(things))
    return {"own": (torch.stack(far, 1).argmin(1) == own).double().tolist()}, images
