"""Rounds of feedback (Sections 3.3 and 4.4.3): sample a pool, choose, train a new adapter.

The run folder keeps every part together with the recipe that made it (checkpoint/runs.py), so a
stopped command resumes after its last finished part, and no choice is ever replaced.
"""

import contextlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import clip_feedback
from checkpoint.adapters import load_adapter
from checkpoint.files import read_json, write_json, write_log, write_png
from checkpoint.runs import check_recipe, was_made
from checkpoint.weights import fingerprint
from commandline.notes import note_unknown
from commandline.options import LONGEST
from commandline.terminal import Progress, SamplingProgress, say
from commandline.tuning import TuningProgress, describe
from data.folder import read_text
from data.pictures import grid
from styledrop import ROUND_2, style_prompt, to_tensor, to_uint8

from .choice import check_choice, contact_sheets, hash_of, parse_picks
from .page import ChoicePage, check_port

# 30 prompts with the structure of Table S2 (animals, faces, fruit, buildings), in known words
POOL_PROMPTS = ["a dog", "a cat", "a fox", "an owl", "a horse", "a fish", "a turtle", "a butterfly",
                "a duck", "a rabbit", "a dog face", "a cat face", "a tiger face", "a panda",
                "a red apple", "a banana", "a pear", "cherries", "a strawberry", "a mushroom",
                "a church", "a castle", "a house", "a hut", "a tent", "a sailboat",
                "an automobile", "a rocket", "a guitar", "a teapot"]
MOST_POOL = 5000                        # pictures: Pillow warns about a larger pool.png


# --------------------------------------------------------------------------------------------------
# The pool, and who chooses from it

@dataclass
class Pool:
    """Images sampled for a choice: K consecutive images for each of P prompts."""
    images: torch.Tensor        # (P K, 3, H, W) in [-1, 1]
    prompts: list               # P content phrases
    style: str                  # the style phrase that all of them were sampled with

    @property
    def contents(self):
        """The content phrase of each image."""
        count = len(self.images) // len(self.prompts)
        return [prompt for prompt in self.prompts for _ in range(count)]


def sample_pool(pipe, prompts, count, style=None, seed=0, on_batch=None, **options):
    """`count` images for each prompt in the style of an adapter (None: of the base) -> Pool.

    The other arguments are those of `StyleDrop.generate`.
    """
    repeated = [prompt for prompt in prompts for _ in range(count)]
    images = pipe.generate(repeated, style, seed=seed, on_batch=on_batch, **options).cpu()
    return Pool(images, list(prompts), "" if style is None else style.style)


def choose_by_clip(pipe, pool, generator=None):
    """CLIP feedback: for each prompt, the image with the highest text score -> P sorted indices.

    The paper does not say whether that text names the style. Here it does not.
    """
    count = len(pool.images) // len(pool.prompts)
    progress = Progress("CLIP's scores: prompt")
    scores = []
    for images, prompt in zip(pool.images.split(count), pool.prompts):
        scores.append(clip_feedback.text_score(pipe.clip, images, prompt))
        progress(len(scores), len(pool.prompts))
    best = clip_feedback.select_best(torch.stack(scores))    # of scores (P, K)
    return indices_in_pool(best, count)


def choose_at_random(pipe, pool, generator):
    """The paper's control: one image of each prompt, any -> P sorted indices."""
    count = len(pool.images) // len(pool.prompts)
    picks = torch.rand(len(pool.prompts), count, generator=generator).argsort(1)[:, :1]
    return indices_in_pool(picks, count)


def indices_in_pool(columns, count):
    """Indices (P, k) within each prompt's `count` images -> sorted indices within the pool."""
    first = count * torch.arange(len(columns))[:, None]
    return sorted((columns.cpu() + first).flatten().tolist())


FEEDBACK = {"clip": choose_by_clip, "random": choose_at_random}      # and a person, on the page


def measure(pipe, images, contents, references, reference_contents):
    """The paper's two scores and a check for content leakage -> {name: tensor (B,)}.

    text: cosine of image and content phrase; style: cosine of image and reference; leakage: 1 where
    CLIP sees the reference's content in an image of something else, NaN where the prompt asks for
    that content or where --content was not given.
    """
    text = clip_feedback.text_score(pipe.clip, images, contents)
    leakage = torch.full_like(text, math.nan)
    named = [content for content in reference_contents if content]
    if named:
        rivals = [clip_feedback.text_score(pipe.clip, images, content) for content in named]
        same = torch.tensor([content in named for content in contents], device=text.device)
        leakage = (torch.stack(rivals).amax(0) > text).float().masked_fill(same, math.nan)
    style = clip_feedback.style_score(pipe.clip, images, references)
    return dict(text=text, style=style, leakage=leakage)


# --------------------------------------------------------------------------------------------------
# Checks of options and folders, before the long work begins

