"""Triton's vector_decay against the float64 loop over tokens: in the interpreter here, on a GPU there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from test_vector_decay import Case, agree, make

from seqlong.kernels import runtime, tuning
from seqlong.kernels.plans import parts, power
from seqlong.kernels.vector_decay import composed, vector_decay

# The interpreter computes what a mask then throws away: powers of the future, infinity times zero.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.skipif(not runtime.INTERPRETED, reason="on a GPU see test_gpu_linear.py"),
]

#: Largest relative error. A decay below 2^-24 is 2^-24, which float32 sees.
EXACT = {torch.float32: 1e-4, torch.bfloat16: 1.2e-2}
B16 = {"dtype": torch.bfloat16}


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
    bound = "lower_bound" in case.learned
    name = tuning.key(v.dtype, k=power(q.shape[3]), v=power(v.shape[3]), lower_bound=bound)
    return tuning.using("vector_decay", settings, name)


CASES: list[tuple[tuple[int, int, int, int, int], dict[str, Any], dict[str, int]]] = [
    # rows, length, heads, k, v; the rest; settings of the plan
    ((2, 1, 1, 16, 24), {}, {}),
    ((1, 2, 2, 24, 16), {"starts": 1.0}, {}),
    ((2, 17, 1, 20, 13), {"starts": 0.2, "reverse": True}, {}),
    ((1, 40, 2, 16, 16), {"gate": "slow", "starts": 0.1}, {"programs_per_sm": 4}),
    ((1, 90, 1, 16, 16), {"gate": "slow"}, {"programs_per_sm": 1}),  # several chunks in each of several segments
    ((1, 40, 1, 16, 32), {"gate": "slow", "reverse": True}, {"programs_per_sm": 9, "value_tile": 16}),
    ((1, 33, 1, 64, 16), {"form": "logsigmoid"}, {"programs_per_sm": 4, "key_slice": 16, "run": 1}),
    ((1, 65, 1, 32, 16), {"form": "lower_bound", "starts": 0.1}, {"chunk": 32, "key_slice": 16, "run": 2}),
    ((1, 35, 1, 128, 16), {"form": "lower_bound", "reverse": True}, {"programs_per_sm": 3, "key_slice": 32}),
    ((1, 33, 1, 16, 128), {"form": "logsigmoid", "starts": 0.1}, {"programs_per_sm": 2, "value_tile": 64}),
    ((1, 70, 1, 16, 16), {"gate": "forgets"}, {"chunk": 64, "programs_per_sm": 2}),
    ((1, 70, 1, 16, 16), {"gate": "never", "starts": 0.1, "reverse": True}, {"chunk": 64, "programs_per_sm": 0}),
    ((1, 70, 1, 16, 16), {"gate": "mixed"}, {"chunk": 32, "programs_per_sm": 3}),
    ((1, 70, 1, 16, 16), {"gate": "none"}, {"chunk": 64, "programs_per_sm": 2}),
    ((1, 130, 1, 64, 64), {"gate": "usual", **B16}, {"chunk": 64, "programs_per_sm": 2}),
    ((1, 66, 1, 32, 64), {"form": "logsigmoid", "starts": 0.05, **B16}, {"chunk": 32, "programs_per_sm": 2}),
    ((1, 66, 1, 64, 32), {"form": "lower_bound", **B16}, {"chunk": 32, "programs_per_sm": 2, "key_slice": 32}),
]


@pytest.mark.parametrize(("sizes", "options", "settings"), CASES, ids=lambda x: "-".join(map(str, x)) or "default")
def test_it_is_its_definition(
    sizes: tuple[int, int, int, int, int], options: dict[str, Any], settings: dict[str, int]
) -> None:
    case = make(*sizes, **{"dtype": torch.float32, **options})
    with cut(case, **{"chunk": 16, **settings}):
        found = case.results("triton")
    agree(found, case.to(torch.float64).results("reference"), EXACT[options.get("dtype", torch.float32)])
    if "starts" in case.fixed and "k" in case.learned:  # else the gate makes keys too
        assert not found["grad of gate"][case.fixed["starts"]].any(), "a decay that is not applied has no gradient"
    for name, x in case.learned.items():
        assert found[f"grad of {name}"].dtype == x.dtype


def test_the_gates_gradient_keeps_its_digits() -> None:
    """Pairs of tokens inside a chunk cancel only if both sides have the same rounded factors: 1.3e-2 if not."""
    case = make(1, 130, 1, 32, 32, **B16)
    with cut(case, chunk=64, programs_per_sm=0):
        found = case.results("triton")
    exact = case.to(torch.float64).results("reference")
    agree({"grad of gate": found["grad of gate"]}, exact, 5e-3)


def test_every_cut_gives_the_same() -> None:
    case = make(1, 70, 1, 32, 32, gate="slow", starts=0.05, dtype=torch.float32)
    with cut(case, chunk=64, programs_per_sm=0, key_slice=32):
        expected = case.results("triton")
    small = {"chunk": 32, "key_slice": 16, "value_tile": 16, "run": 1}
    for settings in ({"chunk": 16, "programs_per_sm": 1 << 20}, small):
        with cut(case, **settings):
            agree(case.results("triton"), expected, 1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("given", [False, True])
def test_a_bonus_reads_before_the_token_is_written(length: int, reverse: bool, given: bool) -> None:
    case = make(2, length, 2, 16, 8, bonus=True, starts=0.2, reverse=reverse, dtype=torch.float32)
    case.fixed["starts"][0, 0] = case.fixed["starts"][0, -1] = False
    case.fixed["starts"][1, 0] = case.fixed["starts"][1, -1] = True
    if not given:
        del case.learned["initial_state"]
    with cut(case, chunk=16, programs_per_sm=4):
        found = case.results("triton")
    agree(found, case.to(torch.float64).results("reference"), EXACT[torch.float32])


@pytest.mark.parametrize("form", ["log_decay", "lower_bound"])
def test_wide_heads_are_sums_and_rows_of_narrow_ones(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 by 24 as parts of 16, 16, 8 by 16, 8."""
    monkeypatch.setattr(composed, "WIDEST", 16)
    case = make(1, 20, 2, 40, 24, form=form, bonus=form == "log_decay", starts=0.1, dtype=torch.float32)
    with cut(make(1, 1, 1, 16, 16, form=form, dtype=torch.float32), chunk=16):
        found = case.results("triton")
    agree(found, case.to(torch.float64).results("reference"), EXACT[torch.float32])


