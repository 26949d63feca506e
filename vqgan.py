"""The VQGAN tokenizer: E turns pixels into tokens, D turns tokens back into pixels.

StyleDrop (arXiv 2306.00983) Section 3.1 and Muse (arXiv 2301.00704) Section 2.2; the training
recipe is VQGAN's (Esser et al. 2021): reconstruction + commitment + a patch discriminator.

    vqgan = VQGAN(VQGANConfig())
    ids = vqgan.encode(images)      # (B, 3, H, W) in [-1, 1]  ->  (B, h, w) in [0, V)
    images = vqgan.decode(ids)      # and back

Shapes: B batch, H W pixels, h w tokens (H / f), C channels, V codebook size, d code width.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class VQGANConfig:
    resolution: int = 64                # pixels a side in training; E and D take any multiple of f
    channels: tuple = (32, 64, 128)     # widths at full, half, quarter ... resolution
    blocks: int = 2                     # residual blocks at the token grid, in E and in D
    codebook_size: int = 1024           # V
    code_width: int = 32                # d; codes live on the unit sphere of this dimension
    decay: float = 0.97                 # of the codebook's moving averages
    revive_below: float = 0.03  # a code chosen less often than this share of its fair share is dead

    @property
    def factor(self):                   # f: pixels a side for each token
        return 2 ** (len(self.channels) - 1)


PRESETS = {
    "toy": VQGANConfig(resolution=16, channels=(8, 8, 16), blocks=1, codebook_size=32, code_width=8),
    "tiny": VQGANConfig(),
    "small": VQGANConfig(resolution=256, channels=(64, 128, 128, 256, 256), codebook_size=4096),
    # Muse: f = 16, 8192 codes, 19 residual blocks. Only for counting.
    "paper": VQGANConfig(resolution=256, channels=(128, 128, 256, 256, 512), blocks=9, codebook_size=8192, code_width=256),
}


# ---------------------------------------------------------------------------------------------
# Layers

class Norm(nn.Module):
    """Divide the C channels of each place by their root mean square.

    GroupNorm, the usual choice, takes means over the whole picture: then the token of a plain white
    patch depends on what stands elsewhere, and G has to guess noise.
    """

    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):                                   # (B, C, h, w) -> the same
        return x * self.gain * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()


class ResBlock(nn.Module):
    """x + conv(silu(conv(silu(norm(x))))); the last convolution starts at zero: an identity."""

    def __init__(self, channels, kernel=3):
        super().__init__()
        self.norm = Norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x):                                   # (B, C, h, w) -> the same
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution: no checkerboard, unlike a strided transpose."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x):                                   # (B, C, h, w) -> (B, C', 2h, 2w)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# Both halves stride early and upsample late: full-resolution convolutions are what a CPU pays for.

def encoder(config):
    widths = config.channels
    layers, c = [], 3
    for width in widths[1:]:                                # one stride-2 convolution a halving
        layers += [nn.Conv2d(c, width, 4, stride=2, padding=1, padding_mode="replicate"), nn.SiLU()]
        c = width
    layers += [ResBlock(c, kernel=1) for _ in range(config.blocks)]
    layers += [Norm(c), nn.Conv2d(c, config.code_width, 1)]
    return nn.Sequential(*layers)                           # (B, 3, H, W) -> (B, d, h, w)


def decoder(config):
    widths = config.channels[::-1]
    layers = [nn.Conv2d(config.code_width, widths[0], 3, padding=1)]
    layers += [ResBlock(widths[0]) for _ in range(config.blocks)]
    for c, width in zip(widths, widths[1:-1]):
        layers += [Upsample(c, width), ResBlock(width)]
    layers += [nn.SiLU(), Upsample(widths[-2], widths[-1]), nn.SiLU()]
    layers += [nn.Conv2d(widths[-1], 3, 3, padding=1)]
    return nn.Sequential(*layers)                           # (B, d, h, w) -> (B, 3, H, W)


# ---------------------------------------------------------------------------------------------
# Vector quantizer

class Quantizer(nn.Module):
    """Nearest code by cosine, learned by moving averages (van den Oord et al. 2017, App. A.1).

    Features and codes are divided by their length (ViT-VQGAN), so every code is in reach and the
    nearest one is the largest dot product. The codebook gets no gradient: each code follows the
    mean of the features that chose it. A code that nobody chooses would stay dead for ever, so
    `update` moves it onto a feature of the batch, drawn by how badly that feature is served now.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        V, d = config.codebook_size, config.code_width
        self.register_buffer("codes", torch.zeros(V, d))
        self.register_buffer("usage", torch.ones(V))      # moving average of (choices / fair share)
        self.register_buffer("sums", torch.zeros(V, d))     # moving average of the chosen features

    def forward(self, z):
        """z (B, d, h, w) -> z_q (B, d, h, w), ids (B, h, w), commitment loss (scalar).

        z_q carries the straight-through gradient z + sg(e - z). The commitment loss
        |z - sg(e)|^2 pulls the FEATURE to its code; with moving averages there is no codebook
        term for a wrong beta to land on.
        """
        z = F.normalize(z.float(), dim=1)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):  # bf16 takes the wrong one of near codes
            ids = torch.einsum("bdhw,vd->bhwv", z, self.codes).argmax(-1)
        e = self.lookup(ids)
        return z + (e - z).detach(), ids, F.mse_loss(z, e.detach()) * z.shape[1]

    def lookup(self, ids):                                  # (B, h, w) -> (B, d, h, w)
        return F.embedding(ids, self.codes).movedim(-1, 1)

    @torch.no_grad()
    def update(self, z, ids, generator):
        """One moving-average step from features z (B, d, h, w) and their ids (B, h, w)."""
        V, decay = self.config.codebook_size, self.config.decay
        z = F.normalize(z.float(), dim=1).movedim(1, -1).flatten(0, -2)          # (B h w, d)
        ids = ids.flatten()
        error = (z - self.codes[ids]).square().sum(1) + 1e-6
        fresh = z[torch.multinomial(error, V, replacement=True, generator=generator)]
        if not self.codes.any():                            # first batch: start on the data
            self.codes.copy_(fresh)
            self.sums.copy_(fresh)
            return
        fair = len(ids) / V
        counts = torch.bincount(ids, minlength=V).float() / fair
        sums = torch.zeros_like(self.sums).index_add_(0, ids, z) / fair
        self.usage.lerp_(counts, 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        dead = self.usage < self.config.revive_below
        self.sums[dead] = fresh[dead]
        self.usage[dead] = 1.0
        self.codes.copy_(F.normalize(self.sums, dim=1))


class VQGAN(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = encoder(config)
        self.quantizer = Quantizer(config)
        self.decoder = decoder(config)

    def forward(self, images):
        """images (B, 3, H, W) in [-1, 1] -> reconstruction, features z, ids (B, h, w), commitment loss."""
        z = self.encoder(images)
        z_q, ids, commitment = self.quantizer(z)
        return self.decoder(z_q), z, ids, commitment

    @torch.no_grad()
    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> ids (B, h, w) in [0, V).

        Raises ValueError where a side is not a multiple of f.
        """
        f = self.config.factor
        if images.shape[-1] % f or images.shape[-2] % f:
            raise ValueError(f"image sides {tuple(images.shape[-2:])} must be multiples of {f}")
        return self.quantizer(self.encoder(images))[1]

    @torch.no_grad()
    def decode(self, ids):
        """ids (B, h, w) in [0, V) -> images (B, 3, H, W) in [-1, 1]."""
        return self.decoder(self.quantizer.lookup(ids)).clamp(-1, 1)


# ---------------------------------------------------------------------------------------------
# Losses

class Discriminator(nn.Module):
    """Patch discriminator: one real-or-fake logit for each overlapping patch (pix2pix, VQGAN)."""

    def __init__(self, channels=48):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1), nn.GroupNorm(8, 2 * channels), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1), nn.GroupNorm(8, 2 * channels), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * channels, 1, 3, padding=1))

    def forward(self, images):                              # (B, 3, H, W) -> (B, 1, H/4, W/4)
        return self.layers(images)


def reconstruction_loss(x, y):
    """L1 + L2 + the difference of image gradients at three scales. x, y (B, 3, H, W) in [-1, 1].

    The gradient term stands where VQGAN has LPIPS, which needs a downloaded network. Our own CLIP
    could serve, but its 8-pixel patches are coarser than the edges and textures a token must hold;
    the gradients ask for exactly those and cost nothing.
    """
    loss = F.l1_loss(x, y) + F.mse_loss(x, y)
    for _ in range(3):
        loss = loss + F.l1_loss(x.diff(dim=-1), y.diff(dim=-1)) + F.l1_loss(x.diff(dim=-2), y.diff(dim=-2))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return loss


def discriminator_loss(real, fake):
    """Hinge loss on the discriminator's logits of real and of reconstructed images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction, adversarial, last_layer):
    """lambda = |grad L_rec| / (|grad L_gan| + 1e-4) at D's last layer, in [0, 1e4] (VQGAN Eq. 7)."""
    grad = lambda loss: torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
    return (grad(reconstruction) / (grad(adversarial) + 1e-4)).clamp(0, 1e4).detach()


# ---------------------------------------------------------------------------------------------
# Health

def codebook_health(ids, codebook_size):
    """ids, any shape -> (share of the codes used at all, perplexity in [1, V])."""
    p = torch.bincount(ids.flatten(), minlength=codebook_size).float() / ids.numel()
    return (p > 0).float().mean().item(), torch.exp(-(p * p.clamp_min(1e-12).log()).sum()).item()


def psnr(x, y):
    """Peak signal-to-noise ratio in dB of images (B, 3, H, W) in [-1, 1]: peak to peak 2."""
    mse = (x - y).square().flatten(1).mean(1).clamp_min(1e-10)
    return (10 * torch.log10(4 / mse)).mean().item()
