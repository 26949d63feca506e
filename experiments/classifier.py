"""The classifier by which quality.py judges a base: it names objects, colours and numbers.

    python -m experiments.classifier        # experiments/quality.pt; 2 hours, 4 minutes on a GPU

It is a convolutional network on pixels and uses no part of what it judges: neither CLIP nor the
tokenizer. It is trained on the emoji sets' objects only. A tenth of their drawings are kept out of
its training (`is_new`). Its accuracy on those says how far it can be trusted, and every report
states it.

Shapes: B images (B, 3, 64, 64) in [-1, 1], D features, K names.
"""

import copy
import math
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from checkpoint.files import check_place
from checkpoint.weights import load_model, save_model
from commandline.options import Parser, filled, number, whole
from commandline.terminal import run_command, say
from data import Scene, scenes, styles
from data.english import read_table
from experiments.common import among, command, percent, table
from pretrain.common import machine
from styledrop import autocast, check_device, to_tensor

FILE = Path(__file__).with_name("quality.pt")
EMOJI = ("noto", "noto-v1", "twemoji", "fluent-emoji", "fluent-emoji-flat")
COLOURS = list(scenes.COLOURS)
KINDS = {"one": 0.52, "coloured": 0.16, "several": 0.16, "two": 0.16}    # shares of its images


# --------------------------------------------------------------------------------------------------
# The model

@dataclass
class ClassifierConfig:
    widths: tuple = (48, 96, 192, 256)  # channels at sides of 32, 16, 8, 4 pixels; the last is D
    names: int = 837                    # K
    colours: int = 11


