"""sample.py: which style is used and said, what is sampled and written, and refusals."""

import json
import os
import re
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageSequence

import sample
import styledrop
from checkpoint.adapters import load_adapter
from checkpoint.files import LEAST_FREE
from styledrop import CONTENT_SAMPLING, StyleDrop, to_uint8

CAT = ["--prompt", "a cat"]
STYLE = ["--style", "runs/new"]
CONTENT = ["--content", "runs/object"]
TWO = [*STYLE, *CONTENT]
SIDE = 32                               # pixels of a toy image
GAP = 2                                 # between two of them; on the sheet all are twice as large
LEFT = 48                               # pixels of the words to the left of the rows
TOP = 8                                 # and of one line above the columns


@pytest.fixture
def run_sample(cli, weights2, pipe2, make_adapter, monkeypatch):
    """run_sample("--prompt", "a cat", ...) -> exit code, stdout, stderr.

    There are four runs of both kinds, of which runs/new is the newest with a style.
    """
    monkeypatch.setattr(styledrop, "SUPERRES_SAMPLING", replace(styledrop.SUPERRES_SAMPLING,
                                                                steps=2))
    runs = [("object", "content", 3), ("more", "content", 4), ("new", "style", 1),
            ("old", "style", 2)]
    for age, (name, kind, seed) in enumerate(runs):
        folder = Path("runs", name)
        style = "watercolor painting" if kind == "style" else ""
        make_adapter(seed, style=style, base=pipe2.base_id).save(folder / "adapter.pt")
        (folder / "config.json").write_text(json.dumps(dict(kind=kind)))
        os.utime(folder / "adapter.pt", (1e9 - age, 1e9 - age))

    def run(*options):
        return cli(sample.main, "--weights", weights2, "--steps", 3, *options)
    return run


def pixels_of(path="sample.png"):
    """The pixels of a PNG, one for each that was sampled."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))[::sample.SCALE, ::sample.SCALE]


def cell(sheet, row, column, left=0, top=0):
    """One image of a sheet with words of these sizes to the left and above."""
    y = top + GAP + row * (SIDE + GAP)
    x = left + GAP + column * (SIDE + GAP)
    return sheet[y:y + SIDE, x:x + SIDE]


# -- which style

def expected_cat(pipe, style):
    adapter = None if style == "none" else load_adapter(style)
    return to_uint8(pipe.generate("a cat", adapter, steps=3))[0]


def test_the_newest_run_is_used_and_named(run_sample, pipe2):
    """Trap: the style is applied but not said."""
    code, out, err = run_sample(*CAT)
    assert (code, err) == (0, "")
    assert out == "style: runs/new, the newest run\nimage 1/1  0 s\nsample.png: seed 0\n"
    assert np.array_equal(pixels_of(), expected_cat(pipe2, "runs/new"))
    os.utime("runs/old/adapter.pt", (2e9, 2e9))
    assert "style: runs/old" in run_sample(*CAT)[1]
    assert np.array_equal(pixels_of(), expected_cat(pipe2, "runs/old"))


@pytest.mark.parametrize("style", ["runs/old", "runs/old/adapter.pt", "none"])
def test_the_style_that_is_asked_for(run_sample, pipe2, style):
    """With the pipeline's own settings. Trap: arguments in another order."""
    code, out, _ = run_sample(*CAT, "--style", style)
    assert code == 0 and "style:" not in out
    assert np.array_equal(pixels_of(), expected_cat(pipe2, style))


@pytest.mark.parametrize("folders", [["runs"], ["runs/new", "runs/old"]],
                         ids=["no run", "only objects"])
def test_without_any_style_the_base_is_sampled(run_sample, pipe2, folders):
    """Trap: "there is no run", though there are runs of objects."""
    for folder in folders:
        shutil.rmtree(folder)
    assert "style: none (runs/ has no style yet), so the base is sampled" in run_sample(*CAT)[1]
    assert np.array_equal(pixels_of(), expected_cat(pipe2, "none"))


def test_a_style_in_words_is_given_otherwise(run_sample):
    """Trap: `--style watercolor` is a natural thing to try, and "no such file" does not help."""
    code, _, err = run_sample(*CAT, "--style", "watercolor")
    assert code == 2 and err.count("\n") == 1
    assert 'describe the style to the base: --style none --style-phrase "watercolor"' in err
    advice = ["--style", "none", "--style-phrase", "watercolor"]
    assert run_sample(*CAT, *advice)[0] == 0


