"""The experts: SwiGLUs side by side, as stacked matrices."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seqlong.kernels.grouped_matmul import collect_rows, grouped_matmul, place_rows


class ExpertLinear(nn.Module):
    """One linear map an expert: ``weight`` ``(e d_in d_out)``, no biases, initialised as torch's Linear."""

    def __init__(self, experts: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, d_in, d_out))
        nn.init.uniform_(self.weight, -1 / math.sqrt(d_in), 1 / math.sqrt(d_in))


class Experts(nn.Module):
    """``W_down,e (silu(W_gate,e x) ⊙ W_up,e x)`` for the experts e of each position, weighted and added up.

    No position is dropped, however uneven the load. Nothing waits for the device, and nothing depends on the order in
    which a GPU adds: two runs are equal bit by bit.

    Args:
        experts: how many.
        d_model: width of the residual stream.
        d_hidden: inner width of each.
        implementation: of grouped_matmul; null lets it choose.
    """

    residual_projections = ("down_proj",)

    def __init__(self, experts: int, d_model: int, d_hidden: int, implementation: str | None = None) -> None:
        super().__init__()
        self.count, self.implementation = experts, implementation
        self.gate_up_proj = ExpertLinear(experts, d_model, 2 * d_hidden)
        self.down_proj = ExpertLinear(experts, d_hidden, d_model)

    def forward(
        self, x: Float[Tensor, "m d"], chosen: Int[Tensor, "m k"], weights: Float[Tensor, "m k"]
    ) -> Float[Tensor, "m d"]:
        """Each position through its experts; numbers from ``experts`` on name none."""
        copies = chosen.shape[1]
        order, ends = by_expert(chosen, self.count)
        inner = grouped_matmul(
            x, self.gate_up_proj.weight, ends, gather=order, copies=copies, implementation=self.implementation
        )
        # Weighing inside moves fewer bytes than weighing the result, which is wider than a fine-grained expert.
        inner = _gated(inner, weights.flatten().index_select(0, order)[:, None])
        output = grouped_matmul(inner, self.down_proj.weight, ends, scatter=order, implementation=self.implementation)
        return output.view(*chosen.shape, -1).sum(dim=1)

    def by_lists(
        self, x: Float[Tensor, "m d"], lists: Int[Tensor, "e c"], weights: Float[Tensor, "e c"]
    ) -> Float[Tensor, "m d"]:
        """Each expert with its own list of positions, all of one length; m names none."""
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        inner = _gated(collect_rows(x, lists) @ self.gate_up_proj.weight.to(x.dtype), weights[..., None])
        return place_rows(inner @ self.down_proj.weight.to(x.dtype), lists, x.shape[0])


def _gated(inner: Tensor, weight: Tensor) -> Tensor:
    """``silu(gate) · up · weight``, rounded once after the weight, which is float32."""
    gate, up = inner.chunk(2, dim=-1)
    return (F.silu(gate) * up * weight).to(inner.dtype)


def by_expert(chosen: Int[Tensor, "m k"], experts: int) -> tuple[Int[Tensor, "r"], Int[Tensor, "e"]]:
    """The order that sorts all choices by expert, positions in order within each, and where each expert ends."""
    short = torch.int16 if experts < 1 << 14 else torch.int32  # a GPU sorts by the bits of a key
    ordered, order = chosen.flatten().to(short).sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(experts, dtype=short, device=chosen.device), right=True)
