"""GUE, splice sites and RNA families: a model pretrained in minutes and fine-tuned, against linear floors."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import _gue_cpu
from _fit import fit

from seqlong.bench import Row, main

#: Task -> MCC x 100 in the literature: DNABERT-2's paper (arXiv 2306.15006), table 4, on the same files.
PUBLISHED = {
    "prom/prom_core_notata": {"DNABERT-2": 68.04, "NT-2.5B": 71.58, "HyenaDNA": 35.38},
    "prom/prom_core_tata": {"DNABERT-2": 74.17, "NT-2.5B": 72.97, "HyenaDNA": 72.87},
    "prom/prom_300_tata": {"DNABERT-2": 71.59, "NT-2.5B": 79.43, "HyenaDNA": 5.34},
    "tf/0": {"DNABERT-2": 71.99, "NT-2.5B": 66.64, "HyenaDNA": 62.3},
    "tf/1": {"DNABERT-2": 76.06, "NT-2.5B": 70.28, "HyenaDNA": 67.86},
    "mouse/0": {"DNABERT-2": 56.76, "NT-2.5B": 63.31, "HyenaDNA": 35.62},
}
ALIGNED = ("prom/prom_core_notata", "prom/prom_core_tata", "prom/prom_300_tata", "uci_splice")
#: Optimiser steps of fine-tuning, by how many records there are.
STEPS = {"prom/prom_core_notata": 3000, "tf/0": 2500, "tf/1": 2500}


def run(folder: Path, name: str, *settings: str) -> dict[str, float] | None:
    """Fine-tune, then measure the best checkpoint on the test: its scores, and those of the floors; None: it failed."""
    place = folder / name.replace("/", "-").replace(" ", "-")
    commands = [
        ["seqlong", "fit", *settings, f"run.dir={place}", "run.name=gue"],
        ["seqlong", "test", "--ckpt_path=", f"run.dir={place}-test"],
    ]
    found: dict[str, float] = {}
    for command in commands:
        if command[1] == "test":
            best = sorted((place / "checkpoints").glob("best-*.ckpt"), key=lambda path: path.stat().st_mtime)[-1]
            command[2] = f"--ckpt_path={best}"
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            print(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}", file=sys.stderr, flush=True)
            return None
        found |= {key: float(value) for key, value in re.findall(r"(test/\S+)\s*│\s*([-\d.e]+)", done.stdout)}
    for floor in json.loads((place / "floors.json").read_text()):
        if "test" in floor:
            found[f"floor: {floor['name']}"] = floor["test"]["mcc"]
            found[f"floor accuracy: {floor['name']}"] = floor["test"]["accuracy"]
    print(name, json.dumps(found), flush=True)
    return found


def rows(
    data: Path, tasks: list[str], seeds: int, seconds: float, parallel: int, minutes: float | None, scratch: str
) -> Iterator[Row]:
    """Pretrain once, then every task with every seed, several at a time; none begins later than ``minutes``."""
    started = time.monotonic()
    common = ["experiment=dna/mlm_gpu", f"data.path={data}/genomes/hs37_chrX_first70Mb.fa.gz"]
    probe = fit(scratch, *common, "trainer.max_steps=60", "trainer.limit_val_batches=0",
                "trainer.log_every_n_steps=10")  # fmt: skip
    speed = max(probe["throughput/tokens_per_s"])
    steps = max(200, int(seconds * speed / (256 * 512)))
    pretrained = Path(scratch) / "pretrained"
    began = time.monotonic()
    settings = [*common, f"trainer.max_steps={steps}", f"trainer.val_check_interval={max(100, steps // 4)}"]
    command = ["seqlong", "fit", *settings, f"run.dir={pretrained}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    print(f"pretrained {steps} steps in {time.monotonic() - began:.0f} s at {speed:,.0f} bases/s", flush=True)
    jobs: dict[tuple[str, int], list[str]] = {}
    labelled = data / "labelled"
    for seed in range(seeds):
        for task in tasks:
            steps = STEPS.get(task, 1200)
            tuned = [f"task.init_from={pretrained}", f"seed={seed}", "data.batch_size=64", "data.eval_batch_size=512",
                     "task.optimizer.lr=3.0e-4", "task.dropout=0.2", "task.schedule.warmup_steps=100"]  # fmt: skip
            if task in ALIGNED:  # all sequences lie alike around a start or a splice site, on one strand
                tuned += ["task.pool=places", "task.rc=none"]
            if task == "uci_splice":
                tuned += ["experiment=dna/finetune", f"data.train={labelled}/uci_splice/splice.data", "data.folds=10",
                          f"data.fold={seed}", "task.classes=3"]  # fmt: skip
            elif task == "nRC":
                names = ("dataset_Rfam_6320_13classes.fasta.gz", "dataset_Rfam_validated_2600_13classes.fasta.gz")
                tuned += ["experiment=dna/finetune", f"data.train={labelled}/nRC/{names[0]}", "task.classes=13",
                          f"data.test={labelled}/nRC/{names[1]}", "data.unseen=exact", "task.rc=none"]  # fmt: skip
            else:
                tuned += ["experiment=dna/gue_finetune", f"data.folder={labelled}/GUE", f"data.task={task}"]
            tuned += [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps // 10}"]
            jobs[task, seed] = sorted(tuned, key=lambda word: not word.startswith("experiment="))

    def tune(key: tuple[str, int]) -> dict[str, float] | None:
        late = minutes is not None and time.monotonic() - started > 60 * minutes
        return None if late else run(Path(scratch), f"{key[0]} {key[1]}", *jobs[key])

    with ThreadPoolExecutor(parallel) as pool:
        found = dict(zip(jobs, pool.map(tune, jobs), strict=True))
    for task in tasks:
        several = [scores for seed in range(seeds) if (scores := found[task, seed])]
        if not several:
            continue
        measure = "mcc" if task in PUBLISHED else "accuracy"
        ours = mean(scores[f"test/{measure}"] for scores in several)
        beside = ", ".join(f"{name} {value / 100:.3f}" for name, value in PUBLISHED.get(task, {}).items())
        what = f"test {measure}, mean of {len(several)}{f' (published: {beside})' if beside else ''}"
        prefix = "floor: " if measure == "mcc" else "floor accuracy: "
        for name in sorted({key for scores in several for key in scores if key.startswith(prefix)}):
            peer = mean(scores[name] for scores in several)
            yield Row(task, what, ours, measure, f"linear: {name.removeprefix(prefix)}", peer)
        if all(f"test/unseen/{measure}" in scores for scores in several):
            unseen = mean(scores[f"test/unseen/{measure}"] for scores in several)
            yield Row(task, f"{what}, records not in training", unseen, measure, "all records", ours)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with genomes/ and labelled/")
    parser.add_argument("--tasks", nargs="+", default=[*PUBLISHED, "uci_splice", "nRC"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=150, help="time of pretraining")
    parser.add_argument("--parallel", type=int, default=4, help="fine-tunings at a time")
    parser.add_argument("--minutes", type=float, help="begin no fine-tuning later than this; left out: all are done")
    parser.add_argument("--cpu", action="store_true", help="small models from nothing, on one core; no pretraining")
    parser.add_argument("--folder", type=Path, help="with --cpu: where runs are kept, to go on with")
    parser.add_argument("--kept", action="store_true", help="with --cpu: only what has been run already")
    given = parser.parse_args()
    if given.cpu:
        tasks = [task for task in given.tasks if task in _gue_cpu.SETTINGS]
        tasks.sort(key=list(_gue_cpu.SETTINGS).index)
        outcomes: list[_gue_cpu.Outcome] = []
        place = given.folder or _gue_cpu.default_folder()
        made = _gue_cpu.rows(given.data, tasks, given.seeds, place, given.kept, PUBLISHED, outcomes)
        main("gue", made, lambda _, figure: _gue_cpu.draw(outcomes, PUBLISHED, figure), on="cpu")
        sys.exit(0)
    with tempfile.TemporaryDirectory() as folder:
        main("gue", rows(given.data, given.tasks, given.seeds, given.seconds, given.parallel, given.minutes, folder))
