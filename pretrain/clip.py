"""Pretrain CLIP, which judges images: both towers, contrastively (Radford et al. 2021).

    python -m pretrain.clip                                # -> runs/clip/clip.pt
    python -m pretrain.clip --batch 1024 --reuse 16 --workers 2 --steps 2600     # on one GPU

The same command resumes where it was stopped.
"""

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

import data
from checkpoint.weights import save_model
from clip_feedback import CLIP, PRESETS, Tokenizer, image_features
from data import styles
from commandline.terminal import run_command, say
from pretrain.common import (Replay, Run, Steps, batches, image_source, optimisers_for, set_rate,
                             stage_parser, start, train_merges)
from styledrop import autocast, to_tensor

MAX_LOGIT_SCALE = math.log(100)         # CLIP 2.5: sharper than this, training becomes unstable


class InTurn(torch.utils.data.Dataset):
    """Batches of several kinds in turn; all captions of a batch are of one kind.

    The loss rewards only what distinguishes the images of a batch. If the captions name an object
    and a style, learning one of them is nearly enough. So half of the batches name no styles: only
    the object counts. And a quarter name styles alone: the style score needs features that differ
    by style.
    """

    def __init__(self, *kinds):
        self.kinds = kinds

    def __len__(self):
        return 2 ** 31

    def __getitem__(self, step):
        return self.kinds[step % len(self.kinds)][step]


class StyleWords:
    """The images of a source; of "a cat in watercolor style", only "watercolor style" is left."""

    def __init__(self, source):
        self.source = source

    def batch(self, n, rng, resolution):
        images, captions = self.source.batch(n, rng, resolution)
        return images, [caption.rpartition(" in ")[2] if caption.endswith(" style") else caption
                        for caption in captions]


def augment(images, generator):
    """Augment images (B, 3, H, W) in [-1, 1], so that a reused image differs each time.

    They are rotated, sheared, scaled and shifted a little (the border is repeated), mirrored half
    of the time, and made slightly lighter or darker, but not so much that another colour word would
    fit. Three in ten are at most mirrored, so that some have the sharpness of images to be scored.
    """
    B = len(images)
    device = images.device

    def normal(*shape):
        return torch.randn(B, *shape, generator=generator, device=device)

    def chance(p):
        return (torch.rand(B, 1, 1, generator=generator, device=device) < p).float()

    moved = chance(0.7)                                                      # (B, 1, 1)
    matrix = torch.eye(2, device=device) + 0.08 * moved * normal(2, 2)       # (B, 2, 2)
    mirror = torch.cat([1 - 2 * chance(0.5), torch.ones_like(moved)], dim=2)  # (B, 1, 2)
    shift = 0.05 * moved * normal(2, 1)
    grid = F.affine_grid(torch.cat([matrix * mirror, shift], 2), images.shape, align_corners=False)
    images = F.grid_sample(images, grid, "bicubic", padding_mode="border", align_corners=False)
    gain = 1 + 0.06 * moved[..., None] * normal(1, 1, 1)
    tint = 0.04 * moved[..., None] * normal(3, 1, 1)
    return (images * gain + tint).clamp(-1, 1)


def contrastive_loss(images, texts, logit_scale, same=None):
    """Symmetric InfoNCE (CLIP Figure 3): find each image's caption, and each caption's image.

    images, texts (B, E): their features, not normalised. logit_scale: the model's parameter, the
    logarithm of the factor by which cosines are multiplied. same (B, B) bool: whether text j is
    also correct for image i; None: only i = j. Returns a scalar.

    In CLIP, every other caption of the batch counts as wrong. Here, "a cat" often occurs twice in a
    batch, so the target is spread evenly over all correct captions. The lowest possible loss is
    then not 0 but the mean logarithm of their number.
    """
    images = F.normalize(images.float(), dim=-1)
    texts = F.normalize(texts.float(), dim=-1)
    logits = logit_scale.exp() * images @ texts.T                        # (B images, B texts)
    same = torch.eye(len(logits), device=logits.device) if same is None else same.to(logits.dtype)
    to_text = F.cross_entropy(logits, same / same.sum(1, keepdim=True))
    to_image = F.cross_entropy(logits.T, same.T / same.T.sum(1, keepdim=True))
    return (to_text + to_image) / 2


