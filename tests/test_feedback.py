"""experiments/feedback.py: two rounds, what chooses between them, and intervals that decide."""

import json
import math
from functools import partialmethod
from types import SimpleNamespace

import pytest
import torch
from conftest import generator, noise_images

from experiments import feedback
from experiments.common import decided, paired_interval, verdict
from experiments.foreign import Reference
from human_feedback.rounds import Pool
from styledrop import StyleDrop

ONES = [1.0, 1.0]


# -- intervals

@pytest.mark.parametrize("count, quantile", [(8, 2.365), (12, 2.201), (35, 2.032)])
def test_an_interval_is_students(count, quantile):
    """The 0.975 quantiles of a printed table. Trap: 1.96 for twelve references."""
    values = torch.randn(count, generator=generator(1)).double()
    mean, half = paired_interval(values.tolist())
    assert mean == pytest.approx(values.mean().item())
    assert half == pytest.approx(quantile * values.std().item() / math.sqrt(count), rel=5e-3)


def test_an_interval_of_one_is_unknown():
    mean, half = paired_interval([0.25])
    assert mean == 0.25 and math.isnan(half)
    assert verdict(mean, half) == "open"


@pytest.mark.parametrize("mean, half, words", [
    (0.2, 0.1, "more"), (-0.2, 0.1, "less"), (0.01, 0.03, "equal"), (-0.01, 0.04, "equal"),
    (0.01, 0.05, "open"), (0.0, 0.2, "open"), (0.03, 0.02, "more")])
def test_verdicts(mean, half, words):
    """Trap: what is not significant is called equal."""
    assert verdict(mean, half) == words


def test_differences_are_points():
    assert decided([0.25] * 6) == "+25.0 ± 0.0: more"
    assert decided([-0.25] * 6) == "-25.0 ± 0.0: less"


# -- the oracle

def test_the_oracle_wants_the_object_and_the_palette(monkeypatch):
    """Both, else one of them, else any; one image of each prompt."""
    kept = [0, 1, 1,   0, 1, 0,   0, 0, 0]
    near = [1, 0, 1,   0, 0, 0,   0, 0, 0]
    pool = Pool(noise_images(9), ["a cat", "a tree", "a car"], "")
    scores = torch.zeros(9, 4)
    for row, (content, right) in enumerate(zip([0, 0, 0, 1, 1, 1, 2, 2, 2], kept)):
        scores[row, content if right else 3] = 1
    monkeypatch.setattr(feedback, "name_scores", lambda judge, images: scores)
    monkeypatch.setattr(feedback, "palette", lambda images: images)
    monkeypatch.setattr(feedback, "is_nearest", lambda one, other: torch.tensor(near).bool())
    ruler = SimpleNamespace(judge=None, names=["cat", "tree", "car", "none"], rivals=[[0]],
                            at_side=lambda side: (None, None, torch.zeros(1), None))
    assert feedback.choose_by_oracle(ruler, 0, pool) == [2, 4, 6]


# -- the study

class PlainRuler:
    """Keeps every object, and calls bright samples near in palette."""

    judge, names = None, ["cat", "tree", "other"]

    def __init__(self, pipe, references):
        self.references = references
        self.rivals = [[i] for i in range(len(references))]

    def at_side(self, side):
        return None, None, torch.zeros(len(self.references)), None

    def measure(self, images, objects, i, with_clip):
        assert objects == ["a cat", "a tree"]
        bright = (images.mean((1, 2, 3)) > 0).float().tolist()
        return {"object kept": ONES, "palette": bright, "texture": [0.0, 0.0],
                "object and palette": bright, "blank": [0.0, 0.0], "copied tokens": bright}


@pytest.fixture
def command(cli, weights, tmp_path, monkeypatch):
    """command(*arguments) -> exit code, error, and the results, of a toy study."""
    def references(used, resolution):
        assert used == "reported"
        return [Reference(f"{i}.webp", "a house", "flat", "oil", used, picture)
                for i, picture in enumerate(noise_images(3, resolution))]

    real = StyleDrop.generate

    def quick(pipe, prompts, style=None, **named):
        return real(pipe, prompts, style, **named, steps=1)

    monkeypatch.setattr(StyleDrop, "generate", quick)
    monkeypatch.setattr(StyleDrop, "tune", partialmethod(StyleDrop.tune, steps=2))
    monkeypatch.setattr(feedback, "load_references", references)
    monkeypatch.setattr(feedback, "Ruler", PlainRuler)
    monkeypatch.setattr(feedback, "choose_by_oracle", lambda ruler, i, pool: [0, 1])
    monkeypatch.setattr(feedback, "OBJECTS", ("a cat", "a tree"))
    monkeypatch.setattr(feedback, "SEEDS", [0, 1])
    monkeypatch.setattr(feedback, "POOL", 2)
    monkeypatch.setattr(feedback, "POOL_PROMPTS", ["a cat", "a tree"])

    def run(*arguments):
        code, _, err = cli(feedback.main, "--weights", weights, "--out", tmp_path, *arguments)
        file = tmp_path / "feedback.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        return SimpleNamespace(code=code, err=err, rows=found.get("rows", []))
    return run


def test_the_study_reports_and_resumes(command, tmp_path, calls):
    """One adapter of round 1 and three of round 2 for each reference, and nothing twice."""
    tuned = calls(StyleDrop, "fit")
    found = command("--references", 1)
    assert found.code == 0, found.err
    assert len(tuned) == 4
    assert [(row["arm"], row["lambda_a"]) for row in found.rows] == [
        ("round 1", 0.75), ("round 1", 0), ("round 1", 0.5), ("round 1", 1), ("round 1", 1.5),
        ("round 2, clip", 0.75), ("round 2, random", 0.75), ("round 2, oracle", 0.75)]
    again = command("--references", 2)
    assert again.code == 0 and len(tuned) == 8 and again.rows[:8] == found.rows
    text = (tmp_path / "feedback.md").read_text()
    assert "2 test references" in text
    assert text.count("| chosen by ") == 3 + 4               # and CLIP against four lambda_A
    assert "| chosen by clip | 1.5 | +0.0 ± " in text
    assert "| round 2, clip | 0.75 | 100.0 ± 0.0 % |" in text


def test_other_settings_are_not_continued(command, tmp_path):
    (tmp_path / "feedback.json").write_text('{"settings": {"base": "other"}, "rows": []}')
    found = command()
    assert found.code == 2 and "another base" in found.err
    assert found.rows == []
