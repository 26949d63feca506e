"""Quality that means something: a classifier that shares nothing with what it measures.

    python experiments/quality.py --train --workers 8       # experiments/quality.pt
    python experiments/quality.py --train --chunks 1100 --reuse 2        # an hour of one core
    python experiments/quality.py --choose                  # results/sweep.md: sampling settings
    python experiments/quality.py --grids                   # results/quality.md, sheets of samples

A class judge alone is easily pleased: the pixel mean of a class's drawings, or a picture torn to
pieces by guidance, is named as surely as a drawing. So beside every share of names stand a Fréchet
distance (Heusel et al. 2017, with this classifier's features for Inception's) and two controls:
that pixel mean, and a single decoding step.

The classifier is convolutions on pixels, trained on the drawings of the training sets and nothing
else: no CLIP, no tokenizer, no judge.py. A tenth of the drawings it never sees (`is_new`): what it
says of those is how far it can be trusted, and stands in every report. G has seen all of them.

Shapes: B pictures (B, 3, 64, 64) in [-1, 1], D features, K names.
"""

import argparse
import copy
import json
import math
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from data import Scene, scenes, styles  # noqa: E402
from data.pictures import grid  # noqa: E402
from commandline import Parser, number, run_command  # noqa: E402
from experiments.common import (among, give_back, heading, keep, mean_and_error,  # noqa: E402
                                numbers_of, resume, table, write_png, write_text)
from pretrain.common import machine  # noqa: E402
from styledrop import (Sampling, StyleDrop, autocast, load_model, save_model,  # noqa: E402
                       to_tensor, to_uint8)

COLOURS = list(scenes.COLOURS)
KINDS = {"one": 0.52, "coloured": 0.16, "several": 0.16, "two": 0.16}          # of its pictures
SWEEP = dict(lambda_b=(0.5, 1, 1.5, 2), top_k=(0, 3, 8, 32), temperature=(0.5, 1, 2, 4.5),
             steps=(8, 12, 18, 36))
THINGS = ("cat", "house", "deciduous-tree", "automobile", "mushroom", "rocket", "fish", "owl",
          "teapot", "guitar")
IN_WORDS = ("", "flat", "watercolor", "gold and purple", "pixel art on teal", "line drawing",
            "halftone", "stained glass")                    # the last is held out of all training
EVERY = 50                              # chunks from one line of the log to the next


# ---------------------------------------------------------------------------------------------
# The classifier

@dataclass
class ClassifierConfig:
    widths: tuple = (48, 96, 192, 256)  # channels at 32, 16, 8 and 4 pixels a side; the last is D
    names: int = 837                    # K
    colours: int = 11


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a skip (He et al. 2015); the first may halve the side."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out))
        self.skip = nn.Sequential(nn.AvgPool2d(stride), nn.Conv2d(c_in, c_out, 1, bias=False))

    def forward(self, x):
        return F.relu(self.skip(x) + self.body(x))


class Classifier(nn.Module):
    """One trunk, three heads.

    names: a softmax over K. A picture of two objects has half the mass on each; both are seen
    where they are the two likeliest: simpler than K sigmoids, of which 836 say no to every picture.
    colour: of the object; trained and asked only where it was recoloured. There is no "none": an
    apple may be red without paint. count: 1 to 4 of one class.
    """

    def __init__(self, config):
        super().__init__()
        self.config, w = config, config.widths
        self.enter = nn.Sequential(nn.Conv2d(3, w[0], 5, 2, 2, bias=False), nn.BatchNorm2d(w[0]),
                                   nn.ReLU(), Residual(w[0], w[0], 1))
        self.trunk = nn.Sequential(*(Residual(a, b, 2) for a, b in zip(w, w[1:])))
        heads = dict(names=config.names, colour=config.colours, count=4)
        self.heads = nn.ModuleDict({head: nn.Linear(w[-1], n) for head, n in heads.items()})

    def forward(self, images):
        """(B, 3, 64, 64) -> features (B, D), names (B, K), colour (B, colours), count (B, 4)."""
        x = self.trunk(self.enter(images)).float().mean((2, 3))
        return {"features": x} | {name: head(x) for name, head in self.heads.items()}


