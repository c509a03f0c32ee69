"""delta_rule in plain torch against the float64 loop over tokens, and what stands on it."""

from __future__ import annotations

import inspect
import itertools
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from delta_cases import BETAS, GATES, STARTS, agree, error, make

from seqlong.kernels.delta_rule import chunked, delta_rule, delta_rule_step
from seqlong.kernels.delta_rule.inputs import check
from seqlong.kernels.delta_rule.reference import delta_rule_reference

#: Largest relative error (root mean square).
EXACT = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}
KINDS = ("none", "head", "channel")


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


# -- The definition ---------------------------------------------------------------------------------------------------

SHAPES = [(2, 1, 1, 1, 3, 5), (1, 15, 2, 4, 8, 6), (2, 16, 1, 3, 4, 4), (1, 17, 3, 3, 5, 16), (2, 131, 2, 4, 7, 3)]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_starts_and_states(shape: tuple[int, ...], kind: str, reverse: bool) -> None:
    for starts in STARTS:
        case = make(*shape, kind=kind, raw=True, starts=starts, reverse=reverse)
        agree(case.results("chunked"), case.results("reference"), EXACT[torch.float64])


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_extreme_gates_and_weights(kind: str, gate: str, beta: str) -> None:
    for dtype in (torch.float64, torch.float32):
        case = make(1, 70, 1, 2, 6, 5, kind=kind, gate=gate, beta=beta, dtype=dtype)
        agree(case.results("chunked"), case.in_double().results("reference"), EXACT[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_default_chunks_in_the_types_of_models(kind: str, dtype: torch.dtype) -> None:
    case = make(1, 1100, 1, 2, 16, 24, kind=kind, raw=True, starts="random", dtype=dtype)
    agree(case.results("chunked"), case.in_double().results("reference"), EXACT[dtype])


@pytest.mark.parametrize("chunk", [1, 2, 8, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_gives_the_same(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(1, 150, 2, 2, 5, 4, kind=kind, raw=True, starts="random")
    expected = case.results("chunked")
    monkeypatch.setitem(chunked.SIZES, "cpu", (chunk, 2 * chunk))
    agree(case.results("chunked"), expected, EXACT[torch.float64])


@pytest.mark.usefixtures("small_pieces")
def test_without_state_and_with_only_one_gradient() -> None:
    case = make(1, 40, 1, 2, 4, 3, state=False)
    for pick in (0, 1):
        inputs = list(case.learned.values())
        found = torch.autograd.grad(case.run("chunked")[pick].sum(), inputs)
        expected = torch.autograd.grad(case.run("reference")[pick].sum(), inputs, allow_unused=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_is_independent_of_the_reference(kind: str) -> None:
    case = make(2, 9, 1, 2, 3, 2, kind=kind, raw=True, starts="random")
    names = list(case.learned)

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return delta_rule(**dict(zip(names, values, strict=True)), **case.fixed)

    assert torch.autograd.gradcheck(run, tuple(case.learned.values()))


def test_the_rule_does_what_it_is_named_for() -> None:
    """With beta 1 and keys of length 1, a key asked for right after it was written gives back the value exactly."""
    k = torch.nn.functional.normalize(torch.randn(1, 50, 1, 8, dtype=torch.float64), dim=-1)
    v = torch.randn(1, 50, 1, 4, dtype=torch.float64)
    output, final = delta_rule(k, k, v, torch.ones(1, 50, 1, dtype=torch.float64))
    torch.testing.assert_close(output, v)
    torch.testing.assert_close(k[:, -1] @ final[:, 0], v[:, -1])


# -- Rows in parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [1, 16, 31, 33, 64])
def test_a_row_may_be_split_anywhere(kind: str, at: int) -> None:
    case = make(2, 65, 1, 2, 6, 5, kind=kind)
    whole, final = case.run("chunked")
    parts: list[torch.Tensor] = []
    state = case.learned["initial_state"]
    for piece in (slice(0, at), slice(at, None)):
        given = {name: x[:, piece] for name, x in case.learned.items() if name != "initial_state"}
        output, state = delta_rule(**given, initial_state=state)
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(state, final)


def test_packed_rows_are_the_rows_alone() -> None:
    case = make(1, 90, 1, 2, 6, 5, kind="channel", state=False)
    starts = torch.zeros(1, 90, dtype=torch.bool)
    cuts = [0, 1, 40, 41, 90]
    starts[0, cuts[1:-1]] = True
    whole, _ = delta_rule(**case.learned, starts=starts)
    for a, z in itertools.pairwise(cuts):
        alone, _ = delta_rule(**{name: x[:, a:z] for name, x in case.learned.items()})
        torch.testing.assert_close(whole[:, a:z], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_is_not_read(kind: str) -> None:
    """Bit for bit within a chunk, and NaN from the next chunk on stays there, forwards and backwards."""
    case = make(1, 96, 1, 2, 6, 5, kind=kind, raw=True)
    before = case.run("chunked")[0]
    near = {name: x.detach().clone() for name, x in case.learned.items()}
    for name in ("q", "k", "v", "beta"):
        near[name][:, 41:] += 3
    assert torch.equal(case.but(**near).run("chunked")[0][:, :41], before[:, :41])
    far = {name: x.detach().clone() for name, x in case.learned.items()}
    for name in set(far) & {"q", "k", "v", "beta", "gate"}:
        far[name][:, 64:] = torch.nan
    spoiled = case.but(**far)
    output = spoiled.run("chunked")[0]
    assert torch.equal(output[:, :64], before[:, :64])
    assert output[:, 64:].isnan().all()


def test_one_row_does_not_depend_on_the_others() -> None:
    case = make(3, 70, 1, 2, 6, 5, kind="channel", raw=True)
    whole, _ = case.run("chunked")
    per_head = ("rate", "gate_bias")
    one = {name: x if name in per_head else x[1:2] for name, x in case.learned.items()}
    torch.testing.assert_close(delta_rule(**one, **case.fixed)[0], whole[1:2], rtol=1e-12, atol=1e-12)


# -- Long rows --------------------------------------------------------------------------------------------------------


def test_float32_keeps_its_digits_on_a_long_row() -> None:
    """8,192 tokens, the decay's gradient included, which naive sums lose; states that hardly decay, and beta 2."""
    case = make(1, 8192, 1, 3, 8, 4, beta="negative", dtype=torch.float32)
    rates = -torch.rand(1, 8192, 3) * torch.tensor([1e-4, 1e-2, 3.0])
    case = case.but(gate=rates)
    found, exact = case.results("chunked"), case.in_double().results("chunked")
    for name, value in found.items():
        assert error(value, exact[name]) < 2e-5, name


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_131072_tokens_in_linear_memory(kind: str) -> None:
    """Spot checks against the recurrence, and no more memory than a few times the inputs and gradients."""
    length = 131072
    q, k = torch.randn(2, 1, length, 1, 8).unbind()
    v, beta = torch.randn(1, length, 1, 8), torch.rand(1, length, 1)
    gate = -0.05 - torch.rand(1, length, 1) if kind == "head" else -0.05 - torch.rand(1, length, 1, 8)
    inputs = [x.requires_grad_() for x in (q, k, v, beta, gate)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    output, _ = delta_rule(q, k, v, beta, gate, normalize=True)
    grads = torch.autograd.grad(output.sum(), inputs)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 5 * sum(x.numel() * 4 for x in inputs) + (100 << 20)
    assert all(x.isfinite().all() for x in grads)
    for position in (0, 31, 32, 511, 512, 70001, length - 1):
        near = slice(max(0, position - 800), position + 1)
        expected, _ = delta_rule_reference(*(x[:, near].detach() for x in inputs), normalize=True)
        torch.testing.assert_close(output[:, position], expected[:, -1], rtol=1e-4, atol=1e-4)


# -- Steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3, 8])
def test_steps_are_the_row(kind: str, size: int) -> None:
    case = make(2, 24, 1, 2, 6, 5, kind=kind, raw=True, starts="random")
    whole, final = case.run("chunked")
    state, parts = case.learned["initial_state"], []
    fixed = {name: x for name, x in case.fixed.items() if name != "starts"}
    per_head = {name: x for name, x in case.learned.items() if name in ("rate", "gate_bias")}
    for a in range(0, 24, size):
        given = {name: case.learned[name][:, a : a + size] for name in ("q", "k", "v", "beta")}
        gate = case.learned["gate"][:, a : a + size] if kind != "none" else None
        output, state = delta_rule_step(
            **given, gate=gate, state=state, **per_head, **fixed, starts=case.fixed["starts"][:, a : a + size]
        )
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(state, final)
    found = torch.autograd.grad(torch.cat(parts, dim=1).sum(), case.learned["initial_state"])
    torch.testing.assert_close(found, torch.autograd.grad(whole.sum(), case.learned["initial_state"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 4])
def test_padding_leaves_the_state(kind: str, size: int) -> None:
    """Rows of one batch that accepted 0, 1 ... tokens: each has the state of its own tokens, whatever lies behind."""
    case = make(size + 1, size, 1, 2, 6, 5, kind=kind)
    given = {name: x.detach().clone() for name, x in case.learned.items()}
    state, gate = given.pop("initial_state"), given.pop("gate", None)
    padding = torch.arange(size) >= torch.arange(size + 1)[:, None]
    for x in (*given.values(), *([] if gate is None else [gate])):
        x[padding] = torch.nan
    output, after = delta_rule_step(**given, gate=gate, state=state, padding=padding, starts=padding)
    torch.testing.assert_close(after[0], state[0], rtol=0, atol=0)
    for row in range(1, size + 1):
        short = {name: x[row : row + 1, :row] for name, x in given.items()}
        short_gate = None if gate is None else gate[row : row + 1, :row]
        expected, last = delta_rule(**short, gate=short_gate, initial_state=state[row : row + 1])
        torch.testing.assert_close(output[row : row + 1, :row], expected)
        torch.testing.assert_close(after[row : row + 1], last)


# -- What torch expects of an op --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_op_is_registered_rightly(kind: str) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    case = make(1, 20, 1, 2, 4, 3, kind=kind, raw=True, starts="random", dtype=torch.float32)
    names = ("q", "k", "v", "beta", "gate", "rate", "gate_bias")
    inputs = [case.learned.get(name) for name in names]
    options = (case.fixed["starts"], case.learned["initial_state"], True, 2)
    torch.library.opcheck(chunked.delta_rule_chunked, (*inputs, *options), test_utils=checks)


def test_one_graph_for_every_length() -> None:
    """In a process of its own: compilers cannot read the shape checks that the tests put into every function."""
    code = f"import runpy; runpy.run_path({str(Path(__file__).with_name('delta_cases.py'))!r})['compile_for_lengths']()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("one graph\n"), done.stderr[-3000:]


def test_autocast_does_not_reach_inside() -> None:
    case = make(1, 40, 1, 2, 4, 3, kind="channel", dtype=torch.float32)
    expected = case.results("chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.results("chunked")
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


# -- Errors -----------------------------------------------------------------------------------------------------------

FITTING = {
    "q": (1, 6, 2, 4), "k": (1, 6, 2, 4), "v": (1, 6, 4, 3), "beta": (1, 6, 4), "gate": (1, 6, 4, 4), "rate": (4,),
    "gate_bias": (4, 4), "starts": (1, 6), "initial_state": (1, 4, 4, 3),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("v", (1, 6, 3, 3), "3 heads, 2 groups"),
        ("q", (1, 6, 8), "q with four axes"),
        ("k", (1, 5, 2, 4), r"k of shape \(1, 6, 2, 4\), found \(1, 5, 2, 4\)"),
        ("v", (1, 7, 4, 3), "v of shape"),
        ("beta", (1, 6, 2), r"beta of shape \(1, 6, 4\), found \(1, 6, 2\)"),
        ("gate", (1, 6, 4, 3), r"gate of shape \(1, 6, 4, 4\)"),
        ("gate", (1, 6, 2), r"gate of shape \(1, 6, 4\)"),
        ("rate", (2,), r"rate of shape \(4,\)"),
        ("gate_bias", (4, 3), r"gate_bias of shape \(4, 4\)"),
        ("starts", (6,), "starts of shape"),
        ("starts", (1, 6), "starts of type bool"),
        ("initial_state", (1, 4, 3, 4), r"initial_state of shape \(1, 4, 4, 3\), found \(1, 4, 3, 4\)"),
    ],
)
def test_what_does_not_fit_is_said(name: str, shape: tuple[int, ...], said: str) -> None:
    given = {one: torch.zeros(size) for one, size in FITTING.items()}
    given["starts"] = given["starts"].bool()
    given[name] = torch.zeros(shape, dtype=torch.bool if (name, shape) == ("starts", (6,)) else torch.float32)
    with pytest.raises(ValueError, match=said):
        check("delta_rule", **given, gate_activation="softplus")


def test_words_that_are_unknown_or_missing_are_said() -> None:
    given = {one: torch.zeros(FITTING[one]) for one in ("q", "k", "v", "beta", "gate")}
    with pytest.raises(ValueError, match="beta_activation to be one of none, sigmoid, double_sigmoid, found 'relu'"):
        delta_rule(**given, beta_activation="relu")
    with pytest.raises(ValueError, match="gate_activation to be one of"):
        delta_rule(**given, gate_activation="exp")
    with pytest.raises(ValueError, match="needs rate for gate_activation='softplus', found None"):
        delta_rule(**given, gate_activation="softplus")
    with pytest.raises(ValueError, match="rate with gate_activation='softplus' only"):
        delta_rule(**given, rate=torch.zeros(4))
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        delta_rule(**given, implementation="cuda")
    with pytest.raises(ValueError, match=r"padding of shape \(1, 6\)"):
        short = torch.zeros(6, dtype=torch.bool)
        inspect.unwrap(delta_rule_step)(**given, state=torch.zeros(1, 4, 4, 3), padding=short)
