"""train.py: from one picture to a run folder, and refusals that leave nothing behind."""

import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import contents
from PIL import Image

import data
import sample
import styledrop
import train
from checkpoint.adapters import load_adapter
from checkpoint.files import LEAST_FREE, partial_prefix
from styledrop import CONTENT, RARE_TOKEN, ROUND_1, StyleDrop, to_uint8

ROOT = Path(train.__file__).parent
RUN = ["adapter.pt", "config.json", "log.jsonl", "samples.png"]


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Fewer decoding steps and tuning steps of the second stage, to save time.

    The warning about blank previews is switched off: an untrained base often samples them.
    """
    monkeypatch.setattr(StyleDrop, "generate", partialmethod(StyleDrop.generate, steps=1))
    monkeypatch.setattr(styledrop, "SUPERRES", replace(styledrop.SUPERRES, steps=1, batch=2))
    monkeypatch.setattr(train, "is_one_colour", lambda image: False)


@pytest.fixture
def tune(cli, weights, picture):
    """tune("--out", "runs/a", ...) -> exit code, stdout, stderr: two steps on ref.png, a house."""
    reference = picture()

    def run(*options):
        usual = ["--weights", weights, "--steps", 2]
        if "--ref" not in options:
            usual += ["--ref", reference]
        if "--content" not in options:
            usual += ["--content", "a house"]
        return cli(train.main, *usual, *options)
    return run


# -- a run

def test_run_folder(tune, pipe, tmp_path):
    """One picture in, exactly four files out, under the reference's name; round 1 of Table S3."""
    code, out, err = tune("--style", "flat vector", "--seed", 5)
    assert code == 0 and err == ""
    assert names_in("runs/ref") == RUN
    assert names_in(tmp_path) == ["ref.png", "runs"] and names_in("runs") == ["ref"]
    adapter = load_adapter("runs/ref")
    assert adapter.about["base"] == pipe.base_id
    assert adapter.about["style"] == "flat vector"
    assert adapter.about["prompts"] == ["a house"]
    assert (adapter.about["steps"], adapter.about["seed"]) == (2, 5)
    for name in ("lr", "batch", "d_prj", "is_shared", "mask_power"):
        assert adapter.about[name] == getattr(styledrop.ROUND_1, name)
    assert adapter.about["kind"] == "style"
    assert "first stage: step 2/2" in out


