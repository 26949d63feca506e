"""StyleDrop: the method (arXiv 2306.00983, Section 3), on a small Muse.

One reference image tunes an adapter (Eq. 3). Sampling weighs the tuned model, the base and the
base without text against each other (Eq. 4); two adapters are mixed (Eq. 5 and 6).

    pipe = StyleDrop.load()                                          # weights/tiny
    adapter = pipe.tune(images, ["a house"], style="watercolor painting")
    images = pipe.generate(["a cat", "a tree"], style=adapter)       # (2, 3, H, W) in [-1, 1]

Shapes: B batch, N image tokens, L text length, D width, V codebook size, R references.
"""

import contextlib
import hashlib
import math
import os
import platform
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call

import clip_feedback
import muse as muse_
from adapter import METHODS, Adapter, FullFineTuning, LoRA, TextualInversion
from clip_feedback import build, check_sizes, read_weights
from muse import Muse, MuseConfig
from vqgan import VQGAN, VQGANConfig

WEIGHTS = str(Path(__file__).parent / "weights" / "tiny")      # what ships
RARE_TOKEN = "[V*]"                     # some style: captions have it for one they do not name
AT_ONCE = 16                            # images in one batch: what bounds the memory


# --------------------------------------------------------------------------------------------------
# Equations

def style_prompt(content, style):
    """t of Section 3.2.1: "a cat", "watercolor" -> "a cat in watercolor style"."""
    return f"{content} in {style} style" if style else content


def guided_logits(tuned, base, null, lambda_a, lambda_b):
    """Eq. 4: l = G^(t) + lambda_A (G^(t) - G(t)) + lambda_B (G(t) - G(n)).

    tuned G^(v, T(t), theta), base G(v, T(t)), null G(v, T(n)): logits of one shape. lambda_A goes
    on past the tuned model (0: that model alone), away from the untuned; lambda_B away from the
    empty prompt, both by the untuned model. With tuned = base it is Eq. 1, whatever lambda_A is.
    """
    return tuned + lambda_a * (tuned - base) + lambda_b * (base - null)


def mix_logits(style, content, gamma):
    """Section 3.4: l = (1 - gamma) l_s + gamma l_c, of two results of `guided_logits`."""
    return (1 - gamma) * style + gamma * content


# --------------------------------------------------------------------------------------------------
# What can be set, with the paper's values (Table S3, 4.3) in brackets

LAMBDA_A, LAMBDA_A_WORDS = 0.5, 2.0     # strength of an adapter's style, and of one in words


@dataclass
class Sampling:
    """How images are drawn. In the second stage SECOND_SAMPLING takes the place of these."""
    lambda_a: float = None          # strength of the style [0 to 2]; None: LAMBDA_A or .._WORDS
    lambda_a_content: float = None  # the same of the content adapter; None: lambda_a, or LAMBDA_A
    lambda_b: float = 1.0           # strength of the text [5]
    gamma: float = 0.5              # of two adapters, 0: style, 1: content alone [0.5 to 0.7]
    steps: int = 18                 # of decoding [36]
    temperature: float = 1.0        # chance in which tokens are kept [4.5]; see muse.decode
    top_k: int = 8                  # tokens are drawn from so many likeliest; 0: from all
    negative: str = ""              # the prompt n
    style_phrase: object = None     # other words than the adapter's: one phrase, or one a prompt
    superres: bool = True           # draw the second stage too, where there is one


@dataclass
class Tuning:
    """How an adapter is tuned."""
    steps: int = 50                 # [1000]
    lr: float = None                # [3e-5]; None: LR of the method
    batch: int = 8                  # [8]
    d_prj: int = 4                  # H [4]; LoRA's rank
    is_shared: bool = True          # across depth [True]
    method: str = "adapter"         # one of adapter.METHODS
    mask_power: float = 2           # see muse.random_mask [1]
    superres: bool = True           # tune the second stage too, where there is one


LR = {"adapter": 1e-3, "full": 1e-4, "lora": 1e-3, "textual-inversion": 1e-2}

# The second stage (Table S3's third column; its tuning: [1000, 1e-4, 8, 32, False])
SECOND_SAMPLING = dict(lambda_a=1.0, lambda_a_content=1.0, lambda_b=0.0, steps=12)
SECOND_TUNING = Tuning(steps=60, batch=4, d_prj=8, is_shared=False, mask_power=1)


# --------------------------------------------------------------------------------------------------
# The pipeline

