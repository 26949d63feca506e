"""What the user sees: lines of progress, and mistakes as one line."""

import contextlib
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch

EVERY = 5                               # seconds between two lines of progress


class QuietStream:
    """A stream that goes quiet, without an error, when its reader leaves or its disk is full.

    A reader leaves in `| head -1`, for example. The command then still finishes its work.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, words):
        try:
            self.stream.write(words)
            self.stream.flush()
        except OSError:      # from now on, and when Python flushes at the exit, write to os.devnull
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def printable(line):
    """A line without control characters, which could change what the terminal shows."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def say(words, stream=None):
    """Print one or more lines; characters that the terminal lacks are escaped."""
    stream = sys.stdout if stream is None else stream
    if stream is None:                                       # as under pythonw
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    for line in words.split("\n"):
        line = printable(line).encode(encoding, "backslashreplace").decode(encoding)
        print(line, file=QuietStream(stream))


def note(line):
    """Print a note on stderr."""
    say(f"note: {line}", sys.stderr)


class Progress:
    """Prints how far a long job has come: at most every five seconds, and when done = total.

    Call the object with (done, total, words) as often as you like.
    """

    def __init__(self, name):
        self.name = name
        self.began = self.printed_at = time.time()

    def __call__(self, done, total, words=""):
        now = time.time()
        if now - self.printed_at < EVERY and done < total:
            return
        self.printed_at = now
        parts = [f"{self.name} {done}/{total}", words, f"{now - self.began:.0f} s"]
        say("  ".join(part for part in parts if part))


class SamplingProgress(Progress):
    """Prints how many images have been sampled, and the decoding step of the current batch.

    on_step and on_batch are those of StyleDrop.generate.
    """

    def __init__(self, name, total):
        super().__init__(name)
        self.done = 0
        self.total = total

    def on_step(self, step, ids, kept):
        self(self.done, self.total, f"step {step + 1}")

    def on_batch(self, done):
        self.done = done
        self(done, self.total)


def peak_memory():
    """Peak resident memory of this process in MB, or NaN if the system does not report it."""
    try:
        import resource
    except ImportError:                                      # Windows
        return math.nan
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def run_command(main):
    """Run a script's main(). A mistake of the user is one line on stderr and exit code 2."""
    signal.signal(signal.SIGINT, signal.default_int_handler)     # see the scripts' first lines
    stderr = None if sys.stderr is None else QuietStream(sys.stderr)
    with contextlib.redirect_stderr(stderr):
        line = mistake_in(main)
        if line is not None:
            say(f"{Path(sys.argv[0]).name}: error: {line}", sys.stderr)
            sys.exit(2)


def mistake_in(main):
    """Run main(). Returns None, or a one-line message about what the user can fix."""
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
    except ValueError as error:
        line = str(error)
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_memory and "can't allocate memory" not in str(error):  # PyTorch's message on CPU
            raise
        line = "out of memory; use a smaller --batch, or sample fewer images at once"
    line = " ".join(line.split())
    if len(line) > 500:
        line = f"{line[:240]} ... {line[-240:]}"
    return line
