"""Training pictures with captions, made from the drawings on the sprite sheets.

    art = Art(size=64)                                  # the training sets
    images, captions = art.batch(16, rng, 64)           # uint8 (16, 64, 64, 3), 16 strings

A training example is a scene (scenes.py): one drawing, several, or two side by side, perhaps in a
colour; most are painted in a style that is sampled anew (styles.py). The same seed gives the same
examples at every size. All images are RGB uint8.
"""

import functools
import zlib

import numpy as np
from PIL import Image

from styledrop import RARE_TOKEN, style_prompt

from . import drawing, scenes, styles
from .english import HERE, names, noun, plural, read_table, synonyms
from .scenes import Scene

TILE = 128                              # side of a tile in pixels
COLUMNS = 30                            # tiles in a row of a sheet
MOVED = 0.5                             # share of styled pictures whose scene is moved and scaled
# If a caption has no words for a style, it says RARE_TOKEN in this share of cases. The token thus
# comes to mean "some style", and an adapter then makes it mean one style.
SOME_STYLE = 0.8
RARE = 0.03                             # share of the captions that say "a [V] cat" for "a cat"
GENERIC = 0.02                          # share of the captions that say "an object" for "a cat"


@functools.lru_cache(None)
def words():
    """All words that captions of the training sets can contain, sorted: the base's vocabulary."""
    # these are split into words at the end
    phrases = ["a an the and in style with on ground", *scenes.COLOURS, *scenes.NUMBERS.values()]
    for name in names():
        for word in (noun(name), *synonyms().get(name, ())):
            counted = scenes.takes_number(name) and scenes.english_phrase(word) != word
            phrases += [word, plural(word)] if counted else [word]
    for attribute, values in styles.ATTRIBUTES.items():
        held_out = styles.HELD_OUT.get(attribute, ())
        phrases += [value for value in values if value not in held_out]
    phrases += [row["style"] for row in read_table("sets.tsv") if row["role"] == "training"]
    phrases += ["an object", "[V] [V*]"]
    return sorted({word for phrase in phrases for word in phrase.split()})


# ---------------------------------------------------------------------------------------------
# Sources of training pictures

@functools.lru_cache(None)
def kept_out_pairs():
    """The (set, name) pairs kept out of training: about a tenth of the training sets' drawings.

    They are for an audit: samples of a base that has memorised drawings are nearer to those it was
    trained on than to those kept out. A pair is kept out where the CRC-32 of "set/name" is
    divisible by 10, unless that would leave its name without any training drawing.
    """
    roles = {row["set"]: row["role"] for row in read_table("sets.tsv")}
    pairs = {(row["set"], row["name"]) for row in read_table("names.tsv")
             if roles[row["set"]] == "training"}
    chosen = {pair for pair in pairs if zlib.crc32("/".join(pair).encode()) % 10 == 0}
    trained_names = {name for _, name in pairs - chosen}
    return frozenset(pair for pair in chosen if pair[1] in trained_names)


