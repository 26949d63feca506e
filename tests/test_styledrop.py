"""styledrop.py: guidance by separate passes, tuning by Eq. 3, files that are whole or not there."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TOKENIZER, VOCABULARY, noise_images, save_merges, shake, toy_muse

import muse as muse_
import styledrop
from adapter import Adapter
from muse import SUPERRES, Muse
from styledrop import (LAMBDA_A, LAMBDA_A_WORDS, SECOND, StyleDrop, check_prompt, fingerprint,
                       grid, guided_logits, load_adapter, load_model, mix_logits, save_model,
                       style_prompt, to_tensor, to_uint8, unknown_words, write_whole)
from vqgan import VQGAN, VQGANConfig

PROMPTS = ["a cat", "a house"]
PHRASE = "watercolor painting"


# -- equations

def test_style_prompt():
    """Content phrase, then style phrase (Table S4); without a style the content alone."""
    assert style_prompt("a cat", "watercolor painting") == "a cat in watercolor painting style"
    assert style_prompt("a cat", "") == "a cat"


def test_eq4_coefficients():
    """(1 + lA) G^(t) + (lB - lA) G(t) - lB G(n): 3, 3, -5 at (2, 5); they sum to 1.

    Trap: G^(t) - G^(n) or G^(t) - G(n) in the lB term, which is another equation.
    """
    one, zero = torch.ones(1), torch.zeros(1)
    weights = lambda a, b: [
        guided_logits(*(one if i == j else zero for j in range(3)), a, b).item() for i in range(3)
    ]
    assert weights(2, 5) == [3, 3, -5] and weights(1, 0) == [2, -1, 0]
    assert weights(0, 0) == [1, 0, 0]
    for a, b in ((0.7, 3.1), (5, 0), (0, 12)):
        assert sum(weights(a, b)) == pytest.approx(1, abs=1e-5)


def test_eq4_without_an_adapter_is_eq1():
    base, null = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)), torch.ones(2, 5)
    assert torch.equal(guided_logits(base, base, null, 0, 5), base + 5 * (base - null))
    assert torch.equal(guided_logits(base, base, null, 2, 5), base + 5 * (base - null))


def test_mix_endpoints():
    s, c = torch.tensor([0.1, 3.3]), torch.tensor([7.7, -0.3])
    assert torch.equal(mix_logits(s, c, 0), s) and torch.equal(mix_logits(s, c, 1), c)
    assert torch.allclose(mix_logits(s, c, 0.25), 0.75 * s + 0.25 * c)


# -- sampling

def test_embed_pads_nothing_into_the_text(pipe):
    """A prompt's states do not hang on the prompts beside it."""
    both, mask = pipe.embed(pipe.muse, ["a cat", "a cat in watercolor painting style"])
    alone, alone_mask = pipe.embed(pipe.muse, ["a cat"])
    assert torch.equal(mask[:1], alone_mask) and torch.allclose(both[:1], alone, atol=1e-5)
    c = pipe.muse.config
    assert both.shape == (2, c.text_length + c.registers, c.text_width)


def logits_of(pipe, monkeypatch, prompts=PROMPTS, **options):
    """The guided logits that generate() hands to decode, and G(prompts,
    adapter) to build them by hand.
    """
    caught, calls = [], []
    ids = torch.randint(pipe.muse.config.mask_id + 1, (len(prompts), pipe.muse.config.tokens),
                        generator=torch.Generator().manual_seed(3))
    with monkeypatch.context() as patch:
        patch.setattr(muse_, "decode",
                      lambda fn, b, n, *rest: caught.append(fn(ids, 0)) or torch.zeros(b, n).long())
        forward = Muse.forward
        patch.setattr(Muse, "forward",
                      lambda self, *a: calls.append(len(a[0])) or forward(self, *a))
        pipe.generate(prompts, **options)

    @torch.no_grad()
    def G(prompts, adapter=None):
        text, mask = pipe.embed(pipe.muse, prompts)
        return pipe.muse(ids, text, mask, None if adapter is None else adapter())
    return caught[0], G, calls


close = lambda x, y: torch.allclose(x, y, atol=1e-4, rtol=1e-4)
styled = [style_prompt(p, PHRASE) for p in PROMPTS]
null = ["", ""]


@pytest.mark.parametrize("fast", [False, True])
def test_g_runs_in_bf16_where_that_is_fast(pipe, make_adapter, monkeypatch, fast):
    """Sampling and tuning alike; the logits come out in fp32 and stay near."""
    style, seen, forward = make_adapter(), [], Muse.forward
    exact, *_ = logits_of(pipe, monkeypatch, style=style)
    monkeypatch.setattr(styledrop, "fast_bf16", lambda device: fast)
    monkeypatch.setattr(
        Muse, "forward",
        lambda self, *a: seen.append(torch.is_autocast_enabled("cpu")) or forward(self, *a))
    ours, *_ = logits_of(pipe, monkeypatch, style=style)
    assert ours.dtype == torch.float32 and seen == [fast] * 3
    assert (ours - exact).norm() < 0.05 * exact.norm() and torch.equal(ours, exact) == (not fast)
    losses = []
    pipe.tune(noise_images(1), ["a cat"], PHRASE, steps=3,
              on_step=lambda step, steps, loss: losses.append(loss))
    assert seen[3:] == [fast] * 3 and all(map(math.isfinite, losses))


