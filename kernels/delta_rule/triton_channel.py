"""Triton kernels of delta_rule where each channel has its own decay (KDA): what differs from one decay a head.

Products q_i D_ij k_jᵀ are made of blocks of 16 tokens: rows decayed since the first token of their block, columns
decayed until it, so that no exponent is positive; blocks on the diagonal go channel by channel. For the walks, rows of
q and k are multiplied once: ``early_q``, ``early_k`` from the chunk's entry, ``late`` to its end (b t h k).
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqlong.kernels.delta_rule.triton_forward import EPS, C, _inverse, _put, _times, rows_of, square


@triton.jit(do_not_specialize=["T", "H", "R", "NC"])
def decays(q, k, gate, total, rq, rk, early_q, early_k, late, T, H, R, NC, sqb, sqt, sqh, skb, skt, skh,
           K: tl.constexpr, KB: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """One chunk of one head: gate (b t h k) in log2 -> running sums, and rows of q and k decayed."""
    pid = tl.program_id(0)
    c = pid % NC
    h = (pid // NC) % H
    row = (pid // NC // H).to(tl.int64)
    t = c * C + tl.arange(0, C)
    d = tl.arange(0, KB)[None, :]
    inside = (t[:, None] < T) & (d < K)
    place = ((row * T + t[:, None]) * H + h) * K + d
    b = tl.cumsum(tl.load(gate + place, mask=inside, other=0.0), 0)
    bC = tl.min(b, 0)  # sums only fall, and tokens past the end add nothing
    tl.store(total + place, b, mask=inside)
    x = rows_of(q + row * sqb + (h // R) * sqh, t, T, sqt, K, KB).to(tl.float32)
    y = rows_of(k + row * skb + (h // R) * skh, t, T, skt, K, KB).to(tl.float32)
    r_q = tl.zeros((C,), dtype=tl.float32) + 1.0
    r_k = r_q
    if NORM:
        r_q = tl.rsqrt(tl.sum(x * x, 1) + EPS)
        r_k = tl.rsqrt(tl.sum(y * y, 1) + EPS)
    at = (row * H + h) * (NC * C).to(tl.int64) + t
    tl.store(rq + at, r_q)
    tl.store(rk + at, r_k)
    y = y * r_k[:, None]
    tl.store(early_q + place, (x * r_q[:, None] * tl.exp2(b)).to(early_q.dtype.element_ty), mask=inside)
    tl.store(early_k + place, (y * tl.exp2(b)).to(early_k.dtype.element_ty), mask=inside)
    tl.store(late + place, (y * tl.exp2(bC[None, :] - b)).to(late.dtype.element_ty), mask=inside)


@triton.jit
def _rows(x, r, total, t, T, sx, st, K: tl.constexpr, KB: tl.constexpr):
    """Sixteen rows in float32 at their length, and their sums of decays; those past the end are zero."""
    return rows_of(x, t, T, sx, K, KB).to(tl.float32) * r[:, None], rows_of(total, t, T, st, K, KB)


@triton.jit
def _first(total, t, T, st, K: tl.constexpr, KB: tl.constexpr):
    """The sum of decays at one token, or at the row's last."""
    d = tl.arange(0, KB)
    return tl.load(total + tl.minimum(t, T - 1).to(tl.int64) * st + d, mask=d < K, other=0.0)


@triton.jit
def _below(x, k, rx, rk, total, tx, tk, at, T, sx, sk, st, K: tl.constexpr, KB: tl.constexpr):
    """x_i D_ij k_jᵀ of sixteen tokens from tx and sixteen earlier ones from tk."""
    i = tl.arange(0, 16)
    x16, bx = _rows(x, tl.load(rx + at + tx + i), total, tx + i, T, sx, st, K, KB)
    k16, bk = _rows(k, tl.load(rk + at + tk + i), total, tk + i, T, sk, st, K, KB)
    edge = _first(total, tx, T, st, K, KB)[None, :]
    kind = k.dtype.element_ty
    left = (x16 * tl.exp2(tl.minimum(bx - edge, 0.0))).to(kind)
    right = (k16 * tl.exp2(tl.minimum(edge - bk, 0.0))).to(kind)
    return tl.dot(left, tl.trans(right), input_precision="ieee")


