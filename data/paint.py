"""Tools that styles are painted with: noise, blur, ramps of colour, relief, flow, cells.

Pictures are float32 (H, W, 3) in [0, 1] and masks float32 (H, W, 1). Lengths are in 64ths of the
side, and the random draws do not depend on the size, so the same generator gives the same picture
at 64 and at 128 pixels.
"""

import functools

import numpy as np
from PIL import Image, ImageFilter


def planes(x):
    """uint8 (H, W, C) -> float32 (H, W, C) in [0, 1], stored one channel after the other.

    The loops of numpy then run along rows instead of over three channels, which is faster. The
    results of arithmetic keep this layout.
    """
    x = np.ascontiguousarray(x.transpose(2, 0, 1), np.float32)
    return x.transpose(1, 2, 0) / np.float32(255)


def to_image(x):
    """float (H, W, C) in [0, 1] -> an 8-bit Pillow image."""
    x = (np.clip(x, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)


def from_image(image):
    """An 8-bit Pillow image -> float32 (H, W, C) in [0, 1]."""
    x = np.asarray(image)
    return planes(x[..., None] if x.ndim == 2 else x)


def mix(p, q, t):
    """Linear interpolation: p where t is 0, q where t is 1."""
    return p + (q - p) * t


def light_of(p):
    """Luminance (H, W, 1) of a picture."""
    red, green, blue = p[..., :1], p[..., 1:2], p[..., 2:]
    return np.float32(0.3) * red + np.float32(0.59) * green + np.float32(0.11) * blue


def saturate(p, amount):
    """Colours `amount` times as far from grey."""
    return mix(light_of(p), p, np.float32(amount))


@functools.lru_cache(None)
def coordinates(size):
    """x, y (size, size, 1): the middles of the pixels, in 64ths of the side."""
    y, x = (np.mgrid[:size, :size].astype(np.float32)[..., None] + 0.5) * np.float32(64 / size)
    return x, y


def noise(size, scale, rng):
    """Smooth noise (size, size, 1) from 0 to 1 with features of `scale`."""
    count = max(2, round(64 / scale))
    values = (rng.random((count, count)) * 255).astype(np.uint8)
    x = np.asarray(Image.fromarray(values).resize((size, size), Image.BICUBIC), np.float32)
    low, high = x.min(), x.max()
    return ((x - low) / max(high - low, 1))[..., None]


def blur(x, radius):
    """Gaussian blur of a picture or mask."""
    return from_image(to_image(x).filter(ImageFilter.GaussianBlur(radius * len(x) / 64)))


def spread(a, radius):
    """A mask grown by `radius` on every side."""
    pixels = 2 * max(1, round(radius * len(a) / 64)) + 1
    image = to_image(a).filter(ImageFilter.MaxFilter(pixels))
    return from_image(image.filter(ImageFilter.GaussianBlur(0.4)))


def shifted(a, right, down):
    """A mask moved by (right, down); what comes in from outside is 0."""
    x = round(right * len(a) / 64)
    y = round(down * len(a) / 64)
    moved = np.zeros_like(a)
    height, width = a.shape[:2]
    moved[max(0, y):height + min(0, y), max(0, x):width + min(0, x)] = (
        a[max(0, -y):height + min(0, -y), max(0, -x):width + min(0, -x)])
    return moved


def slopes(x, reach=1):
    """The horizontal and vertical gradient of x (H, W, C), over `reach` pixels; 0 at the border."""
    across, down = np.zeros_like(x), np.zeros_like(x)
    across[:, reach:-reach] = (x[:, 2 * reach:] - x[:, :-2 * reach]) / 2
    down[reach:-reach] = (x[2 * reach:] - x[:-2 * reach]) / 2
    return across, down


def edges(p, a, strength=5.0):
    """Where colour or alpha change: a mask (H, W, 1)."""
    across, down = slopes(np.concatenate([p * a, a], -1), max(1, len(p) // 64))
    steep = np.sqrt((across * across + down * down).sum(-1, keepdims=True))
    return np.clip(steep * np.float32(strength) - np.float32(0.6), 0, 1)


def ramp(t, colours):
    """t (H, W, 1) in [0, 1] along a list of k colours -> (H, W, 3)."""
    stops = np.linspace(0, 1, len(colours))
    channels = [np.interp(t[..., 0], stops, [colour[i] for colour in colours]) for i in range(3)]
    return np.stack(channels).astype(np.float32).transpose(1, 2, 0)


def normals(height, steepness):
    """A relief (H, W, 1) -> its unit normals (H, W, 3): right, down, towards the viewer."""
    across, down = slopes(height, max(1, len(height) // 64))
    scale = np.float32(steepness * max(1, len(height) // 64))
    unnormed = np.concatenate([-across * scale, -down * scale, np.ones_like(across)], -1)
    return unnormed / np.sqrt((unnormed * unnormed).sum(-1, keepdims=True))


def look_up(x, right, down):
    """x (H, W, C) at coordinates in 64ths (H, W, 1), by the nearest pixel inside the picture."""
    size = len(x)
    column = np.clip(right[..., 0] * (size / 64), 0, size - 1).astype(np.int32)
    row = np.clip(down[..., 0] * (size / 64), 0, size - 1).astype(np.int32)
    return x[row, column]


def smear(x, direction, length, steps=4):
    """Averages of x (H, W, C) along a field of angles (H, W, 1): strokes that follow the field.

    This is line integral convolution (Cabral and Leedom 1993) with `steps` steps to each side.
    """
    size = len(x)
    x_of, y_of = coordinates(size)
    total = x.copy()
    stride = np.float32(length / 2 / steps)
    for sign in (-stride, stride):
        right, down = x_of, y_of
        angle = direction
        for _ in range(steps):
            right = right + sign * np.cos(angle)
            down = down + sign * np.sin(angle)
            total = total + look_up(x, right, down)
            angle = look_up(direction, right, down)
    return total / np.float32(2 * steps + 1)


def cells(size, width, rng):
    """Voronoi cells that are about `width` wide, with one seed in each square of a jittered grid.

    Returns for each pixel, each (size, size, 1) and in 64ths: x and y of the nearest seed, its
    distance, and how much farther the second nearest is (0 on the border of two cells).
    """
    count = max(2, round(64 / width)) + 2
    step = np.float32(64 / (count - 2))
    grid_y, grid_x = np.mgrid[-1:count - 1, -1:count - 1].astype(np.float32)
    seed_x = (grid_x + rng.random((count, count)).astype(np.float32)) * step
    seed_y = (grid_y + rng.random((count, count)).astype(np.float32)) * step
    x, y = coordinates(size)
    x = x[..., 0]
    y = y[..., 0]
    column, row = (x / step).astype(np.int32) + 1, (y / step).astype(np.int32) + 1
    best = np.full((size, size), 1e9, np.float32)
    second = best.copy()
    best_x, best_y = np.zeros_like(best), np.zeros_like(best)
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            near_x, near_y = seed_x[row + i, column + j], seed_y[row + i, column + j]
            distance = (near_x - x) ** 2 + (near_y - y) ** 2
            closer = distance < best
            second = np.where(closer, best, np.minimum(second, distance))
            best = np.where(closer, distance, best)
            best_x, best_y = np.where(closer, near_x, best_x), np.where(closer, near_y, best_y)
    best, second = np.sqrt(best), np.sqrt(second)
    return best_x[..., None], best_y[..., None], best[..., None], (second - best)[..., None]
