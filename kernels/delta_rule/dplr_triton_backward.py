"""Triton kernels of dplr's gradients; see dplr_triton_kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from seqlong.kernels.delta_rule.dplr_triton_kernels import (
    PIECE,
    level,
    near,
    product,
    read,
    segments,
    served,
    sums,
    write,
)


@triton.jit(do_not_specialize=["T", "H", "N"])
def reads(q, k, v, a, b, gate, starts, inverses, states, adjoints, grad, values, received, grad_v, T, H, N,
          K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
          STARTS: tl.constexpr):  # fmt: skip
    """One chunk: what a reads (``values``, C VB), its gradient before the inverse (``received``), and that of v."""
    pid = tl.program_id(0)
    n = pid % N
    h = (pid // N) % H
    row = (pid // N // H).to(tl.int64)
    t0 = (n * C).to(tl.int64)
    index = (row * H + h) * N + n
    type = k.dtype.element_ty
    total, before, whole = sums(gate, row, h, t0, T, H, K, C, KB)
    mark, segment = segments(starts, row, t0, T, C, STARTS)
    last = tl.max(segment, 0)
    i, dk, dv = tl.arange(0, C), tl.arange(0, KB), tl.arange(0, VB)
    A = read(a, row, h, t0, T, H, K, C, KB)
    A = tl.where((mark == 0)[:, None], A, 0.0).to(type)
    KK = read(k, row, h, t0, T, H, K, C, KB)
    VV = read(v, row, h, t0, T, H, V, C, VB)
    square = index * (C * C)
    S = tl.load(states + index * (KB * VB) + dk[:, None] * VB + dv[None, :]).to(type)
    first = (segment == 0)[:, None]
    U = tl.dot(tl.where(first, A * tl.exp(before), 0.0).to(type), S, input_precision="ieee")
    scores = product(A, KK, total, before, near(segment, C, True, False), C, False).to(type)
    U = tl.dot(scores, VV, U, input_precision="ieee").to(type)
    solve = tl.load(inverses + square + i[:, None] * C + i[None, :]).to(type)
    U = tl.dot(solve, U, input_precision="ieee")
    write(values, U, row, h, t0, T, H, V, C, VB)

    G = read(grad, row, h, t0, T, H, V, C, VB)
    D = tl.load(adjoints + index * (KB * VB) + dk[:, None] * VB + dv[None, :]).to(type)
    leave = tl.where((segment == last)[:, None], tl.exp(whole[None, :] - total), 0.0)
    B = read(b, row, h, t0, T, H, K, C, KB)
    Q = read(q, row, h, t0, T, H, K, C, KB)
    past = near(segment, C, False, True)
    R = tl.dot((B * leave).to(type), D, input_precision="ieee")
    R = tl.dot(product(Q, B, total, total, past, C, True).to(type), G, R, input_precision="ieee").to(type)
    turned = tl.load(inverses + square + i[None, :] * C + i[:, None]).to(type)
    R = tl.dot(turned, R, input_precision="ieee")
    write(received, R, row, h, t0, T, H, V, C, VB)
    R = R.to(type)
    W = tl.dot((KK * leave).to(type), D, input_precision="ieee")
    W = tl.dot(product(Q, KK, total, total, past, C, True).to(type), G, W, input_precision="ieee")
    later = near(segment, C, True, True)
    W = tl.dot(product(A, KK, total, before, later, C, True).to(type), R, W, input_precision="ieee")
    write(grad_v, W, row, h, t0, T, H, V, C, VB)


@triton.jit
def row_gradient(found, left, right, mask, y, total, rows, C: tl.constexpr):
    """found += Σ_j (left_i · right_j) y_j ⊙ decay over the pairs of the mask; left and right are (C, VB)."""
    pairs = tl.where(mask, tl.dot(left, tl.trans(right), input_precision="ieee"), 0.0)
    for step in tl.static_range(6):
        if (PIECE << step) <= C:
            row, column = level(total, rows, PIECE << step, C)
            here = tl.where(served(PIECE << step, C, False), pairs, 0.0).to(y.dtype)
            found += tl.dot(here, (y * column).to(y.dtype), input_precision="ieee") * row
    return found


@triton.jit
def column_gradient(found, left, right, mask, x, total, rows, C: tl.constexpr):
    """found += Σ_i (left_j · right_i) x_i ⊙ decay over the pairs of the mask, turned: row j, column i."""
    pairs = tl.where(mask, tl.dot(left, tl.trans(right), input_precision="ieee"), 0.0)
    for step in tl.static_range(6):
        if (PIECE << step) <= C:
            row, column = level(total, rows, PIECE << step, C)
            here = tl.where(served(PIECE << step, C, True), pairs, 0.0).to(x.dtype)
            found += tl.dot(here, (x * row).to(x.dtype), input_precision="ieee") * column
    return found


@triton.jit(do_not_specialize=["T", "H", "N"])
def gradients(q, k, v, a, b, gate, starts, states, adjoints, final, grad, values, received, grad_q, grad_k, grad_a,
              grad_b, grad_g, T, H, N,
              K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
              STARTS: tl.constexpr):  # fmt: skip
    """One chunk's gradients of q, k, a, b and of the log-decay, one after another: each needs but a few tiles."""
    pid = tl.program_id(0)
    n = pid % N
    h = (pid // N) % H
    row = (pid // N // H).to(tl.int64)
    t0 = (n * C).to(tl.int64)
    index = (row * H + h) * N + n
    type = k.dtype.element_ty
    total, before, whole = sums(gate, row, h, t0, T, H, K, C, KB)
    mark, segment = segments(starts, row, t0, T, C, STARTS)
    last = tl.max(segment, 0)
    dk, dv = tl.arange(0, KB), tl.arange(0, VB)
    turned = dk[None, :] * VB + dv[:, None]
    first = (segment == 0)[:, None]
    G = read(grad, row, h, t0, T, H, V, C, VB)
    U = read(values, row, h, t0, T, H, V, C, VB)
    R = read(received, row, h, t0, T, H, V, C, VB)
    VV = read(v, row, h, t0, T, H, V, C, VB)
    B = read(b, row, h, t0, T, H, K, C, KB)
    KK = read(k, row, h, t0, T, H, K, C, KB)

    # Rows: q and a.
    ST = tl.load(states + index * (KB * VB) + turned).to(type)  # (v k)
    past = near(segment, C, False, False)
    found = tl.dot(G, ST, input_precision="ieee") * tl.where(first, tl.exp(total), 0.0)
    found = row_gradient(found, G, U, past, B, total, total, C)
    found = row_gradient(found, G, VV, past, KK, total, total, C)
    write(grad_q, found, row, h, t0, T, H, K, C, KB)
    Q = read(q, row, h, t0, T, H, K, C, KB)
    change = Q * found
    strict = near(segment, C, True, False)
    found = tl.dot(R, ST, input_precision="ieee") * tl.where(first, tl.exp(before), 0.0)
    found = row_gradient(found, R, U, strict, B, total, before, C)
    found = row_gradient(found, R, VV, strict, KK, total, before, C)
    found = tl.where((mark == 0)[:, None], found, 0.0)
    write(grad_a, found, row, h, t0, T, H, K, C, KB)
    A = read(a, row, h, t0, T, H, K, C, KB)
    A = tl.where((mark == 0)[:, None], A, 0.0).to(type)
    own = A * found  # a's row has the decays before its token
    change += own

    # Columns: b and k.
    DT = tl.load(adjoints + index * (KB * VB) + turned).to(type)
    leave = tl.where((segment == last)[:, None], tl.exp(whole[None, :] - total), 0.0)
    past = near(segment, C, False, True)
    strict = near(segment, C, True, True)
    found = tl.dot(U, DT, input_precision="ieee") * leave
    found = column_gradient(found, U, G, past, Q, total, total, C)
    found = column_gradient(found, U, R, strict, A, total, before, C)
    write(grad_b, found, row, h, t0, T, H, K, C, KB)
    change -= B * found
    found = tl.dot(VV, DT, input_precision="ieee") * leave
    found = column_gradient(found, VV, G, past, Q, total, total, C)
    found = column_gradient(found, VV, R, strict, A, total, before, C)
    write(grad_k, found, row, h, t0, T, H, K, C, KB)
    change -= KK * found

    # The state after the chunk is the one before the next.
    D = tl.load(adjoints + index * (KB * VB) + turned).to(tl.float32)
    if n + 1 < N:
        after = tl.load(states + (index + 1) * (KB * VB) + turned).to(tl.float32)
    else:
        inside = (dk[None, :] < K) & (dv[:, None] < V)
        after = tl.load(final + (row * H + h) * (K * V) + dk[None, :] * V + dv[:, None], mask=inside, other=0.0)
    alive = tl.sum(D * after, 0)
    change = tl.cumsum(change, 0, reverse=True) - own + alive[None, :]
    write(grad_g, change, row, h, t0, T, H, K, C, KB)
