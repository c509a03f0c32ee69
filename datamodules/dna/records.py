"""Labelled sequences from CSV, TSV, Parquet, JSON lines or FASTA with the label in the header, held in flat arrays."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.dna.alphabet import LEGAL, LETTERS, is_unknown
from seqlong.datamodules.dna.fasta import Header
from seqlong.datamodules.dna.proteins import ReverseTranslation
from seqlong.datamodules.dna.sequences import read_sequences
from seqlong.datamodules.dna.source import check_file
from seqlong.errors import ConfigError, DataError, located, nearest

#: What columns are called where nobody says.
SEQUENCE_NAMES = ("sequence", "seq", "dna", "rna", "protein", "dna_sequence", "dna_seq", "text")
LABEL_NAMES = ("label", "labels", "class", "target", "y", "value", "activity", "score")

Bad = Literal["error", "drop"]
Column = str | int | None
_UPPER = bytes.maketrans(b"abcdefghijklmnopqrstuvwxyz", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ")


@dataclass
class Records:
    """Labelled sequences.

    Attributes:
        bases: ``(t)`` uint8, the upper-case letters of all sequences, one after another.
        starts: ``(n)`` int64, where each record begins.
        ends: ``(n)`` int64, where it ends (exclusive). Records may share bases.
        labels: what the file says of each, a cell for each label column.
        lines: ``(n)`` int64, the line (or row) of each in its file, from 1.
        files: ``(n)`` int64, which of ``paths`` it is from.
        paths: the files.
        dropped: what was wrong with each record left out, for the reader.
    """

    bases: NDArray[np.uint8]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    labels: list[tuple[str, ...]]
    lines: NDArray[np.int64]
    files: NDArray[np.int64]
    paths: list[Path]
    dropped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``(n)`` bases of each record."""
        return self.ends - self.starts

    def sequence(self, number: int) -> NDArray[np.uint8]:
        """The letters of a record."""
        return self.bases[self.starts[number] : self.ends[number]]

    def where(self, number: int) -> str:
        """``file:line`` of a record."""
        return f"{self.paths[self.files[number]].name}:{self.lines[number]}"

    def located(self, number: int, message: str) -> DataError:
        """An error about a record."""
        return DataError(located(self.paths[self.files[number]], int(self.lines[number]), message))

    def take(self, numbers: NDArray[np.int64]) -> Records:
        """Some of the records; the bases are shared."""
        return Records(
            self.bases,
            self.starts[numbers],
            self.ends[numbers],
            [self.labels[number] for number in numbers.tolist()],
            self.lines[numbers],
            self.files[numbers],
            self.paths,
            self.dropped,
        )


def read_records(
    paths: str | Path | Sequence[str | Path],
    sequence: Column = None,
    label: Column | list[str] | list[int] = None,
    bad: Bad = "error",
    unlabelled: bool = False,
    protein: ReverseTranslation | None = None,
) -> Records:
    """Read labelled sequences.

    Args:
        paths: file or files: CSV, TSV, Parquet, JSON lines, FASTA, FASTQ, GenBank or EMBL; all but
            Parquet may be gzipped.
        sequence: name or number (from 0) of the column with the sequence; null finds it by its name or its letters.
        label: name or number of the column or columns with the label; null finds it. For FASTA: null is the last word
            of the header (or what follows its last ``|``), a number is that word of it, ``file`` is the file's name
            without endings, and a regular expression with one group is searched for in it.
        bad: what to do with a record that has no label, no bases or illegal letters: ``error``, or ``drop`` it (counted
            and reported).
        unlabelled: read sequences only.
        protein: the sequences are proteins, and this makes bases of them; None: bases.

    Raises:
        DataError: no such file, no such column, a bad record; with file and line.
    """
    listed = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not listed:
        raise ConfigError("found an empty list of files of labelled sequences; expected at least one")
    pieces: list[bytes] = []
    lengths: list[int] = []
    labels: list[tuple[str, ...]] = []
    lines: list[int] = []
    files: list[int] = []
    dropped: list[str] = []
    for number, path in enumerate(listed):
        check_file(path)
        for line, text, cells in _rows(path, sequence, label, unlabelled, protein is not None):
            letters = text.translate(_UPPER)
            problem = ""
            if protein is not None:
                if found := protein.problem(letters):
                    problem = f"residue {found[0] + 1} of the protein: {found[1]}"
                letters = protein.bases(letters)
            problem = problem or _problem(letters, cells, unlabelled)
            if problem and bad == "error":
                hint = "; data.bad=drop leaves such records out, and counts them"
                raise DataError(located(path, line, problem + hint))
            if problem:
                dropped.append(located(path.name, line, problem))
                continue
            pieces.append(letters)
            lengths.append(len(letters))
            labels.append(cells)
            lines.append(line)
            files.append(number)
    if not lengths:
        raise DataError(f"{listed[0]}: no labelled sequence in it ({len(dropped)} dropped)")
    ends = np.cumsum(np.array(lengths, dtype=np.int64))
    bases = np.frombuffer(b"".join(pieces), dtype=np.uint8)
    starts = ends - np.array(lengths, dtype=np.int64)
    rows, sources = np.array(lines, dtype=np.int64), np.array(files, dtype=np.int64)
    return Records(bases, starts, ends, labels, rows, sources, listed, dropped)


