"""Read any picture file as RGB pixels that mean what the file says.

    read_image("cat.jpg", 64)               # uint8 (64, 64, 3), the centre square
    read_reference("cat.png", 64)           # the same; refuses a picture that shows nothing

The picture is turned upright, its colours are converted to sRGB, samples of more than 8 bits are
scaled by the value that stands for white, and transparent parts are laid on a background. Metadata
that cannot be read is ignored: a good picture is never refused for a damaged note in it.

Contents: reading, paths, files, frames, samples of more than 8 bits, colours, transparency, files
that are not pictures.
"""

import codecs
import errno
import io
import math
import os
import re
import stat
import struct
import sys
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps

MAX_PIXELS = 64_000_000                 # in one frame; the search for content ends after as many
MAX_FRAMES = 1000                       # that are searched for content
MAX_SCANS = 100                         # in a progressive JPEG; an ordinary one has about ten
FAINT = 16                              # of 255: smaller differences are not visible
WHITE, DARK = (255, 255, 255), (48, 48, 48)                  # backgrounds of transparent pictures


class Refused(ValueError):
    """The file is not read, for a reason that is given in our own words."""


# ---------------------------------------------------------------------------------------------
# Reading

def read_image(path, size):
    """Read a picture.

    path: a picture file. size: the side of the result in pixels.

    Returns uint8 (size, size, 3), RGB: the largest square around the centre, scaled. Of an
    animation or a file of several pages, the first frame that shows something is read. Transparent
    parts become white, or dark grey where only that shows a light drawing. If something had to be
    assumed, a note on stderr says so.

    Raises ValueError, with a message of one line, if the file cannot be read, is not a picture, is
    damaged or too large, or does not say what its values mean.
    """
    return centre_square(open_picture(Path(path)), size)


def read_reference(path, size):
    """Read a picture to learn a style from. Arguments and result are those of `read_image`.

    Raises ValueError as `read_image` does, and if the square is (nearly) of one colour.
    """
    whole = open_picture(Path(path))
    pixels = centre_square(whole, size)
    if not is_one_colour(pixels):
        return pixels
    if is_one_colour(whole.resize((size, size))):
        raise ValueError(f"{shown(path)}: the picture is nearly of one colour, so there is no "
                         "style to learn; give another picture")
    raise ValueError(f"{shown(path)}: its centre square is nearly of one colour, so there is no "
                     "style to learn; crop the picture to the part you mean")


def centre_square(image, size):
    return np.asarray(ImageOps.fit(image, (size, size), Image.LANCZOS))


def is_one_colour(pixels):
    """Does less than one pixel in 200 differ visibly from the median? pixels: RGB of any size."""
    pixels = np.asarray(pixels).reshape(-1, 3).astype(int)
    difference = np.abs(pixels - np.median(pixels, axis=0)).max(1)
    return (difference > FAINT).mean() < 0.005


# ---------------------------------------------------------------------------------------------
# Paths

def check_path(path, what):
    """Check that `path` can be read as a `what`: "picture", "text file" or "folder of ...".

    Raises ValueError, with a message of one line, if it cannot.
    """
    name = shown(path)
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no {what} at {name}") from None
    except OSError as error:
        reasons = {errno.ENAMETOOLONG: "the name is too long",
                   errno.ELOOP: "its links go in a circle",
                   errno.EACCES: "you have no permission to look into its folder"}
        reason = reasons.get(error.errno, error.strerror)
        raise ValueError(f"no {what} at {name}: {reason}") from None
    except ValueError:                                       # a zero byte in the name
        raise ValueError(f"no {what} at {name}: that cannot be a name") from None

    is_file = stat.S_ISREG(mode)
    if what == "text file" and stat.S_ISFIFO(mode):          # <(echo a cat)
        is_file = True
    if stat.S_ISDIR(mode):
        kind = "folder"
    elif is_file:
        kind = "file"
    else:
        kind = "device or a pipe"
    wanted = "folder" if what.startswith("folder") else "file"
    if kind != wanted:
        raise ValueError(f"{name} is a {kind}, not a {what}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{name} may not be read; change its permissions")


