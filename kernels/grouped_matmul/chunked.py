"""grouped_matmul in torch: one product an expert (any device and type), or torch's grouped_mm.

Both read and write whole rows between products; how rows are gathered and scattered is the same for both. An engine has
two products: ``rows`` (each row with the matrix of its group) and ``outer`` (the sum of outer products of a group's
rows, which is the gradient of its matrix).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlong.kernels.runtime import constant_when_traced

#: torch >= 2.10 has the public name; both are the same function.
_GROUPED_MM = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def picked(x: Tensor, gather: Tensor | None, copies: int) -> Tensor:
    """The rows in the order of the groups."""
    if gather is None:
        return x
    return x.index_select(0, gather if copies == 1 else gather // copies)


def rows_looped(
    x: Tensor, weight: Tensor, ends: Tensor, gather: Tensor | None, scatter: Tensor | None, copies: int
) -> Tensor:
    """One product a group. ``ends`` is read by the CPU, which waits for a GPU once."""
    rows = x.shape[0] if gather is None else gather.shape[0]
    output = torch.empty(rows, weight.shape[2], dtype=x.dtype, device=x.device)
    source = picked(x, gather, copies)
    begin = 0
    for group, end in enumerate(ends.tolist()):
        if end > begin:
            torch.mm(source[begin:end], weight[group], out=output[begin:end])
        begin = end
    output[begin:] = 0
    return output if scatter is None else torch.empty_like(output).index_copy_(0, scatter, output)


def outer_looped(
    x: Tensor, grad: Tensor, ends: Tensor, gather: Tensor | None, scatter: Tensor | None, copies: int
) -> Tensor:
    """``(e k n)``: the sum over each group's rows of ``x_rowᵀ grad_row``."""
    source, incoming = picked(x, gather, copies), picked(grad, scatter, 1)
    output = torch.empty(ends.shape[0], x.shape[1], grad.shape[1], dtype=x.dtype, device=x.device)
    begin = 0
    for group, end in enumerate(ends.tolist()):
        if end > begin:
            torch.mm(source[begin:end].T, incoming[begin:end], out=output[group])
        else:
            output[group] = 0
        begin = end
    return output


def rows_grouped(
    x: Tensor, weight: Tensor, ends: Tensor, gather: Tensor | None, scatter: Tensor | None, copies: int
) -> Tensor:
    """torch's grouped_mm, without waiting for the device. Rows past the last group, which it leaves as they were in
    memory, are set to zero."""
    width = weight.shape[2]
    source, matrices = _even(picked(x, gather, copies), 1), _even(_even(weight, 1), 2)
    output = _GROUPED_MM(source, matrices, offs=ends.to(torch.int32))[:, :width]  # type: ignore[misc]
    beyond = torch.arange(output.shape[0], device=x.device) >= ends[-1]
    output = output.masked_fill(beyond[:, None], 0)
    return output if scatter is None else torch.empty_like(output).index_copy_(0, scatter, output)


def outer_grouped(
    x: Tensor, grad: Tensor, ends: Tensor, gather: Tensor | None, scatter: Tensor | None, copies: int
) -> Tensor:
    """As ``outer_looped``, by grouped_mm; rows past the last group are in no product."""
    source, incoming = _even(picked(x, gather, copies), 1), _even(picked(grad, scatter, 1), 1)
    output = _GROUPED_MM(source.T, incoming, offs=ends.to(torch.int32))  # type: ignore[misc]
    return output[:, : x.shape[1], : grad.shape[1]].contiguous()


def _even(x: Tensor, axis: int) -> Tensor:
    """``x`` with zeros after ``axis``, so that its rows are multiples of 16 bytes, as grouped_mm asks, and dense."""
    per = 16 // x.element_size()
    lacking = -x.shape[axis] % per
    if lacking:
        x = F.pad(x, (0, 0) * (x.dim() - 1 - axis) + (0, lacking))
    dense = x.stride(-1) == 1 or (x.dim() == 3 and x.stride(-2) == 1)
    aligned = all(stride % per == 0 for stride in x.stride() if stride != 1) and x.data_ptr() % 16 == 0
    return x if dense and aligned else x.clone(memory_format=torch.contiguous_format)


@constant_when_traced
def why_not_grouped_mm(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if grouped_mm gives the right results here, else the reason why it is not used."""
    if _GROUPED_MM is None:
        return "this torch has no grouped_mm"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"grouped_mm is not for {dtype}"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "grouped_mm cannot be checked while a CUDA graph is recorded"
    return _verdict(device, dtype)


@constant_when_traced
def is_one_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether grouped_mm is one kernel on this GPU: only from Hopper on; before, it is a loop that waits."""
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache
def _verdict(device: torch.device, dtype: torch.dtype) -> str | None:
    """Small products with empty groups, odd widths and rows of no group, beside the loop."""
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(45, n, generator=generator).to(device, dtype) for n in (40, 21))
    weight = torch.randn(5, 40, 21, generator=generator).to(device, dtype)
    ends = torch.tensor([0, 9, 9, 30, 43], device=device)
    try:
        with torch.no_grad():
            found = [rows_grouped(x, weight, ends, None, None, 1), outer_grouped(x, grad, ends, None, None, 1)]
            found.append(rows_grouped(grad, weight.transpose(1, 2), ends, None, None, 1))
            wanted = [rows_looped(x, weight, ends, None, None, 1), outer_looped(x, grad, ends, None, None, 1)]
            wanted.append(rows_looped(grad, weight.transpose(1, 2), ends, None, None, 1))
    except (RuntimeError, ValueError, TypeError) as error:
        return f"grouped_mm fails here: {str(error).strip().splitlines()[0][:120]}"
    for one, other in zip(found, wanted, strict=True):
        if not (one - other).abs().max() <= 0.05 * other.abs().max():
            return "grouped_mm gives wrong results here"
    return None
