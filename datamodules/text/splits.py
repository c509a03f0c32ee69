"""Which documents, or parts of one, are for training, validation and test."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from seqlong.datamodules.sampler import permute
from seqlong.datamodules.text.corpus import Corpus
from seqlong.datamodules.text.files import find_files
from seqlong.datamodules.text.rows import Spans
from seqlong.errors import DataError

NAMES = ("train", "validation", "test")
_LISTED = 12
#: From this many documents on, whole ones are held out; below it parts of them, unless a split is named.
_ENOUGH = 3
#: A held-out document may be this many times what the split still wants.
_TOO_LARGE = 3.0


@dataclass(frozen=True)
class Split:
    """Stretches of documents for each split.

    Attributes:
        spans: split name to its stretches.
        how: the settings that made it, for the record.
    """

    spans: Mapping[str, Spans]
    how: dict[str, object]

    def size(self, corpus: Corpus, name: str) -> dict[str, int]:
        """Documents, tokens (special ones not counted), bytes and words of a split."""
        spans = self.spans[name]
        lengths = corpus.lengths[spans.document]
        special = (spans.start == 0) * corpus.prefix + (spans.stop == lengths) * corpus.suffix
        share = (spans.lengths - special) / (lengths - corpus.prefix - corpus.suffix)  # no document is empty
        return {
            "documents": len(np.unique(spans.document)),
            "tokens": int((spans.lengths - special).sum()),
            "bytes": int(np.rint((corpus.text_bytes[spans.document] * share).sum())),
            "words": int(np.rint((corpus.words[spans.document] * share).sum())),
        }

    def names(self, corpus: Corpus, name: str, shown: int = _LISTED) -> list[str]:
        """The first documents of a split."""
        return [corpus.name(number) for number in np.unique(self.spans[name].document)[:shown].tolist()]

    def table(self, corpus: Corpus, title: str = "") -> Table:
        """The split as a table for the terminal."""
        table = Table(title=f"{title}{': ' if title else ''}split {self.how['kind']}")
        for column in ("split", "documents", "tokens", "bytes", "words", "first documents"):
            table.add_column(column, justify="left" if column in ("split", "first documents") else "right")
        for name in NAMES:
            size = self.size(corpus, name)
            first = self.names(corpus, name, 3)
            more = ", ..." if size["documents"] > 3 else ""
            table.add_row(name, *(f"{value:,}" for value in size.values()), ", ".join(first) + more)
        return table

    def describe(self, corpus: Corpus) -> dict[str, object]:
        """All of it, JSON-able."""
        summary = [{"split": name, **self.size(corpus, name), "first": self.names(corpus, name)} for name in NAMES]
        return {**self.how, "summary": summary}


class Splitter(ABC):
    """A way to split documents."""

    @abstractmethod
    def split(self, corpus: Corpus) -> Split:
        """Split ``corpus``.

        Raises:
            DataError: the documents do not allow it.
        """


class DocumentSplit(Splitter):
    """Hold out whole documents, drawn by a seeded permutation until the fraction of the bytes is reached.

    A document much larger than what is wanted is passed over. Documents with the same text always fall together.

    Args:
        validation: fraction of the bytes to validate on, 0 to 1.
        test: fraction of the bytes to test on, 0 to 1.
        seed: number that names the permutation. It is not the seed of training, so that runs share one split.
    """

    def __init__(self, validation: float = 0.05, test: float = 0.05, seed: int = 0) -> None:
        _check_fractions(validation, test)
        self.validation, self.test, self.seed = validation, test, seed

    def split(self, corpus: Corpus) -> Split:
        """Split ``corpus``; see `Splitter`."""
        _, group = np.unique(corpus.text_digests, return_inverse=True)
        # Groups are numbered by their digests; by their first document instead, so that the order is the files'.
        first = np.full(int(group.max()) + 1, len(corpus), dtype=np.int64)
        np.minimum.at(first, group, np.arange(len(corpus)))
        rank = np.empty_like(first)
        rank[np.argsort(first)] = np.arange(len(first))
        group = rank[group]
        sizes = np.bincount(group, weights=corpus.text_bytes).astype(np.int64)
        order = permute(np.arange(len(sizes)), len(sizes), self.seed)
        owner = np.zeros(len(sizes), dtype=np.int8)
        total = float(sizes.sum())
        for number, fraction in ((2, self.test), (1, self.validation)):
            _deal(sizes, order, owner, number, fraction * total)
        if not (owner == 0).any():
            raise DataError(
                f"split: {len(corpus)} documents leave none for training beside validation {self.validation} and test "
                f"{self.test}; give more text, or set data.split to PositionSplit, which cuts documents"
            )
        how = {"kind": "by document", "validation": self.validation, "test": self.test, "seed": self.seed}
        duplicates = len(corpus) - len(sizes)
        if duplicates:
            how["duplicates"] = duplicates
        return _by_document(corpus, owner[group], how)


class PositionSplit(Splitter):
    """Hold out the ends of documents: training, then validation, then test, of each. For one book alone.

    Args:
        validation: fraction of each document to validate on, 0 to 1.
        test: fraction of each document to test on, 0 to 1.
    """

    def __init__(self, validation: float = 0.05, test: float = 0.05) -> None:
        _check_fractions(validation, test)
        self.validation, self.test = validation, test

    def split(self, corpus: Corpus) -> Split:
        """Split ``corpus``; see `Splitter`."""
        lengths = corpus.lengths
        third = np.floor(lengths * (1 - self.test)).astype(np.int64)
        second = np.floor(lengths * (1 - self.test - self.validation)).astype(np.int64)
        edges = {"train": (0 * lengths, second), "validation": (second, third), "test": (third, lengths)}
        spans = {name: _spans(np.arange(len(corpus)), low, high) for name, (low, high) in edges.items()}
        how: dict[str, object] = {"kind": "by position", "validation": self.validation, "test": self.test}
        return _finished(spans, how)


class FileSplit(Splitter):
    """Hold out whole files by name: held-out books, or files that came with a split of their own.

    Args:
        validation: files to validate on: names, ends of paths, patterns, or files, folders and patterns that are not
            among data.path and are read beside it.
        test: files to test on, likewise.
        train: files to train on; null is all others.
    """

    def __init__(self, validation: list[str], test: list[str] | None = None, train: list[str] | None = None) -> None:
        self.chosen = {"train": train, "validation": validation, "test": test or []}

    def extra(self, files: list[Path]) -> list[str]:
        """Those named that are not among ``files``, but are there."""
        known = {file.resolve() for file in files}
        found = []
        for name in [*(self.chosen["validation"] or []), *(self.chosen["test"] or []), *(self.chosen["train"] or [])]:
            if _matching(name, files) or not Path(name).expanduser().exists():
                continue
            if any(file.resolve() not in known for file in find_files(name)[0]):
                found.append(name)
        return found

    def split(self, corpus: Corpus) -> Split:
        """Split ``corpus``; see `Splitter`."""
        files = corpus.files
        owner = np.full(len(files), -1, dtype=np.int8)
        for number, name in enumerate(NAMES):
            for wanted in self.chosen[name] or []:
                found = _matching(wanted, files)
                if not found:
                    names = ", ".join(sorted({file.name for file in files})[:_LISTED])
                    raise DataError(f"split.{name}: no file is called '{wanted}'; there are {names}")
                for file in found:
                    if owner[file] not in (-1, number):
                        raise DataError(
                            f"split: {files[file]} is named in {NAMES[owner[file]]} and again in {name} ('{wanted}')"
                        )
                    owner[file] = number
        if self.chosen["train"] is None:
            owner[owner < 0] = 0
        how: dict[str, object] = {"kind": "by file"}
        how |= {name: wanted for name, wanted in self.chosen.items() if wanted}
        return _by_document(corpus, owner[corpus.file_numbers], how)


class AutoSplit(Splitter):
    """`DocumentSplit` where there are three documents or more, otherwise `PositionSplit`.

    Args:
        validation: fraction to validate on, 0 to 1.
        test: fraction to test on, 0 to 1.
        seed: number that names the permutation.
    """

    def __init__(self, validation: float = 0.05, test: float = 0.05, seed: int = 0) -> None:
        self._few, self._many = PositionSplit(validation, test), DocumentSplit(validation, test, seed)

    def split(self, corpus: Corpus) -> Split:
        """Split ``corpus``; see `Splitter`."""
        return (self._many if len(corpus) >= _ENOUGH else self._few).split(corpus)


def _deal(
    sizes: NDArray[np.int64], order: NDArray[np.int64], owner: NDArray[np.int8], number: int, wanted: float
) -> None:
    """Give groups that nobody has to ``number`` until it has what it wants, one at least."""
    given = False
    free = [group for group in order.tolist() if owner[group] == 0]
    if wanted <= 0 or not free:
        return
    left = wanted
    for group in free:
        if given and left <= sizes[group] / 2:
            break
        if sizes[group] > _TOO_LARGE * left:
            continue
        owner[group], given = number, True
        left -= float(sizes[group])
        if left <= 0:
            break
    if not given:  # all are large: the smallest
        owner[min(free, key=lambda group: int(sizes[group]))] = number


def _by_document(corpus: Corpus, owner: NDArray[np.int8], how: dict[str, object]) -> Split:
    spans = {}
    for number, name in enumerate(NAMES):
        documents = np.flatnonzero(owner == number)
        spans[name] = _spans(documents, np.zeros_like(documents), corpus.lengths[documents])
    return _finished(spans, how)


def _spans(document: NDArray[np.int64], start: NDArray[np.int64], stop: NDArray[np.int64]) -> Spans:
    kept = stop > start
    return Spans(document[kept], start[kept], stop[kept])


def _finished(spans: dict[str, Spans], how: dict[str, object]) -> Split:
    for name in ("train", *(name for name in ("validation", "test") if how.get(name))):
        if not len(spans[name]):
            raise DataError(f"split: {name} is empty ({how['kind']}); give more text, or other fractions or files")
    return Split(spans, how)


def _matching(wanted: str, files: list[Path]) -> list[int]:
    """Numbers of the files that a name, an end of a path, or a pattern means."""
    found = []
    for number, file in enumerate(files):
        path = file.as_posix()
        same = file.name == wanted or path == wanted or path.endswith(f"/{wanted}")
        inside = path.startswith(f"{wanted.rstrip('/')}/") or f"/{wanted.rstrip('/')}/" in path
        if same or inside or fnmatch.fnmatch(file.name, wanted) or fnmatch.fnmatch(path, wanted):
            found.append(number)
    return found


def _check_fractions(validation: float, test: float) -> None:
    if min(validation, test) < 0 or validation + test >= 1:
        raise DataError(
            f"split: validation {validation} and test {test} must be fractions of 0 or more that sum to below 1"
        )
