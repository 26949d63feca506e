"""sample.py: which style is used and said, what is drawn and written, and refusals."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import sample
import styledrop
from styledrop import load_adapter, to_uint8

TWO = ["--style", "runs/new", "--content", "runs/object"]
CAT = ["--prompt", "a cat"]


@pytest.fixture
def draw(cli, weights2, pipe2, make_adapter, monkeypatch):
    """draw("--prompt", "a cat", ...) -> exit code, stdout, stderr; four runs, both stages."""
    monkeypatch.setitem(styledrop.SECOND_SAMPLING, "steps", 2)
    for when, (name, seed) in enumerate((("object", 3), ("more", 4), ("new", 1), ("old", 2))):
        path, kind = Path(f"runs/{name}/adapter.pt"), "content" if seed > 2 else "style"
        path.parent.mkdir(parents=True)
        style = "" if kind == "content" else "watercolor painting"
        make_adapter(seed, style=style, base=pipe2.base).save(path)
        os.utime(path, (1e9 - when, 1e9 - when))
        path.with_name("config.json").write_text(json.dumps(dict(kind=kind)))
    Path("runs/unfinished").mkdir()
    return lambda *options: cli(sample.main, "--weights", weights2, "--steps", 3, *options)


def picture(path="sample.png"):
    """Its pixels, one for each that was drawn."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))[::sample.SCALE, ::sample.SCALE]


def test_newest_run_is_used_and_named(draw, pipe2):
    """Not the last by name, nor an object's, nor a folder without an adapter. Traps: the style is
    applied but not said; other defaults than the pipeline's; arguments in the wrong order.
    """
    is_of = lambda style: np.array_equal(picture(), to_uint8(
        pipe2.generate("a cat", style and load_adapter(style), steps=3))[0])
    assert draw(*CAT) == (0, "style: runs/new, the newest run\nsample.png: seed 0\n", "")
    assert is_of("runs/new") and not is_of("runs/old")
    os.utime("runs/old/adapter.pt", (2e9, 2e9))
    assert "runs/old" in draw(*CAT)[1] and is_of("runs/old")
    for style in ("runs/new", "runs/new/adapter.pt", "none"):
        assert draw(*CAT, "--style", style)[1] == "sample.png: seed 0\n"
        assert is_of(None if style == "none" else style)
    for config in ("", "[]", '{"kind": []}', "[" * 10**5, "\udcff"):        # damage hides no run
        Path("runs/old/config.json").write_bytes(config.encode(errors="surrogateescape"))
        assert sample.newest_run() == Path("runs/old")
    Path("runs").rename("mine")
    assert "no run yet" in draw(*CAT)[1] and is_of(None)


ACTS = {                                # of an object in a style, with both stages
    "--prompt": ["a house"], "--style": ["runs/old"], "--content": ["runs/more"], "--gamma": [0.1],
    "--lambda-a": [3], "--lambda-b": [4], "--gamma-sweep": [], "--style-phrase": ["painting"],
    "--steps": [2], "--temperature": [50], "--no-superres": [], "--num": [2], "--seed": [1]}
ELSEWHERE = {"--lambda-grid", "--out", "--trace", "--words", "--weights", "--device", "--help"}


def test_every_option_acts(draw):
    """Trap: an option that nobody reads."""
    assert {a.option_strings[-1] for a in sample.options()._actions} == {*ACTS} | ELSEWHERE
    seen = set()
    for option, values in {"": [], **ACTS}.items():
        mine = TWO if option == "--prompt" else CAT + TWO
        assert draw(*mine, *filter(None, [option]), *values)[0] == 0
        seen.add(picture().tobytes())
    assert len(seen) == 1 + len(ACTS)


def test_words(draw, pipe2):
    """--words: the base's, one a line, and no picture. A style in words goes beside an object."""
    code, out, err = draw("--words", "--style", "runs/new", "--lambda-grid")
    assert code == 0 and err == "" and out.split("\n")[:-1] == sorted(pipe2.words)
    assert not Path("sample.png").exists()
    words = [*CAT, "--style", "none", "--style-phrase", "painting"]
    assert draw(*words, "--content", "runs/object", "--gamma-sweep")[0] == 0


# -- what is drawn

@pytest.mark.parametrize("prompts, num, rows, columns", [(1, 3, 1, 3), (2, 2, 2, 2), (9, 1, 9, 1),
                                                         (1, 18, 3, 8)])
def test_grids(draw, prompts, num, rows, columns):
    """One prompt in rows of eight, several in a row each, with words beside them. --num 18 --seed
    7: seeds 7 to 24, which are said, across batches too. Trap: only the first can be drawn again.
    """
    out = draw(*CAT * prompts, "--num", num, "--seed", 7, "--out", "grids/a.png")[1]
    sheet, count = picture("grids/a.png"), prompts * num
    left, top = (50, 2 + 8 * (num > 1)) if prompts > 1 else (2, 2)
    assert sheet.shape[:2] == (top + rows * 34, left + columns * 34)
    cells = [sheet[y:y + 32, x:x + 32] for y in range(top, len(sheet) - 31, 34)
             for x in range(left, sheet.shape[1] - 31, 34)]
    assert all((cell == 255).all() for cell in cells[count:]) and out.endswith(f"to {6 + count}\n")
    for i in (0, 1, count - 1):
        assert draw(*CAT, "--seed", 7 + i, "--out", "one.png")[0] == 0
        assert np.array_equal(picture("one.png"), cells[i])


