"""Turn the values of a picture file into sRGB.

    samples, alpha, notes = deep_samples(image, file, path, always=False)   # more than 8 bits
    colours = described_colours(image, path)                # cICP, gAMA, cHRM, EXIF; or None
    pixels = convert_colours(samples, colours)              # PQ, HLG, powers, other primaries
    image = apply_profile(image, profile)                   # an ICC profile

reading.py opens the files and calls these. Arrays are (height, width, channels).
"""

import io
import math
import re
import struct
import sys
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageCms

from .metadata import (BITS, MAX_SAMPLE, MAX_SAMPLE_OF_ANY_TYPE, PHOTOMETRIC, SAMPLE_FORMAT,
                       Refused, exif_value, is_planar, png_chunk, shown, tiff_tag)


def in_bands(function, array):
    """Apply `function` to some rows of (height, width, ...) at a time, which saves memory."""
    rows = max(1, 2 ** 20 // array.shape[1])
    bands = [function(array[top:top + rows]) for top in range(0, len(array), rows)]
    return np.concatenate(bands)


# ---------------------------------------------------------------------------------------------
# Samples of more than 8 bits: Pillow reads all bits of greys, but only the upper 8 of colours

def deep_samples(image, file, path, always):
    """Read the samples of a loaded frame with more than 8 bits per sample.

    always: read them even if the upper 8 bits of a colour would be enough.

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
        opacity = values[..., -1:]
        values = values[..., :-1]
    white, notes = find_white(values, image, path)
    if has_alpha:
        opaque = white
        if opacity.max() > white:                            # alpha has 16 bits, the colours fewer
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
    with Image.open(file) as swapped_image:
        swapped_image.seek(image.tell())
        tiles = []
        for tile in swapped_image.tile:
            layout = tile.args if isinstance(tile.args, str) else tile.args[0]
            if layout == "LA;16B":                           # four bytes, two of grey first
                swapped = "RGBA"
            elif re.fullmatch("(RGB|RGBA|RGBX|CMYK);16[LBN]", layout):
                swapped = layout[:-1] + other_order[layout[-1]]
            else:
                return None
            args = swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:])
            tiles.append(tile._replace(args=args))
        swapped_image.tile = tiles
        swapped_image.load()
        lower = np.asarray(swapped_image)
    if layout == "LA;16B":
        upper, lower = upper[..., [0, 3]], lower[..., [1, 3]]
    values = upper.astype(np.uint16)
    values <<= 8
    values |= lower
    return values


def find_white(values, image, path):
    """Find which value of an image is white. values: (height, width, channels) of any type.

    It is the value that the file states, or else the largest value of its number of bits, or 1 for
    floats. If a 16-bit picture has several values but none above 4,095, it is read as 12 bits:
    scanners and cameras write such files without saying so; as 16 bits it would be almost black.

    Returns that value and a list of notes. Raises Refused if no white is stated where one must be
    (integers of 32 bits, floats not from 0 to 1), or if there are NaN or infinite values.
    """
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low + high):
        raise Refused(f"{shown(path)} has NaN or infinite values; save it again without them")
    stated = stated_white(image, path)
    notes = []
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
    return bool((values != values[0, 0]).any())


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

    def scale_part(part):
        return ((part / white).clip(0, 1) * 65535).round().astype(np.uint16)

    if values.dtype != np.uint16:
        return in_bands(scale_part, values)
    if white == 65535:
        return values
    return scale_part(np.arange(65536))[values]              # a table is faster


def to_8_bits(samples):
    """uint16 (height, width, channels) -> a Pillow image, grey for 1 channel, RGB or CMYK."""
    rounded = ((np.arange(65536) + 128) // 257).astype(np.uint8)[samples]
    height, width, channels = samples.shape
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[channels]
    return Image.frombytes(mode, (width, height), rounded.tobytes())


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
    if exif_value(image, 1, directory=0xA005) == "R03":      # cameras' mark for Adobe RGB
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
    transfer = "sRGB"
    primaries = BT709
    if isinstance(gamma, float) and 0.05 < gamma < 5:
        exponent = 1 / gamma
        if abs(exponent / 2.2 - 1) > 0.05:                   # writers of PNG say 2.2 for sRGB
            transfer = exponent
    if isinstance(chromaticity, tuple) and min(chromaticity) > 0:
        differs = np.abs(np.subtract(chromaticity, BT709)).max() > 0.005
        corners = np.reshape(chromaticity, (4, 2))[1:]       # red, green, blue
        area = np.abs(np.linalg.det(np.column_stack([corners, np.ones(3)]))) / 2
        # sRGB's triangle has an area of 0.11; in one without area, the primaries lie on a line and
        # the matrix has no inverse
        if differs and area > 0.01 and np.isfinite(matrix_to_srgb(chromaticity)).all():
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
    """Return the matrix (3, 3) from light in these primaries to CIE XYZ, and their white's XYZ."""
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
