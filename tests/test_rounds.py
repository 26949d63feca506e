"""Rounds of feedback: the pool, who chooses, a new adapter, going on after an interruption."""

import json
import math
import shutil
import socket
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
from styledrop import StyleDrop, load_adapter, to_uint8

PROMPTS = ["a cat", "a tree", "an owl"]
PERSON, CLIP = ["--feedback", "human"], ["--feedback", "clip"]
PICK = [*PERSON, "--pick", "1,5,9"]
stamp = lambda folder="runs/a": {
    str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
    for path in Path(folder).rglob("*") if path.is_file()}


def killed(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """18 decoding steps and 100 of tuning teach a test nothing."""
    real = StyleDrop.generate
    monkeypatch.setattr(StyleDrop, "generate",
                        lambda self, *a, **k: real(self, *a, **{**k, "steps": 2}))
    monkeypatch.setitem(rounds_.ROUND, "steps", 3), monkeypatch.setitem(rounds_.ROUND, "d_prj", 2)


@pytest.fixture
def rounds(cli, weights, picture, tmp_path):
    """rounds("--feedback", "clip", ...) -> exit code, stdout, stderr: runs/a with a tiny pool."""
    ref = picture()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return lambda *options: cli(
        train.main, "--ref", ref, "--content", "a house", "--style", "watercolor painting",
        "--weights", weights, "--steps", 2, "--pool", 4, "--pool-prompts", "prompts.txt",
        "--out", "runs/a", "--rounds", 2, *options)


@pytest.fixture
def unmoved(rounds):
    """unmoved(words, *options): refused in one line that has the words, and all files stay."""
    def run(words, *options):
        before = stamp()
        code, _, err = rounds(*options)
        assert code == 2 and words in err and err.count("\n") == 1 and stamp() == before, err
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def finished(rounds, made):
    """finished(*options): runs/a as rounds(*options) leaves it, which is made only once."""
    def run(*options):
        kept = made / "-".join(["run", *options])
        if not kept.exists():
            assert rounds(*options)[::2] == (0, "")
            Path("runs/a").rename(kept)
        shutil.copytree(kept, "runs/a")
    return run


# -- the pool and the choice

@pytest.fixture
def pool(pipe):
    return sample_pool(pipe, PROMPTS, 4)


def test_pool_is_ordered_by_prompt(pipe, make_adapter):
    """K pictures in a row for each prompt, however they were batched.

    Trap: pictures beside the wrong prompt.
    """
    adapter, seen = make_adapter(), []
    pool = sample_pool(pipe, PROMPTS, 6, adapter, seed=3, on_batch=seen.append)
    assert pool.contents == [p for p in PROMPTS for _ in range(6)] and seen == [16, 18]
    assert pool.style == "watercolor painting" and pool.images.shape == (18, 3, 16, 16)
    for i in (0, 5, 6, 15, 16, 17):
        one = pipe.generate(pool.contents[i], style=adapter, seed=3 + i)
        assert np.array_equal(to_uint8(one)[0], to_uint8(pool.images)[i])


def test_one_of_each_prompt_is_chosen(pipe, pool):
    """CLIP's against a plain loop over pictures; at random it is any.

    Traps: the best of the whole pool, or the text with the words of the style.
    """
    pool.style = "watercolor painting"
    score = lambda i: text_score(pipe.clip, pool.images[i][None], pool.contents[i]).item()
    best = [max(range(4 * p, 4 * p + 4), key=score) for p in range(3)]
    assert choose_by_clip(pipe, pool) == best
    draws = {tuple(choose_at_random(pipe, pool, torch.Generator().manual_seed(s)))
             for s in range(20)}
    assert len(draws) > 10 and all([i // 4 for i in draw] == [0, 1, 2] for draw in draws)


def test_measure(pipe):
    """The three scores against their definitions; where the reference's content was asked for,
    leakage says nothing.
    """
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
def test_two_rounds(rounds, monkeypatch, name):
    """Adapters, pool, choice and scores are kept; round 2 is a new, larger, unshared adapter, which
    sample.py finds. It learns the very pictures of the choice, with the prompts that made them.

    Trap: the pool in another order, or all of it.
    """
    calls, real, run = [], StyleDrop.tune, Path("runs/a")
    monkeypatch.setattr(StyleDrop, "tune",
                        lambda self, *a, **k: calls.append(a) or real(self, *a, **k))
    assert rounds("--feedback", name)[::2] == (0, "")
    assert sorted(p.name for p in run.iterdir()) == [
        "adapter.pt", "config.json", "log.jsonl", "round1", "round2", "rounds.png", "samples.png",
        "scores.json"]
    first, second, newest = map(load_adapter, (run / "round1", run / "round2", run))
    assert first.config.items() >= dict(is_shared=True, d_prj=4).items()
    assert second.config == dict(first.config, is_shared=False, d_prj=2)
    assert all(torch.equal(p, newest.state_dict()[k]) for k, p in second.state_dict().items())
    assert sample.newest_run() == run
    scores = json.loads((run / "scores.json").read_text())
    assert list(scores) == ["base", "round 1", "round 2", "scorer"]
    assert set(scores["base"]) == {"text", "style", "leakage"}
    _, (images, contents, style, *_) = calls
    assert contents == PROMPTS and style == "watercolor painting"
    sheet = np.asarray(Image.open("runs/a/round2/pool.png"))
    chosen = json.loads((run / "round2/choice.json").read_text())["chosen"]
    for row, (i, image) in enumerate(zip(chosen, to_uint8(images), strict=True)):
        x = 16 * (i - 4 * row)
        assert np.array_equal(sheet[16 * row:16 * row + 16, x:x + 16], image)


@pytest.mark.parametrize("part", ["tune", "sample_pool", "choose", "write_log", "compare_rounds"])
def test_interrupted_or_not_it_is_the_same(rounds, finished, monkeypatch, part):
    """Ctrl-C in any part of round 2: what is there stays as it is, and all ends in the same bytes.

    Trap: everything from the start again.
    """
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
    finished(*CLIP)
    whole = stamp()
    assert after.keys() == whole.keys() and all(
        after[name][0] == whole[name][0] for name in after if name != "config.json")    # its paths


def test_the_same_command_on_a_finished_run_leaves_it(rounds, finished):
    """Also where the reference lies elsewhere by now."""
    finished(*CLIP)
    Path("runs/a/notes.txt").write_text("mine")
    Path("ref.png").rename("other.png")
    before = stamp()
    code, out, _ = rounds("--ref", "other.png")
    assert code == 0 and "is finished" in out and stamp() == before


@pytest.mark.parametrize("first, who", [(CLIP, "clip chose"), (PICK, "human chose 1, 5, 9"),
                                        (PERSON, "human chose 1, 5, 9")])
@pytest.mark.parametrize("options, words", [
    (["--feedback", "random"], "feedback ("), (["--pool", 5], "pool ("), (["--seed", 1], "seed ("),
    (["--pool-prompts", "other.txt"], "prompts ("), ([*PERSON, "--pick", 2], "chosen ("),
    (["--content", "a cat", "--lr", 1e-4], "lr, content;"), (["--ref", "b.png"], "pictures;")])
def test_no_choice_is_ever_replaced(finished, unmoved, picture, monkeypatch, first, who, options,
                                    words):
    """Whether made by CLIP, by number or on the page. The line says what is there, and what to do.

    Trap: pool, choice and adapter of round 2, or all, are replaced in silence.
    """
    monkeypatch.setattr(human_feedback, "pick", lambda *a, **k: [0, 4, 8])
    finished(*first)
    Path("other.txt").write_text("a cat\na tree\n")
    picture("b.png", 7)
    unmoved(words + who * words.endswith("("), *first[:2], *options)


def test_clicks_that_are_not_ended_are_not_lost(rounds, unmoved, monkeypatch):
    """Nor are other people's files. Traps: Ctrl-C on the page, then CLIP's choice for the person's;
    old contact sheets are removed by a pattern.
    """
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
    (["--pick", "99"], "1..12"), (["--pick", "x"], "1..12"), (["--pick", ""], "1..12"),
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


JUNK = [b"", b"[]", b"3", b"{", b"\xff", b"[" * 100_000, b'{"a": ' * 20_000]
CHOSEN = [None, [], "all", [99], ["1"], [True], {"1": 2}, [[1]], [-1]]


@pytest.mark.parametrize("name, damage", [
    *[(name, junk) for name in ("config", "round2/pool", "round2/choice", "round2/picking",
                                "round2/adapter") for junk in JUNK],
    *[("round2/choice", chosen) for chosen in CHOSEN]])
def test_damaged_files(finished, unmoved, name, damage):
    """One line, and nothing is made over the damage."""
    finished(*PICK)
    path = Path(f"runs/a/{name}.json")
    if not isinstance(damage, bytes):
        damage = json.dumps(json.loads(path.read_text()) | dict(chosen=damage)).encode()
    path.write_bytes(damage)
    unmoved(path.name, *PERSON)


def test_a_person_chooses(rounds, monkeypatch):
    """The page gets the pool, its prompts and the references; what it returns is learned;
    asked only once.
    """
    asked = []
    monkeypatch.setattr(human_feedback, "pick", lambda images, prompts, reference, path, **k: (
        asked.append((images.shape, prompts, reference.shape)) or [1, 2, 9]))
    assert rounds(*PERSON)[0] == rounds(*PERSON)[0] == 0
    assert asked == [((12, 16, 16, 3), [p for p in PROMPTS for _ in range(4)], (1, 16, 16, 3))]
    assert load_adapter("runs/a").about["prompts"] == ["a cat", "a cat", "an owl"]
    assert [path.name for path in Path("runs/a/round2").glob("sheet*.png")] == ["sheet1.png"]


def test_numbers_are_of_the_last_round(finished, rounds, cli, unmoved, weights):
    """Traps: --pick for round 3 chooses in round 2 anew; a command with fewer rounds, or without
    any, replaces the folder by a fresh round 1, with every choice of a person's in it.
    """
    finished(*PICK)
    assert rounds(*PERSON, "--pick", "1,2,6", "--rounds", 3)[0] == 0
    assert [json.loads(Path(f"runs/a/round{k}/choice.json").read_text())["chosen"]
            for k in (2, 3)] == [[0, 4, 8], [0, 1, 5]]
    assert load_adapter("runs/a/round3").about["prompts"] == ["a cat", "a cat", "a tree"]
    assert len(json.loads(Path("runs/a/scores.json").read_text())) == 5
    unmoved("give --rounds", *PERSON)                       # two of three
    before = stamp()
    code, _, err = cli(train.main, "--ref", "ref.png", "--weights", weights, "--out", "runs/a")
    assert code == 2 and "give --rounds" in err and stamp() == before


def test_two_commands_do_not_share_a_run(tmp_path):
    """Trap: two pages are open on one pool, and the later choice replaces the one that was taught."""
    with alone(tmp_path):
        with pytest.raises(ValueError, match="another command works on"):
            with alone(tmp_path):
                pass
    with alone(tmp_path):                                    # both have ended: it is free again
        pass
    assert not list(tmp_path.iterdir())
