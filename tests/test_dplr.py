"""dplr (RWKV-7): chunks and steps against the loop over tokens, and that loop against the formula written out."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peak_memory import grown
from torch import Tensor

from seqlong.kernels.dplr import chunked, dplr, dplr_step

NAMES = ("q", "k", "v", "a", "b", "log_decay", "initial_state")
GATES = {
    "usual": lambda drawn: -2 * drawn,
    "rwkv7": lambda drawn: -0.6065306597 * drawn,
    "none": lambda drawn: 0 * drawn,
    "strong": lambda drawn: 0 * drawn - 100,
    "never": lambda drawn: 0 * drawn - 1e4,
    "mixed": lambda drawn: -1e4 * drawn**8,
    "forgets": lambda drawn: torch.where(drawn < 0.2, -torch.inf, -0.1 * drawn),
}


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
    monkeypatch.setitem(chunked.SIZES, "cpu", (8, 24))


def draw(
    rows: int, length: int, heads: int, width: int, value_width: int, gate: str = "usual",
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:  # fmt: skip
    """Inputs by name: general a and b, that together shrink."""
    q, k, a, b = torch.randn(4, rows, length, heads, width).double().unbind()
    drawn = {
        "q": q,
        "k": k * width**-0.5,
        "v": torch.randn(rows, length, heads, value_width).double(),
        "a": F.normalize(a, dim=-1),
        "b": 0.7 * F.normalize(b, dim=-1),
        "log_decay": GATES[gate](torch.rand(rows, length, heads, width).double()),
        "initial_state": torch.randn(rows, heads, width, value_width).double(),
    }
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    types = dict.fromkeys(NAMES, dtype) | {"log_decay": kept, "initial_state": kept}
    return {name: x.to(types[name]).requires_grad_() for name, x in drawn.items()}


def results(inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Output, final state, and gradients of a sum of both with fixed weights."""
    output, final = dplr(**inputs, **options)  # type: ignore[arg-type]
    source = torch.Generator().manual_seed(5)
    weigh = [torch.randn(x.shape, generator=source).to(x.device, x.dtype) for x in (output, final)]
    grads = torch.autograd.grad([output, final], list(inputs.values()), weigh)
    named = zip((f"grad of {name}" for name in inputs), grads, strict=True)
    return {"output": output.detach(), "final state": final.detach(), **dict(named)}


def agree(found: dict[str, Tensor], exact: dict[str, Tensor], limit: float) -> None:
    """Relative errors (root mean square), of every head."""
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        assert value.isfinite().all(), f"{name} is not finite"
        scale = exact[name].double().square().mean().sqrt().clamp(min=0.1)
        away = ((value.double() - exact[name].double()) / scale).square().mean().sqrt().item()
        assert away < limit, f"{name}: {away:.1e}"


def in_double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().double().requires_grad_() for name, x in inputs.items()}


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("rows", "length", "heads", "width", "value_width"),
    [(2, 1, 1, 3, 5), (1, 2, 2, 4, 3), (2, 34, 2, 4, 4), (1, 9, 1, 5, 16), (2, 67, 2, 7, 3)],
)
def test_chunks_are_the_loop(rows: int, length: int, heads: int, width: int, value_width: int, gate: str) -> None:
    inputs = draw(rows, length, heads, width, value_width, gate)
    for starts in (None, torch.rand(rows, length) < 0.15, torch.ones(rows, length, dtype=torch.bool)):
        options = {"starts": starts, "reverse": length % 2 == 0}
        exact = results(inputs, **options, implementation="reference")
        agree(results(inputs, **options), exact, limit=1e-12)


