"""Rounds of feedback (Sections 3.3 and 4.4.3): sample a pool, choose, train a new adapter.

The run folder keeps every part beside the recipe that made it. The same command goes on after the
last part; a command that wants another recipe is refused, so nobody's choice is ever replaced.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import data
import human_feedback
from styledrop import (FEEDBACK, Pool, check_prompt, choose_by_clip, fingerprint, grid,
                       load_adapter, measure, sample_pool, style_prompt, to_tensor, to_uint8,
                       write_whole)


# ---------------------------------------------------------------------------------------------
# The run folder

def say(line):
    """A line of progress. Where nobody reads on, as behind `| head -1`, the work goes on."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_log(path, log):
    text = "".join(json.dumps(line) + "\n" for line in log)
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path, value):
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def read_json(path):
    """A file of ours, a dict; None where there is none. Raises ValueError where it is damaged."""
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        there = None
    if not isinstance(there, dict):
        raise ValueError(f"{path} is damaged; move it away, or give another --out")
    return there


def made(path, recipe):
    """Was the part that `path` describes made, and by this very recipe? False: not yet.

    Raises ValueError where it was made by another one: nothing that is there is replaced.
    """
    there, recipe = read_json(path), json.loads(json.dumps(recipe))
    if there is None:
        return False
    other = [name.replace("_", "-") for name in recipe if there.get(name) != recipe[name]]
    if other:
        chosen = there.get("chosen")
        numbers = [i + 1 for i in chosen[:20] if type(i) is int] if isinstance(chosen, list) else []
        who = f" ({there.get('feedback')} chose {', '.join(map(str, numbers))})" if numbers else ""
        raise ValueError(f"{path.parent} was made with another {', '.join(other)}{who}; "
                         f"give another --out, or move {path.parent} away")
    return True


# ---------------------------------------------------------------------------------------------
# The rounds

# 30 prompts with the structure of Table S2 (animals, faces, fruit, buildings), in known words
POOL_PROMPTS = """a dog; a cat; a fox; an owl; a horse; a fish; a turtle; a butterfly; a duck;
    a rabbit; a dog face; a cat face; a tiger face; a panda; a red apple; a banana; a pear;
    cherries; a strawberry; a mushroom; a church; a castle; a house; a hut; a tent; a sailboat;
    an automobile; a rocket; a guitar; a teapot"""
POOL_PROMPTS = [prompt.strip() for prompt in POOL_PROMPTS.split(";")]
ROUND = dict(steps=100, lr=1e-3, d_prj=8)                    # of the adapters after the first
MOST_POOL = 5000                        # pictures: Pillow opens no larger pool.png


def finished(out, rounds):
    """Are all parts of this many rounds there? config.json is written last."""
    parts = ["rounds.png", "scores.json"] * (rounds > 1)
    for n in range(2, rounds + 1):
        parts += [f"round{n}/adapter.json", f"round{n}/adapter.pt"]
    return (read_json(out / "config.json").get("round", 1) == rounds
            and all((out / part).exists() for part in parts))


def wishes(args, prompts):
    """What a command says of the pool, the choice and the adapter of a later round: three dicts."""
    pool = dict(prompts=prompts, pool=args.pool, seed=args.seed)
    choice = dict(pool, feedback=args.feedback, style_words=args.style_words)
    adapter = dict(steps=args.round_steps, lr=args.round_lr, d_prj=args.round_d_prj)
    return pool, choice, dict(choice, **adapter)


def read_choice(path, recipe, count):
    """The indices in choice.json; None where there is none. Raises ValueError: see `made`."""
    if not made(path, recipe):
        return None
    chosen = human_feedback.check_choice(read_json(path).get("chosen"), count, path)
    if not chosen:
        raise ValueError(f"{path} holds no choice; move it away to choose anew")
    return chosen


def check_rounds(args, out, prompts):
    """Raise ValueError where the rounds that are there came of other wishes: no choice is lost.

    And for what would be found late: a wrong --pick, a port in use, a pool too large.
    """
    if (out / f"round{args.rounds + 1}").exists():
        raise ValueError(f"{out} holds more rounds of feedback; give --rounds to go on with them, "
                         "or another --out")
    count = len(prompts) * args.pool
    if count > MOST_POOL:
        raise ValueError(f"{len(prompts)} prompts with --pool {args.pool} are {count:,} pictures; "
                         f"ask for {MOST_POOL:,} at most")
    picks = None if args.pick is None else human_feedback.parse_picks(args.pick, count)
    for_pool, for_choice, for_adapter = wishes(args, prompts)
    for turn in range(2, args.rounds + 1):
        here, picked = out / f"round{turn}", picks is not None and turn == args.rounds
        choice = read_choice(here / "choice.json",
                             dict(for_choice, chosen=picks) if picked else for_choice, count)
        made(here / "pool.json", for_pool)
        made(here / "adapter.json", for_adapter)
        clicks = read_json(here / "picking.json") or {}
        if choice is None and clicks.get("chosen") and args.feedback != "human":
            raise ValueError(f"{here / 'picking.json'} is a person's choice, not ended yet; "
                             "give --feedback human, or another --out")
        if choice is None and args.feedback == "human" and not picked:
            human_feedback.check_port(args.port)


