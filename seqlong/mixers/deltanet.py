"""The delta rule: a token corrects what memory holds under its key. DeltaNet, Gated DeltaNet, KDA."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlong.layout import SequenceLayout
from seqlong.mixers.base import positive
from seqlong.mixers.linear import Gate, LinearMixer, LowRank, precise, split_heads, still
from seqlong.mixers.recurrences import delta_rule


def _rates(name: str, count: int, low: float, high: float) -> Tensor:
    """Logarithms of rates that are uniform in [low, high]."""
    if not 0 < low <= high:
        raise ValueError(f"{name} needs 0 < a_min <= a_max, found a_min={low}, a_max={high}")
    return torch.empty(count).uniform_(low, high).log()


def _steps(count: int, low: float, high: float, floor: float) -> Tensor:
    """Biases whose softplus is log-uniform in [low, high]."""
    steps = torch.exp(torch.rand(count) * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
    return steps + torch.log(-torch.expm1(-steps))


class DeltaNet(LinearMixer):
    """``S_t = S_{t-1} + β_t k_tᵀ (v_t - k_t S_{t-1})``, ``o_t = q_t S_t / √k``; q, k of length one, ``β = σ(W x)``.

    q, k, v pass a short convolution with SiLU; then RMSNorm of each head. Source: arXiv 2406.06484; negative
    eigenvalues arXiv 2411.12537.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        expand_k: width of all keys over d_model.
        expand_v: width of all values over d_model.
        negative_eigenvalues: β in [0, 2] instead of [0, 1]: a state can change sign, so parities can be counted.
        conv_width: taps of the short convolution over q, k, v.
        gate: of the output.
        norm_eps: added to the mean square in the norm.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        negative_eigenvalues: bool = False,
        conv_width: int = 4,
        gate: Gate = "none",
        norm_eps: float = 1e-5,
    ) -> None:
        key, value = (split_heads("DeltaNet", int(d_model * expand), heads) for expand in (expand_k, expand_v))
        super().__init__(d_model, heads, key, value, conv_width=conv_width, gate=gate, norm_eps=norm_eps)
        self.activation = "double_sigmoid" if negative_eigenvalues else "sigmoid"
        self.beta_proj = nn.Linear(d_model, heads, bias=False)

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layout: SequenceLayout, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        output, memory = delta_rule(
            q, k, v, still(self.beta_proj(hidden), layout.padding, -float("inf")), normalize=True,
            beta_activation=self.activation, starts=layout.starts, initial_state=memory, fragment=layout.fragment,
        )  # fmt: skip
        return output * self.key_dim**-0.5, memory


