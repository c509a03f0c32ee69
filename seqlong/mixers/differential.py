"""Differential attention: the difference of two softmax maps, so that what both see as noise cancels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqlong.kernels.attention import attention
from seqlong.kernels.norm import rms_norm
from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, positive
from seqlong.mixers.cache import AttentionState, carry, join
from seqlong.mixers.linear import precise
from seqlong.positions import rotary_axes

if TYPE_CHECKING:
    from seqlong.cost import Cost


class DifferentialAttention(Mixer):
    """``o = (1 - λ₀) RMSNorm((softmax(q₁k₁ᵀ / √k) - λ softmax(q₂k₂ᵀ / √k)) v)``, each head normed by itself.

    ``λ = exp(λ_q1·λ_k1) - exp(λ_q2·λ_k2) + λ₀``, learnt, one for all heads of a block, with
    ``λ₀ = 0.8 - 0.6 exp(-0.3 l)`` in block l, from 0; its vectors start normal with deviation 0.1. A head has two
    queries and keys of width k and one value of width 2k, so half as many heads cost what ``Attention`` costs. Source:
    arXiv 2410.05258.

    Args:
        d_model: width of the residual stream.
        heads: heads, of two maps each.
        kv_heads: heads of keys and values, shared by equal groups; as many as ``heads`` if not given.
        head_dim: k, width of a query; ``d_model / heads / 2`` if not given.
        window: a token sees the tokens at a distance below this, itself included; all if not given.
        positions: ``rope`` rotates queries and keys, ``none`` leaves order to other mixers.
        rope_base: the longest wavelength of the rotation is about ``2π · rope_base`` tokens.
        norm_eps: added to the mean square in the norm.
    """

    residual_projections = ("out_proj",)

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        positions: Literal["rope", "none"] = "rope",
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        positive("DifferentialAttention", heads=heads, head_dim=head_dim, rope_base=rope_base)
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ValueError(f"DifferentialAttention needs heads divisible by kv_heads, found {heads} and {kv_heads}")
        if head_dim is None and d_model % (2 * heads):
            raise ValueError(
                f"DifferentialAttention needs d_model divisible by twice its heads, found d_model={d_model}, "
                f"heads={heads}; or give head_dim"
            )
        self.head_dim = d_model // (2 * heads) if head_dim is None else head_dim
        if positions == "rope" and self.head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, found {self.head_dim}")
        if window is not None and window < 1:
            raise ValueError(f"DifferentialAttention needs a window of at least 1 token, found {window}")
        self.window, self.bounded_state = window, window is not None
        self.positions, self.rope_base, self.norm_eps = positions, rope_base, norm_eps
        self.widths = [2 * count * self.head_dim for count in (heads, self.kv_heads, self.kv_heads)]
        self.qkv_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.lambda_q, self.lambda_k = (nn.Parameter(0.1 * torch.randn(2, self.head_dim)) for _ in range(2))
        self.norm = nn.RMSNorm(2 * self.head_dim, eps=norm_eps)
        self.out_proj = nn.Linear(2 * heads * self.head_dim, d_model, bias=False)
        self.place(0, 1)

    def place(self, layer: int, layers: int) -> None:
        self.lambda_start = 0.8 - 0.6 * math.exp(-0.3 * layer)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: AttentionState | None = None
    ) -> tuple[Float[Tensor, "b t d"], AttentionState | None]:
        if layout.padding is not None:
            hidden = hidden.masked_fill(layout.padding[..., None], 0)
        q, k, v = self.qkv_proj(hidden).split(self.widths, dim=-1)
        q, k = (x.unflatten(2, (-1, self.head_dim)) for x in (q, k))  # all first maps, then all second ones
        v = v.unflatten(2, (-1, 2 * self.head_dim))
        if self.positions == "rope":
            places = layout.positions if layout.positions.dim() == 2 else layout.positions[..., 0]
            q, k = (rotary_axes(x, places, [self.head_dim], self.rope_base) for x in (q, k))
        after = None
        if state is None:
            ids = layout.segment_ids
            boundaries = None if ids is None else layout.boundaries
            both = torch.cat([v, v], dim=2)
            maps = attention(q, k, both, window=self.window, query_ids=ids, key_ids=ids, boundaries=boundaries)
        else:
            seen = join(k, v, layout, state)
            both = torch.cat([seen.values, seen.values], dim=2)
            maps = attention(
                q, seen.keys, both, window=self.window, query_ids=seen.query_ids, key_ids=seen.key_ids
            )  # fmt: skip
            after = carry(seen, layout, self.window)
        first, second = maps.chunk(2, dim=2)
        mixed = rms_norm(first - self.share(maps).to(maps.dtype) * second, self.norm.weight, self.norm_eps)
        return self.out_proj((1 - self.lambda_start) * mixed.flatten(2)), after

    def share(self, like: Tensor) -> Float[Tensor, ""]:
        """λ: how much of the second map is taken off."""
        first, second = (precise(self.lambda_q, like) * precise(self.lambda_k, like)).sum(-1).exp().unbind()
        return first - second + self.lambda_start

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> AttentionState:
        widths = ((2 * self.kv_heads, self.head_dim), (self.kv_heads, 2 * self.head_dim))
        return AttentionState(*(torch.zeros(rows, 0, *width, device=device, dtype=dtype) for width in widths))

    def cost(self, length: int, dtype: torch.dtype = torch.bfloat16) -> Cost:
        """See ``seqlong.cost``: two maps of width k over a value of width 2k."""
        from seqlong.cost import cached, seen

        flops = 12 * self.heads * self.head_dim * seen(length, self.window)
        what = "12 · heads · head_dim · tokens seen: two qkᵀ, and two means of a v twice as wide"
        return cached(self, flops, what, 4 * self.kv_heads * self.head_dim * dtype.itemsize, length, self.window)
