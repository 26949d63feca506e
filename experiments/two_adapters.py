"""My object in my style: does mixing two adapters show both? StyleDrop's Section 3.4, Figure 6.

    python -m experiments.two_adapters              # results/two_adapters.md, .json and .png
    python -m experiments.two_adapters --choose     # results/two_adapters_chosen.md and .json

The second command compares strengths and mixtures on validation objects and references.

The objects are drawings that were kept out of the base's training, each shown in four pictures:
bent a little, at different sizes and places, on four different backgrounds. Each object is paired
with a reference of foreign.py. A content adapter is tuned on the object's pictures ("a [V] bear"),
a style adapter on the reference, and "a [V] bear" is sampled from mixtures of the two. Only the
first stage is tuned and sampled. The questions asked of each sample:

    identity        is it nearer to this drawing of a bear than to other sets' drawings of bears,
                    by the features of the object judge, which pays no attention to style?
    palette         are its colours nearer to the reference's than to 19 others'?

Whether the object judge names a bear is not asked: it hardly ever names drawings that were kept out
of training, not even as they are.

The plan, written before any test sample was drawn. Primary question: do more samples have both
identity and palette at the default gamma than from the style adapter alone (gamma = 0)? Then: than
from the content adapter alone (gamma = 1); and than from a single adapter that is tuned on the
object and the reference together, which Figure 6 of the paper argues against. A difference is
paired over the pairs of object and reference. The tokenizer's reconstruction of further pictures of
the object is the ceiling of identity.

What is already in two_adapters.json is not computed again.
"""

import zlib
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F

import data
from checkpoint.files import write_json, write_png, write_text
from commandline.options import Parser, whole
from commandline.terminal import run_command, say
from data import drawing, scenes, styles
from data.pictures import grid
from experiments.common import (INTERVALS, heading, made_by, minus, percent, read_results,
                                reconstruct, start_study, table)
from experiments.copies import as_drawn, framed
from experiments.foreign import Ruler, load_references, spread
from experiments.style_measures import is_nearest, palette
from styledrop import (CONTENT, CONTENT_SAMPLING, RARE_TOKEN, ROUND_1, style_prompt, to_tensor,
                       to_uint8)

SETS = ("noto", "noto-v1", "twemoji", "fluent-emoji", "fluent-emoji-flat", "openclipart",
        "sweethome3d")                  # those whose drawings have colours
BACKGROUNDS = ("cream", "teal", "gold", "grey")
MOST = {"chosen": 8, "reported": 12}    # objects of each half
SEEDS = list(range(8))
GAMMA = 0.5                             # the default of sample.py
GAMMAS = (0.0, 0.3, 0.5, 0.7, 1.0)
STRENGTHS = ((0.75, 10), (3, 5), (5, 5))     # lambda_A and lambda_B that --choose tries
MEASURES = ("identity", "palette", "identity and palette")
SHOWN = 6                               # rows of the picture


# --------------------------------------------------------------------------------------------------
# Objects

def objects(art, used):
    """The (set, name) of the objects of one half, drawn by lot: "chosen" or "reported".

    A drawing qualifies if it was kept out of training, if it is a single thing of no fixed colour,
    and if there are at least three other drawings of its name.
    """
    drawings = {}
    for set_name in SETS:
        for name, found in art.index[set_name].items():
            drawings.setdefault(name, []).extend(found)
    pairs = [(set_name, name) for set_name, name in data.kept_out_pairs()
             if set_name in SETS and scenes.takes_number(name) and scenes.takes_colour(name)
             and len(drawings[name]) >= 4]
    pairs.sort(key=lambda pair: zlib.crc32(f"object {'/'.join(pair)}".encode()))
    by_name = {}
    for set_name, name in pairs:                             # one object of a name
        by_name.setdefault(name, (set_name, name))
    lot = list(by_name.values())
    if used == "chosen":
        return lot[:MOST["chosen"]]
    return lot[MOST["chosen"]:sum(MOST.values())]


def pictures(art, pair, count, seed, backgrounds=BACKGROUNDS):
    """Pictures of one object: (count, 3, S, S), where S is the size of `art`'s drawings."""
    set_name, name = pair
    rgba = art.drawings[art.find(name, set_name)]
    rng = np.random.default_rng([seed, zlib.crc32("/".join(pair).encode())])
    images = []
    for k in range(count):
        moved = drawing.place_anywhere(drawing.bend(rgba, rng, 0.1), rng, 0.75, 1.0)
        background = styles.Style(ground=backgrounds[k % len(backgrounds)])
        images.append(styles.apply(background, moved, rng))
    return to_tensor(np.stack(images))


