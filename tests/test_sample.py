"""sample.py: which style is used and said, what is drawn and written, and refusals."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import styledrop
from styledrop import Sampling, StyleDrop, load_adapter, to_uint8

ROOT = Path(sample.__file__).parent
TWO = ["--style", "runs/new", "--content", "runs/object"]
CAT = ["--prompt", "a cat"]


@pytest.fixture
def draw(cli, weights, make_adapter):
    """draw("--prompt", "a cat", ...) -> exit code, stdout, stderr, beside the runs old and new."""
    for when, (name, seed) in enumerate((("object", 3), ("new", 1), ("old", 2))):
        path, kind = Path(f"runs/{name}/adapter.pt"), "content" if name == "object" else "style"
        path.parent.mkdir(parents=True)
        make_adapter(seed, style="" if name == "object" else "watercolor painting").save(path)
        os.utime(path, (1e9 - when, 1e9 - when))
        path.with_name("config.json").write_text(json.dumps(dict(kind=kind)))
    Path("runs/unfinished").mkdir()
    return lambda *options: cli(sample.main, "--weights", weights, "--steps", 3, *options)


@pytest.fixture
def draw2(draw, weights2, pipe2, monkeypatch):
    """draw with both stages; the second one in two steps."""
    monkeypatch.setitem(styledrop.SECOND_SAMPLING, "steps", 2)
    for run in ("new", "old", "object"):
        adapter = load_adapter(f"runs/{run}")
        adapter.about["base"] = pipe2.base
        adapter.save(f"runs/{run}/adapter.pt")
    return lambda *options: draw("--weights", weights2, *options)


@pytest.fixture
def spied(monkeypatch):
    """Every call of generate: its arguments by name."""
    calls, real = [], StyleDrop.generate
    names = list(inspect.signature(real).parameters)[1:]
    monkeypatch.setattr(StyleDrop, "generate", lambda self, *a, **k: calls.append(
        dict(zip(names, a), **k)) or real(self, *a, **k))
    return calls


def picture(path="sample.png"):
    """Its pixels, one for each that was drawn."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))[::sample.SCALE, ::sample.SCALE]


def test_newest_run_is_used_and_named(draw, pipe):
    """Not the last by name, nor an object's, nor a folder without an adapter.

    Trap: the style is applied but not said.
    """
    code, out, err = draw(*CAT)
    assert code == 0 and err == ""
    assert out.splitlines() == [f"style: {Path('runs/new')}, the newest run", "sample.png: seed 0"]
    expected = lambda style: to_uint8(
        pipe.generate(["a cat"], style and load_adapter(style), steps=3))[0]
    assert np.array_equal(picture(), expected("runs/new"))
    os.utime("runs/old/adapter.pt", (2e9, 2e9))
    assert str(Path("runs/old")) in draw(*CAT)[1]
    assert np.array_equal(picture(), expected("runs/old"))
    assert not np.array_equal(picture(), expected("runs/new"))
    for style in ("runs/new", "runs/new/adapter.pt", "none"):
        assert draw(*CAT, "--style", style)[1] == "sample.png: seed 0\n"
        assert np.array_equal(picture(), expected(None if style == "none" else style))
    for config in ("", "[]", '{"kind": []}', "[" * 10**5, "\udcff"):        # damage hides no run
        Path("runs/old/config.json").write_bytes(config.encode(errors="surrogateescape"))
        assert sample.newest_run() == Path("runs/old")
    Path("runs").rename("mine")
    assert "no run yet" in draw(*CAT)[1] and np.array_equal(picture(), expected(None))


ACTS = {                                # of an object in a style, with both stages
    "--prompt": ["a house"], "--style": ["runs/old"], "--content": ["runs/old"], "--gamma": [0.1],
    "--lambda-a": [3], "--lambda-b": [4], "--gamma-sweep": [], "--style-phrase": ["painting"],
    "--steps": [2], "--temperature": [50], "--no-superres": [], "--num": [2], "--seed": [1]}
