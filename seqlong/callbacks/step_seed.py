"""StepSeed: what is random in a step depends on its number only, so that a run that goes on draws the same."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepSeed(Callback):
    """Seed torch before every training batch from (seed, number of the batch, rank).

    Dropout then needs no generator state in the checkpoint, which for many ranks would be many states.

    Args:
        seed: None takes the run's seed.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        seed = self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))
        number = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        torch.manual_seed(((seed * 1_000_003 + number) * 65_537 + trainer.global_rank) % 2**63)