def read_prompts(path):
    """One content phrase per line; POOL_PROMPTS without a file."""
    if path is None:
        return POOL_PROMPTS
    prompts = [line.strip() for line in read_text(Path(path)).splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} contains no prompts; write one per line")
    longest = max(map(len, prompts))
    if longest > LONGEST:
        raise ValueError(f"{path} contains a prompt of {longest:,} characters; give at most "
                         f"{LONGEST:,}")
    return prompts


def recipes(args, prompts):
    """The recipes of the pool, the choice and the adapter of a later round: three dicts."""
    pool = dict(prompts=prompts, pool=args.pool, seed=args.seed)
    choice = dict(pool, feedback=args.feedback)
    adapter = dict(choice, **asdict(replace(ROUND_2, batch=args.batch)))
    return pool, choice, adapter


def check_rounds(args, out, prompts):
    """Raise ValueError if later rounds in `out` were made with another recipe.

    So no person's choice is ever overwritten. Also check early for a wrong --pick, a port in use,
    and a pool that is too large.
    """
    if (out / f"round{args.rounds + 1}").exists():
        raise ValueError(f"{out} already has a round {args.rounds + 1}; give a higher --rounds to "
                         "resume it, or another --out")
    if (out / "round2" / "adapter.pt").exists() and not (out / "round1" / "adapter.pt").exists():
        raise ValueError(f"{out / 'round1' / 'adapter.pt'} is missing, so these rounds cannot be "
                         "resumed; give another --out")
    count = len(prompts) * args.pool
    if count > MOST_POOL:
        raise ValueError(f"{len(prompts)} prompts with --pool {args.pool} are {count:,} pictures; "
                         f"ask for {MOST_POOL:,} at most")
    picks = None
    if args.pick is not None:
        picks = parse_picks(args.pick, count)
    for_pool, for_choice, for_adapter = recipes(args, prompts)
    for turn in range(2, args.rounds + 1):
        here = out / f"round{turn}"
        has_picks = picks is not None and turn == args.rounds
        recipe = dict(for_choice, chosen=picks) if has_picks else for_choice
        choice = read_choice(here / "choice.json", recipe, count)
        check_recipe(here / "pool.json", for_pool)
        check_recipe(here / "adapter.json", for_adapter)
        if choice is not None:
            continue
        clicks = read_json(here / "picking.json") or {}
        if clicks.get("chosen") and args.feedback != "human":
            raise ValueError(f"{here / 'picking.json'} is a person's unfinished choice; "
                             "give --feedback human, or another --out")
        if args.feedback == "human" and not has_picks:
            check_port(args.port)


def read_choice(path, recipe, count):
    """The indices in choice.json, or None where there is none.

    Raises ValueError if the file is damaged, or was made by another recipe.
    """
    if not was_made(path, recipe):
        return None
    try:
        chosen = check_choice(read_json(path).get("chosen"), count, f'"chosen" in {path}')
    except ValueError as error:
        raise ValueError(f"{error}; move it away to choose anew") from None
    if not chosen:
        raise ValueError(f"{path} contains no choice; move it away to choose anew")
    return chosen


# --------------------------------------------------------------------------------------------------
# The rounds

def further_rounds(args, out, pipe, references, config, prompts):
    """Sample a pool, choose, train a NEW adapter on the choice; each part is made once.

    roundN/ contains pool.png (a row for each prompt), choice.json, adapter.pt and log.jsonl.
    """
    style = config["style"]
    note_unknown(pipe, *(style_prompt(prompt, style) for prompt in prompts))
    first = out / "round1" / "adapter.pt"
    if not first.exists():
        first.parent.mkdir(exist_ok=True)
        load_adapter(out).save(first)
    adapters = [load_adapter(first)]
    with contextlib.ExitStack() as pages:                    # a page stays until the next choice
        for turn in range(2, args.rounds + 1):
            here = out / f"round{turn}"
            made_by = dict(adapter=fingerprint(adapters[-1].state_dict()))
            for_pool, for_choice, for_adapter = (dict(made_by, **recipe)
                                                 for recipe in recipes(args, prompts))
            pool = pool_of(args, here, pipe, adapters[-1], for_pool)
            pick = args.pick if turn == args.rounds else None        # only for the last round
            chosen = choose(args, here, pipe, pool, references, for_choice, pick, pages)
            adapters.append(adapter_of(args, here, pipe, pool, chosen, style, for_adapter, turn))
        compare_rounds(args, out, pipe, references, config, prompts, adapters)
    adapters[-1].save(out / "adapter.pt")
    # written last: it says which round adapter.pt belongs to
    write_json(out / "config.json", dict(config, round=args.rounds))


