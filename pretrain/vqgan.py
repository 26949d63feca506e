"""Pretrain the tokenizer: E, D and the codebook (VQGAN, Esser et al. 2021).

    python -m pretrain.vqgan                               # -> runs/vqgan/vqgan.pt

The reconstruction and commitment losses are used from the start, the discriminator from --gan-start
on. The same command resumes where it was stopped.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from checkpoint.files import write_png
from checkpoint.weights import save_model
from commandline.options import number
from commandline.terminal import run_command
from data.pictures import grid
from pretrain.common import Run, Steps, batches, image_source, set_rate, stage_parser, start
from styledrop import autocast, to_tensor, to_uint8
from vqgan import PRESETS, VQGAN


class Discriminator(nn.Module):
    """Patch discriminator: one real-or-fake logit for each overlapping patch (pix2pix, VQGAN)."""

    def __init__(self, channels=48):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
            nn.GroupNorm(8, 2 * channels), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1),
            nn.GroupNorm(8, 2 * channels), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * channels, 1, 3, padding=1))

    def forward(self, images):                              # (B, 3, H, W) -> (B, 1, H/4, W/4)
        return self.layers(images)


def reconstruction_loss(x, y):
    """L1 + L2 + the difference of image gradients at three scales. x, y (B, 3, H, W) in [-1, 1].

    The gradient term replaces VQGAN's LPIPS, which needs a downloaded network. It penalises errors
    at edges and in textures, which a token must preserve.
    """
    loss = F.l1_loss(x, y) + F.mse_loss(x, y)
    for _ in range(3):
        loss = loss + F.l1_loss(x.diff(dim=-1), y.diff(dim=-1))
        loss = loss + F.l1_loss(x.diff(dim=-2), y.diff(dim=-2))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return loss


def discriminator_loss(real, fake):
    """Hinge loss on the discriminator's logits of real and of reconstructed images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction, adversarial, last_layer):
    """|grad L_rec| / (|grad L_gan| + 1e-4) at the decoder's last layer (VQGAN's code, Eq. 7).

    At most 1e4.
    """
    rec_grad, = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    gan_grad, = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (rec_grad.norm() / (gan_grad.norm() + 1e-4)).clamp(0, 1e4).detach()


@torch.no_grad()
def update_codes(q, z, ids, generator):
    """Update a Quantizer's codebook by one batch: features z (B, d, h, w), their ids (B, h, w)."""
    V = len(q.codes)
    decay = q.config.decay
    z = F.normalize(z.float(), dim=1).movedim(1, -1).flatten(0, -2)          # (B h w, d)
    ids = ids.flatten()
    # candidates for dead codes: features, most often those that the codebook represents worst
    error = (z - q.codes[ids]).square().sum(1) + 1e-6
    fresh = z[torch.multinomial(error, V, replacement=True, generator=generator)]
    if not q.codes.any():                            # first batch: start at its features
        q.codes.copy_(fresh)
        q.sums.copy_(fresh)
        return
    fair = len(ids) / V                                 # uses of each code if all were used equally
    counts = torch.bincount(ids, minlength=V) / fair
    sums = torch.zeros_like(q.sums).index_add_(0, ids, z) / fair
    q.usage.lerp_(counts, 1 - decay)
    q.sums.lerp_(sums, 1 - decay)
    dead = q.usage < q.config.revive_below
    q.sums[dead] = fresh[dead]
    q.usage[dead] = 1.0
    q.codes.copy_(F.normalize(q.sums, dim=1))


def codebook_health(ids, codebook_size):
    """ids, any shape -> (share of the codes used at all, perplexity in [1, V])."""
    p = torch.bincount(ids.flatten(), minlength=codebook_size).float() / ids.numel()
    entropy = -(p * p.clamp_min(1e-12).log()).sum()
    return (p > 0).float().mean().item(), entropy.exp().item()


def psnr(x, y):
    """Peak signal-to-noise ratio in dB of images x, y (B, 3, H, W) in [-1, 1], whose peak is 2."""
    mse = (x - y).square().flatten(1).mean(1).clamp_min(1e-10)
    return (10 * torch.log10(4 / mse)).mean().item()


def main(argv=None):
    parser = stage_parser("vqgan", __doc__, steps=8000, batch=16, lr=1e-3)
    add = parser.add_argument
    add("--gan-start", type=number(float, 0, 1), default=0.6,
        help="share of the steps after which the discriminator starts (default: %(default)s)")
    add("--gan-weight", type=number(float, 0, 100), default=0.3,
        help="weight of the discriminator's loss (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.reuse > 1:
        raise ValueError("--reuse is for muse, superres and clip; leave it out")
    start(args)

    # data and models
    config = PRESETS[args.preset]
    source = image_source(args, config.resolution, smallest=0.9, compose=False)
    model = VQGAN(config).to(args.device, memory_format=torch.channels_last)
    critic = Discriminator().to(args.device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    critic_optimiser = torch.optim.AdamW([dict(params=critic.parameters(), share=0.5)], args.lr,
                                         betas=(0.5, 0.9), weight_decay=0.01)
    run = Run("vqgan", args, model=model, critic=critic, optimiser=optimiser,
              critic_optimiser=critic_optimiser)
    preview = to_tensor(Steps([source], [config.resolution], 16, args.seed + 1)[0][0])

    steps = Steps([source], [config.resolution], args.batch, args.seed)
    for step, (images,), generator in batches(args, steps, run.step):
        images = to_tensor(images).contiguous(memory_format=torch.channels_last)
        adversarial = step >= args.steps * args.gan_start
        set_rate([optimiser, critic_optimiser], step, args)

        # E and D
        with autocast(args.device):
            fake, z, ids, commitment = model(images)
        fake = fake.float()
        reconstruction = reconstruction_loss(fake, images)
        loss = reconstruction + 0.25 * commitment
        if adversarial:
            gan = -critic(fake).mean()                            # E and D's side of the hinge loss
            weight = adaptive_weight(reconstruction, gan, model.decoder[-1].weight)
            loss = loss + args.gan_weight * weight * gan
        optimiser.zero_grad()
        run.check(step + 1, loss)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

        # the codebook
        update_codes(model.quantizer, z.detach(), ids, generator)

        # the discriminator
        figures = {}
        if adversarial:
            critic_loss = discriminator_loss(critic(images), critic(fake.detach()))
            critic_optimiser.zero_grad()
            critic_loss.backward()
            critic_optimiser.step()
            figures = dict(critic=critic_loss.detach())

        usage, perplexity = codebook_health(ids, config.codebook_size)
        run.log(step + 1, loss=loss.detach(), psnr=psnr(fake.detach(), images), usage=usage,
                perplexity=perplexity, **figures)
        if run.due(step + 1):
            sheet = reconstructions(model, preview.to(args.device))
            write_png(run.out / "samples.png", sheet)
            save_model(run.out / "vqgan.pt", "vqgan", model, run.provenance(step + 1))
            run.keep(step + 1)


def reconstructions(model, images):
    """A sheet of images (16, 3, H, W), each above its reconstruction."""
    outputs = model.decode(model.encode(images))
    return grid(to_uint8(torch.cat([images[:8], outputs[:8], images[8:], outputs[8:]])), 8, scale=2)


if __name__ == "__main__":
    run_command(main)
