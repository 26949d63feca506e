"""Draws and measures a base: tokenizer, CLIP, Muse, and what an independent judge sees in its samples.

    python experiments/base.py --weights weights/tiny           # experiments/results/base.md
    python experiments/base.py --sweep                          # experiments/results/base_sweep.md
    python experiments/base.py --quick                          # the same with numbers too small to mean anything

What samples show is asked of a judge (experiments/judge.py), where there is one. Beside its verdict stands
its ceiling: what it says of real drawings of the same things in the same styles, and of those as the
tokenizer gives them back. It was trained on none of these drawings, which decides what things are asked for.
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
from experiments.judge import AMONG, VALUES, ask, attributes, held_back, judge_or_none, rank_among, reconstruct  # noqa: E402
from clip_feedback import image_features, text_score  # noqa: E402
from commandline import Parser, number, run_command  # noqa: E402
from styledrop import StyleDrop, to_tensor, write_whole  # noqa: E402
from pretrain.vqgan import codebook_health, psnr  # noqa: E402

LAMBDAS_A, LAMBDAS_B, TEMPERATURES = (1, 3, 5, 7), (1, 2, 3, 5), (1, 2, 4.5, 8)
WHOLE = ("training style", "held-out style", "held-out combination")            # questions of whole styles
TOGETHER = "palette + ground + medium"                                          # each named one counts once
RATIOS = [r / 10 for r in range(1, 11)]


# ---------------------------------------------------------------------------------------------
# Numbers

def with_error(values, groups=None, scale=1, digits=1):
    """"mean ± standard error" of values (n,), nan left out; groups (n,): values of a group are one observation."""
    values = torch.as_tensor(values, dtype=torch.float64)
    known = ~values.isnan()
    values, groups = values[known], None if groups is None else torch.as_tensor(groups)[known]
    if groups is not None:
        values = torch.stack([values[groups == g].mean() for g in groups.unique()]) if len(values) else values
    if not len(values):
        return "-"
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{scale * values.mean():.{digits}f} ± {scale * error:.{digits}f}"


def percent(values, groups=None):
    words = with_error(values, groups, 100)
    return words if words == "-" else words + " %"


def resampled(function, rows, generator, draws=100):
    """"value ± standard error" of function(rows), the error by bootstrap over the rows."""
    again = [function(rows[torch.randint(len(rows), (len(rows),), generator=generator)]) for _ in range(draws)]
    return f"{function(rows):.3g} ± {np.std(again):.2g}"


def table(head, rows):
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows), ""]


# ---------------------------------------------------------------------------------------------
# The parts of the base

def pictures(art, count, rng, held_out):
    """count drawings -> images (B, 3, 64, 64), style phrases, names; held_out: None as drawn, else whose styles."""
    images, phrases, names = [], [], []
    for i in rng.choice(len(art.names), count, replace=count > len(art.names)):
        style = styles.Style() if held_out is None else styles.sample(rng, held_out=held_out)
        images.append(styles.apply(style, data.jitter(art.drawings[i], 64, rng), rng))
        phrases.append(styles.phrase(style, art.hands[i]))
        names.append(art.names[i])
    return to_tensor(np.stack(images)), phrases, names


def captions(names, phrases):
    return [data.caption(data.content_phrase(name), phrase) for name, phrase in zip(names, phrases)]


def measure_tokenizer(pipe, sources, generator):
    rows, V = [], pipe.vqgan.config.codebook_size
    for name, (images, _, _) in sources.items():
        ids = pipe.vqgan.encode(images.to(pipe.device)).cpu().flatten(1)
        back = reconstruct(pipe.vqgan, images)
        quality = [psnr(x, y) for x, y in zip(images.split(1), back.split(1))]
        health = [resampled(lambda x, i=i: codebook_health(x, V)[i], ids, generator) for i in (0, 1)]
        rows.append([name, with_error(quality, digits=2), *health])
    return table(["pictures", "PSNR, dB", "share of the codes in use", "perplexity"], rows)


@torch.no_grad()
def clip_scores(pipe, images):
    """CLIP's scores of all names for each picture: (B, K)."""
    ids = pipe.clip.tokenize([data.content_phrase(name) for name in data.names()])
    texts = F.normalize(torch.cat([pipe.clip.encode_text(part) for part in ids.split(128)]), dim=1)      # (K, E)
    return (image_features(pipe.clip, images) @ texts.T).cpu()


