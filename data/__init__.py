"""The art: sprite sheets with their names, the words for them, and the pictures of the user.

    art = Art(size=64)                                  # the training sets
    images, captions = art.batch(16, rng, 64)           # uint8 (16, 64, 64, 3), 16 strings
    images, captions = Folder("my/pictures").batch(...) # the same from your own

A training example is a scene (scenes.py): one drawing, several, or two side by side, perhaps in a
colour; three times in five in a style drawn afresh (styles.py). The same seed gives the same
examples at every size. All images are RGB uint8.
"""

import functools
from pathlib import Path

import numpy as np
from PIL import Image

from . import drawing, scenes, styles
from .english import HERE, caption, content_phrase, names, noun, plural, read_table, synonyms
from .drawing import place_one
from .reading import check_path, read_image, read_reference
from .scenes import Scene

TILE, COLUMNS = 128, 30                 # pixels a side of a tile, tiles in a row of a sheet
RARE = 0.03                             # share of the captions that say "a [V] cat" for "a cat"
UNNAMED_STYLE = "[V*]"                  # what captions call a style without naming it. So it means
#                                         "some style", which an adapter narrows (Section 4.4.1)


@functools.lru_cache(None)
def words():
    """All words that captions of the training sets can hold, sorted: the base's vocabulary."""
    said = ["a an the and in style with on ground", *scenes.COLOURS, *scenes.NUMBERS.values()]
    for name in names():
        for word in (noun(name), *synonyms().get(name, ())):
            counted = scenes.takes_number(name) and scenes.english_phrase(word) != word
            said += [word, plural(word)] if counted else [word]
    for attribute, values in styles.ATTRIBUTES.items():
        said += [value for value in values if value not in styles.HELD_OUT.get(attribute, ())]
    said += [row["style"] for row in read_table("sets.tsv") if row["role"] == "training"]
    said += ["[V] [V*]"]
    return sorted({word for phrase in said for word in phrase.split()})


# ---------------------------------------------------------------------------------------------
# Sources of training pictures

class Art:
    """The drawings of some sets, as uint8 (n, size, size, 4) with straight alpha, in `.drawings`.

    sets: names from sets.tsv; by default all of a role ("training", "held-out"). `.names`, `.sets`
    and `.hands` (the icon set's style phrase) go along with the drawings, and so do `.boxes` (what
    each covers of its tile) and `.middles` (its luminance); `.index` is {set: {name: i}}.
    compose: batches show colours, several and two objects too (scenes.py); else one as drawn.
    smallest: single objects are this to 1 times the frame, and somewhere in it; None: as they are.
    bare: share of the batches whose captions name no style at all, so that only what they show
    tells their pictures apart. plain: share of pictures that keep the style of their drawings.
    bent: how much each drawing is bent (`bend`).
    """

    def __init__(self, sets=None, role="training", size=64, smallest=None, bare=0.0,
                 plain=styles.PLAIN, bent=0.0, compose=True):
        self.smallest, self.bare, self.plain = smallest, bare, plain
        self.bent, self.compose = bent, compose
        table = {row["set"]: row for row in read_table("sets.tsv")}
        if sets is None:
            sets = [s for s, row in table.items() if row["role"] == role]
        for s in sets:
            if s not in table:
                raise ValueError(f"no set {s!r} in data/sets.tsv; there are {', '.join(table)}")
        rows = [row for row in read_table("names.tsv") if row["set"] in sets]
        self.names, self.sets = [row["name"] for row in rows], [row["set"] for row in rows]
        self.hands = [table[s]["style"] for s in self.sets]
        sheets = {s: Image.open(HERE / "sheets" / f"{s}.webp").convert("RGBa")      # premultiplied
                  for s in sets}
        tiles = [(sheets[row["set"]], int(row["tile"])) for row in rows]
        self.drawings = np.stack([self.tile(*tile, size) for tile in tiles])
        self.boxes = [drawing.inked(self.cut(*tile)) for tile in tiles]
        self.middles = [drawing.middle(rgba) for rgba in self.drawings]
        self.index = {s: {} for s in sets}
        for i, (name, s) in enumerate(zip(self.names, self.sets)):
            self.index[s][name] = i
        self.names_of = {s: tuple(found) for s, found in self.index.items()}

    @staticmethod
    def cut(sheet, index):
        """A tile at its full size, as a Pillow image."""
        x, y = index % COLUMNS * TILE, index // COLUMNS * TILE
        return sheet.crop((x, y, x + TILE, y + TILE))

    @classmethod
    def tile(cls, sheet, index, size):
        """Scaled while its colour is multiplied by alpha: no invisible colour can leak in."""
        how = Image.BOX if size < TILE else Image.BICUBIC
        tile = cls.cut(sheet, index).resize((size, size), how)
        return np.asarray(tile.convert("RGBA"))

    def find(self, name, set_name):
        """Index of a drawing. Raises ValueError if the set does not have that name."""
        if name not in self.index.get(set_name, ()):
            raise ValueError(f"no drawing {name!r} in {set_name}")
        return self.index[set_name][name]

    def content(self, i, rng=None):
        """Content phrase of drawing i; with rng, sometimes a synonym, "the", no article."""
        return scenes.phrase(Scene((self.names[i],)), rng)

    def batch(self, n, rng, resolution):
        """n scenes, each in a style of its own.

        rng: numpy Generator, the only source of chance. Returns uint8 (n, resolution, resolution,
        3) and n captions, a third without a style, a sixth "in [V*] style".
        """
        images, captions = [], []
        bare = self.bare > 0 and rng.random() < self.bare
        for _ in range(n):
            i = int(rng.random() * len(self.names))          # the object, or only whose drawings
            scene = Scene((self.names[i],))
            if self.compose:
                scene = scenes.sample(rng, names=self.names_of[self.sets[i]])
            style = styles.sample(rng, plain=self.plain)
            if scene.colours:
                style = styles.keep_colours(style, scene.colours)
            rgba = scenes.draw(scene, self, rng, resolution, self.sets[i])
            images.append(styles.apply(style, rgba, rng))
            content = scenes.phrase(scene, rng)
            manner = styles.phrase(style, self.hands[i], rng)
            if self.compose and rng.random() < RARE and content.startswith("a "):
                content = content.replace("a ", "a [V] ", 1)
            if self.compose and not manner and style != styles.Style():
                manner = UNNAMED_STYLE
            captions.append(caption(content, "" if bare else manner))
        return np.stack(images), captions

    def words(self):
        """All words of the captions, sorted."""
        return words()

    def prompts(self, n):
        """n captions to draw samples for, always the same: half without, half with style words."""
        rng = np.random.default_rng(0)
        picks = rng.integers(len(self.names), size=n)
        manners = [styles.phrase(styles.sample(rng), self.hands[i]) for i in picks]
        return [caption(self.content(i), manner if k % 2 else "")
                for k, (i, manner) in enumerate(zip(picks, manners))]


