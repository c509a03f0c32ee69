"""vector_decay as matrix products over chunks, on any device, in pure torch.

With P_i the product of a chunk's decays up to token i and R_j that of those after token j, channel by channel,

    O = scores V + (Q ⊙ P) S            S' = diag(P_c) S + (K ⊙ R)ᵀ V

and the scores of ``tree.py``, which never divide. Blocks of chunks run one after another and bound the memory: the
forward pass keeps the state at the entry of each block, the backward pass goes through the blocks from the end and
makes their insides again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqlong.kernels.precision import accumulation, as_written
from seqlong.kernels.vector_decay.gates import activated, gradient
from seqlong.kernels.vector_decay.tree import Within, within

#: (tokens a chunk, tokens a block) by device type, measured: the insides of a block stay in a CPU's cache.
SIZES = {"cpu": (64, 512), "cuda": (64, 16384)}


class _Call(NamedTuple):
    """What does not change from block to block."""

    activation: str
    divisor: float
    lower_bound: Tensor | None
    bonus: Tensor | None
    reverse: bool
    chunk: int
    block: int
    work: torch.dtype
    kept: torch.dtype


class _Block(NamedTuple):
    """One block as chunks, in reading order: n chunks of c tokens."""

    q: Tensor  # (b n h c k)
    k: Tensor  # (b n h c k)
    v: Tensor  # (b n h c v)
    decay: Tensor  # (b n h c k), zero at a start
    own: Tensor  # (b n h c k) what the token's query sees of it
    gate: Tensor  # (b l h k) as given, in the type of sums
    starts: Tensor | None  # (b l)


def _chunked(x: Tensor, chunk: int, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """(b l h d) -> (b n h c d), filled up at the end."""
    rows, length, heads, width = x.shape
    n = -(-length // chunk)
    made = torch.empty(rows, n, heads, chunk, width, dtype=dtype, device=x.device)
    whole = length // chunk
    if whole:
        made[:, :whole] = x[:, : whole * chunk].unflatten(1, (whole, chunk)).transpose(2, 3)
    if whole < n:
        rest = length - whole * chunk
        made[:, whole, :, :rest] = x[:, whole * chunk :].transpose(1, 2)
        made[:, whole, :, rest:] = fill
    return made


def _merged(x: Tensor, length: int) -> Tensor:
    """(b n h c d) -> (b, length, h, d)."""
    return x.transpose(2, 3).flatten(1, 2)[:, :length]


def _part(x: Tensor, a: int, z: int, call: _Call) -> Tensor:
    return x[:, a:z].flip(1) if call.reverse else x[:, a:z]


def _put(x: Tensor, a: int, z: int, part: Tensor, call: _Call) -> None:
    x[:, a:z] = part.flip(1) if call.reverse else part


def _make_block(
    q: Tensor, k: Tensor | None, v: Tensor, gate: Tensor, starts: Tensor | None, a: int, z: int, call: _Call
) -> _Block:
    gates = _part(gate, a, z, call).to(call.kept)
    decays, keys = activated(gates, call.activation, call.divisor, call.lower_bound)
    keys = _part(k, a, z, call) if k is not None else keys
    assert keys is not None
    decay = _chunked(decays, call.chunk, call.kept, 1.0)
    own = decay if call.bonus is None else torch.ones_like(decay)
    begins = None if starts is None else _part(starts, a, z, call)
    if begins is not None:
        never = _chunked(begins[:, :, None, None], call.chunk, torch.bool)
        decay = decay.masked_fill_(never, 0)
        own = decay if call.bonus is None else own.masked_fill_(never, 0)
    return _Block(
        _chunked(_part(q, a, z, call), call.chunk, call.kept),
        _chunked(keys, call.chunk, call.kept),
        _chunked(_part(v, a, z, call), call.chunk, call.work),
        decay,
        own,
        gates,
        begins,
    )


def _inside(block: _Block, grad: Tensor | None, call: _Call) -> Within:
    """``within`` with its results as (b n h ...)."""
    shape = block.q.shape[:3]
    q, k, decay, own = (x.flatten(0, 2) for x in (block.q, block.k, block.decay, block.own))
    found = within(q, k, decay, own, None if grad is None else grad.flatten(0, 2), call.work)
    scores, enter, leave, carry = (x.unflatten(0, shape) for x in found[:4])
    dq, dk = (None if x is None else x.unflatten(0, shape) for x in found[4:])
    return Within(scores, enter, leave, carry, dq, dk)


def _entry_states(block: _Block, inside: Within, state: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    """The keys that reach the chunk's end, and states (b n+1 h k v) at every chunk's entry and after the last."""
    leaving = (block.k * inside.leave).to(call.work)
    update = (leaving.mT @ block.v).to(call.kept)
    states = state.new_empty(state.shape[0], update.shape[1] + 1, *state.shape[1:])
    states[:, 0] = state
    for n in range(update.shape[1]):
        torch.addcmul(update[:, n], states[:, n], inside.carry[:, n, :, :, None], out=states[:, n + 1])
    return leaving, states


def _forward_block(block: _Block, state: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    inside = _inside(block, None, call)
    _, states = _entry_states(block, inside, state, call)
    itself = (_weighed(block.k, call) * block.q).sum(dim=-1)
    inside.scores.diagonal(dim1=-2, dim2=-1).copy_(itself)
    entering = (block.q * inside.enter).to(call.work)
    output = inside.scores @ block.v
    output += entering @ states[:, :-1].to(call.work)
    return output, states[:, -1]


def _weighed(x: Tensor, call: _Call) -> Tensor:
    """x (b n h c k), weighed as the token weighs in its own output."""
    return x if call.bonus is None else x * call.bonus[:, None]


def _backward_block(
    block: _Block, entry: Tensor, grad_output: Tensor, grad_state: Tensor, call: _Call
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, v, log-decay (b n h c .), bonus (h k), and of the block's entry state."""
    grad_scores = grad_output @ block.v.mT
    inside = _inside(block, grad_scores, call)
    leaving, states = _entry_states(block, inside, entry, call)
    entering = (block.q * inside.enter).to(call.work)
    source = (entering.mT @ grad_output).to(call.kept)
    grad_states = torch.empty_like(states)
    grad_states[:, -1] = grad_state
    for n in reversed(range(source.shape[1])):
        torch.addcmul(source[:, n], grad_states[:, n + 1], inside.carry[:, n, :, :, None], out=grad_states[:, n])
    exits = grad_states[:, 1:].to(call.work)
    assert inside.dq is not None and inside.dk is not None
    dq = inside.dq.addcmul_((grad_output @ states[:, :-1].to(call.work).mT).to(call.kept), inside.enter)
    dk = inside.dk.addcmul_((block.v @ exits.mT).to(call.kept), inside.leave)

    # The log-decay, anchored at the chunk's end, from gradients that are not rounded yet and lack the token itself.
    through_q = block.q * dq
    terms = torch.addcmul(through_q, block.k, dk, value=-1)
    anchor = (states[:, 1:] * grad_states[:, 1:]).sum(dim=-1)
    later = terms.flip(-2).cumsum(dim=-2).flip(-2)
    dg = later.add_(anchor[:, :, :, None])
    if call.bonus is not None:
        dg -= through_q  # the query does not see its own decay

    itself = (_weighed(block.k, call) * block.q).sum(dim=-1)
    inside.scores.diagonal(dim1=-2, dim2=-1).copy_(itself)
    dv = inside.scores.mT @ grad_output
    dv += leaving @ exits
    grad_itself = grad_scores.diagonal(dim1=-2, dim2=-1)[..., None].to(call.kept)
    dbonus = None if call.bonus is None else (grad_itself * block.q * block.k).sum(dim=(0, 1, 3))
    dq = dq.addcmul_(grad_itself, _weighed(block.k, call))
    dk = dk.addcmul_(grad_itself, _weighed(block.q, call))
    return dq, dk, dv, dg, dbonus, grad_states[:, 0]


