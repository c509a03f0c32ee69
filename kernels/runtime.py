"""Whether Triton kernels can run here, and what a launch needs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

#: Triton's interpreter runs kernels on the CPU, slowly: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: Oldest GPUs whose tensor cores have bfloat16.
MIN_CAPABILITY = (8, 0)


def constant_when_traced(function: F) -> F:
    """``torch.compiler.assume_constant_result`` without the second that its import of torch's compiler takes.

    A compiler that traces a call of ``function`` runs it, and keeps the answer.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # all that torch does; a test compares
    return function


#: Found once: a compiler cannot trace the search.
_INSTALLED = importlib.util.find_spec("triton") is not None


@constant_when_traced
def _capability(index: int | None) -> tuple[int, int]:
    """Of a GPU; of the current one if None. To a compiler it is a number, not code to trace."""
    return _capability_of(torch.cuda.current_device() if index is None else index)


@lru_cache
def _capability_of(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def triton_runs_on(device: torch.device | str) -> str | None:
    """None if Triton kernels run on ``device``, else the reason why they do not."""
    device = torch.device(device)
    if not _INSTALLED:
        return "triton is not installed"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"a {device.type} has no Triton"
    found = _capability(device.index)
    if found < MIN_CAPABILITY:
        wanted, has = (".".join(map(str, version)) for version in (MIN_CAPABILITY, found))
        return f"compute capability {has} is below {wanted}"
    return None


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cpu" if INTERPRETED else "cuda")


def use_allocator() -> None:
    """Give Triton memory for tensor descriptors made on the device.

    Triton keeps the allocator in a context variable, which autograd's backward thread does not inherit: call this
    before every launch, not once.
    """
    import triton

    triton.set_allocator(_scratch)
