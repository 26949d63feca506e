"""Sample images from text, in a learned style.

    python sample.py --prompt "a cat"                                   # in the newest run's style
    python sample.py --prompt "a cat" --prompt "a house" --num 4 --out cats.png
    python sample.py --prompt "a cat" --num 1000 --out cats             # a folder of single files
    python sample.py --prompt "a cat" --style runs/house --lambda-a 1.5 --seed 7
    python sample.py --prompt "a cat" --style none                      # the base without a style
    python sample.py --prompt "a cat" --trace cat.gif                   # the tokens filling in
    python sample.py --prompt "a [V] teapot" --style runs/glow --content runs/teapot --gamma 0.6
    python sample.py --prompt "a [V] teapot" --style runs/glow --content runs/teapot --gamma-sweep
    python sample.py --prompt "a cat" --lambda-grid                     # lambda_A by lambda_B

This file reads the options and writes the pictures. Guidance is StyleDrop.sample_tokens in
styledrop.py (Eq. 4 to 6), and decoding is muse.decode.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)             # Ctrl-C while importing: no traceback

import json
import math
import os
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from checkpoint.files import check_place, write_png, write_whole
from checkpoint.runs import load_run, newest_run
from commandline.notes import note_unknown
from commandline.options import (Parser, add_base_options, filled, load_pipeline, number, text,
                                 whole)
from commandline.terminal import SamplingProgress, run_command, say
from data.folder import SUFFIXES
from data.pictures import grid
from styledrop import (AT_ONCE, BASE_SAMPLING, CONTENT_SAMPLING, SAMPLING, Sampling, check_device,
                       default_sampling, style_prompt, to_uint8)

SCALE = 2                               # images are enlarged this many times in the PNG
MOST_ON_A_SHEET = 256                   # images; more go to a folder
GAMMAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
LAMBDAS_A = (0.0, 0.4, 0.75, 1.0, 1.5, 2.0, 3.0)
LAMBDAS_B = (0.0, 2.0, 5.0, 10.0, 15.0)


# --------------------------------------------------------------------------------------------------
# Options

def options():
    """The command's options."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    strength = number(float, 0, 100)
    add("--prompt", action="append", type=filled, metavar="TEXT",
        help="what to sample; give it several times for several prompts")
    add("--style", type=filled, metavar="RUN",
        help="a run folder, or none for the base (default: the newest run)")
    add("--content", type=filled, metavar="RUN",
        help="the run folder of an object (train.py --kind content), to be drawn in the style")
    add("--style-phrase", type=text, metavar="WORDS",
        help="style phrase to use instead of the run's own; with --style none, it is given to the "
             "base")
    add("--lambda-a", type=strength,
        help="strength of the adapters in the first stage (Eq. 4; default: "
             f"{SAMPLING.lambda_a:g}, with --content {CONTENT_SAMPLING.lambda_a:g})")
    add("--lambda-b", type=strength,
        help=f"strength of the text in the first stage (Eq. 4; default: {SAMPLING.lambda_b:g}, "
             f"with --content {CONTENT_SAMPLING.lambda_b:g}, without an adapter "
             f"{BASE_SAMPLING.lambda_b:g})")
    add("--gamma", type=number(float, 0, 1), default=0.5,
        help="mixture of two adapters: 0 is the style alone, 1 the object alone "
             "(default: %(default)s)")
    add("--gamma-sweep", action="store_true",
        help="sample a row of mixtures, from the style alone to the object alone, all with the "
             "same lambda_A and lambda_B")
    add("--lambda-grid", action="store_true",
        help="sample one prompt, with one seed, for every pair of several values of lambda_A and "
             "lambda_B; --lambda-a and --lambda-b have no effect")
    add("--steps", type=whole(1, 1000),
        help=f"decoding steps of the first stage (default: {SAMPLING.steps})")
    add("--temperature", type=number(float, 0, 1000),
        help="how random the choice of the tokens to keep at each step is (default: "
             f"{SAMPLING.temperature:g}, without an adapter {BASE_SAMPLING.temperature:g})")
    add("--top-k", type=whole(0, 2**31),
        help="sample each token of the first stage from the TOP_K most probable ones; 0: from all "
             f"(default: {SAMPLING.top_k})")
    add("--min-p", type=number(float, 0, 1),
        help="leave out tokens that the tuned model finds less than MIN_P times as probable as its "
             f"most probable one; 0: none (default: {SAMPLING.min_p:g} with a style alone, "
             "otherwise 0)")
    add("--num", type=whole(1, 10000), default=1, help="images for each prompt (default: 1)")
    add("--seed", type=whole(0, 2**62), default=0,
        help="seed of the first image; each further image has the next seed (default: 0)")
    add("--out", type=filled, default="sample.png",
        help="NAME.png: one sheet with all images, a row for each prompt; any other name: a "
             "folder with a file for each image (default: %(default)s)")
    add("--trace", metavar="GIF", type=filled,
        help="also write an animation of the decoding steps")
    add("--words", action="store_true", help="print the words that the base knows, and exit")
    add_base_options(parser)
    return parser


