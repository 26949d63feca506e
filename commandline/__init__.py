"""What the commands share: options, lines of progress, and errors of one line."""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from styledrop import StyleDrop, load_adapter, partial_prefix


class Parser(argparse.ArgumentParser):
    """A wrong option is one line like every other mistake, not the page of usage (--help).

    Options are not shortened: a shortened one could be another's.
    """

    def __init__(self, **settings):
        super().__init__(**settings | dict(allow_abbrev=False))

    def error(self, message):
        raise ValueError(message)

    def parse_known_args(self, args=None, namespace=None):
        for given in sys.argv[1:] if args is None else args:
            if given.startswith("--") and given.endswith("=--"):     # argparse takes it for []
                self.error(f"{given} has no value")
        return super().parse_known_args(args, namespace)


def number(kind, low, strict=False, high=1e12):
    """An argparse type: an int or float from low (strict: above it) to high, and not nan."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not low <= value <= high or strict and value == low:
            least = f"{'above' if strict else 'at least'} {low}"
            raise argparse.ArgumentTypeError(f"{text} must be {least} and at most {high:,.15g}")
        return value
    return parse


def utf8(text):
    """An argparse type: words that a file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{ascii(text)} is not UTF-8; rename it") from None
    return text


def filled(text):
    """An argparse type: words that are not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; leave it out, or say what it is")
    return utf8(text)


def load_pipe(args):
    """The pipeline of --weights, --device and --no-superres; with CLIP where rounds need it."""
    pipe = StyleDrop.load(args.weights, args.device)
    if not args.superres and pipe.superres is None:
        raise ValueError(f"{args.weights} has no second stage; leave --no-superres out")
    if getattr(args, "rounds", 1) > 1:
        pipe.clip                                            # found damaged now, not at the end
    return pipe


def load_run(run, kind):
    """The adapter of a run folder; None for None. ValueError where it teaches the other kind."""
    other = {"style": "content", "content": "style"}[kind]
    if run is not None and kind_of(Path(run)) == other:
        raise ValueError(f"{run} is of kind {other}; give it as --{other}")
    return None if run is None else load_adapter(run)


def newest_run(root="runs"):
    """The style run in `root` that was made last; None where there is none."""
    runs = [p.parent for p in Path(root).glob("*/adapter.pt") if kind_of(p.parent) != "content"]
    return max(runs, key=lambda run: (run / "adapter.pt").stat().st_mtime, default=None)


def kind_of(run):
    """"style" or "content", by a run folder's config.json; None where that cannot be read."""
    try:
        return json.loads((run / "config.json").read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def check_place(path):
    """Raise ValueError where no file or folder could be made at `path`, before the work is done."""
    whole = Path(os.path.abspath(path))
    if whole.is_symlink() and not whole.exists():
        raise ValueError(f"{path} is a link to nowhere; give another --out")
    try:
        place = next(p for p in (whole, *whole.parents) if p.exists())
        folder = place.parent if whole.is_file() else place
        with tempfile.TemporaryDirectory(dir=folder, prefix=partial_prefix()) as trial:
            Path(trial, whole.relative_to(place)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror.lower()}; "
                         "give another --out") from None


class Forgiving:
    """A stream. Where nobody reads on, as behind `| head -1`, or a disk is full, work goes on."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def say(line):
    """A line of progress, whatever letters the terminal has."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if sys.stdout is not None:
        print(line.encode(encoding, "backslashreplace").decode(encoding),
              file=Forgiving(sys.stdout))


def peak_memory():
    """Peak resident memory of this process in MB, or nan where the system does not tell."""
    try:
        import resource
        unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    except ImportError:
        return math.nan


def run_command(main):
    """Run a script's main(); what a user can mend is one line on stderr and exit code 2."""
    signal.signal(signal.SIGINT, signal.default_int_handler)     # see the scripts' first lines
    warnings.filterwarnings("ignore", "only the first")      # of CLIP: note_unknown has said it
    with contextlib.redirect_stderr(sys.stderr and Forgiving(sys.stderr)):
        line = mistake_in(main)
        if line is not None:
            print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
            sys.exit(2)


def mistake_in(main):
    """Run main() -> None, or one line about what a user can mend."""
    try:
        main()
        return None
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        name = str(error.filename or "")
        words = error.strerror.lower() if error.strerror else str(error)
        line = f"{name[:60]}{'...' * (len(name) > 60)}: {words}"
    except (ValueError, argparse.ArgumentTypeError) as error:
        line = str(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            if "can't allocate memory" not in str(error):    # torch says it so for a CPU
                raise
        line = "out of memory; ask for less at once"
    line = " ".join(line.removeprefix(": ").split())
    return line if len(line) < 500 else f"{line[:240]} ... {line[-240:]}"
