"""The space of styles: what is held out, what a phrase says, and what is painted."""

from dataclasses import replace

import numpy as np
import pytest

from data import Art, Scene, free_styles, styles
from data.styles import ATTRIBUTES, HELD_OUT, HUES, SEEDS, Style


def drawing(size, alpha=None):
    """A disc of random colours, or a frame of one alpha."""
    rgba = np.random.default_rng(0).integers(0, 256, (size, size, 4), dtype=np.uint8)
    if alpha is None:
        y, x = np.mgrid[:size, :size] - size / 2
        rgba[..., 3] = (np.hypot(y, x) < size / 3) * 255
    else:
        rgba[..., 3] = alpha
    return rgba


def paint(style, rgba, seed=0):
    return styles.apply(style, rgba, np.random.default_rng(seed))


def difference(one, other):
    """Mean difference of two pictures, of 255."""
    return np.abs(one.astype(int) - other.astype(int)).mean()


# -- what is held out

@pytest.fixture(scope="module")
def trained():
    """5,000 styles as training samples them."""
    rng = np.random.default_rng(0)
    return [styles.sample(rng) for _ in range(5000)]


def test_no_style_of_training_is_held_out(trained):
    assert not any(map(styles.is_held_out, trained))


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_other_value_is_seen_in_training(trained, attribute):
    seen = {getattr(style, attribute) for style in trained}
    assert set(ATTRIBUTES[attribute]) - seen == set(HELD_OUT.get(attribute, ()))


def test_held_out_styles_can_be_asked_for():
    rng = np.random.default_rng(0)
    found = [styles.sample(rng, held_out=True) for _ in range(300)]
    assert all(map(styles.is_held_out, found))
    assert {style.free for style in found} == {True, False}


def test_shares_of_training(trained):
    """Three in ten stay as drawn; half of the others have no words."""
    is_plain = np.mean([styles.is_plain(style) for style in trained])
    is_free = np.mean([style.free for style in trained])
    assert styles.PLAIN < is_plain < styles.PLAIN + 0.05     # some have no attribute by chance
    assert is_free == pytest.approx((1 - styles.PLAIN) * styles.FREE, abs=0.02)
    assert sum(styles.is_plain(styles.sample(np.random.default_rng(i), plain=1))
               for i in range(50)) == 50


@pytest.mark.parametrize("plain", [0, styles.PLAIN])
def test_training_pictures_without_colours_have_free_styles(plain):
    """Half of the styles of a scene have no words, unless its caption names a colour.

    What captions say of them: test_data.py.
    """
    art = Art(sets=("streamline-freehand",), size=16, plain=plain)
    rng = np.random.default_rng(0)
    found = [art.sample_style(Scene(("cat",)), rng) for _ in range(2000)]
    is_free = np.mean([style.free for style in found])
    assert is_free == pytest.approx((1 - plain) * styles.FREE, abs=0.03)
    assert {styles.phrase(style, "flat vector") for style in found if style.free} == {""}
    red = Scene(("cat",), colours=("red",))
    assert not any(art.sample_style(red, rng).free for _ in range(500))


def test_a_fifth_of_the_pairs_is_held_out():
    """By CRC-32. Trap: Python's hash(), which changes from process to process."""
    values = []
    for attribute, words in ATTRIBUTES.items():
        for word in words:
            if word != "white" and word not in HELD_OUT.get(attribute, ()):
                values.append((attribute, word))
    found = []
    for i, one in enumerate(values):
        for other in values[i + 1:]:
            if one[0] != other[0]:
                found.append(styles.is_held_out(Style(**dict([one, other]))))
    assert 0.15 < np.mean(found) < 0.25


def test_a_pair_is_held_out_whatever_else_there_is():
    assert styles.is_held_out(Style("navy and gold", "", "watercolor", "cream"))
    assert styles.is_held_out(Style("navy and gold", "thin red outline", "watercolor", "cream"))
    assert not styles.is_held_out(Style("blue and white", "", "chalk", "navy"))


def test_a_fifth_of_the_free_styles_is_held_out():
    """By their seed, and always the same ones."""
    rng = np.random.default_rng(0)
    seeds = rng.integers(SEEDS, size=3000).tolist()
    found = [styles.is_held_out(Style(free=True, seed=seed)) for seed in seeds]
    assert 0.17 < np.mean(found) < 0.23
    assert styles.is_held_out(Style(free=True, seed=0)) == (
        styles.zlib.crc32(b"free 0") % 5 == 0)


