"""log_linear as matrix products over chunks, on any device, in pure torch.

Tokens of one chunk see each other through a dense matrix, weighted by level. All before it is in the stack of states
that enters the chunk, one a bucket (levels.py):

    o_i = Σ_j w_i[level(i, j)] attend_ij v_j + Σ_m w_i[level of m from i] query_i S_m
    S'_m' = Σ_{m in m'} turn S_m + Σ_{j in m'} key_jᵀ v_j

(chunks.py has the four matrices.) A row without segments or a state of its own is cut where positions are multiples of
the chunk, so that buckets smaller than a chunk stay empty, a whole chunk enters one bucket, and where carries go is
known beforehand; buckets that are empty throughout a block are left out. Anything else takes the general way: all
buckets, and masks made of positions. Blocks run one after another and bound the memory: the forward pass keeps the
stack at the entry of each, the backward pass goes through the blocks from the right and recomputes their insides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seqlong.kernels.log_linear import levels as lv
from seqlong.kernels.log_linear.chunks import Chunks, Decays, chunks, chunks_backward, decays
from seqlong.kernels.precision import accumulation, as_written

#: (tokens a chunk, tokens a block) by device type; both are powers of two.
SIZES = {"cpu": (64, 1024), "cuda": (64, 2048)}


class _Plan(NamedTuple):
    """Which levels and buckets the chunks of one block meet; n chunks of c tokens."""

    inside: Tensor  # (1 or b, 1 or n, 1, c, c) level of a pair
    across: Tensor  # (1 or b, 1 or n, 1, c, s) level of a bucket
    slots: list[int]  # the s buckets that are looked at
    into: list[int] | Tensor  # of each chunk, the slot into which lower ones are added up: (b n) or n numbers
    own: Tensor | None  # (b n 1 c s) 1 where a token ends in that bucket; None: the whole chunk in ``into``


class _Block(NamedTuple):
    """One block as chunks; all are (b n h ...)."""

    q: Tensor  # (... c k)
    k: Tensor  # (... c k)
    v: Tensor  # (... c v)
    beta: Tensor | None  # (... c)
    weights: Tensor  # (... c l)
    decays: Decays
    made: Chunks


def _aligned(begin: int, end: int, chunk: int, levels: int, device: torch.device) -> _Plan:
    """The plan of whole chunks at positions that are multiples of the chunk."""
    stack = lv.buckets(levels)
    ends = range(begin + chunk, end + 1, chunk)
    into = [min((p & -p).bit_length() - 1, stack - 1) for p in ends]
    # Buckets that enter, and those that chunks fill on the way.
    slots = sorted({min(bit, stack - 1) for bit in range(begin.bit_length()) if begin >> bit & 1} | set(into))
    place = torch.arange(chunk, device=device)
    inside = lv.bit_length(place[:, None] ^ place).clamp_(max=levels - 1)
    across = torch.tensor([min(slot + 1, levels - 1) for slot in slots], device=device).expand(chunk, -1)
    return _Plan(inside[None, None, None], across[None, None, None], slots, [slots.index(z) for z in into], None)


def _general(position: Tensor, chunk: int, levels: int, most: int | None) -> _Plan:
    """The plan for tokens at any ``position`` (1 or b, l), of segments of at most ``most`` tokens (None: who knows)."""
    stack = lv.buckets(levels)
    if most is not None:
        stack = min(stack, most.bit_length())
    short = -position.shape[1] % chunk
    last = position[:, -1:] + 1
    place = torch.cat([position, last.expand(-1, short)], dim=1).unflatten(1, (-1, chunk))  # (b n c)
    before, after = place[..., 0], torch.cat([place[:, :-1, -1] + 1, last], dim=1)
    inside = lv.bit_length(place[..., :, None] ^ place[..., None, :]).clamp_(max=levels - 1)
    across = lv.seen_from(place, before, stack, levels)
    bucket = torch.arange(stack, device=position.device)
    own = lv.bucket_of(place, after, stack)[..., None] == bucket
    into = lv.bucket_of(before[..., None], after, stack)[..., 0]
    return _Plan(inside[:, :, None], across[:, :, None], list(range(stack)), into, own[:, :, None])


def _chunked(x: Tensor, chunk: int) -> Tensor:
    """(b l h ...) -> (b n h c ...), zero-padded at the end."""
    short = -x.shape[1] % chunk
    if short:
        x = torch.cat([x, x.new_zeros(x.shape[0], short, *x.shape[2:])], dim=1)
    return x.unflatten(1, (-1, chunk)).transpose(2, 3).contiguous()


def _make_block(inputs: Sequence[Tensor | None], chunk: int, work: torch.dtype) -> _Block:
    """From q, k, v, log-decay, weights, beta and starts (b l ...)."""
    q, k, v, log_decay, weights = (x for x in inputs[:5] if x is not None)
    beta, starts = inputs[5:]
    repeat = v.shape[2] // q.shape[2]
    qc, kc = (_chunked(x.to(work).repeat_interleave(repeat, dim=2), chunk) for x in (q, k))
    vc, wc = _chunked(v.to(work), chunk), _chunked(weights.to(work), chunk)
    bc = None if beta is None else _chunked(beta.to(work), chunk)
    marks = None if starts is None else _chunked(starts[:, :, None], chunk)[:, :, 0]
    d = decays(_chunked(log_decay, chunk), marks, work)
    return _Block(qc, kc, vc, bc, wc, d, chunks(qc, kc, bc, d))


def _weights(block: _Block, plan: _Plan) -> tuple[Tensor, Tensor]:
    """(... c c) and (... c s): weights of pairs and of buckets."""
    lead = block.weights.shape[:4]
    inside, across = (block.weights.gather(-1, x.expand(*lead, -1)) for x in (plan.inside, plan.across))
    return inside, across


def _to_stack(block: _Block, plan: _Plan) -> Tensor:
    """(b n h s k v), or (b n h 1 k v) where each chunk enters one bucket: what the chunks' own tokens add."""
    if plan.own is None:
        return (block.made.key.mT @ block.v)[:, :, :, None]
    keys = block.made.key[..., None, :] * plan.own[..., None]  # (... c s k)
    return (keys.flatten(4).mT @ block.v).unflatten(3, keys.shape[4:])


