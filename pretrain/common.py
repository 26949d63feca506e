"""What the stages share: options, batches, optimisers, the schedule, log and checkpoint.

Each stage is a script of its own; this file has the code that is not specific to one of them.
All randomness of a step follows from (seed, step), so a resumed run equals an uninterrupted one.
"""

import json
import math
import os
import platform
import signal
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
from checkpoint.files import check_place, write_text, write_whole
from checkpoint.weights import load_model, read_checkpoint
from clip_feedback import LONGEST_SYMBOL, Tokenizer, merge_pair, split_words
from commandline.options import Parser, filled, number, whole
from commandline.terminal import note, say
from muse import Muse, MuseConfig
from styledrop import WEIGHTS, check_device, fast_bf16, precision
from vqgan import VQGAN, VQGANConfig


# --------------------------------------------------------------------------------------------------
# Options

def stage_parser(stage, description, steps, batch, lr):
    """The options that all stages have. A stage adds its own."""
    parser = Parser(prog=f"python -m pretrain.{stage}", description=description)
    add = parser.add_argument
    add("--preset", choices=("toy", "tiny", "small"), default="tiny",
        help="the sizes of the model (default: %(default)s)")
    add("--data", type=filled,
        help="folder of images with captions (default: the drawings in data/)")
    add("--steps", type=whole(1, 10**8), default=steps,
        help="training steps, which also set the schedule (default: %(default)s)")
    add("--batch", type=whole(1, 65536), default=batch,
        help="batch size (default: %(default)s)")
    add("--reuse", type=whole(1, 64), default=1,
        help="how many training steps use each image; raise it if the GPU waits for images")
    add("--lr", type=number(float, 0, 1, above=True), default=lr,
        help="peak learning rate (default: %(default)s)")
    add("--seed", type=whole(0, 2**31), default=0, help="random seed (default: %(default)s)")
    add("--workers", type=whole(0, 256), default=1, help="processes that draw training images")
    add("--warmup", type=whole(1, 10**8), default=100,
        help="steps until the learning rate is at its peak (default: %(default)s)")
    add("--weights", type=filled, default=WEIGHTS,
        help="folder of the parts that were trained before, such as vqgan.pt")
    add("--out", type=filled, default=f"runs/{stage}", help="run folder (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (default: cuda where there is a GPU)")
    add("--log-seconds", type=number(float, 0, 86400), default=20,
        help="seconds between lines of the log (default: %(default)s)")
    add("--keep-minutes", type=number(float, 0, 86400), default=4,
        help="minutes between checkpoints (default: %(default)s)")
    return parser


def muse_parser(stage, description, steps, batch, mask_power):
    """stage_parser's options, and those of the stages that train a Muse."""
    parser = stage_parser(stage, description, steps, batch, lr=2e-3)
    add = parser.add_argument
    add("--mask-power", type=number(float, 0, 10, above=True), default=mask_power,
        help="exponent of the mask schedule; 1 is Muse's, above 1 masks more (default %(default)s)")
    add("--init", metavar="FILE",
        help="start from the weights of an earlier run; new words are added to its vocabulary")
    add("--compile", action="store_true",
        help="use torch.compile: faster steps, after a minute of compilation")
    return parser


def start(args, together=False):
    """Check the device, seed the initial weights, and join the other processes of torchrun.

    together: whether the stage can split a batch among several processes. Raises ValueError if it
    cannot and is started by torchrun.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so write_whole can clean up
    check_device(args.device)
    check_place(args.out)
    world = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if args.batch % args.reuse:
        raise ValueError(f"--batch {args.batch} must be a multiple of --reuse {args.reuse}")
    if world > 1 and not together:
        raise ValueError("torchrun is for pretrain.muse; start this stage without it")
    if args.batch % world:
        raise ValueError(f"--batch {args.batch} must be a multiple of the {world} processes")
    torch.manual_seed(args.seed)
    torch.backends.cudnn.allow_tf32 = False                 # so a GPU gives the tokens of a CPU
    if "LOCAL_RANK" in os.environ:                          # torchrun started us
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The first optimiser imports torch._dynamo, which imports this module, whose functions then
        # have the group as a default argument: its threads would outlive destroy_process_group. So
        # the module is imported before there is a group.
        from torch.distributed import nn  # noqa: F401
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")


def processes():
    """This process's number and how many there are: (0, 1) without torchrun."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def machine(device):
    """What a run on `device` computes with: "2 threads of Intel Xeon, bf16, torch 2.13.0".

    For logs and provenance. device: "cpu", "cuda", or a torch.device.
    """
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{name}, {precision('cuda')}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        if names:
            model = names[0]
    count = torch.get_num_threads()
    threads = "1 thread" if count == 1 else f"{count} threads"
    return f"{threads} of {model}, {precision('cpu')}, torch {torch.__version__}"


