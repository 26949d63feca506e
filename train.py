"""Teach a style from one picture (StyleDrop, Section 3).

    python train.py --ref style.png                                     # -> runs/style
    python train.py --ref house.png --content "a house" --style "watercolor"   # the paper's prompts
    python train.py --ref a.png b.png --out runs/watercolor             # one style, two references
    python train.py --ref house.png --rounds 2 --feedback clip          # or human, or random
    python train.py --ref 1.png 2.png --kind content --content "a [V] teapot"

This file parses the options and manages the run folder. The training loop is StyleDrop.fit in
styledrop.py (Eq. 3). The base is trained by `python -m pretrain.muse` and the other scripts in
pretrain/.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)             # Ctrl-C while importing: no traceback

import math
import os
import shlex
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

import data
from checkpoint.files import (check_place, clear_leftovers, partial_prefix, read_json, write_json,
                              write_log, write_png)
from checkpoint.runs import alone, is_finished, was_made
from checkpoint.weights import fingerprint
from clip_feedback import VOCABULARY_FILE
from commandline.notes import knows_some, note_unknown
from commandline.options import (Parser, add_base_options, filled, load_pipeline, number, text,
                                 whole)
from commandline.terminal import Progress, note, peak_memory, run_command, say
from commandline.tuning import TuningProgress, describe
from data.pictures import grid
from data.reading import is_one_colour
from human_feedback import rounds
from styledrop import (CONTENT, CONTENT_SAMPLING, RARE_TOKEN, ROUND_1, SAMPLING,
                       SUPERRES_SAMPLING, WEIGHTS, check_device, default_sampling, precision,
                       style_prompt, to_tensor, to_uint8)

ROOT = Path(__file__).resolve().parent    # resolved, in case train.py is called through a link
PREVIEW = ("a cat", "a tree", "a car", "an apple", "a rocket", "a fish")
CONTENT_PREVIEW = ("watercolor", "flat vector on navy", "gold and purple", "line drawing",
                   "halftone")           # styles in which an object is previewed


# --------------------------------------------------------------------------------------------------
# The command

def options():
    """The command's options."""
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("tuning on a style or an object").add_argument
    add("--ref", nargs="+", action="extend", type=filled, metavar="IMG", required=True,
        help="the style reference; several references teach one style together")
    add("--content", nargs="+", action="extend", type=filled, metavar="PHRASE",
        help='what each reference shows, such as "a house" (default: the prompt names only the '
             "style)")
    add("--style", type=text, default=RARE_TOKEN,
        help="the style's name in prompts (default: %(default)s, a rare token)")
    add("--kind", choices=("style", "content"), default="style",
        help="what the pictures teach: a style, or an object (default: %(default)s)")
    add("--steps", type=whole(1, 10**6),
        help="training steps of the first stage, in round 1 (default: "
             f"{ROUND_1.steps}, of an object {CONTENT.steps})")
    add("--lr", type=number(float, 0, 1, above=True), default=ROUND_1.lr,
        help="learning rate of the first stage, in round 1 (default: %(default)s)")
    add("--batch", type=whole(1, 4096), default=ROUND_1.batch,
        help="batch size of the first stage, in every round (default: %(default)s)")
    add("--d-prj", type=whole(1, 4096), default=ROUND_1.d_prj,
        help="H, the bottleneck width of the first stage's adapter, in round 1 "
             "(default: %(default)s)")
    add("--seed", type=whole(0, 2**31), default=0,
        help="random seed (default: %(default)s)")
    add("--out", type=filled, help="run folder (default: runs/NAME OF THE FIRST REFERENCE)")
    add_base_options(parser)
    add = parser.add_argument_group("rounds of feedback").add_argument
    add("--rounds", type=whole(1, 20), default=1,
        help="with 2, a new adapter is trained on chosen samples (default: %(default)s)")
    add("--feedback", choices=("clip", "human", "random"), default="clip",
        help="how images are chosen (default: %(default)s)")
    add("--pick", metavar="3,17,20", type=text,
        help="with --feedback human: choose these numbers, instead of choosing in the browser")
    add("--port", type=whole(0, 65535), default=0,
        help="port of the web page of --feedback human (default: any free one)")
    add("--pool", type=whole(1, 1024), default=8,
        help="images sampled for each prompt (default: %(default)s; the paper: 64)")
    add("--pool-prompts", type=filled, metavar="FILE",
        help='text file of things to sample, one per line, such as "a dog" '
             "(default: 30 built-in ones)")
    return parser


