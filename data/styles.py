"""A space of styles: what a drawing looks like, as a few attributes that combine freely.

A style is five attributes; each is drawn afresh for every training example and most may be empty,
which means "as drawn". Its phrase is composed of its attributes' words, so phrases combine as the
styles do:

    Style(palette="blue and gold", line="thick red outline", medium="watercolor", ground="black")
    "blue and gold watercolor with thick red outline on black"

    python -m data.pictures        # draws data/contact_sheet.png and examples/

numpy and Pillow only. Images are float (H, W, 3) in [0, 1] inside, uint8 outside; lengths are in
pixels of a 64 px picture and grow with the picture.
"""

import functools
import zlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

HUES = {name: np.array(rgb, np.float32) / 255 for name, rgb in {
    "black": (18, 18, 20), "white": (255, 255, 255), "grey": (140, 140, 145), "red": (206, 38, 42),
    "orange": (244, 128, 32), "gold": (242, 190, 50), "green": (52, 150, 62),
    "teal": (24, 140, 140), "blue": (50, 108, 220), "navy": (24, 34, 92), "purple": (116, 54, 156),
    "pink": (244, 140, 180), "brown": (112, 68, 36), "cream": (250, 236, 204)}.items()}
DARK = ("black", "navy", "purple", "brown", "green", "teal", "red", "blue")
LIGHT = ("white", "cream", "gold", "pink", "orange", "grey")
GROUND_HUES = tuple(HUES)[2:]           # of backgrounds; white and black stand there by themselves

ATTRIBUTES = {
    "palette": [f"{d} and {l}" for d in DARK for l in LIGHT] + ["pastel", "neon", "sepia", "grey"],
    "line": [f"{w} {h} outline" for w in ("thin", "thick")
             for h in ("black", "white", "red", "blue", "brown")] + ["line drawing"],
    "medium": ["flat", "watercolor", "oil painting", "kid crayon", "pencil hatching", "halftone",
               "mosaic", "stained glass", "pixel art", "woodcut", "embroidery", "chalk", "wooden",
               "golden", "glowing"],
    "ground": ["white", "black", "paper"] + list(GROUND_HUES)
              + [f"{a} and {b} {kind}" for kind in ("gradient", "stripes", "dots")
                 for a, b in zip(GROUND_HUES, GROUND_HUES[5:] + GROUND_HUES[:5])],
    "light": ["bevelled 3d", "drop shadow", "sticker"],
}
HELD_OUT = {"medium": ("stained glass", "glowing"), "light": ("sticker",)}


@dataclass(frozen=True)
class Style:
    """One point of the space; "" is "as drawn". ground: the background."""
    palette: str = ""
    line: str = ""
    medium: str = ""
    ground: str = "white"
    light: str = ""


UNNAMED = ("", "white")      # no attribute, and the background that goes without saying


def named(style):
    """{attribute: value} of what the style names."""
    return {k: v for k, v in vars(style).items() if v not in UNNAMED}


def has_new_words(style):
    """True where a value is named that the base never sees, in whatever company."""
    return any(v in HELD_OUT.get(k, ()) for k, v in named(style).items())


def is_held_out(style):
    """True for what the base never sees: two media, one light, a fifth of all attribute pairs.

    Two named values are a held-out pair where the CRC-32 of their words divides by 5, whatever the
    other attributes are. A white background is everywhere and counts in no pair.
    """
    if has_new_words(style):
        return True
    values = list(named(style).items())
    return any(is_pair_held_out(a, b) for i, a in enumerate(values) for b in values[i + 1:])


@functools.lru_cache(None)
def is_pair_held_out(a, b):
    """a, b: (attribute, value), in the order of ATTRIBUTES."""
    return zlib.crc32(f"{a[0]}={a[1]}|{b[0]}={b[1]}".encode()) % 5 == 0


PLAIN = 0.35                 # share of the drawings that stay as they are, on white
SILENT = 0.8, 0.25           # chance that no style is named: of a drawing as it is, of the others
CHANCE = {"palette": 0.45, "line": 0.25, "medium": 0.45, "ground": 0.6, "light": 0.2}    # of each