# --------------------------------------------------------------------------------------------------
# The vocabulary

def train_merges(texts, n_merges, earlier=()):
    """Learn BPE merges (Sennrich et al. 2016) by repeatedly joining the most frequent pair.

    Ties go to the lexicographically first pair, so the same texts give the same merges everywhere.
    earlier: the merges of an existing vocabulary, to which new ones are added. Returns pairs of
    symbols in merge order: the earlier ones, then n_merges new ones, or fewer when every word has
    become one symbol.
    """
    counts = Counter(word for text in texts for word in split_words(text))
    before = Tokenizer(earlier)
    words = [before.pieces(word) for word in counts]
    weight = list(counts.values())
    pairs = Counter()                            # pair -> its count
    where = defaultdict(set)                     # pair -> the words with it

    def count_word(w, sign):
        for pair in zip(words[w], words[w][1:]):
            if len(pair[0]) + len(pair[1]) > LONGEST_SYMBOL:
                continue                         # a symbol this long is from a web address
            pairs[pair] += sign * weight[w]
            if sign > 0:
                where[pair].add(w)
            else:
                where[pair].discard(w)
            if not pairs[pair]:
                del pairs[pair], where[pair]

    for w in range(len(words)):
        count_word(w, +1)
    merges = []
    while pairs and len(merges) < n_merges:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for w in list(where[best]):              # only these words change
            count_word(w, -1)
            words[w] = merge_pair(words[w], best)
            count_word(w, +1)
    return [*before.merges, *merges]


MERGES = 10_000                         # an upper limit that lets every word become one token


def initial_muse(init, kind, config, words):
    """The model of a stage and its tokenizer: new, or from the file `init` of an earlier run.

    Words that the earlier vocabulary lacks are appended to it: old tokens keep their embeddings in
    T, and new ones are initialised at random. Raises ValueError if the file has other sizes.
    """
    if init is None:
        tokenizer = Tokenizer(train_merges(words, MERGES))
        return Muse(replace(config, vocab_size=tokenizer.vocab_size)), tokenizer
    earlier, saved = load_model(init, kind, MuseConfig, Muse)
    try:
        fits = Tokenizer(saved["merges"]).vocab_size == earlier.config.vocab_size
    except (KeyError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"the merges in {init} do not fit its model's vocabulary; train it again")
    tokenizer = Tokenizer(train_merges(words, MERGES, saved["merges"]))
    config = replace(config, vocab_size=tokenizer.vocab_size)
    if replace(earlier.config, vocab_size=config.vocab_size) != config:
        raise ValueError(f"{init} has other sizes than this run; give the same --preset and "
                         "--weights, or leave --init out")
    model = Muse(config)
    weights = earlier.state_dict()
    name = "text_encoder.token.weight"
    rows = model.state_dict()[name].clone()
    rows[:len(weights[name]) - 2] = weights[name][:-2]
    rows[-2:] = weights[name][-2:]               # start and end of a text are the last tokens
    model.load_state_dict(weights | {name: rows})
    return model, tokenizer


# --------------------------------------------------------------------------------------------------
# Batches

