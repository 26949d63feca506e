"""Teach a style from one picture, or pretrain the base.

    python train.py --ref style.png                                     # -> runs/style
    python train.py --ref house.png --content "a house" --style "watercolor painting" --out runs/watercolor
    python train.py --ref a.png b.png --content "a cat" "a house"       # every reference is used
    python train.py --ref house.png --rounds 2 --feedback clip          # or human, or random
    python train.py --ref 1.png 2.png --kind content --content "a [V] teapot"

    python train.py --stage vqgan                                       # pretraining: copy runs/vqgan/vqgan.pt and
    python train.py --stage clip                                        # runs/clip/clip.pt to a folder for the third;
    python train.py --stage muse --weights weights/mine                 # a command given again goes on where it stopped
    torchrun --nproc_per_node=2 train.py --stage muse                   # on two GPUs, or two CPU processes
"""

import argparse
import copy
import json
import math
import os
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

import clip_feedback
import data
import human_feedback
import muse as muse_
import vqgan as vqgan_
from adapter import METHODS
from styledrop import (FEEDBACK, RARE_TOKEN, Parser, Pool, StyleDrop, autocast, check_device, check_prompt, choose_by_clip,
                       fast_bf16, fingerprint, grid, load_adapter, load_model, measure, number, read_checkpoint, run_command,
                       sample_pool, save_model, style_prompt, to_tensor, to_uint8, write_whole)


# ---------------------------------------------------------------------------------------------
# The machine

def machine():
    """A line for logs and provenance, such as "2 x Intel Xeon, torch 2.13.0"."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        model = names[0] if names else model
    return f"{torch.get_num_threads()} threads of {model}, torch {torch.__version__}"


def peak_memory():
    """Peak resident memory of this process in MB, or nan where the system does not tell."""
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
    except ImportError:
        return math.nan


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def processes():
    """This process's number and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


# ---------------------------------------------------------------------------------------------
# Pretraining

class Steps(torch.utils.data.Dataset):
    """Batch number `step`, always the same one: what makes a resumed run equal an unbroken one."""

    def __init__(self, source, batch, resolution, seed):
        self.source, self.batch, self.resolution, self.seed = source, batch, resolution, seed

    def __len__(self):
        return 2 ** 31

    def __getitem__(self, step):
        images, captions = self.source.batch(self.batch, np.random.default_rng((self.seed, step)), self.resolution)
        return to_tensor(images), captions


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: for the matrices of hidden layers (Jordan et al. 2024).

    torch.optim.Muon with adjust_lr_fn="match_rms_adamw", except that its Newton-Schulz iteration runs in
    bf16 only where that is fast: on a CPU without it torch's took 0.78 s of each 2.0 s step, this 0.19 s.
    """

    def __init__(self, parameters, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(momentum, group["momentum"])                     # Nesterov
                x = x.bfloat16() if fast_bf16(x.device.type) else x
                tall = len(x) > x.shape[1]
                x = x.T if tall else x
                x = x / x.norm().clamp(min=1e-7)
                for _ in range(5):                           # pulls every singular value towards 1
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x.T if tall else x, alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)  # the size of an AdamW step


def hidden_matrices(*blocks):
    """Muon's share of a model: the matrices inside its transformer blocks, except the locked ones."""
    return [p for block in blocks for p in block.parameters() if p.dim() == 2 and p.requires_grad]


def optimisers_for(model, hidden, lr):
    """Muon for the hidden matrices, AdamW for embeddings, norms and the way in and out."""
    ids = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in ids and p.requires_grad]
    return [Muon(hidden, lr, weight_decay=0.05), torch.optim.AdamW(others, lr, betas=(0.9, 0.96), weight_decay=0.05)]


def start_from(path, kind, model):
    """--init: copy the weights of an earlier run that `model` has in the same shape.

    Returns that run's provenance and the names of what was copied.

    Raises ValueError in one line where the file is none of this kind, or nothing in it fits.
    """
    saved, own = read_checkpoint(path, kind), model.state_dict()
    fits = {name: w for name, w in saved["weights"].items() if name in own and own[name].shape == w.shape}
    if not fits:
        raise ValueError(f"{path} has nothing in the sizes of this preset; start without --init")
    model.load_state_dict(fits, strict=False)
    print(f"{len(fits)} of {len(own)} tensors start as in {path}" + (", the others at random" if len(fits) < len(own) else ""))
    return saved["provenance"], fits.keys()


# What makes two pretraining commands the same run; --steps may grow
RECIPE = ("preset", "data", "batch", "lr", "seed", "init", "lock", "merges", "weights", "warmup", "ema", "mask_power",
          "gan_start", "gan_weight")


