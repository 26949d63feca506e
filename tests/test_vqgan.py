"""vqgan.py: where gradients may go, the codebook's life and death, losses by plain arithmetic."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import generator, noise_images, toy_vqgan

from pretrain.vqgan import (Discriminator, adaptive_weight, codebook_health, discriminator_loss,
                            psnr, reconstruction_loss, update_codes)
from vqgan import PRESETS, Quantizer

V, D = PRESETS["toy"].codebook_size, PRESETS["toy"].code_width
features = lambda seed=0, b=2: torch.randn(b, D, 4, 4, generator=generator(seed)) * 3
flat = lambda z: F.normalize(z, dim=1).movedim(1, -1).reshape(-1, D)                # (B h w, D)
from_data = lambda codes, z: torch.cdist(codes, flat(z)).min(1).values              # distances


def new_quantizer(preset="toy"):
    q = Quantizer(PRESETS[preset])
    q.codes.copy_(F.normalize(torch.randn(q.codes.shape, generator=generator(7)), dim=1))
    q.sums.copy_(q.codes)
    return q


@pytest.fixture
def quantizer():
    return new_quantizer()


# -- shapes

@pytest.mark.parametrize("height, width", [(16, 16), (8, 24)])
def test_shapes_and_ranges(height, width):
    """Traps: a grid of fixed size, h and w swapped, pixels outside [-1, 1]; strides round down in
    silence, and the image comes back smaller; `factor` counts the widths, not the halvings.
    """
    vqgan, images = toy_vqgan(), noise_images(2)[..., :1, :1].expand(2, 3, height, width)
    vqgan.decoder[-1].weight.data *= 1000
    ids = vqgan.encode(images)
    assert ids.shape == (2, height // 4, width // 4) and ids.dtype == torch.long
    assert 0 <= ids.min() and ids.max() < V
    again = vqgan.decode(ids)
    assert again.shape == images.shape and again.min() == -1 and again.max() == 1
    for odd in (images[..., 2:], images[..., 2:, :]):
        with pytest.raises(ValueError, match="multiples of 4"):
            vqgan.encode(odd)


def test_a_token_knows_its_own_patch_only():
    """And a flat image has one token. Trap: GroupNorm in E; zeros beyond the edge."""
    encoder, images = toy_vqgan().encoder, noise_images(2, 32)
    changed = images.clone()
    changed[..., 20:] = noise_images(2, 32, seed=1)[..., 20:]
    z, other = encoder(images), encoder(changed)             # 4 pixels a token, 3 more at each side
    torch.testing.assert_close(z[..., :4], other[..., :4])
    assert not torch.allclose(z[..., 5:], other[..., 5:], atol=1e-3)
    z = encoder(torch.full((1, 3, 32, 32), 0.7))
    torch.testing.assert_close(z, z[..., :1, :1].expand_as(z))


# -- the quantizer

def test_nearest_code_is_the_nearest_by_distance():
    """Traps: the largest dot product is the nearest code only among codes of one length; autocast
    takes the products in bf16, and training learns other tokens than `encode` gives.
    """
    q = new_quantizer("tiny")
    z = torch.randn(4, q.codes.shape[1], 16, 16, generator=generator())
    nearest = torch.cdist(F.normalize(z, dim=1).movedim(1, -1).flatten(0, 2), q.codes).argmin(1)
    assert torch.equal(q(z)[1].flatten(), nearest)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(q(z)[1].flatten(), nearest)


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


def test_commitment_moves_the_feature_and_never_the_code(quantizer):
    """|z - sg(e)|^2. Trap (VQGAN's beta bug): the weight lands on the codebook's term."""
    z = features().requires_grad_()
    _, ids, loss = quantizer(z)
    e = quantizer.codes[ids].movedim(-1, 1).clone()
    by_hand = (F.normalize(z, dim=1) - e).square().sum(1).mean()
    assert torch.allclose(loss, by_hand)
    assert torch.allclose(*(torch.autograd.grad(x, z)[0] for x in (loss, by_hand)), atol=1e-7)
    assert not list(quantizer.parameters()) and not quantizer.codes.requires_grad


def test_update_equals_a_plain_loop(quantizer):
    """Traps: decay and 1 - decay swapped; no fair share; raw features; codes off the sphere."""
    z = features(b=3)
    ids = quantizer(z)[1]
    decay, fair = quantizer.config.decay, ids.numel() / V
    codes, usage = [], []
    for v in range(V):
        mine = [x for x, i in zip(flat(z), ids.flatten()) if i == v]
        total = decay * quantizer.sums[v] + (1 - decay) * sum(mine, torch.zeros(D)) / fair
        codes.append(total / total.norm())
        usage.append(decay * 1.0 + (1 - decay) * len(mine) / fair)
    update_codes(quantizer, z, ids, generator())
    assert torch.allclose(quantizer.codes, torch.stack(codes), atol=1e-6)
    assert torch.allclose(quantizer.usage, torch.tensor(usage))


def test_first_batch_starts_the_codebook(quantizer):
    """Trap: an all-zero codebook gives every feature to code 0 for ever."""
    quantizer.codes.zero_()
    z = features()
    update_codes(quantizer, z, quantizer(z)[1], generator())
    assert from_data(quantizer.codes, z).max() < 1e-3
    assert len(quantizer(z)[1].unique()) > V // 4


def test_dead_codes_move_onto_the_batch_and_living_ones_do_not(quantizer):
    """Traps: dead codes stay where the codebook began; revival moves codes that are in use."""
    z, alive = features(), new_quantizer()
    ids = quantizer(z)[1]
    dead = torch.bincount(ids.flatten(), minlength=V) == 0
    assert 0 < dead.sum() < V and from_data(quantizer.codes[dead], z).min() > 0.05
    quantizer.usage[dead] = 0.01
    for q in (alive, quantizer):
        update_codes(q, z, ids, generator())
    assert torch.equal(quantizer.codes[~dead], alive.codes[~dead])
    assert from_data(quantizer.codes[dead], z).max() < 1e-3
    assert (quantizer.usage[dead] == 1).all()                # a fair chance before the next verdict


def test_revival_goes_where_the_codebook_serves_worst(quantizer):
    """Trap: uniform draws put new codes where old ones already are."""
    z = quantizer.codes[:16].T.reshape(1, D, 4, 4).clone()           # all but one lie on their code
    z[0, :, 0, 0] = -quantizer.codes[:16].mean(0)
    quantizer.usage[20:] = -1                                        # dead, even if chosen just now
    update_codes(quantizer, z, quantizer(z)[1], generator())
    assert torch.allclose(quantizer.codes[20:], flat(z)[:1].expand(V - 20, D), atol=1e-6)


def test_reconstruction_trains_the_encoder():
    """Trap: a quantizer or a decoder in the way; the first weights must hear from the pixels."""
    vqgan, images = toy_vqgan(), noise_images(2)
    reconstruction_loss(vqgan(images)[0], images).backward()
    assert next(vqgan.encoder.parameters()).grad.abs().sum() > 0


# -- losses and measures

def test_reconstruction_loss_by_hand():
    """Zero at equality; a constant c costs |c| + c^2; stripes of +-1 L1 + L2 + a gradient of 2."""
    x, zero = noise_images(2), torch.zeros(1, 3, 16, 16)
    stripes = zero + torch.tensor([1.0, -1.0]).repeat(8)
    for a, b, loss in ((x, x, 0), (zero, zero + 0.5, 0.75), (zero, stripes, 4),
                       (zero, stripes.mT, 4)):
        assert reconstruction_loss(a, b).item() == pytest.approx(loss)


def test_hinge_loss_equals_a_plain_loop():
    """Traps: real and fake swapped; no hinge, so a perfect discriminator is pushed on for ever."""
    real, fake = (torch.randn(20, generator=generator(i)) * 2 for i in (1, 2))
    by_hand = sum(max(0, 1 - r) / 40 for r in real.tolist())
    by_hand += sum(max(0, 1 + f) / 40 for f in fake.tolist())
    assert discriminator_loss(real, fake).item() == pytest.approx(by_hand)
    assert discriminator_loss(torch.tensor([1.0, 9]), torch.tensor([-1.0, -9])) == 0
    assert Discriminator()(noise_images(2)).shape == (2, 1, 4, 4)                   # patches


def test_adaptive_weight_by_hand():
    """|grad rec| / (|grad gan| + 1e-4). Traps: upside down; a graph that is kept alive."""
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = adaptive_weight(w.square().sum() / 2, 2 * w.sum(), w)     # gradients (3, 4) and (2, 2)
    assert weight.item() == pytest.approx(5 / (8 ** 0.5 + 1e-4), rel=1e-6)
    assert not weight.requires_grad
    assert adaptive_weight(w.sum() * 1e9, w.sum() * 1e-9, w).item() == pytest.approx(1e4)


@pytest.mark.parametrize("ids, share, perplexity", [
    (range(V), 1, V), ([5] * 40, 1 / V, 1), ([0, 1, 2, 3] * 8, 4 / V, 4)])
def test_codebook_health_of_known_distributions(ids, share, perplexity):
    """Trap: codes that nobody chose lower the entropy by a log of zero."""
    found = codebook_health(torch.tensor(ids).view(1, -1), V)
    assert found == pytest.approx((share, perplexity), rel=1e-4)


def test_psnr_by_hand():
    """Traps: a peak of 1 where pixels span 2 (6 dB); dB of the mean error, not the mean dB."""
    x, y = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    y[0], y[1] = 0.2, 0.02
    assert psnr(x, y) == pytest.approx((20 + 40) / 2, abs=1e-3) and math.isfinite(psnr(x, x))
