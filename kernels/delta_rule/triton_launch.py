"""What launches of delta_rule's Triton kernels are made of: sizes, how tensors are read, what walks are given."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqlong.kernels.delta_rule.plan import CHUNK, PLANS, Plan
from seqlong.kernels.plans import power, segments


class Sizes(NamedTuple):
    """Everything a launch is cut by; K, V are widths, KB, VB the tiles that hold them, R heads share a group."""

    B: int
    T: int
    G: int
    H: int
    R: int
    K: int
    V: int
    KB: int
    VB: int
    NC: int
    NS: int
    CPS: int
    BV: int
    plan: Plan

    @property
    def tile(self) -> dict[str, int]:
        return {"K": self.K, "V": self.V, "KB": self.KB, "VB": self.VB, "BV": self.BV}

    @property
    def walks(self) -> tuple[int]:
        return (self.H * (self.VB // self.BV) * self.NS * self.B,)

    @property
    def chunks(self) -> tuple[int]:
        return (self.H * self.NC * self.B,)


def sizes(q: Tensor, v: Tensor, log_decay: Tensor | None) -> Sizes:
    rows, length = q.shape[:2]  # symbols where a compiler traces them; heads and widths never are
    groups, width, heads, value_width = map(int, (*q.shape[2:], *v.shape[2:]))
    plan = PLANS.settled(q, v, channels=log_decay is not None and log_decay.dim() == 4)
    k_tile, v_tile = power(width), power(value_width)
    value_tile = min(plan.value_tile, k_tile, v_tile)
    chunks = -(-length // CHUNK)
    count, each = 1, chunks
    if isinstance(length, int) and isinstance(rows, int):  # no shape that a graph sees depends on it
        count, each = segments(q, chunks, rows * heads * (v_tile // value_tile), plan.programs_per_sm)
    return Sizes(
        rows, length, groups, heads, heads // groups, width, value_width, k_tile, v_tile, chunks, count, each,
        value_tile, plan,
    )  # fmt: skip


def strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride()[:3]  # type: ignore[return-value]


def readable(x: Tensor) -> Tensor:
    """x as kernels read it: one channel after another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def by_head(x: Tensor, z: Sizes) -> Tensor:
    """(b t h) -> (b h n·C), float32, zero past the end."""
    out = x.new_zeros(z.B, z.H, z.NC * CHUNK, dtype=torch.float32)
    out[:, :, : z.T] = x.transpose(1, 2)
    return out


def by_token(x: Tensor, z: Sizes) -> Tensor:
    return x[:, :, : z.T].transpose(1, 2).contiguous()


class Prepared(NamedTuple):
    """What walks read of every chunk; only where each channel has its own decay are the first three not q, k and k."""

    early_q: Tensor  # (b t h k) queries of length 1, decayed from the chunk's entry
    early_k: Tensor
    late: Tensor  # keys decayed to the chunk's end
    weight: Tensor  # (b h n·C)
    total: Tensor  # (b h n·C), or (b t h k): sums of log2 decays in each chunk
    rq: Tensor  # (b h n·C)
    rk: Tensor
    inverse: Tensor  # (b h n C C)
    scores: Tensor
    erase: Tensor | None  # what is inverted, where each channel has its own decay

    @property
    def channel(self) -> bool:
        return self.erase is not None

    def read_by(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """Arguments of a walk: these, and x, the values or the output's gradient."""
        return *self[:3], x, *self[3:9]

    def numbers(self, x: Tensor, z: Sizes) -> tuple[int, ...]:
        """Sizes and strides for a walk of these and x; with a decay a channel R is one: heads share nothing."""
        return (z.T, z.H, z.R, z.NC, z.NS, z.CPS, *strides(self.early_q), *strides(self.early_k), *strides(x))
