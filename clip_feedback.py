"""T, and the judge: a small CLIP, its tokenizer, and feedback by CLIP scores (StyleDrop 3.3, 4.2.1, 4.4.3).

    clip = load_clip("weights/tiny/clip.pt")
    text_score(clip, images, ["a cat", "a hot air balloon"])  # (2,) cosines; images (2, 3, H, W) in [-1, 1]

CLIP (Radford et al. 2021, arXiv 2103.00020) has two parts here. Its text tower is T of Eq. 1-6, where the
paper has T5-XXL: Muse reads one state per text token. Both towers together score pictures: the text score is
the cosine between picture and prompt, the style score the cosine between picture and style reference.

Shapes: B batch, N image tokens, L text length, D width, V vocabulary, E shared embedding, H heads.
Parameter names are those of OpenAI's checkpoints, so that public ViT weights load unchanged.
"""

import gzip
import html
import math
import os
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn as nn
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------------------
# The tokenizer: byte-level BPE

START, END, EOW = "<|startoftext|>", "<|endoftext|>", "</w>"
VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"  # OpenAI's merges, the ones that public weights need
OPENAI_MERGES = 49152 - 256 - 2                   # the file lists more merges than the models use

# A text falls into: English contractions, runs of letters, single digits, runs of anything else but space.
# CLIP also reads a typed "<|endoftext|>" as the end itself; here it is plain text, so no prompt can end early.
WORD = regex.compile(r"'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def byte_symbols():
    """{byte: visible character} in the order of CLIP's vocabulary, so that merges can be stored as plain text.

    Bytes that print in Latin-1 stand for themselves and come first; the rest borrow characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(hidden)}}


BYTES = byte_symbols()


def split_words(text):
    """Clean `text` as CLIP does and cut it into words, each a tuple of byte symbols, the last with "</w>"."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))  # twice: web captions are often escaped twice
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
    """Learn BPE merges (Sennrich et al. 2016): again and again, join the most frequent pair of neighbours.

    Ties go to the lexicographically first pair, so the same texts give the same merges everywhere. Returns at
    most `n_merges` pairs of symbols in merge order; fewer when every word has become a single symbol.
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

    merges: pairs of symbols, or strings "a b", in merge order (`train_merges`, or a checkpoint of ours); or the
    path of OpenAI's vocabulary file (a header line, then one merge a line). Raises ValueError on other content.
    Vocabulary: 256 byte symbols, the same 256 ending a word, one symbol per merge, start, end.
    """

    def __init__(self, merges):
        if isinstance(merges, (str, os.PathLike)):
            merges = read_vocabulary(merges)
        self.merges = [tuple(merge.split()) if isinstance(merge, str) else tuple(merge) for merge in merges]
        if any(len(merge) != 2 for merge in self.merges):
            raise ValueError("merges must be pairs of symbols, one pair an entry")
        letters = list(BYTES.values())
        self.symbols = [*letters, *(s + EOW for s in letters), *(a + b for a, b in self.merges), START, END]
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
                best = min(zip(joined, joined[1:]), key=lambda pair: self.ranks.get(pair, math.inf))
                if best not in self.ranks:
                    break
                joined = merge_pair(joined, best)
            self.cache[word] = joined
        return self.cache[word]

    def encode(self, text):
        """text -> list of ids, without start and end."""
        return [self.ids[piece] for word in split_words(text) for piece in self.pieces(word)]

    def decode(self, ids):
        """ids -> text: lower case, one space after each word; reads up to the end token, if there is one."""
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
        """Does `text`, with start and end, fit into `context_length` tokens? If not, its tail will be cut."""
        return len(self.encode(text)) + 2 <= context_length

    def __call__(self, texts, context_length):
        """B strings (or one) -> ids (B, L): start, text, end, then zeros; a long text is cut before the end."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(ids, texts):
            tokens = [self.start_id, *self.encode(text)[:context_length - 2], self.end_id]
            row[:len(tokens)] = torch.tensor(tokens)
        return ids


def read_vocabulary(path):
    """The merges of OpenAI's vocabulary file, gzipped or plain. Raises ValueError on any other file."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            merges = file.read().split("\n")[1:OPENAI_MERGES + 1]
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a CLIP vocabulary file ({VOCABULARY_FILE}): {error}") from None
    merges = [merge for merge in merges if merge.strip()]
    if not merges or any(len(merge.split()) != 2 for merge in merges):
        raise ValueError(f"{path} is not a CLIP vocabulary file ({VOCABULARY_FILE}): no merge on some line")
    return merges


# ----------------------------------------------------------------------------------------------------------
# The model: an image tower and a text tower that meet in one space

MAX_LOGIT_SCALE = math.log(100)  # CLIP 2.5: sharper than this, training becomes unstable


@dataclass
class CLIPConfig:
    resolution: int = 64         # pixels a side that the image tower sees; other sizes are resampled
    patch: int = 8               # pixels a side of one image token
    vision_width: int = 256      # D of the image tower
    vision_layers: int = 4       # 0: no ViT, but GradientTower
    vision_heads: int = 4
    text_width: int = 256        # D of the text tower, and of the states that Muse reads
    text_layers: int = 4
    text_heads: int = 4
    context_length: int = 32     # L: text tokens, start and end included
    vocab_size: int = 514        # V: 514 + merges; set it from the tokenizer
    embed_dim: int = 256         # E: the shared space
    quick_gelu: bool = False     # x sigmoid(1.702 x), as OpenAI trained; False: exact GELU
    states_layer: int = -2       # what Muse reads: -1 the last layer, normalised; -2 the one before, raw; ...
                                 # (of the last layer the loss trains only the state at the end token)
    image_mean: tuple = (0.5, 0.5, 0.5)  # of pixels in [0, 1]; these two defaults give back [-1, 1]
    image_std: tuple = (0.5, 0.5, 0.5)


OPENAI_PIXELS = dict(image_mean=(0.48145466, 0.4578275, 0.40821073), image_std=(0.26862954, 0.26130258, 0.27577711))

PRESETS = {
    "toy": CLIPConfig(resolution=16, vision_width=32, vision_layers=2, vision_heads=2, text_width=32, text_layers=2,
                      text_heads=2, context_length=16, embed_dim=24),
    "tiny": CLIPConfig(vision_width=1536, vision_layers=0),
    "small": CLIPConfig(resolution=128, patch=16, vision_width=512, vision_layers=8, vision_heads=8, text_width=512,
                        text_layers=8, text_heads=8, context_length=48, embed_dim=512),
    "paper": CLIPConfig(resolution=224, patch=14, vision_width=1024, vision_layers=24, vision_heads=16,  # ViT-L/14
                        text_width=768, text_layers=12, text_heads=12, context_length=77, vocab_size=49408,
                        embed_dim=768, quick_gelu=True, **OPENAI_PIXELS),
}


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention with the parameters of nn.MultiheadAttention: q, k, v rows in one matrix."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):  # (B, N, D) -> (B, N, D)
        B, N, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)                    # (B, N, 3 D)
        q, k, v = qkv.view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, D/H)
        if x.device.type == "cpu":  # under bf16 autocast the backward pass of attention is 15x slower than in fp32
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(x.device.type, enabled=False):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)     # (B, H, N, D/H)
        return self.out_proj(out.transpose(1, 2).reshape(B, N, D))


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

    def forward(self, x):  # (B, N, D) -> (B, N, D)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width, layers, heads, causal, quick_gelu):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, causal, quick_gelu) for _ in range(layers))

    def forward(self, x, skip_last=0):  # (B, N, D) -> (B, N, D); without its `skip_last` top layers
        for block in self.resblocks[:len(self.resblocks) - skip_last]:
            x = block(x)
        return x


