"""Draws and measures what the claims need, and keeps it: the same command again goes on.

    python experiments/claims/run.py --jobs 2               # the short run: 10 styles, hours
    python experiments/claims/run.py --jobs 2 --references 2    # two drawings of each style
    python experiments/claims/run.py --part 0/3             # a third; other machines take 1/3, 2/3
    python experiments/claims/report.py                     # the table, from whatever is there

An arm is a way to draw a style's things. Its numbers, one a picture, are kept in
runs/claims/SETTINGS/STYLE/ARM.json, its pictures beside it. All of the first stage alone, at 64
pixels: no claim but 24 is about the second. First come the three styles that lambda_A is chosen on
(`--part` needs them to be there already: run `--groups curve --styles 0` first).
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import clip_feedback  # noqa: E402
import data  # noqa: E402
from commandline import Parser, number, run_command  # noqa: E402
from data import styles  # noqa: E402
from experiments.claims import fine, identity  # noqa: E402
from experiments.claims.setting import (CHOOSING, HANDS, at_side, distances,  # noqa: E402
                                        diversity, drawing, drawings, measure, pool_names,
                                        subjects, tokens_of)
from experiments.common import among, numbers_of, write_text  # noqa: E402
from experiments.quality import load_classifier, look  # noqa: E402
from human_feedback.rounds import ROUND  # noqa: E402
from pretrain.common import machine  # noqa: E402
from styledrop import (RARE_TOKEN, StyleDrop, fingerprint, load_adapter,  # noqa: E402
                       style_prompt, to_tensor, to_uint8, write_whole)

LAMBDAS = (0, 0.5, 1, 2, 3)
PER = 4                                 # pictures of each prompt of a pool
METHODS = {                             # other ways to tune, each at the rate that suits it
    "LoRA": dict(method="lora", lr=1e-3), "full tuning": dict(method="full", lr=1e-4),
    "inversion": dict(method="textual-inversion", lr=1e-2, phrase=RARE_TOKEN)}   # learns a word
TUNINGS = {                             # adapters taught by a drawing: how they differ from R1
    "R1": dict(), "rare token": dict(phrase=RARE_TOKEN), "style alone": dict(content=""),
    "content alone": dict(phrase=""), "four references": dict(references=4),
    "H 1": dict(d_prj=1), "H 32": dict(d_prj=32), "H 32, own": dict(d_prj=32, is_shared=False),
    "thrice the rate": dict(lr=3e-3), "a third of the rate": dict(lr=3e-4),
    "a third of the rate, thrice the steps": dict(lr=3e-4, steps=150)}
TUNINGS |= METHODS
CHOICES = {                             # adapters taught by R1's pictures: who chose, and how many
    "R2 by CLIP": ("clip", 0), "R2 by chance": ("chance", 0), "R2 by oracle": ("oracle", 0),
    "R2 by oracle, 1": ("oracle", 1), "R2 by oracle, 3": ("oracle", 3),
    "R2 by oracle, 30": ("oracle", 30), "R2 by one who likes it dark": ("dark", 0),
    "R2 by CLIP, shared": ("clip", 0)}


def write_json(path, value):
    write_text(path, json.dumps(value) + "\n")


# ---------------------------------------------------------------------------------------------
# One style with one reference

class Unit:
    """Its adapters, pool and arms; each is made when it is first needed, and kept.

    lambda_a: R1's strength as chosen on other styles; None while that is not known.
    """

    def __init__(self, pipe, net, art, subject, folder, lambda_a=None, steps=None):
        self.pipe, self.net, self.art, self.subject = pipe, net, art, subject
        self.folder, self.lambda_a = folder / subject.key, lambda_a
        self.tuning = {} if steps is None else dict(steps=steps)                 # of tests
        self.truth = drawings(art, subject.things, subject.style)
        self.reference = drawings(art, subject.references[:1], subject.style)

    def kept(self, name, make):
        """An adapter from its file, or made and filed."""
        file = self.folder / f"{name}.adapter"
        if not file.exists():
            make().save(file)
        return load_adapter(file)

    def adapter(self, name):
        if name in CHOICES:
            return self.kept(name, lambda: self.second_round(name))
        how = dict(TUNINGS[name])
        names = self.subject.references[:how.pop("references", 1)]
        content, phrase = how.pop("content", None), how.pop("phrase", self.subject.words)
        prompts = [data.content_phrase(n) if content is None else content for n in names]
        images = drawings(self.art, names, self.subject.style)
        return self.kept(name, lambda: self.tune(images, prompts, phrase, **how))

    def tune(self, images, prompts, phrase="", **how):
        """pipe.tune of the first stage alone; images (R, 3, H, W) of any side."""
        images = at_side(images, self.pipe.vqgan.config.resolution)
        return self.pipe.tune(images, prompts, phrase, seed=self.subject.seed, superres=False,
                              **how | self.tuning)

    def sample(self, adapter=None, names=None, per=1, seed=0, said=False, prompts=None, **sampling):
        """`per` pictures of each name, or prompt -> (B, 3, H, W).

        said: the style's words stand in the prompt itself, which Eq. 1 guides by. lambda_a: of an
        adapter the chosen one, if it is not given.
        """
        prompts = prompts or [data.content_phrase(n) for n in names or self.subject.things]
        prompts = [p for p in prompts for _ in range(per)]
        if said:
            prompts = [style_prompt(p, self.subject.words) for p in prompts]
        if adapter is not None and "lambda_a" not in sampling and self.lambda_a is not None:
            sampling["lambda_a"] = self.lambda_a
        return self.pipe.generate(prompts, adapter, seed=1000 * self.subject.seed + 100000 * seed,
                                  superres=False, **sampling).cpu()

    # -- the second round

    def pool(self):
        """R1's pictures for the pool's prompts: (P PER, 3, 64, 64), and P names."""
        names, file = pool_names(self.art), self.folder / "pool.npy"
        if not file.exists():
            images = self.sample(self.adapter("R1"), names, PER, seed=1)
            write_whole(file, lambda f: np.save(f, to_uint8(at_side(images, 64))))
        return to_tensor(np.load(file)), names

    def scores(self, who, images, names):
        """What each of a pool's pictures (P PER) is worth to somebody: (P PER,).

        The oracle stands in for a person: the thing is to be seen, then how near it is to the
        wanted drawing. Its rulers are the judges' own, so only CLIP can measure it fairly, as only
        the judges can CLIP.
        """
        every = [name for name in names for _ in range(PER)]
        if who == "chance":
            generator = torch.Generator().manual_seed(self.subject.seed)
            return torch.rand(len(every), generator=generator)
        if who == "clip":
            texts = [data.content_phrase(name) for name in every]
            return clip_feedback.text_score(self.pipe.clip, images, texts).cpu()
        if who == "dark":
            return -images.mean((1, 2, 3))
        wanted = numbers_of(every)
        seen = among(look(self.net, images)["names"], wanted) > 0.5
        truth = drawings(self.art, names, self.subject.style).repeat_interleave(PER, 0)
        return 10 * seen - distances(images, truth)["distance"]

    def second_round(self, name):
        """A new adapter, taught by the best picture of each prompt, or the `count` best of all."""
        images, names = self.pool()
        who, count = CHOICES[name]
        scores = self.scores(who, images, names)
        best = scores.view(-1, PER).argmax(1) + PER * torch.arange(len(names))
        chosen = (scores.topk(min(count, len(scores))).indices if count else best).tolist()
        write_json(self.folder / f"{name}.chosen.json", sorted(chosen))
        prompts = [data.content_phrase(names[i // PER]) for i in chosen]
        how = ROUND | dict(is_shared="shared" in name)
        return self.tune(images[chosen], prompts, self.subject.words, **how)

    # -- arms

    def draw(self, arm):
        """Draw one arm, measure it, keep both. Returns its numbers."""
        began, (group, make) = time.time(), arms(self)[arm]
        file = self.folder / f"{arm}.json"
        if file.exists():
            return json.loads(file.read_text())
        if group in ("identity", "fine"):
            module = identity if group == "identity" else fine
            numbers, images = module.measure_arm(self, make)
        else:
            images = make()
            truth = self.truth if group != "dropping" else drawings(
                self.art, self.subject.things, self.subject.shorter)
            found = measure(self.pipe, self.net, images, self.subject.things, truth,
                            self.reference, self.subject.references[0])
            numbers = {m: [round(x, 5) for x in values.tolist()] for m, values in found.items()}
            if arm.endswith("again"):
                first = self.drawn("words" if arm.startswith("words") else self.r1)
                numbers["diversity"] = diversity(tokens_of(self.pipe, first),
                                                 tokens_of(self.pipe, images)).tolist()
        write_whole(file.with_suffix(".npy"), lambda f: np.save(f, to_uint8(at_side(images, 64))))
        numbers["seconds"] = round(time.time() - began, 1)
        write_json(file, numbers)
        return numbers

    @property
    def r1(self):
        """The arm of the curve that has the chosen lambda_A."""
        return f"R1 at {self.lambda_a:g}"

    def drawn(self, arm):
        """An arm's pictures, drawn before, or now where `restore` has its numbers alone."""
        if not (self.folder / f"{arm}.npy").exists():
            (self.folder / f"{arm}.json").unlink(missing_ok=True)
            self.draw(arm)
        return to_tensor(np.load(self.folder / f"{arm}.npy"))                    # (B, 3, 64, 64)


