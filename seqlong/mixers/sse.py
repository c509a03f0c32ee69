"""Sparse state expansion: a state of several parts, of which a token writes to and reads from a few."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqlong.kernels.norm import rms_norm
from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, positive
from seqlong.mixers.linear import LinearState, LowRank, precise, split_heads, still
from seqlong.mixers.recurrences import vector_decay
from seqlong.mixers.routing import router_sums


class SSE(Mixer):
    """``S_t^i = diag(exp(g_t)) S_{t-1}^i + e_i k_tᵀ v_t`` for parts i chosen, others stay; ``o_t = Σ_i e_i q_t S_t^i``.

    ``e = softmax(W x)``, of which the ``active`` largest are chosen; keys are a softmax over the channels of a head, q
    and v pass SiLU, ``g = logsigmoid(W₂ W₁ x + b) / divisor``. One more part, with e = 1, every token writes to and
    reads from; its q, k and g are its own, while those of the chosen parts are its q and k before activation plus
    low-rank maps. Then RMSNorm of each head, times SiLU of a low-rank gate. The parts share all weights, so a larger
    state has no more parameters. Computed over all parts, those not chosen with a key of zero and no decay: the work
    is that of all of them. Source: arXiv 2507.16577, in the form with the recurrence of GLA.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        parts: of the state, to choose from.
        active: parts that a token writes to and reads from.
        expand_k: width of all keys over d_model.
        expand_v: width of all values over d_model.
        decay_rank: numbers between the two layers that make a decay.
        divisor: of the decay's logarithm: how slowly memory fades at first.
        norm_eps: added to the mean square in the norm.
        balance_loss: weight of a loss that keeps the parts' loads even.
    """

    bounded_state = True
    routed = True
    residual_projections = ("out_proj",)

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        parts: int = 4,
        active: int = 1,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        decay_rank: int = 16,
        divisor: float = 16.0,
        norm_eps: float = 1e-5,
        balance_loss: float = 0.01,
    ) -> None:
        super().__init__()
        if not 1 <= active <= parts or balance_loss < 0:
            raise ValueError(
                f"SSE needs active from 1 to parts, and a balance_loss of 0 or more, found active {active} of {parts} "
                f"parts, balance_loss {balance_loss}"
            )
        positive("SSE", decay_rank=decay_rank, divisor=divisor)
        self.heads, self.parts, self.active = heads, parts, active
        self.key_dim, self.value_dim = (split_heads("SSE", int(d_model * x), heads) for x in (expand_k, expand_v))
        if min(self.key_dim, self.value_dim) < 1:
            raise ValueError(f"SSE needs heads of at least 1 channel, found expand_k={expand_k}, expand_v={expand_v}")
        self.divisor, self.norm_eps, self.balance_loss = divisor, norm_eps, balance_loss
        keys, values, rank = heads * self.key_dim, heads * self.value_dim, self.value_dim
        self.qkv_proj = nn.Linear(d_model, 2 * keys + values, bias=False)
        self.turn_proj = nn.ModuleList(LowRank(d_model, keys, rank, bias=False) for _ in range(2))  # of q and k
        self.decay_proj = nn.ModuleList(LowRank(d_model, keys, decay_rank) for _ in range(2))  # shared, of parts
        self.part_proj = nn.Linear(d_model, parts, bias=False)
        self.gate_proj = LowRank(d_model, values, rank, bias=False)
        self.norm = nn.RMSNorm(self.value_dim, eps=norm_eps)
        self.out_proj = nn.Linear(values, d_model, bias=False)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: LinearState | None = None
    ) -> tuple[Float[Tensor, "b t d"], LinearState | None]:
        hidden = still(hidden, layout.padding, 0.0)
        heads, every = (self.heads, self.key_dim), self.parts + 1
        keys = self.heads * self.key_dim
        q, k, v = self.qkv_proj(hidden).split([keys, keys, self.heads * self.value_dim], dim=-1)
        q, k = (
            torch.stack([x, *[x + turn(hidden)] * self.parts], dim=2).unflatten(3, heads)  # (b t p h k)
            for x, turn in zip((q, k), self.turn_proj, strict=True)
        )
        v = F.silu(v).unflatten(2, (1, self.heads, self.value_dim)).expand(-1, -1, every, -1, -1)
        shared, of_parts = (proj(hidden) for proj in self.decay_proj)
        gate = torch.stack([shared, *[of_parts] * self.parts], dim=2).unflatten(3, heads)
        scores, chosen = self._choose(hidden)
        weights = torch.cat([torch.ones_like(scores[..., :1]), scores * chosen], dim=-1)[..., None, None].to(v.dtype)
        visited = torch.cat([torch.ones_like(chosen[..., :1]), chosen], dim=-1)
        if layout.padding is not None:
            visited = visited & ~layout.padding[..., None]
        gate = gate.to(v.dtype).masked_fill(~visited[..., None, None], torch.inf)  # no decay
        k = (k.softmax(dim=-1).to(v.dtype) * weights).masked_fill(~visited[..., None, None], 0)
        q = F.silu(q) * weights * self.key_dim**-0.5
        output, memory = vector_decay(
            q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), gate.flatten(2, 3), activation="logsigmoid",
            divisor=self.divisor, starts=layout.starts, initial_state=None if state is None else state.memory,
        )  # fmt: skip
        summed = output.unflatten(2, (every, self.heads)).sum(dim=2)
        normed = rms_norm(summed, self.norm.weight, self.norm_eps).flatten(2)
        output = self.out_proj(normed * F.silu(self.gate_proj(hidden)))
        return output, None if state is None else LinearState(memory)

    def _choose(self, hidden: Float[Tensor, "b t d"]) -> tuple[Float[Tensor, "b t p"], Bool[Tensor, "b t p"]]:
        """How much a token is of each part, in float32, and the parts it goes to."""
        with torch.autocast(hidden.device.type, enabled=False):
            like = precise(hidden, hidden)
            scores = F.linear(like, precise(self.part_proj.weight, hidden)).softmax(dim=-1)
        best = scores.detach().topk(self.active, dim=-1).indices
        return scores, torch.zeros_like(scores, dtype=torch.bool).scatter(2, best, True)

    def router_sums(self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout) -> dict[str, Tensor]:
        """Of the parts that tokens choose among; that of all tokens is not one of them."""
        scores, chosen = self._choose(still(hidden, layout.padding, 0.0))
        return router_sums(scores, chosen, layout, self.balance_loss)

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> LinearState:
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        every = (self.parts + 1) * self.heads
        return LinearState(torch.zeros(rows, every, self.key_dim, self.value_dim, device=device, dtype=kept))
