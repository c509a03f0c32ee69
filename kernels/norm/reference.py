"""The definition of the norms, in float64."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def rms_norm_reference(
    x: Float[Tensor, "*b d"], weight: Float[Tensor, "d"], eps: float = 1e-5
) -> Float[Tensor, "*b d"]:
    """``x / sqrt(mean(x²) + eps) ⊙ weight``."""
    value = x.double()
    return (value / (value.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()).to(x.dtype)


def gated_rms_norm_reference(
    x: Float[Tensor, "*b d"],
    gate: Float[Tensor, "*b d"],
    weight: Float[Tensor, "d"],
    groups: int = 1,
    eps: float = 1e-5,
) -> Float[Tensor, "*b d"]:
    """``RMSNorm(x ⊙ silu(gate)) ⊙ weight``, the mean over each of ``groups`` equal parts of d."""
    logit = gate.double()
    value = (x.double() * logit * logit.sigmoid()).unflatten(-1, (groups, -1))
    normed = value / (value.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return (normed.flatten(-2) * weight.double()).to(x.dtype)