def pretrain(stage, args, models, optimisers, train_step, picture, export, ema=None):
    """The loop of the three stages: resume, step, log, draw, keep.

    models: name -> module, all in the checkpoint; optimisers: a list; train_step(step, images,
    captions, generator) -> dict of floats, after its optimiser steps; picture() -> PIL image, or None;
    export(provenance) writes the shipped file; ema: a pair (average, module) or None.
    All of a step's randomness follows from (seed, step), so step and weights are the whole state.
    """
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (rank, _), start, minutes = processes(), 0, 0.0
    recipe = {name: getattr(args, name) for name in RECIPE}
    if (out / "checkpoint.pt").exists():
        saved = read_checkpoint(out / "checkpoint.pt", f"{stage} checkpoint")
        others = [option(name) for name in RECIPE if saved.get("recipe", {}).get(name) != recipe[name]]
        if others:
            raise ValueError(f"{out / 'checkpoint.pt'} was made with another {', '.join(others)}; give the same command, "
                             "or another --out")
        try:
            for name, model in models.items():
                model.load_state_dict(saved["models"][name])
            for optimiser, state in zip(optimisers, saved["optimisers"]):
                optimiser.load_state_dict(state)
        except (KeyError, RuntimeError, ValueError):
            raise ValueError(f"{out / 'checkpoint.pt'} does not fit this version; give another --out") from None
        start, minutes = saved["step"], saved["minutes"]
    if rank == 0:
        if start:
            print(f"going on from step {start} of {out / 'checkpoint.pt'}")
        lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
        lines = [line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
        write_whole(out / "log.jsonl", lambda file: file.write("".join(lines).encode()))

    def draw(name):
        if picture is not None:
            write_whole(out / name, lambda file: picture().save(file, "PNG"))

    def keep(step):                                          # the checkpoint comes last: it vouches for the others
        spent = minutes + (time.time() - began) / 60
        draw("samples.png")
        export(dict(stage=stage, steps=step, batch=args.batch, images=step * args.batch, minutes=round(spent, 1),
                    machine=machine(), data=args.data or "data/", seed=args.seed, lr=args.lr,
                    **({} if args.start is None else {"init": args.start})))
        write_whole(out / "checkpoint.pt", lambda file: torch.save(
            dict(kind=f"{stage} checkpoint", step=step, minutes=spent, recipe=recipe,
                 models={name: model.state_dict() for name, model in models.items()},
                 optimisers=[optimiser.state_dict() for optimiser in optimisers]), file))

    steps = Steps(args.source, args.batch, args.resolution, args.seed)
    loader = torch.utils.data.DataLoader(steps, batch_size=None, sampler=range(start, args.steps),
                                         num_workers=args.workers)
    began = last_log = last_keep = time.time()
    early = {round(args.steps * percent / 100): f"samples_{percent:03d}.png" for percent in (5, 20)}
    logged, sums = start, {}
    for step, (images, captions) in zip(range(start, args.steps), loader):
        rate = min(1, (step + 1) / args.warmup) * (0.02 + 0.98 * math.cos(math.pi / 2 * step / args.steps) ** 2)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group.setdefault("peak", group["lr"]) * rate
        generator = torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + step)
        for name, value in train_step(step, images.to(args.device), captions, generator).items():
            sums[name] = sums.get(name, 0.0) + value
        if ema is not None:
            decay = min(args.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for average, p in zip(ema[0].parameters(), ema[1].parameters()):
                    average.lerp_(p, 1 - decay)
        done, now = step + 1, time.time()
        if rank == 0 and (now - last_log > args.log_seconds or done == args.steps):
            means = {name: value / (done - logged) for name, value in sums.items()}
            speed = (done - logged) * args.batch / (now - last_log)
            left = (args.steps - done) * args.batch / speed
            print(f"step {done}/{args.steps}  " + "  ".join(f"{k} {v:.3f}" for k, v in means.items()) +
                  f"  {speed:.1f} images/s  {clock(left)} left", flush=True)
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(dict(step=done, images=done * args.batch, **{k: round(v, 5) for k, v in means.items()},
                                          minutes=round(minutes + (now - began) / 60, 2))) + "\n")
            last_log, logged, sums = now, done, {}
        if rank == 0 and done in early:
            draw(early[done])
        if rank == 0 and (now - last_keep > args.keep_minutes * 60 or done == args.steps):
            keep(done)
            last_keep = time.time()


