"""pretrain/: batches, losses, optimisers; stages that can be killed, and that say what is wrong."""

import copy
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (MERGES, TOKENIZER, VOCABULARY, contents, generator, noise_images, seeded,
                      toy_muse)
from PIL import Image

import data
from checkpoint.files import LEAST_FREE
from checkpoint.weights import save_model
from clip_feedback import Tokenizer
from muse import PRESETS, SUPERRES, Muse, TextEncoder
from pretrain import clip, common, muse, superres, vqgan
from pretrain.clip import InTurn, StyleWords, augment, contrastive_loss
from pretrain.common import (Muon, Replay, Run, initial_muse, optimisers_for, set_rate,
                             train_merges, update_average)
from styledrop import StyleDrop, to_tensor

STAGES = dict(vqgan=vqgan, clip=clip, muse=muse, superres=superres)
SAMPLES = {name: STAGES[name].samples for name in ("muse", "superres")}


# -- batches

def new_rows(step, fresh):
    """What a step paints: images and captions that say which step and row they are of."""
    rows = torch.arange(fresh) + 1000 * step
    return [rows[:, None].expand(-1, 3).clone(), rows.clone()]


def test_replay_keeps_the_last_steps():
    """The new ones first; the others are of the last `window` steps, each with its own caption.

    Traps: images and captions from different rows; the oldest alone; rows that were never written.
    """
    replay = Replay(12, 3, window=4)
    ages_of_later_steps = set()
    for step in range(40):
        images, captions = replay(new_rows(step, 4), generator(step))
        assert images.shape == (12, 3)
        assert torch.equal(images[:, 0], captions)
        assert torch.equal(captions[:4], new_rows(step, 4)[1])
        ages = step - captions[4:] // 1000
        assert ages.min() >= 0
        assert ages.max() < min(4, step + 1)
        if step > 5:
            ages_of_later_steps.update(ages.tolist())
    assert ages_of_later_steps == {0, 1, 2, 3}


@pytest.mark.parametrize("first", [0, 3, 5, 6])
def test_a_resumed_replay_equals_an_uninterrupted_one(first):
    """From `window` steps after it was resumed.

    Trap: a ring that starts elsewhere, in which the same number means another image.
    """
    whole, resumed = Replay(12, 3, window=4), Replay(12, 3, window=4)
    for step in range(20):
        batch = whole(new_rows(step, 4), generator(step))
        if step < first:
            continue
        again = resumed(new_rows(step, 4), generator(step))
        if first == 0 or step >= first + 4:
            assert torch.equal(batch[0], again[0]) and torch.equal(batch[1], again[1])


def test_styles_alone_are_captions_of_clip():
    captions = ["a man in tuxedo in flat vector style", "a man in tuxedo"]
    source = SimpleNamespace(batch=lambda n, rng, resolution: ("images", captions))
    found = StyleWords(source).batch(2, None, 16)
    assert found == ("images", ["flat vector style", "a man in tuxedo"])


def test_captions_of_clip_come_in_kinds():
    """Batches of several kinds take turns; which one is next follows from the step."""
    turns = InTurn([0, 10, 20, 30, 40, 50], [0, 11, 21, 31, 41, 51])
    assert [turns[step] for step in (3, 4, 5)] == [31, 40, 51]


def is_near(images, others):
    """Which of two batches of images are equal: (B,)."""
    return (images - others).abs().amax((1, 2, 3)) < 1e-4


def test_augmented_images():
    """Three in ten are only mirrored or not; the colours of all stay recognisable."""
    images = F.interpolate(noise_images(400, 4), (16, 16), mode="bicubic").clamp(-1, 1)
    found = augment(images, generator())
    assert torch.equal(found, augment(images, generator()))
    assert found.abs().max() <= 1
    assert 40 < is_near(found, images).sum() < 80
    assert 40 < is_near(found, images.flip(3)).sum() < 80
    difference = (found.mean((2, 3)) - images.mean((2, 3))).abs()
    assert difference.mean() < 0.1 and difference.max() < 0.5            # red stays red


# -- CLIP's loss

