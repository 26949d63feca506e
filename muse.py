"""Muse: the masked token transformer G, its masking law, its loss and its parallel decoding.

Muse (arXiv 2301.00704) Sections 2.3-2.8 and MaskGIT (arXiv 2202.04200), as StyleDrop
(arXiv 2306.00983) Section 3.1 uses them. Text arrives as per-token embeddings, never as strings,
so any text encoder fits; adapters arrive as an argument, so the base is never edited.

    logits = muse(ids, text, text_mask)                       # G(v, T(t))
    logits = muse(ids, text, text_mask, adapters=adapter())   # G^(v, T(t), theta)

Shapes: B batch, N image tokens, L text length, D width, V codebook size, P positions (N / patch^2).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class MuseConfig:
    grid: int = 16              # tokens a side; N = grid^2
    codebook_size: int = 1024   # V; the id V stands for [MASK]
    text_width: int = 256       # of the text embeddings that come in
    width: int = 256            # D
    layers: int = 6
    heads: int = 8
    patch: int = 2              # tokens a side that share one position (1: Muse). See Muse.forward
    token_width: int = 128      # of a token's own embedding, tied with the output
    things: int = 0             # how many things it knows a sketch of (0: Muse). See Muse.forward
    sketch: int = 32            # numbers a position of a sketch

    @property
    def tokens(self):           # N
        return self.grid ** 2

    @property
    def mask_id(self):          # [MASK]
        return self.codebook_size


PRESETS = {
    "toy": MuseConfig(grid=4, codebook_size=32, text_width=32, width=32, layers=2, heads=2, token_width=32, things=3, sketch=8),
    "tiny": MuseConfig(),
    "small": MuseConfig(codebook_size=4096, text_width=512, width=640, layers=14, heads=10, patch=1, token_width=640),
    # Muse's base (Table 4): 48 layers of width 2048, MLP 8192. Only for counting.
    "paper": MuseConfig(codebook_size=8192, text_width=4096, width=2048, layers=48, heads=16, patch=1, token_width=2048),
}


# ---------------------------------------------------------------------------------------------
# The transformer

class Attention(nn.Module):
    """Multi-head attention of x over a context; over x itself where there is none."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, context=None, context_mask=None):
        """x (B, P, D), context (B, L, D), context_mask (B, L), true where a key may be seen."""
        context = x if context is None else context
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)      # (B, heads, P or L, D / heads)
        q, k, v = split(self.q(x)), split(self.k(context)), split(self.v(context))
        mask = None if context_mask is None else context_mask[:, None, None, :]  # (B, 1, 1, L)
        with torch.autocast(x.device.type, enabled=False):  # bf16 attention's backward crawls on CPUs
            y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))       # (B, P, D)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, MLP; each pre-normed, each with its own skip.

    An adapter works on a sub-layer's output, before the skip is added (Houlsby et al. 2019), after
    cross-attention and after the MLP and nowhere else (StyleDrop B.1.1).
    """

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.cross = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.GELU(),
                                 nn.Linear(4 * width, width, bias=False))

    def forward(self, x, text, text_mask, adapt):           # x (B, P, D), text (B, L, D)
        x = x + self.attn(self.norm1(x))
        x = x + adapt(self.cross(self.norm2(x), text, text_mask), "cross")
        x = x + adapt(self.mlp(self.norm3(x)), "mlp")
        return x


class Muse(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        D, P = config.width, config.grid // config.patch
        E, group = config.token_width, config.patch ** 2
        self.token = nn.Embedding(config.codebook_size + 1, E)                   # + 1: [MASK]
        self.enter = nn.Linear(group * E, D)
        self.row = nn.Parameter(torch.zeros(P, 1, D))                            # learned 2D positions
        self.col = nn.Parameter(torch.zeros(1, P, D))
        self.text = nn.Linear(config.text_width, D)
        self.text_norm = nn.LayerNorm(D)
        if config.things:
            self.keys = nn.Linear(config.text_width, config.things)
            self.sketches = nn.Parameter(torch.zeros(config.things, P * P, config.sketch))
            self.place = nn.Linear(config.sketch, D)
        self.blocks = nn.ModuleList(Block(D, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(D)
        self.leave = nn.Linear(D, group * E)
        self.leave_norm = nn.LayerNorm(E)
        self.bias = nn.Parameter(torch.zeros(config.codebook_size))
        self.initialise()

    def initialise(self):
        """Truncated normals of sd 0.02 (MaskGIT); what enters a skip is scaled down by depth (GPT-2)."""
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.trunc_normal_(p, std=0.02)
            if name.endswith(("out.weight", "mlp.2.weight")):
                p.data /= math.sqrt(3 * self.config.layers)

    def start_from(self, codes, states):
        """Start from what the tokenizer and T know instead of from chance.

        codes (V, d), the codebook: tokens that look alike start alike. Turned at random, scaled as above.
        states (n, text_width), T's states of many captions: the text's way in whitens them. Nine tenths of
        what sets names apart in our T lies in five directions, colours above all; unwhitened, names of one
        colour are one name to G for as long as anybody here can train.
        """
        turn = lambda wide, narrow: nn.init.orthogonal_(torch.empty(wide, narrow))
        c = self.config
        self.token.weight.data[:-1] = codes @ turn(c.token_width, codes.shape[1]).T * 0.02 * c.token_width ** 0.5
        self.text.weight.data = turn(c.width, c.text_width) @ whitening(states)  # (D, text_width)
        self.text.bias.data = -self.text.weight.data @ states.mean(0)

    def learn_words(self, states, mask, thing, generator, steps=400, batch=256, lr=1e-2):
        """The keys: which thing does a caption speak of? A linear classifier of its words, by cross-entropy.

        states (n, L, text_width), T's of n captions; mask (n, L); thing (n,), a number below `things`.
        Returns the share of the captions that it then takes for their own thing.
        """
        white, centre = whitening(states[mask], 1e-2), states[mask].mean(0)
        keys = torch.zeros(self.config.things, states.shape[-1], requires_grad=True)
        bias = torch.zeros(self.config.things, requires_grad=True)
        optimiser = torch.optim.Adam([keys, bias], lr)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = lr * mask_ratio(step / steps) ** 2
            i = torch.randint(len(states), (batch,), generator=generator)
            longest = int(mask[i].sum(1).max())
            scores = F.linear((states[i, :longest] - centre) @ white, keys, bias)        # (batch, L, things)
            loss = F.cross_entropy(loudest_word(scores, mask[i, :longest]), thing[i])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            self.keys.weight.copy_(keys @ white)
            self.keys.bias.copy_(bias - self.keys.weight @ centre)
            found = [loudest_word(self.keys(s), m).argmax(1) for s, m in zip(states.split(batch), mask.split(batch))]
        return (torch.cat(found) == thing).float().mean().item()

    @torch.no_grad()
    def learn_sketches(self, latents, thing):
        """The sketches: each thing's mean picture, as seen by the tokenizer.

        latents (n, N, d), the codes of n pictures; thing (n,). A position's s s codes are written as
        their `sketch` principal components over all pictures.
        """
        c = self.config
        P, s = c.grid // c.patch, c.patch
        x = latents.unflatten(1, (P, s, P, s)).transpose(2, 3).flatten(3).flatten(1, 2)  # (n, P P, s s d)
        flat = x.flatten(0, 1)
        directions = torch.linalg.eigh(torch.cov(flat.T))[1][:, -c.sketch:]
        x = (x - flat.mean(0)) @ directions                                      # (n, P P, sketch)
        count = torch.bincount(thing, minlength=c.things).clamp(min=1)
        self.sketches.zero_().index_add_(0, thing, x)
        self.sketches /= count[:, None, None] * x.std()

    def memory(self):
        """What learn_words and learn_sketches wrote; pretraining leaves it alone."""
        return [self.keys.weight, self.keys.bias, self.sketches] if self.config.things else []

    def forward(self, ids, text, text_mask, adapters=None):
        """G, or G^ with adapters.

        ids (B, N) in [0, V], V where masked; text (B, L, text_width); text_mask (B, L), true at
        real tokens. adapters: None, or a function (h (B, P, D), layer, "cross" | "mlp") -> h.
        Returns logits (B, N, V): [MASK] itself can never be drawn.

        With patch = 2, four neighbouring tokens enter through one position, as pixels do in a ViT:
        a quarter of the transformer's cost, and each of the four still has its own mask and its own
        prediction. patch = 1 is Muse.

        The sketch is a memory (Sukhbaatar et al. 2019) that the words look things up in: for each thing the
        base was trained on, a key, and the mean of its drawings, some 64 positions of 32 numbers. What comes
        back is laid under the tokens. Cross-attention alone gives every position the same few words to read,
        and what a name means HERE has to be learned by matrices that all positions share: in our few hours
        G so learned the colour of each name, and the shape of hardly any.
        """
        c = self.config
        P, s = c.grid // c.patch, c.patch
        x = self.token(ids)                                                      # (B, N, E)
        x = x.unflatten(1, (P, s, P, s)).transpose(2, 3).flatten(3)              # (B, P, P, s s E)
        x = (self.enter(x) + self.row + self.col).flatten(1, 2)                  # (B, P P, D)
        if c.things:
            x = x + self.lay_out(text, text_mask)
        with torch.autocast(x.device.type, enabled=False):                       # bf16 would drown small directions
            text = self.text_norm(self.text(text.float()))                       # (B, L, D)
        for layer, block in enumerate(self.blocks):
            adapt = (lambda h, site: h) if adapters is None else (lambda h, site: adapters(h, layer, site))
            x = block(x, text, text_mask, adapt)
        x = self.leave(self.norm(x)).unflatten(-1, (s, s, -1))                   # (B, P P, s, s, E)
        x = x.unflatten(1, (P, P)).transpose(2, 3).flatten(1, 4)                 # (B, N, E)
        x = self.leave_norm(F.gelu(x))
        return (F.linear(x, self.token.weight[:c.codebook_size]) + self.bias).float()  # (B, N, V)

    def lay_out(self, text, text_mask):
        """The sketch of what the words (B, L, text_width) speak of -> (B, P P, D)."""
        with torch.autocast(text.device.type, enabled=False):
            match = loudest_word(self.keys(text.float()), text_mask).softmax(-1)         # (B, things)
            return self.place(torch.einsum("bt,tps->bps", match, self.sketches))


def loudest_word(scores, mask):
    """scores (B, L, things) of each word, mask (B, L) -> (B, things): a smooth maximum over the words."""
    return scores.masked_fill(~mask[..., None], -math.inf).logsumexp(1)


def whitening(states, least=1e-3):
    """The symmetric matrix (d, d) that makes states (n, d) of unit covariance, but for directions of hardly any."""
    variance, directions = torch.linalg.eigh(torch.cov(states.T))
    return directions * (variance.clamp(min=0) + least * variance.mean()).rsqrt() @ directions.T


# ---------------------------------------------------------------------------------------------
# Training: M and CE_m of Eq. 2

def mask_ratio(u):
    """gamma(u) = cos(pi u / 2), u in [0, 1]. For u ~ U the ratio has Muse's density, of mean 2 / pi."""
    return torch.cos(u * (math.pi / 2)) if torch.is_tensor(u) else math.cos(u * math.pi / 2)


