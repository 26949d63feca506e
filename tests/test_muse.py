"""muse.py: what T and G may see, the mask schedule, the masked loss, and MaskGIT's decoding."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TOKENIZER, generator, randomise, seeded, toy_muse

import muse as muse_
import vqgan
from muse import (PRESETS, SUPERRES, Muse, decode, masked_loss, no_adapter, random_mask,
                  draw_tokens, uniform)

TOY = PRESETS["toy"]
N, V, MASK = TOY.tokens, TOY.codebook_size, TOY.mask_id
TEXT_MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
patches = pytest.mark.parametrize("patch", [1, 2])


def random_ids(batch, tokens=N, seed=0):
    """Tokens (batch, tokens), some of them masked."""
    return torch.randint(V + 1, (batch, tokens), generator=generator(seed))


def random_text(batch=2, seed=0):
    return torch.randn(batch, 6, TOY.text_width, generator=generator(seed))


def all_seen(batch):
    return torch.ones(batch, 6, dtype=torch.bool)


# -- the transformer

@pytest.fixture(params=[PRESETS, SUPERRES], ids=["base", "second"])
def muse(request, patch):
    return toy_muse(presets=request.param, patch=patch)


def inputs(muse, batch):
    """Tokens, and the low-resolution tokens of the second stage; None for the first."""
    ids = random_ids(batch, muse.config.tokens)
    if not muse.config.low_grid:
        return ids, None
    return ids, random_ids(batch, muse.config.low_grid ** 2, seed=1).clamp(max=V - 1)


def first_rows(tensor, count):
    return None if tensor is None else tensor[:count]


@patches
def test_logits_are_of_codes_alone(muse):
    """Trap: with logits of V + 1 ids, [MASK] itself could be sampled."""
    ids, low = inputs(muse, 2)
    logits = muse(ids, random_text(), all_seen(2), None, low)
    assert logits.shape == (*ids.shape, V)
    assert logits.dtype == torch.float32


@patches
def test_text_behind_the_mask_is_not_read(muse):
    """And the rest is. Trap: an image depends on how long the other prompts of the batch are."""
    ids, low = inputs(muse, 2)
    text = random_text()
    logits = muse(ids, text, TEXT_MASK, None, low)
    changed = text.masked_fill(~TEXT_MASK[..., None], 7.0)
    assert torch.equal(muse(ids, changed, TEXT_MASK, None, low), logits)
    alone = muse(ids[:1], text[:1, :4], TEXT_MASK[:1, :4], None, first_rows(low, 1))
    torch.testing.assert_close(alone, logits[:1], atol=1e-5, rtol=0)
    others = muse(ids, random_text(seed=1), TEXT_MASK, None, low)
    assert (others - logits).abs().amax((1, 2)).min() > 0.1


def with_one_changed(ids):
    """(1, N) -> (N, N): row m has another token at place m."""
    is_changed = torch.eye(ids.shape[1], dtype=torch.bool)
    return torch.where(is_changed, (ids + 1) % V, ids)


@patches
def test_every_token_reaches_every_position(muse):
    """Trap: a mask between positions, or a token that is left out."""
    ids, low = inputs(muse, 1)
    count = ids.shape[1]
    text = random_text(1)
    rows = None if low is None else low.expand(count, -1)
    logits = muse(ids, text, all_seen(1), None, low)
    changed = muse(with_one_changed(ids), text.expand(count, -1, -1), all_seen(count), None, rows)
    assert (changed - logits).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("patch", [1, 2])
def test_every_low_token_is_read(patch):
    muse = toy_muse(presets=SUPERRES, patch=patch)
    ids, low = inputs(muse, 1)
    count = low.shape[1]
    text = random_text(1)
    logits = muse(ids, text, all_seen(1), None, low)
    changed = muse(ids.expand(count, -1), text.expand(count, -1, -1), all_seen(count), None,
                   with_one_changed(low))
    assert (changed - logits).abs().amax((1, 2)).min() > 1e-4


@patches
def test_ungrouping_undoes_grouping(patch):
    """A network of identities must return every token at its own place.

    Trap: tokens enter in the order (row, column in the patch) and leave in another; the loss falls
    all the same.
    """
    token_width = V + 1
    config = replace(TOY, patch=patch, layers=0, width=patch ** 2 * token_width,
                     token_width=token_width)
    muse = seeded(lambda: Muse(config))
    for p in muse.parameters():
        if p.dim() == 2:
            p.data = torch.eye(*p.shape)
        if p.dim() == 3:                                     # the positions
            p.data = torch.zeros_like(p)
    ids = random_ids(4).clamp(max=V - 1)
    logits = muse(ids, random_text(4), all_seen(4))
    assert torch.equal(logits.argmax(-1), ids)


@patches
def test_a_position_holds_neighbours(patch):
    """Without attention, a token only reaches the logits of its own patch x patch square.

    Trap: a plain reshape groups runs of a row, or whole rows, instead of squares.
    """
    muse = randomise(seeded(lambda: Muse(replace(TOY, patch=patch, layers=0))), 0.3)
    ids = torch.zeros(1, N, dtype=torch.long)
    before = muse(ids, random_text(1), all_seen(1))
    after = muse(with_one_changed(ids), random_text(N), all_seen(N))
    is_reached = (after - before).abs().amax(2) > 1e-5                           # (N, N)
    for m in range(N):
        for n in range(N):
            same_row = m // TOY.grid // patch == n // TOY.grid // patch
            same_column = m % TOY.grid // patch == n % TOY.grid // patch
            assert is_reached[m, n] == (same_row and same_column)


@patches
def test_every_position_has_an_embedding_of_its_own(patch):
    """Trap: rows and columns share an embedding, and (2, 1) looks like (1, 2)."""
    muse = toy_muse(patch=patch, layers=0)
    logits = muse(torch.full((1, N), MASK), random_text(1), all_seen(1))[0]
    assert torch.pdist(logits).min() > 0.1


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_low_token_has_the_position_of_what_lies_over_it(patch):
    """Trap: with positions of its own, G has to learn anew which low token belongs where."""
    muse = toy_muse(presets=SUPERRES, patch=patch, low_layers=0)
    muse.row.normal_(generator=generator(1))
    muse.col.normal_(generator=generator(2))
    muse.low_token.weight.zero_()
    side = muse.config.low_grid
    states = muse.encode_low(torch.zeros(1, side * side, dtype=torch.long), no_adapter)[0]
    for y in range(side):
        for x in range(side):                                # its first high token is (2 y, 2 x)
            above = muse.row[2 * y // patch, 0] + muse.col[0, 2 * x // patch]
            torch.testing.assert_close(states[side * y + x], muse.low_norm(above))


# -- the mask schedule

@pytest.mark.parametrize("power, mean, above_9, above_99", [
    (1, 2 / math.pi, 0.287, 0.090), (2, 0.7799, 0.536, 0.300)])
def test_distribution_of_mask_ratios(power, mean, above_9, above_99):
    """r = cos(pi u / 2): its mean is 2 / pi, and P(r > 0.9) = 0.287.

    A power of 2 masks more: the mean is Fresnel's C(1), the shares are the roots of Muse's. Traps:
    the inverted schedule (mean 0.36); the arccos schedule (the same mean, P = 0.157); one u for the
    batch.
    """
    mask = random_mask(4_000, 256, generator(), power)
    ratio = mask.float().mean(1)
    assert ratio.mean().item() == pytest.approx(mean + 0.5 / 256, abs=0.01)      # it rounds up
    assert (ratio > 0.9).float().mean().item() == pytest.approx(above_9, abs=0.02)
    assert (ratio > 0.99).float().mean().item() == pytest.approx(above_99, abs=0.025)
    of_positions = mask.float().mean(0)
    assert (of_positions - mean).abs().max() < 0.03          # no position is favoured


@pytest.mark.parametrize("ratio, count", [(0.0, 1), (0.3, 5), (0.5, 8), (0.51, 9), (1.0, 16)])
def test_counts_of_masked_tokens_are_exact(monkeypatch, ratio, count):
    """Traps: a coin for each token; rounding down; an empty mask, whose loss is 0 / 0."""
    monkeypatch.setattr(muse_, "mask_ratio", lambda u: torch.full_like(u, ratio))
    assert (random_mask(50, 16, generator()).sum(1) == count).all()


# -- the loss

def cross_entropy(logits, target, smoothing):
    """Of one token, in plain Python: logits and target of Szegedy et al.'s smoothed labels."""
    total = sum(math.exp(logit) for logit in logits)
    loss = 0.0
    for k, logit in enumerate(logits):
        share = smoothing / len(logits)
        if k == target:
            share += 1 - smoothing
        loss -= share * (logit - math.log(total))
    return loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_loss_equals_a_loop(smoothing):
    """The mean over the masked tokens of each image, then over images.

    Traps: the pooled mean, in which an image with one mask hardly counts; a loss over all tokens
    (StyleDrop's text says "unmasked"), which teaches copying.
    """
    logits = torch.randn(3, 8, 5, generator=generator(), requires_grad=True)
    ids = torch.randint(5, (3, 8), generator=generator())
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 3] = True
    mask[1, :7] = True
    mask[2, ::2] = True
    of_images = []
    for b in range(3):
        of_tokens = [cross_entropy(logits[b, n].tolist(), ids[b, n].item(), smoothing)
                     for n in range(8) if mask[b, n]]
        of_images.append(sum(of_tokens) / len(of_tokens))
    loss = masked_loss(logits, ids, mask, smoothing)
    assert loss.item() == pytest.approx(sum(of_images) / 3, rel=1e-5)
    gradient, = torch.autograd.grad(loss, logits)
    has_gradient = gradient.abs().sum(-1) > 0
    assert torch.equal(has_gradient, mask)


