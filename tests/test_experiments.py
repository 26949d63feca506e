"""The experiments' arithmetic, and each of their commands at toy size."""

import itertools
import json
import math
import re
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import generator, noise_images
from PIL import Image

from checkpoint.clip import load_clip
from clip_feedback import style_score, text_score
from experiments import (baselines, classifier, common, feedback, foreign, losses, main_job,
                         object_judge, peers, quality, score, speed, timing)
from styledrop import to_uint8


def rows_of(text):
    """The rows of all tables of a report: lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# -- common.py

def test_standard_errors():
    """Over groups, without NaN. Trap: over images alone, where styles differ more than those."""
    error = np.std([1, 2, 3, 4], ddof=1) / 2
    assert common.mean_and_error([1.0, 2, 3, 4]) == pytest.approx((2.5, error))
    assert common.with_error([1.0, 2, 3, 4], digits=3) == f"2.500 ± {error:.3f}"
    grouped = common.with_error([0.0, 2, math.nan, 5, 5, 5], [0, 0, 0, 1, 1, 1])
    assert grouped == "3.0 ± 2.0"
    assert common.with_error([math.nan]) == common.percent([], []) == "-"
    assert common.with_error([3.0]) == "3.0 ± nan"
    assert common.percent(torch.tensor([True, False])) == "50.0 ± 50.0 %"


def test_among_is_the_share_of_all_choices_of_rivals():
    """By hand: of all ways to choose 2 of the 5 others, those where neither scores as high."""
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.1, 0.2, 0.3], [0.9, 0.1, 0.2, 0.3, 0.4, 0.5]])
    wanted = torch.tensor([0, 0])
    found = common.among(scores, wanted, rivals=2)
    for row, chance in zip(scores, found):
        choices = list(itertools.combinations(row[1:].tolist(), 2))
        won = [max(choice) < row[0] for choice in choices]
        assert chance.item() == pytest.approx(sum(won) / len(won))
    assert found[1] == 1


def test_reports_name_the_command_as_it_is_typed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/experiments/quality.py", "--out", "my folder"])
    title, _, command, _ = common.heading("Quality")
    assert title == "# Quality"
    assert command == "`python -m experiments.quality --out 'my folder'`"
    assert common.table(["a", "b"], [["1", "2"]]) == ["| a | b |", "|---|---|", "| 1 | 2 |", ""]


# -- score.py

@pytest.fixture
def numbered(tmp_path):
    """A folder of images 1, 2, 10 and 11, a note and a subfolder, and prompts for the images."""
    folder = tmp_path / "images"
    (folder / "old").mkdir(parents=True)
    (folder / "notes.txt").write_text("not an image")
    for number, image in zip((1, 2, 10, 11), to_uint8(noise_images(4))):
        Image.fromarray(image).save(folder / f"{number}.png")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na house\na teapot\n an owl \n")
    return folder, prompts


def test_scores_pair_images_and_prompts_as_a_person_counts(cli, numbered, weights):
    """Trap: "10.png" before "2.png", which gives every prompt but the first a wrong image."""
    folder, prompts = numbered
    code, out, err = cli(score.main, "--images", folder, "--ref", folder / "2.png",
                         "--prompts", prompts, "--clip", weights / "clip.pt")
    assert code == 0, err
    lines = out.splitlines()
    skipped = [line.rsplit(": ", 1)[1] for line in lines if line.startswith("skipped")]
    assert skipped == ["notes.txt", "old"]
    pairs = [re.fullmatch(r"(\S+)  (\S+)  (\d+)\.png  (.+)", line) for line in lines]
    pairs = [pair.groups() for pair in pairs if pair]
    assert [(number, prompt) for _, _, number, prompt in pairs] == [
        ("1", "a cat"), ("2", "a house"), ("10", "a teapot"), ("11", "an owl")]

    clip, images = load_clip(weights / "clip.pt"), noise_images(4)
    text = text_score(clip, images, ["a cat", "a house", "a teapot", "an owl"])
    style = style_score(clip, images, images[1])
    for column, name, scores in ((0, "text", text), (1, "style", style)):
        assert [float(pair[column]) for pair in pairs] == pytest.approx(scores.tolist(), abs=2e-3)
        mean = float(re.search(rf"{name} score (\S+) ", out)[1])
        assert mean == pytest.approx(scores.mean().item(), abs=1e-3)
    assert pairs[1][1] == "1.000"                            # the reference itself


def test_a_prompt_that_clip_cuts_is_noted(cli, numbered, weights):
    """In one line. Trap: a score of half a prompt, and nothing says so."""
    folder, prompts = numbered
    prompts.write_text("a cat " * 50)
    code, _, err = cli(score.main, "--images", folder, "--ref", folder / "2.png",
                       "--prompts", prompts, "--clip", weights / "clip.pt")
    assert code == 0
    assert err.startswith("note: only the first 14 tokens of 'a cat ") and err.count("\n") == 1


def test_the_clip_that_ships_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = score.options().parse_args(["--images", "a", "--ref", "b", "--prompts", "c"])
    assert Path(args.clip).is_absolute() and Path(args.clip).exists()


@pytest.mark.parametrize("lines, complaint", [
    ("a cat\na dog\n", "4 images, but .* contains 2 prompts"), ("\n", "contains 0 prompts")])
def test_scores_need_a_prompt_for_each_image(refused, numbered, lines, complaint):
    folder, prompts = numbered
    prompts.write_text(lines)
    line = refused(score.main, "--images", folder, "--ref", folder / "1.png", "--prompts", prompts)
    assert re.search(complaint, line)


def test_the_order_of_images_does_not_depend_on_the_file_system(tmp_path):
    """Trap: names that tie as numbers, so that prompts are paired with other images."""
    names = ["007.png", "07.png", "7.png", "a.png"]
    for name in reversed(names):
        (tmp_path / name).touch()
    images, _ = score.find_images(tmp_path)
    assert [path.name for path in images] == names


# -- losses.py

def test_a_log_that_was_cut_by_a_kill_is_read(tmp_path):
    log = tmp_path / "muse.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert losses.read_log(log) == [{"step": 1}, {"step": 2}]
    log.write_text('{"step": 1}\n{"ste')
    with pytest.raises(ValueError, match="muse.jsonl has fewer than two complete lines"):
        losses.read_log(log)


def test_a_loss_that_never_changes_is_drawn():
    """Trap: a range of zero, whose logarithm does not exist."""
    assert losses.curve("muse: loss", [16, 32], [3.0, 3.0]).size == (320, 200)


def test_losses_of_the_shipped_base(cli, tmp_path):
    """The last row of every table is the end of that stage's log."""
    code, _, err = cli(losses.main, "--out", tmp_path)
    assert code == 0, err
    rows = rows_of((tmp_path / "losses.md").read_text())
    for stage in losses.NOTES:
        log = losses.read_log(Path(losses.WEIGHTS) / f"{stage}.jsonl")
        assert f"{log[-1]['images']:,}" in [row[1] for row in rows]
    assert (tmp_path / "losses.png").stat().st_size < 100_000


