"""Files to documents, in pieces, so that none must fit memory. Text is one; JSON lines, Parquet, tars hold many."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.shards import Shards
from seqlong.datamodules.text.files import CHUNK, kind_of, open_bytes
from seqlong.errors import DataError, located, nearest

Unreadable = Literal["error", "skip", "replace"]
#: The longest line of JSON: it has to be parsed whole.
LONGEST_ROW = 1 << 29
_NAMED = 5
_BOM = codecs.BOM_UTF8
#: Fields of a sample of a tar that hold its text, the best first.
_TAR_TEXT = ("txt", "md", "text")
_TAR_TOKENS = ("tokens.npy", "npy")


class Start(NamedTuple):
    """A document begins.

    Attributes:
        row: which of its file's it is, from 1: a line of JSON, a row of Parquet, a sample of a tar. 0: the whole file.
    """

    row: int


class Drop(NamedTuple):
    """The document that was begun last counts for nothing."""


#: What a reader yields: a document's start, its UTF-8 bytes or its tokens in pieces, or that it was a mistake.
Event = Start | bytes | NDArray[np.integer[Any]] | Drop


@dataclass
class Tally:
    """What was left out or changed while reading, and the names of the first few.

    Attributes:
        counts: reason to number of documents.
        names: reason to ``file:row`` of the first.
    """

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, path: Path | str, row: int) -> None:
        """Count one."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        shown = self.names.setdefault(reason, [])
        if len(shown) < _NAMED:
            shown.append(f"{path}:{row}" if row else str(path))


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        field: field of a row of JSON or column of a Parquet file that holds the text.
        unreadable: what to do with a document whose bytes are not UTF-8, or a row that is not what it should be:
            ``error``; ``skip`` the document; ``replace`` bytes that cannot be decoded by U+FFFD, which mends the first
            kind alone.
    """

    field: str = "text"
    unreadable: Unreadable = "error"


def read_documents(
    path: Path, reading: Reading, tally: Tally, progress: Callable[[int], None] | None = None
) -> Iterator[Event]:
    """Yield each document of a file: its `Start`, then its text in pieces of UTF-8, or its tokens.

    Args:
        path: the file.
        reading: how to read it.
        tally: takes note of what is skipped or replaced. Documents without text are counted by whoever writes them.
        progress: called with the bytes of the file read so far.

    Raises:
        DataError: anything wrong with the file, with the line or row.
    """
    kind = kind_of(path)
    if reading.unreadable == "skip" and path.stat().st_size == 0:
        tally.add("empty, skipped", path, 0)
    elif kind == "parquet":
        yield from _parquet(path, reading, tally, progress)
    elif kind == "tar":
        yield from _tar(path, reading, tally, progress)
    elif kind == "jsonl":
        with open_bytes(path, progress) as file:
            yield from _jsonl(path, file, reading, tally)
    else:
        yield Start(0)
        try:
            with open_bytes(path, progress) as file:
                yield from _decoded(path, file, reading, tally, 0)
        except DataError:
            if reading.unreadable != "skip":
                raise
            tally.add("no text in UTF-8, or cut off, skipped", path, 0)
            yield Drop()


def _decoded(path: Path, file: io.BufferedIOBase, reading: Reading, tally: Tally, row: int) -> Iterator[Event]:
    """The bytes of a stream, checked to be UTF-8; no more than a piece in memory, however long its lines are."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    done, lines, replaced, first = 0, 0, False, True
    while True:
        piece = file.read(CHUNK)
        if first:
            first = False
            if b"\0" in piece[:65536]:
                raise DataError(f"{path}: found a binary file (it has zero bytes); expected text in UTF-8")
            if piece.startswith(_BOM):
                piece, done = piece[len(_BOM) :], done + len(_BOM)
        held = decoder.getstate()[0]
        try:
            decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            if reading.unreadable == "skip":
                tally.add("not UTF-8, skipped", path, row)
                yield Drop()
                return
            if reading.unreadable == "error":
                raise _undecodable(path, row, done - len(held), lines, held + piece, error) from error
            if not replaced:
                replaced = True
                tally.add("not UTF-8, bytes replaced by U+FFFD", path, row)
            text, used = codecs.utf_8_decode(held + piece, "replace", not piece)
            yield text.encode()
            decoder.setstate(((held + piece)[used:], 0))
        else:
            # What the decoder holds back is the beginning of a letter; the rest of it comes with the next piece.
            kept = decoder.getstate()[0]
            whole = held + piece
            if len(whole) > len(kept):
                yield whole[: len(whole) - len(kept)]
        if not piece:
            return
        done += len(piece)
        lines += piece.count(b"\n")


def _undecodable(path: Path, row: int, start: int, lines: int, data: bytes, error: UnicodeDecodeError) -> DataError:
    line = None if row else lines + 1 + data[: error.start].count(b"\n")
    where = f"sample {row}, " if row else ""
    return DataError(
        located(
            path,
            line,
            f"{where}byte {start + error.start:,} (0x{data[error.start]:02x}) is not UTF-8; convert the file (iconv -f "
            "LATIN1 -t UTF-8), or set data.unreadable to skip or replace",
        )
    )


