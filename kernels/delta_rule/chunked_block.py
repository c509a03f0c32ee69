"""delta_rule over one block of tokens as matrix products over its chunks, forwards and backwards.

Within a chunk of c tokens that the state S enters, with γ_i the decay from the entry to token i and D_ij the decay from
token j to token i (both per channel, or one for all):

    A = stril(β_i (k_i D_ij k_jᵀ))      T = (I + A)^-1      P = tril(q_i D_ij k_jᵀ)
    Ṽ = T β (V - γK S)                  O = γQ S + P Ṽ      S' = γ_c S + (D_cj K)ᵀ Ṽ

Only S and Ṽ pass from chunk to chunk, as two products each: Ṽ = U - W S with U = T β V and W = T β γK made for all
chunks at once. The gradients need dR = Tᵀ dṼ and dA = -stril(dR Ṽᵀ), no gradient of T. Every decay is the exponential
of a sum of its own gates, never of a difference of longer sums: nothing overflows, and minus infinity is just zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """Pairs of neighbouring halves of s tokens: decay from the boundary to rows, and from columns to the boundary."""

    row: Tensor  # (n b g r m s k)
    column: Tensor  # (n b g r m s k)


class Block(NamedTuple):
    """n chunks of c tokens, heads as g groups of r heads; d is 1, or k where each channel has its own decay."""

    q: Tensor  # (n b g 1 c k)
    k: Tensor  # (n b g 1 c k)
    v: Tensor  # (n b g r c v)
    beta: Tensor  # (n b g r c 1)
    enter: Tensor  # (n b g r c d) decay from the chunk's entry to token i
    leave: Tensor  # (n b g r c d) decay from token j to the chunk's end
    carry: Tensor  # (n b g r d 1) decay over the whole chunk
    erase: Tensor  # (n b g r c c) k_i D_ij k_jᵀ where j < i
    scores: Tensor  # (n b g r c c) q_i D_ij k_jᵀ where j <= i
    within: Tensor | None  # (n b g r c c) D_ij where j <= i, if it is one for all channels
    levels: list[Level]  # what makes D_ij otherwise


class Grads(NamedTuple):
    """Gradients in a block's layout."""

    q: Tensor  # (n b g c k)
    k: Tensor  # (n b g c k)
    v: Tensor  # (n b g r c v)
    beta: Tensor  # (n b g r c)
    log_decay: Tensor  # (n b g r c d)
    state: Tensor  # (b g r k v)


