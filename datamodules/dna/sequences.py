"""Any sequence file to records: FASTA, FASTQ, GenBank or EMBL, told apart by what they begin with."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path

from seqlong.datamodules.dna.fasta import Header, read_fasta
from seqlong.datamodules.dna.fastq import read_fastq
from seqlong.datamodules.dna.genbank import read_embl, read_genbank
from seqlong.datamodules.dna.proteins import ReverseTranslation
from seqlong.datamodules.dna.source import CHUNK, SourceFile
from seqlong.errors import DataError, located

_READERS: dict[bytes, Callable[[BufferedIOBase, Path], Iterator[Header | bytes]]] = {
    b"LOCUS ": read_genbank,
    b"ID   ": read_embl,
    b"@": read_fastq,
}


def read_sequences(
    path: str | Path,
    progress: Callable[[int], None] | None = None,
    protein: ReverseTranslation | None = None,
    any_letter: bool = False,
) -> Iterator[Header | bytes]:
    """Yield the `Header` of each record and then its bases, in pieces.

    Args:
        path: FASTA, FASTQ, GenBank or EMBL; plain, gzip or bgzip.
        progress: called with the bytes of the file read so far.
        protein: the file holds proteins (FASTA), and this makes bases of them; None: bases.
        any_letter: leave it to the caller to judge the letters of a FASTA file.

    Raises:
        DataError: anything wrong with the file, duplicate record names among it, with the line.
    """
    path = Path(path)
    with io.BufferedReader(SourceFile(path, progress), CHUNK) as file:
        head = file.peek(CHUNK).lstrip()
        if protein is not None:
            yield from _unique(_proteins(read_fasta(file, path, any_letter=True), path, protein), path)
            return
        if any_letter:
            yield from _unique(read_fasta(file, path, any_letter=True), path)
            return
        reader = next((reader for first, reader in _READERS.items() if head.startswith(first)), read_fasta)
        yield from _unique(reader(file, path), path)


def _proteins(items: Iterator[Header | bytes], path: Path, protein: ReverseTranslation) -> Iterator[Header | bytes]:
    """Bases of proteins. A stop may only be the last residue, so one is held back until its record goes on."""
    header, done, held = Header("", "", 0), 0, b""

    def write(residues: bytes, last: bool) -> bytes:
        nonlocal done
        if found := protein.problem(residues, last):
            place, wrong = found
            raise DataError(
                located(path, header.line, f"protein '{header.name}', residue {done + place + 1:,}: {wrong}")
            )
        made = protein.bases(residues, done)
        done += len(residues)
        return made

    for item in items:
        if isinstance(item, Header):
            if held:
                yield write(held, True)
            header, done, held = item, 0, b""
            yield item
            continue
        whole = held + item
        if len(whole) > 1:
            yield write(whole[:-1], False)
        held = whole[-1:]
    if held:
        yield write(held, True)


def _unique(items: Iterator[Header | bytes], path: Path) -> Iterator[Header | bytes]:
    lines: dict[str, int] = {}
    for item in items:
        if isinstance(item, Header):
            first = lines.setdefault(item.name, item.line)
            if first != item.line:
                raise DataError(
                    located(
                        path,
                        item.line,
                        f"two records are called '{item.name}' (the other at line {first}); names must be unique, "
                        "so rename or remove one",
                    )
                )
        yield item
