"""Triton kernels of vector_decay. Words are those of scalar_decay/triton_forward.py.

Gates are read as logits in every kernel and activated there: neither log-decays, nor their running sums, nor scores are
ever in memory. With b the running sum of log2 decays inside a chunk, a product of decays from token j to token i is
2^(b_i - b_j), channel by channel. Scores halve the chunk down to blocks of 8 tokens, as tree.py does: a pair that a cut
parts is 2^(b_i - b_cut) 2^(b_cut - b_j), both at most one, and all pairs of one size of halves are one masked product.
Inside a block of 8 everything is referred to its middle; no decay is below 2^-24, so no power there is beyond 2^96.
A start is no decay but a mask, so nothing of another segment comes through.

Reading order is left to right, or right to left with REV. An ADJOINT walk (gradients of states) goes the other way.
No accumulator is transposed into a product (Triton 3.4 to 3.7.0 miscompile that on Hopper).
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqlong.kernels.triton_pieces import segment_of_program, softplus

LOG2E = tl.constexpr(1.4426950408889634)
#: log2 of the smallest decay: what it lets through is below the rounding of float32.
LEAST = tl.constexpr(-24.0)
#: ACT: what makes a log-decay of a gate.
LOG_DECAY, LOGSIGMOID, LOWER_BOUND = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def activated(x, bound, scale, inside, ACT: tl.constexpr):
    """log2 decays of a tile of gates, zero (no decay) where there is no token, and the keys that they make (or x).

    ``scale`` is 1 / divisor; ``bound`` (1 k) is lower_bound.
    """
    x = x.to(tl.float32)
    key = x
    if ACT == 0:
        g = x * LOG2E
    if ACT == 1:
        g = -softplus(-x) * (scale * LOG2E)
    if ACT == 2:
        rest = 1.0 - bound
        key = rest * tl.sigmoid(-x)
        series = key * (1.0 + key * (0.5 + key * (0.3333333333 + key * 0.25)))
        decay = tl.maximum(bound + rest * tl.sigmoid(x), 1e-30)
        g = tl.where(key < 0.015625, -series * LOG2E, tl.log2(decay))
    return tl.where(inside, tl.maximum(g, LEAST), 0.0), key


@triton.jit
def segments_of(starts, row, t, T, REV: tl.constexpr):
    """How many starts stand before or at each token of a chunk, in reading order."""
    flags = tl.load(starts + row * T + t, mask=t < T, other=0).to(tl.int32)
    return tl.cumsum(flags, 0, reverse=REV)


@triton.jit
def referred(b, here, half, middle, C: tl.constexpr, K: tl.constexpr, REV: tl.constexpr):
    """What queries and keys (C k) are multiplied by, so that pairs which a cut between halves parts get their decays.

    With ``middle`` every token is on both sides: right for pairs of halves that are short enough for powers above one.
    """
    rows = tl.arange(0, C) + here
    place = rows & (2 * half - 1)
    if REV:
        cut = rows - place + half  # the last token read before the cut
        late = (place < half)[:, None]
    else:
        cut = rows - place + half - 1
        late = (place >= half)[:, None]
    since = b - tl.gather(b, tl.broadcast_to(cut[:, None], (C, K)), 0)
    return tl.where(late | middle, tl.exp2(since), 0.0), tl.where(late & (middle == 0), 0.0, tl.exp2(-since))


@triton.jit
def together(seg, here, size, C: tl.constexpr, STARTS: tl.constexpr, REV: tl.constexpr):
    """Which tokens of a chunk (rows) see which (columns) inside parts of this size.

    ``here`` is zero, which the compiler does not know: masks that are made anew for each chunk need no registers.
    """
    rows = tl.arange(0, C) + here
    i_, j_ = rows[:, None], rows[None, :]
    seen = ((i_ ^ j_) < size) & (i_ <= j_ if REV else i_ >= j_)
    if STARTS:
        seen = seen & (seg[:, None] == seg[None, :])
    return seen


@triton.jit
def scores(M, R, W, b, seg, here, C: tl.constexpr, K: tl.constexpr, STARTS: tl.constexpr, REV: tl.constexpr,
           ADJOINT: tl.constexpr):  # fmt: skip
    """Add to M (writers, readers) what K channels give; R holds queries and W keys, or the reverse if ADJOINT."""
    HALVES: tl.constexpr = 4 if C == 128 else 3 if C == 64 else 2 if C == 32 else 1
    for level in tl.range(0, HALVES + 1, num_stages=1):
        half = C >> (level + 1)
        wr, ww = referred(b, here, half, level == HALVES, C, K, REV)
        if ADJOINT:
            wr, ww = ww, wr
        Rl = (R.to(tl.float32) * wr).to(R.dtype)
        Wl = (W.to(tl.float32) * ww).to(R.dtype)
        part = tl.dot(Wl, tl.trans(Rl), input_precision="ieee")
        M += tl.where(together(seg, here, 2 * half, C, STARTS, REV == ADJOINT), part, 0.0)
    return M


@triton.jit
def entering(entry, index, s, NS, ik, iv, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
             KS: tl.constexpr, BV: tl.constexpr, ENTRY: tl.constexpr):  # fmt: skip
    """Slice (BV, KS) of the state that enters segment s: zero, or of the scan, or the caller's (ENTRY 0, 1, 2)."""
    v, k = (iv * BV + tl.arange(0, BV))[:, None], (ik * KS + tl.arange(0, KS))[None, :]
    S = tl.zeros((BV, KS), dtype=tl.float32)
    if ENTRY == 1:
        S += tl.load(entry + (index * NS + s) * (KB * VB) + v * KB + k)
    if ENTRY == 2:
        S += tl.load(entry + index * (K * V) + k * V + v, mask=(k < K) & (v < V), other=0.0)
    return S


