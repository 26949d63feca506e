"""Measures a base: tokenizer, CLIP, Muse, and what an independent judge sees in its samples.

    python experiments/base.py          # experiments/results/base.md
    python experiments/base.py --names 4 --seeds 1 --pictures 16     # too few to mean anything

What samples show is asked of a judge (experiments/judge.py). Beside its verdict stands its ceiling:
what it says of real drawings of the same objects in the same styles, and of those as the tokenizer
gives them back. It was trained on none of these drawings, which decides what objects are asked for.
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from data import styles  # noqa: E402
from experiments.common import (AMONG, among, give_back, heading, numbers_of,  # noqa: E402
                                percent, table, with_error, write_text)
from experiments.judge import (VALUES, attributes, held_back, in_style, load_judge,  # noqa: E402
                               named)
from clip_feedback import image_features, text_score  # noqa: E402
from commandline import Parser, number, run_command  # noqa: E402
from styledrop import StyleDrop, to_tensor  # noqa: E402
from pretrain.vqgan import codebook_health, psnr  # noqa: E402

WHOLE = ("training style", "held-out style", "held-out combination")     # of several attributes
QUESTIONS = ("no style", "palette", "ground", "medium", *WHOLE)
TOGETHER = "palette + ground + medium"                      # each named one counts once
RATIOS = [r / 10 for r in range(1, 11)]


# ---------------------------------------------------------------------------------------------
# The parts of the base

def images_of(art, count, rng, held_out):
    """`count` drawings -> images (B, 3, 64, 64), style phrases, names.

    held_out: None: as drawn; else, whether their styles are held out.
    """
    images, phrases, names = [], [], []
    for i in rng.choice(len(art.names), count, replace=count > len(art.names)):
        style = styles.Style() if held_out is None else styles.sample(rng, held_out=held_out)
        images.append(in_style(art, i, style, rng))
        phrases.append(styles.phrase(style, art.hands[i]))
        names.append(art.names[i])
    return to_tensor(np.stack(images)), phrases, names


def captions(names, phrases):
    return [data.caption(data.content_phrase(n), phrase) for n, phrase in zip(names, phrases)]


def bootstrapped(function, rows, generator, draws=100):
    """ "value ± standard error" of each figure of function(rows), by bootstrap over the rows."""
    n = len(rows)
    again = [function(rows[torch.randint(n, (n,), generator=generator)]) for _ in range(draws)]
    return [f"{x:.3g} ± {error:.2g}" for x, error in zip(function(rows), np.std(again, 0))]


def measure_tokenizer(pipe, sources, generator):
    rows, health = [], lambda ids: codebook_health(ids, pipe.vqgan.config.codebook_size)
    for title, (images, _, _) in sources.items():
        ids = pipe.vqgan.encode(images.to(pipe.device)).cpu().flatten(1)
        quality = [psnr(x, y) for x, y in zip(images.split(1), give_back(pipe, images).split(1))]
        rows.append([title, with_error(quality, digits=2), *bootstrapped(health, ids, generator)])
    return table(["pictures", "PSNR, dB", "share of the codes in use", "perplexity"], rows)


@torch.no_grad()
def clip_scores(pipe, images):
    """CLIP's scores of all names for each image: (B, K)."""
    ids = pipe.clip.tokenize([data.content_phrase(name) for name in data.names()])
    texts = torch.cat([pipe.clip.encode_text(part) for part in ids.split(128)])  # (K, E)
    return (image_features(pipe.clip, images) @ F.normalize(texts, dim=1).T).cpu()


def measure_clip(pipe, sources):
    """The right name among 100; an image's caption against the same with the next one's style."""
    rows = []
    for title, (images, phrases, names) in sources.items():
        right = among(clip_scores(pipe, images), numbers_of(names))
        others = phrases[1:] + phrases[:1]
        own = text_score(pipe.clip, images, captions(names, phrases))
        above = (own > text_score(pipe.clip, images, captions(names, others))).double()
        same = torch.tensor([p == q for p, q in zip(phrases, others)], device=above.device)
        rows.append([title, percent(right), percent(above.masked_fill(same, math.nan))])
    return table(["pictures", f"named among {AMONG}", "its style above another"],
                 [*rows, ["chance", f"{100 / AMONG:.1f} %", "50 %"]])


