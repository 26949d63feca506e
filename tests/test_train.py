"""train.py: from one picture to a run folder, and refusals that leave nothing behind."""

import importlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import commandline
import data
import sample
import styledrop
import train
from commandline import guess
from styledrop import StyleDrop, load_adapter, partial_prefix, style_prompt, to_uint8

ROOT = Path(train.__file__).parent
RUN = ["adapter.pt", "config.json", "log.jsonl", "samples.png"]
content = lambda folder: {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """18 decoding steps teach a test nothing."""
    monkeypatch.setattr(StyleDrop, "generate", partialmethod(StyleDrop.generate, steps=1))


@pytest.fixture
def tune(cli, weights, picture):
    """tune("--out", "runs/a", ...) -> exit code, stdout, stderr; two steps of ref.png, a house."""
    ref = picture()
    usual = {"--ref": ref, "--content": "a house"}
    return lambda *options: cli(
        train.main, *(word for pair in usual.items() if pair[0] not in options for word in pair),
        "--weights", weights, "--steps", 2, *options)


# -- style tuning

def test_run_folder(tune, pipe, tmp_path, calls):
    """One picture in, exactly four files out, under the reference's name; round 1 of Table S3.
    Trap: a before without the style's words, which makes any after look learned.
    """
    drawn = calls(StyleDrop, "generate")
    code, out, err = tune("--style", "flat vector", "--seed", 5)
    assert code == 0 and err == "" and sorted(content("runs/ref")) == RUN
    assert len(list(tmp_path.rglob("*"))) == 7
    adapter = load_adapter("runs/ref")
    assert dict(base=pipe.base, style="flat vector").items() <= adapter.about.items()
    assert dict(d_prj=4, is_shared=True).items() <= adapter.config.items()
    count, base = (sum(p.numel() for p in x.parameters()) for x in (adapter, pipe.muse))
    assert f"adapter: {count:,} parameters, {100 * count / base:.2f} %" in out
    ((_, before), untuned), ((_, after), tuned) = drawn
    assert before == [style_prompt(p, "flat vector") for p in after]
    assert tuned.pop("style").about == adapter.about and untuned == tuned and tuned["seed"] == 5


ACTS = {"--ref": ["b.png"], "--content": ["a tree"], "--style": ["blurry"], "--kind": ["content"],
        "--method": ["lora"], "--d-prj": [5], "--steps": [3], "--batch": [4], "--lr": [0.01],
        "--no-superres": [], "--seed": [1]}
ELSEWHERE = "help weights out device stage rounds feedback pick port pool pool-prompts".split()


def test_every_option_acts(tune, weights2, picture, monkeypatch):
    """Traps: an option that nobody reads; a date, a path or global chance in what is written."""
    assert {a.option_strings[-1] for a in train.options()._actions} == {
        *ACTS, *(f"--{name}" for name in ELSEWHERE)}
    for name, value in dict(steps=1, batch=2).items():
        monkeypatch.setattr(styledrop.SECOND_TUNING, name, value)
    monkeypatch.setattr(train, "PREVIEW", ["a cat"])
    picture("b.png", 3)
    seen = []
    for option, values in [("", []), ("", []), *ACTS.items()]:
        out = f"runs/{len(seen)}"
        assert tune("--weights", weights2, "--out", out, *filter(None, [option]), *values)[0] == 0
        seen.append(content(out))
    assert seen[0] == seen[1] and len({each["adapter.pt"] for each in seen}) == 1 + len(ACTS)
    lines = [json.loads(line) for line in seen[0]["log.jsonl"].splitlines()]
    assert [(line["stage"], line["step"], line["loss"] > 0) for line in lines] == [
        ("base", 1, True), ("base", 2, True), ("superres", 1, True)]


def test_a_run_is_never_replaced(tune, picture):
    """Another picture of the same name, other settings: refused; the same: said. All stays."""
    tune = partial(tune, "--style", "flat vector")
    tune()
    Path("runs/ref/notes.txt").write_text("mine")
    before = content("runs/ref")
    Path("there").mkdir()
    picture("there/ref.png", 3)
    code, out, err = tune()
    assert code == 0 and err == "" and "is finished" in out
    for options, words in (
            ("--ref there/ref.png", "pictures"),
            ("--seed 1 --content tree --style blurry", "seed, content, style"),
            ("--method lora --steps 3 --lr 1 --batch 2", "method, steps, lr, batch")):
        code, _, err = tune(*options.split())
        assert code == 2 and f"another {words};" in err and err.count("\n") == 1
    assert content("runs/ref") == before
    Path("runs/ref/adapter.pt").write_bytes(b"")
    code, _, err = tune()
    assert code == 2 and "move runs/ref away" in err


def test_content_and_style_are_guessed(cli, picture, pipe, weights, monkeypatch, calls):
    """Without --content: the phrase nearest to each picture; without --style: G's words for them.
    Both are said aloud and used. All pictures reach the tuning, each with its phrase. Traps: the
    last --ref alone counts; the best picture for a phrase instead of the best phrase for a picture.
    """
    monkeypatch.setattr(data, "names", lambda: ["cat", "house", "owl", "tree"])
    monkeypatch.setattr(guess, "guess_style", lambda pipe, images, contents: "blurry")
    seen, phrases = calls(StyleDrop, "tune"), ["a cat", "a house", "a tree", "an owl"]
    refs = [picture(f"{i}.png", i) for i in range(6)]
    out = cli(train.main, "--ref", *refs[:4], "--ref", *refs[4:], "--weights", weights,
              "--steps", 1)[1]
    ((_, images, guesses, style, *_), _), = seen
    assert np.array_equal(to_uint8(images), [data.read_image(ref, 16) for ref in refs])
    texts = pipe.clip.encode_text(pipe.clip.tokenizer(phrases, pipe.clip.config.context_length))
    for image, guessed in zip(images, guesses, strict=True):
        scores = torch.cosine_similarity(pipe.clip.encode_image(image[None]), texts)
        assert guessed == phrases[scores.argmax()]
    assert style == "blurry" and f"style: {style}, in" in out
    assert f"content: {', '.join(guesses)}, CLIP" in out


def test_a_run_goes_on_with_the_words_it_guessed(tune, monkeypatch):
    """Trap: on another machine, or with another CLIP, the same command would be another one."""
    monkeypatch.setattr(guess, "guess_style", lambda pipe, images, contents: "blurry")
    assert tune()[0] == 0
    monkeypatch.setattr(guess, "guess_style", lambda pipe, images, contents: "painting")
    code, out, _ = tune()
    assert code == 0 and "is finished" in out and "style: blurry" in out
    assert tune("--style", "painting")[0] == 2


def test_an_objects_pictures(tune, weights, picture):
    """And what to do next. Trap: a folder with a space or a quote, a name with brackets."""
    refs = [picture(f"{i}.png", i) for i in range(3)]
    out = tune("--ref", *refs, "--kind", "content", "--content", "it's [V]", "--out",
               "runs/my house")[1]
    about = load_adapter("runs/my house").about
    assert about["style"] == "" and about["prompts"] == ["it's [V]"] * 3
    assert shlex.split(out.splitlines()[-1]) == [
        "next:", "python", "sample.py", "--prompt", "it's [V]", "--content", "runs/my house",
        "--weights", str(weights)]


def test_from_another_folder(cli, monkeypatch):
    """The shipped base and the examples lie beside the script, wherever the command is given."""
    seen, base = [], SimpleNamespace(resolution=16)
    monkeypatch.setattr(StyleDrop, "load", lambda weights, device: seen.append(weights) or base)
    monkeypatch.setattr(data, "read_reference", lambda path, size: seen.append(path) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli(train.main, "--ref", "examples/house_watercolor.png")
    assert [*map(Path, seen)] == [ROOT / "weights/tiny", ROOT / "examples/house_watercolor.png"]


# -- refusals

BAD = {                                 # the options (&: --ref good.png): a word of the line
    "": "--ref", "& --setps 3": "--setps", "& nothing.png": "nothing.png",
    "--ref white.png": "one colour", "--ref EMPTY": "is empty", "--ref \udcff": "not UTF-8",
    "& --content \udcff": "not UTF-8", "& --style \udcff": "not UTF-8", "& --out \udcff": "UTF-8",
    "& --content a cat": "not 2", "& --content a --content cat --content c": "not 3",
    "& --out folder": "not a run folder", "& --weights none": "none",
    "& --out text.txt/a": "text.txt", f"& --out new/{'a' * 300}": "too long",
    "& --no-superres": "no second stage", "& --kind content": "--content", "& --pool 8": "--rounds",
    "& --rounds 2 --pick 3": "--feedback human", "& --rounds 2 --port 80": "--feedback human",
    "& --rounds 2 --feedback human --pick 1 --port 80": "--port", "& --stage muse": "--ref",
    "& --rounds 2 --method lora": "--method", "& --rounds 2 --pool-prompts text.txt": "one a line",
    "& --kind content --content a --style b": "--style", "--stage clip --content c": "--content",
    "& --kind content --content a --rounds 2": "--rounds", "& --method full --d-prj 4": "--d-prj",
    "& --kind content --content a --method textual-inversion": "--kind",
    "& --method textual-inversion --style=": "--style", "& --seed=--": "--seed",
    "& --out nowhere": "link to nowhere", "& --weights no_clip": "--content"}


@pytest.mark.parametrize("case", BAD)
def test_refusals(refused, weights, picture, tmp_path, case):
    """One line that names the trouble, exit code 2, no file made or touched."""
    picture("good.png")
    Image.new("RGB", (90, 90), "white").save(tmp_path / "white.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text(" \n")
    (tmp_path / "nowhere").symlink_to("missing")
    shutil.copytree(weights, tmp_path / "no_clip", ignore=lambda *_: ["clip.pt"])
    arguments = [word.replace("EMPTY", "") for word in case.replace("&", "--ref good.png").split()]
    assert BAD[case] in refused(train.main, "--weights", weights, *arguments)


@pytest.mark.parametrize("command", [sample, train])
@pytest.mark.parametrize("value", ["nan", "-inf", "1e99", "-1", "x", "1" * 9999, ""])
def test_every_number_has_both_bounds(refused, command, value):
    for action in command.options()._actions:
        if action.type not in (None, commandline.filled, commandline.utf8):
            option = action.option_strings[0]
            assert option in refused(command.main, f"{option}={value}")


@pytest.mark.parametrize("parameter", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_at_once(refused, weights, picture, monkeypatch, parameter):
    """One line, nothing half written. Trap: all steps of NaN, then a traceback."""
    def poisoned(self, *a, real=StyleDrop.new_adapter):
        adapter = real(self, *a)
        torch.nn.init.constant_(next(adapter.parameters()), parameter)
        return adapter
    monkeypatch.setattr(StyleDrop, "new_adapter", poisoned)
    line = refused(train.main, "--ref", picture(), "--content", "a house", "--style", "blurry",
                   "--weights", weights, "--steps", 50, "--out", "a")
    assert "step 1;" in line and "give a lower --lr" in line


# -- signals and terminals

@pytest.mark.parametrize("end, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_end_while_tuning_leaves_nothing(tune, monkeypatch, tmp_path, end, code):
    """Trap: half a run folder, which sample.py would take for the newest run."""
    monkeypatch.setattr(StyleDrop, "generate", lambda *a, **k: (os.kill(os.getpid(), end),
                                                                time.sleep(9)))
    assert tune("--out", "a")[0] == code
    assert [path.name for path in tmp_path.iterdir()] == ["ref.png"]


def in_a_shell(folder, script, *arguments, python=()):
    """A command as a user gives it, from a terminal that has no letter but ASCII's."""
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONIOENCODING="ascii")
    return subprocess.Popen([sys.executable, *python, ROOT / script, *map(str, arguments)], env=env,
                            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_from_the_shell(weights, tmp_path):
    """Trap: all is drawn, then the line that says so cannot be written."""
    one = in_a_shell(tmp_path, "sample.py", "--weights", weights, "--steps", 2, "--prompt", "a cat",
                     "--out", "caf\u00e9.png")
    out, err = one.communicate()
    assert one.returncode == 0 and err == "" and out.endswith("caf\\xe9.png: seed 0\n")
    assert [path.name for path in tmp_path.iterdir()] == ["caf\u00e9.png"]


def test_a_kill_leaves_what_the_next_run_removes(tune, weights, tmp_path):
    """And only that of a process that is dead."""
    one = in_a_shell(tmp_path, "train.py", "--ref", "ref.png", "--content", "a house", "--weights",
                     weights, "--steps", 10**6)
    until = time.time() + 60
    while not list(Path("runs").glob(".partial-*")) and time.time() < until:
        time.sleep(0.05)
    one.kill()
    one.communicate()
    left, = Path("runs").iterdir()
    assert left.name.startswith(f".partial-{platform.node()}-{one.pid}-")
    alive = Path("runs", partial_prefix() + "x")
    alive.mkdir()
    assert tune()[0] == 0 and sorted(Path("runs").iterdir()) == [alive, Path("runs/ref")]


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_ctrl_c_while_importing(tmp_path, script):
    """Trap: a traceback of torch's, pages long."""
    one = in_a_shell(tmp_path, script, "--prompt", "cat", python=["-X", "importtime"])
    next(line for line in one.stderr if "numpy" in line)
    one.send_signal(signal.SIGINT)
    assert "Traceback" not in one.communicate()[1]
    assert one.returncode in (130, -signal.SIGINT)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_reader_is_gone(tune, monkeypatch, stream):
    """`| head -1`. Traps: a broken pipe ends the work, or the flush at exit does; a note does."""
    gone, end = os.pipe()
    os.close(gone)
    with open(end, "w") as out:
        monkeypatch.setattr(sys, stream, out)
        code, _, err = tune("--style", "zzq")
    assert (code, sorted(content("runs/ref"))) == (0, RUN)
    assert err.count("\n") == (stream == "stdout")          # the note alone


# -- pretraining is handed over

@pytest.mark.parametrize("stage", train.STAGES)
def test_a_stage_gets_all_other_options(cli, monkeypatch, stage):
    """Traps: --stage=muse tunes, or is refused; --help answers with the options of tuning."""
    out = cli(train.main, "--stage", stage, "--help")[1]
    assert f"train.py --stage {stage}" in out and "--ref" not in out.split("options:")[1]
    seen = []
    monkeypatch.setattr(importlib.import_module(f"pretrain.{stage}"), "main", seen.append)
    cli(train.main, "--stage", stage, "--steps", 3)
    cli(train.main, "--steps", 3, f"--stage={stage}")
    assert seen == [["--steps", "3"]] * 2