def sample(rng, held_out=False, plain=PLAIN):
    """A random Style, held out of training or not, as asked.

    rng: numpy Generator. plain: share of Style(), the drawing as it is.
    """
    if not held_out and rng.random() < plain:
        return Style()
    while True:
        chosen = [k for k in ATTRIBUTES if rng.random() < CHANCE[k]]
        for _ in range(50):             # only the values anew: else rejection favours plain styles
            style = Style(**{k: ATTRIBUTES[k][int(rng.random() * len(ATTRIBUTES[k]))]
                             for k in chosen})
            if is_held_out(style) == held_out:
                return style


def keep_colours(style, colours=()):
    """The style without what hides the colours of a drawing.

    Palettes go, lines alone, woodcut, wood and gold, and a background in one of the `colours`, on
    which the drawing would not be seen.
    """
    colours = {"gold" if colour == "yellow" else colour for colour in colours}
    return replace(style, palette="", line="" if style.line == "line drawing" else style.line,
                   medium="" if style.medium in ("woodcut", "wooden", "golden") else style.medium,
                   ground="white" if colours & set(style.ground.split(" ")) else style.ground)


def phrase(style, icon_style="", rng=None):
    """The style in words; `icon_style`, the icon set's own, stands where no medium does.

    With rng, as captions have it: "" for four in five of the drawings as they are and one in four
    of the others, else each attribute is left out one time in seven. A white background goes
    without saying.
    """
    if rng is not None and rng.random() < SILENT[style != Style()]:
        return ""
    said = lambda words: words if words and (rng is None or rng.random() > 1 / 7) else ""
    outline = style.line if style.line != "line drawing" else ""
    manner = [said(style.palette), said(style.medium or icon_style),
              said("line drawing" if style.line and not outline else "")]
    extras = [words for words in (said(outline), said(style.light)) if words]
    ground = said(style.ground if style.ground != "white" else "")
    words = " ".join(w for w in manner if w)
    words += (" with " if words else "") + " and ".join(extras) if extras else ""
    return (words + (f" on {ground}" if words else f"{ground} ground") if ground else words).strip()


# ---------------------------------------------------------------------------------------------
# Tools: p picture (H, W, 3), a alpha (H, W, 1), u pixels of one 64th of the side

