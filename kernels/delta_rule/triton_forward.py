"""Triton kernels of delta_rule: products of rows of a chunk, walks through segments, and the states that enter them.

Words: a chunk is C = 64 tokens in four blocks of 16; a segment of the plan is CPS chunks, one program's walk (not a
document: documents are cut by ``starts``, which are gates of 2^-160). Rows of q and k are divided by their length by
factors (rq, rk) that meet the products, so no normalised copy exists. States are held and stored transposed (v k), so
that they and what comes of them are left operands, straight from registers: no accumulator is transposed for a product.

Offsets are int64 wherever tokens, heads or states multiply.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-6)
C = tl.constexpr(64)


@triton.jit
def rows_of(x, t, T, stride, K: tl.constexpr, KB: tl.constexpr):
    """Tokens t (a vector) of x (t k), zero beyond its edges."""
    d = tl.arange(0, KB)[None, :]
    return tl.load(x + t[:, None].to(tl.int64) * stride + d, mask=(t[:, None] < T) & (d < K), other=0.0)


@triton.jit
def square(x, offset):
    """Pointers to the (C C) matrix at an offset."""
    return x + offset + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]


@triton.jit
def _length(x, out, NORM: tl.constexpr):
    """The inverse lengths of the rows of a chunk, also stored."""
    y = tl.zeros((C,), dtype=tl.float32) + 1.0
    if NORM:
        x = x.to(tl.float32)
        y = tl.rsqrt(tl.sum(x * x, 1) + EPS)
    tl.store(out, y)
    return y


@triton.jit(do_not_specialize=["T", "H", "R", "NC"])
def products(q, k, gate, total, rq, rk, scores, erase, T, H, R, NC, sqb, sqt, sqh, skb, skt, skh,
             K: tl.constexpr, KB: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """One chunk of one head: running log2 decays, inverse lengths, the scores P, and k_i D_ij k_jᵀ where j < i.

    gate, total, rq, rk are (b h n·C), gate in log2; scores and erase (b h n C C).
    """
    pid = tl.program_id(0)
    c = pid % NC
    h = (pid // NC) % H
    row = (pid // NC // H).to(tl.int64)
    index = row * H + h
    t = c * C + tl.arange(0, C)
    at = index * (NC * C).to(tl.int64) + t
    b = tl.zeros((C,), dtype=tl.float32)
    if GATED:
        b = tl.cumsum(tl.load(gate + at), 0)
    tl.store(total + at, b)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    D = tl.where(i >= j, tl.exp2(tl.minimum(b[:, None] - b[None, :], 0.0)), 0.0)
    y = rows_of(k + row * skb + (h // R) * skh, t, T, skt, K, KB)
    r_k = _length(y, rk + at, NORM)
    E = tl.dot(y, tl.trans(y), input_precision="ieee") * (r_k[:, None] * r_k[None, :]) * D
    tl.store(square(erase, (index * NC + c) * (C * C)), tl.where(i > j, E, 0.0))
    x = rows_of(q + row * sqb + (h // R) * sqh, t, T, sqt, K, KB)
    r_q = _length(x, rq + at, NORM)
    P = tl.dot(x, tl.trans(y), input_precision="ieee") * (r_q[:, None] * r_k[None, :]) * D
    tl.store(square(scores, (index * NC + c) * (C * C)), P.to(scores.dtype.element_ty))


@triton.jit
def entering(entry, index, s, NS, iv, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
             BV: tl.constexpr, ENTRY: tl.constexpr):  # fmt: skip
    """State (BV, KB) that enters segment s: zero, or of the scan (v k), or the caller's (k v) (ENTRY 0, 1, 2)."""
    v, k = (iv * BV + tl.arange(0, BV))[:, None], tl.arange(0, KB)[None, :]
    S = tl.zeros((BV, KB), dtype=tl.float32)
    if ENTRY == 1:
        S += tl.load(entry + (index * NS + s) * (VB * KB) + v * KB + k)
    if ENTRY == 2:
        S += tl.load(entry + index * (K * V) + k * V + v, mask=(k < K) & (v < V), other=0.0)
    return S


