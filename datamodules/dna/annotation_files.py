"""GFF3 and GTF: the features that labels are made of, as columns of numbers."""

from __future__ import annotations

import io
import re
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from seqlong.datamodules.dna.source import SourceFile
from seqlong.errors import DataError, located

BadLines = Literal["error", "skip"]
#: Types of features that are exons, by the names that files have for them.
EXONS = frozenset({"exon", "pseudogenic_exon", "noncoding_exon"})
UTRS = frozenset({"five_prime_UTR", "three_prime_UTR", "five_prime_utr", "three_prime_utr", "5UTR", "3UTR", "UTR"})
_PARTS = EXONS | UTRS | {"CDS"}
_KINDS = {"exon": EXONS, "UTR": UTRS, "CDS": frozenset({"CDS"})}
_PARENT = re.compile(r"(?:^|;)\s*Parent=([^;]+)")
_OWN = re.compile(r"(?:^|;)\s*ID=([^;]+)")
_TRANSCRIPT = re.compile(r'(?:^|;)\s*transcript_id "?([^";]+)')
_STRANDS = {"+": 1, "-": -1, ".": 0, "?": 0}
_BIG = 1 << 24


class Feature(NamedTuple):
    """A line: bases ``start`` to ``stop`` (from 0, half open), strand 1, -1 or 0, and the transcripts it is part of."""

    contig: str
    kind: str
    start: int
    stop: int
    strand: int
    parents: list[str]


@dataclass(frozen=True)
class Features:
    """Columns, a row for each feature and each transcript that it is part of.

    Attributes:
        path: the file.
        contigs: names, in the file's order.
        kinds: types of features that were kept; exons and UTRs under one name each.
        rows: ``(n 7)`` contig, kind, start, stop, strand, transcript (-1 for none), line.
        types: how often each type of feature is in the file.
        bad: lines that were passed over, as messages.
    """

    path: Path
    contigs: list[str]
    kinds: list[str]
    rows: NDArray[np.int64]
    types: dict[str, int]
    bad: list[str]


def read_annotation(path: str | Path, kinds: Collection[str] = (), bad_lines: BadLines = "error") -> Features:
    """Read a GFF3 or GTF file, plain, gzip or bgzip.

    Args:
        path: the file.
        kinds: types to keep beside exons, CDS and UTRs.
        bad_lines: ``error``, or ``skip``: passed over and counted.

    Raises:
        DataError: a line cannot be read (file and line), the file has no features.
    """
    path = Path(path)
    contigs: dict[str, int] = {}
    names: dict[str, int] = {}
    transcripts: dict[str, int] = {}
    types: dict[str, int] = {}
    bad: list[str] = []
    columns = array("q")
    wanted = _PARTS | set(kinds)
    for number, text in _lines(path):
        try:
            feature = _feature(text)
        except ValueError as error:
            message = located(path, number, str(error))
            if bad_lines == "error":
                raise DataError(f"{message}; to pass such lines over: data.bad_lines=skip") from error
            bad.append(message)
            continue
        types[feature.kind] = types.get(feature.kind, 0) + 1
        contig = contigs.setdefault(feature.contig, len(contigs))
        if feature.kind not in wanted:
            continue
        called = {feature.kind} & set(kinds) | {name for name, group in _KINDS.items() if feature.kind in group}
        for name in sorted(called):
            kind = names.setdefault(name, len(names))
            for parent in feature.parents or [""]:
                of = transcripts.setdefault(parent, len(transcripts)) if parent else -1
                columns.extend((contig, kind, feature.start, feature.stop, feature.strand, of, number))
    if not types:
        raise DataError(f"{path}: no features; expected GFF3 or GTF, nine columns with tabs between them")
    rows = np.array(columns, dtype=np.int64).reshape(-1, 7)
    return Features(path, list(contigs), list(names), rows, types, bad)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with Progress(transient=True, disable=path.stat().st_size < _BIG if path.is_file() else True) as progress:
        bar = progress.add_task(f"Reading {path.name}", total=path.stat().st_size if path.is_file() else None)
        source = SourceFile(path, lambda done: progress.update(bar, completed=done))
        with io.TextIOWrapper(io.BufferedReader(source, 1 << 20), encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if line.startswith(("##FASTA", ">")):
                    return  # the sequences may follow, which are read from the FASTA
                text = line.rstrip("\r\n")
                if text and not text.startswith("#"):
                    yield number, text


def _feature(text: str) -> Feature:
    fields = text.split("\t")
    if len(fields) not in (8, 9):
        raise ValueError(f"found {len(fields)} columns; expected the nine of GFF3 or GTF, with tabs between them")
    try:
        start, stop = int(fields[3]), int(fields[4])
    except ValueError:
        raise ValueError(f"found '{fields[3]}' to '{fields[4]}'; expected two numbers of bases") from None
    if not 1 <= start <= stop:
        raise ValueError(f"found {start} to {stop}; expected 1 <= start <= end")
    if fields[6] not in _STRANDS:
        raise ValueError(f"found strand '{fields[6]}'; expected +, -, . or ?")
    said = fields[8] if len(fields) == 9 else ""
    found = _PARENT.search(said) or _TRANSCRIPT.search(said) or _OWN.search(said)
    parents = found[1].strip().split(",") if found else []
    return Feature(fields[0], fields[2], start - 1, stop, _STRANDS[fields[6]], parents)
