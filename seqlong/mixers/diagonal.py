"""State spaces with a diagonal matrix of rates a channel: Mamba-1, whose steps come from the token, and S4D."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seqlong.kernels.norm import rms_norm
from seqlong.kernels.selective_scan import selective_scan
from seqlong.kernels.short_conv import short_conv
from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, MixerState
from seqlong.mixers.linear import precise, still


@dataclass
class DiagonalState(MixerState):
    """Shapes: memory ``(b p n d)`` float32, p = 2 parts where numbers are complex, else 1; conv ``(b r d)``, if any."""

    memory: Float[Tensor, "b p n d"]
    conv: Float[Tensor, "b r d"] | None = None


class Mamba1(Mixer):
    """``S_t = exp(-A dt_t) ⊙ S_{t-1} + B_tᵀ (dt_t x_t)``, ``y_t = (C_t S_t + D x_t) ⊙ silu(z_t)``; A is (n d).

    x passes a short causal convolution with SiLU, and makes B, C and ``dt = softplus(W₂ W₁ x + b)``, a step a channel.
    A starts as 1 to n in every channel, steps log-uniform in [dt_min, dt_max], D as 1. Weights have the names and the
    layout of the published code, so its checkpoints load. Source: arXiv 2312.00752; the inner norms arXiv 2403.19887
    (Jamba), without learnt weights 2410.05355 (Falcon-Mamba).

    Args:
        d_model: width of the residual stream.
        d_state: numbers a channel (n).
        expand: inner width over d_model.
        dt_rank: numbers between the two layers that make the steps; d_model / 16, rounded up, if not given.
        conv_width: taps of the short convolution.
        conv_bias: whether the convolution has a bias.
        inner_norm: whether RMSNorm is taken of B, C and what makes the steps.
        norm_eps: added to the mean square in these norms.
        dt_min: steps start log-uniform in [dt_min, dt_max].
        dt_max: see ``dt_min``.
        dt_floor: no step starts below this.
    """

    bounded_state = True
    residual_projections = ("out_proj",)

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        expand: int = 2,
        dt_rank: int | None = None,
        conv_width: int = 4,
        conv_bias: bool = True,
        inner_norm: bool = False,
        norm_eps: float = 1e-6,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
    ) -> None:
        super().__init__()
        dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        width = expand * d_model
        if min(d_state, width, dt_rank, conv_width) < 1:
            raise ValueError(
                f"Mamba1 needs a d_state, expand, dt_rank and conv_width of at least 1, found {d_state}, {expand}, "
                f"{dt_rank} and {conv_width}"
            )
        self.width, self.d_state, self.dt_rank = width, d_state, dt_rank
        self.memory_width = width
        self.conv_width, self.norm_eps = conv_width, norm_eps
        self.in_proj = nn.Linear(d_model, 2 * width, bias=False)
        self.conv1d = nn.Conv1d(width, width, conv_width, groups=width, bias=conv_bias)
        self.x_proj = nn.Linear(width, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, width)
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        steps = _log_uniform(width, dt_min, dt_max).clamp(min=dt_floor)
        with torch.no_grad():
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).float().log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        self.dt_norm, self.b_norm, self.c_norm = (
            nn.RMSNorm(each, eps=norm_eps) if inner_norm else None for each in (dt_rank, d_state, d_state)
        )
        self.out_proj = nn.Linear(width, d_model, bias=False)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: DiagonalState | None = None
    ) -> tuple[Float[Tensor, "b t d"], DiagonalState | None]:
        return self.publish(hidden, layout, state)[:2]

    def publish(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: DiagonalState | None = None
    ) -> tuple[Float[Tensor, "b t d"], DiagonalState | None, Float[Tensor, "b t w"]]:
        """``forward``, and what comes out of the scan, ``C S + D x``, before its gate."""
        padding = layout.padding
        x, z = self.in_proj(still(hidden, padding, 0.0)).chunk(2, dim=-1)
        x, conv = short_conv(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, starts=layout.starts,
            state=None if state is None else state.conv, lengths=None if padding is None else layout.lengths,
            output_state=state is not None,
        )  # fmt: skip
        made = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        raw, b, c = (
            y if norm is None else rms_norm(y, norm.weight, self.norm_eps)
            for y, norm in zip(made, (self.dt_norm, self.b_norm, self.c_norm), strict=True)
        )
        # Biases of small steps have few digits in bfloat16.
        raw = precise(F.linear(raw, self.dt_proj.weight), hidden) + precise(self.dt_proj.bias, hidden)
        y, memory = selective_scan(
            x, still(F.softplus(raw), padding, 0.0), -precise(self.A_log, hidden).exp().T, b, c, starts=layout.starts,
            initial_state=None if state is None else state.memory[:, 0],
        )  # fmt: skip
        read = y + x * self.D.to(x.dtype)
        output = self.out_proj(read * F.silu(z))
        return output, None if state is None else DiagonalState(memory[:, None], conv), read

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> DiagonalState:
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        return DiagonalState(
            torch.zeros(rows, 1, self.d_state, self.width, device=device, dtype=kept),
            torch.zeros(rows, self.conv_width - 1, self.width, device=device, dtype=dtype),
        )


class S4D(Mixer):
    """``S_t = exp(dt A) ⊙ S_{t-1} + B̄ᵀ x_t``, ``y_t = 2 Re(C S_t) + D x_t``, then GELU and a gated projection (GLU).

    A, C are complex (n d), learnt, the same for every token; ``B̄ = (exp(dt A) - 1) / A``, zero-order hold of B = 1.
    A starts as ``-1/2 + iπn`` (S4D-Lin), steps dt log-uniform in [dt_min, dt_max], a channel each; C and D normal. A
    scan, not a Fourier transform of the row: states can be carried and segments packed. Source: arXiv 2206.11893.

    Args:
        d_model: width of the residual stream, and channels.
        d_state: numbers a channel, of which conjugate pairs are kept once: even.
        dt_min: steps start log-uniform in [dt_min, dt_max].
        dt_max: see ``dt_min``.
    """

    bounded_state = True
    residual_projections = ("out_proj",)

    def __init__(self, d_model: int, d_state: int = 64, dt_min: float = 0.001, dt_max: float = 0.1) -> None:
        super().__init__()
        if d_state < 2 or d_state % 2:
            raise ValueError(f"S4D keeps one of each pair of conjugate numbers: d_state must be even, found {d_state}")
        self.width, self.pairs = d_model, d_state // 2
        self.log_dt = nn.Parameter(_log_uniform(d_model, dt_min, dt_max).log())
        self.A_log = nn.Parameter(torch.full((d_model, self.pairs), 0.5).log())  # of minus the real part
        self.A_imag = nn.Parameter(math.pi * torch.arange(self.pairs).float().repeat(d_model, 1))
        self.C = nn.Parameter(torch.randn(2, d_model, self.pairs) * 0.5**0.5)  # real, imaginary
        self.D = nn.Parameter(torch.randn(d_model))
        for parameter in (self.A_imag, self.C):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.out_proj = nn.Linear(d_model, 2 * d_model)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: DiagonalState | None = None
    ) -> tuple[Float[Tensor, "b t d"], DiagonalState | None]:
        x = still(hidden, layout.padding, 0.0)
        rate = torch.complex(-precise(self.A_log, hidden).exp(), precise(self.A_imag, hidden)).T
        dt = precise(self.log_dt, hidden).exp()
        read = torch.complex(*precise(self.C, hidden)).T
        write = torch.expm1(dt * rate) / (dt * rate)  # times dt x in the scan
        steps = still(dt.expand(x.shape), layout.padding, 0.0)
        memory = None if state is None else torch.complex(*state.memory.unbind(1))
        y, memory = selective_scan(x, steps, rate, write, 2 * read, starts=layout.starts, initial_state=memory)
        value, gate = self.out_proj(F.gelu(y + x * self.D.to(x.dtype))).chunk(2, dim=-1)
        output = value * torch.sigmoid(gate)
        return output, None if state is None else DiagonalState(torch.stack([memory.real, memory.imag], dim=1))

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> DiagonalState:
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        return DiagonalState(torch.zeros(rows, 2, self.pairs, self.width, device=device, dtype=kept))


def _log_uniform(count: int, low: float, high: float) -> Tensor:
    return torch.exp(torch.rand(count) * (math.log(high) - math.log(low)) + math.log(low))
