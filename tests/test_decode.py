"""One token at a time: ssd_step against the general ops, and the Mamba2 mixer that uses it against its whole row."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seqlong.kernels.runtime import INTERPRETED
from seqlong.kernels.scalar_decay import ssd
from seqlong.kernels.scalar_decay.step import ssd_step
from seqlong.kernels.short_conv import short_conv
from seqlong.layout import SequenceLayout
from seqlong.mixers import Mamba2
from seqlong.mixers.mamba2 import Mamba2State

pytest.importorskip("triton", reason="these tests need Triton, with a GPU or with its interpreter")

from seqlong.kernels import triton_token_step
from seqlong.kernels.scalar_decay import triton_step

interpreted = pytest.mark.skipif(not INTERPRETED, reason="on a GPU the tests marked gpu run instead")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is full of NaN: an element that is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


#: heads, groups, key width, value width, taps
SHAPES = {
    "one group": (2, 1, 16, 8, 4),
    "groups": (4, 2, 8, 4, 3),
    "odd": (3, 1, 5, 7, 2),
    "no memory": (2, 2, 3, 6, 1),
}


def inputs(shape: str, steps: int, dtype: torch.dtype, device: str = "cpu", rows: int = 2) -> dict[str, Tensor]:
    """A projected row, parameters and states, in float64 values that ``dtype`` can hold."""
    heads, groups, k, v, taps = SHAPES[shape]
    channels = heads * v + 2 * groups * k
    projected = torch.randn(rows, steps, 5 + channels + heads, device=device)
    return {
        "projected": projected.to(dtype).double(),
        "conv": torch.randn(rows, taps - 1, channels, device=device).to(dtype).double(),
        "ssm": torch.randn(rows, heads, k, v, device=device).double(),
        "weight": (torch.randn(channels, taps, device=device) * 0.5).double(),
        "bias": torch.randn(channels, device=device).double(),
        "a_log": torch.randn(heads, device=device).double(),
        "d": torch.randn(heads, device=device).double(),
        "dt_bias": torch.randn(heads, device=device).double(),
    }


def parts(x: dict[str, Tensor], shape: str) -> tuple[Tensor, Tensor]:
    """The channels of the convolution and the raw steps, as parts of the projection."""
    heads, groups, k, v, _ = SHAPES[shape]
    _, xbc, dt = x["projected"].split([5, heads * v + 2 * groups * k, heads], dim=-1)
    return xbc, dt


def whole(
    x: dict[str, Tensor], shape: str, starts: Tensor | None, real: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The row by the float64 definitions of both ops."""
    heads, groups, k, v, _ = SHAPES[shape]
    xbc, dt = parts(x, shape)
    mixed, conv = short_conv(
        xbc, x["weight"], x.get("bias"), starts=starts, state=x["conv"], output_state=True, implementation="reference",
        lengths=None if real is None else real.sum(1),
    )  # fmt: skip
    if real is not None:
        dt = dt.masked_fill(~real[..., None], -torch.inf)
    u, b, c = mixed.split([heads * v, groups * k, groups * k], dim=-1)
    y, ssm = ssd(
        u.unflatten(2, (heads, v)), dt, -x["a_log"].exp(), b.unflatten(2, (groups, k)), c.unflatten(2, (groups, k)),
        d=x.get("d"), dt_bias=x.get("dt_bias"), starts=starts, initial_state=x["ssm"], implementation="reference",
    )  # fmt: skip
    assert conv is not None
    return y, conv, ssm


