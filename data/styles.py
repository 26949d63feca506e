"""The space of styles: what a drawing looks like, as a few attributes that combine freely.

A style has five attributes. Each is chosen anew for every training picture and most may be empty,
which means "as drawn". Its phrase consists of its attributes' words, so phrases combine as the
styles do:

    Style(palette="blue and gold", line="thick red outline", medium="watercolor", ground="black")
    "blue and gold watercolor with thick red outline on black"

A word names a region, a picture shows a point in it: `Style.seed` decides everything that the words
leave open, such as which navy, how wide the strokes are, and where the light comes from. Half of
the styles have no words at all (`Style.free`); free_styles.py paints them.

    python -m data.pictures        # writes data/contact_sheet.png

numpy and Pillow only. Pictures are float32 (H, W, 3) in [0, 1] inside and uint8 outside; lengths
are 64ths of the side.
"""

import colorsys
import functools
import zlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from . import free_styles
from .paint import (blur, cells, coordinates, edges, from_image, light_of, look_up, mix, noise,
                    planes, ramp, saturate, shifted, slopes, spread, to_image)

HUES = {name: np.array(rgb, np.float32) / 255 for name, rgb in {
    "black": (18, 18, 20), "white": (255, 255, 255), "grey": (140, 140, 145), "red": (206, 38, 42),
    "orange": (244, 128, 32), "gold": (242, 190, 50), "green": (52, 150, 62),
    "teal": (24, 140, 140), "blue": (50, 108, 220), "navy": (24, 34, 92), "purple": (116, 54, 156),
    "pink": (244, 140, 180), "brown": (112, 68, 36), "cream": (250, 236, 204)}.items()}
DARK = ("black", "navy", "purple", "brown", "green", "teal", "red", "blue")
LIGHT = ("white", "cream", "gold", "pink", "orange", "grey")
GROUND_HUES = tuple(HUES)[2:]           # of backgrounds, besides white and black
HUE_PAIRS = tuple(zip(GROUND_HUES, GROUND_HUES[5:] + GROUND_HUES[:5]))  # each and the fifth after

ATTRIBUTES = {
    "palette": [f"{dark} and {light}" for dark in DARK for light in LIGHT]
               + ["pastel", "neon", "sepia", "grey"],
    "line": [f"{width} {hue} outline" for width in ("thin", "thick")
             for hue in ("black", "white", "red", "blue", "brown")] + ["line drawing"],
    "medium": ["flat", "watercolor", "oil painting", "kid crayon", "pencil hatching", "halftone",
               "mosaic", "stained glass", "pixel art", "woodcut", "embroidery", "chalk", "wooden",
               "golden", "glowing"],
    "ground": ["white", "black", "paper"] + list(GROUND_HUES)
              + [f"{a} and {b} {kind}" for kind in ("gradient", "stripes", "dots")
                 for a, b in HUE_PAIRS],
    "light": ["bevelled 3d", "drop shadow", "sticker"],
}
HELD_OUT = {"medium": ("stained glass", "glowing"), "light": ("sticker",)}


@dataclass(frozen=True)
class Style:
    """One style of the space. An attribute "" is "as drawn"; the ground is the background."""
    palette: str = ""
    line: str = ""
    medium: str = ""
    ground: str = "white"
    light: str = ""
    free: bool = False      # a style without words, which follows from its seed alone
    seed: int = 0           # of what the words leave open


UNNAMED = ("", "white")      # no attribute, and the background that goes without saying


def named(style):
    """{attribute: value} for the attributes that the style's phrase names."""
    values = {attribute: getattr(style, attribute) for attribute in ATTRIBUTES}
    return {attribute: value for attribute, value in values.items() if value not in UNNAMED}


def is_plain(style):
    """True where a drawing stays as it is, on white."""
    return not style.free and not named(style)


def has_new_words(style):
    """True if an attribute has a value that the base never sees in training."""
    return any(v in HELD_OUT.get(k, ()) for k, v in named(style).items())


