"""Softmax attention: full or sliding window; multi-head, grouped or multi-query; with a cache as its state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqlong.kernels.attention import attention
from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, MixerState
from seqlong.positions import alibi_slopes, rotary


@dataclass
class AttentionState(MixerState):
    """The keys and values that later tokens may still see, the most recent last.

    Shapes: keys ``(b s g k)`` (already rotated), values ``(b s g v)``, valid ``(b s)``: whether the entry belongs to
    the segment that goes on; None if all do.
    """

    keys: Float[Tensor, "b s g k"]
    values: Float[Tensor, "b s g v"]
    valid: Bool[Tensor, "b s"] | None = None

    def keep(self, rows: Bool[Tensor, "b"]) -> AttentionState:
        kept = rows[:, None].expand(self.keys.shape[:2])
        keys, values = (value.where(rows[:, None, None, None], 0) for value in (self.keys, self.values))
        return AttentionState(keys, values, kept if self.valid is None else self.valid & kept)


class Attention(Mixer):
    """``o_i = Σ_j softmax_j(q_i·k_j / √k) v_j`` over the tokens j that i may see.

    Source: arXiv 1706.03762; grouped heads arXiv 2305.13245; sliding window arXiv 2004.05150.

    Args:
        d_model: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads, shared by equal groups of query heads; as many as ``heads`` if not given, 1 for
            multi-query attention.
        head_dim: width of a head; ``d_model / heads`` if not given.
        window: a token sees the tokens at a distance below this, itself included; all if not given.
        positions: ``rope`` rotates queries and keys, ``alibi`` subtracts a slope per head times the distance, ``none``
            leaves order to the recurrent mixers around (as HybriDNA does).
        rope_base: the longest wavelength of the rotation is about ``2π · rope_base`` tokens.
        causal: whether a token sees only itself and earlier ones; false for masked language modelling.
        bias: whether the projections have biases.
    """

    residual_projections = ("out_proj",)

    def __init__(
        self,
        d_model: int,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        positions: Literal["rope", "alibi", "none"] = "rope",
        rope_base: float = 10000.0,
        causal: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = heads if kv_heads is None else kv_heads
        if head_dim is None and d_model % heads:
            raise ValueError(f"Attention needs d_model divisible by heads, found d_model={d_model}, heads={heads}")
        self.head_dim = d_model // heads if head_dim is None else head_dim
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"Attention needs heads divisible by kv_heads, found {self.heads} and {self.kv_heads}")
        if positions == "rope" and self.head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, found {self.head_dim}")
        if window is not None and window < 1:
            raise ValueError(f"Attention needs a window of at least 1 token, found {window}")
        self.window = window
        self.bounded_state = window is not None
        self.positions = positions
        self.rope_base = rope_base
        self.causal = causal
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(d_model, width, bias=bias)
        self.out_proj = nn.Linear(self.heads * self.head_dim, d_model, bias=bias)
        slopes = torch.tensor(alibi_slopes(heads)) if positions == "alibi" else None
        self.slopes: Tensor | None
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: AttentionState | None = None
    ) -> tuple[Float[Tensor, "b t d"], AttentionState | None]:
        if layout.padding is not None:
            hidden = hidden.masked_fill(layout.padding[..., None], 0)
        qkv = self.qkv_proj(hidden).unflatten(2, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        if self.positions == "rope":
            positions = layout.positions if layout.positions.dim() == 2 else layout.positions[..., 0]
            q, k = rotary(q, positions, self.rope_base), rotary(k, positions, self.rope_base)

        if state is None:
            ids = layout.segment_ids
            boundaries = None if ids is None else layout.boundaries
            mixed = attention(
                q, k, v, causal=self.causal, window=self.window, query_ids=ids, key_ids=ids, slopes=self.slopes,
                boundaries=boundaries,
            )  # fmt: skip
            after = None
        else:
            if not self.causal:
                raise ValueError("attention that sees later tokens cannot carry a state from window to window")
            k = torch.cat([state.keys.to(k.dtype), k], dim=1)
            v = torch.cat([state.values.to(v.dtype), v], dim=1)
            query_ids, key_ids, carried = self._identify(layout, state)
            mixed = attention(q, k, v, window=self.window, query_ids=query_ids, key_ids=key_ids, slopes=self.slopes)
            after = self._carry(k, v, carried, layout)
        return self.out_proj(mixed.flatten(2)), after

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> AttentionState:
        empty = torch.zeros(rows, 0, self.kv_heads, self.head_dim, device=device, dtype=dtype)
        return AttentionState(empty, empty)

    def _identify(
        self, layout: SequenceLayout, state: AttentionState
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Ids of queries and of all keys, and which keys belong to the segment that goes on after this window; None
        where all do."""
        rows, length = layout.shape
        ids = layout.segment_ids
        if ids is None or layout.starts is None:
            if state.valid is None:
                return None, None, None
            query_ids = torch.ones(rows, length, dtype=torch.int32, device=state.keys.device)
            key_ids = torch.cat([torch.where(state.valid, 1, -1).to(torch.int32), query_ids], dim=1)
            return query_ids, key_ids, key_ids == 1
        # A row that is all padding leaves its cache as it is; id 1 stands for the segment it would go on with.
        occupied = layout.lengths > 0
        first = torch.where(occupied & ~layout.starts[:, 0], ids[:, 0], torch.where(occupied, -1, 1))
        last = torch.where(occupied, ids.gather(1, (layout.lengths - 1).clamp(min=0)[:, None])[:, 0], 1)
        cached = first[:, None].expand(state.keys.shape[:2])
        if state.valid is not None:
            cached = torch.where(state.valid, cached, -1)
        key_ids = torch.cat([cached.to(ids.dtype), ids.masked_fill(ids == 0, -1)], dim=1)
        return ids, key_ids, key_ids == last[:, None]

    def _carry(self, k: Tensor, v: Tensor, carried: Tensor | None, layout: SequenceLayout) -> AttentionState:
        """Keep what the tokens after this window may see, moved so that each row's last token stands last."""
        keep = k.shape[1] if self.window is None else min(k.shape[1], self.window - 1)
        if layout.segment_ids is None or carried is None:
            first = k.shape[1] - keep
            return AttentionState(k[:, first:], v[:, first:], None if carried is None else carried[:, first:])
        padding = layout.shape[1] - layout.lengths
        index = torch.arange(k.shape[1] - keep, k.shape[1], device=k.device) - padding[:, None]
        valid = carried.gather(1, index.clamp(min=0)) & (index >= 0)
        wide = index.clamp(min=0)[..., None, None].expand(-1, -1, *k.shape[2:])
        return AttentionState(k.gather(1, wide), v.gather(1, wide), valid)
