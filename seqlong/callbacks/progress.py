"""Progress: one line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from seqlong.callbacks.run_folder import RunFolder
from seqlong.callbacks.throughput import Throughput


class Progress(Callback):
    """Show step/total, loss and validation in bits, the floor, tokens/s, memory and the time left.

    Args:
        every: seconds between plain lines where the output is no terminal (a file, a scheduler's log).
        refresh: seconds between two looks at the metrics on a terminal (each look waits for the GPU once).
    """

    def __init__(self, every: float = 10.0, refresh: float = 0.5) -> None:
        self.every = every
        self.refresh = refresh
        self._console = Console()
        self._bar: RichProgress | None = None
        self._task: Any = None
        self._shown = 0.0
        self._shown_step = -1
        self._first: tuple[float, int] | None = None
        self._paused = 0.0
        self._paused_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._first = (time.monotonic(), trainer.global_step)
        self._shown = time.monotonic()
        if self._console.is_terminal:
            columns = (
                TextColumn("[bold]step {task.description}"),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = RichProgress(*columns, console=self._console, transient=False, refresh_per_second=4)
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._task = self._bar.add_task(self._count(trainer), total=total, text="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._first is None:
            return
        wait = self.refresh if self._bar is not None else self.every
        if time.monotonic() - self._shown >= wait:
            self._show(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused_at = time.monotonic()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._bar is not None:
            total = sum(count for count in trainer.num_val_batches if math.isfinite(count))
            self._bar.update(self._task, text=f"validating {batch_idx + 1}/{int(total)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused += time.monotonic() - self._paused_at
        if self._first is not None and not trainer.sanity_checking:
            self._show(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._first is not None and self._shown_step != trainer.global_step:
            self._show(trainer)
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _show(self, trainer: Trainer) -> None:
        self._shown, self._shown_step = time.monotonic(), trainer.global_step
        text = "  ".join(describe(trainer, self._left(trainer)))
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, description=self._count(trainer), text=text)
        else:
            print(f"step {self._count(trainer)}  {text}", flush=True)

    def _left(self, trainer: Trainer) -> float | None:
        assert self._first is not None
        start, first_step = self._first
        done = trainer.global_step - first_step
        if trainer.max_steps <= 0 or done <= 0:
            return None
        seconds = time.monotonic() - start - self._paused
        return max(0.0, seconds / done * (trainer.max_steps - trainer.global_step))

    def _count(self, trainer: Trainer) -> str:
        return f"{trainer.global_step}/{trainer.max_steps}" if trainer.max_steps > 0 else str(trainer.global_step)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._first = None


def describe(trainer: Trainer, seconds_left: float | None = None) -> list[str]:
    """The parts of the line, those that are known."""
    metrics = trainer.callback_metrics
    parts = []
    if (bits := _bits(metrics, "train")) is not None:
        parts.append(f"loss {bits:.4f} bits")
    if (bits := _bits(metrics, "val")) is not None:
        parts.append(f"val {bits:.4f}")
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    floors = [f for c in callbacks if isinstance(c, RunFolder) for f in c.floors]
    if floors:
        lowest = min(floors, key=lambda floor: float(floor["bits"]))
        parts.append(f"floor {float(lowest['bits']):.4f} ({lowest['name']})")
    for callback in callbacks:
        if isinstance(callback, Throughput):
            if callback.tokens_per_second is not None:
                parts.append(f"{callback.tokens_per_second:,.0f} tokens/s")
            if callback.peak_gib is not None:
                parts.append(f"{callback.peak_gib:.2f} GiB")
    skipped = metrics.get("skipped_steps")
    if skipped is not None:
        parts.append(f"skipped {int(skipped)}")
    if seconds_left is not None:
        parts.append(f"ETA {timedelta(seconds=round(seconds_left))}")
    return parts


def _bits(metrics: Any, part: str) -> float | None:
    if f"{part}/bits" in metrics:
        return float(metrics[f"{part}/bits"])
    return float(metrics[f"{part}/loss"]) / math.log(2) if f"{part}/loss" in metrics else None
