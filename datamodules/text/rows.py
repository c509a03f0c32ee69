"""Rows: which stretches of which documents fill which row, in training and in evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.packing import pack
from seqlong.datamodules.sampler import below, permute

Documents = Literal["cut", "fit", "single"]
Order = Literal["shuffle", "stream"]

# Streams of random numbers: each kind of decision hashes its own number beside the counters.
_DOCUMENTS, _PHASE, _PERMUTATION, _PACKING = range(4)
_KEPT = 2  # epochs whose order is remembered
_TABLE = 1 << 22  # windows, up to which the order of an epoch is kept as a table


@dataclass(frozen=True)
class Spans:
    """Stretches of documents that belong to one split.

    Attributes:
        document: ``(n)`` int64 number of each stretch's document.
        start: ``(n)`` int64 first position.
        stop: ``(n)`` int64 position after the last.
    """

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``(n)`` positions of each."""
        return self.stop - self.start

    def __len__(self) -> int:
        return len(self.document)


class Piece(NamedTuple):
    """A stretch of a document, and where in a row it lies.

    Attributes:
        row: row of the batch.
        offset: its first position there.
        document: document number.
        start: first position in the document.
        length: positions.
        more: True if the position after the last belongs to the same split, and may be predicted.
    """

    row: int
    offset: int
    document: int
    start: int
    length: int
    more: bool


class Layout(ABC):
    """Windows of an epoch: every position of every span in exactly one of them.

    Attributes:
        count: windows in an epoch; the same for all.
    """

    count: int

    def __init__(self) -> None:
        self._shuffles: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def shuffled(self, epoch: int, place: int, *key: int) -> int:
        """The window at a place of an epoch's order."""
        if self.count > _TABLE:
            return int(permute(place, self.count, *key, _PERMUTATION, epoch)[0])
        if epoch not in self._shuffles:  # a table is a hundred times as fast
            self._shuffles[epoch] = permute(np.arange(self.count), self.count, *key, _PERMUTATION, epoch)
            while len(self._shuffles) > _KEPT:
                self._shuffles.popitem(last=False)
        return int(self._shuffles[epoch][place])

    @abstractmethod
    def pieces(self, epoch: int, window: int, row: int) -> list[Piece]:
        """What fills a window of an epoch, as row ``row`` of a batch."""

    def follows(self, epoch: int, window: int) -> bool:
        """Whether a window goes on in the document that the window before ended with."""
        return False


