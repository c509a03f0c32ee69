"""Any sequence file to records: FASTA, FASTQ, GenBank or EMBL, told apart by what they begin with."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path

from seqlong.datamodules.dna.fasta import Header, read_fasta
from seqlong.datamodules.dna.fastq import read_fastq
from seqlong.datamodules.dna.genbank import read_embl, read_genbank
from seqlong.datamodules.dna.source import CHUNK, SourceFile
from seqlong.errors import DataError, located

_READERS: dict[bytes, Callable[[BufferedIOBase, Path], Iterator[Header | bytes]]] = {
    b"LOCUS ": read_genbank,
    b"ID   ": read_embl,
    b"@": read_fastq,
}


def read_sequences(path: str | Path, progress: Callable[[int], None] | None = None) -> Iterator[Header | bytes]:
    """Yield the `Header` of each record and then its bases, in pieces.

    Args:
        path: FASTA, FASTQ, GenBank or EMBL; plain, gzip or bgzip.
        progress: called with the bytes of the file read so far.

    Raises:
        DataError: anything wrong with the file, duplicate record names among it, with the line.
    """
    path = Path(path)
    lines: dict[str, int] = {}
    with io.BufferedReader(SourceFile(path, progress), CHUNK) as file:
        head = file.peek(CHUNK).lstrip()
        reader = next((reader for first, reader in _READERS.items() if head.startswith(first)), read_fasta)
        for item in reader(file, path):
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
