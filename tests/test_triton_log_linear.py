"""log_linear by runs of Triton kernels, one a level, against the float64 loop over tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from test_log_linear import draw

from seqlong.kernels import runtime
from seqlong.kernels.delta_rule.chunked import delta_rule_chunked, delta_rule_chunked_backward
from seqlong.kernels.log_linear import by_level, log_linear
from seqlong.kernels.scalar_decay.chunked import scalar_decay_chunked, scalar_decay_chunked_backward

# The interpreter computes what a mask then throws away.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
LIMIT = {torch.float32: 3e-4, torch.bfloat16: 2.5e-2}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    reason = runtime.triton_runs_on(request.param)
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is full of NaN: an element that is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


def results(inputs: dict[str, Tensor], implementation: str, starts: Tensor | None) -> dict[str, Tensor]:
    """Output, stack, count, and gradients of a sum of the first two with fixed weights."""
    output, state = log_linear(**inputs, starts=starts, implementation=implementation)
    source = torch.Generator().manual_seed(5)
    weigh = [torch.randn(x.shape, generator=source).to(x) for x in (output, state.states)]
    grads = torch.autograd.grad([output, state.states], list(inputs.values()), weigh)
    named = zip((f"grad of {name}" for name in inputs), grads, strict=True)
    return {"output": output.detach(), "stack": state.states.detach(), "count": state.tokens, **dict(named)}


def agree(found: dict[str, Tensor], exact: dict[str, Tensor], limit: float) -> None:
    assert torch.equal(found.pop("count").cpu(), exact.pop("count").cpu())
    for name, x in found.items():
        y = exact[name].to(x.device).double()
        off = (x.double() - y).norm() / y.norm().clamp(min=0.1 * y.numel() ** 0.5)
        assert off < limit, f"{name}: {off:.1e}"


@pytest.fixture
def runs_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops that a level is made of, in chunks of torch: the interpreter takes a minute for what these do at once."""

    def scalar(q, k, v, gate, bias, rate, skip, starts, initial, reverse, keep):  # type: ignore[no-untyped-def]
        output, final, entries = scalar_decay_chunked(q, k, v, gate, starts, initial)
        return output, final, gate, entries

    def of_scalar(grad, grad_final, q, k, v, bias, rate, skip, starts, initial, gate, entries, reverse):  # type: ignore[no-untyped-def]
        return scalar_decay_chunked_backward(grad, grad_final, q, k, v, gate, starts, entries)

    def delta(q, k, v, weight, gate, initial, normalize, keep):  # type: ignore[no-untyped-def]
        return delta_rule_chunked(q, k, v, weight, gate, None, None, None, initial, normalize)

    def of_delta(grad, grad_final, q, k, v, weight, gate, entries, normalize):  # type: ignore[no-untyped-def]
        found = delta_rule_chunked_backward(
            grad, grad_final, q, k, v, weight, gate, None, None, None, entries, normalize
        )
        return *found[:5], None

    monkeypatch.setattr(by_level, "BLOCK", 16)
    for name, function in (("scalar_decay_triton", scalar), ("scalar_decay_triton_backward", of_scalar),
                           ("delta_rule_triton", delta), ("delta_rule_triton_backward", of_delta)):  # fmt: skip
        monkeypatch.setattr(by_level, name, function)


@pytest.mark.usefixtures("runs_in_torch")
@pytest.mark.skipif(not runtime.INTERPRETED, reason="on a GPU the Triton kernels themselves are tested")
@pytest.mark.parametrize("share", [0.0, 0.06, 1.0])
@pytest.mark.parametrize(("length", "levels"), [(1, 1), (3, 3), (32, 6), (65, 12)])
@pytest.mark.parametrize("gate", ["usual", "forgets"])
@pytest.mark.parametrize("form", ["scalar", "delta"])
def test_levels_are_runs(form: str, gate: str, length: int, levels: int, share: float) -> None:
    inputs = draw(form, 2, length, 2, 4, 10, 6, levels, gate=gate, dtype=torch.float32)
    starts = torch.rand(2, length) < share if share else None
    exact = results({n: x.detach().double().requires_grad_() for n, x in inputs.items()}, "reference", starts)
    agree(results(inputs, "triton", starts), exact, 1e-4)


