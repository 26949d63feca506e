"""A picture from anywhere: whatever Pillow can read, as RGB pixels that mean what the file says.

    read_image("cat.jpg", 64)               # uint8 (64, 64, 3), the centre square
    read_reference("cat.png", 64)           # the same, and refused where there is nothing to learn

Each picture is turned upright, its colours become sRGB, its greys are scaled to 8 bits, and what
is transparent gets a background. Metadata that cannot be read is passed over: the picture counts.
"""

import errno
import io
import os
import stat
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

MAX_PIXELS = 64_000_000                 # of a picture we agree to open
WHITE, DARK = (255, 255, 255), (48, 48, 48)                  # behind transparent pictures
FAINT = 16                              # of 255: nobody sees less of a difference
FOREIGN = {b"<svg": "SVG", b"ftyp": "HEIC or AVIF", b"%PDF": "PDF", b"%!PS": "PostScript",
           b"JXL ": "JPEG XL", b"\xff\x0a": "JPEG XL", b"\x1f\x8b": "compressed (SVGZ?)"}
PROGRAMS = ("EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR")    # Pillow leaves these to others
TURN = Image.Transpose
UPRIGHT = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE,
           6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}
BITS, INVERTED, LARGEST, SIGNED, LARGEST_OF_ALL = 258, 262, 281, 339, 341    # tags of TIFF


def read_image(path, size):
    """Any picture file -> RGB uint8 (size, size, 3); what is not square loses its long ends.

    Of an animation it is the first frame that is not of one colour. A light drawing on nothing
    gets a dark background, any other a white one. Raises ValueError in one line for what is no
    picture, is damaged, too large to open safely, or does not say which value is white.
    """
    return square(open_picture(Path(path)), size)


def read_reference(path, size):
    """As `read_image`. Raises ValueError too where the square is (nearly) of one colour."""
    whole = open_picture(Path(path))
    pixels = square(whole, size)
    if one_colour(pixels):
        where = "the picture" if one_colour(whole.resize((size, size))) else "its centre square"
        raise ValueError(f"{path}: {where} is nearly of one colour, so there is no style to learn; "
                         "crop it to the part that you mean, or give another picture")
    return pixels


def square(image, size):
    return np.asarray(ImageOps.fit(image, (size, size), Image.LANCZOS))


def one_colour(pixels):
    """Do fewer than one pixel in 200 differ visibly from the middle one? pixels: RGB, any size."""
    pixels = np.asarray(pixels).reshape(-1, 3).astype(int)
    away = np.abs(pixels - np.median(pixels, axis=0)).max(1)
    return (away > FAINT).mean() < 0.005


def check_path(path, what):
    """Raise ValueError, in one line, where no `what` ("picture", "folder of ...") can be read."""
    name = path if len(str(path)) < 300 else f"{str(path)[:40]}...{str(path)[-20:]}"
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no {what} at {name}") from None
    except (OSError, ValueError) as error:                   # ValueError: a zero in the name
        why = {errno.ENAMETOOLONG: "the name is too long", errno.ELOOP: "its links go in a circle",
               errno.EACCES: "its folder may not be read"}.get(getattr(error, "errno", None))
        raise ValueError(f"no {what} at {name}: {why or 'that cannot be a name'}") from None
    is_pipe = stat.S_ISFIFO(mode) and what == "text file"    # <(echo a cat)
    kind = ("folder" if stat.S_ISDIR(mode) else
            "file" if stat.S_ISREG(mode) or is_pipe else "device or a pipe")
    if (kind == "folder") != what.startswith("folder") or kind.startswith("device"):
        raise ValueError(f"{name} is a {kind}, not a {what}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{name} may not be read; change its permissions")


def open_picture(path):
    """The file -> a Pillow image, RGB. Raises ValueError in one line: see `read_image`."""
    check_path(path, "picture")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                  # damage and size are errors below
            try:
                return first_frame(path, path)
            except (OSError, SyntaxError, ValueError) as error:
                bare = without_extras(path)
                if isinstance(error, Refused) or bare is None:
                    raise
                return first_frame(io.BytesIO(bare), path)
    except Refused:
        raise
    except Image.DecompressionBombError:                     # Pillow's own limit, above ours
        raise Refused(f"{path} has too many pixels; scale it below {MAX_PIXELS:,} in all") from None
    except Image.UnidentifiedImageError:
        with path.open("rb") as file:
            head = file.read(1024)
        for mark, kind in FOREIGN.items():
            if mark in (head if mark == b"<svg" else head[:12]):
                raise Refused(f"{path} is {kind}; convert it to PNG") from None
        raise Refused(f"{path} is not a picture that Pillow can read; convert it to PNG") from None
    except Exception as error:                               # on damage each format has its own
        raise Refused(f"{path} cannot be read: {' '.join(str(error).split())}") from None


class Refused(ValueError):
    """A picture that we do not read, in our own words."""


