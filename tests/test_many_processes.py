"""Several processes: checkpoints in parts, a rank that is stuck, ranks that differ. One process imports torch and forks
all others (tests/many_processes.py)."""

from __future__ import annotations

import csv
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from many_processes import fit

from seqlong.callbacks.checkpoints import read_checkpoint
from seqlong.callbacks.divergence import bits, differing
from seqlong.callbacks.watchdog import Place, say
from seqlong.errors import CheckpointError
from seqlong.parallel.parts import HEAD, lacking, mend
from seqlong.parallel.saver import sweep

Found = tuple[Path, dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("many_processes.py")), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout)


def losses(run: Path) -> dict[int, float]:
    """Step -> loss."""
    with (run / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["name"] == "train/loss"}


def test_parts_of_two_processes_go_on_on_one_and_on_four(found: Found) -> None:
    """Losses are those of a run that was never stopped; what was being written when it ended is there."""
    folder, ended = found
    assert {one["status"] for name in ("one", "two", "on one", "on four") for one in ended[name]} == {0}
    whole = losses(folder / "one")
    assert sorted(losses(folder / "two")) == [0, 1, 2, 3]
    for name, steps in (("on one", [4, 5, 6, 7]), ("on four", [4, 5, 6, 7])):
        after = losses(folder / name)
        assert sorted(after) == steps
        assert after == pytest.approx({step: whole[step] for step in steps}, rel=1e-5), name


def test_a_checkpoint_in_parts_is_read_as_a_whole_one(found: Found) -> None:
    """Best and last; weights, moments, and what nobody names any more is gone."""
    folder, _ = found
    checkpoints = folder / "two" / "checkpoints"
    content = read_checkpoint(checkpoints / "last.ckpt", moments=True)
    whole = torch.load(folder / "one" / "checkpoints" / "last.ckpt", weights_only=True)
    assert content.keys() == whole.keys() and content["global_step"] == 4
    assert {n: (v.shape, v.dtype) for n, v in content["state_dict"].items()} == {
        n: (v.shape, v.dtype) for n, v in whole["state_dict"].items()
    }
    moments = content["optimizer_states"][0]["state"]
    assert all(
        moments[n]["exp_avg"].abs().sum() > 0 and moments[n]["step"] == 4 for n in whole["optimizer_states"][0]["state"]
    )
    assert read_checkpoint(checkpoints / "last.ckpt", weights=False)["state_dict"]["embedding.weight"].is_meta
    (best,) = checkpoints.glob("best-3-*.ckpt")
    assert read_checkpoint(best)["global_step"] == 3
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        best.name, "last.ckpt", "step-00000003", "step-00000004"
    ]  # fmt: skip


def test_killed_while_it_writes_the_checkpoint_before_is_found(found: Found, tmp_path: Path) -> None:
    folder, ended = found
    run = folder / "killed"
    assert [one["status"] for one in ended["killed"]] == [-9, -9]
    assert sorted(losses(run)) == [0, 1, 2, 3, 4], "steps went on while that of step 4 was written"
    unfinished = run / "checkpoints" / "step-00000004"
    assert unfinished.is_dir() and "not written to its end" in str(lacking(unfinished))
    assert mend(run / "checkpoints" / "last.ckpt") is None
    fit(run, 8, start=run / "checkpoints" / "last.ckpt")
    whole = losses(folder / "one")
    assert losses(run) == pytest.approx(whole, rel=1e-6)
    assert not unfinished.exists() and read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 8


def test_a_part_that_cannot_be_written_is_named(found: Found) -> None:
    folder, ended = found
    first, second = ended["full"]
    assert "step-00000008 in parts: rank 1: File too large; step-00000006 is whole. Training goes on" in first["log"]
    for one in (first, second):
        assert one["error"].startswith("CheckpointError: cannot write the checkpoint")
        assert "step-00000010 in parts: rank 1: File too large; step-00000006 is whole" in one["error"]
    assert read_checkpoint(folder / "full" / "checkpoints" / "last.ckpt")["global_step"] == 6


