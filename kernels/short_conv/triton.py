"""short_conv in Triton: one pass over the row forward, one backward, one launch for a single token.

A program owns BLOCK channels and walks a run of tokens from left to right. The last taps - 1 inputs stay in registers,
so that every input is read once; STEP tokens are loaded together, and those of the next step before the present ones
are used, which keeps enough bytes in flight. The backward walk also holds the gradients of the last taps - 1 inputs,
which later tokens still add to, and the program's share of the gradients of the weights: those are summed outside, in
a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlong.kernels.precision import as_written

#: Tokens loaded at a time; the kernels are written out for this many.
STEP = 4
#: Channels of a program of one warp, forward and backward: 16 and 8 bytes a load of 16-bit values.
FORWARD_BLOCK, BACKWARD_BLOCK = 256, 128
#: Programs per multiprocessor: some waves forward, where only a few inputs are read twice; about one backward, where
#: each program also writes its share of the weights' gradient.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 64, 42
#: Shortest run of tokens that is worth a program.
MIN_RUN = 16

_LENGTHS = ["length", "run", "runs", "x_row", "x_token", "grad_row", "grad_token"]


@triton.jit
def _load(x, token, low, high, stride, channel, inside):
    return tl.load(x + token.to(tl.int64) * stride + channel, mask=inside & (token >= low) & (token < high), other=0.0)


@triton.jit
def _load_step(x, token, high, stride, channel, inside):
    a = _load(x, token, 0, high, stride, channel, inside)
    b = _load(x, token + 1, 0, high, stride, channel, inside)
    c = _load(x, token + 2, 0, high, stride, channel, inside)
    d = _load(x, token + 3, 0, high, stride, channel, inside)
    return a, b, c, d


@triton.jit
def _begins(starts, token, high, STARTS: tl.constexpr):
    if STARTS:
        return tl.load(starts + token, mask=(token >= 0) & (token < high), other=0) != 0
    else:
        return False


@triton.jit
def _load_flags(starts, token, high, STARTS: tl.constexpr):
    """Bit i of the result: a segment starts at token + i."""
    flags = token * 0
    if STARTS:
        for i in tl.static_range(4):
            flags |= tl.load(starts + token + i, mask=token + i < high, other=0).to(tl.int32) << i
    return flags


@triton.jit
def _bit(flags, i: tl.constexpr, STARTS: tl.constexpr):
    if STARTS:
        return ((flags >> i) & 1) != 0
    else:
        return False


@triton.jit
def _tap(weight, channel, inside, j: tl.constexpr, W: tl.constexpr):
    """The weight of the input j tokens before, zero past the filter."""
    if j < W:
        return tl.load(weight + channel * W + (W - 1 - j), mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.zeros_like(channel).to(tl.float32)


@triton.jit
def _forget(begins, h1, h2, h3, STARTS: tl.constexpr, W: tl.constexpr):
    """The inputs before a token, none where a segment starts."""
    if STARTS:
        if W > 1:
            h1 = tl.where(begins, 0.0, h1)
        if W > 2:
            h2 = tl.where(begins, 0.0, h2)
        if W > 3:
            h3 = tl.where(begins, 0.0, h3)
    return h1, h2, h3


@triton.jit
def _weigh(now, h1, h2, h3, w0, w1, w2, w3, b, W: tl.constexpr):
    total = b + w0 * now
    if W > 1:
        total += w1 * h1
    if W > 2:
        total += w2 * h2
    if W > 3:
        total += w3 * h3
    return total


@triton.jit
def _memory(
    x, starts, state, first, length, x_token, channel, inside,
    D: tl.constexpr, W: tl.constexpr, STARTS: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """The W - 1 inputs before token ``first``, the nearest first, and the distance to the last start, W if far."""
    h1 = tl.zeros_like(channel).to(tl.float32)
    h2, h3 = h1, h1
    since = first * 0 + W
    for i in tl.static_range(W - 1):
        token = first - (W - 1) + i
        now = _load(x, token, 0, length, x_token, channel, inside).to(tl.float32)
        if STATE:
            before = tl.load(state + (token + W - 1) * D + channel, mask=inside & (token < 0), other=0.0)
            now += before.to(tl.float32)
        begins = _begins(starts, token, length, STARTS)
        h1, h2, h3 = _forget(begins, h1, h2, h3, STARTS, W)
        if STARTS:
            since = tl.where(begins, 0, since + 1)
        h3 = h2
        h2 = h1
        h1 = now
    return h1, h2, h3, since


@triton.jit
def _forward_token(
    now, begins, h1, h2, h3, w0, w1, w2, w3, b, y, token, stop, channel, inside,
    D: tl.constexpr, W: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    now = now.to(tl.float32)
    h1, h2, h3 = _forget(begins, h1, h2, h3, STARTS, W)
    total = _weigh(now, h1, h2, h3, w0, w1, w2, w3, b, W)
    out = total / (1 + tl.exp(-total))
    tl.store(y + token.to(tl.int64) * D + channel, out.to(y.dtype.element_ty), mask=inside & (token < stop))
    return now, h1, h2


@triton.jit(do_not_specialize=_LENGTHS)
def _forward(
    x, weight, bias, starts, state, y, length, run, runs, x_row, x_token,
    D: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr, BIAS: tl.constexpr, STARTS: tl.constexpr,
    STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (D + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    channel = (pid % columns) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    first = (pid // columns) % runs * run
    row = (pid // columns // runs).to(tl.int64)
    stop = tl.minimum(first + run, length)
    x += row * (x_row * ALIGN)
    x_token = x_token * ALIGN
    y += row * length * D
    starts += row * length
    state += row * ((W - 1) * D)

    w0, w1 = _tap(weight, channel, inside, 0, W), _tap(weight, channel, inside, 1, W)
    w2, w3 = _tap(weight, channel, inside, 2, W), _tap(weight, channel, inside, 3, W)
    b = tl.zeros_like(w0)
    if BIAS:
        b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    x0, x1, x2, x3 = _load_step(x, first, stop, x_token, channel, inside)
    flags = _load_flags(starts, first, stop, STARTS)
    h1, h2, h3, _ = _memory(x, starts, state, first, length, x_token, channel, inside, D, W, STARTS, STATE)
    for i in range(tl.cdiv(stop - first, 4)):
        t = first + i * 4
        n0, n1, n2, n3 = _load_step(x, t + 4, stop, x_token, channel, inside)
        flags_next = _load_flags(starts, t + 4, stop, STARTS)
        h1, h2, h3 = _forward_token(
            x0, _bit(flags, 0, STARTS), h1, h2, h3, w0, w1, w2, w3, b, y, t, stop, channel, inside, D, W, STARTS
        )  # fmt: skip
        h1, h2, h3 = _forward_token(
            x1, _bit(flags, 1, STARTS), h1, h2, h3, w0, w1, w2, w3, b, y, t + 1, stop, channel, inside, D, W, STARTS
        )  # fmt: skip
        h1, h2, h3 = _forward_token(
            x2, _bit(flags, 2, STARTS), h1, h2, h3, w0, w1, w2, w3, b, y, t + 2, stop, channel, inside, D, W, STARTS
        )  # fmt: skip
        h1, h2, h3 = _forward_token(
            x3, _bit(flags, 3, STARTS), h1, h2, h3, w0, w1, w2, w3, b, y, t + 3, stop, channel, inside, D, W, STARTS
        )  # fmt: skip
        x0, x1, x2, x3 = n0, n1, n2, n3
        flags = flags_next


@triton.jit
def _backward_token(
    now, grad, begins, h1, h2, h3, a1, a2, a3, v0, v1, v2, v3, vb, since, w0, w1, w2, w3, b,
    dx, dstate, token, first, stop, channel, inside,
    D: tl.constexpr, W: tl.constexpr, STARTS: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """One token: a1..a3 are the gradients so far of the inputs 1..3 tokens before, v0..v3 and vb those of weights."""
    now = now.to(tl.float32)
    h1, h2, h3 = _forget(begins, h1, h2, h3, STARTS, W)
    total = _weigh(now, h1, h2, h3, w0, w1, w2, w3, b, W)
    gate = 1 / (1 + tl.exp(-total))
    inner = grad.to(tl.float32) * (gate * (1 + total * (1 - gate)))
    own = tl.where(token < stop, inner, 0.0)  # tokens past the run are counted by the next program
    vb += own
    v0 += own * now
    a0 = inner * w0
    if STARTS:
        since = tl.where(begins, 0, since + 1)
    if W > 1:
        v1 += own * h1
        a1 += w1 * (tl.where(since >= 1, inner, 0.0) if STARTS else inner)
    if W > 2:
        v2 += own * h2
        a2 += w2 * (tl.where(since >= 2, inner, 0.0) if STARTS else inner)
    if W > 3:
        v3 += own * h3
        a3 += w3 * (tl.where(since >= 3, inner, 0.0) if STARTS else inner)
    done = a0 if W == 1 else (a1 if W == 2 else (a2 if W == 3 else a3))
    at = token - (W - 1)
    tl.store(
        dx + at.to(tl.int64) * D + channel, done.to(dx.dtype.element_ty), mask=inside & (at >= first) & (at < stop)
    )
    if STATE:  # noqa: SIM102, known as the kernel is compiled
        if at < 0:
            tl.store(dstate + (at + W - 1) * D + channel, done.to(dstate.dtype.element_ty), mask=inside)
    return now, h1, h2, a0, a1, a2, v0, v1, v2, v3, vb, since


@triton.jit(do_not_specialize=_LENGTHS)
def _backward(
    grad, x, weight, bias, starts, state, dx, dstate, shares, length, run, runs,
    grad_row, grad_token, x_row, x_token,
    D: tl.constexpr, W: tl.constexpr, GRAD_ALIGN: tl.constexpr, ALIGN: tl.constexpr, BIAS: tl.constexpr,
    STARTS: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (D + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    channel = (pid % columns) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    first = (pid // columns) % runs * run
    row = (pid // columns // runs).to(tl.int64)
    stop = tl.minimum(first + run, length)
    high = tl.minimum(stop + (W - 1), length)
    x += row * (x_row * ALIGN)
    x_token = x_token * ALIGN
    grad += row * (grad_row * GRAD_ALIGN)
    grad_token = grad_token * GRAD_ALIGN
    dx += row * length * D
    starts += row * length
    state += row * ((W - 1) * D)
    dstate += row * ((W - 1) * D)
    shares += (pid // columns).to(tl.int64) * ((W + 1) * D) + channel

    w0, w1 = _tap(weight, channel, inside, 0, W), _tap(weight, channel, inside, 1, W)
    w2, w3 = _tap(weight, channel, inside, 2, W), _tap(weight, channel, inside, 3, W)
    zero = tl.zeros_like(w0)
    b = zero
    if BIAS:
        b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    x0, x1, x2, x3 = _load_step(x, first, high, x_token, channel, inside)
    g0, g1, g2, g3 = _load_step(grad, first, high, grad_token, channel, inside)
    flags = _load_flags(starts, first, high, STARTS)
    h1, h2, h3, since = _memory(x, starts, state, first, length, x_token, channel, inside, D, W, STARTS, STATE)
    a1, a2, a3 = zero, zero, zero
    v0, v1, v2, v3, vb = zero, zero, zero, zero, zero
    for i in range(tl.cdiv(stop - first + (W - 1), 4)):
        t = first + i * 4
        n0, n1, n2, n3 = _load_step(x, t + 4, high, x_token, channel, inside)
        m0, m1, m2, m3 = _load_step(grad, t + 4, high, grad_token, channel, inside)
        flags_next = _load_flags(starts, t + 4, high, STARTS)
        h1, h2, h3, a1, a2, a3, v0, v1, v2, v3, vb, since = _backward_token(
            x0, g0, _bit(flags, 0, STARTS), h1, h2, h3, a1, a2, a3, v0, v1, v2, v3, vb, since, w0, w1, w2, w3, b,
            dx, dstate, t, first, stop, channel, inside, D, W, STARTS, STATE,
        )  # fmt: skip
        h1, h2, h3, a1, a2, a3, v0, v1, v2, v3, vb, since = _backward_token(
            x1, g1, _bit(flags, 1, STARTS), h1, h2, h3, a1, a2, a3, v0, v1, v2, v3, vb, since, w0, w1, w2, w3, b,
            dx, dstate, t + 1, first, stop, channel, inside, D, W, STARTS, STATE,
        )  # fmt: skip
        h1, h2, h3, a1, a2, a3, v0, v1, v2, v3, vb, since = _backward_token(
            x2, g2, _bit(flags, 2, STARTS), h1, h2, h3, a1, a2, a3, v0, v1, v2, v3, vb, since, w0, w1, w2, w3, b,
            dx, dstate, t + 2, first, stop, channel, inside, D, W, STARTS, STATE,
        )  # fmt: skip
        h1, h2, h3, a1, a2, a3, v0, v1, v2, v3, vb, since = _backward_token(
            x3, g3, _bit(flags, 3, STARTS), h1, h2, h3, a1, a2, a3, v0, v1, v2, v3, vb, since, w0, w1, w2, w3, b,
            dx, dstate, t + 3, first, stop, channel, inside, D, W, STARTS, STATE,
        )  # fmt: skip
        x0, x1, x2, x3 = n0, n1, n2, n3
        flags = flags_next
        g0, g1, g2, g3 = m0, m1, m2, m3
    tl.store(shares + (W - 1) * D, v0, mask=inside)
    if W > 1:
        tl.store(shares + (W - 2) * D, v1, mask=inside)
    if W > 2:
        tl.store(shares + (W - 3) * D, v2, mask=inside)
    if W > 3:
        tl.store(shares + (W - 4) * D, v3, mask=inside)
    tl.store(shares + W * D, vb, mask=inside)


@triton.jit
def _one_token(
    x, weight, bias, starts, state, y, after, x_row,
    D: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, STARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (D + BLOCK - 1) // BLOCK
    channel = (tl.program_id(0) % columns) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    row = (tl.program_id(0) // columns).to(tl.int64)
    now = tl.load(x + row * x_row + channel, mask=inside, other=0.0).to(tl.float32)
    total = _tap(weight, channel, inside, 0, W) * now
    if BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    state += row * ((W - 1) * D) + channel
    after += row * ((W - 1) * D) + channel
    for i in tl.static_range(W - 1):
        before = tl.load(state + i * D, mask=inside, other=0.0).to(tl.float32)
        if STARTS:
            before = tl.where(tl.load(starts + row) != 0, 0.0, before)
        total += _tap(weight, channel, inside, W - 1 - i, W) * before
        if i > 0:
            tl.store(after + (i - 1) * D, before.to(after.dtype.element_ty), mask=inside)
    if W > 1:
        tl.store(after + (W - 2) * D, now.to(after.dtype.element_ty), mask=inside)
    out = total / (1 + tl.exp(-total))
    tl.store(y + row * D + channel, out.to(y.dtype.element_ty), mask=inside)


def _readable(x: Tensor) -> Tensor:
    """x (b t d) with channels side by side: itself, unless they are not."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of rows and tokens in units of the power of two that divides both, and that unit, at most 16.

    The unit is known as a kernel is compiled, so that it loads many channels at once without knowing the strides.
    """
    row, token = (0 if x.shape[0] == 1 else x.stride(0)), x.stride(1)
    unit = 16
    while row % unit or token % unit:
        unit //= 2
    return row // unit, token // unit, unit


def _runs(x: Tensor, block: int, per_processor: int) -> tuple[int, int, int]:
    """Tokens of a run, runs of a row, and programs in all: a bounded number of programs, whatever the length."""
    rows, length, width = x.shape
    columns = -(-width // block)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    wanted = max(1, min(-(-length // MIN_RUN), processors * per_processor // (rows * columns)))
    run = -(-length // (wanted * STEP)) * STEP
    runs = -(-length // run)
    return run, runs, rows * runs * columns


def _block(width: int, most: int) -> int:
    return min(most, max(32, triton.next_power_of_2(width)))


def _bytes(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.contiguous().view(torch.uint8)


@torch.library.custom_op(
    "seqlong::short_conv_triton",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? starts, Tensor? state) -> Tensor",
)
@as_written
def short_conv_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, state: Tensor | None
) -> Tensor:
    """short_conv's outputs (b t d)."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    x, flags = _readable(x), _bytes(starts)
    block = _block(x.shape[2], FORWARD_BLOCK)
    run, runs, programs = _runs(x, block, FORWARD_PROGRAMS)
    row, token, unit = _strides(x)
    _forward[(programs,)](
        x, weight.contiguous(), x if bias is None else bias, x if flags is None else flags,
        x if state is None else state.contiguous(), y, x.shape[1], run, runs, row, token,
        D=x.shape[2], W=weight.shape[1], ALIGN=unit, BIAS=bias is not None, STARTS=flags is not None,
        STATE=state is not None, BLOCK=block, num_warps=1,
    )  # fmt: skip
    return y