def arms(u):
    """{arm: (group, function that draws its pictures)} of a unit, in the order of `GROUPS`.

    The arms of "dropping" are held against drawings without the style's ground; those that end in
    "again" are other draws, for the diversity of one prompt's pictures.
    """
    of = lambda name, **more: lambda: u.sample(u.adapter(name), **more)
    found = {"words": ("curve", lambda: u.sample(said=True)),
             "words, guided": ("curve", lambda: u.sample(style_phrase=u.subject.words)),
             "no style": ("curve", u.sample),
             "one step": ("curve", lambda: u.sample(said=True, steps=1)),
             "class mean": ("curve", lambda: class_means(u.art, u.subject.things))}
    found |= {f"R1 at {a:g}": ("curve", of("R1", lambda_a=a)) for a in LAMBDAS}
    put = lambda group, **more: found.update({arm: (group, make) for arm, make in more.items()})
    put("leakage", **{"words, again": lambda: u.sample(said=True, seed=2),
                      "R1, again": of("R1", seed=2)})
    put("token", **{"rare token": of("rare token")})
    put("forms", **{"style alone": of("style alone"), "content alone": of("content alone")})
    if u.subject.shorter:
        put("dropping", **{
            "R1, in full": lambda: u.drawn(u.r1), "no style, as it is": lambda: u.drawn("no style"),
            "R1, dropped": of("R1", style_phrase=styles.phrase(u.subject.shorter))})
    put("capacity", **{name: of(name) for name in ("H 1", "H 32", "H 32, own")})
    put("rates", **{name: of(name) for name in TUNINGS if "rate" in name})
    put("references", **{"four references": of("four references")})
    put("rounds", **{name: of(name) for name in ("R2 by CLIP", "R2 by chance", "R2 by oracle")})
    put("picks", **{f"R2 by oracle, {n}": of(f"R2 by oracle, {n}") for n in (1, 3, 30)})
    put("methods", **{name: of(name) for name in METHODS})
    put("identity", **identity.arms(u))
    put("sharing", **{"R2 by CLIP, shared": of("R2 by CLIP, shared")})
    put("drift", **{"R2 by one who likes it dark": of("R2 by one who likes it dark")})
    put("lambda_b", **{f"R1, lambda_B {b:g}": of("R1", lambda_b=float(b)) for b in (0, 3, 8)})
    put("strength", **{f"R2 by CLIP at {a:g}": of("R2 by CLIP", lambda_a=a) if a != u.lambda_a else
                       lambda: u.drawn("R2 by CLIP") for a in (0, 3)})
    put("fine", **fine.arms(u))
    return found


