"""Triton kernels of dplr: matrices of chunks, the walk over them, the output, the gradients.

The mathematics is that of chunked.py: rows are q_i (all columns j <= i) and a_i (columns j < i, decays up to token
i - 1), columns are b_j and k_j. A chunk of C tokens is one program but in the walk, which is one program a head and
value tile. Decays are applied to rows and columns up to a border between them: halves of the chunk, of those halves,
down to pieces of 8 tokens, which are scaled to their middle; each is one product of the whole chunk, of which a mask
keeps what it is for. With gates of at least -20 no factor exceeds e^80, so gates below count as -20: what passes then
is 2e-9 of the state, less than float32 keeps of it beside anything else. Segments are masks, and exact.

Inputs are contiguous (b t h k); states of chunks (b h n k v). Offsets are int64 wherever tokens or heads multiply.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqlong.kernels.triton_pieces import chunk_of_program

#: The strongest gate that is told apart; see above.
STRONGEST = tl.constexpr(-20.0)
#: Tokens of a piece that one product scaled to its middle serves.
PIECE = tl.constexpr(8)


@triton.jit
def rows_of(x, row, h, t0, T, H, W: tl.constexpr, C: tl.constexpr, WB: tl.constexpr):
    """Pointers to and mask of a chunk (C, WB) of x (b t h W)."""
    t = t0 + tl.arange(0, C)
    d = tl.arange(0, WB)
    place = x + ((row * T + t[:, None]) * H + h) * W + d[None, :]
    return place, (t[:, None] < T) & (d[None, :] < W)


@triton.jit
def read(x, row, h, t0, T, H, W: tl.constexpr, C: tl.constexpr, WB: tl.constexpr):
    place, inside = rows_of(x, row, h, t0, T, H, W, C, WB)
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def write(x, value, row, h, t0, T, H, W: tl.constexpr, C: tl.constexpr, WB: tl.constexpr):
    place, inside = rows_of(x, row, h, t0, T, H, W, C, WB)
    tl.store(place, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def sums(gate, row, h, t0, T, H, K: tl.constexpr, C: tl.constexpr, KB: tl.constexpr):
    """Running sum of the log-decay in the chunk, the one before each token, and the chunk's (KB)."""
    g = read(gate, row, h, t0, T, H, K, C, KB).to(tl.float32)
    g = tl.where(g < STRONGEST, STRONGEST, g)
    total = tl.cumsum(g, 0)
    return total, total - g, tl.sum(g, 0)


@triton.jit
def segments(starts, row, t0, T, C: tl.constexpr, STARTS: tl.constexpr):
    """Marks of the chunk's starts (C) and running count of them."""
    t = t0 + tl.arange(0, C)
    mark = tl.zeros((C,), dtype=tl.int32)
    if STARTS:
        mark += tl.load(starts + row * T + t, mask=t < T, other=0).to(tl.int32)
    return mark, tl.cumsum(mark, 0)


@triton.jit
def near(segment, C: tl.constexpr, STRICT: tl.constexpr, TURNED: tl.constexpr):
    """(C, C), row i and column j (TURNED: the other way): j <= i, or j < i if STRICT, in one segment."""
    i = tl.arange(0, C)
    same = segment[:, None] == segment[None, :]
    if TURNED:
        return same & ((i[:, None] < i[None, :]) if STRICT else (i[:, None] <= i[None, :]))
    return same & ((i[:, None] > i[None, :]) if STRICT else (i[:, None] >= i[None, :]))