def test_milestones_are_means_of_what_is_near():
    log = [dict(step=step, images=8 * step, minutes=step / 60, loss=100 / step)
           for step in range(1, 201)]
    rows = losses.milestones(log, ["loss"])
    assert [row[1] for row in rows] == ["32", "80", "320", "800", "1,600"]
    assert float(rows[-1][2]) == pytest.approx(np.mean([100 / 198, 100 / 199, 0.5]), abs=1e-3)


# -- main_job.py and timing.py

def test_a_command_is_measured_as_a_user_runs_it(tmp_path, weights2):
    """One real process: its parts are all there, and take no longer than the whole."""
    found = main_job.measure("sample.py", "--style", "none", "--prompt", "a cat",
                             "--out", tmp_path / "cat.png", "--weights", weights2)
    assert (tmp_path / "cat.png").exists() and "cat.png: seed 0" in found.output
    assert set(found.parts) == set(main_job.SAMPLING)
    assert 0 < sum(found.parts.values()) < found.seconds and found.memory > 50


def test_timed_functions_add_up_their_seconds(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(time=lambda: clock.now))

    def work(pipe, G, seconds):
        clock.now += seconds
        return "done"

    seconds = {}
    tuning = timing.timed(work, "tuning", seconds)
    first = SimpleNamespace(config=SimpleNamespace(low_grid=0))
    second = SimpleNamespace(config=SimpleNamespace(low_grid=16))
    assert tuning(None, first, 2) == tuning(None, second, seconds=3) == "done"
    tuning(None, first, 4)
    assert seconds == {"tuning, stage 1": 6, "tuning, stage 2": 3}


