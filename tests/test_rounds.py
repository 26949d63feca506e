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

import clip_feedback
import human_feedback
import sample
import train
from styledrop import (FEEDBACK, choose_at_random, choose_by_clip, load_adapter, measure,
                       sample_pool, style_prompt, to_uint8)

PROMPTS = ["a cat", "a tree", "an owl"]
stamp = lambda folder: {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
                        for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """36 decoding steps teach a test nothing."""
    real = train.StyleDrop.generate
    monkeypatch.setattr(train.StyleDrop, "generate",
                        lambda self, *a, **k: real(self, *a, **{**k, "steps": 2}))


@pytest.fixture
def rounds(cli, weights, picture, tmp_path):
    """rounds("--feedback", "clip", ...) -> exit code, stdout, stderr: runs/a with a tiny pool."""
    ref = picture()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return lambda *options: cli(
        train.main, "--ref", ref, "--content", "a house", "--style", "watercolor painting",
        "--weights", weights, "--steps", 2, "--round-steps", 3, "--round-d-prj", 2, "--pool", 4,
        "--pool-prompts", "prompts.txt", "--out", "runs/a", "--rounds", 2, *options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def finished(rounds, made):
    """finished(options): runs/a as rounds(options) leaves it, which is made only once."""
    def run(*options):
        kept = made / "-".join(["run", *options])
        if kept.exists():
            shutil.copytree(kept, "runs/a")
        else:
            assert rounds(*options)[0] == 0
            shutil.copytree("runs/a", kept)
    return run


@pytest.fixture
def pool(pipe):
    return sample_pool(pipe, PROMPTS, 4, steps=2)


# -- the pool and the choice

def test_pool_is_ordered_by_prompt(pipe, make_adapter):
    """K pictures in a row for each prompt, however they were batched.

    Trap: pictures beside the wrong prompt.
    """
    adapter, seen = make_adapter(), []
    pool = sample_pool(pipe, PROMPTS, 4, adapter, seed=3, at_once=5, on_batch=seen.append)
    assert pool.contents == [p for p in PROMPTS for _ in range(4)]
    assert pool.style == "watercolor painting"
    assert seen == [5, 10, 12] and pool.images.shape == (12, 3, 16, 16)
    assert torch.equal(pool.images[5:10], pipe.generate(pool.contents[5:10], style=adapter, seed=8))


def test_pool_gives_each_prompt_its_style_phrase(pipe, monkeypatch):
    """Trap: phrases out of step with the pictures where a batch ends in the middle of a prompt."""
    seen = []
    monkeypatch.setattr(
        type(pipe), "generate", lambda self, prompts, style, seed, style_phrase: seen.extend(
            zip(prompts, style_phrase)) or torch.zeros(len(prompts), 3, 16, 16))
    phrases = ["gold", "", "blue"]
    sample_pool(pipe, PROMPTS, 4, at_once=5, style_phrase=phrases)
    assert seen == [pair for pair in zip(PROMPTS, phrases) for _ in range(4)]
    seen.clear()
    monkeypatch.setattr(type(pipe), "generate", lambda self, prompts, style, seed, style_phrase:
                        seen.append(style_phrase) or torch.zeros(len(prompts), 3, 16, 16))
    sample_pool(pipe, PROMPTS, 4, at_once=5, style_phrase="gold")
    assert seen == ["gold"] * 3


@pytest.mark.parametrize("style_words", [False, True])
def test_clip_chooses_each_prompts_best(pipe, pool, style_words):
    """Against a plain loop over pictures.

    Traps: the best of the whole pool, or the text with the wrong words.
    """
    pool.style = "watercolor painting"
    expected = []
    for p, prompt in enumerate(PROMPTS):
        text = style_prompt(prompt, pool.style) if style_words else prompt
        scores = [
            clip_feedback.text_score(pipe.clip, pool.images[i][None], text).item()
            for i in range(4 * p, 4 * p + 4)
        ]
        expected.append(4 * p + int(np.argmax(scores)))
    assert choose_by_clip(pipe, pool, None, style_words) == expected


def test_random_choice_is_one_of_each_prompt(pipe, pool):
    draws = {
        tuple(choose_at_random(pipe, pool,
                               torch.Generator().manual_seed(s)))
        for s in range(20)
    }
    assert len(draws) > 10 and all([i // 4 for i in draw] == [0, 1, 2] for draw in draws)


@pytest.mark.parametrize("name", FEEDBACK)
def test_choices_share_a_signature(pipe, pool, name):
    chosen = FEEDBACK[name](pipe, pool, torch.Generator().manual_seed(0))
    assert chosen == sorted(chosen) and len(chosen) == 3 and all(isinstance(i, int) for i in chosen)


def test_measure(pipe):
    """The three scores against their definitions; where the reference's content was asked for,
    leakage says nothing.
    """
    images, references = noise_images(3, seed=1), noise_images(2, seed=2)
    values = measure(pipe, images, ["a cat", "a house", "a tree"], references,
                     ["a house", "a teapot"])
    score = lambda text: clip_feedback.text_score(pipe.clip, images, text)
    assert torch.allclose(
        values["text"], clip_feedback.text_score(pipe.clip, images, ["a cat", "a house", "a tree"]))
    assert torch.allclose(values["style"], clip_feedback.style_score(pipe.clip, images, references))
    leaks = torch.maximum(score("a house"), score("a teapot")) > values["text"]
    assert math.isnan(values["leakage"][1])
    assert [bool(values["leakage"][i]) for i in (0, 2)] == [bool(leaks[i]) for i in (0, 2)]


# -- the command

def test_two_rounds(rounds, pipe):
    """Both adapters, pool, choice and scores are kept; round 2 is a new, larger,
    unshared one that sample.py finds.
    """
    code, out, err = rounds()
    assert code == 0 and err == ""
    run = Path("runs/a")
    assert sorted(p.name for p in run.iterdir()) == [
        "adapter.pt", "config.json", "log.jsonl", "round1", "round2", "rounds.png", "samples.png",
        "scores.json"
    ]
    first, second, newest = load_adapter(run / "round1"), load_adapter(run /
                                                                       "round2"), load_adapter(run)
    assert first.config["is_shared"] and first.config["d_prj"] == 4
    assert second.config == dict(first.config, is_shared=False, d_prj=2)
    assert all(torch.equal(p, newest.state_dict()[k]) for k, p in second.state_dict().items())
    assert sample.newest_run() == run
    scores = json.loads((run / "scores.json").read_text())
    assert list(scores) == ["base", "round 1", "round 2", "scorer"]
    assert set(scores["base"]) == {"text", "style", "leakage"}


def test_the_choice_is_what_round_two_learns(rounds, pipe, monkeypatch):
    """The very pictures of the pool, with the prompts that made them.

    Trap: the pool in another order, or all of it.
    """
    calls, real = [], train.StyleDrop.tune
    monkeypatch.setattr(train.StyleDrop, "tune",
                        lambda self, *a, **k: calls.append(a) or real(self, *a, **k))
    rounds("--feedback", "random")
    _, (images, contents, style, *_) = calls
    sheet = np.asarray(Image.open("runs/a/round2/pool.png"))
    chosen = json.loads(Path("runs/a/round2/choice.json").read_text())["chosen"]
    assert contents == PROMPTS and style == "watercolor painting" and len(chosen) == 3
    for i, image in zip(chosen, to_uint8(images)):
        row, column = divmod(i, 4)
        assert np.array_equal(sheet[16 * row:16 * row + 16, 16 * column:16 * column + 16], image)


def test_goes_on_after_an_interruption(rounds, monkeypatch):
    """Killed while round 2 is taught: pool and choice stay as they are.

    Trap: everything from the start again.
    """
    real = train.StyleDrop.tune

    def killed(self, images, *a, **k):
        if len(images) > 1:
            raise KeyboardInterrupt
        return real(self, images, *a, **k)
    monkeypatch.setattr(train.StyleDrop, "tune", killed)
    assert rounds()[0] == 130
    before = stamp("runs/a")
    assert {"round2/pool.png", "round2/choice.json"} <= before.keys()
    assert "round2/adapter.pt" not in before
    monkeypatch.setattr(train.StyleDrop, "tune", real)
    code, out, _ = rounds()
    after = stamp("runs/a")
    assert code == 0 and "going on" in out
    assert all(after[name] == old for name, old in before.items()
               if name not in ("adapter.pt", "config.json"))


def test_the_same_bytes_interrupted_or_not(rounds, monkeypatch, tmp_path):
    rounds()
    whole = {name: old for name, (old, _) in stamp("runs/a").items()}
    for path in ("round2/adapter.pt", "round2/adapter.json", "rounds.png"):
        Path("runs/a", path).unlink()
    rounds()
    assert {name: old for name, (old, _) in stamp("runs/a").items()} == whole


@pytest.mark.parametrize("options, words", [
    (["--feedback", "random"], "feedback"), (["--pool", 5], "pool"),
    (["--style-words"], "style-words"), (["--round-steps", 4], "steps"),
    (["--round-lr", 0.01], "lr"), (["--round-d-prj", 3], "d-prj"),
    (["--pool-prompts", "other.txt"], "prompts")])
def test_another_wish_is_refused(rounds, finished, options, words):
    """Trap: pool, choice and adapter of round 2 are replaced in silence."""
    finished()
    Path("other.txt").write_text("a cat\na tree\n")
    before = stamp("runs/a")
    code, _, err = rounds(*options)
    assert code == 2 and f"another {words}" in err and "--out" in err and err.count("\n") == 1
    assert stamp("runs/a") == before


@pytest.mark.parametrize("first", [["--pick", "1,5,9"], []])
@pytest.mark.parametrize("options, words", [
    (["--feedback", "clip"], "another feedback (human chose 1, 5, 9)"),
    (["--pool", 5], "another pool (human chose 1, 5, 9)"),
    (["--seed", 1], "another seed (human chose 1, 5, 9)"),
    (["--pick", "2"], "another chosen (human chose 1, 5, 9)"),
    (["--steps", 3], "another steps;"), (["--batch", 4], "another batch;"),
    (["--style", "flat vector"], "another style;")])
def test_a_persons_choice_is_never_replaced(rounds, finished, monkeypatch, first, options, words):
    """Whether made by number or on the page. The line says what is there, and what to do."""
    monkeypatch.setattr(human_feedback, "pick", lambda *a, **k: [0, 4, 8])
    finished("--feedback", "human", *first)
    before = stamp("runs/a")
    code, _, err = rounds("--feedback", "human", *options)
    assert code == 2 and words in err and "--out" in err and err.count("\n") == 1
    assert stamp("runs/a") == before


def test_clicks_that_are_not_ended_are_not_lost(rounds, monkeypatch):
    """Trap: Ctrl-C on the page, then CLIP's choice for the person's."""
    def stopped(images, prompts, reference, path, **options):
        human_feedback.Picking(images, prompts, path).change(3, True)
        raise KeyboardInterrupt
    monkeypatch.setattr(human_feedback, "pick", stopped)
    assert rounds("--feedback", "human")[0] == 130
    before = stamp("runs/a")
    code, _, err = rounds("--feedback", "clip")
    assert code == 2 and "picking.json" in err and stamp("runs/a") == before
    assert rounds("--feedback", "human", "--pick", "4,5")[0] == 0
    assert stamp("runs/a")["round2/picking.json"] == before["round2/picking.json"]


def test_the_same_command_on_a_finished_run_leaves_it(rounds):
    rounds()
    Path("runs/a/notes.txt").write_text("mine")
    before = stamp("runs/a")
    code, out, _ = rounds()
    assert code == 0 and "is finished" in out and stamp("runs/a") == before


def test_foreign_files_stay(rounds, monkeypatch):
    """Trap: old contact sheets are removed by a pattern."""
    monkeypatch.setattr(human_feedback, "pick", lambda *a, **k: [0])
    Path("runs/a/round2").mkdir(parents=True)
    assert rounds()[0] == 2                                 # not a run folder
    Path("runs/a/round2").rmdir(), Path("runs/a").rmdir()
    monkeypatch.setattr(human_feedback, "pick", killed)
    assert rounds("--feedback", "human")[0] == 130
    Path("runs/a/round2/sheet_mine.png").write_text("mine")
    monkeypatch.setattr(human_feedback, "pick", lambda *a, **k: [0])
    assert rounds("--feedback", "human")[0] == 0
    assert Path("runs/a/round2/sheet_mine.png").read_text() == "mine"


def killed(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("options, words", [
    (["--pick", "99"], "1..12"), (["--pick", "x"], "1..12"), (["--port", "PORT"], "PORT"),
    (["--pool", 1024, "--pool-prompts", "many.txt"], "5,000")])
def test_what_would_be_found_late_is_found_first(rounds, monkeypatch, options, words):
    """A wrong --pick, a port in use, a pool too large: before the base is even read."""
    Path("many.txt").write_text("a cat\n" * 50)
    monkeypatch.setattr(train.StyleDrop, "load", lambda *_: pytest.fail("too late"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, err = rounds("--feedback", "human",
                              *(port if word == "PORT" else word for word in options))
    assert code == 2 and words.replace("PORT", f"port {port}") in err and err.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["config.json", "round2/pool.json", "round2/choice.json",
                                  "round2/picking.json", "round2/adapter.json"])
@pytest.mark.parametrize("damage", [b"", b"[]", b"3", b"{", b"\xff", b"[" * 100_000,
                                    b'{"a": ' * 20_000])
def test_damaged_files(rounds, finished, name, damage):
    """One line, and nothing is made over the damage."""
    finished("--feedback", "human", "--pick", "3,7")
    Path("runs/a", name).write_bytes(damage)
    before = stamp("runs/a")
    code, _, err = rounds("--feedback", "human", "--pick", "3,7")
    assert code == 2 and err.count("\n") == 1 and name.split("/")[-1] in err
    assert stamp("runs/a") == before


@pytest.mark.parametrize("chosen", [None, [], "all", [99], ["1"], [True], {"1": 2}, [[1]]])
def test_a_choice_of_another_type(rounds, finished, chosen):
    finished("--feedback", "random")
    path = Path("runs/a/round2/choice.json")
    path.write_text(json.dumps(dict(json.loads(path.read_text()), chosen=chosen)))
    before = stamp("runs/a")
    code, _, err = rounds("--feedback", "random")
    assert code == 2 and "choice.json" in err and err.count("\n") == 1
    assert stamp("runs/a") == before


def test_rounds_are_not_lost_to_another_command(rounds, picture):
    """Trap: the folder is replaced by a fresh round 1, with every choice of a person's in it."""
    rounds()
    before = stamp("runs/a")
    for options, words in ((["--seed", 1], "another seed (clip chose"),
                           (["--content", "a hut", "--lr", 1e-4], "another lr, content;")):
        code, _, err = rounds(*options)
        assert code == 2 and words in err and stamp("runs/a") == before
    picture(seed=7)                                         # another picture of the same name
    assert "another pictures;" in rounds()[2] and stamp("runs/a") == before


def test_rounds_are_not_lost_to_a_command_without_them(cli, rounds, picture, weights):
    rounds("--rounds", 3)
    before = stamp("runs/a")
    code, _, err = cli(train.main, "--ref", picture(), "--weights", weights, "--out", "runs/a")
    assert code == 2 and "--rounds" in err and stamp("runs/a") == before
    code, _, err = rounds()                                 # two of three
    assert code == 2 and "--rounds" in err and stamp("runs/a") == before


def test_the_same_picture_by_another_path_goes_on(rounds):
    rounds()
    Path("there").mkdir()
    Path("ref.png").rename("there/other.png")
    before = stamp("runs/a")
    code, out, _ = rounds("--ref", "there/other.png")
    assert code == 0 and "is finished" in out and stamp("runs/a") == before


def test_three_rounds(rounds):
    assert rounds("--rounds", 3)[0] == 0
    assert load_adapter("runs/a/round3").about["prompts"] == PROMPTS
    assert len(json.loads(Path("runs/a/scores.json").read_text())) == 5


def test_a_person_chooses(rounds, monkeypatch):
    """The page gets the pool, its prompts and the references; what it returns is learned;
    asked only once.
    """
    asked = []

    def pick(images, prompts, reference, chosen_path, **options):
        asked.append((images.shape, prompts, reference.shape))
        return [1, 2, 9]
    monkeypatch.setattr(human_feedback, "pick", pick)
    assert rounds("--feedback", "human")[0] == 0 and rounds("--feedback", "human")[0] == 0
    assert asked == [((12, 16, 16, 3), [p for p in PROMPTS for _ in range(4)], (1, 16, 16, 3))]
    assert load_adapter("runs/a").about["prompts"] == ["a cat", "a cat", "an owl"]
    assert [path.name for path in Path("runs/a/round2").glob("sheet*.png")] == ["sheet1.png"]


def test_choice_by_number(rounds):
    assert rounds("--feedback", "human", "--pick", "3,7")[0] == 0
    assert json.loads(Path("runs/a/round2/choice.json").read_text())["chosen"] == [2, 6]


def test_numbers_are_of_the_last_round(rounds):
    """Trap: --pick for round 3 chooses in round 2 anew."""
    rounds("--feedback", "human", "--pick", "3,7")
    assert rounds("--feedback", "human", "--pick", "1,2,5", "--rounds", 3)[0] == 0
    assert [json.loads(Path(f"runs/a/round{k}/choice.json").read_text())["chosen"]
            for k in (2, 3)] == [[2, 6], [0, 1, 4]]


@pytest.mark.parametrize("options, words",
                         [(["--pick", "3"], "--feedback human"),
                          (["--feedback", "human", "--pick", "99"], "1..12"),
                          (["--pool-prompts", "missing.txt"], "missing.txt"),
                          (["--style-words", "--feedback", "random"], "--style-words"),
                          (["--method", "lora"], "--method"), (["--pool", 0], "--pool")])
def test_refusals(rounds, options, words):
    code, _, err = rounds(*options)
    assert code == 2 and words in err and len(err.splitlines()) == 1


# -- objects

def test_content_adapter(cli, weights, picture):
    """Several pictures of one object, one phrase for all, no style words;
    sample.py does not take it for a style.
    """
    refs = [picture(f"{i}.png", i) for i in range(3)]
    code, out, _ = cli(train.main, "--ref", *refs, "--kind", "content", "--content", "a [V] teapot",
                       "--weights", weights, "--steps", 2, "--out", "runs/teapot")
    about = load_adapter("runs/teapot").about
    assert code == 0 and about["style"] == "" and about["prompts"] == ["a [V] teapot"] * 3
    assert sample.newest_run() is None and "--content runs/teapot" in out


@pytest.mark.parametrize("options, words", [
    ([], "--content"), (["--content", "a [V] teapot", "--style", "gold"], "--style"),
    (["--content", "a [V] teapot", "--rounds", 2], "--rounds")])
def test_content_refusals(cli, weights, picture, options, words):
    code, _, err = cli(train.main, "--ref", picture(), "--kind", "content", "--weights", weights,
                       *options)
    assert code == 2 and words in err and not Path("runs").exists()
