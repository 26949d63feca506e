"""train.py: from one picture to a run folder, and refusals that leave nothing behind."""

import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise_images
from PIL import Image

import data
import pretrain.clip
import pretrain.muse
import pretrain.superres
import pretrain.vqgan
import train
from styledrop import StyleDrop, load_adapter, style_prompt, to_uint8

ROOT = Path(train.__file__).parent
RUN = ["adapter.pt", "config.json", "log.jsonl", "samples.png"]
content = lambda folder: {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# -- style tuning

@pytest.fixture
def tune(cli, weights, picture):
    """tune("--out", "runs/a", ...) -> exit code, stdout, stderr;
    two steps of ref.png unless told otherwise.
    """
    ref = picture()
    return lambda *options: cli(train.main, "--ref", ref, "--weights", weights, "--steps", 2, *
                                options)


def test_run_folder(tune, pipe, tmp_path):
    """One picture in, exactly four files out, under the reference's name."""
    code, out, err = tune("--content", "a house", "--style", "watercolor painting")
    assert code == 0 and err == "" and sorted(content("runs/ref")) == RUN
    assert len(list(tmp_path.rglob("*"))) == 7
    adapter = load_adapter("runs/ref")
    assert adapter.about["base"] == pipe.base and adapter.about["style"] == "watercolor painting"
    assert any(p.any() for name, p in adapter.state_dict().items() if "up" in name)
    config = json.loads(Path("runs/ref/config.json").read_text())
    assert config["content"] == ["a house"] and config["steps"] == 2 and config["lr"] == 1e-3
    assert config["seed"] == 0
    lines = [json.loads(line) for line in Path("runs/ref/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["loss"] > 0 for line in lines)
    count = sum(p.numel() for p in adapter.parameters())
    share = 100 * count / sum(p.numel() for p in pipe.muse.parameters())
    assert f"adapter: {count:,} parameters, {share:.2f} %" in out


@pytest.mark.parametrize("options, config",
                         [([], dict(d_prj=4, is_shared=True)),
                          (["--unshared", "--d-prj", 7], dict(d_prj=7, is_shared=False))])
def test_shape_of_the_adapter(tune, options, config):
    """Round 1 of Table S3 by default: H = 4, shared."""
    tune("--content", "a house", *options)
    assert config.items() <= load_adapter("runs/ref").config.items()


def test_the_same_command_gives_the_same_bytes(tune):
    """Trap: a date, a path or global chance in the adapter or in the picture."""
    tune("--out", "runs/a", "--content", "a house"), tune("--out", "runs/b", "--content", "a house")
    a, b = content("runs/a"), content("runs/b")
    assert a["adapter.pt"] == b["adapter.pt"] and a["samples.png"] == b["samples.png"]
    assert tune("--out", "runs/c", "--content", "a house", "--seed", 1)[0] == 0
    assert content("runs/c")["adapter.pt"] != b["adapter.pt"]
    assert sorted(p.name for p in Path("runs").iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize("options, words", [
    (["--seed", 1], "another seed"), (["--steps", 3], "another steps"),
    (["--content", "a tree"], "another content"), (["--ref", "there/ref.png"], "another pictures"),
    (["--style", "blurry"], "another style"), (["--method", "lora"], "another method")])
def test_a_run_is_never_replaced(tune, picture, options, words):
    """Another picture of the same name, other settings: refused, and all in the folder stays."""
    tune = partial(tune, "--style", "flat vector")
    tune("--content", "a house")
    Path("runs/ref/notes.txt").write_text("mine")
    before = content("runs/ref")
    Path("there").mkdir()
    picture("there/ref.png", 3)
    code, _, err = tune("--content", "a house", *options)
    assert code == 2 and words in err and "--out" in err and err.count("\n") == 1
    assert content("runs/ref") == before


def test_the_same_command_again_says_so(tune):
    tune = partial(tune, "--style", "flat vector")
    tune("--content", "a house")
    Path("runs/ref/notes.txt").write_text("mine")
    before = content("runs/ref")
    code, out, err = tune("--content", "a house")
    assert code == 0 and err == "" and "is finished" in out and content("runs/ref") == before


@pytest.mark.parametrize("damage", ["", "[]", "7", "{", "[" * 100_000, '{"seed": [' * 9999])
def test_a_damaged_config(tune, damage):
    tune("--content", "a house")
    Path("runs/ref/config.json").write_text(damage)
    before = content("runs/ref")
    code, _, err = tune("--content", "a house")
    assert code == 2 and "config.json is damaged" in err and err.count("\n") == 1
    assert content("runs/ref") == before


def test_several_references(tune, cli, weights, picture, monkeypatch):
    """All pictures reach the tuning, each with its phrase. Trap: nargs that keeps the last one."""
    seen, real = [], StyleDrop.tune
    monkeypatch.setattr(StyleDrop, "tune",
                        lambda self, *a, **k: seen.append(a[:2]) or real(self, *a, **k))
    refs = [picture(name, seed) for seed, name in enumerate(("a.png", "b.png"))]
    assert cli(train.main, "--ref", *refs, "--content", "a cat", "a house", "--weights", weights,
               "--steps", 1)[0] == 0
    (images, prompts), = seen
    assert prompts == ["a cat", "a house"] and Path("runs/a").is_dir()
    assert all(
        np.array_equal(to_uint8(x[None])[0], data.read_image(ref, 16))
        for x, ref in zip(images, refs))


def test_content_is_guessed_by_clip(tune, pipe):
    """Without --content: a phrase of a known name, said aloud and used.
    The style is then the rare token.
    """
    code, out, _ = tune()
    config = json.loads(Path("runs/ref/config.json").read_text())
    assert code == 0 and config["style"] == "[V*]"
    assert f"content guessed by CLIP: {config['content'][0]}" in out
    assert config["content"][0] in {data.content_phrase(name) for name in data.names()}
    assert load_adapter("runs/ref").about["prompts"] == config["content"]


def test_guess_is_the_nearest_caption(pipe, monkeypatch):
    """Trap: the best picture for a phrase instead of the best phrase for a picture."""
    monkeypatch.setattr(data, "names", lambda: ["cat", "house", "owl", "tree"])
    images = noise_images(6, seed=3)
    phrases = ["a cat", "a house", "a tree", "an owl"]
    texts = pipe.clip.encode_text(pipe.clip.tokenizer(phrases, pipe.clip.config.context_length))
    for image, guess in zip(images, train.guess_content(pipe, images)):
        scores = [
            torch.cosine_similarity(pipe.clip.encode_image(image[None])[0], text, 0).item()
            for text in texts
        ]
        assert guess == phrases[int(np.argmax(scores))]


def test_before_and_after_share_prompts_and_seeds(tune, monkeypatch):
    """Trap: a before without the style's words, which makes any after look learned."""
    calls, real = [], StyleDrop.generate
    monkeypatch.setattr(StyleDrop, "generate", lambda self, p, **k: calls.append(
        (list(p), k)) or real(self, p, **k))
    tune("--content", "a house", "--seed", 5)
    (before, base), (after, tuned) = calls
    assert before == [style_prompt(p, "[V*]") for p in after] and base == dict(seed=5)
    assert tuned["seed"] == 5 and tuned["style"].about["style"] == "[V*]"


def broken_base(weights, folder, part):
    folder.mkdir()
    for path in weights.iterdir():
        (folder / path.name).write_bytes(path.read_bytes()[:-900 if path.stem == part else None])
    return folder


GOOD = "--ref good.png"
BAD = {                                 # case: the options, a word of the line
    "missing reference": ("--ref nothing.png", "nothing.png"),
    "a folder": ("--ref folder", "folder"),
    "a text file": ("--ref text.png", "text.png"),
    "an empty file": ("--ref empty.png", "empty"),
    "a cut picture": ("--ref cut.png", "cut.png"),
    "one bad of two": ("--ref good.png nothing.png", "nothing.png"),
    "a picture of one colour": ("--ref white.png", "one colour"),
    "a panorama of sky": ("--ref pano.png", "its centre square"),
    "an SVG": ("--ref drawing.svg", "convert it to PNG"),
    "an empty name": ("--ref EMPTY", "--ref: is empty"),
    "no steps": (f"{GOOD} --steps 0", "--steps"),
    "steps in words": (f"{GOOD} --steps many", "--steps"),
    "steps for years": (f"{GOOD} --steps 1000000000", "--steps"),
    "a batch without end": (f"{GOOD} --batch 1000000000", "--batch"),
    "a pool without end": (f"{GOOD} --rounds 2 --pool 1000000000000", "--pool"),
    "rounds without end": (f"{GOOD} --rounds 1000000", "--rounds"),
    "round steps for years": (f"{GOOD} --rounds 2 --round-steps 10000000000", "--round-steps"),
    "a round's rate": (f"{GOOD} --rounds 2 --round-lr 1e9", "--round-lr"),
    "a mask power": (f"{GOOD} --mask-power 1e9", "--mask-power"),
    "lr nan": (f"{GOOD} --lr nan", "--lr"),
    "lr inf": (f"{GOOD} --lr inf", "--lr"),
    "lr zero": (f"{GOOD} --lr 0", "--lr"),
    "lr too high": (f"{GOOD} --lr 1e9", "--lr"),
    "a seed too large": (f"{GOOD} --seed 1{'0' * 30}", "--seed"),
    "an unknown option": (f"{GOOD} --setps 3", "--setps"),
    "too few contents": ("--ref good.png good.png --content cat", "2 references"),
    "too many contents": (f"{GOOD} --content a cat", "not 2"),
    "an empty content": (f"{GOOD} --content EMPTY", "empty"),
    "out is somebody's folder": (f"{GOOD} --out folder", "not a run folder"),
    "out is a file": (f"{GOOD} --out text.png", "not a run folder"),
    "out under a file": (f"{GOOD} --out text.png/run", "text.png"),
    "out cannot be made": (f"{GOOD} --out /proc/run", "no folder to write to"),
    "a name too long": (f"{GOOD} --out {'a' * 300}", "too long"),
    "out is empty": (f"{GOOD} --out EMPTY", "--out: is empty"),
    "out is not UTF-8": (f"{GOOD} --out a\udcffb", "not UTF-8"),
    "a reference is not UTF-8": ("--ref a\udcffb.png", "not UTF-8"),
    "content is not UTF-8": (f"{GOOD} --content a\udcffb", "not UTF-8"),
    "no such base": (f"{GOOD} --weights nowhere", "nowhere"),
    "a damaged base": (f"{GOOD} --weights broken", "muse.pt"),
    "an adapter as large as the base": (f"{GOOD} --d-prj 10000000000", "--d-prj"),
    "a port without a page": (f"{GOOD} --port 8000", "--rounds"),
    "a port without a person": (f"{GOOD} --rounds 2 --port 8000", "--feedback human"),
    "a port beside --pick": (f"{GOOD} --rounds 2 --feedback human --pick 1 --port 8000", "--port"),
    "a pool without rounds": (f"{GOOD} --pool 8", "--rounds"),
    "feedback without rounds": (f"{GOOD} --feedback clip", "--rounds"),
    "style words without style": (f"{GOOD} --rounds 2 --style-words --style=", "--style"),
    "words of a stage": ("--stage clip --content cat", "--content"),
    "rounds of a stage": ("--stage clip --rounds 2", "--rounds"),
    "data of a stage": (f"{GOOD} --data folder", "--data"),
    "a bottleneck of all weights": (f"{GOOD} --method full --d-prj 4", "--d-prj"),
    "an unshared LoRA": (f"{GOOD} --method lora --unshared", "--unshared"),
    "an object's words": (f"{GOOD} --kind content --content a --method textual-inversion",
                          "--kind"),
    "an object's style": (f"{GOOD} --kind content --content a --style b", "--style"),
    "no such prompts": (f"{GOOD} --rounds 2 --pool-prompts nowhere.txt", "nowhere.txt"),
    "both jobs": (f"{GOOD} --stage muse", "--ref"),
    "a stage that is none": ("--stage unet", "unet"),
    "a stage without a name": ("--stage", "--stage"),
    "an option of another stage": ("--stage muse --gan-start 0.5", "--gan-start"),
    "no job": ("", "--ref"),
    "a preset for counting": ("--stage muse --preset paper", "paper"),
    "no such data": ("--stage vqgan --preset toy --data nowhere", "nowhere"),
    "data without captions": ("--stage vqgan --preset toy --data folder", "folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(refused, weights, picture, tmp_path, case):
    """One line that names the trouble, exit code 2, no file made or touched."""
    options, word = BAD[case]
    arguments = [word.replace("EMPTY", "") for word in options.split()]
    picture("good.png")
    Image.new("RGB", (90, 90), "white").save(tmp_path / "white.png")
    wide = Image.new("RGB", (900, 90), "white")
    wide.paste("red", (0, 0, 90, 90))
    wide.save(tmp_path / "pano.png")
    (tmp_path / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious.txt").write_text("keep me")
    broken_base(weights, tmp_path / "broken", "muse")
    assert word in refused(train.main, "--weights", weights, *arguments)


def test_refusal_from_the_shell(tmp_path):
    """The real thing, once, in a process of its own."""
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--ref", "nothing.png", "--weights", "nowhere"],
        cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train.py: error: ") and not list(tmp_path.iterdir())


def test_a_kill_while_tuning_leaves_nothing(tune, monkeypatch, tmp_path):
    """Trap: half a run folder, which sample.py would take for the newest run."""
    def killed(*a, **k):
        raise KeyboardInterrupt
    monkeypatch.setattr(StyleDrop, "generate", killed)
    assert tune("--content", "a house", "--out", "a")[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["ref.png"]


@pytest.mark.parametrize("parameter", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_at_once(refused, weights, picture, monkeypatch, parameter):
    """One line, nothing half written. Trap: all steps of NaN, then a traceback."""
    calls, real = [], StyleDrop.new_adapter

    def poisoned(self, *a, **k):
        adapter = real(self, *a, **k)
        calls.append(1)
        with torch.no_grad():
            next(adapter.parameters()).fill_(parameter)
        return adapter
    monkeypatch.setattr(StyleDrop, "new_adapter", poisoned)
    ref = picture()
    line = refused(train.main, "--ref", ref, "--content", "a house", "--style", "blurry",
                   "--weights", weights, "--steps", 50, "--out", "a")
    assert "step 1" in line and "lower" in line and "--lr" in line and len(calls) == 1


def in_a_shell(folder, *arguments, **env):
    """One thread each: two torch processes of two threads on two cores wait for each other."""
    return subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, arguments)], cwd=folder,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_terminated(weights, picture, tmp_path):
    """SIGTERM in the middle of the tuning: nothing is left. A kill leaves a folder; the next
    run removes it, and only that of a process that is dead.
    """
    ref = picture()
    command = ["--ref", ref, "--content", "a house", "--weights", weights, "--out", "runs/a"]
    begun = []
    for number, left in ((signal.SIGTERM, 0), (signal.SIGKILL, 1)):
        folder = tmp_path / number.name
        folder.mkdir()
        begun.append((number, left, folder, in_a_shell(folder, *command, "--steps", 10**6)))
    for number, left, folder, one in begun:
        until = time.time() + 60
        while not list(folder.glob("runs/.tuning-*")) and time.time() < until:
            time.sleep(0.05)
        time.sleep(0.3)
        one.send_signal(number)
        one.wait(30)
        assert len(list((folder / "runs").iterdir())) == left
    alive = folder / f"runs/.tuning-{platform.node()}-{os.getpid()}-x"
    alive.mkdir()
    one = in_a_shell(folder, *command, "--steps", 2)
    assert one.wait(60) == 0
    assert sorted((folder / "runs").iterdir()) == [alive, folder / "runs/a"]


def test_terminals(weights, picture, tmp_path):
    """`| head -1`: the reader is gone after a line; trap: a broken pipe ends the work.
    A terminal without a letter; trap: everything is done, then the last line cannot be written.
    """
    same = ("--content", "a house", "--weights", weights)
    head = in_a_shell(tmp_path, "--ref", picture(), *same, "--style", "blurry", "--steps", 100)
    plain = in_a_shell(tmp_path, "--ref", picture("caf\u00e9.png"), *same, "--steps", 2,
                       PYTHONIOENCODING="ascii")
    head.stdout.readline()
    head.stdout.close()
    out, _ = plain.communicate(timeout=60)
    assert plain.returncode == 0 and "runs/caf\\xe9" in out
    assert head.wait(60) == 0 and head.stderr.read() == ""
    assert sorted(content(tmp_path / "runs/ref")) == RUN


def test_next_line_is_for_the_shell(tune):
    """Trap: a folder with a space or a quote, an object's name with brackets."""
    out = tune("--content", "it's [V]", "--kind", "content", "--out", "runs/my house")[1]
    words = shlex.split(out.splitlines()[-1])
    assert words[:7] == ["next:", "python", "sample.py", "--prompt", "it's [V]", "--content",
                         "runs/my house"]


def test_from_another_folder(cli, monkeypatch):
    """The shipped base and the examples lie beside the script, wherever the command is given."""
    seen = []
    monkeypatch.setattr(StyleDrop, "load", lambda weights, device: seen.append(weights) or Base)
    monkeypatch.setattr(data, "read_reference", lambda path, size: seen.append(path) or 1 / 0)

    class Base:
        resolution = 16
    with pytest.raises(ZeroDivisionError):
        cli(train.main, "--ref", "examples/house_watercolor.png")
    assert [Path(path) for path in seen] == [ROOT / "weights/tiny",
                                             ROOT / "examples/house_watercolor.png"]


# -- pretraining is handed over

@pytest.mark.parametrize("stage", train.STAGES)
@pytest.mark.parametrize("arguments", [
    ["--stage", "STAGE", "--steps", "3"], ["--stage=STAGE", "--steps", "3"],
    ["--steps", "3", "--stage", "STAGE"], ["--steps", "3", "--stage=STAGE"]])
def test_a_stage_gets_all_other_options(cli, monkeypatch, stage, arguments):
    """However --stage is written, and wherever it stands.

    Trap: --stage=muse tunes, or is refused.
    """
    seen = []
    monkeypatch.setattr(getattr(pretrain, stage), "main", seen.append)
    assert cli(train.main, *(word.replace("STAGE", stage) for word in arguments))[0] == 0
    assert seen == [["--steps", "3"]]


@pytest.mark.parametrize("stage", train.STAGES)
def test_help_of_a_stage(cli, stage):
    """Trap: --help answers with the options of tuning."""
    code, out, _ = cli(train.main, "--stage", stage, "--help")
    assert code == 0 and f"train.py --stage {stage}" in out and "--reuse" in out
    assert "--ref" not in out.split("options:")[1]
