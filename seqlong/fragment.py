"""Fragment: the part of every row that a process holds under sequence parallelism, and what it says to the others."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from seqlong.batch import SequenceBatch
from seqlong.errors import ConfigError
from seqlong.layout import SequenceLayout

# torch 2.13 has new names for these.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class Fragment:
    """Positions ``rank · n`` to ``(rank + 1) · n`` of rows of ``size · n`` positions, in the group's order of ranks.

    Attributes:
        group: the processes that hold the same rows.
        rank: this one's place in the group.
        size: processes in the group.
        whole: the layout of the whole rows, the same on every process.
        turned: whether the rows are read from their end, fragments too.
        passes: whether states go from each process to the next instead of being gathered by all.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    whole: SequenceLayout
    turned: bool = False
    passes: bool = False

    @property
    def place(self) -> int:
        """How many fragments are read before this one."""
        return self.size - 1 - self.rank if self.turned else self.rank

    def turn(self) -> Fragment:
        """The same rows read from the other end."""
        return dataclasses.replace(self, turned=not self.turned)

    def layout(self, rows: int, length: int) -> SequenceLayout:
        """The layout of this fragment, ``length`` positions of each of ``rows`` rows."""
        start = self.rank * length
        return dataclasses.replace(self.whole.slice(start, start + length), fragment=self)

    def following(self) -> Tensor | None:
        """``(b)`` the segment id behind this fragment's last position; None at the end, or where there are no ids."""
        ids = self.whole.segment_ids
        if ids is None or self.rank == self.size - 1:
            return None
        return ids[:, (self.rank + 1) * (ids.shape[1] // self.size)]

    def gather(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "w ..."]:
        """Every fragment's ``x``, in the order in which fragments are read; gradients go back to their owners."""
        every = _Gather.apply(x, self.group, self.size)
        return every.flip(0) if self.turned else every

    def send(self, steps: int, x: Tensor) -> None:
        """x to the fragment that is read ``steps`` later, if there is one; no gradients."""
        if 0 <= self.place + steps < self.size:
            dist.send(x.contiguous(), group=self.group, group_dst=self._neighbour(steps))

    def receive(self, steps: int, otherwise: Tensor) -> Tensor:
        """What the fragment that is read ``steps`` later sends; ``otherwise`` if there is none."""
        if not 0 <= self.place + steps < self.size:
            return otherwise
        x = torch.empty_like(otherwise, memory_format=torch.contiguous_format)
        dist.recv(x, group=self.group, group_src=self._neighbour(steps))
        return x

    def _neighbour(self, steps: int) -> int:
        return self.rank - steps if self.turned else self.rank + steps

    def join(self, x: Tensor) -> Tensor:
        """``(b n ...)`` of every fragment, behind one another ``(b w·n ...)``; gradients go back to their owners."""
        return self.gather(x).transpose(0, 1).flatten(1, 2)

    def own(self, x: Tensor) -> Tensor:
        """This fragment's positions ``(b n ...)`` of whole rows ``(b w·n ...)``."""
        return x.chunk(self.size, dim=1)[self.place]

    def to_heads(self, x: Float[Tensor, "b n h d"]) -> Float[Tensor, "b t m d"]:
        """Exchange positions for heads: all positions of ``h / w`` heads, those of this rank (arXiv 2309.14509)."""
        rows, length, heads, width = x.shape
        sent = x.view(rows, length, self.size, heads // self.size, width).permute(2, 0, 1, 3, 4)
        return _Exchange.apply(sent, self.group).transpose(0, 1).flatten(1, 2)

    def to_positions(self, x: Float[Tensor, "b t m d"]) -> Float[Tensor, "b n h d"]:
        """The inverse of ``to_heads``."""
        sent = x.unflatten(1, (self.size, -1)).transpose(0, 1)
        return _Exchange.apply(sent, self.group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def split(
    batch: SequenceBatch, group: dist.ProcessGroup | None, rank: int, size: int, passes: bool = False
) -> SequenceBatch:
    """This process's part of a batch that all of ``group`` hold: the same rows, ``1 / size`` of their positions.

    Raises:
        ConfigError: rows that do not divide.
    """
    if size == 1:
        return batch
    rows, length = batch.shape
    if length % size:
        raise ConfigError(
            f"sequence parallelism cuts rows in {size} equal parts, and these have {length:,} positions; set "
            f"data.length to a multiple of {size}"
        )
    whole = SequenceLayout.build(rows, length, batch.segment_ids, batch.positions, device=batch.inputs.device)
    here = slice(rank * (length // size), (rank + 1) * (length // size))
    along = ("tokens", "targets", "loss_weight", "segment_ids", "positions", "patches")
    cut = {name: value[:, here] for name in along if (value := getattr(batch, name)) is not None}
    return dataclasses.replace(batch, **cut, fragment=Fragment(group, rank, size, whole, passes=passes))


class _Gather(torch.autograd.Function):
    """All-gather forward, reduce-scatter backward: what each process made of my x comes back to me, added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None, size: int) -> Tensor:
        ctx.group = group
        flat = x.reshape(1, -1).contiguous()
        every = flat.new_empty(size, flat.shape[1])
        _all_gather(every, flat, group=group)
        return every.view(size, *x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        flat = grad.reshape(grad.shape[0], -1).contiguous()
        mine = flat.new_empty(1, flat.shape[1])
        _reduce_scatter(mine, flat, group=ctx.group)
        return mine.view(grad.shape[1:]), None, None


class _Tie(torch.autograd.Function):
    """x, whose gradient also makes one of zero for what was gathered: whoever has no use for it must take part in the
    exchange of its gradients all the same, or the others wait for ever."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, every: Tensor) -> Tensor:
        ctx.shape, ctx.kept = every.shape, {"dtype": every.dtype, "device": every.device}
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros(ctx.shape, **ctx.kept)


def tie(x: Tensor, every: Tensor) -> Tensor:
    """x, with ``every``, which was gathered, in its graph."""
    return _Tie.apply(x, every)


class _Exchange(torch.autograd.Function):
    """Piece j of mine for piece ``rank`` of j's; its own inverse, so its own gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return _exchanged(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grad, ctx.group), None


def _exchanged(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    x = x.contiguous()
    found = torch.empty_like(x)
    dist.all_to_all_single(found, x, group=group)
    return found
