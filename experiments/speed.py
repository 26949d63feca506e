"""How fast this machine tunes and samples, and how near that is to its peak throughput.

    python -m experiments.speed                     # results/speed.md and speed.json; 8 minutes
    python -m experiments.speed --quick --out DIR   # a quick check that it runs; not meaningful

Run nothing else at the same time. A time is the median of five runs, after a warm-up run.
Other libraries: peers.py.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import styledrop
from checkpoint.files import check_place, write_json, write_text
from commandline.options import Parser, filled, whole
from commandline.terminal import run_command, say
from experiments.common import RESULTS, heading, made_by, table
from styledrop import (ROUND_1, SAMPLING, SUPERRES, SUPERRES_SAMPLING, WEIGHTS, StyleDrop,
                       precision, style_prompt)

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
THREADS = (1, 2)
STYLE = "watercolor"
CONTENTS = ("a cat", "a tree", "a house", "a boat")


# --------------------------------------------------------------------------------------------------
# Time

def median_seconds(work, repeats):
    """The median time of some calls, after one that is not counted."""
    def finish():
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    finish()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        finish()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def computing_in(name):
    """A context in which G computes in "fp32" or "bf16", whatever the rule says."""
    return mock.patch.object(styledrop, "fast_bf16", lambda device: name == "bf16")


@contextlib.contextmanager
def busy_process():
    """A context in which another process keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def threads(count):
    """A context in which PyTorch uses this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------
# Work: functions without arguments, which are timed

def prompts(count):
    return [CONTENTS[i % len(CONTENTS)] for i in range(count)]


def random_ids(config, count, device="cpu"):
    """Image tokens (count, N)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.codebook_size, (count, config.tokens), generator=generator)
    return ids.to(device)


def sampling(pipe, stage, count, steps):
    """Tokens of `count` images by Eq. 4 with a style adapter, of stage 1 or 2.

    A step has three forward passes, G^(t), G(t) and G(n), or two where lambda_B is 0.
    """
    if stage == 1:
        G = pipe.muse
        settings = SAMPLING
        tuned = ROUND_1
        low = None
    else:
        G = pipe.superres
        settings = SUPERRES_SAMPLING
        tuned = SUPERRES
        low = random_ids(pipe.muse.config, count, pipe.device)
    theta = pipe.new_adapter(G, tuned, torch.Generator().manual_seed(0)).requires_grad_(False)
    content = prompts(count)
    texts = [style_prompt(words, STYLE) for words in content], content, [""] * count
    settings = replace(settings, steps=steps)

    def work():
        generators = [torch.Generator(pipe.device).manual_seed(i) for i in range(count)]
        with torch.no_grad():
            pipe.sample_tokens(G, texts, theta, None, 0.0, settings, generators, low=low)
    return work


def passes(stage):
    """Forward passes in a step of `sampling`."""
    settings = SAMPLING if stage == 1 else SUPERRES_SAMPLING
    return 3 if settings.lambda_b else 2


def tuning(pipe, stage, steps, batch=None):
    """Some steps of Eq. 3 on one reference."""
    if stage == 1:
        G = pipe.muse
        settings = ROUND_1
        low = None
    else:
        G = pipe.superres
        settings = SUPERRES
        low = random_ids(pipe.muse.config, 1, pipe.device)
    settings = replace(settings, steps=steps, batch=batch or settings.batch)
    ids = random_ids(G.config, 1, pipe.device)

    def work():
        generator = torch.Generator().manual_seed(0)
        pipe.fit(G, ids, [style_prompt("a house", STYLE)], settings, generator, low=low)
    return work


# --------------------------------------------------------------------------------------------------
# 1. Stages: time, operations, share of the bound

