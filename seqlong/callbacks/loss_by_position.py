"""LossByPosition: does the loss go on falling the further a row goes on?"""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from seqlong.batch import SequenceBatch
from seqlong.callbacks.loss_split import Bins, LossSplit, chosen, octaves, places

PICTURE = "position.png"


class LossByPosition(LossSplit):
    """Bits of evaluation by the number of tokens seen, in logarithmic bins up to 8 million.

    The token at position ``i`` of its segment is predicted from ``i + 1`` tokens, which is the number that is binned. A
    model that uses its context has a curve that falls; one that cannot bear rows longer than those it was trained on
    has one that rises. Written to losses.csv as the measure ``position``. One pass over the losses.

    Where rows of evaluation are longer than those of training (``data.eval_length``), it also logs ``bits_trained``,
    over the positions that training had, and ``bits_beyond``, over all others. A test draws the curve, with the length
    of training marked, as position.png.

    Args:
        per_octave: bins for each doubling.
    """

    def __init__(self, per_octave: int = 2) -> None:
        super().__init__()
        self.bins = {"position": Bins(octaves(per_octave))}

    def finished(self, trainer: Trainer, module: LightningModule, part: str) -> None:
        trained = int(getattr(getattr(trainer, "datamodule", None), "length", 0))
        rows = self.bins["position"].rows()
        if not trained or not rows or rows[-1][0] <= trained:
            return
        beyond = [row for row in rows if row[0] >= trained]
        for name, some in (("trained", rows[: len(rows) - len(beyond)]), ("beyond", beyond)):
            count = sum(row[2] for row in some)
            if count:
                module.log(f"{part}/bits_{name}", sum(row[2] * row[3] for row in some) / count)
        if part == "test" and trainer.is_global_zero:
            draw({"": [(low, bits) for low, _, _, bits in rows]}, trained, Path(trainer.default_root_dir) / PICTURE)

    def split(self, module: LightningModule, batch: SequenceBatch, found: dict[str, Tensor]) -> None:
        nll, counted = found["nll"], found["counted"]
        where = places(batch)
        if batch.segment_ids is None and batch.positions is None:  # a position is the same in every row
            self.bins["position"].add(where[0] + 1, (nll * counted).sum(0, dtype=nll.dtype), counted.sum(0))
        else:
            self.bins["position"].add(chosen(where, counted) + 1, nll[counted])


def draw(curves: dict[str, list[tuple[int, float]]], trained: int, path: Path) -> None:
    """Bits by position, a curve a name, with the length of training marked.

    Args:
        curves: name -> ``(tokens seen, bits)``; the name may be empty.
        trained: positions of a row of training.
        path: where the PNG goes.
    """
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    show(figure, curves, trained)
    figure.savefig(path, dpi=130)


def show(figure: Figure, curves: dict[str, list[tuple[int, float]]], trained: int) -> None:
    """``draw`` into a figure."""
    axis = figure.subplots()
    last = max(low for points in curves.values() for low, _ in points)
    axis.axvspan(trained, 2 * last, color="#eef1f4", zorder=0)
    for number, (name, points) in enumerate(curves.items()):
        axis.plot(*zip(*points, strict=True), color=f"C{number}", linewidth=1.8, label=name or None)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{round(value):,}")
    axis.set_xlim(1, 2 * last)
    axis.set_xlabel("tokens seen before", fontsize=9)
    axis.set_ylabel("bits", fontsize=9)
    axis.set_title(f"Bits by position; grey: beyond the {trained:,} of training", fontsize=9.5, loc="left")
    axis.grid(color="#e4e7ea", linewidth=0.7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if any(curves):
        axis.legend(fontsize=8, frameon=False)
