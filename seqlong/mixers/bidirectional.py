"""Bidirectional: a causal mixer run from both ends, for masked modelling."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, MixerFactory


class Bidirectional(Mixer):
    """``mixer(x) + reverse(mixer'(reverse(x)))``: every token sees both sides of its segment.

    The sum keeps the width. Source: arXiv 2403.03234 (BiMamba).

    Args:
        d_model: width of the residual stream.
        mixer: the causal mixer to run in both directions.
        tied: whether both directions share their weights.
    """

    causal = False

    def __init__(self, d_model: int, mixer: MixerFactory, tied: bool = False) -> None:
        super().__init__()
        self.forward_mixer = mixer(d_model)
        if not self.forward_mixer.causal:
            raise ValueError(f"{type(self.forward_mixer).__name__} already sees both sides; do not wrap it")
        self.tied = tied
        self.backward_mixer: nn.Module | None = None if tied else mixer(d_model)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: None = None
    ) -> tuple[Float[Tensor, "b t d"], None]:
        if state is not None:
            raise ValueError("a bidirectional mixer cannot carry a state from window to window")
        rightward, _ = self.forward_mixer(hidden, layout)
        mixer = self.forward_mixer if self.backward_mixer is None else self.backward_mixer
        leftward, _ = mixer(layout.reverse(hidden), layout.reversed)
        return rightward + layout.reverse(leftward), None

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> None:
        raise ValueError("a bidirectional mixer has no state: it needs the whole row")