def contrastive_loss_by_hand(images, texts, scale, is_right):
    """The mean over images and texts of -log of the share of the right ones."""
    count = len(images)
    logits = torch.empty(count, count)
    for i in range(count):
        for j in range(count):
            logits[i, j] = scale * F.cosine_similarity(images[i], texts[j], dim=0)
    total = 0.0
    for i in range(count):
        total += logits[i].logsumexp(0) - logits[i][is_right[i]].mean()
        total += logits[:, i].logsumexp(0) - logits[:, i][is_right[:, i]].mean()
    return total / (2 * count)


@pytest.mark.parametrize("has_synonym", [False, True])
def test_contrastive_loss_equals_a_loop(has_synonym):
    """Rows are images, columns texts. Trap: a mask that is read the other way round."""
    images = torch.randn(5, 8, generator=generator(1))
    texts = torch.randn(5, 8, generator=generator(2))
    is_right = torch.eye(5, dtype=torch.bool)
    same = None
    if has_synonym:
        is_right[0, 1] = True                    # text 1 is right for image 0, not text 0 for 1
        same = is_right
    expected = contrastive_loss_by_hand(images, texts, 7, is_right)
    found = contrastive_loss(images, texts, torch.tensor(math.log(7)), same)
    torch.testing.assert_close(found, expected)


# -- optimisers

