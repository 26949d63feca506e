"""Muse: text encoder T, masked token transformer G, mask schedule, loss and parallel decoding.

Muse (arXiv 2301.00704) Sections 2.1-2.8 and MaskGIT (arXiv 2202.04200), as StyleDrop
(arXiv 2306.00983) Section 3.1 uses them. Adapters are passed to forward; G itself never changes.

    text, text_mask = muse.text_encoder(text_ids)             # T(t)
    logits = muse(ids, text, text_mask)                       # G(v, T(t))
    logits = muse(ids, text, text_mask, adapters=adapter())   # G^(v, T(t), theta)

Shapes: B batch, N image tokens, P positions (N / patch^2), L text length, L' = L + registers,
D width, V codebook size, N_low low-resolution tokens (low_grid^2, in the second stage).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class MuseConfig:
    grid: int = 16              # side of the token grid; N = grid^2
    codebook_size: int = 1024   # V; the id V stands for [MASK]
    width: int = 384            # D
    layers: int = 6
    heads: int = 6
    patch: int = 2              # patch x patch tokens share a position (1: Muse). See Muse.forward
    token_width: int = 128      # width of a token's embedding, which is tied to the output layer
    # T
    vocab_size: int = 3000      # of the BPE tokenizer; set it to tokenizer.vocab_size
    text_length: int = 32       # maximum number of text tokens, start and end included
    text_width: int = 256       # width of T's hidden states
    text_layers: int = 4        # 0: without T; the caller supplies the hidden states
    text_heads: int = 4
    registers: int = 16         # hidden states that belong to no token. See TextEncoder
    # the second stage, super-resolution (Muse 2.4)
    low_grid: int = 0           # side of the first stage's token grid (0: this is the first stage)
    low_layers: int = 0         # self-attention layers over them

    @property
    def tokens(self):           # N
        return self.grid ** 2

    @property
    def mask_id(self):          # [MASK]
        return self.codebook_size

    @property
    def depth(self):            # layers that have adapters
        return self.low_layers + self.layers


PRESETS = {
    "toy": MuseConfig(grid=4, codebook_size=32, width=32, layers=2, heads=2, token_width=32,
                      text_length=16, text_width=24, text_layers=1, text_heads=2, registers=2),
    "tiny": MuseConfig(),
    "small": MuseConfig(codebook_size=4096, width=640, layers=14, heads=10, patch=1,
                        token_width=640, text_length=64, text_width=512, text_layers=8,
                        text_heads=8),
    # Muse's base (Table 4): 48 layers, width 2048, T5-XXL's states. Only to count its parameters.
    "paper": MuseConfig(codebook_size=8192, width=2048, layers=48, heads=16, patch=1,
                        token_width=2048, text_width=4096, text_layers=0),
}
SUPERRES = {                    # the second stage of each preset, on a larger token grid
    "toy": MuseConfig(grid=8, codebook_size=32, width=32, layers=2, heads=2, token_width=32,
                      text_length=16, text_width=24, text_layers=1, text_heads=2, registers=0,
                      low_grid=4, low_layers=1),
    "tiny": MuseConfig(grid=32, width=256, heads=4, layers=4, text_width=128, text_layers=2,
                       text_heads=2, registers=0, low_grid=16, low_layers=2),
    "small": MuseConfig(grid=32, codebook_size=4096, width=512, layers=8, heads=8, patch=2,
                        token_width=512, text_length=64, text_width=256, text_layers=4, registers=0,
                        low_grid=16, low_layers=4),
    # Table 6: 16 layers over the low tokens, 32 over 64 x 64 tokens. Only to count parameters.
    "paper": MuseConfig(grid=64, codebook_size=8192, width=1024, layers=32, heads=16, patch=4,
                        token_width=1024, text_width=4096, text_layers=0, low_grid=16,
                        low_layers=16),
}


# ---------------------------------------------------------------------------------------------
# The transformer

class Attention(nn.Module):
    """Multi-head attention: queries from x, keys and values from a context."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def split(self, x):                                     # (B, P, D) -> (B, heads, P, D / heads)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, context, mask=None):
        """x (B, P, D), context (B, L, D), mask (B, L): the keys that may be seen -> (B, P, D)."""
        q, k, v = self.split(self.q(x)), self.split(self.k(context)), self.split(self.v(context))
        if x.device.type == "cpu":           # where attention's backward pass in bf16 is very slow
            q, k, v = q.float(), k.float(), v.float()
        if mask is not None:
            mask = mask[:, None, None, :]                   # (B, 1, 1, L)
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