OPTIONS = [                             # of an object in a style, with both stages
    ["--prompt", "a house"], ["--style", "runs/old"], ["--content", "runs/more"], ["--gamma", 0.1],
    ["--lambda-a", 2], ["--lambda-b", 9], ["--gamma-sweep"],
    ["--style-phrase", "painting"], ["--steps", 2], ["--top-k", 1], ["--min-p", 1],
    ["--temperature", 0], ["--no-superres"],
    ["--num", 2], ["--seed", 1]]
OTHER_OPTIONS = ["--lambda-grid", "--out", "--trace", "--words", "--weights", "--device", "--help"]


def test_every_option_has_an_effect(run_sample):
    """Trap: an option that has no effect."""
    options = [action.option_strings[-1] for action in sample.options()._actions]
    assert sorted(options) == sorted([option for option, *_ in OPTIONS] + OTHER_OPTIONS)
    seen = {}
    for option in ([], *OPTIONS):
        prompt = [] if "--prompt" in option else CAT
        code, _, err = run_sample(*prompt, *TWO, *option)
        assert code == 0, err
        pixels = pixels_of().tobytes()
        assert pixels not in seen, (option, seen[pixels])
        seen[pixels] = option


@pytest.mark.parametrize("options", [[], [*CAT, "--style", "runs/new", "--lambda-grid"]])
def test_words(run_sample, pipe2, options):
    """The words of the base, one per line; nothing is sampled."""
    code, out, err = run_sample("--words", *options)
    assert (code, err) == (0, "")
    assert out.splitlines() == sorted(pipe2.words)
    assert not Path("sample.png").exists()


# -- what is sampled

@pytest.mark.parametrize("prompts, num, rows, columns, left, top", [
    (1, 3, 1, 3, 0, 0), (2, 2, 2, 2, LEFT, 0), (9, 1, 9, 1, LEFT, 0), (1, 18, 3, 8, 0, 0)])