@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_equals_torchs(monkeypatch):
    """With several matrices of one shape, tall, wide and square, in fp32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)           # torch's rounds to bf16
    shapes = [(8, 20)] * 3 + [(20, 8)] * 3 + [(12, 12)] * 2 + [(8, 20)]
    chance = generator()

    def new_matrices():
        return [torch.randn(*shape, generator=chance) for shape in shapes]

    ours = [torch.nn.Parameter(matrix) for matrix in new_matrices()]
    theirs = copy.deepcopy(ours)
    how = dict(weight_decay=0.05, momentum=0.9)
    our_muon = Muon(ours, 1e-2, **how)
    their_muon = torch.optim.Muon(theirs, 1e-2, nesterov=True, adjust_lr_fn="match_rms_adamw",
                                  **how)
    for _ in range(5):
        before = [p.detach().clone() for p in ours]
        for mine, other, gradient in zip(ours, theirs, new_matrices()):
            mine.grad, other.grad = gradient, gradient.clone()
        our_muon.step()
        their_muon.step()
        for mine, other, old in zip(ours, theirs, before):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
            assert (mine - old).abs().mean() > 1e-4


def test_every_weight_has_one_optimiser():
    """Traps: a matrix that neither Muon nor AdamW moves, or both; decayed norms and biases."""
    model = seeded(lambda: Muse(SUPERRES["toy"]))
    muon, adamw = optimisers_for(model, model.blocks, 1e-3)
    hidden = [p for group in muon.param_groups for p in group["params"]]
    rest = [p for group in adamw.param_groups for p in group["params"]]
    assert sorted(map(id, hidden + rest)) == sorted(map(id, model.parameters()))
    assert hidden and all(p.dim() == 2 for p in hidden)
    assert any(p is model.token.weight for p in rest)
    for group in adamw.param_groups:
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.dim() > 1)


@pytest.mark.parametrize("steps, warmup", [(50, 5), (50, 1), (3, 100)])
def test_the_rate_warms_up_and_falls(steps, warmup):
    """Up for `warmup` steps, then only down, to 2 %; a group has its share. Trap: a second peak."""
    groups = [dict(params=[torch.zeros(1)]), dict(params=[torch.zeros(1)], share=0.5)]
    optimiser = torch.optim.SGD(groups, 1.0)
    args = SimpleNamespace(steps=steps, warmup=warmup, lr=0.3)
    rates = []
    for step in range(steps):
        set_rate([optimiser], step, args)
        rate, half = (group["lr"] for group in optimiser.param_groups)
        assert half == pytest.approx(rate / 2)
        assert 0 < rate <= 0.3
        rates.append(rate)
    assert (np.diff(rates[warmup - 1:]) < 0).all()
    if warmup < steps:
        assert (np.diff(rates[:warmup]) > 0).all()
        assert rates[-1] == pytest.approx(0.006, rel=0.1)


def test_the_average_follows_the_weights():
    """Its decay is short at first, and of about a thousand steps in the end."""
    model, average = seeded(lambda: torch.nn.Linear(1, 1)), seeded(lambda: torch.nn.Linear(1, 1), 1)
    expected = average.weight.item()
    for step in [0, 1, 2, 10, 100_000]:
        model.weight.data.fill_(float(step))
        decay = min(0.999, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        update_average(average, model, step)
        assert average.weight.item() == pytest.approx(expected, rel=1e-5)


# -- a stage as a command

class Source:
    """Images and captions out of the given generator alone, in place of data.Art."""

    def __init__(self, size=16, **how):
        self.size = size

    def batch(self, n, rng, resolution):
        images = rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
        images = images.repeat(resolution // 4, 1).repeat(resolution // 4, 2)
        names = rng.choice(["a cat", "a house", "an owl", "a tree"], n)
        return images, [f"{name} {i}" for i, name in enumerate(names)]

    def prompts(self, n):
        return ["a cat"] * n

    def words(self):
        return VOCABULARY


@pytest.fixture
def stage(cli, weights, monkeypatch):
    """stage(name, out, ...) -> exit code, stdout, stderr of six toy steps.

    Each look at the clock takes a minute. interrupt_at: Ctrl-C after that step has changed the
    weights and before it is logged or kept.
    """
    monkeypatch.setattr(data, "Art", Source)
    monkeypatch.setattr(clip, "measure", lambda model: dict(top1=0.5))
    monkeypatch.setattr(Replay, "WINDOW", 8)                 # CLIP shares it among four kinds
    for module in (muse, superres):                          # see test_a_base_from_scratch
        monkeypatch.setattr(module, "samples", lambda *_: Image.new("RGB", (8, 8)))
    real_log = Run.log

    def run(name, out, *options, interrupt_at=None):
        minutes = iter(range(0, 10 ** 9, 60))
        monkeypatch.setattr(common, "time", SimpleNamespace(time=lambda: next(minutes)))

        def log(self, done, **figures):
            if done == interrupt_at:
                raise KeyboardInterrupt
            real_log(self, done, **figures)

        monkeypatch.setattr(Run, "log", log)
        return cli(STAGES[name].main, "--preset", "toy", "--steps", 6, "--batch", 8, "--workers", 0,
                   "--out", out, "--weights", weights, "--log-seconds", 0, "--warmup", 3,
                   "--keep-minutes", 5, *options)
    return run


def read_checkpoint(folder):
    return torch.load(f"{folder}/checkpoint.pt", weights_only=True)


def read_result(name, folder="run"):
    return torch.load(f"{folder}/{name}.pt", weights_only=True)


def read_log(folder):
    with open(f"{folder}/log.jsonl") as file:
        return [json.loads(line) for line in file]


def files_of(folder):
    return contents(Path(folder))


def leaves(value):
    """All leaves of nested dicts and lists but the minutes, which differ from run to run."""
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value, key=str) if key != "minutes"]
    if not isinstance(value, (list, tuple)):
        return [value]
    found = []
    for each in value:
        found += leaves(each)
    return found


def assert_same_but_minutes(path, other):
    ours = leaves(torch.load(path, weights_only=True))
    theirs = leaves(torch.load(other, weights_only=True))
    assert len(ours) == len(theirs) > 10
    for one, two in zip(ours, theirs):
        if torch.is_tensor(one):
            assert torch.equal(one, two)
        else:
            assert one == two


def assert_refused(answer, *words):
    """A stage ended with one line that has these words."""
    code, _, err = answer
    assert code == 2 and err.count("\n") == 1, err
    for word in words:
        assert word in err


def set_all_rates(optimisers, rate):
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate


@pytest.mark.parametrize("name, reuse", [
    ("vqgan", 1), ("clip", 1), ("clip", 2), ("muse", 1), ("muse", 2), ("superres", 1),
    ("superres", 2)])
def test_a_resumed_run_equals_an_uninterrupted_one(stage, name, reuse):
    """Interrupted one step after a checkpoint, the same command continues from it, bit by bit.

    Traps: optimiser, average, step or learning rate not in the checkpoint; Muon's momentum, kept
    for the first matrix of a shape, lost; a cut line of the log; data, masks or reused images that
    start anew; a schedule that multiplies what it lowered; a step that is logged twice.
    """
    steps = 6 if reuse == 1 else 15                          # more than the window
    options = ["--steps", steps, "--reuse", reuse]
    if name == "vqgan":
        options += ["--gan-start", 0.3]
    assert stage(name, "whole", *options)[0] == 0
    assert stage(name, "broken", *options, interrupt_at=steps - 1)[0] == 130
    kept = read_checkpoint("broken")["step"]
    assert steps - 6 <= kept < steps - 1 and kept % 8 != 0
    with open("broken/log.jsonl", "a") as log:
        log.write('{"step": 3, "ima')
    code, out, _ = stage(name, "broken", *options)
    assert code == 0 and f"resuming from step {kept}" in out
    assert_same_but_minutes("whole/checkpoint.pt", "broken/checkpoint.pt")
    assert_same_but_minutes(f"whole/{name}.pt", f"broken/{name}.pt")
    whole = [(line["step"], line["loss"]) for line in read_log("whole")]
    broken = [(line["step"], line["loss"]) for line in read_log("broken")]
    assert whole == broken
    assert [step for step, _ in whole] == list(range(1, steps + 1))


def test_a_finished_run_has_nothing_left_to_do(stage):
    stage("vqgan", "run")
    before = files_of("run")
    code, out, _ = stage("vqgan", "run")
    assert code == 0 and "run is finished" in out
    assert files_of("run") == before


@pytest.mark.parametrize("name", STAGES)
def test_every_weight_learns(stage, name):
    """Trap: a part that no gradient reaches, or that no optimiser was told of."""
    options = ["--gan-start", 0] if name == "vqgan" else []
    stage(name, "one", "--steps", 1)
    stage(name, "six", *options)
    one = read_checkpoint("one")["parts"]["model"]
    six = read_checkpoint("six")["parts"]["model"]
    for key in one:
        assert one[key].numel() == 0 or not torch.equal(one[key], six[key]), key


def test_the_scale_of_the_logits_is_bounded(stage, monkeypatch):
    """By 100 (CLIP 2.5), or here by a number below the first one. Trap: unstable training."""
    assert math.exp(clip.MAX_LOGIT_SCALE) == pytest.approx(100)
    monkeypatch.setattr(clip, "MAX_LOGIT_SCALE", 1.0)
    assert stage("clip", "run", "--steps", 2)[0] == 0
    assert 0.9 < read_checkpoint("run")["parts"]["model"]["logit_scale"] <= 1


def test_a_figure_is_the_mean_of_the_steps_that_had_it(tmp_path):
    """Trap: the discriminator's loss is divided by all steps, also those before it started."""
    run = Run("vqgan", SimpleNamespace(out=tmp_path, steps=4, batch=8, log_seconds=1e4))
    for step, critic in enumerate([{}, {}, dict(critic=1.0), dict(critic=3.0)]):
        run.log(step + 1, loss=float(step), **critic)
    line, = read_log(tmp_path)
    assert (line["loss"], line["critic"]) == (1.5, 2)


