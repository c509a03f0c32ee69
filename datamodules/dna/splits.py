"""Splits: which bases train, validate and test. Intervals of different splits never overlap; this is checked always."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

from seqlong.datamodules.dna.genome import Genome
from seqlong.datamodules.dna.source import check_file
from seqlong.datamodules.sampler import permute
from seqlong.errors import DataError, located

NAMES = ("train", "validation", "test")

Interval = tuple[int, int]
#: contig number -> its intervals, within the contig
Parts = dict[int, list[Interval]]


class Region(NamedTuple):
    """Bases ``start`` to ``stop`` (from 0, half open) of a contig; on a circular one ``stop`` may pass its length."""

    contig: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Bases."""
        return self.stop - self.start


@dataclass(frozen=True)
class Split:
    """Regions of each split.

    Attributes:
        regions: split name to its regions, in genome order.
        how: the settings that made it, for the record.
    """

    regions: Mapping[str, list[Region]]
    how: dict[str, object]

    def bases(self, name: str) -> int:
        """Bases of one split."""
        return sum(region.length for region in self.regions[name])

    def table(self, genome: Genome) -> Table:
        """The split as a table for the terminal."""
        table = Table(title=f"Split {self.how['kind']}")
        for column in ("split", "contigs", "regions", "longest", "bases", "of genome"):
            table.add_column(column, justify="left" if column == "split" else "right")
        for row in self.summary(genome):
            table.add_row(
                str(row["split"]),
                *(f"{row[key]:,}" for key in ("contigs", "regions", "longest", "bases")),
                f"{100 * float(str(row['fraction'])):.2f} %",
            )
        return table

    def summary(self, genome: Genome) -> list[dict[str, object]]:
        """One JSON-able row for each split, and one for the bases that are in none."""
        rows: list[dict[str, object]] = []
        for name in NAMES:
            regions = self.regions[name]
            rows.append(
                {
                    "split": name,
                    "contigs": len({region.contig for region in regions}),
                    "regions": len(regions),
                    "longest": max((region.length for region in regions), default=0),
                    "bases": self.bases(name),
                    "fraction": self.bases(name) / genome.bases,
                }
            )
        unused = genome.bases - sum(self.bases(name) for name in NAMES)
        blank = {"contigs": 0, "regions": 0, "longest": 0}
        rows.append({"split": "unused", **blank, "bases": unused, "fraction": unused / genome.bases})
        return rows

    def describe(self, genome: Genome) -> dict[str, object]:
        """All of it, JSON-able: how it was made, the summary and every region as ``[contig, start, stop]``."""
        regions = {
            name: [[genome.contigs[contig].name, start, stop] for contig, start, stop in self.regions[name]]
            for name in NAMES
        }
        return {**self.how, "summary": self.summary(genome), "regions": regions}


class Splitter(ABC):
    """A way to split a genome."""

    @abstractmethod
    def split(self, genome: Genome) -> Split:
        """Split ``genome``.

        Raises:
            DataError: the genome does not allow it.
        """


