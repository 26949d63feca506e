"""My object in my style (Sections 3.4 and 4.3): are object and style both there between the two adapters?

    python experiments/two_adapters.py                  # experiments/results/two_adapters.md, two_adapters.png
    python experiments/two_adapters.py --quick          # the same with numbers too small to mean anything

A style adapter is taught by one drawing in a held-out style, a content adapter by several drawings of
another thing, each on a ground of its own, as photographs of an object are: what they share is the
object, not white paper. Both are mixed at some gammas, from the style alone (0) to the object alone (1), and
compared with the truth: the object's own drawing in that style.

Twice: as the paper does it, "a [V] teapot", where a base that knows teapots draws one without any adapter,
and as "a [V]", where nothing but the adapter knows the object. A whole object takes a larger adapter, and it
has to be pulled towards; where its name is there, only the style has.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from data import styles  # noqa: E402
from experiments.base import table, with_error  # noqa: E402
from experiments.judge import judge_or_none  # noqa: E402
from experiments.one_shot import choose_subjects, draw, measure, paired_bootstrap  # noqa: E402
from commandline import Parser, number, run_command  # noqa: E402
from data.pictures import grid  # noqa: E402
from human_feedback.rounds import sample_pool  # noqa: E402
from styledrop import LAMBDA_A, StyleDrop, to_uint8, write_whole  # noqa: E402
from train import ROUND  # noqa: E402

GAMMAS = (0.0, 0.5, 0.6, 0.7, 1.0)
METRICS = ("palette", "texture", "thing seen", "style seen", "both")
WAYS = {                                # way: (how its content adapter is tuned, its lambda_A beside that of the style)
    "named": (dict(), dict(lambda_a=3.0, lambda_a_content=0.0)),
    "by its adapter alone": (dict(ROUND, is_shared=False), dict(lambda_a=2.0, lambda_a_content=3.0)),
}
HANDS = [row["set"] for row in data.read_table("sets.tsv") if row["role"] == "training"]     # whose drawings teach the object


def object_phrase(name, way="named"):
    """ "teapot" -> "a [V] teapot": the rare token before the name, as DreamBooth has it; or "a [V]", for any."""
    if way != "named":
        return "a [V]"
    words = data.content_phrase(name)
    article, _, rest = words.partition(" ")
    return f"a [V] {rest}" if article in ("a", "an") else f"[V] {words}"


def measure_both(judge, images, truth, name, reference, style, source):
    """one_shot's metrics {metric: (B,)} of pictures of one thing; with a judge, whether thing and style are both there."""
    found = measure(judge, images, truth, [name] * len(images), reference, style, source)
    if judge is not None:
        found["both"] = found["thing seen"] * found["style seen"]
    return found


def one_style(pipe, judge, art, subject, name, args):
    """One style and one object -> its words, {way: {gamma: {metric: mean}}}, a row of the sheet."""
    style, source, reference, _ = subject
    words = styles.phrase(style) or art.hands[art.sets.index(source)]
    example = draw(art, [reference], source, style, args.seed)
    taught = pipe.tune(example, [data.content_phrase(reference)], words, seed=args.seed)
    hands = [hand for hand in HANDS if (name, hand) in set(zip(art.names, art.sets))]
    grounds = np.random.default_rng(args.seed).choice(styles.GROUND_HUES, len(hands), replace=False)
    pictures = torch.cat([draw(art, [name], hand, styles.Style(ground=str(ground)), args.seed) for hand, ground in zip(hands, grounds)])
    truth = draw(art, [name], source, style, args.seed).expand(args.seeds, -1, -1, -1)
    found, row = {way: {} for way in WAYS}, [example, pictures[:1], truth[:1]]
    for way, (tuning, strengths) in WAYS.items():
        phrase = object_phrase(name, way)
        content = pipe.tune(pictures, [phrase] * len(pictures), seed=args.seed, **tuning)
        for gamma in GAMMAS:
            alone = {} if gamma in (0, 1) else strengths    # an adapter alone has the pipeline's own lambda_A
            images = sample_pool(pipe, [phrase], args.seeds, taught, args.seed, content=content, gamma=gamma, **alone).images
            values = measure_both(judge, images, truth, name, reference, style, source)
            found[way][gamma] = {m: values[m].mean().item() for m in METRICS if m in values}
            row.append(images[:1])
    return f"{data.content_phrase(name)} in {words}", found, torch.cat(row)


