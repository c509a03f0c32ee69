"""How attention knows positions: rotary embedding and ALiBi slopes."""

from __future__ import annotations

from seqlong.kernels.rotary import rotary

__all__ = ["alibi_slopes", "rotary"]


def alibi_slopes(heads: int) -> list[float]:
    """One slope a head, ``2^(-8 (i + 1) / heads)``, interpolated as in the paper where heads is no power of two.

    Source: ALiBi, arXiv 2108.12409.
    """
    below = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    if below < heads:
        slopes += [2.0 ** (-8 * (i + 1) / (2 * below)) for i in range(0, 2 * (heads - below), 2)]
    return slopes
