"""What launches of Triton kernels along a row share: how tensors are read, and the short way past torch.library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def strides(x: Tensor) -> tuple[int, int]:
    """Of rows and tokens, as kernels are given them: 0 for a single row, whose own says nothing."""
    return (0 if x.shape[0] == 1 else x.stride(0)), x.stride(1)


def readable(x: Tensor) -> Tensor:
    """x (b t h d) as descriptors read it: heads side by side, rows on 16 bytes; a copy only where it is not so."""
    per = 16 // x.element_size()
    (rows, _, heads, width), (row, token, head, one) = x.shape, x.stride()
    side_by_side = one == 1 and (heads == 1 or head == width)
    if rows == 1:
        row = 0
    aligned = x.data_ptr() % 16 == 0 and token > 0 and token % per == 0 and row % per == 0
    return x if side_by_side and aligned else x.contiguous()


def single(x: Tensor | None) -> Tensor | None:
    """x in single precision, one element after another."""
    return None if x is None else x.float().contiguous()


def bytes_of(starts: Tensor) -> Tensor:
    """starts (b t) as kernels read it, which know one stride only: a part of wider rows is copied."""
    return starts.contiguous().view(torch.uint8)


_PLAIN = (Tensor, nn.Parameter)


def untraced(*inputs: Tensor | None) -> bool:
    """Whether nothing watches what runs: no compiler, mode, transform or subclass, whose word for an op is its name."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
    ) and all(x is None or (type(x) in _PLAIN and x.device.type != "meta") for x in inputs)


def eager(
    run: Callable[..., tuple[Tensor, ...]],
    setup_context: Callable[..., None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """An op for eager calls: torch.library's layers cost more host time than a short row takes on a GPU.

    Args:
        run: what the op does; returns the output, the final state, and what the backward pass needs.
        setup_context: what is registered with the op for its context.
        gradients: what is registered as its backward pass.

    Returns:
        A function of the op's arguments, whose output and final state have a gradient.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = run(*inputs)
            setup_context(ctx, inputs, output)
            return output[:2]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradients(ctx, *grads)

    return Eager.apply
