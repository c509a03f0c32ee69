"""rotary: positions as rotations of queries and keys."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqlong.kernels.dispatch import choose, without_triton
from seqlong.kernels.inputs import four_axes, shaped
from seqlong.kernels.precision import accumulation
from seqlong.kernels.rotary.reference import rotary_reference
from seqlong.kernels.runtime import triton_runs_on

OFFERED = {
    "triton": "one pass over the heads in Triton",
    "chunked": "torch, any device",
    "reference": "float64",
}
#: Types that the Triton kernel computes in float32.
TRITON_TYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Widest head that a program holds.
TRITON_WIDTH = 1024


def _offered(x: Tensor) -> tuple[dict[str, str], str]:
    """The implementations that can serve, and the one to prefer."""
    obstacle = triton_runs_on(x.device)
    if x.dtype not in TRITON_TYPES:
        obstacle = f"the Triton kernel does not compute in {x.dtype}"
    elif x.shape[-1] > TRITON_WIDTH:
        obstacle = f"the Triton kernel holds heads of {TRITON_WIDTH}, not {x.shape[-1]}"
    if obstacle is None:
        return OFFERED, "triton" if x.is_cuda else "chunked"
    return without_triton(OFFERED, obstacle), "chunked"


def check(x: Tensor, positions: Tensor) -> None:
    """Raise a ValueError that names what does not fit, what was expected and what was found."""
    four_axes("rotary", {"x": x})
    if x.shape[3] % 2:
        raise ValueError(f"rotary needs an even head width, found {x.shape[3]}")
    shaped("rotary", {"x": (x, x.shape), "positions": (positions, x.shape[:2])})


def rotary(
    x: Float[Tensor, "b t h k"],
    positions: Int[Tensor, "b t"] | Float[Tensor, "b t"],
    base: float = 10000.0,
    implementation: str | None = None,
) -> Float[Tensor, "b t h k"]:
    """Rotate pairs (i, i + k/2) of each head by ``position · base^(-2i/k)``.

    Angles are formed in float64 and reduced to one turn before rounding, so they are right at any position.

    Args:
        x: queries or keys; may be a part of a wider tensor, which is read where it lies.
        positions: of every token, in its segment; float64 for places between (interpolation).
        base: the longest wavelength is about ``2π · base`` tokens.
        implementation: ``triton``, ``chunked`` or ``reference``; None lets dispatch choose.

    Returns:
        The rotated heads, in x's type.

    Raises:
        ValueError: k is odd, positions do not fit, or the implementation asked for cannot serve.

    Source: RoPE, arXiv 2104.09864 (the half-split pairing of GPT-NeoX and Llama).
    """
    check(x, positions)
    choice = choose("rotary", *_offered(x), implementation).implementation
    if choice == "reference":
        return rotary_reference(x, positions, base)
    if choice == "triton":
        from seqlong.kernels.rotary.triton import rotary_triton

        return rotary_triton(x, positions, base, False)
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (positions[..., None].double() * frequency).remainder(2 * math.pi).to(accumulation(x.dtype))[:, :, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
