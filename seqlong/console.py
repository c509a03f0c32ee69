"""What a run says on the terminal: one clean line for what matters; Lightning's tips and facts are left out."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import torch

from seqlong import runs

_HARMLESS = (
    ".*does not have many workers.*",
    ".*LeafSpec.*",
    ".*ended before the epoch ended.*",  # the data module starts where training stopped
    ".*smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*no `val_dataloader`.*",
    ".*srun.*",
    ".*sync_dist=True.*",
    ".*GPU available but not used.*",
    ".*lr_scheduler.step\\(\\).*before.*optimizer.step.*",  # after a step that FiniteGuard skipped
    ".*torch.distributed.*barrier.*device.*",
)


def set_up() -> None:
    """Set up logging and warnings of this process."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in _HARMLESS:
        warnings.filterwarnings("ignore", message=pattern)
    warnings.showwarning = _show_warning
    logger = logging.getLogger("seqlong")
    if not logger.handlers:
        logger.addHandler(_Stderr())
        logger.propagate = False
    logger.setLevel(logging.INFO if runs.rank() == 0 else logging.ERROR)
    torch.set_float32_matmul_precision("high")


class _Stderr(logging.Handler):
    """Messages alone, on whatever stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    if runs.rank() == 0:
        print(f"warning: {' '.join(str(message).split())}", file=file or sys.stderr)
