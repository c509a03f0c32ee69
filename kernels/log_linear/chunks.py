"""What a chunk does to states, for both recurrences: four matrices a chunk, and their gradients.

    attend (c c): what token i takes from token j's value, short of the level's weight
    query (c k): what token i reads from the state that enters the chunk
    key (c k): what token j's value adds to the state that leaves it
    turn (k k), or (1 1): what becomes of the state that enters

Scalar decay, G the running sum of the log-decay in the chunk: attend is q kᵀ ⊙ decay, query ``q exp(G)``, key
``k exp(G_c - G)``, turn ``exp(G_c)``. Gated delta rule, with D = (I + strictly lower (β k kᵀ ⊙ decay))⁻¹ diag(β):
attend is (q kᵀ ⊙ decay) D, query ``q exp(G) - attend (k exp(G))``, key ``Dᵀ (k exp(G_c - G))``, turn
``exp(G_c) I - keyᵀ (k exp(G))``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Decays(NamedTuple):
    """Factors of chunks, 0 where a segment starts between."""

    within: Tensor  # (b n h c c) from token j to token i, 0 for j > i
    enter: Tensor  # (b n h c 1) from the chunk's entry to token i
    leave: Tensor  # (b n h c 1) from token j to the chunk's end
    carry: Tensor  # (b n h 1 1) over the whole chunk


class Chunks(NamedTuple):
    """n chunks of c tokens, (b n h ...) each."""

    attend: Tensor  # (... c c)
    query: Tensor  # (... c k)
    key: Tensor  # (... c k)
    turn: Tensor  # (... k k) or (... 1 1)
    inverse: Tensor  # (... c c) of the delta rule; empty for scalar decay


def decays(log_decay: Tensor, starts: Tensor | None, work: torch.dtype) -> Decays:
    """From (b n h c) and (b n c); e^-746 is zero, and sums in float64 leave digits to the gates beside such a one."""
    total = log_decay.double().clamp(min=-746.0).cumsum(dim=-1)
    end = total[..., -1:]
    mask = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).tril()
    exponents = [total[..., :, None] - total[..., None, :], total[..., None], (end - total)[..., None], end[..., None]]
    within, enter, leave, carry = (x.to(work) for x in exponents)
    if starts is not None:
        segment = starts.cumsum(dim=-1)[:, :, None]  # (b n 1 c)
        mask = mask & (segment[..., :, None] == segment[..., None, :])
        enter = enter.masked_fill((segment > 0)[..., None], -torch.inf)
        leave = leave.masked_fill((segment != segment[..., -1:])[..., None], -torch.inf)
        carry = carry.masked_fill((segment[..., -1:] > 0)[..., None], -torch.inf)
    return Decays(within.masked_fill_(~mask, -torch.inf).exp_(), enter.exp(), leave.exp(), carry.exp())


def chunks(q: Tensor, k: Tensor, beta: Tensor | None, d: Decays) -> Chunks:
    """From q and k (b n h c k), and beta (b n h c) for the delta rule."""
    scores = (q @ k.mT).mul_(d.within)
    entering, leaving = q * d.enter, k * d.leave
    if beta is None:
        return Chunks(scores, entering, leaving, d.carry, q.new_empty(0))
    lower = (k @ k.mT).mul_(d.within).mul_(beta[..., None])
    eye = torch.eye(q.shape[3], dtype=q.dtype, device=q.device).expand(lower.shape)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
    delta = inverse * beta[..., None, :]
    attend, reads = scores @ delta, k * d.enter
    key = delta.mT @ leaving
    turn = (key.mT @ reads).neg_()
    turn.diagonal(dim1=-2, dim2=-1).add_(d.carry[..., 0])
    return Chunks(attend, entering - attend @ reads, key, turn, inverse)


def chunks_backward(
    grad: Chunks, made: Chunks, q: Tensor, k: Tensor, beta: Tensor | None, d: Decays
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, beta and the log-decay (b n h c), from those of the four matrices."""
    raw = q @ k.mT
    if beta is None:
        grad_scores, grad_entering, grad_leaving, grad_carry = grad.attend, grad.query, grad.key, grad.turn
        through = grad_scores * (raw * d.within)
        grad_raw = grad_scores * d.within
        grad_q = grad_raw @ k + grad_entering * d.enter
        grad_k = grad_raw.mT @ q + grad_leaving * d.leave
        received = (grad_entering * q).sum(-1) * d.enter[..., 0]
        sent = (grad_leaving * k).sum(-1) * d.leave[..., 0]
        kept = grad_carry[..., 0, 0] * d.carry[..., 0, 0]
        return grad_q, grad_k, None, _decay_gradient(through, received, sent, kept)

    reads, leaving = k * d.enter, k * d.leave
    inverse, delta = made.inverse, made.inverse * beta[..., None, :]
    grad_query = grad.query
    grad_key = grad.key - reads @ grad.turn.mT
    grad_attend = grad.attend - grad_query @ reads.mT
    grad_reads = -(made.attend.mT @ grad_query) - made.key @ grad.turn
    scores = raw * d.within
    grad_scores = grad_attend @ delta.mT
    grad_delta = scores.mT @ grad_attend + leaving @ grad_key.mT
    grad_leaving = delta @ grad_key
    # Pairs of two segments, or of the future, are zero in all that the gradients are multiplied by: no masks.
    # d(I + L)⁻¹ = -(I + L)⁻¹ dL (I + L)⁻¹, L strictly lower.
    grad_lower = -(inverse.mT @ (grad_delta * beta[..., None, :]) @ inverse.mT).tril(-1)
    products = k @ k.mT
    decayed = products * d.within
    grad_beta = (grad_delta * inverse).sum(dim=-2) + (grad_lower * decayed).sum(dim=-1)
    grad_decayed = grad_lower * beta[..., None]
    grad_raw, grad_products = grad_scores * d.within, grad_decayed * d.within
    grad_q = grad_raw @ k + grad_query * d.enter
    grad_k = grad_raw.mT @ q + grad_products @ k + grad_products.mT @ k + grad_reads * d.enter + grad_leaving * d.leave
    through = grad_scores * scores + grad_decayed * decayed
    received = ((grad_query * q).sum(-1) + (grad_reads * k).sum(-1)) * d.enter[..., 0]
    sent = (grad_leaving * k).sum(-1) * d.leave[..., 0]
    kept = grad.turn.diagonal(dim1=-2, dim2=-1).sum(-1) * d.carry[..., 0, 0]
    return grad_q, grad_k, grad_beta, _decay_gradient(through, received, sent, kept)


def _decay_gradient(through: Tensor, received: Tensor, sent: Tensor, kept: Tensor) -> Tensor:
    """Rows carry plus the running sum, columns minus; what leaves or stays ends at the chunk's last token."""
    grad_total = through.sum(dim=-1) - through.sum(dim=-2) + received - sent
    grad_total[..., -1] += sent.sum(dim=-1) + kept
    return grad_total.flip(-1).cumsum(dim=-1).flip(-1)
