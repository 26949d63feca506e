"""Is a second round better than the first? StyleDrop's Tables 1 and 2, Section 4.4.3.

    python -m experiments.feedback      # results/feedback.md and feedback.json, about an hour

Each test reference of foreign.py is tuned (round 1). From its adapter the pool of
`train.py --rounds 2` is sampled: 30 prompts with 8 images each. One image for each prompt is chosen

    by CLIP       the one whose text score is highest (Section 3.3)
    at random     the paper's control
    by an oracle  one whose object the judge of foreign.py names and whose palette is nearest to the
                  reference, if there is one: what a careful person might choose

and a new adapter is tuned on the chosen images (round 2). All adapters sample the dozen objects of
foreign.py. Only the first stage is tuned and sampled.

The plan, written before anything was sampled. Primary question: are there more samples with both
the object and the nearest palette after a second round by CLIP than after round 1, at the default
lambda_A? Then, for each chooser: object kept, palette and texture. Round 1 is also sampled with
other lambda_A, and round 2 by CLIP is compared with each of them, since a second round is only
worth its time if it is better than turning that knob. A difference is paired over references. It is
decided if its 95 % interval (Student's t) excludes zero; two rounds count as equal if the interval
lies within 5 points of zero.

What is already in feedback.json is not computed again.
"""

from dataclasses import asdict

import numpy as np
import torch

from checkpoint.files import write_json, write_text
from commandline.options import Parser, whole
from commandline.terminal import run_command, say
from experiments.common import (INTERVALS, heading, made_by, minus, percent, read_results,
                                start_study, table)
from experiments.foreign import (COMPARED, MEASURES, OBJECTS, TITLES, Ruler, columns_of,
                                 load_references, spread)
from experiments.object_judge import name_scores
from experiments.style_measures import is_nearest, palette
from human_feedback.rounds import (POOL_PROMPTS, choose_at_random, choose_by_clip, indices_in_pool,
                                   sample_pool)
from styledrop import RARE_TOKEN, ROUND_1, ROUND_2, SAMPLING

SEEDS = list(range(len(OBJECTS)))
POOL = 8                                # images for each prompt
LAMBDAS = (0.0, 0.5, 1.0, 1.5)          # other lambda_A that round 1 is sampled with
CHOOSERS = ("clip", "random", "oracle")


def choose_by_oracle(ruler, i, pool):
    """For each prompt an image that shows its object in the palette of reference i -> P indices.

    If no image does both, the first that does one of them, or else the first.
    """
    images = pool.images
    named = name_scores(ruler.judge, images).argmax(-1).tolist()
    columns = {prompt: columns_of(prompt, ruler.names) for prompt in pool.prompts}
    kept = [name in columns[content] for name, content in zip(named, pool.contents)]
    _, _, palettes, _ = ruler.at_side(images.shape[-1])
    near = is_nearest(palette(images), palettes[ruler.rivals[i]])
    score = torch.tensor(kept).float() + near.float()
    score = score.view(len(pool.prompts), -1)                # (P, K)
    return indices_in_pool(score.argmax(1, keepdim=True), score.shape[1])


def try_reference(pipe, ruler, i, prompts):
    """Both rounds for one reference -> a row of results for each arm and lambda_A."""
    reference, objects = ruler.references[i], list(OBJECTS)

    def measures_of(arm, adapter, lambda_a):
        images = pipe.generate(objects, adapter, seed=SEEDS, superres=False, lambda_a=lambda_a)
        measures = ruler.measure(images, objects, i, with_clip=False)
        means = {name: float(np.mean(measures[name])) for name in MEASURES}
        return dict(reference=reference.file, arm=arm, lambda_a=lambda_a, **means)

    first = pipe.tune(reference.picture[None], [""], RARE_TOKEN, superres=False)
    rows = [measures_of("round 1", first, value) for value in (SAMPLING.lambda_a, *LAMBDAS)]
    pool = sample_pool(pipe, prompts, POOL, first, seed=1, superres=False)
    for chooser in CHOOSERS:
        if chooser == "clip":
            chosen = choose_by_clip(pipe, pool)
        elif chooser == "random":
            chosen = choose_at_random(pipe, pool, torch.Generator().manual_seed(0))
        else:
            chosen = choose_by_oracle(ruler, i, pool)
        contents = [pool.contents[k] for k in chosen]
        second = pipe.tune(pool.images[chosen], contents, RARE_TOKEN, superres=False,
                           tuning=ROUND_2)
        rows.append(measures_of(f"round 2, {chooser}", second, SAMPLING.lambda_a))
    return rows


def report(pipe, rows):
    """The lines of feedback.md."""
    by_arm = {}
    for row in rows:
        by_arm.setdefault((row["arm"], row["lambda_a"]), []).append(row)
    count = len(by_arm["round 1", SAMPLING.lambda_a])
    lines = heading("A second round of feedback")
    lines += [made_by(pipe), "", f"{count} test references, {len(OBJECTS)} objects of each, "
              f"seeds 0 to {SEEDS[-1]}, the first stage alone. Errors are standard errors over "
              "references.", ""]
    body = []
    for (arm, lambda_a), group in by_arm.items():
        body.append([arm, f"{lambda_a:g}", *(percent([row[name] for row in group])
                                             for name in MEASURES)])
    lines += table(["", "lambda_A", *TITLES], body)
    lines += ["## Round 2 minus round 1", "",
              f"{INTERVALS} Round 2 has the default lambda_A, and round 1 has the one of the row.",
              ""]
    pairs = [(chooser, SAMPLING.lambda_a) for chooser in CHOOSERS]
    pairs += [("clip", lambda_a) for lambda_a in LAMBDAS]
    body = []
    for chooser, lambda_a in pairs:
        first = by_arm["round 1", lambda_a]
        second = by_arm[f"round 2, {chooser}", SAMPLING.lambda_a]
        body.append([f"chosen by {chooser}", f"{lambda_a:g}", *minus(second, first, COMPARED)])
    return lines + table(["", "lambda_A of round 1", *COMPARED], body)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--references", type=whole(1, 1000), default=12,
                        help="how many of the test references (default: %(default)s)")
    parser.add_argument("--prompts", type=whole(1, len(POOL_PROMPTS)), default=len(POOL_PROMPTS),
                        help="prompts of the pool (default: %(default)s)")
    args, pipe, out = start_study(parser)
    references = load_references("reported", pipe.resolution)
    ruler = Ruler(pipe, references)
    path = out / "feedback.json"
    settings = dict(base=pipe.base_id, round_1=asdict(ROUND_1), round_2=asdict(ROUND_2),
                    sampling=asdict(SAMPLING), pool=[args.prompts, POOL])
    results = read_results(path, settings)
    done = {row["reference"] for row in results["rows"]}
    some = spread(len(references), args.references)
    for k, i in enumerate(some):
        reference = references[i]
        if reference.file not in done:
            results["rows"] += try_reference(pipe, ruler, i, POOL_PROMPTS[:args.prompts])
        write_json(path, results)
        write_text(out / "feedback.md", "\n".join(report(pipe, results["rows"])))
        say(f"reference {k + 1} of {len(some)}: {reference.file}")


if __name__ == "__main__":
    run_command(main)
