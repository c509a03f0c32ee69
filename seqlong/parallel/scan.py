"""The state that enters a fragment: one algebra for every linear recurrence, over processes.

Over any fragment a linear recurrence is affine in the state that enters: ``S_out = T S_in + S_own``. Each process works
out T and S_own of its fragment, all of them are gathered at once, and each folds what stands before it. T is a number a
head, a number a channel, or a matrix; it is zero where a segment starts in the fragment. Products go forward only: no
decay is divided by. Source: LASP-2 (arXiv 2502.07563), with decays and the delta rule.

Or each process waits for the state from the one before and passes on what it makes of it, column block by column block:
one state received instead of all, and as many steps as processes. Source: ZeCO's All-Scan (arXiv 2507.01004).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from seqlong.fragment import Fragment, tie

#: Column blocks of a state that is passed on: one is on its way while the next is worked out.
PIECES = 4
#: Positions whose keys and values are in float32 at once.
BLOCK = 8192


def entering(
    fragment: Fragment,
    left: Float[Tensor, "b h k v"],
    kept: Float[Tensor, "b h"] | Float[Tensor, "b h k"] | Float[Tensor, "b h k k"],
    initial: Float[Tensor, "b h k v"] | None = None,
) -> tuple[Float[Tensor, "b h k v"], Float[Tensor, "b h k v"]]:
    """The state that enters this fragment, and the one that leaves the whole row (of passed states: this fragment).

    Args:
        fragment: who else holds parts of these rows.
        left: what the fragment makes of nothing.
        kept: what it makes of a state: a factor a head, a factor a channel, or a matrix from the left.
        initial: the state before the row; zero if None.
    """
    if fragment.passes:
        state = torch.zeros_like(left) if initial is None else initial.to(left.dtype)
        return _Pass.apply(left, kept.to(left.dtype), state, fragment)
    every = fragment.gather(torch.cat([left.flatten(1), kept.to(left.dtype).flatten(1)], dim=1))
    lefts, factors = every.split([left[0].numel(), kept[0].numel()], dim=2)
    state = torch.zeros_like(left) if initial is None else initial.to(left.dtype)
    before = state
    for j in range(fragment.size):
        if j == fragment.place:
            before = state
        state = _times(factors[j].view(kept.shape), state) + lefts[j].view(left.shape)
    return tie(before, every), state


class _Pass(torch.autograd.Function):
    """``(entry, exit)``: entry is the exit of the fragment before, ``exit = T entry + left``."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, kept: Tensor, initial: Tensor, fragment: Fragment) -> tuple[Tensor, Tensor]:
        entry, leaving = [], []
        for own, first in zip(left.chunk(PIECES, dim=3), initial.chunk(PIECES, dim=3), strict=True):
            entry.append(fragment.receive(-1, first))
            leaving.append(_times(kept, entry[-1]) + own)
            fragment.send(1, leaving[-1])
        ctx.fragment = fragment
        state, after = torch.cat(entry, dim=3), torch.cat(leaving, dim=3)
        ctx.save_for_backward(kept, state)
        return state, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_entry: Tensor, grad_exit: Tensor) -> tuple[Tensor | None, ...]:
        kept, entry = ctx.saved_tensors
        fragment: Fragment = ctx.fragment
        grads, backs = [], []
        for own, later in zip(grad_entry.chunk(PIECES, dim=3), grad_exit.chunk(PIECES, dim=3), strict=True):
            grads.append(later + fragment.receive(1, torch.zeros_like(later)))
            backs.append(own + _times(kept.mT if kept.dim() == 4 else kept, grads[-1]))
            fragment.send(-1, backs[-1])
        grad, back = torch.cat(grads, dim=3), torch.cat(backs, dim=3)
        grad_kept = grad @ entry.mT if kept.dim() == 4 else (grad * entry).sum(dim=(3,) if kept.dim() == 3 else (2, 3))
        return grad, grad_kept, back if fragment.place == 0 else None, None


def _times(kept: Tensor, state: Tensor) -> Tensor:
    """T S for the three kinds of T."""
    return kept @ state if kept.dim() == 4 else kept.reshape(*kept.shape, *[1] * (4 - kept.dim())) * state


def scalar_decay(
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "h"],
    starts: Bool[Tensor, "b t"] | None,
) -> tuple[Float[Tensor, "b h k v"], Float[Tensor, "b h"]]:
    """What a fragment makes of nothing, and how much it keeps of a state, with one decay a head."""
    return _lean(_scalar_decay, k, v, log_decay, starts)


