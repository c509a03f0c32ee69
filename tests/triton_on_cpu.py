"""Triton's interpreter, mended: kernels run on the CPU as a GPU would compute them.

``TRITON_INTERPRET=1`` runs a kernel as Python over NumPy arrays. As it comes (Triton 3.4 to 3.9) it

* holds bfloat16 as the bits of a uint16 and computes on those bits: sums and products are silently nonsense;
* truncates float32 to bfloat16 where a GPU rounds to nearest even;
* gives loop variables as plain ints, which have no ``.to(tl.int64)`` and never overflow;
* times autotuned configurations with the driver of a GPU;
* spreads a scalar's comparison over a tile as int32, which it then takes for no mask;
* cannot see the globals of a kernel that a type checker has wrapped.

Here a bfloat16 is held as the float32 of the same value, rounded after every operation, and only loads, stores and
bitcasts know its 16 bits. What stays different from a GPU: nothing runs in parallel, so no race shows; tf32 is float32;
a read out of bounds returns whatever lies there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


def install() -> None:
    """Mend ``triton.jit`` and, under ``TRITON_INTERPRET=1``, the interpreter; once, before any kernel is decorated."""
    import triton

    if getattr(triton, "_mended_by_seqlong", False):
        return
    triton._mended_by_seqlong = True
    _unwrap_type_checked_kernels(triton)
    # Triton itself asks at each decoration; read it the same way, from its own settings.
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    _hold_bfloat16_as_float32(interpreter)
    _masks_stay_bool(interpreter)
    _loop_variables_are_tensors(interpreter)
    _first_configuration(triton)


def to_bits(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values that bfloat16 can hold, as uint16."""
    return (
        (np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16).reshape(values.shape)
    )


def from_bits(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(bits))


def rounded(values: np.ndarray) -> np.ndarray:
    """Float values rounded to the nearest bfloat16, ties to even, as float32."""
    single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32)
    # Adding just under half of the last kept place, plus that place itself, carries exactly when rounding goes up.
    up = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(single), single, up).reshape(np.shape(values))


