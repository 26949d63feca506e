"""Draw pictures from text, in a learned style.

    python sample.py --prompt "a cat"                                   # in the newest run's style
    python sample.py --prompt "a cat" --prompt "a house" --num 4 --out cats.png
    python sample.py --prompt "a cat" --style runs/house --lambda-a 1 --seed 7
    python sample.py --prompt "a cat" --style none --style-phrase "flat vector"  # the base, the style in words
    python sample.py --prompt "a cat" --trace cat.gif                   # the tokens filling in
    python sample.py --prompt "a [V] teapot" --style runs/glow --content runs/teapot --gamma 0.6
    python sample.py --prompt "a [V] teapot" --style runs/glow --content runs/teapot --gamma-sweep
    python sample.py --prompt "a cat" --lambda-grid                   # lambda_A by lambda_B (B.3.1)
"""

import argparse
import json
import math
import textwrap
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from styledrop import (LAMBDA_A, LAMBDA_A_WORDS, WEIGHTS, Parser, Sampling, StyleDrop, check_prompt, grid,
                       load_adapter, number, run_command, to_uint8, write_whole)

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
    """steps: [(drawn ids, kept)] of `decode`'s on_step, both stages -> PIL frames; what is masked is grey."""
    for drawn, kept in steps:
        side = math.isqrt(drawn.shape[1])
        images = to_uint8(pipe.vqgan.decode(drawn.view(-1, side, side)))
        f = images.shape[1] // side
        known = kept.view(-1, side, side, 1).cpu().numpy().repeat(f, 1).repeat(f, 2)
        images[~known[..., 0]] = 128
        larger = pipe.resolution // images.shape[1]
        yield grid(images.repeat(larger, 1).repeat(larger, 2), min(len(images), 8), scale=2)


