"""Processes that get signals: nothing hangs, nothing is lost, and the exit status says so. Few tests: each starts
processes that import torch."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from seqlong.cli import main

HERE = Path(__file__).parent
SEQLONG = Path(sys.executable).with_name("seqlong")


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(HERE)]),
        "OMP_NUM_THREADS": "1",
        "PL_GLOBAL_SEED": "",
    }
    environment.pop("PL_GLOBAL_SEED")
    return subprocess.Popen(
        [sys.executable, str(SEQLONG), "fit", f"experiment={HERE / 'toy.yaml'}", "data.path=x", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if any(value[0] >= step for value in losses(run_dir)):
            return
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"step {step} was not reached:\n{process.communicate()[0]}")


def losses(run_dir: Path, name: str = "train/loss") -> list[tuple[int, float]]:
    path = run_dir / "metrics.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return [(int(r["step"]), float(r["value"])) for r in csv.DictReader(file) if r["name"] == name and r["value"]]


def children(process: subprocess.Popen[str]) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [
        pid
        for pid in map(int, path.read_text().split())
        if b"fit" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    ]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the second process through /proc")
def test_sigterm_to_one_rank_stops_both_and_one_process_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 gloo processes, SIGTERM to the second only -> checkpoint and 143; then 1 process continues from it, and the
    losses are those of one process that was never stopped (dropout off: it differs by rank)."""
    same = ["trainer.max_steps=12", "model.backbone.dropout=0.0", "trainer.val_check_interval=5"]
    two = [*same, "trainer.devices=2", "trainer.strategy=ddp", "run.dir=two", "task.pause=0.3"]
    process = start(tmp_path, *two)
    wait_for_step(tmp_path / "two", 3, process)
    (second,) = children(process)
    os.kill(second, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "stopped by SIGTERM" in output and "Traceback" not in output
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["status"] == "stopped" and record["error"] == "stopped by SIGTERM"
    stopped_at = losses(tmp_path / "two")[-1][0]
    assert stopped_at < 12
    assert torch.load(tmp_path / "two/checkpoints/last.ckpt", weights_only=True)["global_step"] == stopped_at

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    toy = ["fit", f"experiment={HERE / 'toy.yaml'}", "data.path=x", *same]
    assert main([*toy, "run.dir=two", "--ckpt_path", "last"]) == 0
    assert main([*toy, "run.dir=one"]) == 0
    for name in ("train/loss", "val/bits"):
        expected, found = losses(tmp_path / "one", name), losses(tmp_path / "two", name)
        assert [step for step, _ in found] == [step for step, _ in expected], name
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], abs=1e-6), name


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_143_and_a_second_one_stops_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, "trainer.max_steps=1000", "task.pause=0.2", "run.dir=once")
    wait_for_step(tmp_path / "once", 2, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "stopped by SIGINT" in output and "continue with --ckpt_path last" in output and "Traceback" not in output
    assert (tmp_path / "once/checkpoints/last.ckpt").is_file()

    process = start(tmp_path, "trainer.max_steps=1000", "task.pause=20", "trainer.limit_val_batches=0", "run.dir=twice")
    deadline = time.monotonic() + 90
    while not (tmp_path / "twice/metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)  # now in the long sleep of the first step
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert time.monotonic() - begun < 12, "did not wait for the step"
    assert json.loads((tmp_path / "twice/run.json").read_text())["status"] == "stopped"


def test_versions_of_lightning_whose_private_hooks_are_used() -> None:
    """Preemption sets two private methods, and one private flag; look at them again with a new Lightning."""
    import lightning
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
    from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

    assert Version(lightning.__version__) >= Version("2.6.6")
    assert callable(_SignalConnector.register_signal_handlers)
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    assert "_skip_next_val" in _TrainingEpochLoop(None).__dict__
