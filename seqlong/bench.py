"""Benchmarks in one form: ``benchmarks/<what>.py`` makes rows, this writes, draws and prints them.

A benchmark script::

    \"\"\"One sentence: what is measured, against whom.\"\"\"
    from seqlong.bench import Row, main

    def rows():
        yield Row("Mamba2, 8,192 positions", "forward and backward", 1.2, "s", "transformers Mamba2Model", 4.1)

    if __name__ == "__main__":
        main("mamba2", rows())

Ours and the peer's value come from the same run. On a CPU the ratio is the message; absolute times count on a GPU only.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import seqlong
from seqlong import runs
from seqlong.errors import SeqlongError, nearest
from seqlong.kernels.tuning import gpu_slug
from seqlong.report.text import count

#: Where ``main`` writes and ``command`` looks; set to run the benchmarks of another clone.
FOLDER_VARIABLE = "SEQLONG_BENCHMARKS"
_MORE_IS_BETTER = {"FLOP/s", "accuracy", "auroc", "auprc", "mcc", "F1", "% of peak", "utilisation"}
_TIMES = {"s", "ms", "us", "µs", "ns", "min", "h"}
_SIZES = {"B", "KiB", "MiB", "GiB", "kB", "MB", "GB"}


@dataclass
class Row:
    """One measured number beside that of a peer.

    Attributes:
        name: what was measured, with its size, such as ``"Mamba2, 8,192 positions"``.
        metric: what of it, such as ``"forward and backward"`` or ``"peak memory"``.
        value: ours.
        unit: ``s``, ``ms``, ``MiB``, ``windows/s``, ... A unit per second, or an accuracy, is better when higher;
            every other one when lower.
        peer: whom we compare with, a distribution's name first (``"transformers Mamba2Model"``), which records its
            version; None where there is nobody.
        peer_value: theirs, from the same run, in the same unit; None if it could not run.
    """

    name: str
    metric: str
    value: float | int
    unit: str
    peer: str | None = None
    peer_value: float | int | None = None

    @property
    def ratio(self) -> float | None:
        """How many times better ours is (below 1: worse); None without a peer's value."""
        if self.peer_value is None or not self.value or not self.peer_value:
            return None
        return self.value / self.peer_value if more_is_better(self.unit) else self.peer_value / self.value


def more_is_better(unit: str) -> bool:
    """Whether a higher value of ``unit`` is the better one."""
    return unit.endswith("/s") or unit in _MORE_IS_BETTER


def verdict(row: Row) -> str:
    """``3.4x faster``, ``2.0x less``, ``1.1x slower``, or a dash without a peer."""
    ratio = row.ratio
    if ratio is None:
        return "–"
    if row.unit in _TIMES or row.unit.endswith("/s"):
        words = ("faster", "slower")
    elif row.unit in _SIZES:
        words = ("less", "more")
    else:
        words = ("better", "worse")
    times = ratio if ratio >= 1 else 1 / ratio
    if times < 1.005:
        return "equal"
    return f"{times:.2f}x {words[ratio < 1]}" if times < 9.95 else f"{times:.0f}x {words[ratio < 1]}"


