"""How dplr's Triton kernels are cut for a shape: chunk, value tile, warps and stages."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from seqlong.kernels import tuning
from seqlong.kernels.plans import Cut, Plans


@dataclass(frozen=True)
class Plan(Cut):
    """One configuration; none depends on the length or the batch.

    Attributes:
        chunk: tokens of a chunk, a power of two of at least 16.
        value_tile: value columns of a program of the walk.
        matrix_warps, output_warps, read_warps, gradient_warps: of the kernels with one program a chunk.
        walk: ``10 * warps + stages`` of the walk.
    """

    chunk: int = 32
    value_tile: int = 32
    matrix_warps: int = 4
    output_warps: int = 4
    read_warps: int = 4
    gradient_warps: int = 8
    walk: int = 42


def default(dtype: torch.dtype, k: int, v: int) -> Plan:
    """Safe on any GPU with 99 KiB of shared memory; k and v are the tiles of the widths."""
    if max(k, v) > 64 and dtype != torch.float32:
        return Plan(value_tile=min(v, 32), matrix_warps=8, output_warps=8, read_warps=8)
    return Plan(value_tile=min(v, 32), chunk=16 if dtype == torch.float32 else 32,
                walk=41 if dtype == torch.float32 else 42)  # fmt: skip


PLANS = Plans("dplr", default)


def candidates() -> dict[str, dict[str, list[tuning.Config]]]:
    """Op -> key -> configurations worth measuring for the shapes that models use, the default first."""
    first = default(torch.bfloat16, 64, 64)
    tried = [
        first,
        replace(first, walk=43),
        replace(first, walk=44, value_tile=16),
        replace(first, walk=23, value_tile=16),
        replace(first, matrix_warps=2, output_warps=2),
        replace(first, gradient_warps=4),
        replace(first, chunk=16),
        replace(first, chunk=64, matrix_warps=8, output_warps=8, read_warps=8),
    ]
    return {"dplr": {tuning.key(torch.bfloat16, k=64, v=64): [asdict(plan) for plan in tried]}}
