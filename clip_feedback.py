"""CLIP: it scores pictures, and chooses among them (StyleDrop 3.3, 4.2.1, 4.4.3).

    clip = load_clip("weights/tiny/clip.pt")
    text_score(clip, images, ["a cat", "a hot air balloon"])  # (2,) cosines
    style_score(clip, images, reference)                      # images (2, 3, H, W) in [-1, 1]

CLIP (Radford et al. 2021, arXiv 2103.00020) has an image tower and a text tower, which meet in one
space. The text score is the cosine between picture and prompt, the style score the cosine between
picture and style reference. CLIP only judges: Muse never reads it, so any other CLIP can take its
place. Both of its kinds of image tower are here: a ResNet, which ours has, and the ViT, with the
parameter names of OpenAI's checkpoints, so that public weights load unchanged.

Shapes: B batch, N image tokens, L text length, D width, V vocabulary, E shared space, H heads.
"""

import gzip
import html
import math
import os
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn as nn
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# The tokenizer: byte-level BPE

START, END, EOW = "<|startoftext|>", "<|endoftext|>", "</w>"
VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"  # OpenAI's merges, which public weights need
OPENAI_MERGES = 49152 - 256 - 2                   # the file lists more merges than the models use
LONGEST_SYMBOL = 256                              # characters; OpenAI's longest merge has 30 or so

