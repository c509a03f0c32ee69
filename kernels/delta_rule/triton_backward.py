"""Triton kernels of delta_rule's gradient: the adjoint walk, what is local to a chunk, and the gradients of q and k.

The adjoint walk goes from the right with G, the gradient of the state: dṼ = Pᵀ dO + (D_Cj K) G, dR = Tᵀ dṼ, and
G <- γ_C G + (γQ)ᵀ dO - (γK)ᵀ β dR. With dR and the states of both directions in memory, everything else is local.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqlong.kernels.delta_rule.triton_forward import C, entering, factors, leaving, rows_of, square
from seqlong.kernels.triton_pieces import segment_of_program


@triton.jit(do_not_specialize=["T", "H", "R", "NC", "NS", "CPS"])
def adjoint(q, k, late, go, weight, total, rq, rk, inverse, scores, entry, dr, dkept, dinitial, T, H, R, NC, NS, CPS,
            sqb, sqt, sqh, skb, skt, skh, sgb, sgt, sgh, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr,
            VB: tl.constexpr, BV: tl.constexpr, ENTRY: tl.constexpr, SEGMENT: tl.constexpr, CHANNEL: tl.constexpr,
            ST: tl.constexpr):  # fmt: skip
    """Walk a segment from the right; CHANNEL as in the forward walk.

    dR goes to ``dr`` (b t h v), G after each chunk to ``dkept`` (b n h v k).
    """
    h, iv, s, row, first, n = segment_of_program(H, NC, NS, CPS, VB // BV)
    index = row * H + h
    base = index * (NC * C).to(tl.int64)
    q += row * sqb + (h // R) * sqh
    k += row * skb + (h // R) * skh
    late += row * skb + (h // R) * skh
    go += row * sgb + h * sgh
    column = iv * BV + tl.arange(0, BV)
    G = tl.zeros((BV, KB), dtype=tl.float32)
    if not SEGMENT:
        G = entering(entry, index, s, NS, iv, K, V, KB, VB, BV, ENTRY)
    for i in tl.range(0, n, num_stages=ST):
        c = first + n - 1 - i
        t = c * C + tl.arange(0, C)
        at = base + t
        Kt = rows_of(k, t, T, skt, K, KB)
        Q = rows_of(q, t, T, sqt, K, KB)
        values = (t[:, None] < T) & (column < V)[None, :]
        dO = tl.load(go + t[:, None].to(tl.int64) * sgt + column[None, :], mask=values, other=0.0)
        Tm = tl.load(square(inverse, (index * NC + c) * (C * C)))
        P = tl.load(square(scores, (index * NC + c) * (C * C)))
        w = tl.load(weight + at)
        leave, enter_q, enter_k, carry = factors(total, rq, rk, base, row, h, c, T, H, NC, K, KB, CHANNEL)
        Gb = G.to(k.dtype.element_ty)
        if not SEGMENT:
            states = dkept + ((row * NC + c) * H + h) * (VB * KB)
            tl.store(states + column[:, None] * KB + tl.arange(0, KB)[None, :], Gb)
        dOt = tl.trans(dO)
        Kl = rows_of(late, t, T, skt, K, KB) if CHANNEL else Kt
        dN = tl.dot(Gb, tl.trans(Kl), input_precision="ieee") * leave[None, :]
        dN = tl.dot(dOt, P, dN, input_precision="ieee")
        dR = tl.dot(dN.to(k.dtype.element_ty), Tm, input_precision="ieee")
        if not SEGMENT:
            place = ((row * T + t[:, None]) * H + h) * V + column[None, :]
            tl.store(dr + place, tl.trans(dR.to(dr.dtype.element_ty)), mask=values)
        dOq = (dOt.to(tl.float32) * enter_q[None, :]).to(k.dtype.element_ty)
        G = tl.dot(dOq, Q, G * carry[None, :], input_precision="ieee")
        dR *= (-enter_k * w)[None, :]
        G = tl.dot(dR.to(k.dtype.element_ty), Kt, G, input_precision="ieee")
    if SEGMENT:
        d = tl.arange(0, KB)[None, :]
        tl.store(entry + (index * NS + s) * (VB * KB) + column[:, None] * KB + d, G)
    elif s == 0:
        leaving(dinitial, index, iv, G, K, V, KB, BV)


@triton.jit(do_not_specialize=["T", "H", "R", "NC"])
def local(q, k, v, go, weight, total, rq, rk, kept, dkept, fresh, dv, through_k, through_q, dweight, dgate, T, H, R, NC,
          sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sgb, sgt, sgh, K: tl.constexpr, V: tl.constexpr,
          KB: tl.constexpr, VB: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """One chunk of one head: gradients of v, of the weight and of the gate, and of products of q and k.

    ``dv`` holds dR and gets β dR. ``through_k`` and ``through_q`` (b h n C C) get the gradients of k̂_i k̂_jᵀ and
    q̂_i k̂_jᵀ. dweight and dgate are (b h n·C), the latter of the natural logarithm.
    """
    pid = tl.program_id(0)
    c = pid % NC
    h = (pid // NC) % H
    row = (pid // NC // H).to(tl.int64)
    index = row * H + h
    base = index * (NC * C).to(tl.int64)
    q += row * sqb + (h // R) * sqh
    k += row * skb + (h // R) * skh
    v += row * svb + h * svh
    go += row * sgb + h * sgh
    t = c * C + tl.arange(0, C)
    at = base + t
    b, r_k, r_q, w = tl.load(total + at), tl.load(rk + at), tl.load(rq + at), tl.load(weight + at)
    bC = tl.load(total + base + c * C + C - 1)
    enter_k, enter_q, leave_k = tl.exp2(b) * r_k, tl.exp2(b) * r_q, tl.exp2(bC - b) * r_k
    dA = tl.zeros((C, C), dtype=tl.float32)
    dP = tl.zeros((C, C), dtype=tl.float32)
    dw = tl.zeros((C,), dtype=tl.float32)
    entered = tl.zeros((C,), dtype=tl.float32)
    left = tl.zeros((C,), dtype=tl.float32)
    carried = 0.0
    states = ((row * NC + c) * H + h) * (VB * KB) + tl.arange(0, KB)[None, :]
    for iv in tl.range(0, VB // BV, num_stages=1):
        column = iv * BV + tl.arange(0, BV)
        values = (t[:, None] < T) & (column < V)[None, :]
        place = ((row * T + t[:, None]) * H + h) * V + column[None, :]
        Kt = rows_of(k, t, T, skt, K, KB)
        N = tl.load(fresh + place, mask=values, other=0.0)
        dR = tl.load(dv + place, mask=values, other=0.0)
        dO = tl.load(go + t[:, None].to(tl.int64) * sgt + column[None, :], mask=values, other=0.0)
        X = tl.load(v + t[:, None].to(tl.int64) * svt + column[None, :], mask=values, other=0.0)
        S = tl.load(kept + states + column[:, None] * KB)
        dA = tl.dot(dR, tl.trans(N), dA, input_precision="ieee")
        dP = tl.dot(dO, tl.trans(N), dP, input_precision="ieee")
        held = tl.dot(Kt, tl.trans(S), input_precision="ieee") * enter_k[:, None]
        dRf = dR.to(tl.float32)
        dw += tl.sum(dRf * (X.to(tl.float32) - held), 1)
        dX = dRf * w[:, None]
        tl.store(dv + place, dX.to(dv.dtype.element_ty), mask=values)
        if GATED:
            G = tl.load(dkept + states + column[:, None] * KB)
            Q = rows_of(q, t, T, sqt, K, KB)
            read = tl.dot(Q, tl.trans(S), input_precision="ieee") * enter_q[:, None]
            entered += tl.sum(read * dO.to(tl.float32) - dX * held, 1)
            sent = tl.dot(Kt, tl.trans(G), input_precision="ieee") * leave_k[:, None]
            left += tl.sum(sent * N.to(tl.float32), 1)
            carried += tl.sum(tl.sum(S.to(tl.float32) * G.to(tl.float32), 1), 0)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    D = tl.exp2(tl.minimum(b[:, None] - b[None, :], 0.0))
    dA = tl.where(i > j, -dA, 0.0) * D
    dP = tl.where(i >= j, dP, 0.0) * D
    Kt = rows_of(k, t, T, skt, K, KB)
    kk = tl.dot(Kt, tl.trans(Kt), input_precision="ieee") * (r_k[:, None] * r_k[None, :])
    through = dA * kk
    dw += tl.sum(through, 1)
    tl.store(dweight + at, dw)
    dA *= w[:, None]
    tl.store(square(through_k, (index * NC + c) * (C * C)), dA.to(through_k.dtype.element_ty))
    tl.store(square(through_q, (index * NC + c) * (C * C)), dP.to(through_q.dtype.element_ty))
    if GATED:
        through *= w[:, None]
        Q = rows_of(q, t, T, sqt, K, KB)
        through += dP * tl.dot(Q, tl.trans(Kt), input_precision="ieee") * (r_q[:, None] * r_k[None, :])
        # Gate m stands in D_ij where j < m <= i; the diagonal has none.
        through = tl.where(i == j, 0.0, through)
        terms = tl.sum(through, 1) - tl.sum(through, 0) + entered - left
        anchor = tl.sum(left, 0) + carried * tl.exp2(bC)
        tl.store(dgate + at, tl.cumsum(terms, 0, reverse=True) + anchor)


@triton.jit(do_not_specialize=["T", "H", "R", "NC"])
def keys(q, k, go, total, rq, rk, kept, dkept, fresh, dv, through_k, through_q, dq, dk, T, H, R, NC,
         sqb, sqt, sqh, skb, skt, skh, sgb, sgt, sgh, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr,
         VB: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """One chunk of one group: gradients of q and k, summed over the group's heads in a fixed order."""
    pid = tl.program_id(0)
    c = pid % NC
    g = (pid // NC) % (H // R)
    row = (pid // NC // (H // R)).to(tl.int64)
    t = c * C + tl.arange(0, C)
    d = tl.arange(0, KB)[None, :]
    kind = k.dtype.element_ty
    at = (row * H + g * R) * (NC * C).to(tl.int64) + t
    r_q, r_k = tl.load(rq + at)[:, None], tl.load(rk + at)[:, None]
    kn = (rows_of(k + row * skb + g * skh, t, T, skt, K, KB).to(tl.float32) * r_k).to(kind)
    out = ((row * T + t[:, None]) * (H // R) + g) * K + d
    inside = (t[:, None] < T) & (d < K)

    acc = tl.zeros((C, KB), dtype=tl.float32)
    for r in tl.range(0, R, num_stages=1):
        h = g * R + r
        index = row * H + h
        enter = tl.exp2(tl.load(total + index * (NC * C).to(tl.int64) + t))[:, None]
        states = kept + ((row * NC + c) * H + h) * (VB * KB) + d
        for iv in tl.range(0, VB // BV, num_stages=1):
            column = iv * BV + tl.arange(0, BV)
            values = (t[:, None] < T) & (column < V)[None, :]
            dO = tl.load(
                go + row * sgb + h * sgh + t[:, None].to(tl.int64) * sgt + column[None, :], mask=values, other=0.0
            )
            dO = (dO.to(tl.float32) * enter).to(kind)
            acc = tl.dot(dO, tl.load(states + column[:, None] * KB), acc, input_precision="ieee")
        acc = tl.dot(tl.load(square(through_q, (index * NC + c) * (C * C))), kn, acc, input_precision="ieee")
    qn = rows_of(q + row * sqb + g * sqh, t, T, sqt, K, KB).to(tl.float32) * r_q
    if NORM:
        acc = (acc - qn * tl.sum(acc * qn, 1)[:, None]) * r_q
    tl.store(dq + out, acc.to(dq.dtype.element_ty), mask=inside)

    qn = qn.to(kind)
    acc = tl.zeros((C, KB), dtype=tl.float32)
    for r in tl.range(0, R, num_stages=1):
        h = g * R + r
        index = row * H + h
        b = tl.load(total + index * (NC * C).to(tl.int64) + t)
        bC = tl.load(total + index * (NC * C).to(tl.int64) + c * C + C - 1)
        enter, leave = -tl.exp2(b)[:, None], tl.exp2(bC - b)[:, None]
        states = ((row * NC + c) * H + h) * (VB * KB) + d
        for iv in tl.range(0, VB // BV, num_stages=1):
            column = iv * BV + tl.arange(0, BV)
            values = (t[:, None] < T) & (column < V)[None, :]
            place = ((row * T + t[:, None]) * H + h) * V + column[None, :]
            dX = (tl.load(dv + place, mask=values, other=0.0).to(tl.float32) * enter).to(kind)
            acc = tl.dot(dX, tl.load(kept + states + column[:, None] * KB), acc, input_precision="ieee")
            N = (tl.load(fresh + place, mask=values, other=0.0).to(tl.float32) * leave).to(kind)
            acc = tl.dot(N, tl.load(dkept + states + column[:, None] * KB), acc, input_precision="ieee")
        F = tl.load(square(through_k, (index * NC + c) * (C * C)))
        acc = tl.dot(F, kn, acc, input_precision="ieee")
        acc = tl.dot(tl.trans(F), kn, acc, input_precision="ieee")
        F = tl.load(square(through_q, (index * NC + c) * (C * C)))
        acc = tl.dot(tl.trans(F), qn, acc, input_precision="ieee")
    if NORM:
        kf = kn.to(tl.float32)
        acc = (acc - kf * tl.sum(acc * kf, 1)[:, None]) * r_k
    tl.store(dk + out, acc.to(dk.dtype.element_ty), mask=inside)
