"""What the claims are tried on: styles, references, things, and the rulers.

Half of the styles have a medium or light that no training picture has (the word may be known:
"glowing" of a star), half combine words in a way that none has. Each reference has things of its
own, so that an interval over styles is one over things too. The first CHOOSING styles serve for
choosing settings and are never reported.

Rulers, all of one picture: CLIP's text and style score, as in the paper, and two that share nothing
with it: quality.py's classifier for names, and distances of palette and texture to the drawing that
was wanted, which is known, since styles.apply draws anything in any style.
"""

import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import clip_feedback  # noqa: E402
import data  # noqa: E402
from data import scenes, styles  # noqa: E402
from experiments.common import among, numbers_of  # noqa: E402
from experiments.one_shot import palette_distance, texture_distance  # noqa: E402
from experiments.quality import look  # noqa: E402
from human_feedback.rounds import POOL_PROMPTS  # noqa: E402
from styledrop import to_tensor  # noqa: E402

CHOOSING = 3                            # styles
HANDS = ("noto", "noto-v1", "twemoji", "fluent-emoji-flat")      # whose drawings; styles: noto's
TEXTURE = 5                             # palettes are far at a distance of 0.5, textures at 0.1
HIDES = ("glowing", "chalk", "wooden", "woodcut")           # media that let no ground be seen


@dataclass
class Subject:
    """One style, one of its references, one seed of tuning."""
    index: int                          # of the style
    seed: int                           # of tuning and sampling
    style: styles.Style
    references: tuple                   # four names; the first is R1's only one
    things: tuple                       # names to draw
    object: str                         # a class for Section 3.4
    new_words: bool                     # has it a medium or light of no training picture?

    @property
    def words(self):
        return styles.phrase(self.style)

    @property
    def shorter(self):
        """The style without its ground; None where it has none, or nothing else."""
        plain = replace(self.style, ground="white")
        return plain if styles.named(plain) and plain != self.style else None

    @property
    def reported(self):
        return self.index >= CHOOSING

    @property
    def key(self):
        """Folder of its files: another style, reference or things have another one."""
        what = repr((self.style, self.references, self.things, self.object))
        return f"style{self.index:02d}-{zlib.crc32(what.encode()):08x}-{self.seed}"


def subjects(art, count, things=8, references=1, seed=0):
    """`count` reported styles, each with `references` drawings, after CHOOSING others with one.

    Every reference has things, an object and a seed of its own.
    """
    everywhere = set.intersection(*(set(art.names_of[s]) for s in HANDS))
    usual = [n for n in scenes.pools(tuple(sorted(everywhere)))["several"]
             if data.content_phrase(n) not in POOL_PROMPTS]
    found, met = [], set()
    for index in range(CHOOSING + count):
        rng, wanted = np.random.default_rng((seed, index)), index % 2 == 0
        style = sample_style(rng)
        while styles.has_new_words(style) != wanted or style in met:
            style = sample_style(rng)
        met.add(style)
        names = [usual[i] for i in rng.permutation(len(usual))]
        for r in range(references if index >= CHOOSING else 1):
            own = names[r * (4 + things):(r + 1) * (4 + things)]
            found.append(Subject(index, seed + r, style, tuple(own[:4]), tuple(own[4:]),
                                 names[-1 - r], wanted))
    return found


def sample_style(rng):
    """A held-out style that says nothing which is not to be seen."""
    while True:
        style = styles.sample(rng, held_out=True)
        if style.medium in HIDES:
            style = replace(style, ground="white")
        if styles.is_held_out(style):
            return style


def drawing(art, name, style, hand="noto"):
    """The wanted picture: uint8 (64, 64, 3)."""
    return styles.apply(style, art.drawings[art.find(name, hand)], np.random.default_rng(0))


def drawings(art, names, style):
    """(B, 3, 64, 64) in [-1, 1]."""
    return to_tensor(np.stack([drawing(art, name, style) for name in names]))


def pool_names(art, count=10):
    """`count` names of POOL_PROMPTS, spread over its animals, faces, fruit, buildings, things."""
    name_of = {data.content_phrase(name): name for name in art.names_of["noto"]}
    known = [name_of[prompt] for prompt in POOL_PROMPTS if prompt in name_of]
    return [known[i] for i in np.linspace(0, len(known) - 1, count).round().astype(int)]


# ---------------------------------------------------------------------------------------------
# Rulers

def at_side(images, side):
    """(B, 3, S, S) at (B, 3, side, side), made smaller by area."""
    return images if images.shape[-1] == side else F.interpolate(images, (side, side), mode="area")


def tokens_of(pipe, images):
    """The tokenizer's codes of pictures: (B, N), on the CPU."""
    images = at_side(images, pipe.vqgan.config.resolution).to(pipe.device)
    return pipe.vqgan.encode(images).flatten(1).cpu()


def distances(images, truth):
    """{"palette", "texture", "distance"}: (B,) each, of pictures and what was wanted, at 64 px."""
    x, y = at_side(images, 64), at_side(truth, 64)
    found = dict(palette=palette_distance(x, y), texture=texture_distance(x, y))
    return found | dict(distance=found["palette"] + TEXTURE * found["texture"])


def measure(pipe, net, images, names, truth, reference, reference_name):
    """Pictures (B, 3, H, W) of `names` against truth (B, 3, 64, 64) -> {ruler: (B,)}.

    text, style: CLIP's cosines with content phrase and reference (1, 3, 64, 64).
    named: the chance that the classifier prefers the right name to 99 random others. leak: the
    share of all other names that the reference's name beats, 0.5 by chance. leak by CLIP: is the
    reference's phrase nearer than the prompt? copy: share of tokens equal to the reference's, less
    what the wanted drawing shares with it already. light: mean luminance.
    """
    scores = look(net, at_side(images, 64))["names"]                             # (B, K)
    rival = scores[:, numbers_of([reference_name])[0]]
    texts = [data.content_phrase(name) for name in names]
    text = clip_feedback.text_score(pipe.clip, images, texts)
    of_reference = data.content_phrase(reference_name)
    leak_clip = clip_feedback.text_score(pipe.clip, images, of_reference) > text
    same = lambda x: (tokens_of(pipe, x) == tokens_of(pipe, reference)).double().mean(1)
    grey = torch.einsum("c,bchw->bhw", images.new_tensor([0.3, 0.59, 0.11]), images)
    found = distances(images, truth) | {
        "text": text, "style": clip_feedback.style_score(pipe.clip, images, reference),
        "named": among(scores, numbers_of(names)),
        "leak": (scores < rival[:, None]).double().mean(1), "leak by CLIP": leak_clip.double(),
        "copy": same(images) - same(truth), "light": grey.mean((1, 2))}
    return {ruler: values.cpu() for ruler, values in found.items()}


def diversity(one, other):
    """Tokens (B, N) of two draws of the same prompts -> share of places that differ, (B,)."""
    return (one != other).double().mean(1)
