"""bfloat16 as the compiler has it.

Stock, the interpreter keeps a bf16 block as uint16 and computes on that pattern (an addition of two is noise), and it cuts
float32 off where it should round to nearest even. Here arithmetic is done in float32 and rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder
Reduce, Scan = interpreter.ReduceOps, interpreter.ScanOps

# What they were before install().
_cast, _fp_to_fp = Builder.cast_impl, Builder.create_fp_to_fp
_unary, _binary, _ternary = Builder.unary_op, Builder.binary_op, Builder.ternary_op
_dot, _fma = Builder.create_dot, Builder.create_fma
_sum, _min_max, _cumsum = Reduce.sum, Reduce.min_max, Scan.cumsum


def to_float32(pattern: np.ndarray) -> np.ndarray:
    pattern = np.asarray(pattern)
    return (pattern.astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(pattern.shape)


def from_float32(values: np.ndarray) -> np.ndarray:
    """The nearest bf16 pattern, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    half = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    with np.errstate(over="ignore"):
        rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(values.shape)


def is_bf16(handle: Handle) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def decoded(handle: Handle) -> np.ndarray:
    """The numbers of a block, bf16 as float32."""
    return to_float32(handle.data) if is_bf16(handle) else handle.data


def _rounded(values: np.ndarray) -> Handle:
    return Handle(from_float32(values), tl.bfloat16)


def _cast_to_nearest(self, source: Handle, to: tl.dtype) -> Handle:
    kind, wanted = source.dtype.scalar, to.scalar
    if is_bf16(source):
        if wanted == tl.bfloat16:
            return source
        widened = Handle(to_float32(source.data), tl.float32)
        return widened if wanted == tl.float32 else _cast(self, widened, to)
    if wanted == tl.bfloat16:
        if kind in (tl.float16, tl.float64) or not kind.is_floating():
            source = _cast(self, source, tl.float32)
        if source.dtype.scalar == tl.float32:
            return _rounded(source.data)
    return _cast(self, source, to)


def _fp_to_nearest(self, source: Handle, to: tl.dtype, rounding_mode) -> Handle:
    kind, wanted = source.dtype.scalar, to.scalar
    truncates = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
    if tl.bfloat16 in (kind, wanted) and {kind, wanted} <= {tl.bfloat16, tl.float16, tl.float32, tl.float64}:
        if not (truncates and wanted == tl.bfloat16):
            return _cast_to_nearest(self, source, to)
        if kind == tl.float32:
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            return Handle((bits >> np.uint32(16)).astype(np.uint16).reshape(source.data.shape), tl.bfloat16)
    if kind == tl.float32 and wanted == tl.float16 and not truncates:
        return _cast(self, source, to)
    return _fp_to_fp(self, source, to, rounding_mode)


def _unary_in_float32(self, arg: Handle, op: Callable) -> Handle:
    return _rounded(op(decoded(arg))) if is_bf16(arg) else _unary(self, arg, op)


def _binary_in_float32(self, left: Handle, right: Handle, op: Callable) -> Handle:
    if not (is_bf16(left) or is_bf16(right)):
        return _binary(self, left, right, op)
    result = op(decoded(left), decoded(right))
    return Handle(result, tl.int1) if result.dtype == np.bool_ else _rounded(result)


def _ternary_in_float32(self, a: Handle, b: Handle, c: Handle, op: Callable) -> Handle:
    if op is np.where or not any(map(is_bf16, (a, b, c))):
        return _ternary(self, a, b, c, op)
    return _rounded(op(decoded(a), decoded(b), decoded(c)))


def _fma_in_float64(self, x: Handle, y: Handle, z: Handle) -> Handle:
    if not any(map(is_bf16, (x, y, z))):
        return _fma(self, x, y, z)
    return _rounded((decoded(x).astype(np.float64) * decoded(y).astype(np.float64) + decoded(z)).astype(np.float32))


def _dot_in_float32(self, a: Handle, b: Handle, accumulator: Handle, *precision) -> Handle:
    if not (is_bf16(a) or is_bf16(b)):
        return _dot(self, a, b, accumulator, *precision)
    start = decoded(accumulator)
    product = np.matmul(decoded(a).astype(np.float32), decoded(b).astype(np.float32)) + start
    return Handle(product.astype(start.dtype), accumulator.dtype.scalar)


def _tensor(handle: Handle, like: tl.core.tensor) -> tl.core.tensor:
    """Of the handle's numbers; a scalar's are an array of one, so only its type tells it from a block."""
    scalar = handle.dtype.scalar
    return tl.core.tensor(handle, tl.block_type(scalar, list(handle.data.shape)) if like.type.is_block() else scalar)


def _widened(tensor: tl.core.tensor) -> tl.core.tensor:
    return _tensor(Handle(to_float32(tensor.handle.data), tl.float32), tensor)


def _narrowed(tensor: tl.core.tensor) -> tl.core.tensor:
    return _tensor(_rounded(tensor.handle.data), tensor)


def _sum_in_float32(self, block):
    return _narrowed(self.sum(_widened(block))) if is_bf16(block.handle) else _sum(self, block)


def _min_max_in_float32(self, input, val_reduce_op, idx_reduce_op=None):
    """The names are those that triton passes by keyword."""
    block = input[0] if isinstance(input, tuple) else input
    if not is_bf16(block.handle):
        return _min_max(self, block, val_reduce_op, idx_reduce_op)
    result = _min_max(self, _widened(block), val_reduce_op, idx_reduce_op)
    if isinstance(result, tuple):
        return (_narrowed(result[0]), *result[1:])
    return _narrowed(result) if val_reduce_op else result


def _cumsum_in_float32(self, block):
    return [_narrowed(_cumsum(self, _widened(block))[0])] if is_bf16(block.handle) else _cumsum(self, block)


def install() -> None:
    Builder.cast_impl, Builder.create_fp_to_fp = _cast_to_nearest, _fp_to_nearest
    Builder.unary_op, Builder.binary_op, Builder.ternary_op = _unary_in_float32, _binary_in_float32, _ternary_in_float32
    Builder.create_dot, Builder.create_fma = _dot_in_float32, _fma_in_float64
    Reduce.sum, Reduce.min_max, Scan.cumsum = _sum_in_float32, _min_max_in_float32, _cumsum_in_float32
