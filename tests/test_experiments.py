"""The experiments' own arithmetic: an experiment with a wrong ruler finds whatever it likes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from data import styles
from experiments import base, judge, one_shot, table2, two_adapters
NAMES = data.names()


@pytest.fixture(scope="module")
def art():
    return data.Art(["noto", "twemoji"])


class FakeJudge(torch.nn.Module):
    """Says of picture i the name of the number in its first pixel; "style" is the pixel below.

    With a style, its values where channel 1 is 1, its medium alone where that is 0.5, nothing where
    it is 0; else the first of all values.
    """

    def __init__(self, style=None):
        super().__init__()
        self.unused, self.said = torch.nn.Parameter(torch.zeros(1)), style

    def forward(self, images):
        near = lambda best, n: -(torch.arange(n)[None] - best.long()[:, None]).abs().float()
        out = {"content": near(images[:, 0, 0, 0], len(NAMES)), "style": images[:, 1, 0]}
        for k, values in judge.VALUES.items():
            seen = (images[:, 1, 0, 0] >= dict(palette=1, medium=0.5).get(k, 2)) * bool(self.said)
            out[k] = near(seen * values.index(getattr(self.said, k, values[0])), len(values))
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

def test_rank_equals_a_plain_loop():
    scores, wanted = noise(40, 13).round(decimals=1), torch.arange(40) % 13      # there are ties
    ranks = judge.rank_among(scores, wanted, generator(), among=13)              # all the others
    for row, w, rank in zip(scores.tolist(), wanted.tolist(), ranks.tolist()):
        assert rank == sum(value >= row[w] for i, value in enumerate(row) if i != w)


def test_rivals_are_distinct_others_each_as_likely():
    rank = lambda scores: judge.rank_among(scores.expand(4000, 30), torch.full((4000,), 7),
                                           generator(), among=10).float()
    best, worst, second = torch.zeros(3, 30)
    best[7], worst[7], second[7], second[20] = 1, -1, 1, 2
    assert (rank(best) == 0).all()                          # never its own rival
    assert (rank(worst) == 9).all() and (rank(torch.zeros(30)) == 9).all()   # ties count against
    assert rank(second).max() == 1              # number 20 is met at most once, in 9 of 29 cases
    assert abs(rank(second).mean() - 9 / 29) < 0.03


def test_content_correct_counts_what_the_judge_says():
    best, asked = [0, 5, 400, 836, 9, 9], [NAMES[i] for i in (0, 5, 400, 836, 800, 10)]
    ask = lambda top=1, seed=0: judge.content_correct(FakeJudge(), pictures(best), asked,
                                                      generator(seed), top)
    assert ask().tolist()[:5] == [True] * 4 + [False] and torch.equal(ask(), ask())
    assert ask(top=100).all()
    right = np.mean([ask(seed=s)[5].item() for s in range(200)])
    assert abs(right - 737 / 836 * 736 / 835) < 0.1         # where neither 8 nor 9 is a rival


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
    row = base.measure_clip(SimpleNamespace(clip=None), sources, generator())[2]
    cells = [cell.split(" ±")[0] for cell in row.strip("| ").split(" | ")]
    assert cells == ["drawings", "50.0", "50.0", "66.7"]


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
    assert base.with_error([1.0, 2, 3, 4], digits=3) == f"2.500 ± {error:.3f}"
    grouped = base.with_error([0.0, 2, math.nan, 5, 5, 5], [0, 0, 0, 1, 1, 1], digits=1)
    assert grouped == "3.0 ± 2.0"
    assert base.with_error([math.nan]) == "-"
    assert base.percent(torch.tensor([True, False])) == "50.0 ± 50.0 %"
    differences = [np.array([1.0, 3.0]), np.array([5.0, 7.0, 9.0])]  # 2 and 7, their errors 1 and
    over_pictures = 0.5 * (1 + 4 / 3) ** 0.5                         # the root of 4 / 3
    assert table2.in_errors(differences) == [f"{4.5 / 2.5:+.1f}", f"{4.5 / over_pictures:+.1f}"]
    assert table2.in_errors([np.ones(3)]) == ["-", "-"]


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


@pytest.mark.parametrize("question", ["a thing", *styles.ATTRIBUTES, *base.WHOLE])
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
            assert bool(named) == (question != "a thing")


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


# -- table 2

def test_the_oracle_takes_the_right_object_first_then_the_nearest_style():
    """At most one picture of each prompt, ten in all.

    Trap: a beautiful picture of the wrong object.
    """
    prompts = [data.content_phrase(name) for name in NAMES[:12]]
    images = pictures([700 if j == 0 or n == 0 else n for n in range(12) for j in range(3)])
    images[:, 1, 0] = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]).repeat(12, 1)
    reference = torch.zeros(1, 3, 2, 2)                      # the wrong one has the best style
    reference[:, 1, 0, 0] = 1

    def choose(images, prompts):
        contents = [prompt for prompt in prompts for _ in range(3)]
        pool = SimpleNamespace(images=images, prompts=prompts, contents=contents, style="glowing")
        return table2.choose_by_judge(FakeJudge(), pool, reference, generator())

    chosen = choose(images, prompts)
    assert len(chosen) == table2.PICKS and all(i % 3 == 2 for i in chosen) and chosen[0] >= 3
    assert choose(images[3:9], prompts[1:3]) == [2, 5]


@pytest.mark.parametrize("mean, low, high, sign, said", [
    (1, 0.5, 2, 1, "holds"), (-1, -2, -0.5, -1, "holds"),
    (1, -0.5, 2, 1, "its direction, within the error"), (-1, -2, -0.5, 1, "does not hold"),
    (1, 0.5, 2, -1, "does not hold"), (-1, -2, 0.5, 1, "not seen"), (0, 0, 0, 1, "not seen"),
    (-1e-17, -1, 1, -1, "not seen")])
def test_verdicts(mean, low, high, sign, said):
    assert table2.verdict(mean, low, high, sign) == said


def test_table2_says_each_claim_with_its_own_numbers():
    rng = np.random.default_rng(0)
    usual = dict(reference="a cat", seconds=1, total=2, megabytes=3)
    found = {arm: [dict(usual, words=f"style {i}", **{m: rng.random() for m in table2.METRICS})
                   for i in range(6)] for arm in ("pool", *table2.ARMS)}
    for i, (r1, of_base) in enumerate(zip(found["R1"], found[table2.BASE])):
        r1["style"] = of_base["style"] + 0.25
        r1["text"] = of_base["text"] - (0.1 if i < 3 else 0.3)   # -0.2, standard error sqrt(0.002)
        r1["thing"] = of_base["thing"] * 0.75
    for arm, of_styles in found.items():
        for numbers in of_styles:          # four pictures: R1's texts differ by 0.1 from their mean
            numbers["pictures"] = {m: [numbers[m]] * 4 for m in table2.METRICS}
            if arm == "R1":
                numbers["pictures"]["text"] = [numbers["text"] + x for x in (-0.1, 0.1, -0.1, 0.1)]
    text = "\n".join(table2.report(found, 0))
    assert "| +0.250 [+0.250, +0.250] | - / - | holds |" in text
    assert text.count("[") == len(table2.CLAIMS)
    assert "| -4.5 / -8.5 | holds |" in text and "thing 75 % as often" in text
    assert f"{100 * np.mean([n['thing'] for n in found['LoRA']]):.1f} ±" in text
    assert {name for claim in table2.CLAIMS for name in claim[1:3]} <= set(table2.ARMS)


# -- two adapters

def test_the_rare_token_stands_before_the_name():
    say = two_adapters.object_phrase
    assert [say(name) for name in ("owl", "glasses")] == ["a [V] owl", "[V] glasses"]
    assert say("owl", "by its adapter alone") == "a [V]"


def test_each_way_has_its_own_adapter_and_strengths(monkeypatch, art):
    """Each mixture with its way's lambdas, an adapter alone with none.

    Trap: "a [V]" tuned or sampled by the name.
    """
    tuned, drawn = [], []

    def tune(images, prompts, style="", **how):
        tuned.append((prompts, how))
        return len(tuned)

    def sample_pool(pipe, prompts, count, style, seed, **how):
        drawn.append((prompts, how))
        return SimpleNamespace(images=torch.zeros(count, 3, 64, 64))

    monkeypatch.setattr(two_adapters, "sample_pool", sample_pool)
    subject = styles.Style(palette="sepia"), "noto", "owl", None
    _, found, row = two_adapters.one_style(SimpleNamespace(tune=tune), None, art, subject, "teapot",
                                           SimpleNamespace(seed=0, seeds=2))
    gammas, ways = two_adapters.GAMMAS, two_adapters.WAYS.values()
    assert len(row) == 3 + 2 * len(gammas)
    assert all(list(of_way) == list(gammas) for of_way in found.values())
    for k, (phrase, (tuning, strengths)) in enumerate(zip(("a [V] teapot", "a [V]"), ways)):
        prompts, how = tuned[1 + k]
        assert set(prompts) == {phrase} and len(prompts) > 1 and how == dict(tuning, seed=0)
        for gamma, (prompts, how) in zip(gammas, drawn[5 * k:]):
            mixed = {} if gamma in (0, 1) else strengths
            assert prompts == [phrase] and how == dict(mixed, content=2 + k, gamma=gamma)


def test_both_means_the_object_in_the_style():
    """Counted picture by picture.

    Trap: the product of two means, where half with the object and half in the style give a quarter.
    """
    style, number = styles.Style(palette="sepia", medium="chalk"), 5
    images = torch.nn.functional.interpolate(pictures([number, number, 700, 700]), 16)
    images[:, 1] = torch.tensor([1, 0.5, 1, 0]).view(4, 1, 1)
    ask = lambda judge: two_adapters.measure_both(judge, images, images, NAMES[number], NAMES[6],
                                                  style, "noto")
    found = ask(FakeJudge(style))
    assert found["thing seen"].tolist() == [1, 1, 0, 0]
    assert found["style seen"].tolist() == [1, 0.5, 1, 0]
    assert found["both"].tolist() == [1, 0.5, 0, 0] and found["palette"].tolist() == [0, 0, 0, 0]
    assert set(ask(None)) == {"palette", "texture"}
