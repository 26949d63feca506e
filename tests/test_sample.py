"""sample.py: which style is used and said, what is written, and refusals that write nothing."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from styledrop import Sampling, StyleDrop, load_adapter, to_uint8

ROOT = Path(sample.__file__).parent


@pytest.fixture
def draw(cli, weights, make_adapter):
    """draw("--prompt", "a cat", ...) -> exit code, stdout, stderr, beside the runs old and new."""
    for when, (name, seed) in enumerate((("new", 1), ("old", 2)), 1):
        make_adapter(seed).save(f"runs/{name}/adapter.pt")
        os.utime(f"runs/{name}/adapter.pt", (1e9 - when, 1e9 - when))
    Path("runs/unfinished").mkdir()
    return lambda *options: cli(sample.main, "--weights", weights, "--steps", 3, *options)


def picture(path="sample.png"):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_newest_run_is_used_and_named(draw, pipe):
    """Not the last by name, nor a folder without an adapter.

    Trap: the style is applied but not said.
    """
    code, out, err = draw("--prompt", "a cat", "--scale", 1)
    assert code == 0 and err == ""
    assert out.splitlines() == [f"style: {Path('runs/new')}, the newest run", "sample.png: seed 0"]
    expected = lambda style: to_uint8(
        pipe.generate(["a cat"], style and load_adapter(style), steps=3))[0]
    assert np.array_equal(picture(), expected("runs/new"))
    os.utime("runs/old/adapter.pt", (2e9, 2e9))
    assert "runs/old" in draw("--prompt", "a cat", "--scale", 1)[1].replace("\\", "/")
    assert np.array_equal(picture(), expected("runs/old"))
    assert not np.array_equal(picture(), expected("runs/new"))
    for style in ("runs/new", "runs/new/adapter.pt"):
        out = draw("--prompt", "a cat", "--scale", 1, "--style", style)[1]
        assert out == "sample.png: seed 0\n"
        assert np.array_equal(picture(), expected("runs/new"))
    assert draw("--prompt", "a cat", "--scale", 1, "--style", "none")[0] == 0
    assert np.array_equal(picture(), expected(None))


def test_no_run_yet(cli, weights):
    code, out, _ = cli(sample.main, "--weights", weights, "--prompt", "a cat", "--steps", 2)
    assert code == 0 and "no run yet" in out and picture().shape == (32, 32, 3)


@pytest.mark.parametrize("options, rows, columns",
                         [(["--prompt", "a cat", "--num", "3"], 1, 3),
                          (["--prompt", "a cat", "--prompt", "a house", "--num", "2"], 2, 2),
                          (["--prompt", "a cat"] * 3, 3, 1), (["--prompt", "a cat"] * 9, 9, 1),
                          (["--prompt", "a cat", "--num", "18"], 3, 8)])
def test_grids(draw, options, rows, columns):
    """One prompt in rows of eight, several in a row each, with words beside them.

    More pictures than go through at once come out all the same, and all different.
    """
    assert draw(*options, "--scale", 2, "--out", "grids/a.png")[0] == 0
    sheet, count = picture("grids/a.png"), len(options) // 2 if "--num" not in options else int(
        options[-1]) * options.count("--prompt")
    named = options.count("--prompt") > 1
    left, top, gap = (96, 18, 4) if named else (2, 2, 2)
    assert sheet.shape == ((rows * 36 + 18, columns * 36 + 96, 3) if named else
                           (rows * 34 + 2, columns * 34 + 2, 3))
    cells = [sheet[y:y + 32, x:x + 32] for y in range(top, len(sheet) - 31, 32 + gap)
             for x in range(left, sheet.shape[1] - 31, 32 + gap)]
    assert len(cells) == rows * columns and len({cell.tobytes() for cell in cells[:count]}) == count
    assert all((cell == 255).all() for cell in cells[count:])
    assert not named or (sheet[top:, :90] < 100).any()


def test_options_reach_the_sampler(draw, monkeypatch):
    """Trap: positional arguments in the wrong order."""
    seen, real = [], StyleDrop.generate
    names = ["prompts", "style", "content", "seed", "on_step"]
    monkeypatch.setattr(
        StyleDrop, "generate",
        lambda self, *a, **k: seen.append(dict(zip(names, a), **k)) or real(self, *a, **k))
    assert draw("--prompt", "a cat", "--style", "runs/new", "--content", "runs/old", "--lambda-a",
                1.5, "--lambda-b", 4, "--lambda-a-content", 0, "--gamma", 0.25, "--temperature", 3,
                "--steps", 2, "--seed", 9, "--top-k", 5, "--negative", "blurry", "--style-phrase",
                "gold", "--no-superres")[0] == 0
    call, = seen
    for role, run in (("style", "runs/new"), ("content", "runs/old")):
        assert torch.equal(call[role].generators["mlp"].up, load_adapter(run).generators["mlp"].up)
    assert {name: call[name] for name in call if name not in names} == asdict(
        Sampling(1.5, 0, 4, 0.25, 2, 3, 5, "blurry", "gold", False))
    assert call["prompts"] == ["a cat"] and call["seed"] == 9
    seen.clear()
    draw("--prompt", "a cat", "--style", "none")            # and the defaults are the pipeline's
    assert {k: v for k, v in seen[0].items() if k not in names} == asdict(Sampling(steps=3))


def test_the_same_command_gives_the_same_bytes(draw):
    draw("--prompt", "a cat", "--out", "a.png"), draw("--prompt", "a cat", "--out", "b.png")
    draw("--prompt", "a cat", "--out", "c.png", "--seed", 1)
    a, b, c = (Path(name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b and a != c


def test_each_picture_is_the_one_of_its_seed(draw):
    """--num 4 --seed 7 are the pictures of seeds 7, 8, 9 and 10, which are said.

    Also across what is drawn at once. Trap: only the first can be drawn again.
    """
    _, out, _ = draw("--prompt", "a cat", "--num", 4, "--seed", 7, "--scale", 1)
    assert out.endswith("sample.png: seed 7 to 10\n")
    sheet = picture()
    for i in range(4):
        assert draw("--prompt", "a cat", "--seed", 7 + i, "--scale", 1, "--out", "one.png")[0] == 0
        assert np.array_equal(picture("one.png"), sheet[2:18, 2 + 18 * i:18 + 18 * i])
    draw("--prompt", "a cat", "--num", 18, "--scale", 1)
    draw("--prompt", "a cat", "--seed", 17, "--scale", 1, "--out", "one.png")
    assert np.array_equal(picture("one.png"), picture()[38:54, 20:36])


def test_the_png_says_how_it_was_drawn(draw, pipe):
    """Prompt, seed, style, base and settings, in any script. Trap: Latin-1 text chunks."""
    draw("--prompt", "a cat", "--prompt", "кот 🐱", "--seed", 3, "--num", 2, "--top-k", 4)
    with Image.open("sample.png") as image:
        text = dict(image.text)
    settings = json.loads(text.pop("settings"))
    assert text == dict(prompt="a cat | кот 🐱", seed="3", num="2", base=pipe.base,
                        style=str(Path("runs/new")), content="none")
    assert settings == asdict(Sampling(steps=3, top_k=4))


def test_words(draw, pipe, cli, weights):
    """The base's vocabulary, a word a line, without a prompt or a picture."""
    for options in ([], ["--style", "runs/new", "--lambda-grid"]):
        code, out, err = draw("--words", *options)
        assert code == 0 and err == "" and out.split("\n")[:-1] == sorted(pipe.words)
    assert not Path("sample.png").exists()