def _problem(letters: bytes, cells: tuple[str, ...], unlabelled: bool) -> str:
    if not letters:
        return "the sequence is empty"
    wrong = letters.translate(None, delete=LEGAL)
    if wrong:
        place = letters.index(wrong[:1])
        shown = repr(chr(wrong[0])) if 32 < wrong[0] < 127 else f"byte 0x{wrong[0]:02x}"
        return f"illegal letter {shown} at position {place + 1} of the sequence; expected {LETTERS} in either case"
    if not unlabelled and any(cell == "" or cell.lower() in ("nan", "na", "none", "null") for cell in cells):
        return "the label is missing"
    return ""


def unknown_letters(name: str, records: Records) -> list[str]:
    """What letters other than A, C, G, T and U there are, in a sentence; nothing where there are none."""
    whole = np.flatnonzero(is_unknown(records.bases))
    first, last = np.searchsorted(whole, records.starts), np.searchsorted(whole, records.ends)
    holed = np.flatnonzero(last > first)
    if not holed.size:
        return []
    number = int(holed[0])
    letter = chr(records.bases[whole[first[number]]])
    return [
        f"{name}: {int((last - first).sum()):,} letters are not A, C, G, T or U, in {holed.size:,} records; read as "
        f"unknown. The first: '{letter}' at base {int(whole[first[number]] - records.starts[number]) + 1} of "
        f"{records.where(number)}."
    ]


_Row = tuple[int, bytes, tuple[str, ...]]


