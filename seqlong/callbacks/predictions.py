"""PredictionWriter: what `seqlong predict` computes goes to the run folder, batch by batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class PredictionWriter(Callback):
    """Save what ``predict_step`` returns to ``predictions/rank<r>-batch<n>.pt``, for ``torch.load``."""

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        folder = Path(trainer.default_root_dir) / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(outputs, folder / f"rank{trainer.global_rank}-batch{batch_idx:06d}.pt")