@pytest.mark.parametrize("device, able, fast", [("cuda", (), True), ("mps", ("amx_tile", ), False),
                                                ("cpu", (), False), ("cpu", ("amx_tile", ), True),
                                                ("cpu", ("avx512_bf16", ), True)])
def test_which_machines_are_fast_in_bf16(monkeypatch, device, able, fast):
    monkeypatch.undo()
    for what in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{what}_supported", lambda what=what: what in able,
                            raising=False)
    assert styledrop.fast_bf16(device) == fast


def test_eq4_from_separate_passes(pipe, make_adapter, monkeypatch):
    """3 G^(t) + 3 G(t) - 5 G(n), t with the style phrase, in three forward passes.

    Traps: the phrase is forgotten; the tuned model sees n; a branch gets its neighbour's text or
    adapter.
    """
    style = make_adapter()
    ours, G, calls = logits_of(pipe, monkeypatch, style=style, lambda_a=2, lambda_b=5)
    assert close(ours, 3 * G(styled, style) + 3 * G(styled) - 5 * G(null)) and calls == [2] * 3
    assert not close(ours, 3 * G(PROMPTS, style) + 3 * G(PROMPTS) - 5 * G(null))
    assert not close(ours, 3 * G(styled, style) + 3 * G(styled) - 5 * G(null, style))


def test_negative_prompt_and_style_phrase(pipe, make_adapter, monkeypatch):
    """Both can be chosen, and n still meets the untuned model."""
    style, blurry = make_adapter(), ["blurry", "blurry"]
    ours, G, _ = logits_of(pipe, monkeypatch, style=style, negative="blurry",
                           style_phrase="flat vector", lambda_a=1, lambda_b=2)
    t = [style_prompt(p, "flat vector") for p in PROMPTS]
    assert close(ours, 2 * G(t, style) + G(t) - 2 * G(blurry))


def test_no_guidance_is_the_tuned_model_alone(pipe, make_adapter, monkeypatch):
    """Trap: lambda_a = lambda_b = 0 read as "no adapter"."""
    style = make_adapter()
    ours, G, calls = logits_of(pipe, monkeypatch, style=style, lambda_a=0, lambda_b=0)
    assert close(ours, G(styled, style)) and not close(ours, G(styled))
    assert calls == [2] * 2                                 # and n is not asked


def test_base_is_eq1(pipe, monkeypatch):
    """G(t) + lambda (G(t) - G(n)) whatever lambda_a is; two passes."""
    ours, G, calls = logits_of(pipe, monkeypatch, lambda_a=3, lambda_b=2)
    assert close(ours, 3 * G(PROMPTS) - 2 * G(null)) and calls == [2] * 2


def test_eq4_with_the_style_in_words(pipe, make_adapter, monkeypatch):
    """The phrase stands in the adapter's place: 3 G(t) - 2 G(c) + 5 (G(c) - G(n)), three passes.

    A phrase for each prompt, or none; lambda_a = lambda_b is Eq. 1 on the whole prompt; beside a
    content adapter Eq. 5 is of the words, and each side has the lambda_a of its kind.
    """
    ours, G, calls = logits_of(pipe, monkeypatch, style_phrase=PHRASE, lambda_a=2, lambda_b=5)
    assert close(ours, 3 * G(styled) - 2 * G(PROMPTS) + 5 * (G(PROMPTS) - G(null)))
    assert calls == [2] * 3
    ours, G, _ = logits_of(pipe, monkeypatch, style_phrase=PHRASE, lambda_a=5, lambda_b=5)
    assert close(ours, 6 * G(styled) - 5 * G(null))
    mixed, G, _ = logits_of(pipe, monkeypatch, style_phrase=["", PHRASE], lambda_a=2, lambda_b=5)
    assert close(mixed[:1], (6 * G(PROMPTS) - 5 * G(null))[:1])
    assert close(mixed[1:], (3 * G(styled) - 2 * G(PROMPTS) + 5 * (G(PROMPTS) - G(null)))[1:])
    content, a, w = make_adapter(2, style="teapot"), LAMBDA_A, LAMBDA_A_WORDS
    ours, G, calls = logits_of(pipe, monkeypatch, style_phrase=PHRASE, content=content, gamma=0.3,
                               lambda_b=5)
    l_s = (1 + w) * G(styled) - w * G(PROMPTS) + 5 * (G(PROMPTS) - G(null))
    l_c = (1 + a) * G(PROMPTS, content) - a * G(PROMPTS) + 5 * (G(PROMPTS) - G(null))
    assert close(ours, 0.7 * l_s + 0.3 * l_c) and calls == [2] * 4
    with pytest.raises(ValueError, match="1 style phrases .* for 2 prompts"):
        pipe.generate(PROMPTS, style_phrase=[PHRASE], steps=1)


