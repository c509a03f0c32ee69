"""What vector_decay accepts, said before anything is read: a kernel would read beyond a tensor in silence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: How a gate becomes a decay; ``gates.py`` has the formulas.
ACTIVATIONS = ("log_decay", "logsigmoid", "lower_bound")


def check(
    op: str,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor,
    activation: str,
    divisor: float,
    *,
    lower_bound: Tensor | None = None,
    bonus: Tensor | None = None,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> None:
    """Raise a ValueError that names the argument, what was found and what was expected."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op} has no activation '{activation}'; it has {', '.join(ACTIVATIONS)}")
    if activation != "logsigmoid" and divisor != 1.0:
        raise ValueError(f"{op} has a divisor with activation 'logsigmoid' only, found {divisor} with '{activation}'")
    if not (math.isfinite(divisor) and divisor > 0):
        raise ValueError(f"{op} needs a positive divisor, found {divisor}")
    bounded = activation == "lower_bound"
    if bounded != (lower_bound is not None):
        found = "none" if lower_bound is None else "one"
        raise ValueError(f"{op} needs lower_bound with activation 'lower_bound' and no other, found {found} with "
                         f"'{activation}'")  # fmt: skip
    if bounded != (k is None):
        wanted = "makes k itself: pass k=None" if bounded else "needs k, found None"
        raise ValueError(f"{op} with activation '{activation}' {wanted}")
    for name, x in (("q", q), ("k", k), ("v", v), ("gate", gate)):
        if x is not None and (x.dim() != 4 or not x.is_floating_point()):
            raise ValueError(f"{op} needs {name} with four axes and a floating type, found {_said(x)}")
    (rows, length, heads, width), value_width = q.shape, v.shape[3]
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("v", v, (rows, length, heads, value_width)),
        ("k", k, (rows, length, heads, width)),
        ("gate", gate, (rows, length, heads, width)),
        ("lower_bound", lower_bound, (heads, width)),
        ("bonus", bonus, (heads, width)),
        ("initial_state", initial_state, (rows, heads, width, value_width)),
        ("starts", starts, (rows, length)),
    ]
    for name, one, shape in expected:
        if one is not None:
            _expect(op, name, one, shape)
    if k is not None and k.dtype != q.dtype:
        raise ValueError(f"{op} needs q and k of one type, found {q.dtype} and {k.dtype}")
    if starts is not None and starts.dtype != torch.bool:
        raise ValueError(f"{op} needs starts of type bool, found {starts.dtype}")


def _expect(op: str, name: str, x: Tensor, shape: Sequence[int]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{op} needs {name} of shape {tuple(shape)}, found {_said(x)}")


def _said(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
