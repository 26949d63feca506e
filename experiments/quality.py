"""How good are a base's samples, and do they show what the prompts say?

    python -m experiments.quality --names 128 --per 2 --scenes 48 --grids

It writes results/quality.md, quality.json and four sheets of samples, in about 20 minutes on two
cores. With the defaults it takes about an hour, or four minutes on a GPU.

A separate classifier (classifier.py) names the objects in the samples. Its accuracy alone would say
too little: the mean of an object's drawings, or an image that guidance has distorted, is recognised
as reliably as a drawing. So the accuracy is reported together with a Fréchet distance (Heusel et
al. 2017, with this classifier's features instead of Inception's) and for two controls: the mean of
an object's drawings, and samples with a single decoding step.

Neither the accuracy nor the distance would show that a base copies its training drawings; the audit
in copies.py does.

Shapes: B images (B, 3, 64, 64) in [-1, 1], D features, K names, n names in a table.
"""

import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from checkpoint.files import check_place, write_json, write_png, write_text
from commandline.options import Parser, filled, number, whole
from commandline.terminal import run_command, say
from data import Scene, drawing, english, scenes, styles
from data.pictures import grid
from experiments.classifier import (COLOURS, FILE, classes_of, emoji_objects, is_new, labels_of,
                                    load_classifier, named, own_figures, paint, part, predict)
from experiments.common import (RESULTS, command, heading, made_by, mean_and_error,
                                reconstruct, table)
from experiments.copies import COPY, all_drawings, audit, framed
from pretrain.common import machine
from styledrop import BASE_SAMPLING, WEIGHTS, StyleDrop, style_prompt, to_tensor, to_uint8



# --------------------------------------------------------------------------------------------------
# Fréchet distance

def frechet(x, y):
    """The Fréchet distance of features x (n, D) and y (m, D), each taken as a Gaussian:

    |mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x^1/2 C_y C_x^1/2)^1/2), in float64. The roots come from
    eigh, so they are real. The fewer images, the larger it is: compare only equal numbers of them.
    """
    x, y = x.double(), y.double()
    C_x, C_y = torch.cov(x.T), torch.cov(y.T)
    variance, directions = torch.linalg.eigh(C_x)
    root = (directions * variance.clamp(min=0).sqrt()) @ directions.T
    middle = torch.linalg.eigvalsh(root @ C_y @ root).clamp(min=0).sqrt().sum()
    apart = (x.mean(0) - y.mean(0)).square().sum()
    return (apart + C_x.trace() + C_y.trace() - 2 * middle).item()


