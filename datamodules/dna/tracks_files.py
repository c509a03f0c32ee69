"""Signals along a genome, from bigWig, bedGraph, wig or a table of positions: values of any stretch, NaN where none."""

from __future__ import annotations

import gzip
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqlong.errors import ConfigError, DataError, located

Values = NDArray[np.float32]
_KINDS = {
    ".bw": "bigWig",
    ".bigwig": "bigWig",
    ".wig": "wig",
    ".bedgraph": "bedGraph",
    ".bdg": "bedGraph",
    ".bg": "bedGraph",
    ".tsv": "table",
    ".csv": "table",
    ".txt": "table",
}
_EXPECTED = "expected bigWig (.bw), bedGraph, wig, or a table of positions (.tsv, .csv), the last three plain or gzip"
_LINES = 1 << 15
_SPARE = ("track", "browser", "#")


@dataclass(frozen=True)
class Lowest:
    """The smallest value of a signal, and where it stands."""

    value: float
    where: str


class Signal(ABC):
    """Values along contigs, by the names that the file has for them.

    Attributes:
        path: the file.
        name: what the track is called.
        lowest: its smallest value.
    """

    path: Path
    name: str
    lowest: Lowest

    @abstractmethod
    def contigs(self) -> dict[str, tuple[int, bool, str]]:
        """For each contig: its length, or the last base that has a value; whether it is the length; and where it is
        said (a line), for messages."""

    @abstractmethod
    def read(self, contig: str, start: int, stop: int) -> Values:
        """``(t)`` values of bases ``start`` to ``stop``, within the contig; NaN where the file has none."""


class BigWig(Signal):
    """A bigWig, of which any stretch is read when it is asked for."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._file: Any = None
        self._process = -1
        head = self._open().header()
        self._lengths: dict[str, int] = dict(self._open().chroms())
        if not head["nBasesCovered"]:
            raise DataError(f"{path}: the bigWig has no values; expected a signal along a genome")
        self.lowest = Lowest(float(head["minVal"]), str(path))

    def _open(self) -> Any:
        if self._process != os.getpid():  # a worker has a place in the file of its own
            self._file, self._process = _bigwig_library().open(str(self.path)), os.getpid()
        return self._file

    def contigs(self) -> dict[str, tuple[int, bool, str]]:
        return {name: (length, True, str(self.path)) for name, length in self._lengths.items()}

    def read(self, contig: str, start: int, stop: int) -> Values:
        return np.asarray(self._open().values(contig, start, stop, numpy=True), dtype=np.float32)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_process": -1}


class Intervals(Signal):
    """Intervals of a text file, in memory: 20 bytes each.

    Args:
        path: the file.
        name: of the track.
        parts: contig -> its starts, stops and values, sorted, none overlapping.
        ends: contig -> the largest stop and the line that has it.
        lowest: the smallest value.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        parts: dict[str, tuple[NDArray[np.int64], NDArray[np.int64], Values]],
        ends: dict[str, tuple[int, int]],
        lowest: Lowest,
    ) -> None:
        self.path, self.name, self.lowest = path, name, lowest
        self._parts, self._ends = parts, ends

    def contigs(self) -> dict[str, tuple[int, bool, str]]:
        return {name: (stop, False, f"{self.path}:{line}") for name, (stop, line) in self._ends.items()}

    def read(self, contig: str, start: int, stop: int) -> Values:
        found = np.full(stop - start, np.nan, dtype=np.float32)
        if contig not in self._parts:
            return found
        starts, stops, values = self._parts[contig]
        low, high = np.searchsorted(stops, start, side="right"), np.searchsorted(starts, stop, side="left")
        if low >= high:
            return found
        begin = np.maximum(starts[low:high], start) - start
        sizes = np.minimum(stops[low:high], stop) - start - begin
        first = np.cumsum(sizes) - sizes
        place = np.arange(int(sizes.sum())) - np.repeat(first, sizes) + np.repeat(begin, sizes)
        found[place] = np.repeat(values[low:high], sizes)
        return found