def cut(x: Tensor, chunk: int) -> Tensor:
    """(b l h ...) -> (n b h c ...), zero-padded at the end."""
    short = -x.shape[1] % chunk
    if short:
        x = torch.cat([x, x.new_zeros(x.shape[0], short, *x.shape[2:])], dim=1)
    x = x.unflatten(1, (x.shape[1] // chunk, chunk))
    return x.permute(1, 0, 3, 2, *range(4, x.dim())).contiguous()


def joined(x: Tensor, length: int) -> Tensor:
    """(n b h c ...) -> (b length h ...)."""
    x = x.permute(1, 0, 3, 2, *range(4, x.dim()))
    return x.flatten(1, 2)[:, :length]


def make(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, log_decay: Tensor, chunk: int) -> Block:
    """A block from q, k (b l g k), v (b l h v), weight (b l h) and log-decay (b l h) or (b l h k), of one type."""
    groups = q.shape[2]
    qc, kc = (cut(x, chunk).unsqueeze(3) for x in (q, k))
    vc, beta, gate = (cut(x, chunk).unflatten(2, (groups, -1)) for x in (v, weight, log_decay))
    beta = beta.unsqueeze(-1)
    if log_decay.dim() == 4:
        erase, scores, levels = _by_channel(qc, kc, gate)
        enter, within = gate.cumsum(-2).exp_(), None
        leave = _after(gate).exp_()
    else:
        levels = []
        past = torch.ones(chunk, chunk, dtype=gate.dtype, device=gate.device).tril_()
        within = ((gate.unsqueeze(-2) * past) @ past.tril(-1)).exp_().mul_(past)
        enter, leave = gate.cumsum(-1).exp_().unsqueeze(-1), within[..., -1, :].unsqueeze(-1)
        erase, scores = within * (kc @ kc.mT).tril(-1), within * (qc @ kc.mT).tril()
    return Block(qc, kc, vc, beta, enter, leave, enter[..., -1:, :].mT, erase, scores, within, levels)


def _after(gate: Tensor) -> Tensor:
    """Sum over the tokens after each one: exactly zero at the last."""
    later = gate[..., 1:, :].flip(-2).cumsum(-2).flip(-2)
    return torch.cat([later, torch.zeros_like(gate[..., :1, :])], dim=-2)


def _pairs(x: Tensor, size: int) -> Tensor:
    """(... c d) -> (... m 2 s d): pairs of halves of ``size`` tokens."""
    return x.unflatten(-2, (-1, 2, size))


def _corners(x: Tensor, size: int) -> Tensor:
    """View of (... c c) as (... m s s): what rows of a pair's second half see of its first."""
    cells = x.unflatten(-1, (-1, 2, size)).unflatten(-4, (-1, 2, size))  # (... m 2 s m 2 s)
    inner = cells.select(-5, 1).select(-2, 0)  # (... m s m s)
    return inner.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _by_channel(q: Tensor, k: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, list[Level]]:
    """k_i D_ij k_jᵀ (j < i) and q_i D_ij k_jᵀ (j <= i), by halves: the exponents meet at the halves' boundary."""
    chunk = gate.shape[-2]
    erase = gate.new_zeros(*gate.shape[:-2], chunk, chunk)
    scores = torch.diag_embed((q * k).sum(-1)).expand_as(erase).contiguous()
    levels: list[Level] = []
    until, since = gate.clone(), torch.zeros_like(gate)  # from the half's first token to i, and after j to its last
    size = 1
    while size < chunk:
        before, after = _pairs(until, size), _pairs(since, size)
        level = Level(before.select(-3, 1).exp(), after.select(-3, 0).exp())
        levels.append(level)
        rows, columns = _scaled(q, k, level, size)
        corner = rows @ columns.mT  # (... m 2s s)
        _corners(erase, size).copy_(corner[..., :size, :])
        _corners(scores, size).copy_(corner[..., size:, :])
        after[..., :1, :, :] += before[..., 1:, -1:, :]
        before[..., 1:, :, :] += before[..., :1, -1:, :]
        size *= 2
    return erase, scores, levels


def _scaled(q: Tensor, k: Tensor, level: Level, size: int) -> tuple[Tensor, Tensor]:
    """Rows of k above rows of q (... m 2s k), and columns of k (... m s k), decayed to the boundary."""
    kp, qp = _pairs(k, size), _pairs(q, size)
    shape = level.row.shape
    rows = level.row.new_empty(*shape[:-2], 2, *shape[-2:])
    torch.mul(kp.select(-3, 1), level.row, out=rows.select(-3, 0))
    torch.mul(qp.select(-3, 1), level.row, out=rows.select(-3, 1))
    return rows.flatten(-3, -2), kp.select(-3, 0) * level.column


class Walk(NamedTuple):
    """A block once more with its states."""

    states: Tensor  # (n+1 b g r k v) before each chunk, and after the last
    fresh: Tensor  # (n b g r c v) what each token adds along its key: Ṽ
    inverse: Tensor  # (n b g r c c) T
    erased: Tensor  # (n b g r c k) W = T β γK


def _flat(x: Tensor) -> Tensor:
    """(n b g r x y) -> (n bgr x y)."""
    return x.flatten(1, 3)


def walk(block: Block, state: Tensor) -> Walk:
    """States through the chunks of a block, one after another; everything else at once."""
    chunk = block.erase.shape[-1]
    one = torch.eye(chunk, dtype=block.erase.dtype, device=block.erase.device)
    system = block.erase * block.beta
    inverse = torch.linalg.solve_triangular(system, one.expand_as(system), upper=False, unitriangular=True)
    weighed = inverse * block.beta.mT
    erased = weighed @ (block.k * block.enter)
    fresh = weighed @ block.v
    chunks = fresh.shape[0]
    states = state.new_empty(chunks + 1, *state.shape)
    states[0] = state
    S, V, W = states.flatten(1, 3), _flat(fresh), _flat(erased)
    leaving, carry = _flat((block.k * block.leave).mT), _flat(block.carry)
    for n in range(chunks):
        V[n].baddbmm_(W[n], S[n], alpha=-1)
        torch.mul(S[n], carry[n], out=S[n + 1])
        S[n + 1].baddbmm_(leaving[n], V[n])
    return Walk(states, fresh, inverse, erased)


def forward(block: Block, state: Tensor) -> tuple[Tensor, Tensor]:
    """Output (n b g r c v), and the state (b g r k v) after the block."""
    states, fresh, _, _ = walk(block, state)
    output = block.scores @ fresh
    output += (block.q * block.enter) @ states[:-1]
    return output, states[-1]


def backward(block: Block, entry: Tensor, grad_output: Tensor, grad_state: Tensor) -> Grads:
    """Gradients, from those of the output (n b g r c v) and of the state after the block (b g r k v)."""
    states, fresh, inverse, erased = walk(block, entry)
    q, k, v, beta, enter, leave, carry, erase, scores, _, _ = block
    chunks = fresh.shape[0]
    entering_q, entering_k, leaving_k = q * enter, k * enter, k * leave
    grad_fresh = scores.mT @ grad_output
    grad_states = torch.empty_like(states)
    torch.matmul(entering_q.mT, grad_output, out=grad_states[:-1])
    grad_states[-1] = grad_state
    G, dV, W, L, decay = (_flat(x) for x in (grad_states, grad_fresh, erased, leaving_k, carry))
    for n in reversed(range(chunks)):
        dV[n].baddbmm_(L[n], G[n + 1])
        G[n].addcmul_(G[n + 1], decay[n]).baddbmm_(W[n].mT, dV[n], alpha=-1)

    entries, exits = states[:-1], grad_states[1:]
    residual = inverse.mT @ grad_fresh
    grad_v = residual * beta
    grad_system = (residual @ fresh.mT).neg_().tril_(-1)
    grad_beta = (grad_system * erase).sum(-1) + (residual * (v - entering_k @ entries)).sum(-1)
    grad_erase = grad_system.mul_(beta)
    grad_scores = (grad_output @ fresh.mT).tril_()

    grad_entering_q, grad_entering_k = grad_output @ entries.mT, -(grad_v @ entries.mT)
    grad_leaving_k = fresh @ exits.mT
    grad_enter = grad_entering_q * entering_q + grad_entering_k * entering_k
    grad_leave = grad_leaving_k * leaving_k
    grad_carry = (entries * exits).sum(-1)
    if enter.shape[-1] == 1:
        grad_enter, grad_leave = grad_enter.sum(-1, keepdim=True), grad_leave.sum(-1, keepdim=True)
        grad_carry = grad_carry.sum(-1, keepdim=True)
    grad_q = grad_entering_q.mul_(enter)
    grad_k = grad_entering_k.mul_(enter).addcmul_(grad_leaving_k, leave)
    grad_decay = grad_enter.flip(-2).cumsum(-2).flip(-2) + (grad_leave.cumsum(-2) - grad_leave)
    grad_decay += (grad_carry * carry.squeeze(-1)).unsqueeze(-2)
    back = _one_decay_backward if block.within is not None else _by_channel_backward
    more_q, more_k, more_decay = back(block, grad_erase, grad_scores)
    return Grads(
        grad_q.sum(3) + more_q, grad_k.sum(3) + more_k, grad_v, grad_beta, grad_decay + more_decay, grad_states[0]
    )


def _one_decay_backward(block: Block, grad_erase: Tensor, grad_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k (n b g c k) and log-decay (n b g r c 1) through ``erase`` and ``scores``."""
    q, k, within = block.q.squeeze(3), block.k.squeeze(3), block.within
    assert within is not None
    through = grad_erase * block.erase
    through.addcmul_(grad_scores, block.scores)
    past = torch.ones_like(within[0, 0, 0, 0]).tril_()
    # Gate m stands in D_ij where j < m <= i: its own sum, in which nothing cancels.
    grad_decay = ((through @ past.tril(-1).mT) * past).sum(-2).unsqueeze(-1)
    of_erase, of_scores = (grad_erase * within).sum(3), (grad_scores * within).sum(3)
    grad_k = (of_erase + of_erase.mT) @ k
    grad_k += of_scores.mT @ q
    return of_scores @ k, grad_k, grad_decay


def _by_channel_backward(block: Block, grad_erase: Tensor, grad_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where each channel has its own decay; the gradient of the log-decay is (n b g r c k)."""
    q, k, leave = block.q, block.k, block.leave
    diagonal = grad_scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    grad_q, grad_k = diagonal * k, diagonal * q  # (n b g r c k)
    grad_until, grad_since = torch.zeros_like(leave), torch.zeros_like(leave)
    size = leave.shape[-2]
    for level in reversed(block.levels):
        size //= 2
        until, since = _pairs(grad_until, size), _pairs(grad_since, size)
        # Longer sums were made of shorter ones, those of this level.
        until[..., :1, -1:, :] += until[..., 1:, :, :].sum(-2, keepdim=True)
        until[..., 1:, -1:, :] += since[..., :1, :, :].sum(-2, keepdim=True)
        rows, columns = _scaled(q, k, level, size)
        grad = torch.cat([_corners(grad_erase, size), _corners(grad_scores, size)], dim=-2)
        grad_rows, grad_columns = grad @ columns, grad.mT @ rows
        received, sent = grad_rows * rows, grad_columns * columns
        until.select(-3, 1).add_(received[..., :size, :]).add_(received[..., size:, :])
        since.select(-3, 0).add_(sent)
        _pairs(grad_k, size).select(-3, 1).addcmul_(grad_rows[..., :size, :], level.row)
        _pairs(grad_q, size).select(-3, 1).addcmul_(grad_rows[..., size:, :], level.row)
        _pairs(grad_k, size).select(-3, 0).addcmul_(grad_columns, level.column)
    # At halves of one token, the sum until it is its own gate, and nothing comes after it.
    return grad_q.sum(3), grad_k.sum(3), grad_until
