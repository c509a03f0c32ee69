"""One GPU on E. coli: a hybrid against its two halves in equal time, and HybriDNA-300M on rows of 131,072."""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from seqlong.bench import Row, main

MODELS = ("hybrid_medium", "transformer_medium", "mamba2_medium")


def fit(folder: str, *settings: str) -> dict[str, list[float]]:
    """Run ``seqlong fit`` in a folder of its own; every metric's values in order."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = ["seqlong", "fit", *settings, f"run.dir={run}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")
    metrics: dict[str, list[float]] = {}
    with open(run / "metrics.csv") as file:
        for row in csv.DictReader(file):
            metrics.setdefault(row["name"], []).append(float(row["value"]))
    return metrics


def equal_time(folder: str, seconds: float) -> Iterator[Row]:
    """Each model trains for the same time, its schedule fitted to the steps that it can do in it."""
    common = ("experiment=dna/ecoli", "trainer.log_every_n_steps=10")
    results, speeds, steps = {}, {}, {}
    for model in MODELS:
        probe = fit(folder, *common, f"model={model}", "trainer.max_steps=40", "trainer.limit_val_batches=0")
        speeds[model] = max(probe["throughput/tokens_per_s"])
        steps[model] = max(100, int(seconds * speeds[model] / (4 * 8192)))
        metrics = fit(
            folder, *common, f"model={model}", f"trainer.max_steps={steps[model]}",
            f"trainer.val_check_interval={steps[model] // 5}",
        )  # fmt: skip
        results[model] = min(metrics["val/bits"])
        floors = {name: values[-1] for name, values in metrics.items() if name.startswith("floor/markov")}
        print(model, f"{steps[model]} steps", f"val bits {metrics['val/bits']}", floors, flush=True)
    hybrid = MODELS[0]
    floor_name, floor = next(iter(floors.items()))
    yield Row(f"{hybrid}, {seconds:.0f} s of training", "validation bits per base", results[hybrid], "bits",
              floor_name.removeprefix("floor/"), floor)  # fmt: skip
    for other in MODELS[1:]:
        yield Row(f"{hybrid}, {seconds:.0f} s of training", "validation bits per base", results[hybrid], "bits",
                  other, results[other])  # fmt: skip
    for model in MODELS:
        yield Row(f"{model}, rows of 8,192", "training", speeds[model], "tokens/s")
        yield Row(f"{model}, {seconds:.0f} s of training", "optimiser steps of 32,768 bases", steps[model], "steps")


def long_rows(folder: str) -> Iterator[Row]:
    """HybriDNA-300M on single rows of 131,072 bases: whole training steps."""
    common = (
        "experiment=dna/pretrain", "data.path=ecoli", "data.stages=null", "data.length=131072", "data.batch_size=1",
        "trainer.accumulate_grad_batches=1", "trainer.max_steps=4", "trainer.log_every_n_steps=1",
        "trainer.limit_val_batches=0",
    )  # fmt: skip
    found = {}
    for model in ("hybridna_300m", "transformer_300m"):
        metrics = fit(folder, *common, f"model={model}")
        found[model] = max(metrics["throughput/tokens_per_s"]), metrics["memory/peak_gib"][-1]
    ours, theirs = found["hybridna_300m"], found["transformer_300m"]
    yield Row("HybriDNA-300M, one row of 131,072", "training", ours[0], "tokens/s", "transformer_300m", theirs[0])
    yield Row("HybriDNA-300M, one row of 131,072", "peak memory", ours[1], "GiB", "transformer_300m", theirs[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=180, help="training time of each model")
    parser.add_argument("--only", choices=["equal_time", "long_rows"], help="one part of it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        parts = {"equal_time": lambda: equal_time(scratch, given.seconds), "long_rows": lambda: long_rows(scratch)}
        wanted = [given.only] if given.only else list(parts)
        name = "dna_gpu" if given.only is None else f"dna_gpu_{given.only}"
        main(name, (row for part in wanted for row in parts[part]()))