def test_eq5_and_eq6_from_separate_passes(pipe, make_adapter, monkeypatch):
    """(1 - g) l_s + g l_c: five passes; c carries no style word.

    Traps: adapters swapped, G(t) used for c.
    """
    style, content = make_adapter(1), make_adapter(2, style="teapot")
    ours, G, calls = logits_of(pipe, monkeypatch, style=style, content=content, gamma=0.3,
                               lambda_a=2, lambda_b=5)
    l_s = 3 * G(styled, style) + 3 * G(styled) - 5 * G(null)
    l_c = 3 * G(PROMPTS, content) + 3 * G(PROMPTS) - 5 * G(null)
    assert close(ours, 0.7 * l_s + 0.3 * l_c) and calls == [2] * 5
    alone, _, calls = logits_of(pipe, monkeypatch, content=content, lambda_a=2, lambda_b=5)
    assert close(alone, l_c) and calls == [2] * 3
    ours, G, _ = logits_of(pipe, monkeypatch, style=style, content=content, gamma=0.3, lambda_a=2,
                           lambda_b=5, lambda_a_content=0)
    l_c = G(PROMPTS, content) + 5 * (G(PROMPTS) - G(null))
    assert close(ours, 0.7 * l_s + 0.3 * l_c)


@pytest.mark.parametrize("gamma, kept", [(0.0, "style"), (1.0, "content")])
def test_gamma_ends_are_single_adapters(pipe, make_adapter, gamma, kept):
    """Bit by bit. Trap: a mix that is nearly the end of the line."""
    adapters = dict(style=make_adapter(1), content=make_adapter(2))
    both = pipe.generate(PROMPTS, **adapters, gamma=gamma, steps=4)
    assert torch.equal(both, pipe.generate(PROMPTS, **{kept: adapters[kept]}, steps=4))
    assert not torch.equal(both, pipe.generate(PROMPTS, **adapters, gamma=0.5, steps=4))


def test_a_fresh_adapter_draws_what_the_base_draws(pipe, make_adapter):
    """Bit by bit, at the same prompt text: tuning starts from the base, whatever lambda_a is."""
    fresh = pipe.generate(PROMPTS, style=make_adapter(sd=0), steps=4)
    assert torch.equal(fresh, pipe.generate(styled, steps=4))
    assert not torch.equal(fresh, pipe.generate(styled, style=make_adapter(style=""), steps=4))


def tokens_of(pipe, prompts, **options):
    """What generate() draws: the tokens (B, N) of each stage, and the pictures."""
    drawn = {}
    note = lambda step, ids, kept: drawn.update({len(ids[0]): ids})
    images = pipe.generate(prompts, on_step=note, **options)
    return *drawn.values(), images


def test_the_seed_is_the_picture(pipe, make_adapter):
    """Traps: global chance leaks in; the seed is set once and runs on."""
    draw = lambda seed: pipe.generate(PROMPTS, style=make_adapter(), seed=seed, steps=4)
    first = draw(0)
    torch.manual_seed(99)
    assert torch.equal(first, draw(0)) and not torch.equal(first, draw(1))
    assert first.shape == (2, 3, 16, 16) and first.abs().max() <= 1
    assert torch.equal(first, draw([0, 1])) and not torch.equal(first, draw([0, 0]))
    assert torch.equal(pipe.generate("a cat", steps=2), pipe.generate(["a cat"], steps=2))
    with pytest.raises(ValueError, match="3 seeds for 2 prompts"):
        draw([1, 2, 3])


def test_a_picture_is_its_prompt_and_its_seed(pipe2, make_adapter):
    """Picture i has seed + i: alone, at another place, beside others, in both stages.

    Trap: one generator for the batch, and the company decides.
    """
    prompts = ["a cat", "a house", "a cat"]
    style = second_adapter(pipe2, make_adapter(base=pipe2.base))
    low, high, images = tokens_of(pipe2, prompts, style=style, seed=7, steps=3)
    for i, prompt in enumerate(prompts):
        one, two, image = tokens_of(pipe2, prompt, style=style, seed=7 + i, steps=3)
        assert torch.equal(one[0], low[i]) and torch.equal(two[0], high[i])
        assert torch.allclose(image[0], images[i], atol=1e-4)
    assert not torch.equal(low[0], low[2])                  # a cat of another seed is another cat


# -- both stages

