"""FASTA, streamed: records of any number and length in constant memory, even a chromosome on a single line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

from seqlong.datamodules.dna.alphabet import LEGAL
from seqlong.datamodules.dna.source import CHUNK, illegal_letters
from seqlong.errors import DataError, located

_BLANK = b" \t\r\n\v\f"
_ILLEGAL = re.compile(rb"[^" + LEGAL + re.escape(_BLANK) + rb"]")


@dataclass(frozen=True)
class Header:
    """The start of a record.

    Attributes:
        name: first word of the header.
        description: the rest of it.
        line: line number in the file, from 1.
        circular: True where the file says that the molecule is a ring (GenBank does).
    """

    name: str
    description: str
    line: int
    circular: bool = False


def read_fasta(
    file: BufferedIOBase, path: Path, chunk: int = CHUNK, any_letter: bool = False
) -> Iterator[Header | bytes]:
    """Yield each record's `Header` and then its bases, in pieces, without blanks.

    Args:
        file: decompressed bytes.
        path: named in errors.
        chunk: bytes to hold at a time.
        any_letter: leave it to the caller to judge letters, as of proteins.

    Raises:
        DataError: no header, a header without a name, a record without bases, protein, or an illegal character; with
            the line.
    """
    line, name, bases, last = 1, "", 0, b"\n"
    header: bytes | None = None  # the part read so far of a header line

    while data := file.read(chunk):
        position = 0
        while position < len(data):
            if header is not None:
                end = data.find(b"\n", position)
                header += data[position : end if end >= 0 else len(data)]
                if end < 0:
                    break
                found = _parse_header(header, path, line)
                name, header, position, last = found.name, None, end + 1, b"\n"
                line += 1
                yield found
            elif last == b"\n" and data[position : position + 1] == b">":
                if name and not bases:
                    raise _empty(path, line, name)
                header, bases, position = b"", 0, position + 1
            else:
                mark = data.find(b"\n>", position)
                end = mark + 1 if mark >= 0 else len(data)
                text = data[position:end]
                letters = text.translate(None, delete=_BLANK)
                if letters:
                    if not name:
                        raise _headless(path, line, text)
                    if not any_letter and letters.translate(None, delete=LEGAL):
                        raise _illegal(path, line, text, name)
                    bases += len(letters)
                    yield letters
                line += text.count(b"\n")
                position, last = end, text[-1:]
    if header is not None:
        found = _parse_header(header, path, line)
        yield found
        raise _empty(path, line, found.name)
    if not name:
        raise DataError(f"{path}: found only blank lines; expected FASTA, whose records begin with '>'")
    if not bases:
        raise _empty(path, line, name)


def _parse_header(header: bytes, path: Path, line: int) -> Header:
    text = header.rstrip(b"\r").decode("utf-8", errors="replace")
    if "\r" in text:
        raise DataError(located(path, line, "lines end in CR alone (old Mac); convert them to LF first"))
    if not text or text[0].isspace():
        raise DataError(located(path, line, "found a header without a name; expected '>name' at the line's beginning"))
    name = text.split(maxsplit=1)[0]
    return Header(name, text[len(name) :].strip(), line)


def _empty(path: Path, line: int, name: str) -> DataError:
    return DataError(located(path, line, f"record '{name}' has no bases before this line; remove it or mend the file"))


def _headless(path: Path, line: int, text: bytes) -> DataError:
    start = len(text) - len(text.lstrip(_BLANK))
    line += text[:start].count(b"\n")
    shown = text[start : start + 20].split(b"\n")[0].decode("utf-8", errors="replace").strip()
    return DataError(
        located(path, line, f"no header: found '{shown}' first; expected FASTA, whose records begin with '>name'")
    )


def _illegal(path: Path, line: int, text: bytes, name: str) -> DataError:
    match = _ILLEGAL.search(text)
    assert match is not None
    begin = text.rfind(b"\n", 0, match.start()) + 1
    end = text.find(b"\n", match.start())
    shown = text[begin : end if end >= 0 else len(text)].rstrip(b"\r").decode("latin-1")
    return illegal_letters(path, line + text[:begin].count(b"\n"), shown, name, match.start() - begin)
