"""How scalar_decay's Triton kernels are cut for a shape: chunk, tiles, warps and stages, programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from seqlong.kernels import tuning
from seqlong.kernels.plans import Cut, Plans

#: What the forward pass keeps for the backward: nothing, or the state that enters each chunk.
NOTHING, CHUNKS = 0, 1


@dataclass(frozen=True)
class Plan(Cut):
    """One configuration; none depends on the length or the batch.

    Attributes:
        chunk: tokens of a chunk.
        programs_per_sm: segments are cut so that about this many programs fall to a multiprocessor.
        value_tile: value columns of a program.
        key_slice: key columns of a program in the gradients of q and k.
        run: chunks of a program there.
        states, forward, fused, values, keys, scores: ``10 * warps + stages`` of each kernel's loop.
    """

    chunk: int = 64
    programs_per_sm: int = 4
    value_tile: int = 64
    key_slice: int = 64
    run: int = 32
    states: int = 43
    forward: int = 43
    fused: int = 43
    values: int = 42
    keys: int = 42
    scores: int = 43


def default(dtype: torch.dtype, k: int, v: int, shared: bool = True) -> Plan:
    """Safe on any GPU with 99 KiB of shared memory, the fastest nowhere; k and v are the tiles of the widths."""
    wide = dtype == torch.float32
    big = max(k, v) > 128 or (wide and max(k, v) > 64)
    stages = 1 if wide or big else 2
    one = 40 + stages
    return Plan(
        chunk=32 if big or (wide and shared) else 64,
        value_tile=min(v, 32 if k > 128 or (wide and k > 64) else 64),
        key_slice=min(k, 32 if big else 64),
        run=32,
        states=one,
        forward=one,
        fused=one,
        values=one,
        keys=41,
        scores=one,
    )


PLANS, PLANS_OF_SSD = Plans("scalar_decay", default), Plans("ssd", default)


def settled(q: Tensor, v: Tensor, ssd: bool) -> Plan:
    """The plan of a call; see ``Plans.settled``."""
    return PLANS_OF_SSD.settled(q, v) if ssd else PLANS.settled(q, v, shared=_shared(q, v))


def why_none(q: Tensor, v: Tensor, ssd: bool) -> str | None:
    """None if there is a plan; see ``Plans.why_none``."""
    return PLANS_OF_SSD.why_none(q, v) if ssd else PLANS.why_none(q, v, shared=_shared(q, v))


def _shared(q: Tensor, v: Tensor) -> bool:
    """Whether heads share queries and keys."""
    return int(q.shape[2]) != int(v.shape[2])


def candidates() -> dict[str, dict[str, list[tuning.Config]]]:
    """Op -> key -> configurations worth measuring for the shapes that models use, the default first."""
    bf16 = torch.bfloat16
    found: dict[str, dict[str, list[tuning.Config]]] = {"scalar_decay": {}, "ssd": {}}
    shapes = [(64, 64, False, False), (128, 128, False, False), (64, 64, True, False), (128, 64, True, True),
              (64, 64, True, True)]  # fmt: skip
    for k, v, shared, ssd in shapes:
        first = default(bf16, k, v, shared)
        deep = {"states": 43, "forward": 43, "keys": 43, "fused": 43, "scores": 43}
        tried = [
            first,
            replace(first, **deep),
            replace(first, **{**deep, "forward": 42, "values": 42}),
            replace(first, **{**deep, "forward": 42, "values": 43}),
            replace(first, **{**deep, "keys": 42, "run": 128}),
            replace(first, **{**deep, "forward": 42, "values": 42, "keys": 42, "run": 128}),
            replace(first, **{**deep, "programs_per_sm": 8}),
            replace(first, **{**deep, "chunk": 32}),
        ]
        name = tuning.key(bf16, k=k, v=v) if ssd else tuning.key(bf16, k=k, v=v, shared=shared)
        found["ssd" if ssd else "scalar_decay"][name] = [asdict(plan) for plan in tried]
    return found
