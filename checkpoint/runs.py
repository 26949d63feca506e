"""The folder of a run, and what a later command may do with it.

A run folder holds adapter.pt, config.json, log.jsonl and samples.png; rounds of feedback add
round1/, round2/ and so on. Each part is stored together with the recipe that made it. The same
command resumes a run after its last finished part. A command with another recipe is refused, so
nothing that a person has made is ever replaced.
"""

import contextlib
import json
import math
import os
import platform
from pathlib import Path

from .adapters import load_adapter
from .files import clear_leftovers, partial_prefix, read_json

KINDS = ["style", "content"]


def kind_of(run):
    """Return "style" or "content", as the run's config.json says, or None if it does not."""
    try:
        config = read_json(Path(run) / "config.json") or {}
    except ValueError:
        return None
    kind = config.get("kind")
    return kind if kind in KINDS else None


def newest_run(root="runs"):
    """The style run in `root` that was made last; None where there is none."""
    newest = None
    newest_time = -math.inf
    for folder in (Path(root), *Path(root).glob("*")):
        if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
            raise ValueError(f"no permission to look into {folder}; give --style RUN, or change "
                             "its permissions")
    for path in Path(root).glob("*/adapter.pt"):
        if kind_of(path.parent) != "content" and path.stat().st_mtime > newest_time:
            newest = path.parent
            newest_time = path.stat().st_mtime
    return newest


def load_run(run, kind):
    """The adapter of a run folder or adapter file. Raises ValueError if it is of another kind.

    kind: "style" or "content". The file says its kind; for older files, config.json next to it.
    """
    run = Path(run)
    adapter = load_adapter(run)
    folder = run if run.is_dir() else run.parent
    actual = adapter.about.get("kind")
    if actual not in KINDS and (folder / "adapter.pt").exists():
        actual = kind_of(folder)
    if actual in KINDS and actual != kind:
        raise ValueError(f"{run} was trained with --kind {actual}; give it as --{actual}")
    return adapter


def check_recipe(path, recipe):
    """Raise ValueError if the part that `path` describes was made by another recipe."""
    existing = read_json(path)
    if existing is None:
        return
    recipe = json.loads(json.dumps(recipe))                  # tuples become lists, as in the file
    different = [name for name in recipe if existing.get(name) != recipe[name]]
    if different:
        names = ", ".join(name.replace("_", "-") for name in different)
        raise ValueError(f"{path.parent} was made with different settings ({names}"
                         f"{who_chose(existing)}); give another --out, or move {path.parent} away")


def was_made(path, recipe):
    """Was the part that `path` describes already made? Raises ValueError: see check_recipe."""
    check_recipe(path, recipe)
    return path.exists()


def who_chose(choice):
    """For the dict of a choice.json, text such as "; human chose 3, 17, 20"; else ""."""
    chosen = choice.get("chosen")
    feedback = choice.get("feedback")
    if not isinstance(chosen, list) or feedback not in ("human", "clip", "random"):
        return ""
    numbers = [str(index + 1) for index in chosen[:20] if type(index) is int and index >= 0]
    return f"; {feedback} chose {', '.join(numbers)}"


def is_finished(out, rounds):
    """Are all parts of this many rounds there, and the adapter undamaged?

    Raises ValueError if the adapter or config.json is damaged.
    """
    try:
        load_adapter(out)
    except ValueError as error:
        raise ValueError(f"{error}; move {out} away, or give another --out") from None
    parts = []
    if rounds > 1:
        parts += ["rounds.png", "scores.json"]
    for number in range(2, rounds + 1):
        here = f"round{number}"
        parts += [f"{here}/choice.json", f"{here}/adapter.json", f"{here}/adapter.pt"]
    config = read_json(out / "config.json") or {}            # it is written last
    return config.get("round", 1) == rounds and all((out / part).exists() for part in parts)


@contextlib.contextmanager
def alone(out):
    """Lock the run folder against other commands. Raises ValueError if one has locked it."""
    clear_leftovers(out)
    mine = out / f"{partial_prefix()}lock"
    mine.unlink(missing_ok=True)                 # left by a dead process that had our process id
    lock = next(out.glob(f".partial-{platform.node()}-*-lock"), None)
    if lock is not None:
        raise ValueError(f"another command is working on {out}; wait for it or end it. If there "
                         f"is none, remove {lock}")
    mine.touch()
    try:
        yield
    finally:
        mine.unlink(missing_ok=True)
