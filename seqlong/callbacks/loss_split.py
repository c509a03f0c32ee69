"""LossSplit: what every callback shares that asks where in a row the loss is. Sums on the device, a CSV in the end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from seqlong.batch import SequenceBatch

FILE = "losses.csv"
HEADER = "step,part,measure,low,high,count,bits\n"
#: Bins of positions and distances end here; 8 million positions.
LARGEST = 23


def octaves(per_octave: int = 1) -> list[int]:
    """Lower ends of logarithmic bins of whole numbers from 1 on: 1, 2, 4, ..., or more of them."""
    return sorted({round(2 ** (i / per_octave)) for i in range(per_octave * LARGEST + 1)})


class Bins:
    """Sums of nats and of positions, by bin.

    Args:
        lower: the smallest number of each bin, increasing; the last bin has no end.
    """

    def __init__(self, lower: list[int]) -> None:
        self.lower = lower
        self._edges = torch.tensor(lower[1:])
        self._sums: Tensor | None = None

    def add(self, numbers: Int[Tensor, "*n"], nats: Float[Tensor, "*n"], count: Tensor | None = None) -> None:
        """Add positions: each one's number, its loss, and how many it stands for (1)."""
        if self._edges.device != numbers.device:
            self._edges = self._edges.to(numbers.device)
        if self._sums is None or self._sums.device != numbers.device:
            kept = self._sums
            self._sums = torch.zeros(2, len(self.lower), dtype=torch.float64, device=numbers.device)
            if kept is not None:
                self._sums += kept.to(numbers.device)
        bins = torch.bucketize(numbers.reshape(-1), self._edges, right=True)
        ones = torch.ones_like(nats) if count is None else count
        both = torch.stack([nats.reshape(-1), ones.reshape(-1)]).double()
        self._sums.index_add_(1, bins, both)

    def rows(self) -> list[tuple[int, int | None, int, float]]:
        """``(low, high or None, positions, bits)`` of each bin that has any, over all ranks (a collective)."""
        sums = torch.zeros(2, len(self.lower), dtype=torch.float64) if self._sums is None else self._sums
        if dist.is_available() and dist.is_initialized():
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            sums = sums.to(device)
            dist.all_reduce(sums)
        nats, counts = sums.tolist()
        highs: list[int | None] = [*[edge - 1 for edge in self.lower[1:]], None]
        return [
            (low, high, round(n), nat / n / math.log(2))
            for low, high, n, nat in zip(self.lower, highs, counts, nats, strict=True)
            if n
        ]

    def reset(self) -> None:
        """Start again from nothing."""
        self._sums = None


class LossSplit(Callback):
    """Split the loss of evaluation by something, and append it to losses.csv in the run folder, for the report.

    ``step,part,measure,low,high,count,bits``: optimiser steps done, ``val`` or ``test``, what is split by, the numbers
    of the bin (``high`` is empty where it has no end), positions in it, and their mean bits.

    A subclass has ``bins`` by name and fills them in ``split``.
    """

    def __init__(self) -> None:
        self.bins: dict[str, Bins] = {}

    def split(self, module: LightningModule, batch: SequenceBatch, found: dict[str, Tensor]) -> None:
        """Add a batch; ``found`` has ``nll``, ``counted``, ``targets`` ``(b t)``, as the task computed them."""
        raise NotImplementedError(f"{type(self).__name__} must define split(module, batch, found)")

    def finished(self, trainer: Trainer, module: LightningModule, part: str) -> None:
        """Called with the bins full, before they are written."""

    def _batch(self, module: LightningModule, outputs: Any, batch: Any) -> None:
        if isinstance(outputs, dict) and isinstance(batch, SequenceBatch) and "nll" in outputs:
            self.split(module, batch, outputs)

    def _end(self, trainer: Trainer, module: LightningModule, part: str) -> None:
        if trainer.sanity_checking:
            return
        self.finished(trainer, module, part)
        lines = [
            f"{trainer.global_step},{part},{name},{low},{'' if high is None else high},{count},{bits:.6f}\n"
            for name, bins in self.bins.items()
            for low, high, count, bits in bins.rows()
        ]
        for bins in self.bins.values():
            bins.reset()
        if trainer.is_global_zero and lines:
            with (Path(trainer.default_root_dir) / FILE).open("a", encoding="utf-8") as file:
                if not file.tell():
                    file.write(HEADER)
                file.writelines(lines)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._batch(pl_module, outputs, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._batch(pl_module, outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module, "test")


def places(batch: SequenceBatch) -> Int[Tensor, "b t"]:
    """The position of each token in its segment, from 0; as the batch says, if it says."""
    if batch.positions is not None and batch.positions.dim() == 2:
        return batch.positions
    rows, length = batch.shape
    here = torch.arange(length, device=batch.inputs.device).expand(rows, length)
    if batch.segment_ids is None:
        return here
    return here - starts(batch.segment_ids)


def starts(segments: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Where the segment of each position begins."""
    here = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(begins, here, 0).cummax(dim=1).values


def chosen(values: Tensor, where: Bool[Tensor, "b t"]) -> Tensor:
    """``values[where]``, in a flat tensor."""
    return torch.broadcast_to(values, where.shape)[where]
