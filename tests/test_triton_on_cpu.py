"""The interpreter computes what a GPU would: bfloat16, descriptors, loops, autotune, type-checked kernels."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language", reason="triton is not installed")

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="Triton runs on the GPU here, not in its interpreter"
)


@triton.jit
def _arithmetic(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a * b + a)
    tl.store(out + N + i, tl.abs(a) - 0.5 * b)
    tl.store(out + 2 * N + i, tl.where(a > b, a, b))
    tl.store(out + 3 * N + i, tl.exp2(a.to(tl.float32)).to(tl.bfloat16))
    tl.store(out + 4 * N + i, tl.load(x + i, mask=i < 3, other=-1.5))


def test_bfloat16_arithmetic_rounds_after_each_operation() -> None:
    x, y = torch.randn(2, 32, dtype=torch.bfloat16)
    out = torch.empty(5, 32, dtype=torch.bfloat16)
    _arithmetic[(1,)](x, y, out, N=32)
    masked = torch.where(torch.arange(32) < 3, x, -1.5)
    expected = torch.stack([x * y + x, x.abs() - 0.5 * y, torch.maximum(x, y), x.float().exp2().bfloat16(), masked])
    assert torch.equal(out, expected)


@triton.jit
def _cast(x, out, bits, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    tl.store(out + i, a.to(tl.bfloat16))
    tl.store(out + N + i, a)
    tl.store(bits + i, a.to(tl.bfloat16).to(tl.int16, bitcast=True))


def test_float32_becomes_the_nearest_bfloat16() -> None:
    x = torch.cat([torch.randn(60), torch.tensor([float("inf"), float("nan"), 1.00390625, 3.4e38])])
    out, bits = torch.empty(2, 64, dtype=torch.bfloat16), torch.empty(64, dtype=torch.int16)
    _cast[(1,)](x, out, bits, N=64)
    assert torch.equal(out.nan_to_num(7.0), x.bfloat16().expand(2, -1).nan_to_num(7.0))
    number = ~x.isnan()
    assert torch.equal(bits[number], x.bfloat16().view(torch.int16)[number])


@triton.jit
def _reduce(x, sums, largest, running, N: tl.constexpr):
    i = tl.arange(0, N)
    tile = tl.load(x + i[:, None] * N + i[None, :])
    tl.store(sums + i, tl.sum(tile, axis=1))
    tl.store(largest + i, tl.max(tile, axis=0))
    tl.store(running + i[:, None] * N + i[None, :], tl.cumsum(tile.to(tl.float32), axis=0))
    tl.store(running + N * N + i[:, None] * N + i[None, :], tl.cumsum(tile.to(tl.float32), axis=1, reverse=True))


def test_reductions_and_scans() -> None:
    x = torch.randn(16, 16, dtype=torch.bfloat16)
    sums, largest, running = torch.empty(16), torch.empty(16), torch.empty(2, 16, 16)
    _reduce[(1,)](x, sums, largest, running, N=16)
    torch.testing.assert_close(sums, x.float().sum(1), atol=0.05, rtol=0.01)
    assert torch.equal(largest, x.float().amax(0))
    torch.testing.assert_close(running[0], x.float().cumsum(0))
    torch.testing.assert_close(running[1], x.float().flip(1).cumsum(1).flip(1))


@triton.jit
def _product(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i[:, None] * N + i[None, :])
    b = tl.load(y + i[:, None] * N + i[None, :])
    acc = tl.dot(a, tl.trans(b), input_precision="ieee")
    tl.store(out + i[:, None] * N + i[None, :], tl.dot(a, b, acc=acc, input_precision="ieee"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot_accumulates_in_float32(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 16, 16).to(dtype)
    out = torch.empty(16, 16)
    _product[(1,)](x, y, out, N=16)
    torch.testing.assert_close(out, x.float() @ y.float().T + x.float() @ y.float())


@triton.jit
def _copy_by_descriptor(x, out, vector, vector_out, t, T: tl.constexpr, D: tl.constexpr):
    rows = tl.make_tensor_descriptor(x, shape=[t, D], strides=[D, 1], block_shape=[T, D])
    to = tl.make_tensor_descriptor(out, shape=[t, D], strides=[D, 1], block_shape=[T, D])
    line = tl.make_tensor_descriptor(vector, shape=[t], strides=[1], block_shape=[T])
    line_to = tl.make_tensor_descriptor(vector_out, shape=[t], strides=[1], block_shape=[T])
    for i in tl.range(0, tl.cdiv(t, T), num_stages=3):
        tile = rows.load([i * T, 0])
        to.store([i * T, 0], (tile.to(tl.float32) * 2).to(tile.dtype))
        numbers = line.load([i * T])
        line_to.store([i * T], numbers + tl.sum(tile.to(tl.float32), axis=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_descriptors_read_zero_and_drop_writes_outside(dtype: torch.dtype) -> None:
    x = torch.randn(21, 16).to(dtype)
    held = torch.full((32, 16), 9.0).to(dtype)  # memory behind the 21 rows that belongs to somebody else
    held[:21] = x
    vector, out, vector_out = torch.randn(24), torch.full_like(held, 7.0), torch.full((24,), 7.0)
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))
    _copy_by_descriptor[(1,)](held, out, vector, vector_out, 21, T=8, D=16)
    assert torch.equal(out[:21], 2 * x) and (out[21:] == 7).all()
    torch.testing.assert_close(vector_out[:21], vector[:21] + x.float().sum(1))
    assert (vector_out[21:] == 7).all()


@triton.jit
def _row(x, i, STEP: tl.constexpr):
    return tl.load(x + i.to(tl.int64) * STEP)


@triton.jit
def _offsets(x, out, n, STEP: tl.constexpr):
    total = 0.0
    for i in range(n):
        total += _row(x, i, STEP)
    for j in tl.range(1, n, 2, num_stages=2):
        total += _row(x, j, STEP)
    for k in tl.static_range(2):
        total += k
    for i in range(n - 1, -1, -1):
        total += tl.load(x + i.to(tl.int64) * STEP)
    tl.store(out, total)
    big = n
    for i in range(n):
        big = i * 1073741824  # on a GPU this int32 runs over
    tl.store(out + 1, big)


@pytest.mark.filterwarnings("ignore:overflow")
def test_loop_variables_are_32_bit_scalars_that_can_be_widened() -> None:
    x, out = torch.arange(12.0), torch.empty(2)
    _offsets[(1,)](x, out, 4, STEP=3)
    assert out[0] == 18 + 12 + 1 + 18
    assert out[1] == -(2**30)


@triton.autotune(configs=[triton.Config({"N": 8}), triton.Config({"N": 16})], key=["n"])
@triton.jit
def _tuned(x, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(x + i, tl.load(x + i, mask=i < n) + N, mask=i < n)


def test_an_autotuned_kernel_takes_its_first_configuration() -> None:
    x = torch.zeros(20)
    _tuned[lambda meta: (triton.cdiv(20, meta["N"]),)](x, 20)
    assert (x == 8).all()


@jaxtyping.jaxtyped(typechecker=None)
def _checked(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i) + OFFSET)


OFFSET = tl.constexpr(3)


def test_a_kernel_that_the_type_checker_wrapped_sees_its_own_globals() -> None:
    x: Tensor = torch.randn(8)
    out = torch.empty(8)
    triton.jit(_checked)[(1,)](x, out, N=8)
    assert torch.equal(out, x + 3)