@triton.jit
def leaving(final, index, ik, iv, S, K: tl.constexpr, V: tl.constexpr, KS: tl.constexpr, BV: tl.constexpr):
    """Store a slice (BV, KS) of the state after the last segment as the caller sees it, without padding."""
    v, k = (iv * BV + tl.arange(0, BV))[:, None], (ik * KS + tl.arange(0, KS))[None, :]
    tl.store(final + index * (K * V) + k * V + v, S, mask=(k < K) & (v < V))


@triton.jit
def decays(g, seg, C: tl.constexpr, REV: tl.constexpr, STARTS: tl.constexpr):
    """Of log2 decays (C k): running sums, whole sums (1 k), and what enters and leaves (C k), carries (1 k) a chunk."""
    rows = tl.arange(0, C)
    b = tl.cumsum(g, 0, reverse=REV)
    last = rows == (0 if REV else C - 1)
    bC = tl.sum(tl.where(last[:, None], b, 0.0), 0)[None, :]
    enter = tl.exp2(b)
    leave = tl.exp2(tl.minimum(bC - b, 0.0))
    carry = tl.exp2(bC)
    if STARTS:
        end = tl.max(seg, 0)
        enter = tl.where((seg == 0)[:, None], enter, 0.0)
        leave = tl.where((seg == end)[:, None], leave, 0.0)
        carry = tl.where(end == 0, carry, 0.0)
    return b, enter, leave, carry


