"""A tuned adapter (theta of Eq. 3) with a record of how it was tuned, and its file format."""

from pathlib import Path

import torch
import torch.nn as nn

from adapter import Adapter

from .files import write_whole
from .weights import build, read_checkpoint

LONGEST_STYLE = 2000                    # in characters; train.py accepts as many


class TunedAdapter(nn.Module):
    """The adapters of both stages, and how they were made.

    adapter: the first stage's; superres: the second stage's (Table S3, third column), or None;
    about: a dict with the fingerprint of the base, the style phrase, the prompts and the settings;
    the commands add the kind, "style" or "content".
    """

    def __init__(self, adapter, superres=None, about=None):
        super().__init__()
        self.adapter, self.superres = adapter, superres
        self.about = dict(about or {})

    @property
    def style(self):
        """The style phrase with which it was tuned."""
        return self.about.get("style", "")

    def save(self, path):
        """Write both stages' adapters to one file, which `load_adapter` reads."""
        second = None if self.superres is None else self.superres.config
        saved = dict(kind="adapter", config=self.adapter.config, superres=second,
                     weights=self.state_dict(), about=self.about)
        write_whole(path, lambda file: torch.save(saved, file))


def load_adapter(path):
    """A TunedAdapter from its file or its run folder, frozen. Raises ValueError for other files."""
    path = Path(path)
    if path.is_dir():
        path = path / "adapter.pt"
    saved = read_checkpoint(path, "adapter")

    def make():
        second = None
        if saved["superres"] is not None:
            second = Adapter(**saved["superres"])
        return TunedAdapter(Adapter(**saved["config"]), second)

    try:
        tuned = build(make, saved.get("weights"))
        tuned.about = dict(saved["about"])
        if not all(isinstance(tuned.about.get(name, ""), str) for name in ("base", "style")):
            raise ValueError("its base and style are not text")
        if len(tuned.style) > LONGEST_STYLE:
            raise ValueError(f"its style has {len(tuned.style):,} characters")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this version's adapters: {error}; "
                         "tune it again") from None
    return tuned.requires_grad_(False)
