"""Experts on several processes: positions travel to the experts that they chose, and what these made of them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class Exchange:
    """Experts ``rank · e / w`` to ``(rank + 1) · e / w`` are this process's (GShard, arXiv 2006.16668).

    No position is dropped, however uneven the load: the processes first tell each other how many rows they will send,
    which is one wait for the device.

    Args:
        group: the processes that have the experts between them; all must run every layer.
        size: how many these are.
    """

    def __init__(self, group: dist.ProcessGroup | None, size: int) -> None:
        self.group, self.size = group, size

    def __call__(
        self,
        rows: Float[Tensor, "r d"],
        counts: Int[Tensor, "e"],
        compute: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Float[Tensor, "r d"]:
        """What the experts make of rows that are sorted by expert.

        Args:
            rows: those of expert 0 first.
            counts: rows of each of all experts.
            compute: is given the rows that arrived here, their order by expert, and where each of this process's
                experts ends in it; returns the results in the order of arrival.
        """
        sent = counts.view(self.size, -1)
        found = torch.empty_like(sent)  # rows of (process, expert of mine)
        dist.all_to_all_single(found, sent.contiguous(), group=self.group)
        away, here = torch.stack([sent.sum(dim=1), found.sum(dim=1)]).tolist()
        arrived = _Rows.apply(rows, away, here, self.group)
        experts = torch.arange(found.shape[1], device=rows.device).repeat(self.size)
        order = experts.repeat_interleave(found.flatten(), output_size=sum(here)).argsort(stable=True)
        return _Rows.apply(compute(arrived, order, found.sum(dim=0).cumsum(dim=0)), here, away, self.group)


class _Rows(torch.autograd.Function):
    """The first ``sent[0]`` rows to process 0, the next ``sent[1]`` to process 1, ...; what came, in their order."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.way = sent, received, group  # type: ignore[attr-defined]
        return _exchanged(x, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.way
        return _exchanged(grad, received, sent, group), None, None, None


def _exchanged(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> Tensor:
    found = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(found, x.contiguous(), received, sent, group=group)
    return found


class _Share(torch.autograd.Function):
    """x, of whose gradient only ``share`` counts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.share, None


def share_of_gradient(x: Tensor, share: float) -> Tensor:
    """x, of whose gradient only ``share`` counts: where others are means over processes, and this one is a sum."""
    return _Share.apply(x, share)
