"""GenomeStore: a genome as a memory-mapped file of one byte a base, beside an index; built once, read in any window.

The bytes are the file's own letters, so that case (soft-masked repeats) and IUPAC codes are kept.
"""

from __future__ import annotations

import base64
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from seqlong.datamodules.dna.alphabet import BASE_TABLE
from seqlong.datamodules.dna.cache import atomic_write, content_digest, default_cache_dir, explained, locked
from seqlong.datamodules.dna.fasta import Header
from seqlong.datamodules.dna.proteins import ReverseTranslation
from seqlong.datamodules.dna.sequences import read_sequences
from seqlong.datamodules.dna.source import check_file
from seqlong.errors import DataError, nearest

#: The path that stands for the embedded genome.
EMBEDDED = "ecoli"
_EMBEDDED_FILE = Path(__file__).parent / "data" / "ecoli_k12_mg1655.fasta.gz"
_FORMAT = 1  # a change of the files' form changes their name, and old ones are left alone
_NOT_LOWER = bytes({*range(256)} - {*range(ord("a"), ord("z") + 1)})
_NOT_UNKNOWN = bytes(byte for byte in range(256) if BASE_TABLE[byte] != 4)


@dataclass(frozen=True)
class Contig:
    """One record of a genome.

    Attributes:
        name: first word of its header.
        length: bases.
        offset: its first byte in the file of bases.
        digest: refget identifier, ``SQ.`` + sha512t24u of the bases in upper case (GA4GH refget 2.0): the same for the
            same sequence in any file.
        unknown: bases that are not A, C, G, T or U.
        soft_masked: bases in lower case.
        circular: True for a ring, whose windows wrap round.
    """

    name: str
    length: int
    offset: int
    digest: str
    unknown: int
    soft_masked: int
    circular: bool


class GenomeStore:
    """The bases of one sequence file. Made by `build_or_open`; cheap to pickle, opened anew in each process.

    Attributes:
        path: the sequence file.
        digest: SHA-256 of its bytes.
        contigs: its records, in order.
        bases: bases in all.
    """

    def __init__(self, path: Path, digest: str, bases_file: Path, contigs: Sequence[Contig]) -> None:
        self.path, self.digest = path, digest
        self.contigs = tuple(contigs)
        self.bases = sum(contig.length for contig in contigs)
        self._bases_file = bases_file
        self._numbers = {contig.name: number for number, contig in enumerate(self.contigs)}
        self._data: NDArray[np.uint8] | None = None

    @classmethod
    def build_or_open(
        cls,
        path: str | Path,
        cache_dir: str | Path | None = None,
        circular: Sequence[str] | Literal["all"] = (),
        protein: ReverseTranslation | None = None,
    ) -> GenomeStore:
        """Open the store of a sequence file, building it first if no store of the same content exists.

        Safe for several processes at once; a build that was killed leaves nothing that a later one would believe.

        Args:
            path: FASTA, FASTQ, GenBank or EMBL, plain, gzip or bgzip; ``ecoli`` is the embedded genome.
            cache_dir: folder of stores; None is ``$SEQLONG_CACHE`` or ``~/.cache/seqlong``.
            circular: names of circular contigs, or "all", beside those that GenBank says are.
            protein: the file holds proteins, and this makes bases of them; None: bases.

        Raises:
            DataError: the file or the folder cannot be used, or ``circular`` names no contig of the file.
        """
        if str(path) == EMBEDDED:
            path, circular = _EMBEDDED_FILE, "all"
        source = Path(path)
        check_file(source)
        folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        digest = content_digest(source, folder)
        stem = folder / f"{digest[:32]}-v{_FORMAT}{'-' + protein.name if protein else ''}"
        index = _read_index(stem)
        if index is None:
            with explained(folder), locked(_with(stem, ".lock")) as alone:
                index = _read_index(stem)  # another process may have built it while this one waited
                if index is None:
                    if alone:
                        for leftover in folder.glob(f"{stem.name}.*.tmp"):
                            leftover.unlink(missing_ok=True)
                    index = _build(source, stem, protein)
        store = cls(source, digest, _with(stem, ".bases"), [Contig(**contig) for contig in index])
        return store.with_circular(circular)

    def number(self, name: str) -> int:
        """Index of the contig called ``name``.

        Raises:
            DataError: there is none.
        """
        if name not in self._numbers:
            raise DataError(
                f"{self.path}: no contig is called '{name}'{nearest(name, self._numbers)} (it has "
                f"{len(self.contigs):,}, the first is '{self.contigs[0].name}')"
            )
        return self._numbers[name]

    def window(self, contig: str, start: int, stop: int, circular: bool | None = None) -> NDArray[np.uint8]:
        """The ``(stop - start)`` bytes of bases ``start`` to ``stop`` (from 0, half open) of ``contig``.

        Args:
            contig: its name.
            start: first base; on a circular contig any integer.
            stop: base after the last; on a circular contig any integer above ``start``, even several times round.
            circular: whether to wrap round; None is as the contig is.

        Raises:
            DataError: no such contig, an empty interval, or one off the end of a linear contig.
        """
        number = self.number(contig)
        record = self.contigs[number]
        ring = record.circular if circular is None else circular
        if stop <= start or (not ring and (start < 0 or stop > record.length)):
            why = "is empty" if stop <= start else "runs off the end of this linear contig"
            raise DataError(
                f"{self.path}: interval {contig}:{start:,}-{stop:,} {why}; '{contig}' has {record.length:,} bases, so "
                f"0 <= start < stop <= {record.length:,}"
            )
        return self.read(number, start, stop)

    def read(self, number: int, start: int, stop: int) -> NDArray[np.uint8]:
        """As `window`, by contig number, wrapping round and unchecked. A view of the file where nothing wraps."""
        data, record = self.data, self.contigs[number]
        length, offset = record.length, record.offset
        if start >= 0 and stop <= length:
            return data[offset + start : offset + stop]
        first, size = start % length, stop - start
        if first + size <= length:
            return data[offset + first : offset + first + size]
        pieces = [data[offset + first : offset + length]]
        turns, rest = divmod(size - (length - first), length)
        whole = data[offset : offset + length]
        return np.concatenate([*pieces, *[whole] * turns, whole[:rest]])

    @property
    def data(self) -> NDArray[np.uint8]:
        """All bases, memory-mapped read-only."""
        if self._data is None:
            with self._bases_file.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._data = np.frombuffer(mapped, dtype=np.uint8)
        return self._data

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_data": None}  # a loader's worker maps the file itself

    def with_circular(self, circular: Sequence[str] | Literal["all"]) -> GenomeStore:
        """The same store with more contigs that are rings: those named, or all.

        Raises:
            DataError: no contig has such a name.
        """
        if isinstance(circular, str):
            if circular != "all":
                raise DataError(f"circular: found '{circular}', expected a list of contig names, or 'all'")
            rings = {contig.name for contig in self.contigs}
        else:
            rings = {self.contigs[self.number(name)].name for name in circular}
        contigs = [
            Contig(**{**asdict(contig), "circular": contig.circular or contig.name in rings}) for contig in self.contigs
        ]
        return GenomeStore(self.path, self.digest, self._bases_file, contigs)


