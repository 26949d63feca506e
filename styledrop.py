"""StyleDrop: the method (arXiv 2306.00983, Section 3), on a small Muse.

One reference image teaches an adapter (Eq. 3); sampling weighs the tuned model, the base and the
base without text against each other (Eq. 4); two adapters are mixed (Eq. 5 and 6).

    pipe = StyleDrop.load()                                          # weights/tiny
    adapter = pipe.tune(images, ["a house"], style="watercolor painting")
    images = pipe.generate(["a cat", "a tree"], style=adapter)       # (2, 3, H, W) in [-1, 1]

Shapes: B batch, N image tokens, L text length, D width, V codebook size.
"""

import argparse
import hashlib
import math
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.func import functional_call

import clip_feedback
import muse as muse_
from adapter import METHODS, Adapter, FullFineTuning, LoRA, TextualInversion, Tuned, by_rows
from muse import Muse, MuseConfig
from vqgan import VQGAN, VQGANConfig

RARE_TOKEN = "[V*]"                     # a style phrase that means nothing yet (Section 4.4.1)


# ---------------------------------------------------------------------------------------------
# Equations

def style_prompt(content, style):
    """t of Section 3.2.1: "a cat" + "watercolor painting" -> "a cat in watercolor painting style"."""
    return f"{content} in {style} style" if style else content


LAMBDA_A, LAMBDA_A_WORDS = 1.0, 5.0     # the strength of a style: of an adapter's, and of one that stands in words


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
    except Exception:                                       # pickle, zip and torch all have their own
        raise ValueError(f"{path} is damaged or no {kind} file; fetch or train it again") from None
    if not isinstance(saved, dict) or saved.get("kind") != kind:
        raise ValueError(f"{path} is no {kind} file")
    return saved


def save_model(path, kind, model, provenance, **more):
    """Weights in half precision with their config and provenance: what weights/ ships."""
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    saved = dict(kind=kind, config=asdict(model.config), weights=weights, provenance=provenance, **more)
    write_whole(path, lambda file: torch.save(saved, file))


def load_model(path, kind, config_class, model_class):
    """The model that `save_model` wrote, in full precision and eval mode, and the dict it came in."""
    saved = read_checkpoint(path, kind)
    try:
        model = model_class(config_class(**saved["config"]))
        model.load_state_dict(saved["weights"])             # strict: no key is filled or dropped in silence
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
    method = next(name for name, kind in METHODS.items() if type(adapter) is kind)
    saved = dict(kind="adapter", method=method, config=adapter.config, weights=adapter.state_dict(), about=adapter.about)
    write_whole(path, lambda file: torch.save(saved, file))


Tuned.save = save_adapter               # adapter.save(path)


def load_adapter(path):
    """An adapter from its file, or from the run folder that holds it. Raises ValueError if it is neither."""
    path = Path(path)
    saved = read_checkpoint(path / "adapter.pt" if path.is_dir() else path, "adapter")
    try:
        adapter = METHODS[saved["method"]](**saved["config"])
        adapter.load_state_dict(saved["weights"])
        adapter.about = saved["about"]
    except (KeyError, TypeError, RuntimeError):
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
# The pipeline

