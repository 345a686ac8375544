"""attention's backward in Triton: one kernel over tiles of rows for dq, one over tiles of keys for dk and dv.

Scores are formed in both: 7 products where one kernel could do with 5. That one would have to add each tile's dq up across
programs: by float atomics (not deterministic), or through a float32 buffer for every tile of keys, whose traffic grows with
the square of the length. In units of dq's bytes, causal, tiles of 128, no cache: 22 instead of the 18 that this backward
moves at 512 tokens, 202 instead of 138 at 8192, for two products fewer on tensor cores.
A tile's rows hold all query heads of its key head, so dk and dv come out summed over the group.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .attention_launch import VARYING, launch_of, problem_of, rows_contiguous, tiles
from .attention_tiles import (
    bounds,
    find_tile,
    key_range,
    load_rows,
    load_tile,
    raised,
    row_range,
    sees,
    sees_one,
    store_rows,
    tanh,
)
from .dropout import is_kept, row_keys
from .launch import on_device


@triton.jit
def _add_dq(
    dq, q, grad, lse, delta, k_at, v_at, stride_kt, stride_vt, low, high, queries, keys,
    into_cap, factor, window, row_key, threshold, kept_scale,
    KEYS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, BASE2: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What keys [low, high) give to dq."""
    dim = tl.arange(0, PADDED)
    for start in tl.range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        k = load_tile(k_at + tl.cast(start, tl.int64) * stride_kt, key < keys, dim, DIM, PADDED, MASKED)
        v = load_tile(v_at + tl.cast(start, tl.int64) * stride_vt, key < keys, dim, DIM, PADDED, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP:
            scores = tanh(scores * into_cap)
        weights = raised(scores * factor - lse[:, None], BASE2)
        if MASKED:
            seen = sees(queries[:, None], key[None, :], window, CAUSAL, WINDOW) & (key < keys)[None, :]
            weights = tl.where(seen, weights, 0.0)
        dweights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            kept = is_kept(row_key[:, None], key[None, :], threshold)
            dweights = tl.where(kept, dweights * kept_scale, 0.0)
        dscores = weights * (dweights - delta[:, None])
        if DROPOUT:
            dscores = tl.where(sees_one(queries, keys, window, CAUSAL, WINDOW)[:, None], 0.0, dscores)
        if SOFTCAP:
            dscores *= 1.0 - scores * scores
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _exact_delta(
    q, grad, lse, k_at, v_at, stride_kt, stride_vt, low, high, queries, keys,
    into_cap, factor, window, row_key, threshold, kept_scale,
    KEYS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """delta as the sum of weights times their gradients over the keys: what is subtracted from these very gradients then
    errs as they do. grad . out, the same number, has roundings of its own, which float32 would show."""
    dim = tl.arange(0, PADDED)
    delta = lse * 0.0
    for start in tl.range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        k = load_tile(k_at + tl.cast(start, tl.int64) * stride_kt, key < keys, dim, DIM, PADDED, True)
        v = load_tile(v_at + tl.cast(start, tl.int64) * stride_vt, key < keys, dim, DIM, PADDED, True)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP:
            scores = tanh(scores * into_cap)
        weights = raised(scores * factor - lse[:, None], False)
        seen = sees(queries[:, None], key[None, :], window, CAUSAL, WINDOW) & (key < keys)[None, :]
        if DROPOUT:
            seen = seen & is_kept(row_key[:, None], key[None, :], threshold)
        dweights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        delta += tl.sum(tl.where(seen, weights * (dweights * kept_scale), 0.0), 1)
    return delta


@triton.jit(do_not_specialize=VARYING)
def attention_dq(
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dq_ptr, rows_ptr,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_dqt, scale, cu_q_ptr, cu_k_ptr, sequences, tokens_q, tokens_k, into_cap, factor, window,
    seed_low, seed_high, threshold, kept_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    BASE2: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq, and for attention_dkdv each row's lse and delta = grad . out side by side, as its loop reads them."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, first_row = find_tile(tile, cu_q_ptr, sequences, tokens_q, ROWS, GROUP, PACKED)
    begin, length = bounds(sequence, cu_q_ptr, tokens_q, PACKED)
    if first_row < length * GROUP:
        begin_k, keys = bounds(sequence, cu_k_ptr, tokens_k, PACKED)
        head_k = tl.program_id(1)
        row = first_row + tl.arange(0, ROWS)
        token, head, inside = begin + row // GROUP, head_k * GROUP + row % GROUP, row < length * GROUP
        grad = load_rows(grad_ptr, begin, first_row, head_k, inside, stride_gt, stride_gh, ROWS, GROUP, DIM, PADDED)
        lse_at = lse_ptr + token.to(tl.int64) * HEADS + head
        lse = tl.load(lse_at, mask=inside, other=float("inf"))
        if BASE2:
            lse *= 1.4426950408889634
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
        if BASE2:
            out = load_rows(out_ptr, begin, first_row, head_k, inside, stride_ot, stride_oh, ROWS, GROUP, DIM, PADDED)
            delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        else:
            delta = _exact_delta(
                q, grad, lse, k_at, v_at, stride_kt, stride_vt, low, high, queries, keys,
                into_cap, factor, window, row_key, threshold, kept_scale,
                KEYS, DIM, PADDED, CAUSAL, WINDOW, SOFTCAP, DROPOUT,
            )  # fmt: skip
        at = head_k.to(tl.int64) * tokens_q * GROUP + tl.cast(begin, tl.int64) * GROUP + row
        tl.store(rows_ptr + at, lse, mask=inside)
        tl.store(rows_ptr + tl.num_programs(1).to(tl.int64) * tokens_q * GROUP + at, delta, mask=inside)
        dq = tl.zeros((ROWS, PADDED), tl.float32)
        if WINDOW:
            dq = _add_dq(
                dq, q, grad, lse, delta, k_at, v_at, stride_kt, stride_vt, low, full_low, queries, keys,
                into_cap, factor, window, row_key, threshold, kept_scale,
                KEYS, DIM, PADDED, CAUSAL, WINDOW, SOFTCAP, DROPOUT, BASE2, True,
            )  # fmt: skip
        dq = _add_dq(
            dq, q, grad, lse, delta, k_at, v_at, stride_kt, stride_vt, full_low, full_high, queries, keys,
            into_cap, factor, window, row_key, threshold, kept_scale,
            KEYS, DIM, PADDED, CAUSAL, WINDOW, SOFTCAP, DROPOUT, BASE2, False,
        )  # fmt: skip
        dq = _add_dq(
            dq, q, grad, lse, delta, k_at, v_at, stride_kt, stride_vt, full_high, high, queries, keys,
            into_cap, factor, window, row_key, threshold, kept_scale,
            KEYS, DIM, PADDED, CAUSAL, WINDOW, SOFTCAP, DROPOUT, BASE2, True,
        )  # fmt: skip
        store_rows(dq_ptr, begin, first_row, head_k, inside, dq * scale, stride_dqt, ROWS, GROUP, DIM, PADDED)


@triton.jit
def _add_dkdv(
    dk, dv, k, v, grad_ptr, q_ptr, rows_ptr, to_delta, stride_gt, stride_gh, stride_qt, stride_qh,
    begin, head_k, length, low, high, shift, key, into_cap, factor, window, seed_low, seed_high, threshold, kept_scale,
    ROWS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, BASE2: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """What rows [low, high) give to dk and dv. Scores stand transposed, [KEYS, ROWS], as both products take them."""
    for start in tl.range(low, high, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < length * GROUP
        q = load_rows(q_ptr, begin, start, head_k, inside, stride_qt, stride_qh, ROWS, GROUP, DIM, PADDED)
        lse = tl.load(rows_ptr + row, mask=inside, other=float("inf"))
        if BASE2:
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        else:  # forward's product, to the last bit
            scores = tl.trans(tl.dot(q, tl.trans(k), input_precision="ieee"))
        if SOFTCAP:
            scores = tanh(scores * into_cap)
        weights = raised(scores * factor - lse[None, :], BASE2)
        if MASKED:
            weights = tl.where(
                sees((row // GROUP + shift)[None, :], key[:, None], window, CAUSAL, WINDOW), weights, 0.0
            )
        grad = load_rows(grad_ptr, begin, start, head_k, inside, stride_gt, stride_gh, ROWS, GROUP, DIM, PADDED)
        kept_weights = weights
        if DROPOUT:
            at = (begin + row // GROUP).to(tl.int64) * HEADS + head_k * GROUP + row % GROUP
            row_key = row_keys(at, seed_low, seed_high)
            kept = is_kept(row_key[None, :], key[:, None], threshold)
            kept_weights = tl.where(kept, weights, 0.0)
        dv = tl.dot(kept_weights.to(grad.dtype), grad, dv, input_precision="ieee")
        dweights = tl.dot(v, tl.trans(grad), input_precision="ieee")
        if DROPOUT:
            dweights = tl.where(kept, dweights * kept_scale, 0.0)
        delta = tl.load(rows_ptr + to_delta + row, mask=inside, other=0.0)
        dscores = weights * (dweights - delta[None, :])
        if DROPOUT:
            lone = sees_one(row // GROUP + shift, length + shift, window, CAUSAL, WINDOW)
            dscores = tl.where(lone[None, :], 0.0, dscores)
        if SOFTCAP:
            dscores *= 1.0 - scores * scores
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=VARYING)
def attention_dkdv(
    grad_ptr, q_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr, rows_ptr,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dkt, stride_dvt,
    scale, cu_q_ptr, cu_k_ptr, sequences, tokens_q, tokens_k, into_cap, factor, window,
    seed_low, seed_high, threshold, kept_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    BASE2: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sequence, first_key = find_tile(tl.program_id(0), cu_k_ptr, sequences, tokens_k, KEYS, 1, PACKED)
    begin_k, keys = bounds(sequence, cu_k_ptr, tokens_k, PACKED)
    if first_key < keys:
        begin, length = bounds(sequence, cu_q_ptr, tokens_q, PACKED)
        head_k = tl.program_id(1)
        key = first_key + tl.arange(0, KEYS)
        # Keys past the end are zeros: their rows of dk and dv are not stored, and no other row hears of them.
        inside = key < keys
        k = load_rows(k_ptr, begin_k, first_key, head_k, inside, stride_kt, stride_kh, KEYS, 1, DIM, PADDED)
        v = load_rows(v_ptr, begin_k, first_key, head_k, inside, stride_vt, stride_vh, KEYS, 1, DIM, PADDED)
        shift, last_key = keys - length, tl.minimum(first_key + KEYS, keys) - 1
        low, full_low, full_high, high = row_range(
            first_key, last_key, length, shift, window, ROWS, GROUP, CAUSAL, WINDOW
        )
        rows_ptr += head_k.to(tl.int64) * tokens_q * GROUP + tl.cast(begin, tl.int64) * GROUP
        to_delta = tl.num_programs(1).to(tl.int64) * tokens_q * GROUP
        dk, dv = tl.zeros((KEYS, PADDED), tl.float32), tl.zeros((KEYS, PADDED), tl.float32)
        if CAUSAL or WINDOW:
            dk, dv = _add_dkdv(
                dk, dv, k, v, grad_ptr, q_ptr, rows_ptr, to_delta, stride_gt, stride_gh, stride_qt, stride_qh,
                begin, head_k, length, low, full_low, shift, key, into_cap, factor, window,
                seed_low, seed_high, threshold, kept_scale,
                ROWS, HEADS, GROUP, DIM, PADDED, CAUSAL, WINDOW, SOFTCAP, DROPOUT, BASE2, True,
            )  # fmt: skip
        dk, dv = _add_dkdv(
            dk, dv, k, v, grad_ptr, q_ptr, rows_ptr, to_delta, stride_gt, stride_gh, stride_qt, stride_qh,
            begin, head_k, length, full_low, full_high, shift, key, into_cap, factor, window,
            seed_low, seed_high, threshold, kept_scale,
            ROWS, HEADS, GROUP, DIM, PADDED, CAUSAL, WINDOW, SOFTCAP, DROPOUT, BASE2, False,
        )  # fmt: skip
        if WINDOW:
            dk, dv = _add_dkdv(
                dk, dv, k, v, grad_ptr, q_ptr, rows_ptr, to_delta, stride_gt, stride_gh, stride_qt, stride_qh,
                begin, head_k, length, full_high, high, shift, key, into_cap, factor, window,
                seed_low, seed_high, threshold, kept_scale,
                ROWS, HEADS, GROUP, DIM, PADDED, CAUSAL, WINDOW, SOFTCAP, DROPOUT, BASE2, True,
            )  # fmt: skip
        store_rows(dk_ptr, begin_k, first_key, head_k, inside, dk * scale, stride_dkt, KEYS, 1, DIM, PADDED)
        store_rows(dv_ptr, begin_k, first_key, head_k, inside, dv * kept_scale, stride_dvt, KEYS, 1, DIM, PADDED)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, causal: bool, window: int | None, softcap: float | None, scale: float,
    dropout_p: float = 0.0, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    problem = problem_of(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale, dropout_p, seed)
    if not (grad.shape == out.shape == q.shape and lse.shape == q.shape[:2] and grad.dtype == out.dtype == q.dtype):
        raise RuntimeError(
            f"attention_backward: grad {list(grad.shape)} {grad.dtype}, out {list(out.shape)} {out.dtype}, "
            f"lse {list(lse.shape)}; they must fit q {list(q.shape)} {q.dtype}"
        )
    grad, q, k, v, out = (rows_contiguous(x) for x in (grad, q, k, v, out))
    lse = lse.contiguous()
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    rows, heads_k = q.shape[0] * problem.group, k.shape[1]
    per_row = lse.new_empty((2, heads_k, rows))  # lse, delta
    strides = [stride for x in (grad, q, k, v) for stride in x.stride()[:2]]
    with on_device(q):
        if dq.numel() > 0 and heads_k > 0:
            launch = launch_of("attention_dq", q, problem)
            attention_dq[(tiles(rows, launch.rows, problem), heads_k)](
                grad, q, k, v, out, lse, dq, per_row, *strides, *out.stride()[:2], dq.stride(0),
                scale, *problem.arguments, **problem.constants, ROWS=launch.rows, KEYS=launch.columns,
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
        if dk.numel() > 0:
            launch = launch_of("attention_dkdv", q, problem)
            attention_dkdv[(tiles(k.shape[0], launch.columns, problem), heads_k)](
                grad, q, k, v, dk, dv, per_row, *strides, dk.stride(0), dv.stride(0),
                scale, *problem.arguments, **problem.constants, ROWS=launch.rows, KEYS=launch.columns,
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
    return dq, dk, dv
