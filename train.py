"""Teach a style from one picture, or pretrain the base.

    python train.py --ref style.png                                     # -> runs/style
    python train.py --ref house.png --content "a house" --style "watercolor painting" --out runs/watercolor
    python train.py --ref a.png b.png --content "a cat" "a house"       # every reference is used
    python train.py --ref house.png --rounds 2 --feedback clip          # or human, or random
    python train.py --ref 1.png 2.png --kind content --content "a [V] teapot"

    python train.py --stage vqgan                                       # pretraining, in pretrain/: vqgan, clip,
    python train.py --stage muse --weights weights/mine                 # muse, superres; --help of each says more
    torchrun --nproc_per_node=2 train.py --stage muse                   # on two GPUs, or two CPU processes
"""

import argparse
import importlib
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import data
import human_feedback
from adapter import METHODS
from styledrop import (FEEDBACK, RARE_TOKEN, Parser, Pool, StyleDrop, check_device, check_prompt, choose_by_clip,
                       fingerprint, grid, load_adapter, measure, number, run_command, sample_pool, style_prompt, to_tensor,
                       to_uint8, write_whole)


# ---------------------------------------------------------------------------------------------
# The machine

def peak_memory():
    """Peak resident memory of this process in MB, or nan where the system does not tell."""
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
    except ImportError:
        return math.nan


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# ---------------------------------------------------------------------------------------------
# Style tuning: the main job

PREVIEW = ("a cat", "a tree", "a car", "an apple", "a rocket", "a fish")
CONTENT_PREVIEW = ("watercolor", "flat vector on navy", "gold and purple", "line drawing", "halftone")


def before_after(references, before, after, prompts):
    """One picture: the references on the left, the base's samples above, the tuned ones below.

    references, before, after: uint8 (B, H, W, 3); before and after share their prompts and seeds.
    """
    size, edge, words = 2 * before.shape[1], 8, 16
    sheet = Image.new("RGB", ((1 + len(prompts)) * (size + edge) + 2 * edge, 2 * (size + edge) + words + edge), "white")
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


