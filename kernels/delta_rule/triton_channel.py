"""Triton kernels of delta_rule where each channel has its own decay (KDA): what differs from one decay a head.

Products q_i D_ij k_jᵀ of a chunk are made of halves of three sizes (64, 32, 16 tokens): rows of the later half decayed
since the cut, columns of the earlier one decayed until it, so that no exponent is positive. What is left, 8 tokens with
themselves, is referred to their middle: there no decay counts as less than 2^-24, so no power is beyond 2^96, and a
start is a mask. For the walks, rows of q and k are multiplied once: ``early_q``, ``early_k`` from the chunk's entry,
``late`` to its end (b t h k).
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqlong.kernels.delta_rule.triton_forward import EPS, C, rows_of, square

#: log2 of the smallest decay inside eight tokens; and what only a start is below, or a gate that is shut.
LEAST, START = tl.constexpr(-24.0), tl.constexpr(-200.0)


@triton.jit(do_not_specialize=["T", "H", "R", "NC"])
def decays(q, k, gate, total, segment, rq, rk, early_q, early_k, late, T, H, R, NC, sqb, sqt, sqh, skb, skt, skh,
           sgb, sgt, sgh, reset, K: tl.constexpr, KB: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """One chunk of one head: gate (b t h k, natural) -> running sums in log2, starts, rows of q and k decayed."""
    pid = tl.program_id(0)
    c = pid % NC
    h = (pid // NC) % H
    row = (pid // NC // H).to(tl.int64)
    t = c * C + tl.arange(0, C)
    d = tl.arange(0, KB)[None, :]
    inside = (t[:, None] < T) & (d < K)
    place = ((row * T + t[:, None]) * H + h) * K + d
    gate += row * sgb + h * sgh
    g = tl.load(gate + t[:, None].to(tl.int64) * sgt + d, mask=inside, other=0.0).to(tl.float32)
    g = tl.maximum(g * 1.4426950408889634, reset)
    b = tl.cumsum(g, 0)
    shut = tl.max(tl.where(d < K, g, reset), 1) < START
    tl.store(segment + (row * H + h) * (NC * C).to(tl.int64) + t, tl.cumsum(shut.to(tl.int32), 0))
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
def since_of(x, first):
    """What is left of rows x of log2 sums since that of the first, (1 k)."""
    return tl.exp2(tl.minimum(x - first, 0.0))


@triton.jit
def _halves(total, b, half, c, T, d, st, K: tl.constexpr):
    """Factors of a chunk's rows (C k) since, and of its columns until, the cut between halves of this size."""
    rows = tl.arange(0, C)
    late = ((rows & (2 * half - 1)) >= half)[:, None]
    cut = c * C + (rows & ~(2 * half - 1)) + half - 1
    at = total + tl.minimum(cut, T - 1)[:, None].to(tl.int64) * st + d
    edge = tl.load(at, mask=d < K, other=0.0)
    return tl.where(late, since_of(b, edge), 0.0), tl.where(late, 0.0, since_of(edge, b))


@triton.jit
def _eights(total, b, t, T, d, st, K: tl.constexpr, KS: tl.constexpr):
    """The same for eight tokens with themselves, referred to their middle."""
    seen = (tl.arange(0, C) > 0)[:, None] & (t < T)[:, None] & (d < K)
    before = tl.load(total + (t - 1)[:, None].to(tl.int64) * st + d, mask=seen, other=0.0)
    sums = tl.cumsum(tl.maximum(tl.where((t < T)[:, None], b - before, 0.0), LEAST), 0)
    eights = tl.reshape(sums, (C // 8, 8, KS))
    middle = tl.sum(tl.where((tl.arange(0, 8) == 3)[None, :, None], eights, 0.0), 1)
    middle = tl.reshape(eights - middle[:, None, :], (C, KS))
    return tl.exp2(middle), tl.exp2(-middle)


@triton.jit(do_not_specialize=["T", "H", "R", "NC"])
def products(q, k, total, segment, rq, rk, scores, erase, T, H, R, NC, sqb, sqt, sqh, skb, skt, skh,
             K: tl.constexpr, KB: tl.constexpr, KS: tl.constexpr):  # fmt: skip
    """One chunk of one head: the scores P, and k_i D_ij k_jᵀ where j < i (b h n C C), KS channels at once."""
    pid = tl.program_id(0)
    c = pid % NC
    h = (pid // NC) % H
    row = (pid // NC // H).to(tl.int64)
    index = row * H + h
    at = index * (NC * C).to(tl.int64)
    q += row * sqb + (h // R) * sqh
    k += row * skb + (h // R) * skh
    total += (row * T * H + h) * K
    st = H * K
    kind = k.dtype.element_ty
    rows = tl.arange(0, C)
    i, j = rows[:, None], rows[None, :]
    t = c * C + rows
    P = tl.zeros((C, C), dtype=tl.float32)
    E = tl.zeros((C, C), dtype=tl.float32)
    for s in tl.range(0, KB // KS, num_stages=1):
        d = (s * KS + tl.arange(0, KS))[None, :]
        here = (t < T)[:, None] & (d < K)
        x = tl.load(q + t[:, None].to(tl.int64) * sqt + d, mask=here, other=0.0).to(tl.float32)
        y = tl.load(k + t[:, None].to(tl.int64) * skt + d, mask=here, other=0.0).to(tl.float32)
        b = tl.load(total + t[:, None].to(tl.int64) * st + d, mask=here, other=0.0)
        for level in tl.range(0, 3, num_stages=1):
            since, until = _halves(total, b, C >> (level + 1), c, T, d, st, K)
            column = tl.trans((y * until).to(kind))
            inside = (i ^ j) < (C >> level)
            P += tl.where(inside, tl.dot((x * since).to(kind), column, input_precision="ieee"), 0.0)
            E += tl.where(inside, tl.dot((y * since).to(kind), column, input_precision="ieee"), 0.0)
        since, until = _eights(total, b, t, T, d, st, K, KS)
        column = tl.trans((y * until).to(kind))
        P += tl.where((i ^ j) < 8, tl.dot((x * since).to(kind), column, input_precision="ieee"), 0.0)
        E += tl.where((i ^ j) < 8, tl.dot((y * since).to(kind), column, input_precision="ieee"), 0.0)
    g = tl.load(segment + at + t)
    same = g[:, None] == g[None, :]
    r_q, r_k = tl.load(rq + at + t), tl.load(rk + at + t)
    P = tl.where(same & (i >= j), P * (r_q[:, None] * r_k[None, :]), 0.0)
    E = tl.where(same & (i > j), E * (r_k[:, None] * r_k[None, :]), 0.0)
    tl.store(square(scores, (index * NC + c) * (C * C)), P.to(scores.dtype.element_ty))
    tl.store(square(erase, (index * NC + c) * (C * C)), E)
