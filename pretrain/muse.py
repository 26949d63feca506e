"""Pretrain Muse's base: T and G together, on the tokens of a frozen tokenizer (Eq. 2).

    python -m pretrain.muse                                # -> runs/muse/muse.pt
    torchrun --nproc_per_node=2 -m pretrain.muse           # on two GPUs, or two CPU processes
    python -m pretrain.muse --batch 1024 --reuse 8 --workers 8 --steps 10400 --compile # GPU

The folder of --weights holds vqgan.pt. The same command resumes where it was stopped.
"""

import copy
from dataclasses import replace

import torch
import torch.distributed as dist

from checkpoint.files import write_png
from checkpoint.weights import save_model
from commandline.terminal import run_command
from data.pictures import grid
from muse import PRESETS, decode, masked_loss, random_mask
from pretrain.common import (Replay, Run, Steps, batches, image_source, initial_muse, load_vqgan,
                             muse_parser, optimisers_for, processes, set_rate, start,
                             update_average)
from styledrop import autocast, guided_logits, to_tensor, to_uint8


def main(argv=None):
    parser = muse_parser("muse", __doc__, steps=20000, batch=64, mask_power=2)
    args = parser.parse_args(argv)
    start(args, together=True)
    rank, world = processes()

    # data and models
    vqgan = load_vqgan(args, PRESETS[args.preset].grid)
    source = image_source(args, vqgan.config.resolution)
    config = replace(PRESETS[args.preset], codebook_size=vqgan.config.codebook_size)
    model, tokenizer = initial_muse(args.init, "muse", config, source.words())
    config = model.config
    model = model.to(args.device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    muon, adamw = optimisers_for(model, [*model.blocks, *model.text_encoder.blocks], args.lr)
    run = Run("muse", args, model=model, average=average, muon=muon, adamw=adamw)
    replay = Replay(args.batch, args.reuse)
    steps = Steps([source], [vqgan.config.resolution], replay.fresh, args.seed, tokenizer,
                  config.text_length)
    empty = tokenizer("", config.text_length).to(args.device)                    # the prompt n

    def loss_and_accuracy(ids, text_ids, mask):
        """ids (B, N), text_ids (B, L), mask (B, N) -> CE_m, share of masked tokens guessed."""
        text, text_mask = model.text_encoder(text_ids)
        logits = model(ids.masked_fill(mask, config.mask_id), text, text_mask)
        right = (logits.argmax(-1) == ids) & mask
        return masked_loss(logits, ids, mask, label_smoothing=0.1), right.sum() / mask.sum()

    compute = loss_and_accuracy
    if args.compile:
        compute = torch.compile(loss_and_accuracy)
    for step, (images, text_ids), generator in batches(args, steps, run.step):
        # the batch: images, some new, some seen before; one caption in ten becomes the empty prompt
        new = vqgan.encode(to_tensor(images)).flatten(1)
        ids, text_ids = replay([new, text_ids], generator)                       # (B, N), (B, L)
        if step < run.step:                                                  # only to fill `replay`
            continue
        dropped = torch.rand(len(ids), 1, generator=generator, device=ids.device) < 0.1
        text_ids = torch.where(dropped, empty, text_ids)
        mask = random_mask(len(ids), config.tokens, generator, args.mask_power)  # (B, N)

        # its loss; under torchrun, process `rank` of `world` computes rows rank, rank + world, ...
        mine = slice(rank, None, world)
        with autocast(args.device):
            loss, accuracy = compute(ids[mine], text_ids[mine], mask[mine])
        set_rate((muon, adamw), step, args)
        muon.zero_grad()
        adamw.zero_grad()
        loss.backward()
        figures = torch.stack([loss.detach(), accuracy])
        if world > 1:
            for shared in [*(p.grad for p in model.parameters()), figures]:
                dist.all_reduce(shared)
                shared /= world
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adamw.step()
        update_average(average, model, step)

        run.log(step + 1, loss=figures[0], accuracy=figures[1])
        if run.due(step + 1):
            sheet = samples(average, vqgan, tokenizer, source.prompts(24), args)
            write_png(run.out / "samples.png", sheet)
            save_model(run.out / "muse.pt", "muse", average, run.provenance(step + 1),
                       merges=[" ".join(pair) for pair in tokenizer.merges], words=source.words())
            run.keep(step + 1)
    if dist.is_initialized():
        dist.destroy_process_group()


def samples(model, vqgan, tokenizer, prompts, args):
    """A sheet with one image for each prompt, sampled by Eq. 1 with lambda = 3."""
    c = model.config
    with torch.no_grad():
        text_ids = tokenizer([*prompts, *[""] * len(prompts)], c.text_length).to(args.device)
        text, text_mask = model.text_encoder(text_ids)                           # t, then n

        def logits_fn(ids, step):
            with autocast(args.device):
                base, null = model(ids.repeat(2, 1), text, text_mask).chunk(2)
            return guided_logits(base, base, null, 0, 3)

        generator = torch.Generator(args.device).manual_seed(0)
        ids = decode(logits_fn, len(prompts), c.tokens, c.mask_id, 16, 1.0, generator)
        return grid(to_uint8(vqgan.decode(ids.view(-1, c.grid, c.grid))), 8, scale=2)


if __name__ == "__main__":
    run_command(main)
