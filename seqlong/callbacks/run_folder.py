"""RunFolder: writes what a run is, and how it ended, into its folder (``trainer.default_root_dir``)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from seqlong import runs
from seqlong.callbacks.loggers import log_now
from seqlong.callbacks.preemption import Preempted, Preemption

log = logging.getLogger("seqlong")


class RunFolder(Callback):
    """Write model.json, data.json and floors.json at the start, and the status into run.json at the end.

    The task and the data module are asked for ``describe()`` and ``floors()``; those that have none are left out.
    Floors are logged as ``floor/<name>`` too, in bits per base.
    """

    def __init__(self) -> None:
        self.floors: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            if hasattr(logger, "attach"):
                logger.attach(trainer)
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "run.json").is_file():
            runs.start(folder, folder.name)
        for name, source in (("model", pl_module), ("data", getattr(trainer, "datamodule", None))):
            describe = getattr(source, "describe", None)
            if callable(describe):
                runs.write_json(folder / f"{name}.json", describe())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        floors = getattr(getattr(trainer, "datamodule", None), "floors", None)
        if not trainer.is_global_zero or not callable(floors):
            return
        self.floors = list(floors())
        runs.write_json(Path(trainer.default_root_dir) / "floors.json", self.floors)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {f"floor/{floor['name']}": float(floor["bits"]) for floor in self.floors}
        if values:
            log_now(trainer, values)
            log.info("floors in bits: %s", ", ".join(f"{n.removeprefix('floor/')} {v:.4f}" for n, v in values.items()))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero:
            stopped = isinstance(exception, KeyboardInterrupt | Preempted)
            text = f"{type(exception).__name__}: {exception}" if str(exception) else type(exception).__name__
            runs.finish(Path(trainer.default_root_dir), "stopped" if stopped else "failed", text)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero and not trainer.interrupted:
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            reason = next((c.reason for c in callbacks if isinstance(c, Preemption) and c.reason), None)
            runs.finish(Path(trainer.default_root_dir), "stopped" if reason else "finished", reason)
