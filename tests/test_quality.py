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
from experiments.quality import Classifier, ClassifierConfig


@pytest.fixture(scope="module")
def art():
    return data.Art(sets=["noto", "twemoji"], smallest=0.9)


def small(names=837):
    torch.manual_seed(0)
    return Classifier(ClassifierConfig((8, 8, 8, 16), names, len(quality.COLOURS)))


class Pipe:
    """A base that draws coarse noise, and a tokenizer that gives back what it gets."""

    device, base, side = torch.device("cpu"), "noise", 64
    vqgan = SimpleNamespace(encode=lambda x: x, decode=lambda x: x)

    def generate(self, prompts, seed=0, steps=18, lambda_b=3.0, temperature=1.0, top_k=8,
                 superres=True):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(len(prompts), 3, 8, 8, generator=generator) * 2 - 1
        return torch.nn.functional.interpolate(coarse, size=(self.side, self.side))


# -- numbers

def with_moments(mean, covariance, n, seed):
    """(n, D) features of exactly this mean and covariance."""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed)).double()
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_is_the_closed_form():
    turn = torch.randn(3, 3, generator=torch.Generator().manual_seed(3)).double()
    turn = torch.linalg.qr(turn)[0]
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.25]).double()
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    x = with_moments(mean, turn @ a.diag() @ turn.T, 50, 0)                  # they commute, so
    y = with_moments(0 * mean, turn @ b.diag() @ turn.T, 70, 1)              # the roots subtract
    wanted = (mean ** 2).sum() + ((a.sqrt() - b.sqrt()) ** 2).sum()
    assert quality.frechet(x, y) == pytest.approx(wanted.item(), rel=1e-9)
    A = torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double()                      # these do not
    B = torch.tensor([[1.0, -0.5], [-0.5, 3.0]]).double()
    x, y = (with_moments(mean[:2] * 0, C, 40, seed) for seed, C in enumerate((A, B)))
    root_trace = math.sqrt(torch.trace(A @ B) + 2 * torch.det(A @ B).sqrt())     # of any 2 x 2
    assert quality.frechet(x, y) == pytest.approx((A + B).trace().item() - 2 * root_trace)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))      # fewer than features
    assert abs(quality.frechet(x, x)) < 1e-4
    assert quality.frechet(x, x + 1) == pytest.approx(64, rel=1e-4)
    y = x[:10] * 2
    assert quality.frechet(x, y) == pytest.approx(quality.frechet(y, x), rel=1e-6)


def test_among_is_what_drawing_the_rivals_would_show():
    scores, wanted = torch.tensor([[3.0, 2.0, 5.0, 1.0, 4.0, 0.0]]), torch.tensor([4])
    draws = torch.rand(20000, 5, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :2]
    others = scores[0, [0, 1, 2, 3, 5]]
    assert quality.among(scores, wanted, 2).item() == pytest.approx(0.6)     # C(4, 2) / C(5, 2)
    assert (others[draws] < 4).all(1).double().mean().item() == pytest.approx(0.6, abs=0.02)
    assert quality.among(scores, torch.tensor([2]), 2) == 1
    assert quality.among(scores, torch.tensor([5]), 2) == 0
    assert quality.among(torch.zeros(1, 6), wanted, 2) == 0                  # ties count against


def test_share_and_sample():
    """What was not asked is left out, pictures are grouped, larger ones made smaller by area."""
    assert quality.share(torch.tensor([1.0, 0.0, math.nan]))[0] == 50
    assert quality.share(torch.tensor([[1, 1], [0, 0]]))[1] == pytest.approx(50)
    pipe = Pipe()
    pipe.side = 128
    images, big = quality.sample(pipe, ["a cat"], seed=0), pipe.generate(["a cat"], seed=0)
    torch.testing.assert_close(images, torch.nn.functional.avg_pool2d(big, 2))


def test_class_means_are_pixel_means(art):
    found = quality.class_means(art, ["cat", "house", "cat"])
    rng, plain = np.random.default_rng(0), quality.styles.Style()
    cats = [quality.styles.apply(plain, art.drawings[art.index[s]["cat"]], rng) for s in art.index]
    by_hand = np.stack(cats).astype(float).mean(0).transpose(2, 0, 1) / 127.5 - 1
    assert found.shape == (3, 3, 64, 64) and torch.equal(found[0], found[2])
    np.testing.assert_allclose(found[0].numpy(), by_hand, atol=1e-5)


# -- the classifier