@triton.jit
def border(total, SIZE: tl.constexpr, AT: tl.constexpr, C: tl.constexpr):
    """(C, KB): of each token, the running sum at token AT of its group of SIZE tokens."""
    i = tl.arange(0, C)
    found = tl.zeros_like(total)
    for group in tl.static_range(C // SIZE):
        one = tl.sum(tl.where((i == group * SIZE + AT)[:, None], total, 0.0), 0)
        found = tl.where((i // SIZE == group)[:, None], one[None, :], found)
    return found


@triton.jit
def level(total, before, SIZE: tl.constexpr, C: tl.constexpr):
    """Factors (C, KB) around borders in groups of SIZE, or around the middle of pieces: of q's rows, a's, columns."""
    edge = border(total, SIZE, SIZE // 2 - 1, C)
    if SIZE == PIECE:
        return tl.exp(total - edge), tl.exp(before - edge), tl.exp(edge - total)
    else:
        row, earlier = tl.exp(tl.minimum(total - edge, 0.0)), tl.exp(tl.minimum(before - edge, 0.0))
        return row, earlier, tl.exp(tl.minimum(edge - total, 0.0))


@triton.jit
def served(SIZE: tl.constexpr, C: tl.constexpr, TURNED: tl.constexpr):
    """(C, C): pairs of row and column (TURNED: column and row) that a level serves; later masks cut the future off."""
    i = tl.arange(0, C)
    group = i[:, None] // SIZE == i[None, :] // SIZE
    if SIZE == PIECE:
        return group
    right = i % SIZE >= SIZE // 2
    if TURNED:
        return group & (right[None, :] & (i % SIZE < SIZE // 2)[:, None])
    return group & (right[:, None] & (i % SIZE < SIZE // 2)[None, :])


@triton.jit
def onto(found, x, y, SIZE: tl.constexpr, C: tl.constexpr, TURNED: tl.constexpr):
    """``found`` with x yᵀ where the level serves; TURNED: x are columns, y rows."""
    return tl.where(served(SIZE, C, TURNED), tl.dot(x, tl.trans(y), input_precision="ieee"), found)


@triton.jit
def inverse(lower, C: tl.constexpr):
    """(I - lower)⁻¹ of a strictly lower matrix, row after row in float32."""
    i = tl.arange(0, C)
    found = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for r in range(1, C):
        coefficients = tl.sum(tl.where(i[:, None] == r, lower, 0.0), 0)  # row r
        added = tl.sum(coefficients[:, None] * found, 0)
        found = tl.where(i[:, None] == r, found + added[None, :], found)
    return found


@triton.jit(do_not_specialize=["T", "H", "N"])
def matrices(q, k, v, a, b, gate, starts, grad, inverses, turns, adds, carries, T, H, N,
             K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
             STARTS: tl.constexpr, ADJOINT: tl.constexpr):  # fmt: skip
    """One chunk's step of the state, ``S' = (carry + turn) S + add``, and (I - A)⁻¹.

    ADJOINT: add is that of the step back, (v k): what the output's gradient adds to the state's before the chunk.
    """
    _, h, row, t0, index = chunk_of_program(H, N, C)
    type = k.dtype.element_ty
    total, before, whole = sums(gate, row, h, t0, T, H, K, C, KB)
    mark, segment = segments(starts, row, t0, T, C, STARTS)
    last = tl.max(segment, 0)
    A = read(a, row, h, t0, T, H, K, C, KB)
    A = tl.where((mark == 0)[:, None], A, 0.0).to(type)
    B = read(b, row, h, t0, T, H, K, C, KB)
    KK = read(k, row, h, t0, T, H, K, C, KB)
    VV = read(v, row, h, t0, T, H, V, C, VB)
    i, dk, dv = tl.arange(0, C), tl.arange(0, KB), tl.arange(0, VB)
    place = inverses + index * (C * C) + i[:, None] * C + i[None, :]
    Q = read(q, row, h, t0, T, H, K, C, KB)
    lower = tl.zeros((C, C), dtype=tl.float32)
    scores = tl.zeros((C, C), dtype=tl.float32)
    for step in tl.static_range(6):
        if (PIECE << step) <= C:
            current, earlier, column = level(total, before, PIECE << step, C)
            rows = (Q * current if ADJOINT else A * earlier).to(type)
            erasing = (B * column).to(type)
            if ADJOINT:
                scores = onto(scores, rows, erasing, PIECE << step, C, False)
            else:
                lower = onto(lower, rows, erasing, PIECE << step, C, False)
                scores = onto(scores, rows, (KK * column).to(type), PIECE << step, C, False)
    if ADJOINT:
        solve = tl.load(place).to(type)
        scores = tl.where(near(segment, C, False, False), scores, 0.0).to(type)
    else:
        strict = near(segment, C, True, False)
        scores = tl.where(strict, scores, 0.0).to(type)
        solve = inverse(tl.where(strict, lower, 0.0), C).to(type)
        tl.store(place, solve)
    first = (segment == 0)[:, None]
    entering = tl.where(first, A * tl.exp(before), 0.0).to(type)
    reads = tl.dot(solve, entering, input_precision="ieee").to(type)
    leave = tl.where((segment == last)[:, None], tl.exp(whole[None, :] - total), 0.0)
    erase = (B * leave).to(type)
    turn = tl.dot(tl.trans(erase), reads, input_precision="ieee")
    tl.store(turns + index * (KB * KB) + dk[:, None] * KB + dk[None, :], turn.to(turns.dtype.element_ty))
    tl.store(carries + index * KB + dk, tl.where(last == 0, tl.exp(whole), 0.0))
    if ADJOINT:
        G = read(grad, row, h, t0, T, H, V, C, VB)
        through = tl.where(first, Q * tl.exp(total), 0.0)
        through = tl.dot(scores, reads, through, input_precision="ieee").to(type)
        add = tl.dot(tl.trans(G), through, input_precision="ieee")
        tl.store(adds + index * (KB * VB) + dv[:, None] * KB + dk[None, :], add.to(adds.dtype.element_ty))
    else:
        values = tl.dot(scores, VV, input_precision="ieee").to(type)
        inside = tl.dot(solve, values, input_precision="ieee").to(type)
        add = tl.dot(tl.trans((KK * leave).to(type)), VV, input_precision="ieee")
        add = tl.dot(tl.trans(erase), inside, add, input_precision="ieee")
        tl.store(adds + index * (KB * VB) + dk[:, None] * VB + dv[None, :], add.to(adds.dtype.element_ty))


@triton.jit(do_not_specialize=["N"])
def walk(turns, adds, carries, initial, states, final, N,
         K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, BV: tl.constexpr,
         INITIAL: tl.constexpr, ADJOINT: tl.constexpr, ST: tl.constexpr):  # fmt: skip
    """States before each chunk (b h n k v) and after the last; ADJOINT: gradients of states after each, from the right.

    ADJOINT holds the state as (v k), so that no sum is transposed; it is stored as (k v) all the same.
    """
    tiles: tl.constexpr = VB // BV
    iv = tl.program_id(0) % tiles * BV
    index = (tl.program_id(0) // tiles).to(tl.int64)  # a row's head
    dk, dv = tl.arange(0, KB), iv + tl.arange(0, BV)
    type = adds.dtype.element_ty
    if ADJOINT:
        S = tl.zeros((BV, KB), dtype=tl.float32)
        outer = dk[None, :] * V + dv[:, None]
        inside = (dk[None, :] < K) & (dv[:, None] < V)
        kept = dk[None, :] * VB + dv[:, None]
        added = dv[:, None] * KB + dk[None, :]
    else:
        S = tl.zeros((KB, BV), dtype=tl.float32)
        outer = dk[:, None] * V + dv[None, :]
        inside = (dk[:, None] < K) & (dv[None, :] < V)
        kept = dk[:, None] * VB + dv[None, :]
        added = dk[:, None] * VB + dv[None, :]
    if INITIAL:
        S += tl.load(initial + index * (K * V) + outer, mask=inside, other=0.0)
    square = dk[:, None] * KB + dk[None, :]
    for step in tl.range(0, N, num_stages=ST):
        n = N - 1 - step if ADJOINT else step
        one = index * N + n
        turn = tl.load(turns + one * (KB * KB) + square)
        add = tl.load(adds + one * (KB * VB) + added).to(tl.float32)
        carry = tl.load(carries + one * KB + dk)
        tl.store(states + one * (KB * VB) + kept, S.to(states.dtype.element_ty))
        if ADJOINT:
            S = S * carry[None, :] + tl.dot(S.to(type), turn, add, input_precision="ieee")
        else:
            S = S * carry[:, None] + tl.dot(turn, S.to(type), add, input_precision="ieee")
    tl.store(final + index * (K * V) + outer, S, mask=inside)


@triton.jit(do_not_specialize=["T", "H", "N"])
def outputs(q, k, v, a, b, gate, starts, inverses, states, o, T, H, N,
            K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
            STARTS: tl.constexpr):  # fmt: skip
    """The output of one chunk, from the state before it."""
    _, h, row, t0, index = chunk_of_program(H, N, C)
    type = k.dtype.element_ty
    total, before, _ = sums(gate, row, h, t0, T, H, K, C, KB)
    mark, segment = segments(starts, row, t0, T, C, STARTS)
    i, dk, dv = tl.arange(0, C), tl.arange(0, KB), tl.arange(0, VB)
    S = tl.load(states + index * (KB * VB) + dk[:, None] * VB + dv[None, :]).to(type)
    first = (segment == 0)[:, None]
    A = read(a, row, h, t0, T, H, K, C, KB)
    A = tl.where((mark == 0)[:, None], A, 0.0).to(type)
    KK = read(k, row, h, t0, T, H, K, C, KB)
    VV = read(v, row, h, t0, T, H, V, C, VB)
    Q = read(q, row, h, t0, T, H, K, C, KB)
    B = read(b, row, h, t0, T, H, K, C, KB)
    ak = tl.zeros((C, C), dtype=tl.float32)
    qb = tl.zeros((C, C), dtype=tl.float32)
    qk = tl.zeros((C, C), dtype=tl.float32)
    for step in tl.static_range(6):
        if (PIECE << step) <= C:
            current, earlier, column = level(total, before, PIECE << step, C)
            rows, erasing, writing = (Q * current).to(type), (B * column).to(type), (KK * column).to(type)
            qb = onto(qb, rows, erasing, PIECE << step, C, False)
            qk = onto(qk, rows, writing, PIECE << step, C, False)
            ak = onto(ak, (A * earlier).to(type), writing, PIECE << step, C, False)
    past = near(segment, C, False, False)
    ak = tl.where(near(segment, C, True, False), ak, 0.0).to(type)
    U = tl.dot(tl.where(first, A * tl.exp(before), 0.0).to(type), S, input_precision="ieee")
    U = tl.dot(ak, VV, U, input_precision="ieee").to(type)
    solve = tl.load(inverses + index * (C * C) + i[:, None] * C + i[None, :]).to(type)
    U = tl.dot(solve, U, input_precision="ieee").to(type)
    Y = tl.dot(tl.where(first, Q * tl.exp(total), 0.0).to(type), S, input_precision="ieee")
    Y = tl.dot(tl.where(past, qb, 0.0).to(type), U, Y, input_precision="ieee")
    Y = tl.dot(tl.where(past, qk, 0.0).to(type), VV, Y, input_precision="ieee")
    write(o, Y, row, h, t0, T, H, V, C, VB)
