"""Log-linear attention: a state for each power of two of distance, over Mamba2 and over Gated DeltaNet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seqlong.kernels.log_linear import Fenwick, log_linear, log_linear_step
from seqlong.kernels.log_linear.levels import buckets
from seqlong.kernels.norm import gated_rms_norm
from seqlong.kernels.short_conv import short_conv
from seqlong.layout import SequenceLayout
from seqlong.mixers.base import MixerState
from seqlong.mixers.deltanet import GatedDeltaNet
from seqlong.mixers.linear import Gate, precise, still
from seqlong.mixers.mamba2 import Mamba2


@dataclass
class LogLinearState(MixerState):
    """Shapes: states ``(b h m k v)`` float32, one a bucket of tokens; tokens ``(b)`` int64, those of the segment so
    far; conv ``(b r c)``, the last r = w - 1 inputs of the convolution, if any."""

    states: Float[Tensor, "b h m k v"]
    tokens: Int[Tensor, "b"]
    conv: Float[Tensor, "b r c"] | None = None


class LevelWeights(nn.Module):
    """``λ_t = softplus(L ⊙ W x_t)``, a weight for each head and level; L starts at 1."""

    def __init__(self, d_model: int, heads: int, levels: int) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"log-linear attention needs at least one level, found {levels}")
        self.proj = nn.Linear(d_model, heads * levels, bias=False)
        self.scale = nn.Parameter(torch.ones(heads, levels))

    def forward(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h l"]:
        raw = self.proj(hidden).unflatten(2, self.scale.shape)
        return F.softplus(precise(raw, hidden) * precise(self.scale, hidden))


def _run(
    inputs: tuple[Tensor, ...], beta: Tensor | None, layout: SequenceLayout, state: Fenwick | None
) -> tuple[Tensor, Fenwick | None]:
    """``log_linear`` on (q, k, v, log_decay, levels), whose stack padding must leave alone."""
    starts, padding, length = layout.starts, layout.padding, inputs[2].shape[1]
    if state is None:
        return log_linear(*inputs, beta=beta, starts=starts)[0], None
    if length == 1:
        q, k, v, decay, levels = inputs
        return log_linear_step(q, k, v, decay, levels, state, beta=beta, starts=starts, padding=padding)
    if padding is None:
        return log_linear(*inputs, beta=beta, starts=starts, initial_state=state)
    # Tokens are counted, and rows end at places of their own.
    outputs, stacks = [], []
    for row, end in enumerate(layout.lengths.tolist()):
        part = slice(row, row + 1), slice(0, end)
        output, after = log_linear(
            *(x[part] for x in inputs), beta=None if beta is None else beta[part],
            starts=None if starts is None else starts[part], initial_state=Fenwick(*(x[part[0]] for x in state)),
        )  # fmt: skip
        outputs.append(F.pad(output, (0, 0, 0, 0, 0, length - end)))
        stacks.append(after)
    return torch.cat(outputs), Fenwick(*(torch.cat(parts) for parts in zip(*stacks, strict=True)))


class LogLinearMamba2(Mamba2):
    """Mamba2 that reads a state for each power of two of distance: ``y_t = Σ_l λ_t^l C_t S_t^l + D x_t``.

    ``S_t^l`` is what the tokens s of ``bit_length(t XOR s) = l`` have left in ``S = exp(-A dt) S + Bᵀ (dt x)``, and
    ``λ_t = softplus(L ⊙ W u_t)``. All else, its initial values too, is Mamba2's. The state is a stack of levels - 1
    states, however many tokens passed: beyond ``2^(levels - 1)`` tokens all that is farther shares the last weight.
    Source: arXiv 2506.04761.

    Args:
        d_model: width of the residual stream.
        d_state: width of the state per head dimension (N).
        head_dim: width of a head (P).
        expand: inner width over d_model.
        groups: groups of heads that share B and C (G).
        conv_width: taps of the short convolution.
        conv_bias: whether the convolution has a bias.
        levels: weights of a token; 15 tell 16,384 tokens apart.
        norm_eps: added to the mean square in the gated norm.
    """

    sequence_parallel = False

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        head_dim: int = 64,
        expand: int = 2,
        groups: int = 1,
        conv_width: int = 4,
        conv_bias: bool = True,
        levels: int = 15,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model, d_state, head_dim, expand, groups, conv_width, conv_bias, norm_eps)
        self.levels = LevelWeights(d_model, self.heads, levels)
        self.memory_width = None  # what is read of a stack is not published

    def forward(  # type: ignore[override]
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: LogLinearState | None = None
    ) -> tuple[Float[Tensor, "b t d"], LogLinearState | None]:
        padding = layout.padding
        hidden = still(hidden, padding, 0.0)
        z, xbc, dt = self.in_proj(hidden).split([self.d_inner, self.d_conv, self.heads], dim=-1)
        xbc, conv = short_conv(
            xbc, self.conv1d.weight.squeeze(1), self.conv1d.bias, starts=layout.starts,
            state=None if state is None else state.conv, lengths=None if padding is None else layout.lengths,
            output_state=state is not None,
        )  # fmt: skip
        x, b, c = xbc.split([self.d_inner, *[self.groups * self.d_state] * 2], dim=-1)
        x = x.unflatten(2, (self.heads, self.head_dim))
        b, c = (y.unflatten(2, (self.groups, self.d_state)) for y in (b, c))
        steps = still(F.softplus(precise(dt, hidden) + precise(self.dt_bias, hidden)), padding, 0.0)
        inputs = c, b, (x * steps[..., None]).to(x.dtype), -precise(self.A_log, hidden).exp() * steps
        stack = None if state is None else Fenwick(state.states, state.tokens)
        y, after = _run((*inputs, self.levels(hidden)), None, layout, stack)
        y = (y + x * self.D[:, None]).to(x.dtype)
        output = self.out_proj(gated_rms_norm(y.flatten(2), z, self.norm.weight, self.groups, self.norm_eps))
        return output, None if after is None else LogLinearState(*after, conv)

    def initial_state(  # type: ignore[override]
        self, rows: int, device: torch.device | str, dtype: torch.dtype
    ) -> LogLinearState:
        one = super().initial_state(rows, device, dtype)
        return _empty(one.ssm, one.conv, self.levels)


class LogLinearGatedDeltaNet(GatedDeltaNet):
    """Gated DeltaNet that reads a state for each power of two of distance: ``o_t = Σ_l λ_t^l q_t S_t^l / √k``.

    ``S_t^l`` is what the tokens s of ``bit_length(t XOR s) = l`` have left in the gated delta rule's state, and
    ``λ_t = softplus(L ⊙ W x_t)``. All else, its initial values too, is GatedDeltaNet's; the state is a stack as in
    LogLinearMamba2. Source: arXiv 2506.04761.

    Args:
        d_model: width of the residual stream.
        heads: heads of values.
        groups: heads of queries and keys, each shared by heads / groups; as many as ``heads`` if not given.
        head_dim: width of a query and key; 0.75 d_model over ``heads`` if not given.
        expand_v: width of a value over that of a key.
        negative_eigenvalues: β in [0, 2] instead of [0, 1].
        conv_width: taps of the short convolution over q, k, v.
        gate: of the output.
        levels: weights of a token; 15 tell 16,384 tokens apart.
        norm_eps: added to the mean square in the norm.
    """

    sequence_parallel = False

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
        levels: int = 15,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            d_model, heads, groups, head_dim, expand_v, negative_eigenvalues, conv_width, gate, norm_eps=norm_eps
        )
        self.levels = LevelWeights(d_model, heads, levels)
        self.memory_width = None

    def forward(  # type: ignore[override]
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: LogLinearState | None = None
    ) -> tuple[Float[Tensor, "b t d"], LogLinearState | None]:
        padding = layout.padding
        hidden = still(hidden, padding, 0.0)
        streams, conv = self.qkv_proj(hidden), None
        if self.conv_width:
            streams, conv = short_conv(
                streams, self.conv1d.weight.squeeze(1), None, starts=layout.starts,
                state=None if state is None else state.conv, lengths=None if padding is None else layout.lengths,
                output_state=state is not None,
            )  # fmt: skip
        q, k, v = streams.split(list(self.widths), dim=-1)
        q, k = (_of_length_one(x.unflatten(2, (self.groups, self.key_dim))) for x in (q, k))
        v = v.unflatten(2, (self.heads, self.value_dim))
        beta = torch.sigmoid(precise(self.beta_proj(hidden), hidden))
        beta = still(2 * beta if self.activation == "double_sigmoid" else beta, padding, 0.0)
        raw = precise(self.decay_proj(hidden), hidden) + precise(self.dt_bias, hidden)
        decay = still(-precise(self.A_log, hidden).exp() * F.softplus(raw), padding, 0.0)
        stack = None if state is None else Fenwick(state.states, state.tokens)
        output, after = _run((q, k, v, decay, self.levels(hidden)), beta, layout, stack)
        output = self.out_proj(self.finish(output * self.key_dim**-0.5, hidden).flatten(2))
        return output, None if after is None else LogLinearState(*after, conv)

    def initial_state(  # type: ignore[override]
        self, rows: int, device: torch.device | str, dtype: torch.dtype
    ) -> LogLinearState:
        one = super().initial_state(rows, device, dtype)
        return _empty(one.memory, one.conv, self.levels)


def _of_length_one(x: Tensor) -> Tensor:
    return (x * (precise(x, x).square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def _empty(memory: Tensor, conv: Tensor | None, levels: LevelWeights) -> LogLinearState:
    rows, heads, key, value = memory.shape
    states = memory.new_zeros(rows, heads, buckets(levels.scale.shape[1]), key, value)
    return LogLinearState(states, torch.zeros(rows, dtype=torch.int64, device=memory.device), conv)
