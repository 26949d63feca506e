"""styledrop.py: guidance by separate passes, tuning by Eq. 3, and a base that fits together.

Files of adapters and weights: test_checkpoint.py.
"""

import copy
import math
import platform
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MERGES, TOKENIZER, VOCABULARY, generator, noise_images, randomise, toy_muse

import muse as muse_
import styledrop
from adapter import Adapter
from checkpoint.adapters import TunedAdapter
from checkpoint.weights import fingerprint, save_model
from muse import PRESETS, SUPERRES, Muse
from styledrop import (AT_ONCE, BASE_SAMPLING, CONTENT_SAMPLING, ROUND_1, ROUND_2, SAMPLING,
                       SUPERRES_SAMPLING, Sampling, StyleDrop, Tuning, default_sampling,
                       guided_logits, load_adapter, mix_logits, only_probable, random_views,
                       shuffled, style_prompt, to_tensor, to_uint8)

PROMPTS = ["a cat", "a house"]
EMPTY = ["", ""]
PHRASE = "watercolor painting"
STYLED = ["a cat in watercolor painting style", "a house in watercolor painting style"]


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# -- equations

@pytest.mark.parametrize("lambda_a, lambda_b, weights", [
    (2, 5, [3, 3, -5]), (1, 0, [2, -1, 0]), (0, 0, [1, 0, 0])])
def test_eq4_is_a_weighted_sum(lambda_a, lambda_b, weights):
    """(1 + lambda_A) G^(t) + (lambda_B - lambda_A) G(t) - lambda_B G(n).

    Trap: G^(t) - G^(n) or G^(t) - G(n) in the term of lambda_B, which is another equation.
    """
    tuned, base, null = torch.eye(3)
    assert guided_logits(tuned, base, null, lambda_a, lambda_b).tolist() == weights


@pytest.mark.parametrize("min_p, kept", [
    (0, [0, 1, 2, 3]), (0.001, [0, 1, 2, 3]), (0.02, [0, 1, 2]), (0.5, [0, 1]), (1, [0])])
def test_only_tokens_that_the_tuned_model_finds_probable_keep_a_chance(min_p, kept):
    """Trap: the share is of 1 and not of the best, or the guided logits are asked.

    The best token always stays, whatever the guided logits say.
    """
    tuned = torch.tensor([0.60, 0.35, 0.04, 0.01]).log() + 3         # logits have no fixed sum
    guided = torch.tensor([-50.0, 1.0, 2.0, 90.0])
    found = only_probable(guided, tuned, min_p)
    assert found[kept].tolist() == guided[kept].tolist()
    left_out = [i for i in range(4) if i not in kept]
    assert (found[left_out] < -1000).all()


def test_two_adapters_that_agree_on_no_token_still_leave_some():
    """Trap: with -inf, a mixture of two such results would be NaN or nothing."""
    first = only_probable(torch.zeros(2), torch.tensor([0.0, -9.0]), 0.5)
    second = only_probable(torch.zeros(2), torch.tensor([-9.0, 0.0]), 0.5)
    assert mix_logits(first, second, 0.5).softmax(-1).tolist() == [0.5, 0.5]


def test_gamma_weighs_the_content():
    assert mix_logits(style=1, content=5, gamma=0.25) == 2


def test_prompts_are_those_of_table_s4():
    assert style_prompt("a cat", PHRASE) == STYLED[0]
    assert style_prompt("a cat", "") == "a cat"
    assert style_prompt("", PHRASE) == f"{PHRASE} style"
    assert style_prompt("", "") == ""


class Watch:
    """The forward passes of G: the model, its arguments, whether in bf16, and low tokens."""

    def __init__(self, monkeypatch):
        self.models, self.arguments, self.in_bf16, self.low = [], [], [], []
        forward, encode_low = Muse.forward, Muse.encode_low

        def watched(model, *arguments, **named):
            self.models.append(model)
            self.arguments.append(arguments)
            self.in_bf16.append(torch.is_autocast_enabled("cpu"))
            return forward(model, *arguments, **named)

        def watched_low(model, low, *arguments):
            self.low.append(low)
            return encode_low(model, low, *arguments)

        monkeypatch.setattr(Muse, "forward", watched)
        monkeypatch.setattr(Muse, "encode_low", watched_low)


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


SOME_IDS = torch.randint(PRESETS["toy"].mask_id + 1, (2, 16), generator=generator(3))


def logits_of(pipe, **options):
    """The guided logits that `generate` gives to decode for SOME_IDS."""
    caught = []

    def decode(logits_fn, batch, tokens, *rest):
        caught.append(logits_fn(SOME_IDS, 0))
        return torch.zeros(batch, tokens, dtype=torch.long)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muse_, "decode", decode)
        pipe.generate(PROMPTS, **options)
    return caught[0]


@pytest.fixture
def passes(pipe, make_adapter):
    """The logits of single passes: G(t), G(c), G(n) and others, with and without adapters."""
    style, content = make_adapter(1), make_adapter(2, style="")

    def logits(prompts, adapter=None):
        weights = None if adapter is None else adapter.adapter()
        return pipe.muse(SOME_IDS, *pipe.embed(pipe.muse, prompts), weights)

    flat = [style_prompt(prompt, "flat vector") for prompt in PROMPTS]
    found = SimpleNamespace(
        style=style, content=content, t=logits(STYLED), t_style=logits(STYLED, style),
        c=logits(PROMPTS), c_content=logits(PROMPTS, content), null=logits(EMPTY),
        flat=logits(flat), flat_style=logits(flat, style), blurry=logits(["blurry"] * 2))
    tensors = [x for x in vars(found).values() if torch.is_tensor(x)]
    assert torch.pdist(torch.stack(tensors).flatten(1)).min() > 5    # all of them differ
    return found


