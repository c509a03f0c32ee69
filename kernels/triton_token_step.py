"""The next token, or few, of every recurrence along a row but Mamba2's, in one launch: decoding, drafts, streams.

    plain: S = D S + kᵀ v                        o = q S, or with a bonus q (S before + diag(u) kᵀ v)
    delta: S = D S; S = S + β kᵀ (v - k S)       o = q S
    dplr:  S = D S + bᵀ (a S) + kᵀ v             o = q S

A program owns one head of one row, or some of its value columns where rows and heads are few: columns do not mix. It
activates the gate, makes keys of length one, and goes through the tokens with the state in registers: nearly all
that is read and written is the state, and it passes once, however many tokens there are.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlong.kernels.triton_pieces import softplus

#: Forms of the recurrence.
PLAIN, DELTA, DPLR = 0, 1, 2
#: What the gate is before it is a log-decay.
NO_GATE, LOG_DECAY, LOG_SIGMOID, LOWER_BOUND, SOFTPLUS = range(5)
#: Elements of the state that a program holds, at most and at least; a warp holds SHARE of them.
MOST, LEAST, SHARE = 8192, 1024, 2048
#: Programs per multiprocessor below which heads are cut into value columns.
PROGRAMS = 2


@triton.jit
def _decay(gate, rate, bias, bound, scale, h, k, inside, K: tl.constexpr, KB: tl.constexpr, ACT: tl.constexpr,
           CHANNEL: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """The decay of each channel, and the key that the gate makes with a lower bound; ``gate`` is the token's own."""
    if CHANNEL:
        raw = tl.load(gate + k, mask=inside, other=0.0).to(tl.float32)
    else:
        raw = tl.load(gate).to(tl.float32) + tl.zeros((KB,), dtype=tl.float32)
    made = raw
    if ACT == 1:
        decay = tl.exp(raw)
    elif ACT == 2:
        decay = tl.exp(-softplus(-raw) * scale)
    elif ACT == 3:
        least = tl.load(bound + h * K + k, mask=inside, other=0.0).to(tl.float32)
        decay = least + (1 - least) * tl.sigmoid(raw)
        made = (1 - least) * tl.sigmoid(-raw)  # exact where the decay is near one
    else:
        if BIAS == 1:
            raw += tl.load(bias + h).to(tl.float32)
        elif BIAS == 2:
            raw += tl.load(bias + h * K + k, mask=inside, other=0.0).to(tl.float32)
        decay = tl.exp(tl.load(rate + h).to(tl.float32) * softplus(raw))
    return decay, made


@triton.jit
def _unit(x, EPS: tl.constexpr):
    return x * tl.rsqrt(tl.sum(x * x) + EPS)


