"""Files at URLs (``s3://``, ``gs://``, ``https://``, ``memory://``, all that fsspec knows): pieces that are read where
they lie, or whole files kept in the cache."""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from seqlong.datamodules.dna.cache import atomic_write, default_cache_dir, explained, locked
from seqlong.errors import ConfigError, DataError

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
#: Attempts at a read, and seconds before the second one; doubled for each more.
TRIES, PAUSE = 4, 0.5
#: Bytes of a request when the headers of a tar are read, and when a file is copied.
_HEADERS, _BLOCK = 1 << 16, 8 << 20
#: What of a description says that the bytes are the same as before.
_IDENTITY = ("size", "ETag", "etag", "mtime", "LastModified", "updated", "md5Hash", "created")

T = TypeVar("T")


def is_url(text: object) -> bool:
    """Whether this is a URL, and no path of a local file."""
    return isinstance(text, str) and _URL.match(text) is not None


def find(url: str) -> list[str]:
    """The URLs that a pattern (``*``, ``?``, ``[...]``) stands for, sorted; one without stands for itself.

    Raises:
        DataError: none is there.
        ConfigError: a package for this kind of URL is not installed.
    """
    if not re.search(r"[*?\[]", url):
        return [url]
    system, path = _system(url)
    found = _asked(url, lambda: sorted(str(name) for name in system.glob(path)))
    if not found:
        raise DataError(f"{url}: nothing there matches")
    return [system.unstrip_protocol(name) for name in found]


def size_of(url: str) -> int:
    """Bytes of the file.

    Raises:
        DataError: it is not there, or does not say.
    """
    return int(_about(url)["size"])


def identity(url: str) -> str:
    """Changes when the file does: its size, and whatever the server says of its contents or date."""
    about = _about(url)
    system, path = _system(url)
    return json.dumps(
        [system.unstrip_protocol(path), *(f"{name}={about[name]}" for name in _IDENTITY if about.get(name) is not None)]
    )


def read(url: str, offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset`` on; fewer if the file ends before.

    Raises:
        DataError: they cannot be read.
    """
    system, path = _system(url)
    return bytes(_asked(url, lambda: system.cat_file(path, start=offset, end=offset + size))) if size else b""


def opened(url: str) -> io.IOBase:
    """The file, to be read here and there in small pieces.

    Raises:
        DataError: it is not there.
    """
    system, path = _system(url)
    file: io.IOBase = _asked(url, lambda: system.open(path, "rb", block_size=_HEADERS))
    return file


def fetched(url: str, cache_dir: str | Path | None = None) -> Path:
    """The file, copied into the cache once by each machine; copied anew when it changes.

    Args:
        url: of one file.
        cache_dir: folder of the cache; None is ``$SEQLONG_CACHE`` or ``~/.cache/seqlong``.

    Raises:
        DataError: it cannot be read, or not be written.
    """
    base = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    digest = hashlib.sha256(identity(url).encode()).hexdigest()[:24]
    target = base / "remote" / digest / url.rstrip("/").rpartition("/")[2]
    size = size_of(url)
    with explained(base):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent / ".lock"):
            if not target.is_file() or target.stat().st_size != size:
                with atomic_write(target) as file:
                    for start in range(0, size, _BLOCK):
                        piece = read(url, start, min(_BLOCK, size - start))
                        if not piece:
                            raise DataError(f"{url}: ends at byte {start:,} of {size:,}; was it replaced just now?")
                        file.write(piece)
    return target


def _about(url: str) -> dict[str, Any]:
    system, path = _system(url)
    about: dict[str, Any] = _asked(url, lambda: system.info(path))
    if about.get("type") == "directory":
        raise DataError(f"{url}: is a folder; name its files, such as {url.rstrip('/')}/*.tar")
    if about.get("size") is None:
        raise DataError(f"{url}: the server does not say how long it is, so that parts of it cannot be read; copy it")
    return about


def _system(url: str) -> tuple[Any, str]:
    """The file system, the same object for each call of a process, and the path in it."""
    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"{url}: {error}") from error
    except ValueError as error:
        raise DataError(f"{url}: {error}") from error
    return system, path


def _asked(url: str, ask: Callable[[], T]) -> T:
    """What ``ask`` gives; networks that fail for a moment are asked again."""
    for number in range(TRIES):
        try:
            return ask()
        except FileNotFoundError as error:
            raise DataError(f"{url}: no such file") from error
        except PermissionError as error:
            raise DataError(f"{url}: may not be read: {error}") from error
        except (OSError, TimeoutError) as error:
            if number == TRIES - 1:
                raise DataError(f"{url}: cannot be read, after {TRIES} attempts: {error}") from error
            time.sleep(PAUSE * 2**number)
    raise AssertionError
