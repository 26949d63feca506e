"""StyleDrop: the method (arXiv 2306.00983, Section 3), on a small Muse.

One reference image teaches an adapter (Eq. 3); sampling weighs the tuned model, the base and the
base without text against each other (Eq. 4); two adapters are mixed (Eq. 5 and 6).

    pipe = StyleDrop.load()                                          # weights/tiny
    adapter = pipe.tune(images, ["a house"], style="watercolor painting")
    images = pipe.generate(["a cat", "a tree"], style=adapter)       # (2, 3, H, W) in [-1, 1]

Shapes: B batch, N image tokens, L text length, D width, V codebook size.
"""

import argparse
import difflib
import hashlib
import math
import os
import re
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.func import functional_call

import clip_feedback
import muse as muse_
from adapter import METHODS, Adapter, FullFineTuning, LoRA, TextualInversion, Tuned
from muse import Muse, MuseConfig
from vqgan import VQGAN, VQGANConfig

WEIGHTS = str(Path(__file__).parent / "weights" / "tiny")      # what ships
RARE_TOKEN = "[V*]"                     # a style phrase that means nothing yet (Section 4.4.1)


# ---------------------------------------------------------------------------------------------
# Equations

def style_prompt(content, style):
    """t of Section 3.2.1: "a cat" + "watercolor painting" -> "a cat in watercolor painting style"."""
    return f"{content} in {style} style" if style else content


LAMBDA_A, LAMBDA_A_WORDS = 1.0, 2.0     # the strength of an adapter's style, and of one in words


def guided_logits(tuned, base, null, lambda_a, lambda_b):
    """Eq. 4: l = G^(t) + lambda_A (G^(t) - G(t)) + lambda_B (G(t) - G(n)).

    tuned G^(v, T(t), theta), base G(v, T(t)), null G(v, T(n)): logits of one shape. lambda_A pulls
    from the untuned to the tuned model, lambda_B from the empty prompt to the text, and both of
    ITS terms are the untuned model's. With tuned = base and lambda_a = 0 it is Eq. 1.
    """
    return tuned + lambda_a * (tuned - base) + lambda_b * (base - null)


def mix_logits(style, content, gamma):
    """Section 3.4: l = (1 - gamma) l_s + gamma l_c, of two results of `guided_logits`."""
    return (1 - gamma) * style + gamma * content


# ---------------------------------------------------------------------------------------------
# Arithmetic

def fast_bf16(device):
    """Does it multiply in bf16 several times as fast as in fp32? CUDA; CPUs with AMX or AVX-512 BF16."""
    cpu_has = lambda what: getattr(torch.cpu, f"_is_{what}_supported", lambda: False)()
    return device == "cuda" or device == "cpu" and (cpu_has("amx_tile") or cpu_has("avx512_bf16"))


def autocast(device):
    """G's products in bf16 where that is fast; elsewhere fp32. device: "cpu", "cuda", ..."""
    return torch.autocast(device, torch.bfloat16, enabled=fast_bf16(device))


# ---------------------------------------------------------------------------------------------
# Files: written whole or not at all, read with weights_only=True

def write_whole(path, write):
    """Call write(binary file) on a temporary file and rename it to `path`: nobody sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_checkpoint(path, kind):
    """A dict written by torch.save, of the given kind. Raises ValueError with one line otherwise."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no {kind} file at {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:                                     # pickle, zip and torch all have their own
        raise ValueError(f"{path} is damaged or no {kind} file; fetch or train it again") from None
    if not isinstance(saved, dict) or saved.get("kind") != kind:
        raise ValueError(f"{path} is no {kind} file")
    return saved


def save_model(path, kind, model, provenance, **more):
    """Weights in half precision with their config and provenance: what weights/ ships."""
    weights = {k: (v.half() if v.is_floating_point() else v).cpu() for k, v in model.state_dict().items()}
    saved = dict(kind=kind, config=asdict(model.config), weights=weights, provenance=provenance, **more)
    write_whole(path, lambda file: torch.save(saved, file))


def load_model(path, kind, config_class, model_class):
    """The model that `save_model` wrote, in full precision and eval mode, and the dict it came in."""
    saved = read_checkpoint(path, kind)
    try:
        model = model_class(config_class(**saved["config"]))
        model.load_state_dict(saved["weights"])     # strict: no key is filled or dropped in silence
    except (KeyError, TypeError, RuntimeError):
        raise ValueError(f"{path} does not fit this version's {model_class.__name__}; train it again") from None
    return model.float().eval().requires_grad_(False), saved