def is_held_out(style):
    """Is a style held out of training?

    Held out are two media, one light, a fifth of all pairs of attribute values, and a fifth of the
    styles without words. A pair is held out if the CRC-32 of its words is divisible by 5, whatever
    the other attributes are (a white background is in no pair); a style without words, if the
    CRC-32 of its seed is.
    """
    if style.free:
        return zlib.crc32(f"free {style.seed}".encode()) % 5 == 0
    if has_new_words(style):
        return True
    values = list(named(style).items())
    return any(is_pair_held_out(a, b) for i, a in enumerate(values) for b in values[i + 1:])


@functools.lru_cache(None)
def is_pair_held_out(a, b):
    """a, b: (attribute, value), in the order of ATTRIBUTES."""
    return zlib.crc32(f"{a[0]}={a[1]}|{b[0]}={b[1]}".encode()) % 5 == 0


PLAIN = 0.3                  # share of the drawings that stay as they are, on white
FREE = 0.5                   # share of the others whose style has no words
SILENT = 0.8, 0.25           # probability that no style is named: for plain drawings, for others
CHANCE = {"palette": 0.45, "line": 0.25, "medium": 0.45, "ground": 0.6, "light": 0.2}    # of each
SEEDS = 2 ** 31              # number of seeds


def sample(rng, held_out=False, plain=PLAIN, free=FREE):
    """A random Style, held out of training or not, as asked.

    rng: numpy Generator. plain: share of drawings as they are (never, if held_out); free: share of
    the others that have a style without words.
    """
    if not held_out and rng.random() < plain:
        return Style()
    if rng.random() < free:
        while True:
            style = Style(free=True, seed=int(rng.integers(SEEDS)))
            if is_held_out(style) == held_out:
                return style
    while True:
        chosen = [k for k in ATTRIBUTES if rng.random() < CHANCE[k]]
        # sample new values for the same attributes: sampling the attributes anew as well would
        # favour styles with few of them
        for _ in range(50):
            values = {k: ATTRIBUTES[k][int(rng.random() * len(ATTRIBUTES[k]))] for k in chosen}
            style = Style(**values)
            if is_held_out(style) == held_out:
                return replace(style, seed=int(rng.integers(SEEDS)))


def keep_colours(style, colours=()):
    """The style without what hides the colours of a drawing.

    These are palettes, line drawings, the media woodcut, wooden and golden, free styles, and a
    background in one of the `colours`, on which the drawing would not be visible.
    """
    colours = {"gold" if colour == "yellow" else colour for colour in colours}
    line, medium, ground = style.line, style.medium, style.ground
    if line == "line drawing":
        line = ""
    if medium in ("woodcut", "wooden", "golden"):
        medium = ""
    if colours & set(ground.split(" ")):
        ground = "white"
    return replace(style, palette="", line=line, medium=medium, ground=ground, free=False)


def phrase(style, icon_style="", rng=None):
    """The style in words; `icon_style`, the icon set's own, stands where no medium does.

    With rng, parts are left out as in captions: the whole phrase for 80 % of the plain drawings and
    25 % of the others, else each attribute with probability 1/7. A white background goes without
    saying, and a free style has no words.
    """
    if style.free:
        return ""
    silent = SILENT[0] if is_plain(style) else SILENT[1]
    if rng is not None and rng.random() < silent:
        return ""

    def maybe(words):
        if words and rng is not None and rng.random() <= 1 / 7:
            return ""
        return words

    is_line_drawing = style.line == "line drawing"
    parts = [maybe(style.palette), maybe(style.medium or icon_style)]
    if is_line_drawing:
        parts.append(maybe("line drawing"))
    extras = ["" if is_line_drawing else maybe(style.line), maybe(style.light)]
    extras = [words for words in extras if words]
    ground = "" if style.ground == "white" else maybe(style.ground)
    words = " ".join(w for w in parts if w)
    if extras:
        details = " and ".join(extras)
        words = f"{words} with {details}" if words else details
    if not ground:
        return words
    return f"{words} on {ground}" if words else f"{ground} ground"


