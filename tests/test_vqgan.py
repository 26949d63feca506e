"""vqgan.py: where gradients may go, how codes live and die, losses by plain arithmetic."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import generator, noise_images, seeded, toy_vqgan

from pretrain.vqgan import (Discriminator, adaptive_weight, codebook_health, discriminator_loss,
                            psnr, reconstruction_loss, update_codes)
from vqgan import PRESETS, Quantizer

V = PRESETS["toy"].codebook_size
D = PRESETS["toy"].code_width


def random_features(seed=0, batch=2):
    """Features (batch, D, 4, 4), not of length 1."""
    return torch.randn(batch, D, 4, 4, generator=generator(seed)) * 3


def unit_rows(z):
    """Features (B, D, h, w) -> (B h w, D), of length 1."""
    return F.normalize(z, dim=1).movedim(1, -1).reshape(-1, z.shape[1])


def distance_to_features(codes, z):
    """The distance of each code to the nearest feature."""
    return torch.cdist(codes, unit_rows(z)).min(1).values


def new_quantizer(preset="toy"):
    quantizer = Quantizer(PRESETS[preset])
    codes = torch.randn(quantizer.codes.shape, generator=generator(7))
    quantizer.codes.copy_(F.normalize(codes, dim=1))
    quantizer.sums.copy_(quantizer.codes)
    return quantizer


@pytest.fixture
def quantizer():
    return new_quantizer()


# -- encoder and decoder

@pytest.mark.parametrize("height, width", [(16, 16), (8, 24)])
def test_shapes_and_ranges(height, width):
    """Traps: a grid of fixed size; height and width swapped; pixels outside [-1, 1]."""
    vqgan = toy_vqgan()
    vqgan.decoder[-1].weight.data *= 1000
    images = noise_images(2)[..., :1, :1].expand(2, 3, height, width)
    ids = vqgan.encode(images)
    assert ids.shape == (2, height // 4, width // 4)
    assert ids.dtype == torch.long
    assert ids.min() >= 0 and ids.max() < V
    decoded = vqgan.decode(ids)
    assert decoded.shape == images.shape
    assert decoded.min() == -1 and decoded.max() == 1


@pytest.mark.parametrize("height, width", [(16, 14), (14, 16)])
def test_sides_that_are_no_multiples_are_refused(height, width):
    """Trap: strides round down in silence, and the image becomes smaller."""
    with pytest.raises(ValueError, match="multiples of 4"):
        toy_vqgan().encode(torch.zeros(1, 3, height, width))


def test_a_token_knows_its_own_patch_alone():
    """A token covers 4 pixels and sees 3 more on each side. Trap: GroupNorm in the encoder."""
    encoder = toy_vqgan().encoder
    images = noise_images(2, 32)
    changed = images.clone()
    changed[..., 20:] = noise_images(2, 32, seed=1)[..., 20:]
    before, after = encoder(images), encoder(changed)
    torch.testing.assert_close(before[..., :4], after[..., :4])
    assert not torch.allclose(before[..., 5:], after[..., 5:], atol=1e-3)


def test_a_flat_image_has_one_token():
    """Trap: zeros beyond the edge."""
    z = toy_vqgan().encoder(torch.full((1, 3, 32, 32), 0.7))
    torch.testing.assert_close(z, z[..., :1, :1].expand_as(z))


# -- the quantizer

def test_nearest_code_is_the_nearest_by_distance():
    """Trap: the largest dot product is the nearest code only among codes of one length."""
    quantizer = new_quantizer("tiny")
    z = torch.randn(4, quantizer.codes.shape[1], 16, 16, generator=generator())
    _, ids, _ = quantizer(z)
    nearest = torch.cdist(unit_rows(z), quantizer.codes).argmin(1)
    assert torch.equal(ids.flatten(), nearest)


def test_tokens_are_the_same_under_autocast():
    """Trap: with products in bf16, training learns other tokens than `encode` returns."""
    quantizer = new_quantizer("tiny")
    z = torch.randn(4, quantizer.codes.shape[1], 16, 16, generator=generator())
    _, ids, _ = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        _, again, _ = quantizer(z)
    assert torch.equal(ids, again)


def test_straight_through(quantizer):
    """z_q holds the codes, and its gradient goes to z as if nothing had been quantized.

    Trap: argmax lets nothing through, and the encoder never learns from the reconstruction.
    """
    z = random_features().requires_grad_()
    weights = random_features(1)
    z_q, ids, _ = quantizer(z)
    torch.testing.assert_close(z_q, quantizer.lookup(ids), atol=1e-6, rtol=0)
    found, = torch.autograd.grad((z_q * weights).sum(), z)
    expected, = torch.autograd.grad((F.normalize(z, dim=1) * weights).sum(), z)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert expected.abs().max() > 0.01


def test_commitment_moves_the_feature_and_never_the_code(quantizer):
    """|z - sg(e)|^2. Trap (VQGAN's beta bug): the weight lands on the codebook's term."""
    z = random_features().requires_grad_()
    _, ids, commitment = quantizer(z)
    codes = quantizer.codes[ids].movedim(-1, 1).clone()
    by_hand = (F.normalize(z, dim=1) - codes).square().sum(1).mean()
    assert commitment.item() == pytest.approx(by_hand.item())
    found, = torch.autograd.grad(commitment, z)
    expected, = torch.autograd.grad(by_hand, z)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
    assert not list(quantizer.parameters())
    assert not quantizer.codes.requires_grad


def test_update_equals_a_loop(quantizer):
    """Traps: decay and 1 - decay swapped; no fair share; raw features; codes off the sphere."""
    z = random_features(batch=3)
    _, ids, _ = quantizer(z)
    ids = ids.flatten()
    decay = quantizer.config.decay
    fair_share = len(ids) / V
    codes, usage = [], []
    for v in range(V):
        mine = unit_rows(z)[ids == v]
        total = decay * quantizer.sums[v] + (1 - decay) * mine.sum(0) / fair_share
        codes.append(total / total.norm())
        usage.append(decay * 1.0 + (1 - decay) * len(mine) / fair_share)
    update_codes(quantizer, z, ids.view(3, 4, 4), generator())
    torch.testing.assert_close(quantizer.codes, torch.stack(codes), atol=1e-6, rtol=0)
    torch.testing.assert_close(quantizer.usage, torch.tensor(usage))


def test_first_batch_starts_the_codebook(quantizer):
    """Trap: a codebook of zeros assigns every feature to code 0 and never changes."""
    quantizer.codes.zero_()
    z = random_features()
    _, ids, _ = quantizer(z)
    update_codes(quantizer, z, ids, generator())
    assert distance_to_features(quantizer.codes, z).max() < 1e-3
    _, ids, _ = quantizer(z)
    assert len(ids.unique()) > V // 4


def test_dead_codes_move_onto_the_batch_and_others_do_not(quantizer):
    """Traps: dead codes stay where they are; revival moves codes that are in use."""
    z = random_features()
    _, ids, _ = quantizer(z)
    is_dead = torch.bincount(ids.flatten(), minlength=V) == 0
    assert 0 < is_dead.sum() < V
    assert distance_to_features(quantizer.codes[is_dead], z).min() > 0.05
    without_revival = new_quantizer()
    update_codes(without_revival, z, ids, generator())
    quantizer.usage[is_dead] = 0.01
    update_codes(quantizer, z, ids, generator())
    assert torch.equal(quantizer.codes[~is_dead], without_revival.codes[~is_dead])
    assert distance_to_features(quantizer.codes[is_dead], z).max() < 1e-3
    assert (quantizer.usage[is_dead] == 1).all()             # a fair chance before the next verdict


def test_revival_chooses_what_the_codebook_serves_worst(quantizer):
    """Trap: uniform choice puts new codes where old ones already are."""
    z = quantizer.codes[:16].T.reshape(1, D, 4, 4).clone()   # all but one lie on their code
    z[0, :, 0, 0] = -quantizer.codes[:16].mean(0)
    quantizer.usage[20:] = -1                                # dead, even if chosen just now
    _, ids, _ = quantizer(z)
    update_codes(quantizer, z, ids, generator())
    worst = unit_rows(z)[:1]
    torch.testing.assert_close(quantizer.codes[20:], worst.expand(V - 20, D), atol=1e-6, rtol=0)


def test_reconstruction_trains_the_encoder():
    """Trap: a quantizer or a decoder that no gradient passes."""
    vqgan = toy_vqgan()
    images = noise_images(2)
    reconstruction, *_ = vqgan(images)
    reconstruction_loss(reconstruction, images).backward()
    assert next(vqgan.encoder.parameters()).grad.abs().sum() > 0


# -- losses and measures

ZERO = torch.zeros(1, 3, 16, 16)
STRIPES = ZERO + torch.tensor([1.0, -1.0]).repeat(8)


@pytest.mark.parametrize("x, y, loss", [
    (noise_images(2), noise_images(2), 0), (ZERO, ZERO + 0.5, 0.75), (ZERO, STRIPES, 4),
    (ZERO, STRIPES.mT, 4)], ids=["equal", "constant", "columns", "rows"])
def test_reconstruction_loss_by_hand(x, y, loss):
    """A constant c costs |c| + c^2; stripes of -1 and 1 cost 1 + 1, and 2 for their gradient."""
    assert reconstruction_loss(x, y).item() == pytest.approx(loss)


def test_hinge_loss_equals_a_loop():
    """Traps: real and fake swapped; without the hinge, a perfect discriminator never rests."""
    real = torch.randn(20, generator=generator(1)) * 2
    fake = torch.randn(20, generator=generator(2)) * 2
    by_hand = 0.0
    for logit in real.tolist():
        by_hand += max(0, 1 - logit) / 40
    for logit in fake.tolist():
        by_hand += max(0, 1 + logit) / 40
    assert discriminator_loss(real, fake).item() == pytest.approx(by_hand)
    assert discriminator_loss(torch.tensor([1.0, 9.0]), torch.tensor([-1.0, -9.0])) == 0


def test_the_discriminator_judges_patches():
    critic = seeded(Discriminator)
    assert critic(noise_images(2)).shape == (2, 1, 4, 4)


def test_adaptive_weight_by_hand():
    """|grad rec| / (|grad gan| + 1e-4), at most 1e4. Traps: upside down; a graph kept alive."""
    weights = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction = weights.square().sum() / 2              # its gradient is (3, 4)
    adversarial = 2 * weights.sum()                          # (2, 2)
    ratio = adaptive_weight(reconstruction, adversarial, weights)
    assert ratio.item() == pytest.approx(5 / (8 ** 0.5 + 1e-4), rel=1e-6)
    assert not ratio.requires_grad
    ratio = adaptive_weight(weights.sum() * 1e9, weights.sum() * 1e-9, weights)
    assert ratio.item() == pytest.approx(1e4)


@pytest.mark.parametrize("ids, share, perplexity", [
    (range(V), 1, V), ([5] * 40, 1 / V, 1), ([0, 1, 2, 3] * 8, 4 / V, 4)])
def test_codebook_health_of_known_distributions(ids, share, perplexity):
    """Trap: codes that are not used add the logarithm of zero to the entropy."""
    found = codebook_health(torch.tensor(ids).view(1, -1), V)
    assert found == pytest.approx((share, perplexity), rel=1e-4)


def test_psnr_by_hand():
    """Traps: a peak of 1 where pixels span 2 (6 dB); dB of the mean error, not the mean of dB."""
    x = torch.zeros(2, 3, 8, 8)
    y = torch.zeros(2, 3, 8, 8)
    y[0] = 0.2                                               # 20 dB
    y[1] = 0.02                                              # 40 dB
    assert psnr(x, y) == pytest.approx(30, abs=1e-3)
    assert math.isfinite(psnr(x, x))
