"""Draw pictures from text, in a learned style.

    python sample.py --prompt "a cat"                                   # in the newest run's style
    python sample.py --prompt "a cat" --prompt "a house" --num 4 --out cats.png
    python sample.py --prompt "a cat" --style runs/house --lambda-a 1 --seed 7
    python sample.py --prompt "a cat" --style none --style-phrase "flat vector"     # the base, the style in words
    python sample.py --prompt "a cat" --trace cat.gif                   # the tokens filling in
    python sample.py --prompt "a [V] teapot" --style runs/glow --content runs/teapot --gamma 0.6
    python sample.py --prompt "a [V] teapot" --style runs/glow --content runs/teapot --gamma-sweep
    python sample.py --prompt "a cat" --lambda-grid                     # lambda_A by lambda_B (B.3.1)
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from styledrop import (LAMBDA_A, LAMBDA_A_WORDS, Parser, StyleDrop, check_prompt, grid, load_adapter, number, run_command,
                       to_uint8, write_whole)

AT_ONCE = 16                            # pictures in one batch: what bounds the memory
GAMMAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
LAMBDAS_A, LAMBDAS_B = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0), (0.0, 1.0, 2.0, 3.0, 5.0, 8.0)


def newest_run(root="runs"):
    """The style run in `root` that was made last; None where there is none."""
    runs = [path.parent for path in Path(root).glob("*/adapter.pt") if kind_of(path.parent) != "content"]
    return max(runs, key=lambda run: (run / "adapter.pt").stat().st_mtime, default=None)


def kind_of(run):
    """What a run folder taught, by its config.json: "style" or "content"; None where that cannot be read."""
    try:
        return json.loads((run / "config.json").read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def trace_frames(pipe, steps):
    """steps: [(drawn ids, kept)] of `decode`'s on_step -> PIL frames; what is still masked is grey."""
    side = pipe.muse.config.grid
    for drawn, kept in steps:
        images = to_uint8(pipe.vqgan.decode(drawn.view(-1, side, side)))
        f = images.shape[1] // side
        known = kept.view(-1, side, side, 1).cpu().numpy().repeat(f, 1).repeat(f, 2)
        images[~known[..., 0]] = 128
        yield grid(images, min(len(images), 8), scale=3)


