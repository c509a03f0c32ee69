"""The most memory that this process holds while something runs, whatever it held before."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest


def grown(run: Callable[[], object]) -> int:
    """Bytes by which the process was at most larger than before, while ``run`` ran."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    except OSError:
        pytest.skip("this system does not let a process forget its peak of memory")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
