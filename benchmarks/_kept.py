"""Measurements that a run which was stopped has made already, a line of JSON for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def _with_device(setting: dict[str, Any]) -> dict[str, Any]:
    """What was measured, and the machine: figures of another one are not taken."""
    return {**setting, "on": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def kept(log: Path | None, setting: dict[str, Any]) -> dict[str, Any] | None:
    """What ``log`` has for exactly this setting on this machine; None: nothing."""
    if log is None or not log.is_file():
        return None
    wanted = _with_device(setting)
    for line in log.read_text().splitlines():
        found = json.loads(line)
        if all(found.get(name) == value for name, value in wanted.items()):
            return {name: value for name, value in found.items() if name not in wanted}
    return None


def keep(log: Path | None, setting: dict[str, Any], found: dict[str, Any]) -> None:
    """Append a measurement."""
    if log is not None:
        with log.open("a") as file:
            file.write(json.dumps({**_with_device(setting), **found}) + "\n")