# --------------------------------------------------------------------------------------------------
# Colours

def near(name, point):
    """A random colour near the one that `name` stands for: float32 (3,)."""
    hue, saturation, value = colorsys.rgb_to_hsv(*HUES[name])
    if name == "black":
        return np.float32(point.choice([0, point.uniform(0, 0.14)]) * np.ones(3))
    if name == "white":
        return np.float32(point.choice([1, point.uniform(0.93, 1)]) * np.ones(3))
    hue += point.uniform(-0.03, 0.03)
    saturation *= point.uniform(0.75, 1.25)
    value *= point.uniform(0.8, 1.2)
    return np.float32(colorsys.hsv_to_rgb(hue % 1, min(1, saturation), min(1, value)))


def recolour(p, palette, point):
    """p (H, W, 3) in [0, 1] -> the palette's colours."""
    grey = light_of(p)
    if palette == "pastel":
        return mix(saturate(p, point.uniform(0.5, 0.9)), 1, point.uniform(0.4, 0.6))
    if palette == "neon":
        return np.clip((p - grey) * point.uniform(2, 3.2) + 0.15 + grey * 0.8, 0, 1)
    if palette == "sepia":
        tones = np.float32([(0.2, 0.1, 0.04), (0.62, 0.44, 0.26), (0.98, 0.9, 0.74)])
        return ramp(grey, tones * point.uniform(0.9, 1.1, (1, 3)))
    if palette == "grey":
        return np.repeat(np.clip(grey, 0, 1) ** point.uniform(0.7, 1.4), 3, -1)
    dark_name, light_name = palette.split(" and ")
    dark = near(dark_name, point)
    light = near(light_name, point)
    low, high = np.percentile(grey, (4, 96))
    return ramp(np.clip((grey - low) / max(high - low, 0.15), 0, 1), [dark, light])


def make_ground(ground, size, point, rng):
    """A background, float32 (size, size, 3)."""
    if ground == "white":
        return np.ones((size, size, 3), np.float32)
    if ground == "paper":
        fibres = 0.88 + point.uniform(0.08, 0.25) * noise(size, point.uniform(1, 2), rng)
        fibres = fibres + 0.06 * noise(size, 20, rng)
        tint = np.float32([0.93, 0.88, 0.78]) * point.uniform(0.94, 1.06, 3)
        return np.float32(tint * fibres)
    if ground in HUES:
        return np.broadcast_to(near(ground, point), (size, size, 3))
    first, _, second, kind = ground.split(" ")
    x, y = coordinates(size)
    if kind == "gradient":
        angle = np.pi / 2 + point.choice([0, point.uniform(-np.pi, np.pi)])
        t = 0.5 + ((x - 32) * np.cos(angle) + (y - 32) * np.sin(angle)) / 64
    elif kind == "stripes":
        angle = point.uniform(0, np.pi)
        pitch = point.uniform(7, 16)
        t = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / pitch) > 0
    else:
        pitch = point.uniform(7, 14)
        radius = pitch * point.uniform(0.2, 0.4)
        t = np.hypot(x % pitch - pitch / 2, y % pitch - pitch / 2) < radius
    if kind != "gradient":
        t = t * point.uniform(0.4, 1)
    return mix(near(first, point), near(second, point), np.clip(t, 0, 1)).astype(np.float32)


# --------------------------------------------------------------------------------------------------
# Media: (picture, mask of the object, point, rng) -> picture. They change the background too

def flat(p, a, point, rng):
    steps = point.choice([2, 3, 4])
    return np.round(blur(p, point.uniform(0.5, 1)) * steps) / steps


def watercolor(p, a, point, rng):
    size = len(p)
    blots = noise(size, point.uniform(8, 16), rng) + 0.6 * noise(size, 4, rng) - 0.8
    rim = np.abs(blur(a, 1.6) - a) * point.uniform(0.3, 0.8)             # pigment gathers there
    pale = point.uniform(0.2, 0.4) + point.uniform(0.3, 0.6) * blots
    x, y = coordinates(size)
    reach = point.uniform(0, 3)
    wander = (noise(size, 9, rng) - 0.5) * reach
    flowed = blur(look_up(p, x + wander, y - wander), point.uniform(0.6, 1.4))
    return mix(flowed, 1, np.clip(pale, 0, 0.8)) - rim


