"""experiments/baselines.py: each way to tune changes what it says, and nothing of the base."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import generator, noise_images

import muse
from adapter import Adapter
from experiments import baselines
from experiments.foreign import Reference
from muse import PRESETS, Muse, masked_loss
from styledrop import RARE_TOKEN, ROUND_1, StyleDrop, style_prompt

TEXTS = [style_prompt("a house", RARE_TOKEN)]
each_way = pytest.mark.parametrize("tune, lr", [
    (baselines.tune_fully, 1e-3), (baselines.tune_lora, 1e-2), (baselines.tune_text, 0.1)],
    ids=["full", "lora", "text"])


@pytest.fixture
def tokens(pipe):
    """E(x) of one reference, (1, N)."""
    return pipe.vqgan.encode(noise_images(1)).flatten(1)


@pytest.fixture
def tuned(pipe, tokens):
    """tuned(tune, lr, steps) -> another Muse, tuned on the reference."""
    def make(tune, lr=1e-2, steps=3, seed=0):
        return tune(pipe, tokens, TEXTS, steps, lr, generator(seed))
    return make


def logits_of(pipe, model, prompt, ids=None):
    """Logits (1, N, V) of a prompt with its own T; of all tokens masked, unless ids are given."""
    if ids is None:
        ids = torch.full((1, model.config.tokens), model.config.mask_id)
    with torch.no_grad():
        return model(ids, *pipe.embed(model, [prompt]))


def changed(base, model):
    """The names of the weights that differ."""
    other = model.state_dict()
    assert other.keys() == base.state_dict().keys()
    return {name for name, weight in base.state_dict().items()
            if not torch.equal(weight, other[name])}


# -- tuning

@each_way
@pytest.mark.parametrize("steps, rate", [(0, 1.0), (2, 0.0)], ids=["no steps", "rate 0"])
def test_without_tuning_it_is_the_base(pipe, tuned, tune, lr, steps, rate):
    """Bit for bit, so a LoRA whose B is still zero is merged without a trace."""
    model = tuned(tune, rate, steps)
    assert changed(pipe.muse, model) == set()
    assert torch.equal(logits_of(pipe, model, TEXTS[0]), logits_of(pipe, pipe.muse, TEXTS[0]))


@each_way
def test_the_base_is_untouched(pipe, tuned, tune, lr):
    before = {name: weight.clone() for name, weight in pipe.muse.state_dict().items()}
    model = tuned(tune, lr)
    for name, weight in pipe.muse.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert type(model) is Muse and changed(pipe.muse, model)
    shared = {weight.data_ptr() for weight in pipe.muse.parameters()}
    assert not shared & {weight.data_ptr() for weight in model.parameters()}
    for weight in (*model.parameters(), *pipe.muse.parameters()):
        assert not weight.requires_grad and weight.grad is None


@each_way
def test_the_loss_on_the_reference_falls(pipe, tokens, tuned, tune, lr):
    """With everything masked, so that only the prompt tells what to paint."""
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def loss(model):
        return masked_loss(logits_of(pipe, model, TEXTS[0]), tokens, mask).item()

    assert loss(tuned(tune, lr, steps=20)) < 0.97 * loss(pipe.muse)


@each_way
def test_tuning_depends_on_the_generator_alone(pipe, tuned, tune, lr):
    one, same, other = tuned(tune, lr), tuned(tune, lr), tuned(tune, lr, seed=1)
    assert changed(one, same) == set() and changed(one, other) == changed(pipe.muse, one)


def test_full_fine_tuning_changes_all_of_G_and_nothing_of_T(pipe, tuned):
    model = tuned(baselines.tune_fully)
    names = {name for name in pipe.muse.state_dict() if not name.startswith("text_encoder.")}
    assert changed(pipe.muse, model) == names
    assert model.trained == sum(pipe.muse.state_dict()[name].numel() for name in names)


def test_lora_changes_the_matrices_of_the_blocks_by_a_low_rank(pipe, tuned):
    """Not more than its rank. Trap: T's blocks, or the embedding of the text."""
    model = tuned(baselines.tune_lora)
    names = {name for name, weight in pipe.muse.state_dict().items()
             if name.startswith("blocks.") and weight.dim() == 2}
    assert len(names) == 10 * len(pipe.muse.blocks) and changed(pipe.muse, model) == names
    numbers = 0
    for name in names:
        weight = pipe.muse.state_dict()[name]
        sizes = torch.linalg.svdvals((model.state_dict()[name] - weight).double())
        assert sizes[baselines.RANK - 1] > 1e-3 > 1e-4 > sizes[baselines.RANK], name
        numbers += baselines.RANK * sum(weight.shape)
    assert model.trained == numbers


def test_lora_trains_about_as_much_as_the_adapter():
    """At the size that ships."""
    config = PRESETS["tiny"]
    with torch.device("meta"):
        layers = baselines.linear_layers(Muse(config))
    lora = sum(baselines.RANK * (layer.in_features + layer.out_features) for layer in layers)
    theta = Adapter(config.width, ROUND_1.d_prj, config.depth, ROUND_1.is_shared)
    adapter = sum(weight.numel() for weight in theta.parameters())
    assert 0.8 < lora / adapter < 1.25


