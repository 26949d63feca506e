"""Tuning on pictures that are unrelated to the training data.

    python -m experiments.foreign               # results/foreign.md, foreign.json, pictures
    python -m experiments.foreign --sweep       # results/foreign_sweep.md: settings, an hour
    python -m experiments.foreign --sweep views --confirm    # results/foreign_confirm.md
    python -m experiments.foreign --sweep lambda_a lambda_b --references 6      # only these

experiments/foreign/ has 64 openly licensed references: paintings, prints, photographs, renders and
so on, split at random (lot.py) into validation pictures ("chosen"), on which --sweep compares
settings, and test pictures ("reported"), on which the first command only reports.

For each reference, an adapter is tuned as by the default command, and a dozen objects are sampled
with the seeds 0 to 11. There is no ground truth, so these questions are asked of each sample:

    object kept     does a classifier that ignores style (object_judge.py) rank the object first?
    palette         are its colours nearer to those of its own reference than to 19 others'?
    texture         the same for its small patches (style_measures.py)
    blank           is the image empty?
    copied tokens   which share of its tokens equals the reference's token at the same position?
    leak            does the classifier name what the reference shows instead of the object?

"Object and palette" is the share of samples that keep the object and also have the nearest palette.
Neither the base, which keeps the object, nor a copy of the reference, which has its palette, scores
high in it. The table also has CLIP's style score, and these controls: the base without a style; the
style described in words; the samples of another reference's adapter, compared with this reference;
and the reference itself.
"""

import csv
import functools
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import clip_feedback
import data
from checkpoint.files import check_place, write_json, write_png, write_text, write_whole
from commandline.options import Parser, add_base_options, load_pipeline, whole
from commandline.terminal import Progress, run_command, say
from data.english import head, meanings, plural
from data.pictures import grid
from experiments.common import (INTERVALS, RESULTS, heading, made_by, minus, percent,
                                table, with_error)
from experiments.object_judge import load_judge, name_scores
from experiments.style_measures import is_blank, is_nearest, palette, texture
from styledrop import RARE_TOKEN, ROUND_1, SAMPLING, to_tensor, to_uint8

FOLDER = Path(__file__).with_name("foreign")
OBJECTS = ("a cat", "a car", "an apple", "a rocket", "a house", "a fish", "an owl", "a guitar",
           "a butterfly", "a tree", "a sailboat", "a teapot")
SHOWN = 6                               # objects on the contact sheet
FIRST = ("bazille_ramparts.webp", "hokusai_poppies.webp", "neon_cocktail_sign.webp",
         "clay_rabbit.webp", "watercolor_pears.webp", "embroidered_bird.webp")   # README's picture
RIVALS = 19                             # other references that a sample is compared with
COMPARED = ("object kept", "palette", "texture", "object and palette")
MEASURES = (*COMPARED, "blank", "copied tokens")
TITLES = ("object kept", "nearest palette", "nearest texture", "object and palette", "blank",
          "copied tokens")              # of the columns of MEASURES
ABOUT_OBJECTS = ("object kept", "object and palette", "leak")
YES_OR_NO = ("object kept", "palette", "texture", "blank", "leak")

# What --sweep tries, one change at a time from the defaults: settings of styledrop.Tuning (H, rate,
# steps, masking) and of styledrop.Sampling, and the prompt of tuning (style, content)
SWEEP = [dict(), dict(lambda_a=0), dict(lambda_a=0.5), dict(lambda_a=1), dict(lambda_a=2),
         dict(lambda_b=1), dict(lambda_b=6), dict(lambda_b=15), dict(min_p=0), dict(min_p=0.1),
         dict(temperature=1), dict(top_k=0), dict(views=1), dict(steps=30), dict(steps=100),
         dict(d_prj=4), dict(d_prj=40), dict(is_shared=True), dict(lr=5e-4), dict(lr=3e-3),
         dict(mask_power=1), dict(style="words"), dict(content="named")]


