"""GenBank and EMBL flat files, through Biopython. One record is held in memory at a time; features are skipped."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path

from Bio import BiopythonParserWarning
from Bio.GenBank.Scanner import EmblScanner, GenBankScanner, InsdcScanner
from Bio.Seq import UndefinedSequenceError

from seqlong.datamodules.dna.alphabet import LEGAL
from seqlong.datamodules.dna.fasta import Header
from seqlong.datamodules.dna.source import Lines, illegal_letters
from seqlong.errors import DataError, located

# Biopython only warns of these, and goes on with what it has.
_BROKEN = re.compile(r"Premature end|Expected sequence length|Attempting to parse malformed")


def read_embl(file: BufferedIOBase, path: Path) -> Iterator[Header | bytes]:
    """As `read_genbank`, of EMBL files; the topology is that of the ID line."""
    return read_genbank(file, path, EmblScanner(), "EMBL")


def read_genbank(
    file: BufferedIOBase, path: Path, scanner: InsdcScanner | None = None, kind: str = "GenBank"
) -> Iterator[Header | bytes]:
    """Yield each record's `Header`, with the topology of its LOCUS line, and then its bases in upper case.

    GenBank writes sequences in lower case, which says nothing of repeats there.

    Raises:
        DataError: truncated or malformed, a record without a sequence, protein or illegal letters; with the line.
    """
    lines = Lines(file)
    records = (scanner or GenBankScanner()).parse_records(lines, do_features=False)
    while True:
        start = lines.number + 1
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                record = next(records, None)
        except (ValueError, AssertionError, IndexError) as error:  # what Biopython raises on malformed files
            raise DataError(located(path, lines.number, f"malformed {kind}: {error}")) from error
        for warning in caught:
            if issubclass(warning.category, BiopythonParserWarning) and _BROKEN.search(str(warning.message)):
                raise DataError(
                    located(path, lines.number, f"malformed or truncated {kind}: {warning.message}; copy it again")
                )
        if record is None:
            return
        try:
            bases = bytes(record.seq).upper()
        except UndefinedSequenceError:
            bases = b""
        if not bases:
            raise DataError(
                located(path, start, f"record '{record.id}' has no sequence (no ORIGIN); get the full {kind} file")
            )
        bad = bases.translate(None, delete=LEGAL)
        if bad:
            raise illegal_letters(path, start, bases.decode("latin-1"), record.id, bases.index(bad[:1]))
        yield Header(record.id, record.description, start, record.annotations.get("topology") == "circular")
        yield bases