def load_classifier(path):
    """Raises ValueError if the file is none, or its words are not those of data/ now."""
    net, saved = load_model(path, "classifier", ClassifierConfig, Classifier)
    if saved["names"] != data.names() or saved["colours"] != COLOURS:
        raise ValueError(f"{path} was trained for other words than data/ has now; train it again")
    return net, saved


@torch.no_grad()
def look(net, images):
    """What the classifier says of pictures: forward's dict, on the CPU."""
    device = next(net.parameters()).device
    seen = [net(x.to(device)) for x in images.split(256)]
    return {name: torch.cat([each[name] for each in seen]).cpu() for name in seen[0]}


# ---------------------------------------------------------------------------------------------
# Pictures with their labels (B, 4): name, second name (or the first again), colour, count;
# -1 is not asked

def is_new(art):
    """(n,) bool: the drawings that the classifier is not trained on, about a tenth."""
    pairs = zip(art.names, art.sets)
    return np.array([zlib.crc32("|".join(pair).encode()) % 10 == 0 for pair in pairs])


def part(art, keep):
    """The Art of the drawings where keep (n,) is true."""
    some, picks = copy.copy(art), np.flatnonzero(keep)
    some.drawings = art.drawings[picks]
    for field in ("names", "sets", "hands", "boxes"):
        setattr(some, field, [getattr(art, field)[i] for i in picks])
    some.index = {s: {} for s in art.index}
    for i, (name, s) in enumerate(zip(some.names, some.sets)):
        some.index[s][name] = i
    some.names_of = {s: tuple(found) for s, found in some.index.items()}
    return some


def labels_of(scene):
    """A list of 4. Only scenes of one class have a colour and a number to be asked for."""
    is_one, number_of = len(scene.things) == 1, data.names().index
    colour = scene.colours[0] if scene.colours and is_one else ""
    return [number_of(scene.things[0]), number_of(scene.things[-1]),
            COLOURS.index(colour) if colour else -1, scene.count - 1 if is_one else -1]


def draw(art, scene, rng, in_styles, set_name=None):
    """The scene from any icon set, or from one, as drawn or in a random style: (64, 64, 3)."""
    style = styles.sample(rng, rng.random() < 0.2, plain=0) if in_styles else styles.Style()
    style = styles.keep_colours(style) if scene.colours else style
    return styles.apply(style, scenes.draw(scene, art, rng, 64, set_name), rng)


class Chunks(torch.utils.data.Dataset):
    """Chunk number i, always the same one: `size` scenes, half of them in random styles."""

    def __init__(self, art, size, seed):
        self.art, self.size, self.seed = art, size, seed

    def __len__(self):
        return 2 ** 31

    def __getitem__(self, chunk):
        """-> uint8 (size, 64, 64, 3), labels (size, 4). The base's held-out pairs are here too."""
        rng, images, labels = np.random.default_rng((self.seed, chunk)), [], []
        for _ in range(self.size):
            icon_set = self.art.sets[rng.integers(len(self.art.sets))]
            kind = scenes.pick(rng, KINDS)
            held_out = kind != "one" and rng.random() < 0.2
            scene = scenes.sample(rng, held_out, self.art.names_of[icon_set], kind)
            images.append(draw(self.art, scene, rng, rng.random() < 0.5, icon_set))
            labels.append(labels_of(scene))
        return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def vary(images, generator):
    """Cheap changes, so that a rendered picture serves several times: mirrored (which confuses two
    magnifying glasses), bent, moved, softened, brighter. (B, 3, H, W); generator: a CPU's."""
    B, device = len(images), images.device
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    chance = lambda *shape: torch.rand(*shape, generator=generator)
    matrix = torch.eye(2) + 0.06 * normal(B, 2, 2)
    matrix[:, :, 0] *= torch.where(chance(B, 1) < 0.5, -1.0, 1.0)
    matrix = torch.cat([matrix, 0.05 * normal(B, 2, 1)], 2).to(device)
    where = F.affine_grid(matrix, images.shape, align_corners=False)
    images = F.grid_sample(images, where, padding_mode="border", align_corners=False)
    soft = (chance(B, 1, 1, 1) * (chance(B, 1, 1, 1) < 0.5)).to(device)
    blurred = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    light = 1 + 0.08 * normal(B, 1, 1, 1).to(device)
    return (torch.lerp(images, blurred, soft) * light).clamp(-1, 1)


