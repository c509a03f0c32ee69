"""Charts as inline SVG: matplotlib draws in placeholder colours that become CSS variables, for light and dark pages."""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, MaxNLocator

from seqlong.report import text
from seqlong.report.record import Series
from seqlong.report.text import Html

# matplotlib writes these exact colours; nothing else in a chart uses them, so a textual swap is safe.
_COLOURS = {
    "ink": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "train": "#040404",
    "val": "#050505",
    "floor": "#060606",
    "bad": "#070707",
    "paper": "#080808",
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.edgecolor": _COLOURS["grid"],
    "axes.labelcolor": _COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _COLOURS["grid"],
    "grid.linewidth": 0.6,
    "text.color": _COLOURS["ink"],
    "xtick.color": _COLOURS["grid"],
    "ytick.color": _COLOURS["grid"],
    "xtick.labelcolor": _COLOURS["muted"],
    "ytick.labelcolor": _COLOURS["muted"],
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}
_POINTS = 1200  # of a drawn line; more cannot be told apart at the width of a page


@dataclass(frozen=True)
class Floor:
    """A horizontal line to beat, in bits."""

    label: str
    bits: float


def loss_chart(
    train: Series,
    validation: Series,
    test: Series,
    floors: list[Floor],
    stages: list[tuple[int, int]],
    unit: str = "base",
) -> Html | None:
    """Loss in bits over the optimizer steps, beside the floors; None when nothing was logged.

    Args:
        train: bits of each logged training step, drawn faint, with a running mean over it.
        validation: bits of each validation, drawn as dots, the best ringed.
        test: bits of the test set; the last is drawn as a square.
        floors: lines to beat.
        stages: ``(first step, length in positions)`` of each length stage; drawn if there are several.
        unit: what bits are counted by.
    """
    if not len(train) and not len(validation) and not len(test):
        return None
    with _style("loss"):
        figure, axes = _figure(9.6, 3.9, left=0.055, right=0.828, bottom=0.115, top=0.93)
        labels: list[tuple[float, str, str]] = []
        bottom, top = _loss_limits(train, validation, test, floors)
        for floor in floors:
            axes.axhline(floor.bits, color=_COLOURS["floor"], linewidth=0.9, linestyle=(0, (5, 3)))
            labels.append((floor.bits, f"{text.bits(floor.bits)} {floor.label}", "floor"))
        if len(train):
            steps, values = np.array(train.step, float), np.array(train.value, float)
            few = len(train) <= 30
            axes.plot(*thin(steps, values), color=_COLOURS["train"], alpha=0.35 if not few else 1, linewidth=0.7,
                      marker="o" if few else None, markersize=3.5)  # fmt: skip
            smooth = values if few else running_mean(values)
            axes.plot(*thin(steps, smooth), color=_COLOURS["train"], linewidth=1.7)
            finite = smooth[np.isfinite(smooth)]
            if len(finite):
                labels.append((float(finite[-1]), f"{text.bits(float(finite[-1]))} training", "train"))
        if len(validation):
            axes.plot(validation.step, validation.value, color=_COLOURS["val"], linewidth=0.9, alpha=0.6)
            axes.plot(validation.step, validation.value, "o", color=_COLOURS["val"], markersize=5.2,
                      markeredgecolor=_COLOURS["paper"], markeredgewidth=0.9)  # fmt: skip
            best, last = validation.best(), validation.last
            if best and last is not None:
                axes.plot([best[0]], [best[1]], "o", markersize=9.5, markerfacecolor="none",
                          markeredgecolor=_COLOURS["val"], markeredgewidth=1.1)  # fmt: skip
                labels.append((last, f"{text.bits(last)} validation", "val"))
        if test.last is not None:
            axes.plot(test.step[-1:], [test.last], "s", color=_COLOURS["ink"], markersize=5)
            labels.append((test.last, f"{text.bits(test.last)} test", "ink"))
        axes.set_ylim(bottom, top)
        _x_axis(axes, [train, validation, test])
        if len(stages) > 1:
            for start, length in stages:
                axes.axvline(start, color=_COLOURS["muted"], linewidth=0.6, linestyle=(0, (1, 2)))
                axes.text(start, 1.01, f" {length:,}", transform=axes.get_xaxis_transform(), fontsize=7.5,
                          color=_COLOURS["muted"], va="bottom")  # fmt: skip
        axes.set_ylabel(f"bits per {unit}")
        _end_labels(axes, labels)
        return _svg(figure, "Loss in bits over the training steps")


