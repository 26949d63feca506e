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
from conftest import VOCABULARY, generator as chance, noise_images
from PIL import Image

import data
import train
from clip_feedback import Tokenizer
from muse import SUPERRES, Muse, TextEncoder
from pretrain import clip, common, muse, superres, vqgan
from pretrain.clip import InTurn, StyleWords, augment, contrastive_loss
from pretrain.common import Muon, Replay, Run, optimisers_for, set_rate, update_average
from styledrop import StyleDrop

STAGES = dict(vqgan=vqgan, clip=clip, muse=muse, superres=superres)
SAMPLES = {name: STAGES[name].samples for name in ("muse", "superres")}
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


@pytest.mark.parametrize("first", [0, 3, 5, 6])
def test_replay_resumed_is_replay_unbroken(first):
    """Filled from `first` on, it gives `window` steps later what it would have given anyway. Trap:
    a ring that starts elsewhere, in which the same number means another image.
    """
    whole, resumed = Replay(12, 3, window=4), Replay(12, 3, window=4)
    for step in range(20):
        batch = whole(drawn(step, 4), chance(step))
        if step >= first:
            again = resumed(drawn(step, 4), chance(step))
            if first == 0 or step >= first + 4:
                assert all(torch.equal(a, b) for a, b in zip(batch, again))


def test_captions_of_clip_come_in_kinds():
    """Styles alone in one batch, whose kind and number follow from the step."""
    captions = ["a man in tuxedo in flat vector style", "a man in tuxedo"]
    source = SimpleNamespace(batch=lambda n, rng, resolution: ("images", captions))
    assert StyleWords(source).batch(2, None, 16) == ("images", ["flat vector style", captions[1]])
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
    logits = [[scale * F.cosine_similarity(images[i], texts[j], dim=0) for j in n] for i in n]
    logits = torch.stack([torch.stack(row) for row in logits])
    for mask in (None, same):
        right = torch.eye(5).bool() if mask is None else mask
        total = sum(logits[i].logsumexp(0) - logits[i][right[i]].mean()
                    + logits[:, i].logsumexp(0) - logits[:, i][right[:, i]].mean() for i in n)
        torch.testing.assert_close(contrastive_loss(images, texts, scale.log(), mask), total / 10)
    hundred = torch.tensor(math.log(100))
    assert torch.equal(*(contrastive_loss(images, texts, hundred + x) for x in (0, 1)))


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


def test_every_weight_has_one_optimiser():
    """Traps: a matrix that neither Muon nor AdamW moves, or both; decayed norms and biases."""
    model = Muse(SUPERRES["toy"])
    muon, adamw = (x.param_groups for x in optimisers_for(model, model.blocks, 1e-3))
    hidden, rest = ([p for group in groups for p in group["params"]] for groups in (muon, adamw))
    assert sorted(map(id, hidden + rest)) == sorted(map(id, model.parameters()))
    assert hidden and all(p.dim() == 2 for p in hidden)
    for group in adamw:
        assert all((group["weight_decay"] > 0) == (p.dim() > 1) for p in group["params"])
    assert id(model.token.weight) in map(id, rest)


@pytest.mark.parametrize("steps, warmup", [(50, 5), (50, 1), (3, 100)])
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
    monkeypatch.setattr(clip, "measure", lambda clip: dict(top1=0.5))
    monkeypatch.setattr(Replay, "WINDOW", 8)                # CLIP shares it among four
    for module in (muse, superres):                         # drawn once, in test_base_from_scratch
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


def is_refused(answer, *words):
    """A stage ended with one line that holds these words."""
    code, _, err = answer
    assert code == 2 and err.count("\n") == 1 and all(word in err for word in words), err


def set_rate_to(optimisers, rate):
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate


CASES = [(name, reuse) for name in STAGES for reuse in (1, 2) if (name, reuse) != ("vqgan", 2)]


@pytest.mark.parametrize("name, reuse", CASES)
def test_killed_and_resumed_equals_unbroken(stage, name, reuse):
    """Killed one step after a checkpoint, the same command goes on from it and ends with its bits.
    Traps: optimiser, average, step or learning rate not in the checkpoint; Muon's momentum, kept
    for the first matrix of a shape, lost; a cut line of the log; data, masks, dropout or reused
    images that start anew; a schedule that multiplies what it lowered; a step logged twice.
    """
    steps = 6 if reuse == 1 else 15                         # more than the window
    options = ["--steps", steps, "--reuse", reuse] + ["--gan-start", 0.3] * (name == "vqgan")
    assert stage(name, "whole", *options)[0] == 0
    assert stage(name, "broken", *options, kill_at=steps - 1)[0] == 130
    kept = checkpoint("broken")["step"]
    assert steps - 6 <= kept < steps - 1 and kept % 8
    with open("broken/log.jsonl", "a") as log:
        log.write('{"step": 3, "ima')
    code, out, _ = stage(name, "broken", *options)
    assert code == 0 and f"going on from step {kept}" in out
    assert same_but_minutes("whole/checkpoint.pt", "broken/checkpoint.pt")
    assert same_but_minutes(f"whole/{name}.pt", f"broken/{name}.pt")
    whole, broken = ([(line["step"], line["loss"]) for line in log_of(folder)]
                     for folder in ("whole", "broken"))
    assert whole == broken and [step for step, _ in whole] == list(range(1, steps + 1))
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
    """Traps: a rate that is printed and not used; --steps that moves the schedule under a run."""
    stage(name, "run", kill_at=5)
    before = content("run")
    own = {"vqgan": ["--gan-weight", 1], "clip": ["--preset", "tiny"]}
    for options in (["--lr", 1e-4, "--seed", 1], ["--steps", 7],
                    own.get(name, ["--mask-power", 3])):
        is_refused(stage(name, "run", *options), f"another {', '.join(options[::2])};")
        assert content("run") == before