def oil_painting(p, a, point, rng):
    size = len(p)
    x, y = coordinates(size)
    angle = point.uniform(0, np.pi) + noise(size, 20, rng) * point.uniform(1, 4)
    small = to_image(p).resize((min(64, size),) * 2, Image.BOX).filter(ImageFilter.MedianFilter(5))
    daubs = from_image(small.resize((size, size), Image.BICUBIC))
    bristle = np.sin((x * np.cos(angle) + y * np.sin(angle)) * point.uniform(1.2, 2))
    bristle = bristle * noise(size, 4, rng)
    thick = noise(size, point.uniform(3.5, 6), rng)          # ridges of paint, lit from one side
    across, down = slopes(thick * np.float32(size / 64))
    ridges = point.uniform(0.4, 1) * (across + down)
    vivid = saturate(daubs, point.uniform(1.1, 1.4))
    return vivid * (0.95 + point.uniform(0.06, 0.18) * bristle) + ridges


def kid_crayon(p, a, point, rng):
    size = len(p)
    x, y = coordinates(size)
    angle = point.uniform(0, np.pi)
    pitch = point.uniform(3.5, 6)
    along = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / pitch
    scribble = np.sin(along + 9 * noise(size, 14, rng)) * 0.3
    bare = scribble + noise(size, 1.5, rng) - point.uniform(0.4, 0.65)   # paper between strokes
    return mix(saturate(p, point.uniform(1.1, 1.5)), 1, np.clip(2.5 * bare, 0, 0.9))


def pencil_hatching(p, a, point, rng):
    x, y = coordinates(len(p))
    dark = 1 - light_of(p)
    angle = point.uniform(0.5, 1.1)
    pitch = point.uniform(2.4, 3.4)
    one = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / pitch)
    two = np.sin((x * np.cos(angle) - y * np.sin(angle)) * 2 * np.pi / pitch)
    ink = np.clip((dark - 0.12 - 0.25 * (one + 1) / 2) * 4, 0, 1) * (one > -0.2)
    ink = ink + (dark > 0.6) * (two > 0) * 0.6
    return mix(mix(p, 1, point.uniform(0.6, 0.95)), p * 0.35, np.clip(ink, 0, 1))


def halftone(p, a, point, rng):
    x, y = coordinates(len(p))
    angle = point.uniform(0.5, 1.1)
    pitch = point.uniform(3, 5.5)
    u = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / pitch
    v = (x * np.sin(angle) - y * np.cos(angle)) * 2 * np.pi / pitch
    screen = (np.cos(u) + np.cos(v)) / 4 + 0.5
    return np.where(screen > light_of(p) * 0.95, p * 0.75, mix(p, 1, point.uniform(0.6, 0.9)))