class StyleDrop:
    """E, D, T and G, frozen, with everything that tunes and samples them.

    tokenizer: T's BPE; words: the vocabulary of the training captions; clip: the judge of feedback,
    a CLIP or the path of one, which is read when it is first needed.
    """

    def __init__(self, vqgan, muse, tokenizer, words=(), clip=None, device="cpu"):
        self.vqgan, self.muse = vqgan.to(device), muse.to(device)
        self.tokenizer, self.words, self._clip = tokenizer, set(words), clip
        self.device = torch.device(device)

    @classmethod
    def load(cls, weights="weights/tiny", device=None):
        """The base in a folder of vqgan.pt, muse.pt and clip.pt. Raises ValueError in one line."""
        weights = Path(weights)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device)
        vqgan, _ = load_model(weights / "vqgan.pt", "vqgan", VQGANConfig, VQGAN)
        muse, saved = load_model(weights / "muse.pt", "muse", MuseConfig, Muse)
        try:
            tokenizer, words = clip_feedback.Tokenizer(saved["merges"]), set(saved["words"])
        except (KeyError, TypeError, ValueError, OSError):
            raise ValueError(f"{weights / 'muse.pt'} has no merges or words; train it again") from None
        return cls(vqgan, muse, tokenizer, words, weights / "clip.pt", device).check()

    def check(self):
        """Raise ValueError unless the parts speak of the same tokens and text."""
        v, m = self.vqgan.config, self.muse.config
        if v.codebook_size != m.codebook_size or v.resolution // v.factor != m.grid:
            raise ValueError("vqgan.pt and muse.pt were not trained together: their sizes differ")
        if self.tokenizer.vocab_size != m.vocab_size:
            raise ValueError("muse.pt has another vocabulary than its own merges make; train it again")
        return self

    @property
    def clip(self):
        """The judge."""
        if isinstance(self._clip, (str, Path)):
            self._clip = clip_feedback.load_clip(self._clip).requires_grad_(False).to(self.device)
        return self._clip

    @property
    def base(self):
        """Fingerprint of G: what an adapter must have been tuned on."""
        if not hasattr(self, "_base"):
            self._base = fingerprint(self.muse.state_dict())
        return self._base

    def embed(self, prompts, tuned=None):
        """T: B strings -> states (B, L, text_width) and their mask (B, L). tuned: words of its own."""
        T = self.muse.text_encoder
        ids = self.tokenizer(prompts, self.muse.config.text_length).to(self.device)
        return T(ids) if tuned is None else T(ids, tuned.words(ids, T.token(ids)))

    def check_adapter(self, adapter, name):
        tuned_on = adapter.about.get("base")
        if tuned_on != self.base:
            raise ValueError(f"the {name} adapter was tuned on base {tuned_on}, these weights are {self.base}; "
                             "tune it again, or give --weights of its base")
        return adapter.to(self.device)

    @torch.no_grad()
    def generate(self, prompts, style=None, content=None, lambda_a=None, lambda_b=3.0, gamma=0.5, steps=18,
                 temperature=1.0, seed=0, negative="", style_phrase=None, on_step=None, lambda_a_content=None,
                 top_k=0):
        """Sample one image for each prompt: (B, 3, H, W) in [-1, 1].

        prompts: strings. With a style adapter they are content phrases and its style phrase (or
        `style_phrase`: one, or one for each prompt) is appended: t. The content adapter sees them as they are: c.
        style only: Eq. 4. content only: Eq. 6, that is gamma 1. Both: (1 - gamma) Eq. 5 + gamma Eq. 6.
        Neither: Eq. 1, the base; with a style phrase, Eq. 4 with the phrase in the adapter's place, so that
        lambda_a is the strength of its words: G(t) + lambda_a (G(t) - G(c)) + lambda_b (G(c) - G(n)).
        lambda_a: None for LAMBDA_A, or LAMBDA_A_WORDS where the style is in words. lambda_a_content: of the
        content adapter; None for lambda_a, where that is given, else LAMBDA_A.
        Every distinct forward pass of a step is one part of one batch.
        seed: an int, or a generator to go on from; the same seed on the same machine gives the same
        images. Raises ValueError for an adapter of another base, and for more or fewer phrases than prompts.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        B = len(prompts)
        phrase = style_phrase if style_phrase is not None else (style.about.get("style", "") if style else "")
        phrases = [phrase] * B if isinstance(phrase, str) else list(phrase)
        if len(phrases) != B:
            raise ValueError(f"{len(phrases)} style phrases for {B} prompts; give one, or one for each")
        texts_s = [style_prompt(p, words) for p, words in zip(prompts, phrases)]
        theta_s = self.check_adapter(style, "style") if style is not None else None
        theta_c = self.check_adapter(content, "content") if content is not None else None
        in_words = style is None and any(phrases)
        gamma = 0.0 if content is None else gamma if style is not None or in_words else 1.0

        branches = {}                                       # name -> (texts, theta); n comes last
        if gamma < 1:
            branches["G(t)"] = texts_s, None
            if theta_s is not None:
                branches["G^(t)"] = texts_s, theta_s
        if gamma > 0 or in_words:
            branches["G(c)"] = prompts, None
        if gamma > 0:
            branches["G^(c)"] = prompts, theta_c
        branches["G(n)"] = [negative] * B, None
        calls = self.forward_passes(branches)
        first = lambda *values: next(value for value in values if value is not None)
        tuned = "G(t)" if theta_s is None else "G^(t)"
        in_style = ("G(t)", "G(c)", first(lambda_a, LAMBDA_A_WORDS)) if in_words else (tuned, "G(t)", first(lambda_a, LAMBDA_A))
        of_object = "G^(c)", "G(c)", first(lambda_a_content, lambda_a, LAMBDA_A)

        def logits_fn(ids, step):
            out = {}
            for names, weights, inputs in calls:
                with autocast(self.device.type):
                    logits = functional_call(self.muse, weights, (ids.repeat(len(names), 1), *inputs))
                out.update(zip(names, logits.split(B)))
            guided = lambda tuned, base, a: guided_logits(out[tuned], out[base], out["G(n)"], a, lambda_b)
            if gamma == 0:
                return guided(*in_style)
            if gamma == 1:
                return guided(*of_object)
            return mix_logits(guided(*in_style), guided(*of_object), gamma)

        c = self.muse.config
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator(self.device).manual_seed(seed)
        ids = muse_.decode(logits_fn, B, c.tokens, c.mask_id, steps, temperature, generator, top_k, on_step)
        return self.vqgan.decode(ids.view(B, c.grid, c.grid))

    def forward_passes(self, branches):
        """branches: name -> (texts, theta or None) -> [(names, weights of G, (text, text_mask, adapters))].

        All branches that share G's weights are one batch; fully tuned and LoRA weights are a G of their own.
        """
        weights = {name: theta.weights(self.muse) if theta else {} for name, (_, theta) in branches.items()}
        groups = [[name for name in branches if not weights[name]]] + [[name] for name in branches if weights[name]]
        calls = []
        for names in groups:
            texts, masks = zip(*(self.embed(*branches[name]) for name in names))
            adapters = by_rows([(len(texts), theta() if theta else None) for texts, theta in map(branches.get, names)])
            calls.append((names, weights[names[0]], (torch.cat(texts), torch.cat(masks), adapters)))
        return calls

    def new_adapter(self, method, style, d_prj, is_shared, generator):
        """A fresh theta: G^ with it is G, for each of METHODS. Raises ValueError where there is nothing to learn."""
        c, G = self.muse.config, self.muse
        if method == "adapter":
            return Adapter(c.width, d_prj, c.layers, is_shared, generator)
        if method == "lora":
            return LoRA(c.width, d_prj, c.layers, generator)
        if method == "full":
            start = {name: p for name, p in G.named_parameters() if not name.startswith("text_encoder.")}
            return FullFineTuning({name: p.shape for name, p in start.items()}, start)
        tokens = list(dict.fromkeys(self.tokenizer.encode(style)))
        if not tokens:
            raise ValueError("textual inversion learns the words of the style phrase; give one")
        table = G.text_encoder.token.weight
        return TextualInversion(tokens, table.shape[1], table[tokens])

    def tune(self, images, prompts, style="", steps=100, lr=1e-3, batch=8, d_prj=4, is_shared=True, seed=0,
             on_step=None, method="adapter", mask_power=2):
        """Eq. 3: theta = argmin E_{(x, t), m} CE_m( G^(M(E(x), m), T(t), theta), E(x) ).

        images (R, 3, H, W) in [-1, 1], the references; prompts: R content phrases, one for each;
        style: the phrase they share. Every reference is used. Tokens and text embeddings are made
        once; only theta has gradients, and only theta changes. on_step(step, loss) after each step.
        method: one of adapter.METHODS; d_prj is LoRA's rank as well; mask_power: see muse.random_mask.
        Returns an adapter with .about and .save(path).
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} reference images need as many content phrases, not {len(prompts)}")
        c = self.muse.config
        generator = torch.Generator().manual_seed(seed)
        adapter = self.new_adapter(method, style, d_prj, is_shared, generator).to(self.device)
        adapter.about = dict(base=self.base, style=style, prompts=list(prompts), steps=steps, lr=lr, batch=batch,
                             seed=seed)
        optimiser = torch.optim.Adam(adapter.parameters(), lr=lr)
        tokens = self.vqgan.encode(images.to(self.device)).flatten(1)            # (R, N)
        texts = [style_prompt(p, style) for p in prompts]
        text, text_mask = self.embed(texts)                                      # (R, L, D), (R, L)
        order = torch.empty(0, dtype=torch.long)
        for step in range(steps):
            while len(order) < batch:                       # shuffled passes over all references
                order = torch.cat([order, torch.randperm(len(tokens), generator=generator)])
            rows, order = order[:batch].to(self.device), order[batch:]
            ids = tokens[rows]
            mask = muse_.random_mask(batch, c.tokens, generator, mask_power).to(self.device)
            if method == "textual-inversion":               # its theta is in the text
                text, _ = self.embed(texts, adapter)
            inputs = ids.masked_fill(mask, c.mask_id), text[rows], text_mask[rows], adapter()
            with autocast(self.device.type):
                logits = functional_call(self.muse, adapter.weights(self.muse), inputs)
            loss = muse_.masked_loss(logits, ids, mask)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if on_step is not None:
                on_step(step, loss.item())
        return adapter.eval().requires_grad_(False)


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


