"""ssd_step in Triton: a Mamba2 mixer's convolution, scan and both states for one token, in one launch.

A program owns one head of one row, or some of its value columns where rows and heads are few. It convolves its own
channels, and b and c of its group again: that is a few hundred products, and saves a launch and a trip through memory.
The state, which is nearly all that is read and written, passes once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlong.kernels.triton_pieces import softplus
from seqlong.kernels.triton_token_step import value_columns, warps


@triton.jit
def _convolve(x, conv, after, weight, bias, channel, inside, owner, fresh, idle, C: tl.constexpr, W: tl.constexpr,
              BIAS: tl.constexpr):  # fmt: skip
    """silu of the convolution at ``channel``; the owner of those channels moves their inputs up in ``after``."""
    now = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    total = now * tl.load(weight + channel * W + (W - 1), mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(W - 1):
        before = tl.load(conv + i * C + channel, mask=inside, other=0.0).to(tl.float32)
        before = tl.where(fresh, 0.0, before)
        total += before * tl.load(weight + channel * W + i, mask=inside, other=0.0).to(tl.float32)
        place = i - 1 + idle  # inputs of an idle row stay where they are
        tl.store(after + place * C + channel, before.to(after.dtype.element_ty), mask=inside & owner & (place >= 0))
    if W > 1:
        last = inside & owner & (idle == 0)
        tl.store(after + (W - 2) * C + channel, now.to(after.dtype.element_ty), mask=last)
    return total / (1 + tl.exp(-total))


@triton.jit
def step(
    x, dt, conv, ssm, weight, bias, a_log, skip, dt_bias, starts, padding, y, conv_after, ssm_after, x_row, dt_row,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, KB: tl.constexpr,
    BV: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr, DT_BIAS: tl.constexpr, STARTS: tl.constexpr,
    PADDING: tl.constexpr,
):  # fmt: skip
    """One head of one row, BV of its value columns: S = exp(-e^a_log s) S + bᵀ (s x), y = c S + d x."""
    R: tl.constexpr = H // G
    C: tl.constexpr = H * V + 2 * G * K
    columns: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    part = pid % columns
    h = (pid // columns) % H
    row = (pid // columns // H).to(tl.int64)
    k = tl.arange(0, KB)
    v = part * BV + tl.arange(0, BV)
    tile = k[:, None] * V + v[None, :]
    whole = (k < K)[:, None] & (v < V)[None, :]
    state = (row * H + h) * (K * V)
    S = tl.load(ssm + state + tile, mask=whole, other=0.0).to(tl.float32)  # the longest wait: asked for first

    fresh = pid < 0
    if STARTS:
        fresh = tl.load(starts + row) != 0
    idle = pid * 0
    if PADDING:
        idle = tl.load(padding + row).to(tl.int32)
    size = tl.load(dt + row * dt_row + h).to(tl.float32)
    if DT_BIAS:
        size += tl.load(dt_bias + h).to(tl.float32)
    size = tl.where(idle != 0, 0.0, softplus(size))
    decay = tl.exp(-tl.exp(tl.load(a_log + h).to(tl.float32)) * size)

    x += row * x_row
    conv += row * ((W - 1) * C)
    conv_after += row * ((W - 1) * C)
    first = (h % R == 0) & (part == 0)  # of its group: it owns b and c
    b_at = H * V + (h // R) * K + k
    X = _convolve(x, conv, conv_after, weight, bias, h * V + v, v < V, pid >= 0, fresh, idle, C, W, BIAS)
    Bk = _convolve(x, conv, conv_after, weight, bias, b_at, k < K, first, fresh, idle, C, W, BIAS)
    Ck = _convolve(x, conv, conv_after, weight, bias, b_at + G * K, k < K, first, fresh, idle, C, W, BIAS)

    S = tl.where(fresh, 0.0, S) * decay + Bk[:, None] * (X * size)[None, :]
    tl.store(ssm_after + state + tile, S, mask=whole)
    out = tl.sum(Ck[:, None] * S, axis=0)
    if SKIP:
        out += X * tl.load(skip + h).to(tl.float32)
    tl.store(y + (row * H + h) * V + v, out.to(y.dtype.element_ty), mask=v < V)


def launch(
    xbc: Tensor,
    dt: Tensor,
    conv: Tensor,
    ssm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a_log: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output and both states after the token. Plain tensors only: the op below is for whoever traces."""
    rows, heads, width, value_width = ssm.shape
    y = xbc.new_empty(rows, heads, value_width)
    conv_after, ssm_after = xbc.new_empty(conv.shape), ssm.new_empty(ssm.shape, dtype=torch.float32)
    if y.numel() == 0:
        return y, conv_after, ssm_after
    xbc, dt = (x if x.stride(1) == 1 else x.contiguous() for x in (xbc, dt))
    key_tile = triton.next_power_of_2(width)
    columns = value_columns(rows, heads, key_tile, value_width, xbc.device)
    step[(rows * heads * triton.cdiv(value_width, columns),)](
        xbc, dt, conv.contiguous(), ssm.contiguous(), weight.contiguous(), xbc if bias is None else bias, a_log,
        xbc if d is None else d, xbc if dt_bias is None else dt_bias,
        xbc if starts is None else starts.contiguous().view(torch.uint8),
        xbc if padding is None else padding.contiguous().view(torch.uint8),
        y, conv_after, ssm_after, xbc.stride(0), dt.stride(0),
        H=heads, G=(xbc.shape[1] - heads * value_width) // (2 * width), K=width, V=value_width, W=weight.shape[1],
        KB=key_tile, BV=columns, BIAS=bias is not None, SKIP=d is not None, DT_BIAS=dt_bias is not None,
        STARTS=starts is not None, PADDING=padding is not None,
        num_warps=warps(key_tile, columns),
    )  # fmt: skip
    return y, conv_after, ssm_after


ssd_step_triton = torch.library.custom_op(
    "seqlong::ssd_step_triton",
    launch,
    mutates_args=(),
    schema="(Tensor xbc, Tensor dt, Tensor conv, Tensor ssm, Tensor weight, Tensor? bias, Tensor a_log, Tensor? d, "
    "Tensor? dt_bias, Tensor? starts, Tensor? padding) -> (Tensor, Tensor, Tensor)",
)


@ssd_step_triton.register_fake
def _(xbc, dt, conv, ssm, weight, bias, a_log, d, dt_bias, starts, padding):  # type: ignore[no-untyped-def]
    rows, heads, _, value_width = ssm.shape
    return (
        xbc.new_empty(rows, heads, value_width),
        xbc.new_empty(conv.shape),
        ssm.new_empty(ssm.shape, dtype=torch.float32),
    )
