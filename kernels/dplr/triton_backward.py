"""Triton kernels of dplr's gradients; see triton_kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from seqlong.kernels.dplr.triton_kernels import (
    PIECE,
    level,
    near,
    onto,
    read,
    segments,
    served,
    sums,
    write,
)
from seqlong.kernels.triton_pieces import chunk_of_program


@triton.jit(do_not_specialize=["T", "H", "N"])
def reads(q, k, v, a, b, gate, starts, inverses, states, adjoints, grad, values, received, grad_v, T, H, N,
          K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
          STARTS: tl.constexpr):  # fmt: skip
    """One chunk: what a reads (``values``, C VB), its gradient before the inverse (``received``), and that of v."""
    _, h, row, t0, index = chunk_of_program(H, N, C)
    type = k.dtype.element_ty
    total, before, whole = sums(gate, row, h, t0, T, H, K, C, KB)
    mark, segment = segments(starts, row, t0, T, C, STARTS)
    last = tl.max(segment, 0)
    i, dk, dv = tl.arange(0, C), tl.arange(0, KB), tl.arange(0, VB)
    A = read(a, row, h, t0, T, H, K, C, KB)
    A = tl.where((mark == 0)[:, None], A, 0.0).to(type)
    KK = read(k, row, h, t0, T, H, K, C, KB)
    VV = read(v, row, h, t0, T, H, V, C, VB)
    Q = read(q, row, h, t0, T, H, K, C, KB)
    B = read(b, row, h, t0, T, H, K, C, KB)
    ak = tl.zeros((C, C), dtype=tl.float32)
    ka = tl.zeros((C, C), dtype=tl.float32)
    bq = tl.zeros((C, C), dtype=tl.float32)
    kq = tl.zeros((C, C), dtype=tl.float32)
    for step in tl.static_range(6):
        if (PIECE << step) <= C:
            current, earlier, column = level(total, before, PIECE << step, C)
            rows, reading = (Q * current).to(type), (A * earlier).to(type)
            writing = (KK * column).to(type)
            bq = onto(bq, (B * column).to(type), rows, PIECE << step, C, True)
            kq = onto(kq, writing, rows, PIECE << step, C, True)
            ka = onto(ka, writing, reading, PIECE << step, C, True)
            ak = onto(ak, reading, writing, PIECE << step, C, False)
    past = near(segment, C, False, True)
    ak = tl.where(near(segment, C, True, False), ak, 0.0).to(type)
    ka = tl.where(near(segment, C, True, True), ka, 0.0).to(type)
    bq = tl.where(past, bq, 0.0).to(type)
    kq = tl.where(past, kq, 0.0).to(type)

    square = index * (C * C)
    S = tl.load(states + index * (KB * VB) + dk[:, None] * VB + dv[None, :]).to(type)
    first = (segment == 0)[:, None]
    U = tl.dot(tl.where(first, A * tl.exp(before), 0.0).to(type), S, input_precision="ieee")
    U = tl.dot(ak, VV, U, input_precision="ieee").to(type)
    solve = tl.load(inverses + square + i[:, None] * C + i[None, :]).to(type)
    U = tl.dot(solve, U, input_precision="ieee")
    write(values, U, row, h, t0, T, H, V, C, VB)

    G = read(grad, row, h, t0, T, H, V, C, VB)
    D = tl.load(adjoints + index * (KB * VB) + dk[:, None] * VB + dv[None, :]).to(type)
    leave = tl.where((segment == last)[:, None], tl.exp(whole[None, :] - total), 0.0)
    R = tl.dot((B * leave).to(type), D, input_precision="ieee")
    R = tl.dot(bq, G, R, input_precision="ieee").to(type)
    turned = tl.load(inverses + square + i[None, :] * C + i[:, None]).to(type)
    R = tl.dot(turned, R, input_precision="ieee").to(type)
    write(received, R, row, h, t0, T, H, V, C, VB)
    W = tl.dot((KK * leave).to(type), D, input_precision="ieee")
    W = tl.dot(kq, G, W, input_precision="ieee")
    W = tl.dot(ka, R, W, input_precision="ieee")
    write(grad_v, W, row, h, t0, T, H, V, C, VB)


@triton.jit
def pairs(x, y, mask):
    """x yᵀ where the mask is set, else 0; x and y are (C, VB)."""
    return tl.where(mask, tl.dot(x, tl.trans(y), input_precision="ieee"), 0.0)


@triton.jit
def through(weights, x, SIZE: tl.constexpr, C: tl.constexpr, TURNED: tl.constexpr):
    """The level's part of ``weights`` (C, C), times x (C, KB)."""
    return tl.dot(tl.where(served(SIZE, C, TURNED), weights, 0.0).to(x.dtype), x, input_precision="ieee")


