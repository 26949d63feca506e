"""Teach a style from one picture, or pretrain the base.

    python train.py --ref style.png                                     # -> runs/style
    python train.py --ref house.png --content "a house" --style "watercolor painting" --out runs/a
    python train.py --ref a.png b.png --content "a cat" "a house"       # every reference is used
    python train.py --ref house.png --rounds 2 --feedback clip          # or human, or random
    python train.py --ref 1.png 2.png --kind content --content "a [V] teapot"

    python train.py --stage vqgan                       # pretraining, in pretrain/: vqgan, clip,
    python train.py --stage muse --weights weights/mine # muse, superres; --help of each says more
    torchrun --nproc_per_node=2 train.py --stage muse   # on two GPUs, or two CPU processes
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)             # Ctrl-C while importing: no traceback

import argparse
import importlib
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import data
from adapter import METHODS
from commandline import (Parser, check_place, filled, load_pipe, number, peak_memory, run_command,
                         say, utf8)
from commandline.guess import words_for
from data.english import note_unknown
from data.pictures import grid
from human_feedback.rounds import (alone, check_rounds, finished, further_rounds, made, read_json,
                                   read_prompts, write_json, write_log)
from styledrop import (LR, RARE_TOKEN, WEIGHTS, Tuning, check_device, clear_leftovers, fingerprint,
                       partial_prefix, style_prompt, to_tensor, to_uint8)

ROOT = Path(__file__).parent


# --------------------------------------------------------------------------------------------------
# Tuning: the main job

PREVIEW = ("a cat", "a tree", "a car", "an apple", "a rocket", "a fish")
CONTENT_PREVIEW = ("watercolor", "flat vector on navy", "gold and purple", "line drawing",
                   "halftone")


def before_after(references, before, after, prompts):
    """One picture: the base's samples above, the tuned ones below, beside them the references.

    references, before, after: uint8 (B, H, W, 3); before and after share their prompts and seeds.
    """
    k = references.shape[1] // before.shape[1]               # 2 with --no-superres
    before, after = (images.repeat(k, 1).repeat(k, 2) for images in (before, after))
    rows = np.concatenate([references[:1], before, references[-1:], after])
    return grid(rows, 1 + len(prompts), max(1, 128 // rows.shape[1]), 8, ["reference", *prompts],
                ["before", "after"])


def teach(pipe, images, contents, style, seed, tuning):
    """pipe.tune with a progress line for each stage -> the adapter and its log, a list of dicts.

    tuning: a dict of the fields of styledrop.Tuning.
    """
    log, began = [], time.time()

    def on_step(step, steps, loss):
        first = step == len(log)                             # the second stage's count starts again
        log.append(dict(stage="base" if first else "superres", step=step + 1, loss=round(loss, 5)))
        if (step + 1) % max(1, steps // 5) == 0:
            say(f"{log[-1]['stage']} step {step + 1}/{steps}  loss {loss:.3f}  "
                f"{time.time() - began:.0f} s")

    adapter = pipe.tune(images, contents, style, seed, on_step, **tuning)
    if not all(p.isfinite().all() for p in adapter.parameters()):                # in the last step
        raise ValueError("the last step gave an adapter that is no number; give a lower --lr")
    second = sum(p.numel() for p in adapter.superres.parameters()) if adapter.superres else 0
    count = lambda model: sum(p.numel() for p in model.parameters())
    ours, base = count(adapter) - second, count(pipe.muse)
    words = f"adapter: {ours:,} parameters, {100 * ours / base:.2f} % of the base's {base:,}"
    if second:
        words += f"; {second:,} for the second stage, {100 * second / count(pipe.superres):.2f} %"
    elif pipe.superres is not None:
        words += "; the second stage is not tuned"
    say(words)
    return adapter, log


def check_out(out):
    """Raise an error where the run could not be written in the end."""
    check_place(out)
    if out.exists() and not ((out / "adapter.pt").exists() and read_json(out / "config.json")):
        raise ValueError(f"{out} exists and is not a run folder; give another --out")


def check_contents(args):
    """A content phrase for each reference, or None. Raises ValueError where they do not fit."""
    contents = args.content
    if args.kind == "content":
        if not contents:
            raise ValueError("a content adapter needs the object's name: "
                             '--content "a [V] teapot"')
        contents = contents * len(args.ref) if len(contents) == 1 else contents
    if contents and len(contents) != len(args.ref):
        raise ValueError(f"{len(args.ref)} references need as many --content phrases, "
                         f"not {len(contents)}")
    return contents


TUNING = ("method", "steps", "lr", "batch", "d_prj", "superres")     # fields of styledrop.Tuning


def tune(args):
    """Eq. 3 from the command line -> a folder of adapter.pt, config.json, log.jsonl, samples.png.

    What is there is never replaced: the same command goes on with it, another one is refused.
    """
    began = time.time()
    out = Path(args.out or f"runs/{Path(args.ref[0]).stem}")
    check_out(out)
    contents, prompts = check_contents(args), read_prompts(args.pool_prompts)
    check_rounds(args, out, prompts)
    pipe = load_pipe(args)
    refs = [str(ROOT / path) if not Path(path).exists() and (ROOT / path).exists() else path
            for path in args.ref]                            # examples/ from any folder
    references = [data.read_reference(path, pipe.resolution) for path in refs]
    references = to_tensor(np.stack(references))             # (R, 3, H, W)
    style = "" if args.kind == "content" else args.style
    if style is None and args.method == "textual-inversion":
        style = RARE_TOKEN                                   # to learn a word of its own
    of = dict(base=pipe.base, pictures=fingerprint({"references": references}))
    there = read_json(out / "config.json") or {}
    there = there.get("guessed") if {name: there.get(name) for name in of} == of else None
    contents, style, guessed = words_for(pipe, references, contents, style, there)
    note_unknown(pipe, *(style_prompt(content, style) for content in contents))
    tuning = {name: getattr(args, name) for name in TUNING}
    tuning["lr"] = args.lr or LR[args.method]
    same = dict(tuning, kind=args.kind, seed=args.seed, content=contents, style=style, **of)
    settings = dict(same, ref=refs, weights=args.weights, guessed=guessed)       # not compared
    if not made(out / "config.json", same):
        first_round(args, out, pipe, references, settings)
    elif finished(out, args.rounds):
        say(f"{out} is finished: this very command made it; give another --out to tune anew")
    else:
        say(f"going on with {out}: its round 1 is there")
    if args.rounds > 1 and not finished(out, args.rounds):
        with alone(out):
            further_rounds(args, out, pipe, references, settings, prompts, teach)
    files = sorted(path.name + "/" * path.is_dir() for path in out.iterdir())
    say(f"{out}: {' '.join(files)}  ({time.time() - began:.0f} s, "
        f"peak memory {peak_memory():.0f} MB)")
    prompt = contents[0] if args.kind == "content" else "a cat"
    command = ["python", str(Path(sys.argv[0]).parent / "sample.py"), "--prompt", prompt,
               f"--{args.kind}", str(out)]
    say("next: " + shlex.join(command + ["--weights", args.weights] * (args.weights != WEIGHTS)))


def first_round(args, out, pipe, references, settings):
    """From the references; the folder appears when all of it is there."""
    contents, style, prompts = settings["content"], settings["style"], PREVIEW
    out.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(out.parent)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=partial_prefix()) as temporary:
        run = Path(temporary) / "run"
        run.mkdir()
        tuning = {name: settings[name] for name in TUNING}
        adapter, log = teach(pipe, references, contents, style, args.seed, tuning)
        if args.kind == "content":
            prompts = [style_prompt(contents[0], words) for words in ("", *CONTENT_PREVIEW)]
        how = dict(seed=args.seed, superres=args.superres)
        before = pipe.generate([style_prompt(p, style) for p in prompts], **how)
        after = pipe.generate(prompts, **{args.kind: adapter}, **how)
        adapter.save(run / "adapter.pt")
        write_json(run / "config.json", settings)
        write_log(run / "log.jsonl", log)
        sheet = before_after(*map(to_uint8, (references, before, after)), prompts)
        sheet.save(run / "samples.png")
        try:
            os.replace(run, out)
        except OSError:
            if not out.exists():
                raise
            raise ValueError(f"another command made {out} meanwhile; give another --out") from None


# ---------------------------------------------------------------------------------------------
# Command line

STAGES = ("vqgan", "clip", "muse", "superres")              # of pretraining: pretrain/NAME.py

# Options that would do nothing: which, when, and what to say of them
IDLE = [
    ("feedback pick port pool pool_prompts", lambda a: a.rounds == 1, "goes with --rounds 2"),
    ("pick", lambda a: a.feedback != "human", "goes with --feedback human"),
    ("port", lambda a: a.feedback != "human", "is of the page: it goes with --feedback human"),
    ("port", lambda a: a.pick and a.rounds == 2, "is of the page, which --pick replaces"),
    ("style", lambda a: a.kind == "content", "names a style; leave it or --kind content out"),
    ("rounds", lambda a: a.kind == "content", "chooses a style; leave it or --kind content out"),
    ("rounds", lambda a: a.method != "adapter", "trains adapters; leave it or --method out"),
    ("kind", lambda a: a.kind == "content" and a.method == "textual-inversion",
     "content has no words of a style to learn; leave it or --method out"),
    ("method", lambda a: a.method == "textual-inversion" and a.style is not None
     and not a.style.strip(), "learns the words of a style; give a --style"),
    ("d_prj", lambda a: a.method not in ("adapter", "lora"),
     "shapes adapters and LoRA; leave it or --method out")]


def check_options(args, given):
    """Raise ValueError for an option in `given` that would do nothing."""
    if not args.ref:
        raise ValueError("give --ref IMG to teach a style, or --stage "
                         f"{'|'.join(STAGES)} to pretrain the base")
    for names, idle, why in IDLE:
        for name in names.split():
            if name in given and idle(args):
                raise ValueError(f"--{name.replace('_', '-')} {why}")


def options():
    """The command's options."""
    count = lambda high: number(int, 1, high=high)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("a style, or an object").add_argument
    add("--ref", nargs="+", action="extend", type=filled, metavar="IMG",
        help="the style reference; several teach one style together")
    add("--content", nargs="+", action="extend", type=filled, metavar="PHRASE",
        help='what each reference shows, such as "a house" (default: a guess)')
    add("--style", type=utf8,
        help="words for the style (default: the base's, for the first four references)")
    add("--kind", choices=("style", "content"), default="style",
        help="what the pictures teach: a style, or an object")
    add("--method", choices=METHODS, default="adapter",
        help="what is trained; the others are the paper's baselines")
    add("--d-prj", type=count(4096), default=Tuning.d_prj,
        help="H of round 1's first stage; LoRA's rank (default %(default)s)")
    add("--steps", type=count(10**6), default=Tuning.steps,
        help="of round 1's first stage (default %(default)s)")
    add("--batch", type=count(4096), default=Tuning.batch,
        help="of the first stage (default %(default)s)")
    add("--lr", type=number(float, 0, strict=True, high=1),
        help="of round 1's first stage (default 1e-3; other methods have their own)")
    add("--no-superres", dest="superres", action="store_false", help="tune the first stage alone")
    add("--seed", type=number(int, 0, high=2**31), default=0, help="of everything drawn at random")
    add("--weights", type=filled, default=WEIGHTS, help="folder of the base (default: what ships)")
    add("--out", type=filled, help="run folder (default: runs/NAME OF THE REFERENCE)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add = parser.add_argument_group("rounds of feedback").add_argument
    add("--rounds", type=count(20), default=1,
        help="2: sample a pool, choose, train a new adapter on the choice")
    add("--feedback", choices=("clip", "human", "random"), default="clip", help="who chooses")
    add("--pick", metavar="3,17,20",
        help="with --feedback human: the last round's choice by number, instead of the page")
    add("--port", type=number(int, 0, high=65535), default=0, help="of the page (default: any)")
    add("--pool", type=count(1024), default=8,
        help="images for each prompt of the pool (default %(default)s; the paper: 64)")
    add("--pool-prompts", type=filled, metavar="FILE",
        help="content phrases, one a line (default: 30 of our own)")
    add = parser.add_argument_group("pretraining").add_argument
    add("--stage", choices=STAGES, help="train this part of the base; --stage X --help says how")
    return parser


def main():
    stage = Parser(add_help=False)
    stage.add_argument("--stage", choices=STAGES)
    known, others = stage.parse_known_args()
    if known.stage:                                          # pretraining has scripts of its own
        importlib.import_module(f"pretrain.{known.stage}").main(others)
        return
    parser = options()
    args = parser.parse_args()
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))  # so that no default is filled in
    given = [name for name, value in vars(parser.parse_args(namespace=unset)).items()
             if value is not None]
    check_options(args, given)
    check_device(args.device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves nothing behind either
    tune(args)


if __name__ == "__main__":
    run_command(main)