class GatedDeltaNet(LinearMixer):
    """DeltaNet whose memory also fades: ``S~ = exp(g_t) S_{t-1}``, ``S_t = S~ + β_t k_tᵀ (v_t - k_t S~)``.

    ``o_t = q_t S_t / √k``; ``g = -A softplus(W x + b)``, one a head, as in Mamba2; the rest as in ``DeltaNet``. Then
    RMSNorm of each head, times SiLU of a gate. softplus(b) starts log-uniform in [0.001, 0.1], as in Mamba2, rates A
    uniform in [1, 16]: the published [0, 16] leaves heads that never forget. Source: arXiv 2412.06464.

    Args:
        d_model: width of the residual stream.
        heads: heads of values.
        groups: heads of queries and keys, each shared by heads / groups; as many as ``heads`` if not given.
        head_dim: width of a query and key; 0.75 d_model over ``heads`` if not given.
        expand_v: width of a value over that of a key.
        negative_eigenvalues: β in [0, 2] instead of [0, 1].
        conv_width: taps of the short convolution over q, k, v.
        gate: of the output.
        a_min: rates A start uniform in [a_min, a_max].
        a_max: see ``a_min``.
        norm_eps: added to the mean square in the norm.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 6,
        groups: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        negative_eigenvalues: bool = False,
        conv_width: int = 4,
        gate: Gate = "silu",
        a_min: float = 1.0,
        a_max: float = 16.0,
        norm_eps: float = 1e-5,
    ) -> None:
        positive(type(self).__name__, heads=heads)
        key = max(1, int(0.75 * d_model) // heads) if head_dim is None else head_dim
        super().__init__(
            d_model, heads, key, int(key * expand_v), groups, conv_width=conv_width, gate=gate, norm_eps=norm_eps
        )
        self.activation = "double_sigmoid" if negative_eigenvalues else "sigmoid"
        self.beta_proj = nn.Linear(d_model, heads, bias=False)
        self.decay_proj = nn.Linear(d_model, heads, bias=False)
        self.A_log = nn.Parameter(_rates("GatedDeltaNet", heads, a_min, a_max))
        self.dt_bias = nn.Parameter(_steps(heads, 1e-3, 0.1, 1e-4))

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layout: SequenceLayout, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        padding = layout.padding
        output, memory = delta_rule(
            q, k, v, still(self.beta_proj(hidden), padding, -float("inf")),
            still(self.decay_proj(hidden), padding, -float("inf")), normalize=True, beta_activation=self.activation,
            gate_activation="softplus", rate=-precise(self.A_log, q).exp(), gate_bias=precise(self.dt_bias, q),
            starts=layout.starts, initial_state=memory, fragment=layout.fragment,
        )  # fmt: skip
        return output * self.key_dim**-0.5, memory


class KDA(LinearMixer):
    """Kimi Delta Attention: the gated delta rule with a decay a channel, ``g = -A softplus(W₂ W₁ x + b)``.

    ``S~ = diag(exp(g_t)) S_{t-1}``, ``S_t = S~ + β_t k_tᵀ (v_t - k_t S~)``, ``o_t = q_t S_t / √k``; the rest as in
    ``DeltaNet``. RMSNorm of each head, times the sigmoid of a low-rank gate. Rates A, one a head, start uniform in [1,
    16] (at 1 with ``safe``), softplus(b), one a channel, log-uniform in [0.001, 0.1]. The published models put one
    attention without positions after three of these. Source: arXiv 2510.26692.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        head_dim: width of a query, key and value; d_model over ``heads`` if not given.
        negative_eigenvalues: β in [0, 2] instead of [0, 1].
        conv_width: taps of the short convolution over q, k, v.
        decay_rank: numbers between the two layers that make the decay; ``head_dim`` if not given. The gate has as many.
        safe: decays of ``-5 σ(A (W₂ W₁ x + b))``, never below -5 a token.
        a_min: rates A start uniform in [a_min, a_max].
        a_max: see ``a_min``.
        norm_eps: added to the mean square in the norm.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        head_dim: int | None = None,
        negative_eigenvalues: bool = False,
        conv_width: int = 4,
        decay_rank: int | None = None,
        safe: bool = False,
        a_min: float = 1.0,
        a_max: float = 16.0,
        norm_eps: float = 1e-5,
    ) -> None:
        width = split_heads("KDA", d_model, heads) if head_dim is None else head_dim
        rank = width if decay_rank is None else decay_rank
        positive("KDA", decay_rank=decay_rank)
        super().__init__(d_model, heads, width, width, conv_width=conv_width, gate="sigmoid", gate_rank=rank,
                         norm_eps=norm_eps)  # fmt: skip
        self.activation, self.safe = "double_sigmoid" if negative_eigenvalues else "sigmoid", safe
        self.beta_proj = nn.Linear(d_model, heads, bias=False)
        self.decay_proj = LowRank(d_model, heads * width, rank, bias=False)
        self.A_log = nn.Parameter(torch.zeros(heads) if safe else _rates("KDA", heads, a_min, a_max))
        self.dt_bias = nn.Parameter(_steps(heads * width, 1e-3, 0.1, 1e-4).unflatten(0, (heads, width)))

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layout: SequenceLayout, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        gate = self.decay_proj(hidden).unflatten(2, (self.heads, self.key_dim))
        rate, bias = precise(self.A_log, gate).exp(), precise(self.dt_bias, gate)
        raw = precise(gate, gate) + bias
        decay = -5 * torch.sigmoid(rate[:, None] * raw) if self.safe else -rate[:, None] * F.softplus(raw)
        output, memory = delta_rule(
            q, k, v, still(self.beta_proj(hidden), layout.padding, -float("inf")), still(decay, layout.padding, 0.0),
            normalize=True, beta_activation=self.activation, starts=layout.starts, initial_state=memory,
            fragment=layout.fragment,
        )  # fmt: skip
        return output * self.key_dim**-0.5, memory
