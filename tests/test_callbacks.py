"""What goes on around the training steps: exact resume, whole checkpoints, finite steps, metrics that only grow."""

from __future__ import annotations

import csv
import logging
import math
import resource
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from toys import LinearMixer, ToyConfig, ToyData, ToyTask

from seqlong.callbacks import Checkpoints, FiniteGuard, MetricsCsv, Preemption, RunFolder, StepSeed, Throughput
from seqlong.callbacks.checkpoints import read_checkpoint
from seqlong.errors import CheckpointError, TrainingError


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_trainer(
    folder: Path, steps: int, every: int = 4, more: tuple[L.Callback, ...] = (), **settings: Any
) -> L.Trainer:
    callbacks = [RunFolder(), StepSeed(), Throughput(), *more, Preemption(), Checkpoints(every_n_train_steps=every)]
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "max_epochs": -1,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "gradient_clip_val": 1.0,
        "default_root_dir": str(folder),
        "callbacks": callbacks,
        "logger": MetricsCsv(folder / "metrics.csv"),
    }
    return L.Trainer(**{**options, **settings})


def fit(trainer: L.Trainer, path: Path | None = None, workers: int = 0, **task: Any) -> ToyTask:
    L.seed_everything(0, verbose=False)
    mixers = task.pop("mixers", {"m": LinearMixer})
    model = ToyTask(ToyConfig(8, mixers, **task.pop("backbone", {})), **task)
    trainer.fit(model, ToyData(workers=workers), ckpt_path=path, weights_only=True)
    return model


def read(folder: Path, name: str) -> list[tuple[int, float]]:
    with (folder / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row["value"])) for row in csv.DictReader(file) if row["name"] == name]


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


