"""Windows: which pieces of the regions of a split fill which row, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.dna.genome import Genome
from seqlong.datamodules.dna.splits import Region
from seqlong.datamodules.packing import Packing, pack
from seqlong.datamodules.sampler import BatchRequest, below, coin, permute
from seqlong.errors import DataError

ShortRecords = Literal["pack", "pad", "skip", "error"]
Order = Literal["shuffle", "stream"]

# Streams of random numbers: each kind of decision hashes its own number beside the counters.
_SHIFT, _PERMUTATION, _STRAND, _ROTATION, _PACKING, _EVALUATION = range(6)


class Piece(NamedTuple):
    """A stretch of a contig, and where in a row it lies.

    Attributes:
        row: row of the batch.
        offset: its first position there.
        contig: contig number.
        start: first base; on a circular contig the stretch may pass the junction.
        length: bases.
        reverse: True to read the other strand.
        before: bases before ``start`` that belong to the same region (round a ring, all of it).
        after: bases after the last that do.
    """

    row: int
    offset: int
    contig: int
    start: int
    length: int
    reverse: bool
    before: int
    after: int


@dataclass(frozen=True)
class Rows:
    """Rows to assemble.

    Attributes:
        pieces: their pieces, by row and offset.
        count: number of rows.
        continues: ``(count)`` True where a row follows on from the same row of the batch before; None for nowhere.
    """

    pieces: list[Piece]
    count: int
    continues: NDArray[np.bool_] | None = None


class ShortRegions(NamedTuple):
    """Regions shorter than a window, and what becomes of them."""

    policy: ShortRecords
    regions: int
    bases: int
    names: list[str]

    def note(self, split: str, length: int, shown: int = 10) -> str:
        """A sentence for the run's record, with the names of the first ``shown``."""
        does = {"pack": "packed several to a row", "pad": "padded, one to a row", "skip": "SKIPPED", "error": "refused"}
        more = f" and {self.regions - shown:,} more" if self.regions > shown else ""
        verb, plural = ("is", "region") if self.regions == 1 else ("are", "regions")
        return (
            f"{split}: {self.regions:,} {plural} ({self.bases:,} bases) shorter than {length:,} {verb} "
            f"{does[self.policy]}: {', '.join(self.names[:shown])}{more}"
        )


def sort_short(
    genome: Genome, regions: Sequence[Region], length: int, policy: ShortRecords, split: str
) -> tuple[list[Region], list[Region], ShortRegions]:
    """Divide regions into those that hold a window and those that do not, as ``policy`` allows.

    Raises:
        DataError: nothing is left to make a row of, or ``policy`` is "error" and a region is short.
    """
    long = [region for region in regions if region.length >= length]
    short = [region for region in regions if region.length < length]
    names = [f"{genome.contigs[contig].name}:{start}-{stop}" for contig, start, stop in short]
    found = ShortRegions(policy, len(short), sum(region.length for region in short), names)
    if not regions:
        raise DataError(f"{split}: the split has no regions; give it some, or do not ask for it")
    if short and (policy == "error" or (policy == "skip" and not long)):
        longest = max(regions, key=lambda region: region.length)
        what = "no region holds" if not long else f"{len(short):,} of {len(regions):,} regions do not hold"
        raise DataError(
            f"{split}: {what} a window of {length:,} bases (short_records is {policy}); the longest is "
            f"{genome.contigs[longest.contig].name}:{longest.start}-{longest.stop} with {longest.length:,}, the first "
            f"that is too short {names[0]}; lower the length, or set short_records to pack or pad"
        )
    return long, [] if policy == "skip" else short, found


def pack_regions(
    regions: Sequence[Region], length: int, policy: ShortRecords, seed: int
) -> tuple[list[Region], Packing]:
    """Lay short regions into rows of ``length``: packed in a seeded order, or one to a row if ``policy`` is "pad"."""
    order = permute(np.arange(len(regions)), len(regions), seed, _PACKING).tolist() if regions else []
    mixed = [regions[number] for number in order]
    sizes = [region.length if policy != "pad" else length for region in mixed]
    return mixed, pack(sizes, length)


