"""StyleDrop: the method (arXiv 2306.00983, Section 3), on a small Muse.

An adapter is tuned on one reference image (Eq. 3). Sampling combines the logits of the tuned model,
of the base, and of the base with an empty prompt (Eq. 4), and can mix two adapters (Eq. 5 and 6).

    pipe = StyleDrop.load()                                          # weights/tiny
    adapter = pipe.tune(images, ["a house"], style="watercolor painting")
    images = pipe.generate(["a cat", "a tree"], style=adapter)       # (2, 3, H, W) in [-1, 1]

Shapes: B batch, N image tokens, L text length, D width, V codebook size, R references.
"""

import math
import platform
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import muse
from adapter import Adapter
from checkpoint.adapters import TunedAdapter, load_adapter
from checkpoint.clip import load_clip
from checkpoint.weights import fingerprint, load_model
from clip_feedback import Tokenizer
from vqgan import VQGAN, VQGANConfig

__all__ = ["BASE_SAMPLING", "CONTENT", "CONTENT_SAMPLING", "ROUND_1", "ROUND_2", "SAMPLING",
           "Sampling", "StyleDrop", "Tuning", "guided_logits", "load_adapter", "mix_logits",
           "style_prompt", "to_tensor", "to_uint8"]

WEIGHTS = str(Path(__file__).parent / "weights" / "tiny")      # the shipped base
RARE_TOKEN = "[V*]"     # stands for a style without a name (4.4.1), also in the base's captions
AT_ONCE = 16            # images sampled or encoded in one batch, to limit the memory
IMPROBABLE = -1e4       # a logit that is never sampled. It is finite, so that it can be mixed


# --------------------------------------------------------------------------------------------------
# Equations

def style_prompt(content, style):
    """t of Section 3.2.1: "a cat", "watercolor" -> "a cat in watercolor style".

    Either may be "": a style alone is "watercolor style", a content alone "a cat".
    """
    if not style:
        return content
    if not content:
        return f"{style} style"
    return f"{content} in {style} style"


def guided_logits(tuned, base, null, lambda_a, lambda_b):
    """Eq. 4: l = G^(t) + lambda_A (G^(t) - G(t)) + lambda_B (G(t) - G(n)).

    tuned is G^(v, T(t), theta), base is G(v, T(t)) and null is G(v, T(n)), logits of one shape.
    lambda_A leads away from the untuned model, towards the style; lambda_B leads away from the
    empty prompt, towards the text. With tuned = base this is Eq. 1, whatever lambda_A is.
    """
    return tuned + lambda_a * (tuned - base) + lambda_b * (base - null)


def only_probable(logits, tuned, min_p):
    """Guided logits in which only tokens that the tuned model finds probable keep a chance.

    logits and tuned (B, N, V): of `guided_logits`, and G^(v, T(t), theta). A token stays if the
    tuned model gives it at least `min_p` times the probability of its most probable token; 0: all
    tokens stay. Eq. 4 multiplies differences of logits. Between tokens that are improbable anyway,
    these are mostly noise, but lambda_B = 10 can make one of them the winner. This is the
    plausibility constraint of contrastive decoding (arXiv 2210.15097); StyleDrop has none.
    """
    if min_p == 0:
        return logits
    least = tuned.amax(-1, keepdim=True) + math.log(min_p)
    return logits.masked_fill(tuned < least, IMPROBABLE)


def mix_logits(style, content, gamma):
    """Section 3.4: l = (1 - gamma) l_s + gamma l_c, of two results of `guided_logits`."""
    return (1 - gamma) * style + gamma * content


# --------------------------------------------------------------------------------------------------
# Settings: Table S3, with the paper's values in brackets

@dataclass(frozen=True)
class Tuning:
    """How an adapter is tuned: the upper part of Table S3."""
    steps: int                      # [1000 everywhere]
    lr: float                       # [3e-5; second stage 1e-4]
    batch: int                      # [8 everywhere]
    d_prj: int                      # H [4; round 2 and second stage 32]
    is_shared: bool                 # across depth [True; round 2 and second stage False]
    mask_power: float               # see muse.random_mask [1]
    views: int = 1                  # the reference and views - 1 random crops of it [not stated]


