"""Bottleneck adapters: the only thing that StyleDrop trains (Section 3.2, Figure S1).

    A(h) = h + gelu(h W_d) W_u          W_d: D x H, W_u: H x D, no biases, no norm

Each placement (after cross-attention, and after the MLP) has one generator of weights. It holds W_d
and W_u of every layer, which are either independent or shared across depth up to a small offset.
All "up" weights start at zero, so a new adapter changes nothing.

Shapes: B batch, P positions, L layers (n_layer), D width (d_emb), H bottleneck (d_prj).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

PLACEMENTS = ("cross", "mlp")           # after cross-attention, after the MLP (B.1.1)


def apply_adapter(emb, wd, wu):
    """emb (B, P, D), wd (D, H), wu (H, D) -> emb + gelu(emb wd) wu (B, P, D).

    gelu is its tanh approximation, JAX's default.
    """
    return emb + F.gelu(emb @ wd, approximate="tanh") @ wu


def zeros(*shape):
    """A parameter that starts at zero."""
    return nn.Parameter(torch.zeros(*shape))


def small_normal(generator, *shape):
    """A parameter from a normal distribution of std 0.02, truncated at two std (B.1.1)."""
    return nn.init.trunc_normal_(zeros(*shape), std=0.02, a=-0.04, b=0.04, generator=generator)


class AdapterGenerator(nn.Module):
    """The weights of one placement for all layers (Figure S1).

    is_shared=False: W_d[l] and W_u[l] are independent: 2 L D H parameters.
    is_shared=True:  the layers share W_d0 and W_u0, up to an offset for each layer: d_l (H) is
                     added to every row of W_d0, and u_l (D) to every row of W_u0:
                     L H + L D + 2 D H parameters.
    """

    def __init__(self, d_emb, d_prj, n_layer, is_shared, generator=None):
        super().__init__()
        self.is_shared = is_shared
        if is_shared:
            self.down = small_normal(generator, d_emb, d_prj)
            self.up = zeros(d_prj, d_emb)
            self.depth_down = small_normal(generator, n_layer, d_prj)
            self.depth_up = zeros(n_layer, d_emb)
        else:
            self.down = small_normal(generator, n_layer, d_emb, d_prj)
            self.up = zeros(n_layer, d_prj, d_emb)

    def forward(self):
        """Return wd (L, D, H) and wu (L, H, D)."""
        if not self.is_shared:
            return self.down, self.up
        return self.down + self.depth_down[:, None, :], self.up + self.depth_up[:, None, :]


class Adapter(nn.Module):
    """theta of Eq. 3: one generator for each placement.

    `config` holds the arguments of __init__, from which checkpoint/adapters.py rebuilds it.
    """

    def __init__(self, d_emb, d_prj, n_layer, is_shared, generator=None):
        super().__init__()
        self.config = dict(d_emb=d_emb, d_prj=d_prj, n_layer=n_layer, is_shared=is_shared)
        self.generators = nn.ModuleDict()
        for placement in PLACEMENTS:
            self.generators[placement] = AdapterGenerator(d_emb, d_prj, n_layer, is_shared,
                                                          generator)

    def forward(self):
        """Return a function (h (B, P, D), layer, placement) -> A(h), which Muse.forward calls.

        The weights are generated here, once, and not again in every layer.
        """
        weights = {placement: generate() for placement, generate in self.generators.items()}

        def adapt(h, layer, placement):
            wd, wu = weights[placement]
            return apply_adapter(h, wd[layer], wu[layer])
        return adapt
