"""selective_scan: the public function."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from seqlong.kernels.dispatch import choose
from seqlong.kernels.inputs import one_device, token_marks
from seqlong.kernels.precision import accumulation
from seqlong.kernels.selective_scan.chunked import selective_scan_chunked
from seqlong.kernels.selective_scan.reference import selective_scan_reference

OFFERED = {"chunked": "chunks side by side in torch, any device", "reference": "float64 loop over tokens"}

Constant = Float[Tensor, "n d"] | Complex[Tensor, "n d"]
State = Float[Tensor, "b n d"] | Complex[Tensor, "b n d"]


def selective_scan(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    a: Constant,
    b: Float[Tensor, "b t n"] | Constant,
    c: Float[Tensor, "b t n"] | Constant,
    *,
    starts: Bool[Tensor, "b t"] | None = None,
    initial_state: State | None = None,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b t d"], State]:
    """``S_t = exp(dt_t a) ⊙ S_{t-1} + b_tᵀ (dt_t x_t)``, ``y_t = Re(c_t S_t)``: n numbers a channel, a decay each.

    S6 (Mamba-1) with b and c of the token, diagonal state spaces (S4D) with complex constants. Memory is that of inputs
    and results, and of one state for each block of tokens: never ``(b t n d)``.

    Args:
        x: inputs.
        dt: steps, 0 or more; a step of 0 leaves the state as it is.
        a: rates, the real part 0 or less.
        b: how a token is written: of each token for all channels, or constant.
        c: how the state is read, likewise.
        starts: True where the state starts afresh before the token.
        initial_state: the state before the first token; zero if None.
        implementation: one of ``OFFERED``; None lets dispatch choose.

    Returns:
        y in x's type and the state after the last token: float32 (float64 if x is), complex if a, b or c is.

    Raises:
        ValueError: shapes or types do not fit, or there is no such implementation.

    Source: arXiv 2312.00752 (S6), 2206.11893 (S4D).
    """
    (rows, length, width), size = x.shape, a.shape[0]
    shapes = ((rows, length, size), (size, width))
    if dt.shape != x.shape or a.shape[1] != width or b.shape not in shapes or c.shape not in shapes:
        raise ValueError(
            f"selective_scan needs dt like x, a of (n, {width}), b and c of {shapes[0]} or {shapes[1]}, found "
            f"x {tuple(x.shape)}, dt {tuple(dt.shape)}, a {tuple(a.shape)}, b {tuple(b.shape)}, c {tuple(c.shape)}"
        )
    one_device("selective_scan", {"x": x, "dt": dt, "a": a, "b": b, "c": c, "initial_state": initial_state})
    token_marks("selective_scan", {"starts": starts}, x.shape[:2], {"x": x})
    kept = accumulation(x.dtype)
    if any(y.is_complex() for y in (a, b, c)):
        kept = torch.complex128 if kept == torch.float64 else torch.complex64
    a, b, c = a.to(kept), b.to(kept) if b.dim() == 2 else b, c.to(kept) if c.dim() == 2 else c
    if initial_state is None:
        state = a.new_zeros(rows, size, width)
    elif initial_state.shape != (rows, size, width):
        raise ValueError(f"selective_scan needs a state of {(rows, size, width)}, found {tuple(initial_state.shape)}")
    else:
        state = initial_state.to(kept)
    inputs = (x, dt, a, b, c, starts, state)
    if choose("selective_scan", OFFERED, "chunked", implementation).implementation == "reference":
        return selective_scan_reference(*inputs)
    y, after, _ = selective_scan_chunked(*inputs)
    return y, after
