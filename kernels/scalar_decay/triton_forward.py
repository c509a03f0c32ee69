"""Triton kernels of scalar_decay: decays, states of segments, and the output.

Words: a chunk is C tokens; a segment of the plan is CPS chunks, one program's walk (not a document: documents are cut
by ``starts``). ``total`` (b, h, n·C) is the running sum of log2 decays inside each chunk, in reading order, so a chunk
needs no cumulative sum again and its last element is the decay of the whole chunk. A start is a decay of 2^-160, which
is zero in float32: the kernels know nothing of documents.

Reading order is left to right, or right to left with REV. An ADJOINT walk (gradients of states) goes the other way.
Offsets are int64 wherever tokens, heads or states multiply; coordinates of descriptors are int32 along each axis.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqlong.kernels.triton_pieces import segment_of_program, softplus

#: log2 of a decay that is zero in float32; no decay is below it, so that sums over a chunk keep their digits.
RESET = tl.constexpr(-160.0)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["T", "H", "NC"])
def prepare(gate, bias, rate, starts, total, late, T, H, NC, sgb, sgt, sgh,
            C: tl.constexpr, BH: tl.constexpr, SSD: tl.constexpr, BIAS: tl.constexpr, STARTS: tl.constexpr,
            REV: tl.constexpr):  # fmt: skip
    """One chunk: gate (b t h) -> total (b h n·C). SSD: the gate is a raw step, decay = rate · softplus(gate + bias).

    A step is kept as a delay, late = total - log2(step): then step_j 2^(b_i - b_j) = 2^(b_i - late_j).
    """
    pid = tl.program_id(0)
    c = pid % NC
    row = (pid // NC).to(tl.int64)
    t = c * C + tl.arange(0, C)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    inside = (t[:, None] < T) & (h[None, :] < H)
    place = gate + row * sgb + t[:, None].to(tl.int64) * sgt + h[None, :].to(tl.int64) * sgh
    x = tl.load(place, mask=inside, other=0.0)
    x = x.to(tl.float32)
    out = (row * H + h[None, :]) * (NC * C).to(tl.int64) + t[:, None]
    kept = (t[:, None] >= 0) & (h[None, :] < H)
    if SSD:
        if BIAS:
            x += tl.load(bias + h, mask=h < H, other=0.0)[None, :]
        step = tl.where(inside, softplus(x), 0.0)
        x = step * tl.load(rate + h, mask=h < H, other=0.0)[None, :]
    x = x * LOG2E
    x = tl.where(x < RESET, RESET, x)
    if STARTS:
        start = tl.load(starts + row * T + t, mask=t < T, other=0)
        x = tl.where((start != 0)[:, None], RESET, x)
    x = tl.cumsum(x, 0, reverse=REV)
    tl.store(total + out, x, mask=kept)
    if SSD:
        tl.store(late + out, x - tl.log2(step), mask=kept)


@triton.jit
def entering(entry, index, s, NS, iv, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
             BV: tl.constexpr, ENTRY: tl.constexpr):  # fmt: skip
    """State (KB, BV) that enters segment s: zero, or of the scan, or the caller's (ENTRY 0, 1, 2)."""
    rows, columns = tl.arange(0, KB)[:, None], (iv * BV + tl.arange(0, BV))[None, :]
    S = tl.zeros((KB, BV), dtype=tl.float32)
    if ENTRY == 1:
        S += tl.load(entry + (index * NS + s) * (KB * VB) + rows * VB + columns)
    if ENTRY == 2:
        S += tl.load(entry + index * (K * V) + rows * V + columns, mask=(rows < K) & (columns < V), other=0.0)
    return S


@triton.jit
def leaving(final, index, iv, S, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr):
    """Store the state after the last segment as the caller sees it, without padding."""
    rows, columns = tl.arange(0, KB)[:, None], (iv * BV + tl.arange(0, BV))[None, :]
    tl.store(final + index * (K * V) + rows * V + columns, S, mask=(rows < K) & (columns < V))


