"""grouped_matmul: the public function, its custom operators and the choice of an engine."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqlong.kernels import tuning
from seqlong.kernels.dispatch import NOT_HERE, choose
from seqlong.kernels.grouped_matmul.chunked import (
    is_one_kernel,
    outer_grouped,
    outer_looped,
    rows_grouped,
    rows_looped,
    why_not_grouped_mm,
)
from seqlong.kernels.grouped_matmul.reference import grouped_matmul_reference
from seqlong.kernels.inputs import one_device
from seqlong.kernels.precision import as_written
from seqlong.kernels.runtime import triton_runs_on

OFFERED = {
    "triton": "Triton kernels on this GPU, which gather and scatter rows as they go",
    "grouped_mm": "torch's grouped_mm",
    "chunked": "one product a group in torch, any device",
    "reference": "float64 loop over rows",
}
#: Rows, inner and outer columns of a tile, warps and stages of the pipeline.
DEFAULT: tuning.Config = {"rows": 128, "inner": 64, "columns": 128, "warps": 8, "stages": 3}
CANDIDATES = {
    "grouped_matmul": {
        "bf16": [
            DEFAULT,
            {**DEFAULT, "stages": 4},
            {**DEFAULT, "columns": 256, "stages": 3},
            {**DEFAULT, "rows": 64, "warps": 4},
            {**DEFAULT, "rows": 64, "columns": 256},
        ]
    }
}
#: Most groups that a Triton program looks through.
MOST_GROUPS = 1024


def _launch(config: list[int]) -> tuple[int, int, int, int, int]:
    rows, inner, columns, warps, stages = config
    return rows, inner, columns, warps, stages


@torch.library.custom_op(
    "seqlong::grouped_matmul",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor ends, Tensor? gather, Tensor? scatter, int copies, str engine, "
    "int[] config) -> Tensor",
)
@as_written
def _rows(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    copies: int,
    engine: str,
    config: list[int],
) -> Tensor:
    if engine == "triton":
        from seqlong.kernels.grouped_matmul.triton import rows_triton

        return rows_triton(x, weight, ends, gather, scatter, copies, *_launch(config))
    function = rows_grouped if engine == "grouped_mm" else rows_looped
    return function(x, weight, ends, gather, scatter, copies)


@_rows.register_fake
def _(x, weight, ends, gather, scatter, copies, engine, config):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0] if gather is None else gather.shape[0], weight.shape[2])


@torch.library.custom_op(
    "seqlong::grouped_outer",
    mutates_args=(),
    schema="(Tensor x, Tensor grad, Tensor ends, Tensor? gather, Tensor? scatter, int copies, str engine, "
    "int[] config) -> Tensor",
)
@as_written
def _outer(
    x: Tensor,
    grad: Tensor,
    ends: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    copies: int,
    engine: str,
    config: list[int],
) -> Tensor:
    if engine == "triton":
        from seqlong.kernels.grouped_matmul.triton import outer_triton

        return outer_triton(x, grad, ends, gather, scatter, copies, *_launch(config))
    function = outer_grouped if engine == "grouped_mm" else outer_looped
    return function(x, grad, ends, gather, scatter, copies)


@_outer.register_fake
def _(x, grad, ends, gather, scatter, copies, engine, config):  # type: ignore[no-untyped-def]
    return x.new_empty(ends.shape[0], x.shape[1], grad.shape[1])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, ends, gather, scatter, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, ends, gather, scatter)


def _autograd(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, ends, gather, scatter = ctx.saved_tensors
    copies, engine, config = ctx.settings
    grad = grad.contiguous()
    dx = dw = None
    if ctx.needs_input_grad[0]:
        # Row by row the same product with the matrices transposed; where rows were gathered, they are put back, one
        # place a copy, and copies are added up: no two programs write to one place.
        dx = _rows(grad, weight.transpose(1, 2), ends, scatter, gather, 1, engine, config)
        if copies > 1:
            dx = dx.view(-1, copies, dx.shape[1]).sum(dim=1)
    if ctx.needs_input_grad[1]:
        dw = _outer(x, grad, ends, gather, scatter, copies, engine, config)
    return dx, dw, None, None, None, None, None, None


_rows.register_autograd(_autograd, setup_context=_setup_context)


def _why_not_triton(x: Tensor, weight: Tensor) -> str | None:
    reason = triton_runs_on(x.device)
    if reason is not None:
        return reason
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the Triton kernels do not compute in {x.dtype}"
    if weight.shape[0] > MOST_GROUPS:
        return f"the Triton kernels serve up to {MOST_GROUPS} groups, not {weight.shape[0]}"
    if not x.numel() or not weight.numel():
        return "an empty input"
    return None


def _check_triton(device: torch.device, dtype: torch.dtype, config: tuning.Config) -> str | None:
    """What is wrong with a configuration, in a sentence; None if its results are those of the loop."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(*shape, generator=generator).to(device, dtype) for shape in ((150, 200), (9, 200, 72))]
    order = torch.randperm(300, generator=generator).to(device)
    ends = torch.tensor([0, 1, 130, 130, 140, 200, 260, 290, 297], device=device)
    results = []
    for engine in ("triton", "chunked"):
        x, weight = (value.detach().requires_grad_() for value in drawn)
        with torch.enable_grad():
            y = _rows(x, weight, ends, order, None, 2, engine, [int(config[name]) for name in DEFAULT])
            z = _rows(y, weight.transpose(1, 2), ends, None, order, 1, engine, [int(config[name]) for name in DEFAULT])
            results.append([y, z, *torch.autograd.grad(z, (x, weight), torch.ones_like(z))])
    for name, found, wanted in zip(("y", "z", "dx", "dweight"), *results, strict=True):
        error = (found.double() - wanted.double()).square().mean().sqrt() / wanted.double().square().mean().sqrt()
        if not error <= 2e-2:
            return f"{name} has a relative error of {error.item():.2g}; at most 0.02 was expected"
    return None


