"""The experiments' own arithmetic: an experiment with a wrong ruler finds whatever it likes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from data import styles
from experiments import base, judge, one_shot, table2, two_adapters
from styledrop import Pool


class FakeJudge(torch.nn.Module):
    """Says of picture i what is written in its first pixel: the name that scores highest."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        best = images[:, 0, 0, 0].long()
        return {"content": -(torch.arange(len(data.names()))[None] - best[:, None]).abs().float()}


def pictures(best):
    images = torch.zeros(len(best), 3, 2, 2)
    images[:, 0, 0, 0] = torch.tensor(best, dtype=torch.float)
    return images


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---------------------------------------------------------------------------------------------
# Among 100

def test_rank_equals_a_plain_loop():
    # rounded: there are ties
    scores, wanted = noise(40, 13).round(decimals=1), torch.arange(40) % 13
    # all the others
    ranks = judge.rank_among(scores, wanted, torch.Generator().manual_seed(0), among=13)
    for row, w, rank in zip(scores.tolist(), wanted.tolist(), ranks.tolist()):
        assert rank == sum(value >= row[w] for i, value in enumerate(row) if i != w)


def test_rivals_are_distinct_others_each_as_likely():
    rank = lambda scores: judge.rank_among(scores.expand(4000, 30), torch.full((4000,), 7),
                                           torch.Generator().manual_seed(0), among=10).float()
    best, worst, second = torch.zeros(30), torch.zeros(30), torch.zeros(30)
    best[7], worst[7], second[7], second[20] = 1, -1, 1, 2
    assert (rank(best) == 0).all()                          # never its own rival
    assert (rank(worst) == 9).all() and (rank(torch.zeros(30)) == 9).all()   # ties count against it
    assert rank(second).max() == 1                 # number 20 is met at most once, in 9 of 29 cases
    assert abs(rank(second).mean() - 9 / 29) < 0.03


def test_content_correct_is_the_same_for_the_same_generator_and_counts_what_the_judge_says():
    names, best = data.names(), [0, 5, 400, 836, 9, 9]
    asked = [names[0], names[5], names[400], names[836], names[800], names[10]]
    ask = lambda top=1, seed=0: judge.content_correct(FakeJudge(), pictures(best), asked,
                                                      torch.Generator().manual_seed(seed), top)
    assert ask().tolist()[:5] == [True] * 4 + [False]
    assert torch.equal(ask(), ask())
    assert ask(top=100).all()
    # only where neither 8 nor 9 is a rival
    right = np.mean([ask(seed=s)[5].item() for s in range(200)])
    assert abs(right - 737 / 836 * 736 / 835) < 0.1


# ---------------------------------------------------------------------------------------------
# CLIP

def test_clip_is_asked_for_content_and_style_apart(monkeypatch):
    """Half the names right; own style above the next picture's in two of three,
    where two neighbours share theirs.
    """
    names, phrases = data.names()[:4], ["gold", "gold", "chalk", "sepia"]
    scores = torch.zeros(4, len(data.names()))
    scores[[0, 1, 2, 3], [0, 1, 5, 6]] = 1.0
    monkeypatch.setattr(base, "clip_scores", lambda pipe, images: scores)

    def text_score(clip, images, texts):
        assert all(text.startswith(data.content_phrase(name)) for text, name in zip(texts, names))
        return torch.tensor([
            float(phrase in text) for phrase, text in zip(["gold", "gold", "sepia", "sepia"], texts)
        ])

    monkeypatch.setattr(base, "text_score", text_score)
    sources = {"drawings": (torch.zeros(4, 3, 8, 8), phrases, names)}
    row = base.measure_clip(SimpleNamespace(clip=None), sources,
                            torch.Generator().manual_seed(0))[2]
    assert [cell.split(" ±")[0]
            for cell in row.strip("| ").split(" | ")] == ["drawings", "50.0", "50.0", "66.7"]


# ---------------------------------------------------------------------------------------------
# Distances

@pytest.mark.parametrize("distance", [one_shot.palette_distance, one_shot.texture_distance])
def test_distances_are_zero_for_equal_pictures_and_symmetric(distance):
    x, y = noise(3, 3, 16, 16), noise(3, 3, 16, 16, seed=1)
    assert distance(x, x).tolist() == [0, 0, 0]
    assert torch.allclose(distance(x, y), distance(y, x)) and (distance(x, y) > 0).all()