@pytest.mark.parametrize("name, own_option", [
    ("vqgan", "--gan-weight"), ("clip", "--reuse"), ("muse", "--mask-power"),
    ("superres", "--mask-power")])
def test_only_the_same_command_continues(stage, name, own_option):
    """Traps: a rate that is printed and not used; --steps that changes the schedule of a run."""
    stage(name, "run", "--steps", 2)
    before = files_of("run")
    for options, words in ((["--lr", 1e-4, "--seed", 1], "values of --lr, --seed;"),
                           (["--steps", 7], "values of --steps;"),
                           (["--preset", "tiny"], "--preset"),
                           ([own_option, 4], f"values of {own_option};")):
        assert_refused(stage(name, "run", "--steps", 2, *options), words)
        assert files_of("run") == before


def damage_checkpoint(how):
    """Change run/checkpoint.pt."""
    path = Path("run/checkpoint.pt")
    saved = read_checkpoint("run")
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-500])
        return
    if how == "recipe":
        saved["recipe"] = [saved["recipe"]]
    elif how == "parts":
        saved["parts"] = {}
    elif how == "step":
        del saved["step"]
    else:
        saved |= how
    torch.save(saved, path)


@pytest.mark.parametrize("how", [
    "cut", "recipe", "parts", "step", dict(step=None), dict(step="x"), dict(step=math.nan),
    dict(step=-1), dict(step=10**9), dict(minutes=None)], ids=str)