def teach(pipe, images, contents, style, steps, lr, batch, d_prj, is_shared, seed, mask_power, method="adapter"):
    """pipe.tune with a progress line -> the adapter and its log, a list of dicts."""
    log, began = [], time.time()

    def on_step(step, loss):
        log.append(dict(step=step + 1, loss=round(loss, 5)))
        if (step + 1) % max(1, steps // 10) == 0:
            speed = (step + 1) * batch / (time.time() - began)
            print(f"step {step + 1}/{steps}  loss {loss:.3f}  {speed:.1f} images/s  "
                  f"{clock((steps - step - 1) * batch / speed)} left", flush=True)

    adapter = pipe.tune(images, contents, style, steps, lr, batch, d_prj, is_shared, seed, on_step, method, mask_power)
    ours, base = (sum(p.numel() for p in model.parameters()) for model in (adapter, pipe.muse))
    print(f"adapter: {ours:,} parameters, {100 * ours / base:.2f} % of the base's {base:,}")
    return adapter, log


def write_log(path, log):
    write_whole(path, lambda file: file.write("".join(json.dumps(line) + "\n" for line in log).encode()))


def tune(args):
    """Eq. 3 from the command line: a run folder with adapter.pt, config.json, log.jsonl, samples.png."""
    began = time.time()
    out = Path(args.out or f"runs/{Path(args.ref[0]).stem}")
    if out.exists() and not (out / "adapter.pt").exists():
        raise ValueError(f"{out} exists and is not a run folder; give another --out")
    contents = args.content
    if args.kind == "content":
        if not contents:
            raise ValueError('a content adapter needs the object\'s name: --content "a [V] teapot"')
        if args.style or args.rounds > 1:
            raise ValueError("a content adapter takes neither --style nor --rounds")
        contents = contents * len(args.ref) if len(contents) == 1 else contents
    if contents and len(contents) != len(args.ref):
        raise ValueError(f"{len(args.ref)} references need as many --content phrases, not {len(contents)}")
    if contents and not all(phrase.strip() for phrase in contents):
        raise ValueError("a --content phrase is empty; say what the picture shows, or leave --content out")
    if args.rounds == 1 and (out / "round2").exists():
        raise ValueError(f"{out} holds rounds of feedback; give --rounds to go on with them, or another --out")
    prompts = read_prompts(args.pool_prompts)
    pipe = StyleDrop.load(args.weights, args.device)
    images = np.stack([data.read_image(path, pipe.vqgan.config.resolution) for path in args.ref])
    references = to_tensor(images)
    if not contents:
        contents = guess_content(pipe, references)
        print(f"content guessed by CLIP: {', '.join(contents)} (say it with --content if that is wrong)")
    style = "" if args.kind == "content" else RARE_TOKEN if args.style is None else args.style
    for content in contents:
        check_prompt(pipe, content, style)
    settings = {k: v for k, v in vars(args).items() if k in ("ref", "kind", "method", "steps", "lr", "batch", "d_prj",
                                                             "unshared", "mask_power", "seed", "weights")}
    settings = dict(settings, content=contents, style=style, base=pipe.base,
                    pictures=fingerprint({"references": references}))            # another picture may have the old name
    changed = differing(out / "config.json", settings)
    if args.rounds > 1 and not changed:
        print(f"going on with {out}: its round 1 is there")
    elif (out / "round2").exists():                          # a person's choice may be in it
        raise ValueError(f"{out} holds rounds that began with another {', '.join(changed)}; give another --out, or remove it")
    else:
        if out.exists():
            print(f"{out} is there and will be replaced")
        first_round(args, out, pipe, images, settings)
    if args.rounds > 1:
        further_rounds(args, out, pipe, references, settings, prompts)
    files = sorted(path.name + "/" * path.is_dir() for path in out.iterdir())
    print(f"{out}: {' '.join(files)}  ({time.time() - began:.0f} s, peak memory {peak_memory():.0f} MB)")
    what = f'"{contents[0]}" --content' if args.kind == "content" else '"a cat" --style'
    weights = "" if args.weights == "weights/tiny" else f" --weights {args.weights}"
    print(f"next: python sample.py --prompt {what} {out}{weights}")


def differing(path, settings):
    """The settings that a run's config.json does not have; how the paths were written does not count."""
    there, settings = read_json(path) or {}, as_json(settings)
    return [name for name in settings if name not in ("ref", "weights") and there.get(name) != settings[name]]


def first_round(args, out, pipe, images, settings):
    """From the references; the folder appears when all of it is there."""
    contents, style, prompts = settings["content"], settings["style"], PREVIEW
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:   # fails early, leaves nothing
        run = Path(temporary) / "run"
        run.mkdir()
        adapter, log = teach(pipe, to_tensor(images), contents, style, args.steps, args.lr, args.batch, args.d_prj,
                             not args.unshared, args.seed, args.mask_power, args.method)
        if args.kind == "content":
            prompts = [contents[0]] + [style_prompt(contents[0], words) for words in CONTENT_PREVIEW]
        before = pipe.generate([style_prompt(p, style) for p in prompts], seed=args.seed)
        after = pipe.generate(prompts, **{args.kind: adapter}, seed=args.seed)
        adapter.save(run / "adapter.pt")
        write_json(run / "config.json", settings)
        write_log(run / "log.jsonl", log)
        before_after(images, to_uint8(before), to_uint8(after), prompts).save(run / "samples.png")
        if out.exists():
            os.replace(out, Path(temporary) / "old")
        os.replace(run, out)


# ---------------------------------------------------------------------------------------------
# Rounds of feedback (Sections 3.3 and 4.4.3)

# 30 prompts with the structure of Table S2 (animals, faces, fruit, buildings), in words the base knows
POOL_PROMPTS = """a dog; a cat; a fox; an owl; a horse; a fish; a turtle; a butterfly; a duck; a rabbit; a dog face;
    a cat face; a tiger face; a panda; a red apple; a banana; a pear; cherries; a strawberry; a mushroom; a church;
    a castle; a house; a hut; a tent; a sailboat; an automobile; a rocket; a guitar; a teapot"""
POOL_PROMPTS = [prompt.strip() for prompt in POOL_PROMPTS.split(";")]
ROUND = dict(steps=200, lr=1e-3, d_prj=8)                    # of the adapters after the first


def finished(path, recipe):
    """True if the part that `path` describes was made by the very same recipe."""
    return read_json(path) == as_json(recipe)


def read_json(path):
    """What is in a file of ours; None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def as_json(value):
    """As it comes back from a file: tuples are lists."""
    return json.loads(json.dumps(value))


def write_json(path, value):
    write_whole(path, lambda file: file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()))


def further_rounds(args, out, pipe, references, settings, prompts):
    """Sample a pool, choose, train a NEW larger adapter on the choice; each part is kept and made once.

    roundN/ holds pool.png (a row for each prompt), choice.json, adapter.pt and log.jsonl; every part
    lies beside the recipe that made it, so the same command goes on after the last finished part.
    """
    style = settings["style"]
    for prompt in prompts:
        check_prompt(pipe, prompt, style)
    if not (out / "round1" / "adapter.pt").exists():
        load_adapter(out).save(out / "round1" / "adapter.pt")
    adapters = [load_adapter(out / "round1")]
    for turn in range(2, args.rounds + 1):
        here = out / f"round{turn}"
        recipe = dict(adapter=fingerprint(adapters[-1].state_dict()), prompts=prompts, pool=args.pool, seed=args.seed)
        pool = draw_pool(pipe, here, adapters[-1], recipe)
        recipe = dict(recipe, feedback=args.feedback, style_words=args.style_words)
        pick = args.pick if turn == args.rounds else None    # earlier rounds have been chosen already
        chosen = choose(args, here, pipe, pool, references, recipe, pick)
        recipe = dict(recipe, chosen=chosen, steps=args.round_steps, lr=args.round_lr, d_prj=args.round_d_prj)
        if not (finished(here / "adapter.json", recipe) and (here / "adapter.pt").exists()):
            print(f"round {turn}: {len(chosen)} chosen pictures teach a new adapter")
            adapter, log = teach(pipe, pool.images[chosen], [pool.contents[i] for i in chosen], style, args.round_steps,
                                 args.round_lr, args.batch, args.round_d_prj, False, args.seed, args.mask_power)
            write_log(here / "log.jsonl", log)
            adapter.save(here / "adapter.pt")
            write_json(here / "adapter.json", recipe)
        adapters.append(load_adapter(here))
    adapters[-1].save(out / "adapter.pt")
    write_json(out / "config.json", dict(settings, round=args.rounds))           # whose adapter it is; the rest is round 1's
    compare_rounds(args, out, pipe, references, settings, prompts, adapters)


def read_prompts(path):
    """One content phrase a line; POOL_PROMPTS without a file."""
    if path is None:
        return POOL_PROMPTS
    prompts = [line.strip() for line in data.read_words(Path(path)).splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return prompts


def draw_pool(pipe, here, adapter, recipe):
    """The pool of a round, from pool.png if it is there; pool.json last, so that it vouches for the picture."""
    prompts, count = recipe["prompts"], recipe["pool"]
    if not (finished(here / "pool.json", recipe) and (here / "pool.png").exists()):
        began = time.time()
        show = lambda done: print(f"pool {done}/{len(prompts) * count}  {done / (time.time() - began):.1f} pictures/s", flush=True)
        pool = sample_pool(pipe, prompts, count, adapter, recipe["seed"] + 1, on_batch=show)
        write_whole(here / "pool.png", lambda file: grid(to_uint8(pool.images), count, gap=0).save(file, "PNG"))
        write_json(here / "pool.json", recipe)
    sheet = np.asarray(Image.open(here / "pool.png"))
    size = pipe.vqgan.config.resolution
    tiles = sheet.reshape(len(prompts), size, count, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    return Pool(to_tensor(tiles), prompts, adapter.about["style"])


def choose(args, here, pipe, pool, references, recipe, pick):
    """The numbers of the chosen pictures; kept in choice.json. A person may stop and come back."""
    saved = here / "choice.json"
    if pick is None and saved.exists():
        choice = json.loads(saved.read_text(encoding="utf-8"))
        if finished(saved, dict(recipe, chosen=choice.get("chosen"))):
            return choice["chosen"]
    if args.feedback == "human":
        images, shown = to_uint8(pool.images), to_uint8(references)
        if pick is not None:
            chosen = human_feedback.parse_picks(pick, len(images))
        else:
            for old in here.glob("sheet*.png"):
                old.unlink()
            for i, sheet in enumerate(human_feedback.contact_sheets(images, pool.contents)):
                write_whole(here / f"sheet{i + 1}.png", lambda file: sheet.save(file, "PNG"))
            print(f"choose the best pictures: in the browser at the address below, or look at {here}/sheet*.png "
                  "and run this command again with --pick 3,17,20")
            chosen = human_feedback.pick(images, pool.contents, shown, here / "picking.json", port=args.port)
    elif args.feedback == "clip":
        chosen = choose_by_clip(pipe, pool, None, args.style_words)
    else:
        chosen = FEEDBACK[args.feedback](pipe, pool, torch.Generator().manual_seed(args.seed))
    write_whole(here / "chosen.png", lambda file: grid(to_uint8(pool.images[chosen]), 10, 2).save(file, "PNG"))
    write_json(saved, dict(recipe, chosen=chosen))
    return chosen


def compare_rounds(args, out, pipe, references, settings, prompts, adapters):
    """rounds.png and scores.json: the base and every round on the same prompts and seed, with the three scores."""
    style, size, edge = settings["style"], 2 * pipe.vqgan.config.resolution, 8
    shown = prompts[:8]
    sheet = Image.new("RGB", ((2 + len(shown)) * (size + edge), 16 + (1 + len(adapters)) * (size + edge)), "white")
    draw, scores = ImageDraw.Draw(sheet), {}
    enlarge = lambda image: Image.fromarray(image).resize((size, size), Image.NEAREST)
    draw.text((edge, 2), "reference", fill="black")
    sheet.paste(enlarge(to_uint8(references)[0]), (edge, 16))
    for row, adapter in enumerate([None, *adapters]):
        name = "base" if adapter is None else f"round {row}"
        texts = prompts if adapter else [style_prompt(prompt, style) for prompt in prompts]
        pool = sample_pool(pipe, texts, 1, adapter, args.seed)
        values = measure(pipe, pool.images, prompts, references, settings["content"])
        scores[name] = {k: round(v.nanmean().item(), 4) for k, v in values.items()}
        line = "\n".join([name, *(f"{k} {v:.3f}" for k, v in scores[name].items())])
        y = 16 + row * (size + edge)
        draw.text((edge + size + edge, y), line, fill="black")
        for i, image in enumerate(to_uint8(pool.images[:len(shown)])):
            sheet.paste(enlarge(image), ((2 + i) * (size + edge), y))
            draw.text(((2 + i) * (size + edge), 2), shown[i][:size // 6], fill="black")
        print(f"{name}: " + "  ".join(f"{k} {v:.3f}" for k, v in scores[name].items()), flush=True)
    write_whole(out / "rounds.png", lambda file: sheet.save(file, "PNG"))
    write_json(out / "scores.json", dict(scores, scorer=f"{args.weights}/clip.pt, one picture of each of "
                                                        f"{len(prompts)} prompts, those of the pool; texts without the style phrase"))


def guess_content(pipe, images):
    """The nearest of all names the base was trained on, by CLIP, for each image (R, 3, H, W)."""
    phrases = sorted({data.content_phrase(name) for name in data.names()})
    texts = pipe.clip.encode_text(pipe.clip.tokenizer(phrases, pipe.clip.config.context_length).to(pipe.device))
    scores = pipe.clip.encode_image(images.to(pipe.device)) @ torch.nn.functional.normalize(texts, dim=-1).T
    return [phrases[i] for i in scores.argmax(1)]


# ---------------------------------------------------------------------------------------------
# Command line

# Options of one job only
TUNING = ("content", "style", "kind", "method", "d_prj", "unshared")
ROUNDS = ("rounds", "feedback", "pick", "port", "pool", "pool_prompts", "style_words", "round_steps", "round_lr", "round_d_prj")
STAGES = ("vqgan", "clip", "muse", "superres")              # of pretraining: pretrain/NAME.py


def option(name):
    return "--" + name.replace("_", "-")


def check_options(args, given, error):
    """Call error(one line) where options do not go together; given: the names of those that are not at their default."""
    if not args.ref:
        error(f"give --ref IMG to teach a style, or --stage {'|'.join(STAGES)} to pretrain the base")
    for name in ROUNDS[1:]:
        if name in given and args.rounds == 1:
            error(f"{option(name)} goes with --rounds 2")
    if args.pick is not None and args.feedback != "human":
        error("--pick goes with --feedback human")
    if args.style_words and args.feedback in ("human", "random"):
        error("--style-words goes with --feedback clip")
    if args.rounds > 1 and args.method != "adapter":
        error("--rounds trains adapters; leave --method out")
    if args.kind == "content" and args.method == "textual-inversion":
        error("textual inversion learns the words of a style; leave --kind content out")
    if "unshared" in given and args.method != "adapter" or "d_prj" in given and args.method not in ("adapter", "lora"):
        error("--unshared and --d-prj shape adapters, --d-prj LoRA too; leave them or --method out")


def main():
    stage = Parser(add_help=False, allow_abbrev=False)
    stage.add_argument("--stage", choices=STAGES)
    known, others = stage.parse_known_args()
    if known.stage:                                          # pretraining has scripts of its own
        importlib.import_module(f"pretrain.{known.stage}").main(others)
        return
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("teach a style, or an object").add_argument
    add("--ref", nargs="+", metavar="IMG", help="the style reference; several teach one style together")
    add("--content", nargs="+", metavar="PHRASE", help='what each reference shows, such as "a house" (default: CLIP guesses)')
    add("--style", help=f'words for the style (default: the rare token "{RARE_TOKEN}")')
    add("--kind", choices=("style", "content"), default="style", help="what the pictures teach: a style, or an object")
    add("--method", choices=METHODS, default="adapter", help="what is trained; the others are the paper's baselines")
    add("--d-prj", type=number(int, 1, high=4096), default=4, help="H, the adapter's bottleneck; LoRA: its rank (default %(default)s)")
    add("--unshared", action="store_true", help="independent adapter weights in each layer")
    add = parser.add_argument_group("rounds of feedback").add_argument
    add("--rounds", type=number(int, 1), default=1, help="2: sample a pool, choose, train a new adapter on the choice")
    add("--feedback", choices=("clip", "human", "random"), help="who chooses (default: clip)")
    add("--pick", metavar="3,17,20", help="with --feedback human: the last round's choice by number, instead of the page")
    add("--port", type=number(int, 0, high=65535), default=0, help="of the page (default: any that is free)")
    add("--pool", type=number(int, 1), default=8, help="pictures for each prompt of the pool (default %(default)s; the paper: 64)")
    add("--pool-prompts", metavar="FILE", help="content phrases, one a line (default: 30 of our own)")
    add("--style-words", action="store_true", help="CLIP scores the text with the style phrase in it")
    add("--round-steps", type=number(int, 1), default=ROUND["steps"], help="of each later adapter (default %(default)s)")
    add("--round-lr", type=number(float, 0, strict=True), default=ROUND["lr"], help="its learning rate (default %(default)s)")
    add("--round-d-prj", type=number(int, 1, high=4096), default=ROUND["d_prj"], help="H of the later, unshared adapters (default %(default)s)")
    add = parser.add_argument_group("how").add_argument
    add("--stage", choices=STAGES, help="pretrain this part of the base instead; add --help for its options")
    add("--steps", type=number(int, 1), default=100, help="(default %(default)s)")
    add("--batch", type=number(int, 1), default=8, help="(default %(default)s)")
    add("--lr", type=number(float, 0, strict=True), help="learning rate (default 1e-3; other methods have their own)")
    add("--mask-power", type=number(float, 0, strict=True), default=2, help="1: Muse's law of masking; more masks more (default %(default)s)")
    add("--seed", type=number(int, 0), default=0, help="of everything that is drawn at random")
    add("--weights", default="weights/tiny", help="folder of the base")
    add("--out", help="run folder (default: runs/NAME OF THE REFERENCE)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    check_options(args, [name for name, value in vars(args).items() if value != parser.get_default(name)], parser.error)
    check_device(args.device)
    args.lr = args.lr or METHOD_LR[args.method]
    args.feedback = args.feedback or "clip"
    tune(args)


if __name__ == "__main__":
    run_command(main)