def test_a_damaged_checkpoint_is_one_line(stage):
    """Trap: a traceback, or worse, a fresh start over what was there."""
    stage("vqgan", "run", "--steps", 1)
    path, saved = Path("run/checkpoint.pt"), checkpoint("run")
    whole, no_step = path.read_bytes(), {name: saved[name] for name in saved if name != "step"}
    for damaged in (saved | dict(recipe=[saved["recipe"]]), saved | dict(parts={}), no_step, None):
        if damaged is None:
            path.write_bytes(whole[:-500])
        else:
            torch.save(damaged, path)
        before = content("run")
        is_refused(stage("vqgan", "run", "--steps", 1), "checkpoint.pt")
        assert content("run") == before


@pytest.mark.parametrize("name", STAGES)
def test_a_loss_that_is_no_number_stops_the_stage(stage, name, monkeypatch):
    """Trap: all steps are taken, and NaN is written over what had been learned."""
    rate = lambda optimisers, step, args: set_rate_to(optimisers, 1e30 if step >= 4 else 1e-3)
    monkeypatch.setattr(STAGES[name], "set_rate", rate)
    is_refused(stage(name, "run", "--steps", 12, "--keep-minutes", 0), "lower --lr")
    assert checkpoint("run")["step"] == 4                   # the fifth step threw all weights away
    for saved in (checkpoint("run"), shipped(name)):
        assert all(x.isfinite().all() for x in tensors(saved) if torch.is_tensor(x))


@pytest.mark.parametrize("how, code", [("Ctrl-C", 130), ("SIGTERM", 143)])
def test_a_kill_while_writing_costs_nothing(stage, monkeypatch, how, code):
    """Traps: torch.save straight onto the only checkpoint; a temporary file is left behind."""
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


@pytest.mark.parametrize("name", ["vqgan", "muse"])
def test_a_kill_between_the_last_files_is_mended(stage, monkeypatch, name):
    """Trap: the final checkpoint first; the same command finds nothing to do, and no weights."""
    def killed(*a, **k):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(STAGES[name], "save_model", killed)
        assert stage(name, "run", "--keep-minutes", 1e4)[0] == 130
    assert stage(name, "run", "--keep-minutes", 1e4)[0] == 0
    assert shipped(name)["provenance"]["steps"] == 6


@pytest.mark.parametrize("name, options, words, world", [
    ("vqgan", ["--reuse", 2], "--reuse", 1), ("muse", ["--reuse", 3], "--reuse 3", 1),
    ("muse", ["--gan-start", 0.5], "--gan-start", 1), ("muse", ["--batch", 7], "2 processes", 2),
    ("superres", ["--weights", "nowhere"], "nowhere", 1), ("clip", [], "for --stage muse", 2)])
def test_refusals(stage, tmp_path, monkeypatch, name, options, words, world):
    """In one line, before anything is written and before any process group is made."""
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a: pytest.fail("joined"))
    if world > 1:
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
    is_refused(stage(name, "run", *options), words)
    assert not list(tmp_path.iterdir())


# -- what the stages of G show it

@pytest.mark.parametrize("name, sides", [("muse", [16]), ("superres", [16, 32])])
def test_what_a_step_of_g_sees(stage, weights, calls, name, sides):
    """Eq. 2: G sees M(E(x), m), the loss is against E(x) at m. 10 % of the texts are empty, the
    rest their own. The second stage reads the same image small, with some tokens wrong. Traps: the
    whole `ids` goes in; `uniform < 0.9` keeps 10 %; one mask for all steps.
    """
    read, seen = (calls(part, "forward") for part in (TextEncoder, Muse))
    losses, masks, empties, wrong = calls(STAGES[name], "masked_loss"), [], [], []
    stage(name, "run", "--steps", 20, "--batch", 30, "--seed", 1)
    frozen = common.load_vqgan(SimpleNamespace(weights=weights, device="cpu"), 4)
    tokenizer = Tokenizer(shipped(name)["merges"])
    assert len(read) == len(seen) == len(losses) == 20
    for i in range(20):
        (_, text_ids), _ = read[i]
        (_, shown, *_), more = seen[i]
        (_, ids, mask), options = losses[i]
        drawn = [Source().batch(30, np.random.default_rng((1, i)), side) for side in sides]
        tokens = [frozen.encode(common.to_float(torch.from_numpy(images))).flatten(1)
                  for images, _ in drawn]
        assert torch.equal(ids, tokens[-1]) and options == dict(label_smoothing=0.1)
        assert torch.equal(shown, ids.masked_fill(mask, 32))
        empty = (text_ids == tokenizer("", 16)).all(1)
        assert torch.equal(text_ids[~empty], tokenizer(drawn[0][1], 16)[~empty])
        masks.append(mask)
        empties += empty.tolist()
        wrong += (more.get("low", tokens[0]) != tokens[0]).float().mean(1).tolist()
    assert not torch.equal(masks[0], masks[1]) and 35 <= sum(empties) <= 90
    wrong = np.array(wrong)
    if name == "superres":                                  # a fifth of the tokens at most
        assert 0.4 < (wrong == 0).mean() < 0.75 and 0.02 < wrong.mean() < 0.08 and wrong.max() < 0.6


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


