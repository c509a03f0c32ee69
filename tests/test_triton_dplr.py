"""Triton's dplr against the float64 loop over tokens: in the interpreter here, on a GPU there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from test_dplr import GATES, agree, draw, in_double, results

from seqlong.kernels import runtime, tuning
from seqlong.kernels.dplr import dplr
from seqlong.kernels.plans import power

# The interpreter computes what a mask then throws away: powers of the future, infinity less infinity.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
EXACT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


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


SIZES: list[tuple[tuple[int, ...], str, str, int, torch.dtype]] = [
    # rows, length, heads, k, v; gate; starts; chunk; type
    ((2, 1, 1, 16, 24), "usual", "none", 16, torch.float32),
    ((1, 2, 2, 20, 16), "rwkv7", "some", 16, torch.float32),
    ((1, 17, 1, 16, 16), "forgets", "none", 16, torch.float32),
    ((1, 35, 1, 16, 33), "mixed", "some", 16, torch.float32),
    ((1, 33, 1, 16, 16), "strong", "first", 32, torch.float32),
    ((1, 33, 1, 64, 64), "rwkv7", "none", 32, torch.float32),
    ((1, 20, 1, 16, 16), "none", "every", 16, torch.float32),
    ((1, 66, 1, 16, 16), "usual", "some", 64, torch.float32),
    ((1, 33, 1, 100, 128), "rwkv7", "some", 16, torch.float32),
    ((1, 35, 1, 64, 64), "rwkv7", "some", 32, torch.bfloat16),
    ((1, 33, 1, 16, 16), "none", "none", 32, torch.bfloat16),
]


@pytest.mark.parametrize(("sizes", "gate", "kind", "chunk", "dtype"), SIZES, ids=lambda x: str(x))
def test_it_is_its_definition(
    sizes: tuple[int, ...], gate: str, kind: str, chunk: int, dtype: torch.dtype, device: str
) -> None:
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("float32 compiles for minutes; the GPU has cases of its own")
    rows, length = sizes[:2]
    starts = {
        "none": None,
        "some": torch.rand(rows, length) < 0.08,
        "every": torch.ones(rows, length, dtype=torch.bool),
        "first": torch.arange(length).expand(rows, -1) == 0,
    }[kind]
    inputs = draw(*sizes, gate, dtype)  # type: ignore[arg-type]
    exact = results(in_double(inputs), starts=starts, implementation="reference")
    moved = {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}
    options: dict[str, Any] = {"starts": starts if starts is None else starts.to(device)}
    name = tuning.key(dtype, k=power(sizes[3]), v=power(sizes[4]))
    with tuning.using("dplr", {"chunk": chunk, "value_tile": 16}, name):
        found = results(moved, **options, implementation="triton")
    agree({n: x.cpu() for n, x in found.items()}, exact, EXACT[dtype])


def test_in_reverse_and_without_a_state(device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    inputs = {n: x for n, x in draw(1, 19, 1, 16, 16, dtype=dtype).items() if n != "initial_state"}
    exact = results(in_double(inputs), reverse=True, implementation="reference")
    moved = {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}
    found = results(moved, reverse=True, implementation="triton")
    agree({n: x.cpu() for n, x in found.items()}, exact, EXACT[dtype])


def test_views_are_read_where_they_lie_or_copied(device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    inputs = {name: x.detach().to(device) for name, x in draw(1, 17, 2, 16, 16, dtype=dtype).items()}
    expected, _ = dplr(**inputs, implementation="triton")
    wide = {n: torch.full((*x.shape[:-1], 48), torch.nan, dtype=x.dtype, device=device) for n, x in inputs.items()}
    for name, x in inputs.items():
        wide[name][..., 16:32] = x
    found, _ = dplr(**{name: x[..., 16:32] for name, x in wide.items()}, implementation="triton")
    assert torch.equal(found, expected)


def test_twice_is_the_same_bit_by_bit(device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    sizes = (1, 20, 1, 16, 16) if device == "cpu" else (2, 700, 3, 64, 64)
    inputs = {n: x.detach().to(device).requires_grad_() for n, x in draw(*sizes, dtype=dtype).items()}
    one, two = (results(inputs, implementation="triton") for _ in range(2))
    for name, x in one.items():
        assert torch.equal(x, two[name]), name


def test_what_triton_cannot_serve_is_said() -> None:
    inputs = draw(1, 5, 1, 129, 4, dtype=torch.float32)
    for spoiled, said in ((inputs, "up to 128 wide"), (in_double(inputs), "bfloat16 and float32|triton")):
        with pytest.raises(ValueError, match=f"cannot run in Triton: .*({said})"):
            dplr(**spoiled, implementation="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
def test_on_a_gpu_errors_are_those_of_bfloat16(gate: str) -> None:
    """Beside the chunked form, of the same inputs in bfloat16, which computes in float32."""
    inputs = draw(1, 1337, 4, 64, 64, gate, torch.bfloat16)
    exact = results(in_double(inputs), implementation="reference")
    moved = {name: x.detach().cuda().requires_grad_() for name, x in inputs.items()}
    found = {n: x.cpu() for n, x in results(moved, implementation="triton").items()}
    # The gradient of a log decay is a difference of products as large as q times its gradient: where it is small
    # itself, those are its measure.
    right = exact["grad of log_decay"].double()
    away = found.pop("grad of log_decay").double() - right
    terms = inputs["q"].detach().double() * exact["grad of q"].double()
    assert away.norm() < 1.5e-2 * max(terms.norm(), right.norm())
    agree(found, exact, 1.5e-2)
