"""Levels, positions, and the stack of states that a binary counter keeps.

Token s lies at level ``bit_length(t XOR s)`` as seen from token t, positions counted from the segment's start: 0 is the
token itself, 1 the one before it if they are a pair, 2 the pair before if these four are one, and so on. Before token
p, the tokens 0..p-1 fall into one bucket for each bit of p that is set: bucket m holds 2^m of them. Seen from token
i >= p the bucket's level is the greater of m + 1 and ``bit_length(i XOR p)``, and before token i it is a part of bucket
``bit_length(i XOR p) - 1`` if that is above m. All else here follows from these two sentences.

With n levels there are n - 1 buckets (one, if there is one level only): whatever would lie higher counts as the
highest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Fenwick(NamedTuple):
    """What ``log_linear`` remembers of the tokens read.

    Attributes:
        states: (b h m k v) float32, the state of each bucket; those without a bit in the count are zero.
        tokens: (b) int64, tokens of the segment so far.
    """

    states: Float[Tensor, "b h m k v"]
    tokens: Int[Tensor, "b"]


def buckets(levels: int) -> int:
    """How many buckets that many levels need."""
    return max(levels - 1, 1)


def bit_length(x: Tensor) -> Tensor:
    """Bits of an integer >= 0 below 2^53; 0 for 0."""
    return torch.frexp(x.double()).exponent.long()


def positions(starts: Tensor | None, count: Tensor | None, length: int, device: torch.device) -> Tensor:
    """(b t), or (1 t) where all rows are alike: each token's place in its segment, in int64."""
    place = torch.arange(length, device=device)[None]
    first = place if count is None else place + count[:, None]
    if starts is None:
        return first
    latest = torch.where(starts, place, -1).cummax(dim=1).values
    return torch.where(latest >= 0, place - latest, first)


def seen_from(position: Tensor, before: Tensor, stack: int, levels: int) -> Tensor:
    """(... c m): the level of each bucket of the count ``before`` (...) as seen from ``position`` (... c)."""
    bucket = torch.arange(stack, device=position.device)
    between = bit_length(position ^ before[..., None])
    return torch.maximum(bucket + 1, between[..., None]).clamp_(max=levels - 1)


def bucket_of(position: Tensor, after: Tensor, stack: int) -> Tensor:
    """(... c): the bucket of the count ``after`` (...) that tokens at ``position`` (... c) are in."""
    return (bit_length(position ^ after[..., None]) - 1).clamp_(0, stack - 1)


def merged(states: Tensor, into: Tensor | int) -> Tensor:
    """Buckets up to ``into`` (an index, or (b) of them) added up in it; states are (b h m k v)."""
    if isinstance(into, int):
        states = states.clone()
        states[:, :, into] = states[:, :, : into + 1].sum(dim=2)
        states[:, :, :into] = 0
        return states
    up_to, there = _masks(states, into)
    return torch.where(up_to, 0, states) + torch.where(up_to, states, 0).sum(dim=2, keepdim=True) * there


def merged_backward(grad: Tensor, into: Tensor | int) -> Tensor:
    """The gradient of what ``merged`` was given."""
    if isinstance(into, int):
        grad = grad.clone()
        grad[:, :, :into] = grad[:, :, into : into + 1]
        return grad
    up_to, there = _masks(grad, into)
    return torch.where(up_to, (grad * there).sum(dim=2, keepdim=True), grad)


def _masks(states: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    bucket = torch.arange(states.shape[2], device=states.device)
    up_to, there = bucket <= into[:, None], bucket == into[:, None]
    return up_to[:, None, :, None, None], there[:, None, :, None, None].to(states.dtype)


def by_level(values: Tensor, level: Tensor, levels: int) -> Tensor:
    """(... c l): sums of values (... c m) over those of one level (... c m, broadcast)."""
    if values.device.type == "cpu":
        found = values.new_zeros(*values.shape[:-1], levels)
        return found.scatter_add_(-1, level.expand(values.shape), values)
    # A scatter on a GPU adds in no fixed order.
    return torch.stack([torch.where(level == one, values, 0).sum(dim=-1) for one in range(levels)], dim=-1)
