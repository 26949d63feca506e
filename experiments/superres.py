"""The second stage measured: what do 128 px hold that 64 px enlarged do not?

    python experiments/superres.py                  # results/superres.md, .json and .png; an hour
    python experiments/superres.py --names 4 --things 2 --styles 5   # too small to mean anything

Four questions, each beside its control. Restored: real drawings' 32 x 32 tokens from their true
16 x 16, against bicubic enlargement. Sampled: Fréchet distances of quality.py and the energy of
the Laplacian, against the same samples enlarged. Settings: the second stage's lambda_A and
lambda_B on three styles. Taught: ten other styles, with the second stage's adapter and without it.

What is done is kept in --cache, style by style; the same command goes on where it was stopped.

Shapes: B pictures (B, 3, S, S) in [-1, 1], N tokens.
"""

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from data import Scene, scenes, styles  # noqa: E402
from experiments.common import table, with_error, write_png, write_text  # noqa: E402
from experiments.one_shot import (draw, paired_bootstrap, palette_distance,  # noqa: E402
                                  texture_distance)
from experiments.quality import frechet, is_new, load_classifier, look, part  # noqa: E402
from pretrain.common import machine  # noqa: E402
from commandline import Parser, number, run_command  # noqa: E402
from data.pictures import grid  # noqa: E402
from styledrop import (Sampling, StyleDrop, load_adapter, style_prompt, to_tensor,  # noqa: E402
                       to_uint8, write_whole)

SECOND = dict(lambda_a=1.0, lambda_b=0.0, steps=12, gamma=0.0)           # as the pipeline has it
SWEEP = [(a, b) for b in (0.0, 1.0) for a in (0.0, 0.5, 1.0, 2.0)]       # lambda_A, lambda_B
TRIED = ("stained glass", "halftone", "embroidery")         # media of the sweep's styles
TAUGHT = ("stained glass", "halftone", "embroidery", "pencil hatching", "stained glass", "mosaic",
          "woodcut", "chalk", "stained glass", "stained glass")            # of those reported
FEW = 5                                                     # things in each style of the sweep
DISTANCES = ("palette", "texture", "finest")
DIGITS = {"PSNR": 2, "sharpness": 2}                        # of the others 4
WITHOUT, WITH = "without its adapter", "**with its adapter**"
CHOSEN, OTHER = "with it, at the chosen settings", "control: with another style's adapter"
SHOWN = ("reference", "64 px", "bicubic", "without", "with", "target")


# ---------------------------------------------------------------------------------------------
# Pictures and tokens

def enlarge(pipe, low, prompts, theta=None, seed=0, **sampling):
    """The second stage alone: tokens (B, N_low) -> (B, N). theta: its adapter, or None.

    Picture i has seed + i. The only place that asks the pipeline for one stage.
    """
    how, found = Sampling(**(SECOND | sampling)), []
    style = SimpleNamespace(superres=theta and theta.to(pipe.device))
    for i in range(0, len(low), 16):
        words, rows = list(prompts[i:i + 16]), low[i:i + 16]
        seeds = [torch.Generator(pipe.device).manual_seed(seed + i + k) for k in range(len(rows))]
        found.append(pipe.sample_tokens(words, words, style, None, how, seeds, None, rows))
    return torch.cat(found)


def first_stage(pipe, prompts, style=None, seed=0):
    """The base's tokens (B, N_low) of content phrases, picture i with seed + i."""
    found = []
    for i in range(0, len(prompts), 16):
        steps = []
        pipe.generate(prompts[i:i + 16], style, seed=seed + i, superres=False,
                      on_step=lambda step, ids, kept: steps.append(ids))
        found.append(steps[-1])
    return torch.cat(found)


@torch.no_grad()
def decode(pipe, ids):
    """Tokens (B, N) -> pictures, on the CPU."""
    side = math.isqrt(ids.shape[1])
    return torch.cat([pipe.vqgan.decode(x.view(-1, side, side)).cpu() for x in ids.split(16)])


