"""Draw data/contact_sheet.png, a page of random styles, and examples/, pictures to learn a style or an object from.

    python -m data.pictures
"""

from pathlib import Path

import numpy as np
from PIL import Image

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


def contact_sheet(columns=12, rows=8):
    art, rng = Art(size=64), np.random.default_rng(3)
    tiles = [styles.apply(styles.sample(rng, held_out=k % 4 == 0), art.drawings[rng.integers(len(art.names))], rng)
             for k in range(columns * rows)]
    return Image.fromarray(np.concatenate([np.concatenate(tiles[r * columns:][:columns], 1) for r in range(rows)]))


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
