"""Which files a path stands for, and their decompressed bytes; says plainly what is wrong when one cannot be read."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import zstandard

from seqlong.datamodules import remote
from seqlong.errors import DataError, nearest

CHUNK = 1 << 20
Kind = Literal["text", "jsonl", "parquet", "tar"]
#: Suffix -> what a file holds. In a folder or a glob other files are left out, and named.
KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".tar": "tar",
}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_ZSTD_CHUNK = 1 << 14  # of compressed bytes: they may grow a thousandfold
_FOREIGN = {
    b"\x1f\x8b": "gzip-compressed data; call it .gz",
    b"\x28\xb5\x2f\xfd": "zstd-compressed data; call it .zst",
    b"BZh": "bzip2-compressed data; call it .bz2",
    b"\xfd7zXZ": "xz-compressed data; call it .xz",
    b"PK\x03\x04": "a zip archive (or an office document); unpack it, and save its text as .txt",
    b"%PDF": "a PDF; take its text out first (pdftotext)",
    b"PAR1": "a Parquet file; call it .parquet",
    b"\xff\xfe": "UTF-16 text; convert it first (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16 text; convert it first (iconv -f UTF-16 -t UTF-8)",
}


def kind_of(path: Path) -> Kind | None:
    """What a file holds by its name; None for a name that says nothing."""
    name = path.name.lower()
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return KINDS.get(Path(name).suffix)


def find_files(paths: str | Iterable[str]) -> tuple[list[Path], list[Path]]:
    """Files that ``paths`` stand for, in a fixed order, and those in their folders that are not text.

    A folder stands for all files below it with a known suffix (see `KINDS`, compressed or not), hidden ones left out; a
    pattern (``*``, ``?``, ``[...]``, ``**``) for what matches; a file for itself, as text if its suffix is unknown. A
    URL (``s3://``, ``gs://``, ``https://``), which may be a pattern, stands for copies in the cache.

    Raises:
        DataError: nothing there, or no such file.
    """
    given = [paths] if isinstance(paths, str) else list(paths)
    if not given:
        raise DataError("path: found an empty list; expected files, folders or patterns")
    found: dict[Path, None] = {}
    left: list[Path] = []
    for text in given:
        if remote.is_url(text):
            urls = remote.find(text)
            known = [url for url in urls if len(urls) == 1 or kind_of(Path(url)) is not None]
            left += [Path(url) for url in urls if url not in known]
            found.update(dict.fromkeys(remote.fetched(url) for url in known))
            continue
        path = Path(text).expanduser()
        if path.is_dir():
            inside = [entry for entry in _below(path) if entry.stat().st_size or kind_of(entry)]
            kept = [entry for entry in inside if kind_of(entry) is not None]
            left += [entry for entry in inside if kind_of(entry) is None]
            if not kept:
                names = ", ".join(entry.name for entry in inside[:5]) or "nothing"
                raise DataError(f"{path}: the folder holds no text ({names}); expected {_suffixes()}")
        elif path.exists():
            kept = [path]
        elif glob.has_magic(str(path)):
            entries = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
            kept = [entry for entry in entries if entry.is_file() and kind_of(entry) is not None]
            left += [entry for entry in entries if entry.is_file() and kind_of(entry) is None]
            if not kept:
                raise DataError(f"{path}: no file with a known suffix matches; expected {_suffixes()}")
        else:
            if not path.parent.is_dir():
                raise DataError(f"{path}: no such file; the folder {path.parent} does not exist either")
            there = [entry.name for entry in path.parent.iterdir()]
            raise DataError(f"{path}: no such file{nearest(path.name, there)}")
        found.update(dict.fromkeys(kept))
    return list(found), left


@contextmanager
def open_bytes(path: Path, progress: Callable[[int], None] | None = None) -> Iterator[io.BufferedIOBase]:
    """The decompressed bytes of a file, in constant memory.

    Args:
        path: plain, ``.gz``, ``.zst``, ``.bz2`` or ``.xz``.
        progress: called with the bytes of the (compressed) file read so far.

    Raises:
        DataError: here or while reading: empty, unreadable, truncated, damaged, or something else than its name says.
    """
    try:
        raw = _Counted(path, progress)
    except PermissionError as error:
        raise DataError(f"{path}: may not be read: permission is denied; mend it with chmod") from error
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; expected text. Delete it, or set data.unreadable=skip")
    suffix = path.suffix.lower()
    try:
        if suffix == ".zst":
            yield io.BufferedReader(_Zstd(raw), CHUNK)
        elif suffix in COMPRESSIONS:
            opened: Any = {".gz": gzip.GzipFile, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}[suffix]
            packed = opened(fileobj=raw) if suffix == ".gz" else opened(raw)
            yield io.BufferedReader(packed, CHUNK)
        else:
            buffered = io.BufferedReader(raw, CHUNK)
            _refuse_foreign(path, buffered.peek(8)[:8])
            yield buffered
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError) as error:
        raise _damaged(path, raw.tell(), error) from error
    except OSError as error:  # bz2 has no error of its own
        if error.errno is None:
            raise _damaged(path, raw.tell(), error) from error
        raise
    finally:
        raw.close()


class _Counted(io.FileIO):
    def __init__(self, path: Path, progress: Callable[[int], None] | None) -> None:
        super().__init__(path, "rb")
        self._progress = progress

    def readinto(self, buffer) -> int | None:  # type: ignore[no-untyped-def,override]
        count = super().readinto(buffer)
        if self._progress is not None:
            self._progress(self.tell())
        return count


class _Zstd(io.RawIOBase):
    """zstandard's own reader takes a file that was cut off for one that has ended."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw, self._decompressor = raw, zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._ready = memoryview(b"")
        self._rest = b""
        self._fresh = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def,override]
        while not self._ready:
            block = self._rest or self._raw.read(_ZSTD_CHUNK)
            self._rest = b""
            if not block:
                if not self._fresh:
                    raise EOFError("the data stop inside a frame")
                return 0
            self._fresh = False
            self._ready = memoryview(self._frame.decompress(block))
            if self._frame.eof:
                self._rest, self._fresh = self._frame.unused_data, True
                self._frame = self._decompressor.decompressobj()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _below(folder: Path) -> list[Path]:
    found = []
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(base) / name for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file() and not path.name.endswith(".tar.idx"))


def _suffixes() -> str:
    return f"{', '.join(KINDS)}, all but the last two also with {', '.join(COMPRESSIONS)}"


def _refuse_foreign(path: Path, head: bytes) -> None:
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"{path}: found {what}")


def _damaged(path: Path, place: int, error: BaseException) -> DataError:
    what = "stop in the middle: the file is truncated" if isinstance(error, EOFError) else f"are damaged ({error})"
    return DataError(f"{path}: the compressed data {what}, at byte {place:,}; copy or download it again")
