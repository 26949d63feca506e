"""An independent judge: what does a picture show, in which style? The base never learns from it.

    python experiments/judge.py --out experiments/judge.pt     # the same command again goes on

A small classifier of described pictures, trained on all the art there is, OpenMoji and the held-out
styles too, a quarter of it as the tokenizer gives it back. A picture is described as people did
before networks learned to (`hog_features`): histograms of oriented gradients, which know shapes and
forget colours. That is why half an hour of one core suffices: a convolutional classifier, from
pixels, named 13 % of the drawings among 100 after 46,000 pictures; this one names 99 % after
358,000. One drawing in twenty it never sees (`held_back`): what it says of those is how far it can
be trusted with an object drawn anew.

    judge = load_judge("experiments/judge.pt")
    named(judge, images, names)         # (B,) the chance that the name wins against 99 others
    attributes(judge, images)           # {"palette": B values, "medium": ...}

Shapes: B pictures (B, 3, 64, 64) in [-1, 1], K names.
"""

import math
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from data import styles  # noqa: E402
from commandline import Parser, number, run_command  # noqa: E402
from experiments.common import (AMONG, among, give_back, heading, keep, numbers_of,  # noqa: E402
                                resume, table, write_text)
from styledrop import load_model, save_model, to_tensor  # noqa: E402
from vqgan import VQGAN, VQGANConfig  # noqa: E402

SETS = [row["set"] for row in data.read_table("sets.tsv")]
VALUES = {k: ["", *values] for k, values in styles.ATTRIBUTES.items()} | {"hand": SETS}
# "hand" is the icon set: whose drawing it is
EVERY = 50                              # steps from one line of the log to the next


# ---------------------------------------------------------------------------------------------
# What the classifier reads