def _into(plan: _Plan, n: int) -> Tensor | int:
    return plan.into[n] if isinstance(plan.into, list) else plan.into[:, n]


def _walk(block: _Block, plan: _Plan, state: Tensor) -> Tensor:
    """Stacks (b n+1 h s k v) at the entry of every chunk, and the one after the last."""
    add, turn = _to_stack(block, plan), block.made.turn[:, :, :, None]
    rows, chunk_count = add.shape[:2]
    states = state.new_empty(rows, chunk_count + 1, *state.shape[1:])
    states[:, 0] = state
    for n in range(chunk_count):
        into = _into(plan, n)
        turned = states[:, n] * turn[:, n] if turn.shape[-1] == 1 else turn[:, n] @ states[:, n]
        after = lv.merged(turned, into)
        if isinstance(into, int):
            after[:, :, into] += add[:, n, :, 0]
        else:
            after += add[:, n]
        states[:, n + 1] = after
    return states


def _walk_back(block: _Block, plan: _Plan, grads: Tensor, grad_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradients of stacks at entries through the output, and of the last: of turned stacks, of ``_to_stack``'s
    result (both for all chunks), and of the first stack."""
    turn = block.made.turn[:, :, :, None]
    turned, added = torch.empty_like(grads), []
    for n in reversed(range(grads.shape[1])):
        into = _into(plan, n)
        added.append(grad_state[:, :, into, None] if isinstance(into, int) else grad_state)
        grad = lv.merged_backward(grad_state, into)
        turned[:, n] = grad
        through = grad * turn[:, n] if turn.shape[-1] == 1 else turn[:, n].mT @ grad
        grad_state = through + grads[:, n]
    return turned, torch.stack(added[::-1], dim=1), grad_state


def _forward_block(block: _Block, plan: _Plan, state: Tensor) -> tuple[Tensor, Tensor]:
    """Output (b n h c v) and the stack after, of the plan's slots."""
    states = _walk(block, plan, state)
    inside, across = _weights(block, plan)
    output = (block.made.attend * inside) @ block.v
    asking = (across[..., None] * block.made.query[..., None, :]).flatten(4)  # (... c sk)
    output += asking @ states[:, :-1].flatten(3, 4)
    return output, states[:, -1]


def _backward_block(
    block: _Block, plan: _Plan, state: Tensor, grad_output: Tensor, grad_state: Tensor
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of q, k, v, log-decay, weights and beta (b n h c ...), and of the block's entry stack."""
    made, v = block.made, block.v
    entries = _walk(block, plan, state)[:, :-1]
    inside, across = _weights(block, plan)
    asking = (across[..., None] * made.query[..., None, :]).flatten(4)
    grad_entries = (asking.mT @ grad_output).view(entries.shape)
    turned, added, grad_state = _walk_back(block, plan, grad_entries, grad_state)

    reading = (grad_output @ entries.flatten(3, 4).mT).unflatten(4, (across.shape[4], -1))  # (... c s k)
    grad_query = (reading * across[..., None]).sum(dim=4)
    grad_across = (reading * made.query[..., None, :]).sum(dim=5)
    pairs = grad_output @ v.mT
    grad_attend = pairs * inside
    # Scattered by the levels met: the values of pairs in the future are zero.
    count = block.weights.shape[4]
    grad_weights = lv.by_level(pairs * made.attend, plan.inside, count) + lv.by_level(grad_across, plan.across, count)

    grad_v = (made.attend * inside).mT @ grad_output
    if plan.own is None:
        grad_key = v @ added[:, :, :, 0].mT
        grad_v += made.key @ added[:, :, :, 0]
    else:
        keys = (made.key[..., None, :] * plan.own[..., None]).flatten(4)
        grad_v += keys @ added.flatten(3, 4)
        spread = (v @ added.flatten(3, 4).mT).unflatten(4, (added.shape[3], -1))
        grad_key = (spread * plan.own[..., None]).sum(dim=4)
    if made.turn.shape[-1] == 1:
        grad_turn = (turned * entries).sum(dim=(3, 4, 5))[..., None, None]
    else:
        grad_turn = (turned @ entries.mT).sum(dim=3)
    given = Chunks(grad_attend, grad_query, grad_key, grad_turn, made.inverse)
    grad_q, grad_k, grad_beta, grad_decay = chunks_backward(given, made, block.q, block.k, block.beta, block.decays)
    return [grad_q, grad_k, grad_v, grad_decay, grad_weights, grad_beta], grad_state


def _sizes(device: torch.device, chunk: int, block: int) -> tuple[int, int]:
    default_chunk, default_block = SIZES.get(device.type, SIZES["cuda"])
    chunk = chunk or default_chunk
    return chunk, max(chunk, block or default_block)


def _cuts(length: int, chunk: int, block: int, whole: bool) -> list[tuple[int, int]]:
    """Blocks; with ``whole`` the tokens after the last whole chunk are one of their own."""
    edge = length // chunk * chunk if whole else length
    cuts = [(start, min(start + block, edge)) for start in range(0, edge, block)]
    return [*cuts, (edge, length)] if edge < length else cuts


def _plans(
    q: Tensor, levels: Tensor, starts: Tensor | None, count: Tensor | None, chunk: int, block: int
) -> tuple[list[tuple[int, int]], Tensor | None]:
    """The blocks, and positions if the row takes the general way."""
    length = q.shape[1]
    whole = starts is None and count is None
    position = None if whole else lv.positions(starts, count, length, q.device)
    return _cuts(length, chunk, block, whole), position


def _plan(position: Tensor | None, start: int, end: int, chunk: int, levels: Tensor, carried: bool) -> _Plan:
    if position is None and (end - start) % chunk == 0:
        return _aligned(start, end, chunk, levels.shape[3], levels.device)
    place = torch.arange(start, end, device=levels.device)[None] if position is None else position[:, start:end]
    most = None if carried else end
    if not carried and place.numel() and place.device.type == "cpu":  # elsewhere a look would wait for the device
        most = int(place.max()) + 1
    return _general(place, chunk, levels.shape[3], most)


@torch.library.custom_op(
    "seqlong::log_linear_chunked",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor levels, Tensor? beta, Tensor? starts, "
    "Tensor? states, Tensor? count, int chunk=0, int block=0) -> (Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def log_linear_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    levels: Tensor,
    beta: Tensor | None,
    starts: Tensor | None,
    states: Tensor | None,
    count: Tensor | None,
    chunk: int = 0,
    block: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (b t h v), the stack after (b h m k v), its count (b), and the stacks around blocks (n b h m k v).

    Products and sums are in float32 (float64 if v is) whatever the inputs. ``chunk`` is a power of two.
    """
    (rows, length, _, width), (heads, value_width) = q.shape, v.shape[2:]
    work = accumulation(v.dtype)
    chunk, block = _sizes(q.device, chunk, block)
    shape = (rows, heads, lv.buckets(levels.shape[3]), width, value_width)
    stack = torch.zeros(shape, dtype=work, device=q.device) if states is None else states.to(work).clone()
    cuts, position = _plans(q, levels, starts, count, chunk, block)
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    entries = stack.new_empty(_entries(length, block), *shape)
    for index, (start, end) in enumerate(cuts):
        entries[index] = stack
        plan = _plan(position, start, end, chunk, levels, count is not None)
        part = _make_block(_cut((q, k, v, log_decay, levels, beta, starts), start, end), chunk, work)
        result, after = _forward_block(part, plan, stack[:, :, plan.slots])
        stack[:, :, plan.slots] = after
        output[:, start:end] = result.transpose(2, 3).flatten(1, 2)[:, : end - start]
    entries[len(cuts) :] = stack
    if position is None:
        number = torch.full((rows,), length, device=q.device)
    elif length:
        number = (position[:, -1] + 1).expand(rows).clone()
    else:
        number = torch.zeros(rows, dtype=torch.long, device=q.device) if count is None else count.clone()
    return output, stack, number, entries


def _cut(tensors: tuple[Tensor | None, ...], start: int, end: int) -> list[Tensor | None]:
    return [None if x is None else x[:, start:end] for x in tensors]


def _entries(length: int, block: int) -> int:
    """Blocks, the tokens after the last whole chunk, and the end."""
    return (length + block - 1) // block + 2


@log_linear_chunked.register_fake
def _(q, k, v, log_decay, levels, beta, starts, states, count, chunk=0, block=0):  # type: ignore[no-untyped-def]
    (rows, length, _, width), (heads, value_width) = q.shape, v.shape[2:]
    work = accumulation(v.dtype)
    shape = (rows, heads, lv.buckets(levels.shape[3]), width, value_width)
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        v.new_empty(shape, dtype=work),
        v.new_empty(rows, dtype=torch.long),
        v.new_empty(_entries(length, _sizes(q.device, chunk, block)[1]), *shape, dtype=work),
    )


@torch.library.custom_op(
    "seqlong::log_linear_chunked_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? grad_states, Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor levels, "
    "Tensor? beta, Tensor? starts, Tensor? count, Tensor entries, int chunk=0, int block=0) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def log_linear_chunked_backward(
    grad_output: Tensor,
    grad_states: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    levels: Tensor,
    beta: Tensor | None,
    starts: Tensor | None,
    count: Tensor | None,
    entries: Tensor,
    chunk: int = 0,
    block: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay, levels, beta (empty without) and of the stack before."""
    repeat, work = v.shape[2] // q.shape[2], entries.dtype
    chunk, block = _sizes(q.device, chunk, block)
    grad_stack = torch.zeros(entries.shape[1:], dtype=work, device=q.device)
    if grad_states is not None:
        grad_stack += grad_states
    cuts, position = _plans(q, levels, starts, count, chunk, block)
    strength = v.new_empty(0) if beta is None else beta
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, log_decay, levels, strength)]
    for index, (start, end) in reversed(list(enumerate(cuts))):
        plan = _plan(position, start, end, chunk, levels, count is not None)
        part = _make_block(_cut((q, k, v, log_decay, levels, beta, starts), start, end), chunk, work)
        incoming = _chunked(grad_output[:, start:end].to(work), chunk)
        found, grad = _backward_block(
            part, plan, entries[index][:, :, plan.slots], incoming, grad_stack[:, :, plan.slots]
        )
        grad_stack[:, :, plan.slots] = grad
        for place, (result, piece) in enumerate(zip(grads, found, strict=True)):
            if piece is None:
                continue
            piece = piece.transpose(2, 3).flatten(1, 2)[:, : end - start]
            if place < 2 and repeat > 1:
                piece = piece.unflatten(2, (-1, repeat)).sum(dim=3)
            result[:, start:end] = piece
    return (*grads, grad_stack)  # type: ignore[return-value]


@log_linear_chunked_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_output, grad_states, q, k, v, log_decay, levels, beta, starts, count, entries, chunk=0, block=0
):
    strength = v.new_empty(0) if beta is None else beta
    inputs = (q, k, v, log_decay, levels, strength)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    return (*grads, entries.new_empty(entries.shape[1:]))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, states, count, chunk, block = inputs
    ctx.save_for_backward(*tensors, count, output[3])
    ctx.sizes = (chunk, block)
    ctx.states_type = None if states is None else states.dtype
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_states, _grad_count, _grad_entries):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, levels, beta, starts, count, entries = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(v)
    *grads, grad_beta, grad_stack = log_linear_chunked_backward(
        grad_output, grad_states, q, k, v, log_decay, levels, beta, starts, count, entries, *ctx.sizes
    )
    given = None if ctx.states_type is None else grad_stack.to(ctx.states_type)
    return *grads, None if beta is None else grad_beta, None, given, None, None, None


log_linear_chunked.register_autograd(_backward, setup_context=_setup_context)