def test_the_seed_of_a_named_style_does_not_matter():
    for seed in range(50):
        style = Style("blue and white", "", "chalk", "navy", seed=seed)
        assert not styles.is_held_out(style)


# -- what a phrase says

@pytest.mark.parametrize("style, icon_style, words", [
    (Style("navy and gold", "thick red outline", "watercolor", "black", "drop shadow"), "flat",
     "navy and gold watercolor with thick red outline and drop shadow on black"),
    (Style(), "flat vector", "flat vector"), (Style(ground="teal"), "", "teal ground"),
    (Style("sepia", "line drawing"), "flat", "sepia flat line drawing"),
    (Style(light="sticker"), "", "sticker"), (Style(free=True, seed=7), "flat vector", "")])
def test_phrases(style, icon_style, words):
    """A free style has none."""
    assert styles.phrase(style, icon_style) == words


def test_words_are_left_out_by_chance():
    """Each attribute, or all of them; no word is added but "ground"."""
    style = Style("navy and gold", "", "watercolor", "black")
    whole = styles.phrase(style, "flat vector")
    said = [styles.phrase(style, "flat vector", np.random.default_rng(i)) for i in range(2000)]
    assert whole in said and len(set(said)) > 4
    for words in said:
        assert set(words.split()) <= {*whole.split(), "ground"}
    assert said.count("") / 2000 == pytest.approx(styles.SILENT[1], abs=0.04)


def test_drawings_as_they_are_mostly_name_no_style():
    said = [styles.phrase(Style(), "flat vector", np.random.default_rng(i)) for i in range(1000)]
    assert set(said) == {"", "flat vector"}
    assert said.count("") / 1000 == pytest.approx(styles.SILENT[0] + 0.2 / 7, abs=0.04)


# -- what is painted

def styles_of_one_value():
    """Each value alone; of the many palettes and grounds, every fifth."""
    found = []
    for attribute, values in ATTRIBUTES.items():
        if attribute in ("palette", "ground"):
            values = values[::5]
        found += [Style(**{attribute: value}) for value in values if value != "white"]
    return found


NAMED = styles_of_one_value()
FREE_STYLES = [Style(free=True, seed=seed) for seed in range(40)]
ALL = [*NAMED, *FREE_STYLES]
IDS = [str(styles.named(style) or style.seed) for style in ALL]


@pytest.mark.parametrize("style", ALL, ids=IDS)
def test_every_style_paints_a_picture(style):
    """Also of an empty and of a full drawing."""
    for size, alpha in ((16, None), (16, 0), (16, 255), (64, None)):
        picture = paint(style, drawing(size, alpha))
        assert picture.shape == (size, size, 3) and picture.dtype == np.uint8


@pytest.mark.parametrize("style", ALL, ids=IDS)
def test_a_picture_follows_from_its_generator(style):
    rgba = drawing(32)
    assert (paint(style, rgba) == paint(style, rgba)).all()


@pytest.mark.parametrize("style", NAMED, ids=IDS[:len(NAMED)])
def test_every_value_changes_the_picture(style):
    rgba = drawing(64)
    assert difference(paint(style, rgba), paint(Style(), rgba)) > 1


def test_a_plain_style_lays_the_drawing_on_white():
    rgba = drawing(32)
    picture = paint(Style(), rgba)
    assert (picture[rgba[..., 3] == 0] == 255).all()
    is_inside = rgba[..., 3] == 255
    assert np.abs(picture[is_inside].astype(int) - rgba[is_inside][:, :3]).max() <= 1


def test_no_invisible_colour_is_painted():
    """Trap: the colours of transparent pixels leak into blurs and means."""
    rgba = drawing(32)
    other = rgba.copy()
    other[rgba[..., 3] == 0, :3] = (255, 0, 255)
    for style in (*NAMED[::7], *FREE_STYLES[:10]):
        assert difference(paint(style, rgba), paint(style, other)) < 1


MEDIA = [Style(medium=medium) for medium in ATTRIBUTES["medium"]]


@pytest.mark.parametrize("style", [*MEDIA, Style("navy and gold"), Style(ground="navy")], ids=str)
def test_words_name_a_region(style):
    """Two seeds of one phrase look different: a word means no single picture."""
    rgba = drawing(64)
    shown = [paint(replace(style, seed=seed), rgba) for seed in range(5)]
    assert max(difference(shown[0], other) for other in shown[1:]) > 0.5


