"""What the ops of this folder accept, said before anything is read: a kernel would read beyond a tensor in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def check(
    op: str,
    q: tuple[str, Tensor],
    k: tuple[str, Tensor],
    v: tuple[str, Tensor],
    gate: tuple[str, Tensor],
    *,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
    per_head: Mapping[str, Tensor | None] | None = None,
) -> None:
    """Raise a ValueError that names the argument, what was found and what was expected.

    Args:
        op: the op's name, for the message.
        q: its name and value ``(b t g k)``.
        k: as q.
        v: its name and value ``(b t h v)``.
        gate: its name and value ``(b t h)``, or ``(h)``.
        starts: ``(b t)`` bool.
        initial_state: ``(b h k v)``.
        per_head: more arguments ``(h)``.
    """
    for name, x in (q, k, v):
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"{op} needs {name} with four axes and a floating type, found {_said(x)}")
    (rows, length, groups, width), (heads, value_width) = q[1].shape, v[1].shape[2:]
    if not groups or heads % groups:
        raise ValueError(f"{op} needs heads divisible by groups, found {heads} heads, {groups} groups")
    if k[1].dtype != q[1].dtype:
        raise ValueError(f"{op} needs {q[0]} and {k[0]} of one type, found {q[1].dtype} and {k[1].dtype}")
    _expect(op, *k, (rows, length, groups, width))
    _expect(op, *v, (rows, length, heads, value_width))
    if gate[1].dim() != 1:
        _expect(op, *gate, (rows, length, heads))
    else:
        _expect(op, *gate, (heads,))
    for name, one in (per_head or {}).items():
        if one is not None:
            _expect(op, name, one, (heads,))
    if initial_state is not None:
        _expect(op, "initial_state", initial_state, (rows, heads, width, value_width))
    if starts is not None:
        _expect(op, "starts", starts, (rows, length))
        if starts.dtype != torch.bool:
            raise ValueError(f"{op} needs starts of type bool, found {starts.dtype}")


def _expect(op: str, name: str, x: Tensor, shape: Sequence[int]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{op} needs {name} of shape {tuple(shape)}, found {_said(x)}")


def _said(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
