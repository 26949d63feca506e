"""Does an adapter learn a style better than other ways to tune? StyleDrop's Section 4.2.

    python -m experiments.baselines --choose    # first: choose settings (validation pictures)
    python -m experiments.baselines             # then: report (test pictures)

Both write results/baselines.md and baselines.json after each reference. What is already in
baselines.json is not computed again.

The paper compares StyleDrop on Muse with DreamBooth, LoRA and textual inversion on other bases.
Here all tune one base, on the foreign references of foreign.py, with the same prompts and loss:

    adapter             StyleDrop with its default settings
    full fine-tuning    all weights of G: DreamBooth (arXiv 2208.12242) without its prior loss
    LoRA                a change of low rank in each matrix of G's blocks (arXiv 2106.09685)
    textual inversion   the embedding of the rare token [V*] in T (arXiv 2208.01618)

All but the adapter return a modified Muse, G' with T', which is the tuned model in Eq. 4:

    l = G'(v, T'(t)) + lambda_A (G'(v, T'(t)) - G(v, T(t))) + lambda_B (G(v, T(t)) - G(v, T(n)))

The first stage alone is tuned and sampled. The control is the base asked with the same prompts.

The plan, written before anything was sampled. The measure is the share of samples with both the
object and the nearest palette. The learning rate and lambda_A of each method are those for which it
is highest on the validation references; the adapter keeps its defaults, which were chosen in the
same way. Primary question: does each method have more or fewer such samples than the adapter, on
the test references? A difference is paired over references. It is decided if its 95 % interval
(Student's t) excludes zero; two methods count as equal if the interval lies within 5 points of
zero. lambda_B was chosen for the adapter, and so were the masking and the number of steps.

Shapes: B images, N image tokens, L' states of T, V codebook size, K views of a reference, r rank.
"""

import copy
import math
from dataclasses import asdict

import numpy as np
import torch
import torch.nn as nn
from torch.nn.utils import parametrize

import muse
from checkpoint.files import write_json, write_text
from commandline.options import Parser, whole
from commandline.terminal import run_command, say
from experiments.common import (INTERVALS, heading, made_by, minus, percent, read_results,
                                start_study, table)
from experiments.foreign import COMPARED, MEASURES, OBJECTS, TITLES, Ruler, load_references, spread
from styledrop import (RARE_TOKEN, ROUND_1, SAMPLING, autocast, guided_logits, only_probable,
                       random_views, shuffled, style_prompt)

SEEDS = list(range(len(OBJECTS)))
LAMBDAS = (0, SAMPLING.lambda_a, 1.5)   # lambda_A
RANK = 3                                # of LoRA, which then trains about as much as the adapter


# --------------------------------------------------------------------------------------------------
# Tuning. Each function returns another Muse, frozen, and leaves pipe.muse as it is.
# tokens (K, N): E(x) of K views; texts: their K prompts t; generator: of the CPU

def tune_fully(pipe, tokens, texts, steps, lr, generator):
    """Full fine-tuning: all weights of G. T is frozen, as in DreamBooth on Imagen."""
    tuned = copy.deepcopy(pipe.muse)
    weights = [weight for name, weight in tuned.named_parameters()
               if not name.startswith("text_encoder.")]
    fit(pipe, tuned, weights, tokens, texts, steps, lr, generator)
    return tuned


def tune_lora(pipe, tokens, texts, steps, lr, generator):
    """LoRA: W + B A in each linear layer of G's blocks, merged into W at the end."""
    tuned = copy.deepcopy(pipe.muse)
    changes = []
    for layer in linear_layers(tuned):
        change = LowRank(layer, RANK, generator).to(pipe.device)
        parametrize.register_parametrization(layer, "weight", change)
        changes += change.parameters()
    fit(pipe, tuned, changes, tokens, texts, steps, lr, generator)
    for layer in linear_layers(tuned):
        parametrize.remove_parametrizations(layer, "weight")
    return tuned


