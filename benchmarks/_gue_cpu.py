"""Small models from nothing on the labelled sets, on one CPU core: ``seqlong bench gue --cpu``.

Every (task, seed) has a run folder; one that has its answers is not run again. Settings were chosen on validation
records alone; the checkpoint is the best of validation; the test is read once, at the end.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from seqlong.bench import Row
from seqlong.datamodules.dna.labelled import LabelledData
from seqlong.datamodules.dna.task_folder import TaskFolder
from seqlong.tasks.label_scores import scores

#: Folds of cross-validation, for a task that has no test of its own; each is run once.
FOLDS = 5
SMALL = [
    "model=motifs", "data.eval_batch_size=256", "data.unseen=exact", "task.optimizer.lr=2.0e-3", "task.dropout=0.3",
    "trainer.log_every_n_steps=50",
]  # fmt: skip
ALIGNED = ["task.pool=places", "task.rc=none"]
SETTINGS: dict[str, list[str]] = {
    "uci_splice": [*ALIGNED, "trainer.max_steps=225", "trainer.val_check_interval=75"],
    "prom/prom_core_tata": [*ALIGNED, "trainer.max_steps=300", "trainer.val_check_interval=75"],
    "prom/prom_300_tata": [*ALIGNED, "trainer.max_steps=300", "trainer.val_check_interval=75"],
    "mouse/0": [
        "model.backbone.mixers.c.init_args.width=15",
        "task.pool=max",
        "task.rc=average",
        "trainer.max_steps=700",
        "trainer.val_check_interval=100",
        "task.dropout=0.2",
    ],
    "nRC": ["task.pool=max", "task.rc=none", "trainer.max_steps=1200", "trainer.val_check_interval=150"],
}


@dataclass
class Outcome:
    """What was measured of one task.

    Attributes:
        name: the task.
        measure: ``mcc`` or ``accuracy``.
        each: the score of every seed, or fold.
        floors: mean score of every linear model.
        together: of the mean of the answers of all seeds; None with folds, whose tests differ.
        unseen: of all seeds, of the records that are not in training; and ``together``'s.
    """

    name: str
    measure: str
    each: list[float] = field(default_factory=list)
    floors: dict[str, float] = field(default_factory=dict)
    together: float | None = None
    unseen: list[float] = field(default_factory=list)
    unseen_together: float | None = None
    unseen_floors: dict[str, float] = field(default_factory=dict)


def words(task: str, data: Path, number: int) -> tuple[list[str], LabelledData]:
    """The settings of seed (or fold) ``number`` of a task, and its data."""
    labelled = data / "labelled"
    every = [*SMALL, *SETTINGS[task]]
    if task == "uci_splice":
        path = str(labelled / "uci_splice" / "splice.data")
        given = ["experiment=dna/classify", f"data.train={path}", f"data.folds={FOLDS}", f"data.fold={number}"]
        return [*given, "task.classes=3", "seed=0", *every], LabelledData(
            path, folds=FOLDS, fold=number, unseen="exact", floors=False
        )
    if task == "nRC":
        names = ("dataset_Rfam_6320_13classes.fasta.gz", "dataset_Rfam_validated_2600_13classes.fasta.gz")
        train, test = (str(labelled / "nRC" / name) for name in names)
        given = ["experiment=dna/classify", f"data.train={train}", f"data.test={test}", "task.classes=13"]
        return [*given, f"seed={number}", *every], LabelledData(
            train, test=test, unseen="exact", seed=number, floors=False
        )
    given = ["experiment=dna/gue", f"data.folder={labelled / 'GUE'}", f"data.task={task}", f"seed={number}"]
    return [*given, *every], TaskFolder(str(labelled / "GUE"), task, unseen="exact", floors=False)


def place_of(folder: Path, task: str, number: int, settings: list[str]) -> Path:
    """The run's folder: another one for other settings, wherever the data lie."""
    told = [word for word in settings if not word.startswith(("data.train=", "data.test=", "data.folder="))]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]
    return folder / f"{task.replace('/', '-')}-{number}-{digest}"


