"""Signals of several files laid on a genome: checked against it, binned, squashed, turned with the strand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.dna.contig_names import find_contig
from seqlong.datamodules.dna.genome import Genome
from seqlong.datamodules.dna.splits import Region
from seqlong.datamodules.dna.tracks_files import Signal, open_signals
from seqlong.errors import ConfigError, DataError, nearest

Summary = Literal["mean", "sum", "max"]
Missing = Literal["mask", "zero"]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class Squash:
    """What becomes of large values, and how to get them back.

    ``y = x ** power``, and above ``clip``: ``y = clip - 1 + √(y - clip + 1)``, as Borzoi does with 3/4 and 384
    (Linder et al. 2025, doi 10.1038/s41588-024-02053-6).

    Attributes:
        power: above 0, up to 1.
        clip: in units of y; None for none.

    Raises:
        ConfigError: a setting is out of its range.
    """

    power: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.power <= 1:
            raise ConfigError(f"data.power is {self.power}; expected above 0 and up to 1")
        if self.clip is not None and self.clip <= 0:
            raise ConfigError(f"data.clip is {self.clip}; expected above 0, or null")

    def forward(self, values: Values) -> Values:
        """Of bins; NaN stays NaN, and what is below 0 as it is."""
        found = values if self.power == 1 else np.where(values > 0, np.abs(values) ** np.float32(self.power), values)
        if self.clip is not None:
            high = found > self.clip
            found = np.where(high, self.clip - 1 + np.sqrt(np.where(high, found - self.clip + 1, 0)), found)
        return found.astype(np.float32)

    def back(self, values: Values) -> Values:
        """The inverse."""
        found = values
        if self.clip is not None:
            high = found > self.clip
            found = np.where(high, self.clip - 1 + np.where(high, found - self.clip + 1, 0) ** 2, found)
        if self.power != 1:
            found = np.where(found > 0, np.abs(found) ** np.float32(1 / self.power), found)
        return found.astype(np.float32)


def binned(values: Values, size: int, summary: Summary) -> Values:
    """``(k t)`` -> ``(k n)``: what ``summary`` makes of the values that a bin has; NaN where it has none."""
    if size == 1:
        return values
    parts = values.reshape(len(values), -1, size)
    known = ~np.isnan(parts)
    count = known.sum(axis=2)
    if summary == "max":
        found = np.where(known, parts, -np.inf).max(axis=2)
    else:
        found = np.where(known, parts, 0).sum(axis=2, dtype=np.float64)
        if summary == "mean":
            found = found / np.maximum(count, 1)
    return np.where(count > 0, found, np.nan).astype(np.float32)


@dataclass
class Tracks:
    """k signals on the contigs of a genome.

    Args:
        genome: what they lie on.
        files: paths, or names -> paths.
        size: bases of a bin.
        summary: of the values of a bin.
        missing: whether a base without a value has none, or 0.
        squash: of large values.
        pairs: names of tracks that are the same signal on the two strands.
        renamed: contigs of the files -> those of the genome.

    Attributes:
        names: of the tracks.
        contigs: numbers of the contigs that every track has.
        notes: what a reader should know of contigs and names.

    Raises:
        DataError: a file cannot be read, or was made on another assembly.
        ConfigError: a pair that is none.
    """

    genome: Genome
    files: Sequence[str] | Mapping[str, str]
    size: int = 1
    summary: Summary = "mean"
    missing: Missing = "mask"
    squash: Squash = Squash()
    pairs: Sequence[Sequence[str]] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        self.signals: list[Signal] = []
        listed = self.files.items() if isinstance(self.files, Mapping) else [(None, path) for path in self.files]
        for name, path in listed:
            self.signals += open_signals(path, name)
        self.names = [signal.name for signal in self.signals]
        if not self.signals:
            raise DataError("data.tracks names no file; expected bigWig, bedGraph, wig or tables of positions")
        for name in self.names:
            if self.names.count(name) > 1:
                raise DataError(f"two tracks are called '{name}'; name them: 'data.tracks={{a: one.bw, b: two.bw}}'")
        self._places = [self._placed(signal) for signal in self.signals]
        shared = set.intersection(*(set(places) for places in self._places))
        if not shared:
            raise DataError("the tracks have no contig in common: " + ", ".join(str(s.path) for s in self.signals))
        self.contigs = sorted(shared)
        self.swap = self._swapped()

    def _placed(self, signal: Signal) -> dict[int, str]:
        """Contig number -> its name in the file."""
        places: dict[int, str] = {}
        absent, found = [], signal.contigs()
        for name, (end, whole, where) in found.items():
            number = find_contig(self.genome, name, self.renamed)
            if number is None:
                absent.append(name)
                continue
            contig = self.genome.contigs[number]
            if end != contig.length if whole else end > contig.length:
                has = f"has {end:,} bases" if whole else f"has a value at {end:,}"
                raise DataError(
                    f"{where}: contig '{name}' {has}, but '{contig.name}' of the genome has {contig.length:,}; the "
                    "track was made on another assembly. Give its own FASTA, or lift it over"
                )
            places[number] = name
            if name != contig.name:
                self._note(f"{signal.path.name}: contig '{name}' is '{contig.name}'")
        if not places:
            first = self.genome.contigs[0].name
            known = [contig.name for contig in self.genome.contigs]
            raise DataError(
                f"{signal.path}: the genome has none of its contigs ({', '.join(list(found)[:5])}"
                f"{', ...' if len(found) > 5 else ''}){nearest(next(iter(found)), known)}; the genome's first is "
                f"'{first}'. If they are the same under other names: 'data.rename={{{next(iter(found))}: {first}}}'"
            )
        if absent:
            more = f" and {len(absent) - 5:,} more" if len(absent) > 5 else ""
            self._note(f"{signal.path.name}: left out, for the genome lacks them: {', '.join(absent[:5])}{more}")
        without = [self.genome.contigs[n].name for n in range(len(self.genome.contigs)) if n not in places]
        if without:
            more = f" and {len(without) - 5:,} more" if len(without) > 5 else ""
            self._note(f"{signal.path.name}: no values on {', '.join(without[:5])}{more}; these are not used")
        return places

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _swapped(self) -> NDArray[np.int64]:
        swap = np.arange(len(self.names))
        for pair in self.pairs:
            for name in pair:
                if name not in self.names:
                    raise ConfigError(
                        f"data.pairs: there is no track '{name}'{nearest(name, self.names)}; they are "
                        f"{', '.join(self.names)}"
                    )
            if len(pair) != 2 or pair[0] == pair[1]:
                raise ConfigError(f"data.pairs: found {list(pair)}; expected two tracks, as [plus, minus]")
            one, two = (self.names.index(name) for name in pair)
            if swap[one] != one or swap[two] != two:
                raise ConfigError(f"data.pairs: '{pair[0]}' or '{pair[1]}' is in two pairs")
            swap[one], swap[two] = two, one
        return swap

    @property
    def lowest(self) -> Signal:
        """The track with the smallest value."""
        return min(self.signals, key=lambda signal: signal.lowest.value)

    def bases(self, contig: int, start: int, stop: int) -> Values:
        """``(k t)`` values of bases ``start`` to ``stop``, which may pass the end of a circular contig."""
        length = self.genome.contigs[contig].length
        found = np.full((len(self.signals), stop - start), np.nan, dtype=np.float32)
        at = start
        while at < stop:
            low = at % length
            size = min(stop - at, length - low)
            for row, (signal, places) in enumerate(zip(self.signals, self._places, strict=True)):
                if contig in places:
                    found[row, at - start : at - start + size] = signal.read(places[contig], low, low + size)
            at += size
        return np.nan_to_num(found) if self.missing == "zero" else found

    def bins(self, contig: int, start: int, stop: int, reverse: bool = False) -> Values:
        """``(n k)`` squashed bins; of the other strand in its own order, paired tracks swapped."""
        found = self.squash.forward(binned(self.bases(contig, start, stop), self.size, self.summary))
        if reverse:
            found = found[self.swap, ::-1]
        return np.ascontiguousarray(found.T)

    def aligned(self, regions: Sequence[Region]) -> list[Region]:
        """Regions from bin to bin, those on contigs without values left out."""
        found = []
        for contig, start, stop in regions:
            first, last = -(-start // self.size) * self.size, stop // self.size * self.size
            if contig in self.contigs and first < last:
                found.append(Region(contig, first, last))
        return found

    def pieces(self, regions: Sequence[Region], most: int) -> Iterator[Region]:
        """Stretches of regions, evenly spread, of at most about ``most`` bases in all."""
        step = max(self.size, (1 << 16) // self.size * self.size)
        every = [
            Region(region.contig, start, min(start + step, region.stop))
            for region in regions
            for start in range(region.start, region.stop, step)
        ]
        share = max(1, -(-sum(piece.length for piece in every) // most))
        yield from every[::share]


@dataclass(frozen=True)
class Survey:
    """What the tracks hold in a split, each ``(k)``: bins with a value, their mean, the largest, the share of zeros."""

    known: NDArray[np.int64]
    mean: NDArray[np.float64]
    largest: NDArray[np.float64]
    zero: NDArray[np.float64]


def survey(tracks: Tracks, regions: Sequence[Region], most: int = 1 << 27) -> Survey:
    """Look through the squashed bins of a split, or through a part of it if it has more than ``most`` bases."""
    k = len(tracks.names)
    known, zero = np.zeros(k, dtype=np.int64), np.zeros(k, dtype=np.int64)
    total, largest = np.zeros(k), np.full(k, -np.inf)
    for piece in tracks.pieces(regions, most):
        values = tracks.bins(*piece)
        here = ~np.isnan(values)
        known += here.sum(axis=0)
        zero += (values == 0).sum(axis=0)
        total += np.where(here, values, 0).sum(axis=0, dtype=np.float64)
        largest = np.maximum(largest, np.where(here, values, -np.inf).max(axis=0, initial=-np.inf))
    count = np.maximum(known, 1)
    return Survey(known, total / count, largest, zero / count)