ELSEWHERE = {"--lambda-grid", "--out", "--trace", "--words", "--weights", "--device", "--help"}


def test_every_option_acts(draw2):
    """Trap: an option that nobody reads."""
    assert {a.option_strings[-1] for a in sample.options()._actions} == {*ACTS} | ELSEWHERE
    seen = set()
    for option, values in {"": [], **ACTS}.items():
        mine = TWO if option == "--prompt" else CAT + TWO
        assert draw2(*mine, *filter(None, [option]), *values)[0] == 0
        seen.add(picture().tobytes())
    assert len(seen) == 1 + len(ACTS)


def test_options_reach_the_sampler(draw, spied):
    """And the defaults are the pipeline's. Trap: positional arguments in the wrong order."""
    assert draw(*CAT, *TWO, "--lambda-a", 1.5, "--lambda-b", 4, "--gamma", 0.25, "--temperature", 3,
                "--seed", 9, "--style-phrase", "gold")[0] == draw(*CAT, "--style", "none")[0] == 0
    told = Sampling(1.5, lambda_b=4, gamma=0.25, steps=3, temperature=3, style_phrase="gold")
    for call, sampling in zip(spied, (told, Sampling(steps=3)), strict=True):
        assert Sampling(**{k: v for k, v in call.items() if k in vars(told)}) == sampling
    assert spied[0]["prompts"] == ["a cat"] and spied[0]["seed"] == [9]
    for role, run in zip(("style", "content"), TWO[1::2]):
        assert torch.equal(*(x.generators["mlp"].up for x in (spied[0][role], load_adapter(run))))


def test_words(draw, pipe, spied):
    """--words: the base's, one a line, and no picture. --style none --style-phrase: a style in
    words, with a strength of its own, also beside an object.
    """
    code, out, err = draw("--words", "--style", "runs/new", "--lambda-grid")
    assert code == 0 and err == "" and out.split("\n")[:-1] == sorted(pipe.words)
    assert not Path("sample.png").exists()
    words = [*CAT, "--style", "none", "--style-phrase", "painting"]
    assert draw(*words)[0] == draw(*words, "--lambda-a", 0, "--out", "other.png")[0] == 0
    assert not np.array_equal(picture(), picture("other.png"))
    assert draw(*words, "--content", "runs/object", "--gamma-sweep")[0] == 0
    assert [c["lambda_a"] for c in spied[:3]] == [None, 0, None]


# -- what is drawn

@pytest.mark.parametrize("prompts, num, rows, columns", [(1, 3, 1, 3), (2, 2, 2, 2), (9, 1, 9, 1),
                                                         (1, 18, 3, 8)])
def test_grids(draw, prompts, num, rows, columns):
    """One prompt in rows of eight, several in a row each, with words beside them. --num 18 --seed 7
    are the pictures of seeds 7 to 24, which are said, also across what is drawn at once.

    Trap: only the first can be drawn again.
    """
    out = draw(*CAT * prompts, "--num", num, "--seed", 7, "--out", "grids/a.png")[1]
    sheet, count = picture("grids/a.png"), prompts * num
    left, top, gap = (50, 2 + 8 * (num > 1), 2) if prompts > 1 else (2, 2, 2)
    assert sheet.shape[:2] == (top + rows * (16 + gap), left + columns * (16 + gap))
    cells = [sheet[y:y + 16, x:x + 16] for y in range(top, len(sheet) - 15, 16 + gap)
             for x in range(left, sheet.shape[1] - 15, 16 + gap)]
    assert all((cell == 255).all() for cell in cells[count:]) and out.endswith(f"to {6 + count}\n")
    assert prompts == 1 or (sheet[top:, :45] < 100).any()
    for i in (0, 1, count - 1):
        assert draw(*CAT, "--seed", 7 + i, "--out", "one.png")[0] == 0
        assert np.array_equal(picture("one.png"), cells[i])


