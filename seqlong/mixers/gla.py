"""Gated linear attention: a decay a channel, made from the token; and its simple form, a decay a head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlong.layout import SequenceLayout
from seqlong.mixers.base import positive
from seqlong.mixers.linear import Gate, LinearMixer, LowRank, precise, split_heads, still
from seqlong.mixers.recurrences import scalar_decay, vector_decay


class GLA(LinearMixer):
    """``S_t = diag(f_t) S_{t-1} + k_tᵀ v_t``, ``o_t = q_t S_t / √k``, ``log f = logsigmoid(W₂ W₁ x + b) / divisor``.

    Then RMSNorm of each head, times SiLU of a gate. With ``refine`` the decay is ``(1 - r) f² + r (1 - (1 - f)²)`` in
    place of f, ``r = σ(W₄ W₃ x + c)``: it learns where f is near 0 or 1, too, and is f where r is a half (ReGLA's
    refining gate; its exponential features are not part of it). Source: arXiv 2312.06635; the refining gate arXiv
    2502.01578, 1910.09890.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        expand_k: width of all keys over d_model.
        expand_v: width of all values over d_model.
        decay_rank: numbers between the two layers that make the decay.
        divisor: of the decay's logarithm: how slowly memory fades at first.
        refine: whether the decay is refined, as above.
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
        refine: bool = False,
        conv_width: int = 0,
        gate: Gate = "silu",
        norm_eps: float = 1e-5,
    ) -> None:
        key, value = (split_heads("GLA", int(d_model * expand), heads) for expand in (expand_k, expand_v))
        positive("GLA", decay_rank=decay_rank, divisor=divisor)
        super().__init__(d_model, heads, key, value, conv_width=conv_width, gate=gate, norm_eps=norm_eps)
        self.divisor = divisor
        self.decay_proj = LowRank(d_model, heads * self.key_dim, decay_rank)
        self.refine_proj = LowRank(d_model, heads * self.key_dim, decay_rank) if refine else None

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layout: SequenceLayout, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q, gate, divisor = q * self.key_dim**-0.5, self.decay_proj(hidden), self.divisor
        if self.refine_proj is None:
            gate, activation = still(gate, layout.padding, float("inf")).to(q.dtype), "logsigmoid"
        else:
            log_f = F.logsigmoid(precise(gate, gate)) / divisor
            refine = torch.sigmoid(precise(self.refine_proj(hidden), gate))
            # f (f + 2 r (1 - f)), the same, without losing what f near 1 lacks
            decay = log_f + torch.log1p((1 - 2 * refine) * torch.expm1(log_f))
            gate, activation, divisor = still(decay, layout.padding, 0.0), "log_decay", 1.0
        return vector_decay(
            q, k, v, gate.unflatten(2, (self.heads, self.key_dim)), activation=activation, divisor=divisor,
            starts=layout.starts, initial_state=memory, fragment=layout.fragment,
        )  # fmt: skip


class SimpleGLA(LinearMixer):
    """``S_t = exp(g_t) S_{t-1} + k_tᵀ v_t``, ``o_t = q_t S_t / √k``, ``g = logsigmoid(W x + b) / divisor``, one a head.

    GLA with one decay for all channels of a head: the recurrence of Mamba2. q, k, v pass a short convolution with SiLU;
    then RMSNorm of each head, times SiLU of a gate. Source: arXiv 2312.06635, 2405.21060.

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
        positive("SimpleGLA", divisor=divisor)
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
