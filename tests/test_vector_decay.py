"""vector_decay in torch against the float64 loop over tokens: outputs, gradients, states, extremes, lengths, cuts."""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seqlong.kernels.vector_decay import chunked, vector_decay, vector_decay_step

GATES = {
    "usual": lambda drawn: -drawn.abs(),
    "slow": lambda drawn: -0.01 * drawn.abs(),
    "none": lambda drawn: 0 * drawn,
    "strong": lambda drawn: 0 * drawn - 100,
    "never": lambda drawn: 0 * drawn - 1e4,
    "forgets": lambda drawn: torch.where(drawn > 0.8, -torch.inf, -0.1),
    "mixed": lambda drawn: -1e4 * torch.rand_like(drawn) ** 8,
}
FORMS = ("log_decay", "logsigmoid", "lower_bound")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is full of NaN: an element that is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and blocks small enough that short rows cross many of them."""
    monkeypatch.setitem(chunked.SIZES, "cpu", (16, 48))


@dataclass
class Case:
    """Inputs: what is learned, and what is not."""

    learned: dict[str, Tensor]
    fixed: dict[str, Any]

    def run(self, implementation: str, **options: Any) -> tuple[Tensor, Tensor]:
        return vector_decay(**{"k": None, **self.learned, **self.fixed, **options}, implementation=implementation)

    def results(self, implementation: str = "chunked", **options: Any) -> dict[str, Tensor]:
        """Output, final state, and gradients of a sum of both with fixed weights."""
        output, final = self.run(implementation, **options)
        source = torch.Generator().manual_seed(5)
        weigh = [torch.randn(x.shape, generator=source).to(x.dtype) for x in (output, final)]
        grads = torch.autograd.grad([output, final], list(self.learned.values()), weigh)
        named = zip((f"grad of {name}" for name in self.learned), grads, strict=True)
        return {"output": output.detach(), "final state": final.detach(), **dict(named)}

    def to(self, dtype: torch.dtype) -> Case:
        learned = {name: x.detach().to(dtype).requires_grad_() for name, x in self.learned.items()}
        return Case(learned, self.fixed)

    def but(self, **changed: Tensor) -> Case:
        return replace(self, learned={**self.learned, **{name: x.requires_grad_() for name, x in changed.items()}})


def make(rows: int, length: int, heads: int, width: int, value_width: int, *, gate: str = "usual",
         form: str = "log_decay", bonus: bool = False, starts: float = 0.0, reverse: bool = False,
         dtype: torch.dtype = torch.float64) -> Case:  # fmt: skip
    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    gates = GATES[gate](drawn(rows, length, heads, width)) if form == "log_decay" else drawn(rows, length, heads, width)
    learned = {
        "q": drawn(rows, length, heads, width),
        "k": drawn(rows, length, heads, width) * width**-0.5,
        "v": drawn(rows, length, heads, value_width),
        "gate": gates,
        "initial_state": drawn(rows, heads, width, value_width),
    }
    fixed: dict[str, Any] = {"activation": form, "reverse": reverse}
    if form == "logsigmoid":
        fixed["divisor"] = 16.0
    if form == "lower_bound":
        del learned["k"]
        learned["lower_bound"] = torch.rand(heads, width, dtype=torch.float64)
    if bonus:
        learned["bonus"] = drawn(heads, width)
    if starts:
        fixed["starts"] = torch.rand(rows, length) < starts
    return Case({name: x.to(dtype).requires_grad_() for name, x in learned.items()}, fixed)


def error(found: Tensor, exact: Tensor) -> float:
    """Relative to the exact values, or 0.1: gradients of gates are near zero where nothing is remembered."""
    scale = exact.double().norm().clamp(min=0.1 * exact.numel() ** 0.5)
    return ((found.double() - exact.double()).norm() / scale).item()


def agree(found: dict[str, Tensor], exact: dict[str, Tensor], limit: float) -> None:
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        assert value.isfinite().all(), f"{name} is not finite"
        assert error(value, exact[name]) < limit, f"{name}: {error(value, exact[name]):.1e}"


# -- The definition ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("starts", [0.0, 0.15, 1.0])
@pytest.mark.parametrize(
    ("gate", "sizes"),
    [("usual", (2, 1, 1, 3, 5)), ("slow", (1, 15, 4, 8, 6)), ("none", (2, 16, 3, 4, 4)), ("strong", (1, 17, 3, 5, 16)),
     ("never", (1, 49, 2, 5, 3)), ("forgets", (2, 131, 2, 7, 3)), ("mixed", (1, 97, 1, 1, 1))],
)  # fmt: skip
def test_it_is_its_definition(
    gate: str, sizes: tuple[int, int, int, int, int], starts: float, bonus: bool, reverse: bool
) -> None:
    case = make(*sizes, gate=gate, bonus=bonus, starts=starts, reverse=reverse)
    agree(case.results(), case.results("reference"), 1e-12)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("form", FORMS[1:])
def test_gates_are_activated_inside(form: str, bonus: bool) -> None:
    case = make(2, 67, 2, 5, 4, form=form, bonus=bonus, starts=0.1, reverse=bonus)
    agree(case.results(), case.results("reference"), 1e-12)


def test_activations_are_the_papers() -> None:
    """Written out once more, from the formulas of GLA and HGRN2."""
    case = make(1, 20, 2, 4, 3, form="logsigmoid")
    gates = torch.nn.functional.logsigmoid(case.learned["gate"].detach()) / 16
    plain = case.but(gate=gates)
    expected = plain.run("reference", activation="log_decay", divisor=1.0)
    torch.testing.assert_close(case.run("chunked")[0], expected[0])
    case = make(1, 20, 2, 4, 3, form="lower_bound")
    bound = case.learned["lower_bound"].detach()
    forget = bound + (1 - bound) * case.learned["gate"].detach().sigmoid()
    learned = {name: x for name, x in case.learned.items() if name != "lower_bound"}
    plain = Case({**learned, "k": 1 - forget, "gate": forget.log()}, {})
    torch.testing.assert_close(case.run("chunked")[0], plain.run("reference")[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [-1e4, -torch.inf, 0.0, 1e4, torch.inf])
def test_extreme_gates(form: str, value: float) -> None:
    """Beside usual ones, in float32."""
    if form == "log_decay" and value > 0:
        pytest.skip("a log-decay is not positive")
    case = make(1, 70, 1, 4, 3, form=form, dtype=torch.float32)
    gate = case.learned["gate"].detach().clone()
    gate[:, 20:26] = value
    gate[:, 40:, :, :2] = value
    case = case.but(gate=gate)
    found, exact = case.results(), case.to(torch.float64).results("reference")
    agree({name: x for name, x in found.items() if name != "grad of gate"}, exact, 1e-5)
    changed = (gate == value) & ~torch.tensor(value).isfinite()
    # An infinite gate has no gradient to speak of: the definition says 0 or not a number.
    gates = ({"gate": x["grad of gate"].masked_fill(changed, 0)} for x in (found, exact))
    agree(*gates, 1e-5)
    assert found["grad of gate"].isfinite().all()


@pytest.mark.parametrize("value", [-1e4, -torch.inf])
def test_without_a_lower_bound_a_shut_gate_forgets_all(value: float) -> None:
    """HGRN2's first layer. The bound's own gradient has no digits there, but is finite."""
    case = make(1, 40, 1, 4, 3, form="lower_bound", dtype=torch.float32)
    gate = case.learned["gate"].detach().clone()
    gate[:, 7::5] = value
    case = case.but(gate=gate, lower_bound=torch.zeros(1, 4))
    found, exact = case.results(), case.to(torch.float64).results("reference")
    agree({name: x for name, x in found.items() if name.split()[-1] in ("output", "q", "v", "state")}, exact, 1e-5)
    assert all(x.isfinite().all() for x in found.values())


def test_a_key_survives_a_gate_that_is_nearly_open() -> None:
    """1 - f in float32 would be zero."""
    case = make(1, 1, 1, 2, 2, form="lower_bound", dtype=torch.float32)
    case = case.but(gate=torch.full((1, 1, 1, 2), 30.0), lower_bound=torch.zeros(1, 2))
    with torch.no_grad():
        final = case.run("chunked", initial_state=None)[1]
    expected = torch.exp(torch.tensor(-30.0)) * case.learned["v"][0, 0]
    torch.testing.assert_close(final[0, 0], expected.expand(2, 2).detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
def test_lower_precision(dtype: torch.dtype, limit: float, form: str) -> None:
    """Types of outputs and gradients are those of the inputs; the state is in float32."""
    case = make(2, 203, 2, 20, 12, gate="slow", form=form, bonus=form == "log_decay", starts=0.02, dtype=dtype)
    found = case.results()
    assert found["output"].dtype == dtype and found["final state"].dtype == torch.float32
    assert all(found[f"grad of {name}"].dtype == x.dtype for name, x in case.learned.items())
    agree(found, case.to(torch.float64).results("reference"), limit)


def test_the_decays_gradient_keeps_its_digits() -> None:
    """Slow decay over a long row: sums over the whole row, or of rounded gradients, would lose them (2e-3 and more)."""
    case = make(1, 4000, 1, 8, 8, gate="slow", dtype=torch.float32)
    found, exact = case.results(), case.to(torch.float64).results()
    assert error(found["grad of gate"], exact["grad of gate"]) < 2e-5


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    case = make(1, 9, 1, 3, 2, form=form, bonus=True, starts=0.2)
    names = list(case.learned)

    def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return Case(dict(zip(names, inputs, strict=True)), case.fixed).run("chunked")

    assert torch.autograd.gradcheck(call, tuple(case.learned.values()))


def test_what_is_not_asked_for() -> None:
    """Of one result only, of some inputs only, and without an initial state."""
    case = make(1, 21, 2, 4, 3)
    exact = make(1, 21, 2, 4, 3).but(**{name: x.detach().clone() for name, x in case.learned.items()})
    for pick in (0, 1):
        found = torch.autograd.grad(case.run("chunked")[pick].sum(), [case.learned[n] for n in ("k", "gate")])
        expected = torch.autograd.grad(exact.run("reference")[pick].sum(), [exact.learned[n] for n in ("k", "gate")])
        agree(dict(zip("kg", found, strict=True)), dict(zip("kg", expected, strict=True)), 1e-12)
    bare = Case({name: x for name, x in case.learned.items() if name != "initial_state"}, case.fixed)
    agree(bare.results(), bare.results("reference"), 1e-12)


# -- What must hold whatever the numbers ------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("at", [1, 16, 47, 48, 60])
def test_a_row_split_anywhere_is_the_row(at: int, bonus: bool) -> None:
    case = make(2, 61, 2, 5, 3, gate="slow", bonus=bonus, starts=0.05)
    whole = case.run("chunked")
    state, outputs = case.learned["initial_state"], []
    for a, z in ((0, at), (at, 61)):
        piece = case.but(**{name: case.learned[name][:, a:z].detach() for name in ("q", "k", "v", "gate")})
        output, state = piece.run("chunked", starts=case.fixed["starts"][:, a:z], initial_state=state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole[0])
    torch.testing.assert_close(state, whole[1])


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("bonus", [False, True])
def test_packed_rows_are_their_segments(bonus: bool) -> None:
    case = make(1, 57, 2, 4, 3, gate="slow", bonus=bonus)
    bounds = [0, 5, 6, 7, 40, 57]
    starts = torch.zeros(1, 57, dtype=torch.bool)
    starts[0, bounds[:-1]] = True
    found = case.results(starts=starts)
    assert not found["grad of gate"][starts].any(), "a decay that is not applied has no gradient"
    assert not found["grad of initial_state"].any()
    pieces = []
    for a, z in itertools.pairwise(bounds):
        piece = case.but(**{name: case.learned[name][:, a:z].detach() for name in ("q", "k", "v", "gate")})
        pieces.append(piece.run("chunked", initial_state=None))
    torch.testing.assert_close(found["output"], torch.cat([output for output, _ in pieces], dim=1).detach())
    torch.testing.assert_close(found["final state"], pieces[-1][1].detach())


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bonus", [False, True])
def test_the_past_knows_nothing_of_the_future(reverse: bool, bonus: bool) -> None:
    """Nor does a start let anything through: what stands before it may be not a number in other chunks."""
    case = make(1, 70, 2, 4, 3, bonus=bonus, reverse=reverse)
    for at in (16, 37):
        future, past = slice(at, 70), slice(0, at)
        if reverse:
            future, past = slice(0, 70 - at), slice(70 - at, 70)
        changed = {name: case.learned[name].detach().clone() for name in ("q", "k", "v", "gate")}
        for x in changed.values():
            x[:, future] = x[:, future].abs() * -1e3 - 1
        with torch.no_grad():
            before, after = case.run("chunked")[0], case.but(**changed).run("chunked")[0]
            assert torch.equal(before[:, past], after[:, past])
            assert not torch.equal(before[:, future], after[:, future])
        nothing = {name: case.learned[name].detach().clone() for name in ("q", "k", "v", "gate")}
        beyond = slice(0, 70 - 48) if reverse else slice(48, 70)
        for x in nothing.values():
            x[:, beyond] = torch.nan
        with torch.no_grad():
            after = case.but(**nothing).run("chunked")[0]
        kept = slice(70 - 48, 70) if reverse else slice(0, 48)
        assert torch.equal(before[:, kept], after[:, kept])


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 31, 63, 64, 65, 127, 128, 257, 511, 513, 1000])
def test_every_length_and_cut_gives_the_same(length: int) -> None:
    case = make(1, length, 1, 3, 2, gate="slow", starts=0.01)
    found = case.results()
    agree(found, case.results("reference"), 1e-12)
    chunk = 32
    other = chunked.vector_decay_chunked(
        *(case.learned[name] for name in "qkv"), case.learned["gate"], "log_decay", 1.0, None, None,
        case.fixed["starts"], case.learned["initial_state"], False, chunk, 96,
    )  # fmt: skip
    torch.testing.assert_close(other[0].detach(), found["output"])


@pytest.mark.parametrize("sizes", [(2, 0, 1, 3, 2), (0, 5, 1, 3, 2), (1, 5, 2, 3, 0)])
def test_empty_inputs(sizes: tuple[int, int, int, int, int]) -> None:
    case = make(*sizes)
    output, final = case.run("chunked")
    assert output.shape == case.learned["v"].shape
    torch.testing.assert_close(final, case.run("reference")[1])


def test_views_are_read_where_they_lie() -> None:
    case = make(2, 37, 2, 4, 3)
    views = {}
    for name in ("q", "k", "v", "gate"):
        x = case.learned[name].detach()
        wide = torch.full((2, x.shape[3] + 2, x.shape[2] + 1, 40), torch.nan, dtype=x.dtype)
        views[name] = wide.permute(0, 3, 2, 1)[:, 2:39, 1:, 1:-1]
        views[name].copy_(x)
    agree(case.but(**views).results(), case.results(), 1e-14)


def test_autocast_does_not_reach_inside() -> None:
    case = make(1, 40, 1, 8, 8, dtype=torch.float32)
    expected = case.results()
    with torch.autocast("cpu", torch.bfloat16):
        found = case.results()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


# -- A step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_steps_are_the_row(tokens: int, bonus: bool, form: str, dtype: torch.dtype) -> None:
    case = make(2, 9, 2, 5, 4, form=form, bonus=bonus, starts=0.2, dtype=dtype)
    inputs = {name: x.detach() for name, x in case.learned.items()}
    along = {name: inputs.pop(name) for name in ("q", "k", "v", "gate") if name in inputs}
    state = inputs.pop("initial_state")
    settings = {name: case.fixed[name] for name in ("activation", "divisor") if name in case.fixed}
    expected = case.to(torch.float64).run("reference")
    outputs = []
    for a in range(0, 9, tokens):
        part = {"k": None, **{name: x[:, a : a + tokens] for name, x in along.items()}}
        given = {**part, **settings, **inputs, "starts": case.fixed["starts"][:, a : a + tokens], "state": state}
        output, after = vector_decay_step(**given)
        exact = vector_decay_step(**given, implementation="reference")
        assert error(output, exact[0]) < (1e-12 if dtype == torch.float64 else 1e-2)
        assert output.dtype == dtype and after.data_ptr() != state.data_ptr()
        state = after
        outputs.append(output)
    limit = 1e-12 if dtype == torch.float64 else 1e-2
    assert error(torch.cat(outputs, dim=1), expected[0].detach()) < limit
    assert error(state, expected[1].detach()) < limit


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 4])
def test_padding_in_a_step_keeps_the_state(tokens: int, form: str) -> None:
    case = make(2, tokens, 2, 5, 4, form=form, dtype=torch.float32)
    inputs = {name: x.detach().clone() for name, x in case.learned.items()}
    state = inputs.pop("initial_state")
    settings = {name: case.fixed[name] for name in ("activation", "divisor") if name in case.fixed}
    padding = torch.zeros(2, tokens, dtype=torch.bool)
    padding[1] = True
    for name in ("k", "v", "gate"):
        if name in inputs:
            inputs[name][1] = torch.nan
    _, after = vector_decay_step(**{"k": None, **inputs}, **settings, state=state, padding=padding, starts=padding)
    assert torch.equal(after[1], state[1]) and not torch.equal(after[0], state[0])


# -- Cost -------------------------------------------------------------------------------------------------------------


def long_row() -> None:
    """Prints seconds a token at two lengths, and what the longer one added to the memory of the process, in MiB."""

    def cost(length: int) -> float:
        inputs = [torch.randn(1, length, 1, 8).requires_grad_() for _ in range(4)]
        begin = time.process_time()
        output, final = vector_decay(*inputs, activation="logsigmoid", divisor=16.0)
        (output.sum() + final.sum()).backward()
        spent = time.process_time() - begin
        assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)
        return spent / length

    torch.set_num_threads(1)
    cost(8192)
    short = min(cost(8192) for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    long = cost(131072)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([short, long, (after - before) / 1024]))


def test_a_long_row_is_linear_in_time_and_memory() -> None:
    """131,072 tokens, forward and backward: the same time a token as 8,192, and little memory beside the gradients."""
    short, long, memory = json.loads(in_its_own_process("long_row"))
    assert long < 3 * short
    # Inputs, output, its gradient and those of the inputs are 40 MiB; the chunks' squares of the row would be 32 more,
    # and what they are made of 100.
    assert memory < 70, f"{memory} MiB"


def in_its_own_process(function: str) -> str:
    """With a memory of its own, and without the checks of shapes, which compilers cannot trace."""
    code = f"import runpy; runpy.run_path({str(Path(__file__))!r})[{function!r}]()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# -- What torch expects, and errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_op_keeps_its_promises(form: str) -> None:
    case = make(1, 20, 1, 4, 3, form=form, bonus=form == "logsigmoid", starts=0.1, dtype=torch.float32)
    given = case.learned
    inputs = [given["q"], given.get("k"), given["v"], given["gate"], form, case.fixed.get("divisor", 1.0)]
    inputs += [given.get("lower_bound"), given.get("bonus"), case.fixed["starts"], given["initial_state"], False]
    torch.library.opcheck(chunked.vector_decay_chunked, tuple(inputs))


def compiled_whole() -> None:
    """Forwards and backwards, a graph for rows of one block and one for all others; and one for a step."""

    def call(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        return vector_decay(q, k, v, gate, activation="logsigmoid", divisor=16.0)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for length in (40, 70, 900):
        case = make(1, length, 1, 4, 3, form="logsigmoid", dtype=torch.float32)
        inputs = [case.learned[name] for name in ("q", "k", "v", "gate")]
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 1)
        expected, found = call(*inputs), compiled(*inputs)
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(output.square().sum(), inputs) for output, _ in (expected, found)]
        torch.testing.assert_close(grads[1], grads[0])
    step = torch.compile(vector_decay_step, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        given = [x[:, :1].detach() for x in inputs] + [case.learned["initial_state"].detach()]
        torch.testing.assert_close(step(*given), vector_decay_step(*given))
    print(json.dumps(torch._dynamo.utils.counters["stats"]["unique_graphs"]))


def test_it_compiles_whole_for_every_length() -> None:
    assert json.loads(in_its_own_process("compiled_whole")) == 3


def test_no_second_derivative_in_silence() -> None:
    case = make(1, 5, 1, 2, 2)
    (first,) = torch.autograd.grad(case.run("chunked")[0].square().sum(), case.learned["q"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), case.learned["v"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"activation": "tanh"}, "no activation 'tanh'"),
        ({"divisor": 2.0}, "has a divisor with activation 'logsigmoid' only"),
        ({"divisor": 0.0, "activation": "logsigmoid"}, "positive divisor, found 0.0"),
        ({"lower_bound": torch.zeros(2, 4)}, "found one with 'log_decay'"),
        ({"activation": "lower_bound"}, "found none with 'lower_bound'"),
        ({"activation": "lower_bound", "lower_bound": torch.zeros(2, 4)}, "makes k itself: pass k=None"),
        ({"k": None}, "needs k, found None"),
        ({"k": torch.zeros(1, 6, 2, 4, dtype=torch.float16)}, "of one type, found torch.float32 and torch.float16"),
        ({"v": torch.zeros(1, 6, 1, 4)}, "v of shape (1, 6, 2, 4), found (1, 6, 1, 4)"),
        ({"gate": torch.zeros(1, 5, 2, 4)}, "gate of shape (1, 6, 2, 4), found (1, 5, 2, 4)"),
        ({"bonus": torch.zeros(4, 2)}, "bonus of shape (2, 4), found (4, 2)"),
        ({"starts": torch.zeros(2, 6, dtype=torch.bool)}, "starts of shape (1, 6), found (2, 6)"),
        ({"initial_state": torch.zeros(1, 2, 4, 5)}, "initial_state of shape (1, 2, 4, 4), found (1, 2, 4, 5)"),
        ({"implementation": "fast"}, "no implementation 'fast'"),
    ],
)
def test_inputs_that_do_not_fit(changed: dict[str, Any], said: str) -> None:
    given = {name: torch.zeros(1, 6, 2, 4) for name in ("q", "k", "v", "gate")}
    function = getattr(vector_decay, "__wrapped__", vector_decay)  # jaxtyping, on in tests, would speak first
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        function(**{**given, **changed})
