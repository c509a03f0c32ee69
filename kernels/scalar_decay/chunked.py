"""scalar_decay as matrix products over chunks, on any device, in pure torch.

The row is cut into blocks, and each block into chunks of c tokens. Within a chunk, with b the running sum of g:

    O = (Q Kᵀ ⊙ exp(b_i - b_j), j <= i) V + exp(b) ⊙ (Q S)
    S' = exp(b_c) S + (K ⊙ exp(b_c - b))ᵀ V

so that no exponent is ever positive. Blocks run one after another and bound the memory: the forward pass keeps the
state at the entry of each block, the backward pass goes through the blocks from the right and recomputes their insides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqlong.kernels.precision import accumulation, as_written

#: (tokens a chunk, tokens a block) by device type, measured.
SIZES = {"cpu": (64, 1024), "cuda": (128, 32768)}


class _Block(NamedTuple):
    """One block as chunks: n chunks of c tokens, heads as g groups of r heads."""

    q: Tensor  # (b n g c k)
    k: Tensor  # (b n g c k)
    v: Tensor  # (b n g c r v)
    total: Tensor  # (b n g r c) running sum of the log-decay in its chunk
    within: Tensor  # (b n g r c c) decay from token j to token i, 0 where j > i or in another segment
    enter: Tensor  # (b n g c r 1) decay from the chunk's entry to token i
    leave: Tensor  # (b n g c r 1) decay from token j to the chunk's end
    carry: Tensor  # (b n g 1 r 1) decay over the whole chunk


def _chunked(x: Tensor, chunk: int) -> Tensor:
    """(b, l, ...) -> (b, n, c, ...), zero-padded at the end."""
    short = -x.shape[1] % chunk
    if short:
        x = torch.cat([x, x.new_zeros(x.shape[0], short, *x.shape[2:])], dim=1)
    return x.reshape(x.shape[0], x.shape[1] // chunk, chunk, *x.shape[2:])


def _make_block(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None, chunk: int, work: torch.dtype
) -> _Block:
    groups = q.shape[2]
    kept = accumulation(work)
    qc, kc = (_chunked(x.to(work), chunk).transpose(2, 3).contiguous() for x in (q, k))
    vc = _chunked(v.to(work), chunk)
    vc = vc.unflatten(3, (groups, -1)).transpose(2, 3).contiguous()
    # A sum that held -1e6 would have no digits left for the tokens after it; e^floor is zero in the type of sums. Sums
    # and their differences are in float64: gates that forget much would cost those after them digits else.
    floor = -111.0 if kept == torch.float32 else -746.0
    gc = _chunked(log_decay.to(kept).clamp(min=floor), chunk).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)
    total = gc.cumsum(dim=-1, dtype=torch.float64)
    end = total[..., -1:]
    mask = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    if starts is None:
        before_any = same_as_end = None
    else:
        segment = _chunked(starts, chunk).cumsum(dim=-1)  # (b n c)
        mask = mask & (segment[..., :, None] == segment[..., None, :])[:, :, None, None]
        before_any = (segment == 0)[:, :, None, None]
        same_as_end = (segment == segment[..., -1:])[:, :, None, None]
    within = (total[..., :, None] - total[..., None, :]).to(kept).masked_fill_(~mask, -torch.inf).exp_()
    enter, leave, carry = (x.to(kept).exp() for x in (total, end - total, end))
    if before_any is not None and same_as_end is not None:
        enter, leave = enter * before_any, leave * same_as_end
        carry = carry * before_any[..., -1:]
    columns = (x.transpose(3, 4)[..., None] for x in (enter, leave, carry))
    return _Block(qc, kc, vc, total, within, *columns)


def _merge(x: Tensor, length: int) -> Tensor:
    """(b n g c r v) -> (b, length, h, v)."""
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :length]


def _entry_states(block: _Block, state: Tensor) -> tuple[Tensor, Tensor]:
    """States (b n g k r v) at the entry of every chunk, and the one after the last."""
    update = (block.k.mT @ (block.v * block.leave).to(block.k.dtype).flatten(4)).unflatten(4, block.v.shape[4:])
    rows, chunks = update.shape[:2]
    states = torch.empty(rows, chunks + 1, *update.shape[2:], dtype=state.dtype, device=state.device)
    states[:, 0] = state
    update = update.to(state.dtype)
    for n in range(chunks):
        torch.addcmul(update[:, n], states[:, n], block.carry[:, n], out=states[:, n + 1])
    return states[:, :-1], states[:, -1]


def _forward_block(block: _Block, state: Tensor) -> tuple[Tensor, Tensor]:
    entries, state = _entry_states(block, state)
    work = block.q.dtype
    scores = (block.q @ block.k.mT)[:, :, :, None] * block.within  # (b n g r c c)
    inside = scores.to(work) @ block.v.transpose(3, 4)  # (b n g r c v)
    across = (block.q @ entries.to(work).flatten(4)).unflatten(4, block.v.shape[4:])
    return torch.addcmul(inside.transpose(3, 4).to(block.enter.dtype), across, block.enter), state


def _backward_block(
    block: _Block, entry: Tensor, grad_output: Tensor, grad_state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k (b n g c k), v (b n g c r v), log-decay (b n g r c), and of the block's entry state."""
    q, k, v, _, within, enter, leave, carry = block
    work, kept, tail = q.dtype, entry.dtype, v.shape[4:]
    entries, _ = _entry_states(block, entry)
    entering = (grad_output * enter).to(work)
    source = (q.mT @ entering.flatten(4)).unflatten(4, tail).to(kept)
    chunks = source.shape[1]
    grad_states = source.new_empty(source.shape[0], chunks + 1, *source.shape[2:])
    grad_states[:, -1] = grad_state
    for n in reversed(range(chunks)):
        torch.addcmul(source[:, n], grad_states[:, n + 1], carry[:, n], out=grad_states[:, n])
    grad_exits, grad_state = grad_states[:, 1:], grad_states[:, 0]

    # Across chunks.
    exits_flat, entries_flat = grad_exits.to(work).flatten(4), entries.to(work).flatten(4)
    leaving = (v * leave).to(work)
    to_state = (k @ exits_flat).unflatten(4, tail)
    grad_q = entering.flatten(4) @ entries_flat.mT
    grad_k = leaving.flatten(4) @ exits_flat.mT
    grad_v = to_state * leave

    # Within chunks.
    out_heads, v_heads = grad_output.to(work).transpose(3, 4), v.transpose(3, 4)
    scores = (q @ k.mT)[:, :, :, None] * within
    grad_v = grad_v + (scores.to(work).mT @ out_heads).transpose(3, 4)
    grad_scores = (out_heads @ v_heads.mT).to(kept)
    through_decay = grad_scores * scores
    grad_products = grad_scores.mul_(within).sum(dim=3).to(work)
    grad_q = grad_q + grad_products @ k
    grad_k = grad_k + grad_products.mT @ q

    # The log-decay, through the running sum of its chunk: every term at least in float32.
    received = (entering.to(kept) * (q @ entries_flat).unflatten(4, tail).to(kept)).sum(dim=-1).transpose(3, 4)
    sent = (leaving.to(kept) * to_state.to(kept)).sum(dim=-1).transpose(3, 4)
    grad_total = through_decay.sum(dim=-1) - through_decay.sum(dim=-2) + received - sent
    kept_alive = (entries * grad_exits).sum(dim=(3, 5)) * carry[:, :, :, 0, :, 0]
    grad_total[..., -1] += sent.sum(dim=-1) + kept_alive
    grad_decay = grad_total.flip(-1).cumsum(dim=-1).flip(-1)
    return grad_q, grad_k, grad_v, grad_decay, grad_state


