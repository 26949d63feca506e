"""Rounds of feedback (Sections 3.3 and 4.4.3): sample a pool, choose, train a new adapter.

The run folder keeps every part beside the recipe that made it. The same command goes on after the
last part; a command that wants another recipe is refused, so nobody's choice is ever replaced.
"""

import contextlib
import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import clip_feedback
import data
import human_feedback
from commandline import say
from data.english import note_unknown
from data.pictures import grid
from styledrop import (clear_leftovers, fingerprint, partial_prefix, load_adapter, style_prompt,
                       to_tensor, to_uint8, write_whole)


# ---------------------------------------------------------------------------------------------
# The pool, and who chooses from it

@dataclass
class Pool:
    """Images sampled for a choice: K in a row for each of P prompts."""
    images: torch.Tensor        # (P K, 3, H, W) in [-1, 1]
    prompts: list               # P content phrases
    style: str                  # the style phrase that all of them were drawn with

    @property
    def contents(self):
        """P K content phrases, one for each image."""
        return [p for p in self.prompts for _ in range(len(self.images) // len(self.prompts))]


def sample_pool(pipe, prompts, count, style=None, seed=0, on_batch=None, **sampling):
    """`count` images for each prompt in the style of an adapter (None: of the base) -> Pool.

    The other arguments are those of `StyleDrop.generate`.
    """
    wanted = [prompt for prompt in prompts for _ in range(count)]
    images = pipe.generate(wanted, style, seed=seed, on_batch=on_batch, **sampling).cpu()
    return Pool(images, list(prompts), style.about.get("style", "") if style is not None else "")


def choose_by_clip(pipe, pool, generator=None):
    """CLIP feedback: of each prompt's images the one nearest to its text -> P sorted indices.

    The paper does not say whether that text names the style; here it does not.
    """
    scores = clip_feedback.text_score(pipe.clip, pool.images, pool.contents)
    scores = scores.view(len(pool.prompts), -1)
    return flat(clip_feedback.select_best(scores), scores.shape[1])


def choose_at_random(pipe, pool, generator):
    """The paper's control: one image of each prompt, whichever -> P sorted indices."""
    count = len(pool.images) // len(pool.prompts)
    picks = torch.rand(len(pool.prompts), count, generator=generator).argsort(1)[:, :1]
    return flat(picks, count)


def flat(columns, count):
    """Indices (P, k) within each prompt's `count` images -> sorted indices within the pool."""
    return sorted((columns.cpu() + count * torch.arange(len(columns))[:, None]).flatten().tolist())


FEEDBACK = {"clip": choose_by_clip, "random": choose_at_random}      # and a person, on the page


def measure(pipe, images, contents, references, reference_contents):
    """What the paper reports, and what it warns of -> {"text", "style", "leakage"}: tensors (B,).

    text: cosine of image and content phrase; style: cosine of image and reference; leakage: 1 where
    CLIP sees the reference's content in an image of something else, nan where it was asked for.
    """
    text = clip_feedback.text_score(pipe.clip, images, contents)
    rivals = [clip_feedback.text_score(pipe.clip, images, c) for c in reference_contents]
    same = torch.tensor([c in reference_contents for c in contents], device=text.device)
    leakage = (torch.stack(rivals).amax(0) > text).float().masked_fill(same, math.nan)
    style = clip_feedback.style_score(pipe.clip, images, references)
    return dict(text=text, style=style, leakage=leakage)


# ---------------------------------------------------------------------------------------------
# The run folder

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
    except (ValueError, RecursionError, OSError):
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
        who, chosen = there.get("feedback"), there.get("chosen")
        who = who if who in ("human", "clip", "random") else "somebody"
        numbers = [i + 1 for i in chosen[:20] if type(i) is int and 0 <= i < MOST_POOL
                   ] if isinstance(chosen, list) else []
        who = f" ({who} chose {', '.join(map(str, numbers))})" if numbers else ""
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
ROUND = dict(steps=100, lr=1e-3, d_prj=8, is_shared=False)   # later rounds [1000, 3e-5, 32, False]
MOST_POOL = 5000                        # pictures: Pillow opens no larger pool.png


def finished(out, rounds):
    """Are all parts of this many rounds there, the adapter unhurt? config.json is written last.

    Raises ValueError where it is damaged.
    """
    try:
        load_adapter(out)
    except ValueError as error:
        raise ValueError(f"{error}; move {out} away, or give another --out") from None
    parts = ["rounds.png", "scores.json"] * (rounds > 1)
    for n in range(2, rounds + 1):
        parts += [f"round{n}/adapter.json", f"round{n}/adapter.pt"]
    return ((read_json(out / "config.json") or {}).get("round", 1) == rounds
            and all((out / part).exists() for part in parts))


def recipes(args, prompts):
    """What a command says of the pool, the choice and the adapter of a later round: three dicts."""
    pool = dict(prompts=prompts, pool=args.pool, seed=args.seed)
    choice = dict(pool, feedback=args.feedback)
    return pool, choice, dict(choice, **ROUND)


def read_choice(path, recipe, count):
    """The indices in choice.json; None where there is none. Raises ValueError: see `made`."""
    if not made(path, recipe):
        return None
    chosen = human_feedback.check_choice(read_json(path).get("chosen"), count, path)
    if not chosen:
        raise ValueError(f"{path} holds no choice; move it away to choose anew")
    return chosen


def check_rounds(args, out, prompts):
    """Raise ValueError where the rounds there were made by other recipes: no choice is lost.

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
    for_pool, for_choice, for_adapter = recipes(args, prompts)
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


@contextlib.contextmanager
def alone(out):
    """No other command works on the run folder meanwhile. ValueError where one does already."""
    clear_leftovers(out)
    mine = out / f"{partial_prefix()}lock"
    mine.unlink(missing_ok=True)                             # of a dead process of our number
    for lock in out.glob(f".partial-{platform.node()}-*-lock"):
        raise ValueError(f"another command works on {out}; wait for it, end it, or, if there is "
                         f"none, remove {lock}")
    mine.touch()
    try:
        yield
    finally:
        mine.unlink(missing_ok=True)


def further_rounds(args, out, pipe, references, settings, prompts, teach):
    """Sample a pool, choose, train a NEW larger adapter on the choice; each part is made once.

    roundN/ holds pool.png (a row for each prompt), choice.json, adapter.pt and log.jsonl.
    teach: train.teach.
    """
    style = settings["style"]
    note_unknown(pipe, *(style_prompt(prompt, style) for prompt in prompts))
    if not (out / "round1" / "adapter.pt").exists():
        (out / "round1").mkdir(exist_ok=True)
        load_adapter(out).save(out / "round1" / "adapter.pt")
    adapters = [load_adapter(out / "round1")]
    for turn in range(2, args.rounds + 1):
        here, came = out / f"round{turn}", dict(adapter=fingerprint(adapters[-1].state_dict()))
        for_pool, for_choice, for_adapter = (dict(came, **recipe)
                                             for recipe in recipes(args, prompts))
        pool = draw_pool(pipe, here, adapters[-1], for_pool)
        pick = args.pick if turn == args.rounds else None    # earlier rounds have been chosen
        chosen = choose(args, here, pipe, pool, references, for_choice, pick)
        recipe = dict(for_adapter, chosen=chosen)
        if not (made(here / "adapter.json", recipe) and (here / "adapter.pt").exists()):
            say(f"round {turn}: {len(chosen)} chosen pictures teach a new adapter")
            tuning = dict(ROUND, batch=args.batch, superres=args.superres)
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
    try:
        sheet = np.asarray(Image.open(here / "pool.png"))
    except Exception:                                        # Pillow has many
        sheet = np.zeros((0, 0, 0))
    size = sheet.shape[1] // count
    if not size or sheet.shape != (len(prompts) * size, count * size, 3):
        raise ValueError(f"{here / 'pool.png'} is not the pool that was drawn; move {here} away")
    tiles = sheet.reshape(len(prompts), size, count, size, 3).swapaxes(1, 2)
    return Pool(to_tensor(tiles.reshape(-1, size, size, 3)), prompts, adapter.about["style"])


def choose(args, here, pipe, pool, references, recipe, pick):
    """The indices of the chosen images, kept in choice.json. A person may stop and come back."""
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
    else:
        chosen = FEEDBACK[args.feedback](pipe, pool, torch.Generator().manual_seed(args.seed))
    write_whole(here / "chosen.png", lambda file: grid(images[chosen], 10, 2).save(file, "PNG"))
    made(saved, dict(recipe, chosen=chosen))                 # nobody else chose meanwhile
    write_json(saved, dict(recipe, chosen=chosen))
    return chosen


def compare_rounds(args, out, pipe, references, settings, prompts, adapters):
    """rounds.png, scores.json: base and rounds, the same prompts and seed, the three scores."""
    style, shown, scores = settings["style"], min(len(prompts), 8), {}
    reference = to_uint8(references)[:1]
    rows, left = [], []
    for turn, adapter in enumerate([None, *adapters]):
        name = "base" if adapter is None else f"round {turn}"
        texts = prompts if adapter else [style_prompt(prompt, style) for prompt in prompts]
        pool = sample_pool(pipe, texts, 1, adapter, args.seed)
        values = measure(pipe, pool.images, prompts, references, settings["content"])
        scores[name] = {k: round(v.nanmean().item(), 4) for k, v in values.items()}
        left.append(" ".join([f"{name:14}", *(f"{k} {v:.3f}" for k, v in scores[name].items())]))
        rows += [reference if turn == 0 else np.full_like(reference, 255),
                 to_uint8(pool.images[:shown])]
        say(" ".join(left[-1].split()))
    top = ["reference", *prompts[:shown]]
    sheet = grid(np.concatenate(rows), len(top), 128 // reference.shape[1], 8, top, left)
    write_whole(out / "rounds.png", lambda file: sheet.save(file, "PNG"))
    scorer = (f"{Path(args.weights).name}/clip.pt, one image of each of {len(prompts)} prompts, "
              "those of the pool; texts without the style phrase")
    write_json(out / "scores.json", dict(scores, scorer=scorer))
