"""linear_cross_entropy: the last projection and the loss in one; logits of all positions never exist at once."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqlong.kernels import tuning
from seqlong.kernels.cross_entropy.reference import linear_cross_entropy_reference
from seqlong.kernels.dispatch import choose, without_triton
from seqlong.kernels.inputs import is_here, said, shaped
from seqlong.kernels.precision import accumulation, as_written
from seqlong.kernels.runtime import triton_runs_on

OFFERED = {
    "triton": "chunks of positions; the softmax and its gradient each in one pass over the logits, in Triton",
    "chunked": "chunks of positions, in torch, any device",
    "reference": "float64 loop over positions",
}
#: Logits held at a time, in elements, but never fewer positions than this in Triton: products of few rows are slow.
BUDGET, LEAST = 1 << 24, 2048
#: Up to this many classes logits are products of hidden states as they are; above, autocast's type is obeyed for speed.
SMALL = 1024
#: Elements of a tile, and warps.
DEFAULT: tuning.Config = {"block": 4096, "warps": 8}
CANDIDATES = {
    "linear_cross_entropy": {
        f"bf16 y{classes}": [DEFAULT, *({"block": b, "warps": w} for b in (2048, 4096, 8192) for w in (4, 8, 16))]
        for classes in (16, 8192)
    }
}


def _rows(vocabulary: int, chunk: int, block: int) -> int:
    return chunk or max(LEAST if block else 1, BUDGET // vocabulary)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Products in the input type, logits at least in float32."""
    kept = accumulation(hidden.dtype)
    logits = (hidden @ weight.T).to(kept)
    return logits if bias is None else logits + bias.to(kept)


@torch.library.custom_op(
    "seqlong::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float z_loss, int chunk, int block, "
    "int warps) -> (Tensor, Tensor)",
)
@as_written
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    z_loss: float,
    chunk: int,
    block: int,
    warps: int,
) -> tuple[Tensor, Tensor]:
    """Loss and logarithm of the normaliser, (n) each. ``block`` 0 is plain torch."""
    kept = accumulation(hidden.dtype)
    loss = torch.empty(hidden.shape[0], dtype=kept, device=hidden.device)
    normalizer = torch.empty_like(loss)
    matrix = weight.to(hidden.dtype)
    step = _rows(weight.shape[0], chunk, block)
    for a in range(0, hidden.shape[0], step):
        part, labels = hidden[a : a + step], targets[a : a + step]
        if block:
            from seqlong.kernels.cross_entropy.triton import losses

            logits = part @ matrix.T
            loss[a : a + step], normalizer[a : a + step] = losses(logits, bias, labels, z_loss, block, warps)
            continue
        logits = _logits(part, matrix, bias)
        total = logits.logsumexp(dim=-1)
        picked = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        value = total - picked + z_loss * total.square() if z_loss else total - picked
        loss[a : a + step] = torch.where(labels >= 0, value, 0)
        normalizer[a : a + step] = total
    return loss, normalizer


@_forward.register_fake
def _(hidden, weight, targets, bias, z_loss, chunk, block, warps):  # type: ignore[no-untyped-def]
    kept = accumulation(hidden.dtype)
    return tuple(torch.empty(hidden.shape[0], dtype=kept, device=hidden.device) for _ in range(2))


@torch.library.custom_op(
    "seqlong::linear_cross_entropy_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor normalizer, "
    "float z_loss, int chunk, int block, int warps) -> (Tensor, Tensor, Tensor)",
)
@as_written
def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    normalizer: Tensor,
    z_loss: float,
    chunk: int,
    block: int,
    warps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = normalizer.dtype
    grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    grad_weight = torch.zeros(weight.shape, dtype=kept, device=weight.device)
    grad_bias = torch.zeros(weight.shape[0], dtype=kept, device=weight.device)
    matrix = weight.to(hidden.dtype)
    step = _rows(weight.shape[0], chunk, block)
    for a in range(0, hidden.shape[0], step):
        part, labels, total = hidden[a : a + step], targets[a : a + step], normalizer[a : a + step]
        if block:
            from seqlong.kernels.cross_entropy.triton import replace_by_gradient

            work = part @ matrix.T
            replace_by_gradient(work, bias, labels, total, grad[a : a + step], z_loss, block, warps)
            if bias is not None:
                grad_bias += work.sum(dim=0, dtype=kept)
        else:
            chances = (_logits(part, matrix, bias) - total[:, None]).exp_()
            if z_loss:
                chances *= (1 + 2 * z_loss * total)[:, None]
            chances.scatter_add_(1, labels.clamp(min=0)[:, None], -torch.ones_like(total)[:, None])
            chances *= torch.where(labels >= 0, grad[a : a + step], 0)[:, None]
            work = chances.to(hidden.dtype)
            if bias is not None:
                grad_bias += chances.sum(dim=0)
        torch.mm(work, matrix, out=grad_hidden[a : a + step])
        grad_weight += _product(work.T, part, kept)
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _product(a: Tensor, b: Tensor, kept: torch.dtype) -> Tensor:
    """a @ b, not rounded to the input type on its way to ``kept`` where torch can do that (on a GPU)."""
    if a.is_cuda and a.dtype != kept:
        return torch.mm(a, b, out_dtype=kept)
    return (a @ b).to(kept)