def open_signals(path: str | Path, name: str | None = None) -> list[Signal]:
    """The signals of a file: one, or as many as a table has columns of values.

    Args:
        path: ``.bw``, ``.bedgraph``, ``.wig``, or ``.tsv`` and ``.csv`` with columns contig, position (from 1) and
            values; all but bigWig also ``.gz``.
        name: of the track; the file's name if None, for tables the column's.

    Raises:
        DataError: no such file, another kind, damaged, no values, values that overlap; with file and line.
        ConfigError: pyBigWig is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {path}; {_EXPECTED}")
    plain = path.name.removesuffix(".gz")
    kind = _KINDS.get(Path(plain).suffix.lower())
    if kind is None:
        raise DataError(f"{path}: its name says nothing that is known of its format; {_EXPECTED}")
    own = name or Path(plain).stem
    if kind == "bigWig":
        try:
            good = _bigwig_library().open(str(path)).isBigWig()
        except RuntimeError as error:
            raise DataError(f"{path} cannot be read as a bigWig: it is cut short, damaged or another format") from error
        if not good:
            raise DataError(f"{path} is a bigBed; expected a bigWig")
        return [BigWig(path, own)]
    if kind == "table":
        return _collect(path, _table(path, name))
    return _collect(path, ((own, *run) for run in (_wig(path) if kind == "wig" else _bedgraph(path))))


def _bigwig_library() -> Any:
    try:
        import pyBigWig
    except ImportError as error:
        raise ConfigError("bigWig needs pyBigWig: pip install 'seqlong[tracks]'; or give bedGraph or wig") from error
    return pyBigWig


#: Of one contig: name, starts, stops, values, and the line of each.
Run = tuple[str, NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]


def _collect(path: Path, runs: Iterator[tuple[str, str, Any, Any, Any, Any]]) -> list[Signal]:
    """Signals of runs, each with the name of its track before it."""
    found: dict[str, dict[str, list[Run]]] = {}
    lowest: dict[str, Lowest] = {}
    for track, contig, starts, stops, values, lines in runs:
        kept = ~np.isnan(values)
        if np.isinf(values).any():
            raise DataError(located(path, int(lines[np.isinf(values)][0]), "found an infinite value"))
        by_contig = found.setdefault(track, {})
        if not kept.any():
            continue
        least = int(np.argmin(np.where(kept, values, np.inf)))
        if track not in lowest or values[least] < lowest[track].value:
            lowest[track] = Lowest(float(values[least]), f"{path}:{lines[least]}")
        by_contig.setdefault(contig, []).append((contig, starts[kept], stops[kept], values[kept], lines[kept]))
    signals: list[Signal] = []
    for track, by_contig in found.items():
        if not by_contig:
            raise DataError(f"{path}: track '{track}' has no values; expected a signal along a genome")
        parts, ends = {}, {}
        for contig, several in by_contig.items():
            starts, stops, values, lines = (np.concatenate([run[n] for run in several]) for n in (1, 2, 3, 4))
            last = int(np.argmax(stops))
            ends[contig] = (int(stops[last]), int(lines[last]))
            if (np.diff(starts) < 0).any():
                order = np.argsort(starts, kind="stable")
                starts, stops, values, lines = starts[order], stops[order], values[order], lines[order]
            if (stops[:-1] > starts[1:]).any():
                place = int(np.argmax(stops[:-1] > starts[1:])) + 1
                raise DataError(
                    located(
                        path,
                        int(lines[place]),
                        f"{contig}:{starts[place] + 1:,} has a value already, from line {lines[place - 1]}; expected "
                        "one value for each base",
                    )
                )
            parts[contig] = (starts, stops, values.astype(np.float32))
        signals.append(Intervals(path, track, parts, ends, lowest[track]))
    if not signals:
        raise DataError(f"{path} has no values; {_EXPECTED}")
    return signals


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if text := line.strip():
                    yield number, text
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise DataError(f"{path} is cut short or damaged: {error}; copy or download it again") from error


def _numbers(path: Path, lines: list[str], numbers: list[int], columns: int, what: str) -> NDArray[np.float64]:
    """``(n columns)`` of lines of numbers.

    Raises:
        DataError: with the line that is none.
    """
    try:
        found = np.loadtxt(lines, ndmin=2, comments=None)
        if found.shape[1] == columns:
            return found
    except ValueError:
        pass
    for line, number in zip(lines, numbers, strict=True):
        parts = line.split()
        try:
            good = len([float(part) for part in parts]) == columns
        except ValueError:
            good = False
        if not good:
            raise DataError(located(path, number, f"found '{line[:60]}'; expected {what}"))
    raise AssertionError("a line that numpy cannot read, and Python can")


def _wig(path: Path) -> Iterator[Run]:
    """fixedStep and variableStep, with spans."""
    said: dict[str, Any] | None = None
    lines: list[str] = []
    numbers: list[int] = []
    done = 0  # values of a fixedStep run that are out already

    def run() -> Run:
        assert said is not None
        at, span = np.array(numbers, dtype=np.int64), said["span"]
        if said["fixed"]:
            values = _numbers(path, lines, numbers, 1, "a value, below fixedStep")[:, 0]
            starts = said["start"] - 1 + (done + np.arange(len(values), dtype=np.int64)) * said["step"]
        else:
            table = _numbers(path, lines, numbers, 2, "a position and a value, below variableStep")
            starts, values = table[:, 0].astype(np.int64) - 1, table[:, 1]
        if len(starts) and starts.min() < 0:
            raise DataError(
                located(path, int(at[int(np.argmin(starts))]), "found a position below 1; wig counts from 1")
            )
        return said["chrom"], starts, starts + span, values, at

    for number, text in _lines(path):
        if text.startswith(("fixedStep", "variableStep")):
            if lines:
                yield run()
            said, lines, numbers, done = _declared(path, number, text), [], [], 0
        elif text.startswith(_SPARE):
            continue
        elif said is None:
            raise DataError(located(path, number, f"found '{text[:60]}'; expected fixedStep or variableStep before it"))
        else:
            lines.append(text)
            numbers.append(number)
            if len(lines) >= _LINES:
                yield run()
                done += len(lines)
                lines, numbers = [], []
    if lines:
        yield run()


def _declared(path: Path, number: int, text: str) -> dict[str, Any]:
    words = dict(word.partition("=")[::2] for word in text.split()[1:])
    fixed = text.startswith("fixedStep")
    try:
        return {
            "fixed": fixed,
            "chrom": words["chrom"],
            "start": int(words["start"]) if fixed else 0,
            "step": int(words.get("step", 1)),
            "span": int(words.get("span", 1)),
        }
    except (KeyError, ValueError):
        expected = "fixedStep chrom=NAME start=N step=N" if fixed else "variableStep chrom=NAME"
        raise DataError(located(path, number, f"found '{text[:60]}'; expected {expected}")) from None


def _bedgraph(path: Path) -> Iterator[Run]:
    for contig, lines, numbers in _by_contig(path, None):
        table = _numbers(path, lines, numbers, 3, "bedGraph: contig, start, stop, value")
        starts, stops, at = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), np.array(numbers)
        wrong = (starts < 0) | (stops <= starts)
        if wrong.any():
            place = int(np.argmax(wrong))
            raise DataError(
                located(path, int(at[place]), f"found {starts[place]} to {stops[place]}; expected start < stop")
            )
        yield contig, starts, stops, table[:, 2], at


def _table(path: Path, name: str | None) -> Iterator[tuple[str, str, Any, Any, Any, Any]]:
    comma = "," if ".csv" in path.name else None
    first = next(((number, text) for number, text in _lines(path) if not text.startswith("#")), None)
    if first is None:
        raise DataError(f"{path} is empty; {_EXPECTED}")
    words = first[1].split(comma)
    headed = len(words) > 1 and not words[1].strip().isdecimal()
    columns = len(words) - 2
    if columns < 1:
        raise DataError(
            located(path, first[0], f"found {len(words)} columns; expected contig, position (from 1), value")
        )
    names = [word.strip() for word in words[2:]] if headed else [str(number + 1) for number in range(columns)]
    plain = Path(path.name.removesuffix(".gz")).stem
    if name:
        names = [name] if columns == 1 else [f"{name}_{word}" for word in names]
    elif columns == 1 and not headed:
        names = [plain]
    for contig, lines, numbers in _by_contig(path, comma, first[0] if headed else 0):
        table = _numbers(path, lines, numbers, columns + 1, "contig, position (from 1) and numbers, nan where missing")
        starts, at = table[:, 0].astype(np.int64) - 1, np.array(numbers)
        if starts.min() < 0:
            raise DataError(located(path, int(at[int(np.argmin(starts))]), "found a position below 1; expected from 1"))
        for number, track in enumerate(names):
            yield track, contig, starts, starts + 1, table[:, 1 + number], at


def _by_contig(path: Path, comma: str | None, skip: int = 0) -> Iterator[tuple[str, list[str], list[int]]]:
    """Lines less their first word, which they share, in stretches."""
    contig, lines, numbers = "", [], []  # type: ignore[var-annotated]
    for number, text in _lines(path):
        if number <= skip or text.startswith(_SPARE):
            continue
        name, *more = text.split(comma, 1)
        rest = " ".join(more) if comma is None else " ".join(more).replace(comma, " ")
        if name != contig or len(lines) >= _LINES:
            if lines:
                yield contig, lines, numbers
            contig, lines, numbers = name, [], []
        lines.append(rest)
        numbers.append(number)
    if lines:
        yield contig, lines, numbers


__all__ = ["BigWig", "Intervals", "Lowest", "Signal", "open_signals"]
