"""Bottleneck adapters: the only thing StyleDrop trains (Section 3.2, Figure S1).

    h  ->  h + gelu(h W_d) W_u          W_d: D x H, W_u: H x D, no biases, no norm

One generator for each placement holds W_d and W_u of every layer, either independently or shared
across depth up to a small offset. All "up" weights start at zero, so a new adapter changes nothing.
Below it, what the paper compares with: full fine-tuning, LoRA and textual inversion (Section 4.2).

Shapes: L layers (n_layer), D width (d_emb), H bottleneck (d_prj).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

PLACEMENTS = ("cross", "mlp")           # after cross-attention, after the MLP (B.1.1)


def apply_adapter(emb, wd, wu):
    """emb (B, P, D), wd (D, H), wu (H, D) -> h + gelu(h wd) wu; gelu by tanh, as jax.nn.gelu is."""
    return emb + F.gelu(emb @ wd, approximate="tanh") @ wu


def small_normal(generator, *shape):
    """Normals of sd 0.02, cut off at two sd (B.1.1)."""
    return nn.init.trunc_normal_(torch.empty(*shape), std=0.02, a=-0.04, b=0.04, generator=generator)


class AdapterGenerator(nn.Module):
    """The weights of one placement for all layers (Figure S1).

    is_shared=False: W_d[l], W_u[l] independent: 2 L D H parameters.
    is_shared=True:  W_d[l] = W_d0 + 1 d_l,  W_u[l] = W_u0 + 1 u_l: the same d_l (H) on every row of
                     W_d0, the same u_l (D) on every row of W_u0: L H + L D + 2 D H parameters.
    """

    def __init__(self, d_emb, d_prj, n_layer, is_shared, generator=None):
        super().__init__()
        self.is_shared = is_shared
        down = lambda *shape: nn.Parameter(small_normal(generator, *shape))
        zero = lambda *shape: nn.Parameter(torch.zeros(*shape))
        if is_shared:
            self.down, self.up = down(d_emb, d_prj), zero(d_prj, d_emb)
            self.depth_down, self.depth_up = down(n_layer, d_prj), zero(n_layer, d_emb)
        else:
            self.down, self.up = down(n_layer, d_emb, d_prj), zero(n_layer, d_prj, d_emb)

    def forward(self):
        """-> wd (L, D, H), wu (L, H, D)."""
        if not self.is_shared:
            return self.down, self.up
        return self.down + self.depth_down[:, None, :], self.up + self.depth_up[:, None, :]


class Tuned(nn.Module):
    """theta of Eq. 3, whatever it is made of: what tuning learns about a style. Nothing, by default.

    It can enter G in three places, and each way to tune overrides one. `config` rebuilds it, `about`
    (a plain dict) says how it was made: its base, style phrase, prompts and steps.
    """
    about = {}

    def __init__(self):
        super().__init__()
        self.superres = None    # the second stage's own adapter (Table S3, third column)

    def forward(self):
        """-> a function (h (B, P, D), layer, placement) -> h inside G's blocks, or None."""
        return None

    def weights(self, muse):
        """-> {name: tensor}: weights of G that are replaced."""
        return {}

    def words(self, ids, vectors):
        """Text token ids (B, L) and their vectors (B, L, D_text) -> the vectors that T reads."""
        return vectors


class Adapter(Tuned):
    """StyleDrop's: one generator for each placement. Calling it gives the function that Muse takes."""

    def __init__(self, d_emb, d_prj, n_layer, is_shared, generator=None):
        super().__init__()
        self.config = dict(d_emb=d_emb, d_prj=d_prj, n_layer=n_layer, is_shared=is_shared)
        self.generators = nn.ModuleDict(
            {p: AdapterGenerator(d_emb, d_prj, n_layer, is_shared, generator) for p in PLACEMENTS})

    def forward(self):
        """-> a function (h (B, P, D), layer, placement) -> h, with every layer's weights made once."""
        weights = {p: g() for p, g in self.generators.items()}

        def adapters(h, layer, placement):
            wd, wu = weights[placement]
            return apply_adapter(h, wd[layer], wu[layer])
        return adapters


# ---------------------------------------------------------------------------------------------
# Other ways to tune (Section 4.2): the same loss, data and sampler

class FullFineTuning(Tuned):
    """Every weight of G (DreamBooth without its prior preservation). shapes: {name: shape} of them all."""

    def __init__(self, shapes, start=None):
        super().__init__()
        self.config = dict(shapes={name: list(shape) for name, shape in shapes.items()})
        self.copies = nn.ParameterList(torch.empty(*shape) if start is None else start[name].detach().clone()
                                       for name, shape in shapes.items())

    def weights(self, muse):
        return dict(zip(self.config["shapes"], self.copies))


class LoRA(Tuned):
    """W + U A for the queries and values of every attention (Hu et al. 2021), A: r x D, U: D x r from zero."""

    def __init__(self, d_emb, rank, n_layer, generator=None):
        super().__init__()
        self.config = dict(d_emb=d_emb, rank=rank, n_layer=n_layer)
        self.names = [f"blocks.{layer}.{attention}.{matrix}.weight" for layer in range(n_layer)
                      for attention in ("attn", "cross") for matrix in ("q", "v")]
        self.down = nn.Parameter(small_normal(generator, len(self.names), rank, d_emb))
        self.up = nn.Parameter(torch.zeros(len(self.names), d_emb, rank))

    def weights(self, muse):
        return {name: muse.get_parameter(name) + change for name, change in zip(self.names, self.up @ self.down)}


class TextualInversion(Tuned):
    """New vectors for the tokens of the style phrase and nothing else (Gal et al. 2022).

    tokens: their ids; start (len(tokens), D_text): the vectors they have now.
    """

    def __init__(self, tokens, width, start=None):
        super().__init__()
        self.config = dict(tokens=list(tokens), width=width)
        self.vectors = nn.Parameter(torch.empty(len(tokens), width) if start is None else start.detach().clone())

    def words(self, ids, vectors):
        for token, vector in zip(self.config["tokens"], self.vectors):
            vectors = torch.where(ids[..., None] == token, vector, vectors)
        return vectors


METHODS = {"adapter": Adapter, "full": FullFineTuning, "lora": LoRA, "textual-inversion": TextualInversion}