def test_an_unknown_word_is_said_and_drawn(draw):
    code, _, err = draw("--prompt", "a catt", "--style", "none")
    assert code == 0 and err.count("\n") == 1 and "'catt'" in err and "near: cat" in err
    assert Path("sample.png").exists()


def test_both_stages(cli, weights2, pipe2):
    """Twice as many pixels, or the base's with --no-superres; the trace shows both stages."""
    command = ["--prompt", "a cat", "--weights", weights2, "--steps", 3, "--scale", 1]
    assert cli(sample.main, *command, "--trace", "t.gif")[0] == 0
    assert np.array_equal(picture(), to_uint8(pipe2.generate("a cat", steps=3))[0])
    assert picture().shape == (32, 32, 3)
    with Image.open("t.gif") as gif:
        assert gif.n_frames == 3 + 12
        sizes = []
        for i in range(gif.n_frames):
            gif.seek(i)
            sizes.append(gif.size)
    assert len(set(sizes)) == 1
    assert cli(sample.main, *command, "--no-superres", "--out", "small.png")[0] == 0
    assert picture("small.png").shape == (16, 16, 3)


@pytest.mark.parametrize("steps, options", [(5, []), (1, []), (5, ["--num", "18"])])
def test_trace_has_a_frame_for_each_step(draw, steps, options):
    """Grey gives way to the picture, which is the last frame.

    Traps: equal frames merged; one step is no animation.
    """
    assert draw("--prompt", "a cat", "--steps", steps, "--trace", "t.gif", "--scale", 2,
                *options)[0] == 0
    grey = []
    with Image.open("t.gif") as gif:
        assert gif.n_frames == steps
        for i in range(steps):
            gif.seek(i)
            grey.append((np.abs(np.asarray(gif.convert("RGB")).astype(int) - 128)
                         < 2).all(-1).mean())
        last = np.asarray(gif.convert("RGB")).astype(int)
    assert grey == sorted(grey, reverse=True)
    if steps > 1:
        assert grey[0] > 0.5 and grey[-1] < 0.1
    if not options:
        assert np.abs(last[2:-2, 2:-2] - picture()).mean() < 20          # but for the GIF's palette


