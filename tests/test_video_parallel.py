"""Tasks of video on rows that two processes hold give what one process gives: loss, gradients, evaluation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from video_parallel import TASKS, clips, gradients, together

from seqlong.errors import ConfigError


def test_two_processes_are_one(tmp_path: Path) -> None:
    store, script = tmp_path / "store", Path(__file__).parent / "video_parallel.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen([sys.executable, str(script), "1", "2", str(store)], env=environment)
    try:
        found = together(0, 2, str(store))
        assert other.wait(timeout=60) == 0
    finally:
        other.kill()
    for name in TASKS:
        exact = gradients(name, None)
        assert set(found[name]) == set(exact) and exact["loss"] > 0, name
        for key, value in exact.items():
            torch.testing.assert_close(found[name][key].double(), value.double(), atol=2e-6, rtol=2e-6, msg=key)


@pytest.mark.parametrize("name", TASKS)
def test_predictions_are_of_whole_rows(name: str) -> None:
    task = TASKS[name]()
    task._trainer = SimpleNamespace(strategy=SimpleNamespace(sequence=(None, 0, 2)))
    with pytest.raises(ConfigError, match="predict writes rows that one process holds"):
        task.predict_step(clips(), 0)