def test_the_run_says_what_it_was_made_of(tune, weights, pipe, tmp_path):
    """config.json has no path of weights or references, which would tell of the user's machine."""
    tune("--weights", weights, "--style", "flat vector")
    config = read_json("runs/ref/config.json")
    assert config["weights"] == weights.name
    assert config["ref"] == ["ref.png"]
    for path in (weights, tmp_path):
        assert str(path) not in Path("runs/ref/config.json").read_text()
    assert (config["kind"], config["content"], config["style"]) == (
        "style", ["a house"], "flat vector")
    assert config["base"] == pipe.base_id
    assert config["precision"] == "fp32"
    lines = Path("runs/ref/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_both_stages_are_logged(tune, weights2):
    tune("--weights", weights2)
    lines = [json.loads(line) for line in Path("runs/ref/log.jsonl").read_text().splitlines()]
    steps = [(line["stage"], line["step"]) for line in lines]
    assert steps == [("first", 1), ("first", 2), ("second", 1)]
    assert all(line["loss"] > 0 for line in lines)


def test_previews_compare_the_base_with_the_adapter(tune, calls):
    """The same prompts and seeds before and after; the base's prompts have no style words."""
    sampled = calls(StyleDrop, "generate")
    tune("--style", "flat vector", "--seed", 5)
    (_, before), before_how = sampled[0]
    (_, after), after_how = sampled[1]
    assert list(before) == list(after) == list(train.PREVIEW)
    assert before_how["seed"] == after_how["seed"] == 5
    assert "style" not in before_how
    assert after_how["style"].about == load_adapter("runs/ref").about


@pytest.mark.parametrize("kind, total", [("style", 5), ("content", 7)])
def test_the_steps_of_previews_are_those_of_both_settings(tune, calls, monkeypatch, kind, total):
    """Trap: twice the steps of a sample in a style, where the base or an object has another number.
    """
    for name, steps in (("BASE_SAMPLING", 3), ("SAMPLING", 2), ("CONTENT_SAMPLING", 4)):
        monkeypatch.setattr(styledrop, name, replace(getattr(styledrop, name), steps=steps))
    said = calls(train.Progress, "__call__")
    assert tune("--kind", kind)[0] == 0
    assert {of for (progress, _, of, *_), _ in said if "previews" in progress.name} == {total}


def test_an_object_is_tuned_with_settings_of_its_own(tune, calls, monkeypatch):
    """All of them, unless an option overrides them. Trap: the settings of a style."""
    monkeypatch.setattr(train, "CONTENT", replace(CONTENT, mask_power=1, views=1))
    fitted = calls(StyleDrop, "fit")
    for kind, expected in (("style", ROUND_1), ("content", train.CONTENT)):
        assert tune("--kind", kind, "--out", f"runs/{kind}")[0] == 0
        assert fitted[-1][0][4] == replace(expected, steps=2)


def test_memory_that_is_not_known_is_not_said(tune, monkeypatch):
    """As on Windows. Trap: "peak memory nan MB"."""
    assert re.search(r"  \(\d+ s, peak memory \d+ MB\)\n", tune()[1])
    monkeypatch.setattr(train, "peak_memory", lambda: math.nan)
    assert re.search(r"  \(\d+ s\)\n", tune()[1])


@pytest.mark.parametrize("umask, of_folders, of_files", [(0o022, 0o755, 0o644),
                                                         (0o077, 0o700, 0o600)])
def test_a_run_respects_the_umask(tune, umask, of_folders, of_files):
    """Trap: the folder keeps the mode of the temporary one in which it was made."""
    before = os.umask(umask)
    try:
        assert tune("--out", "runs/a")[0] == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path("runs/a").stat().st_mode) == of_folders
    for name in RUN:
        assert stat.S_IMODE(Path("runs/a", name).stat().st_mode) == of_files


OPTIONS = [
    ["--ref", "b.png"], ["--content", "a tree"], ["--style", "blurry"], ["--kind", "content"],
    ["--d-prj", 5], ["--steps", 3], ["--batch", 4], ["--lr", 0.01], ["--no-superres"],
    ["--seed", 1]]
OTHER_OPTIONS = ["--help", "--weights", "--out", "--device", "--rounds", "--feedback", "--pick",
                 "--port", "--pool", "--pool-prompts"]


def test_every_option_has_an_effect(tune, weights2, picture, monkeypatch):
    """Trap: an option that has no effect."""
    options = [action.option_strings[-1] for action in train.options()._actions]
    assert sorted(options) == sorted([option for option, *_ in OPTIONS] + OTHER_OPTIONS)
    monkeypatch.setattr(train, "PREVIEW", ["a cat"])
    monkeypatch.setattr(train, "CONTENT_PREVIEW", [])
    picture("b.png", 3)
    adapters = set()
    for i, option in enumerate([[], *OPTIONS]):
        code, _, err = tune("--weights", weights2, "--out", f"runs/{i}", *option)
        assert code == 0, err
        adapters.add(Path(f"runs/{i}/adapter.pt").read_bytes())
    assert len(adapters) == 1 + len(OPTIONS)


def test_the_same_command_writes_the_same_bytes(tune, weights2):
    """Trap: a date, a path, or PyTorch's global generator in what is written."""
    tune("--weights", weights2, "--out", "runs/a")
    torch.seed()
    tune("--weights", weights2, "--out", "runs/b")
    assert contents(Path("runs/a")) == contents(Path("runs/b"))


def test_every_reference_is_learned(cli, picture, weights, calls):
    """With one --ref or several, each with its content. Trap: the last --ref alone counts."""
    tuned = calls(StyleDrop, "tune")
    references = [picture(f"{i}.png", i) for i in range(3)]
    code, _, err = cli(train.main, "--ref", *references[:2], "--ref", references[2], "--content",
                       "a cat", "a tree", "a house", "--weights", weights, "--steps", 1)
    assert code == 0, err
    (_, images, prompts, *_), _ = tuned[0]
    for image, reference in zip(to_uint8(images), references, strict=True):
        assert np.array_equal(image, data.read_image(reference, 16))
    assert prompts == ["a cat", "a tree", "a house"]