def test_a_damaged_checkpoint_is_one_line(stage, how):
    """Trap: a traceback, or worse, a fresh start over what was there."""
    stage("vqgan", "run", "--steps", 1)
    damage_checkpoint(how)
    before = files_of("run")
    assert_refused(stage("vqgan", "run", "--steps", 1), "checkpoint.pt")
    assert files_of("run") == before


@pytest.mark.parametrize("name", STAGES)
def test_a_loss_that_is_not_finite_stops_the_stage(stage, name, monkeypatch):
    """Trap: all steps are taken, and NaN is written over what had been learned."""
    def set_rate(optimisers, step, args):
        rate = 1e-3
        if step >= 4:                                        # the fifth step spoils all weights
            rate = 1e30
        set_all_rates(optimisers, rate)

    monkeypatch.setattr(STAGES[name], "set_rate", set_rate)
    assert_refused(stage(name, "run", "--steps", 12, "--keep-minutes", 0), "lower --lr")
    assert read_checkpoint("run")["step"] == 4
    for saved in (read_checkpoint("run"), read_result(name)):
        for leaf in leaves(saved):
            assert not torch.is_tensor(leaf) or leaf.isfinite().all()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_kill_while_writing_costs_nothing(stage, number, code):
    """Traps: torch.save straight onto the only checkpoint; a temporary file is left behind."""
    stage("vqgan", "run", interrupt_at=4)
    before = files_of("run")

    def save_half(saved, file):
        file.write(b"half a checkpoint")
        signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save_half)
        assert stage("vqgan", "run")[0] == code
    after = files_of("run")
    assert after["checkpoint.pt"] == before["checkpoint.pt"]
    assert after.keys() == before.keys()
    assert stage("vqgan", "run")[0] == 0


@pytest.mark.parametrize("name", ["vqgan", "muse"])
def test_a_kill_between_the_last_files_is_mended(stage, name):
    """Trap: the final checkpoint first; the same command finds nothing to do, and no weights."""
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(STAGES[name], "save_model", interrupted)
        assert stage(name, "run", "--keep-minutes", 1e4)[0] == 130
    assert stage(name, "run", "--keep-minutes", 1e4)[0] == 0
    assert read_result(name)["provenance"]["steps"] == 6


@pytest.mark.parametrize("name, options, words, processes", [
    ("vqgan", ["--reuse", 2], "--reuse", 1), ("muse", ["--reuse", 3], "--reuse 3", 1),
    ("muse", ["--gan-start", 0.5], "--gan-start", 1), ("muse", ["--batch", 7], "2 processes", 2),
    ("superres", ["--weights", "nowhere"], "nowhere", 1), ("clip", [], "for pretrain.muse", 2),
    ("muse", ["--data", "nowhere"], "no folder of pictures at nowhere", 1),
    ("muse", ["--preset", "tiny"], "another --preset", 1)])
def test_refusals(stage, tmp_path, monkeypatch, name, options, words, processes):
    """In one line, before anything is written and before any process group is made."""
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_: pytest.fail("joined"))
    if processes > 1:
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(stage(name, "run", *options), words)
    assert contents(tmp_path) == {}


def test_a_file_in_place_of_the_folder_is_noticed_before_training(stage, tmp_path):
    (tmp_path / "text.txt").write_text("mine")
    assert_refused(stage("vqgan", "text.txt"), "text.txt is a file, not a folder")
    assert contents(tmp_path) == {"text.txt": b"mine"}


def test_a_full_disk_is_noticed_before_training(stage, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=LEAST_FREE - 1))
    assert_refused(stage("vqgan", "new/run"), "new/run cannot be written: no space left on device")


# -- what the stages of G show it

class Seen:
    """What a stage of G read and was asked for, step by step."""

    def __init__(self, calls, name):
        self.texts = calls(TextEncoder, "forward")
        self.passes = calls(Muse, "forward")
        self.losses = calls(STAGES[name], "masked_loss")


@pytest.fixture
def frozen(weights):
    """The tokenizer that the stages read."""
    return common.load_vqgan(SimpleNamespace(weights=weights, device="cpu"), 4)


def tokens_of(frozen, step, side):
    """The tokens of Source's images in one step, with the seed 1."""
    images, _ = Source().batch(30, np.random.default_rng((1, step)), side)
    return frozen.encode(to_tensor(images)).flatten(1)


