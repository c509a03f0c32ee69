"""Triton kernels of bidirectional_decay. See triton_forward.py for words and layout.

Two readings share everything. From the left, with b the running sum of log2 decays in a chunk and bC its end:

    L <- 2^bC L + Σ_j 2^(bC - b_j) k_jᵀ v_j          o_i = 2^b_i q_i L + Σ_{j <= i} 2^(b_i - b_j) (q_i·k_j) v_j

and from the right, with r the sum from the chunk's end back, rC the whole, and R the state that comes in from the right:

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
    """Walk a segment from zero for both readings at once: S <- 2^end S + (w ⊙ x)ᵀ y.

    Leftwards, x, y = v, k: R before each chunk goes to ``kept`` (b n h x y), and L of the segment is summed up beside
    it. Rightwards in the adjoint walk, x, y = q, grad o: the same with dR and dL. ``states`` and ``decays``: first the
    reading that is kept, then the other.
    """
    pid = tl.program_id(0)
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
    kept_d = tl.make_tensor_descriptor(kept + row * NC * H * (XB * YB), [NC * H * XB, YB], [YB, 1], [BX, YB])
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
        XT = tl.trans(x_d.load([t0, ix * BX])).to(tl.float32)
        Yc = y_d.load([t0, 0])
        b = b_d.load([t0])
        r = r_d.load([t0])
        bC = bC_next  # scalars are not pipelined: fetched one chunk ahead by hand
        rC = rC_next
        bC_next = tl.load(left_ends + (c + STEP) * C, mask=i + 1 < n, other=0.0)
        rC_next = tl.load(right_ends + (c + STEP) * C, mask=i + 1 < n, other=0.0)
        kept_d.store([(c * H + h) * XB + ix * BX, 0], own.to(kept.dtype.element_ty))
        tl.store(shifts + index * NC + c, own_sum)
        if ADJOINT:
            near = tl.exp2(r)
            far = tl.exp2(b + other_sum)
        else:
            near = tl.exp2(rC - r)
            far = tl.exp2((bC - b) + other_sum)
        own = tl.dot((XT * near[None, :]).to(Yc.dtype), Yc, own * tl.exp2(rC), input_precision="ieee")
        other = tl.dot((XT * far[None, :]).to(Yc.dtype), Yc, other, input_precision="ieee")
        own_sum += rC
        other_sum += bC
        c += STEP
    at = (ix * BX + tl.arange(0, BX))[:, None] * YB + tl.arange(0, YB)[None, :]
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
def both_forward(q, k, v, left, right, held, shifts, states, o, kept, T, H, R, NC, NS, CPS, sqb, sqt, skb, skt, svb, svt,
                 K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, BV: tl.constexpr,
                 C: tl.constexpr, ENTRY: tl.constexpr, KEEP: tl.constexpr, OUT: tl.constexpr, ST: tl.constexpr):  # fmt: skip
    """Walk a segment rightwards with L on chip and R from ``held``: the output, and L before each chunk to ``kept``."""
    pid = tl.program_id(0)
    h = pid % H
    p = pid // H
    iv = p % (VB // BV)
    p = p // (VB // BV)
    s = p % NS
    row = (p // NS).to(tl.int64)
    first = s * CPS
    n = tl.minimum(CPS, NC - first)
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
def both_fused(q, k, v, go, left, right, kept, held, shifts, states, dheld, dshifts, dstates, dq, dk, dv, dg, T, H, NC,
               NS, CPS, sqb, sqt, skb, skt, svb, svt, sob, sot, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr,
               VB: tl.constexpr, C: tl.constexpr, ENTRY: tl.constexpr, ST: tl.constexpr):  # fmt: skip
    """Small heads (K, V <= 64) that share nothing: every gradient in one walk leftwards, with dL on chip.

    L comes from ``kept``, R from ``held``, dR from ``dheld``. With P = (grad o · vᵀ) ⊙ G the flows through the decay of
    token t are those of the left reading from before t to t and beyond, and those of the right from after t to t and
    before:

        grad g_t = <L, dL> - Σ_{i < t} l_i + <R, dR> + Σ_{i <= t} (e_i - l_i)

    at the chunk's left edge, where e = q·grad q - k·grad k and l is its part through the left reading.
    """
    pid = tl.program_id(0)
    h = pid % H
    p = pid // H
    s = p % NS
    row = (p // NS).to(tl.int64)
    first = s * CPS
    n = tl.minimum(CPS, NC - first)
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
    E = edge(states, index, s, NS, 0, VB, KB, VB, ENTRY).to(q.dtype.element_ty)
    dE = edge(dstates, index, s, NS, 0, KB, VB, KB, ENTRY).to(q.dtype.element_ty)
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
        Q = q_d.load([t0, 0])
        Kt = k_d.load([t0, 0])
        X = v_d.load([t0, 0])
        dO = go_d.load([t0, 0])
        L = l_d.load([(c * H + h) * VB, 0])
        R = s_d.load([(c * H + h) * VB, 0])
        dR = ds_d.load([(c * H + h) * KB, 0])
        b = b_d.load([t0])
        r = r_d.load([t0])
        bC = bC_next
        rC = rC_next
        bC_next = tl.load(left_ends + (c - 1) * C, mask=i + 1 < n, other=0.0)
        rC_next = tl.load(right_ends + (c - 1) * C, mask=i + 1 < n, other=0.0)
        if ENTRY:
            shift = shift_next
            dshift = dshift_next
            shift_next = tl.load(shifts + index * NC + c - 1, mask=i + 1 < n, other=0.0)
            dshift_next = tl.load(dshifts + index * NC + c - 1, mask=i + 1 < n, other=0.0)
            R = (R.to(tl.float32) + E.to(tl.float32) * tl.exp2(shift)).to(Q.dtype)
            dR = (dR.to(tl.float32) + dE.to(tl.float32) * tl.exp2(dshift)).to(Q.dtype)
        through = tl.sum(tl.sum(tl.trans(R).to(tl.float32) * dR.to(tl.float32), 1), 0) * tl.exp2(rC)
        wl = tl.exp2(bC - b)
        wr = tl.exp2(rC - r)
        el = tl.exp2(b)
        dLb = dL.to(Q.dtype)
        AT = tl.dot(Kt, tl.trans(Q), input_precision="ieee")
        AT = (AT * tl.exp2(tl.where(i_ <= j_, b[None, :] - b[:, None], r[None, :] - r[:, None]))).to(Q.dtype)
        dV = tl.dot(Kt, dLb, input_precision="ieee") * wl[:, None]
        left_e = -tl.sum(dV * X.to(tl.float32), 1)
        dVr = tl.dot(Kt, dR, input_precision="ieee") * wr[:, None]
        through += tl.sum(tl.sum(dVr * X.to(tl.float32), 1), 0)
        dV = tl.dot(AT, dO, dV + dVr, input_precision="ieee")
        dv_d.store([t0, 0], dV.to(dv.dtype.element_ty))
        P = tl.dot(dO, tl.trans(X), input_precision="ieee")
        P = (P * tl.exp2(tl.where(i_ >= j_, b[:, None] - b[None, :], r[:, None] - r[None, :]))).to(Q.dtype)
        Z = tl.dot(Q, tl.trans(Kt), input_precision="ieee")
        Z = tl.where(i_ > j_, Z * P.to(tl.float32), 0.0)
        left_e += tl.sum(Z, 1)
        left_e -= tl.sum(Z, 0)
        dQ = tl.dot(dO, L, input_precision="ieee") * el[:, None]
        left_e += tl.sum(dQ * Q.to(tl.float32), 1)
        dQ += tl.dot(dO, R, input_precision="ieee") * tl.exp2(r)[:, None]
        dQ = tl.dot(P, Kt, dQ, input_precision="ieee")
        dq_d.store([t0, 0], dQ.to(dq.dtype.element_ty))
        e = tl.sum(dQ * Q.to(tl.float32), 1)
        dKT = tl.dot(dLb, tl.trans(X), input_precision="ieee") * wl[None, :]
        dKT += tl.dot(dR, tl.trans(X), input_precision="ieee") * wr[None, :]
        dKT = tl.dot(tl.trans(Q), P, dKT, input_precision="ieee")
        dk_d.store([t0, 0], tl.trans(dKT.to(dk.dtype.element_ty)))
        e -= tl.sum(dKT * tl.trans(Kt).to(tl.float32), 0)
        dOw = (dO.to(tl.float32) * el[:, None]).to(dO.dtype)
        dL = tl.dot(tl.trans(Q), dOw, dL * tl.exp2(bC), input_precision="ieee")
        anchor = tl.sum(tl.sum(dL * tl.trans(L).to(tl.float32), 1), 0) + through
        grad = anchor + left_e + tl.cumsum(e - 2.0 * left_e, 0)
        tl.store(dg + out + (t0 + rows).to(tl.int64) * H, grad, mask=t0 + rows < T)
        c -= 1
