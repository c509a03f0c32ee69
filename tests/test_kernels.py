"""Every op against its float64 definition: outputs, gradients, final states; odd lengths, extremes, poisoned memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.utils._python_dispatch
from torch import Tensor

from seqlong.errors import ConfigError
from seqlong.kernels import dispatch, tuning
from seqlong.kernels.attention import attention
from seqlong.kernels.attention import op as attention_op
from seqlong.kernels.cross_entropy import linear_cross_entropy
from seqlong.kernels.norm import gated_rms_norm, rms_norm
from seqlong.kernels.runtime import constant_when_traced
from seqlong.kernels.scalar_decay import chunked, scalar_decay
from seqlong.kernels.scalar_decay.inputs import check
from seqlong.kernels.scalar_decay.plan import Plan, settled, why_none
from seqlong.kernels.scalar_decay.reference import scalar_decay_reference
from seqlong.kernels.short_conv import op as conv_op
from seqlong.kernels.short_conv import short_conv
from seqlong.kernels.short_conv.reference import short_conv_reference


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
    """Chunks, blocks and tiles small enough that short rows cross many of them."""
    monkeypatch.setitem(chunked.SIZES, "cpu", (16, 48))
    monkeypatch.setattr(conv_op, "TILE", 7)
    monkeypatch.setattr(attention_op, "BLOCK", 5)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def agree(found: Iterator[Tensor] | list[Tensor], expected: Iterator[Tensor] | list[Tensor], tol: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


GATES = {
    "usual": lambda shape: -torch.rand(shape, dtype=torch.float64) * 2,
    "none": lambda shape: torch.zeros(shape, dtype=torch.float64),
    "strong": lambda shape: torch.full(shape, -100.0, dtype=torch.float64),
    "mixed": lambda shape: -(torch.rand(shape, dtype=torch.float64) ** 8) * 1e4,
    "forgets": lambda shape: torch.where(torch.rand(shape) < 0.2, -torch.inf, -0.1).double(),
}


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("rows", "length", "groups", "heads", "width", "value_width"),
    [(2, 1, 1, 1, 3, 5), (1, 15, 2, 4, 8, 6), (2, 16, 1, 3, 4, 4), (1, 17, 3, 3, 5, 16), (2, 131, 2, 6, 7, 3)],
)
def test_scalar_decay(
    rows: int, length: int, groups: int, heads: int, width: int, value_width: int, gate: str, reverse: bool
) -> None:
    q, k = double(rows, length, groups, width), double(rows, length, groups, width)
    v, state = double(rows, length, heads, value_width), double(rows, heads, width, value_width)
    g = GATES[gate]((rows, length, heads)).requires_grad_()
    weigh = torch.randn_like(v), torch.randn_like(state)
    for starts in (None, torch.rand(rows, length) < 0.1, torch.ones(rows, length, dtype=torch.bool)):
        results = []
        for implementation in ("chunked", "reference"):
            output, final = scalar_decay(
                q, k, v, g, starts=starts, initial_state=state, reverse=reverse, implementation=implementation
            )
            loss = (output * weigh[0]).sum() + (final * weigh[1]).sum()
            results.append([output, final, *torch.autograd.grad(loss, (q, k, v, g, state))])
        # Sums of gates of -1e4 within a chunk leave 1e-11 of float64 in the exponent.
        agree(*results, tol=1e-9 if gate == "mixed" else 1e-11)


@pytest.mark.usefixtures("small_pieces")
def test_scalar_decay_without_state_and_with_only_one_gradient() -> None:
    q, k, v, g = double(1, 40, 1, 4), double(1, 40, 1, 4), double(1, 40, 2, 3), GATES["usual"]((1, 40, 2))
    g.requires_grad_()
    for pick in (0, 1):
        found = torch.autograd.grad(scalar_decay(q, k, v, g)[pick].sum(), (q, k, v, g), allow_unused=True)
        expected = torch.autograd.grad(scalar_decay_reference(q, k, v, g)[pick].sum(), (q, k, v, g), allow_unused=True)
        expected = [torch.zeros_like(x) if e is None else e for e, x in zip(expected, (q, k, v, g), strict=True)]
        agree(list(found), expected, tol=1e-11)


def test_scalar_decay_gradcheck_is_independent_of_the_reference() -> None:
    inputs = (
        double(1, 9, 1, 3),
        double(1, 9, 1, 3),
        double(1, 9, 2, 2),
        -torch.rand(1, 9, 2).double(),
        double(1, 2, 3, 2),
    )
    inputs[3].requires_grad_()
    starts = torch.tensor([[False] * 4 + [True] + [False] * 4])
    assert torch.autograd.gradcheck(
        lambda q, k, v, g, s: scalar_decay(q, k, v, g, starts=starts, initial_state=s), inputs
    )


def test_scalar_decay_in_float32_keeps_its_digits_on_a_long_row() -> None:
    """Errors relative to float64 on 8,192 tokens, the decay's gradient included, which naive sums lose."""
    q, k = torch.randn(2, 1, 8192, 1, 16).unbind()
    v, g = torch.randn(1, 8192, 4, 8), -torch.rand(1, 8192, 4) * torch.tensor([1e-4, 1e-2, 0.1, 3.0])
    results = []
    for dtype in (torch.float64, torch.float32):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v, g)]
        output, final = scalar_decay(*inputs)
        grads = torch.autograd.grad(output.square().sum(), inputs)
        results.append([x.double() for x in (output, final, *grads)])
    for exact, found in zip(*results, strict=True):
        assert ((exact - found).norm() / exact.norm()).item() < 2e-5


