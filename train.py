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

import argparse
import importlib
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import data
from adapter import METHODS
from human_feedback.rounds import (ROUND, check_rounds, finished, further_rounds, made, read_json,
                                   read_prompts, say, write_json, write_log)
from styledrop import (RARE_TOKEN, WEIGHTS, Parser, StyleDrop, Tuning, check_device, check_prompt,
                       fingerprint, number, run_command, style_prompt, to_tensor, to_uint8)

ROOT = Path(__file__).parent


# ---------------------------------------------------------------------------------------------
# The machine

def peak_memory():
    """Peak resident memory of this process in MB, or nan where the system does not tell."""
    try:
        import resource
        unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    except ImportError:
        return math.nan


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def clear_leftovers(folder):
    """Remove the unfinished runs of processes on this machine that were killed."""
    if os.name == "posix":                                   # elsewhere signal 0 is no question
        for left in folder.glob(f".tuning-{platform.node()}-*"):
            pid = re.fullmatch(r"([0-9]{1,9})-\w+", left.name.split(f"{platform.node()}-", 1)[1])
            try:
                os.kill(int(pid[1]), 0) if pid else None
            except ProcessLookupError:
                shutil.rmtree(left, ignore_errors=True)
            except PermissionError:                          # alive, and somebody else's
                pass


# ---------------------------------------------------------------------------------------------
# Style tuning: the main job

PREVIEW = ("a cat", "a tree", "a car", "an apple", "a rocket", "a fish")
CONTENT_PREVIEW = ("watercolor", "flat vector on navy", "gold and purple", "line drawing",
                   "halftone")


def before_after(references, before, after, prompts):
    """One picture: the references on the left, the base's samples above, the tuned ones below.

    references, before, after: uint8 (B, H, W, 3); before and after share their prompts and seeds.
    """
    size, edge, words = 128, 8, 16
    width, height = (1 + len(prompts)) * (size + edge), 2 * (size + edge) + words
    sheet = Image.new("RGB", (width + 2 * edge, height + edge), "white")
    draw = ImageDraw.Draw(sheet)
    enlarge = lambda image, side: Image.fromarray(image).resize((side, side), Image.NEAREST)
    side = size if len(references) == 1 else size // 2
    for i, image in enumerate(references[:4]):
        sheet.paste(enlarge(image, side), (edge + i % 2 * side, words + i // 2 * side))
    draw.text((edge, 2), "reference", fill="black")
    draw.text((edge, words + size + edge), "above: before\nbelow: after", fill="black")
    for i, prompt in enumerate(prompts):
        x = 2 * edge + (i + 1) * (size + edge)
        draw.text((x, 2), prompt[:size // 6], fill="black")
        sheet.paste(enlarge(before[i], size), (x, words))
        sheet.paste(enlarge(after[i], size), (x, words + size + edge))
    return sheet


METHOD_LR = {"adapter": 1e-3, "full": 1e-4, "lora": 1e-3, "textual-inversion": 1e-2}


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
                f"{clock(time.time() - began)}")

    adapter = pipe.tune(images, contents, style, seed, on_step, **tuning)
    if not all(p.isfinite().all() for p in adapter.parameters()):                # in the last step
        raise ValueError("the last step gave an adapter that is no number; give a lower --lr")
    second = sum(p.numel() for p in adapter.superres.parameters()) if adapter.superres else 0
    count = lambda model: sum(p.numel() for p in model.parameters())
    ours, base = count(adapter) - second, count(pipe.muse)
    words = f"adapter: {ours:,} parameters, {100 * ours / base:.2f} % of the base's {base:,}"
    if second:
        words += f"; {second:,} for the second stage, {100 * second / count(pipe.superres):.2f} %"
    say(words)
    return adapter, log


def check_out(out):
    """Raise an error where the run could not be written in the end."""
    if out.exists() and not ((out / "adapter.pt").exists() and read_json(out / "config.json")):
        raise ValueError(f"{out} exists and is not a run folder; give another --out")
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=place))
    except OSError:
        raise ValueError(f"{place} is no folder to write to; give another --out") from None


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


SETTINGS = ("kind", "method", "steps", "lr", "batch", "d_prj", "unshared", "mask_power", "seed",
            "superres")                 # that a run keeps; not how its files were named


def tune(args):
    """Eq. 3 from the command line: a run folder: adapter.pt, config.json, log.jsonl, samples.png.

    What is there is never replaced: the same command goes on with it, another one is refused.
    """
    began = time.time()
    out = Path(args.out or f"runs/{Path(args.ref[0]).stem}")
    check_out(out)
    contents, prompts = check_contents(args), read_prompts(args.pool_prompts)
    check_rounds(args, out, prompts)
    pipe = StyleDrop.load(args.weights, args.device)
    args.ref = [str(ROOT / path) if not Path(path).exists() and (ROOT / path).exists() else path
                for path in args.ref]                        # examples/ from any folder
    images = np.stack([data.read_reference(path, pipe.resolution) for path in args.ref])
    references = to_tensor(images)
    if not contents:
        contents = guess_content(pipe, references)
        say(f"content guessed by CLIP: {', '.join(contents)} "
            "(say it with --content if that is wrong)")
    style = "" if args.kind == "content" else RARE_TOKEN if args.style is None else args.style
    for content in contents:
        check_prompt(pipe, content, style)
    same = dict({name: getattr(args, name) for name in SETTINGS}, content=contents, style=style,
                base=pipe.base, pictures=fingerprint({"references": references}))
    settings = dict(same, ref=args.ref, weights=args.weights)
    if not made(out / "config.json", same):
        first_round(args, out, pipe, images, settings)
    elif finished(out, args.rounds):
        say(f"{out} is finished: this very command made it; give another --out to tune anew")
    else:
        say(f"going on with {out}: its round 1 is there")
    if args.rounds > 1 and not finished(out, args.rounds):
        further_rounds(args, out, pipe, references, settings, prompts, teach)
    files = sorted(path.name + "/" * path.is_dir() for path in out.iterdir())
    say(f"{out}: {' '.join(files)}  ({time.time() - began:.0f} s, "
        f"peak memory {peak_memory():.0f} MB)")
    prompt = contents[0] if args.kind == "content" else "a cat"
    command = ["python", str(Path(sys.argv[0]).parent / "sample.py"), "--prompt", prompt,
               f"--{args.kind}", str(out)]
    say("next: " + shlex.join(command + ["--weights", args.weights] * (args.weights != WEIGHTS)))


def first_round(args, out, pipe, images, settings):
    """From the references; the folder appears when all of it is there."""
    contents, style, prompts = settings["content"], settings["style"], PREVIEW
    out.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(out.parent)
    prefix = f".tuning-{platform.node()}-{os.getpid()}-"
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=prefix) as temporary:
        run = Path(temporary) / "run"
        run.mkdir()
        tuning = dict(steps=args.steps, lr=args.lr, batch=args.batch, d_prj=args.d_prj,
                      is_shared=not args.unshared, method=args.method, mask_power=args.mask_power,
                      superres=args.superres)
        adapter, log = teach(pipe, to_tensor(images), contents, style, args.seed, tuning)
        if args.kind == "content":
            prompts = [style_prompt(contents[0], words) for words in ("", *CONTENT_PREVIEW)]
        before = pipe.generate([style_prompt(p, style) for p in prompts], seed=args.seed)
        after = pipe.generate(prompts, **{args.kind: adapter}, seed=args.seed)
        adapter.save(run / "adapter.pt")
        write_json(run / "config.json", settings)
        write_log(run / "log.jsonl", log)
        before_after(images, to_uint8(before), to_uint8(after), prompts).save(run / "samples.png")
        os.replace(run, out)


