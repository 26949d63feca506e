"""muse.py: what T and G may see, the cosine mask law, the masked loss, and MaskGIT's decoding."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TOKENIZER, shake, toy_muse

import muse as muse_
import vqgan
from muse import (PRESETS, SUPERRES, Muse, decode, draw_tokens, mask_ratio, masked_loss,
                  no_adapter, random_mask, uniform)

TOY = PRESETS["toy"]
N, V, MASK = TOY.tokens, TOY.codebook_size, TOY.mask_id
generator = lambda seed=0: torch.Generator().manual_seed(seed)
some_ids = lambda b=2, seed=0, n=N: torch.randint(V + 1, (b, n), generator=generator(seed))
some_text = lambda b=2, seed=0: torch.randn(b, 6, TOY.text_width, generator=generator(seed))
all_of = lambda b: torch.ones(b, 6, dtype=torch.bool)
some_mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()


@pytest.fixture(params=[1, 2], ids=["patch=1", "patch=2"])
def muse(request):
    return toy_muse(patch=request.param)


# -- the transformer

def test_logits_have_no_mask_token(muse):
    """Trap: logits over V + 1 ids let [MASK] itself be drawn."""
    logits = muse(some_ids(), some_text(), some_mask)
    assert logits.shape == (2, N, V) and logits.dtype == torch.float32
    assert muse.token.num_embeddings == V + 1


def test_text_padding_is_never_read(muse):
    """Trap: attention without the text mask makes a picture depend on how long the other prompts
    are.
    """
    ids, text = some_ids(), some_text()
    logits = muse(ids, text, some_mask)
    assert torch.equal(logits, muse(ids, text.masked_fill(~some_mask[..., None], 7.0), some_mask))
    assert torch.allclose(logits[:1], muse(ids[:1], text[:1, :4], some_mask[:1, :4]), atol=1e-5)
    # the rest is read
    assert (muse(ids, some_text(seed=1), some_mask) - logits).abs().amax((1, 2)).min() > 0.1


@pytest.mark.parametrize("patch", [1, 2])
def test_ungrouping_undoes_grouping(patch):
    """A network of identities that must give every token back at its own place.

    Trap: tokens enter in the order (row, column in patch) and leave in another; the loss falls all
    the same.
    """
    E = V + 1
    muse = Muse(replace(TOY, patch=patch, layers=0, width=patch ** 2 * E, token_width=E))
    for p in muse.parameters():
        if p.dim() > 1:                                   # rows and columns are of three dimensions
            p.data = torch.eye(*p.shape) if p.dim() == 2 else torch.zeros_like(p)
    ids = some_ids(4).clamp(max=V - 1)
    assert torch.equal(muse(ids, some_text(4), all_of(4)).argmax(-1), ids)


@pytest.mark.parametrize("patch", [1, 2])
def test_a_position_holds_neighbours(patch):
    """Without attention, logits n hear of token m only inside one patch x patch square.

    Trap: a plain reshape groups runs of a row, or whole rows, instead of squares.
    """
    muse = shake(Muse(replace(TOY, patch=patch, layers=0)), 0.3)
    ids = torch.zeros(1, N, dtype=torch.long)
    square = lambda n: (n // TOY.grid // patch, n % TOY.grid // patch)
    before = muse(ids, some_text(1), all_of(1))
    for m in range(N):
        after = muse(ids.index_fill(1, torch.tensor([m]), 5), some_text(1), all_of(1))
        changed = (after - before)[0].abs().amax(1) > 1e-6
        assert changed.tolist() == [square(n) == square(m) for n in range(N)]


@pytest.mark.parametrize("patch", [1, 2])
def test_every_position_is_its_own(patch):
    """Trap: rows and columns share an embedding, and (2, 1) looks like (1, 2)."""
    logits = toy_muse(patch=patch, layers=0)(torch.full((1, N), MASK), some_text(1), all_of(1))[0]
    assert torch.pdist(logits).min() > 0.1


def test_attention_reaches_everything(muse):
    """Every token's logits depend on every other token."""
    ids = some_ids(1)
    before = muse(ids, some_text(1), all_of(1))
    for m in range(0, N, 3):
        after = muse(ids.index_fill(1, torch.tensor([m]),
                                    int(ids[0, m] + 1) % V), some_text(1), all_of(1))
        assert ((after - before).abs().amax(-1) > 0).all()


