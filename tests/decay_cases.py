"""Inputs of scalar_decay and ssd with extreme gates and starts everywhere, and how results are compared."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqlong.kernels import tuning
from seqlong.kernels.plans import power
from seqlong.kernels.scalar_decay import scalar_decay, ssd

OPS = {"scalar_decay": scalar_decay, "ssd": ssd}
#: Largest relative error (root mean square) of a result. In float32 a gate in a chunk with many starts has 1e-4 of its
#: own: a start is a decay of 2^-160, and the running sum of many has few digits left.
EXACT = {torch.float32: 3e-4, torch.bfloat16: 1.5e-2}
#: The same between two ways to cut a row.
CUT = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2}

GATES = {
    "usual": lambda drawn: -2 * drawn,
    "slow": lambda drawn: -0.01 * drawn,
    "none": lambda drawn: 0 * drawn,
    "strong": lambda drawn: 0 * drawn - 100,
    "never": lambda drawn: 0 * drawn - 1e4,
    "mixed": lambda drawn: -1e4 * drawn**8,
}
STARTS = {
    "none": lambda starts: None,
    "random": lambda starts: starts.copy_(torch.rand(starts.shape) < 0.15),
    "every": lambda starts: starts.fill_(True),
    "first": lambda starts: starts.index_fill_(1, torch.tensor([0], device=starts.device), True),
    "consecutive": lambda starts: starts.index_fill_(
        1, torch.tensor([t for t in (1, 2, 3, 15, 16, 17, 40, 63, 64) if t < starts.shape[1]], device=starts.device),
        True,
    ),
}  # fmt: skip


@dataclass
class Case:
    """Inputs of one op: what is learned, and what is not."""

    op: str
    learned: dict[str, Tensor]
    fixed: dict[str, Any]

    def run(self, implementation: str, **options: Any) -> tuple[Tensor, Tensor]:
        return OPS[self.op](**self.learned, **{**self.fixed, **options}, implementation=implementation)

    def results(self, implementation: str = "triton", **options: Any) -> dict[str, Tensor]:
        """Output, final state, and gradients of a sum of both with fixed weights."""
        output, final = self.run(implementation, **options)
        source = torch.Generator().manual_seed(5)
        weigh = [torch.randn(x.shape, generator=source).bfloat16().to(x.device, x.dtype) for x in (output, final)]
        grads = torch.autograd.grad([output, final], list(self.learned.values()), weigh)
        named = zip((f"grad of {name}" for name in self.learned), grads, strict=True)
        return {"output": output.detach(), "final state": final.detach(), **dict(named)}

    def but(self, **changed: Any) -> Case:
        """The same with other tensors."""
        fixed = {name: changed.pop(name, value) for name, value in self.fixed.items()}
        return Case(self.op, {**self.learned, **{n: x.requires_grad_() for n, x in changed.items()}}, fixed)

    def in_double(self) -> Case:
        learned = {name: x.detach().double().requires_grad_() for name, x in self.learned.items()}
        return Case(self.op, learned, self.fixed)

    def cut(self, **settings: int) -> AbstractContextManager[None]:
        """Run with these settings of the plan; ``programs_per_sm=0`` makes one segment a row."""
        q, v = (self.learned[name] for name in (("q", "v") if self.op == "scalar_decay" else ("c", "x")))
        shared = self.op != "ssd" and q.shape[2] != v.shape[2]
        name = tuning.key(v.dtype, k=power(q.shape[3]), v=power(v.shape[3]), shared=shared)
        return tuning.using(self.op, settings, name)


def make(op: str, rows: int, length: int, groups: int, heads: int, k: int, v: int, gate: str = "usual",
         starts: str = "none", dtype: torch.dtype = torch.float32, device: str = "cpu", state: bool = True,
         **fixed: Any) -> Case:  # fmt: skip
    """Inputs drawn on the CPU, so that they are the same everywhere."""
    on = {"device": device, "dtype": dtype}
    q, key = torch.randn(rows, length, groups, k), torch.randn(rows, length, groups, k) * k**-0.5
    value, drawn = torch.randn(rows, length, heads, v), GATES[gate](torch.rand(rows, length, heads))
    if op == "scalar_decay":
        learned = {"q": q.to(**on), "k": key.to(**on), "v": value.to(**on), "log_decay": drawn.to(device)}
    else:
        rate = -1 - 15 * torch.rand(heads)  # as Mamba2 draws them
        # softplus is the identity where it is large, and e^x where it is small: steps of the size of the gates.
        step = (drawn / rate).clamp(min=1e-6)
        raw = torch.where(step > 20, step, step.expm1().log())
        bias = torch.randn(heads)
        learned = {"x": value.to(**on), "dt": (raw - bias).to(device), "a": rate.to(device), "b": key.to(**on),
                   "c": q.to(**on), "d": torch.randn(heads).to(device), "dt_bias": bias.to(device)}  # fmt: skip
    if state:
        learned["initial_state"] = torch.randn(rows, heads, k, v).to(device)
    marks = STARTS[starts](torch.zeros(rows, length, dtype=torch.bool, device=device))
    return Case(op, {name: x.requires_grad_() for name, x in learned.items()}, {"starts": marks, **fixed})


def error(found: Tensor, exact: Tensor) -> float:
    """Relative to the exact values, or 0.1: gradients of gates are near zero where nothing is remembered."""
    scale = exact.double().norm().clamp(min=0.1 * exact.numel() ** 0.5)
    return ((found.double() - exact.double()).norm() / scale).item()


def agree(found: dict[str, Tensor], exact: dict[str, Tensor], limit: float) -> None:
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        assert value.isfinite().all(), f"{name} is not finite"
        assert error(value, exact[name]) < limit, f"{name}: {error(value, exact[name]):.1e}"


def same(found: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit by bit."""
    for name, value in found.items():
        assert torch.equal(value, other[name]), name


def bfloat16_or_float32(device: str) -> torch.dtype:
    """On a GPU bfloat16, which models use: kernels in float32 take minutes to compile."""
    return torch.float32 if device == "cpu" else torch.bfloat16
