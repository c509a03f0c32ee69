"""The picture of a recall evaluation: heat maps by depth, distance and items over the length; intervals and chance."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from seqlong.callbacks.recall_tally import DEPTHS, Tally, wilson

_PARTS = {"val": "validation", "test": "test"}
_INK, _MUTED, _BLUE = "#14191f", "#5d6772", "#1767b3"


def picture(tallies: Sequence[Tally], summary: dict[str, Any], path: Path) -> None:
    """Write the picture as PNG.

    Args:
        tallies: of the whole evaluation.
        summary: what recall.json holds.
        path: of the picture, replaced as a whole.
    """
    lengths = sorted({tally.length for tally in tallies})
    generator = summary.get("generator") or {}
    maps: list[tuple[str, list[tuple[int, str]], Callable[[Tally], int]]] = []
    told = [tally for tally in tallies if tally.depth >= 0]
    if told:
        depths = [(depth, f"{100 * depth // DEPTHS} %") for depth in range(DEPTHS)]
        maps.append(("told at this depth before the question", depths, lambda tally: tally.depth))
        distances = sorted({tally.distance for tally in told})
        maps.append(("told so many tokens ago", [(d, f"{d:,}+") for d in distances], lambda tally: tally.distance))
    items = sorted({tally.items for tally in tallies})
    grid = {(tally.length, tally.items) for tally in tallies}
    if len(items) > 1 and len(grid) > len(lengths):
        counted = str(generator.get("counted", "items"))
        maps.append((counted, [(number, f"{number:,}") for number in items], lambda tally: tally.items))
    widths = [1.6 + 0.62 * len(lengths) for _ in maps] + [max(3.4, 1.2 + 0.9 * len(lengths))]
    tallest = max([len(rows) for _, rows, _ in maps], default=6)
    figure = Figure(figsize=(sum(widths) + 0.4, max(3.6, 1.9 + 0.27 * tallest)), layout="constrained")
    figure.set_facecolor("white")
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for axis, (title, rows, key) in zip(axes, maps, strict=False):
        _heat(axis, title, rows, lengths, tallies, key)
    _by_length(axes[-1], summary)
    size = summary.get("parameters")
    about = f"{summary.get('task') or 'recall'}, {_PARTS.get(str(summary.get('part')), '')} rows"
    about += f", {size:,} parameters" if isinstance(size, int) else ""
    figure.suptitle(about, fontsize=11, fontweight="bold", x=0.01, ha="left", color=_INK)
    draft = path.with_name(f".{path.stem}.{os.getpid()}.png")
    try:
        figure.savefig(draft, dpi=130)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _heat(
    axis: Axes, title: str, rows: list[tuple[int, str]], lengths: list[int], tallies: Sequence[Tally],
    key: Callable[[Tally], int],
) -> None:  # fmt: skip
    """Accuracy as colour and figure; a cell without answers stays empty."""
    counts: dict[tuple[int, int], list[int]] = {}
    for tally in tallies:
        cell = counts.setdefault((key(tally), tally.length), [0, 0])
        cell[0], cell[1] = cell[0] + tally.answers, cell[1] + tally.right
    values = [
        [counts[row, length][1] / counts[row, length][0] if (row, length) in counts else float("nan")
         for length in lengths]
        for row, _ in rows
    ]  # fmt: skip
    axis.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=1.1)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if value == value:
                axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8,
                          color="white" if value > 0.6 else _INK)  # fmt: skip
    axis.set_xticks(range(len(lengths)), [_short(length) for length in lengths], fontsize=8)
    axis.set_yticks(range(len(rows)), [label for _, label in rows], fontsize=8)
    axis.set_xlabel("length", fontsize=8.5, color=_MUTED)
    axis.set_title(f"% right, {title}", fontsize=9, loc="left", color=_INK)
    axis.tick_params(length=0, colors=_MUTED)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _by_length(axis: Axes, summary: dict[str, Any]) -> None:
    """Accuracy with its interval at each length, all items together, beside chance and the bytes of the state."""
    totals: dict[int, list[int]] = {}
    states: dict[int, int | None] = {}
    for line in summary["accuracy"]:
        total = totals.setdefault(line["length"], [0, 0])
        total[0], total[1] = total[0] + line["right"], total[1] + line["answers"]
        states[line["length"]] = line["state_bytes"]
    lengths = sorted(totals)
    for x, length in enumerate(lengths):
        right, answers = totals[length]
        low, high = wilson(right, answers)
        share = right / answers
        axis.plot([x, x], [100 * low, 100 * high], color=_BLUE, linewidth=1.4, solid_capstyle="butt")
        axis.plot([x], [100 * share], "o", color=_BLUE, markersize=4.5)
        below = share > 0.85
        axis.annotate(f"{100 * share:.1f}", (x, 100 * (low if below else high)), ha="center", fontsize=8, color=_INK,
                      xytext=(0, -11 if below else 4), textcoords="offset points")  # fmt: skip
    chance = summary.get("chance")
    if isinstance(chance, float):
        axis.axhline(100 * chance, color=_MUTED, linewidth=0.9, linestyle="--")
    labels = [_short(n) + (f"\n{_bytes(states[n])}" if states[n] is not None else "") for n in lengths]
    axis.set_xticks(range(len(lengths)), labels, fontsize=8)
    axis.set_xlim(-0.6, len(lengths) - 0.4)
    axis.set_ylim(-3, 106)
    axis.set_xlabel("length, and state of a row", fontsize=8.5, color=_MUTED)
    guess = f"; dashed: chance, {100 * chance:.2g} %" if isinstance(chance, float) else ""
    axis.set_title(f"% right, 95 % interval{guess}", fontsize=9, loc="left", color=_INK)
    axis.grid(axis="y", color="#e4e7ea", linewidth=0.7)
    axis.tick_params(length=0, colors=_MUTED, labelsize=8)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _short(number: int) -> str:
    """``131072`` as ``128k``, ``1000`` as it is."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if number >= size and number % size == 0:
            return f"{number // size}{letter}"
    return f"{number:,}"


def _bytes(number: int | None) -> str:
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number is not None and number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"
