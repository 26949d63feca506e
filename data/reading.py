"""Read any picture file as RGB pixels that mean what the file says.

    read_image("cat.jpg", 64)               # uint8 (64, 64, 3), the centre square
    read_reference("cat.png", 64)           # the same; refuses a picture that shows nothing

The picture is turned upright, its colours are converted to sRGB, samples of more than 8 bits are
scaled by the value that stands for white, and transparent parts are laid on a background. Metadata
that cannot be read is ignored: an intact picture is never refused because of damaged metadata.

Contents: reading, paths, files, frames, transparency, files that are not pictures. colour.py
interprets the colour values.
"""

import codecs
import errno
import io
import os
import re
import stat
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .colour import (SRGB, apply_profile, convert_colours, deep_samples, described_colours,
                     to_8_bits)
from .metadata import (BITS, PNG_SIGNATURE, Refused, exif_value, is_intact, is_planar, png_chunks,
                       shown, tiff_tag)

MAX_PIXELS = 64_000_000                 # in one frame, and in all frames that are searched
MAX_FRAMES = 1000                       # that are searched for the first that is not blank
MAX_SCANS = 100                         # in a progressive JPEG; an ordinary one has about ten
FAINT = 16                              # of 255: smaller differences are not visible
WHITE = (255, 255, 255)                 # the backgrounds of transparent pictures
DARK = (48, 48, 48)


# ---------------------------------------------------------------------------------------------
# Reading

def read_image(path, size):
    """Read a picture.

    path: a picture file. size: the side of the result in pixels.

    Returns uint8 (size, size, 3), RGB: the largest square around the centre, scaled. Of an
    animation or a file of several pages, the first frame that shows something is read. Transparent
    parts become white, or dark grey if the drawing is so light that it would vanish on white. If
    something had to be assumed, a note on stderr says so.

    Raises ValueError, with a message of one line, if the file cannot be read, is not a picture, is
    damaged or too large, or does not say what its values mean.
    """
    return centre_square(open_picture(Path(path)), size)


def read_reference(path, size):
    """Read a picture to learn a style from. Arguments and result are those of `read_image`.

    Raises ValueError as `read_image` does, and if the square is almost all one colour.
    """
    whole = open_picture(Path(path))
    pixels = centre_square(whole, size)
    if not is_one_colour(pixels):
        return pixels
    if is_one_colour(whole.resize((size, size))):
        raise ValueError(f"{shown(path)}: the picture is almost all one colour, so there is no "
                         "style to learn; give another picture")
    raise ValueError(f"{shown(path)}: its centre square is almost all one colour, so there is no "
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
    expected_kind = "folder" if what.startswith("folder") else "file"
    if kind != expected_kind:
        raise ValueError(f"{name} is a {kind}, not a {what}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"no permission to read {name}; change its permissions")


# ---------------------------------------------------------------------------------------------
# Files

# metadata that changes how the pixels are shown: the colours, and in eXIf the orientation
COLOUR_CHUNKS = (b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"eXIf")
# formats that are refused: for those in the first line Pillow needs other software, those in the
# second it reads without scaling their values
LEFT_ALONE = ("EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR",
              "FITS", "MCIDAS")


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
        raise Refused(f"no permission to read {name}; change its permissions") from None
    except Image.DecompressionBombError:                     # Pillow's own limit, above ours
        raise Refused(f"{name} has too many pixels; "
                      f"reduce it to fewer than {MAX_PIXELS:,} in all") from None
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


def without_metadata(path, kept):
    """A PNG in memory without its metadata, except for intact chunks of the kinds in `kept`."""
    parts = [PNG_SIGNATURE]
    for kind, body, check in png_chunks(path):
        is_needed = kind[:1].isupper() or kind == b"tRNS"    # critical chunks begin with a capital
        is_kept = kind in kept and is_intact(kind, body, check)
        if is_needed or is_kept:
            parts.append(struct.pack(">I", len(body)) + kind + body + check)
    return io.BytesIO(b"".join(parts))


def count_scans(path):
    """Count the scans of a JPEG file: its passes over the pixels.

    A progressive file has several.
    """
    data = path.read_bytes()
    marker = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")        # these never occur within a scan
    scans = 0
    position = 2                                             # after the marker of the start
    while match := marker.search(data, position):
        code = data[match.start() + 1]
        if code == 0xd9:                                     # end of the picture
            break
        if code == 0xda:                                     # start of a scan
            scans += 1
        length = data[match.end():match.end() + 2]
        position = match.end() + int.from_bytes(length, "big")
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
    """Raise Refused if the format is one of LEFT_ALONE, or the file takes too long to decode."""
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
                      f"reduce it to fewer than {MAX_PIXELS:,} in all")
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
    """Rotate `rgb` as the image's EXIF or XMP data say. (Pillow rotates TIFF when loading.)"""
    turn = Image.Transpose
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM,
             5: turn.TRANSPOSE, 6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}
    orientation = exif_value(image, 0x112)
    if orientation in turns:
        return rgb.transpose(turns[orientation])
    return rgb


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
        alpha = image.getchannel("A")
        image = image.convert("RGB")

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
            notes.append("is a light drawing on a transparent background, so it is laid on a dark "
                         "one")
    return image, notes


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
    b"%PDF": "is a PDF; convert it to PNG",
    b"%!PS": "is PostScript; convert it to PNG",
    b"\xff\x0a": "is JPEG XL; convert it to PNG",
    b"\0\0\0\x0cJXL ": "is JPEG XL; convert it to PNG",
    b"#?RADIANCE": "is Radiance HDR; convert it to PNG",
    b"v/1\x01": "is OpenEXR; convert it to PNG",
    b"gimp xcf": "is GIMP's XCF; export it as PNG",
    b"PK\3\4": "is a ZIP archive or a document; export the picture in it as PNG",
    b"\x1f\x8b": "is compressed by gzip; unpack it first",
    b"\x1aE\xdf\xa3": VIDEO,
    b"\0\5\x16\7": "is macOS metadata (AppleDouble), not a picture; delete it"}
PICTURES = {PNG_SIGNATURE: "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"BM": "BMP",
            b"II*\0": "TIFF", b"MM\0*": "TIFF", b"8BPS": "PSD"}

UNREADABLE = ("looks like {}, but Pillow cannot read it: it is damaged or of a rare kind; save it "
              "again as PNG")


def what_else(head):
    """Say what a file is that Pillow cannot open, and what to do. head: its first 1,024 bytes."""
    for start, what in OTHER_FILES.items():
        if head.startswith(start):
            return what
    if head[4:8] == b"ftyp":
        return what_container(head)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return VIDEO
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return UNREADABLE.format("WebP")
    text = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not a picture; download the picture itself"
    if b"<svg" in text:
        return "is SVG; convert it to PNG"
    if is_text(head):
        return "is text, not a picture"
    for start, kind in PICTURES.items():
        if head.startswith(start):
            return UNREADABLE.format(kind)
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