def guess_content(pipe, images):
    """The nearest of all names the base was trained on, by CLIP, for each image (R, 3, H, W)."""
    phrases = sorted({data.content_phrase(name) for name in data.names()})
    ids = pipe.clip.tokenizer(phrases, pipe.clip.config.context_length).to(pipe.device)
    texts = torch.nn.functional.normalize(pipe.clip.encode_text(ids), dim=-1)
    scores = pipe.clip.encode_image(images.to(pipe.device)) @ texts.T
    return [phrases[i] for i in scores.argmax(1)]


# ---------------------------------------------------------------------------------------------
# Command line

STAGES = ("vqgan", "clip", "muse", "superres")              # of pretraining: pretrain/NAME.py

# Options that would do nothing: which, when, and what to say of them
IDLE = [
    ("feedback pick port pool pool_prompts style_words round_steps round_lr round_d_prj",
     lambda a: a.rounds == 1, "goes with --rounds 2"),
    ("pick", lambda a: a.feedback != "human", "goes with --feedback human"),
    ("port", lambda a: a.feedback != "human", "is of the page: it goes with --feedback human"),
    ("port", lambda a: a.pick and a.rounds == 2, "is of the page, which --pick replaces"),
    ("style_words", lambda a: a.feedback in ("human", "random"), "goes with --feedback clip"),
    ("style_words", lambda a: a.style == "", "needs a --style that is not empty"),
    ("style", lambda a: a.kind == "content", "names a style; leave it or --kind content out"),
    ("rounds", lambda a: a.kind == "content", "chooses a style; leave it or --kind content out"),
    ("rounds", lambda a: a.method != "adapter", "trains adapters; leave it or --method out"),
    ("kind", lambda a: a.kind == "content" and a.method == "textual-inversion",
     "content has no words of a style to learn; leave it or --method out"),
    ("unshared", lambda a: a.method != "adapter", "shapes adapters; leave it or --method out"),
    ("d_prj", lambda a: a.method not in ("adapter", "lora"),
     "shapes adapters and LoRA; leave it or --method out")]


