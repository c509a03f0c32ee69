"""LabelledBatch: sequences of any length, several to a row or one, and what is known of each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqlong.batch import SequenceBatch


@dataclass
class LabelledBatch(SequenceBatch):
    """A batch whose segments are labelled sequences (records); s of them over all rows, from left to right, row by row.

    Attributes:
        starts: ``(s)`` int64, the first position of each record, counted through the rows: ``row · t + position``.
        ends: ``(s)`` int64, its last position.
        labels: ``(s y)``, int64 with y = 1 for a class (-1 unknown), float32 for values and for several labels of 0 and
            1 (NaN unknown).
        seen: ``(s)`` bool, True where the training data hold the same record, or one much like it; None in training.
        records: ``(s)`` int64, the number of each record in its split.
    """

    starts: Int[Tensor, "s"] | None = None
    ends: Int[Tensor, "s"] | None = None
    labels: Int[Tensor, "s y"] | Float[Tensor, "s y"] | None = None
    seen: Bool[Tensor, "s"] | None = None
    records: Int[Tensor, "s"] | None = None

    def _map(self, function) -> LabelledBatch:  # type: ignore[no-untyped-def]
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return LabelledBatch(
            **{name: function(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        )