def tune_text(pipe, tokens, texts, steps, lr, generator):
    """Textual inversion: train the rows of RARE_TOKEN in T's embedding, from the base's values.

    The original adds one word to the vocabulary. The BPE reads [V*] as several tokens, which occur
    in no other word of a caption, so all of their rows are trained. Raises ValueError for a prompt
    without [V*], which would teach it nothing.
    """
    if not all(RARE_TOKEN in text for text in texts):
        raise ValueError(f"textual inversion needs prompts that contain {RARE_TOKEN}")
    tuned = copy.deepcopy(pipe.muse)
    embedding = tuned.text_encoder.token
    ids = sorted(set(pipe.tokenizer.encode(RARE_TOKEN)))
    change = Rows(embedding, ids).to(pipe.device)
    parametrize.register_parametrization(embedding, "weight", change)
    fit(pipe, tuned, list(change.parameters()), tokens, texts, steps, lr, generator)
    parametrize.remove_parametrizations(embedding, "weight")
    return tuned


class LowRank(nn.Module):
    """W -> W + B A, with W (out, in), B (out, r) zero and A (r, in) random at first."""

    def __init__(self, layer, rank, generator):
        super().__init__()
        A = torch.randn(rank, layer.in_features, generator=generator)
        self.A = nn.Parameter(A / math.sqrt(layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, weight):
        return weight + self.B @ self.A


class Rows(nn.Module):
    """An embedding's weight -> the same, with trained rows in place of those of `ids`."""

    def __init__(self, embedding, ids):
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids))
        self.rows = nn.Parameter(embedding.weight[ids].clone())

    def forward(self, weight):
        return weight.index_copy(0, self.ids, self.rows)


def linear_layers(model):
    """The linear layers of G's blocks: of self-attention, cross-attention and the MLP."""
    return [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]


def fit(pipe, tuned, parameters, tokens, texts, steps, lr, generator):
    """Eq. 3, with `parameters` (a list of a Muse's parameters) in the place of theta.

    Their number is stored in tuned.trained. Everything else is as in StyleDrop.fit. T is computed
    in each step, as it may be what changes.
    """
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(parameters, lr)
    batches = shuffled(len(tokens), ROUND_1.batch, generator)
    for step in range(steps):
        rows = next(batches).to(pipe.device)                                     # (B,)
        ids = tokens[rows]                                                       # (B, N)
        mask = muse.random_mask(ROUND_1.batch, ids.shape[1], generator, ROUND_1.mask_power)
        mask = mask.to(pipe.device)
        masked = ids.masked_fill(mask, tuned.config.mask_id)
        text, text_mask = pipe.embed(tuned, texts)           # (K, L', text_width), (K, L')
        with autocast(pipe.device.type):
            logits = tuned(masked, text[rows], text_mask[rows])                  # (B, N, V)
        loss = muse.masked_loss(logits, ids, mask)
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is NaN or infinite at step {step + 1}, rate {lr}")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    optimiser.zero_grad()                                    # no gradients are left in memory
    tuned.requires_grad_(False)
    tuned.trained = sum(parameter.numel() for parameter in parameters)


# --------------------------------------------------------------------------------------------------
# Sampling

@torch.no_grad()
def sample(pipe, tuned, prompts, seeds, lambda_a, sampling=SAMPLING):
    """Eq. 4 with a tuned Muse: B prompts t, with their style phrase, -> (B, 3, H, W) in [-1, 1].

    seeds: B whole numbers. sampling: as in StyleDrop.generate, of whose first stage this is the
    counterpart. H is 64 for the base that ships.
    """
    base = pipe.muse
    empty = [""] * len(prompts)
    tuned_text, tuned_mask = pipe.embed(tuned, prompts)                          # T'(t)
    base_text, base_mask = pipe.embed(base, prompts)                             # T(t)
    null_text, null_mask = pipe.embed(base, empty)                               # T(n)

    def logits_fn(v, step):
        with autocast(pipe.device.type):
            tuned_logits = tuned(v, tuned_text, tuned_mask)
            base_logits = base(v, base_text, base_mask)
            null_logits = base(v, null_text, null_mask)
        logits = guided_logits(tuned_logits, base_logits, null_logits, lambda_a, sampling.lambda_b)
        return only_probable(logits, tuned_logits, sampling.min_p)

    generators = [torch.Generator(pipe.device).manual_seed(seed) for seed in seeds]
    ids = muse.decode(logits_fn, len(prompts), base.config.tokens, base.config.mask_id,
                      sampling.steps, sampling.temperature, generators, sampling.top_k)
    return pipe.vqgan.decode(ids.unflatten(1, (base.config.grid, base.config.grid)))


