"""dplr in Triton: the op and its launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqlong.kernels.dplr.plan import PLANS, Plan
from seqlong.kernels.dplr.triton_backward import column_gradients, reads, row_gradients
from seqlong.kernels.dplr.triton_kernels import matrices, outputs, walk
from seqlong.kernels.plans import power
from seqlong.kernels.precision import as_written


class _Call(NamedTuple):
    """Sizes of a call, and the plan for it."""

    rows: int
    length: int
    heads: int
    chunks: int
    tiles: dict[str, int]
    plan: Plan
    starts: bool

    @property
    def grid(self) -> tuple[int]:
        return (self.rows * self.heads * self.chunks,)

    @property
    def lengths(self) -> tuple[int, int, int]:
        return self.length, self.heads, self.chunks


def _call(q: Tensor, v: Tensor, starts: Tensor | None) -> _Call:
    plan = PLANS.settled(q, v)
    (rows, length, heads, k), value = q.shape, v.shape[3]
    tiles = {"K": k, "V": value, "C": plan.chunk, "KB": power(k), "VB": power(value)}
    return _Call(rows, length, heads, -(-length // plan.chunk), tiles, plan, starts is not None)


def _marks(starts: Tensor | None, q: Tensor) -> Tensor:
    return q if starts is None else starts.contiguous().view(torch.uint8)


def _stacked(like: Tensor, call: _Call, rows: str, columns: str) -> Tensor:
    """A matrix a chunk, one above the other: a compiler would fix a count of one chunk, did it have an axis."""
    return like.new_empty(call.rows, call.heads, call.chunks * call.tiles[rows], call.tiles[columns])


def _steps(inputs: list[Tensor], marks: Tensor, grad: Tensor | None, inverses: Tensor, call: _Call) -> list[Tensor]:
    """The step of every chunk's state, or with ``grad`` the step back: turn, add and carry."""
    lead, tiles, v = (call.rows, call.heads, call.chunks), call.tiles, inputs[2]
    turns, adds = v.new_empty(*lead, tiles["KB"], tiles["KB"]), v.new_empty(*lead, tiles["KB"], tiles["VB"])
    carries = v.new_empty(*lead, tiles["KB"], dtype=torch.float32)
    matrices[call.grid](
        *inputs, marks, inputs[0] if grad is None else grad, inverses, turns, adds, carries, *call.lengths, **tiles,
        STARTS=call.starts, ADJOINT=grad is not None, num_warps=call.plan.matrix_warps,
    )  # fmt: skip
    return [turns, adds, carries]


def _walk(steps: list[Tensor], initial: Tensor | None, kept: Tensor, final: Tensor, call: _Call, adjoint: bool) -> None:
    tiles, plan = call.tiles, call.plan
    tile = min(plan.value_tile, tiles["VB"])
    walk[(tiles["VB"] // tile * call.rows * call.heads,)](
        *steps, final if initial is None else initial.float().contiguous(), kept, final, call.chunks,
        **{name: tiles[name] for name in ("K", "V", "KB", "VB")}, BV=tile, INITIAL=initial is not None,
        ADJOINT=adjoint, **plan.launch("walk"),
    )  # fmt: skip


@torch.library.custom_op(
    "seqlong::dplr_triton",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor log_decay, Tensor? starts, "
    "Tensor? initial_state) -> (Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def dplr_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, final state, the state before each chunk (b h nk v) and the inverse of each chunk (b h nc c)."""
    call, marks = _call(q, v, starts), _marks(starts, q)
    inputs = [x.contiguous() for x in (q, k, v, a, b, log_decay)]
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = v.new_empty(call.rows, call.heads, q.shape[3], v.shape[3], dtype=torch.float32)
    kept = _stacked(v, call, "KB", "VB")
    inverses = _stacked(v, call, "C", "C")
    _walk(_steps(inputs, marks, None, inverses, call), initial_state, kept, final, call, adjoint=False)
    outputs[call.grid](
        *inputs, marks, inverses, kept, output, *call.lengths, **call.tiles, STARTS=call.starts,
        num_warps=call.plan.output_warps,
    )  # fmt: skip
    return output, final, kept, inverses


@dplr_triton.register_fake
def _(q, k, v, a, b, log_decay, starts, initial_state):  # type: ignore[no-untyped-def]
    call = _call(q, v, starts)
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        v.new_empty(call.rows, call.heads, q.shape[3], v.shape[3], dtype=torch.float32),
        _stacked(v, call, "KB", "VB"),
        _stacked(v, call, "C", "C"),
    )


@torch.library.custom_op(
    "seqlong::dplr_triton_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? grad_final, Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, "
    "Tensor log_decay, Tensor? starts, Tensor final, Tensor kept, Tensor inverses) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def dplr_triton_backward(
    grad_output: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    starts: Tensor | None,
    final: Tensor,
    kept: Tensor,
    inverses: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, a, b, log_decay and the initial state."""
    call, marks = _call(q, v, starts), _marks(starts, q)
    inputs = [x.contiguous() for x in (q, k, v, a, b, log_decay)]
    grad = grad_output.to(v.dtype).contiguous()
    adjoints, grad_initial = torch.empty_like(kept), torch.empty_like(final)
    _walk(_steps(inputs, marks, grad, inverses, call), grad_final, adjoints, grad_initial, call, adjoint=True)
    values, received = torch.empty_like(grad), torch.empty_like(grad)
    grads = [torch.empty_like(x) for x in inputs]
    reads[call.grid](
        *inputs, marks, inverses, kept, adjoints, grad, values, received, grads[2], *call.lengths, **call.tiles,
        STARTS=call.starts, num_warps=call.plan.read_warps,
    )  # fmt: skip
    # Sums of the log-decay's gradient are in float32, whatever its type.
    change = torch.empty_like(inputs[5], dtype=torch.float32)
    shared = {**call.tiles, "STARTS": call.starts, "num_warps": call.plan.gradient_warps}
    row_gradients[call.grid](
        *inputs, marks, kept, grad, values, received, grads[0], grads[3], change, *call.lengths, **shared
    )
    column_gradients[call.grid](
        *inputs, marks, kept, adjoints, final, grad, values, received, grads[1], grads[4], change, *call.lengths,
        **shared,
    )  # fmt: skip
    grads[5] = change.to(log_decay.dtype)
    return (*grads, grad_initial)  # type: ignore[return-value]


@dplr_triton_backward.register_fake
def _(grad_output, grad_final, q, k, v, a, b, log_decay, starts, final, kept, inverses):  # type: ignore[no-untyped-def]
    grads = [torch.empty_like(z, memory_format=torch.contiguous_format) for z in (q, k, v, a, b, log_decay)]
    return (*grads, torch.empty_like(final))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, initial_state = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.initial_type = None if initial_state is None else initial_state.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_final, *_kept):  # type: ignore[no-untyped-def]
    q, k, v, a, b, log_decay, starts, final, kept, inverses = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(v)
    *grads, first = dplr_triton_backward(
        grad_output, grad_final, q, k, v, a, b, log_decay, starts, final, kept, inverses
    )
    return *grads, None, None if ctx.initial_type is None else first.to(ctx.initial_type)


dplr_triton.register_autograd(_backward, setup_context=_setup_context)
