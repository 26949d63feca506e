"""pretrain/: batches, losses, optimisers; stages that can be killed, and say what is wrong."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY, noise_images, toy_clip
from PIL import Image

import data
import muse as muse_
import pretrain.clip
import pretrain.muse
import pretrain.superres
import pretrain.vqgan
import train
from muse import PRESETS, SUPERRES, Muse
from pretrain import common
from pretrain.clip import InTurn, StyleWords, augment, contrastive_loss
from pretrain.common import Muon, Replay, Run, optimisers_for, set_rate, update_average
from styledrop import StyleDrop

STAGES = ("vqgan", "clip", "muse", "superres")
MODULES = {name: getattr(pretrain, name) for name in STAGES}
SAMPLES = {name: MODULES[name].samples for name in ("muse", "superres")}
chance = lambda seed=0: torch.Generator().manual_seed(seed)
content = lambda folder: {path.name: path.read_bytes() for path in Path(folder).iterdir()}
checkpoint = lambda folder: torch.load(f"{folder}/checkpoint.pt", weights_only=True)
shipped = lambda name: torch.load(f"run/{name}.pt", weights_only=True)
log_of = lambda folder: [json.loads(line) for line in open(f"{folder}/log.jsonl")]


# -- batches

def drawn(step, fresh):
    """What a step draws: images and captions that say which step and row they are of."""
    rows = torch.arange(fresh) + 1000 * step
    return [rows[:, None].expand(-1, 3).clone(), rows.clone()]


def test_replay_keeps_the_last_steps():
    """The new ones first; the others of the last `window` steps, each beside its own caption.

    Traps: images and captions from different rows; only the oldest; what was never written yet.
    """
    replay, seen = Replay(12, 3, window=4), set()
    for step in range(40):
        images, words = replay(drawn(step, 4), chance(step))
        assert images.shape == (12, 3) and torch.equal(images[:, 0], words)
        assert torch.equal(words[:4], drawn(step, 4)[1])
        ages = step - words[4:] // 1000
        assert ages.min() >= 0 and ages.max() < min(4, step + 1)
        seen |= set(ages.tolist()) if step > 5 else set()
    assert seen == {0, 1, 2, 3}
    new = drawn(0, 8)
    assert Replay(8, 1)(new, chance()) is new


@pytest.mark.parametrize("first", [0, 3, 5, 6])
def test_replay_resumed_is_replay_unbroken(first):
    """Filled from `first` on, it gives `window` steps later what it would have given anyway.

    Trap: a ring that starts elsewhere, in which the same number means another image.
    """
    whole, resumed = Replay(12, 3, window=4), Replay(12, 3, window=4)
    for step in range(20):
        batch = whole(drawn(step, 4), chance(step))
        if step >= first:
            again = resumed(drawn(step, 4), chance(step))
            if first == 0 or step >= first + 4:
                assert all(torch.equal(a, b) for a, b in zip(batch, again))


def test_steps_are_numbered():
    """A step's images hang on seed and number alone; a second source draws the same, larger."""
    steps = lambda seed=0: common.Steps([Source(), Source()], [16, 32], 4, seed)
    low, high = steps()[7]
    assert low.shape == (4, 16, 16, 3) and high.shape == (4, 32, 32, 3)
    assert torch.equal(low.repeat_interleave(2, 1).repeat_interleave(2, 2), high)
    assert torch.equal(steps()[7][0], low) and not torch.equal(steps(1)[7][0], low)
    assert not torch.equal(steps()[8][0], low)


def test_captions_of_clip_come_in_kinds():
    """Styles alone in one batch, whose kind and number follow from the step."""
    captions = ["a man in tuxedo in flat vector style", "a man in tuxedo", "a cat in sepia style"]
    source = SimpleNamespace(batch=lambda n, rng, resolution: ("images", captions))
    images, said = StyleWords(source).batch(3, None, 16)
    assert images == "images" and said == ["flat vector style", "a man in tuxedo", "sepia style"]
    turns = InTurn([0, 10, 20, 30, 40, 50], [0, 11, 21, 31, 41, 51])
    assert [turns[step] for step in (3, 4, 5)] == [31, 40, 51]


