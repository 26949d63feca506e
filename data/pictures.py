"""Draw data/contact_sheet.png, training examples with their captions, and examples/, pictures to learn
a style or an object from.

    python -m data.pictures
"""

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import HERE, Art, content_phrase, styles
from .styles import Style

EXAMPLES = [                                        # file, name, set, style; none of these styles is ever trained on
    ("house_watercolor", "house", "twemoji", Style("navy and gold", "", "watercolor", "cream")),
    ("mushroom_glowing", "mushroom", "noto", Style("neon", "", "glowing", "black")),
    ("cat_stained_glass", "cat", "fluent-emoji-flat", Style("", "", "stained glass", "navy")),
    ("fish_embroidery", "tropical-fish", "twemoji", Style("brown and gold", "", "embroidery", "red")),
    ("teapot_golden", "teapot", "noto", Style("", "", "golden", "purple")),
    ("owl_halftone", "owl", "twemoji", Style("purple and gold", "", "halftone", "navy")),
    ("rocket_sticker", "rocket", "twemoji", Style("", "", "", "teal", "sticker")),
    ("tree_openmoji", "deciduous-tree", "openmoji", Style()),
]
# An object, one by each hand; each on a ground of its own, so that the object is all they share
OBJECT = "teapot", {"noto": "cream", "twemoji": "teal", "fluent-emoji": "gold", "fluent-emoji-flat": "grey"}


def draw(art, name, set_name, style, rng):
    """One drawing in one style: uint8 (size, size, 3)."""
    return styles.apply(style, art.drawings[art.find(name, set_name)], rng)


def captioned(images, captions, columns, width=124, lines=4):
    """A page of pictures (B, H, W, 3), each with its caption printed under it."""
    side, font = images.shape[1], ImageFont.load_default(10)
    high = side + 11 * lines + 8
    page = Image.new("RGB", (columns * width, -(-len(images) // columns) * high), "white")
    pen = ImageDraw.Draw(page)
    for k, (image, words) in enumerate(zip(images, captions)):
        x, y = k % columns * width, k // columns * high
        page.paste(Image.fromarray(image), (x + (width - side) // 2, y + 2))
        for row, line in enumerate(textwrap.wrap(words, 24)[:lines]):
            place = x + width // 2, y + side + 3 + 11 * row
            pen.text(place, line, fill="black", font=font, anchor="ma")
    return page


def contact_sheet(columns=10, rows=6):
    """What the base is trained on, captions and all."""
    art = Art(size=64, smallest=0.9)
    return captioned(*art.batch(columns * rows, np.random.default_rng(3), 64), columns)


def main():
    contact_sheet().save(HERE / "contact_sheet.png", optimize=True)
    folder = Path("examples")
    folder.mkdir(exist_ok=True)
    art = Art(sets=("noto", "twemoji", "fluent-emoji", "fluent-emoji-flat", "openmoji"), size=128)
    table = ["| file | content | style in words | drawing | licence |", "|---|---|---|---|---|"]
    for file, name, set_name, style in EXAMPLES:
        image = draw(art, name, set_name, style, np.random.default_rng(1))
        Image.fromarray(image).save(folder / f"{file}.png", optimize=True)
        hand = art.hands[art.find(name, set_name)]
        licence = {"noto": "Apache-2.0", "twemoji": "CC BY 4.0", "openmoji": "CC BY-SA 4.0"}.get(set_name, "MIT")
        table.append(f"| {file}.png | {content_phrase(name)} | {styles.phrase(style, hand)} | {set_name} | {licence} |")
    name, grounds = OBJECT
    (folder / name).mkdir(exist_ok=True)
    for k, (set_name, ground) in enumerate(grounds.items()):
        image = draw(art, name, set_name, Style(ground=ground), np.random.default_rng(1))
        Image.fromarray(image).save(folder / name / f"{k + 1}.png", optimize=True)
    (folder / "README.md").write_text(
        "# Styles to learn from\n\nOne picture each, in styles that no training picture of the shipped base has. Drawn by\n"
        "`python -m data.pictures` from the sets credited in `data/LICENSES.md`; each picture is under its drawing's licence.\n\n"
        + "\n".join(table) + f"\n\n`{name}/` is an object to learn: 1.png to {len(grounds)}.png are from {', '.join(grounds)}, each on a ground of its own.\n")


if __name__ == "__main__":
    main()
