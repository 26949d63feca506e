"""The seconds of the parts of a command, measured inside it. main_job.py uses this.

    python -m experiments.timing REPORT BEGAN train.py --ref style.png

It runs the script as `python train.py --ref style.png` does, but measures how long a few functions
(PARTS) take in total. REPORT is the JSON file to write; BEGAN is time.time() before the process was
started. Heavy modules are imported only when the script itself would import them.
"""

import functools
import json
import pkgutil
import runpy
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = {                               # what is timed, and the part of the command that it is
    "commandline.options:load_pipeline": "weights",
    "data:read_reference": "reference",
    "styledrop:StyleDrop.fit": "tuning",
    "styledrop:StyleDrop.sample_tokens": "sampling",
    "vqgan:VQGAN.decode": "pixels",
    "checkpoint.files:write_png": "writing",
}
IN_STAGES = ("tuning", "sampling")      # their second argument is G of one of the stages


def timed(function, part, seconds):
    """The function, which now adds its seconds to `seconds`, a dict, under the name of its part."""
    @functools.wraps(function)
    def wrapped(*arguments, **named):
        name = part
        if part in IN_STAGES:
            name = f"{part}, stage {2 if arguments[1].config.low_grid else 1}"
        before = time.time()
        try:
            return function(*arguments, **named)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.time() - before
    return wrapped


def watch(seconds):
    """Replace the functions of PARTS by timed ones, in the modules that define them."""
    for place, part in PARTS.items():
        owner, _, name = place.replace(":", ".").rpartition(".")
        owner = pkgutil.resolve_name(owner)
        setattr(owner, name, timed(getattr(owner, name), part, seconds))


def main():
    report, began, script, *arguments = sys.argv[1:]
    seconds = {}
    watch(seconds)
    seconds["start"] = time.time() - float(began)            # Python, and the imports
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        Path(report).write_text(json.dumps(seconds), encoding="utf-8")


if __name__ == "__main__":
    main()
