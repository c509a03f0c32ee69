"""delta_rule in Triton, for no gate or one a head: the op, its gradient, and the launches of both.

Forward: ``prepare`` inverts every chunk at once; a ``walk`` of all segments from zero, together with what each segment
does to a state (columns of the identity walk along), and ``scan`` find the states that enter the segments, so that one
long row fills the GPU like a batch; a second ``walk`` makes the output. Rows that fill the GPU by themselves are one
segment each and need neither of the middle two. The gradient walks the same way back, with the same transitions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqlong.kernels.delta_rule import triton_backward, triton_forward
from seqlong.kernels.delta_rule.plan import CHUNK, PLANS, Plan
from seqlong.kernels.plans import power, segments
from seqlong.kernels.precision import as_written
from seqlong.kernels.runtime import use_allocator

LOG2E = 1.4426950408889634
#: log2 of a decay that is zero in float32; no decay is below it, so that sums over a chunk keep their digits.
RESET = -160.0


class _Sizes(NamedTuple):
    """Everything a launch is cut by; K, V are widths, KB, VB the tiles that hold them, R heads share a group."""

    B: int
    T: int
    G: int
    H: int
    R: int
    K: int
    V: int
    KB: int
    VB: int
    NC: int
    NS: int
    CPS: int
    BV: int
    plan: Plan

    @property
    def tile(self) -> dict[str, int]:
        return {"K": self.K, "V": self.V, "KB": self.KB, "VB": self.VB, "BV": self.BV}

    @property
    def walks(self) -> tuple[int]:
        return (self.H * (self.VB // self.BV) * self.NS * self.B,)

    @property
    def chunks(self) -> tuple[int]:
        return (self.H * self.NC * self.B,)


def _sizes(q: Tensor, v: Tensor) -> _Sizes:
    rows, length = q.shape[:2]  # symbols where a compiler traces them; heads and widths never are
    groups, width, heads, value_width = map(int, (*q.shape[2:], *v.shape[2:]))
    plan = PLANS.settled(q, v)
    k_tile, v_tile = power(width), power(value_width)
    value_tile = min(plan.value_tile, k_tile, v_tile)
    chunks = -(-length // CHUNK)
    count, each = 1, chunks
    if isinstance(length, int) and isinstance(rows, int):  # no shape that a graph sees depends on it
        count, each = segments(q, chunks, rows * heads * (v_tile // value_tile), plan.programs_per_sm)
    return _Sizes(
        rows, length, groups, heads, heads // groups, width, value_width, k_tile, v_tile, chunks, count, each,
        value_tile, plan,
    )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride()[:3]  # type: ignore[return-value]


def _readable(x: Tensor) -> Tensor:
    """x as kernels read it: one channel after another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _by_head(x: Tensor, z: _Sizes) -> Tensor:
    """(b t h) -> (b h n·C), float32, zero past the end."""
    out = x.new_zeros(z.B, z.H, z.NC * CHUNK, dtype=torch.float32)
    out[:, :, : z.T] = x.transpose(1, 2)
    return out


class _Prepared(NamedTuple):
    weight: Tensor
    total: Tensor
    rq: Tensor
    rk: Tensor
    inverse: Tensor
    scores: Tensor


def _prepare(q: Tensor, k: Tensor, weight: Tensor, log_decay: Tensor | None, normalize: bool, z: _Sizes) -> _Prepared:
    w = _by_head(weight, z)
    g = w if log_decay is None else _by_head((log_decay.float() * LOG2E).clamp_(min=RESET), z)
    total, rq, rk = (torch.empty_like(w) for _ in range(3))
    inverse, scores = (q.new_empty(z.B, z.H, z.NC, CHUNK, CHUNK) for _ in range(2))
    triton_forward.prepare[z.chunks](
        q, k, w, g, total, rq, rk, inverse, scores, z.T, z.H, z.R, z.NC, *_strides(q), *_strides(k), K=z.K, KB=z.KB,
        NORM=normalize, GATED=log_decay is not None, num_warps=z.plan.prepare,
    )  # fmt: skip
    return _Prepared(w, total, rq, rk, inverse, scores)


