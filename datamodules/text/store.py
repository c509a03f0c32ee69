"""TokenStore: the tokens of a group of files in a memory-mapped file, beside a table of their documents. Built once."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from seqlong.datamodules.dna.cache import atomic_write, default_cache_dir, explained, locked
from seqlong.datamodules.text.documents import Drop, Event, Reading, Start, Tally, read_documents
from seqlong.datamodules.text.vocabulary import ByteVocabulary, Vocabulary
from seqlong.errors import DataError

_FORMAT = 1  # a change of the files' form changes their name, and old ones are left alone
#: Files are kept together up to this many bytes and this many files, so that a folder of many makes few stores.
GROUP_BYTES, GROUP_FILES = 1 << 28, 4096
#: Columns of the table of documents, int64: first token and number of tokens, bytes and words of its text, number of
#: its file in the group, its row there (0: the whole file), and a digest of its text.
COLUMNS = 7
START, LENGTH, BYTES, WORDS, FILE, ROW, DIGEST = range(COLUMNS)
_SPACE = np.zeros(256, dtype=bool)
_SPACE[list(b" \t\n\r\v\f")] = True


@dataclass(frozen=True)
class TokenStore:
    """Documents of some files as tokens. Cheap to pickle; mapped anew in each process.

    Attributes:
        files: the files.
        digest: names the content: the tokens, and where documents end.
        documents: ``(n, 7)`` int64, memory-mapped; see the columns above.
        notes: reason to count and first names of what was skipped or replaced.
    """

    files: tuple[Path, ...]
    digest: str
    documents: NDArray[np.int64]
    notes: dict[str, dict[str, Any]]
    _tokens_file: Path
    _dtype: str

    @property
    def data(self) -> NDArray[Any]:
        """All tokens, memory-mapped read-only, as kept on disk."""
        known = self.__dict__.get("_data")
        if known is None:
            if self._tokens_file.stat().st_size == 0:
                known = np.zeros(0, dtype=self._dtype)
            else:
                with self._tokens_file.open("rb") as file:
                    known = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=self._dtype)
            self.__dict__["_data"] = known
        return known

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled with all that it holds.
        return {**self.__dict__, "_data": None, "documents": self._tokens_file.with_suffix(".npy")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__["documents"] = np.load(state["documents"], mmap_mode="r")


def grouped(files: Sequence[Path]) -> list[list[Path]]:
    """Files in order, in groups that share a store."""
    groups: list[list[Path]] = []
    size = 0
    for file in files:
        bytes_ = file.stat().st_size
        if not groups or size + bytes_ > GROUP_BYTES or len(groups[-1]) >= GROUP_FILES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += bytes_
    return groups


def build_or_open(
    files: Sequence[Path], vocabulary: Vocabulary, reading: Reading, cache_dir: str | Path | None = None
) -> TokenStore:
    """Open the store of a group of files, tokenising them first if none of the same files exists.

    Safe for several processes at once; a build that was killed leaves nothing that a later one would believe.

    Args:
        files: the files; a change of their names, sizes or times makes another store.
        vocabulary: what tokenises.
        reading: how files are read.
        cache_dir: folder of stores; None is ``$SEQLONG_CACHE`` or ``~/.cache/seqlong``.

    Raises:
        DataError: a file or the folder cannot be used.
    """
    folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    facts = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    named = json.dumps([_FORMAT, facts, vocabulary.digest, reading.field, reading.unreadable])
    stem = folder / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.text"
    known = _open(stem, files)
    if known is None:
        with explained(folder), locked(stem.with_suffix(".lock")) as alone:
            known = _open(stem, files)  # another process may have built it while this one waited
            if known is None:
                if alone:
                    for leftover in folder.glob(f"{stem.stem}.*.tmp"):
                        leftover.unlink(missing_ok=True)
                _build(files, stem, vocabulary, reading)
                known = _open(stem, files)
    if known is None:
        raise DataError(f"{stem}: the cache was changed while it was written; delete the files of that name")
    return known


def _open(stem: Path, files: Sequence[Path]) -> TokenStore | None:
    # The description is written last, so that where it stands the others do too, unless someone has tampered.
    try:
        about = json.loads(stem.with_suffix(".json").read_bytes())
        documents = np.load(stem.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        tokens = stem.with_suffix(".tokens")
        if tokens.stat().st_size != about["tokens"] * np.dtype(about["dtype"]).itemsize:
            return None
        if documents.shape != (about["documents"], COLUMNS):
            return None
    except (FileNotFoundError, ValueError, KeyError, EOFError):
        return None
    return TokenStore(tuple(files), about["digest"], documents, about["notes"], tokens, about["dtype"])


class _Table:
    """The documents as they are read: counts of what passes by on its way to the tokenizer."""

    def __init__(self, files: Sequence[Path], reading: Reading, vocabulary: Vocabulary) -> None:
        self.files, self.reading, self.tally, self.vocabulary = files, reading, Tally(), vocabulary
        self.rows: list[tuple[int, int, int, int, int]] = []  # bytes, words, file, row, digest
        self.dropped: set[int] = set()

    def pieces(self, progress: Callable[[int], None] | None) -> Iterator[tuple[int, Any]]:
        """``(document, text or tokens)`` of all files."""
        done = 0
        for number, file in enumerate(self.files):

            def seen(here: int, done: int = done) -> None:
                if progress is not None:
                    progress(done + here)

            yield from self._file(number, read_documents(file, self.reading, self.tally, seen))
            done += file.stat().st_size

    def _file(self, number: int, events: Iterator[Event]) -> Iterator[tuple[int, Any]]:
        begun: Start | None = None
        size = words = 0
        space, digest = True, hashlib.blake2b(digest_size=8)
        for event in events:
            if isinstance(event, Start):
                if begun is not None:
                    self._close(number, begun, size, words, digest)
                begun, size, words, space = event, 0, 0, True
                digest = hashlib.blake2b(digest_size=8)
            elif isinstance(event, Drop):
                self.dropped.add(len(self.rows))
            elif isinstance(event, bytes):
                blank = _SPACE[np.frombuffer(event, dtype=np.uint8)]
                words += int(np.count_nonzero(blank[:-1] > blank[1:])) + int(space and not blank[0])
                space = bool(blank[-1])
                size += len(event)
                digest.update(event)
                yield len(self.rows), event
            else:
                digest.update(event.tobytes())
                size += self.bytes_of(self.files[number], event)
                yield len(self.rows), event
        if begun is not None:
            self._close(number, begun, size, words, digest)

    def bytes_of(self, file: Path, tokens: NDArray[Any]) -> int:
        """Bytes of text that an array of ids stands for.

        Raises:
            DataError: an id that the vocabulary does not have.
        """
        low, high = (int(tokens.min()), int(tokens.max())) if tokens.size else (0, 0)
        first = self.vocabulary.offset
        if low < first or high >= self.vocabulary.size:
            raise DataError(
                f"{file}: a token array has ids {low} to {high}, but the vocabulary's are {first} to "
                f"{self.vocabulary.size - 1}; set data.tokenizer to the one that the tokens were made with"
            )
        return int(self.vocabulary.byte_lengths()[tokens].sum())

    def _close(self, number: int, begun: Start, size: int, words: int, digest: Any) -> None:
        if size == 0 and len(self.rows) not in self.dropped:
            self.dropped.add(len(self.rows))
            self.tally.add("empty, skipped", self.files[number], begun.row)
        value = int.from_bytes(digest.digest(), "little", signed=True)
        self.rows.append((size, words, number, begun.row, value))


def _build(files: Sequence[Path], stem: Path, vocabulary: Vocabulary, reading: Reading) -> None:
    table = _Table(files, reading, vocabulary)
    counts: list[NDArray[np.int64]] = []
    total = 0
    with _progress_bar(files, vocabulary) as progress, atomic_write(stem.with_suffix(".tokens")) as target:
        # What is dropped, in its middle perhaps, stays in the file; no row of the table points at it.
        for tokens, owners in _tokenised(table, vocabulary, progress):
            target.write(tokens.data)
            counts.append(owners)
            total += len(tokens)
    rows = np.array(table.rows, dtype=np.int64).reshape(-1, COLUMNS - 2)
    lengths = np.zeros(len(rows), dtype=np.int64)
    for owners in counts:
        np.add.at(lengths, owners[:, 0], owners[:, 1])
    starts = np.cumsum(lengths) - lengths
    kept = lengths > 0
    kept[list(table.dropped)] = False
    documents = np.concatenate([starts[:, None], lengths[:, None], rows], axis=1)[kept]
    # Lengths and digests of the texts, not where in which file they are: a copy elsewhere has the same digest.
    digest = hashlib.blake2b(documents[:, [LENGTH, BYTES, DIGEST]].tobytes(), digest_size=16).hexdigest()
    with atomic_write(stem.with_suffix(".npy")) as file:
        np.save(file, documents)
    tally = table.tally
    notes = {reason: {"count": count, "first": tally.names[reason]} for reason, count in tally.counts.items()}
    about = {
        "dtype": vocabulary.dtype.name,
        "tokens": total,
        "documents": len(documents),
        "digest": digest,
        "notes": notes,
    }
    with atomic_write(stem.with_suffix(".json")) as file:
        file.write(json.dumps(about).encode())


def _tokenised(
    table: _Table, vocabulary: Vocabulary, progress: Callable[[int], None] | None
) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
    for text, run in groupby(table.pieces(progress), key=lambda piece: isinstance(piece[1], bytes)):
        if text:
            yield from vocabulary.write(run)
            continue
        for number, tokens in run:
            on_disk = (tokens - vocabulary.offset).astype(vocabulary.dtype)
            yield on_disk, np.array([[number, len(tokens)]], dtype=np.int64)


@contextmanager
def _progress_bar(files: Sequence[Path], vocabulary: Vocabulary) -> Iterator[Callable[[int], None] | None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    what = f"Reading {files[0].name}" if len(files) == 1 else f"Reading {len(files):,} files"
    verb = what if isinstance(vocabulary, ByteVocabulary) else what.replace("Reading", "Tokenising")
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(verb, total=sum(file.stat().st_size for file in files))
        yield lambda done: bar.update(task, completed=done)