@torch.no_grad()
def encode(pipe, images):
    """Pictures -> tokens (B, N)."""
    return torch.cat([pipe.vqgan.encode(x.to(pipe.device)).flatten(1) for x in images.split(16)])


def bicubic(images):
    return F.interpolate(images, scale_factor=2, mode="bicubic").clamp(-1, 1)


def drawings(arts, names, in_styles, seed):
    """One drawing of each name by any hand -> [(n, 3, 64, 64), (n, 3, 128, 128)], n captions.

    arts: the same Art at 64 and at 128 px. The same seed gives the same scene and style at both.
    """
    sizes, captions = [[], []], []
    for i, name in enumerate(names):
        for images, art in zip(sizes, arts):
            rng = np.random.default_rng((seed, i))
            style = styles.sample(rng, plain=0) if in_styles else styles.Style()
            rgba = scenes.draw(Scene((name,)), art, rng, art.drawings.shape[1])
            images.append(styles.apply(style, rgba, rng))
        captions.append(data.caption(data.content_phrase(name), styles.phrase(style)))
    return [to_tensor(np.stack(images)) for images in sizes], captions


# ---------------------------------------------------------------------------------------------
# Numbers

def psnr(x, y):
    """(B,) decibels of x against y."""
    return 10 * (4 / (x - y).square().mean((1, 2, 3)).clamp(min=1e-10)).log10()


def laplacian(images):
    """(B,) energy: the mean square of the Laplacian of grey."""
    grey = torch.einsum("c,bchw->bhw", torch.tensor([0.3, 0.59, 0.11]), images)[:, None]
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return F.conv2d(grey, kernel).square().mean((1, 2, 3))


def quadrants(images):
    """(B, 3, S, S) -> its four quarters (4 B, 3, S / 2, S / 2)."""
    return torch.cat([half for rows in images.chunk(2, 2) for half in rows.chunk(2, 3)])


def ratio(a, b, draws=10000):
    """Mean of a over mean of b, pairs (n,), with the 95 % interval of a paired bootstrap."""
    picks = torch.randint(len(a), (draws, len(a)), generator=torch.Generator().manual_seed(0))
    ends = (a[picks].mean(1) / b[picks].mean(1)).quantile(torch.tensor([0.025, 0.975]))
    return (a.mean() / b.mean()).item(), *ends.tolist()


def interval(a, b):
    return list(paired_bootstrap(a, b, torch.Generator().manual_seed(0)))


def distances(images, target):
    """{name: mean}: one_shot's distances, and of texture that at full size alone."""
    found = (palette_distance(images, target), texture_distance(images, target),
             texture_distance(images, target, scales=1))
    return {name: x.mean().item() for name, x in zip(DISTANCES, found)}


# ---------------------------------------------------------------------------------------------
# Restored and sampled

def restored(pipe, arts, names, in_styles, seed):
    """{row: [PSNR of each picture, Laplacian energy over the true picture's]}."""
    (small, large), captions = drawings(arts, names, in_styles, seed)
    low, empty = encode(pipe, small), [""] * len(captions)
    wrong = captions[1:] + captions[:1]
    second = lambda low, words, **how: decode(pipe, enlarge(pipe, low, words, **how))
    images = {"tokenizer's own at 128 px (ceiling)": decode(pipe, encode(pipe, large)),
              "**second stage**": second(low, captions),
              "second stage, likeliest tokens (top_k 1)": second(low, captions, top_k=1),
              "bicubic of the tokenizer's 64 px": bicubic(decode(pipe, low)),
              "bicubic of the true 64 px": bicubic(small),
              "control: the next picture's caption": second(low, wrong),
              "control: no caption": second(low, empty),
              "control: one decoding step": second(low, captions, steps=1),
              "control: the next picture's low tokens": second(low.roll(-1, 0), captions)}
    sharp = laplacian(large).mean()
    return {row: [psnr(x, large).tolist(), (laplacian(x).mean() / sharp).item()]
            for row, x in images.items()}


