"""A judge of objects that is blind to style: does a picture show a cat, whatever it is painted in?

    python -m experiments.object_judge                      # trains experiments/object_judge.pt

A classifier that was trained on the base's own styles cannot say whether an object was kept in a
style that it has never seen. This one is trained on drawings whose colours, textures, light and
background are randomised far beyond any style: random curves and matrices of colour, random
convolutions, the drawing's shape filled with noise, contours alone, smears and holes. Only the
shape is left to tell a cat from a house. A quarter of its pictures are painted by
data/free_styles.py, and a tenth are reconstructed by the tokenizer.

One icon set, OpenMoji, is kept out of its training; its accuracy there says how far it can be
trusted. (The shipped file was trained with --steps 2200.)

Shapes: B pictures (B, 3, 64, 64) in [-1, 1], D features, K names.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from checkpoint.files import check_place
from checkpoint.weights import load_model, save_model
from commandline.options import Parser, filled, number, whole
from commandline.terminal import run_command
from data import free_styles
from experiments.classifier import Residual
from styledrop import StyleDrop, autocast, to_tensor

WEIGHTS = Path(__file__).with_name("object_judge.pt")


@dataclass
class JudgeConfig:
    widths: tuple = (32, 64, 128, 256)  # channels at sides of 32, 16, 8, 4 pixels; the last is D
    names: int = 837                    # K


class ObjectJudge(nn.Module):
    """A small ResNet: pictures (B, 3, 64, 64) -> logits of names (B, K)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        w = config.widths
        self.enter = nn.Sequential(nn.Conv2d(3, w[0], 5, 2, 2, bias=False), nn.BatchNorm2d(w[0]),
                                   nn.ReLU(), Residual(w[0], w[0], 1))
        self.trunk = nn.Sequential(*(Residual(a, b, 2) for a, b in zip(w, w[1:])))
        self.head = nn.Linear(w[-1], config.names)

    def features(self, images):
        return self.trunk(self.enter(images)).float().mean((2, 3))

    def forward(self, images):
        return self.head(self.features(images))


def load_judge(path=WEIGHTS):
    """The judge and the names of its classes."""
    judge, saved = load_model(path, "object judge", JudgeConfig, ObjectJudge)
    return judge, saved["names"]


@torch.no_grad()
def name_scores(judge, images):
    """Logits (B, K) of pictures (B, 3, H, W) in [-1, 1] of any size."""
    if images.shape[-1] != 64:
        images = F.interpolate(images, (64, 64), mode="area")
    return torch.cat([judge(part) for part in images.split(128)])


# --------------------------------------------------------------------------------------------------
# Disguises: random changes of everything but the shape. All take and return values in [0, 1]

def smooth_noise(generator, batch, channels):
    """Noise (B, channels, 64, 64) of one of several scales for the whole batch, in [0, 1]."""
    side = (3, 6, 12, 24, 64)[int(torch.randint(5, (), generator=generator))]
    noise = torch.rand(batch, channels, side, side, generator=generator)
    return F.interpolate(noise, (64, 64), mode="bicubic").clamp(0, 1)


def random_curves(x, generator):
    """Each channel through a random curve of five points, which need not rise."""
    B = len(x)
    points = torch.rand(B, 3, 5, generator=generator)
    place = x.clamp(0, 1) * 3.999
    low = place.floor().long()
    share = place - low
    curves = points[..., None].expand(-1, -1, -1, 64 * 64)
    low = low.flatten(2)[:, :, None]
    y = torch.lerp(curves.gather(2, low), curves.gather(2, low + 1), share.flatten(2)[:, :, None])
    return y.view_as(x)


