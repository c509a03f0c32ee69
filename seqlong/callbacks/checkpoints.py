"""Checkpoints: ``last.ckpt`` and the best one; never half written; plain tensors and primitives only."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from seqlong import runs
from seqlong.errors import CheckpointError, ConfigError, nearest
from seqlong.parallel import parts
from seqlong.parallel.saver import publish, sweep

log = logging.getLogger("seqlong")

#: Where a checkpoint holds the resolved configuration of its run.
CONFIG_KEY = "seqlong_config"
#: Where it holds the data card: what ``describe()`` of the data module says, digests of all sequences among it.
DATA_KEY = "seqlong_data"
LAST = "last.ckpt"
_PRIMITIVES = (str, int, float, bool, bytes, type(None), Tensor)
# Lightning's copies of constructor arguments: objects that weights_only loading refuses; CONFIG_KEY replaces them.
_DROPPED = (
    "hyper_parameters",
    "hparams_name",
    "hparams_type",
    "datamodule_hyper_parameters",
    "datamodule_hparams_name",
)


class AtomicCheckpointIO(CheckpointIO):
    """Write beside the target, flush to disk, rename: a kill or a full disk leaves the file before whole.

    (Lightning's own copies the checkpoint in memory first, and moves it from /tmp, which across file systems is a copy
    that can be cut short.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        names = storage_options or {}
        publish(target, names.get("links", ()), names.get("stale", ()))
        sweep(target.parent)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        return read_checkpoint(path, moments=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Save ``checkpoints/last.ckpt`` every n steps and at the end, and ``checkpoints/best-<step>-<value>.ckpt``.

    A checkpoint saved where a validation was due says so, and the run that goes on from it validates first.

    Args:
        every_n_train_steps: optimiser steps between two writes of last.ckpt; 0 writes it at the end only.
        monitor: the metric whose best value is kept; null keeps no best checkpoint.
        mode: ``min`` where less is better, ``max`` where more is.
    """

    def __init__(self, every_n_train_steps: int = 500, monitor: str | None = "val/bits", mode: str = "min") -> None:
        super().__init__()
        if mode not in ("min", "max"):
            raise CheckpointError(f"checkpoints: mode is 'min' or 'max'; found {mode!r}")
        self.every_n_train_steps = every_n_train_steps
        self.monitor = monitor
        self.mode = mode
        self.best_value: float | None = None
        self.best_name = ""
        self._saved_step = 0
        self._validating = False
        self._config: dict[str, Any] | None = None
        self._checked = False
        self._trouble: str | None = None

    # --- where ---------------------------------------------------------------------------------------------------

    @staticmethod
    def folder(trainer: Trainer) -> Path:
        """The folder of checkpoints of this run."""
        return Path(trainer.default_root_dir) / "checkpoints"

    @property
    def best_model_path(self) -> str:
        """Name of the best checkpoint, or nothing (the name that Lightning asks for)."""
        return self.best_name

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy.checkpoint_io, CheckpointIO) and not _sharded(trainer):
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        config = Path(trainer.default_root_dir) / "config.yaml"
        self._config = yaml.safe_load(config.read_text()) if config.is_file() else None
        if trainer.is_global_zero and stage == "fit":
            for left in self.folder(trainer).glob(".*.tmp"):  # by a process that was killed while it wrote
                left.unlink(missing_ok=True)
            sweep(self.folder(trainer), unfinished=True)

    # --- when ----------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        saver = getattr(trainer.strategy, "saver", None)
        if saver is not None and (trouble := saver.trouble()) is not None:
            self._told(trainer, trouble)
        if step == self._saved_step or trainer.fit_loop._should_accumulate():
            return
        # Saved here and not at the end of training, where Lightning counts the epoch as over and would start another.
        ending = trainer.should_stop or (trainer.max_steps > 0 and step >= trainer.max_steps)
        if ending or (self.every_n_train_steps > 0 and step % self.every_n_train_steps == 0):
            self.save_last(trainer, must=ending)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validating = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validating = False
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        value = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        if self.monitor and value is None and trainer.callback_metrics:
            known = sorted(name for name in trainer.callback_metrics if "/" in name)
            raise ConfigError(
                f"trainer.callbacks.checkpoints: monitor is '{self.monitor}', which validation does not measure"
                f"{nearest(self.monitor, known)}; it measures {', '.join(known)}"
            )
        if value is not None and self._better(float(value)):
            self._save_best(trainer, float(value))
        elif trainer.should_stop:
            self.save_last(trainer, must=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved_step != trainer.global_step:
            self.save_last(trainer, must=True)
        elif (saver := getattr(trainer.strategy, "saver", None)) is not None:
            saver.wait()

    # --- how -----------------------------------------------------------------------------------------------------

    def save_last(
        self, trainer: Trainer, must: bool = False, best: str | None = None, stale: str | None = None
    ) -> bool:
        """Write last.ckpt, on all ranks together. A failure (a full disk) is a warning, since the state lives on in
        memory and the next write may succeed, or a CheckpointError when there is no next (``must``).

        A strategy that writes in the background goes on with that after this returns, but for ``must``; what went wrong
        with the checkpoint before is told first.

        Args:
            trainer: whose.
            must: no other will follow.
            best: a name that this checkpoint gets too.
            stale: the name of one that is not needed after that.
        """
        path = self.folder(trainer) / LAST
        saver = getattr(trainer.strategy, "saver", None)
        try:
            if saver is not None:
                saver.wait()
        except CheckpointError as error:
            self._told(trainer, str(error))
        self._trouble = None
        try:
            names = {"links": (best,) if best else (), "stale": (stale,) if stale else ()}
            trainer.save_checkpoint(path, storage_options=names)
            if must and saver is not None:
                saver.wait()
        except (OSError, RuntimeError, CheckpointError) as error:
            if not isinstance(error, CheckpointError) and not _is_write_failure(error):
                raise
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait
            message = str(error)
            if not isinstance(error, CheckpointError):
                free = shutil.disk_usage(path.parent).free / 2**30
                earlier = f"the one of step {self._saved_step} is whole" if path.exists() else "there is none before it"
                message = f"cannot write {path}: {_reason(error)} ({free:.2f} GiB free); {earlier}"
            if must:
                raise CheckpointError(f"{message}. Make room and continue with --ckpt_path last") from error
            log.warning("%s. Training goes on and tries again", message)
            return False
        self._saved_step = trainer.global_step
        return True

    def _told(self, trainer: Trainer, trouble: str) -> None:
        """Say once, on one rank, that what was written in the background is not there."""
        if self._trouble != trouble and trainer.is_global_zero:
            log.error("%s. Training goes on and tries again", trouble)
        self._trouble = trouble

    def _save_best(self, trainer: Trainer, value: float) -> None:
        earlier, before = self.best_name, self.best_value
        self.best_value, self.best_name = value, f"best-{trainer.global_step}-{value:.4f}.ckpt"  # part of what is saved
        if not self.save_last(trainer, best=self.best_name, stale=earlier):
            self.best_value, self.best_name = before, earlier

    def _better(self, value: float) -> bool:
        if value != value:
            return False
        return self.best_value is None or (value < self.best_value if self.mode == "min" else value > self.best_value)

    # --- what ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value, "best_name": self.best_name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = getattr(self, "_resumed", None) or {}
        name = state.get("best_name") or ""
        if name and (self.folder(trainer) / name).is_file():  # a run that goes on elsewhere has no best yet
            self.best_value, self.best_name = state["best_value"], name
        self._saved_step = trainer.global_step if (self.folder(trainer) / LAST).is_file() else 0

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for key in _DROPPED:
            checkpoint.pop(key, None)
        if self._config is not None:
            checkpoint[CONFIG_KEY] = self._config
        card = runs.read_json(Path(trainer.default_root_dir) / "data.json")  # which RunFolder wrote
        if card is not None:
            checkpoint[DATA_KEY] = card
        if self._validating or validation_is_due(trainer):
            # One validation batch started and none done: Lightning then runs the validation first when it goes on.
            zero = {"ready": 0, "completed": 0, "started": 0, "processed": 0}
            begun = {**zero, "ready": 1, "started": 1}
            key = "epoch_loop.val_loop.batch_progress"
            checkpoint["loops"]["fit_loop"][key] = {"total": begun, "current": dict(begun), "is_last_batch": False}
        if not self._checked:
            self._checked = True
            _check_plain(checkpoint, "checkpoint")


def validation_is_due(trainer: Trainer) -> bool:
    """Whether this training batch is one that a validation follows, and the validation is still to come."""
    every = trainer.val_check_batch if trainer.training else None
    if not isinstance(every, int) or trainer.check_val_every_n_epoch is not None:
        return False
    progress = trainer.fit_loop.epoch_loop.batch_progress.total
    return progress.completed < progress.ready and progress.ready % every == 0


def read_checkpoint(path: str | Path, weights: bool = True, moments: bool = False) -> dict[str, Any]:
    """Load a checkpoint of tensors and primitives (``weights_only``) into memory of the CPU.

    Args:
        path: a file; of a checkpoint in parts its head, such as ``last.ckpt``, or its folder.
        weights: of a checkpoint in parts, read the weights too; else they are on the device ``meta``. (Those of a whole
            one are read as they are used.)
        moments: the same of what the optimiser holds.

    Raises:
        CheckpointError: no such file, a file cut short, or one that holds other Python objects.
    """
    path = parts.head_of(Path(path))
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, OSError, ... for broken files
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as a checkpoint: {first}. It is cut short, damaged "
            "or of another kind; use an earlier one, such as the run's best-*.ckpt"
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of a run: it has no 'state_dict'")
    folder = parts.folder_of(path, content)
    if folder is None:
        return content
    wanted = {"state_dict": weights, "optimizer_states": moments}
    tensors = parts.shapes(folder) | parts.read(folder, lambda name: wanted[name.partition("/")[0]])
    del content[parts.PARTS_KEY]
    return dict(parts.put_together(content, tensors.__getitem__))


def _check_plain(value: Any, path: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _check_plain(item, f"{path}[{number}]")
    elif not isinstance(value, _PRIMITIVES):
        raise TypeError(f"{path} is a {type(value).__name__}: state must be tensors and primitives, to load safely")


def _sharded(trainer: Trainer) -> bool:
    return bool(getattr(trainer.strategy, "_save_distributed_checkpoint", False))


def _is_write_failure(error: BaseException) -> bool:
    """torch turns a failed write into a RuntimeError of its own, with the OSError as its context or not at all."""
    return isinstance(error, OSError) or isinstance(error.__context__, OSError) or "PytorchStreamWriter" in str(error)


def _reason(error: BaseException) -> str:
    cause = error if isinstance(error, OSError) else error.__context__
    return (cause.strerror or str(cause)) if isinstance(cause, OSError) else str(error).splitlines()[0]
