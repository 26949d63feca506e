"""Pretrain Muse's second stage: the tokens of an image at twice the size (Muse 2.4).

    python -m pretrain.superres                            # -> runs/superres/superres.pt

The folder of --weights holds vqgan.pt. This stage has a small T of its own, trained with it, so
that neither stage has to wait for the other. The same command resumes where it was stopped.
"""

import copy
from dataclasses import replace

import torch

from checkpoint.files import write_png
from checkpoint.weights import save_model
from commandline.terminal import run_command
from data.pictures import grid
from muse import SUPERRES, decode, masked_loss, random_mask
from pretrain.common import (Replay, Run, Steps, batches, image_source, initial_muse, load_vqgan,
                             muse_parser, optimisers_for, set_rate, start, update_average)
from styledrop import autocast, to_tensor, to_uint8

NOISE = 0.2                             # at most this share of the low tokens is replaced at random


def main(argv=None):
    parser = muse_parser("superres", __doc__, steps=10000, batch=16, mask_power=1)
    args = parser.parse_args(argv)
    start(args)

    # data and models
    vqgan = load_vqgan(args, SUPERRES[args.preset].low_grid)
    config = SUPERRES[args.preset]
    sizes = [vqgan.config.resolution, vqgan.config.resolution * config.grid // config.low_grid]
    sources = [image_source(args, size) for size in sizes]
    config = replace(config, codebook_size=vqgan.config.codebook_size)
    model, tokenizer = initial_muse(args.init, "superres", config, sources[0].words())
    model = model.to(args.device)
    config = model.config
    average = copy.deepcopy(model).eval().requires_grad_(False)
    muon, adamw = optimisers_for(model, [*model.blocks, *model.low_blocks,
                                         *model.text_encoder.blocks], args.lr)
    run = Run("superres", args, model=model, average=average, muon=muon, adamw=adamw)
    replay = Replay(args.batch, args.reuse)
    steps = Steps(sources, sizes, replay.fresh, args.seed, tokenizer, config.text_length)
    empty = tokenizer("", config.text_length).to(args.device)                    # the prompt n

    def loss_and_accuracy(ids, low, text_ids, mask):
        """ids (B, N), low (B, low_grid^2), text_ids (B, L), mask (B, N) -> CE_m, accuracy."""
        text, text_mask = model.text_encoder(text_ids)
        logits = model(ids.masked_fill(mask, config.mask_id), text, text_mask, low=low)
        right = (logits.argmax(-1) == ids) & mask
        return masked_loss(logits, ids, mask, label_smoothing=0.1), right.sum() / mask.sum()

    compute = loss_and_accuracy
    if args.compile:
        compute = torch.compile(loss_and_accuracy)
    for step, (low, high, text_ids), generator in batches(args, steps, run.step):
        # the batch: the same images at both sizes; one caption in ten becomes the empty prompt
        low = vqgan.encode(to_tensor(low)).flatten(1)                            # (B, low_grid^2)
        high = vqgan.encode(to_tensor(high)).flatten(1)                          # (B, N)
        low, ids, text_ids = replay([low, high, text_ids], generator)
        if step < run.step:                                                  # only to fill `replay`
            continue
        draw = torch.rand(3, len(ids), 1, generator=generator, device=ids.device)
        u_text, u_share, u_half = draw                                           # (B, 1) each
        text_ids = torch.where(u_text < 0.1, empty, text_ids)
        # in half of the images, some low tokens are wrong, as they are in samples of the base
        share = torch.where(u_half < 0.5, NOISE * u_share, 0.0)                  # (B, 1)
        noise = torch.rand(low.shape, generator=generator, device=low.device) < share
        wrong = torch.randint(config.codebook_size, low.shape, generator=generator,
                              device=low.device)
        low = torch.where(noise, wrong, low)
        mask = random_mask(len(ids), config.tokens, generator, args.mask_power)  # (B, N)

        with autocast(args.device):
            loss, accuracy = compute(ids, low, text_ids, mask)
        set_rate((muon, adamw), step, args)
        muon.zero_grad()
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adamw.step()
        update_average(average, model, step)

        run.log(step + 1, loss=loss.detach(), accuracy=accuracy)
        if run.due(step + 1):
            sheet = samples(average, vqgan, tokenizer, sources, sizes, args)
            write_png(run.out / "samples.png", sheet)
            save_model(run.out / "superres.pt", "superres", average, run.provenance(step + 1),
                       merges=[" ".join(pair) for pair in tokenizer.merges])
            run.keep(step + 1)


@torch.no_grad()
def samples(model, vqgan, tokenizer, sources, sizes, args):
    """A sheet of three rows: low-resolution images, samples from their tokens, the originals."""
    c = model.config
    steps = Steps(sources, sizes, 8, args.seed + 1, tokenizer, c.text_length)
    low, high, text_ids = steps[0]
    low = low.to(args.device)
    high = high.to(args.device)
    text_ids = text_ids.to(args.device)
    low_ids = vqgan.encode(to_tensor(low)).flatten(1)
    text, text_mask = model.text_encoder(text_ids)

    def logits_fn(ids, step):
        with autocast(args.device):
            return model(ids, text, text_mask, low=low_ids)

    generator = torch.Generator(args.device).manual_seed(0)
    ids = decode(logits_fn, len(low), c.tokens, c.mask_id, 12, 1.0, generator)
    drawn = vqgan.decode(ids.view(-1, c.grid, c.grid))
    low = torch.nn.functional.interpolate(to_tensor(low), sizes[1], mode="nearest")
    return grid(to_uint8(torch.cat([low, drawn, to_tensor(high)])), 8)


if __name__ == "__main__":
    run_command(main)
