"""The 24 claims, and the tests that each stands or falls by, from what run.py has drawn."""

import copy
import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

from experiments.claims import fine, identity
from experiments.claims.intervals import CONTRARY, HOLDS, match, rank_correlation, slope
from experiments.claims.run import LAMBDAS, METHODS, choose_lambda
from styledrop import Tuning

SAME = {"text": 0.03, "style": 0.03, "distance": 0.1}        # margins, set before any run
CURVE = ("words", *(f"R1 at {a:g}" for a in LAMBDAS))       # from most text to least
ROUNDS = ("R2 by CLIP", "R2 by chance", "R2 by oracle")
AXES = {"CLIP": ("text", "style", 1), "judges": ("named", "distance", -1)}   # -1: less is better
Test = namedtuple("Test", "claim label values expect beside", defaults=(False,))
# values: one a style; expect: see judge; beside: shown, but the claim does not stand or fall by it

CLAIMS = {                              # number: (claim, where in the paper, how it is tested here)
    1: ("adapters are below 1 % of the parameters", "abstract, Table S3", "counted"),
    2: ("zero up-weights: tuning starts from the base", "B.1.1", "largest difference of logits"),
    3: ("one picture is enough: much more style than words give, text nearly kept", "Table 2",
        "R1 less style in words; text: less 0.9 of what words have"),
    4: ("round 1 leaks content, its pictures are less diverse", "3.3, 4.2.1",
        "R1 less words: leak, tokens copied, tokens that differ between two draws"),
    5: ("a second round raises text and lowers style", "Table 2", "R2 less R1 at R1's lambda_A"),
    6: ("feedback beats chance on text", "4.4.3, Table 2", "R2 less R2 by chance"),
    7: ("CLIP's choice favours text, a person's style", "Table 2, study",
        "ten pictures each; an oracle is the person"),
    8: ("a chooser's bias makes the style drift", "3.3, 4.2.1",
        "luminance: one who likes it dark, less chance"),
    9: ("lambda_A: more style, then the content is lost", "B.3.1",
        "slopes over lambda_A 0 to 3; 3 less 0"),
    10: ("lambda_B 0 falls back on the reference, a large one overrides the style", "B.3.1",
         "lambda_B 0, 1, 3, 8 at R1's lambda_A"),
    11: ("round 2 is less sensitive to lambda_A", "Figure S4",
         "how far lambda_A 0 and 3 are apart: R1's less R2's"),
    12: ("content AND style in the training prompt keep them apart", "3.2.1",
         "one of them left out, less both"),
    13: ("a rare token learns as well as a description", "4.4.1", "equal within the margin"),
    14: ("a word of the style can be dropped", "4.4.2",
         "R1 without the words for its ground, against drawings without that ground; "
         "a rare token has no words to drop"),
    15: ("a higher rate learns the content, a lower one is slower", "B.1.2",
         "thrice the rate, a third of it, and that with thrice the steps; less R1"),
    16: ("sharing across depth loses nothing in round 2", "B.1.1", "equal within the margin"),
    17: ("a small H suffices for round 1, a larger one leaks", "Table S3",
         "H 4 and 32 equal within the margin; leak of 32 less that of 1"),
    18: ("two adapters compose; gamma 0.5 to 0.7", "3.4, 4.3",
         "one marked individual of eight; gamma and the best single one chosen on other styles"),
    19: ("the style score is fooled by leakage", "4.2.1, 4.4.3",
         "rank correlation of style and copy, within R1's pictures of one strength"),
    20: ("CLIP agrees with people", "4.2.1", "no person took part; with the judges: see below"),
    21: ("more rounds catch fine differences of style", "4.4.4",
         "four variants of a style: nearest to its own, 1/4 by chance; round 3 less round 1"),
    22: ("from fewer pictures than diffusion needs", "4.4.1", "there is no diffusion model here"),
    23: ("a dozen picks suffice", "3.3", "ten and thirty equal within the margin; one less ten"),
    24: ("the second stage needs an adapter of its own", "Table S3",
         "experiments/superres.py, at 128 px")}