@torch.no_grad()
def token_loss(pipe, ids, texts, ratio, seed):
    """Mean loss and accuracy at the masked tokens of each image: two lists of B."""
    c, losses, right = pipe.muse.config, [], []
    count, generator = math.ceil(ratio * c.tokens), torch.Generator().manual_seed(seed)
    for rows in torch.arange(len(ids)).split(32):
        x = ids[rows].to(pipe.device)                                            # (b, N)
        order = torch.rand(x.shape, generator=generator).argsort(1).argsort(1)
        mask = order.to(pipe.device) < count
        states = pipe.embed(pipe.muse, [texts[i] for i in rows])
        logits = pipe.muse(x.masked_fill(mask, c.mask_id), *states)              # (b, N, V)
        loss = F.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="none").view(x.shape)
        losses += ((loss * mask).sum(1) / count).tolist()
        right += (((logits.argmax(-1) == x) & mask).sum(1) / count).tolist()
    return losses, right


def measure_muse(pipe, sources, seed):
    lines = []
    for title, (images, phrases, names) in sources.items():
        texts, rows = captions(names, phrases), []
        ids = pipe.vqgan.encode(images.to(pipe.device)).cpu().flatten(1)
        p = torch.bincount(ids.flatten(), minlength=pipe.vqgan.config.codebook_size) / ids.numel()
        for ratio in RATIOS:
            loss, right = token_loss(pipe, ids, texts, ratio, seed)
            silent, _ = token_loss(pipe, ids, [""] * len(texts), ratio, seed)
            rows.append([f"{ratio:.1f}", with_error(loss, digits=3), percent(right),
                         with_error(silent, digits=3)])
        entropy = -(p * p.clamp_min(1e-12).log()).sum()
        rows.append(["chance", f"{entropy:.3f}", f"{100 * p.max():.1f} %", ""])
        lines += [f"{title}:", ""]
        lines += table(["share masked", "loss", "right", "loss with an empty prompt"], rows)
    return lines


# ---------------------------------------------------------------------------------------------
# The judge's questions

def draw_style(question, rng):
    """The style that a question is about: none, one attribute, or a whole style.

    Held-out combination: the base has met each of its words, and never these together.
    """
    if question == "no style":
        return styles.Style()
    held_out = question.startswith("held-out")
    while True:
        if question in styles.ATTRIBUTES:
            style = styles.Style(**{question: str(rng.choice(styles.ATTRIBUTES[question]))})
        else:
            style = styles.sample(rng, held_out=held_out)
        known = question != "held-out combination" or not styles.has_new_words(style)
        if styles.named(style) and styles.is_held_out(style) == held_out and known:
            return style


def verdicts(judge, images, names, chosen):
    """{what is asked: (B,), 1 right, 0 wrong, nan not asked} of images of `names`.

    chosen: their B styles. "object" is the chance that it is named among 100.
    """
    right, seen = {"object": named(judge, images, names)}, attributes(judge, images)
    for k in styles.ATTRIBUTES:
        asked = [styles.named(style).get(k) for style in chosen]
        right[k] = torch.tensor([math.nan if value is None else float(value == saw)
                                 for value, saw in zip(asked, seen[k])]).double()
    return right


