"""What tuning may learn: one loss, one sampler and one file format for four ways to tune."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import noise_images

import styledrop
from adapter import METHODS, LoRA
from styledrop import SECOND_TUNING, fingerprint, load_adapter, style_prompt

PHRASE, PROMPTS = "watercolor painting", ["a cat", "a house"]


@pytest.fixture(scope="module", params=METHODS)
def tuned(pipe2, request):
    """What 30 steps on two pictures make of each way to tune, in both stages where it has both."""
    parts, losses = (pipe2.vqgan, pipe2.clip, pipe2.muse, pipe2.superres), []
    before = [fingerprint(part.state_dict()) for part in parts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(styledrop, "SECOND_TUNING", replace(SECOND_TUNING, steps=30, lr=1e-2))
        theta = pipe2.tune(noise_images(2, 32), PROMPTS, PHRASE, steps=30, lr=1e-2, d_prj=2,
                           method=request.param, on_step=lambda *a: losses.append(a[2]))
    assert before == [fingerprint(part.state_dict()) for part in parts]
    assert not any(p.grad is not None or p.requires_grad for m in parts for p in m.parameters())
    return SimpleNamespace(method=request.param, theta=theta, losses=losses)


def test_only_theta_learns(pipe2, tuned):
    """Every tensor of the base is the same bit for bit (see the fixture), the loss falls, and the
    pictures are others. Methods other than "adapter" tune the first stage alone.
    Traps: full tuning in place; norms or embeddings trained along.
    """
    theta, losses, second = tuned.theta, tuned.losses, tuned.theta.superres
    if tuned.method == "adapter":
        how = dict(d_emb=32, d_prj=SECOND_TUNING.d_prj, n_layer=3, is_shared=False)
        assert second.config == how and len(losses) == 60
        assert sum(losses[-5:]) < sum(losses[30:35])
    else:
        assert second is None and len(losses) == 30
    assert sum(losses[25:30]) < sum(losses[:5])
    assert all(p.grad.abs().sum() > 0 and not p.requires_grad for p in theta.parameters())
    assert theta.about["base"] == pipe2.base and theta.about["prompts"] == PROMPTS
    drawn = [pipe2.generate(prompt, style, steps=4, superres=False) for prompt, style in
             (("a cat", theta), (style_prompt("a cat", PHRASE), None))]
    assert not torch.equal(*drawn)


def test_file_round_trip(pipe2, tuned, tmp_path):
    """Traps: weights of the second stage dropped, drawn anew, or of a method that has none."""
    tuned.theta.save(tmp_path / "adapter.pt")
    again = load_adapter(tmp_path)
    assert type(again) is METHODS[tuned.method] and again.about == tuned.theta.about
    assert fingerprint(again.state_dict()) == fingerprint(tuned.theta.state_dict())
    assert torch.equal(*(pipe2.generate("a cat", theta, steps=2) for theta in (again, tuned.theta)))


def test_only_its_words_mean_something_else(pipe2, tuned):
    """Of textual inversion; else T reads as before. Trap: the whole table of vectors trained."""
    T, words = pipe2.muse.text_encoder, set(pipe2.tokenizer.encode(PHRASE))
    ids = pipe2.tokenizer(["a house", f"a house in {PHRASE} style"], pipe2.muse.config.text_length)
    changed = (tuned.theta.words(ids, T.token(ids)) != T.token(ids)).any(-1)
    states = [pipe2.embed(pipe2.muse, ["a house", PHRASE], t)[0] for t in (None, tuned.theta)]
    assert torch.equal(states[0][0], states[1][0])
    if tuned.method == "textual-inversion":
        assert set(tuned.theta.config["tokens"]) == words and len(tuned.theta.vectors) == len(words)
        assert torch.equal(changed, torch.isin(ids, torch.tensor(list(words))))
    assert torch.equal(*states) == (not changed.any()) == (tuned.method != "textual-inversion")


@pytest.mark.parametrize("method", METHODS)
def test_starts_from_the_base(pipe, method):
    """G^ is G, so Eq. 4 is Eq. 1 for every lambda_A. Trap: random "up" matrices."""
    fresh = pipe.tune(noise_images(2), PROMPTS, PHRASE, steps=0, method=method)
    styled = pipe.generate(PROMPTS, style=fresh, steps=4, lambda_a=3.0)
    base = pipe.generate([style_prompt(p, PHRASE) for p in PROMPTS], steps=4)
    assert torch.allclose(styled, base, atol=1e-4)


def test_lora_against_its_formula(pipe):
    """W + U A on every q and v and nothing else; the rank bounds the change."""
    c = pipe.muse.config
    lora = LoRA(c.width, 2, c.layers, torch.Generator().manual_seed(0)).requires_grad_(False)
    lora.up.normal_(generator=torch.Generator().manual_seed(1))
    replaced = lora.weights(pipe.muse)
    assert len(replaced) == 4 * c.layers
    for i, (name, weight) in enumerate(replaced.items()):
        difference = weight - pipe.muse.get_parameter(name)
        assert name.split(".")[3] in "qv" and torch.linalg.matrix_rank(difference, tol=1e-4) == 2
        assert torch.allclose(difference, lora.up[i] @ lora.down[i], atol=1e-5)