def test_textual_inversion_changes_the_rows_of_the_rare_token_alone(pipe, tuned):
    """Here [V*] is four tokens. Prompts without it are answered as by the base."""
    model = tuned(baselines.tune_text)
    assert changed(pipe.muse, model) == {"text_encoder.token.weight"}
    before, after = pipe.muse.text_encoder.token.weight, model.text_encoder.token.weight
    rows = (before != after).any(1).nonzero()[:, 0].tolist()
    assert rows == sorted(pipe.tokenizer.encode(RARE_TOKEN)) and len(rows) == 4
    assert model.trained == 4 * before.shape[1]
    plain, styled = "a cat", "a cat in [V*] style"
    assert torch.equal(logits_of(pipe, model, plain), logits_of(pipe, pipe.muse, plain))
    assert not torch.equal(logits_of(pipe, model, styled), logits_of(pipe, pipe.muse, styled))


def test_textual_inversion_needs_the_rare_token(pipe, tokens):
    with pytest.raises(ValueError, match="contain \\[V\\*\\]"):
        baselines.tune_text(pipe, tokens, ["a house"], 1, 0.1, generator())


def test_every_reference_is_seen_with_its_own_prompt(pipe, calls):
    """Of two references, whose prompts differ."""
    passes, losses = calls(Muse, "forward"), calls(muse, "masked_loss")
    two = pipe.vqgan.encode(noise_images(2)).flatten(1)
    texts = [style_prompt(phrase, RARE_TOKEN) for phrase in ("a house", "an owl")]
    baselines.tune_text(pipe, two, texts, 1, 0.1, generator())
    (_, _, text, _), (_, ids, _) = passes[0][0], losses[0][0]
    states, _ = pipe.embed(pipe.muse, texts)
    seen = set()
    for own_ids, own_text in zip(ids, text):
        seen |= {(i, k) for i in (0, 1) for k in (0, 1)
                 if torch.equal(own_ids, two[i]) and torch.equal(own_text, states[k])}
    assert seen == {(0, 0), (1, 1)}


# -- sampling

@pytest.mark.parametrize("lambda_a", [0, 1, 2.5])
def test_sampling_with_the_base_is_that_of_the_base(pipe, lambda_a):
    """Eq. 1: lambda_A has no effect where nothing is tuned."""
    prompts, seeds = ["a cat in [V*] style", "a house", "a tree"], [5, 0, 7]
    found = baselines.sample(pipe, pipe.muse, prompts, seeds, lambda_a)
    assert torch.equal(found, pipe.generate(prompts, seed=seeds, superres=False,
                                             sampling=baselines.SAMPLING))


@each_way
def test_the_three_passes_of_equation_4(pipe, tuned, calls, tune, lr):
    """Trap: the base's passes with the weights, or with the T, of the tuned model."""
    model, passes = tuned(tune, lr), calls(baselines, "guided_logits")
    baselines.sample(pipe, model, TEXTS, [0], 1.5)
    for found, wanted in zip(passes[0][0], (
            logits_of(pipe, model, TEXTS[0]), logits_of(pipe, pipe.muse, TEXTS[0]),
            logits_of(pipe, pipe.muse, ""))):
        assert torch.allclose(found, wanted, atol=1e-5)
    assert passes[0][0][3:] == (1.5, baselines.SAMPLING.lambda_b)
    assert len(passes) == baselines.SAMPLING.steps


def test_lambda_a_leads_away_from_the_base(pipe, tuned):
    model = tuned(baselines.tune_fully)
    images = [baselines.sample(pipe, model, TEXTS, [0], lambda_a) for lambda_a in (0, 2)]
    assert not torch.equal(*images)


# -- the study

def test_the_best_settings_are_those_of_the_validation_references():
    """With the lambda_A that suits it, by the mean of the references."""
    def row(used, rate, lambda_a, score):
        return {"used": used, "method": "LoRA", "rate": rate, "lambda_a": lambda_a,
                "object and palette": score}

    rows = [row("chosen", 1e-3, 0, 0.3), row("chosen", 1e-3, 2, 0.3), row("chosen", 1e-3, 2, 0.4),
            row("chosen", 3e-3, 0, 0.0), row("chosen", 3e-3, 2, 0.9), row("chosen", 3e-3, 2, 0.1),
            row("reported", 1e-2, 0, 1.0)]
    assert baselines.best_settings(rows) == {"LoRA": (3e-3, 2)}
    assert baselines.best_settings(rows[:3]) == {"LoRA": (1e-3, 2)}
    assert baselines.best_settings(rows[-1:]) == {}


