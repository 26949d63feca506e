"""The page "is my loss normal?": a table and the curves of the shipped runs, from their logs.

    python experiments/losses.py            # experiments/results/losses.md, losses.png
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from commandline import Parser, run_command  # noqa: E402
from experiments.common import table, write_png, write_text  # noqa: E402

CHANCE = {
    "vqgan": "one code for all: usage 1/1024, perplexity 1; 1,600 steps, then 8,000 more from "
             "their weights: today's command makes one run of 8,000",
    "clip": f"guessing among 1,024: loss ln 1024 = {math.log(1024):.2f}, accuracy 0.001; here it "
            "rises at the end: 1.04 at step 1,638, 1.49 at 2,600",
    "muse": f"guessing among 1,024 tokens: loss ln 1024 = {math.log(1024):.2f}, accuracy 0.001; "
            "knowing only how often each token comes: 6.33, and 0.14 by always saying white; label "
            "smoothing alone keeps the loss above 1.02",
    "superres": "as for muse, with the tokens of the small picture given"}


def ticks(low, high, count=4):
    """At most count + 1 round numbers between low and high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(k * step, 10) for k in range(first, last + 1)]


def panel(title, x, y, width=320, height=200):
    """One curve (PIL): y over x."""
    image = Image.new("RGB", (width, height), "white")
    draw, left, top, right, bottom = ImageDraw.Draw(image), 44, 24, width - 12, height - 34
    low, high = min(y), max(y)
    across = lambda value: left + (right - left) * value / max(x)
    up = lambda value: bottom - (bottom - top) * (value - low) / (high - low)
    draw.text((left, 6), title, fill="black")
    for value in ticks(low, high):
        draw.line([(left, up(value)), (right, up(value))], fill="#ddd")
        draw.text((left - 6, up(value)), f"{value:g}", fill="#555", anchor="rm")
    for value in ticks(0, max(x)):
        draw.line([(across(value), bottom), (across(value), bottom + 4)], fill="#555")
        draw.text((across(value), bottom + 6), f"{value / 1000:g}k", fill="#555", anchor="mt")
    draw.text((right, height - 12), "images", fill="#555", anchor="rm")
    draw.line([(left, bottom), (right, bottom)], fill="#555")
    draw.line([(across(a), up(b)) for a, b in zip(x, y)], fill="#0b6e4f", width=2)
    return image


def milestones(log, names):
    """Rows of the table: means of what was logged near five shares of the steps."""
    rows, steps = [], log[-1]["step"]
    for share in (0.02, 0.05, 0.2, 0.5, 1):
        away = [abs(line["step"] - share * steps) for line in log]
        line = log[int(np.argmin(away))]
        near = [other for other, d in zip(log, away) if d <= 0.01 * steps] or [line]
        rows.append([f"{line['minutes']:.0f}", f"{line['images']:,}",
                     *(f"{np.mean([other[name] for other in near]):.3g}" for name in names)])
    return [row for i, row in enumerate(rows) if row not in rows[:i]]


def main():
    Parser(description=__doc__.splitlines()[0]).parse_args()
    lines, sheet = [], []
    for stage, chance in CHANCE.items():
        path = ROOT / "weights" / "tiny" / f"{stage}.jsonl"
        if not path.exists():                               # superres may not be there
            continue
        log = [json.loads(line) for line in path.read_text().splitlines()]
        names = [n for n in log[-1] if n not in ("step", "images", "minutes", "critic")]
        lines += [f"`--stage {stage}` ({chance})", "",
                  *table(["minutes", "images", *names], milestones(log, names))]
        x, other = [line["images"] for line in log], "psnr" if stage == "vqgan" else "accuracy"
        panels = [panel(f"{stage}: {n}", x, [line[n] for line in log]) for n in ("loss", other)]
        sheet.append(np.concatenate(panels, 1))
    results, text = ROOT / "experiments" / "results", "\n".join(lines)
    write_text(results / "losses.md", text)
    write_png(results / "losses.png", Image.fromarray(np.concatenate(sheet)))
    print(text)


if __name__ == "__main__":
    run_command(main)