def test_parts_that_are_not_whole(found: Found) -> None:
    """The newest whole one takes their place, and what is wrong is said."""
    checkpoints = found[0] / "two" / "checkpoints"
    last, part = checkpoints / "last.ckpt", checkpoints / "step-00000004" / "__1_0.distcp"
    kept = part.read_bytes()
    part.write_bytes(kept[:-1])
    with pytest.raises(
        CheckpointError, match=rf"has {len(kept) - 1:,} bytes, instead of its {len(kept):,} bytes.*0003"
    ):
        read_checkpoint(last)
    damaged = kept.replace(kept[200:300], b"x" * 100)
    part.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="cannot be read: rank 0"):
        read_checkpoint(last)
    part.write_bytes(kept[:-1])
    assert "going on from step-00000003" in str(mend(last))
    assert read_checkpoint(last)["global_step"] == read_checkpoint(checkpoints / "step-00000003")["global_step"] == 3
    (other := checkpoints / "step-00000009").mkdir()
    (other / "notes.txt").touch()  # not ours
    sweep(checkpoints)
    assert other.exists() and not part.exists() and (checkpoints / "step-00000003" / HEAD).is_file()


def test_a_rank_that_does_not_come_is_named(found: Found) -> None:
    folder, ended = found
    record = json.loads((folder / "sleeps" / "run.json").read_text())
    host = re.escape(socket.gethostname())
    wanted = (
        rf"nothing has moved for 0\.1\d* minutes; rank 1 \({host}, process \d+\) did not come on from step 2, in the "
        r"forward pass, to collective \d+; the others wait: 1 at step 2, in the forward pass. The run ends here"
    )
    assert re.match(wanted, record["error"]), record["error"]
    assert record["status"] == "failed" and "--ckpt_path last" in record["error"]
    assert [one["status"] for one in ended["sleeps"]] == [1, 1]
    assert "time.sleep(60)" in (folder / "sleeps" / "ranks" / "1.stack").read_text()
    assert not (folder / "sleeps" / "ranks" / "0.stack").exists()


def test_what_is_said_of_ranks() -> None:
    """Gone, never there, or all at the same place."""
    at = {rank: Place(rank, f"node{rank}", 10 + rank, serial=7, step=3, doing="saving") for rank in range(3)}
    behind, text = say(at, set(), 3, 25.0)
    assert not behind and "for 25 minutes; all ranks stand at the same place (3 at step 3, saving)" in text
    at[0].serial = 6
    assert say(at, set(), 3, 25.0)[0] == [0]
    at[0].serial = 7
    behind, text = say(at, {1}, 4, 25.0)
    assert behind == [1] and "rank 1 (node1, process 11) does not answer any more; last seen at step 3" in text
    assert "never heard of rank 3; the others wait: 2 at step 3" in text


def test_ranks_that_come_apart_are_named(found: Found) -> None:
    """With all weights on each: an error on all. Replicas of parts: a warning on one, and none before."""
    ended = found[1]
    for one in ended["apart"]:
        assert one["error"].startswith(
            f"TrainingError: ranks have come apart: rank 2 ({socket.gethostname()}) not as the"
        )
        assert "first in blocks.1.inner.bias (" in one["error"] and "at step 4; at step 2 they agreed" in one["error"]
    logs = [one["log"] for one in ended["on four"]]
    assert logs[0].count("come apart") == 1 and not any(logs[1:])
    assert "rank 2 (" in logs[0] and "not as rank 0, first in blocks.1.inner.bias (1 of 5 param" in logs[0]


def test_ranks_that_hold_the_same_are_compared() -> None:
    keys = np.array([[0, 1, 5], [0, 2, 6], [0, 1, 7], [0, 2, 8]])
    values = np.array([[3, 10, 1], [3, 20, 2], [3, 10, 3], [3, 20, 4]])
    assert differing(keys, values) == []
    values[3] = 9
    assert differing(keys, values) == [(0, [3], [0, 1, 2, 3]), (1, [3], [1, 3])]
    assert bits(torch.tensor([1.0, 2.0])) != bits(torch.tensor([1.0, 2.0000002]))
    assert bits(torch.tensor([True, False])) == 1
