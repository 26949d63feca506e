"""Scenes: what a picture shows, and the words that say it, from one generator.

    Scene(("automobile",), ("red",))                    "a red car"
    Scene(("cat",), count=2)                            "two cats", or "cats"
    Scene(("automobile", "dog"), ("red", ""))           "a red automobile and a dog": left, right

    scene = sample(rng)                                 # held_out=True: what training never shows
    rgba, words = draw(scene, art, rng, 64), phrase(scene, rng)

The random draws do not depend on the size, and all places are whole 64ths of the side, so the same
seed gives the same scene at 64 and at 128 pixels.
"""

import functools
import itertools
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from . import english
from .drawing import COLOURS, bend, inked, layout, place_one, recolour, scaled

HUES = tuple(COLOURS)
NUMBERS = {2: "two", 3: "three", 4: "four"}
KINDS = {"one": 0.47, "coloured": 0.17, "several": 0.22, "two": 0.14}   # shares of the pictures
ALSO_COLOURED = {"several": 0.35, "two": 0.2}   # chance of a colour in these (two: for each)
UNNUMBERED = 0.35            # share of captions of several objects that do not say how many
ARTICLES = {"a": 0.8, "the": 0.1, "": 0.1}
SYNONYM = 0.4                # chance of another word for an object that has some

# Views and signs: they are not recoloured, have no plural, and do not stand next to other objects
VIEWS = set("""airplane-arrival airplane-departure beach-with-umbrella bridge-at-night camping
    cityscape cityscape-at-dusk desert desert-island elevator fireworks flower-playing-cards fog
    foggy houses landslide map-of-japan milky-way moon-viewing-ceremony motorway mountain-cableway
    mountain-railway national-park night-with-stars railway-track shooting-star sparkler
    statue-of-liberty station sunrise sunrise-over-mountains sunset suspension-railway wedding
    world-map""".split())
UNCOUNTED = set("""building-construction canned-food chart-decreasing chart-increasing
    chart-increasing-with-yen cricket-game leafy-green speaker-high-volume speaker-low-volume
    speaker-medium-volume thumbs-down thumbs-up""".split())     # odd in the plural
NEVER_RECOLOURED = set("""rainbow tangerine artist-palette horizontal-traffic-light
    vertical-traffic-light zebra""".split())
COLOUR_WORDS = {*COLOURS, "gold", "golden", "silver", "cream", "teal", "navy"}
# On the sheets of people, but not people: these can be recoloured
NOT_PEOPLE = set("""alien alien-monster anatomical-heart bone brain broken-heart footprints ghost
    lungs robot skull skull-and-crossbones tooth""".split())


@dataclass(frozen=True)
class Scene:
    """One object, several of it, or two side by side."""
    things: tuple            # one or two names of tiles, left to right
    colours: tuple = ()      # a word of COLOURS for each, "" as drawn; () for none
    count: int = 1           # of the one object, up to 4


# ---------------------------------------------------------------------------------------------
# What is drawn

@functools.lru_cache(None)
def pools(names):
    """{kind of scene: those of `names` that it can show}."""
    apart = [n for n in names if n not in VIEWS and "-and-" not in n]
    return {"one": names, "two": apart, "coloured": [n for n in apart if takes_colour(n)],
            "several": [n for n in apart if takes_number(n)]}


def takes_number(name):
    """Can a caption count it ("two cats")? Not a view, nor "scissors" or "hammer and pick"."""
    odd = name in VIEWS | UNCOUNTED or "-and-" in name or name[0].isdigit()
    return english.is_countable(name) and not odd


@functools.lru_cache(None)
def people():
    """The names of people, their faces and hands, which are never recoloured ("a red man")."""
    sheets = {row["name"] for row in english.read_table("names.tsv")
              if row["sheet"].endswith("-people")}
    return (sheets | {"man-sitting", "woman-sitting"}) - NOT_PEOPLE


