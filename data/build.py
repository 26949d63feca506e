"""Rebuild the sprite sheets from the packages that carry the drawings.

names.tsv says which drawing of which set stands on which tile of which sheet. The drawings
were chosen by eye: they show what their name says and are legible at 64 px, on a transparent
ground; no flags, logos, clock faces, signs or text. A set's people have a sheet of their own.

    npm install @iconify-json/noto@1.2.9 @iconify-json/noto-v1@1.2.5 @iconify-json/twemoji@1.2.5 \\
        @iconify-json/fluent-emoji@1.2.7 @iconify-json/fluent-emoji-flat@1.2.6 \\
        @iconify-json/openmoji@1.2.29 @iconify-json/game-icons@1.2.4 \\
        @iconify-json/streamline-freehand-color@1.2.2 @iconify-json/streamline-kameleon-color@1.2.2
    apt-get download openclipart-png=1:0.18+dfsg-19 sweethome3d-furniture=1.8-1
    for package in *.deb; do dpkg-deb -x "$package" debian; done
    python -m pip install -r data/requirements-build.txt
    python -m data.build --npm node_modules --debian debian             # or: --sheets noto-people

A tile is 128 px; tiles stand row by row on their sheet, in the order of names.tsv.
"""

import argparse
import functools
import io
import json
import math
import re
import zipfile
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from .art import COLUMNS, TILE
from .english import HERE, read_table

MARGIN = 4                                  # of a tile, around drawings that are fitted into it
SILHOUETTE = "#28282c"                      # the colour of game-icons, which have none
PACKAGES = {"streamline-freehand": "streamline-freehand-color",     # others have the set's name
            "streamline-kameleon": "streamline-kameleon-color"}
FURNITURE = {"blendswap-cc-0": "BlendSwap-CC-0", "blendswap-cc-by": "BlendSwap-CC-BY",
             "katorlegaz": "KatorLegaz", "reallusion": "Reallusion", "scopia": "Scopia"}
# These are saved at the quality of the first release, so that their files do not change; sheets
# that were added later are compressed more
FIRST_SHEETS = ("noto", "noto-v1", "twemoji", "fluent-emoji", "fluent-emoji-flat", "openmoji")


# ---------------------------------------------------------------------------------------------
# Where the drawings come from

@functools.lru_cache(None)
def read_icons(path):
    """An icon set in Iconify's JSON format."""
    return json.loads(path.read_text())


def find_icon(icons, name):
    """An icon by its name or alias."""
    alias = icons.get("aliases", {}).get(name, {})
    return icons["icons"].get(name) or icons["icons"][alias["parent"]]


def render(icons, name, size=TILE, colour=None, body=None):
    """One icon -> an RGBA Pillow image of `size` pixels.

    colour: of strokes and fills that name none. body: what to render in place of the icon's own.
    """
    icon = find_icon(icons, name)
    left = icon.get("left", icons.get("left", 0))
    top = icon.get("top", icons.get("top", 0))
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    colour = f' color="{colour}"' if colour else ""
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'viewBox="{left} {top} {width} {height}" width="{size}" height="{size}"{colour}>'
           f'{body or icon["body"]}</svg>')
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def without_disc(icons, name):
    """The body of an icon of streamline-kameleon without its first shape, the coloured disc."""
    return re.sub(r'<(path|circle) fill="#[0-9a-f]{6}"[^>]*/>', "", find_icon(icons, name)["body"],
                  count=1)


@functools.lru_cache(None)
def open_catalogue(path):
    """A furniture library of Sweet Home 3D: a zip file with a preview of each model."""
    return zipfile.ZipFile(path)


def fit(image):
    """A Pillow image, cropped to what is visible and scaled to a tile with a margin."""
    image = image.convert("RGBA")
    visible = np.asarray(image)[..., 3] > 16
    rows = np.flatnonzero(visible.any(1))
    columns = np.flatnonzero(visible.any(0))
    top, bottom = rows[[0, -1]]
    left, right = columns[[0, -1]]
    image = image.crop((int(left), int(top), int(right) + 1, int(bottom) + 1))
    scale = (TILE - 2 * MARGIN) / max(image.size)
    width = max(1, round(image.width * scale))
    height = max(1, round(image.height * scale))
    image = image.convert("RGBa").resize((width, height), Image.LANCZOS).convert("RGBA")
    tile = Image.new("RGBA", (TILE, TILE))
    tile.paste(image, ((TILE - width) // 2, (TILE - height) // 2))
    return tile


def read_drawing(set_name, drawing, npm, debian):
    """One drawing as an RGBA Pillow image of TILE pixels."""
    if set_name == "openclipart":
        return fit(Image.open(debian / "usr/share/openclipart/png" / f"{drawing}.png"))
    if set_name == "sweethome3d":
        library = FURNITURE[drawing.split("/")[0]]
        catalogue = open_catalogue(debian / "usr/share/sweethome3d/furniture" / f"{library}.sh3f")
        return fit(Image.open(io.BytesIO(catalogue.read(f"{drawing}.png"))))
    icons = read_icons(npm / "@iconify-json" / PACKAGES.get(set_name, set_name) / "icons.json")
    if set_name == "streamline-kameleon":
        return fit(render(icons, drawing, 3 * TILE, body=without_disc(icons, drawing)))
    if set_name == "game-icons":
        return render(icons, drawing, colour=SILHOUETTE)
    return render(icons, drawing)


# ---------------------------------------------------------------------------------------------
# The sheets

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npm", required=True, type=Path, help="the node_modules folder")
    parser.add_argument("--debian", required=True, type=Path,
                        help="the folder that the Debian packages were unpacked into")
    parser.add_argument("--sheets", nargs="*", help="sheets to build (default: all)")
    parser.add_argument("--out", type=Path, default=HERE / "sheets", help="where they go")
    args = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None           # some of the clip art is poster-sized
    args.out.mkdir(parents=True, exist_ok=True)
    rows = read_table("names.tsv")
    for name in args.sheets or dict.fromkeys(row["sheet"] for row in rows):
        tiles = [row for row in rows if row["sheet"] == name]
        sheet_rows = math.ceil(len(tiles) / COLUMNS)
        sheet = Image.new("RGBA", (COLUMNS * TILE, sheet_rows * TILE))
        for row in tiles:
            y, x = divmod(int(row["tile"]), COLUMNS)
            tile = read_drawing(row["set"], row["drawing"], args.npm, args.debian)
            sheet.paste(tile, (x * TILE, y * TILE))
        first = name in FIRST_SHEETS
        sheet.save(args.out / f"{name}.webp", quality=85 if first else 80,
                   alpha_quality=100 if first else 60, method=6)
        print(f"{name}: {len(tiles)} drawings")


if __name__ == "__main__":
    main()