def rare_name(name):
    """The content phrase of an object of one's own: "bear" -> "a [V] bear"."""
    article, _, noun = data.content_phrase(name).partition(" ")
    return f"a [V] {noun}"


def resized(images, side):
    """Images (B, 3, H, W) as (B, 3, side, side)."""
    return F.interpolate(images, (side, side), mode="area")


class Judge:
    """What of MEASURES a sample has, for one object and one reference of a Ruler."""

    def __init__(self, art, ruler, pair, i):
        set_name, name = pair
        self.ruler, self.pair, self.i = ruler, pair, i
        own = art.find(name, set_name)
        others = [art.find(name, other) for other in SETS
                  if other != set_name and name in art.index[other]]
        self.drawings = self.features(as_drawn(art.drawings[[own, *others]]))

    @torch.no_grad()
    def features(self, images):
        """The object judge's features (B, D) of the objects in images (B, 3, H, W)."""
        return self.ruler.judge.features(framed(images))

    def measure(self, images):
        """Images (B, 3, H, W) -> {measure: list of B}."""
        images = images.cpu()
        _, _, palettes, _ = self.ruler.at_side(images.shape[-1])
        near = is_nearest(palette(images), palettes[self.ruler.rivals[self.i]])
        distances = torch.cdist(self.features(images), self.drawings)            # (B, drawings)
        identity = distances.argmin(1) == 0
        return {"identity": identity.float().tolist(), "palette": near.float().tolist(),
                "identity and palette": (identity & near).float().tolist()}

    def row(self, arm, images):
        """A row of the results: the shares of images that have each of MEASURES."""
        means = {name: float(np.mean(values)) for name, values in self.measure(images).items()}
        return dict(object="/".join(self.pair), reference=self.ruler.references[self.i].file,
                    arm=arm, **means)


# --------------------------------------------------------------------------------------------------
# One pair of object and reference

def material(pipe, art, pair, reference):
    """What is tuned on: the object's name, pictures of it (4, 3, S, S), the reference (1, 3, S, S).

    S: the first stage's side.
    """
    side = pipe.vqgan.config.resolution
    shown = resized(pictures(art, pair, 4, seed=0), side)
    return rare_name(pair[1]), shown, resized(reference.picture[None], side)


def tune_separately(pipe, name, shown, picture):
    """The content adapter and the style adapter; see `material`."""
    content = pipe.tune(shown, [name] * len(shown), tuning=CONTENT)
    return content, pipe.tune(picture, [""], RARE_TOKEN)


def tune_jointly(pipe, name, shown, picture):
    """One adapter of both. The reference is repeated, so that both count equally."""
    both = torch.cat([shown, picture.expand_as(shown)])
    texts = [name] * len(shown) + [style_prompt("", RARE_TOKEN)] * len(shown)
    return pipe.tune(both, texts, tuning=CONTENT)


def try_pair(pipe, art, ruler, pair, i):
    """Rows of results for one pair, and its samples with the default settings {gamma: images}."""
    judge = Judge(art, ruler, pair, i)
    name, shown, picture = material(pipe, art, pair, ruler.references[i])
    content, style = tune_separately(pipe, name, shown, picture)
    joint = tune_jointly(pipe, name, shown, picture)
    prompts = [name] * len(SEEDS)
    samples = {}
    rows = []
    for gamma in GAMMAS:
        samples[gamma] = pipe.generate(prompts, style, content, seed=SEEDS, gamma=gamma,
                                       superres=False)
        rows.append(judge.row(f"gamma {gamma:g}", samples[gamma]))
    images = pipe.generate(prompts, joint, seed=SEEDS, superres=False, style_phrase=RARE_TOKEN,
                           sampling=CONTENT_SAMPLING)        # as the mixtures are sampled
    rows.append(judge.row("one adapter of both", images))
    further = pictures(art, pair, 8, seed=1, backgrounds=("white", "navy", "pink", "green"))
    images = reconstruct(pipe, resized(further, shown.shape[-1]))
    rows.append(judge.row("the object, reconstructed", images))
    return rows, samples