def _with(stem: Path, suffix: str) -> Path:
    return stem.parent / f"{stem.name}{suffix}"


def _read_index(stem: Path) -> list[dict[str, Any]] | None:
    """The contigs of a store that is whole; None where there is none."""
    # The index is written last, so that where it stands the bases do too, unless someone has tampered with them.
    try:
        index = json.loads(_with(stem, ".json").read_bytes())
        whole = _with(stem, ".bases").stat().st_size == index["bases"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return index["contigs"] if whole else None


def _build(source: Path, stem: Path, protein: ReverseTranslation | None) -> list[dict[str, Any]]:
    contigs: list[dict[str, Any]] = []
    total = 0
    with _progress_bar(source) as progress, atomic_write(_with(stem, ".bases")) as file:
        sha = hashlib.sha512()
        for item in read_sequences(source, progress, protein):
            if isinstance(item, Header):
                _close(contigs, total, sha.digest())
                sha = hashlib.sha512()
                contigs.append(
                    {"name": item.name, "offset": total, "circular": item.circular, "unknown": 0, "soft_masked": 0}
                )
                continue
            file.write(item)
            sha.update(item.upper())
            total += len(item)
            contigs[-1]["unknown"] += len(item.translate(None, delete=_NOT_UNKNOWN))
            contigs[-1]["soft_masked"] += len(item.translate(None, delete=_NOT_LOWER))
        _close(contigs, total, sha.digest())
    index = {"format": _FORMAT, "source": source.name, "bases": total, "contigs": contigs}
    with atomic_write(_with(stem, ".json")) as file:
        file.write(json.dumps(index).encode())
    return contigs


def _close(contigs: list[dict[str, Any]], total: int, sha512: bytes) -> None:
    if contigs:
        contigs[-1]["length"] = total - contigs[-1]["offset"]
        contigs[-1]["digest"] = "SQ." + base64.urlsafe_b64encode(sha512[:24]).decode()


@contextmanager
def _progress_bar(source: Path) -> Iterator[Callable[[int], None] | None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"Indexing {source.name}", total=os.path.getsize(source))
        yield lambda done: bar.update(task, completed=done)
