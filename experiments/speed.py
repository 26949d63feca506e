"""Speed measured: against the machine's bound, over sizes, against an earlier commit, beside peers.

    python experiments/speed.py                     # results/speed.md, .json and .png; 5 minutes
    python experiments/speed.py --old FOLDER --port FOLDER
    python experiments/speed.py --quick --out FOLDER             # all of it, too small to mean much

--old: a checkout of an earlier commit with its weights. --port: one of aim-uofa/StyleDrop-PyTorch.
Peers run where they are installed; a row that was not measured says so. All but the last table is
of the CPU. What needs a process of its own (memory, other people's code) is a `case`.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from adapter import Adapter  # noqa: E402
from clip_feedback import Tokenizer  # noqa: E402
from commandline import Parser, peak_memory, run_command  # noqa: E402
from experiments.common import heading, table, write_png, write_text  # noqa: E402
from experiments.losses import ticks  # noqa: E402
from muse import PRESETS, Muse, MuseConfig, decode, masked_loss, random_mask  # noqa: E402
from pretrain.common import machine, optimisers_for, set_rate, update_average  # noqa: E402
from styledrop import (SECOND_SAMPLING, SECOND_TUNING, Sampling, StyleDrop, Tuning,  # noqa: E402
                       autocast, fast_bf16, guided_logits, style_prompt)
from vqgan import VQGAN, VQGANConfig  # noqa: E402

STYLE = "watercolor painting"
GROWTH = {"pictures": (1, 4, 16, 64), "steps": (6, 18, 36), "references": (1, 8, 32),
          "tokens": (64, 256, 1024), "width": (128, 384, 1024)}
QUICK = {"tokens": (16, 64)}
WHAT = {"pictures": "both stages, from prompts to pictures", "steps": "4 pictures, first stage",
        "references": "20 steps of tuning, first stage", "tokens": "4 pictures, random weights",
        "width": "4 pictures, random weights"}
KINDS = {                               # names of PyTorch's operations, in this order
    "products": r"addmm|mm|bmm|baddbmm|matmul|linear|.*conv.*|mkldnn.*",
    "attention": r".*scaled_dot_product.*|.*flash.*",
    "copies and casts": r"copy_|to|_to_copy|contiguous|clone|cat|stack|index.*|repeat|embedding.*"
                        r"|constant_pad_nd|fill_|zero_|zeros.*|full.*|empty.*|masked_fill.*",
    "drawing tokens": r"multinomial|topk|sort|argsort|cumsum|gather|rand.*|uniform_",
    "element-wise, norms, softmax": r"add.*|sub.*|mul.*|div.*|lerp.*|.*gelu.*|.*norm.*|.*softmax.*"
                                    r"|sum|mean|where|log|neg|exp|cos|l[te]|g[te]|eq|bitwise.*"
                                    r"|pow|sqrt|ceil|clamp.*|isfinite|abs|rsub|nll.*|argmax",
    "optimiser": r"Optimizer\.step.*", "other": r".*"}
PEER = dict(width=256, layers=6, heads=8, grid=16, codebook_size=1024)
STATES = 48                             # of the text, all of width 256: random, the same for all
DRIVER = """import sys, time, torch
from styledrop import StyleDrop
steps = int(sys.argv[1])
pipe = StyleDrop.load("weights/tiny", "cpu")
side, one = pipe.vqgan.config.resolution, {"superres": False} if hasattr(pipe, "superres") else {}
image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
tune = lambda n: pipe.tune(image, ["a house"], style="watercolor painting", steps=n, **one)
draw = lambda n: pipe.generate(["a cat", "a tree", "a house", "a boat"], style=adapter, steps=n,
                               lambda_a=0.5, lambda_b=1.0, seed=0, **one)
adapter, times = tune(2), [sum(p.numel() for p in pipe.muse.parameters())]
draw(2)
for work in (draw, tune):
    began = time.perf_counter()
    work(steps)
    times.append(time.perf_counter() - began)