def main(argv=None):
    parser = stage_parser("clip", __doc__, steps=9000, batch=128, lr=1.5e-3)
    args = parser.parse_args(argv)
    start(args)

    # data and models
    size = PRESETS[args.preset].resolution
    settings = dict(compose=False, smallest=0.75, bent=0.13)
    styled = image_source(args, size, bare=0.0, **settings)
    bare = image_source(args, size, bare=1.0, **settings)    # no caption names a style
    tokenizer = Tokenizer(train_merges(styled.words(), 2000))
    config = replace(PRESETS[args.preset], vocab_size=tokenizer.vocab_size)
    model = CLIP(config, tokenizer).to(args.device)
    if args.device == "cuda":
        model.visual.to(memory_format=torch.channels_last)                   # faster there
    muon, adamw = optimisers_for(model, model.transformer.resblocks, args.lr)
    run = Run("clip", args, model=model, muon=muon, adamw=adamw)
    kinds = styled, bare, StyleWords(styled), bare
    window = Replay.WINDOW // len(kinds)                     # each kind has every fourth step
    replays = [Replay(args.batch, args.reuse, window) for _ in kinds]
    each = [Steps([source], [size], replays[0].fresh, args.seed, tokenizer, config.context_length)
            for source in kinds]
    steps = InTurn(*each)

    for step, item, generator in batches(args, steps, run.step):
        # the batch: images, some new, some seen before, and their captions
        images, ids = replays[step % len(kinds)](item, generator)  # (B, H, W, 3), (B, L)
        if step < run.step:                                  # resumed: this only fills the replays
            continue
        images = augment(to_tensor(images), generator)        # (B, 3, H, W)
        same = (ids[:, None] == ids[None]).all(-1)           # (B, B): one caption

        # the loss: find each image's caption in the batch, and each caption's image
        with autocast(args.device):
            image = model.encode_image(images)               # (B, E)
            text = model.encode_text(ids)                    # (B, E)
        loss = contrastive_loss(image, text, model.logit_scale, same)
        set_rate((muon, adamw), step, args)
        muon.zero_grad()
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adamw.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
            nearest = (image.float() @ F.normalize(text.float(), dim=-1).T).argmax(1, keepdim=True)
            accuracy = same.gather(1, nearest).float().mean()

        run.log(step + 1, loss=loss.detach(), accuracy=accuracy,
                scale=model.logit_scale.detach().exp())
        if run.due(step + 1):
            provenance = run.provenance(step + 1)
            if not args.data:
                model.eval()
                provenance["held_out"] = measure(model)
                model.train()
                words = "  ".join(f"{k} {v:.1%}" for k, v in provenance["held_out"].items())
                say(f"held-out drawings:  {words}")
            save_model(run.out / "clip.pt", "clip", model, provenance,
                       merges=[" ".join(pair) for pair in tokenizer.merges])
            run.keep(step + 1)


@torch.no_grad()
def measure(clip, count=400, among=100):
    """Accuracy of a CLIP on drawings of the held-out set, in random styles of the training set.

    top1, top5: how often the drawing's own name is the nearest, or among the five nearest, of 100
    names: its own and 99 random others. style: how often a painted drawing is nearer to another
    drawing in the same style than to that other drawing in a different style.
    """
    art = data.Art(role="held-out", size=clip.config.resolution)
    rng = np.random.default_rng(0)
    picks, others = rng.integers(len(art.names), size=(2, count))
    usual = [styles.sample(rng) for _ in range(count)]       # some of them as drawn
    looks = [styles.sample(rng, plain=0.0) for _ in range(count)]

    def features(which, looks):
        painted = [styles.apply(look, art.drawings[i], rng) for i, look in zip(which, looks)]
        return image_features(clip, to_tensor(np.stack(painted))).cpu()

    usual_features = features(picks, usual)
    reference = features(picks, looks)
    same_style = features(others, looks)
    other_style = features(others, looks[1:] + looks[:1])
    prefers = (reference * same_style).sum(1) > (reference * other_style).sum(1)

    names = sorted(set(art.names))
    phrases = clip.tokenize([data.content_phrase(name) for name in names])
    texts = torch.cat([clip.encode_text(part) for part in phrases.split(128)]).cpu()
    texts = F.normalize(texts.float(), dim=-1)
    scores = usual_features @ texts.T                        # (count, names)
    targets = torch.tensor([names.index(art.names[i]) for i in picks])[:, None]
    order = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
    order = order.scatter(1, targets, 2.0)        # 2.0 puts the right name among the `candidates`
    candidates = order.topk(min(among, len(names)), dim=1).indices           # (count, among)
    rank = (scores.gather(1, candidates) > scores.gather(1, targets)).sum(1)
    return dict(top1=(rank < 1).float().mean().item(), top5=(rank < 5).float().mean().item(),
                style=prefers.float().mean().item())


if __name__ == "__main__":
    run_command(main)
