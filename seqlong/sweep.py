"""``seqlong sweep``: every combination of comma lists, one process a job, one folder, one table."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from seqlong import runs
from seqlong.compose import compose, parse_overrides
from seqlong.errors import ConfigError

#: Columns of the table: title, metric, whether the smallest or the last value is shown.
COLUMNS = (
    ("val bits", "val/bits", "best"),
    ("train bits", "train/bits", "last"),
    ("train loss", "train/loss", "last"),
    ("tokens/s", "throughput/tokens_per_s", "last"),
    ("peak GiB", "memory/peak_gib", "last"),
)


@dataclass
class Job:
    """One run of the grid."""

    overrides: list[str]
    varied: list[str]
    folder: Path
    status: str = "waiting"
    seconds: float = 0.0


def grid(words: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """All combinations of the overrides that hold comma lists: ``(all overrides, those that vary)`` a job."""
    parsed = parse_overrides(words)
    alternatives: list[list[str]] = []
    varies: list[bool] = []
    for override in parsed:
        if override.is_sweep_override():
            key = override.get_key_element()
            alternatives.append([f"{key}={value}" for value in override.sweep_string_iterator()])
            varies.append(True)
        else:
            alternatives.append([str(override.input_line)])
            varies.append(False)
    return [
        (list(choice), [word for word, varied in zip(choice, varies, strict=True) if varied])
        for choice in itertools.product(*alternatives)
    ]


def sweep(words: Sequence[str], flags: Sequence[str]) -> int:
    """Run the grid job after job; a job that fails does not stop the others.

    Returns:
        0 if every job finished, 1 if any failed, 143 or 130 if the sweep was stopped.

    Raises:
        ConfigError: nothing varies, or the first job's configuration cannot be composed.
    """
    combinations = grid(words)
    if len(combinations) < 2:
        raise ConfigError("a sweep needs a setting with several values, such as seed=1,2 or 'model=demo,transformer'")
    first = compose(combinations[0][0])  # a mistake in the settings is told once, before anything runs
    run = first.house.get("run") or {}
    folder = runs.create(run.get("root", "runs"), f"sweep-{run.get('name', 'run')}", run.get("dir"))
    jobs = [
        Job(overrides, varied, folder / f"job-{number:03d}") for number, (overrides, varied) in enumerate(combinations)
    ]
    console = Console()
    console.print(f"{len(jobs)} jobs in {folder}", highlight=False)
    stopped = 0
    for number, job in enumerate(jobs, 1):
        if not stopped:
            console.print(f"[{number}/{len(jobs)}] {' '.join(job.varied)} ...", markup=False, highlight=False, end=" ")
            stopped = _run(job, flags)
            console.print(f"{job.status} in {job.seconds:.0f} s", highlight=False)
        _save(folder, words, jobs)
    console.print(table(jobs))
    failed = [job for job in jobs if job.status == "failed"]
    for job in failed:
        console.print(f"{job.folder.name} failed: {_reason(job)}", markup=False, highlight=False)
    return stopped or (1 if failed else 0)


def table(jobs: Sequence[Job]) -> Table:
    """What varied, how each job ended, its metrics and its folder."""
    results = [_metrics(job) for job in jobs]
    columns = [column for column in COLUMNS if any(result.get(column[0]) is not None for result in results)]
    made = Table()
    for title in ("settings", "status", "steps", *(column[0] for column in columns), "folder"):
        made.add_column(title, overflow="fold")
    for job, result in zip(jobs, results, strict=True):
        values = [_number(result.get(column[0])) for column in columns]
        made.add_row("\n".join(job.varied), job.status, str(result.get("steps", "")), *values, job.folder.name)
    return made


def _run(job: Job, flags: Sequence[str]) -> int:
    """Run one job; return the exit status for the whole sweep if it was stopped, else 0."""
    job.folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in (runs.DIRECTORY_VARIABLE, runs.CHECKPOINT_VARIABLE)}
    overrides = [word for word in job.overrides if not word.startswith("run.dir=")]
    started = time.monotonic()
    with (job.folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [*program(), "fit", *overrides, f"run.dir={job.folder}", *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        interrupted = 0
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:  # the job has had its Ctrl-C from the terminal; a second one stops it at once
                interrupted = 130
        if interrupted and code == 0:
            interrupted = 0
    job.seconds = time.monotonic() - started
    job.status = {0: "finished", 143: "stopped", 130: "stopped"}.get(code, "failed")
    return 143 if code in (143, -signal.SIGTERM) else interrupted


def program() -> list[str]:
    """The command that started this process, in the same Python."""
    script = Path(sys.argv[0])
    if script.name == "seqlong" and script.is_file():
        return [sys.executable, str(script.absolute())]
    return [sys.executable, str(Path(sys.executable).with_name("seqlong"))]


def _metrics(job: Job) -> dict[str, Any]:
    from seqlong.report.record import read_run

    if not (job.folder / "metrics.csv").is_file():
        return {}
    record = read_run(job.folder)
    found: dict[str, Any] = {"steps": record.steps}
    for title, name, which in COLUMNS:
        series = record.series(name)
        best = series.best()
        found[title] = (best[1] if best else None) if which == "best" else series.last
    return found


def _save(folder: Path, words: Sequence[str], jobs: Sequence[Job]) -> None:
    content = [
        {
            "settings": job.varied,
            "status": job.status,
            "seconds": job.seconds,
            "folder": job.folder.name,
            **_metrics(job),
        }
        for job in jobs
    ]
    runs.write_json(folder / "sweep.json", {"overrides": list(words), "jobs": content})


def _reason(job: Job) -> str:
    record = runs.read_json(job.folder / "run.json", {}) or {}
    lines = (job.folder / "output.txt").read_text(errors="replace").strip().splitlines()
    return str(record.get("error") or (lines[-1] if lines else "no output"))


def _number(value: float | None) -> str:
    return "" if value is None else (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}")