# -- decoding

def peaked_logits(tokens, codes):
    """A fake G whose logits differ from step to step and depend on the known tokens.

    Each place adds a constant to its logits, which means nothing to the softmax and much to code
    that compares logits of different places.
    """
    def logits_fn(ids, step):
        known = (ids * (ids < codes)).sum(1, keepdim=True)[..., None] % 7 / 7
        x = torch.randn(len(ids), tokens, codes + 1, generator=generator(step))
        return 2.5 * x[..., :codes] * (1 + known) + 20 * x[..., codes:]
    return logits_fn


class Recorded:
    """A run of decode: for each step what G saw and said, the random numbers, and the results."""

    def __init__(self, monkeypatch, logits_fn):
        self.logits_fn = logits_fn
        self.shown, self.logits, self.noise, self.sampled, self.kept = [], [], [], [], []
        monkeypatch.setattr(muse_, "uniform", self.uniform)

    def uniform(self, *arguments):
        self.noise.append(uniform(*arguments))
        return self.noise[-1]

    def logits_of(self, ids, step):
        self.shown.append(ids.clone())
        self.logits.append(self.logits_fn(ids, step))
        return self.logits[-1]

    def on_step(self, step, sampled, kept):
        self.sampled.append(sampled.clone())
        self.kept.append(kept.clone())


