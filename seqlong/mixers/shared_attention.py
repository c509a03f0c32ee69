"""SharedAttention: queries over the keys and values of an earlier block's attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqlong.kernels.attention import attention
from seqlong.layout import SequenceLayout
from seqlong.mixers.attention import Attention
from seqlong.mixers.base import Mixer, NoState, positive
from seqlong.mixers.cache import Seen
from seqlong.positions import rotary_axes

if TYPE_CHECKING:
    from seqlong.cost import Cost


class SharedAttention(Mixer):
    """``o_i = Σ_j softmax_j(q_i·k_j / √k) v_j`` over all j ≤ i, where an earlier block has made k and v.

    It has queries only: all blocks that read one attention carry its cache once, not once each. Which block it reads,
    ``backbone.reads`` says; that must be full causal ``Attention``, rotated or without positions, and queries are
    rotated as its keys are. Source: arXiv 2405.05254 (YOCO), 2507.06607 (SambaY).

    Args:
        d_model: width of the residual stream.
        heads: query heads; a multiple of the key and value heads that are read.
        head_dim: width of a head, as wide as those that are read; ``d_model / heads`` if not given.
        bias: whether the projections have biases.
    """

    residual_projections = ("out_proj",)
    reads_memory = True

    def __init__(self, d_model: int, heads: int = 8, head_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        positive("SharedAttention", heads=heads, head_dim=head_dim)
        if head_dim is None and d_model % heads:
            raise ValueError(f"SharedAttention needs d_model divisible by heads, found {d_model} and {heads}")
        self.heads = heads
        self.head_dim = d_model // heads if head_dim is None else head_dim
        self.q_proj = nn.Linear(d_model, heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(heads * self.head_dim, d_model, bias=bias)
        self.axes: list[int] | None = None  # channels to rotate; with the two below, the publisher's
        self.rope_base, self.rope_scale = 10000.0, 1.0

    def bind(self, publisher: Mixer) -> None:
        if not isinstance(publisher, Attention):
            raise ValueError(f"SharedAttention reads keys and values of Attention, found {type(publisher).__name__}")
        if publisher.window is not None or not publisher.causal or publisher.positions == "alibi":
            raise ValueError(
                "SharedAttention reads every key up to its own place: its Attention needs window=null, causal=true and "
                f"positions 'rope' or 'none', found window={publisher.window}, causal={publisher.causal}, "
                f"positions={publisher.positions}"
            )
        if self.head_dim != publisher.head_dim or self.heads % publisher.kv_heads:
            raise ValueError(
                f"SharedAttention has {self.heads} heads of {self.head_dim}, but reads {publisher.kv_heads} of "
                f"{publisher.head_dim}; set head_dim={publisher.head_dim} and heads to a multiple of "
                f"{publisher.kv_heads}"
            )
        if publisher.positions == "rope":
            self.axes = publisher.axes
            self.rope_base, self.rope_scale = publisher.rope_base, publisher.rope_scale

    def forward(
        self,
        hidden: Float[Tensor, "b t d"],
        layout: SequenceLayout,
        state: NoState | None = None,
        memory: Seen | None = None,
    ) -> tuple[Float[Tensor, "b t d"], NoState | None]:
        if memory is None:
            raise ValueError("SharedAttention reads what an earlier block publishes; say which with backbone.reads")
        if layout.padding is not None:
            hidden = hidden.masked_fill(layout.padding[..., None], 0)
        q = self.q_proj(hidden).unflatten(2, (self.heads, self.head_dim))
        if self.axes is not None:
            places = layout.positions if layout.positions.dim() == 2 or len(self.axes) > 1 else layout.positions[..., 0]
            q = rotary_axes(q, places, self.axes, self.rope_base, self.rope_scale)
        whole = state is None and layout.segment_ids is not None  # no cache before it: segments are those of the layout
        mixed = attention(
            q, memory.keys, memory.values, query_ids=memory.query_ids, key_ids=memory.key_ids,
            boundaries=layout.boundaries if whole else None,
        )  # fmt: skip
        return self.out_proj(mixed.flatten(2)), state

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> NoState:
        return NoState()

    def cost(self, length: int) -> Cost:
        """See ``seqlong.cost``."""
        from seqlong.cost import Cost, Term, products, seen

        formula = "4 · heads · head_dim · tokens seen, for qkᵀ and the mean of v (arXiv 2204.02311, appendix B)"
        term = Term("attention", 4 * self.heads * self.head_dim * seen(length, None), formula, grows=True)
        return Cost((*products(self), term), 0, "none")
