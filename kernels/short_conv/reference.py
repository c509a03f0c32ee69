"""The definition of short_conv: a loop over tokens in float64."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def short_conv_reference(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, "d"] | None = None,
    starts: Bool[Tensor, "b t"] | None = None,
    state: Float[Tensor, "b r d"] | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b r d"]]:
    """``y_t = silu(Σ_j weight[:, w-1-j] x_{t-j} + bias)``; returns the outputs and the last w-1 inputs."""
    rows, length, width = x.shape
    taps = weight.shape[1]
    if state is None:
        state = x.new_zeros(rows, taps - 1, width)
    memory = state.double()
    outputs = []
    for step in range(length):
        if starts is not None:
            memory = torch.where(starts[:, step, None, None], torch.zeros_like(memory), memory)
        window = torch.cat([memory, x[:, step : step + 1].double()], dim=1)
        total = (window * weight.double().T).sum(dim=1) + (0 if bias is None else bias.double())
        outputs.append(total * total.sigmoid())
        memory = window[:, 1:]
    output = torch.stack(outputs, dim=1) if outputs else x.double()
    return output.to(x.dtype), memory.to(x.dtype)
