"""How delta_rule's Triton kernels are cut for a shape: tiles, warps and stages, programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from seqlong.kernels import tuning
from seqlong.kernels.runtime import constant_when_traced
from seqlong.kernels.scalar_decay.plan import power

#: Tokens of a chunk: four blocks of 16, whose inverses are merged.
CHUNK = 64


@dataclass(frozen=True)
class Plan:
    """One configuration; none depends on the length or the batch.

    Attributes:
        programs_per_sm: segments are cut so that about this many programs of the walk fall to a multiprocessor.
        value_tile: value columns of a program.
        prepare: warps that make the inverse of a chunk.
        products: warps that make products of 16 rows of a chunk, with one decay a channel.
        states, forward, adjoint: ``10 * warps + stages`` of the walks: of segments, with output, from the right.
        local, keys: warps.
    """

    programs_per_sm: int = 2
    value_tile: int = 64
    prepare: int = 1
    products: int = 2
    states: int = 42
    forward: int = 42
    adjoint: int = 42
    local: int = 8
    keys: int = 4

    def launch(self, kernel: str) -> dict[str, int]:
        """Launch arguments of a walk: warps, and stages of its loop."""
        value = getattr(self, kernel)
        return {"num_warps": value // 10, "ST": value % 10}


def default(dtype: torch.dtype, k: int, v: int) -> Plan:
    """Safe on any GPU with 99 KiB of shared memory, the fastest nowhere; k and v are the tiles of the widths."""
    if dtype == torch.float32:
        tile = min(v, 32 if k > 64 else 64)
        return Plan(value_tile=tile, states=41, forward=41, adjoint=41, keys=8)
    return Plan(value_tile=min(v, 64), states=41, forward=41, adjoint=41)


def settled(q: Tensor, v: Tensor) -> Plan | None:
    """The plan for a call's type, widths and device: a tuned one, else the default; None if neither is right here."""
    config = tuning.settle(*_asked(v.dtype, power(q.shape[3]), power(v.shape[3])), v.device)
    return None if config is None else _plan(tuple(config.items()))


def works(q: Tensor, v: Tensor) -> bool:
    """Whether there is a plan; this, unlike the plan itself, a compiler can ask while it traces."""
    return _works(v.dtype, power(q.shape[3]), power(v.shape[3]), v.device)


@constant_when_traced
def _works(dtype: torch.dtype, k: int, v: int, device: torch.device) -> bool:
    return tuning.settle(*_asked(dtype, k, v), device) is not None


@lru_cache
def _asked(dtype: torch.dtype, k: int, v: int) -> tuple[str, str, tuning.Config]:
    """Op, key and default settings."""
    return "delta_rule", tuning.key(dtype, k=k, v=v), dict(asdict(default(dtype, k, v)))


@lru_cache
def _plan(settings: tuple[tuple[str, int], ...]) -> Plan:
    return Plan(**dict(settings))


def candidates() -> dict[str, dict[str, list[tuning.Config]]]:
    """Op -> key -> configurations worth measuring for the shapes that models use, the default first."""
    found: dict[str, list[tuning.Config]] = {}
    for k, v in ((64, 64), (128, 128)):
        first = default(torch.bfloat16, k, v)
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
            replace(first, states=42, forward=42, adjoint=42, prepare=2),
        ]
        found[tuning.key(torch.bfloat16, k=k, v=v)] = [dict(asdict(plan)) for plan in tried]
    return {"delta_rule": found}
