"""What an interrupted command has done already: a file beside its output that grows batch by batch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from seqlong.errors import DataError

_MARK = b"#done "


class Journal:
    """Lines in batches. A batch counts once its last line, the mark, is on disk; what follows the last mark is cut off.

    ::

        #seqlong {"vcf": ..., "window": ...}     what the command was asked
        one\\ttwo                                 lines
        #done 256                                items that are done by now

    Args:
        path: where.
        asked: what the command was asked, JSON-able; a file of another command is not gone on with.

    Attributes:
        done: items that are done.

    Raises:
        DataError: the file is of another command.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        self.path, self.done = path, 0
        head = b"#seqlong " + json.dumps(asked, sort_keys=True).encode() + b"\n"
        end = 0
        if path.is_file():
            with path.open("rb") as file:
                first = file.readline()
                if first != head and first.endswith(b"\n"):
                    raise DataError(
                        f"{path} holds the beginning of another command's results:{_differences(first, head)} Give the "
                        "same flags to go on with it, remove it to start afresh, or choose another output"
                    )
                place = len(first)
                end = place if first == head else 0
                for line in file:
                    place += len(line)
                    if line.startswith(_MARK) and line.endswith(b"\n"):
                        self.done, end = int(line[len(_MARK) :]), place
        self._file = path.open("r+b" if path.is_file() else "w+b")
        self._file.truncate(end)
        self._file.seek(end)
        if not end:
            self._file.write(head)

    def add(self, lines: Sequence[str], done: int) -> None:
        """Write a batch, after which ``done`` items are done."""
        for line in lines:
            self._file.write(line.encode() + b"\n")
        self._file.write(_MARK + str(done).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done = done

    def lines(self) -> Iterator[str]:
        """All lines of all batches."""
        self._file.flush()
        with self.path.open("rb") as file:
            for line in file:
                if not line.startswith((_MARK, b"#seqlong ")):
                    yield line.decode().rstrip("\n")

    def remove(self) -> None:
        """The output is whole: nothing is left to go on with."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def identity(path: Path) -> list[str | int]:
    """What tells a file from another version of it, without reading it; its name alone if there is none."""
    if not path.is_file():
        return [str(path)]
    status = path.stat()
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]


def _differences(found: bytes, expected: bytes) -> str:
    try:
        one, two = (json.loads(line.partition(b" ")[2]) for line in (found, expected))
        different = [key for key in {**one, **two} if one.get(key) != two.get(key)]
    except (json.JSONDecodeError, AttributeError):
        return ""
    return "".join(f" {key} was {one.get(key)}, is {two.get(key)}." for key in different[:3])
