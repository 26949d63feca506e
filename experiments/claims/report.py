"""The table of 24 claims and the frontier, from whatever run.py has drawn so far.

    python experiments/claims/report.py     # results/claims.md, claims.json, claims_*.png

Give run.py's options for what it drew (--things, --references, ...). What is not drawn yet is "not
tested"; n says on how many styles a figure rests.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from commandline import Parser, number, run_command  # noqa: E402
from data.pictures import grid  # noqa: E402
from experiments.claims import fine, identity  # noqa: E402
from experiments.claims.claims import (AXES, CLAIMS, CURVE, OURS, ROUNDS, SAME, Found,  # noqa: E402
                                       all_tests, counted)
from experiments.claims.intervals import (LEVEL, OPEN, UNTESTED, holm, interval,  # noqa: E402
                                          judge, together)
from experiments.claims.run import METHODS, everything, options, write_json  # noqa: E402
from experiments.claims.setting import CHOOSING, drawings  # noqa: E402
from experiments.common import write_text  # noqa: E402
from experiments.losses import ticks  # noqa: E402
from pretrain.common import machine  # noqa: E402
from styledrop import to_uint8, write_whole  # noqa: E402

RULERS = ("text", "style", "named", "palette", "texture", "distance", "leak", "leak by CLIP",
          "copy")
OBJECT_RULERS = ("identity", "near", "named", "styled", "both", "distance")
ARMS = ("no style", "words", "words, guided", "one step", "class mean", *CURVE[1:], "words, again",
        "R1, again", "rare token", "style alone", "content alone", "H 1", "H 32", "H 32, own",
        "thrice the rate", "a third of the rate", "a third of the rate, thrice the steps",
        "four references", *ROUNDS,
        "R2 by oracle, 1", "R2 by oracle, 3", "R2 by oracle, 30", "R2 by CLIP, shared",
        "R2 by CLIP at 0", "R2 by CLIP at 3", "R2 by one who likes it dark", *METHODS,
        "R1, lambda_B 0", "R1, lambda_B 3", "R1, lambda_B 8")
OBJECT_ARMS = (identity.CEILING, identity.CONTROL, *(
    f"{how}, gamma {g:g}" for how in ("named", "unnamed") for g in identity.GAMMAS))
DROPPED = ("R1, in full", "R1, dropped", "no style, as it is")
SHOWN = ("words", "words, guided", *CURVE[1:], "rare token", *ROUNDS, *METHODS, "four references")
COLOURS = {"words": "#777777", "words, guided": "#111111",
           "R2 by CLIP": "#1f77b4", "R2 by chance": "#17becf", "R2 by oracle": "#2ca02c",
           "LoRA": "#ff7f0e", "full tuning": "#d62728", "inversion": "#9467bd",
           "rare token": "#e377c2", "four references": "#8c564b", "thrice the rate": "#999900"}
CURVE_COLOUR = "#0b6e4f"


# ---------------------------------------------------------------------------------------------
# Words

def table(head, rows):
    line = lambda cells: "| " + " | ".join(str(cell) for cell in cells) + " |"
    return [line(head), line(["---"] * len(head)), *map(line, rows), ""]


def figure(test):
    """ "style, A less B +0.050 [+0.020, +0.080]"."""
    mean, low, high, _ = interval(test.values)
    if not test.values:
        return f"{test.label} -"
    span = "one style" if math.isnan(low) else f"{low:+.3f}, {high:+.3f}"
    return f"{test.label} {mean:+.3f} [{span}]"


def verdicts_of(tests):
    """{claim: (verdict, corrected p)}: Holm over the paper's claims, and over the tests of ours.

    Ours are keyed by their number in the list.
    """
    found = {}
    for claim in CLAIMS:
        found[claim] = together([judge(t.values, t.expect) for t in tests
                                 if t.claim == claim and not t.beside])
    own = {i: judge(t.values, t.expect) for i, t in enumerate(tests) if t.claim not in CLAIMS}
    return corrected(found), corrected(own)


def corrected(found):
    """{key: (verdict, p)} -> the same after Holm's correction; unsure where p is above LEVEL."""
    ps = holm([p for _, p in found.values()])
    return {key: (said if said == UNTESTED or p <= LEVEL else OPEN, p)
            for (key, (said, _)), p in zip(found.items(), ps)}


