"""How delta_rule's Triton kernels are cut for a shape: tiles, warps and stages, programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from seqlong.kernels import tuning
from seqlong.kernels.plans import Cut, Plans

#: Tokens of a chunk: four blocks of 16, whose inverses are merged.
CHUNK = 64


@dataclass(frozen=True)
class Plan(Cut):
    """One configuration; none depends on the length or the batch.

    Attributes:
        programs_per_sm: segments are cut so that about this many programs of the walk fall to a multiprocessor.
        value_tile: value columns of a program.
        prepare: warps that make products of the rows of a chunk, with one decay a head.
        products: warps that make those of a chunk, with one decay a channel.
        states, forward, adjoint: ``10 * warps + stages`` of the walks: of segments, with output, from the right.
        local, keys: warps.
    """

    programs_per_sm: int = 2
    value_tile: int = 64
    prepare: int = 4
    products: int = 4
    states: int = 42
    forward: int = 42
    adjoint: int = 42
    local: int = 8
    keys: int = 4


def default(dtype: torch.dtype, k: int, v: int, channels: bool = False) -> Plan:
    """Safe on any GPU with 99 KiB of shared memory, the fastest nowhere.

    k and v are the tiles of the widths; ``channels``: whether each has its own decay, which has its own kernels.
    """
    if dtype == torch.float32:
        tile = min(v, 32 if k > 64 else 64)
        return Plan(value_tile=tile, states=41, forward=41, adjoint=41, keys=8)
    if k > 128:
        return Plan(value_tile=min(v, 32), prepare=8, products=8, states=81, forward=81, adjoint=81, keys=8)
    return Plan(value_tile=min(v, 64), states=41, forward=41, adjoint=41)


PLANS = Plans("delta_rule", default)


def candidates() -> dict[str, dict[str, list[tuning.Config]]]:
    """Op -> key -> configurations worth measuring for the shapes that models use, the default first."""
    found: dict[str, list[tuning.Config]] = {}
    for k, v, channels in ((64, 64, False), (128, 128, False), (64, 64, True), (128, 128, True)):
        first = default(torch.bfloat16, k, v, channels)
        tried = [
            first,
            replace(first, states=42, forward=42, adjoint=42),
            replace(first, states=43, forward=43, adjoint=43),
            replace(first, states=43, forward=42, adjoint=42),
            replace(first, states=42, forward=42, adjoint=42, programs_per_sm=4),
            replace(first, states=42, forward=42, adjoint=42, programs_per_sm=1),
            replace(first, states=42, forward=42, adjoint=42, value_tile=32),
            replace(first, states=42, forward=42, adjoint=42, keys=8),
            replace(first, states=42, forward=42, adjoint=42, local=4),
            replace(first, states=42, forward=42, adjoint=42, prepare=8),
            replace(first, states=42, forward=42, adjoint=42, products=8),
        ]
        found[tuning.key(torch.bfloat16, k=k, v=v, channels=channels)] = [asdict(plan) for plan in tried]
    return {"delta_rule": found}
