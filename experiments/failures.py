"""Known failures, made on purpose, so that you know them when you meet them.

    python experiments/failures.py          # experiments/results/failures.md, failures.png; 6 minutes on two cores
"""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import vqgan as vqgan_  # noqa: E402
from data import styles  # noqa: E402
from pretrain.common import Steps, to_float  # noqa: E402
from pretrain.vqgan import codebook_health, reconstruction_loss, update_codes  # noqa: E402
from data.pictures import grid  # noqa: E402
from commandline import Parser, number, run_command  # noqa: E402
from styledrop import StyleDrop, to_tensor, to_uint8, write_whole  # noqa: E402

NAMES = ("red-apple", "cat", "house", "deciduous-tree", "rocket", "fish", "automobile", "owl")
PROMPTS = tuple(map(data.content_phrase, NAMES))
REFERENCE = ("house_watercolor.png", "a house")


def tokenizer(pipe, steps, drawings, **config):
    """A tokenizer after `steps` steps from scratch -> the share of its codes in use, its reconstructions of `drawings`."""
    torch.manual_seed(0)
    model = vqgan_.VQGAN(replace(pipe.vqgan.config, **config))
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


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="weights/tiny")
    parser.add_argument("--out", default="experiments/results")
    parser.add_argument("--tokenizer-steps", type=number(int, 1), default=250)
    parser.add_argument("--long", type=number(int, 1), default=600, help="steps of the tuning that is too long")
    args = parser.parse_args()
    pipe, prompts = StyleDrop.load(args.weights), list(PROMPTS)
    reference = to_tensor(data.read_image(ROOT / "examples" / REFERENCE[0], pipe.vqgan.config.resolution)[None])
    tuned = SimpleNamespace(normal=pipe.tune(reference, [REFERENCE[1]], "[V*]"),
                            long=pipe.tune(reference, [REFERENCE[1]], "[V*]", steps=args.long, lr=1e-2))
    art = data.Art(["twemoji"])
    drawings = to_tensor(np.stack([styles.apply(styles.Style(), art.drawings[art.find(name, "twemoji")],
                                                np.random.default_rng(0)) for name in NAMES]))
    alive, dead = (tokenizer(pipe, args.tokenizer_steps, drawings, **config) for config in ({}, dict(revive_below=0.0)))
    rows = [
        ("the base", "as it should be, at the defaults", pipe.generate(prompts)),
        ("restless", "`--temperature 30`: chance alone decides which tokens stay, the worst as often as the best: specks",
         pipe.generate(prompts, temperature=30.0)),
        ("torn", "`--lambda-b 40`: the text pulls so hard that the prior of what goes together has no say",
         pipe.generate(prompts, lambda_b=40.0)),
        ("pale", "`--lambda-b 0`: no pull of the text: plainer, and now and then half missing", pipe.generate(prompts, lambda_b=0.0)),
        ("tuned", f"on {REFERENCE[0]}, at the defaults", pipe.generate(prompts, tuned.normal)),
        ("collapsed", f"the same tuned for {args.long} steps at ten times the rate: every prompt turns to the reference's colours, then to its walls",
         pipe.generate(prompts, tuned.long)),
        ("burnt", "`--lambda-a 10` on the well tuned one: further along the learned direction than there is picture",
         pipe.generate(prompts, tuned.normal, lambda_a=10.0)),
        ("drawings", "of the same things, for the last two rows to reconstruct", drawings),
        ("codes alive", f"a tokenizer after {args.tokenizer_steps} steps: {alive[0]:.0%} of its codes in use on 16 pictures", alive[1]),
        ("codes dead", f"the same with `revive_below = 0`: {dead[0]:.0%} in use; colours and outlines have nowhere to go", dead[1]),
    ]
    images = to_uint8(torch.cat([row[2] for row in rows]))
    sheet = grid(images, len(prompts), 2, 4, prompts, [row[0] for row in rows])
    lines = ["# Known failures, made on purpose", "", f"`python {' '.join(sys.argv)}`, base {pipe.base}.", "",
             "| row | what was done, and why it looks so |", "|---|---|"]
    lines += [f"| {name} | {why} |" for name, why, _ in rows]
    write_whole(Path(args.out) / "failures.png", lambda file: sheet.save(file, "PNG", optimize=True))
    write_whole(Path(args.out) / "failures.md", lambda file: file.write(("\n".join(lines) + "\n").encode()))
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
