"""Scenes: what a picture shows and the words that say it, drawn together from one generator.

    Scene(("automobile",), ("red",))                    "a red car"
    Scene(("cat",), count=2)                            "two cats", or "cats"
    Scene(("automobile", "dog"), ("red", ""))           "a red automobile and a dog": left, right

    scene = sample(rng)                                 # held_out=True: what training never shows
    rgba, words = draw(scene, art, rng, 64), phrase(scene, rng)

No draw from rng depends on the size, and all places are whole 64ths of the side: the same seed
gives the same scene at 64 and at 128 pixels.
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
UNNUMBERED = 0.35            # share of the captions of several that do not say how many
ARTICLES = {"a": 0.8, "the": 0.1, "": 0.1}
SYNONYM = 0.4                # chance of another word for an object that has some

# Whole views and signs: no colour of their own, no plural, no place beside something else
VIEWS = set("""airplane-arrival airplane-departure beach-with-umbrella bridge-at-night camping
    cityscape cityscape-at-dusk desert desert-island elevator fireworks flower-playing-cards fog
    foggy houses landslide map-of-japan milky-way moon-viewing-ceremony motorway mountain-cableway
    mountain-railway national-park night-with-stars railway-track shooting-star sparkler
    statue-of-liberty station sunrise sunrise-over-mountains sunset suspension-railway wedding
    world-map""".split())
UNCOUNTED = set("""building-construction canned-food chart-decreasing chart-increasing
    chart-increasing-with-yen cricket-game leafy-green speaker-high-volume speaker-low-volume
    speaker-medium-volume""".split())                       # odd in the plural
ONE_COLOUR = set("""rainbow tangerine artist-palette horizontal-traffic-light
    vertical-traffic-light zebra""".split())
COLOUR_WORDS = {*COLOURS, "gold", "golden", "silver", "cream", "teal", "navy"}


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
    """Which of some names may be what: {kind: names}."""
    apart = [n for n in names if n not in VIEWS and "-and-" not in n]
    return {"one": names, "two": apart, "coloured": [n for n in apart if takes_colour(n)],
            "several": [n for n in apart if takes_number(n)]}


def takes_number(name):
    """Whether there can be two of it: not of a view, nor of "scissors" or "hammer and pick"."""
    odd = name in VIEWS | UNCOUNTED or "-and-" in name or name[0].isdigit()
    return english.is_countable(name) and not odd


@functools.lru_cache(None)
def takes_colour(name):
    """Whether it can be painted: not a view, nor what is called by a colour already."""
    return name not in VIEWS | ONE_COLOUR and not COLOUR_WORDS & set(name.split("-"))


@functools.lru_cache(None)
def is_pair_held_out(a, b):
    return zlib.crc32(f"{a}|{b}".encode()) % 5 == 0


def is_held_out(scene):
    """True for what the base never sees: a fifth of all pairs of colour and object, or two objects.

    A pair is held out where the CRC-32 of its words divides by 5, as in styles.py; two objects in
    either order. Objects go by the names of their tiles, whatever words a caption has for them.
    """
    return any(c and is_pair_held_out(c, name) for c, name in zip(scene.colours, scene.things)) or (
        len(scene.things) == 2 and is_pair_held_out(*sorted(scene.things)))


def sample(rng, held_out=False, names=None, kind=None):
    """A random Scene, held out of training or not, as asked.

    names: tuple of the tiles to choose from (all). kind: one of KINDS, drawn by its share if None;
    a held-out scene is then "coloured" or "two".
    """
    pool = pools(tuple(english.names()) if names is None else names)
    if kind is None:
        kind = pick(rng, {k: KINDS[k] for k in ("coloured", "two")} if held_out else KINDS)
    elif held_out and kind == "one":
        raise ValueError("one object without a colour is never held out; "
                         "ask for coloured, several or two")
    must = kind == "coloured" or held_out and kind == "several"
    chance = 1 if must else ALSO_COLOURED.get(kind, 0)
    painted = [rng.random() < chance for _ in range(2 if kind == "two" else 1)]
    while True:                 # only the values are drawn again, so that each kind keeps its share
        things = tuple(pool[kind][int(rng.random() * len(pool[kind]))] for _ in painted)
        colours = tuple(HUES[int(rng.random() * len(HUES))] if p else "" for p in painted)
        count = 2 + int(rng.random() * 3) if kind == "several" else 1
        scene = Scene(things, colours if any(painted) else (), count)
        fits = len(set(things)) == len(things)
        fits &= all(takes_colour(name) for name, p in zip(things, painted) if p)
        if fits and is_held_out(scene) == held_out:
            return scene


def pick(rng, shares):
    """A key of {key: share}, by its share."""
    u = rng.random() * sum(shares.values())
    for key, share in shares.items():
        u -= share
        if u < 0:
            return key
    return key


# ---------------------------------------------------------------------------------------------
# Its words

def phrase(scene, rng=None):
    """The content phrase. With rng, as captions have it: synonyms, "the", "cats" for "two cats"."""
    words = [english.noun(name) for name in scene.things]
    if rng is not None:
        others = [other_word(name, scene, rng) or word for name, word in zip(scene.things, words)]
        if len(set(others)) == len(others) and keeps_the_rule(scene, others):
            words = others
    article = "a" if rng is None else pick(rng, ARTICLES)
    colours = scene.colours or ("",) * len(words)
    numbered = rng is None or rng.random() > UNNUMBERED
    if scene.count > 1 and not numbered:                    # "green notes" may be one tile's name
        numbered = is_ambiguous(scene, noun_phrase(words[0], colours[0], scene.count, "", False))
    return " and ".join(noun_phrase(word, colour, scene.count, article, numbered)
                        for word, colour in zip(words, colours))


def noun_phrase(word, colour, count, article, numbered):
    """noun_phrase("apple", "red", 3, "the", True) -> "the three red apples"."""
    the = "the" if article == "the" else ""
    if count > 1:
        parts = the, NUMBERS[count] if numbered else "", colour, english.plural(word)
    else:
        whole = english_phrase(word)
        if article == "a" and whole != word:                # "an apple", "a red apple"
            the = "an" if colour == "orange" or not colour and whole.startswith("an ") else "a"
        parts = the, colour, word
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
    word = words[int(rng.random() * len(words))]
    wrong = scene.count > 1 and english_phrase(word) == word
    wrong |= any(scene.colours) and bool(COLOUR_WORDS & set(word.split()))
    return "" if wrong or len(scene.things) == 2 and " and " in word else word


def keeps_the_rule(scene, words):
    """False where the words may also mean a scene across the line between training and held out.

    Were a red train held out and a red bullet train not, that would never be called "a red train".
    """
    held_out, meant = is_held_out(scene), [english.meanings().get(word, ()) for word in words]
    return all(is_held_out(Scene(things, scene.colours)) == held_out
               for things in itertools.product(*meant) if len(set(things)) == len(things))


def is_ambiguous(scene, words):
    """Whether a plural without a number may also mean one coloured object across the line.

    Three green "musical-note" are "green musical notes", and so is one green "musical-notes".
    """
    colour, _, noun = words.partition(" ")
    return colour in COLOURS and any(is_held_out(Scene((name,), (colour,))) != is_held_out(scene)
                                     for name in english.meanings().get(noun, ()))


# ---------------------------------------------------------------------------------------------
# Its picture

def draw(scene, art, rng, size, set_name=None):
    """The scene from drawings of one set of `art` -> uint8 (size, size, 4), straight alpha.

    set_name: whose drawings; else any set that has all of it. Art's `smallest` and `bent` hold.
    """
    sets = [s for s in art.index if all(name in art.index[s] for name in scene.things)]
    if set_name is None and sets:
        set_name = sets[int(rng.random() * len(sets))]
    if set_name not in sets:
        raise ValueError(f"no set of this Art draws {' and '.join(scene.things)}"
                         + (f" ({set_name})" if set_name else ""))
    drawings, boxes = [], []
    for name, colour in itertools.zip_longest(scene.things, scene.colours, fillvalue=""):
        i = art.index[set_name][name]
        drawing = bend(art.drawings[i], rng, art.bent) if art.bent else art.drawings[i]
        boxes.append(inked(Image.fromarray(drawing)) if art.bent else art.boxes[i])
        drawings.append(recolour(drawing, colour, art.middles[i]) if colour else drawing)
    if len(drawings) == scene.count == 1:
        return place_one(drawings[0], size, rng, art.smallest)
    shown = [0] * scene.count if scene.count > 1 else [0, 1]
    frame = np.zeros((size, size, 4), np.uint8)
    for k, (x, y, w, h) in zip(shown, layout([boxes[k] for k in shown], rng)):
        left, top, right, bottom = (v * size // 64 for v in (x, y, x + w, y + h))
        frame[top:bottom, left:right] = scaled(drawings[k], (right - left, bottom - top), boxes[k])
    return frame