def _scan(states: Tensor, moves: Tensor, edge: Tensor | None, z: _Sizes, adjoint: bool) -> None:
    tile = {**z.tile, "BV": 16}
    triton_forward.scan[(z.B * z.H, z.VB // 16)](
        states, moves, states if edge is None else edge, z.NS, **tile, EDGE=edge is not None, ADJOINT=adjoint,
        num_warps=4,
    )  # fmt: skip


def _walk_segments(q: Tensor, k: Tensor, v: Tensor, ready: _Prepared, states: Tensor | None, z: _Sizes) -> Tensor:
    """What every segment does to a state; with room for them also the states that segments make from zero."""
    moves = ready.total.new_empty(z.B * z.H, z.NS, z.KB, z.KB)
    tiles = (z.KB if states is None else z.KB + z.VB) // z.BV
    triton_forward.walk[(z.H * tiles * z.NS * z.B,)](
        q, k, k, v, *ready, moves if states is None else states, v, v, v, moves, moves, z.T, z.H, z.R, z.NC, z.NS,
        z.CPS, *_strides(q), *_strides(k), *_strides(v), **z.tile, ENTRY=0, SEGMENT=2 if states is None else 1,
        KEEP=False, CHANNEL=False, **z.plan.launch("states"),
    )  # fmt: skip
    return moves


def _entering(q: Tensor, k: Tensor, v: Tensor, ready: _Prepared, edge: Tensor | None, z: _Sizes) -> tuple[Tensor, int]:
    """The state that enters every segment, and how kernels find it (ENTRY)."""
    states = ready.total.new_empty(z.B * z.H, z.NS, z.VB, z.KB)
    _scan(states, _walk_segments(q, k, v, ready, states, z), edge, z, adjoint=False)
    return states, 1


@torch.library.custom_op(
    "seqlong::delta_rule_triton",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor? log_decay, Tensor? initial_state, bool normalize, "
    "bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (b t h v), final state (b h k v), and for the backward pass Ṽ and the states before chunks."""
    use_allocator()
    q, k, v = _readable(q), _readable(k), _readable(v)
    z = _sizes(q, v)
    ready = _prepare(q, k, weight, log_decay, normalize, z)
    edge = None if initial_state is None else initial_state.float().contiguous()
    output, final = v.new_empty(z.B, z.T, z.H, z.V), ready.total.new_empty(z.B, z.H, z.K, z.V)
    fresh, kept = _kept(v, z, keep)
    entry, how = (final, 0) if edge is None else (edge, 2)
    numbers = (z.T, z.H, z.R, z.NC, z.NS, z.CPS, *_strides(q), *_strides(k), *_strides(v))
    if z.NS > 1:
        entry, how = _entering(q, k, v, ready, edge, z)
    triton_forward.walk[z.walks](
        q, k, k, v, *ready, entry, output, fresh, kept, final, final, *numbers, **z.tile, ENTRY=how, SEGMENT=0,
        KEEP=keep, CHANNEL=False, **z.plan.launch("forward"),
    )  # fmt: skip
    return output, final, fresh, kept


def _kept(v: Tensor, z: _Sizes, keep: bool) -> tuple[Tensor, Tensor]:
    if not keep:
        return v.new_empty(0), v.new_empty(0)
    return v.new_empty(z.B, z.T, z.H, z.V), v.new_empty(z.B, z.NC, z.H, z.VB, z.KB)


@delta_rule_triton.register_fake
def _(q, k, v, weight, log_decay, initial_state, normalize, keep):  # type: ignore[no-untyped-def]
    z = _sizes(q, v)
    final = v.new_empty(z.B, z.H, z.K, z.V, dtype=torch.float32)
    return v.new_empty(z.B, z.T, z.H, z.V), final, *_kept(v, z, keep)


@torch.library.custom_op(
    "seqlong::delta_rule_triton_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? grad_final, Tensor q, Tensor k, Tensor v, Tensor weight, Tensor? log_decay, "
    "Tensor fresh, Tensor kept, bool normalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, weight (b t h), log_decay (b t h, empty if there is none) and the initial state."""
    use_allocator()
    q, k, v, go = (_readable(x) for x in (q, k, v, grad_output.to(v.dtype)))
    z = _sizes(q, v)
    ready = _prepare(q, k, weight, log_decay, normalize, z)
    w, total, rq, rk, inverse, scores = ready
    edge = None if grad_final is None else grad_final.float().contiguous()
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    dweight, dgate = torch.empty_like(total), torch.empty_like(total)
    dinitial, dkept = total.new_empty(z.B, z.H, z.K, z.V), torch.empty_like(kept)
    entry, how = (total, 0) if edge is None else (edge, 2)
    on_q, on_k, on_v, on_go = (_strides(x) for x in (q, k, v, go))
    numbers = (z.T, z.H, z.R, z.NC, z.NS, z.CPS, *on_q, *on_k, *on_go)
    if z.NS > 1:
        entry, how = total.new_empty(z.B * z.H, z.NS, z.VB, z.KB), 1
        moves = _walk_segments(q, k, v, ready, None, z)
        triton_backward.adjoint[z.walks](
            q, k, k, go, *ready, entry, dv, dkept, dinitial, *numbers, **z.tile, ENTRY=0, SEGMENT=True, CHANNEL=False,
            **z.plan.launch("states"),
        )  # fmt: skip
        _scan(entry, moves, edge, z, adjoint=True)
    triton_backward.adjoint[z.walks](
        q, k, k, go, *ready, entry, dv, dkept, dinitial, *numbers, **z.tile, ENTRY=how, SEGMENT=False, CHANNEL=False,
        **z.plan.launch("adjoint"),
    )  # fmt: skip
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
    of_gate = _by_token(dgate, z) if gated else total.new_empty(0)
    return dq, dk, dv, _by_token(dweight, z), of_gate, dinitial


def _by_token(x: Tensor, z: _Sizes) -> Tensor:
    return x[:, :, : z.T].transpose(1, 2).contiguous()


@delta_rule_triton_backward.register_fake
def _(grad_output, grad_final, q, k, v, weight, log_decay, fresh, kept, normalize):  # type: ignore[no-untyped-def]
    (rows, length, heads, value_width), width = v.shape, q.shape[3]
    total = v.new_empty(0, dtype=torch.float32)
    by_token = total.new_empty(rows, length, heads)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        by_token,
        total if log_decay is None else torch.empty_like(by_token),
        total.new_empty(rows, heads, width, value_width),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, weight, log_decay, initial_state, normalize, _ = inputs
    ctx.save_for_backward(q, k, v, weight, log_decay, *output[2:])
    ctx.normalize = normalize
    ctx.types = tuple(None if x is None else x.dtype for x in (weight, log_decay, initial_state))
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_final, *_grads):  # type: ignore[no-untyped-def]
    q, k, v, weight, log_decay, fresh, kept = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(v)
    dq, dk, dv, *others = delta_rule_triton_backward(
        grad_output, grad_final, q, k, v, weight, log_decay, fresh, kept, ctx.normalize
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
    if log_decay is not None and log_decay.dim() == 4:
        from seqlong.kernels.delta_rule.triton_by_channel import delta_rule_triton_channel

        output, final, *_ = delta_rule_triton_channel(*inputs, normalize, keep)
        return output, final
    output, final, *_ = delta_rule_triton(*inputs, normalize, keep)
    return output, final