# ---------------------------------------------------------------------------------------------
# Training

def train_step(net, optimiser, images, labels):
    """One step; half of the names' loss for each of two objects, colour and count where asked.

    Returns the loss, a tensor that nobody has waited for yet.
    """
    first, second, colour, count = labels.unbind(1)
    with autocast(images.device.type):
        seen = net(images.contiguous(memory_format=torch.channels_last))
    names = lambda target: F.cross_entropy(seen["names"].float(), target, label_smoothing=0.05)
    asked = lambda head, target: F.cross_entropy(seen[head].float(), target, ignore_index=-1,
                                                 reduction="sum") / len(target)
    loss = (names(first) + names(second)) / 2 + asked("colour", colour) + asked("count", count) / 2
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.detach()


def train(args, art, net):
    """Each chunk of fresh pictures takes the oldest one's place in a pool; `reuse` batches follow.

    Goes on from a checkpoint exactly where it stopped: the pool is rendered again.
    Returns net and the seconds spent on it, all runs together.
    """
    net = net.to(args.device, memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=0.05)
    recipe = {k: getattr(args, k) for k in ("chunks", "reuse", "batch", "pool", "lr", "seed")}
    checkpoint, kind = Path(args.classifier).with_suffix(".checkpoint"), "classifier in training"
    parts = dict(net=net, optimiser=optimiser)
    done, spent = resume(checkpoint, kind, recipe, **parts)
    chunks = range(max(0, done - args.pool + 1), args.chunks) if done < args.chunks else range(0)
    loader = torch.utils.data.DataLoader(Chunks(art, args.batch, args.seed), batch_size=None,
                                         sampler=chunks, num_workers=args.workers)
    size = args.pool * args.batch
    pool = torch.zeros(size, 3, 64, 64, dtype=torch.uint8, device=args.device)
    targets = torch.zeros(size, 4, dtype=torch.long, device=args.device)
    started = kept = time.time()
    began, first, losses = None, done, []
    for chunk, (images, labels) in zip(chunks, loader):
        at = chunk % args.pool * args.batch
        pool[at:at + args.batch] = images.permute(0, 3, 1, 2).to(args.device)
        targets[at:at + args.batch] = labels.to(args.device)
        if chunk < done:
            continue                                        # only filling the pool again
        began = began or time.time()
        generator = torch.Generator().manual_seed(1000003 * args.seed + chunk)
        for i in range(args.reuse):
            u = (chunk + i / args.reuse) / args.chunks
            lr = args.lr * min(1, u / 0.05) * (1 + math.cos(math.pi * u)) / 2
            optimiser.param_groups[0]["lr"] = lr
            full = min(size, (chunk + 1) * args.batch)
            rows = torch.randint(full, (args.batch,), generator=generator).to(args.device)
            pictures = vary(pool[rows].float() / 127.5 - 1, generator)
            losses.append(train_step(net, optimiser, pictures, targets[rows]))
        done = chunk + 1
        if done % EVERY == 0 or done == args.chunks:
            loss = torch.stack(losses).mean().item()
            speed = (done - first) * args.batch / (time.time() - began)          # pictures a second
            left = (args.chunks - done) * args.batch / speed / 60
            print(f"chunk {done}/{args.chunks}  loss {loss:.3f}  {speed:.0f} rendered and "
                  f"{speed * args.reuse:.0f} seen a second  {left:.1f} min left", flush=True)
            losses = []
        if time.time() - kept > 60 or done == args.chunks:
            keep(checkpoint, kind, recipe, done, spent + time.time() - started, **parts)
            kept = time.time()
    return net.eval(), spent + (time.time() - started if done > first else 0)


# ---------------------------------------------------------------------------------------------
# Numbers