def _jsonl(path: Path, file: io.BufferedIOBase, reading: Reading, tally: Tally) -> Iterator[Event]:
    line = 0
    while True:
        row = file.readline(LONGEST_ROW + 1)
        if not row:
            return
        line += 1
        if len(row) > LONGEST_ROW:
            raise DataError(
                located(
                    path,
                    line,
                    f"the row is longer than {LONGEST_ROW >> 20} MiB; put a document of that size into a .txt file",
                )
            )
        if line == 1:
            row = row.removeprefix(_BOM)
        if not row.strip():
            continue
        yield from _row_text(path, line, row, reading, tally)


def _row_text(path: Path, line: int, row: bytes, reading: Reading, tally: Tally) -> Iterator[Event]:
    """The text in a row of JSON: a line of a file, or the field of a sample of a tar."""
    replaced = False
    try:
        try:
            value = json.loads(row)
        except UnicodeDecodeError as error:
            if reading.unreadable != "replace":
                raise DataError(
                    located(
                        path,
                        line,
                        f"byte {error.start:,} of the row (0x{row[error.start]:02x}) is not UTF-8; convert the file, "
                        "or set data.unreadable to skip or replace",
                    )
                ) from error
            value, replaced = json.loads(row.decode("utf-8", "replace")), True
        text = _member(path, line, value, reading.field)
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a pair of surrogates, which JSON can spell
            if reading.unreadable != "replace":
                raise DataError(
                    located(
                        path,
                        line,
                        f"'{reading.field}' has half a surrogate pair at character {error.start:,}; set "
                        "data.unreadable to skip or replace",
                    )
                ) from error
            text, replaced = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), True
    except json.JSONDecodeError as error:
        if reading.unreadable != "skip":
            raise DataError(
                located(path, line, f"the row is not JSON ({error.msg} at column {error.colno}); one object a line")
            ) from error
        tally.add("not JSON, skipped", path, line)
        return
    except DataError:
        if reading.unreadable != "skip":
            raise
        tally.add("row without text, or not UTF-8, skipped", path, line)
        return
    if replaced:
        tally.add("not UTF-8, bytes replaced by U+FFFD", path, line)
    yield Start(line)
    for start in range(0, len(text), CHUNK):  # not of bytes, so that no letter is cut in two
        yield text[start : start + CHUNK].encode()


def _member(path: Path, line: int, value: Any, name: str) -> str:
    if not isinstance(value, dict):
        raise DataError(located(path, line, f"the row is a {type(value).__name__}, expected an object with '{name}'"))
    if name not in value:
        has = ", ".join(map(str, list(value)[:8])) or "nothing"
        raise DataError(
            located(path, line, f"the row has no field '{name}'{nearest(name, value)} (it has {has}); set data.field")
        )
    text = value[name]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(located(path, line, f"'{name}' is a {type(text).__name__}, expected text; set data.field"))
    return text


def _parquet(path: Path, reading: Reading, tally: Tally, progress: Callable[[int], None] | None) -> Iterator[Event]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'seqlong[parquet]'") from error
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; expected Parquet")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if reading.field not in names:
                raise DataError(
                    f"{path}: there is no column '{reading.field}'{nearest(reading.field, names)} (there are "
                    f"{', '.join(names[:12])}); set data.field"
                )
            kind = file.schema_arrow.field(reading.field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f"{path}: column '{reading.field}' holds {kind}, expected strings; set data.field")
            row, rows = 0, file.metadata.num_rows
            for batch in file.iter_batches(256, columns=[reading.field]):
                for cell in batch.column(0):
                    row += 1
                    # The writer of the file vouches for its strings, but not every writer keeps its word.
                    view = cell.as_buffer()
                    yield Start(row)
                    yield from _decoded_row(path, b"" if view is None else view.to_pybytes(), reading, tally, row)
                if progress is not None and rows:
                    progress(path.stat().st_size * row // rows)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]}); copy it again") from error


def _decoded_row(path: Path, data: bytes, reading: Reading, tally: Tally, row: int) -> Iterator[Event]:
    yield from _decoded(path, io.BytesIO(data), reading, tally, row)


def _tar(path: Path, reading: Reading, tally: Tally, progress: Callable[[int], None] | None) -> Iterator[Event]:
    shards = Shards([path])
    index = shards.indexes[0]
    try:
        for number in range(len(shards)):
            there = {name for at, name in enumerate(index.fields) if index.offset[number, at] >= 0}
            text = next((name for name in _TAR_TEXT if name in there), None)
            tokens = next((name for name in _TAR_TOKENS if name in there), None)
            where = f"{path}: sample '{index.key(number)}'"
            if text is not None:
                yield Start(number + 1)
                yield from _decoded_row(path, shards.read(number, text), reading, tally, number + 1)
            elif tokens is not None:
                yield Start(number + 1)
                yield _token_array(where, shards.read(number, tokens))
            elif "json" in there:
                yield from _row_text(path, number + 1, shards.read(number, "json"), reading, tally)
            elif reading.unreadable == "skip":
                tally.add("sample without text, skipped", path, number + 1)
            else:
                raise DataError(
                    f"{where} has no text: it has {', '.join(sorted(there))}; expected one of "
                    f"{', '.join((*_TAR_TEXT, 'json', *_TAR_TOKENS))}, or set data.unreadable=skip"
                )
            if progress is not None:
                progress(int(index.offset[number].max()))
    finally:
        shards.close()


def _token_array(where: str, data: bytes) -> NDArray[np.integer[Any]]:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{where}: its token array cannot be read as .npy ({error})") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"{where}: found an array {array.dtype}{list(array.shape)}, expected (tokens) of whole numbers")
    return array