def test_palette_sees_colour_and_no_place():
    red, blue = torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, -1, 1])
    plain = lambda colour: colour.view(1, 3, 1, 1).expand(1, 3, 16, 16)
    pink = plain(torch.tensor([1.0, -0.5, -0.5]))
    assert one_shot.palette_distance(plain(red), plain(blue)) > one_shot.palette_distance(
        plain(red), pink) > 0
    x = noise(1, 3, 16, 16)
    assert one_shot.palette_distance(x, x.flip(-1)) < 1e-6


def test_texture_sees_pattern_and_no_colour():
    plain, stripes = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    stripes[..., ::2] = 1
    assert one_shot.texture_distance(plain, plain + 0.5).item() < 1e-6
    assert one_shot.texture_distance(plain, stripes) > 0.05
    assert one_shot.texture_distance(stripes, stripes.transpose(-1, -2)) > 0.05  # direction counts
    assert one_shot.texture_distance(stripes, stripes.roll(2, -1)).item() < 1e-6


# ---------------------------------------------------------------------------------------------
# Errors

def test_paired_bootstrap_on_known_data():
    generator = lambda: torch.Generator().manual_seed(0)
    a = np.random.default_rng(0).normal(size=100)
    # pairs: no spread at all
    assert one_shot.paired_bootstrap(a + 2, a, generator()) == pytest.approx((2, 2, 2))
    b = np.random.default_rng(1).normal(size=100)
    mean, low, high = one_shot.paired_bootstrap(a, b, generator())
    error = (a - b).std() / 10
    assert mean == pytest.approx((a - b).mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.2 * error)


def test_standard_error_over_groups_and_without_nan():
    assert base.with_error([1.0, 2, 3, 4],
                           digits=3) == f"2.500 ± {np.std([1, 2, 3, 4], ddof=1) / 2:.3f}"
    # of 1 and 5
    assert base.with_error([0.0, 2, math.nan, 5, 5, 5], [0, 0, 0, 1, 1, 1], digits=1) == "3.0 ± 2.0"
    assert base.with_error([math.nan]) == "-"
    assert base.percent(torch.tensor([True, False])) == "50.0 ± 50.0 %"


# ---------------------------------------------------------------------------------------------
# Truth

def test_draw_tells_the_truth():
    art = data.Art(["noto"])
    images, truth = judge.draw(art, [3, 5, 8, 9], np.random.default_rng(0), held_out=1)
    again, _ = judge.draw(art, [3, 5, 8, 9], np.random.default_rng(0), held_out=1)
    assert images.shape == (4, 3, 64, 64) and torch.equal(images, again)
    assert [data.names()[i] for i in truth["content"]] == [art.names[i] for i in (3, 5, 8, 9)]
    for i in range(4):
        assert styles.is_held_out(
            styles.Style(**{k: judge.VALUES[k][truth[k][i]]
                            for k in styles.ATTRIBUTES}))
    assert {judge.SETS[i] for i in truth["hand"]} == {"noto"}


def test_no_batch_holds_what_is_held_back():
    art = data.Art(["noto", "openmoji"])
    unseen = judge.held_back(art)
    batches = judge.Batches(art, None, 4, 0)
    assert not set(unseen) & set(batches.picks)
    assert len(unseen) + len(batches.picks) == len(art.names)
    assert 0.03 < len(unseen) / len(art.names) < 0.07


@pytest.mark.parametrize("question", ["a thing", *styles.ATTRIBUTES, *base.WHOLE])
def test_questions_name_what_they_ask(question):
    rng = np.random.default_rng(0)
    for _ in range(20):
        style = base.draw_style(question, rng)
        assert styles.is_held_out(style) == question.startswith("held-out")
        if question == "held-out combination":
            assert all(value not in styles.HELD_OUT.get(k, ())
                       for k, value in styles.named(style).items())
        if question in styles.ATTRIBUTES:
            assert list(styles.named(style)) == [question]
        else:
            assert bool(styles.named(style)) == (question != "a thing")


