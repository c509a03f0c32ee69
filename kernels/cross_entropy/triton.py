"""The softmax of linear_cross_entropy in Triton: logits are read once for the loss, and replaced by their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["N"])
def _loss_kernel(
    logits, bias, labels, loss, normalizer, N, Y, stride, z_loss, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(place, N - 1)  # a tile is read in full, the last row again and again
    label = tl.load(labels + rows)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    picked = tl.zeros([ROWS], tl.float32)
    for start in range(0, Y, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < Y
        value = tl.load(logits + rows[:, None] * stride + columns[None, :], mask=inside[None, :], other=-float("inf"))
        value = value.to(tl.float32)
        if BIAS:
            value += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        higher = tl.maximum(top, tl.max(value, axis=1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)  # every class so far may be impossible
        total = total * tl.exp(top - anchor) + tl.sum(tl.exp(value - anchor[:, None]), axis=1)
        picked += tl.sum(tl.where(columns[None, :] == label[:, None], value, 0.0), axis=1)
        top = higher
    total = top + tl.log(total)
    result = total - picked + z_loss * total * total
    result = tl.where(label < Y, result, float("nan"))  # a class that does not exist must not train in silence
    tl.store(loss + place, tl.where(label >= 0, result, 0.0), mask=place < N)
    tl.store(normalizer + place, total, mask=place < N)


@triton.jit(do_not_specialize=["N"])
def _gradient_kernel(
    logits, bias, labels, normalizer, grad, N, Y, stride, z_loss, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = rows < N
    inside = here[:, None] & (columns < Y)[None, :]
    label = tl.load(labels + rows, mask=here, other=-1)
    total = tl.load(normalizer + rows, mask=here, other=0.0)
    incoming = tl.load(grad + rows, mask=here, other=0.0).to(tl.float32)
    where = logits + rows[:, None] * stride + columns[None, :]
    value = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + columns, mask=columns < Y, other=0.0).to(tl.float32)[None, :]
    result = tl.exp(value - total[:, None]) * (1.0 + 2.0 * z_loss * total)[:, None]
    result -= tl.where(columns[None, :] == label[:, None], 1.0, 0.0)
    result = tl.where((label >= 0)[:, None], result * incoming[:, None], 0.0)
    tl.store(where, result.to(logits.dtype.element_ty), mask=inside)


def _tile(classes: int, block: int) -> tuple[int, int]:
    """Rows and columns of a tile of about ``block`` elements."""
    columns = min(triton.next_power_of_2(classes), block)
    return max(1, block // columns), columns


def losses(
    logits: Tensor, bias: Tensor | None, labels: Tensor, z_loss: float, block: int, warps: int
) -> tuple[Tensor, Tensor]:
    """Loss and logarithm of the normaliser of every row of logits (n y), both (n) float32."""
    count, classes = logits.shape
    loss = torch.empty(count, dtype=torch.float32, device=logits.device)
    normalizer = torch.empty_like(loss)
    rows, columns = _tile(classes, block)
    _loss_kernel[(triton.cdiv(count, rows),)](
        logits, logits if bias is None else bias, labels, loss, normalizer, count, classes, logits.stride(0), z_loss,
        ROWS=rows, BLOCK=columns, BIAS=bias is not None, num_warps=warps,
    )  # fmt: skip
    return loss, normalizer


def replace_by_gradient(
    logits: Tensor, bias: Tensor | None, labels: Tensor, normalizer: Tensor, grad: Tensor, z_loss: float, block: int,
    warps: int,
) -> None:  # fmt: skip
    """Overwrite logits (n y) by the gradient of ``Σ grad · loss``."""
    count, classes = logits.shape
    rows, columns = _tile(classes, block)
    _gradient_kernel[(triton.cdiv(count, rows), triton.cdiv(classes, columns))](
        logits, logits if bias is None else bias, labels, normalizer, grad, count, classes, logits.stride(0), z_loss,
        ROWS=rows, BLOCK=columns, BIAS=bias is not None, num_warps=warps,
    )  # fmt: skip