def test_eq1_samples_the_base(pipe, passes, watch):
    """lambda_A does nothing without an adapter."""
    found = logits_of(pipe, lambda_a=3, lambda_b=2)
    assert_close(found, 3 * passes.c - 2 * passes.null)
    assert len(watch.models) == 2


def test_without_an_adapter_eq1_has_a_strength_of_its_own(pipe, passes):
    """Trap: Eq. 4's lambda_B, with which samples of the untuned base fall apart."""
    b = BASE_SAMPLING.lambda_b
    assert b < SAMPLING.lambda_b
    assert_close(logits_of(pipe), (1 + b) * passes.c - b * passes.null)
    with_words = logits_of(pipe, style_phrase=PHRASE)
    assert_close(with_words, (1 + b) * passes.t - b * passes.null)


def test_a_style_in_words_is_a_prompt(pipe, passes, watch):
    found = logits_of(pipe, style_phrase=PHRASE, lambda_a=2, lambda_b=5)
    assert_close(found, 6 * passes.t - 5 * passes.null)
    assert len(watch.models) == 2


def test_each_prompt_may_have_words_of_its_own(pipe, passes):
    found = logits_of(pipe, style_phrase=["", PHRASE], lambda_b=5)
    assert_close(found[0], (6 * passes.c - 5 * passes.null)[0])
    assert_close(found[1], (6 * passes.t - 5 * passes.null)[1])


def test_eq4_samples_a_style(pipe, passes, watch):
    """Traps: the phrase is forgotten; the tuned model sees the null prompt."""
    found = logits_of(pipe, style=passes.style, lambda_a=2, lambda_b=5, min_p=0)
    assert_close(found, 3 * passes.t_style + 3 * passes.t - 5 * passes.null)
    assert len(watch.models) == 3


def test_eq4_with_the_settings_of_table_s3(pipe, passes):
    a, b = SAMPLING.lambda_a, SAMPLING.lambda_b
    expected = (1 + a) * passes.t_style + (b - a) * passes.t - b * passes.null
    expected = only_probable(expected, passes.t_style, SAMPLING.min_p)
    assert_close(logits_of(pipe, style=passes.style), expected)
    assert_close(logits_of(pipe, style=passes.style, sampling=replace(SAMPLING, lambda_b=b)),
                 expected)


def test_eq4_without_strengths_is_the_tuned_model(pipe, passes, watch):
    """Trap: lambda_a = lambda_b = 0 read as "no adapter". A null pass is not needed."""
    found = logits_of(pipe, style=passes.style, lambda_a=0, lambda_b=0, min_p=0)
    assert_close(found, passes.t_style)
    assert len(watch.models) == 2


def test_other_words_and_a_negative_prompt(pipe, passes):
    found = logits_of(pipe, style=passes.style, negative="blurry", style_phrase="flat vector",
                      lambda_a=2, lambda_b=5, min_p=0)
    assert_close(found, 3 * passes.flat_style + 3 * passes.flat - 5 * passes.blurry)


def test_eq6_samples_an_object(pipe, passes, watch):
    """Its prompt has no style words."""
    found = logits_of(pipe, content=passes.content, lambda_a=2, lambda_b=5)
    assert_close(found, 3 * passes.c_content + 3 * passes.c - 5 * passes.null)
    assert len(watch.models) == 3


def test_eq5_and_eq6_are_mixed(pipe, passes, watch):
    """Traps: a branch gets its neighbour's text or adapter; G(t) is used for G(c)."""
    found = logits_of(pipe, style=passes.style, content=passes.content, gamma=0.3, lambda_a=2,
                      lambda_b=5)
    l_s = 3 * passes.t_style + 3 * passes.t - 5 * passes.null
    l_c = 3 * passes.c_content + 3 * passes.c - 5 * passes.null
    assert_close(found, 0.7 * l_s + 0.3 * l_c)
    assert len(watch.models) == 5


# -- precision

def test_g_runs_in_bf16_where_that_is_fast(pipe, make_adapter, monkeypatch, watch):
    """Sampling and tuning alike; the logits come out in fp32 and are nearly the same."""
    exact = logits_of(pipe, style=make_adapter(), min_p=0)
    assert watch.in_bf16 == [False] * 3
    monkeypatch.setattr(styledrop, "fast_bf16", lambda device: True)
    fast = logits_of(pipe, style=make_adapter(), min_p=0)
    pipe.tune(noise_images(1), ["a cat"], PHRASE, steps=3)
    assert watch.in_bf16 == [False] * 3 + [True] * 6
    assert fast.dtype == torch.float32
    assert 0 < (fast - exact).norm() < 0.05 * exact.norm()


real_fast_bf16 = styledrop.fast_bf16    # conftest.py replaces it for the other tests
AMX = dict(amx_bf16=True, avx512_bf16=True)
AVX512 = dict(amx_bf16=False, avx512_bf16=True)
INTEL, AMD = "vendor_id\t: GenuineIntel", "vendor_id\t: AuthenticAMD"