def choose_for_pair(pipe, art, ruler, pair, i):
    """Rows of results of one validation pair, for each of STRENGTHS and each gamma."""
    judge = Judge(art, ruler, pair, i)
    name, shown, picture = material(pipe, art, pair, ruler.references[i])
    content, style = tune_separately(pipe, name, shown, picture)
    prompts = [name] * len(SEEDS)
    rows = []
    for lambda_a, lambda_b in STRENGTHS:
        for gamma in GAMMAS[1:]:
            images = pipe.generate(prompts, style, content, seed=SEEDS, gamma=gamma,
                                   superres=False, lambda_a=lambda_a, lambda_b=lambda_b)
            arm = f"lambda_A {lambda_a:g}, lambda_B {lambda_b:g}, gamma {gamma:g}"
            rows.append(judge.row(arm, images))
    return rows


# --------------------------------------------------------------------------------------------------
# The report

def report(pipe, rows, half):
    """The lines of the results page."""
    by_arm = {}
    for row in rows:
        by_arm.setdefault(row["arm"], []).append(row)
    count = len(next(iter(by_arm.values())))
    lines = heading("Two adapters: my object in my style")
    lines += [made_by(pipe), "", f"{count} {half} pairs of object and reference, {len(SEEDS)} "
              f"samples of each, seeds 0 to {SEEDS[-1]}, the first stage alone. Errors are "
              "standard errors over pairs.", ""]
    body = []
    for arm, group in by_arm.items():
        cells = [percent([row[name] for row in group]) for name in MEASURES]
        if arm == "the object, reconstructed":
            cells[1:] = ["-", "-"]                           # it has no style
        body.append([arm, *cells])
    lines += table(["", *MEASURES], body)
    mixed = f"gamma {GAMMA:g}"
    if mixed not in by_arm:
        return lines
    lines += [f"## {mixed} minus each", "", INTERVALS, ""]
    body = [[f"minus {arm}", *minus(by_arm[mixed], by_arm[arm], MEASURES)]
            for arm in ("gamma 0", "gamma 1", "one adapter of both")]
    return lines + table(["", *MEASURES], body)


def picture_of(art, pairs, references, samples):
    """The object, the reference, and a sample for each gamma: a row for each pair."""
    rows = []
    for pair, reference, images in zip(pairs, references, samples):
        side = images[0.0].shape[-1]
        shown = torch.cat([pictures(art, pair, 1, seed=0), reference.picture[None]])
        rows += [resized(shown, side),
                 *(images[gamma][:1].cpu() for gamma in GAMMAS)]
    top = ["object", "style", *(f"gamma {gamma:g}" for gamma in GAMMAS)]
    return grid(to_uint8(torch.cat(rows)), len(top), 2, 4, top)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--choose", action="store_true",
                        help="compare settings on the validation objects and references")
    parser.add_argument("--pairs", type=whole(1, 1000), default=12,
                        help="how many pairs of object and reference (default: %(default)s)")
    args, pipe, out = start_study(parser)
    used, half, file = "reported", "test", "two_adapters"
    if args.choose:
        used, half, file = "chosen", "validation", "two_adapters_chosen"
    art = data.Art(SETS, size=2 * pipe.vqgan.config.resolution, kept_out=None)
    references = load_references(used, pipe.resolution)
    ruler = Ruler(pipe, references)
    pairs = objects(art, used)[:args.pairs]
    settings = dict(base=pipe.base_id, style=asdict(ROUND_1), content=asdict(CONTENT),
                    sampling=asdict(CONTENT_SAMPLING))
    if args.choose:
        settings["sampling"] = [list(pair) for pair in STRENGTHS]
    results = read_results(out / f"{file}.json", settings)
    done = {row["object"] for row in results["rows"]}
    shown = []
    some = spread(len(references), len(pairs))
    for k, (pair, i) in enumerate(zip(pairs, some)):
        if "/".join(pair) in done:
            continue
        if args.choose:
            results["rows"] += choose_for_pair(pipe, art, ruler, pair, i)
        else:
            rows, samples = try_pair(pipe, art, ruler, pair, i)
            results["rows"] += rows
            shown.append((pair, references[i], samples))
        write_json(out / f"{file}.json", results)
        write_text(out / f"{file}.md", "\n".join(report(pipe, results["rows"], half)))
        say(f"pair {k + 1} of {len(pairs)}: {'/'.join(pair)} in the style of {references[i].file}")
    if shown:
        write_png(out / f"{file}.png", picture_of(art, *zip(*shown[:SHOWN])))


if __name__ == "__main__":
    run_command(main)
