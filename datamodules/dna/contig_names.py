"""Other names of a contig: chr1 and 1, chrM and MT, accessions of RefSeq with and without their version."""

from __future__ import annotations

import re
from collections.abc import Mapping

from seqlong.datamodules.dna.genome import Genome
from seqlong.errors import DataError, nearest

_MITOCHONDRION = ("MT", "M", "chrM", "chrMT", "MtDNA", "rCRS", "mito", "mitochondrion")
#: Numbers of RefSeq accessions NC_0000nn -> chromosome. NCBI, human (any assembly) and mouse.
_REFSEQ = {
    **{number: str(number) for number in range(1, 23)},
    23: "X",
    24: "Y",
    12920: "MT",
    1807: "MT",
    **{66 + number: str(number) for number in range(1, 20)},
    86: "X",
    87: "Y",
    5089: "MT",
}
_ACCESSION = re.compile(r"NC_0*(\d+)(?:\.\d+)?")


def aliases(name: str) -> list[str]:
    """Other names of a contig, likeliest first."""
    found: list[str] = []
    bare = name.removeprefix("chr").removeprefix("Chr").removeprefix("CHR")
    if name in _MITOCHONDRION:
        found += _MITOCHONDRION
    match = _ACCESSION.fullmatch(name)
    if match and int(match[1]) in _REFSEQ:
        chromosome = _REFSEQ[int(match[1])]
        found += [chromosome, f"chr{chromosome}", *(_MITOCHONDRION if chromosome == "MT" else ())]
    found += [bare, f"chr{bare}", f"Chr{bare}"]
    # The other way round: the accession of a chromosome. Versions differ between assemblies, so the newest comes first.
    chromosome = "MT" if name in _MITOCHONDRION else bare
    for number, called in _REFSEQ.items():
        if called == chromosome:
            found += [f"NC_{number:06d}.{version}" for version in range(15, 0, -1)]
    found += [name.partition(".")[0], f"{name}.1"]  # an accession with and without its version
    return [other for place, other in enumerate(found) if other != name and other not in found[:place]]


def numbers_by_name(genome: Genome) -> dict[str, int]:
    """Every contig under its own name, and under the parts of ``gi|9626243|ref|NC_001416.1|``, as NCBI wrote them."""
    found: dict[str, int] = {}
    for number, contig in enumerate(genome.contigs):
        found.setdefault(contig.name, number)
    for number, contig in enumerate(genome.contigs):
        for part in contig.name.split("|")[1:]:
            if len(part) > 3 and not part.isdigit():
                found.setdefault(part, number)
    return found


def find_contig(genome: Genome, name: str, renamed: Mapping[str, str], setting: str = "data.rename") -> int | None:
    """The number of the contig that another file calls ``name``; None if the genome has none of its names.

    Args:
        genome: where to look.
        name: as the other file writes it.
        renamed: the other file's names -> those of the genome, which go before all else.
        setting: what holds ``renamed``, for the error.

    Raises:
        DataError: ``renamed`` names no contig of the genome.
    """
    known = numbers_by_name(genome)
    if name in renamed:
        wanted = renamed[name]
        if wanted not in known:
            raise DataError(f"{setting}: {name} is to be '{wanted}', no contig of the genome{nearest(wanted, known)}")
        return known[wanted]
    return next((known[other] for other in (name, *aliases(name)) if other in known), None)
