"""Triton's delta_rule against the float64 loop over tokens: in the interpreter here, on a GPU there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from delta_cases import Case, agree, make

from seqlong.kernels import runtime, tuning
from seqlong.kernels.delta_rule import op
from seqlong.kernels.plans import power

# The interpreter computes what a mask then throws away: powers of the future, infinity times zero.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

#: Largest relative error (root mean square). Starts are decays of 2^-160: sums over a chunk have fewer digits for them.
#: In bfloat16 a weight of 2 reflects: roundings of products come back undiminished.
EXACT = {torch.float32: 3e-4, torch.bfloat16: 3e-2}


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


def cut(case: Case, **settings: int) -> AbstractContextManager[None]:
    """Run with these settings of the plan; ``programs_per_sm=0`` makes one segment a row."""
    q, v = case.learned["q"], case.learned["v"]
    gate = case.learned.get("gate")
    by_channel = gate is not None and gate.dim() == 4
    name = tuning.key(v.dtype, k=power(q.shape[3]), v=power(v.shape[3]), channels=by_channel)
    return tuning.using("delta_rule", {"programs_per_sm": 0, **settings}, name)


def kind_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


CASES: list[tuple[tuple[int, ...], dict[str, Any], dict[str, int]]] = [
    # rows, length, groups, heads, k, v; the rest; settings of the plan
    ((2, 1, 1, 1, 16, 24), {"kind": "none", "raw": True}, {}),
    ((1, 17, 1, 2, 24, 16), {"raw": True, "starts": "random"}, {"value_tile": 16}),
    ((1, 64, 1, 1, 16, 16), {"beta": "two", "gate": "zero", "state": False}, {}),
    ((1, 65, 1, 1, 20, 30), {"gate": "never", "reverse": True}, {"programs_per_sm": 2}),
    ((1, 130, 1, 1, 16, 40), {"gate": "slow", "beta": "negative"}, {"programs_per_sm": 9, "value_tile": 16}),
    ((1, 131, 1, 2, 16, 16), {"raw": True, "starts": "random", "reverse": True}, {"programs_per_sm": 9}),
    ((1, 66, 1, 1, 16, 16), {"gate": "forgets", "starts": "every"}, {"programs_per_sm": 9}),
    ((1, 70, 1, 1, 48, 16), {"kind": "none", "beta": "one", "dtype": torch.bfloat16}, {"programs_per_sm": 9}),
    ((1, 70, 1, 2, 32, 16), {"raw": True, "dtype": torch.bfloat16}, {}),
    ((1, 66, 2, 2, 24, 20), {"kind": "channel", "raw": True, "starts": "random", "reverse": True}, {"value_tile": 16}),
    ((1, 130, 1, 1, 16, 40), {"kind": "channel", "gate": "slow", "beta": "two"}, {"programs_per_sm": 9}),
    ((2, 17, 1, 1, 16, 16), {"kind": "channel", "gate": "never", "state": False}, {}),
    ((1, 70, 1, 1, 16, 16), {"kind": "channel", "gate": "forgets", "dtype": torch.bfloat16}, {"programs_per_sm": 9}),
    ((1, 66, 1, 2, 16, 16), {"kind": "channel", "raw": True, "starts": "random"}, {}),  # two heads of one group
    ((1, 66, 1, 1, 200, 16), {"raw": True, "starts": "random"}, {"programs_per_sm": 9}),
    ((1, 66, 1, 1, 256, 24), {"kind": "channel", "raw": True}, {"value_tile": 16}),
]


@pytest.mark.parametrize(("shape", "options", "settings"), CASES)
def test_the_definition(shape: tuple[int, ...], options: dict[str, Any], settings: dict[str, int], device: str) -> None:
    case = make(*shape, **{"dtype": kind_of(device), **options}, device=device)
    with cut(case, **settings):
        found = case.results("triton")
    agree(found, case.in_double().results("reference"), EXACT[case.learned["v"].dtype])


@pytest.mark.parametrize("kind", ["none", "channel"])
def test_keys_that_repeat_do_not_lose_digits(kind: str, device: str) -> None:
    """The same key over and over, weight 2: powers of the matrix to invert would grow to millions."""
    case = make(1, 64, 1, 1, 16, 16, kind=kind, gate="zero", beta="two", dtype=kind_of(device), device=device)
    key = case.learned["k"].detach()[:, :1].expand(1, 64, 1, 16).contiguous()
    case = case.but(k=key)
    with cut(case):
        found = case.results("triton")
    agree(found, case.in_double().results("reference"), EXACT[case.learned["v"].dtype])


def test_nothing_comes_through_a_start(device: str) -> None:
    """Not even 2^-24 of it, the least decay that eight tokens with themselves know where each channel has its own."""
    case = make(1, 40, 1, 1, 16, 16, kind="channel", dtype=kind_of(device), device=device)
    starts = torch.zeros(1, 40, dtype=torch.bool, device=device)
    starts[0, 21] = True
    values = case.learned["v"].detach().clone()
    values[:, :21] *= 2.0**40
    case = Case(case.learned, {**case.fixed, "starts": starts})
    with cut(case):
        usual, loud = case.results("triton"), case.but(v=values).results("triton")
    assert torch.equal(usual["output"][:, 21:], loud["output"][:, 21:])
    assert torch.equal(usual["final state"], loud["final state"])


def test_views_are_read_where_they_lie(device: str) -> None:
    """Parts of one projection, and what lies around them is NaN."""
    case = make(1, 66, 1, 1, 16, 16, kind="head", dtype=kind_of(device), device=device)
    plain = {name: x.detach() for name, x in case.learned.items()}
    viewed = dict(plain)
    for name in ("q", "k", "v"):
        x = plain[name]
        wide = torch.full((1, 70, x.shape[2] + 2, x.shape[3] + 8), torch.nan, dtype=x.dtype, device=device)
        wide[:, 2:68, 1:-1, 8:] = x
        viewed[name] = wide[:, 2:68, 1:-1, 8:]
    with cut(case, programs_per_sm=9):
        expected, found = case.results("triton"), case.but(**viewed).results("triton")
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_without_gradients_nothing_is_kept_and_two_runs_are_equal(device: str) -> None:
    case = make(1, 66, 1, 1, 16, 16, raw=True, dtype=kind_of(device), device=device)
    with cut(case, programs_per_sm=9):
        first, second = case.results("triton"), case.results("triton")
        with torch.no_grad():
            output, final = case.run("triton")
    for name, value in second.items():
        assert torch.equal(value, first[name]), name
    assert torch.equal(output, first["output"]) and torch.equal(final, first["final state"])


def test_wide_values_are_run_in_parts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 columns as 16, 16, 8."""
    monkeypatch.setattr(op, "WIDEST", (256, 16))
    case = make(1, 70, 1, 2, 16, 40, raw=True, starts="random", dtype=kind_of(device), device=device)
    agree(case.results("triton"), case.in_double().results("reference"), EXACT[case.learned["v"].dtype])


def test_what_triton_cannot_serve_is_said() -> None:
    if runtime.triton_runs_on("cpu") is None:
        with pytest.raises(ValueError, match="keys up to 256 wide, not 257"):
            make(1, 2, 1, 1, 257, 16, dtype=torch.float32).run("triton")
    with pytest.raises(ValueError, match="cannot run in Triton"):
        make(1, 20, 1, 1, 16, 16, dtype=torch.float64).run("triton")
