"""Log-linear attention: chunks and steps against the loop over tokens, and that loop against the mask written out."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peak_memory import grown
from torch import Tensor

from seqlong.kernels.log_linear import Fenwick, chunked, log_linear, log_linear_step
from seqlong.kernels.log_linear import levels as lv
from seqlong.kernels.log_linear.op import check
from seqlong.kernels.scalar_decay import scalar_decay

GATES = {
    "usual": lambda drawn: -0.5 * drawn,
    "none": lambda drawn: 0 * drawn,
    "strong": lambda drawn: 0 * drawn - 100,
    "never": lambda drawn: 0 * drawn - 1e4,
    "mixed": lambda drawn: -1e4 * drawn**8,
    "forgets": lambda drawn: torch.where(drawn < 0.2, -torch.inf, -0.1 * drawn),
}
FORMS = ("scalar", "delta")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is full of NaN: an element that is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and blocks small enough that short rows cross many of them."""
    monkeypatch.setitem(chunked.SIZES, "cpu", (4, 16))


def draw(
    form: str, rows: int, length: int, groups: int, heads: int, width: int, value_width: int, levels: int,
    gate: str = "usual", dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:  # fmt: skip
    """Inputs by name; the delta rule's strengths go up to 2."""
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    drawn = {
        "q": torch.randn(rows, length, groups, width).to(dtype),
        "k": F.normalize(torch.randn(rows, length, groups, width), dim=-1).to(dtype),
        "v": torch.randn(rows, length, heads, value_width).to(dtype),
        "log_decay": GATES[gate](torch.rand(rows, length, heads)).to(kept),
        "levels": torch.rand(rows, length, heads, levels).to(dtype),
    }
    if form == "delta":
        drawn["beta"] = 2 * torch.rand(rows, length, heads).to(dtype)
    return {name: x.requires_grad_() for name, x in drawn.items()}


def carried(inputs: dict[str, Tensor], tokens: list[int]) -> Fenwick:
    """A stack as a row of so many tokens leaves it, one bucket a bit."""
    (_, _, heads, value_width), levels = inputs["v"].shape, inputs["levels"].shape[3]
    stack, width = lv.buckets(levels), inputs["q"].shape[3]
    states = torch.zeros(len(tokens), heads, stack, width, value_width)
    for row, n in enumerate(tokens):
        for bit in range(n.bit_length()):
            if n >> bit & 1:
                states[row, :, min(bit, stack - 1)] = torch.randn(heads, width, value_width)
    kept = torch.float64 if inputs["v"].dtype == torch.float64 else torch.float32
    return Fenwick(states.to(kept).requires_grad_(), torch.tensor(tokens))


def results(inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Output, final state, and gradients of a sum of both with fixed weights."""
    output, final = log_linear(**inputs, **options)
    source = torch.Generator().manual_seed(5)
    # A bucket that is empty has no gradient worth the name.
    weigh = [torch.randn(x.shape, generator=source).to(x.dtype) for x in (output, final.states)]
    wanted = dict(inputs)
    if options.get("initial_state") is not None:
        wanted["initial_state"] = options["initial_state"].states
    grads = torch.autograd.grad([output, final.states], list(wanted.values()), weigh)
    named = zip((f"grad of {name}" for name in wanted), grads, strict=True)
    return {"output": output.detach(), "states": final.states.detach(), "tokens": final.tokens, **dict(named)}


def agree(found: dict[str, Tensor], exact: dict[str, Tensor], limit: float) -> None:
    """Relative errors (root mean square)."""
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        assert value.isfinite().all(), f"{name} is not finite"
        if name == "tokens":
            assert torch.equal(value, exact[name])
            continue
        scale = exact[name].double().square().mean().sqrt().clamp(min=0.1)
        away = ((value.double() - exact[name].double()) / scale).square().mean().sqrt().item()
        assert away < limit, f"{name}: {away:.1e}"


def in_double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().double().requires_grad_() for name, x in inputs.items()}


def written_out(inputs: dict[str, Tensor], length: int) -> Tensor:
    """(t v) of row 0, head 0: every pair of tokens, with the transitions between them, in t² times t products."""
    q, k, v, g, weights = (inputs[name].detach()[0, :, 0] for name in ("q", "k", "v", "log_decay", "levels"))
    beta = inputs["beta"].detach()[0, :, 0] if "beta" in inputs else None
    rows = []
    for t in range(length):
        total, reading = torch.zeros_like(v[0]), q[t]
        for s in range(t, -1, -1):
            strength = 1.0 if beta is None else beta[s]
            level = min((t ^ s).bit_length(), weights.shape[1] - 1)
            total = total + weights[t, level] * (reading @ k[s]) * strength * v[s]
            if beta is not None:
                reading = reading - beta[s] * (reading @ k[s]) * k[s]
            reading = reading * g[s].exp()
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("levels", [1, 3, 7, 10])
@pytest.mark.parametrize("form", FORMS)
def test_the_loop_is_the_mask_written_out(form: str, levels: int) -> None:
    inputs = draw(form, 1, 53, 1, 1, 3, 2, levels)
    output, final = log_linear(**inputs, implementation="reference")
    torch.testing.assert_close(output[0, :, 0], written_out(inputs, 53))
    assert final.tokens.tolist() == [53]
    occupied = final.states.detach()[0, 0].abs().sum(dim=(1, 2)) > 0
    bits = {min(bit, lv.buckets(levels) - 1) for bit in range(6) if 53 >> bit & 1}
    assert set(occupied.nonzero()[:, 0].tolist()) == bits


def test_levels_and_buckets_of_every_pair() -> None:
    """A bucket is of tokens that have one level for all who come, and one bucket in all counts that come."""
    stack = 8
    for before in range(70):
        tokens = torch.arange(before)
        inside = lv.bucket_of(tokens, torch.tensor(before), stack)
        later = torch.arange(before, 110)
        seen = lv.seen_from(later, torch.tensor(before), stack, 9)  # (i m)
        assert torch.equal(seen[:, inside], lv.bit_length(later[:, None] ^ tokens))
        for count in range(before + 1, 110):
            into = lv.bucket_of(torch.tensor([before]), torch.tensor(count), stack)
            moved = torch.maximum(inside, into)
            assert torch.equal(moved, lv.bucket_of(tokens, torch.tensor(count), stack))
    assert lv.bit_length(torch.tensor([0, 1, 2, 3, 4, 2**40 - 1, 2**40])).tolist() == [0, 1, 2, 2, 3, 40, 41]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("rows", "length", "groups", "heads", "width", "value_width", "levels"),
    [(2, 1, 1, 1, 3, 5, 1), (1, 5, 1, 2, 4, 3, 4), (2, 32, 2, 4, 4, 4, 3), (2, 67, 3, 3, 5, 3, 8)],
)
def test_chunks_are_the_loop(
    rows: int, length: int, groups: int, heads: int, width: int, value_width: int, levels: int, form: str, gate: str
) -> None:
    inputs = draw(form, rows, length, groups, heads, width, value_width, levels, gate)
    state = carried(inputs, [5, 42][:rows])
    for options in (
        {},
        {"initial_state": state},
        {"starts": torch.rand(rows, length) < 0.15},
        {"starts": torch.rand(rows, length) < 0.04, "initial_state": state},
        {"starts": torch.ones(rows, length, dtype=torch.bool), "initial_state": state},
    ):
        exact = results(inputs, **options, implementation="reference")
        agree(results(inputs, **options), exact, limit=1e-12)


def test_all_weights_one_is_the_recurrence_itself() -> None:
    inputs = draw("delta", 1, 150, 1, 2, 4, 3, 5)
    inputs["levels"] = torch.ones_like(inputs["levels"])
    beta = inputs.pop("beta")
    plain = [inputs[name] for name in ("q", "k", "v", "log_decay")]
    output, final = log_linear(**inputs)
    expected, state = scalar_decay(*plain)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(final.states.sum(dim=2), state)
    output, final = log_linear(**inputs, beta=beta)
    q, k, v, g = (x[0].detach() for x in plain)
    for head in range(2):
        state = torch.zeros(4, 3).double()
        for t in range(150):
            state = g[t, head].exp() * state
            state = state + beta[0, t, head] * torch.outer(k[t, 0], v[t, head] - k[t, 0] @ state)
            torch.testing.assert_close(output[0, t, head], q[t, 0] @ state)
        torch.testing.assert_close(final.states[0, head].sum(dim=0), state)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_is_independent_of_the_reference(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.SIZES, "cpu", (2, 4))
    inputs = draw(form, 1, 7, 1, 1, 2, 2, 4)
    state, beta = carried(inputs, [3]), inputs.get("beta")
    starts = torch.tensor([[False] * 5 + [True] + [False]])

    def run(marks: Tensor | None, first: Fenwick | None, *x: Tensor) -> tuple[Tensor, Tensor]:
        given = first and Fenwick(x[-1], first.tokens)
        options = {"beta": x[5] if beta is not None else None}
        output, final = log_linear(*x[:5], **options, starts=marks, initial_state=given)
        return output, final.states

    for marks, first in ((None, None), (starts, state)):
        learned = (*inputs.values(), *([] if first is None else [first.states]))
        assert torch.autograd.gradcheck(lambda *x, m=marks, f=first: run(m, f, *x), learned)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("form", FORMS)
def test_with_only_one_gradient(form: str) -> None:
    inputs = draw(form, 1, 39, 1, 2, 4, 3, 6)
    for pick in (lambda result: result[0], lambda result: result[1].states):
        both = [
            torch.autograd.grad(
                pick(log_linear(**inputs, implementation=way)).sum(), list(inputs.values()), allow_unused=True,
                materialize_grads=True,
            )
            for way in ("chunked", "reference")
        ]  # fmt: skip
        torch.testing.assert_close(*both)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("gate", ["usual", "none", "mixed", "forgets"])
@pytest.mark.parametrize("form", FORMS)
def test_shorter_types(form: str, gate: str, dtype: torch.dtype, limit: float) -> None:
    """At the sizes that are used, on rows of no multiple of anything, packed and not."""
    inputs = draw(form, 1, 413, 1, 2, 16, 8, 10, gate, dtype)
    for starts in (None, torch.rand(1, 413) < 0.01):
        found = results(inputs, starts=starts)
        assert found["output"].dtype == found["grad of levels"].dtype == dtype
        assert found["states"].dtype == torch.float32
        agree(found, results(in_double(inputs), starts=starts, implementation="reference"), limit)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("cut", [1, 15, 16, 33, 64, 80])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_may_be_cut_anywhere(form: str, cut: int) -> None:
    inputs = draw(form, 2, 96, 1, 2, 5, 4, 7)
    for starts in (None, torch.rand(2, 96) < 0.03):
        whole, final = log_linear(**inputs, starts=starts)
        parts, state = [], None
        for piece in (slice(0, cut), slice(cut, None)):
            given = {name: x[:, piece] for name, x in inputs.items()}
            marks = None if starts is None else starts[:, piece]
            output, state = log_linear(**given, starts=marks, initial_state=state)
            parts.append(output)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)
        torch.testing.assert_close(state, final)
        ends = [(torch.cat(parts, dim=1), state), (whole, final)]
        both = [torch.autograd.grad(o.square().sum() + s.states.square().sum(), list(inputs.values())) for o, s in ends]
        torch.testing.assert_close(*both)


@pytest.mark.parametrize("sizes", [[1] * 22, [5, 1, 16], [22]])
@pytest.mark.parametrize("form", FORMS)
def test_decoding_is_training(form: str, sizes: list[int]) -> None:
    for levels in (1, 3, 7):
        inputs = draw(form, 2, 22, 1, 2, 5, 4, levels)
        starts = torch.rand(2, 22) < 0.1
        state = first = carried(inputs, [11, 0])
        whole, final = log_linear(**inputs, starts=starts, initial_state=state, implementation="reference")
        before, parts, at = first.states.clone(), [], 0
        for size in sizes:
            piece = slice(at, at + size)
            given = {name: x[:, piece] for name, x in inputs.items()}
            output, state = log_linear_step(**given, state=state, starts=starts[:, piece])
            parts.append(output)
            at += size
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)
        torch.testing.assert_close(state, final)
        assert torch.equal(first.states, before) and first.tokens.tolist() == [11, 0]


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_padding_keeps_its_state(form: str) -> None:
    inputs = draw(form, 2, 3, 1, 2, 5, 4, 5)
    state = carried(inputs, [6, 7])
    poisoned = {n: x.detach().clone().index_fill_(0, torch.tensor([1]), torch.nan) for n, x in inputs.items()}
    padding = torch.tensor([[False, True, False], [True] * 3])
    poisoned = {n: x.index_fill_(1, torch.tensor([1]), torch.nan) for n, x in poisoned.items()}
    starts = torch.tensor([[False] * 3, [True] * 3])
    output, after = log_linear_step(**poisoned, state=state, starts=starts, padding=padding)
    assert torch.equal(after.states[1], state.states[1]) and after.tokens.tolist() == [8, 7]
    told = {n: x[:1, [0, 2]] for n, x in inputs.items()}
    expected, final = log_linear(**told, initial_state=Fenwick(*(x[:1] for x in state)), implementation="reference")
    torch.testing.assert_close(output[:1, [0, 2]], expected)
    torch.testing.assert_close(after.states[:1], final.states)


@pytest.mark.parametrize("form", FORMS)
def test_no_token_knows_its_future_nor_another_segment(form: str) -> None:
    inputs = {name: x.detach() for name, x in draw(form, 1, 160, 1, 1, 4, 3, 9).items()}
    starts = torch.zeros(1, 160, dtype=torch.bool).index_fill_(1, torch.tensor([100]), True)
    clean, _ = log_linear(**inputs, starts=starts)
    for place in (130, 81):
        spoiled = {n: x.clone() for n, x in inputs.items()}
        for x in spoiled.values():
            x[:, place] = -77.0
        found, _ = log_linear(**spoiled, starts=starts)
        torch.testing.assert_close(found[:, :place], clean[:, :place])
        torch.testing.assert_close(found[:, 100 : max(place, 100)], clean[:, 100 : max(place, 100)])
    found, _ = log_linear(**{n: x[:, 100:] for n, x in inputs.items()})
    torch.testing.assert_close(found, clean[:, 100:])  # levels start afresh
    for x in inputs.values():
        x[:, 128:] = torch.nan  # chunks to the right
    assert torch.equal(log_linear(**inputs, starts=starts)[0][:, :128], clean[:, :128])


def compile_whole() -> None:
    """One graph for every length, backwards too, and a step."""
    for form in FORMS:
        torch.compiler.reset()
        run = torch.compile(log_linear, backend="aot_eager", fullgraph=True)
        for length in (20, 70, 2100):
            torch._dynamo.config.error_on_recompile = length > 20
            # With levels for all of them: whether there are is asked once, and a second graph for the other answer.
            inputs = draw(form, 2, length, 1, 2, 4, 3, 13, dtype=torch.float32)
            for x in inputs.values():
                torch._dynamo.mark_dynamic(x, 1)
            pair = run(**inputs), log_linear(**inputs)
            torch.testing.assert_close(*pair)
            torch.testing.assert_close(
                *(torch.autograd.grad(o.sum() + s.states.sum(), list(inputs.values())) for o, s in pair)
            )
        torch._dynamo.config.error_on_recompile = False
    step = torch.compile(log_linear_step, backend="aot_eager", fullgraph=True)
    for length in (1, 3):
        given = {name: x.detach()[:, :length] for name, x in inputs.items()}
        state = Fenwick(*(x.detach() for x in carried(inputs, [3, 9])))
        torch.testing.assert_close(step(**given, state=state), log_linear_step(**given, state=state))


def test_compiles_into_one_graph() -> None:
    """In a process of its own: compilers cannot trace the tests' checks of shapes."""
    run = "import sys; sys.path.insert(0, sys.argv[1]); import test_log_linear as t; t.compile_whole(); print('done')"
    found = subprocess.run(
        [sys.executable, "-c", run, str(Path(__file__).parent)], capture_output=True, text=True, timeout=300
    )
    assert found.stdout.endswith("done\n"), found.stderr[-3000:]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_state", [False, True])
def test_the_op_is_registered_rightly(with_state: bool, form: str) -> None:
    """torch's own checks: schema, fake tensors, autograd registration."""
    inputs = draw(form, 1, 20, 1, 2, 4, 3, 5, dtype=torch.float32)
    state = carried(inputs, [3])
    beta = inputs.pop("beta", None)
    starts = torch.rand(1, 20) < 0.2 if with_state else None
    torch.library.opcheck(
        chunked.log_linear_chunked, (*inputs.values(), beta, starts, *(state if with_state else (None, None))),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


def test_no_second_derivative_in_silence() -> None:
    inputs = draw("delta", 1, 5, 1, 1, 2, 2, 3)
    (grad,) = torch.autograd.grad(log_linear(**inputs)[0].sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.square().sum(), inputs["k"])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("k", torch.zeros(1, 6, 2, 3), r"k of shape \(1, 6, 2, 4\), found \(1, 6, 2, 3\)"),
        ("v", torch.zeros(1, 6, 3, 3), "3 heads, 2 groups"),
        ("q", torch.zeros(1, 6, 8), "q with four axes"),
        ("levels", torch.zeros(1, 6, 2, 5), r"levels of shape \(1, 6, 4, 5\)"),
        ("levels", torch.zeros(1, 6, 4, 0), "at least one level"),
        ("beta", torch.zeros(1, 6, 2), "beta of shape"),
        ("log_decay", torch.zeros(1, 6, 2), "log_decay of shape"),
        ("starts", torch.zeros(6), "starts of shape"),
        ("starts", torch.zeros(1, 6), "starts of type bool"),
        ("state", (torch.zeros(1, 4, 5, 4, 3), torch.zeros(1, dtype=torch.long)), r"states of shape \(1, 4, 4, 4, 3\)"),
        ("state", (torch.zeros(1, 4, 4, 4, 3), torch.zeros(2, dtype=torch.long)), r"tokens of shape \(1,\)"),
        ("state", (torch.zeros(1, 4, 4, 4, 3), torch.zeros(1)), "tokens of type int64"),
    ],
)
def test_says_what_does_not_fit(name: str, value: Any, said: str) -> None:
    given: dict[str, Any] = {
        "q": torch.zeros(1, 6, 2, 4), "k": torch.zeros(1, 6, 2, 4), "v": torch.zeros(1, 6, 4, 3),
        "log_decay": torch.zeros(1, 6, 4), "levels": torch.zeros(1, 6, 4, 5), "beta": torch.zeros(1, 6, 4),
        "state": None,
    }  # fmt: skip
    check("log_linear", **given, marks={"starts": torch.zeros(1, 6, dtype=torch.bool)})
    marks = {"starts": value} if name == "starts" else {}
    with pytest.raises(ValueError, match=said):
        check("log_linear", **({**given, name: value} if name != "starts" else given), marks=marks)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_past_2_to_the_17_tokens_in_linear_memory(form: str, packed: bool) -> None:
    """Some tokens against the mask written out over the whole row, with their gradients."""
    length, places = 131072 + 77, [1, 64, 4095, 65536, 100001, 131072, 131148]
    inputs = draw(form, 1, length, 1, 1, 4, 4, 19, "none", torch.float32)
    inputs["log_decay"] = torch.full((1, length, 1), -1e-5).requires_grad_()
    starts = torch.zeros(1, length, dtype=torch.bool) if packed else None
    first = 0
    if starts is not None:
        first = 30001
        starts[:, first] = True
    if form == "delta":  # as slow: what is written stays for 1e4 tokens
        inputs["beta"] = (1e-4 * torch.rand(1, length, 1)).requires_grad_()
    weigh = torch.zeros(1, length, 1, 4)
    weigh[:, places] = torch.randn(len(places), 1, 4)
    output, grads = torch.empty(0), {}

    def run() -> None:
        nonlocal output, grads
        output, _ = log_linear(**inputs, starts=starts)
        grads = dict(zip(inputs, torch.autograd.grad(output, list(inputs.values()), weigh), strict=True))

    begin = time.perf_counter()
    # The levels' gradient is 10 MB, the others and the output 2 MB each; a stack a chunk of 64 would be 40 MB.
    assert grown(run) < 60e6
    assert time.perf_counter() - begin < 100

    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    if form == "scalar":
        expected = told(exact, first, places)
    else:  # other chunks and blocks, which some outputs hold against the mask
        beta = exact.pop("beta")
        expected = chunked.log_linear_chunked(*exact.values(), beta, starts, None, None, 16, 4096)[0][0, places, 0]
        exact["beta"] = beta
        for index in (2, 5):
            found = told_by_transitions(exact, first if places[index] >= first else 0, places[index])
            torch.testing.assert_close(expected[index].detach(), found)
    assert ((output[0, places, 0].double() - expected).norm(dim=1) < 1e-5 * expected.norm(dim=1)).all()
    wanted = torch.autograd.grad((expected * weigh[0, places, 0].double()).sum(), list(exact.values()))
    for (name, found), right in zip(grads.items(), wanted, strict=True):
        away = (found.double() - right).norm() / right.norm()
        assert away < 3e-5, f"{name}: {away:.1e}"


def told(exact: dict[str, Tensor], first: int, places: list[int]) -> Tensor:
    """(p v): outputs of scalar decay at some places, where a segment starts at ``first``; differentiable."""
    q, k, v, g, weights = (exact[name][0, :, 0] for name in ("q", "k", "v", "log_decay", "levels"))
    outputs = []
    for place in places:
        low = first if place >= first else 0
        span = torch.arange(low, place + 1)
        decay = (g[low : place + 1].sum() - g[low : place + 1].cumsum(0)).exp()
        weight = weights[place][lv.bit_length((span - low) ^ (place - low))]
        outputs.append((weight * decay * (k[span] @ q[place])) @ v[span])
    return torch.stack(outputs)


def told_by_transitions(exact: dict[str, Tensor], low: int, place: int) -> Tensor:
    """(v): the delta rule's output at a place, its query taken back through every transition."""
    q, k, v, g, weights, beta = (x.detach()[0, :, 0].numpy() for x in exact.values())
    reading, total = q[place], 0.0
    for s in range(place, low - 1, -1):
        seen = beta[s] * (reading @ k[s])
        total = total + weights[place, ((place - low) ^ (s - low)).bit_length()] * seen * v[s]
        reading = (reading - seen * k[s]) * math.exp(g[s])
    return torch.from_numpy(total)
