"""delta_rule in Triton where each channel has its own decay (KDA): the op, its gradient, and the launches of both.

The walks are those of one decay a head (``triton.py``), given rows of q and k that have been decayed before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqlong.kernels.delta_rule import triton_backward, triton_channel, triton_forward, triton_inverse
from seqlong.kernels.delta_rule.plan import CHUNK
from seqlong.kernels.delta_rule.triton import (
    _by_head,
    _by_token,
    _kept,
    _moves,
    _readable,
    _scan,
    _Sizes,
    _sizes,
    _strides,
)
from seqlong.kernels.precision import as_written
from seqlong.kernels.runtime import use_allocator

#: log2 of a decay that is zero in float32, and far below what eight tokens that are no starts may add up to.
RESET = -256.0


class _Prepared(NamedTuple):
    early_q: Tensor  # (b t h k) queries of length 1, decayed from the chunk's entry
    early_k: Tensor
    late: Tensor  # keys decayed to the chunk's end
    weight: Tensor  # (b h n·C)
    total: Tensor  # (b t h k) sums of log2 decays in each chunk
    rq: Tensor  # (b h n·C)
    rk: Tensor
    inverse: Tensor  # (b h n C C)
    scores: Tensor
    erase: Tensor


def _prepare(q: Tensor, k: Tensor, weight: Tensor, log_decay: Tensor, normalize: bool, z: _Sizes) -> _Prepared:
    w = _by_head(weight, z)
    gate = _readable(log_decay)
    rq, rk, total = torch.empty_like(w), torch.empty_like(w), w.new_empty(gate.shape)
    early_q, early_k, late = (q.new_empty(z.B, z.T, z.H, z.K) for _ in range(3))
    inverse, scores = (q.new_empty(z.B, z.H, z.NC, CHUNK, CHUNK) for _ in range(2))
    erase = torch.empty_like(inverse, dtype=torch.float32)  # what is inverted keeps its digits
    numbers = (z.T, z.H, z.R, z.NC, *_strides(q), *_strides(k))
    triton_channel.decays[z.chunks](
        q, k, gate, total, rq, rk, early_q, early_k, late, *numbers, *_strides(gate), RESET, K=z.K, KB=z.KB,
        NORM=normalize, num_warps=8,
    )  # fmt: skip
    triton_channel.products[(4 * z.H * z.NC * z.B,)](
        q, k, total, rq, rk, scores, erase, *numbers, K=z.K, KB=z.KB, num_warps=z.plan.products
    )
    triton_inverse.invert[z.chunks](w, erase, inverse, num_warps=1)
    return _Prepared(early_q, early_k, late, w, total, rq, rk, inverse, scores, erase)


def _numbers(ready: _Prepared, z: _Sizes) -> tuple[int, ...]:
    """As if no heads shared a group: the decayed rows are each head's own."""
    return (z.T, z.H, 1, z.NC, z.NS, z.CPS, *_strides(ready.early_q), *_strides(ready.early_k))