def image_source(args, size, **settings):
    """Training images of `size` x `size` pixels: the drawings of data/, or the folder of --data.

    settings: of data.Art; a folder has none.
    """
    if not args.data:
        return data.Art(size=size, **settings)
    folder = data.Folder(args.data, size)
    is_first = not hasattr(args, "data_fingerprint")     # superres and clip read the folder twice
    if folder.skipped and is_first:
        count = len(folder.skipped)
        names = ", ".join(folder.skipped[:5])
        note(f"{args.data} has {count} unused file{'s' if count > 1 else ''} (not a picture with a "
             f"caption): {names}{', ...' if count > 5 else ''}")
    args.data_fingerprint = folder.fingerprint               # part of the run's recipe
    return folder


class Steps(torch.utils.data.Dataset):
    """Item number `step`: the images and captions of that training step, always the same ones.

    sources: what draws them; several draw the same images, each at its own resolution.
    An item is a list: uint8 (n, H, W, 3) from each source, then the captions' BPE ids (n, L).
    """

    def __init__(self, sources, sizes, n, seed, tokenizer=None, length=0):
        self.sources = sources
        self.sizes = sizes
        self.n = n
        self.seed = seed
        self.tokenizer = tokenizer
        self.length = length

    def __len__(self):
        return 2 ** 31

    def __getitem__(self, step):
        item = []
        for source, size in zip(self.sources, self.sizes):
            images, captions = source.batch(self.n, np.random.default_rng((self.seed, step)), size)
            item.append(torch.from_numpy(images))
        if self.tokenizer is not None:
            item.append(self.tokenizer(captions, self.length))
        return item


class Replay:
    """Batches in which one image in `reuse` is new and the others come from recent steps.

    With a GPU, drawing an image on the CPU takes longer than a training step on it. Masked anew, an
    old image is nearly as useful as a new one.
    """

    WINDOW = 256                        # steps whose images are kept

    def __init__(self, batch, reuse, window=None):
        self.batch = batch
        self.fresh = batch // reuse
        self.window = window or self.WINDOW
        self.kept = None
        self.count = 0

    def __call__(self, new, generator):
        """new: a list of tensors (fresh, ...) -> a list of tensors (batch, ...), new ones first."""
        if self.fresh == self.batch:
            return new
        if self.kept is None:
            self.kept = [x.new_empty(self.window * self.fresh, *x.shape[1:]) for x in new]
        place = (self.count % self.window) * self.fresh
        for kept, x in zip(self.kept, new):
            kept[place:place + self.fresh] = x
        self.count += 1
        n = min(self.count, self.window) * self.fresh
        # rows are counted back from the newest, so that a resumed run draws the same images
        ago = torch.randint(n, (self.batch - self.fresh,), generator=generator,
                            device=generator.device)
        rows = (place + self.fresh - 1 - ago) % len(self.kept[0])
        return [torch.cat([x, kept[rows]]) for kept, x in zip(self.kept, new)]


def batches(args, steps, first):
    """Yield (step, item on the device, generator of the step), from step `first` on.

    steps: a Steps. If images are reused, it starts earlier, so that `Replay` can be filled.
    """
    if first >= args.steps:
        return
    first = first if args.reuse == 1 else max(0, first - Replay.WINDOW)
    cuda = args.device == "cuda"
    loader = torch.utils.data.DataLoader(
        steps, batch_size=None, sampler=range(first, args.steps), num_workers=args.workers,
        pin_memory=cuda, prefetch_factor=8 if args.workers else None)
    for step, item in zip(range(first, args.steps), loader):
        generator = torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + step)
        yield step, [x.to(args.device, non_blocking=True) for x in item], generator