@functools.lru_cache(None)
def takes_colour(name):
    """Can it be recoloured? Not a person, not a view, and nothing whose name contains a colour."""
    if name in VIEWS | NEVER_RECOLOURED | people():
        return False
    return not COLOUR_WORDS & set(name.split("-"))


@functools.lru_cache(None)
def is_pair_held_out(a, b):
    return zlib.crc32(f"{a}|{b}".encode()) % 5 == 0


def is_held_out(scene):
    """Is a scene held out of training? A fifth of colour-object pairs and object pairs are.

    A pair is held out where the CRC-32 of its words is divisible by 5, as in styles.py; two objects
    in either order. Objects go by the names of their tiles, whatever a caption calls them.
    """
    for colour, name in zip(scene.colours, scene.things):
        if colour and is_pair_held_out(colour, name):
            return True
    return len(scene.things) == 2 and is_pair_held_out(*sorted(scene.things))


def sample(rng, held_out=False, names=None, kind=None):
    """A random Scene, held out of training or not, as asked.

    names: tuple of the tiles to choose from (default: all). kind: one of KINDS, by default a random
    one by its share; a held-out scene is then "coloured" or "two".
    """
    if names is None:
        names = tuple(english.names())
    if held_out and kind == "one":
        raise ValueError("one object without a colour is never held out; "
                         "ask for coloured, several or two")
    if kind is None:
        shares = KINDS
        if held_out:
            shares = {name: KINDS[name] for name in ("coloured", "two")}
        kind = pick(rng, shares)
    pool = pools(names)[kind]
    chance = ALSO_COLOURED.get(kind, 0)
    if kind == "coloured" or (held_out and kind == "several"):
        chance = 1
    objects = 2 if kind == "two" else 1
    painted = [rng.random() < chance for _ in range(objects)]
    while True:                 # only the values are sampled again, so each kind keeps its share
        things = tuple(random_choice(rng, pool) for _ in painted)
        colours = tuple(random_choice(rng, HUES) if paint else "" for paint in painted)
        count = 1
        if kind == "several":
            count = 2 + int(rng.random() * 3)
        if not any(painted):
            colours = ()
        scene = Scene(things, colours, count)
        if is_possible(scene) and is_held_out(scene) == held_out:
            return scene


def is_possible(scene):
    """Are the objects different, and can those with a colour be painted?"""
    if len(set(scene.things)) < len(scene.things):
        return False
    return all(takes_colour(name) for name, colour in zip(scene.things, scene.colours) if colour)


def random_choice(rng, values):
    """One of a sequence of values."""
    return values[int(rng.random() * len(values))]


def pick(rng, shares):
    """A random key of {key: share}, by its share."""
    rest = rng.random() * sum(shares.values())
    for key, share in shares.items():
        rest -= share
        if rest < 0:
            return key
    return key


# ---------------------------------------------------------------------------------------------
# Its words

def phrase(scene, rng=None):
    """The content phrase. With rng it varies: synonyms, "the", "cats" for "two cats"."""
    words = [english.noun(name) for name in scene.things]
    article = "a"
    numbered = True
    if rng is not None:
        others = [other_word(name, scene, rng) or word for name, word in zip(scene.things, words)]
        if len(set(others)) == len(others) and keeps_the_rule(scene, others):
            words = others
        article = pick(rng, ARTICLES)
        numbered = rng.random() > UNNUMBERED
    colours = scene.colours or ("",) * len(words)
    if scene.count > 1 and not numbered:                    # "green notes" may be one tile's name
        plural = noun_phrase(words[0], colours[0], scene.count, "", False)
        numbered = is_ambiguous(scene, plural)
    phrases = [noun_phrase(word, colour, scene.count, article, numbered)
               for word, colour in zip(words, colours)]
    return " and ".join(phrases)


