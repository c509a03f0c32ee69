"""LatentAttention: attention whose cache is one short vector a token, from which all keys and values are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqlong.kernels.attention import attention
from seqlong.kernels.norm import rms_norm
from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, positive
from seqlong.mixers.cache import AttentionState, Seen, carry, join
from seqlong.positions import check_axes, rotary_axes

if TYPE_CHECKING:
    from seqlong.cost import Cost


class LatentAttention(Mixer):
    """``o_h = softmax((q_h·k_h + q_h'·k') / √(k + r)) v_h``, ``[k_h, v_h] = W_h c`` and ``c = RMSNorm(W x)``.

    The latent c has ``kv_rank`` numbers for all heads; k', the ``rope_dim`` channels of a key that carry its position,
    is one for all heads. Both are the whole cache: ``kv_rank + rope_dim`` numbers a token, whatever ``heads`` is.
    Queries may come from a latent of their own, ``W_h RMSNorm(W x)``.

    The same in two ways. A long window makes the keys and values of all heads. For a few queries after a cache, as in
    decoding, that would make them again for every token seen; there ``q_h·W_h c = (W_hᵀ q_h)·c`` and
    ``Σ p W_h c = W_h Σ p c``, so that all heads attend to the latents themselves, as to one key and value head. Which
    one, the number of products decides. (Multi-head latent attention, MLA.) Source: arXiv 2405.04434; without rotation
    arXiv 2510.26692.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        head_dim: channels of a query and key without position (k); d_model over ``heads`` if not given.
        rope_dim: channels of a query and key with position (r), even; half of ``head_dim`` if not given.
        value_dim: channels of a value; ``head_dim`` if not given.
        kv_rank: numbers of the latent that keys and values are made of; four times ``head_dim`` if not given.
        q_rank: numbers of the latent that queries are made of; from x itself if not given.
        positions: ``rope`` rotates the channels with position, ``none`` leaves them as they are.
        rope_base: the longest wavelength of the rotation is about ``2π · rope_base`` tokens.
        causal: whether a token sees only itself and earlier ones; false for masked language modelling.
        norm_eps: added to the mean square in the norms of the latents.
    """

    residual_projections = ("out_proj",)

    def __init__(
        self,
        d_model: int,
        heads: int = 8,
        head_dim: int | None = None,
        rope_dim: int | None = None,
        value_dim: int | None = None,
        kv_rank: int | None = None,
        q_rank: int | None = None,
        positions: Literal["rope", "none"] = "rope",
        rope_base: float = 10000.0,
        causal: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        positive("LatentAttention", heads=heads, rope_base=rope_base)
        if head_dim is None and d_model % heads:
            raise ValueError(f"LatentAttention needs d_model divisible by heads, found {d_model} and {heads}")
        self.heads, self.head_dim = heads, d_model // heads if head_dim is None else head_dim
        self.rope_dim = max(2, self.head_dim // 4 * 2) if rope_dim is None else rope_dim
        self.value_dim = self.head_dim if value_dim is None else value_dim
        self.kv_rank = 4 * self.head_dim if kv_rank is None else kv_rank
        sizes = (heads, self.head_dim, self.rope_dim, self.value_dim, self.kv_rank, 1 if q_rank is None else q_rank)
        if min(sizes) < 1:
            raise ValueError(
                f"LatentAttention needs positive sizes, found heads={heads}, head_dim={self.head_dim}, "
                f"rope_dim={self.rope_dim}, value_dim={self.value_dim}, kv_rank={self.kv_rank}, q_rank={q_rank}"
            )
        check_axes("LatentAttention's rope_dim", [self.rope_dim], self.rope_dim)
        self.positions, self.rope_base, self.causal, self.norm_eps = positions, rope_base, causal, norm_eps
        self.width = self.head_dim + self.rope_dim
        self.q_down = None if q_rank is None else nn.Linear(d_model, q_rank, bias=False)
        self.q_norm = None if q_rank is None else nn.RMSNorm(q_rank, eps=norm_eps)
        self.q_proj = nn.Linear(d_model if q_rank is None else q_rank, heads * self.width, bias=False)
        self.kv_down = nn.Linear(d_model, self.kv_rank + self.rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(self.kv_rank, eps=norm_eps)
        self.kv_up = nn.Linear(self.kv_rank, heads * (self.head_dim + self.value_dim), bias=False)
        self.out_proj = nn.Linear(heads * self.value_dim, d_model, bias=False)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: AttentionState | None = None
    ) -> tuple[Float[Tensor, "b t d"], AttentionState | None]:
        if layout.padding is not None:
            hidden = hidden.masked_fill(layout.padding[..., None], 0)
        if state is not None and not self.causal:
            raise ValueError("attention that sees later tokens cannot carry a state from window to window")
        q, entry = self._queries(hidden, layout), self._entry(hidden, layout)
        if state is None:
            ids = layout.segment_ids
            boundaries = None if ids is None else layout.boundaries
            k, v = self._expanded(entry)
            mixed = attention(q, k, v, causal=self.causal, query_ids=ids, key_ids=ids, boundaries=boundaries)
            return self.out_proj(mixed.flatten(2)), None
        seen = join(entry, entry[..., :0], layout, state)
        if self.absorbs(q.shape[1]):
            mixed = self._absorbed(q, seen)
        else:
            k, v = self._expanded(seen.keys)
            mixed = attention(q, k, v, query_ids=seen.query_ids, key_ids=seen.key_ids)
        return self.out_proj(mixed.flatten(2)), carry(seen, layout)

    def absorbs(self, queries: int) -> bool:
        """Whether so many queries take fewer products with the latents than with all heads' keys and values."""
        apart = self.head_dim + self.value_dim
        return queries * (2 * self.kv_rank - apart) < self.kv_rank * apart

    def _queries(self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout) -> Float[Tensor, "b t h k"]:
        if self.q_down is not None and self.q_norm is not None:
            hidden = rms_norm(self.q_down(hidden), self.q_norm.weight, self.norm_eps)
        plain, placed = self.q_proj(hidden).unflatten(2, (self.heads, -1)).split([self.head_dim, self.rope_dim], dim=-1)
        return torch.cat([plain, self._placed(placed, layout)], dim=-1)

    def _entry(self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout) -> Float[Tensor, "b t 1 e"]:
        """What the cache keeps of each token: its latent, and its key with position."""
        latent, placed = self.kv_down(hidden).split([self.kv_rank, self.rope_dim], dim=-1)
        latent = rms_norm(latent, self.kv_norm.weight, self.norm_eps)
        return torch.cat([latent[:, :, None], self._placed(placed[:, :, None], layout)], dim=-1)

    def _placed(self, x: Float[Tensor, "b t h r"], layout: SequenceLayout) -> Float[Tensor, "b t h r"]:
        if self.positions == "none":
            return x
        places = layout.positions if layout.positions.dim() == 2 else layout.positions[..., 0]
        return rotary_axes(x, places, [self.rope_dim], self.rope_base)

    def _expanded(self, entry: Float[Tensor, "b s 1 e"]) -> tuple[Float[Tensor, "b s h k"], Float[Tensor, "b s h v"]]:
        """Keys and values of all heads."""
        latent, placed = entry.split([self.kv_rank, self.rope_dim], dim=-1)
        made = self.kv_up(latent.squeeze(2)).unflatten(2, (self.heads, -1))
        k, v = made.split([self.head_dim, self.value_dim], dim=-1)
        return torch.cat([k, placed.to(k.dtype).expand(-1, -1, self.heads, -1)], dim=-1), v

    def _absorbed(self, q: Float[Tensor, "b t h k"], seen: Seen) -> Float[Tensor, "b t h v"]:
        """The same, with the latents as keys and values of all heads."""
        weight = self.kv_up.weight.to(q.dtype).unflatten(0, (self.heads, -1))
        keys, values = weight.split([self.head_dim, self.value_dim], dim=1)
        plain, placed = q.split([self.head_dim, self.rope_dim], dim=-1)
        q = torch.cat([torch.einsum("bthk,hkr->bthr", plain, keys), placed], dim=-1)
        q = q * (q.shape[-1] / self.width) ** 0.5  # attention divides by the root of what is now wider
        latents = seen.keys[..., : self.kv_rank]
        mixed = attention(q, seen.keys, latents, query_ids=seen.query_ids, key_ids=seen.key_ids)
        return torch.einsum("bthr,hvr->bthv", mixed, values)

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> AttentionState:
        empty = torch.zeros(rows, 0, 1, self.kv_rank + self.rope_dim, device=device, dtype=dtype)
        return AttentionState(empty, empty[..., :0])

    def cost(self, length: int, dtype: torch.dtype = torch.bfloat16) -> Cost:
        """See ``seqlong.cost``: with the keys and values of all heads made, as in training."""
        from seqlong.cost import Cost, Term, products, seen

        flops = 2 * self.heads * (self.width + self.value_dim) * seen(length, None, self.causal)
        term = Term("attention", flops, "2 · heads · (head_dim + rope_dim + value_dim) · tokens seen", grows=True)
        each = (self.kv_rank + self.rope_dim) * dtype.itemsize
        if not self.causal:
            return Cost((*products(self), term), None, "needs the whole row")
        return Cost((*products(self), term), each * length, f"{each:,} B a token")
