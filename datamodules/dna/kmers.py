"""Words of k bases, as numbers: the same for a word and its reverse complement."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.dna.alphabet import BASE_TABLE, translate

#: Bases handled at a time.
PART = 1 << 21


def words(bases: NDArray[np.uint8], k: int) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """The canonical word that begins at each position.

    A = 0, C = 1, G = 2, T = 3, two bits a base, the first base highest; the smaller of the word and of its reverse
    complement. Made by doubling, in about 2 log2 k passes.

    Args:
        bases: ``(t)`` letters.
        k: length of a word, 1 to 32.

    Returns:
        ``(t - k + 1)`` words, and whether all k bases are known.
    """
    if not 1 <= k <= 32:
        raise ValueError(f"words of {k} bases; expected 1 to 32")
    digits = translate(bases, BASE_TABLE)
    if digits.size < k:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.bool_)
    unknown = digits > 3
    code = np.where(unknown, 0, digits).astype(np.uint64)
    forward = _joined(code, k, False)
    backward = _joined(np.uint64(3) - code, k, True)
    bad = np.concatenate([[0], np.cumsum(unknown)])
    return np.minimum(forward, backward), bad[k:] == bad[: digits.size - k + 1]


def _joined(code: NDArray[np.uint64], k: int, backward: bool) -> NDArray[np.uint64]:
    """Words of k digits from single ones; with ``backward`` the last digit is the highest."""
    size = code.size - k + 1
    made = np.zeros(size, dtype=np.uint64)
    power, width, done = code, 1, 0  # words of `width` digits, from each position
    while True:
        if k & width:
            part = power[done : done + size]
            if backward:
                made |= part << np.uint64(2 * done)
            else:
                made |= part << np.uint64(2 * (k - done - width))
            done += width
        if done == k:
            return made
        first, second = power[: power.size - width], power[width:]
        shift = np.uint64(2 * width)
        power = (second << shift) | first if backward else (first << shift) | second
        width *= 2


def record_words(
    bases: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64], k: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
    """``(record, word)`` arrays of the known words of every record, in parts of about ``PART`` bases."""
    first = 0
    while first < len(starts):
        last, total = first, 0
        while last < len(starts) and (last == first or total + ends[last] - starts[last] <= PART):
            total += int(ends[last] - starts[last])
            last += 1
        if last == first + 1 and total > PART:  # one long record, in pieces that share k - 1 bases
            for begin in range(int(starts[first]), int(ends[first]) - k + 1, PART):
                found, known = words(bases[begin : min(begin + PART + k - 1, int(ends[first]))], k)
                yield np.full(int(known.sum()), first, dtype=np.int64), found[known]
        else:
            chosen = [bases[starts[n] : ends[n]] for n in range(first, last)]
            joined = np.full(total + last - first, ord("N"), dtype=np.uint8)  # an N between records ends all words
            owner = np.repeat(np.arange(first, last), [part.size + 1 for part in chosen])
            position = 0
            for part in chosen:
                joined[position : position + part.size] = part
                position += part.size + 1
            found, known = words(joined, k)
            yield owner[: known.size][known], found[known]
        first = last


def count_matrix(
    bases: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64], sizes: tuple[int, ...]
) -> NDArray[np.float32]:
    """``(n f)`` square roots of the shares that each canonical word has of a record, for all word lengths in ``sizes``.

    (The root makes counts of few words alike in variance; Hellinger's distance is Euclid's between them.)
    """
    blocks = []
    for k in sizes:
        every = np.arange(4**k, dtype=np.uint64)
        shifts = np.uint64(2) * np.arange(k, dtype=np.uint64)
        digits = (every[:, None] >> shifts) & np.uint64(3)
        other = ((np.uint64(3) - digits) << (np.uint64(2 * (k - 1)) - shifts)).sum(axis=1).astype(np.uint64)
        kept, column = np.unique(np.minimum(every, other), return_inverse=True)
        made = np.zeros((len(starts), kept.size), dtype=np.float32)
        for owner, word in record_words(bases, starts, ends, k):
            flat = owner * kept.size + column[word.astype(np.int64)]
            low, high = (int(owner[0]), int(owner[-1])) if owner.size else (0, -1)
            tally = np.bincount(flat - low * kept.size, minlength=(high - low + 1) * kept.size)
            made[low : high + 1] += tally.reshape(-1, kept.size)
        made /= np.maximum(made.sum(axis=1, keepdims=True), 1)
        blocks.append(np.sqrt(made, out=made))
    return np.concatenate(blocks, axis=1)