def test_attributes_are_chosen_among_those_that_words_can_name():
    class Judge(FakeJudge):
        def forward(self, images):
            scores = {
                k: torch.arange(len(values), 0, -1.0).expand(len(images), -1)
                for k, values in judge.VALUES.items()
            }
            return super().forward(images) | scores
    seen = judge.attributes(Judge(), pictures([3, 4]))
    first = {
        k: next(v for v in values if v not in ("", "white"))
        for k, values in judge.VALUES.items()
    }
    assert seen == {k: [value] * 2 for k, value in first.items()} and first["hand"] == judge.SETS[0]


def test_judge_file_round_trip_and_refusal(tmp_path):
    torch.manual_seed(0)
    small = judge.Judge(judge.JudgeConfig(width=8, style_width=8)).eval()
    judge.save_model(tmp_path / "judge.pt", "judge", small, {}, names=data.names(),
                     values=judge.VALUES)
    loaded, images = judge.load_judge(tmp_path / "judge.pt"), noise(3, 3, 64, 64)
    assert judge.attributes(loaded, images).keys() == judge.VALUES.keys()
    assert torch.allclose(judge.style_features(loaded, images).norm(dim=1), torch.ones(3))
    # half precision
    assert torch.allclose(judge.ask(loaded, images, "content"), small(images)["content"], atol=0.01)
    judge.save_model(tmp_path / "old.pt", "judge", small, {}, names=data.names()[:-1],
                     values=judge.VALUES)
    with pytest.raises(ValueError, match="other names or styles"):
        judge.load_judge(tmp_path / "old.pt")


# ---------------------------------------------------------------------------------------------
# Table 2

def test_the_oracle_takes_the_right_thing_first_then_the_nearest_style():
    """At most one picture of each prompt, ten in all.

    Trap: a beautiful picture of the wrong thing.
    """
    prompts = [data.content_phrase(name) for name in data.names()[:12]]
    wrong, right = data.names()[700:701], data.names()[:12]
    number_of = data.names().index
    best = [n for name in right for n in (number_of(wrong[0]), number_of(name), number_of(name))]
    best[0] = best[1] = best[2] = number_of(wrong[0])       # nothing of the first prompt is right
    images = pictures(best)

    class Judge(FakeJudge):
        def forward(self, images):
            # two features, as in the pictures
            return super().forward(images) | {"style": images[:, 1, 0]}

    # the wrong thing has the best style
    near = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]).repeat(12, 1)
    images[:, 1, 0] = near
    reference = torch.zeros(1, 3, 2, 2)
    reference[:, 1, 0] = torch.tensor([1.0, 0.0])
    pool = Pool(images, prompts, "glowing")
    chosen = table2.choose_by_judge(Judge(), pool, reference, torch.Generator().manual_seed(0))
    assert len(chosen) == table2.PICKS and all(i % 3 == 2 for i in chosen) and chosen[0] >= 3
    few = Pool(images[3:9], prompts[1:3], "glowing")
    assert table2.choose_by_judge(Judge(), few, reference,
                                  torch.Generator().manual_seed(0)) == [2, 5]


@pytest.mark.parametrize("mean, low, high, sign, said",
                         [(1, 0.5, 2, 1, "holds"), (-1, -2, -0.5, -1, "holds"),
                          (1, -0.5, 2, 1, "its direction, within the error"),
                          (-1, -2, -0.5, 1, "does not hold"), (1, 0.5, 2, -1, "does not hold"),
                          (-1, -2, 0.5, 1, "not seen"), (0, 0, 0, 1, "not seen"),
                          (-1e-17, -1, 1, -1, "not seen")])
def test_verdicts(mean, low, high, sign, said):
    assert table2.verdict(mean, low, high, sign) == said


def test_standard_errors_over_styles_and_over_pictures():
    """Trap: errors over pictures alone, where styles differ more than pictures do."""
    # means 2 and 7, their errors 1 and sqrt(4 / 3)
    differences = [np.array([1.0, 3.0]), np.array([5.0, 7.0, 9.0])]
    assert table2.in_errors(differences) == [
        f"{4.5 / 2.5:+.1f}", f"{4.5 / (0.5 * (1 + 4 / 3) ** 0.5):+.1f}"
    ]
    assert table2.in_errors([np.ones(3)]) == ["-", "-"]


