"""Packing: short sequences side by side in rows of one length, told apart by segment ids."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.sampler import Integers

#: Rows kept open for later items. More would fill rows a little better and take longer to search.
OPEN_ROWS = 1024


def pad_length(length: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is ``length`` or more."""
    return -(-length // multiple) * multiple


@dataclass(frozen=True)
class Packing:
    """Where each of ``i`` items lies in ``rows`` rows.

    Attributes:
        rows: number of rows.
        row: ``(i)`` int64 the row of each item.
        offset: ``(i)`` int64 its first position there. Items of a row stand side by side from position 0.
        first: ``(rows + 1)`` int64; the items of row r, from left to right, are ``order[first[r]:first[r + 1]]``.
        order: ``(i)`` int64 item numbers sorted by row and then by offset.
        used: ``(rows)`` int64 positions filled in each row.
    """

    rows: int
    row: NDArray[np.int64]
    offset: NDArray[np.int64]
    first: NDArray[np.int64]
    order: NDArray[np.int64]
    used: NDArray[np.int64]

    def items(self, row: int) -> NDArray[np.int64]:
        """Numbers of the items of ``row``, from left to right."""
        return self.order[self.first[row] : self.first[row + 1]]


def pack(lengths: Integers, capacity: int, open_rows: int = OPEN_ROWS) -> Packing:
    """Place items into rows of ``capacity`` positions: best fit, in the order given, deterministic.

    Each item goes where it leaves the least room among the ``open_rows`` rows that are still open, or opens a new
    one, which closes the fullest. O(i log open_rows).

    Args:
        lengths: ``(i)`` positions of each item, 1 or more.
        capacity: positions in a row.
        open_rows: rows to choose from; 1 keeps the items in order (next fit).

    Raises:
        ValueError: an item is empty or longer than a row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and (sizes.min() < 1 or sizes.max() > capacity):
        raise ValueError(f"lengths must lie in [1, {capacity}], found {sizes.min()} to {sizes.max()}")
    row = np.zeros(sizes.size, dtype=np.int64)
    rows = 0
    rooms: list[tuple[int, int]] = []  # (room left, row), sorted
    for item, size in enumerate(sizes.tolist()):
        place = bisect_left(rooms, (size, -1))
        if place < len(rooms):
            room, chosen = rooms.pop(place)
        else:
            room, chosen = capacity, rows
            rows += 1
            if len(rooms) >= open_rows:
                rooms.pop(0)
        row[item] = chosen
        if room > size:
            insort(rooms, (room - size, chosen))
    order = np.argsort(row, kind="stable").astype(np.int64)
    counts = np.bincount(row, minlength=rows) if sizes.size else np.zeros(rows, dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    before = np.concatenate([[0], np.cumsum(sizes[order])]).astype(np.int64)
    offset = np.empty_like(sizes)
    offset[order] = before[:-1] - before[first[row[order]]]
    used = np.diff(before[first])
    return Packing(rows, row, offset, first, order, used)


def segment_ids(
    row: Integers, offset: Integers, lengths: Integers, rows: int, width: int, multiple: int = 1
) -> NDArray[np.int32]:
    """The ``(rows, width)`` int32 segment ids of items lying in rows: 1, 2, ... from the left, 0 for padding.

    Args:
        row: ``(i)`` row of each item, sorted by row and offset.
        offset: ``(i)`` first position of each item; items stand side by side from 0.
        lengths: ``(i)`` positions of each item, 1 or more.
        rows: number of rows.
        width: positions in a row.
        multiple: width is padded up to a multiple of this.
    """
    width = pad_length(width, multiple)
    rows_of, starts, sizes = (np.asarray(values, dtype=np.int64) for values in (row, offset, lengths))
    ids = np.zeros((rows, width + 1), dtype=np.int32)  # one spare column takes the end of a full row
    np.add.at(ids, (rows_of, starts), 1)
    np.cumsum(ids, axis=1, out=ids)
    filled = np.zeros(rows, dtype=np.int64)
    np.maximum.at(filled, rows_of, starts + sizes)
    ids[np.arange(width + 1) >= filled[:, None]] = 0
    return np.ascontiguousarray(ids[:, :width])
