"""SCOUT: a cheap mixer gathers what is near, attention reads checkpoints of what is far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqlong.kernels.norm import rms_norm
from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, MixerFactory, MixerState, positive
from seqlong.mixers.mamba2 import Mamba2
from seqlong.mixers.rat import summaries_seen
from seqlong.mixers.summaries import SummaryState, attend_summaries
from seqlong.positions import check_axes, rotary_axes

if TYPE_CHECKING:
    from seqlong.cost import Cost


@dataclass
class ScoutState(MixerState):
    """The wrapped mixer's state, and the checkpoints."""

    local: Any
    checkpoints: SummaryState

    def map(self, function: Callable[[Tensor], Tensor]) -> ScoutState:
        checkpoints = self.checkpoints.map(function)
        assert isinstance(checkpoints, SummaryState)
        return ScoutState(self.local.map(function), checkpoints)

    def keep(self, rows: Bool[Tensor, "b"]) -> ScoutState:
        return ScoutState(self.local.keep(rows), self.checkpoints.keep(rows))


class Scout(Mixer):
    """``u = mixer(x)``, ``o_t = u_t + W softmax(q_t·k / √k) v`` over t itself and every ``every``-th token before it.

    q, k, v are projections of ``RMSNorm(x + u)``, rotated by position; tokens every, 2 every, ... of a segment are its
    checkpoints, which stand for what the mixer gathered up to them, so the cache has one entry for ``every`` tokens.
    The published layer has a feed-forward, too, between the two; here the block's comes after both. Source: arXiv
    2509.00935.

    Args:
        d_model: width of the residual stream.
        mixer: the causal mixer that gathers what is near, such as Mamba2 or attention with a window.
        heads: query heads of the attention.
        kv_heads: key and value heads, shared by equal groups; as many as ``heads`` if not given.
        every: tokens a checkpoint.
        positions: ``rope`` rotates queries and keys, ``none`` does not.
        rope_base: the longest wavelength of the rotation is about ``2π · rope_base`` tokens.
        norm_eps: added to the mean square in the norm.
    """

    residual_projections = ("out_proj",)

    def __init__(
        self,
        d_model: int,
        mixer: MixerFactory = Mamba2,
        heads: int = 8,
        kv_heads: int | None = None,
        every: int = 10,
        positions: Literal["rope", "none"] = "rope",
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        positive("Scout", heads=heads, rope_base=rope_base)
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        if d_model % heads or self.kv_heads < 1 or heads % self.kv_heads:
            raise ValueError(
                f"Scout needs d_model divisible by heads, and heads by kv_heads, found {d_model}, {heads} and "
                f"{self.kv_heads}"
            )
        if every < 1:
            raise ValueError(f"Scout needs at least 1 token a checkpoint, found {every}")
        self.head_dim, self.every = d_model // heads, every
        self.positions, self.rope_base, self.norm_eps = positions, rope_base, norm_eps
        if positions == "rope":
            check_axes("rope", [self.head_dim], self.head_dim)
        self.mixer = mixer(d_model)
        if not self.mixer.causal:
            raise ValueError(f"Scout reads checkpoints behind a token; {type(self.mixer).__name__} sees both sides")
        if self.mixer.reads_memory:
            raise ValueError(f"{type(self.mixer).__name__} reads another block's memory; give it a block of its own")
        self.routed = self.mixer.routed
        self.norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.qkv_proj = nn.Linear(d_model, (heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def place(self, layer: int, layers: int) -> None:
        self.mixer.place(layer, layers)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: ScoutState | None = None
    ) -> tuple[Float[Tensor, "b t d"], ScoutState | None]:
        if layout.padding is not None:
            hidden = hidden.masked_fill(layout.padding[..., None], 0)
        near, local = self.mixer(hidden, layout, None if state is None else state.local)
        if layout.padding is not None:
            near = near.masked_fill(layout.padding[..., None], 0)
        qkv = self.qkv_proj(rms_norm(hidden + near, self.norm.weight, self.norm_eps)).unflatten(2, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        if self.positions == "rope":
            places = layout.positions if layout.positions.dim() == 2 else layout.positions[..., 0]
            q, k = (rotary_axes(x, places, [self.head_dim], self.rope_base) for x in (q, k))
        nothing = hidden[..., :0]  # a checkpoint is its own token: nothing to remember of those between
        checkpoints = None if state is None else state.checkpoints
        far, checkpoints = attend_summaries(q, k, v, nothing, self.every, layout, checkpoints)
        after = None if checkpoints is None else ScoutState(local, checkpoints)
        return near + self.out_proj(far.flatten(2)), after

    def router_sums(self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout) -> dict[str, Tensor]:
        """Those of the mixer within, which has the same input."""
        return self.mixer.router_sums(hidden, layout)

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> ScoutState:
        empty = torch.zeros(rows, 0, self.kv_heads, self.head_dim, device=device, dtype=dtype)
        checkpoints = SummaryState(empty, empty, torch.zeros(rows, 0, 0, device=device, dtype=dtype))
        return ScoutState(self.mixer.initial_state(rows, device, dtype), checkpoints)

    def cost(self, length: int, dtype: torch.dtype = torch.bfloat16) -> Cost:
        """See ``seqlong.cost``: the mixer's, and that of the attention."""
        from seqlong.cost import Cost, Term, mixer_cost, products

        near = mixer_cost(self.mixer, length, dtype)
        own = [part for layer in (self.qkv_proj, self.out_proj) for part in products(layer)]
        flops = 4 * self.heads * self.head_dim * (1 + summaries_seen(length, self.every))
        what = "4 · heads · head_dim · checkpoints before, and the token itself"
        each = 2 * self.kv_heads * self.head_dim * dtype.itemsize
        state = None if near.state is None else near.state + each * (length // self.every)
        linear = Term("products", sum(x.flops for x in (*near.terms, *own) if x.what == "products"), own[0].formula)
        rest = [term for term in near.terms if term.what != "products"]
        terms = (linear, *rest, Term("attention", flops, what, True))
        return Cost(terms, state, f"{each:,} B every {self.every} tokens; near ones: {near.growth}")
