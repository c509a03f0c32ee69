"""``seqlong plan --check``: steps measured on this machine, beside what was predicted for them."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from seqlong.errors import SeqlongError
from seqlong.planning.estimate import Estimate
from seqlong.planning.ledger import KINDS
from seqlong.planning.machines import MACHINES, Reached
from seqlong.planning.step import Job, job, loss_of, sketch

#: Lengths that are measured if none are given: on a CPU seconds, on a GPU as much as fits a small one.
CPU_LENGTHS, GPU_LENGTHS = (1024, 2048, 3072, 4096), (8192, 16384, 32768, 65536)


BACKWARD = "seqlong plan: backward begins"


@dataclass(frozen=True)
class Compared:
    """One length.

    Attributes:
        length: tokens of a row.
        predicted, measured: bytes at the fullest moment.
        saved_predicted, saved_measured: bytes kept for the backward pass when it begins.
        expected, took: seconds of a step; nothing is expected of what the expectation is made from.
    """

    length: int
    predicted: float
    measured: float
    saved_predicted: float
    saved_measured: float
    expected: float | None
    took: float


def compare(words: Sequence[str], lengths: Sequence[int], rows: int | None = None, config: str | None = None
            ) -> tuple[Job, list[Compared]]:  # fmt: skip
    """Measure steps here, after predicting them: memory from the two shortest lengths, and without running them.

    Seconds are predicted by the formula on a GPU that it knows; elsewhere the two shortest lengths, as they were
    measured, are continued by the work that was counted.

    Raises:
        SeqlongError: fewer than three lengths, or a configuration that cannot be planned.
    """
    if len(lengths) < 3:
        raise SeqlongError("--check continues from two lengths to others: give three or more, such as 512,1024,4096")
    gpu = torch.cuda.is_available()
    planned = job(words, gpu, lengths[-1], rows, config)
    processors = torch.cuda.get_device_properties(0).multi_processor_count if gpu else 0
    found = Estimate([sketch(planned, length, processors) for length in lengths[:2]])
    measured = [_measure(planned, length, gpu) for length in lengths]
    slug = _slug() if gpu else ""
    compared = []
    for length, (peak, saved, seconds) in zip(lengths, measured, strict=True):
        if slug in MACHINES:
            expected: float | None = found.time(length, MACHINES[slug], Reached(), planned.batches).total
        else:
            expected = (
                None if length in lengths[:2] else _continued(found, lengths[:2], [m[2] for m in measured], length)
            )
        compared.append(
            Compared(length, found.memory(length).peak, peak, found.saved(length), saved, expected, seconds)
        )
    return planned, compared


def check(words: Sequence[str], lengths: Sequence[int] | None, rows: int | None, config: str | None, out: str | None
          ) -> int:  # fmt: skip
    """Print the comparison; write it as JSON if there is a place for it. Returns the exit status."""
    from rich.console import Console
    from rich.table import Table

    gpu = torch.cuda.is_available()
    planned, compared = compare(words, lengths or (GPU_LENGTHS if gpu else CPU_LENGTHS), rows, config)
    made = Table(box=None, pad_edge=False)
    made.add_column("tokens", justify="right")
    for title in ("peak, predicted", "measured", "off", "kept, predicted", "measured", "off", "step, predicted"):
        made.add_column(title, justify="right")
    made.add_column("measured", justify="right")
    made.add_column("off", justify="right")
    for row in compared:
        made.add_row(
            f"{row.length:,}", *_pair(row.predicted, row.measured, _mib),
            *_pair(row.saved_predicted, row.saved_measured, _mib), *_pair(row.expected, row.took, _ms),
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    where = torch.cuda.get_device_name() if gpu else "this CPU"
    console.print(
        f"{planned.name}, {planned.rows} rows, {planned.precision}, checkpointing {planned.checkpointing}, {where}"
    )
    console.print(made)
    source = "torch.cuda.max_memory_allocated" if gpu else "the allocations that torch's profiler sees"
    console.print(f"Peak is measured by {source}; kept is what they hold when the backward pass begins.", style="dim")
    if out is not None:
        text = json.dumps([asdict(row) for row in compared], indent=1)
        print(text) if out == "-" else Path(out).write_text(text + "\n")
    return 0


def _measure(job: Job, length: int, gpu: bool) -> tuple[float, float, float]:
    """Peak bytes, bytes kept for the backward pass, and seconds of a step: the best of three after two."""
    torch.manual_seed(0)
    device = torch.device("cuda" if gpu else "cpu")
    model = job.model(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=gpu or None)
    inputs, targets = (torch.randint(0, 8, (job.rows, length), device=device) for _ in range(2))
    batches = min(job.batches, 2)

    def step() -> None:
        for _ in range(batches):
            loss = loss_of(job, model, inputs, targets)
            with record_function(BACKWARD):
                pass
            if gpu:
                at_backward.append(float(torch.cuda.memory_allocated()))
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if gpu:
            torch.cuda.synchronize()

    at_backward: list[float] = []
    step()
    gc.collect()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
        step()
        peak, kept = float(torch.cuda.max_memory_allocated()), at_backward[-1] - before
    else:
        standing = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers(), inputs, targets))
        standing += sum(
            x.numel() * x.element_size()
            for state in optimizer.state.values()
            for x in state.values()
            if isinstance(x, Tensor)
        )
        highest, kept = _profiled(step)
        peak = standing + highest
    if batches > 1:
        kept = float("nan")  # gradients of the batch before are among it
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return peak, kept, min(seconds) * job.batches / batches


def _profiled(step: Callable[[], None]) -> tuple[float, float]:
    """The most bytes that a step takes beyond what there was, and what it holds when the last backward pass begins."""
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events: Any = profiled.profiler
    seen = sorted(
        (event.start_ns(), event.name(), event.nbytes())
        for event in events.kineto_results.events()
        if event.name() in ("[memory]", BACKWARD)
    )
    now = highest = kept = 0.0
    for _, name, size in seen:
        if name == BACKWARD:
            kept = now
        else:
            now += size
            highest = max(highest, now)
    return highest, kept


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stderr: some releases of torch's profiler write there that they start and stop."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _continued(found: Estimate, lengths: Sequence[int], seconds: Sequence[float], length: int) -> float:
    """Seconds at another length: as the counted work grows, from each of those that were measured; their mean."""

    def work(length: int) -> float:  # of a machine that does ten FLOPs a byte, as CPUs do
        return sum(found.flops(kind, length) + 10 * found.moved(kind, length) for kind in KINDS)

    return sum(s / work(known) for known, s in zip(lengths, seconds, strict=False)) / len(lengths) * work(length)


def _slug() -> str:
    from seqlong.bench import device_slug

    return device_slug()


def _pair(predicted: float | None, measured: float, show: Callable[[float], str]) -> tuple[str, str, str]:
    if predicted is None or measured != measured:
        return "-", "-" if measured != measured else show(measured), ""
    return show(predicted), show(measured), f"{100 * (predicted / measured - 1):+.1f} %"


def _mib(value: float) -> str:
    return f"{value / 2**20:,.1f} MiB"


def _ms(value: float) -> str:
    return f"{1e3 * value:,.0f} ms"
