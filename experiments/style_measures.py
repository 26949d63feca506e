"""Distances of a picture's colours and texture to a style reference; no ground truth is needed.

Both measures are sliced Wasserstein distances (Rabin et al. 2011): along many random directions,
the mean difference between the sorted projections of two sets of points.

    palette   the points are the pixels' colours in Lab
    texture   the points are patches around each pixel, 7 x 7 of lightness and 5 x 5 of colour, with
              their means subtracted, so that the palette is not measured again

A distance alone says little: a blank picture in the right colours has a small one. `is_nearest`
asks instead whether a picture is nearer to its own reference than to others.

Shapes: B pictures (B, 3, H, W) in [-1, 1], D directions, Q quantiles.
"""

import torch
import torch.nn.functional as F

QUANTILES = torch.linspace(0.01, 0.99, 64)
GREY_PATCH, COLOUR_PATCH = 7, 5
RGB_TO_XYZ = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                           [0.0193, 0.1192, 0.9505]])
WHITE = torch.tensor([0.9505, 1.0, 1.089])                   # XYZ of sRGB's white, D65


def to_lab(images):
    """sRGB (B, 3, H, W) in [-1, 1] -> CIE Lab / 100."""
    rgb = (images + 1) / 2
    light = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("ij,bjhw->bihw", RGB_TO_XYZ, light) / WHITE[:, None, None]
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1) / 100


def directions(count, size, seed):
    """Random unit vectors (count, size)."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, size, generator=generator), dim=1)


def sorted_projections(points, along):
    """points (B, C, N), along (D, C) -> quantiles of the projections (B, D, Q)."""
    projected = torch.einsum("dc,bcn->bdn", along, points)
    return torch.quantile(projected, QUANTILES, dim=-1).permute(1, 2, 0)


def palette(images):
    """Return a description of the colours, (B, D, Q)."""
    return sorted_projections(to_lab(images).flatten(2), directions(32, 3, 0))


def texture(images):
    """Return a description of the patches, (B, D, Q)."""
    lab = to_lab(images)
    grey = F.unfold(lab[:, :1], GREY_PATCH)                                      # (B, 49, N)
    grey = grey - grey.mean(1, keepdim=True)
    colour = F.unfold(lab, COLOUR_PATCH).unflatten(1, (3, -1))                   # (B, 3, 25, N)
    colour = (colour - colour.mean(2, keepdim=True)).flatten(1, 2)
    of_grey = sorted_projections(grey, directions(64, grey.shape[1], 1))
    of_colour = sorted_projections(colour, directions(64, colour.shape[1], 2))
    return torch.cat([of_grey, of_colour], 1)


def distances(one, other):
    """Descriptions (A, D, Q) and (B, D, Q) -> sliced Wasserstein distances (A, B)."""
    return (one[:, None] - other[None]).abs().mean((2, 3))


def is_nearest(images_described, references_described):
    """Is each picture (A, D, Q) nearer to the first reference (R, D, Q) than to the others? (A,)"""
    return distances(images_described, references_described).argmin(1) == 0


def is_blank(images, least=0.03, faint=0.12):
    """Is a picture blank? (B,) bool.

    It is if less than a share `least` of its 4 x 4 pixel blocks differ from its median colour by
    more than `faint` (pixels are in [-1, 1]).
    """
    parts = F.avg_pool2d(images, 4)
    median = parts.flatten(2).median(-1).values[..., None, None]
    away = ((parts - median).abs().amax(1) > faint).flatten(1).float().mean(1)
    return away < least
