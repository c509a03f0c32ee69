"""The run folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from seqlong import runs
from seqlong.errors import CheckpointError, ConfigError


def finished(root: Path, name: str, age: float) -> Path:
    run = runs.create(root, name)
    (run / "checkpoints").mkdir()
    runs.start(run, name)
    path = run / "checkpoints" / "last.ckpt"
    path.touch()
    stamp = path.stat().st_mtime - age
    os.utime(path, (stamp, stamp))
    return run


def test_newest_prefers_the_same_architecture(tmp_path: Path) -> None:
    def with_width(age: float, width: int) -> Path:
        run = finished(tmp_path, "a", age)
        backbone = {"d_model": width, "norm": "rms"}
        runs.atomic_write(run / "config.yaml", json.dumps({"model": {"init_args": {"backbone": backbone}}}))
        return run

    narrow, wide = with_width(2, 8), with_width(1, 16)
    assert runs.newest(tmp_path, "a", {"d_model": 8}) == narrow
    assert runs.newest(tmp_path, "a", {"d_model": 16, "norm": "rms"}) == wide
    assert runs.newest(tmp_path, "a", {"d_model": 32}) == runs.newest(tmp_path, "a") == wide


def test_two_runs_of_one_second_have_two_folders(tmp_path: Path) -> None:
    found = {runs.create(tmp_path / "runs", "a") for _ in range(5)}
    assert len(found) == 5 and all(path.is_dir() and path.name.startswith("a-") for path in found)


def test_a_given_folder_is_used_but_never_one_that_holds_a_run(tmp_path: Path) -> None:
    assert runs.create(tmp_path, "a", tmp_path / "mine") == tmp_path / "mine"
    run = finished(tmp_path, "b", 0)
    with pytest.raises(ConfigError, match=r"already holds a run\. Continue it with --ckpt_path"):
        runs.create(tmp_path, "a", run)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot make a run folder under .*file.*run\.root=FOLDER"):
        runs.create(tmp_path / "file", "a")


def test_newest_is_by_the_last_write_and_by_name(tmp_path: Path) -> None:
    old, new, other = finished(tmp_path, "a", 50), finished(tmp_path, "a", 10), finished(tmp_path, "b", 0)
    runs.create(tmp_path, "a")  # one that never saved anything
    assert runs.newest(tmp_path, "a") == new != old
    assert runs.newest(tmp_path) == other
    with pytest.raises(CheckpointError, match=r"no run named c .* are named: a, b\. Choose one with run\.name=NAME"):
        runs.newest(tmp_path, "c")


def test_best_checkpoint(tmp_path: Path) -> None:
    run = finished(tmp_path, "a", 0)
    with pytest.raises(CheckpointError, match="never validated"):
        runs.best_checkpoint(run)
    (run / "checkpoints" / "best-5-1.9.ckpt").touch()
    assert runs.best_checkpoint(run).name == "best-5-1.9.ckpt"


def test_the_record_of_a_run_that_goes_on(tmp_path: Path) -> None:
    runs.start(tmp_path, "a")
    first = json.loads((tmp_path / "run.json").read_text())
    assert first["status"] == "running" and first["ended"] is None and first["versions"]["torch"]
    assert first["host"]["cores"] >= 1 and first["host"]["memory_gib"] > 0 and first["command"]
    runs.finish(tmp_path, "failed", "broken")
    runs.finish(tmp_path, "finished")
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "failed" and record["error"] == "broken", "the first word about the end stands"
    runs.start(tmp_path, "a", resumed_from=Path("last.ckpt"))
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["started"] == first["started"] and record["resumed_from"] == "last.ckpt"
    assert [entry["error"] for entry in record["history"]] == ["broken"]


def test_writes_are_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    runs.write_json(path, {"a": float("nan"), "b": Path("c"), "d": (1, 2)})
    assert json.loads(path.read_text()) == {"a": None, "b": "c", "d": [1, 2]}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        runs.write_json(path, {"a": 2})
    assert json.loads(path.read_text())["a"] is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_the_commit_of_this_repository() -> None:
    found = runs.commit()
    if (Path(__file__).parents[1] / ".git").exists():
        assert found["commit"] is not None and len(found["commit"]) == 40 and isinstance(found["dirty"], bool)
    else:
        assert found == {"commit": None, "dirty": None}
