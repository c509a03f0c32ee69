"""Gated linear attention: a decay a channel, made from the token; and its simple form, a decay a head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from seqlong.layout import SequenceLayout
from seqlong.mixers.linear import Gate, LinearMixer, LowRank, precise, split_heads, still
from seqlong.mixers.recurrences import scalar_decay, vector_decay


class GLA(LinearMixer):
    """``S_t = diag(exp(g_t)) S_{t-1} + k_tᵀ v_t``, ``o_t = q_t S_t / √k``, ``g = logsigmoid(W₂ W₁ x + b) / 16``.

    Then RMSNorm of each head, times SiLU of a gate. Source: arXiv 2312.06635.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        expand_k: width of all keys over d_model.
        expand_v: width of all values over d_model.
        decay_rank: numbers between the two layers that make the decay.
        divisor: of the decay's logarithm: how slowly memory fades at first.
        conv_width: taps of a short convolution over q, k, v; 0 for none, as in the paper.
        gate: of the output.
        norm_eps: added to the mean square in the norm.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        decay_rank: int = 16,
        divisor: float = 16.0,
        conv_width: int = 0,
        gate: Gate = "silu",
        norm_eps: float = 1e-5,
    ) -> None:
        key, value = (split_heads("GLA", int(d_model * expand), heads) for expand in (expand_k, expand_v))
        super().__init__(d_model, heads, key, value, conv_width=conv_width, gate=gate, norm_eps=norm_eps)
        self.divisor = divisor
        self.decay_proj = LowRank(d_model, heads * self.key_dim, decay_rank)

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layout: SequenceLayout, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        gate = still(self.decay_proj(hidden), layout.padding, float("inf")).unflatten(2, (self.heads, self.key_dim))
        return vector_decay(
            q * self.key_dim**-0.5, k, v, gate.to(q.dtype), activation="logsigmoid", divisor=self.divisor,
            starts=layout.starts, initial_state=memory, fragment=layout.fragment,
        )  # fmt: skip


class SimpleGLA(LinearMixer):
    """``S_t = exp(g_t) S_{t-1} + k_tᵀ v_t``, ``o_t = q_t S_t / √k``, ``g = logsigmoid(W x + b) / divisor``, one a head.

    GLA with one decay for all channels of a head: the recurrence of Mamba2. Source: arXiv 2312.06635, 2405.21060.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        expand_k: width of all keys over d_model.
        expand_v: width of all values over d_model.
        divisor: of the decay's logarithm.
        conv_width: taps of a short convolution over q, k, v; 0 for none.
        gate: of the output.
        norm_eps: added to the mean square in the norm.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        divisor: float = 16.0,
        conv_width: int = 4,
        gate: Gate = "silu",
        norm_eps: float = 1e-5,
    ) -> None:
        key, value = (split_heads("SimpleGLA", int(d_model * expand), heads) for expand in (expand_k, expand_v))
        super().__init__(d_model, heads, key, value, conv_width=conv_width, gate=gate, norm_eps=norm_eps)
        self.divisor = divisor
        self.decay_proj = nn.Linear(d_model, heads)

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layout: SequenceLayout, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        gate = self.decay_proj(hidden)
        decay = still(F.logsigmoid(precise(gate, gate)) / self.divisor, layout.padding, 0.0)
        return scalar_decay(
            q * self.key_dim**-0.5, k, v, decay, starts=layout.starts, initial_state=memory, fragment=layout.fragment
        )
