"""Inputs of delta_rule in all its forms, with extreme gates and weights and starts everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqlong.kernels.delta_rule import delta_rule

INF = torch.inf
GATES: dict[str, Any] = {
    "usual": lambda drawn: -2 * drawn,
    "slow": lambda drawn: -0.01 * drawn,
    "zero": lambda drawn: 0 * drawn,
    "strong": lambda drawn: 0 * drawn - 100,
    "never": lambda drawn: 0 * drawn - 1e4,
    "mixed": lambda drawn: -1e4 * drawn**8,
    "forgets": lambda drawn: torch.where(drawn < 0.2, -INF, -0.1 * drawn),
}
BETAS = {
    "usual": lambda drawn: drawn,
    "negative": lambda drawn: 2 * drawn,
    "zero": lambda drawn: 0 * drawn,
    "one": lambda drawn: 0 * drawn + 1,
    "two": lambda drawn: 0 * drawn + 2,
}
STARTS: dict[str, Any] = {
    "none": lambda starts: None,
    "random": lambda starts: starts.copy_(torch.rand(starts.shape) < 0.15),
    "every": lambda starts: starts.fill_(True),
    "first": lambda starts: starts.index_fill_(1, torch.tensor([0], device=starts.device), True),
}


@dataclass
class Case:
    """Inputs: what is learned, and what is not."""

    learned: dict[str, Tensor]
    fixed: dict[str, Any]

    def run(self, implementation: str | None, **options: Any) -> tuple[Tensor, Tensor]:
        return delta_rule(**self.learned, **{**self.fixed, **options}, implementation=implementation)

    def results(self, implementation: str | None, **options: Any) -> dict[str, Tensor]:
        """Output, final state, and gradients of a sum of both with fixed weights."""
        output, final = self.run(implementation, **options)
        source = torch.Generator().manual_seed(5)
        weigh = [torch.randn(x.shape, generator=source).bfloat16().to(x.device, x.dtype) for x in (output, final)]
        grads = torch.autograd.grad([output, final], list(self.learned.values()), weigh)
        named = zip((f"grad of {name}" for name in self.learned), grads, strict=True)
        return {"output": output.detach(), "final state": final.detach(), **dict(named)}

    def but(self, **changed: Tensor) -> Case:
        """The same with other learned tensors."""
        return Case({**self.learned, **{n: x.detach().requires_grad_() for n, x in changed.items()}}, self.fixed)

    def in_double(self) -> Case:
        return self.but(**{name: x.detach().double() for name, x in self.learned.items()})


def make(rows: int, length: int, groups: int, heads: int, k: int, v: int, kind: str = "head", gate: str = "usual",
         beta: str = "usual", starts: str = "none", raw: bool = False, dtype: torch.dtype = torch.float64,
         device: str = "cpu", state: bool = True, **fixed: Any) -> Case:  # fmt: skip
    """Inputs drawn on the CPU. ``kind`` of gate: none, head or channel; ``raw``: everything is activated inside."""
    on = {"device": device, "dtype": dtype}
    many = torch.float64 if dtype == torch.float64 else torch.float32  # gates and states
    q, key = torch.randn(rows, length, groups, k), torch.randn(rows, length, groups, k)
    if raw:
        key[:, ::7] = 0  # its length is no divisor
        fixed = {"normalize": True, "beta_activation": "double_sigmoid", **fixed}
        weight = torch.randn(rows, length, heads)
    else:
        key = torch.nn.functional.normalize(key, dim=-1)
        weight = BETAS[beta](torch.rand(rows, length, heads))
    learned = {"q": q.to(**on), "k": key.to(**on), "v": torch.randn(rows, length, heads, v).to(**on),
               "beta": weight.to(device, many)}  # fmt: skip
    shape = (rows, length, heads, k) if kind == "channel" else (rows, length, heads)
    if kind != "none":
        if raw:
            fixed["gate_activation"] = "softplus"
            learned["gate"] = torch.randn(shape).to(device, many)
            learned["rate"] = -torch.rand(heads).to(device, many)
            learned["gate_bias"] = torch.randn(shape[2:] if rows > 1 else shape[2:3]).to(device, many)
        else:
            learned["gate"] = GATES[gate](torch.rand(shape)).to(device, many)
    if state:
        learned["initial_state"] = torch.randn(rows, heads, k, v).to(device, many)
    marks = STARTS[starts](torch.zeros(rows, length, dtype=torch.bool, device=device))
    return Case({name: x.requires_grad_() for name, x in learned.items()}, {"starts": marks, **fixed})


def error(found: Tensor, exact: Tensor) -> float:
    """Relative to the exact values, or 0.1: gradients of gates are near zero where nothing is remembered."""
    scale = exact.double().norm().clamp(min=0.1 * exact.numel() ** 0.5)
    return ((found.double() - exact.double()).norm() / scale).item()


def agree(found: dict[str, Tensor], exact: dict[str, Tensor], limit: float) -> None:
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        assert value.isfinite().all(), f"{name} is not finite"
        off = error(value, exact[name])
        if name in ("grad of rate", "grad of gate_bias"):  # sums of gates' gradients: held against what they sum
            off = min(off, ((value.double() - exact[name]).norm() / exact["grad of gate"].norm()).item())
        assert off < limit, f"{name}: {off:.1e}"


def compile_for_lengths() -> None:
    """Compile the op with its gradient as one graph of any length, compare, and say so."""
    case = make(2, 40, 1, 2, 4, 3, kind="channel", raw=True, starts="random", dtype=torch.float32)
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def at(length: int) -> dict[str, Any]:
        by_token = ("q", "k", "v", "beta", "gate")
        learned = {name: x[:, :length].clone() if name in by_token else x for name, x in case.learned.items()}
        return {**learned, **case.fixed, "starts": case.fixed["starts"][:, :length].clone()}

    compiled = torch.compile(delta_rule, backend="aot_eager", fullgraph=True, dynamic=True)
    counted = torch.compile(delta_rule, backend=count, fullgraph=True, dynamic=True)
    for length in (40, 23, 37):
        given = at(length)
        found, exact = compiled(**given), delta_rule(**given)
        torch.testing.assert_close(found, exact)
        torch.testing.assert_close(
            *(torch.autograd.grad(o.sum() + final.sum(), case.learned["k"]) for o, final in (found, exact))
        )
        counted(**given)
    assert graphs == 1, f"{graphs} graphs"
    print("one graph")
