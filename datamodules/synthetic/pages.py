"""Page: a row that is put together of pieces of text, some of which are answers to others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.synthetic.draw import Ints
from seqlong.datamodules.synthetic.generator import Rows
from seqlong.datamodules.synthetic.language import Haystack

Needle = TypeVar("Needle")


class Page:
    """One row, piece by piece. It has a token more than the row: the last one is only ever a target."""

    def __init__(self) -> None:
        self._pieces: list[Ints] = []
        self._size = 0
        self._answers: list[tuple[int, int, int]] = []  # where it stands, its tokens, where it was told

    def add(self, *pieces: Ints) -> int:
        """Append pieces; returns where the last of them begins."""
        start = self._size
        for piece in pieces:
            start = self._size
            self._pieces.append(piece)
            self._size += len(piece)
        return start

    def answer(self, piece: Ints, told: int) -> None:
        """Append an answer whose tokens were told from ``told`` on; -1 if they stand in no one place."""
        self._answers.append((self.add(piece), len(piece), told))

    @property
    def size(self) -> int:
        """Tokens so far."""
        return self._size

    def fill(self, rows: Rows, row: int) -> None:
        """Write the page into row ``row`` of ``rows``."""
        length = rows.tokens.shape[1]
        assert self._size == length + 1, f"a page of {self._size} tokens for a row of {length}"
        tokens = np.concatenate(self._pieces)
        rows.tokens[row] = tokens[:-1]
        for number, (start, count, told) in enumerate(self._answers):
            where = slice(start - 1, start - 1 + count)  # an answer is predicted one position early
            rows.targets[row, where] = tokens[start : start + count]
            rows.told[row, where] = -1 if told < 0 else np.arange(told, told + count)
            rows.answer[row, where] = number


def empty(rows: int, length: int, items: int) -> Rows:
    """Rows to be filled."""
    targets, told, answer = (np.full((rows, length), -1, dtype=np.int64) for _ in range(3))
    return Rows(np.zeros((rows, length), dtype=np.int64), targets, told, answer, items)


def strewn(
    page: Page, text: Haystack, start: int, hay: int, places: NDArray[np.float64], needles: Sequence[Needle]
) -> Iterator[Needle]:
    """Add ``hay`` tokens of ``text`` from ``start`` on to the page, and yield each needle when its place has come.

    Args:
        page: what is written; the caller adds the needles.
        text: the haystack.
        start: its first token that is used.
        hay: how many are.
        places: in [0, 1), one a needle; needles keep their order. They stand where a word begins.
        needles: anything.
    """
    before = 0
    for place, needle in zip(np.sort((places * (hay + 1)).astype(np.int64)).tolist(), needles, strict=True):
        stop = max(before, text.word(start, place))
        page.add(text.take(start + before, stop - before))
        before = stop
        yield needle
    page.add(text.take(start + before, hay - before))


def total(pieces: Sequence[Ints]) -> int:
    """Tokens of all pieces."""
    return sum(len(piece) for piece in pieces)