def frechet(x, y):
    """Fréchet distance of features x (n, D) and y (m, D), each taken as a Gaussian:

    |mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x^1/2 C_y C_x^1/2)^1/2). In float64, the roots by eigh, so
    they are real. Few pictures make it too large: compare only what has the same n.
    """
    x, y = x.double(), y.double()
    C_x, C_y = torch.cov(x.T), torch.cov(y.T)
    variance, directions = torch.linalg.eigh(C_x)
    root = directions * variance.clamp(min=0).sqrt() @ directions.T
    middle = torch.linalg.eigvalsh(root @ C_y @ root).clamp(min=0).sqrt().sum()
    apart = (x.mean(0) - y.mean(0)).square().sum()
    return (apart + C_x.trace() + C_y.trace() - 2 * middle).item()


def share(values):
    """(mean, standard error) in percent over names or prompts: values (n,) or (n, per)."""
    values = values.double().flatten(1).mean(1) if values.dim() > 1 else values
    return tuple(100 * x for x in mean_and_error(values))


def table_of(found):
    """{row: {column: number or (mean, error) in percent}} -> lines of Markdown."""
    cell = lambda x: f"{x:.3g}" if isinstance(x, float) else f"{x[0]:.1f} ± {x[1]:.1f} %"
    rows = [[name, *map(cell, row.values())] for name, row in found.items()]
    return ["", *table(["", *next(iter(found.values()))], rows)]


# ---------------------------------------------------------------------------------------------
# Pictures to look at, all (B, 3, 64, 64) on the CPU

def sample(pipe, prompts, seed, **sampling):
    """One picture of each prompt by the base; larger ones are made smaller by area."""
    images = pipe.generate(prompts, seed=1000 * seed, **sampling).cpu()
    return F.interpolate(images, size=(64, 64), mode="area")


def real(art, chosen, rng, in_styles=False, sets=None):
    """Scenes from drawings of any icon set, or of those named in sets."""
    sets = sets or [None] * len(chosen)
    images = [draw(art, scene, rng, in_styles, s) for scene, s in zip(chosen, sets)]
    return to_tensor(np.stack(images))


def class_means(art, names):
    """Control: the pixel mean of each name's drawings, no model at all."""
    found = {}
    for name, drawing in zip(art.names, art.drawings):
        picture = styles.apply(styles.Style(), drawing, np.random.default_rng(0))
        found.setdefault(name, []).append(picture.astype(np.float32))
    return to_tensor(np.stack([np.mean(found[name], 0) for name in names]))


# ---------------------------------------------------------------------------------------------
# Measuring: -> {row: {column: number or (mean, error)}}

def row_of(net, images, names, per=1, reference=None):
    """`per` pictures in a row of each name: distance to the reference features, and names seen."""
    seen, row = look(net, images), {}
    if reference is not None:
        row["Fréchet distance"] = frechet(reference, seen["features"])
    wanted = numbers_of(names)
    first = seen["names"].argmax(1) == wanted
    row["named, of all"] = share(first.view(-1, per))
    row["named, of 100"] = share(among(seen["names"], wanted).view(-1, per))
    return row


def measure_itself(net, art, openmoji, count, seed):
    """The classifier's own figures on real drawings that it knows or not, or nobody does."""
    rows, new = {}, is_new(art)
    for title, some in (("drawings it was trained on", part(art, ~new)),
                        ("drawings it never saw", part(art, new)), ("OpenMoji", openmoji)):
        for in_styles in (False, True):
            rng = np.random.default_rng(seed)
            names = [str(name) for name in rng.choice(sorted(set(some.names)), count)]
            images = real(some, [Scene((name,)) for name in names], rng, in_styles)
            words = "in random styles" if in_styles else "as drawn"
            rows[f"{title}, {words}"] = row_of(net, images, names)
    return rows


def measure_plain(net, pipe, art, names, per, seed, sampling):
    """Plain prompts ("a cat"): samples between real drawings and controls."""
    names, rng = [name for name in names for _ in range(per)], np.random.default_rng(seed)
    prompts, chosen = [data.content_phrase(n) for n in names], [Scene((n,)) for n in names]
    known, new = part(art, ~is_new(art)), part(art, is_new(art))
    reference = look(net, real(known, chosen, rng))["features"]
    others, one_step = real(known, chosen, rng), sampling | dict(steps=1)
    images = {"real, other draws": others,
              "real, never seen by the classifier": real(new, chosen, rng),
              "given back by the tokenizer": give_back(pipe, others),
              "**samples**": sample(pipe, prompts, seed, **sampling),
              "samples of the base alone": sample(pipe, prompts, seed, superres=False, **sampling),
              "control: class mean": class_means(art, names),
              "control: one decoding step": sample(pipe, prompts, seed, **one_step)}
    return {title: row_of(net, x, names, per, reference) for title, x in images.items()}


