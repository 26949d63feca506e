"""One drawing teaches a style that the base never had: how near do its other drawings come to the truth?

    python experiments/one_shot.py --weights weights/tiny       # experiments/results/one_shot.md, one_shot.png
    python experiments/one_shot.py --quick                      # the same with numbers too small to mean anything
    python experiments/one_shot.py --steps 300 --lambda-a 2 --out runs/sweep/300-2

The truth is known, since styles.apply draws anything in any style: each sample is compared with the
drawing of the same thing in the style of the reference. The last style is openmoji, a hand of its own.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from data import styles  # noqa: E402
from human_feedback.rounds import sample_pool  # noqa: E402
from experiments.base import table, with_error  # noqa: E402
from experiments.judge import attributes, content_correct, held_back, judge_or_none, reconstruct, style_features  # noqa: E402
from data.pictures import grid  # noqa: E402
from commandline import Parser, number, run_command  # noqa: E402
from styledrop import (RARE_TOKEN, StyleDrop, style_prompt, to_tensor, to_uint8,  # noqa: E402
                       write_whole)

ALL_METRICS = {"palette": 4, "texture": 4, "judge's distance": 3, "style seen": 1, "thing seen": 1, "leakage": 1}   # digits
SHARES = ("style seen", "thing seen", "leakage")            # in percent
MADE = ("rare token", "style in words", "tuned", "tuned, style named")           # sampled; the others are drawn
FLOOR, CEILING = "floor: the truth, reconstructed", "ceiling: the thing in another style"
SHOWN = (*MADE, FLOOR)


# ---------------------------------------------------------------------------------------------
# Distances of pictures x and y (B, 3, H, W) in [-1, 1], pair by pair -> (B,); 0 for equal pictures

def sliced_distance(x, y, directions=32):
    """Sliced Wasserstein distance of point clouds (B, C, M): the mean of |sorted x - sorted y| on fixed lines."""
    lines = F.normalize(torch.randn(directions, x.shape[1], generator=torch.Generator().manual_seed(0)), dim=1)
    sort = lambda z: torch.einsum("dc,bcm->bdm", lines, z).sort(-1).values
    return (sort(x) - sort(y)).abs().mean((1, 2))


def palette_distance(x, y):
    """How far the pixels' colours would have to move, wherever they are."""
    return sliced_distance(x.flatten(2), y.flatten(2))


def texture_distance(x, y, scales=3):
    """The same for 3 x 3 patches of grey without their mean, at full, half and quarter size."""
    grey = lambda z: torch.einsum("c,bchw->bhw", z.new_tensor([0.3, 0.59, 0.11]), z)[:, None]
    x, y, total = grey(x), grey(y), 0
    for _ in range(scales):
        patches = [F.unfold(z, 3) for z in (x, y)]                               # (B, 9, M)
        total = total + sliced_distance(*(p - p.mean(1, keepdim=True) for p in patches))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return total / scales