def test_scalar_decay_at_131072_tokens() -> None:
    """Spot checks against the recurrence: strong decays forget, so the last 2,000 tokens decide a position."""
    q, k = torch.randn(2, 1, 131072, 1, 4).unbind()
    v, g = torch.randn(1, 131072, 2, 4), -0.02 - torch.rand(1, 131072, 2)
    output, final = scalar_decay(q, k, v, g)
    for position in (0, 63, 64, 1023, 1024, 70001, 131071):
        near = slice(max(0, position - 2000), position + 1)
        expected, state = scalar_decay_reference(q[:, near], k[:, near], v[:, near], g[:, near])
        torch.testing.assert_close(output[:, position], expected[:, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final, state, rtol=1e-4, atol=1e-4)


def test_a_gate_that_forgets_all_leaves_digits_to_the_others() -> None:
    """In float32, however many gates of a chunk forget much, the tokens after them are exact, and so are gradients."""
    for gate, share in ((-1e4, 0.05), (-1e30, 0.3), (-torch.inf, 0.6), (-20.0, 0.5)):
        q, k, v = torch.randn(3, 1, 256, 2, 8).unbind()
        g = torch.where(torch.rand(1, 256, 2) < share, gate, -0.01)
        weight, results = torch.randn(1, 256, 2, 8), []
        for dtype, how in ((torch.float32, "chunked"), (torch.float64, "reference")):
            inputs = [x.to(dtype).requires_grad_() for x in (q, k, v, g)]
            output, final = scalar_decay(*inputs, implementation=how)
            grads = torch.autograd.grad((output * weight).sum(), inputs)
            results.append([x.nan_to_num() for x in (output, final, *grads)])
        for found, exact in zip(*results, strict=True):
            assert ((found - exact).norm() / exact.norm()).item() < 2e-6, (gate, share)


FITTING = {
    "q": (1, 6, 2, 4), "k": (1, 6, 2, 4), "v": (1, 6, 4, 3), "log_decay": (1, 6, 4), "starts": (1, 6),
    "initial_state": (1, 4, 4, 3),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("v", (1, 6, 3, 3), "3 heads, 2 groups"),
        ("q", (1, 6, 8), "q with four axes"),
        ("k", (1, 5, 2, 4), r"k of shape \(1, 6, 2, 4\), found \(1, 5, 2, 4\)"),
        ("v", (1, 7, 4, 3), "v of shape"),
        ("log_decay", (1, 6, 1), r"log_decay of shape \(1, 6, 4\)"),
        ("log_decay", (3,), r"log_decay of shape \(4,\)"),
        ("starts", (6,), "starts of shape"),
        ("initial_state", (1, 4, 3, 4), r"initial_state of shape \(1, 4, 4, 3\), found \(1, 4, 3, 4\)"),
        ("starts", (1, 6), "starts of type bool"),
    ],
)
def test_scalar_decay_says_what_does_not_fit(name: str, shape: tuple[int, ...], said: str) -> None:
    """Without the tests' own shape checks, which users do not have."""
    given = {one: torch.zeros(size) for one, size in FITTING.items()}
    given["starts"] = given["starts"].bool()
    given[name] = torch.zeros(shape, dtype=torch.bool if (name, shape) == ("starts", (6,)) else torch.float32)
    q, k, v, gate = (given[one] for one in ("q", "k", "v", "log_decay"))
    with pytest.raises(ValueError, match=said):
        check("scalar_decay", ("q", q), ("k", k), ("v", v), ("log_decay", gate), starts=given["starts"],
              initial_state=given["initial_state"])  # fmt: skip
    good = [(one, torch.zeros(FITTING[one])) for one in ("q", "k", "v", "log_decay")]
    check("ssd", *good, per_head={"a": torch.zeros(4), "d": None})
    with pytest.raises(ValueError, match=r"ssd needs a of shape \(4,\), found \(1,\)"):
        check("ssd", *good, per_head={"a": torch.zeros(1)})


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 30])
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_short_conv(length: int, taps: int, bias: bool) -> None:
    x, weight, state = double(2, length, 5), double(5, taps), double(2, taps - 1, 5)
    offset = double(5) if bias else None
    inputs = [y for y in (x, weight, state, offset) if y is not None]
    for starts in (None, torch.rand(2, length) < 0.3, torch.ones(2, length, dtype=torch.bool)):
        output, after = short_conv(x, weight, offset, starts=starts, state=state, output_state=True)
        expected, expected_after = short_conv_reference(x, weight, offset, starts, state)
        assert after is not None
        weigh = torch.randn_like(output), torch.randn_like(after)
        loss = (output * weigh[0]).sum() + (after * weigh[1]).sum()
        definition = (expected * weigh[0]).sum() + (expected_after * weigh[1]).sum()
        agree(
            [output, after, *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)],
            [
                expected,
                expected_after,
                *torch.autograd.grad(definition, inputs, allow_unused=True, materialize_grads=True),
            ],
            tol=1e-12,
        )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gated_rms_norm(groups: int) -> None:
    x, gate, weight = double(2, 5, 8), double(2, 5, 8), double(8)
    assert torch.autograd.gradcheck(lambda *a: gated_rms_norm(*a, groups=groups), (x, gate, weight))
    gated = (x * torch.nn.functional.silu(gate)).unflatten(2, (groups, -1))
    expected = (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2) * weight
    agree([gated_rms_norm(x, gate, weight, groups)], [expected], tol=1e-12)


