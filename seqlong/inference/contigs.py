"""Contig names of one file found in another: chr1 and 1, chrM and MT, RefSeq accessions, and cut-out regions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from seqlong.datamodules.dna.contig_names import aliases, numbers_by_name
from seqlong.datamodules.dna.genome import Genome
from seqlong.errors import DataError, nearest

_REGION = re.compile(r"(.+):([\d,]+)-([\d,]+)")


@dataclass(frozen=True)
class Place:
    """Where a contig's positions are in a genome.

    Attributes:
        contig: number of the genome's contig.
        offset: base of the named contig, from 0, that the genome's contig begins with.
    """

    contig: int
    offset: int = 0


@dataclass
class Contigs:
    """Finds the contigs that another file names.

    A name is looked up as it is, then under its other names: with and without ``chr``, as the mitochondrion, as a
    RefSeq accession of human or mouse, with and without its version, and as a part of ``gi|...|ref|NC_001416.1|``. A
    contig called ``NAME:START-STOP`` (from 1, both counted) and of that length is this part of NAME, as
    ``samtools faidx`` writes it.

    Raises:
        DataError: ``given`` names no contig of the genome.

    Attributes:
        genome: where to look.
        given: names -> contigs of the genome, which go before all else.
        renamed: what was found under another name, as a sentence each, in the order of asking.
    """

    genome: Genome
    given: Mapping[str, str] = field(default_factory=dict)
    renamed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._known: dict[str, Place | None] = {}
        self._regions: dict[str, list[tuple[Place, int]]] = {}
        self._names = {name: Place(number) for name, number in numbers_by_name(self.genome).items()}
        for number, contig in enumerate(self.genome.contigs):
            match = _REGION.fullmatch(contig.name)
            if match:
                start, stop = (int(text.replace(",", "")) for text in match.group(2, 3))
                if stop - start + 1 == contig.length:
                    self._regions.setdefault(match[1], []).append((Place(number, start - 1), stop))
        for other, name in self.given.items():
            if name not in self._names:
                raise DataError(f"--rename {other}={name}: the reference has no contig '{name}'{self.closest(name)}")

    def find(self, name: str, position: int = 0) -> Place | None:
        """Where ``position`` (from 0) of the contig ``name`` is; None if no contig of the genome holds it."""
        if name not in self._known:
            self._known[name] = self._look_up(name)
        found = self._known[name]
        if found is not None:
            return found
        for other in (name, *aliases(name)):
            for place, stop in self._regions.get(other, ()):
                if place.offset <= position < stop:
                    self._tell(name, place)
                    return place
        return None

    def closest(self, name: str) -> str:
        """A hint for a name that was not found."""
        return nearest(name, [*self._names, *self._regions])

    def _look_up(self, name: str) -> Place | None:
        if name in self._names and name not in self.given:
            return self._names[name]
        for other in [self.given[name]] if name in self.given else aliases(name):
            if other in self._names:
                self._tell(name, self._names[other])
                return self._names[other]
        return None

    def _tell(self, name: str, place: Place) -> None:
        said = f"contig '{name}' is read from '{self.genome.contigs[place.contig].name}'"
        if said not in self.renamed:
            self.renamed.append(said)


__all__ = ["Contigs", "Place", "aliases"]