# --------------------------------------------------------------------------------------------------
# Optimisers

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): orthogonalised momentum, for the matrices of hidden layers.

    Like torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but it updates all matrices of a
    shape together, which is faster on a GPU, and uses bf16 only where that is fast (see fast_bf16).
    """

    def __init__(self, parameters, lr, weight_decay=0.05, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, ps in shapes.items():
                state = self.state[ps[0]]                   # one for all matrices of this shape
                grad = torch.stack([p.grad for p in ps])                        # (n, rows, columns)
                momentum = state.setdefault("momentum", torch.zeros_like(grad))
                momentum.lerp_(grad, 1 - group["momentum"])
                update = orthogonal(grad.lerp(momentum, group["momentum"]))      # Nesterov
                scale = 0.2 * group["lr"] * max(shape) ** 0.5                  # as large as AdamW's
                torch._foreach_mul_(ps, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(ps, list(update.unbind()), alpha=scale)


def orthogonal(x):
    """x (n, rows, columns) -> nearly orthogonal matrices near it, by five Newton-Schulz steps."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x.bfloat16() if fast_bf16(x.device.type) else x
    x = x / x.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-7)
    for _ in range(5):                                      # moves every singular value towards 1
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)                   # (n, rows, rows)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return (x.mT if tall else x).float()


def optimisers_for(model, blocks, lr):
    """Muon for the matrices inside `blocks`, AdamW for all other parameters.

    Norms, biases and other vectors are not decayed.
    """
    hidden = [p for block in blocks for p in block.parameters() if p.dim() == 2]
    ids = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    groups = [dict(params=[p for p in rest if p.dim() > 1], weight_decay=0.05),
              dict(params=[p for p in rest if p.dim() <= 1], weight_decay=0.0)]
    fused = next(model.parameters()).is_cuda
    return [Muon(hidden, lr), torch.optim.AdamW(groups, lr, betas=(0.9, 0.96), fused=fused)]


def set_rate(optimisers, step, args):
    """A squared cosine from the peak to 2 % of it, with linear warm-up, times a group's `share`."""
    rate = 0.02 + 0.98 * math.cos(math.pi / 2 * step / args.steps) ** 2
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = args.lr * group.get("share", 1) * rate * min(1, (step + 1) / args.warmup)


