"""Preemption: a signal to any one rank ends the run in good order on all of them, with a checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

log = logging.getLogger("seqlong")

#: The exit status of a process that SIGTERM ended, as schedulers know it.
EXIT_CODE = 143


class Preempted(Exception):
    """Training was stopped by a signal in the middle of a validation; the checkpoint is written."""


class Preemption(Callback):
    """Turn SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 into: finish the step, save last.ckpt, stop.

    Handlers only set a flag. At the end of a batch (where gradients are not half accumulated) the ranks agree on it
    through a group of their own on the CPU (gloo), so that a signal to one of them is enough and nothing waits in a
    collective for ever. A second Ctrl-C stops at once. Lightning's own handlers, which broadcast or save inside the
    handler (its issues 21406, 21487), are not installed.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._received: int | None = None
        self._group: Any = None
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        # Private hooks of Lightning 2.6: there is no public way to keep it from handling signals by itself.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self._install()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate() or not self._agreed(pl_module):
            return
        self._announce(trainer)
        trainer.should_stop = True  # Checkpoints, which comes after this, saves when it sees it
        if not any(hasattr(callback, "save_last") for callback in trainer.checkpoint_callbacks):
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
        # A stop makes Lightning validate first; whoever sent the signal may not wait for that long.
        trainer.fit_loop.epoch_loop._skip_next_val = True

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self._agreed(pl_module):
            return
        self._announce(trainer)
        savers = [callback for callback in trainer.checkpoint_callbacks if hasattr(callback, "save_last")]
        for callback in savers:
            callback.save_last(trainer, must=True)
        if not savers:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
        raise Preempted(self.reason)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def _agreed(self, pl_module: LightningModule) -> bool:
        received = self._received or 0
        if self._group is not None:
            flag = torch.tensor([received])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
            received = int(flag.item())
        if received:
            self.reason = f"stopped by {signal.Signals(received).name}"
        return bool(received)

    def _announce(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            log.warning("%s at step %d: saving and stopping", self.reason, trainer.global_step)

    def _install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._handle)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            self._restore()
            raise KeyboardInterrupt
        if self._received is None and os.environ.get("LOCAL_RANK", "0") == "0":
            # A step may be long: answer now. (os.write, because print is not safe inside a signal handler.)
            again = "; Ctrl-C again to stop at once, without saving" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: saving and stopping after this step{again}\n".encode())
        self._received = number
