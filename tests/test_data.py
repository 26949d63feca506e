"""The art, its words, and pictures from anywhere."""

import numpy as np
import pytest
from PIL import Image

import data


@pytest.fixture(scope="module")
def art():
    return data.Art(sets=("twemoji",), size=32)


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


def test_the_held_out_set_is_no_training_data():
    roles = {row["set"]: row["role"] for row in data.read_table("sets.tsv")}
    assert roles["openmoji"] == "held-out"
    training = [s for s, role in roles.items() if role == "training"]
    assert set(data.Art(size=8).sets) == set(training) and len(training) == 5
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
    ("locked", "a padlock"), ("ewe", "a ewe"), ("euro-banknote", "a euro banknote"), ("glass-of-milk", "a glass of milk"), ("sunglasses", "sunglasses")])
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


def test_one_caption_in_four_names_no_style(art):
    """And more than half of those name a drawing that has none: else "a cat" would mean a cat in any style."""
    pictures, captions = art.batch(600, np.random.default_rng(0), 16)
    silent = np.array([not caption.endswith(" style") for caption in captions])
    assert 0.2 < silent.mean() < 0.35
    white = (pictures[:, [0, 0, -1, -1], [0, -1, 0, -1]] > 250).all((1, 2))
    assert white[silent].mean() > 0.5


def test_things_are_all_drawings_of_a_name(art):
    """Each drawing once, on white, under its own name; and nothing at all under ""."""
    things = art.things()
    assert things[""].min() == 255 and len(things) == 1 + len(set(art.names))
    assert sum(map(len, things.values())) == 1 + len(art.names)
    i = art.names.index("cat")
    cat = Image.alpha_composite(Image.new("RGBA", (art.drawings.shape[1],) * 2, "white"), Image.fromarray(art.drawings[i])).convert("RGB")
    assert np.abs(things["cat"].astype(int) - np.asarray(cat)).max(axis=(1, 2, 3)).min() <= 2


def test_things_are_asked_for_in_many_ways(art):
    """Traps: one wording alone is learned; a sentence about nothing names something; "" is broken by its template."""
    rng = np.random.default_rng(0)
    words = {art.wording("cat", rng) for _ in range(300)}
    assert {"a cat", "cat", "the cat", "a cat in [V*] style"} <= words and len(words) > 150
    known = ("cat", *data.synonyms().get("cat", ()))
    assert all(any(name in text for name in known) for text in words)
    nothing = [art.wording("", rng) for _ in range(50)]
    assert "" in nothing and not any("cat" in text or text != text.strip() for text in nothing)


def test_folder_things_are_its_captions(tmp_path):
    for name, words in (("x", "a cat"), ("y", "a dog"), ("z", "a cat")):
        save(tmp_path / f"{name}.png", Image.new("RGB", (8, 8)))
        (tmp_path / f"{name}.txt").write_text(words)
    folder = data.Folder(tmp_path, 4)
    assert {words: len(pictures) for words, pictures in folder.things().items()} == {"": 1, "a cat": 2, "a dog": 1}
    assert all(folder.wording("a cat", np.random.default_rng(i)).startswith("a cat") for i in range(9))


def test_a_batch_holds_many_drawings(art):
    """The trap of a data set that always returns item 0."""
    assert len(set(art.batch(64, np.random.default_rng(0), 16)[1])) > 40


def test_unknown_set_and_drawing():
    with pytest.raises(ValueError, match="no set 'nosuch'"):
        data.Art(sets=("nosuch",))
    with pytest.raises(ValueError, match="no drawing"):
        data.Art(sets=("twemoji",), size=8).find("nosuch", "twemoji")


# -- pictures from anywhere

def save(path, image, **options):
    image.save(path, **options)
    return path


