"""A folder of files that are built once: written whole or not at all, one builder at a time, errors in plain words."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path

from seqlong.errors import DataError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "it is a file",
}
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def default_cache_dir() -> Path:
    """``$SEQLONG_CACHE``, else ``$XDG_CACHE_HOME/seqlong``, else ``~/.cache/seqlong``."""
    if own := os.environ.get("SEQLONG_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqlong"


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn an operating-system error about the cache ``folder`` into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REASONS:
            raise
        raise DataError(
            f"cannot write the cache folder {folder}: {_REASONS[error.errno]}; free it, or name another folder with "
            "data.cache_dir or the environment variable SEQLONG_CACHE"
        ) from error


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on the file ``path`` among processes; gives False where the file system has no locks."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            # Writes are atomic without it; several processes then only do the same work.
            yield False
        else:
            yield True  # closing the file lets go


@contextmanager
def atomic_write(path: Path) -> Iterator[BufferedWriter]:
    """Write a file that appears under its name whole and on disk, or never."""
    descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:  # KeyboardInterrupt too: leave nothing behind
        with suppress(OSError):
            os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def content_digest(path: Path, folder: Path) -> str:
    """SHA-256 of a file's bytes, remembered in ``folder`` for as long as its size and modification time stay."""
    real = path.resolve()
    status = real.stat()
    facts = {"path": str(real), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    memo = folder / f"{hashlib.sha256(str(real).encode()).hexdigest()[:24]}.source.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # no note, or one that cannot be read: hash again
        known = json.loads(memo.read_bytes())
        if {key: known[key] for key in facts} == facts:
            return str(known["digest"])
    with real.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError), atomic_write(memo) as file:  # a note spares time; whether the folder can be written is
        file.write(json.dumps({**facts, "digest": digest}).encode())  # for the build to say
    return digest
