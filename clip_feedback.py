"""CLIP, which scores images and selects the best (StyleDrop 3.3, 4.2.1, 4.4.3).

    clip = load_clip("weights/tiny/clip.pt")
    text_score(clip, images, ["a cat", "a hot air balloon"])  # (2,) cosines
    style_score(clip, images, reference)                      # images (2, 3, H, W) in [-1, 1]

CLIP (Radford et al. 2021, arXiv 2103.00020) maps images and texts to one space. It is only used to
score images; Muse does not depend on it, so any CLIP will do. The shipped one has a ResNet for
images. There is a ViT too, with the parameter names of OpenAI's checkpoints, so that public weights
load unchanged. The BPE tokenizer, which T uses as well, is also in this file.

Shapes: B batch, N image tokens, L text length, D width, V vocabulary, E shared space, S side of the
images that the tower for images sees.
"""

import gzip
import html
import math
import warnings
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn as nn
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# The tokenizer: byte-level BPE

EOW = "</w>"                                      # ends the last symbol of a word
VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"  # OpenAI's merges, which public weights need
OPENAI_MERGES = 49152 - 256 - 2                   # the file lists more merges than the models use
LONGEST_WORD = 1000                               # bytes; longer than any model's context
LONGEST_SYMBOL = 256                              # characters; OpenAI's longest has about 30

# Contractions, runs of letters, single digits, runs of other non-space characters. Unlike in CLIP,
# "<|endoftext|>" in a prompt is plain text: no prompt can end early.
WORD = regex.compile(r"'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


# {byte: visible character}, so that merges are plain text. Bytes that are visible in Latin-1 stand
# for themselves; the others borrow characters from U+0100 on. The order is as in CLIP's vocabulary.
VISIBLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
OTHERS = [byte for byte in range(256) if byte not in VISIBLE]
BYTES = {byte: chr(byte) for byte in VISIBLE}
BYTES |= {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}


def split_words(text):
    """Clean `text` as CLIP does and yield its words: tuples of byte symbols that end in "</w>"."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))  # web captions are often escaped twice
    text = " ".join(text.split()).lower()
    for word in WORD.findall(text):
        symbols = [BYTES[byte] for byte in word.encode("utf-8")]
        yield (*symbols[:-1], symbols[-1] + EOW)


def merge_pair(word, pair):
    """Join every occurrence of `pair` in a tuple of symbols, from left to right."""
    merged = []
    i = 0
    while i < len(word):
        step = 2 if word[i:i + 2] == pair else 1
        merged.append("".join(word[i:i + step]))
        i += step
    return tuple(merged)


class Tokenizer:
    """CLIP's byte-level BPE: it encodes any text, since every byte is a symbol.

    merges: pairs of symbols, or strings "a b", in merge order; or the Path of OpenAI's vocabulary
    file. Raises ValueError on other content. Vocabulary: 256 byte symbols, the same 256 at the end
    of a word, one symbol for each merge, start, end.
    """

    def __init__(self, merges):
        if isinstance(merges, (str, Path)):
            merges = read_vocabulary(merges)
        try:
            self.merges = [as_pair(merge) for merge in merges]
        except (TypeError, ValueError):
            raise ValueError("merges must be pairs of symbols, one pair per entry") from None
        letters = list(BYTES.values())
        self.symbols = [*letters, *(s + EOW for s in letters), *(a + b for a, b in self.merges),
                        "<|startoftext|>", "<|endoftext|>"]
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.vocab_size = len(self.symbols)
        self.start_id, self.end_id = self.vocab_size - 2, self.vocab_size - 1
        self.ranks = {merge: rank for rank, merge in enumerate(self.merges)}
        self.joined = {}                          # cache: word -> its pieces

    def pieces(self, word):
        """A word's BPE symbols: apply the earliest-learned merge that fits, until none fits."""
        if word not in self.joined:
            pieces = word
            while len(pieces) > 1:
                pairs = zip(pieces, pieces[1:])
                first = min(pairs, key=lambda pair: self.ranks.get(pair, math.inf))
                if first not in self.ranks:
                    break
                pieces = merge_pair(pieces, first)
            self.joined[word] = pieces
        return self.joined[word]

    def encode(self, text):
        """text -> list of ids, without start and end.

        Words are cut after LONGEST_WORD bytes, since the time of `pieces` grows with the square of
        their length.
        """
        ids = []
        for word in split_words(text):
            for piece in self.pieces(word[:LONGEST_WORD]):
                ids.append(self.ids[piece])
        return ids

    def fits(self, text, context_length):
        """True if `text`, with start and end, fits into `context_length` tokens uncut."""
        return len(self.encode(text)) + 2 <= context_length

    def __call__(self, texts, context_length):
        """B strings (or one) -> ids (B, L): start, text (cut if too long), end, then zeros."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(ids, texts):
            tokens = [self.start_id, *self.encode(text)[:context_length - 2], self.end_id]
            row[:len(tokens)] = torch.tensor(tokens)
        return ids


def as_pair(merge):
    """A merge, as a string "a b" or as two strings -> a tuple of two symbols.

    Raises TypeError or ValueError for anything else.
    """
    a, b = merge.split() if isinstance(merge, str) else merge
    if not isinstance(a, str) or not isinstance(b, str):
        raise TypeError("a merge must be two strings")
    if len(a) + len(b) > LONGEST_SYMBOL:
        raise ValueError("a symbol is too long")
    return a, b


def read_vocabulary(path):
    """The merges in OpenAI's vocabulary file, as it is published. ValueError on any other file."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read(2 ** 24).split("\n")           # the real file is 3 MB
        lines = lines[1:OPENAI_MERGES + 1]                   # the first line is a version
        merges = [as_pair(line) for line in lines if line.strip()]
        if not merges:
            raise ValueError("no merges")                    # reworded below
        return merges
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error):
        raise ValueError(f"{path} is not a CLIP vocabulary file ({VOCABULARY_FILE})") from None