# -- the words of a prompt

def test_without_words_only_the_style_is_named(cli, picture, weights):
    code, out, err = cli(train.main, "--ref", picture(), "--weights", weights, "--steps", 1)
    assert code == 0
    about = load_adapter("runs/ref").about
    assert (about["prompts"], about["style"]) == ([""], RARE_TOKEN)
    assert err == ""


def test_a_style_of_which_no_word_is_known_is_a_rare_token(tune):
    """Trap: the prompt has bytes that mean nothing to the base, and the style is not learned."""
    code, _, err = tune("--style", "sws", "--content", "a house")
    assert code == 0
    assert f"does not know the words 'sws', so the style is called {RARE_TOKEN}" in err
    assert load_adapter("runs/ref").about["style"] == RARE_TOKEN
    assert read_json("runs/ref/config.json")["style"] == RARE_TOKEN


def test_a_style_of_which_some_words_are_known_is_kept(tune):
    code, _, err = tune("--style", "sws painting")
    assert code == 0
    assert "the base does not know 'sws'" in err
    assert load_adapter("runs/ref").about["style"] == "sws painting"


@pytest.mark.parametrize("style", ["", "[V*]"])
def test_a_style_without_a_name(tune, style):
    code, _, err = tune("--style", style)
    assert (code, err) == (0, "")
    assert load_adapter("runs/ref").about["style"] == style


def test_an_object(tune, weights, picture):
    """One name for all of its pictures, and no style. Trap: a folder with a space or a quote."""
    references = [picture(f"{i}.png", i) for i in range(3)]
    code, out, _ = tune("--ref", *references, "--kind", "content", "--content", "it's [V]",
                        "--out", "runs/my house")
    assert code == 0
    about = load_adapter("runs/my house").about
    assert (about["style"], about["prompts"]) == ("", ["it's [V]"] * 3)
    assert about["kind"] == "content"
    last = out.splitlines()[-1]
    assert shlex.split(last) == [
        "next:", "python", "sample.py", "--prompt", "it's [V]", "--content", "runs/my house",
        "--weights", str(weights)]


@pytest.mark.parametrize("options, style, content, prompt", [
    (["--content=a house", "--out", "none"], "./none", None, "a cat"),
    (["--content=a house", "--out=-x"], "-x", None, "a cat"),
    (["--kind", "content", "--content=-dash", "--out=--x"], None, "--x", "-dash")])
def test_the_command_to_try_next_works(cli, weights, picture, options, style, content, prompt):
    """Traps: names that are read as options; --style none, which is the base."""
    code, out, _ = cli(train.main, "--ref", picture(), "--weights", weights, "--steps", 1, *options)
    assert code == 0
    command = shlex.split(out.splitlines()[-1])[3:]
    args = sample.options().parse_args(command)
    assert (args.style, args.content, args.prompt) == (style, content, [prompt])


def test_the_command_to_try_next_where_train_is_a_link(tune):
    """Trap: sample.py in the folder of the link, where there is none."""
    Path("train.py").symlink_to(ROOT / "train.py")
    _, out, _ = tune()
    assert shlex.split(out.splitlines()[-1])[2] == str(ROOT / "sample.py")


def test_previews_of_an_object_say_all_of_their_prompts(tune, monkeypatch):
    """Trap: labels are cut at the width of a picture."""
    drawn = []
    real = train.grid

    def grid(images, columns, scale, gap, top, left):
        drawn.append((top, real(images, columns, scale, gap, top, left)))
        return drawn[-1][1]

    monkeypatch.setattr(train, "grid", grid)
    tune("--kind", "content", "--content", "a [V] house")
    labels, sheet = drawn[0]
    assert "a [V] house in flat vector on navy style" in labels
    column = 128 + 8
    above = np.asarray(sheet)[:, 100:].min(2) < 128          # to the right of the words "before"
    text = above[:sheet.height - 2 * column]
    assert text.any(1).nonzero()[0].max() > 2 + 12           # there is a second line


# -- a run is never replaced

