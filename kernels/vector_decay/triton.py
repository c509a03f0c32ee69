"""vector_decay in Triton: the op, its gradient, and the launches of both.

Forward: ``segment_states`` and ``scan`` find the state that enters each segment, so that one long row fills the GPU
like a batch; ``walk`` goes through every segment. The gradient mirrors this: the same three, adjoint, give grad v and
the gradient of the state at the end of each chunk; ``keys`` makes the rest of both, chunk by chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlong.kernels.launch import bytes_of, eager, readable, single, strides, untraced
from seqlong.kernels.plans import power, segments
from seqlong.kernels.precision import as_written
from seqlong.kernels.runtime import use_allocator
from seqlong.kernels.vector_decay import triton_kernels
from seqlong.kernels.vector_decay.inputs import ACTIVATIONS
from seqlong.kernels.vector_decay.plan import PLANS, Plan


class _Sizes(NamedTuple):
    """Everything a launch is cut by; K, V are widths, KB, VB the tiles that hold them."""

    B: int
    T: int
    H: int
    K: int
    V: int
    KB: int
    VB: int
    KS: int
    BV: int
    BK: int
    NC: int
    NS: int
    CPS: int
    plan: Plan

    @property
    def tile(self) -> dict[str, int]:
        return {"K": self.K, "V": self.V, "KB": self.KB, "VB": self.VB, "KS": self.KS, "BV": self.BV,
                "C": self.plan.chunk}  # fmt: skip


class _Gates(NamedTuple):
    """What kernels need to know of gates."""

    gate: Tensor
    bound: Tensor | None
    starts: Tensor | None
    scale: float
    activation: str
    reverse: bool

    @property
    def constants(self) -> dict[str, int]:
        return {"ACT": ACTIVATIONS.index(self.activation), "STARTS": self.starts is not None, "REV": self.reverse}


def _sizes(q: Tensor, v: Tensor, activation: str) -> _Sizes:
    rows, length = q.shape[:2]  # symbols where a compiler traces them; heads and widths never are
    heads, width, value_width = int(q.shape[2]), int(q.shape[3]), int(v.shape[3])
    plan = PLANS.settled(q, v, lower_bound=activation == "lower_bound")
    k_tile, v_tile = power(width), power(value_width)
    value_tile = min(plan.value_tile, v_tile)
    key_slice = max(min(plan.key_slice, k_tile), k_tile // 4)
    chunks = -(-length // plan.chunk)
    count, each = 1, chunks
    if isinstance(length, int) and isinstance(rows, int):  # no shape of a result depends on it, nor shall a graph
        count, each = segments(q, chunks, rows * heads * (v_tile // value_tile), plan.programs_per_sm)
    return _Sizes(rows, length, heads, width, value_width, k_tile, v_tile, key_slice, value_tile,
                  max(key_slice, min(64, k_tile)), chunks, count, each, plan)  # fmt: skip


def _gates(gate: Tensor, activation: str, divisor: float, bound: Tensor | None, starts: Tensor | None,
           reverse: bool) -> _Gates:  # fmt: skip
    flags = None if starts is None else bytes_of(starts)
    return _Gates(readable(gate), single(bound), flags, 1.0 / divisor, activation, reverse)


def _walk(
    reader: Tensor,
    writer: Tensor,
    x: Tensor,
    gates: _Gates,
    edge: Tensor | None,
    out: Tensor,
    kept: Tensor | None,
    final: Tensor | None,
    z: _Sizes,
    adjoint: bool,
) -> None:
    """Fill ``out``, ``kept`` and ``final``; keys that gates make are given as the queries, and not read."""
    none = out
    bound, starts = (none if y is None else y for y in (gates.bound, gates.starts))
    entry, how = (none, 0) if edge is None else (edge, 2)
    sizes = (z.T, z.H, z.NC, z.NS, z.CPS, gates.scale)
    if z.NS > 1:
        entry, how = torch.empty(z.B * z.H, z.NS, z.VB, z.KB, dtype=torch.float32, device=x.device), 1
        carries = entry.new_empty(z.B * z.H, z.NS, z.KB)
        programs = z.H * (z.KB // z.BK) * (z.VB // z.BV) * z.NS * z.B
        triton_kernels.segment_states[(programs,)](
            writer, x, gates.gate, bound, starts, entry, carries, *sizes, *strides(writer), *strides(x),
            *strides(gates.gate), **{**z.tile, "KS": z.BK}, **gates.constants, ADJOINT=adjoint,
            **z.plan.launch("states"),
        )  # fmt: skip
        block = min(128, z.KB * z.VB)
        triton_kernels.scan[(z.B * z.H, z.KB * z.VB // block)](
            entry, carries, entry if edge is None else edge, z.NS, K=z.K, V=z.V, KB=z.KB, KV=z.KB * z.VB,
            INITIAL=edge is not None, LEFTWARD=gates.reverse != adjoint, BLOCK=block, num_warps=2,
        )  # fmt: skip
    triton_kernels.walk[(z.H * (z.VB // z.BV) * z.NS * z.B,)](
        reader, writer, x, gates.gate, bound, starts, entry, out, none if kept is None else kept,
        none if final is None else final, *sizes, *strides(reader), *strides(writer), *strides(x),
        *strides(gates.gate), **z.tile, **gates.constants, ENTRY=how, KEEP=kept is not None, FINAL=final is not None,
        ADJOINT=adjoint, **z.plan.launch("values" if adjoint else "forward"),
    )  # fmt: skip


@as_written
def _forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor,
    activation: str,
    divisor: float,
    lower_bound: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (b t h v), final state (b h k v), and, to keep for the backward pass, the states that enter chunks."""
    use_allocator()
    q, v = readable(q), readable(v)
    k = q if k is None else readable(k)
    z = _sizes(q, v, activation)
    gates = _gates(gate, activation, divisor, lower_bound, starts, reverse)
    output = v.new_empty(z.B, z.T, z.H, z.V)
    final = v.new_empty(z.B, z.H, z.K, z.V, dtype=torch.float32)
    kept = _kept(v, z, keep)
    _walk(q, k, v, gates, single(initial_state), output, kept if keep else None, final, z, adjoint=False)
    return output, final, kept


