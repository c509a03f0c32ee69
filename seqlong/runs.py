"""The run folder: one folder with all that made a result.

::

    runs/dna-demo-20260801-120000/
      run.json        name, command, commit, versions, host, status: running | finished | stopped | failed
      config.yaml     the resolved configuration; `seqlong fit --config config.yaml` repeats the run
      data.json  model.json  floors.json
      metrics.csv     time,step,name,value; append-only, step = optimiser steps done
      tensorboard/  checkpoints/{last,best-*}.ckpt  report.html
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from seqlong.errors import CheckpointError, ConfigError

log = logging.getLogger("seqlong")

#: Tells processes that a run starts (DDP) which folder it has; set by the first process.
DIRECTORY_VARIABLE = "SEQLONG_RUN_DIR"
#: The checkpoint that the first process chose, for the others.
CHECKPOINT_VARIABLE = "SEQLONG_CKPT_PATH"

STATUSES = ("running", "finished", "stopped", "failed")
_PACKAGES = ("seqlong", "torch", "lightning", "hydra-core", "jsonargparse", "numpy")


def rank() -> int:
    """The number of this process among those of a run, before torch.distributed is set up; 0 when alone."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if (value := os.environ.get(name, "")).isdigit():
            return int(value)
    return 0


def atomic_write(path: str | Path, text: str) -> None:
    """Write ``text`` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically; numbers that are not finite become null, tensors and arrays of one element numbers."""
    atomic_write(path, json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path, default: Any = None) -> Any:
    """Read JSON; ``default`` if there is no such file."""
    path = Path(path)
    return json.loads(path.read_text()) if path.is_file() else default


def create(root: str | Path, name: str, directory: str | Path | None = None) -> Path:
    """Make a new run folder ``root/name-date-time``, or ``directory`` if given, and return its absolute path.

    Raises:
        ConfigError: the folder cannot be made, or ``directory`` holds another run already.
    """
    try:
        if directory is not None:
            path = Path(directory).expanduser().absolute()
            if (path / "run.json").is_file() and any((path / "checkpoints").glob("*.ckpt")):
                raise ConfigError(
                    f"{path} already holds a run. Continue it with --ckpt_path {path / 'checkpoints' / 'last.ckpt'} "
                    "and another run.dir, or with --ckpt_path last and no run.dir; or choose another run.dir"
                )
            path.mkdir(parents=True, exist_ok=True)
            return path
        stamp = time.strftime("%Y%m%d-%H%M%S")
        base = Path(root).expanduser().absolute()
        base.mkdir(parents=True, exist_ok=True)
        for count in range(1000):
            path = base / (f"{name}-{stamp}" + (f"-{count}" if count else ""))
            try:
                path.mkdir()
                return path
            except FileExistsError:
                continue
    except OSError as error:
        raise ConfigError(
            f"cannot make a run folder under {directory or root}: {error.strerror}. "
            "Choose another place with run.root=FOLDER"
        ) from error
    raise ConfigError(f"a thousand runs named {name}-{stamp} exist already under {base}")


def newest(root: str | Path, name: str | None = None, backbone: Any = None) -> Path:
    """The run that was last written to among those that have a last checkpoint (and this name).

    Where several have this name, those with this architecture (the configuration of ``backbone``) come first.

    Raises:
        CheckpointError: there is none; lists what there is.
    """
    base = Path(root).expanduser().absolute()
    found = sorted(base.glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    runs = [path.parent.parent for path in found]
    names = {run: str((read_json(run / "run.json", {}) or {}).get("name", run.name)) for run in runs}
    matching = [run for run in runs if name is None or names[run] == name]
    if not matching:
        others = ", ".join(sorted(set(names.values())))
        raise CheckpointError(
            f"no run{f' named {name}' if name else ''} in {base} has checkpoints/last.ckpt to continue from"
            + (f"; the runs that have are named: {others}. Choose one with run.name=NAME" if others else "")
            + ". Without --ckpt_path a new run starts"
        )
    alike = [run for run in matching if backbone is not None and _agrees(backbone, _backbone_of(run))]
    return (alike or matching)[-1]


def _backbone_of(run: Path) -> Any:
    try:
        config = yaml.safe_load((run / "config.yaml").read_text())
        return config["model"]["init_args"]["backbone"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def _agrees(part: Any, whole: Any) -> bool:
    """Whether every setting of ``part`` is the same in ``whole``, which spells out defaults too."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(_agrees(value, whole.get(key)) for key, value in part.items())
    return bool(part == whole)


def best_checkpoint(run: Path) -> Path:
    """The best checkpoint of a run.

    Raises:
        CheckpointError: it has none.
    """
    found = sorted((run / "checkpoints").glob("best-*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(f"{run} has no best checkpoint: it was never validated. Use --ckpt_path last")
    return found[-1]


def start(run: Path, name: str, resumed_from: Path | None = None) -> None:
    """Write run.json with status running. A run that goes on keeps what it knew, and counts the continuation."""
    earlier = read_json(run / "run.json", {}) or {}
    record: dict[str, Any] = {
        "name": name,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "directory": str(Path.cwd()),
        **commit(),
        "started": earlier.get("started", time.time()),
        "ended": None,
        "status": "running",
        "error": None,
        "process": os.getpid(),
        "host": host(),
        "versions": versions(),
        "resumed_from": str(resumed_from) if resumed_from else None,
    }
    if earlier:
        record["history"] = [
            *earlier.get("history", []),
            {key: earlier.get(key) for key in ("command", "commit", "ended", "status", "error")},
        ]
    write_json(run / "run.json", record)


def finish(run: Path, status: str, error: str | None = None) -> None:
    """Set the status that a run ended with, unless it has one already. A disk that is full is told and no more: it must
    not hide the error that the run ended with."""
    assert status in STATUSES
    record = read_json(run / "run.json", {}) or {}
    if record.get("status", "running") == "running":
        try:
            write_json(run / "run.json", {**record, "status": status, "error": error, "ended": time.time()})
        except OSError as problem:
            log.warning("cannot write %s: %s", run / "run.json", problem.strerror)


def host() -> dict[str, Any]:
    """What the machine is: cpu, cores, memory in GiB, GPUs."""
    import psutil

    facts: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": [],
    }
    if "torch" in sys.modules:
        cuda = sys.modules["torch"].cuda
        facts["gpu"] = [cuda.get_device_name(i) for i in range(cuda.device_count())] if cuda.is_available() else []
    return facts


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """The commit of the source tree and whether it has changes; nulls for an installed package."""
    folder = Path(__file__).resolve().parent
    found: dict[str, Any] = {"commit": None, "dirty": None}
    try:
        inside = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", "runs.py"], capture_output=True, timeout=10
        )
        if inside.returncode == 0:
            head = ["git", "-C", str(folder), "rev-parse", "HEAD"]
            changes = ["git", "-C", str(folder), "status", "--porcelain", "-uno"]
            found["commit"] = subprocess.run(head, capture_output=True, text=True, timeout=10).stdout.strip()
            status = subprocess.run(changes, capture_output=True, text=True, timeout=10)
            found["dirty"] = bool(status.stdout.strip())
    except (OSError, subprocess.TimeoutExpired):
        pass
    return found


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "size", None) is not None and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and value - value != 0:  # infinite or not a number
        return None
    return value
