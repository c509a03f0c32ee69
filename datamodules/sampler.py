"""Which samples make up which batch: a pure function of (seed, batch number), so that its whole state is one integer.

Nothing is drawn from a generator that has to be saved. Everything random about training data is a hash of counters
(`mix`), and an epoch's order is a permutation that can be evaluated at any point (`permute`). Hence a resumed run, a
run with more workers and a run on more ranks see exactly the samples that one undisturbed process would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from seqlong.errors import ConfigError

#: What an endless training loader answers to ``len``. It has to answer: Lightning fetches one batch ahead from a
#: loader of unknown length, and that batch would be lost at every resume.
ENDLESS = 10**9

#: One integer or many.
Integers = int | np.integer[Any] | Sequence[int] | NDArray[np.integer[Any]]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6


def _finalise(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The SplitMix64 finaliser (Steele, Lea, Flood 2014): a bijection of 64 bits in which every bit moves every bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def mix(*counters: Integers) -> NDArray[np.uint64]:
    """Hash integer counters, broadcast against one another, to 64 random-looking bits each.

    Args:
        counters: integers or integer arrays, such as ``(seed, stream, sample)``. Their order matters.

    Returns:
        uint64 array of the broadcast shape, at least one-dimensional.
    """
    state = np.zeros(1, dtype=np.uint64)
    for counter in counters:
        # Signed integers wrap to their two's complement, so that negative seeds are as good as others.
        words = np.atleast_1d(np.asarray(counter)).astype(np.int64, copy=False).view(np.uint64)
        state = _finalise((state ^ _finalise(words + _GOLDEN)) + _GOLDEN)
    return state


def coin(probability: float, *counters: Integers) -> NDArray[np.bool_]:
    """True with ``probability`` for each tuple of counters (see `mix`)."""
    return (mix(*counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53 < probability


def below(bound: Integers, *counters: Integers) -> NDArray[np.int64]:
    """A number in ``[0, bound)`` for each tuple of counters; ``bound`` >= 1 broadcasts with them."""
    limit = np.asarray(bound, dtype=np.int64).view(np.uint64)
    return (mix(*counters) % limit).astype(np.int64)


def permute(index: Integers, size: int, *key: int) -> NDArray[np.int64]:
    """Evaluate at ``index`` the pseudo-random permutation of ``range(size)`` that ``key`` names, in O(1) memory.

    A Feistel network over the smallest power of four that holds ``size``, walked along its cycle until it lands
    inside (Black and Rogaway 2002): at most four rounds trips on average, any ``size`` up to 2**62.

    Args:
        index: integers in ``[0, size)``.
        size: number of things permuted.
        key: counters that name the permutation, such as ``(seed, epoch)``.

    Raises:
        ValueError: an index lies outside ``[0, size)``.
    """
    values = np.atleast_1d(np.asarray(index, dtype=np.int64))
    if values.size and (values.min() < 0 or values.max() >= size):
        raise ValueError(f"index outside [0, {size})")
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = mix(*key, np.arange(_ROUNDS))

    def network(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = word >> half, word & low
        for round_key in keys:
            left, right = right, left ^ (_finalise(right ^ round_key) & low)
        return (left << half) | right

    result = network(values.astype(np.uint64))
    outside = np.flatnonzero(result >= np.uint64(size))
    while outside.size:
        result[outside] = network(result[outside])
        outside = outside[result[outside] >= np.uint64(size)]
    return result.astype(np.int64)


@dataclass(frozen=True)
class Stage:
    """A stretch of training with rows of one length; several make a length warm-up.

    Attributes:
        length: positions in a row.
        batch_size: rows in a batch, over all ranks together.
        steps: optimizer steps that the stage lasts. The last stage lasts on, whatever this says; None is for it.
    """

    length: int
    batch_size: int
    steps: int | None = None


@dataclass(frozen=True)
class BatchRequest:
    """What a loader's worker needs to know to make one rank's share of a batch.

    Attributes:
        batch: number of the batch since training began.
        stage: index of its stage.
        length: positions in a row.
        samples: ``(b)`` int64 numbers of this rank's samples in the endless training order.
        first: number of the first sample of the stage.
        rows: rows of the batch over all ranks.
    """

    batch: int
    stage: int
    length: int
    samples: NDArray[np.int64]
    first: int
    rows: int


class BatchSampler(Sampler[BatchRequest]):
    """Endless batches, each a pure function of its number.

    Sample numbers count every row of every batch before. Rank ``r`` of ``w`` takes rows ``r, r + w, ...`` of each
    batch, so the batch as a whole is the same for every ``w``.

    Args:
        stages: the stages in order; see `Stage`.
        rank: this data-parallel rank.
        world: data-parallel ranks.
        start: number of the first batch, the only thing to remember for an exact resume.
        batches_per_step: batches that one optimizer step accumulates.

    Raises:
        ConfigError: a stage is not positive, does not divide among the ranks, or lacks ``steps`` and is not the last.
    """

    def __init__(
        self, stages: Sequence[Stage], rank: int = 0, world: int = 1, start: int = 0, batches_per_step: int = 1
    ) -> None:
        check_stages(stages, world)
        self.stages = tuple(stages)
        self.rank, self.world, self.start = rank, world, start
        batches = [(stage.steps or 0) * batches_per_step for stage in self.stages[:-1]]
        rows = [count * stage.batch_size for count, stage in zip(batches, self.stages, strict=False)]
        self._first_batch = np.concatenate([[0], np.cumsum(batches, dtype=np.int64)]).astype(np.int64)
        self._first_sample = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)]).astype(np.int64)

    def request(self, batch: int) -> BatchRequest:
        """The request for batch number ``batch``."""
        index = int(np.searchsorted(self._first_batch, batch, side="right")) - 1
        stage, first = self.stages[index], int(self._first_sample[index])
        base = first + (batch - int(self._first_batch[index])) * stage.batch_size
        samples = np.arange(base + self.rank, base + stage.batch_size, self.world, dtype=np.int64)
        return BatchRequest(batch, index, stage.length, samples, first, stage.batch_size)

    def __iter__(self) -> Iterator[BatchRequest]:
        batch = self.start
        while True:
            yield self.request(batch)
            batch += 1

    def __len__(self) -> int:
        return ENDLESS


def check_stages(stages: Sequence[Stage], world: int = 1) -> None:
    """Raise ConfigError unless every stage can be trained on ``world`` data-parallel ranks."""
    if not stages:
        raise ConfigError("stages: found an empty list, expected at least one stage of {length, batch_size, steps}")
    for number, stage in enumerate(stages, start=1):
        where = f"stage {number} of {len(stages)}" if len(stages) > 1 else "batch"
        if stage.length < 1 or stage.batch_size < 1:
            raise ConfigError(
                f"{where}: length {stage.length} and batch_size {stage.batch_size} must both be 1 or more"
            )
        if stage.batch_size % world:
            raise ConfigError(
                f"{where}: batch_size {stage.batch_size} (rows over all ranks) does not divide among {world} ranks; "
                f"take a multiple of {world}"
            )
        if number < len(stages) and (stage.steps is None or stage.steps < 1):
            raise ConfigError(
                f"{where}: steps is {stage.steps}; every stage but the last needs its number of optimizer steps"
            )


class EvaluationSampler(Sampler[NDArray[np.int64]]):
    """Row numbers of each evaluation batch: fixed order, rank ``r`` of ``w`` takes rows ``r, r + w, ...``.

    Every rank gets the same number of batches of the same number of rows, or its collectives would hang; where rows
    run out, -1 asks for a row that counts for nothing.

    Args:
        rows: rows to evaluate.
        batch_size: rows in a batch over all ranks.
        rank: this data-parallel rank.
        world: data-parallel ranks.

    Raises:
        ConfigError: ``batch_size`` does not divide among the ranks.
    """

    def __init__(self, rows: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        if batch_size < 1 or batch_size % world:
            raise ConfigError(
                f"evaluation batch size {batch_size} (rows over all ranks) does not divide among {world} ranks; "
                f"take a multiple of {world}"
            )
        self.rows, self.batch_size, self.rank, self.world = rows, batch_size, rank, world

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for start in range(0, self.rows, self.batch_size):
            stop = min(start + self.batch_size, self.rows)
            stop = start + -(-(stop - start) // self.world) * self.world
            numbers = np.arange(start + self.rank, stop, self.world, dtype=np.int64)
            yield np.where(numbers < self.rows, numbers, -1)

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)