def _blocks(length: int, call: _Call) -> list[tuple[int, int]]:
    """The tokens of each block, in reading order."""
    cuts = [(a, min(a + call.block, length)) for a in range(0, length, call.block)]
    return [(length - z, length - a) for a, z in cuts] if call.reverse else cuts


def _sizes(q: Tensor, chunk: int, block: int) -> tuple[int, int]:
    default_chunk, default_block = SIZES.get(q.device.type, SIZES["cuda"])
    chunk = chunk or min(default_chunk, max(16, 1 << max(q.shape[1] - 1, 0).bit_length()))
    return chunk, max(chunk, block or default_block)


def _call(q: Tensor, v: Tensor, activation: str, divisor: float, lower_bound: Tensor | None, bonus: Tensor | None,
          reverse: bool, chunk: int, block: int) -> _Call:  # fmt: skip
    # Matrix products run in the input type on a GPU, whose accumulators are float32, and in float32 on a CPU.
    work = torch.float64 if v.dtype == torch.float64 else v.dtype if q.is_cuda else torch.float32
    kept = accumulation(work)
    bound, weight = (None if x is None else x.to(kept) for x in (lower_bound, bonus))
    return _Call(activation, divisor, bound, weight, reverse, *_sizes(q, chunk, block), work, kept)


