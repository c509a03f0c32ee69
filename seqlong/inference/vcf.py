"""VCF and BCF in and out: every record is read, checked against the reference, and written again with its scores."""

from __future__ import annotations

import gzip
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seqlong.datamodules.dna.genome import Genome
from seqlong.errors import ConfigError, DataError
from seqlong.inference.contigs import Contigs
from seqlong.inference.variants import Variant

#: Why an allele has no score -> in words.
REASONS = {
    "contig_absent": "on contigs that the reference lacks",
    "out_of_range": "past the end of their contig",
    "ref_mismatch": "whose REF is not what the reference has",
    "symbolic": "symbolic, spanning or breakends, which have no sequence",
    "unknown_base": "with letters other than A, C, G, T",
    "too_long": "too long for a window",
    "no_alt": "without an ALT",
    "on_deleted": "where another allele of the haplotype has taken their place",
}
_BASES = frozenset(b"ACGT")


@dataclass(frozen=True)
class Allele:
    """One ALT of a record.

    Attributes:
        status: ``ok``, or why it cannot be scored: a key of ``REASONS``.
        contig: number of the genome's contig.
        variant: what it changes there, on the forward strand; None unless ok.
    """

    status: str
    contig: int = -1
    variant: Variant | None = None


@dataclass
class Tally:
    """What a VCF holds.

    Attributes:
        records: how many.
        alleles: ALTs of all of them.
        counts: alleles by status.
        examples: status -> the first few, in words.
        unsorted: records before the one above them, or on a contig that had ended.
        swapped: alleles whose REF does not match, but whose ALT does.
        absent: contig names that the reference lacks, with alleles on each.
    """

    records: int = 0
    alleles: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    unsorted: int = 0
    swapped: int = 0
    absent: Counter[str] = field(default_factory=Counter)

    def lines(self, contigs: Contigs) -> list[str]:
        """Everything that is not as it should be, a sentence each; nothing where all is well."""
        said = list(contigs.renamed)
        for status, words in REASONS.items():
            count = self.counts[status]
            if count:
                shown = "; ".join(self.examples[status])
                more = " ..." if count > len(self.examples[status]) else ""
                hint = contigs.closest(next(iter(self.absent))) if status == "contig_absent" else ""
                said.append(f"{count:,} of {self.alleles:,} alleles {words}: {shown}{more}{hint}")
        if self.swapped:
            said.append(f"{self.swapped:,} of those that do not match have the reference's bases as ALT: swapped?")
        if self.unsorted:
            said.append(f"{self.unsorted:,} of {self.records:,} records out of order: scored, written as they came")
        return said


def records(path: str | Path) -> Iterator[Any]:
    """The records of a VCF or BCF, as pysam gives them. ``.header`` of the file is that of each record.

    Raises:
        DataError: no such file, another kind of file, one that is cut short or damaged; with the last good record.
    """
    with opened(path) as file:
        yield from read(file, path)


def read(file: Any, path: str | Path) -> Iterator[Any]:
    """The same, of an open file."""
    count, last = 0, "before the first record"
    source = iter(file)
    while True:
        try:
            record = next(source)
        except StopIteration:
            return
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: record {count + 1:,} cannot be read ({last}): {error}; the file is damaged or cut short "
                "there, or the line is no VCF. Mend it (bcftools view tells more), or copy the file again"
            ) from error
        count += 1
        last = f"after {record.chrom}:{record.pos}"
        yield record


def opened(path: str | Path) -> Any:
    """The file, open.

    Raises:
        DataError: as ``records``.
        ConfigError: pysam is not installed.
    """
    pysam = library()
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {path}; expected a VCF or BCF")
    head = _head(path)
    if head != b"\x1f\x8b" and path.stat().st_size and not head.startswith(b"BC"):
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                raise DataError(f"{path} ends in the middle of a line: it is cut short; copy or download it again")
    try:
        return pysam.VariantFile(str(path))
    except (OSError, ValueError) as error:
        cut = "EOF marker" in str(error)
        raise DataError(
            f"{path} {'is cut short: its last block is missing' if cut else 'cannot be read as VCF or BCF'} ({error}); "
            f"{'copy or download it again' if cut else 'expected a file that begins with ##fileformat=VCF'}"
        ) from error