GROUPS = ("curve", "leakage", "token", "forms", "dropping", "capacity", "rates", "references",
          "rounds", "picks", "methods", "identity", "sharing", "drift", "lambda_b", "strength",
          "fine")
SAID = ("text", "style", "named", "distance", "identity", "both", "own")         # in the log
CHOOSES = ("curve", "identity")         # what the first styles are drawn for


def class_means(art, names):
    """A control that no model is needed for: the mean of a name's drawings, (B, 3, 64, 64)."""
    of = lambda name: [drawing(art, name, styles.Style(), hand) for hand in HANDS]
    return torch.stack([to_tensor(np.stack(of(name))).mean(0) for name in names])


# ---------------------------------------------------------------------------------------------
# Settings

def mean_of(folder, subject, arm, ruler):
    return float(np.mean(json.loads((folder / subject.key / f"{arm}.json").read_text())[ruler]))


def choose_lambda(folder, chosen_on):
    """lambda_A of R1: most names for the least distance to the wanted drawings, as quality.py
    chooses; alone, each has a trivial winner. None while a part of the curve is missing."""
    try:
        at = lambda arm, ruler: np.mean([mean_of(folder, s, arm, ruler) for s in chosen_on])
        worth = lambda a: at(f"R1 at {a:g}", "named") / at(f"R1 at {a:g}", "distance")
        return float(max(LAMBDAS, key=worth))
    except FileNotFoundError:
        return None


def settings_of(args, pipe, net):
    """What the numbers depend on: they are kept in a folder of its name."""
    return dict(things=args.things, seed=args.seed, steps=args.steps, base=pipe.base,
                clip=fingerprint(pipe.clip.state_dict()), classifier=fingerprint(net.state_dict()))


