"""The run folder's own records of the metrics: metrics.csv and TensorBoard.

Both number rows by the optimiser steps done. (Lightning hands its loggers one less. Its CSVLogger is not used because
it deletes the earlier rows when a run goes on in the same folder.)
"""

from __future__ import annotations

import csv
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

HEADER = ("time", "step", "name", "value")
#: Lightning adds the number of the epoch to everything; there is only one, endless.
_IGNORED = ("epoch",)


class MetricsCsv(Logger):
    """Append metrics to a CSV file in long form: ``time,step,name,value`` (unix seconds, optimiser steps done).

    Args:
        path: the file; made with its header when the first metric comes.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> None:
        """Take the step from ``trainer``."""
        self._trainer = trainer

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float | int], step: int | None = None) -> None:
        """Append a row a metric."""
        done = steps_done(self._trainer, step)
        moment = f"{time.time():.3f}"
        rows = [(moment, done, name, _text(value)) for name, value in metrics.items() if name not in _IGNORED]
        if not rows:
            return
        fresh = not self.path.exists()
        torn = not fresh and not _ends_whole(self.path)  # the writer before was killed in the middle of a line
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if torn:
                file.write("\n")
            if fresh:
                writer.writerow(HEADER)
            writer.writerows(rows)


class TensorBoard(TensorBoardLogger):
    """TensorBoard's event files in ``folder``, numbered by the optimiser steps done.

    Args:
        folder: where the event files go; a run that goes on adds another file.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(save_dir=str(Path(folder).parent), name=Path(folder).name, version="", default_hp_metric=False)
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> None:
        """Take the step from ``trainer``."""
        self._trainer = trainer

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float | int], step: int | None = None) -> None:
        """Write scalars."""
        kept = {name: value for name, value in metrics.items() if name not in _IGNORED}
        super().log_metrics(kept, steps_done(self._trainer, step))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def save(self) -> None:
        """Flush; Lightning's own also writes an empty hparams.yaml."""
        self.experiment.flush()


def steps_done(trainer: Trainer | None, step: int | None) -> int:
    """Optimiser steps done; ``step`` when there is no trainer to ask."""
    return int(trainer.global_step) if trainer is not None else int(step or 0)


def log_now(trainer: Trainer, metrics: Mapping[str, float | int]) -> None:
    """Give metrics to the loggers directly: whole numbers stay whole, and Lightning does not keep them."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)


def _text(value: Any) -> str:
    number = float(value)
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else repr(number)


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(0, 2)
        if file.tell() == 0:
            return True
        file.seek(-1, 2)
        return file.read(1) == b"\n"
