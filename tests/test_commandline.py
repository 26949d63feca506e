"""commandline/: options with bounds, progress, mistakes as one line, notes about unknown words."""

import argparse
import os
import random
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TOKENIZER, Clock, noise_images

import data
import pretrain.clip
import pretrain.muse
import pretrain.superres
import pretrain.vqgan
import sample
import train
from commandline import terminal
from commandline.notes import knows_some, near_words, note_unknown, unknown_words
from commandline.options import LONGEST, Parser, filled, load_pipeline, number, text, whole
from commandline.terminal import EVERY, Progress, SamplingProgress, mistake_in, note, say
from commandline.tuning import TuningProgress, describe
from styledrop import Tuning

MAINS = {"train": train.main, "sample": sample.main, "pretrain.vqgan": pretrain.vqgan.main,
         "pretrain.clip": pretrain.clip.main, "pretrain.muse": pretrain.muse.main,
         "pretrain.superres": pretrain.superres.main}


def options_of(main, monkeypatch):
    """The argparse actions of a command, --help left out."""
    found = []

    def stop(parser, *_):
        found.extend(parser._actions)
        raise GeneratorExit

    monkeypatch.setattr(Parser, "parse_args", stop)
    with pytest.raises(GeneratorExit):
        main()
    monkeypatch.undo()
    return [action for action in found if "--help" not in action.option_strings]


# -- options

@pytest.mark.parametrize("command", MAINS)
def test_every_option_has_a_help_text(monkeypatch, command):
    for action in options_of(MAINS[command], monkeypatch):
        assert action.help, action.option_strings


@pytest.mark.parametrize("command", MAINS)
def test_the_help_is_printed(cli, command):
    """Trap: a percent sign in a help text, which argparse reads as a format."""
    code, out, err = cli(MAINS[command], "--help")
    assert code == 0 and err == ""
    assert "--device" in out


@pytest.mark.parametrize("command", MAINS)
@pytest.mark.parametrize("value", ["nan", "-inf", "1e99", "-1", "x", "1" * 9999, ""])
def test_every_number_has_both_bounds(refused, monkeypatch, command, value):
    main = MAINS[command]
    is_number = [action for action in options_of(main, monkeypatch)
                 if action.type not in (None, filled, text)]
    assert is_number
    for action in is_number:
        option, = action.option_strings
        assert option in refused(main, f"{option}={value}")


@pytest.mark.parametrize("kind, low, high, above, argument, expected", [
    (int, 1, 5, False, "1", 1), (int, 1, 5, False, "5", 5), (float, 0, 1, False, "0", 0),
    (float, 0, 1, True, "1e-9", 1e-9), (float, -1, 1, False, "-0.5", -0.5)])
def test_numbers_in_bounds(kind, low, high, above, argument, expected):
    assert number(kind, low, high, above)(argument) == expected


@pytest.mark.parametrize("kind, low, high, above, argument, words", [
    (int, 1, 5, False, "0", "at least 1 and at most 5"),
    (int, 1, 10**6, False, "1000001", "at most 1,000,000"),
    (int, 0, 2**62, False, str(2**62 + 1), "at most 4,611,686,018,427,387,904"),
    (float, 0, 1, True, "0", "above 0"), (float, 0, 1, False, "nan", "at least 0"),
    (int, 1, 5, False, "2.5", "'2.5' is not a whole number"),
    (float, 0, 1, False, "a", "'a' is not a number")])
def test_numbers_out_of_bounds(kind, low, high, above, argument, words):
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        number(kind, low, high, above)(argument)


@pytest.mark.parametrize("check, argument, words", [
    (filled, "", "is empty"), (filled, " ", "is empty"), (filled, "\udcff", "not valid UTF-8"),
    (text, "\udcff", "not valid UTF-8"), (text, "x" * (LONGEST + 1), "give at most 2,000"),
    (text, "x" * 100_000, "100,000 characters")])
def test_text_that_is_refused(check, argument, words):
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        check(argument)


def test_text_that_is_taken():
    assert text("") == ""
    assert filled("größer") == "größer"
    assert text("x" * LONGEST) == "x" * LONGEST


@pytest.fixture
def parser():
    parser = Parser()
    parser.add_argument("--ref", nargs="+", action="extend")
    parser.add_argument("--steps", type=whole(1, 9))
    parser.add_argument("--seed", type=number(float, -5, 5))
    return parser