# --------------------------------------------------------------------------------------------------
# The model: an image tower and a text tower that end in one space

@dataclass
class CLIPConfig:
    resolution: int = 64         # side in pixels that the image tower sees; others are resampled
    vision_width: int = 64       # ViT: D. ResNet: channels of the first stage; each stage doubles
    vision_layers: int | tuple = (2, 2, 2)  # ViT: its layers. ResNet: blocks of each stage
    patch: int = 8               # ViT: side in pixels of one image token
    vision_heads: int = 4        # ViT
    text_width: int = 160        # D of the text tower
    text_layers: int = 3
    text_heads: int = 5
    context_length: int = 32     # L: text tokens, start and end included
    vocab_size: int = 514        # V: 514 + merges; set it from the tokenizer
    embed_dim: int = 256         # E: the shared space
    quick_gelu: bool = False     # x sigmoid(1.702 x), as OpenAI trained; False: exact GELU
    image_mean: tuple = (0.5, 0.5, 0.5)  # of pixels in [0, 1]; the defaults scale to [-1, 1]
    image_std: tuple = (0.5, 0.5, 0.5)


OPENAI_PIXELS = dict(image_mean=(0.48145466, 0.4578275, 0.40821073),
                     image_std=(0.26862954, 0.26130258, 0.27577711))

PRESETS = {
    "toy": CLIPConfig(resolution=16, vision_width=8, vision_layers=(1, 1), text_width=32,
                      text_layers=2, text_heads=2, context_length=16, embed_dim=24),
    "tiny": CLIPConfig(),
    "small": CLIPConfig(resolution=128, vision_width=96, vision_layers=(2, 2, 2, 2),
                        text_width=512, text_layers=6, text_heads=8, context_length=48,
                        embed_dim=512),
    "paper": CLIPConfig(resolution=224, patch=14, vision_width=1024, vision_layers=24,  # ViT-L/14
                        vision_heads=16, text_width=768, text_layers=12, text_heads=12,
                        context_length=77, vocab_size=49408, embed_dim=768, quick_gelu=True,
                        **OPENAI_PIXELS),
}


def normal(*shape, std):
    """A parameter of the given shape, drawn from a normal distribution."""
    return nn.init.normal_(nn.Parameter(torch.empty(shape)), std=std)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + MLP(norm(x)).

    Weights are initialised as in CLIP: the two outputs that are added to x start small.
    """

    def __init__(self, width, heads, depth, causal, quick_gelu):
        super().__init__()
        self.causal = causal
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU() if quick_gelu else nn.GELU(),
            c_proj=nn.Linear(4 * width, width)))
        nn.init.normal_(self.attn.in_proj_weight, std=width ** -0.5)
        nn.init.normal_(self.attn.out_proj.weight, std=(2 * depth * width) ** -0.5)
        nn.init.normal_(self.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.mlp.c_proj.weight, std=(2 * depth * width) ** -0.5)
        for linear in (self.mlp.c_fc, self.mlp.c_proj):
            nn.init.zeros_(linear.bias)

    def forward(self, x):                                                # (B, N, D)
        N = x.shape[1]
        device = x.device
        mask = torch.ones(N, N, dtype=torch.bool, device=device).triu(1) if self.causal else None
        # in fp32 on CPUs, where attention's backward pass is 15 times slower in bf16
        bf16 = device.type == "cuda" and torch.is_autocast_enabled("cuda")
        with torch.autocast(device.type, enabled=bf16):
            h = self.ln_1(x.float())
            x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def transformer(width, layers, heads, causal, quick_gelu):
    """A stack of blocks, under the name that it has in OpenAI's checkpoints."""
    blocks = [Block(width, heads, layers, causal, quick_gelu) for _ in range(layers)]
    return nn.Sequential(OrderedDict(resblocks=nn.Sequential(*blocks)))