print(*times)"""


# ---------------------------------------------------------------------------------------------
# Work and its time

def clocked(work):
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def timed(work, repeats=3, warm=None):
    """The least seconds of some calls; one that takes 4 s is not repeated. warm: called before."""
    (warm or work)()
    found = []
    while len(found) < repeats and sum(found) < 4:
        found.append(clocked(work))
    return min(found)


def random_pipe(device="cpu", **sizes):
    """A first stage of other sizes with random weights; `preset` names those not given."""
    torch.manual_seed(0)
    tokenizer = Tokenizer([])
    config = replace(PRESETS[sizes.pop("preset", "tiny")], vocab_size=tokenizer.vocab_size, **sizes)
    vqgan = VQGAN(VQGANConfig(codebook_size=config.codebook_size))
    return StyleDrop(vqgan.requires_grad_(False).eval(), Muse(config).requires_grad_(False).eval(),
                     tokenizer, device=device)


def new_adapter(pipe):
    """An adapter of both stages, as large as `tune` makes it."""
    generator = torch.Generator().manual_seed(0)
    theta = pipe.new_adapter(Tuning(), STYLE, generator)
    if pipe.superres is not None:
        c, two = pipe.superres.config, SECOND_TUNING
        theta.superres = Adapter(c.width, two.d_prj, c.depth, two.is_shared, generator)
    theta.about = dict(base=pipe.base, style=STYLE)
    return theta.requires_grad_(False).to(pipe.device)


def prompts(n):
    return [("a cat", "a tree", "a house", "a boat")[i % 4] for i in range(n)]


def random_ids(config, n):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.codebook_size, (n, config.tokens), generator=generator)


def sampling(pipe, n, theta, low=None, steps=18):
    """The work: tokens of n pictures by Eq. 4, of the second stage where `low` is given."""
    how, c = Sampling(lambda_a=0.5, lambda_a_content=0.5, gamma=0.0, steps=steps), prompts(n)
    how = how if low is None else replace(how, **SECOND_SAMPLING | dict(steps=min(steps, 12)))
    rngs = lambda: [torch.Generator(pipe.device).manual_seed(i) for i in range(n)]
    t = [style_prompt(words, STYLE) for words in c]
    return torch.no_grad()(lambda: pipe.sample_tokens(t, c, theta, None, how, rngs(), None, low))


def tuning(pipe, theta, steps, second=False):
    """The work: some steps of `fit`, of either stage."""
    G, how = (pipe.superres, SECOND_TUNING) if second else (pipe.muse, Tuning())
    theta = deepcopy(theta.superres if second else theta).requires_grad_(True)
    ids, low = (random_ids(c, 1).to(pipe.device) for c in (G.config, pipe.muse.config))
    return lambda: pipe.fit(theta, ids, prompts(1), replace(how, steps=steps),
                            torch.Generator().manual_seed(0), low=low if second else None)


def pretraining(batch):
    """The work: a step of pretrain/muse.py on random ids. Drawing images and E are not in it."""
    pipe = random_pipe()
    model, c = pipe.muse.train().requires_grad_(True), pipe.muse.config
    average = deepcopy(model).requires_grad_(False)
    muon, adamw = optimisers_for(model, [*model.blocks, *model.text_encoder.blocks], 2e-3)
    text_ids, ids = pipe.tokenizer(prompts(batch), c.text_length), random_ids(c, batch)
    mask = random_mask(batch, c.tokens, torch.Generator().manual_seed(0), 2)

    def step():
        with autocast("cpu"):
            logits = model(ids.masked_fill(mask, c.mask_id), *model.text_encoder(text_ids))
            loss = masked_loss(logits, ids, mask, label_smoothing=0.1)
        set_rate((muon, adamw), 1000, SimpleNamespace(steps=20000, lr=2e-3, warmup=100))
        muon.zero_grad()
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adamw.step()
        update_average(average, model, 1000)
    return step


def case(*words, python=None, cwd=ROOT):
    """A process of its own -> (what it printed, None) or (None, why it could not)."""
    command = python or [str(Path(__file__).resolve()), "--case"]
    done = subprocess.run([sys.executable, *command, *map(str, words)], cwd=cwd, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if not done.returncode:
        return done.stdout.splitlines()[-1], None
    error = (done.stderr.strip().splitlines() or ["killed"])[-1]
    if "ModuleNotFoundError" in error or "ImportError" in error:
        return None, "not installed"
    return None, f"did not run: {error.split(':')[0]}"


# ---------------------------------------------------------------------------------------------
# 1 and 2: the machine's bound, and where the time goes

def fastest_product(dtype, sizes):
    """GFLOP/s of the fastest square matrix product."""
    found = []
    for n in sizes:
        a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
        found.append(2e-9 * n ** 3 / timed(lambda: a @ b, 20))
    return max(found)


def operations(work):
    """Floating point operations of all matrix products; the CPU's attention is one of them."""
    aten = torch.ops.aten
    forward = lambda q, k, v, *rest, out_shape=None, **more: sdpa_flop_count(q, k, v)
    backward = lambda g, q, k, v, *rest, out_shape=None, **m: sdpa_backward_flop_count(g, q, k, v)
    mapping = {aten._scaled_dot_product_flash_attention_for_cpu: forward,
               aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return counter.get_total_flops()


def where(work):
    """{kind: share of the CPU time inside operations}, and the share of the time outside of any."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        seconds = clocked(work)
    found, total = dict.fromkeys(KINDS, 0.0), 0.0
    for event in profile.events():
        name, above = event.name.removeprefix("aten::"), event
        while above is not None and not above.name.startswith("Optimizer.step"):
            above = above.cpu_parent
        name = name if above is None else above.name
        kind = next(kind for kind, names in KINDS.items() if re.fullmatch(names, name))
        found[kind] += event.self_cpu_time_total
        total += event.self_cpu_time_total
    return {kind: x / total for kind, x in found.items()} | {
        "Python, of all time": max(0.0, 1 - total / 1e6 / seconds)}


def measure_work(args):
    """{work: operations, seconds, where the time goes}."""
    pipe, steps = StyleDrop.load(device="cpu"), 2 if args.quick else 18
    theta, low = new_adapter(pipe), random_ids(pipe.muse.config, 4)
    n, batch = (1, 4) if args.quick else (5, 64)
    ids = random_ids(pipe.superres.config, 4).view(4, 32, 32)
    work = {f"first stage, {k} picture{'s' * (k > 1)}": sampling(pipe, k, theta, steps=steps)
            for k in ((1, 4) if args.quick else (1, 4, 16))}
    work |= {"second stage, 4 pictures": sampling(pipe, 4, theta, low, steps),
             "tokens to 4 pictures, 128 px": torch.no_grad()(lambda: pipe.vqgan.decode(ids)),
             f"tuning, first stage, {n} steps": tuning(pipe, theta, n),
             f"tuning, second stage, {n} steps": tuning(pipe, theta, n, second=True),
             f"pretraining, a step of {batch}": pretraining(batch)}
    return {name: dict(operations=operations(x), seconds=timed(x, 3, lambda: None),
                       where=where(x)) for name, x in work.items()}


# ---------------------------------------------------------------------------------------------
# 3: growth

def growth(axis, value, steps):
    """Seconds of one work and this process's peak memory in MB."""
    value, pictures, more = int(value), 4, dict(superres=False, steps=int(steps))
    heads = {"heads": max(1, value // 64)} if axis == "width" else {}
    sizes = dict(grid=int(value ** 0.5)) if axis == "tokens" else dict(width=value, **heads)
    pipe = random_pipe(**sizes) if axis in ("tokens", "width") else StyleDrop.load(device="cpu")
    if axis == "pictures":
        pictures, more["superres"] = value, True
    if axis == "steps":
        more["steps"] = value
    theta, side = new_adapter(pipe), pipe.vqgan.config.resolution
    images = torch.rand(value if axis == "references" else 1, 3, side, side) * 2 - 1
    work = lambda: pipe.generate(prompts(pictures), theta, **more)
    if axis == "references":
        work = lambda: pipe.tune(images, prompts(value), STYLE, steps=20, superres=False)
    seconds = timed(work, 2, lambda: None)
    return dict(seconds=seconds, memory=peak_memory())


def plot(found):
    """Seconds over each axis (PIL). Grey: in proportion, from the first point."""
    sheet = Image.new("RGB", (240 * len(found), 190), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (axis, cells) in enumerate(found.items()):
        x, y = [int(value) for value in cells], [cell["seconds"] for cell in cells.values()]
        place = lambda a, b: (240 * i + 36 + 190 * a / max(x), 160 - 130 * b / max(y))
        draw.text((240 * i + 36, 6), f"seconds over {axis}", fill="black")
        for value in ticks(0, max(y)):
            draw.line([place(0, value), place(max(x), value)], fill="#ddd")
            draw.text(place(-0.02 * max(x), value), f"{value:g}", fill="#555", anchor="rm")
        end = min(max(x), x[0] * max(y) / y[0])
        draw.line([place(x[0], y[0]), place(end, y[0] * end / x[0])], fill="#aaa")
        draw.line([place(*point) for point in zip(x, y)], fill="#0b6e4f", width=2)
        for a, b in zip(x, y):
            draw.circle(place(a, b), 3, fill="#0b6e4f")
            draw.text((place(a, b)[0], 166), str(a), fill="#555", anchor="mt")
    return sheet


# ---------------------------------------------------------------------------------------------
# 4 and 5: an earlier commit, and peers

def old_and_new(old, steps, repeats):
    """{"parameters" | work: {"old" | "new": each repeat's}}, by turns; or words."""
    if old is None:
        return "Not measured: no --old was given."
    found = {"old": [], "new": []}
    for name, folder in [("old", old), ("new", ROOT)] * repeats:
        said, why = case(steps, python=["-c", DRIVER], cwd=folder)
        if why:
            return f"Not measured: the {name} code {why}."
        found[name].append([float(x) for x in said.split()])
    works = ("parameters", f"sampling, 4 pictures of 64 px, {steps} steps",
             f"tuning, {steps} steps of 8 pictures")
    return {work: {name: [row[i] for row in rows] for name, rows in found.items()}
            for i, work in enumerate(works)}


def our_peer(patch, equation):
    """Our model at the peers' size -> parameters, a sampler, a step of tuning."""
    c = MuseConfig(**PEER, patch=patch, token_width=256 // patch, text_width=256, text_layers=0)
    G, theta = Muse(c).requires_grad_(False), Adapter(256, 4, 6, True)
    text, mask = torch.randn(8, STATES, 256), torch.ones(8, STATES, dtype=torch.bool)
    optimiser, ids = torch.optim.Adam(theta.parameters()), random_ids(c, 8)

    def sample(steps):
        rngs, tuned = [torch.Generator().manual_seed(i) for i in range(4)], theta()

        def logits_fn(v, step):
            base, null = G(v, text[:4], mask[:4]), G(v, text[4:], mask[4:])
            in_style = base if equation == 1 else G(v, text[:4], mask[:4], tuned)
            return guided_logits(in_style, base, null, 0.5, 3.0)
        decode(logits_fn, 4, c.tokens, c.mask_id, steps, 1.0, rngs, top_k=8)

    def step():
        hidden = random_mask(8, c.tokens, torch.Generator().manual_seed(0), 2)
        logits = G(ids.masked_fill(hidden, c.mask_id), text, mask, theta())
        optimiser.zero_grad()
        masked_loss(logits, ids, hidden).backward()
        optimiser.step()
    return G, sample, step if equation == 4 else None


def muse_maskgit(folder):
    from muse_maskgit_pytorch import MaskGit, MaskGitTransformer, VQGanVAE, t5
    from transformers import T5Config
    t5.T5_CONFIGS["random"] = dict(config=T5Config(d_model=256))
    G = MaskGitTransformer(num_tokens=1024, seq_len=256, dim=256, depth=6, dim_head=32, heads=8,
                           t5_name="random")
    G.encode_text = lambda texts: torch.randn(len(texts), STATES, 256)
    whole = MaskGit(image_size=256, transformer=G, vae=VQGanVAE(dim=32, codebook_size=1024))
    del whole.vae                                            # tokens alone, as of the others
    whole.vae = SimpleNamespace(get_encoded_fmap_size=lambda side: 16, decode_from_ids=lambda x: x)
    return G, lambda steps: whole.generate(["a cat"] * 4, timesteps=steps), None


def amused(folder):
    from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel
    G = UVit2DModel(hidden_size=256, cond_embed_dim=256, micro_cond_encode_dim=64,
                    micro_cond_embed_dim=320, encoder_hidden_size=256, vocab_size=1025,
                    codebook_size=1024, in_channels=256, block_out_channels=256, num_res_blocks=1,
                    block_num_heads=8, num_hidden_layers=6, num_attention_heads=8,
                    intermediate_size=1024, sample_size=16)
    pipe = AmusedPipeline(None, None, None, G, AmusedScheduler(mask_token_id=1024))
    text, words = torch.randn(2, 4, STATES, 256), torch.randn(2, 4, 256)
    return G, lambda steps: pipe(
        prompt_embeds=words[0], encoder_hidden_states=text[0], negative_prompt_embeds=words[1],
        negative_encoder_hidden_states=text[1], num_inference_steps=steps, height=128, width=128,
        output_type="latent", generator=torch.Generator().manual_seed(0)), None


def port(folder):
    """Its U-ViT, its loop, and what its train_step does: its loss, and AdamW on its adapter."""
    sys.path.insert(0, folder)
    from libs.muse import MUSE
    from libs.uvit_t2i_vq import UViT
    G = UViT(img_size=16, embed_dim=256, depth=6, num_heads=8, clip_dim=256, codebook_size=1024,
             num_clip_token=STATES).requires_grad_(False).eval()
    law, text = MUSE(1024, "cpu", smoothing=0.1), torch.randn(8, STATES, 256)
    optimiser = torch.optim.AdamW(G.adapter.requires_grad_(True).parameters())
    ids = torch.randint(1024, (8, 256))

    def guided(x, context, scale, lambdaA=0.0, lambdaB=0.0):         # three passes, always
        base, null = G(x, context), G(x, text[4:])
        return guided_logits(G(x, context, use_adapter=True), base, null, lambdaA, lambdaB + scale)

    def sample(steps):
        how = SimpleNamespace(sample_steps=steps, scale=3.0, lambdaA=0.5, lambdaB=3.0)
        law.generate(SimpleNamespace(z_shape=(16, 16), sample=how), 4, guided, lambda ids: ids,
                     is_eval=True, context=text[:4])

    def step():
        labels, masked = law.sample(ids)
        optimiser.zero_grad()
        law.loss(G(masked, context=text, use_adapter=True), labels).backward()
        optimiser.step()
    return G, sample, step


PEERS = {                               # passes a step, and what makes it
    "ours, patch 1, Eq. 1": (2, lambda folder: our_peer(1, 1)),
    "ours, patch 2, Eq. 1": (2, lambda folder: our_peer(2, 1)),
    "muse-maskgit-pytorch": (2, muse_maskgit), "aMUSEd (diffusers)": (2, amused),
    "ours, patch 1, Eq. 4": (3, lambda folder: our_peer(1, 4)),
    "ours, patch 2, Eq. 4": (3, lambda folder: our_peer(2, 4)),
    "StyleDrop-PyTorch (port)": (6, port)}


def peer(name, steps, folder):
    """Seconds of sampling and of a tuning step, in fp32 and, where that is fast, in bf16."""
    torch.manual_seed(0)
    (G, sample, step), steps = PEERS[name][1](folder), int(steps)
    found = dict(parameters=sum(p.numel() for p in G.parameters()))
    for dtype in ("fp32", "bf16") if fast_bf16("cpu") else ("fp32",):
        works = {"sampling": lambda: sample(steps)} | ({"tuning step": step} if step else {})
        for word, work in works.items():
            try:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                    warm = (lambda: sample(2)) if word == "sampling" else None
                    found[f"{word}, {dtype}"] = timed(work, 3, warm)
            except RuntimeError:
                found[f"{word}, {dtype}"] = "fails"
    return found


# ---------------------------------------------------------------------------------------------
# 6, the report and the command

def on_gpu():
    """{preset: pictures a second}, random weights; or words."""
    if not torch.cuda.is_available():
        return "Not measured: no GPU here."
    found = {}
    for preset in ("tiny", "small"):
        pipe = random_pipe("cuda", preset=preset)
        theta = new_adapter(pipe)
        found[preset] = {"sampling": 16 / timed(sampling(pipe, 16, theta)),
                         "tuning": 20 * Tuning.batch / timed(tuning(pipe, theta, 20))}
    return found


def report(found, about):
    """The lines of speed.md."""
    ms = lambda x: x if isinstance(x, str) else f"{1000 * x:,.0f} ms"
    bound = found["bound"][about["dtype"]]
    lines = [*heading("Speed, measured"), f"{about['machine']}; {about['seconds']} seconds; load "
             f"average before {about['load']:.1f}. A time is the best of up to three.", "",
             "## Share of the machine's bound", "", "Fastest square matrix product in this run: "
             + "; ".join(f"{name} {x:,.0f} GFLOP/s" for name, x in found["bound"].items())
             + f". The share is of {about['dtype']}, in which G's products run; attention is "
             "always in fp32 on a CPU. Operations: those of all matrix products, attention and "
             "convolutions.", ""]
    work = found["work"]
    lines += table(["", "GFLOP", "time", "GFLOP/s", "share of the bound"], [
        [name, f"{x['operations'] / 1e9:,.1f}", ms(x["seconds"]),
         f"{(rate := x['operations'] / 1e9 / x['seconds']):,.0f}", f"{100 * rate / bound:.0f} %"]
        for name, x in work.items()])
    lines += ["Where the CPU's time inside PyTorch's operations goes, in % (torch.profiler); last, "
              "the share of all time, under the profiler, that is in none of them.", ""]
    lines += table(["", *(kinds := next(iter(work.values()))["where"])], [
        [name, *(f"{100 * x['where'][kind]:.0f}" for kind in kinds)] for name, x in work.items()])
    lines += ["## Growth", "", "With the peak memory of a process that does nothing else. With an "
              "adapter: three forward passes a step.", ""]
    lines += table(["", "", "time", "peak memory"], [
        [axis + f" ({WHAT[axis]})" * (not i), value, ms(x["seconds"]), f"{x['memory']:,.0f} MB"]
        for axis, cells in found["growth"].items() for i, (value, x) in enumerate(cells.items())])
    lines += ["![seconds over each](speed.png)", "", "## An earlier commit", ""]
    old, median = deepcopy(found["old"]), statistics.median
    if isinstance(old, str):
        lines += [old, ""]
    else:
        size = {k: median(x) / 1e6 for k, x in old.pop("parameters").items()}
        lines += [f"By turns, {about['repeats']} times each, medians; each has the base of its "
                  f"own commit: {size['old']:.1f} M parameters in {about['old']}, {size['new']:.1f}"
                  " M now. The first stage alone.", ""]
        lines += table(["", "old", "new", "old / new"], [
            [name, ms(median(x["old"])), ms(median(x["new"])),
             f"{median(x['old']) / median(x['new']):.2f}"] for name, x in old.items()])
    lines += ["## Peers at an equal size", "", "Random weights: width 256, 6 layers, 8 heads, 256 "
              f"tokens of 1,024, {STATES} states of text; tokens of 4 pictures in "
              f"{about['steps']} steps, guided; a tuning step of an adapter on 8 pictures. Each "
              "library's own loop and defaults, in fp32 and under autocast; T, E and D are in "
              "none. aMUSEd has convolutions besides; the port has 7 layers without "
              "cross-attention, and its loop draws each picture twice, without and with the "
              "adapter.", ""]
    columns = [f"{x}, {dtype}" for x in ("sampling", "tuning step") for dtype in found["bound"]]
    lines += table(["", "parameters", "passes a step", *columns], [
        [name, *([x] + ["-"] * (1 + len(columns)) if isinstance(x, str) else
                 [f"{x['parameters'] / 1e6:.1f} M", str(PEERS[name][0]),
                  *(ms(x.get(c, "-")) for c in columns)])]
        for name, x in found["peers"].items()])
    lines += ["## On a GPU", ""]
    if isinstance(found["gpu"], str):
        return [*lines, found["gpu"]]
    return lines + table(["random weights", "sampling, 16 at once", "tuning"], [
        [name, *(f"{v:,.0f} pictures/s" for v in x.values())] for name, x in found["gpu"].items()])


def measure_all(args):
    """All but the times: first what needs a small parent, since a child's peak begins at its."""
    quick, found = args.quick, {}
    steps, repeats = (2, 1) if quick else (18, 5)

    def measured(*words):
        said, why = case(*words)
        print(*words[:3], said or why, flush=True)
        return why or json.loads(said)

    found["growth"] = {axis: {str(x): measured("growth", axis, x, steps) for x in values}
                       for axis, values in (QUICK if quick else GROWTH).items()}
    found["peers"] = {name: "not measured: no --port was given" if maker is port and not args.port
                      else measured("peer", name, steps, args.port)
                      for name, (_, maker) in PEERS.items()}
    found["old"] = old_and_new(args.old, steps, repeats)
    sizes, dtypes = (256,) if quick else (512, 1024, 2048), {"fp32": torch.float32}
    if fast_bf16("cpu"):
        dtypes["bf16"] = torch.bfloat16
    found["bound"] = {name: fastest_product(dtype, sizes) for name, dtype in dtypes.items()}
    found["work"] = measure_work(args)
    found["gpu"] = on_gpu()
    return found, dict(steps=steps, repeats=repeats, dtype=[*dtypes][-1])


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--old", help="folder of an earlier commit, checked out")
    add("--port", help="folder of StyleDrop-PyTorch")
    add("--out", default="experiments/results")
    add("--quick", action="store_true", help="every path once")
    add("--case", nargs="+", help=argparse.SUPPRESS)
    args, began = parser.parse_args(), time.time()
    if args.case:
        name, *values = args.case
        print(json.dumps(dict(growth=growth, peer=peer)[name](*values)))
        return
    sys.argv = ["FOLDER" if word in (args.old, args.port) else word for word in sys.argv]
    args.port = args.port and str(Path(args.port).resolve())
    load = os.getloadavg()[0]
    found, about = measure_all(args)
    about["old"] = args.old and subprocess.run(
        ["git", "-C", args.old, "log", "-1", "--format=%h (%s)"], text=True,
        capture_output=True).stdout.strip()
    about |= dict(command=" ".join(["python", *sys.argv]), machine=machine(), load=load,
                  seconds=round(time.time() - began))
    text = "\n".join(report(found, about)) + "\n"
    write_text(Path(args.out) / "speed.md", text)
    write_text(Path(args.out) / "speed.json", json.dumps(about | found, indent=1) + "\n")
    write_png(Path(args.out) / "speed.png", plot(found["growth"]))
    print(text)


if __name__ == "__main__":
    run_command(main)