def wants_sheet(args):
    """Is --out one picture of all images, and not a folder of single files?"""
    return args.out.lower().endswith(".png")


def check_options(args):
    """Raise ValueError if options contradict each other."""
    images = len(args.prompt or ()) * args.num
    if args.gamma_sweep:
        images *= len(GAMMAS)
    if not args.prompt:
        raise ValueError('give at least one prompt, such as --prompt "a cat"')
    if args.gamma_sweep and not args.content:
        raise ValueError("--gamma-sweep mixes two adapters: give --content RUN too")
    if args.gamma_sweep and args.lambda_grid:
        raise ValueError("give --gamma-sweep or --lambda-grid, not both")
    if args.lambda_grid and images > 1:
        raise ValueError("--lambda-grid shows one prompt and one seed")
    is_sheet = wants_sheet(args)
    if not is_sheet and Path(args.out).suffix.lower() in SUFFIXES:
        raise ValueError("images are written as PNG; give --out a name that ends in .png, or the "
                         "name of a folder")
    if not is_sheet and (args.gamma_sweep or args.lambda_grid):
        raise ValueError("a sweep is one picture: the name of --out must end in .png")
    if is_sheet and images > MOST_ON_A_SHEET:
        raise ValueError(f"a sheet has at most {MOST_ON_A_SHEET} images; for single files give "
                         "--out the name of a folder, such as --out cats")
    if args.trace and not is_sheet:
        raise ValueError("--trace needs one sheet: the name of --out must end in .png")
    if args.trace and (args.gamma_sweep or args.lambda_grid or images > AT_ONCE):
        raise ValueError(f"--trace needs at most {AT_ONCE} images and no sweep")
    if args.trace and not args.trace.lower().endswith(".gif"):
        raise ValueError("the name of --trace must end in .gif")


def check_out(args):
    """Raise ValueError if --out or --trace cannot be written, or if --out has numbered files.

    An existing NAME.png or NAME.gif is overwritten.
    """
    is_sheet = wants_sheet(args)
    check_place(args.out, "--out", is_folder=not is_sheet)
    if args.trace is not None:
        check_place(args.trace, "--trace", is_folder=False)
    if is_sheet:
        return
    for index in range(1, len(args.prompt) * args.num + 1):
        file = numbered(args.out, index)
        if os.path.lexists(file):
            raise ValueError(f"{file} already exists; give another --out")


def numbered(folder, index):
    """The path of a single file, from 00001.png on."""
    return Path(folder) / f"{index:05d}.png"


def find_style(args):
    """The run whose style is used, as a path, or None for the base."""
    if args.style == "none":
        return None
    if args.style is None:
        run = newest_run()
        if run is None:
            say("style: none (runs/ has no style yet), so the base is sampled")
        else:
            say(f"style: {run}, the newest run")
        return run
    if not Path(args.style).exists():
        raise ValueError(f"there is no run {args.style}; train one with train.py, or describe the "
                         f'style to the base: --style none --style-phrase "{args.style}"')
    return Path(args.style)


