"""SequenceBatch: the one record that crosses from the data to the tasks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from seqlong.fragment import Fragment


@dataclass
class SequenceBatch:
    """Rows of one length, and what is known of every position.

    Shapes: b rows, t positions, p values of a patch. A row may hold several segments (documents, contigs, records);
    attention, states, convolutions and positions start afresh at each. Padding stands at the end of a row.

    Attributes:
        tokens: ``(b t)`` int64 token ids, -1 where a patch stands; None when there are ``patches`` alone.
        targets: ``(b t)`` int64, the token that each position should predict; -1 where there is none. A causal
            target is already shifted, so rows may be sliced along t without losing any.
        loss_weight: ``(b t)`` float32, the weight of each position's loss: 0 for padding and unknown bases, a fraction
            for repeats, 1 elsewhere.
        segment_ids: ``(b t)`` int32, 1, 2, ... along the row and 0 for padding; None when every row is one segment
            without padding, which is the fast case.
        positions: ``(b t)`` int64, or ``(b t 3)`` for video; None counts 0, 1, ... from the start of each segment.
        continues: ``(b)`` bool, True where the row follows on from the same row of the batch before, so that carried
            state stays valid; where it is False a carried state is dropped. None: every row goes on from whatever state
            is carried.
        index: ``(b)`` int64, the number of each sample in the endless training order; seeds everything random about
            it, so that a resumed run draws the same.
        source: where each row came from, such as ``"chr1:1000-2000:+"``.
        patches: ``(b t p)`` float, instead of tokens, or between them.
        prefix: ``(b t)`` bool, True at the beginning of each segment, as far as its tokens may see one another in both
            directions; for mixers that can (``PrefixAttention``, ``PrefixMixer``). None: nowhere.
        fragment: which part of longer rows this is, where several processes share them; else None.
    """

    tokens: Int[Tensor, "b t"] | None = None
    targets: Int[Tensor, "b t"] | None = None
    loss_weight: Float[Tensor, "b t"] | None = None
    segment_ids: Int[Tensor, "b t"] | None = None
    positions: Int[Tensor, "b t"] | Int[Tensor, "b t 3"] | None = None
    continues: Bool[Tensor, "b"] | None = None
    index: Int[Tensor, "b"] | None = None
    source: list[str] | None = None
    patches: Float[Tensor, "b t p"] | None = None
    prefix: Bool[Tensor, "b t"] | None = None
    fragment: Fragment | None = None

    @property
    def inputs(self) -> Tensor:
        """Tokens ``(b t)`` or patches ``(b t p)``, whichever the batch holds."""
        found = self.tokens if self.tokens is not None else self.patches
        if found is None:
            raise ValueError("a SequenceBatch needs tokens or patches; found neither")
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """``(b, t)``."""
        rows, length = self.inputs.shape[:2]
        return rows, length

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SequenceBatch:
        """Return a copy whose tensors are on ``device`` (Lightning calls this)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SequenceBatch:
        """Return a copy in page-locked memory (the DataLoader calls this)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> SequenceBatch:  # type: ignore[no-untyped-def]
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return SequenceBatch(
            **{name: function(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        )
