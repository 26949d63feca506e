"""Tests of experiments/quality.py and classifier.py: are the measures correct?"""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import generator

import data
from data import Scene, scenes
from experiments import classifier, copies, quality

SETS = ["noto", "twemoji"]


@pytest.fixture(autouse=True)
def two_sets(monkeypatch):
    """The emoji sets are two, which are read faster."""
    monkeypatch.setattr(classifier, "EMOJI", SETS)


@pytest.fixture
def art():
    return classifier.emoji_objects(smallest=0.9)


class NoisePipe:
    """A base that samples coarse noise, and a tokenizer that changes nothing."""

    device, base_id = torch.device("cpu"), "noise"
    vqgan = SimpleNamespace(encode=lambda x: x, decode=lambda x: x)

    def generate(self, prompts, seed=0, sampling=None, superres=True):
        coarse = torch.rand(len(prompts), 3, 8, 8, generator=generator(seed)) * 2 - 1
        return torch.nn.functional.interpolate(coarse, size=(64, 64))


def tables(text):
    """{first cell: [further cells]} of all tables of a report."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


# -- Fréchet distance

def with_moments(mean, covariance, n, seed):
    """(n, D) features of exactly this mean and covariance."""
    x = torch.randn(n, len(mean), generator=generator(seed)).double()
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_is_the_closed_form():
    mean = torch.tensor([1.0, -2.0]).double()
    A = torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double()
    B = torch.tensor([[1.0, -0.5], [-0.5, 3.0]]).double()    # they do not commute
    x, y = with_moments(mean, A, 40, 0), with_moments(0 * mean, B, 60, 1)
    root_trace = math.sqrt(torch.trace(A @ B) + 2 * torch.det(A @ B).sqrt())     # of any 2 x 2
    wanted = mean.square().sum().item() + (A + B).trace().item() - 2 * root_trace
    assert quality.frechet(x, y) == pytest.approx(wanted)
    assert quality.frechet(y, x) == pytest.approx(wanted)


def test_frechet_distance_of_fewer_images_than_features():
    x = torch.randn(20, 64, generator=generator())
    assert abs(quality.frechet(x, x)) < 1e-4
    assert quality.frechet(x, x + 1) == pytest.approx(64, rel=1e-4)


def test_extrapolation_takes_away_what_few_images_add():
    """Two samples of one distribution: the true distance is 0, and 9 after a shift by 3."""
    names = torch.randn(32, 1, 8, generator=generator(0))    # images of one name are alike
    x = names + torch.randn(32, 4, 8, generator=generator(1))
    y = names + torch.randn(32, 4, 8, generator=generator(2))
    full, infinite, quarter = quality.distances(x, y).values()
    assert quarter > full > 0.15 and abs(infinite) < full / 3
    y[..., 0] += 3
    full, infinite, quarter = quality.distances(x, y).values()
    assert quarter > full > infinite and abs(infinite - 9) < full - 9
    assert list(quality.distances(x, y)) == ["Fréchet distance, 128 images", "extrapolated",
                                             "32 images"]


# -- drawings

def test_drawings_that_the_classifier_never_saw_are_in_no_training_image(art):
    new = classifier.is_new(art)
    known, rest = classifier.part(art, ~new), classifier.part(art, new)
    assert 0.05 < new.mean() < 0.15
    assert set(known.names) == set(art.names)                # no name is lost
    assert not set(zip(known.names, known.sets)) & set(zip(rest.names, rest.sets))


def test_a_part_of_an_art_keeps_everything_of_its_drawings(art):
    """Trap: a field that still has all rows, so that drawings are painted by others' luminance."""
    rest = classifier.part(art, classifier.is_new(art))
    for set_name in art.index:
        assert set(rest.index[set_name]) == set(rest.names_of[set_name])
    i = len(rest.names) - 1
    j = art.find(rest.names[i], rest.sets[i])
    assert (rest.drawings[i] == art.drawings[j]).all()
    for field in ("names", "sets", "style_phrases", "boxes", "middles"):
        assert len(getattr(rest, field)) == len(rest.drawings)
        assert getattr(rest, field)[i] == getattr(art, field)[j]