class StyleDrop:
    """E, D, T and G, frozen, with everything that tunes and samples them.

    tokenizer: T's BPE; words: the vocabulary of the training captions; superres: the second stage,
    or None; clip: the judge of feedback, a CLIP or the path of one, read when it is first needed.
    """

    def __init__(self, vqgan, muse, tokenizer, words=(), clip=None, superres=None, device="cpu"):
        self.vqgan, self.muse = vqgan.to(device), muse.to(device)
        self.superres = None if superres is None else superres.to(device)
        self.tokenizer, self.words, self._clip = tokenizer, set(words), clip
        self.device = torch.device(device)

    @classmethod
    def load(cls, weights=WEIGHTS, device=None):
        """The base in a folder of vqgan.pt, muse.pt, clip.pt and perhaps superres.pt.

        Raises ValueError in one line where a file is missing, damaged, or does not fit the others.
        """
        weights = Path(weights)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device)
        vqgan, _ = load_model(weights / "vqgan.pt", "vqgan", VQGANConfig, VQGAN)
        muse, saved = load_model(weights / "muse.pt", "muse", MuseConfig, Muse)
        superres, second, m = None, saved, muse.config
        if (weights / "superres.pt").exists():
            superres, second = load_model(weights / "superres.pt", "superres", MuseConfig, Muse)
        try:
            tokenizer = clip_feedback.Tokenizer(list(saved["merges"]))
            words = {word.lower() for word in saved["words"]}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{weights / 'muse.pt'} has no merges or words; "
                             "train it again") from None
        fits = (vqgan.config.codebook_size == m.codebook_size and tokenizer.vocab_size
                == m.vocab_size and vqgan.config.resolution == vqgan.config.factor * m.grid
                and m.text_layers > 0)
        if superres is not None:
            fits = (fits and second.get("merges") == saved["merges"] and superres.config.low_grid
                    == m.grid and superres.config.codebook_size == m.codebook_size)
        if not fits:
            raise ValueError(f"vqgan.pt, muse.pt and superres.pt in {weights} were not trained "
                             "together: their sizes or words differ")
        return cls(vqgan, muse, tokenizer, words, weights / "clip.pt", superres, device)

    @property
    def resolution(self):
        """Pixels a side of what it draws, and of the references it is tuned on."""
        return (self.superres or self.muse).config.grid * self.vqgan.config.factor

    @property
    def clip(self):
        """The judge of feedback."""
        if isinstance(self._clip, (str, Path)):
            self._clip = clip_feedback.load_clip(self._clip).requires_grad_(False).to(self.device)
        return self._clip

    @cached_property
    def base(self):
        """Fingerprint of both stages: what an adapter must have been tuned on."""
        second = self.superres.state_dict() if self.superres is not None else {}
        second = {f"second.{name}": w for name, w in second.items()}
        return fingerprint(self.muse.state_dict() | second)

    # -- tuning

    def tune(self, images, prompts, style="", seed=0, on_step=None, **tuning):
        """Eq. 3 for both stages. tuning: `Tuning` of the first; the second has SECOND_TUNING.

        images (R, 3, H, W) in [-1, 1], the references, of the pipeline's resolution (or of the
        first stage's, which then is all that is tuned); prompts: R content phrases; style: the
        phrase they share. on_step(step, steps, loss) after each step. Returns an adapter with
        .about and .save(path). Methods other than "adapter" tune the first stage alone.
        Raises ValueError where the numbers differ, or a loss is not finite.
        """
        how = Tuning(**tuning)
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} reference images need as many content phrases, "
                             f"not {len(prompts)}")
        if how.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}")
        texts = [style_prompt(prompt, style) for prompt in prompts]
        generator = torch.Generator().manual_seed(seed)
        images, side = images.to(self.device), self.vqgan.config.resolution
        if images.shape[-2:] not in ((side, side), (self.resolution, self.resolution)):
            raise ValueError(f"the references must be {self.resolution} pixels a side")
        small = F.interpolate(images, (side, side), mode="area")
        low = self.vqgan.encode(small).flatten(1)                                # (R, N)
        adapter = self.new_adapter(how, style, generator).to(self.device)
        self.fit(adapter, low, texts, how, generator, on_step)
        both = self.superres is not None and how.superres and how.method == "adapter"
        if both and images.shape[-1] == self.resolution:
            high, c, two = self.vqgan.encode(images).flatten(1), self.superres.config, SECOND_TUNING
            second = Adapter(c.width, two.d_prj, c.depth, two.is_shared, generator).to(self.device)
            self.fit(second, high, texts, two, generator, on_step, low)
            adapter.superres = second
        adapter.about = dict(asdict(how), base=self.base, style=style, prompts=list(prompts),
                             seed=seed)
        return adapter.eval().requires_grad_(False)

    def fit(self, theta, tokens, texts, how, generator, on_step=None, low=None):
        """Eq. 3: theta = argmin E_{(x, t), m} CE_m( G^(M(E(x), m), T(t), theta), E(x) ).

        tokens (R, N) of the references, texts: their R prompts, low (R, N_low): the first stage's
        tokens, for the second. Every reference is used, in shuffled passes. Only theta has
        gradients, and only theta changes.
        """
        G = self.muse if low is None else self.superres
        optimiser = torch.optim.Adam(theta.parameters(), how.lr or LR[how.method])
        text, text_mask = self.embed(G, texts)                       # (R, L, text_width), (R, L)
        order = torch.empty(0, dtype=torch.long)
        for step in range(how.steps):
            while len(order) < how.batch:
                order = torch.cat([order, torch.randperm(len(tokens), generator=generator)])
            rows, order = order[:how.batch].to(self.device), order[how.batch:]
            ids = tokens[rows]                                                   # (B, N)
            mask = muse_.random_mask(how.batch, ids.shape[1], generator, how.mask_power)
            mask = mask.to(self.device)
            if how.method == "textual-inversion":            # its theta is in the text
                text, _ = self.embed(G, texts, theta)
            inputs = (ids.masked_fill(mask, G.config.mask_id), text[rows], text_mask[rows], theta(),
                      None if low is None else low[rows])
            with autocast(self.device.type):
                logits = functional_call(G, theta.weights(G), inputs)            # (B, N, V)
            loss = muse_.masked_loss(logits, ids, mask)
            if not math.isfinite(loss.item()):
                raise ValueError(f"the loss is no number any more at step {step + 1}; "
                                 "give a lower --lr")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if on_step is not None:
                on_step(step, how.steps, loss.item())

    def new_adapter(self, how, style, generator):
        """A fresh theta of one of METHODS, with which G^ is still G. ValueError: no words."""
        G, c = self.muse, self.muse.config
        if how.method == "adapter":
            return Adapter(c.width, how.d_prj, c.depth, how.is_shared, generator)
        if how.method == "lora":
            return LoRA(c.width, how.d_prj, c.layers, generator)
        if how.method == "full":
            start = {name: p for name, p in G.named_parameters()
                     if not name.startswith("text_encoder.")}
            return FullFineTuning({name: p.shape for name, p in start.items()}, start)
        tokens = list(dict.fromkeys(self.tokenizer.encode(style)))
        if not tokens:
            raise ValueError("textual inversion learns the words of the style phrase; give one")
        table = G.text_encoder.token.weight
        return TextualInversion(tokens, table.shape[1], table[tokens])

    # -- sampling

    @torch.no_grad()
    def generate(self, prompts, style=None, content=None, seed=0, on_step=None, on_batch=None,
                 **sampling):
        """One image for each prompt: (B, 3, H, W) in [-1, 1]. sampling: the fields of `Sampling`.

        prompts: strings. With a style adapter they are content phrases, and its style phrase (or
        `style_phrase`) is appended: t. The content adapter sees them as they are: c.
        Style only: Eq. 4. Content only: Eq. 6. Both: (1 - gamma) Eq. 5 + gamma Eq. 6. Neither:
        Eq. 1, the base; with a style phrase, Eq. 4 with the phrase in the adapter's place:
        G(t) + lambda_a (G(t) - G(c)) + lambda_b (G(c) - G(n)).

        seed: image i is drawn with seed + i, whatever its batch; or a list, one for each.
        on_step: see muse.decode; it sees both stages of each batch. on_batch(done): after each
        batch of AT_ONCE images. Raises ValueError for an adapter of another base, and for more or
        fewer phrases or seeds than prompts.
        """
        s = Sampling(**sampling)
        c = [prompts] if isinstance(prompts, str) else list(prompts)
        phrases = s.style_phrase
        if phrases is None:
            phrases = style.about.get("style", "") if style else ""
        phrases = [phrases] * len(c) if isinstance(phrases, str) else list(phrases)
        seeds = [seed + i for i in range(len(c))] if isinstance(seed, int) else list(seed)
        if not c or s.steps < 1 or not 0 <= s.gamma <= 1:
            raise ValueError("give prompts, at least one step, and gamma from 0 to 1")
        if len(phrases) != len(c) or len(seeds) != len(c):
            raise ValueError(f"{len(phrases)} style phrases and {len(seeds)} seeds for {len(c)} "
                             "prompts; give one, or one for each")
        t = [style_prompt(*pair) for pair in zip(c, phrases)]
        for adapter, name in ((style, "style"), (content, "content")):
            if adapter is not None:
                self.check_adapter(adapter, name)

        in_words = style is None and t != c
        gamma = s.gamma if style is not None or in_words else 1.0
        default = LAMBDA_A_WORDS if in_words else LAMBDA_A
        first = replace(s, gamma=0.0 if content is None else gamma,
                        lambda_a=default if s.lambda_a is None else s.lambda_a)
        if s.lambda_a_content is None:
            first.lambda_a_content = LAMBDA_A if s.lambda_a is None else s.lambda_a
        second = replace(first, **SECOND_SAMPLING)
        images = []
        for i in range(0, len(c), AT_ONCE):
            b = slice(i, i + AT_ONCE)
            rngs = [torch.Generator(self.device).manual_seed(number) for number in seeds[b]]
            ids = self.sample_tokens(t[b], c[b], style, content, first, rngs, on_step)
            if self.superres is not None and s.superres:
                ids = self.sample_tokens(t[b], c[b], style, content, second, rngs, on_step, ids)
            side = math.isqrt(ids.shape[1])
            images.append(self.vqgan.decode(ids.view(-1, side, side)))
            if on_batch is not None:
                on_batch(min(i + AT_ONCE, len(c)))
        return torch.cat(images)

    def sample_tokens(self, t, c, style, content, s, generators, on_step=None, low=None):
        """Tokens (B, N) by Eq. 4 to 6: of the second stage where `low`, the first's, is given.

        t, c: B prompts, with and without the style phrase; style, content: adapters or None;
        s: Sampling with all of its numbers.
        """
        G = self.muse
        if low is not None:
            G = self.superres
            style, content = style and style.superres, content and content.superres
        tuned_s = base_s = self.forward_pass(G, t, low)
        if style is not None:
            tuned_s = self.forward_pass(G, t, low, style)                     # G^(v, T(t), theta_s)
        elif t != c and low is None:                         # a style in words: no adapter, but t
            base_s = self.forward_pass(G, c)
        tuned_c = base_c = self.forward_pass(G, c, low)
        if content is not None:
            tuned_c = self.forward_pass(G, c, low, content)                   # G^(v, T(c), theta_c)
        G_n = self.forward_pass(G, [s.negative] * len(t), low)

        def eq4(v, tuned, base, null, lambda_a):
            base_v = base(v)
            tuned_v = base_v if tuned is base else tuned(v)
            return guided_logits(tuned_v, base_v, null, lambda_a, s.lambda_b)

        def logits_fn(v, step):
            null = G_n(v) if s.lambda_b else 0.0
            l_s = eq4(v, tuned_s, base_s, null, s.lambda_a) if s.gamma < 1 else None     # Eq. 5
            if s.gamma == 0:
                return l_s
            l_c = eq4(v, tuned_c, base_c, null, s.lambda_a_content)                      # Eq. 6
            return l_c if s.gamma == 1 else mix_logits(l_s, l_c, s.gamma)

        return muse_.decode(logits_fn, len(t), G.config.tokens, G.config.mask_id, s.steps,
                            s.temperature, generators, s.top_k, on_step)

    def forward_pass(self, G, prompts, low=None, theta=None):
        """G(v, T(prompts)), or G^ with theta: a function of tokens v (B, N) -> logits (B, N, V)."""
        text, text_mask = self.embed(G, prompts, theta)
        weights, adapters = ({}, None) if theta is None else (theta.weights(G), theta())

        def forward(v):
            with autocast(self.device.type):
                return functional_call(G, weights, (v, text, text_mask, adapters, low))
        return forward

    def embed(self, G, prompts, theta=None):
        """T: B strings -> states (B, L, text_width), mask (B, L). theta may have its own words."""
        T = G.text_encoder
        ids = self.tokenizer(prompts, G.config.text_length).to(self.device)
        return T(ids) if theta is None else T(ids, theta.words(ids, T.token(ids)))

    def check_adapter(self, adapter, name):
        """Raise ValueError for an adapter of another base; else bring it to this device."""
        tuned_on = adapter.about.get("base")
        if tuned_on != self.base:
            raise ValueError(f"the {name} adapter was tuned on base {tuned_on}, these weights are "
                             f"{self.base}; tune it again, or give --weights of its base")
        adapter.to(self.device)