def test_init(stage, weights, monkeypatch):
    """Traps: what does not fit is left at chance; the average starts elsewhere than the model."""
    still = lambda optimisers, *a: set_rate_to(optimisers, 0)
    monkeypatch.setattr(muse, "set_rate", still)
    stage("muse", "run", "--steps", 1)
    saved = shipped("muse")
    torch.save(saved | dict(config=saved["config"] | dict(heads=4)), "sizes.pt")
    torch.save(saved | dict(merges=saved["merges"][::-1]), "words.pt")
    for path in ("sizes.pt", "words.pt", str(weights / "vqgan.pt")):
        is_refused(stage("muse", "second", "--init", path), path)
        assert not Path("second").exists()
    stage("muse", "second", "--steps", 2, "--seed", 5, "--init", "run/muse.pt")
    for part in ("model", "average"):
        found = checkpoint("second")["parts"][part]
        assert all(torch.equal(found[k].half(), p) for k, p in saved["weights"].items())


def test_base_from_scratch(stage, picture, tmp_path, monkeypatch):
    """The stages in order, on images of one's own, give a folder that sampling accepts."""
    for i, words in enumerate(("a cat", "a house", "a zebra")):
        picture(f"own-{i}.png", i)
        (tmp_path / f"own-{i}.txt").write_text(words)
    for name in ("muse", "superres"):
        monkeypatch.setattr(STAGES[name], "samples", SAMPLES[name])
    for name in STAGES:
        assert stage(name, "base", "--weights", "base", "--data", tmp_path)[0] == 0
        (tmp_path / "base" / "checkpoint.pt").unlink()
    pipe = StyleDrop.load("base", "cpu")
    assert pipe.generate("a cat", steps=2).shape == (1, 3, 32, 32)
    assert pipe.words == {"a", "cat", "house", "zebra"}
    cat = [pipe.tokenizer.symbols[i] for i in pipe.tokenizer.encode("a cat")]
    assert cat == ["a</w>", "cat</w>"]                      # a token a word
    with Image.open("base/samples.png") as sheet:
        assert sheet.width > 8 * 16


# -- several processes

def gradients(monkeypatch):
    """A list to which every step adds its gradients, before they are clipped."""
    real, steps = torch.nn.utils.clip_grad_norm_, []

    def spy(parameters, most):
        parameters = list(parameters)
        steps.append([p.grad.clone() for p in parameters])
        return real(parameters, most)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    return steps


TORCHRUN = """
import os, pytest, torch
import data, styledrop, test_pretrain, train
from pathlib import Path
from pretrain import common
data.Art = test_pretrain.Source
common.Replay.WINDOW = 8
styledrop.fast_bf16 = common.fast_bf16 = lambda device: False
torch.set_num_threads(1)
grads = test_pretrain.gradients(pytest.MonkeyPatch())
train.main()
if os.environ["RANK"] == "0":
    torch.save(grads[0], "grads.pt")
tasks = Path("/proc/self/task").glob("*/comm")
assert not [task for task in tasks if "gloo" in task.read_text()]
"""


def test_two_processes_take_the_steps_of_one(stage, weights, tmp_path, monkeypatch):
    """torchrun on two CPU processes: the first step's gradients and the losses of one process.
    Traps: each process draws its own masks, or its own images; sums instead of means. A group that
    something still holds leaves its threads behind, and its process may abort under them.
    """
    (tmp_path / "run.py").write_text(TORCHRUN)
    where = os.pathsep.join(str(Path(module).parent) for module in (train.__file__, __file__))
    options = "--batch 8 --reuse 2 --steps 4 --warmup 1 --lr 0.003".split()
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2".split(),
               *"run.py --stage muse --preset toy --workers 0 --device cpu --log-seconds 0".split(),
               "--weights", str(weights), "--out", "two", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=where))
    assert done.returncode == 0, done.stderr
    grads = gradients(monkeypatch)
    assert stage("muse", "one", *options)[0] == 0
    one, two = grads[0], torch.load(tmp_path / "grads.pt")
    size = torch.cat([g.flatten() for g in one]).norm()
    assert len(one) == len(two) and size > 0.01
    assert all(torch.allclose(a, b, atol=1e-5 * size) for a, b in zip(one, two))
    losses = [[line["loss"] for line in log_of(name)] for name in ("one", "two")]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], abs=2e-3)
