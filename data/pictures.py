"""Images side by side on a sheet.

    python -m data.pictures     # draws data/contact_sheet.png
"""

import math
import textwrap
import unicodedata

import numpy as np
from PIL import Image, ImageDraw

from .art import Art
from .english import HERE


def grid(images, columns, scale=1, gap=2, top=(), left=(), captions=(), lines=1):
    """uint8 (B, H, W, 3) -> one PIL image, row by row, each pixel `scale` times as large.

    top: words above the columns, in as many lines as the longest of them needs; left: words to
    the left of the rows; captions: words above each image, in `lines` lines.
    """
    _, h, w, _ = images.shape
    rows = math.ceil(len(images) / columns)
    band = 12 * lines + 4 if captions else 0                 # pixels above each image
    width, height = w * scale + gap, h * scale + gap + band
    titles = [textwrap.wrap(readable(words), width // 6) for words in top]
    deepest = max(map(len, titles), default=0)               # lines of the longest title
    x0 = gap + 96 if left else gap
    y0 = gap + 12 * deepest + 4 if deepest else gap
    sheet = Image.new("RGB", (x0 + columns * width, y0 + rows * height), "white")
    pen = ImageDraw.Draw(sheet)

    def write(x, y, lines):
        pen.text((x, y), "\n".join(lines), fill="black", spacing=1)

    for i, image in enumerate(images):
        x, y = x0 + (i % columns) * width, y0 + (i // columns) * height
        sheet.paste(Image.fromarray(image.repeat(scale, 0).repeat(scale, 1)), (x, y + band))
        if captions:
            write(x, y, textwrap.wrap(readable(captions[i]), width // 6)[:lines])
    for i, title in enumerate(titles):
        write(x0 + i * width, 2, title)
    for i, words in enumerate(left):
        write(4, y0 + i * height, textwrap.wrap(readable(words), 14)[:height // 13])
    return sheet


def readable(words):
    """Words in ASCII, since Pillow's font has no more: accents go, other letters become \\u0643."""
    letters = unicodedata.normalize("NFKD", words)
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return plain.encode("ascii", "backslashreplace").decode()


def contact_sheet(columns=10, rows=6):
    """What the base is trained on, captions and all."""
    art = Art(size=64, smallest=0.9)
    images, captions = art.batch(columns * rows, np.random.default_rng(3), 64)
    return grid(images, columns, 2, 6, captions=captions, lines=4).quantize(256)


def main():
    contact_sheet().save(HERE / "contact_sheet.png", optimize=True)


if __name__ == "__main__":
    main()