@torch.library.custom_op(
    "seqlong::vector_decay_chunked",
    mutates_args=(),
    schema="(Tensor q, Tensor? k, Tensor v, Tensor gate, str activation, float divisor, Tensor? lower_bound, "
    "Tensor? bonus, Tensor? starts, Tensor? initial_state, bool reverse, int chunk=0, int block=0) "
    "-> (Tensor, Tensor, Tensor)",
)
@as_written
def vector_decay_chunked(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor,
    activation: str,
    divisor: float,
    lower_bound: Tensor | None,
    bonus: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    chunk: int = 0,
    block: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (b t h v), final state (b h k v), and the states at the entry of every block (m b h k v).

    ``chunk`` is a power of two.
    """
    (rows, length, heads, width), value_width = q.shape, v.shape[3]
    call = _call(q, v, activation, divisor, lower_bound, bonus, reverse, chunk, block)
    if initial_state is None:
        state = v.new_zeros(rows, heads, width, value_width, dtype=call.kept)
    else:
        state = initial_state.to(call.kept, copy=True, memory_format=torch.contiguous_format)
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    blocks = _blocks(length, call)
    entries = state.new_empty(len(blocks), *state.shape)
    for index, (a, z) in enumerate(blocks):
        entries[index] = state
        part, state = _forward_block(_make_block(q, k, v, gate, starts, a, z, call), state, call)
        _put(output, a, z, _merged(part, z - a), call)
    return output, state.clone(memory_format=torch.contiguous_format), entries


@vector_decay_chunked.register_fake
def _(q, k, v, gate, activation, divisor, lower_bound, bonus, starts, initial_state, reverse, chunk=0, block=0):  # type: ignore[no-untyped-def]
    (rows, length, heads, width), value_width = q.shape, v.shape[3]
    # Without asking for the length's power of two, which would fix a symbolic length.
    block = max(chunk, block or SIZES.get(q.device.type, SIZES["cuda"])[1])
    state = v.new_empty(rows, heads, width, value_width, dtype=accumulation(v.dtype))
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        state,
        state.new_empty((length + block - 1) // block, rows, heads, width, value_width),
    )


@torch.library.custom_op(
    "seqlong::vector_decay_chunked_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? grad_final, Tensor q, Tensor? k, Tensor v, Tensor gate, str activation, "
    "float divisor, Tensor? lower_bound, Tensor? bonus, Tensor? starts, Tensor entries, bool reverse, int chunk=0, "
    "int block=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def vector_decay_chunked_backward(
    grad_output: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor,
    activation: str,
    divisor: float,
    lower_bound: Tensor | None,
    bonus: Tensor | None,
    starts: Tensor | None,
    entries: Tensor,
    reverse: bool,
    chunk: int = 0,
    block: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gate, lower_bound, bonus and the initial state; empty for what was not given."""
    call = _call(q, v, activation, divisor, lower_bound, bonus, reverse, chunk, block)
    state = entries.new_zeros(entries.shape[1:]) if grad_final is None else grad_final.to(call.kept)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, v, gate)]
    dk = entries.new_empty(0) if k is None else torch.empty_like(k, memory_format=torch.contiguous_format)
    learned = (call.lower_bound, call.bonus)
    dbound, dbonus = (entries.new_empty(0) if x is None else torch.zeros_like(x) for x in learned)
    for index, (a, z) in reversed(list(enumerate(_blocks(q.shape[1], call)))):
        block_ = _make_block(q, k, v, gate, starts, a, z, call)
        incoming = _chunked(_part(grad_output, a, z, call), call.chunk, call.work)
        dq, keys, dv, dg, weights, state = _backward_block(block_, entries[index], incoming, state, call)
        dq, keys, dv, dg = (_merged(x, z - a) for x in (dq, keys, dv, dg))
        if block_.starts is not None:
            dg = dg.masked_fill(block_.starts[..., None, None], 0)  # the decay is not applied there
        dgate, bounds = gradient(block_.gate, activation, divisor, call.lower_bound, dg, keys)
        if k is not None:
            _put(dk, a, z, keys, call)
        if bounds is not None:
            dbound += bounds.sum(dim=(0, 1))
        if weights is not None:
            dbonus += weights
        for whole, part in zip(grads, (dq, dv, dgate), strict=True):
            _put(whole, a, z, part, call)
    return grads[0], dk, grads[1], grads[2], dbound, dbonus, state.clone(memory_format=torch.contiguous_format)


