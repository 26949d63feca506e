"""The experiments' own arithmetic: an experiment with a wrong ruler finds whatever it likes."""

import math

import numpy as np
import pytest
import torch
from conftest import generator

import data
from experiments import base, common, judge, one_shot, quality, speed

NAMES = data.names()


class FakeJudge(torch.nn.Module):
    """Says of picture i the name of the number in its first pixel."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return {"content": -(torch.arange(len(NAMES)) - images[:, 0, 0, :1]).abs()}


def test_named_counts_what_the_judge_says():
    """0: the judge names another; in between: where two random others miss the nearer names."""
    images = torch.zeros(6, 3, 2, 2)
    images[:, 0, 0, 0] = torch.tensor([0.0, 5, 400, 836, 9, 9])
    found = judge.named(FakeJudge(), images, [NAMES[i] for i in (0, 5, 400, 836, 800, 10)])
    assert found[:5].tolist() == [1, 1, 1, 1, 0]            # 8, 9 score as high as 10 or higher
    assert found[5].item() == pytest.approx(737 / 836 * 736 / 835)


# -- distances and errors

def test_distances():
    """Zero for equal pictures, symmetric; palette sees no place, texture no colour."""
    palette, texture = one_shot.palette_distance, one_shot.texture_distance
    x, y = (torch.rand(3, 3, 16, 16, generator=generator(seed)) * 2 - 1 for seed in (0, 1))
    for distance in (palette, texture):
        assert distance(x, x).tolist() == [0, 0, 0]
        assert torch.allclose(distance(x, y), distance(y, x)) and (distance(x, y) > 0).all()
    flat = lambda *rgb: torch.tensor(rgb).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    red, blue, pink = flat(1.0, -1, -1), flat(-1.0, -1, 1), flat(1.0, -0.5, -0.5)
    assert palette(red, blue) > palette(red, pink) > 0 and palette(x, x.flip(-1)).max() < 1e-6
    stripes = torch.zeros(1, 3, 16, 16)
    stripes[..., ::2] = 1
    assert texture(red, blue).item() < 1e-6 and texture(red, stripes) > 0.05
    assert texture(stripes, stripes.mT) > 0.05 and texture(stripes, stripes.roll(2, -1)) < 1e-6


def test_paired_bootstrap_on_known_data():
    a, b = (np.random.default_rng(seed).normal(size=100) for seed in (0, 1))
    same = one_shot.paired_bootstrap(a + 2, a, generator())                      # no spread at all
    assert same == pytest.approx((2, 2, 2))
    mean, low, high = one_shot.paired_bootstrap(a, b, generator())
    error = (a - b).std() / 10
    assert mean == pytest.approx((a - b).mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.2 * error)


def test_standard_errors():
    """Over groups, without NaN. Trap: over pictures alone, where styles differ more than those."""
    error = np.std([1, 2, 3, 4], ddof=1) / 2
    assert common.mean_and_error([1.0, 2, 3, 4]) == pytest.approx((2.5, error))
    assert common.with_error([1.0, 2, 3, 4], digits=3) == f"2.500 ± {error:.3f}"
    grouped = common.with_error([0.0, 2, math.nan, 5, 5, 5], [0, 0, 0, 1, 1, 1], digits=1)
    assert grouped == "3.0 ± 2.0"
    assert quality.share(torch.tensor([[1, 1], [0, 0]])) == pytest.approx((50, 50))
    assert common.with_error([math.nan]) == common.percent([], []) == "-"
    assert common.with_error([3.0]) == "3.0 ± nan"
    assert common.percent(torch.tensor([True, False])) == "50.0 ± 50.0 %"


def test_bootstrapped_errors_of_two_figures():
    """Of a mean and of a constant, by hand: s / sqrt(n), and none."""
    rows = torch.arange(100.0)
    figures = lambda x: (x.mean().item(), 7.0)
    mean, constant = base.bootstrapped(figures, rows, generator(), draws=2000)
    value, error = map(float, mean.split(" ± "))
    assert value == 49.5 and error == pytest.approx(rows.std(correction=0).item() / 10, rel=0.1)
    assert constant == "7 ± 0"


def test_one_shot_says_what_tuning_changed():
    """In percent where it is a share, with an interval that pairs the styles."""
    row = lambda palette, seen: dict.fromkeys(one_shot.METRICS, palette) | {"object seen": seen}
    found, tuned = [], one_shot.MADE[4]
    for i, words in enumerate(("gold", "chalk")):
        rows = {name: row(0.3 + i, 0.5) for name in one_shot.MADE}
        rows |= {tuned: row(0.1 + i, 0.75), one_shot.FLOOR: row(0.0 + i, 1.0)}
        found.append((words, rows))
    lines = {line.split(" | ")[0]: line for line in one_shot.report(found, 0)}
    assert lines[f"| {tuned}"].startswith(f"| {tuned} | 0.6000 ± 0.5000 | ")
    assert " | 75.0 ± 0.0 | " in lines[f"| {tuned}"]
    assert lines[f"| {tuned}"].endswith(" | 67, 67 |")       # of the way to the floor
    change = lines[f"| {tuned} minus {one_shot.MADE[1]}"]
    assert " | -0.2000 [-0.2000, -0.2000] | " in change and " | +25.0 [+25.0, +25.0] | " in change


# -- the judge

def test_no_batch_holds_what_is_held_back():
    art = data.Art(["noto", "twemoji"])
    unseen, batches = judge.held_back(art), judge.Batches(art, None, 4, 0)
    assert not set(unseen) & set(batches.picks)
    assert len(unseen) + len(batches.picks) == len(art.names)
    assert 0.03 < len(unseen) / len(art.names) < 0.07


# -- speed

def test_operations_are_counted_by_hand():
    """Two for each multiplication of a product. Trap: torch does not count the CPU's attention."""
    q = torch.randn(2, 3, 8, 4)                              # (B, heads, P, D / heads)

    def work():
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        return y.flatten(2) @ q.new_ones(32, 5)
    assert speed.operations(work) == 2 * (2 * 2 * 3 * 8 * 8 * 4 + 2 * 3 * 32 * 5)