def main(
    what: str,
    rows: Iterable[Row],
    draw: Callable[[list[Row], Figure], None] | None = None,
    *,
    on: Literal["auto", "cpu"] = "auto",
    script: str | None = None,
) -> Path:
    """Run a benchmark: take its rows, add where they come from, write JSON and PNG, print a table.

    Args:
        what: the name of the result.
        rows: measured lazily if it is a generator; each is named as it comes.
        draw: draws the rows into an empty figure; None draws bars against the peer.
        on: ``cpu`` for a benchmark that never uses the GPU of its machine.
        script: name of the script, without ``.py``, where the result has another.

    Returns:
        The path of ``results/<what>-<device>.json``, a list of rows.

    Raises:
        SeqlongError: a row has a value that is not finite, or there was no row.
    """
    console = _console()
    done: list[Row] = []
    for row in rows:
        for value in (row.value, row.peer_value):
            if value is not None and not math.isfinite(value):
                raise SeqlongError(
                    f"{what}: {row.name}, {row.metric} measured {value} {row.unit}; expected a finite number. "
                    "Leave a row out, or its peer_value None, if it could not run"
                )
        done.append(row)
        console.print(f"[dim]{escape(row.name)}, {escape(row.metric)}: {format_value(row.value)} {row.unit}[/dim]")
    if not done:
        raise SeqlongError(f"{what} gave no rows; expected at least one")
    device = device_slug(on)
    revision = runs.commit()
    common = {
        "command": shlex.join(["seqlong", "bench", script or what, *sys.argv[1:]]),
        "commit": f"{revision['commit']}{'-dirty' if revision['dirty'] else ''}" if revision["commit"] else None,
        "device": device,
        "versions": versions(row.peer for row in done),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    results = benchmarks_folder() / "results"
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{what}-{device}.json"
    runs.write_json(path, [{**asdict(row), **common} for row in done])
    figure = Figure(layout="constrained", dpi=160)
    if draw is None:
        draw_bars(done, figure, title=what.replace("_", " "), device=device)
    else:
        draw(done, figure)
    FigureCanvasAgg(figure).print_png(str(path.with_suffix(".png")))
    console.print(table(json.loads(path.read_text())))
    console.print(f"{path}\n{path.with_suffix('.png')}", highlight=False, soft_wrap=True)
    return path


def command(arguments: Sequence[str]) -> int:
    """``seqlong bench``: list the benchmarks and their last results, or run one and print its table.

    Args:
        arguments: what stands after ``seqlong bench`` on the command line; after the name, they go to the benchmark.

    Returns:
        The exit status.

    Raises:
        SeqlongError: there is no benchmarks folder, or no benchmark of that name.
    """
    parser = argparse.ArgumentParser(
        prog="seqlong bench", description="List the benchmarks and their last results, or run one and print its table."
    )
    parser.add_argument("what", nargs="?", help="the benchmark to run; leave it out for a list")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="arguments for the benchmark itself")
    given = parser.parse_args(list(arguments))
    folder = benchmarks_folder()
    scripts = find(folder)
    if given.what is None:
        _console().print(overview(folder, scripts))
        return 0
    name = given.what.removesuffix(".py")
    if name not in scripts:
        known = ", ".join(scripts) or "none yet"
        raise SeqlongError(f"no benchmark is named {name!r}{nearest(name, scripts) or f'; there are: {known}'}")
    # A child of its own: what one benchmark imports or allocates must not weigh on the next.
    environment = {**os.environ, FOLDER_VARIABLE: str(folder)}
    return subprocess.run([sys.executable, str(scripts[name]), *given.rest], env=environment, check=False).returncode


def _console() -> Console:
    """A pipe or a log has no width of its own; give it room for a table."""
    return Console(width=None if sys.stdout.isatty() else 120)


