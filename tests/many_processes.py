"""Runs of the toy on several processes, for tests/test_many_processes.py: what each has to say goes to stdout as JSON.

python many_processes.py FOLDER

Everything is imported once; each process of a run is a fork.
"""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import lightning as L
import torch
from torch.distributed.tensor import DTensor
from toys import LinearMixer, ToyConfig, ToyData, ToyTask

from seqlong.callbacks import Checkpoints, Divergence, MetricsCsv, Preemption, Watchdog
from seqlong.errors import SeqlongError
from seqlong.parallel import saver
from seqlong.parallel.fully_shard import FullyShard
from seqlong.parallel.strategy import SequenceParallel

Run = Callable[[int], None]


def together(ranks: int, run: Run) -> list[dict[str, Any]]:
    """Run on each of ``ranks`` processes; of each its exit status, what it logged, and the error that it ended with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            _child(rank, run, writing)
        os.close(writing)
        children.append((child, reading))
    found = []
    for child, reading in children:
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        found.append({"error": "", "log": "", **json.loads(said or b"{}"), "status": os.waitstatus_to_exitcode(status)})
    return found


def _child(rank: int, run: Run, writing: int) -> None:
    stream = io.StringIO()
    logging.getLogger("seqlong").addHandler(logging.StreamHandler(stream))
    error, status = "", 1
    try:
        run(rank)
        status = 0
    except SeqlongError as problem:
        error = f"{type(problem).__name__}: {problem}"
    finally:
        if status and not error:
            traceback.print_exc()
        os.write(writing, json.dumps({"error": error, "log": stream.getvalue()[-4000:]}).encode())
        os.close(writing)
        sys.stderr.flush()
        os._exit(status)  # nothing of the process that this one was made of may run


def fit(
    folder: Path,
    steps: int,
    strategy: Any = "auto",
    devices: int = 1,
    start: Path | None = None,
    more: tuple[L.Callback, ...] = (),
    validations: int = 2,
) -> None:
    """Train the toy; a checkpoint every 2 steps, and every 3 if that validation is the best."""
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=steps, max_epochs=-1, val_check_interval=3,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, log_every_n_steps=1, use_distributed_sampler=False,
        limit_val_batches=validations, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*more, Preemption(), Checkpoints(every_n_train_steps=2)], default_root_dir=str(folder),
        logger=MetricsCsv(folder / "metrics.csv"),
    )  # fmt: skip
    task = ToyTask(ToyConfig(40, {"m": LinearMixer}, dropout=0.0))
    trainer.fit(task, ToyData(), ckpt_path=start, weights_only=True)


def parts(**settings: Any) -> FullyShard:
    """The strategy with checkpoints in parts."""
    return FullyShard(in_parts=True, timeout_minutes=1, **settings)


class At(L.Callback):
    """Do something before a batch."""

    def __init__(self, batch: int, what: Callable[[], None]) -> None:
        self.batch, self.what = batch, what

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            self.what()


def slow_writes(seconds: float) -> None:
    """Let what is written in the background take long."""
    write_data = saver._Writer.write_data

    def wait(self: Any, *words: Any) -> Any:
        time.sleep(seconds)
        return write_data(self, *words)

    saver._Writer.write_data = wait  # type: ignore[method-assign]


def killed(rank: int, folder: Path) -> None:
    """Step 2 is saved; while step 4 is being written, training goes on; then all die."""

    def die() -> None:
        (folder / f"alive-{rank}").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def stall() -> None:
        wait_for(folder)
        slow_writes(60)

    fit(folder, 20, parts(), 2, more=(At(3, stall), At(5, die)), validations=0)


def full(rank: int, folder: Path, start: Path) -> None:
    """When step 6 is saved, the second process has no more room; steps go on, and the end is an error. Each process has
    all of the weights, and writes a part of them all the same."""

    def no_room() -> None:
        wait_for(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))

    strategy = SequenceParallel(degree=1, in_parts=True)
    fit(folder, 10, strategy, 2, start, (At(7, no_room),) if rank else (), validations=0)


def wait_for(folder: Path) -> None:
    """Until a first checkpoint is written."""
    while not (folder / "checkpoints/last.ckpt").exists():
        time.sleep(0.01)


def two(rank: int, folder: Path) -> None:
    """What is written when the run ends is awaited."""
    slow_writes(0.3)
    fit(folder, 4, parts(), 2)


def sleeps(rank: int, folder: Path) -> None:
    """The second process does not come to step 2."""
    fit(folder, 4, "ddp", 2, None, (Watchdog(0.1), *((At(2, lambda: time.sleep(60)),) if rank else ())))


class Bent(L.Callback):
    """A bit of a weight falls over on one process."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *words: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            bias = pl_module.blocks[1].inner.bias.data
            (bias.to_local() if isinstance(bias, DTensor) else bias)[2] += 1e-6


def on_four(rank: int, folder: Path, start: Path) -> None:
    """In two replicas, of which one comes apart from the other a little after step 6."""
    strategy = parts(replicas=2, background=False)
    fit(folder, 8, strategy, 4, start, (Bent(6, 2), Divergence(2)))


def apart(rank: int, folder: Path) -> None:
    """Every process has all weights; those of the third change after step 3."""
    fit(folder, 9, "ddp", 3, None, (Bent(3, 2), Divergence(2)), validations=0)


def main(folder: Path) -> None:
    last = "checkpoints/last.ckpt"
    found: dict[str, Any] = {}
    found["one"] = together(1, lambda rank: fit(folder / "one", 8))
    found["two"] = together(2, lambda rank: two(rank, folder / "two"))
    start = folder / "two" / last
    found["on one"] = together(1, lambda rank: fit(folder / "on one", 8, start=start))
    found["on four"] = together(4, lambda rank: on_four(rank, folder / "on four", start))
    found["killed"] = together(2, lambda rank: killed(rank, folder / "killed"))
    found["full"] = together(2, lambda rank: full(rank, folder / "full", start))
    found["sleeps"] = together(2, lambda rank: sleeps(rank, folder / "sleeps"))
    found["apart"] = together(3, lambda rank: apart(rank, folder / "apart"))
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
