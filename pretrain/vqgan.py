"""Pretrain the tokenizer: E, D and the codebook (VQGAN, Esser et al. 2021).

    python train.py --stage vqgan                               # -> runs/vqgan/vqgan.pt

Reconstruction and commitment from the start, the discriminator from --gan-start on.
The same command goes on where it was stopped.
"""

from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from pretrain.common import Run, Steps, batches, pictures, set_rate, stage_parser, start, to_float
from styledrop import autocast, grid, number, run_command, save_model, to_uint8, write_whole
from vqgan import (PRESETS, VQGAN, Discriminator, adaptive_weight, codebook_health,
                   discriminator_loss, psnr, reconstruction_loss)


def main(argv=None):
    parser = stage_parser("vqgan", __doc__, steps=8000, batch=16, lr=1e-3)
    add = parser.add_argument
    add("--gan-start", type=number(float, 0, high=1), default=0.6,
        help="share of the steps before the discriminator starts (default %(default)s)")
    add("--gan-weight", type=number(float, 0, high=100), default=0.3,
        help="of the discriminator, beside the reconstruction (default %(default)s)")
    args = parser.parse_args(argv)
    if args.reuse > 1:
        raise ValueError("--reuse is for muse, superres and clip; leave it out")
    start(args)

    # data and models
    config = PRESETS[args.preset]
    source = pictures(args, config.resolution, smallest=0.9, compose=False)
    model = VQGAN(config).to(args.device, memory_format=torch.channels_last)
    critic = Discriminator().to(args.device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    critic_optimiser = torch.optim.AdamW([dict(params=critic.parameters(), share=0.5)], args.lr,
                                         betas=(0.5, 0.9), weight_decay=0.01)
    run = Run("vqgan", args, model=model, critic=critic, optimiser=optimiser,
              critic_optimiser=critic_optimiser)
    shown = to_float(Steps([source], [config.resolution], 16, args.seed + 1)[0][0])

    steps = Steps([source], [config.resolution], args.batch, args.seed)
    for step, (images,), generator in batches(args, steps, run.step):
        images = to_float(images).contiguous(memory_format=torch.channels_last)
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
        model.quantizer.update(z.detach(), ids, generator)

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
            sheet = reconstructions(model, shown.to(args.device))
            write_whole(run.out / "samples.png", lambda file: sheet.save(file, "PNG"))
            save_model(Path(args.out) / "vqgan.pt", "vqgan", model, run.provenance(step + 1))
            run.keep(step + 1)


def reconstructions(model, images):
    """Pictures (16, 3, H, W) above what the tokenizer gives back of them, on a sheet."""
    again = model.decode(model.encode(images))
    return grid(to_uint8(torch.cat([images[:8], again[:8], images[8:], again[8:]])), 8, scale=2)


if __name__ == "__main__":
    run_command(main)
