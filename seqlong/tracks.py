"""TrackBatch: rows of a genome, and the signals that were measured along it, in bins."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from seqlong.batch import SequenceBatch


@dataclass
class TrackBatch(SequenceBatch):
    """A batch whose rows have k signals in n bins of ``t / n`` positions.

    Attributes:
        tracks: ``(b n k)`` float32, NaN where nothing was measured.
    """

    tracks: Float[Tensor, "b n k"] | None = None

    def _map(self, function) -> TrackBatch:  # type: ignore[no-untyped-def]
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return TrackBatch(
            **{name: function(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        )
