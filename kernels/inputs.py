"""What ops say of inputs that they cannot take, before anything is read: a kernel would read beyond one in silence.

Each function raises a ValueError that names the op, the argument, what was expected and what was found, and wants its
inputs on one device. None is an optional argument that was left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def said(x: object) -> str:
    """Shape and type, as messages have them."""
    if not isinstance(x, Tensor):
        return "None" if x is None else f"a {type(x).__name__}"
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def is_here(x: Tensor) -> bool:
    """Whether it has values to look at: not while a compiler or a fake mode traces."""
    return type(x) is Tensor and not torch.compiler.is_compiling()


def one_device(op: str, inputs: Mapping[str, object]) -> None:
    """Inputs by name, on one device, whichever it is: on ``meta`` beside others, results would be made of nothing."""
    first: tuple[str, torch.device] | None = None
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            continue
        if first is None:
            first = name, x.device
        elif x.device != first[1]:
            raise ValueError(
                f"{op} needs all its inputs on one device, found {first[0]} on {first[1]} and {name} on {x.device}"
            )


def needed(op: str, inputs: Mapping[str, object]) -> None:
    """Inputs by name that no call can leave out."""
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{op} needs {name}, a tensor, found {said(x)}")
    one_device(op, inputs)


def four_axes(op: str, inputs: Mapping[str, Tensor | None]) -> None:
    """Inputs by name, ``(batch, time, heads, width)`` each; a caller reads sizes off their axes next."""
    for name, x in inputs.items():
        if x is not None and not (isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point()):
            raise ValueError(f"{op} needs {name} with four axes and a floating type, found {said(x)}")
    one_device(op, inputs)


def shaped(op: str, expected: Mapping[str, tuple[Tensor | None, Sequence[int]]]) -> None:
    """Inputs by name, each with the shape that it must have."""
    for name, (x, shape) in expected.items():
        if x is not None and not (isinstance(x, Tensor) and tuple(x.shape) == tuple(shape)):
            raise ValueError(f"{op} needs {name} of shape {tuple(shape)}, found {said(x)}")
    one_device(op, {name: x for name, (x, _) in expected.items()})


def token_marks(
    op: str, inputs: Mapping[str, Tensor | None], shape: Sequence[int], beside: Mapping[str, Tensor] | None = None
) -> None:
    """Marks of tokens by name, ``starts`` and ``padding``: of this shape, of type bool, on the device of ``beside``."""
    for name, x in inputs.items():
        numbers = isinstance(x, Tensor) and not x.is_floating_point() and x.dtype != torch.bool
        if x is not None and (numbers or not isinstance(x, Tensor)):
            raise ValueError(
                f"{op} needs {name} of type bool, one mark a token, found {said(x)}; seqlong.kernels.starts_of makes "
                "starts of offsets"
            )
    shaped(op, {name: (x, shape) for name, x in inputs.items()})
    for name, x in inputs.items():
        if x is not None and x.dtype != torch.bool:
            raise ValueError(f"{op} needs {name} of type bool, found {x.dtype}")
    one_device(op, {**(beside or {}), **inputs})


def floating(op: str, inputs: Mapping[str, Tensor | None]) -> None:
    """Inputs by name, of any shape: whole numbers would be rounded on the way."""
    for name, x in inputs.items():
        if x is not None and not (isinstance(x, Tensor) and x.is_floating_point()):
            raise ValueError(f"{op} needs {name} of a floating type, found {said(x)}")
    one_device(op, inputs)


def starts_of(offsets: Int[Tensor, "s"], length: int) -> Bool[Tensor, "1 t"]:
    """Where the segments of one row start, as ops take it, from the offsets that other packages take (``cu_seqlens``).

    Args:
        offsets: 0, and the position behind each segment's last; two that are equal are an empty segment.
        length: positions in the row, the last offset.

    Raises:
        ValueError: offsets that fall, that do not begin at 0 or do not end at ``length``, or that are no whole numbers.
    """
    needed("starts_of", {"offsets": offsets})
    if offsets.dim() != 1 or offsets.is_floating_point() or offsets.dtype == torch.bool or not offsets.numel():
        raise ValueError(f"starts_of needs offsets, whole numbers in one row, found {said(offsets)}")
    first, last, falls = int(offsets[0]), int(offsets[-1]), bool((offsets.diff() < 0).any())
    if first != 0 or last != length or falls:
        what = "they fall somewhere" if falls else f"found {first:,} to {last:,}"
        raise ValueError(f"starts_of needs offsets that rise from 0 to the row's length {length:,}, {what}")
    starts = torch.zeros(1, length + 1, dtype=torch.bool, device=offsets.device)
    starts[0, offsets.long()] = True
    return starts[:, :-1]


def heads_of_groups(op: str, heads: int, groups: int) -> None:
    """Each group's queries and keys serve as many heads as any other's."""
    if not groups or heads % groups:
        raise ValueError(f"{op} needs heads divisible by groups, found {heads} heads, {groups} groups")


def one_type(op: str, q: tuple[str, Tensor], k: tuple[str, Tensor]) -> None:
    """Two inputs, each with its name, that are multiplied as they are."""
    if k[1].dtype != q[1].dtype:
        raise ValueError(f"{op} needs {q[0]} and {k[0]} of one type, found {q[1].dtype} and {k[1].dtype}")