def test_adapters_are_called_once_at_each_layer_and_placement(muse):
    """None is the identity, bit by bit.

    Traps: dead rows (the index stands still in some layers); a third placement.
    """
    calls = []
    note = lambda h, layer, site: calls.append((layer, site)) or h
    logits = muse(some_ids(), some_text(), some_mask, note)
    assert calls == [(layer, site) for layer in range(TOY.layers) for site in ("cross", "mlp")]
    assert torch.equal(logits, muse(some_ids(), some_text(), some_mask))


# -- the mask law

def test_mask_ratio():
    for u, ratio in ((0.0, 1.0), (1 / 3, 3 ** 0.5 / 2), (0.5, 0.5 ** 0.5), (1.0, 0.0)):
        assert mask_ratio(u) == pytest.approx(ratio)
        assert mask_ratio(torch.tensor(u)).item() == pytest.approx(ratio, abs=1e-6)


def test_mask_law():
    """r = cos(pi u / 2): mean 2 / pi, P(r > .9) = .287.

    Traps: inverted (mean .36); the arccos law (the same mean, P = .157); one u for the whole batch.
    """
    mask = random_mask(10_000, 256, generator())
    ratio = mask.float().mean(1)
    assert ratio.mean().item() == pytest.approx(2 / math.pi, abs=0.01)
    assert (ratio > 0.9).float().mean().item() == pytest.approx(0.287, abs=0.015)
    assert (ratio > 0.99).float().mean().item() == pytest.approx(0.090, abs=0.02)
    assert mask.float().mean(0).sub(2 / math.pi).abs().max() < 0.03        # no position is favoured
    assert torch.equal(mask[:9], random_mask(10_000, 256, generator())[:9])


def test_mask_power_masks_more():
    """cos(pi u^2 / 2) over u ~ U has Fresnel's integral C(1) = 0.7799 for its mean;
    P(r > .9) = sqrt(.287).
    """
    ratio = random_mask(10_000, 256, generator(), power=2).float().mean(1)
    assert ratio.mean().item() == pytest.approx(0.7799 + 0.5 / 256, abs=0.008)
    assert (ratio > 0.9).float().mean().item() == pytest.approx(0.536, abs=0.015)


@pytest.mark.parametrize("ratio, count", [(0.0, 1), (0.3, 5), (0.5, 8), (0.51, 9), (1.0, 16)])
def test_mask_counts_are_exact(monkeypatch, ratio, count):
    """ceil(gamma N) tokens, at least one.

    Traps: a coin for each token; floor; an empty mask, whose loss is 0 / 0.
    """
    monkeypatch.setattr(muse_, "mask_ratio", lambda u: torch.full_like(u, ratio))
    assert (random_mask(50, 16, generator()).sum(1) == count).all()


# -- the loss

def toy_loss(seed=0):
    logits = torch.randn(3, 8, 5, generator=generator(seed), requires_grad=True)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 3], mask[1, :7], mask[2, ::2] = True, True, True
    return logits, torch.randint(5, (3, 8), generator=generator(seed)), mask


@pytest.mark.parametrize("e", [0.0, 0.1])
def test_masked_loss_equals_a_plain_loop(e):
    """on = 1 - e + e / K, off = e / K; the mean of each image, then over images.

    Traps: the pooled mean, where an image with one mask hardly counts; off = e / (K - 1).
    """
    logits, ids, mask = toy_loss()
    images, pooled = [], []
    for b in range(3):
        terms = []
        for n in range(8):
            if mask[b, n]:
                total = sum(math.exp(x) for x in logits[b, n].tolist())
                log_p = [math.log(math.exp(x) / total) for x in logits[b, n].tolist()]
                terms.append(-sum(
                    (e / 5 + (1 - e) * (k == int(ids[b, n]))) * log_p[k] for k in range(5)))
        images.append(sum(terms) / len(terms))
        pooled += terms
    ours = masked_loss(logits, ids, mask, e).item()
    assert ours == pytest.approx(sum(images) / 3, rel=1e-5)
    assert abs(ours - sum(pooled) / len(pooled)) > 0.01             # this batch tells the two apart