class Residual(nn.Module):
    """Two 3 x 3 convolutions and a skip connection (He et al. 2016)."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out))
        self.skip = nn.Sequential(nn.AvgPool2d(stride), nn.Conv2d(c_in, c_out, 1, bias=False))

    def forward(self, x):
        return F.relu(self.skip(x) + self.body(x))


class Classifier(nn.Module):
    """A small ResNet with three heads.

    names: a softmax over the K names. colour: of the object; trained and asked only where the
    object was recoloured, since an apple may be red without paint. count: one to four of a kind.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        widths = config.widths
        self.enter = nn.Sequential(
            nn.Conv2d(3, widths[0], 5, 2, 2, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(),
            Residual(widths[0], widths[0], 1))
        self.trunk = nn.Sequential(*(Residual(a, b, 2) for a, b in zip(widths, widths[1:])))
        self.heads = nn.ModuleDict({"names": nn.Linear(widths[-1], config.names),
                                    "colour": nn.Linear(widths[-1], config.colours),
                                    "count": nn.Linear(widths[-1], 4)})

    def forward(self, images):
        """A dict of features (B, D), names (B, K), colour (B, colours) and count (B, 4)."""
        features = self.trunk(self.enter(images)).float().mean((2, 3))
        predictions = {"features": features}
        for name, head in self.heads.items():
            predictions[name] = head(features)
        return predictions


def load_classifier(path=FILE, device="cpu"):
    """A trained Classifier, with the lists `.known_names` and `.known_colours` of its file."""
    net, saved = load_model(path, "classifier", ClassifierConfig, Classifier)
    net.known_names, net.known_colours = saved["names"], saved["colours"]
    net.provenance = saved["provenance"]
    return net.to(device)


@torch.no_grad()
def predict(net, images):
    """The classifier's predictions for images: the dict of `forward`, on the CPU."""
    device = next(net.parameters()).device
    parts = [net(part.to(device)) for part in images.split(256)]
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def classes_of(net, names):
    """The classes of some names: (B,)."""
    return torch.tensor([net.known_names.index(name) for name in names])


# --------------------------------------------------------------------------------------------------
# Drawings and images of them

def emoji_objects(names=None, sets=None, **settings):
    """An Art of the emoji sets' drawings of some names, by default of all that are not people.

    It includes the drawings that are kept out of the base's training. sets: other icon sets;
    settings: further arguments of data.Art.
    """
    if names is None:
        names = {row["name"] for row in read_table("names.tsv")
                 if row["set"] in EMOJI and not row["sheet"].endswith("-people")}
    art = data.Art(sets or EMOJI, kept_out=None, **settings)
    return part(art, [name in names for name in art.names])


def part(art, keep):
    """The Art of the drawings for which keep (n,) is true."""
    rows = np.flatnonzero(keep)
    subset = copy.copy(art)
    subset.drawings = art.drawings[rows]
    for field in ("names", "sets", "style_phrases", "boxes", "middles"):
        values = getattr(art, field)
        setattr(subset, field, [values[i] for i in rows])
    subset.make_index(art.index)
    return subset


def is_new(art):
    """(n,) bool: the drawings that the classifier is not trained on, about a tenth of them.

    If all drawings of a name would be chosen, none of them is.
    """
    pairs = zip(art.names, art.sets)
    chosen = [zlib.crc32("|".join(pair).encode()) % 10 == 0 for pair in pairs]
    known = {name for name, is_chosen in zip(art.names, chosen) if not is_chosen}
    return np.array([is_chosen and name in known for name, is_chosen in zip(art.names, chosen)])


def paint(art, scene, rng, in_style, set_name=None):
    """A scene as drawn or in a random style with words: uint8 (64, 64, 3).

    set_name: the icon set whose drawings are used, by default any that has all of the scene.
    """
    style = styles.Style()
    if in_style:
        style = styles.sample(rng, held_out=rng.random() < 0.2, plain=0, free=0)
    if scene.colours:
        style = styles.keep_colours(style)
    return styles.apply(style, scenes.draw(scene, art, rng, 64, set_name), rng)


def labels_of(scene, names):
    """[first name, second name (or the first again), colour, count - 1]; -1 means no label.

    Only scenes with one kind of object have labels for colour and count.
    """
    colour = count = -1
    if len(scene.things) == 1:
        count = scene.count - 1
        if any(scene.colours):
            colour = COLOURS.index(scene.colours[0])
    return [names.index(scene.things[0]), names.index(scene.things[-1]), colour, count]


# --------------------------------------------------------------------------------------------------
# Training

class Chunks(torch.utils.data.Dataset):
    """Item number i, always the same one: `size` scenes, half of them in random styles."""

    def __init__(self, art, names, size, seed):
        self.art = art
        self.names = names
        self.size = size
        self.seed = seed

    def __len__(self):
        return 2 ** 31

    def __getitem__(self, chunk):
        """uint8 (size, 64, 64, 3) and labels (size, 4). The base's held-out pairs are here too."""
        rng = np.random.default_rng((self.seed, chunk))
        images = []
        labels = []
        for _ in range(self.size):
            icon_set = self.art.sets[rng.integers(len(self.art.sets))]
            kind = scenes.pick(rng, KINDS)
            held_out = kind != "one" and rng.random() < 0.2
            scene = scenes.sample(rng, held_out, self.art.names_of[icon_set], kind)
            images.append(paint(self.art, scene, rng, rng.random() < 0.5, icon_set))
            labels.append(labels_of(scene, self.names))
        return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def vary(images, generator):
    """Mirror, warp, shift, blur and relight images, so that each can be used several times.

    images (B, 3, H, W) on any device; generator: a CPU's.
    """
    B = len(images)
    device = images.device
    matrix = torch.eye(2) + 0.06 * torch.randn(B, 2, 2, generator=generator)
    mirrored = torch.rand(B, 1, generator=generator) < 0.5
    matrix[:, :, 0] *= torch.where(mirrored, -1.0, 1.0)
    shift = 0.05 * torch.randn(B, 2, 1, generator=generator)
    where = F.affine_grid(torch.cat([matrix, shift], 2).to(device), images.shape,
                          align_corners=False)
    images = F.grid_sample(images, where, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    strength = torch.rand(B, 1, 1, 1, generator=generator)
    strength = strength * (torch.rand(B, 1, 1, 1, generator=generator) < 0.5)
    light = 1 + 0.08 * torch.randn(B, 1, 1, 1, generator=generator)
    return (torch.lerp(images, blurred, strength.to(device)) * light.to(device)).clamp(-1, 1)


def loss_of(predictions, labels):
    """Cross-entropy of names (half for each of two objects), of colour and count if labelled."""
    first, second, colour, count = labels.unbind(1)
    names = predictions["names"].float()
    loss = F.cross_entropy(names, first, label_smoothing=0.05) / 2
    loss = loss + F.cross_entropy(names, second, label_smoothing=0.05) / 2
    for head, target, weight in (("colour", colour, 1.0), ("count", count, 0.5)):
        total = F.cross_entropy(predictions[head].float(), target, ignore_index=-1, reduction="sum")
        loss = loss + weight * total / len(target)
    return loss


def train(net, art, names, args):
    """Each chunk of new images replaces the oldest in a pool; `reuse` steps on the pool follow."""
    net = net.to(args.device, memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=0.05)
    loader = torch.utils.data.DataLoader(
        Chunks(art, names, args.batch, args.seed), batch_size=None, sampler=range(args.chunks),
        num_workers=args.workers)
    size = args.pool * args.batch
    pool = torch.zeros(size, 64, 64, 3, dtype=torch.uint8, device=args.device)
    labels = torch.zeros(size, 4, dtype=torch.long, device=args.device)
    generator = torch.Generator().manual_seed(args.seed)
    for chunk, (new, new_labels) in enumerate(loader):
        place = (chunk % args.pool) * args.batch
        pool[place:place + args.batch] = new.to(args.device)
        labels[place:place + args.batch] = new_labels.to(args.device)
        filled = min(size, (chunk + 1) * args.batch)
        for i in range(args.reuse):
            u = (chunk + i / args.reuse) / args.chunks       # how far the training is
            rate = min(1, u / 0.05) * (1 + math.cos(math.pi * u)) / 2
            optimiser.param_groups[0]["lr"] = args.lr * rate
            rows = torch.randint(filled, (args.batch,), generator=generator).to(args.device)
            images = vary(to_tensor(pool[rows]), generator)
            with autocast(args.device):
                predictions = net(images.contiguous(memory_format=torch.channels_last))
            loss = loss_of(predictions, labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if (chunk + 1) % 50 == 0 or chunk + 1 == args.chunks:
            say(f"chunk {chunk + 1}/{args.chunks}  loss {loss.item():.3f}")
    return net.eval()


# --------------------------------------------------------------------------------------------------
# How far it can be trusted

def own_figures(net, count, seed):
    """A table of its accuracy on drawings that it was trained on, on held-out ones, on OpenMoji's.

    count: images of each kind. The base was trained on nine tenths of the other sets.
    """
    art = emoji_objects(net.known_names, smallest=0.9)
    kinds = {"drawings it was trained on": part(art, ~is_new(art)),
             "drawings it never saw": part(art, is_new(art)),
             "OpenMoji": emoji_objects(net.known_names, ["openmoji"], smallest=0.9)}
    rows = []
    for title, subset in kinds.items():
        for in_style in (False, True):
            rng = np.random.default_rng(seed)
            names = [str(name) for name in rng.choice(sorted(set(subset.names)), count)]
            images = [paint(subset, Scene((name,)), rng, in_style) for name in names]
            style_words = "in random styles" if in_style else "as drawn"
            predictions = predict(net, to_tensor(np.stack(images)))
            of_all, of_100 = named(predictions, classes_of(net, names))
            rows.append([f"{title}, {style_words}", percent(of_all), percent(of_100)])
    return table(["", f"named of {len(net.known_names)}", "named of 100"], rows)


def named(predictions, target):
    """Two (B,): is the target class ranked first, and how probably would it be among 100?"""
    scores = predictions["names"]
    return (scores.argmax(1) == target).double(), among(scores, target)


# --------------------------------------------------------------------------------------------------
# The command

def options():
    """The command's options."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--out", type=filled, default=str(FILE), help="the file to write (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (default: cuda where there is a GPU)")
    add("--chunks", type=whole(1, 10**6), default=1000, help="batches of new images")
    add("--reuse", type=whole(1, 64), default=4, help="steps after each chunk")
    add("--pool", type=whole(1, 1024), default=64, help="chunks in the pool")
    add("--batch", type=whole(2, 65536), default=256, help="images in a chunk, and in a step")
    add("--lr", type=number(float, 0, 1, above=True), default=2e-3, help="peak learning rate")
    add("--workers", type=whole(0, 256), default=1, help="processes that paint images")
    add("--scenes", type=whole(2, 10**6), default=256, help="images per row of the accuracy table")
    add("--seed", type=whole(0, 2**31), default=0, help="random seed (default: %(default)s)")
    return parser


def main():
    args = options().parse_args()
    check_place(args.out, is_folder=False)
    check_device(args.device)
    began = time.time()
    torch.manual_seed(args.seed)
    art = emoji_objects(smallest=0.75, bent=0.04)
    names = sorted(set(art.names))
    net = Classifier(ClassifierConfig(names=len(names), colours=len(COLOURS)))
    net = train(net, part(art, ~is_new(art)), names, args)
    provenance = dict(vars(args), command=command(), machine=machine(args.device),
                      seconds=round(time.time() - began))
    save_model(args.out, "classifier", net, provenance, names=names, colours=COLOURS)
    net = load_classifier(args.out, args.device)             # what is measured is what was saved
    say("\n".join(own_figures(net, args.scenes, args.seed)))


if __name__ == "__main__":
    run_command(main)
