"""experiments/two_adapters.py: objects that the base never saw, and mixtures of two adapters."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import noise_images

import data
from data.english import names
from experiments import two_adapters
from experiments.foreign import Reference
from styledrop import StyleDrop


@pytest.fixture(scope="module")
def art():
    return data.Art(two_adapters.SETS, size=32, kept_out=None)


# -- the objects

def test_objects_were_kept_out_of_training(art):
    """Traps: an object that the base knows; one that both halves have; one without any rival."""
    chosen, reported = two_adapters.objects(art, "chosen"), two_adapters.objects(art, "reported")
    assert (len(chosen), len(reported)) == (8, 12)
    assert set(chosen + reported) <= data.kept_out_pairs()
    assert len({name for _, name in chosen + reported}) == 20
    for _, name in chosen + reported:
        assert sum(len(art.index[s].get(name, ())) for s in two_adapters.SETS) >= 4


def test_pictures_of_an_object_differ_only_by_the_seed(art):
    pair = two_adapters.objects(art, "chosen")[0]
    one = two_adapters.pictures(art, pair, 4, seed=0)
    assert one.shape == (4, 3, 32, 32) and one.min() >= -1 and one.max() <= 1
    assert torch.equal(one, two_adapters.pictures(art, pair, 4, seed=0))
    assert not torch.equal(one, two_adapters.pictures(art, pair, 4, seed=1))
    corners = one[:, :, 0, 0]                                # four different backgrounds
    assert len({tuple(corner.tolist()) for corner in corners}) == 4


def test_an_object_of_ones_own_has_a_rare_token():
    assert two_adapters.rare_name("bear") == "a [V] bear"
    assert two_adapters.rare_name("umbrella") == "a [V] umbrella"
    for name in names():
        assert "[V]" in two_adapters.rare_name(name)


# -- the judge

class PlainRuler:
    """Its judge's features are the mean colours."""

    def __init__(self, pipe, references):
        self.references = references
        self.rivals = [[i, *(k for k in range(len(references)) if k != i)]
                       for i in range(len(references))]
        self.judge = SimpleNamespace(features=lambda images: images.mean((2, 3)))

    def at_side(self, side):
        colours = torch.stack([r.picture.mean((1, 2)) for r in self.references])
        return None, None, colours, None


@pytest.fixture
def plain(monkeypatch):
    """Images are described by their mean colours."""
    monkeypatch.setattr(two_adapters, "framed", lambda images: images)
    monkeypatch.setattr(two_adapters, "Ruler", PlainRuler)
    monkeypatch.setattr(two_adapters, "palette", lambda images: images.mean((2, 3)))
    monkeypatch.setattr(two_adapters, "is_nearest",
                        lambda one, other: torch.cdist(one, other).argmin(1) == 0)


def test_identity_is_the_nearest_drawing_of_the_name(art, plain):
    """The own drawing is nearest to itself; another set's drawing of the name is not."""
    references = [Reference(f"{i}", "", "", "", "", torch.full((3, 8, 8), value))
                  for i, value in enumerate((-1.0, 1.0))]
    pair = two_adapters.objects(art, "chosen")[-1]
    assert pair[1] == "bear"
    judge = two_adapters.Judge(art, PlainRuler(None, references), pair, 0)
    others = [art.find("bear", s) for s in two_adapters.SETS
              if s != pair[0] and "bear" in art.index[s]]
    own = two_adapters.as_drawn(art.drawings[[art.find("bear", pair[0]), *others]])
    found = judge.measure(own)
    assert found["identity"] == [1.0] + [0.0] * len(others)
    dark = torch.full((1, 3, 32, 32), -0.9)
    assert judge.measure(dark)["palette"] == [1.0] and judge.measure(-dark)["palette"] == [0.0]


# -- the study

@pytest.fixture
def command(cli, weights2, tmp_path, monkeypatch, plain):
    """command(*arguments) -> exit code, error, rows and page of a toy study."""
    def references(used, resolution):
        return [Reference(f"{used} {i}.webp", "a house", "flat", "oil", used, picture)
                for i, picture in enumerate(noise_images(3, resolution))]

    real = StyleDrop.generate

    def quick(pipe, *positional, **named):
        return real(pipe, *positional, **named, steps=1)

    monkeypatch.setattr(StyleDrop, "generate", quick)
    tune = StyleDrop.tune

    def quick_tune(pipe, images, prompts, style="", tuning=None):
        return tune(pipe, images, prompts, style, steps=1, views=1)

    monkeypatch.setattr(StyleDrop, "tune", quick_tune)
    monkeypatch.setattr(two_adapters, "load_references", references)
    monkeypatch.setattr(two_adapters, "SEEDS", [0, 1])

    def run(*arguments):
        code, _, err = cli(two_adapters.main, "--weights", weights2, "--out", tmp_path,
                           *arguments)
        found = {path.suffix: path for path in tmp_path.iterdir()}
        rows = json.loads(found[".json"].read_text())["rows"]
        return SimpleNamespace(code=code, err=err, rows=rows, page=found[".md"].read_text(),
                               names={path.name for path in found.values()})
    return run


def test_the_study_reports_and_resumes(command, calls):
    """Three adapters for each pair, and nothing twice."""
    tuned = calls(StyleDrop, "tune")
    found = command("--pairs", 1)
    assert found.code == 0, found.err
    prompts = [list(positional[2]) for positional, _ in tuned]
    name = prompts[0][0]
    assert name.startswith("a [V] ")
    assert prompts == [[name] * 4, [""], [name] * 4 + ["[V*] style"] * 4]
    arms = [row["arm"] for row in found.rows]
    assert arms == ["gamma 0", "gamma 0.3", "gamma 0.5", "gamma 0.7", "gamma 1",
                    "one adapter of both", "the object, reconstructed"]
    assert {row["reference"] for row in found.rows} == {"reported 0.webp"}
    again = command("--pairs", 2)
    assert again.code == 0 and len(tuned) == 6 and again.rows[:7] == found.rows
    assert again.names == {"two_adapters.json", "two_adapters.md", "two_adapters.png"}
    assert "2 test pairs" in again.page
    assert again.page.count("| minus ") == 3


def test_settings_are_chosen_on_the_validation_half(command):
    found = command("--choose", "--pairs", 1)
    assert found.code == 0, found.err
    assert {row["reference"] for row in found.rows} == {"chosen 0.webp"}
    assert len(found.rows) == len(two_adapters.STRENGTHS) * (len(two_adapters.GAMMAS) - 1)
    assert found.names == {"two_adapters_chosen.json", "two_adapters_chosen.md"}
    assert "1 validation pairs" in found.page and "minus" not in found.page
