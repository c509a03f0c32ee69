"""Open a sequence file, plain or compressed, and say plainly what is wrong when it cannot be read."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path

from seqlong.datamodules.dna.alphabet import LETTERS, PROTEIN_LETTERS
from seqlong.errors import DataError, located, nearest

CHUNK = 1 << 20
_GZIP = b"\x1f\x8b"
_BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
_FOREIGN = {
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ": "xz-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"PK\x03\x04": "a zip archive",
    b"\x1a\x41\x27\x43": "a .2bit genome",
    b"\x43\x27\x41\x1a": "a .2bit genome",
    b"BAM\x01": "a BAM alignment",
    b"CRAM": "a CRAM alignment",
}
_EXPECTED = "expected a FASTA, FASTQ, GenBank or EMBL file, plain, gzip or bgzip"


class SourceFile(io.RawIOBase):
    """The decompressed bytes of ``path``, in constant memory.

    Args:
        path: file to read.
        progress: called with the number of bytes of the (compressed) file read so far.

    Raises:
        DataError: here or while reading: missing, empty, a folder, unreadable, truncated, damaged or not text.
    """

    def __init__(self, path: str | Path, progress: Callable[[int], None] | None = None) -> None:
        self.path = Path(path)
        self._progress = progress
        check_file(self.path)
        self._file = self.path.open("rb")
        head = self._file.read(18)
        self._file.seek(0)
        self._inflate = zlib.decompressobj(wbits=31) if head.startswith(_GZIP) else None
        self._given = 0
        if self._inflate is not None and head[12:14] == b"BC":
            self._check_bgzip_end()
        self._checked = False
        self._refuse_foreign(head)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def,override]
        data = self._read(len(buffer))
        if not self._checked:
            self._checked = True
            self._refuse_foreign(data)
            self._refuse_binary(data)
        buffer[: len(data)] = data
        self._given += len(data)
        if self._progress is not None:
            self._progress(self._file.tell())
        return len(data)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()

    def _read(self, size: int) -> bytes:
        if self._inflate is None:
            return self._file.read(size)
        while True:
            if self._inflate.eof:  # the next member of a file made of several, as bgzip's are
                rest = (self._inflate.unused_data or self._file.read(CHUNK)).lstrip(b"\0")
                if not rest:
                    return b""
                self._inflate = zlib.decompressobj(wbits=31)
            else:
                rest = self._inflate.unconsumed_tail or self._file.read(CHUNK)
                if not rest:
                    raise DataError(
                        f"{self.path}: the gzip data stop in the middle, after {self._given:,} bytes of text; the file "
                        "is truncated: copy or download it again"
                    )
            try:
                data = self._inflate.decompress(rest, size)
            except zlib.error as error:
                raise DataError(
                    f"{self.path}: the gzip data are damaged after {self._given:,} bytes of text ({error}); copy or "
                    "download the file again"
                ) from error
            if data:
                return data

    def _check_bgzip_end(self) -> None:
        # A bgzip file cut between two blocks decompresses without complaint; only its end marker tells.
        self._file.seek(0, io.SEEK_END)
        self._file.seek(max(0, self._file.tell() - len(_BGZF_END)))
        tail = self._file.read()
        self._file.seek(0)
        if tail != _BGZF_END:
            raise DataError(
                f"{self.path}: the bgzip end-of-file block is missing, so the file is truncated: copy or download it "
                "again"
            )

    def _refuse_foreign(self, head: bytes) -> None:
        for magic, what in _FOREIGN.items():
            if head.startswith(magic):
                raise DataError(f"{self.path}: found {what} file; {_EXPECTED}")

    def _refuse_binary(self, data: bytes) -> None:
        controls = data[:65536].translate(None, delete=bytes({*range(256)} - {*range(9), *range(14, 32)}))
        if controls:
            raise DataError(f"{self.path}: found a binary file (byte 0x{controls[0]:02x}); {_EXPECTED}")


class Lines:
    """A text handle, for Biopython, that knows which line it has reached. Blank lines at the beginning are left out."""

    def __init__(self, file: BufferedIOBase) -> None:
        self._file = file
        self.number = self.first = 0

    def readline(self) -> str:
        """The next line, with LF at its end; an empty string after the last."""
        while True:
            self.number += 1
            line = self._file.readline().decode("latin-1").replace("\r\n", "\n")
            if self.first or line.strip() or not line:
                self.first = self.first or self.number
                return line

    def __iter__(self) -> Iterator[str]:
        return iter(self.readline, "")

    def read(self, size: int) -> str:
        """Nothing: Biopython asks for no characters to see that this is text."""
        return ""


def check_file(path: Path) -> None:
    """Raise DataError, naming the nearest file or those in the folder, unless ``path`` is a file that is not empty."""
    if path.is_dir():
        found = sorted(entry.name for entry in path.iterdir() if entry.is_file())
        inside = f"it holds {', '.join(found[:5])}" if found else "it holds no files"
        raise DataError(f"{path}: found a folder ({inside}); {_EXPECTED}")
    if not path.exists():
        if not path.parent.is_dir():
            raise DataError(f"{path}: no such file; the folder {path.parent} does not exist either")
        names = [entry.name for entry in path.parent.iterdir()]
        raise DataError(f"{path}: no such file{nearest(path.name, names)}")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: may not be read: permission is denied; mend it with chmod")
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; {_EXPECTED}")


def illegal_letters(path: Path, line: int, text: str, name: str, column: int) -> DataError:
    """The error for a line of record ``name`` whose ``column`` (from 0) holds what is no nucleotide letter."""
    bad = text[column]
    if bad.upper() in PROTEIN_LETTERS:
        residues = sorted({letter for letter in text.upper() if letter in PROTEIN_LETTERS})
        return DataError(
            located(
                path,
                line,
                f"record '{name}' is protein: residues {', '.join(residues)} are not nucleotides; expected DNA or RNA",
            )
        )
    hint = "; remove the gaps of an alignment first" if bad in "-." else ""
    shown = repr(bad) if bad.isprintable() else f"byte 0x{ord(bad):02x}"
    return DataError(
        located(
            path,
            line,
            f"illegal character {shown} at column {column + 1} of record '{name}'; expected the letters {LETTERS} in "
            f"either case{hint}",
        )
    )