def test_augmented_images_are_seeded_and_some_only_mirrored():
    images = F.interpolate(noise_images(400, 4), (16, 16), mode="bicubic").clamp(-1, 1)
    seen = augment(images, chance())
    assert torch.equal(seen, augment(images, chance())) and seen.abs().max() <= 1
    near = lambda a, b: ((a - b).abs().amax((1, 2, 3)) < 1e-4)
    same, mirrored = near(seen, images), near(seen, images.flip(3))
    assert 40 < same.sum() < 80 and 40 < mirrored.sum() < 80      # 30 % of 400, half of each
    colour = (seen.mean((2, 3)) - images.mean((2, 3))).abs()
    assert colour.mean() < 0.1 and colour.max() < 0.5             # red stays red


# -- CLIP's loss

def test_contrastive_loss_equals_a_plain_loop():
    """Of cosines; rows are images, columns texts. Trap: a mask that is read the other way round."""
    draw, n = lambda seed: torch.randn(5, 8, generator=chance(seed)), range(5)
    images, texts, scale, same = draw(1), draw(2), torch.tensor(7.), torch.eye(5).bool()
    same[0, 1] = True                             # text 1 is right for image 0, not text 0 for 1
    for mask in (None, same):
        right = torch.eye(5).bool() if mask is None else mask
        logits = [[scale * F.cosine_similarity(images[i], texts[j], dim=0) for j in n] for i in n]
        logits = torch.stack([torch.stack(row) for row in logits])
        total = sum(logits[i].logsumexp(0) - logits[i][right[i]].mean()
                    + logits[:, i].logsumexp(0) - logits[:, i][right[:, i]].mean() for i in n)
        torch.testing.assert_close(contrastive_loss(images, texts, scale.log(), mask), total / 10)
    hundred = torch.tensor(math.log(100))
    assert torch.equal(*(contrastive_loss(images, texts, hundred + x) for x in (0, 1)))


def test_identical_captions_are_not_negatives():
    """Images 0 and 1 share a caption: the least loss leaves them together, plain CLIP's not."""
    features, same = torch.eye(4)[[0, 0, 1, 2]], torch.eye(4).bool()
    scale = torch.tensor(100.).log()
    same[0, 1] = same[1, 0] = True
    loss = contrastive_loss(features, features, scale, same)
    assert loss.item() == pytest.approx(math.log(2) / 2, abs=1e-5)   # half have two right answers
    apart = features.clone()
    apart[0, 3], apart[1, 3] = 0.1, -0.1
    assert contrastive_loss(apart, apart, scale, same) > loss + 1e-3
    alike = contrastive_loss(torch.ones(4, 4), torch.ones(4, 4), scale, same)
    assert alike.item() == pytest.approx(math.log(4))


# -- optimisers