@pytest.mark.parametrize("arguments, words", [
    (["--setps", "3"], "--setps"), (["--step", "3"], "--step"), (["--steps=--"], "has no value"),
    (["--ref", "-x.png"], "-x.png is not an option; if it is a value, write --ref=-x.png"),
    (["--ref", "a.png", "-x.png"], "write --ref=-x.png"),
    (["--seed", "-inf"], "write --seed=-inf"), (["--seed"], "expected one argument")])
def test_wrong_options(parser, arguments, words):
    """Traps: abbreviations; "expected at least one argument", though there was one."""
    with pytest.raises(ValueError, match=words):
        parser.parse_args(arguments)


def test_values_that_begin_with_a_dash(parser):
    """Written --option=-value, as the error message advises; numbers and words work as they are."""
    args = parser.parse_args(["--ref", "a.png", "--ref=-x.png", "--seed", "-1"])
    assert args.ref == ["a.png", "-x.png"]
    assert args.seed == -1
    assert parser.parse_args(["--ref", "-x and y.png"]).ref == ["-x and y.png"]


def test_without_a_second_stage_it_cannot_be_left_out(weights, weights2):
    args = argparse.Namespace(weights=weights, device="cpu", superres=False)
    with pytest.raises(ValueError, match="no second stage"):
        load_pipeline(args)
    args.weights = weights2
    assert load_pipeline(args).superres is not None


# -- the terminal

def test_control_characters_do_not_reach_the_terminal(capsys):
    """Trap: a file name or a config.json that clears the screen or writes a false line."""
    say("a\x1b[2Jb\tc\rd\n\x07e \u202e ü")
    note("f\x1b[0m")
    out, err = capsys.readouterr()
    assert out == "a\\x1b[2Jb\\tc\\rd\n\\x07e \\u202e ü\n"
    assert err == "note: f\\x1b[0m\n"


@pytest.mark.parametrize("encoding, line", [
    ("ascii", b"caf\\xe9\n"), ("latin-1", b"caf\xe9\n"), ("utf-8", b"caf\xc3\xa9\n")])
def test_a_terminal_of_few_letters(tmp_path, encoding, line):
    """Trap: the work is done, then the line that says so cannot be written."""
    with open(tmp_path / "out", "w", encoding=encoding) as stream:
        say("café", stream)
    assert (tmp_path / "out").read_bytes() == line