QUESTIONS = {"colours, trained": ("coloured", False), "colours, held-out": ("coloured", True),
             "counts": ("several", False), "plurals": ("several", False),
             "two things, trained": ("two", False), "two things, held-out": ("two", True)}


def ask_for(title, art, count, rng):
    """Scenes of drawings that are all in one set, the sets, and prompts for them."""
    kind, held_out = QUESTIONS[title]
    sets = [art.sets[i] for i in rng.integers(len(art.sets), size=count)]
    chosen = [scenes.sample(rng, held_out, art.names_of[s], kind) for s in sets]
    prompts = [scenes.phrase(scene) for scene in chosen]
    if title == "plurals":                                  # "two cats" -> "cats": at least two
        prompts = [words.split(" ", 1)[1] for words in prompts]
    return chosen, sets, prompts


def obeyed(seen, chosen, title):
    """What look() saw against the scenes asked for -> {what: (n,) 1, 0, or nan if not asked}."""
    first, second, colour, count = torch.tensor([labels_of(scene) for scene in chosen]).unbind(1)
    if title.startswith("two things"):
        best = seen["names"].topk(2).indices
        one, other = ((best == name[:, None]).any(1) for name in (first, second))
        return {"one of them": one | other, "both": one & other}
    thing, number = seen["names"].argmax(1) == first, seen["count"].argmax(1)
    is_coloured = (seen["colour"].argmax(1) == colour).double().where(colour >= 0, math.nan)
    right = {} if title.startswith("colours") else (
        {"at least two": number > 0} if title == "plurals" else {"number": number == count})
    right |= {"colour": is_coloured, "thing": thing}
    together = torch.stack([v.double().nan_to_num(1) for v in right.values()])
    return right | {"all of it": together.amin(0)}


def measure_words(net, pipe, art, count, seed, sampling):
    """Control: what the next prompt's sample shows, by chance, of what this one asks for."""
    rows, new = {}, part(art, is_new(art))
    for i, title in enumerate(QUESTIONS):
        rng = np.random.default_rng((seed, i))
        chosen, sets, prompts = ask_for(title, new, count, rng)
        drawn, samples = real(art, chosen, rng), sample(pipe, prompts, seed, **sampling)
        images = {"samples": samples, "control": samples.roll(1, 0),
                  "given back": give_back(pipe, drawn), "real": drawn,
                  "real, never seen": real(new, chosen, rng, sets=sets)}
        verdicts = {name: obeyed(look(net, x), chosen, title) for name, x in images.items()}
        for what in verdicts["real"]:
            rows[f"{title}: {what}"] = {name: share(v[what]) for name, v in verdicts.items()}
        print(title, prompts[:3], flush=True)
    return rows


def defaults():
    """{setting: value} of those in SWEEP."""
    return {k: getattr(Sampling(), k) for k in SWEEP}


def words_of(setting):
    return ", ".join(f"{k} {v:g}" for k, v in setting.items())


def choose(net, pipe, art, names, per, seed, sampling, rows, done):
    """One setting after the other that is not given, the best value kept -> all of the best.

    Best: most names for the least distance, named / Fréchet. Alone, each has a trivial winner:
    guidance that tears every picture, or none at all. rows: {all settings: row}, of an earlier run
    too; done() after each that is new. Of the first stage, whose settings they are.
    """
    names, top = [name for name in names for _ in range(per)], -1
    prompts, chosen = [data.content_phrase(n) for n in names], [Scene((n,)) for n in names]
    rng, known = np.random.default_rng(seed), part(art, ~is_new(art))
    reference = look(net, real(known, chosen, rng))["features"]
    best = defaults() | sampling
    for k in [k for k in SWEEP if k not in sampling]:
        for setting in [best, *(best | {k: value} for value in SWEEP[k])]:
            title = words_of(setting)
            if title not in rows:
                images = sample(pipe, prompts, seed, superres=False, **setting)
                row = rows[title] = row_of(net, images, names, per, reference)
                row["named / distance"] = row["named, of all"][0] / row["Fréchet distance"]
                print(table_of(rows)[-2], flush=True)
                done()
            if rows[title]["named / distance"] > top:
                top, best = rows[title]["named / distance"], setting
    return best


