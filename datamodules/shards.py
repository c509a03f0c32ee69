"""Tar shards: plain webdataset tars, read by sample number through an index of where each member lies.

A sample is the members of a tar that share a key: ``0001.mp4`` and ``0001.json`` are the fields ``mp4`` and ``json`` of
sample ``0001``. With the offset and size of every member known, samples are as good as rows of an array: which of them
make up a batch is a function of the batch's number alone (`EpochOrder` over the sampler), so that no sample is lost or
repeated, and all ranks make equal steps, whatever the number of workers and ranks, and when those change at a resume.

A tar may be at a URL (``s3://``, ``gs://``, ``https://``): its headers are read once, and after that each process reads
the members that its samples need, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules import remote
from seqlong.datamodules.dna.cache import atomic_write, default_cache_dir, explained
from seqlong.datamodules.sampler import permute
from seqlong.errors import DataError, nearest

#: What is added to a tar's name for the index beside it.
INDEX_SUFFIX = ".idx"
#: Words before the last dot that belong to the field: ``0001.tokens.npy`` is the field ``tokens.npy`` of ``0001``.
FIELD_WORDS = frozenset({"tokens", "codes", "seq", "meta", "text", "label"})
_COMPRESSIONS = frozenset({"gz", "zst", "bz2", "xz"})
_BLOCK, _MAGIC_AT = 512, 257
_OPEN_FILES = 32
_FORMAT = 1
_EPOCH, _SHARDS, _WITHIN = range(3)  # streams of random numbers

Locality = Literal["shuffle", "shards", "sequential"]


def split_name(name: str, fields: Sequence[str] | None = None) -> tuple[str, str]:
    """``(key, field)`` of a member's name. Keys may have dots, which webdataset, cutting at the first, does not allow.

    The field is the last extension, with the one before where that is one of `FIELD_WORDS` or the last is a
    compression; a name in ``fields`` wins.

    >>> split_name("a/clip.v1.mp4"), split_name("0001.tokens.npy"), split_name("7.left.png", ["left.png"])
    (('a/clip.v1', 'mp4'), ('0001', 'tokens.npy'), ('7', 'left.png'))
    """
    for field in sorted(fields or (), key=len, reverse=True):
        if name.endswith(f".{field}"):
            return name[: -len(field) - 1], field
    folder, slash, base = name.rpartition("/")
    parts = base.split(".")
    if len(parts) < 2:
        return name, ""
    taken = 1
    if len(parts) > 2 and (parts[-1] in _COMPRESSIONS or parts[-2] in FIELD_WORDS):
        taken = 2
    return f"{folder}{slash}{'.'.join(parts[:-taken])}", ".".join(parts[-taken:])


@dataclass(frozen=True)
class ShardIndex:
    """Where the members of one tar lie.

    Attributes:
        path: the tar.
        bytes: its size.
        fields: names of the fields that any of its samples has, sorted.
        offset: ``(n, f)`` int64 first byte of each sample's field in the tar; -1 where it has no such field.
        size: ``(n, f)`` int64 bytes of it.
        key_text: ``(.)`` uint8 the keys, one after the other.
        key_end: ``(n)`` int64 where in it each key ends.
        url: of a tar that is not on this machine; its ``path`` is the name alone.
    """

    path: Path
    bytes: int
    fields: tuple[str, ...]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    key_text: NDArray[np.uint8]
    key_end: NDArray[np.int64]
    url: str | None = None

    @property
    def source(self) -> Path | str:
        """The path, or the URL."""
        return self.url or self.path

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.key_end)

    def key(self, place: int) -> str:
        """The key of a sample."""
        start = int(self.key_end[place - 1]) if place else 0
        return bytes(self.key_text[start : int(self.key_end[place])]).decode("utf-8", "surrogateescape")


def scan(path: str | Path, fields: Sequence[str] | None = None) -> ShardIndex:
    """Read the headers of a tar, and check that it is whole.

    Raises:
        DataError: no tar, compressed, truncated, a link in it, the same member twice, or no samples.
    """
    path = path if remote.is_url(path) else Path(path)
    _check(path)
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    whole = _size(path)
    with path.open("rb") if isinstance(path, Path) else remote.opened(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it remembers each, a kilobyte for every file
                    if member.isdir():
                        continue
                    if not member.isreg():
                        raise DataError(
                            f"{path}: member '{member.name}' is a link or device; shards hold plain files alone: make "
                            "the tar anew with its contents (tar --dereference)"
                        )
                    if member.offset_data + member.size > whole:
                        break  # the end mark is missing too, and the message is the same
                    key, field = split_name(member.name, fields)
                    found = samples.setdefault(key, {})
                    if field in found:
                        raise DataError(f"{path}: two members are called '{member.name}'; make the shard anew")
                    found[field] = (member.offset_data, member.size)
                end = tar.offset
        except tarfile.TarError as error:
            file.seek(_MAGIC_AT)
            if samples or file.read(5) == b"ustar":
                raise _truncated(path, whole, samples) from error
            raise DataError(f"{path}: found no tar ({error}); expected a plain, uncompressed tar") from error
        file.seek(end)
        mark = file.read(_BLOCK)
    if len(mark) < _BLOCK or mark.strip(b"\0"):
        # Python's reader takes any end for the end. A whole tar ends with blocks of zeros.
        raise _truncated(path, whole, samples)
    if not samples:
        raise DataError(f"{path}: the tar holds no files")
    names = tuple(sorted({field for found in samples.values() for field in found}))
    number = {name: place for place, name in enumerate(names)}
    offset = np.full((len(samples), len(names)), -1, dtype=np.int64)
    size = np.zeros_like(offset)
    for place, found in enumerate(samples.values()):
        for field, (start, length) in found.items():
            offset[place, number[field]], size[place, number[field]] = start, length
    keys = [key.encode("utf-8", "surrogateescape") for key in samples]
    ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
    text = np.frombuffer(b"".join(keys), dtype=np.uint8)
    return ShardIndex(_name(path), whole, names, offset, size, text, ends, _url(path))


def write_index(index: ShardIndex, target: Path) -> None:
    """Write an index as a NumPy archive, whole or not at all."""
    about = {"format": _FORMAT, "bytes": index.bytes, "fields": index.fields}
    with atomic_write(target) as file:
        np.savez(
            file,
            about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
            offset=index.offset,
            size=index.size,
            key_text=index.key_text,
            key_end=index.key_end,
        )


def read_index(path: Path | str, source: Path) -> ShardIndex | None:
    """The index of the tar ``path`` (or URL) in the file ``source``; None where that is none, or of another form.

    Raises:
        DataError: it is the index of a tar of another size.
    """
    try:
        with np.load(source, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if about["format"] != _FORMAT:
                return None
            parts = [arrays[name] for name in ("offset", "size", "key_text", "key_end")]
    except (FileNotFoundError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    size = _size(path)
    if about["bytes"] != size:
        raise DataError(
            f"{path}: the tar has {size:,} bytes, but its index {source.name} is of one with "
            f"{about['bytes']:,}: one of them was cut off or replaced. Copy the tar again, or, if it is right, run "
            "seqlong shards index"
        )
    return ShardIndex(_name(path), about["bytes"], tuple(about["fields"]), *parts, url=_url(path))


def beside(path: Path) -> Path:
    """Where the index beside a tar stands."""
    return path.with_name(path.name + INDEX_SUFFIX)


def open_index(
    path: str | Path, fields: Sequence[str] | None = None, cache_dir: str | Path | None = None
) -> ShardIndex:
    """The index of a tar: the one beside it, or one made now and kept in the cache.

    Args:
        path: the tar.
        fields: names of fields that have dots of their own; see `split_name`. They are not looked for in a file beside
            the tar, which knows its own.
        cache_dir: folder of the cache; None is ``$SEQLONG_CACHE`` or ``~/.cache/seqlong``.

    Raises:
        DataError: the tar cannot be used.
    """
    folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    if isinstance(path, str) and remote.is_url(path):
        return _remote_index(path, fields, folder)
    path = Path(path)
    _check(path)
    if fields is None:
        known = read_index(path, beside(path))
        if known is not None:
            return known
    status = path.stat()
    facts = json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns, fields, _FORMAT])
    return _kept_index(path, fields, folder, facts)


def _kept_index(path: Path | str, fields: Sequence[str] | None, folder: Path, facts: str) -> ShardIndex:
    kept = folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.tar{INDEX_SUFFIX}"
    index = read_index(path, kept)
    if index is None:
        index = scan(path, fields)
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_index(index, kept)
    return index


def _remote_index(url: str, fields: Sequence[str] | None, folder: Path) -> ShardIndex:
    """The index beside a tar at a URL, if there is one, which saves a request for each of its members."""
    facts = json.dumps([remote.identity(url), fields, _FORMAT])
    if fields is None:
        try:
            known = read_index(url, remote.fetched(url + INDEX_SUFFIX, folder))
        except DataError:  # none there, or of another tar: the tar itself knows
            known = None
        if known is not None:
            return known
    return _kept_index(url, fields, folder, facts)


class Shards:
    """The samples of several tars, by number: all of the first, then all of the second, and so on.

    Cheap to pickle; files are opened anew in each process, a few at a time.

    Attributes:
        indexes: one for each tar.
        first: ``(shards + 1)`` int64 number of the first sample of each, and the number of all.

    Args:
        paths: the tars, or their URLs.
        fields: names of fields that have dots of their own; see `split_name`.
        cache_dir: folder of the cache of indexes.

    Raises:
        DataError: no tars, or one that cannot be used.
    """

    def __init__(
        self, paths: Sequence[str | Path], fields: Sequence[str] | None = None, cache_dir: str | Path | None = None
    ) -> None:
        if not paths:
            raise DataError("shards: found an empty list; expected at least one tar")
        self.indexes = [open_index(path, fields, cache_dir) for path in paths]
        counts = [index.samples for index in self.indexes]
        self.first: NDArray[np.int64] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._files: OrderedDict[int, int] = OrderedDict()
        self._cache_dir = cache_dir

    def __len__(self) -> int:
        return int(self.first[-1])

    def locate(self, number: int) -> tuple[int, int]:
        """Shard, and place in it, of a sample.

        Raises:
            DataError: there is no such sample.
        """
        if not 0 <= number < len(self):
            raise DataError(f"shards: there is no sample {number}; the samples are 0 to {len(self) - 1}")
        shard = int(np.searchsorted(self.first, number, side="right")) - 1
        return shard, number - int(self.first[shard])

    def key(self, number: int) -> str:
        """The key of a sample."""
        shard, place = self.locate(number)
        return self.indexes[shard].key(place)

    def has(self, number: int, field: str) -> bool:
        """Whether a sample has a field."""
        shard, place = self.locate(number)
        index = self.indexes[shard]
        return field in index.fields and int(index.offset[place, index.fields.index(field)]) >= 0

    def span(self, number: int, field: str) -> tuple[Path, int, int]:
        """File, first byte and number of bytes of a field, for readers that want no copy. A tar at a URL is copied into
        the cache for them.

        Raises:
            DataError: the sample has no such field.
        """
        source, offset, size = self._span(number, field)
        return source if isinstance(source, Path) else remote.fetched(source, self._cache_dir), offset, size

    def _span(self, number: int, field: str) -> tuple[Path | str, int, int]:
        shard, place = self.locate(number)
        index = self.indexes[shard]
        column = index.fields.index(field) if field in index.fields else -1
        if column < 0 or index.offset[place, column] < 0:
            there = [name for at, name in enumerate(index.fields) if index.offset[place, at] >= 0]
            raise DataError(
                f"{index.source}: sample '{index.key(place)}' has no field '{field}'{nearest(field, there)}; it has "
                f"{', '.join(there)}"
            )
        return index.source, int(index.offset[place, column]), int(index.size[place, column])

    def read(self, number: int, field: str) -> bytes:
        """The bytes of a field.

        Raises:
            DataError: the sample has no such field, or the tar is shorter than when it was indexed.
        """
        path, offset, size = self._span(number, field)
        if isinstance(path, str):
            found = remote.read(path, offset, size)
            if len(found) < size:
                raise DataError(f"{path}: the tar ends inside sample '{self.key(number)}': it was replaced by another")
            return found
        found = os.pread(self._file(self.locate(number)[0]), size, offset)
        while len(found) < size:
            more = os.pread(self._file(self.locate(number)[0]), size - len(found), offset + len(found))
            if not more:
                raise DataError(
                    f"{path}: the tar ends inside sample '{self.key(number)}': it was cut off after it was indexed; "
                    "copy it again"
                )
            found += more
        return found

    def sample(self, number: int) -> dict[str, bytes]:
        """All fields of a sample."""
        shard, place = self.locate(number)
        index = self.indexes[shard]
        return {name: self.read(number, name) for at, name in enumerate(index.fields) if index.offset[place, at] >= 0}

    def close(self) -> None:
        """Close all files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        while len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self.indexes[shard].path, os.O_RDONLY)
        return self._files[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict()}


