"""The definition of linear_cross_entropy: one position after the other in float64."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def linear_cross_entropy_reference(
    hidden: Float[Tensor, "b t d"],
    weight: Float[Tensor, "y d"],
    targets: Int[Tensor, "b t"],
    bias: Float[Tensor, "y"] | None = None,
    z_loss: float = 0.0,
) -> Float[Tensor, "b t"]:
    """``L - l_target + z_loss L²`` with ``L = log Σ_y exp(l_y)`` and ``l = weight h + bias``; 0 where the target is -1.

    Returns float32, or float64 if hidden is.
    """
    kept = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    matrix = weight.double()
    offset = matrix.new_zeros(matrix.shape[0]) if bias is None else bias.double()
    losses = []
    for row in range(hidden.shape[0]):
        for step in range(hidden.shape[1]):
            logits = matrix @ hidden[row, step].double() + offset
            target, total = targets[row, step], logits.logsumexp(dim=0)
            loss = total - logits[target.clamp(min=0)] + z_loss * total.square()
            losses.append(torch.where(target >= 0, loss, 0))
    if not losses:
        return hidden.new_zeros(targets.shape, dtype=kept)
    return torch.stack(losses).view(targets.shape).to(kept)