# --------------------------------------------------------------------------------------------------
# Samples. The parameter `generate` is StyleDrop.generate, with this command's adapters and settings

def sampling_settings(args, defaults):
    """A styledrop.Sampling: the defaults, overridden by the options named like its fields."""
    given = {}
    for field in fields(Sampling):
        value = getattr(args, field.name)
        if value is not None:
            given[field.name] = value
    return replace(defaults, **given)


def sample_sheet(args, generate, trace=None):
    """One sheet of all prompts and seeds; with several prompts, a row for each.

    trace: a list to which (ids, kept) of every decoding step is appended.
    """
    prompts = [prompt for prompt in args.prompt for _ in range(args.num)]
    progress = SamplingProgress("image", len(prompts))

    def on_step(step, ids, kept):
        progress.on_step(step, ids, kept)
        if trace is not None:
            trace.append((ids, kept))

    images = generate(prompts, seed=args.seed, on_step=on_step, on_batch=progress.on_batch)
    columns = min(len(prompts), 8)
    left = []
    if len(args.prompt) > 1:
        columns = args.num
        for row, prompt in enumerate(args.prompt):           # the seeds go on from row to row
            left.append(f"{prompt}, from seed {args.seed + row * args.num}")
    gap = 4 if len(prompts) > 1 else 0
    return grid(to_uint8(images), columns, SCALE, gap, left=left)


def sample_files(args, generate, folder, facts):
    """Write a PNG for each prompt and seed into a folder, in batches. facts: see text_chunks."""
    prompts = [prompt for prompt in args.prompt for _ in range(args.num)]
    facts = dict(facts, num=1)                               # of each file
    progress = SamplingProgress("image", len(prompts))
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(prompts), AT_ONCE):
        part = prompts[start:start + AT_ONCE]
        images = to_uint8(generate(part, seed=args.seed + start, on_step=progress.on_step))
        for i, image in enumerate(images):
            info = text_chunks(facts, [part[i]], args.seed + start + i)
            write_png(numbered(folder, start + i + 1), grid(image[None], 1, SCALE, 0),
                      pnginfo=info)
        progress.on_batch(start + len(part))


def gamma_sweep(args, generate):
    """A sheet with a row for each prompt and seed, from the style alone to the object alone."""
    prompts = [prompt for prompt in args.prompt for _ in range(args.num)]
    progress = SamplingProgress("gamma", len(GAMMAS))
    columns = []
    for i, gamma in enumerate(GAMMAS):
        images = generate(prompts, seed=args.seed, gamma=gamma, on_step=progress.on_step)
        columns.append(to_uint8(images))
        progress.on_batch(i + 1)
    images = np.stack(columns, 1)                            # (prompts, gammas, H, W, 3)
    images = images.reshape(-1, *images.shape[2:])
    top = [f"gamma {gamma:g}" for gamma in GAMMAS]
    return grid(images, len(GAMMAS), SCALE, 4, top, prompts)


def lambda_grid(args, generate):
    """lambda_A down, lambda_B across, one prompt and one seed (the paper's Figure S4)."""
    progress = SamplingProgress("row", len(LAMBDAS_A))
    images = []
    for i, lambda_a in enumerate(LAMBDAS_A):
        for lambda_b in LAMBDAS_B:
            images.append(generate(args.prompt, seed=args.seed, lambda_a=lambda_a,
                                   lambda_b=lambda_b, on_step=progress.on_step))
        progress.on_batch(i + 1)
    images = np.concatenate([to_uint8(image) for image in images])
    top = [f"lambda_B {value:g}" for value in LAMBDAS_B]
    left = [f"lambda_A {value:g}" for value in LAMBDAS_A]
    return grid(images, len(LAMBDAS_B), SCALE, 4, top, left)