@_backward.register_fake
def _(grad, hidden, weight, targets, bias, normalizer, z_loss, chunk, block, warps):  # type: ignore[no-untyped-def]
    return (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device),
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device),
        weight.new_empty(weight.shape[0]),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, targets, bias, *ctx.settings = inputs
    ctx.save_for_backward(hidden, weight, targets, bias, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _grad_normalizer):  # type: ignore[no-untyped-def]
    hidden, weight, targets, bias, normalizer = ctx.saved_tensors
    dh, dw, db = _backward(grad.contiguous(), hidden, weight, targets, bias, normalizer, *ctx.settings)
    return dh, dw, None, None if bias is None else db, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _config(hidden: Tensor, classes: int) -> tuple[tuple[int, int], str | None]:
    """Block and warps of the Triton kernels, and None or the reason why they cannot serve."""
    obstacle = triton_runs_on(hidden.device)
    if obstacle is None and hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        obstacle = f"the Triton kernels do not compute in {hidden.dtype}"
    if obstacle is not None:
        return (0, 0), obstacle
    wide = 16 if classes <= 1024 else 8192
    config = tuning.settle("linear_cross_entropy", tuning.key(hidden.dtype, y=wide), DEFAULT, hidden.device)
    if config is None:
        return (0, 0), "no configuration of the Triton kernels is right on this GPU"
    return (int(config["block"]), int(config["warps"])), None


def check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, chunk: int = 0) -> None:
    """Raise a ValueError that names what does not fit, what was expected and what was found."""
    if hidden.dim() != 3 or weight.dim() != 2:
        raise ValueError(
            f"linear_cross_entropy needs hidden (b t d) and weight (y d), found {said(hidden)}, {said(weight)}"
        )
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "hidden": (hidden, tuple(hidden.shape)),
        "weight": (weight, (weight.shape[0], hidden.shape[2])),
        "targets": (targets, tuple(hidden.shape[:2])),
        "bias": (bias, (weight.shape[0],)),
    }
    shaped("linear_cross_entropy", expected)
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"linear_cross_entropy needs targets of integers, found {said(targets)}")
    if not weight.shape[0] or chunk < 0:
        raise ValueError(f"linear_cross_entropy needs classes, and chunk of 0 or more, found {said(weight)}, {chunk}")
    # On a GPU looking would wait for it: a target that is no class gives NaN there.
    if targets.device.type == "cpu" and targets.numel() and is_here(targets):
        most = int(targets.max())
        if most >= weight.shape[0]:
            raise ValueError(f"linear_cross_entropy needs targets below {weight.shape[0]} classes, found {most}")


def linear_cross_entropy(
    hidden: Float[Tensor, "b t d"],
    weight: Float[Tensor, "y d"],
    targets: Int[Tensor, "b t"],
    *,
    bias: Float[Tensor, "y"] | None = None,
    z_loss: float = 0.0,
    chunk: int = 0,
    implementation: str | None = None,
) -> Float[Tensor, "b t"]:
    """Negative log-likelihood, in nats, of each target under ``softmax(hidden weightᵀ + bias)``.

    Args:
        hidden: last hidden states.
        weight: one row a class.
        targets: class of each position; -1, or anything below 0, gives a loss of 0 and no gradient.
        bias: per class.
        z_loss: adds ``z_loss · logsumexp²``, which keeps logits near zero (arXiv 2202.08906; 1e-4 is usual).
        chunk: positions at a time; 0 chooses so that the logits held are about 16 M elements.
        implementation: ``triton``, ``chunked`` or ``reference``; None lets dispatch choose.

    Returns:
        ``(b t)`` in float32 (float64 if hidden is). Logits are computed again in the backward pass.

    Raises:
        ValueError: shapes or types do not fit, or the implementation asked for cannot serve these inputs.
    """
    check(hidden, weight, targets, bias, chunk)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and weight.shape[0] > SMALL and hidden.dtype == torch.float32:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    launch, obstacle = _config(hidden, weight.shape[0])
    offered, preferred = OFFERED, "triton" if hidden.is_cuda else "chunked"
    if obstacle is not None:
        offered = without_triton(OFFERED, obstacle)
        preferred = "chunked"
    choice = choose("linear_cross_entropy", offered, preferred, implementation)
    if choice.implementation == "reference":
        return linear_cross_entropy_reference(hidden, weight, targets, bias, z_loss)
    block, warps = launch if choice.implementation == "triton" else (0, 0)
    loss, _ = _forward(hidden.flatten(0, 1), weight, targets.flatten(), bias, z_loss, chunk, block, warps)
    return loss.view(targets.shape)
