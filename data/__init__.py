"""The art: sprite sheets with their names, the words for them, and the pictures of the user.

    art = Art(size=64)                                  # the training sets
    images, captions = art.batch(16, rng, 64)           # uint8 (16, 64, 64, 3), 16 strings
    images, captions = Folder("my/pictures").batch(...) # the same from your own

A training example is a drawing, seven times in ten in a style drawn afresh (styles.py). All images are RGB uint8.
"""

import csv
import functools
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from . import styles

HERE = Path(__file__).parent
TILE, COLUMNS = 128, 30                                 # pixels a side of a tile, tiles in a row of a sheet
MAX_PIXELS = 64_000_000                                 # of a picture we agree to open


# ---------------------------------------------------------------------------------------------
# Words

NO_ARTICLE = set("""bacon broccoli cheese chocolate corn fire flame fog garlic ginger honey ice jeans lightning milk
    money oil popcorn rice sake salt sushi sunshine tempura thread water wood yarn tea butter sheep-wool luggage
    spaghetti sashimi curry-rice cooked-rice bread wc badminton bowling camping construction cooking coral dna ice-hockey
    field-hockey lacrosse ping-pong tennis high-voltage soap skis oden""".split())
IRREGULAR = {"foggy": "a foggy city", "headphone": "headphones",
             "hourglass-done": "an hourglass", "hourglass-not-done": "an hourglass with flowing sand",
             "locked": "a padlock", "locked-with-key": "a padlock with key", "locked-with-pen": "a padlock with pen",
             "money-with-wings": "money with wings", "mount-fuji": "mount fuji", "pouring-liquid": "pouring liquid",
             "unlocked": "an open padlock", "x-ray": "an x ray"}
SINGULAR = ("ss", "us", "is", "rhinoceros", "tennis", "abacus", "lens", "chess", "dice", "gas")          # end in s, yet are one thing


def content_phrase(name):
    """A tile's name as a content phrase: "hot-air-balloon" -> "a hot air balloon", "glasses" -> "glasses"."""
    if name in IRREGULAR:
        return IRREGULAR[name]
    words = name.replace("-", " ")
    head = words.split(" with ")[0].split(" of ")[0].split(" in ")[0].split(" on ")[0].split(" and ")[0]
    if words in NO_ARTICLE or name in NO_ARTICLE or (head.endswith("s") and not head.endswith(SINGULAR)):
        return words
    vowel = words[0] in "aeiou" and not words.startswith(("uni", "us", "one ", "ufo", "eu", "ewe"))
    return f"{'an' if vowel else 'a'} {words}"