class VisionTransformer(nn.Module):
    """Image tower: patches and a class token, whose last state is the image's feature."""

    def __init__(self, config):
        super().__init__()
        width = config.vision_width
        tokens = (config.resolution // config.patch) ** 2
        self.conv1 = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)
        self.class_embedding = normal(width, std=width ** -0.5)
        self.positional_embedding = normal(tokens + 1, width, std=width ** -0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = transformer(width, config.vision_layers, config.vision_heads, False,
                                       config.quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = normal(width, config.embed_dim, std=width ** -0.5)

    def forward(self, pixels):                                           # (B, 3, S, S)
        x = self.conv1(pixels).flatten(2).transpose(1, 2)                # (B, N, D)
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding     # (B, 1 + N, D)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj                         # (B, E)


def conv_norm(c_in, c_out, kernel, stride=1):
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016); halves the sides if c_in != c_out."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.halves = c_in != c_out
        self.conv1 = conv_norm(c_in, c_out, 3, stride=2 if self.halves else 1)
        self.conv2 = conv_norm(c_out, c_out, 3)
        self.shortcut = conv_norm(c_in, c_out, 1) if self.halves else nn.Identity()

    def forward(self, x):                                                # (B, c_in, h, w)
        y = F.relu(self.conv1(x))
        y = self.conv2(y)
        if self.halves:
            x = F.avg_pool2d(x, 2, ceil_mode=True)                       # odd sides lose no pixel
        return F.relu(y + self.shortcut(x))              # (B, c_out, h, w), or half the sides


class ResNet(nn.Module):
    """Image tower: a ResNet whose feature is made of the mean activations of all its stages.

    CLIP's own ResNet uses the last stage only, with attention pooling. The last stage represents
    the object; the early ones represent colours and textures, which a style score needs.
    """

    def __init__(self, config):
        super().__init__()
        widths = [config.vision_width * 2 ** i for i in range(len(config.vision_layers))]
        self.stem = nn.Sequential(
            conv_norm(3, widths[0] // 2, 3, stride=2), nn.ReLU(),
            conv_norm(widths[0] // 2, widths[0], 3), nn.ReLU())
        self.stages = nn.ModuleList()
        c = widths[0]
        for width, blocks in zip(widths, config.vision_layers):
            rest = [ResidualBlock(width, width) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(ResidualBlock(c, width), *rest))
            c = width
        self.norm = nn.BatchNorm1d(sum(widths))      # all stages start with equal weight
        self.proj = normal(sum(widths), config.embed_dim, std=sum(widths) ** -0.5)

    def forward(self, pixels):                                           # (B, 3, S, S)
        x = self.stem(pixels)                                            # (B, D, S / 2, S / 2)
        averages = []
        for stage in self.stages:
            x = stage(x)                     # from the second stage on: half the side, twice D
            averages.append(x.mean((2, 3), dtype=torch.float32))
        x = self.norm(torch.cat(averages, dim=1))                        # (B, D + 2 D + 4 D + ...)
        return x @ self.proj                                             # (B, E)


class CLIP(nn.Module):
    """An image tower and a text tower.

    Raises ValueError if the config is invalid, or has another vocabulary size than the tokenizer.
    """

    def __init__(self, config, tokenizer=None):
        super().__init__()
        if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model "
                             f"{config.vocab_size}: give both the same merges")
        if not 1 <= config.patch <= config.resolution <= 1024:
            raise ValueError("patch must be at most resolution, and resolution at most 1024")
        if not len(config.image_mean) == len(config.image_std) == 3:
            raise ValueError("image_mean and image_std must be three numbers")
        self.config = config
        self.tokenizer = tokenizer
        width = config.text_width
        tower = VisionTransformer if isinstance(config.vision_layers, int) else ResNet
        self.visual = tower(config)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = normal(config.context_length, width, std=0.01)
        self.transformer = transformer(width, config.text_layers, config.text_heads, True,
                                       config.quick_gelu)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = normal(width, config.embed_dim, std=width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def prepare(self, images):
        """(B, 3, H, W) in [-1, 1] -> what the tower reads: the centre square, resized, scaled."""
        H, W = images.shape[-2:]
        size = self.config.resolution
        side = min(H, W)
        top, left = (H - side) // 2, (W - side) // 2
        images = images[..., top:top + side, left:left + side].float()
        if side != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
            images = images.clamp(-1, 1)
        channels = zip(images.unbind(1), self.config.image_mean, self.config.image_std)
        return torch.stack([((x + 1) / 2 - mean) / std for x, mean, std in channels], dim=1)

    def encode_image(self, images):
        """Images (B, 3, H, W) in [-1, 1], of any size -> features (B, E), not normalised."""
        return self.visual(self.prepare(images))

    def tokenize(self, texts):
        """B strings (or one) -> ids (B, L) on the model's device.

        Warns of texts that are too long. Raises ValueError without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(f"this CLIP has no tokenizer: pass merges=.../{VOCABULARY_FILE}")
        length = self.config.context_length
        for text in [texts] if isinstance(texts, str) else texts:
            if not self.tokenizer.fits(text, length):
                warnings.warn(f"only the first {length - 2} tokens of {text[:60]!r}... are used",
                              stacklevel=2)
        return self.tokenizer(texts, length).to(self.logit_scale.device)

    def encode_text(self, ids):
        """ids (B, L) -> features (B, E), not normalised.

        Attention is causal, so the end token's state, and no other, has read exactly the text. The
        end token has the highest id: argmax finds it (CLIP's own trick).
        """
        x = self.token_embedding(ids)                                    # (B, L, D)
        x = x + self.positional_embedding[:ids.shape[1]]
        x = self.ln_final(self.transformer(x))
        x = x[torch.arange(len(ids), device=ids.device), ids.argmax(1)]  # (B, D)
        return x @ self.text_projection                                  # (B, E)


def load_clip(path, merges=None, quick_gelu=None):
    """A CLIP from a file of weights: see checkpoint.clip.load_clip, which reads it."""
    from checkpoint.clip import load_clip as load            # it imports this module
    return load(path, merges, quick_gelu)


# --------------------------------------------------------------------------------------------------
# Feedback

@torch.no_grad()
def image_features(clip, images, chunk=64):
    """Images (B, 3, H, W) in [-1, 1] -> features of length 1 (B, E), a chunk at a time."""
    device = clip.logit_scale.device
    features = [clip.encode_image(part.to(device)).float() for part in images.split(chunk)]
    return F.normalize(torch.cat(features), dim=-1)


@torch.no_grad()
def text_score(clip, images, texts):
    """Text score (StyleDrop 4.2.1): cosine of image i with text i.

    images (B, 3, H, W) in [-1, 1]; texts: B strings, or one for all. Returns (B,) in [-1, 1]: the
    plain cosine, without CLIP's logit scale. Raises ValueError when the numbers differ. Whether a
    text names the style is the caller's choice; the paper does not say.
    """
    if not isinstance(texts, str) and len(texts) != len(images):
        raise ValueError(f"{len(images)} images but {len(texts)} texts: give one text per image, "
                         "or one string for all")
    features = F.normalize(clip.encode_text(clip.tokenize(texts)).float(), dim=-1)  # (B or 1, E)
    return (image_features(clip, images) * features).sum(-1).clamp(-1, 1)


@torch.no_grad()
def style_score(clip, images, reference):
    """Style score (StyleDrop 4.2.1): cosine of each image with the style reference.

    images (B, 3, H, W), reference (3, H, W) or (R, 3, H, W), in [-1, 1], of any size. Returns (B,)
    in [-1, 1]; with R references, the mean of the R cosines. An image that copies the reference's
    content scores high too (4.4.3).
    """
    reference = reference[None] if reference.dim() == 3 else reference
    cosines = image_features(clip, images) @ image_features(clip, reference).T   # (B, R)
    return cosines.mean(1).clamp(-1, 1)


def select_best(scores, k=1):
    """CLIP feedback (StyleDrop 4.4.3): scores (P prompts, K images) -> indices (P, k), best first.

    Raises ValueError if k is out of range or a score is not a number.
    """
    if scores.dim() != 2 or not 1 <= k <= scores.shape[1]:
        raise ValueError(f"cannot pick {k} per prompt from scores {tuple(scores.shape)}: "
                         "expected (prompts, images)")
    if not scores.isfinite().all():
        raise ValueError("some scores are not finite numbers: look at the images they belong to")
    return scores.topk(k, dim=1).indices