def test_alpha_lies_on_white(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (data.read_image(save(tmp_path / "a.png", clear), 4) == 255).all()
    grey = Image.new("LA", (8, 8), (0, 0))
    assert (data.read_image(save(tmp_path / "b.png", grey), 4) == 255).all()
    indexed = Image.new("P", (8, 8), 0)
    assert (data.read_image(save(tmp_path / "c.png", indexed, transparency=0), 4) == 255).all()


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    path = save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert data.read_image(path, 2)[0, 0].tolist() == [255, 0, 0]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    for value, expected in ((0x8000, 128), (0xffff, 255), (200, 1)):          # a dark picture stays dark
        flat = Image.fromarray(np.full((4, 4), value, np.uint16))
        assert abs(int(data.read_image(save(tmp_path / "a.png", flat), 2)[0, 0, 0]) - expected) <= 1
    half = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    assert abs(int(data.read_image(save(tmp_path / "a.tif", half), 2)[0, 0, 0]) - 128) <= 1


@pytest.mark.parametrize("mode, suffix, colour, expected", [
    ("CMYK", ".jpg", (0, 0, 0, 0), 255), ("L", ".png", 90, 90), ("1", ".png", 1, 255), ("RGB", ".bmp", (7, 7, 7), 7)])
def test_modes(tmp_path, mode, suffix, colour, expected):
    image = data.read_image(save(tmp_path / f"a{suffix}", Image.new(mode, (9, 5), colour)), 4)
    assert image.shape == (4, 4, 3) and image.dtype == np.uint8
    assert abs(image.astype(int) - expected).max() <= 2


def test_one_pixel_and_upright(tmp_path):
    assert data.read_image(save(tmp_path / "a.png", Image.new("RGB", (1, 1), "red")), 4).shape == (4, 4, 3)
    picture = Image.fromarray(np.repeat(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8), 2, 0))
    exif = Image.Exif()
    exif[0x112] = 3                                          # upside down
    turned = data.read_image(save(tmp_path / "b.png", picture, exif=exif), 2)
    assert turned[0, 0].tolist() == [0, 0, 255]


def test_centre_square(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert (data.read_image(save(tmp_path / "a.png", Image.fromarray(wide)), 10) == 255).all()


def test_what_is_no_picture(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = save(tmp_path / "whole.png", noise).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[:len(whole) // 2])
    garbled = bytearray(save(tmp_path / "damaged.tif", noise).read_bytes())
    garbled[12::7] = bytes(byte ^ 0x5a for byte in garbled[12::7])
    (tmp_path / "damaged.tif").write_bytes(garbled)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")            # Pillow itself refuses this one
    Image.new("1", (9_000, 9_000)).save(tmp_path / "large.png")
    for name, words in [("missing.png", "no picture"), ("", "folder"), ("empty.png", "is empty"),
                        ("text.png", "not a picture"), ("half.png", "cannot be read"), ("bomb.png", "pixels"), ("large.png", "9000 x 9000"),
                        ("damaged.tif", "damaged.tif")]:
        with pytest.raises(ValueError, match=words) as error:
            data.read_image(tmp_path / name, 4)
        assert "\n" not in str(error.value)


# -- a folder of one's own

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
    still = data.Art(sets=("twemoji",), size=32, plain=1)
    images, captions = still.batch(20, np.random.default_rng(0), 32)
    on_white = [np.asarray(Image.alpha_composite(Image.new("RGBA", (32, 32), "white"), Image.fromarray(d)).convert("RGB"), int)
                for d in still.drawings]
    apart = lambda image: min(np.abs(image - drawing).max() for drawing in on_white)
    assert max(map(apart, images.astype(int))) <= 2
    moved = data.Art(sets=("twemoji",), size=32, smallest=0.9, plain=1).batch(20, np.random.default_rng(0), 32)[0].astype(int)
    assert np.median([apart(image) for image in moved]) > 50
    styled = data.Art(sets=("twemoji",), size=32, plain=0).batch(20, np.random.default_rng(0), 32)[0].astype(int)
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
    phrases = {data.content_phrase(name) for name in data.names()} | {
        data.content_phrase(word) for name in data.names() for word in data.synonyms().get(name, ())}
    art = data.Art(sets=("twemoji",), size=16, bare=0.5)
    bare = [set(art.batch(12, np.random.default_rng(seed), 16)[1]) <= phrases for seed in range(40)]
    assert 10 < sum(bare) < 30
    images, _ = art.batch(12, np.random.default_rng(bare.index(True)), 16)
    assert sum((image[0, 0] < 250).any() for image in images) >= 3               # grounds
    usual = data.Art(sets=("twemoji",), size=16)
    assert not any(set(usual.batch(12, np.random.default_rng(seed), 16)[1]) <= phrases for seed in range(20))


def test_jitter_keeps_to_its_sizes():
    rng, square = np.random.default_rng(0), np.full((64, 64, 4), 255, np.uint8)
    for smallest in (0.9, 0.72):
        sides = [int((data.jitter(square, 64, rng, smallest)[..., 3] > 127).any(0).sum()) for _ in range(200)]
        assert 64 * smallest - 1 <= min(sides) < 64 * smallest + 2 and 62 <= max(sides) <= 64
