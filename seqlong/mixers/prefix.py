"""Mixers that read the beginning of each segment in both directions, as far as the batch says (``layout.prefix``).

A prompt is given whole, so nothing is lost by letting its tokens see one another. What a causal model reads of a long
prompt depends on what stands first in it; with the prefix read both ways it does not (arXiv 2407.05483, 2411.01030).
Without a prefix these are the causal mixers that they are made of.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.kernels.attention import attention
from seqlong.layout import SequenceLayout
from seqlong.mixers.attention import Attention
from seqlong.mixers.base import Mixer, MixerFactory
from seqlong.mixers.cache import AttentionState, Seen, SinkState

if TYPE_CHECKING:
    from seqlong.cost import Cost


def divided(layout: SequenceLayout, prefix: Bool[Tensor, "b t"]) -> SequenceLayout:
    """The layout with each segment cut in two, behind its prefix."""
    ids = layout.segment_ids
    plain = torch.ones_like(prefix, dtype=torch.int32) if ids is None else ids
    parts = torch.where(plain == 0, 0, 2 * plain - prefix.to(plain.dtype))
    rows, length = layout.shape
    return SequenceLayout.build(rows, length, parts, layout.positions if layout.positions.dim() == 3 else None)


class PrefixMixer(Mixer):
    """``mixer(x)``, and in the prefix ``+ reverse(mixer(reverse(x)))`` over the prefix: two scans, one set of weights.

    What comes behind the prefix is read causally, and in later blocks sees a prefix that was read from both sides. A
    prefix is to be in one window: a row that goes on from a state may have one only where a segment begins. Rows are
    not run in tiles. Source: prefix linear attention, arXiv 2407.05483; bidirectional prefixes, arXiv 2411.01030.

    Args:
        d_model: width of the residual stream.
        mixer: the causal mixer.
    """

    def __init__(self, d_model: int, mixer: MixerFactory) -> None:
        super().__init__()
        self.mixer = mixer(d_model)
        kind = type(self.mixer).__name__
        if not self.mixer.causal:
            raise ValueError(f"{kind} already sees both sides; do not wrap it")
        if self.mixer.reads_memory:
            raise ValueError(f"{kind} reads another block's memory, which has no other direction; do not wrap it")
        if isinstance(self.mixer, Attention):
            raise ValueError(f"{kind} needs no second scan; take PrefixAttention")
        self.routed = self.mixer.routed

    def place(self, layer: int, layers: int) -> None:
        self.mixer.place(layer, layers)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: Any = None
    ) -> tuple[Float[Tensor, "b t d"], Any]:
        prefix, layout = layout.prefix, replace(layout, prefix=None)
        rightward, after = self.mixer(hidden, layout, state)
        if prefix is None:
            return rightward, after
        parts = divided(layout, prefix)
        leftward, _ = self.mixer(parts.reverse(hidden), parts.reversed)
        # Where a row has no prefix the other scan is thrown away, so nothing of it may reach the gradients.
        return rightward + parts.reverse(leftward).masked_fill(~prefix[..., None], 0), after

    def router_sums(self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout) -> dict[str, Tensor]:
        """Those of the mixer: its router sees each token by itself."""
        return self.mixer.router_sums(hidden, layout)

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> Any:
        return self.mixer.initial_state(rows, device, dtype)

    def cost(self, length: int, dtype: torch.dtype = torch.bfloat16) -> Cost:
        """See ``seqlong.cost``: the mixer's. A prefix costs as much again."""
        from seqlong.cost import mixer_cost

        return mixer_cost(self.mixer, length, dtype)


class PrefixAttention(Attention):
    """Attention whose prefix sees itself whole: ``j <= i``, or ``i`` and ``j`` both in the prefix of one segment.

    Two calls of the same op, causal over the segment and both ways over its prefix: no mask of t x t is stored. A
    prefix is to be in one window, the first of its row. Settings are those of ``Attention``. Source: arXiv 1910.10683.

    Args:
        d_model: see ``Attention``.
        heads: see ``Attention``.
        kv_heads: see ``Attention``.
        head_dim: see ``Attention``.
        window: see ``Attention``; in the prefix to both sides.
        rope_base: see ``Attention``.
        rope_scale: see ``Attention``.
        qk_norm: see ``Attention``.
    """

    sequence_parallel = False

    def __init__(
        self,
        d_model: int,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rope_base: float = 10000.0,
        rope_scale: float = 1.0,
        qk_norm: bool = False,
    ) -> None:
        super().__init__(
            d_model, heads, kv_heads, head_dim, window, rope_base=rope_base, rope_scale=rope_scale, qk_norm=qk_norm
        )
        self.bounded_state = False  # a prefix is not run in tiles

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, state: AttentionState | SinkState | None
    ) -> tuple[Float[Tensor, "b t h v"], AttentionState | SinkState | None, Seen]:
        mixed, after, seen = super()._attend(q, k, v, layout, state)
        if layout.prefix is None:
            return mixed, after, seen
        if seen.keys.shape[1] != k.shape[1]:
            raise ValueError("a prefix is read in one window, the first of its row; run the prompt at once")
        parts = divided(layout, layout.prefix)
        ids = parts.segment_ids
        both = attention(
            q, k, v, causal=False, window=self.window, query_ids=ids, key_ids=ids, boundaries=parts.boundaries
        )
        return torch.where(layout.prefix[..., None, None], both, mixed), after, seen
