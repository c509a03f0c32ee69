"""Throughput: tokens a second over all data-parallel ranks, tokens so far, peak memory."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from seqlong.callbacks.loggers import log_now


class Throughput(Callback):
    """Log ``throughput/tokens_per_s``, ``memory/peak_gib`` and ``train/tokens`` every ``trainer.log_every_n_steps``.

    Time for validation and checkpoints is left out. Nothing is synchronised for it: over the steps between two rows
    the error is at most the one step that a GPU has queued.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.tokens_per_second: float | None = None
        self.peak_gib: float | None = None
        self._since = 0
        self._seconds = 0.0
        self._started: float | None = None
        self._logged_step = -1

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens = int(state_dict.get("tokens", 0))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        tokens = count_tokens(batch) * data_parallel_size(trainer)
        self.tokens += tokens
        self._since += tokens
        step = trainer.global_step
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if step % every or step == self._logged_step or trainer.fit_loop._should_accumulate():
            return
        self._logged_step = step
        self._pause()
        self._started = time.perf_counter()
        self.tokens_per_second = self._since / self._seconds if self._seconds > 0 else None
        self.peak_gib = peak_memory_gib(pl_module.device)
        self._since, self._seconds = 0, 0.0
        metrics = {"train/tokens": float(self.tokens), "memory/peak_gib": self.peak_gib}
        if self.tokens_per_second is not None:
            metrics["throughput/tokens_per_s"] = self.tokens_per_second
        log_now(trainer, metrics)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pause()  # the clock starts again with the next batch

    def _pause(self) -> None:
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None


def count_tokens(batch: Any) -> int:
    """Rows times positions of a SequenceBatch (anything with a ``shape``), a tensor, or the first of a sequence."""
    if isinstance(batch, (list, tuple)) and batch:
        return count_tokens(batch[0])
    shape = getattr(batch, "shape", None)
    return int(shape[0]) * (int(shape[1]) if len(shape) > 1 else 1) if shape else 0


def data_parallel_size(trainer: Trainer) -> int:
    """How many ranks read different rows."""
    shares = trainer.distributed_sampler_kwargs
    return int(shares["num_replicas"]) if shares else 1


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: what torch allocated on a GPU, or the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