def _settled(x: Tensor) -> list[int] | None:
    """The configuration of the Triton kernels, None if none is right here."""
    device, dtype = x.device, x.dtype

    def check(config: tuning.Config) -> str | None:
        return _check_triton(device, dtype, config)

    # As everywhere, nothing is checked on a CPU, where only the interpreter runs these kernels.
    config = tuning.settle("grouped_matmul", tuning.key(dtype), DEFAULT, device, check if x.is_cuda else None)
    return None if config is None else [int(config[name]) for name in DEFAULT]


def _choose(x: Tensor, weight: Tensor, implementation: str | None) -> tuple[str, list[int]]:
    reasons, config = {}, [int(value) for value in DEFAULT.values()]
    obstacle = _why_not_triton(x, weight)
    if obstacle is None and (x.is_cuda or implementation == "triton"):
        found = _settled(x)
        config = config if found is None else found
        if found is None:
            obstacle = "no configuration of the Triton kernels is right on this GPU"
    if obstacle is not None:
        reasons["triton"] = obstacle
    lacking = why_not_grouped_mm(x.device, x.dtype) if x.is_cuda or implementation == "grouped_mm" else "slow on a CPU"
    if lacking is None and not x.numel():
        lacking = "an empty input"
    if lacking is not None:
        reasons["grouped_mm"] = lacking
    offered = {name: f"{NOT_HERE}{reasons[name]}" if name in reasons else text for name, text in OFFERED.items()}
    best = "chunked"
    if x.is_cuda:
        # float32 has no tensor cores but by torch's own setting, which one product a group obeys.
        wanted = ("triton",) * (x.dtype != torch.float32) + ("grouped_mm",) * is_one_kernel(x.device, x.dtype)
        best = next((one for one in wanted if one not in reasons), "chunked")
    if best == "chunked":
        offered["chunked"] += f" ({'; '.join(reasons.values())})"
    return choose("grouped_matmul", offered, best, implementation).implementation, config


def grouped_matmul(
    x: Float[Tensor, "m k"],
    weight: Float[Tensor, "e k n"],
    ends: Int[Tensor, "e"],
    *,
    gather: Int[Tensor, "r"] | None = None,
    scatter: Int[Tensor, "r"] | None = None,
    copies: int = 1,
    implementation: str | None = None,
) -> Float[Tensor, "r n"]:
    """Rows sorted into groups, each group times its own matrix: ``y[scatter[i]] = x[gather[i] // copies] @ weight[e]``
    for the rows ``ends[e-1] <= i < ends[e]``. Rows past ``ends[-1]`` belong to no group: zero.

    Args:
        x: rows.
        weight: one matrix a group, of any strides (a transposed view is read as it lies).
        ends: where each group ends, not falling. A group may be empty.
        gather: which row of x each row in the order of the groups is; a permutation of ``m · copies``. None: x is in
            that order itself.
        scatter: where each row of the result goes, a permutation of r; None keeps the order of the groups.
        copies: how many times each row of x occurs: ``gather`` numbers copies, of row ``i`` from ``copies · i`` on.
        implementation: ``triton``, ``grouped_mm``, ``chunked`` or ``reference``; None lets dispatch choose.

    Returns:
        In x's type; autocast's, if it is on. Sums are float32 (float64 for float64). Two runs are equal bit by bit,
        the gradients too: nothing is added up in the order in which a GPU comes by.

    Raises:
        ValueError: shapes do not fit, or the implementation asked for cannot serve these inputs.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    one_device("grouped_matmul", {"x": x, "weight": weight, "ends": ends, "gather": gather, "scatter": scatter})
    rows = x.shape[0] * copies
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[1] or ends.shape != weight.shape[:1]:
        raise ValueError(
            f"grouped_matmul needs x (m k), weight (e k n) and ends (e); found {tuple(x.shape)}, "
            f"{tuple(weight.shape)} and {tuple(ends.shape)}"
        )
    if copies < 1 or (copies > 1 and gather is None):
        raise ValueError(f"grouped_matmul: copies must be 1, or more with gather; found {copies}")
    for name, index in (("gather", gather), ("scatter", scatter)):
        if index is not None and index.shape != (rows,):
            raise ValueError(f"grouped_matmul: {name} must be ({rows},), found {tuple(index.shape)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"grouped_matmul: x is {x.dtype}, but weight {weight.dtype}")
    engine, config = _choose(x, weight, implementation)
    if engine == "reference":
        return grouped_matmul_reference(x, weight, ends, gather, scatter, copies)
    return _rows(x.contiguous(), weight, ends, gather, scatter, copies, engine, config)
