"""The main job, measured: train.py and sample.py as a user runs them, on every picture in examples/.

    python experiments/main_job.py

For each reference: wall time and peak memory of both commands, start-up included; the first one runs
twice, and its adapter and its picture must come out byte for byte the same. Writes
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
from pretrain.common import machine  # noqa: E402
from styledrop import StyleDrop  # noqa: E402


def measured(*command):
    """Run a command in ROOT -> (seconds, peak memory in MB, output)."""
    began = time.time()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{text}")
    return time.time() - began, usage.ru_maxrss / 1024, text


def main():
    with open(ROOT / "examples" / "README.md") as file:
        rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in file if ".png |" in line]
    lines = ["| reference | train.py | peak memory | sample.py | peak memory |", "|---|---|---|---|---|"]
    sheets, same = [], None
    with tempfile.TemporaryDirectory() as folder:
        for file, content, words, *_ in rows:
            run, picture = Path(folder) / Path(file).stem, Path(folder) / "sample.png"
            tune = ("train.py", "--ref", f"examples/{file}", "--content", content, "--style", words,
                    "--out", run)
            draw = ("sample.py", "--prompt", "a cat", "--style", run, "--out", picture)
            tuning, tuning_memory, said = measured(*tune)
            sampling, sampling_memory, _ = measured(*draw)
            lines.append(f"| {file} | {tuning:.0f} s | {tuning_memory:.0f} MB | {sampling:.1f} s | {sampling_memory:.0f} MB |")
            print(lines[-1], flush=True)
            sheets.append(np.asarray(Image.open(run / "samples.png")))
            if same is None:
                first = (run / "adapter.pt").read_bytes(), picture.read_bytes()
                measured(*tune)
                measured(*draw)
                same = first == ((run / "adapter.pt").read_bytes(), picture.read_bytes())
                share = next(line for line in said.splitlines() if line.startswith("adapter:"))
    results = ROOT / "experiments" / "results"
    results.mkdir(exist_ok=True)
    Image.fromarray(np.concatenate(sheets)).quantize(128).save(results / "before_after.png", optimize=True)
    lines += ["", f"On {machine()}, {os.cpu_count()} cores, base {StyleDrop.load().base}.", "", share[0].upper() + share[1:] + ".", "",
              f"The same commands again gave the same adapter and the same picture, byte for byte: {'yes' if same else 'NO'}."]
    (results / "main_job.md").write_text("# The main job, measured\n\n`python experiments/main_job.py`\n\n" + "\n".join(lines) + "\n")
    print("\n".join(lines[-5:]))


if __name__ == "__main__":
    main()