def sampled(pipe, net, arts, names, per, seed):
    """{row: {column: number}}, {claim: (ratio, low, high)} of plain prompts."""
    names = [name for name in names for _ in range(per)]
    prompts, known = [data.content_phrase(n) for n in names], [part(a, ~is_new(a)) for a in arts]
    reference = drawings(known, names, False, seed)[0][1]
    other64, other = drawings(known, names, False, seed + 1)[0]
    low = first_stage(pipe, prompts, seed=1000 * seed)
    images = {"real, other draws": other,
              "real at 64 px, enlarged": bicubic(other64),
              "given back by the tokenizer at 128 px": decode(pipe, encode(pipe, other)),
              "given back at 64 px, enlarged": bicubic(decode(pipe, encode(pipe, other64))),
              "**samples, both stages**": decode(pipe, enlarge(pipe, low, prompts, seed=2)),
              "control: samples of the base, enlarged": bicubic(decode(pipe, low)),
              "control: one decoding step of the second": decode(pipe, enlarge(
                  pipe, low, prompts, seed=2, steps=1))}
    whole = lambda x: look(net, F.interpolate(x, size=(64, 64), mode="area"))["features"]
    patches = lambda x: look(net, quadrants(x))["features"]
    seen = whole(reference), patches(reference)
    energy = {row: laplacian(x) for row, x in images.items()}
    rows = {row: {"quarters at 128 px": frechet(seen[1], patches(x)),
                  "whole, at 64 px": frechet(seen[0], whole(x)),
                  "Laplacian energy": energy[row].mean().item()} for row, x in images.items()}
    samples, base = "**samples, both stages**", "control: samples of the base, enlarged"
    return rows, {"samples / the same base samples enlarged": ratio(energy[samples], energy[base]),
                  "samples / real drawings": ratio(energy[samples], energy["real, other draws"])}


# ---------------------------------------------------------------------------------------------
# Taught by one drawing

def choose_styles(media, seed=0):
    """Held-out styles, all different: each medium in a palette that the base never had it in."""
    rng, chosen = np.random.default_rng(seed), []
    while len(chosen) < len(media):
        palette = str(rng.choice(styles.ATTRIBUTES["palette"]))
        style = styles.Style(palette, medium=media[len(chosen)])
        if styles.is_held_out(style) and style not in chosen:
            chosen.append(style)
    return chosen


class Lesson:
    """Both stages tuned on one drawing: `adapter`. Other drawings in that style: `target`."""

    def __init__(self, pipe, art, number, style, things, cache):
        names = np.random.default_rng((1, number)).permutation(sorted(art.index["noto"]))
        names = [str(name) for name in names[:things + 1]]
        self.pipe, self.seed, path = pipe, 100 * number, Path(cache) / f"style{number}.pt"
        self.reference = draw(art, names[:1], "noto", style, number)             # (1, 3, S, S)
        self.target = draw(art, names[1:], "noto", style, number)                # (B, 3, S, S)
        self.adapter = load_adapter(path) if path.exists() else None
        if self.adapter is None or self.adapter.about["base"] != pipe.base:
            self.adapter = pipe.tune(self.reference, [data.content_phrase(names[0])],
                                     styles.phrase(style))
            self.adapter.save(path)
        contents = [data.content_phrase(name) for name in names[1:]]
        self.prompts = [style_prompt(words, styles.phrase(style)) for words in contents]
        self.low = first_stage(pipe, contents, self.adapter, self.seed)          # the same for all

    def second(self, theta, low=None, **sampling):
        """Pictures by the second stage with an adapter of it, or None; always the same seeds."""
        low = self.low if low is None else low
        return decode(self.pipe, enlarge(self.pipe, low, self.prompts, theta, self.seed + 50,
                                         **sampling))


