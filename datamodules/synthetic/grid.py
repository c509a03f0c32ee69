"""Cell: rows of one length that hold one number of things, to train on or to be measured with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from seqlong.datamodules.sampler import EvaluationSampler, mix
from seqlong.datamodules.synthetic.generator import RecallTask
from seqlong.errors import ConfigError


@dataclass(frozen=True)
class Cell:
    """Rows that are alike.

    Attributes:
        length: positions in a row.
        items: pairs, needles, ... in a row; null leaves what the generator says.
        rows: how many: of evaluation, or, in a mixture of training, in proportion to the others.
    """

    length: int
    items: int | None = None
    rows: int = 1024

    def task(self, generator: RecallTask) -> RecallTask:
        """The generator with this cell's items."""
        return generator if self.items is None else generator.with_items(self.items)


@dataclass(frozen=True)
class Part:
    """Rows of one evaluation batch: the cell and the numbers of its rows, -1 where they ran out."""

    cell: int
    numbers: NDArray[np.int64]


def check_cells(cells: Sequence[Cell], name: str) -> None:
    """Raise ConfigError unless there are cells, and each has rows of some length."""
    if not cells:
        raise ConfigError(f"data.{name} is an empty list; expected at least one of {{length, items, rows}}, or null")
    for number, cell in enumerate(cells, 1):
        if cell.length < 1 or cell.rows < 1:
            raise ConfigError(
                f"data.{name}: number {number} has length {cell.length} and rows {cell.rows}; both must be 1 or more"
            )


def choose(cells: Sequence[Cell], batch: int, seed: int) -> Cell:
    """The cell of a training batch: a function of the seed and the batch's number, each in proportion to its rows."""
    ends = np.cumsum([cell.rows for cell in cells])
    place = float(mix(seed, _CHOICE, batch)[0] >> np.uint64(11)) * 2.0**-53
    return cells[int(np.searchsorted(ends, place * ends[-1], side="right"))]


class GridSampler(Sampler[Part]):
    """Cell after cell; every rank gets as many batches of as many rows.

    Args:
        cells: in order.
        positions: in a batch over all ranks, as far as whole rows allow.
        rank: this data-parallel rank.
        world: data-parallel ranks.
    """

    def __init__(self, cells: Sequence[Cell], positions: int, rank: int, world: int) -> None:
        sizes = [max(1, min(cell.rows, positions // cell.length)) for cell in cells]
        self._parts = [
            EvaluationSampler(cell.rows, -(-size // world) * world, rank, world)
            for cell, size in zip(cells, sizes, strict=True)
        ]

    def __iter__(self) -> Iterator[Part]:
        for cell, sampler in enumerate(self._parts):
            for numbers in sampler:
                yield Part(cell, numbers)

    def __len__(self) -> int:
        return sum(len(sampler) for sampler in self._parts)


_CHOICE = 7  # names the stream of choices among cells
