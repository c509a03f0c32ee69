"""Held-out books as bytes: a small hybrid, pure Mamba2 and attention after equal training time, against bz2 and xz.

Three models of one size learn from the other books for ``--seconds`` each, with the steps that fit into that time at
the speed of a short first run: of a GPU by the clock, of a CPU in CPU seconds, so that what else the machine does
changes nothing (set OMP_NUM_THREADS=1 for one thread). Each is measured on rows of the training length, then on rows 8
times as long, by position. bzip2, xz and counted pairs of bytes are held to the same books, which the compressors read
as one stream.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from _fit import metrics
from matplotlib.figure import Figure

from seqlong import cli
from seqlong.bench import Row, main
from seqlong.callbacks.loss_by_position import show

KINDS, TIMES = ("hybrid", "mamba2", "transformer"), 8
FLOORS = ("order-1", "bz2", "xz")
CURVES: dict[str, list[tuple[int, float]]] = {}
LINES: dict[str, float] = {}


def settings(kind: str, given: argparse.Namespace) -> list[str]:
    """Of every run of a model."""
    size = "medium" if torch.cuda.is_available() else "small"
    held = f"{{class_path: seqlong.datamodules.text.FileSplit, init_args: {{validation: [{', '.join(given.held)}]}}}}"
    return ["experiment=text/demo", f"model={kind}_{size}", f"data.path={given.path}", f"data.split={held}",
            f"data.length={given.length}", f"data.batch_size={given.batch}", f"data.eval_length={given.length}",
            f"task.optimizer.lr={given.rate}", f"trainer.limit_val_batches={given.rows}"]  # fmt: skip


def call(verb: str, run: Path, *words: str) -> Path:
    """A verb of seqlong in this process, where it need not be loaded again; the script ends where it fails."""
    if cli.main([verb, *words, f"run.dir={run}"]):
        sys.exit(f"seqlong {verb} {' '.join(words)} failed")
    return run


def seconds_a_step(kind: str, scratch: Path, given: argparse.Namespace) -> float:
    """By the clock on a GPU; on a CPU what 12 steps more cost in CPU seconds, without the start of the run."""
    common = [*settings(kind, given), "trainer.limit_val_batches=0"]
    if torch.cuda.is_available():
        found = metrics(call("fit", scratch / f"{kind}-probe", *common, "trainer.max_steps=40"))
        return given.length * given.batch / max(found["throughput/tokens_per_s"])
    spent = []
    for steps in (4, 16):
        before = time.process_time()
        call("fit", scratch / f"{kind}-probe-{steps}", *common, f"trainer.max_steps={steps}")
        spent.append(time.process_time() - before)
    return max(spent[1] - spent[0], 1e-3) / 12


def by_position(run: Path) -> list[tuple[int, int, float, float]]:
    """``(low, high, count, bits)`` of each bin of tokens seen."""
    with open(run / "losses.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["measure"] == "position"]
    return [(int(row["low"]), int(row["high"]), float(row["count"]), float(row["bits"])) for row in rows]


def mean(bins: list[tuple[int, int, float, float]], low: int, high: int) -> float:
    """Bits of the positions from ``low`` on, below ``high``."""
    some = [one for one in bins if low <= one[0] < high]
    return sum(one[2] * one[3] for one in some) / sum(one[2] for one in some)


def measured(scratch: Path, given: argparse.Namespace) -> Iterator[Row]:
    """Each model against the compressors, the hybrid against the others, and each far out against itself near."""
    bits, far = {}, TIMES * given.length
    for kind in KINDS:
        cost = seconds_a_step(kind, scratch, given)
        steps = max(10, int(given.seconds / cost))
        fitted = call("fit", scratch / kind, *settings(kind, given), f"trainer.max_steps={steps}",
                      f"trainer.val_check_interval={steps}")  # fmt: skip
        found = metrics(fitted)
        bits[kind] = found["val/bits_per_byte"][-1]
        LINES.update({name: found[f"floor/{name}"][-1] for name in FLOORS if f"floor/{name}" in found})
        beyond = call("validate", scratch / f"{kind}-far", f"--ckpt_path={fitted / 'checkpoints' / 'last.ckpt'}",
                      f"data.eval_length={far}", f"trainer.limit_val_batches={given.far_rows}")  # fmt: skip
        bins = by_position(beyond)
        CURVES[kind] = [(low, value) for low, _, _, value in bins]
        name = f"{kind}, {given.seconds:.0f} s: {steps:,} steps of {given.length * given.batch:,} bytes"
        for floor, value in LINES.items():
            yield Row(name, "bits a byte of held-out books", bits[kind], "bits", floor, value)
        yield Row(f"{kind}, rows of {far:,}", f"bits a byte from {far // 2:,} on", mean(bins, far // 2, far), "bits",
                  f"itself, {given.length // 2:,} to {given.length:,}",
                  mean(bins, given.length // 2, given.length))  # fmt: skip
        yield Row(kind, "training speed", given.length * given.batch / cost, "bytes/s")
    for other in KINDS[1:]:
        yield Row("hybrid", "bits a byte of held-out books", bits["hybrid"], "bits", f"seqlong {other}", bits[other])


def draw(found: list[Row], figure: Figure, trained: int) -> None:
    """Bits by position of each model, and what the compressors need."""
    show(figure, CURVES, trained)
    axis = figure.axes[0]
    lowest = min(LINES.values(), default=0.0)
    for name, value in LINES.items():
        axis.axhline(value, color="#8a939b", linewidth=0.9, linestyle="--")
        where = (3, -9 if value == lowest else 2)  # the lowest below its line: bz2 and xz lie close together
        axis.annotate(name, (1, value), xytext=where, textcoords="offset points", fontsize=7.5, color="#5d666e")
    axis.set_ylim(0, 8.2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True, help="a folder of books, .txt")
    parser.add_argument("--held", nargs="+", required=True, help="names of the books that are held out")
    parser.add_argument("--seconds", type=float, default=120, help="training time of each model")
    parser.add_argument("--length", type=int, default=4096, help="bytes in a row of training")
    parser.add_argument("--batch", type=int, default=1, help="rows in a step")
    parser.add_argument("--rate", type=float, default=4e-3, help="the highest learning rate")
    parser.add_argument("--rows", type=int, default=32, help="rows to measure bits a byte on, 2 or more")
    parser.add_argument("--far-rows", type=int, default=4, help="rows to measure bits by position on, 2 or more")
    chosen = parser.parse_args()
    if min(chosen.rows, chosen.far_rows) < 2:  # a limit of 1 batch would be read as 1.0, all of them
        parser.error("--rows and --far-rows must be 2 or more")
    with tempfile.TemporaryDirectory() as scratch:
        rows = measured(Path(scratch), chosen)
        main("text_equal_time", rows, lambda found, figure: draw(found, figure, chosen.length))
