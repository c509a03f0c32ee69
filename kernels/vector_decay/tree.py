"""Scores within a chunk when every channel decays by itself: Σ_d q_id k_jd Π_{j < m <= i} a_md, for j < i.

The quotient P_i / P_j of running products would overflow, and a decay of zero has none. A chunk is halved again and
again instead: a pair (i, j) is parted by exactly one cut, and i's product from the cut on and j's up to the cut are
both at most one. At each size of halves one batched product makes all pairs that its cuts part, and products of twice
the size come from one multiplication. Any decay is exact, zero and one too; log2(c) small products replace an
element-wise loop over the 16 x 16 blocks of a diagonal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Halves up to this size are multiplied element by element, larger ones as matrices.
TINY = 2


class Within(NamedTuple):
    """What a chunk of c tokens gives; m is the number of chunks."""

    scores: Tensor  # (m c c), zero on and above the diagonal
    enter: Tensor  # (m c k) product of the decays from the chunk's entry to token i, as its query sees them
    leave: Tensor  # (m c k) product of the decays after token j to the chunk's end
    carry: Tensor  # (m k) product of all decays of the chunk
    dq: Tensor | None  # (m c k) gradients through the scores
    dk: Tensor | None


def within(q: Tensor, k: Tensor, decay: Tensor, own: Tensor, grad: Tensor | None, work: torch.dtype) -> Within:
    """Scores and products of decays of chunks, and gradients through the scores.

    Args:
        q: ``(m c k)``, c a power of two.
        k: as q.
        decay: what the state is multiplied by before each token.
        own: what the token's query itself sees of ``decay``: all of it, or nothing (one) if it reads the state before.
        grad: gradient of the scores ``(m c c)``; what is on and above the diagonal is not read.
        work: type of matrix products.
    """
    chunks, size, width = q.shape
    scores = q.new_zeros(chunks, size, size, dtype=work)
    dq, dk = (None, None) if grad is None else (torch.zeros_like(q), torch.zeros_like(k))
    enter, leave, carry = own.clone(), torch.ones_like(decay), decay
    half = 1
    while half < size:
        shape = (chunks, size // (2 * half), 2, half, width)
        enter_right, leave_left = enter.view(shape)[:, :, 1], leave.view(shape)[:, :, 0]
        late_q = (q.view(shape)[:, :, 1] * enter_right).to(work)
        early_k = (k.view(shape)[:, :, 0] * leave_left).to(work)
        _parted(scores, half).copy_(_pairs(late_q, early_k))
        if grad is not None and dq is not None and dk is not None:
            part = _parted(grad, half)
            dq.view(shape)[:, :, 1].addcmul_(_mixed(part, early_k).to(q.dtype), enter_right)
            dk.view(shape)[:, :, 0].addcmul_(_mixed(part.mT, late_q).to(k.dtype), leave_left)
        left, right = carry.view(chunks, size // (2 * half), 2, 1, width).unbind(2)
        enter_right.mul_(left)
        leave_left.mul_(right)
        carry = left * right
        half *= 2
    return Within(scores, enter, leave, carry.view(chunks, width), dq, dk)


def _parted(square: Tensor, half: int) -> Tensor:
    """The parts (m n half half) of (m c c) that cuts between halves of this size part: a view."""
    chunks, size, _ = square.shape
    n = size // (2 * half)
    step = square.stride(1)
    strides = (square.stride(0), 2 * half * (step + 1), step, 1)
    return square.as_strided((chunks, n, half, half), strides, square.storage_offset() + half * step)


def _pairs(x: Tensor, y: Tensor) -> Tensor:
    if x.shape[2] <= TINY:
        return (x[:, :, :, None] * y[:, :, None]).sum(dim=-1)
    return x @ y.mT


def _mixed(weights: Tensor, x: Tensor) -> Tensor:
    if x.shape[2] > TINY:
        return weights @ x
    if x.shape[2] == 1:
        return weights * x
    return (weights[..., None] * x[:, :, None]).sum(dim=-2)
