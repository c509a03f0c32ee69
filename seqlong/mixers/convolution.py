"""Convolution: short patterns, such as motifs of DNA, learnt as what they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer

if TYPE_CHECKING:
    from seqlong.cost import Cost


class Convolution(Mixer):
    """``y_t = W silu(Σ_i K_i x_{t+i} + b)``, i from ``-(width-1)/2`` to ``(width-1)/2``: each channel sees all of them.

    A token sees its neighbours on both sides, and nothing beyond. In the first block of a model of DNA, a row of K is a
    position weight matrix: a motif of ``width`` bases that one layer finds, where a short convolution of each channel
    alone (in ``Mamba2`` and others) takes several. That is what a few thousand labelled sequences are enough for.

    Args:
        d_model: width of the residual stream.
        width: taps, the token itself in the middle: an odd number.
        channels: patterns that are looked for; null is ``d_model``.
    """

    causal = False
    residual_projections = ("out_proj",)

    def __init__(self, d_model: int, width: int = 9, channels: int | None = None) -> None:
        super().__init__()
        if width < 1 or width % 2 == 0:
            raise ValueError(f"Convolution needs an odd width, as many taps to the left as to the right, found {width}")
        channels = d_model if channels is None else channels
        if channels < 1:
            raise ValueError(f"Convolution needs one channel or more, found {channels}")
        self.conv = nn.Conv1d(d_model, channels, width, padding=width // 2)
        self.out_proj = nn.Linear(channels, d_model, bias=False)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: None = None
    ) -> tuple[Float[Tensor, "b t d"], None]:
        if state is not None:
            raise ValueError("a convolution that sees both sides cannot carry a state from window to window")
        if layout.padding is not None:
            hidden = hidden.masked_fill(layout.padding[..., None], 0)
        if layout.segment_ids is None or all(len(row) < 2 for row in layout.boundaries):
            found = self.conv(hidden.transpose(1, 2)).transpose(1, 2)
        else:
            found = self._in_segments(hidden, layout.segment_ids)
        return self.out_proj(F.silu(found)), None

    def _in_segments(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The same, tap by tap, where rows hold several segments: what another segment has counts as zero."""
        width, length = self.conv.kernel_size[0], hidden.shape[1]
        line = F.pad(hidden, (0, 0, width // 2, width // 2))
        names = F.pad(ids, (width // 2, width // 2))
        assert self.conv.bias is not None
        found: Tensor = self.conv.bias
        for tap in range(width):
            same = names[:, tap : tap + length] == ids
            near = torch.where(same[..., None], line[:, tap : tap + length], 0)
            found = found + F.linear(near, self.conv.weight[:, :, tap])
        return found

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> None:
        raise ValueError("a convolution that sees both sides has no state: it needs what follows")

    def cost(self, length: int) -> Cost:
        """See ``seqlong.cost``: 2 FLOPs a weight and token."""
        from seqlong.cost import Cost, products

        return Cost(tuple(products(self)), None, "needs the whole row")
