"""Triton kernels of bidirectional_decay. See triton_forward.py for words and layout.

Two readings share everything. From the left, with b the running sum of log2 decays in a chunk and bC its end:

    L <- 2^bC L + Σ_j 2^(bC - b_j) k_jᵀ v_j          o_i = 2^b_i q_i L + Σ_{j <= i} 2^(b_i - b_j) (q_i·k_j) v_j

and from the right, with r the sum from the chunk's end back, rC the whole, and R the state that comes from the right:

    R <- 2^rC R + Σ_j 2^(rC - r_j) k_jᵀ v_j          o_i += 2^r_i q_i R + Σ_{j > i} 2^(r_i - r_j) (q_i·k_j) v_j

so one score matrix, without a mask, serves both. A walk holds one state on chip. The other one it reads: the pass that
finds the states of segments goes through the chunks anyway, and leaves the state of the other reading at each, counted
from zero at the segment's edge, and ``shifts``, the log2 decay between that edge and the chunk. What is true is
``kept + 2^shift E`` with E the state at the edge, known after the scan: no pass of its own is needed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqlong.kernels.scalar_decay.triton_forward import scan
from seqlong.kernels.triton_pieces import segment_of_program


@triton.jit
def edge(states, index, s, NS, ix, XB: tl.constexpr, YB: tl.constexpr, BX: tl.constexpr, ENTRY: tl.constexpr):
    """Rows ``ix`` of the state (XB, YB) that enters segment s; zero if the row is one segment."""
    S = tl.zeros((BX, YB), dtype=tl.float32)
    if ENTRY:
        at = (ix * BX + tl.arange(0, BX))[:, None] * YB + tl.arange(0, YB)[None, :]
        S += tl.load(states + (index * NS + s) * (XB * YB) + at)
    return S


@triton.jit(do_not_specialize=["T", "H", "RX", "RY", "NC", "NS", "CPS"])
def both_states(x, y, left, right, kept, shifts, states, decays, T, H, RX, RY, NC, NS, CPS, sxb, sxt, syb, syt,
                X: tl.constexpr, Y: tl.constexpr, XB: tl.constexpr, YB: tl.constexpr, BX: tl.constexpr,
                C: tl.constexpr, ADJOINT: tl.constexpr, ST: tl.constexpr):  # fmt: skip
    """Walk a segment from zero for both readings at once: S <- 2^end S + xᵀ (w ⊙ y).

    Leftwards, x, y = v, k: R before each chunk goes to ``kept`` (b n h x y), and L of the segment is summed up beside
    it. Rightwards in the adjoint walk, x, y = q, grad o: the same with dR and dL. ``states`` and ``decays``: first the
    reading that is kept, then the other.
    """
    pid = tl.program_id(0)  # not by segment_of_program, with which ptxas spills more here
    h = pid % H
    p = pid // H
    ix = p % (XB // BX)
    p = p // (XB // BX)
    s = p % NS
    row = (p // NS).to(tl.int64)
    first = s * CPS
    n = tl.minimum(CPS, NC - first)
    STEP: tl.constexpr = 1 if ADJOINT else -1
    c = first if ADJOINT else first + n - 1
    index = row * H + h
    base = index * (NC * C).to(tl.int64)
    x_d = tl.make_tensor_descriptor(x + row * sxb + (h // RX) * X, [T, X], [sxt, 1], [C, BX])
    y_d = tl.make_tensor_descriptor(y + row * syb + (h // RY) * Y, [T, Y], [syt, 1], [C, YB])
    b_d = tl.make_tensor_descriptor(left + base, [NC * C], [1], [C])
    r_d = tl.make_tensor_descriptor(right + base, [NC * C], [1], [C])
    at = (ix * BX + tl.arange(0, BX))[:, None] * YB + tl.arange(0, YB)[None, :]  # in a state
    own = tl.zeros((BX, YB), dtype=tl.float32)
    other = tl.zeros((BX, YB), dtype=tl.float32)
    own_sum = 0.0
    other_sum = 0.0
    left_ends = left + base + (C - 1)
    right_ends = right + base
    bC_next = tl.load(left_ends + c * C)
    rC_next = tl.load(right_ends + c * C)
    for i in tl.range(0, n, num_stages=ST):
        t0 = c * C
        Xc = x_d.load([t0, ix * BX])
        Yc = y_d.load([t0, 0])
        b = b_d.load([t0])
        r = r_d.load([t0])
        bC = bC_next  # scalars are not pipelined: fetched one chunk ahead by hand
        rC = rC_next
        bC_next = tl.load(left_ends + (c + STEP) * C, mask=i + 1 < n, other=0.0)
        rC_next = tl.load(right_ends + (c + STEP) * C, mask=i + 1 < n, other=0.0)
        tl.store(kept + ((row * NC + c) * H + h) * (XB * YB) + at, own.to(kept.dtype.element_ty))
        tl.store(shifts + index * NC + c, own_sum)
        if ADJOINT:
            near = tl.exp2(r)
            far = tl.exp2(b + other_sum)
        else:
            near = tl.exp2(rC - r)
            far = tl.exp2((bC - b) + other_sum)
        weighed = (Yc.to(tl.float32) * near[:, None]).to(Yc.dtype)
        own = tl.dot(tl.trans(Xc), weighed, own * tl.exp2(rC), input_precision="ieee")
        weighed = (Yc.to(tl.float32) * far[:, None]).to(Yc.dtype)
        other = tl.dot(tl.trans(Xc), weighed, other, input_precision="ieee")
        own_sum += rC
        other_sum += bC
        c += STEP
    place = index * NS + s
    second = (tl.num_programs(0) // (XB // BX)).to(tl.int64)  # rows, heads and segments
    tl.store(states + place * (XB * YB) + at, own)
    tl.store(states + (second + place) * (XB * YB) + at, other)
    tl.store(decays + place, own_sum)
    tl.store(decays + second + place, other_sum)


@triton.jit(do_not_specialize=["NS"])
def scan_both(states, decays, NS, XY: tl.constexpr, ADJOINT: tl.constexpr, BLOCK: tl.constexpr):
    """``scan`` of both readings, each along its own walk."""
    second = tl.num_programs(0).to(tl.int64) * NS
    if tl.program_id(2) == 0:
        scan(states, decays, states, NS, 1, 1, 1, XY, False, not ADJOINT, BLOCK)
    else:
        scan(states + second * XY, decays + second, states, NS, 1, 1, 1, XY, False, ADJOINT, BLOCK)


@triton.jit(do_not_specialize=["T", "H", "R", "NC", "NS", "CPS"])
def both_forward(q, k, v, left, right, held, shifts, states, o, kept, T, H, R, NC, NS, CPS, sqb, sqt, skb, skt, svb,
                 svt, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, BV: tl.constexpr,
                 C: tl.constexpr, ENTRY: tl.constexpr, KEEP: tl.constexpr, OUT: tl.constexpr,
                 ST: tl.constexpr):  # fmt: skip
    """Walk a segment rightwards with L on chip and R from ``held``: the output, and L before each chunk to ``kept``."""
    h, iv, s, row, first, n = segment_of_program(H, NC, NS, CPS, VB // BV)
    index = row * H + h
    base = index * (NC * C).to(tl.int64)
    tiles = row * NC * H * (KB * VB)
    k_d = tl.make_tensor_descriptor(k + row * skb + (h // R) * K, [T, K], [skt, 1], [C, KB])
    v_d = tl.make_tensor_descriptor(v + row * svb + h * V, [T, V], [svt, 1], [C, BV])
    b_d = tl.make_tensor_descriptor(left + base, [NC * C], [1], [C])
    if OUT:
        q_d = tl.make_tensor_descriptor(q + row * sqb + (h // R) * K, [T, K], [sqt, 1], [C, KB])
        o_d = tl.make_tensor_descriptor(o + (row * T * H + h) * V, [T, V], [H * V, 1], [C, BV])
        r_d = tl.make_tensor_descriptor(right + base, [NC * C], [1], [C])
        held_d = tl.make_tensor_descriptor(held + tiles, [NC * H * VB, KB], [KB, 1], [BV, KB])
    if KEEP:
        kept_d = tl.make_tensor_descriptor(kept + tiles, [NC * H * VB, KB], [KB, 1], [BV, KB])
    second = (tl.num_programs(0) // (VB // BV)).to(tl.int64) * (KB * VB)
    L = edge(states + second, index, s, NS, iv, VB, KB, BV, ENTRY)
    E = edge(states, index, s, NS, iv, VB, KB, BV, ENTRY).to(q.dtype.element_ty)
    i_, j_ = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    before = i_ <= j_  # of the transposed scores: the key's token is not after the query's
    ends = left + base + (C - 1)
    bC_next = tl.load(ends + first * C)
    shift_next = tl.load(shifts + index * NC + first)
    for i in tl.range(0, n, num_stages=ST):
        c = first + i
        t0 = c * C
        Kt = k_d.load([t0, 0])
        XT = tl.trans(v_d.load([t0, iv * BV]))
        b = b_d.load([t0])
        bC = bC_next
        bC_next = tl.load(ends + (c + 1) * C, mask=i + 1 < n, other=0.0)
        Lb = L.to(Kt.dtype)
        if KEEP:
            kept_d.store([(c * H + h) * VB + iv * BV, 0], Lb)
        if OUT:
            QT = tl.trans(q_d.load([t0, 0]))
            r = r_d.load([t0])
            Rb = held_d.load([(c * H + h) * VB + iv * BV, 0])
            if ENTRY:
                shift = shift_next
                shift_next = tl.load(shifts + index * NC + c + 1, mask=i + 1 < n, other=0.0)
                Rb = (Rb.to(tl.float32) + E.to(tl.float32) * tl.exp2(shift)).to(Kt.dtype)
            A = tl.dot(Kt, QT, input_precision="ieee")
            gap = tl.where(before, b[None, :] - b[:, None], r[None, :] - r[:, None])
            A = (A * tl.exp2(gap)).to(Kt.dtype)
            Y = tl.dot(Lb, QT, input_precision="ieee") * tl.exp2(b)[None, :]
            Y += tl.dot(Rb, QT, input_precision="ieee") * tl.exp2(r)[None, :]
            Y = tl.dot(XT, A, Y, input_precision="ieee")
            o_d.store([t0, iv * BV], tl.trans(Y.to(o.dtype.element_ty)))
        Xw = (XT.to(tl.float32) * tl.exp2(bC - b)[None, :]).to(Kt.dtype)
        L = tl.dot(Xw, Kt, L * tl.exp2(bC), input_precision="ieee")


@triton.jit(do_not_specialize=["T", "H", "NC", "NS", "CPS"])
def both_fused(q, k, v, go, left, right, kept, held, shifts, edges, dheld, dshifts, dedges, dstates, dq, dk, dv, dg, T,
               H, NC, NS, CPS, sqb, sqt, skb, skt, svb, svt, sob, sot, K: tl.constexpr, V: tl.constexpr,
               KB: tl.constexpr, VB: tl.constexpr, C: tl.constexpr, ENTRY: tl.constexpr,
               ST: tl.constexpr):  # fmt: skip
    """Small heads (K, V <= 64) that share nothing: every gradient in one walk leftwards, with dL on chip.

    L comes from ``kept``; R, dR from ``held``, ``dheld``, with ``edges``, ``dedges`` for what enters the segment.
    With e = q·grad q - k·grad k of a token, past the part of e that belongs to the left reading, and flow = Σ q·grad q
    through a decay, known at an edge from the states, <L, dL> or <R, dR>: of the left reading at the chunk's left edge,
    and of the right reading at its right edge,

        grad g_t = flow - Σ_{i < t} past_i - Σ_{i > t} (e_i - past_i)

    Registers bound this kernel: a tile that is used element by element sits in them from its load on, so loads come
    late; such a tile has one buffer, others two; and a vector along columns takes 16 of them, so b, r come three times.
    """
    h, _, s, row, first, n = segment_of_program(H, NC, NS, CPS, 1)
    c = first + n - 1
    index = row * H + h
    base = index * (NC * C).to(tl.int64)
    out = row * T * H + h
    tiles = row * NC * H * (KB * VB)
    q_d = tl.make_tensor_descriptor(q + row * sqb + h * K, [T, K], [sqt, 1], [C, KB])
    k_d = tl.make_tensor_descriptor(k + row * skb + h * K, [T, K], [skt, 1], [C, KB])
    v_d = tl.make_tensor_descriptor(v + row * svb + h * V, [T, V], [svt, 1], [C, VB])
    go_d = tl.make_tensor_descriptor(go + row * sob + h * V, [T, V], [sot, 1], [C, VB])
    dq_d = tl.make_tensor_descriptor(dq + out * K, [T, K], [H * K, 1], [C, KB])
    dk_d = tl.make_tensor_descriptor(dk + out * K, [T, K], [H * K, 1], [C, KB])
    dv_d = tl.make_tensor_descriptor(dv + out * V, [T, V], [H * V, 1], [C, VB])
    l_d = tl.make_tensor_descriptor(kept + tiles, [NC * H * VB, KB], [KB, 1], [VB, KB])
    s_d = tl.make_tensor_descriptor(held + tiles, [NC * H * VB, KB], [KB, 1], [VB, KB])
    ds_d = tl.make_tensor_descriptor(dheld + tiles, [NC * H * KB, VB], [VB, 1], [KB, VB])
    b_d = tl.make_tensor_descriptor(left + base, [NC * C], [1], [C])
    r_d = tl.make_tensor_descriptor(right + base, [NC * C], [1], [C])
    second = tl.num_programs(0).to(tl.int64) * (KB * VB)
    dL = edge(dstates + second, index, s, NS, 0, KB, VB, KB, ENTRY)
    if ENTRY:
        at = (index * NS + s) * (KB * VB)
        e_d = tl.make_tensor_descriptor(edges + at, [VB, KB], [KB, 1], [VB, KB])
        de_d = tl.make_tensor_descriptor(dedges + at, [KB, VB], [VB, 1], [KB, VB])
    rows = tl.arange(0, C)
    i_, j_ = rows[:, None], rows[None, :]
    left_ends = left + base + (C - 1)
    right_ends = right + base
    bC_next = tl.load(left_ends + c * C)
    rC_next = tl.load(right_ends + c * C)
    shift_next = tl.load(shifts + index * NC + c)
    dshift_next = tl.load(dshifts + index * NC + c)
    for i in tl.range(0, n, num_stages=ST):
        t0 = c * C
        bC = bC_next
        rC = rC_next
        bC_next = tl.load(left_ends + (c - 1) * C, mask=i + 1 < n, other=0.0)
        rC_next = tl.load(right_ends + (c - 1) * C, mask=i + 1 < n, other=0.0)
        R = s_d.load([(c * H + h) * VB, 0])
        dR = ds_d.load([(c * H + h) * KB, 0])
        L = l_d.load([(c * H + h) * VB, 0])
        dLb = dL.to(q.dtype.element_ty)
        flow = tl.sum(tl.sum(dL * tl.trans(L).to(tl.float32), 1), 0) * tl.exp2(bC)
        RT = tl.trans(R).to(tl.float32)
        dRf = dR.to(tl.float32)
        if ENTRY:  # corrections of the edge go into products as they are, so that no tile needs a copy
            E = e_d.load([0, 0])
            dE = de_d.load([0, 0])
            shift = tl.exp2(shift_next)
            dshift = tl.exp2(dshift_next)
            shift_next = tl.load(shifts + index * NC + c - 1, mask=i + 1 < n, other=0.0)
            dshift_next = tl.load(dshifts + index * NC + c - 1, mask=i + 1 < n, other=0.0)
            RT += tl.trans(E).to(tl.float32) * shift
            dRf += dE.to(tl.float32) * dshift
        flow += tl.sum(tl.sum(RT * dRf, 1), 0) * tl.exp2(rC)
        dO = go_d.load([t0, 0])
        b = b_d.load([t0])
        r = r_d.load([t0])
        dOw = (dO.to(tl.float32) * tl.exp2(b)[:, None]).to(dO.dtype)
        X = v_d.load([t0, 0])
        Kt = k_d.load([t0, 0])
        dV = tl.dot(Kt, dLb, input_precision="ieee") * tl.exp2(bC - b)[:, None]
        past = -tl.sum(dV * X.to(tl.float32), 1)
        if ENTRY:
            part = tl.dot(Kt, dE, input_precision="ieee") * dshift
            part = tl.dot(Kt, dR, part, input_precision="ieee")
        else:
            part = tl.dot(Kt, dR, input_precision="ieee")
        dV += part * tl.exp2(rC - r)[:, None]
        e = -tl.sum(dV * X.to(tl.float32), 1)
        Q = q_d.load([t0, 0])
        A = tl.dot(Kt, tl.trans(Q), input_precision="ieee")
        A = (A * tl.exp2(tl.where(i_ <= j_, b[None, :] - b[:, None], r[None, :] - r[:, None]))).to(dO.dtype)
        dV = tl.dot(A, dO, dV, input_precision="ieee")
        dv_d.store([t0, 0], dV.to(dv.dtype.element_ty))
        b = b_d.load([t0])
        r = r_d.load([t0])
        P = tl.dot(dO, tl.trans(X), input_precision="ieee")
        P = (P * tl.exp2(tl.where(i_ >= j_, b[:, None] - b[None, :], r[:, None] - r[None, :]))).to(dO.dtype)
        Z = tl.dot(Q, tl.trans(Kt), input_precision="ieee") * P.to(tl.float32)
        e += tl.sum(Z, 1) - tl.sum(Z, 0)
        Z = tl.where(i_ > j_, Z, 0.0)
        past += tl.sum(Z, 1) - tl.sum(Z, 0)
        dQ = tl.dot(dO, L, input_precision="ieee") * tl.exp2(b)[:, None]
        past += tl.sum(dQ * Q.to(tl.float32), 1)
        if ENTRY:
            part = tl.dot(dO, E, input_precision="ieee") * shift
            part = tl.dot(dO, R, part, input_precision="ieee")
        else:
            part = tl.dot(dO, R, input_precision="ieee")
        dQ += part * tl.exp2(r)[:, None]
        across = tl.sum(dQ * Q.to(tl.float32), 1)
        e += across
        dQ = tl.dot(P, Kt, dQ, input_precision="ieee")
        dq_d.store([t0, 0], dQ.to(dq.dtype.element_ty))
        flow += tl.sum(across - e + past, 0)
        grad = flow + past + tl.cumsum(e - 2.0 * past, 0)
        tl.store(dg + out + (t0 + rows).to(tl.int64) * H, grad, mask=t0 + rows < T)
        b = b_d.load([t0])
        r = r_d.load([t0])
        dLb = (dL + bC * 0.0).to(q.dtype.element_ty)  # not kept in registers all the while
        dKT = tl.dot(dLb, tl.trans(X), input_precision="ieee") * tl.exp2(bC - b)[None, :]
        if ENTRY:
            part = tl.dot(dE, tl.trans(X), input_precision="ieee") * dshift
            part = tl.dot(dR, tl.trans(X), part, input_precision="ieee")
        else:
            part = tl.dot(dR, tl.trans(X), input_precision="ieee")
        dKT += part * tl.exp2(rC - r)[None, :]
        dKT = tl.dot(tl.trans(Q), P, dKT, input_precision="ieee")
        dk_d.store([t0, 0], tl.trans(dKT.to(dk.dtype.element_ty)))
        dL = tl.dot(tl.trans(Q), dOw, dL * tl.exp2(bC), input_precision="ieee")
        c -= 1
