"""Run ``seqlong fit`` and read what it measured."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from pathlib import Path


def fit(folder: str, *settings: str) -> dict[str, list[float]]:
    """Train in a run folder under ``folder``; every metric's values in order."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = ["seqlong", "fit", *settings, f"run.dir={run}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")
    return metrics(run)


def metrics(run: Path) -> dict[str, list[float]]:
    """What a run folder holds: every metric's values in order."""
    found: dict[str, list[float]] = {}
    with open(run / "metrics.csv") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["name"], []).append(float(row["value"]))
    return found