def test_sheets(run_sample, prompts, num, rows, columns, left, top):
    """One prompt in rows of eight; several in a row each, with words to their left.

    The seeds are said. Trap: only the first image can be sampled again.
    """
    options = ["--num", num, "--seed", 7]
    code, out, _ = run_sample(*CAT * prompts, *STYLE, *options, "--out", "sheets/a.png")
    assert code == 0
    count = prompts * num
    assert out.endswith(f"sheets/a.png: seeds 7 to {6 + count}\n")
    sheet = pixels_of("sheets/a.png")
    height = top + GAP + rows * (SIDE + GAP)
    width = left + GAP + columns * (SIDE + GAP)
    assert sheet.shape[:2] == (height, width)
    for i in (0, 1, count - 1):
        run_sample(*CAT, *STYLE, "--seed", 7 + i, "--out", "one.png")
        found = cell(sheet, i // columns, i % columns, left, top)
        assert np.array_equal(found, pixels_of("one.png"))
    for i in range(count, rows * columns):
        assert (cell(sheet, i // columns, i % columns, left, top) == 255).all()


def test_one_image_has_no_margin(run_sample):
    run_sample(*CAT)
    assert pixels_of().shape == (SIDE, SIDE, 3)


def test_a_folder_of_single_files(run_sample, pipe2):
    """A PNG for each prompt and seed, which says how to sample it again."""
    code, out, _ = run_sample(*CAT, "--prompt", "a house", *STYLE, "--num", 9, "--seed", 7, "--out",
                              "many/cats")
    assert code == 0
    assert sorted(os.listdir("many/cats")) == [f"{i:05d}.png" for i in range(1, 19)]
    assert out.endswith("many/cats: seeds 7 to 24\n")
    for i, prompt in ((1, "a cat"), (9, "a cat"), (10, "a house"), (18, "a house")):
        path = f"many/cats/{i:05d}.png"
        with Image.open(path) as image:
            text = dict(image.text)
        assert json.loads(text["prompt"]) == [prompt]
        assert text["seed"] == str(6 + i) and text["num"] == "1"
        run_sample("--prompt", prompt, *STYLE, "--seed", text["seed"])
        assert np.array_equal(pixels_of(), pixels_of(path))


def test_files_are_written_as_they_come(run_sample, monkeypatch):
    """Trap: after an hour, a full disk or Ctrl-C costs all of 1,000 images."""
    real = StyleDrop.generate
    batches = []

    def stopped(*arguments, **named):
        batches.append(len(arguments[1]))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(StyleDrop, "generate", stopped)
    assert run_sample(*CAT, *STYLE, "--num", 100, "--out", "cats")[0] == 130
    assert batches == [16, 16, 16]
    assert len(os.listdir("cats")) == 32


@pytest.mark.parametrize("options", [
    ["--num", 257], ["--num", 129, "--prompt", "a house"], [*TWO, "--gamma-sweep", "--num", 33]])
def test_sheets_are_bounded(run_sample, options):
    """Trap: 10,000 images on one sheet fill all memory after hours of sampling."""
    code, _, err = run_sample(*CAT, *options)
    assert code == 2 and err.count("\n") == 1
    assert "a sheet has at most 256 images" in err


def test_gamma_sweep(run_sample):
    """From the style alone to the object alone, a row for each seed; only gamma changes."""
    strengths = "--lambda-a", CONTENT_SAMPLING.lambda_a, "--lambda-b", CONTENT_SAMPLING.lambda_b
    assert run_sample(*CAT, *TWO, "--gamma-sweep", "--num", 2)[0] == 0
    sheet = pixels_of()
    assert sheet.shape[:2] == (TOP + GAP + 2 * (SIDE + GAP), LEFT + GAP + 8 * (SIDE + GAP))
    assert sample.GAMMAS[0] == 0 and sample.GAMMAS[7] == 1
    for row, column in ((1, 7), (0, 4), (1, 0)):
        run_sample(*CAT, *TWO, "--gamma", sample.GAMMAS[column], "--seed", row, *strengths,
                   "--out", "one.png")
        assert np.array_equal(cell(sheet, row, column, LEFT, TOP), pixels_of("one.png"))


def test_lambda_grid(run_sample):
    """lambda_A down and lambda_B across, the same seed everywhere. Trap: the axes are swapped."""
    assert run_sample(*CAT, *STYLE, "--lambda-grid", "--seed", 5)[0] == 0
    sheet = pixels_of()
    assert sheet.shape[:2] == (TOP + GAP + 7 * (SIDE + GAP), LEFT + GAP + 5 * (SIDE + GAP))
    how = styledrop.SAMPLING
    assert how.lambda_a in sample.LAMBDAS_A and how.lambda_b in sample.LAMBDAS_B
    for row, column in ((3, 2), (0, 4)):
        a, b = sample.LAMBDAS_A[row], sample.LAMBDAS_B[column]
        run_sample(*CAT, *STYLE, "--lambda-a", a, "--lambda-b", b, "--seed", 5, "--out", "one.png")
        assert np.array_equal(cell(sheet, row, column, LEFT, TOP), pixels_of("one.png"))


@pytest.mark.parametrize("options", [
    [*CAT, *STYLE, "--prompt", "кот 🐱 | \"a\", b", "--num", 2, "--seed", 3],
    [*CAT, *TWO, "--style-phrase", "gold", "--temperature", 4.5, "--lambda-a", 2],
    [*CAT, *TWO, "--gamma-sweep", "--steps", 1], [*CAT, *CONTENT, "--style", "none"],
    [*CAT, "--style", "none", "--style-phrase", "gold", "--lambda-b", 2, "--no-superres"]])
def test_a_png_says_how_to_sample_it_again(run_sample, pipe2, monkeypatch, options):
    """Whatever run is newest and what the defaults are then. Prompts are a JSON list.

    Trap: Latin-1, which has no Russian; a separator that a prompt contains.
    """
    assert run_sample(*options)[0] == 0
    with Image.open("sample.png") as image:
        text = dict(image.text)
    assert text.pop("base") == pipe2.base_id
    command = []
    for prompt in json.loads(text.pop("prompt")):
        command += ["--prompt", prompt]
    if text.pop("superres") == "False":
        command.append("--no-superres")
    if "sweep" in text:
        assert text.pop("sweep") == "gamma"
        command.append("--gamma-sweep")
    if text["content"] == "none":
        del text["content"]
    for name, value in text.items():
        command += ["--" + name.replace("_", "-"), value]
    os.utime("runs/old/adapter.pt", (2e9, 2e9))
    changed = replace(styledrop.SAMPLING, lambda_a=9.0, lambda_b=9.0, temperature=9.0)
    monkeypatch.setattr(styledrop, "SAMPLING", changed)
    assert run_sample(*command, "--out", "again.png")[0] == 0
    assert Path("again.png").read_bytes() == Path("sample.png").read_bytes()


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
@pytest.mark.parametrize("out", ["a.png", "cats"])
def test_pngs_respect_the_umask(run_sample, umask, mode, out):
    before = os.umask(umask)
    try:
        assert run_sample(*CAT, "--out", out)[0] == 0
    finally:
        os.umask(before)
    path = Path(out) / "00001.png" if out == "cats" else Path(out)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def frames_of(path):
    with Image.open(path) as image:
        return [np.asarray(frame.convert("RGB")).astype(int)
                for frame in ImageSequence.Iterator(image)]


@pytest.mark.parametrize("steps, num", [(5, 1), (1, 1), (5, 16)])
def test_trace_has_a_frame_for_each_step(run_sample, steps, num):
    """Of both stages. Traps: equal frames are merged; one frame is no animation."""
    options = [*CAT, "--steps", steps, "--num", num, "--trace", "t.gif"]
    assert run_sample(*options)[0] == 0
    assert len(frames_of("t.gif")) == steps + 2
    assert run_sample(*options, "--no-superres")[0] == 0
    assert len(frames_of("t.gif")) == steps


def test_a_trace_shows_how_the_image_fills_in(run_sample):
    """Masked tokens are grey, and the last frame is the image, but for the palette of a GIF."""
    assert run_sample(*CAT, "--steps", 5, "--trace", "t.gif", "--no-superres")[0] == 0
    frames = frames_of("t.gif")
    grey = [(abs(frame - 128) < 2).all(-1).mean() for frame in frames]
    assert grey == sorted(grey, reverse=True)
    assert grey[0] > 0.5 and grey[-1] < 0.1
    assert abs(frames[-1][2:-2:4, 2:-2:4] - pixels_of()).mean() < 20


@pytest.mark.parametrize("options, note", [
    (["--prompt", "🐱🌳 قطة على السطح 一只猫 кот"], "does not know '🐱🌳'"),
    (["--prompt", "cat " * 400], "longer than 16 tokens"),
    ([*CAT, "--style-phrase", "painting " * 20], "longer than 16 tokens")])
def test_any_prompt_is_sampled_and_what_is_not_read_is_said(run_sample, options, note):
    """Trap: the prompt fits, and the phrase behind it is cut."""
    code, _, err = run_sample(*options)
    assert code == 0
    assert note in err
    assert pixels_of().shape == (SIDE, SIDE, 3)


def test_control_characters_of_a_run_do_not_reach_the_terminal(run_sample, make_adapter):
    """Trap: an adapter from a stranger writes lines of its own."""
    make_adapter(base="\x1b[2J\nall is well").save("runs/new/adapter.pt")
    Path("runs/new/config.json").write_text(json.dumps(dict(kind="\x1b[31mcontent")))
    code, out, err = run_sample(*CAT)
    assert code == 2 and err.count("\n") == 1
    assert (out + err).replace("\n", "").isprintable()


# -- progress

@pytest.mark.parametrize("options", [
    ["--num", 20, "--steps", 9], ["--num", 20, "--steps", 9, "--out", "cats"],
    [*CONTENT, "--gamma-sweep"], ["--lambda-grid"]])
def test_a_line_at_least_about_every_five_seconds(run_sample, slow_passes, options):
    """If a pass of G takes a second. Trap: a batch of 16 images, and nothing is said meanwhile."""
    clock, said = slow_passes()
    said.append(clock.now)
    assert run_sample(*CAT, *STYLE, *options)[0] == 0
    said.append(clock.now)
    assert said[-1] - said[0] > 25
    assert max(np.diff(said)) <= 10                          # a step of a mix has five passes


# -- refusals

REFUSALS = [                            # options in addition to a prompt; words of the message
    (["cat"], "unrecognized arguments: cat; put a prompt"),
    (["--prompt", "", "--out", "new/deep/a.png"], "is empty"), (["--prompt", "\udcff"], "UTF-8"),
    (["--style-phrase", "\udcff"], "UTF-8"), (["--content", "\udcff"], "UTF-8"),
    (["--style", "runs/\udcff"], "UTF-8"), (["--prompt", "x" * 100_000], "100,000 characters"),
    (["--prompt", "-x"], "write --prompt=-x"), (["--gamma-sweep"], "--content"),
    (["--style", "none", *CONTENT, "--gamma-sweep"], "--style"),
    (["--style", "none", *CONTENT, "--style-phrase", "gold"], "write the words into the prompt"),
    (["--lambda-grid", "--num", 2], "one seed"), (["--lambda-grid", "--prompt", "b"], "one prompt"),
    (["--lambda-grid", "--gamma-sweep", *CONTENT], "not both"),
    (["--lambda-grid", "--trace", "a.gif"], "no sweep"),
    (["--gamma-sweep", *TWO, "--out", "cats"], "must end in .png"),
    (["--num", 17, "--trace", "a.gif"], "at most 16 images"),
    (["--trace", "a.png"], "must end in .gif"), (["--style", "runs/unfinished"], "unfinished"),
    (["--content", "runs/nothing"], "nothing"), (["--style", "runs/foreign"], "tuned on base"),
    (["--style", "runs/object"], "--content"), (["--content", "runs/new"], "--style"),
    (["--content", "runs/new/adapter.pt"], "--style"), (["--out", "folder.png"], "is a folder"),
    (["--trace", "file/a.gif"], "--trace"), (["--out", "file/a.png"], "--out"),
    (["--trace", "a.gif", "--out", "cats"], "--out must end in .png"),
    (["--trace", "folder.gif"], "folder.gif is a folder, not a file; give another --trace"),
    (["--out", "file"], "file is a file, not a folder"), (["--out", "cat.JPG"], "written as PNG"),
    (["--out", "mine", "--num", 2], "mine/00002.png already exists; give another --out"),
    (["--out", "linked"], "linked/00001.png already exists")]


@pytest.mark.parametrize("options, words", REFUSALS)
def test_refusals(run_sample, refused, weights, make_adapter, options, words):
    """One line that names the mistake, exit code 2, and no file."""
    make_adapter(base="another").save("runs/foreign/adapter.pt")
    for folder in ("runs/unfinished", "folder.png", "folder.gif", "mine", "linked"):
        Path(folder).mkdir()
    Path("mine/00002.png").write_text("mine")
    Path("linked/00001.png").symlink_to("missing.png")
    Path("file").write_text("")
    line = refused(sample.main, *CAT, "--steps", 1, "--weights", weights, *options)
    assert re.search(words, line), line


def test_a_file_that_may_not_be_written_is_refused(run_sample, refused, monkeypatch):
    """As with mode 444. Trap: it is replaced, since that needs the folder's permission alone."""
    Path("keep.png").write_text("mine")
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: (
        Path(path).name != "keep.png" and real(path, mode)))             # tests run as root
    line = refused(sample.main, *CAT, *STYLE, "--out", "keep.png")
    assert "keep.png is read-only; give another --out" in line


def test_links_are_followed(run_sample):
    """Trap: the link is replaced by a file."""
    for link, file in (("a.png", "b.png"), ("a.gif", "b.gif")):
        Path(file).write_text("old")
        Path(link).symlink_to(file)
    assert run_sample(*CAT, *STYLE, "--out", "a.png", "--trace", "a.gif")[0] == 0
    for link, file in (("a.png", "b.png"), ("a.gif", "b.gif")):
        assert Path(link).is_symlink()
        assert Path(file).read_bytes() != b"old"


def test_without_a_prompt(refused):
    assert 'give at least one prompt, such as --prompt "a cat"' in refused(sample.main)


def test_a_full_disk_is_noticed_before_sampling(run_sample, refused, monkeypatch):
    usage = SimpleNamespace(free=LEAST_FREE - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(StyleDrop, "load", lambda *_: pytest.fail("too late"))
    line = refused(sample.main, *CAT, *STYLE, "--out", "new/cats")
    assert "new/cats cannot be written: no space left on device; give another --out" in line