@triton.jit(do_not_specialize=["T", "H", "R", "NC", "NS", "CPS"])
def segment_states(x, y, total, late, states, decays, entry, kept, T, H, R, NC, NS, CPS, sxb, sxt, syb, syt,
                   K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, BV: tl.constexpr,
                   C: tl.constexpr, SSD: tl.constexpr, REV: tl.constexpr, ADJOINT: tl.constexpr,
                   ENTRY: tl.constexpr, KEEP: tl.constexpr, ST: tl.constexpr):  # fmt: skip
    """Walk a segment: S <- 2^bC S + xᵀ (w ⊙ y).

    x, y, w are k, v, 2^(bC - b) (times the step), or q, grad o, 2^b in the adjoint walk. From zero, the state at the
    end goes to ``states`` and the segment's log2 decay to ``decays``. With KEEP from ``entry``, and the state before
    each chunk goes to ``kept`` (b n h v k) in the type of x.
    """
    h, iv, s, row, first, n = segment_of_program(H, NC, NS, CPS, VB // BV)
    LAST: tl.constexpr = 0 if REV else C - 1  # where a chunk's total stands
    LEFTWARD: tl.constexpr = REV != ADJOINT
    STEP: tl.constexpr = -1 if LEFTWARD else 1
    c = first + n - 1 if LEFTWARD else first
    index = row * H + h
    base = index * (NC * C).to(tl.int64)
    x_d = tl.make_tensor_descriptor(x + row * sxb + (h // R) * K, [T, K], [sxt, 1], [C, KB])
    y_d = tl.make_tensor_descriptor(y + row * syb + h * V, [T, V], [syt, 1], [C, BV])
    b_d = tl.make_tensor_descriptor(total + base, [NC * C], [1], [C])
    if SSD and not ADJOINT:
        late_d = tl.make_tensor_descriptor(late + base, [NC * C], [1], [C])
    tile = tl.arange(0, KB)[:, None] * VB + (iv * BV + tl.arange(0, BV))[None, :]
    S = entering(entry, index, s, NS, iv, K, V, KB, VB, BV, ENTRY)
    sum_ = 0.0
    ends = total + base + LAST
    bC_next = tl.load(ends + c * C)
    for i in tl.range(0, n, num_stages=ST):
        t0 = c * C
        X = x_d.load([t0, 0])
        Y = y_d.load([t0, iv * BV])
        b = b_d.load([t0])
        bC = bC_next  # scalars are not pipelined: fetched one chunk ahead by hand
        bC_next = tl.load(ends + (c + STEP) * C, mask=i + 1 < n, other=0.0)
        if KEEP:
            turned = (iv * BV + tl.arange(0, BV))[None, :] * KB + tl.arange(0, KB)[:, None]
            tl.store(kept + ((row * NC + c) * H + h) * (KB * VB) + turned, S.to(kept.dtype.element_ty))
        if ADJOINT:
            w = tl.exp2(b)
        else:
            delay = b
            if SSD:
                delay = late_d.load([t0])
            w = tl.exp2(bC - delay)
        Yw = (Y.to(tl.float32) * w[:, None]).to(Y.dtype)
        S = tl.dot(tl.trans(X), Yw, S * tl.exp2(bC), input_precision="ieee")
        sum_ += bC
        c += STEP
    if not KEEP:
        tl.store(states + (index * NS + s) * (KB * VB) + tile, S)
        if iv == 0:
            tl.store(decays + index * NS + s, sum_)


@triton.jit(do_not_specialize=["NS"])
def scan(states, decays, initial, NS, K: tl.constexpr, V: tl.constexpr, VB: tl.constexpr, KV: tl.constexpr,
         INITIAL: tl.constexpr, LEFTWARD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """In place along the walk: the state of each segment from zero becomes the state that enters it."""
    index = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    S = tl.zeros((BLOCK,), dtype=tl.float32)
    if INITIAL:
        k, v = e // VB, e % VB
        S = tl.load(initial + index * (K * V) + k * V + v, mask=(k < K) & (v < V), other=0.0).to(tl.float32)
    STEP: tl.constexpr = -1 if LEFTWARD else 1
    s = NS - 1 if LEFTWARD else 0
    p = states + (index * NS + s) * KV + e
    d = decays + index * NS + s
    zero = tl.zeros((BLOCK,), dtype=tl.int32)
    for i in range(0, NS, 4):  # four loads in flight: they do not depend on the recurrence
        m1, m2, m3 = zero + (i + 1) < NS, zero + (i + 2) < NS, zero + (i + 3) < NS
        x0 = tl.load(p)
        x1 = tl.load(p + STEP * KV, mask=m1, other=0.0)
        x2 = tl.load(p + 2 * STEP * KV, mask=m2, other=0.0)
        x3 = tl.load(p + 3 * STEP * KV, mask=m3, other=0.0)
        d0 = tl.exp2(tl.load(d))
        d1 = tl.exp2(tl.load(d + STEP, mask=i + 1 < NS, other=0.0))
        d2 = tl.exp2(tl.load(d + 2 * STEP, mask=i + 2 < NS, other=0.0))
        d3 = tl.exp2(tl.load(d + 3 * STEP, mask=i + 3 < NS, other=0.0))
        tl.store(p, S)
        S = S * d0 + x0
        tl.store(p + STEP * KV, S, mask=m1)
        S = S * d1 + x1
        tl.store(p + 2 * STEP * KV, S, mask=m2)
        S = S * d2 + x2
        tl.store(p + 3 * STEP * KV, S, mask=m3)
        S = S * d3 + x3
        p += 4 * STEP * KV
        d += 4 * STEP


@triton.jit(do_not_specialize=["T", "H", "R", "NC", "NS", "CPS"])
def forward(q, k, v, total, late, skip, entry, o, kept, final, T, H, R, NC, NS, CPS, sqb, sqt, skb, skt, svb, svt,
            K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
            SSD: tl.constexpr, SKIP: tl.constexpr, ENTRY: tl.constexpr, KEEP: tl.constexpr, REV: tl.constexpr,
            ST: tl.constexpr):  # fmt: skip
    """Walk a segment with S on chip: O = 2^b ⊙ (Q S) + (Q Kᵀ ⊙ 2^(b_i - b_j)) V, then S as in ``segment_states``.

    The state that enters each chunk goes to ``kept`` (b n h v k) for the backward pass, in the type of q. It walks
    transposed, so that it and what it receives are left operands, straight from registers.
    """
    h, iv, s, row, first, n = segment_of_program(H, NC, NS, CPS, VB // BV)
    LAST: tl.constexpr = 0 if REV else C - 1
    STEP: tl.constexpr = -1 if REV else 1
    c = first + n - 1 if REV else first
    index = row * H + h
    base = index * (NC * C).to(tl.int64)
    q_d = tl.make_tensor_descriptor(q + row * sqb + (h // R) * K, [T, K], [sqt, 1], [C, KB])
    k_d = tl.make_tensor_descriptor(k + row * skb + (h // R) * K, [T, K], [skt, 1], [C, KB])
    v_d = tl.make_tensor_descriptor(v + row * svb + h * V, [T, V], [svt, 1], [C, BV])
    o_d = tl.make_tensor_descriptor(o + (row * T * H + h) * V, [T, V], [H * V, 1], [C, BV])
    b_d = tl.make_tensor_descriptor(total + base, [NC * C], [1], [C])
    if SSD:
        late_d = tl.make_tensor_descriptor(late + base, [NC * C], [1], [C])
    if SKIP:
        D = tl.load(skip + h).to(tl.float32)
    S = tl.trans(entering(entry, index, s, NS, iv, K, V, KB, VB, BV, ENTRY))
    if KEEP:
        kept_d = tl.make_tensor_descriptor(kept + row * NC * H * (KB * VB), [NC * H * VB, KB], [KB, 1], [BV, KB])
    i_, j_ = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    seen_t = i_ >= j_ if REV else i_ <= j_
    ends = total + base + LAST
    bC_next = tl.load(ends + c * C)
    for i in tl.range(0, n, num_stages=ST):
        t0 = c * C
        Q = q_d.load([t0, 0])
        Kt = k_d.load([t0, 0])
        X = v_d.load([t0, iv * BV])
        b = b_d.load([t0])
        bC = bC_next
        bC_next = tl.load(ends + (c + STEP) * C, mask=i + 1 < n, other=0.0)
        delay = b
        if SSD:
            delay = late_d.load([t0])
        Sb = S.to(Q.dtype)
        if KEEP:
            kept_d.store([(c * H + h) * VB + iv * BV, 0], Sb)
        A = tl.dot(Kt, tl.trans(Q), input_precision="ieee")
        A = tl.where(seen_t, A * tl.exp2(b[None, :] - delay[:, None]), 0.0).to(Q.dtype)
        XT = tl.trans(X)
        Y = tl.dot(Sb, tl.trans(Q), input_precision="ieee") * tl.exp2(b)[None, :]
        Y = tl.dot(XT, A, Y, input_precision="ieee")
        if SKIP:
            Y += XT.to(tl.float32) * D
        o_d.store([t0, iv * BV], tl.trans(Y.to(o.dtype.element_ty)))
        Xw = (XT.to(tl.float32) * tl.exp2(bC - delay)[None, :]).to(X.dtype)
        S = tl.dot(Xw, Kt, S * tl.exp2(bC), input_precision="ieee")
        c += STEP
    if s == (0 if REV else NS - 1):
        leaving(final, index, iv, tl.trans(S), K, V, KB, BV)


@triton.jit(do_not_specialize=["T", "H", "R", "NC", "NS", "CPS"])
def paired_states(x, y, total, late, states, decays, T, H, R, NC, NS, CPS, sxb, sxt, syb, syt,
                  K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, C: tl.constexpr, SSD: tl.constexpr,
                  REV: tl.constexpr, ADJOINT: tl.constexpr, ST: tl.constexpr):  # fmt: skip
    """``segment_states`` from zero for two neighbouring heads of a group at once: their shared x is read once."""
    pid = tl.program_id(0)
    h = (pid % (H // 2)) * 2
    r = pid // (H // 2)
    s = r % NS
    row = (r // NS).to(tl.int64)
    first = s * CPS
    n = tl.minimum(CPS, NC - first)
    LAST: tl.constexpr = 0 if REV else C - 1
    LEFTWARD: tl.constexpr = REV != ADJOINT
    STEP: tl.constexpr = -1 if LEFTWARD else 1
    c = first + n - 1 if LEFTWARD else first
    index = row * H + h
    wide = (NC * C).to(tl.int64)
    base = index * wide
    x_d = tl.make_tensor_descriptor(x + row * sxb + (h // R) * K, [T, K], [sxt, 1], [C, KB])
    y_d = tl.make_tensor_descriptor(y + row * syb + h * V, [T, 2 * V], [syt, 1], [C, 2 * V])
    b_d = tl.make_tensor_descriptor(total + base, [2 * NC * C], [1], [C])
    if SSD and not ADJOINT:
        late_d = tl.make_tensor_descriptor(late + base, [2 * NC * C], [1], [C])
    column = tl.arange(0, 2 * V)
    left = column < V
    S = tl.zeros((KB, 2 * V), dtype=tl.float32)
    sum1 = 0.0
    sum2 = 0.0
    ends = total + base + LAST
    next1 = tl.load(ends + c * C)
    next2 = tl.load(ends + wide + c * C)
    for i in tl.range(0, n, num_stages=ST):
        t0 = c * C
        X = x_d.load([t0, 0])
        Y = y_d.load([t0, 0])
        b1 = b_d.load([t0])
        b2 = b_d.load([NC * C + t0])
        end1 = next1
        end2 = next2
        next1 = tl.load(ends + (c + STEP) * C, mask=i + 1 < n, other=0.0)
        next2 = tl.load(ends + wide + (c + STEP) * C, mask=i + 1 < n, other=0.0)
        if ADJOINT:
            w1 = tl.exp2(b1)
            w2 = tl.exp2(b2)
        elif SSD:
            w1 = tl.exp2(end1 - late_d.load([t0]))
            w2 = tl.exp2(end2 - late_d.load([NC * C + t0]))
        else:
            w1 = tl.exp2(end1 - b1)
            w2 = tl.exp2(end2 - b2)
        Yw = (Y.to(tl.float32) * tl.where(left[None, :], w1[:, None], w2[:, None])).to(Y.dtype)
        S = tl.dot(tl.trans(X), Yw, S * tl.where(left, tl.exp2(end1), tl.exp2(end2))[None, :], input_precision="ieee")
        sum1 += end1
        sum2 += end2
        c += STEP
    head = tl.where(left, 0, 1).to(tl.int64)
    tile = (head * NS * (KB * V) + column % V)[None, :] + tl.arange(0, KB)[:, None] * V
    tl.store(states + (index * NS + s) * (KB * V) + tile, S)
    tl.store(decays + index * NS + s, sum1)
    tl.store(decays + (index + 1) * NS + s, sum2)
