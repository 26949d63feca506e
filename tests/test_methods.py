"""What tuning may learn: one loss, one sampler and one file format for four ways to tune."""

import pytest
import torch
from conftest import noise_images

from adapter import METHODS, LoRA
from styledrop import load_adapter, style_prompt

PHRASE = "watercolor painting"
OTHERS = [method for method in METHODS if method != "adapter"]
flat = lambda theta: {name: p.detach().clone() for name, p in theta.state_dict().items()}


@pytest.fixture
def tune(pipe):
    return lambda method, steps=4, lr=1e-2, **options: pipe.tune(noise_images(
        2), ["a cat", "a house"], PHRASE, steps=steps, lr=lr, d_prj=2, method=method, **options)


@pytest.mark.parametrize("method", METHODS)
def test_starts_from_the_base(pipe, tune, method):
    """Before the first step G^ is G, so Eq. 4 is Eq. 1 for every lambda_A.

    Trap: random "up" matrices.
    """
    fresh = tune(method, steps=0)
    with_it = pipe.generate(["a cat", "a tree"], style=fresh, steps=4, lambda_a=3.0)
    without = pipe.generate([style_prompt(p, PHRASE) for p in ("a cat", "a tree")], steps=4)
    assert torch.allclose(with_it, without, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_only_theta_learns(pipe, tune, method):
    """Every tensor of the base is the same bit for bit, and the pictures are others.

    Trap: full tuning in place.
    """
    before = {
        name: p.clone()
        for part in (pipe.muse, pipe.clip, pipe.vqgan)
        for name, p in part.state_dict().items()
    }
    losses = []
    theta = tune(method, steps=30, on_step=lambda step, steps, loss: losses.append(loss))
    after = {
        name: p
        for part in (pipe.muse, pipe.clip, pipe.vqgan)
        for name, p in part.state_dict().items()
    }
    assert all(torch.equal(p, after[name]) for name, p in before.items())
    assert sum(losses[-5:]) < sum(losses[:5])
    changed = pipe.generate("a cat", style=theta, steps=4)
    assert not torch.equal(changed, pipe.generate(style_prompt("a cat", PHRASE), steps=4))


@pytest.mark.parametrize("method", METHODS)
def test_file_round_trip(pipe, tune, tmp_path, method):
    """The file gives back the method, the weights and the pictures."""
    theta = tune(method)
    theta.save(tmp_path / "adapter.pt")
    again = load_adapter(tmp_path)
    assert type(again) is METHODS[method] and again.about == theta.about
    assert torch.equal(pipe.generate("a cat", style=again, steps=3),
                       pipe.generate("a cat", style=theta, steps=3))


def test_lora_against_its_formula(pipe):
    """W + U A on every q and v and nothing else; the rank bounds the change."""
    c = pipe.muse.config
    lora = LoRA(c.width, 2, c.layers, torch.Generator().manual_seed(0))
    with torch.no_grad():
        lora.up.normal_(generator=torch.Generator().manual_seed(1))
    replaced = lora.weights(pipe.muse)
    assert len(replaced) == 4 * c.layers
    for i, (name, weight) in enumerate(replaced.items()):
        assert name.split(".")[3] in "qv"
        difference = weight - pipe.muse.get_parameter(name)
        assert torch.allclose(difference, lora.up[i] @ lora.down[i], atol=1e-5)
        assert torch.linalg.matrix_rank(difference, tol=1e-4) == 2


def test_full_fine_tuning_has_every_parameter_but_those_of_t(pipe, tune):
    """T is frozen in everything that StyleDrop does."""
    theta = tune("full", steps=0)
    names = {name for name, _ in pipe.muse.named_parameters()}
    assert set(theta.config["shapes"]) == {n for n in names if not n.startswith("text_encoder.")}
    assert any(n.startswith("text_encoder.") for n in names)
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert count(theta) == count(pipe.muse) - count(pipe.muse.text_encoder)


@pytest.mark.parametrize("method", METHODS)
def test_t_reads_as_before(pipe, tune, method):
    """Only textual inversion changes what a text means, and only where its words stand."""
    theta = tune(method, lr=0.1)
    read = lambda *theta: pipe.embed(pipe.muse, ["a house", PHRASE], *theta)
    before, after = read(), read(theta)
    assert torch.equal(before[1], after[1]) and torch.equal(before[0][0], after[0][0])
    assert torch.equal(before[0][1], after[0][1]) == (method != "textual-inversion")


def test_textual_inversion_changes_only_its_words(pipe, tune):
    """Text without the phrase's tokens is embedded as before.

    Trap: the whole table of vectors trained.
    """
    theta = tune("textual-inversion", steps=10)
    tokens = pipe.tokenizer.encode(PHRASE)
    assert sorted(theta.config["tokens"]) == sorted(set(tokens))
    assert theta.vectors.shape == (len(set(tokens)), pipe.muse.config.text_width)
    ids = pipe.tokenizer(["a house", f"a house in {PHRASE} style"], pipe.muse.config.text_length)
    vectors = pipe.muse.text_encoder.token(ids)
    same = (theta.words(ids, vectors) == vectors).all(-1)
    assert torch.equal(same, ~torch.isin(ids, torch.tensor(tokens)))


def test_textual_inversion_needs_words(pipe):
    with pytest.raises(ValueError, match="words of the style phrase"):
        pipe.tune(noise_images(1), ["a cat"], "", steps=1, method="textual-inversion")


@pytest.mark.parametrize("method", OTHERS)
def test_they_tune_the_first_stage_alone(pipe2, method):
    """And draw both. Trap: the second stage's adapter of a method that has none."""
    theta = pipe2.tune(noise_images(2, 32), ["a cat", "a house"], PHRASE, steps=1, method=method)
    assert theta.superres is None
    assert pipe2.generate("a cat", theta, steps=1).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("method", OTHERS)
def test_mixed_with_an_adapter(pipe, tune, make_adapter, method):
    """A style of any method and an object's adapter: endpoints of gamma are the single ones."""
    theta, content = tune(method), make_adapter(1, style="")
    draw = lambda **options: pipe.generate(["a cat"], steps=3, **options)
    assert torch.equal(draw(style=theta, content=content, gamma=0.0), draw(style=theta))
    assert torch.equal(draw(style=theta, content=content, gamma=1.0), draw(content=content))
    assert not torch.equal(draw(style=theta, content=content, gamma=0.5), draw(style=theta))
