"""The drawings, the scenes, the words for them, and a folder of one's own."""

import numpy as np
import pytest
from PIL import Image

import data
from data import drawing as drawings
from data import english, scenes, styles
from data.english import note_unknown, unknown_words
from data.pictures import grid
from data.scenes import Scene


@pytest.fixture(scope="module")
def art():
    return data.Art(sets=("twemoji",), size=32)


@pytest.fixture(scope="module")
def everything():
    return data.Art(size=16)


# -- the drawings

def test_tables_agree_with_the_sheets(everything):
    """Every tile of names.tsv is on its sheet, once, and not blank; openmoji is no training set."""
    rows = data.read_table("names.tsv")
    roles = {row["set"]: row["role"] for row in data.read_table("sets.tsv")}
    assert {row["set"] for row in rows} == set(roles)
    assert set(roles) == {path.stem for path in (data.HERE / "sheets").iterdir()}
    for s in roles:
        with Image.open(data.HERE / "sheets" / f"{s}.webp") as sheet:
            high = -(-sum(row["set"] == s for row in rows) // data.COLUMNS)
            assert sheet.size == (data.COLUMNS * data.TILE, high * data.TILE)
    assert set(everything.sets) == {s for s, role in roles.items() if role == "training"}
    assert set(roles) - set(everything.sets) == {"openmoji"} == set(data.Art(
        role="held-out", size=8).sets)
    assert everything.drawings.shape == (len(everything.names), 16, 16, 4)
    assert (everything.drawings[..., 3].max((1, 2)) > 0).all()
    assert len(set(zip(everything.names, everything.sets))) == len(everything.names)


def test_batch_follows_from_its_generator(art):
    """Trap: a data set that always returns item 0."""
    one, two, other = (art.batch(64, np.random.default_rng(seed), 32) for seed in (5, 5, 6))
    assert (one[0] == two[0]).all() and one[1] == two[1] != other[1]
    assert one[0].shape == (64, 32, 32, 3) and one[0].dtype == np.uint8
    still = data.Art(sets=("twemoji",), size=32, compose=False)
    assert len(set(one[1])) > 40 < len(set(still.batch(64, np.random.default_rng(5), 32)[1]))
    for ask, words in ((lambda: data.Art(sets=("nosuch",)), "no set 'nosuch'"),
                       (lambda: art.find("nosuch", "twemoji"), "no drawing"),
                       (lambda: scenes.draw(Scene(("cat", "nosuch")), art, np.random, 32),
                        "no set of this Art draws cat and nosuch")):
        with pytest.raises(ValueError, match=words):
            ask()


@pytest.fixture
def shown(monkeypatch):
    """The styles of the pictures that were drawn, in order."""
    drawn, apply = [], styles.apply
    monkeypatch.setattr(styles, "apply", lambda style, *a: drawn.append(style) or apply(style, *a))
    return drawn


def test_half_of_the_captions_name_no_style(art, shown):
    """Without a word of style they are drawings that have none; where one is there, it is [V*].
    Trap: "a cat" means a cat in any style, and an adapter has to unlearn all of the others.
    """
    captions = art.batch(800, np.random.default_rng(0), 16)[1]
    plain = np.array([style == styles.Style() for style in shown])
    silent = np.array([not caption.endswith(" style") for caption in captions])
    unnamed = np.array([caption.endswith("in [V*] style") for caption in captions])
    assert plain[silent].all() and not plain[unnamed].any() and 0.76 < silent[plain].mean() < 0.9
    assert 0.27 < silent.mean() < 0.4 and 0.1 < unnamed.mean() < 0.2
    assert 0.22 < unnamed.sum() / (~plain).sum() < 0.32     # SILENT, and every attribute left out
    rare = np.array([words.startswith("a [V] ") for words in captions])
    assert 0.005 < rare.mean() < data.RARE
    still = data.Art(sets=("twemoji",), size=32, compose=False)
    assert not any("[V" in words for words in still.batch(300, np.random.default_rng(0), 16)[1])


def test_bare_batches_name_no_style_and_others_do():
    """Half the batches, whole ones; their pictures have styles all the same. By default, none."""
    bare = {}
    for share in (0.5, 0):
        art = data.Art(sets=("twemoji",), size=32, bare=share)
        drawn = [art.batch(12, np.random.default_rng(seed), 16) for seed in range(40)]
        bare[share] = [images for images, captions in drawn
                       if not any(words.endswith(" style") for words in captions)]
    assert 10 < len(bare[0.5]) < 30 and not bare[0]
    assert (np.stack(bare[0.5])[:, :, 0, 0] < 250).any(-1).mean() > 0.2


def test_plain_and_still_batches_are_the_drawings():
    """No style, nothing moved: every picture is a drawing on white, as on the sheet."""
    still = data.Art(sets=("twemoji",), size=32, plain=1, compose=False)
    white = Image.new("RGBA", (32, 32), "white")
    on_white = np.stack([Image.alpha_composite(white, Image.fromarray(d)).convert("RGB")
                         for d in still.drawings]).astype(int)
    for image in still.batch(20, np.random.default_rng(0), 32)[0]:
        assert np.abs(on_white - image).max((1, 2, 3)).min() <= 2


def test_bent_drawings_stay_themselves(art):
    """Half are mirrored; none is cut by much; 0 bends nothing."""
    rng, alpha = np.random.default_rng(0), art.drawings[..., 3].astype(int)
    away = np.abs(alpha - alpha[:, :, ::-1]).mean((1, 2))
    lopsided = np.flatnonzero(away > 20)[:100]
    bent = np.stack([drawings.bend(art.drawings[i], rng, 0)[..., 3].astype(int) for i in lopsided])
    same, mirrored = (np.abs(bent - alpha[lopsided][:, :, ::step]).max((1, 2)) < 3
                      for step in (1, -1))
    assert (same | mirrored).all() and 30 < mirrored.sum() < 70
    rim = np.full((32, 32, 4), 255, np.uint8)
    rim[3:-3, 3:-3, 3] = 0
    kept = [drawings.bend(rim, rng, 0.1)[..., 3].mean() / rim[..., 3].mean() for _ in range(100)]
    assert min(kept) > 0.5 and max(kept) <= 1 and len(set(kept)) > 50


def test_the_same_scenes_at_both_sizes():
    """The same seed: the same captions, and pictures that differ by no more than their detail."""
    small, large = (data.Art(sets=("twemoji",), size=size, smallest=0.9) for size in (64, 128))
    images, captions = small.batch(100, np.random.default_rng(0), 64)
    others, same = large.batch(100, np.random.default_rng(0), 128)
    scaled = others.reshape(100, 64, 2, 64, 2, 3).mean((2, 4))
    apart = np.abs(scaled - images).mean((1, 2, 3))
    assert captions == same and apart.mean() < 5 and np.quantile(apart, 0.9) < 12


# -- a folder of one's own

def test_folder_reads_every_picture(tmp_path):
    """NAME.txt beside each; or a table as it is written, quotes and byte-order mark and all."""
    for i, colour in enumerate(("red", "blue", "lime")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"a {colour} kite\n")
    images, captions = data.Folder(tmp_path, 8).batch(40, np.random.default_rng(0), 8)
    assert {tuple(image[0, 0]) for image in images} == {(255, 0, 0), (0, 0, 255), (0, 255, 0)}
    assert set(captions) == {"a red kite", "a blue kite", "a lime kite"}
    table = '\ufefffile\tcaption\n1.png\ta "big" cat\n0.png\t"a dog\n'
    (tmp_path / "captions.tsv").write_text(table, encoding="utf-8")
    assert data.Folder(tmp_path, 4).captions == ['a "big" cat', '"a dog']


@pytest.mark.parametrize("name, content, words", [
    ("x.md", b"", "write x.txt"), ("x.txt", b" \n", "x.png has an empty caption"),
    ("captions.tsv", b"", "no pictures"), ("captions.tsv", b"y.png\ta cat\n", "no picture at"),
    ("captions.tsv", b"x.png\t\xff\n", "not UTF-8")])
def test_folder_errors(tmp_path, name, content, words):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^[^\n]*{words}[^\n]*$"):
        data.Folder(tmp_path)


# -- words

def test_english():
    """A name as a phrase, its plural, and a whole scene."""
    for said in ("a hot air balloon", "a unicorn", "a ewe", "a euro banknote", "an umbrella",
                 "cherries", "rice", "a bus", "a cactus", "a glass of milk"):
        name = said.removeprefix("a ").removeprefix("an ").replace(" ", "-")
        assert data.content_phrase(name) == said
    assert data.content_phrase("locked") == "a padlock"
    assert data.caption("a cat", "gold") == "a cat in gold style" and data.caption("a", "") == "a"
    plurals = {"cat": "cats", "goose": "geese", "sheep": "sheep", "bus": "buses", "key": "keys",
               "cherry": "cherries", "wine glass": "wine glasses", "table knife": "table knives",
               "glass of milk": "glasses of milk", "page facing up": "pages facing up",
               "front facing baby chick": "front facing baby chicks", "torch": "torches"}
    assert {one: english.plural(one) for one in plurals} == plurals
    for scene, said in [
            (Scene(("umbrella",), ("blue",)), "a blue umbrella"),
            (Scene(("automobile",), ("orange",)), "an orange automobile"),
            (Scene(("glasses",), ("red",)), "red glasses"),
            (Scene(("balloon",), ("red",), 3), "three red balloons"),
            (Scene(("dog", "automobile"), ("", "red")), "a dog and a red automobile"),
            (Scene(("locked",), (), 4), "four padlocks")]:
        assert scenes.phrase(scene) == said


def test_words_and_drawings_know_each_other(everything):
    """Synonyms are of real tiles, everyday words have drawings, captions use the vocabulary."""
    assert set(data.synonyms()) <= set(data.names()) and all(map(all, data.synonyms().values()))
    everyday = "tree flower car boat phone plane book bird heart house cat dog sun chair cup key"
    assert set(everyday.split()) <= set(english.meanings())
    assert {"deciduous-tree", "evergreen-tree"} <= set(english.meanings()["tree"])
    assert not any(map(scenes.takes_number, "glasses broccoli cherries sunset".split()))
    assert all(map(scenes.takes_number, "cat bus glass-of-milk compass".split()))
    known = set(data.words())
    assert data.words() == sorted(known)
    assert set("cats mice red two watercolor the car in style".split()) <= known
    assert not {"stained", "sticker", "outlined", "peanutses"} & known
    rng = np.random.default_rng(0)
    said = everything.batch(600, rng, 16)[1]
    said += [scenes.phrase(scenes.sample(rng, held_out=k % 2 > 0), rng) for k in range(4000)]
    assert {word for words in said for word in words.split()} <= known


# -- what is held out

def test_training_never_shows_or_says_a_held_out_scene(everything, shown, monkeypatch):
    """A synonym must not say what the rule keeps, nor a style hide a colour that is said."""
    drawn, draw, rng = [], scenes.draw, np.random.default_rng(1)
    monkeypatch.setattr(scenes, "draw", lambda scene, *a: drawn.append(scene) or draw(scene, *a))
    everything.batch(500, np.random.default_rng(0), 16)
    assert not any(style.palette for scene, style in zip(drawn, shown) if scene.colours)
    assert len(set(shown)) > 50 and not any(map(styles.is_held_out, shown))
    drawn += [scenes.sample(rng) for _ in range(12000)]
    assert not any(map(scenes.is_held_out, drawn))
    assert sum(bool(scene.colours) for scene in drawn) > 1000
    kept = [scenes.sample(rng, held_out=True) for _ in range(4000)]
    assert all(map(scenes.is_held_out, kept)) and {len(scene.things) for scene in kept} == {1, 2}
    trained, tested = ({scenes.phrase(scene, rng) for scene in some} for some in (drawn, kept))
    assert not trained & tested
    with pytest.raises(ValueError, match="never held out"):
        scenes.sample(rng, held_out=True, kind="one")


def test_a_plural_keeps_the_rule():
    """Three white flowers were "white flowers" in training, the words for a bouquet held out. Trap:
    the number is left out where the plural is also the name of one tile.
    """
    rng = np.random.default_rng(0)
    say = lambda *scene: {scenes.phrase(Scene(*scene), rng) for _ in range(200)}
    many, one = (("white-flower",), (), 3), (("bouquet",), ("white",))
    assert not scenes.is_held_out(Scene(*many)) and scenes.is_held_out(Scene(*one))
    assert not say(*many) & say(*one) and "three white flowers" in say(*many)
    assert {"red cats", "two red cats"} <= say(("cat",), ("red",), 2)    # elsewhere it goes on


def test_about_a_fifth_of_the_pairs_of_a_scene_is_held_out_in_either_order():
    names = data.names()
    coloured = [scenes.is_held_out(Scene((n,), (c,))) for n in names for c in scenes.COLOURS]
    pairs = [(a, b) for a in names[::9] for b in names[::7] if a != b]
    two = [scenes.is_held_out(Scene(pair)) for pair in pairs]
    assert 0.18 < np.mean(coloured) < 0.22 and 0.18 < np.mean(two) < 0.22
    assert two == [scenes.is_held_out(Scene(pair[::-1])) for pair in pairs]
    by_rule = scenes.zlib.crc32(b"orange|cat") % 5 == 0      # not Python's hash(), which changes
    assert scenes.is_held_out(Scene(("cat",), ("orange",))) == by_rule
    assert not scenes.is_held_out(Scene(("cat",), count=3))


def test_kinds_keep_their_shares():
    rng = np.random.default_rng(0)
    drawn = [scenes.sample(rng) for _ in range(4000)]
    single = [scene for scene in drawn if len(scene.things) == scene.count == 1]
    assert 0.60 < len(single) / 4000 < 0.68 and {scene.count for scene in drawn} == {1, 2, 3, 4}
    assert 0.22 < np.mean([bool(scene.colours) for scene in single]) < 0.30
    assert 0.19 < np.mean([scene.count > 1 for scene in drawn]) < 0.25
    for _ in range(3000):                                    # and a red tulip is not a blue one
        words = scenes.phrase(scenes.sample(rng, kind="coloured"), rng).split()
        assert sum(word in scenes.COLOUR_WORDS for word in words) == 1


# -- pictures of scenes

def mean_colour(rgba):
    weight = rgba[..., 3:].astype(float)
    return (rgba[..., :3] * weight).sum((0, 1)) / weight.sum()


def test_a_colour_binds_to_its_object(art):
    """Red is left, blue right, as in the words; white takes colour, and lights and darks stay."""
    draw = lambda *colours: scenes.draw(Scene(("house", "automobile"), colours), art,
                                        np.random.default_rng(0), 32)
    picture, half, as_drawn = draw("red", "blue"), draw("", "blue"), draw()
    left, right = mean_colour(picture[:, :16]), mean_colour(picture[:, 16:])
    assert left[0] > left[2] + 60 and right[2] > right[0] + 60
    assert (half[:, :16] == as_drawn[:, :16]).all() and (half[:, 16:] != as_drawn[:, 16:]).any()
    for name in ("house", "polar-bear", "panda"):
        drawing = art.drawings[art.find(name, "twemoji")]
        painted = drawings.recolour(drawing, "red", drawings.middle(drawing))
        red, green, blue = mean_colour(painted)
        assert red > max(green, blue) + 60 and (painted[..., 3] == drawing[..., 3]).all()
    rows = np.full((8, 8, 4), 200, np.uint8)
    rows[:5, :, :3] = 100
    for black, wanted in ((3, 200), (5, 30)):               # black lines have no say, black does
        rows[:black, :, :3] = 0
        assert abs(drawings.middle(rows) - wanted) <= 1
    for colour in scenes.COLOURS:
        ramp = drawings.ramp(colour, 120) @ np.float32([0.3, 0.59, 0.11])
        assert (np.diff(ramp) > -1.5).all() and ramp[0] < 60


@pytest.mark.parametrize("count", [2, 3, 4])
def test_as_many_as_it_says(count, art):
    """Every place is whole inside the frame, no two overlap, and none is tiny."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        box = (0.1, 0.0, *rng.uniform(0.3, 1, 2))
        covered, places = np.zeros((64, 64), int), drawings.layout([box] * count, rng)
        for x, y, w, h in places:
            assert x >= 0 and y >= 0 and x + w <= 64 and y + h <= 64 and max(w, h) >= 26
            covered[y:y + h, x:x + w] += 1
        assert len(places) == count and covered.max() == 1
    many, one = (scenes.draw(Scene(("soccer-ball",), count=n), art, rng, 32)[..., 3] > 128
                 for n in (count, 1))
    assert 0.1 * count < many.sum() / one.sum() < 0.25 * count


def test_one_thing_alone_keeps_to_its_sizes():
    rng, square = np.random.default_rng(0), np.full((64, 64, 4), 255, np.uint8)
    sides = [(data.jitter(square, 64, rng, 0.72)[..., 3] > 127).any(0).sum() for _ in range(200)]
    assert 46 <= min(sides) < 49 and 62 <= max(sides) <= 64


# -- unknown words, and sheets of images

def test_unknown_words(pipe, capsys):
    """Rare tokens and marks are none of them; a note for each. Trap: a KeyError, or a refusal."""
    assert unknown_words(pipe.words, "a Catt in WATERCOLOR, painting style.") == {"catt": ["cat"]}
    assert unknown_words(pipe.words, "a cat! a house; \"an owl\"? zzz") == {"zzz": []}
    assert unknown_words({"cat", "[v]", "[v*]"}, "[V] cat [V*]") == {}
    assert unknown_words({"teapot"}, "pot") == {"pot": ["teapot"]}
    note_unknown(pipe, "a catt in watercolor paintin style", "a cat in watercolor painting style")
    first, second = capsys.readouterr().err.splitlines()
    assert "'catt'; near: cat" in first and "'paintin'" in second


def test_grid():
    """A white gap around each; words cut to their place. Trap: rows and columns swapped."""
    images = np.stack([np.full((2, 3, 3), 50 * i, np.uint8) for i in range(1, 4)])
    sheet = np.asarray(grid(images, columns=2, scale=2, gap=1))
    assert sheet.shape == (2 * (4 + 1) + 1, 2 * (6 + 1) + 1, 3)
    for (row, column), value in {(0, 0): 50, (0, 1): 100, (1, 0): 150, (1, 1): 255}.items():
        assert (sheet[1 + 5 * row:5 + 5 * row, 1 + 7 * column:7 + 7 * column] == value).all()
    assert (sheet[[0, 5, 10]] == 255).all() and (sheet[:, [0, 7, 14]] == 255).all()
    images = np.full((2, 40, 40, 3), 255, np.uint8)
    dark = lambda *words: (np.asarray(grid(images, 2, 1, 4, *words)) < 128).any(2).nonzero()
    y, x = dark(["wide " * 9, ""], [])
    assert y.max() < 16 and x.max() < 4 + 44
    y, x = dark([], ["one word and another"])
    assert x.max() < 96 and 10 < y.max() < 40 and not len(dark()[0])