def test_the_main_job_is_reported(cli, tmp_path, weights2, monkeypatch):
    """The whole command, with train.py and sample.py replaced by fakes."""
    commands = []

    def measure(script, *arguments):
        commands.append([script, *map(str, arguments)])
        given = dict(zip(arguments[::2], arguments[1::2]))
        out = Path(given["--out"])
        parts = main_job.SAMPLING
        if script == "train.py":
            parts = main_job.TUNING
            out.mkdir()
            (out / "adapter.pt").write_bytes(b"adapter")
            out = out / "samples.png"
        Image.new("RGB", (40, 20)).save(out)
        return main_job.Measured(21.0, 100.0, dict.fromkeys(parts, 2.0), f"{script} has run")

    monkeypatch.setattr(main_job, "measure", measure)
    (tmp_path / "README.md").write_text("| file | content |\n|---|---|\n| a.png | a cat |\n"
                                        "| b.png | an owl |\n")
    code, _, err = cli(main_job.main, "--examples", tmp_path, "--weights", weights2,
                       "--out", tmp_path / "out")
    assert code == 0, err
    text = (tmp_path / "out" / "main_job.md").read_text()
    rows = rows_of(text)
    assert ["a.png", "21 s", "100 MB", "21.0 s", "100 MB"] in rows
    assert ["b.png", "21 s", "100 MB", "21.0 s", "100 MB"] in rows
    assert ["tuning, stage 2", "2.0 s"] in rows and ["the rest", "3.0 s"] in rows
    assert "byte for byte? Yes" in text and "train.py has run" in text
    references = [Path(one[2]).name for one in commands if one[0] == "train.py"]
    assert references == ["a.png", "a.png", "b.png"]
    assert Image.open(tmp_path / "out" / "before_after.png").size == (40, 40)


def test_a_command_that_fails_is_one_line(monkeypatch):
    """Its last line, without the lines above it."""
    real = subprocess.Popen

    def failing(command, **settings):
        return real(["sh", "-c", "echo one; echo no base; exit 2"], **settings)

    monkeypatch.setattr(subprocess, "Popen", failing)
    with pytest.raises(ValueError, match="^train.py failed: no base$"):
        main_job.measure("train.py")


# -- speed.py and peers.py

def test_operations_are_counted_by_hand():
    """Two for each multiplication of a product. Trap: torch does not count the CPU's attention."""
    q = torch.randn(2, 3, 8, 4, generator=generator())       # (B, heads, P, D / heads)

    def work():
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        return y.flatten(2) @ q.new_ones(32, 5)

    assert speed.operations(work) == 2 * (2 * 2 * 3 * 8 * 8 * 4 + 2 * 3 * 32 * 5)


def test_passes_are_those_of_the_pipeline(pipe2, calls):
    """Trap: a time for each forward pass that divides by the paper's three in both stages."""
    for stage, G in ((1, pipe2.muse), (2, pipe2.superres)):
        found = calls(G, "forward")
        speed.sampling(pipe2, stage, count=2, steps=3)()
        assert len(found) == 3 * speed.passes(stage)