class StopAt(L.Callback):
    """Pretend that a signal came during a batch."""

    def __init__(self, batch: int, validation: bool = False) -> None:
        self.batch, self.validation = batch, validation

    def _receive(self, trainer: L.Trainer) -> None:
        next(c for c in trainer.callbacks if isinstance(c, Preemption))._received = 15

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and not self.validation:
            self._receive(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.validation and trainer.global_step == self.batch:
            self._receive(trainer)


# --- exact resume ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "accumulate", "workers"),
    [(4, 1, 0), (5, 1, 0), (6, 1, 0), (7, 1, 0), (4, 2, 0), (5, 1, 2)],
    ids=["before-val-batch", "val-due", "after-val", "checkpoint-step", "half-accumulated", "two-workers"],
)
def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path, stop: int, accumulate: int, workers: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"accumulate_grad_batches": accumulate}
    expected = fit(make_trainer(whole, 10 // accumulate, **settings))

    first = make_trainer(parts, 10 // accumulate, more=(StopAt(stop),), **settings)
    fit(first, workers=workers)
    assert first.global_step == math.ceil((stop + 1) / accumulate), "stops where gradients are complete"
    found = fit(make_trainer(parts, 10 // accumulate, **settings), last(parts), workers=workers)

    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name
    for name in ("train/loss", "val/bits", "train/tokens"):
        assert read(parts, name) == read(whole, name), name


def test_a_signal_during_validation_is_obeyed_at_once_and_validation_runs_again(tmp_path: Path) -> None:
    from seqlong.callbacks import Preempted

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = fit(make_trainer(whole, 8))
    with pytest.raises(Preempted, match="SIGTERM"):
        fit(make_trainer(parts, 8, more=(StopAt(6, validation=True),)))
    assert read(parts, "val/bits") == read(whole, "val/bits")[:1]
    found = fit(make_trainer(parts, 8), last(parts))
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))
    assert read(parts, "val/bits") == read(whole, "val/bits")


def test_killed_between_checkpoints_goes_through_the_same_steps_again(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(make_trainer(whole, 10))
    with pytest.raises(RuntimeError, match="the toy crashed"):
        fit(make_trainer(parts, 10), crash=7)
    fit(make_trainer(parts, 10), last(parts))
    again = read(parts, "train/loss")
    assert [step for step, _ in again] == [1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10], "went back to the best, step 6"
    assert dict(again) == dict(read(whole, "train/loss"))


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = fit(make_trainer(whole, 10))
    fit(make_trainer(parts, 5))
    found = fit(make_trainer(parts, 10), last(parts))
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))
    assert read(parts, "train/loss") == read(whole, "train/loss")


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints_hold_primitives_and_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed_everything: 3\n")
    fit(make_trainer(tmp_path, 4))
    content = torch.load(last(tmp_path), weights_only=True)
    assert content["seqlong_config"] == {"seed_everything": 3}
    assert "hyper_parameters" not in content, "arguments of constructors are objects"


def test_last_and_best_only(tmp_path: Path) -> None:
    fit(make_trainer(tmp_path, 9), lr=0.05)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    values = dict(read(tmp_path, "val/bits"))
    step = min(values, key=lambda key: values[key])
    assert names == [f"best-{step}-{values[step]:.4f}.ckpt", "last.ckpt"]
    assert read_checkpoint(tmp_path / "checkpoints" / names[0])["global_step"] == step


def test_a_full_disk_keeps_the_checkpoint_before_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class FullAfter(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            if batch_idx == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    logging.getLogger("seqlong").propagate = True
    trainer = make_trainer(tmp_path, 8, every=2, more=(FullAfter(),), logger=False, limit_val_batches=0)
    try:
        fit(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert trainer.global_step == 8
    assert "cannot write" in caplog.text and "File too large" in caplog.text and "of step 2 is whole" in caplog.text
    assert read_checkpoint(last(tmp_path))["global_step"] == 8
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"], "no temporary file is left"


def test_a_full_disk_at_the_end_is_an_error(tmp_path: Path) -> None:
    class Full(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    trainer = make_trainer(tmp_path, 3, every=2, more=(Full(),), logger=False, limit_val_batches=0)
    try:
        with pytest.raises(CheckpointError, match=r"File too large .* the one of step 2 is whole\. Make room"):
            fit(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert read_checkpoint(last(tmp_path))["global_step"] == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"], "no temporary file is left"


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "pickle"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "pickle":
        torch.save({"state_dict": {}, "module": torch.nn.Linear(2, 2)}, path)
    else:
        path.write_text("" if damage == "empty" else "not a checkpoint at all")
    with pytest.raises(CheckpointError, match=r"last\.ckpt .*cannot be read as a checkpoint"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "none.ckpt")


# --- finite guard ----------------------------------------------------------------------------------------------------


class Poison(L.Callback):
    """Make the gradient of one parameter infinite in some batches."""

    def __init__(self, batches: set[int], name: str = "blocks.0.inner.weight") -> None:
        self.batches, self.name = batches, name

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx in self.batches:
            pl_module.get_parameter(self.name).grad.fill_(float("nan"))


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    weights: list[torch.Tensor] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            weights.append(torch.cat([p.detach().flatten().clone() for p in pl_module.parameters()]))

    guard = FiniteGuard(patience=3)
    fit(make_trainer(tmp_path, 6, more=(Poison({2, 3}), guard, Keep())))
    assert torch.equal(weights[2], weights[1]) and torch.equal(weights[3], weights[1])
    assert not torch.equal(weights[4], weights[3]) and torch.isfinite(weights[-1]).all()
    assert guard.skipped == 2 and guard.in_a_row == 0
    assert [value for _, value in read(tmp_path, "skipped_steps")][-1] == 2
    assert all(math.isfinite(value) and value > 0 for _, value in read(tmp_path, "grad_norm"))


def test_several_in_a_row_stop_the_run_and_name_the_layer(tmp_path: Path) -> None:
    mixers = {"m": LinearMixer, "p": lambda width: LinearMixer(width, poison=2)}
    with pytest.raises(TrainingError) as caught:
        fit(make_trainer(tmp_path, 9, more=(FiniteGuard(patience=3),)), mixers=mixers, backbone={"pattern": "mpm"})
    message = str(caught.value)
    assert "first in blocks.1.inner.bias" in message and "3 steps in a row" in message
    assert "the loss was" in message and "nan" not in message.partition("the loss was")[2][:6]


def test_the_layer_whose_output_is_not_finite_is_named_too(tmp_path: Path) -> None:
    class Break(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                pl_module.blocks[1].inner.weight.data.fill_(float("nan"))

    with pytest.raises(TrainingError, match=r"the loss was nan; forwards, .* came from blocks\.1\.inner \(Linear\)"):
        fit(make_trainer(tmp_path, 9, more=(Break(), FiniteGuard(patience=2))))


# --- records ---------------------------------------------------------------------------------------------------------


def test_metrics_are_appended_after_a_line_cut_short(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path / "metrics.csv")
    logger.log_metrics({"a": 1.5, "epoch": 0}, step=1)
    with logger.path.open("a") as file:
        file.write("17.0,2,a,")
    MetricsCsv(logger.path).log_metrics({"a": 2}, step=2)
    lines = logger.path.read_text().splitlines()
    assert lines[0] == "time,step,name,value" and lines[1].endswith(",1,a,1.5")
    assert lines[2] == "17.0,2,a," and lines[3].endswith(",2,a,2") and len(lines) == 4


def test_run_folder_records(tmp_path: Path) -> None:
    import json

    fit(make_trainer(tmp_path, 3))
    assert json.loads((tmp_path / "model.json").read_text())["name"] == "toy"
    assert json.loads((tmp_path / "data.json").read_text())["title"] == "random walks"
    assert json.loads((tmp_path / "floors.json").read_text())[1] == {"name": "walk", "bits": 1.58}
    assert read(tmp_path, "floor/walk") == [(0, 1.58)]
    assert read(tmp_path, "train/tokens") == [(1, 64), (2, 128), (3, 192)]
    assert all(0 < value < 1e9 for _, value in read(tmp_path, "throughput/tokens_per_s"))
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "finished"
    with pytest.raises(RuntimeError):
        fit(make_trainer(tmp_path / "crash", 3), crash=1)
    record = json.loads((tmp_path / "crash" / "run.json").read_text())
    assert record["status"] == "failed" and record["error"] == "RuntimeError: the toy crashed" and record["ended"]
