"""Rounds of feedback: the pool, who chooses, a new adapter, resuming after an interruption."""

import http.client
import json
import math
import shutil
import socket
import threading
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from conftest import Clock, noise_images
from PIL import Image

import clip_feedback
import sample
import styledrop
import train
from checkpoint.adapters import load_adapter
from checkpoint.weights import fingerprint
from clip_feedback import style_score, text_score
from commandline import terminal
from human_feedback import rounds as rounds_
from human_feedback.page import ChoicePage, Picking
from human_feedback.rounds import (FEEDBACK, POOL_PROMPTS, choose_at_random, choose_by_clip,
                                   measure, read_prompts, sample_pool)
from styledrop import ROUND_2, StyleDrop, to_uint8

PROMPTS = ["a cat", "a tree", "an owl"]
PERSON = ["--feedback", "human"]
CLIP = ["--feedback", "clip"]
PICK = [*PERSON, "--pick", "1,5,9"]
RUN = Path("runs/a")


def read_json(name):
    return json.loads((RUN / name).read_text())


def stamps():
    """{path in the run: its bytes and when they were written}."""
    found = {}
    for path in RUN.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(RUN))] = path.read_bytes(), path.stat().st_mtime_ns
    return found


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """18 decoding steps and 100 of tuning would teach a test nothing."""
    monkeypatch.setattr(StyleDrop, "generate", partialmethod(StyleDrop.generate, steps=2))
    monkeypatch.setattr(rounds_, "ROUND_2", replace(ROUND_2, steps=3, d_prj=2, is_shared=True))
    monkeypatch.setattr(train, "is_one_colour", lambda image: False)


@pytest.fixture
def rounds(cli, weights, picture, tmp_path):
    """rounds("--feedback", "clip", ...) -> exit code, stdout, stderr: runs/a with a tiny pool."""
    reference = picture()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")

    def run(*options):
        usual = ["--content", "a house", "--style", "watercolor painting", "--weights", weights,
                 "--steps", 2, "--pool", 4, "--pool-prompts", "prompts.txt", "--out", RUN,
                 "--rounds", 2]
        if "--ref" not in options:
            usual += ["--ref", reference]
        return cli(train.main, *usual, *options)
    return run


@pytest.fixture(scope="module")
def kept_runs():
    return {}


@pytest.fixture
def finished(rounds, kept_runs, tmp_path_factory):
    """finished(*options): runs/a after these two rounds. Each choice of options is run once."""
    def make(*options):
        if options not in kept_runs:
            assert rounds(*options)[0] == 0
            kept_runs[options] = tmp_path_factory.mktemp("kept") / "a"
            shutil.copytree(RUN, kept_runs[options])
        elif not RUN.exists():
            shutil.copytree(kept_runs[options], RUN)
    return make


@pytest.fixture
def refused_round(rounds):
    """refused_round(*options) -> the one line of a refusal that changes no file of the run."""
    def run(*options):
        before = stamps()
        code, _, err = rounds(*options)
        assert code == 2 and err.count("\n") == 1, err
        assert stamps() == before
        return err
    return run


# -- the pool and the choice

@pytest.fixture(scope="module")
def pool(pipe, make_adapter):
    """Six images of each prompt in the style of an adapter, from seed 3 on."""
    return sample_pool(pipe, PROMPTS, 6, make_adapter(), seed=3, steps=2)


@pytest.mark.parametrize("i", [0, 5, 6, 17])
def test_a_pool_has_the_images_of_a_prompt_in_a_row(pipe, make_adapter, pool, i):
    """Trap: images with the wrong prompt."""
    assert len(pool.images) == 18
    assert pool.contents == ["a cat"] * 6 + ["a tree"] * 6 + ["an owl"] * 6
    alone = pipe.generate(pool.contents[i], style=make_adapter(), seed=3 + i)
    torch.testing.assert_close(pool.images[i], alone[0], atol=1e-4, rtol=0)


def test_a_pool_of_the_base(pipe):
    assert sample_pool(pipe, PROMPTS, 1).style == ""


def test_clip_chooses_the_image_nearest_to_its_text(pipe, pool):
    """One for each prompt. Traps: the best of the whole pool; style words in the text."""
    assert pool.style == "watercolor painting"
    best = []
    for p in range(3):
        scores = [text_score(pipe.clip, pool.images[i][None], PROMPTS[p]).item()
                  for i in range(6 * p, 6 * p + 6)]
        best.append(6 * p + scores.index(max(scores)))
    assert choose_by_clip(pipe, pool) == best