def shown(path):
    """A path as messages show it: on one line, and not too long."""
    name = "".join(letter if letter.isprintable() else "?" for letter in str(path))
    if len(name) >= 300:
        return f"{name[:40]}...{name[-20:]}"
    return name


# ---------------------------------------------------------------------------------------------
# Files

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_CHUNKS = (b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"eXIf")           # and the orientation
LEFT_ALONE = ("EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR",  # Pillow needs other programs for these
              "FITS", "MCIDAS")                              # or does not scale their values


def open_picture(path):
    """Read a file as a Pillow image: RGB, 8 bits, sRGB. Raises ValueError as `read_image` does."""
    check_path(path, "picture")
    name = shown(path)
    if path.stat().st_size == 0:
        raise Refused(f"{name} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                  # size and damage are checked below
            image, notes = read_with_repairs(path)
    except Refused:
        raise
    except PermissionError:                                  # a network disk may say so only now
        raise Refused(f"{name} may not be read; change its permissions") from None
    except Image.DecompressionBombError:                     # Pillow's own limit, above ours
        raise Refused(f"{name} has too many pixels; "
                      f"scale it below {MAX_PIXELS:,} in all") from None
    except Image.UnidentifiedImageError:
        with path.open("rb") as file:
            raise Refused(f"{name} {what_else(file.read(1024))}") from None
    except Exception as error:                               # each decoder has its own for damage
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = " ".join(reason.split())
        raise Refused(f"{name} cannot be read: {reason}") from None
    for note in notes:
        print(f"note: {name} {note}", file=sys.stderr)
    return image


def read_with_repairs(path):
    """Read the first frame with content; if a PNG fails, try again without its metadata.

    Pillow refuses a whole PNG for one damaged text in it. What the colours and the orientation
    depend on is dropped last.
    """
    try:
        return first_frame_with_content(path, path)
    except Refused:
        raise
    except Exception:
        if not is_png(path):
            raise
    try:
        return first_frame_with_content(without_metadata(path, COLOUR_CHUNKS), path)
    except Refused:
        raise
    except Exception:
        return first_frame_with_content(without_metadata(path, ()), path)


def is_png(path):
    with path.open("rb") as file:
        return file.read(8) == PNG_SIGNATURE


def png_chunks(path):
    """Yield (kind, body, check), three byte strings, of each chunk of a PNG; nothing of others."""
    with path.open("rb") as file:
        if file.read(8) != PNG_SIGNATURE:
            return
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            yield kind, file.read(length), file.read(4)


def is_intact(kind, body, check):
    return check == struct.pack(">I", zlib.crc32(kind + body))


def without_metadata(path, kept):
    """A PNG as a file in memory: its pixels, and of the other chunks those both kept and intact."""
    parts = [PNG_SIGNATURE]
    for kind, body, check in png_chunks(path):
        is_needed = kind[:1].isupper() or kind == b"tRNS"    # a capital says that pixels need it
        is_kept = kind in kept and is_intact(kind, body, check)
        if is_needed or is_kept:
            parts.append(struct.pack(">I", len(body)) + kind + body + check)
    return io.BytesIO(b"".join(parts))


def png_chunk(path, kind):
    """The body of an intact chunk that comes before the pixels of a PNG; None if there is none."""
    for found, body, check in png_chunks(path):
        if found == b"IDAT":
            break
        if found == kind and is_intact(found, body, check):
            return body
    return None


def count_scans(path):
    """Count the scans of a JPEG file, passes over its pixels; a progressive one has several."""
    data = path.read_bytes()
    marker = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")        # these never occur within a scan
    scans = 0
    position = 2                                             # after the marker of the start
    while found := marker.search(data, position):
        code = data[found.start() + 1]
        if code == 0xd9:                                     # end of the picture
            break
        if code == 0xda:                                     # start of a scan
            scans += 1
        length = data[found.end():found.end() + 2]
        position = found.end() + int.from_bytes(length, "big")
    return scans


# ---------------------------------------------------------------------------------------------
# Frames

SEVERAL_FRAMES = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")      # in other formats, later frames are
#                                                              previews, layers or depth maps


def first_frame_with_content(file, path):
    """Find the first frame that is not of one colour; the very first where all of them are.

    file: what Pillow opens, `path` or its repaired content in memory.

    Returns the frame as a Pillow image, RGB, and a list of notes on it.
    """
    first = None
    with Image.open(file) as image:
        check_format(image, path)
        count = 1
        if image.format in SEVERAL_FRAMES:
            count = MAX_FRAMES
        pixels = 0
        for index in range(count):
            try:
                if index > 0:
                    image.seek(index)
                check_size(image, path)
                image.load()
            except Refused:
                raise
            except Exception:                                # EOFError after the last frame,
                if first is None:                            # or a later frame is damaged
                    raise
                break
            frame, notes = to_rgb(image, file, path)
            frame = upright(frame, image)
            if count == 1 or not is_one_colour(sample_pixels(frame, 256)):
                return frame, notes
            if first is None:
                first = frame, notes
            pixels += image.width * image.height
            if pixels >= MAX_PIXELS:
                break
    return first


def check_format(image, path):
    """Raise Refused if the format is left alone or the file takes too long to decode."""
    if image.format in LEFT_ALONE:
        raise Refused(f"{shown(path)} is in the format {image.format}; convert it to PNG")
    if image.format in ("JPEG", "MPO"):
        scans = count_scans(path)
        if scans > MAX_SCANS:
            raise Refused(f"{shown(path)} is a progressive JPEG of {scans} scans, which takes too "
                          f"long to decode; save it again with at most {MAX_SCANS}")


def check_size(image, path):
    """Raise Refused if the frame has too many pixels, or Pillow would misread it."""
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        if image.format in SEVERAL_FRAMES and image.tell() > 0:
            size = f"{size} in frame {image.tell() + 1}"
        raise Refused(f"{shown(path)} has too many pixels ({size}); "
                      f"scale it below {MAX_PIXELS:,} in all")
    if image.width * image.height == 0:
        raise Refused(f"{shown(path)} has no pixels")
    is_raw_tiff = image.format == "TIFF" and image.info.get("compression") == "raw"
    if is_raw_tiff and is_planar(image) and tiff_tag(image, BITS, 8) > 8:
        raise Refused(f"{shown(path)} stores its 16-bit colours plane by plane, which Pillow "
                      "misreads; convert it to PNG")


def sample_pixels(image, side):
    """Take at most side x side pixels of a Pillow image, evenly spread and unchanged."""
    size = min(image.width, side), min(image.height, side)
    return image.resize(size, Image.NEAREST)


def upright(rgb, image):
    """Turn `rgb` as the EXIF or XMP data of the open image say. TIFF was turned when loaded."""
    turn = Image.Transpose
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM,
             5: turn.TRANSPOSE, 6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}
    orientation = exif_value(image, 0x112)
    if orientation in turns:
        return rgb.transpose(turns[orientation])
    return rgb


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
    except Exception:                                        # each kind of damage has its own
        return None


