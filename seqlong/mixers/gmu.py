"""GatedMemoryUnit: a block that reads what an earlier block's recurrence read, instead of running one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, NoState

if TYPE_CHECKING:
    from seqlong.cost import Cost


class GatedMemoryUnit(Mixer):
    """``y_t = W₂ (m_t ⊙ silu(W₁ x_t))``, m what the recurrence of an earlier block gave at t, before its gate.

    Two products a token and no scan, no state. Which block it reads, ``backbone.reads`` says; its mixer must publish
    readings of ``width`` channels: Mamba1, Mamba2 and the linear mixers with one projection to q, k and v do.
    Source: arXiv 2507.06607.

    Args:
        d_model: width of the residual stream.
        width: channels of the memory; ``2 d_model``, as those of Mamba1 and Mamba2, if not given.
        bias: whether the projections have biases.
    """

    bounded_state = True
    residual_projections = ("out_proj",)
    reads_memory = True

    def __init__(self, d_model: int, width: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.width = 2 * d_model if width is None else width
        if self.width < 1:
            raise ValueError(f"GatedMemoryUnit needs a width of at least 1 channel, found {self.width}")
        self.in_proj = nn.Linear(d_model, self.width, bias=bias)
        self.out_proj = nn.Linear(self.width, d_model, bias=bias)

    def bind(self, publisher: Mixer) -> None:
        kind, width = type(publisher).__name__, publisher.memory_width
        if width is None:
            raise ValueError(
                f"GatedMemoryUnit reads the output of a recurrence, which {kind} does not publish; read Mamba1, "
                "Mamba2, GLA, GatedDeltaNet or another linear mixer"
            )
        if width != self.width:
            raise ValueError(
                f"GatedMemoryUnit reads {self.width} channels, but {kind} publishes {width}; set width={width}"
            )

    def forward(
        self,
        hidden: Float[Tensor, "b t d"],
        layout: SequenceLayout,
        state: NoState | None = None,
        memory: Float[Tensor, "b t w"] | None = None,
    ) -> tuple[Float[Tensor, "b t d"], NoState | None]:
        if memory is None:
            raise ValueError("GatedMemoryUnit reads what an earlier block publishes; say which with backbone.reads")
        gate = F.silu(self.in_proj(hidden))
        return self.out_proj(memory.to(gate.dtype) * gate), state

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> NoState:
        return NoState()

    def cost(self, length: int) -> Cost:
        """See ``seqlong.cost``."""
        from seqlong.cost import Cost, products

        return Cost(tuple(products(self)), 0, "none")