def blur(x, radius):
    """Gaussian blur of (H, W) or (H, W, C) in [0, 1]."""
    image = Image.fromarray((np.squeeze(x) * 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(radius))
    return planes(np.asarray(image).reshape(x.shape))


def spread(a, pixels):
    """Alpha grown by `pixels` on every side."""
    image = Image.fromarray((a[..., 0] * 255).astype(np.uint8))
    image = image.filter(ImageFilter.MaxFilter(2 * max(1, round(pixels)) + 1))
    image = image.filter(ImageFilter.GaussianBlur(0.4))
    return np.asarray(image, np.float32)[..., None] / 255


def planes(x):
    """uint8 (H, W, C) -> float32 (H, W, C) in [0, 1], one channel after the other in memory.

    What numpy then makes of it lies the same way: its inner loops run along rows, not over three
    colours.
    """
    x = np.ascontiguousarray(x.transpose(2, 0, 1), np.float32)
    return x.transpose(1, 2, 0) / np.float32(255)


def light_of(p):
    """Luminance (H, W, 1)."""
    red, green, blue = p[..., :1], p[..., 1:2], p[..., 2:]
    return np.float32(0.3) * red + np.float32(0.59) * green + np.float32(0.11) * blue


def mix(p, q, t):
    return p + (q - p) * t


@functools.lru_cache(None)
def noise(size, scale, kind):
    """A fixed noise (size, size, 1) in [0, 1] with features of `scale` / 64 of the side."""
    rng = np.random.default_rng((kind, int(scale * 10)))
    n = max(2, round(64 / scale))                            # the same at every size
    x = Image.fromarray((rng.random((n, n)) * 255).astype(np.uint8))
    x = np.asarray(x.resize((size, size), Image.BICUBIC), np.float32)
    return ((x - x.min()) / (x.max() - x.min()))[..., None]


@functools.lru_cache(None)
def coordinates(size):
    """x, y (size, size, 1) of the pixels' middles, in 64ths of the side: alike at every size."""
    y, x = (np.mgrid[:size, :size].astype(np.float32)[..., None] + 0.5) * (64 / size)
    return x, y


@functools.lru_cache(None)
def cells(size, kind):
    """A fixed Voronoi pattern of 64 panes, one in each square of 8.

    -> (size, size) pane numbers, and the borders between them (size, size, 1).
    """
    rng = np.random.default_rng((kind, 64))
    x, y = coordinates(size)
    row, column = np.divmod(np.arange(64), 8)
    seeds = (np.stack([column, row], 1) + rng.uniform(0.15, 0.85, (64, 2))).astype(np.float32) * 8
    distance = np.hypot(x - seeds[:, 0], y - seeds[:, 1])    # (size, size, 64)
    near = np.partition(distance, 1, axis=-1)
    return distance.argmin(-1), (near[..., 1:2] - near[..., :1]) < 1.0


def slopes(x, step=1):
    """Half the differences of x (H, W, C) down and across, `step` pixels on; 0 at the rim."""
    dy, dx = np.zeros_like(x), np.zeros_like(x)
    dy[step:-step] = (x[2 * step:] - x[:-2 * step]) / 2
    dx[:, step:-step] = (x[:, 2 * step:] - x[:, :-2 * step]) / 2
    return dy, dx


def ramp(t, colours):
    """t (H, W, 1) in [0, 1] along a list of colours -> (H, W, 3)."""
    stops = np.linspace(0, 1, len(colours))
    channels = [np.interp(t[..., 0], stops, [c[i] for c in colours]) for i in range(3)]
    return np.stack(channels).astype(np.float32).transpose(1, 2, 0)   # as `planes`


# ---------------------------------------------------------------------------------------------
# Media: (p, a, size, kind) -> p. They work on drawing and background alike

def flat(p, a, size, kind):
    return np.round(blur(p, size / 80) * 3) / 3


def watercolor(p, a, size, kind):
    blots = noise(size, 12, kind) + 0.6 * noise(size, 4, kind + 1) - 0.8
    rim = np.abs(blur(a, size / 40) - a) * 0.55              # pigment gathers at the edges
    return mix(blur(p, size / 64), 1, np.clip(0.32 + 0.5 * blots, 0, 0.8)) - rim


def oil_painting(p, a, size, kind):
    x, y = coordinates(size)
    angle = noise(size, 20, kind) * 4
    small = Image.fromarray((p * 255).astype(np.uint8))      # daubs of 5 / 64 of the side
    small = small.resize((min(64, size),) * 2, Image.BOX).filter(ImageFilter.MedianFilter(5))
    daubs = planes(np.asarray(small.resize((size, size), Image.BICUBIC)))
    bristle = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 1.6) * noise(size, 4, kind)
    thick = noise(size, 5, kind + 1)                         # ridges of paint, lit from one side
    dy, dx = slopes(thick * np.float32(size / 64))
    return mix(light_of(daubs), daubs, 1.25) * (0.95 + 0.12 * bristle) + 0.8 * (dx + dy)


def kid_crayon(p, a, size, kind):
    x, y = coordinates(size)
    scribble = np.sin((x + 0.7 * y) * 1.1 + 9 * noise(size, 14, kind)) * 0.3
    bare = scribble + noise(size, 1.5, kind) - 0.5           # paper between the strokes of wax
    bare = np.clip(2.5 * bare, 0, 0.9)
    return mix(mix(light_of(p), p, 1.3), 1, bare)


def pencil_hatching(p, a, size, kind):
    x, y = coordinates(size)
    dark = 1 - light_of(p)
    one, two = np.sin((x + y) * 1.7), np.sin((x - y) * 1.7)
    ink = np.clip((dark - 0.12 - 0.25 * (one + 1) / 2) * 4, 0, 1) * (one > -0.2)
    ink = ink + (dark > 0.6) * (two > 0) * 0.6
    return mix(mix(p, 1, 0.75), p * 0.35, np.clip(ink, 0, 1))


def halftone(p, a, size, kind):
    x, y = coordinates(size)
    screen = (np.cos((x + y) * 1.1) + np.cos((x - y) * 1.1)) / 4 + 0.5
    return np.where(screen > light_of(p) * 0.95, p * 0.75, mix(p, 1, 0.8))


