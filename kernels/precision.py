"""Numeric types inside ops: they are chosen here, never by an autocast that happens to be on."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The type for sums, states and gates: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_written(function: F) -> F:
    """Run an op's body without autocast, which would otherwise reach into it and round its float32 products."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(value.device for value in args if isinstance(value, Tensor))
        with torch.autocast(device.type, enabled=False):
            if device.type == "cuda" and device.index != torch.cuda.current_device():
                with torch.cuda.device(device):  # kernels are launched on the current one
                    return function(*args, **kwargs)
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]