def tried(lesson):
    """{setting: distances} for the choice of lambda_A and lambda_B."""
    found = {}
    theta = lesson.adapter.superres
    for theta, a, b in [(None, 0, 0), (None, 0, 1), *((theta, *x) for x in SWEEP)]:
        title = f"lambda_A {a:g}, lambda_B {b:g}" if theta else f"{WITHOUT}, lambda_B {b:g}"
        found[title] = distances(lesson.second(theta, lambda_a=a, lambda_b=b), lesson.target)
    return found


def best_of(sweep):
    """(lambda_A, lambda_B) of least distance; palette and texture count alike. sweep: tried()s."""
    plain = f"{WITHOUT}, lambda_B 0"
    score = lambda title: sum(found[title][d] / found[plain][d] for found in sweep
                              for d in DISTANCES[:2])
    return min(SWEEP, key=lambda x: score("lambda_A {:g}, lambda_B {:g}".format(*x)))


def taught(lesson, other, best, path):
    """{"samples" | "from true low tokens": {row: distances}} of one style; its pictures in `path`.

    other: the second stage's adapter of another style. best: (lambda_A, lambda_B).
    """
    pipe, theta, target = lesson.pipe, lesson.adapter.superres, lesson.target
    small, how = decode(pipe, lesson.low), dict(lambda_a=best[0], lambda_b=best[1])
    images = {"bicubic of the base's 64 px": bicubic(small), WITHOUT: lesson.second(None),
              WITH: lesson.second(theta), OTHER: lesson.second(other),
              CHOSEN: lesson.second(theta, **how),
              "floor: the target, given back by the tokenizer": decode(pipe, encode(pipe, target)),
              "control: the target of the next thing": target.roll(1, 0)}
    low = encode(pipe, F.interpolate(target, scale_factor=0.5, mode="area"))
    again = {"bicubic of the tokenizer's 64 px": bicubic(decode(pipe, low)),
             WITHOUT: lesson.second(None, low), WITH: lesson.second(theta, low),
             OTHER: lesson.second(other, low)}
    row = [lesson.reference.expand_as(target), F.interpolate(small, scale_factor=2),
           images["bicubic of the base's 64 px"], images[WITHOUT], images[WITH], target]
    strip = np.stack([to_uint8(x) for x in row], 1)                     # (B, columns, 128, 128, 3)
    write_whole(path, lambda file: np.save(file, strip))
    measures = lambda x: distances(x, target) | {
        "sharpness": (laplacian(x).mean() / laplacian(target).mean()).item(),
        "PSNR": psnr(x, target).mean().item()}
    return {"samples": {title: measures(x) for title, x in images.items()},
            "from true low tokens": {title: measures(x) for title, x in again.items()}}


# ---------------------------------------------------------------------------------------------
# The report

def differences(lessons, of, metrics):
    """Ours less theirs, with 95 % over styles and in how many of them it is better: a table."""
    column = lambda row, metric: [found[of][row][metric] for found in lessons]
    rows, sign = [], lambda metric: -1 if metric == "PSNR" else 1
    pairs = ((WITH, WITHOUT), (WITH, OTHER), (CHOSEN, WITHOUT))
    for ours, theirs in pairs if CHOSEN in lessons[0][of] else pairs[:2]:
        cells = []
        for m in metrics:
            a, b = column(ours, m), column(theirs, m)
            better = sum(sign(m) * x < sign(m) * y for x, y in zip(a, b))
            cells.append("{:+.4f} [{:+.4f}, {:+.4f}], ".format(*interval(a, b))
                         + f"better in {better} of {len(a)}")
        rows.append([f"{ours} − {theirs}", *cells])
    return table(["", *metrics], rows)


