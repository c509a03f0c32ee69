"""bidirectional_decay against its definition: the sum over tokens, two loops, and chunks; Triton in its interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seqlong.kernels import runtime
from seqlong.kernels.scalar_decay import bidirectional, bidirectional_decay, chunked


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is full of NaN: an element that is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.SIZES, "cpu", (16, 48))


def by_pairs(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, starts: Tensor | None) -> Tensor:
    """The formula, a pair of tokens at a time."""
    rows, length, heads = v.shape[:3]
    output = torch.zeros_like(v)
    group = torch.arange(heads) // (heads // q.shape[2])
    segment = torch.zeros(rows, length) if starts is None else starts.cumsum(1)
    for t in range(length):
        for s in range(length):
            between = decay[:, s + 1 : t + 1] if s <= t else decay[:, t:s]
            score = (q[:, t] * k[:, s]).sum(-1)[:, group] * between.sum(1).exp()
            same = (segment[:, t] == segment[:, s]).to(v.dtype)[:, None, None]
            output[:, t] += same * score[..., None] * v[:, s]
    return output


def inputs(
    rows: int,
    length: int,
    groups: int,
    heads: int,
    k: int,
    v: int,
    gate: str = "usual",
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    q, key = (torch.randn(rows, length, groups, k, dtype=torch.float64) for _ in range(2))
    drawn = torch.rand(rows, length, heads, dtype=torch.float64)
    decay = {"usual": -drawn, "none": 0 * drawn, "strong": 0 * drawn - 100, "mixed": -(drawn**8) * 1e4}[gate]
    value = torch.randn(rows, length, heads, v, dtype=torch.float64)
    made = [q.to(dtype), (key * k**-0.5).to(dtype), value.to(dtype)]
    return [x.requires_grad_() for x in (*made, decay if dtype == torch.float64 else decay.float())]


def results(given: list[Tensor], starts: Tensor | None, implementation: str, **options: bool) -> list[Tensor]:
    """Output and gradients of a fixed sum of it."""
    output = bidirectional_decay(*given, starts=starts, implementation=implementation, **options)
    weigh = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    return [output.detach(), *torch.autograd.grad(output, given, weigh.to(output.device, output.dtype))]


def marks(rows: int, length: int) -> list[Tensor | None]:
    return [None, torch.rand(rows, length) < 0.2, torch.ones(rows, length, dtype=torch.bool)]


def test_the_definition_is_the_formula() -> None:
    given = inputs(2, 13, 1, 2, 3, 4)
    for starts in marks(2, 13):
        expected = by_pairs(*given, starts)
        found = bidirectional_decay(*given, starts=starts, implementation="reference")
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for one, other in zip(
            torch.autograd.grad(found.square().sum(), given),
            torch.autograd.grad(expected.square().sum(), given),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("gate", ["usual", "none", "strong", "mixed"])
@pytest.mark.parametrize(
    ("rows", "length", "groups", "heads", "k", "v"), [(2, 1, 1, 1, 3, 5), (1, 17, 2, 4, 8, 6), (2, 131, 1, 2, 5, 3)]
)
def test_chunks_agree_with_the_definition(
    rows: int, length: int, groups: int, heads: int, k: int, v: int, gate: str
) -> None:
    given = inputs(rows, length, groups, heads, k, v, gate)
    for starts in marks(rows, length):
        pairs = zip(results(given, starts, "chunked"), results(given, starts, "reference"), strict=True)
        for found, expected in pairs:
            tol = 1e-9 if gate == "mixed" else 1e-11
            torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def test_it_reads_the_same_from_either_end() -> None:
    q, k, v, g = inputs(1, 40, 2, 2, 4, 4)
    starts = torch.rand(1, 40) < 0.1
    there = bidirectional_decay(q, k, v, g, starts=starts)
    last = torch.cat([starts[:, 1:], torch.ones(1, 1, dtype=torch.bool)], dim=1)
    back = bidirectional_decay(*(x.flip(1) for x in (q, k, v, g)), starts=last.flip(1)).flip(1)
    torch.testing.assert_close(there, back, rtol=1e-12, atol=1e-12)


def test_a_constant_decay_and_wrong_heads() -> None:
    q, k, v, _ = inputs(1, 9, 1, 2, 3, 3)
    rate = torch.tensor([-0.1, -2.0], dtype=torch.float64)
    assert torch.equal(bidirectional_decay(q, k, v, rate), bidirectional_decay(q, k, v, rate.expand(1, 9, 2)))
    with pytest.raises(ValueError, match="3 heads, 2 groups"):
        bidirectional_decay(torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2, 2), torch.ones(1, 2, 3, 2), torch.ones(1, 2, 3))


# -- Triton, in its interpreter where there is no GPU ------------------------------------------------------------------


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    reason = runtime.triton_runs_on(request.param)
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def small_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 and as many segments as the row can have."""
    monkeypatch.setattr(bidirectional.PLANS, "settled", lambda q, v: replace(bidirectional.default(v.dtype), chunk=16))