def is_ring(genome: Genome, region: Region) -> bool:
    """True for a region that is the whole of a circular contig, so that it has no ends."""
    contig = genome.contigs[region.contig]
    return contig.circular and region.length == contig.length


class TrainingWindows:
    """The endless windows of one training stage: a pure function of the request.

    In each epoch every region is tiled with windows that follow one another, from a first base that differs from
    epoch to epoch. The tiling leaves out up to one and a half windows of a region, elsewhere in each epoch. Rows of
    short regions are the same in each epoch. Windows and short rows together are permuted.

    Args:
        genome: where the bases are.
        regions: of the training split.
        length: bases in a window.
        policy: what to do with regions shorter than that.
        order: "shuffle" permutes; "stream" lets each row of a batch walk along the genome.
        reverse_complement: probability of reading the other strand.
        seed: names all that is random.
        stage: index of the stage, so that stages differ.
        frame: windows are shifted by multiples of so many bases.

    Attributes:
        size: windows in an epoch.
        short: what became of short regions.
    """

    def __init__(
        self,
        genome: Genome,
        regions: Sequence[Region],
        length: int,
        policy: ShortRecords,
        order: Order,
        reverse_complement: float,
        seed: int,
        stage: int,
        frame: int = 1,
    ) -> None:
        long, short, self.short = sort_short(genome, regions, length, policy, "train")
        self.length, self.order, self.reverse_complement = length, order, reverse_complement
        self.seed, self.stage = seed, stage
        self._ring = np.array([is_ring(genome, region) for region in long], dtype=bool)
        self._contig = np.array([region.contig for region in long], dtype=np.int64)
        self._start = np.array([region.start for region in long], dtype=np.int64)
        self._span = np.array([region.length for region in long], dtype=np.int64)
        counts = self._span // length
        slack = self._span - counts * length
        # A region that a whole number of windows fills exactly would be cut at the same places for ever; with four
        # windows or more one of them is given up for room to shift. A ring can be cut anywhere.
        tight = (counts >= 4) & (slack < length // 2) & ~self._ring
        counts = counts - tight
        room = np.where(self._ring, self._span, self._span - counts * length + 1)
        self._room, self._frame = (room - 1) // frame + 1, frame
        self._last = np.cumsum(counts)
        self._counts = counts
        self._short_regions, self._packing = pack_regions(short, length, policy, seed)
        self.tiled = int(counts.sum())
        self.size = self.tiled + self._packing.rows

    def rows(self, request: BatchRequest) -> Rows:
        """The pieces that fill the rows of ``request``."""
        numbers = request.samples - request.first
        if self.order == "stream":
            return self._stream(numbers, request.rows)
        epoch, place = numbers // self.size, numbers % self.size
        window = np.empty_like(place)
        for one in np.unique(epoch).tolist():
            here = epoch == one
            window[here] = permute(place[here], self.size, self.seed, _PERMUTATION, self.stage, one)
        reverse = coin(self.reverse_complement, self.seed, _STRAND, request.samples)
        return Rows(self._pieces(window, epoch, reverse), len(numbers))

    def _stream(self, numbers: NDArray[np.int64], width: int) -> Rows:
        """Row r of every batch walks along its own share of the epoch's windows, on one strand, from where it was."""
        share = self.size // width
        if share < 1:
            raise DataError(
                f"train: order stream needs a window of {self.length:,} bases for each of {width} rows, but an epoch "
                f"has {self.size}; lower batch_size or length"
            )
        row, step = numbers % width, numbers // width
        epoch, step = step // share, step % share
        # Which windows are left over where they do not divide among the rows differs from epoch to epoch.
        turn = below(self.size, self.seed, _ROTATION, self.stage, epoch)
        reverse = coin(self.reverse_complement, self.seed, _STRAND, self.stage, epoch, row)
        along = np.where(reverse, share - 1 - step, step)
        window = (row * share + along + turn) % self.size
        previous = window + np.where(reverse, 1, -1)
        tiled = (previous >= 0) & (np.maximum(window, previous) < self.tiled)
        continues = (step > 0) & tiled & (self._region(window) == self._region(previous))
        return Rows(self._pieces(window, epoch, reverse), len(numbers), continues)

    def _region(self, window: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._last, window, side="right")

    def _pieces(self, window: NDArray[np.int64], epoch: NDArray[np.int64], reverse: NDArray[np.bool_]) -> list[Piece]:
        pieces: list[Piece] = []
        region = self._region(window)
        known = np.minimum(region, len(self._room) - 1)  # rows of short regions have none, and need no shift
        shift = below(self._room[known], self.seed, _SHIFT, self.stage, epoch, known) if len(self._room) else known
        for row in range(len(window)):
            back = bool(reverse[row])
            if window[row] >= self.tiled:
                pieces += place_packed(self._short_regions, self._packing, int(window[row]) - self.tiled, row, back)
                continue
            number = int(region[row])
            ring, low, span = bool(self._ring[number]), int(self._start[number]), int(self._span[number])
            nth = int(window[row]) - int(self._last[number] - self._counts[number])
            begin = int(shift[row]) * self._frame + nth * self.length
            before, after = (span, span) if ring else (begin, span - begin - self.length)
            pieces.append(Piece(row, 0, int(self._contig[number]), low + begin, self.length, back, before, after))
        return pieces


def place_packed(regions: Sequence[Region], packing: Packing, packed_row: int, row: int, reverse: bool) -> list[Piece]:
    """The pieces of one packed row: whole regions, side by side, each on its own."""
    return [
        Piece(
            row,
            int(packing.offset[item]),
            regions[item].contig,
            regions[item].start,
            regions[item].length,
            reverse,
            0,
            0,
        )
        for item in packing.items(packed_row).tolist()
    ]


class EvaluationWindows:
    """Every base of a split's regions once, in rows of a fixed order.

    Whole windows come first, shuffled by a fixed permutation so that the first hundred are a fair sample of the split
    (``shuffle`` false keeps genome order); then the ends of regions and the short regions, packed or padded.

    Args:
        genome: where the bases are.
        regions: to evaluate.
        length: bases in a window.
        policy: what to do with regions shorter than that.
        split: its name, for messages.
        shuffle: whether to permute whole windows.

    Attributes:
        size: rows.
        short: what became of short regions.
    """

    def __init__(
        self,
        genome: Genome,
        regions: Sequence[Region],
        length: int,
        policy: ShortRecords,
        split: str,
        shuffle: bool = True,
    ) -> None:
        long, short, self.short = sort_short(genome, regions, length, policy, split)
        self.length = length
        self._rings = {region.contig: region.length for region in regions if is_ring(genome, region)}
        counts = np.array([region.length // length for region in long], dtype=np.int64)
        whole = int(counts.sum())
        self._owner = np.repeat(np.arange(len(long)), counts)
        self._nth = np.arange(whole) - np.repeat(np.cumsum(counts) - counts, counts)
        if shuffle and whole:
            order = permute(np.arange(whole), whole, _EVALUATION)
            self._owner, self._nth = self._owner[order], self._nth[order]
        self._long = long
        tails = [
            Region(region.contig, region.start + count * length, region.stop)
            for region, count in zip(long, counts.tolist(), strict=True)
            if region.start + count * length < region.stop
        ]
        self._rest, self._packing = pack_regions([*tails, *short], length, policy, _EVALUATION)
        self.size = whole + self._packing.rows

    def rows(self, numbers: NDArray[np.int64]) -> Rows:
        """The pieces of the rows called ``numbers``; -1 repeats row 0, for the caller to silence."""
        pieces: list[Piece] = []
        whole = len(self._owner)
        for row, number in enumerate(np.maximum(numbers, 0).tolist()):
            if number >= whole:
                pieces += [
                    piece._replace(after=self._rings.get(piece.contig, 0))
                    for piece in place_packed(self._rest, self._packing, number - whole, row, False)
                ]
                continue
            region = self._long[int(self._owner[number])]
            start = region.start + int(self._nth[number]) * self.length
            before, after = start - region.start, region.stop - start - self.length
            if region.contig in self._rings:
                before = after = region.length
            pieces.append(Piece(row, 0, region.contig, start, self.length, False, before, after))
        return Rows(pieces, len(numbers))