def random_convolution(x, generator):
    """Random filters of 1 x 1, 3 x 3 or 5 x 5 for the whole batch, at a random strength each."""
    size = (1, 3, 5)[int(torch.randint(3, (), generator=generator))]
    filters = torch.randn(3, 3, size, size, generator=generator) / (3 * size)
    y = F.conv2d(F.pad(x - 0.5, [size // 2] * 4, mode="replicate"), filters)
    y = y / y.std((1, 2, 3), keepdim=True).clamp(min=0.02) * 0.25 + 0.5
    strength = torch.rand(len(x), 1, 1, 1, generator=generator)
    return torch.lerp(x, y, strength).clamp(0, 1)


def moved(rgba, generator):
    """Drawings (B, 4, 64, 64), alpha premultiplied, scaled, turned, sheared, shifted, mirrored."""
    B = len(rgba)
    scale = torch.rand(B, 1, 1, generator=generator) * 0.7 + 0.85
    matrix = torch.eye(2) * scale + 0.1 * torch.randn(B, 2, 2, generator=generator)
    mirror = torch.where(torch.rand(B, generator=generator) < 0.5, -1.0, 1.0)
    matrix[:, :, 0] *= mirror[:, None]
    shift = 0.12 * torch.randn(B, 2, 1, generator=generator)
    grid = F.affine_grid(torch.cat([matrix, shift], 2), rgba.shape, align_corners=False)
    return F.grid_sample(rgba, grid, align_corners=False)


def disguised(rgba, generator):
    """Drawings (B, 4, 64, 64) with straight alpha in [0, 1] -> pictures (B, 3, 64, 64)."""
    B = len(rgba)

    def chance(p):
        """(B, 1, 1, 1) bool, true with probability p."""
        return torch.rand(B, 1, 1, 1, generator=generator) < p

    alpha = rgba[:, 3:]
    rgba = moved(torch.cat([rgba[:, :3] * alpha, alpha], 1), generator)
    a = rgba[:, 3:].clamp(0, 1)
    x = rgba[:, :3] / a.clamp(min=0.05)

    # the object: other colours, no colours, or another texture that keeps its light
    x = torch.where(chance(0.35), random_curves(x, generator), x)
    grey = x.mean(1, keepdim=True)
    x = torch.where(chance(0.2), grey.expand_as(x), x)
    tint = torch.rand(B, 3, 1, 1, generator=generator)
    x = torch.where(chance(0.25), grey * tint * 1.3, x)
    texture = smooth_noise(generator, B, 3)
    light = torch.rand(B, 1, 1, 1, generator=generator)
    x = torch.where(chance(0.2), torch.lerp(texture, grey.expand_as(x), light), x)

    # the background: one colour, noise, or parts of other drawings
    ground = torch.rand(B, 3, 1, 1, generator=generator).expand(-1, -1, 64, 64)
    extreme = torch.randint(2, (B, 1, 1, 1), generator=generator).float().expand_as(ground)
    ground = torch.where(chance(0.3), extreme, ground)
    mottled = torch.lerp(ground, smooth_noise(generator, B, 3), torch.rand(B, 1, 1, 1,
                                                                           generator=generator))
    ground = torch.where(chance(0.4), mottled, ground)
    others = F.avg_pool2d(rgba[torch.randperm(B, generator=generator), :3], 7, 1, 3)
    ground = torch.where(chance(0.1), others, ground)
    picture = torch.lerp(ground, x, a)

    # contours alone, or dark contours over it
    across = F.pad(picture, (0, 1, 0, 0), mode="replicate").diff(dim=-1).abs()
    down = F.pad(picture, (0, 0, 0, 1), mode="replicate").diff(dim=-2).abs()
    lines = ((across + down).mean(1, keepdim=True) * 4).clamp(0, 1)
    ink = torch.rand(B, 3, 1, 1, generator=generator)
    picture = torch.where(chance(0.12), torch.lerp(ground, ink.expand_as(ground), lines), picture)
    picture = torch.where(chance(0.12), picture * (1 - lines), picture)

    # the whole: filters, holes where the background shows, displacement, noise, softness
    picture = torch.where(chance(0.3), random_convolution(picture, generator), picture)
    holes = (smooth_noise(generator, B, 1) > 0.78)
    picture = torch.where(chance(0.15) & holes, ground, picture)
    wander = (torch.rand(B, 2, 9, 9, generator=generator) - 0.5) * 0.15
    wander = F.interpolate(wander, (64, 64), mode="bicubic") * chance(0.3)
    still = F.affine_grid(torch.eye(2, 3).expand(B, 2, 3), picture.shape, align_corners=False)
    picture = F.grid_sample(picture, still + wander.movedim(1, -1), padding_mode="border",
                            align_corners=False)
    picture = torch.where(chance(0.2), F.avg_pool2d(picture, 3, 1, 1, count_include_pad=False),
                          picture)
    noise = torch.randn(picture.shape, generator=generator) * 0.15
    return (picture + noise * chance(0.3) * torch.rand(B, 1, 1, 1, generator=generator)).clamp(0, 1)


# --------------------------------------------------------------------------------------------------
# Training

def free_pictures(drawings, rng):
    """uint8 (n, 64, 64, 4) in styles of data/free_styles.py -> (n, 3, 64, 64) in [0, 1]."""
    painted = [free_styles.paint(rgba, np.random.default_rng(rng.integers(2 ** 31)), rng)
               for rgba in drawings]
    return (to_tensor(np.stack(painted)) + 1) / 2


def train(args):
    torch.manual_seed(args.seed)
    art = data.Art(size=64)
    names = sorted(set(art.names))
    labels = torch.tensor([names.index(name) for name in art.names])
    drawings = torch.from_numpy(art.drawings).permute(0, 3, 1, 2).float() / 255
    judge = ObjectJudge(JudgeConfig(names=len(names))).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(judge.parameters(), args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.lr, args.steps, pct_start=0.05)
    vqgan = StyleDrop.load(device="cpu").vqgan
    generator = torch.Generator().manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    began = time.time()
    right = []
    kept_pictures = torch.empty(0, 3, 64, 64)
    kept_labels = torch.empty(0, dtype=torch.long)
    for step in range(args.steps):
        rows = torch.randint(len(labels), (args.batch,), generator=generator)
        pictures = disguised(drawings[rows], generator)

        # painted pictures are costly: a few new ones per step, and many that were painted before
        new_rows = torch.randint(len(labels), (args.batch // 16,), generator=generator)
        new = free_pictures(art.drawings[new_rows.numpy()], rng)
        kept_pictures = torch.cat([kept_pictures, new])[-8192:]
        kept_labels = torch.cat([kept_labels, labels[new_rows]])[-8192:]
        old_rows = torch.randint(len(kept_labels), (args.batch // 3,), generator=generator)
        mirrored = torch.rand(len(old_rows), 1, 1, 1, generator=generator) < 0.5
        painted = kept_pictures[old_rows]
        painted = torch.where(mirrored, painted.flip(-1), painted)
        pictures = torch.cat([pictures, painted]) * 2 - 1
        targets = torch.cat([labels[rows], kept_labels[old_rows]])

        part = slice(None, None, 10)                 # a tenth as the tokenizer reconstructs it
        pictures[part] = vqgan.decode(vqgan.encode(pictures[part]))
        pictures = pictures.to(memory_format=torch.channels_last)
        with autocast("cpu"):
            logits = judge(pictures)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        right.append((logits.argmax(-1) == targets).float().mean().item())
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            print(f"step {step + 1}/{args.steps}  loss {loss.item():.3f}  "
                  f"named {np.mean(right[-args.every:]):.3f}  {time.time() - began:.0f} s",
                  flush=True)
            provenance = dict(vars(args), step=step + 1, minutes=(time.time() - began) / 60)
            save_model(args.out, "object judge", judge, provenance, names=names)
    judge.eval()
    ceilings = {}                                            # written into the file, too
    for role in ("training", "held-out"):
        for kind in ("as drawn", "disguised", "free styles"):
            named, count = accuracy(judge, names, role, kind)
            ceilings[f"{role} sets, {kind}"] = named
            print(f"{role} sets, {kind}: {named:.1%} of {count} named among {len(names)}")
    save_model(args.out, "object judge", judge, provenance | dict(ceilings=ceilings), names=names)


@torch.no_grad()
def accuracy(judge, names, role, kind, count=1000):
    """The share of `count` drawings whose name it ranks first, and `count`.

    kind: "as drawn", "disguised" or "free styles".
    """
    art = data.Art(role=role, size=64)
    rng = np.random.default_rng(1)
    known = [i for i, name in enumerate(art.names) if name in names]
    picks = rng.choice(known, count)
    targets = torch.tensor([names.index(art.names[i]) for i in picks])
    rgba = art.drawings[picks]
    if kind == "free styles":
        pictures = free_pictures(rgba, rng)
    else:
        planes = torch.from_numpy(rgba).permute(0, 3, 1, 2).float() / 255
        if kind == "as drawn":
            pictures = planes[:, :3] * planes[:, 3:] + 1 - planes[:, 3:]
        else:
            pictures = disguised(planes, torch.Generator().manual_seed(1))
    scores = name_scores(judge, pictures * 2 - 1)
    return (scores.argmax(-1) == targets).float().mean().item(), count


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--steps", type=whole(1, 10**6), default=6000, help="training steps (default: %(default)s)")
    add("--batch", type=whole(16, 65536), default=96,
        help="disguised drawings in a step; a third as many painted ones are added "
             "(default: %(default)s)")
    add("--lr", type=number(float, 0, 1, above=True), default=3e-3,
        help="peak learning rate (default: %(default)s)")
    add("--every", type=whole(1, 10**6), default=200, help="steps between two lines of progress")
    add("--seed", type=whole(0, 2**31), default=0, help="random seed (default: %(default)s)")
    add("--out", type=filled, default=str(WEIGHTS), help="the file to write (default: %(default)s)")
    args = parser.parse_args()
    check_place(args.out, is_folder=False)
    train(args)


if __name__ == "__main__":
    run_command(main)
