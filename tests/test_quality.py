"""experiments/quality.py: a ruler that is wrong measures nothing."""

import functools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from data import Scene, scenes
from experiments import quality


@pytest.fixture(scope="module")
def art():
    return data.Art(sets=["noto", "twemoji"], smallest=0.9)


class Pipe:
    """A base that draws coarse noise, and a tokenizer that gives back what it gets."""

    device, base = torch.device("cpu"), "noise"
    vqgan = SimpleNamespace(encode=lambda x: x, decode=lambda x: x)

    def generate(self, prompts, seed=0, **sampling):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(len(prompts), 3, 8, 8, generator=generator) * 2 - 1
        return torch.nn.functional.interpolate(coarse, size=(64, 64))


# -- numbers

def with_moments(mean, covariance, n, seed):
    """(n, D) features of exactly this mean and covariance."""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed)).double()
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_is_the_closed_form():
    mean = torch.tensor([1.0, -2.0]).double()
    A = torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double()
    B = torch.tensor([[1.0, -0.5], [-0.5, 3.0]]).double()                    # they do not commute
    x, y = with_moments(mean, A, 40, 0), with_moments(0 * mean, B, 60, 1)
    root_trace = math.sqrt(torch.trace(A @ B) + 2 * torch.det(A @ B).sqrt())     # of any 2 x 2
    wanted = mean.square().sum().item() + (A + B).trace().item() - 2 * root_trace
    assert quality.frechet(x, y) == pytest.approx(wanted) == quality.frechet(y, x)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))      # fewer than features
    assert abs(quality.frechet(x, x)) < 1e-4
    assert quality.frechet(x, x + 1) == pytest.approx(64, rel=1e-4)


# -- the classifier

def test_drawings_kept_back_are_in_no_training_picture_and_no_name_is_lost():
    art = data.Art(size=16)
    new = quality.is_new(art)
    known, rest = quality.part(art, ~new), quality.part(art, new)
    assert 0.08 < new.mean() < 0.12 and set(known.names) == set(data.names())
    assert not set(zip(known.names, known.sets)) & set(zip(rest.names, rest.sets))
    for some in (known, rest):
        assert all(set(some.index[s]) == set(some.names_of[s]) for s in art.index)
        i, j = len(some.names) - 1, art.find(some.names[-1], some.sets[-1])
        assert (some.drawings[i] == art.drawings[j]).all() and some.boxes[i] == art.boxes[j]


# -- questions

def test_what_counts_as_obeyed():
    def say(chosen, title, names, count=1):
        one_hot = lambda n, *rows: torch.eye(n)[list(rows)].sum(0)[None]
        seen = {"names": one_hot(837, *map(data.names().index, names)),
                "colour": one_hot(len(quality.COLOURS), quality.COLOURS.index("red")),
                "count": one_hot(4, count - 1)}
        return {k: v.double().item() for k, v in quality.obeyed(seen, [chosen], title).items()}

    red_cat, cats, both = Scene(("cat",), ("red",)), Scene(("cat",), (), 2), Scene(("cat", "owl"))
    assert say(red_cat, "colours, trained", ["cat"]) == {"colour": 1, "thing": 1, "all of it": 1}
    found = say(cats, "counts", ["cat"], count=3)
    assert math.isnan(found.pop("colour"))                  # nobody asked
    assert found == {"number": 0, "thing": 1, "all of it": 0}
    assert say(cats, "plurals", ["cat"], count=3)["at least two"] == 1
    for names, right in ((["owl", "cat"], 1), (["owl", "dog"], 0)):
        assert say(both, "two things, trained", names) == {"one of them": 1, "both": right}


def test_questions_are_held_out_as_they_say(art):
    for title, (_, held_out) in quality.QUESTIONS.items():
        chosen, _, prompts = quality.ask_for(title, art, 20, np.random.default_rng(0))
        assert all(scenes.is_held_out(scene) == held_out for scene in chosen)
        numbered = [words.split()[0] in scenes.NUMBERS.values() for words in prompts]
        assert all(numbered) if title == "counts" else not any(numbered)


def test_the_page_has_the_controls_and_what_real_drawings_score(tmp_path, monkeypatch):
    """From the training of a classifier on two batches to the page, at toy size."""
    sweep = dict(lambda_b=(1, 3), temperature=(1,), steps=(2,), top_k=(0,))
    monkeypatch.setattr(quality, "SWEEP", sweep)
    monkeypatch.setattr(quality.StyleDrop, "load", lambda *_: Pipe())
    monkeypatch.setattr(quality.data, "Art", functools.partial(data.Art, ["noto", "twemoji"]))
    for options in ("--train --chunks 2 --reuse 1 --batch 8 --pool 2 --workers 0 --scenes 4",
                    "--names 8 --per 1 --choose", "--names 8 --per 1 --scenes 4 --grids"):
        monkeypatch.setattr(sys, "argv", ["quality.py", "--device=cpu", f"--out={tmp_path}",
                                          f"--classifier={tmp_path / 'q.pt'}", *options.split()])
        quality.main()
    page = (tmp_path / "quality.md").read_text()
    found = quality.json.loads((tmp_path / "quality.json").read_text())
    for row in ("control: class mean", "control: one decoding step", "given back by the tokenizer",
                "never seen", "OpenMoji"):
        assert row in page
    assert all("control" in row for row in found["words"].values())
    assert found["names"] == 4 and set(found["sampling"]) == set(sweep)
    rows = quality.json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert len(rows) == 4              # the defaults, lambda_b 3, steps 2, top_k 0: none twice
    assert all(row in (tmp_path / "sweep.md").read_text() for row in rows)
    for sheet in ("things_styles", "colours_things", "counts", "two_things"):
        assert (tmp_path / f"{sheet}.png").stat().st_size < 500_000
