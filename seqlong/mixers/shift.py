"""Token shift: what a token takes from the one before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from seqlong.layout import SequenceLayout
from seqlong.mixers.base import MixerState


@dataclass
class ShiftState(MixerState):
    """Shapes: memory ``(b h k v)`` float32; last ``(b d)``, the last token read (its hidden values)."""

    memory: Float[Tensor, "b h k v"]
    last: Float[Tensor, "b d"]


def token_before(
    hidden: Float[Tensor, "b t d"], layout: SequenceLayout, last: Float[Tensor, "b d"] | None
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
    """The token before each one in its segment (zero before the first), and the last that is not padding.

    ``last`` is the token before the row; zero if None.
    """
    first = torch.zeros_like(hidden[:, :1]) if last is None else last[:, None].to(hidden.dtype)
    line = torch.cat([first, hidden], dim=1)
    before = line[:, : hidden.shape[1]]
    if layout.starts is not None:
        before = before.masked_fill(layout.starts[..., None], 0)
    if layout.padding is None:
        return before, line[:, -1]
    at = layout.lengths[:, None, None].expand(-1, 1, hidden.shape[2])
    return before, line.gather(1, at)[:, 0]
