"""data/: the drawings, the scenes, the words for them, a folder of one's own, and sheets.

Styles: test_styles.py. Picture files: test_reading.py.
"""

import math
import unicodedata
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, features

import data
from data import drawing as drawings
from data import english, pictures, scenes, styles
from data.art import COLUMNS, RARE, SOME_STYLE, TILE
from data.pictures import grid, readable
from data.reading import read_image
from data.scenes import Scene


SMALL = "streamline-freehand"           # a set of few drawings, which are read quickly


@pytest.fixture(scope="module")
def art():
    """The training drawings of one set."""
    return data.Art(sets=("twemoji",), size=32)


@pytest.fixture(scope="module")
def everything():
    """The training drawings of all sets."""
    return data.Art(size=16)


@pytest.fixture
def painted(monkeypatch):
    """The styles of the images that are painted from now on, in their order."""
    found = []
    apply = styles.apply

    def noted(style, *arguments):
        found.append(style)
        return apply(style, *arguments)

    monkeypatch.setattr(styles, "apply", noted)
    return found


# --------------------------------------------------------------------------------------------------
# The drawings

NAMES = english.read_table("names.tsv")
ROLES = {row["set"]: row["role"] for row in english.read_table("sets.tsv")}
SHEETS = sorted({row["sheet"] for row in NAMES})


def test_tables_name_the_same_sets_and_sheets():
    assert {row["set"] for row in NAMES} == set(ROLES)
    assert sorted(path.stem for path in (english.HERE / "sheets").iterdir()) == SHEETS
    assert len({(row["set"], row["drawing"]) for row in NAMES}) == len(NAMES)


@pytest.mark.parametrize("sheet", SHEETS)
def test_every_tile_is_on_its_sheet_once(sheet):
    tiles = [int(row["tile"]) for row in NAMES if row["sheet"] == sheet]
    assert tiles == list(range(len(tiles)))
    rows = math.ceil(len(tiles) / COLUMNS)
    with Image.open(english.HERE / "sheets" / f"{sheet}.webp") as image:
        assert image.size == (COLUMNS * TILE, rows * TILE)


def test_no_drawing_is_blank(everything):
    assert everything.drawings.shape == (len(everything.names), 16, 16, 4)
    assert (everything.drawings[..., 3].max((1, 2)) > 0).all()


def test_openmoji_is_held_out(everything):
    training = {name for name, role in ROLES.items() if role == "training"}
    assert set(everything.sets) == training
    assert set(ROLES) - training == {"openmoji"}
    held_out = data.Art(role="held-out", size=64)
    assert set(held_out.sets) == {"openmoji"}
    assert len(held_out.names) == sum(row["set"] == "openmoji" for row in NAMES)


def test_a_tenth_of_the_drawings_is_kept_out_of_training(everything):
    """At random, by the CRC-32 of set and name. Every name still has a drawing to learn from."""
    rows = [row for row in NAMES if ROLES[row["set"]] == "training"]
    pairs = {(row["set"], row["name"]) for row in rows}
    kept_out = data.kept_out_pairs()
    assert 0.08 < len(kept_out) / len(pairs) < 0.12
    drawn = {(s, name) for s, name in pairs if zlib.crc32(f"{s}/{name}".encode()) % 10 == 0}
    assert kept_out <= drawn
    assert len(drawn - kept_out) < 0.2 * len(drawn)
    assert set(zip(everything.sets, everything.names)) == pairs - kept_out
    assert set(everything.names) == set(data.names()) == {name for _, name in pairs}


def test_the_kept_out_drawings_can_be_asked_for():
    trained = data.Art(sets=(SMALL,), size=16)
    out = data.Art(sets=(SMALL,), size=16, kept_out=True)
    both = data.Art(sets=(SMALL,), size=16, kept_out=None)
    assert set(out.names) == {name for s, name in data.kept_out_pairs() if s == SMALL}
    assert out.names and not set(out.names) & set(trained.names)
    assert sorted(both.names) == sorted(trained.names + out.names)