@triton.jit
def leaving(final, index, iv, S, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr):
    """Store a state as the caller sees it: (k v), without padding."""
    v, k = (iv * BV + tl.arange(0, BV))[:, None], tl.arange(0, KB)[None, :]
    tl.store(final + index * (K * V) + k * V + v, S, mask=(k < K) & (v < V))


@triton.jit
def factors(total, rq, rk, base, row, h, c, T, H, NC, K: tl.constexpr, KB: tl.constexpr, CHANNEL: tl.constexpr):
    """Factors of a chunk's rows, to its end, of q and of k from its entry, and those of a state's columns over it.

    With CHANNEL the rows themselves have been multiplied, and total is (b t h k).
    """
    at = base + c * C + tl.arange(0, C)
    if CHANNEL:
        d = tl.arange(0, KB)
        last = tl.minimum(c * C + C - 1, T - 1)
        leave = tl.zeros((C,), dtype=tl.float32) + 1.0
        enter_q = leave
        enter_k = leave
        carry = tl.exp2(tl.load(total + ((row * T + last) * H + h) * K + d, mask=d < K, other=0.0))
    else:
        b, r_k = tl.load(total + at), tl.load(rk + at)
        bC = tl.load(total + base + c * C + C - 1)
        leave = tl.exp2(bC - b) * r_k
        enter_q = tl.exp2(b) * tl.load(rq + at)
        enter_k = tl.exp2(b) * r_k
        carry = tl.zeros((KB,), dtype=tl.float32) + tl.exp2(bC)
    return leave, enter_q, enter_k, carry