def test_muon_is_torchs(monkeypatch):
    """Several matrices of one shape, tall, wide and square, against torch.optim.Muon in fp32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)                   # torch's rounds
    shapes, generator = [(8, 20)] * 3 + [(20, 8)] * 3 + [(12, 12)] * 2 + [(8, 20)], chance()
    draw = lambda: [torch.randn(*shape, generator=generator) for shape in shapes]
    ours, how = [torch.nn.Parameter(x) for x in draw()], dict(weight_decay=0.05, momentum=0.9)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a, b = Muon(ours, 1e-2, **how), torch.optim.Muon(theirs, 1e-2, nesterov=True, **how,
                                                     adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        start = [p.detach().clone() for p in ours]
        for p, q, grad in zip(ours, theirs, draw()):
            p.grad, q.grad = grad, grad.clone()
        a.step(), b.step()
        for p, q, old in zip(ours, theirs, start):
            assert torch.allclose(p, q, atol=1e-5) and (p - old).abs().mean() > 1e-4


MODELS = {"muse": lambda: Muse(PRESETS["toy"]), "superres": lambda: Muse(SUPERRES["toy"]),
          "clip": toy_clip}


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_has_one_optimiser(name):
    """Traps: a matrix that neither Muon nor AdamW moves, or both; decayed norms and biases."""
    model = MODELS[name]()
    blocks = model.transformer.resblocks if name == "clip" else model.blocks
    muon, adamw = (x.param_groups for x in optimisers_for(model, blocks, 1e-3))
    hidden, rest = ([p for group in groups for p in group["params"]] for groups in (muon, adamw))
    assert sorted(map(id, hidden + rest)) == sorted(map(id, model.parameters()))
    assert all(p.dim() == 2 for p in hidden)
    assert all((group["weight_decay"] > 0) == (p.dim() > 1) for group in adamw
               for p in group["params"])
    embedding = model.token_embedding if name == "clip" else model.token
    assert id(embedding.weight) in map(id, rest)


@pytest.mark.parametrize("steps, warmup", [(50, 5), (50, 1), (3, 100), (1, 1)])
def test_the_rate_warms_up_and_falls(steps, warmup):
    """Up for `warmup` steps, then only down, to 2 %; a group has its share. Trap: a second peak."""
    groups = [dict(params=[torch.zeros(1)]), dict(params=[torch.zeros(1)], share=0.5)]
    optimiser, rates = torch.optim.SGD(groups, 1.0), []
    for step in range(steps):
        set_rate([optimiser], step, SimpleNamespace(steps=steps, warmup=warmup, lr=0.3))
        rate, half = (group["lr"] for group in optimiser.param_groups)
        assert half == pytest.approx(rate / 2) and 0 < rate <= 0.3
        rates.append(rate)
    assert (np.diff(rates[warmup - 1:]) < 0).all()
    if warmup < steps:
        assert (np.diff(rates[:warmup]) > 0).all() and rates[-1] == pytest.approx(0.006, rel=0.1)


def test_the_average_follows_the_weights():
    """Near the weights at first, a thousand steps long in the end, against a plain loop."""
    model, average = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    a = average.weight.item()
    for step in [0, 1, 2, 10, 100_000]:
        model.weight.data.fill_(float(step))
        decay = min(0.999, (1 + step) / (10 + step))
        a = decay * a + (1 - decay) * step
        update_average(average, model, step)
        assert average.weight.item() == pytest.approx(a, rel=1e-5)


# -- stages

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
    """stage(name, out, ..., kill_at=step) takes six toy steps; a look at the clock takes a minute.

    kill_at: Ctrl-C after that step's weights were changed, before it is logged or kept.
    """
    monkeypatch.setattr(data, "Art", Source)
    monkeypatch.setattr(pretrain.clip, "measure", lambda clip: dict(top1=0.5))
    monkeypatch.setattr(Replay, "WINDOW", 8)                # CLIP shares it among four
    for module in (pretrain.muse, pretrain.superres):       # drawn once, in test_base_from_scratch
        monkeypatch.setattr(module, "samples", lambda *a: Image.new("RGB", (8, 8)))
    real = Run.log

    def run(name, out, *options, kill_at=None):
        ticks = iter(range(0, 10 ** 9, 60))
        monkeypatch.setattr(common, "time", SimpleNamespace(time=lambda: next(ticks)))

        def log(self, done, **figures):
            if done == kill_at:
                raise KeyboardInterrupt
            real(self, done, **figures)
        monkeypatch.setattr(Run, "log", log)
        return cli(train.main, "--stage", name, "--preset", "toy", "--steps", 6, "--batch", 8,
                   "--workers", 0, "--out", out, "--weights", weights, "--log-seconds", 0,
                   "--warmup", 3, "--keep-minutes", 5, *options)
    return run


def tensors(value):
    """All leaves of nested dicts and lists but the minutes."""
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value, key=str) if key != "minutes"]
    is_list = isinstance(value, (list, tuple))
    return [leaf for x in value for leaf in tensors(x)] if is_list else [value]


def same_but_minutes(a, b):
    a, b = (tensors(torch.load(path, weights_only=True)) for path in (a, b))
    same = lambda x, y: torch.equal(x, y) if torch.is_tensor(x) else x == y
    return len(a) == len(b) > 10 and all(map(same, a, b))


CASES = [(name, reuse) for name in STAGES for reuse in (1, 2) if (name, reuse) != ("vqgan", 2)]


@pytest.mark.parametrize("name, reuse", CASES)
def test_killed_and_resumed_equals_unbroken(stage, name, reuse):
    """Killed one step after a checkpoint, the same command goes on from it and ends with its bits.

    Traps: optimiser, average, step or learning rate not in the checkpoint; Muon's momentum, kept
    for the first matrix of a shape, lost; a line of the log that the kill has cut; data, masks,
    dropout or reused images that start anew; a schedule that multiplies what it already lowered;
    a log that counts the lost step twice.
    """
    steps = 6 if reuse == 1 else 15                         # more than the window
    options = ["--steps", steps, "--reuse", reuse] + ["--gan-start", 0.3] * (name == "vqgan")
    code, _, err = stage(name, "whole", *options)
    assert code == 0, err
    assert stage(name, "broken", *options, kill_at=steps - 1)[0] == 130
    kept = checkpoint("broken")["step"]
    assert steps - 6 <= kept < steps - 1 and kept % 8
    with open("broken/log.jsonl", "a") as log:
        log.write('{"step": 3, "ima')
    code, out, _ = stage(name, "broken", *options)
    assert code == 0 and f"going on from step {kept}" in out
    assert same_but_minutes("whole/checkpoint.pt", "broken/checkpoint.pt")
    assert same_but_minutes(f"whole/{name}.pt", f"broken/{name}.pt")
    logs = [log_of(folder) for folder in ("whole", "broken")]
    assert [line["step"] for line in logs[1]] == list(range(1, steps + 1))
    assert {"step", "images", "loss", "minutes"} <= logs[1][0].keys()
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]
    before = content("broken")
    assert stage(name, "broken", *options)[0] == 0          # and has nothing left to do
    assert content("broken") == before


@pytest.mark.parametrize("name", STAGES)
def test_every_weight_learns(stage, name):
    """Trap: a part that no gradient reaches, or that an optimiser was not told of."""
    stage(name, "one", "--steps", 1)
    stage(name, "six", *["--gan-start", 0] * (name == "vqgan"))
    one, six = (checkpoint(folder)["parts"]["model"] for folder in ("one", "six"))
    still = [k for k in one if one[k].numel() and torch.equal(one[k], six[k])]
    assert not still, still


@pytest.mark.parametrize("name", STAGES)
def test_only_the_same_command_goes_on(stage, name):
    """Another option is one line that names it, and changes nothing.

    Traps: a rate that is printed and not used; --steps that moves the schedule under a run.
    """
    stage(name, "run", kill_at=5)
    before = content("run")
    own = {"vqgan": ["--gan-weight", 1], "clip": ["--preset", "tiny"]}
    own = own.get(name, ["--mask-power", 3])
    for options in (["--lr", 1e-4, "--seed", 1], ["--steps", 7], ["--steps", 5], own):
        code, _, err = stage(name, "run", *options)
        assert code == 2 and f"another {', '.join(options[::2])};" in err and err.count("\n") == 1
        assert content("run") == before


@pytest.mark.parametrize("damage", ["cut", "parts", "another part", "recipe", "a list", "step"])
def test_a_damaged_checkpoint_is_one_line(stage, damage):
    """Trap: a traceback, or worse, a fresh start over what was there."""
    stage("vqgan", "run", "--steps", 1)
    path, saved = Path("run/checkpoint.pt"), checkpoint("run")
    if damage == "another part":
        saved["parts"]["model"].popitem()
    saved["recipe"] = [saved["recipe"]] if damage == "a list" else saved["recipe"]
    saved.pop(damage, None)
    torch.save(saved, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    before = content("run")
    code, _, err = stage("vqgan", "run", "--steps", 1)
    assert code == 2 and err.count("\n") == 1 and "checkpoint.pt" in err
    assert content("run") == before


@pytest.mark.parametrize("name", STAGES)
def test_a_loss_that_is_no_number_stops_the_stage(stage, name, monkeypatch):
    """A rate far too large: one line, the good checkpoint as it was.

    Trap: all steps are taken, and NaN is written over what had been learned.
    """
    def too_large(optimisers, step, args):
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = 1e30 if step >= 4 else 1e-3
    monkeypatch.setattr(MODULES[name], "set_rate", too_large)
    code, _, err = stage(name, "run", "--steps", 12, "--keep-minutes", 0)
    assert code == 2 and err.count("\n") == 1 and "lower --lr" in err, err
    saved = checkpoint("run")
    assert saved["step"] == 4                               # the fifth step threw all weights away
    assert all(x.isfinite().all() for x in tensors(saved) if torch.is_tensor(x))
    if Path(f"run/{name}.pt").exists():
        assert all(x.isfinite().all() for x in tensors(shipped(name)) if torch.is_tensor(x))


@pytest.mark.parametrize("how, code", [("Ctrl-C", 130), ("SIGTERM", 143)])
def test_a_kill_while_writing_costs_nothing(stage, monkeypatch, how, code):
    """Traps: torch.save straight onto the only checkpoint; a temporary file is left behind."""
    handler = signal.getsignal(signal.SIGTERM)
    stage("vqgan", "run", kill_at=4)
    before = content("run")

    def half(saved, file):
        file.write(b"half a checkpoint")
        signal.raise_signal(signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        assert stage("vqgan", "run")[0] == code
    after = content("run")
    assert after["checkpoint.pt"] == before["checkpoint.pt"] and after.keys() == before.keys()
    assert stage("vqgan", "run")[0] == 0
    signal.signal(signal.SIGTERM, handler)


def test_a_closed_pipe_does_not_end_the_training(monkeypatch):
    """What `| head -1` does after its line. Trap: the flush at exit fails once more."""
    end, start = os.pipe()
    os.close(end)
    with os.fdopen(start, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        common.say("step 1")
        common.say("step 2")


@pytest.mark.parametrize("name", ["vqgan", "muse"])
def test_a_kill_between_the_last_files_is_mended(stage, monkeypatch, name):
    """Trap: the final checkpoint first; the same command finds nothing to do, and no weights."""
    def killed(*a, **k):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(MODULES[name], "save_model", killed)
        assert stage(name, "run", "--keep-minutes", 1e4)[0] == 130
    assert stage(name, "run", "--keep-minutes", 1e4)[0] == 0
    assert shipped(name)["provenance"]["steps"] == 6


@pytest.mark.parametrize("name, options, words", [
    ("vqgan", ["--reuse", 2], "--reuse"), ("muse", ["--reuse", 3], "--reuse 3"),
    ("muse", ["--gan-start", 0.5], "--gan-start"), ("vqgan", ["--gan-start", 7], "--gan-start"),
    ("muse", ["--batch", 10 ** 9], "--batch"), ("clip", ["--lr", "nan"], "--lr"),
    *((name, ["--weights", "nowhere"], "nowhere") for name in ("muse", "superres"))])
def test_refusals(stage, tmp_path, name, options, words):
    code, _, err = stage(name, "run", *options)
    assert code == 2 and err.count("\n") == 1 and words in err and not list(tmp_path.iterdir())


# -- what the stages of G show it

@pytest.fixture
def watched(monkeypatch):
    """[dict(shown, ids, mask, low, text_ids, options), ...]: what every step of G trained on."""
    steps, forward, read = [], Muse.forward, muse_.TextEncoder.forward
    now = {}
    monkeypatch.setattr(muse_.TextEncoder, "forward", lambda self, ids, vectors=None: (
        now.update(text_ids=ids), read(self, ids, vectors))[1])
    monkeypatch.setattr(Muse, "forward", lambda self, ids, *a, low=None: (
        now.update(shown=ids, low=low), forward(self, ids, *a, low=low))[1])
    loss = pretrain.muse.masked_loss
    for module in (pretrain.muse, pretrain.superres):
        monkeypatch.setattr(module, "masked_loss", lambda logits, ids, mask, **k: (
            steps.append(now | dict(ids=ids, mask=mask, options=k)),
            loss(logits, ids, mask, **k))[1])
    return steps


@pytest.mark.parametrize("name", ["muse", "superres"])
def test_masked_tokens_stay_hidden_in_pretraining(stage, watched, name):
    """Eq. 2: G sees M(E(x), m), the loss is against E(x) at m. Trap: the whole `ids` goes in."""
    stage(name, "run")
    assert len(watched) == 6
    for step in watched:
        assert torch.equal(step["shown"], step["ids"].masked_fill(step["mask"], 32))
        assert step["ids"].max() < 32 and step["options"] == dict(label_smoothing=0.1)
    assert not torch.equal(watched[0]["mask"], watched[1]["mask"])               # drawn afresh


def test_ten_percent_of_texts_are_dropped(stage, watched):
    """10 % see the empty prompt, the rest their own caption. Trap: `uniform < 0.9` keeps 10 %."""
    stage("muse", "run", "--steps", 10, "--batch", 100)
    saved = shipped("muse")
    tokenizer = pretrain.muse.Tokenizer(saved["merges"])
    empty, dropped = tokenizer("", 16)[0], 0
    assert len(watched) == 10
    for i, step in enumerate(watched):
        _, captions = Source().batch(100, np.random.default_rng((0, i)), 16)
        own, without = tokenizer(captions, 16), (step["text_ids"] == empty).all(1)
        assert torch.equal(step["text_ids"][~without], own[~without])
        dropped += int(without.sum())
    assert 60 <= dropped <= 140


def test_the_second_stage_reads_the_same_image_small(stage, watched, weights):
    """High and low tokens are of one image; some low ones are wrong, and never the targets."""
    stage("superres", "run", "--steps", 20, "--batch", 20)
    vqgan, shares = common.load_vqgan(SimpleNamespace(weights=weights, device="cpu"), 4), []
    for i, step in enumerate(watched):
        images = [torch.from_numpy(Source().batch(20, np.random.default_rng((0, i)), side)[0])
                  for side in (16, 32)]
        low, high = (vqgan.encode(common.to_float(x)).flatten(1) for x in images)
        assert torch.equal(step["ids"], high) and step["low"].shape == (20, 16)
        shares += (step["low"] != low).float().mean(1).tolist()
    shares = np.array(shares)
    assert 0.4 < (shares == 0).mean() < 0.75 and 0.02 < shares.mean() < 0.08 and shares.max() < 0.6


# -- what comes out

@pytest.mark.parametrize("name", ["muse", "superres"])
def test_the_average_is_what_ships(stage, name):
    """Trap: the last raw weights are exported and the average is thrown away."""
    stage(name, "run", "--reuse", 2)
    parts, saved = checkpoint("run")["parts"], shipped(name)
    weights, said = saved["weights"].items(), saved["provenance"]
    assert all(torch.equal(t, parts["average"][k].half()) for k, t in weights)
    assert not all(torch.equal(t, parts["model"][k].half()) for k, t in weights)
    assert (said["steps"], said["images"], said["drawn"], said["reuse"]) == (6, 48, 24, 2)
    assert said["stage"] == name and {"minutes", "machine", "data", "seed", "lr"} <= said.keys()


@pytest.mark.parametrize("wrong", [None, "sizes", "words", "no words", "a vqgan", "nothing"])
def test_init(stage, weights, monkeypatch, wrong):
    """All weights of an earlier run, of the same sizes and words, or one line.

    Traps: what does not fit is left at chance; the average starts elsewhere than the model.
    """
    monkeypatch.setattr(pretrain.muse, "set_rate", lambda optimisers, *a: [
        group.update(lr=0.0) for optimiser in optimisers for group in optimiser.param_groups])
    stage("muse", "first", "--steps", 1)
    path = {"a vqgan": weights / "vqgan.pt", "nothing": Path("no.pt")}.get(wrong, "first/muse.pt")
    saved = torch.load("first/muse.pt", weights_only=True)
    changes = {"sizes": dict(config=saved["config"] | dict(heads=4)),    # the same weights, read
               "words": dict(merges=saved["merges"][::-1]), "no words": dict(merges=None)}  # anew
    torch.save(saved | changes.get(wrong, {}), "first/muse.pt")
    code, _, err = stage("muse", "second", "--steps", 2, "--seed", 5, "--init", path)
    if wrong:
        assert code == 2 and err.count("\n") == 1 and str(path) in err, err
        assert not Path("second").exists()
        return
    assert code == 0, err
    for part in ("model", "average"):
        found = checkpoint("second")["parts"][part]
        assert all(torch.equal(found[k].half(), p) for k, p in saved["weights"].items())


def test_base_from_scratch(stage, tmp_path, monkeypatch):
    """The stages in order give a folder that tuning and sampling accept."""
    for name in ("muse", "superres"):
        monkeypatch.setattr(MODULES[name], "samples", SAMPLES[name])
    for name in STAGES:
        code, _, err = stage(name, "base", "--weights", "base")
        assert code == 0, err
        (tmp_path / "base" / "checkpoint.pt").unlink()
    pipe = StyleDrop.load("base", "cpu")
    assert pipe.generate("a cat", steps=2).shape == (1, 3, 32, 32)
    assert pipe.words == set(VOCABULARY) and pipe.clip.tokenizer.vocab_size > 514
    cat = [pipe.tokenizer.symbols[i] for i in pipe.tokenizer.encode("a cat")]
    assert cat == ["a</w>", "cat</w>"]                      # a token a word
    with Image.open("base/samples.png") as sheet:
        assert sheet.width > 8 * 16


def test_images_of_the_user(stage, picture, tmp_path):
    """--data: a folder of images with captions, for every stage."""
    for i in range(3):
        picture(f"own-{i}.png", i)
        (tmp_path / f"own-{i}.txt").write_text(["a cat", "a house", "a zebra"][i])
    for name in STAGES:
        code, _, err = stage(name, f"runs/{name}", "--data", tmp_path, "--steps", 2)
        assert code == 0, err
    assert "zebra" in torch.load("runs/muse/muse.pt", weights_only=True)["words"]


# -- several processes

TORCHRUN = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
import data, styledrop, test_pretrain, train
from pretrain import common
data.Art = test_pretrain.Source
common.Replay.WINDOW = 8
styledrop.fast_bf16 = common.fast_bf16 = lambda device: False
torch.set_num_threads(1)
clip, grads = torch.nn.utils.clip_grad_norm_, []
def spy(parameters, most):
    parameters = list(parameters)
    grads.append([p.grad.clone() for p in parameters])
    if len(grads) == 1 and common.processes()[0] == 0:
        torch.save(grads[0], "grads.pt")
    return clip(parameters, most)
torch.nn.utils.clip_grad_norm_ = spy
train.main()
from pathlib import Path
tasks = Path("/proc/self/task").glob("*/comm")
assert not [task for task in tasks if "gloo" in task.read_text()]
"""