@pytest.mark.parametrize("device, capabilities, vendor, is_fast", [
    ("cpu", AMX, INTEL, True), ("cpu", AVX512, INTEL, False), ("cpu", AVX512, AMD, True),
    ("cpu", {"avx2": True}, INTEL, False), ("cpu", {"avx2": True}, AMD, False),
    ("cpu", {}, "", False), ("mps", AMX, INTEL, False)])
def test_which_machines_are_fast_in_bf16(monkeypatch, device, capabilities, vendor, is_fast):
    """Intel's AVX-512 BF16 is slower than fp32, AMD's is faster, and AMX is faster everywhere."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(styledrop, "cpu_vendor", lambda: vendor)
    assert real_fast_bf16(device) == is_fast
    monkeypatch.setattr(styledrop, "fast_bf16", real_fast_bf16)
    assert styledrop.precision(device) == ("bf16" if is_fast else "fp32")


@pytest.mark.parametrize("is_fast", [True, False])
def test_gpus_before_ampere_only_emulate_bf16(monkeypatch, is_fast):
    def supported(including_emulation):
        return including_emulation or is_fast

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert real_fast_bf16("cuda") == is_fast


def test_an_old_torch_does_not_say_what_the_cpu_can(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not real_fast_bf16("cpu")


def test_the_vendor_on_linux(monkeypatch):
    """Trap: the model's name, in which the vendor need not be."""
    cpuinfo = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: EPYC 9654\n"
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path, errors: cpuinfo)
    assert styledrop.cpu_vendor() == AMD


