"""The space of styles: what is held out, what a phrase says, what `apply` returns."""

import numpy as np
import pytest

from data import styles
from data.styles import Style


def drawing(size, alpha=None):
    rgba = np.random.default_rng(0).integers(0, 256, (size, size, 4), dtype=np.uint8)
    y, x = np.mgrid[:size, :size] - size / 2
    rgba[..., 3] = (np.hypot(y, x) < size / 3) * 255 if alpha is None else alpha
    return rgba


def test_training_never_sees_a_held_out_style():
    """What is drawn: test_data.py. Every other value occurs."""
    rng = np.random.default_rng(0)
    assert all(styles.is_held_out(styles.sample(rng, held_out=True)) for _ in range(300))
    drawn = [styles.sample(rng) for _ in range(5000)]
    assert not any(map(styles.is_held_out, drawn))
    for attribute, values in styles.ATTRIBUTES.items():
        unseen = set(values) - {getattr(style, attribute) for style in drawn}
        assert unseen == set(styles.HELD_OUT.get(attribute, ()))


def test_about_a_fifth_of_the_pairs_is_held_out_on_every_machine():
    """By CRC-32. Trap: Python's hash(), which changes from process to process."""
    values = [(k, v) for k, vs in styles.ATTRIBUTES.items() for v in vs
              if v != "white" and v not in styles.HELD_OUT.get(k, ())]
    pairs = [(a, b) for i, a in enumerate(values) for b in values[i + 1:] if a[0] != b[0]]
    assert 0.15 < np.mean([styles.is_held_out(Style(**dict(pair))) for pair in pairs]) < 0.25
    assert styles.is_held_out(Style("navy and gold", "", "watercolor", "cream"))
    assert not styles.is_held_out(Style("blue and white", "", "chalk", "navy"))


@pytest.mark.parametrize("style, icon_style, words", [
    (Style("navy and gold", "thick red outline", "watercolor", "black", "drop shadow"), "flat",
     "navy and gold watercolor with thick red outline and drop shadow on black"),
    (Style(), "flat vector", "flat vector"), (Style(ground="teal"), "", "teal ground"),
    (Style("sepia", "line drawing"), "flat", "sepia flat line drawing")])
def test_phrases(style, icon_style, words):
    assert styles.phrase(style, icon_style) == words


def test_words_drop_only_by_chance():
    style, chance = Style("navy and gold", "", "watercolor", "black"), np.random.default_rng
    whole = styles.phrase(style, "flat vector")
    said = {styles.phrase(style, "flat vector", chance(i)) for i in range(2000)}
    assert {whole, ""} < said and len(said) > 4
    assert all(set(words.split()) <= set(whole.split()) | {"ground"} for words in said)


def test_keep_colours_keeps_them_and_stays_in_training():
    rng, drawn = np.random.default_rng(0), drawing(32, 255)
    for _ in range(300):
        style = styles.keep_colours(styles.sample(rng), ("", "red"))
        assert not style.palette and "red" not in style.ground and style.line != "line drawing"
        assert style.medium not in ("woodcut", "wooden", "golden") and not styles.is_held_out(style)
        one, two = (styles.apply(style, rgba, np.random.default_rng(0))
                    for rgba in (drawn, drawn[..., [2, 0, 1, 3]]))
        assert np.abs(one.astype(int) - two).mean() > 2


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("alpha", [None, 0, 255])
def test_every_value_gives_a_picture_and_changes_it(size, alpha):
    """Also of an empty and of a full drawing; the same for the same generator."""
    rgba = drawing(size, alpha)
    draw = lambda **value: styles.apply(Style(**value), rgba, np.random.default_rng(0))
    plain = draw().astype(int)
    for attribute, values in styles.ATTRIBUTES.items():
        for value in values[::5] if attribute in ("palette", "ground") else values:
            picture = draw(**{attribute: value})
            assert picture.dtype == np.uint8 and (picture == draw(**{attribute: value})).all()
            if alpha is None and value != "white":
                assert abs(picture - plain).mean() > 1, value


def test_two_tones_and_noise():
    """A palette of two uses both and nothing else; noise is the same at every size."""
    rgba, dark, light = drawing(64), styles.HUES["navy"], styles.HUES["gold"]
    picture = styles.apply(Style("navy and gold"), rgba, np.random.default_rng(0))
    picture = picture[rgba[..., 3] == 255] / 255
    t = ((picture - dark) @ (light - dark)) / ((light - dark) @ (light - dark))
    assert abs(picture - (dark + t[:, None] * (light - dark))).max() < 0.02
    assert t.min() < 0.05 and t.max() > 0.95
    small, large = (styles.noise(size, 4, 0)[..., 0] for size in (64, 128))
    assert np.abs(large.reshape(64, 2, 64, 2).mean((1, 3)) - small).mean() < 0.03