def trace_frames(pipe, steps):
    """A Pillow image for each decoding step (ids, kept) of `on_step`; masked tokens are grey."""
    for ids, kept in steps:
        side = math.isqrt(ids.shape[1])
        images = to_uint8(pipe.vqgan.decode(ids.view(-1, side, side)))
        factor = images.shape[1] // side
        known = kept.view(-1, side, side).cpu().numpy().repeat(factor, 1).repeat(factor, 2)
        images[~known] = 128
        yield grid(images, min(len(images), 8), 2 * pipe.resolution // images.shape[1])


def write_trace(pipe, path, steps):
    """Write a GIF of the decoding steps, with 128 colours per frame and a pause on the last."""
    frames = [frame.quantize(128, dither=Image.Dither.NONE) for frame in trace_frames(pipe, steps)]
    duration = [120] * (len(frames) - 1) + [2000]            # milliseconds
    write_whole(os.path.realpath(path),                      # a link stays a link
                lambda file: frames[0].save(file, "GIF", save_all=True, loop=0,
                                            append_images=frames[1:], duration=duration))
    say(path)


def text_chunks(facts, prompts, seed):
    """The text chunks of a PNG, from which it can be sampled again.

    facts: the settings, of which those that are None are left out; prompts: saved as a JSON list.
    """
    facts = dict(facts, prompt=json.dumps(prompts, ensure_ascii=False), seed=seed)
    info = PngInfo()
    for name, value in sorted(facts.items()):
        if value is not None:
            # a folder's name need not be UTF-8
            info.add_itxt(name, str(value).encode("utf-8", "backslashreplace").decode())
    return info


# --------------------------------------------------------------------------------------------------
# The command

def main():
    args = options().parse_args()
    check_device(args.device)
    if args.words:
        say("\n".join(sorted(load_pipeline(args).words)))
        return
    check_options(args)
    run = find_style(args)
    style = None if run is None else load_run(run, "style")
    content = None if args.content is None else load_run(args.content, "content")
    check_out(args)
    if style is None and content is not None and args.style_phrase:
        raise ValueError("with --content, --style-phrase also needs a style adapter; without one, "
                         "write the words into the prompt")
    if style is None and args.gamma_sweep:
        raise ValueError("--gamma-sweep mixes two adapters: give --style RUN too")
    if args.style_phrase is not None:
        style_phrase = args.style_phrase
    elif style is not None:
        style_phrase = style.style
    else:
        style_phrase = ""
    pipe = load_pipeline(args)
    note_unknown(pipe, *(style_prompt(prompt, style_phrase) for prompt in args.prompt))

    sampling = sampling_settings(args, default_sampling(style, content, args.gamma))
    settings = dict(gamma=args.gamma, style_phrase=style_phrase, superres=args.superres)
    generate = partial(pipe.generate, style=style, content=content, sampling=sampling, **settings)
    facts = dict(asdict(sampling), **settings, num=args.num, style=str(run or "none"),
                 content=args.content or "none", base=pipe.base_id)
    trace = [] if args.trace else None
    if not wants_sheet(args):
        sample_files(args, generate, Path(args.out), facts)
    else:
        if args.gamma_sweep:
            facts["sweep"] = "gamma"
            picture = gamma_sweep(args, generate)
        elif args.lambda_grid:
            facts["sweep"] = "lambda_a, lambda_b"
            picture = lambda_grid(args, generate)
        else:
            picture = sample_sheet(args, generate, trace)
        info = text_chunks(facts, args.prompt, args.seed)
        # so that a link stays a link
        write_png(os.path.realpath(args.out), picture, pnginfo=info)
    last = args.seed + len(args.prompt) * args.num - 1
    seeds = f"seed {args.seed}" if last == args.seed else f"seeds {args.seed} to {last}"
    say(f"{args.out}: {seeds}")
    if trace is not None:
        write_trace(pipe, args.trace, trace)


if __name__ == "__main__":
    run_command(main)