def test_loss_is_blind_to_visible_tokens():
    """StyleDrop's text says "unmasked"; MaskGIT's objective is on the masked.

    Trap: a loss over all teaches copying.
    """
    logits, ids, mask = toy_loss()
    loss = masked_loss(logits, ids, mask)
    grad = torch.autograd.grad(loss, logits)[0].abs().sum(-1)
    assert (grad[~mask] == 0).all() and (grad[mask] > 0).all()
    other = torch.where(mask[..., None], logits, torch.randn(3, 8, 5, generator=generator(9)) * 10)
    assert masked_loss(other, ids, mask) == loss


# -- decoding

def table(n, v=V, seed=0):
    """A fake G of peaked logits that differ from step to step and hang on what is known."""
    def logits_fn(ids, step):
        known = (ids * (ids < v)).sum(1, keepdim=True)[..., None] % 7 / 7
        return 2.5 * torch.randn(len(ids), n, v,
                                 generator=generator(100 * seed + step)) * (1 + known)
    return logits_fn


def trace(logits_fn, n=N, v=V, steps=6, temperature=4.5, seed=0, batch=2):
    """What decode does: its result, and (ids it showed to G, logits, drawn, kept) for each step."""
    seen, steps_seen = [], []

    def spy(ids, step):
        seen.append((ids.clone(), logits_fn(ids, step)))
        return seen[-1][1]
    out = decode(
        spy, batch, n, v, steps, temperature, generator(seed), on_step=lambda step, drawn, kept:
        steps_seen.append((*seen[step], drawn.clone(), kept.clone())))
    assert len(steps_seen) == len(seen) == steps
    return out, steps_seen


@pytest.mark.parametrize("temperature", [0.0, 4.5])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_decode_follows_the_official_rule(monkeypatch, temperature, steps):
    """MaskGIT's parallel_decode, replayed in numpy from the tokens and the noise that were drawn.

    Traps: confidence by raw logit; the most confident masked again; annealing that compounds
    (temperature *= 1 - ratio) or stands still; ratio = k / T; known tokens without +inf.
    """
    noise, draw = [], muse_.uniform
    monkeypatch.setattr(muse_, "uniform", lambda *a: noise.append(draw(*a)) or noise[-1])
    n = 40
    out, seen = trace(table(n), n, steps=steps, temperature=temperature)
    known = np.zeros((2, n), bool)
    for k, (ids, logits, drawn, kept) in enumerate(seen):
        ratio = (k + 1) / steps
        n_mask = max(1, min((~known[0]).sum() - 1, math.floor(n * math.cos(math.pi / 2 * ratio))))
        for b in range(2):
            x = logits[b].double().numpy()
            log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
            u = noise[k][b].double().numpy()                # one to draw by, one for the order
            cumulative = np.sort(np.exp(log_p), 1)[:, ::-1].cumsum(1)
            by_hand = np.argsort(-log_p, 1)[np.arange(n), (cumulative < u[0][:, None]).sum(1)]
            assert (by_hand == drawn[b].numpy())[~known[b]].all()
            gumbel = -np.log(-np.log(u[1]))
            confidence = log_p[np.arange(n), drawn[b]] + temperature * (1 - ratio) * gumbel
            confidence[known[b]] = np.inf
            known[b] = True
            known[b, sorted(range(n), key=lambda i: confidence[i])[:n_mask]] = k + 1 == steps
        assert (kept.numpy() == known).all(), f"step {k}"
    assert torch.equal(out, seen[-1][2])


@pytest.mark.parametrize("n, steps, start, end",
                         [(256, 36, [1, 1, 1, 1, 3, 2, 3, 4], [11, 11]),
                          (256, 12, [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33], []),
                          (64, 12, [1, 2, 2, 4, 5, 5, 7, 6, 8, 8, 8, 8], []), (16, 1, [16], []),
                          (4, 6, [1, 1, 1, 0, 0, 1], [])])
def test_reveal_counts(n, steps, start, end):
    """The cosine schedule, worked out by hand.

    Traps: a linear one; a mask left over; too many steps for the tokens.
    """
    _, seen = trace(lambda ids, step: torch.randn(*ids.shape, 3, generator=generator(step)), n, 3,
                    steps)
    known = torch.stack([torch.zeros(2, n, dtype=torch.bool),
                         *(kept for *_, kept in seen)]).sum(-1).diff(dim=0)
    for counts in known.T.tolist():
        assert counts[:len(start)] == start and counts[len(counts) - len(end):] == end
        assert sum(counts) == n