def test_drawings_kept_back_are_in_no_training_picture_and_no_name_is_lost():
    art = data.Art(size=16)
    new = quality.is_new(art)
    known, rest = quality.part(art, ~new), quality.part(art, new)
    assert 0.08 < new.mean() < 0.12 and set(known.names) == set(data.names())
    assert not set(zip(known.names, known.sets)) & set(zip(rest.names, rest.sets))
    assert all(set(known.index[s]) == set(known.names_of[s]) for s in art.index)
    for some in (known, rest):
        for i in (0, len(some.names) // 2, len(some.names) - 1):
            j = art.find(some.names[i], some.sets[i])
            assert (some.drawings[i] == art.drawings[j]).all() and some.boxes[i] == art.boxes[j]


def test_labels_and_chunks(art):
    """A chunk is always the same, shows all kinds, and its heads fit what is shown."""
    cat, owl = data.names().index("cat"), data.names().index("owl")
    red = quality.COLOURS.index("red")
    assert quality.labels_of(Scene(("cat",))) == [cat, cat, -1, 0]
    assert quality.labels_of(Scene(("cat",), ("red",), 3)) == [cat, cat, red, 2]
    assert quality.labels_of(Scene(("cat", "owl"), ("red", ""))) == [cat, owl, -1, -1]
    images, labels = quality.Chunks(art, 64, 0)[3]
    assert images.shape == (64, 64, 64, 3) and images.dtype == torch.uint8
    assert torch.equal(images, quality.Chunks(art, 64, 0)[3][0])
    first, second, colour, count = labels.unbind(1)
    assert (colour >= 0).any() and {0, 1, 2, 3} <= set(count.tolist())
    assert ((count < 0) == (first != second)).all()
    images = quality.to_tensor(images[:8].numpy())
    varied = quality.vary(images, torch.Generator().manual_seed(0))
    assert varied.shape == images.shape and varied.abs().max() <= 1
    assert not torch.equal(varied, images)
    assert {k: tuple(v.shape) for k, v in small()(images).items()} == {
        "features": (8, 16), "names": (8, 837), "colour": (8, 11), "count": (8, 4)}
    net = small().train()
    optimiser = torch.optim.AdamW(net.parameters(), 1e-2)
    losses = [quality.train_step(net, optimiser, images, labels[:8]).item() for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_resumed_run_is_the_unbroken_one(tmp_path, art, monkeypatch):
    def train(folder, **changes):
        usual = dict(chunks=4, reuse=2, batch=8, pool=2, lr=1e-3, seed=0, workers=0)
        path = str(tmp_path / folder / "quality.pt")
        args = SimpleNamespace(device="cpu", classifier=path, **usual | changes)
        return quality.train(args, art, small())[0].state_dict()

    class Stop(Exception):
        pass

    def stop_after(*a, **parts):
        saved(*a, **parts)
        if next(count) == 2:
            raise Stop

    whole, saved, count = train("a"), quality.keep, iter(range(9))
    monkeypatch.setattr(quality, "keep", stop_after)
    clock = iter(range(0, 10 ** 6, 100))                    # saves after each chunk
    monkeypatch.setattr(quality.time, "time", lambda: next(clock))
    with pytest.raises(Stop):
        train("b")
    resumed = train("b")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(ValueError, match="give the same"):
        train("b", lr=1e-2)


# -- questions

def test_what_counts_as_obeyed():
    def say(chosen, title, names, colour="red", count=1):
        one_hot = lambda n, *rows: torch.eye(n)[list(rows)].sum(0)[None]
        seen = {"names": one_hot(837, *map(data.names().index, names)),
                "colour": one_hot(len(quality.COLOURS), quality.COLOURS.index(colour)),
                "count": one_hot(4, count - 1)}
        return {k: v.double().item() for k, v in quality.obeyed(seen, [chosen], title).items()}

    red_cat, cats, both = Scene(("cat",), ("red",)), Scene(("cat",), (), 2), Scene(("cat", "owl"))
    assert say(red_cat, "colours, trained", ["cat"]) == {"colour": 1, "thing": 1, "all of it": 1}
    assert say(red_cat, "colours, trained", ["owl"])["all of it"] == 0
    found = say(cats, "counts", ["cat"], count=3)
    assert found["number"] == 0 and found["thing"] == 1 and found["all of it"] == 0
    assert math.isnan(found["colour"])                      # nobody asked
    assert say(cats, "plurals", ["cat"], count=3)["at least two"] == 1
    assert say(both, "two things, trained", ["owl", "cat"]) == {"one of them": 1, "both": 1}
    assert say(both, "two things, trained", ["owl", "dog"]) == {"one of them": 1, "both": 0}


def test_questions_are_held_out_as_they_say(art):
    for title, (_, held_out) in quality.QUESTIONS.items():
        chosen, _, prompts = quality.ask_for(title, art, 20, np.random.default_rng(0))
        assert all(scenes.is_held_out(scene) == held_out for scene in chosen)
        numbered = [words.split()[0] in scenes.NUMBERS.values() for words in prompts]
        assert all(numbered) if title == "counts" else not any(numbered)


def test_the_page_has_the_controls_and_what_real_drawings_score(tmp_path, monkeypatch):
    path = tmp_path / "quality.pt"
    quality.save_model(path, "classifier", small(), dict(command="none", seconds=0),
                       names=data.names(), colours=quality.COLOURS)
    monkeypatch.setattr(quality.StyleDrop, "load", lambda *_: Pipe())
    monkeypatch.setattr(quality.data, "Art", functools.partial(data.Art, ["noto", "twemoji"]))
    sweep = dict(lambda_b=(1, 3), temperature=(1,), steps=(2,), top_k=(0,))
    monkeypatch.setattr(quality, "SWEEP", sweep)
    options = "--device cpu --names 8 --per 1 --scenes 4 --choose --grids".split()
    monkeypatch.setattr(sys, "argv", ["quality.py", f"--classifier={path}", f"--out={tmp_path}",
                                      *options])
    quality.main()
    page = (tmp_path / "quality.md").read_text()
    found = quality.json.loads((tmp_path / "quality.json").read_text())
    for row in ("control: class mean", "control: one decoding step", "given back by the tokenizer",
                "never seen", "OpenMoji"):
        assert row in page
    assert found["names"] == 4 and set(found["sampling"]) == set(sweep)
    assert len(found["sweep"]) == 4    # the defaults, lambda_b 3, steps 2, top_k 0: none twice
    for sheet in ("things_styles", "colours_things", "counts", "two_things"):
        assert (tmp_path / f"{sheet}.png").stat().st_size < 500_000
