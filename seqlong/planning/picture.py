"""A scaling table as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seqlong.errors import SeqlongError
from seqlong.planning.machines import Machine

if TYPE_CHECKING:
    from seqlong.planning.cluster import Row
    from seqlong.planning.step import Job


def draw(path: str, job: Job, rows: Sequence[Row], machine: Machine) -> None:
    """Tokens a second against GPUs, and where a step's time goes.

    Raises:
        SeqlongError: nothing to draw, or no such place.
    """
    if len(rows) < 2:
        raise SeqlongError("--out draws a table: give several numbers of GPUs, such as --gpus 1,2,4,8,64")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    speed, share = figure.subplots(1, 2)
    counts = [row.gpus for row in rows]
    speed.loglog(counts, [row.gpus * row.single for row in rows], color="#c9ced4", label="that many single GPUs")
    speed.loglog(counts, [row.speed for row in rows], color="#1767b3", marker="o", label="predicted")
    for row in rows:
        speed.annotate(
            f"{100 * row.efficiency:.1f} %" + ("" if row.fits else ", does not fit"), (row.gpus, row.speed),
            xytext=(4, -12), textcoords="offset points", fontsize=8, color="#14191f" if row.fits else "#b3261e",
        )  # fmt: skip
    speed.set_xticks(counts, [f"{count:,}" for count in counts], rotation=45, minor=False)
    speed.minorticks_off()
    speed.set_xlabel(f"GPUs ({machine.name})")
    speed.set_ylabel("tokens a second")
    speed.legend(frameon=False, fontsize=8)
    names = list(dict.fromkeys(name for row in rows for name in row.waits))
    colours = ("#e0a100", "#b3261e", "#5d6772", "#8a5a00", "#17733c")
    places = list(range(len(rows)))
    below = [row.compute / row.seconds for row in rows]
    share.bar(places, below, color="#1767b3", label="compute")
    for name, colour in zip(names, colours, strict=False):
        parts = [row.waits.get(name, 0.0) / row.seconds for row in rows]
        share.bar(places, parts, bottom=below, color=colour, label=f"waits: {name}")
        below = [a + b for a, b in zip(below, parts, strict=True)]
    share.set_xticks(places, [f"{count:,}" for count in counts], rotation=45)
    share.set_xlabel("GPUs")
    share.set_ylabel("share of a step")
    share.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    figure.suptitle(f"{job.name}, rows of {job.length:,} tokens: predicted", fontsize=11, x=0.01, ha="left")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise SeqlongError(f"--out {path}: {error}") from error
