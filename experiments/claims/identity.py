"""Section 3.4, "my object in my style", of an individual: this teapot, not a teapot.

An object is a drawing in colours and with a mark that no word names, so its class gives it away to
nobody. It is taught by four poses on four grounds. Of a picture we ask which of eight objects of
one class it shows, all of them drawn in the wanted style: by the classifier's features and by
palette and texture, which neither CLIP nor the tokenizer has a part in. Chance is 1/8; the ceiling,
a new pose of the object itself in that style as the tokenizer gives it back, is an arm.

Shapes: K = 8 objects, the first is the one; B pictures (B, 3, 64, 64) in [-1, 1].
"""

from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import styledrop
from data import content_phrase, drawing, styles
from experiments.claims.setting import HANDS, TEXTURE, at_side
from experiments.one_shot import palette_distance, texture_distance
from experiments.quality import among, give_back, look
from human_feedback.rounds import ROUND

OBJECTS, POSES, PICTURES = 8, 4, 4
GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
CONTROL = "the class, by the style adapter"
CEILING = "the object, drawn"


# ---------------------------------------------------------------------------------------------
# Objects

def turn_hues(rgba, angle):
    """uint8 (H, W, 4) with every hue turned by `angle` of 256, greys given some colour first."""
    hsv = np.asarray(Image.fromarray(rgba[..., :3]).convert("HSV")).copy()
    hsv[..., 0] += np.uint8(angle)                           # wraps round
    hsv[..., 1] = np.maximum(hsv[..., 1], 90)
    painted = Image.fromarray(hsv, "HSV").convert("RGB")
    return np.dstack([np.asarray(painted), rgba[..., 3]])


def add_mark(rgba, kind):
    """A black and white mark, a fifth of the side wide, on the middle of a drawing: one of four."""
    size, ink = len(rgba), rgba[..., 3] > 128
    y, x = np.mgrid[:size, :size] - np.argwhere(ink).mean(0)[:, None, None]
    x, y, r = x * 64 / size, y * 64 / size, np.hypot(x, y) * 64 / size
    white = {0: (r < 3) | (r > 6), 1: (abs(x) < 2) | (abs(y) < 2), 2: np.sin(y * 1.1) > 0,
             3: (x > 0) == (y > 0)}[kind]
    marked, where = rgba.copy(), (r < 9) & ink
    marked[where, :3] = np.where(white, 255, 0)[where][:, None]
    return marked


def objects(art, name):
    """K objects of a class: [uint8 (64, 64, 4)], four by other hands, four like the first, which is
    noto's, but in other hues, with other marks or none."""
    found = []
    for k in range(OBJECTS):
        rgba = art.drawings[art.find(name, HANDS[k if k < 4 else 0])]
        rgba = turn_hues(rgba, (100 + 96 * k) % 256)
        found.append(rgba if k == 7 else add_mark(rgba, k if k < 4 else k - 3))
    return found


def pose(rgba, rng):
    """The object turned, bent a little, perhaps mirrored, smaller, somewhere in the frame."""
    return drawing.place_one(drawing.bend(rgba, rng, 0.12), len(rgba), rng, 0.75)


def poses(rgba, style, count, seed):
    """The object in a style and `count` poses, the same for a seed: (count, 3, 64, 64)."""
    rng = np.random.default_rng(seed)
    return styledrop.to_tensor(np.stack([
        styles.apply(style, pose(rgba, rng), np.random.default_rng(0)) for _ in range(count)]))


def lessons(rgba, seed):
    """What teaches the object: POSES of it, as drawn, each on a ground of its own."""
    rng = np.random.default_rng(seed)
    grounds = rng.choice(styles.GROUND_HUES, POSES, replace=False)
    return styledrop.to_tensor(np.stack([
        styles.apply(styles.Style(ground=str(g)), pose(rgba, rng), np.random.default_rng(0))
        for g in grounds]))


# ---------------------------------------------------------------------------------------------
# Which one is it?

