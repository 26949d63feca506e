"""Known failures, made on purpose, so that you know them when you meet them.

    python experiments/failures.py  # results/failures.md, failures.png; 6 minutes on two cores
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from data import styles  # noqa: E402
from experiments.common import heading, table, write_png, write_text  # noqa: E402
from experiments.one_shot import draw  # noqa: E402
from pretrain.common import Steps, to_float  # noqa: E402
from pretrain.vqgan import codebook_health, reconstruction_loss, update_codes  # noqa: E402
from data.pictures import grid  # noqa: E402
from commandline import Parser, number, run_command  # noqa: E402
from styledrop import RARE_TOKEN, StyleDrop, to_tensor, to_uint8  # noqa: E402
from vqgan import VQGAN  # noqa: E402

NAMES = ("red-apple", "cat", "house", "deciduous-tree", "rocket", "fish", "automobile", "owl")
REFERENCE, CONTENT = "house_watercolor.png", "a house"


def tokenizer(pipe, steps, drawings, **config):
    """`steps` steps from scratch -> the share of the codes in use, `drawings` reconstructed."""
    torch.manual_seed(0)
    model = VQGAN(replace(pipe.vqgan.config, **config))
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    size = pipe.vqgan.config.resolution
    batches = Steps([data.Art(size=size, smallest=0.9, compose=False)], [size], 16, 0)
    for step in range(steps):
        images, generator = to_float(batches[step][0]), torch.Generator().manual_seed(step)
        fake, z, ids, commitment = model(images)
        loss = reconstruction_loss(fake, images) + 0.25 * commitment
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        update_codes(model.quantizer, z.detach(), ids, generator)
    images, model = to_float(batches[10 ** 6][0]), model.eval()
    usage, _ = codebook_health(model.encode(images), model.config.codebook_size)
    return usage, model.decode(model.encode(drawings))


def rows_of(pipe, prompts, args):
    """[(name, what was done and why it looks so, images of the prompts)]"""
    reference = data.read_image(ROOT / "examples" / REFERENCE, pipe.vqgan.config.resolution)
    example = to_tensor(reference[None]), [CONTENT], RARE_TOKEN
    tuned, overtuned = pipe.tune(*example), pipe.tune(*example, steps=args.long, lr=1e-2)
    drawings = draw(data.Art(["twemoji"]), NAMES, "twemoji", styles.Style(), 0)
    alive, living = tokenizer(pipe, args.tokenizer_steps, drawings)
    dead, lifeless = tokenizer(pipe, args.tokenizer_steps, drawings, revive_below=0.0)
    sample = lambda *style, **how: pipe.generate(prompts, *style, superres=False, **how)
    return [
        ("the base", "as it should be, at the defaults", sample()),
        ("restless", "`--temperature 30`: chance alone decides which tokens stay, the worst as "
         "often as the best: specks", sample(temperature=30.0)),
        ("torn", "`--lambda-b 40`: the text pulls so hard that the prior of what goes together has "
         "no say", sample(lambda_b=40.0)),
        ("pale", "`--lambda-b 0`: no pull of the text: plainer, and now and then half missing",
         sample(lambda_b=0.0)),
        ("tuned", f"on {REFERENCE}, with the rare token", sample(tuned)),
        ("collapsed", f"the same tuned for {args.long} steps at ten times the rate: every prompt "
         "turns to the reference's colours, then to its walls", sample(overtuned)),
        ("burnt", "`--lambda-a 10` on the well tuned one: further along the learned direction than "
         "any picture lies", sample(tuned, lambda_a=10.0)),
        ("drawings", "of the same objects, for the last two rows to reconstruct", drawings),
        ("codes alive", f"a tokenizer after {args.tokenizer_steps} steps: {alive:.0%} of its codes "
         "in use on 16 pictures", living),
        ("codes dead", f"the same with `revive_below = 0`: {dead:.0%} in use; colours and outlines "
         "have nowhere to go", lifeless)]


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", default="weights/tiny")
    add("--out", default="experiments/results")
    add("--tokenizer-steps", type=number(int, 1), default=250)
    add("--long", type=number(int, 1), default=600, help="steps of the tuning that is too long")
    args = parser.parse_args()
    pipe, prompts = StyleDrop.load(args.weights), list(map(data.content_phrase, NAMES))
    rows = rows_of(pipe, prompts, args)
    images = to_uint8(torch.cat([row[2].cpu() for row in rows]))
    sheet = grid(images, len(prompts), 2, 4, prompts, [row[0] for row in rows])
    lines = [*heading("Known failures, made on purpose"), f"Base {pipe.base}, at 64 pixels.", "",
             *table(["row", "what was done, and why it looks so"], [row[:2] for row in rows])]
    write_png(Path(args.out) / "failures.png", sheet)
    write_text(Path(args.out) / "failures.md", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
