"""Bottleneck adapters: the only thing StyleDrop trains (Section 3.2, Figure S1).

    h  ->  h + gelu(h W_d) W_u          W_d: D x H, W_u: H x D, no biases, no norm

One generator for each placement holds W_d and W_u of every layer, either independently or shared
across depth up to a small offset. All "up" weights start at zero: a new adapter changes nothing.
Below it, what the paper compares with: full fine-tuning, LoRA and textual inversion (Section 4.2).

Shapes: B batch, P positions, L layers (n_layer), D width (d_emb), H bottleneck (d_prj).
"""

import os
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

PLACEMENTS = ("cross", "mlp")           # after cross-attention, after the MLP (B.1.1)


def apply_adapter(emb, wd, wu):
    """h = emb (B, P, D), wd (D, H), wu (H, D) -> h + gelu(h wd) wu, with jax's gelu (by tanh)."""
    return emb + F.gelu(emb @ wd, approximate="tanh") @ wu


def zeros(*shape):
    return nn.Parameter(torch.zeros(*shape))


def small_normal(generator, *shape):
    """A parameter of normals of sd 0.02, cut off at two sd (B.1.1)."""
    return nn.init.trunc_normal_(zeros(*shape), std=0.02, a=-0.04, b=0.04, generator=generator)


class AdapterGenerator(nn.Module):
    """The weights of one placement for all layers (Figure S1).

    is_shared=False: W_d[l], W_u[l] independent: 2 L D H parameters.
    is_shared=True:  W_d[l] = W_d0 + 1 d_l,  W_u[l] = W_u0 + 1 u_l: the same d_l (H) on every row of
                     W_d0, the same u_l (D) on every row of W_u0: L H + L D + 2 D H parameters.
    """

    def __init__(self, d_emb, d_prj, n_layer, is_shared, generator=None):
        super().__init__()
        self.is_shared = is_shared
        layers = () if is_shared else (n_layer,)
        self.down = small_normal(generator, *layers, d_emb, d_prj)
        self.up = zeros(*layers, d_prj, d_emb)
        if is_shared:
            self.depth_down = small_normal(generator, n_layer, d_prj)
            self.depth_up = zeros(n_layer, d_emb)

    def forward(self):
        """-> wd (L, D, H), wu (L, H, D)."""
        if not self.is_shared:
            return self.down, self.up
        return self.down + self.depth_down[:, None, :], self.up + self.depth_up[:, None, :]


class Tuned(nn.Module):
    """theta of Eq. 3. Each way to tune overrides one of forward, weights and words.

    `config` (keyword arguments) rebuilds it; `about` (a dict) says how it was made: its base, style
    phrase, prompts, steps.
    """
    about = {}

    def __init__(self):
        super().__init__()
        self.superres = None    # the second stage's own adapter (Table S3, third column)

    def forward(self):
        """-> a function (h (B, P, D), layer, placement) -> h for G's blocks, or None."""
        return None

    def weights(self, muse):
        """G -> {name: tensor}: the weights of it that are replaced."""
        return {}

    def save(self, path):
        """Write both stages' adapters to one file, for styledrop.load_adapter."""
        method = next(name for name, kind in METHODS.items() if type(self) is kind)
        saved = dict(kind="adapter", method=method, config=self.config, weights=self.state_dict(),
                     superres=self.superres and self.superres.config, about=self.about)
        part = Path(f"{path}.part")
        try:
            with open(part, "wb") as file:
                torch.save(saved, file)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def words(self, ids, vectors):
        """Text ids (B, n) and their vectors (B, n, text_width) -> the vectors that T reads."""
        return vectors


class Adapter(Tuned):
    """StyleDrop's adapter: one generator for each placement."""

    def __init__(self, d_emb, d_prj, n_layer, is_shared, generator=None):
        super().__init__()
        self.config = dict(d_emb=d_emb, d_prj=d_prj, n_layer=n_layer, is_shared=is_shared)
        self.generators = nn.ModuleDict(
            {p: AdapterGenerator(d_emb, d_prj, n_layer, is_shared, generator) for p in PLACEMENTS})

    def forward(self):
        """-> the function that Muse takes; the weights of all layers are made once."""
        weights = {p: g() for p, g in self.generators.items()}

        def adapters(h, layer, placement):
            wd, wu = weights[placement]
            return apply_adapter(h, wd[layer], wu[layer])
        return adapters


# --------------------------------------------------------------------------------------------------
# Other ways to tune (Section 4.2): the same loss, data and sampler

class FullFineTuning(Tuned):
    """Every weight of G, shapes {name: shape} (DreamBooth without its prior preservation)."""

    def __init__(self, shapes, start=None):
        super().__init__()
        self.config = dict(shapes={name: list(shape) for name, shape in shapes.items()})
        start = start or {name: torch.empty(*shape) for name, shape in shapes.items()}
        self.copies = nn.ParameterList(start[name].detach().clone() for name in shapes)

    def weights(self, muse):
        return dict(zip(self.config["shapes"], self.copies))


class LoRA(Tuned):
    """W + up @ down (D x r, r x D; up from zero) for all queries and values (Hu et al. 2021)."""

    def __init__(self, d_emb, rank, n_layer, generator=None):
        super().__init__()
        self.config = dict(d_emb=d_emb, rank=rank, n_layer=n_layer)
        self.names = [f"blocks.{layer}.{attention}.{matrix}.weight" for layer in range(n_layer)
                      for attention in ("attn", "cross") for matrix in ("q", "v")]
        self.down = small_normal(generator, len(self.names), rank, d_emb)
        self.up = zeros(len(self.names), d_emb, rank)

    def weights(self, muse):
        changes = self.up @ self.down                       # (matrices, D, D)
        return {name: muse.get_parameter(name) + w for name, w in zip(self.names, changes)}


class TextualInversion(Tuned):
    """New vectors for the tokens of the style phrase and nothing else (Gal et al. 2022).

    tokens: their ids; width: D_text; start (len(tokens), D_text): the vectors they have now.
    """

    def __init__(self, tokens, width, start=None):
        super().__init__()
        self.config = dict(tokens=list(tokens), width=width)
        start = torch.empty(len(tokens), width) if start is None else start
        self.vectors = nn.Parameter(start.detach().clone())

    def words(self, ids, vectors):
        for token, vector in zip(self.config["tokens"], self.vectors):
            vectors = torch.where(ids[..., None] == token, vector, vectors)
        return vectors


METHODS = {"adapter": Adapter, "full": FullFineTuning, "lora": LoRA,
           "textual-inversion": TextualInversion}