def distances(given: list[Tensor], starts: Tensor | None, device: str, **options: bool) -> list[float]:
    """Relative errors of output and gradients against the definition."""
    exact = results([x.detach().double().requires_grad_() for x in given], starts, "reference")
    there = [x.detach().to(device).requires_grad_() for x in given]
    found = results(there, None if starts is None else starts.to(device), "triton", **options)
    return [
        ((a.cpu().double() - b.double()).norm() / b.double().norm().clamp(min=0.1)).item()
        for a, b in zip(found, exact, strict=True)
    ]


@pytest.mark.usefixtures("small_plan")
@pytest.mark.parametrize("gate", ["usual", "mixed"])
@pytest.mark.parametrize(
    ("rows", "length", "heads", "k", "v"),
    [(1, 1, 1, 16, 16), (2, 70, 2, 16, 24), (1, 100, 1, 40, 16), (1, 97, 1, 5, 3)],
)
def test_triton(rows: int, length: int, heads: int, k: int, v: int, gate: str, device: str) -> None:
    given = inputs(rows, length, heads, heads, k, v, gate, torch.float32)
    for starts in (None, torch.rand(rows, length) < 0.1):
        found = distances(given, starts, device)
        # Sums of gates of -1e4 within a chunk leave 1e-5 of float32 in the exponent.
        assert max(found[:4]) < (1e-4 if gate == "mixed" else 1e-5), found
        assert found[4] < (1e-3 if gate == "mixed" else 1e-5), found


@pytest.mark.usefixtures("small_plan")
def test_triton_where_every_token_is_alone(device: str) -> None:
    given = inputs(1, 40, 1, 1, 16, 16, dtype=torch.float32)
    starts = torch.ones(1, 40, dtype=torch.bool)
    assert max(distances(given, starts, device)) < 2e-5
    assert not results([x.detach().to(device).requires_grad_() for x in given], starts.to(device), "triton")[4].any()


@pytest.mark.usefixtures("small_plan")
def test_triton_in_bfloat16_reads_strided_inputs_and_repeats_itself(device: str) -> None:
    """Views whose neighbours are NaN; twice the same bits; the same again where states are made anew."""
    wide = [x.detach().bfloat16() for x in inputs(2, 75, 2, 2, 16, 16)[:3]]
    decay = -torch.rand(2, 2, 75).transpose(1, 2)
    given = []
    for x in wide:
        around = torch.full((2, 77, 6, 24), torch.nan, dtype=torch.bfloat16)
        around[:, 1:-1, 2:4, 4:20] = x
        given.append(around[:, 1:-1, 2:4, 4:20].to(device).requires_grad_())
    given.append(decay.to(device).requires_grad_())
    starts = (torch.rand(150, 2) < 0.05).T[:, ::2]
    exact = [x.detach().cpu().double().requires_grad_() for x in given]
    wanted = results(exact, starts, "reference")
    found = [results(given, starts.to(device), "triton", recompute=again) for again in (False, False, True)]
    for one, two, anew, truth in zip(*found, wanted, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, anew)
        assert (one.cpu().double() - truth).norm() < 6e-3 * truth.norm()


@pytest.mark.usefixtures("small_plan")
@pytest.mark.parametrize("keep", [True, False])
def test_triton_is_a_well_formed_op(keep: bool, device: str) -> None:
    given = inputs(1, 37, 1, 1, 16, 16, dtype=torch.float32)
    starts = torch.rand(1, 37) < 0.1
    torch.library.opcheck(
        torch.ops.seqlong.bidirectional_decay_triton.default,
        (*(x.detach().to(device).requires_grad_() for x in given), starts.to(device), keep),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_triton_reads_heads_that_share_queries_twice(device: str) -> None:
    given = inputs(1, 70, 1, 2, 16, 16, dtype=torch.float32)
    assert max(distances(given, torch.rand(1, 70) < 0.1, device)) < 2e-5


def test_other_types_and_devices_say_why_not() -> None:
    with pytest.raises(ValueError, match="bidirectional_decay cannot run in Triton: "):
        bidirectional_decay(*inputs(1, 5, 1, 1, 4, 4), implementation="triton")
