"""rms_norm and gated_rms_norm in Triton: each tensor is read once and written once, forward and backward.

A program walks a run of rows, ROWS at a time, in one group of channels. The weight stays in registers, the next rows
are loaded before the present ones are used, and the program's share of the weight's gradient is summed outside, in a
fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlong.kernels.precision import as_written

#: Elements of a tile, unless one row is longer, and how many of them a thread holds, forward and backward.
TILE, FORWARD_SHARE, BACKWARD_SHARE = 2048, 16, 8
#: Most warps of a program.
MAX_WARPS = 16
#: Programs per multiprocessor; backward each also writes its share of the weight's gradient.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 32, 8

_LENGTHS = [
    "rows", "run", "inner", "x_outer", "x_inner", "gate_outer", "gate_inner", "grad_outer", "grad_inner"
]  # fmt: skip


@triton.jit
def _load(
    x, row, stop, inner, outer_stride, inner_stride, column,
    D: tl.constexpr, UNIT: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """(ROWS BLOCK) of x, whose row i · inner + j lies at i · outer_stride + j · inner_stride units."""
    if FLAT:
        at = row.to(tl.int64) * (inner_stride * UNIT)
    else:
        major = row // inner
        at = major.to(tl.int64) * (outer_stride * UNIT) + (row - major * inner).to(tl.int64) * (inner_stride * UNIT)
    return tl.load(x + at[:, None] + column[None, :], mask=(row < stop)[:, None] & (column < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=_LENGTHS)
def _forward(
    x, gate, weight, y, rows, run, inner, x_outer, x_inner, gate_outer,
    gate_inner, eps,
    D: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, X_UNIT: tl.constexpr,
    GATE_UNIT: tl.constexpr, GATED: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) % GROUPS
    first = tl.program_id(0) // GROUPS * run
    stop = tl.minimum(first + run, rows)
    column = tl.arange(0, BLOCK)
    x += group * D
    gate += group * D
    y += group * D
    w = tl.load(weight + group * D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    row = first + tl.arange(0, ROWS)
    x_next = _load(x, row, stop, inner, x_outer, x_inner, column, D, X_UNIT, FLAT)
    z_next = x_next
    if GATED:
        z_next = _load(gate, row, stop, inner, gate_outer, gate_inner, column, D, GATE_UNIT, FLAT)
    for _ in range(tl.cdiv(stop - first, ROWS)):
        value = x_next.to(tl.float32)
        if GATED:
            z = z_next.to(tl.float32)
            z_next = _load(gate, row + ROWS, stop, inner, gate_outer, gate_inner, column, D, GATE_UNIT, FLAT)
        x_next = _load(x, row + ROWS, stop, inner, x_outer, x_inner, column, D, X_UNIT, FLAT)
        if GATED:
            value *= z / (1 + tl.exp(-z))
        scale = tl.rsqrt(tl.sum(value * value, axis=1) / D + eps)
        out = value * scale[:, None] * w
        tl.store(
            y + row.to(tl.int64)[:, None] * (GROUPS * D) + column[None, :], out.to(y.dtype.element_ty),
            mask=(row < stop)[:, None] & (column < D)[None, :],
        )  # fmt: skip
        row += ROWS


@triton.jit(do_not_specialize=_LENGTHS)
def _backward(
    grad, x, gate, weight, dx, dgate, shares, rows, run, inner, grad_outer, grad_inner,
    x_outer, x_inner, gate_outer, gate_inner, eps,
    D: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GRAD_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr, GATE_UNIT: tl.constexpr, GATED: tl.constexpr, FLAT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) % GROUPS
    share = tl.program_id(0) // GROUPS
    first = share * run
    stop = tl.minimum(first + run, rows)
    column = tl.arange(0, BLOCK)
    grad += group * D
    x += group * D
    gate += group * D
    dx += group * D
    dgate += group * D
    w = tl.load(weight + group * D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    row = first + tl.arange(0, ROWS)
    # AHEAD: the next rows are loaded before these are used, at the price of registers.
    x_next = tl.zeros((ROWS, BLOCK), dtype=x.dtype.element_ty)
    g_next = tl.zeros((ROWS, BLOCK), dtype=grad.dtype.element_ty)
    z_next = tl.zeros((ROWS, BLOCK), dtype=gate.dtype.element_ty)
    if AHEAD:
        x_next = _load(x, row, stop, inner, x_outer, x_inner, column, D, X_UNIT, FLAT)
        g_next = _load(grad, row, stop, inner, grad_outer, grad_inner, column, D, GRAD_UNIT, FLAT)
        if GATED:
            z_next = _load(gate, row, stop, inner, gate_outer, gate_inner, column, D, GATE_UNIT, FLAT)
    for _ in range(tl.cdiv(stop - first, ROWS)):
        x_now, g_now, z_now = x_next, g_next, z_next
        soon = row + ROWS if AHEAD else row
        x_next = _load(x, soon, stop, inner, x_outer, x_inner, column, D, X_UNIT, FLAT)
        g_next = _load(grad, soon, stop, inner, grad_outer, grad_inner, column, D, GRAD_UNIT, FLAT)
        if GATED:
            z_next = _load(gate, soon, stop, inner, gate_outer, gate_inner, column, D, GATE_UNIT, FLAT)
        if not AHEAD:
            x_now, g_now, z_now = x_next, g_next, z_next
        value = x_now.to(tl.float32)
        g = g_now.to(tl.float32)
        gated = value
        if GATED:
            z = z_now.to(tl.float32)
            sigmoid = 1 / (1 + tl.exp(-z))
            gated = value * (z * sigmoid)
        weighed = g * w
        square = tl.sum(gated * gated, axis=1)
        along = tl.sum(gated * weighed, axis=1)
        scale = tl.rsqrt(square / D + eps)
        total += g * (gated * scale[:, None])
        inside = scale[:, None] * (weighed - gated * (scale * scale * (along / D))[:, None])
        to = row.to(tl.int64)[:, None] * (GROUPS * D) + column[None, :]
        mask = (row < stop)[:, None] & (column < D)[None, :]
        if GATED:
            slope = sigmoid * (1 + z * (1 - sigmoid))
            tl.store(dgate + to, (inside * value * slope).to(dgate.dtype.element_ty), mask=mask)
            inside *= z * sigmoid
        tl.store(dx + to, inside.to(dx.dtype.element_ty), mask=mask)
        row += ROWS
    tl.store(
        shares + share.to(tl.int64) * (GROUPS * D) + group * D + column, tl.sum(total, axis=0), mask=column < D
    )  # fmt: skip


def _layout(x: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions of x, those that lie as one joined into one."""
    joined: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if joined and joined[-1][1] == size * stride:
            joined[-1] = (joined[-1][0] * size, stride)
        else:
            joined.append((size, stride))
    return joined or [(1, 0)]


