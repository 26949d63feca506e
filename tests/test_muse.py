"""muse.py: what the transformer may see, the cosine mask law, the masked loss, and MaskGIT's decoding rule."""

import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import shake, toy_muse

import clip_feedback
import muse as muse_
import vqgan
from muse import PRESETS, Muse, decode, loudest_word, mask_ratio, masked_loss, random_mask

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
    assert logits.shape == (2, N, V) and logits.dtype == torch.float32 and muse.token.num_embeddings == V + 1


def test_text_padding_is_never_read(muse):
    """Trap: attention without the text mask makes a picture depend on how long the other prompts are."""
    ids, text = some_ids(), some_text()
    logits = muse(ids, text, some_mask)
    assert torch.equal(logits, muse(ids, text.masked_fill(~some_mask[..., None], 7.0), some_mask))
    assert torch.allclose(logits[:1], muse(ids[:1], text[:1, :4], some_mask[:1, :4]), atol=1e-5)
    assert (muse(ids, some_text(seed=1), some_mask) - logits).abs().amax((1, 2)).min() > 0.1     # the rest is read


@pytest.mark.parametrize("patch", [1, 2])
def test_ungrouping_undoes_grouping(patch):
    """A network of identities that must give every token back at its own place.

    Trap: tokens enter in the order (row, column in patch) and leave in another; the loss still falls.
    """
    E = V + 1
    muse = Muse(replace(TOY, patch=patch, layers=0, width=patch ** 2 * E, token_width=E, things=0))
    for p in muse.parameters():
        p.data = torch.eye(*p.shape) if p.dim() == 2 else torch.zeros_like(p) if p.dim() == 3 else p.data
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
    for m in range(N):
        changed = (muse(ids.index_fill(1, torch.tensor([m]), 5), some_text(1), all_of(1)) - muse(ids, some_text(1), all_of(1)))[0]
        assert (changed.abs().amax(1) > 1e-6).tolist() == [square(n) == square(m) for n in range(N)]


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
        after = muse(ids.index_fill(1, torch.tensor([m]), int(ids[0, m] + 1) % V), some_text(1), all_of(1))
        assert ((after - before).abs().amax(-1) > 0).all()


def test_adapters_are_called_once_at_each_layer_and_placement(muse):
    """None is the identity, bit by bit. Traps: dead rows (the index stands still in some layers); a third placement."""
    calls = []
    logits = muse(some_ids(), some_text(), some_mask, lambda h, layer, site: calls.append((layer, site)) or h)
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
    assert mask.float().mean(0).sub(2 / math.pi).abs().max() < 0.03          # no position is favoured
    assert torch.equal(mask[:9], random_mask(10_000, 256, generator())[:9])


def test_mask_power_masks_more():
    """cos(pi u^2 / 2) over u ~ U has Fresnel's integral C(1) = 0.7799 for its mean; P(r > .9) = sqrt(.287)."""
    ratio = random_mask(10_000, 256, generator(), power=2).float().mean(1)
    assert ratio.mean().item() == pytest.approx(0.7799 + 0.5 / 256, abs=0.008)
    assert (ratio > 0.9).float().mean().item() == pytest.approx(0.536, abs=0.015)


@pytest.mark.parametrize("ratio, count", [(0.0, 1), (0.3, 5), (0.5, 8), (0.51, 9), (1.0, 16)])
def test_mask_counts_are_exact(monkeypatch, ratio, count):
    """ceil(gamma N) tokens, at least one. Traps: a coin for each token; floor; an empty mask, whose loss is 0 / 0."""
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
                terms.append(-sum((e / 5 + (1 - e) * (k == int(ids[b, n]))) * log_p[k] for k in range(5)))
        images.append(sum(terms) / len(terms))
        pooled += terms
    ours = masked_loss(logits, ids, mask, e).item()
    assert ours == pytest.approx(sum(images) / 3, rel=1e-5)
    assert abs(ours - sum(pooled) / len(pooled)) > 0.01                      # this batch tells the two apart


def test_loss_is_blind_to_visible_tokens():
    """StyleDrop's text says "unmasked"; MaskGIT's objective is on the masked. Trap: a loss over all teaches copying."""
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
        return 2.5 * torch.randn(len(ids), n, v, generator=generator(100 * seed + step)) * (1 + known)
    return logits_fn