def official_step(logits, noise, tokens, known, ratio, temperature, is_last):
    """One step of MaskGIT's parallel_decode for one image, in numpy -> tokens and known.

    logits (N, V); noise (2, N), uniform: a row to sample by and a row for the order; tokens (N,);
    known (N,) bool.
    """
    n = len(tokens)
    place = np.arange(n)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    by_size = np.argsort(-log_p, 1)
    cumulative = np.take_along_axis(np.exp(log_p), by_size, 1).cumsum(1)
    column = (cumulative < noise[0][:, None]).sum(1)
    tokens = np.where(known, tokens, by_size[place, column])
    gumbel = -np.log(-np.log(noise[1]))
    confidence = log_p[place, tokens] + temperature * (1 - ratio) * gumbel
    confidence[known] = np.inf
    masked = n - known.sum()
    n_mask = max(1, min(masked - 1, math.floor(n * math.cos(math.pi / 2 * ratio))))
    known = np.ones(n, bool)
    known[np.argsort(confidence)[:n_mask]] = is_last
    return tokens, known


@pytest.mark.parametrize("temperature", [0.0, 4.5])
@pytest.mark.parametrize("tokens, steps, revealed", [
    (256, 36, [1, 1, 1, 1, 3, 2, 3, 4]), (64, 12, [1, 2, 2, 4, 5, 5, 7, 6, 8, 8, 8, 8]),
    (16, 1, [16]), (4, 6, [1, 1, 1, 0, 0, 1])])
