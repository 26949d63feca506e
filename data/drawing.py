"""What scenes do with a drawing: place it, bend it, paint it in one colour.

Drawings are uint8 (h, h, 4) with straight alpha. Places and sizes are multiples of 1/64 of the
side, and the random numbers do not depend on the size in pixels.
"""

import functools

import numpy as np
from PIL import Image

COLOURS = {"red": (206, 38, 42), "orange": (244, 128, 32), "yellow": (250, 205, 40),
           "green": (52, 150, 62), "blue": (50, 108, 220), "purple": (116, 54, 156),
           "pink": (250, 150, 190), "brown": (112, 68, 36), "black": (40, 40, 44),
           "white": (250, 250, 250), "grey": (140, 140, 145)}
LUMINANCE = np.float32([0.3, 0.59, 0.11])


# ---------------------------------------------------------------------------------------------
# Places

def scaled(rgba, sides, box=None):
    """A drawing, or its part `box` (left, top, right, bottom, in shares of its side), at (w, h).

    Scaled while its colour is multiplied by alpha: the invisible colour around it cannot leak in.
    """
    box = None if box is None else tuple(v * len(rgba) for v in box)
    image = Image.fromarray(rgba).convert("RGBa").resize(sides, Image.BICUBIC, box)
    return np.asarray(image.convert("RGBA"))


def inked(image):
    """What a Pillow image with alpha covers: left, top, right, bottom as shares of its side."""
    ink = np.asarray(image.getchannel(3)) > 23
    if not ink.any():
        return 0.0, 0.0, 1.0, 1.0
    rows = np.flatnonzero(ink.any(1))
    columns = np.flatnonzero(ink.any(0))
    top, bottom = rows[[0, -1]]
    left, right = columns[[0, -1]]
    return tuple(float(v) / len(ink) for v in (left, top, right + 1, bottom + 1))


def place_one(rgba, size, rng, smallest=None):
    """The drawing at a random place and scale in a frame (size, size, 4).

    smallest: the least side of the drawing, as a share of the frame's; None: it fills the frame.
    """
    if not smallest:
        return rgba if len(rgba) == size else scaled(rgba, (size, size))
    side = round(64 * (smallest + (1 - smallest) * rng.random()))
    x = int(rng.random() * (65 - side)) * size // 64
    y = int(rng.random() * (65 - side)) * size // 64
    side = max(1, side * size // 64)
    frame = np.zeros((size, size, 4), np.uint8)
    frame[y:y + side, x:x + side] = scaled(rgba, (side, side))
    return frame


def place_anywhere(rgba, rng, smallest=0.5, largest=1.2):
    """The drawing, scaled by `smallest` to `largest` and placed at random; overhang is cut off."""
    size = len(rgba)
    side = round(64 * (smallest + (largest - smallest) * rng.random()))
    x = round((64 - side) * rng.random())                                # negative: cut there
    y = round((64 - side) * rng.random())
    x = int(x * size / 64)
    y = int(y * size / 64)
    side = int(side * size / 64)
    placed = scaled(rgba, (side, side))
    frame = np.zeros_like(rgba)
    inside = placed[max(0, -y):size - y, max(0, -x):size - x]
    height, width = inside.shape[:2]
    frame[max(0, y):max(0, y) + height, max(0, x):max(0, x) + width] = inside
    return frame


CELLS = {2: [(1, 12), (33, 12)], 3: [(17, 1), (1, 33), (33, 33)],         # left, top in 64ths
         4: [(1, 1), (33, 1), (1, 33), (33, 33)]}


def layout(boxes, rng):
    """Places for two to four drawings: [(x, y, w, h)] in 64ths of the side.

    boxes: the part of its tile that each drawing covers. Two stand side by side, three in a
    triangle, four in a square; each keeps to a cell of its own, in which its size and place vary a
    little.
    """
    count = len(boxes)
    upside_down = rng.random() < 0.5
    cell_width = 30
    cell_height = 40 if count == 2 else 30
    places = []
    for (left, top), (x0, y0, x1, y1) in zip(CELLS[count], boxes):
        scale = min(cell_width / (x1 - x0), cell_height / (y1 - y0))
        scale *= 0.88 + 0.12 * rng.random()
        width, height = max(1, int((x1 - x0) * scale)), max(1, int((y1 - y0) * scale))
        if count == 3 and upside_down:
            top = 34 - top
        x = left + round((cell_width - width) * rng.random())
        y = top + round((cell_height - height) * (0.3 + 0.4 * rng.random()))
        places.append((x, y, width, height))
    return places


def bend(rgba, rng, amount):
    """The drawing turned, sheared, stretched and, half the time, mirrored.

    amount: the standard deviation of the angle (in radians), of the shear, and of the log of each
    stretch. The drawing is made smaller where its frame would stick out by more than a tenth.
    """
    turn, shear, *stretch = rng.normal(0, amount, 4)
    mirror = 1
    if rng.random() < 0.5:
        mirror = -1
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = matrix @ [[1, shear], [0, 1]] @ np.diag(np.exp(stretch)) @ np.diag([mirror, 1])
    matrix /= max(1, 0.9 * np.abs(matrix).sum(1).max())
    back = np.linalg.inv(matrix)                             # where each pixel comes from
    centre = len(rgba) / 2
    (a, b), (c, d) = back
    x, y = centre - back @ [centre, centre]
    image = Image.fromarray(rgba).convert("RGBa")
    image = image.transform(image.size, Image.AFFINE, (a, b, x, c, d, y), Image.BICUBIC)
    return np.asarray(image.convert("RGBA"))


# ---------------------------------------------------------------------------------------------
# Colours

@functools.lru_cache(None)
def ramp(colour, median):
    """A colour for each luminance from 0 to 255: uint8 (256, 3).

    `median`, the drawing's median luminance, is mapped to (nearly) the colour itself, darker values
    towards black, and lighter ones to a tint of it, so that white walls are coloured too.
    """
    hue = np.float32(COLOURS[colour])
    luminance = hue @ LUMINANCE
    if colour == "black":
        tones = 0, 40, 110
    elif colour == "white":
        tones = 50, 228, 252
    else:
        tone = min(200, 0.7 * luminance + 0.3 * median)
        tones = 0, tone, max(tone + 30, min(235, tone + 90))
    grey = np.interp(np.arange(256), [0, median, 255], tones)[:, None]
    if colour in ("black", "white"):
        return np.repeat(grey, 3, 1).round().astype(np.uint8)
    tint = hue + (255 - hue) * ((grey - luminance) / (255 - luminance))
    shade = hue * (grey / luminance)
    return np.where(grey <= luminance, shade, tint).round().clip(0, 255).astype(np.uint8)


def middle(rgba):
    """The median luminance of a drawing, clipped to 30 .. 235.

    Black lines are not counted, unless most of the drawing is black.
    """
    grey = np.asarray(Image.fromarray(rgba).convert("L"))[rgba[..., 3] > 128]
    light = grey[grey > 50]
    if 2 * len(light) > len(grey):
        grey = light
    if not len(grey):
        return 128
    return min(235, max(30, int(np.sort(grey)[len(grey) // 2])))


def recolour(rgba, colour, median):
    """The drawing in shades of one colour. median: its median luminance, from `middle(rgba)`."""
    painted = np.empty_like(rgba)
    painted[..., :3] = ramp(colour, median)[np.asarray(Image.fromarray(rgba).convert("L"))]
    painted[..., 3] = rgba[..., 3]
    return painted