@pytest.mark.parametrize("name, side", [("muse", 16), ("superres", 32)])
def test_what_a_step_of_g_sees(stage, frozen, calls, name, side):
    """Eq. 2: G sees M(E(x), m), and the loss is against E(x) at m.

    Traps: the whole `ids` goes in; one mask for all steps.
    """
    seen = Seen(calls, name)
    stage(name, "run", "--steps", 6, "--batch", 30, "--seed", 1)
    assert len(seen.passes) == len(seen.losses) == 6
    masks = []
    for step in range(6):
        (_, shown, *_), _ = seen.passes[step]
        (_, ids, mask), options = seen.losses[step]
        assert torch.equal(ids, tokens_of(frozen, step, side))
        assert torch.equal(shown, ids.masked_fill(mask, 32))
        assert options == dict(label_smoothing=0.1)
        masks.append(mask)
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("name", ["muse", "superres"])
def test_one_text_in_ten_is_empty(stage, calls, name):
    """The others are the captions of their images. Trap: `uniform < 0.9` keeps 10 %."""
    seen = Seen(calls, name)
    stage(name, "run", "--steps", 20, "--batch", 30, "--seed", 1)
    tokenizer = Tokenizer(read_result(name)["merges"])
    empty = tokenizer("", 16)
    count = 0
    for step in range(20):
        (_, text_ids), _ = seen.texts[step]
        _, captions = Source().batch(30, np.random.default_rng((1, step)), 16)
        is_empty = (text_ids == empty).all(1)
        assert torch.equal(text_ids[~is_empty], tokenizer(captions, 16)[~is_empty])
        count += is_empty.sum().item()
    assert 35 <= count <= 90


def test_the_second_stage_sees_wrong_low_tokens(stage, frozen, calls):
    """Of half the images, at most a fifth, as samples of the base have them."""
    seen = Seen(calls, "superres")
    stage("superres", "run", "--steps", 20, "--batch", 30, "--seed", 1)
    shares = []
    for step in range(20):
        _, named = seen.passes[step]
        is_wrong = named["low"] != tokens_of(frozen, step, 16)
        shares += is_wrong.float().mean(1).tolist()
    shares = np.array(shares)
    assert 0.4 < (shares == 0).mean() < 0.75
    assert 0.02 < shares.mean() < 0.08 and shares.max() < 0.6


# -- what comes out

@pytest.mark.parametrize("name", ["muse", "superres"])
def test_the_average_is_what_ships(stage, name):
    """Trap: the last raw weights are exported, and the average is thrown away."""
    stage(name, "run")
    parts = read_checkpoint("run")["parts"]
    weights = read_result(name)["weights"]
    is_same = []
    for key, weight in weights.items():
        assert torch.equal(weight, parts["average"][key].half())
        is_same.append(torch.equal(weight, parts["model"][key].half()))
    assert not all(is_same)


def test_weights_say_where_they_come_from(stage):
    stage("muse", "run", "--reuse", 2)
    provenance = read_result("muse")["provenance"]
    assert (provenance["stage"], provenance["steps"], provenance["reuse"]) == ("muse", 6, 2)
    assert (provenance["images"], provenance["painted"]) == (48, 24)
    assert {"minutes", "machine", "data", "seed", "lr"} <= provenance.keys()


