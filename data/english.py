"""The words for the drawings: a tile's name as a noun, its article, its plural, its synonyms.

    content_phrase("hot-air-balloon")      "a hot air balloon"
    plural("glass of milk")                "glasses of milk"
    meanings()["tree"]                     ("deciduous-tree", "evergreen-tree", "leafless-tree")
"""

import csv
import functools
import re
from pathlib import Path

HERE = Path(__file__).parent

NO_ARTICLE = set("""bacon broccoli cheese chocolate corn fire fog garlic ginger honey ice jeans
    lightning milk money oil popcorn rice sake salt sushi sunshine tempura thread water wood yarn
    tea butter sheep-wool luggage spaghetti sashimi curry-rice cooked-rice bread wc badminton
    bowling camping construction cooking coral dna ice-hockey field-hockey lacrosse ping-pong tennis
    high-voltage soap skis oden beer coffee confetti champagne curry cutlery earth fruit-juice
    lettuce mail maize meat medicine music pasta planet-earth rain ramen saturn snow
    table-tennis toilet-paper treasure whiskey wine green-tea french-bread ginger-root
    performing-arts bamboo father-christmas people santa santa-claus""".split())
IRREGULAR = {"foggy": "a foggy city", "headphone": "headphones",
             "hourglass-done": "an hourglass",
             "hourglass-not-done": "an hourglass with flowing sand",
             "locked": "a padlock", "locked-with-key": "a padlock with key",
             "locked-with-pen": "a padlock with pen", "money-with-wings": "money with wings",
             "mount-fuji": "mount fuji", "pouring-liquid": "pouring liquid",
             "unlocked": "an open padlock", "x-ray": "an x ray"}
SINGULAR = ("ss", "us", "is", "rhinoceros", "tennis", "abacus", "lens", "chess", "dice", "gas",
            "triceratops")
AFTER_HEAD = re.compile(" (with|without|of|in|on|and|at|from|to|showing|facing up|behind|tilted|"
                        "fluttering|increasing|decreasing|biking|bowing|cartwheeling|climbing|"
                        "cycling|dancing|fencing|golfing|holding|juggling|kneeling|lifting|"
                        "meditating|raising|riding|rowing|running|shrugging|sitting|sleeping|"
                        r"standing|sticking|surfing|swimming|walking)\b")
PLURALS = {word: word for word in """fish sheep deer moose bison squid shrimp dice blowfish
    jellyfish angelfish goldfish starfish""".split()} | dict(
    pair.split(":") for pair in """mouse:mice goose:geese
    ox:oxen snowman:snowmen leaf:leaves knife:knives wolf:wolves loaf:loaves scarf:scarves
    sheaf:sheaves cactus:cacti potato:potatoes tomato:tomatoes mosquito:mosquitoes
    volcano:volcanoes die:dice mango:mangoes tornado:tornadoes buffalo:buffaloes person:people
    woman:women man:men gentleman:gentlemen fireman:firemen spaceman:spacemen child:children
    businessperson:businesspeople foot:feet tooth:teeth elf:elves hero:heroes superhero:superheroes
    bookshelf:bookshelves""".split())


def head(words):
    """The part of a noun phrase that takes the plural: "glass of milk" -> "glass"."""
    return AFTER_HEAD.split(words)[0]


def content_phrase(name):
    """A tile's name as a content phrase: "hot-air-balloon" -> "a hot air balloon"."""
    if name in IRREGULAR:
        return IRREGULAR[name]
    words = name.replace("-", " ")
    main = head(words)
    if main.replace(" ", "-") in NO_ARTICLE or (main.endswith("s") and not main.endswith(SINGULAR)):
        return words
    starts_with_vowel = words[0] in "aeiou" or words == "suv"
    sounds_like_consonant = words.startswith(("uni", "us", "one ", "ufo", "eu", "ewe"))
    vowel = starts_with_vowel and not sounds_like_consonant
    return f"{'an' if vowel else 'a'} {words}"


def noun(name):
    """The content phrase without its article."""
    return content_phrase(name).removeprefix("a ").removeprefix("an ")


def is_countable(name):
    """False for names that are plural or uncountable already: "glasses", "broccoli"."""
    return noun(name) != content_phrase(name)


def plural(words):
    """A noun phrase in the plural: "house with garden" -> "houses with garden"."""
    first = head(words)
    before, space, last = first.rpartition(" ")
    if last in PLURALS:
        many = PLURALS[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        many = last + "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        many = last[:-1] + "ies"
    else:
        many = last + "s"
    return before + space + many + words[len(first):]


def read_table(name):
    """Rows of a table of this folder, as dicts."""
    with open(HERE / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@functools.lru_cache(None)
def names():
    """The names of all drawings of the training sets, sorted."""
    held_out = {row["set"] for row in read_table("sets.tsv") if row["role"] != "training"}
    return sorted({row["name"] for row in read_table("names.tsv") if row["set"] not in held_out})


@functools.lru_cache(None)
def synonyms():
    """name -> other words for it, from keywords.tsv."""
    return {row["name"]: row["synonyms"].split(", ") for row in read_table("keywords.tsv")}


@functools.lru_cache(None)
def meanings():
    """{noun: all names that it can mean}: a word such as "book" is a synonym of several names."""
    names_of = {}
    for name in names():
        for word in (name, *synonyms().get(name, ())):
            names_of.setdefault(noun(word), []).append(name)
    return {word: tuple(dict.fromkeys(meant)) for word, meant in names_of.items()}
