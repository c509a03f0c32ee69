"""How mixers know positions: rotary embedding on one axis or several, LRPE, and ALiBi slopes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqlong.kernels.rotary import rotary

__all__ = ["alibi_slopes", "check_axes", "lrpe", "rotary", "rotary_axes"]

Positions = Int[Tensor, "b t"] | Int[Tensor, "b t a"]


def check_axes(name: str, axes: Sequence[int], width: int) -> None:
    """See that the channels of every axis are pairs, and fit a head.

    Raises:
        ValueError: they are not, or do not.
    """
    if not axes or any(size < 2 or size % 2 for size in axes) or sum(axes) > width:
        raise ValueError(
            f"{name} needs an even number of channels for each axis, at most {width} in all, found {list(axes)}"
        )


def _axis(positions: Tensor, axis: int) -> Tensor:
    """``(b t)``: where tokens stand on an axis. A position of one number, as a text has, stands there on every axis."""
    return positions if positions.dim() == 2 else positions[..., axis]


def rotary_axes(
    x: Float[Tensor, "b t h k"],
    positions: Positions,
    axes: Sequence[int],
    base: float = 10000.0,
    scale: float = 1.0,
) -> Float[Tensor, "b t h k"]:
    """Rotate a section of each head by each axis of the positions; what the sections leave stays as it is.

    Axis a has the next ``axes[a]`` channels: pairs (i, i + axes[a]/2) of them turn by
    ``positions[a] / scale · base^(-2i/axes[a])``. So a product of a query and a key depends on the difference of their
    positions on every axis, and on nothing else; with one axis and the whole head it is RoPE, and where all tokens
    stand at 0 on an axis, its section is left as it is.

    Args:
        x: queries or keys.
        positions: one number a token, taken for every axis, or one for each axis.
        axes: channels of each axis, even.
        base: the longest wavelength is about ``2π · base · scale`` tokens.
        scale: positions are divided by this: trained lengths times ``scale`` then fit (linear interpolation).

    Source: RoPE, arXiv 2104.09864; a section for each axis, arXiv 2403.13298; interpolation, arXiv 2306.15595.
    """
    parts = list(x.split([*axes, x.shape[-1] - sum(axes)], dim=-1))
    for axis in range(len(axes)):
        place = _axis(positions, axis)
        parts[axis] = rotary(parts[axis], place if scale == 1 else place.double() / scale, base)
    return parts[0] if len(axes) == 1 and not parts[1].shape[-1] else torch.cat(parts, dim=-1)


def lrpe(
    x: Float[Tensor, "b t h k"],
    positions: Positions,
    axes: Sequence[int],
    base: float = 10000.0,
    turning: float = 1.0,
) -> Float[Tensor, "b t h w"]:
    """MD-LRPE: ``φ_p(x) = [x cos(pθ), x sin(pθ)]``, so that ``φ_p(q)·φ_r(k) = Σ_i q_i k_i cos((p - r) θ_i)``.

    It multiplies keys and queries each by itself, which is what a linear attention with features >= 0 needs. Every axis
    has the next ``axes[a]`` channels, ``θ_i = base^(-2i/axes[a])``, of which the first part, ``turning``, turns and
    the others have θ = 0; their sines are 0 and not stored.

    Args:
        x: queries or keys, after their feature map.
        positions: one number a token, taken for every axis, or one for each axis.
        axes: channels of each axis; those of the head in all.
        base: the longest wavelength is about ``2π · base`` tokens.
        turning: part of each section that turns.

    Returns:
        (b t h w), w the channels and as many more as turn: cosines, sines, then what does not turn.

    Source: LRPE, arXiv 2307.09270; several axes, arXiv 2405.21022.
    """
    if sum(axes) != x.shape[-1]:
        raise ValueError(f"lrpe needs axes that share the {x.shape[-1]} channels of a head, found {list(axes)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cosines, sines, still = [], [], []
    for axis, section in enumerate(x.split(list(axes), dim=-1)):
        width = section.shape[-1]
        moved, rest = section.split([int(width * turning), width - int(width * turning)], dim=-1)
        rate = base ** (-2 * torch.arange(moved.shape[-1], device=x.device, dtype=torch.float64) / width)
        # One turn is taken off in float64, so that angles are right at any position.
        angle = (_axis(positions, axis)[..., None] * rate).remainder(2 * torch.pi)[:, :, None].to(wide)
        cosines.append((moved * angle.cos()).to(x.dtype))
        sines.append((moved * angle.sin()).to(x.dtype))
        still.append(rest)
    return torch.cat([*cosines, *sines, *still], dim=-1)


def alibi_slopes(heads: int) -> list[float]:
    """One slope a head, ``2^(-8 (i + 1) / heads)``, interpolated as in the paper where heads is no power of two.

    Source: ALiBi, arXiv 2108.12409.
    """
    below = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    if below < heads:
        slopes += [2.0 ** (-8 * (i + 1) / (2 * below)) for i in range(0, 2 * (heads - below), 2)]
    return slopes