def benchmarks_folder() -> Path:
    """The repository's ``benchmarks`` folder.

    Raises:
        SeqlongError: this is an installation without the repository.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    clone = Path(seqlong.__file__).resolve().parents[1] / "benchmarks"
    for folder in [Path(named)] if named else [clone, Path.cwd() / "benchmarks"]:
        if folder.is_dir():
            return folder
    looked = named or f"neither {clone} nor ./benchmarks"
    raise SeqlongError(
        f"found no benchmarks folder ({looked}). The benchmarks are part of the "
        "repository, not of the installed package: clone it, and run `seqlong bench` inside the clone"
    )


def find(folder: Path) -> dict[str, Path]:
    """The benchmarks of a folder by name: every script that does not start with an underscore."""
    return {path.stem: path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}


def overview(folder: Path, scripts: dict[str, Path]) -> Table:
    """Names, what they measure, and their last results."""
    listing = Table(title="Benchmarks", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for heading in ("Name", "What it measures", "Last results"):
        listing.add_column(heading)
    for name, path in scripts.items():
        results = sorted((folder / "results").glob(f"{name}-*.json"))
        said = [line for result in results if (line := _last_result(name, result))]
        listing.add_row(
            f"[bold]{escape(name)}[/bold]", escape(_docstring(path)), "\n".join(said) or "[dim]never run[/dim]"
        )
    if not scripts:
        listing.add_row("[dim]none yet[/dim]", f"[dim]put a script into {escape(str(folder))}[/dim]", "")
    listing.caption = "Run one: seqlong bench NAME"
    listing.caption_justify = "left"
    return listing


def _docstring(path: Path) -> str:
    try:
        found = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    except SyntaxError as error:
        return f"does not parse (line {error.lineno})"
    return found.strip().splitlines()[0] if found else "no docstring"


def _last_result(name: str, path: Path) -> str:
    try:
        rows = json.loads(path.read_text())
        device, date = rows[0]["device"], rows[0]["date"][:10]
        best = [_row(row) for row in rows if _row(row).ratio is not None]
    except (json.JSONDecodeError, LookupError, TypeError):
        return f"[red]{escape(path.name)} cannot be read[/red]"
    if path.stem != f"{name}-{device}":  # a longer name that begins with this one
        return ""
    summary = f"; {escape(best[0].name)}: [bold]{verdict(best[0])}[/bold]" if best else ""
    return f"{device}, {date}: {len(rows)} row{'' if len(rows) == 1 else 's'}{summary}"


def _row(saved: dict[str, Any]) -> Row:
    return Row(**{key: saved[key] for key in ("name", "metric", "value", "unit", "peer", "peer_value")})


def table(saved: list[dict[str, Any]]) -> Table:
    """The rows of a result file. On a CPU the ratio comes first, and absolute values stand back."""
    device = saved[0]["device"]
    cpu = device.startswith("cpu")
    shown = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    shown.title, shown.title_justify = f"{device}, {saved[0]['date'][:10]}", "left"
    shown.add_column("", overflow="fold")
    values = [("Ours", "right"), ("Peer's", "right")]
    order = [("Against the peer", "left"), *values] if cpu else [*values, ("Against the peer", "left")]
    for heading, side in order:
        shown.add_column(heading, justify="right" if side == "right" else "left", no_wrap=True)
    groups: dict[tuple[str, str | None], list[Row]] = {}
    for row in map(_row, saved):
        groups.setdefault((row.metric, row.peer), []).append(row)
    for place, ((metric, peer), rows) in enumerate(groups.items()):
        against = f" [dim]against {escape(peer)}[/dim]" if peer else ""
        shown.add_row(f"{chr(10) if place else ''}[bold]{escape(metric)}[/bold]{against}")
        for row in rows:
            ratio = row.ratio
            colour = "dim" if ratio is None else "green" if ratio >= 1.005 else "yellow" if ratio < 0.995 else "default"
            numbers = [f"{format_value(row.value)} {row.unit}", ""]
            if row.peer_value is not None:
                numbers[1] = f"{format_value(row.peer_value)} {row.unit}"
            if cpu and ratio is not None:
                numbers = [f"[dim]{escape(number)}[/dim]" for number in numbers]
            said = f"[bold {colour}]{verdict(row)}[/]"
            shown.add_row(f"  {escape(row.name)}", *([said, *numbers] if cpu else [*numbers, said]))
    if cpu:
        shown.caption = (
            "On a CPU the ratio is the message: both were measured in the same run. Times are this machine's."
        )
        shown.caption_justify = "left"
    return shown


def format_value(value: float | int) -> str:
    """Three or four digits: ``0.00123``, ``1.234``, ``123.4``, ``1,234``, ``123 k``."""
    if value == 0 or abs(value) >= 1e5:
        return count(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"


def device_slug(on: Literal["auto", "cpu"] = "auto") -> str:
    """A short name of the machine for a file name: ``cpu-2core``, ``h100``, ``rtx-4090``."""
    import torch

    if on == "auto" and torch.cuda.is_available():
        return gpu_slug(torch.cuda.get_device_name())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"cpu-{cores}core"


def versions(peers: Iterable[str | None]) -> dict[str, str]:
    """Versions of python, seqlong, torch, triton and of every distribution that a peer's name begins with or names."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), "seqlong": seqlong.__version__}
    named = {word for peer in peers if peer for word in re.findall(r"[A-Za-z][\w.-]*", peer)}
    for package in ["torch", "triton", *sorted(named)]:
        try:
            found.setdefault(package, version(package))
        except PackageNotFoundError:
            continue
    return found