def stepwise(
    x: dict[str, Tensor], shape: str, dtype: torch.dtype, starts: Tensor | None, real: Tensor | None, how: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    xbc, dt = (y.to(dtype) for y in parts(x, shape))
    conv, ssm, ys = x["conv"].to(dtype), x["ssm"].to(wide), []
    named = {name: x[name].to(wide) for name in ("d", "dt_bias") if name in x}
    bias = x["bias"].to(wide) if "bias" in x else None
    for t in range(xbc.shape[1]):
        y, conv, ssm = ssd_step(
            xbc[:, t], dt[:, t], conv, ssm, x["weight"].to(wide), bias, x["a_log"].to(wide), **named,
            starts=None if starts is None else starts[:, t], padding=None if real is None else ~real[:, t],
            implementation=how,
        )  # fmt: skip
        ys.append(y)
    return torch.stack(ys, dim=1), conv, ssm


WAYS = [
    pytest.param("triton", torch.float32, 1e-6, marks=interpreted),
    pytest.param("triton", torch.bfloat16, 1e-2, marks=interpreted),
    ("chunked", torch.float64, 1e-13),
    ("chunked", torch.bfloat16, 1e-2),
    ("reference", torch.float64, 1e-13),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("how", "dtype", "limit"), WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_the_row(shape: str, how: str, dtype: torch.dtype, limit: float, packed: bool) -> None:
    """Outputs, and both states after the row, with segments and padding or without."""
    x = inputs(shape, 10, dtype)
    starts = real = None
    if packed:
        starts, real = torch.zeros(2, 10, dtype=torch.bool), torch.ones(2, 10, dtype=torch.bool)
        starts[0, [0, 3, 4]] = starts[1, 9] = True
        real[0, 7:] = False
    if shape == "no memory":
        x = {name: value for name, value in x.items() if name not in ("bias", "d", "dt_bias")}
    expected = whole(x, shape, starts, real)
    found = stepwise(x, shape, dtype, starts, real, how)
    if real is not None:
        expected = (expected[0][real], *expected[1:])
        found = (found[0][real], *found[1:])
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == torch.promote_types(dtype, torch.float32)
    for name, a, b in zip(("output", "inputs kept", "state"), found, expected, strict=True):
        if b.numel():
            assert error(a, b) < limit, f"{name}: {error(a, b):.1e}"


@interpreted
@pytest.mark.parametrize("columns", [1, 2, 8])
def test_a_head_cut_into_columns_is_the_head(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs("odd", 6, torch.float32)
    monkeypatch.setattr(triton_step, "value_columns", lambda *_: columns)
    for a, b in zip(stepwise(x, "odd", torch.float32, None, None, "triton"), whole(x, "odd", None, None), strict=True):
        assert error(a, b) < 1e-6


def test_columns_are_cut_until_the_device_is_full_and_never_too_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_token_step, "_processors", lambda _: 132)
    columns = partial(triton_token_step.value_columns, device=torch.device("cpu"))
    assert columns(1, 32, 128, 64) == 8  # 256 programs: no smaller piece is worth one
    assert columns(8, 32, 128, 64) == 32
    assert columns(64, 32, 128, 64) == 64
    assert columns(64, 32, 256, 256) == 32
    assert columns(1, 2, 1024, 128) == 1


def test_states_given_are_not_changed() -> None:
    x = inputs("groups", 1, torch.float32)
    how = "triton" if INTERPRETED else None
    conv, ssm = x["conv"].float(), x["ssm"].float()
    before = conv.clone(), ssm.clone()
    xbc, dt = (y[:, 0].float() for y in parts(x, "groups"))
    _, *after = ssd_step(xbc, dt, conv, ssm, x["weight"].float(), None, x["a_log"].float(), implementation=how)
    assert torch.equal(conv, before[0]) and torch.equal(ssm, before[1])
    assert not torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


@interpreted
def test_what_was_before_a_start_leaves_nothing_even_nan() -> None:
    x = inputs("one group", 1, torch.float32)
    x["conv"].fill_(torch.nan), x["ssm"].fill_(torch.nan)
    for how in ("triton", "chunked"):
        starts = torch.ones(2, 1, dtype=torch.bool)
        y, conv, ssm = stepwise(x, "one group", torch.float32, starts, None, how)
        assert y.isfinite().all() and ssm.isfinite().all() and conv.isfinite().all()


def test_what_does_not_fit_is_said() -> None:
    x = inputs("groups", 1, torch.float32)
    xbc, dt = (y[:, 0].float() for y in parts(x, "groups"))
    conv, ssm, weight, a_log = (x[name].float() for name in ("conv", "ssm", "weight", "a_log"))
    with pytest.raises(ValueError, match=r"needs 4 x 4 channels, and 2 x 8 .* found 44"):
        ssd_step(xbc[:, :44], dt, conv[..., :44], ssm, weight[:44], None, a_log)
    with pytest.raises(ValueError, match="needs 3 earlier inputs, found 2"):
        ssd_step(xbc, dt, conv, ssm, torch.cat([weight, weight], 1)[:, :4], None, a_log)
    with pytest.raises(ValueError, match="has no gradient"):
        ssd_step(xbc.requires_grad_(), dt, conv, ssm, weight, None, a_log, implementation="triton")
    with pytest.raises(ValueError, match="does not compute in"):
        ssd_step(xbc.detach().double(), dt, conv, ssm, weight, None, a_log, implementation="triton")


@interpreted
def test_the_op_is_sound_for_whoever_traces() -> None:
    x = inputs("groups", 1, torch.bfloat16)
    xbc, dt = (y[:, 0].bfloat16() for y in parts(x, "groups"))
    rest = [x[name].float() for name in ("ssm", "weight", "bias", "a_log", "d", "dt_bias")]
    arguments = (xbc, dt, x["conv"].bfloat16(), *rest, None, torch.tensor([True, False]))
    torch.library.opcheck(triton_step.ssd_step_triton, arguments, test_utils=("test_schema", "test_faketensor"))
    for a, b in zip(triton_step.ssd_step_triton(*arguments), triton_step.launch(*arguments), strict=True):
        assert torch.equal(a, b)


# -- The mixer ---------------------------------------------------------------------------------------------------------

MIXERS: dict[str, Callable[[int], Mamba2]] = {
    "plain": partial(Mamba2, d_state=8, head_dim=16),
    "groups": partial(Mamba2, d_state=6, head_dim=4, groups=2, expand=1, conv_width=3, conv_bias=False),
    "wide filter": partial(Mamba2, d_state=8, head_dim=16, groups=2, conv_width=6, recompute=True),
}


def mixer_of(name: str, dtype: torch.dtype = torch.float32) -> Mamba2:
    mixer = MIXERS[name](16)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer.to(dtype)


def layouts() -> dict[str, SequenceLayout]:
    ids = torch.tensor([[1] * 3 + [2] + [3] * 4 + [0] * 2, [1] * 5 + [2] * 5, [0] * 10], dtype=torch.int32)
    return {"plain": SequenceLayout.build(3, 10), "packed": SequenceLayout.build(3, 10, ids)}


@pytest.mark.parametrize("how", [pytest.param("triton", marks=interpreted), "chunked", "reference"])
@pytest.mark.parametrize("packed", ["plain", "packed"])
@pytest.mark.parametrize("name", MIXERS)
def test_decoding_is_training(name: str, packed: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix, then token by token: the outputs of the whole row, which is computed by the definitions."""
    mixer, layout, hidden = mixer_of(name), layouts()[packed], torch.randn(3, 10, 16)
    monkeypatch.setenv("SEQLONG_KERNELS", "reference")
    expected = copy.deepcopy(mixer).double()(hidden.double(), layout)[0]
    with torch.no_grad():
        first, state = mixer(hidden[:, :4], layout.slice(0, 4), mixer.initial_state(3, "cpu", torch.float32))
        outputs = [first]
        monkeypatch.setenv("SEQLONG_KERNELS", how)
        monkeypatch.setattr(Mamba2, "_scan", None)  # from here on the step alone
        for t in range(4, 10):
            output, state = mixer(hidden[:, t : t + 1], layout.slice(t, t + 1), state)
            outputs.append(output)
    real = torch.ones(3, 10, dtype=torch.bool) if layout.padding is None else ~layout.padding
    found = torch.cat(outputs, dim=1)
    assert found.isfinite().all() and isinstance(state, Mamba2State)
    assert error(found[real], expected[real]) < 1e-6


@pytest.mark.parametrize("how", [pytest.param("triton", marks=interpreted), "chunked"])
def test_a_row_without_a_token_keeps_its_state(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a batch may end apart: what stands in the others, even NaN, changes nothing."""
    mixer, hidden = mixer_of("plain"), torch.randn(2, 1, 16)
    state = mixer.initial_state(2, "cpu", torch.float32).map(torch.randn_like)
    monkeypatch.setenv("SEQLONG_KERNELS", how)
    with torch.no_grad():
        _, alone = mixer(hidden, SequenceLayout.build(2, 1), state)
        hidden[1] = torch.nan
        idle = SequenceLayout.build(2, 1, torch.tensor([[1], [0]], dtype=torch.int32))
        output, after = mixer(hidden, idle, state)
    assert output[0].isfinite().all() and isinstance(after, Mamba2State) and isinstance(alone, Mamba2State)
    for given, found, expected in ((state.ssm, after.ssm, alone.ssm), (state.conv, after.conv, alone.conv)):
        assert torch.equal(found[1], given[1]) and torch.equal(found[0], expected[0])
        assert not torch.equal(found[0], given[0])


@interpreted
@pytest.mark.parametrize("each", [2, 3, 8])
def test_a_few_tokens_at_a_time_are_the_row(each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, layout, hidden = mixer_of("plain"), layouts()["packed"], torch.randn(3, 10, 16)
    expected = copy.deepcopy(mixer).double()(hidden.double(), layout)[0]
    monkeypatch.setenv("SEQLONG_KERNELS", "triton")
    with torch.no_grad():
        state, outputs = mixer.initial_state(3, "cpu", torch.float32), []
        for t in range(0, 10, each):
            output, state = mixer(hidden[:, t : t + each], layout.slice(t, min(10, t + each)), state)
            outputs.append(output)
    real = ~layout.padding
    assert error(torch.cat(outputs, dim=1)[real], expected[real]) < 1e-6


def test_one_token_with_gradients_is_not_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, hidden = mixer_of("plain"), torch.randn(2, 1, 16, requires_grad=True)
    monkeypatch.setattr(Mamba2, "_step", None)
    output, _ = mixer(hidden, SequenceLayout.build(2, 1), mixer.initial_state(2, "cpu", torch.float32))
    output.square().sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().max() > 0


# -- On a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("shape", [*SHAPES, "large"])
def test_steps_are_the_row_on_a_gpu(
    shape: str, rows: int, dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "large", (32, 1, 128, 64, 4))
    x = inputs(shape, 20, dtype, "cuda", rows)
    starts = torch.rand(rows, 20, device="cuda") < 0.1
    found = stepwise(x, shape, dtype, starts, None, None)
    again = stepwise(x, shape, dtype, starts, None, None)
    for a, b, c in zip(found, whole(x, shape, starts, None), again, strict=True):
        assert torch.equal(a, c), "two runs differ"
        if b.numel():
            assert error(a, b) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64])
def test_a_step_of_the_mixer_is_captured_in_a_cuda_graph(rows: int) -> None:
    """Static tensors in, static tensors out, the states copied back inside the graph; replayed for 30 tokens."""
    torch.use_deterministic_algorithms(False)  # what fills memory is no part of a captured step
    mixer = Mamba2(256, d_state=128, head_dim=64).cuda().bfloat16()
    hidden = torch.randn(rows, 30, 256, device="cuda", dtype=torch.bfloat16)
    layout = SequenceLayout.build(rows, 30, device="cuda")
    with torch.no_grad():
        expected, outputs, state = [], [], mixer.initial_state(rows, "cuda", torch.bfloat16)
        for t in range(30):
            output, state = mixer(hidden[:, t : t + 1], layout.slice(t, t + 1), state)
            expected.append(output)
        token, one = torch.empty_like(hidden[:, :1]), SequenceLayout.build(rows, 1, device="cuda")
        held = mixer.initial_state(rows, "cuda", torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result, after = mixer(token, one, held)
            held.ssm.copy_(after.ssm), held.conv.copy_(after.conv)
        held.ssm.zero_(), held.conv.zero_()
        for t in range(30):
            token.copy_(hidden[:, t : t + 1])
            graph.replay()
            outputs.append(result.clone())
    assert torch.equal(torch.cat(outputs, 1), torch.cat(expected, 1))
    assert torch.equal(held.ssm, state.ssm) and torch.equal(held.conv, state.conv)


def compiled_steps(device: str) -> None:
    """One step of the mixer, compiled whole, equals eager; on a GPU neither waits for it."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    mixer = Mamba2(256, d_state=128, head_dim=64).to(device, dtype)
    hidden, one = torch.randn(3, 1, 256, device=device, dtype=dtype), SequenceLayout.build(3, 1, device=device)
    state = mixer.initial_state(3, device, dtype)
    with torch.no_grad():
        expected, after = mixer(hidden, one, state)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            mixer(hidden, one, state)
            torch.cuda.set_sync_debug_mode("default")
        backend = "inductor" if device == "cuda" else "aot_eager"
        found, compiled_after = torch.compile(mixer, fullgraph=True, backend=backend)(hidden, one, state)
    assert error(found, expected) < 1e-2 and error(compiled_after.ssm, after.ssm) < 1e-2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_of_the_mixer_compiles_and_does_not_wait_for_the_gpu(device: str) -> None:
    """In its own process: shapes checked at run time, as in tests, cannot be traced."""
    code = f"import runpy; runpy.run_path({str(Path(__file__))!r})['compiled_steps']({device!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