def to_rgb(image, file, path):
    """Convert an open and loaded frame of any mode.

    Returns a Pillow image (RGB, 8 bits, sRGB, on a background) and a list of notes.
    """
    colours = described_colours(image, path)
    needs_conversion = colours is not None and colours != SRGB
    profile = image.info.get("icc_profile")
    samples, alpha, notes = deep_samples(image, file, path, needs_conversion)
    if samples is not None:
        image = to_8_bits(samples)
    elif is_transparent(image):
        if image.mode != "RGBA":
            image = image.convert("RGBA")
        image, alpha = image.convert("RGB"), image.getchannel("A")

    if needs_conversion:
        if samples is None:
            samples = np.asarray(image.convert("RGB"))
        image = Image.fromarray(convert_colours(samples, colours))
    elif colours == SRGB:
        image = image.convert("RGB")
    else:
        image = apply_profile(image, profile)

    if alpha is not None and alpha.getextrema()[0] < 255:
        image, is_dark = lay_on_background(image, alpha)
        if is_dark:
            notes.append("is a light drawing on nothing; it gets a dark background")
    return image, notes


def in_bands(function, array):
    """Apply `function` to some rows of (height, width, ...) at a time, which saves memory."""
    rows = max(1, 2 ** 20 // array.shape[1])
    bands = [function(array[top:top + rows]) for top in range(0, len(array), rows)]
    return np.concatenate(bands)


# ---------------------------------------------------------------------------------------------
# Samples of more than 8 bits: Pillow reads all bits of greys, but only the upper 8 of colours

BITS, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339           # tags of TIFF
MAX_SAMPLE, MAX_SAMPLE_OF_ANY_TYPE = 281, 341


def deep_samples(image, file, path, always):
    """Read the samples of a loaded frame that has more than 8 bits for each of them.

    always: read them also where the upper 8 bits of a colour would do.

    Returns three things: the samples, uint16 (height, width, channels) with 65,535 for white, or
    None where Pillow's 8 bits are good enough; alpha as a Pillow image ("L"), or None; and a list
    of notes.
    Raises Refused if the file does not say which value is white.
    """
    has_alpha = "A" in image.getbands()
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)[..., None]
    else:
        values = deep_colours(image, file, path, always)
        if values is None:
            return None, None, []

    alpha = None
    if has_alpha:
        values, opacity = values[..., :-1], values[..., -1:]
    white, notes = find_white(values, image, path)
    if has_alpha:
        opaque = white
        if opacity.max() > white:                            # only the colours have fewer bits
            opaque = 65535
        alpha = to_8_bits(scale(opacity, opaque))
    key = image.info.get("transparency")
    if isinstance(key, (int, tuple)):                        # the one colour that is transparent
        is_opaque = (values != np.array(key, values.dtype)).any(2)
        alpha = Image.fromarray(is_opaque.astype(np.uint8) * 255)
    samples = scale(values, white)
    if tiff_tag(image, PHOTOMETRIC, 1) == 0:                 # zero is white
        samples = 65535 - samples
    return samples, alpha, notes


