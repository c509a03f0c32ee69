"""On a GPU: Triton's scalar_decay and ssd block by block beside torch in the same type; long rows, 2^31 elements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

pytest.importorskip("triton", reason="triton is not installed")

from decay_cases import OPS, Case, make, same

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is full of NaN: an element that is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


def by_blocks(x: Tensor) -> Tensor:
    """Norms of blocks of 64 tokens (the last has up to 127) and heads of x (b t h ...); of x without tokens its own."""
    if x.dim() < 3:
        return x.double().norm()[None]
    squares = x.double().square().flatten(3).sum(3) if x.dim() == 4 else x.double().square()
    block = (torch.arange(x.shape[1], device=x.device) // 64).clamp(max=max(1, x.shape[1] // 64) - 1)
    sums = squares.new_zeros(x.shape[0], int(block[-1]) + 1, x.shape[2])
    return sums.index_add_(1, block, squares).sqrt()


#: Gradients that are small differences of long sums, Σ (q·dq - k·dk): a block in which they cancel has the rounding of
#: products and of the state kept in bfloat16 that the sums have. Over the whole tensor they are as exact as the others.
GATES = ("grad of log_decay", "grad of dt")


def no_worse(case: Case) -> dict[str, Tensor]:
    """At most twice the error of torch in the same type, and a floor, see ``hold``."""
    found, chunked, exact = case.results(), case.results("chunked"), case.in_double().results("chunked")
    # The gradient of a is Σ step · grad of decay, which is itself only known to a floor.
    steps = case.op == "ssd" and softplus(case.learned["dt"].detach().float() + case.learned["dt_bias"].detach())
    hold(found, chunked, exact, 0.1 * steps.double().norm() if isinstance(steps, Tensor) else None)
    return found


def hold(
    found: dict[str, Tensor], chunked: dict[str, Tensor], exact: dict[str, Tensor], rate_floor: Tensor | None = None
) -> None:
    """In every block of 64 tokens and every head, at most twice the error of torch in the same type, and a floor: that
    of rounding the block itself, and of rounding what a block of this tensor usually holds, 0.1 a number at least."""
    for name, value in found.items():
        assert value.isfinite().all(), f"{name} is not finite"
        # A state (b h k v) is a block a head.
        norms = (lambda x: x.double().flatten(2).norm(dim=2)) if "state" in name else by_blocks
        size = norms(exact[name])
        few = value.dim() == 1  # one number a head, of which plain torch may by chance have the last digit right
        usual = size.square().mean().sqrt().clamp(min=0.8)
        if name == "grad of a" and rate_floor is not None:
            usual = torch.maximum(usual, rate_floor)
        floor = (1e-2 if few else 6e-3 if name in GATES else 2e-3) * (size + usual)
        worst = (norms(value - exact[name]) / (2 * norms(chunked[name] - exact[name]) + floor)).max().item()
        assert worst <= 1, f"{name}: {worst:.2f} of what is allowed"


SHAPES = [
    ("scalar_decay", 2, 1000, 4, 4, 64, 64), ("scalar_decay", 1, 4133, 2, 2, 128, 128),
    ("scalar_decay", 1, 1000, 1, 4, 64, 64), ("scalar_decay", 1, 333, 2, 4, 100, 60),
    ("scalar_decay", 2, 257, 2, 2, 16, 24), ("scalar_decay", 1, 257, 1, 2, 24, 192),
    ("scalar_decay", 1, 333, 2, 2, 256, 256), ("ssd", 2, 1000, 1, 8, 128, 64), ("ssd", 1, 333, 2, 4, 60, 100),
    ("ssd", 1, 333, 1, 2, 256, 256), ("ssd", 2, 65, 1, 4, 16, 16),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_gpu_errors_are_those_of_torch_in_the_same_type(shape: tuple[Any, ...]) -> None:
    """Extreme gates, starts, states; no bit differs when it is done again."""
    variants: list[dict[str, Any]] = [
        {"gate": "slow"},
        {"gate": "usual", "starts": "random"},
        {"gate": "mixed" if shape[0] == "scalar_decay" else "usual", "starts": "consecutive"},
        {"gate": "strong", "starts": "first"},
        {"gate": "none", "state": False},
    ]
    if shape[0] == "scalar_decay":
        variants.append({"gate": "slow", "starts": "random", "reverse": True})
    for options in variants:
        case = make(*shape, dtype=torch.bfloat16, device="cuda", **options)
        found = no_worse(case)
        same(case.results(), found)


@pytest.mark.parametrize("programs", [0, 1, 4, 64])
def test_gpu_segments_are_nobodys_business(programs: int) -> None:
    for shape in (SHAPES[0], SHAPES[2], SHAPES[7]):
        case = make(*shape, gate="slow", starts="random", dtype=torch.bfloat16, device="cuda")
        with case.cut(programs_per_sm=programs):
            no_worse(case)


def long(op: str, rows: int, length: int, groups: int, heads: int, k: int, v: int) -> Case:
    """Inputs drawn on the GPU, whose decays forget a token within a thousand others."""
    on = {"device": "cuda", "dtype": torch.bfloat16}
    q, key = (torch.randn(rows, length, groups, k, **on) * scale for scale in (1, k**-0.5))
    value, drawn = torch.randn(rows, length, heads, v, **on), torch.rand(rows, length, heads, device="cuda")
    marks = torch.rand(rows, length, device="cuda") < 1e-3
    if op == "scalar_decay":
        learned = {"q": q, "k": key, "v": value, "log_decay": -0.05 - 0.1 * drawn}
    else:
        rate = -1 - torch.rand(heads, device="cuda")
        ones = torch.ones(heads, device="cuda")
        learned = {"x": value, "dt": 0.5 * drawn - 3, "a": rate, "b": key, "c": q, "d": ones, "dt_bias": ones / 8}
    return Case(op, {name: x.requires_grad_() for name, x in learned.items()}, {"starts": marks})


def windows_agree(case: Case, found: dict[str, Tensor], weigh: Tensor, places: list[tuple[int, int]]) -> None:
    """Around (row, token), the middle of a window that reaches 1,024 tokens to either side, again in float64."""
    length = weigh.shape[1]
    for row, at in places:
        a, z = max(0, at - 1536), min(length, at + 1536)
        inner = slice(0 if a == 0 else 1024, z - a if z == length else z - a - 1024)
        results = []
        for dtype in (torch.float64, torch.bfloat16):
            learned = {}
            for name, x in case.learned.items():
                part = x.detach()[row : row + 1, a:z] if x.dim() > 1 else x.detach()
                kept = dtype if dtype == torch.float64 or x.dtype == torch.bfloat16 else torch.float32
                learned[name] = part.to(kept).requires_grad_()
            starts = case.fixed["starts"][row : row + 1, a:z]
            output, _ = OPS[case.op](**learned, starts=starts, implementation="chunked")
            grads = torch.autograd.grad(output, list(learned.values()), weigh[row : row + 1, a:z].to(output.dtype))
            named = zip((f"grad of {name}" for name in learned), grads, strict=True)
            results.append({"output": output.detach(), **{n: g for n, g in named if g.dim() > 1}})
        exact, torchs = ({n: x[:, inner] for n, x in result.items()} for result in results)
        mine = {n: found[n][row : row + 1, a:z][:, inner] for n in exact if n in found}
        hold(mine, torchs, exact)


def check_long(case: Case, places: list[tuple[int, int]], recompute: bool = False) -> None:
    like = case.learned["v" if case.op == "scalar_decay" else "x"]
    weigh = torch.randn_like(like)
    output, _ = case.run("triton", recompute=recompute)
    grads = torch.autograd.grad(output, list(case.learned.values()), weigh)
    named = zip((f"grad of {name}" for name in case.learned), grads, strict=True)
    windows_agree(case, {"output": output.detach(), **dict(named)}, weigh, places)


@pytest.fixture
def plain_memory() -> Iterator[None]:
    """Filling tens of GiB with NaN is not what is measured here."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("plain_memory")
@pytest.mark.parametrize("length", [131072, 1048576])
@pytest.mark.parametrize("recompute", [False, True])
def test_gpu_long_rows(length: int, recompute: bool) -> None:
    places = [(0, at) for at in (0, length // 3 + 17, length // 2, length - 1)]
    check_long(long("scalar_decay", 1, length, 4, 4, 64, 64), places, recompute)
    check_long(long("ssd", 1, length, 1, 8, 128, 64), places, recompute)


@pytest.mark.slow
@pytest.mark.usefixtures("plain_memory")
@pytest.mark.parametrize(("rows", "length"), [(1, (1 << 20) + 77), (3, 349_621)])
def test_gpu_past_two_to_the_31_elements(rows: int, length: int) -> None:
    """x and what is kept have more than 2^31 elements; the last tokens lie beyond. About 45 GiB."""
    case = long("ssd", rows, length, 1, 32, 128, 64)
    assert case.learned["x"].numel() > 1 << 31
    check_long(case, [(rows - 1, length - 1), (rows - 1, length - 3000), (0, 0), (rows // 2, length // 2)])
