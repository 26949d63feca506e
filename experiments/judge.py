"""An independent judge: what does a picture show, and in which style? The base never learns from it.

    python experiments/judge.py --out experiments/judge.pt     # the same command again goes on

A small classifier of described pictures, trained on all the art there is, openmoji and the held-out
styles too, a quarter of it as the tokenizer gives it back. A picture is described as people did before
networks learned to (`hog_features`): histograms of oriented gradients, which know shapes and forget colours.
That is why half an hour of one core suffices: a convolutional classifier, from pixels, named 13 % of the
drawings among 100 after 46,000 pictures; this one names 99 % after 358,000. One drawing in twenty it
never sees (`held_back`): what it says of those is how far it can be trusted with a thing drawn anew.

    judge = load_judge("experiments/judge.pt")
    content_correct(judge, images, names, generator)        # (B,) is the named thing first among 100?
    attributes(judge, images)                               # {"palette": B values, "medium": ...}

Shapes: B pictures (B, 3, 64, 64) in [-1, 1], K names.
"""

import math
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

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
from styledrop import load_model, read_checkpoint, save_model, to_tensor, write_whole  # noqa: E402
from vqgan import VQGAN, VQGANConfig  # noqa: E402

SETS = [row["set"] for row in data.read_table("sets.tsv")]
VALUES = {k: ["", *values] for k, values in styles.ATTRIBUTES.items()} | {"hand": SETS}     # hand: whose drawing
AMONG = 100                             # the named thing against 99 others


# ---------------------------------------------------------------------------------------------
# What the classifier reads

