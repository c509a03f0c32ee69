"""Root-mean-square norms: plain (torch's own) and gated, per group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from seqlong.kernels.precision import accumulation, as_written

#: Rows handled at a time on a CPU, so that the intermediate results of a slice stay in cache.
TILE = 1024


def rms_norm(x: Float[Tensor, "*b d"], weight: Float[Tensor, "d"], eps: float = 1e-5) -> Float[Tensor, "*b d"]:
    """``x / sqrt(mean(x²) + eps) * weight``, the mean in float32, in x's type. Source: arXiv 1910.07467."""
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


@torch.library.custom_op(
    "seqlong::gated_rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor gate, Tensor weight, int groups, float eps) -> Tensor",
)
@as_written
def _gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    kept = accumulation(x.dtype)
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, gates, results = x.flatten(0, -2), gate.flatten(0, -2), output.view(-1, x.shape[-1])
    for a, z in _tiles(rows):
        gated = (rows[a:z].to(kept) * F.silu(gates[a:z].to(kept))).unflatten(1, (groups, -1))
        scale = (gated.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        results[a:z] = (gated * scale).flatten(1) * weight.to(kept)
    return output


@_gated_rms_norm.register_fake
def _(x, gate, weight, groups, eps):  # type: ignore[no-untyped-def]
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _tiles(rows: Tensor) -> list[tuple[int, int]]:
    tile = TILE if rows.device.type == "cpu" else 65536
    return [(a, min(a + tile, rows.shape[0])) for a in range(0, rows.shape[0], tile)]


@torch.library.custom_op(
    "seqlong::gated_rms_norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor gate, Tensor weight, int groups, float eps) -> (Tensor, Tensor, Tensor)",
)
@as_written
def _gated_rms_norm_backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    kept = accumulation(x.dtype)
    w = weight.to(kept)
    grad_x, grad_gate = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (x, gate))
    grad_weight = torch.zeros_like(w)
    grads, rows, gates = grad.flatten(0, -2), x.flatten(0, -2), gate.flatten(0, -2)
    out_x, out_gate = grad_x.view(rows.shape), grad_gate.view(rows.shape)
    for a, z in _tiles(rows):
        value, logit, incoming = rows[a:z].to(kept), gates[a:z].to(kept), grads[a:z].to(kept)
        sigmoid = logit.sigmoid()
        silu = logit * sigmoid
        gated = (value * silu).unflatten(1, (groups, -1))
        scale = (gated.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        normed = gated * scale
        grad_weight += (incoming * normed.flatten(1)).sum(dim=0)
        inner = (incoming * w).unflatten(1, (groups, -1))
        grad_gated = (scale * (inner - normed * (inner * normed).mean(dim=-1, keepdim=True))).flatten(1)
        out_x[a:z] = grad_gated * silu
        out_gate[a:z] = grad_gated * value * (sigmoid * (1 + logit * (1 - sigmoid)))
    return grad_x, grad_gate, grad_weight.to(weight.dtype)


@_gated_rms_norm_backward.register_fake
def _(grad, x, gate, weight, groups, eps):  # type: ignore[no-untyped-def]
    return tuple(torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (x, gate, weight))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, gate, weight, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(x, gate, weight)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return (*_gated_rms_norm_backward(grad, *ctx.saved_tensors, ctx.groups, ctx.eps), None, None)


_gated_rms_norm.register_autograd(_backward, setup_context=_setup_context)


def gated_rms_norm(
    x: Float[Tensor, "*b d"],
    gate: Float[Tensor, "*b d"],
    weight: Float[Tensor, "d"],
    groups: int = 1,
    eps: float = 1e-5,
) -> Float[Tensor, "*b d"]:
    """``RMSNorm(x ⊙ silu(gate)) ⊙ weight``, the mean over each of ``groups`` equal parts of d (Mamba2's norm).

    Only x and gate are kept for the backward pass. Computed in float32. Source: arXiv 2405.21060.
    """
    return _gated_rms_norm(x, gate, weight, groups, eps)