def test_several_drawings_of_a_name_take_turns(art):
    """A woman in several colours of skin."""
    several = art.index["twemoji"]["woman"]
    assert len(several) >= 3
    assert art.find("woman", "twemoji") == several[0]
    scene = Scene(("woman",))
    shown = {scenes.draw(scene, art, np.random.default_rng(seed), 32).tobytes()
             for seed in range(40)}
    assert len(shown) == len(several)


def test_a_single_drawing_of_a_name_takes_no_random_number(art):
    """So that a set of many drawings does not change the images of another."""
    rng, other = np.random.default_rng(0), np.random.default_rng(0)
    scenes.draw(Scene(("cat",)), art, rng, 32, "twemoji")
    assert rng.random() == other.random()


def test_what_no_set_has_drawn(art):
    with pytest.raises(ValueError, match="no set 'nosuch' in data/sets.tsv"):
        data.Art(sets=("nosuch",))
    with pytest.raises(ValueError, match="no drawing 'nosuch' in twemoji"):
        art.find("nosuch", "twemoji")
    with pytest.raises(ValueError, match="no set of this Art .* cat and nosuch"):
        scenes.draw(Scene(("cat", "nosuch")), art, np.random.default_rng(0), 32)


# --------------------------------------------------------------------------------------------------
# Batches

def test_a_batch_follows_from_its_generator(art):
    """Trap: a data set that always returns item 0."""
    images, captions = art.batch(64, np.random.default_rng(5), 32)
    again, same_captions = art.batch(64, np.random.default_rng(5), 32)
    _, other_captions = art.batch(64, np.random.default_rng(6), 32)
    assert images.shape == (64, 32, 32, 3) and images.dtype == np.uint8
    assert (images == again).all() and captions == same_captions
    assert captions != other_captions
    assert len(set(captions)) > 40


@pytest.fixture(scope="module")
def captioned(art):
    """1,000 captions, and which of their images have no style or one without words."""
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        apply = styles.apply

        def noted(style, *arguments):
            shown.append(style)
            return apply(style, *arguments)

        patch.setattr(styles, "apply", noted)
        _, captions = art.batch(1000, np.random.default_rng(0), 16)
    return SimpleNamespace(
        captions=captions, is_plain=np.array([styles.is_plain(style) for style in shown]),
        is_free=np.array([style.free for style in shown]),
        is_silent=np.array([not caption.endswith(" style") for caption in captions]),
        is_unnamed=np.array([caption.endswith(" in [V*] style") for caption in captions]))


def test_captions_name_a_style_or_not(captioned):
    """More than a third name none, more than a quarter say "[V*]", the others have words."""
    assert 0.33 < captioned.is_silent.mean() < 0.41
    assert 0.25 < captioned.is_unnamed.mean() < 0.32
    assert 0.2 < captioned.is_free.mean() < 0.3


def test_a_drawing_as_it_is_has_no_rare_token(captioned):
    """Trap: "[V*]" comes to mean no style at all."""
    assert not (captioned.is_plain & captioned.is_unnamed).any()
    assert 0.76 < captioned.is_silent[captioned.is_plain].mean() < 0.88


def test_a_style_without_words_is_called_a_rare_token(captioned):
    """Four times in five; else it is not called anything. It never has words."""
    unnamed = captioned.is_unnamed[captioned.is_free]
    silent = captioned.is_silent[captioned.is_free]
    assert (unnamed | silent).all()
    assert unnamed.mean() == pytest.approx(SOME_STYLE, abs=0.07)


def test_a_caption_without_style_mostly_shows_none(captioned):
    """Trap: "a cat" means a cat in any style, and an adapter has to unlearn all of the others."""
    assert captioned.is_plain[captioned.is_silent].mean() > 0.75


def test_rare_words_for_objects(captioned):
    """The words "a [V] cat" and "an object" are rare, but the base knows them."""
    rare = np.mean(["a [V] " in caption for caption in captioned.captions])
    generic = np.mean([caption.startswith("an object") for caption in captioned.captions])
    assert 0.005 < rare < RARE
    assert 0.002 < generic < RARE


def test_drawings_alone_have_no_rare_words():
    """Without compose, captions are plain."""
    still = data.Art(sets=("twemoji",), size=32, compose=False)
    _, captions = still.batch(300, np.random.default_rng(0), 16)
    assert len(set(captions)) > 200
    assert not any("[V" in caption or "an object" in caption for caption in captions)


