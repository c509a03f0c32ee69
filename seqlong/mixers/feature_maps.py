"""Linear attention with a denominator: BASED's Taylor series, Hedgehog's learnt features."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqlong.layout import SequenceLayout
from seqlong.mixers.linear import Constant, LinearMixer, LinearState, precise, split_heads
from seqlong.mixers.recurrences import scalar_decay


class _Normalised(LinearMixer):
    """``o_t = Σ_s φ(q_t)·φ(k_s) v_s / (Σ_s φ(q_t)·φ(k_s) + eps)``, s <= t: the sum of weights is one more value."""

    def __init__(self, d_model: int, heads: int, key_dim: int, value_dim: int, eps: float) -> None:
        super().__init__(d_model, heads, key_dim, value_dim, gate="none")
        del self.norm
        self.memory_width = None  # sums that no weight has divided are no memory to read
        self.eps = eps
        self.decay = Constant([0.0] * heads)

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layout: SequenceLayout, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        return scalar_decay(
            q, k, v, self.decay(v), starts=layout.starts, initial_state=memory, fragment=layout.fragment
        )

    def finish(self, output: Float[Tensor, "b t h w"], hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h v"]:
        total, weight = precise(output, hidden).split([self.value_dim, 1], dim=-1)
        return (total / (weight + self.eps)).to(output.dtype)

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> LinearState:
        memory = super().initial_state(rows, device, dtype).memory
        return LinearState(torch.cat([memory, memory[..., :1]], dim=-1))


class Based(_Normalised):
    """Linear attention whose weights are the Taylor series of exp: ``1 + x + x² / 2``, ``x = q·k / √k``, normalised.

    ``φ(q)·φ(k)`` is that with ``φ(z) = [1, z, z_i z_i / √2, z_i z_j (i < j)]`` of ``z / k^{1/4}``: each product is kept
    once, so a key of 16 has 153 features where the source has 273. No norm, no gate. The published models mix these
    blocks with sliding-window attention and short convolutions. Source: arXiv 2402.18668.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        feature_dim: k, width of a query and key before φ.
        eps: added to the denominator.
    """

    def __init__(self, d_model: int, heads: int = 4, feature_dim: int = 16, eps: float = 1e-12) -> None:
        super().__init__(d_model, heads, feature_dim, split_heads("Based", d_model, heads), eps)
        self.state_dim = 1 + feature_dim + feature_dim * (feature_dim + 1) // 2

    def features(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor]:
        return _taylor(q), _taylor(k), v


def _taylor(x: Float[Tensor, "b t h k"]) -> Float[Tensor, "b t h f"]:
    width = x.shape[-1]
    z = precise(x, x) * width**-0.25
    i, j = torch.triu_indices(width, width, device=x.device)
    pairs = z[..., i] * z[..., j] * z.new_ones(len(i)).masked_fill(i == j, 0.5**0.5)
    return torch.cat([torch.ones_like(z[..., :1]), z, pairs], dim=-1).to(x.dtype)


class Hedgehog(_Normalised):
    """Linear attention with learnt features that imitate softmax: ``φ(x) = softmax([W x, -W x])``, normalised.

    One W a head for queries and one for keys, which start as the identity; a head's state is twice as wide as its keys.
    Made to be trained towards a softmax attention's weights. Source: arXiv 2402.04347; this φ as in arXiv 2410.10254.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        eps: added to the denominator.
    """

    def __init__(self, d_model: int, heads: int = 4, eps: float = 1e-12) -> None:
        width = split_heads("Hedgehog", d_model, heads)
        super().__init__(d_model, heads, width, width, eps)
        self.state_dim = 2 * width
        self.query_map = nn.Parameter(torch.eye(width).repeat(heads, 1, 1))
        self.key_map = nn.Parameter(torch.eye(width).repeat(heads, 1, 1))

    def features(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor]:
        return _softmax_features(q, self.query_map), _softmax_features(k, self.key_map), v


def _softmax_features(x: Float[Tensor, "b t h k"], weight: Float[Tensor, "h j k"]) -> Float[Tensor, "b t h f"]:
    mapped = torch.einsum("bthk,hjk->bthj", x, weight)
    return torch.cat([mapped, -mapped], dim=-1).softmax(dim=-1).to(x.dtype)
