"""Sequence parallelism: rows that several processes hold give what one process gives, output and every gradient."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from sequence_parallel import cases, gradients

#: Everything that works out a state or exchanges heads by itself, and of the rest, which gathers, a few.
NAMES = [
    "mamba2", "mamba2_groups", "mamba2_recompute", "attention_rope", "attention_gqa", "attention_mqa_alibi",
    "attention_window", "attention_both_sides", "attention_sinks", "attention_gated", "differential", "moba", "gla",
    "gla_conv", "hgrn2", "linear_attention", "linear_attention_softmax", "retnet", "lightning", "lightning_low_rank",
    "cosformer2", "simple_gla", "deltanet", "deltanet_negative", "gated_deltanet", "gated_deltanet_groups", "kda",
    "kda_safe", "rwkv7", "log_linear_mamba2", "mamba2_both_sides", "mamba2_both_sides_tied",
    "gla_joined", "latent", "parallel", "parallel_both_sides",
]  # fmt: skip


def spawn(ranks: int, folder: Path, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """What ``ranks`` processes find together."""
    script = Path(__file__).parent / "sequence_parallel.py"
    store, result = folder / "store", folder / "result.pt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(ranks), str(store), str(result), ",".join(names)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    said = []
    try:
        said = [child.communicate(timeout=240)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert all(child.returncode == 0 for child in children), "\n".join(text[-2000:] for text in said)
    return torch.load(result, weights_only=True)


@pytest.mark.parametrize(("ranks", "names"), [(2, NAMES[::5]), (4, NAMES)])
def test_fragments_are_the_row(ranks: int, names: list[str], tmp_path: Path) -> None:
    found = spawn(ranks, tmp_path, names)
    wrong = []
    for case, mixer, hidden, weigh, whole in cases(names):
        exact = gradients(mixer, hidden, weigh, lambda mixer, x, whole=whole: mixer(x, whole)[0])
        assert set(found[case]) == set(exact), case
        for name, value in exact.items():
            away = (found[case][name] - value).abs().max() / value.abs().max().clamp(min=1)
            if not away < 1e-12:
                wrong.append(f"{case}: {name} {away:.1e}")
    assert not wrong, "\n".join(wrong)


def losses(folder: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> value of what a run logged of training and validation, the last time it did."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    wanted = ("train/loss", "train/bits", "train/tokens", "val/bits", "val/accuracy")
    return {(row["name"], int(row["step"])): float(row["value"]) for row in rows if row["name"] in wanted}


def test_runs_on_more_processes_are_the_run_on_one(tmp_path: Path) -> None:
    """Also where it goes on with another degree and another number of processes than it began with."""
    command = [
        str(Path(sys.executable).with_name("seqlong")), "fit", "experiment=dna/demo", "data.length=128",
        "data.batch_size=4", "trainer.accelerator=cpu",
        "trainer.log_every_n_steps=1", "trainer.val_check_interval=2", "trainer.limit_val_batches=2",
        "model.backbone.mixers.m.class_path=seqlong.mixers.GatedDeltaNet", "~model.backbone.mixers.m.init_args",
    ]  # fmt: skip
    four = "trainer.strategy={class_path: seqlong.parallel.strategy.SequenceParallel, init_args: {degree: 2}}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> None:
        done = subprocess.run(
            [*command, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    run("run.dir=one", "trainer.max_steps=4")
    earlier = "trainer.callbacks.checkpoints.init_args.mode=max"  # bits fall: the checkpoint of step 2 is kept
    run("run.dir=many", "trainer.max_steps=4", "trainer.devices=4", four, earlier)
    (middle,) = (tmp_path / "many" / "checkpoints").glob("best-2-*.ckpt")
    two = ["trainer.devices=2", "trainer.strategy=sequence_parallel", f"--ckpt_path={middle}"]
    run("run.dir=more", "trainer.max_steps=4", *two)
    one, many, more = (losses(tmp_path / name) for name in ("one", "many", "more"))
    assert {key for key in one if key[1] > 2} == set(more)
    assert set(one) == set(many) and len(one) > 12
    for key, value in one.items():
        assert many[key] == pytest.approx(value, abs=2e-5), key
        assert more.get(key, value) == pytest.approx(value, abs=2e-5), key
