"""Rebuild the sprite sheets and names.tsv from the packages that carry the drawings.

    npm install @iconify-json/noto@1.2.9 @iconify-json/noto-v1@1.2.5 @iconify-json/twemoji@1.2.5 \\
        @iconify-json/fluent-emoji@1.2.7 @iconify-json/fluent-emoji-flat@1.2.6 \\
        @iconify-json/openmoji@1.2.29
    python -m pip install -r data/requirements-build.txt
    python -m data.build --packages node_modules

Objects only: five of Noto's categories, without people, clock faces, symbols and flags. Each name
is one tile of 128 px; a set's tiles stand row by row on its sheet, in the order of names.tsv.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

HERE = Path(__file__).parent
TILE, COLUMNS = 128, 30
SETS = ("noto", "noto-v1", "twemoji", "fluent-emoji", "fluent-emoji-flat", "openmoji")
CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
ANIMALS = ("bear", "cat", "cow", "dog", "dragon", "frog", "hamster", "horse", "lion", "monkey",
           "mouse", "panda", "pig", "polar-bear", "rabbit", "tiger", "unicorn", "wolf", "fox")


def wanted(name):
    """Whether a name is of an object: no clock face, no human face."""
    if name.endswith(("oclock", "-thirty", "-low")):
        return False
    return not name.endswith("-face") or name.removesuffix("-face") in ANIMALS


def render(icons, name):
    """One icon -> RGBA (TILE, TILE, 4) uint8, straight alpha; None where the set has none."""
    alias = icons.get("aliases", {}).get(name, {})
    icon = icons["icons"].get(name) or icons["icons"].get(alias.get("parent"))
    if icon is None or icon.get("hidden"):
        return None
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'viewBox="{left} {top} {width} {height}" width="{TILE}" height="{TILE}">'
           f'{icon["body"]}</svg>')
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    tile = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    return tile if tile[..., 3].any() else None


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", required=True, help="the node_modules folder")
    packages = Path(parser.parse_args().packages) / "@iconify-json"
    categories = json.loads((packages / "noto" / "metadata.json").read_text())["categories"]
    names = sorted({name for c in CATEGORIES for name in categories[c] if wanted(name)})
    rows = []
    (HERE / "sheets").mkdir(exist_ok=True)
    for set_name in SETS:
        icons = json.loads((packages / set_name / "icons.json").read_text())
        tiles = [(name, render(icons, name)) for name in names]
        tiles = [(name, tile) for name, tile in tiles if tile is not None]
        sheet = Image.new("RGBA", (COLUMNS * TILE, -(-len(tiles) // COLUMNS) * TILE))
        for i, (name, tile) in enumerate(tiles):
            sheet.paste(Image.fromarray(tile), (i % COLUMNS * TILE, i // COLUMNS * TILE))
            rows.append(f"{i}\t{set_name}\t{name}")
        sheet.save(HERE / "sheets" / f"{set_name}.webp", quality=85, alpha_quality=100, method=6)
        print(f"{set_name}: {len(tiles)} drawings")
    (HERE / "names.tsv").write_text("tile\tset\tname\n" + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