def test_the_classifier_has_the_names_of_its_file():
    """data/ has more names today: people, and sets that are no emoji."""
    net = classifier.load_classifier()
    assert len(net.known_names) == 837 < len(data.names())
    assert net.known_colours == classifier.COLOURS
    names = ["teapot", "cat"]
    seen = {"names": torch.eye(837)[classifier.classes_of(net, names)]}
    of_all, of_100 = classifier.named(seen, classifier.classes_of(net, names[::-1]))
    assert of_all.tolist() == [0, 0] and of_100.max() < 1
    assert set(classifier.emoji_objects(net.known_names).names) <= set(net.known_names)


def test_the_classifier_is_trained_and_read_again(cli, tmp_path):
    code, out, err = cli(classifier.main, "--out", tmp_path / "q.pt", "--device", "cpu",
                         "--chunks", 2, "--reuse", 1, "--batch", 4, "--pool", 2, "--workers", 0,
                         "--scenes", 2)
    assert code == 0, err
    assert len(tables(out)) == 7                             # the head and three kinds, in two ways
    net = classifier.load_classifier(tmp_path / "q.pt")
    assert net.known_names == sorted(set(classifier.emoji_objects().names))


# -- framing

def test_an_object_is_framed_wherever_it_is():
    """Centred and enlarged, on its own background; an empty image stays empty."""
    image = torch.full((3, 3, 40, 32), 0.8)
    image[0, 0, :10, 20:30] = -1
    image[1, 0, 25:35, 2:12] = -1
    framed = copies.framed(image)
    assert framed.shape == (3, 3, 64, 64)
    assert torch.equal(framed[0], framed[1])
    ink = framed[0, 0] < 0
    assert 45 < ink.any(0).sum() == ink.any(1).sum() < 62
    assert torch.equal(ink, ink.flip(0)) and torch.equal(ink, ink.flip(1))
    assert torch.allclose(framed[2], torch.tensor(0.8))


# -- questions

NAMES = data.names()


def one_hot(size, row):
    return torch.eye(size)[row][None]


def answer(scene, title, name, count=1):
    """What is right of an image that shows `count` of `name` in red, if `scene` was asked for."""
    seen = {"names": one_hot(len(NAMES), NAMES.index(name)),
            "colour": one_hot(len(classifier.COLOURS), classifier.COLOURS.index("red")),
            "count": one_hot(4, count - 1)}
    found = quality.one_thing(seen, [scene], title, NAMES)
    return {question: right.item() for question, right in found.items()}


def test_what_counts_as_right():
    red_cat, cats = Scene(("cat",), ("red",)), Scene(("cat",), (), 2)
    right = {"colour": 1, "thing": 1, "all of it": 1}
    assert answer(red_cat, "colours, trained", "cat") == right
    assert answer(red_cat, "colours, trained", "dog")["all of it"] == 0
    found = answer(cats, "counts", "cat", count=3)
    assert math.isnan(found.pop("colour"))                   # it was not asked
    assert found == {"number": 0, "thing": 1, "all of it": 0}
    assert answer(cats, "plurals", "cat", count=3)["at least two"] == 1


def test_two_things_are_named_in_halves(monkeypatch):
    """Trap: the two best names of the whole image, which may both be names of one object."""
    def predict(net, images):                                # red is a cat, all else an owl
        is_red = images[:, 0, 32, 32] > images[:, 2, 32, 32]
        rows = [NAMES.index("cat") if red else NAMES.index("owl") for red in is_red]
        return {"names": torch.eye(len(NAMES))[rows]}

    monkeypatch.setattr(quality, "predict", predict)
    images = torch.ones(2, 3, 64, 64)
    images[0, 1:, 20:40, 5:25] = -1                          # red, and blue next to it
    images[0, :2, 20:40, 40:60] = -1
    images[1, 1:, 20:40, 5:60] = -1                          # red in both halves
    net = SimpleNamespace(known_names=NAMES)
    cat_and_owl = [Scene(("cat", "owl"))] * 2
    found = quality.answers(net, images, cat_and_owl, "two things, trained")
    both, both_of_100, one = (right.tolist() for right in found.values())
    assert both == [1, 0] and both_of_100[0] == 1 and one == [1, 1]
    other_way = quality.two_things(net, images, [Scene(("owl", "cat"))] * 2)
    assert [right.tolist() for right in other_way.values()][0] == [0, 0]


