"""RAT: a recurrence inside chunks, attention over what the chunks came to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, positive
from seqlong.mixers.cache import places
from seqlong.mixers.linear import precise, split_heads
from seqlong.mixers.summaries import SummaryState, attend_summaries
from seqlong.positions import rotary

if TYPE_CHECKING:
    from seqlong.cost import Cost


class Rat(Mixer):
    """``ṽ_t = g_t ⊙ ṽ_{t-1} + (1 - g_t) ⊙ v_t``, the same for k̃, both from 0 in each chunk; then attention of ``q_t``
    over ``(k̃, ṽ)`` of the last token of every earlier chunk and of t itself, times ``σ(W x_t)``.

    ``g_t = σ(W x_t + b)``, a number a channel; b starts as log u, u uniform in [1, chunk - 1]: means over 1 + u tokens.
    Chunks are counted from the beginning of a segment, and a segment need not be whole chunks. Rotation is by the
    number of the chunk. Between attention (chunk 1 with g = 0) and a plain recurrence (chunks as long as the row). Each
    head has its own queries and keys; the paper's parameter-matched models share them. Source: arXiv 2507.04416.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        chunk: tokens a chunk; the state has one entry for each.
        positions: ``rope`` rotates queries and keys by the number of their chunk, ``none`` does not.
        rope_base: the longest wavelength of the rotation is about ``2π · rope_base`` chunks.
    """

    residual_projections = ("out_proj",)

    def __init__(
        self,
        d_model: int,
        heads: int = 8,
        chunk: int = 16,
        positions: Literal["rope", "none"] = "rope",
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__()
        positive("Rat", rope_base=rope_base)
        self.heads, self.head_dim = heads, split_heads("Rat", d_model, heads)
        if chunk < 1:
            raise ValueError(f"Rat needs chunks of at least 1 token, found {chunk}")
        if positions == "rope" and self.head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, found {self.head_dim}")
        self.chunk, self.positions, self.rope_base = chunk, positions, rope_base
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.forget_proj = nn.Linear(d_model, d_model, bias=False)
        # σ(b) = u / (1 + u), and a mean over n tokens has g = (n - 1) / n.
        self.forget_bias = nn.Parameter(torch.empty(d_model).uniform_(1, max(1, chunk - 1)).log())
        self.gate_proj = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: SummaryState | None = None
    ) -> tuple[Float[Tensor, "b t d"], SummaryState | None]:
        if layout.padding is not None:
            hidden = hidden.masked_fill(layout.padding[..., None], 0)
        q, k, v = self.qkv_proj(hidden).chunk(3, dim=-1)
        rows = hidden.shape[0]
        count = torch.zeros(rows, dtype=torch.int64, device=hidden.device) if state is None else state.count(self.chunk)
        place = places(count, layout)
        kv = self.recur(torch.cat([k, v], dim=-1), hidden, place % self.chunk == 0, state)
        k, v = kv.to(q.dtype).chunk(2, dim=-1)
        q, k, v = (x.unflatten(2, (self.heads, self.head_dim)) for x in (q, k, v))
        if self.positions == "rope":
            q, k = (rotary(x, place // self.chunk, self.rope_base) for x in (q, k))
        mixed, after = attend_summaries(q, k, v, kv, self.chunk, layout, state)
        return self.out_proj(torch.sigmoid(self.gate_proj(hidden)) * mixed.flatten(2)), after

    def recur(
        self, kv: Float[Tensor, "b t w"], hidden: Float[Tensor, "b t d"], first: Tensor, state: SummaryState | None
    ) -> Float[Tensor, "b t w"]:
        """Keys and values averaged inside their chunks, ``first`` ``(b t)`` where one begins: a scan by doubling, in
        as many steps as a chunk has binary digits, since nothing passes from chunk to chunk."""
        forget = torch.sigmoid(self.forget_proj(hidden).to(precise(self.forget_bias, kv).dtype) + self.forget_bias)
        forget = torch.cat([forget, forget], dim=-1)
        mixed, forget = (1 - forget) * kv, forget.masked_fill(first[..., None], 0)
        if state is not None and state.inside.shape[1] and kv.shape[1]:
            carried = forget[:, :1] * state.inside[:, -1:]
            mixed = torch.cat([mixed[:, :1] + carried, mixed[:, 1:]], dim=1)
        step = 1
        while step < min(self.chunk, kv.shape[1]):
            reached = forget[:, step:]
            mixed = torch.cat([mixed[:, :step], mixed[:, step:] + reached * mixed[:, :-step]], dim=1)
            forget = torch.cat([forget[:, :step], reached * forget[:, :-step]], dim=1)
            step *= 2
        return mixed

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> SummaryState:
        empty = torch.zeros(rows, 0, self.heads, self.head_dim, device=device, dtype=dtype)
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        return SummaryState(
            empty, empty, torch.zeros(rows, 0, 2 * self.heads * self.head_dim, device=device, dtype=kept)
        )

    def cost(self, length: int, dtype: torch.dtype = torch.bfloat16) -> Cost:
        """See ``seqlong.cost``."""
        from seqlong.cost import Cost, Term, products

        width = self.heads * self.head_dim
        flops = 4 * width * (1 + summaries_seen(length, self.chunk))
        terms = (
            Term("recurrence", 6.0 * width, "3 a channel of k and of v: decay 1, (1 - g) v 1, add 1"),
            Term("attention", flops, "4 · heads · head_dim · chunks before, and the token itself", True),
        )
        ended, begun = divmod(length, self.chunk)
        inside = 4 if dtype != torch.float64 else 8
        return Cost(
            (*products(self), *terms), 2 * width * (ended * dtype.itemsize + begun * inside),
            f"{2 * width * dtype.itemsize:,} B a chunk of {self.chunk}",
        )  # fmt: skip


def summaries_seen(length: int, chunk: int) -> float:
    """Chunks that ended before a token: the mean over a row."""
    whole, rest = divmod(length, chunk)
    return (chunk * whole * (whole - 1) / 2 + rest * whole) / length