def test_the_vendor_elsewhere(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6, GenuineIntel")
    assert styledrop.cpu_vendor() == "Intel64 Family 6, GenuineIntel"


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA GPU here; use --device cpu"):
        StyleDrop.load(device="cuda")


# -- sampling, in both stages

def sample_both(pipe, prompts, **options):
    """The tokens (B, N) of the first stage and of the second, and the images of `generate`."""
    tokens = {}

    def on_step(step, ids, kept):
        if kept.all():
            tokens.setdefault(ids.shape[1], []).append(ids)

    images = pipe.generate(prompts, on_step=on_step, **options)
    low, high = tokens.values()
    return torch.cat(low), torch.cat(high), images


@pytest.fixture(scope="module")
def many(pipe2, make_adapter):
    """Two more images than one batch holds, from seed 7 on, and the batches that were reported."""
    style = make_adapter(base=pipe2.base_id, second=0)
    prompts = [PROMPTS[i % 2] for i in range(AT_ONCE + 2)]
    batches = []
    low, high, images = sample_both(pipe2, prompts, style=style, steps=2, seed=7,
                                    on_batch=batches.append)
    return SimpleNamespace(style=style, prompts=prompts, low=low, high=high, images=images,
                           batches=batches)


@pytest.mark.parametrize("i", [0, 3, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1])
def test_an_image_follows_from_its_prompt_and_its_seed(pipe2, many, i):
    """Image i has the seed 7 + i: alone, at another place, or behind a whole batch of others.

    Traps: one generator for the batch, so that the other images decide; PyTorch's global generator
    has a say; numbers start again in the next batch.
    """
    torch.seed()
    low, high, image = sample_both(pipe2, many.prompts[i], style=many.style, steps=2, seed=7 + i)
    assert torch.equal(low[0], many.low[i])
    assert torch.equal(high[0], many.high[i])
    assert_close(image[0], many.images[i])


def test_every_seed_gives_another_image(many):
    assert len(many.low.unique(dim=0)) == len(many.low)
    assert many.images.shape == (AT_ONCE + 2, 3, 32, 32)
    assert many.images.abs().max() <= 1
    assert many.batches == [AT_ONCE, AT_ONCE + 2]


def test_a_list_of_seeds(pipe2, many):
    _, high, _ = sample_both(pipe2, ["a cat"] * 2, style=many.style, steps=2, seed=[9, 7])
    assert torch.equal(high, many.high[[2, 0]])


@pytest.fixture
def second_stage(monkeypatch):
    """The function of logits that `generate` gives to decode, of each stage."""
    caught = []
    decode = muse_.decode

    def caught_decode(logits_fn, *arguments):
        caught.append(logits_fn)
        return decode(logits_fn, *arguments)

    monkeypatch.setattr(muse_, "decode", caught_decode)
    return caught


HIGH_IDS = torch.randint(33, (2, 64), generator=generator(0))


def test_the_second_stage_has_settings_of_its_own(pipe2, make_adapter, watch, second_stage):
    """2 G^(t) - G(t) over the low tokens in 12 steps, whatever strengths the first stage has.

    Traps: a null pass that nothing needs; the strengths or the steps of the first stage; states of
    the low tokens that are computed anew in every step.
    """
    assert SUPERRES_SAMPLING.lambda_a == 1 and SUPERRES_SAMPLING.lambda_b == 0
    style = make_adapter(base=pipe2.base_id, second=0)
    low, high, images = sample_both(pipe2, PROMPTS, style=style, steps=2, lambda_a=3, lambda_b=5)
    assert watch.models == [pipe2.muse] * 2 * 3 + [pipe2.superres] * SUPERRES_SAMPLING.steps * 2
    assert len(watch.low) == 2                      # once with and once without the adapter
    for seen in watch.low:
        assert torch.equal(seen, low)
    text = pipe2.embed(pipe2.superres, STYLED)
    base = pipe2.superres(HIGH_IDS, *text, None, low)
    tuned = pipe2.superres(HIGH_IDS, *text, style.superres(), low)
    assert_close(second_stage[1](HIGH_IDS, 0), 2 * tuned - base)
    assert torch.equal(images, pipe2.vqgan.decode(high.view(2, 8, 8)))
    assert pipe2.resolution == 32


def test_the_second_stage_reads_the_style_in_words(pipe2, watch, second_stage):
    """One pass per step, G(t)."""
    low, _, _ = sample_both(pipe2, PROMPTS, style_phrase=PHRASE, steps=2)
    assert watch.models == [pipe2.muse] * 2 * 2 + [pipe2.superres] * SUPERRES_SAMPLING.steps
    expected = pipe2.superres(HIGH_IDS, *pipe2.embed(pipe2.superres, STYLED), None, low)
    assert_close(second_stage[1](HIGH_IDS, 0), expected)


def test_without_the_second_stage(pipe2):
    assert pipe2.generate("a cat", superres=False, steps=2).shape == (1, 3, 16, 16)


def test_an_adapter_of_the_second_stage_leaves_the_first_as_it_is(pipe2, make_adapter):
    for role in ("style", "content"):
        without = make_adapter(1, base=pipe2.base_id)
        with_second = make_adapter(1, base=pipe2.base_id, second=5)
        low, high, _ = sample_both(pipe2, PROMPTS, steps=2, **{role: without})
        same_low, other_high, _ = sample_both(pipe2, PROMPTS, steps=2, **{role: with_second})
        assert torch.equal(low, same_low)
        assert not torch.equal(high, other_high)


@pytest.mark.parametrize("style_second, content_second", [(5, 6), (5, None), (None, 6),
                                                          (None, None)])
def test_ends_of_gamma_are_single_adapters(pipe2, make_adapter, style_second, content_second):
    """Bit by bit, in both stages, also where one of the two was tuned without the second stage.

    Traps: a mix that is nearly at the end of the line; at gamma 1 the style still changes the
    second stage, or at gamma 0 the object does.
    """
    style = make_adapter(1, base=pipe2.base_id, second=style_second)
    content = make_adapter(2, base=pipe2.base_id, second=content_second)

    def sample(**options):
        return sample_both(pipe2, PROMPTS, steps=2, **options)[:2]

    style_low, style_high = sample(style=style)
    content_low, content_high = sample(content=content)
    both = dict(style=style, content=content)
    low, high = sample(**both, gamma=0.0)
    assert torch.equal(low, style_low) and torch.equal(high, style_high)
    low, high = sample(**both, gamma=1.0)
    assert torch.equal(low, content_low) and torch.equal(high, content_high)
    low, _ = sample(**both, gamma=0.5)
    assert not torch.equal(low, style_low) and not torch.equal(low, content_low)


def test_default_settings_depend_on_the_adapters_in_use():
    """Trap: an object in a style is sampled with the strengths of a style alone."""
    style, content = "a style", "an object"
    assert default_sampling(None, None, 0.5) is BASE_SAMPLING
    assert default_sampling(style, None, 0.5) is default_sampling(style, content, 0) is SAMPLING
    for adapters in ((style, content, 0.5), (style, content, 1), (None, content, 0)):
        assert default_sampling(*adapters) is CONTENT_SAMPLING


@pytest.mark.parametrize("role", ["style", "content"])
def test_an_adapter_of_another_base_is_refused(pipe, pipe2, make_adapter, role):
    """Also one of the same base with another second stage. Trap: it runs and samples noise."""
    for pipeline, base in ((pipe, "0123456789ab"), (pipe2, pipe.base_id)):
        adapter = make_adapter(base=base)
        with pytest.raises(ValueError, match=f"tuned on base {base}, .* {pipeline.base_id};"):
            pipeline.generate("a cat", **{role: adapter})


@pytest.mark.parametrize("width, depth, second_width, second_depth, words", [
    (64, 2, 32, 3, "2 layers of width 64, but the base has 2 of width 32"),
    (32, 9, 32, 3, "9 layers of width 32, but the base has 2 of width 32"),
    (32, 2, 32, 9, "9 layers of width 32, but the base has 3 of width 32"),
    (32, 2, 16, 3, "3 layers of width 16, but the base has 3 of width 32")])
@pytest.mark.parametrize("role", ["style", "content"])
def test_an_adapter_of_other_sizes_is_refused(pipe2, tmp_path, role, width, depth, second_width,
                                              second_depth, words):
    """One that names the right base. Traps: a traceback about shapes; nine layers, of which the
    base reads two in silence.
    """
    adapter = TunedAdapter(Adapter(width, 4, depth, True),
                           Adapter(second_width, 4, second_depth, False), dict(base=pipe2.base_id))
    adapter.save(tmp_path / "adapter.pt")
    with pytest.raises(ValueError, match=f"^[^\n]*{words}; tune it again$"):
        pipe2.generate("a cat", **{role: load_adapter(tmp_path)})


# -- tuning

def test_many_references_are_encoded_in_parts(pipe, calls):
    """Trap: a hundred references with sixteen views each need gigabytes at once."""
    images = noise_images(2 * AT_ONCE + 1, pipe.resolution)
    found = calls(type(pipe.vqgan), "encode")
    tokens = pipe.tokens_at(pipe.resolution, images)
    assert max(len(positional[1]) for positional, _ in found) == AT_ONCE
    assert torch.equal(tokens, pipe.vqgan.encode(images).flatten(1))


def shrink(images):
    """Images at the first stage's size."""
    return F.interpolate(images, (16, 16), mode="area")


@pytest.fixture(scope="module")
def references(pipe2):
    """Three images with different tokens, and what they show."""
    images = noise_images(3, 32, seed=5)
    assert len(pipe2.vqgan.encode(shrink(images)).unique(dim=0)) == 3
    return images, ["a cat", "a house and a tree", "an owl in a house"]


class Tuned:
    """What tuning showed G and asked of it, step by step, in both stages."""

    def __init__(self, monkeypatch, pipe, references, batch, steps):
        self.watch = Watch(monkeypatch)
        self.ids, self.masks, self.steps = [], [], []
        loss = muse_.masked_loss

        def masked_loss(logits, ids, mask):
            self.ids.append(ids)
            self.masks.append(mask)
            return loss(logits, ids, mask)

        monkeypatch.setattr(muse_, "masked_loss", masked_loss)
        second = replace(styledrop.SUPERRES, steps=steps, batch=batch)
        monkeypatch.setattr(styledrop, "SUPERRES", second)
        images, prompts = references
        pipe.tune(images, prompts, PHRASE, steps=steps, batch=batch, views=1, on_step=self.on_step)

    def on_step(self, step, steps, loss):
        self.steps.append((step, steps))
        assert loss > 0

    def passes(self, G):
        """What one stage was shown: ids, text, text mask, adapters, low; then ids and mask."""
        for model, arguments, ids, mask in zip(self.watch.models, self.watch.arguments, self.ids,
                                               self.masks):
            if model is G:
                yield arguments, ids, mask


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_what_tuning_sees(pipe2, references, monkeypatch, batch):
    """In both stages every reference, equally often, with its own prompt and its own low tokens.

    Traps: the data set returns image 0 whatever the index, or a long list is for nothing (zideliu);
    low tokens of another reference; on_step of one stage alone.
    """
    tuned = Tuned(monkeypatch, pipe2, references, batch, steps=6)
    images, prompts = references
    assert tuned.steps == [(step, 6) for step in range(6)] * 2
    low_tokens = pipe2.vqgan.encode(shrink(images)).flatten(1)
    high_tokens = pipe2.vqgan.encode(images).flatten(1)
    for G, tokens in ((pipe2.muse, low_tokens), (pipe2.superres, high_tokens)):
        texts, text_masks = pipe2.embed(G, [style_prompt(prompt, PHRASE) for prompt in prompts])
        counts = [0, 0, 0]
        for (_, text, text_mask, _, low), ids, _ in tuned.passes(G):
            assert len(ids) == batch
            for b in range(batch):
                reference = (tokens == ids[b]).all(1).nonzero().item()
                counts[reference] += 1
                assert torch.equal(text[b], texts[reference])
                assert torch.equal(text_mask[b], text_masks[reference])
                if G is pipe2.superres:
                    assert torch.equal(low[b], low_tokens[reference])
                else:
                    assert low is None
        assert counts == [2 * batch] * 3


def test_masked_tokens_stay_hidden(pipe2, references, monkeypatch):
    """Trap (lucidrains#11): `ids` goes in where the masked ids should, the loss is wonderful, and
    nothing is learned.
    """
    tuned = Tuned(monkeypatch, pipe2, references, batch=4, steps=3)
    for G in (pipe2.muse, pipe2.superres):
        for (shown, *_), ids, mask in tuned.passes(G):
            assert mask.any(1).all()
            assert torch.equal(shown, ids.masked_fill(mask, G.config.mask_id))


def test_each_stage_masks_by_its_law(pipe2, references, monkeypatch):
    """The mean of cos(pi u^power / 2), u uniform in [0, 1]."""
    tuned = Tuned(monkeypatch, pipe2, references, batch=32, steps=6)
    u = np.linspace(0, 1, 1001)
    for G, how in ((pipe2.muse, ROUND_1), (pipe2.superres, styledrop.SUPERRES)):
        shares = [mask.float().mean().item() for _, _, mask in tuned.passes(G)]
        expected = np.cos(np.pi / 2 * u ** how.mask_power).mean()
        assert np.mean(shares) == pytest.approx(expected, abs=0.06)


@pytest.fixture(scope="module")
def tuned(pipe2):
    """30 steps of both stages on two images, and fingerprints of the base before and after."""
    parts = [pipe2.vqgan, pipe2.clip, pipe2.muse, pipe2.superres]
    before = [fingerprint(part.state_dict()) for part in parts]
    losses = []

    def on_step(step, steps, loss):
        losses.append(loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(styledrop, "SUPERRES", replace(styledrop.SUPERRES, steps=30, lr=1e-2))
        theta = pipe2.tune(noise_images(2, 32), PROMPTS, PHRASE, steps=30, lr=1e-2, d_prj=2,
                           on_step=on_step)
    after = [fingerprint(part.state_dict()) for part in parts]
    return SimpleNamespace(theta=theta, losses=losses, parts=parts, before=before, after=after)


def test_only_theta_learns(tuned):
    """Every tensor of the base stays the same bit by bit. Traps: norms or embeddings learn too."""
    assert tuned.before == tuned.after
    for part in tuned.parts:
        for p in part.parameters():
            assert p.grad is None and not p.requires_grad
    for p in tuned.theta.parameters():
        assert p.grad.abs().sum() > 0
        assert not p.requires_grad


def test_a_base_that_could_still_learn_is_frozen(pipe):
    """Trap: a second step whose backward fails, since T's states are computed once."""
    models = [copy.deepcopy(model).requires_grad_(True) for model in (pipe.vqgan, pipe.muse)]
    pipe = StyleDrop(*models, pipe.tokenizer)
    pipe.tune(noise_images(1), ["a cat"], PHRASE, steps=2)
    assert not any(p.requires_grad for model in models for p in model.parameters())


def test_the_loss_falls_in_both_stages(tuned):
    first, second = tuned.losses[:30], tuned.losses[30:]
    assert len(second) == 30
    for losses in (first, second):
        assert sum(losses[-5:]) < sum(losses[:5])


def test_an_adapter_says_how_it_was_made(pipe2, tuned):
    about = tuned.theta.about
    assert about["base"] == pipe2.base_id
    assert (about["style"], about["prompts"]) == (PHRASE, PROMPTS)
    assert (about["steps"], about["lr"], about["d_prj"]) == (30, 1e-2, 2)
    assert (about["batch"], about["seed"]) == (ROUND_1.batch, 0)
    second = dict(d_emb=32, d_prj=styledrop.SUPERRES.d_prj, n_layer=3,
                  is_shared=styledrop.SUPERRES.is_shared)
    assert tuned.theta.superres.config == second


def test_tuning_changes_the_images(pipe2, tuned):
    style = pipe2.generate("a cat", tuned.theta, steps=4, superres=False)
    words = pipe2.generate("a cat", style_phrase=PHRASE, steps=4, superres=False)
    assert not torch.equal(style, words)


@pytest.mark.parametrize("is_shared", [True, False])
def test_tuning_starts_from_the_base(pipe, is_shared):
    """G^ is G, so Eq. 4 is Eq. 1 for every lambda_A. Trap: random "up" matrices."""
    fresh = pipe.tune(noise_images(2), PROMPTS, PHRASE, steps=0, is_shared=is_shared)
    styled = pipe.generate(PROMPTS, style=fresh, steps=4, lambda_a=3.0)
    base = pipe.generate(STYLED, steps=4, sampling=SAMPLING)
    assert_close(styled, base)


@pytest.mark.parametrize("is_shared", [True, False])
def test_the_first_step_moves_only_the_up_weights(pipe, is_shared):
    """W_u = 0 keeps the gradient from W_d. Traps: weight decay, or W_u does not start at zero."""
    def tune(steps):
        theta = pipe.tune(noise_images(2), PROMPTS, steps=steps, is_shared=is_shared)
        return theta.state_dict()

    start, one, two = tune(0), tune(1), tune(2)
    for name in start:
        if "down" in name:
            assert torch.equal(start[name], one[name])
        else:
            assert not torch.equal(start[name], one[name])
        assert not torch.equal(one[name], two[name])


def test_an_adapter_follows_from_its_seed(pipe2, references, monkeypatch):
    """Whatever else uses PyTorch's generator. The first stage is the same alone and with the
    second.
    """
    monkeypatch.setattr(styledrop, "SUPERRES", replace(styledrop.SUPERRES, steps=1))
    images, prompts = references

    def tune(images, **how):
        torch.seed()
        theta = pipe2.tune(images, prompts, PHRASE, steps=2, **how)
        return fingerprint(theta.state_dict()), fingerprint(theta.adapter.state_dict())

    both, first = tune(images)
    assert tune(images) == (both, first)
    other_both, other_first = tune(images, seed=1)
    assert other_both != both and other_first != first
    assert tune(images, superres=False)[1] == first
    alone = tune(images, views=1)[1]
    assert tune(shrink(images), views=1)[1] == alone != first


def test_views_are_the_image_and_crops_of_it():
    """Each image first, then crops of that image alone, all from the generator that is given."""
    images = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16), torch.rand(3, 16, 16)])
    views = random_views(images, 5, generator(1))
    assert views.shape == (3, 5, 3, 16, 16)
    assert torch.equal(views[:, 0], images)
    assert_close(views[0], torch.zeros(5, 3, 16, 16))
    assert_close(views[1], torch.ones(5, 3, 16, 16))
    crops = views[2, 1:]
    assert crops.min() >= 0 and crops.max() <= 1
    assert torch.pdist(crops.flatten(1)).min() > 1
    assert torch.equal(random_views(images, 5, generator(1)), views)
    assert not torch.equal(random_views(images, 5, generator(2)), views)
    assert torch.equal(random_views(images, 1, None)[:, 0], images)