@triton.jit(do_not_specialize=["T", "H", "NC", "NS", "CPS"])
def segment_states(x, y, gate, bound, starts, states, carries, T, H, NC, NS, CPS, scale, sxb, sxt, syb, syt, sgb, sgt,
                   K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, KS: tl.constexpr,
                   BV: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr, STARTS: tl.constexpr, REV: tl.constexpr,
                   ADJOINT: tl.constexpr, ST: tl.constexpr):  # fmt: skip
    """Walk a segment from zero: S <- carry S + (w ⊙ x)ᵀ y for x, y, w = k, v, leave, or q, grad o, enter if ADJOINT.

    The slice at the end goes to ``states`` (b h s v k), the segment's product of decays to ``carries`` (b h s k).
    """
    pid = tl.program_id(0)
    h = pid % H
    r = pid // H
    ik = r % (KB // KS)
    r = r // (KB // KS)
    iv = r % (VB // BV)
    r = r // (VB // BV)
    s = r % NS
    row = (r // NS).to(tl.int64)
    first = s * CPS
    n = tl.minimum(CPS, NC - first)
    LEFTWARD: tl.constexpr = REV != ADJOINT
    STEP: tl.constexpr = -1 if LEFTWARD else 1
    c = first + n - 1 if LEFTWARD else first
    index = row * H + h
    MADE: tl.constexpr = ACT == 2 and not ADJOINT
    y_d = tl.make_tensor_descriptor(y + row * syb + h * V, [T, V], [syt, 1], [C, BV])
    g_d = tl.make_tensor_descriptor(gate + row * sgb + h * K, [T, K], [sgt, 1], [C, KS])
    if not MADE:
        x_d = tl.make_tensor_descriptor(x + row * sxb + h * K, [T, K], [sxt, 1], [C, KS])
    columns = ik * KS + tl.arange(0, KS)[None, :]
    lb = tl.zeros((1, KS), dtype=tl.float32)
    if ACT == 2:
        lb += tl.load(bound + h * K + columns, mask=columns < K, other=0.0)
    rows = tl.arange(0, C)
    S = tl.zeros((BV, KS), dtype=tl.float32)
    all_ = tl.zeros((1, KS), dtype=tl.float32) + 1.0
    for _ in tl.range(0, n, num_stages=ST):
        t0 = c * C
        Y = y_d.load([t0, iv * BV])
        g, X = activated(g_d.load([t0, ik * KS]), lb, scale, (t0 + rows < T)[:, None], ACT)
        if not MADE:
            X = x_d.load([t0, ik * KS]).to(tl.float32)
        seg = rows
        if STARTS:
            seg = segments_of(starts, row, t0 + rows, T, REV)
        _b, enter, leave, carry = decays(g, seg, C, REV, STARTS)
        X = X * (enter if ADJOINT else leave)
        S = tl.dot(tl.trans(Y), X.to(Y.dtype), S * carry, input_precision="ieee")
        all_ = all_ * carry
        c += STEP
    tile = (iv * BV + tl.arange(0, BV))[:, None] * KB + columns
    tl.store(states + (index * NS + s) * (KB * VB) + tile, S)
    if iv == 0:
        tl.store(carries + (index * NS + s) * KB + columns, all_)


@triton.jit(do_not_specialize=["NS"])
def scan(states, carries, initial, NS, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, KV: tl.constexpr,
         INITIAL: tl.constexpr, LEFTWARD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """In place along the walk: the state of each segment from zero becomes the state that enters it."""
    index = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    S = tl.zeros((BLOCK,), dtype=tl.float32)
    k, v = e % KB, e // KB
    if INITIAL:
        S = tl.load(initial + index * (K * V) + k * V + v, mask=(k < K) & (v < V), other=0.0).to(tl.float32)
    STEP: tl.constexpr = -1 if LEFTWARD else 1
    s = NS - 1 if LEFTWARD else 0
    p = states + (index * NS + s) * KV + e
    d = carries + (index * NS + s) * KB + k
    zero = tl.zeros((BLOCK,), dtype=tl.int32)
    for i in range(0, NS, 4):  # four loads in flight: they do not depend on the recurrence
        m1, m2, m3 = zero + (i + 1) < NS, zero + (i + 2) < NS, zero + (i + 3) < NS
        x0 = tl.load(p)
        x1 = tl.load(p + STEP * KV, mask=m1, other=0.0)
        x2 = tl.load(p + 2 * STEP * KV, mask=m2, other=0.0)
        x3 = tl.load(p + 3 * STEP * KV, mask=m3, other=0.0)
        d0 = tl.load(d)
        d1 = tl.load(d + STEP * KB, mask=m1, other=0.0)
        d2 = tl.load(d + 2 * STEP * KB, mask=m2, other=0.0)
        d3 = tl.load(d + 3 * STEP * KB, mask=m3, other=0.0)
        tl.store(p, S)
        S = S * d0 + x0
        tl.store(p + STEP * KV, S, mask=m1)
        S = S * d1 + x1
        tl.store(p + 2 * STEP * KV, S, mask=m2)
        S = S * d2 + x2
        tl.store(p + 3 * STEP * KV, S, mask=m3)
        S = S * d3 + x3
        p += 4 * STEP * KV
        d += 4 * STEP * KB


@triton.jit
def slice_(S, M, Y, r_d, w_d, g_d, kept_d, XT, lb, seg, scale, t0, at, T, ik: tl.constexpr, K: tl.constexpr,
           C: tl.constexpr, KS: tl.constexpr, ACT: tl.constexpr, KEEP: tl.constexpr, STARTS: tl.constexpr,
           REV: tl.constexpr, ADJOINT: tl.constexpr):  # fmt: skip
    """What KS channels of a chunk give to scores and output; and the slice of the state after the chunk."""
    rows = tl.arange(0, C)
    bound = tl.zeros((1, KS), dtype=tl.float32)
    if ACT == 2:
        column = ik * KS + tl.arange(0, KS)[None, :]
        bound += tl.load(lb + column, mask=column < K, other=0.0)
    g, made = activated(g_d.load([t0, ik * KS]), bound, scale, (t0 + rows < T)[:, None], ACT)
    if ACT == 2 and ADJOINT:
        R = made.to(XT.dtype)
        W = w_d.load([t0, ik * KS])
    elif ACT == 2:
        R = r_d.load([t0, ik * KS])
        W = made.to(XT.dtype)
    else:
        R = r_d.load([t0, ik * KS])
        W = w_d.load([t0, ik * KS])
    b, enter, leave, carry = decays(g, seg, C, REV, STARTS)
    Sb = S.to(XT.dtype)
    if KEEP:
        kept_d.store([at, ik * KS], Sb)
    if ADJOINT:
        enter, leave = leave, enter
    Y = tl.dot(Sb, tl.trans((R.to(tl.float32) * enter).to(XT.dtype)), Y, input_precision="ieee")
    S = tl.dot(XT, (W.to(tl.float32) * leave).to(XT.dtype), S * carry, input_precision="ieee")
    M = scores(M, R, W, b, seg, tl.minimum(t0, 0), C, KS, STARTS, REV, ADJOINT)
    return S, M, Y


@triton.jit(do_not_specialize=["T", "H", "NC", "NS", "CPS"])
def walk(r, w, x, gate, bound, starts, entry, out, kept, final, T, H, NC, NS, CPS, scale, srb, srt, swb, swt, sxb, sxt,
         sgb, sgt, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, KS: tl.constexpr,
         BV: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr, STARTS: tl.constexpr, ENTRY: tl.constexpr,
         KEEP: tl.constexpr, FINAL: tl.constexpr, REV: tl.constexpr, ADJOINT: tl.constexpr,
         ST: tl.constexpr):  # fmt: skip
    """Walk a segment with S on chip: o from q, k, v; or, ADJOINT, grad v from k, q, grad o (readers, writers, x).

    S (v k) is transposed, so that it and what it receives are left operands, straight from registers. The one before
    each chunk goes to ``kept`` (b n h v k) in the type of x.
    """
    h, iv, s, row, first, n = segment_of_program(H, NC, NS, CPS, VB // BV)
    LEFTWARD: tl.constexpr = REV != ADJOINT
    STEP: tl.constexpr = -1 if LEFTWARD else 1
    c = first + n - 1 if LEFTWARD else first
    index = row * H + h
    r_d = tl.make_tensor_descriptor(r + row * srb + h * K, [T, K], [srt, 1], [C, KS])
    w_d = tl.make_tensor_descriptor(w + row * swb + h * K, [T, K], [swt, 1], [C, KS])
    x_d = tl.make_tensor_descriptor(x + row * sxb + h * V, [T, V], [sxt, 1], [C, BV])
    g_d = tl.make_tensor_descriptor(gate + row * sgb + h * K, [T, K], [sgt, 1], [C, KS])
    o_d = tl.make_tensor_descriptor(out + (row * T * H + h) * V, [T, V], [H * V, 1], [C, BV])
    kept_d = x_d
    if KEEP:
        kept_d = tl.make_tensor_descriptor(kept + row * NC * H * (KB * VB), [NC * H * VB, KB], [KB, 1], [BV, KS])
    lb = bound + h * K
    S0 = entering(entry, index, s, NS, 0, iv, K, V, KB, VB, KS, BV, ENTRY)
    if KB > KS:
        S1 = entering(entry, index, s, NS, 1, iv, K, V, KB, VB, KS, BV, ENTRY)
    if KB > 2 * KS:
        S2 = entering(entry, index, s, NS, 2, iv, K, V, KB, VB, KS, BV, ENTRY)
        S3 = entering(entry, index, s, NS, 3, iv, K, V, KB, VB, KS, BV, ENTRY)
    rows = tl.arange(0, C)
    for _ in tl.range(0, n, num_stages=ST):
        t0 = c * C
        seg = rows
        if STARTS:
            seg = segments_of(starts, row, t0 + rows, T, REV)
        XT = tl.trans(x_d.load([t0, iv * BV]))
        M = tl.zeros((C, C), dtype=tl.float32)
        Y = tl.zeros((BV, C), dtype=tl.float32)
        at = (c * H + h) * VB + iv * BV
        S0, M, Y = slice_(S0, M, Y, r_d, w_d, g_d, kept_d, XT, lb, seg, scale, t0, at, T, 0, K, C, KS, ACT, KEEP,
                           STARTS, REV, ADJOINT)  # fmt: skip
        if KB > KS:
            S1, M, Y = slice_(S1, M, Y, r_d, w_d, g_d, kept_d, XT, lb, seg, scale, t0, at, T, 1, K, C, KS, ACT, KEEP,
                               STARTS, REV, ADJOINT)  # fmt: skip
        if KB > 2 * KS:
            S2, M, Y = slice_(S2, M, Y, r_d, w_d, g_d, kept_d, XT, lb, seg, scale, t0, at, T, 2, K, C, KS, ACT, KEEP,
                               STARTS, REV, ADJOINT)  # fmt: skip
            S3, M, Y = slice_(S3, M, Y, r_d, w_d, g_d, kept_d, XT, lb, seg, scale, t0, at, T, 3, K, C, KS, ACT, KEEP,
                               STARTS, REV, ADJOINT)  # fmt: skip
        Y = tl.dot(XT, M.to(XT.dtype), Y, input_precision="ieee")
        o_d.store([t0, iv * BV], tl.trans(Y.to(out.dtype.element_ty)))
        c += STEP
    if FINAL:  # noqa: SIM102 (known when the kernel is compiled; the next is not)
        if s == (0 if LEFTWARD else NS - 1):
            leaving(final, index, 0, iv, S0, K, V, KS, BV)
            if KB > KS:
                leaving(final, index, 1, iv, S1, K, V, KS, BV)
            if KB > 2 * KS:
                leaving(final, index, 2, iv, S2, K, V, KS, BV)
                leaving(final, index, 3, iv, S3, K, V, KS, BV)


@triton.jit(do_not_specialize=["T", "H", "NC", "RUN"])
def keys(q, k, v, gate, bound, starts, go, kept, dkept, dq, dk, dgate, dbound, T, H, NC, RUN, scale, sqb, sqt, skb, skt,
         svb, svt, sgb, sgt, sob, sot, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
         KS: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr,
         STARTS: tl.constexpr, REV: tl.constexpr, ST: tl.constexpr):  # fmt: skip
    """grad q, grad k and grad gate of BK channels, KS at once, from the states at both ends of each chunk.

    Chunks are independent: the loop keeps loads flowing and pays for descriptors once.

    grad g_t = <S, dS> at the chunk's entry - Σ (q·grad q - k·grad k) over the tokens read before t, in float32. What a
    pair of them adds is nothing: it is formed of the same rounded factors on both sides, so that it cancels.
    """
    pid = tl.program_id(0)
    first_slice = pid % (KB // BK) * (BK // KS)
    r = pid // (KB // BK)
    h = r % H
    r = r // H
    runs = tl.cdiv(NC, RUN)
    first = (r % runs) * RUN
    row = (r // runs).to(tl.int64)
    n = tl.minimum(RUN, NC - first)
    out = (row * T * H + h) * K
    q_d = tl.make_tensor_descriptor(q + row * sqb + h * K, [T, K], [sqt, 1], [C, KS])
    v_d = tl.make_tensor_descriptor(v + row * svb + h * V, [T, V], [svt, 1], [C, BV])
    g_d = tl.make_tensor_descriptor(gate + row * sgb + h * K, [T, K], [sgt, 1], [C, KS])
    go_d = tl.make_tensor_descriptor(go + row * sob + h * V, [T, V], [sot, 1], [C, BV])
    dq_d = tl.make_tensor_descriptor(dq + out, [T, K], [H * K, 1], [C, KS])
    dg_d = tl.make_tensor_descriptor(dgate + out, [T, K], [H * K, 1], [C, KS])
    if ACT != 2:
        k_d = tl.make_tensor_descriptor(k + row * skb + h * K, [T, K], [skt, 1], [C, KS])
        dk_d = tl.make_tensor_descriptor(dk + out, [T, K], [H * K, 1], [C, KS])
    states = row * NC * H * (KB * VB)
    s_d = tl.make_tensor_descriptor(kept + states, [NC * H * VB, KB], [KB, 1], [BV, KS])
    ds_d = tl.make_tensor_descriptor(dkept + states, [NC * H * VB, KB], [KB, 1], [BV, KS])
    HALVES: tl.constexpr = 4 if C == 128 else 3 if C == 64 else 2 if C == 32 else 1
    rows = tl.arange(0, C)
    for i in tl.range(0, n, num_stages=ST):
        c = first + i
        t0 = c * C
        here = tl.minimum(t0, 0)
        inside = (t0 + rows < T)[:, None]
        seg = rows
        if STARTS:
            seg = segments_of(starts, row, t0 + rows, T, REV)
        at = (c * H + h) * VB
        for part_ in tl.range(0, BK // KS, num_stages=1):
            ik = first_slice + part_
            column = ik * KS + tl.arange(0, KS)[None, :]
            lb = tl.zeros((1, KS), dtype=tl.float32)
            if ACT == 2:
                lb += tl.load(bound + h * K + column, mask=column < K, other=0.0)
            x = g_d.load([t0, ik * KS])
            g, made = activated(x, lb, scale, inside, ACT)
            Q = q_d.load([t0, ik * KS])
            Kt = made.to(Q.dtype)
            if ACT != 2:
                Kt = k_d.load([t0, ik * KS])
            b, enter, leave, carry = decays(g, seg, C, REV, STARTS)
            # First all of grad q, then all of grad k: both at once, or levels unrolled, would fill the registers.
            P = tl.zeros((C, C), dtype=tl.float32)
            dQ = tl.zeros((C, KS), dtype=tl.float32)
            through = tl.zeros((KS,), dtype=tl.float32)
            for iv in tl.static_range(VB // BV):
                dO = go_d.load([t0, iv * BV])
                S = s_d.load([at + iv * BV, ik * KS])
                P = tl.dot(dO, tl.trans(v_d.load([t0, iv * BV])), P, input_precision="ieee")
                dQ = tl.dot(dO, S, dQ, input_precision="ieee")
                dS = ds_d.load([at + iv * BV, ik * KS])
                through += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)
            dQ = dQ * enter
            e = dQ * Q.to(tl.float32)
            anchor = tl.sum(e, 0)[None, :] + through[None, :] * carry
            Pb = P.to(Q.dtype)
            for level in tl.range(0, HALVES + 1, num_stages=1):
                half = C >> (level + 1)
                wq, wk = referred(b, here, half, level == HALVES, C, KS, REV)
                Ql = (Q.to(tl.float32) * wq).to(Q.dtype)
                Kl = (Kt.to(tl.float32) * wk).to(Q.dtype)
                part = together(seg, here, 2 * half, C, STARTS, REV)
                toward = tl.dot(tl.where(part, Pb, 0.0), Kl, input_precision="ieee")
                dQ += toward * wq
                e += toward * Ql.to(tl.float32)
            dq_d.store([t0, ik * KS], dQ.to(dq.dtype.element_ty))

            P = tl.zeros((C, C), dtype=tl.float32)
            dK = tl.zeros((C, KS), dtype=tl.float32)
            for iv in tl.static_range(VB // BV):
                X = v_d.load([t0, iv * BV])
                P = tl.dot(X, tl.trans(go_d.load([t0, iv * BV])), P, input_precision="ieee")
                dK = tl.dot(X, ds_d.load([at + iv * BV, ik * KS]), dK, input_precision="ieee")
            dK = dK * leave
            e -= dK * Kt.to(tl.float32)
            Pb = P.to(Q.dtype)
            for level in tl.range(0, HALVES + 1, num_stages=1):
                half = C >> (level + 1)
                wq, wk = referred(b, here, half, level == HALVES, C, KS, REV)
                Ql = (Q.to(tl.float32) * wq).to(Q.dtype)
                Kl = (Kt.to(tl.float32) * wk).to(Q.dtype)
                part = together(seg, here, 2 * half, C, STARTS, not REV)
                toward = tl.dot(tl.where(part, Pb, 0.0), Ql, input_precision="ieee")
                dK += toward * wk
                e -= toward * Kl.to(tl.float32)
            dg = anchor - tl.cumsum(e, 0, reverse=REV) + e
            if STARTS:
                start = tl.load(starts + row * T + t0 + rows, mask=t0 + rows < T, other=0)
                dg = tl.where((start != 0)[:, None], 0.0, dg)
            x = x.to(tl.float32)
            if ACT == 1:
                dg = dg * tl.sigmoid(-x) * scale
            if ACT == 2:
                shut = tl.sigmoid(-x)
                open_ = tl.sigmoid(x)
                odds = tl.exp(tl.minimum(-x, 60.0))
                decay = tl.maximum(lb + (1.0 - lb) * open_, 0.000244140625)
                bounds = tl.where(inside, shut * (dg / decay - dK), 0.0)
                tl.store(dbound + ((row * NC + c) * H + h) * K + column, tl.sum(bounds, 0)[None, :], mask=column < K)
                dg = shut * (dg * (1.0 - lb) / (1.0 + lb * odds) - dK * (1.0 - lb) * open_)
            else:
                dk_d.store([t0, ik * KS], dK.to(dk.dtype.element_ty))
            dg_d.store([t0, ik * KS], dg.to(dgate.dtype.element_ty))
