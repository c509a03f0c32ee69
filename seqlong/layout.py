"""SequenceLayout: where segments begin and end in a batch of rows; built once per batch, read by every mixer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

if TYPE_CHECKING:
    from seqlong.fragment import Fragment

T = TypeVar("T")


def _once(function: Callable[[Any], T]) -> T:
    """A property computed when first asked for (``functools.cached_property`` takes a lock, which no tracer can)."""
    name = function.__name__

    def get(self: SequenceLayout) -> T:
        if name not in self._known:
            self._known[name] = function(self)
        return self._known[name]

    return property(get, doc=function.__doc__)  # type: ignore[return-value]


@dataclass(frozen=True)
class SequenceLayout:
    """The segments of ``b`` rows of ``t`` positions.

    Attributes:
        segment_ids: ``(b t)`` int32, 1, 2, ... along the row, 0 for padding (at the end of the row only); None when
            every row is one segment without padding.
        positions: ``(b t)`` int64, the position of each token in its segment, carried on from the window before.
        previous: ``(b)`` the segment id just before position 0, for a slice of longer rows; None at a row's beginning.
            Where it differs from the first id, a carried state is not for these tokens.
        fragment: under sequence parallelism, which part of longer rows this is, and who holds the others; else None.
        prefix: ``(b t)`` True where tokens of a segment's beginning see one another in both directions; None: nowhere.
    """

    segment_ids: Int[Tensor, "b t"] | None
    positions: Int[Tensor, "b t"] | Int[Tensor, "b t 3"]
    previous: Int[Tensor, "b"] | None = None
    fragment: Fragment | None = None
    prefix: Bool[Tensor, "b t"] | None = None
    _known: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def build(
        rows: int,
        length: int,
        segment_ids: Int[Tensor, "b t"] | None = None,
        positions: Int[Tensor, "b t"] | Int[Tensor, "b t 3"] | None = None,
        offset: Int[Tensor, "b"] | None = None,
        device: torch.device | str = "cpu",
    ) -> SequenceLayout:
        """Lay out ``rows`` of ``length``.

        Args:
            rows: b.
            length: t.
            segment_ids: as above; None for one segment a row.
            positions: given positions, kept as they are; None counts from each segment's start.
            offset: ``(b)`` positions already seen of the segment that each row continues; None when no state is
                carried.
            device: where to build positions when there are no ``segment_ids`` to tell.
        """
        if segment_ids is not None:
            device = segment_ids.device
        elif offset is not None:
            device = offset.device
        if positions is None:
            steps = torch.arange(length, device=device)
            if segment_ids is None:
                positions = steps.expand(rows, length)
                first_segment: Tensor | None = None
            else:
                fresh = torch.zeros_like(segment_ids, dtype=torch.bool)
                fresh[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
                last_start = torch.where(fresh, steps, 0).cummax(dim=1).values
                positions = steps - last_start
                first_segment = ~fresh.cummax(dim=1).values if length else fresh
            if offset is not None:
                shift = offset[:, None].expand(rows, length)
                positions = positions + (shift if first_segment is None else shift * first_segment)
        return SequenceLayout(segment_ids, positions)

    @property
    def shape(self) -> tuple[int, int]:
        """``(b, t)``."""
        rows, length = self.positions.shape[:2]
        return rows, length

    @_once
    def starts(self) -> Bool[Tensor, "b t"] | None:
        """``(b t)`` True where a state starts afresh: at the first token of every segment but the one at position 0,
        which goes on from whatever state is carried (zero at first). None when every row is one segment."""
        if self.segment_ids is None:
            return None
        ids = self.segment_ids
        before = torch.empty_like(ids)
        before[:, 1:] = ids[:, :-1]
        before[:, :1] = (ids[:, 0] if self.previous is None else self.previous)[:, None]
        return (ids != before) & (ids != 0)

    @_once
    def padding(self) -> Bool[Tensor, "b t"] | None:
        """``(b t)`` True at padding; None when no segment ids are given."""
        return None if self.segment_ids is None else self.segment_ids == 0

    @_once
    def lengths(self) -> Int[Tensor, "b"]:
        """``(b)`` the tokens of each row that are not padding."""
        rows, length = self.shape
        if self.segment_ids is None:
            return torch.full((rows,), length, device=self.positions.device)
        return (self.segment_ids != 0).sum(dim=1)

    @_once
    def boundaries(self) -> list[list[tuple[int, int]]]:
        """For every row its ``(start, stop)`` segments, as Python integers (one device synchronisation, once). Whether
        the first of them goes on from carried state is for ``starts[:, 0]`` to say."""
        rows, length = self.shape
        if self.segment_ids is None or self.starts is None:
            return [[(0, length)] for _ in range(rows)]
        ends = self.lengths.tolist()
        cuts: list[list[int]] = [[0] for _ in range(rows)]
        for row, step in self.starts.nonzero().tolist():
            if step > 0:
                cuts[row].append(step)
        return [
            [(a, b) for a, b in zip(row_cuts, [*row_cuts[1:], end], strict=True) if b > a]
            for row_cuts, end in zip(cuts, ends, strict=True)
        ]

    def slice(self, start: int, stop: int) -> SequenceLayout:
        """The layout of positions ``start`` to ``stop``, to be run with the state that positions before them left."""
        if self.fragment is not None:
            raise ValueError("rows that several processes hold cannot be run in tiles")
        ids, previous = self.segment_ids, self.previous
        if ids is not None:
            previous = ids[:, start - 1] if start > 0 else previous
            ids = ids[:, start:stop]
        prefix = None if self.prefix is None else self.prefix[:, start:stop]
        return SequenceLayout(ids, self.positions[:, start:stop], previous, prefix=prefix)

    @_once
    def reversal(self) -> Int[Tensor, "b t"] | None:
        """``(b t)`` the index that reverses each row and leaves its padding at the end; None when a plain flip does."""
        if self.segment_ids is None:
            return None
        steps = torch.arange(self.shape[1], device=self.segment_ids.device)
        last = self.lengths[:, None] - 1
        return torch.where(steps <= last, last - steps, steps)

    def reverse(self, sequence: Tensor) -> Tensor:
        """Reverse ``sequence`` ``(b t ...)`` along t, padding kept at the end. Its own inverse."""
        if self.reversal is None:
            return sequence.flip(1)
        index = self.reversal.reshape(*self.reversal.shape, *([1] * (sequence.dim() - 2)))
        return sequence.gather(1, index.expand_as(sequence))

    @_once
    def reversed(self) -> SequenceLayout:
        """The layout of the reversed rows: the same segments from right to left, positions counted from their ends; on
        several axes, which have no end, the other way."""
        ids = None if self.segment_ids is None else self.reverse(self.segment_ids)
        if self.fragment is not None:  # nobody here knows where the segments of other fragments end
            turned = self.fragment.turn()
            return SequenceLayout(ids, -self.reverse(self.positions), self.fragment.following(), turned)
        if self.positions.dim() == 3:
            return SequenceLayout(ids, -self.reverse(self.positions))
        rows, length = self.shape
        return SequenceLayout.build(rows, length, ids, device=self.positions.device)