def _unwrap_type_checked_kernels(triton: Any) -> None:
    """The tests' import hook wraps every function; a kernel must be the function as written."""
    jit = triton.jit

    def jit_as_written(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
        if fn is None:
            return lambda function: jit(inspect.unwrap(function), **options)
        return jit(inspect.unwrap(fn), **options)

    triton.jit = jit_as_written


def _hold_bfloat16_as_float32(interpreter: Any) -> None:
    import triton.language as tl

    builder, handle_type = interpreter.InterpreterBuilder, interpreter.TensorHandle
    bfloat16 = tl.bfloat16

    def is_bfloat16(dtype: Any) -> bool:
        return getattr(dtype, "scalar", dtype) == bfloat16

    stock_numpy_type = interpreter._get_np_dtype

    def numpy_type(dtype: Any) -> np.dtype:
        return np.dtype(np.float32) if is_bfloat16(dtype) else stock_numpy_type(dtype)

    interpreter._get_np_dtype = numpy_type
    if hasattr(interpreter, "_validate_np_data_size"):  # Triton 3.5 and later

        def fits(
            array: np.ndarray, dtype: Any, stock: Callable[..., bool] = interpreter._validate_np_data_size
        ) -> bool:
            return array.itemsize <= 4 if is_bfloat16(dtype) else stock(array, dtype)

        interpreter._validate_np_data_size = fits

    # Every result is a new handle: round there, and no operation can be forgotten. Comparisons keep bool data.
    stock_start = handle_type.__init__

    def start(self: Any, data: Any, dtype: Any, *attributes: Any) -> None:
        if is_bfloat16(dtype) and np.asarray(data).dtype.kind == "f":
            data = rounded(np.asarray(data))
        stock_start(self, data, dtype, *attributes)

    handle_type.__init__ = start
    builder.get_bf16 = lambda self, value: handle_type(np.array([value], dtype=np.float32), bfloat16)

    stock_load, stock_store = builder.create_masked_load, builder.create_masked_store

    def load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        if pointers.get_element_ty() != bfloat16:
            return stock_load(self, pointers, mask, other, *rest, **named)
        elsewhere = np.zeros_like(pointers.data, dtype=np.uint16) if other is None else to_bits(other.data)
        bits = interpreter._interpreter.load(pointers.data, mask.data, elsewhere, np.dtype(np.uint16))
        return handle_type(from_bits(bits), bfloat16)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        if not is_bfloat16(value.dtype):
            return stock_store(self, pointers, value, mask, *rest, **named)
        return interpreter._interpreter.store(pointers.data, to_bits(value.data), mask.data)

    builder.create_masked_load, builder.create_masked_store = load, store

    stock_cast, stock_convert = builder.cast_impl, builder.create_fp_to_fp

    def cast(self: Any, source: Any, target: Any) -> Any:
        if is_bfloat16(source.dtype) or is_bfloat16(target):
            return handle_type(source.data.astype(numpy_type(target.scalar)), target.scalar)
        return stock_cast(self, source, target)

    def convert(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if is_bfloat16(target) and "RTZ" in str(rounding):
            bits = np.ascontiguousarray(source.data, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
            return handle_type(bits.view(np.float32).reshape(source.data.shape), bfloat16)
        if is_bfloat16(source.dtype) and target.scalar.primitive_bitwidth == 8:
            return stock_convert(self, handle_type(source.data, tl.float32), target, rounding)
        if is_bfloat16(target) and source.dtype.scalar.primitive_bitwidth == 8:
            return cast(self, stock_convert(self, source, tl.float32, rounding), target)
        if is_bfloat16(source.dtype) or is_bfloat16(target):
            return cast(self, source, target)
        return stock_convert(self, source, target, rounding)

    builder.cast_impl, builder.create_fp_to_fp = cast, convert

    stock_bitcast, stock_fabs = builder.create_bitcast, builder.create_fabs

    def bitcast(self: Any, source: Any, target: Any) -> Any:
        if is_bfloat16(source.dtype) == is_bfloat16(target):
            return stock_bitcast(self, source, target)
        if is_bfloat16(target):
            return handle_type(from_bits(source.data.view(np.uint16)), bfloat16)
        return handle_type(to_bits(source.data).view(stock_numpy_type(target)), target.scalar)

    def fabs(self: Any, value: Any) -> Any:
        return handle_type(np.abs(value.data), bfloat16) if is_bfloat16(value.dtype) else stock_fabs(self, value)

    builder.create_bitcast, builder.create_fabs = bitcast, fabs

    def fma(self: Any, x: Any, y: Any, z: Any, stock: Callable[..., Any] = builder.create_fma) -> Any:
        if not is_bfloat16(z.dtype):
            return stock(self, x, y, z)
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
        return handle_type(exact.astype(np.float32), bfloat16)

    builder.create_fma = fma

    # A float32 sum of bfloat16 values rounds once, at its end, as on a GPU; atomics know the bits only.
    def atomic(self: Any, operation: Any, pointers: Any, value: Any, *rest: Any,
               stock: Callable[..., Any] = builder.create_atomic_rmw) -> Any:  # fmt: skip
        if is_bfloat16(value.dtype):
            raise NotImplementedError("bfloat16 atomics do not run in Triton's interpreter; make the sum in float32")
        return stock(self, operation, pointers, value, *rest)

    builder.create_atomic_rmw = atomic


def _masks_stay_bool(interpreter: Any) -> None:
    """A scalar's comparison, spread over a tile, is still a mask."""
    builder = interpreter.InterpreterBuilder
    stock = builder.create_splat

    def splat(self: Any, shape: Any, value: Any) -> Any:
        spread = stock(self, shape, value)
        if np.asarray(value.data).dtype == np.bool_:
            spread.data = np.asarray(spread.data).astype(np.bool_)
        return spread

    builder.create_splat = splat


def _loop_variables_are_tensors(interpreter: Any) -> None:
    """``range`` and ``tl.range`` in a kernel give scalars with a Triton type, as the compiler does."""
    import ast

    import triton.language as tl

    def loop(first: Any, last: Any = None, step: Any = None, **_options: Any) -> Iterator[Any]:
        start, end = (0, first) if last is None else (first, last)
        wide = any(isinstance(bound, tl.tensor) and bound.dtype.int_bitwidth == 64 for bound in (start, end, step))
        dtype, numpy_type = (tl.int64, np.int64) if wide else (tl.int32, np.int32)
        for index in range(int(start), int(end), 1 if step is None else int(step)):
            yield tl.tensor(interpreter.TensorHandle(np.array([index], dtype=numpy_type), dtype), dtype)

    stock_patch, stock_transform = interpreter._patch_lang_core, interpreter.FunctionRewriter._transform_ast

    def patch_language(lang: Any, *scope: Any) -> None:
        stock_patch(lang, *scope)
        lang.range = loop  # the scope, where there is one, has noted what to put back
        lang.tensor.__index__ = lambda self: int(self.handle.data.item())  # older ones fail with NumPy 2.4

    def transform(self: Any, source: str) -> Any:
        tree = stock_transform(self, source)
        for node in ast.walk(tree):
            if isinstance(node, ast.For) and isinstance(node.iter, ast.Call):
                called = node.iter.func
                if isinstance(called, ast.Name) and called.id == "range":
                    called.id = "_interpreted_range"
        self.fn.__globals__["_interpreted_range"] = loop
        return tree

    interpreter._patch_lang_core = patch_language
    interpreter.FunctionRewriter._transform_ast = transform


def _first_configuration(triton: Any) -> None:
    """There is nothing to time on: an autotuned kernel takes the first configuration that pruning leaves."""
    from triton.runtime.autotuner import Autotuner

    def equally_fast(self: Any, *_args: Any, config: Any, **_meta: Any) -> list[float]:
        return [0.0, 0.0, 0.0]

    Autotuner._bench = equally_fast
