"""Mamba2: a selective state space with one decay a head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from seqlong.fragment import Fragment
from seqlong.kernels.norm import gated_rms_norm
from seqlong.kernels.scalar_decay import ssd
from seqlong.kernels.scalar_decay.step import ssd_step
from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, MixerState, positive
from seqlong.mixers.recurrences import short_conv
from seqlong.parallel import scan


@dataclass
class Mamba2State(MixerState):
    """Shapes: ssm ``(b h k v)`` float32, k = d_state, v = head_dim; conv ``(b r c)``, the last r = w - 1 inputs."""

    ssm: Float[Tensor, "b h k v"]
    conv: Float[Tensor, "b r c"]


class Mamba2(Mixer):
    """``S_t = exp(-A dt_t) S_{t-1} + B_tᵀ (dt_t x_t)``, ``y_t = C_t S_t + D x_t``, then a gated norm.

    x, B and C pass a short causal convolution with SiLU; ``dt = softplus(W u + dt_bias)``; the gated norm is
    ``RMSNorm(y ⊙ silu(z))`` over each group. A starts uniform in [1, 16], dt log-uniform in [0.001, 0.1], D as 1, all
    one a head; matrices and convolution as torch's. Weights have the names and the layout of the published code, so its
    checkpoints load. Source: arXiv 2405.21060.

    Args:
        d_model: width of the residual stream.
        d_state: width of the state per head dimension (N).
        head_dim: width of a head (P).
        expand: inner width over d_model.
        groups: groups of heads that share B and C (G).
        conv_width: taps of the short convolution.
        conv_bias: whether the convolution has a bias.
        norm_eps: added to the mean square in the gated norm.
        a_min: decay rates A start uniform in [a_min, a_max].
        a_max: see ``a_min``.
        dt_min: steps dt start log-uniform in [dt_min, dt_max].
        dt_max: see ``dt_min``.
        dt_floor: no step starts below this.
        recompute: keep about half as much for the backward pass: the projection and the scan's result. The convolution,
            the states inside the scan and the norm are computed again there.
    """

    bounded_state = True
    residual_projections = ("out_proj",)
    sequence_parallel = True

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        head_dim: int = 64,
        expand: int = 2,
        groups: int = 1,
        conv_width: int = 4,
        conv_bias: bool = True,
        norm_eps: float = 1e-5,
        a_min: float = 1.0,
        a_max: float = 16.0,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        positive(
            type(self).__name__, d_state=d_state, head_dim=head_dim, expand=expand, groups=groups, conv_width=conv_width
        )
        if not 0 < a_min <= a_max:
            raise ValueError(f"Mamba2 needs 0 < a_min <= a_max, found a_min={a_min}, a_max={a_max}")
        self.d_inner = expand * d_model
        if self.d_inner % head_dim:
            raise ValueError(
                f"Mamba2 needs expand * d_model divisible by head_dim, found {expand} * {d_model} and {head_dim}"
            )
        self.memory_width = self.d_inner
        self.heads = self.d_inner // head_dim
        if self.heads % groups:
            raise ValueError(f"Mamba2 needs heads divisible by groups, found {self.heads} heads and {groups} groups")
        self.d_state, self.head_dim, self.groups = d_state, head_dim, groups
        self.conv_width, self.norm_eps, self.recompute = conv_width, norm_eps, recompute
        self.d_conv = self.d_inner + 2 * groups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + self.d_conv + self.heads, bias=False)
        self.conv1d = nn.Conv1d(self.d_conv, self.d_conv, conv_width, groups=self.d_conv, bias=conv_bias)
        steps = torch.exp(torch.rand(self.heads) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(
            min=dt_floor
        )
        self.dt_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(a_min, a_max).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(self.d_inner, eps=norm_eps)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: Mamba2State | None = None
    ) -> tuple[Float[Tensor, "b t d"], Mamba2State | None]:
        return self.publish(hidden, layout, state)[:2]

    def publish(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: Mamba2State | None = None
    ) -> tuple[Float[Tensor, "b t d"], Mamba2State | None, Float[Tensor, "b t p"]]:
        """``forward``, and what comes out of the scan: y, before its gate and norm."""
        padding = layout.padding
        if padding is not None:
            hidden = hidden.masked_fill(padding[..., None], 0)
        # What the layout works out, it works out here: not inside of what is computed again.
        lengths = None if padding is None else layout.lengths
        inputs = self.in_proj(hidden), layout.starts, padding, lengths, state, layout.fragment
        if self.recompute and torch.is_grad_enabled():
            contexts = partial(create_selective_checkpoint_contexts, _keep_scan)
            return checkpoint(self._mix, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        return self._mix(*inputs)

    def _mix(
        self,
        projected: Float[Tensor, "b t p"],
        starts: Bool[Tensor, "b t"] | None,
        padding: Bool[Tensor, "b t"] | None,
        lengths: Int[Tensor, "b"] | None,
        state: Mamba2State | None,
        fragment: Fragment | None,
    ) -> tuple[Float[Tensor, "b t d"], Mamba2State | None, Float[Tensor, "b t i"]]:
        """Everything after the first projection; z, x, B, C and dt are never copied out of what computed them."""
        z, xbc, dt = projected.split([self.d_inner, self.d_conv, self.heads], dim=-1)
        after: Mamba2State | None
        if projected.shape[1] == 1 and state is not None and not torch.is_grad_enabled():
            y, after = self._step(xbc, dt, starts, padding, state)
        else:
            y, after = self._scan(xbc, dt, starts, padding, lengths, state, fragment)
        read = y.flatten(2)
        y = gated_rms_norm(read, z, self.norm.weight, self.groups, self.norm_eps)
        return self.out_proj(y), after, read

    def _scan(
        self,
        xbc: Float[Tensor, "b t c"],
        dt: Float[Tensor, "b t h"],
        starts: Bool[Tensor, "b t"] | None,
        padding: Bool[Tensor, "b t"] | None,
        lengths: Int[Tensor, "b"] | None,
        state: Mamba2State | None,
        fragment: Fragment | None,
    ) -> tuple[Float[Tensor, "b t h v"], Mamba2State | None]:
        """Convolution and state space over a row."""
        if padding is not None:  # a step of zero neither decays nor writes
            dt = dt.masked_fill(padding[..., None], -torch.inf)
        xbc, conv = short_conv(
            xbc,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            starts=starts,
            state=None if state is None else state.conv,
            lengths=lengths,
            output_state=state is not None,
            fragment=fragment,
        )
        x, b, c = xbc.split([self.d_inner, *[self.groups * self.d_state] * 2], dim=-1)
        # Decays stay in float32 whatever the activations are.
        kept = torch.float64 if xbc.dtype == torch.float64 else torch.float32
        x = x.unflatten(2, (self.heads, self.head_dim))
        b, c = (part.unflatten(2, (self.groups, self.d_state)) for part in (b, c))
        rates = -self.A_log.to(kept).exp()
        entry, final = None if state is None else state.ssm, None
        if fragment is not None:
            steps = F.softplus(dt.to(kept) + self.dt_bias.to(kept))
            made = scan.scalar_decay(b, x * steps[..., None].to(x.dtype), steps * rates, starts)
            entry, final = scan.entering(fragment, *made, entry)
        y, ssm = ssd(
            x,
            dt,
            rates,
            b,
            c,
            d=self.D,
            dt_bias=self.dt_bias,
            starts=starts,
            initial_state=entry,
            recompute=self.recompute,
        )
        return y, None if state is None or conv is None else Mamba2State(ssm if final is None else final, conv)

    def _step(
        self,
        xbc: Float[Tensor, "b 1 c"],
        dt: Float[Tensor, "b 1 h"],
        starts: Bool[Tensor, "b 1"] | None,
        padding: Bool[Tensor, "b 1"] | None,
        state: Mamba2State,
    ) -> tuple[Float[Tensor, "b 1 h v"], Mamba2State]:
        """The same for one token after ``state``, without gradients."""
        y, conv, ssm = ssd_step(
            xbc[:, 0],
            dt[:, 0],
            state.conv,
            state.ssm,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.A_log,
            d=self.D,
            dt_bias=self.dt_bias,
            starts=None if starts is None else starts[:, 0],
            padding=None if padding is None else padding[:, 0],
        )
        return y[:, None], Mamba2State(ssm, conv)

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> Mamba2State:
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        return Mamba2State(
            torch.zeros(rows, self.heads, self.d_state, self.head_dim, device=device, dtype=kept),
            torch.zeros(rows, self.conv_width - 1, self.d_conv, device=device, dtype=dtype),
        )


def _keep_scan(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Results of the scan are kept, all else that costs less is computed again."""
    scan = operation.name().split("::")[-1].startswith("scalar_decay_")
    return CheckpointPolicy.MUST_SAVE if scan else CheckpointPolicy.PREFER_RECOMPUTE