def without_extras(path):
    """The bytes of a PNG that hold its pixels, without text and metadata; None: it is no PNG.

    Pillow refuses a whole picture for a damaged note in it.
    """
    with path.open("rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            return None
        rest = file.read()
    kept, at = [b"\x89PNG\r\n\x1a\n"], 0
    while at + 12 <= len(rest):
        end = at + 12 + int.from_bytes(rest[at:at + 4], "big")
        kind = rest[at + 4:at + 8]
        if kind[:1].isupper() or kind == b"tRNS":            # capitals: a picture needs them
            kept.append(rest[at:end])
        at = end
    return b"".join(kept)


def first_frame(file, path):
    """The first frame that is not of one colour; the first one where all are."""
    first = None
    with Image.open(file) as image:
        if image.format in PROGRAMS:
            raise Refused(f"{path} is {image.format}; convert it to PNG")
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise Refused(f"{path} has too many pixels ({image.width} x {image.height}); "
                          f"scale it below {MAX_PIXELS:,} in all")
        for i in range(min(1000, MAX_PIXELS // pixels)):
            try:
                image.seek(i)
                image.load()
            except Exception:                                # EOFError: there are no more
                if first is None:
                    raise
                break                                        # and those may be damaged
            frame = upright(to_rgb(image, path), image)
            first = first or frame
            if any(high - low > FAINT for low, high in frame.getextrema()):
                return frame
    return first


def upright(rgb, image):
    """rgb turned as the EXIF or XMP of the open image says; as it is where they cannot be read."""
    try:
        turn = UPRIGHT.get(image.getexif().get(0x112))       # after load(), which turns TIFF itself
    except Exception:
        turn = None
    return rgb if turn is None else rgb.transpose(turn)


def to_rgb(image, path):
    """An open image of any mode -> RGB, 8 bits, sRGB, on a background."""
    info, alpha = image.info, None
    if image.mode.startswith("I") or image.mode == "F":
        image = scale_greys(image, path)
    if "transparency" in image.info or {"A", "a"} & set(image.getbands()):
        clear = image.convert("RGBA")
        image, alpha = clear.convert("RGB"), clear.getchannel("A")
    image = to_srgb(image, info)
    return image if alpha is None else lay_on_background(image, alpha, path)


def scale_greys(image, path):
    """16 and 32 bits or floats -> L, by the value that the file says is white.

    That is TIFF's (S)MaxSampleValue, or else the largest of its BitsPerSample (12 bits: 4,095). A
    16-bit picture of several greys that never goes above 4,095 is taken for 12 bits, as scanners
    and cameras write them without saying so: with 16 it would be all but black. A note tells.
    Floats are 0 to 1. Raises ValueError where that cannot be, and for 32-bit integers without
    a MaxSampleValue.
    """
    values, tags = np.asarray(image, np.float64), getattr(image, "tag_v2", {})
    low, high = (values.min(), values.max()) if np.isfinite(values).all() else (np.nan, np.nan)
    if np.isnan(high):
        raise Refused(f"{path} has pixels that are not numbers (NaN or infinite); save it again")
    said = tags.get(LARGEST_OF_ALL, tags.get(LARGEST))
    said = float(np.max(said)) if said else 0
    bits = int(np.max(tags.get(BITS, 16))) - (2 in np.atleast_1d(tags.get(SIGNED, 1)))
    white = said or (1 if image.mode == "F" else 2 ** bits - 1 if bits <= 16 else 0)
    if not said and image.mode != "F" and bits == 16 and 256 <= high <= 4095 and low < high:
        white = 4095
        print(f"note: {path} has 16 bits but none above 4095; read as 12 bits", file=sys.stderr)
    if not white or low < -0.01 * white or high > 1.001 * white:
        raise Refused(f"{path} has pixels from {low:g} to {high:g} and does not say which "
                      "value is white; save it with 8 or 16 bits, or floats from 0 to 1")
    values = (values / white).clip(0, 1)
    values = 1 - values if tags.get(INVERTED) == 0 else values
    return Image.fromarray((values * 255).round().astype(np.uint8))


def to_srgb(image, info):
    """-> RGB, by the embedded profile or PNG's gamma; what cannot be used of these is ignored."""
    icc, gamma = info.get("icc_profile"), info.get("gamma")
    try:
        if image.mode == "LAB":
            profile = ImageCms.createProfile("LAB")
        else:
            profile = ImageCms.getOpenProfile(io.BytesIO(icc))
            space = profile.profile.xcolor_space.strip()
            if image.mode != "CMYK" and space in ("GRAY", "RGB"):
                image = image.convert("L" if space == "GRAY" else "RGB")
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
    except Exception:                                        # no profile, or one that does not fit
        image = image.convert("RGB")
    if not icc and "srgb" not in info and isinstance(gamma, float) and 0.05 < gamma < 5:
        power = 1 / (2.2 * gamma)                            # 1 for the usual 0.45455
        if abs(power - 1) > 0.05:
            image = image.point([round(255 * (v / 255) ** power) for v in range(256)] * 3)
    return image


def lay_on_background(image, alpha, path):
    """RGB and its alpha -> RGB on white; on a dark background where only that shows the drawing."""
    on = {colour: Image.composite(image, Image.new("RGB", image.size, colour), alpha)
          for colour in (WHITE, DARK)}
    drawn = np.asarray(alpha) > 0

    def seen(colour):                                        # share of what is drawn
        away = np.abs(np.asarray(on[colour]).astype(np.int16) - colour).max(2)
        return (away[drawn] > FAINT).mean() if drawn.any() else 0

    if seen(WHITE) >= 0.05 or seen(DARK) <= seen(WHITE):
        return on[WHITE]
    print(f"note: {path} is a light drawing on nothing; it gets a dark background", file=sys.stderr)
    return on[DARK]