@pytest.mark.parametrize(
    "prompt", ["🐱🌳", "قطة على السطح", "一只猫", "кот", "a 'cat' \"in\" $HOME;\n%s {}", "É" * 3])
def test_prompts_in_any_script(draw, prompt):
    code, _, err = draw("--prompt", prompt)
    assert code == 0 and "Traceback" not in err and picture().shape == (32, 32, 3)


def test_a_long_prompt_is_cut_and_said(draw):
    """500 words work; a note says that not all of them are read.

    Trap: a short one gets the note too.
    """
    code, _, err = draw("--prompt", "cat " * 500)
    assert code == 0 and err.count("\n") == 1 and "longer than 16 tokens" in err
    assert draw("--prompt", "a cat")[2] == ""


def test_the_style_phrase_counts_in_the_length(draw):
    """Trap: the prompt fits, the phrase behind it is cut, and nobody says so."""
    assert "longer than 16 tokens" in draw("--prompt", "a cat", "--style-phrase", "gold " * 20)[2]


@pytest.mark.parametrize("error, code",
                         [(MemoryError(), 2),
                          (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2),
                          (torch.OutOfMemoryError("CUDA out of memory"), 2),
                          (RuntimeError("a bug"), None)])
def test_out_of_memory_is_one_line(cli, error, code):
    """As Python, torch on a CPU and torch on a GPU say it.

    Trap: bugs of ours under the same line.
    """
    def main():
        raise error
    if code is None:
        with pytest.raises(RuntimeError, match="a bug"):
            cli(main)
    else:
        assert cli(main)[0] == code and cli(main)[2].count("\n") == 1