def second_adapter(pipe2, adapter, seed=0):
    """The adapter with another for the second stage, whose effect is plain to see."""
    c = pipe2.superres.config
    generator = torch.Generator().manual_seed(seed)
    second = shake(Adapter(c.width, 4, c.depth, False, generator), 0.3, seed)
    adapter.superres = second.requires_grad_(False)
    return adapter


def test_the_second_stage_doubles_the_picture(pipe, pipe2):
    """From the same low tokens, at the same seed; superres=False is the base's own picture."""
    low, high, images = tokens_of(pipe2, PROMPTS, seed=3, steps=3)
    small, small_image = tokens_of(pipe2, PROMPTS, seed=3, steps=3, superres=False)
    assert images.shape == (2, 3, 32, 32) and pipe2.resolution == 32 and pipe.resolution == 16
    assert (low.shape, high.shape) == ((2, 16), (2, 64)) and torch.equal(low, small)
    assert torch.equal(small_image, pipe.generate(PROMPTS, seed=3, steps=3))
    assert torch.equal(images, pipe2.vqgan.decode(high.view(2, 8, 8)))


def test_the_second_stage_has_lambdas_of_its_own(pipe2, make_adapter, monkeypatch):
    """2 G^(t) - G(t) over the low tokens, whatever lambdas the first has, in 12 steps.

    Traps: a null pass that is not needed; the first's strengths; its temperature's steps.
    """
    style, calls, forward = second_adapter(pipe2, make_adapter(base=pipe2.base)), [], Muse.forward
    caught, decode = [], muse_.decode
    monkeypatch.setattr(muse_, "decode", lambda fn, *a: caught.append((fn, a)) or decode(fn, *a))
    monkeypatch.setattr(Muse, "forward", lambda self, *a: calls.append(
        (self is pipe2.superres, a)) or forward(self, *a))
    low, _, _ = tokens_of(pipe2, PROMPTS, style=style, lambda_a=3, lambda_b=5, steps=2)
    assert [second for second, _ in calls] == [False] * 2 * 3 + [True] * 12 * 2
    assert all(torch.equal(a[4], low) for second, a in calls if second)
    text, mask = pipe2.embed(pipe2.superres, styled)
    ids = torch.randint(33, (2, 64), generator=torch.Generator().manual_seed(0))
    G = lambda adapters: pipe2.superres(ids, text, mask, adapters, low)
    assert close(caught[1][0](ids, 0), 2 * G(style.superres()) - G(None))
    calls.clear()
    tokens_of(pipe2, PROMPTS, style_phrase=PHRASE, steps=1)                      # no adapter: G(t)
    assert close(caught[3][0](ids, 0), pipe2.superres(ids, text, mask, None, calls[-1][1][4]))
    assert sum(second for second, _ in calls) == 12 + 2


def test_each_stage_has_its_own_adapter(pipe2, make_adapter):
    """.superres changes the second stage's tokens and leaves the first's as they are."""
    without = tokens_of(pipe2, PROMPTS, style=make_adapter(base=pipe2.base), steps=3)
    styles = (second_adapter(pipe2, make_adapter(base=pipe2.base), seed) for seed in (0, 1))
    one, two = (tokens_of(pipe2, PROMPTS, style=style, steps=3) for style in styles)
    assert torch.equal(one[0], without[0]) and torch.equal(two[0], without[0])
    for a, b in ((one, without), (two, without), (one, two)):
        assert not torch.equal(a[1], b[1])


@pytest.mark.parametrize("has", ["both", "style", "content", "neither"])
def test_gamma_ends_are_exact_in_both_stages(pipe2, make_adapter, has):
    """Also where one of the two was tuned without the second stage, or stands in words.

    Trap: at gamma 1 the style goes on drawing in the second stage, at gamma 0 the object.
    """
    style = make_adapter(1, base=pipe2.base)
    content = make_adapter(2, style="teapot", base=pipe2.base)
    for name, adapter in (("style", style), ("content", content)):
        if has in ("both", name):
            second_adapter(pipe2, adapter, 5)
    draw = lambda **options: tokens_of(pipe2, PROMPTS, steps=2, **options)[:2]
    same = lambda a, b: all(map(torch.equal, a, b))
    assert same(draw(style=style, content=content, gamma=0.0), draw(style=style))
    assert same(draw(style=style, content=content, gamma=1.0), draw(content=content))
    words = dict(style_phrase=PHRASE)
    assert same(draw(content=content, gamma=0.0, **words), draw(**words))