def test_two_processes_take_the_steps_of_one(stage, weights, tmp_path, monkeypatch):
    """torchrun on two CPU processes: the first step's gradients and the losses of one process.

    Traps: each process draws its own masks, or its own images; sums instead of means. A group
    that something still holds leaves its threads behind, and its process may abort under them.
    """
    script, grads, clip = tmp_path / "run.py", [], torch.nn.utils.clip_grad_norm_
    root, tests = (str(Path(module).parent) for module in (train.__file__, __file__))
    script.write_text(TORCHRUN.format(root=root, tests=tests))
    options = ["--batch", "8", "--reuse", "2", "--steps", "4", "--warmup", "1", "--lr", "0.003"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(script), "--stage", "muse", "--preset", "toy", "--workers", "0", "--device",
               "cpu", "--log-seconds", "0", "--weights", str(weights), "--out", "two", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr

    def spy(parameters, most):
        parameters = list(parameters)
        grads.append([p.grad.clone() for p in parameters])
        return clip(parameters, most)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    assert stage("muse", "one", *options)[0] == 0
    one, two = grads[0], torch.load(tmp_path / "grads.pt")
    size = torch.cat([g.flatten() for g in one]).norm()
    assert len(one) == len(two) and size > 0.01
    assert all(torch.allclose(a, b, atol=1e-5 * size) for a, b in zip(one, two))
    logs = [log_of(name) for name in ("one", "two")]
    losses = [[line["loss"] for line in log] for log in logs]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], abs=2e-3)


def test_what_two_processes_cannot_do(stage, monkeypatch, tmp_path):
    """Shares of different size, stages that run alone: one line, before any group is made."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a: pytest.fail("joined"))
    code, _, err = stage("muse", "run", "--batch", 7)
    assert code == 2 and err.count("\n") == 1 and "--batch 7" in err and "2 processes" in err
    for name in ("vqgan", "clip", "superres"):
        code, _, err = stage(name, "run")
        assert code == 2 and err.count("\n") == 1 and "--stage muse" in err
    assert not list(tmp_path.iterdir())
