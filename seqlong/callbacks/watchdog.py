"""Watchdog: a run of several processes that stands still ends, and says which of them did not come."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.optim import Optimizer

from seqlong import runs

log = logging.getLogger("seqlong")

#: Of the time that processes wait for one another (the strategy's timeout): speak before torch gives up.
SHARE = 0.8
#: How often a process writes where it stands, in parts of the whole patience; at most so many seconds.
BEATS, LONGEST = 20, 30.0
#: Seconds that a checkpoint which is being written gets when the run ends.
GRACE = 120.0


@dataclass
class Place:
    """Where a process stands.

    Attributes:
        rank, host, process: which it is.
        serial: how many hooks it has passed: the same number is the same place on every rank.
        step: optimiser steps done.
        doing: what, in words.
        still: seconds since it came there.
        beat: how often this was written: a process whose beats stop is gone, or has stopped as a whole.
        begun: of each process group, how many collectives this process has begun.
    """

    rank: int
    host: str
    process: int
    serial: int = 0
    step: int = 0
    doing: str = "begins"
    still: float = 0.0
    beat: int = 0
    begun: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.process}): step {self.step}, {self.doing}"


class Watchdog(Callback):
    """End a run whose processes wait for one that does not come, and name it.

    A thread of each process writes the step and what it is about into ``ranks/`` of the run folder, a few times a
    minute. The steps themselves only set a number: no device is waited for. When nothing has moved for ``minutes``, the
    first process that still answers reads what all wrote, and says which ranks are behind the others, on which machine,
    at what; these write their Python stack beside. A checkpoint that is on its way is finished, and every process ends,
    with status 1: what comes next (SLURM, torchrun) may start the run again.

    Does nothing with one process. Time in which the whole machine was suspended does not count.

    Args:
        minutes: how long nothing may move; null: 0.8 of the strategy's timeout, which is 30 minutes if not set. A step,
            or what one process does alone while others wait, must be shorter.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self.minutes = minutes
        self._place: Place | None = None
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None

    # --- where this process stands ---------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.world_size > 1 and trainer.is_global_zero:
            shutil.rmtree(_folder(trainer), ignore_errors=True)  # of an earlier part of this run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size == 1:
            return
        given: timedelta | None = getattr(trainer.strategy, "_timeout", None)
        patience = self.minutes * 60 if self.minutes is not None else SHARE * (given or timedelta(0)).total_seconds()
        if patience <= 0:
            return
        self._place = Place(trainer.global_rank, socket.gethostname(), os.getpid(), step=trainer.global_step)
        folder = _folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        self._halt.clear()
        words = (trainer, folder, patience)
        self._thread = threading.Thread(target=self._watch, args=words, name="seqlong-watchdog", daemon=True)
        self._thread.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._move(trainer, "in the forward pass")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._move(trainer, "in the backward pass")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._move(trainer, "at the optimiser's step")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._move(trainer, "after a batch: callbacks, and the data of the next")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._move(trainer, "before a validation")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._move(trainer, f"in batch {batch_idx} of a validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._move(trainer, "after a validation")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._move(trainer, "saving a checkpoint")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop(trainer)

    def _move(self, trainer: Trainer, doing: str) -> None:
        place = self._place
        if place is not None:
            place.step, place.doing = trainer.global_step, doing
            place.serial += 1

    def _stop(self, trainer: Trainer) -> None:
        self._halt.set()
        thread, self._thread, self._place = self._thread, None, None
        if thread is not None:
            thread.join()
            (_folder(trainer) / f"{trainer.global_rank}.json").unlink(missing_ok=True)
            # Empty, it goes; whoever is last may find it gone.
            with contextlib.suppress(OSError):
                _folder(trainer).rmdir()

    # --- the thread ------------------------------------------------------------------------------------------------

    def _watch(self, trainer: Trainer, folder: Path, patience: float) -> None:
        place = self._place
        assert place is not None
        period = min(patience / BEATS, LONGEST)
        seen, beats = -1, 0
        while not self._halt.wait(period):
            seen, beats = (place.serial, beats + 1) if place.serial == seen else (place.serial, 0)
            place.beat += 1
            place.still, place.begun = beats * period, _begun()
            _write(folder, place)
            if place.still < patience:
                continue
            verdict = folder / "stuck.json"
            # The first rank speaks; if it is the one that is gone, the next does, and so on.
            if not verdict.is_file() and place.still >= patience + 4 * period * place.rank:
                self._judge(trainer, folder, period, place)
            if verdict.is_file() and not self._halt.is_set():
                self._end(trainer, folder, place, json.loads(verdict.read_text()), period)

    def _judge(self, trainer: Trainer, folder: Path, period: float, own: Place) -> None:
        """Say who is behind, if that does not change while it is looked at."""
        before = _read(folder)
        for _ in range(3):
            if self._halt.wait(period):
                return
            own.beat += 1
            _write(folder, own)
        after = _read(folder)
        if any(rank in after and after[rank].serial != place.serial for rank, place in before.items()):
            return
        silent = {rank for rank, place in after.items() if rank in before and before[rank].beat == place.beat}
        behind, text = say(after, silent, trainer.world_size, own.still / 60)
        text = f"{text}. The run ends here; go on with --ckpt_path last"
        runs.write_json(folder / "stuck.json", {"behind": behind, "text": text})
        log.error("%s", text)
        runs.finish(folder.parent, "failed", text)

    def _end(self, trainer: Trainer, folder: Path, own: Place, verdict: dict[str, Any], period: float) -> None:
        if own.rank in verdict["behind"]:
            frame = sys._current_frames().get(threading.main_thread().ident or 0)
            stack = "".join(traceback.format_stack(frame)) if frame is not None else "no Python stack"
            (folder / f"{own.rank}.stack").write_text(stack)
            log.error("%s does not go on; it is at\n%s", own, stack)
        saver = getattr(trainer.strategy, "saver", None)
        if saver is not None:
            saver.settle(GRACE)
        time.sleep(2 * period)  # until the others have read the verdict too
        launcher = trainer.strategy.launcher
        for process in launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else ():
            process.kill()
        sys.stderr.flush()
        # The main thread is inside a collective and hears nothing: with the process its groups end, too.
        os._exit(1)


def say(places: dict[int, Place], silent: set[int], ranks: int, minutes: float) -> tuple[list[int], str]:
    """Which ranks are behind, and the sentence about it.

    Args:
        places: of each rank that ever wrote.
        silent: ranks that write no longer.
        ranks: how many there are.
        minutes: how long nothing has moved.
    """
    never = sorted(set(range(ranks)) - set(places))
    furthest = max(place.serial for place in places.values())
    behind = sorted({rank for rank, place in places.items() if place.serial < furthest} | silent)
    missed: dict[int, int] = {}
    if not behind:  # inside the same pass: whoever has not begun the collective that the others wait in
        most: Counter[str] = Counter()
        for place in places.values():
            most |= Counter(place.begun)
        for rank, place in places.items():
            lacking = [most[name] for name, count in place.begun.items() if count < most[name]]
            if lacking:
                missed[rank] = lacking[0]
        behind = sorted(missed)
    said = [f"nothing has moved for {minutes:.2g} minutes"]
    for rank in behind[:8]:
        answers = "does not answer any more; last seen at" if rank in silent else "did not come on from"
        place = places[rank]
        where = f"step {place.step}, {place.doing}"
        where += f", to collective {missed[rank]:,}" if rank in missed else ""
        said.append(f"rank {rank} ({place.host}, process {place.process}) {answers} {where}")
    if len(behind) > 8:
        said.append(f"nor did {len(behind) - 8:,} more: {', '.join(map(str, behind[8:40]))}")
    if never:
        said.append(f"never heard of rank {', '.join(map(str, never[:40]))}")
    standing = Counter(f"step {p.step}, {p.doing}" for rank, p in places.items() if rank not in behind)
    waiting = "; ".join(f"{count} at {place}" for place, count in standing.most_common(3))
    if behind or never:
        said.append(f"the others wait: {waiting}" if waiting else "nobody waits")
    else:
        said.append(
            f"all ranks stand at the same place ({waiting}): a collective that does not end, or a step longer than the "
            "watchdog's patience (trainer.callbacks.watchdog.init_args.minutes)"
        )
    return behind, "; ".join(said)


def _begun() -> dict[str, int]:
    """How many collectives of each group this process has begun; nothing where torch does not say."""
    groups = getattr(getattr(distributed_c10d, "_world", None), "pg_map", None) or {}  # private: torch 2.9 to 2.13
    found = {}
    for group in list(groups):
        try:
            found[str(group.group_name)] = int(group._get_sequence_number_for_group())
        except (AttributeError, RuntimeError):  # a backend that does not count
            continue
    return found


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "ranks"


def _write(folder: Path, place: Place) -> None:
    try:
        runs.atomic_write(folder / f"{place.rank}.json", json.dumps(asdict(place)))
    except OSError as error:  # a full disk is told by whoever needs it more
        log.debug("watchdog: %s", error)


def _read(folder: Path) -> dict[int, Place]:
    found = {}
    for path in folder.glob("[0-9]*.json"):
        content = runs.read_json(path)
        if content is not None:
            found[int(path.stem)] = Place(**content)
    return found
