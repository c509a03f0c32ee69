"""Generators of recall tasks: what was said earlier in the row is asked for later."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from seqlong.errors import ConfigError


class Row(NamedTuple):
    """One row: tokens ``(t)`` and the token that each position should predict ``(t)``, -1 where nothing is asked."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]


@runtime_checkable
class Generator(Protocol):
    """Makes rows: a pure function of a random source, so that a sample's number names it."""

    vocab_size: int

    def row(self, random: np.random.Generator, length: int) -> Row:
        """A row of ``length`` positions."""

    def describe(self) -> dict[str, object]:
        """What is asked, and what guessing gives, for reports."""


class MQAR:
    """Multi-query associative recall: pairs of a key and a value, then keys again in any order, each to be answered.

    A row begins with ``pairs`` keys, each followed by its value. Behind them each key stands once more, at an even
    distance drawn from a power law (``alpha``; 1 would be even), and the model is to answer with its value right there.
    Other positions hold random tokens, and ask nothing. Keys are the lower half of the vocabulary, values the upper.
    Source: zoology, arXiv 2312.04927.

    Args:
        pairs: of a key and a value.
        vocab_size: of keys and values together; token 0 is never used.
        alpha: exponent of the power law of distances, in (0, 1].

    Raises:
        ConfigError: too few tokens for so many keys.
    """

    def __init__(self, pairs: int = 16, vocab_size: int = 256, alpha: float = 0.1) -> None:
        if pairs < 1 or vocab_size // 2 - 1 < pairs:
            raise ConfigError(
                f"MQAR needs more keys than pairs: vocab_size {vocab_size} has {max(vocab_size // 2 - 1, 0)} keys for "
                f"{pairs} pairs; raise vocab_size above {2 * pairs + 1}"
            )
        if not 0 < alpha <= 1:
            raise ConfigError(f"MQAR needs alpha in (0, 1], found {alpha}")
        self.pairs, self.vocab_size, self.alpha = pairs, vocab_size, alpha

    def row(self, random: np.random.Generator, length: int) -> Row:
        """A row of ``length`` positions.

        Raises:
            ConfigError: the row is shorter than four tokens a pair.
        """
        if length < 4 * self.pairs:
            raise ConfigError(f"{self.pairs} pairs need rows of {4 * self.pairs} positions, found length {length}")
        half = self.vocab_size // 2
        keys = 1 + random.choice(half - 1, self.pairs, replace=False)
        values = random.integers(half, self.vocab_size, self.pairs)
        tokens = random.integers(1, self.vocab_size, length)
        targets = np.full(length, -1, dtype=np.int64)
        tokens[0 : 2 * self.pairs : 2], tokens[1 : 2 * self.pairs : 2] = keys, values
        places = (length - 2 * self.pairs) // 2
        chances = self.alpha * np.arange(1, places + 1) ** (self.alpha - 1)
        asked = 2 * self.pairs + 2 * random.choice(places, self.pairs, replace=False, p=chances / chances.sum())
        # What stands between must not say a key again, which would have another answer.
        between = np.ones(length, dtype=bool)
        between[: 2 * self.pairs] = False
        between[asked] = False
        clash = between & np.isin(tokens, keys)
        tokens[clash] = random.integers(half, self.vocab_size, int(clash.sum()))
        tokens[asked], targets[asked] = keys, values
        return Row(tokens.astype(np.int64), targets)

    def describe(self) -> dict[str, object]:
        return {"task": "multi-query associative recall", "pairs": self.pairs, "vocab_size": self.vocab_size,
                "chance": 1 / (self.vocab_size - self.vocab_size // 2)}  # fmt: skip
