"""MoM: a mixture of memories, each of which sees the tokens that were sent to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from seqlong.ffn.router import Router
from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, MixerFactory, MixerState
from seqlong.mixers.deltanet import GatedDeltaNet
from seqlong.mixers.linear import LinearMixer, LinearState, still
from seqlong.mixers.log_linear import LogLinearGatedDeltaNet
from seqlong.mixers.routing import router_sums
from seqlong.mixers.visits import Visits

if TYPE_CHECKING:
    from seqlong.cost import Cost


@dataclass
class MoMState(MixerState):
    """Shapes: memory ``(b m·h k v)`` float32, the m memories one after another; conv ``(b m·r c)``, if any."""

    memory: Float[Tensor, "b mh k v"]
    conv: Float[Tensor, "b mr c"] | None = None


class MoM(Mixer):
    """``Σ_{m chosen} p_m mixer_m(x) + mixer_shared(x)``; ``p = softmax(W x)``, the chosen divided by their sum.

    ``mixer_m`` is one linear mixer, all of its weights shared, run for each memory over the tokens that chose it and no
    others: state and short convolution know nothing else, so nothing leaks between memories, and a token decodes as it
    was trained. Published code convolves over the joint of two memories in training. It norms and projects the sum of
    the readings, here each reading is; and it can give every memory keys and values of its own, here as with its
    ``single_kv_proj``. Memories have a row each: the work is that of all of them, whatever ``active`` is.
    Source: arXiv 2502.13685.

    Args:
        d_model: width of the residual stream.
        mixer: the linear mixer of a memory; the source's, ``GatedDeltaNet``, if not given.
        memories: how many there are to choose from.
        active: how many of them a token goes to.
        shared_memory: whether one more memory sees every token.
        balance_loss: weight of a loss that keeps the memories' loads even.
    """

    bounded_state = True
    routed = True

    def __init__(
        self,
        d_model: int,
        mixer: MixerFactory | None = None,
        memories: int = 4,
        active: int = 2,
        shared_memory: bool = True,
        balance_loss: float = 0.01,
    ) -> None:
        super().__init__()
        if not 1 <= active <= memories or balance_loss < 0:
            raise ValueError(
                f"MoM needs active from 1 to memories, and a balance_loss of 0 or more, found active {active} of "
                f"{memories} memories, balance_loss {balance_loss}"
            )
        made = GatedDeltaNet(d_model) if mixer is None else mixer(d_model)
        if not isinstance(made, LinearMixer) or isinstance(made, LogLinearGatedDeltaNet):  # which has a stack of states
            raise ValueError(f"MoM needs a linear mixer such as GatedDeltaNet or GLA, found {type(made).__name__}")
        self.mixer = made
        self.router = Router(d_model, memories, active, "softmax")
        self.memories, self.rows, self.balance_loss = memories, memories + shared_memory, balance_loss

    def place(self, layer: int, layers: int) -> None:
        self.mixer.place(layer, layers)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: MoMState | None = None
    ) -> tuple[Float[Tensor, "b t d"], MoMState | None]:
        if not hidden.shape[1]:
            return hidden, state
        hidden = still(hidden, layout.padding, 0.0)
        routing = self.router(hidden.flatten(0, 1), None if layout.padding is None else layout.padding.flatten())
        weights = routing.weights.new_zeros(len(routing.weights), self.memories + 1)
        seen = torch.zeros_like(weights, dtype=torch.bool).scatter(1, routing.experts, True)  # padding: the last
        weights = weights.scatter(1, routing.experts, routing.weights)
        real = torch.ones_like(seen[:, 0]) if layout.padding is None else ~layout.padding.flatten()
        weights[:, -1], seen[:, -1] = real.to(weights.dtype), real
        seen, weights = (x[:, : self.rows].unflatten(0, layout.shape).transpose(1, 2) for x in (seen, weights))
        visits = Visits.build(seen, layout)
        output, after = self.mixer(visits.gather(hidden), visits.layout, self._apart(state))
        mixed = (visits.scatter(output) * weights[..., None].to(output.dtype)).sum(dim=1)
        return mixed, None if after is None else self._together(after, visits)

    def router_sums(self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout) -> dict[str, Tensor]:
        """Of the memories that tokens choose among; that which sees every token is not one of them."""
        hidden = still(hidden, layout.padding, 0.0)
        routing = self.router(hidden.flatten(0, 1))
        chosen = torch.zeros_like(routing.scores, dtype=torch.bool).scatter(1, routing.experts, True)
        scores, chosen = routing.scores.unflatten(0, layout.shape), chosen.unflatten(0, layout.shape)
        return router_sums(scores, chosen, layout, self.balance_loss)

    def _apart(self, state: MoMState | None) -> LinearState | None:
        """A row for each memory."""
        if state is None:
            return None
        memory, conv = (
            None if x is None else x.unflatten(1, (self.rows, -1)).flatten(0, 1) for x in (state.memory, state.conv)
        )
        assert memory is not None
        return LinearState(memory, conv)

    def _together(self, state: MixerState, visits: Visits | None) -> MoMState:
        if visits is not None and visits.current is not None:
            state = state.keep(visits.current.flatten())
        assert isinstance(state, LinearState)
        memory, conv = (
            None if x is None else x.unflatten(0, (-1, self.rows)).flatten(1, 2) for x in (state.memory, state.conv)
        )
        assert memory is not None
        return MoMState(memory, conv)

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> MoMState:
        return self._together(self.mixer.initial_state(rows * self.rows, device, dtype), None)

    def cost(self, length: int, dtype: torch.dtype = torch.bfloat16) -> Cost:
        """See ``seqlong.cost``: the mixer once for each memory, and the router."""
        from seqlong.cost import Cost, Term, mixer_cost

        one = mixer_cost(self.mixer, length, dtype)
        terms = [Term(x.what, self.rows * x.flops, f"{self.rows} times {x.formula}", x.grows) for x in one.terms]
        router = Term("router", 2.0 * self.router.weight.numel(), "2 a weight of the router")
        return Cost((*terms, router), self.rows * (one.state or 0), one.growth)