def report(found, about):
    """All findings -> lines of markdown."""
    lines = ["# The second stage", "", f"`{about['command']}`", "", f"Base {about['base']}; "
             f"{about['machine']}, {about['seconds']} s. ± is one standard error, [ ] 95 % of a "
             "paired bootstrap.", "", "## Restored: 128 px from the true 64 px", "",
             "PSNR in dB against the drawing at 128 px, and the Laplacian energy over the "
             "drawing's. The 64 px are the same scene drawn at 64 px; 12 decoding steps, lambda_B "
             "0, the picture's caption.", ""]
    for title, rows in found["restored"].items():
        ours, below = rows["**second stage**"][0], rows["bicubic of the tokenizer's 64 px"][0]
        gain = "{:+.2f} dB [{:+.2f}, {:+.2f}]".format(*interval(ours, below))
        lines += [f"{len(ours)} {title}; second stage − bicubic of the same tokens: {gain}.", ""]
        lines += table(["", "PSNR, dB", "Laplacian energy"], [
            [row, with_error(values, digits=2), f"{sharp:.2f}"]
            for row, (values, sharp) in rows.items()])
    rows, claims = found["sampled"]
    lines += ["## Sampled: plain prompts", "", f"128 names, {about['per']} of each in every row, "
              "all 128 px. Fréchet distances to as many real drawings by quality.py's "
              "classifier, which knows 64 px: of the four quarters as they are, and of the whole "
              "made smaller by area.", ""]
    lines += table(["", *next(iter(rows.values()))], [
        [row, *(f"{x:.3g}" for x in cells.values())] for row, cells in rows.items()])
    lines += ["Laplacian energy, mean over mean: " + "; ".join(
        "{} {:.2f} [{:.2f}, {:.2f}]".format(name, *x) for name, x in claims.items()) + ".", "",
        "## Settings of the second stage", "", f"Means over {len(found['sweep'])} held-out styles "
        f"that are not reported below ({'; '.join(found['sweep'])}). Chosen, by palette and "
        f"texture alike: lambda_A {about['best'][0]:g}, lambda_B {about['best'][1]:g}.", ""]
    sweep, mean = list(found["sweep"].values()), lambda values: f"{np.mean(list(values)):.4f}"
    lines += table(["", *DISTANCES], [[row, *(mean(x[row][d] for x in sweep) for d in DISTANCES)]
                                      for row in sweep[0]])
    lessons = list(found["taught"].values())
    lines += ["## Taught by one drawing (Table S3, third column)", "",
              f"{len(lessons)} held-out styles ({'; '.join(found['taught'])}), both stages tuned "
              f"on one drawing, {about['things']} other things in each. Distances to the same "
              "drawing in the style, at 128 px: colours; 3 x 3 patches at full, half and quarter "
              "size; at full size alone (finest). Sharpness: Laplacian energy over the target's. "
              "The base's tokens and all seeds are the same in every row.", ""]
    for of in lessons[0]:
        metrics = DISTANCES if of == "samples" else (*DISTANCES, "PSNR")
        show = lambda row, m: with_error([x[of][row][m] for x in lessons], digits=DIGITS.get(m, 4))
        columns = (*metrics, "sharpness")
        lines += [f"### {of}", "", *table(["", *columns], [
            [row, *(show(row, m) for m in columns)] for row in lessons[0][of]])]
        lines += differences(lessons, of, metrics)
    lines += ["### Samples, style by style: without / with / another's", ""]
    lines += table(["style", *DISTANCES], [[words, *(" / ".join(
        f"{x['samples'][row][d]:.4f}" for row in (WITHOUT, WITH, OTHER)) for d in DISTANCES)]
        for words, x in found["taught"].items()])
    return lines + ["superres.png: the first style of each medium, its first thing, first seed, "
                    "nothing chosen."]


# ---------------------------------------------------------------------------------------------
# The command

def cached(args, name, size, compute):
    """compute()'s result, which JSON can hold: from args.cache where it is there for this size."""
    path, key = Path(args.cache) / f"{name}.json", [args.base, size]
    if path.exists() and (saved := json.loads(path.read_text()))["key"] == key:
        args.seconds += saved["seconds"]
        return saved["value"]
    began, value = time.time(), compute()
    saved = dict(key=key, seconds=round(time.time() - began), value=value)
    write_text(path, json.dumps(saved))
    print(f"{name}: {saved['seconds']} s", flush=True)
    args.seconds += saved["seconds"]
    return json.loads(json.dumps(value))


