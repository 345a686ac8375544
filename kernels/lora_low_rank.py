"""The low-rank side of a LoRA group: each large tensor is read once, whatever the number of adapters and products.

Sums over tokens or outputs that are split over programs go through float32 partial sums, added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import is_kept, keys_of
from .lora_gemm import product


@triton.jit
def _dropped(x, rows, columns, seed_words, i: tl.constexpr, THRESHOLD: tl.constexpr):
    """What dropout leaves of a tile of x for adapter i."""
    kept = is_kept(keys_of(rows, seed_words, i)[:, None], columns[None, :], THRESHOLD)
    return tl.where(kept, x.to(tl.float32), 0.0).to(x.dtype)


@triton.jit
def _only(low, at, places, i: tl.constexpr):
    """Adapter i's columns of the packed low-rank tile, the others zero."""
    own = (at >= places[i]) & (at < places[i + 1])
    return tl.where(own[None, :], low.to(tl.float32), 0.0).to(low.dtype)


@triton.jit
def lora_hidden(x_ptr, a_ptr, xas, T, D, R, places, ranks, x_stride, seed_words, keep_scale, N: tl.constexpr,
                THRESHOLD: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """xa_i = dropped_i(x) a_iᵀ of all adapters; a [R, D] has them one under the other, adapter i from row places[i]."""
    row = tl.program_id(0) * BM
    rows = row + tl.arange(0, BM)
    at = tl.program_id(1) * BR + tl.arange(0, BR)
    acc = tl.zeros((BM, BR), dtype=tl.float32)
    x_ptr += tl.cast(row, tl.int64) * x_stride
    x_at = tl.arange(0, BM)[:, None] * x_stride + tl.arange(0, BK)[None, :]
    a_at = at[None, :] * D + tl.arange(0, BK)[:, None]
    for first in range(0, D, BK):
        columns = first + tl.arange(0, BK)
        x = tl.load(x_ptr + first + x_at, mask=(rows < T)[:, None] & (columns < D)[None, :], other=0.0)
        a = tl.load(a_ptr + first + a_at, mask=(columns < D)[:, None] & (at < R)[None, :], other=0.0)
        if THRESHOLD == 0:
            acc = product(x, a, acc)
        else:
            for i in tl.static_range(N):
                acc = product(_dropped(x, rows, columns, seed_words, i, THRESHOLD), _only(a, at, places, i), acc)
    acc *= keep_scale
    for i in tl.static_range(N):
        own = (at >= places[i]) & (at < places[i + 1])
        to = xas[i] + rows.to(tl.int64)[:, None] * ranks[i] + (at - places[i])[None, :]
        tl.store(to, acc.to(xas[i].dtype.element_ty), mask=(rows < T)[:, None] & own[None, :])


@triton.jit
def lora_hidden_grad(grads, lora_b, xas, dxas, dbs, T, chunk, outs, ranks, firsts, grad_strides,
                     N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """Of a tile of columns of dy_i [T, O_i] and a chunk of tokens, read once: dy b_i [T, R_i] and dyᵀ xa_i [O_i, R_i].

    Partial sums, without the scale: dxas[i] [tiles of O_i, T, R_i] and dbs[i] [chunks, O_i, R_i], None where not wanted.
    """
    tile, begin = tl.program_id(0), tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, T)
    at = tl.program_id(2) * BR + tl.arange(0, BR)
    for i in tl.static_range(N):
        if (tile >= firsts[i]) & (tile < firsts[i + 1]):
            columns = (tile - firsts[i]) * BN + tl.arange(0, BN)
            own = (columns < outs[i])[:, None] & (at < ranks[i])[None, :]
            if dxas[i] is not None:
                b = tl.load(lora_b[i] + columns[:, None] * ranks[i] + at[None, :], mask=own, other=0.0)
                dxa_tile = dxas[i] + (tile - firsts[i]).to(tl.int64) * T * ranks[i]
            db = tl.zeros((BN, BR), dtype=tl.float32)
            for first in range(begin, end, BM):
                rows = first + tl.arange(0, BM)
                inside = (rows < end)[:, None] & (columns < outs[i])[None, :]
                grad = tl.load(
                    grads[i] + rows.to(tl.int64)[:, None] * grad_strides[i] + columns[None, :], mask=inside, other=0.0
                )
                low_at = rows.to(tl.int64)[:, None] * ranks[i] + at[None, :]
                low_mask = (rows < end)[:, None] & (at < ranks[i])[None, :]
                if dxas[i] is not None:
                    dxa = product(grad, b, tl.zeros((BM, BR), dtype=tl.float32))
                    tl.store(dxa_tile + low_at, dxa, mask=low_mask)
                if dbs[i] is not None:
                    xa = tl.load(xas[i] + low_at, mask=low_mask, other=0.0)
                    db = product(tl.trans(grad), xa, db)
            if dbs[i] is not None:
                chunk_at = tl.program_id(1).to(tl.int64) * outs[i] * ranks[i]
                tl.store(dbs[i] + chunk_at + columns[:, None] * ranks[i] + at[None, :], db, mask=own)


@triton.jit
def lora_a_grad(x_ptr, dxa_ptr, da_ptr, T, D, R, chunk, places, x_stride, seed_words, keep_scale, N: tl.constexpr,
                THRESHOLD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """Of a tile of columns of x and a chunk of tokens, read once: dxaᵀ dropped(x), the partial sums [chunks, R, D]."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, T)
    at = tl.program_id(2) * BR + tl.arange(0, BR)
    acc = tl.zeros((BN, BR), dtype=tl.float32)
    for first in range(begin, end, BM):
        rows = first + tl.arange(0, BM)
        x_at = rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
        x = tl.load(x_ptr + x_at, mask=(rows < end)[:, None] & (columns < D)[None, :], other=0.0)
        dxa_at = rows.to(tl.int64)[:, None] * R + at[None, :]
        dxa = tl.load(dxa_ptr + dxa_at, mask=(rows < end)[:, None] & (at < R)[None, :], other=0.0)
        if THRESHOLD == 0:
            acc = product(tl.trans(x), dxa, acc)
        else:
            for i in tl.static_range(N):
                kept = _dropped(x, rows, columns, seed_words, i, THRESHOLD)
                acc = product(tl.trans(kept), _only(dxa, at, places, i), acc)
    to = da_ptr + tl.program_id(1).to(tl.int64) * R * D + at[None, :] * D + columns[:, None]
    tl.store(to, acc * keep_scale, mask=(columns < D)[:, None] & (at < R)[None, :])


@triton.jit
def lora_sum(sources, outs, counts, strides, sizes, widths, out_strides, scales, firsts, N: tl.constexpr,
             COUNT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """outs[i] = scales[i] * the sum of counts[i] arrays, strides[i] apart; rows of widths[i] values, out_strides[i] apart."""
    for i in tl.static_range(N):
        if (tl.program_id(0) >= firsts[i]) & (tl.program_id(0) < firsts[i + 1]):
            at = (tl.program_id(0) - firsts[i]) * BLOCK + tl.arange(0, BLOCK)
            acc = tl.zeros((BLOCK,), dtype=tl.float32)
            for first in range(0, counts[i], COUNT):
                arrays = (first + tl.arange(0, COUNT)).to(tl.int64)[:, None]
                inside = (arrays < counts[i]) & (at < sizes[i])[None, :]
                acc += tl.sum(tl.load(sources[i] + arrays * strides[i] + at[None, :], mask=inside, other=0.0), axis=0)
            to = outs[i] + at // widths[i] * out_strides[i] + at % widths[i]
            tl.store(to, (acc * scales[i]).to(outs[i].dtype.element_ty), mask=at < sizes[i])