@triton.jit
def _diagonal(x, k, rx, rk, total, tx, at, T, sx, sk, st, K: tl.constexpr, KB: tl.constexpr, LAST: tl.constexpr):
    """The same of sixteen tokens with themselves, where j < i + LAST."""
    i = tl.arange(0, 16)
    d = tl.arange(0, KB)
    x16, bx = _rows(x, tl.load(rx + at + tx + i), total, tx + i, T, sx, st, K, KB)
    A = tl.zeros((16, 16), dtype=tl.float32)
    for j in range(0, 16):
        there = (d < K) & (tx + j < T)
        key = tl.load(k + (tx + j).to(tl.int64) * sk + d, mask=there, other=0.0).to(tl.float32) * tl.load(
            rk + at + tx + j
        )
        bj = tl.load(total + (tx + j).to(tl.int64) * st + d, mask=there, other=0.0)
        column = tl.sum(x16 * key[None, :] * tl.exp2(tl.minimum(bx - bj[None, :], 0.0)), 1)
        A = tl.where(i[None, :] == j, column[:, None], A)
    return tl.where(i[:, None] + LAST > i[None, :], A, 0.0)


@triton.jit
def _cell(x, r, c):
    """Pointers to block (r, c) of a (C C) matrix."""
    i = tl.arange(0, 16)
    return x + (r * 16 + i)[:, None] * C + (c * 16 + i)[None, :]