def test_tuning_changes_only_theta_in_both_stages(pipe2, monkeypatch):
    """The second stage sees each reference's high tokens with its own low ones, the loss falls.

    Traps: G_sr trained along; low tokens of another reference; on_step of the first stage alone.
    """
    monkeypatch.setattr(styledrop, "SECOND", replace(SECOND, steps=3))
    prints = lambda: [fingerprint(part.state_dict()) for part in
                      (pipe2.vqgan, pipe2.muse, pipe2.superres)]
    before, steps, seen, forward = prints(), [], [], Muse.forward
    images, prompts = noise_images(3, 32, seed=5), ["a cat", "a house", "an owl"]
    small = torch.nn.functional.interpolate(images, (16, 16), mode="area")
    low, high = (pipe2.vqgan.encode(x).flatten(1) for x in (small, images))
    loss = muse_.masked_loss
    with monkeypatch.context() as patch:
        patch.setattr(Muse, "forward", lambda self, *a: seen.append(a[4]) or forward(self, *a))
        patch.setattr(muse_, "masked_loss", lambda logits, ids, mask: seen.append(ids) or loss(
            logits, ids, mask))
        adapter = pipe2.tune(images, prompts, PHRASE, steps=2,
                             on_step=lambda *a: steps.append(a[:2]))
    assert steps == [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)] and prints() == before
    assert seen[0] is None and seen[2] is None
    for shown_low, ids in zip(seen[4::2], seen[5::2]):
        for a, b in zip(shown_low, ids):
            row = int((high == b).all(1).nonzero())
            assert torch.equal(a, low[row])
    second = adapter.superres
    assert second.config == dict(d_emb=32, d_prj=SECOND.d_prj, n_layer=3, is_shared=False)
    assert all(p.grad.abs().sum() > 0 and not p.requires_grad for p in adapter.parameters())
    for part in (pipe2.muse, pipe2.superres):
        assert all(p.grad is None for p in part.parameters())


def test_when_the_first_stage_is_tuned_alone(pipe2, monkeypatch):
    """On small references or as told; and with the same bits as beside the second stage."""
    monkeypatch.setattr(styledrop, "SECOND", replace(SECOND, steps=1))
    images = noise_images(1, 32)
    small = torch.nn.functional.interpolate(images, (16, 16), mode="area")
    tune = lambda images, **how: pipe2.tune(images, ["a cat"], PHRASE, steps=2, **how)
    both, told, low = tune(images), tune(images, superres=False), tune(small)
    assert both.superres is not None and told.superres is low.superres is None
    for alone in (told, low):
        assert all(torch.equal(p, both.state_dict()[k]) for k, p in alone.state_dict().items())


def test_an_adapter_of_both_stages_round_trip(pipe2, make_adapter, tmp_path):
    """One file; the same pictures. Trap: the second stage's weights are dropped or drawn anew."""
    adapter = second_adapter(pipe2, make_adapter(base=pipe2.base))
    adapter.save(tmp_path / "adapter.pt")
    again = load_adapter(tmp_path)
    assert again.superres.config == adapter.superres.config and again.about == adapter.about
    assert fingerprint(again.state_dict()) == fingerprint(adapter.state_dict())
    assert torch.equal(*(pipe2.generate("a cat", theta, steps=2) for theta in (adapter, again)))
    saved = torch.load(tmp_path / "adapter.pt", weights_only=True)
    saved["superres"] = None
    torch.save(saved, tmp_path / "adapter.pt")
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("wrong", ["cut", "words", "grid", "codes"])
def test_a_second_stage_that_does_not_fit_is_one_line(weights2, tmp_path, wrong):
    """Trap: it is left out in silence, and pictures are small."""
    for path in weights2.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changes = dict(grid=dict(grid=4, low_grid=2), codes=dict(codebook_size=33)).get(wrong, {})
    merges = save_merges(TOKENIZER)[::-1 if wrong == "words" else 1]
    save_model(tmp_path / "superres.pt", "superres", toy_muse(presets=SUPERRES, **changes), {},
               merges=merges)
    if wrong == "cut":
        (tmp_path / "superres.pt").write_bytes((tmp_path / "superres.pt").read_bytes()[:-500])
    with pytest.raises(ValueError, match="superres.pt") as error:
        StyleDrop.load(tmp_path, "cpu")
    assert one_line(error)


# -- words

def test_unknown_words(pipe):
    """Words of no caption, with what is near them; rare tokens and marks are none of them."""
    assert unknown_words(pipe.words, "a Catt in WATERCOLOR, painting style.") == {"catt": ["cat"]}
    assert unknown_words(pipe.words, "a cat! a house; \"an owl\"?") == {}
    assert unknown_words(pipe.words, "zzz") == {"zzz": []}
    assert unknown_words({"cat", "[v]", "[v*]"}, "[V] cat [V*]") == {}
    assert unknown_words({"teapot"}, "pot") == {"pot": ["teapot"]}


def test_a_prompt_is_checked_and_drawn_all_the_same(pipe, capsys):
    """A note for each word, none for a known prompt. Trap: a KeyError, or a refusal."""
    check_prompt(pipe, "a catt", "watercolor paintin")
    first, second = capsys.readouterr().err.splitlines()
    assert "'catt'" in first and "near: cat" in first and "'paintin'" in second
    check_prompt(pipe, "a cat", PHRASE)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match="empty"):
        check_prompt(pipe, " ")


