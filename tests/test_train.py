"""train.py: from one picture to a run folder, refusals that leave nothing behind, and pretraining that can be killed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import noise_images
from PIL import Image

import data
import muse as muse_
import train
from muse import Muse
from styledrop import StyleDrop, load_adapter, style_prompt, to_uint8

ROOT = Path(train.__file__).parent
RUN = ["adapter.pt", "config.json", "log.jsonl", "samples.png"]
content = lambda folder: {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# -- style tuning

@pytest.fixture
def tune(cli, weights, picture):
    """tune("--out", "runs/a", ...) -> exit code, stdout, stderr; two steps of ref.png unless told otherwise."""
    ref = picture()
    return lambda *options: cli(train.main, "--ref", ref, "--weights", weights, "--steps", 2, *options)


def test_run_folder(tune, pipe, tmp_path):
    """One picture in, exactly four files out, under the reference's name."""
    code, out, err = tune("--content", "a house", "--style", "watercolor painting")
    assert code == 0 and err == "" and sorted(content("runs/ref")) == RUN and len(list(tmp_path.rglob("*"))) == 7
    adapter = load_adapter("runs/ref")
    assert adapter.about["base"] == pipe.base and adapter.about["style"] == "watercolor painting"
    assert any(p.any() for name, p in adapter.state_dict().items() if "up" in name)
    config = json.loads(Path("runs/ref/config.json").read_text())
    assert config["content"] == ["a house"] and config["steps"] == 2 and config["lr"] == 1e-3 and config["seed"] == 0
    lines = [json.loads(line) for line in Path("runs/ref/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["loss"] > 0 for line in lines)
    count = sum(p.numel() for p in adapter.parameters())
    assert f"adapter: {count:,} parameters, {100 * count / sum(p.numel() for p in pipe.muse.parameters()):.2f} %" in out


@pytest.mark.parametrize("options, config", [
    ([], dict(d_prj=4, is_shared=True)), (["--unshared", "--d-prj", 7], dict(d_prj=7, is_shared=False))])
def test_shape_of_the_adapter(tune, options, config):
    """Round 1 of Table S3 by default: H = 4, shared."""
    tune("--content", "a house", *options)
    assert config.items() <= load_adapter("runs/ref").config.items()


def test_the_same_command_gives_the_same_bytes(tune):
    """Trap: a date, a path or global chance in the adapter or in the picture. Tuned again, a folder is replaced."""
    tune("--out", "runs/a", "--content", "a house"), tune("--out", "runs/b", "--content", "a house")
    a, b = content("runs/a"), content("runs/b")
    assert a["adapter.pt"] == b["adapter.pt"] and a["samples.png"] == b["samples.png"]
    assert tune("--out", "runs/b", "--content", "a house", "--seed", 1)[0] == 0
    assert sorted(content("runs/b")) == RUN and content("runs/b")["adapter.pt"] != b["adapter.pt"]
    assert sorted(p.name for p in Path("runs").iterdir()) == ["a", "b"]


def test_several_references(tune, cli, weights, picture, monkeypatch):
    """All pictures reach the tuning, each with its phrase. Trap: nargs that keeps the last one."""
    seen, real = [], StyleDrop.tune
    monkeypatch.setattr(StyleDrop, "tune", lambda self, *a: seen.append(a[:2]) or real(self, *a))
    refs = [picture(name, seed) for seed, name in enumerate(("a.png", "b.png"))]
    assert cli(train.main, "--ref", *refs, "--content", "a cat", "a house", "--weights", weights, "--steps", 1)[0] == 0
    (images, prompts), = seen
    assert prompts == ["a cat", "a house"] and Path("runs/a").is_dir()
    assert all(np.array_equal(to_uint8(x[None])[0], data.read_image(ref, 16)) for x, ref in zip(images, refs))


def test_content_is_guessed_by_clip(tune, pipe):
    """Without --content: a phrase of a known name, said aloud and used. The style is then the rare token."""
    code, out, _ = tune()
    config = json.loads(Path("runs/ref/config.json").read_text())
    assert code == 0 and config["style"] == "[V*]" and f"content guessed by CLIP: {config['content'][0]}" in out
    assert config["content"][0] in {data.content_phrase(name) for name in data.names()}
    assert load_adapter("runs/ref").about["prompts"] == config["content"]


def test_guess_is_the_nearest_caption(pipe, monkeypatch):
    """Trap: the best picture for a phrase instead of the best phrase for a picture."""
    monkeypatch.setattr(data, "names", lambda: ["cat", "house", "owl", "tree"])
    images = noise_images(6, seed=3)
    phrases = ["a cat", "a house", "a tree", "an owl"]
    texts = pipe.clip.encode_text(pipe.clip.tokenizer(phrases, pipe.clip.config.context_length))
    for image, guess in zip(images, train.guess_content(pipe, images)):
        scores = [torch.cosine_similarity(pipe.clip.encode_image(image[None])[0], text, 0).item() for text in texts]
        assert guess == phrases[int(np.argmax(scores))]


def test_before_and_after_share_prompts_and_seeds(tune, monkeypatch):
    """Trap: a before without the style's words, which makes any after look learned."""
    calls, real = [], StyleDrop.generate
    monkeypatch.setattr(StyleDrop, "generate", lambda self, p, **k: calls.append((list(p), k)) or real(self, p, **k))
    tune("--content", "a house", "--seed", 5)
    (before, base), (after, tuned) = calls
    assert before == [style_prompt(p, "[V*]") for p in after] and base == dict(seed=5)
    assert tuned["seed"] == 5 and tuned["style"].about["style"] == "[V*]"


def broken_base(weights, folder, part):
    folder.mkdir()
    for path in weights.iterdir():
        (folder / path.name).write_bytes(path.read_bytes()[:-900 if path.stem == part else None])
    return folder


BAD = {
    "missing reference": (["--ref", "nothing.png"], "nothing.png"),
    "a folder": (["--ref", "folder"], "folder"),
    "a text file": (["--ref", "text.png"], "text.png"),
    "an empty file": (["--ref", "empty.png"], "empty"),
    "a cut picture": (["--ref", "cut.png"], "cut.png"),
    "one bad of two": (["--ref", "good.png", "nothing.png"], "nothing.png"),
    "no steps": (["--ref", "good.png", "--steps", "0"], "--steps"),
    "steps in words": (["--ref", "good.png", "--steps", "many"], "--steps"),
    "lr nan": (["--ref", "good.png", "--lr", "nan"], "--lr"),
    "lr inf": (["--ref", "good.png", "--lr", "inf"], "--lr"),
    "lr zero": (["--ref", "good.png", "--lr", "0"], "--lr"),
    "a seed too large": (["--ref", "good.png", "--seed", "1" + "0" * 30], "--seed"),
    "an unknown option": (["--ref", "good.png", "--setps", "3"], "--setps"),
    "too few contents": (["--ref", "good.png", "good.png", "--content", "a cat"], "2 references"),
    "too many contents": (["--ref", "good.png", "--content", "a", "cat"], "not 2"),
    "an empty content": (["--ref", "good.png", "--content", " "], "empty"),
    "out is somebody's folder": (["--ref", "good.png", "--out", "folder"], "not a run folder"),
    "out is a file": (["--ref", "good.png", "--out", "text.png"], "not a run folder"),
    "out under a file": (["--ref", "good.png", "--out", "text.png/run"], "text.png"),
    "no such base": (["--ref", "good.png", "--weights", "nowhere"], "nowhere"),
    "a damaged base": (["--ref", "good.png", "--weights", "broken"], "muse.pt"),
    "an adapter as large as the base": (["--ref", "good.png", "--d-prj", "10000000000"], "--d-prj"),
    "a port without a page": (["--ref", "good.png", "--port", "8000"], "--rounds"),
    "words of a stage": (["--stage", "clip", "--content", "a cat"], "--content"),
    "rounds of a stage": (["--stage", "clip", "--rounds", "2"], "--rounds"),
    "a bottleneck of all weights": (["--ref", "good.png", "--method", "full", "--d-prj", "8"], "--d-prj"),
    "feedback without rounds": (["--ref", "good.png", "--feedback", "human"], "--rounds"),
    "data of a stage": (["--ref", "good.png", "--data", "folder"], "--data"),
    "an object's words": (["--ref", "good.png", "--kind", "content", "--content", "a", "--method", "textual-inversion"], "--kind"),
    "no such prompts": (["--ref", "good.png", "--rounds", "2", "--pool-prompts", "nowhere.txt"], "nowhere.txt"),
    "both jobs": (["--ref", "good.png", "--stage", "muse"], "--stage"),
    "no job": ([], "--ref"),
    "a preset for counting": (["--stage", "muse", "--preset", "paper"], "paper"),
    "no such data": (["--stage", "vqgan", "--preset", "toy", "--data", "nowhere"], "nowhere"),
    "data without captions": (["--stage", "vqgan", "--preset", "toy", "--data", "folder"], "folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(refused, weights, picture, tmp_path, case):
    """One line that names the trouble, exit code 2, no file made or touched."""
    arguments, word = BAD[case]
    picture("good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious.txt").write_text("keep me")
    broken_base(weights, tmp_path / "broken", "muse")
    assert word in refused(train.main, "--weights", weights, *arguments)


def test_refusal_from_the_shell(tmp_path):
    """The real thing, once, in a process of its own."""
    done = subprocess.run([sys.executable, ROOT / "train.py", "--ref", "nothing.png", "--weights", "nowhere"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train.py: error: ") and not list(tmp_path.iterdir())


def test_a_kill_while_tuning_leaves_nothing(tune, monkeypatch, tmp_path):
    """Trap: half a run folder, which sample.py would take for the newest run."""
    def killed(*a, **k):
        raise KeyboardInterrupt
    monkeypatch.setattr(StyleDrop, "generate", killed)
    assert tune("--content", "a house", "--out", "a")[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["ref.png"]


# -- pretraining

class Source:
    """Pictures and captions out of the given generator alone, as data.Art; raises Ctrl-C at batch `stop_at`."""
    stop_at, count = None, 0

    def __init__(self, size=16, **shown):
        self.size = size

    def batch(self, n, rng, resolution):
        Source.count += 1
        if Source.stop_at is not None and Source.count > Source.stop_at:
            raise KeyboardInterrupt
        images = rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8).repeat(resolution // 4, 1).repeat(resolution // 4, 2)
        return images, [f"{rng.choice(['a cat', 'a house', 'an owl', 'a tree'])} {i}" for i in range(n)]

    def prompts(self, n):
        return ["a cat"] * n

    def things(self):
        return {thing: np.full((1 + i, self.size, self.size, 3), 40 * i, np.uint8) for i, thing in enumerate(["", "cat", "owl"])}

    def wording(self, thing, rng):
        return f"{rng.choice(['a', 'the'])} {thing}" if thing else ""


@pytest.fixture
def pretrain(cli, weights, monkeypatch):
    """pretrain(stage, out, ..., stop_after=steps) runs six toy steps on a clock where each look takes a minute."""
    monkeypatch.setattr(data, "Art", Source)
    monkeypatch.setattr(train.clip_feedback, "train_merges", lambda texts, merges: [("a", "t</w>")])

    def run(stage, out, *options, stop_after=None):
        ticks = iter(range(0, 10 ** 9, 60))
        monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: next(ticks)))
        Source.count = 0
        Source.stop_at = None if stop_after is None else {"vqgan": 1, "clip": 80, "muse": 0}[stage] + stop_after
        return cli(train.main, "--stage", stage, "--preset", "toy", "--steps", 6, "--batch", 8, "--workers", 0,
                   "--out", out, "--weights", weights, "--log-seconds", 0, "--warmup", 3, "--merges", 1, *options)
    return run


def tensors(value):
    """All leaves of nested dicts and lists."""
    if isinstance(value, dict):
        value = [x for _, x in sorted(value.items(), key=str)]
    return [leaf for x in value for leaf in tensors(x)] if isinstance(value, (list, tuple)) else [value]


def same_but_minutes(a, b):
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    for saved in (a, b):
        saved.pop("minutes", None)
        saved.get("provenance", {}).pop("minutes", None)
    a, b = tensors(a), tensors(b)
    return len(a) == len(b) > 10 and all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b))


@pytest.mark.parametrize("stage, changes", [("vqgan", {}), ("clip", {}), ("clip", {"vision_layers": 0}), ("muse", {})])
def test_killed_and_resumed_equals_unbroken(pretrain, stage, changes, monkeypatch):
    """Killed one step after a checkpoint, the same command goes on from it and ends with the same bits.

    Traps: optimiser, average, step or learning rate not in the checkpoint; data, masks or dropout that go on from the start;
    a schedule that multiplies what it already lowered; a log that counts the lost step twice.
    """
    toy = train.clip_feedback.PRESETS["toy"]
    monkeypatch.setitem(train.clip_feedback.PRESETS, "toy", replace(toy, **changes))
    keep = ("--keep-minutes", 1, "--gan-start", 0.3)
    assert pretrain(stage, "whole", *keep)[0] == 0
    assert pretrain(stage, "broken", *keep, stop_after=5)[0] == 130
    kept = torch.load("broken/checkpoint.pt", weights_only=True)["step"]
    assert kept == 4
    code, out, _ = pretrain(stage, "broken", *keep)
    assert code == 0 and f"going on from step {kept}" in out
    assert same_but_minutes("whole/checkpoint.pt", "broken/checkpoint.pt")
    assert same_but_minutes(f"whole/{stage}.pt", f"broken/{stage}.pt")
    logs = [[json.loads(line) for line in open(f"{out}/log.jsonl")] for out in ("whole", "broken")]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5, 6] and {"step", "loss", "minutes"} <= logs[1][0].keys()
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]
    assert logs[1][-1]["minutes"] > logs[0][-1]["minutes"] - 3 > 0


@pytest.mark.parametrize("stage, peak", [("vqgan", (1e-3, 5e-4)), ("clip", (1.5e-3, 1.5e-3)), ("muse", (2e-3, 2e-3))])
def test_learning_rate(pretrain, stage, peak):
    """A linear warm-up, then a cosine down to 2 %, each step from the peak. Trap: each step from the last one's."""
    rate = lambda step: 0.02 + 0.98 * np.cos(np.pi / 2 * step / 6) ** 2
    for stop_after, step, warm in ((2, 1, 2 / 3), (None, 5, 1)):
        pretrain(stage, "run", "--keep-minutes", 1 if stop_after is None else 0, stop_after=stop_after)
        groups = [o["param_groups"][0] for o in torch.load("run/checkpoint.pt", weights_only=True)["optimisers"]]
        assert [g["lr"] for g in groups] == pytest.approx([p * warm * rate(step) for p in peak])


def test_a_finished_stage_has_nothing_to_do(pretrain):
    pretrain("vqgan", "run")
    before = content("run")
    code, out, _ = pretrain("vqgan", "run")
    assert code == 0 and "going on from step 6" in out and content("run") == before


def test_a_kill_while_writing_costs_nothing(pretrain, monkeypatch):
    """Trap: torch.save straight onto the only checkpoint."""
    pretrain("vqgan", "run", "--keep-minutes", 0, stop_after=2)
    before = content("run")
    save = torch.save

    def half(saved, file):
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", half)
    assert pretrain("vqgan", "run", "--keep-minutes", 0)[0] == 130
    monkeypatch.setattr(torch, "save", save)
    after = content("run")
    assert after["checkpoint.pt"] == before["checkpoint.pt"] and after.keys() == before.keys()
    assert pretrain("vqgan", "run")[0] == 0


def test_a_kill_between_the_last_files_is_mended(pretrain, monkeypatch):
    """Trap: the final checkpoint first; then the same command finds nothing to do, and the weights are never written."""
    save_model = train.save_model

    def killed(*a, **k):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_model", killed)
    assert pretrain("vqgan", "run")[0] == 130
    monkeypatch.setattr(train, "save_model", save_model)
    assert pretrain("vqgan", "run")[0] == 0
    assert torch.load("run/vqgan.pt", weights_only=True)["provenance"]["steps"] == 6


def test_a_line_of_the_log_cut_by_a_kill_is_dropped(pretrain):
    pretrain("vqgan", "run", "--keep-minutes", 0, stop_after=3)
    with open("run/log.jsonl", "a") as log:
        log.write('{"step": 3, "ima')
    assert pretrain("vqgan", "run")[0] == 0
    assert [json.loads(line)["step"] for line in open("run/log.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_another_preset_in_the_same_folder_is_refused(pretrain):
    """Trap: a traceback, or worse, half a checkpoint loaded."""
    pretrain("vqgan", "run", "--keep-minutes", 0, stop_after=3)
    code, _, err = pretrain("vqgan", "run", "--preset", "tiny")
    assert code == 2 and err.count("\n") == 1 and "checkpoint.pt" in err and "--preset" in err


def test_only_the_same_command_goes_on(pretrain, picture, tmp_path):
    """Trap: other pictures, or a rate that is printed and not used, in the middle of a run. More steps are the same run."""
    pretrain("vqgan", "run")
    before = content("run")
    picture("own.png")
    (tmp_path / "own.txt").write_text("a cat")
    for options, words in ((["--data", tmp_path], "--data"), (["--lr", 1e-4, "--seed", 1], "--lr, --seed")):
        code, _, err = pretrain("vqgan", "run", *options)
        assert code == 2 and f"another {words};" in err and content("run") == before
    assert "step 7/7" in pretrain("vqgan", "run", "--steps", 7)[1]


def test_muse_needs_its_vqgan(pretrain, tmp_path):
    code, _, err = pretrain("muse", "run", "--weights", "nowhere")
    assert code == 2 and err.count("\n") == 1 and "nowhere" in err and not list(tmp_path.iterdir())


def test_ten_percent_of_texts_are_dropped(pretrain, monkeypatch):
    """10 % see the empty prompt, the rest their own caption. Trap: `uniform < 0.9`, as in aMUSEd, keeps 10 %."""
    batches, embed = [], StyleDrop.embed
    monkeypatch.setattr(StyleDrop, "embed", lambda self, prompts, *tuned: (
        batches.append(list(prompts)), embed(self, prompts, *tuned))[1])
    pretrain("muse", "run", "--steps", 10, "--batch", 100)
    batches = [batch for batch in batches if len(batch) == 100]
    assert len(batches) == 10 and 60 <= sum(batch.count("") for batch in batches) <= 140
    for step, batch in enumerate(batches):
        _, captions = Source().batch(100, np.random.default_rng((0, step)), 16)
        assert all(text in ("", caption) for text, caption in zip(batch, captions))


def test_two_processes_take_the_steps_of_one(weights, tmp_path):
    """torchrun on two CPU processes: the losses and weights of one process with the same batch, here an odd one.

    Traps: each process draws its own masks; means of shares of different size are averaged. A group that something
    still holds leaves its threads behind, and a process that ends under them aborts now and then.
    """
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)):
        (tmp_path / "art").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"art/{i}.png")
        (tmp_path / f"art/{i}.txt").write_text(["a cat", "a house in flat vector style"][i % 2])
    options = ["--stage", "muse", "--preset", "toy", "--data", "art", "--batch", "7", "--steps", "5", "--warmup", "1",
               "--workers", "0", "--log-seconds", "0", "--lr", "0.01", "--weights", str(weights), "--device", "cpu"]
    script = tmp_path / "run.py"
    script.write_text(f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(Path(train.__file__).parent)!r})\n"
                      "import styledrop, train\ntrain.fast_bf16 = styledrop.fast_bf16 = lambda device: False\ntrain.main()\n"
                      "assert not [task for task in Path('/proc/self/task').glob('*/comm') if 'gloo' in task.read_text()]\n")
    for name, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc_per_node=2"])):
        done = subprocess.run([sys.executable, *launch, str(script), *options, "--out", name], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5]
    for key in ("loss", "accuracy"):
        assert [line[key] for line in logs[1]] == pytest.approx([line[key] for line in logs[0]], abs=1e-3)
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["models"]["model"] for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=2e-3) for name in one)


