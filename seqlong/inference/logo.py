"""Sequence logos and tracks, drawn with matplotlib alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Affine2D
from numpy.typing import NDArray

#: The colours of bases, those that most logos have, darkened to read on white.
COLOURS = {"A": "#17803d", "C": "#1767b3", "G": "#c98200", "T": "#b3261e"}
INK, MUTED, GRID = "#14191f", "#5d6772", "#e4e7ea"
#: Bases that a logo has letters for; more are bars.
LETTERS_UP_TO = 240


def draw(
    path: Path,
    title: str,
    letters: str,
    importance: NDArray[np.float64],
    effects: NDArray[np.float64],
    first: int,
    what: str,
    effect: str,
) -> None:
    """A logo of how much each base matters, and a map of what each change does, above one another.

    Args:
        path: PNG to write.
        title: what it is of.
        letters: ``t`` bases.
        importance: ``(t)``, the height of each letter; below 0 hangs down.
        effects: ``(t 4)`` of A, C, G, T in each place.
        first: the number of the first base, from 1.
        what: the axis of the logo.
        effect: the scale of the map.
    """
    figure = Figure(figsize=(min(26.0, max(8.0, 2.5 + 0.13 * len(letters))), 4.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    logo(top, letters, importance)
    top.set_ylabel(what, fontsize=9, color=INK)
    top.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    known = effects[~np.isnan(effects)]
    limit = float(np.percentile(np.abs(known), 99.5)) if len(known) else 1.0
    extent = (-0.5, len(letters) - 0.5, 3.5, -0.5)
    image = below.imshow(effects.T, aspect="auto", cmap="RdBu", vmin=-limit or -1, vmax=limit or 1, extent=extent,
                         interpolation="nearest")  # fmt: skip
    below.set_yticks(range(4), list("ACGT"), fontsize=8)
    for tick, base in zip(below.get_yticklabels(), "ACGT", strict=True):
        tick.set_color(COLOURS[base])
    below.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    below.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{int(place) + first:,}"))
    below.tick_params(axis="x", labelsize=8, labelcolor=MUTED)
    bar = figure.colorbar(image, ax=below, pad=0.01, aspect=8)
    bar.set_label(effect, fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, labelcolor=MUTED)
    for axis in (top, below):
        for side in axis.spines.values():
            side.set_visible(False)
        axis.tick_params(length=0)
    figure.savefig(path, facecolor="white")


def logo(axis: Axes, letters: str, heights: NDArray[np.float64]) -> None:
    """Letters as high as their values; bars where there are too many to read."""
    heights = np.nan_to_num(heights)
    span = max(float(heights.max(initial=0)), 0.0), min(float(heights.min(initial=0)), 0.0)
    margin = (span[0] - span[1]) * 0.05 or 1.0
    axis.set_xlim(-0.6, len(letters) - 0.4)
    axis.set_ylim(span[1] - margin, span[0] + margin)
    axis.axhline(0, color=GRID, linewidth=0.8, zorder=0)
    axis.tick_params(axis="y", labelsize=8, labelcolor=MUTED)
    if len(letters) > LETTERS_UP_TO:
        for base, colour in COLOURS.items():
            here = np.array([letter == base for letter in letters])
            axis.bar(np.flatnonzero(here), heights[here], width=1.0, color=colour, linewidth=0, label=base)
        axis.legend(ncols=4, fontsize=7, frameon=False, loc="upper right")
        return
    font = FontProperties(family="DejaVu Sans", weight="bold")
    for place, (letter, height) in enumerate(zip(letters, heights.tolist(), strict=True)):
        if not height:
            continue
        shape = TextPath((0, 0), letter, size=1, prop=font)
        box = shape.get_extents()
        move = Affine2D().translate(-box.x0, -box.y0).scale(0.94 / box.width, abs(height) / box.height)
        move.translate(place - 0.47, min(0.0, height))
        patch = PathPatch(shape, facecolor=COLOURS.get(letter, MUTED), linewidth=0)
        patch.set_transform(move + axis.transData)
        axis.add_patch(patch)


def curve(path: Path, title: str, contexts: list[int], bits: NDArray[np.float64], spread: NDArray[np.float64]) -> None:
    """Bits a base over the context that a model may see, with its 95 % interval."""
    figure = Figure(figsize=(7, 3.8), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.fill_between(contexts, bits - 1.96 * spread, bits + 1.96 * spread, color="#1767b3", alpha=0.15, linewidth=0)
    axis.plot(contexts, bits, color="#1767b3", linewidth=1.8, marker="o", markersize=4)
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [_short(context) for context in contexts], fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel("bases before the scored ones that the model may see", fontsize=9, color=INK)
    axis.set_ylabel("bits a base", fontsize=9, color=INK)
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axis.grid(axis="y", color=GRID, linewidth=0.7)
    axis.tick_params(length=0, labelcolor=MUTED, labelsize=8)
    for side in axis.spines.values():
        side.set_visible(False)
    figure.savefig(path, facecolor="white")


def _short(number: int) -> str:
    if number >= 1 << 20 and number % (1 << 20) == 0:
        return f"{number >> 20}M"
    return f"{number >> 10}k" if number >= 1024 and number % 1024 == 0 else f"{number:,}"