def fingerprint(tensors):
    """Twelve hex digits of a dict of tensors: an adapter names the base it was tuned on by them."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def save_adapter(adapter, path):
    """Both stages' adapters in one file."""
    method = next(name for name, kind in METHODS.items() if type(adapter) is kind)
    saved = dict(kind="adapter", method=method, config=adapter.config, weights=adapter.state_dict(),
                 superres=adapter.superres and adapter.superres.config, about=adapter.about)
    write_whole(path, lambda file: torch.save(saved, file))


Tuned.save = save_adapter               # adapter.save(path)


def load_adapter(path):
    """An adapter from its file, or from the run folder that holds it. Raises ValueError if it is neither."""
    path = Path(path)
    saved = read_checkpoint(path / "adapter.pt" if path.is_dir() else path, "adapter")
    try:
        adapter = METHODS[saved["method"]](**saved["config"])
        if saved["superres"] is not None:
            adapter.superres = Adapter(**saved["superres"])
        adapter.load_state_dict(saved["weights"])
        adapter.about = dict(saved["about"])
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise ValueError(f"{path} does not fit this version's adapters; train it again") from None
    return adapter.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------
# Pictures

def to_tensor(images):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1


def to_uint8(images):
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def grid(images, columns, scale=1, gap=2):
    """uint8 (B, H, W, 3) -> one PIL image, row by row, each `scale` times as large."""
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h * scale + gap) + gap, columns * (w * scale + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * (h * scale + gap), gap + i % columns * (w * scale + gap)
        sheet[y:y + h * scale, x:x + w * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(sheet)


# ---------------------------------------------------------------------------------------------
# What can be set, with the paper's values (Table S3) in brackets

@dataclass
class Sampling:
    """How pictures are drawn. The second stage has lambda_A 1, lambda_B 0 and 12 steps, as there."""
    lambda_a: float = None          # strength of a style [0 to 2]; None: LAMBDA_A or LAMBDA_A_WORDS
    lambda_a_content: float = None  # the same of the content adapter; None: as lambda_a
    lambda_b: float = 1.0           # strength of the text [5]
    gamma: float = 0.5              # of two adapters, 0: style alone, 1: content alone [0.5 to 0.7]
    steps: int = 18                 # of decoding [36]
    temperature: float = 1.0        # chance in which tokens are kept [4.5]; see muse.decode
    top_k: int = 8                  # tokens are drawn from so many likeliest (0: all)
    negative: str = ""              # the prompt n
    style_phrase: object = None     # other words than the adapter's: one phrase, or one a prompt
    superres: bool = True           # draw the second stage too, where there is one


@dataclass
class Tuning:
    """How an adapter is tuned."""
    steps: int = 50                 # [1000]
    lr: float = 1e-3                # [3e-5]
    batch: int = 8                  # [8]
    d_prj: int = 4                  # H [4]; LoRA's rank
    is_shared: bool = True          # across depth [True]
    method: str = "adapter"         # one of adapter.METHODS
    mask_power: float = 2           # see muse.random_mask [1]
    superres: bool = True           # tune the second stage too, where there is one


SECOND = Tuning(steps=60, lr=1e-3, batch=4, d_prj=8, is_shared=False, mask_power=1)
#        [1000]           [1e-4]   [8]      [32]     [False]          [1]


# ---------------------------------------------------------------------------------------------
# The pipeline

class StyleDrop:
    """E, D, T and G, frozen, with everything that tunes and samples them.

    tokenizer: T's BPE; words: the vocabulary of the training captions; superres: the second stage,
    or None; clip: the judge of feedback, a CLIP or the path of one, read when it is first needed.
    """

    def __init__(self, vqgan, muse, tokenizer, words=(), clip=None, superres=None, device="cpu"):
        self.vqgan, self.muse = vqgan.to(device), muse.to(device)
        self.superres = None if superres is None else superres.to(device)
        self.tokenizer, self.words, self._clip = tokenizer, {w.lower() for w in words}, clip
        self.device = torch.device(device)

    @classmethod
    def load(cls, weights=WEIGHTS, device=None):
        """The base in a folder of vqgan.pt, muse.pt, clip.pt and perhaps superres.pt.

        Raises ValueError in one line.
        """
        weights = Path(weights)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device)
        vqgan, _ = load_model(weights / "vqgan.pt", "vqgan", VQGANConfig, VQGAN)
        muse, saved = load_model(weights / "muse.pt", "muse", MuseConfig, Muse)
        superres = None
        if (weights / "superres.pt").exists():
            superres, second = load_model(weights / "superres.pt", "superres", MuseConfig, Muse)
            if second.get("merges") != saved.get("merges"):
                raise ValueError(f"superres.pt in {weights} has other words than muse.pt; train it again")
        try:
            tokenizer, words = clip_feedback.Tokenizer(saved["merges"]), set(saved["words"])
        except (KeyError, TypeError, ValueError, OSError):
            raise ValueError(f"{weights / 'muse.pt'} has no merges or words; train it again") from None
        return cls(vqgan, muse, tokenizer, words, weights / "clip.pt", superres, device).check()

    def check(self):
        """Raise ValueError unless the parts speak of the same tokens and text."""
        v, m, second = self.vqgan.config, self.muse.config, self.superres and self.superres.config
        if v.codebook_size != m.codebook_size or v.resolution // v.factor != m.grid:
            raise ValueError("vqgan.pt and muse.pt were not trained together: their sizes differ")
        if second and (second.codebook_size != m.codebook_size or second.low_grid != m.grid):
            raise ValueError("superres.pt and muse.pt were not trained together: their sizes differ")
        if self.tokenizer.vocab_size != m.vocab_size:
            raise ValueError("muse.pt has another vocabulary than its own merges make; train it again")
        return self

    @property
    def resolution(self):
        """Pixels a side of what it draws, and of the references it is tuned on."""
        return (self.superres or self.muse).config.grid * self.vqgan.config.factor

    @property
    def clip(self):
        """The judge."""
        if isinstance(self._clip, (str, Path)):
            self._clip = clip_feedback.load_clip(self._clip).requires_grad_(False).to(self.device)
        return self._clip

    @property
    def base(self):
        """Fingerprint of both stages: what an adapter must have been tuned on."""
        if not hasattr(self, "_base"):
            second = self.superres.state_dict() if self.superres is not None else {}
            self._base = fingerprint({**self.muse.state_dict(), **{"second." + k: v for k, v in second.items()}})
        return self._base

    # -- sampling

    @torch.no_grad()
    def generate(self, prompts, style=None, content=None, seed=0, on_step=None, **sampling):
        """One image for each prompt: (B, 3, H, W) in [-1, 1]. sampling: the fields of `Sampling`.

        prompts: strings. With a style adapter they are content phrases, and its style phrase (or
        `style_phrase`) is appended: t. The content adapter sees them as they are: c.
        style only: Eq. 4. content only: Eq. 6, that is gamma 1. Both: (1 - gamma) Eq. 5 + gamma Eq. 6.
        Neither: Eq. 1, the base; with a style phrase, Eq. 4 with the phrase in the adapter's place:
        G(t) + lambda_a (G(t) - G(c)) + lambda_b (G(c) - G(n)).

        seed: picture i is drawn with seed + i and nothing else of its batch; or a list of seeds.
        on_step: see muse.decode; it sees both stages. Raises ValueError for an adapter of another
        base, and for more or fewer phrases or seeds than prompts.
        """
        s = Sampling(**sampling)
        c = [prompts] if isinstance(prompts, str) else list(prompts)
        phrase = s.style_phrase
        if phrase is None:
            phrase = style.about.get("style", "") if style else ""
        phrases = [phrase] * len(c) if isinstance(phrase, str) else list(phrase)
        seeds = [seed + i for i in range(len(c))] if isinstance(seed, int) else list(seed)
        if len(phrases) != len(c) or len(seeds) != len(c):
            raise ValueError(f"{len(phrases)} style phrases and {len(seeds)} seeds for {len(c)} prompts; "
                             "give one, or one for each")
        t = [style_prompt(content_phrase, words) for content_phrase, words in zip(c, phrases)]
        for adapter, name in ((style, "style"), (content, "content")):
            if adapter is not None:
                self.check_adapter(adapter, name)
        generators = [torch.Generator(self.device).manual_seed(number) for number in seeds]

        ids = self.sample_tokens(self.muse, t, c, style, content, s, generators, on_step)
        if self.superres is not None and s.superres:
            second = replace(s, lambda_a=1.0, lambda_a_content=1.0, lambda_b=0.0, steps=12)
            mixed = content is not None and (style is not None or t != c)
            style, content = (adapter and adapter.superres or (Tuned() if mixed else None)
                              for adapter in (style, content))       # Tuned(): nothing learned
            ids = self.sample_tokens(self.superres, t, c, style, content, second, generators,
                                     on_step, ids)
        side = math.isqrt(ids.shape[1])
        return self.vqgan.decode(ids.view(-1, side, side))

    def sample_tokens(self, G, t, c, style, content, s, generators, on_step=None, low=None):
        """Tokens (B, N) of one stage G, by Eq. 1, 4 or (1 - gamma) Eq. 5 + gamma Eq. 6.

        t, c: B prompts, with and without the style phrase; style, content: adapters or None;
        low: the first stage's tokens, for the second.
        """
        G_t, G_c = self.forward_pass(G, t, low=low), self.forward_pass(G, c, low=low)
        G_n = self.forward_pass(G, [s.negative] * len(t), low=low)
        in_words = style is None and low is None and t != c
        lambda_a = s.lambda_a
        if lambda_a is None:
            lambda_a = LAMBDA_A_WORDS if in_words else LAMBDA_A
        gamma = 0.0 if content is None else s.gamma if style is not None or in_words else 1.0
        if style is not None:
            tuned_t = self.forward_pass(G, t, style, low)                     # G^(v, T(t), theta_s)
        if content is not None:
            tuned_c = self.forward_pass(G, c, content, low)                   # G^(v, T(c), theta_c)
            lambda_a_content = lambda_a if s.lambda_a is not None else LAMBDA_A
            if s.lambda_a_content is not None:
                lambda_a_content = s.lambda_a_content

        def logits_fn(v, step):
            base = G_c(v) if gamma == 1 or in_words else G_t(v)
            null = G_n(v) if s.lambda_b else base
            if gamma < 1:                                                        # Eq. 5
                tuned = tuned_t(v) if style is not None else G_t(v) if in_words else base
                l_s = guided_logits(tuned, base, null, lambda_a, s.lambda_b)
                if gamma == 0:
                    return l_s
            base = base if gamma == 1 or in_words else G_c(v)
            l_c = guided_logits(tuned_c(v), base, null, lambda_a_content, s.lambda_b)    # Eq. 6
            return l_c if gamma == 1 else mix_logits(l_s, l_c, gamma)

        return muse_.decode(logits_fn, len(t), G.config.tokens, G.config.mask_id, s.steps,
                            s.temperature, generators, s.top_k, on_step)

    def forward_pass(self, G, prompts, theta=None, low=None):
        """G(v, T(prompts)), or G^ with theta: a function of the tokens v (B, N) -> logits (B, N, V)."""
        text, text_mask = self.embed(G, prompts, theta)
        weights, adapters = ({}, None) if theta is None else (theta.weights(G), theta())

        def forward(v):
            with autocast(self.device.type):
                return functional_call(G, weights, (v, text, text_mask, adapters, low))
        return forward

    def embed(self, G, prompts, theta=None):
        """T: B strings -> states (B, L, text_width), mask (B, L). theta may have words of its own."""
        T = G.text_encoder
        ids = self.tokenizer(prompts, G.config.text_length).to(self.device)
        return T(ids) if theta is None else T(ids, theta.words(ids, T.token(ids)))

    def check_adapter(self, adapter, name):
        tuned_on = adapter.about.get("base")
        if tuned_on != self.base:
            raise ValueError(f"the {name} adapter was tuned on base {tuned_on}, these weights are {self.base}; "
                             "tune it again, or give --weights of its base")
        return adapter.to(self.device)

    # -- tuning

    def tune(self, images, prompts, style="", seed=0, on_step=None, **tuning):
        """Eq. 3 for both stages. tuning: the fields of `Tuning`, of the first; the second has SECOND.

        images (R, 3, H, W) in [-1, 1], the references, of the pipeline's resolution (or of the
        first stage's, which then is all that is tuned); prompts: R content phrases, one for each;
        style: the phrase they share. on_step(step, steps, loss) after each step.
        Returns an adapter with .about and .save(path). Methods other than "adapter" tune the first
        stage alone. Raises ValueError where the numbers differ, or a loss is not finite.
        """
        how = Tuning(**tuning)
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} reference images need as many content phrases, not {len(prompts)}")
        texts = [style_prompt(p, style) for p in prompts]
        generator = torch.Generator().manual_seed(seed)
        images, side = images.to(self.device), self.vqgan.config.resolution
        small = images if images.shape[-1] == side else F.interpolate(images, (side, side), mode="area")
        low = self.vqgan.encode(small).flatten(1)                                # (R, N)
        adapter = self.new_adapter(how, style, generator).to(self.device)
        self.fit(self.muse, adapter, low, texts, how, generator, on_step)
        both = self.superres is not None and how.superres and how.method == "adapter"
        if both and images.shape[-1] == self.resolution:
            c, high = self.superres.config, self.vqgan.encode(images).flatten(1)
            second = Adapter(c.width, SECOND.d_prj, c.depth, SECOND.is_shared, generator).to(self.device)
            self.fit(self.superres, second, high, texts, SECOND, generator, on_step, low)
            adapter.superres = second
        adapter.about = dict(asdict(how), base=self.base, style=style, prompts=list(prompts), seed=seed)
        return adapter.eval().requires_grad_(False)

    def fit(self, G, theta, tokens, texts, how, generator, on_step=None, low=None):
        """Eq. 3: theta = argmin E_{(x, t), m} CE_m( G^(M(E(x), m), T(t), theta), E(x) ).

        tokens (R, N) of the references, texts: their R prompts, low (R, N_low) for the second stage.
        Every reference is used, in shuffled passes. Only theta has gradients, and only theta changes.
        """
        optimiser = torch.optim.Adam(theta.parameters(), lr=how.lr)
        text, text_mask = self.embed(G, texts)                                   # (R, L, D), (R, L)
        order = torch.empty(0, dtype=torch.long)
        for step in range(how.steps):
            while len(order) < how.batch:
                order = torch.cat([order, torch.randperm(len(tokens), generator=generator)])
            rows, order = order[:how.batch].to(self.device), order[how.batch:]
            ids = tokens[rows]                                                   # (B, N)
            mask = muse_.random_mask(how.batch, ids.shape[1], generator, how.mask_power).to(self.device)
            if how.method == "textual-inversion":           # its theta is in the text
                text, _ = self.embed(G, texts, theta)
            inputs = (ids.masked_fill(mask, G.config.mask_id), text[rows], text_mask[rows], theta(),
                      None if low is None else low[rows])
            with autocast(self.device.type):
                logits = functional_call(G, theta.weights(G), inputs)
            loss = muse_.masked_loss(logits, ids, mask)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if not math.isfinite(loss.item()):
                raise ValueError(f"the loss is no number any more at step {step + 1}; give a lower --lr")
            if on_step is not None:
                on_step(step, how.steps, loss.item())

    def new_adapter(self, how, style, generator):
        """A fresh theta: G^ with it is G, for each of METHODS. Raises ValueError where there is nothing to learn."""
        c, G = self.muse.config, self.muse
        if how.method == "adapter":
            return Adapter(c.width, how.d_prj, c.depth, how.is_shared, generator)
        if how.method == "lora":
            return LoRA(c.width, how.d_prj, c.layers, generator)
        if how.method == "full":
            start = {name: p for name, p in G.named_parameters() if not name.startswith("text_encoder.")}
            return FullFineTuning({name: p.shape for name, p in start.items()}, start)
        tokens = list(dict.fromkeys(self.tokenizer.encode(style)))
        if not tokens:
            raise ValueError("textual inversion learns the words of the style phrase; give one")
        table = G.text_encoder.token.weight
        return TextualInversion(tokens, table.shape[1], table[tokens])


