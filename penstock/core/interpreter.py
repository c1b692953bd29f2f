"""Repairs of Triton's CPU interpreter (TRITON_INTERPRET=1), so that a kernel tested there computes what a GPU computes.

As shipped in 3.6.0 the interpreter multiplies and adds the bit patterns of bfloat16, truncates float32 to bfloat16, carries
wrongly into FP8, rounds a fused multiply-add twice, and cannot iterate over `range(tensor)` with NumPy 2.4. `repair()` replaces
those parts; torch converts.
"""

import functools
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_FP8_MAX = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
_STORAGE = {1: (np.uint8, torch.uint8), 2: (np.int16, torch.int16)}
_BITS_ONLY = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def _to_torch(handle: TensorHandle) -> Tensor:
    dtype = _TORCH[handle.dtype.scalar]
    array = np.ascontiguousarray(handle.data)
    if dtype in _BITS_ONLY:
        return torch.from_numpy(array.view(_STORAGE[dtype.itemsize][0])).view(dtype)
    return torch.from_numpy(array)


def _to_handle(values: Tensor, dtype: Any) -> TensorHandle:
    values = values.contiguous()
    if values.dtype in _BITS_ONLY:
        values = values.view(_STORAGE[values.dtype.itemsize][1])
    return TensorHandle(values.numpy().view(interpreter._get_np_dtype(dtype)), dtype)


def _cast_float(handle: TensorHandle, dtype: Any) -> TensorHandle:
    """Round to nearest even; FP8 saturates, as cvt.rn.satfinite does."""
    values = _to_torch(handle)
    if dtype in _FP8_MAX:
        values = values.float().clamp(-_FP8_MAX[dtype], _FP8_MAX[dtype])
    return _to_handle(values.to(_TORCH[dtype]), dtype)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


@functools.cache
def repair() -> None:
    """Repairs the interpreter of this process; the second call does nothing."""
    old_cast, old_fp_to_fp = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    old_binary, old_unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op
    old_patch = interpreter._patch_lang_tensor

    def cast_impl(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        before, after = source.dtype.scalar, target.scalar
        if before in _TORCH and after in _TORCH:
            return _cast_float(source, after)
        if before == tl.bfloat16:
            source = _cast_float(source, tl.float32)
        if after == tl.bfloat16:
            return _cast_float(old_cast(self, source, tl.float32), tl.bfloat16)
        return old_cast(self, source, target)

    def create_fp_to_fp(self: Any, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
        known = source.dtype.scalar in _TORCH and target.scalar in _TORCH
        if known and rounding != interpreter._ir.ROUNDING_MODE.RTZ:
            return _cast_float(source, target.scalar)
        return old_fp_to_fp(self, source, target, rounding)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any) -> TensorHandle:
        if a.dtype.scalar in _TORCH:
            product = np.matmul(_to_torch(a).float().numpy(), _to_torch(b).float().numpy())
        else:
            product = np.matmul(a.data.astype(np.int32), b.data.astype(np.int32))
        return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if x.data.dtype != np.float32:
            return TensorHandle(x.data * y.data + z.data, z.dtype.scalar)
        # A product of two float32 is exact in float64.
        with np.errstate(invalid="ignore", over="ignore"):
            wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
            return TensorHandle(wide.astype(np.float32), z.dtype.scalar)

    def binary_op(self: Any, left: TensorHandle, right: TensorHandle, operation: Any) -> TensorHandle:
        if not (_is_bf16(left) and _is_bf16(right)):
            return old_binary(self, left, right, operation)
        result = old_binary(self, _cast_float(left, tl.float32), _cast_float(right, tl.float32), operation)
        if result.data.dtype == bool:
            return result
        return _cast_float(TensorHandle(result.data.astype(np.float32), tl.float32), tl.bfloat16)

    def unary_op(self: Any, argument: TensorHandle, operation: Any) -> TensorHandle:
        if not _is_bf16(argument):
            return old_unary(self, argument, operation)
        return _cast_float(old_unary(self, _cast_float(argument, tl.float32), operation), tl.bfloat16)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        old_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda value: int(np.asarray(value.handle.data).item()))

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fma = create_fma
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.unary_op = unary_op
    for name in (
        "create_si_to_fp",
        "create_ui_to_fp",
        "create_fp_to_si",
        "create_fp_to_ui",
        "create_fp_ext",
        "create_fp_trunc",
    ):
        setattr(InterpreterBuilder, name, lambda self, source, target: self.cast_impl(source, target))
    interpreter._patch_lang_tensor = patch_lang_tensor