class CutLayout(Layout):
    """All documents one after the other, in an order that differs from epoch to epoch, cut every ``length`` positions.

    No padding but in the last window. A document may begin in one window and end in a later one.
    """

    def __init__(self, spans: Spans, length: int, *key: int) -> None:
        super().__init__()
        self.spans, self.length, self._key = spans, length, key
        self._sizes = spans.lengths
        self.total = int(self._sizes.sum())
        self.count = -(-self.total // length)
        self._orders: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64], int]] = OrderedDict()

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Spans in the order of an epoch, where each ends, and the position at which the first window starts."""
        if epoch not in self._orders:
            order = permute(np.arange(len(self.spans)), len(self.spans), *self._key, _DOCUMENTS, epoch)
            # A single book would be cut at the same places for ever, so the first window starts anywhere in it.
            phase = int(below(self.total, *self._key, _PHASE, epoch)[0])
            self._orders[epoch] = (order, np.cumsum(self._sizes[order]), phase)
            while len(self._orders) > _KEPT:
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def pieces(self, epoch: int, window: int, row: int) -> list[Piece]:
        order, ends, phase = self._order(epoch)
        found: list[Piece] = []
        offset = 0
        wanted = min(self.length, self.total - window * self.length)
        place = (phase + window * self.length) % self.total
        at = int(np.searchsorted(ends, place, side="right"))
        while offset < wanted:
            span = int(order[at])
            stop = int(self.spans.stop[span])
            start = stop - (int(ends[at]) - place)
            size = min(stop - start, wanted - offset)
            found.append(Piece(row, offset, int(self.spans.document[span]), start, size, start + size < stop))
            offset += size
            place += size
            at += 1
            if at == len(order):
                at = place = 0
        return found

    def follows(self, epoch: int, window: int) -> bool:
        order, ends, phase = self._order(epoch)
        place = (phase + window * self.length) % self.total
        at = int(np.searchsorted(ends, place, side="right"))
        return place > int(ends[at]) - int(self._sizes[order[at]])


class SingleLayout(Layout):
    """One document in a row: long ones in several windows, cut elsewhere in each epoch; short ones padded."""

    def __init__(self, spans: Spans, length: int, *key: int) -> None:
        super().__init__()
        self.spans, self.length, self._key = spans, length, key
        self._counts = -(-spans.lengths // length)
        # The first window of a document may be shorter by as much as its last is, and the number stays the same.
        self._slack = self._counts * length - spans.lengths
        self.count = int(self._counts.sum())
        self._orders: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        if epoch not in self._orders:
            numbers = np.arange(len(self.spans))
            order = permute(numbers, len(self.spans), *self._key, _DOCUMENTS, epoch)
            phase = below(self._slack + 1, *self._key, _PHASE, epoch, numbers)
            phase[self._counts == 1] = 0
            self._orders[epoch] = (order, np.cumsum(self._counts[order]), phase)
            while len(self._orders) > _KEPT:
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def _find(self, epoch: int, window: int) -> tuple[int, int, int]:
        order, ends, phase = self._order(epoch)
        at = int(np.searchsorted(ends, window, side="right"))
        span = int(order[at])
        return span, window - int(ends[at] - self._counts[span]), int(phase[span])

    def pieces(self, epoch: int, window: int, row: int) -> list[Piece]:
        span, nth, phase = self._find(epoch, window)
        first, stop = int(self.spans.start[span]), int(self.spans.stop[span])
        low = max(first + nth * self.length - phase, first)
        high = min(first + (nth + 1) * self.length - phase, stop)
        return [Piece(row, 0, int(self.spans.document[span]), low, high - low, high < stop)]

    def follows(self, epoch: int, window: int) -> bool:
        return self._find(epoch, window)[1] > 0


class FitLayout(Layout):
    """Whole windows of long documents, and what is left of them and short documents side by side, by best fit.

    No document that fits into a row is divided. Rows are the same in each epoch.
    """

    def __init__(self, spans: Spans, length: int, *key: int) -> None:
        super().__init__()
        sizes = spans.lengths
        self.spans, self.length = spans, length
        counts = sizes // length
        self._owner = np.repeat(np.arange(len(spans)), counts)
        self._nth = np.arange(len(self._owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        rest = np.flatnonzero(sizes % length)
        mixed = permute(np.arange(len(rest)), len(rest), *key, _PACKING) if len(rest) else np.arange(0)
        self._rest = rest[mixed]
        self._from = spans.start[self._rest] + counts[self._rest] * length
        self._packing = pack(spans.stop[self._rest] - self._from, length)
        self.count = len(self._owner) + self._packing.rows

    def pieces(self, epoch: int, window: int, row: int) -> list[Piece]:
        whole = len(self._owner)
        if window < whole:
            span = int(self._owner[window])
            start = int(self.spans.start[span]) + int(self._nth[window]) * self.length
            more = start + self.length < int(self.spans.stop[span])
            return [Piece(row, 0, int(self.spans.document[span]), start, self.length, more)]
        found = []
        for item in self._packing.items(window - whole).tolist():
            span = int(self._rest[item])
            start, stop = int(self._from[item]), int(self.spans.stop[span])
            offset = int(self._packing.offset[item])
            found.append(Piece(row, offset, int(self.spans.document[span]), start, stop - start, False))
        return found


LAYOUTS: dict[Documents, type[CutLayout] | type[SingleLayout] | type[FitLayout]] = {
    "cut": CutLayout,
    "single": SingleLayout,
    "fit": FitLayout,
}


@dataclass(frozen=True)
class Rows:
    """Rows to assemble.

    Attributes:
        pieces: their pieces, by row and offset. A row without any counts for nothing.
        count: number of rows.
        continues: ``(count)`` True where a row follows on from the same row of the batch before; None for nowhere.
    """

    pieces: list[Piece]
    count: int
    continues: NDArray[np.bool_] | None = None


def shuffled(layout: Layout, numbers: NDArray[np.int64], places: Sequence[int], *key: int) -> list[Piece]:
    """Windows ``numbers`` of the endless training order, each epoch permuted, as rows ``places`` of a batch."""
    found: list[Piece] = []
    for row, number in zip(places, numbers.tolist(), strict=True):
        epoch, within = divmod(number, layout.count)
        found += layout.pieces(epoch, layout.shuffled(epoch, within, *key), row)
    return found


def streamed(layout: Layout, step: int, lane: int, lanes: int, row: int) -> tuple[list[Piece], bool]:
    """One step of one of ``lanes`` rows that walk through an epoch's windows side by side, and whether it follows on.

    Where the windows do not divide among the lanes, the last lane has nothing to do at the end of an epoch.
    """
    share = -(-layout.count // lanes)
    epoch, step = divmod(step, share)
    window = lane * share + step
    if window >= layout.count:
        return [], False
    return layout.pieces(epoch, window, row), step > 0 and layout.follows(epoch, window)


class EvaluationRows:
    """Every position of some spans once, in the order of the documents.

    Args:
        spans: what to evaluate.
        length: positions in a row.
        single: one document in a row, padded; otherwise short ones and ends share rows.

    Attributes:
        size: rows.
    """

    def __init__(self, spans: Spans, length: int, single: bool) -> None:
        self._layout: Layout = _Plain(spans, length) if single else FitLayout(spans, length)
        self.size = self._layout.count

    def pieces(self, numbers: NDArray[np.int64], places: NDArray[np.int64]) -> list[Piece]:
        """The pieces of the rows called ``numbers``, as rows ``places`` of a batch."""
        found: list[Piece] = []
        for number, row in zip(numbers.tolist(), places.tolist(), strict=True):
            found += self._layout.pieces(0, number, row)
        return found


class _Plain(SingleLayout):
    """Documents in their order, cut from their beginning."""

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        if epoch not in self._orders:
            numbers = np.arange(len(self.spans))
            self._orders[epoch] = (numbers, np.cumsum(self._counts), np.zeros_like(numbers))
        return self._orders[epoch]
