"""RG-LRU, Griffin's recurrent block: a gated linear recurrence of single channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, MixerState, positive
from seqlong.mixers.linear import precise, split_heads, still

#: Tokens that are scanned by doubling; above, chunks of as many are scanned in turn.
CHUNK = 64


@dataclass
class RGLRUState(MixerState):
    """Shapes: memory ``(b w)`` float32; conv ``(b r w)``, the last inputs of the convolution."""

    memory: Float[Tensor, "b w"]
    conv: Float[Tensor, "b r w"]


class RGLRU(Mixer):
    """``h_t = a_t h_{t-1} + √(1 - a_t²) σ(W_i x_t + b_i) x_t``, ``log a_t = -8 softplus(Λ) σ(W_r x_t + b_r)``.

    x is a projection through a short causal convolution without activation; h is multiplied with GELU of another, then
    projected. W_i, W_r are block-diagonal, a block a head. A segment's first token is taken whole, without the root, as
    the published code does. At a gate of 1, a² starts uniform in [0.9², 0.999²], as the paper has it (published code
    leaves the 8 out where it starts Λ, so that a starts as the eighth power of this). Matrices start normal, with a
    variance of one over their inputs (1 / 100 of that in the convolution), biases at zero, as in the published code
    (transformers, recurrent_gemma). Source: arXiv 2402.19427.

    Args:
        d_model: width of the residual stream.
        width: channels of the recurrence; d_model if not given.
        heads: blocks of W_i and W_r.
        conv_width: taps of the convolution.
    """

    bounded_state = True
    residual_projections = ("out_proj",)

    def __init__(self, d_model: int, width: int | None = None, heads: int = 4, conv_width: int = 4) -> None:
        super().__init__()
        width = d_model if width is None else width
        block = split_heads("RGLRU", width, heads)
        positive("RGLRU", width=width, conv_width=conv_width)
        self.width, self.heads, self.conv_width = width, heads, conv_width
        self.in_proj, self.gate_proj = nn.Linear(d_model, width), nn.Linear(d_model, width)
        self.conv1d = nn.Conv1d(width, width, conv_width, groups=width)
        self.gates_weight = nn.Parameter(torch.randn(2, heads, block, block) * block**-0.5)  # recurrence, input
        self.gates_bias = nn.Parameter(torch.zeros(2, width))
        kept = torch.empty(width).uniform_(0.9**2, 0.999**2)
        self.rate = nn.Parameter(torch.log(torch.expm1(-0.5 * kept.log() / 8)))  # Λ: 8 softplus(Λ) = -log(a)
        self.out_proj = nn.Linear(width, d_model)
        for layer in (self.in_proj, self.gate_proj, self.out_proj):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.conv1d.weight, std=0.1 * conv_width**-0.5)
        assert self.conv1d.bias is not None
        nn.init.zeros_(self.conv1d.bias)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: RGLRUState | None = None
    ) -> tuple[Float[Tensor, "b t d"], RGLRUState | None]:
        padding = layout.padding
        hidden = still(hidden, padding, 0.0)
        x, conv = self._convolved(self.in_proj(hidden), layout, state)
        heads = x.unflatten(2, (self.heads, -1))
        raw = torch.einsum("bthi,zhij->zbthj", heads, self.gates_weight).flatten(3)
        recurrent, taken = torch.sigmoid(precise(raw, hidden) + precise(self.gates_bias, hidden)[:, None, None])
        log_decay = -8 * F.softplus(precise(self.rate, hidden)) * recurrent
        root = (-torch.expm1(2 * log_decay)).clamp(min=1e-12).sqrt()
        root = torch.where(_first(layout, state)[..., None], 1.0, root)
        inputs = still(root * taken * x, padding, 0.0)
        decay = still(log_decay, padding, 0.0).exp()
        if layout.starts is not None:
            decay = decay.masked_fill(layout.starts[..., None], 0)
        if state is not None:
            first = inputs[:, :1] + decay[:, :1] * state.memory[:, None].to(inputs.dtype)
            inputs = torch.cat([first, inputs[:, 1:]], dim=1)
        h = _Scan.apply(decay, inputs)
        output = self.out_proj(h.to(x.dtype) * F.gelu(self.gate_proj(hidden), approximate="tanh"))
        if state is None:
            return output, None
        return output, RGLRUState(h[:, -1] if h.shape[1] else state.memory, conv)

    def _convolved(
        self, x: Float[Tensor, "b t w"], layout: SequenceLayout, state: RGLRUState | None
    ) -> tuple[Float[Tensor, "b t w"], Float[Tensor, "b r w"]]:
        """The convolution, and the inputs that the next window needs (zero where of another segment)."""
        reach, length = self.conv_width - 1, x.shape[1]
        before = x.new_zeros(len(x), reach, self.width) if state is None else state.conv.to(x.dtype)
        line = torch.cat([before, x], dim=1)
        place = torch.arange(length, device=x.device)[None]
        start = None  # the place of the latest start, or what no window reaches
        if layout.starts is not None:
            start = torch.where(layout.starts, place, -reach - 1)
        since = None if start is None else place - start.cummax(dim=1).values
        assert self.conv1d.bias is not None
        result = self.conv1d.bias.to(x.dtype).expand_as(x)
        for back in range(self.conv_width):
            part = line[:, reach - back : reach - back + length]
            if since is not None and back:
                part = part.masked_fill((since < back)[..., None], 0)
            result = result + part * self.conv1d.weight[:, 0, reach - back].to(x.dtype)
        place = layout.lengths[:, None] + torch.arange(reach, device=x.device)  # in line, whose token 0 is at ``reach``
        last = line.gather(1, place[..., None].expand(-1, -1, self.width))
        if start is not None and length:
            last = last.masked_fill((place - reach < start.amax(dim=1, keepdim=True))[..., None], 0)
        return result, last

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> RGLRUState:
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        return RGLRUState(
            torch.zeros(rows, self.width, device=device, dtype=kept),
            torch.zeros(rows, self.conv_width - 1, self.width, device=device, dtype=dtype),
        )


def _first(layout: SequenceLayout, state: RGLRUState | None) -> Bool[Tensor, "b t"]:
    """Tokens that begin a segment. Not by their positions, which may be those of a frame, or begin anywhere; a state
    of zeros is that before a first token."""
    rows, length = layout.shape
    if layout.starts is None:
        first = torch.zeros(rows, length, dtype=torch.bool, device=layout.positions.device)
    else:
        first = layout.starts.clone()
    if length:
        first[:, 0] |= True if state is None else (state.memory == 0).all(dim=1)
    return first


def _scan(decay: Tensor, x: Tensor) -> Tensor:
    """``h_t = decay_t h_{t-1} + x_t`` over axis 1: chunks by doubling, their ends by this function again."""
    rows, length, width = x.shape
    more = -length % CHUNK if length > CHUNK else 0
    chunk = CHUNK if length > CHUNK else length
    decay, h = (F.pad(y, (0, 0, 0, more)).view(rows, -1, max(chunk, 1), width) for y in (decay, x))
    step = 1
    while step < chunk:
        h = torch.cat([h[:, :, :step], h[:, :, step:] + decay[:, :, step:] * h[:, :, :-step]], dim=2)
        decay = torch.cat([decay[:, :, :step], decay[:, :, step:] * decay[:, :, :-step]], dim=2)
        step *= 2
    if h.shape[1] > 1:
        ends = _scan(decay[:, :, -1], h[:, :, -1])
        h = torch.cat([h[:, :1], h[:, 1:] + decay[:, 1:] * ends[:, :-1, None]], dim=1)
    return h.flatten(1, 2)[:, :length]


class _Scan(torch.autograd.Function):
    """Keeps decays and results only; the gradient is the same scan from the right."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, x: Tensor) -> Tensor:
        h = _scan(decay, x)
        ctx.save_for_backward(decay, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        decay, h = ctx.saved_tensors
        later = F.pad(decay[:, 1:], (0, 0, 0, min(1, decay.shape[1])))
        inputs = _scan(later.flip(1), grad.flip(1)).flip(1)
        return inputs * F.pad(h[:, :-1], (0, 0, min(1, h.shape[1]), 0)), inputs