def check_options(args):
    """Raise ValueError if options contradict each other."""
    if args.kind == "content" and not args.content:
        raise ValueError('a content adapter needs the name of its object: --content "a [V] teapot"')
    if not args.style.strip() and not args.content:          # the prompt would be empty
        raise ValueError('--style "" needs --content; leave --style out')
    if args.kind == "content" and args.rounds > 1:
        raise ValueError("rounds of feedback are for styles; leave out --rounds or --kind content")
    is_for_all = args.kind == "content" and len(args.content) == 1   # one name, all its pictures
    if args.content and not is_for_all and len(args.content) != len(args.ref):
        raise ValueError(f"there are {len(args.ref)} --ref and {len(args.content)} --content; give "
                         "one phrase for each reference, and put a phrase of several words in "
                         "quotes")
    if args.pick is not None and (args.rounds == 1 or args.feedback != "human"):
        raise ValueError("--pick needs --rounds 2 --feedback human")


def default_tuning(kind):
    """The default settings of tuning the first stage on a style or on an object ("content")."""
    if kind == "content":
        return CONTENT
    return ROUND_1


def main():
    args = options().parse_args()
    check_options(args)
    if args.steps is None:
        args.steps = default_tuning(args.kind).steps
    check_device(args.device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # cleans up as any other exit does
    warnings.filterwarnings("ignore", "only the first")      # of CLIP; notes.py notes the same
    began = time.time()
    out = Path(args.out or default_out(args.ref[0]))
    if ".." in out.parts:                    # "a/../b", where there may be no folder a
        out = out.resolve()
    check_out(out)
    prompts = rounds.read_prompts(args.pool_prompts)
    rounds.check_rounds(args, out, prompts)
    pipe = load_pipeline(args)
    # reading pipe.clip also finds a damaged file before the long work
    if args.rounds > 1 and pipe.clip.tokenizer is None:
        raise ValueError(f"{args.weights}/clip.pt has no vocabulary; put {VOCABULARY_FILE} next to "
                         "it, or if it was made by pretrain.clip, train it again")
    paths = [find_reference(path) for path in args.ref]
    references = [data.read_reference(path, pipe.resolution) for path in paths]
    references = to_tensor(np.stack(references))             # (R, 3, H, W)
    contents, style = phrases(args, pipe)
    recipe = dict(kind=args.kind, content=contents, style=style, steps=args.steps, lr=args.lr,
                  batch=args.batch, d_prj=args.d_prj, superres=args.superres, seed=args.seed,
                  base=pipe.base_id, pictures=fingerprint({"references": references}))
    # what is added here is recorded in config.json, but not compared by was_made
    config = dict(recipe, ref=[Path(path).name for path in paths], weights=Path(args.weights).name,
                  precision=precision(args.device))

    if not was_made(out / "config.json", recipe):
        first_round(args, out, pipe, references, config)
    elif is_finished(out, args.rounds):
        say(f"{out} is already finished; to tune again, give another --out")
    else:
        say(f"resuming {out}: round 1 is finished")
    if args.rounds > 1 and not is_finished(out, args.rounds):
        with alone(out):
            rounds.further_rounds(args, out, pipe, references, config, prompts)
    say_what_is_next(args, out, contents, began)


def default_out(reference):
    """runs/NAME for a reference NAME.png."""
    name = Path(reference).stem.strip(". ")
    return f"runs/{name or 'style'}"


def check_out(out):
    """Raise ValueError if the run folder cannot be written."""
    check_place(out)
    if not out.exists():
        return
    if is_empty(out):                        # it is replaced, if that can be done without harm
        if os.path.ismount(out):
            raise ValueError(f"{out} is a mount point; give --out a folder inside it")
        if out.resolve() == Path.cwd():
            raise ValueError(f"{out} is the current folder; give --out a folder inside it")
        if not os.access(out.resolve().parent, os.W_OK):
            raise ValueError(f"{out} lies in a folder that is read-only; give --out a folder "
                             f"inside {out}")
        return
    if not (out / "config.json").exists() or not (out / "adapter.pt").exists():
        raise ValueError(f"{out} already exists, but is not a run folder; give another --out")
    try:
        read_json(out / "config.json")
    except ValueError:
        raise ValueError(f"{out / 'config.json'} is damaged; give another --out, or move "
                         f"{out} away") from None


def is_empty(out):
    """Is this an empty folder?"""
    return out.is_dir() and not any(out.iterdir())


def find_reference(path):
    """The reference's path; this repository's examples/ are found from any working directory."""
    if not Path(path).exists() and (ROOT / path).exists():
        return str(ROOT / path)
    return path


def phrases(args, pipe):
    """The content phrases of the references and the style phrase that they share."""
    contents = args.content
    if args.kind == "content" and len(contents) == 1:        # the name of the object
        contents = contents * len(args.ref)
    if contents is None:
        contents = [""] * len(args.ref)                      # the prompt is "[V*] style"
    style = args.style.strip()
    if args.kind == "content":
        style = ""
    elif style != RARE_TOKEN and not knows_some(pipe, style):
        note(f"the base does not know the words {style!r}, so the style is called {RARE_TOKEN}")
        style = RARE_TOKEN
    note_unknown(pipe, *(style_prompt(content, style) for content in contents))
    return contents, style


def say_what_is_next(args, out, contents, began):
    """Print what was made, how long it took, and the command to try next."""
    names = []
    for path in sorted(out.iterdir()):
        names.append(f"{path.name}/" if path.is_dir() else path.name)
    cost = f"{time.time() - began:.0f} s"
    memory = peak_memory()
    if not math.isnan(memory):
        cost += f", peak memory {memory:.0f} MB"
    say(f"{out}: {' '.join(names)}  ({cost})")
    prompt = contents[0] if args.kind == "content" else "a cat"
    run = "./none" if str(out) == "none" else str(out)       # --style none is the base
    script = Path(sys.argv[0])
    if script.is_symlink():
        script = script.resolve()
    command = ["python", str(script.parent / "sample.py")]
    command += with_value("--prompt", prompt)
    command += with_value(f"--{args.kind}", run)
    if args.weights != WEIGHTS:
        command += with_value("--weights", args.weights)
    say("next: " + shlex.join(command))


def with_value(option, value):
    """An option and its value as arguments; a value that begins with a dash needs "="."""
    if value.startswith("-"):
        return [f"{option}={value}"]
    return [option, value]


# --------------------------------------------------------------------------------------------------
# Round 1

def first_round(args, out, pipe, references, config):
    """Tune on the references (Eq. 3) and draw previews. The run folder is created at the end."""
    contents = config["content"]
    style = config["style"]
    place = out.resolve()                                    # the real path, if `out` is a link
    place.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(place.parent)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=partial_prefix()) as temporary:
        run = Path(temporary) / "run"
        run.mkdir()
        tuning = replace(default_tuning(args.kind), steps=args.steps, lr=args.lr, batch=args.batch,
                         d_prj=args.d_prj)
        progress = TuningProgress()
        adapter = pipe.tune(references, contents, style, args.seed, args.superres, tuning, progress)
        say(describe(pipe, adapter))
        adapter.about["kind"] = args.kind
        try:
            adapter.save(run / "adapter.pt")
            write_json(run / "config.json", config)
            write_log(run / "log.jsonl", progress.log)
        except OSError as error:
            error.filename = str(out)                        # the temporary name would mean nothing
            raise
        if args.kind == "content":
            prompts = [style_prompt(contents[0], words) for words in ("", *CONTENT_PREVIEW)]
        else:
            prompts = PREVIEW
        before, after = previews(pipe, adapter, prompts, args)
        sheet = before_after(to_uint8(references), to_uint8(before), to_uint8(after), prompts)
        try:
            write_png(run / "samples.png", sheet)
        except OSError as error:                             # a full disk must not cost the adapter
            reason = (error.strerror or str(error)).lower()
            note(f"{out / 'samples.png'} could not be written: {reason}")
        note_blank(to_uint8(after), args.kind)
        try:
            os.replace(run, place)
        except OSError:
            if is_empty(out) or not out.exists():
                raise
            raise ValueError(f"another command has just made {out}; give another --out") from None


