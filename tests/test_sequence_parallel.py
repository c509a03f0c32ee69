"""Sequence parallelism: rows that several processes hold give what one process gives, output and every gradient."""

from __future__ import annotations

import csv
import json
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
    "gla_joined", "latent", "switch_head", "switch_head_both_sides", "parallel", "parallel_both_sides",
]  # fmt: skip


def spawn(ranks: int, folder: Path, names: list[str], passes: bool) -> dict[str, dict[str, Tensor]]:
    """What ``ranks`` processes find together."""
    script = Path(__file__).parent / "sequence_parallel.py"
    store, result = folder / "store", folder / "result.pt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(ranks), str(store), str(result), ",".join(names), str(passes)],
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


PASSED_ON = ["mamba2", "simple_gla", "gla", "gated_deltanet", "rwkv7", "mamba2_both_sides"]


@pytest.mark.parametrize(("ranks", "names", "passes"), [(4, NAMES, False), (4, PASSED_ON, True)])
def test_fragments_are_the_row(ranks: int, names: list[str], passes: bool, tmp_path: Path) -> None:
    """Also where states are passed from one to the next."""
    found = spawn(ranks, tmp_path, names, passes)
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
    wanted = ("train/loss", "train/bits", "train/tokens", "grad_norm", "val/bits")
    return {(row["name"], int(row["step"])): float(row["value"]) for row in rows if row["name"] in wanted}


def test_runs_on_more_processes_are_the_run_on_one(tmp_path: Path) -> None:
    """Rows in parts; then, from a checkpoint, weights too, experts apart, on other processes; tiles, steps of two
    batches. What comes out are the weights and moments of one process."""
    command = [
        str(Path(sys.executable).with_name("seqlong")), "fit", "experiment=dna/demo", "data.length=128",
        "data.batch_size=4", "trainer.accelerator=cpu", "trainer.accumulate_grad_batches=2", "trainer.max_steps=3",
        "trainer.log_every_n_steps=1", "trainer.val_check_interval=2", "trainer.limit_val_batches=2",
        "model.backbone.mixers.m.class_path=seqlong.mixers.GatedDeltaNet", "~model.backbone.mixers.m.init_args",
        "model.backbone.ffn.class_path=seqlong.ffn.MoE", "model.backbone.checkpointing=tiled", "model.backbone.tile=48",
        "trainer.callbacks.checkpoints.init_args.mode=max",  # bits fall: the checkpoint of step 1 is kept
    ]  # fmt: skip
    rows = "{class_path: seqlong.parallel.strategy.SequenceParallel, init_args: {degree: 2}}"
    apart = "{class_path: seqlong.parallel.fully_shard.FullyShard, init_args: {degree: 2, expert_parallel: true}}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> None:
        done = subprocess.run(
            [*command, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    run("run.dir=one")
    run("run.dir=many", "trainer.devices=4", f"trainer.strategy={rows}")
    (first,) = (tmp_path / "many" / "checkpoints").glob("best-1-*.ckpt")
    run("run.dir=apart", "trainer.devices=2", f"trainer.strategy={apart}", f"--ckpt_path={first}")
    one, many, more = (losses(tmp_path / name) for name in ("one", "many", "apart"))
    assert set(many) == set(one) and set(more) == {key for key in one if key[1] > 1}
    for found in (many, more):
        for key, value in found.items():
            assert value == pytest.approx(one[key], rel=1e-5, abs=2e-5), key
    last = [torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("one", "apart")]
    for expected, found in zip(*(tensors(x["state_dict"]) + tensors(x["optimizer_states"]) for x in last), strict=True):
        # AdamW's first steps divide gradients near zero by themselves: single elements may differ more.
        assert (found - expected).norm() <= 1e-3 * expected.norm() + 1e-6


def tensors(value: object) -> list[Tensor]:
    """All of them, in order."""
    if isinstance(value, dict):
        return [x for item in value.values() for x in tensors(item)]
    if isinstance(value, list | tuple):
        return [x for item in value for x in tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def test_the_benchmark_runs_on_any_number_of_processes(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    script = Path(__file__).parent.parent / "benchmarks" / "parallel.py"
    words = ["--gpus", "2", "--lengths", "64", "--models", "linear_moe_2b", "--weights", "experts", "--steps", "1"]
    done = subprocess.run(
        [sys.executable, str(script), *words, "--recurrent", "states,rows", "--log", str(tmp_path / "log")],
        env={**os.environ, "SEQLONG_BENCHMARKS": str(tmp_path / "benchmarks")}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    dense, states, rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [case["degree"] for case in (dense, states, rows)] == [1, 2, 2]
    assert states["loss"] == pytest.approx(rows["loss"], abs=1e-3)
    # Ways to cut differ in what they exchange, and all bring the other half of the weights that are not experts.
    assert states["received_mib"] != rows["received_mib"] and min(states["received_mib"], dense["received_mib"]) > 0
