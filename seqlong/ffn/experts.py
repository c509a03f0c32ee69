"""The experts: SwiGLUs side by side, as stacked matrices."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from seqlong.errors import ConfigError
from seqlong.ffn.exchange import Exchange, share_of_gradient
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
        self.exchange: Exchange | None = None
        self.gate_up_proj = ExpertLinear(experts, d_model, 2 * d_hidden)
        self.down_proj = ExpertLinear(experts, d_hidden, d_model)

    def forward(
        self, x: Float[Tensor, "m d"], chosen: Int[Tensor, "m k"], weights: Float[Tensor, "m k"]
    ) -> Float[Tensor, "m d"]:
        """Each position through its experts; numbers from ``experts`` on name none."""
        copies = chosen.shape[1]
        order, ends = by_expert(chosen, self.count)
        if self.exchange is not None:
            return self._elsewhere(x, weights, order, ends, self.exchange)
        inner = grouped_matmul(
            x, self.gate_up_proj.weight, ends, gather=order, copies=copies, implementation=self.implementation
        )
        # Weighing inside moves fewer bytes than weighing the result, which is wider than a fine-grained expert.
        inner = _gated(inner, weights.flatten().index_select(0, order)[:, None])
        output = grouped_matmul(inner, self.down_proj.weight, ends, scatter=order, implementation=self.implementation)
        return output.view(*chosen.shape, output.shape[1]).sum(dim=1)

    def share(self, mesh: DeviceMesh) -> None:
        """Keep ``1 / w`` of the experts here, the others on the other processes of a mesh of one dimension; all have
        the same weights before. Positions travel from then on. Gradients are divided by w, as those that FSDP2 and DDP
        average over processes are.

        Raises:
            ConfigError: experts that do not divide.
        """
        size = mesh.size()
        if self.count % size:
            raise ConfigError(
                f"expert parallelism gives each of {size} processes as many experts, and there are {self.count}; set "
                f"the experts of MoE to a multiple of {size}"
            )
        for layer in (self.gate_up_proj, self.down_proj):
            part = distribute_tensor(layer.weight.detach(), mesh, [Shard(0)], src_data_rank=None)
            layer.weight = nn.Parameter(part, requires_grad=layer.weight.requires_grad)
        self.exchange = Exchange(mesh.get_group(), size)

    def _elsewhere(
        self, x: Float[Tensor, "m d"], weights: Float[Tensor, "m k"], order: Tensor, ends: Tensor, exchange: Exchange
    ) -> Float[Tensor, "m d"]:
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        copies = weights.shape[1]
        order = order[: int(ends[-1])]  # behind it is what goes nowhere
        up, down = (_own(layer.weight, exchange.size) for layer in (self.gate_up_proj, self.down_proj))

        def compute(rows: Tensor, sorting: Tensor, ends: Tensor) -> Tensor:
            inner = grouped_matmul(rows, up, ends, gather=sorting, implementation=self.implementation)
            inner = _gated(inner, torch.ones((), device=x.device))
            return grouped_matmul(inner, down, ends, scatter=sorting, implementation=self.implementation)

        made = exchange(x.index_select(0, order // copies), ends.diff(prepend=ends.new_zeros(1)), compute)
        made = (made * weights.flatten().index_select(0, order)[:, None]).to(made.dtype)
        output = made.new_zeros(weights.numel(), made.shape[1]).index_copy(0, order, made)
        return output.view(*weights.shape, output.shape[1]).sum(dim=1)

    def by_lists(
        self, x: Float[Tensor, "m d"], lists: Int[Tensor, "e c"], weights: Float[Tensor, "e c"]
    ) -> Float[Tensor, "m d"]:
        """Each expert with its own list of positions, all of one length; m names none."""
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        inner = _gated(collect_rows(x, lists) @ self.gate_up_proj.weight.to(x.dtype), weights[..., None])
        return place_rows(inner @ self.down_proj.weight.to(x.dtype), lists, x.shape[0])


def _own(weight: Tensor, size: int) -> Tensor:
    assert isinstance(weight, DTensor)
    return share_of_gradient(weight.to_local(), 1 / size)


def _gated(inner: Tensor, weight: Tensor) -> Tensor:
    """``silu(gate) · up · weight``, rounded once after the weight, which is float32."""
    gate, up = inner.chunk(2, dim=-1)
    return (F.silu(gate) * up * weight).to(inner.dtype)


def by_expert(chosen: Int[Tensor, "m k"], experts: int) -> tuple[Int[Tensor, "r"], Int[Tensor, "e"]]:
    """The order that sorts all choices by expert, positions in order within each, and where each expert ends."""
    short = torch.int16 if experts < 1 << 14 else torch.int32  # a GPU sorts by the bits of a key
    ordered, order = chosen.flatten().to(short).sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(experts, dtype=short, device=chosen.device), right=True)
