"""MoE: a feed-forward made of experts, of which each position uses a few."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqlong.ffn.balance import step_of_bias, wanted_shares
from seqlong.ffn.experts import Experts
from seqlong.ffn.mlp import SwiGLU, _rounded
from seqlong.ffn.router import Router, Routing, Score, chosen_by_experts
from seqlong.layout import SequenceLayout

Aux = dict[str, Tensor]


class MoE(nn.Module):
    """``Σ_{e chosen} w_e · expert_e(x) + shared(x)``, each expert a SwiGLU; ``σ(w x) shared(x)`` with ``shared_gate``.

    No position is dropped and padding goes nowhere. The load is kept even by a bias on the choice that moves once an
    optimiser step and never weighs (``bias_rate``), or by a loss (``balance_loss``). Sources: arXiv 2101.03961,
    2401.06066 (fine-grained and shared experts), 2408.15664 (bias), 2202.08906 (z-loss), 2202.09368 (expert choice),
    2509.01322 (experts that do nothing).

    Args:
        d_model: width of the residual stream.
        experts: how many compute, beside shared ones.
        active: how many of all that can be chosen a position goes to.
        d_hidden: inner width of one expert. If not given, those that a position uses are together ``expand`` wide.
        expand: inner width of all experts of a position together over d_model.
        shared: experts that every position goes to, beside those chosen.
        shared_gate: whether a number for each position weighs what these give (Qwen2-MoE, Qwen3-Next).
        identity: further experts that return their input, at no cost: a position needs fewer of the others.
        identity_share: of all choices that these should have; null: as many as other experts.
        choice: who chooses. ``token``: positions choose experts. ``expert``: experts choose positions, as many each,
            which needs no balancing but looks ahead: for bidirectional models only.
        score: ``sigmoid`` of each expert, or ``softmax`` over all.
        normalize: divide the weights of a position's experts by their sum.
        scale: multiplies these weights.
        bias_rate: how far the bias of an expert moves in an optimiser step; 0 for no such balancing.
        balance_loss: weight of ``e · Σ share of choices · mean score`` of each row in the loss; 0 for none.
        z_loss: weight of the squared log-normaliser of the router's logits in the loss; 0 for none.
        implementation: of grouped_matmul; null lets it choose.
    """

    def __init__(
        self,
        d_model: int,
        experts: int = 8,
        active: int = 2,
        d_hidden: int | None = None,
        expand: float = 8 / 3,
        shared: int = 1,
        shared_gate: bool = False,
        identity: int = 0,
        identity_share: float | None = None,
        choice: Literal["token", "expert"] = "token",
        score: Score = "sigmoid",
        normalize: bool = True,
        scale: float = 1.0,
        bias_rate: float = 1e-3,
        balance_loss: float = 0.0,
        z_loss: float = 0.0,
        implementation: str | None = None,
    ) -> None:
        super().__init__()
        if min(expand, scale) <= 0 or (d_hidden is not None and d_hidden < 1):
            raise ValueError(
                f"MoE needs widths and a scale above 0, found d_hidden {d_hidden}, expand {expand}, scale {scale}"
            )
        _check(experts, active, shared, identity, identity_share, choice, bias_rate, balance_loss, z_loss)
        if shared_gate and not shared:
            raise ValueError("shared_gate weighs shared experts, and there are none: set shared to 1 or more")
        d_hidden = _rounded(expand * d_model / (active + shared), 16) if d_hidden is None else d_hidden
        self.router = Router(d_model, experts + identity, active, score, normalize and choice == "token", scale)
        self.experts = Experts(experts, d_model, d_hidden, implementation)
        self.shared = SwiGLU(d_model, shared * d_hidden) if shared else None
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if shared_gate else None
        self.choice, self.identity = choice, identity
        self.bias_rate = bias_rate if choice == "token" else 0.0
        self.balance_loss, self.z_loss = balance_loss, z_loss
        self.identity_share = identity_share

    @property
    def causal(self) -> bool:
        """Whether what a position gets depends on itself only."""
        return self.choice == "token"

    @property
    def idle_parameters(self) -> int:
        """Parameters of experts that a position does not use (identity experts counted as if they were others)."""
        each = sum(parameter.numel() for parameter in self.experts.parameters()) // self.experts.count
        return each * max(self.experts.count - self.router.active, 0)

    def forward(self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout) -> tuple[Float[Tensor, "b t d"], Aux]:
        """The result, and in training what the task and the log want to know.

        Returns:
            The result, zero at padding but for shared experts; and ``load`` ``(e)`` int64, the choices of each expert,
            those that do nothing last; ``positions``, those that are not padding; ``entropy``, of the scores in nats,
            summed over these; ``router_loss_sum``, summed too, if a loss was asked for.
        """
        x = hidden.flatten(0, 1)
        padding = None if layout.padding is None else layout.padding.flatten()
        if self.choice == "expert":
            output, routing, load = self._chosen_by_experts(x, layout)
        else:
            routing = self.router(x, padding)
            output = self.experts(x, routing.experts, routing.weights)
            if self.identity:
                idle = torch.where(routing.experts >= self.experts.count, routing.weights, 0).sum(dim=1, keepdim=True)
                output = output + (x * idle).to(output.dtype)
            load = _counted(routing, layout.shape).sum(dim=0) if self.training else None
        output = output.view(hidden.shape)
        if self.shared is not None:
            common = self.shared(hidden)
            if self.shared_gate is not None:
                common = common * torch.sigmoid(self.shared_gate(hidden))
            output = output + common
        return output, {} if load is None else self._aux(routing, load, layout)

    def _chosen_by_experts(self, x: Tensor, layout: SequenceLayout) -> tuple[Tensor, Routing, Tensor | None]:
        scores, logits = self.router.scored(x)
        share = min(self.router.active / self.experts.count, 1.0)
        lists = chosen_by_experts(scores.view(*layout.shape, self.experts.count), share, layout.segment_ids)
        known = torch.cat([scores, scores.new_zeros(1, scores.shape[1])])
        weights = known.T.gather(1, lists) * self.router.scale
        load = (lists < x.shape[0]).sum(dim=1) if self.training else None
        routing = Routing(lists.new_empty(x.shape[0], 0), scores[:, :0], scores, logits)  # positions choose nothing
        return self.experts.by_lists(x, lists, weights), routing, load

    def _aux(self, routing: Routing, load: Tensor, layout: SequenceLayout) -> Aux:
        real = torch.ones(layout.shape, dtype=torch.bool, device=load.device)
        if layout.padding is not None:
            real = ~layout.padding
        flat = real.flatten()
        scores = routing.scores.detach()
        chances = scores / scores.sum(dim=-1, keepdim=True)
        entropy = torch.special.entr(chances).sum(dim=-1)
        aux = {
            "load": load,
            "positions": real.sum(),
            "entropy": torch.where(flat, entropy, 0).sum(dtype=torch.float64),
        }
        loss = None
        if self.z_loss:
            squares = routing.logits.logsumexp(dim=-1).square()
            loss = self.z_loss * torch.where(flat, squares, 0).sum()
        if self.balance_loss:
            even = self.balance_loss * self._unevenness(routing, real)
            loss = even if loss is None else loss + even
        return aux if loss is None else {**aux, "router_loss_sum": loss}

    def _unevenness(self, routing: Routing, real: Tensor) -> Tensor:
        """``e · Σ_e share_e · mean score_e`` of each row, times its positions, over all rows."""
        scores = routing.scores / routing.scores.sum(dim=-1, keepdim=True)
        scores = scores.view(*real.shape, scores.shape[1])
        means = torch.where(real[..., None], scores, 0).sum(dim=1)  # n times the mean
        counts = _counted(routing, real.shape)
        shares = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
        return scores.shape[-1] * (shares * means).sum()

    def balance(self, load: Tensor) -> None:
        """Move the biases after an optimiser step.

        Args:
            load: ``(e)`` choices of each expert in the step, over all its batches and all ranks.
        """
        if not self.bias_rate:
            return
        shares = wanted_shares(self.experts.count, self.identity, self.identity_share, load.device)
        with torch.no_grad():
            self.router.bias += step_of_bias(load, shares, self.bias_rate).to(self.router.bias.device)


def _counted(routing: Routing, shape: tuple[int, int] | torch.Size) -> Tensor:
    """``(b e)`` int64: how often each row chose each expert. Whole numbers, so that no order of addition matters."""
    rows, experts = shape[0], routing.scores.shape[1]
    chosen = routing.experts.reshape(rows, shape[1] * routing.experts.shape[1])
    counts = torch.zeros(rows, experts + 1, dtype=torch.int64, device=chosen.device)
    return counts.scatter_add(1, chosen, torch.ones_like(chosen))[:, :experts]


def _check(
    experts: int, active: int, shared: int, identity: int, identity_share: float | None, choice: str,
    bias_rate: float, balance_loss: float, z_loss: float,
) -> None:  # fmt: skip
    if experts < 1 or shared < 0 or identity < 0 or not 1 <= active <= experts + identity:
        raise ValueError(
            f"MoE needs at least 1 expert, shared and identity of 0 or more, and active from 1 to experts + identity; "
            f"found experts {experts}, shared {shared}, identity {identity}, active {active}"
        )
    if identity_share is not None and (not identity or not 0 < identity_share < 1):
        raise ValueError(
            f"identity_share must be between 0 and 1, for identity experts; found {identity_share} with identity "
            f"{identity}"
        )
    if min(bias_rate, balance_loss, z_loss) < 0:
        raise ValueError(f"bias_rate {bias_rate}, balance_loss {balance_loss} and z_loss {z_loss} must be 0 or more")
    if choice == "expert" and (identity or balance_loss):
        raise ValueError("choice=expert has an even load by itself: set identity and balance_loss to 0")
