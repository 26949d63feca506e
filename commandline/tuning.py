"""Tuning with progress, as both the first round and later rounds of feedback do it."""

from .terminal import Progress, say


def tune_with_progress(pipe, images, contents, style, seed, superres, tuning):
    """StyleDrop.tune with a line of progress about every five seconds.

    Returns the TunedAdapter and a log, a list of one dict for each step. Raises ValueError where
    the result is NaN or infinite.
    """
    log, name, progress = [], "base", Progress("first stage: step")

    def on_step(step, steps, loss):
        nonlocal name, progress
        if step == 0 and log:
            name, progress = "superres", Progress("second stage: step")
        log.append(dict(stage=name, step=step + 1, loss=round(loss, 5)))
        progress(step + 1, steps, f"loss {loss:.3f}")

    adapter = pipe.tune(images, contents, style, seed, superres, tuning, on_step)
    if not all(p.isfinite().all() for p in adapter.parameters()):        # after the last step
        raise ValueError("the adapter is NaN or infinite; give a lower --lr")
    say(describe(pipe, adapter))
    return adapter, log


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
