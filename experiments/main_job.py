"""The main job, measured: train.py and sample.py as a user runs them, on all of examples/.

    python experiments/main_job.py

With nothing said of the references: CLIP names the content, the base finds words for the style.
For each reference: wall time and peak memory of both commands, start-up included; the first one
runs twice, and its adapter and its picture must come out byte for byte the same. Writes
experiments/results/main_job.md and before_after.png (all references, six prompts, first seed).
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from commandline import Parser, run_command  # noqa: E402
from experiments.common import heading, table, write_png, write_text  # noqa: E402
from pretrain.common import machine  # noqa: E402
from styledrop import StyleDrop  # noqa: E402


def measured(*command):
    """Run a command in ROOT -> (seconds, peak memory in MB, output)."""
    began = time.time()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT,
                                   stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{text}")
    return time.time() - began, usage.ru_maxrss / 1024, text


def main():
    Parser(description=__doc__.splitlines()[0]).parse_args()
    page = (ROOT / "examples" / "README.md").read_text().splitlines()
    examples = [[cell.strip() for cell in line.strip().strip("|").split("|")]
                for line in page if ".png |" in line]
    rows, sheets, same = [], [], None
    with tempfile.TemporaryDirectory() as folder:
        for file, content, words, *_ in examples:            # the truth, for the table
            run, picture = Path(folder) / Path(file).stem, Path(folder) / "sample.png"
            tune = "train.py", "--ref", f"examples/{file}", "--out", run
            draw = ("sample.py", "--prompt", "a cat", "--style", run, "--out", picture)
            tuning, tuning_memory, said = measured(*tune)
            sampling, sampling_memory, _ = measured(*draw)
            read = [line.split(": ")[1].rsplit(", ", 1)[0] for line in said.splitlines()[:2]]
            rows.append([file, f"{content}, {words}", ", ".join(read), f"{tuning:.0f} s",
                         f"{tuning_memory:.0f} MB", f"{sampling:.1f} s",
                         f"{sampling_memory:.0f} MB"])
            print(*rows[-1], sep="  ", flush=True)
            sheets.append(np.asarray(Image.open(run / "samples.png")))
            if same is None:
                made = run / "adapter.pt", picture
                first = [path.read_bytes() for path in made]
                measured(*tune)
                measured(*draw)
                same = first == [path.read_bytes() for path in made]
                told = said.replace(str(run), f"runs/{run.name}").strip()
    results = ROOT / "experiments" / "results"
    write_png(results / "before_after.png", Image.fromarray(np.concatenate(sheets)).quantize(128))
    lines = [*heading("The main job, measured"),
             *table(["reference", "what it shows", "as read", "train.py", "peak memory",
                     "sample.py", "peak memory"], rows),
             f"On {machine()}, {os.cpu_count()} cores, base {StyleDrop.load().base}.", "",
             "The same commands again gave the same adapter and the same picture, byte for byte: "
             f"{'yes' if same else 'NO'}. What the first one said the second time:", "",
             "```", told, "```"]
    write_text(results / "main_job.md", "\n".join(lines) + "\n")
    print("\n".join(lines[-8:]))


if __name__ == "__main__":
    run_command(main)