def test_decode_follows_the_official_rule(monkeypatch, tokens, steps, revealed, temperature):
    """Step by step, from the same logits and random numbers. `revealed` was worked out by hand.

    Traps: confidence by raw logit, compared across positions; the most confident masked again;
    annealing that compounds (temperature *= 1 - ratio) or stands still; noise without an effect;
    ratio = k / T; a linear schedule; a mask that is left over; more steps than tokens; known tokens
    without +inf; a known token sampled afresh; G shown tokens that were masked again; [MASK] in the
    result.
    """
    run = Recorded(monkeypatch, peaked_logits(tokens, V))
    result = decode(run.logits_of, 2, tokens, MASK, steps, temperature, generator(),
                    on_step=run.on_step)
    assert len(run.shown) == steps
    for b in range(2):
        expected = np.full(tokens, MASK)
        known = np.zeros(tokens, bool)
        counts = []
        for k in range(steps):
            assert (run.shown[k][b].numpy() == np.where(known, expected, MASK)).all()
            known_before = known.sum()
            expected, known = official_step(
                run.logits[k][b].double().numpy(), run.noise[k][b].double().numpy(), expected,
                known, (k + 1) / steps, temperature, k + 1 == steps)
            assert (run.sampled[k][b].numpy() == expected).all()
            assert (run.kept[k][b].numpy() == known).all()
            counts.append(known.sum() - known_before)
        assert counts[:len(revealed)] == revealed
        assert (result[b].numpy() == expected).all()
    assert result.min() >= 0 and result.max() < V