# A text falls into: English contractions, runs of letters, single digits, runs of all else but
# space. CLIP also reads a typed "<|endoftext|>" as the end itself; here it is plain text, so that
# no prompt can end early.
WORD = regex.compile(r"'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def byte_symbols():
    """{byte: visible character} in the order of CLIP's vocabulary, so that merges are plain text.

    Bytes that print in Latin-1 stand for themselves and come first; the rest borrow characters from
    U+0100 on.
    """
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
             *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


BYTES = byte_symbols()


def split_words(text):
    """Clean `text` as CLIP does -> its words, tuples of byte symbols, the last one with "</w>"."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))  # web captions are often escaped twice
    text = " ".join(text.split()).lower()
    for word in WORD.findall(text):
        symbols = [BYTES[byte] for byte in word.encode("utf-8")]
        yield (*symbols[:-1], symbols[-1] + EOW)


def merge_pair(word, pair):
    """Join every occurrence of `pair` in a tuple of symbols, from left to right."""
    merged, i = [], 0
    while i < len(word):
        step = 2 if word[i:i + 2] == pair else 1
        merged.append("".join(word[i:i + step]))
        i += step
    return tuple(merged)


def train_merges(texts, n_merges):
    """Learn BPE merges (Sennrich et al. 2016): again and again, join the most frequent pair.

    Ties go to the lexicographically first pair, so the same texts give the same merges everywhere.
    Returns at most `n_merges` pairs of symbols in merge order; fewer when every word has become a
    single symbol.
    """
    counts = Counter(word for text in texts for word in split_words(text))
    words, weight = list(counts), list(counts.values())
    pairs, where = Counter(), defaultdict(set)  # pair -> its count, pair -> the words that hold it

    def count_word(w, sign):
        for pair in zip(words[w], words[w][1:]):
            pairs[pair] += sign * weight[w]
            (where[pair].add if sign > 0 else where[pair].discard)(w)
            if not pairs[pair]:
                del pairs[pair], where[pair]

    for w in range(len(words)):
        count_word(w, +1)
    merges = []
    while pairs and len(merges) < n_merges:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for w in list(where[best]):             # only these words change
            count_word(w, -1)
            words[w] = merge_pair(words[w], best)
            count_word(w, +1)
    return merges


class Tokenizer:
    """CLIP's byte-level BPE: any text in, ids out, nothing unknown.

    merges: pairs of symbols, or strings "a b", in merge order (`train_merges`, or a checkpoint of
    ours); or the path of OpenAI's vocabulary file (a header line, then one merge a line). Raises
    ValueError on other content. Vocabulary: 256 byte symbols, the same 256 ending a word, one
    symbol per merge, start, end.
    """

    def __init__(self, merges):
        if isinstance(merges, (str, os.PathLike)):
            merges = read_vocabulary(merges)
        self.merges = [*map(as_pair, merges)] if isinstance(merges, (list, tuple)) else [None]
        if None in self.merges:
            raise ValueError("merges must be pairs of symbols, one pair an entry")
        letters = list(BYTES.values())
        self.symbols = [*letters, *(s + EOW for s in letters), *(a + b for a, b in self.merges),
                        START, END]
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.start_id, self.end_id = self.vocab_size - 2, self.vocab_size - 1
        self.ranks = {merge: rank for rank, merge in enumerate(self.merges)}
        self.cache = {}

    @property
    def vocab_size(self):
        return len(self.symbols)

    def pieces(self, word):
        """Join the pair that was learned first, until no neighbours form a learned pair."""
        if word not in self.cache:
            joined = word
            while len(joined) > 1:
                rank = lambda pair: self.ranks.get(pair, math.inf)
                best = min(zip(joined, joined[1:]), key=rank)
                if best not in self.ranks:
                    break
                joined = merge_pair(joined, best)
            self.cache[word] = joined
        return self.cache[word]

    def encode(self, text):
        """text -> list of ids, without start and end."""
        return [self.ids[piece] for word in split_words(text) for piece in self.pieces(word)]

    def decode(self, ids):
        """ids -> text: lower case, one space after each word; reads up to the end token, if any."""
        byte_of, text = {symbol: byte for byte, symbol in BYTES.items()}, bytearray()
        for i in (int(i) for i in ids):
            if i == self.end_id:
                break
            if i != self.start_id:
                symbol = self.symbols[i]
                text += bytes(byte_of[s] for s in symbol.removesuffix(EOW))
                text += b" " if symbol.endswith(EOW) else b""
        return text.decode("utf-8", errors="replace").rstrip()

    def fits(self, text, context_length):
        """Does `text`, with start and end, fit into `context_length` tokens, or is its tail cut?"""
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
    """"a b" or a pair of strings -> a tuple of two symbols; None for anything else."""
    pair = merge.split() if isinstance(merge, str) else merge
    fits = (isinstance(pair, (list, tuple)) and len(pair) == 2
            and all(isinstance(symbol, str) and len(symbol) <= LONGEST_SYMBOL for symbol in pair))
    return tuple(pair) if fits else None


def read_vocabulary(path):
    """The merges of OpenAI's vocabulary file, gzipped or plain. ValueError on any other file."""
    try:
        opener = gzip.open if str(path).endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8") as file:
            merges = file.read(2 ** 24).split("\n")[1:OPENAI_MERGES + 1]  # the real one has 3 MB
        merges = [merge for merge in merges if merge.strip()]
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error):
        merges = []
    if not merges or None in map(as_pair, merges):
        raise ValueError(f"{path} is not a CLIP vocabulary file ({VOCABULARY_FILE})")
    return merges


# --------------------------------------------------------------------------------------------------
# The model: an image tower and a text tower that meet in one space

MAX_LOGIT_SCALE = math.log(100)  # CLIP 2.5: sharper than this, training becomes unstable

# The largest sizes that are built; a file that asks for more is damaged or means ill.
LIMITS = dict(resolution=512, patch=512, vision_width=4096, vision_layers=64, vision_heads=64,
              text_width=4096, text_layers=64, text_heads=64, context_length=1024,
              vocab_size=2 ** 20, embed_dim=4096)