def deep_colours(image, file, path, always):
    """Read the samples of 16-bit colours as they are stored: uint16 (height, width, channels).

    Returns None for other pictures, and where the upper 8 bits are good enough.
    """
    if not has_16_bits(image, path):
        return None
    stated = stated_white(image, path)
    is_plain = stated is None or stated == 65535
    colours = image.getextrema()                             # lowest and highest, of each band
    if "A" in image.getbands():
        colours = colours[:-1]
    is_dark = max(high for low, high in colours) < 16        # none is above 4,095
    if is_plain and not (is_dark or always or "transparency" in image.info):
        return None
    values = both_bytes(image, file)
    if values is None and not is_plain:
        raise Refused(f"{shown(path)} has 16-bit colours with {stated:g} for white, in a layout "
                      "in which Pillow reads only 8 bits; save it with 8 bits a channel")
    return values


def has_16_bits(image, path):
    """Does the file of this image, in colour or with alpha, store 16 bits a sample?"""
    if image.format == "PNG":
        header = png_chunk(path, b"IHDR") or b""
        return header[8:9] == b"\x10"
    return image.format == "TIFF" and tiff_tag(image, BITS, 8) == 16


def both_bytes(image, file):
    """Read both bytes of each sample of a loaded image: uint16 (height, width, channels).

    Pillow keeps the upper byte of each sample. Told that the bytes are in the opposite order, it
    keeps the lower byte, so the file is decoded once more. Returns None where that does not work.
    """
    is_later_frame_of_png = image.format == "PNG" and image.tell() > 0
    if is_planar(image) or is_later_frame_of_png:
        return None
    other_order = {"L": "B", "B": "L", "N": "B"}             # little, big, native
    if sys.byteorder == "big":
        other_order["N"] = "L"
    upper = np.asarray(image)
    with Image.open(file) as again:
        again.seek(image.tell())
        tiles = []
        for tile in again.tile:
            layout = tile.args if isinstance(tile.args, str) else tile.args[0]
            if layout == "LA;16B":                           # four bytes, two of grey first
                swapped = "RGBA"
            elif re.fullmatch("(RGB|RGBA|RGBX|CMYK);16[LBN]", layout):
                swapped = layout[:-1] + other_order[layout[-1]]
            else:
                return None
            args = swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:])
            tiles.append(tile._replace(args=args))
        again.tile = tiles
        again.load()
        lower = np.asarray(again)
    if layout == "LA;16B":
        upper, lower = upper[..., [0, 3]], lower[..., [1, 3]]
    values = upper.astype(np.uint16)
    values <<= 8
    values |= lower
    return values