# rows, length, groups, heads, k, v, levels; chance of a start; type
CASES: list[tuple[str, tuple[int, ...], float, torch.dtype]] = [
    ("scalar", (2, 1, 1, 1, 16, 8, 1), 0.0, torch.float32),
    ("scalar", (1, 8, 1, 2, 16, 16, 4), 0.0, torch.float32),  # 2^3 tokens: they end in the last bucket
    ("scalar", (2, 21, 2, 2, 12, 20, 7), 0.1, torch.float32),
    ("scalar", (1, 20, 1, 2, 16, 16, 8), 0.1, torch.bfloat16),
    ("delta", (1, 3, 1, 1, 16, 8, 3), 0.3, torch.float32),
    ("scalar", (2, 700, 2, 4, 64, 64, 12), 0.01, torch.bfloat16),
    ("delta", (2, 700, 2, 4, 64, 64, 12), 0.01, torch.bfloat16),
]


@pytest.mark.parametrize(("form", "sizes", "share", "dtype"), CASES, ids=str)
def test_it_is_its_definition(form: str, sizes: tuple[int, ...], share: float, dtype: torch.dtype, device: str) -> None:
    if device == "cpu" and sizes[1] > 100:
        pytest.skip("minutes in the interpreter")
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("float32 is not for the Triton kernels of a GPU")
    inputs = draw(form, *sizes, dtype=dtype)
    starts = torch.rand(sizes[:2]) < share if share else None
    exact = results({n: x.detach().double().requires_grad_() for n, x in inputs.items()}, "reference", starts)
    moved = {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}
    agree(results(moved, "triton", None if starts is None else starts.to(device)), exact, LIMIT[dtype])


@pytest.mark.parametrize("form", ["scalar", "delta"])
def test_without_what_is_not_asked_for(form: str, device: str, request: pytest.FixtureRequest) -> None:
    """Only the output, or only the stack, has a gradient to give; or nothing is differentiated."""
    if device == "cpu":
        request.getfixturevalue("runs_in_torch")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    inputs = draw(form, 1, 16, 1, 1, 16, 16, 6, dtype=dtype)
    moved = {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}
    for pick in (0, 1):
        found, exact = (
            log_linear(**moved, implementation=one)[pick]
            if pick == 0
            else log_linear(**moved, implementation=one)[1][0]
            for one in ("triton", "chunked")
        )
        grads = [torch.autograd.grad(x.float().square().sum(), moved["v"])[0] for x in (found, exact)]
        assert (grads[0] - grads[1]).norm() < (1e-4 if dtype == torch.float32 else 3e-2) * grads[1].norm()
    with torch.no_grad():
        found, exact = (log_linear(**moved, implementation=one)[0] for one in ("triton", "chunked"))
    assert (found - exact).norm() < (1e-4 if dtype == torch.float32 else 3e-2) * exact.norm()


def test_what_it_cannot_serve_is_said() -> None:
    if runtime.triton_runs_on("cpu") is not None:
        pytest.skip("Triton has no interpreter here")
    inputs = draw("scalar", 1, 9, 1, 1, 16, 16, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="need a level for each power of two"):
        log_linear(**inputs, implementation="triton")
    inputs = draw("scalar", 1, 9, 1, 1, 16, 16, 5, dtype=torch.float32)
    _, state = log_linear(**inputs)
    with pytest.raises(ValueError, match="start without a stack"):
        log_linear(**inputs, initial_state=state, implementation="triton")


@pytest.mark.parametrize("form", ["scalar", "delta"])
@pytest.mark.usefixtures("runs_in_torch")
def test_the_op_keeps_its_promises(form: str) -> None:
    if runtime.triton_runs_on("cpu") is not None:
        pytest.skip("Triton has no interpreter here")
    inputs = draw(form, 1, 6, 1, 1, 16, 16, 4, dtype=torch.float32)
    torch.library.opcheck(
        by_level.log_linear_by_level,
        (*inputs.values(), *[None] * (6 - len(inputs)), torch.rand(1, 6) < 0.2),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