@pytest.mark.parametrize("role", ["style", "content"])
def test_an_adapter_of_another_base_is_refused(pipe, make_adapter, role):
    """Trap: shapes fit, so it runs, and draws noise."""
    with pytest.raises(ValueError, match="0123456789ab"):
        pipe.generate("a cat", **{role: make_adapter(base="0123456789ab")})


# -- tuning

@pytest.fixture(scope="session")
def references(pipe):
    """Three pictures with different tokens, and what they show."""
    images = noise_images(3, seed=5)
    tokens = pipe.vqgan.encode(images).flatten(1)
    assert len(tokens.unique(dim=0)) == 3
    return images, ["a cat", "a house and a tree", "an owl in a house"], tokens


@pytest.fixture
def watched(monkeypatch):
    """[(ids shown to G, text, text mask, ids, mask), ...]: what every tuning step trained on."""
    steps, forward, loss = [], Muse.forward, muse_.masked_loss
    monkeypatch.setattr(Muse, "forward", lambda self, *a: steps.append(a[:3]) or forward(self, *a))
    monkeypatch.setattr(muse_, "masked_loss", lambda logits, ids, mask, *a: (
        steps.append((*steps.pop(), ids, mask)), loss(logits, ids, mask, *a))[1])
    return steps


def test_only_the_adapter_changes(pipe, references):
    """Every base tensor is bit-identical afterwards, none has a gradient.

    Trap: norms or embeddings trained along.
    """
    pipe = copy.deepcopy(pipe)
    parts = [pipe.vqgan, pipe.clip, pipe.muse]
    before, print_before = [copy.deepcopy(part.state_dict())
                            for part in parts], fingerprint(pipe.muse.state_dict())
    adapter = pipe.tune(*references[:2], style=PHRASE, steps=3)
    for part, old in zip(parts, before):
        assert all(torch.equal(old[name], tensor) for name, tensor in part.state_dict().items())
        assert all(p.grad is None for p in part.parameters())
    assert fingerprint(pipe.muse.state_dict()) == print_before == adapter.about["base"]
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())


@pytest.mark.parametrize("is_shared", [True, False])
def test_first_step_moves_only_the_up_weights(pipe, references, is_shared):
    """W_u = 0 keeps the gradient from W_d, and Adam leaves it where it is.

    Trap: weight decay, or up not at zero.
    """
    tune = lambda steps: pipe.tune(*references[:2], steps=steps, is_shared=is_shared).state_dict()
    start, one, two = tune(0), tune(1), tune(2)
    for name in start:
        assert torch.equal(start[name], one[name]) == ("down" in name)
        assert not torch.equal(one[name], two[name])


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_every_reference_is_used_with_its_own_prompt(pipe, references, watched, batch):
    """Equally often.

    Trap (zideliu): the data set returns image 0 whatever the index, and a long list is for nothing.
    """
    images, prompts, tokens = references
    pipe.tune(images, prompts, style=PHRASE, steps=6, batch=batch)
    texts, lengths = pipe.embed(pipe.muse, [style_prompt(p, PHRASE) for p in prompts])
    counts = [0, 0, 0]
    for _, text, text_mask, ids, _ in watched:
        assert len(ids) == batch
        for t, m, i in zip(text, text_mask, ids):
            r = int((tokens == i).all(1).nonzero())
            counts[r] += 1
            assert torch.equal(t, texts[r]) and torch.equal(m, lengths[r])
    assert counts == [2 * batch] * 3


# the mean of cos(pi u^power / 2)
@pytest.mark.parametrize("power, share", [(1, 2 / np.pi), (2, 0.78)])
def test_masked_tokens_stay_hidden_in_tuning(pipe, references, watched, power, share):
    """Trap (lucidrains#11): `ids` goes in where the masked ids should;
    the loss is wonderful and nothing is learned.
    """
    pipe.tune(*references[:2], steps=20, mask_power=power)
    shown, _, _, ids, mask = (torch.cat(x) for x in zip(*watched))
    assert torch.equal(shown, ids.masked_fill(mask, pipe.muse.config.mask_id))
    assert mask.float().mean().item() == pytest.approx(share, abs=0.1)