OURS = {100: "R1 at lambda_A 1",
        101: "words, guided by Eq. 4, against R1", 102: "above R1's curve, by CLIP: style",
        103: "above R1's curve, by the judges: less distance", 104: "four references against one",
        105: "controls that please a class judge", 106: "CLIP and the judges agree",
        107: "what words cannot say", 118: "Section 3.4: why"}


# ---------------------------------------------------------------------------------------------
# What was drawn

class Found:
    """Means of what is there, the references of a style averaged.

    at(arm, ruler) -> {style: mean}, of the reported styles. r1: the arm of the chosen lambda_A.
    """

    def __init__(self, folder, some):
        self.folder, self.subjects, self.read = folder, some, {}
        self.lambda_a = choose_lambda(folder, [s for s in some if not s.reported])
        self.r1 = None if self.lambda_a is None else f"R1 at {self.lambda_a:g}"
        self.chosen = choose_mixtures(self)

    def pictures(self, subject, arm):
        """{ruler: one number a picture}, or None where the arm is not drawn."""
        file = self.folder / subject.key / f"{arm}.json"
        if file not in self.read:
            self.read[file] = json.loads(file.read_text()) if file.exists() else None
        return self.read[file]

    def kept(self, subject, arm):
        """Are its pictures there, too?"""
        return (self.folder / subject.key / f"{arm}.npy").exists()

    def everything(self):
        """{subject's key: {arm: {ruler: numbers}}} of all that is there, for claims.json."""
        found = {}
        for s in self.subjects:
            names = sorted(path.stem for path in (self.folder / s.key).glob("*.json"))
            found[s.key] = {arm: self.pictures(s, arm) for arm in names
                            if not arm.endswith(".chosen")}
        return found

    def by_style(self, measure, reported=True):
        """{style: mean of measure(subject) over its references}, without those that give None."""
        found = {}
        for s in self.subjects:
            value = measure(s) if s.reported == reported else None
            if value is not None:
                found.setdefault(s.index, []).append(value)
        return {index: np.mean(values, 0) for index, values in found.items()}

    def means(self, subject, pairs):
        """[mean of each (arm, ruler) pair] of a subject, or None where one is not drawn."""
        drawn = [(self.pictures(subject, arm) or {}).get(ruler) for arm, ruler in pairs]
        return list(map(np.mean, drawn)) if all(drawn) else None

    def at(self, arm, ruler, reported=True):
        found = self.by_style(lambda s: self.means(s, [(arm, ruler)]), reported)
        return {index: float(mean) for index, (mean,) in found.items()}

    def together(self, function, *pairs):
        """[function of the means of (arm, ruler) pairs], one a style, of the references that have
        all of them."""
        found = self.by_style(lambda s: self.means(s, pairs))
        return [function(*map(float, means)) for means in found.values()]

    def only(self, keep):
        """The same of the subjects that keep(subject) is true of."""
        part = copy.copy(self)
        part.subjects = list(filter(keep, self.subjects))
        return part

    def less(self, arm, other, ruler):
        return self.together(lambda a, b: a - b, (arm, ruler), (other, ruler))

    def above(self, arm, axis):
        """How much more style an arm has than R1 at the lambda_A of its text -> words, values."""
        x, y, sign = AXES[axis]
        pairs = [(a, ruler) for a in (arm, *CURVE) for ruler in (x, y)]
        means = np.array(self.together(lambda *values: values, *pairs))          # (S, 2 (1 + L))
        if not len(means):
            return arm, []
        points = means.T.reshape(-1, 2, len(means)) * np.array([1, sign])[:, None]
        own, curve = points[0], points[1:]                                       # (2, S), (L, 2, S)
        place = match(own[0].mean(), curve.mean(2).tolist())
        more = (own[0] - curve[place, 0]).mean()
        words = f"{arm} less {CURVE[place]} ({x} {more:+.3f})"
        return words, own[1] - curve[place, 1]

    def correlations(self, one, other):
        """Rank correlation of two rulers within R1's pictures of one lambda_A: one a style."""
        def within(s):
            drawn = [self.pictures(s, arm) for arm in CURVE[1:]]
            if not all(drawn):
                return None
            return np.mean([rank_correlation(d[one], d[other]) for d in drawn])
        return list(self.by_style(within).values())


