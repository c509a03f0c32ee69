"""How scalar_decay's Triton kernels are cut for a shape: chunk, tiles, warps and stages, programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from seqlong.kernels import tuning
from seqlong.kernels.runtime import INTERPRETED, constant_when_traced

#: What the forward pass keeps for the backward: nothing, or the state that enters each chunk.
NOTHING, CHUNKS = 0, 1


@dataclass(frozen=True)
class Plan:
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

    def launch(self, kernel: str) -> dict[str, int]:
        """Launch arguments of a kernel: warps, and stages of its loop."""
        value = getattr(self, kernel)
        return {"num_warps": value // 10, "ST": value % 10}


def power(width: int | torch.SymInt) -> int:
    """The tile that holds ``width`` columns: a power of two, at least 16 (the least of a matrix product).

    A compiler that traces symbols fixes the width here: kernels are compiled for one.
    """
    return max(16, 1 << (int(width) - 1).bit_length())


def default(dtype: torch.dtype, k: int, v: int, shared: bool) -> Plan:
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


def settled(q: Tensor, v: Tensor, ssd: bool) -> Plan | None:
    """The plan for a call's type, widths and device: a tuned one, else the default; None if neither is right here.

    The first use of a plan in a process is checked, see kernels/tuning.py.
    """
    shared = int(q.shape[2]) != int(v.shape[2])
    config = tuning.settle(*_asked(v.dtype, power(q.shape[3]), power(v.shape[3]), shared, ssd), v.device)
    return None if config is None else _plan(tuple(config.items()))


def works(q: Tensor, v: Tensor, ssd: bool) -> bool:
    """Whether there is a plan; this, unlike the plan itself, a compiler can ask while it traces."""
    widths = power(q.shape[3]), power(v.shape[3])
    return _works(v.dtype, *widths, int(q.shape[2]) != int(v.shape[2]), ssd, v.device)


@constant_when_traced
def _works(dtype: torch.dtype, k: int, v: int, shared: bool, ssd: bool, device: torch.device) -> bool:
    return tuning.settle(*_asked(dtype, k, v, shared, ssd), device) is not None


@lru_cache
def _asked(dtype: torch.dtype, k: int, v: int, shared: bool, ssd: bool) -> tuple[str, str, tuning.Config]:
    """Op, key and default settings."""
    name = tuning.key(dtype, k=k, v=v) if ssd else tuning.key(dtype, k=k, v=v, shared=shared)
    return "ssd" if ssd else "scalar_decay", name, dict(asdict(default(dtype, k, v, shared or ssd)))


@lru_cache
def _plan(settings: tuple[tuple[str, int], ...]) -> Plan:
    return Plan(**dict(settings))


#: Chunks of a row that are walked sooner than two more kernels are launched, if walks keep a quarter of the GPU busy.
SHORT = 32


@lru_cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def segments(like: Tensor, chunks: int, walks: int, programs_per_sm: int) -> tuple[int, int]:
    """How many segments a row is cut into, and chunks in each, for ``walks`` independent walks (rows, heads, tiles)."""
    processors = 2 if INTERPRETED or not like.is_cuda else _processors(like.device.index)
    if like.is_cuda and chunks <= SHORT and 4 * walks >= processors:
        return 1, chunks
    wanted = max(1, min(chunks, programs_per_sm * processors // walks))  # a program more would be one wave more
    each = -(-chunks // wanted)
    return -(-chunks // each), each


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
        found["ssd" if ssd else "scalar_decay"][name] = [dict(asdict(plan)) for plan in tried]
    return found
