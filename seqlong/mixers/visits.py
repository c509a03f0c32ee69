"""Memories that tokens visit: which memory sees which tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqlong.layout import SequenceLayout


@dataclass(frozen=True)
class Visits:
    """For each row and memory, its tokens moved to the front, in their order; behind them what it does not see.

    A memory so has a row of its own, in which a token's place depends on the tokens before it only.

    Attributes:
        order: ``(b m t)`` the token at each place.
        layout: of the ``b · m`` rows; what a memory does not see is padding there.
        current: ``(b m)`` whether a memory's state is of the segment that goes on after the window; None if all are.
    """

    order: Int[Tensor, "b m t"]
    layout: SequenceLayout
    current: Bool[Tensor, "b m"] | None

    @staticmethod
    def build(seen: Bool[Tensor, "b m t"], layout: SequenceLayout) -> Visits:
        """Lay out the tokens that each memory sees; t is 1 or more.

        A state carried in must be of the segment that goes on at position 0, or zero (``current``).
        """
        rows, memories = seen.shape[:2]
        order = (~seen).to(torch.int8).argsort(dim=2, stable=True)
        flat = order.flatten(0, 1)
        places = layout.positions.repeat_interleave(memories, dim=0)
        places = places.gather(1, flat.reshape(*flat.shape, *[1] * (places.dim() - 2)).expand_as(places))
        if layout.segment_ids is None:
            own = seen.gather(2, order).flatten(0, 1).int()
            return Visits(order, SequenceLayout(own, places, torch.ones_like(own[:, 0])), None)
        ids = layout.segment_ids
        before = (ids[:, 0] if layout.previous is None else layout.previous)[:, None]
        own = torch.where(seen, ids[:, None], 0).gather(2, order)
        last = torch.where(seen, ids[:, None], 0).amax(dim=2)  # ids rise along a row
        last = torch.where(last > 0, last, before)
        whole = ids.amax(dim=1, keepdim=True)
        whole = torch.where(whole > 0, whole, before)
        previous = before.expand(rows, memories).flatten()
        return Visits(order, SequenceLayout(own.flatten(0, 1), places, previous), last == whole)

    def gather(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "bm t d"]:
        """What each memory sees, in its row."""
        wide = x[:, None].expand(-1, self.order.shape[1], -1, -1)
        return wide.gather(2, self.order[..., None].expand_as(wide)).flatten(0, 1)

    def scatter(self, y: Float[Tensor, "bm t d"]) -> Float[Tensor, "b m t d"]:
        """Results back at their tokens."""
        split = y.unflatten(0, self.order.shape[:2])
        return split.gather(2, self.order.argsort(dim=2)[..., None].expand_as(split))
