"""Attention to a few blocks that a query chooses: MoBA and native sparse attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seqlong.kernels.attention import attention, summary_attention
from seqlong.kernels.block_attention import block_attention, choose_blocks
from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, positive
from seqlong.mixers.cache import AttentionState, each_segment
from seqlong.positions import check_axes, rotary_axes

if TYPE_CHECKING:
    from seqlong.cost import Cost

#: Queries that choose at a time: their scores of all blocks are held.
PIECE = 512


class _BlockSparse(Mixer):
    """What both share: projections, rotation, a cache of all keys and values, blocks counted from a segment's start."""

    residual_projections = ("out_proj",)
    branches = 1

    def __init__(
        self, d_model: int, heads: int, kv_heads: int | None, head_dim: int | None, block: int, chosen: int,
        positions: str, rope_base: float,
    ) -> None:  # fmt: skip
        super().__init__()
        name = type(self).__name__
        positive(name, heads=heads, head_dim=head_dim, rope_base=rope_base)
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ValueError(f"{name} needs heads divisible by kv_heads, found {heads} and {self.kv_heads}")
        if head_dim is None and d_model % heads:
            raise ValueError(f"{name} needs d_model divisible by heads, found d_model={d_model}, heads={heads}")
        if block < 1 or chosen < 1:
            raise ValueError(
                f"{name} needs blocks of at least 1 token, and at least 1 of them, found {block}, {chosen}"
            )
        self.head_dim = d_model // heads if head_dim is None else head_dim
        self.block, self.chosen, self.positions, self.rope_base = block, chosen, positions, rope_base
        if positions == "rope":
            check_axes("rope", [self.head_dim], self.head_dim)
        self.qkv_proj = nn.Linear(d_model, (heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out_proj = nn.Linear(heads * self.head_dim, d_model, bias=False)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: AttentionState | None = None
    ) -> tuple[Float[Tensor, "b t d"], AttentionState | None]:
        if layout.padding is not None:
            hidden = hidden.masked_fill(layout.padding[..., None], 0)
        qkv = self.qkv_proj(hidden).unflatten(2, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        if self.positions == "rope":
            places = layout.positions if layout.positions.dim() == 2 else layout.positions[..., 0]
            q, k = (rotary_axes(x, places, [self.head_dim], self.rope_base) for x in (q, k))
        mixed, after = each_segment(self.attend, q, k, v, self.branches * self.head_dim, layout, state)
        return self.out_proj(self.finish(mixed, hidden).flatten(2)), after

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "b t h w"]:
        """One segment: queries are the last of the keys."""
        raise NotImplementedError

    def finish(self, mixed: Float[Tensor, "b t h w"], hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h v"]:
        """The result of each head."""
        return mixed

    def means(self, x: Float[Tensor, "b s g k"]) -> Float[Tensor, "b n g k"]:
        """Of each block that is whole."""
        whole = x.shape[1] // self.block
        return x[:, : whole * self.block].unflatten(1, (whole, self.block)).mean(dim=2)

    @torch.no_grad()
    def choose(
        self, q: Float[Tensor, "b t h k"], means: Float[Tensor, "b n g k"], offset: int, together: bool
    ) -> Int[Tensor, "b t j c"]:
        """The blocks before its own that each query takes: by scores of each head, or by those of the heads that share
        keys, summed after a softmax over the blocks that the query sees."""
        count, found = self.chosen - 1, []
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        for start in range(0, q.shape[1], PIECE):
            queries = q[:, start : start + PIECE].to(wide)
            place = torch.arange(start, start + queries.shape[1], device=q.device) + offset
            most = (offset + start + queries.shape[1]) // self.block  # blocks that end before or at the last query
            keys = means[:, :most].to(wide)
            scores = torch.einsum("bpgrk,bngk->bpgrn", queries.unflatten(2, (self.kv_heads, -1)), keys)
            blocks = torch.arange(most, device=q.device)
            if together:
                ended = ((blocks + 1) * self.block <= place[:, None] + 1)[None, :, None, None]
                scores = (scores / self.head_dim**0.5).masked_fill(~ended, -torch.inf)
                scores = scores.softmax(-1).sum(dim=3)
            else:
                scores = scores.flatten(2, 3)
            before = (blocks < (place // self.block)[:, None])[None, :, None]
            taken = choose_blocks(scores.masked_fill(~before, -torch.inf), count)
            found.append(nn.functional.pad(taken, (0, count - taken.shape[3]), value=-1))
        return torch.cat(found, dim=1)

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> AttentionState:
        empty = torch.zeros(rows, 0, self.kv_heads, self.head_dim, device=device, dtype=dtype)
        return AttentionState(empty, empty)

    def seen_in_blocks(self, length: int) -> float:
        """Tokens of its own and its chosen blocks that a token sees: the mean over a row."""
        whole, rest = divmod(length, self.block)
        own = whole * self.block * (self.block + 1) / 2 + rest * (rest + 1) / 2
        most, few = self.chosen - 1, min(self.chosen - 1, whole)
        others = few * (few - 1) / 2 + (whole - few) * most  # Σ min(most, block) over whole ones
        return (own + self.block * (self.block * others + rest * min(most, whole))) / length

    def blocks_before(self, length: int) -> float:
        """Blocks that are whole before a token: the mean over a row."""
        whole, rest = divmod(length, self.block)
        return (self.block * whole * (whole - 1) / 2 + rest * whole) / length


class MoBA(_BlockSparse):
    """Mixture of block attention: softmax attention over a query's own block and the best few before it.

    ``o_i = Σ_j softmax_j(q_i·k_j / √k) v_j`` over j <= i in i's own block, and in the ``chosen - 1`` earlier blocks m
    with the largest ``q_i·mean(k_m)``; each head chooses for itself, without a gradient, and of two blocks that score
    the same takes the earlier. Blocks are counted from the beginning of a segment. Without learnt parameters for the
    choice. Source: arXiv 2502.13189.

    Args:
        d_model: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads, shared by equal groups; as many as ``heads`` if not given.
        head_dim: width of a head; ``d_model / heads`` if not given.
        block: tokens a block.
        chosen: blocks that a query sees, its own included.
        positions: ``rope`` rotates queries and keys, ``none`` leaves order to other mixers.
        rope_base: the longest wavelength of the rotation is about ``2π · rope_base`` tokens.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        block: int = 512,
        chosen: int = 3,
        positions: Literal["rope", "none"] = "rope",
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__(d_model, heads, kv_heads, head_dim, block, chosen, positions, rope_base)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "b t h v"]:
        chosen = self.choose(q, self.means(k.detach()), k.shape[1] - q.shape[1], together=False)
        return block_attention(q, k, v, chosen, self.block)

    def cost(self, length: int, dtype: torch.dtype = torch.bfloat16) -> Cost:
        """See ``seqlong.cost``."""
        from seqlong.cost import Term, cached

        width = self.heads * self.head_dim
        choice = Term("choice", 2.0 * width * self.blocks_before(length), "2 · heads · head_dim · blocks before", True)
        what, flops = (
            "4 · heads · head_dim · tokens of its own and its chosen blocks",
            4 * width * self.seen_in_blocks(length),
        )
        state = 2 * self.kv_heads * self.head_dim * dtype.itemsize
        return cached(self, flops, what, state, length, grows=length < self.chosen * self.block, others=(choice,))


class NativeSparseAttention(_BlockSparse):
    """Three kinds of softmax attention, added up by gates: ``o = Σ_c σ(g_c) Attn_c``, a gate a head from the input.

    Compressed: over the means of keys and of values of every block that ended (0 while there is none). Selected: over
    the tokens of the query's own block, and of the ``chosen - 1`` earlier blocks that the compressed kind gives the
    most weight, summed over the heads that share keys, which choose together (without a gradient; the earlier of
    equal ones). Local: over a sliding window.

    As in public code, and simpler than the paper: blocks for compression and selection are the same and do not
    overlap, a mean takes the place of a small network, all three share keys and values, and only the own block is
    always selected. Source: arXiv 2502.11089.

    Args:
        d_model: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads; 16 or more heads a group keep a GPU busy.
        head_dim: width of a head; ``d_model / heads`` if not given.
        block: tokens a block.
        chosen: blocks that a query sees token by token, its own included.
        window: the local kind sees the tokens at a distance below this.
        positions: ``rope`` rotates queries and keys, ``none`` leaves order to other mixers.
        rope_base: the longest wavelength of the rotation is about ``2π · rope_base`` tokens.
    """

    branches = 3

    def __init__(
        self,
        d_model: int,
        heads: int = 16,
        kv_heads: int | None = 1,
        head_dim: int | None = None,
        block: int = 64,
        chosen: int = 16,
        window: int = 512,
        positions: Literal["rope", "none"] = "rope",
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__(d_model, heads, kv_heads, head_dim, block, chosen, positions, rope_base)
        if window < 1:
            raise ValueError(f"NativeSparseAttention needs a window of at least 1 token, found {window}")
        self.window = window
        self.gate_proj = nn.Linear(d_model, 3 * heads, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "b t h w"]:
        offset = k.shape[1] - q.shape[1]
        means = self.means(k)
        # A block is seen from its last token on: offset + 1.
        compressed = summary_attention(q, means, self.means(v), self.block, offset + 1)
        chosen = self.choose(q, means, offset, together=True)
        selected = block_attention(q, k, v, chosen, self.block)
        return torch.cat([compressed, selected, attention(q, k, v, window=self.window)], dim=3)

    def finish(self, mixed: Float[Tensor, "b t h w"], hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h v"]:
        gates = torch.sigmoid(self.gate_proj(hidden)).unflatten(2, (self.heads, 3, 1))
        return (gates * mixed.unflatten(3, (3, self.head_dim))).sum(dim=3)

    def cost(self, length: int, dtype: torch.dtype = torch.bfloat16) -> Cost:
        """See ``seqlong.cost``."""
        from seqlong.cost import Term, cached, seen

        width = self.heads * self.head_dim
        blocks = self.blocks_before(length) + length // self.block / length  # a block is seen from its last token
        choice = Term(
            "choice", 6.0 * width * blocks, "6 · heads · head_dim · blocks: to attend to them, to choose", True
        )
        what = "4 · heads · head_dim · tokens of its own and its chosen blocks, and of its window"
        flops = 4 * width * (self.seen_in_blocks(length) + seen(length, self.window))
        state = 2 * self.kv_heads * self.head_dim * dtype.itemsize
        grows = length < max(self.window, self.chosen * self.block)
        return cached(self, flops, what, state, length, grows=grows, others=(choice,))