def test_the_same_command_is_finished(tune):
    tune("--style", "flat vector")
    Path("runs/ref/notes.txt").write_text("mine")
    before = contents(Path("runs/ref"))
    code, out, err = tune("--style", "flat vector")
    assert (code, err) == (0, "")
    assert "runs/ref is already finished" in out
    assert contents(Path("runs/ref")) == before


@pytest.mark.parametrize("options, words", [
    (["--ref", "there/ref.png"], "pictures"), (["--seed", 1, "--style", "blurry"], "style, seed"),
    (["--content", "a tree"], "content"), (["--steps", 3, "--lr", 1, "--batch", 2], "steps, lr, b"),
    (["--kind", "content"], "kind, style"), (["--d-prj", 5], "d-prj")])
def test_another_command_is_refused(tune, picture, options, words):
    """Also a picture of the same name. Trap: a run of hours is replaced in silence."""
    tune("--style", "flat vector")
    Path("there").mkdir()
    picture("there/ref.png", 3)
    before = contents(Path("runs/ref"))
    usual = [] if "--style" in options else ["--style", "flat vector"]
    code, _, err = tune(*usual, *options)
    assert code == 2 and err.count("\n") == 1
    assert f"different settings ({words}" in err and "move runs/ref away" in err
    assert contents(Path("runs/ref")) == before


@pytest.mark.parametrize("name", ["adapter.pt", "config.json"])
def test_the_advice_about_a_damaged_run_works(tune, name):
    """Trap: a message that names another file, and the next command fails as the first one did."""
    tune()
    Path("runs/ref", name).write_bytes(b"")
    code, _, err = tune()
    assert code == 2 and err.count("\n") == 1
    assert f"runs/ref/{name} is damaged" in err
    assert "move runs/ref away" in err and "give another --out" in err
    assert tune("--out", "runs/other")[0] == 0
    Path("runs/ref").rename("mine")
    assert tune()[0] == 0
    assert names_in("runs/ref") == RUN


def test_control_characters_of_a_config_do_not_reach_the_terminal(tune):
    tune()
    config = read_json("runs/ref/config.json")
    for name in config:
        config[name] = "\x1b[2J\u202e"
    config["\x1b[31m"] = "red"
    Path("runs/ref/config.json").write_text(json.dumps(config))
    code, out, err = tune()
    assert code == 2
    assert (out + err).replace("\n", "").isprintable()


@pytest.mark.parametrize("out", ["runs/a", "link"])
def test_an_empty_folder_will_do(tune, out):
    """Also behind a link. Trap: a link cannot be replaced by a folder, and the adapter is lost."""
    Path("runs/a").mkdir(parents=True)
    Path("link").symlink_to("runs/a")
    assert tune("--out", out)[0] == 0
    assert names_in("runs/a") == RUN
    assert Path("link").is_symlink()


def test_a_mount_point_is_refused_before_tuning(refused, picture, monkeypatch):
    """Trap: it cannot be replaced by the finished folder, and the adapter is lost."""
    Path("mount").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mount")
    monkeypatch.setattr(StyleDrop, "load", lambda *_: pytest.fail("too late"))
    line = refused(train.main, "--ref", picture(), "--out", "mount")
    assert "mount is a mount point; give --out a folder inside it" in line


def test_a_way_through_a_folder_that_does_not_exist(cli, weights, picture):
    """Trap: "a/../b" is tuned in full, and then "no such file or directory"."""
    code, _, err = cli(train.main, "--ref", picture(), "--out", "a/../b", "--steps", 1,
                       "--weights", weights)
    assert code == 0, err
    assert Path("b/adapter.pt").exists() and not Path("a").exists()


def test_the_current_folder_is_refused_before_tuning(refused, picture, monkeypatch):
    """Trap: the finished folder replaces it, and the shell stands in one that was deleted."""
    Path("empty").mkdir()
    path = picture()
    monkeypatch.chdir("empty")
    monkeypatch.setattr(StyleDrop, "load", lambda *_: pytest.fail("too late"))
    line = refused(train.main, "--ref", path, "--out", ".")
    assert "is the current folder; give --out a folder inside it" in line