class Folder:
    """A user's own pictures: NAME.txt beside each NAME.png, or captions.tsv (file, caption).

    Raises ValueError in one line where the folder, a picture or a caption is missing.
    """

    SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}

    def __init__(self, path, size=64):
        path = Path(path)
        check_path(path, "folder of pictures")
        table = path / "captions.tsv"
        if table.exists():
            rows = [line.split("\t") for line in read_words(table).splitlines() if line.strip()]
            rows = [(row[0].strip(), " ".join(row[1:]).strip()) for row in rows]
            pairs = [(path / file, words) for file, words in rows if file != "file"]
        else:
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in self.SUFFIXES)
            for file in files:
                beside = file.with_suffix(".txt")
                if not beside.exists():
                    raise ValueError(f"{file} has no caption: write {beside.name} beside it")
            pairs = [(file, read_words(file.with_suffix(".txt"))) for file in files]
        if not pairs:
            raise ValueError(f"{path} holds no pictures with captions")
        for file, words in pairs:
            if not words:
                raise ValueError(f"{file} has an empty caption: say what it shows")
        self.images = np.stack([read_image(file, size) for file, _ in pairs])
        self.captions = [words for _, words in pairs]

    def batch(self, n, rng, resolution):
        """As Art.batch; the pictures keep the style they have."""
        picks = rng.integers(len(self.images), size=n)
        images = [Image.fromarray(self.images[i]).resize((resolution, resolution), Image.BICUBIC)
                  for i in picks]
        return np.stack(images), [self.captions[i] for i in picks]

    def words(self):
        """All words of the captions, sorted."""
        return sorted({word for line in self.captions for word in line.lower().split()})

    def prompts(self, n):
        return [self.captions[i % len(self.captions)] for i in range(n)]


def read_words(path):
    """A text file of the user's, without a byte-order mark. Raises ValueError in one line."""
    check_path(path, "text file")
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None


def jitter(rgba, size, rng, smallest=0.9):
    """The drawing at `smallest` to 1 times a frame (size, size, 4), somewhere in it."""
    return place_one(rgba, size, rng, smallest)