def find_white(values, image, path):
    """Find which value of an image is white. values: (height, width, channels) of any type.

    It is what the file states, or else the largest value of so many bits, or 1 for floats. A
    16-bit picture of several values, none above 4,095, is taken for one of 12 bits, as scanners
    and cameras write them without saying so: as 16 bits it would be all but black.

    Returns that value and a list of notes. Raises Refused if no white is stated where one must be
    (integers of 32 bits, floats not from 0 to 1), or if there are NaN or infinite values.
    """
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low + high):
        raise Refused(f"{shown(path)} has NaN or infinite values; save it again without them")
    stated, notes = stated_white(image, path), []
    bits = int(tiff_tag(image, BITS, 16))
    if tiff_tag(image, SAMPLE_FORMAT, 1) == 2:               # signed
        bits -= 1
    white = stated
    if image.mode == "F":
        if stated is None:
            white = 1
    elif bits <= 16:
        if stated is None and bits == 16 and 256 <= high <= 4095 and varies(values):
            white = 4095
            notes.append("has 16 bits but no value above 4095; read as 12 bits")
        elif stated is None or high > stated or is_scaled_up(values, image, stated):
            white = 2 ** bits - 1
    if white is None or low < -0.01 * white or high > 1.001 * white:
        raise Refused(f"{shown(path)} has values from {low:g} to {high:g} and does not say which "
                      "value is white; save it with 8 or 16 bits, or floats from 0 to 1")
    return white, notes


def varies(values):
    """Does any channel of (height, width, channels) hold more than one value?"""
    return bool((values.min((0, 1)) < values.max((0, 1))).any())


def stated_white(image, path):
    """The largest value that a TIFF or PNG of more than 8 bits states, or None."""
    if image.format == "PNG":
        significant = png_chunk(path, b"sBIT") or b"\0"      # bits of each channel
        bits = max(significant)
        return 2 ** bits - 1 if 8 <= bits <= 16 else None
    for tag in (MAX_SAMPLE_OF_ANY_TYPE, MAX_SAMPLE):
        stated = tiff_tag(image, tag, 0)
        if stated > 0:
            return stated
    return None


def is_scaled_up(values, image, largest):
    """Did the writer of a PNG scale samples of 0 to `largest` up to 16 bits, as PNG demands?

    Then each is such a sample shifted up, with or without its upper bits repeated below, or
    multiplied by a factor. Nothing else tells a dark picture from one that was not scaled.
    """
    if image.format != "PNG":
        return False
    values = values.reshape(-1)
    values = values[::1 + values.size // 2 ** 20].astype(int)
    bits = int(largest).bit_length()
    small = values >> (16 - bits)
    shifted = small << (16 - bits)
    repeated = shifted | (small >> (2 * bits - 16))
    multiplied = np.round(small * (65535 / largest))
    return bool(((values == shifted) | (values == repeated) | (values == multiplied)).all())


def scale(values, white):
    """Values of any type, 0 to white -> uint16, 0 to 65,535."""

    def scale_some(some):
        return ((some / white).clip(0, 1) * 65535).round().astype(np.uint16)

    if values.dtype != np.uint16:
        return in_bands(scale_some, values)
    if white == 65535:
        return values
    return scale_some(np.arange(65536))[values]              # a table is faster


def to_8_bits(samples):
    """uint16 (height, width, channels) -> a Pillow image, grey for 1 channel, RGB or CMYK."""
    rounded = ((np.arange(65536) + 128) // 257).astype(np.uint8)[samples]
    height, width, channels = samples.shape
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[channels]
    return Image.frombytes(mode, (width, height), rounded.tobytes())


def is_planar(image):
    return tiff_tag(image, PLANAR, 1) == 2


def tiff_tag(image, tag, default):
    """A tag of an open TIFF, the largest of its numbers; the default where there is none."""
    values = getattr(image, "tag_v2", {}).get(tag, default)
    try:
        return float(np.max(values))
    except (TypeError, ValueError):                          # text where numbers belong
        return default


# ---------------------------------------------------------------------------------------------
# Colours

# x and y of white, red, green and blue (CIE 1931), in the order of PNG's cHRM chunk
D65 = (0.3127, 0.3290)
BT709 = (*D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
PRIMARIES = {                           # by the codes of ITU-T H.273, which cICP uses
    1: BT709, 2: BT709,                                      # 2: unspecified
    5: (*D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),           # BT.601, 625 lines
    6: (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),     # BT.601, 525 lines
    9: (*D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),     # BT.2020
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),               # DCI-P3
    12: (*D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)}    # Display P3
TRANSFERS = {                           # a name, or the exponent that turns samples into light
    1: "sRGB", 2: "sRGB", 6: "sRGB", 14: "sRGB", 15: "sRGB",                # video, shown as sRGB
    4: 2.2, 5: 2.8, 8: 1.0, 13: "sRGB", 16: "PQ", 18: "HLG"}
REFERENCE_WHITE = 203                   # nits of a page's white in HDR (ITU-R BT.2408)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367],
                     [0.0389, -0.0685, 1.0296]])