def test_questions_are_held_out_as_they_say(art):
    for title, (_, held_out) in quality.QUESTIONS.items():
        chosen, _, prompts = quality.ask(title, art, 20, np.random.default_rng(0))
        assert all(scenes.is_held_out(scene) == held_out for scene in chosen)
        numbered = [words.split()[0] in scenes.NUMBERS.values() for words in prompts]
        assert all(numbered) if title == "counts" else not any(numbered)


# -- copies

def test_the_audit_tells_copies_from_samples_of_kept_out_drawings(monkeypatch):
    """Copies of training drawings are all nearer to these; kept-out drawings never are."""
    def predict(net, images):
        return {"features": torch.nn.functional.avg_pool2d(images, 8).flatten(1)}

    monkeypatch.setattr(copies, "predict", predict)
    art = data.Art(SETS, kept_out=None, smallest=0.9)
    kept_names = [name for set_name, name in sorted(data.kept_out_pairs()) if set_name == "noto"]
    names = [name for name in kept_names if ("twemoji", name) not in data.kept_out_pairs()
             and name in art.index["twemoji"] and len(art.index["noto"][name]) == 1][:8]
    other = classifier.emoji_objects(names, ["openmoji"], smallest=0.9)
    trained = art.drawings[[art.find(name, "twemoji") for name in names]]
    kept = art.drawings[[art.find(name, "noto") for name in names]]
    for drawings, share in ((trained, 100), (kept, 0)):
        rows, audited = copies.audit(None, NoisePipe(), art, other, [*names, "no such name"],
                                      torch.cat([copies.as_drawn(drawings),
                                                 torch.ones(1, 3, 64, 64)]), seed=0)
        assert audited == len(names) == 8
        for measure in ("features", "pixels"):
            row = rows[f"samples, by {measure}"]
            assert row["a training drawing is nearer"][0] == share
            assert row["by chance"][0] == 50                 # one of two sets
            row = rows[f"training drawings, reconstructed, by {measure}"]
            assert row["a training drawing is nearer"][0] == 100
    assert rows["samples, by pixels"]["copies"] == rows["drawings kept out of training, by pixels"][
        "copies"]


# -- the page

def test_the_page_has_the_controls_and_what_real_drawings_score(cli, tmp_path, monkeypatch):
    """The whole command at toy size, with the classifier that ships."""
    monkeypatch.setattr(quality.StyleDrop, "load", lambda *_: NoisePipe())
    monkeypatch.setattr(quality, "all_drawings",
                        lambda: data.Art(SETS, kept_out=None, smallest=0.9))
    monkeypatch.setattr(quality, "THINGS", quality.THINGS[:3])
    code, _, err = cli(quality.main, "--device", "cpu", "--out", tmp_path, "--names", 16,
                       "--per", 2, "--scenes", 2, "--seed", 1, "--grids")
    assert code == 0, err
    found = json.loads((tmp_path / "quality.json").read_text())
    rows = tables((tmp_path / "quality.md").read_text())
    for title in ("control: class mean", "control: one decoding step",
                  "real, reconstructed by the tokenizer", "real, never seen by the classifier"):
        assert title in rows
    for title, row in found["plain"].items():
        distance, infinite, _, of_all, _ = rows[title]
        assert float(distance) == pytest.approx(row["Fréchet distance, 32 images"], abs=0.051)
        assert float(infinite) == pytest.approx(row["extrapolated"], abs=0.051)
        assert float(of_all.split(" ± ")[0]) == pytest.approx(row["named of 837"][0], abs=0.051)
    noise = found["plain"]["**samples**"]["Fréchet distance, 32 images"]
    floor = found["plain"]["real drawings of the same kind: the floor"]
    assert noise > 2 * floor["Fréchet distance, 32 images"]
    assert all("control" in row for row in found["words"].values())
    assert len(found["audit"]) == 8 and 0 < found["audited"] <= 16
    assert found["names"] == 16 and found["sampling"]["lambda_b"] == quality.BASE_SAMPLING.lambda_b
    for sheet in ("things_styles", "colours_things", "counts", "two_things"):
        assert (tmp_path / f"{sheet}.png").stat().st_size < 500_000