@pytest.mark.parametrize("options", [
    CAT, [*CAT, "--prompt", "кот 🐱", "--num", 2, "--seed", 3],
    [*CAT, *TWO, "--gamma", 0.3, "--style-phrase", "gold", "--temperature", 4.5],
    [*CAT, *TWO, "--gamma-sweep", "--steps", 1],
    [*CAT, "--style", "none", "--lambda-b", 2, "--no-superres"]])
def test_the_png_draws_itself_again(draw2, pipe2, options):
    """Its text chunks are the command, in any script: the same bytes, whatever run is newest now.

    Trap: Latin-1 text chunks.
    """
    assert draw2(*options)[0] == 0
    with Image.open("sample.png") as image:
        text = dict(image.text)
    assert text.pop("base") == pipe2.base
    command = [word for p in text.pop("prompt").split(" | ") for word in ("--prompt", p)]
    command += ["--no-superres"] * (text.pop("superres") == "False")
    for name, value in text.items():
        option = [f"--{name.replace('_', '-')}", value]
        command += option[:value == "True"] if value in ("True", "False") else option
    os.utime("runs/old/adapter.pt", (2e9, 2e9))
    assert draw2(*command, "--out", "again.png")[0] == 0
    assert Path("again.png").read_bytes() == Path("sample.png").read_bytes()


def test_sheets(draw, spied):
    """From the style alone to the object alone, a row for each seed; lambda_A down and lambda_B
    across, the same seed everywhere. Trap: the axes exchanged.
    """
    cell = lambda row, column: picture()[10 + 18 * row:, 50 + 18 * column:][:16, :16]
    assert draw(*CAT, *TWO, "--gamma-sweep", "--num", 2)[0] == 0
    assert [(c["gamma"], c["seed"]) for c in spied] == [(g, [0, 1]) for g in sample.GAMMAS]
    assert sample.GAMMAS[::7] == (0, 1) and picture().shape[:2] == (10 + 2 * 18, 50 + 8 * 18)
    draw(*CAT, *TWO, "--gamma", 1, "--seed", 1, "--out", "one.png")
    assert np.array_equal(cell(1, 7), picture("one.png"))
    spied.clear()
    assert draw(*CAT, "--lambda-grid")[0] == 0
    assert [(c["lambda_a"], c["lambda_b"], *c["seed"]) for c in spied] == [
        (a, b, 0) for a in sample.LAMBDAS_A for b in sample.LAMBDAS_B]
    a, b = sample.LAMBDAS_A[3], sample.LAMBDAS_B[2]
    draw(*CAT, "--lambda-a", a, "--lambda-b", b, "--out", "one.png")
    assert np.array_equal(cell(3, 2), picture("one.png"))


@pytest.mark.parametrize("steps, options", [(5, []), (1, []), (5, ["--num", 16])])
def test_trace_has_a_frame_for_each_step(draw2, steps, options):
    """Grey gives way to the picture, which is the last frame; both stages are shown.

    Traps: equal frames merged; one step is no animation.
    """
    command = [*CAT, "--steps", steps, "--trace", "t.gif", *options]
    assert draw2(*command)[0] == 0
    with Image.open("t.gif") as gif:
        assert gif.n_frames == steps + 2
    assert draw2(*command, "--no-superres")[0] == 0
    with Image.open("t.gif") as gif:
        frames = [np.asarray((gif.seek(i), gif.convert("RGB"))[1]).astype(int)
                  for i in range(gif.n_frames)]
    grey = [(abs(frame - 128) < 2).all(-1).mean() for frame in frames]
    assert len(frames) == steps and grey == sorted(grey, reverse=True) and grey[-1] < 0.1
    assert steps == 1 or grey[0] > 0.5
    if not options:                                         # but for the GIF's palette
        assert abs(frames[-1][2:-2:4, 2:-2:4] - picture()).mean() < 20