def in_words(p):
    return "-" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def claim_rows(tests, verdicts, direct):
    """The 24 rows: the figures of all parts of a claim, and what they say together."""
    rows = []
    for claim, words in CLAIMS.items():
        parts = [test for test in tests if test.claim == claim and not test.beside]
        drawn, (verdict, p) = [test for test in parts if test.values], verdicts[claim]
        shown = "; ".join(map(figure, drawn)) or "-"
        if claim in direct:
            (shown, verdict), p = direct[claim], math.nan
        elif drawn:
            shown += f" (n {min(len(test.values) for test in drawn)})"
            verdict += " (in part)" if len(drawn) < len(parts) and verdict != UNTESTED else ""
        rows.append([claim, *words, shown, in_words(p), verdict])
    return rows


def test_rows(tests, own):
    """Every test that is drawn: parts of the claims, what stands beside them, ours."""
    rows = []
    for i, test in enumerate(tests):
        if not test.values:
            continue
        expected = {1: "+", -1: "-"}.get(test.expect) or f"within {test.expect[1]:g}"
        name = f"ours: {OURS[test.claim]}" if i in own else test.claim
        verdict, p = own.get(i, ("beside" if test.beside else "part", interval(test.values)[3]))
        rows.append([name, figure(test), expected, len(test.values), in_words(p), verdict])
    return rows


def arm_table(f, arms, rulers):
    """Means and their standard errors over styles, of the arms that are drawn."""
    rows = []
    for arm in arms:
        columns = [np.array(list(f.at(arm, ruler).values())) for ruler in rulers]
        if not len(columns[0]):
            continue
        error = lambda x: f" ± {x.std(ddof=1) / math.sqrt(len(x)):.3f}" if len(x) > 1 else ""
        rows.append([arm, *(f"{x.mean():.3f}{error(x)}" for x in columns), len(columns[0])])
    return table(["", *rulers, "styles"], rows) if rows else []


def seconds_of(f):
    return sum(numbers["seconds"] for arms in f.everything().values() for numbers in arms.values())


def report(f, args, settings, rows, tests, own):
    """Lines of claims.md."""
    reported = drawn_styles(f)
    new = sum(s.new_words for s in reported)
    chosen = "; ".join(f"{what}: {arm}" for what, arm in f.chosen.items()) or "none yet"
    margins = ", ".join(f"{ruler} {margin:g}" for ruler, margin in SAME.items())
    lines = [
        "# The claims of the paper, tested", "",
        f"`python experiments/claims/run.py --styles {args.styles} --things {args.things} "
        f"--references {args.references}`; base {settings['base']}; {machine()}, "
        f"{seconds_of(f) / 60:.0f} minutes of drawing so far. The first stage alone, at 64 pixels, "
        "but for claim 24.", "",
        f"{len(reported)} held-out styles so far, {new} with a medium or light that no training "
        f"picture has, {len(reported) - new} new combinations of words; up to "
        f"{args.references} references in each, with {args.things} things and a seed of its own. "
        f"Settings were chosen on {CHOOSING} other styles: lambda_A {f.lambda_a:g}, for R1 and all "
        "other adapters (most names for the least distance, as in quality.py); of Section 3.4, "
        f"{chosen}.", "",
        "A figure is a mean of differences, with a 95 % interval by Student's t over styles: "
        f"whatever is drawn of a style counts once. Verdicts are at {LEVEL:g}, by the p beside "
        "them, which is corrected by Holm for the number of claims. A claim of several parts holds "
        "where all of them do, and does not where one goes the other way. Equal: two one-sided "
        f"tests within margins set before ({margins}).", "",
        "text, style: CLIP's cosines, as in the paper. named: the classifier of quality.py prefers "
        "the right name to 99 others. distance: palette + 5 x texture to the drawing that was "
        "wanted. leak: share of other names that the reference's beats (0.5 by chance). copy: "
        "share of tokens equal to the reference's, less the wanted drawing's. words: the style in "
        "the prompt, Eq. 1; R1's curve begins there (lambda_A -1).", "",
        *table(["", "claim", "where", "how", "figure [95 %]", "p", "verdict"], rows),
        "## Every test", "", "Expected sign, number of styles, p. A part has its own p; what "
        "stands beside is not what a claim stands or falls by; ours are not the paper's claims, "
        "and corrected for their own number.", "",
        *table(["claim", "figure [95 %]", "expected", "n", "p", ""], test_rows(tests, own)),
        "## Arms", "", "Means ± one standard error over styles. Arms of another number of styles "
        "are of other styles: only the tests above pair them. CLIP's figures of \"R2 by CLIP\" and "
        "the judges' of \"R2 by oracle\" are by who chose.", "", *arm_table(f, ARMS, RULERS)]
    lines += ["\"R1, in full\", \"dropped\" and \"no style\" of claim 14 are held against drawings "
              "without the style's ground.", "", *arm_table(f, DROPPED, RULERS)]
    lines += arm_table(f, ("fine, as wanted", *(f"fine, round {n}" for n in fine.ROUNDS)), ("own",))
    objects = arm_table(f, (*OBJECT_ARMS, "named, gamma 0.5, object pulled",
                            "named, gamma 0.5, probabilities"), OBJECT_RULERS)
    if objects:
        about = " ".join(identity.__doc__.split("\n\n")[1].split())
        lines += ["## Section 3.4: this very object", "", about, "", *objects]
    return lines