def draw_bars(rows: list[Row], figure: Figure, title: str = "", device: str = "") -> None:
    """Horizontal bars, ours and the peer's, one panel for each metric and unit, each pair with its ratio.

    On a CPU a row's bars are drawn in units of the peer's value, so that rows of any size compare; on a GPU they are
    drawn as measured.
    """
    ours, theirs, ink, muted = "#1767b3", "#c9ced4", "#14191f", "#5d6772"
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        panels.setdefault((row.metric, row.unit), []).append(row)
    figure.set_size_inches(9, 1.1 + sum(0.75 + 0.62 * len(group) for group in panels.values()))
    figure.set_facecolor("white")
    heights = [0.75 + 0.62 * len(group) for group in panels.values()]
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (metric, unit), axis in zip(panels, axes, strict=True):
        group = panels[metric, unit]
        relative = device.startswith("cpu") and all(row.ratio is not None for row in group)
        longest = 0.0
        for place, row in enumerate(group):
            scale = 1 / row.peer_value if relative and row.peer_value else 1.0
            lone = row.peer_value is None
            bars = [(row.value, 0.0 if lone else -0.19, ours, f"{format_value(row.value)} {unit}")]
            if row.peer_value is not None:
                bars.append((row.peer_value, 0.19, theirs, f"{row.peer}: {format_value(row.peer_value)} {unit}"))
            for index, (value, shift, colour, label) in enumerate(bars):
                axis.barh(place + shift, value * scale, height=0.34, color=colour)
                longest = max(longest, value * scale)
                said = axis.annotate(label, (value * scale, place + shift), xytext=(5, 0), textcoords="offset points",
                                     va="center", fontsize=8, color=muted if relative or index else ink)  # fmt: skip
                if index == 0 and row.ratio is not None:
                    colour = "#17733c" if row.ratio >= 1.005 else "#8a5a00" if row.ratio < 0.995 else ink
                    axis.annotate(f"  {verdict(row)}", (1, 0.5), xycoords=said, va="center", fontsize=9,
                                  fontweight="bold", color=colour)  # fmt: skip
        axis.set_yticks(range(len(group)), [row.name for row in group], fontsize=9, color=ink)
        axis.set_ylim(len(group) - 0.45, -0.55)
        axis.set_xlim(0, longest * 1.5)
        better = "more is better" if more_is_better(unit) else "less is better"
        axis.set_title(f"{metric} ({unit}; {better})", fontsize=9.5, loc="left", color=ink)
        axis.set_xlabel("peer = 1" if relative else unit, fontsize=8, color=muted)
        axis.tick_params(length=0, labelcolor=muted, labelsize=8)
        axis.tick_params(axis="y", labelcolor=ink, labelsize=9)
        axis.grid(axis="x", color="#e4e7ea", linewidth=0.7)
        axis.set_axisbelow(True)
        for side in ("top", "right", "bottom", "left"):
            axis.spines[side].set_visible(False)
    figure.suptitle(
        f"{title}, {device}" if device else title, fontsize=12, fontweight="bold", x=0.01, ha="left", color=ink
    )