def test_tuning_is_reproducible(pipe, references, tmp_path):
    """The same seed gives the same file, byte for byte; another seed another."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(seed + len(name) * 7)
        pipe.tune(*references[:2], style=PHRASE, steps=3, seed=seed).save(tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b and a != c


def test_loss_falls(pipe, references):
    losses = []
    pipe.tune(*references[:2], style=PHRASE, steps=80, lr=1e-2,
              on_step=lambda step, steps, loss: losses.append(loss))
    assert len(losses) == 80 and np.mean(losses[-15:]) < np.mean(losses[:15]) - 0.5


def test_each_reference_needs_its_phrase(pipe, references):
    """Trap: zip() drops the third reference in silence."""
    with pytest.raises(ValueError, match="3 reference images .* not 2"):
        pipe.tune(references[0], PROMPTS, steps=1)


# -- files

one_line = lambda error: "\n" not in str(error.value) and str(error.value)


def test_adapter_round_trip(pipe, make_adapter, tmp_path):
    """From the file and from its run folder: the same weights, config and `about`,
    the same pictures.
    """
    adapter = make_adapter()
    adapter.save(tmp_path / "run" / "adapter.pt")
    for path in (tmp_path / "run", tmp_path / "run" / "adapter.pt"):
        again = load_adapter(path)
        assert again.about == adapter.about and again.config == adapter.config
        assert not any(p.requires_grad for p in again.parameters())
        assert torch.equal(pipe.generate("a cat", style=again, steps=2),
                           pipe.generate("a cat", style=adapter, steps=2))


@pytest.mark.parametrize("damage", [
    "missing", "cut", "text", "empty", "a base", "another kind", "no weights", "bare tensor",
    "other keys", "no about"
])
def test_a_damaged_adapter_is_one_line(make_adapter, weights, tmp_path, damage):
    """Trap: missing keys are filled from random weights, or the reader meets a traceback."""
    path = tmp_path / "adapter.pt"
    make_adapter().save(path)
    saved = torch.load(path, weights_only=True)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage in ("text", "empty"):
        path.write_text("hello" if damage == "text" else "")
    elif damage == "a base":
        path.write_bytes((weights / "muse.pt").read_bytes())
    elif damage == "bare tensor":
        torch.save(torch.zeros(3), path)
    else:
        if damage == "another kind":
            saved["kind"] = "texture"
        elif damage == "other keys":
            saved["weights"].popitem()
        else:
            del saved[damage.split()[1]]
        torch.save(saved, path)
    with pytest.raises(ValueError, match="adapter") as error:
        load_adapter(tmp_path)
    assert one_line(error)


def test_a_checkpoint_runs_no_code(tmp_path):
    """Trap: a pickle that executes what it likes when a stranger's adapter is opened."""
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))
    torch.save(dict(kind="adapter", config=Bomb()), tmp_path / "adapter.pt")
    with pytest.raises(ValueError):
        load_adapter(tmp_path)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("part", ["vqgan", "clip", "muse"])
@pytest.mark.parametrize("damage", ["missing", "cut", "swapped", "other keys"])
def test_a_damaged_base_is_one_line(weights, tmp_path, part, damage):
    for path in weights.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / f"{part}.pt"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    elif damage == "swapped":
        path.write_bytes((weights / ("muse.pt" if part == "vqgan" else "vqgan.pt")).read_bytes())
    else:
        saved = torch.load(path, weights_only=True)
        saved["weights"].popitem()
        torch.save(saved, path)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{part}.pt") as error:
        StyleDrop.load(tmp_path, "cpu").clip                # CLIP is read when it is needed
    assert one_line(error)


@pytest.mark.parametrize("changes", [dict(codebook_size=33), dict(grid=6), dict(vocab_size=700)])
def test_parts_that_do_not_belong_together(weights, tmp_path, changes):
    """Trap: a tokenizer of 32 codes with a Muse of 33 runs, until it draws the one out of reach."""
    (tmp_path / "vqgan.pt").write_bytes((weights / "vqgan.pt").read_bytes())
    save_model(tmp_path / "muse.pt", "muse", toy_muse(**changes), {}, merges=save_merges(TOKENIZER),
               words=VOCABULARY)
    with pytest.raises(ValueError, match="muse.pt") as error:
        StyleDrop.load(tmp_path, "cpu")
    assert one_line(error)


@pytest.mark.parametrize("lost", ["merges", "words"])
def test_a_muse_without_its_words_is_one_line(weights, tmp_path, lost):
    """Trap: a KeyError for a file of an earlier version."""
    (tmp_path / "vqgan.pt").write_bytes((weights / "vqgan.pt").read_bytes())
    saved = torch.load(weights / "muse.pt", weights_only=True)
    for wrong in (None, 7, [["a"]], [{}]):
        saved.pop(lost, None)
        if wrong is not None:
            saved[lost] = wrong
        torch.save(saved, tmp_path / "muse.pt")
        with pytest.raises(ValueError, match="muse.pt") as error:
            StyleDrop.load(tmp_path, "cpu")
        assert one_line(error)


def test_words_and_tokens_ship_with_muse(pipe):
    assert pipe.words == set(VOCABULARY) and pipe.tokenizer.merges == TOKENIZER.merges