def labelled(images, rows, columns, scale, corner=""):
    """uint8 (len(rows) * len(columns), H, W, 3) -> a sheet with words above the columns and left of the rows."""
    size, gap, left, top = images.shape[1] * scale, 4, 90, 18
    sheet = Image.new("RGB", (left + len(columns) * (size + gap), top + len(rows) * (size + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 3), corner, fill="black")
    for c, words in enumerate(columns):
        draw.text((left + c * (size + gap), 3), words, fill="black")
    for r, words in enumerate(rows):
        draw.text((4, top + r * (size + gap)), words, fill="black")
        for c in range(len(columns)):
            image = images[r * len(columns) + c].repeat(scale, 0).repeat(scale, 1)
            sheet.paste(Image.fromarray(image), (left + c * (size + gap), top + r * (size + gap)))
    return sheet


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", action="append", required=True, metavar="TEXT", help="what to draw; give it again for more pictures")
    add("--style", metavar="RUN", help="a run folder, or none for the bare base (default: the newest run)")
    add("--content", metavar="RUN", help="a second run folder, of an object: my object in my style")
    add("--gamma", type=number(float, 0), default=0.5, help="0: style adapter alone, 1: content adapter alone")
    add("--lambda-a", type=number(float, 0), help=f"strength of the style (Eq. 4; default {LAMBDA_A:g}; of --style-phrase "
                                                  f"without a run {LAMBDA_A_WORDS:g})")
    add("--lambda-a-content", type=number(float, 0), help="the same of the object, beside a style (default: --lambda-a's)")
    add("--lambda-b", type=number(float, 0), default=3.0, help="strength of the text (Eq. 4)")
    add("--gamma-sweep", action="store_true", help="a row from the style adapter alone to the content adapter alone")
    add("--lambda-grid", action="store_true", help="a sheet of lambda_A by lambda_B, one seed")
    add("--negative", default="", metavar="TEXT", help="what not to draw: the prompt n of Eq. 4 (default: empty)")
    add("--style-phrase", metavar="WORDS", help="other words than the run's, say one of them left out "
                                                   "(Section 4.4.2); with --style none the style itself")
    add("--steps", type=number(int, 1), default=18, help="decoding steps")
    add("--temperature", type=number(float, 0), default=1.0, help="chance in which tokens are kept first")
    add("--num", type=number(int, 1), default=1, help="pictures for each prompt")
    add("--seed", type=number(int, 0), default=0)
    add("--scale", type=number(int, 1, high=64), default=4, help="enlarge the pixels of the PNG by this")
    add("--out", default="sample.png", help="a PNG: one picture, or a grid with one row for each prompt")
    add("--trace", metavar="GIF", help="also write the decoding, step by step")
    add("--weights", default="weights/tiny", help="folder of the base")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.gamma > 1:
        parser.error("--gamma must lie between 0 and 1")
    if args.gamma != parser.get_default("gamma") and not args.content:
        parser.error("--gamma mixes two adapters: give --content RUN too")
    if args.gamma_sweep and not args.content:
        parser.error("--gamma-sweep mixes two adapters: give --content RUN too")
    if args.lambda_a_content is not None and not args.content:
        parser.error("--lambda-a-content is an object's: give --content RUN too")
    if args.gamma_sweep and args.lambda_grid:
        parser.error("give --gamma-sweep or --lambda-grid, not both")
    if (args.gamma_sweep or args.lambda_grid) and args.trace:
        parser.error("--trace follows single pictures, not a sheet")
    if args.lambda_grid and (len(args.prompt) > 1 or args.num > 1):
        parser.error("--lambda-grid draws one prompt and one seed")
    for path, suffix in ((args.out, ".png"), (args.trace, ".gif")):
        if path and not path.lower().endswith(suffix):
            parser.error(f"{path} must end in {suffix}")

    pipe = StyleDrop.load(args.weights, args.device)
    run = newest_run() if args.style is None else None if args.style == "none" else args.style
    if args.style is None:
        print(f"style: {run}, the newest run" if run else "style: none, there is no run yet; the bare base draws")
    style = load_adapter(run) if run is not None else None
    content = load_adapter(args.content) if args.content is not None else None
    if args.gamma_sweep and style is None and not args.style_phrase:
        parser.error("--gamma-sweep mixes a style and an object: give --style RUN or --style-phrase WORDS too")
    phrase = args.style_phrase if args.style_phrase is not None else style.about["style"] if style else ""
    for prompt in args.prompt:
        check_prompt(pipe, prompt, phrase)
    for adapter, name in ((style, "style"), (content, "content")):
        if adapter is not None:
            pipe.check_adapter(adapter, name)
    for path in filter(None, (args.out, args.trace)):       # better now than after the drawing
        Path(path).parent.mkdir(parents=True, exist_ok=True)

    def draw(prompts, seed, lambda_a=args.lambda_a, lambda_b=args.lambda_b, gamma=args.gamma, on_step=None):
        return to_uint8(pipe.generate(prompts, style, content, lambda_a, lambda_b, gamma, args.steps, args.temperature,
                                      seed, args.negative, args.style_phrase, on_step, args.lambda_a_content))

    trace = []                                              # of the first batch
    if args.gamma_sweep:                                    # the same seed all along a row
        prompts = [prompt for prompt in args.prompt for _ in range(args.num)]
        rows = [np.concatenate([draw([prompt], args.seed + i % args.num, gamma=gamma) for gamma in GAMMAS])
                for i, prompt in enumerate(prompts)]
        picture = labelled(np.concatenate(rows), [prompt[:14] for prompt in prompts],
                           [f"gamma {gamma:g}" for gamma in GAMMAS], args.scale)
    elif args.lambda_grid:
        images = [draw(args.prompt, args.seed, lambda_a, lambda_b) for lambda_a in LAMBDAS_A for lambda_b in LAMBDAS_B]
        picture = labelled(np.concatenate(images), [f"lambda_A {a:g}" for a in LAMBDAS_A],
                           [f"lambda_B {b:g}" for b in LAMBDAS_B], args.scale, args.prompt[0][:14])
    else:
        wanted = [prompt for prompt in args.prompt for _ in range(args.num)]
        generator, images = torch.Generator(args.device).manual_seed(args.seed), []
        for i in range(0, len(wanted), AT_ONCE):
            keep = (lambda step, drawn, kept: trace.append((drawn, kept))) if args.trace and i == 0 else None
            images.append(draw(wanted[i:i + AT_ONCE], generator, on_step=keep))
        images = np.concatenate(images)
        picture = grid(images, args.num if args.num > 1 else min(len(images), 8), args.scale,
                       gap=2 if len(images) > 1 else 0)
    write_whole(args.out, lambda file: picture.save(file, "PNG"))
    print(args.out)
    if args.trace:
        first, *rest = trace_frames(pipe, trace)
        write_whole(args.trace, lambda file: first.save(
            file, "GIF", save_all=True, append_images=rest, loop=0, duration=[120] * len(rest) + [2000]))
        print(args.trace)


if __name__ == "__main__":
    run_command(main)