def commands(place: Path, settings: list[str]) -> None:
    """Train, then write the answers of the best checkpoint; in a process of its own, whose words go to a log."""
    from seqlong.cli import main

    place.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(f"{place}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for left in (place, Path(f"{place}-answers")):  # of a run that was stopped: a minute's work
        shutil.rmtree(left, ignore_errors=True)
    if status := main(["fit", *settings, f"run.dir={place}"]):
        sys.exit(status)
    best = sorted((place / "checkpoints").glob("best-*.ckpt"), key=lambda path: path.stat().st_mtime)[-1]
    sys.exit(main(["predict", f"--ckpt_path={best}", f"run.dir={place}-answers"]))


def measured(place: Path, settings: list[str]) -> tuple[Tensor, Tensor]:
    """The answers to each record of the test, in the order of the file, and the labels; run if there are none yet."""
    kept = Path(f"{place}.pt")
    if not kept.is_file():
        child = multiprocessing.get_context("fork").Process(target=commands, args=(place, settings))
        child.start()
        child.join()
        if child.exitcode:
            sys.exit(f"{place.name} failed:\n{Path(f'{place}.log').read_text()[-3000:]}")
        parts = [torch.load(path) for path in sorted(Path(f"{place}-answers/predictions").glob("*.pt"))]
        order = torch.cat([part["records"] for part in parts]).argsort()
        torch.save({name: torch.cat([part[name] for part in parts])[order] for name in ("answers", "labels")}, kept)
    found = torch.load(kept)
    return found["answers"], found["labels"]


def outcome(task: str, data: Path, seeds: int, folder: Path, kept: bool = False) -> Outcome:
    """All seeds (or folds) of a task, one after the other; with ``kept`` those that have been run, and no other."""
    found = Outcome(task, "accuracy" if task in ("uci_splice", "nRC") else "mcc")
    floors: dict[str, list[float]] = {}
    unseen_floors: dict[str, list[float]] = {}
    every: list[Tensor] = []

    def score(answers: Tensor, labels: Tensor) -> float:
        return float(scores("class", answers.clamp(min=1e-9).log(), labels.float())[found.measure])

    for number in range(FOLDS if task == "uci_splice" else seeds):
        settings, source = words(task, data, number)
        place = place_of(folder, task, number, settings)
        if kept and not Path(f"{place}.pt").is_file():
            continue
        answers, labels = measured(place, settings)
        known = torch.from_numpy(~source.seen("test"))
        found.each.append(score(answers, labels))
        found.unseen.append(score(answers[known], labels[known]))
        said = f"{found.each[-1]:.4f}, not in training {found.unseen[-1]:.4f}"
        print(f"{task} {number}: {found.measure} {said}", flush=True)
        for floor in json.loads((place / "floors.json").read_text()):
            if "test" in floor and floor["name"] != "commonest label":
                floors.setdefault(floor["name"], []).append(floor["test"][found.measure])
                unseen_floors.setdefault(floor["name"], []).append(
                    floor.get("test_unseen", floor["test"])[found.measure]
                )
        every.append(answers)
    found.floors = {name: mean(values) for name, values in floors.items()}
    found.unseen_floors = {name: mean(values) for name, values in unseen_floors.items()}
    if task != "uci_splice" and len(every) > 1:
        together = torch.stack(every).mean(0)
        found.together, found.unseen_together = score(together, labels), score(together[known], labels[known])
    return found


def _runs(found: Outcome) -> str:
    """What the mean is over."""
    many = len(found.each)
    if found.name == "uci_splice":
        return f"mean of {many} of {FOLDS} folds"
    return "1 seed" if many == 1 else f"mean of {many} seeds"


def rows_of(found: Outcome, beside: str) -> Iterator[Row]:
    """A row against each linear model, one of the mean of all answers, one of records that are not in training."""
    many, unit = len(found.each), found.measure
    spread = f", sd {stdev(found.each):.3f}" if many > 1 else ""
    what = f"{found.name}, {_runs(found)}{spread}"
    metric = f"test {unit}{f' (published: {beside})' if beside else ''}"
    for name, value in found.floors.items():
        yield Row(what, metric, mean(found.each), unit, f"linear: {name}", value)
    best = max(found.floors, key=found.floors.__getitem__)
    if found.together is not None:
        said = f"{found.name}, answers of {many} seeds averaged"
        yield Row(said, metric, found.together, unit, f"linear: {best}", found.floors[best])
    best = max(found.unseen_floors, key=found.unseen_floors.__getitem__)
    yield Row(f"{found.name}, {_runs(found)}", f"{metric}, records not in training", mean(found.unseen), unit,
              f"linear: {best}", found.unseen_floors[best])  # fmt: skip
    if found.unseen_together is not None:
        yield Row(f"{found.name}, answers of {many} seeds averaged", f"{metric}, records not in training",
                  found.unseen_together, unit, f"linear: {best}", found.unseen_floors[best])  # fmt: skip


def rows(
    data: Path, tasks: list[str], seeds: int, folder: Path, kept: bool, published: dict[str, dict[str, float]],
    seen: list[Outcome],
) -> Iterator[Row]:  # fmt: skip
    """Task after task; ``seen`` keeps what ``draw`` shows."""
    torch.set_num_threads(1)
    for task in tasks:
        found = outcome(task, data, seeds, folder, kept)
        if not found.each:
            print(f"{task}: nothing has been run", flush=True)
            continue
        seen.append(found)
        beside = ", ".join(f"{name} {value / 100:.3f}" for name, value in published.get(task, {}).items())
        yield from rows_of(found, beside)


def draw(found: list[Outcome], published: dict[str, dict[str, float]], figure: Figure) -> None:
    """A panel a task: every seed, their mean, the averaged answers; linear models and published figures beside."""
    figure.set_size_inches(9, 0.9 + 1.75 * len(found))
    for axis, task in zip(figure.subplots(len(found), 1, squeeze=False)[:, 0], found, strict=True):
        lines: list[tuple[str, float, str]] = [(f"ours, {_runs(task)}", mean(task.each), "#1767b3")]
        if task.together is not None:
            lines.append((f"ours, answers of {len(task.each)} averaged", task.together, "#1767b3"))
        lines += [(f"linear: {name}", value, "#5d6772") for name, value in task.floors.items() if value > 0.2]
        lines += [(name, value / 100, "#b06a12") for name, value in published.get(task.name, {}).items() if value > 20]
        low = min(*(value for _, value, _ in lines), *task.each)
        high = max(*(value for _, value, _ in lines), *task.each)
        for place, (_, value, colour) in enumerate(lines):
            axis.plot(value, place, "o", color=colour, markersize=6)
            axis.annotate(f"{value:.3f}", (value, place), xytext=(7, 4), textcoords="offset points", va="center",
                          fontsize=7.5, color=colour)  # fmt: skip
        axis.plot(task.each, [0] * len(task.each), "|", color="#1767b3", markersize=11, alpha=0.6)
        axis.set_yticks(range(len(lines)), [name for name, _, _ in lines], fontsize=7.5)
        axis.set_ylim(len(lines) - 0.4, -0.6)
        pad = 0.08 * (high - low) + 1e-3
        axis.set_xlim(low - pad, high + 2.5 * pad)
        axis.set_title(f"{task.name}: {task.measure} of the test", loc="left", fontsize=9, fontweight="bold")
        axis.grid(axis="x", color="#e4e7ea", linewidth=0.7)
        axis.tick_params(axis="x", labelsize=7.5)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    figure.suptitle("0.1 M parameters from nothing, one CPU core: blue ours, grey linear, brown published",
                    fontsize=10.5, x=0.01, ha="left")  # fmt: skip


def default_folder() -> Path:
    """Where runs are kept, so that the command goes on where it was stopped."""
    from seqlong.datamodules.dna.cache import default_cache_dir

    return default_cache_dir() / "bench-gue-cpu"


__all__: list[Any] = ["Outcome", "default_folder", "draw", "rows"]
