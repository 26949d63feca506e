"""Shared by the experiments: means with standard errors, tables, and provenance of results."""

import math
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

from checkpoint.files import check_place, read_json
from commandline.options import add_base_options, filled, load_pipeline
from pretrain.common import machine

RESULTS = Path(__file__).with_name("results")
AMONG = 100                             # classes in the easier task "named of 100"


# --------------------------------------------------------------------------------------------------
# Means and their errors

def mean_and_error(values, groups=None):
    """The mean and the standard error of values (n,); NaN values are left out.

    groups (n,): the values of one group, such as an object or a style, count as one observation.
    Both are NaN where no value is left, and the error is NaN where only one is.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    known = ~values.isnan()
    values = values[known]
    if groups is not None:
        groups = torch.as_tensor(groups)[known]
        means = [values[groups == group].mean().item() for group in groups.unique()]
        values = torch.tensor(means, dtype=torch.float64)
    if len(values) == 0:
        return math.nan, math.nan
    if len(values) == 1:
        return values.item(), math.nan
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def with_error(values, groups=None, scale=1, digits=1):
    """The text "mean ± standard error", each `scale` times as large; "-" where no value is left."""
    mean, error = mean_and_error(values, groups)
    if math.isnan(mean):
        return "-"
    return f"{scale * mean:.{digits}f} ± {scale * error:.{digits}f}"


def percent(values, groups=None):
    """The text "mean ± standard error %" of values from 0 to 1; "-" where no value is left."""
    words = with_error(values, groups, scale=100)
    if words == "-":
        return words
    return words + " %"


def paired_interval(differences):
    """The mean of n paired differences, and half the width of its 95 % interval (Student's t).

    The half width is NaN if n = 1. The t quantile is the expansion of Abramowitz & Stegun 26.7.5,
    which is right to 0.01 from n = 8 on.
    """
    differences = np.asarray(differences, dtype=float)
    mean = float(differences.mean())
    freedom = len(differences) - 1
    if freedom < 1:
        return mean, math.nan
    z = 1.959964
    t = (z + (z ** 3 + z) / (4 * freedom)
         + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * freedom ** 2))
    return mean, float(t * differences.std(ddof=1) / math.sqrt(freedom + 1))


def verdict(mean, half, margin=0.05):
    """What a 95 % interval mean ± half decides: "more" or "less" than zero, "equal", or "open".

    Equal: the interval contains zero and lies within `margin` of it.
    """
    if mean - half > 0:
        return "more"
    if mean + half < 0:
        return "less"
    if abs(mean) + half <= margin:
        return "equal"
    return "open"


def decided(differences):
    """Paired differences of shares, from -1 to 1 -> "mean ± half points: verdict"."""
    mean, half = paired_interval(differences)
    return f"{100 * mean:+.1f} ± {100 * half:.1f}: {verdict(mean, half)}"


INTERVALS = ("Percentage points with a 95 % interval, paired over references. More, less: the "
             "interval excludes zero; equal: it lies within 5 points of zero; open: neither, so it "
             "is undecided.")


def minus(rows, controls, names):
    """Cells of a table: rows minus controls, for each of `names`; INTERVALS explains them.

    rows, controls: lists of dicts, of the same references in the same order; a dict is
    {name: a share, or a list of them, whose mean counts}.
    """
    cells = []
    for name in names:
        cells.append(decided([np.mean(row[name]) - np.mean(control[name])
                              for row, control in zip(rows, controls)]))
    return cells


def among(scores, wanted, rivals=AMONG - 1):
    """(B,) the chance that none of `rivals` random other names scores as high as the wanted one.

    scores (B, K); wanted (B,): the column of the wanted name. The chance is counted, not simulated:
    if r of the K - 1 others score as high, it is C(K - 1 - r, rivals) / C(K - 1, rivals).
    """
    others = scores.shape[1] - 1
    wanted_score = scores.gather(1, wanted[:, None])                             # (B, 1)
    r = (scores >= wanted_score).sum(1, keepdim=True) - 1                        # without itself
    taken = torch.arange(rivals)
    return ((others - r - taken).clamp(min=0).double() / (others - taken)).prod(1)


# --------------------------------------------------------------------------------------------------
# Images

@torch.no_grad()
def reconstruct(pipe, images):
    """Images (B, 3, H, W) as the tokenizer of `pipe` reconstructs them, on the CPU."""
    parts = []
    for part in images.split(64):
        parts.append(pipe.vqgan.decode(pipe.vqgan.encode(part.to(pipe.device))).cpu())
    return torch.cat(parts)


# --------------------------------------------------------------------------------------------------
# Studies that resume, and reports

def start_study(parser):
    """Add --out and the base's options, and parse -> args, the pipeline, and the results' folder.

    For studies that decide themselves which stages they use.
    """
    parser.add_argument("--out", type=filled, default=str(RESULTS), help="folder of the results")
    add_base_options(parser, superres=False)
    args = parser.parse_args()
    check_place(args.out)
    return args, load_pipeline(args), Path(args.out)


def read_results(path, settings):
    """The results of an earlier run, which this one continues; without a file, no rows.

    Raises ValueError if the file was made with other settings, such as another base.
    """
    results = read_json(path) or dict(settings=settings, rows=[])
    if results.get("settings") != settings:
        raise ValueError(f"{path} has another base or other settings; move it away, or give "
                         "another --out")
    return results


def command():
    """The command that is running, as a user types it."""
    name = Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", f"experiments.{name}", *sys.argv[1:]])


def heading(title):
    """The first lines of a report: its title and its command."""
    return [f"# {title}", "", f"`{command()}`", ""]


def made_by(pipe):
    """One line that says by which base and on which machine a result was made."""
    return f"Base {pipe.base_id}; {machine(pipe.device)}."


def table(head, rows):
    """The lines of a Markdown table. head: a list of strings; rows: lists of strings."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:], ""]
