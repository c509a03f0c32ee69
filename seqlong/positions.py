"""How attention knows positions: rotary embedding and ALiBi slopes."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary(
    x: Float[Tensor, "b t h k"], positions: Int[Tensor, "b t"], base: float = 10000.0
) -> Float[Tensor, "b t h k"]:
    """Rotate pairs (i, i + k/2) of each head by ``position · base^(-2i/k)``.

    Angles are formed in float64 and reduced to one turn before rounding, so they are right at any position.
    Source: RoPE, arXiv 2104.09864 (the half-split pairing of GPT-NeoX and Llama).
    """
    half = x.shape[-1] // 2
    kept = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (positions[..., None].double() * frequency).remainder(2 * math.pi).to(kept)[:, :, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def alibi_slopes(heads: int) -> list[float]:
    """One slope a head, ``2^(-8 (i + 1) / heads)``, interpolated as in the paper where heads is no power of two.

    Source: ALiBi, arXiv 2108.12409.
    """
    below = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    if below < heads:
        slopes += [2.0 ** (-8 * (i + 1) / (2 * below)) for i in range(0, 2 * (heads - below), 2)]
    return slopes