def test_rms_norm_takes_the_mean_in_float32() -> None:
    x, weight = 300 * torch.randn(4, 64), torch.rand(64)
    found = rms_norm(x.half(), weight)  # squares of 300 overflow float16
    assert found.dtype == torch.float16
    agree([found.float()], [rms_norm(x.double(), weight.double()).float()], tol=2e-3)


@pytest.mark.parametrize("chunk", [0, 1, 3, 100])
def test_linear_cross_entropy(chunk: int) -> None:
    hidden, weight, bias = double(2, 5, 4), double(7, 4), double(7)
    targets = torch.randint(0, 7, (2, 5))
    targets[0, 1] = targets[1, 4] = -1
    weigh = torch.randn(2, 5, dtype=torch.float64)
    found = linear_cross_entropy(hidden, weight, targets, bias=bias, chunk=chunk)
    logits = hidden @ weight.T + bias
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none"
    ).view(2, 5)
    wanted = (hidden, weight, bias)
    agree(
        [found, *torch.autograd.grad((found * weigh).sum(), wanted)],
        [expected, *torch.autograd.grad((expected * weigh).sum(), wanted)],
        tol=1e-12,
    )
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, z_loss=0.1, chunk=chunk), wanted
    )


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("length", "keys"), [(17, 17), (6, 17), (1, 9)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("sloped", [False, True])
def test_attention(length: int, keys: int, causal: bool, window: int | None, sloped: bool) -> None:
    q, k, v = double(2, length, 4, 6), double(2, keys, 2, 6), double(2, keys, 2, 3)
    slopes = torch.rand(4, dtype=torch.float64) if sloped else None
    weigh = torch.randn(2, length, 4, 3, dtype=torch.float64)
    ways: list[dict] = [{}]
    if length == keys:
        ids = torch.tensor([[1] * 3 + [2] + [3] * 9 + [0] * 4, [1] * 17])
        spans = [[(0, 3), (3, 4), (4, 13)], [(0, 17)]]
        ways += [{"query_ids": ids, "key_ids": ids}, {"query_ids": ids, "key_ids": ids, "boundaries": spans}]
    for way in ways:
        results = []
        for implementation in ("reference", None):
            out = attention(q, k, v, causal=causal, window=window, slopes=slopes, implementation=implementation, **way)
            assert out.isfinite().all()
            if way:
                out = out * (ids > 0)[..., None, None]
            results.append([out, *torch.autograd.grad((out * weigh).sum(), (q, k, v))])
        agree(*results, tol=1e-11)


def test_attention_memory_is_linear_in_the_row() -> None:
    """A window over 65,536 tokens: a mask of t² would be 4 GiB in bool alone."""
    q = torch.randn(1, 65536, 1, 4)
    out = attention(q, q, q, window=8)
    expected = attention(q[:, -100:], q[:, -100:], q[:, -100:], window=8)
    agree([out[:, -50:]], [expected[:, -50:]], tol=1e-5)


def test_dispatch_obeys_the_caller_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = {"fast": "it is fast", "slow": "it is right"}
    assert dispatch.choose("op", offered, "fast") == dispatch.Choice("fast", "it is fast")
    monkeypatch.setenv("SEQLONG_KERNELS", "slow")
    assert dispatch.choose("op", offered, "fast").implementation == "slow"
    assert dispatch.choose("op", offered, "fast", "fast").implementation == "fast"
    monkeypatch.setenv("SEQLONG_KERNELS", "triton")
    choice = dispatch.choose("op", offered, "fast")
    assert choice.implementation == "fast" and "triton cannot be used" in choice.reason
    with pytest.raises(ValueError, match="no implementation 'cuda'; it has fast, slow"):
        dispatch.choose("op", offered, "fast", "cuda")
    monkeypatch.setenv("SEQLONG_KERNELS", "choncked")
    with pytest.raises(ConfigError, match="names no implementation; did you mean 'chunked'"):
        dispatch.choose("op", offered, "fast")


@pytest.mark.parametrize("with_state", [False, True])
def test_custom_ops_are_registered_rightly(with_state: bool) -> None:
    """torch's own checks: schema, fake tensors, autograd registration."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    q, k, v, g = (torch.randn(1, 20, *s) for s in ((1, 4), (1, 4), (2, 3), (2,)))
    state = torch.randn(1, 2, 4, 3) if with_state else None
    starts = torch.rand(1, 20) < 0.2 if with_state else None
    needs = [x.requires_grad_() for x in (q, k, v, g)]
    torch.library.opcheck(chunked.scalar_decay_chunked, (*needs, starts, state), test_utils=checks)
    x, weight = torch.randn(1, 9, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    torch.library.opcheck(conv_op._short_conv, (x, weight, None, None, torch.zeros(1, 2, 4)), test_utils=checks)


def test_attention_cannot_be_forced_into_what_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 30, 1, 4, dtype=torch.float64)
    ids = torch.tensor([[1] * 11 + [2] * 19])
    monkeypatch.setenv("SEQLONG_KERNELS", "sdpa")
    for way in ({"window": 8}, {"query_ids": ids, "key_ids": ids}, {"slopes": torch.ones(1, dtype=torch.float64)}):
        agree([attention(q, q, q, **way)], [attention(q, q, q, implementation="reference", **way)], tol=1e-11)
        with pytest.raises(ValueError, match="attention cannot run as sdpa"):
            attention(q, q, q, implementation="sdpa", **way)


def test_the_backward_of_blocks_touches_each_position_a_few_times_only() -> None:
    """Slices of a long row would each leave a gradient as long as the row: time and memory would grow with t²."""
    q = torch.randn(1, 64 * attention_op.BLOCK, 1, 4, requires_grad=True)
    out = attention(q, q, q, window=8)
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            sizes.append(result.numel() if isinstance(result, Tensor) else 0)
            return result

    with Sizes():
        out.sum().backward()
    assert sum(size >= q.numel() for size in sizes) < 64


def test_importing_ops_does_not_import_the_compiler() -> None:
    """It takes torch.compiler a second, which every process would pay."""
    ops = "attention cross_entropy delta_rule dplr grouped_matmul log_linear norm rotary scalar_decay short_conv"
    names = ", ".join(f"seqlong.kernels.{op}" for op in [*ops.split(), "vector_decay", "probes"])
    program = f"import sys; import {names}; print([name for name in sys.modules if name.startswith('torch._dynamo')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_compiler_keeps_the_answer_of_what_is_marked_constant() -> None:
    asked = []

    def answer() -> int:
        asked.append("a compiler that traced this would leave it to the graph")
        return len(asked)

    by_torch = torch.compiler.assume_constant_result(lambda: None)
    assert constant_when_traced(answer).__dict__ == by_torch.__dict__  # what a compiler looks at is torch's affair
    compiled = torch.compile(lambda x: x * answer(), backend="eager", fullgraph=True)
    assert [compiled(torch.ones(())).item() for _ in range(2)] == [1, 1] and len(asked) == 1


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's file of configurations, in a process that has settled nothing yet."""
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "own.json"))
    tuning.forget()
    yield tmp_path / "own.json"
    tuning.forget()


