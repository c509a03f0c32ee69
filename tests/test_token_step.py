"""The next tokens in one Triton launch, for every recurrence, against its float64 loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="these tests need Triton, with a GPU or with its interpreter")

from seqlong.kernels import triton_token_step
from seqlong.kernels.delta_rule import delta_rule_step
from seqlong.kernels.dplr import dplr_step
from seqlong.kernels.runtime import triton_runs_on
from seqlong.kernels.scalar_decay import scalar_decay_step
from seqlong.kernels.vector_decay import vector_decay_step

# The interpreter computes what a mask then throws away.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
Step = tuple[Callable[..., tuple[Tensor, Tensor]], dict[str, Tensor | None], dict[str, Any]]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    reason = triton_runs_on(request.param)
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


B, G, H, K, V = 3, 1, 2, 10, 12


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _scalar(n: int) -> Step:
    return scalar_decay_step, {"q": drawn(B, n, G, K), "k": drawn(B, n, G, K), "v": drawn(B, n, H, V),
                               "log_decay": -drawn(B, n, H).abs()}, {}  # fmt: skip


def _constant(n: int) -> Step:
    step, tensors, options = _scalar(n)
    return step, {**tensors, "log_decay": torch.tensor([-0.1, -3.0])}, options


def _gla(n: int) -> Step:
    tensors = {name: drawn(B, n, H, V if name == "v" else K) for name in ("q", "k", "v", "gate")}
    return vector_decay_step, {**tensors, "gate": 9 * tensors["gate"]}, {"activation": "logsigmoid", "divisor": 16.0}


def _hgrn2(n: int) -> Step:
    step, tensors, _ = _gla(n)
    return step, {**tensors, "k": None, "lower_bound": torch.rand(H, K)}, {"activation": "lower_bound"}


def _rwkv6(n: int) -> Step:
    step, tensors, _ = _gla(n)
    return step, {**tensors, "gate": -tensors["gate"].abs(), "bonus": drawn(H, K)}, {}  # type: ignore[union-attr]


def _delta(n: int) -> Step:
    return delta_rule_step, {"q": drawn(B, n, G, K), "k": drawn(B, n, G, K), "v": drawn(B, n, H, V),
                             "beta": drawn(B, n, H), "gate": None}, {
                             "normalize": True, "beta_activation": "sigmoid"}  # fmt: skip


def _gated_delta(n: int) -> Step:
    step, tensors, _ = _delta(n)
    return step, {**tensors, "gate": drawn(B, n, H), "rate": -torch.rand(H), "gate_bias": drawn(H)}, {
        "normalize": True, "beta_activation": "double_sigmoid", "gate_activation": "softplus"}  # fmt: skip


def _kda(n: int) -> Step:
    step, tensors, options = _gated_delta(n)
    return step, {**tensors, "gate": drawn(B, n, H, K), "gate_bias": drawn(H, K)}, options


def _plain_kda(n: int) -> Step:
    step, tensors, _ = _delta(n)
    beta, gate = torch.rand(B, n, H), -drawn(B, n, H, K).abs()
    gate[0, 0, 0] = -torch.inf
    return step, {**tensors, "beta": beta, "gate": gate, "k": 0.3 * drawn(B, n, G, K)}, {}


def _rwkv7(n: int) -> Step:
    names = {name: drawn(B, n, H, K) for name in ("q", "k", "a", "b")}
    return (
        dplr_step,
        {**names, "a": 0.3 * names["a"], "v": drawn(B, n, H, V), "log_decay": -drawn(B, n, H, K).abs()},
        {},
    )


STEPS = {
    "scalar": _scalar, "constant": _constant, "gla": _gla, "hgrn2": _hgrn2, "rwkv6": _rwkv6, "delta": _delta,
    "gated_delta": _gated_delta, "kda": _kda, "plain_kda": _plain_kda, "rwkv7": _rwkv7,
}  # fmt: skip
BY_TOKEN = ("q", "k", "v", "beta", "gate", "a", "b", "log_decay")


def cast(tensors: dict[str, Tensor | None], dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
    """Activations in the type; parameters stay float32."""
    return {
        name: None if x is None else x.to(device, dtype if name in BY_TOKEN and x.dim() == 4 else torch.float32)
        for name, x in tensors.items()
    }


def agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], limit: float) -> None:
    for name, a, b in zip(("output", "state"), found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        off = (a.double() - b.double()).norm() / b.double().norm()
        assert off < limit, f"{name}: {off:.1e}"


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", STEPS)
def test_it_is_its_definition(name: str, dtype: torch.dtype, tokens: int, device: str) -> None:
    step, tensors, options = STEPS[name](tokens)
    given = cast(tensors, dtype, device)
    state = drawn(B, H, K, V).to(device)
    starts = torch.zeros(B, tokens, dtype=torch.bool, device=device)
    starts[1, tokens // 2] = True
    found = step(**given, state=state, starts=starts, **options, implementation="triton")
    expected = step(**given, state=state, starts=starts, **options, implementation="reference")
    agree(found, expected, 1e-6 if dtype == torch.float32 else 4e-3)
    assert found[1].dtype == torch.float32 and found[0].dtype == dtype


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("implementation", ["triton", "chunked", "reference"])
def test_padding_leaves_the_state_alone(name: str, implementation: str, device: str) -> None:
    """Whatever stands there, NaN as well; a start there is none."""
    step, tensors, options = STEPS[name](3)
    padding = torch.tensor([[False] * 3, [False, True, True], [True] * 3], device=device)
    for key, x in tensors.items():
        if x is not None and key in BY_TOKEN and x.dim() > 1:
            x[padding.cpu()] = torch.nan
    given, state = cast(tensors, torch.float32, device), drawn(B, H, K, V).to(device)
    marks = {"starts": padding, "padding": padding}
    output, after = step(**given, state=state, **marks, **options, implementation=implementation)
    assert torch.equal(after[2], state[2].to(after.dtype))
    one = {key: x[1:2, :1] if x is not None and key in BY_TOKEN and x.dim() > 1 else x for key, x in given.items()}
    expected = step(**one, state=state[1:2], **options, implementation="reference")
    agree((output[1:2, :1], after[1:2]), expected, 1e-5)


def test_several_tokens_are_one_after_another_bit_by_bit(device: str) -> None:
    step, tensors, options = _kda(4)
    given, state = cast(tensors, torch.bfloat16, device), drawn(B, H, K, V).to(device)
    output, after = step(**given, state=state, **options, implementation="triton")
    outputs, one_by_one = [], state
    for n in range(4):
        token = {key: x[:, n : n + 1] if x is not None and key in BY_TOKEN else x for key, x in given.items()}
        read, one_by_one = step(**token, state=one_by_one, **options, implementation="triton")
        outputs.append(read)
    assert torch.equal(torch.cat(outputs, 1), output) and torch.equal(one_by_one, after)


@pytest.mark.parametrize("columns", [1, 4])
def test_a_head_cut_into_columns_is_the_head(columns: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step, tensors, options = _rwkv7(2)
    given, state = cast(tensors, torch.float32, device), drawn(B, H, K, V).to(device)
    expected = step(**given, state=state, **options, implementation="reference")
    monkeypatch.setattr(triton_token_step, "value_columns", lambda *_: columns)
    agree(step(**given, state=state, **options, implementation="triton"), expected, 1e-6)


def test_parts_of_a_projection_are_read_where_they_lie(device: str) -> None:
    """Queries, keys and values side by side in one row, as a mixer has them, and heads that are not."""
    step, tensors, options = _gated_delta(2)
    given, state = cast(tensors, torch.float32, device), drawn(B, H, K, V).to(device)
    expected = step(**given, state=state, **options, implementation="reference")
    row = torch.full((B, 5, 2 * G * K + H * V + 3), torch.nan, device=device)
    parts = row[:, 1:3, 3:].split([G * K, G * K, H * V], dim=2)
    for name, part in zip(("q", "k", "v"), parts, strict=True):
        part.copy_(given[name].flatten(2))  # type: ignore[union-attr]
        given[name] = part.unflatten(2, (-1, V if name == "v" else K))
    agree(step(**given, state=state, **options, implementation="triton"), expected, 1e-6)
    given["v"] = given["v"].transpose(2, 3).contiguous().transpose(2, 3)  # type: ignore[union-attr]
    agree(step(**given, state=state, **options, implementation="triton"), expected, 1e-6)


def test_the_state_given_is_not_changed_and_nothing_is_read_of_no_tokens(device: str) -> None:
    step, tensors, options = _gla(2)
    given, state = cast(tensors, torch.float32, device), drawn(B, H, K, V).to(device)
    copy = state.clone()
    step(**given, state=state, **options, implementation="triton")
    assert torch.equal(state, copy)
    none = {key: None if x is None else x[:, :0] for key, x in given.items()}
    output, after = step(**none, state=state, **options, implementation="triton")
    assert output.shape == (B, 0, H, V) and torch.equal(after, state)


def test_what_it_cannot_serve_is_said(device: str) -> None:
    step, tensors, options = _gla(1)
    given, state = cast(tensors, torch.float32, device), drawn(B, H, K, V).to(device)
    with pytest.raises(ValueError, match="has no gradient"):
        step(**given, state=state.requires_grad_(), **options, implementation="triton")
    in_double = {key: None if x is None else x.double() for key, x in given.items()}
    with pytest.raises(ValueError, match="does not compute in"):
        step(**in_double, state=state.detach().double(), **options, implementation="triton")
    with pytest.raises(ValueError, match="no implementation"):
        step(**given, state=state.detach(), **options, implementation="typo")


def test_the_op_keeps_its_promises(device: str) -> None:
    q, k, v, gate = (drawn(B, 2, H, x).to(device) for x in (K, K, V, K))
    state = drawn(B, H, K, V).to(device)
    plain, log_decay = triton_token_step.PLAIN, triton_token_step.LOG_DECAY
    arguments = (q, k, v, None, None, gate, *[None] * 7, state, plain, log_decay, 1.0, 0, False, 0.0)
    op = triton_token_step.token_step_triton
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    agree(op(*arguments), vector_decay_step(q, k, v, gate, state, implementation="reference"), 1e-6)
