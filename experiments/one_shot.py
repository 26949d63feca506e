"""A style that the base never had, learned from one drawing: how near do samples come to it?

    python experiments/one_shot.py          # experiments/results/one_shot.md, one_shot.png
    python experiments/one_shot.py --styles 1 --things 3 --seeds 1 --steps 5     # means nothing

The target is known, since styles.apply draws anything in any style: each sample is compared with
the drawing of the same object in the style of the reference. The last style is OpenMoji, an icon
set of its own.
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
from experiments.common import (give_back, heading, table, with_error, write_png,  # noqa: E402
                                write_text)
from experiments.judge import (attributes, held_back, load_judge, named,  # noqa: E402
                               style_features)
from data.pictures import grid  # noqa: E402
from commandline import Parser, number, run_command  # noqa: E402
from commandline.guess import guess_content, guess_style  # noqa: E402
from pretrain.common import machine  # noqa: E402
from styledrop import RARE_TOKEN, StyleDrop, to_tensor, to_uint8  # noqa: E402

METRICS = {                             # unit (100: in percent), digits
    "palette": (1, 4), "texture": (1, 4), "judge's distance": (1, 3), "style seen": (100, 1),
    "object seen": (100, 1), "leakage": (100, 1)}
# The base asked for no style, for words that commandline.guess found, for the true ones; tuned.
# "words found, tuned" is train.py's default, content guessed too. The other rows are drawn.
MADE = ("no style", "words found", "words given", "rare token, tuned", "words found, tuned",
        "words given, tuned")
OTHER = "words found, tuned on another style"                # a control
FLOOR, CEILING = "floor: the target, reconstructed", "control: the object in another style"
SHOWN = (*MADE, FLOOR)


# ---------------------------------------------------------------------------------------------
# Distances of images x and y (B, 3, H, W) in [-1, 1], pair by pair -> (B,); 0 for equal images

def sliced_distance(x, y, directions=32):
    """Sliced Wasserstein distance of point clouds (B, C, M): the mean of |sorted x - sorted y| on
    fixed lines.
    """
    generator = torch.Generator().manual_seed(0)
    lines = F.normalize(torch.randn(directions, x.shape[1], generator=generator), dim=1)
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
    """Mean of a - b (n,), low and high of 95 % of the draws of n pairs with replacement."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    difference, n = a - b, len(a)
    means = difference[torch.randint(n, (draws, n), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return difference.mean().item(), low, high


# ---------------------------------------------------------------------------------------------
# One style

def draw(art, names, source, style, texture):
    """Drawings of `names` from one set in a style, centred, which share one texture.

    texture: its seed.
    """
    found = [art.drawings[art.find(name, source)] for name in names]
    return to_tensor(np.stack([styles.apply(style, rgba, np.random.default_rng(texture))
                               for rgba in found]))


def choose_subjects(art, args):
    """-> names to draw; for each style: the style, its set, the reference's name, another style.

    args.styles held-out styles and OpenMoji; the judge has seen no drawing of these names.
    """
    rng, n = np.random.default_rng(args.seed), args.styles
    unseen = [art.names[i] for i in rng.permutation(held_back(art)) if art.sets[i] == "noto"]
    if len(unseen) < args.things + n + 1:
        raise ValueError(f"--things and --styles share {len(unseen) - 1} names that the judge has "
                         "no noto drawing of")
    distinct = {}
    while len(distinct) < 2 * n + 1:                        # the second half: the other styles
        distinct[styles.sample(rng, held_out=True)] = "noto"
    pairs, others = [*distinct.items()][:n] + [(styles.Style(), "openmoji")], [*distinct][n:]
    subjects = zip(pairs, unseen[args.things:], others)
    return unseen[:args.things], [(*pair, reference, other) for pair, reference, other in subjects]


def measure(judge, images, target, names, reference, style, source):
    """{metric: (B,)} of images (B, 3, H, W) of `names`, against the target."""
    seen, asked = attributes(judge, images), styles.named(style) or {"hand": source}
    right = torch.tensor([[saw == value for saw in seen[k]] for k, value in asked.items()])
    alike = (style_features(judge, images) * style_features(judge, target)).sum(1)
    return {"palette": palette_distance(images, target),
            "texture": texture_distance(images, target),
            "judge's distance": 1 - alike, "style seen": right.double().mean(0),
            "object seen": named(judge, images, names),
            "leakage": named(judge, images, [reference] * len(images))}


def taught_by_default(pipe, art, subject, args):
    """What train.py does without words -> the reference (1, 3, H, W), words found, an adapter."""
    style, source, reference, _ = subject
    example = draw(art, [reference], source, style, args.seed)
    seen = guess_content(pipe, example)
    found = guess_style(pipe, example, seen)
    print(f"found: {seen[0]}, {found}", flush=True)
    return example, found, pipe.tune(example, seen, found, **tuning(args))


def tuning(args):
    return dict(seed=args.seed) | (dict(steps=args.steps) if args.steps else {})


def one_style(pipe, judge, art, subject, things, default, another, args):
    """Tune on one drawing, sample other objects -> the style's words, {row: {metric: mean}}, one
    line of the sheet.

    default: of taught_by_default; another: of another style.
    """
    style, source, reference, other = subject
    words = styles.phrase(style) or art.hands[art.sets.index(source)]
    content, (example, found, adapter) = data.content_phrase(reference), default
    names = [name for name in things for _ in range(args.seeds)]
    prompts = [data.content_phrase(name) for name in names]
    again = lambda images: images.repeat_interleave(args.seeds, 0)       # as many as the samples
    target = draw(art, things, source, style, args.seed)
    images = {"no style": pipe.generate(prompts, seed=args.seed).cpu()}
    for row, phrase in zip(MADE[1:], (found, words)):
        images[row] = pipe.generate(prompts, style_phrase=phrase, seed=args.seed).cpu()
    adapters = {MADE[3]: pipe.tune(example, [content], RARE_TOKEN, **tuning(args)),
                MADE[4]: adapter, OTHER: another[2],
                MADE[5]: pipe.tune(example, [content], words, **tuning(args))}
    for row, adapter in adapters.items():
        images[row] = pipe.generate(prompts, adapter, seed=args.seed).cpu()
    images |= {FLOOR: again(give_back(pipe, target)),
               "the target of other objects": again(target.roll(1, 0)),
               CEILING: again(draw(art, things, source, other, args.seed))}
    means = {}
    for row, x in images.items():
        values = measure(judge, x, again(target), names, reference, style, source)
        means[row] = {metric: v.mean().item() for metric, v in values.items()}
    before, after = (images[row][::args.seeds][:8] for row in (MADE[1], MADE[4]))
    return words, means, torch.cat([example, before, torch.ones_like(example), after])


# ---------------------------------------------------------------------------------------------
# All styles

def of_the_way(column, row, metric):
    """From the base without style to the target reconstructed, in percent; of the mean distances.

    column(row, metric): a number a style.
    """
    start, here, end = (np.mean(column(r, metric)) for r in (MADE[0], row, FLOOR))
    return 100 * (start - here) / (start - end)


def report(found, seed):
    """found: [(words, {row: {metric: mean}})] of all styles -> lines of Markdown."""
    column = lambda row, metric: [numbers[row][metric] for _, numbers in found]
    titles = [f"{m}, %" if unit == 100 else m for m, (unit, _) in METRICS.items()]
    lines = table(["", *titles, "of the way, %"], [
        [row, *(with_error(column(row, m), None, *how) for m, how in METRICS.items()),
         ", ".join(f"{of_the_way(column, row, m):.0f}" for m in ("palette", "texture"))]
        for row in found[0][1]])
    rows = []
    for against in (MADE[1], MADE[3]):
        cells = []
        for m, (unit, digits) in METRICS.items():
            generator = torch.Generator().manual_seed(seed)
            figures = paired_bootstrap(column(MADE[4], m), column(against, m), generator)
            cells.append("{} [{}, {}]".format(*(f"{unit * x:+.{digits}f}" for x in figures)))
        rows.append([f"{MADE[4]} minus {against}", *cells])
    lines += ["What tuning changed, style by style, with the 95 % interval of a paired bootstrap "
              "over the styles:", "", *table(["", *titles], rows)]
    rows = []
    for words, numbers in found:
        cells = [" / ".join(f"{unit * numbers[row][m]:.{min(digits, 3)}f}" for row in SHOWN)
                 for m, (unit, digits) in METRICS.items()]
        rows.append([words, *cells])
    return lines + [f"Style by style: {' / '.join(SHOWN)}.", "", *table(["style", *titles], rows)]


def read(subjects, found):
    """What the base read from each reference, and by chance: from another style's. -> lines."""
    hits = lambda style, words: [value in words for value in styles.named(style).values()]
    own, chance, rows = [], [], []
    for i, (style, *_) in enumerate(subjects):
        own += hits(style, found[i])
        chance += hits(style, found[i - 1])
        rows.append([styles.phrase(style) or "OpenMoji's", found[i]])
    return [f"The base's words name {sum(own)} of {len(own)} attributes, those for another "
            f"style's reference {sum(chance)}.", "", *table(["style", "words found"], rows)]


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", default="weights/tiny")
    add("--judge", default="experiments/judge.pt")
    add("--out", default="experiments/results", help="folder of one_shot.md and one_shot.png")
    add("--styles", type=number(int, 1), default=8, help="held-out styles, OpenMoji not counted")
    add("--things", type=number(int, 2), default=20, help="objects drawn in each style")
    add("--seeds", type=number(int, 1), default=2, help="samples of each object")
    add("--seed", type=number(int, 0), default=0)
    add("--steps", type=number(int, 1), help="of tuning (default: the pipeline's)")
    args = parser.parse_args()
    judge, pipe, began = load_judge(args.judge), StyleDrop.load(args.weights), time.time()
    base = pipe.base
    pipe.superres = None                                    # the first stage: targets have 64 px
    art = data.Art(["noto", "openmoji"])
    things, subjects = choose_subjects(art, args)
    defaults = [taught_by_default(pipe, art, subject, args) for subject in subjects]
    found, rows = [], []
    for i, subject in enumerate(subjects):
        words, numbers, row = one_style(pipe, judge, art, subject, things, defaults[i],
                                        defaults[i - 1], args)
        found.append((words, numbers))
        rows.append(to_uint8(row))
        palettes = ", ".join(f"{made} {numbers[made]['palette']:.3f}" for made in MADE)
        print(f"{words} (from {data.content_phrase(subject[2])}): palette {palettes}", flush=True)

    settings = f"tuned for {args.steps} steps" if args.steps else "all settings at their defaults"
    lines = [*heading("A style from one drawing, measured"),
             f"Base {base}, {machine()}, {time.time() - began:.0f} s; {settings}. "
             f"{len(found)} styles, "
             f"{args.things} objects x {args.seeds} seeds in each; ± is one standard error over "
             "the styles.", "",
             "Palette and texture: sliced Wasserstein distances of pixels and of grey 3 x 3 "
             "patches to the target, the drawing of the same object in the reference's style. The "
             "judge's distance: one minus the cosine of its style features. Style seen: it names "
             "the attributes right (OpenMoji: the icon set). Object seen: named among 100. "
             "Leakage: the reference's object is, which chance does in 1 %. Of the way: in palette "
             "and texture, from the base without style to the floor.", "",
             "Words found: by the base itself (commandline/guess.py), from the reference. With "
             "\"words found, tuned\", train.py's default, CLIP names the content, too.", ""]
    lines += report(found, args.seed)
    lines += read(subjects, [found for _, found, _ in defaults])
    lines += ["## one_shot.png", "", "A row for each style, as above: the reference; eight objects "
              f"before ({MADE[1]}); the same after ({MADE[4]}). First seeds, none chosen: "
              f"{', '.join(map(data.content_phrase, things[:8]))}."]
    text = "\n".join(lines) + "\n"
    sheet = grid(np.concatenate(rows), len(rows[0]))
    write_png(Path(args.out) / "one_shot.png", sheet.quantize(128))
    write_text(Path(args.out) / "one_shot.md", text)
    print(text)


if __name__ == "__main__":
    run_command(main)
