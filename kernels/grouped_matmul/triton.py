"""grouped_matmul in Triton: rows are gathered as they are read and scattered as they are written.

A program finds its group itself, from the ends of all groups, so that the CPU never has to know them: the grid has as
many programs as any distribution of the rows could need, and those left over return at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _locate(ends, tile, rows, GROUPS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Group, first row and end of a tile of rows. The rows of no group are one more group, the last."""
    at = tl.arange(0, PADDED)
    # Loads of what is masked read nothing: group GROUPS ends with the last row, those beyond are empty.
    stop = tl.load(ends + at, mask=at < GROUPS, other=0).to(tl.int32)
    start = tl.load(ends + at - 1, mask=(at > 0) & (at <= GROUPS), other=0).to(tl.int32)
    stop = tl.where(at < GROUPS, stop, rows)
    start = tl.where(at > GROUPS, rows, start)
    tiles = tl.cdiv(stop - start, ROWS)
    before = tl.cumsum(tiles, axis=0)
    group = tl.sum((before <= tile).to(tl.int32), axis=0)
    mine = at == group
    first = tl.sum(tl.where(mine, start + (tile - before + tiles) * ROWS, 0), axis=0)
    end = tl.sum(tl.where(mine, stop, 0), axis=0)
    return group, first, end


@triton.jit(do_not_specialize=["rows"])
def _rows_kernel(
    x, weight, y, ends, gather, scatter, rows, copies,
    x_row, w_group, w_inner, w_column,
    K: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr,
    GATHER: tl.constexpr, SCATTER: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    across = tl.cdiv(N, COLUMNS)
    group, first, end = _locate(ends, program // across, rows, GROUPS, PADDED, ROWS)
    if group > GROUPS:
        return
    row = first + tl.arange(0, ROWS)
    column = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < end
    target = row.to(tl.int64)
    if SCATTER:
        target = tl.load(scatter + row, mask=inside, other=0).to(tl.int64)
    source = row.to(tl.int64)
    if GATHER:
        source = tl.load(gather + row, mask=inside, other=0).to(tl.int64) // copies
    inner = tl.arange(0, INNER)
    left = x + source[:, None] * x_row + inner[None, :]
    right = weight + group.to(tl.int64) * w_group + (inner[:, None] * w_inner + column[None, :] * w_column)
    wanted = (column < N)[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    steps = tl.where(group < GROUPS, tl.cdiv(K, INNER), 0)  # rows of no group are zero
    for step in range(0, steps):
        kept = inner < K - step * INNER
        a = tl.load(left, mask=inside[:, None] & kept[None, :], other=0.0)
        b = tl.load(right, mask=kept[:, None] & wanted, other=0.0)
        if IEEE:
            total = tl.dot(a, b, total, input_precision="ieee")
        else:
            total = tl.dot(a, b, total)
        left += INNER
        right += INNER * w_inner
    to = y + target[:, None] * N + column[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=inside[:, None] & (column < N)[None, :])


@triton.jit
def _outer_kernel(
    x, grad, y, ends, gather, scatter, copies,
    x_row, grad_row,
    K: tl.constexpr, N: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    # ROWS here is a tile of k, COLUMNS of n, and INNER the rows that are summed over.
    program = tl.program_id(0)
    down, across = tl.cdiv(K, ROWS), tl.cdiv(N, COLUMNS)
    group = program // (down * across)
    place = program % (down * across)
    k = (place // across) * ROWS + tl.arange(0, ROWS)
    n = (place % across) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(ends + group - 1, mask=group > 0, other=0).to(tl.int32)
    end = tl.load(ends + group).to(tl.int32)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(0, tl.cdiv(end - start, INNER)):
        row = start + step * INNER + tl.arange(0, INNER)
        inside = row < end
        source, target = row.to(tl.int64), row.to(tl.int64)
        if GATHER:
            source = tl.load(gather + row, mask=inside, other=0).to(tl.int64) // copies
        if SCATTER:
            target = tl.load(scatter + row, mask=inside, other=0).to(tl.int64)
        a = tl.load(x + source[:, None] * x_row + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(
            grad + target[:, None] * grad_row + n[None, :], mask=inside[:, None] & (n < N)[None, :], other=0.0
        )  # fmt: skip
        if IEEE:
            total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
        else:
            total = tl.dot(tl.trans(a), b, total)
    to = y + group.to(tl.int64) * (K * N) + k.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=(k < K)[:, None] & (n < N)[None, :])


def rows_triton(
    x: Tensor, weight: Tensor, ends: Tensor, gather: Tensor | None, scatter: Tensor | None, copies: int,
    rows: int, inner: int, columns: int, warps: int, stages: int,
) -> Tensor:  # fmt: skip
    """See ``op.py``; the last five are the configuration."""
    count = x.shape[0] if gather is None else gather.shape[0]
    groups, width = weight.shape[0], weight.shape[2]
    y = torch.empty(count, width, dtype=x.dtype, device=x.device)
    # Every group, and the rows of none, may end with a tile that is not full.
    programs = (triton.cdiv(count, rows) + groups + 1) * triton.cdiv(width, columns)
    _rows_kernel[(programs,)](
        x, weight, y, ends, gather, scatter, count, copies,
        x.stride(0), weight.stride(0), weight.stride(1), weight.stride(2),
        K=x.shape[1], N=width, GROUPS=groups, PADDED=triton.next_power_of_2(groups + 1),
        GATHER=gather is not None, SCATTER=scatter is not None,
        ROWS=rows, INNER=_inner(x, inner), COLUMNS=columns, IEEE=_exact(x), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def outer_triton(
    x: Tensor, grad: Tensor, ends: Tensor, gather: Tensor | None, scatter: Tensor | None, copies: int,
    rows: int, inner: int, columns: int, warps: int, stages: int,
) -> Tensor:  # fmt: skip
    """See ``op.py``; the last five are the configuration."""
    groups, k, n = ends.shape[0], x.shape[1], grad.shape[1]
    y = torch.empty(groups, k, n, dtype=x.dtype, device=x.device)
    programs = groups * triton.cdiv(k, rows) * triton.cdiv(n, columns)
    _outer_kernel[(programs,)](
        x, grad, y, ends, gather, scatter, copies, x.stride(0), grad.stride(0),
        K=k, N=n, GATHER=gather is not None, SCATTER=scatter is not None,
        ROWS=rows, INNER=_inner(x, inner), COLUMNS=columns, IEEE=_exact(x), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def _inner(x: Tensor, inner: int) -> int:
    """float32 takes twice the room on chip."""
    return max(16, inner // 2) if x.dtype == torch.float32 else inner


def _exact(x: Tensor) -> bool:
    """Whether float32 products are to be float32, as torch's setting says."""
    return x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
