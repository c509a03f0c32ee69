"""Corpus: all documents of some files, by number, as the tokens that a model sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.text.documents import Reading
from seqlong.datamodules.text.files import find_files
from seqlong.datamodules.text.store import (
    BYTES,
    DIGEST,
    FILE,
    LENGTH,
    ROW,
    START,
    WORDS,
    TokenStore,
    build_or_open,
    grouped,
)
from seqlong.datamodules.text.vocabulary import Vocabulary
from seqlong.errors import DataError

_NAMED = 5


class Corpus:
    """Documents in a fixed order.

    A document as the model sees it: the token that begins documents, its text, the token that ends them. Positions in
    a document count all of these.

    Attributes:
        stores: where the tokens are.
        lengths: ``(n)`` int64 positions of each document, its first and last token with it.
        prefix: 1 if the vocabulary has a token that begins documents, else 0.
        suffix: likewise for the one that ends them.
        left_out: files of the folders given that are not text.

    Args:
        paths: files, folders or patterns.
        vocabulary: what tokenises.
        reading: how files are read.
        cache_dir: folder of stores.

    Raises:
        DataError: a file cannot be used, or there is no text in any.
    """

    def __init__(
        self,
        paths: str | list[str],
        vocabulary: Vocabulary,
        reading: Reading,
        cache_dir: str | Path | None = None,
    ) -> None:
        files, self.left_out = find_files(paths)
        self.vocabulary = vocabulary
        self.stores = [build_or_open(group, vocabulary, reading, cache_dir) for group in grouped(files)]
        counts = [len(store.documents) for store in self.stores]
        self._first: NDArray[np.int64] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if not self._first[-1]:
            raise DataError(f"{', '.join(map(str, files[:_NAMED]))}: found no text at all; expected documents")
        self._ends = (vocabulary.bos or 0, vocabulary.eos or 0)
        self.prefix, self.suffix = int(vocabulary.bos is not None), int(vocabulary.eos is not None)
        self.lengths: NDArray[np.int64] = self._column(LENGTH) + self.prefix + self.suffix

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def files(self) -> list[Path]:
        """All files, in order."""
        return [file for store in self.stores for file in store.files]

    @property
    def digests(self) -> list[str]:
        """Names of the contents of the stores."""
        return [store.digest for store in self.stores]

    @property
    def text_bytes(self) -> NDArray[np.int64]:
        """``(n)`` bytes of each document's text."""
        return self._column(BYTES)

    @property
    def words(self) -> NDArray[np.int64]:
        """``(n)`` words of each, apart by white space; 0 where the text was given as tokens."""
        return self._column(WORDS)

    @property
    def text_digests(self) -> NDArray[np.int64]:
        """``(n)`` equal for equal texts."""
        return self._column(DIGEST)

    @property
    def file_numbers(self) -> NDArray[np.int64]:
        """``(n)`` number of each document's file in ``files``."""
        before = np.cumsum([0, *(len(store.files) for store in self.stores)])
        return np.concatenate(
            [store.documents[:, FILE] + start for store, start in zip(self.stores, before, strict=False)]
        )

    def name(self, document: int) -> str:
        """``file`` or ``file:row``."""
        store, place = self._locate(document)
        row = int(store.documents[place, ROW])
        file = store.files[int(store.documents[place, FILE])].name
        return f"{file}:{row}" if row else file

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Ids of positions ``start`` to ``stop`` of a document."""
        store, place = self._locate(document)
        first, length = int(store.documents[place, START]), int(store.documents[place, LENGTH])
        low, high = max(start - self.prefix, 0), min(stop - self.prefix, length)
        found = np.empty(stop - start, dtype=np.int64)
        begin = self.prefix if start < self.prefix else 0
        body = store.data[first + low : first + high]
        np.add(body, self.vocabulary.offset, out=found[begin : begin + len(body)], dtype=np.int64)
        if begin:
            found[0] = self._ends[0]
        if begin + len(body) < len(found):
            found[-1] = self._ends[1]
        return found

    def text(self, document: int, start: int, stop: int) -> bytes:
        """The text of positions ``start`` to ``stop`` of a document."""
        store, place = self._locate(document)
        first, length = int(store.documents[place, START]), int(store.documents[place, LENGTH])
        low, high = max(start - self.prefix, 0), min(stop - self.prefix, length)
        kept = store.data[first + low : first + high]
        return kept.tobytes() if self.vocabulary.offset else self.vocabulary.decode(kept).encode()

    def notes(self) -> list[str]:
        """What was skipped, replaced or left out, in sentences."""
        tally: dict[str, tuple[int, list[str]]] = {}
        for store in self.stores:
            for reason, note in store.notes.items():
                count, names = tally.get(reason, (0, []))
                tally[reason] = (count + int(note["count"]), [*names, *note["first"]][:_NAMED])
        said = [
            f"{count:,} {'document' if count == 1 else 'documents'} {reason}: {', '.join(names)}"
            + (f" and {count - len(names):,} more" if count > len(names) else "")
            for reason, (count, names) in tally.items()
        ]
        if self.left_out:
            names = [str(path) for path in self.left_out[:_NAMED]]
            more = len(self.left_out) - len(names)
            said.append(
                f"{len(self.left_out):,} files that are not text were left out: {', '.join(names)}"
                + (f" and {more:,} more" if more else "")
            )
        return said

    def _locate(self, document: int) -> tuple[TokenStore, int]:
        store = int(np.searchsorted(self._first, document, side="right")) - 1
        return self.stores[store], document - int(self._first[store])

    def _column(self, column: int) -> NDArray[Any]:
        return np.concatenate([store.documents[:, column] for store in self.stores])
