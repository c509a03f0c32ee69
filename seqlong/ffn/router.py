"""Which experts a position goes to, and with what weights. Always in float32, whatever autocast says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seqlong.kernels.precision import accumulation

Score = Literal["softmax", "sigmoid"]


@dataclass
class Routing:
    """Experts of every position, and what there is to say about them.

    Attributes:
        experts: ``(m k)`` numbers of the experts, strongest first; of padding, the number after the last expert.
        weights: ``(m k)`` float32, with gradients; 0 for padding.
        scores: ``(m e)`` float32, of all experts.
        logits: ``(m e)`` float32.
    """

    experts: Int[Tensor, "m k"]
    weights: Float[Tensor, "m k"]
    scores: Float[Tensor, "m e"]
    logits: Float[Tensor, "m e"]


class Router(nn.Module):
    """``s = score(W x)``; the ``active`` experts with the largest ``s + bias``; weights are ``s`` of these, so that the
    bias, which balances the load, never weighs. Sources: arXiv 1701.06538, 2101.03961; sigmoid and bias 2408.15664,
    2412.19437.

    Args:
        d_model: width of the input.
        experts: how many there are to choose from.
        active: how many a position goes to.
        score: ``softmax`` over all experts, or ``sigmoid`` of each.
        normalize: divide the weights of a position by their sum.
        scale: multiplies the weights, after that.
    """

    bias: Tensor

    def __init__(
        self, d_model: int, experts: int, active: int, score: Score = "sigmoid", normalize: bool = True,
        scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.active, self.score, self.normalize, self.scale = active, score, normalize, scale
        self.weight = nn.Parameter(torch.empty(experts, d_model))
        nn.init.normal_(self.weight, std=1 / math.sqrt(d_model))
        self.register_buffer("bias", torch.zeros(experts, dtype=torch.float32))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # A bias moves by thousandths, which bfloat16 would lose.
        before = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != before.dtype and not before.is_meta:
            self.bias = before.to(self.bias.device)
        return self

    def scored(self, x: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "m e"], Float[Tensor, "m e"]]:
        """Scores and logits of all experts."""
        kept = accumulation(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            logits = x.to(kept) @ self.weight.to(kept).T
        return (logits.softmax(dim=-1) if self.score == "softmax" else logits.sigmoid()), logits

    def forward(self, x: Float[Tensor, "m d"], padding: Bool[Tensor, "m"] | None = None) -> Routing:
        """Choose experts.

        Args:
            x: positions.
            padding: True where there is nothing: it goes nowhere.
        """
        scores, logits = self.scored(x)
        chosen = (scores.detach() + self.bias).topk(self.active, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + torch.finfo(weights.dtype).tiny)
        weights = weights * self.scale
        if padding is not None:
            chosen = chosen.masked_fill(padding[:, None], scores.shape[1])
            weights = weights.masked_fill(padding[:, None], 0)
        return Routing(chosen, weights, scores, logits)


def chosen_by_experts(
    scores: Float[Tensor, "b t e"], share: float, segment_ids: Int[Tensor, "b t"] | None
) -> Int[Tensor, "e c"]:
    """Expert choice: in each segment of n positions, each expert takes the ``floor(n · share)`` that score highest.

    Which ones depends on the whole segment, later positions too: for bidirectional models only. Shapes depend on b and
    t alone, and nothing waits for the device. Source: arXiv 2202.09368.

    Args:
        scores: of every position and expert.
        share: of the positions that an expert takes, at most 1.
        segment_ids: as in SequenceLayout; None where every row is one segment.

    Returns:
        Numbers of positions ``b · t``, or ``b · t`` itself where there is none; c is ``b · floor(t · share)``.
    """
    rows, length, experts = scores.shape
    most = math.floor(length * share + 1e-9)
    order = scores.detach().transpose(1, 2).argsort(dim=-1, descending=True, stable=True)
    base = torch.arange(rows, device=scores.device)[:, None, None] * length
    if segment_ids is None:
        return (order[..., :most] + base).transpose(0, 1).reshape(experts, -1)
    ids = segment_ids[:, None].expand(rows, experts, length).gather(2, order)
    again = ids.argsort(dim=-1, stable=True)  # by segment, and within one by score
    order, ids = order.gather(2, again), ids.gather(2, again)
    places = torch.arange(length, device=scores.device)
    fresh = torch.ones_like(ids, dtype=torch.bool)
    fresh[..., 1:] = ids[..., 1:] != ids[..., :-1]
    first = torch.where(fresh, places, 0).cummax(dim=-1).values
    ends = torch.ones_like(fresh)
    ends[..., :-1] = fresh[..., 1:]
    last = torch.where(ends, places, length).flip(-1).cummin(dim=-1).values.flip(-1)
    quota = ((last - first + 1) * share + 1e-9).floor()
    taken = (places - first < quota) & (ids != 0)
    # The quotas of a row add up to at most that of the row, so this many places hold all that was taken.
    packed = (~taken).to(torch.int8).argsort(dim=-1, stable=True)[..., :most]
    chosen = torch.where(taken.gather(2, packed), order.gather(2, packed) + base, rows * length)
    return chosen.transpose(0, 1).reshape(experts, -1)
