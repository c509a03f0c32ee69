"""RunRecord: what a run folder says, read leniently, since the report matters most after a crash."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from seqlong.errors import SeqlongError, nearest

#: Any of these makes a folder a run.
FILES = ("run.json", "config.yaml", "model.json", "data.json", "floors.json", "metrics.csv")


@dataclass
class Series:
    """One metric over the optimizer steps: ``step[i]``, unix ``time[i]`` in seconds, ``value[i]``."""

    step: list[int] = field(default_factory=list)
    time: list[float] = field(default_factory=list)
    value: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.step)

    @property
    def last(self) -> float | None:
        """The last finite value, or None."""
        return next((value for value in reversed(self.value) if math.isfinite(value)), None)

    def best(self) -> tuple[int, float] | None:
        """``(step, value)`` of the smallest finite value, or None."""
        finite = [(value, step) for step, value in zip(self.step, self.value, strict=True) if math.isfinite(value)]
        return (min(finite)[1], min(finite)[0]) if finite else None


@dataclass
class RunRecord:
    """The files of one run folder. What is missing is empty; what is there but broken, ``problems`` names."""

    folder: Path
    run: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    floors: list[dict[str, Any]] = field(default_factory=list)
    config: str = ""
    metrics: dict[str, Series] = field(default_factory=dict)
    experts: list[tuple[int, int, str, list[int]]] = field(default_factory=list)  # step, block from 1, part, choices
    problems: list[str] = field(default_factory=list)

    def series(self, name: str) -> Series:
        """The metric ``name``; an empty series where it was never logged."""
        return self.metrics.get(name, Series())

    @property
    def steps(self) -> int:
        """Optimizer steps done, as far as the metrics tell."""
        return max((series.step[-1] for series in self.metrics.values() if len(series)), default=0)

    @property
    def span(self) -> tuple[float, float] | None:
        """Unix seconds of the first and the last metric, or None."""
        times = [time for series in self.metrics.values() for time in series.time]
        return (min(times), max(times)) if times else None


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Args:
        folder: a folder that ``seqlong fit`` wrote.

    Raises:
        SeqlongError: ``folder`` does not exist, or holds none of the files of a run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        parent = folder.parent
        names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []
        found = "is a file, not a folder" if folder.exists() else "does not exist"
        others = "." if folder.exists() or not names else f"; {parent} holds {_few(names)}."
        hint = nearest(folder.name, names) or others
        raise SeqlongError(f"{folder} {found}{hint} Expected a run folder, such as `seqlong fit` writes under runs/.")
    record = RunRecord(folder)
    present = [name for name in FILES if (folder / name).is_file()]
    if not present:
        runs = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and (entry / "run.json").is_file())
        hint = f"; it holds runs: name one, such as {folder / runs[-1]}" if runs else ""
        raise SeqlongError(f"{folder} is not a run folder: it has none of {', '.join(FILES)}{hint}")
    for name in ("run", "model", "data"):
        value = _read_json(record, f"{name}.json", {})
        if isinstance(value, dict):
            setattr(record, name, value)
        else:
            record.problems.append(f"{name}.json holds a {type(value).__name__}, not an object")
    floors = _read_json(record, "floors.json", [])
    if isinstance(floors, list):
        record.floors = [floor for floor in floors if isinstance(floor, dict) and _is_number(floor.get("bits"))]
    record.config = _read_text(record, "config.yaml")
    record.metrics = _read_metrics(record)
    record.experts = _read_experts(record)
    if not record.floors:
        record.floors = [
            {"name": name.removeprefix("floor/"), "bits": series.last}
            for name, series in sorted(record.metrics.items())
            if name.startswith("floor/") and series.last is not None
        ]
    return record


def unix_seconds(moment: Any) -> float | None:
    """Unix seconds of a number or an ISO 8601 text; None for anything else. A time without a zone is read as UTC."""
    if _is_number(moment):
        return float(moment)
    if isinstance(moment, str):
        try:
            parsed = datetime.fromisoformat(moment)
        except ValueError:
            return None
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    return None


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_text(record: RunRecord, name: str) -> str:
    path = record.folder / name
    if not path.is_file():
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _read_json(record: RunRecord, name: str, default: Any) -> Any:
    text = _read_text(record, name)
    if not text:
        return default
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        record.problems.append(f"{name} cannot be read as JSON (line {error.lineno}: {error.msg})")
        return default


def _read_metrics(record: RunRecord) -> dict[str, Series]:
    """The long-form csv as series by name. A torn last line is left out; any other unreadable line is counted."""
    text = _read_text(record, "metrics.csv")
    rows: list[tuple[float, int, str, float]] = []
    lines = text.split("\n")
    torn = lines.pop() if lines else ""  # "" when the file ends with a newline; a killed writer leaves half a line
    bad = 0
    for number, row in enumerate(csv.reader(lines)):
        if not row or (number == 0 and row[:2] == ["time", "step"]):
            continue
        try:
            time, step, name, value = row
            rows.append((float(time), int(float(step)), name, float(value)))
        except (ValueError, OverflowError):
            bad += 1
    if bad:
        record.problems.append(f"metrics.csv: {bad} unreadable line{'s' if bad > 1 else ''} left out")
    if torn:
        record.problems.append("metrics.csv: the last line is torn (the writer was stopped) and was left out")
    return _current(rows)


def _read_experts(record: RunRecord) -> list[tuple[int, int, str, list[int]]]:
    """The lines of experts.csv that belong to the final course of the run; torn and unreadable ones are left out."""
    kept: list[tuple[int, int, str, list[int]]] = []
    for line in _read_text(record, "experts.csv").split("\n")[1:-1]:
        try:
            step, block, part, loads = line.split(",")
            entry = (int(step), int(block), part, [int(load) for load in loads.split()])
        except ValueError:
            continue
        while kept and (kept[-1][0] > entry[0] or kept[-1][:3] == entry[:3]):
            kept.pop()
        if entry[3]:
            kept.append(entry)
    return kept


def _current(rows: Iterable[tuple[float, int, str, float]]) -> dict[str, Series]:
    """Keep what the final course of the run logged: where a resumed run went back to an earlier step, the later entry
    in time replaces the earlier ones at that step and beyond it."""
    metrics: dict[str, Series] = {}
    for time, step, name, value in sorted(rows, key=lambda row: row[0]):
        series = metrics.setdefault(name, Series())
        while series.step and series.step[-1] >= step:
            series.step.pop()
            series.time.pop()
            series.value.pop()
        series.step.append(step)
        series.time.append(time)
        series.value.append(value)
    return metrics