def choose_mixtures(f):
    """{what: Section 3.4's arm of most "both" on the styles to choose on}; {} until drawn."""
    named = [f"named, gamma {g:g}" for g in identity.GAMMAS]
    unnamed = [f"unnamed, gamma {g:g}" for g in identity.GAMMAS]
    chosen = {}
    for what, arms in {"mixture": named[1:-1], "unnamed mixture": unnamed[1:-1],
                       "single": [named[0], named[-1], identity.CONTROL]}.items():
        tried = {arm: list(f.at(arm, "both", reported=False).values()) for arm in arms}
        if not all(tried.values()):
            return {}
        chosen[what] = max(arms, key=lambda arm: np.mean(tried[arm]))
    return chosen


# ---------------------------------------------------------------------------------------------
# The tests

def all_tests(f, results):
    """Every test there is a way for; `values` is empty where it is not drawn yet.

    results: the folder of superres.json. Claims from 100 on are ours and not the paper's.
    """
    tests = []

    def add(claim, label, values, expect, beside=False):
        tests.append(Test(claim, label, [float(v) for v in values], expect, beside))

    def differ(claim, arm, other, beside=False, **rulers):
        for ruler, sign in rulers.items():
            add(claim, f"{ruler}, {arm} less {other}", f.less(arm, other, ruler), sign, beside)

    def same(claim, arm, other, *rulers, beside=False):
        for ruler in rulers:
            values = f.less(arm, other, ruler)
            add(claim, f"{ruler}, {arm} less {other}", values, ("same", SAME[ruler]), beside)

    first_round(f, add, differ, same)
    second_round(f, add, differ, same)
    section_3_4(f, add, differ)
    second_stage(add, Path(results) / "superres.json")
    ours(f, add, differ)
    return tests


def first_round(f, add, differ, same):
    r1 = f.r1
    differ(3, r1, "words", style=1, distance=-1)
    kept = f.together(lambda a, b: a - 0.9 * b, (r1, "text"), ("words", "text"))
    add(3, "text kept above nine tenths", kept, 1)
    differ(4, r1, "words", leak=1)
    differ(4, r1, "words", beside=True, **{"leak by CLIP": 1, "copy": 1})
    differ(4, "R1, again", "words, again", diversity=-1)
    for ruler, sign in dict(style=1, text=-1, distance=-1).items():
        columns = [(arm, ruler) for arm in CURVE[1:]]
        values = f.together(lambda *y: slope(LAMBDAS, y), *columns)
        add(9, f"{ruler} a unit of lambda_A", values, sign, beside=ruler == "distance")
    differ(9, CURVE[-1], CURVE[1], named=-1)
    differ(9, CURVE[-1], CURVE[1], copy=1, beside=True)
    differ(10, "R1, lambda_B 0", r1, copy=1)
    differ(10, "R1, lambda_B 3", "R1, lambda_B 0", text=1)
    differ(10, "R1, lambda_B 8", "R1, lambda_B 0", style=-1)
    differ(12, "style alone", r1, leak=1, named=-1)
    differ(12, "content alone", r1, distance=1)
    same(13, "rare token", r1, "style", "distance")
    differ(14, "R1, dropped", "R1, in full", distance=-1)
    differ(14, "R1, dropped", "no style, as it is", distance=-1)
    differ(15, "thrice the rate", r1, leak=1)
    differ(15, "thrice the rate", r1, text=-1, copy=1, beside=True)
    differ(15, "a third of the rate", r1, distance=1)
    same(15, "a third of the rate, thrice the steps", r1, "distance", beside=True)
    same(17, r1, "H 32", "style")
    same(17, r1, "H 32", "distance", beside=True)
    differ(17, "H 32", "H 1", leak=1)
    add(19, "style and copy", f.correlations("style", "copy"), 1)


