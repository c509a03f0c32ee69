"""BackboneState: what a whole backbone carries from one window to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor


@dataclass
class BackboneState:
    """One mixer state a block, and how far each row has come in the segment that goes on.

    Attributes:
        blocks: the state of each block's mixer, in order.
        position: ``(b)`` tokens of the current segment seen so far.
    """

    blocks: list[Any]
    position: Int[Tensor, "b"]

    def map(self, function: Callable[[Tensor], Tensor]) -> BackboneState:
        """Apply ``function`` to every tensor."""
        return BackboneState([block.map(function) for block in self.blocks], function(self.position))

    def detach(self) -> BackboneState:
        """Cut the graph: truncated backpropagation through time."""
        return self.map(Tensor.detach)

    def keep(self, rows: Bool[Tensor, "b"]) -> BackboneState:
        """Keep the state of the rows that are True, and start the others afresh."""
        return BackboneState([block.keep(rows) for block in self.blocks], self.position * rows)
