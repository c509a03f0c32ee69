"""How Triton kernels of ops along a row are cut for a shape: plans, tiles, segments.

An op's ``plan.py`` has a dataclass of settings, a default for types and widths, and its ``Plans``, which know what is
used: a tuned plan, else the default; the first use in a process is checked (tuning.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from seqlong.kernels import tuning
from seqlong.kernels.runtime import INTERPRETED, constant_when_traced

#: Chunks of a row that are walked sooner than two more kernels are launched, if walks keep a quarter of the GPU busy.
SHORT = 32


@dataclass(frozen=True)
class Cut:
    """What plans of all ops have."""

    def launch(self, kernel: str) -> dict[str, int]:
        """Launch arguments of a kernel with a loop, whose setting is ``10 * warps + stages``."""
        value = getattr(self, kernel)
        return {"num_warps": value // 10, "ST": value % 10}


P = TypeVar("P", bound=Cut)


class Plans(Generic[P]):
    """The plans of one op: they depend on the type of v, on the tiles of both widths, and on flags of the op's own.

    Args:
        op: its name.
        default: makes the default plan of a type, the tiles k and v, and the flags.
    """

    def __init__(self, op: str, default: Callable[..., P]) -> None:
        self.op, self.default = op, default
        _OPS[op] = self

    def settled(self, q: Tensor, v: Tensor, **flags: bool) -> P:
        """The plan for a call's type, widths and device."""
        plan = self.find(v.dtype, power(q.shape[3]), power(v.shape[3]), v.device, **flags)
        if plan is None:  # the public function asks first, and does not come here
            raise RuntimeError(f"no configuration of {self.op}'s Triton kernels is right on this machine")
        return plan

    def why_none(self, q: Tensor, v: Tensor, widest: tuple[int, int] | None = None, **flags: bool) -> str | None:
        """None if there is a plan, else why not; a compiler can ask this, unlike the plan itself, while it traces.

        ``widest``: of q and v; wider ones are run in parts, for each of which there must be a plan.
        """
        width, value_width = int(q.shape[3]), int(v.shape[3])
        tiles = {(power(width), power(value_width))}
        if widest is not None:
            widths, value_widths = parts(width, widest[0]), parts(value_width, widest[1])
            tiles = {(power(x.stop - x.start), power(y.stop - y.start)) for x in widths for y in value_widths}
        if all(_exists(self.op, v.dtype, *tile, v.device, tuple(flags.items())) for tile in sorted(tiles)):
            return None
        return "no configuration of the Triton kernels passed its check on this GPU"

    def find(self, dtype: torch.dtype, k: int, v: int, device: torch.device, **flags: bool) -> P | None:
        """The plan for tiles; None if neither a tuned one nor the default is right here."""
        key, default, settings = _asked(self, dtype, k, v, tuple(flags.items()))
        config = tuning.settle(self.op, key, settings, device)
        return None if config is None else _changed(default, tuple(config.items()))


_OPS: dict[str, Plans[Any]] = {}


@constant_when_traced
def _exists(op: str, dtype: torch.dtype, k: int, v: int, device: torch.device, flags: tuple[Any, ...]) -> bool:
    return _OPS[op].find(dtype, k, v, device, **dict(flags)) is not None


@lru_cache
def _asked(
    plans: Plans[P], dtype: torch.dtype, k: int, v: int, flags: tuple[tuple[str, bool], ...]
) -> tuple[str, P, tuning.Config]:
    """Key, default plan, and its settings."""
    default = plans.default(dtype, k, v, **dict(flags))
    return tuning.key(dtype, k=k, v=v, **dict(flags)), default, asdict(default)


@lru_cache
def _changed(plan: P, settings: tuple[tuple[str, Any], ...]) -> P:
    return replace(plan, **dict(settings))


def power(width: int | torch.SymInt) -> int:
    """The tile that holds ``width`` columns: a power of two, at least 16 (the least of a matrix product).

    A compiler that traces symbols fixes the width here: kernels are compiled for one.
    """
    return max(16, 1 << (int(width) - 1).bit_length())


def parts(width: int, widest: int) -> list[slice]:
    """Even parts of a width, none wider than kernels hold, each but the last a multiple of 16."""
    count = -(-width // widest)
    each = -(-width // count // 16) * 16
    return [slice(begin, min(begin + each, width)) for begin in range(0, width, each)]


def processors(like: Tensor) -> int:
    """Multiprocessors of a tensor's GPU; 2 where there is none, so that interpreted rows are cut too."""
    return 2 if INTERPRETED or not like.is_cuda else _processors(like.device.index)


def segments(like: Tensor, chunks: int, walks: int, programs_per_sm: int) -> tuple[int, int]:
    """How many segments a row is cut into, and chunks in each, for ``walks`` independent walks (rows, heads, tiles)."""
    if like.is_cuda and chunks <= SHORT and 4 * walks >= processors(like):
        return 1, chunks
    wanted = max(1, min(chunks, programs_per_sm * processors(like) // walks))  # one program more: one wave more
    each = -(-chunks // wanted)
    return -(-chunks // each), each


@lru_cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
