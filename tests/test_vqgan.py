"""vqgan.py: where gradients may go, the codebook's life and death, losses by plain arithmetic."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import noise_images, toy_vqgan

from vqgan import (PRESETS, VQGAN, Discriminator, Quantizer, adaptive_weight, codebook_health,
                   discriminator_loss, psnr, reconstruction_loss)

V, D = PRESETS["toy"].codebook_size, PRESETS["toy"].code_width
generator = lambda seed=0: torch.Generator().manual_seed(seed)
features = lambda seed=0, b=2, side=4: torch.randn(b, D, side, side, generator=generator(seed)) * 3
flat = lambda z: F.normalize(z, dim=1).movedim(1, -1).reshape(-1, D)                    # (B h w, D)


@pytest.fixture
def vqgan():
    return toy_vqgan()


@pytest.fixture
def quantizer():
    q = Quantizer(PRESETS["toy"])
    q.codes.copy_(F.normalize(torch.randn(V, D, generator=generator(7)), dim=1))
    q.sums.copy_(q.codes)
    return q


# -- shapes

@pytest.mark.parametrize("height, width", [(16, 16), (8, 24), (20, 12)])
def test_shapes_and_ranges(vqgan, height, width):
    """Traps: a grid of fixed size, h and w swapped, pixels outside [-1, 1]."""
    vqgan.decoder[-1].weight.data *= 1000
    ids = vqgan.encode(noise_images(2)[..., :1, :1].expand(2, 3, height, width))
    assert ids.shape == (2, height // 4, width // 4) and ids.dtype == torch.long
    assert 0 <= ids.min() and ids.max() < V
    images = vqgan.decode(ids)
    assert images.shape == (2, 3, height, width) and images.min() == -1 and images.max() == 1


@pytest.mark.parametrize("height, width", [(18, 16), (16, 18), (3, 4)])
def test_sides_that_no_token_fills_are_refused(vqgan, height, width):
    """Trap: strides round down in silence, and the picture comes back smaller."""
    with pytest.raises(ValueError, match="multiples of 4"):
        vqgan.encode(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("name", ["toy", "tiny", "small", "paper"])
def test_token_grid_is_resolution_over_factor(name):
    """Trap: `factor` counts the widths, not the halvings between them."""
    with torch.device("meta"):
        config = PRESETS[name]
        side = config.resolution
        assert VQGAN(config).encoder(torch.empty(1, 3, side,
                                                 side)).shape[-1] == side // config.factor


# -- the quantizer

def test_nearest_code_is_the_nearest_by_distance(quantizer):
    """Trap: the largest dot product is the nearest code only among codes of one length."""
    z = features()
    assert torch.equal(quantizer(z)[1].flatten(), torch.cdist(flat(z), quantizer.codes).argmin(1))


def test_straight_through(quantizer):
    """z_q holds the codes themselves, and its gradient goes to z as if quantization were not there.

    Trap: argmax lets nothing through, and the encoder never learns from the reconstruction.
    """
    z, w = features().requires_grad_(), features(1)
    z_q, ids, _ = quantizer(z)
    assert torch.allclose(z_q, quantizer.lookup(ids), atol=1e-6)
    ours, = torch.autograd.grad((z_q * w).sum(), z)
    plain, = torch.autograd.grad((F.normalize(z, dim=1) * w).sum(), z)
    assert torch.allclose(ours, plain, atol=1e-6) and plain.abs().max() > 0.01


def test_commitment_pulls_the_feature_and_never_the_code(quantizer):
    """|z - sg(e)|^2.

    Trap (VQGAN's beta bug): the weight lands on the codebook's term and z is left alone.
    """
    z = features().requires_grad_()
    _, ids, loss = quantizer(z)
    e = quantizer.codes[ids].movedim(-1, 1).clone()
    by_hand = (F.normalize(z, dim=1) - e).square().sum(1).mean()
    assert torch.allclose(loss, by_hand)
    assert torch.allclose(*(torch.autograd.grad(x, z)[0] for x in (loss, by_hand)), atol=1e-7)
    assert not list(quantizer.parameters()) and not quantizer.codes.requires_grad


def test_update_equals_a_plain_loop(quantizer):
    """Traps: decay and 1 - decay swapped; counts without their fair share; raw features;
    codes off the sphere.
    """
    z = features(b=3)
    ids = quantizer(z)[1]
    decay, fair = quantizer.config.decay, ids.numel() / V
    codes, usage = [], []
    for v in range(V):
        mine = [x for x, i in zip(flat(z), ids.flatten()) if i == v]
        total = decay * quantizer.sums[v] + (1 - decay) * sum(mine, torch.zeros(D)) / fair
        codes.append(total / total.norm())
        usage.append(decay * 1.0 + (1 - decay) * len(mine) / fair)
    quantizer.update(z, ids, generator())
    assert torch.allclose(quantizer.codes, torch.stack(codes), atol=1e-6)
    assert torch.allclose(quantizer.usage, torch.tensor(usage))


def test_first_batch_starts_the_codebook(quantizer):
    """Trap: an all-zero codebook gives every feature to code 0 for ever."""
    quantizer.codes.zero_()
    z = features()
    quantizer.update(z, quantizer(z)[1], generator())
    assert torch.cdist(quantizer.codes, flat(z)).min(1).values.max() < 1e-3
    assert len(quantizer(z)[1].unique()) > V // 4


def test_dead_codes_move_onto_the_batch_and_living_ones_do_not(quantizer):
    """Traps: dead codes never come back; revival also moves codes that are in use."""
    z = features()
    ids = quantizer(z)[1]
    dead = torch.ones(V, dtype=torch.bool)
    dead[ids.unique()] = False
    assert 0 < dead.sum() < V
    codes, sums, usage = quantizer.codes.clone(), quantizer.sums.clone(), quantizer.usage.clone()
    quantizer.update(z, ids, generator())
    unrevived = quantizer.codes.clone()
    quantizer.codes.copy_(codes), quantizer.sums.copy_(sums), quantizer.usage.copy_(
        usage.masked_fill(dead, 0.01))
    quantizer.update(z, ids, generator())
    assert torch.equal(quantizer.codes[~dead], unrevived[~dead])
    assert torch.cdist(quantizer.codes[dead], flat(z)).min(1).values.max() < 1e-3
    assert torch.cdist(codes[dead], flat(z)).min(1).values.min() > 0.05
    assert (quantizer.usage[dead] == 1).all()                # a fair chance before the next verdict


def test_revival_goes_where_the_codebook_serves_worst(quantizer):
    """Trap: uniform draws put new codes where old ones already are."""
    z = quantizer.codes[:16].T.reshape(1, D, 4, 4).clone()           # all but one lie on their code
    z[0, :, 0, 0] = -quantizer.codes[:16].mean(0)
    quantizer.usage[20:] = -1                                        # dead, even if chosen just now
    quantizer.update(z, quantizer(z)[1], generator())
    assert torch.allclose(quantizer.codes[20:], flat(z)[:1].expand(V - 20, D), atol=1e-6)


def test_every_code_comes_into_use():
    """Features that spread out after the start.

    Without revival, most of the codebook stays where it began.
    """
    q, chance = Quantizer(PRESETS["toy"]), generator()
    centres = torch.randn(64, D, generator=chance)
    for step in range(400):
        z = centres[torch.randint(64,
                                  (64, ), generator=chance)] if step else centres[:1].repeat(64, 1)
        z = (z + 0.1 * torch.randn(64, D, generator=chance)).view(4, 4, 4, D).movedim(-1, 1)
        q.update(z, q(z)[1], chance)
    assert codebook_health(q(centres.view(1, 8, 8, D).movedim(-1, 1))[1], V)[0] > 0.8


def test_reconstruction_teaches_the_encoder(vqgan):
    """Trap: a quantizer or a decoder in the way; every weight must hear from the pixels alone."""
    images = noise_images(2)
    reconstruction_loss(vqgan(images)[0], images).backward()
    for name, p in vqgan.named_parameters():
        # behind the zero of an identity block
        silent = "conv1" in name or "norm" in name and "encoder.7" not in name
        assert p.grad is not None and (silent or p.grad.abs().sum() > 0), name


# -- losses

def test_reconstruction_loss_by_hand():
    """Zero at equality; a constant c costs |c| + c^2;
    stripes of +-1 cost L1 + L2 + one gradient of 2.
    """
    x = noise_images(2)
    zero = torch.zeros(1, 3, 16, 16)
    stripes = zero + torch.tensor([1.0, -1.0]).repeat(8)
    assert reconstruction_loss(x, x) == 0
    assert reconstruction_loss(zero, zero + 0.5).item() == pytest.approx(0.75)
    assert reconstruction_loss(zero, stripes).item() == pytest.approx(4)
    assert reconstruction_loss(zero, stripes.mT).item() == pytest.approx(4)


def test_hinge_loss_equals_a_plain_loop():
    """Traps: real and fake swapped; no hinge, so a perfect discriminator is pushed on for ever."""
    real, fake = torch.randn(20, generator=generator(1)) * 2, torch.randn(
        20, generator=generator(2)) * 2
    by_hand = sum(max(0, 1 - r)
                  for r in real.tolist()) / 20 + sum(max(0, 1 + f) for f in fake.tolist()) / 20
    assert discriminator_loss(real, fake).item() == pytest.approx(by_hand / 2)
    assert discriminator_loss(torch.tensor([1.0, 9]), torch.tensor([-1.0, -9])) == 0


def test_adaptive_weight_by_hand():
    """lambda = |grad rec| / (|grad gan| + 1e-4) at one layer.

    Traps: upside down; a graph that is kept alive.
    """
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = adaptive_weight(w.square().sum() / 2, 2 * w.sum(), w)     # gradients (3, 4) and (2, 2)
    assert weight.item() == pytest.approx(5 / (8 ** 0.5 + 1e-4), rel=1e-6)
    assert not weight.requires_grad
    assert adaptive_weight(w.sum() * 1e9, w.sum() * 1e-9, w).item() == pytest.approx(1e4)


def test_discriminator_judges_patches():
    assert Discriminator()(noise_images(2)).shape == (2, 1, 4, 4)


# -- health

@pytest.mark.parametrize("ids, share, perplexity", [
    (range(V), 1, V), ([5] * 40, 1 / V, 1), ([0, 1, 2, 3] * 8, 4 / V, 4)])
def test_codebook_health_of_known_distributions(ids, share, perplexity):
    """Trap: codes that nobody chose lower the entropy by a log of zero."""
    assert codebook_health(torch.tensor(ids).view(1, -1), V) == pytest.approx((share, perplexity),
                                                                              rel=1e-4)


def test_nearest_code_in_full_precision():
    """Trap: autocast takes the products in bf16,
    and training learns other tokens than `encode` gives.
    """
    q = Quantizer(PRESETS["tiny"])
    q.codes.copy_(
        F.normalize(torch.randn(q.codes.shape, generator=torch.Generator().manual_seed(0)), dim=1))
    z = torch.randn(4, q.codes.shape[1], 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        ids = q(z)[1]
    assert torch.equal(ids, q(z)[1])


def test_psnr_by_hand():
    """Traps: a peak of 1 where pixels span 2 (6 dB);
    dB of the mean error instead of the mean dB.
    """
    x, y = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    y[0], y[1] = 0.2, 0.02
    assert psnr(x, y) == pytest.approx((20 + 40) / 2, abs=1e-3)
    assert math.isfinite(psnr(x, x))


def test_a_token_knows_its_own_patch_only(vqgan):
    """What stands elsewhere changes no token, and a flat picture has one.

    Trap: GroupNorm in E; zeros beyond the edge.
    """
    images = noise_images(2, 32)
    changed = images.clone()
    changed[..., 20:] = noise_images(2, 32, seed=1)[..., 20:]
    # 4 pixels a token, 3 more on each side
    z, other = vqgan.encoder(images), vqgan.encoder(changed)
    torch.testing.assert_close(z[..., :4], other[..., :4])
    assert not torch.allclose(z[..., 5:], other[..., 5:], atol=1e-3)
    flat = vqgan.encoder(torch.full((1, 3, 32, 32), 0.7))
    torch.testing.assert_close(flat, flat[..., :1, :1].expand_as(flat))