def test_a_crop_has_four_fifths_of_the_side_or_more():
    """And lies at most 6 % beyond the border, measured on a ramp from left to right."""
    ramp = torch.linspace(-1, 1, 129)[:-1] + 1 / 128                     # the pixels' middles
    image = ramp.expand(1, 3, 128, 128)
    crops = random_views(image, 200, generator())[0, 1:, 0, 64]          # one row of each
    middle = crops[:, 32:96]                                             # never beyond the border
    share = (middle[:, -1] - middle[:, 0]) / (ramp[95] - ramp[32])
    assert 0.79 < share.min() < 0.82 and 0.98 < share.max() < 1.01
    centre = (crops[:, 63] + crops[:, 64]) / 2
    assert (centre.abs() <= 1 - share + 0.12 + 0.01).all()
    assert centre.abs().max() > 0.2


def test_every_view_has_its_own_prompt_and_only_the_first_stage_sees_crops(pipe2, references,
                                                                           calls):
    """Trap: views in the order of the images, prompts in another."""
    fitted = calls(StyleDrop, "fit")
    images, prompts = references
    pipe2.tune(images, prompts, PHRASE, steps=0, views=4)
    (_, G, tokens, texts, *_), (_, second, high, second_texts, *_) = (
        positional for positional, _ in fitted)
    assert G is pipe2.muse and second is pipe2.superres
    assert len(tokens) == 12 and len(high) == 3
    assert texts == [style_prompt(prompt, PHRASE) for prompt in prompts for _ in range(4)]
    assert second_texts == texts[::4]
    assert torch.equal(tokens[::4], pipe2.vqgan.encode(shrink(images)).flatten(1))


