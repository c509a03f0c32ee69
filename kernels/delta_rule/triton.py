"""delta_rule in Triton: the op, its gradient, and the launches of both; triton_by_channel.py has those of KDA alone.

Forward: ``products`` and ``invert`` prepare every chunk at once; a ``walk`` of all segments from zero, together with
what each segment does to a state (columns of the identity walk along), and ``scan`` find the states that enter the
segments, so that one long row fills the GPU like a batch; a second ``walk`` makes the output. Rows that fill the GPU by
themselves are one segment each and need neither of the middle two. The gradient walks the same way back, with the same
transitions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqlong.kernels.delta_rule import triton_backward, triton_by_channel, triton_forward, triton_inverse
from seqlong.kernels.delta_rule.plan import CHUNK
from seqlong.kernels.delta_rule.triton_launch import (
    Prepared,
    Sizes,
    by_head,
    by_token,
    readable,
    sizes,
    strides,
)
from seqlong.kernels.plans import processors
from seqlong.kernels.precision import as_written
from seqlong.kernels.runtime import use_allocator

LOG2E = 1.4426950408889634
#: log2 of a decay that is zero in float32; no decay is below it, so that sums over a chunk keep their digits.
RESET = -160.0


def _prepare(q: Tensor, k: Tensor, weight: Tensor, log_decay: Tensor | None, normalize: bool, z: Sizes) -> Prepared:
    if log_decay is not None and log_decay.dim() == 4:
        return triton_by_channel.prepare(q, k, weight, log_decay, normalize, z)
    w = by_head(weight, z)
    g = w if log_decay is None else by_head((log_decay.float() * LOG2E).clamp_(min=RESET), z)
    total, rq, rk = (torch.empty_like(w) for _ in range(3))
    inverse, scores = (q.new_empty(z.B, z.H, z.NC, CHUNK, CHUNK) for _ in range(2))
    erase = torch.empty_like(inverse, dtype=torch.float32)  # what is inverted keeps its digits
    triton_forward.products[z.chunks](
        q, k, g, total, rq, rk, scores, erase, z.T, z.H, z.R, z.NC, *strides(q), *strides(k), K=z.K, KB=z.KB,
        NORM=normalize, GATED=log_decay is not None, num_warps=z.plan.prepare,
    )  # fmt: skip
    triton_inverse.invert[z.chunks](w, erase, inverse, num_warps=1)
    return Prepared(q, k, k, w, total, rq, rk, inverse, scores, None)


def _scan(states: Tensor, moves: Tensor, edge: Tensor | None, z: Sizes, adjoint: bool) -> None:
    tile = {**z.tile, "BV": 16}
    triton_forward.scan[(z.B * z.H, z.VB // 16)](
        states, moves, states if edge is None else edge, z.NS, **tile, EDGE=edge is not None, ADJOINT=adjoint,
        num_warps=4,
    )  # fmt: skip


def _moves(v: Tensor, z: Sizes) -> Tensor:
    """Room for what every segment does to a state (b h s k k). No segment is made that it would not hold, so that its
    size depends on the GPU and on heads, not on the length."""
    return v.new_empty(z.plan.programs_per_sm * processors(v) // (z.VB // z.BV), z.KB, z.KB, dtype=torch.float32)


@torch.library.custom_op(
    "seqlong::delta_rule_triton",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor? log_decay, Tensor? initial_state, bool normalize, "
    "bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def delta_rule_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    normalize: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output (b t h v), final state (b h k v); for the backward pass Ṽ, the states before chunks, moves of segments."""
    use_allocator()
    q, k, v = readable(q), readable(k), readable(v)
    z = sizes(q, v, log_decay)
    ready = _prepare(q, k, weight, log_decay, normalize, z)
    edge = None if initial_state is None else initial_state.float().contiguous()
    output, final = v.new_empty(z.B, z.T, z.H, z.V), ready.total.new_empty(z.B, z.H, z.K, z.V)
    fresh, kept, moves = _kept(v, z, keep)
    entry, how = (final, 0) if edge is None else (edge, 2)
    if z.NS > 1:
        entry, how = ready.total.new_empty(z.B * z.H, z.NS, z.VB, z.KB), 1
        moves = moves if keep else _moves(v, z)
        triton_forward.walk[(z.H * ((z.KB + z.VB) // z.BV) * z.NS * z.B,)](
            *ready.read_by(v), entry, v, v, v, moves, moves, *ready.numbers(v, z), **z.tile, ENTRY=0, SEGMENT=True,
            KEEP=False, CHANNEL=ready.channel, **z.plan.launch("states"),
        )  # fmt: skip
        _scan(entry, moves, edge, z, adjoint=False)
    triton_forward.walk[z.walks](
        *ready.read_by(v), entry, output, fresh, kept, final, final, *ready.numbers(v, z), **z.tile, ENTRY=how,
        SEGMENT=False, KEEP=keep, CHANNEL=ready.channel, **z.plan.launch("forward"),
    )  # fmt: skip
    return output, final, fresh, kept, moves if keep else v.new_empty(0, dtype=torch.float32)


def _kept(v: Tensor, z: Sizes, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    if not keep:
        return v.new_empty(0), v.new_empty(0), v.new_empty(0, dtype=torch.float32)
    return v.new_empty(z.B, z.T, z.H, z.V), v.new_empty(z.B, z.NC, z.H, z.VB, z.KB), _moves(v, z)


@delta_rule_triton.register_fake
def _(q, k, v, weight, log_decay, initial_state, normalize, keep):  # type: ignore[no-untyped-def]
    z = sizes(q, v, log_decay)
    final = v.new_empty(z.B, z.H, z.K, z.V, dtype=torch.float32)
    return v.new_empty(z.B, z.T, z.H, z.V), final, *_kept(v, z, keep)


@torch.library.custom_op(
    "seqlong::delta_rule_triton_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? grad_final, Tensor q, Tensor k, Tensor v, Tensor weight, Tensor? log_decay, "
    "Tensor fresh, Tensor kept, Tensor moves, bool normalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def delta_rule_triton_backward(
    grad_output: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    log_decay: Tensor | None,
    fresh: Tensor,
    kept: Tensor,
    moves: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, weight (b t h), log_decay (empty if there is none) and the initial state."""
    use_allocator()
    q, k, v, go = (readable(x) for x in (q, k, v, grad_output.to(v.dtype)))
    z = sizes(q, v, log_decay)
    ready = _prepare(q, k, weight, log_decay, normalize, z)
    w, total, rq, rk, inverse, scores = ready[3:9]
    edge = None if grad_final is None else grad_final.float().contiguous()
    dv, dkept = v.new_empty(v.shape), torch.empty_like(kept)
    dinitial = total.new_empty(z.B, z.H, z.K, z.V)
    entry, how = (total, 0) if edge is None else (edge, 2)
    common = {**z.tile, "CHANNEL": ready.channel}
    if z.NS > 1:
        entry, how = total.new_empty(z.B * z.H, z.NS, z.VB, z.KB), 1
        triton_backward.adjoint[z.walks](
            *ready.read_by(go), entry, dv, dkept, dinitial, *ready.numbers(go, z), **common, ENTRY=0, SEGMENT=True,
            **z.plan.launch("states"),
        )  # fmt: skip
        _scan(entry, moves, edge, z, adjoint=True)
    triton_backward.adjoint[z.walks](
        *ready.read_by(go), entry, dv, dkept, dinitial, *ready.numbers(go, z), **common, ENTRY=how, SEGMENT=False,
        **z.plan.launch("adjoint"),
    )  # fmt: skip
    if ready.channel:
        dq, dk, dweight, dgate = triton_by_channel.gradients(q, k, v, go, ready, kept, dkept, fresh, dv, normalize, z)
        return dq, dk, dv, by_token(dweight, z), dgate, dinitial
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dweight, dgate = torch.empty_like(total), torch.empty_like(total)
    on_q, on_k, on_v, on_go = (strides(x) for x in (q, k, v, go))
    gated = log_decay is not None
    # The inverses and scores have been read: what goes through the products of q and k takes their place.
    triton_backward.local[z.chunks](
        q, k, v, go, w, total, rq, rk, kept, dkept, fresh, dv, inverse, scores, dweight, dgate, z.T, z.H, z.R, z.NC,
        *on_q, *on_k, *on_v, *on_go, **z.tile, GATED=gated, num_warps=z.plan.local,
    )  # fmt: skip
    triton_backward.keys[(z.G * z.NC * z.B,)](
        q, k, go, total, rq, rk, kept, dkept, fresh, dv, inverse, scores, dq, dk, z.T, z.H, z.R, z.NC, *on_q, *on_k,
        *on_go, **z.tile, NORM=normalize, num_warps=z.plan.keys,
    )  # fmt: skip
    of_gate = by_token(dgate, z) if gated else total.new_empty(0)
    return dq, dk, dv, by_token(dweight, z), of_gate, dinitial


@delta_rule_triton_backward.register_fake
def _(grad_output, grad_final, q, k, v, weight, log_decay, fresh, kept, moves, normalize):  # type: ignore[no-untyped-def]
    (rows, length, heads, value_width), width = v.shape, q.shape[3]
    none = v.new_empty(0, dtype=torch.float32)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        none.new_empty(rows, length, heads),
        none if log_decay is None else none.new_empty(log_decay.shape),
        none.new_empty(rows, heads, width, value_width),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, weight, log_decay, initial_state, normalize, _ = inputs
    ctx.save_for_backward(q, k, v, weight, log_decay, *output[2:])
    ctx.normalize = normalize
    ctx.types = tuple(None if x is None else x.dtype for x in (weight, log_decay, initial_state))
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_final, *_grads):  # type: ignore[no-untyped-def]
    q, k, v, weight, log_decay, fresh, kept, moves = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(v)
    dq, dk, dv, *others = delta_rule_triton_backward(
        grad_output, grad_final, q, k, v, weight, log_decay, fresh, kept, moves, ctx.normalize
    )
    dw, dg, ds = (None if kind is None else x.to(kind) for x, kind in zip(others, ctx.types, strict=True))
    return dq, dk, dv, dw, dg, ds, None, None


delta_rule_triton.register_autograd(_backward, setup_context=_setup_context)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Output and final state; what the backward pass needs is kept only if there will be one."""
    inputs = (q, k, v, weight, log_decay, initial_state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    output, final, *_ = delta_rule_triton(*inputs, normalize, keep)
    return output, final
