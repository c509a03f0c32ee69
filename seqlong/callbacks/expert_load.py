"""ExpertLoad: writes how often each expert was chosen into the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

FILE = "experts.csv"
HEADER = "step,block,part,loads\n"


class ExpertLoad(Callback):
    """Append a line a router to experts.csv every ``trainer.log_every_n_steps``, for the report.

    ``step,block,part,loads``: optimiser steps done; number of the block from 1; ``ffn``, or ``mixer`` for a router in
    the block's mixer, ``mixer/<name>`` for one of several; and the choices of each of its experts over the steps since
    the lines before, with spaces between. Nothing is written where no block has experts.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        experts = getattr(pl_module, "experts", None)
        if experts is None or step % every or trainer.fit_loop._should_accumulate() or not trainer.is_global_zero:
            return
        loads: dict[tuple[int, str], list[int]] = experts.loads()
        if not loads:
            return
        path = Path(trainer.default_root_dir) / FILE
        with path.open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write(HEADER)
            for (block, part), counts in loads.items():
                file.write(f"{step},{block},{part},{' '.join(map(str, counts))}\n")