@triton.jit(do_not_specialize=["T", "H", "R", "NC"])
def products(q, k, total, rq, rk, scores, erase, T, H, R, NC, sqb, sqt, sqh, skb, skt, skh,
             K: tl.constexpr, KB: tl.constexpr):  # fmt: skip
    """Sixteen rows of one head: the scores P, and k_i D_ij k_jᵀ where j < i (b h n C C)."""
    pid = tl.program_id(0)
    r = pid % 4
    c = (pid // 4) % NC
    h = (pid // 4 // NC) % H
    row = (pid // 4 // NC // H).to(tl.int64)
    index = row * H + h
    at = index * (NC * C).to(tl.int64)
    q += row * sqb + (h // R) * sqh
    k += row * skb + (h // R) * skh
    total += (row * T * H + h) * K
    st = H * K
    t = c * C + r * 16
    scores += (index * NC + c) * (C * C)
    erase += (index * NC + c) * (C * C)
    for m in tl.range(0, r, num_stages=1):
        tm = c * C + m * 16
        P = _below(q, k, rq, rk, total, t, tm, at, T, sqt, skt, st, K, KB)
        tl.store(_cell(scores, r, m), P.to(scores.dtype.element_ty))
        E = _below(k, k, rk, rk, total, t, tm, at, T, skt, skt, st, K, KB)
        tl.store(_cell(erase, r, m), E)
    P = _diagonal(q, k, rq, rk, total, t, at, T, sqt, skt, st, K, KB, 1)
    tl.store(_cell(scores, r, r), P.to(scores.dtype.element_ty))
    E = _diagonal(k, k, rk, rk, total, t, at, T, skt, skt, st, K, KB, 0)
    tl.store(_cell(erase, r, r), E)
    none = tl.zeros((16, 16), dtype=tl.float32)
    for m in tl.range(r + 1, 4, num_stages=1):
        tl.store(_cell(scores, r, m), none.to(scores.dtype.element_ty))
        tl.store(_cell(erase, r, m), none)


@triton.jit
def invert(weight, erase, inverse):
    """One chunk of one head: (I + A)^-1, A = diag(weight) erase."""
    pid = tl.program_id(0).to(tl.int64)  # heads of rows, and chunks of a head, lie side by side
    w = weight + pid * C + tl.arange(0, 16)
    erase += pid * (C * C)
    inverse += pid * (C * C)
    none = tl.zeros((16, 16), dtype=tl.float32)
    w0 = tl.load(w + 0)[:, None]
    T00 = _inverse(w0 * tl.load(_cell(erase, 0, 0)))
    _put(inverse, 0, 0, T00)
    _put(inverse, 0, 1, none)
    _put(inverse, 0, 2, none)
    _put(inverse, 0, 3, none)
    w1 = tl.load(w + 16)[:, None]
    T11 = _inverse(w1 * tl.load(_cell(erase, 1, 1)))
    _put(inverse, 1, 1, T11)
    _put(inverse, 1, 2, none)
    _put(inverse, 1, 3, none)
    A10 = w1 * tl.load(_cell(erase, 1, 0))
    T10 = -_times(T11, _times(A10, T00))
    _put(inverse, 1, 0, T10)
    w2 = tl.load(w + 32)[:, None]
    T22 = _inverse(w2 * tl.load(_cell(erase, 2, 2)))
    _put(inverse, 2, 2, T22)
    _put(inverse, 2, 3, none)
    A20 = w2 * tl.load(_cell(erase, 2, 0))
    A21 = w2 * tl.load(_cell(erase, 2, 1))
    T21 = -_times(T22, _times(A21, T11))
    _put(inverse, 2, 1, T21)
    T20 = -_times(T22, _times(A20, T00) + _times(A21, T10))
    _put(inverse, 2, 0, T20)
    w3 = tl.load(w + 48)[:, None]
    T33 = _inverse(w3 * tl.load(_cell(erase, 3, 3)))
    _put(inverse, 3, 3, T33)
    A30 = w3 * tl.load(_cell(erase, 3, 0))
    A31 = w3 * tl.load(_cell(erase, 3, 1))
    A32 = w3 * tl.load(_cell(erase, 3, 2))
    T32 = -_times(T33, _times(A32, T22))
    _put(inverse, 3, 2, T32)
    T31 = -_times(T33, _times(A31, T11) + _times(A32, T21))
    _put(inverse, 3, 1, T31)
    T30 = -_times(T33, _times(A30, T00) + _times(A31, T10) + _times(A32, T20))
    _put(inverse, 3, 0, T30)


@triton.jit(do_not_specialize=["T", "H", "NC"])
def local(early_k, v, go, weight, kept, fresh, erase, dv, through_k, through_q, dweight, T, H, NC, svb, svt, svh,
          sgb, sgt, sgh, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
          BV: tl.constexpr):  # fmt: skip
    """One chunk of one head: gradients of v and of the weight, and of ``erase`` and ``scores``. ``dv`` holds dR."""
    pid = tl.program_id(0)
    c = pid % NC
    h = (pid // NC) % H
    row = (pid // NC // H).to(tl.int64)
    index = row * H + h
    t = c * C + tl.arange(0, C)
    at = index * (NC * C).to(tl.int64) + t
    w = tl.load(weight + at)
    dA = tl.zeros((C, C), dtype=tl.float32)
    dP = tl.zeros((C, C), dtype=tl.float32)
    dw = tl.zeros((C,), dtype=tl.float32)
    states = ((row * NC + c) * H + h) * (VB * KB) + tl.arange(0, KB)[None, :]
    for iv in tl.range(0, VB // BV, num_stages=1):
        column = iv * BV + tl.arange(0, BV)
        values = (t[:, None] < T) & (column < V)[None, :]
        place = ((row * T + t[:, None]) * H + h) * V + column[None, :]
        N = tl.load(fresh + place, mask=values, other=0.0)
        dR = tl.load(dv + place, mask=values, other=0.0)
        dO = tl.load(go + row * sgb + h * sgh + t[:, None].to(tl.int64) * sgt + column[None, :], mask=values, other=0.0)
        X = tl.load(v + row * svb + h * svh + t[:, None].to(tl.int64) * svt + column[None, :], mask=values, other=0.0)
        S = tl.load(kept + states + column[:, None] * KB)
        Ke = rows_of(early_k + (row * T * H + h) * K, t, T, H * K, K, KB)
        dA = tl.dot(dR, tl.trans(N), dA, input_precision="ieee")
        dP = tl.dot(dO, tl.trans(N), dP, input_precision="ieee")
        held = tl.dot(Ke, tl.trans(S), input_precision="ieee")
        dRf = dR.to(tl.float32)
        dw += tl.sum(dRf * (X.to(tl.float32) - held), 1)
        tl.store(dv + place, (dRf * w[:, None]).to(dv.dtype.element_ty), mask=values)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    dA = tl.where(i > j, -dA, 0.0)
    dP = tl.where(i >= j, dP, 0.0)
    dw += tl.sum(dA * tl.load(square(erase, (index * NC + c) * (C * C))), 1)
    tl.store(dweight + at, dw)
    tl.store(square(through_k, (index * NC + c) * (C * C)), (dA * w[:, None]).to(through_k.dtype.element_ty))
    tl.store(square(through_q, (index * NC + c) * (C * C)), dP.to(through_q.dtype.element_ty))


@triton.jit
def _sixteen(x, r, c):
    """Block (r, c) of a (C C) matrix."""
    return tl.load(_cell(x, r, c))


@triton.jit(do_not_specialize=["T", "H", "NC"])
def keys(q, k, go, total, rq, rk, kept, dkept, fresh, dv, through_k, through_q, dq, dk, terms, anchors, T, H, NC,
         sqb, sqt, sqh, skb, skt, skh, sgb, sgt, sgh, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr,
         VB: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """Sixteen tokens of one head: gradients of q and k, and of the running sums but for those of the chunk's end.

    ``terms`` (b t h k) is q dq + k dk of rows less k dk of columns; ``anchors`` (b n h 4 k) what comes from the end.
    """
    pid = tl.program_id(0)
    r = pid % 4
    c = (pid // 4) % NC
    h = (pid // 4 // NC) % H
    row = (pid // 4 // NC // H).to(tl.int64)
    index = row * H + h
    at = index * (NC * C).to(tl.int64)
    q += row * sqb + h * sqh
    k += row * skb + h * skh
    total += (row * T * H + h) * K
    st = H * K
    through_k += (index * NC + c) * (C * C)
    through_q += (index * NC + c) * (C * C)
    kind = k.dtype.element_ty
    i = tl.arange(0, 16)
    d = tl.arange(0, KB)
    t0 = c * C + r * 16
    t = t0 + i
    q16, b = _rows(q, tl.load(rq + at + t), total, t, T, sqt, st, K, KB)
    k16, _ = _rows(k, tl.load(rk + at + t), total, t, T, skt, st, K, KB)
    bC = _first(total, c * C + C - 1, T, st, K, KB)

    # Through the states.
    of_q = tl.zeros((16, KB), dtype=tl.float32)
    of_rows = tl.zeros((16, KB), dtype=tl.float32)
    of_late = tl.zeros((16, KB), dtype=tl.float32)
    carried = tl.zeros((KB,), dtype=tl.float32)
    states = ((row * NC + c) * H + h) * (VB * KB) + d[None, :]
    for iv in tl.range(0, VB // BV, num_stages=1):
        column = iv * BV + tl.arange(0, BV)
        values = (t[:, None] < T) & (column < V)[None, :]
        place = ((row * T + t[:, None]) * H + h) * V + column[None, :]
        dO = tl.load(go + row * sgb + h * sgh + t[:, None].to(tl.int64) * sgt + column[None, :], mask=values, other=0.0)
        dX = tl.load(dv + place, mask=values, other=0.0)
        N = tl.load(fresh + place, mask=values, other=0.0)
        S = tl.load(kept + states + column[:, None] * KB)
        G = tl.load(dkept + states + column[:, None] * KB)
        of_q = tl.dot(dO, S, of_q, input_precision="ieee")
        of_rows = tl.dot(dX, S, of_rows, input_precision="ieee")
        of_late = tl.dot(N, G, of_late, input_precision="ieee")
        if r == 3:
            carried += tl.sum(S.to(tl.float32) * G.to(tl.float32), 0)
    enter = tl.exp2(b)
    of_q *= enter
    of_rows *= -enter
    of_late *= tl.exp2(tl.minimum(bC[None, :] - b, 0.0))
    left = tl.sum(of_late * k16, 0) + carried * tl.exp2(bC)
    tl.store(anchors + (((row * NC + c) * H + h) * 4 + r) * K + d, left, mask=d < K)

    # As rows of earlier columns.
    edge = _first(total, t0, T, st, K, KB)[None, :]
    near = tl.exp2(tl.minimum(b - edge, 0.0))
    sum_q = tl.zeros((16, KB), dtype=tl.float32)
    sum_k = tl.zeros((16, KB), dtype=tl.float32)
    for m in tl.range(0, r, num_stages=1):
        tm = c * C + m * 16 + i
        y, by = _rows(k, tl.load(rk + at + tm), total, tm, T, skt, st, K, KB)
        y = (y * tl.exp2(tl.minimum(edge - by, 0.0))).to(kind)
        sum_q = tl.dot(_sixteen(through_q, r, m), y, sum_q, input_precision="ieee")
        sum_k = tl.dot(_sixteen(through_k, r, m), y, sum_k, input_precision="ieee")
    of_q += sum_q * near
    of_rows += sum_k * near

    # As columns of later rows.
    of_columns = tl.zeros((16, KB), dtype=tl.float32)
    for m in tl.range(r + 1, 4, num_stages=1):
        tm = c * C + m * 16 + i
        far = _first(total, c * C + m * 16, T, st, K, KB)[None, :]
        y, by = _rows(k, tl.load(rk + at + tm), total, tm, T, skt, st, K, KB)
        x, _ = _rows(q, tl.load(rq + at + tm), total, tm, T, sqt, st, K, KB)
        near = tl.exp2(tl.minimum(by - far, 0.0))
        got = tl.dot(tl.trans(_sixteen(through_k, m, r)), (y * near).to(kind), input_precision="ieee")
        got = tl.dot(tl.trans(_sixteen(through_q, m, r)), (x * near).to(kind), got, input_precision="ieee")
        of_columns += got * tl.exp2(tl.minimum(far - b, 0.0))

    # With one another, token by token.
    for j in range(0, 16):
        there = (d < K) & (t0 + j < T)
        key = tl.load(k + (t0 + j).to(tl.int64) * skt + d, mask=there, other=0.0).to(tl.float32)
        key = (key * tl.load(rk + at + t0 + j))[None, :]
        bj = tl.load(total + (t0 + j).to(tl.int64) * st + d, mask=there, other=0.0)
        D = tl.exp2(tl.minimum(b - bj[None, :], 0.0))
        cell = (r * 16 + i) * C + r * 16 + j
        gk = tl.load(through_k + cell).to(tl.float32)[:, None] * D
        gq = tl.load(through_q + cell).to(tl.float32)[:, None] * D
        of_q += gq * key
        of_rows += gk * key
        of_columns += tl.where(i[:, None] == j, tl.sum(gk * k16 + gq * q16, 0)[None, :], 0.0)

    of_columns += of_late
    inside = (t[:, None] < T) & (d < K)[None, :]
    place = ((row * T + t[:, None]) * H + h) * K + d[None, :]
    tl.store(terms + place, q16 * of_q + k16 * (of_rows - of_columns), mask=inside)
    of_rows += of_columns
    if NORM:
        of_q = (of_q - q16 * tl.sum(of_q * q16, 1)[:, None]) * tl.load(rq + at + t)[:, None]
        of_rows = (of_rows - k16 * tl.sum(of_rows * k16, 1)[:, None]) * tl.load(rk + at + t)[:, None]
    tl.store(dq + place, of_q.to(dq.dtype.element_ty), mask=inside)
    tl.store(dk + place, of_rows.to(dk.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "H", "NC"])
def gates(terms, anchors, T, H, NC, K: tl.constexpr, KB: tl.constexpr):
    """One chunk of one head, in place: gradients of running sums (b t h k) become those of the gates themselves."""
    pid = tl.program_id(0)
    c = pid % NC
    h = (pid // NC) % H
    row = (pid // NC // H).to(tl.int64)
    t = c * C + tl.arange(0, C)
    d = tl.arange(0, KB)
    place = ((row * T + t[:, None]) * H + h) * K + d[None, :]
    inside = (t[:, None] < T) & (d < K)[None, :]
    x = tl.cumsum(tl.load(terms + place, mask=inside, other=0.0), 0, reverse=True)
    ends = anchors + ((row * NC + c) * H + h) * 4 * K + tl.arange(0, 4)[:, None] * K + d[None, :]
    anchor = tl.sum(tl.load(ends, mask=(d < K)[None, :], other=0.0), 0)
    tl.store(terms + place, x + anchor[None, :], mask=inside)