def trace(logits_fn, n=N, v=V, steps=6, temperature=4.5, seed=0, batch=2):
    """What decode does: its result, and (ids it showed to G, logits, drawn, kept) for each step."""
    seen, steps_seen = [], []

    def spy(ids, step):
        seen.append((ids.clone(), logits_fn(ids, step)))
        return seen[-1][1]
    out = decode(spy, batch, n, v, steps, temperature, generator(seed),
                 lambda step, drawn, kept: steps_seen.append((*seen[step], drawn.clone(), kept.clone())))
    assert len(steps_seen) == len(seen) == steps
    return out, steps_seen


@pytest.mark.parametrize("temperature", [0.0, 4.5])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_decode_follows_the_official_rule(monkeypatch, temperature, steps):
    """MaskGIT's parallel_decode, replayed in numpy from the tokens and the noise that were drawn.

    Traps: confidence by raw logit; the most confident masked again; annealing that compounds
    (temperature *= 1 - ratio) or stands still; ratio = k / T; known tokens without +inf.
    """
    noise, draw = [], torch.Tensor.exponential_
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x, **k: noise.append(draw(x, **k).clone()) or noise[-1])
    n = 40
    out, seen = trace(table(n), n, steps=steps, temperature=temperature)
    known = np.zeros((2, n), bool)
    for k, (ids, logits, drawn, kept) in enumerate(seen):
        ratio = (k + 1) / steps
        n_mask = max(1, min((~known[0]).sum() - 1, math.floor(n * math.cos(math.pi / 2 * ratio))))
        for b in range(2):
            x = logits[b].double().numpy()
            log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
            confidence = log_p[np.arange(n), drawn[b]] - temperature * (1 - ratio) * np.log(noise[k][b].numpy())
            confidence[known[b]] = np.inf
            known[b] = True
            known[b, sorted(range(n), key=lambda i: confidence[i])[:n_mask]] = k + 1 == steps
        assert (kept.numpy() == known).all(), f"step {k}"
    assert torch.equal(out, seen[-1][2])


@pytest.mark.parametrize("n, steps, start, end", [
    (256, 36, [1, 1, 1, 1, 3, 2, 3, 4], [11, 11]), (256, 12, [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33], []),
    (64, 12, [1, 2, 2, 4, 5, 5, 7, 6, 8, 8, 8, 8], []), (16, 1, [16], []), (4, 6, [1, 1, 1, 0, 0, 1], [])])
def test_reveal_counts(n, steps, start, end):
    """The cosine schedule, worked out by hand. Traps: a linear one; a mask left over; too many steps for the tokens."""
    _, seen = trace(lambda ids, step: torch.randn(*ids.shape, 3, generator=generator(step)), n, 3, steps)
    known = torch.stack([torch.zeros(2, n, dtype=torch.bool), *(kept for *_, kept in seen)]).sum(-1).diff(dim=0)
    for counts in known.T.tolist():
        assert counts[:len(start)] == start and counts[len(counts) - len(end):] == end and sum(counts) == n


@pytest.mark.parametrize("temperature", [0.0, 4.5])
def test_each_token_is_fixed_once_and_for_good(temperature):
    """Traps: a known token drawn afresh; G shown tokens that were masked again; [MASK] in the result."""
    out, seen = trace(table(N), temperature=temperature)
    before = torch.zeros(2, N, dtype=torch.bool)
    tokens = torch.full((2, N), MASK)
    for ids, _, drawn, kept in seen:
        assert torch.equal(ids, tokens)                                      # what G saw: the kept ones and [MASK]
        assert (kept | ~before).all() and torch.equal(drawn[before], tokens[before])
        tokens, before = torch.where(kept, drawn, MASK), kept
    assert torch.equal(out, tokens) and 0 <= out.min() and out.max() < V


def test_tokens_are_drawn_without_temperature():
    """Trap: 4.5 also flattens the tokens' own softmax, as zideliu's StyleDrop does."""
    p = torch.tensor([0.8, 0.15, 0.05])
    _, seen = trace(lambda ids, step: p.log().expand(*ids.shape, 3), 2000, 3, steps=3, temperature=4.5)
    first = torch.bincount(seen[0][2].flatten(), minlength=3) / 4000
    assert torch.allclose(first, p, atol=0.025)