def test_the_reader_is_gone():
    """As in `| head -1`. Traps: a broken pipe ends the work, or the flush at exit does."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        say("one", stream)
        say("two", stream)


def test_there_is_no_terminal(monkeypatch):
    """As under pythonw."""
    monkeypatch.setattr(sys, "stdout", None)
    say("one")


def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error, line", [
    (ValueError("two\nlines"), "two lines"),
    (FileNotFoundError(2, "No such file", "a.png"), "a.png: no such file"),
    (OSError(28, "No space left on device"), "no space left on device"),
    (OSError("image file is truncated"), "image file is truncated")])
def test_mistakes_of_the_user(error, line):
    assert mistake_in(raising(error)) == line


def test_a_long_mistake_is_shortened():
    line = mistake_in(raising(ValueError("begin " + "x" * 9999 + " end")))
    assert len(line) < 500
    assert line.startswith("begin ") and line.endswith(" end")


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=["Python", "GPU", "CPU"])
def test_out_of_memory_is_one_line(refused, error):
    assert "out of memory" in refused(raising(error))


def test_a_bug_is_not_a_mistake_of_the_user():
    """Trap: bugs of ours under the line of missing memory, without a traceback."""
    with pytest.raises(RuntimeError, match="a bug"):
        mistake_in(raising(RuntimeError("a bug")))


def test_ctrl_c_is_silent(cli):
    assert cli(raising(KeyboardInterrupt())) == (130, "", "")


# -- progress

@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(terminal, "time", clock)
    return clock


@pytest.mark.parametrize("seconds, lines", [
    (1, ["5/12", "10/12", "12/12"]), (2.5, ["2/12", "4/12", "6/12", "8/12", "10/12", "12/12"]),
    (0.1, ["12/12"]), (60, [f"{i}/12" for i in range(1, 13)])])
def test_progress_is_said_every_five_seconds(clock, capsys, seconds, lines):
    """And at the end."""
    assert EVERY == 5
    progress = Progress("step")
    for step in range(12):
        clock.now += seconds
        progress(step + 1, 12, "loss 1.0")
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines()] == lines
    assert out.endswith(f"step 12/12  loss 1.0  {12 * seconds:.0f} s\n")


def test_progress_of_sampling_says_more_than_its_batches(clock, capsys):
    """Trap: a batch of 16 images takes a minute, and nothing is said meanwhile."""
    progress = SamplingProgress("image", 32)
    for done in (16, 32):
        for step in range(12):
            clock.now += 1
            progress.on_step(step, None, None)
        progress.on_batch(done)
    assert capsys.readouterr().out.splitlines() == [
        "image 0/32  step 5  5 s", "image 0/32  step 10  10 s", "image 16/32  step 3  15 s",
        "image 16/32  step 8  20 s", "image 32/32  24 s"]


def test_tuning_is_logged_and_said(pipe2, clock, capsys, monkeypatch):
    """Both stages, every step in the log, and the lines a few seconds apart."""
    tuning = Tuning(steps=7, lr=1e-3, batch=2, d_prj=2, is_shared=True, mask_power=1)
    second = replace(tuning, steps=3)
    monkeypatch.setattr("styledrop.SUPERRES", second)
    progress = TuningProgress()

    def slow_step(step, steps, loss):
        clock.now += 2
        progress(step, steps, loss)

    adapter = pipe2.tune(noise_images(1, 32), ["a cat"], "gold", tuning=tuning, on_step=slow_step)
    log = progress.log
    assert [line["stage"] for line in log] == ["first"] * 7 + ["second"] * 3
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    assert all(line["loss"] > 0 for line in log)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "first stage: step 3/7", "first stage: step 6/7", "first stage: step 7/7",
        "second stage: step 3/3"]
    ours = sum(p.numel() for p in adapter.adapter.parameters())
    base = sum(p.numel() for p in pipe2.muse.parameters())
    words = f"adapter: {ours:,} parameters, {ours / base:.2%} of the base's {base:,}"
    assert words in describe(pipe2, adapter)


# -- notes about prompts

@pytest.mark.parametrize("words, prompt, unknown", [
    ({"cat", "a", "in", "watercolor", "painting", "style"}, "a Catt in WATERCOLOR, painting style.",
     {"catt": ["cat"]}),
    ({"a", "cat", "house", "an", "owl"}, 'a cat! a house; "an owl"? zzz', {"zzz": []}),
    ({"cat", "[v]", "[v*]"}, "[V] cat [V*]", {}), ({"teapot"}, "pot", {"pot": ["teapot"]})])
def test_unknown_words(words, prompt, unknown):
    """Rare tokens and punctuation are none."""
    assert unknown_words(words, prompt) == unknown


@pytest.mark.parametrize("word, near", [
    ("potx", ["pot", "spot", "pots"]), ("teapot-and-cosy", ["teapot", "cosy", "pot"])])
def test_near_words_come_in_a_fixed_order(word, near):
    """Those spelled alike, then those inside. Trap: the order of a set, which changes from one
    process to the next.
    """
    words = ["pot", "pots", "potted", "teapot", "spot", "depot", "port", "part", "pat", "cosy",
             "tea"]
    for seed in range(20):
        random.Random(seed).shuffle(words)
        assert near_words(words, word) == near


def test_a_note_for_each_unknown_word(pipe, capsys):
    """Each once, whatever number of prompts has it."""
    note_unknown(pipe, "a catt in watercolor paintin style", "a catt in watercolor style")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "note: the base does not know 'catt'; similar known words: cat"
    assert second == "note: the base does not know 'paintin'; similar known words: painting"


def test_a_long_prompt_is_noted(pipe, capsys):
    note_unknown(pipe, "a cat " * 5)
    assert capsys.readouterr().err == ""
    note_unknown(pipe, "a cat " * 50)
    assert "longer than 16 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", [
    " ".join(f"word{i}" for i in range(5000)),
    "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=100_000))],
    ids=["5,000 unknown words", "a word of 100,000 letters"])
def test_notes_about_long_texts_are_quick(capsys, prompt):
    """Trap: every word is compared with every known word, and long ones letter by letter."""
    config = SimpleNamespace(text_length=16)
    pipe = SimpleNamespace(words=set(data.words()), tokenizer=TOKENIZER,
                           muse=SimpleNamespace(config=config))
    began = time.process_time()
    note_unknown(pipe, prompt)
    assert time.process_time() - began < 3
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 22
    assert all(len(line) < 200 for line in lines)


@pytest.mark.parametrize("phrase, known", [
    ("watercolor", True), ("blurry sws", True), ("Painting", True), ("sws", False),
    ("sws abstract", False), ("", True), ("watercolor.", True), ("sws, painting", True),
    ("...", False)])
def test_a_phrase_of_which_nothing_is_known(pipe, phrase, known):
    """Trap: a full stop makes a word unknown, and the style is renamed."""
    assert knows_some(pipe, phrase) == known