@dataclass
class Reference:
    """One picture of experiments/foreign/."""
    file: str
    content: str                # what it shows, in the words of a person
    style: str                  # its style, in the words of a person
    kind: str                   # oil, watercolor, ink, ...
    used: str                   # "chosen" (validation) or "reported" (test)
    picture: torch.Tensor       # (3, H, W) in [-1, 1], of the pipeline's resolution


def load_references(used, resolution):
    """The references of one half."""
    with open(FOLDER / "table.tsv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    references = []
    for row in rows:
        if row["used"] == used:
            picture = data.read_reference(FOLDER / row["file"], resolution)
            references.append(Reference(row["file"], row["content"], row["style"], row["kind"],
                                        used, to_tensor(picture[None])[0]))
    return references


def spread(total, count):
    """At most `count` of the indices 0 to total - 1, evenly spaced: the table is sorted by kind."""
    count = min(count, total)
    return [k * total // count for k in range(count)]


# --------------------------------------------------------------------------------------------------
# The measures

@functools.lru_cache(None)
def nouns():
    """{noun, in the singular or in the plural: the names that it can mean}"""
    found = dict(meanings())
    for word, meant in meanings().items():
        found[plural(word)] = found.get(plural(word), ()) + meant
    return found


def columns_of(phrase, names):
    """The judge's classes that a content phrase may mean: "a car" is an automobile, too.

    If no class has the name of the whole phrase, its head noun counts: "a cat in an umbrella".
    """
    article, _, rest = phrase.partition(" ")
    whole = rest if article in ("a", "an", "the", "two") else phrase
    return columns_of_noun(whole, names) or columns_of_noun(head(whole), names)


def columns_of_noun(noun, names):
    """The judge's classes that a noun may mean; a class may end in it: "red-apple", "apple"."""
    found = set(nouns().get(noun, ()))
    for name in names:
        ends_in_it = " " not in noun and name.endswith(f"-{noun}")
        if name == noun.replace(" ", "-") or ends_in_it:
            found.add(name)
    return [names.index(name) for name in sorted(found) if name in names]


class Ruler:
    """The evaluator: everything that is needed to measure a sample.

    references: those of one half; pipe: whose tokenizer and CLIP are used.
    """

    def __init__(self, pipe, references, seed=2306):
        self.pipe, self.references = pipe, references
        self.judge, self.names = load_judge()
        self.wanted = {phrase: columns_of(phrase, self.names) for phrase in OBJECTS}
        self.shown = [columns_of(reference.content, self.names) for reference in references]
        self.pictures = torch.stack([reference.picture for reference in references])
        rng = np.random.default_rng(seed)
        self.rivals = []                # of each reference: itself, and RIVALS others
        for i in range(len(references)):
            others = [k for k in range(len(references)) if k != i]
            others = rng.choice(others, min(RIVALS, len(others)), replace=False)
            self.rivals.append([i, *others])
        self.described = {}             # cache of at_side

    def at_side(self, side):
        """Reconstructed references (R, 3, side, side), their tokens, palettes and textures."""
        if side not in self.described:
            small = F.interpolate(self.pictures, (side, side), mode="area")
            tokens = self.pipe.vqgan.encode(small.to(self.pipe.device))
            reconstructed = self.pipe.vqgan.decode(tokens).cpu()
            self.described[side] = (reconstructed, tokens.flatten(1), palette(reconstructed),
                                    texture(reconstructed))
        return self.described[side]

    @torch.no_grad()
    def measure(self, images, objects, i, with_clip=True):
        """Images (B, 3, H, W) of B objects, compared with reference i -> {measure: list of B}."""
        side = images.shape[-1]
        _, reference_tokens, palettes, textures = self.at_side(side)
        rivals = self.rivals[i]
        images, shown = images.cpu(), self.shown[i]
        named = name_scores(self.judge, images).argmax(-1).tolist()
        tokens = self.pipe.vqgan.encode(images.to(self.pipe.device)).flatten(1)
        found = {
            "object kept": [name in self.wanted[phrase] for name, phrase in zip(named, objects)],
            "leak": [name in shown and name not in self.wanted[phrase]
                     for name, phrase in zip(named, objects)],
            "palette": is_nearest(palette(images), palettes[rivals]).tolist(),
            "texture": is_nearest(texture(images), textures[rivals]).tolist(),
            "blank": is_blank(images).tolist(),
            "copied tokens": (tokens == reference_tokens[i]).float().mean(1).tolist()}
        found["object and palette"] = [kept and near for kept, near
                                       in zip(found["object kept"], found["palette"])]
        if with_clip:
            style = clip_feedback.style_score(self.pipe.clip, images, self.references[i].picture)
            found["style score"] = style.tolist()
        return {name: [float(value) for value in values] for name, values in found.items()}


# --------------------------------------------------------------------------------------------------
# The report

def sample_reported(pipe, references):
    """{arm: images (R, 12, 3, H, W)}: tuned by default, the base, and the base asked in words.

    In words: once with the base's own guidance and once with that of the tuned samples.
    """
    objects, seeds = list(OBJECTS), list(range(len(OBJECTS)))
    progress = Progress("reference")
    arms = {"tuned": [], "words": [], "words, guided alike": []}
    for k, reference in enumerate(references):
        adapter = pipe.tune(reference.picture[None], [""], RARE_TOKEN)
        in_words = dict(style_phrase=reference.style, seed=seeds)
        arms["tuned"].append(pipe.generate(objects, adapter, seed=seeds))
        arms["words"].append(pipe.generate(objects, **in_words))
        arms["words, guided alike"].append(pipe.generate(objects, sampling=SAMPLING, **in_words))
        progress(k + 1, len(references), reference.file)
    plain = pipe.generate(objects, seed=seeds).cpu()
    arms = {name: torch.stack(images).cpu() for name, images in arms.items()}
    arms["base"] = plain.expand(len(references), *plain.shape)
    return arms


def report(pipe):
    references = load_references("reported", pipe.resolution)
    ruler, objects = Ruler(pipe, references), list(OBJECTS)
    arms = sample_reported(pipe, references)
    reconstructed, *_ = ruler.at_side(arms["tuned"].shape[-1])
    rows = {name: [] for name in ARMS}
    for i in range(len(references)):
        other = (i + 1) % len(references)
        for name, images in arms.items():
            rows[name].append(ruler.measure(images[i], objects, i))
        rows["other"].append(ruler.measure(arms["tuned"][other], objects, i))
        rows["reference"].append(ruler.measure(reconstructed[i:i + 1], objects[:1], i))
    write_json(RESULTS / "foreign.json", dict(
        base=pipe.base_id, tuning=asdict(ROUND_1), sampling=asdict(SAMPLING), objects=objects,
        references=[reference.file for reference in references],
        can_leak=[bool(shown) for shown in ruler.shown], measures=rows))
    write_report(pipe, ruler, rows)
    write_sheets(pipe, references, arms["tuned"])


ARMS = {"tuned": "**tuned on the reference**", "base": "control: the base without a style",
        "words": "control: the style in a person's words",
        "words, guided alike": f"control: the same with λ_B = {SAMPLING.lambda_b:g}",
        "other": "control: another reference's adapter", "reference": "the reference itself"}

MINUS = {"words": "minus the style in words",
         "words, guided alike": f"minus the style in words with λ_B = {SAMPLING.lambda_b:g}",
         "other": "minus another reference's adapter",
         "base": "minus the base"}


def rounded(shares):
    """Shares from 0 to 1 as the cells of a table, in whole percents."""
    return [f"{100 * share:.0f} %" for share in shares]


def write_report(pipe, ruler, rows):
    """results/foreign.md: tables of the arms, the objects, the kinds and the references.

    A reference can only leak where the judge has a name for what it shows; others are left out.
    """
    references, can_leak = ruler.references, [bool(shown) for shown in ruler.shown]
    lines = heading("Tuning on foreign pictures: the test half")
    lines += [made_by(pipe), "", f"{len(references)} references, {len(OBJECTS)} objects of each, "
              f"seeds 0 to {len(OBJECTS) - 1}, default settings. Errors are standard errors over "
              "references.", ""]
    titles = ["", *TITLES, "reference's object", "CLIP style score"]
    body = []
    for name, words in ARMS.items():
        means = {}                                           # measure -> a mean for each reference
        for key in rows[name][0]:
            means[key] = [np.mean(row[key]) for row in rows[name]]
        means["leak"] = np.where(can_leak, means["leak"], math.nan)
        cells = []
        for key in (*MEASURES, "leak"):
            if name == "reference" and key in ABOUT_OBJECTS:     # it shows something else
                cells.append("-")
            else:
                cells.append(percent(means[key]))
        body.append([words, *cells, with_error(means["style score"], digits=3)])
    lines += table(titles, body)
    lines += [f"Nearest: the sample is nearer to its own reference than to {RIVALS} others (by "
              f"chance {1 / (RIVALS + 1):.0%}). Reference's object (below: leak) is measured on "
              f"the {sum(can_leak)} references that show something the judge has a name for.", "",
              "## Tuned minus control", "",
              INTERVALS, ""]
    body = [[words, *minus(rows["tuned"], rows[name], COMPARED)] for name, words in MINUS.items()]
    lines += table(["", *COMPARED], body)
    lines += ["## Each object", "", "The base without a style was sampled once for each object, so "
              "its object is either kept or not.", ""]
    body = []
    for k, phrase in enumerate(OBJECTS):
        shares = [np.mean([row[key][k] for row in rows["tuned"]])
                  for key in ("object kept", "object and palette")]
        base = "yes" if rows["base"][0]["object kept"][k] else "no"
        body.append([phrase, *rounded(shares), base])
    lines += table(["object", "object kept", "object and palette", "kept by the base"], body)
    lines += ["## Each kind of reference", ""]
    body = []
    for kind in dict.fromkeys(reference.kind for reference in references):
        group = [row for row, reference in zip(rows["tuned"], references)
                 if reference.kind == kind]
        shares = [np.mean([row[key] for row in group]) for key in COMPARED]
        body.append([kind, str(len(group)), *rounded(shares)])
    lines += table(["kind", "references", *COMPARED], body)
    lines += ["## Each reference", ""]
    body = []
    for i, reference in enumerate(references):
        cells = rounded([np.mean(rows["tuned"][i][key]) for key in YES_OR_NO])
        if not can_leak[i]:
            cells[YES_OR_NO.index("leak")] = "-"
        body.append([reference.file, reference.kind, *cells])
    lines += table(["reference", "kind", *YES_OR_NO], body)
    write_text(RESULTS / "foreign.md", "\n".join(lines))


def write_sheets(pipe, references, images):
    """foreign.jpg: all references by six objects; foreign_first.png: the README's picture."""
    rows = []
    for reference, samples in zip(references, images):
        rows += [reference.picture[None], samples[:SHOWN]]
    sheet = grid(to_uint8(torch.cat(rows)), 1 + SHOWN, 1, 4, ["reference", *OBJECTS[:SHOWN]])
    write_whole(RESULTS / "foreign.jpg", lambda file: sheet.save(file, "JPEG", quality=38))
    first = [i for name in FIRST for i, reference in enumerate(references)
             if reference.file == name]
    top = ["reference", *OBJECTS[:5]]
    rows = []
    for i in first:
        rows += [references[i].picture[None], images[i][:len(top) - 1]]
    write_png(RESULTS / "foreign_first.png", columns_of_two(to_uint8(torch.cat(rows)), top))


def columns_of_two(images, top):
    """Rows of images, two side by side, below the words of `top` -> a Pillow image of 256 colours.

    images: uint8 (B, H, W, 3), as many for each row as `top` has words.
    """
    rows = images.reshape(-1, len(top), *images.shape[1:])
    order = np.concatenate([rows[0::2], rows[1::2]], 1)
    sheet = grid(order.reshape(-1, *images.shape[1:]), 2 * len(top), 1, 4, [*top, *top])
    return sheet.quantize(256, dither=Image.Dither.NONE)


# --------------------------------------------------------------------------------------------------
# The sweep, on the validation references; the first stage alone, at its own 64 pixels

def sweep(pipe, settings, count, on_test=False):
    """results/foreign_sweep.md: a row for each change of SWEEP, on `count` validation references.

    settings: names of those to change, or an empty list for all of them. on_test: use the test
    references, and write results/foreign_confirm.md. This is for a setting that was already chosen.
    """
    used, half, file = "chosen", "validation", "foreign_sweep.md"
    if on_test:
        used, half, file = "reported", "test", "foreign_confirm.md"
    references = load_references(used, pipe.resolution)
    ruler, objects, adapters = Ruler(pipe, references), list(OBJECTS), {}
    some = spread(len(references), count)
    lines = heading(f"Settings compared on the {half} half of the foreign pictures")
    lines += [made_by(pipe), "", f"{len(some)} references, {len(OBJECTS)} objects of each, "
              f"seeds 0 to {len(OBJECTS) - 1}, the first stage alone. One setting differs from the "
              "defaults in each row. Errors are standard errors over references.", ""]
    body, differences, defaults = [], [], None
    for changes in SWEEP:
        if settings and changes and not set(settings) & set(changes):
            continue
        began, rows = time.time(), []
        for i in some:
            images = tuned_with(pipe, references[i], changes, adapters)
            rows.append(ruler.measure(images, objects, i, with_clip=False))
        cells = [percent([np.mean(row[key]) for row in rows]) for key in MEASURES]
        words = ", ".join(f"{name} {value}" for name, value in changes.items()) or "the defaults"
        body.append([words, *cells])
        if not changes:
            defaults = rows
        else:
            differences.append([words, *minus(rows, defaults, COMPARED)])
        say(f"{words}: {'  '.join(cells)}  ({time.time() - began:.0f} s)")
        text = lines + table(["", *TITLES], body)
        text += ["## Each change minus the defaults", "", INTERVALS, ""]
        text += table(["", *COMPARED], differences)
        write_text(RESULTS / file, "\n".join(text))


def tuned_with(pipe, reference, changes, adapters):
    """The dozen objects in the style of a reference, the first stage alone, with some changes.

    adapters: {how it was tuned: an adapter}, which rows that only sample differently share.
    """
    tuning, sampling = {}, {}
    for name, value in changes.items():
        if hasattr(ROUND_1, name):                           # "steps" are those of tuning
            tuning[name] = value
        elif hasattr(SAMPLING, name):
            sampling[name] = value
    style = RARE_TOKEN
    if changes.get("style") == "words":
        style = reference.style
    content = changes.get("content", "")
    if content == "named":
        content = reference.content
    how = replace(ROUND_1, **tuning)
    key = reference.file, content, style, how
    if key not in adapters:
        adapters[key] = pipe.tune(reference.picture[None], [content], style, tuning=how,
                                  superres=False)
    seeds = list(range(len(OBJECTS)))
    return pipe.generate(list(OBJECTS), adapters[key], seed=seeds, superres=False,
                         sampling=replace(SAMPLING, **sampling))


def main():
    parser = Parser(description=__doc__)
    known = list(dict.fromkeys(name for changes in SWEEP for name in changes))
    parser.add_argument("--sweep", nargs="*", metavar="SETTING",
                        help="compare these settings (if none is named, all) on validation data: "
                             f"{', '.join(known)}")
    parser.add_argument("--references", type=whole(1, 1000), default=12,
                        help="how many pictures --sweep uses (default: %(default)s)")
    parser.add_argument("--confirm", action="store_true",
                        help="with --sweep: on test data, for settings that were already chosen")
    add_base_options(parser, superres=False)
    args = parser.parse_args()
    for name in args.sweep or ():
        if name not in known:
            parser.error(f"--sweep knows no setting {name!r}; give some of {', '.join(known)}")
    if args.confirm and args.sweep is None:
        parser.error("--confirm needs --sweep")
    check_place(RESULTS, "place for the repository")
    pipe = load_pipeline(args)
    if args.sweep is not None:
        sweep(pipe, args.sweep, args.references, args.confirm)
    else:
        report(pipe)


if __name__ == "__main__":
    run_command(main)
