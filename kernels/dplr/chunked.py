"""dplr as matrix products over chunks, on any device, in pure torch.

The row is cut into blocks, and each block into chunks of c tokens. Within a chunk that S enters, with G the running sum
of the log-decay (G_{i-1} stands before token i), and u_t = a_t S_{t-1} what a reads:

    (I - A) U = (a ⊙ exp(G_{i-1})) S + (a kᵀ ⊙ decay, j < i) V        A = a bᵀ ⊙ decay, j < i
    O = (q ⊙ exp(G)) S + (q bᵀ ⊙ decay, j <= i) U + (q kᵀ ⊙ decay, j <= i) V
    S' = exp(G_c) S + (b ⊙ exp(G_c - G))ᵀ U + (k ⊙ exp(G_c - G))ᵀ V

The four products are one: rows q_i and a_{i+1} carry the same decay, columns are b_j and k_j. A decay of each channel
stands inside the product, so the rows of a half of the chunk and the columns of the half before it are both scaled to
the border between them, then those of quarters, and so on: no exponent is positive, and exponents are made by adding
only, so that a gate of minus infinity is a gate like others. Where the gates are known to be mild (looked up on a CPU,
where that costs nothing), small pieces are one product scaled to their middle.

Blocks run one after another and bound the memory: the forward pass keeps the state at the entry of each block, the
backward pass goes through the blocks from the right and recomputes their insides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlong.kernels.precision import accumulation, as_written

#: (tokens a chunk, tokens a block) by device type.
SIZES = {"cpu": (32, 512), "cuda": (64, 16384)}
#: Largest exponent on either side of a piece that is one product.
MILD = 24.0
#: e^FLOOR is zero in every type, and sums of it stay finite.
FLOOR = -1e4
#: Factors below are zero: products would be subnormal, and processors take ten times as long over those.
SMALLEST = {torch.float32: -80.0, torch.float64: -700.0}


class _Decays(NamedTuple):
    """Factors between tokens of a chunk, (n c k) each or parts of it; n stands for rows, chunks and heads."""

    pieces: tuple[Tensor, Tensor] | None  # rows and columns of the smallest pieces, scaled to their middle
    halves: list[tuple[Tensor, Tensor]]  # (n m s 1 k): rows of right halves, columns of left halves, s tokens each
    enter: Tensor  # from the chunk's entry to token i
    leave: Tensor  # from token j to the chunk's end
    carry: Tensor  # (n k) over the whole chunk


def _factor(exponent: Tensor) -> Tensor:
    return F.threshold(exponent, SMALLEST[exponent.dtype], -torch.inf).exp_()


def _decays(g: Tensor, piece: int) -> _Decays:
    count, chunk, width = g.shape
    total = g.view(count, chunk // piece, piece, width).cumsum(dim=2)
    whole = total[:, :, -1:]
    rest = whole - total
    pieces = None
    if piece > 1:
        # From the piece's first token, not its middle: a later decay must not move a bit of an earlier token.
        pieces = total.exp()[..., None, :], (-total).exp()[..., None, :]
    halves = []
    size = piece
    while size < chunk:
        left, right = total[:, 0::2], total[:, 1::2]
        halves.append((_factor(right)[..., None, :], _factor(rest[:, 0::2])[..., None, :]))
        total = torch.cat([left, right + whole[:, 0::2]], dim=2)
        rest = torch.cat([rest[:, 0::2] + whole[:, 1::2], rest[:, 1::2]], dim=2)
        whole = whole[:, 0::2] + whole[:, 1::2]
        size *= 2
    return _Decays(pieces, halves, _factor(total[:, 0]), _factor(rest[:, 0]), _factor(whole[:, 0, 0]))


def _corner(products: Tensor, size: int) -> Tensor:
    """The view (n 2s 2s m) of right halves' rows and left halves' columns, of products (n c 2 c 2)."""
    count, chunk = products.shape[:2]
    pairs = chunk // (2 * size)
    view = products.view(count, pairs, 2, 2 * size, pairs, 2, 2 * size)[:, :, 1, :, :, 0]
    return view.diagonal(dim1=1, dim2=3)


def _inner(products: Tensor, size: int) -> Tensor:
    """The view (n 2s 2s m) of the pieces on the diagonal."""
    count, chunk = products.shape[:2]
    pieces = chunk // size
    return products.view(count, pieces, 2 * size, pieces, 2 * size).diagonal(dim1=1, dim2=3)


def _products(x: Tensor, y: Tensor, decays: _Decays, piece: int) -> Tensor:
    """(n c 2 c 2): x_i · (y_j ⊙ decay from j to i) for j <= i, else 0; x and y are (n c 2 k)."""
    count, chunk, _, width = x.shape
    products = x.new_zeros(count, chunk, 2, chunk, 2)
    cut = (count, chunk // piece, 2 * piece, width)
    if decays.pieces is None:
        inner = x.view(cut) @ y.view(cut).mT
    else:
        rows, columns = (
            (z.view(count, -1, piece, 2, width) * factor).view(cut)
            for z, factor in zip((x, y), decays.pieces, strict=True)
        )
        inner = rows @ columns.mT
        inner.masked_fill_(_later(piece, x.device), 0)
    _inner(products, piece).copy_(inner.permute(0, 2, 3, 1))
    for level, (row, column) in enumerate(decays.halves):
        size = piece << level
        right = (x.view(count, -1, 2, size, 2, width)[:, :, 1] * row).flatten(2, 3)
        left = (y.view(count, -1, 2, size, 2, width)[:, :, 0] * column).flatten(2, 3)
        _corner(products, size).copy_((right @ left.mT).permute(0, 2, 3, 1))
    return products


def _products_backward(grad: Tensor, x: Tensor, y: Tensor, decays: _Decays, piece: int) -> tuple[Tensor, Tensor]:
    """Gradients of x and y, from that of what ``_products`` returns."""
    count, chunk, _, width = x.shape
    cut = (count, chunk // piece, 2 * piece, width)
    inner = _inner(grad, piece).permute(0, 3, 1, 2)
    if decays.pieces is None:
        grad_x, grad_y = (inner @ y.view(cut)).view(x.shape), (inner.mT @ x.view(cut)).view(x.shape)
    else:
        inner = inner.masked_fill(_later(piece, x.device), 0)
        apart = (count, chunk // piece, piece, 2, width)
        row, column = decays.pieces
        grad_x = ((inner @ (y.view(apart) * column).view(cut)).view(apart) * row).view(x.shape)
        grad_y = ((inner.mT @ (x.view(apart) * row).view(cut)).view(apart) * column).view(x.shape)
    for level, (row, column) in enumerate(decays.halves):
        size = piece << level
        halves = (count, -1, 2, size, 2, width)
        right = (x.view(halves)[:, :, 1] * row).flatten(2, 3)
        left = (y.view(halves)[:, :, 0] * column).flatten(2, 3)
        corner = _corner(grad, size).permute(0, 3, 1, 2)
        grad_x.view(halves)[:, :, 1] += (corner @ left).unflatten(2, (size, 2)) * row
        grad_y.view(halves)[:, :, 0] += (corner.mT @ right).unflatten(2, (size, 2)) * column
    return grad_x, grad_y


def _later(piece: int, device: torch.device) -> Tensor:
    """(2 piece, 2 piece): the column's token comes after the row's."""
    return (
        torch.ones(piece, piece, dtype=torch.bool, device=device)
        .triu(1)
        .repeat_interleave(2, 0)
        .repeat_interleave(2, 1)
    )


class _Block(NamedTuple):
    """One block as n chunks of c tokens; all are (b n h c ...)."""

    x: Tensor  # (... c 2 k) rows q_i and a_{i+1}
    y: Tensor  # (... c 2 k) columns b_j and k_j
    v: Tensor  # (... c v)
    first: Tensor  # (... 1 k) a of the chunk's first token, which reads the entry state as it is
    decays: _Decays  # factors, rows, chunks and heads in one
    piece: int
    products: Tensor  # (... c 2 c 2)
    apart: Tensor | None  # (b n 1 c c) two tokens are of different segments
    enter: Tensor  # (... c k) 0 from the first start on
    leave: Tensor  # (... c k) 0 up to the last start
    carry: Tensor  # (... k 1)
    lower: Tensor  # (... c c) minus A: the unit is implied
    reads: Tensor  # (... c k) (I - A)^-1 (a ⊙ exp G_{i-1}): what u reads from the entry state
    inside: Tensor  # (... c v) (I - A)^-1 (a kᵀ) V: what u reads from the chunk's own values


def _shifted(z: Tensor, before: Tensor) -> Tensor:
    """z one token later, ``before`` in front: along the third axis from the left."""
    return torch.cat([before, z[:, :, :, :-1]], dim=3)


def _piece(g: Tensor, chunk: int) -> int:
    """Tokens that can be one product: as many as keep exponents small."""
    if g.device.type != "cpu" or not g.numel():
        return 1
    mildest = 2 * MILD / max(-g.min().item(), 1e-3)
    piece = chunk
    while piece > 1 and piece > mildest:
        piece //= 2
    return piece


def _chunked(z: Tensor, chunk: int) -> Tensor:
    """(b l h d) -> (b n h c d), zero-padded at the end."""
    short = -z.shape[1] % chunk
    if short:
        z = torch.cat([z, z.new_zeros(z.shape[0], short, *z.shape[2:])], dim=1)
    return z.unflatten(1, (-1, chunk)).transpose(2, 3)


def _make_block(inputs: Sequence[Tensor], starts: Tensor | None, chunk: int, work: torch.dtype) -> _Block:
    """From q, k, v, a, b and log-decay (b l h d each)."""
    *vectors, log_decay = inputs
    qc, kc, vc, ac, bc = (_chunked(z.to(work), chunk) for z in vectors)
    g = _chunked(log_decay.to(work).clamp(min=FLOOR), chunk).contiguous()
    piece = _piece(g, chunk)
    apart = None
    if starts is not None:
        marks = _chunked(starts[:, :, None, None], chunk)  # (b n 1 c 1)
        ac = ac.masked_fill(marks, 0)
        segment = marks.cumsum(dim=3)
        apart = segment != segment.mT
    first = ac[:, :, :, :1].contiguous()
    later = torch.cat([ac[:, :, :, 1:], torch.zeros_like(first)], dim=3)
    x, y = torch.stack([qc, later], dim=4), torch.stack([bc, kc], dim=4)
    lead = x.shape[:3]
    decays = _decays(g.flatten(0, 2), piece)
    products = _products(x.flatten(0, 2), y.flatten(0, 2), decays, piece).unflatten(0, lead)
    enter, leave, carry = (z.unflatten(0, lead) for z in (decays.enter, decays.leave, decays.carry[..., None]))
    if apart is not None:
        products.masked_fill_(apart[:, :, :, :, None, :, None], 0)
        enter, leave = enter.masked_fill(segment > 0, 0), leave.masked_fill(segment != segment[:, :, :, -1:], 0)
        carry = carry.masked_fill(segment[:, :, :, -1:] > 0, 0)
    nothing = torch.zeros_like(products[:, :, :, :1, 0, :, 0])
    lower = _shifted(products[:, :, :, :, 1, :, 0], nothing).neg()
    entering = _shifted(later * enter, first)
    values = _shifted(products[:, :, :, :, 1, :, 1] @ vc, torch.zeros_like(vc[:, :, :, :1]))
    solved = torch.linalg.solve_triangular(
        lower, torch.cat([entering, values], dim=-1), upper=False, unitriangular=True
    )
    reads, inside = solved.split([entering.shape[-1], values.shape[-1]], dim=-1)
    return _Block(x, y, vc, first, decays, piece, products, apart, enter, leave, carry, lower, reads, inside)


def _step_matrices(block: _Block) -> tuple[Tensor, Tensor]:
    """(... k k) and (... k v): the state after a chunk is the first times the state before it, plus the second."""
    to_end = block.y * block.leave[..., None, :]
    erase, write = to_end.unbind(dim=4)
    turn = erase.mT @ block.reads
    turn.diagonal(dim1=-2, dim2=-1).add_(block.carry[..., 0])
    return turn, erase.mT @ block.inside + write.mT @ block.v


def _walk(turn: Tensor, add: Tensor, state: Tensor) -> Tensor:
    """States (b n+1 h k v) at the entry of every chunk, and the one after the last."""
    rows, chunks, heads = turn.shape[:3]
    states = add.new_empty(rows, chunks + 1, *add.shape[2:])
    states[:, 0] = state
    for n in range(chunks):
        states[:, n + 1] = torch.baddbmm(
            add[:, n].flatten(0, 1), turn[:, n].flatten(0, 1), states[:, n].flatten(0, 1)
        ).unflatten(0, (rows, heads))
    return states


def _forward_block(block: _Block, state: Tensor) -> tuple[Tensor, Tensor]:
    states = _walk(*_step_matrices(block), state)
    entries = states[:, :-1]
    pairs = torch.stack([block.reads @ entries + block.inside, block.v], dim=4)  # (... c 2 v) u and v
    scores = block.products[:, :, :, :, 0].flatten(4)  # (... c 2c)
    output = (block.x[..., 0, :] * block.enter) @ entries + scores @ pairs.flatten(3, 4)
    return output, states[:, -1]


def _backward_block(
    block: _Block, state: Tensor, grad_output: Tensor, grad_state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, a, b, log-decay (b n h c d each), and of the block's entry state."""
    x, y, v = block[:3]
    turn, add = _step_matrices(block)
    states = _walk(turn, add, state)
    entries, exits = states[:, :-1], states[:, 1:]
    entering = x * block.enter[..., None, :]
    through_u = entering[..., 0, :] + block.products[:, :, :, :, 0, :, 0] @ block.reads
    adjoint = _walk(turn.mT.flip(1), (through_u.mT @ grad_output).flip(1), grad_state).flip(1)
    grad_exits, grad_state = adjoint[:, 1:], adjoint[:, 0]

    leaving = y * block.leave[..., None, :]
    u = block.reads @ entries + block.inside
    grad_u = block.products[:, :, :, :, 0, :, 0].mT @ grad_output + leaving[..., 0, :] @ grad_exits
    grad_read = torch.linalg.solve_triangular(block.lower.mT, grad_u, upper=True, unitriangular=True)
    # Row a_{i+1} belongs to token i + 1.
    received = torch.cat([grad_read[:, :, :, 1:], torch.zeros_like(grad_read[:, :, :, :1])], dim=3)
    rows = torch.stack([grad_output, received], dim=4)  # (... c 2 v)
    columns = torch.stack([u, v], dim=4)
    grad_v = block.products[..., 1].flatten(3, 4).mT @ rows.flatten(3, 4) + leaving[..., 1, :] @ grad_exits
    grad_products = (rows.flatten(3, 4) @ columns.flatten(3, 4).mT).view(block.products.shape)
    if block.apart is not None:
        grad_products.masked_fill_(block.apart[:, :, :, :, None, :, None], 0)
    grad_x, grad_y = (
        z.view(x.shape)
        for z in _products_backward(
            grad_products.flatten(0, 2), x.flatten(0, 2), y.flatten(0, 2), block.decays, block.piece
        )
    )
    grad_x += (rows.flatten(3, 4) @ entries.mT).view(x.shape) * block.enter[..., None, :]
    grad_y += (columns.flatten(3, 4) @ grad_exits.mT).view(y.shape) * block.leave[..., None, :]

    # The log-decay: rows carry plus its running sum, columns minus, anchored at the chunk's end.
    alive = (exits * grad_exits).sum(dim=-1)[:, :, :, None]
    grad_decay = ((x * grad_x).sum(dim=4) - (y * grad_y).sum(dim=4)).flip(3).cumsum(dim=3).flip(3) + alive
    grad_a = _shifted(grad_x[..., 1, :], grad_read[:, :, :, :1] @ entries.mT)
    return grad_x[..., 0, :], grad_y[..., 1, :], grad_v, grad_a, grad_y[..., 0, :], grad_decay, grad_state


