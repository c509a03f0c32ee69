"""What delta_rule does to q, k, beta and gate before the recurrence, and the exact gradients of it, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlong.kernels.delta_rule.reference import EPS

#: Numbers of the words in ``inputs.BETA``.
NONE, SIGMOID, DOUBLE_SIGMOID = 0, 1, 2


def normalized(x: Tensor) -> tuple[Tensor, Tensor]:
    """x over its length sqrt(Σ x² + eps), and the inverse of that length; zero stays zero."""
    inverse = x.square().sum(-1, keepdim=True).add_(EPS).rsqrt_()
    return x * inverse, inverse


def normalized_backward(grad: Tensor, y: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of x, from that of y = x · inverse."""
    return (grad - y * (grad * y).sum(-1, keepdim=True)) * inverse


def weights(beta: Tensor, activation: int) -> Tensor:
    """The weight of a token's correction."""
    if activation == NONE:
        return beta
    return beta.sigmoid() * activation


def weights_backward(grad: Tensor, weight: Tensor, activation: int) -> Tensor:
    """Gradient of beta."""
    if activation == NONE:
        return grad
    return grad * weight * (1 - weight / activation)


def _by_head(x: Tensor, gate: Tensor) -> Tensor:
    """x (h) or (h k), so that it meets gate (b t h) or (b t h k)."""
    return x[:, None] if gate.dim() == 4 and x.dim() == 1 else x


def log_decays(gate: Tensor, rate: Tensor | None, bias: Tensor | None) -> Tensor:
    """g, from itself or from a raw gate: ``rate · softplus(gate + bias)``, in the gate's type."""
    if rate is None:
        return gate
    raw = gate if bias is None else gate + _by_head(bias.to(gate.dtype), gate)
    return F.softplus(raw) * _by_head(rate.to(gate.dtype), gate)


def log_decays_backward(
    grad: Tensor, gate: Tensor, rate: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the gate, the rate and the bias."""
    if rate is None:
        return grad, None, None
    raw = gate if bias is None else gate + _by_head(bias.to(gate.dtype), gate)
    grad_rate = (grad * F.softplus(raw)).flatten(3).sum(-1) if gate.dim() == 4 else grad * F.softplus(raw)
    grad_raw = grad * _by_head(rate.to(gate.dtype), gate) * torch.sigmoid(raw)
    grad_bias = None
    if bias is not None:
        grad_bias = grad_raw.sum((0, 1))
        if bias.dim() == 1 and gate.dim() == 4:
            grad_bias = grad_bias.sum(-1)
    return grad_raw, grad_rate.sum((0, 1)), grad_bias