@short_conv_triton.register_fake
def _(x, weight, bias, starts, state):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "seqlong::short_conv_triton_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? starts, Tensor? state) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def _short_conv_triton_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias (zeros without one) and state (empty without one)."""
    plain = torch.contiguous_format
    dx = torch.empty_like(x, memory_format=plain)
    dstate = x.new_empty(0) if state is None else torch.empty_like(state, memory_format=plain)
    if dx.numel() == 0:
        return dx, torch.zeros_like(weight, memory_format=plain), weight.new_zeros(len(weight)), dstate.zero_()
    x, grad, flags = _readable(x), _readable(grad), _bytes(starts)
    width, taps = weight.shape
    block = _block(width, BACKWARD_BLOCK)
    run, runs, programs = _runs(x, block, BACKWARD_PROGRAMS)
    row, token, unit = _strides(x)
    grad_row, grad_token, grad_unit = _strides(grad)
    shares = x.new_empty(x.shape[0] * runs, taps + 1, width, dtype=torch.float32)
    _backward[(programs,)](
        grad, x, weight.contiguous(), x if bias is None else bias, x if flags is None else flags,
        x if state is None else state.contiguous(), dx, dstate, shares, x.shape[1], run, runs,
        grad_row, grad_token, row, token,
        D=width, W=taps, GRAD_ALIGN=grad_unit, ALIGN=unit, BIAS=bias is not None, STARTS=flags is not None,
        STATE=state is not None, BLOCK=block, num_warps=1,
    )  # fmt: skip
    total = shares.sum(dim=0).to(weight.dtype)
    return dx, total[:taps].t().contiguous(), total[taps].clone(), dstate