def test_the_second_stage_may_be_left_out(pipe2, references):
    images, prompts = references
    assert pipe2.tune(images, prompts, steps=0, superres=False).superres is None
    assert pipe2.tune(shrink(images), prompts, steps=0).superres is None


def test_batches_use_every_reference_equally():
    """In passes that are shuffled anew each time."""
    batches = shuffled(5, 3, generator())
    indices = torch.cat([next(batches) for _ in range(10)])
    passes = indices.view(6, 5).tolist()
    for one_pass in passes:
        assert sorted(one_pass) == [0, 1, 2, 3, 4]
    assert len({tuple(one_pass) for one_pass in passes}) > 3


@pytest.mark.parametrize("parameter", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_tuning(pipe, monkeypatch, parameter):
    """Trap: all steps of NaN, then a file of them."""
    real = StyleDrop.new_adapter

    def poisoned(self, *arguments):
        theta = real(self, *arguments)
        torch.nn.init.constant_(next(theta.parameters()), parameter)
        torch.nn.init.ones_(theta.generators["cross"].up)
        return theta

    monkeypatch.setattr(StyleDrop, "new_adapter", poisoned)
    with pytest.raises(ValueError, match="NaN or infinite at step 1; give a lower learning rate"):
        pipe.tune(noise_images(1), ["a cat"], steps=50)


# -- calls and settings

def test_settings_of_table_s3():
    """Round 2 differs from round 1 in its length alone; settings cannot be changed in place."""
    assert replace(ROUND_1, steps=ROUND_2.steps) == ROUND_2
    assert ROUND_2.steps > ROUND_1.steps
    for settings in (ROUND_1, SAMPLING):
        with pytest.raises(AttributeError):
            settings.steps = 7
    assert {field for field in vars(ROUND_1)} <= set(Tuning.__dataclass_fields__)
    assert {field for field in vars(SAMPLING)} <= set(Sampling.__dataclass_fields__)


@pytest.mark.parametrize("images, prompts, words", [
    (noise_images(3), PROMPTS, "3 reference images .* not 2"),
    (noise_images(2, 20), PROMPTS, "must be 16 x 16 pixels")])
def test_references_that_do_not_fit(pipe, images, prompts, words):
    """Trap: zip() drops the third reference in silence."""
    with pytest.raises(ValueError, match=words):
        pipe.tune(images, prompts)


@pytest.mark.parametrize("prompts, options, words", [
    (PROMPTS, dict(seed=[1, 2, 3]), "3 seeds for 2 prompts"),
    (PROMPTS, dict(style_phrase=[PHRASE]), "1 style phrases"), ([], {}, "at least one prompt"),
    ("a cat", dict(steps=0), "give at least 1"),
    ("a cat", dict(gamma=math.nan), "a number from 0 to 1"),
    ("a cat", dict(gamma=1.1), "a number from 0 to 1")])
def test_calls_that_do_not_fit(pipe, prompts, options, words):
    """Trap: zip() drops the second prompt in silence."""
    with pytest.raises(ValueError, match=words):
        pipe.generate(prompts, **options)


@pytest.mark.parametrize("call", ["tune", "generate"])
def test_an_unknown_setting_is_refused(pipe, call):
    """Trap: a misspelt keyword that has no effect."""
    arguments = dict(tune=(noise_images(1), ["a cat"]), generate=("a cat",))[call]
    with pytest.raises(TypeError, match="lamda_a"):
        getattr(pipe, call)(*arguments, lamda_a=2)


# -- a base and its files

def damaged(weights, tmp_path, part, entries):
    """A copy of a folder of weights in which some entries of one file are others."""
    folder = shutil.copytree(weights, tmp_path / "base")
    path = folder / f"{part}.pt"
    torch.save(torch.load(path, weights_only=True) | entries, path)
    return folder


@pytest.mark.parametrize("part, entries", [
    ("vqgan", dict(weights={})), ("clip", dict(weights={})), ("muse", dict(weights={})),
    ("superres", dict(weights={})), ("muse", dict(merges=None)), ("muse", dict(merges=7)),
    ("muse", dict(merges=[{}])), ("muse", dict(words=None)), ("muse", dict(words=7)),
    ("muse", dict(words=[{}])), ("superres", dict(merges=[])), ("muse", dict(kind="vqgan"))],
    ids=str)
def test_a_damaged_base_is_one_line(weights2, tmp_path, part, entries):
    """Traps: a KeyError for a file of an old version; a second stage that does not fit is left out
    in silence. CLIP is read when it is needed.
    """
    folder = damaged(weights2, tmp_path, part, entries)
    with pytest.raises(ValueError, match=f"^[^\n]*{part}.pt[^\n]*$"):
        StyleDrop.load(folder, "cpu").clip  # noqa: B018


@pytest.mark.parametrize("part, presets, sizes", [
    ("muse", PRESETS, dict(codebook_size=33)), ("muse", PRESETS, dict(grid=6)),
    ("muse", PRESETS, dict(vocab_size=700)), ("superres", SUPERRES, dict(codebook_size=33)),
    ("superres", SUPERRES, dict(grid=4, low_grid=2))], ids=str)
def test_parts_that_do_not_fit_each_other(weights2, tmp_path, part, presets, sizes):
    """Trap: a tokenizer of 32 codes with a Muse of 33 works until the last one is sampled."""
    folder = shutil.copytree(weights2, tmp_path / "base")
    model = toy_muse(presets=presets, **sizes)
    save_model(folder / f"{part}.pt", part, model, {}, words=VOCABULARY, merges=MERGES)
    with pytest.raises(ValueError, match=f"^[^\n]*{part}.pt[^\n]*not trained together[^\n]*$"):
        StyleDrop.load(folder, "cpu")


@pytest.mark.parametrize("sizes", [dict(codebook_size=33), dict(grid=6), dict(vocab_size=700)],
                         ids=str)
def test_a_muse_that_does_not_fit_its_tokenizers(weights, tmp_path, sizes):
    """Also without a second stage, which would fit no other muse.pt."""
    folder = shutil.copytree(weights, tmp_path / "base")
    save_model(folder / "muse.pt", "muse", toy_muse(**sizes), {}, words=VOCABULARY, merges=MERGES)
    with pytest.raises(ValueError, match="^[^\n]*muse.pt[^\n]*not trained together[^\n]*$"):
        StyleDrop.load(folder, "cpu")


@pytest.mark.parametrize("part", ["vqgan", "muse"])
def test_a_missing_part_is_one_line(weights, tmp_path, part):
    folder = shutil.copytree(weights, tmp_path / "base")
    (folder / f"{part}.pt").unlink()
    with pytest.raises(ValueError, match=f"^no {part} file at [^\n]*{part}.pt$"):
        StyleDrop.load(folder, "cpu")


def test_clip_is_only_the_judge(weights, tmp_path, pipe, make_adapter):
    """The base is the same without it. Trap: no image without CLIP, or seconds to load it."""
    for name in ("vqgan.pt", "muse.pt"):
        shutil.copy(weights / name, tmp_path)
    again = StyleDrop.load(tmp_path, "cpu")
    assert again.base_id == pipe.base_id
    assert again.words == set(VOCABULARY)
    assert again.tokenizer.merges == TOKENIZER.merges
    again.tune(noise_images(1), ["a cat"], PHRASE, steps=1)
    style = make_adapter()
    found = again.generate("a cat", style, steps=2)
    assert torch.equal(found, pipe.generate("a cat", style, steps=2))
    with pytest.raises((ValueError, FileNotFoundError), match="clip.pt"):
        again.clip  # noqa: B018


def test_clip_is_read_once_and_frozen(weights):
    pipe = StyleDrop.load(weights, "cpu")
    assert pipe.clip is pipe.clip
    assert not any(p.requires_grad for p in pipe.clip.parameters())


def test_the_base_of_an_adapter_is_both_stages(pipe, pipe2, weights2, tmp_path):
    """Trap: an adapter is accepted with another second stage."""
    folder = shutil.copytree(weights2, tmp_path / "base")
    other = randomise(toy_muse(presets=SUPERRES), seed=9)
    save_model(folder / "superres.pt", "superres", other, {}, merges=MERGES)
    assert len({pipe.base_id, pipe2.base_id, StyleDrop.load(folder, "cpu").base_id}) == 3


# -- images

def test_pixels_round_trip_exactly():
    """Trap: without rounding, half of all values become darker by one."""
    values = np.arange(3 * 256, dtype=np.uint8).reshape(2, 8, 16, 3)
    images = to_tensor(values)
    assert images.shape == (2, 3, 8, 16)
    assert images.min() == -1 and images.max() == 1
    assert images[1, 2, 3, 4] == pytest.approx(values[1, 3, 4, 2] / 127.5 - 1)
    assert (to_uint8(images) == values).all()


def test_an_array_and_a_tensor_become_the_same_images(recwarn):
    """Bit by bit and in memory alike. Trap: PyTorch warns of an array that is read-only."""
    values = np.arange(3 * 256, dtype=np.uint8).reshape(2, 8, 16, 3)
    from_tensor = to_tensor(torch.tensor(values))
    values.flags.writeable = False
    from_array = to_tensor(values)
    assert torch.equal(from_array, from_tensor) and from_array.dtype == torch.float32
    assert from_array.stride() == from_tensor.stride()
    assert list(recwarn) == []


def test_bright_pixels_are_clipped():
    """Trap: they wrap round to black."""
    images = torch.tensor([-3.0, -1.0, 1.0, 3.0]).expand(1, 3, 2, 4)
    assert (to_uint8(images) == np.array([0, 0, 255, 255])[:, None]).all()
