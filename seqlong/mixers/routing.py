"""What the routers inside of mixers did with a batch: loads for the log, and the loss that keeps them even."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.layout import SequenceLayout


def router_sums(
    scores: Float[Tensor, "b t *s e"], chosen: Bool[Tensor, "b t *s e"], layout: SequenceLayout, balance_loss: float
) -> dict[str, Tensor]:
    """Sums over the tokens that are not padding; see ``Mixer.router_sums``.

    Args:
        scores: of every token and expert, 0 or more; s are routers side by side, each of which chooses among its e.
        chosen: whether a token goes to an expert.
        layout: tells what is padding; scores there may be anything.
        balance_loss: weight of ``unevenness`` in the loss; 0 for none.

    Returns:
        ``load`` ``(*s e)`` int64, the choices of each expert; ``positions`` int64, the tokens times the routers side
        by side; ``entropy``, of their scores, in nats, float64; and ``router_loss_sum`` with a ``balance_loss``.
    """
    real = torch.ones(layout.shape, dtype=torch.bool, device=scores.device)
    if layout.padding is not None:
        real = ~layout.padding
    real = real.reshape(*layout.shape, *[1] * (scores.dim() - 2))
    known = scores.detach()
    entropy = torch.special.entr(known / known.sum(dim=-1, keepdim=True))
    sums = {
        "load": (chosen & real).sum(dim=(0, 1)),
        "positions": real.sum() * scores.shape[2:-1].numel(),
        "entropy": torch.where(real, entropy, 0).sum(dtype=torch.float64),
    }
    if balance_loss:
        sums["router_loss_sum"] = balance_loss * unevenness(scores, chosen, layout)
    return sums


def together(parts: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sums of several routers, by the routers' names: ``<name>/load`` and so on; losses added up."""
    every: dict[str, Tensor] = {}
    for name, sums in parts.items():
        for what, value in sums.items():
            if what.endswith("_sum"):
                every[what] = every[what] + value if what in every else value
            else:
                every[f"{name}/{what}"] = value
    return every


def unevenness(
    scores: Float[Tensor, "b t *s e"], chosen: Bool[Tensor, "b t *s e"], layout: SequenceLayout
) -> Float[Tensor, ""]:
    """``e · Σ_e share_e · mean score_e`` of each row, times its tokens, over all rows: 1 a token where all is even.

    A row's share is that of its choices; scores of a token are divided by their sum. Of routers side by side it is the
    mean. Source: arXiv 2101.03961.
    """
    scores = scores / scores.sum(dim=-1, keepdim=True)
    if layout.padding is not None:
        nothing = layout.padding.reshape(*layout.shape, *[1] * (scores.dim() - 2))
        scores, chosen = scores.masked_fill(nothing, 0), chosen & ~nothing
    counts = chosen.sum(dim=1)
    shares = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return scores.shape[-1] * (shares * scores.sum(dim=1)).sum() / scores.shape[2:-1].numel()