def hog_features(images, cell=8, orientations=8):
    """What is to be seen in each cell of a picture, and statistics that know no places.

    images (B, 3, S, S) in [-1, 1], cells of `cell` pixels, a multiple of 4 -> cells
    (B, 3 (orientations + 1) + 3, S / cell, S / cell), statistics (B, 9 orientations + 447).
    At three scales: how much of a cell's gradient points each way, divided by how much there is
    around it (histograms of oriented gradients, Dalal & Triggs 2005), and how much there is. The
    statistics have histograms of colour too, of all pixels and of the edges.
    """
    mean_and_deviation = lambda x: [x.mean((2, 3)), x.std((2, 3))]
    cells, statistics, sizes = [F.avg_pool2d(images, cell)], mean_and_deviation(images), []
    angles = torch.arange(orientations, device=images.device).view(-1, 1, 1)
    angles = angles * math.pi / orientations
    for scale in (1, 2, 4):
        x = F.pad(F.avg_pool2d(images, scale), (1, 1, 1, 1), mode="replicate")
        dx = (x[..., 1:-1, 2:] - x[..., 1:-1, :-2]) / 2
        dy = (x[..., 2:, 1:-1] - x[..., :-2, 1:-1]) / 2
        channel = (dx ** 2 + dy ** 2).argmax(1, keepdim=True)       # the steepest of R, G and B
        dx, dy = dx.gather(1, channel), dy.gather(1, channel)
        size = (dx ** 2 + dy ** 2).sqrt()
        towards = size * torch.cos(torch.atan2(dy, dx) - angles) ** 6   # (B, orientations, h, h)
        here = F.avg_pool2d(towards, cell // scale)         # (B, orientations, S / cell, S / cell)
        around = F.pad(here.sum(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        around = F.avg_pool2d(around, 3, 1)
        cells += [(here / (around + 0.02)).sqrt(), around.sqrt()]
        statistics += mean_and_deviation(towards) + mean_and_deviation(size)
        statistics += [(here.std((2, 3)) + 1e-6).log(), size.amax((2, 3))]
        sizes.append(size)
    levels = ((images + 1) * 2.999).long().clamp(0, 5)      # 6 of each of R, G and B
    colour = (levels[:, 0] * 36 + levels[:, 1] * 6 + levels[:, 2]).flatten(1)    # (B, S S)
    for weight in (torch.ones_like(sizes[0]), sizes[0] + 1e-6):                  # (B, 1, S, S)
        weight = weight.flatten(1) / weight.sum((1, 2, 3))[:, None]
        histogram = torch.zeros(len(images), 216, device=images.device)
        statistics.append(histogram.scatter_add(1, colour, weight).sqrt())
    return torch.cat(cells, 1), torch.cat(statistics, 1)


def mlp_layer(c_in, c_out, drop):
    """One layer of an MLP on descriptions."""
    return nn.Sequential(nn.Dropout(drop), nn.Linear(c_in, c_out, bias=False),
                         nn.BatchNorm1d(c_out), nn.GELU())


# ---------------------------------------------------------------------------------------------
# The classifier

@dataclass
class JudgeConfig:
    width: int = 768
    style_width: int = 192                  # of the features that the heads of style share


class Judge(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.width
        cells, statistics = (x.flatten(1).shape[1] for x in hog_features(torch.zeros(1, 3, 64, 64)))

        self.cells = nn.BatchNorm1d(cells, affine=False)     # inputs of one size
        self.statistics = nn.BatchNorm1d(statistics, affine=False)
        self.content = nn.Sequential(mlp_layer(cells, width, 0.3), mlp_layer(width, width, 0.4),
                                     nn.Dropout(0.4), nn.Linear(width, len(data.names())))
        self.style = nn.Sequential(mlp_layer(cells + statistics, width, 0.2),
                                   mlp_layer(width, config.style_width, 0.2))
        self.heads = nn.ModuleDict({k: nn.Linear(config.style_width, len(values))
                                    for k, values in VALUES.items()})

    def forward(self, images):
        """(B, 3, H, W) in [-1, 1], seen at 64 x 64 -> {"content": (B, K), "style": features (B, D),
        and for each attribute logits}.
        """
        images = F.interpolate(images, (64, 64), mode="area") if images.shape[-1] != 64 else images
        cells, statistics = hog_features(images)
        cells, statistics = self.cells(cells.flatten(1)), self.statistics(statistics)
        style = self.style(torch.cat([cells, statistics], 1))
        heads = {k: head(style) for k, head in self.heads.items()}
        return {"content": self.content(cells), "style": style} | heads


def load_judge(path):
    """Raises ValueError if the file is none, or its names or values are not those of data/ now."""
    judge, saved = load_model(path, "judge", JudgeConfig, Judge)
    if saved["names"] != data.names() or saved["values"] != VALUES:
        raise ValueError(f"{path} was trained for other names or styles than data/ has now; "
                         "train it again")
    return judge


# ---------------------------------------------------------------------------------------------
# Questions

@torch.no_grad()
def ask(judge, images, head, at_once=256):
    device = next(judge.parameters()).device
    return torch.cat([judge(part.to(device))[head].cpu() for part in images.split(at_once)])


def named(judge, images, names):
    """(B,) the chance that the judge prefers the name to 99 random others."""
    return among(ask(judge, images, "content"), numbers_of(names))


def attributes(judge, images):
    """{attribute: B values}: the likeliest of those that words can name; "hand": the icon set."""
    found = {}
    for k, values in VALUES.items():
        unnamed = torch.tensor([value in styles.UNNAMED for value in values])
        best = ask(judge, images, k).masked_fill(unnamed, -math.inf).argmax(1)
        found[k] = [values[i] for i in best]
    return found


def style_features(judge, images):
    """(B, D) of unit length: their dot product says how alike two styles look."""
    return F.normalize(ask(judge, images, "style"), dim=1)


# ---------------------------------------------------------------------------------------------
# Pictures with their right answers

def held_back(art):
    """Indices of the drawings that the judge is not trained on, about one in twenty."""
    pairs = zip(art.names, art.sets)
    return [i for i, pair in enumerate(pairs) if zlib.crc32("|".join(pair).encode()) % 20 == 0]


def in_style(art, i, style, rng):
    """Drawing number i, moved a little, in a style: uint8 (64, 64, 3)."""
    return styles.apply(style, data.jitter(art.drawings[i], 64, rng), rng)


def draw(art, picks, rng, held_out):
    """Drawings `picks`, each in a style of its own -> images (B, 3, 64, 64), {head: (B,) targets}.

    held_out: the share of the styles that the base never has.
    """
    images, targets = [], {k: [] for k in VALUES}
    for i in picks:
        style = styles.sample(rng, held_out=rng.random() < held_out)
        images.append(in_style(art, i, style, rng))
        for k, values in VALUES.items():
            targets[k].append(values.index(art.sets[i] if k == "hand" else getattr(style, k)))
    targets = {k: torch.tensor(v) for k, v in targets.items()}
    content = numbers_of([art.names[i] for i in picks])
    return to_tensor(np.stack(images)), {"content": content} | targets


def soften(image, rng):
    """Slightly blurred, (3, h, w) in [-1, 1]: samples are softer than drawings."""
    pixels = ((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    blurred = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.9)))
    return to_tensor(np.asarray(blurred)[None])[0]


class Batches(torch.utils.data.Dataset):
    """Batch number `step`, always the same one, so that a resumed run equals an unbroken one.

    Every fourth picture is the tokenizer's of a drawing, every fourth is blurred.
    """

    def __init__(self, art, tokenizer, batch, seed):
        self.art, self.tokenizer, self.batch, self.seed = art, tokenizer, batch, seed
        self.picks = np.setdiff1d(np.arange(len(art.names)), held_back(art))

    def __len__(self):
        return 2 ** 31

    def __getitem__(self, step):
        rng = np.random.default_rng((self.seed, step))
        images, targets = draw(self.art, rng.choice(self.picks, self.batch), rng, held_out=0.5)
        images = torch.stack([soften(x, rng) if rng.random() < 0.25 else x for x in images])
        images[::4] = give_back(self.tokenizer, images[::4])
        return images, targets


# ---------------------------------------------------------------------------------------------
# Training

def judge_loss(out, targets):
    """Content weighs as much as all of style."""
    content = F.cross_entropy(out["content"], targets["content"], label_smoothing=0.1)
    style = [F.cross_entropy(out[k], targets[k]) for k in VALUES]
    return content + sum(style) / len(style)


def report(judge, tokenizer, art, count, seed=1):
    """A table: how often the judge is right on real pictures, and on the tokenizer's of the same.

    An attribute counts where it is named.
    """
    rows, unseen = [], held_back(art)
    for which, picks in (("seen", np.setdiff1d(np.arange(len(art.names)), unseen)),
                         ("unseen", unseen)):
        for title, held_out in (("training", 0), ("held-out", 1)):
            rng = np.random.default_rng((seed, held_out))
            images, targets = draw(art, rng.choice(picks, count), rng, held_out)
            for kind, shown in (("real", images), ("reconstructed", give_back(tokenizer, images))):
                content, seen = ask(judge, shown, "content"), attributes(judge, shown)
                right = [among(content, targets["content"]),
                         content.argmax(1) == targets["content"]]
                for k, values in VALUES.items():
                    pairs = [(values[i], saw) for i, saw in zip(targets[k], seen[k])]
                    right.append(torch.tensor([asked == saw for asked, saw in pairs
                                               if asked not in styles.UNNAMED]))
                rows.append([which, title, kind, *(f"{100 * r.double().mean():.1f} %"
                                                   for r in right)])
    return table(["drawings", "styles", "", f"content among {AMONG}", "content", *VALUES], rows)


def train(args, art, tokenizer, judge):
    """Goes on from a checkpoint exactly where it stopped. Returns the recipe and all seconds."""
    device = next(judge.parameters()).device
    optimiser = torch.optim.AdamW(judge.parameters(), args.lr, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.lr, args.steps, pct_start=0.15)
    parts = dict(judge=judge, optimiser=optimiser, cycle=cycle)
    recipe = {k: getattr(args, k) for k in ("steps", "batch", "lr", "seed")}
    checkpoint, kind = Path(args.out).with_suffix(".checkpoint"), "judge in training"
    done, spent = resume(checkpoint, kind, recipe, **parts)
    first, losses, right = done, [], []
    began = kept = time.time()
    batches = Batches(art, tokenizer, args.batch, args.seed)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=args.workers,
                                         sampler=range(done, args.steps))
    for images, targets in loader:
        targets = {k: v.to(device) for k, v in targets.items()}
        out = judge(images.to(device))
        loss = judge_loss(out, targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        cycle.step()
        done += 1
        losses.append(loss.item())
        right.append([(out[k].argmax(1) == v).float().mean().item() for k, v in targets.items()])
        if done % EVERY == 0 or done == args.steps:
            speed = (done - first) / (time.time() - began)
            said = "  ".join(f"{k} {r:.2f}" for k, r in zip(targets, np.mean(right, 0)))
            print(f"step {done}/{args.steps}  loss {np.mean(losses):.3f}  {said}  "
                  f"{speed * args.batch:.0f} images/s  "
                  f"{(args.steps - done) / speed / 60:.0f} min left", flush=True)
            losses, right = [], []
        if time.time() - kept > 120 or done == args.steps:
            keep(checkpoint, kind, recipe, done, spent + time.time() - began, **parts)
            kept = time.time()
    return recipe, spent + (time.time() - began if done > first else 0)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", default="weights/tiny", help="folder of vqgan.pt")
    add("--out", default="experiments/judge.pt")
    add("--steps", type=number(int, 1), default=2800)
    add("--batch", type=number(int, 2), default=128)
    add("--lr", type=number(float, 0, strict=True), default=2e-3, help="at the top of the cycle")
    add("--workers", type=number(int, 0), default=1, help="processes that draw (0: this one)")
    add("--seed", type=number(int, 0), default=0)
    add("--count", type=number(int, 1), default=1000, help="pictures in each line of the table")
    add("--results", default="experiments/results", help="folder of judge.md")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    vqgan = load_model(Path(args.weights) / "vqgan.pt", "vqgan", VQGANConfig, VQGAN)[0]
    tokenizer = SimpleNamespace(vqgan=vqgan, device="cpu")   # what give_back needs of a pipeline
    art, judge = data.Art(SETS), Judge(JudgeConfig()).to(device)
    recipe, seconds = train(args, art, tokenizer, judge)
    provenance = dict(recipe, command="python experiments/judge.py", weights=args.weights,
                      device=device, torch=str(torch.__version__), seconds=round(seconds))
    save_model(args.out, "judge", judge, provenance, names=data.names(), values=VALUES)
    judge = load_judge(args.out).to(device)                  # what is measured is what was saved
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB")
    lines = [*heading("The judge, judged"), f"{args.steps} steps of {args.batch} pictures. "
             f"{args.count} fresh pictures a row: seen and unseen are the drawings, every style is "
             f"new. An object is named among {AMONG}, then among all {len(data.names())}; an "
             "attribute, where it is named, among its values; hand (the icon set) among the sets; "
             "ground is the background.", ""]
    text = "\n".join([*lines, *report(judge, tokenizer, art, args.count)])
    write_text(Path(args.results) / "judge.md", text)
    print(text)


if __name__ == "__main__":
    run_command(main)