def mosaic(p, a, size, kind):
    tile = max(2, size * 4 // 64)
    small = Image.fromarray((p * 255).astype(np.uint8)).resize((size // tile,) * 2, Image.BOX)
    x, y = coordinates(size)
    big = np.asarray(small.resize((size, size), Image.NEAREST), np.float32) / 255
    big = big * (0.85 + 0.3 * noise(size, 4, kind))
    step = tile * 64 / size
    return mix(big, 0.25, ((x % step < 1) | (y % step < 1)) * 0.8)


def stained_glass(p, a, size, kind):
    index, lead = cells(size, kind)
    index = index + 64 * (a[..., 0] > 0.5)               # the contour cuts panes in two
    count = np.bincount(index.ravel(), minlength=128)[:, None]
    total = np.stack([np.bincount(index.ravel(), p[..., i].ravel(), 128) for i in range(3)], 1)
    mean = (total / np.maximum(count, 1)).astype(np.float32)
    glass = mix(mean[index], p, 0.35) * (0.85 + 0.35 * noise(size, 6, kind))
    contour = spread(a, size / 64) - a > 0.5
    return np.where(lead | contour, 0.06, mix(light_of(glass), glass, 1.5))


def pixel_art(p, a, size, kind):
    side = size // max(1, size // 16)
    small = Image.fromarray((p * 255).astype(np.uint8)).resize((side, side), Image.BOX)
    big = np.asarray(small.resize((size, size), Image.NEAREST), np.float32)
    return np.round(big / 255 * 5) / 5


def woodcut(p, a, size, kind):
    x, y = coordinates(size)
    carved = np.sin(y * 1.6 + x * 0.25 + 6 * noise(size, 20, kind)) * 0.45 + 0.5
    light = light_of(blur(p, size / 90))
    contour = (spread(a, size / 64) - a > 0.5) | (edges(p, a) > 0.5)
    return np.where((light * 1.15 < carved) | contour, p * 0.15, mix(p, 1, 0.6))


def embroidery(p, a, size, kind):
    x, y = coordinates(size)
    rows = np.floor(y / 4)
    thread = np.sin(x * 2.1 + y * 1.05 + rows * 2) * 0.5 + 0.5
    return blur(p, size / 100) * (0.62 + 0.5 * thread) * np.where(y % 4 < 0.9, 0.75, 1)


def chalk(p, a, size, kind):
    x, y = coordinates(size)
    grain = noise(size, 1.5, kind) + 0.25 * np.sin((x + y) * 1.3 + 3 * noise(size, 12, kind))
    slate = np.float32([0.15, 0.2, 0.18]) * (0.9 + 0.2 * noise(size, 16, kind))
    cover = np.clip((grain - 0.1) * 1.8, 0.1, 0.95) * np.maximum(a, 0.06)
    return mix(slate, mix(p, 1, 0.25), cover)


def wooden(p, a, size, kind):
    x, y = coordinates(size)
    rings = np.sin(y * 0.9 + 5 * noise(size, 24, kind) + 0.05 * x) * 0.5 + 0.5
    woods = [(0.2, 0.1, 0.04), (0.55, 0.32, 0.14), (0.82, 0.6, 0.34), (0.93, 0.8, 0.58)]
    tone = ramp(light_of(p) * 0.8 + 0.2 * rings, woods)
    return mix(tone, p, 0.12) * (0.82 + 0.22 * rings)


def golden(p, a, size, kind):
    shine = light_of(blur(p, size / 64)) * 1.6 + noise(size, 14, kind) * 0.5
    golds = [(1, 0.97, 0.75), (0.95, 0.76, 0.25), (0.72, 0.48, 0.08), (0.36, 0.2, 0.02)]
    metal = ramp(np.abs(shine % 1 * 2 - 1), golds)
    return mix(p, metal, np.maximum(a, 0.0))


def glowing(p, a, size, kind):
    lamp = mix(light_of(p), p, 1.6) * a
    return np.float32([0.03, 0.03, 0.1]) + 0.75 * lamp + 1.1 * blur(np.clip(lamp, 0, 1), size / 16)


MEDIA = {name: globals()[name.replace(" ", "_")] for name in ATTRIBUTES["medium"]}


# ---------------------------------------------------------------------------------------------
# The rest of a style

def recolour(p, palette):
    """p (H, W, 3) in [0, 1] -> the palette's colours."""
    grey = light_of(p)
    if palette == "pastel":
        return mix(mix(grey, p, 0.7), 1, 0.5)
    if palette == "neon":
        return np.clip((p - grey) * 2.6 + 0.15 + grey * 0.8, 0, 1)
    if palette == "sepia":
        return ramp(grey, [(0.2, 0.1, 0.04), (0.62, 0.44, 0.26), (0.98, 0.9, 0.74)])
    if palette == "grey":
        return np.repeat(grey, 3, -1)
    dark, light = palette.split(" and ")
    low, high = np.percentile(grey, (4, 96))
    return ramp(np.clip((grey - low) / max(high - low, 0.15), 0, 1), [HUES[dark], HUES[light]])


@functools.lru_cache(256)
def make_ground(ground, size, kind):
    """A background, float32 (size, size, 3); kept, so never write into it."""
    if ground == "paper":
        fibres = 0.88 + 0.16 * noise(size, 1.5, kind) + 0.06 * noise(size, 20, kind)
        return np.float32([0.93, 0.88, 0.78]) * fibres
    if ground in HUES:
        return np.broadcast_to(HUES[ground], (size, size, 3))
    first, _, second, kind_of = ground.split(" ")
    x, y = coordinates(size)
    t = {"gradient": y / 64, "stripes": (np.sin((x + y) * 0.55) > 0) * 1.0,
         "dots": (np.hypot(x % 10 - 5, y % 10 - 5) < 2.8) * 1.0}[kind_of]
    t = np.moveaxis(np.repeat(np.moveaxis(t, -1, 0), 3, 0), 0, -1)   # lies as `planes` has it
    t = t * np.float32(1 if kind_of == "gradient" else 0.6)
    return mix(HUES[first], HUES[second], t).astype(np.float32)


def edges(p, a, strength=5):
    """Where colour or alpha change: (H, W, 1) in [0, 1]."""
    x = np.concatenate([p * a, a], -1)
    dy, dx = slopes(x, max(1, len(x) // 64))
    return np.clip(np.sqrt((dx * dx + dy * dy).sum(-1, keepdims=True)) * strength - 0.6, 0, 1)


def apply(style, rgba, rng):
    """Draw `rgba` (H, W, 4) uint8, a drawing with its alpha mask, in a style -> (H, W, 3) uint8."""
    size, kind = len(rgba), int(rng.integers(6))
    u = size / 64
    drawing = planes(rgba)
    p, a = drawing[..., :3], drawing[..., 3:]
    inner = edges(p, a) if style.line == "line drawing" else None
    if style.palette:
        mean = (p * a).sum((0, 1)) / max(a.sum(), 1)
        inside = np.where(a > 0.5, p, mean)              # the background does not set the range
        p = recolour(inside, style.palette)
    if style.light == "bevelled 3d":
        height = blur(a, 2.5 * u) + 0.25 * light_of(blur(p, u))
        dy, dx = slopes(height)
        p = np.clip(p * 0.95 + 1.6 * u * (dx + dy), 0, 1)
    ground = make_ground(style.ground, size, kind if style.ground == "paper" else 0)
    if style.light == "drop shadow":
        down, right = round(4 * u), round(3 * u)
        shadow = np.pad(blur(a, 1.5 * u), ((down, 0), (right, 0), (0, 0)))[:size, :size]
        ground = ground * (1 - 0.6 * shadow)
    if style.light == "sticker":
        rim = spread(a, 3 * u)
        ground = mix(mix(ground, 0.35, spread(a, 4 * u) * 0.6), 1, rim)
    if inner is not None:                                    # edges only, no fill
        ink = HUES[style.palette.split(" and ")[0]] if " and " in style.palette else HUES["black"]
        p, picture = ink, mix(ground, ink, inner)
    else:
        picture = mix(ground, p, a)
    if style.medium:
        mask = a if inner is None else inner
        picture = MEDIA[style.medium](np.clip(picture, 0, 1), mask, size, kind)
        picture = np.clip(picture, 0, 1)
    if style.line.endswith("outline"):
        width, hue, _ = style.line.split(" ")
        pixels, strength = (2, 1) if width == "thick" else (1, 0.6)
        rim = np.clip(spread(a, pixels * u) - a, 0, 1)
        rim = np.maximum(rim, edges(drawing[..., :3], a, 3) * strength)
        picture = mix(picture, HUES[hue], rim)
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