def mosaic(p, a, point, rng):
    size = len(p)
    x, y = coordinates(size)
    width = int(point.choice([3, 4, 5]))
    tile = look_up(blur(p, width / 4), (x // width + 0.5) * width, (y // width + 0.5) * width)
    tile = tile * (0.85 + 0.3 * noise(size, 4, rng))
    joint = ((x % width < 1) | (y % width < 1)) * point.uniform(0.5, 0.9)
    return mix(tile, point.choice([0.25, 0.25, 0.85]), joint)


def stained_glass(p, a, point, rng):
    size = len(p)
    x, y, _, border = cells(size, point.uniform(7, 10), rng)
    side = (a > 0.5).astype(np.float64)              # the contour cuts panes in two
    # a number for each pane: its seed point, to a quarter of a unit, and its side of the contour
    index = (np.floor(x * 4) * 1024 + np.floor(y * 4) * 2 + side)[..., 0]
    _, pane = np.unique(index, return_inverse=True)
    pane = pane.reshape(size, size)
    count = np.bincount(pane.ravel())[:, None]
    total = np.stack([np.bincount(pane.ravel(), p[..., i].ravel()) for i in range(3)], 1)
    glass = mix((total / count).astype(np.float32)[pane], p, point.uniform(0.2, 0.5))
    glass = glass * (0.85 + 0.35 * noise(size, 6, rng))
    contour = spread(a, 1) - a > 0.5
    return np.where((border < point.uniform(0.8, 1.4)) | contour, 0.06, saturate(glass, 1.5))


def pixel_art(p, a, point, rng):
    size = len(p)
    side = 64 // int(point.choice([3, 4, 4, 5]))
    small = to_image(p).resize((side, side), Image.BOX)
    big = from_image(small.resize((size, size), Image.NEAREST))
    steps = point.choice([4, 5, 6])
    return np.round(big * steps) / steps


def woodcut(p, a, point, rng):
    x, y = coordinates(len(p))
    pitch = point.uniform(3, 5)
    slant = point.uniform(-0.5, 0.5)
    wobble = point.uniform(3, 8) * noise(len(p), 20, rng)
    carved = np.sin(y * 2 * np.pi / pitch + x * slant + wobble) * 0.45 + 0.5
    light = light_of(blur(p, 0.7))
    contour = (spread(a, 1) - a > 0.5) | (edges(p, a) > 0.5)
    return np.where((light * 1.15 < carved) | contour, p * 0.15, mix(p, 1, point.uniform(0.4, 0.8)))


def embroidery(p, a, point, rng):
    x, y = coordinates(len(p))
    pitch = point.uniform(3, 5)
    row = np.floor(y / pitch)
    thread = np.sin(x * point.uniform(1.8, 2.5) + y * point.uniform(0.7, 1.3) + row * 2)
    groove = np.where(y % pitch < 0.9, 0.75, 1)
    return blur(p, 0.6) * (0.87 + point.uniform(0.15, 0.35) * thread) * groove


def chalk(p, a, point, rng):
    size = len(p)
    x, y = coordinates(size)
    along = (x + y) * point.uniform(1, 1.6) + 3 * noise(size, 12, rng)
    grain = noise(size, 1.5, rng) + 0.25 * np.sin(along)
    slate = np.float32([0.15, 0.2, 0.18]) * point.uniform(0.3, 1.3, 3)
    slate = slate * (0.9 + 0.2 * noise(size, 16, rng))
    cover = np.clip((grain - point.uniform(0, 0.2)) * 1.8, 0.1, 0.95) * np.maximum(a, 0.06)
    return mix(slate, mix(p, 1, point.uniform(0.1, 0.4)), cover)


def wooden(p, a, point, rng):
    size = len(p)
    x, y = coordinates(size)
    along = y * point.uniform(0.6, 1.3) + 5 * noise(size, 24, rng) + 0.05 * x
    rings = np.sin(along) * 0.5 + 0.5
    woods = np.float32([(0.2, 0.1, 0.04), (0.55, 0.32, 0.14), (0.82, 0.6, 0.34), (0.93, 0.8, 0.58)])
    tone = ramp(np.clip(light_of(p) * 0.8 + 0.2 * rings, 0, 1),
                woods * point.uniform(0.85, 1.15, (1, 3)))
    return mix(tone, p, point.uniform(0, 0.25)) * (0.82 + point.uniform(0.12, 0.3) * rings)


def golden(p, a, point, rng):
    shine = light_of(blur(p, 1)) * point.uniform(1.2, 2) + noise(len(p), 14, rng) * 0.5
    golds = np.float32([(1, 0.97, 0.75), (0.95, 0.76, 0.25), (0.72, 0.48, 0.08), (0.36, 0.2, 0.02)])
    metal = ramp(np.abs(shine % 1 * 2 - 1), golds * point.uniform(0.9, 1.1, (1, 3)))
    return mix(p, metal, np.maximum(a, 0.0))


def glowing(p, a, point, rng):
    lamp = mix(light_of(p), p, point.uniform(1.2, 2)) * a
    dark = np.float32([0.03, 0.03, 0.1]) * point.uniform(0, 1.5)
    wide = blur(np.clip(lamp, 0, 1), point.uniform(3, 6))
    return dark + 0.75 * lamp + point.uniform(0.7, 1.3) * wide


MEDIA = {"flat": flat, "watercolor": watercolor, "oil painting": oil_painting,
         "kid crayon": kid_crayon, "pencil hatching": pencil_hatching, "halftone": halftone,
         "mosaic": mosaic, "stained glass": stained_glass, "pixel art": pixel_art,
         "woodcut": woodcut, "embroidery": embroidery, "chalk": chalk, "wooden": wooden,
         "golden": golden, "glowing": glowing}


# --------------------------------------------------------------------------------------------------
# The whole

def apply(style, rgba, rng):
    """Paint `rgba` (H, W, 4) uint8, a drawing with straight alpha, in a style -> (H, W, 3) uint8.

    What characterises the style follows from its words and its seed; `rng`, a numpy Generator,
    decides where noise lies, which differs between two pictures of one style.
    """
    point = np.random.default_rng(style.seed)
    if style.free:
        return free_styles.paint(rgba, point, rng)
    drawing = planes(rgba)
    p, a = drawing[..., :3], drawing[..., 3:]
    is_line_drawing = style.line == "line drawing"
    lines = edges(p, a, point.uniform(4, 6)) if is_line_drawing else None
    if style.palette:
        mean = (p * a).sum((0, 1)) / max(a.sum(), 1)
        inside = np.where(a > 0.5, p, mean)          # the background does not set the range
        p = recolour(inside, style.palette, point)
    if style.light == "bevelled 3d":
        p = bevelled(p, a, point)
    ground = make_ground(style.ground, len(p), point, rng)
    if style.light == "drop shadow":
        right, down = point.uniform(-5, 5), point.uniform(2, 6)
        shadow = shifted(blur(a, point.uniform(0.8, 2.2)), right, down)
        ground = ground * (1 - point.uniform(0.4, 0.8) * shadow)
    if style.light == "sticker":
        width = point.uniform(2.2, 4)
        ground = mix(mix(ground, 0.35, spread(a, width + 1) * 0.6), 1, spread(a, width))
    if is_line_drawing:                              # lines without any fill
        ink = near("black", point)
        if " and " in style.palette:
            ink = near(style.palette.split(" and ")[0], point)
        picture = mix(ground, ink, lines)
        a = lines
    else:
        picture = mix(ground, p, a)
    if style.medium:
        painted = MEDIA[style.medium](np.clip(picture, 0, 1), a, point, rng)
        strength = min(1, point.uniform(0.6, 1.8))   # at part strength one time in three
        picture = mix(picture, np.clip(painted, 0, 1), strength)
    if style.line.endswith("outline"):
        picture = outlined(picture, drawing, style.line, point)
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)


def bevelled(p, a, point):
    """The drawing as a relief that is lit from one side."""
    height = blur(a, point.uniform(1.8, 3.5)) + 0.25 * light_of(blur(p, 1))
    across, down = slopes(height)
    angle = point.uniform(0, np.pi / 2)              # from above and the left, more or less
    lit = across * np.cos(angle) + down * np.sin(angle)
    return np.clip(p * 0.95 + point.uniform(1.6, 3) * np.float32(len(p) / 64) * lit, 0, 1)


def outlined(picture, drawing, line, point):
    """The picture with the drawing's contours in the colour and width that `line` says."""
    width, hue, _ = line.split(" ")
    p, a = drawing[..., :3], drawing[..., 3:]
    if width == "thick":
        reach = point.uniform(1.7, 2.5)
        inner = 1.0
    else:
        reach = point.uniform(0.8, 1.2)
        inner = 0.6
    rim = np.clip(spread(a, reach) - a, 0, 1)
    rim = np.maximum(rim, edges(p, a, point.uniform(2, 4)) * inner)
    return mix(picture, near(hue, point), rim)