class BlockSplit(Splitter):
    """Cut every contig into blocks of about one size and deal them out by a seeded permutation.

    Args:
        validation: fraction of the bases to validate on, 0 to 1.
        test: fraction of the bases to test on, 0 to 1.
        block_bases: bases in a block; null is a twentieth of the genome, at least 10,000 and at most 4,000,000. Windows
            longer than the held-out blocks cannot be evaluated whole, so take a few times the window.
        gap_bases: bases left out between different splits; null is 1,000, or a twentieth of a block if that is less.
        seed: number that names the permutation. It is not the seed of training, so that runs share one split.
    """

    def __init__(
        self,
        validation: float = 0.1,
        test: float = 0.1,
        block_bases: int | None = None,
        gap_bases: int | None = None,
        seed: int = 0,
    ) -> None:
        if min(validation, test) < 0 or validation + test >= 1:
            raise DataError(
                f"split: validation {validation} and test {test} must be fractions of 0 or more that sum to below 1"
            )
        if (block_bases is not None and block_bases < 1) or (gap_bases is not None and gap_bases < 0):
            raise DataError(f"split: block_bases {block_bases} must be 1 or more and gap_bases {gap_bases} 0 or more")
        self.validation, self.test, self.seed = validation, test, seed
        self.block_bases, self.gap_bases = block_bases, gap_bases

    def split(self, genome: Genome) -> Split:
        """Split ``genome``; see `Splitter`."""
        size = self.block_bases or min(max(genome.bases // 20, 10_000), 4_000_000, max(genome.bases // 10, 1))
        gap = self.gap_bases if self.gap_bases is not None else min(1_000, size // 20)
        blocks: list[Region] = []
        for number, contig in enumerate(genome.contigs):
            edges = np.linspace(0, contig.length, max(1, round(contig.length / size)) + 1).astype(np.int64).tolist()
            blocks += [Region(number, a, b) for a, b in pairwise(edges)]
        order = permute(np.arange(len(blocks)), len(blocks), self.seed).tolist()
        dealt: dict[str, list[Region]] = {}
        for name, fraction in (("test", self.test), ("validation", self.validation)):
            dealt[name], wanted = [], fraction * genome.bases
            # Until another block would miss the fraction by more than stopping does, but one block at least.
            while order and wanted > 0 and (not dealt[name] or wanted > blocks[order[-1]].length / 2):
                dealt[name].append(blocks[order.pop()])
                wanted -= dealt[name][-1].length
        dealt["train"] = [blocks[block] for block in order]
        for name, fraction in (("train", 1.0), ("validation", self.validation), ("test", self.test)):
            if fraction > 0 and not dealt[name]:
                raise DataError(
                    f"split: {len(blocks)} blocks of about {size:,} bases leave none for {name}; lower "
                    f"split.block_bases (the genome has {genome.bases:,} bases)"
                )
        parts = {name: _merged(_by_contig(regions)) for name, regions in dealt.items()}
        parts["validation"] = _without(genome, parts["validation"], parts["test"], gap)
        parts["train"] = _without(genome, parts["train"], _merged(_both(parts["validation"], parts["test"])), gap)
        how = {
            "kind": "by blocks",
            "block_bases": size,
            "gap_bases": gap,
            "validation": self.validation,
            "test": self.test,
            "seed": self.seed,
        }
        return _finished(genome, parts, how, f"gap_bases {gap:,} leaves nothing; lower split.gap_bases")


class ContigSplit(Splitter):
    """Hold out whole contigs.

    Args:
        validation: names of the contigs to validate on; ``file:name`` where several files share a name.
        test: names of the contigs to test on.
        train: names of the contigs to train on; null is all others.
    """

    def __init__(self, validation: list[str], test: list[str] | None = None, train: list[str] | None = None) -> None:
        self.validation, self.test, self.train = validation, test or [], train

    def split(self, genome: Genome) -> Split:
        """Split ``genome``; see `Splitter`."""
        chosen = {"validation": self.validation, "test": self.test, "train": self.train or []}
        owner: dict[int, str] = {}
        for name, contigs in chosen.items():
            for contig in contigs:
                number = genome.number(contig, f"split.{name}")
                if number in owner:
                    raise DataError(f"split: contig '{contig}' is named in {owner[number]} and again in {name}")
                owner[number] = name
        if self.train is None:
            owner = {number: owner.get(number, "train") for number in range(len(genome.contigs))}
        parts: dict[str, Parts] = {name: {} for name in NAMES}
        for number, name in owner.items():
            parts[name][number] = [(0, genome.contigs[number].length)]
        how: dict[str, object] = {"kind": "by contig", "validation": self.validation, "test": self.test}
        return _finished(genome, parts, how, "no contig is left for it")


class RegionSplit(Splitter):
    """Hold out the regions of BED files (contig, start, stop; from 0, half open; more columns are ignored).

    Args:
        validation: BED file of the regions to validate on.
        test: BED file of the regions to test on.
        train: BED file of the regions to train on; null is everything else, less the gap.
        gap_bases: bases left out of training on either side of a held-out region; not applied to ``train`` as given.
    """

    def __init__(
        self, validation: str, test: str | None = None, train: str | None = None, gap_bases: int = 1_000
    ) -> None:
        self.files = {"validation": validation, "test": test, "train": train}
        if gap_bases < 0:
            raise DataError(f"split: gap_bases {gap_bases} must be 0 or more")
        self.gap_bases = gap_bases

    def split(self, genome: Genome) -> Split:
        """Split ``genome``; see `Splitter`."""
        parts = {name: read_bed(file, genome) if file else {} for name, file in self.files.items()}
        if self.files["train"] is None:
            whole = {number: [(0, contig.length)] for number, contig in enumerate(genome.contigs)}
            held = _merged(_both(parts["validation"], parts["test"]))
            parts["train"] = _without(genome, whole, held, self.gap_bases)
        how: dict[str, object] = {"kind": "by region", **self.files, "gap_bases": self.gap_bases}
        return _finished(genome, parts, how, "the BED files leave nothing for it")


def read_bed(path: str | Path, genome: Genome) -> Parts:
    """The intervals of a BED file by contig, merged where they touch.

    Raises:
        DataError: with file and line: too few columns, numbers that are none, an unknown contig, an empty interval or
            one off the end of its contig.
    """
    path = Path(path)
    check_file(path)
    parts: Parts = {}
    for line, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        fields = text.split("\t") if "\t" in text else text.split()
        if not fields or not text.strip() or text.startswith(("#", "track", "browser")):
            continue
        if len(fields) < 3 or not (fields[1].strip().isdecimal() and fields[2].strip().isdecimal()):
            raise DataError(located(path, line, f"found '{text[:60]}'; expected BED: contig, start, stop"))
        try:
            number = genome.number(fields[0].strip(), "BED")
        except DataError as error:
            raise DataError(located(path, line, str(error))) from None
        start, stop, length = int(fields[1]), int(fields[2]), genome.contigs[number].length
        where = f"interval {fields[0]}:{start:,}-{stop:,}"
        if start >= stop:
            raise DataError(located(path, line, f"{where} is empty; expected start < stop"))
        if stop > length:
            raise DataError(located(path, line, f"{where} runs off the end; '{fields[0]}' has {length:,} bases"))
        parts.setdefault(number, []).append((start, stop))
    if not parts:
        raise DataError(f"{path}: found no regions; expected BED: contig, start, stop")
    return _merged(parts)


def _by_contig(regions: Iterable[Region]) -> Parts:
    parts: Parts = {}
    for contig, start, stop in regions:
        parts.setdefault(contig, []).append((start, stop))
    return parts


def _both(first: Parts, second: Parts) -> Parts:
    return {contig: [*first.get(contig, []), *second.get(contig, [])] for contig in {*first, *second}}


def _merged(parts: Parts) -> Parts:
    """Intervals sorted, and joined where they touch or overlap."""
    result: Parts = {}
    for contig in sorted(parts):
        joined: list[Interval] = []
        for start, stop in sorted(parts[contig]):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
            else:
                joined.append((start, stop))
        result[contig] = joined
    return result


def _without(genome: Genome, parts: Parts, held: Parts, gap: int) -> Parts:
    """``parts`` less every base within ``gap`` of ``held``, counted round the ring on circular contigs."""
    result: Parts = {}
    for contig, intervals in parts.items():
        length, circular = genome.contigs[contig].length, genome.contigs[contig].circular
        blocked: list[Interval] = []
        for start, stop in held.get(contig, []):
            low, high = start - gap, stop + gap
            blocked.append((max(low, 0), min(high, length)))
            if circular and low < 0:
                blocked.append((max(low + length, 0), length))
            if circular and high > length:
                blocked.append((0, min(high - length, length)))
        kept: list[Interval] = []
        cuts = _merged({contig: blocked})[contig]
        for start, stop in intervals:
            for low, high in cuts:
                if high <= start or low >= stop:
                    continue
                if low > start:
                    kept.append((start, low))
                start = max(start, high)
            if start < stop:
                kept.append((start, stop))
        if kept:
            result[contig] = kept
    return result


def _finished(genome: Genome, parts: Mapping[str, Parts], how: dict[str, object], empty: str) -> Split:
    """Check that the parts are disjoint, and join those that meet at the junction of a circular contig."""
    _check_disjoint(genome, parts)
    regions: dict[str, list[Region]] = {}
    for name in NAMES:
        regions[name] = []
        for contig, intervals in sorted(parts[name].items()):
            length = genome.contigs[contig].length
            spans = list(intervals)
            if genome.contigs[contig].circular and len(spans) > 1 and spans[0][0] == 0 and spans[-1][1] == length:
                spans = [*spans[1:-1], (spans[-1][0], length + spans[0][1])]
            regions[name] += [Region(contig, start, stop) for start, stop in spans]
    if not regions["train"]:
        raise DataError(f"split: the training split is empty: {empty}")
    wanted = how.get("validation")
    if wanted and not regions["validation"]:
        raise DataError(f"split: the validation split is empty: {empty}")
    return Split(regions, how)


def _check_disjoint(genome: Genome, parts: Mapping[str, Parts]) -> None:
    everything: dict[int, list[tuple[int, int, str]]] = {}
    for name, by_contig in parts.items():
        for contig, intervals in by_contig.items():
            everything.setdefault(contig, []).extend((start, stop, name) for start, stop in intervals)
    for contig, spans in everything.items():
        spans.sort()
        for (start, stop, name), (next_start, next_stop, next_name) in pairwise(spans):
            if next_start < stop:
                label = genome.contigs[contig].name
                raise DataError(
                    f"split: {name} {label}:{start:,}-{stop:,} overlaps {next_name} "
                    f"{label}:{next_start:,}-{next_stop:,}; make the regions of different splits disjoint"
                )