@dataclass
class CLIPConfig:
    resolution: int = 64         # pixels a side that the image tower sees; others are resampled
    vision_width: int = 64       # D of a ViT; channels of a ResNet's first stage, each next doubles
    vision_layers: "int | tuple" = (2, 2, 2)  # ViT: its layers. ResNet: blocks of each stage
    patch: int = 8               # ViT: pixels a side of one image token
    vision_heads: int = 4        # ViT
    text_width: int = 160        # D of the text tower
    text_layers: int = 3
    text_heads: int = 5
    context_length: int = 32     # L: text tokens, start and end included
    vocab_size: int = 514        # V: 514 + merges; set it from the tokenizer
    embed_dim: int = 256         # E: the shared space
    quick_gelu: bool = False     # x sigmoid(1.702 x), as OpenAI trained; False: exact GELU
    image_mean: tuple = (0.5, 0.5, 0.5)  # of pixels in [0, 1]; these defaults give back [-1, 1]
    image_std: tuple = (0.5, 0.5, 0.5)

    def __post_init__(self):
        """ValueError on sizes that no CLIP has, before anything of that size is built."""
        for name, most in LIMITS.items():
            value = getattr(self, name)
            stages = name == "vision_layers" and isinstance(value, tuple) and 1 <= len(value) <= 5
            for size in value if stages else (value,):
                if type(size) is not int or not 1 <= size <= most:
                    raise ValueError(f"{name} must be a whole number from 1 to {most}")
        if self.text_width % self.text_heads:
            raise ValueError("text_width must be a multiple of text_heads")
        if isinstance(self.vision_layers, int):
            if self.vision_width % self.vision_heads or self.patch > self.resolution:
                raise ValueError("vision_width must be a multiple of vision_heads, "
                                 "and patch at most resolution")
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or [type(v) for v in value] != [float] * 3:
                raise ValueError(f"{name} must be three numbers")


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


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention with nn.MultiheadAttention's parameters: q, k, v in one matrix."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):                                                # (B, N, D)
        B, N, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)        # (B, N, 3 D)
        qkv = qkv.view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                             # 3 x (B, H, N, D / H)
        if x.device.type == "cpu":  # bf16 attention's backward pass is 15x slower there than fp32's
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(x.device.type, enabled=False):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(out.transpose(1, 2).reshape(B, N, D))       # (B, N, D)


class Block(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, width, heads, causal, quick_gelu):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU() if quick_gelu else nn.GELU(),
            c_proj=nn.Linear(4 * width, width)))

    def forward(self, x):                                                # (B, N, D)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width, layers, heads, causal, quick_gelu):
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, heads, causal, quick_gelu)
                                         for _ in range(layers)))

    def forward(self, x):                                                # (B, N, D)
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    """Image tower: patches and one class token, whose last state is the picture's feature."""

    def __init__(self, config):
        super().__init__()
        width, tokens = config.vision_width, (config.resolution // config.patch) ** 2
        self.conv1 = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(tokens + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, config.vision_heads, False,
                                       config.quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, config.embed_dim))

    def forward(self, pixels):                                           # (B, 3, S, S)
        x = self.conv1(pixels).flatten(2).transpose(1, 2)                # (B, N, D)
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding     # (B, 1 + N, D)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj                         # (B, E)


def conv_norm(c_in, c_out, kernel, stride=1):
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al. 2016, Figure 5 left)."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = conv_norm(c_in, c_out, 3, stride)
        self.conv2 = conv_norm(c_out, c_out, 3)
        self.shortcut = nn.Identity() if c_in == c_out else conv_norm(c_in, c_out, 1)
        self.stride = stride

    def forward(self, x):                                                # (B, c_in, h, w)
        y = F.relu(self.conv1(x))
        y = self.conv2(y)
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)             # as CLIP's: drops no pixel
        return F.relu(y + self.shortcut(x))                              # (B, c_out, h / s, w / s)


