"""Time, memory and correctness of one contender on one shape."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
MIB = 1 << 20
#: Positions at the end of the last row that are compared, and those before them that the reference starts from.
COMPARED, LEAD = 1024, 3072
#: Relative error of an output or gradient from which on a contender counts as wrong.
WRONG = 0.03


@dataclass(frozen=True)
class Family:
    """What is computed: its inputs, its definition and its least cost.

    Attributes:
        make: (rows, length, device) -> inputs; with a time axis they are (b, t, ...).
        learnt: names of the inputs whose gradients are timed; none: only the forward pass is.
        timed: names of the inputs that have a time axis.
        reference: inputs -> output, our chunked form, which is given float32.
        flops: of one position, forward and backward together; 0 where nobody counted.
        softmax: whether attention with softmax, another function of these inputs, may stand beside it.
    """

    make: Callable[[int, int, torch.device], Inputs]
    learnt: tuple[str, ...]
    timed: tuple[str, ...]
    reference: Callable[[Inputs], Tensor]
    flops: float = 0.0
    softmax: bool = False


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Median milliseconds of ``run`` with a cold L2 cache, from 3 to 100 runs in about ``seconds``."""
    run()
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    count = max(3, min(100, int(seconds / (time.perf_counter() - begin + 1e-9))))
    if device.type != "cuda":
        found = []
        for _ in range(count):
            begin = time.perf_counter()
            run()
            found.append((time.perf_counter() - begin) * 1000)
        return sorted(found)[count // 2]
    cold = torch.empty(256 * MIB, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for first, last in events:
        cold.zero_()
        first.record()
        run()
        last.record()
    torch.cuda.synchronize()
    return sorted(first.elapsed_time(last) for first, last in events)[count // 2]


def size(tensors: list[Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def measure(
    family: Family, contender: Callable[[Inputs], Callable[[], Tensor]], rows: int, length: int, seconds: float,
    device: torch.device, checked: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Everything about one contender on one shape; ``seconds`` for each timing, 0 for none."""
    torch.manual_seed(0)
    inputs = family.make(rows, length, device)
    learnt = [inputs[name].requires_grad_() for name in family.learnt]
    found: dict[str, Any] = {}
    if not learnt:
        return _forward_only(family, contender, inputs, seconds, device)
    forward = contender(inputs)
    synchronize(device)
    begin = time.perf_counter()
    output = forward()
    grad = torch.randn_like(output)
    grads = torch.autograd.grad(output, learnt, grad)
    synchronize(device)
    found["first_s"] = time.perf_counter() - begin

    if checked:
        got = dict(zip(("output", *family.learnt), (output.detach(), *grads), strict=True))
        found["errors"] = _errors(family, inputs, grad, got)
        found["wrong"] = [name for name, error in found["errors"].items() if not error < WRONG]
        del got
    every_byte = size([*learnt, output])
    found["bytes"] = every_byte + size([*learnt, grad, *grads])
    del output, grads

    def both() -> tuple[Tensor, ...]:
        made = forward()
        return (made, *torch.autograd.grad(made, learnt, grad))

    if device.type == "cuda":
        torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made = both()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - base
        found["extra_mib"] = (peak - size(list(made))) / MIB
        found["peak_mib"] = peak / MIB
        del made
    if seconds:
        with torch.no_grad():
            found["fwd_ms"] = timed(forward, seconds, device)
        found["fwdbwd_ms"] = timed(both, seconds, device)
    return found


def _forward_only(
    family: Family, contender: Callable[[Inputs], Callable[[], Tensor]], inputs: Inputs, seconds: float,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """A decoding step: as it is called, and replayed from a CUDA graph, where launches cost nothing."""
    found: dict[str, Any] = {}
    with torch.no_grad():
        expected = family.reference({name: x.float() if x.is_floating_point() else x for name, x in inputs.items()})
        forward = contender(inputs)
        begin = time.perf_counter()
        error = _error(forward(), expected)
        found["first_s"] = time.perf_counter() - begin
        found["errors"], found["wrong"] = {"output": error}, [] if error < WRONG else ["output"]
        if seconds:
            found["fwd_ms"] = timed(forward, seconds, device)
        if seconds and device.type == "cuda":
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    forward()
                found["graph_ms"] = timed(graph.replay, seconds, device)
            except RuntimeError as error:  # one that synchronises or allocates elsewhere cannot be recorded
                found["no_graph"] = str(error).splitlines()[0]
    return found


def _error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.float(), expected.float()
    return float((got - expected).norm() / (expected.norm() + 1e-30))


def _errors(family: Family, inputs: Inputs, grad: Tensor, got: Inputs) -> dict[str, float]:
    """Relative errors at the end of the last row, where addresses are largest, against ``reference``.

    The reference starts ``LEAD`` positions before; what came earlier has decayed by then. Gradients of inputs without a
    time axis sum over all positions and are compared only where the reference sees them all.
    """
    length = grad.shape[1]
    start = max(0, length - LEAD - COMPARED)
    whole = start == 0 and grad.shape[0] == 1
    piece = {name: (x[-1:, start:] if name in family.timed else x).detach().float() for name, x in inputs.items()}
    learnt = [piece[name].requires_grad_() for name in family.learnt]
    expected = family.reference(piece)
    grads = torch.autograd.grad(expected, learnt, grad[-1:, start:].float(), allow_unused=True)
    errors = {"output": _error(got["output"][-1:, -COMPARED:], expected.detach()[:, -COMPARED:])}
    for name, wanted in zip(family.learnt, grads, strict=True):
        if wanted is None or not (name in family.timed or whole):
            continue
        pair = (got[name], wanted)
        if name in family.timed:
            pair = (got[name][-1:, -COMPARED:], wanted[:, -COMPARED:])
        errors[name] = _error(*pair)
    return errors


def ceilings(device: torch.device, seconds: float) -> dict[str, float]:
    """Bytes a second of a copy, and bf16 operations a second of a large product, on this machine now."""
    cuda = device.type == "cuda"
    source = torch.empty((1024 if cuda else 16) * MIB, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), seconds, device)
    n = 8192 if cuda else 256
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    product = timed(lambda: a @ b, seconds, device)
    return {"bytes_per_s": 2 * source.numel() / copy * 1e3, "flops_per_s": 2 * n**3 / product * 1e3}