def check_options(args, given):
    """Raise ValueError for an option in `given` that would do nothing."""
    if not args.ref:
        raise ValueError("give --ref IMG to teach a style, or --stage "
                         f"{'|'.join(STAGES)} to pretrain the base")
    for names, idle, words in IDLE:
        for name in names.split():
            if name in given and idle(args):
                raise ValueError(f"--{name.replace('_', '-')} {words}")


def words(text):
    """An argparse type: words that config.json can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{ascii(text)} is not UTF-8; rename it") from None
    return text


def filled(text):
    """An argparse type: words that are not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; leave it out, or say what it is")
    return words(text)


def main():
    stage = Parser(add_help=False, allow_abbrev=False)
    stage.add_argument("--stage", choices=STAGES)
    known, others = stage.parse_known_args()
    if known.stage:                                          # pretraining has scripts of its own
        importlib.import_module(f"pretrain.{known.stage}").main(others)
        return
    count = lambda high: number(int, 1, high=high)
    rate = number(float, 0, strict=True, high=1)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("teach a style, or an object").add_argument
    add("--ref", nargs="+", type=filled, metavar="IMG",
        help="the style reference; several teach one style together")
    add("--content", nargs="+", type=filled, metavar="PHRASE",
        help='what each reference shows, such as "a house" (default: CLIP guesses)')
    add("--style", type=words, help=f'words for the style (default: the rare token "{RARE_TOKEN}")')
    add("--kind", choices=("style", "content"), default="style",
        help="what the pictures teach: a style, or an object")
    add("--method", choices=METHODS, default="adapter",
        help="what is trained; the others are the paper's baselines")
    add("--d-prj", type=count(4096), default=4, help="H, the bottleneck; LoRA's rank (default 4)")
    add("--unshared", action="store_true", help="independent adapter weights in each layer")
    add = parser.add_argument_group("rounds of feedback").add_argument
    add("--rounds", type=count(20), default=1,
        help="2: sample a pool, choose, train a new adapter on the choice")
    add("--feedback", choices=("clip", "human", "random"), default="clip", help="who chooses")
    add("--pick", metavar="3,17,20",
        help="with --feedback human: the last round's choice by number, instead of the page")
    add("--port", type=number(int, 0, high=65535), default=0, help="of the page (default: any)")
    add("--pool", type=count(1024), default=8,
        help="pictures for each prompt of the pool (default 8; the paper: 64)")
    add("--pool-prompts", type=filled, metavar="FILE",
        help="content phrases, one a line (default: 30 of our own)")
    add("--style-words", action="store_true", help="CLIP reads the style phrase in the text too")
    add("--round-steps", type=count(10**6), default=ROUND["steps"],
        help="of each later adapter (default %(default)s)")
    add("--round-lr", type=rate, default=ROUND["lr"], help="its rate (default %(default)s)")
    add("--round-d-prj", type=count(4096), default=ROUND["d_prj"],
        help="H of the later, unshared adapters (default %(default)s)")
    add = parser.add_argument_group("how").add_argument
    add("--stage", choices=STAGES, help="pretrain this part of the base; with --help: how")
    add("--steps", type=count(10**6), default=Tuning.steps, help="(default %(default)s)")
    add("--batch", type=count(4096), default=Tuning.batch, help="(default %(default)s)")
    add("--lr", type=rate, help="learning rate (default 1e-3; other methods have their own)")
    add("--mask-power", type=number(float, 0, strict=True, high=100), default=2,
        help="1: Muse's law of masking; more masks more (default %(default)s)")
    add("--no-superres", dest="superres", action="store_false", help="tune the base's stage alone")
    add("--seed", type=number(int, 0, high=2**31), default=0, help="of everything drawn at random")
    add("--weights", type=filled, default=WEIGHTS, help="folder of the base (default: what ships)")
    add("--out", type=filled, help="run folder (default: runs/NAME OF THE REFERENCE)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))  # so that no default is filled in
    given = [name for name, value in vars(parser.parse_args(namespace=unset)).items()
             if value is not None]
    check_options(args, given)
    check_device(args.device)
    args.lr = args.lr or METHOD_LR[args.method]
    if hasattr(sys.stdout, "reconfigure"):                   # a terminal without some letter
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves nothing behind either
    tune(args)


if __name__ == "__main__":
    run_command(main)
