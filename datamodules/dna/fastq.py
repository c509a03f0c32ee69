"""FASTQ, through Biopython: reads one at a time, their qualities dropped, which is said."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path

from Bio.SeqIO.QualityIO import FastqGeneralIterator

from seqlong.datamodules.dna.alphabet import LEGAL
from seqlong.datamodules.dna.fasta import Header
from seqlong.datamodules.dna.source import Lines, illegal_letters
from seqlong.errors import DataError, located

log = logging.getLogger("seqlong")
#: The second word of an Illumina header, which alone tells the two reads of a pair apart.
_MATE = re.compile(r"([12]):[YN]:")


def read_fastq(file: BufferedIOBase, path: Path) -> Iterator[Header | bytes]:
    """Yield each read's `Header` and then its bases. Names of Illumina's pairs end in ``/1`` and ``/2``.

    Raises:
        DataError: truncated or malformed, a read without name or bases, or an illegal letter; with the line.
    """
    lines = Lines(file)
    reads = FastqGeneralIterator(lines)  # type: ignore[arg-type]
    count = 0
    while True:
        start = lines.number  # the iterator has read the next header already, but for the first
        try:
            found = next(reads, None)
        except ValueError as error:
            raise DataError(
                located(path, lines.number, f"malformed or truncated FASTQ: {error}; copy the file again")
            ) from error
        if found is None:
            break
        title, text, _ = found
        start, count = start or lines.first, count + 1
        words = title.split(maxsplit=1)
        if not words or title[0].isspace():
            raise DataError(located(path, start, "found a read without a name; expected '@name'"))
        name, rest = words[0], words[1] if len(words) > 1 else ""
        if mate := _MATE.match(rest):
            name = f"{name}/{mate.group(1)}"
        bases = text.encode("latin-1")
        if not bases:
            raise DataError(located(path, start, f"read '{name}' has no bases; remove it or mend the file"))
        bad = bases.translate(None, delete=LEGAL)
        if bad:
            raise illegal_letters(path, start + 1, text, name, bases.index(bad[:1]))
        yield Header(name, rest, start)
        yield bases
    log.info("%s: %s reads; their qualities are dropped", path, f"{count:,}")