def no_adapter(h, layer, placement):
    return h


class Block(nn.Module):
    """Self-attention, cross-attention to the text, MLP; each pre-normed, each with its own skip.

    cross=False leaves out the cross-attention: for T, and for the layers of the second stage that
    read the low-resolution tokens.
    """

    def __init__(self, width, heads, cross=True):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width) if cross else None
        self.cross = Attention(width, heads) if cross else None
        self.norm3 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.GELU(),
                                 nn.Linear(4 * width, width, bias=False))

    def forward(self, x, mask=None, text=None, text_mask=None, adapters=no_adapter, layer=0):
        """x (B, P, D), mask (B, P) or None, text (B, S, D), text_mask (B, S) -> (B, P, D).

        S = L', plus N_low in the second stage. Masks are true for the keys that may be attended to.

        An adapter works on a sub-layer's output, before the skip is added (Houlsby et al. 2019):
        after cross-attention (or after self-attention, in layers without cross-attention) and after
        the MLP, and nowhere else (StyleDrop B.1.1).
        """
        h = self.norm1(x)
        h = self.attn(h, h, mask)
        if self.cross is None:                   # its adapter goes after the self-attention instead
            x = x + adapters(h, layer, "cross")
        else:
            x = x + h
            x = x + adapters(self.cross(self.norm2(x), text, text_mask), layer, "cross")
        return x + adapters(self.mlp(self.norm3(x)), layer, "mlp")


def initialise(model, layers):
    """Normal weights with standard deviation 0.02, truncated at two standard deviations (MaskGIT).

    The matrices just before a skip connection are also divided by sqrt(3 layers).
    """
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.trunc_normal_(p, std=0.02, a=-0.04, b=0.04)
        if name.endswith(("out.weight", "mlp.2.weight")):
            p.data /= math.sqrt(3 * layers)


class TextEncoder(nn.Module):
    """T: BPE ids -> states, by a transformer that is learned with G and frozen afterwards.

    The paper's T is a frozen T5-XXL, which needs a download. This one returns a hidden state for
    each token and `registers` additional ones (as Darcet et al. 2023 add to a ViT). Without them, a
    prompt of three words, with start and end, would give G's cross-attention only five states.
    """

    def __init__(self, config):
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.text_width)
        self.position = nn.Parameter(torch.zeros(config.text_length, config.text_width))
        self.registers = nn.Parameter(torch.zeros(config.registers, config.text_width))
        self.blocks = nn.ModuleList(Block(config.text_width, config.text_heads, cross=False)
                                    for _ in range(config.text_layers))
        self.norm = nn.LayerNorm(config.text_width)
        initialise(self, config.text_layers)

    def forward(self, ids):
        """ids (B, L): text up to the end token, which has the highest id, then padding.

        Returns states (B, L', text_width) and their mask, false at the padding.
        """
        B, L = ids.shape
        x = self.token(ids) + self.position[:L]
        registers = self.registers.to(x.dtype).expand(B, -1, -1)
        x = torch.cat([x, registers], 1)                                         # (B, L', ..)
        end = ids.argmax(1, keepdim=True)                    # the end token has the highest id
        is_text = torch.arange(L, device=ids.device) <= end                      # (B, L)
        mask = F.pad(is_text, (0, len(self.registers)), value=True)              # (B, L')
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x), mask