# --------------------------------------------------------------------------------------------------
# The study: tries are pairs (method, learning rate)

TUNERS = {"full fine-tuning": tune_fully, "LoRA": tune_lora, "textual inversion": tune_text}
# Textual inversion takes five times as many steps as DreamBooth in their papers, 5,000 and 1,000
STEPS = {"full fine-tuning": ROUND_1.steps, "LoRA": ROUND_1.steps,
         "textual inversion": 5 * ROUND_1.steps}
RATES = {"full fine-tuning": (1e-5, 3e-5, 1e-4, 3e-4), "LoRA": (3e-4, 1e-3, 3e-3, 1e-2),
         "textual inversion": (1e-3, 3e-3, 1e-2, 3e-2)}
CONTROL = "control: the base"
ADAPTER = "adapter"


def study(pipe, used, how_many, out):
    """Try all methods on the first validation or test references; write both files after each."""
    settings = dict(base=pipe.base_id, tuning=asdict(ROUND_1), sampling=asdict(SAMPLING), rank=RANK,
                    steps=STEPS)
    results = read_results(out / "baselines.json", settings)
    tries = [(method, rate) for method, rates in RATES.items() for rate in rates]
    if used == "reported":
        best = best_settings(results["rows"])
        if len(best) < len(RATES):
            raise ValueError("no learning rates are chosen yet; first run this with --choose")
        tries = [(CONTROL, None), (ADAPTER, ROUND_1.lr)]
        tries += [(method, rate) for method, (rate, _) in best.items()]
    references = load_references(used, pipe.resolution)
    ruler = Ruler(pipe, references)                          # all of them are rivals
    some = spread(len(references), how_many)
    for k, i in enumerate(some):
        reference = references[i]
        done = [(row["method"], row["rate"]) for row in results["rows"]
                if row["reference"] == reference.file]
        for method, rate in tries:
            if (method, rate) not in done:
                results["rows"] += try_out(pipe, ruler, i, method, rate)
        write_json(out / "baselines.json", results)
        write_text(out / "baselines.md", "\n".join(report(pipe, results["rows"])))
        say(f"reference {k + 1} of {len(some)}: {reference.file}")


def try_out(pipe, ruler, i, method, rate):
    """Tune on the ruler's reference i and sample OBJECTS -> a row of results for each lambda_A."""
    reference = ruler.references[i]
    side = pipe.vqgan.config.resolution
    picture = reference.picture[None].to(pipe.device)                            # (1, 3, H, W)
    objects = list(OBJECTS)
    prompts = [style_prompt(phrase, RARE_TOKEN) for phrase in objects]
    lambdas = LAMBDAS

    if method == CONTROL:
        tuned = pipe.muse
        trained = 0
        lambdas = (0,)                                       # which has no effect on it
    elif method == ADAPTER:
        tuned = pipe.tune(picture, [""], RARE_TOKEN, superres=False)
        trained = sum(weight.numel() for weight in tuned.adapter.parameters())
    else:
        generator = torch.Generator().manual_seed(0)
        views = random_views(picture, ROUND_1.views, generator)[0]
        tokens = pipe.tokens_at(side, views)                                     # (K, N)
        texts = [style_prompt("", RARE_TOKEN)] * len(tokens)
        tuned = TUNERS[method](pipe, tokens, texts, STEPS[method], rate, generator)
        trained = tuned.trained

    rows = []
    for lambda_a in lambdas:
        if method == ADAPTER:
            images = pipe.generate(objects, tuned, seed=SEEDS, superres=False, lambda_a=lambda_a)
        else:
            images = sample(pipe, tuned, prompts, SEEDS, lambda_a)
        measures = ruler.measure(images, objects, i, with_clip=False)
        measures = {name: float(np.mean(values)) for name, values in measures.items()}
        rows.append(dict(used=reference.used, reference=reference.file, method=method, rate=rate,
                         lambda_a=lambda_a, trained=trained, **measures))
    return rows


