"""What the user sees: lines of progress, and mistakes as one line."""

import contextlib
import math
import os
import signal
import sys
import time
import warnings
from argparse import ArgumentTypeError
from pathlib import Path

import torch

EVERY = 5                               # seconds between two lines of progress


class LostReader:
    """A stream whose reader may leave, as in `| head -1`, and whose disk may fill up."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, words):
        try:
            self.stream.write(words)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def printable(line):
    """A line without control characters, which could change what the terminal shows."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def say(words, stream=None):
    """Print one line or several, in whatever characters the terminal has."""
    stream = sys.stdout if stream is None else stream
    if stream is None:                                       # as under pythonw
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    for line in words.split("\n"):
        line = printable(line).encode(encoding, "backslashreplace").decode(encoding)
        print(line, file=LostReader(stream))


def note(line):
    """Print a note on stderr."""
    say(f"note: {line}", sys.stderr)


class Progress:
    """Says how far a long job is, about every five seconds, and always at its end if asked.

    on(done, total, words) is called as often as you like.
    """

    def __init__(self, name):
        self.name = name
        self.began = self.said = time.time()

    def __call__(self, done, total, words=""):
        now = time.time()
        if now - self.said < EVERY and done < total:
            return
        self.said = now
        say(f"{self.name} {done}/{total}  {words}{'  ' if words else ''}{now - self.began:.0f} s")


class SamplingProgress(Progress):
    """How many images are sampled, and the decoding step of the next ones.

    on_step and on_batch are those of StyleDrop.generate.
    """

    def __init__(self, name, total):
        super().__init__(name)
        self.done, self.total = 0, total

    def on_step(self, step, ids, kept):
        self(self.done, self.total, f"step {step + 1}")

    def on_batch(self, done):
        self.done = done
        self(done, self.total)


def peak_memory():
    """Peak resident memory of this process in MB, or NaN where the system does not tell."""
    try:
        import resource
    except ImportError:                                      # Windows
        return math.nan
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def run_command(main):
    """Run a script's main(). A mistake of the user is one line on stderr and exit code 2."""
    signal.signal(signal.SIGINT, signal.default_int_handler)     # see the scripts' first lines
    warnings.filterwarnings("ignore", "only the first")      # CLIP's; notes.py has said it
    stderr = None if sys.stderr is None else LostReader(sys.stderr)
    with contextlib.redirect_stderr(stderr):
        line = mistake_in(main)
        if line is not None:
            say(f"{Path(sys.argv[0]).name}: error: {line}", sys.stderr)
            sys.exit(2)


def mistake_in(main):
    """Run main() -> None, or one line about what the user can mend."""
    try:
        main()
        return None
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        name = str(error.filename or "")
        if len(name) > 60:
            name = name[:60] + "..."
        reason = error.strerror.lower() if error.strerror else str(error)
        line = f"{name}: {reason}" if name else reason
    except (ValueError, ArgumentTypeError) as error:
        line = str(error)
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_memory and "can't allocate memory" not in str(error):  # torch's words for a CPU
            raise
        line = "out of memory; ask for less at once"
    line = " ".join(line.split())
    if len(line) > 500:
        line = f"{line[:240]} ... {line[-240:]}"
    return line
