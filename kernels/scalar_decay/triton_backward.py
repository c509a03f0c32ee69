"""Triton kernels of scalar_decay: gradients. See triton_forward.py for words and layout.

dS walks against the reading order. With P = grad o · vᵀ and G = 2^(b_i - b_j):

    grad q = (P ⊙ G) k + 2^b ⊙ (grad o · Sᵀ)        grad k = (P ⊙ G)ᵀ q + 2^(bC - b) ⊙ (v · dSᵀ)
    grad v = (q kᵀ ⊙ G)ᵀ grad o + 2^(bC - b) ⊙ (k dS)

and the decay's gradient is anchored at the chunk's entry: grad g_t = <S, dS> - Σ (q·grad q - k·grad k) over the tokens
of the chunk read before t. The terms come from sums in float32, never from rounded gradients.

No accumulator is transposed into a product (Triton 3.4 to 3.7.0 miscompile that on Hopper): where a transpose is
needed, the transposed product is formed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqlong.kernels.scalar_decay.triton_forward import entering, leaving
from seqlong.kernels.triton_pieces import segment_of_program


@triton.jit(do_not_specialize=["T", "H", "NC", "NS", "CPS"])
def fused(q, k, v, total, go, kept, entry, dq, dk, dv, dg, dinitial, T, H, NC, NS, CPS, sqb, sqt, skb, skt, svb, svt,
          sob, sot, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, C: tl.constexpr,
          ENTRY: tl.constexpr, DINITIAL: tl.constexpr, REV: tl.constexpr, ST: tl.constexpr):  # fmt: skip
    """Small heads (K, V <= 64) that share nothing: every gradient in one walk, dS on chip, S read from ``kept``."""
    pid = tl.program_id(0)  # not by segment_of_program, with which ptxas spills more here
    h = pid % H
    r = pid // H
    s = r % NS
    row = (r // NS).to(tl.int64)
    first = s * CPS
    n = tl.minimum(CPS, NC - first)
    LAST: tl.constexpr = 0 if REV else C - 1
    STEP: tl.constexpr = 1 if REV else -1
    c = first if REV else first + n - 1
    index = row * H + h
    base = index * (NC * C).to(tl.int64)
    out = row * T * H + h
    q_d = tl.make_tensor_descriptor(q + row * sqb + h * K, [T, K], [sqt, 1], [C, KB])
    k_d = tl.make_tensor_descriptor(k + row * skb + h * K, [T, K], [skt, 1], [C, KB])
    v_d = tl.make_tensor_descriptor(v + row * svb + h * V, [T, V], [svt, 1], [C, VB])
    go_d = tl.make_tensor_descriptor(go + row * sob + h * V, [T, V], [sot, 1], [C, VB])
    dq_d = tl.make_tensor_descriptor(dq + out * K, [T, K], [H * K, 1], [C, KB])
    dk_d = tl.make_tensor_descriptor(dk + out * K, [T, K], [H * K, 1], [C, KB])
    dv_d = tl.make_tensor_descriptor(dv + out * V, [T, V], [H * V, 1], [C, VB])
    s_d = tl.make_tensor_descriptor(kept + row * NC * H * (KB * VB), [NC * H * VB, KB], [KB, 1], [VB, KB])
    b_d = tl.make_tensor_descriptor(total + base, [NC * C], [1], [C])
    dS = entering(entry, index, s, NS, 0, K, V, KB, VB, VB, ENTRY)
    rows = tl.arange(0, C)
    i_, j_ = rows[:, None], rows[None, :]
    seen = i_ <= j_ if REV else i_ >= j_
    seen_t = i_ >= j_ if REV else i_ <= j_
    ends = total + base + LAST
    bC_next = tl.load(ends + c * C)
    for i in tl.range(0, n, num_stages=ST):
        t0 = c * C
        Q = q_d.load([t0, 0])
        Kt = k_d.load([t0, 0])
        X = v_d.load([t0, 0])
        dO = go_d.load([t0, 0])
        S = s_d.load([(c * H + h) * VB, 0])
        b = b_d.load([t0])
        bC = bC_next
        bC_next = tl.load(ends + (c + STEP) * C, mask=i + 1 < n, other=0.0)
        w = tl.exp2(bC - b)
        gq = tl.exp2(b)
        dSb = dS.to(Q.dtype)
        AT = tl.dot(Kt, tl.trans(Q), input_precision="ieee")
        AT = tl.where(seen_t, AT * tl.exp2(b[None, :] - b[:, None]), 0.0).to(Q.dtype)
        dV = tl.dot(Kt, dSb, input_precision="ieee") * w[:, None]
        dV = tl.dot(AT, dO, dV, input_precision="ieee")
        dv_d.store([t0, 0], dV.to(dv.dtype.element_ty))
        P = tl.dot(dO, tl.trans(X), input_precision="ieee")
        P = tl.where(seen, P * tl.exp2(b[:, None] - b[None, :]), 0.0).to(Q.dtype)
        dQ = tl.dot(dO, S, input_precision="ieee") * gq[:, None]
        dQ = tl.dot(P, Kt, dQ, input_precision="ieee")
        dq_d.store([t0, 0], dQ.to(dq.dtype.element_ty))
        e = tl.sum(dQ * Q.to(tl.float32), 1)
        dKT = tl.dot(dSb, tl.trans(X), input_precision="ieee") * w[None, :]
        dKT = tl.dot(tl.trans(Q), P, dKT, input_precision="ieee")
        dk_d.store([t0, 0], tl.trans(dKT.to(dk.dtype.element_ty)))
        e -= tl.sum(dKT * tl.trans(Kt).to(tl.float32), 0)
        dOw = (dO.to(tl.float32) * gq[:, None]).to(dO.dtype)
        dS = tl.dot(tl.trans(Q), dOw, dS * tl.exp2(bC), input_precision="ieee")
        anchor = tl.sum(tl.sum(dS * tl.trans(S).to(tl.float32), 1), 0)
        before = tl.cumsum(e, 0, reverse=REV) - e
        tl.store(dg + out + (t0 + rows).to(tl.int64) * H, anchor - before, mask=t0 + rows < T)
        c += STEP
    if DINITIAL:  # noqa: SIM102 (known when the kernel is compiled; the next is not)
        if s == (NS - 1 if REV else 0):
            leaving(dinitial, index, 0, dS, K, V, KB, VB)


@triton.jit(do_not_specialize=["T", "H", "R", "NC", "NS", "CPS"])
def values(q, k, total, late, skip, go, entry, dv, dkept, dinitial, T, H, R, NC, NS, CPS, sqb, sqt, skb, skt, sob, sot,
           K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
           SSD: tl.constexpr, SKIP: tl.constexpr, ENTRY: tl.constexpr, DINITIAL: tl.constexpr, REV: tl.constexpr,
           ST: tl.constexpr):  # fmt: skip
    """The forward kernel mirrored in time: grad v, and the dS that arrives at the end of each chunk to ``dkept``."""
    h, iv, s, row, first, n = segment_of_program(H, NC, NS, CPS, VB // BV)
    LAST: tl.constexpr = 0 if REV else C - 1
    STEP: tl.constexpr = 1 if REV else -1
    c = first if REV else first + n - 1
    index = row * H + h
    base = index * (NC * C).to(tl.int64)
    q_d = tl.make_tensor_descriptor(q + row * sqb + (h // R) * K, [T, K], [sqt, 1], [C, KB])
    k_d = tl.make_tensor_descriptor(k + row * skb + (h // R) * K, [T, K], [skt, 1], [C, KB])
    go_d = tl.make_tensor_descriptor(go + row * sob + h * V, [T, V], [sot, 1], [C, BV])
    dv_d = tl.make_tensor_descriptor(dv + (row * T * H + h) * V, [T, V], [H * V, 1], [C, BV])
    b_d = tl.make_tensor_descriptor(total + base, [NC * C], [1], [C])
    if SSD:
        late_d = tl.make_tensor_descriptor(late + base, [NC * C], [1], [C])
    if SKIP:
        D = tl.load(skip + h).to(tl.float32)
    dS = tl.trans(entering(entry, index, s, NS, iv, K, V, KB, VB, BV, ENTRY))
    kept_d = tl.make_tensor_descriptor(dkept + row * NC * H * (KB * VB), [NC * H * VB, KB], [KB, 1], [BV, KB])
    i_, j_ = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    seen = i_ <= j_ if REV else i_ >= j_
    ends = total + base + LAST
    bC_next = tl.load(ends + c * C)
    for i in tl.range(0, n, num_stages=ST):
        t0 = c * C
        Q = q_d.load([t0, 0])
        Kt = k_d.load([t0, 0])
        dO = go_d.load([t0, iv * BV])
        b = b_d.load([t0])
        bC = bC_next
        bC_next = tl.load(ends + (c + STEP) * C, mask=i + 1 < n, other=0.0)
        delay = b
        if SSD:
            delay = late_d.load([t0])
        dSb = dS.to(Q.dtype)
        kept_d.store([(c * H + h) * VB + iv * BV, 0], dSb)
        A = tl.dot(Q, tl.trans(Kt), input_precision="ieee")
        A = tl.where(seen, A * tl.exp2(b[:, None] - delay[None, :]), 0.0).to(Q.dtype)
        dOT = tl.trans(dO)
        dV = tl.dot(dSb, tl.trans(Kt), input_precision="ieee") * tl.exp2(bC - delay)[None, :]
        dV = tl.dot(dOT, A, dV, input_precision="ieee")
        if SKIP:
            dV += dOT.to(tl.float32) * D
        dv_d.store([t0, iv * BV], tl.trans(dV.to(dv.dtype.element_ty)))
        dOw = (dOT.to(tl.float32) * tl.exp2(b)[None, :]).to(dO.dtype)
        dS = tl.dot(dOw, Q, dS * tl.exp2(bC), input_precision="ieee")
        c += STEP
    if DINITIAL:  # noqa: SIM102
        if s == (NS - 1 if REV else 0):
            leaving(dinitial, index, iv, tl.trans(dS), K, V, KB, BV)


@triton.jit(do_not_specialize=["T", "H", "NC", "B", "RUN"])
def keys(q, k, v, total, go, kept, dkept, dq, dk, terms, anchors, T, H, NC, B, RUN, sqb, sqt, skb, skt, svb, svt, sob,
         sot, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
         C: tl.constexpr, REV: tl.constexpr, ST: tl.constexpr):  # fmt: skip
    """Heads that share nothing: grad q and grad k of BK columns, from the states at both ends of each chunk.

    A program takes RUN chunks, which are independent: the loop keeps loads flowing and pays for descriptors once.
    """
    pid = tl.program_id(0)
    ik = pid % (KB // BK)
    r = pid // (KB // BK)
    h = r % H
    r = r // H
    runs = tl.cdiv(NC, RUN)
    first = (r % runs) * RUN
    row = (r // runs).to(tl.int64)
    n = tl.minimum(RUN, NC - first)
    LAST: tl.constexpr = 0 if REV else C - 1
    index = row * H + h
    base = index * (NC * C).to(tl.int64)
    out = row * T * H + h
    slice_ = (ik * B + row) * H + h
    q_d = tl.make_tensor_descriptor(q + row * sqb + h * K, [T, K], [sqt, 1], [C, BK])
    k_d = tl.make_tensor_descriptor(k + row * skb + h * K, [T, K], [skt, 1], [C, BK])
    v_d = tl.make_tensor_descriptor(v + row * svb + h * V, [T, V], [svt, 1], [C, BV])
    go_d = tl.make_tensor_descriptor(go + row * sob + h * V, [T, V], [sot, 1], [C, BV])
    dq_d = tl.make_tensor_descriptor(dq + out * K, [T, K], [H * K, 1], [C, BK])
    dk_d = tl.make_tensor_descriptor(dk + out * K, [T, K], [H * K, 1], [C, BK])
    states = row * NC * H * (KB * VB)
    s_d = tl.make_tensor_descriptor(kept + states, [NC * H * VB, KB], [KB, 1], [BV, BK])
    ds_d = tl.make_tensor_descriptor(dkept + states, [NC * H * VB, KB], [KB, 1], [BV, BK])
    b_d = tl.make_tensor_descriptor(total + base, [NC * C], [1], [C])
    rows = tl.arange(0, C)
    seen = rows[:, None] <= rows[None, :] if REV else rows[:, None] >= rows[None, :]
    eye = tl.arange(0, BK)[:, None] == tl.arange(0, BK)[None, :]
    ends = total + base + LAST
    bC_next = tl.load(ends + first * C)
    for i in tl.range(0, n, num_stages=ST):
        c = first + i
        t0 = c * C
        Q = q_d.load([t0, ik * BK])
        Kt = k_d.load([t0, ik * BK])
        b = b_d.load([t0])
        bC = bC_next
        bC_next = tl.load(ends + (c + 1) * C, mask=i + 1 < n, other=0.0)
        at = (c * H + h) * VB
        dO = go_d.load([t0, 0])
        X = v_d.load([t0, 0])
        S = s_d.load([at, ik * BK])
        dS = ds_d.load([at, ik * BK])
        P = tl.dot(dO, tl.trans(X), input_precision="ieee")
        dQ = tl.dot(dO, S, input_precision="ieee")
        dKT = tl.dot(tl.trans(dS), tl.trans(X), input_precision="ieee")
        # <S, dS> as the trace of a product keeps both tiles out of registers.
        trace = tl.sum(tl.sum(tl.where(eye, tl.dot(tl.trans(S), dS, input_precision="ieee"), 0.0), 1), 0)
        for iv in tl.static_range(1, VB // BV):
            dO = go_d.load([t0, iv * BV])
            X = v_d.load([t0, iv * BV])
            S = s_d.load([at + iv * BV, ik * BK])
            dS = ds_d.load([at + iv * BV, ik * BK])
            P = tl.dot(dO, tl.trans(X), P, input_precision="ieee")
            dQ = tl.dot(dO, S, dQ, input_precision="ieee")
            dKT = tl.dot(tl.trans(dS), tl.trans(X), dKT, input_precision="ieee")
            trace += tl.sum(tl.sum(tl.where(eye, tl.dot(tl.trans(S), dS, input_precision="ieee"), 0.0), 1), 0)
        dQ = dQ * tl.exp2(b)[:, None]
        dKT = dKT * tl.exp2(bC - b)[None, :]
        anchor = tl.sum(tl.sum(dQ * Q.to(tl.float32), 1), 0) + tl.exp2(bC) * trace
        P = tl.where(seen, P * tl.exp2(b[:, None] - b[None, :]), 0.0).to(Q.dtype)
        dQ = tl.dot(P, Kt, dQ, input_precision="ieee")
        e = tl.sum(dQ * Q.to(tl.float32), 1)
        dq_d.store([t0, ik * BK], dQ.to(dq.dtype.element_ty))
        dKT = tl.dot(tl.trans(Q), P, dKT, input_precision="ieee")
        e -= tl.sum(dKT * tl.trans(Kt).to(tl.float32), 0)
        dk_d.store([t0, ik * BK], tl.trans(dKT.to(dk.dtype.element_ty)))
        tl.store(anchors + slice_ * NC + c, anchor)
        tl.store(terms + slice_ * (NC * C) + t0 + rows, e)


@triton.jit(do_not_specialize=["T", "H", "G", "NC"])
def shared_scores(q, k, v, total, late, go, scores, inner, through, skips, T, H, G, NC, sqb, sqt, skb, skt, svb, svt,
                  sob, sot, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, C: tl.constexpr,
                  SSD: tl.constexpr, SKIP: tl.constexpr, REV: tl.constexpr, ST: tl.constexpr):  # fmt: skip
    """Heads that share q and k, within chunks: the gradient of their common scores, Σ_h P ⊙ G ⊙ step, transposed.

    One program a chunk and group walks the heads in order. Of Z = P ⊙ G ⊙ q kᵀ, each head leaves the sums that its
    gates need: ``inner`` is q·grad q within the chunk, ``through`` v·grad(step v), and ``skips`` is v·grad o.
    """
    pid = tl.program_id(0)
    g = pid % G
    r = pid // G
    c = r % NC
    row = (r // NC).to(tl.int64)
    t0 = c * C
    R = H // G
    head = g * R
    rows = tl.arange(0, C)
    i_, j_ = rows[:, None], rows[None, :]
    seen_t = i_ >= j_ if REV else i_ <= j_
    base = (row * H + head) * (NC * C).to(tl.int64)
    q_d = tl.make_tensor_descriptor(q + row * sqb + g * K, [T, K], [sqt, 1], [C, KB])
    k_d = tl.make_tensor_descriptor(k + row * skb + g * K, [T, K], [skt, 1], [C, KB])
    v_d = tl.make_tensor_descriptor(v + row * svb + head * V, [T, R * V], [svt, 1], [C, VB])
    go_d = tl.make_tensor_descriptor(go + row * sob + head * V, [T, R * V], [sot, 1], [C, VB])
    b_d = tl.make_tensor_descriptor(total + base, [R * NC * C], [1], [C])
    if SSD:
        late_d = tl.make_tensor_descriptor(late + base, [R * NC * C], [1], [C])
    Q = q_d.load([t0, 0])
    AT = tl.dot(k_d.load([t0, 0]), tl.trans(Q), input_precision="ieee")
    AT = tl.where(seen_t, AT, 0.0)
    WT = tl.zeros((C, C), dtype=tl.float32)
    at = base + t0 + rows
    for i in tl.range(0, R, num_stages=ST):
        X = v_d.load([t0, i * V])
        dO = go_d.load([t0, i * V])
        b = b_d.load([i * (NC * C) + t0])
        PT = tl.dot(X, tl.trans(dO), input_precision="ieee")
        if SKIP:
            tl.store(skips + at, tl.sum(tl.where(i_ == j_, PT, 0.0), 1))
        PT = PT * tl.exp2(tl.minimum(b[None, :] - b[:, None], 0.0))  # the mask is in AT, and in W after the walk
        Z = PT * AT
        tl.store(through + at, tl.sum(Z, 1))
        if SSD:
            d = tl.exp2(b - late_d.load([i * (NC * C) + t0]))
            WT += PT * d[:, None]
            Z = Z * d[:, None]
        else:
            WT += PT
        tl.store(inner + at, tl.sum(Z, 0))
        at += NC * C
    WT = tl.where(seen_t, WT, 0.0)
    tile = ((row * NC + c) * G + g) * (C * C) + i_ * C + j_
    tl.store(scores + tile, WT.to(scores.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "H", "G", "NC", "B"])
def shared_keys(q, k, v, total, late, go, kept, dkept, scores, dq, dk, outer, through, traces, T, H, G, NC, B, sqb, sqt,
                skb, skt, svb, svt, sob, sot, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
                BK: tl.constexpr, C: tl.constexpr, SSD: tl.constexpr, REV: tl.constexpr, ST: tl.constexpr):  # fmt: skip
    """Heads that share q and k, across chunks: grad q and grad k of BK columns, summed over heads on chip, in order.

    One program a chunk, group and slice of columns. What happens within the chunk comes in at the end, from the
    ``scores`` of ``shared_scores``. For the gates each head leaves ``outer``, q·grad q across the chunk's entry,
    ``through``, v·grad(step v) across its exit, and ``traces``, the rows of S ⊙ dS: sums along rows stay in a warp.
    """
    pid = tl.program_id(0)
    ik = pid % (KB // BK)
    r = pid // (KB // BK)
    g = r % G
    r = r // G
    c = r % NC
    row = (r // NC).to(tl.int64)
    t0 = c * C
    R = H // G
    LAST: tl.constexpr = 0 if REV else C - 1
    head = g * R
    base = (row * H + head) * (NC * C).to(tl.int64)
    q_d = tl.make_tensor_descriptor(q + row * sqb + g * K, [T, K], [sqt, 1], [C, BK])
    k_d = tl.make_tensor_descriptor(k + row * skb + g * K, [T, K], [skt, 1], [C, BK])
    out = (row * T * G + g) * K
    dq_d = tl.make_tensor_descriptor(dq + out, [T, K], [G * K, 1], [C, BK])
    dk_d = tl.make_tensor_descriptor(dk + out, [T, K], [G * K, 1], [C, BK])
    v_d = tl.make_tensor_descriptor(v + row * svb + head * V, [T, R * V], [svt, 1], [C, VB])
    go_d = tl.make_tensor_descriptor(go + row * sob + head * V, [T, R * V], [sot, 1], [C, VB])
    states = (row * NC + c) * H * (KB * VB) + head * (KB * VB)
    s_d = tl.make_tensor_descriptor(kept + states, [R * VB, KB], [KB, 1], [VB, BK])
    ds_d = tl.make_tensor_descriptor(dkept + states, [R * VB, KB], [KB, 1], [VB, BK])
    b_d = tl.make_tensor_descriptor(total + base, [R * NC * C], [1], [C])
    if SSD:
        late_d = tl.make_tensor_descriptor(late + base, [R * NC * C], [1], [C])
    Q = q_d.load([t0, ik * BK])
    Kt = k_d.load([t0, ik * BK])
    dQ = tl.zeros((C, BK), dtype=tl.float32)
    dK = tl.zeros((C, BK), dtype=tl.float32)
    at = ((ik * B + row) * H + head) * (NC * C).to(tl.int64) + t0 + tl.arange(0, C)
    at_trace = (((ik * B + row) * H + head) * NC + c) * VB + tl.arange(0, VB)
    ends = total + base + t0 + LAST
    bC_next = tl.load(ends)
    for i in tl.range(0, R, num_stages=ST):
        X = v_d.load([t0, i * V])
        dO = go_d.load([t0, i * V])
        S = s_d.load([i * VB, ik * BK])
        dS = ds_d.load([i * VB, ik * BK])
        b = b_d.load([i * (NC * C) + t0])
        bC = bC_next
        ends += NC * C
        bC_next = tl.load(ends, mask=i + 1 < R, other=0.0)
        # Added to what is converted below, lest the conversions leave the loop and fill the registers.
        zero = (bC * 0.0).to(Q.dtype)
        enter = tl.exp2(b)
        leave = tl.exp2(bC - b)
        Y = tl.dot(dO, S, input_precision="ieee")
        dQ += Y * enter[:, None]
        tl.store(outer + at, tl.sum(Y * (Q + zero).to(tl.float32), 1) * enter)
        tl.store(traces + at_trace, tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1) * tl.exp2(bC))
        Y = tl.dot(X, dS, input_precision="ieee")
        tl.store(through + at, tl.sum(Y * (Kt + zero).to(tl.float32), 1) * leave)
        if SSD:
            leave = tl.exp2(bC - late_d.load([i * (NC * C) + t0]))
        dK += Y * leave[:, None]
        at += NC * C
        at_trace += NC * VB
    rows = tl.arange(0, C)
    WT = tl.load(scores + ((row * NC + c) * G + g) * (C * C) + rows[:, None] * C + rows[None, :])
    dK = tl.dot(WT, Q, dK, input_precision="ieee")
    dk_d.store([t0, ik * BK], dK.to(dk.dtype.element_ty))
    dQ = tl.dot(tl.trans(WT), Kt, dQ, input_precision="ieee")
    dq_d.store([t0, ik * BK], dQ.to(dq.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "H", "NC", "B"])
def gates(terms, outer, through, across, skips, anchors, total, late, rate, starts, dgate, drate, dskip, T, H, NC, B,
          NK: tl.constexpr, VB: tl.constexpr, C: tl.constexpr, BH: tl.constexpr, SHARED: tl.constexpr,
          SSD: tl.constexpr, SKIP: tl.constexpr, STARTS: tl.constexpr, REV: tl.constexpr):  # fmt: skip
    """One chunk: grad g_t = anchor - Σ terms read before t, from what the kernels above left, partly a slice at a time.

    SSD goes on to the raw step, and leaves sums of the chunk for rate and skip.
    """
    pid = tl.program_id(0)
    c = pid % NC
    row = (pid // NC).to(tl.int64)
    t = c * C + tl.arange(0, C)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    known = h < H
    inside = (t[:, None] < T) & known[None, :]
    every = (t[:, None] >= 0) & known[None, :]
    wide = (NC * C).to(tl.int64)
    e = tl.zeros((C, BH), dtype=tl.float32)
    f = tl.zeros((C, BH), dtype=tl.float32)
    anchor = tl.zeros((BH,), dtype=tl.float32)
    for ik in tl.static_range(NK):
        index = (ik * B + row) * H + h
        at = index[None, :] * wide + t[:, None]
        if SHARED:
            entry = tl.load(outer + at, mask=every, other=0.0)
            e += entry
            f += tl.load(across + at, mask=every, other=0.0)
            column = tl.arange(0, VB)[:, None]
            place = anchors + (index[None, :] * NC + c) * VB + column
            anchor += tl.sum(entry, 0) + tl.sum(tl.load(place, mask=(column >= 0) & known[None, :], other=0.0), 0)
        else:
            e += tl.load(terms + at, mask=every, other=0.0)
            anchor += tl.load(anchors + index * NC + c, mask=known, other=0.0)
    index = row * H + h
    at = index[None, :] * wide + t[:, None]
    d = tl.full((C, BH), 1.0, dtype=tl.float32)
    if SSD:
        d = tl.exp2(tl.load(total + at, mask=every, other=0.0) - tl.load(late + at, mask=every, other=0.0))
    if SHARED:
        f += tl.load(through + at, mask=every, other=0.0)
        e += tl.load(terms + at, mask=every, other=0.0) - d * f
    dg = anchor[None, :] - tl.cumsum(e, 0, reverse=REV) + e
    if STARTS:
        start = tl.load(starts + row * T + t, mask=t < T, other=0)
        dg = tl.where((start != 0)[:, None], 0.0, dg)
    dg = tl.where(inside, dg, 0.0)
    if SSD:
        a = tl.load(rate + h, mask=known, other=0.0)
        tl.store(drate + (row * NC + c) * H + h, tl.sum(dg * d, 0), mask=known)
        if SKIP:
            x = tl.load(skips + at, mask=every, other=0.0)
            tl.store(dskip + (row * NC + c) * H + h, tl.sum(x, 0), mask=known)
        # softplus' at the raw step is 1 - e^(-step)
        small = d * (1.0 - d * (0.5 - d * (0.1666666667 - d * 0.0416666667)))
        dg = (f + a[None, :] * dg) * tl.where(d < 0.03125, small, 1.0 - tl.exp(-d))
    tl.store(dgate + (row * T + t[:, None].to(tl.int64)) * H + h[None, :], dg, mask=inside)