def _rows(path: Path, sequence: Column, label: Any, unlabelled: bool, protein: bool = False) -> Iterator[_Row]:
    """``(line, sequence, labels)`` of each record of any kind of file."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".bgz")
    if name.endswith((".parquet", ".pq")):
        yield from _table(path, _parquet(path), sequence, label, unlabelled)
    elif name.endswith((".jsonl", ".ndjson", ".json")):
        yield from _table(path, _jsonl(path), sequence, label, unlabelled)
    elif name.endswith((".csv", ".tsv", ".txt", ".tab", ".data")):
        yield from _table(path, _separated(path), sequence, label, unlabelled)
    else:
        yield from _fasta(path, label, unlabelled, protein)


# --- FASTA -----------------------------------------------------------------------------------------------------------


def _fasta(path: Path, label: Any, unlabelled: bool, protein: bool) -> Iterator[_Row]:
    header: Header | None = None
    parts: list[bytes] = []
    for item in read_sequences(path, any_letter=protein):
        if not isinstance(item, Header):
            parts.append(item)
            continue
        if header is not None:
            yield header.line, b"".join(parts), _header_label(path, header, label, unlabelled)
        header, parts = item, []
    if header is not None:
        yield header.line, b"".join(parts), _header_label(path, header, label, unlabelled)


def _header_label(path: Path, header: Header, label: Any, unlabelled: bool) -> tuple[str, ...]:
    if unlabelled:
        return ()
    if label == "file":
        return (path.name.split(".")[0],)
    words = [header.name, *header.description.split()]
    whole = " ".join(words)
    if isinstance(label, int):
        if not -len(words) <= label < len(words):
            raise DataError(located(path, header.line, f"data.label={label}, but the header has {len(words)} words"))
        return (words[label],)
    if isinstance(label, str) and "(" in label:
        try:
            found = re.search(label, whole)
        except re.error as error:
            raise ConfigError(f"data.label={label} is no regular expression: {error}") from error
        if found is None:
            raise DataError(located(path, header.line, f"'{whole}' does not match data.label={label}"))
        return (found.group(1),)
    if isinstance(label, str | list):
        raise ConfigError(
            f"data.label={label}: for FASTA give the number of a word of the header, 'file', or a regular expression "
            "with one group"
        )
    if len(words) > 1:
        return (words[-1],)
    _, bar, after = whole.rpartition("|")
    if not bar:
        raise DataError(
            located(
                path,
                header.line,
                f"the header '{whole}' has no label; expected '>name label' or '>name|label'. data.label says where it "
                "is: a word's number, 'file', or a regular expression with one group",
            )
        )
    return (after,)


# --- tables ----------------------------------------------------------------------------------------------------------


def _table(
    path: Path, rows: Iterable[tuple[int, Any]], sequence: Column, label: Any, unlabelled: bool
) -> Iterator[_Row]:
    """Rows are lists of cells, the first of them perhaps names, or dictionaries."""
    chosen: tuple[Any, list[Any]] | None = None
    first: Any
    others: list[Any]
    for line, row in rows:
        if chosen is None:
            if isinstance(row, dict):
                chosen = _columns(path, line, list(row), sequence, label, unlabelled)
            else:
                cells = [cell.strip() for cell in row]
                names = _names(cells, sequence)
                if names is not None:
                    first, others = _columns(path, line, cells, sequence, label, unlabelled)
                    chosen = (cells.index(first), [cells.index(name) for name in others])
                    continue
                chosen = _by_letters(path, line, cells, sequence, label, unlabelled)
        first, others = chosen
        try:
            text, found = row[first], tuple(_cell(row[other]) for other in others)
        except (IndexError, KeyError) as error:
            raise DataError(located(path, line, f"found {len(row)} columns; the first row has more")) from error
        if not isinstance(text, str):
            raise DataError(located(path, line, f"the sequence is {text!r}; expected a string of bases"))
        yield line, text.strip().encode("latin-1", errors="replace"), found


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list | tuple):
        return ";".join(map(str, value))
    return str(value).strip()


def _names(cells: list[str], sequence: Column) -> list[str] | None:
    """The cells, if they are names of columns and not a record."""
    if isinstance(sequence, str) and sequence in cells:
        return cells
    if any(cell.lower() in SEQUENCE_NAMES for cell in cells):
        return cells
    letters = max((cell for cell in cells if _bases(cell)), key=len, default="")
    return None if letters or isinstance(sequence, int) else cells


def _bases(cell: str) -> bool:
    text = cell.encode("latin-1", errors="replace")
    return len(text) > 3 and not text.translate(None, delete=LEGAL)


def _columns(
    path: Path, line: int, names: list[str], sequence: Column, label: Any, unlabelled: bool
) -> tuple[str, list[str]]:
    """The names of the columns with the sequence and with the labels."""
    first = _one(path, line, names, sequence, SEQUENCE_NAMES, "sequence")
    if unlabelled:
        return first, []
    if isinstance(label, list):
        return first, [_one(path, line, names, one, (), "label") for one in label]
    return first, [_one(path, line, names, label, LABEL_NAMES, "label")]


def _one(path: Path, line: int, names: list[str], wanted: Column, known: tuple[str, ...], what: str) -> str:
    if isinstance(wanted, int):
        if not -len(names) <= wanted < len(names):
            raise DataError(located(path, line, f"data.{what}={wanted}, but there are {len(names)} columns"))
        return names[wanted]
    if wanted is not None:
        if wanted not in names:
            raise DataError(
                located(path, line, f"no column '{wanted}'{nearest(wanted, names)}; the columns: {', '.join(names)}")
            )
        return wanted
    lower = [name.lower() for name in names]
    for name in known:
        if name in lower:
            return names[lower.index(name)]
    raise DataError(
        located(path, line, f"no column is called {', '.join(known)}; say which has the {what}: data.{what}=NAME. The "
                f"columns: {', '.join(names)}")
    )  # fmt: skip


def _by_letters(
    path: Path, line: int, cells: list[str], sequence: Column, label: Any, unlabelled: bool
) -> tuple[int, list[int]]:
    """Numbers of the columns of a table without names."""
    first = sequence
    if not isinstance(first, int):
        if first is not None:
            raise DataError(located(path, line, f"no column names in the first line, so there is no '{first}'; give a "
                                    "number: data.sequence=0"))  # fmt: skip
        first = max(range(len(cells)), key=lambda n: len(cells[n]) if _bases(cells[n]) else -1)
    wanted = label if isinstance(label, list) else [label]
    if unlabelled:
        return first, []
    if wanted == [None]:
        wanted = [next((n for n in range(len(cells)) if n != first), -1)]
    for one in wanted:
        if not isinstance(one, int) or not -len(cells) <= one < len(cells) or one == first:
            raise DataError(
                located(path, line, f"data.label={one} is no other column's number; the first line has {len(cells)} "
                        "columns and no names")
            )  # fmt: skip
    return first, list(wanted)


def _text(path: Path) -> Iterator[str]:
    """Lines of a plain or gzipped text file."""
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rb") if zipped else path.open("rb") as file:
            yield from io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: the gzip file is damaged or cut short ({error}); copy or download it again"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: this is no text in UTF-8 ({error.reason}); expected a table of sequences") from error


def _separated(path: Path) -> Iterator[tuple[int, list[str]]]:
    lines = _text(path)
    first = next(lines, "")
    separator = "\t" if first.count("\t") else ("," if first.count(",") else ";")

    def every() -> Iterator[str]:
        yield first
        yield from lines

    before = csv.field_size_limit(2**31 - 1)  # sequences are longer than what it thinks a cell can be
    try:
        reader = csv.reader(every(), delimiter=separator)
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(located(path, reader.line_num, f"this is no table: {error}")) from error
    finally:
        csv.field_size_limit(before)


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                located(path, number, f"this is no JSON: {error.msg}; expected an object on each line")
            ) from error
        if not isinstance(row, dict):
            raise DataError(located(path, number, f"found {type(row).__name__}; expected an object on each line"))
        yield number, row


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError(f"{path}: Parquet needs pyarrow; pip install 'seqlong[parquet]'") from error
    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(4096):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except arrow.ArrowInvalid as error:
        raise DataError(f"{path}: this is no Parquet file: {str(error).splitlines()[0]}") from error
