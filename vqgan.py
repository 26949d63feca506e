"""The VQGAN tokenizer: E turns pixels into tokens, D turns tokens back into pixels.

StyleDrop (arXiv 2306.00983) Section 3.1, Muse (arXiv 2301.00704) Section 2.2, VQGAN (Esser et al.
2021). pretrain/vqgan.py trains it with a reconstruction, a commitment and an adversarial loss.

    vqgan = VQGAN(VQGANConfig())
    ids = vqgan.encode(images)      # (B, 3, H, W) in [-1, 1]  ->  (B, h, w) in [0, V)
    images = vqgan.decode(ids)      # and back

Shapes: B batch, H W pixels, h w tokens (H / f, W / f), C channels, V codebook size, d code width.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class VQGANConfig:
    resolution: int = 64                # side in pixels, in training; E and D take multiples of f
    channels: tuple = (32, 64, 128)     # widths at full, half, quarter ... resolution
    blocks: int = 2                     # residual blocks at the token grid, in E and in D
    codebook_size: int = 1024           # V
    code_width: int = 32                # d; codes live on the unit sphere of this dimension
    decay: float = 0.97                 # decay of the codebook's moving averages
    revive_below: float = 0.03          # a code is dead below this share of the average usage

    @property
    def factor(self):                   # f: side of a token in pixels
        return 2 ** (len(self.channels) - 1)


PRESETS = {
    "toy": VQGANConfig(resolution=16, channels=(8, 8, 16), blocks=1, codebook_size=32,
                       code_width=8),
    "tiny": VQGANConfig(),
    "small": VQGANConfig(resolution=256, channels=(64, 128, 128, 256, 256), codebook_size=4096),
    # Muse: f = 16, 8192 codes, 19 residual blocks. Only used to count its parameters.
    "paper": VQGANConfig(resolution=256, channels=(128, 128, 256, 256, 512), blocks=8,
                         codebook_size=8192, code_width=256),
}


# --------------------------------------------------------------------------------------------------
# Layers

class Norm(nn.Module):
    """Divide the C channels of each position by their root mean square.

    GroupNorm, the usual choice, averages over the whole image. The token of a white patch would
    then depend on all other patches, which would make tokens harder for G to predict.
    """

    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):                                   # (B, C, h, w) -> the same
        return x * self.gain * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()


class ResBlock(nn.Module):
    """x + conv(silu(conv(silu(norm(x))))).

    The last convolution starts at zero, so a new block is the identity.
    """

    def __init__(self, channels, kernel=3):
        super().__init__()
        self.norm = Norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        for p in self.conv2.parameters():
            nn.init.zeros_(p)

    def forward(self, x):                                   # (B, C, h, w) -> the same
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution: no checkerboard, unlike a transposed convolution."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x):                                   # (B, C, h, w) -> (B, C', 2h, 2w)
        return self.conv(F.interpolate(x, scale_factor=2.0))


# E strides early and D upsamples late: convolutions at full resolution are the slow part on a CPU.

def encoder(config):
    layers = []
    c = 3                                                   # channels so far
    for width in config.channels[1:]:                       # each convolution halves the sides
        layers += [nn.Conv2d(c, width, 4, stride=2, padding=1, padding_mode="replicate"), nn.SiLU()]
        c = width
    layers += [ResBlock(c, kernel=1) for _ in range(config.blocks)]
    layers += [Norm(c), nn.Conv2d(c, config.code_width, 1)]
    return nn.Sequential(*layers)                           # (B, 3, H, W) -> (B, d, h, w)


def decoder(config):
    widths = config.channels[::-1]
    layers = [nn.Conv2d(config.code_width, widths[0], 3, padding=1)]
    layers += [ResBlock(widths[0]) for _ in range(config.blocks)]
    for c, width in zip(widths[:-2], widths[1:-1]):         # the last upsampling has no ResBlock
        layers += [Upsample(c, width), ResBlock(width)]
    layers += [nn.SiLU(), Upsample(widths[-2], widths[-1]), nn.SiLU(),
               nn.Conv2d(widths[-1], 3, 3, padding=1)]
    return nn.Sequential(*layers)                           # (B, d, h, w) -> (B, 3, H, W)


# --------------------------------------------------------------------------------------------------
# Vector quantizer

class Quantizer(nn.Module):
    """Nearest code by cosine, learned by moving averages (van den Oord et al. 2017, App. A.1).

    Features and codes have length 1 (ViT-VQGAN), so the nearest code has the largest dot product.
    Codes get no gradient: each follows the mean of the features that chose it. A code that no
    feature chooses would stay unused, so it is re-initialised at a feature that the codebook
    represents badly (update_codes in pretrain/vqgan.py).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        V, d = config.codebook_size, config.code_width
        self.register_buffer("codes", torch.zeros(V, d))
        self.register_buffer("usage", torch.ones(V))        # moving averages; 1: a fair share
        self.register_buffer("sums", torch.zeros(V, d))     # moving sums of each code's features

    def forward(self, z):
        """z (B, d, h, w) -> z_q (B, d, h, w), ids (B, h, w), commitment loss (scalar).

        z_q = z + sg(e - z) passes its gradient straight on to z. The commitment loss |z - sg(e)|^2
        moves features to codes, never codes to features.
        """
        z = F.normalize(z.float(), dim=1)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):  # bf16 is too coarse
            ids = torch.einsum("bdhw,vd->bhwv", z, self.codes).argmax(-1)
        e = self.lookup(ids)
        z_q = z + (e - z).detach()
        # |z - sg(e)|^2, averaged over images and positions; mse_loss averages over d as well
        commitment = F.mse_loss(z, e.detach()) * z.shape[1]
        return z_q, ids, commitment

    def lookup(self, ids):                                  # (B, h, w) -> (B, d, h, w)
        return F.embedding(ids, self.codes).movedim(-1, 1)


class VQGAN(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = encoder(config)
        self.quantizer = Quantizer(config)
        self.decoder = decoder(config)

    def forward(self, images):
        """images (B, 3, H, W) -> reconstruction, features z (B, d, h, w), ids, commitment loss."""
        z = self.encoder(images)
        z_q, ids, commitment = self.quantizer(z)
        return self.decoder(z_q), z, ids, commitment

    @torch.no_grad()
    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> ids (B, h, w) in [0, V).

        Raises ValueError unless H and W are multiples of f.
        """
        H, W = images.shape[-2:]
        f = self.config.factor
        if H % f or W % f:
            raise ValueError(f"image sides {H} x {W} must be multiples of {f}")
        _, ids, _ = self.quantizer(self.encoder(images))
        return ids

    @torch.no_grad()
    def decode(self, ids):
        """ids (B, h, w) in [0, V) -> images (B, 3, H, W) in [-1, 1]."""
        return self.decoder(self.quantizer.lookup(ids)).clamp(-1, 1)