def test_scores_of_a_large_pool_are_not_silent(pipe, pool, monkeypatch, capsys):
    """Trap: all images are scored at once, and nothing is said meanwhile."""
    clock = Clock()
    real = clip_feedback.image_features

    def slow_features(clip, images):
        clock.now += len(images)
        return real(clip, images)

    monkeypatch.setattr(terminal, "time", clock)
    monkeypatch.setattr(clip_feedback, "image_features", slow_features)
    choose_by_clip(pipe, pool)
    assert capsys.readouterr().out.splitlines() == [
        f"CLIP's scores: prompt {i}/3  {6 * i} s" for i in (1, 2, 3)]


def test_random_choice_follows_from_its_generator(pipe, pool):
    def choose(seed):
        return choose_at_random(pipe, pool, torch.Generator().manual_seed(seed))

    assert choose(0) == choose(0)
    choices = [choose(seed) for seed in range(20)]
    assert len(set(map(tuple, choices))) > 10
    for choice in choices:
        assert [i // 6 for i in choice] == [0, 1, 2]


def test_measure(pipe):
    """By definition. Where the reference's content was asked for, leakage says nothing."""
    images, references = noise_images(3, seed=1), noise_images(2, seed=2)
    contents = ["a cat", "a house", "a tree"]
    found = measure(pipe, images, contents, references, ["a house", "a teapot"])
    text = text_score(pipe.clip, images, contents)
    torch.testing.assert_close(found["text"], text)
    torch.testing.assert_close(found["style"], style_score(pipe.clip, images, references))
    rivals = torch.maximum(text_score(pipe.clip, images, "a house"),
                           text_score(pipe.clip, images, "a teapot"))
    assert math.isnan(found["leakage"][1])
    for i in (0, 2):
        assert found["leakage"][i] == float(rivals[i] > text[i])
    unnamed = measure(pipe, images, contents, references, ["", ""])
    assert unnamed["leakage"].isnan().all()
    assert torch.equal(unnamed["text"], found["text"])


@pytest.mark.parametrize("content, prompts", [
    ("a cat\n\n  a tree \r\n", ["a cat", "a tree"]), ("\ufeffa cat", ["a cat"])])
def test_prompts_of_a_file(tmp_path, content, prompts):
    (tmp_path / "prompts.txt").write_text(content, encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == prompts
    assert read_prompts(None) == POOL_PROMPTS


# -- two rounds

@pytest.mark.parametrize("name", FEEDBACK)
def test_two_rounds(rounds, calls, name):
    """Round 2 is a new adapter, which sample.py finds. It learns the images of the choice.

    Traps: the pool in another order, or all of it; the first adapter tuned on.
    """
    tuned = calls(StyleDrop, "tune")
    code, _, err = rounds("--feedback", name)
    assert (code, err) == (0, "")
    assert sample.newest_run() == RUN
    assert sorted(path.name for path in RUN.iterdir()) == [
        "adapter.pt", "config.json", "log.jsonl", "round1", "round2", "rounds.png", "samples.png",
        "scores.json"]
    first, second = load_adapter(RUN / "round1"), load_adapter(RUN / "round2")
    assert second.adapter.config == first.adapter.config | dict(is_shared=True, d_prj=2)
    newest = load_adapter(RUN)
    assert first.about["kind"] == second.about["kind"] == newest.about["kind"] == "style"
    assert fingerprint(second.state_dict()) == fingerprint(newest.state_dict())
    assert list(read_json("scores.json")) == ["base", "round 1", "round 2", "scorer"]
    _, ((_, images, contents, style, *_), _) = tuned
    assert contents == PROMPTS and style == "watercolor painting"
    chosen = read_json("round2/choice.json")["chosen"]
    with Image.open(RUN / "round2/pool.png") as image:
        sheet = np.asarray(image)
    for row, (i, image) in enumerate(zip(chosen, to_uint8(images), strict=True)):
        x = 16 * (i - 4 * row)
        assert np.array_equal(sheet[16 * row:16 * row + 16, x:x + 16], image)


@pytest.mark.parametrize("options, side", [([], 32), (["--no-superres"], 16)])
def test_rounds_use_the_stages_that_were_tuned(rounds, weights2, calls, monkeypatch, options, side):
    """Trap: with --no-superres, the pool comes from a second stage that was not tuned."""
    for name in ("SUPERRES", "SUPERRES_SAMPLING"):
        monkeypatch.setattr(styledrop, name, replace(getattr(styledrop, name), steps=1))
    sampled = calls(StyleDrop, "sample_tokens")
    code, _, err = rounds(*CLIP, "--weights", weights2, *options)
    assert (code, err) == (0, "")
    uses_both = {positional[1].config.low_grid > 0 for positional, _ in sampled} == {False, True}
    assert uses_both == (not options)
    with Image.open(RUN / "round2/pool.png") as pool:
        assert pool.size == (4 * side, 3 * side)
    with Image.open(RUN / "rounds.png") as sheet:            # words, the reference, three samples
        assert sheet.width == 96 + 8 + 4 * (128 + 8)


def test_a_prompt_that_is_too_long_is_noted_once(rounds, recwarn):
    """And not by CLIP as well, in two lines of Python's."""
    Path("prompts.txt").write_text("a cat\n" + "tree " * 50)
    code, _, err = rounds(*CLIP)
    assert (code, err) == (0, "note: a prompt is longer than 16 tokens; its end is ignored\n")
    assert list(recwarn) == []


def interrupt(monkeypatch, part):
    """Ctrl-C as soon as round 2 calls a function."""
    owner = StyleDrop if part == "tune" else rounds_
    real = getattr(owner, part)

    def interrupted(*arguments, **named):
        if part == "tune" and len(arguments[1]) == 1:        # of round 1, on one reference
            return real(*arguments, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, part, interrupted)


@pytest.mark.parametrize("part", ["tune", "sample_pool", "choose", "write_log", "compare_rounds"])
def test_a_resumed_run_equals_an_uninterrupted_one(rounds, part):
    """Whatever part was interrupted, what was finished stays. Trap: all from the start again."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, part)
        assert rounds(*CLIP)[0] == 130
    before = stamps()
    code, out, _ = rounds(*CLIP)
    assert code == 0 and "resuming runs/a: round 1 is finished" in out
    resumed = stamps()
    for name in before:
        if name not in ("adapter.pt", "config.json"):        # they are of the newest round
            assert resumed[name] == before[name]
    RUN.rename("mine")
    rounds(*CLIP)
    whole = stamps()
    assert resumed.keys() == whole.keys()
    for name in whole:
        assert resumed[name][0] == whole[name][0], name


@pytest.mark.parametrize("first, who", [(CLIP, "clip chose"), (PICK, "human chose 1, 5, 9")])
@pytest.mark.parametrize("options, words", [
    (["--feedback", "random"], "feedback; "), ([*PERSON, "--pick", 2], "chosen; "),
    (["--pool-prompts", "other.txt", "--pool", 5, "--seed", 1], "prompts, pool, seed; ")])
def test_no_choice_is_ever_replaced(finished, refused_round, first, who, options, words):
    """Neither CLIP's nor a person's. The line says what is there, and what to do."""
    finished(*first)
    Path("other.txt").write_text("a cat\na tree\n")
    usual = first[:2] if "--feedback" not in options else []
    line = refused_round(*usual, *options)
    assert words + who in line
    assert "move runs/a/round2 away" in line and "give another --out" in line


@pytest.mark.parametrize("advice", ["runs/a", "runs/a/round2"])
def test_the_advice_about_another_choice_works(rounds, finished, refused_round, advice):
    """Moving the folder that the line names away, or one above it."""
    finished(*CLIP)
    line = refused_round(*PICK)
    assert "move runs/a/round2 away" in line
    Path(advice).rename("mine")
    assert rounds(*PICK)[0] == 0
    assert read_json("round2/choice.json")["chosen"] == [0, 4, 8]


def test_clicks_before_done_are_not_lost(rounds, refused_round, monkeypatch):
    """Traps: Ctrl-C, then CLIP's choice instead of the person's; sheets removed by a pattern."""
    def interrupted(page, **options):
        page.picking.change(3, True)
        raise KeyboardInterrupt

    monkeypatch.setattr(ChoicePage, "wait", interrupted)
    assert rounds(*PERSON)[0] == 130
    (RUN / "round2/sheet_mine.png").write_text("mine")
    before = stamps()
    assert "picking.json is a person's unfinished choice" in refused_round(*CLIP)
    assert rounds(*PICK)[0] == 0
    for name in ("round2/picking.json", "round2/sheet_mine.png"):
        assert stamps()[name] == before[name]


@pytest.mark.parametrize("options, words", [
    (["--pick", "99"], "from 1 to 12"), (["--pick", ""], "from 1 to 12"),
    (["--port", "PORT"], "port PORT cannot be used"),
    (["--pool", 1024, "--pool-prompts", "many.txt"], "ask for 5,000 at most")])
def test_mistakes_are_found_before_the_work(refused_round, monkeypatch, options, words):
    """A wrong --pick, a port in use, a pool too large: before the base is even read."""
    Path("many.txt").write_text("a cat\n" * 50)
    monkeypatch.setattr(StyleDrop, "load", lambda *_: pytest.fail("too late"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        options = [port if option == "PORT" else option for option in options]
        line = refused_round(*PERSON, *options)
    assert words.replace("PORT", port) in line
    assert not Path("runs").exists()


DAMAGE = [b"", b"[]", b"\xff", b"[" * 100_000]


@pytest.mark.parametrize("name", ["config", "round2/pool", "round2/choice", "round2/adapter"])
def test_damaged_files(finished, refused_round, name):
    """One line that names the file, and nothing is made over the damage."""
    finished(*PICK)
    for content in DAMAGE:
        (RUN / f"{name}.json").write_bytes(content)
        assert f"{name}.json" in refused_round(*PERSON)


@pytest.mark.parametrize("chosen", [[99], ["x"], 7])
def test_a_damaged_choice_is_named(finished, refused_round, chosen):
    finished(*CLIP)
    path = RUN / "round2/choice.json"
    path.write_text(json.dumps(read_json("round2/choice.json") | {"chosen": chosen}))
    line = refused_round(*CLIP)
    assert f'"chosen" in {path} must be a list of numbers from 0 to 11; move it away' in line


def test_damaged_clicks(rounds, refused_round, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "choose")
        rounds(*CLIP)
    monkeypatch.setattr(ChoicePage, "wait", lambda *_, **__: pytest.fail("they are ignored"))
    for content in DAMAGE:
        (RUN / "round2/picking.json").write_bytes(content)
        assert "round2/picking.json is damaged" in refused_round(*PERSON)


@pytest.mark.parametrize("name", ["round2/pool", "round2/choice", "round2/adapter"])
def test_the_advice_about_a_damaged_part_works(rounds, finished, refused_round, name):
    finished(*PICK)
    (RUN / f"{name}.json").write_bytes(b"")
    assert f"move runs/a/{name}.json away" in refused_round(*PICK)
    (RUN / f"{name}.json").rename("mine.json")
    code, _, err = rounds(*PICK)
    assert code == 0, err
    assert read_json("round2/choice.json")["chosen"] == [0, 4, 8]


@pytest.mark.parametrize("size", [(64, 47), (64, 48)])
def test_a_pool_of_other_pictures_is_refused(rounds, refused_round, size):
    """Of its size or another. Trap: the numbers of a choice mean other pictures."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "choose")
        rounds(*CLIP)
    Image.new("RGB", size).save(RUN / "round2/pool.png")
    assert "pool.png is not the pool that was sampled" in refused_round(*CLIP)


def test_a_person_chooses(rounds, monkeypatch):
    """The page gets the pool, its prompts and the references; what it returns is learned."""
    pages = []

    def wait(page, announce):
        pages.append(page)
        return [1, 2, 9]

    monkeypatch.setattr(ChoicePage, "wait", wait)
    code, out, _ = rounds(*PERSON)
    assert code == 0 and "--pick 3,17,20" in out
    page, = pages
    assert page.picking.count == 12
    assert page.picking.prompts == ["a cat"] * 4 + ["a tree"] * 4 + ["an owl"] * 4
    assert load_adapter(RUN).about["prompts"] == ["a cat", "a cat", "an owl"]
    assert (RUN / "round2/sheet1.png").exists()


def test_a_finished_run_is_left_alone(rounds, finished):
    """Also where the reference lies elsewhere by now."""
    finished(*PICK)
    before = stamps()
    Path("ref.png").rename("other.png")
    code, out, _ = rounds(*PERSON, "--ref", "other.png")
    assert code == 0 and "runs/a is already finished" in out
    assert stamps() == before


@pytest.mark.parametrize("options", [PERSON, CLIP, [*PERSON, "--rounds", 3]])
def test_a_run_without_its_first_round_is_left_alone(finished, refused_round, options):
    """Trap: the adapter of round 2 becomes that of round 1, and everything after it is made anew.
    """
    finished(*(CLIP if options == CLIP else PICK))
    (RUN / "round1/adapter.pt").unlink()
    (RUN / "round1").rmdir()
    assert "runs/a/round1/adapter.pt is missing" in refused_round(*options)


def test_numbers_are_of_the_last_round(rounds, finished):
    """Trap: --pick for round 3 chooses in round 2 anew."""
    finished(*PICK)
    assert rounds(*PERSON, "--pick", "1,2,6", "--rounds", 3)[0] == 0
    assert read_json("round2/choice.json")["chosen"] == [0, 4, 8]
    assert read_json("round3/choice.json")["chosen"] == [0, 1, 5]
    assert load_adapter(RUN / "round3").about["prompts"] == ["a cat", "a cat", "a tree"]
    assert list(read_json("scores.json")) == ["base", "round 1", "round 2", "round 3", "scorer"]


@pytest.mark.parametrize("fewer", [1, 2])
def test_fewer_rounds_than_there_are_is_refused(rounds, finished, refused_round, fewer):
    """Trap: round 1 or 2 is made anew and replaces a folder that contains a person's choices."""
    finished(*PICK)
    rounds(*PERSON, "--pick", "1,2,6", "--rounds", 3)
    assert "give a higher --rounds" in refused_round(*PERSON, "--rounds", fewer)


# -- the page outlives the choice

def ask(address, place, body=None):
    """Return status and body of one request below the page's address."""
    url = urlsplit(address)
    connection = http.client.HTTPConnection(url.netloc, timeout=10)
    connection.request("GET" if body is None else "POST", url.path + place, body)
    answer = connection.getresponse()
    try:
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_the_page_is_there_until_the_command_ends(rounds, monkeypatch):
    """A reload, or a second tab, is told that the choice is over. Trap: "cannot connect", as if the
    command had failed.
    """
    addresses, states = [], []
    real_wait, real_tune = ChoicePage.wait, StyleDrop.tune

    def person(address):
        ask(address, "choice", json.dumps(dict(number=5, chosen=True)))
        ask(address, "done", "{}")

    def wait(page, announce):
        addresses.append(page.address)
        threading.Thread(target=person, args=[page.address]).start()
        return real_wait(page, open_browser=False, announce=announce)

    def tune(*arguments, **named):
        if addresses:
            states.append(ask(addresses[0], "state")[1])
        return real_tune(*arguments, **named)

    monkeypatch.setattr(ChoicePage, "wait", wait)
    monkeypatch.setattr(StyleDrop, "tune", tune)
    assert rounds(*PERSON)[0] == 0
    state, = states
    assert state["done"] is True and state["chosen"] == [5]
    with pytest.raises(ConnectionError):
        ask(addresses[0], "state")


def test_a_choice_is_continued_by_the_same_command(rounds, monkeypatch):
    """Ctrl-C before Done. Trap: the clicks are asked for again."""
    real = Picking.change

    def interrupted(page, announce):
        real(page.picking, 3, True)
        raise KeyboardInterrupt

    def done(page, announce):
        return page.picking.chosen

    monkeypatch.setattr(ChoicePage, "wait", interrupted)
    assert rounds(*PERSON)[0] == 130
    monkeypatch.setattr(ChoicePage, "wait", done)
    assert rounds(*PERSON)[0] == 0
    assert read_json("round2/choice.json")["chosen"] == [3]


# -- progress

def test_a_line_at_least_about_every_five_seconds(rounds, slow_passes, monkeypatch):
    """From the pool to the comparison, if a pass of G takes a second."""
    rounds("--rounds", 1)
    clock, said = slow_passes()
    said.append(clock.now)
    monkeypatch.setattr(StyleDrop, "generate", partialmethod(StyleDrop.generate, steps=9))
    assert rounds(*CLIP, "--pool", 6)[0] == 0
    said.append(clock.now)
    assert said[-1] - said[0] > 60
    assert max(np.diff(said)) <= 8                           # a step of decoding has three passes