@dataclass(frozen=True)
class Colours:
    """How samples stand for colours."""
    transfer: str | float = "sRGB"      # "sRGB", "PQ", "HLG", or the exponent of a power law
    primaries: tuple = BT709            # x, y of white, red, green, blue
    is_narrow: bool = False             # video levels: black is 16 of 255, white 235


SRGB = Colours()
ADOBE_RGB = Colours(563 / 256, (*D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06))


def described_colours(image, path):
    """Find what a loaded image says of its colours, other than by an ICC profile.

    Returns Colours, or None if it says nothing or has an ICC profile that decides.
    Raises Refused if it names colours that we cannot convert.
    """
    info = image.info
    if image.format == "PNG":
        codes = png_chunk(path, b"cICP")                     # it outranks an ICC profile
        if codes is not None and len(codes) == 4:
            return coded_colours(codes[0], codes[1], codes[3] == 0, path)
    if info.get("icc_profile") or image.mode in ("CMYK", "LAB"):
        return None
    if image.format == "AVIF":
        with path.open("rb") as file:
            head = file.read(2 ** 16)
        _, box, codes = head.partition(b"colrnclx")
        if box and len(codes) >= 4:
            primaries, transfer = struct.unpack(">HH", codes[:4])
            return coded_colours(primaries, transfer, False, path)
    if image.format == "PNG" and isinstance(info.get("srgb"), int):
        return SRGB
    if image.format == "PNG" and ("gamma" in info or "chromaticity" in info):
        return measured_colours(info.get("gamma"), info.get("chromaticity"))
    if exif_value(image, 1, directory=0xA005) == "R03":      # so say cameras, without a profile
        return ADOBE_RGB
    return None


def coded_colours(primaries, transfer, is_narrow, path):
    """Colours by the codes of ITU-T H.273. Raises Refused if a code is not in our tables."""
    if primaries not in PRIMARIES or transfer not in TRANSFERS:
        raise Refused(f"{shown(path)} has colours that we cannot convert (primaries {primaries}, "
                      f"transfer {transfer} of ITU-T H.273); convert it to sRGB")
    return Colours(TRANSFERS[transfer], PRIMARIES[primaries], is_narrow)


def measured_colours(gamma, chromaticity):
    """Colours by PNG's gAMA and cHRM chunks, as Pillow reads them. What makes no sense is ignored.

    gamma: float or None. chromaticity: x and y of white, red, green and blue, or None.
    """
    transfer, primaries = "sRGB", BT709
    if isinstance(gamma, float) and 0.05 < gamma < 5:
        exponent = 1 / gamma
        if abs(exponent / 2.2 - 1) > 0.05:                   # 2.2 is how writers say sRGB
            transfer = exponent
    if isinstance(chromaticity, tuple) and min(chromaticity) > 0:
        differs = np.abs(np.subtract(chromaticity, BT709)).max() > 0.005
        if differs and np.isfinite(matrix_to_srgb(chromaticity)).all():
            primaries = chromaticity
    return Colours(transfer, primaries)


