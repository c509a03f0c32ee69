"""The floor under a model of DNA: an order-k Markov model with back-off, counted on both strands.

    P_k(x | c) = (n(c x) + λ · P_{k-1}(x | c')) / (n(c) + λ),    P_{-1} = 1/4

where c is the k bases before x, c' the last k - 1 of them, and n counts the training regions and their reverse
complements. λ = 4 is the smoothing of Witten and Bell (1991), where it is the number of different letters seen after c;
repetitive genomes do better with more (MacKay and Peto 1995), so λ is chosen beside k. A context cut short by a
region's beginning or by an unknown base backs off to as much of it as there is. Unknown bases are neither counted nor
scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.dna.alphabet import BASE_TABLE, translate
from seqlong.datamodules.dna.genome import Genome
from seqlong.datamodules.dna.splits import Region
from seqlong.errors import DataError

#: Orders above this would need more than a gibibyte of counts.
MAX_ORDER = 12
#: Weights λ of the lower order that are tried.
SMOOTHING = (4.0, 16.0, 64.0)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class MarkovFloor:
    """What the best order reaches.

    Attributes:
        order: k with the fewest bits on the scored regions.
        smoothing: the λ it has them with.
        bits: its bits per base there.
        by_order: bits per base of every order tried, from 0, each with its best λ.
        bases: bases scored.
    """

    order: int
    smoothing: float
    bits: float
    by_order: list[float]
    bases: int


def markov_floor(
    genome: Genome, training: Iterable[Region], scored: Iterable[Region], max_order: int | None = None
) -> MarkovFloor:
    """Fit on ``training`` regions, score ``scored`` regions with every order, and take the best.

    Args:
        genome: where the bases are.
        training: regions to count.
        scored: held-out regions, each base of which is scored once.
        max_order: highest order to try; null is the most that one training base a context allows, at most 12.

    Raises:
        DataError: the scored regions hold no known base.
    """
    training = list(training)
    if max_order is None:
        bases = sum(region.length for region in training)
        max_order = max(0, min(MAX_ORDER, (bases.bit_length() - 1) // 2))
    return _score(genome, scored, _count(genome, training, max_order))


def _count(genome: Genome, training: Iterable[Region], max_order: int) -> list[NDArray[np.int64]]:
    """For every order k the counts of the (k + 1)-mers on both strands; the last base is the lowest digit.

    The longest words alone are counted, and the shorter from them, so that the ``max_order`` bases after a region's
    start or an unknown base are in no count.
    """
    top = np.zeros(4 ** (max_order + 1), dtype=np.int32)
    for codes, run in _chunks(genome, training, max_order):
        # Sorting first makes the walk through a table far larger than the caches a straight one: ten times as fast.
        whole = np.sort(codes[run > max_order])
        first = np.flatnonzero(np.concatenate([[True], whole[1:] != whole[:-1]])) if whole.size else whole
        top[whole[first]] += np.diff(first, append=whole.size).astype(np.int32)
    # Reverse complement of every (k + 1)-mer at once: digits in reverse order, each d turned to 3 - d.
    cube = top.reshape((4,) * (max_order + 1))
    # Sums over contexts pass 2^31 on a genome as large as ours, so they are counted in 64 bits from here on.
    other = cube.transpose()[(slice(None, None, -1),) * (max_order + 1)]
    top = np.add(cube, other, dtype=np.int64).reshape(-1)
    counts = [top]
    for _ in range(max_order):  # shorter contexts: sum over the oldest base, the highest digit
        counts.append(counts[-1].reshape(4, -1).sum(axis=0, dtype=np.int64))
    return counts[::-1]


def _score(genome: Genome, scored: Iterable[Region], counts: list[NDArray[np.int64]]) -> MarkovFloor:
    max_order = len(counts) - 1
    contexts = [table.reshape(-1, 4).sum(axis=1, dtype=np.int64) for table in counts]
    bits, bases = np.zeros((len(SMOOTHING), max_order + 1)), 0
    weight = np.array(SMOOTHING, dtype=np.float32)[:, None]
    for codes, run in _chunks(genome, scored, max_order):
        known = run > 0
        codes, run = codes[known], run[known]
        bases += codes.size
        probability = np.full((len(SMOOTHING), codes.size), 0.25, dtype=np.float32)
        for k in range(max_order + 1):
            code = codes & (4 ** (k + 1) - 1)
            seen, before = counts[k][code].astype(np.float32), contexts[k][code >> 2].astype(np.float32)
            smoothed = (seen + weight * probability) / (before + weight)
            probability = np.where(run > k, smoothed, probability)
            bits[:, k] -= np.log2(probability).sum(axis=1, dtype=np.float64)
    if not bases:
        raise DataError("Markov floor: the validation regions hold no known base (A, C, G, T)")
    bits /= bases
    best, order = (int(place) for place in np.unravel_index(np.argmin(bits), bits.shape))
    return MarkovFloor(order, SMOOTHING[best], float(bits[best, order]), bits.min(axis=0).tolist(), bases)


def _chunks(
    genome: Genome, regions: Iterable[Region], max_order: int
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """For every base the code of the (max_order + 1)-mer that it ends, and how many known bases in a row it ends.

    The code has garbage in the digits of bases that are unknown or before the region; the run says how many are good.
    """
    for contig, start, stop in regions:
        for begin in range(start, stop, _CHUNK):
            lead = min(max_order, begin - start)
            digits = translate(genome.read(contig, begin - lead, min(begin + _CHUNK, stop)), BASE_TABLE)
            places = np.arange(1, digits.size + 1, dtype=np.int32)
            run = places - np.maximum.accumulate(np.where(digits == 4, places, 0))
            yield _codes(digits, max_order + 1)[lead:], run[lead:]


def _codes(digits: NDArray[np.uint8], size: int) -> NDArray[np.int32]:
    """The code of the ``size``-mer that every base ends, put together from those of 1, 2, 4, ... bases."""
    power = (digits & 3).astype(np.int32)  # the code of the `width` bases up to here
    code, done, width = np.zeros_like(power), 0, 1
    while True:
        if size & width:
            code[done:] |= power[: power.size - done] << (2 * done)
            done += width
        if done == size:
            return code
        longer = power.copy()
        longer[width:] |= power[:-width] << (2 * width)
        power, width = longer, 2 * width