def vector_decay(
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    log_decay: Float[Tensor, "b t h k"],
    starts: Bool[Tensor, "b t"] | None,
) -> tuple[Float[Tensor, "b h k v"], Float[Tensor, "b h k"]]:
    """The same with a decay a channel."""
    return _lean(_vector_decay, k, v, log_decay, starts)


def matrix(
    run: Callable[[Tensor, Tensor], Tensor], k: Float[Tensor, "b t g k"], v: Float[Tensor, "b t h v"]
) -> tuple[Float[Tensor, "b h k v"], Float[Tensor, "b h k k"]]:
    """The same where a token multiplies the state with a matrix: k columns more, which start as the identity and to
    which nothing is written, become that matrix.

    Args:
        run: the op from values ``(b t h v + k)`` and an initial state ``(b h k v + k)`` to its final state.
        k: keys, for their width.
        v: values.
    """
    rows, _, heads, width = v.shape
    kept = torch.float64 if v.dtype == torch.float64 else torch.float32
    columns = torch.cat(
        [
            torch.zeros(k.shape[3], width, dtype=kept, device=v.device),
            torch.eye(k.shape[3], dtype=kept, device=v.device),
        ],
        dim=1,
    )
    final = run(F.pad(v, (0, k.shape[3])), columns.expand(rows, heads, -1, -1).contiguous())
    left, kept_of = final.split([width, k.shape[3]], dim=3)
    return left, kept_of


def before_convolution(
    fragment: Fragment,
    tail: Float[Tensor, "b r d"],
    fresh: Int[Tensor, "b"],
    initial: Float[Tensor, "b r d"] | None = None,
) -> tuple[Float[Tensor, "b r d"], Float[Tensor, "b r d"]]:
    """The r inputs before this fragment, and the last r of the row.

    Args:
        fragment: who else holds parts of these rows.
        tail: the last r inputs of the fragment's last segment, zero where it has fewer.
        fresh: how many of these stand for themselves: a fragment with fewer hands on inputs from before it.
        initial: the inputs before the row; zero if None.
    """
    rows, reach, width = tail.shape
    tails = fragment.gather(tail)
    counts = fragment.gather(fresh.to(tail.dtype)).to(torch.int64)
    state = torch.zeros_like(tail) if initial is None else initial.to(tail.dtype)
    before = state
    place = torch.arange(reach, device=tail.device)
    for j in range(fragment.size):
        if j == fragment.place:
            before = state
        source = place + counts[j, :, None]
        moved = state.gather(1, source.clamp(max=reach - 1)[..., None].expand(rows, reach, width))
        state = tails[j] + torch.where((source < reach)[..., None], moved, 0)
    return tie(before, tails), state


def _lean(function: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keep the inputs only, not their copies in float32."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    left, kept = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return left, kept


def _scalar_decay(k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    kept = torch.float64 if v.dtype == torch.float64 else torch.float32
    rows, length, heads, width = v.shape
    groups = k.shape[2]
    gate = log_decay.to(kept).expand(rows, length, heads)
    since, whole = _since(gate, starts)
    left = torch.zeros(rows, groups, k.shape[3], heads // groups * width, dtype=kept, device=v.device)
    for a in range(0, length, BLOCK):
        here = slice(a, a + BLOCK)
        weighed = (v[:, here].to(kept) * since[:, here, :, None]).unflatten(2, (groups, -1)).flatten(3)
        left = left + k[:, here].to(kept).permute(0, 2, 3, 1) @ weighed.transpose(1, 2)
    return left.unflatten(3, (-1, width)).transpose(2, 3).flatten(1, 2), whole


def _vector_decay(k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    kept = torch.float64 if v.dtype == torch.float64 else torch.float32
    since, whole = _since(log_decay.to(kept), starts)
    left = torch.zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=kept, device=v.device)
    for a in range(0, v.shape[1], BLOCK):
        here = slice(a, a + BLOCK)
        weighed = (k[:, here].to(kept) * since[:, here]).permute(0, 2, 3, 1)
        left = left + weighed @ v[:, here].to(kept).transpose(1, 2)
    return left, whole


def _since(gate: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the row's end keeps of each position ``(b t ...)``, and of what came before ``(b ...)``: products of the
    decays after it, zero where a segment starts after it. Sums of logarithms, formed from the end: nothing cancels."""
    after = F.pad(gate.flip(1), [0, 0] * (gate.dim() - 2) + [1, 0]).cumsum(dim=1).flip(1)
    kept = after.exp()
    if starts is not None:
        later = F.pad(starts.flip(1).int(), (1, 0)).cumsum(dim=1).flip(1) > 0
        kept = kept.masked_fill(later.reshape(*later.shape, *[1] * (gate.dim() - 2)), 0)
    return kept[:, 1:], kept[:, 0]