def convert_colours(samples, colours):
    """Convert samples to sRGB: transfer function, matrix, transfer function.

    samples: uint8 or uint16 (height, width, 1 or 3). Returns uint8 (height, width, 3).
    """
    largest = np.iinfo(samples.dtype).max
    signal = np.arange(largest + 1) / largest                # all values that a sample can have
    if colours.is_narrow:
        signal = ((signal * 255 - 16) / 219).clip(0, 1)
    light = to_light(signal, colours.transfer).astype(np.float32)
    matrix = matrix_to_srgb(colours.primaries).astype(np.float32)
    encoded = np.round(255 * from_light(np.arange(65536) / 65535)).astype(np.uint8)

    def convert_band(band):
        linear = np.broadcast_to(light[band], (*band.shape[:2], 3))
        if colours.transfer == "HLG":                        # shown on a screen of 1,000 nits
            luminance = linear @ np.float32([0.2627, 0.6780, 0.0593])
            linear = linear * luminance[..., None] ** 0.2 * (1000 / REFERENCE_WHITE)
        linear = (linear @ matrix.T).clip(0, 1)
        return encoded[(linear * 65535).round().astype(np.uint16)]

    return in_bands(convert_band, samples)


def to_light(signal, transfer):
    """Samples, 0 to 1 -> light, in which a page's white is 1. HLG: light of the scene, 0 to 1."""
    if transfer == "sRGB":
        return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    if transfer == "PQ":                                     # SMPTE ST 2084, up to 10,000 nits
        root = signal ** (32 / 2523)
        light = (root - 0.8359375).clip(0) / (18.8515625 - 18.6875 * root)
        return light ** (8192 / 1305) * 10_000 / REFERENCE_WHITE
    if transfer == "HLG":                                    # ARIB STD-B67
        bright = (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
        return np.where(signal <= 0.5, signal ** 2 / 3, bright)
    return signal ** transfer


def from_light(light):
    """Light, 0 to 1 -> samples of sRGB, 0 to 1."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def matrix_to_srgb(primaries):
    """The matrix (3, 3) from light in these primaries to light in sRGB's; NaN if there is none."""
    try:
        with np.errstate(all="ignore"):
            to_xyz, white = matrix_to_xyz(primaries)
            from_xyz, srgb_white = matrix_to_xyz(BT709)
            cones = np.diag((BRADFORD @ srgb_white) / (BRADFORD @ white))
            adapt = np.linalg.inv(BRADFORD) @ cones @ BRADFORD
            return np.linalg.inv(from_xyz) @ adapt @ to_xyz
    except np.linalg.LinAlgError:                            # three primaries on one line
        return np.full((3, 3), np.nan)


def matrix_to_xyz(primaries):
    """-> the matrix (3, 3) from light in these primaries to CIE XYZ, and the XYZ of their white."""
    points = np.reshape(primaries, (4, 2))
    x, y = points.T
    white, *columns = np.stack([x / y, np.ones(4), (1 - x - y) / y], axis=1)
    columns = np.stack(columns, axis=1)
    return columns * np.linalg.solve(columns, white), white


def apply_profile(image, profile):
    """Convert to sRGB by an ICC profile (bytes or None), which is ignored where it does not fit."""
    try:
        if image.mode == "LAB":
            source = ImageCms.createProfile("LAB")
        else:
            source = ImageCms.getOpenProfile(io.BytesIO(profile))
            space = source.profile.xcolor_space.strip()
            if space == "GRAY" and is_grey(image):
                image = image.convert("L")
            elif space == "RGB" and image.mode != "CMYK":
                image = image.convert("RGB")
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    except Exception:                                        # no profile, or one that does not fit
        return image.convert("RGB")


def is_grey(image):
    """Are the three channels of an image equal, whatever its mode?"""
    rgb = image.convert("RGB")
    return ImageChops.difference(rgb, image.convert("L").convert("RGB")).getbbox() is None


# ---------------------------------------------------------------------------------------------
# Transparency

def is_transparent(image):
    return "transparency" in image.info or bool({"A", "a"} & set(image.getbands()))


def lay_on_background(image, alpha):
    """Lay a picture on white, or on a dark background if only that shows the drawing.

    image, alpha: Pillow images, RGB and L. Returns a Pillow image, RGB, and whether it is dark.
    """
    colours = np.asarray(sample_pixels(image, 1024), np.int16)
    opacity = np.asarray(sample_pixels(alpha, 1024), np.float32) / 255
    is_drawn = opacity > 0

    def visible_share(background):
        """The share of what is drawn that differs visibly from the background."""
        difference = np.abs(colours - np.int16(background)).max(2) * opacity
        return (difference[is_drawn] > FAINT).mean()

    background = WHITE
    has_ground = (opacity < 0.5).mean() >= 0.05              # not only rounded corners
    if has_ground and is_drawn.any():
        on_white, on_dark = visible_share(WHITE), visible_share(DARK)
        if on_white < 0.05 and on_dark > on_white:
            background = DARK
    result = Image.new("RGB", image.size, background)
    result.paste(image, (0, 0), alpha)
    return result, background == DARK


# ---------------------------------------------------------------------------------------------
# Files that are not pictures

VIDEO = "is a video; save one of its frames as PNG"
OTHER_FILES = {                         # how they begin, and what a message says of them
    b"version https://git-lfs": "is a Git LFS pointer, not the picture itself; run git lfs pull",
    b"%PDF": "is PDF; convert it to PNG",
    b"%!PS": "is PostScript; convert it to PNG",
    b"\xff\x0a": "is JPEG XL; convert it to PNG",
    b"\0\0\0\x0cJXL ": "is JPEG XL; convert it to PNG",
    b"#?RADIANCE": "is Radiance HDR; convert it to PNG",
    b"v/1\x01": "is OpenEXR; convert it to PNG",
    b"gimp xcf": "is GIMP's XCF; export it as PNG",
    b"PK\3\4": "is a ZIP archive or a document; export the picture in it as PNG",
    b"\x1f\x8b": "is compressed by gzip; unpack it first",
    b"\x1aE\xdf\xa3": VIDEO,
    b"\0\5\x16\7": "holds macOS's notes on another file, not a picture; delete it"}
PICTURES = {PNG_SIGNATURE: "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"BM": "BMP",
            b"II*\0": "TIFF", b"MM\0*": "TIFF", b"8BPS": "PSD"}


def what_else(head):
    """Say what a file is that Pillow cannot open, and what to do. head: its first 1,024 bytes."""
    for start, what in OTHER_FILES.items():
        if head.startswith(start):
            return what
    if head[4:8] == b"ftyp":
        return what_container(head)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return VIDEO
    text = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not a picture; download the picture itself"
    if b"<svg" in text:
        return "is SVG; convert it to PNG"
    if is_text(head):
        return "is text, not a picture"
    for start, kind in PICTURES.items():
        if head.startswith(start):
            return (f"looks like {kind}, but Pillow cannot read it: it is damaged or of a rare "
                    "kind; save it again as PNG")
    return "is not a picture, or is in a format that Pillow cannot read; convert it to PNG"


def what_container(head):
    """Say what a file of MP4's family is. Its brands, of 4 bytes each, follow b"....ftyp"."""
    length = int.from_bytes(head[:4], "big")
    brands = {head[at:at + 4] for at in range(8, min(length, len(head)), 4)}
    if brands & {b"avif", b"avis"}:
        return "is AVIF, but damaged or unknown to this version of Pillow; convert it to PNG"
    if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}:
        return "is HEIC; convert it to PNG"
    if b"crx " in brands:
        return "is a camera's raw file; convert it to PNG"
    return VIDEO


def is_text(head):
    """Is this the beginning of a text in UTF-8?"""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)     # it may end within a letter
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter.isspace() for letter in text)