def test_speed_at_toy_size(cli, tmp_path, weights2, monkeypatch):
    """The report has the numbers of the JSON file, and says by which base and machine."""
    monkeypatch.setattr(speed, "THREADS", (1,))              # two are slow where others compute
    code, _, err = cli(speed.main, "--quick", "--weights", weights2, "--out", tmp_path)
    assert code == 0, err
    assert torch.get_num_threads() == 1
    found = json.loads((tmp_path / "speed.json").read_text())
    text = (tmp_path / "speed.md").read_text()
    rows = {row[0]: row for row in rows_of(text)}
    assert len(found["stages"]) == 4
    for name, one in found["stages"].items():
        assert rows[name][1] == speed.ms(one["fp32"]) and one["operations"] > 0
    assert [speed.ms(x) for x in found["neighbours"]["1 thread, alone"].values()] == rows[
        "1 thread, alone"][1:]
    assert text.count(found["where"]) == 3                   # above each table
    assert found["base"] in found["where"] and f"chooses {found['rule']}" in text


def test_a_median_is_not_the_first_call(monkeypatch):
    times = iter([9.0, 9.5, 1.0, 2.0, 5.0, 8.0, 0.0, 1.0])
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    found = []
    assert speed.median_seconds(lambda: found.append(1), 3) == 1
    assert len(found) == 4                                   # one is not counted


def test_a_gpu_has_finished_before_a_time_begins(monkeypatch):
    """Trap: what the warm-up left to do is counted."""
    done = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronised"))

    def now():
        done.append("time")
        return 0.0

    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=now))
    speed.median_seconds(lambda: done.append("work"), 1)
    assert done == ["work", "synchronised", "time", "work", "synchronised", "time"]


def test_computing_in_either_arithmetic(pipe):
    for name, dtype in speed.TYPES.items():
        with speed.computing_in(name), speed.styledrop.autocast("cpu"):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_peers_that_are_not_installed_are_named(cli, tmp_path, monkeypatch):
    def missing():
        raise ImportError("No module named 'theirs'")

    monkeypatch.setattr(peers, "PEERS", {"ours": partial(peers.ours, patch=2), "theirs": missing})
    monkeypatch.setattr(peers, "LAYERS", 1)
    code, _, err = cli(peers.main, "--steps", 1, "--repeats", 1, "--out", tmp_path)
    assert code == 0, err
    rows = {row[0]: row for row in rows_of((tmp_path / "peers.md").read_text())}
    assert rows["theirs"][1] == "not installed (No module named 'theirs')"
    assert re.fullmatch(r"[\d.]+ M", rows["ours"][1]) and all(cell.endswith(" ms")
                                                              for cell in rows["ours"][2:])


# -- all of them

@pytest.mark.parametrize("module", [classifier, quality])
def test_a_missing_gpu_is_one_line(refused, tmp_path, module):
    assert "no CUDA GPU here" in refused(module.main, "--device", "cuda", "--out", tmp_path / "out")


@pytest.mark.parametrize("module", [baselines, classifier, losses, main_job, object_judge, peers,
                                    quality, speed])
@pytest.mark.parametrize("out, words", [
    ("text.txt/new", "text.txt/new cannot be written"), ("", "is empty")])
def test_a_place_that_cannot_be_written_is_noticed_first(refused, tmp_path, module, out, words):
    """Trap: a classifier is trained for hours, and lost."""
    (tmp_path / "text.txt").touch()
    assert words in refused(module.main, "--out", out)


@pytest.mark.parametrize("module", [baselines, feedback, foreign])
def test_no_experiment_has_an_option_without_effect(refused, module):
    """These decide themselves which stages they use."""
    assert "--no-superres" in refused(module.main, "--no-superres")


@pytest.mark.parametrize("options, words", [
    (["--batch", 4], "at least 16"), (["--steps", 0], "at least 1"), (["--every", 0], "at least 1"),
    (["--lr", "x"], "not a number")])
def test_settings_of_the_judge_are_checked(refused, options, words):
    assert words in refused(object_judge.main, *options)


@pytest.mark.parametrize("name", sorted(
    path.stem for path in Path(common.__file__).parent.glob("*.py") if path.stem != "__init__"))
def test_experiments_are_modules_that_change_no_search_path(name):
    text = (Path(common.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    assert "sys.path" not in text and "noqa" not in text
