"""What a text can be pressed into without a neural network: counting pairs of bytes, bzip2, xz. Bits per byte."""

from __future__ import annotations

import bz2
import hashlib
import json
import lzma
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.dna.cache import atomic_write, default_cache_dir
from seqlong.datamodules.text.corpus import Corpus
from seqlong.datamodules.text.rows import Spans

#: Bytes of the validation split that are compressed, and of the training split that pairs are counted in.
MEASURED, COUNTED = 1 << 23, 1 << 27
_SMOOTHING = 4.0
_CHUNK = 1 << 22
_FORMAT = 1


def floors(corpus: Corpus, training: Spans, validation: Spans, cache_dir: str | Path | None = None) -> dict[str, float]:
    """Bits per byte of the validation split: ``order-1``, ``bz2`` and ``xz``.

    ``order-1`` is ``P(x | c) = (n(c x) + λ P(x)) / (n(c) + λ)``, counted on the training split, c the byte before and
    P(x) its order-0 counterpart, λ = 4. bzip2 and xz, at their strongest, compress the split as one stream: they have
    seen no training text. At most `MEASURED` bytes are measured.

    Args:
        corpus: the documents.
        training: spans to count.
        validation: spans to measure.
        cache_dir: where results are kept.
    """
    folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    named = hashlib.sha256(json.dumps([_FORMAT, corpus.digests, MEASURED, COUNTED]).encode())
    for spans in (training, validation):
        for column in (spans.document, spans.start, spans.stop):
            named.update(np.ascontiguousarray(column).data)
    memo = folder / f"{named.hexdigest()[:32]}.floors.json"
    with suppress(OSError, ValueError):
        return {str(name): float(bits) for name, bits in json.loads(memo.read_bytes()).items()}
    found = _measure(corpus, training, validation)
    with suppress(OSError), atomic_write(memo) as file:  # a note spares time
        file.write(json.dumps(found).encode())
    return found


def _measure(corpus: Corpus, training: Spans, validation: Spans) -> dict[str, float]:
    pairs = np.zeros(1 << 16, dtype=np.int64)
    for block in _blocks(corpus, training, COUNTED):
        pairs += np.bincount(_codes(block), minlength=1 << 16)
    counts = pairs.reshape(256, 256).astype(np.float64)
    single = counts.sum(axis=0)
    zero = (single + _SMOOTHING / 256) / (single.sum() + _SMOOTHING)
    one = (counts + _SMOOTHING * zero) / (counts.sum(axis=1, keepdims=True) + _SMOOTHING)
    cost = -np.log2(one).reshape(-1)
    bits, size = 0.0, 0
    compressors: dict[str, Any] = {
        "bz2": bz2.BZ2Compressor(9),
        "xz": lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME),
    }
    pressed = dict.fromkeys(compressors, 0)
    for block in _blocks(corpus, validation, MEASURED):
        size += len(block)
        bits += float(cost[_codes(block)].sum()) - float(np.log2(zero[block[0]]))
        for name, compressor in compressors.items():
            pressed[name] += len(compressor.compress(block))
    if not size:
        return {}
    for name, compressor in compressors.items():
        pressed[name] += len(compressor.flush())
    return {"order-1": bits / size, **{name: 8 * amount / size for name, amount in pressed.items()}}


def _codes(block: bytes) -> NDArray[np.int64]:
    """Each pair of bytes as a number."""
    data = np.frombuffer(block, dtype=np.uint8).astype(np.int64)
    return data[:-1] << 8 | data[1:]


def _blocks(corpus: Corpus, spans: Spans, limit: int) -> Iterator[bytes]:
    """Texts of stretches one after the other, ``limit`` bytes of them, in blocks."""
    held: list[bytes] = []
    size = 0
    columns = (spans.document.tolist(), spans.start.tolist(), spans.stop.tolist())
    for document, start, stop in zip(*columns, strict=True):
        while start < stop and limit > 0:
            text = corpus.text(document, start, min(stop, start + _CHUNK))[:limit]
            start += _CHUNK
            limit -= len(text)
            held.append(text)
            size += len(text)
            if size >= _CHUNK:
                yield b"".join(held)
                held, size = [], 0
    if size:
        yield b"".join(held)