def test_plans_are_the_tuned_ones_and_a_compiler_can_ask_for_them(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q, v = torch.randn(1, 5, 1, 40), torch.randn(1, 5, 2, 8)
    tuned = {"scalar_decay": {"fp32 k64 v16 shared": {"run": 7}}, "ssd": {"fp32 k64 v16": {"run": 9}}}
    own.write_text(json.dumps(tuned))
    assert [settled(q, v, ssd=ssd).run for ssd in (False, True)] == [7, 9]
    assert settled(q.repeat(1, 1, 2, 1), v, ssd=False).run == Plan().run

    def ask(q: Tensor) -> tuple[Tensor, list[str | None]]:
        return q + 1, [why_none(q, v, ssd=ssd) for ssd in (False, True)]

    assert torch.compile(ask, backend="eager", fullgraph=True)(q)[1] == [None, None]
    monkeypatch.setattr(tuning, "settle", lambda op, *_: None if op == "ssd" else {"run": 7})
    torch.compiler.reset()
    found = torch.compile(ask, backend="eager", fullgraph=True)(q)[1]
    assert found[0] is None and "no configuration of the Triton kernels" in str(found[1])
    with pytest.raises(RuntimeError, match="no configuration of ssd's Triton kernels is right"):
        settled(q, v, ssd=True)
