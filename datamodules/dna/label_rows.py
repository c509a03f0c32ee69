"""Labelled records to rows: one a row with those of like length together, or several packed side by side."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from seqlong.batch import SequenceBatch
from seqlong.datamodules.dna.alphabet import PAD, encode
from seqlong.datamodules.dna.records import Records
from seqlong.datamodules.dna.tokens import DnaTokenizer
from seqlong.datamodules.packing import pack
from seqlong.datamodules.sampler import BatchRequest, below, permute
from seqlong.errors import ConfigError
from seqlong.labels import LabelledBatch

Long = Literal["error", "crop"]
Labels = NDArray[np.int64] | NDArray[np.float32]

#: Batches whose rows are sorted by length together, so that little is padded and the order stays random enough.
_TOGETHER = 32
_CROP = 1 << 42  # names the draw of a part


def check_lengths(records: Records, length: int, long: Long) -> None:
    """Raise DataError, naming the first, where a record is longer than a row and nobody said to cut it."""
    found = np.flatnonzero(records.lengths > length)
    if found.size and long == "error":
        first = int(found[0])
        raise records.located(
            first,
            f"a sequence of {int(records.lengths[first]):,} bases, and {found.size - 1:,} more are longer than "
            f"data.length={length:,}; make it {int(records.lengths.max()):,}, or set data.long=crop",
        )


def check_tokens(records: Records, length: int, long: Long, tokenizer: DnaTokenizer) -> None:
    """Raise DataError, naming the first, where a record holds no token; ConfigError where parts break the frame."""
    short = np.flatnonzero(records.lengths < (tokenizer.span or 1))
    if short.size:
        first = int(short[0])
        raise records.located(
            first,
            f"a sequence of {int(records.lengths[first])} bases, and {short.size - 1:,} more are shorter than one word "
            f"of data.tokenizer ({tokenizer.name}); lower k, or leave them out",
        )
    if long == "crop" and length % tokenizer.frame:
        raise ConfigError(
            f"data.length={length} is no whole number of codons, so parts would lose the frame; try "
            f"data.length={length // tokenizer.frame * tokenizer.frame}"
        )


def collate(
    records: Records,
    labels: Labels,
    rows: list[list[tuple[int, int, int]]],
    numbers: NDArray[np.int64],
    seen: NDArray[np.bool_] | None = None,
    tokenizer: DnaTokenizer | None = None,
) -> LabelledBatch:
    """Rows of ``(record, start, end)`` pieces, in bases, to a batch; a row without pieces counts for nothing."""
    code = encode if tokenizer is None else tokenizer.tokens
    read = [[code(records.bases[start:end]) for _, start, end in row] for row in rows]
    width = max(1, *(sum(ids.size for ids in row) for row in read))
    tokens = np.full((len(rows), width), PAD if tokenizer is None else tokenizer.pad, dtype=np.int64)
    ids = np.zeros((len(rows), width), dtype=np.int32)
    places, which = [], []
    for row, pieces in enumerate(rows):
        at = 0
        for number, ((record, _, _), found) in enumerate(zip(pieces, read[row], strict=True), 1):
            size = found.size
            tokens[row, at : at + size] = found
            ids[row, at : at + size] = number
            places.append((row * width + at, row * width + at + size - 1))
            which.append(record)
            at += size
    single = bool((ids == 1).all())
    ends = np.array(places, dtype=np.int64).reshape(-1, 2)
    chosen = np.array(which, dtype=np.int64)
    return LabelledBatch(
        tokens=torch.from_numpy(tokens),
        segment_ids=None if single else torch.from_numpy(ids),
        index=torch.from_numpy(numbers.astype(np.int64)),
        source=[", ".join(records.where(record) for record, _, _ in pieces[:3]) for pieces in rows],
        starts=torch.from_numpy(ends[:, 0].copy()),
        ends=torch.from_numpy(ends[:, 1].copy()),
        labels=torch.from_numpy(np.ascontiguousarray(labels[chosen])),
        seen=None if seen is None else torch.from_numpy(seen[chosen]),
        records=torch.from_numpy(chosen),
    )


def side_by_side(records: Records, length: int, step: int | None = None) -> list[tuple[int, int, int]]:
    """``(record, start, end)`` of the parts of records that are longer than ``length``, and of the others whole.

    Parts begin every ``step`` bases, or where the one before ends. What is left at the end of a record counts as a part
    if it is half as long as one.
    """
    pieces: list[tuple[int, int, int]] = []
    for record, (start, end) in enumerate(zip(records.starts.tolist(), records.ends.tolist(), strict=True)):
        if end - start <= length:
            pieces.append((record, start, end))
            continue
        for begin in range(start, end, step or length):
            stop = min(begin + length, end)
            if 2 * (stop - begin) >= length and (stop - begin == length or step in (None, length)):
                pieces.append((record, begin, stop))
    return pieces


def parts_of(records: Records, length: int, least: int = 0) -> tuple[Records, NDArray[np.int64]]:
    """The parts of ``side_by_side`` as records that share the bases, and the record that each is of; they overlap (by
    seven eighths at most) where there would be fewer than ``least``."""
    step = length
    while (pieces := side_by_side(records, length, step)) and len(pieces) < least and step > length // 8:
        step = max(step // 2, length // 8, 1)
    found = np.array(pieces, dtype=np.int64).reshape(-1, 3)
    parts = records.take(found[:, 0])
    parts.starts, parts.ends = found[:, 1].copy(), found[:, 2].copy()
    return parts, found[:, 0]


class TrainingRows(Dataset[SequenceBatch]):
    """The rows of any batch of training, a pure function of its number.

    An epoch visits every record once (records longer than ``length`` as often as they have parts), in an order of its
    own.

    Args:
        records: those of training.
        labels: ``(n y)``.
        length: longest row.
        long: see ``LabelledData``.
        packed: several records to a row.
        seed: names the order.
        batch_size: rows in a batch over all ranks.
        tokenizer: what reads the bases; None: a token a base.
    """

    def __init__(
        self,
        records: Records,
        labels: Labels,
        length: int,
        long: Long,
        packed: bool,
        seed: int,
        batch_size: int,
        tokenizer: DnaTokenizer | None = None,
    ) -> None:
        self.tokenizer, self.frame = tokenizer, tokenizer.frame if tokenizer else 1
        self.records, self.labels, self.length, self.seed = records, labels, length, seed
        lengths = np.minimum(records.lengths, length)
        times = np.maximum(1, records.lengths // length) if long == "crop" else np.ones(len(records), dtype=np.int64)
        self.items = np.repeat(np.arange(len(records)), times)
        self.sizes = lengths[self.items]
        self.packing = None
        if packed:  # once: records are independent of their neighbours in a row, so only the order of rows need change
            shuffled = permute(np.arange(self.items.size), self.items.size, seed)
            self.items, self.sizes = self.items[shuffled], self.sizes[shuffled]
            self.packing = pack(self.sizes, length)
        self.size = self.items.size if self.packing is None else self.packing.rows
        self.together = batch_size * _TOGETHER
        self.varied = self.packing is None and bool(self.sizes.min() < self.sizes.max())
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, dtype=np.int64))

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The rows of an epoch. Where lengths vary, a batch is of rows of like length."""
        if self._order[0] != epoch:
            order = permute(np.arange(self.size), self.size, self.seed, 1 + epoch)
            if self.varied:
                batch = self.together // _TOGETHER
                pieces = []
                for number, start in enumerate(range(0, self.size, self.together)):
                    part = order[start : start + self.together]
                    part = part[np.argsort(self.sizes[part], kind="stable")]
                    whole = part.size // batch
                    turns = permute(np.arange(whole), max(1, whole), self.seed, epoch, number).tolist()
                    pieces += [part[turn * batch : (turn + 1) * batch] for turn in turns] + [part[whole * batch :]]
                order = np.concatenate(pieces)
            self._order = (epoch, order)
        return self._order[1]

    def __getitem__(self, request: BatchRequest) -> SequenceBatch:
        rows = []
        for sample in request.samples.tolist():
            epoch, place = divmod(sample, self.size)
            row = int(self.order(epoch)[place])
            items = [row] if self.packing is None else self.packing.items(row).tolist()
            rows.append([self._piece(item, sample) for item in items])
        return collate(self.records, self.labels, rows, request.samples, None, self.tokenizer)

    def _piece(self, item: int, sample: int) -> tuple[int, int, int]:
        record, size = int(self.items[item]), int(self.sizes[item])
        start, end = int(self.records.starts[record]), int(self.records.ends[record])
        room = end - start - size
        if room:
            start += int(below(room // self.frame + 1, self.seed, _CROP, sample, item)[0]) * self.frame
        return record, start, start + size


class EvaluationRows(Dataset[SequenceBatch]):
    """The rows that evaluate a split: every record once, or every part of one, those of like length together."""

    def __init__(
        self,
        records: Records,
        labels: Labels,
        seen: NDArray[np.bool_] | None,
        length: int,
        long: Long,
        packed: bool,
        tokenizer: DnaTokenizer | None = None,
    ) -> None:
        self.records, self.labels, self.seen, self.tokenizer = records, labels, seen, tokenizer
        longest = length if long == "crop" else int(records.lengths.max(initial=length))
        pieces = side_by_side(records, longest)
        sizes = np.array([end - start for _, start, end in pieces], dtype=np.int64)
        self.pieces = [pieces[number] for number in np.argsort(sizes, kind="stable").tolist()]
        self.packing = pack(np.sort(sizes), length, 1) if packed else None
        self.size = len(self.pieces) if self.packing is None else self.packing.rows

    def __getitem__(self, numbers: NDArray[np.int64]) -> SequenceBatch:
        rows: list[list[tuple[int, int, int]]] = []
        for number in numbers.tolist():
            if number < 0:
                rows.append([])
            elif self.packing is None:
                rows.append([self.pieces[number]])
            else:
                rows.append([self.pieces[item] for item in self.packing.items(number).tolist()])
        return collate(self.records, self.labels, rows, numbers, self.seen, self.tokenizer)