def paired_bootstrap(a, b, generator, draws=10000):
    """Mean of a - b (n,), and the interval that holds it in 95 % of the draws of n pairs with replacement."""
    difference = torch.as_tensor(a, dtype=torch.float64) - torch.as_tensor(b, dtype=torch.float64)
    means = difference[torch.randint(len(difference), (draws, len(difference)), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return difference.mean().item(), low, high


# ---------------------------------------------------------------------------------------------
# One style

def draw(art, names, source, style, texture):
    """Drawings of `names` from one set in a style, centred; texture: seed of the one texture that they share."""
    found = [art.drawings[art.find(name, source)] for name in names]
    return to_tensor(np.stack([styles.apply(style, rgba, np.random.default_rng(texture)) for rgba in found]))


def choose_subjects(art, args):
    """-> the things to draw, and for each style: the style, whose drawings, the name of the reference, another style.

    args.styles held-out styles and openmoji; none of the things and references was seen by the judge.
    """
    rng = np.random.default_rng(args.seed)
    unseen = [art.names[i] for i in rng.permutation(held_back(art)) if art.sets[i] == "noto"]
    if len(unseen) < args.things + args.styles + 1:
        raise ValueError(f"--things and --styles share {len(unseen) - 1} names that the judge has no noto drawing of")
    distinct = {}
    while len(distinct) < 2 * args.styles + 1:              # the second half: the other style of each
        distinct[styles.sample(rng, held_out=True)] = "noto"
    chosen, others = list(distinct.items())[:args.styles] + [(styles.Style(), "openmoji")], list(distinct)[args.styles:]
    return unseen[:args.things], [(style, source, reference, other) for (style, source), reference, other
                                  in zip(chosen, unseen[args.things:], others)]


def measure(judge, images, truth, names, reference, style, source):
    """{metric: (B,)} of pictures (B, 3, H, W) of `names` against the truth; without a judge only the distances."""
    found = {"palette": palette_distance(images, truth), "texture": texture_distance(images, truth)}
    if judge is None:
        return found
    seed, seen = torch.Generator().manual_seed(0), attributes(judge, images)
    asked = styles.named(style) or {"hand": source}
    return found | {
        "judge's distance": 1 - (style_features(judge, images) * style_features(judge, truth)).sum(1),
        "style seen": torch.tensor([[saw == value for saw in seen[k]] for k, value in asked.items()]).double().mean(0),
        "thing seen": content_correct(judge, images, names, seed).double(),
        "leakage": content_correct(judge, images, [reference] * len(images), seed).double()}


def one_style(pipe, judge, art, style, source, reference, things, other, args):
    """Tune on one drawing, sample other things -> {row: {metric: mean}}, one line of the sheet."""
    tuning = {k: v for k, v in dict(steps=args.steps, lr=args.lr, d_prj=args.d_prj).items() if v is not None}
    sampling = {k: v for k, v in dict(lambda_a=args.lambda_a).items() if v is not None}
    words = styles.phrase(style) or art.hands[art.sets.index(source)]
    example = draw(art, [reference], source, style, args.seed)
    adapter = pipe.tune(example, [data.content_phrase(reference)], style=RARE_TOKEN, seed=args.seed, **tuning)
    named = pipe.tune(example, [data.content_phrase(reference)], style=words, seed=args.seed, **tuning)
    prompts = [data.content_phrase(name) for name in things]
    sample = lambda prompts, style=None, **more: sample_pool(pipe, prompts, args.seeds, style, args.seed, **sampling, **more).images
    with_token = [style_prompt(prompt, RARE_TOKEN) for prompt in prompts]        # what no adapter knows is not to be guided by
    pictures = dict(zip(MADE, (sample(with_token), sample(prompts, style_phrase=words), sample(prompts, adapter),
                               sample(prompts, named))))
    again = lambda images: images.repeat_interleave(args.seeds, 0)               # as many as there are samples
    truth = draw(art, things, source, style, args.seed)
    pictures |= {FLOOR: again(reconstruct(pipe.vqgan, truth)),
                 "the truth of other things": again(truth.roll(1, 0)),
                 CEILING: again(draw(art, things, source, other, args.seed))}
    names = [name for name in things for _ in range(args.seeds)]
    found = {row: {m: values.mean().item() for m, values in measure(
        judge, images, again(truth), names, reference, style, source).items()} for row, images in pictures.items()}
    first = [pictures[row][::args.seeds][:8] for row in ("rare token", "tuned")]
    return words, found, torch.cat([example, first[0], torch.ones_like(example), first[1]])


# ---------------------------------------------------------------------------------------------
# All styles

def show(values, metric):
    return with_error(values, scale=100 if metric in SHARES else 1, digits=ALL_METRICS[metric])


def report(found, args):
    """found: [(words, {row: {metric: mean}})] of all styles -> lines of Markdown."""
    column = lambda row, metric: [numbers[row][metric] for _, numbers in found]
    METRICS = {m: digits for m, digits in ALL_METRICS.items() if m in found[0][1]["tuned"]}
    lines = table(["", *(f"{m}, %" if m in SHARES else m for m in METRICS)],
                  [[row, *(show(column(row, m), m) for m in METRICS)] for row in found[0][1]])
    rows = []
    for against in MADE[:2]:
        cells = []
        for m in METRICS:
            generator, scale = torch.Generator().manual_seed(args.seed), 100 if m in SHARES else 1
            mean, low, high = (scale * x for x in paired_bootstrap(column("tuned", m), column(against, m), generator))
            cells.append("{0:+.{3}f} [{1:+.{3}f}, {2:+.{3}f}]".format(mean, low, high, METRICS[m]))
        rows.append([f"tuned less {against}", *cells])
    lines += ["What tuning changed, style by style, with the 95 % interval of a paired bootstrap over the styles:", ""]
    lines += table(["", *METRICS], rows)
    rows = []
    for words, numbers in found:
        cells = []
        for m in METRICS:
            made = [f"{numbers[row][m] * (100 if m in SHARES else 1):.{min(METRICS[m], 3)}f}" for row in SHOWN]
            cells.append(" / ".join(made))
        rows.append([words, *cells])
    return lines + [f"Style by style: {' / '.join(SHOWN)}.", ""] + table(["style", *METRICS], rows)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="weights/tiny")
    parser.add_argument("--judge", default="experiments/judge.pt")
    parser.add_argument("--out", default="experiments/results", help="folder of one_shot.md and one_shot.png")
    parser.add_argument("--styles", type=number(int, 1), default=8, help="held-out styles, openmoji not counted")
    parser.add_argument("--things", type=number(int, 2), default=20)
    parser.add_argument("--seeds", type=number(int, 1), default=2, help="samples of each thing")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--quick", action="store_true", help="1 style and openmoji, 3 things, 1 seed, 5 steps")
    parser.add_argument("--steps", type=number(int, 1), help="of tuning; this and the next three: the pipeline's default")
    parser.add_argument("--lr", type=number(float, 0, strict=True))
    parser.add_argument("--d-prj", type=number(int, 1))
    parser.add_argument("--lambda-a", type=number(float, 0))
    args = parser.parse_args()
    if args.quick:
        args.styles, args.things, args.seeds, args.steps = 1, 3, 1, 5
    judge, pipe = judge_or_none(args.judge), StyleDrop.load(args.weights)
    pipe.superres = None                                    # the first stage alone: the truth has its 64 pixels
    art = data.Art(["noto", "openmoji"])
    things, subjects = choose_subjects(art, args)
    found, rows = [], []
    for style, source, reference, other in subjects:
        began = time.time()
        words, numbers, row = one_style(pipe, judge, art, style, source, reference, things, other, args)
        found.append((words, numbers))
        rows.append(row)
        print(f"{words} (taught by {data.content_phrase(reference)}): palette " +
              ", ".join(f"{made} {numbers[made]['palette']:.3f}" for made in MADE) + f"  {time.time() - began:.0f} s", flush=True)

    settings = ", ".join(f"{k} {v}" for k in ("steps", "lr", "d_prj", "lambda_a") if (v := getattr(args, k)) is not None)
    lines = ["# A style from one drawing, measured", "", f"`python {' '.join(sys.argv)}`", "",
             f"Base {pipe.base}, torch {torch.__version__}; tuned and sampled at {settings or 'the defaults'}. "
             f"{len(found)} styles, {args.things} things x {args.seeds} seeds in each; ± is one standard error over the styles.", "",
             "Palette and texture: sliced Wasserstein distances of pixels and of grey 3 x 3 patches to the drawing of the same "
             "thing in the reference's style. The rest where a judge was at hand. Its distance: one less the cosine of its style features. Style seen: "
             "the judge names the attributes right (openmoji: whose hand it is). Thing seen: first among 100. Leakage: the "
             "reference's thing is first among 100, which chance does in 1 %.", ""]
    lines += report(found, args)
    lines += ["## one_shot.png", "", "A row for each style, as above: the reference; eight things before (rare token); the same "
              f"after. First seeds, none chosen: {', '.join(map(data.content_phrase, things[:8]))}."]
    text = "\n".join(lines)
    picture = grid(np.concatenate([to_uint8(row) for row in rows]), len(rows[0]))
    write_whole(Path(args.out) / "one_shot.png", lambda file: picture.quantize(128).save(file, format="PNG", optimize=True))
    write_whole(Path(args.out) / "one_shot.md", lambda file: file.write((text + "\n").encode()))
    print(text)


if __name__ == "__main__":
    run_command(main)