@pytest.mark.parametrize("options", [
    [*CAT, "--prompt", "кот 🐱", "--num", 2, "--seed", 3],
    [*CAT, *TWO, "--style-phrase", "gold", "--temperature", 4.5],
    [*CAT, *TWO, "--gamma-sweep", "--steps", 1], [*CAT, *TWO[2:], "--style", "none"],
    [*CAT, "--style", "none", "--style-phrase", "gold", "--lambda-b", 2, "--no-superres"]])
def test_the_png_draws_itself_again(draw, pipe2, monkeypatch, options):
    """By its text chunks, whatever run is newest and what the defaults are now. Trap: Latin-1."""
    assert draw(*options)[0] == 0
    with Image.open("sample.png") as image:
        text = dict(image.text)
    assert text.pop("base") == pipe2.base
    command = [word for p in text.pop("prompt").split(" | ") for word in ("--prompt", p)]
    command += ["--no-superres"] * (text.pop("superres") == "False")
    for name, value in text.items():
        option = [f"--{name.replace('_', '-')}", value]
        command += option[:value == "True"] if value in ("True", "False") else option
    os.utime("runs/old/adapter.pt", (2e9, 2e9))
    for name in ("LAMBDA_A", "LAMBDA_A_WORDS") if "--gamma-sweep" not in options else ():
        monkeypatch.setattr(styledrop, name, 9.0)
    assert draw(*command, "--out", "again.png")[0] == 0
    assert Path("again.png").read_bytes() == Path("sample.png").read_bytes()


def test_sheets(draw):
    """From the style alone to the object alone, a row for each seed; lambda_A down and lambda_B
    across, the same seed everywhere. Trap: the axes exchanged.
    """
    cell = lambda row, column: picture()[10 + 34 * row:, 50 + 34 * column:][:32, :32]
    assert draw(*CAT, *TWO, "--gamma-sweep", "--num", 2)[0] == 0
    assert sample.GAMMAS[::7] == (0, 1) and picture().shape[:2] == (10 + 2 * 34, 50 + 8 * 34)
    for row, column in ((1, 7), (0, 4)):
        draw(*CAT, *TWO, "--gamma", sample.GAMMAS[column], "--seed", row, "--out", "one.png")
        assert np.array_equal(cell(row, column), picture("one.png"))
    assert draw(*CAT, "--lambda-grid")[0] == 0 and picture().shape[:2] == (10 + 6 * 34, 50 + 6 * 34)
    for row, column in ((3, 2), (0, 5)):
        a, b = sample.LAMBDAS_A[row], sample.LAMBDAS_B[column]
        draw(*CAT, "--lambda-a", a, "--lambda-b", b, "--out", "one.png")
        assert np.array_equal(cell(row, column), picture("one.png"))


@pytest.mark.parametrize("steps, options", [(5, []), (1, []), (5, ["--num", 16])])
def test_trace_has_a_frame_for_each_step(draw, steps, options):
    """Grey gives way to the picture. Traps: equal frames merged; one step is no animation."""
    command = [*CAT, "--steps", steps, "--trace", "t.gif", *options]
    assert draw(*command)[0] == 0 and Image.open("t.gif").n_frames == steps + 2
    assert draw(*command, "--no-superres")[0] == 0
    frames = [np.asarray(frame.convert("RGB")).astype(int)
              for frame in ImageSequence.Iterator(Image.open("t.gif"))]
    grey = [(abs(frame - 128) < 2).all(-1).mean() for frame in frames]
    assert len(frames) == steps and grey == sorted(grey, reverse=True) and grey[-1] < 0.1
    assert steps == 1 or grey[0] > 0.5
    if not options:                                         # but for the GIF's palette
        assert abs(frames[-1][2:-2:4, 2:-2:4] - picture()).mean() < 20


@pytest.mark.parametrize("options, note", [
    (["--prompt", "🐱🌳 قطة على السطح 一只猫 кот"], "no training caption has '🐱🌳'"),
    (["--prompt", "cat " * 500], "longer than 16 tokens"), (CAT, ""),
    ([*CAT, "--style-phrase", "painting " * 20], "longer than 16 tokens")])
def test_any_prompt_is_drawn_and_what_is_not_read_is_said(draw, options, note):
    """Traps: a short prompt gets the note too; the prompt fits, the phrase behind it is cut."""
    code, _, err = draw(*options)
    assert code == 0 and note in err and bool(err) == bool(note) and picture().shape == (32, 32, 3)


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
    "--style-phrase \udcff": "UTF-8", "--content \udcff": "UTF-8", "--style runs/\udcff": "UTF-8",
    "--gamma-sweep": "--content", "--style none --content runs/object --gamma 0": "--style",
    "--style none --lambda-a 0": "strength of a style", "--lambda-grid --lambda-b 3": "all",
    "--lambda-grid --num 2": "one seed", "--lambda-grid --gamma-sweep --content runs/new": "both",
    "--lambda-grid --trace a.gif": "not a sheet", "--num 17 --trace a.gif": "16",
    "--style runs/unfinished": "unfinished", "--content runs/nothing": "nothing",
    "--style runs/foreign --out new/a.png": "another", "--out cat.jpg": ".png",
    "--style runs/object": "--content", "--content runs/new": "--style",
    "--trace a.png": ".gif", "--out folder.png": "is a folder", "--trace file/a.gif": "cannot be"}


@pytest.mark.parametrize("case", BAD)
def test_refusals(draw, refused, weights, make_adapter, case):
    """One line that names the trouble, exit code 2, no picture."""
    for folder in ("runs/foreign", "folder.png"):
        Path(folder).mkdir()
    make_adapter(base="another").save("runs/foreign/adapter.pt")
    Path("file").write_text("")
    options = [word.replace("EMPTY", "") for word in case.split()]
    assert BAD[case] in refused(sample.main, *CAT, "--steps", 1, "--weights", weights, *options)