def pretrain_vqgan(args):
    """E, D and the codebook: reconstruction + commitment, and the discriminator from --gan-start on.

    --lock keeps E and the codebook as they are: every picture keeps its tokens, and only D learns.
    """
    model = vqgan_.VQGAN(vqgan_.PRESETS[args.preset])
    args.start, _ = start_from(args.init, "vqgan", model) if args.init else (None, ())
    model = model.to(args.device, memory_format=torch.channels_last)
    model.encoder.requires_grad_(not args.lock)
    critic = vqgan_.Discriminator().to(args.device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    critic_optimiser = torch.optim.AdamW(critic.parameters(), args.lr / 2, betas=(0.5, 0.9), weight_decay=0.01)
    shown, _ = Steps(args.source, 16, args.resolution, args.seed + 1)[0]         # the same drawings each time

    def train_step(step, images, captions, generator):
        images = images.contiguous(memory_format=torch.channels_last)
        with autocast(args.device):
            fake, z, ids, commitment = model(images)
        fake = fake.float()
        rec = vqgan_.reconstruction_loss(fake, images)
        loss = rec + 0.25 * commitment
        adversarial = step >= args.steps * args.gan_start
        if adversarial:
            gan = -critic(fake).mean()                       # the generator's side of the hinge loss
            loss = loss + args.gan_weight * vqgan_.adaptive_weight(rec, gan, model.decoder[-1].weight) * gan
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if not args.lock:
            model.quantizer.update(z.detach(), ids, generator)
        if adversarial:
            critic_loss = vqgan_.discriminator_loss(critic(images), critic(fake.detach()))
            critic_optimiser.zero_grad()
            critic_loss.backward()
            critic_optimiser.step()
        usage, perplexity = vqgan_.codebook_health(ids, model.config.codebook_size)
        return dict(loss=loss.item(), psnr=vqgan_.psnr(fake.detach(), images), usage=usage, perplexity=perplexity,
                    **(dict(critic=critic_loss.item()) if adversarial else {}))

    def picture():
        model.eval()
        again = model.decode(model.encode(shown.to(args.device))).cpu()
        model.train()
        return grid(to_uint8(torch.cat([shown[:8], again[:8], shown[8:], again[8:]])), 8, scale=2)

    pretrain("vqgan", args, dict(model=model, critic=critic), [optimiser, critic_optimiser], train_step, picture,
             lambda provenance: save_model(Path(args.out) / "vqgan.pt", "vqgan", model, provenance))


def pretrain_clip(args):
    """T: both towers, contrastively. Identical captions in a batch are no negatives of each other.

    --lock keeps the states that Muse reads as they are (LiT, Zhai et al. 2022, did so with a whole tower);
    the image tower starts anew, on text features that use their whole space.
    """
    if args.init:
        tokenizer = clip_feedback.Tokenizer(read_checkpoint(args.init, "clip")["merges"])
    else:
        texts = [caption for step in range(80) for caption in Steps(args.source, 256, 16, args.seed + 2)[step][1]]
        tokenizer = clip_feedback.Tokenizer(clip_feedback.train_merges(texts, args.merges))
    config = replace(clip_feedback.PRESETS[args.preset], vocab_size=tokenizer.vocab_size)
    model = clip_feedback.CLIP(config, tokenizer)
    args.start, _ = start_from(args.init, "clip", model) if args.init else (None, ())
    if args.lock:
        if not (Path(args.out) / "checkpoint.pt").exists():  # else both come from there
            texts = [caption for step in range(32) for caption in Steps(args.source, 128, 16, args.seed + 2)[step][1]]
            model.start_images(tokenizer(texts, config.context_length))
        for parameter in model.states_weights():
            parameter.requires_grad_(False)
    model = model.to(args.device)
    optimisers = optimisers_for(model, hidden_matrices(*model.transformers()), args.lr)

    def train_step(step, images, captions, generator):
        torch.manual_seed(generator.initial_seed())                                          # of dropout
        ids = tokenizer(captions, config.context_length).to(args.device)
        with autocast(args.device):
            loss, accuracy = model(images, ids)
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for optimiser in optimisers:
            optimiser.step()
        return dict(loss=loss.item(), accuracy=accuracy.item(), scale=model.logit_scale.exp().item())

    pretrain("clip", args, dict(model=model), optimisers, train_step, None,
             lambda provenance: save_model(Path(args.out) / "clip.pt", "clip", model, provenance,
                                           merges=[" ".join(pair) for pair in tokenizer.merges]))


@torch.no_grad()
def memorise(model, vqgan, clip, source, things, seed):
    """G's memory, before a step of training: `things` as source.things() gives them, and the words for them."""
    began, rng = time.time(), np.random.default_rng((seed, 0))
    images = [image for pictures in things.values() for image in pictures]
    shown = torch.arange(len(things)).repeat_interleave(torch.tensor([len(pictures) for pictures in things.values()]))
    ids = torch.cat([vqgan.encode(to_tensor(np.stack(images[i:i + 64]))).flatten(1) for i in range(0, len(images), 64)])
    model.learn_sketches(vqgan.quantizer.codes[ids], shown)
    words = [source.wording(thing, rng) for thing in things for _ in range(16)]
    named = torch.arange(len(things)).repeat_interleave(16)
    ids = clip.tokenizer(words, clip.config.context_length)
    states = torch.cat([clip.text_states(some) for some in ids.split(256)])
    with torch.enable_grad():
        known = model.learn_words(states, clip.text_mask(ids), named, torch.Generator().manual_seed(seed))
    print(f"{len(things)} things remembered in {time.time() - began:.0f} s; {known:.1%} of their captions find them")


def pretrain_muse(args):
    """G: Eq. 2 on frozen tokens and text, 10 % of the texts replaced by the empty prompt n.

    Under torchrun every process draws the same batch and masks and trains on its share of the rows;
    the gradients are summed, so that any number of processes take the steps that one takes.
    """
    rank, world = processes()
    vqgan, _ = load_model(Path(args.weights) / "vqgan.pt", "vqgan", vqgan_.VQGANConfig, vqgan_.VQGAN)
    clip = clip_feedback.load_clip(Path(args.weights) / "clip.pt").eval().requires_grad_(False)
    things = args.source.things()
    config = replace(muse_.PRESETS[args.preset], codebook_size=vqgan.config.codebook_size,
                     text_width=clip.config.text_width, things=len(things))
    model = muse_.Muse(config)
    resumes = (Path(args.out) / "checkpoint.pt").exists()    # then all that follows comes from there
    if not resumes:
        ids = clip.tokenizer(args.source.prompts(4000), clip.config.context_length)
        model.start_from(vqgan.quantizer.codes, clip.text_states(ids)[clip.text_mask(ids)])
    place = copy.deepcopy(model.place)
    args.start, taken = start_from(args.init, "muse", model) if args.init else (None, ())
    remembers = {"keys.weight", "keys.bias", "sketches"} <= set(taken) and args.start.get("data") == (args.data or "data/")
    if not (resumes or remembers):
        model.place = place                                  # the earlier one read other sketches
        memorise(model, vqgan, clip, args.source, things, args.seed)
    for parameter in model.memory():
        parameter.requires_grad_(False)
    model = model.to(args.device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    pipe = StyleDrop(vqgan, clip, average, args.device)
    pipe.check()
    optimisers = optimisers_for(model, hidden_matrices(model.blocks), args.lr)

    def train_step(step, images, captions, generator):
        dropped = torch.rand(len(images), generator=generator, device=args.device) < 0.1
        mask = muse_.random_mask(len(images), config.tokens, generator, args.mask_power)     # (B, N)
        captions = ["" if drop else caption for drop, caption in zip(dropped.tolist(), captions)]
        mine, whole, masked = slice(rank, None, world), len(images), mask.sum()
        images, captions, mask = images[mine], captions[mine], mask[mine]
        ids = vqgan.encode(images).flatten(1)                                    # (B / world, N)
        text, text_mask = pipe.embed(captions)
        longest = int(text_mask.sum(1).max())
        text, text_mask = text[:, :longest], text_mask[:, :longest]              # no padding that nobody reads
        with autocast(args.device):
            logits = model(ids.masked_fill(mask, config.mask_id), text, text_mask)
        loss = muse_.masked_loss(logits, ids, mask, label_smoothing=0.1) * (len(images) / whole)
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        right = ((logits.argmax(-1) == ids) & mask).sum() / masked
        figures = torch.stack([loss.detach(), right])
        if world > 1:
            for shared in [*(p.grad for p in model.parameters() if p.requires_grad), figures]:
                dist.all_reduce(shared)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        return dict(zip(("loss", "accuracy"), figures.tolist()))

    def picture():
        prompts = args.source.prompts(24)
        return grid(to_uint8(pipe.generate(prompts, steps=16)), 8, scale=2)

    pretrain("muse", args, dict(model=model, average=average), optimisers, train_step, picture,
             lambda provenance: save_model(Path(args.out) / "muse.pt", "muse", average,
                                           dict(provenance, reads=pipe.reads, mask_power=args.mask_power)),
             (average, model))


# How each stage is shown the drawings. Muse has enough to learn with each thing in its place; CLIP, where style
# words tell its pictures apart, need not look at what they show, and has to know drawings of hands it never saw
SHOWN = {"vqgan": dict(smallest=0.9), "clip": dict(smallest=0.8, bare=0.5, bent=0.13), "muse": dict(plain=0.1)}
STAGES = {                                                   # stage: (function, default steps, batch, lr)
    "vqgan": (pretrain_vqgan, 1600, 16, 1e-3),
    "clip": (pretrain_clip, 1080, 128, 1.5e-3),
    "muse": (pretrain_muse, 1500, 64, 2e-3),
}


# ---------------------------------------------------------------------------------------------
# Style tuning: the main job

PREVIEW = ("a cat", "a tree", "a car", "an apple", "a rocket", "a fish")
CONTENT_PREVIEW = ("watercolor", "flat vector on navy", "gold and purple", "line drawing", "halftone")


def before_after(references, before, after, prompts):
    """One picture: the references on the left, the base's samples above, the tuned ones below.

    references, before, after: uint8 (B, H, W, 3); before and after share their prompts and seeds.
    """
    size, edge, words = 2 * before.shape[1], 8, 16
    sheet = Image.new("RGB", ((1 + len(prompts)) * (size + edge) + 2 * edge, 2 * (size + edge) + words + edge), "white")
    draw = ImageDraw.Draw(sheet)
    enlarge = lambda image, side: Image.fromarray(image).resize((side, side), Image.NEAREST)
    side = size if len(references) == 1 else size // 2
    for i, image in enumerate(references[:4]):
        sheet.paste(enlarge(image, side), (edge + i % 2 * side, words + i // 2 * side))
    draw.text((edge, 2), "reference", fill="black")
    draw.text((edge, words + size + edge), "above: before\nbelow: after", fill="black")
    for i, prompt in enumerate(prompts):
        x = 2 * edge + (i + 1) * (size + edge)
        draw.text((x, 2), prompt[:size // 6], fill="black")
        sheet.paste(enlarge(before[i], size), (x, words))
        sheet.paste(enlarge(after[i], size), (x, words + size + edge))
    return sheet


METHOD_LR = {"adapter": 1e-3, "full": 1e-4, "lora": 1e-3, "textual-inversion": 1e-2}


def teach(pipe, images, contents, style, steps, lr, batch, d_prj, is_shared, seed, mask_power, method="adapter"):
    """pipe.tune with a progress line -> the adapter and its log, a list of dicts."""
    log, began = [], time.time()

    def on_step(step, loss):
        log.append(dict(step=step + 1, loss=round(loss, 5)))
        if (step + 1) % max(1, steps // 10) == 0:
            speed = (step + 1) * batch / (time.time() - began)
            print(f"step {step + 1}/{steps}  loss {loss:.3f}  {speed:.1f} images/s  "
                  f"{clock((steps - step - 1) * batch / speed)} left", flush=True)

    adapter = pipe.tune(images, contents, style, steps, lr, batch, d_prj, is_shared, seed, on_step, method, mask_power)
    ours, base = (sum(p.numel() for p in model.parameters()) for model in (adapter, pipe.muse))
    print(f"adapter: {ours:,} parameters, {100 * ours / base:.2f} % of the base's {base:,}")
    return adapter, log


def write_log(path, log):
    write_whole(path, lambda file: file.write("".join(json.dumps(line) + "\n" for line in log).encode()))


def tune(args):
    """Eq. 3 from the command line: a run folder with adapter.pt, config.json, log.jsonl, samples.png."""
    began = time.time()
    out = Path(args.out or f"runs/{Path(args.ref[0]).stem}")
    if out.exists() and not (out / "adapter.pt").exists():
        raise ValueError(f"{out} exists and is not a run folder; give another --out")
    contents = args.content
    if args.kind == "content":
        if not contents:
            raise ValueError('a content adapter needs the object\'s name: --content "a [V] teapot"')
        if args.style or args.rounds > 1:
            raise ValueError("a content adapter takes neither --style nor --rounds")
        contents = contents * len(args.ref) if len(contents) == 1 else contents
    if contents and len(contents) != len(args.ref):
        raise ValueError(f"{len(args.ref)} references need as many --content phrases, not {len(contents)}")
    if contents and not all(phrase.strip() for phrase in contents):
        raise ValueError("a --content phrase is empty; say what the picture shows, or leave --content out")
    if args.rounds == 1 and (out / "round2").exists():
        raise ValueError(f"{out} holds rounds of feedback; give --rounds to go on with them, or another --out")
    prompts = read_prompts(args.pool_prompts)
    pipe = StyleDrop.load(args.weights, args.device)
    images = np.stack([data.read_image(path, pipe.vqgan.config.resolution) for path in args.ref])
    references = to_tensor(images)
    if not contents:
        contents = guess_content(pipe, references)
        print(f"content guessed by CLIP: {', '.join(contents)} (say it with --content if that is wrong)")
    style = "" if args.kind == "content" else RARE_TOKEN if args.style is None else args.style
    for content in contents:
        check_prompt(pipe, content, style)
    settings = {k: v for k, v in vars(args).items() if k in ("ref", "kind", "method", "steps", "lr", "batch", "d_prj",
                                                             "unshared", "mask_power", "seed", "weights")}
    settings = dict(settings, content=contents, style=style, base=pipe.base,
                    pictures=fingerprint({"references": references}))            # another picture may have the old name
    changed = differing(out / "config.json", settings)
    if args.rounds > 1 and not changed:
        print(f"going on with {out}: its round 1 is there")
    elif (out / "round2").exists():                          # a person's choice may be in it
        raise ValueError(f"{out} holds rounds that began with another {', '.join(changed)}; give another --out, or remove it")
    else:
        if out.exists():
            print(f"{out} is there and will be replaced")
        first_round(args, out, pipe, images, settings)
    if args.rounds > 1:
        further_rounds(args, out, pipe, references, settings, prompts)
    files = sorted(path.name + "/" * path.is_dir() for path in out.iterdir())
    print(f"{out}: {' '.join(files)}  ({time.time() - began:.0f} s, peak memory {peak_memory():.0f} MB)")
    what = f'"{contents[0]}" --content' if args.kind == "content" else '"a cat" --style'
    weights = "" if args.weights == "weights/tiny" else f" --weights {args.weights}"
    print(f"next: python sample.py --prompt {what} {out}{weights}")


def differing(path, settings):
    """The settings that a run's config.json does not have; how the paths were written does not count."""
    there, settings = read_json(path) or {}, as_json(settings)
    return [name for name in settings if name not in ("ref", "weights") and there.get(name) != settings[name]]


def first_round(args, out, pipe, images, settings):
    """From the references; the folder appears when all of it is there."""
    contents, style, prompts = settings["content"], settings["style"], PREVIEW
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:   # fails early, leaves nothing
        run = Path(temporary) / "run"
        run.mkdir()
        adapter, log = teach(pipe, to_tensor(images), contents, style, args.steps, args.lr, args.batch, args.d_prj,
                             not args.unshared, args.seed, args.mask_power, args.method)
        if args.kind == "content":
            prompts = [contents[0]] + [style_prompt(contents[0], words) for words in CONTENT_PREVIEW]
        before = pipe.generate([style_prompt(p, style) for p in prompts], seed=args.seed)
        after = pipe.generate(prompts, **{args.kind: adapter}, seed=args.seed)
        adapter.save(run / "adapter.pt")
        write_json(run / "config.json", settings)
        write_log(run / "log.jsonl", log)
        before_after(images, to_uint8(before), to_uint8(after), prompts).save(run / "samples.png")
        if out.exists():
            os.replace(out, Path(temporary) / "old")
        os.replace(run, out)


# ---------------------------------------------------------------------------------------------
# Rounds of feedback (Sections 3.3 and 4.4.3)

# 30 prompts with the structure of Table S2 (animals, faces, fruit, buildings), in words the base knows
POOL_PROMPTS = """a dog; a cat; a fox; an owl; a horse; a fish; a turtle; a butterfly; a duck; a rabbit; a dog face;
    a cat face; a tiger face; a panda; a red apple; a banana; a pear; cherries; a strawberry; a mushroom; a church;
    a castle; a house; a hut; a tent; a sailboat; an automobile; a rocket; a guitar; a teapot"""
POOL_PROMPTS = [prompt.strip() for prompt in POOL_PROMPTS.split(";")]
ROUND = dict(steps=200, lr=1e-3, d_prj=8)                    # of the adapters after the first


def finished(path, recipe):
    """True if the part that `path` describes was made by the very same recipe."""
    return read_json(path) == as_json(recipe)


def read_json(path):
    """What is in a file of ours; None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def as_json(value):
    """As it comes back from a file: tuples are lists."""
    return json.loads(json.dumps(value))


def write_json(path, value):
    write_whole(path, lambda file: file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()))


def further_rounds(args, out, pipe, references, settings, prompts):
    """Sample a pool, choose, train a NEW larger adapter on the choice; each part is kept and made once.

    roundN/ holds pool.png (a row for each prompt), choice.json, adapter.pt and log.jsonl; every part
    lies beside the recipe that made it, so the same command goes on after the last finished part.
    """
    style = settings["style"]
    for prompt in prompts:
        check_prompt(pipe, prompt, style)
    if not (out / "round1" / "adapter.pt").exists():
        load_adapter(out).save(out / "round1" / "adapter.pt")
    adapters = [load_adapter(out / "round1")]
    for turn in range(2, args.rounds + 1):
        here = out / f"round{turn}"
        recipe = dict(adapter=fingerprint(adapters[-1].state_dict()), prompts=prompts, pool=args.pool, seed=args.seed)
        pool = draw_pool(pipe, here, adapters[-1], recipe)
        recipe = dict(recipe, feedback=args.feedback, style_words=args.style_words)
        pick = args.pick if turn == args.rounds else None    # earlier rounds have been chosen already
        chosen = choose(args, here, pipe, pool, references, recipe, pick)
        recipe = dict(recipe, chosen=chosen, steps=args.round_steps, lr=args.round_lr, d_prj=args.round_d_prj)
        if not (finished(here / "adapter.json", recipe) and (here / "adapter.pt").exists()):
            print(f"round {turn}: {len(chosen)} chosen pictures teach a new adapter")
            adapter, log = teach(pipe, pool.images[chosen], [pool.contents[i] for i in chosen], style, args.round_steps,
                                 args.round_lr, args.batch, args.round_d_prj, False, args.seed, args.mask_power)
            write_log(here / "log.jsonl", log)
            adapter.save(here / "adapter.pt")
            write_json(here / "adapter.json", recipe)
        adapters.append(load_adapter(here))
    adapters[-1].save(out / "adapter.pt")
    write_json(out / "config.json", dict(settings, round=args.rounds))           # whose adapter it is; the rest is round 1's
    compare_rounds(args, out, pipe, references, settings, prompts, adapters)


def read_prompts(path):
    """One content phrase a line; POOL_PROMPTS without a file."""
    if path is None:
        return POOL_PROMPTS
    prompts = [line.strip() for line in data.read_words(Path(path)).splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return prompts


def draw_pool(pipe, here, adapter, recipe):
    """The pool of a round, from pool.png if it is there; pool.json last, so that it vouches for the picture."""
    prompts, count = recipe["prompts"], recipe["pool"]
    if not (finished(here / "pool.json", recipe) and (here / "pool.png").exists()):
        began = time.time()
        show = lambda done: print(f"pool {done}/{len(prompts) * count}  {done / (time.time() - began):.1f} pictures/s", flush=True)
        pool = sample_pool(pipe, prompts, count, adapter, recipe["seed"] + 1, on_batch=show)
        write_whole(here / "pool.png", lambda file: grid(to_uint8(pool.images), count, gap=0).save(file, "PNG"))
        write_json(here / "pool.json", recipe)
    sheet = np.asarray(Image.open(here / "pool.png"))
    size = pipe.vqgan.config.resolution
    tiles = sheet.reshape(len(prompts), size, count, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    return Pool(to_tensor(tiles), prompts, adapter.about["style"])


def choose(args, here, pipe, pool, references, recipe, pick):
    """The numbers of the chosen pictures; kept in choice.json. A person may stop and come back."""
    saved = here / "choice.json"
    if pick is None and saved.exists():
        choice = json.loads(saved.read_text(encoding="utf-8"))
        if finished(saved, dict(recipe, chosen=choice.get("chosen"))):
            return choice["chosen"]
    if args.feedback == "human":
        images, shown = to_uint8(pool.images), to_uint8(references)
        if pick is not None:
            chosen = human_feedback.parse_picks(pick, len(images))
        else:
            for old in here.glob("sheet*.png"):
                old.unlink()
            for i, sheet in enumerate(human_feedback.contact_sheets(images, pool.contents)):
                write_whole(here / f"sheet{i + 1}.png", lambda file: sheet.save(file, "PNG"))
            print(f"choose the best pictures: in the browser at the address below, or look at {here}/sheet*.png "
                  "and run this command again with --pick 3,17,20")
            chosen = human_feedback.pick(images, pool.contents, shown, here / "picking.json", port=args.port)
    elif args.feedback == "clip":
        chosen = choose_by_clip(pipe, pool, None, args.style_words)
    else:
        chosen = FEEDBACK[args.feedback](pipe, pool, torch.Generator().manual_seed(args.seed))
    write_whole(here / "chosen.png", lambda file: grid(to_uint8(pool.images[chosen]), 10, 2).save(file, "PNG"))
    write_json(saved, dict(recipe, chosen=chosen))
    return chosen


def compare_rounds(args, out, pipe, references, settings, prompts, adapters):
    """rounds.png and scores.json: the base and every round on the same prompts and seed, with the three scores."""
    style, size, edge = settings["style"], 2 * pipe.vqgan.config.resolution, 8
    shown = prompts[:8]
    sheet = Image.new("RGB", ((2 + len(shown)) * (size + edge), 16 + (1 + len(adapters)) * (size + edge)), "white")
    draw, scores = ImageDraw.Draw(sheet), {}
    enlarge = lambda image: Image.fromarray(image).resize((size, size), Image.NEAREST)
    draw.text((edge, 2), "reference", fill="black")
    sheet.paste(enlarge(to_uint8(references)[0]), (edge, 16))
    for row, adapter in enumerate([None, *adapters]):
        name = "base" if adapter is None else f"round {row}"
        texts = prompts if adapter else [style_prompt(prompt, style) for prompt in prompts]
        pool = sample_pool(pipe, texts, 1, adapter, args.seed)
        values = measure(pipe, pool.images, prompts, references, settings["content"])
        scores[name] = {k: round(v.nanmean().item(), 4) for k, v in values.items()}
        line = "\n".join([name, *(f"{k} {v:.3f}" for k, v in scores[name].items())])
        y = 16 + row * (size + edge)
        draw.text((edge + size + edge, y), line, fill="black")
        for i, image in enumerate(to_uint8(pool.images[:len(shown)])):
            sheet.paste(enlarge(image), ((2 + i) * (size + edge), y))
            draw.text(((2 + i) * (size + edge), 2), shown[i][:size // 6], fill="black")
        print(f"{name}: " + "  ".join(f"{k} {v:.3f}" for k, v in scores[name].items()), flush=True)
    write_whole(out / "rounds.png", lambda file: sheet.save(file, "PNG"))
    write_json(out / "scores.json", dict(scores, scorer=f"{args.weights}/clip.pt, one picture of each of "
                                                        f"{len(prompts)} prompts, those of the pool; texts without the style phrase"))


def guess_content(pipe, images):
    """The nearest of all names the base was trained on, by CLIP, for each image (R, 3, H, W)."""
    phrases = sorted({data.content_phrase(name) for name in data.names()})
    texts = pipe.clip.encode_text(pipe.clip.tokenizer(phrases, pipe.clip.config.context_length).to(pipe.device))
    scores = pipe.clip.encode_image(images.to(pipe.device)) @ torch.nn.functional.normalize(texts, dim=-1).T
    return [phrases[i] for i in scores.argmax(1)]


# ---------------------------------------------------------------------------------------------
# Command line

# Options of one job only
TUNING = ("content", "style", "kind", "method", "d_prj", "unshared")
ROUNDS = ("rounds", "feedback", "pick", "port", "pool", "pool_prompts", "style_words", "round_steps", "round_lr", "round_d_prj")
PRETRAINING = ("preset", "data", "init", "lock", "merges", "workers", "warmup", "ema", "gan_start", "gan_weight", "log_seconds",
               "keep_minutes")


def option(name):
    return "--" + name.replace("_", "-")


def check_options(args, given, error):
    """Call error(one line) where options do not go together; given: the names of those that are not at their default."""
    if bool(args.ref) == bool(args.stage):
        error("give --ref IMG to teach a style, or --stage vqgan|clip|muse to pretrain the base")
    of_the_other_job, its = (PRETRAINING, "--stage") if args.ref else (TUNING + ROUNDS, "--ref")
    for name in of_the_other_job:
        if name in given:
            error(f"{option(name)} goes with {its}")
    for name in ROUNDS[1:]:
        if name in given and args.rounds == 1:
            error(f"{option(name)} goes with --rounds 2")
    if args.pick is not None and args.feedback != "human":
        error("--pick goes with --feedback human")
    if args.style_words and args.feedback in ("human", "random"):
        error("--style-words goes with --feedback clip")
    if args.rounds > 1 and args.method != "adapter":
        error("--rounds trains adapters; leave --method out")
    if args.kind == "content" and args.method == "textual-inversion":
        error("textual inversion learns the words of a style; leave --kind content out")
    if "unshared" in given and args.method != "adapter" or "d_prj" in given and args.method not in ("adapter", "lora"):
        error("--unshared and --d-prj shape adapters, --d-prj LoRA too; leave them or --method out")
    if args.lock and not (args.stage in ("vqgan", "clip") and args.init):
        error("--lock goes with --stage vqgan or clip, and --init FILE")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("teach a style, or an object").add_argument
    add("--ref", nargs="+", metavar="IMG", help="the style reference; several teach one style together")
    add("--content", nargs="+", metavar="PHRASE", help='what each reference shows, such as "a house" (default: CLIP guesses)')
    add("--style", help=f'words for the style (default: the rare token "{RARE_TOKEN}")')
    add("--kind", choices=("style", "content"), default="style", help="what the pictures teach: a style, or an object")
    add("--method", choices=METHODS, default="adapter", help="what is trained; the others are the paper's baselines")
    add("--d-prj", type=number(int, 1, high=4096), default=4, help="H, the adapter's bottleneck; LoRA: its rank (default %(default)s)")
    add("--unshared", action="store_true", help="independent adapter weights in each layer")
    add = parser.add_argument_group("rounds of feedback").add_argument
    add("--rounds", type=number(int, 1), default=1, help="2: sample a pool, choose, train a new adapter on the choice")
    add("--feedback", choices=("clip", "human", "random"), help="who chooses (default: clip)")
    add("--pick", metavar="3,17,20", help="with --feedback human: the last round's choice by number, instead of the page")
    add("--port", type=number(int, 0, high=65535), default=0, help="of the page (default: any that is free)")
    add("--pool", type=number(int, 1), default=8, help="pictures for each prompt of the pool (default %(default)s; the paper: 64)")
    add("--pool-prompts", metavar="FILE", help="content phrases, one a line (default: 30 of our own)")
    add("--style-words", action="store_true", help="CLIP scores the text with the style phrase in it")
    add("--round-steps", type=number(int, 1), default=ROUND["steps"], help="of each later adapter (default %(default)s)")
    add("--round-lr", type=number(float, 0, strict=True), default=ROUND["lr"], help="its learning rate (default %(default)s)")
    add("--round-d-prj", type=number(int, 1, high=4096), default=ROUND["d_prj"], help="H of the later, unshared adapters (default %(default)s)")
    add = parser.add_argument_group("pretraining").add_argument
    add("--stage", choices=STAGES, help="pretrain this part of the base instead")
    add("--preset", choices=("toy", "tiny", "small"), default="tiny")
    add("--data", help="folder of images with captions (default: the drawings in data/)")
    add("--init", metavar="FILE", help="start from this stage's weights of an earlier run instead of at random")
    add("--lock", action="store_true", help="with --init: keep the tokens (vqgan) or text states (clip) that Muse knows; CLIP's image tower starts anew")
    add("--merges", type=number(int, 1), default=2000, help="BPE merges of CLIP's tokenizer")
    add("--workers", type=number(int, 0), default=1, help="processes that draw the training pictures")
    add("--warmup", type=number(int, 1), default=100, help="steps until the learning rate is at its peak")
    add("--ema", type=number(float, 0), default=0.998, help="decay of Muse's weight average")
    add("--gan-start", type=number(float, 0), default=0.6, help="share of the steps before the discriminator starts")
    add("--gan-weight", type=number(float, 0), default=0.3, help="of the discriminator, beside the reconstruction")
    add("--log-seconds", type=number(float, 0), default=20, help="between lines of the log")
    add("--keep-minutes", type=number(float, 0), default=4, help="between checkpoints")
    add = parser.add_argument_group("both").add_argument
    of_stages = lambda column: ", ".join(f"{stage} {row[column]}" for stage, row in STAGES.items())
    add("--steps", type=number(int, 1), help=f"(default 100; {of_stages(1)})")
    add("--batch", type=number(int, 1), help=f"(default 8; {of_stages(2)})")
    add("--lr", type=number(float, 0, strict=True), help=f"learning rate (default 1e-3, other methods their own; {of_stages(3)})")
    add("--mask-power", type=number(float, 0, strict=True), default=2, help="1: Muse's law of masking; more masks more (default %(default)s)")
    add("--seed", type=number(int, 0), default=0, help="of everything that is drawn at random")
    add("--weights", default="weights/tiny", help="folder of the base")
    add("--out", help="run folder (default: runs/NAME OF THE REFERENCE or runs/STAGE)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    check_options(args, [name for name, value in vars(args).items() if value != parser.get_default(name)], parser.error)
    check_device(args.device)
    if args.ref:
        defaults, job = (100, 8, METHOD_LR[args.method]), tune
        args.feedback = args.feedback or "clip"
    else:
        job, *defaults = STAGES[args.stage]
        args.out = args.out or f"runs/{args.stage}"
    args.steps, args.batch, args.lr = (given or default for given, default in
                                       zip((args.steps, args.batch, args.lr), defaults))
    if args.stage:
        torch.manual_seed(args.seed)                         # of the initial weights
        if "LOCAL_RANK" in os.environ:                       # torchrun started us
            if args.stage != "muse":
                parser.error("torchrun is for --stage muse; the other stages run in one process")
            if args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            from torch.distributed import nn as _            # imported when a group is there, its defaults keep it from ending
            dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
            if args.batch < dist.get_world_size():
                parser.error(f"--batch {args.batch} is less than one picture for each of {dist.get_world_size()} processes")
        args.resolution = vqgan_.PRESETS[args.preset].resolution
        args.source = (data.Folder(args.data, args.resolution) if args.data else
                       data.Art(size=args.resolution, **SHOWN[args.stage]))
    job(args)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
