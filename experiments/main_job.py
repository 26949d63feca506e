"""Time and memory of train.py and sample.py, run as a user runs them, on all of examples/.

    python -m experiments.main_job          # results/main_job.md, before_after.png; 6 minutes

Seconds and peak memory are those of the whole commands, start-up included; what the seconds are
spent on is measured inside them (timing.py). The first reference is learned and sampled once more,
and the report says whether adapter and image came out the same, byte for byte.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from checkpoint.files import check_place, write_png, write_text
from commandline.options import Parser, filled, whole
from commandline.terminal import run_command, say
from experiments.common import RESULTS, heading, made_by, table
from styledrop import WEIGHTS, StyleDrop

ROOT = Path(__file__).resolve().parent.parent
TUNING = ("start", "weights", "reference", "tuning, stage 1", "tuning, stage 2",
          "sampling, stage 1", "sampling, stage 2", "pixels", "writing")
SAMPLING = ("start", "weights", "sampling, stage 1", "sampling, stage 2", "pixels", "writing")


@dataclass
class Measured:
    """One command that has run."""
    seconds: float           # by the clock, from start to end
    memory: float            # peak, in MB
    parts: dict              # {part: seconds}, of timing.py
    output: str              # what it printed


def measure(script, *arguments):
    """Run a script as a user does. Raises ValueError with its last line where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "parts.json"
        began = time.time()
        with open(Path(folder) / "output.txt", "w+") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "experiments.timing", report, str(began), script,
                 *map(str, arguments)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.time() - began
            process.returncode = os.waitstatus_to_exitcode(status)
            output.seek(0)
            text = output.read()
        if process.returncode:
            last = text.strip().rpartition("\n")[2]
            raise ValueError(f"{script} failed: {last}")
        parts = json.loads(report.read_text())
    return Measured(seconds, usage.ru_maxrss / 1024, parts, text)


def read_examples(folder):
    """The files in the tables of a folder's README.md, which their first column names."""
    files = []
    for line in (folder / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("|") and not line.startswith(("|---", "| file |")):
            files.append(line.split("|")[1].strip())
    return files


def one_reference(path, folder, more):
    """Learn a reference and sample from it -> both Measured, and the bytes of what was made.

    more: further arguments of both commands.
    """
    image = folder.with_suffix(".png")
    tuned = measure("train.py", "--ref", path, "--out", folder, *more)
    sampled = measure("sample.py", "--prompt", "a cat", "--style", folder, "--out", image, *more)
    return tuned, sampled, ((folder / "adapter.pt").read_bytes(), image.read_bytes())


def parts_table(title, runs, parts):
    """A table of medians over runs, a list of Measured; parts: names of its rows."""
    rows = []
    for part in parts:
        if all(part in one.parts for one in runs):
            rows.append([part, median([one.parts[part] for one in runs])])
    rows.append(["the rest", median([one.seconds - sum(one.parts.values()) for one in runs])])
    rows.append(["**all of it**", median([one.seconds for one in runs])])
    return table([title, "seconds"], rows)


def median(seconds):
    return f"{statistics.median(seconds):.1f} s"


def options():
    """The command's options."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--examples", type=filled, default=str(ROOT / "examples"),
        help="folder of references, with a README.md whose table lists them")
    add("--first", type=whole(1, 1000), default=1000, metavar="N",
        help="use only the first N of them (default: all)")
    add("--weights", type=filled, default=WEIGHTS, help="folder of the base")
    add("--out", type=filled, default=str(RESULTS), help="folder of the results")
    return parser


def main():
    args = options().parse_args()
    check_place(args.out)
    examples = read_examples(Path(args.examples))[:args.first]
    more = [] if args.weights == WEIGHTS else ["--weights", args.weights]
    tuned = []
    sampled = []
    rows = []
    sheets = []
    with tempfile.TemporaryDirectory() as folder:
        for file in examples:
            path = Path(args.examples) / file
            run = Path(folder) / Path(file).stem
            tuning, sampling, files = one_reference(path, run, more)
            tuned.append(tuning)
            sampled.append(sampling)
            sheets.append(np.asarray(Image.open(run / "samples.png")))
            rows.append([file, f"{tuning.seconds:.0f} s", f"{tuning.memory:.0f} MB",
                         f"{sampling.seconds:.1f} s", f"{sampling.memory:.0f} MB"])
            say("  ".join(rows[-1]))
            if len(rows) == 1:
                first_output = tuning.output.replace(str(run), f"runs/{run.name}")
                first_output = first_output.replace(f"{ROOT}/", "").strip()
                shutil.rmtree(run)                           # else train.py says: finished
                _, _, files_again = one_reference(path, run, more)
                same = files == files_again
    sheet = Image.fromarray(np.concatenate(sheets)).quantize(128)
    write_png(Path(args.out) / "before_after.png", sheet, optimize=True)

    where = f"{made_by(StyleDrop.load(args.weights))} {os.cpu_count()} cores."
    text = "\n".join([
        *heading("The main job, measured"), where, "",
        *table(["reference", "train.py", "peak memory", "sample.py", "peak memory"], rows),
        f"What the seconds go into, medians of {len(examples)} references. Sampling in train.py is "
        f"that of its previews. {where}", "",
        *parts_table("train.py", tuned, TUNING), *parts_table("sample.py", sampled, SAMPLING),
        "Did the same commands, run again, give the same adapter and image, byte for byte? "
        f"{'Yes' if same else 'NO'}. The first command printed:", "", "```", first_output,
        "```"]) + "\n"
    write_text(Path(args.out) / "main_job.md", text)
    say(text)


if __name__ == "__main__":
    run_command(main)
