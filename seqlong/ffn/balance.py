"""An even load without a loss: after each optimiser step, experts that had too much are a little harder to choose."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def wanted_shares(
    experts: int, identity: int, identity_share: float | None, device: torch.device | str = "cpu"
) -> Float[Tensor, "e"]:
    """The share of the choices that each expert should have, float64; experts that do nothing come last.

    Args:
        experts: that compute.
        identity: that do nothing.
        identity_share: of all choices, for these together; None: as much for each as for any other.
        device: where to build it.
    """
    total = experts + identity
    share = identity / total if identity_share is None else identity_share
    each = torch.full((experts,), (1 - share) / experts, dtype=torch.float64, device=device)
    return torch.cat([each, torch.full((identity,), share / max(identity, 1), dtype=torch.float64, device=device)])


def step_of_bias(load: Int[Tensor, "e"], shares: Float[Tensor, "e"], rate: float) -> Float[Tensor, "e"]:
    """``rate · sign(wanted - had)``, float32. Choices depend on differences only, so the mean is taken off.

    Exact: loads are whole numbers, and ranks that see the same loads step alike. Source: arXiv 2408.15664.

    Args:
        load: choices of each expert in the step, over all ranks.
        shares: of the load that each should have.
        rate: how far a bias moves in a step.
    """
    gap = shares * load.sum() - load
    # What is a rounding error of the product is no gap.
    step = torch.where(gap.abs() < 1e-6, 0, gap.sign()) * rate
    return (step - step.mean()).float()


def violation(load: Int[Tensor, "e"]) -> Float[Tensor, ""]:
    """MaxVio: the largest load over the mean, minus 1; 0 is even."""
    return load.max() / load.double().mean().clamp(min=1e-12) - 1


def dead(load: Int[Tensor, "e"]) -> Int[Tensor, ""]:
    """How many experts have less than a hundredth of the mean load."""
    return (load < 0.01 * load.double().mean()).sum()
