"""Styles that have no name: colours, light, strokes and backgrounds in any combination.

Real references rarely fit words such as "navy and gold watercolor". Half of the styled training
pictures therefore take a style from this file (but none in which an object has a colour word), and
their captions call it "[V*]" or nothing.

A style is determined by its seed (`Style.seed`). What is characteristic of it is drawn from
`point`, a generator with that seed, so that two pictures of one style share it. What differs
between two pictures of a style, such as where the noise lies, is drawn from `rng`.

    picture = paint(rgba, point=np.random.default_rng(7), rng=np.random.default_rng(0))

Pictures are float32 (H, W, 3) in [0, 1], masks float32 (H, W, 1), lengths 64ths of the side.
"""

import colorsys

import numpy as np

from .paint import (blur, cells, coordinates, edges, light_of, look_up, mix, noise, normals, planes,
                    ramp, saturate, shifted, slopes, smear, spread)


def choose(point, weights):
    """A random key of {key: weight}, with probability in proportion to its weight."""
    keys = list(weights)
    chances = np.array(list(weights.values()), np.float64)
    threshold = point.random() * chances.sum()
    return keys[int(np.searchsorted(chances.cumsum(), threshold, "right"))]


def paint(rgba, point, rng):
    """A drawing, uint8 (H, W, 4) with straight alpha, in a style -> (H, W, 3) uint8."""
    drawing = planes(rgba)
    p, a = drawing[..., :3], drawing[..., 3:]
    mean = (p * a).sum((0, 1)) / max(a.sum(), 1)
    p = np.where(a > 0.5, p, mean)           # no colour of the transparent part can leak in
    colours = scheme(point, 5)

    p = choose(point, COLOURINGS)(p, colours, point, rng)
    ground = choose(point, GROUNDS)(len(p), ground_colours(colours, point), point, rng)
    ground = set_apart(p, a, ground)
    if point.random() < 0.4:
        picture, a = choose(point, BODIES)(p, a, ground, colours, point, rng)
    else:
        picture = compose(p, a, ground, point)
    picture = choose(point, TECHNIQUES)(np.clip(picture, 0, 1), a, point, rng)
    if point.random() < 0.15:
        picture = choose(point, TECHNIQUES)(np.clip(picture, 0, 1), a, point, rng)
    picture = finish(np.clip(picture, 0, 1), point, rng)
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)


def set_apart(p, a, ground, least=0.22):
    """The background, made darker or lighter if the object would not stand out from it."""
    object_light = float((light_of(p) * a).sum() / max(a.sum(), 1))
    ground_light = float(light_of(ground).mean())
    if abs(object_light - ground_light) >= least:
        return ground
    darker = object_light - least
    if darker > 0 and (ground_light <= object_light or object_light + least > 1):
        return ground * np.float32(darker / max(ground_light, 0.01))
    lighter = min(1, object_light + least)
    return 1 - (1 - ground) * np.float32((1 - lighter) / max(1 - ground_light, 0.01))


# --------------------------------------------------------------------------------------------------
# Colours

def hsv(hue, saturation, value):
    """One colour, float32 (3,), from hue, saturation and value in [0, 1]."""
    return np.float32(colorsys.hsv_to_rgb(hue % 1, np.clip(saturation, 0, 1), np.clip(value, 0, 1)))


def scheme(point, count):
    """`count` colours that go together: float32 (count, 3), from dark to light."""
    if point.random() < 0.15:
        colours = list(point.random((count, 3)).astype(np.float32))
    else:
        hue = point.random()
        apart = choose(point, {0.02: 1, 0.08: 2, 0.2: 2, 0.5: 2})
        pale, vivid = np.sort(point.random(2))
        colours = [hsv(hue + apart * point.uniform(-1, 1), point.uniform(pale, vivid),
                       point.random()) for _ in range(count)]
    colours.sort(key=lambda colour: colour @ np.float32([0.3, 0.59, 0.11]))
    return np.stack(colours)