def test_temperature_is_chance_in_the_order():
    """Trap: the noise is drawn but does nothing. At 0 the order is that of confidence alone."""
    surer = torch.linspace(1, 9, N)[:, None] * F.one_hot(torch.tensor(0), V)                     # (N, V)

    def first(temperature, seed):
        _, seen = trace(lambda ids, step: surer[None], steps=N, temperature=temperature, seed=seed, batch=1)
        return int(seen[0][3].nonzero()[0, 1])
    assert min(first(0.0, s) for s in range(12)) > N // 2 and len({first(50.0, s) for s in range(12)}) > 4


def test_confidence_is_a_log_probability():
    """A constant added to a position's logits is nothing to its softmax. Trap: raw logits, ranked across positions."""
    shift = torch.randn(N, 1, generator=generator(5)) * 20
    plain, shifted = (trace(lambda ids, step: table(N)(ids, step) + s)[0] for s in (0, shift))
    assert torch.equal(plain, shifted)


def test_decode_hangs_on_its_generator_alone():
    """Trap: a second source of chance (global torch, numpy) that the seed does not reach."""
    def run(seed, other):
        torch.manual_seed(other), np.random.seed(other)
        return trace(table(N), seed=seed)[0]
    assert torch.equal(run(1, 2), run(1, 3)) and not torch.equal(run(1, 2), run(2, 2))
    assert not torch.equal(*run(1, 2))                                       # nor are two pictures of a batch the same


def test_small_preset_fits_together(monkeypatch):
    """`--preset small`: 256 px, 16 x 16 tokens, about 100 M parameters in G; its three parts agree."""
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())        # it does not know the meta device
    with torch.device("meta"):
        E, T, G = (model(preset["small"]) for model, preset in
                   ((vqgan.VQGAN, vqgan.PRESETS), (lambda c: clip_feedback.CLIP(c, None), clip_feedback.PRESETS), (Muse, PRESETS)))
        ids = torch.zeros(2, 256, dtype=torch.long)
        logits = G(ids, torch.zeros(2, 48, T.config.text_width), torch.ones(2, 48, dtype=torch.bool))
        assert E.decode(ids.view(2, 16, 16)).shape == (2, 3, 256, 256)
    assert logits.shape == (2, 256, E.config.codebook_size)
    assert 90e6 < sum(p.numel() for p in G.parameters()) < 110e6 and E.config.factor == 16


def test_tokens_start_where_their_codes_lie():
    """Cosines of the embeddings are those of the codes, their size the initial one; [MASK] is left alone."""
    muse = Muse(TOY)
    mask, codes = muse.token.weight[-1].clone(), F.normalize(torch.randn(V, 8, generator=generator()), dim=1)
    muse.start_from(codes, torch.randn(99, TOY.text_width, generator=generator()))
    rows = muse.token.weight.detach()
    torch.testing.assert_close(F.normalize(rows[:-1], dim=1) @ F.normalize(rows[:-1], dim=1).T, codes @ codes.T)
    torch.testing.assert_close(rows[:-1].square().mean().sqrt(), torch.tensor(0.02))
    assert torch.equal(rows[-1], mask)


def test_text_starts_white():
    """Trap: states whose spread lies in a few directions make names alike to G. All directions count alike at first."""
    muse, d = Muse(TOY), TOY.text_width
    spread = torch.logspace(1, -1, d) * torch.randn(4000, d, generator=generator()) + 7
    muse.start_from(torch.randn(V, 8), spread)
    white = muse.text(spread).detach()
    assert white.mean(0).abs().max() < 1e-2
    assert torch.linalg.cond(torch.cov(spread.T)) > 1e3 and torch.linalg.cond(torch.cov(white.T)) < 5


def test_text_of_one_caption_starts_finite():
    """A user's folder may hold one caption: two states span one direction."""
    muse = Muse(TOY)
    muse.start_from(torch.randn(V, 8), torch.randn(2, TOY.text_width))
    assert muse.text.weight.isfinite().all() and muse.text.bias.isfinite().all()


def silent(muse):
    """Its blocks add nothing: what is left is what goes in."""
    for block in muse.blocks:
        for layer in (block.attn.out, block.cross.out, block.mlp[2]):
            torch.nn.init.zeros_(layer.weight)
    return muse.eval()