def test_the_loop_is_the_formula() -> None:
    """Products of whole transition matrices, written out."""
    inputs = draw(1, 7, 1, 3, 2)
    q, k, v, a, b, g, state = (x.detach()[0].squeeze(1 if n != "initial_state" else 0) for n, x in inputs.items())
    output, final = dplr(**inputs, implementation="reference")
    for t in range(7):
        transition = torch.diag(g[t].exp()) + torch.outer(b[t], a[t])
        state = transition @ state + torch.outer(k[t], v[t])
        torch.testing.assert_close(output[0, t, 0], q[t] @ state)
    torch.testing.assert_close(final[0, 0], state)


def test_rwkv7_is_the_gated_delta_rule_where_they_meet() -> None:
    """a = -k e^g, b = β k, keys β k: ``S_t = (1 - β kᵀ k) diag(e^g) S_{t-1} + β kᵀ v``."""
    inputs = draw(1, 20, 1, 4, 3)
    q, v, g = (inputs[name].detach() for name in ("q", "v", "log_decay"))
    k, beta = F.normalize(inputs["k"].detach(), dim=-1), torch.rand(1, 20, 1, 1).double()
    output, _ = dplr(q, beta * k, v, -k * g.exp(), beta * k, g)
    state = torch.zeros(4, 3).double()
    for t in range(20):
        decayed = g[0, t, 0].exp()[:, None] * state
        state = decayed + beta[0, t, 0] * torch.outer(k[0, t, 0], v[0, t, 0] - k[0, t, 0] @ decayed)
        torch.testing.assert_close(output[0, t, 0], q[0, t, 0] @ state)


def test_gradcheck_is_independent_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.SIZES, "cpu", (4, 4))
    inputs = draw(1, 9, 1, 2, 2)
    starts = torch.tensor([[False] * 6 + [True] + [False] * 2])
    for marks in (None, starts):
        assert torch.autograd.gradcheck(
            lambda *x, marks=marks: dplr(*x[:6], starts=marks, initial_state=x[6]), tuple(inputs.values())
        )


@pytest.mark.usefixtures("small_pieces")
def test_without_state_and_with_only_one_gradient() -> None:
    inputs = draw(1, 40, 2, 4, 3)
    del inputs["initial_state"]
    for pick in (0, 1):
        both = [
            torch.autograd.grad(
                dplr(**inputs, implementation=way)[pick].sum(), list(inputs.values()), allow_unused=True,
                materialize_grads=True,
            )
            for way in ("chunked", "reference")
        ]  # fmt: skip
        torch.testing.assert_close(*both)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("gate", GATES)
def test_shorter_types(dtype: torch.dtype, limit: float, gate: str) -> None:
    """At the sizes that are used, on a row of no multiple of anything."""
    inputs = draw(2, 777, 2, 16, 8, gate, dtype)
    starts = torch.rand(2, 777) < 0.01
    found = results(inputs, starts=starts)
    assert found["output"].dtype == found["grad of a"].dtype == dtype
    assert found["final state"].dtype == torch.float32
    exact = results(in_double(inputs), starts=starts, implementation="reference")
    agree(found, exact, max(limit, 3e-5) if gate in ("strong", "never", "mixed", "forgets") else limit)


@pytest.mark.parametrize("cut", [1, 30, 32, 33, 95])
def test_a_row_may_be_cut_anywhere(cut: int) -> None:
    inputs = draw(2, 96, 2, 5, 4)
    starts = torch.rand(2, 96) < 0.05
    whole, final = dplr(**inputs, starts=starts)
    parts, state = [], inputs.pop("initial_state")
    for piece in (slice(0, cut), slice(cut, None)):
        output, state = dplr(*(x[:, piece] for x in inputs.values()), starts=starts[:, piece], initial_state=state)
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(state, final)
    both = [torch.autograd.grad(o.square().sum(), list(inputs.values())) for o in (torch.cat(parts, dim=1), whole)]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 1, 6], [12]])