def operations(work):
    """Floating-point operations of all matrix products, convolutions and attention in work()."""
    def forward(q, k, v, *rest, out_shape=None, **more):
        return sdpa_flop_count(q, k, v)

    def backward(grad, q, k, v, *rest, out_shape=None, **more):
        return sdpa_backward_flop_count(grad, q, k, v)

    aten = torch.ops.aten                                    # which PyTorch does not count on CPUs
    attention = {aten._scaled_dot_product_flash_attention_for_cpu: forward,
                 aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        work()
    return counter.get_total_flops()


def fastest_product(dtype, device, sizes, repeats):
    """Operations per second of the fastest product of two square matrices."""
    speeds = []
    for side in sizes:
        a = torch.ones(side, side, dtype=dtype, device=device)
        b = torch.ones(side, side, dtype=dtype, device=device)
        speeds.append(2 * side ** 3 / median_seconds(lambda a=a, b=b: a @ b, repeats))
    return max(speeds)


def stages(pipe, args):
    """A dict for each kind of work: seconds per part in "fp32" and in "bf16", "operations" per
    part, and "whole", the number of parts in a job.

    A part is one forward pass of sampling, or one step of tuning. A whole job has the default
    number of steps.
    """
    steps, images = (2, 1) if args.quick else (6, 4)
    results = {}
    for stage, tuned, sampled in ((1, ROUND_1, SAMPLING), (2, SUPERRES, SUPERRES_SAMPLING)):
        if stage == 2 and pipe.superres is None:
            continue
        name = f"stage {stage}, sampling {images} images, a forward pass"
        results[name] = parts_of(sampling(pipe, stage, images, steps), steps * passes(stage), args)
        results[name]["whole"] = sampled.steps * passes(stage)
        name = f"stage {stage}, tuning on {tuned.batch} images, a step"
        results[name] = parts_of(tuning(pipe, stage, steps), steps, args)
        results[name]["whole"] = tuned.steps
    return results


def parts_of(work, parts, args):
    """Operations and seconds of one of the equal parts that work() consists of."""
    one = {"operations": operations(work) / parts}
    for name in TYPES:
        with computing_in(name):
            one[name] = median_seconds(work, args.repeats) / parts
    return one


def bounds(pipe, args):
    """{precision: operations per second of the fastest product}."""
    sides = (128,) if args.quick else (512, 1024, 2048)
    return {name: fastest_product(dtype, pipe.device, sides, args.repeats)
            for name, dtype in TYPES.items()}


def stages_report(results, bound, rule):
    """Lines of the report. rule: the precision that styledrop.fast_bf16 chooses here."""
    rows = []
    for name, one in results.items():
        speed = one["operations"] / one[rule]
        rows.append([name, ms(one["fp32"]), ms(one["bf16"]), f"{one['operations'] / 1e9:.2f}",
                     f"{100 * speed / bound[rule]:.0f} %",
                     f"{one['whole']} of them: {one['whole'] * one[rule]:.1f} s"])
    ratios = [one["fp32"] / one["bf16"] for one in results.values()]
    faster = "bf16" if statistics.median(ratios) > 1 else "fp32"
    return [
        f"The rule `styledrop.fast_bf16` chooses {rule} on this machine. By these times {faster} "
        f"is faster: fp32 takes {min(ratios):.2f} to {max(ratios):.2f} times as long as bf16. The "
        "bound is the machine's fastest product of two square matrices, "
        f"{bound['fp32'] / 1e9:,.0f} GFLOP/s in fp32 and {bound['bf16'] / 1e9:,.0f} in bf16.", "",
        *table(["", *TYPES, "GFLOP", f"share of the bound, {rule}", f"the default, {rule}"], rows)]


# --------------------------------------------------------------------------------------------------
# 2. Threads and neighbours; 3. growth

def neighbours(pipe, args):
    """{threads and neighbour: seconds of sampling and of tuning}, of the first stage."""
    steps, images = (2, 1) if args.quick else (6, 4)
    works = {f"sampling, {images} images, {steps} steps": sampling(pipe, 1, images, steps),
             f"tuning, {steps} steps": tuning(pipe, 1, steps)}
    results = {}
    for count in THREADS:
        for is_busy in (False, True):
            neighbour = busy_process() if is_busy else contextlib.nullcontext()
            with threads(count), neighbour:
                times = {name: median_seconds(work, args.repeats) for name, work in works.items()}
            title = f"{count} thread{'s' if count > 1 else ''}, "
            title += "with a busy process" if is_busy else "alone"
            results[title] = times
            say(title)
    return results


def growth(pipe, args):
    """{what grows: {its value: seconds}}, of the first stage."""
    images = (1, 4, 16)
    steps = (6, 18, 36)
    batches = (4, 8, 16)
    if args.quick:
        images = steps = batches = (1, 2)
    works = {
        f"images, {steps[0]} decoding steps":
            {n: sampling(pipe, 1, n, steps[0]) for n in images},
        f"decoding steps, {images[1]} images":
            {n: sampling(pipe, 1, images[1], n) for n in steps},
        "images in a batch of tuning, 5 steps":
            {n: tuning(pipe, 1, 5, n) for n in batches},
        "steps of tuning":
            {n: tuning(pipe, 1, n) for n in steps}}
    results = {}
    for axis, cells in works.items():
        results[axis] = {n: median_seconds(work, args.repeats) for n, work in cells.items()}
        say(axis)
    return results


# --------------------------------------------------------------------------------------------------
# The report and the command

def ms(seconds):
    return f"{1000 * seconds:,.0f} ms"


def report(results, where, rule):
    """The lines of speed.md. where: machine, threads, precision and base, above every table."""
    lines = [*heading("Speed"), f"Load average before: {results['load']:.1f}. A time is the median "
             f"of {results['repeats']}.", "", "## The stages", "", where, "",
             *stages_report(results["stages"], results["bound"], rule)]
    if results["neighbours"]:
        columns = list(next(iter(results["neighbours"].values())))
        rows = [[title, *(ms(seconds) for seconds in one.values())]
                for title, one in results["neighbours"].items()]
        lines += ["## Threads and neighbours", "", f"{where} The first stage; the number of "
                  "threads is that of the row.", "", *table(["", *columns], rows)]
    rows = [[axis, str(value), ms(seconds)]
            for axis, cells in results["growth"].items() for value, seconds in cells.items()]
    lines += ["## Growth", "", f"{where} The first stage.", "", *table(["", "", "time"], rows)]
    return lines


def options():
    """The command's options."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--weights", type=filled, default=WEIGHTS, help="folder of the base")
    add("--device", choices=("cpu", "cuda"), default="cpu",
        help="where to compute (default: %(default)s)")
    add("--out", type=filled, default=str(RESULTS), help="folder of the results")
    add("--repeats", type=whole(1, 1000), default=5,
        help="runs that a time is the median of (default: %(default)s)")
    add("--quick", action="store_true", help="run everything once, at a small size")
    return parser


def main():
    args = options().parse_args()
    check_place(args.out)
    if args.quick:
        args.repeats = 1
    load = os.getloadavg()[0]
    pipe = StyleDrop.load(args.weights, args.device)
    rule = precision(args.device)
    results = dict(load=load, repeats=args.repeats, base=pipe.base_id, rule=rule)
    results["stages"] = stages(pipe, args)
    results["bound"] = bounds(pipe, args)
    results["neighbours"] = neighbours(pipe, args) if args.device == "cpu" else {}
    results["growth"] = growth(pipe, args)
    where = made_by(pipe)
    text = "\n".join(report(results, where, rule)) + "\n"
    write_text(Path(args.out) / "speed.md", text)
    write_json(Path(args.out) / "speed.json", dict(where=where, **results))
    say(text)


if __name__ == "__main__":
    run_command(main)
