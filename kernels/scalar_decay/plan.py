"""How scalar_decay's Triton kernels are cut for a shape: chunk, tiles, warps and stages, programs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from seqlong.kernels.runtime import INTERPRETED

#: What the forward pass keeps for the backward: nothing, the state entering each segment, or each chunk.
NOTHING, SEGMENTS, CHUNKS = 0, 1, 2


@dataclass(frozen=True)
class Plan:
    """One configuration; none depends on the length or the batch.

    Attributes:
        chunk: tokens of a chunk.
        programs_per_sm: segments are cut so that about this many programs fall to a multiprocessor.
        value_tile: value columns of a program.
        key_slice: key columns of a program in the gradients of q and k.
        run: chunks of a program there.
        states, forward, fused, values, keys, scores: warps and pipeline stages of each kernel, as ``10 * warps + stages``.
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


#: Names of a plan's settings, as tuned files use them.
SETTINGS = tuple(field.name for field in fields(Plan))


def power(width: int) -> int:
    """The tile that holds ``width`` columns: a power of two, at least 16 (the least of a matrix product)."""
    return max(16, 1 << (width - 1).bit_length())


def key(dtype: torch.dtype, width: int, value_width: int, shared: bool, ssd: bool) -> str:
    """The name of a shape in tuned files, without length and batch: ``bfloat16 k128 v64 shared ssd``."""
    words = [str(dtype).removeprefix("torch."), f"k{power(width)}", f"v{power(value_width)}"]
    return " ".join(words + ["shared"] * shared + ["ssd"] * ssd)


def default(dtype: torch.dtype, width: int, value_width: int, shared: bool) -> Plan:
    """Safe on any GPU with 99 KiB of shared memory; right everywhere, the fastest nowhere."""
    k, v = power(width), power(value_width)
    wide = dtype == torch.float32
    big = max(k, v) > 128 or (wide and max(k, v) > 64)
    value_tile = min(v, 32 if k > 128 or (wide and k > 64) else 64)
    stages = 1 if wide or big else 2
    one = 40 + stages
    return Plan(
        chunk=32 if big or (wide and shared) else 64,
        value_tile=value_tile,
        key_slice=min(k, 32 if big else 64),
        run=32,
        states=one,
        forward=one,
        fused=one,
        values=one,
        keys=41,
        scores=one,
    )


def chosen_plan(q: Tensor, v: Tensor, ssd: bool) -> Plan:
    """The plan for a call's type, widths and device: tuned where there is one, else the default."""
    return default(v.dtype, q.shape[3], v.shape[3], q.shape[2] != v.shape[2])


@lru_cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def segments(like: Tensor, chunks: int, walks: int, programs_per_sm: int) -> tuple[int, int]:
    """How many segments a row is cut into, and chunks in each, for ``walks`` independent walks (rows, heads, tiles)."""
    processors = 2 if INTERPRETED or not like.is_cuda else _processors(like.device.index)
    wanted = max(1, min(chunks, programs_per_sm * processors // walks))  # a program more would be one wave more
    each = -(-chunks // wanted)
    return -(-chunks // each), each