def test_steps_are_the_row(sizes: list[int]) -> None:
    inputs = draw(2, 12, 2, 5, 4)
    starts = torch.rand(2, 12) < 0.2
    whole, final = dplr(**inputs, starts=starts, implementation="reference")
    first = state = inputs.pop("initial_state")
    before, parts, at = first.clone(), [], 0
    for size in sizes:
        piece = slice(at, at + size)
        output, state = dplr_step(*(x[:, piece] for x in inputs.values()), state, starts=starts[:, piece])
        parts.append(output)
        at += size
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(state, final)
    assert torch.equal(first, before)
    for size in (1, 5):  # a row of padding keeps its state, whatever stands there
        poisoned = [x[:, :size].detach().clone().index_fill_(0, torch.tensor([1]), torch.nan) for x in inputs.values()]
        padding = torch.tensor([[False] * size, [True] * size])
        _, kept = dplr_step(*poisoned, state, starts=torch.ones(2, size, dtype=torch.bool), padding=padding)
        assert torch.equal(kept[1], state[1]) and kept[0].isfinite().all()


def test_no_token_knows_its_future_nor_another_segment() -> None:
    inputs = {name: x.detach() for name, x in draw(1, 80, 1, 4, 3).items()}
    starts = torch.zeros(1, 80, dtype=torch.bool).index_fill_(1, torch.tensor([50]), True)
    for place, seen in ((70, slice(0, 70)), (41, [*range(41)])):
        clean, _ = dplr(**inputs, starts=starts)
        spoiled = {n: x if n == "initial_state" else x.clone() for n, x in inputs.items()}
        for name in ("q", "k", "v", "a", "b"):
            spoiled[name][:, place] = torch.nan
        found, _ = dplr(**spoiled, starts=starts, implementation="reference")
        torch.testing.assert_close(found[:, seen], clean[:, seen])
        # Zero times NaN is NaN: within a chunk products reach the future, which finite values show as well.
        spoiled = {n: torch.where(x.isfinite(), x, 1e3) for n, x in spoiled.items()}
        found, _ = dplr(**spoiled, starts=starts)
        torch.testing.assert_close(found[:, seen], clean[:, seen], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[:, 50:70], clean[:, 50:70], rtol=1e-9, atol=1e-9)
        spoiled = {n: x.clone() for n, x in inputs.items()}
        spoiled["v"][:, 64:] = torch.nan  # chunks to the right
        assert dplr(**spoiled)[0][:, :64].isfinite().all()


def compile_whole() -> None:
    """One graph for every length, backwards too, and a step."""

    def both(*x: Tensor) -> tuple[Tensor, Tensor]:
        return dplr(*x[:6], initial_state=x[6])

    run = torch.compile(both, backend="aot_eager", fullgraph=True)
    for length in (20, 70, 600):
        torch._dynamo.config.error_on_recompile = length > 20
        values = tuple(draw(2, length, 1, 4, 3, dtype=torch.float32).values())
        for x in values[:6]:
            torch._dynamo.mark_dynamic(x, 1)
        found, expected = run(*values), both(*values)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(r[0].sum() + r[1].sum(), values) for r in (found, expected)))
    torch._dynamo.config.error_on_recompile = False
    step = torch.compile(dplr_step, backend="aot_eager", fullgraph=True)
    for length in (1, 3):
        *inputs, state = (x.detach() for x in draw(2, length, 1, 4, 3, dtype=torch.float32).values())
        torch.testing.assert_close(step(*inputs, state), dplr_step(*inputs, state))


def test_compiles_into_one_graph() -> None:
    """In a process of its own: compilers cannot trace the tests' checks of shapes."""
    run = "import sys; sys.path.insert(0, sys.argv[1]); import test_dplr; test_dplr.compile_whole(); print('compiled')"
    found = subprocess.run(
        [sys.executable, "-c", run, str(Path(__file__).parent)], capture_output=True, text=True, timeout=200
    )
    assert found.stdout.endswith("compiled\n"), found.stderr[-3000:]