@pytest.mark.parametrize("temperature", [0.0, 4.5])
def test_each_token_is_fixed_once_and_for_good(temperature):
    """Traps: a known token drawn afresh; G shown tokens that were masked again;
    [MASK] in the result.
    """
    out, seen = trace(table(N), temperature=temperature)
    before = torch.zeros(2, N, dtype=torch.bool)
    tokens = torch.full((2, N), MASK)
    for ids, _, drawn, kept in seen:
        assert torch.equal(ids, tokens)                       # what G saw: the kept ones and [MASK]
        assert (kept | ~before).all() and torch.equal(drawn[before], tokens[before])
        tokens, before = torch.where(kept, drawn, MASK), kept
    assert torch.equal(out, tokens) and 0 <= out.min() and out.max() < V


def test_tokens_are_drawn_without_temperature():
    """Trap: 4.5 also flattens the tokens' own softmax, as zideliu's StyleDrop does."""
    p = torch.tensor([0.8, 0.15, 0.05])
    _, seen = trace(lambda ids, step: p.log().expand(*ids.shape, 3), 2000, 3, steps=3,
                    temperature=4.5)
    first = torch.bincount(seen[0][2].flatten(), minlength=3) / 4000
    assert torch.allclose(first, p, atol=0.025)


def test_temperature_is_chance_in_the_order():
    """Trap: the noise is drawn but does nothing. At 0 the order is that of confidence alone."""
    surer = torch.linspace(1, 9, N)[:, None] * F.one_hot(torch.tensor(0), V)     # (N, V)
    G = lambda ids, step: surer[None]

    def first(temperature, seed):
        _, seen = trace(G, steps=N, temperature=temperature, seed=seed, batch=1)
        return int(seen[0][3].nonzero()[0, 1])
    assert min(first(0.0, s) for s in range(12)) > N // 2
    assert len({first(50.0, s) for s in range(12)}) > 4


def test_confidence_is_a_log_probability():
    """A constant added to a position's logits is nothing to its softmax.

    Trap: raw logits, ranked across positions.
    """
    shift = torch.randn(N, 1, generator=generator(5)) * 20
    plain, shifted = (trace(lambda ids, step: table(N)(ids, step) + s)[0] for s in (0, shift))
    assert torch.equal(plain, shifted)


def test_decode_hangs_on_its_generator_alone():
    """Trap: a second source of chance (global torch, numpy) that the seed does not reach."""
    def run(seed, other):
        torch.manual_seed(other), np.random.seed(other)
        return trace(table(N), seed=seed)[0]
    assert torch.equal(run(1, 2), run(1, 3)) and not torch.equal(run(1, 2), run(2, 2))
    assert not torch.equal(*run(1, 2))                      # nor are two pictures of a batch alike


def test_tokens_are_drawn_by_the_softmax():
    """Chi-squared against the exact probabilities, over all and over the three likeliest.

    Traps: the k-th probability left out; what is outside the k still drawn; no renormalising.
    """
    logits = torch.randn(8, generator=generator()) * 1.5
    for top_k, most in ((0, 24.3), (8, 24.3), (3, 13.8), (1, 0)):                # p = .001
        drawn = draw_tokens(logits.expand(1, 20_000, 8), top_k, uniform(generator(1), 1, 20_000))
        kept = logits.argsort(descending=True)[:top_k or 8]
        expected = 20_000 * logits[kept].double().softmax(0)
        counts = torch.bincount(drawn.flatten(), minlength=8)
        assert counts[kept].sum() == 20_000
        assert ((counts[kept] - expected) ** 2 / expected).sum() <= most
    ends = torch.tensor([[1e-20, 1 - 2 ** -24]])            # of the uniform numbers
    assert draw_tokens(logits.expand(1, 2, 8), 3, ends)[0].tolist() == kept_ends(logits)


kept_ends = lambda logits: logits.argsort(descending=True)[[0, 2]].tolist()


def test_top_k_reaches_the_decoding():
    """No token outside the k likeliest of its own place. Trap: top_k in place of on_step."""
    logits = torch.randn(1, N, V, generator=generator())
    likeliest = logits.topk(3, -1).indices[0]
    draw = lambda **k: decode(lambda ids, step: logits.expand(4, N, V), 4, N, V, 5, 1.0,
                              generator(), **k)
    inside = lambda ids: (ids[..., None] == likeliest).any(-1)
    assert inside(draw(top_k=3)).all() and not inside(draw()).all()