# --------------------------------------------------------------------------------------------------
# Arithmetic

def fast_bf16(device):
    """Does `device` multiply in bf16 several times as fast as in fp32?

    Recent CUDA GPUs do, and CPUs with AMX or AVX-512 BF16.
    """
    if device != "cpu":
        return device == "cuda"
    has = getattr(torch.cpu, "get_capabilities", dict)()                         # torch 2.9
    return has.get("amx_bf16", False) or has.get("avx512_bf16", False)


def check_device(device):
    """Raise ValueError where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA GPU here; use the device cpu")


def autocast(device):
    """G's products in bf16 where that is fast; elsewhere fp32. device: "cpu", "cuda", ..."""
    return torch.autocast(device, torch.bfloat16, enabled=fast_bf16(device))


# --------------------------------------------------------------------------------------------------
# Files: written whole or not at all; read as tensors, never as code

def partial_prefix():
    """How the names of this process's unfinished files and folders begin."""
    return f".partial-{platform.node()}-{os.getpid()}-"


def clear_leftovers(folder):
    """Remove what processes of this machine left unfinished in `folder` when they were killed."""
    start = f".partial-{platform.node()}-"
    for left in Path(folder).glob(f"{start}*") if os.name == "posix" else ():
        pid = re.fullmatch(r"([0-9]{1,9})-\w+", left.name.removeprefix(start))
        try:
            os.kill(int(pid[1]) if pid else 0, 0)            # signal 0: is there such a process?
        except ProcessLookupError:
            with contextlib.suppress(OSError):               # gone by now, or somebody else's
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        except PermissionError:                              # there is, and it is somebody else's
            pass