def _cuts(length: int, block: int) -> list[tuple[int, int]]:
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _sizes(q: Tensor, chunk: int, block: int) -> tuple[int, int]:
    default_chunk, default_block = SIZES.get(q.device.type, SIZES["cuda"])
    chunk = chunk or min(default_chunk, max(16, 1 << max(q.shape[1] - 1, 0).bit_length()))
    return chunk, max(chunk, block or default_block)


def _working_type(q: Tensor, v: Tensor) -> torch.dtype:
    """Matrix products run in the input type on a GPU, whose accumulators are float32, and in float32 on a CPU."""
    if v.dtype == torch.float64:
        return torch.float64
    return v.dtype if q.is_cuda else torch.float32


@torch.library.custom_op(
    "seqlong::scalar_decay_chunked",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? starts, Tensor? initial_state, "
    "int chunk=0, int block=0) -> (Tensor, Tensor, Tensor)",
)
@as_written
def scalar_decay_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
    chunk: int = 0,
    block: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (b t h v), final state (b h k v), and the states at the entry of every block (m b g k r v)."""
    (rows, length, groups, width), (heads, value_width) = q.shape, v.shape[2:]
    work = _working_type(q, v)
    chunk, block = _sizes(q, chunk, block)
    shape = (rows, groups, heads // groups, width, value_width)
    kept = accumulation(work)
    if initial_state is None:
        state = torch.zeros(rows, groups, width, heads // groups, value_width, dtype=kept, device=q.device)
    else:
        state = initial_state.to(kept).view(shape).transpose(2, 3).contiguous()
    cuts = _cuts(length, block)
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    entries = state.new_empty(len(cuts), *state.shape)
    for index, (a, z) in enumerate(cuts):
        entries[index] = state
        part = _make_block(
            q[:, a:z], k[:, a:z], v[:, a:z], log_decay[:, a:z], None if starts is None else starts[:, a:z], chunk, work
        )
        result, state = _forward_block(part, state)
        output[:, a:z] = _merge(result, z - a)
    return (
        output,
        state.transpose(2, 3).reshape(rows, heads, width, value_width).clone(memory_format=torch.contiguous_format),
        entries,
    )


@scalar_decay_chunked.register_fake
def _(q, k, v, log_decay, starts, initial_state, chunk=0, block=0):  # type: ignore[no-untyped-def]
    (rows, length, groups, width), (heads, value_width) = q.shape, v.shape[2:]
    kept = accumulation(v.dtype)
    if block:
        _, block = _sizes(q, chunk, block)
    else:  # without asking for the length's power of two, which would fix a symbolic length
        block = max(chunk, SIZES.get(q.device.type, SIZES["cuda"])[1])
    blocks = (length + block - 1) // block
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        v.new_empty(rows, heads, width, value_width, dtype=kept),
        v.new_empty(blocks, rows, groups, width, heads // groups, value_width, dtype=kept),
    )


@torch.library.custom_op(
    "seqlong::scalar_decay_chunked_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? grad_final, Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? starts, "
    "Tensor entries, int chunk=0, int block=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def scalar_decay_chunked_backward(
    grad_output: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    starts: Tensor | None,
    entries: Tensor,
    chunk: int = 0,
    block: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and the initial state."""
    (rows, length, groups, width), (heads, value_width) = q.shape, v.shape[2:]
    work = _working_type(q, v)
    chunk, block = _sizes(q, chunk, block)
    shape = (rows, groups, heads // groups, width, value_width)
    if grad_final is None:
        grad_state = torch.zeros(entries.shape[1:], dtype=entries.dtype, device=q.device)
    else:
        grad_state = grad_final.to(entries.dtype).view(shape).transpose(2, 3).contiguous()
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, log_decay)]
    for index, (a, z) in reversed(list(enumerate(_cuts(length, block)))):
        part = _make_block(
            q[:, a:z], k[:, a:z], v[:, a:z], log_decay[:, a:z], None if starts is None else starts[:, a:z], chunk, work
        )
        incoming = _chunked(grad_output[:, a:z].to(entries.dtype), chunk)
        incoming = incoming.unflatten(3, (groups, -1)).transpose(2, 3).contiguous()
        grad_q, grad_k, grad_v, grad_decay, grad_state = _backward_block(part, entries[index], incoming, grad_state)
        size = z - a
        grads[0][:, a:z] = grad_q.transpose(2, 3).flatten(1, 2)[:, :size]
        grads[1][:, a:z] = grad_k.transpose(2, 3).flatten(1, 2)[:, :size]
        grads[2][:, a:z] = _merge(grad_v, size)
        grads[3][:, a:z] = grad_decay.permute(0, 1, 4, 2, 3).flatten(3, 4).flatten(1, 2)[:, :size]
    grad_initial = (
        grad_state.transpose(2, 3).reshape(rows, heads, width, value_width).clone(memory_format=torch.contiguous_format)
    )
    return grads[0], grads[1], grads[2], grads[3], grad_initial


@scalar_decay_chunked_backward.register_fake
def _(grad_output, grad_final, q, k, v, log_decay, starts, entries, chunk=0, block=0):  # type: ignore[no-untyped-def]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, log_decay)]
    rows, heads, value_width = q.shape[0], v.shape[2], v.shape[3]
    return (*grads, entries.new_empty(rows, heads, q.shape[3], value_width))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, log_decay, starts, initial_state, chunk, block = inputs
    ctx.save_for_backward(q, k, v, log_decay, starts, output[2])
    ctx.sizes = (chunk, block)
    ctx.has_initial = initial_state is not None
    ctx.initial_type = None if initial_state is None else initial_state.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_final, _grad_entries):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, starts, entries = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(v)
    dq, dk, dv, dg, ds = scalar_decay_chunked_backward(
        grad_output, grad_final, q, k, v, log_decay, starts, entries, *ctx.sizes
    )
    return dq, dk, dv, dg, None, ds.to(ctx.initial_type) if ctx.has_initial else None, None, None


scalar_decay_chunked.register_autograd(_backward, setup_context=_setup_context)