def further_rounds(args, out, pipe, references, settings, prompts, teach):
    """Sample a pool, choose, train a NEW larger adapter on the choice; each part is made once.

    roundN/ holds pool.png (a row for each prompt), choice.json, adapter.pt and log.jsonl.
    teach: train.teach.
    """
    style = settings["style"]
    for prompt in prompts:
        check_prompt(pipe, prompt, style)
    if not (out / "round1" / "adapter.pt").exists():
        load_adapter(out).save(out / "round1" / "adapter.pt")
    adapters = [load_adapter(out / "round1")]
    for turn in range(2, args.rounds + 1):
        here, came = out / f"round{turn}", dict(adapter=fingerprint(adapters[-1].state_dict()))
        for_pool, for_choice, for_adapter = (dict(came, **wish) for wish in wishes(args, prompts))
        pool = draw_pool(pipe, here, adapters[-1], for_pool)
        pick = args.pick if turn == args.rounds else None    # earlier rounds have been chosen
        chosen = choose(args, here, pipe, pool, references, for_choice, pick)
        recipe = dict(for_adapter, chosen=chosen)
        if not (made(here / "adapter.json", recipe) and (here / "adapter.pt").exists()):
            say(f"round {turn}: {len(chosen)} chosen pictures teach a new adapter")
            tuning = dict(steps=args.round_steps, lr=args.round_lr, batch=args.batch,
                          d_prj=args.round_d_prj, is_shared=False, mask_power=args.mask_power,
                          superres=args.superres)
            adapter, log = teach(pipe, pool.images[chosen], [pool.contents[i] for i in chosen],
                                 style, args.seed, tuning)
            write_log(here / "log.jsonl", log)
            adapter.save(here / "adapter.pt")
            write_json(here / "adapter.json", recipe)
        adapters.append(load_adapter(here))
    compare_rounds(args, out, pipe, references, settings, prompts, adapters)
    adapters[-1].save(out / "adapter.pt")
    write_json(out / "config.json", dict(settings, round=args.rounds))           # whose it is


def read_prompts(path):
    """One content phrase a line; POOL_PROMPTS without a file."""
    if path is None:
        return POOL_PROMPTS
    prompts = [line.strip() for line in data.read_words(Path(path)).splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return prompts


def draw_pool(pipe, here, adapter, recipe):
    """The pool of a round, from pool.png if it is there; pool.json says that it is whole."""
    prompts, count = recipe["prompts"], recipe["pool"]
    if not (made(here / "pool.json", recipe) and (here / "pool.png").exists()):
        began = time.time()
        show = lambda done: say(f"pool {done}/{len(prompts) * count}  "
                                f"{done / (time.time() - began):.1f} pictures/s")
        pool = sample_pool(pipe, prompts, count, adapter, recipe["seed"] + 1, on_batch=show)
        sheet = grid(to_uint8(pool.images), count, gap=0)
        write_whole(here / "pool.png", lambda file: sheet.save(file, "PNG"))
        write_json(here / "pool.json", recipe)
    sheet = np.asarray(Image.open(here / "pool.png"))
    size = sheet.shape[1] // count
    if sheet.shape != (len(prompts) * size, count * size, 3):
        raise ValueError(f"{here / 'pool.png'} is not the pool that was drawn; move {here} away")
    tiles = sheet.reshape(len(prompts), size, count, size, 3).swapaxes(1, 2)
    return Pool(to_tensor(tiles.reshape(-1, size, size, 3)), prompts, adapter.about["style"])


def choose(args, here, pipe, pool, references, recipe, pick):
    """The numbers of the chosen pictures; kept in choice.json. A person may stop and come back."""
    saved, images = here / "choice.json", to_uint8(pool.images)
    chosen = read_choice(saved, recipe, len(images))
    if chosen is not None:
        return chosen
    if args.feedback == "human" and pick is not None:
        chosen = human_feedback.parse_picks(pick, len(images))
    elif args.feedback == "human":
        for i, sheet in enumerate(human_feedback.contact_sheets(images, pool.contents)):
            write_whole(here / f"sheet{i + 1}.png", lambda file: sheet.save(file, "PNG"))
        say(f"choose the best pictures: in the browser at the address below, or look at "
            f"{here}/sheet*.png and run this command again with --pick 3,17,20")
        chosen = human_feedback.pick(images, pool.contents, to_uint8(references),
                                     here / "picking.json", port=args.port, announce=say)
    elif args.feedback == "clip":
        chosen = choose_by_clip(pipe, pool, None, args.style_words)
    else:
        chosen = FEEDBACK[args.feedback](pipe, pool, torch.Generator().manual_seed(args.seed))
    write_whole(here / "chosen.png", lambda file: grid(images[chosen], 10, 2).save(file, "PNG"))
    write_json(saved, dict(recipe, chosen=chosen))
    return chosen


def compare_rounds(args, out, pipe, references, settings, prompts, adapters):
    """rounds.png, scores.json: base and rounds, the same prompts and seed, the three scores."""
    style, size, edge = settings["style"], 128, 8
    shown = prompts[:8]
    width, height = (2 + len(shown)) * (size + edge), (1 + len(adapters)) * (size + edge)
    sheet = Image.new("RGB", (width, 16 + height), "white")
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
        say(f"{name}: " + "  ".join(f"{k} {v:.3f}" for k, v in scores[name].items()))
    write_whole(out / "rounds.png", lambda file: sheet.save(file, "PNG"))
    scorer = (f"{Path(args.weights).name}/clip.pt, one picture of each of {len(prompts)} prompts, "
              "those of the pool; texts without the style phrase")
    write_json(out / "scores.json", dict(scores, scorer=scorer))
