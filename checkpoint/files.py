"""Files are written atomically: as a whole or not at all.

Everything is first written under a temporary name in the same folder and then renamed. The
temporary name contains the machine and the process, so that a later command can remove what a
killed one left behind.
"""

import contextlib
import errno
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
from pathlib import Path

LEAST_FREE = 32 * 2 ** 20               # bytes that must be free before a long command starts


def partial_prefix():
    """How the names of this process's unfinished files and folders begin."""
    return f".partial-{platform.node()}-{os.getpid()}-"


def clear_leftovers(folder):
    """Remove what killed processes of this machine left unfinished in `folder`."""
    if os.name != "posix":               # elsewhere os.kill(pid, 0) would end the process
        return
    start = f".partial-{platform.node()}-"
    for left in Path(folder).glob(f"{start}*"):
        pid = re.fullmatch(r"([0-9]{1,9})-\w+", left.name.removeprefix(start))
        if pid is None or is_running(int(pid[1])):
            continue
        with contextlib.suppress(OSError):                   # another command was faster
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def is_running(pid):
    """Is there a process of this number on this machine?"""
    try:
        os.kill(pid, 0)                                      # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:                                  # there is one, of another user
        return True
    return True


def write_whole(path, write):
    """Write a temporary file and rename it to `path`, so that no half-written file is ever there.

    write: a function that takes the temporary file, open for writing bytes. The file gets the
    permissions that the user's umask gives. Raises OSError with the file's name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent)
    temporary = path.parent / f"{partial_prefix()}{secrets.token_hex(4)}"
    try:
        with open(temporary, "xb") as file:
            write(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError):                  # torch.save's error for a full disk
            cause = error.__context__
        else:
            cause = error
        number = getattr(cause, "errno", None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a UTF-8 text file."""
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def write_png(path, image, **settings):
    """Write a Pillow image as PNG. settings: those of Image.save."""
    write_whole(path, lambda file: image.save(file, "PNG", **settings))


def write_json(path, value):
    """Write a value as readable JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path):
    """The dict in a JSON file of ours, or None where there is no such file.

    Raises ValueError if the file cannot be read or does not contain a dict.
    """
    advice = f"move {path} away, or give another --out"
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except PermissionError:
        raise ValueError(f"no permission to read {path}; change its permissions") from None
    except (OSError, ValueError, RecursionError):
        raise ValueError(f"{path} is damaged; {advice}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged; {advice}")
    return value


def write_log(path, lines):
    """Write a list of dicts, one JSON object per line."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def check_place(path, option="--out", is_folder=True):
    """Raise ValueError, before the work, if a folder (or a file) cannot be written at `path`."""
    real = Path(os.path.realpath(path))
    if Path(path).is_symlink() and not real.exists():
        raise ValueError(f"{path} is a broken link; give another {option}")
    if is_folder and real.is_file():
        raise ValueError(f"{path} is a file, not a folder; give another {option}")
    if not is_folder and real.is_dir():
        raise ValueError(f"{path} is a folder, not a file; give another {option}")
    if real.is_file() and not os.access(real, os.W_OK):
        raise ValueError(f"{path} is read-only; give another {option}")
    try:
        existing = next(place for place in (real, *real.parents) if place.exists())
        folder = existing
        if real.is_file():
            folder = existing.parent
        # try the path's new parts inside a temporary folder: their names could be too long
        with tempfile.TemporaryDirectory(dir=folder, prefix=partial_prefix()) as trial:
            Path(trial, real.relative_to(existing)).mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < LEAST_FREE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"{path} cannot be written: {reason}; give another {option}") from None
