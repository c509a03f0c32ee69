"""The definition of rotary, in float64."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary_reference(
    x: Float[Tensor, "b t h k"], positions: Int[Tensor, "b t"] | Float[Tensor, "b t"], base: float = 10000.0
) -> Float[Tensor, "b t h k"]:
    """Rotate pairs (i, i + k/2) of each head by ``position · base^(-2i/k)``."""
    half = x.shape[-1] // 2
    first, second = x.double().split(half, dim=-1)
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (positions[..., None].double() * frequency)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
