"""Phased haplotypes: a genome as a person's chromosome has it, and where variants lie on it."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.dna.genome import Genome
from seqlong.errors import DataError, nearest
from seqlong.inference.contigs import Contigs
from seqlong.inference.variants import Variant
from seqlong.inference.vcf import alleles, records


@dataclass
class Edits:
    """What one chromosome has in place of the reference, contig by contig, sorted, none overlapping.

    Attributes:
        starts: first base replaced, from 0.
        refs: bases replaced.
        alts: letters in their place.
    """

    starts: list[int] = field(default_factory=list)
    refs: list[int] = field(default_factory=list)
    alts: list[bytes] = field(default_factory=list)

    def settle(self) -> None:
        """Reckon where each edit is on the chromosome; called once all are in."""
        longer = np.array([len(alt) for alt in self.alts], dtype=np.int64) - np.array(self.refs, dtype=np.int64)
        self.before = np.concatenate([[0], np.cumsum(longer)])  # how much longer it is before edit n
        self.places = np.array(self.starts, dtype=np.int64) + self.before[:-1]


class Haplotype(Genome):
    """A genome with the variants of one chromosome of a person; contigs are as long as they are there.

    Only the variants are in memory; bases are read from the genome as they are asked for.

    Args:
        genome: the reference.
        edits: by contig number, settled.
    """

    def __init__(self, genome: Genome, edits: dict[int, Edits]) -> None:
        super().__init__(genome.stores)
        self._genome, self._edits = genome, edits
        self.contigs = [
            dataclasses.replace(contig, length=contig.length + int(edits[number].before[-1]))
            if number in edits
            else contig
            for number, contig in enumerate(genome.contigs)
        ]

    def read(self, number: int, start: int, stop: int) -> NDArray[np.uint8]:
        """Letters ``start`` to ``stop`` of a contig of the chromosome, past the end of a ring too."""
        length = self.contigs[number].length
        if number not in self._edits:
            return self._genome.read(number, start, stop)
        if not 0 <= start <= stop <= length:
            assert self.contigs[number].circular
            parts, at = [], start
            while at < stop:
                low = at % length
                size = min(stop - at, length - low)
                parts.append(self.read(number, low, low + size))
                at += size
            return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8)
        edits = self._edits[number]
        found = []
        at = start
        place = int(np.searchsorted(edits.places, start, side="right")) - 1
        if place >= 0 and int(edits.places[place]) + len(edits.alts[place]) > start:  # begins inside an allele
            inside = start - int(edits.places[place])
            found.append(np.frombuffer(edits.alts[place][inside : inside + stop - start], dtype=np.uint8))
            at += len(found[-1])
        place += 1
        while at < stop:
            end = min(stop, int(edits.places[place])) if place < len(edits.alts) else stop
            if end > at:
                shift = int(edits.before[place])
                found.append(self._genome.read(number, at - shift, end - shift))
                at = end
            if at < stop:
                found.append(np.frombuffer(edits.alts[place][: stop - at], dtype=np.uint8))
                at += len(found[-1])
                place += 1
        return np.concatenate(found) if found else np.zeros(0, dtype=np.uint8)

    def find(self, contig: int, start: int, size: int) -> tuple[int, bytes | None] | None:
        """Where ``size`` reference bases from ``start`` are on the chromosome, and the allele in their place.

        None where another allele has taken away some of them; the allele is None where the reference's are there.
        """
        edits = self._edits.get(contig)
        if edits is None:
            return start, None
        low = bisect_left(edits.starts, start)
        if low and edits.starts[low - 1] + edits.refs[low - 1] > start:
            return None
        high = bisect_right(edits.starts, start + max(size, 1) - 1)
        place = start + int(edits.before[low])
        if high == low:
            return place, None
        if high - low > 1 or edits.starts[low] != start or edits.refs[low] != size:
            return None
        return place, edits.alts[low]


@dataclass
class Person:
    """The chromosomes of one sample of a VCF.

    Attributes:
        name: of the sample.
        haplotypes: one for each chromosome; one where all genotypes are haploid.
        counts: sites by what became of them.
    """

    name: str
    haplotypes: list[Haplotype]
    counts: Counter[str]

    def lines(self) -> list[str]:
        """What a reader should know of the genotypes, a sentence each."""
        said = [f"{self.name}: {self.counts['carried']:,} alleles on {len(self.haplotypes)} haplotypes"]
        for key, words in (
            ("unphased", "heterozygous sites without phase, left as in the reference"),
            ("missing", "sites without a genotype, left as in the reference"),
            ("overlapping", "alleles that overlap one before them on the same haplotype, left out"),
            ("unusable", "carried alleles that cannot be placed (symbolic, unknown letters, other REF), left out"),
        ):
            if self.counts[key]:
                said.append(f"{self.name}: {self.counts[key]:,} {words}")
        return said


def genotype(record: Any, name: str) -> tuple[tuple[int | None, ...], bool]:
    """Alleles of each chromosome, and whether their order means something."""
    sample = record.samples[name]
    found = sample.get("GT")
    indices: tuple[int | None, ...] = tuple(found) if found is not None else (None,)
    return indices, bool(sample.phased) or len(indices) == 1 or len(set(indices)) == 1


def open_person(path: Path, name: str, contigs: Contigs, longest: int) -> Person:
    """Read the genotypes of a sample.

    Heterozygous sites without phase, and alleles that cannot be placed, leave the reference; all are counted.

    Args:
        path: VCF or BCF.
        name: of the sample.
        contigs: where its contigs are.
        longest: bases of the longest allele.

    Raises:
        DataError: the VCF has no such sample, or no genotypes.
    """
    counts: Counter[str] = Counter()
    kept: list[dict[int, list[tuple[int, bytes, bytes]]]] = [{}, {}]
    ploidy = 1
    for number, record in enumerate(records(path)):
        if not number:
            _check(path, record, name)
        indices, phased = genotype(record, name)
        if len(indices) > 2:
            raise DataError(
                f"{path}: {record.chrom}:{record.pos} has {len(indices)} alleles of {name}; expected 1 or 2"
            )
        if len(indices) == 2:
            ploidy = 2
        if None in indices:
            counts["missing"] += 1
            continue
        if not any(indices):
            continue
        if not phased:
            counts["unphased"] += 1
            continue
        line = alleles(record, contigs, longest)
        for side in range(2):
            index = indices[side if len(indices) == 2 else 0]
            if not index:
                continue
            allele = line[index - 1]
            place = contigs.find(record.chrom, record.pos - 1)
            if allele.variant is None or place is None:
                counts["unusable"] += 1
                continue
            start = record.pos - 1 - place.offset
            entry = (start, record.ref.upper().encode(), record.alts[index - 1].upper().encode())
            kept[side].setdefault(place.contig, []).append(entry)
    haplotypes = []
    for side in range(ploidy):
        edits = {}
        for contig, entries in kept[side].items():
            found = edits[contig] = Edits()
            end = -1
            for start, ref, alt in sorted(entries, key=lambda entry: entry[0]):
                if start < end:
                    counts["overlapping"] += 1
                    continue
                found.starts.append(start)
                found.refs.append(len(ref))
                found.alts.append(alt)
                counts["carried"] += 1
                end = start + len(ref)
            found.settle()
        haplotypes.append(Haplotype(contigs.genome, edits))
    return Person(name, haplotypes, counts)


def _check(path: Path, record: Any, name: str) -> None:
    known = list(record.samples)
    if name not in known:
        shown = ", ".join(known[:5]) + (f" and {len(known) - 5:,} more" if len(known) > 5 else "")
        raise DataError(f"--sample {name}: {path} has no such sample{nearest(name, known)}; it has {shown or 'none'}")
    if "GT" not in record.format:
        raise DataError(f"--sample {name}: {path} has no genotypes (GT); expected FORMAT with GT")


def on_haplotype(
    haplotype: Haplotype, contig: int, start: int, ref: bytes, alt: bytes
) -> tuple[Variant | None, Variant | None, bool] | None:
    """What must be scored on a chromosome to know ``ln p(with ALT) - ln p(with REF)``: the first less the second.

    Either is None where the chromosome has that allele already. The last says whether it has ALT.
    None where another allele has taken the place away.
    """
    there = haplotype.find(contig, start, len(ref))
    if there is None:
        return None
    place, own = there
    current = ref if own is None else own
    with_alt = None if alt == current else Variant.trimmed(place, current, alt)
    with_ref = None if ref == current else Variant.trimmed(place, current, ref)
    return with_alt, with_ref, alt == current


def chosen(carried: Sequence[bool | None]) -> list[int]:
    """Which chromosomes an allele is scored on: those that carry it; all that have its place, if none does."""
    those = [number for number, one in enumerate(carried) if one]
    return those or [number for number, one in enumerate(carried) if one is not None]
