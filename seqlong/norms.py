"""Norms of the residual stream, computed in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seqlong.kernels.norm import rms_norm


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) ⊙ weight``. Source: arXiv 1910.07467."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return rms_norm(hidden, self.weight, self.eps)


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(variance + eps) ⊙ weight + bias``. Source: arXiv 1607.06450."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.eps = eps

    def forward(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return F.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}
