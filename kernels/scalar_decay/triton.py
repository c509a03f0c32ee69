"""scalar_decay and ssd in Triton: the op, its gradient, and the launches of both.

Forward: ``prepare`` sums decays inside chunks; ``segment_states`` and ``scan`` find the state that enters each segment,
so that one long row fills the GPU like a batch; ``forward`` walks every segment. Rows that fill the GPU by themselves
are one segment each and need neither of the middle two. The gradient mirrors this, see triton_backward.py.
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
from seqlong.kernels.scalar_decay import triton_backward, triton_forward
from seqlong.kernels.scalar_decay.plan import CHUNKS, NOTHING, Plan, settled


class Sizes(NamedTuple):
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
    BK: int
    plan: Plan

    @property
    def tile(self) -> dict[str, int]:
        return {"K": self.K, "V": self.V, "KB": self.KB, "VB": self.VB}

    @property
    def walks(self) -> tuple[int]:
        return (self.H * (self.VB // self.BV) * self.NS * self.B,)


def _sizes(q: Tensor, v: Tensor, ssd: bool) -> Sizes:
    rows, length = q.shape[:2]  # symbols where a compiler traces them; heads and widths never are
    groups, width, heads, value_width = map(int, (*q.shape[2:], *v.shape[2:]))
    plan = settled(q, v, ssd)
    k_tile, v_tile = power(width), power(value_width)
    chunks = -(-length // plan.chunk)
    value_tile = min(plan.value_tile, v_tile)
    if fused(groups, heads, k_tile, v_tile, ssd):
        value_tile = v_tile
    count, each = 1, chunks
    if isinstance(length, int) and isinstance(rows, int):  # no shape of a result depends on it, nor shall a graph
        count, each = segments(q, chunks, rows * heads * (v_tile // value_tile), plan.programs_per_sm)
    return Sizes(
        rows, length, groups, heads, heads // groups, width, value_width, k_tile, v_tile, chunks, count, each,
        value_tile, min(plan.key_slice, k_tile), plan,
    )  # fmt: skip


def fused(groups: int, heads: int, k_tile: int, v_tile: int, ssd: bool) -> bool:
    """Whether one kernel makes every gradient."""
    return groups == heads and max(k_tile, v_tile) <= 64 and not ssd


def _heads(heads: int, most: int) -> tuple[int, int]:
    """Heads that a program takes, a power of two, and programs; triton.cdiv costs microseconds on the host."""
    wide = min(most, 1 << (heads - 1).bit_length())
    return wide, -(-heads // wide)


def _prepare(gate: Tensor, bias: Tensor | None, rate: Tensor | None, starts: Tensor | None, reverse: bool, z: Sizes):  # type: ignore[no-untyped-def]
    total = gate.new_empty(z.B, z.H, z.NC * z.plan.chunk, dtype=torch.float32)
    late = torch.empty_like(total) if rate is not None else total
    wide, programs = _heads(z.H, 32)
    triton_forward.prepare[(z.NC * z.B, programs)](
        gate, total if bias is None else bias, total if rate is None else rate,
        total if starts is None else bytes_of(starts), total, late, z.T, z.H, z.NC, *gate.stride(),
        C=z.plan.chunk, BH=wide, SSD=rate is not None, BIAS=bias is not None, STARTS=starts is not None, REV=reverse,
        num_warps=4,
    )  # fmt: skip
    return total, late


def _walk(x: Tensor, y: Tensor, total: Tensor, late: Tensor, edge: Tensor | None, z: Sizes, ssd: bool, reverse: bool,
          adjoint: bool) -> tuple[Tensor, int]:  # fmt: skip
    """The state that enters every segment of a walk, and how kernels find it (ENTRY)."""
    if z.NS == 1:
        return (total, 0) if edge is None else (edge, 2)
    states = total.new_empty(z.B * z.H, z.NS, z.KB, z.VB)
    decays = total.new_empty(z.B * z.H, z.NS)
    if z.R % 2 == 0 and z.V == z.VB <= 64 and z.K * x.element_size() <= 256:
        triton_forward.paired_states[(z.H // 2 * z.NS * z.B,)](
            x, y, total, late, states, decays, z.T, z.H, z.R, z.NC, z.NS, z.CPS, *strides(x), *strides(y), K=z.K,
            V=z.V, KB=z.KB, C=z.plan.chunk, SSD=ssd, REV=reverse, ADJOINT=adjoint, **z.plan.launch("states"),
        )  # fmt: skip
        return _scanned(states, decays, edge, z, reverse != adjoint), 1
    triton_forward.segment_states[z.walks](
        x, y, total, late, states, decays, states, states, z.T, z.H, z.R, z.NC, z.NS, z.CPS, *strides(x), *strides(y),
        **z.tile, BV=z.BV, C=z.plan.chunk, SSD=ssd, REV=reverse, ADJOINT=adjoint, ENTRY=0, KEEP=False,
        **z.plan.launch("states"),
    )  # fmt: skip
    return _scanned(states, decays, edge, z, reverse != adjoint), 1


def _scanned(states: Tensor, decays: Tensor, edge: Tensor | None, z: Sizes, leftward: bool) -> Tensor:
    block = min(128, z.KB * z.VB)
    triton_forward.scan[(z.B * z.H, z.KB * z.VB // block)](
        states, decays, states if edge is None else edge, z.NS, K=z.K, V=z.V, VB=z.VB, KV=z.KB * z.VB,
        INITIAL=edge is not None, LEFTWARD=leftward, BLOCK=block, num_warps=2,
    )  # fmt: skip
    return states


@as_written
def chunk_states(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    rate: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the forward pass keeps for the backward, without its output: decays, delays, states entering the chunks."""
    use_allocator()
    ssd = rate is not None
    k, v = readable(k), readable(v)
    z = _sizes(q, v, ssd)
    total, late = _prepare(gate, single(bias), single(rate), starts, reverse, z)
    entry, how = _walk(k, v, total, late, single(initial_state), z, ssd, reverse, adjoint=False)
    kept = k.new_empty(z.B, z.NC, z.H, z.VB, z.KB)
    triton_forward.segment_states[z.walks](
        k, v, total, late, total, total, entry, kept, z.T, z.H, z.R, z.NC, z.NS, z.CPS, *strides(k), *strides(v),
        **z.tile, BV=z.BV, C=z.plan.chunk, SSD=ssd, REV=reverse, ADJOINT=False, ENTRY=how, KEEP=True,
        **z.plan.launch("states"),
    )  # fmt: skip
    return total, late if ssd else total.new_empty(0), kept


