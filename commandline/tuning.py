"""Tuning on the command line, as both the first round and later rounds of feedback do it."""

from .terminal import Progress


class TuningProgress:
    """on_step of StyleDrop.tune: a line of progress about every five seconds, and a log.

    log: a list of one dict for each step, with its stage ("first" or "second"), number and loss.
    """

    def __init__(self):
        self.log, self.stage, self.progress = [], "first", Progress("first stage: step")

    def __call__(self, step, steps, loss):
        if step == 0 and self.log:
            self.stage, self.progress = "second", Progress("second stage: step")
        self.log.append(dict(stage=self.stage, step=step + 1, loss=round(loss, 5)))
        self.progress(step + 1, steps, f"loss {loss:.3f}")


def describe(pipe, adapter):
    """How many parameters the adapter has beside the base."""
    ours, base = count(adapter.adapter), count(pipe.muse)
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