def test_the_sketch_lays_each_text_out_anew():
    """Blocks silenced, all masked: what differs between positions beyond their embedding is the text's own layout."""
    muse = silent(Muse(TOY))
    for weight in (muse.place.weight, muse.keys.weight, muse.sketches):
        torch.nn.init.normal_(weight, generator=generator())
    text, seen = torch.randn(2, 5, TOY.text_width, generator=generator()), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    ids = torch.full((2, N), V)
    logits = muse(ids, text, seen)
    apart = (logits[0] - logits[1]).view(4, 4, -1)[::2, ::2].flatten(0, 1)        # one token of each position
    assert torch.pdist(apart.detach()).min() > 1e-4
    text[1, 3:] = 9                                         # words behind the mask are not read
    assert torch.equal(muse(ids, text, seen), logits)


def captions(n, things, d=TOY.text_width):
    """n captions of 6 states: one word that names the thing, somewhere among words that say nothing, and padding."""
    g = generator()
    words, states = torch.randn(things, d, generator=g), torch.randn(n, 6, d, generator=g)
    thing, place = torch.arange(n) % things, torch.randint(4, (n,), generator=g)
    states[torch.arange(n), place] = words[thing]
    mask = torch.arange(6) < torch.randint(4, 7, (n, 1), generator=g)
    return states * torch.logspace(0, -1, d) + 3, mask, thing


def test_words_find_their_thing():
    """Wherever the naming word stands, whatever else is said. Traps: padding is read; keys forget the whitening or
    the centre of the states; a caption is the average of its words."""
    muse = Muse(TOY)
    states, mask, thing = captions(600, TOY.things)
    assert muse.learn_words(states[:300], mask[:300], thing[:300], generator(), steps=150) > 0.98
    match = loudest_word(muse.keys(states[300:]), mask[300:]).softmax(-1)
    assert (match.argmax(1) == thing[300:]).float().mean() > 0.95 and match.max(1).values.mean() > 0.9
    again = Muse(TOY)
    again.learn_words(states[:300], mask[:300], thing[:300], generator(), steps=150)
    assert torch.equal(again.keys.weight, muse.keys.weight)


def test_loudest_word_equals_a_plain_loop():
    scores, mask = torch.randn(3, 4, 5, generator=generator()), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    expect = [[math.log(sum(math.exp(scores[b, i, t]) for i in range(4) if mask[b, i])) for t in range(5)] for b in range(3)]
    torch.testing.assert_close(loudest_word(scores, mask), torch.tensor(expect))


def test_sketches_are_mean_pictures():
    """Distances between sketches are those between mean pictures where all components are kept, up to one scale; a
    position holds its own square of tokens. Trap: runs of a row instead of squares."""
    muse = Muse(replace(TOY, things=3, sketch=32))
    latents, thing = torch.randn(40, N, 8, generator=generator()), torch.arange(40) % 3
    muse.learn_sketches(latents, thing)
    mean = torch.stack([latents[thing == t].mean(0) for t in range(3)]).view(3, 2, 2, 2, 2, 8)   # row, in it, column, in it
    for row in range(2):
        for col in range(2):
            ours = torch.pdist(muse.sketches[:, 2 * row + col].detach())
            theirs = torch.pdist(mean[:, row, :, col].flatten(1))
            torch.testing.assert_close(ours / ours[0], theirs / theirs[0])


def test_what_is_asked_for_is_laid_out():
    """A caption of thing t brings t's sketch, one between two things a mixture of both and never more than either."""
    muse = Muse(TOY)
    states, mask, thing = captions(300, TOY.things)
    muse.learn_words(states, mask, thing, generator(), steps=150)
    muse.sketches.data.normal_(generator=generator())
    expect = muse.place(muse.sketches)[thing]
    near = (muse.lay_out(states, mask) - expect).abs().mean() / expect.abs().mean()
    assert near < 0.15
    low, high = muse.place(muse.sketches).amin(0), muse.place(muse.sketches).amax(0)
    odd = muse.lay_out(torch.randn(50, 3, TOY.text_width) * 10, torch.ones(50, 3, dtype=torch.bool))
    assert ((odd > low - 1e-4) & (odd < high + 1e-4)).all()