def report(found, seed):
    """found: [(words, {gamma: {metric: mean}})] -> lines of Markdown."""
    metrics = list(found[0][1][0.0])
    column = lambda gamma, metric: [numbers[gamma][metric] for _, numbers in found]
    shown = lambda metric: dict(scale=1, digits=4) if metric in ("palette", "texture") else dict(scale=100, digits=1)
    lines = table(["gamma", *(m + ", %" * (shown(m)["scale"] == 100) for m in metrics)],
                  [[f"{g:g}", *(with_error(column(g, m), **shown(m)) for m in metrics)] for g in GAMMAS])
    rows = []
    for gamma in GAMMAS[1:-1]:
        for alone, against in ((0.0, "the style adapter alone"), (1.0, "the content adapter alone")):
            generator, cells = torch.Generator().manual_seed(seed), []
            for m in metrics:
                interval = paired_bootstrap(column(gamma, m), column(alone, m), generator)
                scale, digits = shown(m).values()
                cells.append("{0:+.{3}f} [{1:+.{3}f}, {2:+.{3}f}]".format(*(scale * x for x in interval), digits))
            rows.append([f"gamma {gamma:g} less {against}", *cells])
    return lines + ["Differences, with the 95 % interval of a paired bootstrap over the styles:", ""] + table(["", *metrics], rows)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="weights/tiny")
    parser.add_argument("--judge", default="experiments/judge.pt")
    parser.add_argument("--out", default="experiments/results", help="folder of two_adapters.md and two_adapters.png")
    parser.add_argument("--styles", type=number(int, 1), default=5, help="held-out styles, openmoji not counted")
    parser.add_argument("--seeds", type=number(int, 2), default=8, help="pictures at each gamma")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--quick", action="store_true", help="1 style and openmoji, 2 seeds")
    args = parser.parse_args()
    if args.quick:
        args.styles, args.seeds = 1, 2
    args.things = args.styles + 1                            # one object for each style
    judge, pipe = judge_or_none(args.judge), StyleDrop.load(args.weights)
    art = data.Art([*HANDS, "openmoji"])
    objects, subjects = choose_subjects(art, args)
    found, rows = [], []
    for subject, name in zip(subjects, objects):
        began = time.time()
        words, numbers, row = one_style(pipe, judge, art, subject, name, args)
        found.append((words, numbers))
        rows.append(to_uint8(row))
        print(f"{words}: palette " + "; ".join(f"{way} " + ", ".join(f"{g:g} {n['palette']:.3f}" for g, n in of_way.items())
                                              for way, of_way in numbers.items()) + f"  {time.time() - began:.0f} s", flush=True)
    lines = ["# My object in my style, measured", "", f"`python {' '.join(sys.argv)}`, base {pipe.base}.", "",
             f"{len(found)} held-out styles, an object in each, {args.seeds} seeds at each gamma; ± is one standard error over the "
             "styles. Palette, texture: distance to the object's drawing in that style. Thing and style seen, where a judge "
             "was at hand: the object first among 100; the share of the style's attributes; both: their product in each picture.", ""]
    for way, (tuning, strengths) in WAYS.items():
        lines += [f"## The object {way}", "", f"Its prompt: `{object_phrase('teapot', way)}`. lambda_A of the style {strengths['lambda_a']:g}, of the object "
                  f"{strengths['lambda_a_content']:g}; {LAMBDA_A:g} of an adapter alone. The object's adapter: "
                  f"{', '.join(f'{k} {v}' for k, v in tuning.items()) or 'the defaults'}.", ""]
        lines += report([(words, numbers[way]) for words, numbers in found], args.seed)
    lines += ["## two_adapters.png", "", "A row for each style: what taught the style, what taught the object (one of its drawings), the truth; "
              f"then, first seed, {' and '.join(f'the object {way}' for way in WAYS)}, each at gamma {', '.join(f'{g:g}' for g in GAMMAS)}. "
              f"Rows: {'; '.join(words for words, _ in found)}."]
    picture = grid(np.concatenate(rows), len(rows[0]))
    write_whole(Path(args.out) / "two_adapters.png", lambda file: picture.save(file, "PNG", optimize=True))
    write_whole(Path(args.out) / "two_adapters.md", lambda file: file.write(("\n".join(lines) + "\n").encode()))
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