BAD = {                                             # options besides a prompt, a word of the answer
    "an empty prompt": (["--prompt", ""], "empty"),
    "a blank prompt": (["--prompt", " \t"], "empty"),
    "no steps": (["--steps", "0"], "--steps"),
    "half a step": (["--steps", "1.5"], "--steps"),
    "lambda nan": (["--lambda-a", "nan"], "--lambda-a"),
    "lambda inf": (["--lambda-b", "inf"], "--lambda-b"),
    "a gamma of one adapter": (["--gamma", "0.6"], "--content"),
    "an object's lambda without one": (["--lambda-a-content", "0"], "--content"),
    "gamma 0 of one adapter": (["--gamma", "0"], "--content"),
    "lambda_A of nothing": (["--style", "none", "--lambda-a", "0"], "strength of a style"),
    "gamma without a style": (["--style", "none", "--content", "runs/new", "--gamma", "0"],
                              "--style"),
    "a negative k": (["--top-k", "-1"], "--top-k"),
    "a gamma beyond 1": (["--gamma", "1.1"], "--gamma"),
    "no pictures": (["--num", "0"], "--num"),
    "a negative temperature": (["--temperature", "-1"], "--temperature"),
    "a negative seed": (["--seed", "-1"], "--seed"),
    "a missing run": (["--style", "runs/nothing"], "nothing"),
    "a run without adapter": (["--style", "runs/unfinished"], "unfinished"),
    "a missing content run": (["--content", "runs/nothing"], "nothing"),
    "a run of another base": (["--style", "runs/foreign"], "another"),
    "a content run of another base": (["--content", "runs/foreign"], "another"),
    "a damaged run": (["--style", "runs/damaged"], "damaged"),
    "a missing base": (["--weights", "nowhere"], "nowhere"),
    "out is no png": (["--out", "cat.jpg"], "cat.jpg"),
    "out is a folder": (["--out", "folder.png"], "folder.png"),
    "an empty prompt, a new folder": (["--prompt", "", "--out", "new/deep/a.png"], "empty"),
    "another base, a new folder": (["--style", "runs/foreign", "--out", "new/a.png"], "another"),
    "an empty run": (["--style", ""], "adapter"),
    "pixels like houses": (["--scale", "20000"], "--scale"),
    "out under a file": (["--out", "file/cat.png"], "file"),
    "trace is no gif": (["--trace", "a.png"], "a.png"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(draw, refused, weights, make_adapter, case):
    """One line that names the trouble, exit code 2, no picture."""
    make_adapter(base="another").save("runs/foreign/adapter.pt")
    make_adapter().save("runs/damaged/adapter.pt")
    Path("runs/damaged/adapter.pt").write_bytes(Path("runs/damaged/adapter.pt").read_bytes()[:700])
    for name in ("foreign", "damaged"):
        os.utime(f"runs/{name}/adapter.pt", (1e8, 1e8))
    Path("folder.png").mkdir()
    Path("file").write_text("")
    arguments, word = BAD[case]
    assert word in refused(sample.main, "--prompt", "a cat", "--steps", 1, "--weights", weights,
                           *arguments)


def test_a_prompt_is_needed(refused):
    assert "--prompt" in refused(sample.main)


def test_from_the_shell(tmp_path, weights):
    """The real thing, once, in a process of its own."""
    command = [
        sys.executable, ROOT / "sample.py", "--weights", weights, "--steps", "2", "--prompt",
        "a cat"
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.endswith("sample.png: seed 0\n")
    assert [path.name for path in tmp_path.iterdir()] == ["sample.png"]


# -- sheets: gamma, lambda_A x lambda_B, words left out or unwanted

@pytest.fixture
def spied(monkeypatch):
    """Every call of generate: its prompts and options by name."""
    import inspect
    calls, real = [], sample.StyleDrop.generate
    names = list(inspect.signature(real).parameters)[1:]

    def spy(self, *a, **k):
        calls.append({**dict(zip(names, a)), **k})
        return real(self, *a, **k)
    monkeypatch.setattr(sample.StyleDrop, "generate", spy)
    return calls


@pytest.fixture
def two_runs(make_adapter, tmp_path):
    make_adapter(1).save(tmp_path / "runs/glow/adapter.pt")
    make_adapter(2, style="").save(tmp_path / "runs/teapot/adapter.pt")
    (tmp_path / "runs/teapot/config.json").write_text('{"kind": "content"}')


def test_gamma_sweep(cli, weights, two_runs, spied):
    """From the style alone to the object alone, one seed along a row,
    one row for each prompt and seed.
    """
    code, out, _ = cli(sample.main, "--prompt", "a teapot", "--num", 2, "--style", "runs/glow",
                       "--content", "runs/teapot", "--gamma-sweep", "--weights", weights, "--scale",
                       1, "--steps", 2)
    assert code == 0 and [c["gamma"] for c in spied] == 2 * list(sample.GAMMAS)
    assert [c["seed"] for c in spied] == 8 * [0] + 8 * [1] and sample.GAMMAS[0] == 0
    assert sample.GAMMAS[-1] == 1
    assert Image.open("sample.png").size == (96 + 8 * 20, 18 + 2 * 20)


def test_lambda_grid(cli, weights, two_runs, spied):
    """Every pair once, lambda_A down and lambda_B across, the same seed everywhere.

    Trap: the axes exchanged.
    """
    assert cli(sample.main, "--prompt", "a cat", "--style", "runs/glow", "--lambda-grid",
               "--weights", weights, "--steps", 2)[0] == 0
    pairs = [(c["lambda_a"], c["lambda_b"]) for c in spied]
    assert pairs == [(a, b) for a in sample.LAMBDAS_A for b in sample.LAMBDAS_B]
    assert {c["seed"] for c in spied} == {0}


def test_labelled_puts_pictures_where_the_words_say():
    images = np.stack([np.full((4, 4, 3), 10 * i, np.uint8) for i in range(6)])
    sheet = np.asarray(sample.labelled(images, ["a", "b"], ["x", "y", "z"], 2))
    assert [sheet[18 + r * 12 + 4, 96 + c * 12 + 4, 0] for r in range(2)
            for c in range(3)] == [0, 10, 20, 30, 40, 50]


def test_negative_and_style_phrase_reach_the_model(cli, weights, two_runs, spied):
    assert cli(sample.main, "--prompt", "a cat", "--style", "runs/glow", "--negative", "blurry",
               "--style-phrase", "painting", "--weights", weights, "--steps", 2)[0] == 0
    assert spied[0]["negative"] == "blurry" and spied[0]["style_phrase"] == "painting"


def test_a_style_in_words(cli, weights, two_runs, spied):
    """--style none: the words are the style, with a strength of their own,
    alone or beside an object.
    """
    command = [
        "--prompt", "a cat", "--style", "none", "--style-phrase", "painting", "--weights", weights,
        "--steps", 2
    ]
    assert cli(sample.main, *command)[0] == 0
    assert cli(sample.main, *command, "--lambda-a", 2, "--out", "other.png")[0] == 0
    assert [c["style_phrase"] for c in spied] == ["painting"] * 2
    assert [c["lambda_a"] for c in spied] == [None, 2]
    assert Path("sample.png").read_bytes() != Path("other.png").read_bytes()
    assert cli(sample.main, *command, "--content", "runs/teapot", "--gamma-sweep")[0] == 0
    assert len(spied) == 2 + len(sample.GAMMAS) and Path("sample.png").exists()


@pytest.mark.parametrize(
    "options, words",
    [(["--gamma-sweep"], "--content"),
     (["--gamma-sweep", "--content", "runs/teapot", "--style", "none"], "--style"),
     (["--lambda-grid", "--num", 2], "one seed"),
     (["--lambda-grid", "--trace", "a.gif"], "--trace"),
     (["--lambda-grid", "--gamma-sweep", "--content", "runs/teapot"], "not both")])
def test_sheets_refuse_what_they_cannot_draw(cli, weights, two_runs, options, words):
    code, _, err = cli(sample.main, "--prompt", "a cat", "--weights", weights, *options)
    assert code == 2 and words in err and not Path("sample.png").exists()
