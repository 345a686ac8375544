"""attention in Triton: one pass over the keys that a tile of rows sees, the softmax rescaled as its maximum grows.

Notation and idea: FlashAttention-2 (Dao 2023). Rows, tiles and masks: attention_tiles.py; what a launch needs:
attention_launch.py; backward: attention_backward.py; the definition: fastpt/ops/attention.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_launch import VARYING, launch_of, problem_of, rows_contiguous, tiles
from .attention_tiles import bounds, find_tile, key_range, load_rows, load_tile, raised, sees, store_rows, tanh
from .dropout import is_kept, row_keys
from .launch import on_device


@triton.jit
def _attend(
    total, peak, weighted, q, k_at, v_at, stride_kt, stride_vt, low, high, queries, keys,
    into_cap, factor, window, row_key, threshold,
    KEYS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, BASE2: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys [low, high) added to each row's sum of weights, largest score and weighted sum of values."""
    dim = tl.arange(0, PADDED)
    for start in tl.range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        k = load_tile(k_at + tl.cast(start, tl.int64) * stride_kt, key < keys, dim, DIM, PADDED, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP:
            scores = tanh(scores * into_cap)
        if MASKED:
            seen = sees(queries[:, None], key[None, :], window, CAUSAL, WINDOW) & (key < keys)[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = raised(scores * factor - shift[:, None], BASE2)
        shrink = raised(peak - shift, BASE2)
        total = total * shrink + tl.sum(weights, 1)
        peak = new_peak
        if DROPOUT:
            weights = tl.where(is_kept(row_key[:, None], key[None, :], threshold), weights, 0.0)
        v = load_tile(v_at + tl.cast(start, tl.int64) * stride_vt, key < keys, dim, DIM, PADDED, MASKED)
        weighted = tl.dot(weights.to(v.dtype), v, weighted * shrink[:, None], input_precision="ieee")
    return total, peak, weighted


@triton.jit(do_not_specialize=VARYING)
def attention_forward(
    q_ptr, k_ptr, v_ptr, sinks_ptr, out_ptr, lse_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot,
    cu_q_ptr, cu_k_ptr, sequences, tokens_q, tokens_k, into_cap, factor, window,
    seed_low, seed_high, threshold, kept_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    BASE2: tl.constexpr, PACKED: tl.constexpr, SINKS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # a causal sequence's last tile, the longest, goes first
    sequence, first_row = find_tile(tile, cu_q_ptr, sequences, tokens_q, ROWS, GROUP, PACKED)
    begin, length = bounds(sequence, cu_q_ptr, tokens_q, PACKED)
    if first_row < length * GROUP:
        begin_k, keys = bounds(sequence, cu_k_ptr, tokens_k, PACKED)
        head_k = tl.program_id(1)
        row = first_row + tl.arange(0, ROWS)
        token, head, inside = begin + row // GROUP, head_k * GROUP + row % GROUP, row < length * GROUP
        q = load_rows(q_ptr, begin, first_row, head_k, inside, stride_qt, stride_qh, ROWS, GROUP, DIM, PADDED)
        k_at = k_ptr + begin_k.to(tl.int64) * stride_kt + head_k.to(tl.int64) * stride_kh
        v_at = v_ptr + begin_k.to(tl.int64) * stride_vt + head_k.to(tl.int64) * stride_vh
        k_at += tl.arange(0, KEYS)[:, None] * stride_kt + tl.arange(0, PADDED)[None, :]
        v_at += tl.arange(0, KEYS)[:, None] * stride_vt + tl.arange(0, PADDED)[None, :]

        queries = row // GROUP + (keys - length)
        first = first_row // GROUP + (keys - length)
        last = tl.minimum((first_row + ROWS - 1) // GROUP, length - 1) + (keys - length)
        low, full_low, full_high, high = key_range(first, last, keys, window, KEYS, CAUSAL, WINDOW)
        row_key = row_keys(token.to(tl.int64) * HEADS + head, seed_low, seed_high) if DROPOUT else row
        total, peak = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), float("-inf"), tl.float32)
        weighted = tl.zeros((ROWS, PADDED), tl.float32)
        if WINDOW:
            total, peak, weighted = _attend(
                total, peak, weighted, q, k_at, v_at, stride_kt, stride_vt, low, full_low, queries, keys,
                into_cap, factor, window, row_key, threshold,
                KEYS, DIM, PADDED, CAUSAL, WINDOW, SOFTCAP, DROPOUT, BASE2, True,
            )  # fmt: skip
        total, peak, weighted = _attend(
            total, peak, weighted, q, k_at, v_at, stride_kt, stride_vt, full_low, full_high, queries, keys,
            into_cap, factor, window, row_key, threshold,
            KEYS, DIM, PADDED, CAUSAL, WINDOW, SOFTCAP, DROPOUT, BASE2, False,
        )  # fmt: skip
        total, peak, weighted = _attend(
            total, peak, weighted, q, k_at, v_at, stride_kt, stride_vt, full_high, high, queries, keys,
            into_cap, factor, window, row_key, threshold,
            KEYS, DIM, PADDED, CAUSAL, WINDOW, SOFTCAP, DROPOUT, BASE2, True,
        )  # fmt: skip

        if SINKS:  # a key more that every row sees, whose value is 0; last, so that the keys' largest weight was exact
            sink = tl.load(sinks_ptr + head) * (1.4426950408889634 if BASE2 else 1.0)
            new_peak = tl.maximum(peak, sink)
            shrink = raised(peak - new_peak, BASE2)
            total = total * shrink + raised(sink - new_peak, BASE2)
            weighted *= shrink[:, None]
            peak = new_peak
        blind = total == 0.0  # sees no key
        total = tl.where(blind, 1.0, total)
        weighted = weighted * (kept_scale / total)[:, None]
        store_rows(out_ptr, begin, first_row, head_k, inside, weighted, stride_ot, ROWS, GROUP, DIM, PADDED)
        lse = (peak + tl.log2(total)) * 0.6931471805599453 if BASE2 else peak + tl.log(total)
        lse_at = lse_ptr + token.to(tl.int64) * HEADS + head
        tl.store(lse_at, tl.where(blind, float("inf"), lse), mask=inside)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, causal: bool,
    window: int | None, softcap: float | None, scale: float, dropout_p: float = 0.0, seed: int = 0,
    *, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = problem_of(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale, dropout_p, seed)
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.dtype != torch.float32):
        raise RuntimeError(f"attention: sinks is {list(sinks.shape)} {sinks.dtype}; it must be float32 [{q.shape[1]}]")
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    if out.numel() > 0 and k.shape[1] > 0:
        launch = launch_of("attention_forward", q, problem)
        with on_device(q):
            attention_forward[(tiles(q.shape[0] * problem.group, launch.rows, problem), k.shape[1])](
                q, k, v, q if sinks is None else sinks.contiguous(), out, lse,
                *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], out.stride(0), *problem.arguments,
                **problem.constants, SINKS=sinks is not None, ROWS=launch.rows, KEYS=launch.columns,
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
    return out, lse