def measure_clip(pipe, sources, generator):
    """The content phrase of a picture among its own and 99 others; its caption against the same in the next one's style."""
    rows = []
    for name, (images, phrases, names) in sources.items():
        rank = rank_among(clip_scores(pipe, images), torch.tensor([data.names().index(n) for n in names]), generator)
        others = phrases[1:] + phrases[:1]
        own, other = (text_score(pipe.clip, images, captions(names, words)) for words in (phrases, others))
        better = torch.tensor([float(a > b) if p != q else math.nan for a, b, p, q in zip(own, other, phrases, others)])
        rows.append([name, percent(rank < 1), percent(rank < 5), percent(better)])
    return table(["pictures", "top 1", "top 5", "its style above another"],
                 rows + [["chance", f"{100 / AMONG:.1f} %", f"{500 / AMONG:.1f} %", "50 %"]])


@torch.no_grad()
def token_loss(pipe, ids, captions, ratio, generator):
    """Mean loss and accuracy at the masked tokens of each picture: two lists of B."""
    c, losses, right = pipe.muse.config, [], []
    count = math.ceil(ratio * c.tokens)
    for rows in torch.arange(len(ids)).split(32):
        x = ids[rows].to(pipe.device)
        mask = torch.rand(x.shape, generator=generator).argsort(1).argsort(1).to(pipe.device) < count
        logits = pipe.muse(x.masked_fill(mask, c.mask_id), *pipe.embed(pipe.muse, [captions[i] for i in rows]))
        loss = F.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="none").view(x.shape)
        losses += ((loss * mask).sum(1) / count).tolist()
        right += (((logits.argmax(-1) == x) & mask).sum(1) / count).tolist()
    return losses, right


def measure_muse(pipe, sources, seed):
    lines = []
    for name, (images, phrases, names) in sources.items():
        texts = captions(names, phrases)
        ids = pipe.vqgan.encode(images.to(pipe.device)).cpu().flatten(1)
        p = torch.bincount(ids.flatten(), minlength=pipe.vqgan.config.codebook_size) / ids.numel()
        rows = []
        for ratio in RATIOS:
            loss, right = token_loss(pipe, ids, texts, ratio, torch.Generator().manual_seed(seed))
            mute, _ = token_loss(pipe, ids, [""] * len(texts), ratio, torch.Generator().manual_seed(seed))
            rows.append([f"{ratio:.1f}", with_error(loss, digits=3), percent(right), with_error(mute, digits=3)])
        rows.append(["chance", f"{-(p * p.clamp_min(1e-12).log()).sum():.3f}", f"{100 * p.max():.1f} %", ""])
        lines += [f"{name}:", ""] + table(["share masked", "loss", "right", "loss with an empty prompt"], rows)
    return lines


# ---------------------------------------------------------------------------------------------
# The judge's questions

def draw_style(question, rng):
    """The style that a question names: nothing, one attribute, or a whole style that is or is not held out.

    Held-out combination: the base has met each of its words, and never these together.
    """
    if question == "a thing":
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


def verdicts(judge, images, names, chosen, generator):
    """{what is asked: (B,) 1 right, 0 wrong, nan not asked} of pictures of `names` in the styles `chosen`."""
    rank = rank_among(ask(judge, images, "content"), torch.tensor([data.names().index(n) for n in names]), generator)
    right, seen = {"thing, top 1": (rank < 1).float(), "thing, top 5": (rank < 5).float()}, attributes(judge, images)
    for k in styles.ATTRIBUTES:
        asked = [styles.named(style).get(k) for style in chosen]
        right[k] = torch.tensor([math.nan if value is None else float(value == saw) for value, saw in zip(asked, seen[k])])
    return right