def hog_features(images, cell=8, orientations=8):
    """What is to be seen in each cell of a picture, and statistics that know no places.

    images (B, 3, S, S) in [-1, 1], cells of `cell` pixels, a multiple of 4 -> cells (B, 3 (orientations + 1) + 3,
    S / cell, S / cell), statistics (B, 9 orientations + 447).
    At three scales: how much of a cell's gradient points each way, divided by how much there is around
    it (histograms of oriented gradients, Dalal & Triggs 2005), and how much there is. The statistics have
    histograms of colour too, of all pixels and of the edges.
    """
    mean_and_deviation = lambda x: [x.mean((2, 3)), x.std((2, 3))]
    cells, statistics, sizes = [F.avg_pool2d(images, cell)], mean_and_deviation(images), []
    angles = torch.arange(orientations, device=images.device).view(-1, 1, 1) * math.pi / orientations
    for scale in (1, 2, 4):
        x = F.pad(F.avg_pool2d(images, scale), (1, 1, 1, 1), mode="replicate")
        dx = (x[..., 1:-1, 2:] - x[..., 1:-1, :-2]) / 2
        dy = (x[..., 2:, 1:-1] - x[..., :-2, 1:-1]) / 2
        channel = (dx ** 2 + dy ** 2).argmax(1, keepdim=True)                    # the steepest of R, G and B
        dx, dy = dx.gather(1, channel), dy.gather(1, channel)
        size = (dx ** 2 + dy ** 2).sqrt()
        towards = size * torch.cos(torch.atan2(dy, dx) - angles) ** 6            # (B, orientations, h, h)
        here = F.avg_pool2d(towards, cell // scale)                              # (B, orientations, S / cell, S / cell)
        around = F.avg_pool2d(F.pad(here.sum(1, keepdim=True), (1, 1, 1, 1), mode="replicate"), 3, 1)
        cells += [(here / (around + 0.02)).sqrt(), around.sqrt()]
        statistics += mean_and_deviation(towards) + mean_and_deviation(size) + [(here.std((2, 3)) + 1e-6).log()]
        statistics += [size.amax((2, 3))]
        sizes.append(size)
    levels = ((images + 1) * 2.999).long().clamp(0, 5)                           # 6 of each of R, G and B
    colour = (levels[:, 0] * 36 + levels[:, 1] * 6 + levels[:, 2]).flatten(1)    # (B, S S)
    for weight in (torch.ones_like(sizes[0]), sizes[0] + 1e-6):                  # (B, 1, S, S)
        weight = weight.flatten(1) / weight.sum((1, 2, 3))[:, None]
        statistics.append(torch.zeros(len(images), 216, device=images.device).scatter_add(1, colour, weight).sqrt())
    return torch.cat(cells, 1), torch.cat(statistics, 1)


def mlp_layer(c_in, c_out, drop):
    """One layer of an MLP on descriptions."""
    return nn.Sequential(nn.Dropout(drop), nn.Linear(c_in, c_out, bias=False), nn.BatchNorm1d(c_out), nn.GELU())


# ---------------------------------------------------------------------------------------------
# The classifier

@dataclass
class JudgeConfig:
    width: int = 768
    style_width: int = 192                  # of the features that the heads of style share


class Judge(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        cells, statistics = (x.flatten(1).shape[1] for x in hog_features(torch.zeros(1, 3, 64, 64)))

        self.cells = nn.BatchNorm1d(cells, affine=False)     # only so that all inputs are of one size
        self.statistics = nn.BatchNorm1d(statistics, affine=False)
        self.content = nn.Sequential(mlp_layer(cells, config.width, 0.3), mlp_layer(config.width, config.width, 0.4),
                                     nn.Dropout(0.4), nn.Linear(config.width, len(data.names())))
        self.style = nn.Sequential(mlp_layer(cells + statistics, config.width, 0.2), mlp_layer(config.width, config.style_width, 0.2))
        self.heads = nn.ModuleDict({k: nn.Linear(config.style_width, len(values)) for k, values in VALUES.items()})

    def forward(self, images):
        """Pictures (B, 3, H, W) in [-1, 1], seen at 64 x 64 -> {"content": (B, K), "style": features
        (B, D), and for each attribute logits}."""
        images = F.interpolate(images, (64, 64), mode="area") if images.shape[-1] != 64 else images
        cells, statistics = hog_features(images)
        cells, statistics = self.cells(cells.flatten(1)), self.statistics(statistics)
        style = self.style(torch.cat([cells, statistics], 1))
        return {"content": self.content(cells), "style": style} | {k: head(style) for k, head in self.heads.items()}


def load_judge(path):
    """Raises ValueError in one line if the file is none, or its names or values are not those of data/ now."""
    judge, saved = load_model(path, "judge", JudgeConfig, Judge)
    if saved["names"] != data.names() or saved["values"] != VALUES:
        raise ValueError(f"{path} was trained for other names or styles than data/ has now; train it again")
    return judge


def judge_or_none(path):
    """The judge, or None and a line that says so: what can be measured without one still is."""
    if Path(path).exists():
        return load_judge(path)
    print(f"no judge at {path}: only what needs none is measured (experiments/judge.py trains one)", flush=True)
    return None


# ---------------------------------------------------------------------------------------------
# Questions

@torch.no_grad()
def ask(judge, images, head, at_once=256):
    device = next(judge.parameters()).device
    return torch.cat([judge(part.to(device))[head].cpu() for part in images.split(at_once)])


def rank_among(scores, wanted, generator, among=AMONG):
    """How many of `among` - 1 random others score as high as the wanted one: 0 is recognised.

    scores (B, K), wanted (B,) column numbers -> (B,) ranks in [0, among).
    """
    B, K = scores.shape
    others = torch.rand(B, K - 1, generator=generator).argsort(1)[:, :among - 1]
    others = others + (others >= wanted[:, None])                                # skip the wanted one
    return (scores.gather(1, others) >= scores.gather(1, wanted[:, None])).sum(1)


def content_correct(judge, images, names, generator, top=1):
    """(B,) bool: is the named thing among the `top` best of it and 99 others?"""
    number_of = {name: i for i, name in enumerate(data.names())}
    wanted = torch.tensor([number_of[name] for name in names])
    return rank_among(ask(judge, images, "content"), wanted, generator) < top


def attributes(judge, images):
    """{attribute: B values}, the likeliest of those that words can name; and "hand", whose drawing it is (a set)."""
    unnamed = {k: torch.tensor([value in styles.UNNAMED for value in values]) for k, values in VALUES.items()}
    return {k: [values[i] for i in ask(judge, images, k).masked_fill(unnamed[k], -math.inf).argmax(1)]
            for k, values in VALUES.items()}


def style_features(judge, images):
    """(B, D) of unit length: their dot product says how alike two styles look."""
    return F.normalize(ask(judge, images, "style"), dim=1)


# ---------------------------------------------------------------------------------------------
# Pictures with their truth

def held_back(art):
    """Indices of the drawings that the judge is not trained on, about one in twenty."""
    return [i for i, pair in enumerate(zip(art.names, art.sets)) if zlib.crc32("|".join(pair).encode()) % 20 == 0]


def draw(art, picks, rng, held_out):
    """Drawings `picks`, each in a style of its own -> images (B, 3, 64, 64), {head: (B,) right answers}.

    held_out: the share of the styles that the base never has.
    """
    images, number_of = [], {name: i for i, name in enumerate(data.names())}
    truth = {k: [] for k in ("content", *VALUES)}
    for i in picks:
        style = styles.sample(rng, held_out=rng.random() < held_out)
        images.append(styles.apply(style, data.jitter(art.drawings[i], 64, rng), rng))
        truth["content"].append(number_of[art.names[i]])
        for k, values in VALUES.items():
            truth[k].append(values.index(art.sets[i] if k == "hand" else getattr(style, k)))
    return to_tensor(np.stack(images)), {k: torch.tensor(v) for k, v in truth.items()}


def soften(image, rng):
    """Slightly blurred, (3, h, w) in [-1, 1]: samples are softer than drawings."""
    pixels = ((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    blurred = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.9)))
    return to_tensor(np.asarray(blurred)[None])[0]


def reconstruct(vqgan, images, at_once=64):
    """Pictures as the tokenizer gives them back."""
    device = next(vqgan.parameters()).device
    return torch.cat([vqgan.decode(vqgan.encode(part.to(device))).cpu() for part in images.split(at_once)])


class Batches(torch.utils.data.Dataset):
    """Batch number `step`, always the same one, so that a resumed run equals an unbroken one.

    Every fourth picture is the tokenizer's of a drawing, every fourth is blurred.
    """

    def __init__(self, art, vqgan, batch, seed):
        self.art, self.vqgan, self.batch, self.seed = art, vqgan, batch, seed
        self.picks = np.setdiff1d(np.arange(len(art.names)), held_back(art))

    def __len__(self):
        return 2 ** 31

    def __getitem__(self, step):
        rng = np.random.default_rng((self.seed, step))
        images, truth = draw(self.art, rng.choice(self.picks, self.batch), rng, held_out=0.5)
        images = torch.stack([soften(image, rng) if rng.random() < 0.25 else image for image in images])
        images[::4] = reconstruct(self.vqgan, images[::4])
        return images, truth


# ---------------------------------------------------------------------------------------------
# Training

def judge_loss(out, truth):
    """Content weighs as much as all of style."""
    style = [F.cross_entropy(out[k], truth[k]) for k in VALUES]
    return F.cross_entropy(out["content"], truth["content"], label_smoothing=0.1) + sum(style) / len(style)


def report(judge, vqgan, art, count, seed=1):
    """Lines of a table: how often the judge is right on real pictures, and on the tokenizer's of the same.

    An attribute counts where it is named.
    """
    heads = ["content among 100", "content", *VALUES]
    lines = ["| drawings | styles | | " + " | ".join(heads) + " |", "|---" * (3 + len(heads)) + "|"]
    unseen = held_back(art)
    for which, picks in (("seen", np.setdiff1d(np.arange(len(art.names)), unseen)), ("unseen", unseen)):
        for held_out in (0, 1):
            rng = np.random.default_rng((seed, held_out))
            images, truth = draw(art, rng.choice(picks, count), rng, held_out)
            for kind, shown in (("real", images), ("reconstructed", reconstruct(vqgan, images))):
                rank = rank_among(ask(judge, shown, "content"), truth["content"], torch.Generator().manual_seed(seed))
                right, seen = [rank == 0, ask(judge, shown, "content").argmax(1) == truth["content"]], attributes(judge, shown)
                for k, values in VALUES.items():
                    asked = [values[i] for i in truth[k]]
                    right.append(torch.tensor([a == saw for a, saw in zip(asked, seen[k]) if a not in styles.UNNAMED]))
                cells = " | ".join(f"{100 * r.float().mean():.1f} %" for r in right)
                lines.append(f"| {which} | {'held-out' if held_out else 'training'} | {kind} | {cells} |")
    return lines


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="weights/tiny", help="folder of vqgan.pt")
    parser.add_argument("--out", default="experiments/judge.pt")
    parser.add_argument("--steps", type=number(int, 1), default=2800)
    parser.add_argument("--batch", type=number(int, 2), default=128)
    parser.add_argument("--lr", type=number(float, 0, strict=True), default=2e-3, help="at the top of the cycle")
    parser.add_argument("--workers", type=number(int, 0), default=1, help="processes that draw (0: this one)")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--every", type=number(int, 1), default=50, help="steps from one line to the next")
    parser.add_argument("--count", type=number(int, 1), default=1000, help="pictures in each line of the final table")
    parser.add_argument("--results", default="experiments/results", help="folder of judge.md")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    vqgan = load_model(Path(args.weights) / "vqgan.pt", "vqgan", VQGANConfig, VQGAN)[0]
    art, judge = data.Art(SETS), Judge(JudgeConfig()).to(device)
    optimiser = torch.optim.AdamW(judge.parameters(), args.lr, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.lr, args.steps, pct_start=0.15)
    recipe = dict(steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed)
    checkpoint, done = Path(args.out).with_suffix(".checkpoint"), 0
    if checkpoint.exists():
        saved = read_checkpoint(checkpoint, "judge in training")
        if saved["recipe"] != recipe:
            raise ValueError(f"{checkpoint} was made with {saved['recipe']}; give the same, or another --out")
        for name, part in dict(judge=judge, optimiser=optimiser, cycle=cycle).items():
            part.load_state_dict(saved[name])
        done = saved["done"]
        print(f"going on from step {done}", flush=True)

    began, first, kept, losses, right = time.time(), done, time.time(), [], []
    loader = torch.utils.data.DataLoader(Batches(art, vqgan, args.batch, args.seed), batch_size=None,
                                         num_workers=args.workers, sampler=range(done, args.steps))
    for images, truth in loader:
        truth = {k: v.to(device) for k, v in truth.items()}
        out = judge(images.to(device))
        loss = judge_loss(out, truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        cycle.step()
        done += 1
        losses.append(loss.item())
        right.append([(out[k].argmax(1) == truth[k]).float().mean().item() for k in truth])
        if done % args.every == 0 or done == args.steps:
            speed = (done - first) / (time.time() - began)
            said = "  ".join(f"{k} {r:.2f}" for k, r in zip(truth, np.mean(right, 0)))
            print(f"step {done}/{args.steps}  loss {np.mean(losses):.3f}  {said}  {speed * args.batch:.0f} images/s  "
                  f"{(args.steps - done) / speed / 60:.0f} min left", flush=True)
            losses, right = [], []
        if time.time() - kept > 120 or done == args.steps:
            state = dict(kind="judge in training", recipe=recipe, done=done, judge=judge.state_dict(),
                         optimiser=optimiser.state_dict(), cycle=cycle.state_dict())
            write_whole(checkpoint, lambda file: torch.save(state, file))
            kept = time.time()

    provenance = dict(recipe, command="python experiments/judge.py", weights=args.weights, device=device,
                      torch=str(torch.__version__))
    save_model(args.out, "judge", judge, provenance, names=data.names(), values=VALUES)
    judge = load_judge(args.out).to(device)                  # what is measured is what was saved
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB")
    lines = ["# The judge, judged", "", f"`python {' '.join(sys.argv)}`", "", f"{args.steps} steps of {args.batch} pictures. "
             f"{args.count} fresh pictures a row: seen and unseen are the drawings, every style is new. A thing is named among "
             f"{AMONG}, then among all {len(data.names())}; an attribute, where it is named, among its values; hand among the sets.", ""]
    lines += report(judge, vqgan, art, args.count)
    write_whole(Path(args.results) / "judge.md", lambda file: file.write(("\n".join(lines) + "\n").encode()))
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
