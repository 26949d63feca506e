"""Progress, log and summary of tuning, for the first round and for later rounds of feedback."""

from .terminal import Progress


class TuningProgress:
    """An on_step for StyleDrop.tune: it prints progress every five seconds and keeps a log.

    log: a dict for each step, with its stage ("first" or "second"), number and loss.
    """

    def __init__(self):
        self.log = []
        self.stage = "first"
        self.progress = Progress("first stage: step")

    def __call__(self, step, steps, loss):
        if step == 0 and self.log:                           # the second stage begins
            self.stage = "second"
            self.progress = Progress("second stage: step")
        self.log.append(dict(stage=self.stage, step=step + 1, loss=round(loss, 5)))
        self.progress(step + 1, steps, f"loss {loss:.3f}")


def describe(pipe, adapter):
    """How many parameters the adapter has, and what share of the base's that is."""
    ours = count(adapter.adapter)
    base = count(pipe.muse)
    words = f"adapter: {ours:,} parameters, {ours / base:.2%} of the base's {base:,}"
    if adapter.superres is not None:
        second = count(adapter.superres)
        words += f"; {second:,} for the second stage, {second / count(pipe.superres):.2%}"
    elif pipe.superres is not None:
        words += "; the second stage is not tuned"
    return words


def count(model):
    """The number of a model's parameters."""
    return sum(p.numel() for p in model.parameters())