def test_table2_says_each_claim_with_its_own_numbers():
    rng = np.random.default_rng(0)
    found = {
        arm: [
            dict(words=f"style {i}", reference="a cat", seconds=1, total=2, megabytes=3,
                 **{m: rng.random()
                    for m in table2.METRICS}) for i in range(6)
        ]
        for arm in ("pool", *table2.ARMS)
    }
    for i in range(6):
        found["R1"][i]["style"] = found[table2.BASE][i]["style"] + 0.25
        # -0.2, standard error sqrt(0.002)
        found["R1"][i]["text"] = found[table2.BASE][i]["text"] - (0.1 if i < 3 else 0.3)
        found["R1"][i]["thing"] = found[table2.BASE][i]["thing"] * 0.75
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


# ---------------------------------------------------------------------------------------------
# Two adapters


@pytest.mark.parametrize("name, phrase", [("teapot", "a [V] teapot"), ("owl", "a [V] owl"),
                                          ("glasses", "[V] glasses"),
                                          ("hot-air-balloon", "a [V] hot air balloon")])
def test_the_rare_token_stands_before_the_name(name, phrase):
    assert two_adapters.object_phrase(name) == phrase
    assert two_adapters.object_phrase(name, "by its adapter alone") == "a [V]"


def test_each_way_has_its_own_adapter_and_strengths(monkeypatch):
    """Each mixture with its way's lambdas, an adapter alone with none.

    Trap: "a [V]" taught or sampled by the name.
    """
    tuned, drawn, art = [], [], data.Art([*two_adapters.HANDS, "openmoji"])
    pipe = SimpleNamespace(
        tune=lambda images, prompts, style="", **how: tuned.append((prompts, how)) or len(tuned))
    monkeypatch.setattr(
        two_adapters, "sample_pool", lambda pipe, prompts, count, style, seed, **how: drawn.append(
            (prompts, how)) or SimpleNamespace(images=torch.zeros(count, 3, 64, 64)))
    subject = styles.Style(palette="sepia"), "noto", "owl", None
    _, found, row = two_adapters.one_style(pipe, None, art, subject, "teapot",
                                           SimpleNamespace(seed=0, seeds=2))
    assert len(row) == 3 + 2 * len(two_adapters.GAMMAS)
    assert all(list(of_way) == list(two_adapters.GAMMAS) for of_way in found.values())
    for k, (phrase,
            (tuning,
             strengths)) in enumerate(zip(("a [V] teapot", "a [V]"), two_adapters.WAYS.values())):
        prompts, how = tuned[1 + k]
        assert set(prompts) == {phrase} and len(prompts) > 1 and how == dict(tuning, seed=0)
        for gamma, (prompts, how) in zip(two_adapters.GAMMAS, drawn[5 * k:]):
            assert prompts == [phrase]
            assert how == dict({} if gamma in (0, 1) else strengths, content=2 + k, gamma=gamma)


def test_both_means_the_thing_in_the_style():
    """Counted picture by picture.

    Trap: the product of two means, where half with the thing and half in the style give a quarter.
    """
    style, number = styles.Style(palette="sepia", medium="chalk"), 5

    class Judge(FakeJudge):
        def forward(self, images):
            """The style's values where channel 1 is 1, its medium alone where it is 0.5,
            nothing where it is 0.
            """
            out = super().forward(images) | {"style": images[:, 1, 0]}
            for k, values in judge.VALUES.items():
                least = dict(palette=1, medium=0.5).get(k, 2)
                best = (images[:, 1, 0, 0] >= least) * values.index(getattr(style, k, "noto"))
                out[k] = torch.nn.functional.one_hot(best.long(), len(values)).float()
            return out

    images = torch.nn.functional.interpolate(pictures([number, number, 700, 700]), 16)
    images[:, 1] = torch.tensor([1, 0.5, 1, 0]).view(4, 1, 1)
    ask = lambda judge: two_adapters.measure_both(judge, images, images,
                                                  data.names()[number],
                                                  data.names()[6], style, "noto")
    found = ask(Judge())
    assert found["thing seen"].tolist() == [1, 1, 0, 0]
    assert found["style seen"].tolist() == [1, 0.5, 1, 0]
    assert found["both"].tolist() == [1, 0.5, 0, 0] and found["palette"].tolist() == [0, 0, 0, 0]
    assert set(ask(None)) == {"palette", "texture"}
