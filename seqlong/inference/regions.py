"""Places of a genome as people write them: chr7:1-2000."""

from __future__ import annotations

import re
from dataclasses import dataclass

from seqlong.datamodules.dna.genome import Genome
from seqlong.errors import ConfigError, DataError
from seqlong.inference.contigs import Contigs

_REGION = re.compile(r"(.+?)(?::([\d,]+)(?:-([\d,]+))?)?")


@dataclass(frozen=True)
class Place:
    """Bases ``start`` to ``stop`` (from 0, half open) of contig number ``contig``, and how they were asked for."""

    contig: int
    start: int
    stop: int
    text: str
    offset: int = 0

    @property
    def length(self) -> int:
        """Bases."""
        return self.stop - self.start


def parse(text: str, genome: Genome) -> Place:
    """``chr7:1-2000`` (from 1, both counted), ``chr7:500`` or ``chr7``, under any name of the contig.

    Raises:
        ConfigError: another form.
        DataError: no such contig, or a place that is not on it.
    """
    for number, contig in enumerate(genome.contigs):
        if contig.name == text:
            return Place(number, 0, contig.length, text)
    match = _REGION.fullmatch(text)
    if match is None:
        raise ConfigError(f"'{text}' is no region; expected CONTIG:START-STOP such as chr7:1-2000")
    first = int(match[2].replace(",", "")) if match[2] else 1
    contigs = Contigs(genome)
    found = contigs.find(match[1], first - 1)
    if found is None:
        known = ", ".join(contig.name for contig in genome.contigs[:5])
        more = " ..." if len(genome.contigs) > 5 else ""
        raise DataError(
            f"{text}: the reference has no contig '{match[1]}' with this place{contigs.closest(match[1])}; it has "
            f"{known}{more}"
        )
    length = genome.contigs[found.contig].length
    last = int(match[3].replace(",", "")) if match[3] else first if match[2] else found.offset + length
    start, stop = first - 1 - found.offset, last - found.offset
    if not 0 <= start < stop <= length:
        raise DataError(
            f"{text}: expected a start of at least 1, no larger than the stop, and a stop up to "
            f"{found.offset + length:,}, where '{genome.contigs[found.contig].name}' ends"
        )
    return Place(found.contig, start, stop, text, found.offset)