def test_free_styles_differ_more_than_their_pictures():
    """What characterises a style follows from its seed: two pictures of it are alike.

    The means are compared over 40 styles, in colours alone, which no place changes.
    """
    rgba = drawing(64)

    def colours(picture):
        return np.sort(picture.reshape(-1, 3).astype(int), axis=0)

    within, between = [], []
    for one, other in zip(FREE_STYLES, [*FREE_STYLES[1:], FREE_STYLES[0]]):
        shown = colours(paint(one, rgba, 0))
        within.append(np.abs(shown - colours(paint(one, rgba, 1))).mean())
        between.append(np.abs(shown - colours(paint(other, rgba, 1))).mean())
    assert np.mean(within) < 0.3 * np.mean(between)


def test_a_free_style_shows_its_object():
    """Trap: a background of the object's own lightness, on which nothing is seen."""
    grey = drawing(32)
    grey[..., :3] = 128
    is_inside = grey[..., 3] == 255
    is_hidden = []
    for seed in range(120):
        light = paint(Style(free=True, seed=seed), grey) @ [0.3, 0.59, 0.11]
        contrast = abs(np.median(light[is_inside]) - np.median(light[~is_inside]))
        is_hidden.append(contrast < 20)
    assert np.mean(is_hidden) < 0.12


@pytest.mark.parametrize("object_light, ground_light", [(0.5, 0.5), (0.1, 0.1), (0.95, 0.9)])
def test_a_background_is_set_apart(object_light, ground_light):
    """By at least 0.22 of its lightness."""
    p = np.full((8, 8, 3), object_light, np.float32)
    a = np.ones((8, 8, 1), np.float32)
    ground = free_styles.set_apart(p, a, np.full((8, 8, 3), ground_light, np.float32))
    assert abs(ground.mean() - object_light) > 0.21
    assert ground.min() >= 0 and ground.max() <= 1


def test_a_background_that_is_apart_stays():
    p = np.zeros((8, 8, 3), np.float32)
    a = np.ones((8, 8, 1), np.float32)
    ground = np.full((8, 8, 3), 0.6, np.float32)
    assert (free_styles.set_apart(p, a, ground) == ground).all()


def test_a_palette_of_two_has_no_other_colours():
    rgba = drawing(64)
    picture = paint(Style("navy and gold"), rgba)[rgba[..., 3] == 255] / 255
    point = np.random.default_rng(0)                         # of Style.seed
    dark, light = styles.near("navy", point), styles.near("gold", point)
    along = light - dark
    t = ((picture - dark) @ along) / (along @ along)
    assert np.abs(picture - (dark + t[:, None] * along)).max() < 0.02
    assert t.min() < 0.05 and t.max() > 0.95


@pytest.mark.parametrize("name", HUES)
def test_a_hue_is_a_region_around_its_colour(name):
    """Two draws of it differ, and it is nearest to its own name for most of them."""
    point = np.random.default_rng(0)
    found = np.stack([styles.near(name, point) for _ in range(100)])
    assert found.min() >= 0 and found.max() <= 1
    assert len(np.unique(found.round(3), axis=0)) > 20
    names = list(HUES)
    distances = np.linalg.norm(found[:, None] - np.stack(list(HUES.values())), axis=2)
    nearest = [names[i] for i in distances.argmin(1)]
    assert nearest.count(name) > 50


def test_noise_is_the_same_at_every_size():
    small = styles.noise(64, 4, np.random.default_rng(0))[..., 0]
    large = styles.noise(128, 4, np.random.default_rng(0))[..., 0]
    shrunk = large.reshape(64, 2, 64, 2).mean((1, 3))
    assert np.abs(shrunk - small).mean() < 0.03


@pytest.mark.parametrize("style", [*NAMED[::9], *FREE_STYLES[:8]], ids=str)
def test_a_style_is_the_same_at_every_size(style):
    """Trap: how many random numbers are taken depends on the size."""
    large = drawing(16).repeat(8, 0).repeat(8, 1)            # (128, 128, 4)
    small = large[::2, ::2]
    shrunk = paint(style, large).reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert difference(shrunk, paint(style, small)) < 16


def test_keep_colours_leaves_what_hides_none():
    """A caption that says "a red cat" needs a picture in which it is red."""
    rng = np.random.default_rng(0)
    full = drawing(32, 255)
    for _ in range(200):
        style = styles.keep_colours(styles.sample(rng), ("", "red"))
        assert not style.palette and not style.free
        assert "red" not in style.ground.split()
        assert style.line != "line drawing"
        assert style.medium not in ("woodcut", "wooden", "golden")
        assert not styles.is_held_out(style)
        other_colours = full[..., [2, 0, 1, 3]]
        assert difference(paint(style, full), paint(style, other_colours)) > 2