def measure_base(pipe, args):
    """What needs no tuning: "restored" and "sampled"."""
    net = load_classifier(args.classifier)[0]
    load = lambda **which: [data.Art(**which, size=size, smallest=0.9) for size in (64, 128)]
    arts, openmoji = load(), load(role="held-out")
    some = lambda art, n, seed: [str(x) for x in np.random.default_rng(seed).choice(
        sorted(set(art.names)), n, replace=False)]
    groups = {"drawings of the training sets, as drawn": (arts, False),
              "drawings of the training sets, in random styles": (arts, True),
              "drawings of OpenMoji, which no training saw, in random styles": (openmoji, True)}
    found = {title: cached(args, f"restored{i}", args.names, lambda: restored(
        pipe, which, some(which[1], args.names, i), in_styles, i))
        for i, (title, (which, in_styles)) in enumerate(groups.items())}
    names = some(part(arts[1], is_new(arts[1])), 128 if args.names > 8 else 4, 0)
    return dict(restored=found, sampled=cached(
        args, "sampled", args.per, lambda: sampled(pipe, net, arts, names, args.per, 0)))


def measure_taught(pipe, args):
    """"sweep" and "taught", each {words of the style: ...}; the settings; strips of pictures."""
    art = data.Art(["noto"], size=pipe.resolution)
    chosen = choose_styles(TRIED + TAUGHT)[:args.styles]
    lesson = lambda i, things: Lesson(pipe, art, i, chosen[i], things, args.cache)
    sweep, found, strips, n = {}, {}, {}, len(TRIED)
    for i, style in enumerate(chosen[:n]):
        sweep[styles.phrase(style)] = cached(args, f"tried{i}", FEW, lambda: tried(lesson(i, FEW)))
    best = best_of(list(sweep.values()))
    for i, style in enumerate(chosen[n:], n):
        other = next(k for k in range(n) if TRIED[k] != style.medium)
        other = load_adapter(Path(args.cache) / f"style{other}.pt").superres
        path = Path(args.cache) / f"style{i}.npy"
        found[styles.phrase(style)] = cached(args, f"taught{i}", [args.things, *best], lambda: (
            taught(lesson(i, args.things), other, best, path)))
        strips[styles.phrase(style)] = np.load(path)
    return dict(sweep=sweep, taught=found), best, strips


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", default="weights/tiny")
    add("--classifier", default="experiments/quality.pt")
    add("--cache", default="runs/superres-experiment", help="folder of what is done")
    add("--out", default="experiments/results")
    add("--names", type=number(int, 4), default=72, help="drawings in each group to restore")
    add("--per", type=number(int, 1), default=2, help="samples of each of 128 names")
    add("--things", type=number(int, 2, high=50), default=8, help="pictures in each style")
    add("--styles", type=number(int, 4), default=len(TRIED + TAUGHT), help="the sweep's included")
    args = parser.parse_args()
    args.seconds = 0
    pipe = StyleDrop.load(args.weights)
    args.base = pipe.base
    more, best, strips = measure_taught(pipe, args)
    found = measure_base(pipe, args)
    about = dict(command=f"python {' '.join(sys.argv)}", machine=machine(), seconds=args.seconds,
                 base=pipe.base, names=args.names, per=args.per, things=args.things, best=best)
    text = "\n".join(report(found | more, about))
    first = {words.split()[-1]: words for words in reversed(strips)}     # of each medium
    shown = [words for words in strips if words in first.values()]
    pictures = np.concatenate([strips[words][0] for words in shown])
    sheet = grid(pictures, len(SHOWN), top=SHOWN, left=shown)
    numbers = json.dumps(about | found | more, indent=1)
    files = {"superres.md": text + "\n", "superres.json": numbers}
    for name, words in files.items():
        write_text(Path(args.out) / name, words)
    write_png(Path(args.out) / "superres.png", sheet.quantize(128))
    print(text)


if __name__ == "__main__":
    run_command(main)
