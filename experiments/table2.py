"""Table 2 at this scale: the base, one round, rounds of feedback, and the other ways to tune.

    python experiments/table2.py                        # experiments/results/table2.md, table2.png
    python experiments/table2.py --things 3 --seeds 1 --styles 1 --pool 2     # a look at it

Held-out styles of the space, and openmoji; each is taught by one drawing, then 20 other things are drawn
with 4 seeds. Text and style are cosines of the shipped CLIP, as in the paper; thing, leakage and distance
are the independent judge's, who also stands in for a person (R2-oracle). Every arm of every style runs in
a process of its own, so that its time and memory are its own; what is finished is kept in --work.
"""

import json
import multiprocessing
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import clip_feedback  # noqa: E402
import data  # noqa: E402
import styledrop  # noqa: E402
from data import styles  # noqa: E402
from experiments.base import table, with_error  # noqa: E402
from experiments.judge import AMONG, ask, load_judge, rank_among, style_features  # noqa: E402
from experiments.one_shot import choose_subjects, draw, measure, paired_bootstrap  # noqa: E402
from pretrain.common import machine  # noqa: E402
from commandline import Parser, number, run_command  # noqa: E402
from data.pictures import grid  # noqa: E402
from human_feedback.rounds import FEEDBACK, Pool, sample_pool  # noqa: E402
from styledrop import (RARE_TOKEN, StyleDrop, load_adapter, style_prompt, to_tensor,  # noqa: E402
                       to_uint8, write_whole)
from human_feedback.rounds import POOL_PROMPTS, ROUND, write_json  # noqa: E402
from commandline import peak_memory  # noqa: E402
from train import METHOD_LR  # noqa: E402

BASE, WORDS = "base, style in words", "base, its words guided"
ROUNDS = ("R2-CLIP", "R2-CLIP, style in the text", "R2-CLIP, its ten best", "R2-random", "R2-oracle")
METHODS = {"full fine-tuning": "full", "LoRA": "lora", "textual inversion": "textual-inversion"}
ARMS = (BASE, WORDS, "R1", *ROUNDS, *METHODS)
METRICS = {"text": 3, "style": 3, "thing": 1, "leakage": 1, "leakage by rank": 1, "leakage by CLIP": 1, "distance": 3}    # digits
SHARES = ("thing", "leakage", "leakage by rank", "leakage by CLIP")              # in percent
PICKS = 10                                                                       # of the oracle, as of the paper's people
CLAIMS = (                              # (what the paper reports, arm, against, metric, sign)
    ("one round raises the style score (Table 2)", "R1", BASE, "style", 1),
    ("one round costs some text score (Table 2)", "R1", BASE, "text", -1),
    ("and more style than words do, however guided", "R1", WORDS, "style", 1),
    ("CLIP feedback raises the text score (4.4.3)", "R2-CLIP", "R1", "text", 1),
    ("CLIP feedback lowers the style score (4.4.3)", "R2-CLIP", "R1", "style", -1),
    ("CLIP feedback: the thing is seen more often", "R2-CLIP", "R1", "thing", 1),
    ("CLIP feedback: less leakage (3.3)", "R2-CLIP", "R1", "leakage", -1),
    ("the same, by how near the reference's thing comes", "R2-CLIP", "R1", "leakage by rank", -1),
    ("the same by CLIP, which chose", "R2-CLIP", "R1", "leakage by CLIP", -1),
    ("CLIP chooses better than chance, by text", "R2-CLIP", "R2-random", "text", 1),
    ("even a random choice raises the text score (4.4.3)", "R2-random", "R1", "text", 1),
    ("a person keeps more style than CLIP does (4.4.3)", "R2-oracle", "R2-CLIP", "style", 1),
    ("and it is who chooses, not how many are chosen", "R2-oracle", "R2-CLIP, its ten best", "style", 1),
    ("adapters keep more text than full fine-tuning (4.2: its raters; its CLIP says the reverse)", "R1", "full fine-tuning", "text", 1),
    ("adapters learn more style than LoRA (Figure 4)", "R1", "LoRA", "style", 1),
    ("adapters learn more style than textual inversion (Figure 4)", "R1", "textual inversion", "style", 1),
)


