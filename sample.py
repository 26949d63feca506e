"""Draw pictures from text, in a learned style.

    python sample.py --prompt "a cat"                                   # in the newest run's style
    python sample.py --prompt "a cat" --prompt "a house" --num 4 --out cats.png
    python sample.py --prompt "a cat" --style runs/house --lambda-a 1 --seed 7
    python sample.py --prompt "a cat" --style none --style-phrase "flat vector"   # in words alone
    python sample.py --prompt "a cat" --trace cat.gif                   # the tokens filling in
    python sample.py --prompt "a [V] teapot" --style runs/glow --content runs/teapot --gamma 0.6
    python sample.py --prompt "a [V] teapot" --style runs/glow --content runs/teapot --gamma-sweep
    python sample.py --prompt "a cat" --lambda-grid                     # lambda_A by lambda_B
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)             # Ctrl-C while importing: no traceback

import argparse
import math
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from PIL.PngImagePlugin import PngInfo

from commandline import (Parser, check_place, filled, load_pipe, load_run, newest_run, number,
                         run_command, say, utf8)
from data.english import note_unknown
from data.pictures import grid
from styledrop import (AT_ONCE, LAMBDA_A, LAMBDA_A_WORDS, WEIGHTS, Sampling, style_prompt,
                       to_uint8, write_whole)

SCALE = 2                               # a drawn pixel is so many pixels of the PNG a side
GAMMAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
LAMBDAS_A, LAMBDAS_B = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0), (0.0, 1.0, 2.0, 3.0, 5.0, 8.0)


def trace_frames(pipe, steps):
    """steps: [(drawn ids, kept)] of decode's on_step, both stages -> PIL frames, masked grey."""
    for drawn, kept in steps:
        side = math.isqrt(drawn.shape[1])
        images = to_uint8(pipe.vqgan.decode(drawn.view(-1, side, side)))
        f = images.shape[1] // side
        known = kept.view(-1, side, side, 1).cpu().numpy().repeat(f, 1).repeat(f, 2)
        images[~known[..., 0]] = 128
        yield grid(images, min(len(images), 8), 2 * pipe.resolution // images.shape[1])


def options():
    """The command's options; most fields of `Sampling` among them."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, strength = parser.add_argument, number(float, 0, high=100)
    add("--prompt", action="append", type=utf8, metavar="TEXT",
        help="what to draw; again for more images")
    add("--style", type=filled, metavar="RUN",
        help="a run folder, or none for the bare base (default: the newest run)")
    add("--content", type=filled, metavar="RUN",
        help="a run folder of an object: my object in my style")
    add("--gamma", type=number(float, 0, high=1),
        help="0: style adapter alone, 1: content adapter alone (default 0.5)")
    add("--lambda-a", type=strength,
        help=f"strength of the style (Eq. 4; default {LAMBDA_A:g}; of --style-phrase without a run "
             f"{LAMBDA_A_WORDS:g})")
    add("--lambda-b", type=strength, default=Sampling.lambda_b,
        help="strength of the text (Eq. 4; default %(default)s)")
    add("--gamma-sweep", action="store_true",
        help="a row from the style adapter alone to the content adapter alone")
    add("--lambda-grid", action="store_true", help="a sheet of lambda_A by lambda_B, one seed")
    add("--style-phrase", type=utf8, metavar="WORDS",
        help="other words than the run's, say one of them left out (Section 4.4.2); "
             "with --style none the style itself")
    add("--steps", type=number(int, 1, high=1000), default=Sampling.steps,
        help="of decoding, first stage (default %(default)s)")
    add("--temperature", type=number(float, 0, high=1000), default=Sampling.temperature,
        help="chance in which tokens are kept first (default %(default)s)")
    add("--no-superres", dest="superres", action="store_false",
        help="the first stage alone: 64 pixels")
    add("--num", type=number(int, 1, high=10000), default=1, help="images for each prompt")
    add("--seed", type=number(int, 0, high=2**62), default=0,
        help="of the first image; the next ones have the next")
    add("--out", default="sample.png",
        help="a PNG of one image, or of a row for each prompt; its text chunks keep prompt, seed "
             "and settings (default %(default)s)")
    add("--trace", metavar="GIF", help="also write the decoding, step by step")
    add("--words", action="store_true", help="print the words that the base knows")
    add("--weights", default=WEIGHTS, help="folder of the base (default: what ships)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


# What does not go together: when, and what to say
WRONG = [
    (lambda a: not a.prompt or not all(prompt.strip() for prompt in a.prompt),
     'say what to draw: --prompt "a cat"'),
    (lambda a: not a.content and (a.gamma is not None or a.gamma_sweep),
     "gamma mixes two adapters: give --content RUN too"),
    (lambda a: a.style == "none" and not a.style_phrase and (a.gamma is not None or a.gamma_sweep),
     "gamma mixes a style and an object: give --style RUN or --style-phrase WORDS too"),
    (lambda a: a.style == "none" and not a.style_phrase and not a.content
     and (a.lambda_grid or a.lambda_a is not None),
     "lambda_A is the strength of a style: give --style RUN or --style-phrase WORDS too"),
    (lambda a: a.gamma_sweep and a.gamma is not None
     or a.lambda_grid and (a.lambda_a is not None or a.lambda_b != Sampling.lambda_b),
     "a sheet has all values of gamma, or of both lambdas; leave yours out"),
    (lambda a: a.gamma_sweep and a.lambda_grid, "give --gamma-sweep or --lambda-grid, not both"),
    (lambda a: a.trace and (a.gamma_sweep or a.lambda_grid),
     "--trace follows single images, not a sheet"),
    (lambda a: a.trace and len(a.prompt) * a.num > AT_ONCE, f"--trace follows {AT_ONCE} at most"),
    (lambda a: a.lambda_grid and (len(a.prompt) > 1 or a.num > 1),
     "--lambda-grid draws one prompt and one seed"),
    (lambda a: not a.out.lower().endswith(".png"), "the name of --out must end in .png"),
    (lambda a: a.trace is not None and not a.trace.lower().endswith(".gif"),
     "the name of --trace must end in .gif")]


def check_options(args):
    """Raise ValueError for the first of WRONG."""
    for wrong, why in WRONG:
        if wrong(args):
            raise ValueError(why)


def draw(pipe, args, style, content, trace):
    """-> one PIL image of all that was asked for. trace: a list that takes the decoding's steps."""
    how = {f.name: getattr(args, f.name) for f in fields(Sampling) if hasattr(args, f.name)}
    how["gamma"] = Sampling.gamma if args.gamma is None else args.gamma
    prompts = [prompt for prompt in args.prompt for _ in range(args.num)]
    seeds, began = [args.seed + i for i in range(len(prompts))], time.time()
    cells, columns, top, left = [{}], min(len(prompts), 8), (), ()
    if args.gamma_sweep:                                     # the same seed all along a row
        cells, columns, left = [dict(gamma=gamma) for gamma in GAMMAS], len(GAMMAS), prompts
        top = [f"gamma {gamma:g}" for gamma in GAMMAS]
    elif args.lambda_grid:
        cells = [dict(lambda_a=a, lambda_b=b) for a in LAMBDAS_A for b in LAMBDAS_B]
        columns, top = len(LAMBDAS_B), [f"lambda_B {b:g}" for b in LAMBDAS_B]
        left = [f"lambda_A {a:g}" for a in LAMBDAS_A]
    elif len(args.prompt) > 1:
        columns, left = args.num, args.prompt
        top = [f"seed {seed}" for seed in seeds[:args.num]] if args.num > 1 else ()

    drawn, total = [], len(prompts) * len(cells)
    on_step = None if trace is None else lambda step, *state: trace.append(state)

    def tell(count):
        count, seconds = count + len(drawn) * len(prompts), time.time() - began
        if seconds > 5 and count < total:
            print(f"{count}/{total} images  {seconds:.0f} s", file=sys.stderr)

    for cell in cells:
        drawn.append(to_uint8(pipe.generate(prompts, style, content, seeds, on_step, tell,
                                            **how | cell)))
    images = np.stack(drawn, 1)                              # (prompts, cells, H, W, 3)
    images = images.reshape(total, *images.shape[2:])
    return grid(images, columns, SCALE, 4 * (total > 1), top, left)


def text_chunks(args, pipe, run):
    """What it takes to draw the PNG again, for its text chunks."""
    facts = {name: value for name, value in vars(args).items()
             if value is not None and name not in ("out", "trace", "words", "weights", "device")}
    if not (args.gamma_sweep or args.lambda_grid):           # the defaults may change
        if run or bool(args.content) != bool(args.style_phrase):
            facts.setdefault("lambda_a", LAMBDA_A if run or args.content else LAMBDA_A_WORDS)
        if args.content and (run or args.style_phrase):
            facts.setdefault("gamma", Sampling.gamma)
    info = PngInfo()
    for name, value in sorted(dict(facts, style=run or "none", base=pipe.base).items()):
        info.add_itxt(name, " | ".join(value) if name == "prompt" else str(value))
    return info


def main():
    args = options().parse_args()
    if args.words:
        say("\n".join(sorted(load_pipe(args).words)))
        return
    run = newest_run() if args.style is None else None if args.style == "none" else args.style
    if args.style is None:
        say(f"style: {run}, the newest run" if run else
            "style: none, there is no run yet; the bare base draws")
        args.style = utf8(str(run or "none"))
    check_options(args)
    pipe = load_pipe(args)
    style, content = load_run(run, "style"), load_run(args.content, "content")
    phrase = args.style_phrase
    if phrase is None:
        phrase = style.about.get("style", "") if style else ""
    elif style and style.about.get("method") == "textual-inversion":
        raise ValueError(f"{run} has its style in its own words; leave --style-phrase out")
    note_unknown(pipe, *(style_prompt(prompt, phrase) for prompt in args.prompt))
    for path in filter(None, (args.out, args.trace)):        # better now than after the drawing
        check_place(path)
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder; give another name")
    trace = [] if args.trace else None
    picture, info = draw(pipe, args, style, content, trace), text_chunks(args, pipe, run)
    write_whole(args.out, lambda file: picture.save(file, "PNG", pnginfo=info))
    last = args.seed + len(args.prompt) * args.num - 1
    say(f"{args.out}: seed {args.seed}" + (f" to {last}" if last > args.seed else ""))
    if args.trace:
        first, *rest = trace_frames(pipe, trace)
        duration = [120] * len(rest) + [2000]                # milliseconds
        write_whole(args.trace, lambda file: first.save(file, "GIF", save_all=True, loop=0,
                                                        append_images=rest, duration=duration))
        say(args.trace)


if __name__ == "__main__":
    run_command(main)
