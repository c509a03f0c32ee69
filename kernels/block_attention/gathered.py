"""block_attention in torch: for some queries at a time, their chosen keys are gathered and all is done at once.

The backward pass is written out, so that it gathers again and adds to one gradient of all keys: autograd would keep
what was gathered, and make a gradient as long as the row for every piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqlong.kernels.precision import accumulation

#: Numbers that the keys gathered for a piece of queries may have: they stay in a CPU's cache, and fill a GPU.
BUDGET = 1 << 22
GPU_BUDGET = 1 << 25


class _Pieces:
    """Inputs as they are gathered, and the pieces of queries, each within a block."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int) -> None:
        self.rows, self.length, self.heads, self.width = q.shape
        self.keys, self.shared = k.shape[1:3]
        self.block, self.groups, self.count = block, chosen.shape[2], chosen.shape[3]
        self.offset, self.full = self.keys - self.length, self.keys // block
        self.kept = accumulation(q.dtype)
        self.q, self.k, self.v, self.chosen = q, k, v, chosen
        self.tables = [self.table(x) for x in (k, v)]
        # Row of the tables where the blocks of a row and group begin.
        row = torch.arange(self.rows, device=q.device)[:, None] * self.shared
        head = torch.arange(self.groups, device=q.device) // (self.groups // self.shared)
        self.base = ((row + head) * self.full)[:, None, :, None]

    def table(self, x: Tensor) -> Tensor:
        """(b s g k) -> a line a block: (b·g·n, block·k)."""
        whole = x[:, : self.full * self.block].unflatten(1, (self.full, self.block))
        return whole.permute(0, 3, 1, 2, 4).reshape(-1, self.block * x.shape[3])

    def untable(self, table: Tensor, width: int) -> Tensor:
        """What ``table`` did, back: (b n·block g k)."""
        return (
            table.view(self.rows, self.shared, self.full, self.block, width)
            .permute(0, 2, 3, 1, 4)
            .reshape(self.rows, -1, self.shared, width)
        )

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Queries, counted in t, and the keys of their own block up to the last of them."""
        each = self.rows * self.groups * max(1, self.count) * self.block * max(self.width, self.v.shape[3])
        most = max(1, (GPU_BUDGET if self.q.is_cuda else BUDGET) // each)
        start = 0
        while start < self.length:
            own = (self.offset + start) // self.block
            stop = min(start + most, (own + 1) * self.block - self.offset, self.length)
            yield slice(start, stop), slice(own * self.block, self.offset + stop)
            start = stop

    def scores(self, here: slice, own: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores (b p h x) of a piece: of the chosen keys, then of the own ones; the lines gathered (b p j c); the
        queries (b p h k) and the keys that were gathered (b·p·j, c·block, k)."""
        chosen = self.chosen[:, here]
        queries = self.q[:, here].to(self.kept)
        size = queries.shape[1]
        near = self.grouped(queries) @ self.k[:, None, own].to(self.kept).movedim(3, 2).mT  # (b p g r m)
        step = torch.arange(here.start, here.stop, device=queries.device) + self.offset
        later = torch.arange(own.start, own.stop, device=queries.device) > step[:, None]
        near = near.flatten(2, 3).masked_fill(later[None, :, None], -torch.inf)
        there = (chosen >= 0) & (chosen < own.start // self.block)
        lines = torch.where(there, chosen, 0) + self.base
        if not (self.count and own.start):
            return near / self.width**0.5, lines[..., :0], queries, queries[:0]
        gathered = self.gather(0, lines)
        far = queries.reshape(-1, self.heads // self.groups, self.width) @ gathered.mT  # (b·p·j r c·block)
        far = far.view(self.rows, size, self.groups, -1, self.count, self.block)
        far = far.masked_fill(~there[:, :, :, None, :, None], -torch.inf).reshape(self.rows, size, self.heads, -1)
        return torch.cat([far, near], dim=3) / self.width**0.5, lines, queries, gathered

    def gather(self, which: int, lines: Tensor) -> Tensor:
        """(b·p·j, c·block, k)."""
        width = (self.k, self.v)[which].shape[3]
        return self.tables[which][lines.flatten()].view(-1, lines.shape[3] * self.block, width).to(self.kept)

    def grouped(self, x: Tensor) -> Tensor:
        """(b p h x) -> (b p g r x): heads that share keys together."""
        return x.unflatten(2, (self.shared, -1))

    def chosen_part(self, x: Tensor, far: int) -> Tensor:
        """(b p h x) -> (b·p·j, r, far): what belongs to chosen keys, by the groups that chose."""
        return x[..., :far].reshape(-1, self.heads // self.groups, far)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int) -> Tensor:
        ctx.block = block
        # Written in place: what is kept must not lie between what comes and goes, which would scatter the memory.
        output = v.new_empty(*q.shape[:3], v.shape[3])
        sums = q.new_empty(*q.shape[:3], 1, dtype=accumulation(q.dtype))
        with torch.autocast(q.device.type, enabled=False):
            pieces = _Pieces(q, k, v, chosen, block)
            for here, own in pieces:
                scores, lines, *_ = pieces.scores(here, own)
                total = scores.logsumexp(-1, keepdim=True)
                weights = (scores - total).exp()
                far = scores.shape[3] - (own.stop - own.start)
                values = pieces.v[:, None, own].to(pieces.kept).movedim(3, 2)  # (b 1 g m v)
                mixed = (pieces.grouped(weights[..., far:]) @ values).flatten(2, 3)
                if far:
                    mixed = mixed + (pieces.chosen_part(weights, far) @ pieces.gather(1, lines)).view_as(mixed)
                output[:, here], sums[:, here] = mixed.to(v.dtype), total
        ctx.save_for_backward(q, k, v, chosen, output, sums)
        return output

    @staticmethod
    @once_differentiable  # what is kept, the sums of weights, has no gradient: a second derivative would be wrong
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        q, k, v, chosen, output, total = ctx.saved_tensors
        dq = torch.empty_like(q)
        with torch.autocast(q.device.type, enabled=False):
            pieces = _Pieces(q, k, v, chosen, ctx.block)
            own_sums = [torch.zeros(x.shape, dtype=pieces.kept, device=x.device) for x in (k, v)]
            far_sums = [torch.zeros(x.shape, dtype=pieces.kept, device=x.device) for x in pieces.tables]
            for here, own in pieces:
                scores, lines, queries, far_keys = pieces.scores(here, own)
                far, scale = scores.shape[3] - (own.stop - own.start), pieces.width**-0.5
                weights = (scores - total[:, here]).exp()
                given = gradient[:, here].to(pieces.kept)
                dots = (given * output[:, here].to(pieces.kept)).sum(-1, keepdim=True)
                values = pieces.v[:, None, own].to(pieces.kept).movedim(3, 2)
                dweights = (pieces.grouped(given) @ values.mT).flatten(2, 3)
                rows = given.reshape(-1, pieces.heads // pieces.groups, given.shape[3])
                if far:
                    far_values = pieces.gather(1, lines)
                    dfar = (rows @ far_values.mT).reshape(*weights.shape[:3], far)
                    dweights = torch.cat([dfar, dweights], dim=3)
                dscores = weights * (dweights - dots) * scale
                keys = pieces.k[:, None, own].to(pieces.kept).movedim(3, 2)
                dqueries = (pieces.grouped(dscores[..., far:]) @ keys).flatten(2, 3)
                for sums, left, right in ((own_sums[0], dscores, queries), (own_sums[1], weights, given)):
                    pair = (pieces.grouped(left[..., far:]), pieces.grouped(right))
                    sums[:, own] += torch.einsum("bpgrm,bpgrx->bmgx", *pair)
                if far:
                    mine = pieces.chosen_part(dscores, far)
                    dqueries = dqueries + (mine @ far_keys).view_as(dqueries)
                    flat = queries.reshape(-1, pieces.heads // pieces.groups, pieces.width)
                    _add(far_sums[0], lines, mine.mT @ flat)
                    _add(far_sums[1], lines, pieces.chosen_part(weights, far).mT @ rows)
                dq[:, here] = dqueries.to(q.dtype)
            for own_sum, far_sum in zip(own_sums, far_sums, strict=True):
                own_sum[:, : pieces.full * pieces.block] += pieces.untable(far_sum, own_sum.shape[3])
        return dq, own_sums[0].to(k.dtype), own_sums[1].to(v.dtype), None, None


def _add(sums: Tensor, lines: Tensor, gradient: Tensor) -> None:
    """Add gradients (b·p·j, c·block, k) to the lines they are of; on a GPU in the same order every time."""
    lines, gradient = lines.flatten(), gradient.reshape(-1, sums.shape[1])
    if sums.is_cuda:
        sums.index_put_((lines,), gradient, accumulate=True)
    else:
        sums.index_add_(0, lines, gradient)


def block_attention_gathered(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b s g k"],
    v: Float[Tensor, "b s g v"],
    chosen: Int[Tensor, "b t j c"],
    block: int,
) -> Float[Tensor, "b t h v"]:
    """See ``op.py``."""
    if not q.shape[1]:
        return v.new_zeros(*q.shape[:3], v.shape[3])
    return _Gathered.apply(q, k, v, chosen, block)  # type: ignore[no-any-return]
