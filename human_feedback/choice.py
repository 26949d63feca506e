"""A choice from a pool: numbers on a contact sheet, "3,17,20", or indices in a file."""

import hashlib
import re

import numpy as np

from data.pictures import grid


def hash_of(pixels):
    """A hash of the pixels of a pool, an array or a Pillow image."""
    return hashlib.sha256(np.asarray(pixels).tobytes()).hexdigest()[:12]


def check_choice(chosen, count, name="the choice"):
    """Sorted distinct indices below count. Raises ValueError for anything but a list of them."""
    is_list = isinstance(chosen, list)
    if not is_list or not all(type(index) is int and 0 <= index < count for index in chosen):
        raise ValueError(f"{name} must be a list of numbers from 0 to {count - 1}")
    return sorted(set(chosen))


def parse_picks(text, count):
    """Text such as "3,17,20" or "1-4,9", counted from 1 -> sorted indices from 0.

    Raises ValueError for other text, and for numbers that are not from 1 to `count`.
    """
    chosen = set()
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part)
        low = high = 0
        if match:
            low, high = int(match[1]), int(match[2] or match[1])
        if not 1 <= low <= high <= count:
            raise ValueError(f"cannot pick {part or 'nothing'!r}: give numbers from 1 to {count}, "
                             "such as 3,17,20 or 1-4")
        chosen.update(range(low - 1, high))
    return sorted(chosen)


def contact_sheets(images, prompts, per_sheet=60):
    """A pool, uint8 (B, H, W, 3), and B phrases -> Pillow images, numbered from 1 as for --pick."""
    sheets = []
    for first in range(0, len(images), per_sheet):
        part = images[first:first + per_sheet]
        captions = [f"{first + i + 1}  {prompts[first + i]}" for i in range(len(part))]
        sheets.append(grid(part, 10, max(1, 128 // part.shape[1]), 6, captions=captions))
    return sheets