@pytest.mark.parametrize("share, least, most", [(0.5, 10, 30), (0, 0, 0)])
def test_bare_batches_name_no_style(share, least, most):
    """Half of the batches, whole ones; by default none."""
    bare = data.Art(sets=("twemoji",), size=32, bare=share)
    count = 0
    for seed in range(40):
        _, captions = bare.batch(6, np.random.default_rng(seed), 16)
        if not any(caption.endswith(" style") for caption in captions):
            count += 1
    assert least <= count <= most


def test_images_of_bare_batches_have_styles_all_the_same():
    bare = data.Art(sets=("twemoji",), size=32, bare=1)
    images, captions = bare.batch(100, np.random.default_rng(0), 16)
    assert not any(caption.endswith(" style") for caption in captions)
    has_background = (images[:, 0, 0] < 250).any(-1)
    assert has_background.mean() > 0.2


def test_plain_and_still_batches_are_the_drawings():
    """Without style and movement, every image is a drawing on white, as on the sheet."""
    still = data.Art(sets=("twemoji",), size=32, plain=1, compose=False)
    white = Image.new("RGBA", (32, 32), "white")
    on_white = []
    for rgba in still.drawings:
        on_white.append(Image.alpha_composite(white, Image.fromarray(rgba)).convert("RGB"))
    on_white = np.stack(on_white).astype(int)
    images, _ = still.batch(20, np.random.default_rng(0), 32)
    for image in images:
        difference = np.abs(on_white - image).max((1, 2, 3))
        assert difference.min() <= 2


def test_the_same_scenes_at_both_sizes():
    """The same seed: the same captions, and images that differ by no more than their detail."""
    small = data.Art(sets=(SMALL,), size=64, smallest=0.9)
    large = data.Art(sets=(SMALL,), size=128, smallest=0.9)
    images, captions = small.batch(60, np.random.default_rng(0), 64)
    others, same_captions = large.batch(60, np.random.default_rng(0), 128)
    assert captions == same_captions
    shrunk = others.reshape(60, 64, 2, 64, 2, 3).mean((2, 4))
    difference = np.abs(shrunk - images).mean((1, 2, 3))
    assert difference.mean() < 5
    assert np.quantile(difference, 0.9) < 12


# --------------------------------------------------------------------------------------------------
# A folder of one's own

@pytest.fixture
def folder(tmp_path):
    """Three pictures of one colour, with their captions next to them."""
    for i, colour in enumerate(("red", "blue", "lime")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"a {colour} kite\n")
    return tmp_path


def test_a_folder_is_read_whole(folder):
    images, captions = data.Folder(folder, 8).batch(40, np.random.default_rng(0), 8)
    assert images.shape == (40, 8, 8, 3)
    colours = {caption: tuple(image[0, 0]) for caption, image in zip(captions, images)}
    assert colours == {"a red kite": (255, 0, 0), "a blue kite": (0, 0, 255),
                       "a lime kite": (0, 255, 0)}


def test_a_table_of_captions(folder):
    """As it is written, with quotes and a byte-order mark."""
    table = '\ufefffile\tcaption\n1.png\ta "big" cat\n0.png\t"a dog\n'
    (folder / "captions.tsv").write_text(table, encoding="utf-8")
    found = data.Folder(folder, 4)
    assert found.captions == ['a "big" cat', '"a dog']
    assert (found.images[0, 0, 0] == (0, 0, 255)).all()
    assert found.skipped == ["2.png", "2.txt"]


def test_words_and_prompts_of_a_folder(folder):
    found = data.Folder(folder, 8)
    assert found.words() == ["a", "blue", "kite", "lime", "red"]
    assert found.prompts(4) == ["a red kite", "a blue kite", "a lime kite", "a red kite"]


AVIF = pytest.param(".avif", marks=pytest.mark.skipif(
    not features.check("avif"), reason="this Pillow does not read AVIF"))