def sheets(pipe, seed, sampling):
    """{file name: sheet of samples}: the first seed, nothing chosen."""
    say = lambda *scene: scenes.phrase(Scene(*scene))
    several = {"one": ((), 1), "two": ((), 2), "three": ((), 3), "four": ((), 4),
               "three red": (("red",), 3)}
    number_of = lambda x, words: (say((x,), *several[words]) if words in several
                                  else data.plural(data.noun(x)))
    plans = {                                   # rows, columns, prompt of row and column
        "things_styles": (IN_WORDS, THINGS, lambda style, x: data.caption(say((x,)), style)),
        "colours_things": (COLOURS, THINGS[:8], lambda colour, x: say((x,), (colour,))),
        "counts": (THINGS, [*several, "(no number)"], number_of),
        "two_things": (THINGS[:7], THINGS[:7], lambda x, y: say((x, y) if x != y else (x,)))}
    out, word = {}, lambda x: data.noun(x) if x in THINGS else x or "no style"
    for name, (rows, columns, prompt) in plans.items():
        prompts = [prompt(r, c) for r in rows for c in columns]
        images = to_uint8(pipe.generate(prompts, seed=1000 * seed, **sampling))
        sheet = grid(images, len(columns), 1, 4, list(map(word, columns)), list(map(word, rows)))
        out[name] = sheet.quantize(256)                     # a third of the bytes
    return out


# ---------------------------------------------------------------------------------------------
# The three commands

def train_command(args, about):
    art = data.Art(smallest=0.75, bent=0.04)
    torch.manual_seed(args.seed)
    net = Classifier(ClassifierConfig(names=len(data.names()), colours=len(COLOURS)))
    net, seconds = train(args, part(art, ~is_new(art)), net)
    provenance = about() | {k: getattr(args, k) for k in ("chunks", "reuse", "batch", "lr", "seed")}
    provenance["seconds"] = round(seconds)
    save_model(args.classifier, "classifier", net, provenance, names=data.names(), colours=COLOURS)
    net = load_classifier(args.classifier)[0].to(args.device)        # measured is what was saved
    openmoji = data.Art(role="held-out", smallest=0.9)
    rows = measure_itself(net, data.Art(smallest=0.9), openmoji, args.scenes, args.seed)
    print(f"{args.classifier}: {Path(args.classifier).stat().st_size / 1e6:.1f} MB")
    print(*table_of(rows), sep="\n")


def parts_of(args):
    """-> classifier, its provenance, pipe, art, settings given, names to choose on and to report."""
    net, saved = load_classifier(args.classifier)
    net, pipe = net.to(args.device), StyleDrop.load(args.weights, args.device)
    art = data.Art(smallest=0.9)
    sampling = {k: v for k in SWEEP if (v := getattr(args, k)) is not None}
    names = sorted(set(part(art, is_new(art)).names))       # each has a drawing of either kind
    names = [str(n) for n in np.random.default_rng(args.seed).permutation(names)[:args.names]]
    return net, saved["provenance"], pipe, art, sampling, names[::2], names[1::2]


def choose_command(args, about):
    """Goes on from what sweep.json has of the same recipe."""
    net, _, pipe, art, sampling, names, _ = parts_of(args)
    file = Path(args.out) / "sweep.json"
    recipe = dict(base=pipe.base, names=len(names), per=args.per, seed=args.seed)
    found = json.loads(file.read_text()) if file.exists() else {}
    rows = found["rows"] if found.get("recipe") == recipe else {}

    def done():
        write_text(file, json.dumps(about() | dict(recipe=recipe, rows=rows), indent=1))
    best = choose(net, pipe, art, names, args.per, args.seed, sampling, rows, done)
    lines = [*heading("Sampling settings"), f"Base {pipe.base}, first stage alone, {args.per} "
             f"pictures of each of {len(names)} names, none of which quality.md reports; one "
             "setting after the other, the best value by named / distance kept: "
             f"{words_of(best)}.", *table_of(rows)]
    write_text(Path(args.out) / "sweep.md", "\n".join(lines) + "\n")
    print(*lines, sep="\n")


