"""Softmax attention: full or sliding window; multi-head, grouped or multi-query; with a cache as its state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqlong.fragment import Fragment
from seqlong.kernels.attention import attention
from seqlong.kernels.norm import rms_norm
from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, positive
from seqlong.mixers.cache import AttentionState, Seen, SinkState, carry, carry_sinks, join, join_sinks
from seqlong.positions import alibi_slopes, check_axes, rotary_axes


class Attention(Mixer):
    """``o_i = Σ_j softmax_j(q_i·k_j / √k) v_j`` over the tokens j that i may see.

    With ``qk_norm``, q and k pass an RMSNorm before they are rotated. With ``gate``, a head's result is multiplied with
    ``σ(W x)`` before the last projection: channel by channel (Qwen3-Next's form: its own gate for each head and
    channel), or with one number a head. With ``sinks``, the first tokens of a segment stay visible beyond the window,
    at the positions that they have (not moved up to the window, so that a row split anywhere is the row).

    Source: arXiv 1706.03762; grouped heads arXiv 2305.13245; sliding window arXiv 2004.05150; sinks arXiv 2309.17453;
    gate arXiv 2505.06708; qk_norm arXiv 2302.05442, 2505.09388.

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
        rope_scale: positions are divided by this before rotating: a model trained on rows of L tokens then reads rows
            of ``rope_scale · L`` with angles that it knows (linear interpolation).
        partial_rotary: part of a head's channels that is rotated, the first ones; pairs, rounded down.
        rope_axes: channels of a head that each axis of the positions rotates, such as [16, 24, 24] for time, height
            and width; the rest is left as it is. All of them by the first axis if not given.
        causal: whether a token sees only itself and earlier ones; false for masked language modelling.
        bias: whether the projections have biases.
        sinks: tokens at the beginning of a segment that stay visible beyond ``window``.
        qk_norm: whether queries and keys are normed: true, each head by itself (Qwen3); ``row``, all heads together,
            with a weight a channel (OLMoE).
        norm_eps: added to the mean square in these norms.
        gate: whether the result is gated: true, channel by channel; ``head``, by one number a head.
    """

    residual_projections = ("out_proj",)
    sequence_parallel = True

    def __init__(
        self,
        d_model: int,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        positions: Literal["rope", "alibi", "none"] = "rope",
        rope_base: float = 10000.0,
        rope_scale: float = 1.0,
        partial_rotary: float = 1.0,
        rope_axes: Sequence[int] | None = None,
        causal: bool = True,
        bias: bool = False,
        sinks: int = 0,
        qk_norm: bool | Literal["row"] = False,
        norm_eps: float = 1e-6,
        gate: bool | Literal["head"] = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        positive(name, heads=heads, head_dim=head_dim, rope_base=rope_base)
        self.heads = heads
        self.kv_heads = heads if kv_heads is None else kv_heads
        if head_dim is None and d_model % heads:
            raise ValueError(f"{name} needs d_model divisible by heads, found d_model={d_model}, heads={heads}")
        self.head_dim = d_model // heads if head_dim is None else head_dim
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{name} needs heads divisible by kv_heads, found {self.heads} and {self.kv_heads}")
        if positions == "rope" and rope_axes is None and partial_rotary == 1 and self.head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, found {self.head_dim}")
        if not 0 < partial_rotary <= 1 or (rope_axes is not None and partial_rotary != 1):
            raise ValueError(
                f"{name} needs a partial_rotary above 0 and up to 1, and without rope_axes, which says the same; "
                f"found {partial_rotary}"
            )
        if rope_scale <= 0:
            raise ValueError(f"{name} needs a rope_scale above 0, found {rope_scale}")
        if sinks and (sinks < 0 or window is None or not causal or positions == "alibi"):
            raise ValueError(
                f"sinks are tokens kept beyond a window, before a token, at no slope: {name} needs window, "
                f"causal=True and positions 'rope' or 'none' with them, found sinks={sinks}, window={window}, "
                f"causal={causal}, positions={positions}"
            )
        self.axes = list(rope_axes) if rope_axes is not None else [int(self.head_dim * partial_rotary) // 2 * 2]
        if positions == "rope":
            check_axes("rope", self.axes, self.head_dim)
        if window is not None and window < 1:
            raise ValueError(f"{name} needs a window of at least 1 token, found {window}")
        self.window = window
        self.bounded_state = window is not None
        self.positions = positions
        self.rope_base, self.rope_scale = rope_base, rope_scale
        self.causal, self.sinks = causal, sinks
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(d_model, width, bias=bias)
        self.out_proj = nn.Linear(self.heads * self.head_dim, d_model, bias=bias)
        gates = self.heads * (1 if gate == "head" else self.head_dim)
        self.gate_proj = nn.Linear(d_model, gates, bias=bias) if gate else None
        together = (self.heads, self.kv_heads) if qk_norm == "row" else (1, 1)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(heads * self.head_dim, eps=norm_eps) if qk_norm else None for heads in together
        )
        self.norm_eps = norm_eps
        slopes = torch.tensor(alibi_slopes(heads)) if positions == "alibi" else None
        self.slopes: Tensor | None
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: AttentionState | SinkState | None = None
    ) -> tuple[Float[Tensor, "b t d"], AttentionState | SinkState | None]:
        return self.publish(hidden, layout, state)[:2]

    def publish(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: AttentionState | SinkState | None = None
    ) -> tuple[Float[Tensor, "b t d"], AttentionState | SinkState | None, Seen]:
        """``forward``, and the keys and values that it attended to, those of the cache first."""
        if layout.padding is not None:
            hidden = hidden.masked_fill(layout.padding[..., None], 0)
        q, k, v = self._project(hidden, layout)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._normed(q, self.q_norm.weight), self._normed(k, self.k_norm.weight)
        if self.positions == "rope":
            places = layout.positions if layout.positions.dim() == 2 or len(self.axes) > 1 else layout.positions[..., 0]
            q, k = (rotary_axes(x, places, self.axes, self.rope_base, self.rope_scale) for x in (q, k))
        mixed, after, seen = self._attend(q, k, v, layout, state)
        return self._write(mixed, hidden, layout), after, seen

    def _project(self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout) -> tuple[Tensor, ...]:
        """Queries ``(b t h k)``, keys and values ``(b t g k)``; hidden is zero at padding."""
        qkv = self.qkv_proj(hidden).unflatten(2, (-1, self.head_dim))
        return qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)

    def _write(
        self, mixed: Float[Tensor, "b t h v"], hidden: Float[Tensor, "b t d"], layout: SequenceLayout
    ) -> Float[Tensor, "b t d"]:
        """What the heads' results add to the residual stream."""
        return self.out_proj(self._weigh(mixed, hidden).flatten(2))

    def _normed(self, x: Float[Tensor, "b t h k"], weight: Float[Tensor, "w"]) -> Float[Tensor, "b t h k"]:
        """RMSNorm of each head, or of all together."""
        if len(weight) == self.head_dim:
            return rms_norm(x, weight, self.norm_eps)
        return rms_norm(x.flatten(2), weight, self.norm_eps).view_as(x)

    def _weigh(self, mixed: Float[Tensor, "b t h v"], hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h v"]:
        """The heads' results, gated if there is a gate."""
        if self.gate_proj is None:
            return mixed
        return mixed * torch.sigmoid(self.gate_proj(hidden)).unflatten(2, (self.heads, -1))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, state: AttentionState | SinkState | None
    ) -> tuple[Float[Tensor, "b t h v"], AttentionState | SinkState | None, Seen]:
        if layout.fragment is not None:
            return self._attend_across(q, k, v, layout.fragment, state), None, Seen(k, v)
        if state is None:
            ids = layout.segment_ids
            boundaries = None if ids is None else layout.boundaries
            return attention(
                q, k, v, causal=self.causal, window=self.window, query_ids=ids, key_ids=ids, slopes=self.slopes,
                boundaries=boundaries, sinks=self.sinks,
            ), None, Seen(k, v, ids, ids)  # fmt: skip
        if not self.causal:
            raise ValueError("attention that sees later tokens cannot carry a state from window to window")
        after: AttentionState | SinkState
        if isinstance(state, SinkState):
            assert self.window is not None
            seen, place = join_sinks(k, v, layout, state)
            after = carry_sinks(seen, place, layout, state, self.window)
        else:
            seen = join(k, v, layout, state)
            after = carry(seen, layout, self.window)
        return attention(
            q, seen.keys, seen.values, window=self.window, query_ids=seen.query_ids, key_ids=seen.key_ids,
            slopes=self.slopes, sinks=self.sinks, always=seen.always,
        ), after, seen  # fmt: skip

    def _attend_across(
        self, q: Tensor, k: Tensor, v: Tensor, fragment: Fragment, state: AttentionState | SinkState | None
    ) -> Float[Tensor, "b n h v"]:
        """Rows that several processes hold: each attends with a part of the heads to whole rows (Ulysses, arXiv
        2309.14509); where heads do not divide, with all heads of its queries to gathered keys and values."""
        if state is not None:
            raise ValueError("rows that several processes hold carry no state")
        size, whole = fragment.size, fragment.whole
        if q.shape[2] % size:
            q, k, v = (fragment.join(x) for x in (q, k, v))
            return fragment.own(self._attend(q, k, v, whole, None)[0])
        if k.shape[2] % size:  # as few copies of each as make them divisible, but whole groups
            copies = min(
                n for n in range(1, q.shape[2] + 1) if not (k.shape[2] * n) % size and not q.shape[2] % (k.shape[2] * n)
            )
            k, v = (x.repeat_interleave(copies, dim=2) for x in (k, v))
        ids = whole.segment_ids
        slopes = None if self.slopes is None else self.slopes.chunk(size)[fragment.rank]
        mixed = attention(
            *(fragment.to_heads(x) for x in (q, k, v)), causal=self.causal, window=self.window, query_ids=ids,
            key_ids=ids, slopes=slopes, boundaries=None if ids is None else whole.boundaries, sinks=self.sinks,
        )  # fmt: skip
        return fragment.to_positions(mixed)

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> AttentionState | SinkState:
        empty = torch.zeros(rows, 0, self.kv_heads, self.head_dim, device=device, dtype=dtype)
        if not self.sinks:
            return AttentionState(empty, empty)
        first = torch.zeros(rows, self.sinks, self.kv_heads, self.head_dim, device=device, dtype=dtype)
        return SinkState(empty, empty, first, first, torch.zeros(rows, dtype=torch.int64, device=device))
