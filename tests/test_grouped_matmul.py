"""grouped_matmul: every engine against a dense float64 product a group; rows of no group, empty groups, odd widths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seqlong.kernels import runtime
from seqlong.kernels.grouped_matmul import chunked, collect_rows, grouped_matmul, op, place_rows

ENGINES = ["reference", "chunked", "grouped_mm", "triton"]
#: Relative error (root mean square) of a product of rounded inputs.
STORED = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 6e-3}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return str(request.param)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is full of NaN: an element that is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles small enough that tiny inputs cross several of them."""
    if not torch.cuda.is_available():
        small = {"rows": 16, "inner": 16, "columns": 16, "warps": 4, "stages": 1}
        monkeypatch.setattr(op, "DEFAULT", small)


@dataclass
class Case:
    """Inputs, and how rows are read and written."""

    x: Tensor
    weight: Tensor
    ends: Tensor
    gather: Tensor | None
    scatter: Tensor | None
    copies: int

    def call(self, implementation: str | None) -> Tensor:
        return grouped_matmul(
            self.x, self.weight, self.ends, gather=self.gather, scatter=self.scatter, copies=self.copies,
            implementation=implementation,
        )  # fmt: skip


def draw(kind: str, device: str, dtype: torch.dtype, tokens: int = 23, k: int = 20, n: int = 37) -> Case:
    """``up`` gathers two copies of each row, ``down`` scatters, ``plain`` does neither; some rows are of no group."""
    generator = torch.Generator().manual_seed(3)
    copies = 2 if kind == "up" else 1
    rows = tokens * copies
    cuts = [0, 1, 1, rows // 2, rows - 4]  # an empty first group, one of one row, one more empty, two of many
    order = torch.randperm(rows, generator=generator).to(device)
    x = torch.randn(tokens, k, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(len(cuts), k, n, generator=generator).to(device, dtype).requires_grad_()
    return Case(x, weight, torch.tensor(cuts, device=device), order if kind == "up" else None,
                order if kind == "down" else None, copies)  # fmt: skip


def dense(case: Case) -> Tensor:
    """Every row times every matrix, and a mask: nothing of what the engines do."""
    rows = case.x.shape[0] * case.copies
    places = torch.arange(rows, device=case.x.device)
    order = places if case.gather is None else case.gather
    group = torch.bucketize(places, case.ends, right=True)
    every = torch.einsum("mk,ekn->men", case.x.double(), case.weight.double())
    chosen = torch.nn.functional.one_hot(group, case.weight.shape[0] + 1)[:, :-1].double()
    y = torch.einsum("ren,re->rn", every[order // case.copies], chosen)
    if case.scatter is None:
        return y
    return torch.zeros_like(y).index_put((case.scatter,), y)


def available(engine: str, device: str, dtype: torch.dtype) -> None:
    if engine == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        reason = runtime.triton_runs_on(device) or ("no float64 in Triton" if dtype == torch.float64 else None)
    elif engine == "grouped_mm":
        reason = chunked.why_not_grouped_mm(torch.device(device), dtype)
    else:
        reason = None
    if reason is not None:
        pytest.skip(reason)


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    assert found.isfinite().all()
    return ((found.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()).item()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["plain", "up", "down"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_result_and_gradients_are_those_of_a_dense_product(
    engine: str, kind: str, dtype: torch.dtype, device: str
) -> None:
    available(engine, device, dtype)
    case = draw(kind, device, dtype)
    found, wanted = case.call(engine), dense(case)
    assert found.dtype == dtype
    assert error(found, wanted) < STORED[dtype]
    incoming = torch.randn(found.shape, device=device).to(dtype)
    ours = torch.autograd.grad(found, (case.x, case.weight), incoming)
    theirs = torch.autograd.grad(wanted, (case.x, case.weight), incoming.double())
    for one, other in zip(ours, theirs, strict=True):
        assert error(one, other.double()) < STORED[dtype]
    assert not found[wanted.abs().sum(1) == 0].any(), "rows of no group are exactly zero"


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_two_runs_are_equal_bit_by_bit(engine: str, device: str) -> None:
    available(engine, device, torch.bfloat16)
    results = []
    for _ in range(2):
        case = draw("up", device, torch.bfloat16, tokens=50)
        y = case.call(engine)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), (case.x, case.weight))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_matrices_of_any_strides_and_no_rows_at_all(engine: str, device: str) -> None:
    available(engine, device, torch.float32)
    case = draw("plain", device, torch.float32, k=24, n=24)
    turned = Case(case.x, case.weight.transpose(1, 2), case.ends, None, None, 1)
    assert error(turned.call(engine), dense(turned)) < STORED[torch.float32]
    nothing = Case(case.x, case.weight, torch.zeros_like(case.ends), None, None, 1)
    y = nothing.call(engine)
    assert not y.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(y.sum(), (case.x, case.weight)))


def test_all_rows_of_one_group(device: str) -> None:
    for engine in ENGINES[1:]:
        if engine == "triton" and runtime.triton_runs_on(device) is not None:
            continue
        case = draw("up", device, torch.float32)
        case.ends = torch.tensor([0, 0, 46, 46, 46], device=device)
        assert error(case.call(engine), dense(case)) < STORED[torch.float32]


def test_no_rows_and_autocast(device: str) -> None:
    case = draw("up", device, torch.float32)
    case.x, case.gather, case.ends = case.x[:0], case.gather[:0], case.ends * 0  # type: ignore[index]
    assert case.call(None).shape == (0, 37)
    case = draw("down", device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = case.call(None)
    assert y.dtype == torch.bfloat16
    assert error(y, dense(case)) < 3 * STORED[torch.bfloat16]
    (gradient,) = torch.autograd.grad(y.float().sum(), case.weight)
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"copies": 2}, r"copies must be 1, or more with gather"),
        ({"gather": torch.arange(7)}, r"gather must be \(23,\), found \(7,\)"),
        ({"ends": torch.zeros(3)}, r"needs x \(m k\), weight \(e k n\) and ends \(e\); found"),
        ({"weight": torch.zeros(5, 20, 37, dtype=torch.float64)}, r"x is torch.float32, but weight torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], complaint: str) -> None:
    case = draw("plain", "cpu", torch.float32)
    for name, value in change.items():
        setattr(case, name, value)
    call = getattr(grouped_matmul, "__wrapped__", grouped_matmul)  # without the tests' own check of shapes
    with pytest.raises(ValueError, match=complaint):
        call(case.x, case.weight, case.ends, gather=case.gather, scatter=case.scatter, copies=case.copies)


def test_an_engine_that_is_not_right_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = chunked._GROUPED_MM
    assert right is not None
    monkeypatch.setattr(chunked, "_GROUPED_MM", lambda a, b, offs: right(a, b, offs=offs.clamp(min=1)))
    chunked._verdict.cache_clear()
    case = draw("plain", "cpu", torch.float32)
    with pytest.raises(ValueError, match="cannot run as grouped_mm: grouped_mm gives wrong results"):
        case.call("grouped_mm")
    chunked._verdict.cache_clear()


def test_torch_agrees_that_the_operators_are_well_made() -> None:
    case = draw("up", "cpu", torch.float32)
    config = list(op.DEFAULT.values())
    arguments = (case.x, case.weight, case.ends, case.gather, None, 2, "chunked", config)
    torch.library.opcheck(op._rows, arguments)
    index = torch.tensor([[0, 5, 23], [4, 0, 2]])
    torch.library.opcheck(torch.ops.seqlong.collect_rows.default, (case.x, index))


def test_rows_are_collected_and_put_back(device: str) -> None:
    x = torch.randn(7, 5, dtype=torch.float64, device=device, requires_grad=True)
    index = torch.tensor([[0, 6, 7, 7], [6, 2, 1, 7]], device=device)
    found = collect_rows(x, index)
    assert torch.equal(found, torch.cat([x, x.new_zeros(1, 5)])[index])
    y = torch.randn(2, 4, 5, dtype=torch.float64, device=device, requires_grad=True)
    placed = place_rows(y, index, 7)
    wanted = torch.zeros(8, 5, dtype=torch.float64, device=device).index_put((index,), y, accumulate=True)[:7]
    torch.testing.assert_close(placed, wanted)
    assert torch.autograd.gradcheck(collect_rows, (x, index))
    assert torch.autograd.gradcheck(place_rows, (y, index, 7))


def test_kernels_compile_for_an_h100() -> None:
    """As training launches them; see tests/aot.py."""
    pytest.importorskip("triton", reason="triton is not installed")
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import aot, torch

def case(copies):
    from seqlong.kernels.grouped_matmul import grouped_matmul
    k, n = (1024, 1536) if copies > 1 else (768, 1024)
    x = torch.zeros(512, k, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(64, k, n, dtype=torch.bfloat16, requires_grad=True)
    order = torch.arange(512 * copies)
    named = {{"gather": order, "copies": copies}} if copies > 1 else {{"scatter": order}}
    return grouped_matmul(x, weight, torch.arange(64), implementation="triton", **named)

aot.CASES = {{"up": lambda: case(8), "down": lambda: case(1)}}
sys.argv[1:] = ["--json"]
aot.main()
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout.splitlines()[-1])["kernels"]
    assert {kernel["kernel"] for kernel in kernels} == {"_rows_kernel", "_outer_kernel"} and len(kernels) >= 5
    for kernel in kernels:
        assert kernel["error"] is None and kernel["tensor_cores"], (kernel["error"], done.stderr[-3000:])
        assert kernel["spilled"] == 0 and kernel["shared"] <= 99 << 10, kernel
