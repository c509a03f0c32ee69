"""What delta_rule accepts, said before anything is read: a kernel would read beyond a tensor in silence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: What becomes of beta before it is used, in the order in which ops know them by number.
BETA = ("none", "sigmoid", "double_sigmoid")
#: What becomes of the gate.
GATE = ("log_decay", "softplus")


def check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor | None,
    *,
    beta_activation: str = "none",
    gate_activation: str = "log_decay",
    rate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> None:
    """Raise a ValueError that names the argument, what was found and what was expected; shapes as in the README."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"{op} needs {name} with four axes and a floating type, found {_said(x)}")
    (rows, length, groups, width), (heads, value_width) = q.shape, v.shape[2:]
    if not groups or heads % groups:
        raise ValueError(f"{op} needs heads divisible by groups, found {heads} heads, {groups} groups")
    if k.dtype != q.dtype:
        raise ValueError(f"{op} needs q and k of one type, found {q.dtype} and {k.dtype}")
    _expect(op, "k", k, (rows, length, groups, width))
    _expect(op, "v", v, (rows, length, heads, value_width))
    _expect(op, "beta", beta, (rows, length, heads))
    one_of(op, "beta_activation", beta_activation, BETA)
    one_of(op, "gate_activation", gate_activation, GATE)
    by_channel = gate is not None and gate.dim() == 4
    if gate is not None:
        _expect(op, "gate", gate, (rows, length, heads, width) if by_channel else (rows, length, heads))
    if gate_activation == "softplus":
        if gate is None or rate is None:
            missing = "gate" if gate is None else "rate"
            raise ValueError(f"{op} needs {missing} for gate_activation='softplus', found None")
        _expect(op, "rate", rate, (heads,))
        if gate_bias is not None:
            _expect(op, "gate_bias", gate_bias, (heads, width) if by_channel and gate_bias.dim() == 2 else (heads,))
    elif rate is not None or gate_bias is not None:
        found = "rate" if rate is not None else "gate_bias"
        raise ValueError(f"{op} uses {found} with gate_activation='softplus' only, found it with '{gate_activation}'")
    if initial_state is not None:
        _expect(op, "initial_state", initial_state, (rows, heads, width, value_width))
    if starts is not None:
        _expect(op, "starts", starts, (rows, length))
        if starts.dtype != torch.bool:
            raise ValueError(f"{op} needs starts of type bool, found {starts.dtype}")


def one_of(op: str, name: str, value: str, known: Sequence[str]) -> None:
    """Raise a ValueError if ``value`` is not one of the known words."""
    if value not in known:
        raise ValueError(f"{op} needs {name} to be one of {', '.join(known)}, found '{value}'")


def _expect(op: str, name: str, x: Tensor, shape: Sequence[int]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{op} needs {name} of shape {tuple(shape)}, found {_said(x)}")


def _said(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