@pytest.mark.parametrize("suffix", [".jfif", AVIF, ".JPG", ".tif", ".webp"])
def test_pictures_of_many_kinds(tmp_path, suffix):
    """Trap: a suffix that is not on the list, and the picture is left out in silence."""
    path = tmp_path / f"a{suffix}"
    if suffix == ".jfif":
        Image.new("RGB", (8, 8), "red").save(path, "JPEG")
    else:
        Image.new("RGB", (8, 8), "red").save(path)
    (tmp_path / "a.txt").write_text("a kite")
    found = data.Folder(tmp_path, 8)
    assert found.captions == ["a kite"]
    assert np.abs(found.images[0].astype(int) - (255, 0, 0)).max() < 12


def test_other_files_are_named(folder):
    """Trap: a picture in a rare format is missing in training without a note."""
    (folder / "notes.md").touch()
    (folder / "3.heic").touch()
    (folder / "4.txt").write_text("a kite without a picture")
    (folder / "older").mkdir()
    (folder / "._0.png").write_bytes(b"\0\5\x16\7")         # a note of macOS's on 0.png
    assert data.Folder(folder, 8).skipped == ["._0.png", "3.heic", "4.txt", "notes.md", "older"]


def test_the_fingerprint_knows_every_picture_and_caption(folder):
    found = {data.Folder(folder, 8).fingerprint}
    assert data.Folder(folder, 8).fingerprint in found
    (folder / "1.txt").write_text("a navy kite")
    found.add(data.Folder(folder, 8).fingerprint)
    Image.new("RGB", (8, 8), "navy").save(folder / "1.png")
    found.add(data.Folder(folder, 8).fingerprint)
    (folder / "1.txt").unlink()
    (folder / "1.png").unlink()
    found.add(data.Folder(folder, 8).fingerprint)
    assert len(found) == 4


@pytest.mark.parametrize("name, content, words", [
    ("x.md", b"", "write x.txt"), ("x.txt", b" \n", "x.png has an empty caption"),
    ("captions.tsv", b"", "no pictures"), ("captions.tsv", b"y.png\ta cat\n", "no picture at"),
    ("captions.tsv", b"x.png\t\xff\n", "not UTF-8"),
    ("captions.tsv", b"x.png\ta\nx.png,a\n", "captions.tsv, line 2, has no tab between file and"),
    ("captions.tsv", b"x\0.png\ta cat\n", "cannot be a name"),
    ("captions.tsv", b"x.png\t \n", "x.png has an empty caption")])
def test_folders_that_are_refused(tmp_path, name, content, words):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^[^\n]*{words}[^\n]*$"):
        data.Folder(tmp_path)


def test_no_folder_and_an_empty_one(tmp_path):
    with pytest.raises(ValueError, match="no folder of pictures at .*nowhere"):
        data.Folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="contains no pictures with captions"):
        data.Folder(tmp_path)


# --------------------------------------------------------------------------------------------------
# Words

@pytest.mark.parametrize("words", [
    "a hot air balloon", "a unicorn", "a ewe", "a euro banknote", "an umbrella", "cherries", "rice",
    "a bus", "a cactus", "a glass of milk"])
def test_articles(words):
    name = words.removeprefix("a ").removeprefix("an ").replace(" ", "-")
    assert data.content_phrase(name) == words


def test_names_that_mean_something_else():
    assert data.content_phrase("locked") == "a padlock"
    assert english.noun("locked") == "padlock"


@pytest.mark.parametrize("one, many", [
    ("cat", "cats"), ("goose", "geese"), ("sheep", "sheep"), ("bus", "buses"), ("key", "keys"),
    ("cherry", "cherries"), ("wine glass", "wine glasses"), ("table knife", "table knives"),
    ("glass of milk", "glasses of milk"), ("page facing up", "pages facing up"),
    ("front facing baby chick", "front facing baby chicks"), ("torch", "torches"),
    ("old woman", "old women"), ("person riding a horse", "people riding a horse"),
    ("woman with red hair", "women with red hair"), ("child", "children"), ("foot", "feet")])
def test_plurals(one, many):
    assert english.plural(one) == many


@pytest.mark.parametrize("scene, words", [
    (Scene(("umbrella",), ("blue",)), "a blue umbrella"),
    (Scene(("automobile",), ("orange",)), "an orange automobile"),
    (Scene(("glasses",), ("red",)), "red glasses"),
    (Scene(("balloon",), ("red",), 3), "three red balloons"),
    (Scene(("dog", "automobile"), ("", "red")), "a dog and a red automobile"),
    (Scene(("locked",), (), 4), "four padlocks"), (Scene(("woman",), (), 2), "two women")])