def line_chart(
    name: str,
    series: Series,
    *,
    smooth: bool = False,
    log: bool = False,
    steps_like: bool = False,
    marks: list[int] | None = None,
    scale: float = 1.0,
) -> Html | None:
    """A small chart of one metric over the optimizer steps; None when it was never logged.

    Args:
        name: what it is, for the reader of a screen.
        series: the metric.
        smooth: draw the values faint with a running mean over them.
        log: a logarithmic axis, if the values span more than a factor of 30.
        steps_like: draw as stairs, for values that hold until they change.
        marks: steps to mark at the foot, such as skipped ones.
        scale: multiplies the values.
    """
    values = np.array(series.value, float) * scale
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    with _style(name):
        figure, axes = _figure(4.6, 1.75, left=0.115, right=0.985, bottom=0.2, top=0.95)
        steps = np.array(series.step, float)
        positive = finite[finite > 0]
        logarithmic = log and len(positive) == len(finite) and positive.max() > 30 * positive.min()
        marker = "o" if len(values) <= 30 and not steps_like else None
        style = "steps-post" if steps_like else "default"
        faint = smooth and len(values) > 30
        axes.plot(*thin(steps, values), color=_COLOURS["train"], linewidth=0.7 if faint else 1.5, markersize=3,
                  alpha=0.35 if faint else 1, marker=marker, drawstyle=style)  # fmt: skip
        if faint:
            axes.plot(*thin(steps, running_mean(values)), color=_COLOURS["train"], linewidth=1.5)
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
            axes.yaxis.set_major_formatter(_PlainLog())
        else:
            low, high = float(finite.min()), float(finite.max())
            if smooth and len(finite) > 30:  # a single spike must not flatten the rest
                high = min(high, 3 * float(np.percentile(finite, 98)))
            axes.set_ylim(0 if low >= 0 else low * 1.05, high * 1.12 if high > 0 else 1)
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        if marks:
            axes.plot(marks, np.full(len(marks), 0.0), "|", color=_COLOURS["bad"], markersize=9, markeredgewidth=1.3,
                      transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip
        _x_axis(axes, [series])
        return _svg(figure, name)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean under a bell of about a fiftieth of the run to either side, blind to non-finite values."""
    sigma = max(1.0, len(values) / 50)
    reach = min(int(3 * sigma), (len(values) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    good = np.isfinite(values)
    total = np.convolve(np.where(good, values, 0.0), kernel, mode="same")
    weight = np.convolve(good.astype(float), kernel, mode="same")
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 1e-6)


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most ``_POINTS`` of the points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(values) <= _POINTS or not np.isfinite(values).any():
        return steps, values
    keep = [0, len(values) - 1]
    middle = np.mean(values[np.isfinite(values)])
    for part in np.array_split(np.arange(len(values)), _POINTS // 2 - 1):
        filled = np.where(np.isfinite(values[part]), values[part], middle)
        keep += [int(part[filled.argmin()]), int(part[filled.argmax()])]
    chosen = np.unique(keep)
    return steps[chosen], values[chosen]


def _style(salt: str) -> AbstractContextManager[None]:
    """The look of every chart; ``salt`` keeps the ids of two charts on one page apart, and the same from day to day."""
    settings: Any = {**_STYLE, "svg.hashsalt": salt}
    return matplotlib.rc_context(settings)


def _loss_limits(train: Series, validation: Series, test: Series, floors: list[Floor]) -> tuple[float, float]:
    """Limits that show the floors and the later course; the first steps of a run may rise above the frame."""
    values = np.array(train.value, float)
    values = values[np.isfinite(values)]
    shown = [value for value in test.value if np.isfinite(value)]
    evaluated = [value for value in validation.value if np.isfinite(value)]
    shown += [*evaluated[len(evaluated) // 4 :], *sorted(evaluated)[:1]]
    shown += [floor.bits for floor in floors]
    if len(values) > 30:
        settled = values[len(values) // 4 :]  # the fall from the first steps would press all the rest together
        shown += [float(np.percentile(settled, 0.5)), float(np.percentile(settled, 99.5))]
    else:
        shown += values.tolist()
    low, high = (min(shown), max(shown)) if shown else (0.0, 2.0)
    pad = max(0.06 * (high - low), 0.005)
    return max(low - pad, 0.0), high + pad


def _figure(width: float, height: float, *, left: float, right: float, bottom: float, top: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height))
    figure.patch.set_alpha(0)
    axes = figure.add_axes((left, bottom, right - left, top - bottom))
    axes.patch.set_alpha(0)
    return figure, axes


def _x_axis(axes: Any, shown: list[Series]) -> None:
    """Optimizer steps, labelled at few round values, the first and last steps inside the frame."""
    steps = [step for series in shown for step in series.step]
    low, high = min(steps), max(steps)
    room = max(0.01 * (high - low), 0.15 if high - low < 20 else 0.5)
    axes.set_xlim(low - room, high + room)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.set_xlabel("optimizer steps", labelpad=2)


def _end_labels(axes: Any, labels: list[tuple[float, str, str]]) -> None:
    """Name each line at its right end, moved apart where they would overlap; a thin leader tells which is which."""
    bottom, top = axes.get_ylim()
    apart = (top - bottom) * 0.062
    placed: list[list[Any]] = [[min(max(y, bottom), top), y, label, key] for y, label, key in sorted(labels)]
    for _ in range(60):  # relax: push neighbours apart until all are; a handful of labels settle in a few rounds
        moved = False
        for below, above in pairwise(placed):
            gap = above[0] - below[0]
            if gap < apart * 0.999:
                shift = (apart - gap) / 2
                below[0] -= shift
                above[0] += shift
                moved = True
        for entry in placed:
            entry[0] = min(max(entry[0], bottom), top)
        if not moved:
            break
    to_axes = axes.get_yaxis_transform()
    for y, value, label, key in placed:
        axes.plot([1.0, 1.012, 1.02], [min(max(value, bottom), top), y, y], transform=to_axes, clip_on=False,
                  color=_COLOURS[key], linewidth=0.7)  # fmt: skip
        axes.text(1.026, y, label, transform=to_axes, va="center", color=_COLOURS[key],
                  fontweight="bold" if key == "val" else "normal")  # fmt: skip


def _tick(value: float, position: int | None = None) -> str:
    """``0``, ``0.0005``, ``2,500`` or ``12.5 k``."""
    if abs(value) >= 9_999.5:
        return text.count(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


class _PlainLog(LogFormatterSciNotation):
    """Powers of ten as 0.01, 1, 100, not as mathematics."""

    def __call__(self, x: float, pos: Any = None) -> str:
        return f"{x:g}" if 1e-4 <= x < 1e4 else f"{x:.0e}".replace("e+0", "e").replace("e-0", "e-")


def _svg(figure: Figure, title: str) -> Html:
    """The figure as an ``svg`` element that fills its column and takes its colours from the page."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r"<!--.*?-->", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawing, count=1)
    drawing = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", drawing, count=1)
    drawing = re.sub(r' id="(?:figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis)_\d+"', "", drawing)
    drawing = re.sub(r"(font: [^;\"']*?\d+(?:\.\d+)?px) [^;\"]*", r"\1 var(--sans)", drawing)
    for name, colour in _COLOURS.items():
        drawing = drawing.replace(colour, f"var(--{name})")
    drawing = re.sub(r"\n\s*", "\n", drawing).strip()
    return Html(drawing.replace("<svg", f'<svg role="img" aria-label="{text.escape(title)}"', 1))
