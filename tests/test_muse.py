"""muse.py: what T and G may see, the cosine mask law, the masked loss, and MaskGIT's decoding."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TOKENIZER, generator, shake, toy_muse

import muse as muse_
import vqgan
from muse import (PRESETS, SUPERRES, Muse, decode, draw_tokens, masked_loss, no_adapter,
                  random_mask, uniform)

TOY = PRESETS["toy"]
N, V, MASK = TOY.tokens, TOY.codebook_size, TOY.mask_id
some_ids = lambda b=2, seed=0, n=N: torch.randint(V + 1, (b, n), generator=generator(seed))
some_text = lambda b=2, seed=0: torch.randn(b, 6, TOY.text_width, generator=generator(seed))
all_of = lambda b: torch.ones(b, 6, dtype=torch.bool)
some_mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
patches = pytest.mark.parametrize("patch", [1, 2])


# -- the transformer

@pytest.fixture(params=[PRESETS, SUPERRES], ids=["base", "second"])
def muse(request, patch):
    return toy_muse(presets=request.param, patch=patch)


def inputs(muse, b):
    """ids, low of b pictures; low is None in the first stage."""
    low = some_ids(b, 1).clamp(max=V - 1) if muse.config.low_grid else None
    return some_ids(b, n=muse.config.tokens), low


@patches
def test_what_g_returns_and_what_it_reads(muse):
    """Traps: logits over V + 1 ids let [MASK] itself be drawn; attention without the text mask (or
    without low tokens behind it) makes a picture depend on how long the other prompts are.
    """
    (ids, low), text = inputs(muse, 2), some_text()
    G = lambda text, b=2, l=6: muse(ids[:b], text[:b, :l], some_mask[:b, :l], None,
                                    low if low is None else low[:b])
    logits = G(text)
    assert logits.shape == (*ids.shape, V) and logits.dtype == torch.float32
    assert torch.equal(logits, G(text.masked_fill(~some_mask[..., None], 7.0)))
    assert torch.allclose(logits[:1], G(text, 1, 4), atol=1e-5)
    assert (G(some_text(seed=1)) - logits).abs().amax((1, 2)).min() > 0.1        # the rest is read


# (1, N) -> (N, N): row m has another token at place m
others = lambda ids: torch.where(torch.eye(ids.shape[1]).bool(), (ids + 1) % V, ids)


@patches
def test_every_token_reaches_every_position(muse):
    """Each of the low tokens too. Trap: a mask, or a token that is left out."""
    G = lambda ids, low: muse(ids, some_text(1).expand(len(ids), -1, -1), all_of(len(ids)), None,
                              low if low is None else low.expand(len(ids), -1))
    ids, low = inputs(muse, 1)
    assert (G(others(ids), low) - G(ids, low)).abs().amax(-1).min() > 1e-4
    if low is not None:
        ids = ids.expand(N, -1)
        assert (G(ids, others(low)) - G(ids, low)).abs().amax((1, 2)).min() > 1e-4


@patches
def test_ungrouping_undoes_grouping(patch):
    """A network of identities must give every token back at its own place. Trap: tokens enter in
    the order (row, column in patch) and leave in another; the loss falls all the same.
    """
    E = V + 1
    muse = Muse(replace(TOY, patch=patch, layers=0, width=patch ** 2 * E, token_width=E))
    for p in muse.parameters():
        if p.dim() > 1:                                   # rows and columns are of three dimensions
            p.data = torch.eye(*p.shape) if p.dim() == 2 else torch.zeros_like(p)
    ids = some_ids(4).clamp(max=V - 1)
    assert torch.equal(muse(ids, some_text(4), all_of(4)).argmax(-1), ids)


@patches
def test_a_position_holds_neighbours(patch):
    """Without attention, logits n hear of token m only inside one patch x patch square. Trap: a
    plain reshape groups runs of a row, or whole rows, instead of squares.
    """
    muse = shake(Muse(replace(TOY, patch=patch, layers=0)), 0.3)
    ids = torch.zeros(1, N, dtype=torch.long)
    before, after = (muse(x, some_text(len(x)), all_of(len(x))) for x in (ids, others(ids)))
    square = torch.tensor([(n // TOY.grid // patch, n % TOY.grid // patch) for n in range(N)])
    assert torch.equal((after - before).abs().amax(2) > 1e-5, (square[:, None] == square).all(2))


@patches
def test_every_position_is_its_own(patch):
    """Trap: rows and columns share an embedding, and (2, 1) looks like (1, 2)."""
    logits = toy_muse(patch=patch, layers=0)(torch.full((1, N), MASK), some_text(1), all_of(1))[0]
    assert torch.pdist(logits).min() > 0.1


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_low_token_has_the_position_of_what_lies_over_it(patch):
    """Trap: positions of its own, and G_sr has to learn anew which low token belongs where."""
    muse = toy_muse(presets=SUPERRES, patch=patch, low_layers=0)
    muse.row.normal_(generator=generator(1)), muse.col.normal_(generator=generator(2))
    muse.low_token.weight.zero_()
    states = muse.low_states(torch.zeros(1, 16, dtype=torch.long), no_adapter)[0]  # (4 * 4, D)
    for i in range(16):                                     # its first high token is (2 y, 2 x)
        over = muse.row[i // 4 * 2 // patch, 0] + muse.col[0, i % 4 * 2 // patch]
        assert torch.allclose(states[i], muse.low_norm(over), atol=1e-5)


# -- the mask law

@pytest.mark.parametrize("power, mean, above_9, above_99", [(1, 2 / math.pi, 0.287, 0.090),
                                                            (2, 0.7799, 0.536, 0.300)])
def test_mask_law(power, mean, above_9, above_99):
    """r = cos(pi u / 2): mean 2 / pi, P(r > .9) = .287. A power of 2 masks more: the mean is
    Fresnel's C(1), the shares are the roots of Muse's. Traps: inverted (mean .36); the arccos law
    (the same mean, P = .157); one u for the whole batch.
    """
    mask = random_mask(4_000, 256, generator(), power)
    ratio = mask.float().mean(1)
    assert ratio.mean().item() == pytest.approx(mean + 0.5 / 256, abs=0.01)      # ceil
    assert (ratio > 0.9).float().mean().item() == pytest.approx(above_9, abs=0.02)
    assert (ratio > 0.99).float().mean().item() == pytest.approx(above_99, abs=0.025)
    assert mask.float().mean(0).sub(mean).abs().max() < 0.03        # no position is favoured


@pytest.mark.parametrize("ratio, count", [(0.0, 1), (0.3, 5), (0.5, 8), (0.51, 9), (1.0, 16)])
def test_mask_counts_are_exact(monkeypatch, ratio, count):
    """Traps: a coin for each token; floor for ceil; an empty mask, whose loss is 0 / 0."""
    monkeypatch.setattr(muse_, "mask_ratio", lambda u: torch.full_like(u, ratio))
    assert (random_mask(50, 16, generator()).sum(1) == count).all()


# -- the loss

@pytest.mark.parametrize("e", [0.0, 0.1])
def test_masked_loss_equals_a_plain_loop(e):
    """on = 1 - e + e / K, off = e / K, over the masked tokens of each image, then over images.
    Traps: the pooled mean, where an image with one mask hardly counts; off = e / (K - 1); a loss
    over all (StyleDrop's text says "unmasked") teaches copying.
    """
    logits = torch.randn(3, 8, 5, generator=generator(), requires_grad=True)
    ids, mask = torch.randint(5, (3, 8), generator=generator()), torch.zeros(3, 8).bool()
    mask[0, 3], mask[1, :7], mask[2, ::2] = True, True, True
    images = []
    for b in range(3):
        terms = []
        for x, target in zip(logits[b, mask[b]].tolist(), ids[b, mask[b]].tolist()):
            log_p = [x_k - math.log(sum(map(math.exp, x))) for x_k in x]
            terms.append(-sum((e / 5 + (1 - e) * (k == target)) * log_p[k] for k in range(5)))
        images.append(sum(terms) / len(terms))
    ours = masked_loss(logits, ids, mask, e)
    assert ours.item() == pytest.approx(sum(images) / 3, rel=1e-5)
    grad = torch.autograd.grad(ours, logits)[0].abs().sum(-1)
    assert (grad[~mask] == 0).all() and (grad[mask] > 0).all()


# -- decoding

def table(n, v):
    """A fake G of peaked logits that differ from step to step and hang on what is known. A constant
    at each place is nothing to its softmax, and much to whoever ranks raw logits.
    """
    def logits_fn(ids, step):
        known = (ids * (ids < v)).sum(1, keepdim=True)[..., None] % 7 / 7
        x = torch.randn(len(ids), n, v + 1, generator=generator(step))
        return 2.5 * x[..., :v] * (1 + known) + 20 * x[..., v:]
    return logits_fn


@pytest.mark.parametrize("temperature", [0.0, 4.5])
@pytest.mark.parametrize("n, steps, first", [
    (256, 36, [1, 1, 1, 1, 3, 2, 3, 4]), (64, 12, [1, 2, 2, 4, 5, 5, 7, 6, 8, 8, 8, 8]),
    (16, 1, [16]), (4, 6, [1, 1, 1, 0, 0, 1])])
def test_decode_follows_the_official_rule(monkeypatch, n, steps, first, temperature):
    """MaskGIT's parallel_decode, replayed in numpy from the logits and the uniform numbers; how
    many tokens the first steps reveal was worked out by hand. Traps: confidence by raw logit,
    ranked across positions; the most confident masked again; annealing that compounds (temperature
    *= 1 - ratio) or stands still; noise that is drawn but does nothing; ratio = k / T; a linear
    schedule; a mask left over; more steps than tokens; known tokens without +inf; a known token
    drawn afresh; G shown tokens that were masked again; [MASK] in the result.
    """
    noise, shown, seen, draw, fn = [], [], [], muse_.uniform, table(n, V)
    monkeypatch.setattr(muse_, "uniform", lambda *a: noise.append(draw(*a)) or noise[-1])
    out = decode(lambda *a: shown.append((a[0].clone(), fn(*a))) or shown[-1][1], 2, n, MASK, steps,
                 temperature, generator(), on_step=lambda *a: seen.append(
                     (*shown[-1], a[1].clone().numpy(), a[2].numpy())))
    known, tokens, place = np.zeros((2, n), bool), np.full((2, n), MASK), np.arange(n)
    counts = []
    for k, (ids, logits, drawn, kept) in enumerate(seen):
        assert (ids.numpy() == tokens).all()                # what G sees: the kept ones and [MASK]
        ratio, before = (k + 1) / steps, known.sum(1)
        n_mask = max(1, min(n - before[0] - 1, math.floor(n * math.cos(math.pi / 2 * ratio))))
        for b in range(2):
            x = logits[b].double().numpy()
            log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
            u = noise[k][b].double().numpy()                # one to draw by, one for the order
            cumulative = np.sort(np.exp(log_p), 1)[:, ::-1].cumsum(1)
            by_hand = np.argsort(-log_p, 1)[place, (cumulative < u[0][:, None]).sum(1)]
            tokens[b] = np.where(known[b], tokens[b], by_hand)
            gumbel = -np.log(-np.log(u[1]))
            confidence = log_p[place, tokens[b]] + temperature * (1 - ratio) * gumbel
            confidence[known[b]] = np.inf
            known[b] = True
            known[b, np.argsort(confidence)[:n_mask]] = k + 1 == steps
        assert (drawn == tokens).all() and (kept == known).all(), f"step {k}"
        tokens[~known] = MASK
        counts.append((known.sum(1) - before).tolist())
    assert counts[:len(first)] == [[count] * 2 for count in first] and len(seen) == steps
    assert (out.numpy() == tokens).all() and 0 <= out.min() and out.max() < V


@pytest.mark.parametrize("top_k, most", [(0, 24.3), (8, 24.3), (3, 13.8), (1, 0)])       # p = .001
def test_tokens_are_drawn_by_the_softmax(top_k, most):
    """Chi-squared against the exact probabilities; also through decode at temperature 4.5.
    Traps: the k-th probability left out; what is outside the k still drawn; no renormalising; 4.5
    also flattens the tokens' own softmax, as zideliu's StyleDrop does; top_k in place of on_step.
    """
    n, logits, first = 20_000, torch.randn(8, generator=generator()) * 1.5, []
    kept = logits.argsort(descending=True)[:top_k or 8]
    p = logits[kept].double().softmax(0)
    decode(lambda ids, step: logits.expand(2, n // 2, 8), 2, n // 2, 8, 2, 4.5, generator(3), top_k,
           lambda step, drawn, kept: first.append(drawn))
    for drawn in draw_tokens(logits.expand(1, n, 8), top_k, uniform(generator(1), 1, n)), first[0]:
        ours = drawn.flatten().bincount(minlength=8)[kept]
        assert ours.sum() == n and ((ours - n * p) ** 2 / (n * p)).sum() <= most
    ends = torch.tensor([[1e-20, 1 - 2 ** -24]])            # of the uniform numbers
    assert torch.equal(draw_tokens(logits.expand(1, 2, 8), top_k, ends)[0], kept[[0, -1]])
    rounded = torch.randn(1, 99, 999, generator=generator())           # sums that fall short of 1
    assert draw_tokens(rounded, top_k, ends[:, 1:].expand(1, 99)).max() < 999


# -- T

T = toy_muse(text_length=16).text_encoder
ids_of = lambda *texts, length=16: TOKENIZER(texts, length)
WORDS = ["a cat in watercolor painting style", "a house", ""]


@pytest.mark.parametrize("text", WORDS)
def test_padding_does_not_change_what_a_text_means(text):
    """The same states for words and registers, whatever length the ids are padded to and whatever
    stands behind the end. Trap: padding is read, and a prompt changes with its company.
    """
    R, n, ids = len(T.registers), len(TOKENIZER.encode(text)) + 2, ids_of(text)  # with start, end
    whole, mask = T(ids)
    assert mask[0].tolist() == [True] * n + [False] * (16 - n) + [True] * R
    for length in range(n, 16):
        states, shorter = T(ids_of(text, length=length))
        assert torch.allclose(states[shorter], whole[mask], atol=1e-5)
    ids[0, n:] = 7
    assert torch.allclose(T(ids)[0][mask], whole[mask], atol=1e-5)


def test_what_the_states_tell_apart():
    """Words, their order, and registers. Traps: registers that all hold one state are one more
    state, not several; no positions, a bag of words; a causal mask, whose start hears nothing.
    """
    one, other = T(ids_of("a house a cat", "a cat a house"))[0]
    assert (one - other)[[0, 1, -1]].abs().amax(-1).min() > 0.1        # start, "a", a register
    assert torch.pdist(one[16:]).min() > 0.1


# -- sizes and initial weights

count = lambda model: sum(p.numel() for p in model.parameters())


def test_paper_sizes():
    """Muse's base has 3 B parameters, its second stage hundreds of millions (Tables 4 and 6)."""
    with torch.device("meta"):
        assert count(Muse(PRESETS["paper"])) == pytest.approx(3.26e9, rel=0.01)
        assert count(Muse(SUPERRES["paper"])) == pytest.approx(0.79e9, rel=0.01)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_presets_fit_together(name):
    """G's grid and codes are the tokenizer's; the second stage reads the base's tokens."""
    E, G, second = vqgan.PRESETS[name], PRESETS[name], SUPERRES[name]
    assert G.grid == second.low_grid == E.resolution // E.factor
    assert G.codebook_size == second.codebook_size == E.codebook_size
    assert G.text_length == second.text_length
    assert G.grid % G.patch == second.grid % second.patch == 0


@pytest.mark.parametrize("presets", [PRESETS, SUPERRES], ids=["base", "second"])
def test_initial_weights_are_cut_off_at_two_sd(presets):
    """sd 0.02; what enters a skip is smaller by the square root of three times its depth. Trap:
    torch's trunc_normal_ cuts at -2 and 2 by default, which at sd 0.02 cuts nothing.
    """
    torch.manual_seed(0)
    muse = Muse(replace(presets["toy"], width=128, layers=3, text_width=128, text_layers=2))
    for name, p in muse.named_parameters():
        if p.dim() > 1 and p.numel() > 10_000:
            depth = 2 if name.startswith("text_encoder") else 3
            scale = (3 * depth) ** -0.5 if name.endswith(("out.weight", "mlp.2.weight")) else 1
            assert 0.038 < p.abs().max().item() / scale <= 0.04 + 1e-6, name
            assert p.std().item() / scale == pytest.approx(0.0176, rel=0.05), name       # 0.88 sd