def read_table(name):
    with open(HERE / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@functools.lru_cache(None)
def names():
    """All names the base may have met, sorted."""
    held_out = {row["set"] for row in read_table("sets.tsv") if row["role"] != "training"}
    return sorted({row["name"] for row in read_table("names.tsv") if row["set"] not in held_out})


@functools.lru_cache(None)
def synonyms():
    """name -> other words for it, from keywords.tsv."""
    return {row["name"]: row["synonyms"].split(", ") for row in read_table("keywords.tsv")}


def caption(content, style):
    """The paper's template (Section 3.2.1): "{content} in {style} style"; content alone without a style."""
    return f"{content} in {style} style" if style else content


# ---------------------------------------------------------------------------------------------
# Sources of training pictures

class Art:
    """The drawings of some sets, as uint8 (n, size, size, 4) with straight alpha, in `.drawings`.

    sets: names from sets.tsv; by default all of a role ("training" or "held-out"). `.names`, `.sets`
    and `.hands` (the set's style phrase) go along with them. smallest: batches place each drawing a
    little differently (`jitter`); None: as it is. bare: share of the batches whose captions name no style
    at all, so that only what they show tells their pictures apart. plain: share of drawings that keep their own.
    bent: how much each drawing is bent as well (`bend`).
    """

    def __init__(self, sets=None, role="training", size=64, smallest=None, bare=0.0, plain=styles.PLAIN, bent=0.0):
        self.smallest, self.bare, self.plain, self.bent = smallest, bare, plain, bent
        table = {row["set"]: row for row in read_table("sets.tsv")}
        sets = [s for s, row in table.items() if row["role"] == role] if sets is None else list(sets)
        for s in sets:
            if s not in table:
                raise ValueError(f"no set {s!r} in data/sets.tsv; there are {', '.join(table)}")
        rows = [row for row in read_table("names.tsv") if row["set"] in sets]
        self.names, self.sets = [row["name"] for row in rows], [row["set"] for row in rows]
        self.hands = [table[s]["style"] for s in self.sets]
        sheets = {s: Image.open(HERE / "sheets" / f"{s}.webp").convert("RGBa") for s in sets}   # premultiplied
        self.drawings = np.stack([self.tile(sheets[row["set"]], int(row["tile"]), size) for row in rows])

    @staticmethod
    def tile(sheet, index, size):
        """Scaled while its colour is multiplied by alpha: the invisible colour around it cannot leak in."""
        x, y = index % COLUMNS * TILE, index // COLUMNS * TILE
        tile = sheet.crop((x, y, x + TILE, y + TILE)).resize((size, size), Image.BOX if size < TILE else Image.BICUBIC)
        return np.asarray(tile.convert("RGBA"))

    def find(self, name, set_name):
        """Index of a drawing. Raises ValueError if the set does not have that name."""
        for i, pair in enumerate(zip(self.names, self.sets)):
            if pair == (name, set_name):
                return i
        raise ValueError(f"no drawing {name!r} in {set_name}")

    def content(self, i, rng=None):
        """Content phrase of drawing i; with rng, one time in five by another word for it."""
        others = synonyms().get(self.names[i])
        return content_phrase(str(rng.choice(others)) if others and rng is not None and rng.random() < 0.2 else self.names[i])

    def things(self):
        """{name: its drawings as they are, uint8 (k, size, size, 3)}, and under "" one blank sheet."""
        found = {"": [np.full_like(self.drawings[0, ..., :3], 255)]}
        for name, drawing in zip(self.names, self.drawings):
            found.setdefault(name, []).append(styles.apply(styles.Style(), drawing, np.random.default_rng(0)))
        return {name: np.stack(pictures) for name, pictures in found.items()}

    def wording(self, name, rng):
        """One of many ways to ask for a thing: articles, adjectives, unknown words, any style. "" asks for nothing."""
        content = self.content(self.names.index(name), rng) if name else ""
        bare = content.split(" ", 1)[-1] if content.startswith(("a ", "an ")) else content
        article, adjective = rng.choice(["a", "the", "my", "one", "[V]"]), rng.choice([*styles.HUES, "small", "big", "old", unknown(rng)])
        content = rng.choice([content] * 4 + [bare, f"{article} {bare}", f"a {adjective} {bare}"]) if name else ""
        style = styles.phrase(styles.sample(rng, plain=0), rng.choice(["", *self.hands]))
        style = rng.choice(["", style, style, "[V*]", f"{unknown(rng)} {unknown(rng)}"])
        return (f"a {style} of {content}" if style and rng.random() < 0.1 else str(caption(content, style))).strip()

    def batch(self, n, rng, resolution):
        """n drawings, each in a style of its own.

        rng: numpy Generator, the only source of chance. Returns uint8 (n, resolution, resolution, 3)
        and n captions, one in four without a word of style.
        """
        images, captions = [], []
        bare = self.bare > 0 and rng.random() < self.bare
        for i in rng.integers(len(self.names), size=n):
            style = styles.sample(rng, plain=self.plain)
            drawing = bend(self.drawings[i], rng, self.bent) if self.bent else self.drawings[i]
            drawing = jitter(drawing, resolution, rng, self.smallest) if self.smallest else drawing
            images.append(styles.apply(style, drawing, rng))
            captions.append(caption(self.content(i, rng), "" if bare else styles.phrase(style, self.hands[i], rng)))
        return np.stack(images), captions

    def prompts(self, n):
        """n captions to draw samples for, always the same: half without, half with style words."""
        rng = np.random.default_rng(0)
        picks = rng.integers(len(self.names), size=n)
        return [caption(self.content(i), styles.phrase(styles.sample(rng), self.hands[i]) if k % 2 else "")
                for k, i in enumerate(picks)]


class Folder:
    """A user's own pictures: a folder with NAME.txt beside each NAME.png, or captions.tsv (file, caption).

    Raises ValueError in one line where the folder, a picture or a caption is missing.
    """

    SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}

    def __init__(self, path, size=64):
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder of pictures")
        table = path / "captions.tsv"
        if table.exists():
            rows = [line.split("\t") for line in read_words(table).splitlines() if line.strip()]
            pairs = [(path / row[0].strip(), " ".join(row[1:]).strip()) for row in rows if row[0].strip() != "file"]
        else:
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in self.SUFFIXES)
            for file in files:
                if not file.with_suffix(".txt").exists():
                    raise ValueError(f"{file} has no caption: write {file.with_suffix('.txt').name} beside it")
            pairs = [(file, read_words(file.with_suffix(".txt"))) for file in files]
        if not pairs:
            raise ValueError(f"{path} holds no pictures with captions")
        for file, words in pairs:
            if not words:
                raise ValueError(f"{file} has an empty caption: say what it shows")
        self.images = np.stack([read_image(file, size) for file, _ in pairs])
        self.captions = [words for _, words in pairs]

    def things(self):
        """As Art.things; what has the same caption is one thing, and the first 2,000 captions are known by heart."""
        found = {"": [np.full_like(self.images[0], 255)]}
        for image, words in zip(self.images, self.captions):
            if words in found or len(found) <= 2000:
                found.setdefault(words, []).append(image)
        return {words: np.stack(pictures) for words, pictures in found.items()}

    def wording(self, words, rng):
        """The caption, or the caption in a style without words."""
        return str(caption(words, rng.choice(["", "[V*]", unknown(rng)]))).strip()

    def batch(self, n, rng, resolution):
        """As Art.batch; the pictures keep the style they have."""
        picks = rng.integers(len(self.images), size=n)
        images = [np.asarray(Image.fromarray(self.images[i]).resize((resolution,) * 2, Image.BICUBIC)) for i in picks]
        return np.stack(images), [self.captions[i] for i in picks]

    def prompts(self, n):
        return [self.captions[i % len(self.captions)] for i in range(n)]


