"""Which records of evaluation are in the training data already: the same, its other strand, or one much like it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.dna.alphabet import reverse_complement
from seqlong.datamodules.dna.kmers import record_words
from seqlong.datamodules.dna.records import Records
from seqlong.datamodules.sampler import mix

#: Words compared, bases. Two unrelated sequences hardly ever share one.
WORD = 31
#: Share of a record's words that training holds, from which on it counts as near.
NEAR = 0.5
#: Words kept of the training data; above it a sketch keeps those whose hash is small (FracMinHash).
MOST_WORDS = 20_000_000


@dataclass
class Leakage:
    """What of a split is in training, a flag for each record.

    Attributes:
        exact: the same letters.
        reverse: the reverse complement, and not the same letters.
        near: neither, but at least ``NEAR`` of its 31-mers (of either strand) are in training.
        found: a few examples, ``(record, where in training or "")``.
    """

    exact: NDArray[np.bool_]
    reverse: NDArray[np.bool_]
    near: NDArray[np.bool_]
    found: list[str] = field(default_factory=list)

    def seen(self, strict: bool) -> NDArray[np.bool_]:
        """The same sequence on either strand; with ``strict``, or one near it."""
        same = self.exact | self.reverse
        return same | self.near if strict else same

    def describe(self) -> dict[str, object]:
        """For JSON."""
        return {
            "records": int(self.exact.size),
            "exact": int(self.exact.sum()),
            "reverse_complement": int(self.reverse.sum()),
            "near": int(self.near.sum()),
            "examples": self.found,
        }


def digest(letters: NDArray[np.uint8]) -> bytes:
    """A name for a sequence; U is T."""
    return hashlib.blake2b(letters.tobytes().replace(b"U", b"T"), digest_size=16).digest()


def either_strand(letters: NDArray[np.uint8]) -> bytes:
    """A name for a sequence and its reverse complement."""
    return min(digest(letters), digest(reverse_complement(letters)))


def find_leakage(training: Records, evaluation: Records, examples: int = 5) -> Leakage:
    """Compare the records of a split with those of training.

    Args:
        training: records trained on.
        evaluation: records measured on.
        examples: how many to name.
    """
    known: dict[bytes, int] = {}
    for number in range(len(training)):
        known.setdefault(digest(training.sequence(number)), number)
    size = len(evaluation)
    exact, reverse = np.zeros(size, dtype=np.bool_), np.zeros(size, dtype=np.bool_)
    found: list[str] = []
    for number in range(size):
        letters = evaluation.sequence(number)
        twin, how = known.get(digest(letters)), "is"
        exact[number] = twin is not None
        if twin is None:
            twin, how = known.get(digest(reverse_complement(letters))), "is the other strand of"
            reverse[number] = twin is not None
        if twin is not None and len(found) < examples:
            same = training.labels[twin] == evaluation.labels[number]
            said = "" if same else f", labelled {_said(evaluation, number)} here and {_said(training, twin)} there"
            found.append(f"{evaluation.where(number)} {how} {training.where(twin)}{said}")
    near = _shared(training, evaluation) >= NEAR
    return Leakage(exact, reverse, near & ~exact & ~reverse, found)


def _said(records: Records, number: int) -> str:
    return ", ".join(records.labels[number])


def _shared(training: Records, evaluation: Records) -> NDArray[np.float64]:
    """Share of each evaluation record's words that are in training; 0 where it has none."""
    total = int(training.lengths.sum())
    scale = max(1, -(-total // MOST_WORDS))
    limit = np.uint64((1 << 64) // scale - 1) if scale > 1 else None
    parts = []
    for _, found in record_words(training.bases, training.starts, training.ends, WORD):
        parts.append(_distinct(_kept(found, limit)))
    held = _distinct(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.uint64)
    inside, every = np.zeros(len(evaluation)), np.zeros(len(evaluation))
    for owner, found in record_words(evaluation.bases, evaluation.starts, evaluation.ends, WORD):
        hashed = mix(found.view(np.int64))
        if limit is not None:
            owner, hashed = owner[hashed <= limit], hashed[hashed <= limit]
        place = np.minimum(np.searchsorted(held, hashed), max(held.size - 1, 0))
        hit = held[place] == hashed if held.size else np.zeros(hashed.size, dtype=np.bool_)
        every += np.bincount(owner, minlength=len(evaluation))
        inside += np.bincount(owner, weights=hit, minlength=len(evaluation))
    return inside / np.maximum(every, 1)


def _distinct(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Sorted, each once. (np.unique hashes integers, which takes twenty times as long for words that seldom repeat.)"""
    words = np.sort(words)
    return words[np.concatenate([[True], words[1:] != words[:-1]])] if words.size else words


def _kept(found: NDArray[np.uint64], limit: np.uint64 | None) -> NDArray[np.uint64]:
    hashed = mix(found.view(np.int64))
    return hashed if limit is None else hashed[hashed <= limit]