def sample_pool(pipe, prompts, count, style=None, seed=0, at_once=16, on_batch=None, style_phrase=None, **sampling):
    """`count` pictures for each prompt in the style of an adapter (None: of the base) -> Pool.

    style_phrase, sampling: what `generate` takes. on_batch(done) is called as the pictures come.
    """
    repeat = lambda words: [each for each in words for _ in range(count)]
    shared = style_phrase is None or isinstance(style_phrase, str)
    wanted, phrases = repeat(prompts), style_phrase if shared else repeat(style_phrase)
    generator, images = torch.Generator(pipe.device).manual_seed(seed), []
    for i in range(0, len(wanted), at_once):
        words = phrases if shared else phrases[i:i + at_once]
        images.append(pipe.generate(wanted[i:i + at_once], style, seed=generator, style_phrase=words, **sampling).cpu())
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


def check_prompt(pipe, prompt, style=""):
    """Raise ValueError for an empty prompt; say so where T cannot read the whole of it with its style phrase."""
    if not prompt.strip():
        raise ValueError("the prompt is empty; say what to draw")
    length = pipe.muse.config.text_length
    if not pipe.tokenizer.fits(style_prompt(prompt, style), length):
        print(f"note: a prompt is longer than {length} tokens; what comes after them is not read", file=sys.stderr)


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
