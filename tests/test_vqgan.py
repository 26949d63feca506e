"""The tokenizer: shapes, the straight-through gradient, the codebook's moving averages, the losses."""

import math

import pytest
import torch
import torch.nn.functional as F

import vqgan as V
from conftest import toy_vqgan


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sides", [(16, 16), (8, 24), (4, 4)])
def test_encode_and_decode(sides):
    vqgan, f = toy_vqgan(), V.PRESETS["toy"].factor
    ids = vqgan.encode(torch.rand(2, 3, *sides) * 2 - 1)
    assert ids.shape == (2, sides[0] // f, sides[1] // f) and ids.min() >= 0 and ids.max() < 32
    images = vqgan.decode(ids)
    assert images.shape == (2, 3, *sides) and images.abs().max() <= 1


def test_sides_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiples of 4"):
        toy_vqgan().encode(torch.zeros(1, 3, 18, 16))


def test_nearest_code_by_brute_force():
    q = toy_vqgan().quantizer
    z = torch.randn(2, 8, 3, 3)
    z_q, ids, _ = q(z)
    unit = F.normalize(z, dim=1).movedim(1, -1).reshape(-1, 8)
    assert torch.equal(ids.flatten(), torch.cdist(unit, q.codes).argmin(1))
    assert torch.allclose(z_q, q.codes[ids].movedim(-1, 1), atol=1e-6)


def test_gradient_passes_straight_through():
    """z_q = z + sg(e - z): what arrives at z_q arrives at the unit feature unchanged."""
    q, z = toy_vqgan().quantizer, torch.randn(1, 8, 2, 2, requires_grad=True)
    upstream = torch.randn(1, 8, 2, 2)
    got, = torch.autograd.grad(q(z)[0], z, upstream)
    want, = torch.autograd.grad(F.normalize(z, dim=1), z, upstream)
    assert torch.allclose(got, want, atol=1e-6)


def test_commitment_pulls_the_feature_not_the_code():
    """The 'beta on the wrong term' trap: the loss has a gradient for z, and the codes take none."""
    q, z = toy_vqgan().quantizer, torch.randn(1, 8, 2, 2, requires_grad=True)
    _, ids, commitment = q(z)
    gradient, = torch.autograd.grad(commitment, z)
    assert gradient.abs().max() > 0 and not q.codes.requires_grad
    unit = F.normalize(z.detach(), dim=1)
    assert math.isclose(commitment.item(), (unit - q.lookup(ids)).square().sum(1).mean().item(), rel_tol=1e-5)


def test_codes_follow_the_mean_of_their_features():
    """One update against a plain loop."""
    q = toy_vqgan().quantizer
    z = torch.randn(2, 8, 4, 4)
    ids = q(z)[1]
    usage, sums, decay = q.usage.clone(), q.sums.clone(), q.config.decay
    unit = F.normalize(z, dim=1).movedim(1, -1).reshape(-1, 8)
    q.update(z, ids, seeded())
    fair = 32 / 32
    for v in range(32):
        mine = [unit[n] for n in range(32) if ids.flatten()[n] == v]
        usage[v] = decay * usage[v] + (1 - decay) * len(mine) / fair
        sums[v] = decay * sums[v] + (1 - decay) * (sum(mine) / fair if mine else torch.zeros(8))
    assert torch.allclose(q.usage, usage, atol=1e-5)
    assert torch.allclose(q.codes, F.normalize(sums, dim=1), atol=1e-5)


def test_dead_codes_are_revived_and_living_ones_left():
    q = toy_vqgan().quantizer
    q.usage[:5] = 0.0
    z = torch.randn(4, 8, 4, 4)
    ids = torch.full((4, 4, 4), 7)
    before = q.codes.clone()
    q.update(z, ids, seeded())
    unit = F.normalize(z, dim=1).movedim(1, -1).reshape(-1, 8)
    assert (q.codes[:5] @ unit.T).max(1).values.min() > 1 - 1e-5                # now features of the batch
    assert (q.usage[:5] == 1).all()
    assert torch.allclose(q.codes[10:], before[10:], atol=1e-5)


def test_every_code_comes_into_use():
    """From one blob of features to five: without revival, most of the codebook stays dead."""
    torch.manual_seed(0)
    q = V.Quantizer(V.PRESETS["toy"])
    centres = torch.randn(64, 8)
    generator = seeded()
    for step in range(400):
        spread = centres[torch.randint(64, (4 * 16,), generator=generator)] if step else centres[:1].repeat(64, 1)
        z = (spread + 0.1 * torch.randn(64, 8, generator=generator)).view(4, 4, 4, 8).movedim(-1, 1)
        ids = q(z)[1]
        q.update(z, ids, generator)
    assert V.codebook_health(q(F.normalize(centres, dim=1).view(1, 8, 8, 8).movedim(-1, 1))[1], 32)[0] > 0.8


def test_hinge_loss_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.5])
    assert math.isclose(V.discriminator_loss(real, fake).item(), 0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1.5) / 2), rel_tol=1e-6)


def test_adaptive_weight_by_hand():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = V.adaptive_weight((3 * w).sum(), (0.5 * w).sum(), w)
    assert math.isclose(weight.item(), math.sqrt(18) / (math.sqrt(0.5) + 1e-4), rel_tol=1e-5)
    assert not weight.requires_grad
    assert V.adaptive_weight((1e9 * w).sum(), (0 * w).sum(), w) == 1e4


def test_reconstruction_loss():
    x, y = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    assert V.reconstruction_loss(x, x) == 0
    assert V.reconstruction_loss(x, y) > 0
    shift = V.reconstruction_loss(x, x + 0.1)                                    # no gradient differs: L1 + L2 alone
    assert math.isclose(shift.item(), 0.1 + 0.01, rel_tol=1e-4)


def test_health():
    assert V.codebook_health(torch.arange(32), 32) == pytest.approx((1.0, 32.0), rel=1e-5)
    assert V.codebook_health(torch.zeros(9, dtype=torch.long), 32) == pytest.approx((1 / 32, 1.0))
    assert V.psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.2)) == pytest.approx(20)    # 10 log10(4 / .04)


def test_the_discriminator_sees_patches():
    """One logit a patch: a change in a corner leaves the other corner's logit... up to the norm, so without it."""
    critic = V.Discriminator()
    assert critic(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 8, 8)
