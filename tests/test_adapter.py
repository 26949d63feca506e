"""adapter.py: Figure S1 by hand, the counts of Table S3, and where in a block an adapter works."""

import math

import pytest
import torch
from conftest import generator, randomise, toy_muse

from adapter import PLACEMENTS, Adapter, AdapterGenerator, apply_adapter
from muse import PRESETS, SUPERRES, Block

TOY = PRESETS["toy"]
LAYERS = 3
D = TOY.width
H = 4
both_kinds = pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "unshared"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def tanh_gelu(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


@pytest.fixture(scope="module")
def base():
    """base(adapters) -> the logits of two images, of which only the adapters can change."""
    muse = toy_muse(layers=LAYERS)
    text = normal(2, 5, TOY.text_width)
    text_mask = torch.ones(2, 5, dtype=torch.bool)
    ids = torch.randint(TOY.codebook_size + 1, (2, TOY.tokens), generator=generator())

    def logits(adapters=None):
        return muse(ids, text, text_mask, adapters)
    return logits


# -- the formula and its weights

def test_apply_adapter_equals_a_loop():
    """h + gelu(h W_d) W_u. Traps: a lost residual; transposed weights."""
    h, wd, wu = normal(1, 2, 3), normal(3, 2, seed=1), normal(2, 3, seed=2)
    expected = h.clone()
    for p in range(2):
        for j in range(2):
            down = sum(h[0, p, i].item() * wd[i, j].item() for i in range(3))
            for i in range(3):
                expected[0, p, i] += tanh_gelu(down) * wu[j, i].item()
    torch.testing.assert_close(apply_adapter(h, wd, wu), expected)


def test_its_gelu_is_the_tanh_one():
    """Trap: torch's default is the erf one. At 2.2 they differ most."""
    h = torch.full((1, 1, 1), 2.2)
    one = torch.ones(1, 1)
    found = apply_adapter(h, one, one).item()
    assert found == pytest.approx(2.2 + tanh_gelu(2.2), abs=1e-6)


@pytest.mark.parametrize("d_emb, d_prj, is_shared, count", [
    (2048, 4, True, 229_760), (2048, 32, False, 12_582_912), (1024, 32, False, 6_291_456)])
def test_table_s3(d_emb, d_prj, is_shared, count):
    """0.23, 12.6 and 6.3 M at 48 layers. Traps: biases, norms, a third placement, one generator."""
    with torch.device("meta"):
        adapter = Adapter(d_emb, d_prj, 48, is_shared)
    assert sum(p.numel() for p in adapter.parameters()) == count


def test_shared_weights_are_one_matrix_and_an_offset():
    """W_d[l] = W_d0 + 1 d_l, and W_u so too. Trap: the offset multiplies, or has the other axis."""
    weights = randomise(AdapterGenerator(5, 2, LAYERS, True), 1.0)
    wd, wu = weights()
    assert wd.shape == (LAYERS, 5, 2) and wu.shape == (LAYERS, 2, 5)
    for layer in range(LAYERS):
        for i in range(5):
            for j in range(2):
                assert wd[layer, i, j] == weights.down[i, j] + weights.depth_down[layer, j]
                assert wu[layer, j, i] == weights.up[j, i] + weights.depth_up[layer, i]


@both_kinds
def test_initial_weights(is_shared):
    """Weights "up" are zero, weights "down" normal of std 0.02, truncated at two std (B.1.1).

    Trap: torch's trunc_normal_ cuts at -2 and 2 by default, which at std 0.02 cuts nothing. A
    normal that is truncated at two std has 0.88 times its std.
    """
    for name, p in Adapter(256, 32, 8, is_shared, generator()).state_dict().items():
        if "up" in name:
            assert not p.any()
        else:
            assert p.std().item() == pytest.approx(0.0176, rel=0.12)
            assert p.abs().max() <= 0.04


@both_kinds
def test_initial_weights_follow_from_the_generator(is_shared):
    first = Adapter(256, 32, 8, is_shared, generator(0)).state_dict()
    again = Adapter(256, 32, 8, is_shared, generator(0)).state_dict()
    other = Adapter(256, 32, 8, is_shared, generator(1)).state_dict()
    for name in first:
        assert torch.equal(first[name], again[name])
        if "down" in name:
            assert not torch.equal(first[name], other[name])
    assert not torch.equal(first["generators.mlp.down"], first["generators.cross.down"])


# -- inside the base

@both_kinds
def test_a_fresh_adapter_changes_nothing(base, is_shared):
    """Bit by bit. Trap: with a random up-projection, tuning starts from a damaged base."""
    adapter = Adapter(D, H, LAYERS, is_shared, generator())
    assert torch.equal(base(adapter()), base())


def weights_of_layer(adapter, placement, part, is_shared):
    """The parameter whose row `layer` belongs to that layer alone."""
    name = f"depth_{part}" if is_shared else part
    return getattr(adapter.generators[placement], name)


@both_kinds
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("part", ["down", "up"])
def test_every_row_has_an_effect(base, is_shared, layer, placement, part):
    """Each layer's own rows get a gradient and move the logits.

    Trap (zideliu): the layer index stands still, and half of the rows are never read.
    """
    adapter = randomise(Adapter(D, H, LAYERS, is_shared), 0.3)
    weights = weights_of_layer(adapter, placement, part, is_shared)
    before = base(adapter())
    before.square().sum().backward()
    assert weights.grad[layer].abs().sum() > 0
    with torch.no_grad():
        weights[layer] = weights[layer].flip(-1)
    assert (base(adapter()) - before).abs().max() > 1e-4


@both_kinds
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_only_up_weights_learn_in_the_first_step(base, is_shared, placement):
    """W_u = 0 keeps the gradient from W_d, and every row of W_u has one."""
    adapter = Adapter(D, H, LAYERS, is_shared, generator())
    base(adapter()).square().sum().backward()
    up = weights_of_layer(adapter, placement, "up", is_shared)
    down = weights_of_layer(adapter, placement, "down", is_shared)
    assert (up.grad.flatten(1).abs().sum(1) > 0).all()
    assert not down.grad.any()


@pytest.mark.parametrize("has_cross", [True, False])
def test_adapters_work_on_a_sub_layer_before_its_skip(has_cross):
    """x + A(sublayer(norm(x))), after cross-attention (or else self-attention) and after the MLP.

    Traps: A(x + sublayer); an adapter after each attention; none in half of the second stage.
    """
    block = randomise(Block(D, 2, cross=has_cross), 0.2).requires_grad_(False)
    adapter = randomise(Adapter(D, H, 1, True), 0.3).requires_grad_(False)
    x, text = normal(2, 4, D, seed=1), normal(2, 5, D, seed=2)

    def adapt(h, placement):
        wd, wu = adapter.generators[placement]()
        return apply_adapter(h, wd[0], wu[0])

    normed = block.norm1(x)
    attended = block.attn(normed, normed)
    if has_cross:
        expected = x + attended
        expected = expected + adapt(block.cross(block.norm2(expected), text), "cross")
    else:
        expected = x + adapt(attended, "cross")
    expected = expected + adapt(block.mlp(block.norm3(expected)), "mlp")
    torch.testing.assert_close(block(x, None, text, None, adapter()), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(block(x, None, text), expected, atol=0.1)


def test_layers_of_the_second_stage_are_counted_through():
    """Those over the low tokens come first. Trap: both parts start at 0 and share rows."""
    muse = toy_muse(presets=SUPERRES, low_layers=2)
    config = muse.config
    seen = []

    def note(h, layer, placement):
        seen.append((layer, placement))
        return h

    ids = torch.zeros(1, config.tokens, dtype=torch.long)
    low = torch.zeros(1, config.low_grid ** 2, dtype=torch.long)
    text = torch.zeros(1, 5, config.text_width)
    muse(ids, text, torch.ones(1, 5, dtype=torch.bool), note, low)
    expected = []
    for layer in range(config.depth):
        expected += [(layer, "cross"), (layer, "mlp")]
    assert seen == expected
