"""What linear mixers share: projections, a short convolution, a state for each head, a norm, a gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqlong.kernels.norm import rms_norm
from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, MixerState, positive
from seqlong.mixers.recurrences import short_conv

Gate = Literal["silu", "sigmoid", "none"]


@dataclass
class LinearState(MixerState):
    """Shapes: memory ``(b h k v)`` float32; conv ``(b r c)``, the last r = w - 1 inputs of the convolution, if any."""

    memory: Float[Tensor, "b h k v"]
    conv: Float[Tensor, "b r c"] | None = None


class Constant(nn.Module):
    """Numbers in float64 that no cast of the model rounds, on its device; not learnt, not in checkpoints."""

    numbers: Tensor

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        self.values = tuple(values)
        self.register_buffer("numbers", torch.tensor(self.values, dtype=torch.float64), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constant:
        super()._apply(fn, recurse)
        # Not what came of a cast, nor what an empty tensor held after a model was built on the meta device.
        self.numbers = torch.tensor(self.values, dtype=torch.float64, device=self.numbers.device)
        return self

    def forward(self, like: Tensor) -> Tensor:
        """In float32; float64 if ``like`` is."""
        return self.numbers.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


class LowRank(nn.Sequential):
    """Two linear layers, the second with a bias, with ``rank`` numbers between: a gate of few parameters."""

    def __init__(self, d_model: int, width: int, rank: int, bias: bool = True) -> None:
        super().__init__(nn.Linear(d_model, rank, bias=False), nn.Linear(rank, width, bias=bias))


class LinearMixer(Mixer):
    """q, k and v from one projection, a recurrence (the subclass's), RMSNorm of each head, a gate, a projection.

    The state is ``memory`` ``(b h k v)`` in float32, and the last inputs of the convolution. Matrices start as
    ``nn.Linear`` does, norms at 1, whatever the source of the subclass; what is otherwise, its docstring says. A
    subclass gives ``recur``; it may change how q, k, v are made (``features``) and how its result ends (``finish``).
    Padding has k = 0 when ``recur`` is called; a subclass sees to it that its decays are 1 there (``still``).

    Args:
        d_model: width of the residual stream.
        heads: heads, each with a state ``(k v)``.
        key_dim: k, width of a query and key.
        value_dim: v, width of a value.
        groups: queries and keys, each shared by ``heads / groups`` heads; ``heads`` if not given.
        conv_width: taps of the causal convolution, with SiLU, over q, k and v; 0 for none.
        gate: what the normed result is multiplied with: ``silu`` or ``sigmoid`` of a projection, or ``none``.
        gate_rank: numbers between the two layers that make the gate; one layer if not given.
        norm: of each head, with one set of weights, or of all heads together, a weight a channel.
        norm_eps: added to the mean square in the norm.
    """

    bounded_state = True
    residual_projections = ("out_proj",)
    sequence_parallel = True

    def __init__(
        self,
        d_model: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        groups: int | None = None,
        conv_width: int = 0,
        gate: Gate = "silu",
        gate_rank: int | None = None,
        norm: Literal["head", "row"] = "head",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        positive(name, gate_rank=gate_rank)
        if conv_width < 0:
            raise ValueError(f"{name} needs a conv_width of 0 (none) or more, found conv_width={conv_width}")
        groups = heads if groups is None else groups
        if min(heads, key_dim, value_dim, groups) < 1 or heads % groups:
            raise ValueError(
                f"{name} needs positive widths and heads divisible by groups, found {heads} heads of {key_dim} by "
                f"{value_dim}, {groups} groups"
            )
        self.heads, self.groups, self.key_dim, self.value_dim = heads, groups, key_dim, value_dim
        self.memory_width = heads * value_dim
        self.state_dim = key_dim  # of what ``features`` makes of a key
        self.conv_width, self.gate, self.norm_eps = conv_width, gate, norm_eps
        self.widths = (groups * key_dim, groups * key_dim, heads * value_dim)
        self.qkv_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        if conv_width:
            self.conv1d = nn.Conv1d(sum(self.widths), sum(self.widths), conv_width, groups=sum(self.widths), bias=False)
        if gate != "none":
            width = heads * value_dim
            self.gate_proj = nn.Linear(d_model, width, bias=False) if gate_rank is None else LowRank(
                d_model, width, gate_rank
            )  # fmt: skip
        self.norm = nn.RMSNorm(value_dim if norm == "head" else heads * value_dim, eps=norm_eps)
        self.out_proj = nn.Linear(heads * value_dim, d_model, bias=False)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: LinearState | None = None
    ) -> tuple[Float[Tensor, "b t d"], LinearState | None]:
        return self.publish(hidden, layout, state)[:2]

    def publish(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: LinearState | None = None
    ) -> tuple[Float[Tensor, "b t d"], LinearState | None, Float[Tensor, "b t w"]]:
        """``forward``, and what comes out of the recurrence, before its norm and gate."""
        padding = layout.padding
        if padding is not None:
            hidden = hidden.masked_fill(padding[..., None], 0)
        streams, conv = self.qkv_proj(hidden), None
        if self.conv_width:
            streams, conv = short_conv(
                streams, self.conv1d.weight.squeeze(1), None, starts=layout.starts,
                state=None if state is None else state.conv, lengths=None if padding is None else layout.lengths,
                output_state=state is not None, fragment=layout.fragment,
            )  # fmt: skip
        q, k, v = streams.split(list(self.widths), dim=-1)
        q, k = (x.unflatten(2, (self.groups, self.key_dim)) for x in (q, k))
        q, k, v = self.features(q, k, v.unflatten(2, (self.heads, self.value_dim)), layout)
        if padding is not None:
            k = k.masked_fill(padding[..., None, None], 0)
        read, memory = self.recur(q, k, v, hidden, layout, None if state is None else state.memory)
        output = self.out_proj(self.finish(read, hidden).flatten(2))
        return output, None if state is None else LinearState(memory, conv), read.flatten(2)

    def features(
        self, q: Float[Tensor, "b t g k"], k: Float[Tensor, "b t g k"], v: Float[Tensor, "b t h v"],
        layout: SequenceLayout,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Queries, keys and values as the recurrence takes them."""
        return q, k, v

    def recur(
        self, q: Float[Tensor, "b t g k"], k: Float[Tensor, "b t g k"], v: Float[Tensor, "b t h v"],
        hidden: Float[Tensor, "b t d"], layout: SequenceLayout, memory: Float[Tensor, "b h k v"] | None,
    ) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:  # fmt: skip
        """Run the recurrence from ``memory``: its output and what it leaves."""
        raise NotImplementedError(f"{type(self).__name__} must define recur(q, k, v, hidden, layout, memory)")

    def finish(self, output: Float[Tensor, "b t h v"], hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h v"]:
        """Norm of each head, then the gate."""
        normed = self.normed(output)
        if self.gate == "none":
            return normed
        gate = self.gate_proj(hidden).unflatten(2, (self.heads, self.value_dim))
        return normed * (F.silu(gate) if self.gate == "silu" else torch.sigmoid(gate))

    def normed(self, output: Float[Tensor, "b t h v"]) -> Float[Tensor, "b t h v"]:
        """RMSNorm of each head, or of all together."""
        if len(self.norm.weight) == self.value_dim:
            return rms_norm(output, self.norm.weight, self.norm_eps)
        return rms_norm(output.flatten(2), self.norm.weight, self.norm_eps).view_as(output)

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> LinearState:
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        memory = torch.zeros(rows, self.heads, self.state_dim, self.value_dim, device=device, dtype=kept)
        if not self.conv_width:
            return LinearState(memory)
        return LinearState(memory, torch.zeros(rows, self.conv_width - 1, sum(self.widths), device=device, dtype=dtype))


def still(x: Float[Tensor, "b t ..."], padding: Bool[Tensor, "b t"] | None, value: float) -> Tensor:
    """x with ``value`` at padding: what makes a gate leave the state as it is."""
    return x if padding is None else x.masked_fill(padding.reshape(*padding.shape, *[1] * (x.dim() - 2)), value)


def split_heads(name: str, width: int, heads: int) -> int:
    """Width of a head.

    Raises:
        ValueError: heads do not divide the width.
    """
    if heads < 1 or width % heads:
        raise ValueError(f"{name} needs a width divisible by heads, found {width} and {heads} heads")
    return width // heads


def precise(parameter: Tensor, like: Tensor) -> Tensor:
    """A parameter of a gate in float32, float64 if the activations are: gates keep their digits under autocast."""
    return parameter.to(torch.float64 if like.dtype == torch.float64 else torch.float32)