class ResNet(nn.Module):
    """Image tower: convolutions; the channels of each stage, averaged over the picture.

    CLIP's own reads the last stage only, by attention. Here all stages are read: what the picture
    shows is found in the last, its colours and textures already in the first. Averages know no
    places, which suits a style score.
    """

    def __init__(self, config):
        super().__init__()
        widths = [config.vision_width * 2 ** i for i in range(len(config.vision_layers))]
        self.stem = nn.Sequential(
            conv_norm(3, widths[0] // 2, 3, stride=2), nn.ReLU(),
            conv_norm(widths[0] // 2, widths[0], 3), nn.ReLU())
        self.stages = nn.ModuleList()
        for i, blocks in enumerate(config.vision_layers):
            first = ResidualBlock(widths[max(i - 1, 0)], widths[i], 1 if i == 0 else 2)
            rest = [ResidualBlock(widths[i], widths[i], 1) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(first, *rest))
        self.norm = nn.BatchNorm1d(sum(widths))      # so that the stages weigh alike at the start
        self.proj = nn.Parameter(torch.empty(sum(widths), config.embed_dim))

    def forward(self, pixels):                                           # (B, 3, S, S)
        x, averages = self.stem(pixels), []                              # (B, D, S / 2, S / 2)
        for stage in self.stages:
            x = stage(x)                                                 # half the side, twice D
            averages.append(x.mean((2, 3), dtype=torch.float32))
        x = self.norm(torch.cat(averages, dim=1))                        # (B, D + 2 D + 4 D + ...)
        return x @ self.proj                                             # (B, E)


class CLIP(nn.Module):
    """Two towers, one space. `tokenizer` (optional) turns strings into ids."""

    def __init__(self, config, tokenizer=None):
        super().__init__()
        if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model "
                             f"{config.vocab_size}: give both the same merges")
        self.config, self.tokenizer, width = config, tokenizer, config.text_width
        is_vit = isinstance(config.vision_layers, int)
        self.visual = VisionTransformer(config) if is_vit else ResNet(config)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.transformer = Transformer(width, config.text_layers, config.text_heads, True,
                                       config.quick_gelu)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.initialise()

    def initialise(self):
        """All initial weights: CLIP's rule for its text tower (std by width and depth), in both."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.config.text_width ** -0.5)
        nn.init.normal_(self.visual.proj, std=len(self.visual.proj) ** -0.5)
        for module in self.modules():
            if isinstance(module, VisionTransformer):
                nn.init.normal_(module.class_embedding, std=self.config.vision_width ** -0.5)
                nn.init.normal_(module.positional_embedding, std=self.config.vision_width ** -0.5)
            if isinstance(module, ResNet):
                for conv in (m for m in module.modules() if isinstance(m, nn.Conv2d)):
                    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            if isinstance(module, Transformer):
                depth = (2 * len(module.resblocks)) ** -0.5  # each layer adds to the stream twice
                for block in module.resblocks:
                    width = block.ln_1.weight.numel()
                    nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
                    nn.init.normal_(block.attn.out_proj.weight, std=width ** -0.5 * depth)
                    nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                    nn.init.normal_(block.mlp.c_proj.weight, std=width ** -0.5 * depth)
                    for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                        nn.init.zeros_(linear.bias)

    def prepare(self, images):
        """(B, 3, H, W) in [-1, 1] -> what the tower reads: centre square, its size and scale."""
        side, size = min(images.shape[-2:]), self.config.resolution
        top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
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
        """Strings -> ids (B, L) on the model's device. Warns of texts too long for it."""
        if self.tokenizer is None:
            raise ValueError(f"this CLIP has no tokenizer: pass merges=.../{VOCABULARY_FILE}")
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = self.config.context_length
        for text in texts:
            if not self.tokenizer.fits(text, length):
                said = f"only the first {length - 2} tokens are read of: {text[:60]}..."
                warnings.warn(said, stacklevel=2)
        return self.tokenizer(texts, length).to(self.logit_scale.device)

    def encode_text(self, ids):
        """ids (B, L) -> features (B, E), not normalised.

        Each state knows only the tokens before it, so the end token's, and none else, has read all;
        and what pads the row behind it does not matter. The end has the vocabulary's highest id:
        argmax finds it (CLIP's own trick).
        """
        x = self.token_embedding(ids)                                    # (B, L, D)
        x = x + self.positional_embedding[:ids.shape[1]]
        x = self.ln_final(self.transformer(x))
        x = x[torch.arange(len(ids), device=ids.device), ids.argmax(1)]  # (B, D)
        return x @ self.text_projection                                  # (B, E)


def contrastive_loss(image_features, text_features, logit_scale, same=None):
    """Symmetric InfoNCE (CLIP Figure 3): find each image's caption, and each caption's image.

    image_features, text_features (B, E), of any length; logit_scale: the model's parameter, the log
    of what the cosines are multiplied by, read no higher than ln 100. same (B, B) bool: text j is
    right for image i too; None: only i = j is. Returns a scalar.

    Plain CLIP calls every other caption of the batch wrong. With 800 names, and styles often
    unsaid, "a cat" comes twice in many batches; to push a cat from its own caption teaches nothing.
    So the target is spread evenly over all right answers. The least loss is then the mean log of
    their number, not 0.
    """
    image_features = F.normalize(image_features.float(), dim=-1)
    text_features = F.normalize(text_features.float(), dim=-1)
    scale = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
    logits = scale * image_features @ text_features.T                    # (B images, B texts)
    same = torch.eye(len(logits), device=logits.device) if same is None else same.to(logits.dtype)
    to_text = F.cross_entropy(logits, same / same.sum(1, keepdim=True))
    to_image = F.cross_entropy(logits.T, same.T / same.T.sum(1, keepdim=True))
    return (to_text + to_image) / 2


# --------------------------------------------------------------------------------------------------
# Files

def load_clip(path, merges=None, quick_gelu=None):
    """Read a CLIP -> CLIP in fp32 on the CPU, in eval mode, with `.tokenizer` and `.provenance`.

    path: a checkpoint of ours (a dict of config, weights, merges, provenance), or OpenAI's or
    open_clip's ViT weights (a state dict, bare or under "state_dict"), whose config is read off the
    shapes. merges, for foreign weights: the path of OpenAI's vocabulary file; by default the one
    beside `path`, if there is one. quick_gelu cannot be read off shapes: by default True for
    OpenAI's own files, False for open_clip's. Raises FileNotFoundError, or ValueError with one line
    when the file is damaged or something else.
    """
    path, provenance = Path(path), {}
    content = read_weights(path)
    if "config" in content and "weights" in content:
        config, weights = content["config"], content["weights"]
        provenance = content.get("provenance", {})
        merges = content.get("merges") if merges is None else merges
    else:
        weights = {str(name).removeprefix("module.").removeprefix("text."): w
                   for name, w in content.items()}
        openai = "input_resolution" in weights
        for name in ("input_resolution", "context_length", "vocab_size", "attn_mask"):
            weights.pop(name, None)
        config = infer_config(path, weights, openai if quick_gelu is None else quick_gelu)
        beside = path.parent / VOCABULARY_FILE
        merges = beside if merges is None and beside.exists() else merges
    if not all(isinstance(part, dict) for part in (config, weights, provenance)):
        raise ValueError(f"{path} is damaged: its config, weights or provenance is no dict")
    try:
        tokenizer = None if merges is None else Tokenizer(merges)
        with torch.device("meta"):                         # shapes first, memory when they agree
            clip = CLIP(CLIPConfig(**config), tokenizer)
        expected = clip.state_dict()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this CLIP: {error}") from None
    wrong = [name for name in expected if not is_weight(weights.get(name), expected[name])]
    wrong = wrong + [str(name)[:80] for name in weights if name not in expected]
    if wrong:
        raise ValueError(f"{path} does not fit this CLIP: {len(wrong)} weights differ, "
                         f"the first is {wrong[0]}")
    clip.load_state_dict({name: weights[name].to(expected[name].dtype, copy=True).contiguous()
                          for name in expected}, assign=True)
    clip.provenance = provenance
    return clip.eval()


def is_weight(found, expected):
    """A dense tensor of finite numbers, of the right shape, which has the memory that it claims."""
    return (isinstance(found, torch.Tensor) and found.shape == expected.shape
            and found.layout == torch.strided and found.device.type == "cpu"
            and found.is_floating_point() == expected.is_floating_point()
            and found.numel() * found.element_size() <= found.untyped_storage().nbytes()
            and bool(found.isfinite().all()))


def read_weights(path):
    """The dict in a file of `torch.save`. No code that a file may hold is ever run.

    TorchScript archives, as OpenAI publishes, are code (their __setstate__ runs when they are
    opened), and so are arbitrary pickles: both are refused with a ValueError in one line.
    """
    is_script = larger = False
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                is_script = any(name.endswith("constants.pkl") for name in archive.namelist())
                larger = sum(i.file_size for i in archive.infolist()) > os.path.getsize(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                # they would end in the error below
            content = None if is_script or larger else torch.load(path, "cpu", weights_only=True)
    except OSError:
        raise
    except Exception:      # a damaged file fails in a dozen ways: zip, pickle, end of file, types
        raise ValueError(f"{path} is damaged, or not a file of weights by torch.save") from None
    if is_script:
        raise ValueError(
            f"{path} is a TorchScript archive, which holds code; where you trust it, convert it: "
            f"python -c \"import torch; torch.save(torch.jit.load('{Path(path).name}', "
            "map_location='cpu').state_dict(), 'clip.pt')\"")
    if larger:
        raise ValueError(f"{path} is compressed: torch.save writes no such files")
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no CLIP: expected a dict of weights")
    return content


def infer_config(path, weights, quick_gelu):
    """CLIPConfig's fields, from the shapes of OpenAI's or open_clip's ViT weights."""
    try:
        vision_width, _, patch, _ = weights["visual.conv1.weight"].shape
        vocab_size, text_width = weights["token_embedding.weight"].shape
        grid = math.isqrt(len(weights["visual.positional_embedding"]) - 1)
        context_length = len(weights["positional_embedding"])
        embed_dim = weights["text_projection"].shape[1]
    except (KeyError, ValueError, AttributeError, TypeError, IndexError):
        raise ValueError(f"{path} holds no CLIP with a ViT image tower "
                         "(of ResNet towers only ours are read)") from None
    # open_clip's H, g and bigG have wider heads; all others have 64
    head = {1280: 80, 1408: 88, 1664: 104}.get(vision_width, 64)
    layers = lambda tower: sum(name.startswith(tower) and name.endswith(".ln_1.weight")
                               for name in weights)
    return dict(resolution=grid * patch, patch=patch, vision_width=vision_width,
                vision_layers=layers("visual.transformer.resblocks."),
                vision_heads=max(1, vision_width // head), text_width=text_width,
                text_layers=layers("transformer.resblocks."), text_heads=max(1, text_width // 64),
                context_length=context_length, vocab_size=vocab_size, embed_dim=embed_dim,
                quick_gelu=quick_gelu, **OPENAI_PIXELS)


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
    texts = [texts] * len(images) if isinstance(texts, str) else list(texts)
    if len(texts) != len(images):
        raise ValueError(f"{len(images)} images but {len(texts)} texts: give one text per image, "
                         "or one string for all")
    distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    features = F.normalize(clip.encode_text(clip.tokenize(distinct)).float(), dim=-1)
    features = features[[distinct[text] for text in texts]]              # (B, E)
    return (image_features(clip, images) * features).sum(-1).clamp(-1, 1)


@torch.no_grad()
def style_score(clip, images, reference):
    """Style score (StyleDrop 4.2.1): cosine of each image with the style reference.

    images (B, 3, H, W), reference (3, H, W) or (R, 3, H, W), in [-1, 1], sizes free. Returns (B,)
    in [-1, 1]; with R references the mean of the R cosines. A picture that copies the reference's
    content scores high too (4.4.3).
    """
    reference = reference[None] if reference.dim() == 3 else reference
    return (image_features(clip, images) @ image_features(clip, reference).T).mean(1).clamp(-1, 1)


def select_best(scores, k=1):
    """CLIP feedback (StyleDrop 4.4.3): scores (P prompts, K images) -> indices (P, k), best first.

    Raises ValueError when k is out of reach or a score is not a number.
    """
    if scores.dim() != 2 or not 1 <= k <= scores.shape[1]:
        raise ValueError(f"cannot pick {k} per prompt from scores {tuple(scores.shape)}: "
                         "expected (prompts, images)")
    if not scores.isfinite().all():
        raise ValueError("some scores are not finite numbers: look at the images they belong to")
    return scores.topk(k, dim=1).indices


def select_random(prompts, images, generator=None, k=1):
    """The control of StyleDrop 4.4.3: k of each prompt's images, none twice -> (prompts, k)."""
    if not 1 <= k <= images:
        raise ValueError(f"cannot pick {k} of {images} images")
    return torch.rand(prompts, images, generator=generator).argsort(dim=1)[:, :k]