def test_torchrun_is_for_muse(cli, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    code, _, err = cli(train.main, "--stage", "clip")
    assert code == 2 and "--stage muse" in err


def test_masked_tokens_stay_hidden_in_pretraining(pretrain, monkeypatch):
    """Eq. 2: G sees M(E(x), m), the loss is against E(x) at m. Trap: the whole `ids` goes in."""
    steps, shown, loss, forward = [], [], muse_.masked_loss, Muse.forward
    monkeypatch.setattr(Muse, "forward", lambda self, *a: shown.append(a[0]) or forward(self, *a))
    monkeypatch.setattr(muse_, "masked_loss", lambda logits, ids, mask, **k: (
        steps.append((shown[-1], ids, mask, k)), loss(logits, ids, mask, **k))[1])
    pretrain("muse", "run")
    assert len(steps) == 6
    for seen, ids, mask, options in steps:
        assert torch.equal(seen, ids.masked_fill(mask, 32)) and options == dict(label_smoothing=0.1)
    masks = torch.stack([mask for _, _, mask, _ in steps])
    assert not torch.equal(masks[0], masks[1])                               # drawn afresh in each step


def test_things_are_remembered_under_their_words(pretrain, weights):
    """Words lead to their own thing's pictures. Trap: words and pictures numbered in different orders."""
    assert "3 things remembered" in pretrain("muse", "base")[1]
    for part in ("vqgan.pt", "clip.pt"):
        (Path("base") / part).write_bytes((weights / part).read_bytes())
    pipe, things = StyleDrop.load("base", "cpu"), Source().things()
    text, mask = pipe.embed(["the cat", "the owl", ""])
    match = muse_.loudest_word(pipe.muse.keys(text), mask)
    assert match.argmax(1).tolist() == [list(things).index(thing) for thing in ("cat", "owl", "")]
    images = train.to_tensor(np.stack([pictures[0] for pictures in things.values()]))
    seen = pipe.vqgan.quantizer.codes[pipe.vqgan.encode(images).flatten(1)].flatten(1)
    ours, theirs = torch.pdist(pipe.muse.sketches.flatten(1)), torch.pdist(seen)
    torch.testing.assert_close(ours / ours.max(), theirs / theirs.max(), rtol=1e-2, atol=1e-2)


def test_memory_is_not_trained(pretrain):
    """What was remembered before the first step is what ships. Trap: the optimisers wear it away."""
    pretrain("muse", "one", "--steps", 1)
    pretrain("muse", "six")
    one, six = (torch.load(f"{run}/muse.pt", weights_only=True)["weights"] for run in ("one", "six"))
    memory = ("keys.weight", "keys.bias", "sketches")
    assert all(torch.equal(one[name], six[name]) == (name in memory) for name in (*memory, "place.weight", "text.weight"))


def test_muse_ships_its_average(pretrain):
    """Trap: the last raw weights are exported and the average is thrown away."""
    pretrain("muse", "run")
    models = torch.load("run/checkpoint.pt", weights_only=True)["models"]
    shipped = torch.load("run/muse.pt", weights_only=True)
    assert all(torch.equal(t, models["average"][name].half()) for name, t in shipped["weights"].items())
    assert not all(torch.equal(t, models["model"][name].half()) for name, t in shipped["weights"].items())
    assert shipped["provenance"]["steps"] == 6 and shipped["provenance"]["images"] == 48


def test_base_from_scratch(pretrain, cli, picture, tmp_path):
    """The three stages in order give a folder that tuning accepts; a user's own pictures are the data of the last."""
    for i in range(3):
        picture(f"own-{i}.png", i)
        (tmp_path / f"own-{i}.txt").write_text("a cat")
    for stage in ("vqgan", "clip", "muse"):
        more = ("--data", tmp_path) if stage == "muse" else ()
        assert pretrain(stage, "base", "--weights", "base", *more)[0] == 0
        (tmp_path / "base" / "checkpoint.pt").unlink()
    pipe = StyleDrop.load("base", "cpu")
    assert pipe.muse.config.codebook_size == pipe.vqgan.config.codebook_size
    assert torch.load("base/muse.pt", weights_only=True)["provenance"]["reads"] == pipe.reads
    assert (tmp_path / "base" / "samples_020.png").exists()                      # how it looked after a fifth of the steps
    with Image.open("base/samples.png") as sheet:
        assert sheet.width > 8 * 32


def test_muon_is_torchs_in_fp32():
    """Against torch.optim.Muon, whose Newton-Schulz rounds to bf16: tall, wide and square, over several steps."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    ours = [torch.nn.Parameter(draw(*shape)) for shape in ((32, 64), (64, 16), (24, 24))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    a = train.Muon(ours, 1e-2, weight_decay=0.05)
    b = torch.optim.Muon(theirs, 1e-2, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = draw(*p.shape)
            q.grad = p.grad.clone()
        a.step(), b.step()
    for p, q, old in zip(ours, theirs, start):
        assert (p - q).norm() < 0.02 * (p - old).norm()


def test_every_weight_has_one_optimiser():
    """Trap: a matrix that neither Muon nor AdamW moves, or that both do."""
    model = Muse(muse_.PRESETS["toy"])
    muon, adamw = train.optimisers_for(model, train.hidden_matrices(model.blocks), 1e-3)
    ids = lambda optimiser: [id(p) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(ids(muon) + ids(adamw)) == sorted(id(p) for p in model.parameters())
    assert all(p.dim() == 2 for group in muon.param_groups for p in group["params"])
    assert id(model.token.weight) in ids(adamw)


# -- going on from shipped weights

@pytest.mark.parametrize("stage", ["vqgan", "clip", "muse"])
def test_init_starts_from_the_weights_of_an_earlier_run(pretrain, weights, stage):
    """The first step sees the earlier weights, and the new file says where it began. Trap: only the live model, not its average."""
    earlier = torch.load(weights / f"{stage}.pt", weights_only=True)["weights"]
    code, out, err = pretrain(stage, "run", "--init", weights / f"{stage}.pt", "--steps", 1, "--lr", 1e-12)
    assert code == 0 and f"{len(earlier)} of {len(earlier)} tensors start as in" in out, err
    models = torch.load("run/checkpoint.pt", weights_only=True)["models"]
    moved = ("codes", "sums", "usage", "keys.weight", "keys.bias", "sketches", "place.weight", "place.bias")
    # moving averages, the memory of other things, and what reads it
    for model in (models[name] for name in models if name != "critic"):
        assert all(torch.allclose(model[k], w.float(), atol=1e-6) for k, w in earlier.items() if not k.endswith(moved))
    assert torch.load(f"run/{stage}.pt", weights_only=True)["provenance"]["init"] == {}     # the toy's own provenance


def test_init_keeps_the_memory_of_the_same_things(pretrain, weights):
    """Trap: sketches written anew along other axes, under a `place` that learned to read the old ones."""
    pretrain("muse", "first")
    for data_of, kept in (("data/", True), ("my/pictures", False)):
        saved = torch.load("first/muse.pt", weights_only=True)
        saved["weights"]["sketches"] += 1
        saved["provenance"]["data"] = data_of
        torch.save(saved, "earlier.pt")
        out = pretrain("muse", data_of.replace("/", "-"), "--init", "earlier.pt", "--steps", 1, "--lr", 1e-12)[1]
        weights_now = torch.load(f"{data_of.replace('/', '-')}/muse.pt", weights_only=True)["weights"]
        for name in ("sketches", "place.weight"):
            assert torch.allclose(weights_now[name].float(), saved["weights"][name].float(), atol=1e-3) == kept
        assert ("things remembered" in out) != kept


def test_init_takes_what_fits(pretrain, weights, cli):
    """Another preset's tensors of the same shape are taken and counted; a file of another kind is refused in a line."""
    saved = torch.load(weights / "vqgan.pt", weights_only=True)
    saved["weights"]["decoder.0.bias"] = torch.zeros(3)
    torch.save(saved, "other.pt")
    code, out, _ = pretrain("vqgan", "run", "--init", "other.pt", "--steps", 1)
    assert code == 0 and f"{len(saved['weights']) - 1} of {len(saved['weights'])} tensors" in out and "the others at random" in out
    for file, stage in ((weights / "clip.pt", "vqgan"), ("nowhere.pt", "clip")):
        code, _, err = pretrain(stage, "refused", "--init", file)
        assert code == 2 and err.count("\n") == 1 and Path(file).name in err and not Path("refused").exists()


def test_lock_keeps_the_text_that_muse_reads(pretrain, weights, pipe):
    """All else of CLIP learns; the states that Muse was trained on do not move. Trap: weight decay on what is locked."""
    pretrain("clip", "run", "--init", weights / "clip.pt", "--lock", "--lr", 0.1)
    clip = train.clip_feedback.load_clip("run/clip.pt")
    ids = clip.tokenizer(["a cat", "a house in watercolor style"], clip.config.context_length)
    assert torch.equal(clip.text_states(ids), pipe.clip.text_states(ids))
    assert not torch.allclose(clip.encode_text(ids), pipe.clip.encode_text(ids), atol=1e-2)
    assert not torch.allclose(clip.encode_image(noise_images(2)), pipe.clip.encode_image(noise_images(2)), atol=1e-2)


def test_lock_keeps_the_tokens(pretrain, weights, pipe):
    """Only D learns. Traps: the codebook's moving averages go on; weight decay on E."""
    pretrain("vqgan", "run", "--init", weights / "vqgan.pt", "--lock", "--lr", 0.1)
    saved = torch.load("run/vqgan.pt", weights_only=True)["weights"]
    for name, before in torch.load(weights / "vqgan.pt", weights_only=True)["weights"].items():
        assert torch.equal(saved[name], before) != name.startswith("decoder"), name


@pytest.mark.parametrize("options", [["--stage", "clip", "--lock"], ["--stage", "muse", "--init", "muse.pt", "--lock"],
                                     ["--ref", "ref.png", "--init", "muse.pt"]])
def test_init_and_lock_have_their_places(cli, options):
    code, _, err = cli(train.main, *options)
    assert code == 2 and "--init" in err and err.count("\n") == 1