def test_a_row_does_not_depend_on_its_company(muse):
    """Generators of their own: alone, in company, at another place of the batch, the same bits.

    Trap: one generator runs on through the rows, and the second picture hangs on the first.
    """
    text = some_text(1)

    def draw(*seeds):
        fn = lambda ids, step: torch.cat([muse(row[None], text, all_of(1)) for row in ids])
        return decode(fn, len(seeds), N, MASK, 5, 1.0, [generator(s) for s in seeds], 8)
    company = draw(5, 6, 7)
    for row, seed in enumerate((5, 6, 7)):
        assert torch.equal(company[row], draw(seed)[0])
    assert torch.equal(draw(7, 5)[1], company[0])
    assert len({tuple(row.tolist()) for row in company}) == 3
    numbers = uniform([generator(5), generator(6)], 2, 3, 4)
    assert torch.equal(numbers[:1], uniform(generator(5), 1, 3, 4))


# -- T

@pytest.fixture
def T():
    return toy_muse(text_length=16).text_encoder


WORDS = ["a cat in watercolor painting style", "a house", ""]
ids_of = lambda texts=WORDS, length=16: TOKENIZER(texts, length)


def test_padding_does_not_change_what_a_text_means(T):
    """The same states for the words and the registers, whatever length the ids are padded to.

    Trap: padding is read, and a prompt changes with the company it is drawn in.
    """
    R = len(T.registers)
    for text in WORDS:
        n = len(TOKENIZER.encode(text)) + 2                 # with start and end
        whole, mask = T(ids_of([text]))
        assert mask[0].tolist() == [True] * n + [False] * (16 - n) + [True] * R
        for length in range(n, 16):
            states, mask = T(ids_of([text], length))
            assert states.shape == (1, length + R, T.token.embedding_dim)
            assert int(mask.sum()) == n + R
            assert torch.allclose(states[:, :n], whole[:, :n], atol=1e-5)
            assert torch.allclose(states[:, length:], whole[:, 16:], atol=1e-5)
    ids = ids_of(["a house"])
    other = ids.clone()
    other[0, 4:] = 7                                        # behind the end token
    states, mask = T(other)
    assert torch.allclose(states[mask], T(ids)[0][mask], atol=1e-5)


def test_registers_differ_and_hear_the_text(T):
    """Trap: registers that all hold one state are one more state, not several."""
    states = T(ids_of(["a cat", "a house"]))[0][:, 16:]
    assert torch.pdist(states[0]).min() > 0.1 and (states[0] - states[1]).abs().amax(1).min() > 0.1
    none = toy_muse(registers=0).text_encoder(ids_of())[1]
    assert none.shape == (3, 16) and none.any(1).all()


def test_word_order_matters(T):
    """In both directions.

    Traps: no positions, a bag of words; a causal mask, whose start hears nothing.
    """
    states = lambda text: T(ids_of([text]))[0]
    house_first, cat_first = states("a house a cat"), states("a cat a house")
    # start, "a", a register
    assert (house_first - cat_first)[:, [0, 1, -1]].abs().amax(-1).min() > 0.1


def test_vectors_stand_for_the_words(T):
    """Given the embeddings it is T; given others it is not,
    and the ids still say where the text ends.
    """
    ids = ids_of()
    vectors = T.token(ids)
    assert torch.equal(T(ids, vectors)[0], T(ids)[0])
    changed, mask = T(ids, vectors.flip(0))
    assert torch.equal(mask, T(ids)[1]) and not torch.allclose(changed, T(ids)[0], atol=0.1)
    hidden = vectors.masked_fill(~mask[:, :16, None], 9.0)
    assert torch.allclose(T(ids, hidden)[0][mask], T(ids)[0][mask], atol=1e-5)


# -- the second stage

