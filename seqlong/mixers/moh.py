"""MoH: attention whose heads are experts; a token weighs a few of them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seqlong.ffn.router import Router, Routing
from seqlong.layout import SequenceLayout
from seqlong.mixers.attention import Attention
from seqlong.mixers.linear import still
from seqlong.mixers.routing import router_sums


class MoH(Attention):
    """``o = Σ_h w_h head_h W_o^h``: w of ``shared`` heads is never zero, of the others that of the ``active`` largest.

    ``w = 2 α_1 s softmax(W_s x)`` for the first heads, s of them shared; ``w = 2 α_2 a p_h`` for a active ones among
    the others, p a softmax of which these are kept and divided by their sum; ``(α_1, α_2) = softmax(W_α x)``. Without
    shared heads 2 α_2 is 1. So the weights of used heads are 1 on average, and a trained model's heads can be turned
    into experts. All heads are computed (as in the published code): weights of zero save nothing here.
    Source: arXiv 2410.11842.

    Args:
        d_model: width of the residual stream.
        heads: query heads, shared ones first.
        shared: heads that every token uses.
        active: heads that a token uses of those that are not shared.
        kv_heads: key and value heads, shared by equal groups of query heads; as many as ``heads`` if not given.
        head_dim: width of a head; ``d_model / heads`` if not given.
        window: a token sees the tokens at a distance below this, itself included; all if not given.
        positions: ``rope``, ``alibi`` or ``none``, as in ``Attention``.
        rope_base: the longest wavelength of the rotation is about ``2π · rope_base`` tokens.
        causal: whether a token sees only itself and earlier ones; false for masked language modelling.
        bias: whether the projections have biases.
        balance_loss: weight of a loss that keeps the heads' loads even.
    """

    routed = True

    def __init__(
        self,
        d_model: int,
        heads: int = 8,
        shared: int = 2,
        active: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        positions: Literal["rope", "alibi", "none"] = "rope",
        rope_base: float = 10000.0,
        causal: bool = True,
        bias: bool = False,
        balance_loss: float = 0.01,
    ) -> None:
        if shared < 0 or not 1 <= active <= heads - shared or balance_loss < 0:
            raise ValueError(
                f"MoH needs shared of 0 or more, active from 1 to heads - shared, and a balance_loss of 0 or more, "
                f"found {heads} heads, shared {shared}, active {active}, balance_loss {balance_loss}"
            )
        super().__init__(
            d_model, heads, kv_heads, head_dim, window, positions, rope_base, causal=causal, bias=bias
        )  # fmt: skip
        self.shared, self.active, self.balance_loss = shared, active, balance_loss
        self.router = Router(d_model, heads - shared, active, "softmax", scale=float(active))
        self.shared_proj = nn.Linear(d_model, shared, bias=False) if shared > 1 else None
        self.kind_proj = nn.Linear(d_model, 2, bias=False) if shared else None

    def _weigh(self, mixed: Float[Tensor, "b t h v"], hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h v"]:
        routing = self._routed(hidden)
        weights = torch.zeros_like(routing.scores).scatter(1, routing.experts, routing.weights)
        weights = weights.unflatten(0, hidden.shape[:2])
        if self.kind_proj is not None:
            kinds = 2 * self._softmax(self.kind_proj.weight, hidden)
            first = torch.ones_like(kinds[..., :1])
            if self.shared_proj is not None:
                first = self.shared * self._softmax(self.shared_proj.weight, hidden)
            weights = torch.cat([first * kinds[..., :1], weights * kinds[..., 1:]], dim=-1)
        return mixed * weights[..., None].to(mixed.dtype)

    def _routed(self, hidden: Float[Tensor, "b t d"]) -> Routing:
        return self.router(hidden.flatten(0, 1))

    def _softmax(self, weight: Float[Tensor, "e d"], hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t e"]:
        """In the type of the router, whatever autocast says."""
        kept = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(kept), weight.to(kept)).softmax(dim=-1)

    def router_sums(self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout) -> dict[str, Tensor]:
        """Of the heads that tokens choose among, those that are not shared."""
        routing = self._routed(still(hidden, layout.padding, 0.0))
        chosen = torch.zeros_like(routing.scores, dtype=torch.bool).scatter(1, routing.experts, True)
        scores, chosen = routing.scores.unflatten(0, layout.shape), chosen.unflatten(0, layout.shape)
        return router_sums(scores, chosen, layout, self.balance_loss)
