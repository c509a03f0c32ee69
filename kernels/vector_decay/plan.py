"""How vector_decay's Triton kernels are cut for a shape: chunk, tiles, warps and stages, programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from seqlong.kernels import tuning
from seqlong.kernels.plans import Cut, Plans


@dataclass(frozen=True)
class Plan(Cut):
    """One configuration; none depends on the length or the batch.

    Attributes:
        chunk: tokens of a chunk: 16, 32, 64 or 128.
        programs_per_sm: segments are cut so that about this many programs fall to a multiprocessor.
        value_tile: value columns of a program.
        key_slice: channels that are worked on at once; the width is one, two or four of them.
        run: chunks of a program in the gradients of q, k and gates.
        states, forward, values, keys: ``10 * warps + stages`` of each kernel's loop.
    """

    chunk: int = 64
    programs_per_sm: int = 4
    value_tile: int = 64
    key_slice: int = 32
    run: int = 32
    states: int = 42
    forward: int = 42
    values: int = 42
    keys: int = 42


def default(dtype: torch.dtype, k: int, v: int, lower_bound: bool = False) -> Plan:
    """Safe on any GPU with 99 KiB of shared memory, the fastest nowhere.

    k and v are the tiles of the widths; ``lower_bound``: whether gates make keys too, which is other code.
    """
    one = 41 if dtype == torch.float32 or max(k, v) > 64 else 42
    return Plan(
        chunk=32,  # Triton 3.6 makes wrong code of 64 rows by 32 channels on Hopper
        value_tile=min(v, 64),
        key_slice=min(k, 64),
        states=one,
        forward=one,
        values=one,
        keys=41,
    )


PLANS = Plans("vector_decay", default)


def candidates() -> dict[str, dict[str, list[tuning.Config]]]:
    """Op -> key -> configurations worth measuring for the shapes that models use, the default first."""
    found: dict[str, list[tuning.Config]] = {}
    for k, v in ((64, 64), (128, 128), (64, 128)):
        first = default(torch.bfloat16, k, v)
        tried = [
            first,
            replace(first, states=43, forward=43, values=43, keys=42),
            replace(first, states=43, forward=42, values=42, keys=43),
            replace(first, states=42, forward=41, values=41, keys=41),
            replace(first, forward=82, values=82, keys=82),
            replace(first, programs_per_sm=8),
            replace(first, programs_per_sm=2),
            replace(first, key_slice=32),
            replace(first, chunk=64),
            replace(first, run=128),
            replace(first, run=4),
        ]
        found[tuning.key(torch.bfloat16, k=k, v=v)] = [asdict(plan) for plan in tried]
    return {"vector_decay": found}
