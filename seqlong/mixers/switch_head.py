"""SwitchHead: attention of few heads, each of which has experts for its values and for its output."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seqlong.ffn.experts import ExpertLinear, by_expert
from seqlong.kernels.grouped_matmul import grouped_matmul
from seqlong.layout import SequenceLayout
from seqlong.mixers.attention import Attention
from seqlong.mixers.linear import precise, still
from seqlong.mixers.routing import router_sums, together


class SwitchHead(Attention):
    """``o_i = Σ_h Σ_{e ∈ D_i^h} d_i^{h,e} W_o^{h,e} Σ_j softmax_j(q_i^h·k_j^h / √k) v_j^h``, with
    ``v_j^h = Σ_{e ∈ S_j^h} s_j^{h,e} W_v^{h,e} x_j``.

    Each head has one query, one key and one map, but ``experts`` matrices for its values and as many for its output, of
    which a token uses ``active``: few maps, as many parameters as many heads. ``s_j^h = σ(W_s^h x_j)`` says how much of
    each expert a token's value takes, ``d_i^h = σ(W_d^h x_i)`` how much of each writes its output; S and D are the
    ``active`` largest. Sigmoids do not compete, so the source keeps the load even by nothing; a loss can be asked for.
    No token is dropped, whatever the load. The cache is that of ``Attention`` with as many heads.
    Source: arXiv 2312.07987, the variant with rotary positions; first values as in its code: normal, deviation one over
    the root of the inputs (d, and heads times head_dim for the output), a router's rows all as long.

    Args:
        d_model: width of the residual stream.
        heads: heads, which are maps.
        experts: a head, for its values, and again for its output.
        active: of these, that a token uses.
        head_dim: width of a head; ``d_model / heads`` if not given.
        window: a token sees the tokens at a distance below this, itself included; all if not given.
        positions: ``rope``, ``alibi`` or ``none``, as in ``Attention``.
        rope_base: the longest wavelength of the rotation is about ``2π · rope_base`` tokens.
        partial_rotary: part of a head's channels that is rotated, the first ones.
        causal: whether a token sees only itself and earlier ones; false for masked language modelling.
        balance_loss: weight of a loss that keeps the experts' loads even, the mean over heads, for values and for
            output.
    """

    residual_projections = ("out_experts",)
    routed = True

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        experts: int = 4,
        active: int = 2,
        head_dim: int | None = None,
        window: int | None = None,
        positions: Literal["rope", "alibi", "none"] = "rope",
        rope_base: float = 10000.0,
        partial_rotary: float = 0.5,
        causal: bool = True,
        balance_loss: float = 0.0,
    ) -> None:
        if not 1 <= active <= experts or balance_loss < 0:
            raise ValueError(
                f"SwitchHead needs active from 1 to experts, and a balance_loss of 0 or more, found active {active} of "
                f"{experts} experts, balance_loss {balance_loss}"
            )
        super().__init__(
            d_model, heads, None, head_dim, window, positions, rope_base, partial_rotary=partial_rotary, causal=causal
        )
        self.experts, self.active, self.balance_loss = experts, active, balance_loss
        del self.qkv_proj, self.out_proj  # in their place:
        self.qk_proj = nn.Linear(d_model, 2 * heads * self.head_dim, bias=False)
        self.value_experts = ExpertLinear(heads * experts, d_model, self.head_dim)  # those of the first head first
        self.out_experts = ExpertLinear(heads * experts, self.head_dim, d_model)
        self.value_router = nn.Linear(d_model, heads * experts, bias=False)
        self.out_router = nn.Linear(d_model, heads * experts, bias=False)
        for weight in (
            self.qk_proj.weight,
            self.value_experts.weight,
            self.value_router.weight,
            self.out_router.weight,
        ):
            nn.init.normal_(weight, std=1 / math.sqrt(d_model))
        nn.init.normal_(self.out_experts.weight, std=1 / math.sqrt(heads * self.head_dim))
        with torch.no_grad():
            for router in (self.value_router, self.out_router):
                router.weight.copy_(F.normalize(router.weight, dim=1))

    @property
    def used_experts(self) -> int:
        """Matrices for values that a token uses, and as many for its output."""
        return self.heads * self.active

    @property
    def idle_parameters(self) -> int:
        """Parameters of experts that a token does not use."""
        stored = self.value_experts.weight.numel() + self.out_experts.weight.numel()
        return stored - stored // self.experts * self.active

    def _project(self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout) -> tuple[Tensor, ...]:
        q, k = self.qk_proj(hidden).unflatten(2, (2, self.heads, self.head_dim)).unbind(2)
        weights, numbers = self._choose(self.value_router, hidden, layout)
        v = self._through(self.value_experts, hidden.flatten(0, 1), numbers, self.used_experts) * weights[..., None]
        return q, k, v.sum(dim=3).to(q.dtype)

    def _write(
        self, mixed: Float[Tensor, "b t h v"], hidden: Float[Tensor, "b t d"], layout: SequenceLayout
    ) -> Float[Tensor, "b t d"]:
        weights, numbers = self._choose(self.out_router, hidden, layout)
        weighed = (mixed[..., None, :] * weights[..., None]).to(mixed.dtype)  # before the product, which is wider
        return self._through(self.out_experts, weighed.flatten(0, 3), numbers).sum(dim=(2, 3))

    def _scores(self, router: nn.Linear, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h e"]:
        """In float32, whatever autocast says."""
        with torch.autocast(hidden.device.type, enabled=False):
            scores = F.linear(precise(hidden, hidden), precise(router.weight, hidden)).sigmoid()
        return scores.unflatten(2, (self.heads, self.experts))

    def _choose(
        self, router: nn.Linear, hidden: Float[Tensor, "b t d"], layout: SequenceLayout
    ) -> tuple[Float[Tensor, "b t h a"], Int[Tensor, "b t h a"]]:
        """Weights and numbers of the experts that a token uses; padding uses one that is not there."""
        scores = self._scores(router, hidden)
        best = scores.detach().topk(self.active, dim=-1).indices
        first = self.experts * torch.arange(self.heads, device=hidden.device)[:, None]
        numbers = best + first
        if layout.padding is not None:
            numbers = numbers.masked_fill(layout.padding[..., None, None], self.heads * self.experts)
        return scores.gather(3, best), numbers

    def _through(
        self, matrices: ExpertLinear, x: Float[Tensor, "m i"], numbers: Int[Tensor, "b t h a"], copies: int = 1
    ) -> Float[Tensor, "b t h a o"]:
        """``copies`` of each row through the experts of ``numbers``, in their order; 0 where there is none."""
        order, ends = by_expert(numbers.reshape(-1, 1), self.heads * self.experts)
        y = grouped_matmul(x, matrices.weight, ends, gather=order, scatter=order, copies=copies)
        return y.view(*numbers.shape, y.shape[1])

    def router_sums(self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout) -> dict[str, Tensor]:
        """Of the experts for ``values`` and of those for the ``output``; loads ``(h e)``, a head a row."""
        hidden, parts = still(hidden, layout.padding, 0.0), {}
        for name, router in (("values", self.value_router), ("output", self.out_router)):
            scores = self._scores(router, hidden)
            best = scores.detach().topk(self.active, dim=-1).indices
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(3, best, True)
            parts[name] = router_sums(scores, chosen, layout, self.balance_loss)
        return together(parts)