class VisionTransformer(nn.Module):
    """The image tower: patches and one class token, whose last state is the picture's feature."""

    def __init__(self, config):
        super().__init__()
        width, tokens = config.vision_width, (config.resolution // config.patch) ** 2
        self.conv1 = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(tokens + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, config.vision_heads, False, config.quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, config.embed_dim))

    def forward(self, pixels):                                      # (B, 3, H, W)
        x = self.conv1(pixels).flatten(2).transpose(1, 2)           # (B, N, D)
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding  # (B, 1 + N, D)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj                    # (B, E)


def describe(images, cell=8, orientations=8):
    """What is to be seen in each cell of a picture, and statistics that know no places.

    images (B, 3, S, S) in [-1, 1], cells of `cell` pixels, a multiple of 4 -> cells (B, 3 (orientations + 1) + 3,
    S / cell, S / cell), statistics (B, 9 orientations + 447).
    At three scales: how much of a cell's gradient points each way, divided by how much there is around
    it (histograms of oriented gradients, Dalal & Triggs 2005), and how much there is. The statistics have
    histograms of colour too, of all pixels and of the edges.
    """
    mean_and_deviation = lambda x: [x.mean((2, 3)), x.std((2, 3))]
    cells, statistics, sizes = [F.avg_pool2d(images, cell)], mean_and_deviation(images), []
    angles = torch.arange(orientations, device=images.device).view(-1, 1, 1) * math.pi / orientations
    for scale in (1, 2, 4):
        x = F.pad(F.avg_pool2d(images, scale), (1, 1, 1, 1), mode="replicate")
        dx = (x[..., 1:-1, 2:] - x[..., 1:-1, :-2]) / 2
        dy = (x[..., 2:, 1:-1] - x[..., :-2, 1:-1]) / 2
        channel = (dx ** 2 + dy ** 2).argmax(1, keepdim=True)                    # the steepest of R, G and B
        dx, dy = dx.gather(1, channel), dy.gather(1, channel)
        size = (dx ** 2 + dy ** 2).sqrt()
        towards = size * torch.cos(torch.atan2(dy, dx) - angles) ** 6            # (B, orientations, h, h)
        here = F.avg_pool2d(towards, cell // scale)                              # (B, orientations, S / cell, S / cell)
        around = F.avg_pool2d(F.pad(here.sum(1, keepdim=True), (1, 1, 1, 1), mode="replicate"), 3, 1)
        cells += [(here / (around + 0.02)).sqrt(), around.sqrt()]
        statistics += mean_and_deviation(towards) + mean_and_deviation(size) + [(here.std((2, 3)) + 1e-6).log()]
        statistics += [size.amax((2, 3))]
        sizes.append(size)
    levels = ((images + 1) * 2.999).long().clamp(0, 5)                           # 6 of each of R, G and B
    colour = (levels[:, 0] * 36 + levels[:, 1] * 6 + levels[:, 2]).flatten(1)    # (B, S S)
    for weight in (torch.ones_like(sizes[0]), sizes[0] + 1e-6):                  # (B, 1, S, S)
        weight = weight.flatten(1) / weight.sum((1, 2, 3))[:, None]
        statistics.append(torch.zeros(len(images), 216, device=images.device).scatter_add(1, colour, weight).sqrt())
    return torch.cat(cells, 1), torch.cat(statistics, 1)


def layer(c_in, c_out, drop):
    """One layer of an MLP on descriptions."""
    return nn.Sequential(nn.Dropout(drop), nn.Linear(c_in, c_out, bias=False), nn.BatchNorm1d(c_out), nn.GELU())


class GradientTower(nn.Module):
    """An image tower that learns in minutes: a fixed description of the picture (`describe`), then an MLP.

    A ViT has to find out from pixels what an edge is: after an hour of two cores it named 37 % of the training
    drawings among 100. This, after 9 minutes of one core, names 93 %.
    """

    def __init__(self, config):
        super().__init__()
        blank, width = torch.zeros(1, 3, config.resolution, config.resolution), config.vision_width
        self.cell = config.patch
        described = sum(x.flatten(1).shape[1] for x in describe(blank, self.cell))
        self.norm = nn.BatchNorm1d(described, affine=False)         # only so that all inputs are of one size

        self.mlp = nn.Sequential(layer(described, width, 0.3), layer(width, width, 0.4), nn.Linear(width, config.embed_dim))

    def forward(self, pixels):                                      # (B, 3, H, W) in [-1, 1]
        with torch.autocast(pixels.device.type, enabled=False):
            cells, statistics = describe(pixels.float(), self.cell)
            x = self.norm(torch.cat([cells.flatten(1), statistics], 1))
        return self.mlp(x)                                          # (B, E)


class CLIP(nn.Module):
    """Two towers, one space. `tokenizer` (optional) turns strings into ids; its size must match the config."""

    def __init__(self, config, tokenizer=None):
        super().__init__()
        if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: "
                             "give both the same merges")
        self.config, self.tokenizer = config, tokenizer
        self.visual = VisionTransformer(config) if config.vision_layers else GradientTower(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.text_width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.text_width))
        self.transformer = Transformer(config.text_width, config.text_layers, config.text_heads, True,
                                       config.quick_gelu)
        self.ln_final = nn.LayerNorm(config.text_width)
        self.text_projection = nn.Parameter(torch.empty(config.text_width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.initialise()

    def initialise(self):
        """All initial weights. CLIP's own rule for its text tower (std by width and depth), used in both."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.config.text_width ** -0.5)
        if self.config.vision_layers:
            for parameter in (self.visual.class_embedding, self.visual.positional_embedding, self.visual.proj):
                nn.init.normal_(parameter, std=self.config.vision_width ** -0.5)
        for tower in self.transformers():
            depth = (2 * len(tower.resblocks)) ** -0.5  # each layer adds to the stream twice: keep its size
            for block in tower.resblocks:
                width = block.ln_1.weight.numel()
                nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
                nn.init.normal_(block.attn.out_proj.weight, std=width ** -0.5 * depth)
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(block.mlp.c_proj.weight, std=width ** -0.5 * depth)
                for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                    nn.init.zeros_(linear.bias)

    def transformers(self):
        """The text tower's, and the image tower's where it has one."""
        return [self.transformer] + ([self.visual.transformer] if self.config.vision_layers else [])

    @torch.no_grad()
    def start_images(self, ids):
        """A new image tower, and a text projection that whitens the features of many captions, ids (n, L).

        A text tower may learn to keep names apart in a few directions. Ours did, in 8 of 256: half the names had
        another at a cosine above 0.95, and no image tower can learn such differences. Whitened, the nearest lie at 0.5.
        """
        new = CLIP(self.config).to(self.logit_scale.device)
        self.visual, self.logit_scale = new.visual, new.logit_scale
        x = torch.cat([self.end_states(some) for some in ids.split(256)])            # (n, D)
        variance, directions = torch.linalg.eigh(x.T @ x / len(x))                   # the largest last
        white = directions * (variance.clamp(min=0) + 1e-4 * variance[-1]).rsqrt()
        self.text_projection.copy_(white[:, -self.config.embed_dim:])

    # -- images

    def prepare(self, images):
        """(B, 3, H, W) in [-1, 1] -> what the tower was trained on: centre square, its resolution, its scale."""
        side, size = min(images.shape[-2:]), self.config.resolution
        top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
        images = images[..., top:top + side, left:left + side].float()
        if side != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
        mean = images.new_tensor(self.config.image_mean).view(3, 1, 1)
        std = images.new_tensor(self.config.image_std).view(3, 1, 1)
        return ((images + 1) / 2 - mean) / std

    def encode_image(self, images):
        """Images (B, 3, H, W) in [-1, 1], of any size -> features (B, E), not normalised."""
        return self.visual(self.prepare(images))

    # -- texts

    def tokenize(self, texts):
        """Strings -> ids (B, L) on the model's device. Warns of texts too long; ValueError without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError(f"this CLIP has no tokenizer: pass merges=.../{VOCABULARY_FILE} to load_clip")
        texts, length = [texts] if isinstance(texts, str) else list(texts), self.config.context_length
        for text in texts:
            if not self.tokenizer.fits(text, length):
                warnings.warn(f"only the first {length - 2} tokens are read of: {text[:60]}...", stacklevel=2)
        return self.tokenizer(texts, length).to(self.logit_scale.device)

    def text_mask(self, ids):
        """ids (B, L) -> bool (B, L), true from start to end token, false at the padding behind.

        The end token has the highest id of the vocabulary, so argmax finds it (CLIP's own trick).
        """
        return torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(dim=1, keepdim=True)

    def text_states(self, ids, layer=None, vectors=None):
        """T(t) of Eq. 1-6: ids (B, L) -> one state per token (B, L, D), each knowing only the tokens before it.

        layer: -1 the last layer after `ln_final`; -2 the last but one, not normalised, and so on; None the
        config's `states_layer`. vectors (B, L, D): what stands for the tokens instead of the table's entries
        (textual inversion). Muse should not look where `text_mask` is false.
        """
        layer = self.config.states_layer if layer is None else layer
        if not -self.config.text_layers <= layer <= -1:
            raise ValueError(f"layer must lie in -{self.config.text_layers}..-1, not {layer}")
        vectors = self.token_embedding(ids) if vectors is None else vectors
        x = vectors + self.positional_embedding[:ids.shape[1]]        # (B, L, D)
        x = self.transformer(x, skip_last=-1 - layer)
        return self.ln_final(x) if layer == -1 else x

    def states_weights(self):
        """The parameters behind `text_states`: what a Muse has learned to read."""
        c = self.config
        blocks = self.transformer.resblocks[:c.text_layers + 1 + c.states_layer]
        return [self.token_embedding.weight, self.positional_embedding, *blocks.parameters(),
                *(self.ln_final.parameters() if c.states_layer == -1 else ())]

    def end_states(self, ids):
        """ids (B, L) -> the last layer's state at the end token (B, D), the only one that read all."""
        end = ids.argmax(dim=1)                                       # (B,)
        states = self.text_states(ids[:, :int(end.max()) + 1], -1)    # nothing behind the last end is ever read
        return states[torch.arange(len(ids), device=ids.device), end]

    def encode_text(self, ids):
        """ids (B, L) -> features (B, E), not normalised."""
        return self.end_states(ids) @ self.text_projection

    def forward(self, images, ids):
        """Images (B, 3, H, W) in [-1, 1] and their captions' ids (B, L) -> the training loss, and the accuracy.

        Equal ids are one caption; accuracy is the share of images whose nearest caption of the batch is theirs.
        Keeps `logit_scale` at or below ln 100.
        """
        self.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
        same = (ids[:, None] == ids[None]).all(-1)                    # (B, B)
        image_features, text_features = self.encode_image(images), self.encode_text(ids)
        with torch.autocast(images.device.type, enabled=False):
            loss = contrastive_loss(image_features, text_features, self.logit_scale, same)
            nearest = (image_features.float() @ F.normalize(text_features.float(), dim=-1).T).argmax(1, keepdim=True)
        return loss, same.gather(1, nearest).float().mean()


def contrastive_loss(image_features, text_features, logit_scale, same=None):
    """Symmetric InfoNCE (CLIP Fig. 3): find each image's caption in the batch, and each caption's image.

    image_features, text_features (B, E), of any length; logit_scale: the model's parameter, the log of what the
    cosines are multiplied by, read no higher than ln 100. same (B, B) bool: text j is right for image i too; None:
    only i = j is. Returns a scalar.

    Plain CLIP calls every other caption of the batch wrong. With 800 names, and styles often unsaid, "a cat"
    comes twice in many batches; to push a cat from its own caption teaches nothing. So the target is spread
    evenly over all right answers. The least loss is then the mean log of their number, not 0.
    """
    image_features = F.normalize(image_features.float(), dim=-1)
    text_features = F.normalize(text_features.float(), dim=-1)
    logits = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() * image_features @ text_features.T  # (B images, B texts)
    same = torch.eye(len(logits), device=logits.device) if same is None else same.to(logits.dtype)
    to_text = F.cross_entropy(logits, same / same.sum(1, keepdim=True))
    to_image = F.cross_entropy(logits.T, same.T / same.T.sum(1, keepdim=True))
    return (to_text + to_image) / 2


# ----------------------------------------------------------------------------------------------------------
# Files

def load_clip(path, merges=None, quick_gelu=None):
    """Read a CLIP -> CLIP in fp32 on the CPU, in eval mode, with its `.tokenizer` and `.provenance`.

    path: a checkpoint of ours (a dict of config, weights, merges and provenance, see styledrop.save_model), or
    OpenAI's or open_clip's ViT weights (a state dict, bare or under "state_dict", or a TorchScript archive),
    whose config is read off the shapes. merges, for foreign weights: the path of
    OpenAI's vocabulary file; by default the one beside `path`, if there is one. quick_gelu cannot be read off
    shapes: by default True for OpenAI's own files, False for open_clip's. Raises FileNotFoundError, or
    ValueError with one line when the file is damaged or something else.
    """
    path, provenance = Path(path), {}
    content, archive = read_weights(path)
    if "config" in content and "weights" in content:
        config, weights, provenance = content["config"], content["weights"], content.get("provenance", {})
        merges = content.get("merges") if merges is None else merges
    else:
        weights = {str(name).removeprefix("module.").removeprefix("text."): w for name, w in content.items()}
        openai = archive or "input_resolution" in weights
        for name in ("input_resolution", "context_length", "vocab_size", "attn_mask"):
            weights.pop(name, None)
        config = infer_config(path, weights, openai if quick_gelu is None else quick_gelu)
        beside = path.parent / VOCABULARY_FILE
        merges = beside if merges is None and beside.exists() else merges
    tokenizer = None if merges is None else Tokenizer(merges)
    try:
        clip = CLIP(CLIPConfig(**config), tokenizer)
        expected = clip.state_dict()
        wrong = sorted(expected.keys() ^ weights.keys())
        wrong = wrong or [name for name in expected if expected[name].shape != weights[name].shape]
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not fit this CLIP: {error}") from None
    if wrong:
        raise ValueError(f"{path} does not fit this CLIP: {len(wrong)} weights differ, the first is {wrong[0]}")
    clip.load_state_dict(weights)  # copies into fp32, whatever the file has
    clip.provenance = provenance
    return clip.eval()


def read_weights(path):
    """The dict in a file of `torch.save` or TorchScript, and whether it was TorchScript. Runs no pickled code."""
    try:
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        archive = any(name.endswith("/constants.pkl") for name in names)
        if archive:
            return torch.jit.load(str(path), map_location="cpu").state_dict(), True
        content = torch.load(path, map_location="cpu", weights_only=True)
        content = content.get("state_dict", content) if isinstance(content, dict) else content
    except OSError:
        raise
    except Exception as error:  # a damaged file fails in a dozen ways: zip, pickle, end of file, wrong types
        raise ValueError(f"{path} is damaged or no PyTorch file ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no CLIP: expected a dict of weights, found {type(content).__name__}")
    return content, False


def infer_config(path, weights, quick_gelu):
    """The fields of CLIPConfig, from the shapes of OpenAI's or open_clip's ViT weights; ValueError on all else."""
    try:
        vision_width, _, patch, _ = weights["visual.conv1.weight"].shape
        vocab_size, text_width = weights["token_embedding.weight"].shape
        grid = math.isqrt(len(weights["visual.positional_embedding"]) - 1)
        context_length, embed_dim = len(weights["positional_embedding"]), weights["text_projection"].shape[1]
    except (KeyError, ValueError, AttributeError, TypeError):
        raise ValueError(f"{path} holds no CLIP with a ViT image tower (ResNet towers are not read)") from None
    head = {1280: 80, 1408: 88, 1664: 104}.get(vision_width, 64)  # open_clip's H, g, bigG; all others have 64
    vision_layers, text_layers = (
        sum(name.startswith(tower) and name.endswith(".ln_1.weight") for name in weights)
        for tower in ("visual.transformer.resblocks.", "transformer.resblocks."))
    return dict(resolution=grid * patch, patch=patch, vision_width=vision_width, vision_layers=vision_layers,
                vision_heads=max(1, vision_width // head), text_width=text_width, text_layers=text_layers,
                text_heads=max(1, text_width // 64), context_length=context_length, vocab_size=vocab_size,
                embed_dim=embed_dim, quick_gelu=quick_gelu, **OPENAI_PIXELS)


# ----------------------------------------------------------------------------------------------------------
# Feedback

@torch.no_grad()
def image_features(clip, images, chunk=256):
    """Images (B, 3, H, W) in [-1, 1] -> features of length 1 (B, E), a chunk at a time to bound memory."""
    device = clip.logit_scale.device
    return torch.cat([F.normalize(clip.encode_image(part.to(device)).float(), dim=-1) for part in images.split(chunk)])


@torch.no_grad()
def text_score(clip, images, texts):
    """Text score (StyleDrop 4.2.1): cosine of image i with text i.

    images (B, 3, H, W) in [-1, 1]; texts: B strings, or one for all. Returns (B,) in [-1, 1]: the plain cosine,
    without CLIP's logit scale. Raises ValueError when the numbers differ. Whether a text names the style is the
    caller's choice; the paper does not say.
    """
    texts = [texts] * len(images) if isinstance(texts, str) else list(texts)
    if len(texts) != len(images):
        raise ValueError(f"{len(images)} images but {len(texts)} texts: give one text per image, or one string for all")
    distinct = sorted(set(texts))
    features = F.normalize(clip.encode_text(clip.tokenize(distinct)).float(), dim=-1)  # (distinct, E)
    features = features[[distinct.index(text) for text in texts]]                      # (B, E)
    return (image_features(clip, images) * features).sum(-1).clamp(-1, 1)


@torch.no_grad()
def style_score(clip, images, reference):
    """Style score (StyleDrop 4.2.1): cosine of each image with the style reference.

    images (B, 3, H, W), reference (3, H, W) or (R, 3, H, W), in [-1, 1], sizes free. Returns (B,) in [-1, 1]; with
    R references the mean of the R cosines. A picture that copies the reference's content scores high too (4.4.3).
    """
    reference = reference[None] if reference.dim() == 3 else reference
    return (image_features(clip, images) @ image_features(clip, reference).T).mean(1).clamp(-1, 1)


def select_best(scores, k=1):
    """CLIP feedback (StyleDrop 4.4.3): scores (P prompts, K images) -> indices (P, k), each prompt's best first.

    Raises ValueError when k is out of reach or a score is not a number.
    """
    if scores.dim() != 2 or not 1 <= k <= scores.shape[1]:
        raise ValueError(f"cannot pick {k} per prompt from scores {tuple(scores.shape)}: expected (prompts, images)")
    if not scores.isfinite().all():
        raise ValueError("some scores are not finite numbers: look at the images they belong to")
    return scores.topk(k, dim=1).indices


def select_random(prompts, images, generator=None, k=1):
    """The control of StyleDrop 4.4.3: k of each prompt's images at random, none twice -> indices (prompts, k)."""
    if not 1 <= k <= images:
        raise ValueError(f"cannot pick {k} of {images} images")
    return torch.rand(prompts, images, generator=generator).argsort(dim=1)[:, :k]


# ----------------------------------------------------------------------------------------------------------
# Command line: the two scores of Table 2

def main():
    import data                                             # only the command needs the project's files
    from styledrop import Parser, to_tensor

    parser = Parser(description="text score and style score of a folder of pictures (StyleDrop 4.2.1)")
    parser.add_argument("--images", required=True, metavar="DIR", help="pictures, read in the order of their names")
    parser.add_argument("--ref", nargs="+", required=True, metavar="IMG", help="the style reference, or several")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="one prompt a line: for each picture, or one for all")
    parser.add_argument("--clip", default="weights/tiny/clip.pt", help="our checkpoint, or OpenAI's or open_clip's ViT weights")
    parser.add_argument("--merges", help="OpenAI's vocabulary file, for foreign weights")
    args = parser.parse_args()
    if not Path(args.images).is_dir():
        raise ValueError(f"{args.images} is not a folder of pictures")
    files = sorted(path for path in Path(args.images).iterdir() if path.suffix.lower() in data.Folder.SUFFIXES)
    prompts = [line.strip() for line in data.read_words(Path(args.prompts)).splitlines() if line.strip()]
    if not files:
        raise ValueError(f"{args.images} holds no pictures")
    if len(prompts) not in (1, len(files)):
        raise ValueError(f"{args.images} holds {len(files)} pictures, {args.prompts} {len(prompts)} prompts: write one for each")
    clip = load_clip(args.clip, args.merges)
    read = lambda paths: torch.cat([to_tensor(data.read_image(path, clip.config.resolution)[None]) for path in paths])
    images = read(files)
    for name, scores in (("text", text_score(clip, images, prompts * (len(files) // len(prompts)))),
                         ("style", style_score(clip, images, read(args.ref)))):
        error = scores.std().item() / len(scores) ** 0.5 if len(scores) > 1 else math.nan
        print(f"{name} score {scores.mean().item():.4f} +- {error:.4f}  ({len(scores)} pictures, by {args.clip})")


if __name__ == "__main__":
    from styledrop import run_command
    run_command(main)
