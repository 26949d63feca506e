"""Draw pictures from text, in a learned style.

    python sample.py --prompt "a cat"                                   # in the newest run's style
    python sample.py --prompt "a cat" --prompt "a house" --num 4 --out cats.png
    python sample.py --prompt "a cat" --style runs/house --lambda-a 1 --seed 7
    python sample.py --prompt "a cat in flat vector style" --style none # the bare base
    python sample.py --prompt "a cat" --trace cat.gif                   # the tokens filling in
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from styledrop import Parser, StyleDrop, check_prompt, grid, load_adapter, number, run_command, to_uint8, write_whole

AT_ONCE = 16                            # pictures in one batch: what bounds the memory


def newest_run(root="runs"):
    """The style run in `root` that was made last; None where there is none."""
    runs = sorted(Path(root).glob("*/adapter.pt"), key=lambda path: path.stat().st_mtime)
    return runs[-1].parent if runs else None


def trace_frames(pipe, steps):
    """steps: [(drawn ids, kept)] of `decode`'s on_step -> PIL frames; what is still masked is grey."""
    side = pipe.muse.config.grid
    for drawn, kept in steps:
        images = to_uint8(pipe.vqgan.decode(drawn.view(-1, side, side)))
        f = images.shape[1] // side
        known = kept.view(-1, side, side, 1).cpu().numpy().repeat(f, 1).repeat(f, 2)
        images[~known[..., 0]] = 128
        yield grid(images, min(len(images), 8), scale=3)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", action="append", required=True, metavar="TEXT", help="what to draw; give it again for more pictures")
    add("--style", metavar="RUN", help="a run folder, or none for the bare base (default: the newest run)")
    add("--content", metavar="RUN", help="a second run folder, of an object: my object in my style")
    add("--gamma", type=number(float, 0), default=0.6, help="0: style adapter alone, 1: content adapter alone")
    add("--lambda-a", type=number(float, 0), default=1.0, help="strength of the learned style (Eq. 4)")
    add("--lambda-b", type=number(float, 0), default=5.0, help="strength of the text (Eq. 4)")
    add("--steps", type=number(int, 1), default=36, help="decoding steps")
    add("--temperature", type=number(float, 0), default=4.5, help="chance in which tokens are kept first")
    add("--num", type=number(int, 1), default=1, help="pictures for each prompt")
    add("--seed", type=number(int, 0), default=0)
    add("--scale", type=number(int, 1), default=4, help="enlarge the pixels of the PNG by this")
    add("--out", default="sample.png", help="a PNG: one picture, or a grid with one row for each prompt")
    add("--trace", metavar="GIF", help="also write the decoding, step by step")
    add("--weights", default="weights/tiny", help="folder of the base")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.gamma > 1:
        parser.error("--gamma must lie between 0 and 1")
    for path, suffix in ((args.out, ".png"), (args.trace, ".gif")):
        if path and not path.lower().endswith(suffix):
            parser.error(f"{path} must end in {suffix}")
        if path:                                            # better now than after the drawing
            Path(path).parent.mkdir(parents=True, exist_ok=True)

    pipe = StyleDrop.load(args.weights, args.device)
    for prompt in args.prompt:
        check_prompt(pipe, prompt)
    run = newest_run() if args.style is None else None if args.style == "none" else args.style
    if args.style is None:
        print(f"style: {run}, the newest run" if run else "style: none, there is no run yet; the bare base draws")
    style = load_adapter(run) if run else None
    content = load_adapter(args.content) if args.content else None

    wanted = [prompt for prompt in args.prompt for _ in range(args.num)]
    generator = torch.Generator(args.device).manual_seed(args.seed)
    images, trace = [], []                                  # the trace is of the first pictures
    on_step = (lambda step, drawn, kept: trace.append((drawn, kept)) if not images else None) if args.trace else None
    for i in range(0, len(wanted), AT_ONCE):
        images.append(to_uint8(pipe.generate(wanted[i:i + AT_ONCE], style, content, args.lambda_a, args.lambda_b,
                                             args.gamma, args.steps, args.temperature, generator, on_step=on_step)))
    images = np.concatenate(images)
    if len(images) == 1:
        picture = Image.fromarray(images[0].repeat(args.scale, 0).repeat(args.scale, 1))
    else:
        picture = grid(images, args.num if args.num > 1 else min(len(images), 8), args.scale)
    write_whole(args.out, lambda file: picture.save(file, "PNG"))
    print(args.out)
    if args.trace:
        first, *rest = trace_frames(pipe, trace)
        write_whole(args.trace, lambda file: first.save(
            file, "GIF", save_all=True, append_images=rest, loop=0, duration=[120] * len(rest) + [2000]))
        print(args.trace)


if __name__ == "__main__":
    run_command(main)
