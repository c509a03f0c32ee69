"""bidirectional_decay in Triton: the op, its gradient, and the launches of both.

Forward: ``prepare`` for each reading; ``both_states`` and ``scan_both`` find what enters each segment from either side;
``both_forward`` walks the segments. The gradient mirrors it. See triton_bidirectional_kernels.py for how one walk
serves two readings.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from seqlong.kernels.launch import bytes_of, readable, strides
from seqlong.kernels.plans import power, segments
from seqlong.kernels.precision import as_written
from seqlong.kernels.runtime import use_allocator
from seqlong.kernels.scalar_decay import triton_bidirectional_kernels as kernels
from seqlong.kernels.scalar_decay.bidirectional import PLANS
from seqlong.kernels.scalar_decay.reference import last_tokens
from seqlong.kernels.scalar_decay.triton import Sizes
from seqlong.kernels.scalar_decay.triton_forward import prepare

#: Registers of a thread of ``both_states``: a few fewer than it would take, and four programs fit a multiprocessor.
REGISTERS: int | None = 128


def _sizes(q: Tensor, v: Tensor) -> Sizes:
    (rows, length, groups, width), (heads, value_width) = q.shape, v.shape[2:]
    plan = PLANS.settled(q, v)
    k_tile, v_tile = power(width), power(value_width)
    chunks = -(-length // plan.chunk)
    count, each = segments(q, chunks, rows * heads, plan.programs_per_sm)
    return Sizes(
        rows, length, groups, heads, heads // groups, width, value_width, k_tile, v_tile, chunks, count, each,
        v_tile, k_tile, plan,
    )  # fmt: skip


def _totals(log_decay: Tensor, starts: Tensor | None, z: Sizes) -> Tensor:
    """Running sums (2 b h n·C) of log2 decays inside each chunk, from the left and from the right."""
    totals = log_decay.new_empty(2, z.B, z.H, z.NC * z.plan.chunk, dtype=torch.float32)
    wide = min(32, triton.next_power_of_2(z.H))
    for from_right, total in enumerate(totals):
        marks = starts if starts is None or not from_right else last_tokens(starts)
        prepare[(z.NC * z.B, triton.cdiv(z.H, wide))](
            log_decay, total, total, total if marks is None else bytes_of(marks), total, total,
            z.T, z.H, z.NC, *log_decay.stride(), C=z.plan.chunk, BH=wide, SSD=False, BIAS=False,
            STARTS=marks is not None, REV=from_right == 1, num_warps=4,
        )  # fmt: skip
    return totals


def _states(x: Tensor, y: Tensor, totals: Tensor, z: Sizes, adjoint: bool) -> tuple[Tensor, Tensor, Tensor]:
    """States of one reading before each chunk, from the segment's edge; their shifts; states at the edges of both."""
    tile_x, tile_y = power(x.shape[3]), power(y.shape[3])
    kept = x.new_empty(z.B, z.NC, z.H, tile_x, tile_y)
    shifts = totals.new_empty(z.B, z.H, z.NC)
    states = totals.new_empty(2, z.B * z.H, z.NS, tile_x, tile_y)
    decays = totals.new_empty(2, z.B * z.H, z.NS)
    kernels.both_states[(z.H * z.NS * z.B,)](
        x, y, totals[0], totals[1], kept, shifts, states, decays, z.T, z.H, z.H // x.shape[2], z.H // y.shape[2], z.NC,
        z.NS, z.CPS, *strides(x), *strides(y), X=x.shape[3], Y=y.shape[3], XB=tile_x, YB=tile_y, BX=tile_x,
        C=z.plan.chunk, ADJOINT=adjoint, **z.plan.launch("states"),
        maxnreg=REGISTERS if x.element_size() == 2 else None,
    )  # fmt: skip
    if z.NS > 1:
        block = min(128, tile_x * tile_y)
        kernels.scan_both[(z.B * z.H, tile_x * tile_y // block, 2)](
            states, decays, z.NS, XY=tile_x * tile_y, ADJOINT=adjoint, BLOCK=block, num_warps=2
        )
    return kept, shifts, states


def _walk(q: Tensor, k: Tensor, v: Tensor, totals: Tensor, held: Tensor, shifts: Tensor, states: Tensor, z: Sizes,
          keep: bool, out: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output, and the states of the left reading before each chunk; empty where not wanted."""
    output = v.new_empty((z.B, z.T, z.H, z.V) if out else 0)
    kept = v.new_empty((z.B, z.NC, z.H, z.VB, z.KB) if keep else 0)
    kernels.both_forward[z.walks](
        q, k, v, totals[0], totals[1], held, shifts, states, output, kept, z.T, z.H, z.R, z.NC, z.NS, z.CPS,
        *strides(q), *strides(k), *strides(v), **z.tile, BV=z.BV, C=z.plan.chunk, ENTRY=z.NS > 1, KEEP=keep,
        OUT=out, **z.plan.launch("forward"),
    )  # fmt: skip
    return output, kept


@torch.library.custom_op(
    "seqlong::bidirectional_decay_triton",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? starts, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def bidirectional_decay_triton(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output (b t h v), running decays of both readings, and with ``keep`` what the backward pass would make again."""
    use_allocator()
    q, k, v = readable(q), readable(k), readable(v)
    z = _sizes(q, v)
    totals = _totals(log_decay, starts, z)
    held, shifts, states = _states(v, k, totals, z, adjoint=False)
    output, kept = _walk(q, k, v, totals, held, shifts, states, z, keep, out=True)
    if not keep:
        held, shifts, states = v.new_empty(0), totals.new_empty(0), totals.new_empty(0)
    return output, totals, kept, held, shifts, states


@bidirectional_decay_triton.register_fake
def _(q, k, v, log_decay, starts, keep):  # type: ignore[no-untyped-def]
    z = _sizes(q, v)
    totals = v.new_empty(2, z.B, z.H, z.NC * z.plan.chunk, dtype=torch.float32)
    tiles = (z.B, z.NC, z.H, z.VB, z.KB) if keep else (0,)
    return (
        v.new_empty(z.B, z.T, z.H, z.V),
        totals,
        v.new_empty(tiles),
        v.new_empty(tiles),
        totals.new_empty((z.B, z.H, z.NC) if keep else (0,)),
        totals.new_empty((2, z.B * z.H, z.NS, z.VB, z.KB) if keep else (0,)),
    )


@torch.library.custom_op(
    "seqlong::bidirectional_decay_triton_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor q, Tensor k, Tensor v, Tensor? starts, Tensor totals, Tensor kept, "
    "Tensor held, Tensor shifts, Tensor states, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def bidirectional_decay_triton_backward(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    totals: Tensor,
    kept: Tensor,
    held: Tensor,
    shifts: Tensor,
    states: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v in their types and of log_decay (b t h) in float32."""
    use_allocator()
    q, k, v, go = (readable(x) for x in (q, k, v, grad_output.to(v.dtype)))
    z = _sizes(q, v)
    if not keep:
        held, shifts, states = _states(v, k, totals, z, adjoint=False)
        _, kept = _walk(q, k, v, totals, held, shifts, states, z, keep=True, out=False)
    dheld, dshifts, dstates = _states(q, go, totals, z, adjoint=True)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dv, dgate = v.new_empty(v.shape), totals.new_empty(z.B, z.T, z.H)
    kernels.both_fused[(z.H * z.NS * z.B,)](
        q, k, v, go, totals[0], totals[1], kept, held, shifts, states[0].to(q.dtype), dheld, dshifts,
        dstates[0].to(q.dtype), dstates, dq, dk, dv, dgate, z.T,
        z.H, z.NC, z.NS, z.CPS, *strides(q), *strides(k), *strides(v), *strides(go), **z.tile, C=z.plan.chunk,
        ENTRY=z.NS > 1, **z.plan.launch("fused"),
    )  # fmt: skip
    if starts is not None:  # a token alone sees no decay; elsewhere the flows that are cut are zero by themselves
        alone = starts & torch.cat([starts[:, 1:], torch.ones_like(starts[:, :1])], dim=1)
        dgate.masked_fill_(alone[..., None], 0)
    return dq, dk, dv, dgate


@bidirectional_decay_triton_backward.register_fake
def _(grad_output, q, k, v, starts, totals, kept, held, shifts, states, keep):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), totals.new_empty(v.shape[:3])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, log_decay, starts, ctx.keep = inputs
    ctx.save_for_backward(q, k, v, starts, *output[1:])
    ctx.gate_type = log_decay.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, *_kept):  # type: ignore[no-untyped-def]
    q, k, v, starts, *kept = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(v)
    dq, dk, dv, dgate = bidirectional_decay_triton_backward(grad_output, q, k, v, starts, *kept, ctx.keep)
    return dq, dk, dv, dgate.to(ctx.gate_type), None, None


bidirectional_decay_triton.register_autograd(_backward, setup_context=_setup_context)
