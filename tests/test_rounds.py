"""Rounds of feedback: the pool, who chooses, a new adapter, going on after an interruption."""

import json
import math
import os
import platform
import socket
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise_images
from PIL import Image

import human_feedback
import sample
import train
from clip_feedback import style_score, text_score
from human_feedback import rounds as rounds_
from human_feedback.rounds import (FEEDBACK, alone, choose_at_random, choose_by_clip, measure,
                                   sample_pool)
from styledrop import StyleDrop, fingerprint, load_adapter, partial_prefix, to_uint8

PROMPTS = ["a cat", "a tree", "an owl"]
PERSON, CLIP = ["--feedback", "human"], ["--feedback", "clip"]
PICK = [*PERSON, "--pick", "1,5,9"]
read = lambda name: json.loads(Path("runs/a", name).read_text())
stamp = lambda: {
    str(path.relative_to("runs/a")): (path.read_bytes(), path.stat().st_mtime_ns)
    for path in Path("runs/a").rglob("*") if path.is_file()}


def killed(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """18 decoding steps and 100 of tuning teach a test nothing."""
    monkeypatch.setattr(StyleDrop, "generate", partialmethod(StyleDrop.generate, steps=2))
    monkeypatch.setattr(rounds_, "ROUND", dict(rounds_.ROUND, steps=3, d_prj=2))


@pytest.fixture
def rounds(cli, weights, picture, tmp_path):
    """rounds("--feedback", "clip", ...) -> exit code, stdout, stderr: runs/a with a tiny pool."""
    ref = picture()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return lambda *options: cli(
        train.main, *["--ref", ref] * ("--ref" not in options), "--content", "a house", "--style",
        "watercolor painting", "--weights", weights, "--steps", 2, "--pool", 4, "--pool-prompts",
        "prompts.txt", "--out", "runs/a", "--rounds", 2, *options)


@pytest.fixture
def unmoved(rounds):
    """unmoved(words, *options): refused in one line that has the words, and all files stay."""
    def run(words, *options):
        before = stamp()
        code, _, err = rounds(*options)
        assert code == 2 and words in err and err.count("\n") == 1 and stamp() == before, err
    return run


# -- the pool and the choice

def test_pool_and_choice(pipe, make_adapter):
    """K in a row for each prompt. Of these CLIP takes the one that a plain loop finds. Traps:
    pictures beside the wrong prompt; the best of the whole pool; style words in the text.
    """
    adapter = make_adapter()
    pool = sample_pool(pipe, PROMPTS, 6, adapter, seed=3)
    assert pool.contents == [p for p in PROMPTS for _ in range(6)] and len(pool.images) == 18
    assert pool.style == "watercolor painting"
    for i in (0, 5, 6, 17):
        one = pipe.generate(pool.contents[i], style=adapter, seed=3 + i)
        assert torch.allclose(one[0], pool.images[i], atol=1e-4)
    score = lambda i: text_score(pipe.clip, pool.images[i][None], pool.contents[i]).item()
    assert choose_by_clip(pipe, pool) == [max(range(6 * p, 6 * p + 6), key=score) for p in range(3)]
    draws = {tuple(choose_at_random(pipe, pool, torch.Generator().manual_seed(s)))
             for s in range(20)}
    assert len(draws) > 10 and all([i // 6 for i in draw] == [0, 1, 2] for draw in draws)


def test_measure(pipe):
    """By definition; where the reference's content was asked for, leakage says nothing."""
    images, references = noise_images(3, seed=1), noise_images(2, seed=2)
    contents = ["a cat", "a house", "a tree"]
    values = measure(pipe, images, contents, references, ["a house", "a teapot"])
    score = lambda text: text_score(pipe.clip, images, text)
    assert torch.allclose(values["text"], score(contents))
    assert torch.allclose(values["style"], style_score(pipe.clip, images, references))
    leaks = torch.maximum(score("a house"), score("a teapot")) > values["text"]
    assert math.isnan(values["leakage"][1])
    assert torch.equal(values["leakage"][::2], leaks[::2].float())


# -- the command

@pytest.mark.parametrize("name", FEEDBACK)
def test_two_rounds(rounds, calls, name):
    """Round 2 is a new, larger, unshared adapter, which sample.py finds. It learns the very
    pictures of the choice, with their prompts. Trap: the pool in another order, or all of it.
    """
    tuned, run = calls(StyleDrop, "tune"), Path("runs/a")
    assert rounds("--feedback", name)[::2] == (0, "") and sample.newest_run() == run
    assert {"round1", "round2", "rounds.png", "samples.png"} < set(os.listdir(run))
    first, second, newest = map(load_adapter, (run / "round1", run / "round2", run))
    assert second.config == dict(first.config, is_shared=False, d_prj=2)
    assert fingerprint(second.state_dict()) == fingerprint(newest.state_dict())
    assert list(read("scores.json")) == ["base", "round 1", "round 2", "scorer"]
    _, ((_, images, contents, style, *_), _) = tuned
    assert contents == PROMPTS and style == "watercolor painting"
    sheet = np.asarray(Image.open(run / "round2/pool.png"))
    chosen = read("round2/choice.json")["chosen"]
    for row, (i, image) in enumerate(zip(chosen, to_uint8(images), strict=True)):
        x = 16 * (i - 4 * row)
        assert np.array_equal(sheet[16 * row:16 * row + 16, x:x + 16], image)


@pytest.mark.parametrize("part", ["tune", "sample_pool", "choose", "write_log", "compare_rounds"])
def test_interrupted_or_not_it_is_the_same(rounds, monkeypatch, part):
    """Ctrl-C in any part of round 2. Trap: everything from the start again."""
    owner = StyleDrop if part == "tune" else rounds_
    real, in_round_2 = getattr(owner, part), lambda a: part != "tune" or len(a[1]) > 1
    with monkeypatch.context() as patch:
        patch.setattr(owner, part, lambda *a, **k: (killed if in_round_2(a) else real)(*a, **k))
        assert rounds(*CLIP)[0] == 130
    before = stamp()
    code, out, _ = rounds(*CLIP)
    after = stamp()
    assert code == 0 and "going on" in out
    assert all(after[name] == old for name, old in before.items()
               if name not in ("adapter.pt", "config.json"))
    Path("runs/a").rename("mine")
    rounds(*CLIP)
    whole = stamp()
    assert {name: after[name][0] for name in after} == {name: whole[name][0] for name in whole}


@pytest.mark.parametrize("first, who", [(CLIP, "clip chose"), (PICK, "human chose 1, 5, 9")])
@pytest.mark.parametrize("options, words", [
    (["--feedback", "random"], "feedback ("), ([*PERSON, "--pick", 2], "chosen ("),
    (["--pool-prompts", "other.txt", "--pool", 5, "--seed", 1], "prompts, pool, seed (")])
def test_no_choice_is_ever_replaced(rounds, unmoved, first, who, options, words):
    """Whether made by CLIP or by a person. The line says what is there, and what to do. Trap: pool,
    choice and adapter of round 2, or all, are replaced in silence.
    """
    assert rounds(*first)[::2] == (0, "")
    Path("other.txt").write_text("a cat\na tree\n")
    unmoved(words + who, *first[:2], *options)


def test_clicks_that_are_not_ended_are_not_lost(rounds, unmoved, monkeypatch):
    """Traps: Ctrl-C, then CLIP's choice for the person's; contact sheets removed by a pattern."""
    def stopped(images, prompts, reference, path, **options):
        human_feedback.Picking(images, prompts, path).change(3, True)
        raise KeyboardInterrupt
    monkeypatch.setattr(human_feedback, "pick", stopped)
    assert rounds(*PERSON)[0] == 130
    Path("runs/a/round2/sheet_mine.png").write_text("mine")
    before = stamp()
    unmoved("picking.json", *CLIP)
    assert rounds(*PICK)[0] == 0
    for name in ("picking.json", "sheet_mine.png"):
        assert stamp()[f"round2/{name}"] == before[f"round2/{name}"]


@pytest.mark.parametrize("options, words", [
    (["--pick", "99"], "1..12"), (["--pick", ""], "1..12"),
    (["--port", "PORT"], "port PORT"), (["--pool", 1024, "--pool-prompts", "many.txt"], "5,000")])
def test_what_would_be_found_late_is_found_first(unmoved, monkeypatch, options, words):
    """A wrong --pick, a port in use, a pool too large: before the base is even read."""
    Path("many.txt").write_text("a cat\n" * 50)
    monkeypatch.setattr(StyleDrop, "load", lambda *_: pytest.fail("too late"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        options = [port if word == "PORT" else word for word in options]
        unmoved(words.replace("PORT", port), *PERSON, *options)
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["config", "round2/pool", "round2/choice", "round2/picking",
                                  "round2/adapter"])
def test_damaged_files(rounds, unmoved, name):
    """One line, and nothing is made over the damage."""
    rounds(*PICK)
    path, damage = Path(f"runs/a/{name}.json"), [b"", b"[]", b"\xff", b"[" * 100_000]
    for content in damage:
        path.write_bytes(content)
        unmoved(path.name, *PERSON)


def test_a_person_chooses(rounds, monkeypatch):
    """The page gets the pool, its prompts and the references; what it returns is learned. The same
    command on the finished run leaves it, also where the reference lies elsewhere by now.
    """
    asked = []
    monkeypatch.setattr(human_feedback, "pick", lambda images, prompts, reference, path, **k: (
        asked.append((images.shape, prompts, reference.shape)) or [1, 2, 9]))
    assert rounds(*PERSON)[0] == 0 and "round2/sheet1.png" in stamp()
    assert asked == [((12, 16, 16, 3), [p for p in PROMPTS for _ in range(4)], (1, 16, 16, 3))]
    assert load_adapter("runs/a").about["prompts"] == ["a cat", "a cat", "an owl"]
    before = stamp()
    Path("ref.png").rename("other.png")
    code, out, _ = rounds(*PERSON, "--ref", "other.png")
    assert code == 0 and "is finished" in out and stamp() == before and len(asked) == 1


def test_numbers_are_of_the_last_round(rounds, cli, unmoved, weights):
    """Traps: --pick for round 3 chooses in round 2 anew; a command with fewer rounds, or without
    any, replaces the folder by a fresh round 1, with every choice of a person's in it.
    """
    rounds(*PICK)
    assert rounds(*PERSON, "--pick", "1,2,6", "--rounds", 3)[0] == 0
    assert [read(f"round{k}/choice.json")["chosen"] for k in (2, 3)] == [[0, 4, 8], [0, 1, 5]]
    assert load_adapter("runs/a/round3").about["prompts"] == ["a cat", "a cat", "a tree"]
    assert len(read("scores.json")) == 5
    unmoved("give --rounds", *PERSON)                       # two of three
    before = stamp()
    code, _, err = cli(train.main, "--ref", "ref.png", "--weights", weights, "--out", "runs/a")
    assert code == 2 and "give --rounds" in err and stamp() == before


def test_two_commands_do_not_share_a_run(tmp_path):
    """Traps: two pages on one pool, the later choice counts; a killed container has its old PID."""
    lock = tmp_path / f".partial-{platform.node()}-{os.getppid()}-lock"
    lock.touch()
    with pytest.raises(ValueError, match=f"another command works on .*remove {lock}"):
        with alone(tmp_path):
            pass
    lock.rename(tmp_path / f"{partial_prefix()}lock")
    with alone(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