def alone(f, results):
    """Lines about styles drawn after the others had been read, when every test was fixed."""
    tests = [test for test in all_tests(f, results) if test.claim != 24]         # of other styles
    verdicts, _ = verdicts_of(tests)
    rows = [[row[0], row[1], *row[4:]] for row in claim_rows(tests, verdicts, {}) if row[4] != "-"]
    if not rows:
        return []
    return ["## Styles drawn later, alone", "", f"{len(drawn_styles(f))} styles that were drawn "
            "after the others had been read, for the claims that take little time: no test, margin "
            "or setting was changed for them. Corrected for their own number.", "",
            *table(["", "claim", "figure [95 %]", "p", "verdict"], rows)]


# ---------------------------------------------------------------------------------------------
# Pictures

def drawn_styles(f):
    """The first subject of each reported style that is drawn."""
    first = {}
    for s in f.subjects:
        if s.reported and f.pictures(s, f.r1):
            first.setdefault(s.index, s)
    return list(first.values())


def frontier(f, axis, width=640, height=460):
    """One panel: text against style; up and to the right is better.

    An arm stands at its mean difference from words, and the crosses are standard errors of that
    difference: what styles have in common is not in them. All arms are of the same styles, those
    that have them all, where there are any.
    """
    whole = f.only(lambda s: all(f.pictures(s, arm) for arm in (*COLOURS, *CURVE)))
    f = whole if len(drawn_styles(whole)) > 1 else f
    x, y, sign = AXES[axis]
    zero = {ruler: np.mean(list(f.at("words", ruler).values())) for ruler in (x, y)}
    column = lambda arm, ruler: zero[ruler] + np.array(f.less(arm, "words", ruler))
    spots = {arm: (column(arm, x), sign * column(arm, y)) for arm in (*COLOURS, *CURVE[1:])
             if f.less(arm, "words", x)}
    mean = {arm: (a.mean(), b.mean()) for arm, (a, b) in spots.items()}
    spans = [(min(v), max(max(v) - min(v), 1e-3)) for v in zip(*mean.values())]
    (x0, x1), (y0, y1) = ((low - 0.06 * span, low + 1.15 * span) for low, span in spans)
    left, top, right, bottom = 60, 30, width - 16, height - 30
    across = lambda v: left + (right - left) * (v - x0) / (x1 - x0)
    up = lambda v: bottom - (bottom - top) * (v - y0) / (y1 - y0)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for v in ticks(x0, x1):
        draw.line([(across(v), top), (across(v), bottom)], fill="#eeeeee")
        draw.text((across(v), bottom + 4), f"{v:g}", fill="#555555", anchor="mt")
    for v in ticks(y0, y1):
        draw.line([(left, up(v)), (right, up(v))], fill="#eeeeee")
        draw.text((left - 5, up(v)), f"{v:g}", fill="#555555", anchor="rm")
    up_is = y if sign > 0 else f"less {y}"
    draw.text((left, 8), f"by {axis}: {x} to the right, {up_is} upwards", fill="black")
    draw.line([(across(a), up(b)) for a, b in (mean[arm] for arm in CURVE if arm in mean)],
              fill=CURVE_COLOUR, width=3)
    error = lambda v: v.std(ddof=1) / math.sqrt(len(v)) if len(v) > 1 else 0
    for arm, (a, b) in mean.items():
        colour = COLOURS.get(arm, CURVE_COLOUR)
        e_x, e_y = map(error, spots[arm])
        draw.line([(across(a - e_x), up(b)), (across(a + e_x), up(b))], fill=colour)
        draw.line([(across(a), up(b - e_y)), (across(a), up(b + e_y))], fill=colour)
        draw.ellipse([across(a) - 4, up(b) - 4, across(a) + 4, up(b) + 4], fill=colour)
        words = arm.removeprefix("R1 at ") if arm in CURVE else arm
        draw.text((across(a) + 7, up(b) - 7), words, fill=colour, anchor="lm")
    return image


