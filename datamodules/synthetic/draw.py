"""Draw: random numbers of many rows at once, each row's a function of its name alone."""

from __future__ import annotations

import copy

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.sampler import mix

Ints = NDArray[np.int64]
#: Up to this many candidates for one that is wanted, ``distinct`` sorts them all; beyond, it draws again what repeats.
_SORTED = 4


class Draw:
    """Random numbers for ``b`` rows: hashes of (name, number of the row, number of the call, place).

    The same calls in the same order give a row the same numbers in any batch, on any machine.

    Args:
        numbers: ``(b)`` of the rows.
        name: integers that tell this stream of rows from others, such as ``(seed, part)``.
        part: 0 for rows of training, 1 of validation, 2 of test.
    """

    def __init__(self, numbers: Ints, *name: int, part: int = 0) -> None:
        self.rows, self.numbers, self.part = len(numbers), numbers, part
        self._base = mix(*name, numbers).view(np.int64)[:, None]
        self._calls = 0

    def fork(self) -> Draw:
        """A source of its own for the same rows: however often it is asked, this one goes on the same."""
        self._calls += 1
        other = copy.copy(self)
        other._base, other._calls = mix(self._base[:, 0], self._calls, -1).view(np.int64)[:, None], 0
        return other

    def bits(self, count: int) -> NDArray[np.uint64]:
        """``(b count)`` uint64."""
        self._calls += 1
        return mix(self._base, self._calls, np.arange(count))

    def below(self, bound: int, count: int) -> Ints:
        """``(b count)`` integers in ``[0, bound)``."""
        return (self.bits(count) % np.uint64(bound)).view(np.int64)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """``(b count)`` numbers in (0, 1), neither end included."""
        return ((self.bits(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def distinct(self, bound: int, count: int) -> Ints:
        """``(b count)`` integers in ``[0, bound)``, all different within a row, in random order.

        Every ordered choice is equally likely: which numbers are drawn again depends on which repeat, not on their
        values.
        """
        if not 0 <= count <= bound:
            raise ValueError(f"{count} different numbers below {bound}")
        if bound <= max(_SORTED * count, 1024):
            order = np.argsort(self.bits(bound), axis=1, kind="stable")
            return np.ascontiguousarray(order[:, :count])
        source = self.fork()  # how often it is asked depends on the other rows
        found = source.below(bound, count)
        while True:
            again = source.below(bound, count)
            repeated = repeats(found)
            if not repeated.any():
                return found
            found = np.where(repeated, again, found)

    def subset(self, bound: int, count: int) -> Ints:
        """Like ``distinct``, in increasing order."""
        return np.sort(self.distinct(bound, count), axis=1)

    def weighted(self, log_weight: NDArray[np.float64], count: int) -> Ints:
        """``(b count)`` different indices, one after another in proportion to ``exp(log_weight)`` ``(n)`` or ``(b n)``.

        The largest of ``log_weight + Gumbel noise`` are draws without replacement (Yellott 1977).
        """
        size = log_weight.shape[-1]
        keys = log_weight - np.log(-np.log(self.uniform(size)))
        if count == size:
            return np.argsort(-keys, axis=1, kind="stable")
        largest = np.argpartition(-keys, count, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(keys, largest, axis=1), axis=1, kind="stable")
        return np.take_along_axis(largest, order, axis=1)


def repeats(values: Ints) -> NDArray[np.bool_]:
    """Where a row's value stands in the row before already."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    same = np.zeros(values.shape, dtype=np.bool_)
    same[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    out = np.empty_like(same)
    np.put_along_axis(out, order, same, axis=1)
    return out
