"""Root-mean-square norms: plain and gated, per group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from seqlong.kernels.dispatch import choose, without_triton
from seqlong.kernels.inputs import floating, shaped
from seqlong.kernels.norm.reference import gated_rms_norm_reference, rms_norm_reference
from seqlong.kernels.precision import accumulation, as_written
from seqlong.kernels.runtime import triton_runs_on

OFFERED = {
    "triton": "one pass over the rows in Triton",
    "chunked": "torch, any device",
    "reference": "float64",
}
#: Types that the Triton kernels compute in float32.
TRITON_TYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Widest row (or group of channels) that a program holds.
TRITON_WIDTH = 16384
#: Rows handled at a time on a CPU, so that the intermediate results of a slice stay in cache.
TILE = 1024


def _offered(x: Tensor, width: int) -> tuple[dict[str, str], str]:
    """The implementations that can serve, and the one to prefer."""
    obstacle = triton_runs_on(x.device)
    if x.dtype not in TRITON_TYPES:
        obstacle = f"the Triton kernels do not compute in {x.dtype}"
    elif width > TRITON_WIDTH:
        obstacle = f"the Triton kernels hold rows of {TRITON_WIDTH}, not {width}"
    if obstacle is None:
        return OFFERED, "triton" if x.is_cuda else "chunked"
    return without_triton(OFFERED, obstacle), "chunked"


def check(op: str, x: Tensor, weight: Tensor, gate: Tensor | None = None, groups: int = 1) -> None:
    """Raise a ValueError that names what does not fit, what was expected and what was found."""
    floating(op, {"x": x, "weight": weight, "gate": gate})
    shaped(op, {"weight": (weight, x.shape[-1:]), "gate": (gate, x.shape)})
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"{op} needs a width divisible by groups, found {x.shape[-1]} and {groups} groups")


def rms_norm(
    x: Float[Tensor, "*b d"], weight: Float[Tensor, "d"], eps: float = 1e-5, implementation: str | None = None
) -> Float[Tensor, "*b d"]:
    """``x / sqrt(mean(x²) + eps) ⊙ weight``, computed in float32 (float64 for float64), in x's type.

    Args:
        x: rows of d; may be a part of a wider tensor, which is read where it lies.
        weight: one factor a channel.
        eps: added to the mean square.
        implementation: ``triton``, ``chunked`` or ``reference``; None lets dispatch choose.

    In Triton only x is kept for the backward pass; torch keeps copies in float32 too.

    Raises:
        ValueError: the weight does not fit, or the implementation asked for cannot serve.

    Source: arXiv 1910.07467.
    """
    check("rms_norm", x, weight)
    choice = choose("rms_norm", *_offered(x, x.shape[-1]), implementation).implementation
    if choice == "reference":
        return rms_norm_reference(x, weight, eps)
    if choice == "triton":
        from seqlong.kernels.norm.triton import rms_norm_triton

        return rms_norm_triton(x, None, weight, 1, eps)
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
    implementation: str | None = None,
) -> Float[Tensor, "*b d"]:
    """``RMSNorm(x ⊙ silu(gate)) ⊙ weight``, the mean over each of ``groups`` equal parts of d (Mamba2's norm).

    Args:
        x: rows of d.
        gate: of x's shape; x and gate may be parts of wider tensors, which are read where they lie.
        weight: one factor a channel.
        groups: equal parts of d that are normed apart.
        eps: added to the mean square.
        implementation: ``triton``, ``chunked`` or ``reference``; None lets dispatch choose.

    Only x and gate are kept for the backward pass. Computed in float32 (float64 for float64).

    Raises:
        ValueError: shapes do not fit, d is not a multiple of groups, or the implementation asked for cannot serve.

    Source: arXiv 2405.21060.
    """
    check("gated_rms_norm", x, weight, gate, groups)
    choice = choose("gated_rms_norm", *_offered(x, x.shape[-1] // groups), implementation).implementation
    if choice == "reference":
        return gated_rms_norm_reference(x, gate, weight, groups, eps)
    if choice == "triton":
        from seqlong.kernels.norm.triton import rms_norm_triton

        return rms_norm_triton(x, gate, weight, groups, eps)
    return _gated_rms_norm(x, gate, weight, groups, eps)