def work_folder(args, settings):
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return Path(args.work) / f"{settings['base']}-{name}"


def restore(file, settings, folder):
    """The numbers of a claims.json go to the folder, where no arm of that name is yet."""
    written = json.loads(Path(file).read_text())
    if {name: written.get(name) for name in settings} != settings:
        raise ValueError(f"{file} is of other settings, or of another base")
    for key, arms in written["arms"].items():
        for arm, numbers in arms.items():
            if not (folder / key / f"{arm}.json").exists():
                write_json(folder / key / f"{arm}.json", numbers)


def options(parser):
    """What run.py and report.py share."""
    add = parser.add_argument
    add("--weights", default=str(ROOT / "weights" / "tiny"))
    add("--classifier", default=str(ROOT / "experiments" / "quality.pt"))
    add("--work", default="runs/claims", help="folder of what is kept")
    add("--styles", type=number(int, 0), default=10, help=f"reported; {CHOOSING} more to choose on")
    add("--things", type=number(int, 2), default=8, help="of each style, each once in an arm")
    add("--references", type=number(int, 1), default=1,
        help="of each style, each with an R1, things and a seed of its own")
    add("--seed", type=number(int, 0), default=0, help="of the styles")
    add("--steps", type=number(int, 1), help="of tuning (default: the pipeline's; for tests)")
    return parser


def everything(args):
    """-> pipe, classifier, art, subjects, settings, the folder."""
    pipe, (net, _) = StyleDrop.load(args.weights), load_classifier(args.classifier)
    net = net.to(pipe.device)
    art = data.Art()
    some = subjects(art, args.styles, args.things, args.references, args.seed)
    settings = settings_of(args, pipe, net)
    return pipe, net, art, some, settings, work_folder(args, settings)


def tasks(some, groups):
    """[(subject, group)]: the curve of the styles to choose on first, then group by group."""
    first = [(s, "curve") for s in some if not s.reported and "curve" in groups]
    rest = [(s, g) for g in groups for s in some if s.reported or g in CHOOSES]
    return first + [task for task in rest if task not in first]


def check_groups(text):
    """"curve,rounds" -> a list. Raises ValueError for what is none."""
    wrong = [group for group in text.split(",") if group not in GROUPS]
    if wrong:
        raise ValueError(f"no group {', '.join(wrong)}; there are {', '.join(GROUPS)}")
    return text.split(",")


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = options(Parser(description=__doc__, formatter_class=plain))
    add = parser.add_argument
    add("--groups", default=",".join(GROUPS), help="of arms, in the order to draw them in")
    add("--jobs", type=number(int, 1), default=1, help="processes of one thread each")
    add("--part", default="0/1", help="i/n: every n-th style, from i on")
    add("--restore", help="a claims.json of the same settings: its arms are not drawn again")
    args = parser.parse_args()
    groups = check_groups(args.groups)
    if args.jobs > 1:
        own = [a for i, a in enumerate(sys.argv[1:]) if a != "--jobs" and sys.argv[i] != "--jobs"]
        start = lambda *more: subprocess.Popen([sys.executable, __file__, *own, *more])
        if start("--groups", "curve", "--styles", "0").wait():                   # what all need
            sys.exit(1)
        parts = [start("--part", f"{i}/{args.jobs}") for i in range(args.jobs)]
        sys.exit(max(part.wait() for part in parts))

    torch.set_num_threads(1)
    pipe, net, art, some, settings, folder = everything(args)
    write_json(folder / "settings.json", settings)
    if args.restore:
        restore(args.restore, settings, folder)
    print(f"python {' '.join(sys.argv)}\n{machine()}, {folder}", flush=True)
    index, count = map(int, args.part.split("/"))
    for subject, group in tasks(some, groups):
        if subject.index % count != index:
            continue
        lambda_a = choose_lambda(folder, [s for s in some if not s.reported])
        if group not in CHOOSES and lambda_a is None:
            raise ValueError("lambda_A is not chosen yet: run with --groups curve --styles 0 first")
        unit = Unit(pipe, net, art, subject, folder, lambda_a, args.steps)
        for arm, (of, _) in arms(unit).items():
            if of == group and not (unit.folder / f"{arm}.json").exists():
                numbers = unit.draw(arm)
                said = "  ".join(f"{m} {np.mean(numbers[m]):.3f}" for m in SAID if m in numbers)
                print(f"{time.strftime('%H:%M:%S')} {subject.index} {subject.words}: {arm}  "
                      f"{said}  {numbers['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    run_command(main)
