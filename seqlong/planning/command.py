"""``seqlong plan``: whether it fits, how long a step takes, and what more GPUs bring, before there is one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from seqlong.errors import SeqlongError
from seqlong.planning.machines import MACHINES, REACHED_FROM, Reached, machine

if TYPE_CHECKING:
    from seqlong.planning.cluster import Cluster, Row
    from seqlong.planning.estimate import Estimate
    from seqlong.planning.step import Job

HELP = """Predicts a training step: memory at its fullest moment by parts, seconds, the longest row that fits; with
--gpus, what more GPUs bring. No GPU is needed: the step runs on tensors without contents, and what it would allocate is
counted; time is operations and bytes by a GPU's published rates and the shares of them that were measured.

  --check   measure steps on this machine, and print predicted against measured"""
EXAMPLES = """examples:
  seqlong plan experiment=dna/pretrain --gpu h100
  seqlong plan model=hybridna_300m model.backbone.checkpointing=tiled --length 1048576 --gpu h100
  seqlong plan model=hybridna_300m --length 524288 --gpus 1,2,4,8,16,64,256,1024 --sp 8 --out scaling.png
  seqlong plan experiment=dna/demo --check"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SeqlongError(f"seqlong plan: {message}; `seqlong plan --help` lists what it takes")


def command(arguments: Sequence[str]) -> int:
    """``seqlong plan``; returns the exit status.

    Raises:
        SeqlongError: a mistake in the arguments or in the configuration.
    """
    given = _parser().parse_intermixed_args(list(arguments))
    from seqlong.planning.step import job

    if given.check:
        from seqlong.planning.check import check

        return check(given.overrides, given.lengths, given.rows, given.config, given.json)
    kind, reached = machine(given.gpu), Reached()
    planned = job(given.overrides, True, given.length, given.rows, given.config)
    from seqlong.planning.cluster import Cluster, table
    from seqlong.planning.estimate import estimate

    shortest = planned.length // given.sp if given.gpus or given.sp > 1 else planned.length
    counted = estimate(planned, kind.processors, shortest)
    cluster = Cluster(planned, counted, kind, reached, given.sharing, given.sp, given.ep)
    rows = table(cluster, given.gpus or ([given.sp] if given.sp > 1 else []))
    if given.json:
        _write_json(given.json, planned, counted, rows, kind.name, cluster)
    if given.out:
        from seqlong.planning.picture import draw

        draw(given.out, planned, rows, kind)
    if given.json != "-":
        _print(planned, counted, rows, cluster)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="seqlong plan", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="experiment=NAME or model=NAME, and settings")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(MACHINES)}; h100 if left out")
    parser.add_argument("--length", type=_whole, help="tokens of a row; the data's if left out")
    parser.add_argument("--rows", type=_whole, help="rows of a batch; the data's if left out")
    parser.add_argument("--gpus", type=_numbers, help="numbers of GPUs for a table, such as 1,2,4,8,64,1024")
    parser.add_argument("--sp", type=_whole, default=1, metavar="D", help="GPUs that share a row")
    parser.add_argument("--ep", type=_whole, default=1, metavar="E", help="GPUs that share experts")
    parser.add_argument("--sharing", choices=("ddp", "fsdp"), default="ddp", help="all weights a GPU, or parts (FSDP2)")
    parser.add_argument("--config", metavar="FILE", help="a resolved configuration, such as a run's config.yaml")
    parser.add_argument("--out", metavar="PNG", help="draw the table")
    parser.add_argument("--json", metavar="PATH", help="write everything as JSON; - for the terminal, alone")
    parser.add_argument("--check", action="store_true", help="measure here, print predicted against measured")
    parser.add_argument("--lengths", type=_numbers, help="for --check: tokens of a row, from short to long")
    return parser


def _whole(text: str) -> int:
    """A whole number above zero; 131_072 and 131,072 too."""
    try:
        value = int(text.replace("_", "").replace(",", ""))
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found '{text}'")
    return value


def _numbers(text: str) -> list[int]:
    found = [_whole(word) for word in text.split(",")]
    if found != sorted(set(found)):
        raise argparse.ArgumentTypeError(f"expected rising numbers with commas between, found '{text}'")
    return found