@dataclass(frozen=True)
class Sampling:
    """How images are sampled: the lower part of Table S3."""
    lambda_a: float                 # strength of the style [0 to 2; round 2: 2; second stage 1]
    lambda_b: float                 # strength of the text [5; second stage 0]
    steps: int                      # of decoding [36; second stage 12]
    temperature: float              # noise in choosing the tokens to keep [4.5]; see muse.decode
    top_k: int                      # sample tokens from the k most probable; 0: from all [0]
    min_p: float = 0.0              # see only_probable; 0: all tokens [0]


ROUND_1 = Tuning(steps=50, lr=2e-3, batch=8, d_prj=20, is_shared=False, mask_power=4, views=16)
ROUND_2 = Tuning(steps=100, lr=2e-3, batch=8, d_prj=20, is_shared=False, mask_power=4, views=16)
CONTENT = replace(ROUND_1, steps=150)       # of an object (Section 3.4) [not stated]
SUPERRES = Tuning(steps=30, lr=2e-3, batch=4, d_prj=8, is_shared=False, mask_power=1)

SAMPLING = Sampling(lambda_a=0.75, lambda_b=10.0, steps=18, temperature=4.5, top_k=8,
                    min_p=0.01)
CONTENT_SAMPLING = replace(SAMPLING, lambda_a=5.0, lambda_b=5.0, min_p=0.0)
BASE_SAMPLING = Sampling(lambda_a=0.0, lambda_b=1.0, steps=18, temperature=1.0, top_k=8)   # Eq. 1
SUPERRES_SAMPLING = Sampling(lambda_a=1.0, lambda_b=0.0, steps=12, temperature=1.0, top_k=8)


def default_sampling(style, content, gamma=0.5):
    """The first stage's default settings, which depend on the adapters that are used.

    BASE_SAMPLING without adapters (Eq. 1), SAMPLING with a style adapter alone (Eq. 4), also if
    gamma = 0 leaves the content adapter unused, and CONTENT_SAMPLING with a content adapter, alone
    (Eq. 6) or mixed with a style adapter (Eq. 5 and 6).
    """
    if style is None and content is None:
        return BASE_SAMPLING
    if content is None or (style is not None and gamma == 0):
        return SAMPLING
    return CONTENT_SAMPLING


# --------------------------------------------------------------------------------------------------
# The pipeline