@pytest.mark.parametrize("reference, folder", [
    ("house.png", "runs/house"), ("some where/my house.jpeg", "runs/my house"),
    ("...png", "runs/style"), (".png", "runs/png"), ("-x.png", "runs/-x"), ("a.b.png", "runs/a.b")])
def test_the_run_folder_is_named_after_the_reference(reference, folder):
    """Trap: "...png" becomes runs/.., which is the folder of the command."""
    assert train.default_out(reference) == folder


def test_a_reference_that_begins_with_a_dash(tune, picture):
    """The message is true, and its advice works."""
    picture("-x.png")
    code, _, err = tune("--ref", "-x.png")
    assert code == 2 and "-x.png is not an option; if it is a value, write --ref=-x.png" in err
    assert tune("--ref=-x.png", "--content", "a house", "a tree", "--out", "runs/x")[0] == 0


def test_from_another_folder(cli, monkeypatch):
    """The shipped base and the examples are found next to the script."""
    loaded, read = [], []

    def load(weights, device):
        loaded.append(Path(weights))
        return SimpleNamespace(resolution=16)

    def read_reference(path, size):
        read.append(Path(path))
        raise ValueError("seen")

    monkeypatch.setattr(StyleDrop, "load", load)
    monkeypatch.setattr(data, "read_reference", read_reference)
    assert cli(train.main, "--ref", "examples/house_watercolor.png")[2].endswith("seen\n")
    assert loaded == [ROOT / "weights/tiny"]
    assert read == [ROOT / "examples/house_watercolor.png"]


# -- refusals

REFUSALS = [                            # options, and words of the one line
    ([], "--ref"), (["--ref", "good.png", "--setps", 3], "--setps"),
    (["--ref", "good.png", "nothing.png"], "nothing.png"), (["--ref", "white.png"], "one colour"),
    (["--ref", ""], "is empty"), (["--ref", "\udcff"], "not valid UTF-8"),
    (["--ref", "good.png", "--content", "\udcff"], "not valid UTF-8"),
    (["--ref", "good.png", "--style", "\udcff"], "not valid UTF-8"),
    (["--ref", "good.png", "--out", "\udcff"], "not valid UTF-8"),
    (["--ref", "good.png", "--content", "a", "cat"], "1 --ref and 2 --content.*quotes"),
    (["--ref", "good.png", "--content", "a", "--content", "b", "--content", "c"],
     "1 --ref and 3 --content"),
    (["--ref", "good.png", "--style", "x" * 100_000], "100,000 characters"),
    (["--ref", "good.png", "--out", "folder"], "folder already exists, but is not a run folder"),
    (["--ref", "good.png", "--out", "text.txt"], "text.txt is a file, not a folder"),
    (["--ref", "good.png", "--out", "text.txt/a"], "text.txt"),
    (["--ref", "good.png", "--out", f"new/{'a' * 300}"], "too long"),
    (["--ref", "good.png", "--out", "link"], "broken link"),
    (["--ref", "good.png", "--weights", "none"], "no vqgan file at none"),
    (["--ref", "good.png", "--no-superres"], "no second stage"),
    (["--ref", "good.png", "--style", ""], '--style "" needs --content; leave --style out'),
    (["--ref", "good.png", "--style", " "], "leave --style out"),
    (["--ref", "good.png", "--kind", "content"], "--content"),
    (["--ref", "good.png", "--kind", "content", "--content", "a", "--rounds", 2], "--rounds"),
    (["--ref", "good.png", "--rounds", 2, "--pick", 3], "--feedback human"),
    (["--ref", "good.png", "--pick", 3, "--feedback", "human"], "--rounds 2"),
    (["--ref", "good.png", "--rounds", 2, "--pool-prompts", "text.txt"], "write one per line"),
    (["--ref", "good.png", "--rounds", 2, "--pool-prompts", "long.txt"], "100,000 characters"),
    (["--ref", "good.png", "--rounds", 2, "--weights", "no_clip"], "clip.pt"),
    (["--ref", "good.png", "--rounds", 2, "--weights", "no_words"], "clip.pt has no vocabulary"),
    (["--ref", "good.png", "--seed=--"], "--seed")]


