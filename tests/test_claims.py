"""The claims' arithmetic against known answers, their subjects, one small run from end to end."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from data import styles
from experiments import quality
from experiments.claims import claims, identity, intervals, report, run, setting
from styledrop import save_model


# -- numbers

@pytest.mark.parametrize("freedom, t", [(1, 12.706), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_students_t_has_the_values_of_the_tables(freedom, t):
    assert intervals.tail(t, freedom) == pytest.approx(0.05, abs=1e-4)
    assert intervals.critical(freedom) == pytest.approx(t, abs=2e-3)


def test_interval_holds_the_mean_as_often_as_it_says():
    x = np.random.default_rng(0).normal(1, 2, (2000, 4))
    inside = [low <= 1 <= high for _, low, high, _ in map(intervals.interval, x)]
    assert 0.935 < np.mean(inside) < 0.965
    assert intervals.interval([0.0, 0, 0])[3] == 1 and intervals.interval([1.0, 1, 1])[3] == 0
    assert math.isnan(intervals.interval([1.0])[3])


def test_holm_steps_down_and_leaves_nan_alone():
    found = intervals.holm([0.01, 0.04, 0.03, math.nan, 0.5])
    assert found[:3] == pytest.approx([0.04, 0.09, 0.09]) and math.isnan(found[3])
    assert found[4] == pytest.approx(0.5)


def test_verdicts():
    up = [1.0, 1.2, 0.9, 1.1]
    assert intervals.judge(up, 1)[0] == "holds" and intervals.judge(up, -1)[0] == "does not"
    same, p = intervals.judge([0.001, -0.002, 0.001, 0.0], ("same", 0.1))
    assert same == "holds" and p < 0.001
    assert intervals.judge(up, ("same", 0.1))[0] == "does not"
    # far from 0 on average, but who knows: neither is sure
    assert intervals.judge([1.0, -1, 2, -2], ("same", 0.1))[1] > 0.5


def test_a_claim_holds_where_all_parts_do_and_falls_with_any():
    holds, not_so, open_ = intervals.HOLDS, intervals.CONTRARY, intervals.OPEN
    assert intervals.together([(holds, 0.01), (holds, 0.03)]) == (holds, 0.03)
    assert intervals.together([(holds, 0.01), (not_so, 0.01)]) == (not_so, 0.02)
    assert intervals.together([(holds, 0.01), (open_, 1.0)])[1] == 1
    assert intervals.together([])[0] == "not tested"


def test_an_arm_is_held_against_the_best_of_no_less_text():
    curve = [(0.3, 0.1), (0.32, 0.2), (0.31, 0.3), (0.2, 0.9)]
    assert intervals.match(0.315, curve) == 1               # the only one with as much
    assert intervals.match(0.25, curve) == 2                # the curve turns back: its best place
    assert intervals.match(0.4, curve) == 1                 # none has as much: the most text


def test_rank_correlation_slope_and_mixed_probabilities():
    assert intervals.rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert intervals.rank_correlation([1, 2, 3], [5, 5, 5]) == 0
    assert intervals.slope([0, 1, 2], [1, 3, 5]) == pytest.approx(2)
    a, b = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    mixed = identity.mix_probabilities(a, b, 0.25).exp()
    assert torch.allclose(mixed, 0.75 * a.softmax(-1) + 0.25 * b.softmax(-1), atol=1e-6)


# -- subjects and objects

@pytest.fixture(scope="module")
def art():
    return data.Art()


def test_subjects_are_held_out_and_a_style_has_its_own_things(art):
    some = setting.subjects(art, 3, references=2)
    assert len(some) == 3 + 6 == len({s.key for s in some}) and sum(s.reported for s in some) == 6
    for s in some:
        assert styles.is_held_out(s.style) and styles.has_new_words(s.style) == s.new_words
        assert not set(s.references) & set(s.things) and s.object not in s.references + s.things
    assert len({s.references[0] for s in some}) == 9 == len({s.object for s in some})
    one = {s.key for s in setting.subjects(art, 3)}          # a second reference moves no first one
    assert one == {s.key for s in some if s.seed == 0}


# -- from end to end

def test_the_oracle_picks_what_was_wanted_and_another_what_is_dark(art, monkeypatch):
    style, names = styles.Style(ground="blue"), ("mouse", "cat")
    wanted = setting.drawings(art, names, style)             # (2, 3, 64, 64), then worse and worse
    pool = torch.stack([wanted, wanted.roll(1, 0), -wanted, wanted * 0 - 1], 1).flatten(0, 1)
    subject = setting.Subject(3, 0, style, ("cat",), names, "", False)
    unit = SimpleNamespace(art=art, subject=subject, net=None)
    monkeypatch.setattr(run, "look", lambda net, images: dict(names=None))
    monkeypatch.setattr(run, "among", lambda scores, names: torch.ones(8))
    scores = lambda who: run.Unit.scores(unit, who, pool, names).view(2, 4)
    assert (scores("oracle").argmax(1) == 0).all() and (scores("dark").argmax(1) == 3).all()
    assert torch.equal(scores("chance"), scores("chance"))


@pytest.fixture
def small(monkeypatch):
    """One style to choose on, a curve of two points, pools of two prompts."""
    for module in (setting, report):
        monkeypatch.setattr(module, "CHOOSING", 1)
    monkeypatch.setattr(run, "PER", 2)
    monkeypatch.setattr(run, "pool_names", lambda art: setting.pool_names(art, 2))
    for module in (run, claims):
        monkeypatch.setattr(module, "LAMBDAS", (0, 1))
    for module in (claims, report):
        monkeypatch.setattr(module, "CURVE", ("words", "R1 at 0", "R1 at 1"))


def test_a_run_goes_on_where_it_was_and_reports_what_is_there(small, weights, tmp_path, cli):
    net = quality.Classifier(quality.ClassifierConfig(names=len(data.names())))
    save_model(tmp_path / "q.pt", "classifier", net, {}, names=data.names(),
               colours=quality.COLOURS)
    own = ["--weights", weights, "--classifier", tmp_path / "q.pt", "--work", tmp_path / "work",
           "--things", 2, "--steps", 1, "--styles", 1]
    code, _, err = cli(run.main, *own, "--groups", "rounds")             # too early
    assert code == 2 and "lambda_A" in err
    times = []
    for _ in range(2):
        code, _, err = cli(run.main, *own, "--groups", "curve,rounds")
        assert code == 0, err
        files = sorted((tmp_path / "work").glob("*/style*/*.json"))
        times.append([file.stat().st_mtime_ns for file in files])
    assert len(files) > 2 and times[0] == times[1]                       # nothing was drawn again
    assert len(json.loads(files[-1].read_text())["text"]) == 2
    code, out, err = cli(report.main, *own, "--out", tmp_path, "--first", 0)
    assert code == 0 and "## Styles drawn later, alone" in out, err
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    rows = [line for line in lines if line.split()[1].isdigit()]
    assert len(rows[:24]) == 24 and rows[1].endswith("| holds |") and "not tested" in rows[21]
    said = json.loads((tmp_path / "claims.json").read_text())
    assert said["lambda_a"] in (0, 1) and len(said["rows"]) == 24
    assert {"claims_frontier.png", "claims_pictures.png"} <= {f.name for f in tmp_path.iterdir()}
    own[own.index("--work") + 1] = tmp_path / "elsewhere"                # on another machine
    code, out, err = cli(run.main, *own, "--groups", "curve,rounds", "--restore",
                         tmp_path / "claims.json")
    assert code == 0 and out.count("\n") == 2, err                       # nothing is drawn again
    assert [file.read_bytes() for file in sorted((tmp_path / "elsewhere").glob("*/style*/*.json"))
            ] == [file.read_bytes() for file in files if "chosen" not in file.name]
    code, _, err = cli(run.main, *own, "--seed", 1, "--restore", tmp_path / "claims.json")
    assert code == 2 and "other settings" in err
