"""rotary in Triton: x is read once and written once; its gradient is the rotation by the opposite angle.

A program holds the cosines and sines of a few tokens, formed once in float64, and walks the heads with them.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlong.kernels.precision import as_written

#: Pairs that a program rotates at a time.
TILE = 1024
#: Heads that a program rotates at a time.
HEADS = 4


@triton.jit(do_not_specialize=["length", "tiles", "x_row", "x_token", "x_head", "positions_row", "positions_token"])
def _rotate(
    x, positions, turns, y, length, tiles, x_row, x_token, x_head,
    positions_row, positions_token,
    H: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    UNIT: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, BLOCK)
    live = token < length
    position = tl.load(
        positions + row * positions_row + token.to(tl.int64) * positions_token, mask=live, other=0
    )  # fmt: skip
    rate = tl.load(turns + pair, mask=pair < HALF, other=0.0)
    turn = position.to(tl.float64)[:, None] * rate[None, :]
    # The nearest whole turn goes before the rest is rounded: what remains is within half a turn.
    angle = (turn - tl.floor(turn + 0.5)).to(tl.float32) * 6.283185307179586
    cos, sin = tl.cos(angle)[:, None, :], tl.sin(angle)[:, None, :]
    if INVERSE:
        sin = -sin
    x += row * (x_row * UNIT) + token.to(tl.int64)[:, None, None] * (x_token * UNIT) + pair[None, None, :]
    y += (row * length + token.to(tl.int64))[:, None, None] * (H * 2 * HALF) + pair[None, None, :]
    inside = live[:, None, None] & (pair < HALF)[None, None, :]
    for i in range(0, H, HEADS):
        head = i + tl.arange(0, HEADS)[None, :, None]
        mask = inside & (head < H)
        at = head.to(tl.int64) * (x_head * UNIT)
        first = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x + at + HALF, mask=mask, other=0.0).to(tl.float32)
        to = y + head * (2 * HALF)
        tl.store(to, (first * cos - second * sin).to(y.dtype.element_ty), mask=mask)
        tl.store(to + HALF, (second * cos + first * sin).to(y.dtype.element_ty), mask=mask)


@lru_cache(maxsize=64)
def _turns(half: int, base: float, device: torch.device) -> Tensor:
    """Turns a token of every pair, float64. Copied from the host, so that it is there for every stream."""
    return torch.tensor([base ** (-i / half) / (2 * math.pi) for i in range(half)], dtype=torch.float64, device=device)


@torch.library.custom_op(
    "seqlong::rotary_triton",
    mutates_args=(),
    schema="(Tensor x, Tensor positions, float base, bool inverse) -> Tensor",
)
@as_written
def rotary_triton(x: Tensor, positions: Tensor, base: float, inverse: bool) -> Tensor:
    """x (b t h k) rotated by its positions (b t), or back."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    x = x if x.stride(3) == 1 else x.contiguous()
    rows, length, heads, width = x.shape
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    unit = 16
    while any(stride % unit for stride in strides):
        unit //= 2
    block, many = max(8, triton.next_power_of_2(width // 2)), min(HEADS, triton.next_power_of_2(heads))
    tokens = max(1, TILE // (block * many))
    tiles = triton.cdiv(length, tokens)
    _rotate[(rows * tiles,)](
        x, positions, _turns(width // 2, base, x.device), y, length, tiles, *(stride // unit for stride in strides),
        *positions.stride(), H=heads, HALF=width // 2, TOKENS=tokens, HEADS=many, BLOCK=block, UNIT=unit,
        INVERSE=inverse, num_warps=4,
    )  # fmt: skip
    return y


@rotary_triton.register_fake
def _(x, positions, base, inverse):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, positions, ctx.base, ctx.inverse = inputs
    ctx.save_for_backward(positions)


def _gradient(ctx, grad):  # type: ignore[no-untyped-def]
    (positions,) = ctx.saved_tensors
    return rotary_triton(grad, positions, ctx.base, not ctx.inverse), None, None, None


rotary_triton.register_autograd(_gradient, setup_context=_setup_context)