# ---------------------------------------------------------------------------------------------
# Rounds of feedback (Sections 3.3 and 4.4.3): sample a pool, choose, train a new adapter on the choice

@dataclass
class Pool:
    """Pictures sampled for a choice: K in a row for each of P prompts."""
    images: torch.Tensor        # (P K, 3, H, W) in [-1, 1]
    prompts: list               # P content phrases
    style: str                  # the style phrase that all of them were drawn with

    @property
    def contents(self):         # one for each picture
        return [prompt for prompt in self.prompts for _ in range(len(self.images) // len(self.prompts))]


def sample_pool(pipe, prompts, count, style=None, seed=0, at_once=16, on_batch=None, **sampling):
    """`count` pictures for each prompt in the style of an adapter (None: of the base) -> Pool.

    Picture i has seed + i. sampling: what `generate` takes; style_phrase may be one for each prompt.
    on_batch(done) is called as the pictures come.
    """
    wanted = [prompt for prompt in prompts for _ in range(count)]
    phrases, images = sampling.pop("style_phrase", None), []
    if phrases is not None and not isinstance(phrases, str):
        phrases = [phrase for phrase in phrases for _ in range(count)]
    for i in range(0, len(wanted), at_once):
        words = phrases if phrases is None or isinstance(phrases, str) else phrases[i:i + at_once]
        images.append(pipe.generate(wanted[i:i + at_once], style, seed=seed + i, style_phrase=words,
                                    **sampling).cpu())
        if on_batch is not None:
            on_batch(min(i + at_once, len(wanted)))
    return Pool(torch.cat(images), list(prompts), style.about["style"] if style is not None else "")


def choose_by_clip(pipe, pool, generator, style_words=False):
    """CLIP feedback: of each prompt's pictures the one nearest to its text -> sorted indices (P).

    The paper does not say whether the text names the style; style_words=True says it does.
    """
    texts = [style_prompt(content, pool.style if style_words else "") for content in pool.contents]
    scores = clip_feedback.text_score(pipe.clip, pool.images, texts).view(len(pool.prompts), -1)
    return flat(clip_feedback.select_best(scores), scores.shape[1])


def choose_at_random(pipe, pool, generator):
    """The paper's control: one picture of each prompt, whichever -> sorted indices (P)."""
    count = len(pool.images) // len(pool.prompts)
    return flat(clip_feedback.select_random(len(pool.prompts), count, generator), count)


def flat(columns, count):
    """Indices (P, k) within each prompt's `count` pictures -> sorted indices within the pool."""
    return sorted((columns.cpu() + count * torch.arange(len(columns))[:, None]).flatten().tolist())


FEEDBACK = {"clip": choose_by_clip, "random": choose_at_random}      # and a person: human_feedback/


def measure(pipe, images, contents, references, reference_contents):
    """What the paper reports, and what it warns of -> {"text", "style", "leakage"}: tensors (B,).

    text: cosine of picture and content phrase; style: cosine of picture and reference; leakage: 1 where CLIP
    sees the reference's content in a picture of something else, nan where that is what was asked for.
    """
    text = clip_feedback.text_score(pipe.clip, images, contents)
    rival = torch.stack([clip_feedback.text_score(pipe.clip, images, c) for c in reference_contents]).amax(0)
    same = torch.tensor([content in reference_contents for content in contents], device=text.device)
    leakage = (rival > text).float().masked_fill(same, math.nan)
    return dict(text=text, style=clip_feedback.style_score(pipe.clip, images, references), leakage=leakage)


# ---------------------------------------------------------------------------------------------
# What train.py and sample.py share

class Parser(argparse.ArgumentParser):
    """A wrong option is one line like every other mistake, without the page of usage (--help has it)."""

    def error(self, message):
        raise ValueError(message)


def number(kind, low, strict=False, high=1e12):
    """An argparse type: an int or float that is at least (strict: more than) low, at most high, and not nan."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not low <= value <= high or strict and value == low:
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if strict else 'at least'} {low} and at most {high:g}")
        return value
    return parse


def check_device(device):
    """Raise ValueError where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA GPU here; use the device cpu")


def unknown_words(words, text):
    """{word of `text` that is not in the vocabulary `words`: up to three of the vocabulary near it}."""
    found = {}
    for word in re.findall(r"[^\s,.;:!?\"]+", text.lower()):
        if word not in words:
            inside = sorted((w for w in words if len(w) > 2 and (w in word or word in w)), key=len)
            near = difflib.get_close_matches(word, words, 3, 0.75) + inside[::-1]
            found[word] = list(dict.fromkeys(near))[:3]
    return found


def check_prompt(pipe, prompt, style=""):
    """Raise ValueError for an empty prompt; say on stderr what of it T cannot read.

    That is what lies behind the last token that T reads, and words that no training caption had.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; say what to draw")
    length, text = pipe.muse.config.text_length, style_prompt(prompt, style)
    if not pipe.tokenizer.fits(text, length):
        print(f"note: a prompt is longer than {length} tokens; what comes after them is not read",
              file=sys.stderr)
    for word, near in unknown_words(pipe.words, text).items() if pipe.words else ():
        print(f"note: no training caption has {word!r}" + (f"; near: {', '.join(near)}" if near else ""),
              file=sys.stderr)


def run_command(main):
    """Run a script's main(); what a user can mend is one line on stderr and exit code 2."""
    try:
        main()
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)):
            raise                                           # torch says it so for a CPU
        print(f"{Path(sys.argv[0]).name}: error: out of memory; ask for less at once", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
