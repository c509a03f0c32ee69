"""How a gate becomes a decay (and, for HGRN2, a key), and what their gradients are to it.

Decays are formed themselves, not their logarithms: a decay of exactly zero or one is a number like any other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: The decay's part of lower_bound's gradient divides by the decay f; where f is smaller it divides by this.
LEAST = {torch.float32: 2.0**-12, torch.float64: 2.0**-40}


def activated(
    gate: Tensor, activation: str, divisor: float, lower_bound: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Decays in [0, 1], and keys where the gate makes them. All tensors in one type, lower_bound (h k)."""
    if activation == "log_decay":
        return gate.exp(), None
    if activation == "logsigmoid":
        return (F.logsigmoid(gate) / divisor).exp(), None
    assert lower_bound is not None
    rest = (1 - lower_bound) * torch.sigmoid(-gate)  # exact where f -> 1, unlike 1 - f
    return lower_bound + (1 - lower_bound) * torch.sigmoid(gate), rest


def gradient(
    gate: Tensor, activation: str, divisor: float, lower_bound: Tensor | None, dg: Tensor, dk: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the gate and of lower_bound, the latter not yet summed, from those of log-decay and keys."""
    if activation == "log_decay":
        return dg, None
    shut = torch.sigmoid(-gate)
    if activation == "logsigmoid":
        return dg * shut / divisor, None
    assert lower_bound is not None and dk is not None
    # f = lb + (1 - lb) s, k = (1 - lb) (1 - s): dlog f/dgate = (1 - s) (1 - lb) s / f, and (1 - lb) s / f = 1 - lb / f.
    odds = (-gate).clamp(max=60.0).exp()  # (1 - s) / s
    through = shut * (1 - lower_bound) / (1 + lower_bound * odds)
    decay = (lower_bound + (1 - lower_bound) * torch.sigmoid(gate)).clamp(min=LEAST[gate.dtype])
    dgate = dg * through - dk * (1 - lower_bound) * torch.sigmoid(gate) * shut
    return dgate, shut * (dg / decay - dk)
