"""train.py: from one picture to a run folder, and refusals that leave nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise_images

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
    """Trap: a date, a path or global chance in the adapter or in the picture. Tuned again,
    a folder is replaced.
    """
    tune("--out", "runs/a", "--content", "a house"), tune("--out", "runs/b", "--content", "a house")
    a, b = content("runs/a"), content("runs/b")
    assert a["adapter.pt"] == b["adapter.pt"] and a["samples.png"] == b["samples.png"]
    assert tune("--out", "runs/b", "--content", "a house", "--seed", 1)[0] == 0
    assert sorted(content("runs/b")) == RUN and content("runs/b")["adapter.pt"] != b["adapter.pt"]
    assert sorted(p.name for p in Path("runs").iterdir()) == ["a", "b"]


def test_several_references(tune, cli, weights, picture, monkeypatch):
    """All pictures reach the tuning, each with its phrase. Trap: nargs that keeps the last one."""
    seen, real = [], StyleDrop.tune
    monkeypatch.setattr(StyleDrop, "tune", lambda self, *a: seen.append(a[:2]) or real(self, *a))
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


BAD = {
    "missing reference": (["--ref", "nothing.png"], "nothing.png"), "a folder":
    (["--ref", "folder"], "folder"), "a text file": (["--ref", "text.png"], "text.png"),
    "an empty file": (["--ref", "empty.png"], "empty"), "a cut picture": (["--ref",
                                                                           "cut.png"], "cut.png"),
    "one bad of two": (["--ref", "good.png", "nothing.png"], "nothing.png"), "no steps":
    (["--ref", "good.png", "--steps",
      "0"], "--steps"), "steps in words": (["--ref", "good.png", "--steps",
                                            "many"], "--steps"), "lr nan":
    (["--ref", "good.png", "--lr",
      "nan"], "--lr"), "lr inf": (["--ref", "good.png", "--lr",
                                   "inf"], "--lr"), "lr zero": (["--ref", "good.png", "--lr",
                                                                 "0"], "--lr"), "a seed too large":
    (["--ref", "good.png", "--seed",
      "1" + "0" * 30], "--seed"), "an unknown option": (["--ref", "good.png", "--setps",
                                                         "3"], "--setps"), "too few contents":
    (["--ref", "good.png", "good.png", "--content", "a cat"], "2 references"), "too many contents":
    (["--ref", "good.png", "--content", "a",
      "cat"], "not 2"), "an empty content": (["--ref", "good.png", "--content",
                                              " "], "empty"), "out is somebody's folder":
    (["--ref", "good.png", "--out",
      "folder"], "not a run folder"), "out is a file": (["--ref", "good.png", "--out", "text.png"],
                                                        "not a run folder"), "out under a file":
    (["--ref", "good.png", "--out",
      "text.png/run"], "text.png"), "no such base": (["--ref", "good.png", "--weights",
                                                      "nowhere"], "nowhere"), "a damaged base":
    (["--ref", "good.png", "--weights", "broken"], "muse.pt"), "an adapter as large as the base": ([
        "--ref", "good.png", "--d-prj", "10000000000"
    ], "--d-prj"), "a port without a page": (["--ref", "good.png", "--port",
                                              "8000"], "--rounds"), "words of a stage":
    (["--stage", "clip", "--content",
      "a cat"], "--content"), "rounds of a stage": (["--stage", "clip", "--rounds", "2"],
                                                    "--rounds"), "a bottleneck of all weights":
    (["--ref", "good.png", "--method", "full", "--d-prj",
      "8"], "--d-prj"), "feedback without rounds": (["--ref", "good.png", "--feedback",
                                                     "human"], "--rounds"), "data of a stage":
    (["--ref", "good.png", "--data", "folder"], "--data"), "an object's words": ([
        "--ref", "good.png", "--kind", "content", "--content", "a", "--method", "textual-inversion"
    ], "--kind"), "no such prompts": ([
        "--ref", "good.png", "--rounds", "2", "--pool-prompts", "nowhere.txt"
    ], "nowhere.txt"), "both jobs": (["--ref", "good.png", "--stage", "muse"],
                                     "--ref"), "a stage that is none": (["--stage",
                                                                         "unet"], "unet"),
    "a stage without a name": (["--stage"], "--stage"), "an option of another stage": ([
        "--stage", "muse", "--gan-start", "0.5"
    ], "--gan-start"), "no job": ([], "--ref"), "a preset for counting": ([
        "--stage", "muse", "--preset", "paper"
    ], "paper"), "no such data": (["--stage", "vqgan", "--preset", "toy", "--data",
                                   "nowhere"], "nowhere"), "data without captions": ([
                                       "--stage", "vqgan", "--preset", "toy", "--data", "folder"
                                   ], "folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(refused, weights, picture, tmp_path, case):
    """One line that names the trouble, exit code 2, no file made or touched."""
    arguments, word = BAD[case]
    picture("good.png")
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