class StyleDrop:
    """The frozen models E, D, T and G, and the methods that tune adapters and sample images.

    tokenizer: T's BPE; words: the vocabulary of the training captions; superres: the second stage,
    or None; clip: the CLIP that scores images for feedback, or the path of its file, which is read
    when it is first needed.
    """

    def __init__(self, vqgan, base, tokenizer, words=(), clip=None, superres=None, device="cpu"):
        self.vqgan = vqgan.to(device).requires_grad_(False)
        self.muse = base.to(device).requires_grad_(False)
        self.superres = superres
        if superres is not None:
            superres.to(device).requires_grad_(False)
        self.tokenizer = tokenizer
        self.words = set(words)
        self._clip = clip
        self.device = torch.device(device)

    @classmethod
    def load(cls, weights=WEIGHTS, device=None):
        """The base in a folder of vqgan.pt, muse.pt, clip.pt and perhaps superres.pt.

        device: by default a CUDA GPU if there is one. Raises ValueError with a one-line message if
        vqgan.pt or muse.pt is missing, or if a file is damaged or does not fit the others. clip.pt
        is read when it is first needed.
        """
        weights = Path(weights)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device)
        vqgan, _ = load_model(weights / "vqgan.pt", "vqgan", VQGANConfig, VQGAN)
        base, saved = load_model(weights / "muse.pt", "muse", muse.MuseConfig, muse.Muse)
        try:
            tokenizer = Tokenizer(list(saved["merges"]))
            words = {word.lower() for word in saved["words"]}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{weights / 'muse.pt'} has no vocabulary (merges and words); "
                             "train it again") from None
        grid = base.config.grid
        codes = base.config.codebook_size
        fits = (vqgan.config.codebook_size == codes and base.config.text_layers > 0
                and vqgan.config.resolution == vqgan.config.factor * grid
                and tokenizer.vocab_size == base.config.vocab_size)
        superres = None
        if (weights / "superres.pt").exists():
            superres, saved_superres = load_model(weights / "superres.pt", "superres",
                                                  muse.MuseConfig, muse.Muse)
            fits = (fits and saved_superres.get("merges") == saved["merges"]
                    and superres.config.low_grid == grid
                    and superres.config.codebook_size == codes)
        if not fits:
            raise ValueError(f"vqgan.pt, muse.pt and superres.pt in {weights} were not trained "
                             "together: their sizes or words differ")
        return cls(vqgan, base, tokenizer, words, weights / "clip.pt", superres, device)

    @property
    def resolution(self):
        """Side length in pixels of the images it generates and of its references."""
        last = self.muse if self.superres is None else self.superres
        return last.config.grid * self.vqgan.config.factor

    @property
    def clip(self):
        """The CLIP that scores images for feedback; its file is read on the first use."""
        if isinstance(self._clip, (str, Path)):
            self._clip = load_clip(self._clip).requires_grad_(False).to(self.device)
        return self._clip

    @cached_property
    def base_id(self):
        """Fingerprint of both stages: what an adapter must have been tuned on."""
        tensors = dict(self.muse.state_dict())
        if self.superres is not None:
            for name, tensor in self.superres.state_dict().items():
                tensors[f"second.{name}"] = tensor
        return fingerprint(tensors)

    # -- tuning

    def tune(self, images, prompts, style="", seed=0, superres=True, tuning=ROUND_1,
             on_step=None, **changes):
        """Tune an adapter for each stage on references (Eq. 3) -> a TunedAdapter with .save(path).

        images (R, 3, H, W) in [-1, 1]: the references, at the pipeline's resolution. If they have
        the first stage's resolution instead, only that stage is tuned. prompts: R content phrases;
        with "", as train.py gives by default, the style alone is named. style: the style phrase
        that is appended to them; train.py gives RARE_TOKEN, and "" appends nothing. superres: also
        tune the second stage, if there is one, with the settings SUPERRES. tuning: settings of the
        first stage; changes: individual settings to override, such as steps=100.
        on_step(step, steps, loss) is called after each step. Raises ValueError if the numbers of
        images and prompts differ, or if a loss or the adapter becomes NaN or infinite.
        """
        tuning = replace(tuning, **changes)
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} reference images need as many content phrases, "
                             f"not {len(prompts)}")
        side = self.vqgan.config.resolution
        if images.shape[-2:] not in ((side, side), (self.resolution, self.resolution)):
            raise ValueError(f"the references must be {self.resolution} x "
                             f"{self.resolution} pixels")
        images = images.to(self.device)
        texts = [style_prompt(prompt, style) for prompt in prompts]
        generator = torch.Generator().manual_seed(seed)

        views = random_views(images, tuning.views, generator).flatten(0, 1)  # (R * views, 3, H, W)
        tokens = self.tokens_at(side, views)                                 # (R * views, N)
        texts_of_views = [text for text in texts for _ in range(tuning.views)]
        first = self.fit(self.muse, tokens, texts_of_views, tuning, generator, on_step)
        second = None
        if superres and self.superres is not None and images.shape[-1] == self.resolution:
            low = tokens[::tuning.views]     # (R, N): the first view is the reference itself
            high = self.tokens_at(self.resolution, images)                       # (R, N')
            second = self.fit(self.superres, high, texts, SUPERRES, generator, on_step, low)
        about = dict(asdict(tuning), base=self.base_id, style=style, prompts=list(prompts),
                     seed=seed)
        return TunedAdapter(first, second, about).eval().requires_grad_(False)

    def fit(self, G, tokens, texts, tuning, generator, on_step=None, low=None):
        """Eq. 3: the theta that minimises the mean of CE_m( G^(M(E(x), m), T(t), theta), E(x) ).

        The mean is over pairs (x, t) and random masks m. tokens (K, N): E(x) of the references, or
        of all their views; texts: their K prompts t; low (K, N_low): the first stage's tokens, for
        the second stage. G is frozen.
        """
        theta = self.new_adapter(G, tuning, generator)
        optimiser = torch.optim.Adam(theta.parameters(), tuning.lr)
        text, text_mask = self.embed(G, texts)                       # (K, L', text_width), (K, L')
        batches = shuffled(len(tokens), tuning.batch, generator)
        for step in range(tuning.steps):
            rows = next(batches).to(self.device)                                 # (B,)
            ids = tokens[rows]                                                   # (B, N)
            mask = muse.random_mask(tuning.batch, ids.shape[1], generator, tuning.mask_power)
            mask = mask.to(self.device)
            masked = ids.masked_fill(mask, G.config.mask_id)
            low_rows = None if low is None else low[rows]                        # (B, N_low)
            with autocast(self.device.type):
                adapters = theta()               # the function that G applies after its sub-layers
                logits = G(masked, text[rows], text_mask[rows], adapters, low_rows)  # (B, N, V)
            loss = muse.masked_loss(logits, ids, mask)
            if not math.isfinite(loss.item()):
                raise ValueError(f"the loss is NaN or infinite at step {step + 1}; "
                                 "give a lower learning rate")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if on_step is not None:
                on_step(step, tuning.steps, loss.item())
        if not all(p.isfinite().all() for p in theta.parameters()):      # spoiled by the last step
            raise ValueError("the adapter is NaN or infinite; give a lower learning rate")
        return theta

    def tokens_at(self, side, images):
        """Tokens (B, N) of images (B, 3, H, W), reduced to `side`; AT_ONCE of them at a time."""
        parts = []
        for part in images.split(AT_ONCE):
            small = F.interpolate(part, (side, side), mode="area")
            parts.append(self.vqgan.encode(small).flatten(1))
        return torch.cat(parts)

    def new_adapter(self, G, tuning, generator):
        """A new adapter theta for one of the stages; until it is trained, it changes nothing."""
        return Adapter(G.config.width, tuning.d_prj, G.config.depth, tuning.is_shared,
                       generator).to(self.device)

    # -- sampling

    @torch.no_grad()
    def generate(self, prompts, style=None, content=None, seed=0, gamma=0.5, style_phrase=None,
                 negative="", superres=True, on_step=None, on_batch=None, sampling=None,
                 **changes):
        """One image for each prompt: (B, 3, H, W) in [-1, 1].

        prompts: B strings. The style adapter's prompt t is the string with a style phrase appended:
        the adapter's own, or `style_phrase` (one string, or one for each prompt). The content
        adapter's prompt c is the string itself. Which equation is sampled depends on the adapters:
        a style adapter alone, Eq. 4; a content adapter alone, Eq. 6; both, the mixture
        (1 - gamma) Eq. 5 + gamma Eq. 6; none, Eq. 1, the base.

        seed: image i is sampled with seed + i, whatever batch it is in; or a list of B seeds.
        negative: the prompt n. superres: also sample the second stage, if there is one, with
        SUPERRES_SAMPLING. sampling: settings of the first stage, by default those of
        `default_sampling`; changes: individual ones to override, such as lambda_a=2.
        on_step: see muse.decode; it is called in both stages of each batch. on_batch(done) is
        called after each batch of AT_ONCE images. Raises ValueError if an adapter belongs to
        another base, or if the numbers of phrases, seeds and prompts differ.
        """
        if sampling is None:
            sampling = default_sampling(style, content, gamma)
        sampling = replace(sampling, **changes)
        c = [prompts] if isinstance(prompts, str) else list(prompts)
        if style_phrase is None:
            style_phrase = "" if style is None else style.style
        phrases = style_phrase
        if isinstance(style_phrase, str):
            phrases = [style_phrase] * len(c)
        seeds = seed
        if isinstance(seed, int):
            seeds = [seed + i for i in range(len(c))]
        if not c:
            raise ValueError("give at least one prompt")
        if sampling.steps < 1:
            raise ValueError(f"steps is {sampling.steps}; give at least 1")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma}; give a number from 0 to 1")
        if len(phrases) != len(c) or len(seeds) != len(c):
            raise ValueError(f"{len(phrases)} style phrases and {len(seeds)} seeds for {len(c)} "
                             "prompts; give one, or one for each")
        t = [style_prompt(prompt, phrase) for prompt, phrase in zip(c, phrases)]
        for adapter in (style, content):
            if adapter is not None:
                self.check_adapter(adapter)
                adapter.to(self.device)
        if content is None:                                  # Eq. 4 alone, or Eq. 1 without a style
            gamma = 0.0
        elif style is None:                                  # Eq. 6 alone
            gamma = 1.0

        images = []
        for start in range(0, len(c), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            generators = [torch.Generator(self.device).manual_seed(number)
                          for number in seeds[rows]]
            texts = t[rows], c[rows], [negative] * len(c[rows])
            theta_s = None if style is None else style.adapter
            theta_c = None if content is None else content.adapter
            ids = self.sample_tokens(self.muse, texts, theta_s, theta_c, gamma, sampling,
                                     generators, on_step)
            if superres and self.superres is not None:
                theta_s = None if style is None else style.superres
                theta_c = None if content is None else content.superres
                ids = self.sample_tokens(self.superres, texts, theta_s, theta_c, gamma,
                                         SUPERRES_SAMPLING, generators, on_step, ids)
            side = math.isqrt(ids.shape[1])
            images.append(self.vqgan.decode(ids.view(-1, side, side)))
            if on_batch is not None:
                on_batch(min(start + AT_ONCE, len(c)))
        return torch.cat(images)

    def sample_tokens(self, G, texts, theta_s, theta_c, gamma, sampling, generators, on_step=None,
                      low=None):
        """Tokens (B, N) by Eq. 4 (gamma = 0), Eq. 6 (gamma = 1), or Eq. 5 and 6 mixed.

        G: one of the stages; texts: the prompts t, c and n, B of each; theta_s, theta_c: that
        stage's style and content adapter, or None; generators: one for each image; low (B, N_low):
        the first stage's tokens, for the second stage.
        """
        t, c, n = texts

        def make_pass(prompts, theta=None):
            """G(v, T(prompts)), or with theta G^(v, T(prompts), theta): a function of v.

            T's states and those of the low-resolution tokens are computed once, since only v
            changes from step to step.
            """
            text, text_mask = self.embed(G, prompts)
            adapters = None
            states = None
            if theta is not None:
                adapters = theta()
            if low is not None:
                with autocast(self.device.type):
                    states = G.encode_low(low, adapters)                         # (B, N_low, D)
            return lambda v: G(v, text, text_mask, adapters, low_states=states)

        def make_guided_pass(prompts, theta):
            """Eq. 4 with these prompts, as a function of v and of the logits G(v, T(n))."""
            base_pass = make_pass(prompts)
            tuned_pass = None if theta is None else make_pass(prompts, theta)

            def guided(v, null):
                base = base_pass(v)
                tuned = base if tuned_pass is None else tuned_pass(v)
                logits = guided_logits(tuned, base, null, sampling.lambda_a, sampling.lambda_b)
                return only_probable(logits, tuned, sampling.min_p)

            return guided

        if sampling.lambda_b:
            null_pass = make_pass(n)
        if gamma < 1:
            style_pass = make_guided_pass(t, theta_s)                            # Eq. 5: l_s
        if gamma > 0:
            content_pass = make_guided_pass(c, theta_c)                          # Eq. 6: l_c

        def logits_fn(v, step):
            with autocast(self.device.type):
                null = 0.0                       # without lambda_B its pass is not needed
                if sampling.lambda_b:
                    null = null_pass(v)
                if gamma == 0:
                    return style_pass(v, null)
                if gamma == 1:
                    return content_pass(v, null)
                return mix_logits(style_pass(v, null), content_pass(v, null), gamma)

        return muse.decode(logits_fn, len(generators), G.config.tokens, G.config.mask_id,
                           sampling.steps, sampling.temperature, generators, sampling.top_k,
                           on_step)

    def embed(self, G, prompts):
        """T: B strings -> states (B, L', text_width) and their mask (B, L'), L' as in muse.py."""
        ids = self.tokenizer(prompts, G.config.text_length).to(self.device)
        return G.text_encoder(ids)

    def check_adapter(self, tuned):
        """Raise ValueError for an adapter of another base."""
        tuned_on = tuned.about.get("base")
        if tuned_on != self.base_id:
            raise ValueError(f"the adapter was tuned on base {tuned_on}, but these weights are "
                             f"base {self.base_id}; tune it again, or give its base with --weights")
        for adapter, G in ((tuned.adapter, self.muse), (tuned.superres, self.superres)):
            if adapter is None or G is None:
                continue
            shape = adapter.config["d_emb"], adapter.config["n_layer"]
            if shape != (G.config.width, G.config.depth):
                raise ValueError(f"the adapter is for {shape[1]} layers of width {shape[0]}, but "
                                 f"the base has {G.config.depth} of width {G.config.width}; "
                                 "tune it again")


def random_views(images, count, generator):
    """Images (R, 3, H, W) -> (R, count, 3, H, W): each image, then count - 1 random crops of it.

    A crop has 80 to 100 % of the image's side. It lies anywhere in the image and may reach up to
    6 % beyond the border, where the image is mirrored. Random positions keep the adapter from
    learning the reference's layout as part of its style.
    """
    if count == 1:
        return images[:, None]
    shape = len(images), count - 1
    side = 0.8 + 0.2 * torch.rand(*shape, 1, generator=generator)    # a share of the image's side
    uniform = 2 * torch.rand(2, *shape, 2, generator=generator) - 1              # in [-1, 1]
    inside, beyond = uniform[0], uniform[1]
    affine = torch.zeros(*shape, 2, 3)           # maps places in the crop to places in the image
    affine[..., 0, 0] = affine[..., 1, 1] = side[..., 0]
    # coordinates run from -1 to 1, so 6 % of a side is 0.12
    affine[..., 2] = inside * (1 - side) + 0.12 * beyond
    originals = images.repeat_interleave(count - 1, 0)
    places = F.affine_grid(affine.flatten(0, 1), originals.shape, align_corners=False)
    crops = F.grid_sample(originals, places.to(images.device), padding_mode="reflection",
                          align_corners=False)
    return torch.cat([images[:, None], crops.unflatten(0, shape)], 1)


def shuffled(count, batch, generator):
    """Yield batches of indices below `count` without end, in epochs that are shuffled anew."""
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:batch]
        order = order[batch:]


