"""pretrain/: batches, optimisers and schedule; stages that can be killed, and say what is wrong."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, toy_clip
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
from pretrain.common import Muon, Replay, Run, optimisers_for, orthogonal, set_rate, update_average
from styledrop import StyleDrop

STAGES = ("vqgan", "clip", "muse", "superres")
MODULES = {name: getattr(pretrain, name) for name in STAGES}
SAMPLES = {name: MODULES[name].samples for name in ("muse", "superres")}
chance = lambda seed=0: torch.Generator().manual_seed(seed)
content = lambda folder: {path.name: path.read_bytes() for path in Path(folder).iterdir()}
checkpoint = lambda folder: torch.load(f"{folder}/checkpoint.pt", weights_only=True)
log_of = lambda folder: [json.loads(line) for line in open(f"{folder}/log.jsonl")]


# -- batches

def drawn(step, fresh):
    """What a step draws: pictures and captions that say which step and row they are of."""
    rows = torch.arange(fresh) + 1000 * step
    return [rows[:, None].expand(-1, 3).clone(), rows.clone()]


def test_replay_of_nothing():
    """reuse 1: the new batch itself, whatever the generator."""
    new = drawn(0, 8)
    assert Replay(8, 1)(new, chance()) is new


def test_replay_keeps_the_last_steps(monkeypatch):
    """The new ones first; the others of the last WINDOW steps, each beside its own caption.

    Traps: pictures and captions from different rows; only the oldest; what was never written yet.
    """
    monkeypatch.setattr(Replay, "WINDOW", 4)
    replay, seen = Replay(12, 3), set()
    for step in range(40):
        images, words = replay(drawn(step, 4), chance(step))
        assert images.shape == (12, 3) and torch.equal(images[:, 0], words)
        assert torch.equal(words[:4], drawn(step, 4)[1])
        ages = step - words[4:] // 1000
        assert ages.min() >= 0 and ages.max() < min(4, step + 1)
        seen |= set(ages.tolist()) if step > 5 else set()
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("first", [0, 3, 5, 6])
def test_replay_resumed_is_replay_unbroken(monkeypatch, first):
    """Filled from `first` on, it gives from WINDOW steps later on what it would have given anyway.

    Trap: a ring that starts elsewhere, in which the same number means another picture.
    """
    monkeypatch.setattr(Replay, "WINDOW", 4)
    whole, resumed = Replay(12, 3), Replay(12, 3)
    for step in range(20):
        batch = whole(drawn(step, 4), chance(step))
        if step >= first:
            again = resumed(drawn(step, 4), chance(step))
            if first == 0 or step >= first + 4:
                assert all(torch.equal(a, b) for a, b in zip(batch, again))


def test_steps_are_numbered():
    """A step's pictures hang on seed and number alone; a second source draws the same, larger."""
    steps = lambda seed=0: common.Steps([Source(), Source()], [16, 32], 4, seed)
    low, high = steps()[7]
    assert low.shape == (4, 16, 16, 3) and high.shape == (4, 32, 32, 3)
    assert torch.equal(low.repeat_interleave(2, 1).repeat_interleave(2, 2), high)
    assert torch.equal(steps()[7][0], low) and not torch.equal(steps(1)[7][0], low)
    assert not torch.equal(steps()[8][0], low)


# -- optimisers

