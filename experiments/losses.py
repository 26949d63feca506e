"""The page "is my loss normal?": a table and curves of the shipped base's training, from its logs.

    python -m experiments.losses            # experiments/results/losses.md, losses.png
"""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from checkpoint.files import check_place, write_png, write_text
from commandline.options import Parser, filled
from commandline.terminal import run_command, say
from experiments.common import RESULTS, heading, table
from styledrop import WEIGHTS

NOTES = {                   # what a model that has learned nothing scores, or how a run began
    "vqgan": "one code for all images: usage 1/1024, perplexity 1",
    "clip": f"guessing among 1,024: loss ln 1024 = {math.log(1024):.2f}, accuracy 0.001; the loss "
            "rises at the end, probably because, at the small learning rate near the end, the "
            "model no longer memorises the images that --reuse repeats",
    "muse": f"guessing among 1,024 tokens: loss ln 1024 = {math.log(1024):.2f}, accuracy 0.001; "
            "always the most frequent token, white: accuracy 0.14; label smoothing alone keeps the "
            "loss above 1.02",
    "muse_wide": "continued from those weights, on a larger space of styles, which is harder to "
                 "predict, and from image 36,673 on with twice as many drawings, where the loss "
                 "rises: --init weights/tiny/muse.pt --lr 3e-4",
    "superres": "as for muse, with the tokens of the small image given",
    "superres_wide": "continued from those weights in the same way: "
                     "--init weights/tiny/superres.pt --lr 3e-4",
}
MILESTONES = (0.02, 0.05, 0.2, 0.5, 1)  # shares of the steps that the table shows
NOT_FIGURES = ("step", "images", "minutes", "critic")


def read_log(path):
    """The lines of a log: a list of dicts with step, images, minutes and the figures.

    Incomplete lines, where a run was killed, are left out. Raises ValueError if there are fewer
    than two others.
    """
    log = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            log.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    if len(log) < 2:
        raise ValueError(f"{path} has fewer than two complete lines; train for longer")
    return log


def milestones(log, figures):
    """Rows of the table: the means of what was logged within 1 % of the steps of each milestone."""
    rows = []
    steps = log[-1]["step"]
    for share in MILESTONES:
        away = [abs(line["step"] - share * steps) for line in log]
        nearest = log[int(np.argmin(away))]
        near = [line for line, steps_away in zip(log, away) if steps_away <= 0.01 * steps]
        row = [f"{nearest['minutes']:.1f}", f"{nearest['images']:,}"]
        for figure in figures:
            mean = np.mean([line[figure] for line in near or [nearest]])
            row.append(f"{mean:.3g}")
        if row not in rows:                                  # a short log has few lines
            rows.append(row)
    return rows


def ticks(low, high, count=4):
    """At most count + 1 round numbers between low and high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(number * step, 10) for number in range(first, last + 1)]


def curve(title, x, y, width=320, height=200):
    """A Pillow image of y over x, numbers of images."""
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = 44, 24, width - 12, height - 34
    low, high = min(y), max(y)
    if low == high:
        high = low + 1

    def across(value):
        return left + (right - left) * value / max(x)

    def up(value):
        return bottom - (bottom - top) * (value - low) / (high - low)

    pen.text((left, 6), title, fill="black")
    for value in ticks(low, high):
        pen.line([(left, up(value)), (right, up(value))], fill="#ddd")
        pen.text((left - 6, up(value)), f"{value:g}", fill="#555", anchor="rm")
    for value in ticks(0, max(x)):
        pen.line([(across(value), bottom), (across(value), bottom + 4)], fill="#555")
        pen.text((across(value), bottom + 6), f"{value / 1000:g}k", fill="#555", anchor="mt")
    pen.text((right, height - 12), "images", fill="#555", anchor="rm")
    pen.line([(left, bottom), (right, bottom)], fill="#555")
    pen.line([(across(a), up(b)) for a, b in zip(x, y)], fill="#0b6e4f", width=2)
    return image


def stage_report(stage, log):
    """Lines of losses.md about one stage, and its two curves side by side."""
    figures = [name for name in log[-1] if name not in NOT_FIGURES]
    rows = milestones(log, figures)
    lines = [f"`python -m pretrain.{stage.removesuffix('_wide')}` ({NOTES[stage]})", "",
             *table(["minutes", "images", *figures], rows)]
    second = "psnr" if stage == "vqgan" else "accuracy"
    images = [line["images"] for line in log]
    curves = []
    for figure in ("loss", second):
        curves.append(curve(f"{stage}: {figure}", images, [line[figure] for line in log]))
    return lines, np.concatenate(curves, 1)


def options():
    """The command's options."""
    parser = Parser(description=__doc__)
    parser.add_argument("--weights", type=filled, default=WEIGHTS,
                        help="folder of the logs (default: the one that ships)")
    parser.add_argument("--out", type=filled, default=str(RESULTS), help="folder of the results")
    return parser


def main():
    args = options().parse_args()
    check_place(args.out)
    lines = heading("Losses of the shipped base")
    sheet = []
    for stage in NOTES:
        path = Path(args.weights) / f"{stage}.jsonl"
        if not path.exists():                                # a base may have no second stage
            continue
        of_stage, curves = stage_report(stage, read_log(path))
        lines += of_stage
        sheet.append(curves)
    if not sheet:
        raise ValueError(f"{args.weights} contains no logs, such as muse.jsonl")
    text = "\n".join(lines)
    write_text(Path(args.out) / "losses.md", text)
    write_png(Path(args.out) / "losses.png", Image.fromarray(np.concatenate(sheet)), optimize=True)
    say(text)


if __name__ == "__main__":
    run_command(main)