def library() -> Any:
    """pysam, quiet.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pysam
    except ImportError as error:
        raise ConfigError("VCF files need pysam, which is not installed: pip install pysam") from error
    pysam.set_verbosity(0)
    return pysam


def alleles(record: Any, contigs: Contigs, longest: int) -> list[Allele]:
    """What the ALTs of a record change, each checked.

    Args:
        record: of pysam.
        contigs: where its contig is.
        longest: bases of the longest allele that can be scored.
    """
    alts = record.alts or ()
    if not alts:
        return [Allele("no_alt")]
    ref = (record.ref or "").upper().encode()
    place = contigs.find(record.chrom, record.pos - 1)
    if place is None:
        return [Allele("contig_absent")] * len(alts)
    genome, start = contigs.genome, record.pos - 1 - place.offset
    if start < 0 or start + len(ref) > genome.contigs[place.contig].length:
        return [Allele("out_of_range")] * len(alts)
    there = genome.read(place.contig, start, start + len(ref)).tobytes().upper().replace(b"U", b"T")
    found = []
    for text in alts:
        alt = text.upper().encode()
        if text[:1] in "<*" or "[" in text or "]" in text or text.startswith(".") or text.endswith("."):
            found.append(Allele("symbolic"))
        elif ref != there:
            found.append(Allele("ref_mismatch"))
        elif not _BASES.issuperset(ref + alt):
            found.append(Allele("unknown_base"))
        else:
            variant = Variant.trimmed(start, ref, alt)
            long = max(len(variant.ref), len(variant.alt)) > longest
            found.append(Allele("too_long") if long else Allele("ok", place.contig, variant))
    return found


def survey(
    path: str | Path, genome: Genome, longest: int, renamed: Mapping[str, str] | None = None
) -> tuple[Tally, Contigs]:
    """Read a whole VCF and check all of it, before anything is computed.

    Args:
        path: VCF or BCF.
        genome: the reference.
        longest: bases of the longest allele that can be scored.
        renamed: contigs of the VCF -> those of the reference, where they are not to be found by themselves.

    Raises:
        DataError: as ``records``, or there are none.
    """
    contigs, tally = Contigs(genome, renamed or {}), Tally()
    seen: set[str] = set()
    before: tuple[str, int] = ("", 0)
    for record in records(path):
        tally.records += 1
        here = (record.chrom, record.pos)
        if here[0] != before[0]:
            tally.unsorted += here[0] in seen
            seen.add(here[0])
        else:
            tally.unsorted += here[1] < before[1]
        before = here
        for number, allele in enumerate(alleles(record, contigs, longest)):
            tally.alleles += 1
            tally.counts[allele.status] += 1
            if allele.status == "ok":
                continue
            alt = record.alts[number] if record.alts else "."
            if allele.status == "contig_absent":
                tally.absent[record.chrom] += 1
            elif allele.status == "ref_mismatch":
                tally.swapped += _reference(contigs, record, len(alt)) == alt.upper()
            examples = tally.examples.setdefault(allele.status, [])
            if len(examples) < 3:
                examples.append(_example(allele.status, record, alt, contigs))
    if not tally.records:
        raise DataError(f"{path} has no records; expected at least one variant")
    return tally, contigs


def _example(status: str, record: Any, alt: str, contigs: Contigs) -> str:
    ref = record.ref if len(record.ref) <= 12 else f"{record.ref[:9]}... ({len(record.ref)} bases)"
    alt = alt if len(alt) <= 12 else f"{alt[:9]}... ({len(alt)} letters)"
    said = f"{record.chrom}:{record.pos} {ref}>{alt}"
    if status == "ref_mismatch":
        said += f" (the reference has {_reference(contigs, record, min(12, len(record.ref)))})"
    return said


def _reference(contigs: Contigs, record: Any, size: int) -> str:
    """Letters of the reference at a record, upper case."""
    place = contigs.find(record.chrom, record.pos - 1)
    if place is None:
        return ""
    start = record.pos - 1 - place.offset
    stop = min(start + size, contigs.genome.contigs[place.contig].length)
    return contigs.genome.read(place.contig, start, stop).tobytes().decode().upper()


def annotate(
    source: str | Path,
    target: Path,
    described: Mapping[str, str],
    notes: Sequence[str],
    values: Iterator[tuple[list[str], list[list[float | None]]]],
) -> bool:
    """Write ``source`` again with scores in INFO, whole or not at all; indexed where it is sorted bgzip.

    All else is kept as it is written, letter by letter.

    Args:
        source: VCF or BCF.
        target: ``.vcf`` or ``.vcf.gz``.
        described: INFO field -> what it is, for the header; of type Float, one for each ALT.
        notes: further header lines.
        values: for each record the status of each allele, and for each field the value of each allele.

    Returns:
        Whether it was indexed.
    """
    pysam = library()
    header = [f'##INFO=<ID={name},Number=A,Type=Float,Description="{words}">' for name, words in described.items()]
    header.append('##INFO=<ID=SL_STATUS,Number=A,Type=String,Description="Why seqlong gave an allele no score">')
    header += [f"##seqlong={note}" for note in notes]
    own = [f"##INFO=<ID={name}," for name in (*described, "SL_STATUS")]  # of an earlier time
    compressed = target.suffix == ".gz"
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with pysam.BGZFile(str(temporary), "w") if compressed else temporary.open("wb") as out:
            for line in _text(source):  # bytes that are no UTF-8 come back as they were
                if line.startswith("##"):
                    if not line.startswith(tuple(own)):
                        out.write(f"{line}\n".encode(errors="surrogateescape"))
                elif line.startswith("#"):
                    out.write("".join(f"{said}\n" for said in [*header, line]).encode(errors="surrogateescape"))
                else:
                    statuses, columns = next(values)
                    line = _annotated(line, described, statuses, columns)
                    out.write(f"{line}\n".encode(errors="surrogateescape"))
            assert next(values, None) is None, "as many records as were scored"
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if not compressed:
        return False
    try:
        pysam.tabix_index(str(target), preset="vcf", force=True)
    except OSError:  # out of order: a file that cannot be indexed
        return False
    return True


def _text(source: str | Path) -> Iterator[str]:
    """Lines of a VCF as they are; of a BCF, as VCF has them."""
    with opened(source) as file:
        if file.is_bcf:
            yield from str(file.header).splitlines()
            for record in read(file, source):
                yield str(record).rstrip("\n")
            return
    unpack = gzip.open if _head(Path(source)) == b"\x1f\x8b" else open
    with unpack(source, "rt", encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        for line in lines:
            if text := line.rstrip("\r\n"):
                yield text


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2)


def _annotated(
    line: str, described: Mapping[str, str], statuses: Sequence[str], columns: Sequence[Sequence[float | None]]
) -> str:
    parts = line.split("\t")
    names = {*described, "SL_STATUS"}
    info = [item for item in parts[7].split(";") if item not in ("", ".") and item.partition("=")[0] not in names]
    if statuses != ["no_alt"]:
        for name, column in zip(described, columns, strict=True):
            info.append(f"{name}={','.join('.' if value is None else f'{value:.6g}' for value in column)}")
        if any(status != "ok" for status in statuses):
            info.append(f"SL_STATUS={','.join(statuses)}")
    parts[7] = ";".join(info) or "."
    return "\t".join(parts)