class Art:
    """The drawings of some sets, as uint8 (n, size, size, 4) with straight alpha, in `.drawings`.

    sets: names from sets.tsv; by default all of a role ("training", "held-out"). For each drawing,
    `.names` has its name, `.sets` its icon set, `.style_phrases` that set's style phrase, `.boxes`
    its bounding box in the tile, and `.middles` its median luminance. `.index` is
    {set: {name: [i, ...]}}: a set may have several drawings of a name, such as a woman with several
    skin colours.
    kept_out: False leaves out the drawings that are kept out of training (`kept_out_pairs`), True
    takes only those, None takes all.
    compose: True also makes coloured objects, several of an object, and two objects (scenes.py);
    False makes one object as drawn.
    smallest: a single object is scaled to between `smallest` and 1 times the frame and placed at
    random; None leaves it as it is.
    bare: share of batches in which no caption names a style, so that only the objects distinguish
    them. plain: share of pictures that keep the style of their drawings.
    bent: how strongly drawings are rotated, sheared and stretched (`drawing.bend`).
    """

    def __init__(self, sets=None, role="training", size=64, smallest=None, bare=0.0,
                 plain=styles.PLAIN, bent=0.0, compose=True, kept_out=False):
        self.smallest = smallest
        self.bare = bare
        self.plain = plain
        self.bent = bent
        self.compose = compose
        table = {row["set"]: row for row in read_table("sets.tsv")}
        if sets is None:
            sets = [s for s, row in table.items() if row["role"] == role]
        for s in sets:
            if s not in table:
                raise ValueError(f"no set {s!r} in data/sets.tsv; there are {', '.join(table)}")
        rows = [row for row in read_table("names.tsv") if row["set"] in sets]
        if kept_out is not None:
            rows = [row for row in rows
                    if ((row["set"], row["name"]) in kept_out_pairs()) == kept_out]
        self.names = [row["name"] for row in rows]
        self.sets = [row["set"] for row in rows]
        self.style_phrases = [table[s]["style"] for s in self.sets]
        sheets = {}
        for sheet in {row["sheet"] for row in rows}:
            picture = Image.open(HERE / "sheets" / f"{sheet}.webp")
            sheets[sheet] = picture.convert("RGBa")          # colours multiplied by alpha
        tiles = [(sheets[row["sheet"]], int(row["tile"])) for row in rows]
        self.drawings = np.stack([self.tile(*tile, size) for tile in tiles])
        self.boxes = [drawing.inked(self.cut(*tile)) for tile in tiles]
        self.middles = [drawing.middle(rgba) for rgba in self.drawings]
        self.make_index(sets)

    def make_index(self, sets):
        """Set `.index` and `.names_of` {set: names}, from the names and sets of the drawings."""
        self.index = {s: {} for s in sets}
        for i, (name, s) in enumerate(zip(self.names, self.sets)):
            self.index[s].setdefault(name, []).append(i)
        self.names_of = {s: tuple(by_name) for s, by_name in self.index.items()}

    @staticmethod
    def cut(sheet, index):
        """A tile at its full size, as a Pillow image."""
        x, y = (index % COLUMNS) * TILE, (index // COLUMNS) * TILE
        return sheet.crop((x, y, x + TILE, y + TILE))

    @classmethod
    def tile(cls, sheet, index, size):
        """A tile, resized with premultiplied alpha: no colour of transparent pixels leaks in."""
        resample = Image.BOX if size < TILE else Image.BICUBIC
        tile = cls.cut(sheet, index).resize((size, size), resample)
        return np.asarray(tile.convert("RGBA"))

    def find(self, name, set_name):
        """Index of a name's first drawing. Raises ValueError if the set does not have the name."""
        if name not in self.index.get(set_name, ()):
            raise ValueError(f"no drawing {name!r} in {set_name}")
        return self.index[set_name][name][0]

    def content(self, i, rng=None):
        """Content phrase of drawing i; with rng, sometimes with a synonym, "the" or no article."""
        return scenes.phrase(Scene((self.names[i],)), rng)

    def batch(self, n, rng, resolution):
        """n scenes, each in a style of its own.

        rng: a numpy Generator, the only source of randomness. Returns uint8 (n, resolution,
        resolution, 3) and n captions. With compose and without bare, more than a third of them name
        no style and more than a quarter say "in [V*] style".
        """
        images = []
        captions = []
        bare = self.bare > 0 and rng.random() < self.bare
        for _ in range(n):
            i = int(rng.random() * len(self.names))          # with compose: to choose an icon set
            scene = Scene((self.names[i],))
            if self.compose:
                scene = scenes.sample(rng, names=self.names_of[self.sets[i]])
            style = self.sample_style(scene, rng)
            rgba = scenes.draw(scene, self, rng, resolution, self.sets[i])
            styled = not styles.is_plain(style)
            if self.compose and styled and rng.random() < MOVED:
                smallest = 0.5 if scene.count == len(scene.things) == 1 else 0.8
                rgba = drawing.place_anywhere(rgba, rng, smallest)
            images.append(styles.apply(style, rgba, rng))
            content = scenes.phrase(scene, rng)
            style_words = styles.phrase(style, self.style_phrases[i], rng)
            if self.compose and rng.random() < RARE and content.startswith("a "):
                content = content.replace("a ", "a [V] ", 1)
            is_single = scene == Scene(scene.things[:1])     # one object, not coloured
            if self.compose and rng.random() < GENERIC and is_single:
                content = "an object"
            if self.compose and styled and not style_words and rng.random() < SOME_STYLE:
                style_words = RARE_TOKEN
            captions.append(style_prompt(content, "" if bare else style_words))
        return np.stack(images), captions

    def sample_style(self, scene, rng):
        """A style for a scene. Where captions name colours, it is one that leaves them visible."""
        if not scene.colours:
            return styles.sample(rng, plain=self.plain)
        style = styles.sample(rng, plain=self.plain, free=0)
        return styles.keep_colours(style, scene.colours)

    def words(self):
        """All words of the captions, sorted."""
        return words()

    def prompts(self, n):
        """n prompts for sheets of samples, always the same ones; every second one names a style."""
        rng = np.random.default_rng(0)
        picks = rng.integers(len(self.names), size=n)
        style_phrases = [styles.phrase(styles.sample(rng), self.style_phrases[i]) for i in picks]
        prompts = []
        for k, i in enumerate(picks):
            style_words = style_phrases[k] if k % 2 == 1 else ""
            prompts.append(style_prompt(self.content(i), style_words))
        return prompts