def test_the_machine_is_that_of_the_run(monkeypatch):
    """Trap: a GPU is named that was there but not used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU at {device}")
    for device in ("cpu", torch.device("cpu")):
        assert "GPU" not in common.machine(device)
        for count, words in ((1, "1 thread of "), (2, "2 threads of ")):
            monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
            assert common.machine(device).startswith(words)
    for device in ("cuda", torch.device("cuda")):
        assert common.machine(device).startswith("a GPU at cuda, ")


@pytest.fixture
def frozen_rates(monkeypatch):
    """Optimisers change nothing, so a result has its initial weights."""
    for module in (muse, superres):
        monkeypatch.setattr(module, "set_rate", lambda optimisers, *_: set_all_rates(optimisers, 0))


def test_init_continues_earlier_weights(stage, frozen_rates):
    """Trap: the average starts elsewhere than the model."""
    stage("muse", "run", "--steps", 1)
    saved = read_result("muse")
    stage("muse", "second", "--steps", 2, "--seed", 5, "--init", "run/muse.pt")
    for part in ("model", "average"):
        found = read_checkpoint("second")["parts"][part]
        for key, weight in saved["weights"].items():
            assert torch.equal(found[key].half(), weight)
    assert read_result("muse", "second")["merges"] == saved["merges"]


@pytest.mark.parametrize("kind, presets", [("muse", PRESETS), ("superres", SUPERRES)])
def test_init_extends_the_vocabulary(tmp_path, kind, presets):
    """Old tokens keep their rows in T, also start and end, which are the last two.

    Trap: every old word has another token, and T has forgotten all of them.
    """
    old = toy_muse(presets=presets)
    save_model(tmp_path / "old.pt", kind, old, {}, merges=MERGES)
    words = [*VOCABULARY, "zebra", "kite"]
    model, tokenizer = initial_muse(tmp_path / "old.pt", kind, presets["toy"], words)
    for word in words:
        assert len(tokenizer.encode(word)) == 1
    rows = model.text_encoder.token.weight
    old_rows = old.text_encoder.token.weight.half().float()
    assert len(rows) == tokenizer.vocab_size == model.config.vocab_size > len(old_rows)
    for word in VOCABULARY:
        before, after = TOKENIZER.encode(word), tokenizer.encode(word)
        assert torch.equal(rows[after], old_rows[before])
    assert torch.equal(rows[-2:], old_rows[-2:])
    new = rows[len(old_rows) - 2:-2]
    assert (new.abs().amax(1) > 0).all() and new.abs().max() <= 0.04 + 1e-6      # initial weights
    for name, weight in old.state_dict().items():
        if name != "text_encoder.token.weight":
            assert torch.equal(model.state_dict()[name], weight.half().float())


def test_a_caption_with_a_web_address_can_be_learned():
    """Trap: a symbol of hundreds of letters, which no file of weights may have."""
    address = "".join(f"{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(300))
    tokenizer = Tokenizer(train_merges([f"a cat {address}"], 10_000))
    assert len(tokenizer.encode("a cat")) == 2
    assert 2 < len(tokenizer.encode(address)) < 10


def test_init_of_the_same_words_changes_nothing(tmp_path):
    words = [" ".join(VOCABULARY)]
    merges = train_merges(words, 10_000)
    old = toy_muse(vocab_size=Tokenizer(merges).vocab_size)
    save_model(tmp_path / "old.pt", "muse", old, {}, merges=merges)
    model, tokenizer = initial_muse(tmp_path / "old.pt", "muse", PRESETS["toy"], words)
    assert tokenizer.merges == merges
    rows = model.text_encoder.token.weight
    assert torch.equal(rows, old.text_encoder.token.weight.half().float())


@pytest.mark.parametrize("change", [
    dict(heads=4), dict(merges=[]), dict(merges=None), dict(kind="superres")], ids=str)
def test_init_that_does_not_fit_is_refused(stage, weights, change):
    """Trap: what does not fit keeps its random weights in silence."""
    saved = torch.load(weights / "muse.pt", weights_only=True)
    if "heads" in change:
        saved["config"] |= change
    else:
        saved |= change
    torch.save(saved, "other.pt")
    assert_refused(stage("muse", "second", "--init", "other.pt"), "other.pt")
    assert not Path("second").exists()


@pytest.fixture
def own_pictures(picture, tmp_path):
    """A folder of three captioned pictures, and a file that is none."""
    folder = tmp_path / "own"
    folder.mkdir()
    for i, words in enumerate(("a cat", "a house", "a zebra")):
        picture(f"own/{i}.png", i)
        (folder / f"{i}.txt").write_text(words)
    (folder / "notes.md").touch()
    return folder


def test_a_base_from_scratch(stage, own_pictures, monkeypatch):
    """The stages in their order, on pictures of one's own, give a folder that sampling accepts."""
    for name in ("muse", "superres"):
        monkeypatch.setattr(STAGES[name], "samples", SAMPLES[name])
    for name in STAGES:
        code, _, err = stage(name, "base", "--weights", "base", "--data", own_pictures)
        assert code == 0, err
        Path("base/checkpoint.pt").unlink()
    pipe = StyleDrop.load("base", "cpu")
    assert pipe.generate("a cat", steps=2).shape == (1, 3, 32, 32)
    assert pipe.words == {"a", "cat", "house", "zebra"}
    symbols = [pipe.tokenizer.symbols[i] for i in pipe.tokenizer.encode("a cat")]
    assert symbols == ["a</w>", "cat</w>"]                   # a token a word
    with Image.open("base/samples.png") as sheet:
        assert sheet.width > 8 * 16