@as_written
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    rate: Tensor | None,
    skip: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    keep: int,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output (b t h v), final state (b h k v), and for the backward pass: running decays, delays, kept states.

    With ``rate`` (ssd) the gate is a raw step: decay = rate · softplus(gate + bias), v weighs that step, and skip · v
    is added. ``out`` is contiguous memory for the output.
    """
    use_allocator()
    ssd = rate is not None
    q, k, v = readable(q), readable(k), readable(v)
    z = _sizes(q, v, ssd)
    total, late = _prepare(gate, single(bias), single(rate), starts, reverse, z)
    entry, how = _walk(k, v, total, late, single(initial_state), z, ssd, reverse, adjoint=False)
    output = v.new_empty(z.B, z.T, z.H, z.V) if out is None else out
    final = total.new_empty(z.B, z.H, z.K, z.V)
    kept = _kept(v, z, keep)
    triton_forward.forward[z.walks](
        q, k, v, total, late, total if skip is None else single(skip), entry, output, kept, final, z.T, z.H, z.R, z.NC,
        z.NS, z.CPS, *strides(q), *strides(k), *strides(v), **z.tile, BV=z.BV, C=z.plan.chunk, SSD=ssd,
        SKIP=skip is not None, ENTRY=how, KEEP=keep == CHUNKS, REV=reverse, **z.plan.launch("forward"),
    )  # fmt: skip
    if keep == NOTHING:
        return output, final, total.new_empty(0), total.new_empty(0), kept
    return output, final, total, late if ssd else total.new_empty(0), kept


scalar_decay_triton = torch.library.custom_op(
    "seqlong::scalar_decay_triton",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor gate, Tensor? bias, Tensor? rate, Tensor? skip, Tensor? starts, "
    "Tensor? initial_state, bool reverse, int keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)(_forward)


def _kept(v: Tensor, z: Sizes, keep: int) -> Tensor:
    """Room for the state that enters each chunk, if the backward pass is to find it."""
    return v.new_empty((z.B, z.NC, z.H, z.VB, z.KB) if keep == CHUNKS else 0)


@scalar_decay_triton.register_fake
def _(q, k, v, gate, bias, rate, skip, starts, initial_state, reverse, keep):  # type: ignore[no-untyped-def]
    ssd = rate is not None
    z = _sizes(q, v, ssd)
    total = v.new_empty(z.B, z.H, z.NC * z.plan.chunk, dtype=torch.float32)
    none = total.new_empty(0)
    return (
        v.new_empty(z.B, z.T, z.H, z.V),
        total.new_empty(z.B, z.H, z.K, z.V),
        none if keep == NOTHING else total,
        torch.empty_like(total) if ssd and keep != NOTHING else none.clone(),
        _kept(v, z, keep),
    )


@as_written
def _gradients(
    grad_output: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rate: Tensor | None,
    skip: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    total: Tensor,
    late: Tensor,
    kept: Tensor,
    reverse: bool,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gate (b t h), rate, skip and the initial state, all but the first three in float32.

    ``out`` is contiguous memory for the first four.
    """
    use_allocator()
    ssd = rate is not None
    q, k, v, go = (readable(x) for x in (q, k, v, grad_output.to(v.dtype)))
    z = _sizes(q, v, ssd)
    if not ssd:
        late = total
    initial = single(initial_state)
    entry, how = _walk(q, go, total, late, single(grad_final), z, ssd, reverse, adjoint=True)
    fresh = out or (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), total.new_empty(z.B, z.T, z.H))
    dq, dk, dv, dgate = fresh
    dinitial = total.new_empty(z.B, z.H, z.K, z.V) if initial is not None else total.new_empty(0)
    common = dict(**z.tile, C=z.plan.chunk, REV=reverse)
    if fused(z.G, z.H, z.KB, z.VB, ssd):
        triton_backward.fused[(z.H * z.NS * z.B,)](
            q, k, v, total, go, kept, entry, dq, dk, dv, dgate, dinitial, z.T, z.H, z.NC, z.NS, z.CPS, *strides(q),
            *strides(k), *strides(v), *strides(go), **common, ENTRY=how, DINITIAL=initial is not None,
            **z.plan.launch("fused"),
        )  # fmt: skip
        if starts is not None:
            dgate.masked_fill_(starts[..., None], 0)
        return dq, dk, dv, dgate, total.new_empty(0), total.new_empty(0), dinitial
    dkept = torch.empty_like(kept)
    triton_backward.values[z.walks](
        q, k, total, late, total if skip is None else single(skip), go, entry, dv, dkept, dinitial, z.T, z.H, z.R, z.NC,
        z.NS, z.CPS, *strides(q), *strides(k), *strides(go), **common, BV=z.BV, SSD=ssd, SKIP=skip is not None,
        ENTRY=how, DINITIAL=initial is not None, **z.plan.launch("values"),
    )  # fmt: skip
    slices = z.KB // z.BK
    shared = z.R > 1 or ssd
    anchors = total.new_empty(slices, z.B, z.H, z.NC, z.VB if shared else 1)
    all_strides = (*strides(q), *strides(k), *strides(v), *strides(go))
    if shared:
        terms, through = torch.empty_like(total), torch.empty_like(total)
        outer, across = (total.new_empty(slices, *total.shape) for _ in range(2))
        skips = torch.empty_like(total) if skip is not None else total
        scores = v.new_empty(z.B, z.NC, z.G, z.plan.chunk, z.plan.chunk)
        triton_backward.shared_scores[(z.G * z.NC * z.B,)](
            q, k, v, total, late, go, scores, terms, through, skips, z.T, z.H, z.G, z.NC, *all_strides, **common,
            SSD=ssd, SKIP=skip is not None, **z.plan.launch("scores"),
        )  # fmt: skip
        triton_backward.shared_keys[(slices * z.G * z.NC * z.B,)](
            q, k, v, total, late, go, kept, dkept, scores, dq, dk, outer, across, anchors, z.T, z.H, z.G, z.NC, z.B,
            *all_strides, **common, BK=z.BK, SSD=ssd, **z.plan.launch("keys"),
        )  # fmt: skip
    else:
        terms = total.new_empty(slices, *total.shape)
        outer = through = across = skips = terms
        runs = -(-z.NC // z.plan.run)
        triton_backward.keys[(slices * z.H * runs * z.B,)](
            q, k, v, total, go, kept, dkept, dq, dk, terms, anchors, z.T, z.H, z.NC, z.B, z.plan.run, *all_strides,
            **common, BK=z.BK, BV=min(z.VB, 128), **z.plan.launch("keys"),
        )  # fmt: skip
    drate = total.new_empty(z.B, z.NC, z.H) if ssd else total
    dskip = torch.empty_like(drate) if skip is not None else total
    wide, programs = _heads(z.H, 16)
    triton_backward.gates[(z.NC * z.B, programs)](
        terms, outer, through, across, skips, anchors, total, late, total if rate is None else single(rate),
        total if starts is None else bytes_of(starts), dgate, drate, dskip, z.T, z.H, z.NC, z.B, NK=slices,
        VB=z.VB, C=z.plan.chunk, BH=wide, SHARED=shared, SSD=ssd, SKIP=skip is not None, STARTS=starts is not None,
        REV=reverse, num_warps=4,
    )  # fmt: skip
    none = total.new_empty(0)
    sums = (drate.sum((0, 1)) if ssd else none, dskip.sum((0, 1)) if skip is not None else none.clone())
    return dq, dk, dv, dgate, *sums, dinitial


scalar_decay_triton_backward = torch.library.custom_op(
    "seqlong::scalar_decay_triton_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? grad_final, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? rate, "
    "Tensor? skip, Tensor? starts, Tensor? initial_state, Tensor total, Tensor late, Tensor kept, bool reverse) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)(_gradients)


@scalar_decay_triton_backward.register_fake
def _(grad_output, grad_final, q, k, v, bias, rate, skip, starts, initial_state, total, late, kept, reverse):  # type: ignore[no-untyped-def]
    none = total.new_empty(0)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        total.new_empty(v.shape[:3]),
        none if rate is None else total.new_empty(v.shape[2]),
        none.clone() if skip is None else total.new_empty(v.shape[2]),
        none.clone() if initial_state is None else total.new_empty(*v.shape[::2], q.shape[3], v.shape[3]),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, gate, bias, rate, skip, starts, initial_state, ctx.reverse, _ = inputs
    ctx.save_for_backward(q, k, v, bias, rate, skip, starts, initial_state, *output[2:])
    ctx.gate_type = gate.dtype
    ctx.set_materialize_grads(False)


def as_inputs(grads, like):  # type: ignore[no-untyped-def]
    """Gradients of q, k, v, gate, bias, rate, skip, starts and the initial state, in the types of ``like``.

    Args:
        grads: those of q, k, v, gate, rate, skip and the initial state.
        like: types of gate, bias, rate, skip and the initial state; None where there was no such input.
    """
    dq, dk, dv, dgate, drate, dskip, dinitial = grads
    bias = None if like[1] is None else dgate.sum((0, 1))
    rest = zip((dgate, bias, drate, dskip, dinitial), like, strict=True)
    dgate, bias, drate, dskip, dinitial = (None if dtype is None else x.to(dtype) for x, dtype in rest)
    return dq, dk, dv, dgate, bias, drate, dskip, None, dinitial


def types(*inputs):  # type: ignore[no-untyped-def]
    return [None if x is None else x.dtype for x in inputs]


def _backward(ctx, grad_output, grad_final, *_kept):  # type: ignore[no-untyped-def]
    q, k, v, bias, rate, skip, starts, initial_state, total, late, kept = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(v)
    # With gradients on, a second derivative is wanted: the op says that it has none, the plain function would not.
    plain = untraced(grad_output, grad_final, total) and not torch.is_grad_enabled()
    gradients = _gradients if plain else scalar_decay_triton_backward
    grads = gradients(
        grad_output, grad_final, q, k, v, bias, rate, skip, starts, initial_state, total, late, kept, ctx.reverse
    )
    return *as_inputs(grads, [ctx.gate_type, *types(bias, rate, skip, initial_state)]), None, None


scalar_decay_triton.register_autograd(_backward, setup_context=_setup_context)
_eager = eager(_forward, _setup_context, _backward)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    rate: Tensor | None,
    skip: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """Output and final state of inputs of any width: padded to what kernels can read, and cut to the caller's again."""
    width, value_width = q.shape[3], v.shape[3]
    per = 16 // v.element_size()
    wide = -(-width // per) * per
    # Several heads are read through one window onto v: a tile must not reach into the next head.
    value_wide = power(value_width) if q.shape[2] != v.shape[2] or rate is not None else -(-value_width // per) * per
    if wide != width:
        q, k = (F.pad(x, (0, wide - width)) for x in (q, k))
    if value_wide != value_width:
        v = F.pad(v, (0, value_wide - value_width))
    if initial_state is not None and (wide, value_wide) != (width, value_width):
        initial_state = F.pad(initial_state, (0, value_wide - value_width, 0, wide - width))
    inputs = (q, k, v, gate, bias, rate, skip, starts, initial_state)
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    plain = untraced(*inputs)  # then by the shortest way: not the op, but the same functions
    if needed and recompute:
        from seqlong.kernels.scalar_decay.windows import eager_windows, scalar_decay_windows

        output, final, *_ = (eager_windows if plain else scalar_decay_windows)(*inputs, reverse)
    else:
        call = scalar_decay_triton if not plain else _eager if needed else _forward
        output, final, *_ = call(*inputs, reverse, CHUNKS if needed else NOTHING)
    if (wide, value_wide) != (width, value_width):
        output, final = output[..., :value_width], final[..., :width, :value_width]
    return output, final