@_short_conv_triton_backward.register_fake
def _(grad, x, weight, bias, starts, state):  # type: ignore[no-untyped-def]
    plain = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=plain),
        torch.empty_like(weight, memory_format=plain),
        weight.new_empty(weight.shape[0]),
        x.new_empty(0) if state is None else torch.empty_like(state, memory_format=plain),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, bias, starts, state = ctx.saved_tensors
    dx, dw, db, ds = _short_conv_triton_backward(grad, x, weight, bias, starts, state)
    return dx, dw, None if bias is None else db, None, None if state is None else ds


short_conv_triton.register_autograd(_gradient, setup_context=_setup_context)


@torch.library.custom_op(
    "seqlong::short_conv_step",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? starts, Tensor state) -> (Tensor, Tensor)",
)
@as_written
def short_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Output (b 1 d) of one token a row and the state (b w-1 d) after it, in one launch; no gradient."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    after = torch.empty(state.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y, after
    x, flags, width = _readable(x), _bytes(starts), x.shape[2]
    block = _block(width, FORWARD_BLOCK)
    _one_token[(x.shape[0] * triton.cdiv(width, block),)](
        x, weight.contiguous(), x if bias is None else bias, x if flags is None else flags, state.contiguous(), y,
        after, x.stride(0), D=width, W=weight.shape[1], BIAS=bias is not None, STARTS=flags is not None, BLOCK=block,
        num_warps=1,
    )  # fmt: skip
    return y, after


@short_conv_step.register_fake
def _(x, weight, bias, starts, state):  # type: ignore[no-untyped-def]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty(state.shape, dtype=x.dtype, device=x.device),
    )
