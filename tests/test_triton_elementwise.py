"""Triton's short_conv, norms and rotary against their float64 definitions: on a GPU, and in the interpreter without."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from seqlong.kernels import runtime
from seqlong.kernels.norm import gated_rms_norm, rms_norm
from seqlong.kernels.norm import triton as norm_kernels
from seqlong.kernels.rotary import rotary
from seqlong.kernels.rotary import triton as rotary_kernels
from seqlong.kernels.short_conv import short_conv
from seqlong.kernels.short_conv import triton as conv_kernels

#: Largest relative error (root mean square) of what is stored in a type: that of rounding, with room.
STORED = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


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


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles small enough that tiny inputs cross several of them."""
    monkeypatch.setattr(conv_kernels, "FORWARD_BLOCK", 32)
    monkeypatch.setattr(conv_kernels, "BACKWARD_BLOCK", 32)
    monkeypatch.setattr(norm_kernels, "TILE", 64)
    monkeypatch.setattr(rotary_kernels, "TILE", 64)


def inside_poison(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Numbers in a view whose neighbours on every side of the last two axes are NaN, with no alignment to speak of."""
    wider = torch.full((*shape[:-2], shape[-2] + 2, shape[-1] + 9), torch.nan, device=device, dtype=dtype)
    view = wider[..., 1:-1, 5 : 5 + shape[-1]]
    view.copy_(torch.randn(shape, device=device))
    return view.requires_grad_()


def numbers(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, requires_grad=True)


def agree(found: Iterator[Tensor] | list[Tensor], exact: Iterator[Tensor] | list[Tensor]) -> None:
    """Relative error of each tensor: that of rounding to its type."""
    for number, (a, b) in enumerate(zip(found, exact, strict=True)):
        assert a.shape == b.shape
        assert a.isfinite().all(), f"tensor {number} is not finite"
        error = (a.double() - b.double()).norm()
        assert error <= STORED[a.dtype] * b.double().norm() + 1e-30, f"tensor {number}: {error} of {b.norm()}"


def double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().double().requires_grad_(x.requires_grad)


STARTS = {
    "no starts": lambda length: None,
    "start at 0": lambda length: [0],
    "consecutive starts": lambda length: [1, 2, 3, 9, 10, 14, 16, 17, 40, 47, 64],
}


@pytest.mark.parametrize(
    ("length", "taps", "bias", "with_state", "case", "dtype"),
    [
        *((length, 4, True, True, case, torch.float32) for length in (1, 2, 15) for case in STARTS),
        (65, 4, True, True, "consecutive starts", torch.float32),
        (17, 4, False, False, "no starts", torch.float32),
        (17, 4, False, False, "consecutive starts", torch.bfloat16),
        (17, 4, True, True, "start at 0", torch.bfloat16),
        *((17, taps, True, taps > 1, "consecutive starts", torch.float32) for taps in (1, 2, 3)),
    ],
)
def test_short_conv(
    length: int, taps: int, bias: bool, with_state: bool, case: str, dtype: torch.dtype, device: str
) -> None:
    width = 37
    x, weight = inside_poison(device, dtype, 2, length, width), numbers(device, width, taps)
    offset = numbers(device, width) if bias else None
    state = torch.randn(2, taps - 1, width, device=device).to(dtype).requires_grad_() if with_state else None
    starts = None
    if (steps := STARTS[case](length)) is not None:
        starts = torch.zeros(2, length, dtype=torch.bool, device=device)
        starts[0, [step for step in steps if step < length]] = True
    weigh = torch.randn(2, length, width, device=device).to(dtype), torch.randn(2, taps - 1, width, device=device)
    results = []
    for implementation in ("triton", "reference"):
        inputs = (x, weight, offset, state)
        x_, w_, b_, s_ = inputs if implementation == "triton" else map(double, inputs)
        output, after = short_conv(
            x_, w_, b_, starts=starts, state=s_, output_state=True, implementation=implementation
        )  # fmt: skip
        needs = [y for y in (x_, w_, b_, s_) if y is not None]
        grads = torch.autograd.grad([output, after], needs, [weigh[0].to(output.dtype), weigh[1].to(after.dtype)])
        results.append([output, after, *grads])
    agree(*results)


@pytest.mark.parametrize("taps", [1, 3, 4])
def test_short_conv_of_one_token_is_one_launch(taps: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_kernels, "short_conv_triton", None)
    x, weight = inside_poison(device, torch.float32, 3, 1, 37).detach(), numbers(device, 37, taps)
    state, offset = torch.randn(3, taps - 1, 37, device=device), numbers(device, 37)
    for starts in (None, torch.tensor([[True], [False], [True]], device=device)):
        with torch.no_grad():
            found = short_conv(
                x, weight, offset, starts=starts, state=state, output_state=True, implementation="triton"
            )  # fmt: skip
        exact = short_conv(
            x.double(), weight.double(), offset.double(), starts=starts, state=state.double(), output_state=True,
            implementation="reference",
        )  # fmt: skip
        agree(found, exact)


def test_short_conv_of_nothing(device: str) -> None:
    x, weight, state = numbers(device, 2, 0, 5), numbers(device, 5, 4), numbers(device, 2, 3, 5)
    output, after = short_conv(x, weight, state=state, output_state=True, implementation="triton")
    assert output.shape == (2, 0, 5) and torch.equal(after, state)
    grads = torch.autograd.grad([output, after], [x, weight, state], [output, torch.ones_like(after)])
    agree(grads, [torch.zeros_like(x), torch.zeros_like(weight), torch.ones_like(state)])


def test_the_number_of_programs_is_bounded(device: str) -> None:
    for length in (1, 100, 10**5, 10**7):
        x = torch.empty(1, device=device).expand(1, length, 2304)
        run, runs, programs = conv_kernels._runs(x, 128, 42)
        processors = torch.cuda.get_device_properties(device).multi_processor_count if x.is_cuda else 1
        assert (runs - 1) * run < length <= runs * run and run % conv_kernels.STEP == 0
        assert programs <= max(processors * 42, 18)


def test_kernels_say_why_they_cannot_serve(device: str) -> None:
    x, weight = torch.ones(1, 3, 5, device=device), torch.ones(5, 5, device=device)
    with pytest.raises(ValueError, match="short_conv cannot run in Triton: "):
        short_conv(x, weight, implementation="triton")
    with pytest.raises(ValueError, match="rms_norm cannot run in Triton: "):
        rms_norm(x.double(), weight[0].double(), implementation="triton")
    with pytest.raises(ValueError, match="rotary cannot run in Triton: "):
        rotary(x[:, :, None, :4].double(), torch.zeros(1, 3, dtype=torch.int64, device=device), implementation="triton")
    with pytest.raises(ValueError, match="found 5 and 2 groups"):
        gated_rms_norm(x, x, weight[0], 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 5), (2, 40), (15, 16), (2, 9, 3, 12), (1, 17, 200)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, weight = inside_poison(device, dtype, *shape), numbers(device, shape[-1])
    weigh = torch.randn(shape, device=device).to(dtype)
    results = []
    for implementation in ("triton", "reference"):
        x_, w_ = (x, weight) if implementation == "triton" else map(double, (x, weight))
        output = rms_norm(x_, w_, 1e-3, implementation=implementation)
        results.append([output, *torch.autograd.grad(output, [x_, w_], weigh.to(output.dtype))])
    agree(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "groups"), [(40, 1), (12, 3)])
@pytest.mark.parametrize("length", [1, 2, 17])
def test_gated_rms_norm(length: int, width: int, groups: int, dtype: torch.dtype, device: str) -> None:
    gate, weight = inside_poison(device, dtype, 2, length, width), numbers(device, width)
    x = torch.randn(2, length, width, device=device).to(dtype).requires_grad_()
    weigh = torch.randn(2, length, width, device=device).to(dtype)
    results = []
    for implementation in ("triton", "reference"):
        x_, z_, w_ = (x, gate, weight) if implementation == "triton" else map(double, (x, gate, weight))
        output = gated_rms_norm(x_, z_, w_, groups, implementation=implementation)
        results.append([output, *torch.autograd.grad(output, [x_, z_, w_], weigh.to(output.dtype))])
    agree(*results)


def test_norms_of_nothing_and_of_a_sum(device: str) -> None:
    """No rows; and a gradient that is one number, expanded."""
    weight = numbers(device, 5)
    for rows in (0, 3):
        x = numbers(device, rows, 5)
        found = torch.autograd.grad(rms_norm(x, weight, implementation="triton").sum(), [x, weight])
        exact = torch.autograd.grad(rms_norm(x, weight, implementation="chunked").sum(), [x, weight])
        torch.testing.assert_close(found, exact)


def test_norms_read_views_in_place(device: str) -> None:
    wide = torch.randn(2, 9, 4, 50, device=device)
    view = wide[:, :, 1, :16]
    for x in (wide[..., 3:19], wide[:, 2:8, :, :8], view, wide[:, :1, :, :16], wide.flatten(0, 1)[..., :8]):
        assert norm_kernels._placed(x)[0][0] is x
    tensors, strides, inner = norm_kernels._placed(view, view.contiguous())
    assert tensors[0] is view and inner == 0 and [s[1] * s[2] for s in strides] == [200, 16]
    assert norm_kernels._placed(wide[:, 2:8, 1:3, :8])[0][0].is_contiguous()  # three strides


def test_rms_norm_holds_squares_beyond_float16(device: str) -> None:
    x, weight = torch.full((3, 20), 300.0, device=device).half(), torch.ones(20, device=device)
    agree([rms_norm(x, weight, implementation="triton")], [torch.ones_like(x)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 12), (5, 64)])
@pytest.mark.parametrize("length", [1, 17])
def test_rotary(length: int, heads: int, width: int, dtype: torch.dtype, device: str) -> None:
    x = inside_poison(device, dtype, 2, length, heads, width)
    far = torch.tensor([[0], [2**31 + 12345]])
    positions = (far + torch.arange(length)).to(device)
    weigh = torch.randn(2, length, heads, width, device=device).to(dtype)
    results = []
    for implementation in ("triton", "reference"):
        x_ = x if implementation == "triton" else double(x)
        output = rotary(x_, positions, 500.0, implementation=implementation)
        results.append([output, *torch.autograd.grad(output, [x_], weigh.to(output.dtype))])
    agree(*results)


def test_rotary_reads_views_in_place_and_takes_nothing(device: str) -> None:
    qkv = torch.randn(1, 6, 5, 8, device=device)
    positions = torch.arange(12, device=device)[None, ::2]
    found = [rotary(x, positions, implementation="triton") for x in qkv.split([3, 2], dim=2)]
    exact = [rotary(x.double(), positions, implementation="reference") for x in qkv.split([3, 2], dim=2)]
    agree(found, exact)
    assert rotary(qkv[:, :0], positions[:, :0], implementation="triton").shape == (1, 0, 5, 8)


def test_custom_ops_are_registered_rightly(device: str) -> None:
    """torch's own checks: schema, fake tensors, autograd registration, tracing with symbolic shapes."""
    x, weight, offset = numbers(device, 2, 9, 4), numbers(device, 4, 3), numbers(device, 4)
    state, starts = numbers(device, 2, 2, 4), torch.rand(2, 9, device=device) < 0.3
    torch.library.opcheck(conv_kernels.short_conv_triton, (x, weight, None, None, None))
    torch.library.opcheck(conv_kernels.short_conv_triton, (x, weight, offset, starts, state))
    one = [y.detach() for y in (x[:, :1], weight, offset, starts[:, :1], state)]
    torch.library.opcheck(conv_kernels.short_conv_step, one, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(norm_kernels.rms_norm_triton, (x, None, offset, 1, 1e-5))
    torch.library.opcheck(norm_kernels.rms_norm_triton, (x, numbers(device, 2, 9, 4), offset, 2, 1e-5))
    positions = torch.arange(9, device=device).expand(2, 9)
    torch.library.opcheck(rotary_kernels.rotary_triton, (numbers(device, 2, 9, 1, 4), positions, 10.0, False))


def compile_the_ops(device: str) -> None:
    """Traced whole, once for all lengths, forward and backward, with torch's own operators as the back end."""
    if device == "cpu":
        sys.path.insert(0, str(Path(__file__).parent))
        import triton_on_cpu

        triton_on_cpu.install()
    weight, filters = numbers(device, 8), numbers(device, 8, 4)

    def run(x: Tensor, state: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        mixed, after = short_conv(x, filters, weight, state=state, output_state=True, implementation="triton")
        mixed = rotary(mixed.unflatten(2, (2, 4)), positions, implementation="triton").flatten(2)
        mixed = rms_norm(mixed, weight, implementation="triton")
        return gated_rms_norm(mixed, x, weight, 2, implementation="triton"), after

    def with_gradients(call: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor) -> list[Tensor]:
        mixed, after = call(*inputs)
        return [mixed, after, *torch.autograd.grad((mixed**3).sum() + after.sum(), [*inputs[:2], weight, filters])]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 18, 33):
        inputs = numbers(device, 1, length, 8), numbers(device, 1, 3, 8), torch.arange(length, device=device)[None]
        torch.testing.assert_close(with_gradients(compiled, *inputs), with_gradients(run, *inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    print("compiled")


def test_ops_compile_as_one_graph(device: str) -> None:
    """In a process of its own: shapes checked at run time cannot be traced."""
    code = f"import runpy; runpy.run_path({str(Path(__file__))!r})['compile_the_ops']({device!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]


def test_results_repeat_bit_by_bit(device: str) -> None:
    x, weight, filters = numbers(device, 1, 65, 40), numbers(device, 40), numbers(device, 40, 4)

    def run() -> list[Tensor]:
        mixed = short_conv(x, filters, weight, implementation="triton")[0]
        mixed = gated_rms_norm(mixed, x, weight, implementation="triton")
        return [mixed, *torch.autograd.grad(mixed.square().sum(), [x, weight, filters])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.gpu
def test_offsets_past_32_bits() -> None:
    """Rows of 2^31 elements and more: the last tokens against the same tokens alone."""
    device, width = "cuda", 2304
    length = 2**31 // width + 1000
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    x = torch.randn(1, length, width, device=device, dtype=torch.bfloat16).requires_grad_()
    weight, filters = numbers(device, width), numbers(device, width, 4)
    end = x[:, -200:].detach().requires_grad_()
    calls = {
        "short_conv": lambda x: short_conv(x, filters, weight, implementation="triton")[0],
        "rms_norm": lambda x: rms_norm(x, weight, implementation="triton"),
        "gated_rms_norm": lambda x: gated_rms_norm(x, x, weight, implementation="triton"),
        "rotary": lambda x: rotary(
            x.unflatten(2, (18, 128)), torch.zeros(1, x.shape[1], device=device, dtype=torch.int64) + 7,
            implementation="triton",
        ).flatten(2),
    }  # fmt: skip
    for name, call in calls.items():
        found, exact = call(x), call(end)
        assert torch.equal(found[:, -197:], exact[:, -197:]), name
        grad = torch.autograd.grad(found, x, found.detach())[0][:, -197:].clone()
        del found
        # A token's place in its run decides which product and sum are one instruction: the last bit, once in a while.
        again = torch.autograd.grad(exact, end, exact.detach())[0][:, -197:]
        torch.testing.assert_close(grad, again, rtol=2**-7, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")
