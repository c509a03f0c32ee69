"""Bidirectional: a causal mixer run from both ends, for masked modelling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, MixerFactory
from seqlong.mixers.linear import LinearMixer
from seqlong.mixers.mamba2 import Mamba2
from seqlong.mixers.readings import bidirectional_form, join_readings
from seqlong.mixers.routing import together

if TYPE_CHECKING:
    from seqlong.cost import Cost


class Bidirectional(Mixer):
    """``mixer(x) + reverse(mixer'(reverse(x)))``: every token sees both sides of its segment.

    The sum keeps the width. With ``join: readings`` the two readings of a linear mixer are added inside of it, before
    its norm and gate, the token itself counted once: q, k, v and all gates are made once, and where there is one decay
    a head both directions are one op. ``docs/mixers.md`` says what each mixer can. Source: arXiv 2403.03234 (BiMamba),
    2502.16249 (LION, for ``readings``).

    Args:
        d_model: width of the residual stream.
        mixer: the causal mixer to run in both directions.
        tied: whether both directions share their weights.
        join: where the directions meet: ``outputs`` adds what two mixers give, ``readings`` what one recurrence reads
            from either end; then there is one set of weights, whatever ``tied`` is.
    """

    causal = False

    def __init__(
        self,
        d_model: int,
        mixer: MixerFactory,
        tied: bool = False,
        join: Literal["outputs", "readings"] = "outputs",
    ) -> None:
        super().__init__()
        self.forward_mixer = mixer(d_model)
        kind = type(self.forward_mixer).__name__
        if not self.forward_mixer.causal:
            raise ValueError(f"{kind} already sees both sides; do not wrap it")
        if self.forward_mixer.reads_memory:
            raise ValueError(f"{kind} reads another block's memory, which has no other direction; do not wrap it")
        self.joined = join == "readings"
        if self.joined:
            _check_joinable(self.forward_mixer)
        self.tied = tied or self.joined
        self.backward_mixer: Mixer | None = None if self.tied else mixer(d_model)
        self.routed = self.forward_mixer.routed
        # Attention needs whole rows, and a row's padding at its end, which turned fragments have in the middle.
        recurrent = isinstance(self.forward_mixer, LinearMixer | Mamba2)
        self.sequence_parallel = recurrent and self.forward_mixer.sequence_parallel and not self.joined

    def place(self, layer: int, layers: int) -> None:
        self.forward_mixer.place(layer, layers)
        if self.backward_mixer is not None:
            self.backward_mixer.place(layer, layers)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: None = None
    ) -> tuple[Float[Tensor, "b t d"], None]:
        if state is not None:
            raise ValueError("a bidirectional mixer cannot carry a state from window to window")
        if self.joined:
            assert isinstance(self.forward_mixer, LinearMixer)
            return join_readings(self.forward_mixer, hidden, layout), None
        rightward, _ = self.forward_mixer(hidden, layout)
        mixer = self.forward_mixer if self.backward_mixer is None else self.backward_mixer
        leftward, _ = mixer(layout.reverse(hidden), layout.reversed)
        return rightward + layout.reverse(leftward), None

    def router_sums(self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout) -> dict[str, Tensor]:
        """Those of each set of weights: a shared router, which sees each token by itself, counts once."""
        rightward = self.forward_mixer.router_sums(hidden, layout)
        if self.backward_mixer is None:
            return rightward
        leftward = self.backward_mixer.router_sums(layout.reverse(hidden), layout.reversed)
        return together({"forward": rightward, "backward": leftward})

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> None:
        raise ValueError("a bidirectional mixer has no state: it needs the whole row")

    def cost(self, length: int, dtype: torch.dtype = torch.bfloat16) -> Cost:
        """See ``seqlong.cost``: twice that of the mixer; with joined readings, twice its recurrence."""
        from seqlong.cost import Cost, beside, mixer_cost

        one = mixer_cost(self.forward_mixer, length, dtype)
        again = Cost(tuple(x for x in one.terms if not self.joined or x.what == "recurrence"), one.state)
        return Cost(beside([one, again]).terms, None, "needs the whole row")


def _check_joinable(mixer: Mixer) -> None:
    """Whether the readings of ``mixer`` can be joined.

    Raises:
        ValueError: they cannot, and why.
    """
    kind = type(mixer).__name__
    if bidirectional_form(mixer) not in ("one op", "joined") or not isinstance(mixer, LinearMixer):
        raise ValueError(f"the readings of {kind} cannot be joined before they are normed; set join=outputs")
    if mixer.conv_width:
        raise ValueError(
            f"join=readings makes q, k and v once, for both directions, but the convolution of {kind} has one; set "
            "its conv_width=0, or join=outputs"
        )
