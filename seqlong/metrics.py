"""Figures that are sums: exact over any number of ranks, without waiting for the device until they are read.

Sums are float64 and int64: in float32 a sum of 1e8 terms stops growing.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric


def world() -> tuple[int, int]:
    """``(rank, ranks)`` of this process; (0, 1) where nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class BitsPerToken(Metric):
    """Mean of ``-log2 p(target)`` over the positions that count, each counted once, over all ranks."""

    full_state_update = False
    higher_is_better = False
    nats: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Float[Tensor, "b t"], counted: Bool[Tensor, "b t"]) -> None:
        """Add positions.

        Args:
            nll: negative log-likelihood of each target, nats.
            counted: which positions count.
        """
        self.nats += torch.where(counted, nll, 0).sum(dtype=torch.float64)
        self.count += counted.sum()

    def compute(self) -> Tensor:
        """Bits per token; NaN when nothing was counted."""
        return (self.nats / self.count / math.log(2)).float()


class Accuracy(Metric):
    """Share of the positions that count whose most likely token is the target, over all ranks."""

    full_state_update = False
    higher_is_better = True
    correct: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Int[Tensor, "b t"], targets: Int[Tensor, "b t"], counted: Bool[Tensor, "b t"]) -> None:
        """Add positions.

        Args:
            predicted: the most likely token of each position.
            targets: the right one.
            counted: which positions count.
        """
        self.correct += ((predicted == targets) & counted).sum()
        self.count += counted.sum()

    def compute(self) -> Tensor:
        """A share from 0 to 1; NaN when nothing was counted."""
        return self.correct / self.count


class RunningSums:
    """Named sums that stay on the device, for figures of the steps between two rows of a log.

    All ranks must add the same names. Reading is one small all_reduce for all of them.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, **values: Tensor | float) -> None:
        """Add one number (or tensor of one) to each named sum."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                term = value.detach().to(torch.float64).reshape(())
            else:
                term = torch.tensor(value, dtype=torch.float64)
            before = self._sums.get(name)
            self._sums[name] = term if before is None else before.to(term.device) + term

    def read(self) -> dict[str, Tensor]:
        """The sums over all ranks, which every rank must ask for together."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        devices = [value.device for value in self._sums.values()]
        device = next((device for device in devices if device.type != "cpu"), devices[0])
        values = torch.stack([self._sums[name].to(device) for name in names])
        if world()[1] > 1:
            dist.all_reduce(values)
        return dict(zip(names, values.unbind(), strict=True))

    def reset(self) -> None:
        """Start again from nothing."""
        self._sums = {}

    def load(self, sums: dict[str, Tensor]) -> None:
        """Go on from what ``read`` returned, on any number of ranks."""
        first = world()[0] == 0
        self._sums = {name: value if first else torch.zeros_like(value) for name, value in sums.items()}