class EpochOrder:
    """Which sample comes at which place of an endless training order: each once an epoch, in another order each time.

    Args:
        first: as `Shards.first`.
        seed: names the order.
        locality: ``shuffle`` permutes all samples; ``shards`` permutes the shards, and the samples within each, so that
            one shard is read after the other, for storage where that is faster; ``sequential`` leaves them as they are.
    """

    def __init__(self, first: NDArray[np.int64], seed: int, locality: Locality = "shuffle") -> None:
        self.first, self.seed, self.locality = first, seed, locality
        self.size = int(first[-1])
        self._shards: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def __getitem__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at places ``numbers`` (from 0, without end)."""
        epochs, places = numbers // self.size, numbers % self.size
        if self.locality == "sequential":
            return places
        found = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            if self.locality == "shuffle":
                found[here] = permute(places[here], self.size, self.seed, _EPOCH, epoch)
            else:
                found[here] = [self._by_shard(place, epoch) for place in places[here].tolist()]
        return found

    def _by_shard(self, place: int, epoch: int) -> int:
        if epoch not in self._shards:
            sizes = np.diff(self.first)
            order = permute(np.arange(sizes.size), sizes.size, self.seed, _SHARDS, epoch)
            self._shards = {epoch: (order, np.cumsum(sizes[order]))}  # the last one is enough
        order, ends = self._shards[epoch]
        turn = int(np.searchsorted(ends, place, side="right"))
        shard = int(order[turn])
        size = int(self.first[shard + 1] - self.first[shard])
        within = place - int(ends[turn] - size)
        return int(self.first[shard] + permute(within, size, self.seed, _WITHIN, epoch, shard)[0])


def _name(path: Path | str) -> Path:
    return path if isinstance(path, Path) else Path(path.rpartition("/")[2])


def _url(path: Path | str) -> str | None:
    return None if isinstance(path, Path) else path


def _size(path: Path | str) -> int:
    return path.stat().st_size if isinstance(path, Path) else remote.size_of(path)


def _check(path: Path | str) -> None:
    if isinstance(path, str):
        _plain(path, remote.read(path, 0, 4))
        return
    if not path.is_file():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file{nearest(path.name, names)}")
    with path.open("rb") as file:
        _plain(path, file.read(4))


def _plain(path: Path | str, head: bytes) -> None:
    if not head:
        raise DataError(f"{path}: the file is empty; expected a tar")
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh")):
        raise DataError(
            f"{path}: the tar is compressed, so that no sample can be read without all before it; unpack it "
            "(gunzip, unzstd, bunzip2), or make plain shards with seqlong shards make"
        )


def _truncated(path: Path | str, size: int, samples: dict[str, dict[str, tuple[int, int]]]) -> DataError:
    last = next(reversed(samples), None)
    after = f"after sample '{last}', the {len(samples):,}th" if last is not None else "in its first member"
    return DataError(
        f"{path}: the tar is truncated or damaged: its {size:,} bytes stop {after}, without the mark of the end; copy "
        "or make it again"
    )
