"""collect_rows and place_rows: rows by index, several lists of them, added up in a fixed order."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqlong.kernels.precision import as_written


@torch.library.custom_op("seqlong::collect_rows", mutates_args=(), schema="(Tensor x, Tensor index) -> Tensor")
@as_written
def _collect(x: Tensor, index: Tensor) -> Tensor:
    found = x.index_select(0, index.clamp(max=max(x.shape[0] - 1, 0)).flatten()).view(*index.shape, x.shape[1])
    return found.masked_fill_((index >= x.shape[0])[..., None], 0)


@torch.library.custom_op(
    "seqlong::place_rows", mutates_args=(), schema="(Tensor y, Tensor index, SymInt rows) -> Tensor"
)
@as_written
def _place(y: Tensor, index: Tensor, rows: int) -> Tensor:
    # One list at a time: a list names a row once, so no sum depends on the order in which a GPU comes by. Only the row
    # after the last, which is cut off, is named more than once.
    output = torch.zeros(rows + 1, y.shape[2], dtype=torch.promote_types(y.dtype, torch.float32), device=y.device)
    for group in range(index.shape[0]):
        output.index_add_(0, index[group], y[group].to(output.dtype))
    return output[:rows].to(y.dtype)


@_collect.register_fake
def _(x, index):  # type: ignore[no-untyped-def]
    return x.new_empty(*index.shape, x.shape[1])


@_place.register_fake
def _(y, index, rows):  # type: ignore[no-untyped-def]
    return y.new_empty(rows, y.shape[2])


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.rows = inputs[0].shape[0]
    ctx.save_for_backward(inputs[1])


def _collect_gradient(ctx, grad):  # type: ignore[no-untyped-def]
    return _place(grad.contiguous(), ctx.saved_tensors[0], ctx.rows), None


def _place_gradient(ctx, grad):  # type: ignore[no-untyped-def]
    return _collect(grad.contiguous(), ctx.saved_tensors[0]), None, None


_collect.register_autograd(_collect_gradient, setup_context=_keep)
_place.register_autograd(_place_gradient, setup_context=_keep)


def collect_rows(x: Float[Tensor, "m d"], index: Int[Tensor, "e c"]) -> Float[Tensor, "e c d"]:
    """``x[index]``; zeros where the index is m.

    Args:
        x: rows.
        index: e lists; none names a row twice. m names no row. The gradient is deterministic.
    """
    return _collect(x, index)


def place_rows(y: Float[Tensor, "e c d"], index: Int[Tensor, "e c"], rows: int) -> Float[Tensor, "m d"]:
    """The sum of what the lists put into each row; zero where nothing does. The transpose of ``collect_rows``.

    Args:
        y: what to add.
        index: where; e lists, none of which names a row twice. ``rows`` names no row.
        rows: m.
    """
    return _place(y, index, rows)