def test_phrases_of_scenes(scene, words):
    assert scenes.phrase(scene) == words


def test_synonyms_are_of_real_drawings():
    assert set(english.synonyms()) <= set(data.names())
    for words in english.synonyms().values():
        assert all(words)


@pytest.mark.parametrize("word", """tree flower car boat phone plane book bird heart house cat dog
    sun chair cup key woman man person girl boy baby face hand doctor sofa table lamp robot
    fridge""".split())
def test_everyday_words_have_drawings(word):
    assert english.meanings()[word]


def test_a_word_may_mean_several_drawings():
    assert {"deciduous-tree", "evergreen-tree"} <= set(english.meanings()["tree"])


@pytest.mark.parametrize("name, has_plural", [
    ("glasses", False), ("broccoli", False), ("cherries", False), ("sunset", False), ("cat", True),
    ("bus", True), ("glass-of-milk", True), ("compass", True)])
def test_what_can_be_counted(name, has_plural):
    assert scenes.takes_number(name) == has_plural


@pytest.mark.parametrize("name", ["woman", "man-with-red-hair", "smiling-face", "hand",
                                  "firefighter", "man-sitting"])
def test_people_are_not_painted(name):
    """Trap: "a white woman" would be a drawing in white."""
    assert not scenes.takes_colour(name)
    assert name in scenes.people()


@pytest.mark.parametrize("name", ["robot", "ghost", "skull", "sofa", "cat"])
def test_things_can_be_painted(name):
    assert scenes.takes_colour(name)


def test_the_vocabulary_is_that_of_the_captions(everything):
    known = set(data.words())
    assert data.words() == sorted(known) == everything.words()
    rng = np.random.default_rng(0)
    _, said = everything.batch(300, rng, 16)
    for k in range(4000):
        said.append(scenes.phrase(scenes.sample(rng, held_out=k % 2 == 1), rng))
    spoken = {word for phrase in said for word in phrase.split()}
    assert spoken <= known


@pytest.mark.parametrize("word, is_known", [
    ("cats", True), ("mice", True), ("red", True), ("two", True), ("watercolor", True),
    ("the", True), ("style", True), ("people", True), ("[V*]", True), ("[V]", True),
    ("object", True), ("stained", False), ("sticker", False), ("outlined", False),
    ("peanutses", False)])
def test_the_vocabulary(word, is_known):
    """Words of held-out styles are not in it."""
    assert (word in data.words()) == is_known


# --------------------------------------------------------------------------------------------------
# What is held out

@pytest.fixture(scope="module")
def trained():
    """12,000 scenes as training samples them."""
    rng = np.random.default_rng(1)
    return [scenes.sample(rng) for _ in range(12000)]


@pytest.fixture(scope="module")
def tested():
    """4,000 scenes that training never shows."""
    rng = np.random.default_rng(2)
    return [scenes.sample(rng, held_out=True) for _ in range(4000)]


def test_no_scene_of_training_is_held_out(trained, tested):
    assert not any(map(scenes.is_held_out, trained))
    assert sum(bool(scene.colours) for scene in trained) > 1000
    assert all(map(scenes.is_held_out, tested))
    assert {len(scene.things) for scene in tested} == {1, 2}


def test_no_caption_of_training_means_a_held_out_scene(trained, tested):
    """Trap: a synonym makes a caption mean a pair that is held out."""
    rng = np.random.default_rng(3)
    in_training = {scenes.phrase(scene, rng) for scene in trained}
    in_tests = {scenes.phrase(scene, rng) for scene in tested}
    assert not in_training & in_tests


def test_one_plain_object_is_never_held_out():
    with pytest.raises(ValueError, match="never held out"):
        scenes.sample(np.random.default_rng(0), held_out=True, kind="one")


def test_batches_show_nothing_that_is_held_out(everything, painted, calls):
    """Neither scene nor style; nor a style that hides a colour that the caption names."""
    calls_of_draw = calls(scenes, "draw")
    everything.batch(300, np.random.default_rng(0), 16)
    drawn = [positional[0] for positional, _ in calls_of_draw]
    assert not any(map(scenes.is_held_out, drawn))
    assert not any(map(styles.is_held_out, painted))
    assert len(set(painted)) > 50
    for scene, style in zip(drawn, painted, strict=True):
        if scene.colours:
            assert not style.palette and not style.free