def sheet(f, art, subjects):
    """The wanted drawings beside the reference, then the arms, style by style."""
    arms = [arm for arm in SHOWN if all(f.kept(s, arm) for s in subjects)]
    rows, names = [], ["as wanted", *arms] * len(subjects)
    for s in subjects:
        reference = to_uint8(drawings(art, s.references[:1], s.style))
        rows += [reference, to_uint8(drawings(art, s.things, s.style))]
        for arm in arms:
            rows += [np.full_like(reference, 255), np.load(f.folder / s.key / f"{arm}.npy")]
    return grid(np.concatenate(rows), 1 + len(subjects[0].things), left=names)


def identity_sheet(f, art, subjects):
    """A row a style: what taught the object, what taught the style, the arms."""
    rows = []
    for s in subjects:
        taught = identity.lessons(identity.objects(art, s.object)[0], s.index)[:1]
        rows += [to_uint8(taught), to_uint8(drawings(art, s.references[:1], s.style))]
        rows += [np.load(f.folder / s.key / f"{arm}.npy")[:1] for arm in OBJECT_ARMS]
    top = ["taught by", "style", "ceiling", "class", *[f"gamma {g:g}" for g in identity.GAMMAS] * 2]
    return grid(np.concatenate(rows), len(top), top=top, left=[s.object for s in subjects])


def pictures(f, art, out):
    """Write those of which run.py has kept the pictures, not numbers alone; lines that say what
    all of them show."""
    save = lambda name, image: write_whole(out / name, lambda file: image.quantize(192).save(
        file, "PNG", optimize=True))
    panels = [np.asarray(frontier(f, axis)) for axis in AXES]
    save("claims_frontier.png", Image.fromarray(np.concatenate(panels, 1)))
    some = drawn_styles(f)[:2]
    if all(f.kept(s, f.r1) for s in some):
        save("claims_pictures.png", sheet(f, art, some))
    lines = ["## Pictures", "", "claims_frontier.png: mean differences from words, over the "
             "styles that have all arms, crosses one standard error of them. The line is R1, from "
             "words alone over lambda_A 0, 0.5, 1, 2, 3.", "",
             "claims_pictures.png: the first two reported styles "
             f"({'; '.join(s.words for s in some)}), first seeds, nothing chosen; on the left "
             "of the first row of each its reference."]
    have = [s for s in drawn_styles(f) if all(f.pictures(s, arm) for arm in OBJECT_ARMS)]
    if have:
        if all(f.kept(s, arm) for s in have for arm in OBJECT_ARMS):
            save("claims_identity.png", identity_sheet(f, art, have))
        lines += ["", "claims_identity.png: a row a style, first seeds: what taught the object, "
                  "what taught the style, the object in that style by the tokenizer, its class by "
                  "the style adapter, gamma 0 to 1 with its class named, and unnamed. Rows: "
                  f"{'; '.join(f'{s.object} in {s.words}' for s in have)}."]
    return lines


# ---------------------------------------------------------------------------------------------

def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = options(Parser(description=__doc__, formatter_class=plain))
    parser.add_argument("--out", default=str(ROOT / "experiments" / "results"))
    parser.add_argument("--first", type=number(int, 0), help="reported styles that were read "
                        "before the others were drawn: the others are shown alone, too")
    args = parser.parse_args()
    pipe, _, art, some, settings, folder = everything(args)
    f, out = Found(folder, some), Path(args.out)
    first = len(some) if args.first is None else args.first
    later = f.only(lambda s: s.index >= CHOOSING + first)
    if f.r1 is None or not drawn_styles(f):
        raise ValueError(f"nothing to report yet in {folder}: run.py with the same options first")
    tests = all_tests(f, out)
    verdicts, own = verdicts_of(tests)
    rows = claim_rows(tests, verdicts, counted(pipe))
    lines = report(f, args, settings, rows, tests, own) + alone(later, out) + pictures(f, art, out)
    text = "\n".join(lines) + "\n"
    write_text(out / "claims.md", text)
    write_json(out / "claims.json", dict(
        settings, command=f"python {' '.join(sys.argv)}", machine=machine(), lambda_a=f.lambda_a,
        chosen=f.chosen, seconds=round(seconds_of(f)), rows=rows,
        styles={s.key: s.words for s in some}, arms=f.everything(),
        tests=[t._asdict() for t in tests if t.values]))
    print(text)


if __name__ == "__main__":
    run_command(main)