def _print(job: Job, counted: Estimate, rows: list[Row], cluster: Cluster) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from seqlong.planning.estimate import GIB, room

    kind, reached = cluster.machine, cluster.reached
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    kept = f"checkpointing {job.checkpointing}" + (f", tiles of {job.tile:,}" if job.tile else "")
    console.print(
        escape(
            f"{job.name}: {counted.long.parameters:,} parameters, {job.rows} x {job.length:,} tokens a batch, "
            f"{job.batches} a step, {job.precision}, {kept}"
        ),
        soft_wrap=True,
    )
    memory, time = counted.memory(job.length), counted.time(job.length, kind, reached, job.batches)
    space = room(kind, reached)
    console.print(f"\nOne {kind.name}, at the fullest moment of a step ({memory.part}):")
    parts = Table(box=None, pad_edge=False, show_header=False)
    parts.add_column()
    parts.add_column(justify="right")
    for name, value in asdict(memory).items():
        if name != "part":
            parts.add_row(f"  {_PARTS[name]}", f"{value / GIB:.2f} GiB")
    parts.add_row("[bold]  in all[/bold]", f"[bold]{memory.peak / GIB:.2f} GiB[/bold]")
    console.print(parts)
    fits = "fits" if memory.peak <= space else "[bold red]does not fit[/bold red]"
    console.print(
        f"It {fits} into the {space / GIB:.1f} GiB that {kind.memory:g} leave (libraries {reached.context:g} GiB, "
        f"{100 * reached.memory:.0f} % in pieces); longest row that does: {counted.longest(space):,} tokens"
    )
    tokens = job.rows * job.length * job.batches
    console.print(
        f"\nA step: {_seconds(time.total)}, {tokens / time.total:,.0f} tokens/s: products {_seconds(time.products)}, "
        f"attention {_seconds(time.attention)}, kernels {_seconds(time.kernels)}, other {_seconds(time.other)}"
        + ("" if time.device >= time.host else "; the host is what it waits for")
    )
    lengths = (counted.short.length, counted.long.length)
    way = "counted" if job.length in lengths else f"continued from {lengths[0]:,} and {lengths[1]:,} tokens"
    console.print(f"Memory is {way}.", style="dim")
    for op, why in counted.long.opaque.items():
        console.print(escape(f"Inside {op} nothing was counted: {why}"), style="dim")
    if rows:
        console.print()
        console.print(_scaling(rows, cluster))
    from seqlong.planning.cluster import ASSUMPTIONS

    lines = [
        f"{kind.name}: {kind.flops / 1e12:.0f} TFLOP/s bfloat16, {kind.bandwidth / 1e12:.2f} TB/s, {kind.memory:g} GiB "
        f"({kind.source})",
        f"reached: {reached.products:.0%} of FLOPs in products ({REACHED_FROM['products']}), {reached.attention:.0%} "
        f"in attention ({REACHED_FROM['attention']}), {reached.kernels:.0%} of bandwidth in kernels "
        f"({REACHED_FROM['kernels']}), {reached.other:.0%} in the rest ({REACHED_FROM['other']})",
    ]
    if rows:
        lines.append(
            f"links: {kind.link / 1e9:.0f} GB/s one way among {kind.peers} GPUs of a server, "
            f"{kind.network / 1e9:.1f} GB/s of each GPU to others, {reached.link:.0%} of both ({REACHED_FROM['link']})"
        )
        lines += list(ASSUMPTIONS)
        if cluster.whole:
            lines.append(f"computed whole by every GPU of a row: {', '.join(sorted(set(cluster.whole)))}")
    console.print("\nAssumed:")
    for line in lines:
        console.print(escape(f"  {line}"), style="dim", soft_wrap=True)


_PARTS = {
    "weights": "weights",
    "moments": "moments of the optimiser",
    "gradients": "gradients so far",
    "kept": "kept for the backward pass",
    "working": "working memory of that part",
}


def _scaling(rows: list[Row], cluster: Cluster) -> Any:
    from rich.table import Table

    from seqlong.planning.estimate import GIB

    made = Table(box=None, pad_edge=False)
    for title in ("GPUs", "servers", "rows at once", "tokens a step", "step", "tokens/s", "efficiency", "GiB a GPU"):
        made.add_column(title, justify="right", no_wrap=True)
    made.add_column("bound by")
    made.add_column("waits for", overflow="fold")
    for row in rows:
        waits = ", ".join(f"{name} {_seconds(value)}" for name, value in row.waits.items())
        made.add_row(
            f"{row.gpus:,}", f"{row.servers:,}", f"{row.rows * cluster.job.rows:,}", f"{row.tokens:,}",
            _seconds(row.seconds), f"{row.speed:,.0f}", f"{100 * row.efficiency:.1f} %",
            f"{row.memory.peak / GIB:.1f}", row.bound, waits,
        )  # fmt: skip
    return made


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} us"


def _write_json(path: str, job: Job, counted: Estimate, rows: list[Row], gpu: str, cluster: Cluster) -> None:
    from seqlong.planning.estimate import room

    memory = counted.memory(job.length)
    time = counted.time(job.length, cluster.machine, cluster.reached, job.batches)
    content = {
        "name": job.name,
        "gpu": gpu,
        "length": job.length,
        "rows": job.rows,
        "batches": job.batches,
        "checkpointing": job.checkpointing,
        "parameters": counted.long.parameters,
        "memory": {**asdict(memory), "peak": memory.peak},
        "seconds": {**asdict(time), "total": time.total},
        "tokens_per_s": job.rows * job.length * job.batches / time.total,
        "longest": counted.longest(room(cluster.machine, cluster.reached)),
        "scaling": [
            {
                **asdict(row),
                "seconds": row.seconds,
                "tokens_per_s": row.speed,
                "efficiency": row.efficiency,
                "bound": row.bound,
                "peak": row.memory.peak,
            }
            for row in rows
        ],
    }
    text = json.dumps(content, indent=1)
    if path == "-":
        print(text)
        return
    try:
        Path(path).write_text(text + "\n")
    except OSError as error:
        raise SeqlongError(f"--json {path}: {error.strerror}") from error
