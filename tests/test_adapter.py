"""adapter.py: Figure S1 by hand, Table S3's counts, and where in the block an adapter sits."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import generator, shake, toy_muse

from adapter import PLACEMENTS, Adapter, AdapterGenerator, apply_adapter
from muse import PRESETS, SUPERRES, Block

TOY = PRESETS["toy"]
L, D, H = 3, TOY.width, 4
draw = lambda *shape, seed=0: torch.randn(*shape, generator=generator(seed))
sharing = pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "unshared"])


@pytest.fixture(scope="module")
def base():
    """G with everything but the adapters set: adapters -> logits of two images."""
    muse, text = toy_muse(layers=L), draw(2, 5, TOY.text_width)
    ids = torch.randint(TOY.codebook_size + 1, (2, TOY.tokens), generator=generator())
    return lambda adapters=None: muse(ids, text, torch.ones(2, 5).bool(), adapters)


def test_apply_adapter_equals_a_hand_loop():
    """h + gelu(h W_d) W_u. Traps: torch's erf gelu; a lost residual; transposed weights."""
    h, wd, wu = draw(1, 2, 3), draw(3, 2, seed=1), draw(2, 3, seed=2)
    gelu = lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
    for p in range(2):
        middle = [gelu(sum(h[0, p, i].item() * wd[i, j].item() for i in range(3)))
                  for j in range(2)]
        for i in range(3):
            by_hand = h[0, p, i].item() + sum(middle[j] * wu[j, i].item() for j in range(2))
            assert apply_adapter(h, wd, wu)[0, p, i].item() == pytest.approx(by_hand, abs=1e-5)
    x, one = torch.full((1, 1, 1), 2.2), torch.ones(1, 1)             # where the two gelus differ
    assert apply_adapter(x, one, one).item() == pytest.approx(2.2 + gelu(2.2), abs=1e-6)


@pytest.mark.parametrize("d_emb, d_prj, is_shared, count", [
    (2048, 4, True, 229_760), (2048, 32, False, 12_582_912), (1024, 32, False, 6_291_456)])
def test_table_s3(d_emb, d_prj, is_shared, count):
    """0.23, 12.6, 6.3 M at 48 layers. Traps: biases, norms, a third placement, one table."""
    with torch.device("meta"):
        assert sum(p.numel() for p in Adapter(d_emb, d_prj, 48, is_shared).parameters()) == count


def test_shared_weights_are_one_matrix_and_an_offset():
    """W_d[l] = W_d0 + 1 d_l, and W_u so. Trap: the offset multiplies, or has the other axis."""
    g = shake(AdapterGenerator(5, 2, L, True), 1.0)
    wd, wu = g()
    for l, i, j in ((l, i, j) for l in range(L) for i in range(5) for j in range(2)):
        assert wd[l, i, j] == g.down[i, j] + g.depth_down[l, j]
        assert wu[l, j, i] == g.up[j, i] + g.depth_up[l, i]


@sharing
def test_initial_weights(is_shared):
    """Up weights zero, down weights of sd 0.02, cut at two sd (B.1.1), the same for the same seed.
    Trap: torch's trunc_normal_ cuts at -2 and 2 by default, which at sd 0.02 cuts nothing.
    """
    make = lambda seed: Adapter(256, 32, 8, is_shared, generator(seed)).state_dict()
    for name, p in make(0).items():
        if "up" in name:
            assert not p.any()
        else:                                               # a normal cut at two sd has sd 0.88
            assert p.std().item() == pytest.approx(0.0176, rel=0.12) and p.abs().max() <= 0.04
            assert torch.equal(p, make(0)[name]) and not torch.equal(p, make(1)[name])
    assert not torch.equal(make(0)["generators.mlp.down"], make(0)["generators.cross.down"])


@sharing
def test_a_fresh_adapter_changes_nothing(base, is_shared):
    """Bit by bit. Trap: a random up-projection, and tuning starts from a damaged base."""
    assert torch.equal(base(Adapter(D, H, L, is_shared, generator())()), base())


@sharing
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("layer", range(L))
@pytest.mark.parametrize("part", ["down", "up"])
def test_no_row_is_dead(base, is_shared, layer, placement, part):
    """Each layer's own row, down and up, moves the logits and gets a gradient, up from step one.
    Trap (zideliu): the layer index stands still, and half of the rows are never read.
    """
    for fresh in (True, False):
        adapter = Adapter(D, H, L, is_shared, generator())
        before = base((adapter if fresh else shake(adapter, 0.3))())
        before.square().sum().backward()
        row = getattr(adapter.generators[placement], "depth_" * is_shared + part)
        blocked = fresh and part == "down"                  # W_u = 0 keeps the gradient from W_d
        assert (row.grad[layer].abs().sum() > 0) == (not blocked)
    with torch.no_grad():
        row[layer] = row[layer].flip(-1)
    assert (base(adapter()) - before).abs().max() > 1e-4


@pytest.mark.parametrize("cross", [True, False])
def test_adapters_work_on_the_sub_layer_before_its_skip(cross):
    """x + A(sublayer(norm(x))), after cross-attention (or else self-attention) and the MLP. Traps:
    A(x + sublayer); one after each attention; half of the second stage has none.
    """
    block = shake(Block(D, 2, cross=cross), 0.2).requires_grad_(False)
    adapter = shake(Adapter(D, H, 1, True), 0.3).requires_grad_(False)
    weights = {p: [w[0] for w in adapter.generators[p]()] for p in PLACEMENTS}
    adapt = lambda h, p: h + F.gelu(h @ weights[p][0], approximate="tanh") @ weights[p][1]
    x, text = draw(2, 4, D, seed=1), draw(2, 5, D, seed=2)
    h = block.norm1(x)
    h = block.attn(h, h)
    y = x + (h if cross else adapt(h, "cross"))
    if cross:
        y = y + adapt(block.cross(block.norm2(y), text), "cross")
    y = y + adapt(block.mlp(block.norm3(y)), "mlp")
    found = block(x, None, text, None, adapter())
    assert torch.allclose(found, y, atol=1e-5)
    assert not torch.allclose(block(x, None, text), y, atol=0.1)


def test_layers_of_the_second_stage_are_counted_through():
    """Those over the low tokens first. Trap: both start at 0, and share rows."""
    muse, calls = toy_muse(presets=SUPERRES, low_layers=2), []
    note = lambda h, layer, site: calls.append((layer, site)) or h
    c, ids = muse.config, torch.zeros(1, 64, dtype=torch.long)
    muse(ids, torch.zeros(1, 5, c.text_width), torch.ones(1, 5).bool(), note, ids[:, :16])
    assert calls == [(layer, site) for layer in range(c.depth) for site in PLACEMENTS]