def test_clip_is_loaded_when_it_is_needed(weights, tmp_path, make_adapter):
    """Drawing and tuning need no judge.

    Trap: seconds of loading for a picture, or no picture without CLIP.
    """
    for name in ("vqgan.pt", "muse.pt"):
        (tmp_path / name).write_bytes((weights / name).read_bytes())
    pipe = StyleDrop.load(tmp_path, "cpu")
    assert pipe.generate("a cat", style=make_adapter(), steps=1).shape == (1, 3, 16, 16)
    pipe.tune(noise_images(1), ["a cat"], PHRASE, steps=1)
    with pytest.raises((ValueError, FileNotFoundError), match="clip.pt"):
        pipe.clip
    (tmp_path / "clip.pt").write_bytes((weights / "clip.pt").read_bytes())
    assert pipe.clip is pipe.clip and not any(p.requires_grad for p in pipe.clip.parameters())


def test_another_judge_is_the_same_base(weights, tmp_path, pipe, make_adapter):
    """CLIP can be trained anew without touching G: adapters go on to fit."""
    for name in ("vqgan.pt", "muse.pt"):
        (tmp_path / name).write_bytes((weights / name).read_bytes())
    other = copy.deepcopy(pipe.clip)
    other.token_embedding.weight.data += 1
    save_model(tmp_path / "clip.pt", "clip", other, {}, merges=save_merges(TOKENIZER))
    again = StyleDrop.load(tmp_path, "cpu")
    assert again.base == pipe.base and not torch.equal(again.clip.token_embedding.weight,
                                                       pipe.clip.token_embedding.weight)
    same = [p.generate("a cat", style=make_adapter(), steps=2) for p in (again, pipe)]
    assert torch.equal(*same)


def test_models_are_stored_in_half_and_read_in_full(weights, pipe):
    """Frozen, fp32, to within half precision of what was saved; anything else is an error,
    never a default.
    """
    model, saved = load_model(weights / "vqgan.pt", "vqgan", VQGANConfig, VQGAN)
    assert all(t.dtype == torch.half for t in saved["weights"].values() if t.is_floating_point())
    assert all(p.dtype == torch.float and not p.requires_grad for p in model.parameters())
    assert not model.training
    assert all(
        torch.equal(t.float(),
                    model.state_dict()[name].float()) for name, t in saved["weights"].items())


def test_fingerprint_knows_every_tensor(pipe):
    """Trap: a digest of names or shapes alone lets any base of this size pass."""
    prints = {
        fingerprint(pipe.muse.state_dict()),
        fingerprint(copy.deepcopy(pipe.muse).state_dict())
    }
    for name, _ in pipe.muse.named_parameters():
        other = copy.deepcopy(pipe.muse)
        other.get_parameter(name).data.flatten()[0] += 1e-3
        prints.add(fingerprint(other.state_dict()))
    assert len(prints) == 1 + len(list(pipe.muse.parameters()))


def test_write_whole_or_not_at_all(tmp_path):
    """Trap: a kill in the middle of torch.save costs the old checkpoint as well."""
    path = tmp_path / "new" / "file"
    write_whole(path, lambda file: file.write(b"old"))
    assert path.stat().st_mode & 0o777 == 0o644

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    with pytest.raises(OSError):
        write_whole(path.parent, lambda file: file.write(b"a folder is in the way"))
    assert list(tmp_path.rglob("*")) == [path.parent, path]


# -- pictures

def test_pixels_round_trip_exactly():
    """Trap: truncation instead of rounding darkens half of all values by one."""
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    tensor = to_tensor(values)
    assert tensor.shape == (1, 3, 16, 16) and tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(to_uint8(tensor), values)
    # clamped, not wrapped
    assert np.array_equal(to_uint8(tensor * 3)[..., 0] == 255, (tensor[:, 0] >= 1 / 3).numpy())
    colour = np.zeros((1, 2, 4, 3), np.uint8)
    colour[0, 1, 3] = 10, 20, 30
    assert to_tensor(colour).shape == (1, 3, 2, 4)
    assert np.array_equal(to_uint8(to_tensor(colour)), colour)


def test_grid_layout():
    """Row by row, enlarged, a white gap around each. Trap: rows and columns swapped."""
    images = np.stack([np.full((2, 3, 3), 50 * i, np.uint8) for i in range(1, 4)])
    sheet = np.asarray(grid(images, columns=2, scale=2, gap=1))
    assert sheet.shape == (2 * (4 + 1) + 1, 2 * (6 + 1) + 1, 3)
    cell = lambda row, column: sheet[1 + 5 * row:5 + 5 * row, 1 + 7 * column:7 + 7 * column]
    for (row, column), value in {(0, 0): 50, (0, 1): 100, (1, 0): 150, (1, 1): 255}.items():
        assert (cell(row, column) == value).all()
    assert (sheet[[0, 5, 10]] == 255).all() and (sheet[:, [0, 7, 14]] == 255).all()


def test_an_adapter_knows_both_stages(pipe, pipe2):
    """Trap: an adapter tuned beside another second stage draws nonsense there, in silence."""
    assert pipe2.base != pipe.base
    with pytest.raises(ValueError, match="was tuned on base"):
        pipe2.generate("a cat", pipe.tune(noise_images(1), ["a cat"], PHRASE, steps=1), steps=1)
