"""Videos inside webdataset tars. A member has a path of its own, ``shard.tar/key.mp4``, and is read where it lies."""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from seqlong.datamodules.shards import ShardIndex, open_index
from seqlong.errors import DataError

_KNOWN = 256  # tars whose members' names a process keeps


def tar_of(path: Path) -> Path | None:
    """The tar that a path leads into; None for a path of its own, or where there is no such tar."""
    for parent in path.parents:
        if parent.suffix.lower() == ".tar" and parent.is_file():
            return parent
    return None


def members(tar: Path, endings: Collection[str]) -> Iterator[Path]:
    """Paths of the members of a tar that have one of ``endings``, in its order.

    Raises:
        DataError: the tar cannot be used.
    """
    index = open_index(tar)
    wanted = [number for number, field in enumerate(index.fields) if f".{field}".lower().endswith(tuple(endings))]
    for place in range(index.samples):
        for number in wanted:
            if index.offset[place, number] >= 0:
                yield tar / f"{index.key(place)}.{index.fields[number]}"


def facts_of(path: Path) -> dict[str, Any]:
    """What the ``.json``, ``.cls`` and ``.txt`` of a member's sample say of it.

    Raises:
        DataError: JSON that cannot be read, or is no object.
    """
    tar = tar_of(path)
    assert tar is not None
    place, _ = _place(path, tar)
    index = open_index(tar)
    said: dict[str, Any] = {}
    for field in ("json", "cls", "label", "txt"):
        number = index.fields.index(field) if field in index.fields else -1
        if number < 0 or index.offset[place, number] < 0:
            continue
        text = _bytes(tar, int(index.offset[place, number]), int(index.size[place, number]))
        if field != "json":
            said["text" if field == "txt" else "label"] = text.decode("utf-8", "replace").strip()
            continue
        try:
            found = json.loads(text)
        except ValueError as error:
            raise DataError(f"{tar}: {index.key(place)}.json is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise DataError(f'{tar}: {index.key(place)}.json: expected an object such as {{"label": "cat"}}')
        said |= found
    return said


def span(path: Path) -> tuple[Path, int, int]:
    """Tar, first byte and number of bytes of a member.

    Raises:
        DataError: there is no such member.
    """
    tar = tar_of(path)
    if tar is None:
        raise DataError(f"{path}: there is no such file")
    place, number = _place(path, tar)
    index = open_index(tar)
    return tar, int(index.offset[place, number]), int(index.size[place, number])


def _place(path: Path, tar: Path) -> tuple[int, int]:
    """Sample and field of a member."""
    status = tar.stat()
    found = _places(tar, status.st_size, status.st_mtime_ns).get(str(path.relative_to(tar)))
    if found is None:
        raise DataError(f"{tar}: has no member {path.relative_to(tar)}")
    return found


@functools.lru_cache(maxsize=_KNOWN)
def _places(tar: Path, size: int, changed: int) -> dict[str, tuple[int, int]]:
    index: ShardIndex = open_index(tar)
    return {
        f"{index.key(place)}.{field}": (place, number)
        for place in range(index.samples)
        for number, field in enumerate(index.fields)
        if index.offset[place, number] >= 0
    }


def _bytes(tar: Path, offset: int, size: int) -> bytes:
    with tar.open("rb") as file:
        file.seek(offset)
        return file.read(size)


class Slice(io.RawIOBase):
    """A stretch of a file as a file: FFmpeg reads and seeks in it as if it stood alone.

    Args:
        path: the file.
        offset: first byte.
        size: number of bytes.
    """

    def __init__(self, path: Path, offset: int, size: int) -> None:
        super().__init__()
        self._file, self._offset, self._size, self._at = os.open(path, os.O_RDONLY), offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        left = max(0, self._size - self._at)
        found = os.pread(self._file, left if size < 0 else min(size, left), self._offset + self._at)
        self._at += len(found)
        return found

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()