@pytest.mark.parametrize("options, words", REFUSALS, ids=[words for _, words in REFUSALS])
def test_refusals(refused, weights, picture, tmp_path, options, words):
    """One line that names the mistake, exit code 2, and no file made or changed."""
    picture("good.png")
    Image.new("RGB", (90, 90), "white").save(tmp_path / "white.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").touch()
    (tmp_path / "text.txt").write_text(" \n")
    (tmp_path / "long.txt").write_text("x" * 100_000)
    (tmp_path / "link").symlink_to("missing")
    shutil.copytree(weights, tmp_path / "no_clip")
    (tmp_path / "no_clip" / "clip.pt").unlink()
    shutil.copytree(weights, tmp_path / "no_words")
    clip = torch.load(weights / "clip.pt", weights_only=True)
    torch.save(clip | {"merges": None}, tmp_path / "no_words" / "clip.pt")
    line = refused(train.main, "--weights", weights, *options)
    assert re.search(words, line), line


def test_a_missing_gpu_is_one_line(refused, picture, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU here" in refused(train.main, "--ref", picture(), "--device", "cuda")


def test_a_full_disk_is_noticed_before_training(refused, picture, monkeypatch):
    usage = SimpleNamespace(free=LEAST_FREE - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(StyleDrop, "load", lambda *_: pytest.fail("too late"))
    line = refused(train.main, "--ref", picture(), "--out", "runs/new")
    assert "runs/new cannot be written: no space left on device; give another --out" in line


def full_disk(path, *_, **__):
    raise OSError(28, "No space left on device", str(path))


def test_a_disk_that_fills_up_does_not_cost_the_adapter(tune, monkeypatch):
    """Trap: with the sheet of previews, everything is lost."""
    monkeypatch.setattr(train, "write_png", full_disk)
    code, _, err = tune()
    assert code == 0
    assert "runs/ref/samples.png could not be written: no space left on device" in err
    assert names_in("runs/ref") == [name for name in RUN if name != "samples.png"]


def test_a_full_disk_names_the_run(tune, monkeypatch):
    """Trap: the name of a temporary file."""
    monkeypatch.setattr(train, "write_log", full_disk)
    code, _, err = tune()
    assert code == 2 and err.endswith("error: runs/ref: no space left on device\n")


@pytest.mark.parametrize("parameter", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_at_once(refused, weights, picture, monkeypatch, parameter):
    """One line, and nothing half written. Trap: all steps of NaN, then a traceback."""
    real = StyleDrop.new_adapter

    def poisoned(self, *arguments):
        theta = real(self, *arguments)
        for generator in theta.generators.values():
            torch.nn.init.constant_(generator.up, parameter)
        return theta

    monkeypatch.setattr(StyleDrop, "new_adapter", poisoned)
    line = refused(train.main, "--ref", picture(), "--content", "a house", "--style", "blurry",
                   "--weights", weights, "--steps", 50, "--out", "a")
    assert "NaN or infinite at step 1; give a lower" in line


def test_an_adapter_that_the_last_step_spoils_is_not_written(refused, weights, picture,
                                                             monkeypatch):
    """The loss of that step was still finite. Trap: a run folder of NaN, which samples noise."""
    real = torch.optim.Adam.step

    def spoiled(optimiser, *arguments):
        real(optimiser, *arguments)
        torch.nn.init.constant_(optimiser.param_groups[0]["params"][0], math.nan)

    monkeypatch.setattr(torch.optim.Adam, "step", spoiled)
    line = refused(train.main, "--ref", picture(), "--content", "a house", "--style", "blurry",
                   "--weights", weights, "--steps", 1, "--out", "a")
    assert "the adapter is NaN or infinite; give a lower learning rate" in line


# -- progress

def test_a_line_at_least_about_every_five_seconds(tune, weights2, slow_passes):
    """From the first step of tuning to the last preview, if a pass of G takes a second."""
    clock, said = slow_passes()
    began = clock.now
    assert tune("--weights", weights2, "--steps", 30)[0] == 0
    times = [began, *said, clock.now]
    assert times[-1] - times[0] > 60
    assert max(np.diff(times)) <= 8                          # a step of decoding has three passes


@pytest.mark.parametrize("kind, option", [
    ("style", "--lambda-a 0.4"),
    ("content", "--lambda-a 2.5")])
def test_blank_previews_are_reported(tune, monkeypatch, kind, option):
    """With the option that matters for this kind of adapter."""
    monkeypatch.setattr(train, "is_one_colour", lambda image: True)
    code, _, err = tune("--kind", kind)
    assert code == 0
    assert "note: 6 of 6 previews are blank" in err and err.endswith(f"sample.py {option}\n")


# -- signals and terminals

@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(tune, monkeypatch, tmp_path, number, code):
    """Trap: half a run folder, which sample.py would take for the newest run."""
    def interrupted(*_, **__):
        os.kill(os.getpid(), number)
        time.sleep(9)

    monkeypatch.setattr(StyleDrop, "generate", interrupted)
    assert tune("--out", "a")[0] == code
    assert names_in(tmp_path) == ["ref.png"]


def in_a_shell(folder, script, *arguments, python=()):
    """A command as a user gives it, in a terminal that has ASCII alone."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONIOENCODING="ascii")
    command = [sys.executable, *python, str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def test_from_the_shell(weights, tmp_path):
    command = in_a_shell(tmp_path, "sample.py", "--weights", weights, "--steps", 2, "--prompt",
                         "a cat", "--out", "caf\u00e9.png")
    out, err = command.communicate()
    assert (command.returncode, err) == (0, "")
    assert out.endswith("caf\\xe9.png: seed 0\n")
    assert names_in(tmp_path) == ["caf\u00e9.png"]


def test_what_a_kill_leaves_is_removed_by_the_next_run(tune, weights):
    """And only that, if its process is dead."""
    command = in_a_shell(".", "train.py", "--ref", "ref.png", "--content", "a house", "--weights",
                         weights, "--steps", 10**6)
    until = time.time() + 60
    while not list(Path("runs").glob(".partial-*")) and time.time() < until:
        time.sleep(0.05)
    command.kill()
    command.communicate()
    left, = Path("runs").iterdir()
    assert left.name.startswith(f".partial-{platform.node()}-{command.pid}-")
    alive = Path("runs", partial_prefix() + "x")
    alive.mkdir()
    assert tune()[0] == 0
    assert sorted(Path("runs").iterdir()) == [alive, Path("runs/ref")]


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_ctrl_c_while_importing(tmp_path, script):
    """Trap: a traceback of torch's, pages long."""
    command = in_a_shell(tmp_path, script, "--prompt", "cat", python=["-X", "importtime"])
    next(line for line in command.stderr if "numpy" in line)
    command.send_signal(signal.SIGINT)
    _, err = command.communicate()
    assert "Traceback" not in err
    assert command.returncode in (130, -signal.SIGINT)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_leaves_does_not_end_the_run(tune, monkeypatch, stream):
    """As in `| head -1`. Trap: a broken pipe ends the work."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as out:
        monkeypatch.setattr(sys, stream, out)
        code, _, _ = tune("--style", "zzq")
    assert code == 0
    assert names_in("runs/ref") == RUN


def test_another_command_was_faster(tune, monkeypatch):
    """Trap: two commands with one --out, and the second replaces what the first has made."""
    real = StyleDrop.tune

    def slow_tune(*arguments, **named):
        Path("runs/ref").mkdir()
        Path("runs/ref/adapter.pt").write_bytes(b"theirs")
        return real(*arguments, **named)

    monkeypatch.setattr(StyleDrop, "tune", slow_tune)
    code, _, err = tune()
    assert code == 2 and "another command has just made runs/ref; give another --out" in err
    assert contents(Path("runs")) == {"ref": None, "ref/adapter.pt": b"theirs"}


def test_another_reason_is_not_called_another_command(tune, monkeypatch):
    """Trap: the message blames a command that never ran."""
    real = os.replace

    def busy(source, target):
        if Path(source).is_dir():
            raise OSError(16, "Device or resource busy", str(source), None, str(target))
        real(source, target)

    Path("runs/ref").mkdir(parents=True)
    monkeypatch.setattr(os, "replace", busy)
    code, _, err = tune()
    assert code == 2 and "busy" in err and "another command" not in err