def _kept(v: Tensor, z: _Sizes, keep: bool) -> Tensor:
    return v.new_empty((z.B, z.NC, z.H, z.VB, z.KB) if keep else 0)


vector_decay_triton = torch.library.custom_op(
    "seqlong::vector_decay_triton",
    mutates_args=(),
    schema="(Tensor q, Tensor? k, Tensor v, Tensor gate, str activation, float divisor, Tensor? lower_bound, "
    "Tensor? starts, Tensor? initial_state, bool reverse, bool keep) -> (Tensor, Tensor, Tensor)",
)(_forward)


@vector_decay_triton.register_fake
def _(q, k, v, gate, activation, divisor, lower_bound, starts, initial_state, reverse, keep):  # type: ignore[no-untyped-def]
    z = _sizes(q, v, activation)
    final = v.new_empty(z.B, z.H, z.K, z.V, dtype=torch.float32)
    return v.new_empty(z.B, z.T, z.H, z.V), final, _kept(v, z, keep)


@as_written
def _gradients(
    grad_output: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor,
    activation: str,
    divisor: float,
    lower_bound: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    kept: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gate, lower_bound and the initial state; empty for what was not given."""
    use_allocator()
    q, v, go = readable(q), readable(v), readable(grad_output.to(v.dtype))
    made = k is None
    k = q if k is None else readable(k)
    z = _sizes(q, v, activation)
    gates = _gates(gate, activation, divisor, lower_bound, starts, reverse)
    dq, dv, dgate = (x.new_empty(x.shape) for x in (q, v, gates.gate))
    dk = q.new_empty(0) if made else k.new_empty(k.shape)
    dkept = torch.empty_like(kept)
    none = v.new_empty(0, dtype=torch.float32)
    dinitial = None if initial_state is None else none.new_empty(z.B, z.H, z.K, z.V)
    _walk(k, q, go, gates, single(grad_final), dv, dkept, dinitial, z, adjoint=True)
    dbound = none.new_empty(z.B, z.NC, z.H, z.K) if made else none
    runs = -(-z.NC // z.plan.run)
    bound, flags = (dq if x is None else x for x in (gates.bound, gates.starts))
    triton_kernels.keys[(z.KB // z.BK * z.H * runs * z.B,)](
        q, k, v, gates.gate, bound, flags, go, kept, dkept, dq, dq if made else dk, dgate, dbound if made else dq,
        z.T, z.H, z.NC, z.plan.run, gates.scale, *strides(q), *strides(k), *strides(v), *strides(gates.gate),
        *strides(go), **z.tile, BK=z.BK, **gates.constants, **z.plan.launch("keys"),
    )  # fmt: skip
    sums = dbound.sum((0, 1)) if made else none
    return dq, dk, dv, dgate, sums, none.clone() if dinitial is None else dinitial


vector_decay_triton_backward = torch.library.custom_op(
    "seqlong::vector_decay_triton_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? grad_final, Tensor q, Tensor? k, Tensor v, Tensor gate, str activation, "
    "float divisor, Tensor? lower_bound, Tensor? starts, Tensor? initial_state, Tensor kept, bool reverse) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)(_gradients)


@vector_decay_triton_backward.register_fake
def _(grad_output, grad_final, q, k, v, gate, activation, divisor, lower_bound, starts, initial_state, kept, reverse):  # type: ignore[no-untyped-def]
    none = v.new_empty(0, dtype=torch.float32)
    return (
        q.new_empty(q.shape),
        q.new_empty(0) if k is None else k.new_empty(k.shape),
        v.new_empty(v.shape),
        gate.new_empty(gate.shape),
        none if lower_bound is None else none.new_empty(lower_bound.shape),
        none.clone() if initial_state is None else none.new_empty(initial_state.shape),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, gate, activation, divisor, lower_bound, starts, initial_state, reverse, _ = inputs
    ctx.save_for_backward(q, k, v, gate, lower_bound, starts, initial_state, output[2])
    ctx.settings = activation, divisor, reverse
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_final, *_kept):  # type: ignore[no-untyped-def]
    q, k, v, gate, lower_bound, starts, initial_state, kept = ctx.saved_tensors
    activation, divisor, reverse = ctx.settings
    if grad_output is None:
        grad_output = torch.zeros_like(v)
    # With gradients on, a second derivative is wanted: the op says that it has none, the plain function would not.
    plain = untraced(grad_output, grad_final, kept) and not torch.is_grad_enabled()
    gradients = _gradients if plain else vector_decay_triton_backward
    dq, dk, dv, dgate, dbound, dinitial = gradients(
        grad_output, grad_final, q, k, v, gate, activation, divisor, lower_bound, starts, initial_state, kept, reverse
    )
    dk = None if k is None else dk
    dbound = None if lower_bound is None else dbound.to(lower_bound.dtype)
    dinitial = None if initial_state is None else dinitial.to(initial_state.dtype)
    return dq, dk, dv, dgate, None, None, dbound, None, dinitial, None, None


vector_decay_triton.register_autograd(_backward, setup_context=_setup_context)
_eager = eager(_forward, _setup_context, _backward)


def run(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor,
    activation: str,
    divisor: float,
    lower_bound: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Output and final state of inputs of any width: padded to what kernels can read, and cut to the caller's again."""
    width, value_width = q.shape[3], v.shape[3]
    per = 16 // min(v.element_size(), gate.element_size())
    more, value_more = -width % per, -value_width % per
    if more:
        q, gate = F.pad(q, (0, more)), F.pad(gate, (0, more))
        k = None if k is None else F.pad(k, (0, more))
        lower_bound = None if lower_bound is None else F.pad(lower_bound, (0, more))
    if value_more:
        v = F.pad(v, (0, value_more))
    if initial_state is not None and (more or value_more):
        initial_state = F.pad(initial_state, (0, value_more, 0, more))
    tensors = (q, k, v, gate, lower_bound, starts, initial_state)
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    plain = untraced(*tensors)  # then by the shortest way: not the op, but the same functions
    call = vector_decay_triton if not plain else _eager if needed else _forward
    output, final, *_ = call(q, k, v, gate, activation, divisor, lower_bound, starts, initial_state, reverse, needed)
    if more or value_more:
        output, final = output[..., :value_width], final[..., :width, :value_width]
    return output, final