# --------------------------------------------------------------------------------------------------
# Precision

def fast_bf16(device):
    """Does this device multiply in bf16 at least as fast as in fp32?

    CUDA GPUs do from Ampere on, and so do CPUs with AMX. With AVX-512 BF16 but without AMX, bf16
    takes half the time of fp32 on AMD's CPUs and nearly twice the time on Intel's. All others use
    fp32. The answer is a rule and not a measurement, so that two runs on one machine never differ.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    if not hasattr(torch.cpu, "get_capabilities"):           # before torch 2.9: not known
        return False
    has = torch.cpu.get_capabilities()
    if has.get("amx_bf16", False):
        return True
    return has.get("avx512_bf16", False) and "AMD" in cpu_vendor()


def cpu_vendor():
    """A string of the operating system that contains the CPU vendor's name; "" if there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("vendor_id"):
                return line
    return platform.processor()                              # "AMD64 Family ... AuthenticAMD"


def precision(device):
    """The precision of G's matrix products on a device: "bf16" or "fp32"."""
    return "bf16" if fast_bf16(device) else "fp32"


def check_device(device):
    """Raise ValueError if this machine has no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA GPU here; use --device cpu")


def autocast(device):
    """A context for G's matrix products, on "cpu" or "cuda": bf16 where that is fast, else fp32."""
    return torch.autocast(device, torch.bfloat16, enabled=fast_bf16(device))


# --------------------------------------------------------------------------------------------------
# Images

def to_tensor(images):
    """uint8 (B, H, W, 3), a tensor or an array -> float (B, 3, H, W) in [-1, 1]."""
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images.astype(np.float32))     # a copy: it may be read-only
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images):
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
