"""The experiments' own arithmetic: an experiment with a wrong ruler finds whatever it likes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from data import styles
from experiments import base, common, judge, one_shot

NAMES = data.names()


@pytest.fixture(scope="module")
def art():
    return data.Art(["noto", "twemoji"])


class FakeJudge(torch.nn.Module):
    """Says of picture i the name of the number in its first pixel; "style" is the pixel below.

    Of attributes the values of a style; without one the first of all.
    """

    def __init__(self, style=None):
        super().__init__()
        self.unused, self.said = torch.nn.Parameter(torch.zeros(1)), style

    def forward(self, images):
        near = lambda best, n: -(torch.arange(n)[None] - best.long()[:, None]).abs().float()
        out = {"content": near(images[:, 0, 0, 0], len(NAMES)), "style": images[:, 1, 0]}
        for k, values in judge.VALUES.items():
            seen = torch.full((len(images),), values.index(getattr(self.said, k, values[0])))
            out[k] = near(seen, len(values))
        return out


def pictures(best):
    images = torch.zeros(len(best), 3, 2, 2)
    images[:, 0, 0, 0] = torch.tensor(best, dtype=torch.float)
    return images


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed)) * 2 - 1


# -- among 100

def test_named_counts_what_the_judge_says():
    """0: the judge names another; in between: where two random others miss the nearer names."""
    best, asked = [0, 5, 400, 836, 9, 9], [NAMES[i] for i in (0, 5, 400, 836, 800, 10)]
    found = judge.named(FakeJudge(), pictures(best), asked)
    assert found[:5].tolist() == [1, 1, 1, 1, 0]            # 8, 9 score as high as 10 or higher
    assert found[5].item() == pytest.approx(737 / 836 * 736 / 835)
    assert common.numbers_of(["owl", "cat"]).tolist() == [NAMES.index("owl"), NAMES.index("cat")]


def test_clip_is_asked_for_content_and_style_apart(monkeypatch):
    """Half the names right; own style above the next picture's in two of three,
    where two neighbours share theirs.
    """
    names, phrases = NAMES[:4], ["gold", "gold", "chalk", "sepia"]
    scores = torch.zeros(4, len(NAMES))
    scores[[0, 1, 2, 3], [0, 1, 5, 6]] = 1.0

    def text_score(clip, images, texts):
        assert all(text.startswith(data.content_phrase(name)) for text, name in zip(texts, names))
        seen = ["gold", "gold", "sepia", "sepia"]
        return torch.tensor([float(phrase in text) for phrase, text in zip(seen, texts)])

    monkeypatch.setattr(base, "clip_scores", lambda pipe, images: scores)
    monkeypatch.setattr(base, "text_score", text_score)
    sources = {"drawings": (torch.zeros(4, 3, 8, 8), phrases, names)}
    row = base.measure_clip(SimpleNamespace(clip=None), sources)[2]
    cells = [cell.split(" ±")[0] for cell in row.strip("| ").split(" | ")]
    assert cells == ["drawings", "50.0", "66.7"]


# -- distances and errors

def test_distances():
    """Zero for equal pictures, symmetric; palette sees no place, texture no colour."""
    palette, texture = one_shot.palette_distance, one_shot.texture_distance
    x, y = noise(3, 3, 16, 16), noise(3, 3, 16, 16, seed=1)
    for distance in (palette, texture):
        assert distance(x, x).tolist() == [0, 0, 0]
        assert torch.allclose(distance(x, y), distance(y, x)) and (distance(x, y) > 0).all()
    flat = lambda *rgb: torch.tensor(rgb).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    red, blue, pink = flat(1.0, -1, -1), flat(-1.0, -1, 1), flat(1.0, -0.5, -0.5)
    assert palette(red, blue) > palette(red, pink) > 0 and palette(x, x.flip(-1)).max() < 1e-6
    plain, stripes = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    stripes[..., ::2] = 1
    assert texture(plain, plain + 0.5).item() < 1e-6 and texture(plain, stripes) > 0.05
    assert texture(stripes, stripes.transpose(-1, -2)) > 0.05                    # direction counts
    assert texture(stripes, stripes.roll(2, -1)).item() < 1e-6


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
    row = lambda palette, seen: dict.fromkeys(one_shot.METRICS, 0.0) | {
        "palette": palette, "object seen": seen}
    found = []
    for i, words in enumerate(("gold", "chalk")):
        rows = {name: row(0.3 + i, 0.5) for name in (*one_shot.MADE, one_shot.FLOOR)}
        found.append((words, rows | {"tuned": row(0.1 + i, 0.75)}))
    text = "\n".join(one_shot.report(found, 0))
    assert "|  | palette | texture | judge's distance | style seen, % | object seen, % |" in text
    assert "| tuned | 0.6000 ± 0.5000 | " in text and " | 75.0 ± 0.0 | 0.0 ± 0.0 |" in text
    assert "| tuned minus rare token | -0.2000 [-0.2000, -0.2000] | " in text
    assert " | +25.0 [+25.0, +25.0] | +0.0 [+0.0, +0.0] |" in text
    assert "| chalk | 1.300 / 1.300 / 1.100 / 1.300 / 1.300 | " in text
    assert " | 50.0 / 50.0 / 75.0 / 50.0 / 50.0 | " in text


# -- the judge

def test_draw_tells_the_truth(art):
    picks = [3, 5, 8, 9]
    images, truth = judge.draw(art, picks, np.random.default_rng(0), held_out=1)
    again, _ = judge.draw(art, picks, np.random.default_rng(0), held_out=1)
    assert images.shape == (4, 3, 64, 64) and torch.equal(images, again)
    assert [NAMES[i] for i in truth["content"]] == [art.names[i] for i in picks]
    for i in range(4):
        style = {k: judge.VALUES[k][truth[k][i]] for k in styles.ATTRIBUTES}
        assert styles.is_held_out(styles.Style(**style))
    assert [judge.SETS[i] for i in truth["hand"]] == [art.sets[i] for i in picks]


def test_no_batch_holds_what_is_held_back(art):
    unseen, batches = judge.held_back(art), judge.Batches(art, None, 4, 0)
    assert not set(unseen) & set(batches.picks)
    assert len(unseen) + len(batches.picks) == len(art.names)
    assert 0.03 < len(unseen) / len(art.names) < 0.07


@pytest.mark.parametrize("question", ["no style", *styles.ATTRIBUTES, *base.WHOLE])
def test_questions_name_what_they_ask(question):
    rng = np.random.default_rng(0)
    for _ in range(20):
        style = base.draw_style(question, rng)
        named = styles.named(style)
        assert styles.is_held_out(style) == question.startswith("held-out")
        if question == "held-out combination":
            assert all(v not in styles.HELD_OUT.get(k, ()) for k, v in named.items())
        if question in styles.ATTRIBUTES:
            assert list(named) == [question]
        else:
            assert bool(named) == (question != "no style")


def test_verdicts_leave_out_what_was_not_asked():
    sepia, chalk = styles.Style(palette="sepia"), styles.Style(medium="chalk")
    found = base.verdicts(FakeJudge(sepia), pictures([3, 3]), NAMES[3:5], [sepia, chalk])
    assert found["object"][0] == 1 and found["object"][1] < 1
    assert found["palette"][0] == 1 and found["palette"][1].isnan()
    assert found["medium"][0].isnan() and found["medium"][1] == 0
    assert found["light"].isnan().all()


def test_judge_file_round_trip_and_refusal(tmp_path):
    """And attributes are chosen among those that words can name."""
    torch.manual_seed(0)
    small = judge.Judge(judge.JudgeConfig(width=8, style_width=8)).eval()
    path, kept = tmp_path / "judge.pt", dict(names=NAMES, values=judge.VALUES)
    judge.save_model(path, "judge", small, {}, **kept)
    loaded, images = judge.load_judge(path), noise(3, 3, 64, 64)
    assert torch.allclose(judge.style_features(loaded, images).norm(dim=1), torch.ones(3))
    half = judge.ask(loaded, images, "content")
    assert torch.allclose(half, small(images)["content"], atol=0.01)             # half precision
    judge.save_model(path, "judge", small, {}, **kept | dict(names=NAMES[:-1]))
    with pytest.raises(ValueError, match="other names or styles"):
        judge.load_judge(path)
    first = {k: next(v for v in values if v not in ("", "white"))
             for k, values in judge.VALUES.items()}
    assert judge.attributes(FakeJudge(), pictures([3, 4])) == {k: [v] * 2 for k, v in first.items()}
    assert first["hand"] == judge.SETS[0]