@pytest.mark.parametrize("file", ["muse.pt", "adapter.pt"])
def test_weights_and_adapters_are_not_overwritten(stage, file):
    """Trap: `--out weights/mine` replaces a base by one that has hardly been trained."""
    Path("mine").mkdir()
    Path("mine", file).write_bytes(b"days of work")
    assert_refused(stage("muse", "mine"), f"mine already has {file}; give another --out")
    assert Path("mine", file).read_bytes() == b"days of work"


@pytest.mark.parametrize("name", STAGES)
def test_files_that_are_left_out_are_named_once(stage, own_pictures, name):
    """Trap: a picture of a rare kind is missing in training without a note."""
    code, _, err = stage(name, "run", "--steps", 1, "--data", own_pictures)
    assert code == 0
    line, = err.splitlines()
    assert line == (f"note: {own_pictures} has 1 unused file (not a picture with a caption): "
                    "notes.md")


@pytest.mark.parametrize("change", ["caption", "picture"])
def test_other_data_are_another_recipe(stage, own_pictures, picture, change):
    """Trap: the same folder with other pictures in it, and a run of both."""
    (own_pictures / "notes.md").unlink()
    stage("vqgan", "run", "--data", own_pictures)
    before = files_of("run")
    if change == "caption":
        (own_pictures / "1.txt").write_text("a hut")
    else:
        picture("own/1.png", 7)
    answer = stage("vqgan", "run", "--data", own_pictures)
    assert_refused(answer, "was made with other values of --data;")
    assert files_of("run") == before


# -- several processes

def gradients(monkeypatch):
    """A list to which every step adds its gradients, before they are clipped."""
    real = torch.nn.utils.clip_grad_norm_
    steps = []

    def noted(parameters, most):
        parameters = list(parameters)
        steps.append([p.grad.clone() for p in parameters])
        return real(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
    return steps


def one_of_two(rank, port, arguments):
    """What torchrun starts: pretrain.muse as process `rank` of two, with torchrun's variables."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=str(port),
                      MASTER_ADDR="127.0.0.1")
    patch = pytest.MonkeyPatch()
    steps = gradients(patch)
    real, rows = muse.masked_loss, []

    def masked_loss(logits, ids, mask, label_smoothing):
        rows.append(len(ids))
        return real(logits, ids, mask, label_smoothing)

    patch.setattr(muse, "masked_loss", masked_loss)
    muse.main(arguments)
    assert rows == [4] * 4                                   # half of the batch, in four steps
    if rank == 0:
        torch.save(steps[0], "gradients.pt")
    threads = Path("/proc/self/task").glob("*/comm")
    assert not [thread for thread in threads if "gloo" in thread.read_text()]


def test_two_processes_take_the_steps_of_one(stage, weights, monkeypatch):
    """On two CPU processes: the first step's gradients and the losses of one process.

    Traps: each process has its own masks, or its own images, or takes the whole batch; sums instead
    of means. A group that something still refers to leaves its threads behind, and its process may
    abort.
    """
    options = ["--batch", "8", "--reuse", "2", "--steps", "4", "--warmup", "1", "--lr", "0.003"]
    arguments = ["--preset", "toy", "--workers", "0", "--device", "cpu", "--log-seconds", "0",
                 "--weights", str(weights), "--out", "two", *options]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    forked = multiprocessing.get_context("fork")             # they have the toy images, too
    workers = [forked.Process(target=one_of_two, args=[rank, port, arguments]) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    steps = gradients(monkeypatch)
    assert stage("muse", "one", *options)[0] == 0
    one, two = steps[0], torch.load("gradients.pt")
    size = torch.cat([gradient.flatten() for gradient in one]).norm()
    assert len(one) == len(two) and size > 0.01
    for ours, theirs in zip(one, two):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * size.item(), rtol=0)
    losses = [line["loss"] for line in read_log("one")]
    assert len(losses) == 4
    assert [line["loss"] for line in read_log("two")] == pytest.approx(losses, abs=2e-3)