def measure_samples(pipe, judge, questions, count, seeds, seed, **sampling):
    """Each question asked of count x seeds samples, and of as many real drawings; errors are over the things."""
    art, rows = data.Art(), []
    order = np.random.default_rng(seed).permutation(held_back(art))
    picks = list({art.names[i]: int(i) for i in order}.values())[:count]         # one drawing of each thing
    if len(picks) < count:
        raise ValueError(f"the judge has not seen a drawing of only {len(picks)} things; ask for at most as many --names")
    picks = [i for i in picks for _ in range(seeds)]
    names = [art.names[i] for i in picks]
    for number_, question in enumerate(questions):
        rng, began = np.random.default_rng((seed, number_)), time.time()
        chosen = [draw_style(question, rng) for _ in picks]
        contents, phrases = [data.content_phrase(n) for n in names], [styles.phrase(s) for s in chosen]
        samples = pipe.generate(contents, seed=seed, style_phrase=phrases, **sampling).cpu()
        real = to_tensor(np.stack([styles.apply(s, data.jitter(art.drawings[i], 64, rng), rng) for i, s in zip(picks, chosen)]))
        say = lambda images, names=names, chosen=chosen: verdicts(judge, images, names, chosen,
                                                                  torch.Generator().manual_seed(seed))
        turn = seeds + 1                                    # the control asks each sample for another's thing and style
        control = say(samples, np.roll(names, turn), chosen[-turn:] + chosen[:-turn])
        columns = say(samples), control, say(reconstruct(pipe.vqgan, real)), say(real)
        if question in WHOLE:
            for column in columns:
                column[TOGETHER] = torch.cat([column[k] for k in TOGETHER.split(" + ")])
        for asked in columns[0]:
            if asked.startswith("thing") or asked == question or question in WHOLE:
                rows.append([question, asked, str(int((~columns[0][asked].isnan()).sum())),
                             *(percent(column[asked], picks * (len(column[asked]) // len(picks))) for column in columns)])
        print(f"{question}: {len(picks)} pictures, {time.time() - began:.0f} s", flush=True)
    return table(["in words", "recognised", "pictures", "samples", "control", "ceiling: reconstructed", "ceiling: real"], rows)


def sweep(pipe, scores, names, lambdas, temperatures, seed):
    """temperature by lambda_B: how often the thing is recognised, one picture of each name. scores(images) -> (B, K)."""
    rows, prompts = [], [data.content_phrase(name) for name in names]
    wanted = torch.tensor([data.names().index(name) for name in names])
    for temperature in temperatures:
        cells = []
        for lambda_b in lambdas:
            images = pipe.generate(prompts, seed=seed, lambda_b=lambda_b, temperature=temperature).cpu()
            rank = rank_among(scores(images), wanted, torch.Generator().manual_seed(seed))
            cells.append(f"{100 * (rank < 1).float().mean():.0f} / {100 * (rank < 5).float().mean():.0f}")
            print(f"temperature {temperature:g}, lambda_B {lambda_b:g}: {cells[-1]} %", flush=True)
        rows.append([f"{temperature:g}", *cells])
    return table(["temperature", *(f"lambda_B {value:g}" for value in lambdas)], rows)


def sweep_words(pipe, judge, names, lambdas_a, lambdas_b, seed):
    """lambda_A by lambda_B with a palette in words: how often palette and thing are recognised, one picture of each name."""
    rng, rows = np.random.default_rng(seed), []
    chosen, contents = [draw_style("palette", rng) for _ in names], [data.content_phrase(name) for name in names]
    phrases = [styles.phrase(style) for style in chosen]
    for lambda_a in lambdas_a:
        cells = []
        for lambda_b in lambdas_b:
            images = pipe.generate(contents, seed=seed, style_phrase=phrases, lambda_a=lambda_a, lambda_b=lambda_b).cpu()
            right = verdicts(judge, images, names, chosen, torch.Generator().manual_seed(seed))
            cells.append(f"{100 * right['palette'].mean():.0f} / {100 * right['thing, top 1'].mean():.0f}")
            print(f"lambda_A {lambda_a:g}, lambda_B {lambda_b:g}: {cells[-1]} %", flush=True)
        rows.append([f"{lambda_a:g}", *cells])
    return table(["lambda_A", *(f"lambda_B {value:g}" for value in lambdas_b)], rows)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="weights/tiny")
    parser.add_argument("--judge", default="experiments/judge.pt")
    parser.add_argument("--out", default="experiments/results", help="folder of base.md")
    parser.add_argument("--names", type=number(int, 1), default=50, help="things asked for")
    parser.add_argument("--seeds", type=number(int, 1), default=4, help="pictures of each, for each question")
    parser.add_argument("--pictures", type=number(int, 2), default=400, help="real ones, to measure Muse on; four times as many for the other parts")
    parser.add_argument("--questions", nargs="+", choices=["a thing", *styles.ATTRIBUTES, *WHOLE],
                        default=["a thing", "palette", "ground", "medium", *WHOLE])
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--lambda-a", type=number(float, 0), help="of style words (default: the pipeline's; lambda_B's is Eq. 1)")
    parser.add_argument("--lambda-b", type=number(float, 0), help="of the thing's (default: the pipeline's)")
    parser.add_argument("--sweep", action="store_true", help="only lambda_B by temperature: base_sweep.md")
    parser.add_argument("--quick", action="store_true", help="4 names, 2 seeds, 16 pictures, 2 columns of the sheet")
    args = parser.parse_args()
    if args.quick:
        args.names, args.seeds, args.pictures = 4, 2, 16
    judge, pipe = judge_or_none(args.judge), StyleDrop.load(args.weights)
    openmoji, art, rng = data.Art(role="held-out"), data.Art(), np.random.default_rng(args.seed)
    if args.sweep:
        names = [str(name) for name in rng.choice(data.names(), args.names, replace=False)]
        by, scores = (("the base's own CLIP", lambda x: clip_scores(pipe, x)) if judge is None else
                      ("the judge", lambda x: ask(judge, x, "content")))
        lines = ["# The sampler's knobs", "", f"`python {' '.join(sys.argv)}`, base {pipe.base}: the thing recognised by {by} "
                 f"among {AMONG}, top 1 / top 5 in percent, {args.names} names, one picture of each.", ""]
        lines += sweep(pipe, scores, names, *(((2, 5), (4.5,)) if args.quick else (LAMBDAS_B, TEMPERATURES)), args.seed)
        if judge is not None:
            lines += ["The same things in a palette that stands in words; palette / thing recognised, in percent. Where the two lambdas "
                      "are equal, Eq. 4 with words in the adapter's place is Eq. 1 with the whole prompt.", ""]
            lines += sweep_words(pipe, judge, names, *(((2,), (2, 5)) if args.quick else (LAMBDAS_A, LAMBDAS_B)), args.seed)
        write_whole(Path(args.out) / "base_sweep.md", lambda file: file.write("\n".join(lines).encode()))
        return
    generator = torch.Generator().manual_seed(args.seed)
    many = min(4 * args.pictures, len(openmoji.names))       # codes in use: the more pictures, the more
    drawn = {name: pictures(source, many, rng, held_out) for name, source, held_out in (
        ("training drawings", art, None), ("openmoji", openmoji, None), ("training drawings and styles", art, False),
        ("openmoji in held-out styles", openmoji, True), ("training drawings in held-out styles", art, True))}
    styled = {name: [x[:args.pictures] for x in drawn[name]] for name in ("training drawings and styles", "openmoji in held-out styles")}

    lines = ["# The base, measured", "", f"`python {' '.join(sys.argv)}`", "", f"Base {pipe.base}, torch {torch.__version__}. "
             "± is one standard error, over pictures, for samples over things.", ""]
    lines += ["## Tokenizer", "", f"{many} pictures a row.", ""] + measure_tokenizer(pipe, drawn, generator)
    print("\n".join(lines), flush=True)
    lines += [f"## CLIP: the name of a picture among {AMONG}", "", f"{many} pictures a row. The last column: a picture's own caption above the same with another picture's style.", ""]
    lines += measure_clip(pipe, drawn, generator)
    lines += ["## Muse: masked tokens", "", "Captions name content and style in full. Chance is the best constant guess.", ""]
    lines += measure_muse(pipe, styled, args.seed)
    if judge is not None:
        sampling = {k: v for k, v in dict(lambda_a=args.lambda_a, lambda_b=args.lambda_b).items() if v is not None}
        lines += ["## Samples, as the judge sees them", "",
                  f"{args.names} things x {args.seeds} seeds for each question, style words guided by lambda_A, sampled at "
                  f"{', '.join(f'{k} {v:g}' for k, v in sampling.items()) or 'the defaults'}; a thing is recognised among "
                  f"{AMONG}, an attribute among {', '.join(f'{len(set(VALUES[k]) - set(styles.UNNAMED))} ({k})' for k in styles.ATTRIBUTES)}. Control: the same "
                  "samples asked for another one's thing and style. Ceiling: drawings that the judge has never seen. Held-out "
                  "combination: words that the base knows, together for the first time; held-out style: some words are new too.", ""]
        lines += measure_samples(pipe, judge, args.questions, args.names, args.seeds, args.seed, **sampling)
    write_whole(Path(args.out) / "base.md", lambda file: file.write(("\n".join(lines) + "\n").encode()))
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