def noun_phrase(word, colour, count, article, numbered):
    """noun_phrase("apple", "red", 3, "the", True) -> "the three red apples"."""
    first = "the" if article == "the" else ""
    if count > 1:
        number = NUMBERS[count] if numbered else ""
        parts = first, number, colour, english.plural(word)
    else:
        whole = english_phrase(word)
        if article == "a" and whole != word:
            first = whole.split(" ")[0]                     # "an apple"
            if colour:
                first = "an" if colour == "orange" else "a"          # "a red apple"
        parts = first, colour, word
    return " ".join(part for part in parts if part)


@functools.lru_cache(None)
def english_phrase(word):
    """A noun with its article, if it takes one."""
    for name, whole in english.IRREGULAR.items():
        if english.noun(name) == word:
            return whole
    return english.content_phrase(word.replace(" ", "-"))


def other_word(name, scene, rng):
    """A synonym of an object of the scene that can take its colour and number, or ""."""
    words = english.synonyms().get(name)
    if not words or rng.random() >= SYNONYM:
        return ""
    word = random_choice(rng, words)
    if scene.count > 1 and english_phrase(word) == word:    # it has no plural
        return ""
    if any(scene.colours) and COLOUR_WORDS & set(word.split()):
        return ""
    if len(scene.things) == 2 and " and " in word:
        return ""
    return word


def keeps_the_rule(scene, words):
    """True unless the words could also mean a scene on the other side of the held-out split.

    If a red train is held out and a red bullet train is not, the latter is never called "a red
    train".
    """
    held_out = is_held_out(scene)
    meanings = [english.meanings().get(word, ()) for word in words]
    for things in itertools.product(*meanings):
        is_scene = len(set(things)) == len(things)
        if is_scene and is_held_out(Scene(things, scene.colours)) != held_out:
            return False
    return True


def is_ambiguous(scene, words):
    """Could a plural without a number also mean one coloured object on the other side of the split?

    Three green "musical-note" are "green musical notes", and so is one green "musical-notes".
    """
    colour, _, noun = words.partition(" ")
    if colour not in COLOURS:
        return False
    held_out = is_held_out(scene)
    return any(is_held_out(Scene((name,), (colour,))) != held_out
               for name in english.meanings().get(noun, ()))


# ---------------------------------------------------------------------------------------------
# Its picture

def draw(scene, art, rng, size, set_name=None):
    """Draw the scene with drawings of one set of `art` -> uint8 (size, size, 4), straight alpha.

    set_name: that set; by default a random one that has all drawings. `art.smallest` and `art.bent`
    apply. Raises ValueError if no set has all of them.
    """
    sets = [s for s in art.index if all(name in art.index[s] for name in scene.things)]
    if set_name is None and sets:
        set_name = random_choice(rng, sets)
    if set_name not in sets:
        where = f" ({set_name})" if set_name else ""
        raise ValueError(f"no set of this Art has {' and '.join(scene.things)}{where}")
    drawings = []
    boxes = []
    for name, colour in itertools.zip_longest(scene.things, scene.colours, fillvalue=""):
        candidates = art.index[set_name][name]
        i = candidates[0]
        if len(candidates) > 1:
            i = random_choice(rng, candidates)
        drawing = art.drawings[i]
        box = art.boxes[i]
        if art.bent:
            drawing = bend(drawing, rng, art.bent)
            box = inked(Image.fromarray(drawing))
        if colour:
            drawing = recolour(drawing, colour, art.middles[i])
        drawings.append(drawing)
        boxes.append(box)
    if len(drawings) == 1 and scene.count == 1:
        return place_one(drawings[0], size, rng, art.smallest)

    indices = [0] * scene.count                              # of drawings, one for each place
    if len(drawings) == 2:
        indices = [0, 1]
    frame = np.zeros((size, size, 4), np.uint8)
    places = layout([boxes[k] for k in indices], rng)
    for k, (x, y, width, height) in zip(indices, places):
        left = x * size // 64
        top = y * size // 64
        right = (x + width) * size // 64
        bottom = (y + height) * size // 64
        frame[top:bottom, left:right] = scaled(drawings[k], (right - left, bottom - top), boxes[k])
    return frame