def pool_of(args, here, pipe, adapter, recipe):
    """The pool of a round, from pool.png if it is there; pool.json says that it is complete."""
    prompts = recipe["prompts"]
    count = recipe["pool"]
    if not (was_made(here / "pool.json", recipe) and (here / "pool.png").exists()):
        progress = SamplingProgress("pool: picture", len(prompts) * count)
        pool = sample_pool(pipe, prompts, count, adapter, recipe["seed"] + 1, progress.on_batch,
                           on_step=progress.on_step, superres=args.superres)
        picture = grid(to_uint8(pool.images), count, gap=0)
        write_png(here / "pool.png", picture)
        write_json(here / "pool.json", dict(recipe, pixels=hash_of(picture)))
    try:
        sheet = np.asarray(Image.open(here / "pool.png"))
    except Exception:                                        # Pillow raises many kinds
        sheet = np.zeros((0, 0, 0))
    size = sheet.shape[1] // count
    pixels = hash_of(sheet)
    # files of earlier versions have no hash
    is_same = read_json(here / "pool.json").get("pixels", pixels) == pixels
    if not is_same or not size or sheet.shape != (len(prompts) * size, count * size, 3):
        raise ValueError(f"{here / 'pool.png'} is not the pool that was sampled; move {here} away")
    tiles = sheet.reshape(len(prompts), size, count, size, 3).swapaxes(1, 2)
    return Pool(to_tensor(tiles.reshape(-1, size, size, 3)), prompts, adapter.style)


def choose(args, here, pipe, pool, references, recipe, pick, pages):
    """The indices of the chosen images, kept in choice.json. A person may stop and come back.

    pages: an ExitStack that closes a person's page at the end.
    """
    images = to_uint8(pool.images)
    chosen = read_choice(here / "choice.json", recipe, len(images))
    if chosen is not None:
        return chosen
    if args.feedback != "human":
        generator = torch.Generator().manual_seed(args.seed)
        chosen = FEEDBACK[args.feedback](pipe, pool, generator)
    elif pick is not None:
        chosen = parse_picks(pick, len(images))
    else:
        for i, sheet in enumerate(contact_sheets(images, pool.contents)):
            write_png(here / f"sheet{i + 1}.png", sheet)
        say(f"choose the best images in the browser, at the address below; or look at "
            f"{here}/sheet*.png, stop this command and run it again with --pick 3,17,20")
        pages.close()                                        # closes an earlier round's page
        page = ChoicePage(images, pool.contents, to_uint8(references), here / "picking.json",
                          port=args.port)
        pages.callback(page.close)
        chosen = page.wait(announce=say)
    write_png(here / "chosen.png", grid(images[chosen], 10, 2))
    # raises ValueError if another command has written a different choice in the meantime
    check_recipe(here / "choice.json", dict(recipe, chosen=chosen))
    write_json(here / "choice.json", dict(recipe, chosen=chosen))
    return chosen


def adapter_of(args, here, pipe, pool, chosen, style, recipe, turn):
    """The new adapter of a round, trained on the chosen pictures unless it is there."""
    recipe = dict(recipe, chosen=chosen)
    if not (was_made(here / "adapter.json", recipe) and (here / "adapter.pt").exists()):
        say(f"round {turn}: training a new adapter on the {len(chosen)} chosen images")
        contents = [pool.contents[i] for i in chosen]
        progress = TuningProgress()
        adapter = pipe.tune(pool.images[chosen], contents, style, args.seed, args.superres,
                            replace(ROUND_2, batch=args.batch), progress)
        say(describe(pipe, adapter))
        write_log(here / "log.jsonl", progress.log)
        adapter.about["kind"] = "style"
        adapter.save(here / "adapter.pt")
        write_json(here / "adapter.json", recipe)
    return load_adapter(here)


def compare_rounds(args, out, pipe, references, config, prompts, adapters):
    """Write rounds.png and scores.json: the base and all rounds, on the same prompts and seeds.

    The base has its own default settings, BASE_SAMPLING, and the rounds have SAMPLING.
    """
    count = min(len(prompts), 8)
    side = pipe.resolution if args.superres else pipe.vqgan.config.resolution    # of the samples
    reference = to_uint8(F.interpolate(references[:1], (side, side), mode="area"))
    rows = []
    left = []
    scores = {}
    for turn, adapter in enumerate([None, *adapters]):
        name = f"round {turn}" if adapter else "base"
        progress = SamplingProgress(f"{name}: picture", len(prompts))
        pool = sample_pool(pipe, prompts, 1, adapter, args.seed, progress.on_batch,
                           on_step=progress.on_step, superres=args.superres)
        values = measure(pipe, pool.images, prompts, references, config["content"])
        scores[name] = {key: round(value.nanmean().item(), 4) for key, value in values.items()
                        if not value.isnan().all()}
        words = "  ".join(f"{key} {value:.3f}" for key, value in scores[name].items())
        say(f"{name}: {words}")
        left.append(f"{name:14} {words}")
        rows += [reference if turn == 0 else np.full_like(reference, 255),
                 to_uint8(pool.images[:count])]
    top = ["reference", *prompts[:count]]
    sheet = grid(np.concatenate(rows), len(top), max(1, 128 // side), 8, top, left)
    write_png(out / "rounds.png", sheet)
    scorer = (f"{Path(args.weights).name}/clip.pt, one image of each of {len(prompts)} prompts, "
              "those of the pool; texts without the style phrase")
    write_json(out / "scores.json", dict(scores, scorer=scorer))