def _placed(*tensors: Tensor) -> tuple[list[Tensor], list[tuple[int, int, int]], int]:
    """Tensors of one shape as the kernels read them.

    Returns:
        The tensors, copied only where channels lie apart or rows follow no two strides; per tensor those two strides
        and their unit, a power of two that is known when a kernel is compiled; and the number of rows that the second
        stride spans, the same for all, 0 if one stride does for all.
    """
    tensors = tuple(x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors)
    inner, placed, strides = 0, [], []
    for x in tensors:
        dims = _layout(x)
        if len(dims) > 2 or (len(dims) == 2 and inner not in (0, dims[1][0])):
            x, dims = x.contiguous(), [(1, x.shape[-1])]
        if len(dims) == 2:
            inner = dims[1][0]
        placed.append(x)
        strides.append(dims)
    result = []
    for dims in strides:
        near = dims[-1][1]
        far = dims[0][1] if len(dims) == 2 else near * inner
        unit = 16
        while far % unit or near % unit:
            unit //= 2
        result.append((far // unit, near // unit, unit))
    return placed, result, inner


def _tile(width: int, share: int) -> dict[str, int]:
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, TILE // block)
    return {"BLOCK": block, "ROWS": rows, "num_warps": min(MAX_WARPS, max(1, rows * block // (32 * share)))}


def _ahead(tile: dict[str, int], gated: bool) -> bool:
    """Whether registers are left to load rows ahead in the backward pass (on sm_90 it would spill otherwise)."""
    held = tile["BLOCK"] * tile["ROWS"] // (32 * tile["num_warps"])
    return held <= (8 if gated else 16)


def _runs(x: Tensor, rows: int, groups: int, tile: int, per_processor: int) -> tuple[int, int]:
    """Rows of a run and the number of runs: a bounded number of programs, whatever the rows."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    wanted = max(1, min(-(-rows // tile), processors * per_processor // groups))
    run = -(-rows // (wanted * tile)) * tile
    return run, -(-rows // run)


@torch.library.custom_op(
    "seqlong::rms_norm_triton",
    mutates_args=(),
    schema="(Tensor x, Tensor? gate, Tensor weight, int groups, float eps) -> Tensor",
)
@as_written
def rms_norm_triton(x: Tensor, gate: Tensor | None, weight: Tensor, groups: int, eps: float) -> Tensor:
    """The norm of x, or of x ⊙ silu(gate), times the weight."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    (x, z), (at_x, at_z), inner = _placed(x, x if gate is None else gate)
    rows, width = x.numel() // x.shape[-1], x.shape[-1] // groups
    tile = _tile(width, FORWARD_SHARE)
    run, runs = _runs(x, rows, groups, tile["ROWS"], FORWARD_PROGRAMS)
    _forward[(runs * groups,)](
        x, z, weight.contiguous(), y, rows, run, inner, *at_x[:2], *at_z[:2], eps,
        D=width, GROUPS=groups, X_UNIT=at_x[2], GATE_UNIT=at_z[2], GATED=gate is not None, FLAT=inner == 0, **tile,
    )  # fmt: skip
    return y


@rms_norm_triton.register_fake
def _(x, gate, weight, groups, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "seqlong::rms_norm_triton_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor? gate, Tensor weight, int groups, float eps) -> (Tensor, Tensor, Tensor)",
)
@as_written
def _rms_norm_triton_backward(
    grad: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate (empty without one) and weight."""
    plain = torch.contiguous_format
    dx = torch.empty_like(x, memory_format=plain)
    dgate = x.new_empty(0) if gate is None else torch.empty_like(gate, memory_format=plain)
    if dx.numel() == 0:
        return dx, dgate, torch.zeros_like(weight, memory_format=plain)
    (grad, x, z), (at_grad, at_x, at_z), inner = _placed(grad, x, x if gate is None else gate)
    rows, width = x.numel() // x.shape[-1], x.shape[-1] // groups
    tile = _tile(width, BACKWARD_SHARE)
    run, runs = _runs(x, rows, groups, tile["ROWS"], BACKWARD_PROGRAMS)
    shares = x.new_empty(runs, x.shape[-1], dtype=torch.float32)
    _backward[(runs * groups,)](
        grad, x, z, weight.contiguous(), dx, dgate, shares, rows, run, inner, *at_grad[:2], *at_x[:2], *at_z[:2], eps,
        D=width, GROUPS=groups, GRAD_UNIT=at_grad[2], X_UNIT=at_x[2], GATE_UNIT=at_z[2], GATED=gate is not None,
        FLAT=inner == 0, AHEAD=_ahead(tile, gate is not None), **tile,
    )  # fmt: skip
    return dx, dgate, shares.sum(dim=0).to(weight.dtype)


@_rms_norm_triton_backward.register_fake
def _(grad, x, gate, weight, groups, eps):  # type: ignore[no-untyped-def]
    plain = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=plain),
        x.new_empty(0) if gate is None else torch.empty_like(gate, memory_format=plain),
        torch.empty_like(weight, memory_format=plain),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, gate, weight, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(x, gate, weight)


def _gradient(ctx, grad):  # type: ignore[no-untyped-def]
    x, gate, weight = ctx.saved_tensors
    dx, dgate, dweight = _rms_norm_triton_backward(grad, x, gate, weight, ctx.groups, ctx.eps)
    return dx, None if gate is None else dgate, dweight, None, None


rms_norm_triton.register_autograd(_gradient, setup_context=_setup_context)