@triton.jit(do_not_specialize=["T", "H", "N"])
def row_gradients(q, k, v, a, b, gate, starts, states, grad, values, received, grad_q, grad_a, grad_g, T, H, N,
                  K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
                  STARTS: tl.constexpr):  # fmt: skip
    """One chunk's gradients of q and a; ``grad_g`` gets what rows change of the running sum of the log-decay."""
    _, h, row, t0, index = chunk_of_program(H, N, C)
    type = k.dtype.element_ty
    total, before, _ = sums(gate, row, h, t0, T, H, K, C, KB)
    _, segment = segments(starts, row, t0, T, C, STARTS)
    dk, dv = tl.arange(0, KB), tl.arange(0, VB)
    first = (segment == 0)[:, None]
    past, strict = near(segment, C, False, False), near(segment, C, True, False)
    G = read(grad, row, h, t0, T, H, V, C, VB)
    U = read(values, row, h, t0, T, H, V, C, VB)
    R = read(received, row, h, t0, T, H, V, C, VB)
    VV = read(v, row, h, t0, T, H, V, C, VB)
    qb, qk, ab, ak = pairs(G, U, past), pairs(G, VV, past), pairs(R, U, strict), pairs(R, VV, strict)
    ST = tl.load(states + index * (KB * VB) + dk[None, :] * VB + dv[:, None]).to(type)  # (v k)
    of_q = tl.dot(G, ST, input_precision="ieee") * tl.where(first, tl.exp(total), 0.0)
    of_a = tl.dot(R, ST, input_precision="ieee") * tl.where(first, tl.exp(before), 0.0)
    B = read(b, row, h, t0, T, H, K, C, KB)
    KK = read(k, row, h, t0, T, H, K, C, KB)
    for step in tl.static_range(6):
        if (PIECE << step) <= C:
            current, earlier, column = level(total, before, PIECE << step, C)
            erasing, writing = (B * column).to(type), (KK * column).to(type)
            part = through(qb, erasing, PIECE << step, C, False) + through(qk, writing, PIECE << step, C, False)
            of_q += part * current
            part = through(ab, erasing, PIECE << step, C, False) + through(ak, writing, PIECE << step, C, False)
            of_a += part * earlier
    write(grad_q, of_q, row, h, t0, T, H, K, C, KB)
    write(grad_a, of_a, row, h, t0, T, H, K, C, KB)
    change = read(q, row, h, t0, T, H, K, C, KB) * of_q
    own = read(a, row, h, t0, T, H, K, C, KB) * of_a  # a's row has the decays before its token
    change = tl.cumsum(change + own, 0, reverse=True) - own
    write(grad_g, change, row, h, t0, T, H, K, C, KB)


@triton.jit(do_not_specialize=["T", "H", "N"])
def column_gradients(q, k, v, a, b, gate, starts, states, adjoints, final, grad, values, received, grad_k, grad_b,
                     grad_g, T, H, N,
                     K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
                     STARTS: tl.constexpr):  # fmt: skip
    """One chunk's gradients of k and b, and of the log-decay, of which ``grad_g`` holds the rows' part."""
    n, h, row, t0, index = chunk_of_program(H, N, C)
    type = k.dtype.element_ty
    total, before, whole = sums(gate, row, h, t0, T, H, K, C, KB)
    mark, segment = segments(starts, row, t0, T, C, STARTS)
    last = tl.max(segment, 0)
    dk, dv = tl.arange(0, KB), tl.arange(0, VB)
    turned = dk[None, :] * VB + dv[:, None]
    past, strict = near(segment, C, False, True), near(segment, C, True, True)
    G = read(grad, row, h, t0, T, H, V, C, VB)
    U = read(values, row, h, t0, T, H, V, C, VB)
    R = read(received, row, h, t0, T, H, V, C, VB)
    VV = read(v, row, h, t0, T, H, V, C, VB)
    bq, kq, ba, ka = pairs(U, G, past), pairs(VV, G, past), pairs(U, R, strict), pairs(VV, R, strict)
    D = tl.load(adjoints + index * (KB * VB) + turned)  # (v k)
    leave = tl.where((segment == last)[:, None], tl.exp(whole[None, :] - total), 0.0)
    of_b = tl.dot(U, D.to(type), input_precision="ieee") * leave
    of_k = tl.dot(VV, D.to(type), input_precision="ieee") * leave
    # The state after the chunk is the one before the next.
    if n + 1 < N:
        after = tl.load(states + (index + 1) * (KB * VB) + turned).to(tl.float32)
    else:
        inside = (dk[None, :] < K) & (dv[:, None] < V)
        after = tl.load(final + (row * H + h) * (K * V) + dk[None, :] * V + dv[:, None], mask=inside, other=0.0)
    alive = tl.sum(D.to(tl.float32) * after, 0)
    Q = read(q, row, h, t0, T, H, K, C, KB)
    A = read(a, row, h, t0, T, H, K, C, KB)
    A = tl.where((mark == 0)[:, None], A, 0.0).to(type)
    for step in tl.static_range(6):
        if (PIECE << step) <= C:
            current, earlier, column = level(total, before, PIECE << step, C)
            asking, reading = (Q * current).to(type), (A * earlier).to(type)
            part = through(bq, asking, PIECE << step, C, True) + through(ba, reading, PIECE << step, C, True)
            of_b += part * column
            part = through(kq, asking, PIECE << step, C, True) + through(ka, reading, PIECE << step, C, True)
            of_k += part * column
    write(grad_b, of_b, row, h, t0, T, H, K, C, KB)
    write(grad_k, of_k, row, h, t0, T, H, K, C, KB)
    change = read(b, row, h, t0, T, H, K, C, KB) * of_b + read(k, row, h, t0, T, H, K, C, KB) * of_k
    change = read(grad_g, row, h, t0, T, H, K, C, KB) - tl.cumsum(change, 0, reverse=True) + alive[None, :]
    write(grad_g, change, row, h, t0, T, H, K, C, KB)
