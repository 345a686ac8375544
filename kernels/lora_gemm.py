"""The two large products of a LoRA group, with the low-rank term in the accumulator before the base product starts.

One launch serves the whole group: forward gives each layer its columns of tiles, backward runs on over the layers' outputs,
so dx is one sum in float32 and no output is read back. cuBLAS would need a pass over y (or a float32 dx) for every layer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import is_kept, row_keys


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
def _tile_of(pid, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, so that their operands stay in L2."""
    band = GROUP * column_tiles
    first = (pid // band) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + (pid % band) % height, (pid % band) // height


@triton.jit
def _add_low_rank(acc, low_ptr, low_stride, up_ptr, up_stride, up_step, rows, columns, T, width, rank, BR: tl.constexpr):
    """acc + low [T, rank] @ up [rank, width]."""
    for first in tl.range(0, rank, BR, num_stages=1):
        at = first + tl.arange(0, BR)
        low_mask = (rows < T)[:, None] & (at < rank)[None, :]
        low = tl.load(low_ptr + rows.to(tl.int64)[:, None] * low_stride + at[None, :], mask=low_mask, other=0.0)
        up_mask = (at < rank)[:, None] & (columns < width)[None, :]
        up = tl.load(up_ptr + at[:, None] * up_stride + columns[None, :] * up_step, mask=up_mask, other=0.0)
        acc = product(low, up.to(low.dtype), acc)
    return acc


@triton.jit
def _add_product(acc, a_ptr, a_stride, a_step, b_ptr, b_stride, b_step, rows, columns, T, width, depth,
                 BK: tl.constexpr, IS_EVEN: tl.constexpr):  # fmt: skip
    """acc + a [T, depth] @ b [depth, width]; any strides."""
    at = tl.arange(0, BK)
    a_at = a_ptr + rows.to(tl.int64)[:, None] * a_stride + at.to(tl.int64)[None, :] * a_step
    b_at = b_ptr + at.to(tl.int64)[:, None] * b_stride + columns.to(tl.int64)[None, :] * b_step
    a_mask, b_mask = (rows < T)[:, None], (columns < width)[None, :]
    for first in range(0, depth, BK):
        if IS_EVEN:
            a = tl.load(a_at, mask=a_mask, other=0.0)
            b = tl.load(b_at, mask=b_mask, other=0.0)
        else:
            a = tl.load(a_at, mask=a_mask & (first + at < depth)[None, :], other=0.0)
            b = tl.load(b_at, mask=b_mask & (first + at < depth)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
        a_at += BK * a_step
        b_at += BK * b_stride
    return acc


@triton.jit
def lora_output(x_ptr, weights, biases, lora_b, xas, ys, T, D, outs, ranks, scales, firsts, x_stride, x_step, w_strides,
                w_steps, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
                IS_EVEN: tl.constexpr):  # fmt: skip
    """y_i = scale_i xa_i b_iᵀ + x w_iᵀ + bias_i; layer i has the columns of tiles from firsts[i] to firsts[i + 1]."""
    row, column = _tile_of(tl.program_id(0), tl.cdiv(T, BM), firsts[N], 8)
    rows = row * BM + tl.arange(0, BM)
    for i in tl.static_range(N):
        if (column >= firsts[i]) & (column < firsts[i + 1]):
            columns = (column - firsts[i]) * BN + tl.arange(0, BN)
            acc = tl.zeros((BM, BN), dtype=tl.float32)
            if lora_b[i] is not None:
                acc = _add_low_rank(acc, xas[i], ranks[i], lora_b[i], 1, ranks[i], rows, columns, T, outs[i], ranks[i], BR)
                acc *= scales[i]
            acc = _add_product(acc, x_ptr, x_stride, x_step, weights[i], w_steps[i], w_strides[i], rows, columns, T, outs[i],
                               D, BK, IS_EVEN)  # fmt: skip
            if biases[i] is not None:
                acc += tl.load(biases[i] + columns, mask=columns < outs[i], other=0.0).to(tl.float32)[None, :]
            at = rows.to(tl.int64)[:, None] * outs[i] + columns[None, :]
            inside = (rows < T)[:, None] & (columns < outs[i])[None, :]
            tl.store(ys[i] + at, acc.to(ys[i].dtype.element_ty), mask=inside)


@triton.jit
def lora_input_grad(grads, weights, lora_a, dxa_ptr, dx_ptr, T, D, outs, ranks, places, grad_strides, w_strides, w_steps,
                    dxa_stride, seed_words, keep_scale, N: tl.constexpr, ADAPTERS: tl.constexpr, THRESHOLD: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
                    IS_EVEN: tl.constexpr):  # fmt: skip
    """dx = sum of dropped_i(dxa_i a_i) + dy_i w_i; dxa_i are the columns of dxa from places[i], a_i those of the adapters."""
    row, column = _tile_of(tl.program_id(0), tl.cdiv(T, BM), tl.cdiv(D, BN), 8)
    rows = row * BM + tl.arange(0, BM)
    columns = column * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for i in tl.static_range(ADAPTERS):
        dxa = dxa_ptr + places[i]
        if THRESHOLD == 0:
            acc = _add_low_rank(acc, dxa, dxa_stride, lora_a[i], D, 1, rows, columns, T, D, ranks[i], BR)
        else:
            low = tl.zeros((BM, BN), dtype=tl.float32)
            low = _add_low_rank(low, dxa, dxa_stride, lora_a[i], D, 1, rows, columns, T, D, ranks[i], BR)
            keys = row_keys(seed_words[3 * i], seed_words[3 * i + 1], seed_words[3 * i + 2], rows)
            acc += tl.where(is_kept(keys[:, None], columns[None, :], THRESHOLD), low * keep_scale, 0.0)
    for i in tl.static_range(N):
        acc = _add_product(acc, grads[i], grad_strides[i], 1, weights[i], w_strides[i], w_steps[i], rows, columns, T, D,
                           outs[i], BK, IS_EVEN)  # fmt: skip
    inside = (rows < T)[:, None] & (columns < D)[None, :]
    tl.store(dx_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :], acc.to(dx_ptr.dtype.element_ty), mask=inside)