def labelled(images, rows, columns, scale, corner=""):
    """uint8 (len(rows) * len(columns), H, W, 3) -> a sheet with words above the columns and left of the rows."""
    size, gap, left, top = images.shape[1] * scale, 4, 96, 18
    sheet = Image.new("RGB", (left + len(columns) * (size + gap), top + len(rows) * (size + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 3), "\n".join(textwrap.wrap(corner, 14)), fill="black")
    for c, words in enumerate(columns):
        draw.text((left + c * (size + gap), 3), words[:size // 6], fill="black")
    for r, words in enumerate(rows):
        draw.text((4, top + r * (size + gap) + 14 * bool(corner)), "\n".join(textwrap.wrap(words, 14)), fill="black")
        for c in range(len(columns)):
            image = images[r * len(columns) + c].repeat(scale, 0).repeat(scale, 1)
            sheet.paste(Image.fromarray(image), (left + c * (size + gap), top + r * (size + gap)))
    return sheet


def described(args, pipe, run, given):
    """The PNG's text chunks: what it takes to draw it again."""
    info = PngInfo()
    facts = dict(prompt=" | ".join(args.prompt), seed=args.seed, num=args.num, style=str(run or "none"),
                 content=args.content or "none", base=pipe.base, settings=json.dumps(given))
    for name, value in facts.items():
        info.add_itxt(name, str(value))
    return info


def options():
    """The command's options; the fields of `Sampling` among them."""
    parser, default = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter), Sampling()
    add = parser.add_argument
    add("--prompt", action="append", metavar="TEXT", help="what to draw; give it again for more pictures")
    add("--style", metavar="RUN", help="a run folder, or none for the bare base (default: the newest run)")
    add("--content", metavar="RUN", help="a second run folder, of an object: my object in my style")
    add("--gamma", type=number(float, 0, high=1), help="0: style adapter alone, 1: content adapter alone (default 0.5)")
    add("--lambda-a", type=number(float, 0, high=100),
        help=f"strength of the style (Eq. 4; default {LAMBDA_A:g}; of --style-phrase without a run {LAMBDA_A_WORDS:g})")
    add("--lambda-a-content", type=number(float, 0, high=100), help="the same of the object (default: as --lambda-a)")
    add("--lambda-b", type=number(float, 0, high=100), default=default.lambda_b,
        help="strength of the text (Eq. 4; default %(default)s)")
    add("--gamma-sweep", action="store_true", help="a row from the style adapter alone to the content adapter alone")
    add("--lambda-grid", action="store_true", help="a sheet of lambda_A by lambda_B, one seed")
    add("--negative", default="", metavar="TEXT", help="what not to draw: the prompt n of Eq. 4 (default: empty)")
    add("--style-phrase", metavar="WORDS", help="other words than the run's, say one of them left out "
                                                "(Section 4.4.2); with --style none the style itself")
    add("--steps", type=number(int, 1, high=1000), default=default.steps, help="of decoding (default %(default)s)")
    add("--temperature", type=number(float, 0, high=1000), default=default.temperature,
        help="chance in which tokens are kept first (default %(default)s)")
    add("--top-k", type=number(int, 0, high=100000), default=default.top_k,
        help="tokens are drawn from so many likeliest, 0: all (default %(default)s)")
    add("--no-superres", dest="superres", action="store_false", help="the base's 64 pixels, without the second stage")
    add("--num", type=number(int, 1, high=10000), default=1, help="pictures for each prompt")
    add("--seed", type=number(int, 0, high=2**62), default=0, help="of the first picture; the next ones have the next")
    add("--scale", type=number(int, 1, high=64), default=2, help="enlarge the pixels of the PNG by this")
    add("--out", default="sample.png", help="a PNG, with prompt, seed and settings in its text chunks: one picture, or "
                                            "a grid with one row for each prompt")
    add("--trace", metavar="GIF", help="also write the decoding, step by step")
    add("--words", action="store_true", help="print the words that the base knows")
    add("--weights", default=WEIGHTS, help="folder of the base")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def check_options(args, error):
    """Call error(one line) where options do not go together."""
    if not args.prompt and not args.words:
        error('say what to draw: --prompt "a cat"')
    for name in ("gamma", "gamma_sweep", "lambda_a_content"):
        if not (getattr(args, name) is None or getattr(args, name) is False) and not args.content:
            error(f"--{name.replace('_', '-')} is for two adapters: give --content RUN too")
    bare = args.style == "none" and not args.style_phrase and not args.content
    if bare and (args.lambda_grid or args.lambda_a is not None):
        error("lambda_A is the strength of a style: give --style RUN or --style-phrase WORDS too")
    if args.style == "none" and args.content and not args.style_phrase and (args.gamma is not None or args.gamma_sweep):
        error("gamma mixes a style and an object: give --style RUN or --style-phrase WORDS too")
    if args.gamma_sweep and args.lambda_grid:
        error("give --gamma-sweep or --lambda-grid, not both")
    if (args.gamma_sweep or args.lambda_grid) and args.trace:
        error("--trace follows single pictures, not a sheet")
    if args.lambda_grid and (len(args.prompt or ()) > 1 or args.num > 1):
        error("--lambda-grid draws one prompt and one seed")
    for path, suffix in ((args.out, ".png"), (args.trace, ".gif")):
        if path is not None and not path.lower().endswith(suffix):
            error(f"{path or 'the file name'} must end in {suffix}")


def main():
    parser = options()
    args = parser.parse_args()
    check_options(args, parser.error)
    pipe = StyleDrop.load(args.weights, args.device)
    if args.words:
        print(*sorted(pipe.words), sep="\n")
        return
    run = newest_run() if args.style is None else None if args.style == "none" else args.style
    if args.style is None:
        print(f"style: {run}, the newest run" if run else "style: none, there is no run yet; the bare base draws")
    style = load_adapter(run) if run is not None else None
    content = load_adapter(args.content) if args.content is not None else None
    if args.gamma_sweep and style is None and not args.style_phrase:
        parser.error("--gamma-sweep mixes a style and an object: give --style RUN or --style-phrase WORDS too")
    styled = style or content or args.style_phrase
    if (args.lambda_grid or args.lambda_a is not None) and not styled:
        parser.error("lambda_A is a style's strength: give --style RUN or --style-phrase WORDS too")
    phrase = args.style_phrase
    if phrase is None:
        phrase = style.about["style"] if style else ""
    for prompt in args.prompt:
        check_prompt(pipe, prompt, phrase)
    for adapter, name in ((style, "style"), (content, "content")):
        if adapter is not None:
            pipe.check_adapter(adapter, name)
    for path in filter(None, (args.out, args.trace)):       # better now than after the drawing
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    given = {field.name: getattr(args, field.name) for field in fields(Sampling)}
    given["gamma"] = 0.5 if args.gamma is None else args.gamma

    def draw(prompts, seed, on_step=None, **changes):
        return to_uint8(pipe.generate(prompts, style, content, seed, on_step, **{**given, **changes}))

    prompts, trace = [prompt for prompt in args.prompt for _ in range(args.num)], []
    if args.gamma_sweep:                                    # the same seed all along a row
        rows = [draw([prompt], args.seed + i, gamma=gamma)
                for i, prompt in enumerate(prompts) for gamma in GAMMAS]
        picture = labelled(np.concatenate(rows), prompts, [f"gamma {gamma:g}" for gamma in GAMMAS], args.scale)
    elif args.lambda_grid:
        rows = [draw(args.prompt, args.seed, lambda_a=a, lambda_b=b) for a in LAMBDAS_A for b in LAMBDAS_B]
        picture = labelled(np.concatenate(rows), [f"lambda_A {a:g}" for a in LAMBDAS_A],
                           [f"lambda_B {b:g}" for b in LAMBDAS_B], args.scale, args.prompt[0])
    else:
        images = []
        for i in range(0, len(prompts), AT_ONCE):
            keep = None
            if args.trace and i == 0:                       # of the first batch
                keep = lambda step, drawn, kept: trace.append((drawn, kept))
            images.append(draw(prompts[i:i + AT_ONCE], args.seed + i, keep))
        images = np.concatenate(images)
        if len(args.prompt) > 1:
            columns = [f"seed +{i}" if i else f"seed {args.seed}" for i in range(args.num)]
            picture = labelled(images, args.prompt, columns if args.num > 1 else [""], args.scale)
        else:
            picture = grid(images, min(len(images), 8), args.scale, gap=2 if len(images) > 1 else 0)
    write_whole(args.out, lambda file: picture.save(file, "PNG", pnginfo=described(args, pipe, run, given)))
    last = args.seed + len(prompts) - 1
    print(f"{args.out}: seed {args.seed}" + (f" to {last}" if last > args.seed else ""))
    if args.trace:
        first, *rest = trace_frames(pipe, trace)
        write_whole(args.trace, lambda file: first.save(
            file, "GIF", save_all=True, append_images=rest, loop=0, duration=[120] * len(rest) + [2000]))
        print(args.trace)


if __name__ == "__main__":
    run_command(main)