def _cuts(length: int, block: int) -> list[tuple[int, int]]:
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _sizes(q: Tensor, chunk: int, block: int) -> tuple[int, int]:
    default_chunk, default_block = SIZES.get(q.device.type, SIZES["cuda"])
    chunk = chunk or min(default_chunk, max(2, 1 << max(q.shape[1] - 1, 0).bit_length()))
    return chunk, max(chunk, block or default_block)


@torch.library.custom_op(
    "seqlong::dplr_chunked",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor log_decay, Tensor? starts, "
    "Tensor? initial_state, int chunk=0, int block=0) -> (Tensor, Tensor, Tensor)",
)
@as_written
def dplr_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
    chunk: int = 0,
    block: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (b t h v), final state (b h k v), and the states around the m blocks (m + 1 b h k v).

    Products and sums are in float32 (float64 if v is) whatever the inputs: the inverse would lose bfloat16's digits.
    ``chunk`` is a power of two.
    """
    (rows, length, heads, width), value_width = q.shape, v.shape[3]
    work = accumulation(v.dtype)
    chunk, block = _sizes(q, chunk, block)
    if initial_state is None:
        state = torch.zeros(rows, heads, width, value_width, dtype=work, device=q.device)
    else:
        state = initial_state.to(work, copy=True, memory_format=torch.contiguous_format)
    cuts = _cuts(length, block)
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    entries = state.new_empty(len(cuts) + 1, *state.shape)  # the last one too: a compiler would fix a count of one
    for index, (start, end) in enumerate(cuts):
        entries[index] = state
        inputs = [z[:, start:end] for z in (q, k, v, a, b, log_decay)]
        part = _make_block(inputs, None if starts is None else starts[:, start:end], chunk, work)
        result, state = _forward_block(part, state)
        output[:, start:end] = result.transpose(2, 3).flatten(1, 2)[:, : end - start]
    entries[-1] = state
    return output, state.clone(memory_format=torch.contiguous_format), entries


@dplr_chunked.register_fake
def _(q, k, v, a, b, log_decay, starts, initial_state, chunk=0, block=0):  # type: ignore[no-untyped-def]
    (rows, length, heads, width), value_width = q.shape, v.shape[3]
    work = accumulation(v.dtype)
    block = max(chunk, block or SIZES.get(q.device.type, SIZES["cuda"])[1])
    blocks = (length + block - 1) // block
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        v.new_empty(rows, heads, width, value_width, dtype=work),
        v.new_empty(blocks + 1, rows, heads, width, value_width, dtype=work),
    )


@torch.library.custom_op(
    "seqlong::dplr_chunked_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? grad_final, Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, "
    "Tensor log_decay, Tensor? starts, Tensor entries, int chunk=0, int block=0) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def dplr_chunked_backward(
    grad_output: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    starts: Tensor | None,
    entries: Tensor,
    chunk: int = 0,
    block: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, a, b, log_decay and the initial state."""
    length, work = q.shape[1], entries.dtype
    chunk, block = _sizes(q, chunk, block)
    grad_state = torch.zeros(entries.shape[1:], dtype=work, device=q.device)
    if grad_final is not None:
        grad_state = grad_state + grad_final
    inputs = (q, k, v, a, b, log_decay)
    grads = [torch.empty_like(z, memory_format=torch.contiguous_format) for z in inputs]
    for index, (start, end) in reversed(list(enumerate(_cuts(length, block)))):
        cut = [z[:, start:end] for z in inputs]
        part = _make_block(cut, None if starts is None else starts[:, start:end], chunk, work)
        incoming = _chunked(grad_output[:, start:end].to(work), chunk).contiguous()
        *found, grad_state = _backward_block(part, entries[index], incoming, grad_state)
        for grad, piece in zip(grads, found, strict=True):
            grad[:, start:end] = piece.transpose(2, 3).flatten(1, 2)[:, : end - start]
    if starts is not None:
        grads[3].masked_fill_(starts[:, :, None, None], 0)
    return (*grads, grad_state.clone(memory_format=torch.contiguous_format))  # type: ignore[return-value]


@dplr_chunked_backward.register_fake
def _(grad_output, grad_final, q, k, v, a, b, log_decay, starts, entries, chunk=0, block=0):  # type: ignore[no-untyped-def]
    inputs = (q, k, v, a, b, log_decay)
    grads = [torch.empty_like(z, memory_format=torch.contiguous_format) for z in inputs]
    return (*grads, entries.new_empty(entries.shape[1:]))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, initial_state, chunk, block = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.sizes = (chunk, block)
    ctx.has_initial = initial_state is not None
    ctx.initial_type = None if initial_state is None else initial_state.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_final, _grad_entries):  # type: ignore[no-untyped-def]
    q, k, v, a, b, log_decay, starts, entries = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(v)
    *grads, ds = dplr_chunked_backward(grad_output, grad_final, q, k, v, a, b, log_decay, starts, entries, *ctx.sizes)
    return *grads, None, ds.to(ctx.initial_type) if ctx.has_initial else None, None, None


dplr_chunked.register_autograd(_backward, setup_context=_setup_context)