@triton.jit(do_not_specialize=["T", "H", "R", "NC", "NS", "CPS"])
def walk(q, k, late, v, weight, total, rq, rk, inverse, scores, entry, o, fresh, kept, moves, final, T, H, R, NC, NS,
         CPS, sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr,
         VB: tl.constexpr, BV: tl.constexpr, ENTRY: tl.constexpr, SEGMENT: tl.constexpr, KEEP: tl.constexpr,
         CHANNEL: tl.constexpr, ST: tl.constexpr):  # fmt: skip
    """Walk a segment: Ṽ = T β (V - γK S), O = γQ S + P Ṽ, S <- γ_C S + (D_Cj K)ᵀ Ṽ.

    SEGMENT: from zero without output; the state at the end goes to ``entry`` (b h s v k). Programs past the value tiles
    walk columns of the identity without values: what the segment does to a state goes to ``moves`` (b h s j k).
    KEEP: Ṽ and the state before each chunk go to ``fresh`` (b t h v) and ``kept`` (b n h v k).
    CHANNEL: q and k are decayed from the chunk's entry, ``late`` is k decayed to its end (else it is not read).
    """
    VT: tl.constexpr = VB // BV
    TILES: tl.constexpr = VT + KB // BV if SEGMENT else VT
    pid = tl.program_id(0)
    h = pid % H
    r = pid // H
    iv = r % TILES
    r = r // TILES
    s = r % NS
    row = (r // NS).to(tl.int64)
    first = s * CPS
    n = tl.minimum(CPS, NC - first)
    index = row * H + h
    base = index * (NC * C).to(tl.int64)
    q += row * sqb + (h // R) * sqh
    k += row * skb + (h // R) * skh
    late += row * skb + (h // R) * skh
    v += row * svb + h * svh
    column = iv * BV + tl.arange(0, BV)
    real = iv < VT  # else a column of the identity
    S = tl.zeros((BV, KB), dtype=tl.float32)
    if SEGMENT:
        S += tl.where((iv - VT) * BV + tl.arange(0, BV)[:, None] == tl.arange(0, KB)[None, :], 1.0, 0.0)
    else:
        S = entering(entry, index, s, NS, iv, K, V, KB, VB, BV, ENTRY)
    for i in tl.range(0, n, num_stages=ST):
        c = first + i
        t = c * C + tl.arange(0, C)
        at = base + t
        Kt = rows_of(k, t, T, skt, K, KB)
        values = (t[:, None] < T) & (column < V)[None, :]
        X = tl.load(v + t[:, None].to(tl.int64) * svt + column[None, :], mask=values & real, other=0.0)
        Tm = tl.load(square(inverse, (index * NC + c) * (C * C)))
        w = tl.load(weight + at)
        leave, enter_q, enter_k, carry = factors(total, rq, rk, base, row, h, c, T, H, NC, K, KB, CHANNEL)
        Sb = S.to(k.dtype.element_ty)
        place = ((row * T + t[:, None]) * H + h) * V + column[None, :]
        if KEEP:
            states = kept + ((row * NC + c) * H + h) * (VB * KB)
            tl.store(states + column[:, None] * KB + tl.arange(0, KB)[None, :], Sb)
        N = tl.dot(Sb, tl.trans(Kt), input_precision="ieee") * (-enter_k)[None, :]
        N = (N + tl.trans(X).to(tl.float32)) * w[None, :]
        N = tl.dot(N.to(k.dtype.element_ty), tl.trans(Tm), input_precision="ieee")
        if not SEGMENT:
            Q = rows_of(q, t, T, sqt, K, KB)
            P = tl.load(square(scores, (index * NC + c) * (C * C)))
            Nb = N.to(k.dtype.element_ty)
            Y = tl.dot(Sb, tl.trans(Q), input_precision="ieee") * enter_q[None, :]
            Y = tl.dot(Nb, tl.trans(P), Y, input_precision="ieee")
            tl.store(o + place, tl.trans(Y.to(o.dtype.element_ty)), mask=values)
            if KEEP:
                tl.store(fresh + place, tl.trans(Nb), mask=values)
        N *= leave[None, :]
        if CHANNEL:
            Kt = rows_of(late, t, T, skt, K, KB)
        S = tl.dot(N.to(k.dtype.element_ty), Kt, S * carry[None, :], input_precision="ieee")
    if SEGMENT:
        d = tl.arange(0, KB)[None, :]
        if real:
            tl.store(entry + (index * NS + s) * (VB * KB) + column[:, None] * KB + d, S)
        else:
            tl.store(moves + (index * NS + s) * (KB * KB) + (column - VB)[:, None] * KB + d, S)
    elif s == NS - 1:
        leaving(final, index, iv, S, K, V, KB, BV)


@triton.jit(do_not_specialize=["NS"])
def scan(states, moves, edge, NS, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
         BV: tl.constexpr, EDGE: tl.constexpr, ADJOINT: tl.constexpr):  # fmt: skip
    """In place along the walk: the state of each segment from zero becomes the state that enters it (b h s v k)."""
    SLICE: tl.constexpr = min(KB, 32)
    iv = tl.program_id(1)
    index = tl.program_id(0).to(tl.int64)
    column = (iv * BV + tl.arange(0, BV))[:, None]
    k = tl.arange(0, KB)[None, :]
    part = tl.arange(0, SLICE)
    S = entering(edge, index, 0, NS, iv, K, V, KB, VB, BV, 2 if EDGE else 0)
    for i in range(0, NS):
        s = NS - 1 - i if ADJOINT else i
        here = states + (index * NS + s) * (VB * KB)
        move = moves + (index * NS + s) * (KB * KB)
        after = tl.load(here + column * KB + k)
        tl.debug_barrier()
        tl.store(here + column * KB + k, S)
        tl.debug_barrier()  # the program reads its own columns again, in slices that fit registers
        for j in tl.static_range(KB // SLICE):
            x = tl.load(here + column * KB + (j * SLICE + part)[None, :])
            if ADJOINT:
                m = tl.load(move + (j * SLICE + part)[:, None] + k * KB)
            else:
                m = tl.load(move + (j * SLICE + part)[:, None] * KB + k)
            after = tl.dot(x, m, after, input_precision="tf32x3")
        S = after