@torch.no_grad()
def update_average(average, model, step, decay=0.999):
    """Update the exponential moving average of the weights; at first it is over fewer steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


# --------------------------------------------------------------------------------------------------
# The run folder

class Run:
    """log.jsonl and checkpoint.pt of one stage in args.out, and where to resume.

    parts: name -> model or optimiser, all that a checkpoint holds. `.step` is the first step to
    take. Raises ValueError, with a one-line message, if the folder holds another run.
    """

    FREE = ("out", "device", "workers", "log_seconds", "keep_minutes")      # may differ on a resume

    def __init__(self, stage, args, **parts):
        self.stage = stage
        self.args = args
        self.parts = parts
        self.out = Path(args.out)
        self.step = 0
        self.minutes = 0.0
        self.recipe = {k: v for k, v in vars(args).items() if k not in self.FREE}
        self.rank, _ = processes()
        if (self.out / "checkpoint.pt").exists():
            self.resume(read_checkpoint(self.out / "checkpoint.pt", f"{stage} checkpoint"))
        else:
            for name in (f"{stage}.pt", "adapter.pt"):
                if (self.out / name).exists():
                    raise ValueError(f"{self.out} already has {name}; give another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        self.began = self.logged_at = self.kept_at = time.time()
        self.logged = self.step              # the step of the last line of the log
        self.sums = {}                       # {figure: its sum since then}
        self.counts = {}                     # {figure: the number of steps that had it}

    def resume(self, saved):
        path = self.out / "checkpoint.pt"
        recipe = saved["recipe"] if isinstance(saved.get("recipe"), dict) else {}
        others = [k for k, v in self.recipe.items() if recipe.get(k) != v]
        if others:
            options = ", ".join(dict.fromkeys(
                "--" + name.removesuffix("_fingerprint").replace("_", "-") for name in others))
            raise ValueError(f"{path} was made with other values of {options}; give the same "
                             "command, or another --out")
        try:
            for name, part in self.parts.items():
                part.load_state_dict(saved["parts"][name])
            step = saved["step"]
            if type(step) is not int or not 0 <= step <= self.args.steps:
                raise ValueError                             # reworded below
            self.step = step
            self.minutes = float(saved["minutes"])
        except (KeyError, RuntimeError, ValueError, TypeError):
            raise ValueError(f"{path} does not fit this version; give another --out") from None
        if self.rank == 0:
            over = self.step == self.args.steps
            say(f"{self.out} is finished" if over else f"resuming from step {self.step} of {path}")
            log = self.out / "log.jsonl"
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            lines = [line + "\n" for line in lines if step_of(line) <= self.step]
            write_text(log, "".join(lines))

    def log(self, done, **figures):
        """Add a step's figures; every --log-seconds print their means over the steps that had them.

        Tensors are read only then, since each reading makes a GPU wait. Raises ValueError if the
        loss is NaN or infinite.
        """
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        now = time.time()
        if now - self.logged_at < self.args.log_seconds and done < self.args.steps:
            return
        n = done - self.logged
        means = {name: round(float(value) / self.counts[name], 5)
                 for name, value in self.sums.items()}
        self.check(done, torch.tensor(means["loss"]))
        if self.rank == 0:
            speed = n * self.args.batch / max(now - self.logged_at, 1e-9)
            left = int((self.args.steps - done) * self.args.batch / speed)
            words = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
            say(f"step {done}/{self.args.steps}  {words}  {speed:.0f} images/s  "
                f"{left // 60}:{left % 60:02d} left")
            line = dict(step=done, images=done * self.args.batch, **means,
                        minutes=round(self.spent(), 2))
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        self.logged_at = now
        self.logged = done
        self.sums = {}
        self.counts = {}

    def spent(self):
        """Minutes that the run has taken, with those before it was resumed."""
        return self.minutes + (time.time() - self.began) / 60

    def check(self, done, *values):
        """Raise ValueError if a tensor is NaN or infinite, before anything is overwritten."""
        if not all(value.isfinite().all() for value in values):
            raise ValueError(f"the loss is NaN or infinite at step {done}; the last checkpoint "
                             "is kept. Give a lower --lr, and another --out")

    def due(self, done):
        """Is it time to save after `done` steps? If so, check the weights first (see `check`)."""
        late = time.time() - self.kept_at > self.args.keep_minutes * 60
        if self.rank > 0 or not (late or done == self.args.steps):
            return False
        self.check(done, *(torch.as_tensor(value) for value in self.sums.values()))
        models = [part for part in self.parts.values() if isinstance(part, torch.nn.Module)]
        self.check(done, *(x.half() for model in models for x in model.state_dict().values()))
        return True

    def provenance(self, done):
        """A dict that says how the weights were made."""
        a = self.args
        return dict(stage=self.stage, steps=done, batch=a.batch, reuse=a.reuse,
                    images=done * a.batch, painted=done * a.batch // a.reuse, lr=a.lr, seed=a.seed,
                    data=a.data or "data/", minutes=round(self.spent(), 1),
                    machine=machine(a.device))

    def keep(self, done):
        """Write the checkpoint. Call this last: it says that the other files are complete."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        saved = dict(kind=f"{self.stage} checkpoint", step=done, minutes=self.spent(),
                     recipe=self.recipe, parts=parts)
        write_whole(self.out / "checkpoint.pt", lambda file: torch.save(saved, file))
        self.kept_at = time.time()
        if done == self.args.steps:
            say(f"{self.out / self.stage}.pt: copy it to the folder of --weights")


def step_of(line):
    """The step in a line of the log; infinity if the line is incomplete (the run was killed)."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf


# --------------------------------------------------------------------------------------------------
# Parts that were trained before

def load_vqgan(args, grid):
    """The frozen tokenizer. Raises ValueError unless its token grid has `grid` rows and columns."""
    path = Path(args.weights) / "vqgan.pt"
    model = load_model(path, "vqgan", VQGANConfig, VQGAN)[0].to(args.device)
    side = model.config.resolution // model.config.factor
    if side != grid:
        raise ValueError(f"{path} gives {side} x {side} tokens, the preset {args.preset} has "
                         f"{grid} x {grid}; give another --preset, or the --weights that go with "
                         "it")
    return model