def read_words(path):
    """A text file of the user's, without a byte-order mark. Raises ValueError in one line if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None


def unknown(rng):
    """A word that nobody knows."""
    return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz0123456789*[]<>"), size=rng.integers(1, 7)))


def jitter(rgba, size, rng, smallest=0.9):
    """The drawing (h, h, 4) at `smallest` to 1 times a transparent frame (size, size, 4), somewhere in it."""
    side = round(size * rng.uniform(smallest, 1))
    tile = Image.fromarray(rgba).convert("RGBa").resize((side, side), Image.BICUBIC).convert("RGBA")
    frame = np.zeros((size, size, 4), np.uint8)
    x, y = rng.integers(size - side + 1, size=2)
    frame[y:y + side, x:x + side] = np.asarray(tile)
    return frame


def bend(rgba, rng, amount):
    """The drawing (h, h, 4) turned, sheared and stretched, each by `amount` (radians, or a share) as one standard
    deviation, and mirrored half the time; made smaller where its frame would stick out by more than a tenth."""
    turn, shear, *stretch = rng.normal(0, amount, 4)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = matrix @ [[1, shear], [0, 1]] @ np.diag(np.exp(stretch)) @ np.diag([rng.choice([-1, 1]), 1])
    matrix /= max(1, 0.9 * np.abs(matrix).sum(1).max())
    back, centre = np.linalg.inv(matrix), len(rgba) / 2                          # where each pixel comes from
    (a, b), (c, d) = back
    x, y = centre - back @ [centre, centre]
    image = Image.fromarray(rgba).convert("RGBa").transform(rgba.shape[:2], Image.AFFINE, (a, b, x, c, d, y), Image.BICUBIC)
    return np.asarray(image.convert("RGBA"))


# ---------------------------------------------------------------------------------------------
# A picture from anywhere

def read_image(path, size):
    """Any picture file -> RGB uint8 (size, size, 3): first frame, upright, alpha on white, centre square.

    Raises ValueError in one line for what is no picture, is damaged, or is too large to open safely.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no picture at {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a picture")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                  # of large and of damaged files: both end in an error below
            with Image.open(path) as image:
                pixels = image.width * image.height
                if pixels <= MAX_PIXELS:
                    return square(image, size)
    except Image.DecompressionBombError:                     # Pillow's own limit, some way above ours
        raise ValueError(f"{path} has too many pixels; scale it below {MAX_PIXELS:,} in all") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture that Pillow can read") from None
    except Exception as error:                               # on damage each format raises errors of its own
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    raise ValueError(f"{path} has too many pixels ({image.width} x {image.height}); scale it below {MAX_PIXELS:,} in all")


def square(image, size):
    """An open Pillow image of any mode -> RGB uint8 (size, size, 3); what is not square loses its long ends."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":      # to 8 bits by the range of the mode, never by clipping
        values = np.asarray(image, np.float64)
        top = 65535 if image.mode != "F" else 1 if values.max() <= 1 else 255
        image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.LANCZOS))
