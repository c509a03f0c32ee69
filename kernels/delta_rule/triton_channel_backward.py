"""Triton kernels of delta_rule's gradients where each channel has its own decay (KDA).

As in ``triton_channel.py``, but in programs of 16 rows, which need fewer registers: blocks of 16 tokens with one
another, and a block with itself as the later half with the earlier one, and each half with itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqlong.kernels.delta_rule.triton_channel import LEAST, START, since_of
from seqlong.kernels.delta_rule.triton_forward import C, rows_of, square
from seqlong.kernels.delta_rule.triton_inverse import cell


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
def _row(x, n: tl.constexpr):
    """Row n of sixteen, (1 k)."""
    return tl.sum(tl.where((tl.arange(0, 16) == n)[:, None], x, 0.0), 0)[None, :]


@triton.jit
def _near(b, total, t, chunk, T, st, K: tl.constexpr, KB: tl.constexpr):
    """Factors of sixteen tokens with themselves, (16 k): late and early of the two halves, and of both since their
    middles; and which pairs of a half may see one another, (16 16)."""
    i, d = tl.arange(0, 16), tl.arange(0, KB)[None, :]
    late = (i >= 8)[:, None]
    cut = _row(b, 7)
    seen = (t > chunk)[:, None] & (t < T)[:, None] & (d < K)
    before = tl.load(total + (t - 1)[:, None].to(tl.int64) * st + d, mask=seen, other=0.0)
    gate = tl.where((t < T)[:, None], b - before, 0.0)
    segment = tl.cumsum((tl.max(tl.where(d < K, gate, -1e30), 1) < START).to(tl.int32), 0)
    sums = tl.cumsum(tl.maximum(gate, LEAST), 0)
    middle = sums - tl.where(late, _row(sums, 11), _row(sums, 3))
    near = ((i[:, None] ^ i[None, :]) < 8) & (segment[:, None] == segment[None, :])
    return tl.where(late, since_of(b, cut), 0.0), tl.where(late, 0.0, since_of(cut, b)), middle, near


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
    return tl.load(cell(x, r, c))


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

    # What a pair of tokens adds to ``terms`` is nothing from the later one on: it is formed of the same rounded factors
    # on both sides, so that it cancels.
    e = q16 * of_q + k16 * (of_rows - of_late)

    # As rows of earlier columns.
    edge = _first(total, t0, T, st, K, KB)[None, :]
    since = since_of(b, edge)
    sum_q = tl.zeros((16, KB), dtype=tl.float32)
    sum_k = tl.zeros((16, KB), dtype=tl.float32)
    for m in tl.range(0, r, num_stages=1):
        tm = c * C + m * 16 + i
        y, by = _rows(k, tl.load(rk + at + tm), total, tm, T, skt, st, K, KB)
        y = (y * since_of(edge, by)).to(kind)
        sum_q = tl.dot(_sixteen(through_q, r, m), y, sum_q, input_precision="ieee")
        sum_k = tl.dot(_sixteen(through_k, r, m), y, sum_k, input_precision="ieee")
    of_q += sum_q * since
    of_rows += sum_k * since
    e += sum_q * (q16 * since).to(kind).to(tl.float32) + sum_k * (k16 * since).to(kind).to(tl.float32)

    # As columns of later rows.
    of_columns = tl.zeros((16, KB), dtype=tl.float32)
    for m in tl.range(r + 1, 4, num_stages=1):
        tm = c * C + m * 16 + i
        far = _first(total, c * C + m * 16, T, st, K, KB)[None, :]
        y, by = _rows(k, tl.load(rk + at + tm), total, tm, T, skt, st, K, KB)
        x, _ = _rows(q, tl.load(rq + at + tm), total, tm, T, sqt, st, K, KB)
        since = since_of(by, far)
        got = tl.dot(tl.trans(_sixteen(through_k, m, r)), (y * since).to(kind), input_precision="ieee")
        got = tl.dot(tl.trans(_sixteen(through_q, m, r)), (x * since).to(kind), got, input_precision="ieee")
        until = since_of(far, b)
        of_columns += got * until
        e -= got * (k16 * until).to(kind).to(tl.float32)

    # With one another: the later half with the earlier one, then each half with itself.
    late, early, middle, near = _near(b, total, t, c * C, T, st, K, KB)
    dP, dE = _sixteen(through_q, r, r), _sixteen(through_k, r, r)
    for level in tl.static_range(2):
        if level == 0:
            row_factor, column_factor = late, early
            mq = tl.where(i[:, None] >= 8, dP, 0.0)
            mk = tl.where(i[:, None] >= 8, dE, 0.0)
        else:
            row_factor, column_factor = tl.exp2(middle), tl.exp2(-middle)
            mq = tl.where(near, dP, 0.0)
            mk = tl.where(near, dE, 0.0)
        x = (q16 * row_factor).to(kind)
        y = (k16 * row_factor).to(kind)
        z = (k16 * column_factor).to(kind)
        got = tl.dot(mq, z, input_precision="ieee")
        of_q += got * row_factor
        e += got * x.to(tl.float32)
        got = tl.dot(mk, z, input_precision="ieee")
        of_rows += got * row_factor
        e += got * y.to(tl.float32)
        got = tl.dot(tl.trans(mq), x, input_precision="ieee")
        got = tl.dot(tl.trans(mk), y, got, input_precision="ieee")
        of_columns += got * column_factor
        e -= got * z.to(tl.float32)

    of_columns += of_late
    inside = (t[:, None] < T) & (d < K)[None, :]
    place = ((row * T + t[:, None]) * H + h) * K + d[None, :]
    tl.store(terms + place, e, mask=inside)
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
