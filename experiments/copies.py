"""Does a base copy its training drawings? The audit of quality.py.

A tenth of the drawings are kept out of the base's training (data.kept_out_pairs). If a base has
memorised its training drawings, its samples of "a cat" are nearer to one of those cats than to the
cats that were kept out. How often this would happen by chance follows from two counts: of icon sets
whose cat is trained on, and of icon sets whose cat is kept out.

Shapes: B images (B, 3, 64, 64) in [-1, 1].
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

import data
from data import Scene, styles
from experiments.classifier import paint, part, predict
from experiments.common import mean_and_error, reconstruct
from styledrop import to_tensor

KEPT_OUT = "drawings kept out of training"
COPY = 5                                # percentile of the distances between two drawings of a name


# --------------------------------------------------------------------------------------------------
# Distances between images, wherever their objects are

def framed(images, margin=0.06, threshold=0.15):
    """What differs from the background of images (B, 3, H, W), centred and enlarged to 64 pixels.

    The background is the median colour of an image's border. margin: how much background is left
    around the object, as a share of its side.
    """
    frames = []
    for image in images:
        border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
        ground = border.median(1).values[:, None, None]                          # (3, 1, 1)
        ink = (image - ground).abs().amax(0) > threshold                         # (H, W)
        if not ink.any():
            frames.append(ground.expand(3, 64, 64))
            continue
        rows, columns = ink.any(1).nonzero()[:, 0], ink.any(0).nonzero()[:, 0]
        image = image[:, rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
        _, height, width = image.shape
        side = max(height, width)
        edge = round(margin * side)
        canvas = ground.repeat(1, side + 2 * edge, side + 2 * edge)
        top, left = edge + (side - height) // 2, edge + (side - width) // 2
        canvas[:, top:top + height, left:left + width] = image
        frames.append(F.interpolate(canvas[None], (64, 64), mode="bilinear", antialias=True)[0])
    return torch.stack(frames)


def vectors_of(net, images):
    """{measure: vectors (B, ...)} of framed images; distances are Euclidean.

    features: the classifier's; pixels: scaled so that the distance is the root mean square error.
    """
    images = framed(images)
    pixels = images.flatten(1)
    return {"features": predict(net, images)["features"],
            "pixels": pixels / math.sqrt(pixels.shape[1])}


def as_drawn(rgba):
    """Drawings (n, 64, 64, 4), uint8, on white: (n, 3, 64, 64)."""
    rng = np.random.default_rng(0)
    return to_tensor(np.stack([styles.apply(styles.Style(), one, rng) for one in rgba]))


# --------------------------------------------------------------------------------------------------
# The audit

def all_drawings():
    """An Art of all drawings of the training sets, those kept out of training among them."""
    return data.Art(kept_out=None, smallest=0.9)


def audit(net, pipe, art, other, names, samples, seed):
    """Audit samples, and for comparison known copies and drawings that G has never seen.

    art: from `all_drawings`; other: an Art of the one icon set that is not in it; names: the names
    of the samples (B, 3, 64, 64). Only names that have both training and kept-out drawings are
    used. Returns {row: {column: (mean, standard error) in percent}} and the number of such names.
    """
    is_kept_out = np.array([pair in data.kept_out_pairs() for pair in zip(art.sets, art.names)])
    rows_of = {}
    for i, name in enumerate(art.names):
        rows_of.setdefault(name, []).append(i)
    both = [name for name in dict.fromkeys(names)
            if name in rows_of and 0 < is_kept_out[rows_of[name]].sum() < len(rows_of[name])]
    if not both:
        raise ValueError("none of these names has drawings both in training and kept out of it; "
                         "give more --names")

    # images of four kinds, and the drawings that they are compared with
    places = [i for i, name in enumerate(names) if name in both]
    sample_names = [names[i] for i in places]
    rng = np.random.default_rng(seed)
    trained = part(art, ~is_kept_out)
    known_copies = [paint(trained, Scene((name,)), rng, False) for name in sample_names]
    known_copies = to_tensor(np.stack(known_copies))
    kept_out = [i for name in both for i in rows_of[name] if is_kept_out[i]]
    of_other = [i for i, name in enumerate(other.names) if name in both]
    subjects = {
        "samples": (sample_names, samples[places]),
        "training drawings, reconstructed": (sample_names, reconstruct(pipe, known_copies)),
        "drawings of another set": ([other.names[i] for i in of_other],
                                    as_drawn(other.drawings[of_other])),
        KEPT_OUT: ([art.names[i] for i in kept_out], as_drawn(art.drawings[kept_out]))}
    drawing_vectors = {name: vectors_of(net, as_drawn(art.drawings[rows_of[name]]))
                       for name in both}
    # {name: which of its drawings are kept out of training, (n,) bool}
    kept_out_of = {name: torch.from_numpy(is_kept_out[rows_of[name]]) for name in both}
    chance = {name: training_share(art, rows_of[name], is_kept_out) for name in both}

    results = {}
    for title, (own_names, images) in subjects.items():
        for measure, vectors in vectors_of(net, images).items():
            drawings = {name: drawing_vectors[name][measure] for name in both}
            row = {}
            if title != KEPT_OUT:        # a kept-out drawing is nearest to itself
                nearer = are_nearer(vectors, own_names, drawings, kept_out_of)
                row["a training drawing is nearer"] = percents(nearer, own_names)
                by_chance = [chance[name] for name in own_names]
                row["by chance"] = percents(by_chance, own_names)
            copies = are_copies(vectors, own_names, drawings, kept_out_of)
            row["copies"] = percents(copies, own_names)
            results[f"{title}, by {measure}"] = row
    return results, len(both)


def nearest(vector, drawings, is_kept_out):
    """Distances of a vector (D,) to the nearest drawing of training, and to the nearest kept out.

    drawings (n, D): all of its name; is_kept_out (n,) bool.
    """
    away = (drawings - vector).norm(dim=1)
    return away[~is_kept_out].min().item(), away[is_kept_out].min().item()


def are_nearer(vectors, names, drawings, kept_out_of):
    """Is each vector nearer to a training drawing of its name than to those kept out? 0 or 1."""
    answers = []
    for vector, name in zip(vectors, names):
        trained, kept_out = nearest(vector, drawings[name], kept_out_of[name])
        answers.append(float(trained < kept_out))
    return answers


def are_copies(vectors, names, drawings, kept_out_of):
    """Is each vector a copy of a training drawing of its name? 0 or 1.

    It is a copy if its distance to the nearest one is below the COPY-th percentile of the distances
    between different drawings of one name.
    """
    limit = np.percentile(torch.cat([torch.pdist(of_name) for of_name in drawings.values()]), COPY)
    return [float(nearest(vector, drawings[name], kept_out_of[name])[0] < limit)
            for vector, name in zip(vectors, names)]


def training_share(art, rows, is_kept_out):
    """Of the icon sets that have one of the drawings `rows`, the share that is trained on.

    If samples did not depend on which drawings were trained on, the nearest drawing would be a
    training drawing with this probability.
    """
    kept_out = {art.sets[i] for i in rows if is_kept_out[i]}
    return 1 - len(kept_out) / len({art.sets[i] for i in rows})


def percents(values, names):
    """(mean, standard error) over names, in percent."""
    number_of = {name: i for i, name in enumerate(dict.fromkeys(names))}
    mean, error = mean_and_error(values, [number_of[name] for name in names])
    return 100 * mean, 100 * error