def ground_colours(colours, point):
    """Three colours for a background: white, black, those of the object, or others."""
    kind = choose(point, {"white": 0.2, "black": 0.1, "own": 0.3, "light": 0.2, "dark": 0.2})
    if kind == "white":
        return np.float32([[1, 1, 1]] * 2 + [[0.85, 0.85, 0.88]])
    if kind == "black":
        return np.float32([[0, 0, 0]] * 2 + [[0.15, 0.15, 0.2]])
    if kind == "own":
        return colours[point.permutation(len(colours))[:3]]
    others = scheme(point, 3)
    if kind == "light":
        return 1 - (1 - others) * np.float32(0.45)
    return others * np.float32(0.45)


def own_colours(p, colours, point, rng):
    """The drawing's own colours, more or less saturated, lighter or darker."""
    p = saturate(p, point.uniform(0.3, 1.5))
    return np.clip(p, 0, 1) ** np.float32(np.exp(point.uniform(-0.5, 0.5)))


def gradient_map(p, colours, point, rng):
    """Lightness along a ramp of two to four colours, mostly from dark to light."""
    count = int(point.integers(2, 5))
    chosen = colours[np.sort(point.permutation(len(colours))[:count])]
    if point.random() < 0.2:
        chosen = chosen[point.permutation(count)]
    chosen = chosen.copy()
    chosen[0] *= np.float32(point.uniform(0.3, 1))                 # keeps some contrast
    chosen[-1] = mix(chosen[-1], 1, np.float32(point.uniform(0, 0.7)))
    low, high = np.percentile(light_of(p), (5, 95))
    t = np.clip((light_of(p) - low) / max(high - low, 0.15), 0, 1)
    return mix(p, ramp(t, chosen), np.float32(min(1, point.uniform(0.6, 1.6))))


def tinted(p, colours, point, rng):
    """All colours drawn towards one."""
    colour = colours[int(point.integers(len(colours)))]
    return mix(p, light_of(p) * colour * np.float32(1.3), np.float32(point.uniform(0.3, 0.9)))


def colour_field(p, colours, point, rng):
    """A field of colours across the object, whatever its parts are; the lightness is kept."""
    chosen = colours[point.permutation(len(colours))[:3]]
    scale = point.uniform(14, 50)
    if point.random() < 0.5:
        angle = point.uniform(0, 2 * np.pi)
        x, y = coordinates(len(p))
        t = ((x - 32) * np.cos(angle) + (y - 32) * np.sin(angle)) / 64 + 0.5
        t = np.clip(t + 0.3 * (noise(len(p), scale, rng) - 0.5), 0, 1)
    else:
        t = noise(len(p), scale, rng)
    light = light_of(p) - light_of(p).mean()
    field = ramp(t, chosen) + light * np.float32(point.uniform(0.5, 1.2))
    return mix(p, field, np.float32(point.uniform(0.6, 1)))


def other_hues(p, colours, point, rng):
    """All hues turned by one angle; or the three channels exchanged."""
    if point.random() < 0.4:
        return p[..., point.permutation(3)]
    angle = point.uniform(0, 2 * np.pi)
    cosine, sine = np.cos(angle) / 3, np.sin(angle) / np.sqrt(3)
    matrix = np.full((3, 3), 1 / 3 - cosine) + np.eye(3) * 3 * cosine
    matrix += sine * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    return np.clip(p @ matrix.T.astype(np.float32), 0, 1)


