"""What the experiments share: figures and their errors, tables, files."""

import math
import sys

import torch

import data
from styledrop import read_checkpoint, write_whole

AMONG = 100                             # the right name against 99 others


# ---------------------------------------------------------------------------------------------
# Figures

def mean_and_error(values, groups=None):
    """Mean and standard error of values (n,), nan left out; nan where too few are left.

    groups (n,): the values of a group, such as an object or a style, are one observation.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    known = ~values.isnan()
    values = values[known]
    if groups is not None:
        groups = torch.as_tensor(groups)[known]
        values = torch.tensor([values[groups == g].mean().item() for g in groups.unique()])
    if not len(values):
        return math.nan, math.nan
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), error


def with_error(values, groups=None, scale=1, digits=1):
    """ "mean ± standard error", each `scale` times as large; "-" where no value is left."""
    mean, error = mean_and_error(values, groups)
    return "-" if math.isnan(mean) else f"{scale * mean:.{digits}f} ± {scale * error:.{digits}f}"


def percent(values, groups=None):
    words = with_error(values, groups, scale=100)
    return words if words == "-" else words + " %"


def numbers_of(names):
    """The columns of some names among data.names(): (B,)."""
    number_of = {name: i for i, name in enumerate(data.names())}
    return torch.tensor([number_of[name] for name in names])


def among(scores, wanted, rivals=AMONG - 1):
    """(B,) the chance that none of `rivals` random others scores as high as the wanted name.

    Not drawn but counted: with r of K - 1 others as high, C(K - 1 - r, rivals) / C(K - 1, rivals).
    scores (B, K), wanted (B,) column numbers.
    """
    others = scores.shape[1] - 1
    r = (scores >= scores.gather(1, wanted[:, None])).sum(1, keepdim=True) - 1   # but for itself
    taken = torch.arange(rivals)
    return ((others - r - taken).clamp(min=0).double() / (others - taken)).prod(1)


@torch.no_grad()
def give_back(pipe, images):
    """Images as the tokenizer gives them back. pipe: its .vqgan and .device are enough."""
    return torch.cat([pipe.vqgan.decode(pipe.vqgan.encode(x.to(pipe.device))).cpu()
                      for x in images.split(64)])


# ---------------------------------------------------------------------------------------------
# Reports and checkpoints

def heading(title):
    """The first lines of a report."""
    return [f"# {title}", "", f"`python {' '.join(sys.argv)}`", ""]


def table(head, rows):
    """Lines of Markdown; all cells are strings."""
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return [line(head), "|---" * len(head) + "|", *map(line, rows), ""]


def write_text(path, text):
    write_whole(path, lambda file: file.write(text.encode()))


def write_png(path, image):
    write_whole(path, lambda file: image.save(file, "PNG", optimize=True))


def resume(path, kind, recipe, **parts):
    """Load a checkpoint into its parts -> (how far it came, seconds spent); (0, 0) without one."""
    if not path.exists():
        return 0, 0
    saved = read_checkpoint(path, kind)
    if saved["recipe"] != recipe:
        raise ValueError(f"{path} was made with {saved['recipe']}; give the same, or remove it")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    print(f"going on from {saved['done']}", flush=True)
    return saved["done"], saved["seconds"]


def keep(path, kind, recipe, done, seconds, **parts):
    """Write what `resume` reads."""
    state = dict(kind=kind, recipe=recipe, done=done, seconds=seconds)
    state |= {name: part.state_dict() for name, part in parts.items()}
    write_whole(path, lambda file: torch.save(state, file))