def chi_squared(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("top_k, most", [
    (0, 24.3), (8, 24.3), (99, 24.3), (3, 13.8), (1, 0)])
def test_tokens_are_sampled_by_the_softmax(top_k, most):
    """Chi-squared against the exact probabilities; `most` is its quantile at p = 0.001.

    Traps: the k-th probability left out; codes outside the k still sampled; no renormalising.
    """
    n = 20_000
    logits = torch.randn(8, generator=generator()) * 1.5
    most_probable = logits.argsort(descending=True)[:top_k or 8]
    probabilities = logits[most_probable].double().softmax(0)
    u = uniform(generator(1), 1, n)
    tokens = draw_tokens(logits.expand(1, n, 8), top_k, u)
    counts = tokens.flatten().bincount(minlength=8)[most_probable]
    assert counts.sum() == n
    assert chi_squared(counts, probabilities) <= most


def test_temperature_does_not_flatten_the_softmax():
    """In decode, it only randomises the order. Trap (zideliu): 4.5 divides the logits as well."""
    n = 10_000
    logits = torch.randn(8, generator=generator()) * 1.5
    first = []

    def logits_fn(ids, step):
        return logits.expand(2, n, 8)

    def on_step(step, sampled, kept):
        if step == 0:
            first.append(sampled)

    decode(logits_fn, 2, n, 8, 2, 4.5, generator(3), 0, on_step)
    counts = first[0].flatten().bincount(minlength=8)
    assert chi_squared(counts, logits.double().softmax(0)) <= 24.3


@pytest.mark.parametrize("top_k", [0, 3])
def test_the_ends_of_the_uniform_numbers(top_k):
    """The most and the least probable code of the k."""
    logits = torch.randn(8, generator=generator()) * 1.5
    most_probable = logits.argsort(descending=True)[:top_k or 8]
    ends = torch.tensor([[1e-20, 1 - 2 ** -24]])
    tokens = draw_tokens(logits.expand(1, 2, 8), top_k, ends)[0]
    assert tokens.tolist() == [most_probable[0], most_probable[-1]]


def test_a_rounded_sum_gives_no_code_beyond_the_last():
    """Trap: 999 rounded probabilities add up to less than the largest uniform number."""
    logits = torch.randn(1, 99, 999, generator=generator())
    u = torch.full((1, 99), 1 - 2 ** -24)
    assert draw_tokens(logits, 0, u).max() < 999


# -- T

T = toy_muse(text_length=16).text_encoder


def ids_of(*texts, length=16):
    return TOKENIZER(texts, length)


@pytest.mark.parametrize("text", ["a cat in watercolor painting style", "a house", ""])
def test_padding_does_not_change_what_a_text_means(text):
    """The states of words and registers are the same, whatever length the ids are padded to.

    Trap: padding is read, and a prompt changes with the other prompts of its batch.
    """
    registers = len(T.registers)
    words = len(TOKENIZER.encode(text)) + 2                  # with start and end
    whole, mask = T(ids_of(text))
    assert mask[0].tolist() == [True] * words + [False] * (16 - words) + [True] * registers
    for length in range(words, 16):
        states, shorter = T(ids_of(text, length=length))
        torch.testing.assert_close(states[shorter], whole[mask], atol=1e-5, rtol=0)


def test_what_follows_the_end_of_a_text_is_not_read():
    ids = ids_of("a house")
    states, mask = T(ids)
    ids[0, len(TOKENIZER.encode("a house")) + 2:] = 7
    torch.testing.assert_close(T(ids)[0][mask], states[mask], atol=1e-5, rtol=0)


def test_what_the_states_tell_apart():
    """The order of words, and the registers.

    Traps: registers that all hold one state are one more state and not several; without positions
    a text is a bag of words; with a causal mask its start knows nothing.
    """
    one, other = T(ids_of("a house a cat", "a cat a house"))[0]
    start, article, register = 0, 1, -1
    for place in (start, article, register):
        assert (one[place] - other[place]).abs().max() > 0.1
    assert torch.pdist(one[16:]).min() > 0.1


# -- sizes and initial weights

def count(model):
    return sum(p.numel() for p in model.parameters())


def test_sizes_of_the_paper():
    """Muse's base has 3 B parameters, its second stage hundreds of millions (Tables 4 and 6)."""
    with torch.device("meta"):
        assert count(Muse(PRESETS["paper"])) == pytest.approx(3.26e9, rel=0.01)
        assert count(Muse(SUPERRES["paper"])) == pytest.approx(0.79e9, rel=0.01)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_presets_fit_together(name):
    """G's grid and codes are the tokenizer's, and the second stage reads the base's tokens."""
    tokenizer, base, second = vqgan.PRESETS[name], PRESETS[name], SUPERRES[name]
    assert base.grid == second.low_grid == tokenizer.resolution // tokenizer.factor
    assert base.codebook_size == second.codebook_size == tokenizer.codebook_size
    assert base.text_length == second.text_length
    assert base.grid % base.patch == 0
    assert second.grid % second.patch == 0


@pytest.mark.parametrize("presets", [PRESETS, SUPERRES], ids=["base", "second"])
def test_initial_weights_are_truncated_at_two_std(presets):
    """Of std 0.02; before a skip they are divided by the square root of three times the depth.

    Trap: torch's trunc_normal_ cuts at -2 and 2 by default, which at std 0.02 cuts nothing. A
    normal that is truncated at two std has 0.88 times its std.
    """
    config = replace(presets["toy"], width=128, layers=3, text_width=128, text_layers=2)
    muse = seeded(lambda: Muse(config))
    for name, p in muse.named_parameters():
        if p.dim() == 1 or p.numel() <= 10_000:
            continue
        scale = 1.0
        if name.endswith(("out.weight", "mlp.2.weight")):
            depth = 2 if name.startswith("text_encoder") else 3
            scale = (3 * depth) ** -0.5
        assert 0.038 < p.abs().max().item() / scale <= 0.04 + 1e-6, name
        assert p.std().item() / scale == pytest.approx(0.0176, rel=0.05), name