def few_colours(p, colours, point, rng):
    """Posterised: each of a few levels of lightness becomes one flat colour of the scheme."""
    count = int(point.integers(3, 6))
    light = light_of(p)
    low, high = np.percentile(light, (3, 97))
    level = np.clip((light - low) / max(high - low, 0.15), 0, 0.999) * count
    return colours[np.floor(level[..., 0]).astype(int) * len(colours) // count]


COLOURINGS = {own_colours: 0.36, gradient_map: 0.24, tinted: 0.1, colour_field: 0.12,
              other_hues: 0.1, few_colours: 0.08}


# --------------------------------------------------------------------------------------------------
# Backgrounds: (size, colours (3, 3), point, rng) -> (size, size, 3)

def plain(size, colours, point, rng):
    return np.broadcast_to(colours[0], (size, size, 3)).astype(np.float32)


def linear_gradient(size, colours, point, rng):
    angle = point.uniform(0, 2 * np.pi)
    bend = np.exp(point.uniform(-0.6, 0.6))
    x, y = coordinates(size)
    t = ((x - 32) * np.cos(angle) + (y - 32) * np.sin(angle)) / 90 + 0.5
    return ramp(np.clip(t, 0, 1) ** bend, colours[:int(point.integers(2, 4))])


def radial_gradient(size, colours, point, rng):
    """Light around a middle, as behind a portrait."""
    x, y = coordinates(size)
    middle_x, middle_y = point.uniform(16, 48, 2)
    t = np.hypot(x - middle_x, y - middle_y) / point.uniform(30, 70)
    return ramp(np.clip(t, 0, 1), colours[:int(point.integers(2, 4))])


def horizon(size, colours, point, rng):
    """Sky and ground: two colours with a line between them, straight, hilly or soft."""
    x, y = coordinates(size)
    line = point.uniform(24, 54) + (x - 32) * point.uniform(-0.15, 0.15)
    hills = noise(size, 20, rng)[size // 2:size // 2 + 1] - np.float32(0.5)
    line = line + hills * choose(point, {0: 1, 8: 1, 16: 1})
    soft = choose(point, {0.5: 2, 5: 1})
    sky = mix(colours[0], colours[2], np.float32(point.uniform(0, 0.7)) * y / 64)
    return mix(sky, colours[1], np.clip((y - line) / soft, 0, 1)).astype(np.float32)


def disc(size, colours, point, rng):
    """A disc or ring behind the object, as a sun, a badge or a spotlight."""
    x, y = coordinates(size)
    middle_x, middle_y = 32 + point.uniform(-10, 10, 2)
    radius = point.uniform(14, 34)
    soft = choose(point, {0.7: 3, 8: 1})
    inside = np.clip((radius - np.hypot(x - middle_x, y - middle_y)) / soft, 0, 1)
    if point.random() < 0.25:
        inside = inside - np.clip((radius - 5 - np.hypot(x - middle_x, y - middle_y)) / soft, 0, 1)
    return mix(plain(size, colours, point, rng), colours[1], inside)


def blobs(size, colours, point, rng):
    """Shapes with smooth borders, hard or washed out."""
    t = noise(size, point.uniform(10, 30), rng)
    soft = choose(point, {0.02: 1, 0.2: 1})
    one = np.clip((t - point.uniform(0.45, 0.65)) / soft, 0, 1)
    two = np.clip((noise(size, point.uniform(10, 24), rng) - 0.65) / soft, 0, 1)
    return mix(mix(plain(size, colours, point, rng), colours[1], one), colours[2], two)


def clouds(size, colours, point, rng):
    """Mottled paint: noise of several sizes along a ramp."""
    coarse = point.uniform(16, 40)
    t = 0.6 * noise(size, coarse, rng) + 0.3 * noise(size, coarse / 3, rng)
    t = t + 0.1 * noise(size, 2, rng)
    return ramp(np.clip(t, 0, 1), colours)


def patches(size, colours, point, rng):
    """Cells of a few colours, sharp as in a collage or out of focus as behind a photograph."""
    x, y, _, _ = cells(size, point.uniform(8, 26), rng)
    shuffle = np.abs(np.sin(x * 12.9 + y * 78.2))            # a hash of each cell's seed, 0 to 1
    picture = colours[(shuffle * 2.999).astype(int)[..., 0]]
    if point.random() < 0.6:
        picture = blur(picture, point.uniform(1.5, 6))
    return picture


def lights_out_of_focus(size, colours, point, rng):
    """Discs of light on a dark or coloured background."""
    x, y, distance, _ = cells(size, point.uniform(9, 18), rng)
    lit = np.abs(np.sin(x * 3.1 + y * 7.7)) < point.uniform(0.2, 0.7)    # a hash picks some cells
    inside = np.clip((point.uniform(2, 6) - distance) / 1.5, 0, 1) * lit
    return mix(linear_gradient(size, colours, point, rng), colours[2],
               inside * np.float32(point.uniform(0.3, 0.9)))


def paper(size, colours, point, rng):
    """Paper, plaster or cloth: one light tint with fibres."""
    tint = mix(np.float32([0.95, 0.92, 0.86]), colours[2], np.float32(point.uniform(0, 0.3)))
    grain = point.uniform(0.05, 0.25) * (noise(size, point.uniform(1, 3), rng) - 0.5)
    return tint * (1 + grain + 0.15 * (noise(size, 24, rng) - 0.5)).astype(np.float32)


def pattern(size, colours, point, rng):
    """Stripes, checks, dots or rays at any angle and width."""
    x, y = coordinates(size)
    angle = point.uniform(0, np.pi)
    width = point.uniform(4, 16)
    u = x * np.cos(angle) + y * np.sin(angle)
    v = y * np.cos(angle) - x * np.sin(angle)
    kind = choose(point, {"stripes": 1, "checks": 1, "dots": 1, "rays": 1})
    if kind == "stripes":
        t = np.sin(u * 2 * np.pi / width)
    elif kind == "checks":
        t = np.sin(u * 2 * np.pi / width) * np.sin(v * 2 * np.pi / width)
    elif kind == "dots":
        t = np.cos(u * 2 * np.pi / width) + np.cos(v * 2 * np.pi / width) - point.uniform(0.2, 1.2)
    else:
        t = np.sin(np.arctan2(y - 32, x - 32) * point.integers(5, 14))
    t = np.clip(t * 3 + 0.5, 0, 1) * np.float32(point.uniform(0.2, 1))
    return mix(plain(size, colours, point, rng), colours[1], t)


GROUNDS = {plain: 0.34, linear_gradient: 0.12, radial_gradient: 0.1, horizon: 0.08, disc: 0.06,
           blobs: 0.05, clouds: 0.06, patches: 0.06, lights_out_of_focus: 0.03, paper: 0.06,
           pattern: 0.04}


# --------------------------------------------------------------------------------------------------
# Bodies: (p, a, ground, colours, point, rng) -> the picture on its background, the object's mask.
# compose is the plain case, relief a helper

def compose(p, a, ground, point):
    """The object on its background, sometimes with a shadow, a halo or an outline."""
    extra = choose(point, {"none": 0.62, "shadow": 0.16, "halo": 0.09, "outline": 0.13})
    if extra == "shadow":
        right, down = point.uniform(-6, 6, 2)
        shadow = shifted(blur(a, point.uniform(0.5, 3)), right, down)
        ground = ground * (1 - np.float32(point.uniform(0.2, 0.8)) * shadow)
    if extra == "halo":
        tone = np.float32(choose(point, {0.0: 1, 1.0: 1}))
        ground = mix(ground, tone, blur(a, point.uniform(2, 7)) * np.float32(0.7))
    picture = mix(ground, p, a)
    if extra == "outline":
        colour = np.float32([choose(point, {0.06: 3, 0.96: 1})] * 3)
        if point.random() < 0.35:
            colour = point.random(3).astype(np.float32)
        rim = np.clip(spread(a, point.uniform(0.8, 2.5)) - a, 0, 1)
        inner = edges(p, a, point.uniform(2, 6)) * np.float32(point.uniform(0, 1))
        picture = mix(picture, colour, np.maximum(rim, inner))
    return picture


def relief(p, a, point):
    """A height map of the object: rounded at its rim, higher where the drawing is light."""
    round_rim = blur(a, point.uniform(2, 7)) * a
    return round_rim * np.float32(1.5) + light_of(blur(p, 1)) * np.float32(point.uniform(0, 0.4))


def lit_body(p, a, ground, colours, point, rng):
    """A solid body, matte or glossy, lit from any side."""
    n = normals(relief(p, a, point), point.uniform(6, 14))
    angle = point.uniform(0, 2 * np.pi)
    up = point.uniform(0.3, 1)
    light = np.float32([np.cos(angle), np.sin(angle), up]) / np.float32(np.hypot(1, up))
    diffuse = np.clip(n @ light, 0, 1)[..., None]
    dark = np.float32(point.uniform(0.1, 0.6))
    body = p * (dark + (np.float32(1.25) - dark) * diffuse)
    body = mix(body, colours[0] * light_of(body), (1 - diffuse) * np.float32(point.uniform(0, 0.7)))
    gloss = point.random() < 0.5
    if gloss:
        shine = np.clip((n @ light)[..., None], 0, 1) ** np.float32(point.uniform(8, 40))
        body = body + shine * np.float32(point.uniform(0.3, 0.9))
    if point.random() < 0.5:
        shadow = shifted(blur(a, 2), -5 * light[0], -5 * light[1])
        ground = ground * (1 - np.float32(point.uniform(0.2, 0.6)) * shadow)
    return mix(ground, body, a), a


def metal_body(p, a, ground, colours, point, rng):
    """Polished metal: a ramp of colours looked up by the direction in which it faces."""
    n = normals(relief(p, a, point), point.uniform(6, 16))
    angle = point.uniform(0, 2 * np.pi)
    facing = n[..., :1] * np.cos(angle) + n[..., 1:2] * np.sin(angle)
    bands = point.uniform(0.5, 1.6)
    t = np.abs((facing * bands + 0.5 + 0.25 * light_of(p)) % 2 - 1)      # a triangle wave
    tones = [colours[0] * 0.3, colours[1], colours[3], mix(colours[4], 1, 0.8), colours[2]]
    if point.random() < 0.3:
        tones = [tones[i] for i in point.permutation(5)]
    metal = ramp(t, tones)
    body = mix(metal, p * (0.5 + metal), np.float32(point.uniform(0, 0.4)))
    return mix(ground, body, a), a


def glass_body(p, a, ground, colours, point, rng):
    """Clear or tinted glass: the background bent by it, a bright rim, a highlight."""
    size = len(p)
    n = normals(relief(p, a, point), point.uniform(6, 12))
    x, y = coordinates(size)
    bent = look_up(ground, x + 12 * n[..., :1], y + 12 * n[..., 1:2])
    tint = mix(p, colours[3], np.float32(point.uniform(0, 0.8)))
    body = mix(bent, tint, np.float32(point.uniform(0.25, 0.7)))
    rim = np.clip(1 - n[..., 2:], 0, 1)
    bright = np.float32(choose(point, {0.9: 2, 0.1: 1}))
    body = mix(body, bright, np.clip(rim * np.float32(point.uniform(0.7, 1.6)), 0, 1))
    body = mix(body, bright, edges(p, a, 3) * np.float32(0.4))
    return mix(ground, body, a), a


def glow_body(p, a, ground, colours, point, rng):
    """The object, or its contours, glows in some tint on a dark background."""
    tint = hsv(point.random(), point.uniform(0.3, 1), 1)
    if point.random() < 0.4:
        lamp = edges(p, a, point.uniform(3, 7)) + 0.25 * light_of(p) * a
    else:
        lamp = (np.float32(point.uniform(0.1, 0.4)) + light_of(p)) * a
    own_share = np.float32(choose(point, {0.0: 2, 0.5: 1, 1.0: 1}))
    coloured = lamp * mix(tint, saturate(p, 1.5), own_share)
    dark = ground * np.float32(choose(point, {0.0: 1, 0.12: 2, 0.3: 1}))
    wide = blur(np.clip(coloured, 0, 1), point.uniform(2, 7))
    core = np.clip(lamp - np.float32(0.6), 0, 1) * np.float32(point.uniform(0, 1))
    return dark + coloured * np.float32(0.9) + wide * np.float32(point.uniform(0.4, 1.4)) + core, a


def line_art(p, a, ground, colours, point, rng):
    """Lines of one colour around flat, pale or empty areas."""
    is_dark = light_of(ground).mean() < 0.4
    ink = colours[-1] if is_dark else colours[0] * np.float32(0.6)
    if point.random() < 0.6:
        ink = np.float32(1.0 if is_dark else 0.05)
    lines = edges(blur(p, 0.4), a, point.uniform(4, 9))
    if point.random() < 0.5:
        lines = np.maximum(lines, np.clip(spread(a, 1) - a, 0, 1))
    fill = choose(point, {"none": 2, "flat": 2, "loose": 1})
    base = ground
    if fill == "flat":
        base = mix(ground, p, a * np.float32(point.uniform(0.3, 1)))
    if fill == "loose":                      # colour that does not keep to the lines
        right, down = point.uniform(-3, 3, 2)
        base = mix(ground, p, shifted(blur(a, 2), right, down) * np.float32(0.7))
    return mix(base, ink, np.clip(lines * np.float32(point.uniform(0.8, 1.5)), 0, 1)), a


BODIES = {lit_body: 0.32, metal_body: 0.12, glass_body: 0.1, glow_body: 0.22, line_art: 0.24}


# --------------------------------------------------------------------------------------------------
# Techniques of painting: (picture, a, point, rng) -> picture

def as_is(p, a, point, rng):
    return p


def strokes(p, a, point, rng):
    """Brush strokes along a flow, with ridges of paint."""
    size = len(p)
    angle = np.float32(point.uniform(0, np.pi))
    turn = np.float32(choose(point, {0.5: 1, 2.0: 1, 5.0: 1}))
    direction = angle + turn * noise(size, point.uniform(16, 40), rng)
    if point.random() < 0.4:                 # along the contours
        across, down = slopes(blur(light_of(p), 2.5), max(1, size // 64))
        steep = np.clip(np.hypot(across, down) * 12, 0, 1)
        direction = mix(direction, np.arctan2(across, -down), steep)
    width = choose(point, {1.3: 2, 2.0: 2, 3.0: 1})
    length = point.uniform(4, 12)
    jitter = [(noise(size, width, rng) - 0.5) * np.float32(1.2 * width) for _ in range(2)]
    x, y = coordinates(size)
    daubs = smear(look_up(p, x + jitter[0], y + jitter[1]), direction, length * 0.4, 2)
    bristle = smear(noise(size, width, rng), direction, length)
    bristle = (bristle - bristle.mean()) / max(float(bristle.std()), 1e-3)
    hue = smear(noise(size, width * 2, rng), direction, length, 3) - np.float32(0.5)
    strength = np.float32(point.uniform(0.02, 0.1))
    painted = daubs * (1 + strength * bristle)
    shift = point.uniform(-0.35, 0.35, 3).astype(np.float32)
    painted = saturate(painted + hue * shift, point.uniform(0.9, 1.5))
    across, down = slopes(bristle, max(1, size // 64))
    return painted + (across + down) * np.float32(point.uniform(0, 0.05) * max(1, size // 64))


def dabs(p, a, point, rng):
    """Spots of paint, as in pointillism, on a lighter or darker ground."""
    x, y, distance, _ = cells(len(p), point.uniform(1.7, 3.5), rng)
    colour = look_up(p, x, y)
    wobble = np.stack([np.sin(x * k + y * (k + 3))[..., 0] for k in (11.1, 17.7, 23.3)], -1)
    colour = saturate(colour + wobble * np.float32(point.uniform(0.02, 0.15)), 1.2)
    cover = np.clip(point.uniform(1.5, 3.5) - distance, 0, 1)
    return mix(p * np.float32(point.uniform(0.7, 1.1)), colour, cover)


def facets(p, a, point, rng):
    """Flat pieces: low-poly planes, cut paper, mosaic with or without joints."""
    x, y, _, border = cells(len(p), point.uniform(2.5, 5.5), rng)
    piece = look_up(blur(p, 0.7), x, y)
    piece = piece * (1 + np.float32(point.uniform(0, 0.25)) * np.sin(x * 13 + y * 7))
    if point.random() < 0.4:
        piece = mix(piece, np.float32(choose(point, {0.1: 1, 0.9: 1})),
                    (border < 0.6).astype(np.float32) * np.float32(0.6))
    return piece


def wash(p, a, point, rng):
    """Watercolour: wandering borders, pigment in pools and at the rim, paper showing through."""
    size = len(p)
    x, y = coordinates(size)
    reach = np.float32(point.uniform(0, 5))
    wander = [(noise(size, point.uniform(6, 14), rng) - 0.5) * reach for _ in range(2)]
    flowed = blur(look_up(p, x + wander[0], y + wander[1]), point.uniform(0.3, 1.5))
    pools = noise(size, point.uniform(8, 20), rng) + 0.5 * noise(size, 4, rng)
    pale = np.float32(point.uniform(0.2, 0.8)) * (np.float32(1.2) - pools)
    water = mix(flowed, 1, np.clip(pale, 0, 0.9))
    across, down = slopes(light_of(flowed), max(1, size // 64))
    rim = np.sqrt(across * across + down * down) * np.float32(point.uniform(0, 2))
    if point.random() < 0.3:                 # splashes of the object's colours around it
        bled = blur(p * a, 5) / np.maximum(blur(a, 5), 0.05)
        where = np.clip((noise(size, 7, rng) - point.uniform(0.5, 0.65)) * 8, 0, 1)
        water = mix(water, bled, where * blur(a, 6) * np.float32(0.8))
    return water - rim


def ink(p, a, point, rng):
    """Hatching or engraving: lines whose width follows the darkness."""
    size = len(p)
    x, y = coordinates(size)
    angle = point.uniform(0, np.pi)
    pitch = point.uniform(2.2, 4.5)
    bend = point.uniform(0, 8) * noise(size, 24, rng)
    phase = (x * np.cos(angle) + y * np.sin(angle) + bend) * np.float32(2 * np.pi / pitch)
    if point.random() < 0.7:                 # lines on the object alone
        p = mix(1 - (1 - p) * np.float32(0.15), p, spread(a, 1))
    dark = 1 - light_of(p)
    lines = np.clip((dark - 0.45 + 0.45 * np.sin(phase)) * 3, 0, 1)
    if point.random() < 0.4:                 # crossed
        cross = np.sin((x * np.sin(angle) - y * np.cos(angle)) * np.float32(2 * np.pi / pitch))
        lines = np.maximum(lines, np.clip((dark - 0.65 + 0.35 * cross) * 3, 0, 1))
    lines = np.maximum(lines, edges(p, a, point.uniform(2, 7)))
    coloured = np.float32(choose(point, {0.0: 2, 0.4: 1, 0.8: 1}))
    sheet = mix(mix(np.float32([0.97, 0.95, 0.9]), 1, np.float32(point.random())), p, coloured)
    tone = np.float32([0.07, 0.06, 0.08])
    if point.random() < 0.4:
        tone = p * np.float32(0.3)
    return mix(sheet, tone, lines)


def crayon(p, a, point, rng):
    """Wax or chalk: scribbled strokes that leave the sheet bare between them."""
    size = len(p)
    x, y = coordinates(size)
    angle = point.uniform(0, np.pi)
    pitch = point.uniform(2.5, 6)
    wobble = point.uniform(3, 10) * noise(size, 16, rng)
    scribble = np.sin((x * np.cos(angle) + y * np.sin(angle) + wobble) * 2 * np.pi / pitch)
    grain = noise(size, point.uniform(1, 2), rng)
    bare = np.clip((grain + 0.35 * scribble - point.uniform(0.4, 0.9)) * 3, 0, 0.95)
    sheet = np.float32(choose(point, {1.0: 3, 0.1: 1}))
    ground = 1 - blur(a, 0.5)
    bare = np.maximum(bare, ground * np.float32(choose(point, {0.0: 1, 0.9: 1})))
    x_shift = (noise(size, 10, rng) - 0.5) * np.float32(point.uniform(0, 5))
    shaky = look_up(p, x + x_shift, y + x_shift)
    return mix(saturate(shaky, point.uniform(1, 1.6)), sheet, bare)


def screen(p, a, point, rng):
    """Halftone dots or lines of print at any angle."""
    x, y = coordinates(len(p))
    angle = point.uniform(0, np.pi)
    pitch = point.uniform(2.5, 6)
    u = (x * np.cos(angle) + y * np.sin(angle)) * np.float32(2 * np.pi / pitch)
    v = (y * np.cos(angle) - x * np.sin(angle)) * np.float32(2 * np.pi / pitch)
    dots = np.cos(u) / 2
    if point.random() < 0.6:
        dots = (np.cos(u) + np.cos(v)) / 4
    dark = np.clip((0.5 + dots - light_of(p)) * 4 + 0.5, 0, 1)
    return mix(mix(p, 1, np.float32(point.uniform(0.3, 0.9))), p * np.float32(0.7), dark)


def blocks(p, a, point, rng):
    """Large pixels, bricks or tiles."""
    x, y = coordinates(len(p))
    width = choose(point, {2: 1, 3: 1, 4: 1})
    big = look_up(blur(p, width / 4), (x // width + 0.5) * width, (y // width + 0.5) * width)
    if point.random() < 0.4:
        joint = ((x % width < 0.8) | (y % width < 0.8)).astype(np.float32)
        big = mix(big, np.float32(choose(point, {0.15: 1, 0.85: 1})), joint * np.float32(0.5))
    if point.random() < 0.5:
        big = np.round(big * 6) / 6
    return big


def weave(p, a, point, rng):
    """Threads: embroidery, knitting, canvas."""
    x, y = coordinates(len(p))
    pitch = point.uniform(2, 5)
    row = np.floor(y / pitch)
    slant = point.uniform(-1.5, 1.5)
    thread = np.sin((x + slant * (y % pitch) + row * pitch / 2) * np.float32(2 * np.pi / pitch))
    groove = np.sin(y * np.float32(np.pi / pitch)) ** 2
    depth = np.float32(point.uniform(0.15, 0.5))
    return blur(p, 0.5) * (1 - depth + depth * (0.5 + 0.5 * thread) * 1.2 + 0.3 * depth * groove)


def simplified(p, a, point, rng):
    """Soft or flat areas: details are blurred and tones reduced to a few steps."""
    soft = blur(p, point.uniform(0.6, 2))
    steps = choose(point, {3: 2, 5: 2, 0: 1})
    if steps == 0:
        return soft
    return np.round(soft * steps) / steps


def carved(p, a, point, rng):
    """Wood, stone or clay: one material with grain, lit from one side."""
    size = len(p)
    x, y = coordinates(size)
    hue = choose(point, {0.02: 1, 0.07: 1, 0.09: 1, 0.6: 1, "any": 2})
    if hue == "any":
        hue = point.random()
    tone = hsv(hue, point.uniform(0.05, 0.6), point.uniform(0.4, 1))
    across, down = slopes(blur(light_of(p), 0.6), max(1, size // 64))
    angle = point.uniform(0, 2 * np.pi)
    lit = (across * np.cos(angle) + down * np.sin(angle)) * np.float32(3 * max(1, size // 64))
    grain = noise(size, point.uniform(1, 3), rng) - 0.5
    if point.random() < 0.5:
        rings = np.sin((y + 4 * noise(size, 24, rng)) * point.uniform(0.6, 1.6))
        grain = 0.4 * grain + 0.5 * rings
    light = 0.45 + 0.5 * light_of(p) + lit + np.float32(point.uniform(0.05, 0.25)) * grain
    return mix(tone * light, p, np.float32(point.uniform(0, 0.35)))


TECHNIQUES = {as_is: 0.3, strokes: 0.2, wash: 0.11, ink: 0.08, crayon: 0.06, simplified: 0.07,
              dabs: 0.04, facets: 0.04, screen: 0.025, blocks: 0.025, weave: 0.025, carved: 0.045}


# --------------------------------------------------------------------------------------------------

def finish(p, point, rng):
    """What a print or a camera adds: light from one side, vignette, tone, tint, blur, grain."""
    size = len(p)
    x, y = coordinates(size)
    if point.random() < 0.12:
        angle = point.uniform(0, 2 * np.pi)
        side = ((x - 32) * np.cos(angle) + (y - 32) * np.sin(angle)) / 64
        p = p * (1 + side * np.float32(point.uniform(0.2, 0.8)))
    if point.random() < 0.12:
        far = np.clip((np.hypot(x - 32, y - 32) - 20) / 26, 0, 1)
        p = mix(p, np.float32(choose(point, {0.0: 3, 1.0: 1})),
                far * np.float32(point.uniform(0.3, 0.9)))
    if point.random() < 0.25:
        p = np.clip(p, 0, 1) ** np.float32(np.exp(point.uniform(-0.5, 0.5)))
        middle = np.float32(point.uniform(0.3, 0.7))
        p = middle + (p - middle) * np.float32(point.uniform(0.6, 1.3))
    if point.random() < 0.12:
        p = mix(p, light_of(p) * hsv(point.random(), point.uniform(0.1, 0.5), 1),
                np.float32(point.uniform(0.2, 0.7)))
    if point.random() < 0.08:
        p = blur(p, point.uniform(0.4, 1.2))
    if point.random() < 0.2:
        grain = noise(size, point.uniform(0.5, 1.5), rng) - 0.5
        p = p + grain * np.float32(point.uniform(0.03, 0.2))
    return p
