"""The definition of selective_scan: a loop over tokens in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan_reference(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor | None, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """``S_t = exp(dt_t a) ⊙ S_{t-1} + b_tᵀ (dt_t x_t)``, ``y_t = Re(c_t S_t)``, token by token."""
    dx, step = x.double(), dt.double()
    rate, write, read, state = (
        y.to(torch.complex128 if y.is_complex() else torch.float64) for y in (a, b, c, initial_state)
    )
    outputs: list[Tensor] = []
    for t in range(x.shape[1]):
        if starts is not None:
            state = torch.where(starts[:, t, None, None], torch.zeros_like(state), state)
        into = write if write.dim() == 2 else write[:, t, :, None]
        out = read if read.dim() == 2 else read[:, t, :, None]
        state = (step[:, t, None] * rate).exp() * state + into * (step[:, t] * dx[:, t])[:, None]
        read_out = (out * state).sum(dim=1)
        outputs.append(read_out.real if read_out.is_complex() else read_out)
    y = torch.stack(outputs, dim=1) if outputs else dx
    return y.to(x.dtype), state.to(initial_state.dtype)
