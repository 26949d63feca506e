"""experiments/superres.py: its rulers, and one lesson at toy size."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments import superres
from experiments.superres import TRIED, WITH, WITHOUT


def toy_art(side):
    """Three drawings of coarse colours, all of the tile."""
    colours = np.random.default_rng(0).integers(0, 255, (3, 4, 4, 4), np.uint8)
    drawings = colours.repeat(side // 4, 1).repeat(side // 4, 2)
    drawings[..., 3] = 255
    index = {"noto": {"cat": 0, "house": 1, "owl": 2}}
    return SimpleNamespace(drawings=drawings, index=index, smallest=0.9, bent=0,
                           boxes=[(0, 0, 1, 1)] * 3, find=lambda name, hand: index[hand][name])


def test_rulers_know_equal_pictures_and_edges():
    x = torch.zeros(2, 3, 8, 8)
    x[1, :, :, 4:] = 1
    assert superres.psnr(x, x + 0.2) == pytest.approx([20, 20])      # 10 log10(4 / 0.04)
    flat, edge = superres.laplacian(x)
    assert flat == 0 and edge == pytest.approx(2 / 6)                # two columns of six see it


def test_a_lesson_compares_with_and_without_the_adapter(pipe2, make_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(pipe2, "tune", lambda images, prompts, words: make_adapter(
        0, words, pipe2.base, second=0))
    art = toy_art(pipe2.resolution)
    style = superres.choose_styles(TRIED)[0]
    lesson = superres.Lesson(pipe2, art, 0, style, 2, tmp_path)
    other = lesson.adapter.superres
    found = superres.taught(lesson, other, (2.0, 0.0), tmp_path / "strip.npy")
    assert np.load(tmp_path / "strip.npy").shape == (2, 6, 32, 32, 3)
    for rows in found.values():                             # the other adapter is the same here
        assert rows[WITH] == rows[superres.OTHER] != rows[WITHOUT]
    assert found["samples"][superres.CHOSEN] != found["samples"][WITH]
    again = superres.Lesson(pipe2, art, 0, style, 2, tmp_path)       # read from its file
    assert torch.equal(again.second(other), lesson.second(other))


def test_the_second_stage_alone_draws_what_the_pipeline_draws_of_it(pipe2):
    low = superres.first_stage(pipe2, ["a cat", "a house"], seed=3)
    one = superres.enlarge(pipe2, low, ["a cat", "a house"], seed=5)
    assert torch.equal(superres.enlarge(pipe2, low[1:], ["a house"], seed=6), one[1:])
    assert torch.equal(superres.decode(pipe2, low), pipe2.generate(
        ["a cat", "a house"], seed=3, superres=False))
