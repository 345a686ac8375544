"""The two large products of a LoRA group, with the low-rank term in the accumulator before the base product starts.

One launch serves the whole group: forward gives each layer its columns of tiles, backward runs on over the layers' outputs,
so dx is one sum in float32 and no output is read back. cuBLAS would need a pass over y (or a float32 dx) for every layer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import is_kept, keys_of


@triton.jit
def product(a, b, acc):
    """acc + a @ b; a bfloat16 operand meets a float32 one split exactly into three bfloat16 parts."""
    if a.dtype == b.dtype:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    if (a.dtype == tl.bfloat16) & (b.dtype == tl.float32):
        high = b.to(tl.bfloat16)
        rest = b - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(a, high, tl.dot(a, middle, tl.dot(a, low, acc)))
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")


@triton.jit
def _low_rank_product(low, up, acc, IS_WIDE: tl.constexpr):
    """acc + low @ up for an accumulator that is rounded to 16 bits unless IS_WIDE: of float32 operands 16 bits are enough."""
    if IS_WIDE | (low.dtype != tl.float32):
        return tl.dot(low, up.to(low.dtype), acc, input_precision="tf32x3")
    low_high, up_high = low.to(tl.bfloat16), up.to(tl.bfloat16)
    low_rest = (low - low_high.to(tl.float32)).to(tl.bfloat16)
    up_rest = (up.to(tl.float32) - up_high.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(low_high, up_high, tl.dot(low_high, up_rest, tl.dot(low_rest, up_high, acc)))


@triton.jit
def _tile_of(pid, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, so that their operands stay in L2."""
    band = GROUP * column_tiles
    first = (pid // band) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + (pid % band) % height, (pid % band) // height


@triton.jit
def add_low_rank(acc, low_ptr, low_stride, up_ptr, up_stride, up_step, rows, columns, T, width, rank, BR: tl.constexpr,
                 IS_WIDE: tl.constexpr):  # fmt: skip
    """acc + low [T, rank] @ up [rank, width]."""
    for first in tl.range(0, rank, BR, num_stages=1):
        at = first + tl.arange(0, BR)
        low_mask = (rows < T)[:, None] & (at < rank)[None, :]
        low = tl.load(low_ptr + rows.to(tl.int64)[:, None] * low_stride + at[None, :], mask=low_mask, other=0.0)
        up_mask = (at < rank)[:, None] & (columns < width)[None, :]
        up = tl.load(up_ptr + at[:, None] * up_stride + columns[None, :] * up_step, mask=up_mask, other=0.0)
        acc = _low_rank_product(low, up, acc, IS_WIDE)
    return acc


@triton.jit
def _low_rank_term(lora_b, xas, ranks, scales, i: tl.constexpr, rows, columns, T, width, BM: tl.constexpr, BN: tl.constexpr,
                   BR: tl.constexpr, IS_WIDE: tl.constexpr):  # fmt: skip
    """scale_i xa_i b_iᵀ, zero without an adapter: what the accumulator of layer i starts from."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if lora_b[i] is not None:
        acc = add_low_rank(
            acc, xas[i], ranks[i], lora_b[i], 1, ranks[i], rows, columns, T, width, ranks[i], BR, IS_WIDE
        )
        acc *= scales[i]
    return acc


@triton.jit
def _with_bias(acc, biases, i: tl.constexpr, columns, width):
    if biases[i] is not None:
        acc += tl.load(biases[i] + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def add_product(acc, a_ptr, a_stride, a_step, b_ptr, b_stride, b_step, row, column, T, width, depth, BM: tl.constexpr,
                BN: tl.constexpr, BK: tl.constexpr, IS_EVEN: tl.constexpr):  # fmt: skip
    """acc + a [T, depth] @ b [depth, width] from row and column on, any strides; only a tile's start needs 64 bits."""
    at, rows, columns = tl.arange(0, BK), tl.arange(0, BM), tl.arange(0, BN)
    a_ptr += tl.cast(row, tl.int64) * a_stride
    b_ptr += tl.cast(column, tl.int64) * b_step
    a_at = rows[:, None] * a_stride + at[None, :] * a_step
    b_at = at[:, None] * b_stride + columns[None, :] * b_step
    a_mask, b_mask = (rows < T - row)[:, None], (columns < width - column)[None, :]
    for first in range(0, depth, BK):
        if IS_EVEN:
            a = tl.load(a_ptr + a_at, mask=a_mask, other=0.0)
            b = tl.load(b_ptr + b_at, mask=b_mask, other=0.0)
        else:
            a = tl.load(a_ptr + a_at, mask=a_mask & (first + at < depth)[None, :], other=0.0)
            b = tl.load(b_ptr + b_at, mask=b_mask & (first + at < depth)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
        a_ptr += tl.cast(BK, tl.int64) * a_step
        b_ptr += tl.cast(BK, tl.int64) * b_stride
    return acc


@triton.jit
def store_tile(acc, y_ptr, row, column, T, width, BM: tl.constexpr, BN: tl.constexpr):
    """Store a tile of y [T, width]."""
    rows, columns = tl.arange(0, BM), tl.arange(0, BN)
    inside = (rows < T - row)[:, None] & (columns < width - column)[None, :]
    y_ptr += tl.cast(row, tl.int64) * width + column
    tl.store(y_ptr + rows[:, None] * width + columns[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def lora_output(x_ptr, weights, biases, lora_b, xas, ys, T, D, outs, ranks, scales, firsts, x_stride, x_step, w_strides,
                w_steps, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
                IS_EVEN: tl.constexpr):  # fmt: skip
    """y_i = scale_i xa_i b_iᵀ + x w_iᵀ + bias_i; layer i has the columns of tiles from firsts[i] to firsts[i + 1]."""
    row, tile = _tile_of(tl.program_id(0), tl.cdiv(T, BM), firsts[N], 8)
    row *= BM
    rows = row + tl.arange(0, BM)
    for i in tl.static_range(N):
        if (tile >= firsts[i]) & (tile < firsts[i + 1]):
            column = (tile - firsts[i]) * BN
            columns = column + tl.arange(0, BN)
            acc = _low_rank_term(lora_b, xas, ranks, scales, i, rows, columns, T, outs[i], BM, BN, BR,
                                 x_ptr.dtype.element_ty == tl.float32)  # fmt: skip
            acc = add_product(acc, x_ptr, x_stride, x_step, weights[i], w_steps[i], w_strides[i], row, column, T, outs[i],
                              D, BM, BN, BK, IS_EVEN)  # fmt: skip
            acc = _with_bias(acc, biases, i, columns, outs[i])
            store_tile(acc, ys[i], row, column, T, outs[i], BM, BN)


@triton.jit
def lora_swiglu(x_ptr, weights, biases, lora_b, xas, ys, h_ptr, T, D, width, ranks, scales, x_stride, w_strides, w_steps,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, IS_EVEN: tl.constexpr):  # fmt: skip
    """lora_output for gate and up on one read of x, and h = silu(gate) * up of what is stored of them."""
    row, column = _tile_of(tl.program_id(0), tl.cdiv(T, BM), tl.cdiv(width, BN), 8)
    row, column = row * BM, column * BN
    at, rows, columns = tl.arange(0, BK), tl.arange(0, BM), tl.arange(0, BN)
    IS_WIDE: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    gate = _low_rank_term(lora_b, xas, ranks, scales, 0, row + rows, column + columns, T, width, BM, BN, BR, IS_WIDE)
    up = _low_rank_term(lora_b, xas, ranks, scales, 1, row + rows, column + columns, T, width, BM, BN, BR, IS_WIDE)
    x_at = rows[:, None] * x_stride + at[None, :]
    gate_at = at[:, None] * w_steps[0] + columns[None, :] * w_strides[0]
    up_at = at[:, None] * w_steps[1] + columns[None, :] * w_strides[1]
    x_ptr += tl.cast(row, tl.int64) * x_stride
    gate_ptr = weights[0] + tl.cast(column, tl.int64) * w_strides[0]
    up_ptr = weights[1] + tl.cast(column, tl.int64) * w_strides[1]
    x_mask, w_mask = (rows < T - row)[:, None], (columns < width - column)[None, :]
    for first in range(0, D, BK):
        in_x, in_w = x_mask, w_mask
        if not IS_EVEN:
            in_x, in_w = x_mask & (first + at < D)[None, :], w_mask & (first + at < D)[:, None]
        x = tl.load(x_ptr + x_at, mask=in_x, other=0.0)
        gate = tl.dot(x, tl.load(gate_ptr + gate_at, mask=in_w, other=0.0), gate, input_precision="tf32x3")
        up = tl.dot(x, tl.load(up_ptr + up_at, mask=in_w, other=0.0), up, input_precision="tf32x3")
        x_ptr += BK
        gate_ptr += tl.cast(BK, tl.int64) * w_steps[0]
        up_ptr += tl.cast(BK, tl.int64) * w_steps[1]
    gate = _with_bias(gate, biases, 0, column + columns, width)
    up = _with_bias(up, biases, 1, column + columns, width)
    store_tile(gate, ys[0], row, column, T, width, BM, BN)
    store_tile(up, ys[1], row, column, T, width, BM, BN)
    gate, up = gate.to(h_ptr.dtype.element_ty).to(tl.float32), up.to(h_ptr.dtype.element_ty).to(tl.float32)
    store_tile(gate * tl.sigmoid(gate) * up, h_ptr, row, column, T, width, BM, BN)


@triton.jit
def lora_input_grad(grads, weights, lora_a, dxa_ptr, dx_ptr, T, D, outs, ranks, places, grad_strides, w_strides, w_steps,
                    dxa_stride, seed_words, keep_scale, N: tl.constexpr, ADAPTERS: tl.constexpr, THRESHOLD: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
                    IS_EVEN: tl.constexpr):  # fmt: skip
    """dx = sum of dropped_i(dxa_i a_i) + dy_i w_i; dxa_i are the columns of dxa from places[i], a_i those of the adapters."""
    row, column = _tile_of(tl.program_id(0), tl.cdiv(T, BM), tl.cdiv(D, BN), 8)
    row, column = row * BM, column * BN
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    IS_WIDE: tl.constexpr = dx_ptr.dtype.element_ty == tl.float32
    for i in tl.static_range(ADAPTERS):
        dxa = dxa_ptr + places[i]
        if THRESHOLD == 0:
            acc = add_low_rank(acc, dxa, dxa_stride, lora_a[i], D, 1, rows, columns, T, D, ranks[i], BR, IS_WIDE)
        else:
            low = tl.zeros((BM, BN), dtype=tl.float32)
            low = add_low_rank(low, dxa, dxa_stride, lora_a[i], D, 1, rows, columns, T, D, ranks[i], BR, IS_WIDE)
            keys = keys_of(rows, seed_words, i)
            acc += tl.where(is_kept(keys[:, None], columns[None, :], THRESHOLD), low * keep_scale, 0.0)
    for i in tl.static_range(N):
        acc = add_product(acc, grads[i], grad_strides[i], 1, weights[i], w_strides[i], w_steps[i], row, column, T, D,
                          outs[i], BM, BN, BK, IS_EVEN)  # fmt: skip
    store_tile(acc, dx_ptr, row, column, T, D, BM, BN)
