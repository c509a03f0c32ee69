"""A label for every base of a genome, from the features of an annotation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.dna.annotation_files import BadLines, Features, read_annotation
from seqlong.datamodules.dna.contig_names import find_contig
from seqlong.datamodules.dna.genome import Genome
from seqlong.datamodules.dna.splits import Region
from seqlong.errors import ConfigError, DataError, nearest

#: Labels that are made from exons and coding sequence; any other is a type of feature, taken as it stands.
MADE = ("donor", "acceptor", "CDS", "UTR", "exon", "intron")
#: What bases have that no feature covers.
OTHER = "other"
#: Shorter gaps between the parts of a transcript are frameshifts and slips of the ribosome, not introns.
SHORTEST_INTRON = 10
_SITE = 2  # bases of a splice site: GT, AG

Spans = list[tuple[int, int, int, int]]


class BaseLabels:
    """One label for each base, kept as runs: about 9 bytes for each change of label.

    - ``exon``: exons, coding or not; ``CDS``; ``UTR``: as the file says, or of a transcript with CDS the exons outside.
    - ``intron``: gaps between the parts of a transcript; ``donor`` its first two bases and ``acceptor`` its last two,
      in the direction of the gene. Introns that a file lists by themselves (RNA-seq junctions) are not used.

    Args:
        genome: what is labelled.
        path: GFF3 or GTF.
        labels: where several fit a base, the first of the list wins.
        stranded: whether each label is two, ``CDS_plus`` and ``CDS_minus``. Then features without a strand are
            left out.
        renamed: contigs of the file -> those of the genome.
        bad_lines: lines that cannot be read: ``error`` or ``skip``.

    Attributes:
        names: of all labels, ``other`` first.
        swap: for each label what it is on the other strand.
        contigs: numbers of contigs that the annotation knows.
        notes: what was renamed, left out or not found, with counts.
        size: 1, bases of a label.

    Raises:
        DataError: the file cannot be read or has none of the genome's contigs, or none of the labels.
        ConfigError: labels that are none.
    """

    size = 1

    def __init__(
        self,
        genome: Genome,
        path: str,
        labels: Sequence[str],
        stranded: bool = True,
        renamed: Mapping[str, str] | None = None,
        bad_lines: BadLines = "error",
    ) -> None:
        if not labels or len(set(labels)) < len(labels) or OTHER in labels or len(labels) > 120:
            raise ConfigError(f"data.labels is {list(labels)}; expected 1 to 120 names, each once, without '{OTHER}'")
        self.genome, self.labels, self.stranded, self.notes = genome, list(labels), stranded, []
        self.names = [OTHER] + [name + end for name in labels for end in (("_plus", "_minus") if stranded else ("",))]
        pairs = np.arange(len(self.names))
        self.swap = np.where(pairs > 0, (pairs - 1 ^ 1) + 1, 0) if stranded else pairs
        found = read_annotation(path, [name for name in labels if name not in MADE], bad_lines)
        self.path = found.path
        self._note("passed over, for they cannot be read", found.bad, "lines")
        places = self._placed(found, renamed or {})
        rows = self._fitting(found, places)
        spans = self._spans(found, rows)
        self.contigs = sorted(set(places.values()))
        self._runs = {number: self._painted(number, spans.get(number, [])) for number in self.contigs}
        absent = [label for number, label in enumerate(labels) if not any(number == span[0] for part in spans.values()
                                                                          for span in part)]  # fmt: skip
        if absent:
            has = ", ".join(
                f"{kind} ({count:,})" for kind, count in sorted(found.types.items(), key=lambda x: -x[1])[:12]
            )
            if len(absent) == len(labels):
                raise DataError(f"{self.path}: no base is {' or '.join(absent)}; the file has {has}; see data.labels")
            self.notes.append(f"{self.path.name}: no base is {', '.join(absent)}; the file has {has}")

    def _note(self, what: str, listed: Sequence[str], things: str) -> None:
        if listed:
            more = f" and {len(listed) - 5:,} more" if len(listed) > 5 else ""
            self.notes.append(f"{self.path.name}: {len(listed):,} {things} {what}: {'; '.join(listed[:5])}{more}")

    def _placed(self, found: Features, renamed: Mapping[str, str]) -> dict[int, int]:
        """Number of a contig in the file -> in the genome."""
        places: dict[int, int] = {}
        absent = []
        for here, name in enumerate(found.contigs):
            number = find_contig(self.genome, name, renamed)
            if number is None:
                absent.append(name)
                continue
            places[here] = number
            if name != self.genome.contigs[number].name:
                self.notes.append(f"{self.path.name}: contig '{name}' is '{self.genome.contigs[number].name}'")
        if not places:
            first, known = self.genome.contigs[0].name, [contig.name for contig in self.genome.contigs]
            raise DataError(
                f"{self.path}: the genome has none of its contigs ({', '.join(absent[:5])}"
                f"{', ...' if len(absent) > 5 else ''}){nearest(absent[0], known)}; the genome's first is "
                f"'{first}'. If they are the same under other names: 'data.rename={{{absent[0]}: {first}}}'"
            )
        self._note("left out, for the genome lacks them", absent, "contigs")
        without = [contig.name for number, contig in enumerate(self.genome.contigs) if number not in places.values()]
        self._note("of the genome without a feature are not used", without, "contigs")
        return places

    def _fitting(self, found: Features, places: Mapping[int, int]) -> NDArray[np.int64]:
        """Rows on contigs of the genome, within them, and with a strand where it matters."""
        rows = found.rows
        table = np.full(len(found.contigs), -1, dtype=np.int64)
        for here, number in places.items():
            table[here] = number
        rows = np.column_stack([table[rows[:, 0]], rows[:, 1:]])
        rows = rows[rows[:, 0] >= 0]
        sizes = np.array([contig.length for contig in self.genome.contigs])[rows[:, 0]]
        rings = np.array([contig.circular for contig in self.genome.contigs])[rows[:, 0]]
        past = (rows[:, 3] > sizes) & ~(rings & (rows[:, 2] < sizes) & (rows[:, 3] <= 2 * sizes))
        _, first = np.unique(rows[past, 6], return_index=True)
        listed = [
            f"{self.path}:{row[6]}: to {row[3]:,} on {self.genome.contigs[row[0]].name}, which has "
            f"{self.genome.contigs[row[0]].length:,}"
            for row in rows[past][first]
        ]
        if len(rows) and past.sum() * 2 > len(rows):
            raise DataError(
                f"{listed[0]}; so do {len(listed):,} features: the annotation is of another assembly. Give "
                "its own FASTA"
            )
        self._note("past the end of their contig are left out", listed, "features")
        loose = (rows[:, 4] == 0) & ~past & self.stranded
        lines = [f"{self.path}:{line}" for line in np.unique(rows[loose, 6])]
        self._note("without a strand are left out (data.stranded=false keeps them)", lines, "features")
        return rows[~past & ~loose]

    def _spans(self, found: Features, rows: NDArray[np.int64]) -> dict[int, Spans]:
        """Contig -> (number of the label, start, stop, strand)."""
        spans: dict[int, Spans] = {}
        numbers = {name: number for number, name in enumerate(self.labels)}

        def add(name: str, contig: int, start: int, stop: int, strand: int) -> None:
            if name in numbers and start < stop:
                spans.setdefault(contig, []).append((numbers[name], start, stop, strand))

        kinds = [found.kinds[kind] for kind in rows[:, 1]]
        for name, (contig, _, start, stop, strand, *_rest) in zip(kinds, rows.tolist(), strict=True):
            if name not in MADE or name in ("CDS", "UTR"):
                add(name, contig, start, stop, strand)
            if name in ("exon", "CDS", "UTR"):
                add("exon", contig, start, stop, strand)
        parts = np.array([name in ("exon", "CDS", "UTR") for name in kinds], dtype=bool) & (rows[:, 5] >= 0)
        coding = found.kinds.index("CDS") if "CDS" in found.kinds else -1
        chosen = rows[parts]
        # A transcript's name may come back on another contig or strand (the pseudoautosomal regions of X and Y).
        chosen = chosen[np.lexsort((chosen[:, 2], chosen[:, 4], chosen[:, 0], chosen[:, 5]))]
        key = chosen[:, [0, 4, 5]]
        cuts = np.flatnonzero((key[1:] != key[:-1]).any(axis=1)) + 1
        for group in np.split(chosen, cuts) if len(chosen) else []:
            contig, strand = int(group[0, 0]), int(group[0, 4])
            inside = group[group[:, 1] == coding]
            if len(inside):
                low, high = int(inside[:, 2].min()), int(inside[:, 3].max())
                for start, stop in group[group[:, 1] != coding][:, 2:4].tolist():
                    add("UTR", contig, start, min(stop, low), strand)
                    add("UTR", contig, max(start, high), stop, strand)
            reach = np.maximum.accumulate(group[:, 3])
            for start, stop in zip(reach[:-1].tolist(), group[1:, 2].tolist(), strict=True):
                if stop - start < SHORTEST_INTRON:
                    continue
                add("intron", contig, start, stop, strand)
                ends = (start, start + _SITE), (stop - _SITE, stop)
                if strand:
                    add("donor", contig, *ends[strand < 0], strand)
                    add("acceptor", contig, *ends[strand > 0], strand)
        return spans

    def _painted(self, contig: int, spans: Spans) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Runs: where each starts, and its label."""
        length = self.genome.contigs[contig].length
        codes = np.zeros(length, dtype=np.uint8)
        for number, start, stop, strand in sorted(spans, key=lambda span: -span[0]):
            code = 1 + 2 * number + (strand < 0) if self.stranded else 1 + number
            codes[start:stop] = code
            if stop > length:  # round a circular contig
                codes[: stop - length] = code
        starts = np.concatenate([[0], np.flatnonzero(np.diff(codes)) + 1]).astype(np.int64)
        return starts, codes[starts]

    def read(self, contig: int, start: int, stop: int, reverse: bool = False) -> NDArray[np.uint8]:
        """``(t)`` labels of bases ``start`` to ``stop``, which may pass the end of a circular contig.

        With ``reverse`` those of the other strand: in its own order, and each label what it is there.
        """
        length = self.genome.contigs[contig].length
        found = np.empty(stop - start, dtype=np.uint8)
        starts, codes = self._runs[contig]
        at = start
        while at < stop:
            low = at % length
            size = min(stop - at, length - low)
            first, last = np.searchsorted(starts, [low, low + size - 1], side="right")
            edges = np.concatenate([[low], starts[first:last], [low + size]])
            found[at - start : at - start + size] = np.repeat(codes[first - 1 : last], np.diff(edges))
            at += size
        return self.swap.astype(np.uint8)[found[::-1]] if reverse else found

    def counts(self, regions: Sequence[Region]) -> NDArray[np.int64]:
        """``(k)`` bases of each label in regions."""
        total = np.zeros(len(self.names), dtype=np.int64)
        for piece in self.pieces(regions):
            total += np.bincount(self.read(*piece), minlength=len(self.names))
        return total

    def pieces(self, regions: Sequence[Region], step: int = 1 << 16) -> Iterator[Region]:
        """Stretches of regions of at most ``step`` bases."""
        for contig, begin, end in regions:
            for start in range(begin, end, step):
                yield Region(contig, start, min(start + step, end))