def random_mask(batch, tokens, generator, power=1):
    """M: a bool mask (B, N), true at ceil(gamma(u^power) N) places, u ~ U drawn afresh for each row; at least one.

    Muse's law has power 1. A higher one masks more: words count only where next to nothing is to be seen.
    """
    device = generator.device
    ratio = mask_ratio(torch.rand(batch, 1, generator=generator, device=device) ** power)
    count = (ratio * tokens).ceil().clamp(1, tokens)
    rank = torch.rand(batch, tokens, generator=generator, device=device).argsort(1).argsort(1)
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

@torch.no_grad()
def decode(logits_fn, batch, tokens, mask_id, steps, temperature, generator, on_step=None):
    """MaskGIT's parallel decoding, by the official rule. Returns ids (B, N) without a mask.

    logits_fn(ids (B, N), step) -> logits (B, N, V), guidance included. Each step draws every masked
    token from its own softmax (no temperature there), then masks again the least confident ones:
    confidence = log p(drawn) + temperature (1 - ratio) Gumbel noise, so `temperature` (4.5 in
    Table S3) only sets how much chance decides WHICH tokens stay. on_step(step, ids, kept) sees the
    drawn ids and what is kept of them, for pictures of the process.
    """
    device = generator.device
    ids = torch.full((batch, tokens), mask_id, device=device)
    for step in range(steps):
        ratio = (step + 1) / steps
        masked = ids == mask_id
        log_p = logits_fn(ids, step).float().log_softmax(-1)                     # (B, N, V)
        drawn = torch.multinomial(log_p.exp().flatten(0, 1), 1, generator=generator).view(batch, tokens)
        drawn = torch.where(masked, drawn, ids)                                  # the known stay as they are
        noise = torch.empty(batch, tokens, device=device).exponential_(generator=generator).log().neg()
        confidence = log_p.gather(-1, drawn[..., None])[..., 0] + temperature * (1 - ratio) * noise
        confidence = confidence.masked_fill(~masked, math.inf)
        # floor(N gamma), at least 1, and at least one fewer than now; all rows agree on this number
        n_mask = max(1, min(int(masked[0].sum()) - 1, math.floor(tokens * mask_ratio(ratio))))
        again = confidence.argsort(1).argsort(1) < n_mask
        ids = drawn.masked_fill(again, mask_id)
        if on_step is not None:
            on_step(step, drawn, ~again if step + 1 < steps else torch.ones_like(again))
    return drawn
