"""The art, its words, and pictures from anywhere."""

import copy

import numpy as np
import pytest
from PIL import Image

import data
from data import drawing as drawings
from data import english, scenes, styles
from data.scenes import Scene


@pytest.fixture(scope="module")
def art():
    return data.Art(sets=("twemoji",), size=32)


@pytest.fixture(scope="module")
def everything():
    return data.Art(size=16)


def test_tables_agree_with_the_sheets():
    """Every tile of names.tsv exists on its sheet and is not blank; every sheet has its row in sets.tsv."""
    rows = data.read_table("names.tsv")
    sets = {row["set"] for row in data.read_table("sets.tsv")}
    assert {row["set"] for row in rows} == sets == {p.stem for p in (data.HERE / "sheets").iterdir()}
    for s in sets:
        with Image.open(data.HERE / "sheets" / f"{s}.webp") as sheet:
            count = sum(row["set"] == s for row in rows)
            assert sheet.width == data.COLUMNS * data.TILE
            assert sheet.height == -(-count // data.COLUMNS) * data.TILE


def test_no_tile_is_blank_and_ids_are_unique(art):
    assert art.drawings.shape == (len(art.names), 32, 32, 4)
    assert (art.drawings[..., 3].reshape(len(art.names), -1).max(1) > 0).all()
    assert len(set(zip(art.names, art.sets))) == len(art.names)


def test_the_held_out_set_is_no_training_data(everything):
    roles = {row["set"]: row["role"] for row in data.read_table("sets.tsv")}
    assert roles["openmoji"] == "held-out"
    training = [s for s, role in roles.items() if role == "training"]
    assert set(everything.sets) == set(training) and len(training) == 5
    assert set(data.Art(role="held-out", size=8).sets) == {"openmoji"}


def test_scaling_leaks_no_invisible_colour():
    """Red on transparent black, scaled down: the half-covered edge stays red, it does not darken."""
    sheet = np.zeros((data.TILE, data.TILE, 4), np.uint8)
    sheet[:, :57] = (255, 0, 0, 255)
    tile = data.Art.tile(Image.fromarray(sheet).convert("RGBa"), 0, 16)
    edge = tile[(tile[..., 3] > 20) & (tile[..., 3] < 240)]
    assert len(edge) and (edge[:, 0] > 240).all()


@pytest.mark.parametrize("name, words", [
    ("hot-air-balloon", "a hot air balloon"), ("apple", "an apple"), ("unicorn", "a unicorn"), ("cherries", "cherries"),
    ("bus", "a bus"), ("cactus", "a cactus"), ("house", "a house"), ("rice", "rice"), ("umbrella", "an umbrella"),
    ("locked", "a padlock"), ("ewe", "a ewe"), ("meat-on-bone", "meat on bone"), ("euro-banknote", "a euro banknote"), ("glass-of-milk", "a glass of milk"), ("sunglasses", "sunglasses")])
def test_content_phrases(name, words):
    assert data.content_phrase(name) == words


def test_caption_is_the_papers_template():
    assert data.caption("a cat", "watercolor painting") == "a cat in watercolor painting style"
    assert data.caption("a cat", "") == "a cat"


def test_synonyms_name_real_tiles():
    known = set(data.names())
    assert set(data.synonyms()) <= known
    assert all(words and all(words) for words in data.synonyms().values())


def test_batch_follows_from_its_generator(art):
    one = art.batch(6, np.random.default_rng(5), 32)
    two = art.batch(6, np.random.default_rng(5), 32)
    other = art.batch(6, np.random.default_rng(6), 32)
    assert (one[0] == two[0]).all() and one[1] == two[1]
    assert one[1] != other[1]
    assert one[0].shape == (6, 32, 32, 3) and one[0].dtype == np.uint8


def test_half_of_the_captions_name_no_style(art, monkeypatch):
    """Without a word of style they are drawings that have none; where one is there, it is [V*].

    Trap: "a cat" means a cat in any style, and an adapter has to unlearn all of the others.
    """
    shown, apply = [], styles.apply
    monkeypatch.setattr(styles, "apply", lambda style, *a: shown.append(style) or apply(style, *a))
    captions = art.batch(800, np.random.default_rng(0), 16)[1]
    plain = np.array([style == styles.Style() for style in shown])
    silent = np.array([not caption.endswith(" style") for caption in captions])
    unnamed = np.array([caption.endswith("in [V*] style") for caption in captions])
    assert plain[silent].all() and not plain[unnamed].any()
    assert 0.27 < silent.mean() < 0.4 and 0.1 < unnamed.mean() < 0.2
    assert 0.22 < unnamed.sum() / (~plain).sum() < 0.32     # SILENT, and every attribute left out
    rare = np.array([words.startswith("a [V] ") for words in captions])
    assert 0.005 < rare.mean() < data.RARE
    as_it_is = data.Art(sets=("twemoji",), size=16, compose=False)
    assert not any("[V" in words for words in as_it_is.batch(300, np.random.default_rng(0), 16)[1])


def test_a_batch_holds_many_drawings(art):
    """The trap of a data set that always returns item 0."""
    assert len(set(art.batch(64, np.random.default_rng(0), 16)[1])) > 40


def test_unknown_set_and_drawing():
    with pytest.raises(ValueError, match="no set 'nosuch'"):
        data.Art(sets=("nosuch",))
    with pytest.raises(ValueError, match="no drawing"):
        data.Art(sets=("twemoji",), size=8).find("nosuch", "twemoji")


# -- a folder of one's own

def save(path, image, **options):
    image.save(path, **options)
    return path


def test_folder_reads_every_picture(tmp_path):
    for i, colour in enumerate(("red", "blue", "lime")):
        save(tmp_path / f"{i}.png", Image.new("RGB", (8, 8), colour))
        (tmp_path / f"{i}.txt").write_text(f"a {colour} thing\n")
    source = data.Folder(tmp_path, 8)
    images, captions = source.batch(40, np.random.default_rng(0), 8)
    assert {tuple(image[0, 0]) for image in images} == {(255, 0, 0), (0, 0, 255), (0, 255, 0)}
    assert set(captions) == {"a red thing", "a blue thing", "a lime thing"}


def test_folder_with_a_table(tmp_path):
    save(tmp_path / "x.png", Image.new("RGB", (8, 8), "red"))
    (tmp_path / "captions.tsv").write_text("file\tcaption\nx.png\ta red thing\n")
    assert data.Folder(tmp_path, 4).captions == ["a red thing"]


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        data.Folder(tmp_path / "no")
    with pytest.raises(ValueError, match="no pictures"):
        data.Folder(tmp_path)
    save(tmp_path / "x.png", Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match="x.txt"):
        data.Folder(tmp_path)
    (tmp_path / "x.txt").write_text(" \n")
    with pytest.raises(ValueError, match="x.png has an empty caption"):
        data.Folder(tmp_path)
    for table, words in [(b"x.png\n", "empty caption"), (b"x.png\t\n", "empty caption"), (b"", "no pictures"),
                         (b"y.png\ta cat\n", "no picture at"), (b"x.png\t\xff\n", "not UTF-8")]:
        (tmp_path / "captions.tsv").write_bytes(table)
        with pytest.raises(ValueError, match=words) as error:
            data.Folder(tmp_path)
        assert "\n" not in str(error.value)


def test_folder_takes_a_table_as_it_is_written(tmp_path):
    """Quotes are words, not syntax, and the byte-order mark of some editors is neither."""
    for name in "xy":
        save(tmp_path / f"{name}.png", Image.new("RGB", (8, 8)))
    (tmp_path / "captions.tsv").write_text('\ufefffile\tcaption\nx.png\ta "big" cat\ny.png\t"a dog\n', encoding="utf-8")
    assert data.Folder(tmp_path, 4).captions == ['a "big" cat', '"a dog']


def test_plain_and_still_batches_are_the_drawings():
    """No style, nothing moved: every picture is a drawing on white, where the sheet has it. Moved ones differ."""
    still = data.Art(sets=("twemoji",), size=32, plain=1, compose=False)
    images, captions = still.batch(20, np.random.default_rng(0), 32)
    on_white = [np.asarray(Image.alpha_composite(Image.new("RGBA", (32, 32), "white"), Image.fromarray(d)).convert("RGB"), int)
                for d in still.drawings]
    apart = lambda image: min(np.abs(image - drawing).max() for drawing in on_white)
    assert max(map(apart, images.astype(int))) <= 2
    moved = copy.copy(still)
    moved.smallest = 0.9
    moved = moved.batch(20, np.random.default_rng(0), 32)[0].astype(int)
    assert np.median([apart(image) for image in moved]) > 50
    styled = copy.copy(still)
    styled.plain = 0
    styled = styled.batch(20, np.random.default_rng(0), 32)[0].astype(int)
    assert sum(apart(image) > 50 for image in styled) > 10


def test_bent_drawings_stay_themselves():
    """Half are mirrored; none is cut by much; nothing of the invisible colour comes in; amount 0 is a mirror or nothing."""
    art, rng = data.Art(sets=("twemoji",), size=32), np.random.default_rng(0)
    same = [np.abs(data.bend(d, rng, 0)[..., 3].astype(int) - d[..., 3]).max() < 3 or
            np.abs(data.bend(d, rng, 0)[..., 3].astype(int) - d[:, ::-1, 3]).max() < 3 for d in art.drawings[:20]]
    lopsided = [d for d in art.drawings if np.abs(d[..., 3].astype(int) - d[:, ::-1, 3]).mean() > 20]
    mirrored = [np.abs(data.bend(d, rng, 0)[..., 3].astype(int) - d[..., 3]).mean() > 10 for d in lopsided[:100]]
    assert any(same) and 30 < sum(mirrored) < 70
    frame = np.full((32, 32, 4), 255, np.uint8)
    kept = [data.bend(frame, rng, 0.1)[..., 3].astype(float).mean() / 255 for _ in range(50)]
    assert min(kept) > 0.5 and max(kept) <= 1 and len(set(kept)) > 20
    hidden = np.zeros((32, 32, 4), np.uint8)
    hidden[8:24, 8:24] = 255                                 # white on invisible black
    out = data.bend(hidden, rng, 0.1)
    assert (out[out[..., 3] > 0][:, :3] > 240).all()


def test_bare_batches_name_no_style_and_others_do():
    """Half the batches, whole ones; their pictures have styles all the same. By default there are none."""
    art = data.Art(sets=("twemoji",), size=16, bare=0.5)

    def is_bare(art, seed):
        return not any(words.endswith(" style") for words in art.batch(12, np.random.default_rng(seed), 16)[1])

    bare = [is_bare(art, seed) for seed in range(40)]
    assert 10 < sum(bare) < 30
    images, _ = art.batch(40, np.random.default_rng(bare.index(True)), 16)
    assert sum((image[0, 0] < 250).any() for image in images) >= 8               # grounds
    usual = data.Art(sets=("twemoji",), size=16)
    assert not any(is_bare(usual, seed) for seed in range(20))


# -- scenes: what a picture shows, and the words for it

@pytest.mark.parametrize("scene, words", [
    (Scene(("automobile",), ("red",)), "a red automobile"),
    (Scene(("automobile",), ("orange",)), "an orange automobile"),
    (Scene(("umbrella",), ("blue",)), "a blue umbrella"),
    (Scene(("glasses",), ("red",)), "red glasses"),
    (Scene(("cat",), count=2), "two cats"),
    (Scene(("balloon",), ("red",), 3), "three red balloons"),
    (Scene(("automobile", "dog"), ("red", "")), "a red automobile and a dog"),
    (Scene(("dog", "automobile"), ("", "red")), "a dog and a red automobile"),
    (Scene(("broccoli", "apple")), "broccoli and an apple"),
    (Scene(("locked",), count=4), "four padlocks")])
def test_scenes_in_words(scene, words):
    assert scenes.phrase(scene) == words


@pytest.mark.parametrize("pair", """cat:cats, computer mouse:computer mice, goose:geese, sheep:sheep,
    tropical fish:tropical fish, bus:buses, wine glass:wine glasses, glass of milk:glasses of milk,
    house with garden:houses with garden, cherry:cherries, key:keys, wolf face:wolf faces,
    leaf fluttering in wind:leaves fluttering in wind, kitchen knife:kitchen knives, ox:oxen,
    tomato:tomatoes, piano:pianos, snowman:snowmen, torch:torches, page facing up:pages facing up,
    front facing baby chick:front facing baby chicks""".split(","))
def test_plurals(pair):
    one, many = " ".join(pair.split()).split(":")
    assert english.plural(one) == many


def test_what_is_plural_or_a_mass_is_not_counted():
    for name in "glasses scissors broccoli cherries gloves sunset hammer-and-pick".split():
        assert not scenes.takes_number(name)
    assert all(map(scenes.takes_number, ("cat", "bus", "glass-of-milk", "compass")))


def test_everyday_words_have_drawings():
    for word in """tree flower car boat phone plane train clock apple book bird bear hat shoe ball heart
            cup computer lamp fruit house home cat dog horse cow pig sheep fish moon sun star cloud
            chair bed door key box bag shirt coat leaf truck bus bike knife spoon plate bottle glass
            egg cake pizza banana orange pen pencil bell guitar""".split():
        assert english.meanings().get(word), word
    assert {"deciduous-tree", "evergreen-tree"} <= set(english.meanings()["tree"])


def test_training_never_shows_or_says_a_held_out_scene(everything, monkeypatch):
    """What is drawn, and what its words may mean: a synonym must not say what the rule keeps back."""
    drawn, draw = [], scenes.draw
    monkeypatch.setattr(scenes, "draw", lambda scene, *a: drawn.append(scene) or draw(scene, *a))
    everything.batch(500, np.random.default_rng(0), 16)
    rng = np.random.default_rng(1)
    drawn += [scenes.sample(rng) for _ in range(20000)]
    assert not any(map(scenes.is_held_out, drawn))
    assert sum(bool(scene.colours) for scene in drawn) > 1000
    said = {scenes.phrase(scene, rng) for scene in drawn}
    kept = [scenes.sample(rng, held_out=True) for _ in range(6000)]
    assert all(map(scenes.is_held_out, kept))
    assert not said & {scenes.phrase(scene, rng) for scene in kept}
    assert {len(scene.things) for scene in kept} == {1, 2}


def test_a_plural_keeps_the_rule():
    """Three white flowers were "white flowers" in training, the words for a bouquet held out.

    Trap: the number is left out where the plural is also the name of one tile.
    """
    rng = np.random.default_rng(0)
    notes = Scene(("musical-note",), ("green",), 3), Scene(("musical-notes",), ("green",))
    flowers = Scene(("white-flower",), (), 3), Scene(("bouquet",), ("white",))
    for many, one in (notes, flowers):
        assert not scenes.is_held_out(many) and scenes.is_held_out(one)
        said, kept = ({scenes.phrase(scene, rng) for _ in range(200)} for scene in (many, one))
        assert not said & kept and any(words.startswith("three ") for words in said)
    cats = {scenes.phrase(Scene(("cat",), ("red",), 2), rng) for _ in range(200)}
    assert {"red cats", "two red cats"} <= cats             # elsewhere it goes on being left out


def test_a_synonym_keeps_the_rule():
    """Some red train is held out and some is not; only where all agree is it called "a red train"."""
    for word, names in english.meanings().items():
        for colour in scenes.COLOURS:
            rules = {scenes.is_held_out(Scene((name,), (colour,))) for name in names}
            scene = Scene(names[:1], (colour,))
            assert scenes.keeps_the_rule(scene, [word]) == (len(rules) == 1)


def test_about_a_fifth_of_the_pairs_of_a_scene_is_held_out_in_either_order():
    names = data.names()
    coloured = [scenes.is_held_out(Scene((name,), (c,))) for name in names for c in scenes.COLOURS]
    pairs = [(a, b) for a in names[::9] for b in names[::7] if a != b]
    two = [scenes.is_held_out(Scene(pair)) for pair in pairs]
    assert 0.18 < np.mean(coloured) < 0.22 and 0.18 < np.mean(two) < 0.22
    assert two == [scenes.is_held_out(Scene(pair[::-1])) for pair in pairs]
    assert scenes.is_held_out(Scene(("cat",), ("orange",))) == (scenes.zlib.crc32(b"orange|cat") % 5 == 0)
    assert not scenes.is_held_out(Scene(("cat",))) and not scenes.is_held_out(Scene(("cat",), count=3))


def test_kinds_keep_their_shares():
    rng = np.random.default_rng(0)
    drawn = [scenes.sample(rng) for _ in range(4000)]
    single = [scene for scene in drawn if len(scene.things) == scene.count == 1]
    assert 0.71 < len(single) / 4000 < 0.77
    assert 0.22 < np.mean([bool(scene.colours) for scene in single]) < 0.30
    assert 0.11 < np.mean([scene.count > 1 for scene in drawn]) < 0.15
    assert {scene.count for scene in drawn} == {1, 2, 3, 4}
    with pytest.raises(ValueError, match="never held out"):
        scenes.sample(rng, held_out=True, kind="one")


def test_a_thing_with_a_colour_in_its_name_gets_no_other():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        words = scenes.phrase(scenes.sample(rng, kind="coloured"), rng).split()
        assert sum(word in scenes.COLOUR_WORDS for word in words) == 1


def test_captions_use_the_vocabulary(everything):
    known = set(data.words())
    assert data.words() == sorted(known)
    assert set("cats mice red two watercolor the car in style".split()) <= known
    assert not {"stained", "sticker", "outlined", "peanutses"} & known
    rng = np.random.default_rng(0)
    said = everything.batch(600, rng, 16)[1]
    said += [scenes.phrase(scenes.sample(rng, held_out=k % 2 > 0), rng) for k in range(4000)]
    assert {word for words in said for word in words.split()} <= known


def hue_of(rgba):
    """Mean colour of what is drawn: (3,)."""
    weight = rgba[..., 3:].astype(float)
    return (rgba[..., :3] * weight).sum((0, 1)) / weight.sum()


def test_a_colour_binds_to_its_thing(art):
    """Red is the left half, blue the right half, in the order of the words; and white walls take colour too."""
    scene = Scene(("house", "automobile"), ("red", "blue"))
    picture = scenes.draw(scene, art, np.random.default_rng(0), 32)
    left, right = hue_of(picture[:, :16]), hue_of(picture[:, 16:])
    assert left[0] > left[2] + 60 and right[2] > right[0] + 60
    half = scenes.draw(Scene(("house", "automobile"), ("", "blue")), art, np.random.default_rng(0), 32)
    as_drawn = scenes.draw(Scene(("house", "automobile")), art, np.random.default_rng(0), 32)
    assert (half[:, :16] == as_drawn[:, :16]).all() and (half[:, 16:] != as_drawn[:, 16:]).any()
    for name in ("house", "polar-bear", "cloud", "panda"):
        drawing = art.drawings[art.find(name, "twemoji")]
        red = hue_of(drawings.recolour(drawing, "red", drawings.middle(drawing)))
        assert red[0] > red[1] + 60 and red[0] > red[2] + 60


def test_recolouring_keeps_lights_and_darks(art):
    drawing = art.drawings[art.find("automobile", "twemoji")]
    for colour in scenes.COLOURS:
        ramp = drawings.ramp(colour, 120) @ np.float32([0.3, 0.59, 0.11])
        assert (np.diff(ramp) > -1.5).all() and ramp[0] < 60
    assert (drawings.recolour(drawing, "blue", 120)[..., 3] == drawing[..., 3]).all()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_as_many_as_it_says(count):
    """Every place is whole inside the frame, no two overlap, and none is tiny."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        box = (0.1, 0.0, *rng.uniform(0.3, 1, 2))
        places = drawings.layout([box] * count, rng)
        covered = np.zeros((64, 64), int)
        for x, y, w, h in places:
            assert x >= 0 and y >= 0 and x + w <= 64 and y + h <= 64 and max(w, h) >= 26
            covered[y:y + h, x:x + w] += 1
        assert len(places) == count and covered.max() == 1


def test_as_many_are_drawn(art):
    picture = scenes.draw(Scene(("soccer-ball",), count=4), art, np.random.default_rng(0), 32)
    quarters = [picture[y:y + 16, x:x + 16, 3] for y in (0, 16) for x in (0, 16)]
    assert all((quarter > 128).mean() > 0.4 for quarter in quarters)


def test_draw_needs_one_set_that_has_all(art):
    with pytest.raises(ValueError, match="no set of this Art draws cat and nosuch"):
        scenes.draw(Scene(("cat", "nosuch")), art, np.random.default_rng(0), 32)


def test_the_same_scenes_at_both_sizes():
    """The same seed: the same captions, and pictures that differ by no more than their detail."""
    small, large = (data.Art(sets=("twemoji",), size=size, smallest=0.9) for size in (64, 128))
    for seed in range(3):
        images, captions = small.batch(80, np.random.default_rng(seed), 64)
        others, same = large.batch(80, np.random.default_rng(seed), 128)
        assert captions == same
        scaled = np.stack([np.asarray(Image.fromarray(image).resize((64, 64), Image.BOX), int)
                           for image in others])
        apart = np.abs(scaled - images).mean((1, 2, 3))
        assert apart.mean() < 5 and np.quantile(apart, 0.9) < 12


def test_noise_is_the_same_at_every_size():
    small, large = styles.noise(64, 4, 0)[..., 0], styles.noise(128, 4, 0)[..., 0]
    assert np.abs(large.reshape(64, 2, 64, 2).mean((1, 3)) - small).mean() < 0.03


def test_jitter_keeps_to_its_sizes():
    rng, square = np.random.default_rng(0), np.full((64, 64, 4), 255, np.uint8)
    for smallest in (0.9, 0.72):
        sides = [int((data.jitter(square, 64, rng, smallest)[..., 3] > 127).any(0).sum()) for _ in range(200)]
        assert 64 * smallest - 1 <= min(sides) < 64 * smallest + 2 and 62 <= max(sides) <= 64
