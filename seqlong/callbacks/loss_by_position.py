"""LossByPosition: does the loss go on falling the further a row goes on?"""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import Tensor

from seqlong.batch import SequenceBatch
from seqlong.callbacks.loss_split import Bins, LossSplit, chosen, octaves, places


class LossByPosition(LossSplit):
    """Bits of evaluation by the number of tokens seen, in logarithmic bins up to 8 million.

    The token at position ``i`` of its segment is predicted from ``i + 1`` tokens, which is the number that is binned. A
    model that uses its context has a curve that falls; one that cannot bear rows longer than those it was trained on
    has one that rises. Written to losses.csv as the measure ``position``. One pass over the losses.

    Args:
        per_octave: bins for each doubling.
    """

    def __init__(self, per_octave: int = 2) -> None:
        super().__init__()
        self.bins = {"position": Bins(octaves(per_octave))}

    def split(self, module: LightningModule, batch: SequenceBatch, found: dict[str, Tensor]) -> None:
        nll, counted = found["nll"], found["counted"]
        where = places(batch)
        if batch.segment_ids is None and batch.positions is None:  # a position is the same in every row
            self.bins["position"].add(where[0] + 1, (nll * counted).sum(0, dtype=nll.dtype), counted.sum(0))
        else:
            self.bins["position"].add(chosen(where, counted) + 1, nll[counted])
