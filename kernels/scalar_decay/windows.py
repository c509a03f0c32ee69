"""scalar_decay and ssd in Triton, a window of tokens at a time: what the backward pass needs is little, and made again.

The forward pass keeps the state that enters each window; the backward pass goes through the windows against the reading
order and makes the states of one window's chunks at a time. So beside its inputs, outputs and gradients a row of a
million tokens needs little more than one of ten thousand: one float32 state a window. Each window still fills the GPU
by its segments, and short rows go together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqlong.kernels.launch import eager, untraced
from seqlong.kernels.plans import power
from seqlong.kernels.precision import as_written
from seqlong.kernels.scalar_decay.plan import NOTHING
from seqlong.kernels.scalar_decay.triton import _forward, _gradients, as_inputs, chunk_states, types

#: Bytes of chunk states that a window may hold, unless SHORTEST needs more; twice that in the backward pass.
BUDGET = 64 << 20
#: Tokens that a window has at least: fewer, and a GPU would wait for the host, which starts a dozen kernels a window.
SHORTEST = 32_768
#: Tokens of a chunk, as far as the budget goes.
CHUNK = 64


def window(heads: int | torch.SymInt, width: int | torch.SymInt, value_width: int | torch.SymInt, itemsize: int) -> int:
    """Tokens of a window: a multiple of any chunk."""
    state = int(heads) * power(width) * power(value_width) * itemsize
    return max(SHORTEST, BUDGET // state * CHUNK // SHORTEST * SHORTEST)


class _Piece:
    """One window of one row, or several short rows."""

    def __init__(self, rows: slice, at: slice) -> None:
        self.place = (rows, at)

    def of(self, x: Tensor) -> Tensor:
        return x[self.place]

    def marks(self, starts: Tensor | None) -> Tensor | None:
        return None if starts is None else self.of(starts)


def _pieces(q: Tensor, v: Tensor, reverse: bool) -> list[list[_Piece]]:
    """For each row, or group of short rows, its windows in reading order."""
    (count, length), size = v.shape[:2], window(v.shape[2], q.shape[3], v.shape[3], v.element_size())
    cuts = [slice(a, min(a + size, length)) for a in range(0, length, size)]
    together = max(1, size // length)
    groups = [slice(a, min(a + together, count)) for a in range(0, count, together)]
    return [[_Piece(rows, at) for at in (cuts[::-1] if reverse else cuts)] for rows in groups]


@as_written
def _forward_windows(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state, and the states that enter the windows (w h k v), those of the first row first."""
    pieces = _pieces(q, v, reverse)
    output = v.new_empty(v.shape)
    shape = (v.shape[2], q.shape[3], v.shape[3])
    final = v.new_empty(v.shape[0], *shape, dtype=torch.float32)
    entries = v.new_zeros(v.shape[0] * len(pieces[0]), *shape, dtype=torch.float32)
    place = 0
    for windows in pieces:
        rows = windows[0].place[0]
        state = None if initial_state is None else initial_state[rows].float()
        for piece in windows:
            count = rows.stop - rows.start
            if state is not None:
                entries[place : place + count] = state
            place += count
            _, state, *_ = _forward(
                piece.of(q), piece.of(k), piece.of(v), piece.of(gate), bias, rate, skip, piece.marks(starts), state,
                reverse, NOTHING, out=piece.of(output),
            )  # fmt: skip
        assert state is not None
        final[rows] = state
    return output, final, entries


@as_written
def _gradients_windows(
    grad_output: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    rate: Tensor | None,
    skip: Tensor | None,
    starts: Tensor | None,
    entries: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients as those of ``scalar_decay_triton_backward``, the initial state's always."""
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    dgate = v.new_empty(v.shape[:3], dtype=torch.float32)
    dinitial = v.new_empty(v.shape[0], *entries.shape[1:], dtype=torch.float32)
    drate, dskip = (entries.new_zeros(0 if x is None else v.shape[2]) for x in (rate, skip))
    place = entries.shape[0]
    for windows in reversed(_pieces(q, v, reverse)):
        rows = windows[0].place[0]
        dstate = None if grad_final is None else grad_final[rows].float()
        for piece in reversed(windows):
            count = rows.stop - rows.start
            place -= count
            entry, marks = entries[place : place + count], piece.marks(starts)
            part = piece.of(q), piece.of(k), piece.of(v)
            kept = chunk_states(*part, piece.of(gate), bias, rate, marks, entry, reverse)
            *_, more_rate, more_skip, dstate = _gradients(
                piece.of(grad_output), dstate, *part, bias, rate, skip, marks, entry, *kept, reverse,
                out=(piece.of(dq), piece.of(dk), piece.of(dv), piece.of(dgate)),
            )  # fmt: skip
            if rate is not None:
                drate += more_rate
            if skip is not None:
                dskip += more_skip
        assert dstate is not None
        dinitial[rows] = dstate
    return dq, dk, dv, dgate, drate, dskip, dinitial


scalar_decay_windows = torch.library.custom_op(
    "seqlong::scalar_decay_windows",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor gate, Tensor? bias, Tensor? rate, Tensor? skip, Tensor? starts, "
    "Tensor? initial_state, bool reverse) -> (Tensor, Tensor, Tensor)",
)(_forward_windows)
scalar_decay_windows_backward = torch.library.custom_op(
    "seqlong::scalar_decay_windows_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? grad_final, Tensor q, Tensor k, Tensor v, Tensor gate, Tensor? bias, "
    "Tensor? rate, Tensor? skip, Tensor? starts, Tensor entries, bool reverse) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)(_gradients_windows)


@scalar_decay_windows.register_fake
def _(q, k, v, gate, bias, rate, skip, starts, initial_state, reverse):  # type: ignore[no-untyped-def]
    size = window(v.shape[2], q.shape[3], v.shape[3], v.element_size())
    shape = (v.shape[2], q.shape[3], v.shape[3])
    return (
        v.new_empty(v.shape),
        v.new_empty(v.shape[0], *shape, dtype=torch.float32),
        v.new_empty(v.shape[0] * ((v.shape[1] + size - 1) // size), *shape, dtype=torch.float32),
    )


@scalar_decay_windows_backward.register_fake
def _(grad_output, grad_final, q, k, v, gate, bias, rate, skip, starts, entries, reverse):  # type: ignore[no-untyped-def]
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        entries.new_empty(v.shape[:3]),
        *(entries.new_empty(0 if x is None else v.shape[2]) for x in (rate, skip)),
        entries.new_empty(v.shape[0], *entries.shape[1:]),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, gate, bias, rate, skip, starts, initial_state, ctx.reverse = inputs
    ctx.save_for_backward(q, k, v, gate, bias, rate, skip, starts, output[2])
    ctx.initial_type = None if initial_state is None else initial_state.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_final, *_entries):  # type: ignore[no-untyped-def]
    q, k, v, gate, bias, rate, skip, starts, entries = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(v)
    plain = untraced(grad_output, grad_final, entries) and not torch.is_grad_enabled()  # see triton._backward
    gradients = _gradients_windows if plain else scalar_decay_windows_backward
    grads = gradients(grad_output, grad_final, q, k, v, gate, bias, rate, skip, starts, entries, ctx.reverse)
    return *as_inputs(grads, [*types(gate, bias, rate, skip), ctx.initial_type]), None


scalar_decay_windows.register_autograd(_backward, setup_context=_setup_context)
eager_windows = eager(_forward_windows, _setup_context, _backward)