def test_parts_of_a_width_are_even_and_whole() -> None:
    for width in range(1, 700):
        found = parts(width, 128)
        assert [i for part in found for i in range(part.start, part.stop)] == list(range(width))
        assert max(part.stop - part.start for part in found) <= 128
        assert all(part.start % 16 == 0 for part in found)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_past_knows_nothing_of_the_future(reverse: bool) -> None:
    """Bit by bit from block to block of 8 tokens; inside one, later gates reach the rounding of what stands before."""
    case = make(1, 50, 1, 16, 16, reverse=reverse, dtype=torch.float32)
    at = 18 if reverse else 24
    future, past = (slice(0, 50 - at), slice(50 - at, 50)) if reverse else (slice(at, 50), slice(0, at))
    changed = {name: case.learned[name].detach().clone() for name in ("q", "k", "v", "gate")}
    for x in changed.values():
        x[:, future] = x[:, future].abs() * -3 - 1
    with cut(case, chunk=16, programs_per_sm=4), torch.no_grad():
        before, after = case.run("triton")[0], case.but(**changed).run("triton")[0]
    assert torch.equal(before[:, past], after[:, past])
    assert not torch.equal(before[:, future], after[:, future])


def test_a_start_lets_nothing_through() -> None:
    """Not even what no decay is small enough for."""
    case = make(1, 40, 1, 16, 16, dtype=torch.float32)
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[0, 21] = True
    huge = {name: case.learned[name].detach().clone() for name in ("k", "v", "initial_state")}
    for name, x in huge.items():
        x[:, : 40 if name == "initial_state" else 21] *= 1e12
    with cut(case, chunk=16, programs_per_sm=4), torch.no_grad():
        expected, found = (one.run("triton", starts=starts) for one in (case, case.but(**huge)))
    assert torch.equal(expected[0][:, 21:], found[0][:, 21:]) and torch.equal(expected[1], found[1])


def test_without_what_is_not_asked_for() -> None:
    """No initial state, gradient of one result, none of the gate; no gradient at all."""
    case = make(1, 20, 1, 16, 16, dtype=torch.float32)
    bare = Case({name: x for name, x in case.learned.items() if name != "initial_state"}, case.fixed)
    with cut(case, chunk=16):
        agree(bare.results("triton"), bare.to(torch.float64).results("reference"), 1e-4)
        for pick in (0, 1):
            (found,) = torch.autograd.grad(case.run("triton")[pick].sum(), [case.learned["v"]])
            (exact,) = torch.autograd.grad(case.run("reference")[pick].sum(), [case.learned["v"]])
            agree({"v": found}, {"v": exact}, 1e-4)
        with torch.no_grad():
            agree({"o": case.run("triton")[0]}, {"o": case.run("reference")[0]}, 1e-4)


def test_the_op_keeps_its_promises() -> None:
    from seqlong.kernels.vector_decay.triton import vector_decay_triton

    case = make(1, 20, 1, 16, 16, form="lower_bound", starts=0.1, dtype=torch.float32)
    given = case.learned
    inputs = (given["q"], None, given["v"], given["gate"], "lower_bound", 1.0, given["lower_bound"])
    with cut(case, chunk=16):
        torch.library.opcheck(
            vector_decay_triton,
            (*inputs, case.fixed["starts"], given["initial_state"], False, True),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [({"dtype": torch.float64}, "bfloat16 and float32"), ({"length": 0}, "empty")],
)
def test_what_it_cannot_serve_is_said(options: dict[str, Any], said: str) -> None:
    case = make(1, options.pop("length", 3), 1, 16, 16, **{"dtype": torch.float32, **options})
    with pytest.raises(ValueError, match=said):
        case.run("triton")
    assert vector_decay.__module__ == "seqlong.kernels.vector_decay.op"
    torch.testing.assert_close(case.run("chunked"), case.run("reference"), rtol=1e-4, atol=1e-4)