def distances(x, y):
    """Three Fréchet distances of features x and y (n, per, D), with `per` images of each name.

    1. of all n * per images;
    2. extrapolated to infinitely many images of these names: the distance has a bias in proportion
       to 1 / images (Chong & Forsyth 2020), so a line is fitted to subsets;
    3. the mean over quarters of the images (half of the names, half of their images).
    """
    n, per, _ = x.shape
    inverse = []
    means = []
    for size in range(per // 2, per + 1):
        values = []
        for start in range(per if size < per else 1):
            columns = [(start + i) % per for i in range(size)]
            values.append(frechet(x[:, columns].flatten(0, 1), y[:, columns].flatten(0, 1)))
        inverse.append(1 / (n * size))
        means.append(np.mean(values))
    _, at_infinity = np.polyfit(inverse, means, 1)

    quarters = []
    for rows in (slice(0, n // 2), slice(n // 2, n)):
        for columns in (slice(0, per // 2), slice(per // 2, per)):
            a, b = x[rows, columns].flatten(0, 1), y[rows, columns].flatten(0, 1)
            quarters.append(frechet(a, b))
    return {f"Fréchet distance, {n * per:,} images": float(means[-1]),
            "extrapolated": float(at_infinity),
            f"{n * per // 4:,} images": float(np.mean(quarters))}


# --------------------------------------------------------------------------------------------------
# Images, all (B, 3, 64, 64) on the CPU

def sample(pipe, prompts, seed, sampling, superres=True):
    """One sample of each prompt; superres=False: by the first stage alone. sampling: a Sampling."""
    images = pipe.generate(prompts, seed=1000 * seed, sampling=sampling, superres=superres).cpu()
    return F.interpolate(images, size=(64, 64), mode="area")


def real(art, chosen, rng, sets=None):
    """Draw scenes without a style. sets: the icon set for each scene; by default, any."""
    if sets is None:
        sets = [None] * len(chosen)
    images = [paint(art, scene, rng, False, set_name) for scene, set_name in zip(chosen, sets)]
    return to_tensor(np.stack(images))


def class_means(art, names, rng):
    """Control without a model: the mean of each name's drawings, placed like the drawings."""
    pictures_of = {}
    for name, rgba in zip(art.names, art.drawings):
        if name in names:
            pictures_of.setdefault(name, []).append(styles.apply(styles.Style(), rgba, rng))
    images = []
    for name in names:
        mean = np.mean(pictures_of[name], 0).round()
        opaque = np.full((64, 64, 1), 255)
        rgba = np.concatenate([mean, opaque], 2).astype(np.uint8)
        placed = drawing.place_one(rgba, 64, rng, art.smallest)
        images.append(styles.apply(styles.Style(), placed, rng))
    return to_tensor(np.stack(images))


# --------------------------------------------------------------------------------------------------
# Plain prompts

def share(values):
    """(mean, standard error) in percent, over names or prompts: values (n,) or (n, per)."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.dim() > 1:
        values = values.mean(1)
    mean, error = mean_and_error(values)
    return 100 * mean, 100 * error


def plain_prompts(net, pipe, art, names, per, seed, sampling):
    """Results for samples of "a cat" and so on, for real drawings, and for controls.

    Returns {row: {column: value}} and the samples, `per` of each name.
    """
    repeated = [name for name in names for _ in range(per)]
    prompts = [data.content_phrase(name) for name in repeated]
    chosen = [Scene((name,)) for name in repeated]
    rng = np.random.default_rng(seed)
    known, new = part(art, ~is_new(art)), part(art, is_new(art))
    reference = predict(net, real(known, chosen, rng))["features"].unflatten(0, (-1, per))
    others = real(known, chosen, rng)
    samples = sample(pipe, prompts, seed, sampling)
    images = {
        "real drawings of the same kind: the floor": others,
        "real, never seen by the classifier": real(new, chosen, rng),
        "real, reconstructed by the tokenizer": reconstruct(pipe, others),
        "**samples**": samples,
        "samples of the first stage alone": sample(pipe, prompts, seed, sampling, superres=False),
        "control: class mean": class_means(known, repeated, rng),
        "control: one decoding step": sample(pipe, prompts, seed, replace(sampling, steps=1))}
    rows = {}
    for title, pictures in images.items():
        predictions = predict(net, pictures)
        features = predictions["features"].unflatten(0, (-1, per))
        of_all, of_100 = named(predictions, classes_of(net, repeated))
        rows[title] = distances(reference, features)
        rows[title][f"named of {len(net.known_names)}"] = share(of_all.view(-1, per))
        rows[title]["named of 100"] = share(of_100.view(-1, per))
    return rows, samples


def excess(rows, column):
    """By how much samples are farther from real drawings than the tokenizer's reconstructions."""
    return rows["**samples**"][column] - rows["real, reconstructed by the tokenizer"][column]


# --------------------------------------------------------------------------------------------------
# Colours, counts, two objects

QUESTIONS = {                           # the kind of scene, and whether it is held out of training
    "colours, trained": ("coloured", False), "colours, held-out": ("coloured", True),
    "counts": ("several", False), "plurals": ("several", False),
    "two things, trained": ("two", False), "two things, held-out": ("two", True)}


def ask(title, art, count, rng):
    """`count` scenes, for each the icon set that has all its drawings, and their prompts."""
    kind, held_out = QUESTIONS[title]
    sets = [art.sets[i] for i in rng.integers(len(art.sets), size=count)]
    chosen = [scenes.sample(rng, held_out, art.names_of[s], kind) for s in sets]
    prompts = [scenes.phrase(scene) for scene in chosen]
    if title == "plurals":                                   # "two cats" -> "cats": at least two
        prompts = [words.split(" ", 1)[1] for words in prompts]
    return chosen, sets, prompts


def answers(net, images, chosen, title):
    """What is right in images of scenes -> {question: (n,) from 0 to 1, NaN if not asked}."""
    if title.startswith("two things"):
        return two_things(net, images, chosen)
    return one_thing(predict(net, images), chosen, title, net.known_names)


def two_things(net, images, chosen):
    """The left object is to be named in the left half of an image, the right one in the right.

    Each half's object is enlarged to the size that the classifier knows (`framed`).
    """
    left = predict(net, framed(images[..., :32]))
    right = predict(net, framed(images[..., 32:]))
    left_all, left_100 = named(left, classes_of(net, [scene.things[0] for scene in chosen]))
    right_all, right_100 = named(right, classes_of(net, [scene.things[1] for scene in chosen]))
    return {f"both of {len(net.known_names)}": left_all * right_all,
            "both of 100": left_100 * right_100,
            f"one or both of {len(net.known_names)}": torch.maximum(left_all, right_all)}


def one_thing(predictions, chosen, title, names):
    """Are object, colour and count right, each alone and all together?

    predictions: those of `predict`.
    """
    labels = torch.tensor([labels_of(scene, names) for scene in chosen])
    thing, _, colour, count = labels.unbind(1)
    results = {}
    if title == "plurals":
        results["at least two"] = predictions["count"].argmax(1) > 0
    elif title == "counts":
        results["number"] = predictions["count"].argmax(1) == count
    colour_is_right = (predictions["colour"].argmax(1) == colour).double()
    results["colour"] = colour_is_right.where(colour >= 0, math.nan)
    results["thing"] = predictions["names"].argmax(1) == thing
    results = {question: right.double() for question, right in results.items()}
    scores = torch.stack([right.nan_to_num(1) for right in results.values()])
    return results | {"all of it": scores.amin(0)}


def more_than_one_word(net, pipe, art, count, seed, sampling):
    """{question: {source of the images: (mean, standard error) in percent}}.

    Control: the sample of the next prompt, which may show what this one asks for by chance.
    """
    rows = {}
    new = part(art, is_new(art))
    for i, title in enumerate(QUESTIONS):
        rng = np.random.default_rng((seed, i))
        chosen, sets, prompts = ask(title, new, count, rng)
        drawings = real(art, chosen, rng)
        samples = sample(pipe, prompts, seed, sampling)
        images = {"samples": samples, "control": samples.roll(1, 0),
                  "reconstructed": reconstruct(pipe, drawings), "real": drawings,
                  "real, never seen": real(new, chosen, rng, sets)}
        for source, pictures in images.items():
            for question, right in answers(net, pictures, chosen, title).items():
                rows.setdefault(f"{title}: {question}", {})[source] = share(right)
        say(f"{title}: {', '.join(prompts[:3])}, ...")
    return rows


# --------------------------------------------------------------------------------------------------
# Sheets of samples

THINGS = ("cat", "house", "deciduous-tree", "automobile", "mushroom", "rocket", "fish", "owl",
          "teapot", "guitar")
IN_WORDS = ("", "flat", "watercolor", "gold and purple", "pixel art on teal", "line drawing",
            "halftone", "stained glass")                     # the last is held out of all training


def things_styles():
    """Rows, columns and prompts of a sheet: objects in styles."""
    rows = [words or "no style" for words in IN_WORDS]
    prompts = [style_prompt(data.content_phrase(thing), words)
               for words in IN_WORDS for thing in THINGS]
    return rows, [english.noun(thing) for thing in THINGS], prompts


def colours_things():
    """Objects in colours."""
    things = THINGS[:8]
    prompts = [scenes.phrase(Scene((thing,), (colour,))) for colour in COLOURS for thing in things]
    return COLOURS, [english.noun(thing) for thing in things], prompts


def counts():
    """One to four of an object, three red ones, and the plural without a number."""
    prompts = []
    for thing in THINGS:
        prompts += [scenes.phrase(Scene((thing,), count=count)) for count in (1, 2, 3, 4)]
        prompts.append(scenes.phrase(Scene((thing,), ("red",), 3)))
        prompts.append(english.plural(english.noun(thing)))
    columns = ["one", "two", "three", "four", "three red", "(no number)"]
    return [english.noun(thing) for thing in THINGS], columns, prompts


def pairs():
    """Two objects; one on the diagonal."""
    things = THINGS[:7]
    prompts = []
    for first in things:
        for second in things:
            both = (first,) if first == second else (first, second)
            prompts.append(scenes.phrase(Scene(both)))
    nouns = [english.noun(thing) for thing in things]
    return nouns, nouns, prompts


def write_sheets(pipe, seed, sampling, folder):
    """Four sheets of samples, of the first seeds: nothing is chosen."""
    plans = {"things_styles": things_styles, "colours_things": colours_things, "counts": counts,
             "two_things": pairs}
    for name, plan in plans.items():
        rows, columns, prompts = plan()
        images = to_uint8(pipe.generate(prompts, seed=1000 * seed, sampling=sampling))
        sheet = grid(images, len(columns), 1, 4, columns, rows).quantize(256)
        write_png(folder / f"{name}.png", sheet, optimize=True)


# --------------------------------------------------------------------------------------------------
# The report and the command

def cell(value):
    """A number, (mean, error) in percent, or None, as text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}"
    mean, error = value
    return f"{mean:.1f} ± {error:.1f} %"


def table_of(rows):
    """{row: {column: value}} as the lines of a table."""
    columns = list(next(iter(rows.values())))
    cells = [[name, *(cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    return ["", *table(["", *columns], cells)]


def report(results, net, pipe, args, sampling):
    """The lines of quality.md."""
    plain = results["plain"]
    words = results["words"]
    copies = results["audit"]
    full, infinite, quarter = list(next(iter(plain.values())))[:3]
    settings = ", ".join(f"{name} {value:g}" for name, value in asdict(sampling).items())
    return [
        *heading("Quality"),
        f"{made_by(pipe)} Sampled with {settings}. ± is one standard error, over names or prompts.",
        "", "## Plain prompts", "",
        f"{args.names} names, with {args.per} different images of each in every row. The Fréchet "
        "distance is to the same number of real drawings, without a style, that the classifier was "
        "trained on. The first row, other images of the same drawings, is the lowest that can be "
        "expected. Extrapolated: an estimate for infinitely many images of these names, linear in "
        f"1 / images; near 0 it may be negative. {quarter}: the mean over quarters of the images.",
        *table_of(plain),
        f"Samples are farther from real drawings than the tokenizer's reconstructions by "
        f"{excess(plain, infinite):.1f} extrapolated, {excess(plain, full):.1f} with all images, "
        f"and {excess(plain, quarter):.1f} with {quarter}.",
        "", "## More than one word", "",
        f"{args.scenes} prompts each. Control: how often the sample for the next prompt happens to "
        "fit this one. Real: composed of drawings that the classifier mostly knows; "
        "reconstructed: the same images after the tokenizer; never seen: composed of drawings that "
        "the classifier does not know. Two things: the left one is named in the left half of the "
        "image, and the right one in the right half.",
        *table_of(words), "## Copies", "",
        f"{results['audited']} of the names have drawings of both kinds: those that the base was "
        "trained on and those kept out of its training. If samples did not depend on which "
        "drawings were trained on, the first column would equal the second. Copies: images whose "
        "distance to the nearest training drawing of their object is below the "
        f"{COPY}th percentile of the distances between two different drawings of one object. "
        "Distances are measured by the classifier's features and by pixels, both after centring. "
        "The other set is OpenMoji, on which nothing here was trained: where its first two columns "
        "differ, the measure is biased by as much.",
        *table_of(copies), "## The classifier itself", "",
        f"{args.scenes} real drawings a row. Trained by `{net.provenance['command']}` in "
        f"{net.provenance['seconds']} s. The base was trained on all sets but OpenMoji.",
        "", *results["classifier"]]


def names_to_sample(net, art, count, seed):
    """`count` random names that have a drawing which the classifier has never seen.

    Their order decides the seeds of the samples; every second name comes first, as in the results
    in the repository.
    """
    names = sorted(set(part(art, is_new(art)).names))
    rng = np.random.default_rng(seed)
    names = [str(name) for name in rng.permutation(names)[:count]]
    return names[1::2] + names[::2]


def options():
    """The command's options."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--classifier", default=str(FILE), help="file of the classifier (default: %(default)s)")
    add("--weights", default=WEIGHTS, help="folder of the base to measure")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (default: cuda where there is a GPU)")
    add("--out", type=filled, default=str(RESULTS), help="folder of the results")
    add("--names", type=whole(4, 300), default=256,
        help="how many objects plain prompts name (default: %(default)s)")
    add("--per", type=whole(2, 64), default=4, help="images of each name (default: %(default)s)")
    add("--scenes", type=whole(2, 10**5), default=256,
        help="prompts for each other question (default: %(default)s)")
    settings = dict(lambda_b=number(float, 0, 100), steps=whole(1, 1000),
                    temperature=number(float, 0, 1000), top_k=whole(0, 10**6))
    for name, kind in settings.items():
        add(f"--{name.replace('_', '-')}", type=kind, default=getattr(BASE_SAMPLING, name),
            help="as in sample.py, of the first stage (default: %(default)s)")
    add("--grids", action="store_true", help="write four sheets of samples as well")
    add("--seed", type=whole(0, 2**31), default=0, help="random seed (default: %(default)s)")
    return parser


def main():
    args = options().parse_args()
    began = time.time()
    out = Path(args.out)
    check_place(out)
    pipe = StyleDrop.load(args.weights, args.device)         # also checks the device
    net = load_classifier(args.classifier, args.device)
    sampling = replace(BASE_SAMPLING, lambda_b=args.lambda_b, steps=args.steps,
                       temperature=args.temperature, top_k=args.top_k)
    art = emoji_objects(net.known_names, smallest=0.9)
    names = names_to_sample(net, art, args.names, args.seed)
    args.names = len(names)

    results = {}
    results["plain"], samples = plain_prompts(net, pipe, art, names, args.per, args.seed + 1,
                                              sampling)
    say("\n".join(table_of(results["plain"])))
    repeated = [name for name in names for _ in range(args.per)]
    openmoji = emoji_objects(net.known_names, ["openmoji"], smallest=0.9)
    results["audit"], results["audited"] = audit(net, pipe, all_drawings(), openmoji, repeated,
                                                 samples, args.seed)
    results["words"] = more_than_one_word(net, pipe, art, args.scenes, args.seed, sampling)
    results["classifier"] = own_figures(net, args.scenes, args.seed)
    if args.grids:
        write_sheets(pipe, args.seed, sampling, out)

    text = "\n".join(report(results, net, pipe, args, sampling)) + "\n"
    about = dict(command=command(), base=pipe.base_id, machine=machine(args.device),
                 sampling=asdict(sampling), names=args.names, per=args.per, prompts=args.scenes,
                 seed=args.seed, seconds=round(time.time() - began), classifier=net.provenance)
    say(text)
    write_text(out / "quality.md", text)
    write_json(out / "quality.json", about | results)


if __name__ == "__main__":
    run_command(main)
