"""From counted steps to any length: memory by parts, time by what bounds it, and the longest row that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seqlong.errors import SeqlongError
from seqlong.planning.ledger import KINDS
from seqlong.planning.machines import Machine, Reached
from seqlong.planning.step import Job, Sketch, sketch

GIB = 2**30
#: Rows longer than this many tokens, or tiles, are not counted but continued from shorter ones.
COUNTED, TILES = 131072, 4


@dataclass(frozen=True)
class Memory:
    """Bytes at the fullest moment of a step.

    Attributes:
        weights: and buffers.
        moments: of the optimiser.
        gradients: as far as they exist then.
        kept: made in the forward pass and waiting for the backward.
        working: everything else: what the part that runs then makes.
        part: which part that is.
    """

    weights: float
    moments: float
    gradients: float
    kept: float
    working: float
    part: str

    @property
    def peak(self) -> float:
        """All of it: what ``torch.cuda.max_memory_allocated`` will say."""
        return self.weights + self.moments + self.gradients + self.kept + self.working


@dataclass(frozen=True)
class Time:
    """Seconds of a step, by what they go to; ``host`` is how long it takes to say what is to be done."""

    products: float
    attention: float
    kernels: float
    other: float
    host: float

    @property
    def device(self) -> float:
        """What the GPU is busy for."""
        return self.products + self.attention + self.kernels + self.other

    @property
    def total(self) -> float:
        """The GPU waits for the host where rows are short."""
        return max(self.device, self.host)


class Estimate:
    """Steps of any length of a job, from sketches of two lengths.

    Between and beyond them each part's fullest moment, each kind's bytes and calls are continued as a line, FLOPs as a
    line through nothing and a square: what attention over the whole row needs.

    Args:
        sketches: of two lengths, the shorter one first.
    """

    def __init__(self, sketches: Sequence[Sketch]) -> None:
        self.short, self.long = sketches
        if not self.short.length < self.long.length:
            raise SeqlongError("an estimate needs two lengths, the shorter one first")

    def memory(self, length: float | int) -> Memory:
        """What rows of ``length`` tokens hold at the fullest moment of a step."""
        best: tuple[float, str] = (0.0, "")
        for part, moment in self.long.moments.items():
            before = self.short.moments.get(part)
            live = float(moment.live) if before is None else self._line(before.live, moment.live, length)
            best = max(best, (live, part))
        live, part = best
        before, after = self.short.moments.get(part), self.long.moments[part]
        kept = float(after.kept) if before is None else self._line(before.kept, after.kept, length)
        gradients, weights = float(self.long.made[part]), float(self.long.weights)
        moments = self.long.standing - weights
        return Memory(weights, moments, gradients, kept, live - self.long.standing - gradients - kept, part)

    def saved(self, length: float | int) -> float:
        """Bytes that the forward pass of such rows leaves for the backward."""
        return self._line(self.short.kept, self.long.kept, length)

    def longest(self, room: float) -> int:
        """The most tokens of a row whose step fits into ``room`` bytes; 0 if even a short one does not."""
        low, high = 0, 1024
        while self.memory(high).peak <= room:
            low, high = high, 2 * high
            if high > 1 << 40:
                return high
        while high - low > max(1, low >> 10):
            middle = (low + high) // 2
            low, high = (middle, high) if self.memory(middle).peak <= room else (low, middle)
        return low

    def flops(self, kind: str, length: float | int) -> float:
        """Of one kind, of a batch of rows of ``length`` tokens."""
        a, b = self.short.length, self.long.length
        one, two = self.short.flops[kind] / a, self.long.flops[kind] / b
        square = max(0.0, (two - one) / (b - a))
        return ((one if square == 0 else one - square * a) + square * length) * length

    def moved(self, kind: str, length: float | int) -> float:
        """Bytes, of one kind."""
        return max(0.0, self._line(self.short.moved[kind], self.long.moved[kind], length))

    def time(self, length: float | int, machine: Machine, reached: Reached, batches: int = 1) -> Time:
        """Seconds of a step on one GPU.

        Args:
            length: tokens of a row.
            machine: the GPU.
            reached: what of its rates is reached.
            batches: in a step.
        """
        scale = batches / min(batches, 2)  # two were counted where there are more

        def bound(kind: str, share: float, bandwidth: float) -> float:
            compute = self.flops(kind, length) / (share * machine.flops)
            return scale * max(compute, self.moved(kind, length) / (bandwidth * machine.bandwidth))

        calls = sum(self._line(self.short.calls[kind], self.long.calls[kind], length) for kind in KINDS)
        return Time(
            bound("products", reached.products, reached.other),
            bound("attention", reached.attention, reached.other),
            bound("kernels", 1.0, reached.kernels),
            bound("other", 1.0, reached.other),
            scale * calls * reached.call,
        )

    def _line(self, first: float | int, second: float | int, length: float | int) -> float:
        a, b = self.short.length, self.long.length
        return float(first + (second - first) * (length - a) / (b - a))


def estimate(job: Job, processors: int, length: int | None = None) -> Estimate:
    """Count two lengths of a job and continue from them.

    The longer one is the length asked for, where that takes no more than some ten thousand operations; then its memory
    is counted, and only other lengths are estimated.

    Args:
        job: what is trained.
        processors: multiprocessors of the GPU; 0 for a CPU.
        length: of interest; the job's if not given.
    """
    length = length or job.length
    most = TILES * job.tile if job.tile else COUNTED
    upper = max(2, min(length, most))
    if job.tile and upper > job.tile:
        upper -= upper % job.tile
        lower = max(upper // 2 - upper // 2 % job.tile, job.tile) if upper > job.tile else upper // 2
    else:
        lower = upper // 2
    lower = lower - lower % 64 or lower
    return Estimate([sketch(job, lower, processors), sketch(job, upper, processors)])


def room(machine: Machine, reached: Reached) -> float:
    """Bytes that tensors may take on a GPU."""
    return (machine.memory - reached.context) * GIB / (1 + reached.memory)