def phrases_of(scene):
    rng = np.random.default_rng(0)
    return {scenes.phrase(scene, rng) for _ in range(200)}


def test_a_plural_keeps_the_rule():
    """Three white flowers must not be "white flowers", the words for a bouquet that is held out.

    Trap: the number is left out where the plural is also the name of one drawing.
    """
    three, bouquet = Scene(("white-flower",), (), 3), Scene(("bouquet",), ("white",))
    assert not scenes.is_held_out(three) and scenes.is_held_out(bouquet)
    assert not phrases_of(three) & phrases_of(bouquet)
    assert "three white flowers" in phrases_of(three)


def test_a_number_is_sometimes_left_out():
    assert {"red cats", "two red cats"} <= phrases_of(Scene(("cat",), ("red",), 2))


def test_a_fifth_of_the_coloured_objects_is_held_out():
    """By CRC-32. Trap: Python's hash(), which changes from process to process."""
    found = []
    for name in data.names():
        for colour in scenes.COLOURS:
            found.append(scenes.is_held_out(Scene((name,), (colour,))))
    assert 0.18 < np.mean(found) < 0.22
    is_drawn = zlib.crc32(b"orange|cat") % 5 == 0
    assert scenes.is_held_out(Scene(("cat",), ("orange",))) == is_drawn
    assert not scenes.is_held_out(Scene(("cat",), count=3))


def test_a_fifth_of_the_pairs_is_held_out_in_either_order():
    names = data.names()
    found, swapped = [], []
    for one in names[::9]:
        for other in names[::7]:
            if one != other:
                found.append(scenes.is_held_out(Scene((one, other))))
                swapped.append(scenes.is_held_out(Scene((other, one))))
    assert found == swapped
    assert 0.18 < np.mean(found) < 0.22


def test_kinds_of_scenes_keep_their_shares(trained):
    single = [scene for scene in trained if len(scene.things) == scene.count == 1]
    assert 0.62 < len(single) / len(trained) < 0.66
    assert 0.24 < np.mean([bool(scene.colours) for scene in single]) < 0.29
    assert 0.20 < np.mean([scene.count > 1 for scene in trained]) < 0.24
    assert {scene.count for scene in trained} == {1, 2, 3, 4}


