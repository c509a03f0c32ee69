"""The inverse of what a chunk of the delta rule does to its own tokens, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from seqlong.kernels.delta_rule.triton_forward import C


@triton.jit
def _inverse(A):
    """(I + A)^-1 of a strictly lower (16 16) block, by forward substitution: exact to float32 whatever the keys."""
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    T = tl.where(i == j, 1.0, 0.0)
    for n in tl.static_range(15):
        column = tl.sum(tl.where(j == n, A, 0.0), 1)
        row = tl.sum(tl.where(i == n, T, 0.0), 0)
        T -= column[:, None] * row[None, :]
    return T


@triton.jit
def _times(x, y):
    return tl.dot(x, y, input_precision="tf32x3")


@triton.jit
def _put(x, r: tl.constexpr, c: tl.constexpr, block):
    place = (r * 16 + tl.arange(0, 16))[:, None] * C + c * 16 + tl.arange(0, 16)[None, :]
    tl.store(x + place, block.to(x.dtype.element_ty))


@triton.jit
def cell(x, r, c):
    """Pointers to block (r, c) of a (C C) matrix."""
    i = tl.arange(0, 16)
    return x + (r * 16 + i)[:, None] * C + (c * 16 + i)[None, :]


@triton.jit
def invert(weight, erase, inverse):
    """One chunk of one head: (I + A)^-1, A = diag(weight) erase."""
    pid = tl.program_id(0).to(tl.int64)  # heads of rows, and chunks of a head, lie side by side
    w = weight + pid * C + tl.arange(0, 16)
    erase += pid * (C * C)
    inverse += pid * (C * C)
    none = tl.zeros((16, 16), dtype=tl.float32)
    w0 = tl.load(w + 0)[:, None]
    T00 = _inverse(w0 * tl.load(cell(erase, 0, 0)))
    _put(inverse, 0, 0, T00)
    _put(inverse, 0, 1, none)
    _put(inverse, 0, 2, none)
    _put(inverse, 0, 3, none)
    w1 = tl.load(w + 16)[:, None]
    T11 = _inverse(w1 * tl.load(cell(erase, 1, 1)))
    _put(inverse, 1, 1, T11)
    _put(inverse, 1, 2, none)
    _put(inverse, 1, 3, none)
    A10 = w1 * tl.load(cell(erase, 1, 0))
    T10 = -_times(T11, _times(A10, T00))
    _put(inverse, 1, 0, T10)
    w2 = tl.load(w + 32)[:, None]
    T22 = _inverse(w2 * tl.load(cell(erase, 2, 2)))
    _put(inverse, 2, 2, T22)
    _put(inverse, 2, 3, none)
    A20 = w2 * tl.load(cell(erase, 2, 0))
    A21 = w2 * tl.load(cell(erase, 2, 1))
    T21 = -_times(T22, _times(A21, T11))
    _put(inverse, 2, 1, T21)
    T20 = -_times(T22, _times(A20, T00) + _times(A21, T10))
    _put(inverse, 2, 0, T20)
    w3 = tl.load(w + 48)[:, None]
    T33 = _inverse(w3 * tl.load(cell(erase, 3, 3)))
    _put(inverse, 3, 3, T33)
    A30 = w3 * tl.load(cell(erase, 3, 0))
    A31 = w3 * tl.load(cell(erase, 3, 1))
    A32 = w3 * tl.load(cell(erase, 3, 2))
    T32 = -_times(T33, _times(A32, T22))
    _put(inverse, 3, 2, T32)
    T31 = -_times(T33, _times(A31, T11) + _times(A32, T21))
    _put(inverse, 3, 1, T31)
    T30 = -_times(T33, _times(A30, T00) + _times(A31, T10) + _times(A32, T20))
    _put(inverse, 3, 0, T30)
