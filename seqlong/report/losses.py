"""Where in a row the loss is: by position, by how long ago it was said, by how much of the row is seen."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from seqlong.report import text
from seqlong.report.plots import _COLOURS, _figure, _style, _svg
from seqlong.report.record import RunRecord
from seqlong.report.text import Html, div, tag

_TITLES = {
    "position": ("Bits by position", "tokens seen before", "It falls as long as the model uses what came before."),
    "distance": (
        "Bits of what repeats",
        "tokens since it last stood there",
        "Tokens that end a sequence which stood in the row before; dashed: all that do not.",
    ),
    "context": ("Bits by context", "tokens that the model is shown", "The same tokens each time, at the end of a row."),
}


@dataclass(frozen=True)
class Bin:
    """A line of losses.csv: the numbers ``low`` to ``high`` (None: no end), their positions and mean bits."""

    low: int
    high: int | None
    count: int
    bits: float


def losses_section(record: RunRecord) -> Html | None:
    """A chart a measure of the last evaluation; None where nothing was split."""
    found = read_losses(record)
    panels = []
    for measure, (title, unit, note) in _TITLES.items():
        parts = {part: bins for (part, name), bins in found.items() if name == measure and bins}
        if not parts:
            continue
        level = None
        if measure == "distance":
            new = [one for (_, name), bins in found.items() if name == "repeated" for one in bins if one.low == 0]
            level = new[-1].bits if new else None
        chart = curve(title, unit, parts, level)
        panels.append(tag("div", tag("h3", title, text.span("note", f"  {note}")), div("chart", chart)))
    if not panels:
        return None
    return tag("section", tag("h2", "Where the loss is"), div("grid", *panels), attributes={"id": "losses"})


def read_losses(record: RunRecord) -> dict[tuple[str, str], list[Bin]]:
    """Bins by (part, measure), of the last step that each was written for. Unreadable lines are left out."""
    path = record.folder / "losses.csv"
    steps: dict[tuple[str, str], int] = {}
    found: defaultdict[tuple[str, str], list[Bin]] = defaultdict(list)
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[1:-1] if path.is_file() else []
    for row in csv.reader(lines):
        try:
            step, part, measure, low, high, count, bits = row
            one = Bin(int(low), int(high) if high else None, int(count), float(bits))
            number = int(step)
        except ValueError:
            continue
        key = (part, measure)
        if steps.get(key) != number or (found[key] and found[key][-1].low >= one.low):
            steps[key], found[key] = number, []
        if math.isfinite(one.bits):
            found[key].append(one)
    return dict(found)


def curve(title: str, unit: str, parts: dict[str, list[Bin]], level: float | None = None) -> Html:
    """Bits against a number on a logarithmic axis: a line a part, with bands of few positions left out.

    Args:
        title: of the chart.
        unit: of its axis.
        parts: ``val`` and ``test``.
        level: bits of a dashed line.
    """
    with _style(title):
        figure, axes = _figure(4.6, 2.3, left=0.115, right=0.985, bottom=0.2, top=0.95)
        shown: list[float] = []
        for part, bins in parts.items():
            low = np.array([one.low for one in bins], float)
            high = np.array([one.low if one.high is None else one.high for one in bins], float)
            bits = [one.bits for one in bins]
            colour = _COLOURS["val" if part == "val" else "ink"]
            axes.plot(np.sqrt(np.maximum(low, 1) * np.maximum(high, 1)), bits, color=colour, linewidth=1.4, marker="o",
                      markersize=3)  # fmt: skip
            shown += bits
        if level is not None:
            axes.axhline(level, color=_COLOURS["floor"], linewidth=0.9, linestyle=(0, (5, 3)))
            shown.append(level)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        room = max(0.08 * (max(shown) - min(shown)), 0.01)
        axes.set_ylim(max(0.0, min(shown) - room), max(shown) + room)
        axes.set_xlabel(unit, labelpad=2)
        return _svg(figure, title)


def _short(value: float) -> str:
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if value >= size and value % size == 0:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