@pytest.mark.parametrize("with_state", [False, True])
def test_the_op_is_registered_rightly(with_state: bool) -> None:
    """torch's own checks: schema, fake tensors, autograd registration."""
    *inputs, state = draw(1, 20, 2, 4, 3, dtype=torch.float32).values()
    starts = torch.rand(1, 20) < 0.2 if with_state else None
    torch.library.opcheck(
        chunked.dplr_chunked, (*inputs, starts, state if with_state else None),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


def test_no_second_derivative_in_silence() -> None:
    inputs = draw(1, 5, 1, 2, 2)
    (grad,) = torch.autograd.grad(dplr(**inputs)[0].sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.square().sum(), inputs["k"])


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("k", (1, 6, 2, 3), r"k of shape \(1, 6, 2, 4\), found \(1, 6, 2, 3\)"),
        ("v", (1, 6, 3, 3), r"v of shape \(1, 6, 2, 3\)"),
        ("q", (1, 6, 8), "q with four axes"),
        ("a", (1, 5, 2, 4), "needs a of shape"),
        ("b", (1, 6, 1, 4), "needs b of shape"),
        ("log_decay", (1, 6, 2), "log_decay of shape"),
        ("starts", (6,), "starts of shape"),
        ("starts", (1, 6), "starts of type bool"),
        ("initial_state", (1, 2, 3, 4), r"initial_state of shape \(1, 2, 4, 3\)"),
    ],
)
def test_says_what_does_not_fit(name: str, shape: tuple[int, ...], said: str) -> None:
    from seqlong.kernels.dplr.op import check

    given = dict.fromkeys(("q", "k", "a", "b", "log_decay"), torch.zeros(1, 6, 2, 4)) | {"v": torch.zeros(1, 6, 2, 3)}
    others = {"starts": torch.zeros(1, 6, dtype=torch.bool), "initial_state": torch.zeros(1, 2, 4, 3)}
    changed = {name: torch.zeros(shape)}
    given, others = {n: changed.get(n, x) for n, x in given.items()}, others | changed
    with pytest.raises(ValueError, match=said):
        check("dplr", **given, state=("initial_state", others["initial_state"]), marks={"starts": others["starts"]})


def test_131072_tokens_in_linear_memory_and_time() -> None:
    """The last tokens against the loop over those that are not forgotten; the backward pass runs too."""
    length = 131072
    inputs = {n: x.detach() for n, x in draw(1, length, 1, 4, 4, "rwkv7", torch.float32).items()}
    inputs["log_decay"] = inputs["log_decay"] - 0.4
    del inputs["initial_state"]
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    output = final = torch.empty(0)
    grads: tuple[Tensor, ...] = ()

    def run() -> None:
        nonlocal output, final, grads
        output, final = dplr(**leaves)
        grads = torch.autograd.grad(output.sum(), list(leaves.values()))

    begin = time.perf_counter()
    assert grown(run) < 40e6  # outputs and gradients are 2 MB each
    assert time.perf_counter() - begin < 60
    for end in (1, 511, 512, 513, 70001, length):
        near = slice(max(0, end - 200), end)
        exact, state = dplr(*(x[:, near] for x in inputs.values()), implementation="reference")
        torch.testing.assert_close(output[:, end - 1], exact[:, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final, state, rtol=1e-4, atol=1e-4)
    tail = [x.detach()[:, -400:].double().requires_grad_() for x in leaves.values()]
    expected = torch.autograd.grad(dplr(*tail, implementation="reference")[0].sum(), tail)
    for found, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(found[:, -100:].double(), exact[:, -100:], rtol=1e-3, atol=1e-4)


def test_threads_share_nothing() -> None:
    inputs = {n: x.detach() for n, x in draw(1, 60, 1, 4, 3).items()}
    expected, found = dplr(**inputs)[0], []
    threads = [threading.Thread(target=lambda: found.append(dplr(**inputs)[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(x, expected) for x in found) and len(found) == 3