class Muse(nn.Module):
    """G of the first stage, or of the second if low_grid > 0.

    T is a part of it, but forward takes T's output.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.width
        side = config.grid // config.patch                                       # P = side^2
        E = config.token_width                                                   # (not the encoder)
        group = config.patch ** 2
        self.token = nn.Embedding(config.codebook_size + 1, E)                   # + 1: [MASK]
        self.patch_embed = nn.Linear(group * E, D)
        self.row = nn.Parameter(torch.zeros(side, 1, D))                      # learned 2D positions
        self.col = nn.Parameter(torch.zeros(1, side, D))
        self.text_proj = nn.Linear(config.text_width, D)
        self.text_norm = nn.LayerNorm(D)
        if config.low_grid:
            self.low_token = nn.Embedding(config.codebook_size, D)
            self.low_blocks = nn.ModuleList(Block(D, config.heads, cross=False)
                                            for _ in range(config.low_layers))
            self.low_norm = nn.LayerNorm(D)
        self.blocks = nn.ModuleList(Block(D, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(D)
        self.to_tokens = nn.Linear(D, group * E)
        self.token_norm = nn.LayerNorm(E)
        self.bias = nn.Parameter(torch.zeros(config.codebook_size))
        initialise(self, config.layers)
        if config.text_layers:
            self.text_encoder = TextEncoder(config)

    def forward(self, ids, text, text_mask, adapters=None, low=None, low_states=None):
        """G, or G^ with adapters -> logits (B, N, V), none of which is for [MASK].

        ids (B, N) in [0, V]: image tokens, with V for [MASK].
        text (B, L', text_width), text_mask (B, L'): T's output.
        adapters: None, or a function (h (B, P, D), layer, "cross" | "mlp") -> h.
        low (B, N_low): the low-resolution tokens, in the second stage only; or instead
        low_states: self.encode_low(low, adapters), which does not change between decoding steps.

        With patch = 2, four neighbouring tokens share one position, as pixels do in a ViT. The
        transformer then has a quarter of the positions, but each of the four tokens still has its
        own mask and its own prediction. patch = 1 is Muse.
        """
        c = self.config
        s = c.patch
        side = c.grid // s
        adapters = adapters or no_adapter
        x = self.token(ids)                                                      # (B, N, E)
        x = x.unflatten(1, (side, s, side, s)).transpose(2, 3).flatten(3)   # (B, side, side, s s E)
        x = (self.patch_embed(x) + self.row + self.col).flatten(1, 2)            # (B, P, D)
        text = self.text_norm(self.text_proj(text))                              # (B, L', D)
        if low is not None:
            low_states = self.encode_low(low, adapters)                          # (B, N_low, D)
        if low_states is not None:
            text = torch.cat([text, low_states.to(text.dtype)], 1)               # (B, S, D)
            text_mask = F.pad(text_mask, (0, low_states.shape[1]), value=True)
        for layer, block in enumerate(self.blocks):
            x = block(x, None, text, text_mask, adapters, c.low_layers + layer)
        x = self.to_tokens(self.norm(x)).unflatten(-1, (s, s, -1))               # (B, P, s, s, E)
        x = x.unflatten(1, (side, side)).transpose(2, 3).flatten(1, 4)           # (B, N, E)
        x = self.token_norm(F.gelu(x))
        x = F.linear(x, self.token.weight[:c.codebook_size]) + self.bias         # (B, N, V)
        return x.float()

    def encode_low(self, low, adapters=None):
        """Low-resolution tokens (B, N_low) -> their states (B, N_low, D).

        A low token gets the position embedding of the high-resolution tokens at the same place.
        """
        adapters = adapters or no_adapter
        position = (self.row + self.col).movedim(-1, 0)[None]                   # (1, D, side, side)
        position = F.interpolate(position, self.config.low_grid, mode="nearest")
        x = self.low_token(low) + position[0].flatten(1).T                       # (B, N_low, D)
        for layer, block in enumerate(self.low_blocks):
            x = block(x, adapters=adapters, layer=layer)
        return self.low_norm(x)


# ---------------------------------------------------------------------------------------------
# Training: M and CE_m of Eq. 2

def mask_ratio(u):
    """MaskGIT's cosine schedule: gamma(u) = cos(pi u / 2), for u in [0, 1], a number or a tensor.

    (Not the gamma that mixes two adapters.) If u is uniform, the ratio has mean 2 / pi, as in Muse.
    """
    if torch.is_tensor(u):
        return torch.cos(u * (math.pi / 2))
    return math.cos(u * math.pi / 2)


def random_mask(batch, tokens, generator, power=1):
    """M: a bool mask (B, N), true at ceil(gamma(u^power) N) random places of each row.

    u is uniform in [0, 1] and drawn for each row. power = 1 is Muse's mask schedule. A higher power
    masks more tokens; with fewer tokens visible, the prediction depends more on the text.
    """
    device = generator.device
    ratio = mask_ratio(torch.rand(batch, 1, generator=generator, device=device) ** power)
    count = (ratio * tokens).ceil().clamp(1, tokens)
    noise = torch.rand(batch, tokens, generator=generator, device=device)
    rank = noise.argsort(1).argsort(1)                       # 0 .. N - 1 in random order, each row
    return rank < count


def masked_loss(logits, ids, mask, label_smoothing=0.0):
    """CE_m: the mean cross-entropy at the MASKED tokens of each image, then over images.

    logits (B, N, V), ids (B, N), mask (B, N) bool. (StyleDrop's text says "unmasked"; the objective
    of Muse and MaskGIT, and the only one that teaches anything, is on the masked ones.)
    """
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none",
                           label_smoothing=label_smoothing).view(ids.shape)      # (B, N)
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


# ---------------------------------------------------------------------------------------------
# Sampling

def uniform(generator, batch, *shape):
    """Uniform numbers in [0, 1), (batch, *shape), from one generator or from one for each row."""
    if isinstance(generator, torch.Generator):
        return torch.rand(batch, *shape, generator=generator, device=generator.device)
    return torch.stack([torch.rand(*shape, generator=g, device=g.device) for g in generator])


def draw_tokens(logits, top_k, u):
    """Sample a token at each position from the softmax over the `top_k` most probable (0: all).

    logits (B, N, V), u (B, N) uniform in [0, 1) -> ids (B, N) in [0, V), by inverting the
    cumulative distribution: the token is the first whose cumulative probability reaches u.
    """
    codes = logits.shape[-1]
    k = min(top_k or codes, codes)
    values, tokens = logits.topk(k, -1)                                          # (B, N, k)
    cumulative = values.softmax(-1).cumsum(-1)
    total = cumulative[..., -1:]                             # 1, but for rounding
    rank = (cumulative < u[..., None] * total).sum(-1, keepdim=True)             # (B, N, 1)
    return tokens.gather(-1, rank)[..., 0]


@torch.no_grad()
def decode(logits_fn, batch, tokens, mask_id, steps, temperature, generator, top_k=0, on_step=None):
    """MaskGIT's parallel decoding, as in the official code. Returns ids (B, N) without any [MASK].

    logits_fn(ids (B, N), step) -> logits (B, N, V), guidance included. generator: a single one, or
    a list of B, one for each row, which makes each row independent of the others. on_step(step,
    ids, kept) is called with the sampled ids and with a mask of those that are kept.
    """
    first = generator if isinstance(generator, torch.Generator) else generator[0]
    device = first.device
    ids = torch.full((batch, tokens), mask_id, device=device)
    for step in range(steps):
        done = (step + 1) / steps
        masked = ids == mask_id
        log_p = logits_fn(ids, step).float().log_softmax(-1)                     # (B, N, V)
        u = uniform(generator, batch, 2, tokens).clamp(min=1e-20)                # (B, 2, N)

        # 1. sample every masked token; the known ones stay as they are
        sampled = torch.where(masked, draw_tokens(log_p, top_k, u[:, 0]), ids)

        # 2. confidence in each: log p(sampled) + temperature (1 - done) Gumbel noise. The
        #    temperature (4.5 in Table S3) affects only WHICH tokens are kept, not what they are
        gumbel = -(-u[:, 1].log()).log()
        noise = temperature * (1 - done) * gumbel
        confidence = log_p.gather(-1, sampled[..., None])[..., 0] + noise
        confidence = confidence.masked_fill(~masked, math.inf)

        # 3. unless this is the last step, mask the floor(N gamma(done)) least confident again:
        #    fewer than before, but at least 1, so with more steps than tokens the last token is
        #    sampled several times
        kept = torch.ones_like(masked)
        if step + 1 < steps:
            before = int(masked[0].sum())                    # the same in every row
            n_mask = min(before - 1, math.floor(tokens * mask_ratio(done)))
            n_mask = max(1, n_mask)
            rank = confidence.argsort(1).argsort(1)          # 0: the least confident
            kept = rank >= n_mask
            ids = sampled.masked_fill(~kept, mask_id)
        if on_step is not None:
            on_step(step, sampled, kept)
    return sampled