def grouped(rows, used):
    """{(method, rate, lambda_A): its rows, one for each reference with this `used`}."""
    groups = {}
    for row in rows:
        if row["used"] == used:
            key = row["method"], row["rate"], row["lambda_a"]
            groups.setdefault(key, []).append(row)
    return groups


def best_settings(rows):
    """{method: (rate, lambda_A)}, those that are best for object and palette on validation."""
    best = {}
    highest = {}
    for (method, rate, lambda_a), group in grouped(rows, "chosen").items():
        score = np.mean([row["object and palette"] for row in group])
        if method not in best or score > highest[method]:
            best[method] = rate, lambda_a
            highest[method] = score
    return best


def report(pipe, rows):
    """The lines of baselines.md."""
    lines = heading("Adapter, full fine-tuning, LoRA and textual inversion on one base")
    lines += [made_by(pipe), "", f"{len(OBJECTS)} objects of each reference, "
              f"seeds 0 to {SEEDS[-1]}, the first stage alone. On the control lambda_A has no "
              "effect. Errors are standard errors over references.", "",
              "## The test references", ""]
    lines += table_of(rows, "reported")
    best = best_settings(rows)
    lines += ["## Each method minus the adapter, on the test references", "",
              f"{INTERVALS} Each method has the rate and lambda_A that were chosen for it, the "
              "adapter its defaults.", ""]
    lines += minus_adapter(rows, best)
    chosen = [f"{method} {rate:g} at lambda_A {lambda_a:g}"
              for method, (rate, lambda_a) in best.items()]
    lines += ["## The validation references", "",
              f"Best for object and palette: {', '.join(chosen)}.", ""]
    return lines + table_of(rows, "chosen")


def minus_adapter(rows, best):
    """The lines of a table of paired differences. best: as of best_settings.

    Paired by name: an earlier run with other --references leaves rows in another order.
    """
    groups = grouped(rows, "reported")
    own = groups.get((ADAPTER, ROUND_1.lr, SAMPLING.lambda_a), [])
    adapter = {row["reference"]: row for row in own}
    others = {CONTROL: groups.get((CONTROL, None, 0), [])}
    for method, settings in best.items():
        others[method] = groups.get((method, *settings), [])
    body = []
    for method, group in others.items():
        if group:
            pairs = [adapter[row["reference"]] for row in group]
            body.append([method, *minus(group, pairs, COMPARED)])
    return table(["", *COMPARED], body)


def table_of(rows, used):
    """The lines of a table with a row for each method, rate and lambda_A."""
    body = []
    for (method, rate, lambda_a), group in grouped(rows, used).items():
        rate_words = "-" if rate is None else f"{rate:g}"
        shares = [percent([row[name] for row in group]) for name in MEASURES]
        body.append([method, rate_words, f"{lambda_a:g}", str(len(group)), *shares,
                     f"{group[0]['trained']:,}"])
    return table(["", "learning rate", "lambda_A", "references", *TITLES, "trained parameters"],
                 body)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--choose", action="store_true",
                        help="choose the learning rate and lambda_A of each method")
    parser.add_argument("--references", type=whole(1, 1000), default=12,
                        help="how many references (default: %(default)s)")
    args, pipe, out = start_study(parser)
    used = "chosen" if args.choose else "reported"
    study(pipe, used, args.references, out)


if __name__ == "__main__":
    run_command(main)