def test_muon_is_torchs(monkeypatch):
    """Several matrices of one shape, tall, wide and square, against torch.optim.Muon in fp32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)                   # torch's rounds
    shapes = [(8, 20)] * 3 + [(20, 8)] * 3 + [(12, 12)] * 2 + [(8, 20)]
    draw, generator = torch.randn, chance()
    ours = [torch.nn.Parameter(draw(*shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, 1e-2, weight_decay=0.05, momentum=0.9)
    b = torch.optim.Muon(theirs, 1e-2, weight_decay=0.05, momentum=0.9, nesterov=True,
                         adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        start = [p.detach().clone() for p in ours]
        for p, q in zip(ours, theirs):
            p.grad = draw(*p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step(), b.step()
        for p, q, old in zip(ours, theirs, start):
            assert torch.allclose(p, q, atol=1e-5) and (p - old).abs().mean() > 1e-4


def test_muon_goes_on_from_its_state():
    """Trap: momentum that is kept for the first matrix of a shape, and lost when loaded."""
    def run(broken):
        generator = chance()
        draw = lambda: torch.randn(6, 4, generator=generator)
        ps = [torch.nn.Parameter(draw()) for _ in range(3)]
        muon = Muon(ps, 1e-1)
        for step in range(4):
            if broken and step == 2:
                saved, muon = muon.state_dict(), Muon(ps, 1e-1)
                muon.load_state_dict(saved)
            for p in ps:
                p.grad = draw()
            muon.step()
        return torch.stack([p.detach() for p in ps])
    assert torch.equal(run(False), run(True))


@pytest.mark.parametrize("shape", [(5, 6, 18), (5, 18, 6), (1, 9, 9)])
def test_orthogonal(shape):
    """All singular values near one, the singular vectors kept, each matrix by itself."""
    x = torch.randn(*shape, generator=chance()) * torch.logspace(-3, 3, shape[0])[:, None, None]
    y = orthogonal(x)
    values = torch.linalg.svdvals(y)
    assert values.shape == (shape[0], min(shape[1:])) and values.min() > 0.4 and values.max() < 1.4
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    middle = u.mT @ y @ v.mT                                # diagonal in x's own vectors
    assert (middle - torch.diag_embed(middle.diagonal(dim1=1, dim2=2))).abs().max() < 0.05
    assert torch.allclose(orthogonal(x[:1]), y[:1], atol=1e-4)


MODELS = {
    "muse": lambda: Muse(PRESETS["toy"]), "superres": lambda: Muse(SUPERRES["toy"]), "clip":
    toy_clip
}


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_has_one_optimiser(name):
    """Traps: a matrix that neither Muon nor AdamW moves, or that both do;
    decayed norms and biases.
    """
    model = MODELS[name]()
    blocks = model.transformer.resblocks if name == "clip" else model.blocks
    muon, adamw = optimisers_for(model, blocks, 1e-3)
    groups = lambda optimiser: optimiser.param_groups
    ids = lambda optimiser: [id(p) for group in groups(optimiser) for p in group["params"]]
    assert sorted(ids(muon) + ids(adamw)) == sorted(id(p) for p in model.parameters())
    assert all(p.dim() == 2 for group in groups(muon) for p in group["params"])
    for group in groups(adamw):
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.dim() > 1)
    embedding = model.token_embedding if name == "clip" else model.token
    assert id(embedding.weight) in ids(adamw)


def test_the_rate_warms_up_and_falls():
    """Up for `warmup` steps, then only down, to 2 %; a group has its share. Trap: a second peak."""
    for steps, warmup in ((50, 5), (50, 1), (3, 100), (1, 1)):
        optimiser = torch.optim.SGD([dict(params=[torch.zeros(1)]),
                                     dict(params=[torch.zeros(1)], share=0.5)], 1.0)
        rates = []
        for step in range(steps):
            set_rate([optimiser], step, SimpleNamespace(steps=steps, warmup=warmup, lr=0.3))
            rate, half = (group["lr"] for group in optimiser.param_groups)
            assert half == pytest.approx(rate / 2) and 0 < rate <= 0.3
            rates.append(rate)
        assert (np.diff(rates[warmup - 1:]) < 0).all()
        if warmup < steps:
            assert (np.diff(rates[:warmup]) > 0).all()
            assert rates[-1] == pytest.approx(0.3 * 0.02, rel=0.1)


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
    assert decay == 0.999


# -- stages

class Source:
    """Pictures and captions out of the given generator alone, in place of data.Art."""

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
    """All leaves of nested dicts and lists."""
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value, key=str)]
    is_list = isinstance(value, (list, tuple))
    return [leaf for x in value for leaf in tensors(x)] if is_list else [value]


def same_but_minutes(a, b):
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    for saved in (a, b):
        saved.pop("minutes", None)
        saved.get("provenance", {}).pop("minutes", None)
    same = lambda x, y: torch.equal(x, y) if torch.is_tensor(x) else x == y
    a, b = tensors(a), tensors(b)
    return len(a) == len(b) > 10 and all(map(same, a, b))


CASES = [(name, reuse) for name in STAGES for reuse in (1, 2) if (name, reuse) != ("vqgan", 2)]


@pytest.mark.parametrize("name, reuse", CASES)
def test_killed_and_resumed_equals_unbroken(stage, name, reuse):
    """Killed one step after a checkpoint, the same command goes on from it and ends with its bits.

    Traps: optimiser, average, step or learning rate not in the checkpoint; data, masks, dropout or
    reused pictures that start anew; a schedule that multiplies what it already lowered; a log that
    counts the lost step twice.
    """
    steps = 6 if reuse == 1 else 15                         # more than the window
    options = ["--steps", steps, "--reuse", reuse] + ["--gan-start", 0.3] * (name == "vqgan")
    code, _, err = stage(name, "whole", *options)
    assert code == 0, err
    assert stage(name, "broken", *options, kill_at=steps - 1)[0] == 130
    kept = checkpoint("broken")["step"]
    assert steps - 6 <= kept < steps - 1 and kept % 8
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
    own = {"vqgan": ["--gan-weight", 1], "clip": ["--preset",
                                                  "tiny"]}.get(name, ["--mask-power", 3])
    for options in (["--lr", 1e-4, "--seed", 1], ["--steps", 7], ["--steps", 5], own):
        code, _, err = stage(name, "run", *options)
        assert code == 2 and f"another {', '.join(options[::2])};" in err and err.count("\n") == 1
        assert content("run") == before


@pytest.mark.parametrize("damage",
                         ["cut", "no parts", "another part", "no recipe", "a list", "no step"])
def test_a_damaged_checkpoint_is_one_line(stage, damage):
    """Trap: a traceback, or worse, a fresh start over what was there."""
    stage("vqgan", "run", "--steps", 1)
    path = Path("run/checkpoint.pt")
    saved = checkpoint("run")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    else:
        if damage == "another part":
            saved["parts"]["model"].popitem()
        elif damage == "a list":
            saved["recipe"] = [saved["recipe"]]
        else:
            del saved[damage.split()[1]]
        torch.save(saved, path)
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
    shipped = Path(f"run/{name}.pt")
    if shipped.exists():
        assert all(x.isfinite().all() for x in tensors(torch.load(shipped)) if torch.is_tensor(x))


def test_learning_rate_in_the_stage(stage):
    """What the optimisers have after each step is `set_rate`'s, the discriminator's half of it."""
    rate = lambda step: 0.02 + 0.98 * np.cos(np.pi / 2 * step / 6) ** 2
    for name, parts, peaks in (("vqgan", ("optimiser", "critic_optimiser"), (1e-3, 5e-4)),
                               ("muse", ("muon", "adamw"), (2e-3, 2e-3))):
        stage(name, name)
        saved = checkpoint(name)["parts"]
        ours = [saved[part]["param_groups"][0]["lr"] for part in parts]
        assert ours == pytest.approx([peak * rate(5) for peak in peaks])


def test_a_kill_while_writing_costs_nothing(stage, monkeypatch):
    """Trap: torch.save straight onto the only checkpoint."""
    stage("vqgan", "run", kill_at=4)
    before = content("run")
    save = torch.save

    def half(saved, file):
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", half)
    assert stage("vqgan", "run")[0] == 130
    monkeypatch.setattr(torch, "save", save)
    after = content("run")
    assert after["checkpoint.pt"] == before["checkpoint.pt"] and after.keys() == before.keys()
    assert stage("vqgan", "run")[0] == 0


@pytest.mark.parametrize("name", ["vqgan", "muse"])
def test_a_kill_between_the_last_files_is_mended(stage, monkeypatch, name):
    """Trap: the final checkpoint first; the same command finds nothing to do, and no weights."""
    save_model = MODULES[name].save_model

    def killed(*a, **k):
        raise KeyboardInterrupt
    monkeypatch.setattr(MODULES[name], "save_model", killed)
    assert stage(name, "run", "--keep-minutes", 1e4)[0] == 130
    monkeypatch.setattr(MODULES[name], "save_model", save_model)
    assert stage(name, "run", "--keep-minutes", 1e4)[0] == 0
    assert torch.load(f"run/{name}.pt", weights_only=True)["provenance"]["steps"] == 6


def test_a_line_of_the_log_cut_by_a_kill_is_dropped(stage):
    stage("vqgan", "run", kill_at=4)
    with open("run/log.jsonl", "a") as log:
        log.write('{"step": 3, "ima')
    assert stage("vqgan", "run")[0] == 0
    assert [line["step"] for line in log_of("run")] == [1, 2, 3, 4, 5, 6]


def test_muse_needs_its_vqgan(stage, tmp_path):
    for name in ("muse", "superres"):
        code, _, err = stage(name, "run", "--weights", "nowhere")
        assert code == 2 and err.count("\n") == 1 and "nowhere" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, options, words", [("vqgan", ["--reuse", 2], "--reuse"),
                                                  ("muse", ["--reuse", 3], "--reuse 3"),
                                                  ("muse", ["--gan-start", 0.5], "--gan-start"),
                                                  ("clip", ["--mask-power", 1], "--mask-power"),
                                                  ("vqgan", ["--gan-start", 7], "--gan-start"),
                                                  ("muse", ["--batch", 10 ** 9], "--batch"),
                                                  ("muse", ["--lr", "nan"], "--lr"),
                                                  ("clip", ["--lr", 2], "--lr"),
                                                  ("muse", ["--steps", 0], "--steps")])
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
    for module in (pretrain.muse, pretrain.superres):
        loss = module.masked_loss
        monkeypatch.setattr(
            module, "masked_loss", lambda logits, ids, mask, loss=loss, **k: (steps.append(
                dict(now, ids=ids, mask=mask, options=k)), loss(logits, ids, mask, **k))[1])
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
    saved = torch.load("run/muse.pt", weights_only=True)
    tokenizer = pretrain.muse.Tokenizer(saved["merges"])
    empty, dropped = tokenizer("", 16)[0], 0
    assert len(watched) == 10
    for i, step in enumerate(watched):
        _, captions = Source().batch(100, np.random.default_rng((0, i)), 16)
        own, without = tokenizer(captions, 16), (step["text_ids"] == empty).all(1)
        assert torch.equal(step["text_ids"][~without], own[~without])
        dropped += int(without.sum())
    assert 60 <= dropped <= 140


def test_the_second_stage_reads_the_same_picture_small(stage, watched, weights):
    """High and low tokens are of one picture; some low ones are wrong, and never the targets."""
    stage("superres", "run", "--steps", 20, "--batch", 20)
    vqgan, shares = common.load_vqgan(SimpleNamespace(weights=weights, device="cpu")), []
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
    parts, shipped = checkpoint("run")["parts"], torch.load(f"run/{name}.pt", weights_only=True)
    weights = shipped["weights"].items()
    assert all(torch.equal(t, parts["average"][k].half()) for k, t in weights)
    assert not all(torch.equal(t, parts["model"][k].half()) for k, t in weights)
    said = shipped["provenance"]
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
    saved, path = torch.load("first/muse.pt", weights_only=True), Path("first/muse.pt")
    if wrong == "sizes":                                    # the same weights, read otherwise
        saved["config"]["heads"] = 4
    elif wrong == "words":
        saved["merges"] = saved["merges"][::-1]
    elif wrong == "no words":
        del saved["merges"]
    torch.save(saved, path)
    if wrong in ("a vqgan", "nothing"):
        path = weights / "vqgan.pt" if wrong == "a vqgan" else Path("nothing.pt")
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
    assert set(pipe.tokenizer.decode(pipe.tokenizer("a cat", 16)[0]).split()) == {"a", "cat"}
    with Image.open("base/samples.png") as sheet:
        assert sheet.width > 8 * 16


def test_pictures_of_the_user(stage, picture, tmp_path):
    """--data: a folder of pictures with captions, for every stage."""
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

    Traps: each process draws its own masks, or its own pictures; sums instead of means. A group
    that something still holds leaves its threads behind, and its process may abort under them.
    """
    script, grads, clip = tmp_path / "run.py", [], torch.nn.utils.clip_grad_norm_
    root, tests = (str(Path(module).parent) for module in (train.__file__, __file__))
    script.write_text(TORCHRUN.format(root=root, tests=tests))
    options = ["--batch", "8", "--reuse", "2", "--steps", "4", "--warmup", "1", "--lr", "0.003"]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(script), "--stage", "muse", "--preset", "toy", "--workers", "0", "--device", "cpu",
        "--log-seconds", "0", "--weights",
        str(weights), "--out", "two", *options
    ]
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
    """Shares of different size, and the stages that run alone: one line,
    before any group is made.
    """
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a: pytest.fail("joined"))
    code, _, err = stage("muse", "run", "--batch", 7)
    assert code == 2 and err.count("\n") == 1 and "--batch 7" in err and "2 processes" in err
    for name in ("vqgan", "clip", "superres"):
        code, _, err = stage(name, "run")
        assert code == 2 and err.count("\n") == 1 and "--stage muse" in err
    assert not list(tmp_path.iterdir())