@pytest.mark.parametrize("options, note", [
    (["--prompt", "🐱🌳 قطة على السطح 一只猫 кот"], "no training caption has '🐱🌳'"),
    (["--prompt", "a 'cat' \"in\" $HOME;\n%s {}"], "'$home'"),
    (["--prompt", "a catt"], "near: cat"),
    (["--prompt", "cat " * 500], "longer than 16 tokens"), (CAT, ""),
    ([*CAT, "--style-phrase", "painting " * 20], "longer than 16 tokens")])
def test_any_prompt_is_drawn_and_what_is_not_read_is_said(draw, options, note):
    """Traps: a short prompt gets the note too; the prompt fits, the phrase behind it is cut."""
    code, _, err = draw(*options)
    assert code == 0 and note in err and bool(err) == bool(note) and picture().shape == (16, 16, 3)


# -- refusals

def test_out_of_memory_is_one_line(refused):
    """As Python, torch on a CPU and on a GPU say it. Trap: bugs of ours under the same line."""
    def main():
        raise error
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        assert "out of memory" in refused(main)
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        refused(main)


BAD = {                                 # options besides a prompt: a word of the answer
    "--prompt EMPTY --out new/deep/a.png": "say what", "--prompt \udcff": "UTF-8",
    "--gamma 0": "--content",
    "--style-phrase \udcff": "UTF-8", "--content \udcff": "UTF-8", "--style runs/\udcff": "UTF-8",
    "--gamma-sweep": "--content", "--style none --lambda-grid": "strength of a style",
    "--style none --lambda-a 0": "strength", "--style none --content runs/old --gamma 0": "--style",
    "--style none --content runs/old --gamma-sweep": "--style", "--lambda-grid --num 2": "one",
    "--lambda-grid --prompt cat": "one prompt", "--lambda-grid --trace a.gif": "not a sheet",
    "--lambda-grid --gamma-sweep --content runs/old": "both", "--num 17 --trace a.gif": "16",
    "--lambda-grid --lambda-b 3": "all", "--gamma-sweep --content runs/old --gamma 1": "all",
    "--style runs/nothing": "nothing", "--style runs/unfinished": "unfinished",
    "--content runs/nothing": "nothing", "--style EMPTY": "is empty",
    "--style runs/foreign --out new/a.png": "another",
    "--content runs/foreign": "another", "--style runs/damaged": "damaged", "--out cat.jpg": ".png",
    "--weights nowhere": "nowhere", "--no-superres": "no second stage", "--trace a.png": ".gif",
    "--out folder.png": "is a folder", "--out file/cat.png": "cannot be", "--trace EMPTY": ".gif",
    f"--out {'a' * 300}.png": "too long", "--out /proc/a.png": "cannot be written",
    "--trace folder.gif": "is a folder"}


@pytest.mark.parametrize("case", BAD)
def test_refusals(draw, refused, weights, make_adapter, case):
    """One line that names the trouble, exit code 2, no picture."""
    for name in ("foreign", "damaged"):
        path = Path(f"runs/{name}/adapter.pt")
        path.parent.mkdir()
        make_adapter(base="another" if name == "foreign" else None).save(path)
        path.write_bytes(path.read_bytes()[:700 if name == "damaged" else None])
        os.utime(path, (1e8, 1e8))
    Path("folder.png").mkdir(), Path("folder.gif").mkdir(), Path("file").write_text("")
    options = [word.replace("EMPTY", "") for word in case.split()]
    assert BAD[case] in refused(sample.main, *CAT, "--steps", 1, "--weights", weights, *options)


def test_from_the_shell(tmp_path, weights):
    """The real thing, once, from a terminal that has no letter but ASCII's.

    Trap: all is drawn, then the line that says so cannot be written.
    """
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONIOENCODING="ascii")
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--weights", weights, "--steps", "2",
                           *CAT, "--out", "caf\u00e9.png"], cwd=tmp_path, capture_output=True,
                          text=True, env=env)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.endswith("caf\\xe9.png: seed 0\n")
    assert [path.name for path in tmp_path.iterdir()] == ["caf\u00e9.png"]