def apart(net, images, candidates):
    """How far pictures are from each of K objects, lower is nearer: (B, K).

    candidates: K tensors (poses, 3, 64, 64); the nearest pose counts. Three distances (features,
    palette, texture), each in units of its own mean over the objects.
    """
    unit = lambda x: F.normalize(look(net, x)["features"], dim=1)
    total, of_images = 0, unit(images)
    features = [1 - (of_images @ unit(c).T).amax(1) for c in candidates]
    pixels = lambda distance: [nearest(distance, images, c) for c in candidates]
    for found in (features, pixels(palette_distance), pixels(texture_distance)):
        found = torch.stack(found, 1)                                            # (B, K)
        total = total + found / found.mean(1, keepdim=True)
    return total


def nearest(distance, images, some):
    """The distance of each picture to the nearest of some: (B,)."""
    return torch.stack([distance(images, x.expand_as(images)) for x in some.split(1)]).amin(0)


def looks_apart(x, y):
    """setting.distances' sum."""
    return palette_distance(x, y) + TEXTURE * texture_distance(x, y)


def measure_arm(u, make):
    """Draw an arm -> {ruler: list}, its pictures.

    identity: is the first object the nearest of K in the wanted style? near: how many of the others
    are farther, 0.5 by chance. named: the class, as in `setting.measure`. styled: is the picture
    nearer to the object in the style than to the object as drawn, on white and on the lessons'
    grounds? both: identity and styled.
    """
    images, name, seed = make(), u.subject.object, u.subject.index
    some, x = objects(u.art, name), at_side(images, 64)
    in_style = [poses(rgba, u.subject.style, POSES, seed) for rgba in some]
    far = apart(u.net, x, in_style)
    plain = torch.cat([poses(some[0], styles.Style(), 1, seed), lessons(some[0], seed)])
    wanted = torch.full((len(x),), data.names().index(name))
    distance = nearest(looks_apart, x, in_style[0])
    found = {"identity": far.argmin(1) == 0, "near": (far[:, 1:] > far[:, :1]).double().mean(1),
             "named": among(look(u.net, x)["names"], wanted), "distance": distance,
             "styled": distance < nearest(looks_apart, x, plain)}
    found["both"] = found["identity"] & found["styled"]
    return {m: values.double().tolist() for m, values in found.items()}, images


# ---------------------------------------------------------------------------------------------
# Arms

def phrase(name, named):
    """ "teapot" -> "a [V] teapot", as DreamBooth has it; or "a [V]": only its adapter knows."""
    words = content_phrase(name)
    return "a [V] " + words.split(" ", 1)[1] if named else "a [V]"


def mix_probabilities(style, content, gamma):
    """An ablation of Section 3.4: probabilities mixed instead of logits."""
    return torch.logaddexp(style.log_softmax(-1) + np.log(1 - gamma),
                           content.log_softmax(-1) + np.log(gamma))


def arms(u):
    """{arm: function that draws its pictures}."""
    name, seed = u.subject.object, u.subject.index

    def content(named):
        words, images = phrase(name, named), lessons(objects(u.art, name)[0], seed)
        return u.kept(f"object, {'named' if named else 'unnamed'}", lambda: u.tune(
            images, [words] * len(images), **ROUND | dict(is_shared=False)))

    def mixed(named, gamma, **more):
        return u.sample(u.adapter("R1"), prompts=[phrase(name, named)], per=PICTURES,
                        content=content(named), gamma=gamma, **more)

    def by_probabilities():
        with mock.patch.object(styledrop, "mix_logits", mix_probabilities):
            return mixed(True, 0.5)

    def drawn():
        new = poses(objects(u.art, name)[0], u.subject.style, PICTURES, seed + 1000)
        return give_back(u.pipe, at_side(new, u.pipe.vqgan.config.resolution))

    found = {CEILING: drawn, CONTROL: lambda: u.sample(u.adapter("R1"), [name], PICTURES)}
    for how, named in (("named", True), ("unnamed", False)):
        found |= {f"{how}, gamma {g:g}": lambda n=named, g=g: mixed(n, g) for g in GAMMAS}
    found["named, gamma 0.5, object pulled"] = lambda: mixed(True, 0.5, lambda_a_content=3.0)
    found["named, gamma 0.5, probabilities"] = by_probabilities
    return found