def previews(pipe, adapter, prompts, args):
    """Images (B, 3, H, W) of the prompts before and after tuning, with the same seeds.

    Each has its own default settings (styledrop.default_sampling).
    """
    settings = dict(seed=args.seed, superres=args.superres)
    adapters = dict(style=None, content=None)
    adapters[args.kind] = adapter
    steps = default_sampling(None, None).steps + default_sampling(**adapters).steps
    if args.superres and pipe.superres is not None:
        steps += 2 * SUPERRES_SAMPLING.steps
    progress = Progress("previews: step")
    done = 0

    def on_step(step, ids, kept):
        nonlocal done
        done += 1
        progress(done, steps)

    before = pipe.generate(prompts, on_step=on_step, **settings)
    after = pipe.generate(prompts, on_step=on_step, **adapters, **settings)
    return before, after


def before_after(references, before, after, prompts):
    """One sheet: the base's samples above, the tuned model's below, the reference on the left.

    With several references, the first is shown above and the last below.

    references, before, after: uint8 (B, H, W, 3); before and after share their prompts and seeds.
    """
    scale = references.shape[1] // before.shape[1]           # 2 with --no-superres
    before = before.repeat(scale, 1).repeat(scale, 2)
    after = after.repeat(scale, 1).repeat(scale, 2)
    images = np.concatenate([references[:1], before, references[-1:], after])
    enlarged = max(1, 128 // images.shape[1])
    return grid(images, columns=1 + len(prompts), scale=enlarged, gap=8,
                top=["reference", *prompts], left=["before", "after"])


def note_blank(images, kind):
    """Warn if any of the previews, uint8 (B, H, W, 3), is blank, and say what to do."""
    blank = sum(is_one_colour(image) for image in images)
    advice = f"Use less of the style: sample.py --lambda-a {SAMPLING.lambda_a / 2:.1g}"
    if kind == "content":
        advice = f"Use less of the object: sample.py --lambda-a {CONTENT_SAMPLING.lambda_a / 2:.2g}"
    if blank:
        note(f"{blank} of {len(images)} previews are blank. {advice}")


if __name__ == "__main__":
    run_command(main)