def test_a_coloured_object_has_one_colour():
    """Trap: a red tulip that is called a blue one."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        words = scenes.phrase(scenes.sample(rng, kind="coloured"), rng).split()
        assert sum(word in scenes.COLOUR_WORDS for word in words) == 1


# --------------------------------------------------------------------------------------------------
# Pictures of scenes

def mean_colour(rgba):
    """The mean colour of what is drawn: red, green, blue."""
    weight = rgba[..., 3:].astype(float)
    return (rgba[..., :3] * weight).sum((0, 1)) / weight.sum()


def test_a_colour_belongs_to_its_object(art):
    """Red is left and blue is right, as in the words."""
    scene = Scene(("house", "automobile"), ("red", "blue"))
    picture = scenes.draw(scene, art, np.random.default_rng(0), 32)
    left, right = mean_colour(picture[:, :16]), mean_colour(picture[:, 16:])
    assert left[0] > left[2] + 60
    assert right[2] > right[0] + 60


def test_an_object_without_a_colour_stays_as_drawn(art):
    half = scenes.draw(Scene(("house", "automobile"), ("", "blue")), art, np.random.default_rng(0),
                       32)
    as_drawn = scenes.draw(Scene(("house", "automobile")), art, np.random.default_rng(0), 32)
    assert (half[:, :16] == as_drawn[:, :16]).all()
    assert (half[:, 16:] != as_drawn[:, 16:]).any()


@pytest.mark.parametrize("name", ["house", "polar-bear", "panda"])
def test_white_takes_colour(art, name):
    """And what is transparent stays so."""
    rgba = art.drawings[art.find(name, "twemoji")]
    painted = drawings.recolour(rgba, "red", drawings.middle(rgba))
    red, green, blue = mean_colour(painted)
    assert red > max(green, blue) + 60
    assert (painted[..., 3] == rgba[..., 3]).all()


@pytest.mark.parametrize("black_rows, middle", [(3, 200), (5, 30)])
def test_black_lines_have_no_say_in_the_middle(black_rows, middle):
    """Unless black is most of what is drawn."""
    rgba = np.full((8, 8, 4), 200, np.uint8)
    rgba[:5, :, :3] = 100
    rgba[:black_rows, :, :3] = 0
    assert abs(drawings.middle(rgba) - middle) <= 1


@pytest.mark.parametrize("colour", scenes.COLOURS)
def test_lights_and_darks_stay(colour):
    luminance = drawings.ramp(colour, 120) @ np.float32([0.3, 0.59, 0.11])
    assert (np.diff(luminance) > -1.5).all()
    assert luminance[0] < 60


@pytest.mark.parametrize("count", [2, 3, 4])
def test_places_lie_in_the_frame_and_apart(count):
    rng = np.random.default_rng(0)
    for _ in range(200):
        box = (0.1, 0.0, *rng.uniform(0.3, 1, 2))
        places = drawings.layout([box] * count, rng)
        assert len(places) == count
        covered = np.zeros((64, 64), int)
        for x, y, width, height in places:
            assert x >= 0 and y >= 0
            assert x + width <= 64 and y + height <= 64
            assert max(width, height) >= 26                  # none is tiny
            covered[y:y + height, x:x + width] += 1
        assert covered.max() == 1


@pytest.mark.parametrize("count", [2, 3, 4])
def test_as_many_are_drawn_as_the_words_say(art, count):
    def covered(scene):
        return (scenes.draw(scene, art, np.random.default_rng(0), 32)[..., 3] > 128).sum()

    share = covered(Scene(("soccer-ball",), count=count)) / covered(Scene(("soccer-ball",)))
    assert 0.1 * count < share < 0.25 * count


def sides_of(placed):
    """How many columns of a frame show something, for each."""
    return [(rgba[..., 3] > 127).any(0).sum() for rgba in placed]


def test_one_object_keeps_to_its_sizes():
    rng = np.random.default_rng(0)
    square = np.full((64, 64, 4), 255, np.uint8)
    sides = sides_of(drawings.place_one(square, 64, rng, 0.72) for _ in range(200))
    assert 46 <= min(sides) < 49
    assert 62 <= max(sides) <= 64


def test_a_scene_may_be_moved_over_the_edge():
    """At half to 1.2 times its size; a large one is cut and never shrinks to nothing."""
    rng = np.random.default_rng(0)
    square = np.full((64, 64, 4), 255, np.uint8)
    placed = [drawings.place_anywhere(square, rng) for _ in range(200)]
    sides = sides_of(placed)
    assert 31 <= min(sides) < 35 and max(sides) == 64
    is_full = [(rgba[..., 3] == 255).all() for rgba in placed]
    assert 0.1 < np.mean(is_full) < 0.4
    corners = [rgba[0, 0, 3] > 0 for rgba in placed]
    assert 0.1 < np.mean(corners) < 0.7


def test_without_bending_a_drawing_is_mirrored_or_not(art):
    """Half of the drawings each."""
    rng = np.random.default_rng(0)
    alpha = art.drawings[..., 3].astype(int)
    mirrored = alpha[:, :, ::-1]
    lopsided = np.flatnonzero(np.abs(alpha - mirrored).mean((1, 2)) > 20)[:100]
    as_drawn, as_mirrored = [], []
    for i in lopsided:
        bent = drawings.bend(art.drawings[i], rng, 0)[..., 3].astype(int)
        as_drawn.append(np.abs(bent - alpha[i]).max() < 3)
        as_mirrored.append(np.abs(bent - mirrored[i]).max() < 3)
    assert np.logical_xor(as_drawn, as_mirrored).all()
    assert 30 < sum(as_mirrored) < 70


def test_bent_drawings_stay_in_the_frame():
    """Little of a rim is cut off."""
    rng = np.random.default_rng(0)
    rim = np.full((32, 32, 4), 255, np.uint8)
    rim[3:-3, 3:-3, 3] = 0
    kept = [drawings.bend(rim, rng, 0.1)[..., 3].mean() / rim[..., 3].mean() for _ in range(100)]
    assert min(kept) > 0.5 and max(kept) <= 1
    assert len(set(kept)) > 50


# --------------------------------------------------------------------------------------------------
# Sheets of images

def test_a_grid_has_a_gap_around_each_image():
    """Trap: rows and columns swapped."""
    images = np.stack([np.full((2, 3, 3), 50 * i, np.uint8) for i in range(1, 4)])
    sheet = np.asarray(grid(images, columns=2, scale=2, gap=1))
    assert sheet.shape == (2 * (4 + 1) + 1, 2 * (6 + 1) + 1, 3)
    for row, column, value in ((0, 0, 50), (0, 1, 100), (1, 0, 150), (1, 1, 255)):
        y, x = 1 + 5 * row, 1 + 7 * column
        assert (sheet[y:y + 4, x:x + 6] == value).all()
    assert (sheet[[0, 5, 10]] == 255).all()
    assert (sheet[:, [0, 7, 14]] == 255).all()


WHITE = np.full((2, 40, 40, 3), 255, np.uint8)


def inked(**labels):
    """The rows and columns of a sheet of two white images that its labels darken."""
    sheet = np.asarray(grid(WHITE, 2, 1, 4, **labels))
    y, x = (sheet < 128).any(2).nonzero()
    return y, x


def test_words_above_a_column_are_wrapped_and_not_cut():
    """Trap: "a [V] teapot in flat" above the picture of a teapot in flat vector on navy."""
    y, x = inked(top=["wide " * 4, ""])
    assert x.max() < 4 + 44                                  # the next column's words
    assert y.max() >= 2 + 3 * 12                             # four lines
    sheet = grid(WHITE, 2, 1, 4, top=["wide " * 4, ""])
    assert sheet.height == 4 + 4 * 12 + 4 + 40 + 4
    assert (np.asarray(sheet)[-44:] == 255).all()            # no word lies on the images
    assert grid(WHITE, 2, 1, 4, top=["a", "b"]).height == 4 + 16 + 40 + 4


def test_words_beside_a_row_keep_to_their_place():
    y, x = inked(left=["one word and another"])
    assert x.max() < 96
    assert 10 < y.max() < 40


def test_captions_stand_above_their_images():
    y, x = inked(captions=["a", "b"])
    assert y.max() < 4 + 16
    assert x.min() < 44 < x.max()


def test_a_sheet_without_words_is_white():
    y, _ = inked()
    assert len(y) == 0


@pytest.mark.parametrize("words, expected", [
    ("a cat, 50 %", "a cat, 50 %"), ("café größer Åse", "cafe gro\\xdfer Ase"), ("кот", None),
    ("قطة", None), ("一只猫 🐱", None)])
def test_letters_that_the_font_lacks_are_written_out(words, expected):
    """Trap: a row of boxes."""
    found = readable(words)
    assert found.isascii()
    if expected is not None:
        assert found == expected
    else:
        code = f"{ord(unicodedata.normalize('NFKD', words)[0]):x}"
        assert found.startswith(("\\u0" + code, "\\u" + code))


def test_labels_are_drawn_without_boxes(monkeypatch):
    drawn = []

    def text(self, place, words, **_):
        drawn.append(words)

    monkeypatch.setattr(pictures.ImageDraw.ImageDraw, "text", text)
    grid(WHITE, 2, 1, 4, top=["قطة", "é"], left=["кот"], captions=["猫", "b"])
    assert len(drawn) == 5
    assert all(words.isascii() for words in drawn)


@pytest.mark.parametrize("file, style", [
    ("house_watercolor.png", styles.Style("navy and gold", "", "watercolor", "cream")),
    ("cat_stained_glass.png", styles.Style("", "", "stained glass", "navy")),
    ("rocket_sticker.png", styles.Style("", "", "", "teal", "sticker"))])
def test_the_drawings_of_examples_are_in_held_out_styles(file, style):
    """What these three references show (examples/README.md), no training image has."""
    assert styles.is_held_out(style)
    assert read_image(english.HERE.parent / "examples" / file, 16).std() > 5
