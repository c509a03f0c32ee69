"""What ops say of inputs that they cannot take, before anything is read: a kernel would read beyond one in silence.

Each function raises a ValueError that names the op, the argument, what was expected and what was found. None is an
optional argument that was left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def said(x: Tensor) -> str:
    """Shape and type, as messages have them."""
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def four_axes(op: str, inputs: Mapping[str, Tensor | None]) -> None:
    """Inputs by name, ``(batch, time, heads, width)`` each; a caller reads sizes off their axes next."""
    for name, x in inputs.items():
        if x is not None and (x.dim() != 4 or not x.is_floating_point()):
            raise ValueError(f"{op} needs {name} with four axes and a floating type, found {said(x)}")


def shaped(op: str, expected: Mapping[str, tuple[Tensor | None, Sequence[int]]]) -> None:
    """Inputs by name, each with the shape that it must have."""
    for name, (x, shape) in expected.items():
        if x is not None and tuple(x.shape) != tuple(shape):
            raise ValueError(f"{op} needs {name} of shape {tuple(shape)}, found {said(x)}")


def token_marks(op: str, inputs: Mapping[str, Tensor | None], shape: Sequence[int]) -> None:
    """Marks of tokens by name, ``starts`` and ``padding``: of this shape, and of type bool."""
    shaped(op, {name: (x, shape) for name, x in inputs.items()})
    for name, x in inputs.items():
        if x is not None and x.dtype != torch.bool:
            raise ValueError(f"{op} needs {name} of type bool, found {x.dtype}")


def heads_of_groups(op: str, heads: int, groups: int) -> None:
    """Each group's queries and keys serve as many heads as any other's."""
    if not groups or heads % groups:
        raise ValueError(f"{op} needs heads divisible by groups, found {heads} heads, {groups} groups")


def one_type(op: str, q: tuple[str, Tensor], k: tuple[str, Tensor]) -> None:
    """Two inputs, each with its name, that are multiplied as they are."""
    if k[1].dtype != q[1].dtype:
        raise ValueError(f"{op} needs {q[0]} and {k[0]} of one type, found {q[1].dtype} and {k[1].dtype}")