def second_round(f, add, differ, same):
    for arm in ROUNDS:
        differ(5, arm, f.r1, text=1, style=-1, beside=arm == "R2 by chance")
    differ(6, "R2 by CLIP", "R2 by chance", text=1)
    differ(6, "R2 by oracle", "R2 by chance", text=1)
    differ(7, "R2 by CLIP", "R2 by oracle", text=1, style=-1)
    differ(8, "R2 by one who likes it dark", "R2 by chance", light=-1)
    ends = ("R1 at 3", "R1 at 0", "R2 by CLIP at 3", "R2 by CLIP at 0")
    for ruler in ("text", "style"):
        apart = f.together(lambda a, b, c, d: abs(a - b) - abs(c - d), *((e, ruler) for e in ends))
        add(11, ruler, apart, 1)
    same(16, "R2 by CLIP, shared", "R2 by CLIP", "text", "style")
    same(23, "R2 by oracle", "R2 by oracle, 30", "text", "style")
    chance = 1 / len(fine.VARIANTS)
    own = f.together(lambda a: a - chance, ("fine, round 1", "own"))
    add(21, "own, above chance, round 1", own, 1, beside=True)
    differ(21, "fine, round 3", "fine, round 1", own=1)
    differ(23, "R2 by oracle, 1", "R2 by oracle", text=-1, beside=True)


def section_3_4(f, add, differ):
    """Claim 18: more of this object in this style than any single adapter gives; and why not."""
    style, content = (f"named, gamma {g:g}" for g in identity.GAMMAS[::len(identity.GAMMAS) - 1])
    if f.chosen:
        mixture = f.chosen["mixture"]
        differ(18, mixture, f.chosen["single"], both=1)
        differ(18, mixture, style, identity=1, beside=True)
        differ(18, mixture, content, styled=1, beside=True)
        differ(118, f.chosen["unnamed mixture"], "unnamed, gamma 1", both=1)
    for arm in (identity.CONTROL, style, content):
        values = f.together(lambda a: a - 1 / identity.OBJECTS, (arm, "identity"))
        add(118, f"identity above chance, {arm}", values, 1)
    for arm in ("object pulled", "probabilities"):
        differ(118, f"named, gamma 0.5, {arm}", "named, gamma 0.5", both=1)


def second_stage(add, file):
    """Claim 24, from what experiments/superres.py left."""
    taught = json.loads(file.read_text()).get("taught", {}) if file.exists() else {}
    rows = [style["samples"] for style in taught.values()]
    for other in ("without its adapter", "control: with another style's adapter"):
        values = [row["**with its adapter**"]["texture"] - row[other]["texture"] for row in rows]
        name = other.removeprefix("control: with ")
        add(24, f"texture, its adapter less {name}", values, -1)


def ours(f, add, differ):
    differ(100, "R1 at 1", "words", style=1, text=-1, named=-1, distance=-1)
    for name, part in (("new words", f.only(lambda s: s.new_words)),
                       ("new combinations", f.only(lambda s: not s.new_words))):
        for ruler, sign in (("style", 1), ("distance", -1)):
            values = part.less("R1 at 1", "words", ruler)
            add(107, f"{ruler}, {name}: R1 at 1 less words", values, sign)
    differ(101, f.r1, "words, guided", style=1, distance=-1)
    for arm in ("words, guided", "rare token", *ROUNDS, *METHODS):
        add(102, *f.above(arm, "CLIP"), 1)
        add(103, *f.above(arm, "judges"), 1)
    differ(104, "four references", f.r1, distance=-1, leak=-1)
    differ(105, "one step", "words", named=-1)
    differ(105, "class mean", "words", named=-1)
    add(106, "rank correlation of style and distance", f.correlations("style", "distance"), -1)
    add(106, "rank correlation of text and named", f.correlations("text", "named"), 1)


def counted(pipe):
    """Claims 1 and 2, of which there is one figure -> {number: (figure, verdict)}."""
    theta = pipe.new_adapter(Tuning(), "", torch.Generator().manual_seed(0)).to(pipe.device)
    size = lambda module: sum(p.numel() for p in module.parameters())
    share = size(theta) / (size(pipe.muse) + size(theta))
    v = torch.full((1, pipe.muse.config.tokens), pipe.muse.config.mask_id, device=pipe.device)
    with torch.no_grad():
        tuned = pipe.forward_pass(pipe.muse, ["a cat"], theta=theta)(v)
        apart = (tuned - pipe.forward_pass(pipe.muse, ["a cat"])(v)).abs().max().item()
    words = f"{size(theta):,} of {size(pipe.muse):,} parameters, {100 * share:.2f} %"
    return {1: (words, HOLDS if share < 0.01 else CONTRARY),
            2: (f"{apart:g}", HOLDS if apart == 0 else CONTRARY)}