def measure_command(args, about):
    net, trained, pipe, art, sampling, _, names = parts_of(args)
    openmoji, found = data.Art(role="held-out", smallest=0.9), {}
    found["classifier"] = measure_itself(net, art, openmoji, args.scenes, args.seed)
    found["plain"] = measure_plain(net, pipe, art, names, args.per, args.seed + 1, sampling)
    found["words"] = measure_words(net, pipe, art, args.scenes, args.seed, sampling)
    if args.grids:
        for name, sheet in sheets(pipe, args.seed, sampling).items():
            write_png(Path(args.out) / f"{name}.png", sheet)
    about = about() | dict(base=pipe.base, sampling=defaults() | sampling, names=len(names),
                           per=args.per, prompts=args.scenes, classifier=trained)
    lines = [
        *heading("Quality"), f"Base {pipe.base}, sampled at {words_of(about['sampling'])}; "
        f"{about['machine']}, {about['seconds']} s. ± is one standard error, over names or "
        "prompts.", "", "## Plain prompts", "",
        f"{len(names)} names that the sweep of the settings did not meet (sweep.md), {args.per} "
        "pictures of each in every row; distances are to as many real drawings, and shrink with "
        "more pictures: compare only what has this n. An object is named among all "
        f"{len(data.names())}, or among 100. The class mean is one picture a name, repeated. Other "
        "draws are often of the reference's own drawings, placed anew: a floor that is a little "
        "too low.", *table_of(found["plain"]),
        "## More than one word", "", f"{args.scenes} prompts each. Control: what the next prompt's "
        "sample shows of it by chance. Real: composed of drawings that the classifier mostly "
        "knows; given back: the same by the tokenizer; never seen: of drawings it does not know.",
        *table_of(found["words"]), "## The classifier itself", "",
        f"{args.scenes} real drawings a row. Trained by `{trained['command']}` in "
        f"{trained['seconds']} s. The base was trained on all but OpenMoji.",
        *table_of(found["classifier"])]
    text = "\n".join(lines) + "\n"
    write_text(Path(args.out) / "quality.md", text)
    write_text(Path(args.out) / "quality.json", json.dumps(about | found, indent=1))
    print(text)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", action="store_true", help="train the classifier")
    add("--classifier", default="experiments/quality.pt")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--chunks", type=number(int, 1), default=1600, help="batches of freshly rendered pictures")
    add("--reuse", type=number(int, 1), default=4, help="steps on the pool for each chunk")
    add("--pool", type=number(int, 1), default=64, help="chunks in the pool")
    add("--batch", type=number(int, 2), default=256)
    add("--lr", type=number(float, 0, strict=True), default=2e-3, help="at the top")
    add("--workers", type=number(int, 0), default=1, help="processes that render (0: this one)")
    add("--weights", default="weights/tiny", help="folder of the base to measure")
    add("--out", default="experiments/results")
    add("--names", type=number(int, 4), default=256)
    add("--per", type=number(int, 1), default=2, help="pictures of each name")
    add("--scenes", type=number(int, 2), default=256, help="prompts for each other question")
    for name, value in defaults().items():
        add(f"--{name.replace('_', '-')}", type=number(type(value), 0),
            help="(default: the pipeline's)")
    add("--choose", action="store_true", help="sweep the settings on the other half of the names")
    add("--grids", action="store_true", help="four sheets of samples as well")
    add("--seed", type=number(int, 0), default=0)
    args, began = parser.parse_args(), time.time()

    def about():
        return dict(command=f"python {' '.join(sys.argv)}", seconds=round(time.time() - began),
                    machine=machine())
    command = train_command if args.train else choose_command if args.choose else measure_command
    command(args, about)


if __name__ == "__main__":
    run_command(main)