def test_differences_are_of_the_same_reference():
    """Trap: rows in another order, which an earlier run with fewer references leaves."""
    def row(method, rate, lambda_a, reference, share):
        shares = dict.fromkeys(baselines.COMPARED, share)
        return dict(shares, used="reported", method=method, rate=rate, lambda_a=lambda_a,
                    reference=reference)

    own = baselines.ADAPTER, ROUND_1.lr, baselines.SAMPLING.lambda_a
    rows = [row(*own, "a", 0.5), row(*own, "b", 0.25), row("LoRA", 1e-3, 0, "b", 0.5),
            row("LoRA", 1e-3, 0, "a", 0.75)]
    lines = baselines.minus_adapter(rows, {"LoRA": (1e-3, 0)})
    assert "| LoRA |" + " +25.0 ± 0.0: more |" * 4 in lines


class PlainRuler:
    """Every sample keeps its object, and its palette is nearest if it is bright."""

    def __init__(self, pipe, references):
        self.references = references

    def measure(self, images, objects, i, with_clip):
        assert images.shape == (2, 3, 16, 16) and objects == ["a cat", "a tree"]
        bright = (images.mean((1, 2, 3)) > 0).float().tolist()
        ones, zeros = [1.0] * len(images), [0.0] * len(images)
        return {"object kept": ones, "palette": bright, "texture": zeros,
                "object and palette": bright, "blank": zeros, "copied tokens": bright}


@pytest.fixture
def command(cli, weights, tmp_path, monkeypatch):
    """command(*arguments) -> exit code, error, and the rows of the JSON file, by a toy study."""
    def references(used, resolution):
        pictures = noise_images(3, resolution, seed=len(used))
        return [Reference(f"{used}{i}.webp", "a house", "flat", "oil", used, picture)
                for i, picture in enumerate(pictures)]

    monkeypatch.setattr(baselines, "load_references", references)
    monkeypatch.setattr(baselines, "Ruler", PlainRuler)
    monkeypatch.setattr(baselines, "STEPS", dict.fromkeys(baselines.STEPS, 1))
    monkeypatch.setattr(baselines, "RATES", {
        "full fine-tuning": (1e-3,), "LoRA": (1e-3, 1e-2), "textual inversion": (0.1,)})
    quick = partial(baselines.sample, sampling=replace(baselines.SAMPLING, steps=2))
    monkeypatch.setattr(baselines, "sample", quick)
    monkeypatch.setattr(baselines, "LAMBDAS", (0, 0.75))
    monkeypatch.setattr(baselines, "OBJECTS", ("a cat", "a tree"))
    monkeypatch.setattr(baselines, "SEEDS", [0, 1])

    def run(*arguments):
        code, _, err = cli(baselines.main, "--weights", weights, "--out", tmp_path, *arguments)
        file = tmp_path / "baselines.json"
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        return SimpleNamespace(code=code, err=err, rows=rows)
    return run


def test_the_study_chooses_reports_and_resumes(command, tmp_path, calls):
    """By two references, on one; then on another one, and nothing twice."""
    assert "--choose" in command().err                       # no rates are chosen yet
    found = command("--choose", "--references", 2)
    assert found.code == 0, found.err
    assert len(found.rows) == 2 * 4 * 2                      # references, rates, lambdas

    found = command("--references", 1)
    assert found.code == 0, found.err
    reported = [row for row in found.rows if row["used"] == "reported"]
    assert [(row["method"], row["lambda_a"]) for row in reported] == [
        ("control: the base", 0), ("adapter", 0), ("adapter", 0.75), ("full fine-tuning", 0),
        ("full fine-tuning", 0.75), ("LoRA", 0), ("LoRA", 0.75), ("textual inversion", 0),
        ("textual inversion", 0.75)]
    best = baselines.best_settings(found.rows)
    assert all(row["rate"] == best[row["method"]][0] for row in reported[3:])

    tuned = calls(StyleDrop, "tune")
    again = command("--references", 2)
    assert again.code == 0 and len(tuned) == 1               # only the second one is new
    assert again.rows[:len(found.rows)] == found.rows
    text = (tmp_path / "baselines.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
             if line.startswith("| adapter | ")]
    palette = [100 * row["palette"] for row in again.rows
               if (row["method"], row["lambda_a"]) == ("adapter", 0.75)]
    assert cells[1][:5] == ["adapter", f"{ROUND_1.lr:g}", "0.75", "2", "100.0 ± 0.0 %"]
    assert cells[1][5].startswith(f"{np.mean(palette):.1f} ± ")
    assert text.count("| LoRA |") == 2 + 1 + 2 * 2           # test, minus the adapter, validation
    lora = [100 * row["palette"] for row in again.rows if row["used"] == "reported"
            and (row["method"], row["lambda_a"]) == ("LoRA", best["LoRA"][1])]
    minus = np.mean(lora) - np.mean(palette)
    assert f"| LoRA | +0.0 ± 0.0: equal | {minus:+.1f} ± " in text


def test_results_of_another_base_are_not_continued(command, tmp_path):
    (tmp_path / "baselines.json").write_text('{"settings": {"base": "other"}, "rows": []}')
    found = command("--choose")
    assert found.code == 2 and "another base" in found.err and found.rows == []