@triton.jit(do_not_specialize=["N"])
def token_step(
    q, k, v, a, b, gate, beta, rate, bias, bound, bonus, starts, padding, state, y, after, N, scale,
    q_row, q_token, k_row, k_token, v_row, v_token, a_row, a_token, b_row, b_token, gate_row, gate_token,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr,
    FORM: tl.constexpr, ACT: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, BETA: tl.constexpr,
    NORM: tl.constexpr, BONUS: tl.constexpr, STARTS: tl.constexpr, PADDING: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """N tokens of one head of one row, BV of its value columns."""
    R: tl.constexpr = H // G
    columns: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    part = pid % columns
    h = (pid // columns) % H
    row = (pid // columns // H).to(tl.int64)
    g = h // R
    i = tl.arange(0, KB)
    j = part * BV + tl.arange(0, BV)
    inside, there = i < K, j < V
    tile = i[:, None] * V + j[None, :]
    whole = inside[:, None] & there[None, :]
    S = tl.load(state + (row * H + h) * (K * V) + tile, mask=whole, other=0.0).to(tl.float32)

    for n in range(N):
        token = row * N + n
        Q = tl.load(q + row * q_row + n * q_token + g * K + i, mask=inside, other=0.0).to(tl.float32)
        X = tl.load(v + row * v_row + n * v_token + h * V + j, mask=there, other=0.0).to(tl.float32)
        if ACT == 3:
            Y = Q
        else:
            Y = tl.load(k + row * k_row + n * k_token + g * K + i, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            Q, Y = _unit(Q, EPS), _unit(Y, EPS)
        before = S
        if STARTS:
            before = tl.where(tl.load(starts + token) != 0, 0.0, S)
        decayed = before
        if ACT != 0:
            at = gate + row * gate_row + n * gate_token + h * (K if CHANNEL else 1)
            D, made = _decay(at, rate, bias, bound, scale, h, i, inside, K, KB, ACT, CHANNEL, BIAS)
            decayed = before * D[:, None]
            if ACT == 3:
                Y = tl.where(inside, made, 0.0)
        if FORM == 1:
            weight = tl.load(beta + token * H + h).to(tl.float32)
            if BETA > 0:
                weight = tl.sigmoid(weight) * BETA
            missing = X - tl.sum(Y[:, None] * decayed, axis=0)
            new = decayed + Y[:, None] * (weight * missing)[None, :]
        else:
            new = decayed + Y[:, None] * X[None, :]
        if FORM == 2:
            A = tl.load(a + row * a_row + n * a_token + h * K + i, mask=inside, other=0.0).to(tl.float32)
            B = tl.load(b + row * b_row + n * b_token + h * K + i, mask=inside, other=0.0).to(tl.float32)
            new += B[:, None] * tl.sum(A[:, None] * before, axis=0)[None, :]
        if BONUS:
            U = tl.load(bonus + h * K + i, mask=inside, other=0.0).to(tl.float32)
            out = tl.sum(Q[:, None] * before, axis=0) + tl.sum(Q * U * Y) * X
        else:
            out = tl.sum(Q[:, None] * new, axis=0)
        tl.store(y + (token * H + h) * V + j, out.to(y.dtype.element_ty), mask=there)
        if PADDING:
            S = tl.where(tl.load(padding + token) != 0, S, new)  # whatever stands there, NaN as well
        else:
            S = new
    tl.store(after + (row * H + h) * (K * V) + tile, S, mask=whole)


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def value_columns(rows: int, heads: int, key_tile: int, value_width: int, device: torch.device) -> int:
    """Value columns of a program: all, unless too few programs or too large a tile would come of it."""
    columns: int = triton.next_power_of_2(value_width)
    few = PROGRAMS * _processors(device)
    while columns > 1 and key_tile * columns > LEAST:
        if key_tile * columns <= MOST and rows * heads * triton.cdiv(value_width, columns) >= few:
            break
        columns //= 2
    return columns


def warps(key_tile: int, columns: int) -> int:
    """For a tile of the state."""
    return min(8, max(1, key_tile * columns // SHARE))


def _flat(x: Tensor, per_head: int) -> Tensor:
    """x (b n h d), or (b n h), with heads side by side: what a projection of them is, wherever its rows lie."""
    side_by_side = x.stride(-1) == 1 and (x.dim() == 3 or x.shape[2] == 1 or x.stride(2) == per_head)
    return x if side_by_side else x.contiguous()


def run(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    state: Tensor,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    gate: Tensor | None = None,
    beta: Tensor | None = None,
    rate: Tensor | None = None,
    bias: Tensor | None = None,
    bound: Tensor | None = None,
    bonus: Tensor | None = None,
    starts: Tensor | None = None,
    padding: Tensor | None = None,
    form: int = PLAIN,
    activation: int = LOG_DECAY,
    divisor: float = 1.0,
    weight: int = 0,
    normalize: bool = False,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``launch``, through the op where somebody traces: a step is short, the op's own time in Python would be seen."""
    call = token_step_triton if torch.compiler.is_compiling() else launch
    return call(q, k, v, a, b, gate, beta, rate, bias, bound, bonus, starts, padding, state, form, activation, divisor,
                weight, normalize, eps)  # fmt: skip


def launch(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    gate: Tensor | None,
    beta: Tensor | None,
    rate: Tensor | None,
    bias: Tensor | None,
    bound: Tensor | None,
    bonus: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
    state: Tensor,
    form: int,
    activation: int,
    divisor: float,
    weight: int,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Output and state after, of tokens (b n ...). Plain tensors only: the op below is for whoever traces.

    Args:
        q, k: (b n g k); k is None with a lower bound.
        v: (b n h v).
        a, b: (b n h k), of dplr.
        gate: (b n h) or (b n h k).
        beta: (b n h), of the delta rule.
        rate, bias: (h) and (h) or (h k), of softplus.
        bound, bonus: (h k).
        starts, padding: (b n).
        state: (b h k v).
        form: of the recurrence.
        activation: of the gate; divisor: of logsigmoid.
        weight: 0 for beta as it is, else what its sigmoid is multiplied by.
        normalize: make queries and keys of length one; eps: added to the square of it.
    """
    (rows, tokens, groups, width), (heads, value_width) = q.shape, v.shape[2:]
    y = v.new_empty(rows, tokens, heads, value_width)
    after = state.new_empty(state.shape, dtype=torch.float32)
    if not after.numel():
        return y, after
    given = [_flat(x, x.shape[3] if x.dim() == 4 else 1) if x is not None else q for x in (q, k, v, a, b, gate)]
    key_tile = triton.next_power_of_2(width)
    columns = value_columns(rows, heads, key_tile, value_width, v.device)

    def plain(x: Tensor | None) -> Tensor:
        return q if x is None else x.contiguous()

    def flags(x: Tensor | None) -> Tensor:
        return q if x is None else x.contiguous().view(torch.uint8)

    token_step[(rows * heads * triton.cdiv(value_width, columns),)](
        *given, *(plain(x) for x in (beta, rate, bias, bound, bonus)), flags(starts), flags(padding),
        state.contiguous(), y, after, tokens, 1.0 / divisor, *(x.stride(axis) for x in given for axis in (0, 1)),
        H=heads, G=groups, K=width, V=value_width, KB=key_tile, BV=columns, FORM=form, ACT=activation,
        CHANNEL=gate is not None and gate.dim() == 4, BIAS=0 if bias is None else bias.dim(), BETA=weight,
        NORM=normalize, BONUS=bonus is not None, STARTS=starts is not None, PADDING=padding is not None, EPS=eps,
        num_warps=warps(key_tile, columns),
    )  # fmt: skip
    return y, after


token_step_triton = torch.library.custom_op(
    "seqlong::token_step_triton",
    launch,
    mutates_args=(),
    schema="(Tensor q, Tensor? k, Tensor v, Tensor? a, Tensor? b, Tensor? gate, Tensor? beta, Tensor? rate, "
    "Tensor? bias, Tensor? bound, Tensor? bonus, Tensor? starts, Tensor? padding, Tensor state, int form, "
    "int activation, float divisor, int weight, bool normalize, float eps) -> (Tensor, Tensor)",
)


@token_step_triton.register_fake
def _(q, k, v, a, b, gate, beta, rate, bias, bound, bonus, starts, padding, state, form, activation, divisor, weight,
      normalize, eps):  # type: ignore[no-untyped-def]  # fmt: skip
    return v.new_empty(v.shape), state.new_empty(state.shape, dtype=torch.float32)