def write_whole(path, write):
    """Call write(binary file) on a temporary file and rename that: nobody sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=partial_prefix())
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_checkpoint(path, kind):
    """A dict of the given kind that torch.save wrote. Raises ValueError with one line otherwise."""
    if not Path(path).is_file():
        raise ValueError(f"no {kind} file at {path}")
    saved = read_weights(path)
    if saved.get("kind") != kind:
        raise ValueError(f"{path} is no {kind} file")
    return saved


def save_model(path, kind, model, provenance, **more):
    """Weights in half precision with their config and provenance: what weights/ ships."""
    weights = {name: (w.half() if w.is_floating_point() else w).cpu()
               for name, w in model.state_dict().items()}
    saved = dict(kind=kind, config=asdict(model.config), weights=weights, provenance=provenance)
    write_whole(path, lambda file: torch.save(saved | more, file))


def load_model(path, kind, config_class, model_class):
    """The model that `save_model` wrote, in fp32 and eval mode, and the dict that it came in."""
    saved = read_checkpoint(path, kind)

    def make():
        config = config_class(**saved["config"])
        check_sizes(config)
        return model_class(config)
    try:
        model = build(make, saved.get("weights"))
    except ValueError as error:
        raise ValueError(f"{path} does not fit this version's {model_class.__name__}: {error}; "
                         "train it again") from None
    return model.requires_grad_(False), saved


def fingerprint(tensors):
    """Twelve hex digits of a dict of tensors, by which an adapter names its base."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def load_adapter(path):
    """An adapter from its file, or from its run folder. Raises ValueError if it is neither."""
    path = Path(path)
    saved = read_checkpoint(path / "adapter.pt" if path.is_dir() else path, "adapter")

    def make():
        if not 0 < saved["config"].get("n_layer", 1) <= 256:
            raise ValueError("n_layer must be of another size")
        adapter = METHODS[saved["method"]](**saved["config"])
        if saved["superres"] is not None:
            adapter.superres = Adapter(**saved["superres"])
        return adapter
    try:
        adapter = build(make, saved.get("weights"))
        adapter.about = dict(saved["about"])
        if not all(isinstance(adapter.about.get(name, ""), str) for name in ("base", "style")):
            raise TypeError("about must hold words")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this version's adapters: {error}; "
                         "train it again") from None
    return adapter.requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Images

def to_tensor(images):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1


def to_uint8(images):
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