def choose_by_judge(judge, pool, reference, generator):
    """A person's stand-in: of each prompt's pictures the one that shows the thing in the nearest style; the best ten."""
    name_of = {data.content_phrase(name): i for i, name in enumerate(data.names())}
    wanted = torch.tensor([name_of[content] for content in pool.contents])
    seen = rank_among(ask(judge, pool.images, "content"), wanted, generator) == 0
    score = 2 * seen + style_features(judge, pool.images) @ style_features(judge, reference)[0]
    best = styledrop.clip_feedback.select_best(score.view(len(pool.prompts), -1))
    best = torch.tensor(styledrop.flat(best, len(pool.images) // len(pool.prompts)))
    return sorted(best[score[best].topk(min(PICKS, len(best))).indices].tolist())


def run(task):
    """One part of one style, in this process alone -> its numbers; written to its file in --work."""
    args, index, part = task
    torch.set_num_threads(max(1, torch.get_num_threads() // args.jobs))
    pipe, judge = StyleDrop.load(args.weights), load_judge(args.judge)
    art, folder = data.Art(["noto", "openmoji"]), Path(args.work) / f"style{index}"
    things, subjects = choose_subjects(art, args)
    style, source, reference, _ = subjects[index]
    words = styles.phrase(style) or art.hands[art.sets.index(source)]
    example, prompts = draw(art, [reference], source, style, args.seed), [data.content_phrase(name) for name in things]
    content, began, adapter = [data.content_phrase(reference)], time.time(), None
    file = folder / f"{part.replace(' ', '_')}.pt"
    if part == "pool":
        pool = sample_pool(pipe, POOL_PROMPTS, args.pool, load_adapter(folder / "R1.pt"), args.seed + 1)
        write_whole(folder / "pool.npy", lambda file: np.save(file, to_uint8(pool.images)))
    elif part == "R1":
        adapter = pipe.tune(example, content, words, seed=args.seed)
    elif part in METHODS:
        method = METHODS[part]
        phrase = RARE_TOKEN if method == "textual-inversion" else words          # it learns a word of its own
        adapter = pipe.tune(example, content, phrase, lr=METHOD_LR[method], seed=args.seed, method=method)
    elif part in ROUNDS:
        pool = Pool(to_tensor(np.load(folder / "pool.npy")), POOL_PROMPTS, words)
        generator = torch.Generator().manual_seed(args.seed)
        chosen = (choose_by_judge(judge, pool, example, generator) if part == "R2-oracle" else
                  FEEDBACK["random"](pipe, pool, generator) if part == "R2-random" else
                  FEEDBACK["clip"](pipe, pool, generator, style_words="style" in part))
        if "ten best" in part:                              # as many as the oracle: only who chooses differs
            scores = clip_feedback.text_score(pipe.clip, pool.images[chosen], [pool.contents[i] for i in chosen])
            chosen = sorted(chosen[i] for i in scores.topk(PICKS).indices.tolist())
        adapter = pipe.tune(pool.images[chosen], [pool.contents[i] for i in chosen], words, is_shared=False,
                            seed=args.seed, **ROUND)
    numbers = dict(words=words, reference=content[0], seconds=round(time.time() - began, 1))
    if part != "pool":
        if adapter is not None:
            adapter.save(file)
        texts = [style_prompt(prompt, words) for prompt in prompts] if part == BASE else prompts
        images = sample_pool(pipe, texts, args.seeds, adapter, args.seed, style_phrase=words if part == WORDS else None).images
        again = lambda values: [value for value in values for _ in range(args.seeds)]
        truth = draw(art, things, source, style, args.seed).repeat_interleave(args.seeds, 0)
        judged = measure(judge, images, truth, again(things), reference, style, source)
        scores = styledrop.measure(pipe, images, again(prompts), example, content)
        above = rank_among(ask(judge, images, "content"), torch.full((len(images),), data.names().index(reference)),
                           torch.Generator().manual_seed(args.seed))
        found = {"text": scores["text"], "style": scores["style"], "thing": judged["thing seen"], "leakage": judged["leakage"],
                 "leakage by rank": 1 - above / (AMONG - 1), "leakage by CLIP": scores["leakage"], "distance": judged["judge's distance"]}
        numbers |= {m: values.mean().item() for m, values in found.items()}
        numbers["pictures"] = {m: [round(x, 4) for x in values.tolist()] for m, values in found.items()}
        first = torch.cat([example, images[::args.seeds][:8]])
        write_whole(file.with_suffix(".npy"), lambda file: np.save(file, to_uint8(first)))
    numbers["megabytes"] = round(peak_memory())
    write_json(file.with_suffix(".json"), numbers)
    return numbers


def verdict(mean, low, high, sign):
    """What an interval of a difference says of a claim about its sign."""
    if sign * mean < 1e-9:                                  # rounding is no difference
        return "does not hold" if low > 0 or high < 0 else "not seen"
    return "holds" if low > 0 or high < 0 else "its direction, within the error"


def in_errors(differences):
    """[(n,) differences of each style's pictures] -> their mean in its standard errors, of two kinds.

    Over the styles: would other styles of this kind show it? Over the pictures, the styles as they are: would other
    pictures in these show it? The paper's errors are of the second kind.
    """
    means = np.array([values.mean() for values in differences])
    pictures = np.array([values.var(ddof=1) / len(values) if len(values) > 1 else 0 for values in differences])
    errors = (means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else 0, pictures.sum() ** 0.5 / len(means))
    return [f"{means.mean() / error:+.1f}" if error > 1e-9 else "-" for error in errors]


def report(found, seed):
    """found: {arm: [numbers of each style]} -> lines of Markdown."""
    column = lambda arm, key: [numbers[key] for numbers in found[arm]]
    scale = lambda metric: 100 if metric in SHARES else 1
    rows = [[arm, *(with_error(column(arm, m), scale=scale(m), digits=d) for m, d in METRICS.items()),
             f"{np.mean(column(arm, 'total')):.0f}", f"{max(column(arm, 'megabytes'))}"] for arm in found if arm != "pool"]
    lines = table(["", *(f"{m}, %" if m in SHARES else m for m in METRICS), "to teach, s", "peak memory, MB"], rows)
    lines += ["What the paper reports, and here: difference, 95 % interval of a paired bootstrap over the styles, and the "
              "difference in its own standard errors, over the styles and over the pictures. With few styles the interval is too "
              "narrow: it leaves out 0 wherever all styles agree. The paper's errors are over pictures: they say whether "
              "other pictures in the same styles would show it, not whether other styles would.", ""]
    rows = []
    for claim, arm, against, metric, sign in CLAIMS:
        generator = torch.Generator().manual_seed(seed)
        mean, low, high = (scale(metric) * x for x in paired_bootstrap(column(arm, metric), column(against, metric), generator))
        differences = [np.subtract(one["pictures"][metric], other["pictures"][metric]) for one, other in zip(found[arm], found[against])]
        rows.append([claim, f"{metric}: {arm} less {against}", "{0:+.{3}f} [{1:+.{3}f}, {2:+.{3}f}]".format(
            mean, low, high, METRICS[metric]), " / ".join(in_errors(differences)), verdict(mean, low, high, sign)])
    lines += table(["claim", "measured", "difference", "in standard errors: styles / pictures", "here it"], rows)
    kept = np.mean(column("R1", "thing")) / max(1e-9, np.mean(column(BASE, "thing")))
    lines += [f"R1 shows the thing {100 * kept:.0f} % as often as the base does.", ""]
    names = [f"{n['words']} ({n['reference']})" for n in found["R1"]]
    rows = [[name, *(" / ".join(f"{found[arm][i][m] * scale(m):.{METRICS[m]}f}" for arm in (BASE, "R1", "R2-CLIP", "R2-oracle"))
                     for m in METRICS)] for i, name in enumerate(names)]
    return lines + [f"Style by style: {BASE} / R1 / R2-CLIP / R2-oracle.", ""] + table(["style (reference)", *METRICS], rows)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="weights/tiny")
    parser.add_argument("--judge", default="experiments/judge.pt")
    parser.add_argument("--work", default="runs/table2", help="what is finished; give another for other settings")
    parser.add_argument("--out", default="experiments/results", help="folder of table2.md and table2.png")
    parser.add_argument("--styles", type=number(int, 1), default=5, help="held-out styles, openmoji not counted")
    parser.add_argument("--things", type=number(int, 2), default=20)
    parser.add_argument("--seeds", type=number(int, 1), default=4)
    parser.add_argument("--pool", type=number(int, 1), default=8, help="pictures for each of the 30 prompts of a pool")
    parser.add_argument("--jobs", type=number(int, 1), default=1, help="styles at a time; they share the machine's cores")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    args = parser.parse_args()
    settings = {k: v for k, v in vars(args).items() if k not in ("work", "out", "jobs")} | dict(
        base=StyleDrop.load(args.weights).base,
        clip=styledrop.fingerprint(clip_feedback.load_clip(Path(args.weights) / "clip.pt").state_dict()),
        judged_by=styledrop.fingerprint(load_judge(args.judge).state_dict()))
    kept = Path(args.work) / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        raise ValueError(f"{args.work} holds parts of other settings; give another --work")
    write_json(kept, settings)
    parts = (BASE, WORDS, "R1", "pool", *ROUNDS, *METHODS)

    def one_style(index, pool):
        """The parts of one style in their order, what is finished from its file: {part: its numbers}."""
        done = {}
        for part in parts:
            file = Path(args.work) / f"style{index}" / f"{part.replace(' ', '_')}.json"
            done[part] = numbers = json.loads(file.read_text()) if file.exists() else pool.apply(run, ((args, index, part),))
            before = ("R1", "pool") if part in ROUNDS else ()
            numbers["total"] = numbers["seconds"] + sum(done[other]["seconds"] for other in before)
            print(f"{numbers['words']}: {part}  " + "  ".join(
                f"{m} {numbers[m]:.3f}" for m in METRICS if m in numbers) + f"  {numbers['seconds']:.0f} s", flush=True)
        return done

    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool, ThreadPool(args.jobs) as waiting:
        of_style = waiting.map(lambda index: one_style(index, pool), range(args.styles + 1), chunksize=1)
    found = {part: [done[part] for done in of_style] for part in parts}
    lines = ["# Table 2 at this scale", "", f"`python {' '.join(sys.argv)}` on {machine()}, base {settings['base']}.", "",
             f"{args.styles + 1} styles, one reference each, {args.things} prompts x {args.seeds} seeds; ± is one standard error over "
             f"the styles. Pools: {args.pool} pictures for each of 30 prompts. Every prompt names the style in words, except for "
             "textual inversion, which learns a word of its own; the first row samples them by Eq. 1, the second by Eq. 4 with the words in the adapter's place. Text: cosine with the content phrase; style: cosine with the "
             "reference, both by the shipped CLIP. Thing, leakage: how often the judge sees the thing, and the reference's "
             f"thing, first among {AMONG}, which chance does in 1 %. Leakage by rank: how many of the {AMONG - 1} others look less like the picture to "
             "the judge than the reference's thing does; 50 % where nothing leaks. Leakage by CLIP: how often CLIP finds the reference's phrase nearer than the prompt. Distance: of the judge's style features to the true drawing. Who chose also "
             "scores: CLIP the texts of R2-CLIP, which learns 30 pictures, the judge things and distances of R2-oracle, which learns ten. To teach: R1 and the pool "
             f"included where they are needed{f', {args.jobs} styles at a time' if args.jobs > 1 else ''}.", ""]
    lines += report(found, args.seed)
    sheets = [np.load(Path(args.work) / f"style{i}" / f"{arm.replace(' ', '_')}.npy") for i in range(args.styles + 1) for arm in ARMS]
    lines += ["## table2.png", "", f"For each style the reference and eight things, first seeds, none chosen; rows: {', '.join(ARMS)}."]
    picture = grid(np.concatenate(sheets), len(sheets[0]))
    write_whole(Path(args.out) / "table2.png", lambda file: picture.save(file, "PNG", optimize=True))
    write_whole(Path(args.out) / "table2.md", lambda file: file.write(("\n".join(lines) + "\n").encode()))
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