@pytest.mark.parametrize("patch", [1, 2])
def test_low_tokens_are_read(patch):
    """Every one of them; masked text still is not, though the low tokens come behind it."""
    muse = toy_muse(preset="toy", presets=SUPERRES, patch=patch)
    ids, text, low = some_ids(2, n=64), some_text(), some_ids(2, seed=1).clamp(max=V - 1)
    logits = muse(ids, text, some_mask, low=low)
    assert logits.shape == (2, 64, V)
    assert torch.equal(logits,
                       muse(ids, text.masked_fill(~some_mask[..., None], 7.0), some_mask, low=low))
    assert (muse(ids, some_text(seed=1), some_mask, low=low) - logits).abs().max() > 0.01
    for n in range(16):
        other = low.index_fill(1, torch.tensor([n]), 0) + 0
        other[:, n] = (low[:, n] + 1) % V
        assert (muse(ids, text, some_mask, low=other) - logits).abs().amax((1, 2)).min() > 1e-4


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_low_token_has_the_position_of_what_lies_over_it(patch):
    """Trap: positions of its own,
    and G_sr has to learn anew which low token belongs to which place.
    """
    muse = toy_muse(preset="toy", presets=SUPERRES, patch=patch, low_layers=0)
    muse.row.normal_(generator=generator(1)), muse.col.normal_(generator=generator(2))
    muse.low_token.weight.zero_()
    states = muse.low_states(torch.zeros(1, 16, dtype=torch.long), no_adapter)[0]  # (4 * 4, D)
    for i in range(4):
        for j in range(4):
            row, col = 2 * i // patch, 2 * j // patch       # its first high token is (2 i, 2 j)
            over = muse.low_norm(muse.row[row, 0] + muse.col[0, col])
            assert torch.allclose(states[4 * i + j], over, atol=1e-5)


# -- sizes and initial weights

count = lambda model: sum(p.numel() for p in model.parameters())


def test_paper_sizes():
    """Muse's base has 3 B parameters, its second stage hundreds of millions (Tables 4 and 6)."""
    with torch.device("meta"):
        assert count(Muse(PRESETS["paper"])) == pytest.approx(3.26e9, rel=0.01)
        assert count(Muse(SUPERRES["paper"])) == pytest.approx(0.79e9, rel=0.01)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_presets_fit_together(name, monkeypatch):
    """G's grid and codes are the tokenizer's; the second stage reads the base's tokens.
    On the meta device.
    """
    class NoAutocast:                                       # torch's does not know the meta device
        def __init__(self, *a, **k): pass
        def __enter__(self): pass
        def __exit__(self, *a): pass
    monkeypatch.setattr(torch, "autocast", NoAutocast)
    with torch.device("meta"):
        E, G, second = vqgan.VQGAN(vqgan.PRESETS[name]), Muse(PRESETS[name]), Muse(SUPERRES[name])
        side, c = E.config.resolution // E.config.factor, G.config
        assert (c.grid, c.codebook_size) == (side, E.config.codebook_size)
        assert second.config.low_grid == side
        text, mask = G.text_encoder(torch.zeros(2, c.text_length, dtype=torch.long))
        assert G(torch.zeros(2, c.tokens).long(), text,
                 mask).shape == (2, c.tokens, c.codebook_size)
        text, mask = second.text_encoder(torch.zeros(2, 8, dtype=torch.long))
        low, high = torch.zeros(2, c.tokens).long(), torch.zeros(2, second.config.tokens).long()
        assert second(high, text, mask, low=low).shape == (*high.shape, c.codebook_size)
    assert count(G) < (20e6 if name == "tiny" else 150e6)


@pytest.mark.parametrize("presets", [PRESETS, SUPERRES], ids=["base", "superres"])
def test_initial_weights_are_cut_off_at_two_sd(presets):
    """sd 0.02; what enters a skip is smaller by the square root of three times its depth.

    Trap: torch's trunc_normal_ cuts at -2 and 2 by default, which at sd 0.02 cuts nothing.
    """
    torch.manual_seed(0)
    muse = Muse(replace(presets["toy"], width=128, layers=3, text_width=128, text_layers=2))
    for name, p in muse.named_parameters():
        if p.dim() > 1 and p.numel():
            depth = 2 if name.startswith("text_encoder") else 3
            scale = (3 * depth) ** -0.5 if name.endswith(("out.weight", "mlp.2.weight")) else 1
            most = p.abs().max().item() / scale
            assert most <= 0.04 + 1e-6, name
            if p.numel() > 10_000:
                assert most > 0.038 and p.std().item() / scale == pytest.approx(0.0176,
                                                                                rel=0.05), name
