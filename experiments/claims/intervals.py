"""Arithmetic of the claims: intervals over styles, Holm's correction, "off the curve".

One number a style goes in, so errors are clustered by style: pictures, things, references and
tuning seeds of a style are averaged before.
"""

import functools
import math

import numpy as np

LEVEL = 0.05


# ---------------------------------------------------------------------------------------------
# Student's t

def tail(t, freedom):
    """P(|T| > |t|). With t = sqrt(freedom) tan(a), T's density is cos(a)^(freedom - 1)."""
    def area(low, high):
        a = np.linspace(low, high, 1001)
        return np.trapezoid(np.cos(a) ** (freedom - 1), a)
    return float(area(math.atan(abs(t) / math.sqrt(freedom)), math.pi / 2) / area(0, math.pi / 2))


@functools.lru_cache(None)
def critical(freedom, level=LEVEL):
    """The t that chance passes, to either side, in `level` of the cases: by halving."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > level else (low, middle)
    return high


def interval(values):
    """Values (n,), one a style -> mean, low and high of 95 %, p of a mean of 0."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return (x.mean() if len(x) else math.nan), math.nan, math.nan, math.nan
    mean, error = x.mean(), x.std(ddof=1) / math.sqrt(len(x))
    if error < 1e-12:
        return mean, mean, mean, 1.0 if abs(mean) < 1e-12 else 0.0
    reach = critical(len(x) - 1) * error
    return mean, mean - reach, mean + reach, tail(mean / error, len(x) - 1)


# ---------------------------------------------------------------------------------------------
# Verdicts

HOLDS, CONTRARY, OPEN, UNTESTED = "holds", "does not", "cannot be told apart", "not tested"


def judge(values, expect):
    """-> the verdict before correction, and its p.

    expect: +1 or -1, the sign of the mean; or ("same", margin): equal within the margin, which
    holds where two one-sided tests say so (TOST) and does not where the mean differs from 0.
    """
    mean, _, _, p = interval(values)
    if math.isnan(p):
        return UNTESTED, math.nan
    if expect in (1, -1):
        return (OPEN if abs(mean) < 1e-12 else HOLDS if mean * expect > 0 else CONTRARY), p
    x, margin = np.asarray(values, float), expect[1]
    # one-sided: how surely is the mean above -margin, and below margin?
    sides = [interval(x + margin), interval(margin - x)]
    inside = max(s[3] / 2 if s[0] > 0 else 1 - s[3] / 2 for s in sides)
    return (HOLDS, min(1, 2 * inside)) if inside <= p else (CONTRARY, min(1, 2 * p))


def holm(ps):
    """Holm's step-down correction of p values (n,), nan left out -> in the same order."""
    order = [i for i in np.argsort(ps) if not math.isnan(ps[i])]
    corrected, worst = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, ps[i] * (len(order) - rank)))
        corrected[i] = worst
    return corrected


def together(parts):
    """What a claim's parts, [(verdict, p)] of `judge`, say of the whole of it -> verdict, p.

    It holds where every part does, so the least sure part decides, and no correction for their
    number is needed (an intersection-union test). It does not where any part goes the other way,
    of which there are several chances (Bonferroni).
    """
    parts = [(said, p) for said, p in parts if said != UNTESTED]
    if not parts:
        return UNTESTED, math.nan
    holds = max(p if said == HOLDS else 1.0 for said, p in parts)
    contrary = min(min(1.0, len(parts) * p) if said == CONTRARY else 1.0 for said, p in parts)
    return (HOLDS, holds) if holds <= contrary else (CONTRARY, contrary)


# ---------------------------------------------------------------------------------------------
# Off the curve, and correlation

def match(text, curve):
    """Index of the place of a curve that an arm of so much text has to beat.

    curve: (text, style) of each place, means over styles. Of those with no less text it is the one
    of most style; where none has as much, the one of most text.
    """
    enough = [i for i, (x, _) in enumerate(curve) if x >= text]
    if enough:
        return max(enough, key=lambda i: curve[i][1])
    return max(range(len(curve)), key=lambda i: curve[i][0])


def slope(x, y):
    """Least-squares slope of y on x."""
    x = np.asarray(x, float) - np.mean(x)
    return float((x * (np.asarray(y, float) - np.mean(y))).sum() / (x * x).sum())


def rank_correlation(x, y):
    """Spearman's, ties sharing their mean rank; 0 where one of them never changes."""
    def ranks(values):
        values = np.asarray(values, float)
        return (values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2
    x, y = ranks(x), ranks(y)
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / size) if size else 0.0