def measure_samples(pipe, judge, args):
    """Each question asked of samples and of as many real drawings; errors are over the objects."""
    art, rows = data.Art(), []
    order = np.random.default_rng(args.seed).permutation(held_back(art))
    picks = list({art.names[i]: int(i) for i in order}.values())[:args.names]    # one of each name
    if len(picks) < args.names:
        raise ValueError(f"the judge has not seen a drawing of only {len(picks)} objects; "
                         "ask for at most as many --names")
    picks = [i for i in picks for _ in range(args.seeds)]
    names, turn = [art.names[i] for i in picks], args.seeds
    contents = [data.content_phrase(name) for name in names]
    for k, question in enumerate(QUESTIONS):
        rng, began = np.random.default_rng((args.seed, k)), time.time()
        chosen = [draw_style(question, rng) for _ in picks]
        phrases = [styles.phrase(style) for style in chosen]
        samples = pipe.generate(contents, seed=args.seed, style_phrase=phrases).cpu()
        drawn = [in_style(art, i, style, rng) for i, style in zip(picks, chosen)]
        real = to_tensor(np.stack(drawn))
        others = names[turn:] + names[:turn], chosen[turn:] + chosen[:turn]      # the next object's
        columns = [verdicts(judge, samples, names, chosen), verdicts(judge, samples, *others),
                   verdicts(judge, give_back(pipe, real), names, chosen),
                   verdicts(judge, real, names, chosen)]
        if question in WHOLE:
            for column in columns:
                column[TOGETHER] = torch.cat([column[k] for k in TOGETHER.split(" + ")])
        for asked, values in columns[0].items():
            if question in WHOLE or asked in ("object", question):
                groups = picks * (len(values) // len(picks))
                rows.append([question, asked, str(int((~values.isnan()).sum())),
                             *(percent(column[asked], groups) for column in columns)])
        print(f"{question}: {len(picks)} pictures, {time.time() - began:.0f} s", flush=True)
    return table(["in words", "recognised", "pictures", "samples", "control",
                  "ceiling: reconstructed", "ceiling: real"], rows)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", default="weights/tiny")
    add("--judge", default="experiments/judge.pt")
    add("--out", default="experiments/results", help="folder of base.md")
    add("--names", type=number(int, 2), default=50, help="objects asked for")
    add("--seeds", type=number(int, 1), default=4, help="pictures of each, for each question")
    add("--pictures", type=number(int, 2), default=400,
        help="real ones, to measure Muse on; four times as many for the other parts")
    add("--seed", type=number(int, 0), default=0)
    args = parser.parse_args()
    judge, pipe = load_judge(args.judge), StyleDrop.load(args.weights)
    openmoji, art, rng = data.Art(role="held-out"), data.Art(), np.random.default_rng(args.seed)
    many = min(4 * args.pictures, len(openmoji.names))       # more images show more codes
    drawn = {title: images_of(source, many, rng, held_out) for title, source, held_out in (
        ("training drawings", art, None), ("openmoji", openmoji, None),
        ("training drawings and styles", art, False),
        ("openmoji in held-out styles", openmoji, True),
        ("training drawings in held-out styles", art, True))}
    styled = {title: [x[:args.pictures] for x in drawn[title]]
              for title in ("training drawings and styles", "openmoji in held-out styles")}

    generator = torch.Generator().manual_seed(args.seed)
    lines = [*heading("The base, measured"), f"Base {pipe.base}, torch {torch.__version__}. ± is "
             "one standard error, over pictures, for samples over objects.", "",
             "## Tokenizer", "", f"{many} pictures a row.", ""]
    lines += measure_tokenizer(pipe, drawn, generator)
    print("\n".join(lines), flush=True)
    lines += [f"## CLIP: the name of a picture among {AMONG}", "", f"{many} pictures a row. The "
              "last column: a picture's own caption above the same with another one's style.", ""]
    lines += measure_clip(pipe, drawn)
    lines += ["## Muse: masked tokens", "", "Captions name content and style in full. Chance is "
              "the best constant guess.", ""]
    lines += measure_muse(pipe, styled, args.seed)
    values = {k: len(set(VALUES[k]) - set(styles.UNNAMED)) for k in styles.ATTRIBUTES}
    lines += ["## Samples, as the judge sees them", "",
              f"{args.names} objects x {args.seeds} seeds for each question, sampled at the "
              f"defaults; an object is recognised among {AMONG}, an attribute among "
              f"{', '.join(f'{n} ({k})' for k, n in values.items())}; ground is the background. "
              "Control: the same samples asked for the next one's object and style. Ceiling: "
              "drawings that the judge has never seen. Held-out combination: words that the base "
              "knows, together for the first time; held-out style: some words are new too.", ""]
    lines += measure_samples(pipe, judge, args)
    text = "\n".join(lines)
    write_text(Path(args.out) / "base.md", text)
    print(text)


if __name__ == "__main__":
    run_command(main)