@vector_decay_chunked_backward.register_fake
def _(grad_output, grad_final, q, k, v, gate, activation, divisor, lower_bound, bonus, starts, entries, reverse,
      chunk=0, block=0):  # type: ignore[no-untyped-def]  # fmt: skip
    dq, dv, dgate = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, v, gate))
    dk = entries.new_empty(0) if k is None else torch.empty_like(k, memory_format=torch.contiguous_format)
    bounds = [entries.new_empty(0) if x is None else entries.new_empty(x.shape) for x in (lower_bound, bonus)]
    return dq, dk, dv, dgate, *bounds, entries.new_empty(entries.shape[1:])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, gate, activation, divisor, lower_bound, bonus, starts, initial_state, reverse, chunk, block = inputs
    ctx.save_for_backward(q, k, v, gate, lower_bound, bonus, starts, output[2])
    ctx.settings = activation, divisor, reverse, chunk, block
    ctx.types = [None if x is None else x.dtype for x in (k, lower_bound, bonus, initial_state)]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_final, _grad_entries):  # type: ignore[no-untyped-def]
    q, k, v, gate, lower_bound, bonus, starts, entries = ctx.saved_tensors
    activation, divisor, reverse, chunk, block = ctx.settings
    if grad_output is None:
        grad_output = torch.zeros_like(v)
    dq, dk, dv, dgate, *rest = vector_decay_chunked_backward(
        grad_output, grad_final, q, k, v, gate, activation, divisor, lower_bound, bonus, starts, entries, reverse,
        chunk, block,
    )  # fmt: skip
    dk, *rest = (None if dtype is None else x.to(dtype) for x, dtype in zip((dk, *rest), ctx.types, strict=True))
    return dq, dk, dv, dgate, None, None, *rest[:2], None, rest[2], None, None, None


vector_decay_chunked.register_autograd(_backward, setup_context=_setup_context)
