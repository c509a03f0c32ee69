"""Mixtures: which source each training row comes from, in given shares, as a function of the row's number alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.sampler import permute
from seqlong.errors import ConfigError

#: Rows in which the shares are kept exactly, but for rounding.
BLOCK = 1000
_SLOTS = 71  # stream of random numbers


def slots(weights: Sequence[float], places: int) -> NDArray[np.int64]:
    """Divide ``places`` in proportion to ``weights``, by largest remainder, at least one to each positive weight.

    Raises:
        ConfigError: a weight is negative or not finite, all are zero, or there are more sources than places.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if not shares.size or not np.isfinite(shares).all() or shares.min() < 0 or shares.sum() <= 0:
        raise ConfigError(f"weights {list(weights)} must be 0 or more, and one at least above 0")
    wanted = int((shares > 0).sum())
    if wanted > places:
        raise ConfigError(f"{wanted} sources cannot share {places} rows; leave some out, or raise batch_size")
    exact = shares / shares.sum() * places
    count = np.floor(exact).astype(np.int64)
    count[(shares > 0) & (count == 0)] = 1
    while count.sum() < places:
        count[np.argmax(exact - count)] += 1
    while count.sum() > places:  # from whoever has most above its share, and more than one
        count[np.argmax(np.where(count > 1, count - exact, -np.inf))] -= 1
    return count


class Mixture:
    """Assign row numbers to sources: a bijection between the numbers and (source, number in the source).

    In each run of `BLOCK` rows source s has ``slots(weights, BLOCK)[s]`` of them, at places that are permuted anew.

    Args:
        weights: share of the rows of each source, of any sum.
        key: counters that name the permutation, such as ``(seed, stage)``.
    """

    def __init__(self, weights: Sequence[float], *key: int) -> None:
        self.counts = slots(weights, BLOCK)
        self._first = np.cumsum(self.counts) - self.counts
        self._owner = np.repeat(np.arange(len(self.counts)), self.counts)
        self._key = key

    def assign(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sources of rows, and the rows' numbers within them.

        Args:
            numbers: ``(n)`` row numbers, 0 or more.
        """
        blocks, places = numbers // BLOCK, numbers % BLOCK
        slot = np.empty_like(places)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            slot[here] = permute(places[here], BLOCK, *self._key, _SLOTS, block)
        source = self._owner[slot]
        return source, blocks * self.counts[source] + slot - self._first[source]
