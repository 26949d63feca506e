"""What a picture file says about its pixels: chunks of PNG, tags of TIFF, values of EXIF.

Also how a file is refused. reading.py and colour.py both build on this.
"""

import struct
import zlib

import numpy as np


class Refused(ValueError):
    """The file is not read, for a reason that is given in our own words."""


def shown(path):
    """A path as messages show it: on one line, and not too long."""
    name = "".join(letter if letter.isprintable() else "?" for letter in str(path))
    if len(name) >= 300:
        return f"{name[:40]}...{name[-20:]}"
    return name


# ---------------------------------------------------------------------------------------------
# PNG

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png_chunks(path):
    """Yield (kind, body, check), three byte strings, for each chunk of a PNG, if it is one."""
    with path.open("rb") as file:
        if file.read(8) != PNG_SIGNATURE:
            return
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            yield kind, file.read(length), file.read(4)


def is_intact(kind, body, check):
    return check == struct.pack(">I", zlib.crc32(kind + body))


def png_chunk(path, kind):
    """The body of an intact chunk that comes before the pixels of a PNG; None if there is none."""
    for chunk_kind, body, check in png_chunks(path):
        if chunk_kind == b"IDAT":
            break
        if chunk_kind == kind and is_intact(chunk_kind, body, check):
            return body
    return None


# ---------------------------------------------------------------------------------------------
# TIFF

BITS, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339           # tags
MAX_SAMPLE, MAX_SAMPLE_OF_ANY_TYPE = 281, 341


def tiff_tag(image, tag, default):
    """A tag of an open TIFF, the largest of its numbers; the default where there is none."""
    values = getattr(image, "tag_v2", {}).get(tag, default)
    try:
        return float(np.max(values))
    except (TypeError, ValueError):                          # text where numbers belong
        return default


def is_planar(image):
    return tiff_tag(image, PLANAR, 1) == 2


# ---------------------------------------------------------------------------------------------
# EXIF

def exif_value(image, tag, directory=None):
    """A value of an open image's EXIF data; None if it is not there or cannot be read."""
    old = image.info.get("Raw profile type APP1")            # EXIF in PNG, by an old name
    if isinstance(old, str) and b"Exif".hex() in old:
        image.info.setdefault("Raw profile type exif", old)
    try:
        exif = image.getexif()
        if directory is not None:
            exif = exif.get_ifd(directory)
        return exif.get(tag)
    except Exception:                                        # damage raises many kinds
        return None