@torch.library.custom_op(
    "seqlong::delta_rule_triton_channel",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor log_decay, Tensor? initial_state, bool normalize, "
    "bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def delta_rule_triton_channel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    normalize: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output (b t h v), final state (b h k v); for the backward pass Ṽ, the states before chunks, moves of segments."""
    use_allocator()
    q, k, v = _readable(q), _readable(k), _readable(v)
    z = _sizes(q, v)
    ready = _prepare(q, k, weight, log_decay, normalize, z)
    edge = None if initial_state is None else initial_state.float().contiguous()
    output, final = v.new_empty(z.B, z.T, z.H, z.V), ready.total.new_empty(z.B, z.H, z.K, z.V)
    fresh, kept, moves = _kept(v, z, keep)
    entry, how = (final, 0) if edge is None else (edge, 2)
    if z.NS > 1:
        entry, how = ready.total.new_empty(z.B * z.H, z.NS, z.VB, z.KB), 1
        moves = moves if keep else _moves(v, z)
        triton_forward.walk[(z.H * ((z.KB + z.VB) // z.BV) * z.NS * z.B,)](
            *ready[:3], v, *ready[3:9], entry, v, v, v, moves, moves, *_numbers(ready, z), *_strides(v), **z.tile,
            ENTRY=0, SEGMENT=True, KEEP=False, CHANNEL=True, **z.plan.launch("states"),
        )  # fmt: skip
        _scan(entry, moves, edge, z, adjoint=False)
    triton_forward.walk[z.walks](
        *ready[:3], v, *ready[3:9], entry, output, fresh, kept, final, final, *_numbers(ready, z), *_strides(v),
        **z.tile, ENTRY=how, SEGMENT=False, KEEP=keep, CHANNEL=True, **z.plan.launch("forward"),
    )  # fmt: skip
    return output, final, fresh, kept, moves if keep else v.new_empty(0, dtype=torch.float32)


@delta_rule_triton_channel.register_fake
def _(q, k, v, weight, log_decay, initial_state, normalize, keep):  # type: ignore[no-untyped-def]
    z = _sizes(q, v)
    final = v.new_empty(z.B, z.H, z.K, z.V, dtype=torch.float32)
    return v.new_empty(z.B, z.T, z.H, z.V), final, *_kept(v, z, keep)


@torch.library.custom_op(
    "seqlong::delta_rule_triton_channel_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? grad_final, Tensor q, Tensor k, Tensor v, Tensor weight, Tensor log_decay, "
    "Tensor fresh, Tensor kept, Tensor moves, bool normalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def delta_rule_triton_channel_backward(
    grad_output: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    log_decay: Tensor,
    fresh: Tensor,
    kept: Tensor,
    moves: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, weight (b t h), log_decay (b t h k) and the initial state."""
    use_allocator()
    q, k, v, go = (_readable(x) for x in (q, k, v, grad_output.to(v.dtype)))
    z = _sizes(q, v)
    ready = _prepare(q, k, weight, log_decay, normalize, z)
    early_q, early_k, late, w, total, rq, rk, inverse, scores, erase = ready
    edge = None if grad_final is None else grad_final.float().contiguous()
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    dweight, dgate, dkept = torch.empty_like(w), torch.empty_like(total), torch.empty_like(kept)
    dinitial = total.new_empty(z.B, z.H, z.K, z.V)
    entry, how = (total, 0) if edge is None else (edge, 2)
    numbers = (*_numbers(ready, z), *_strides(go))
    if z.NS > 1:
        entry, how = total.new_empty(z.B * z.H, z.NS, z.VB, z.KB), 1
        triton_backward.adjoint[z.walks](
            early_q, early_k, late, go, *ready[3:9], entry, dv, dkept, dinitial, *numbers, **z.tile, ENTRY=0,
            SEGMENT=True, CHANNEL=True, **z.plan.launch("states"),
        )  # fmt: skip
        _scan(entry, moves, edge, z, adjoint=True)
    triton_backward.adjoint[z.walks](
        early_q, early_k, late, go, *ready[3:9], entry, dv, dkept, dinitial, *numbers, **z.tile, ENTRY=how,
        SEGMENT=False, CHANNEL=True, **z.plan.launch("adjoint"),
    )  # fmt: skip
    # The inverses and scores have been read: gradients take their place.
    triton_channel.local[z.chunks](
        early_k, v, go, w, kept, fresh, erase, dv, inverse, scores, dweight, z.T, z.H, z.NC, *_strides(v),
        *_strides(go), **z.tile, num_warps=z.plan.local,
    )  # fmt: skip
    anchors = total.new_empty(z.B, z.NC, z.H, 4, z.K)
    triton_channel.keys[(4 * z.H * z.NC * z.B,)](
        q, k, go, total, rq, rk, kept, dkept, fresh, dv, inverse, scores, dq, dk, dgate, anchors, z.T, z.H, z.NC,
        *_strides(q), *_strides(k), *_strides(go), **z.tile, NORM=normalize, num_warps=z.plan.keys,
    )  # fmt: skip
    triton_channel.gates[z.chunks](dgate, anchors, z.T, z.H, z.NC, K=z.K, KB=z.KB, num_warps=4)
    return dq, dk, dv, _by_token(dweight, z), dgate, dinitial


@delta_rule_triton_channel_backward.register_fake
def _(grad_output, grad_final, q, k, v, weight, log_decay, fresh, kept, moves, normalize):  # type: ignore[no-untyped-def]
    (rows, length, heads, value_width), width = v.shape, q.shape[3]
    kind = {"dtype": torch.float32}
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        v.new_empty(rows, length, heads, **kind),
        v.new_empty(rows, length, heads, width, **kind),
        v.new_empty(rows, heads, width, value_width, **kind),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, weight, log_decay, initial_state, normalize, _ = inputs
    ctx.save_for_backward(q, k, v, weight, log_decay, *output[2:])
    ctx.normalize = normalize
    ctx.types = tuple(None if x is None else x.dtype for x in (weight, log_decay, initial_state))
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_final, *_grads):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(saved[2])
    dq, dk, dv, *others = delta_rule_triton_channel_backward(grad_output, grad_final, *saved, ctx.normalize)
    dw, dg, ds = (None if kind is None else x.to(kind) for x, kind in zip(others, ctx.types, strict=True))
    return dq, dk, dv, dw, dg, ds, None, None


delta_rule_triton_channel.register_autograd(_backward, setup_context=_setup_context)
