"""The space of styles: what is held out, what a phrase says, what `apply` returns."""

import collections
from dataclasses import astuple

import numpy as np
import pytest

import data
from data import styles
from data.styles import Style


def drawing(size, alpha=None):
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (size, size, 4), dtype=np.uint8)
    y, x = np.mgrid[:size, :size]
    rgba[..., 3] = (np.hypot(y - size / 2, x - size / 2) < size / 3) * 255 if alpha is None else alpha
    return rgba


def test_training_never_sees_a_held_out_style():
    rng = np.random.default_rng(0)
    assert not any(styles.is_held_out(styles.sample(rng)) for _ in range(2000))
    assert all(styles.is_held_out(styles.sample(rng, held_out=True)) for _ in range(300))


def test_training_batches_never_show_a_held_out_style(monkeypatch):
    """What is drawn, not what is sampled."""
    drawn, apply = [], styles.apply
    monkeypatch.setattr(styles, "apply", lambda style, *a: drawn.append(style) or apply(style, *a))
    data.Art(["noto"], size=16).batch(300, np.random.default_rng(0), 16)
    assert len(drawn) == 300 and len(set(drawn)) > 50 and not any(map(styles.is_held_out, drawn))


def test_every_other_value_occurs_in_training():
    rng = np.random.default_rng(0)
    seen = collections.defaultdict(set)
    for _ in range(5_000):
        for attribute, value in zip(styles.ATTRIBUTES, astuple(styles.sample(rng))):
            seen[attribute].add(value)
    for attribute, values in styles.ATTRIBUTES.items():
        assert set(values) - seen[attribute] == set(styles.HELD_OUT.get(attribute, ()))


def test_about_a_fifth_of_the_pairs_is_held_out():
    values = [(k, v) for k, vs in styles.ATTRIBUTES.items() for v in vs if v != "white" and v not in styles.HELD_OUT.get(k, ())]
    pairs = [(a, b) for i, a in enumerate(values) for b in values[i + 1:] if a[0] != b[0]]
    share = np.mean([styles.is_held_out(Style(**dict(pair))) for pair in pairs])
    assert 0.15 < share < 0.25


def test_the_rule_is_the_same_on_every_machine():
    """Not Python's hash(), which changes from process to process."""
    assert styles.is_held_out(Style("navy and gold", "", "watercolor", "cream"))
    assert not styles.is_held_out(Style("blue and white", "", "chalk", "navy"))


def test_phrases():
    style = Style("navy and gold", "thick red outline", "watercolor", "black", "drop shadow")
    assert styles.phrase(style, "flat vector") == "navy and gold watercolor with thick red outline and drop shadow on black"
    assert styles.phrase(Style(), "flat vector") == "flat vector"
    assert styles.phrase(Style(line="line drawing"), "") == "line drawing"
    assert styles.phrase(Style(ground="teal"), "") == "teal ground"
    assert styles.phrase(Style(line="thin blue outline"), "") == "thin blue outline"


def test_words_drop_only_by_chance():
    style = Style("navy and gold", "", "watercolor", "black")
    whole = styles.phrase(style, "flat vector")
    said = collections.Counter(styles.phrase(style, "flat vector", np.random.default_rng(i)) for i in range(2000))
    as_drawn = [styles.phrase(Style(), "flat vector", np.random.default_rng(i)) for i in range(2000)]
    assert 0.21 < said[""] / 2000 < 0.29
    assert 0.79 < as_drawn.count("") / 2000 < 0.87          # 4/5, and 1/7 of the rest
    assert said[whole] > 400 and len(said) > 4
    assert all(set(words.split()) <= set(whole.split()) | {"ground"} for words in said)


@pytest.mark.parametrize("size", [16, 64])
def test_apply_gives_a_picture(size):
    rng = np.random.default_rng(1)
    for attribute, values in styles.ATTRIBUTES.items():
        for value in values[::5] if attribute in ("palette", "ground") else values:
            for rgba in (drawing(size), drawing(size, 0), drawing(size, 255)):
                picture = styles.apply(Style(**{attribute: value}), rgba, rng)
                assert picture.shape == (size, size, 3) and picture.dtype == np.uint8


def test_keep_colours_keeps_them_and_stays_in_training():
    rng, drawn = np.random.default_rng(0), drawing(32, 255)
    for _ in range(300):
        style = styles.keep_colours(styles.sample(rng), ("", "red"))
        assert not style.palette and "red" not in style.ground and style.line != "line drawing"
        assert not styles.is_held_out(style)
        one, two = (styles.apply(style, rgba, np.random.default_rng(0))
                    for rgba in (drawn, drawn[..., [2, 0, 1, 3]]))
        assert np.abs(one.astype(int) - two).mean() > 2


def test_apply_follows_from_its_generator():
    rgba = drawing(64)
    for seed in range(20):
        style = styles.sample(np.random.default_rng(seed))
        one, two = (styles.apply(style, rgba, np.random.default_rng(9)) for _ in range(2))
        assert (one == two).all()


def test_every_medium_and_light_changes_the_picture():
    plain = styles.apply(Style(), drawing(64), np.random.default_rng(0)).astype(int)
    for attribute in ("medium", "light", "line"):
        for value in styles.ATTRIBUTES[attribute]:
            styled = styles.apply(Style(**{attribute: value}), drawing(64), np.random.default_rng(0))
            assert abs(styled - plain).mean() > 1, value


def test_a_two_tone_palette_uses_two_tones():
    rgba = drawing(64)
    picture = styles.apply(Style("navy and gold"), rgba, np.random.default_rng(0))[rgba[..., 3] == 255] / 255
    dark, light = styles.HUES["navy"], styles.HUES["gold"]
    t = ((picture - dark) @ (light - dark)) / ((light - dark) @ (light - dark))
    assert abs(picture - (dark + t[:, None] * (light - dark))).max() < 0.02
    assert t.min() < 0.05 and t.max() > 0.95
