"""Bytes that the C++ kernels need for a moment beyond inputs and outputs: packed operands, chunks, a piece for each thread.

An op names its function here in `register(..., workspace=)`. Each follows what its kernel in csrc/cpu allocates, by the same
constants (tests/test_memory_plan.py measures them), so that a plan needs no allowance for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpt.ops._library import nbytes


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ---- lora_linear.h -------------------------------------------------------------------------------------------------

ROWS, PANEL, TOKENS = 128, 64, 256


def _packed(depth: int, columns: int, itemsize: int) -> int:
    return _up(columns, PANEL) * _up(depth, 2) * itemsize


def _scratch(numbers: int, itemsize: int) -> int:
    return torch.get_num_threads() * _up(numbers, 64) * itemsize


def _parts(x: Tensor, a: Tensor) -> int:
    return 3 if x.dtype == torch.bfloat16 and a.dtype == torch.float32 else 1


def _operand(x: Tensor) -> int:
    """A copy of rows that a product cannot read as they are."""
    is_odd = x.dtype == torch.bfloat16 and x.shape[-1] % 2 == 1
    return (
        _up(x.shape[-1], 2) * (x.numel() // max(1, x.shape[-1])) * x.itemsize if is_odd or not x.is_contiguous() else 0
    )


def lora_linear(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds, absmax=None) -> int:
    """`absmax` of 4-bit weights: such a one is not packed, each thread unpacks a panel of it."""
    size, tokens, depth = x.itemsize, x.numel() // max(1, x.shape[-1]), x.shape[-1]
    in_4_bits = [s is not None for s in absmax or [None] * len(weights)]
    held, splits, widest = _operand(x), 0, 0
    for weight, bias, a, is_unpacked in zip(weights, biases, lora_a, in_4_bits, strict=True):
        held += (0 if is_unpacked else _packed(depth, len(weight), size)) + (0 if bias is None else 4 * len(bias))
        if a is None:
            continue
        rank, parts = len(a), _parts(x, a)
        held += _packed(depth, parts * rank, size) + _packed(rank, len(weight), size) + tokens * _up(rank, 2) * size
        held += nbytes(x) if dropout_p > 0 else 0
        splits += 2 * parts * a.numel() if parts > 1 else 0
        widest = max(widest, (parts + 1) * rank)
    panel = _scratch(_up(depth, 2) * PANEL, size) if any(in_4_bits) else 0
    return held + max(splits, _scratch(ROWS * widest, 4), _scratch(ROWS * PANEL, 4) + panel)


def nf4_linear(x, weights, absmax, nested, biases, lora_a, lora_b, scales, dropout_p, seeds) -> int:
    return lora_linear(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds, absmax)


def lora_swiglu(x, weights, *rest) -> int:
    return lora_linear(x, weights, *rest)


def lora_linear_backward(
    grads, x, weights, lora_a, lora_b, xas, scales, dropout_p, seeds, wants_x, wants, *options, absmax=None
) -> int:
    in_4_bits = [s is not None for s in absmax or [None] * len(weights)]
    size, tokens, depth = x.itemsize, x.numel() // max(1, x.shape[-1]), x.shape[-1]
    padded, held, splits, widest, most_rows = _up(tokens, 32), _operand(x), 0, 0, 0
    for i, (weight, a) in enumerate(zip(weights, lora_a, strict=True)):
        held += _operand(grads[i]) + (_packed(len(weight), depth, size) if wants_x and not in_4_bits[i] else 0)
        if a is None:
            continue
        rank, parts = len(a), _parts(x, a)
        wants_a, wants_b = wants[4 * i + 2 : 4 * i + 4]
        if wants_x or wants_a:
            held += _packed(len(weight), parts * rank, size)
            splits += 2 * parts * rank * len(weight) if parts > 1 else 0
        held += _packed(rank, depth, size) + tokens * _up(rank, 2) * size if wants_x else 0
        held += (wants_a + wants_b) * parts * rank * padded * size
        held += nbytes(x) if dropout_p > 0 and wants_a else 0
        widest, most_rows = max(widest, (parts + 2) * rank), max(most_rows, parts * rank)
    trained = sum(len(weight) for i, weight in enumerate(weights) if wants[4 * i])
    whole = (_packed(padded, depth, size) if trained else 0) + trained * padded * size
    adapters = _scratch(2 * most_rows * PANEL, 4) + _scratch(TOKENS * PANEL, size) if most_rows else 0
    panels = sum(
        _up(len(weight), 2) * PANEL for weight, is_unpacked in zip(weights, in_4_bits, strict=True) if is_unpacked
    )
    inputs = (_scratch(2 * ROWS * PANEL, 4) + _scratch(panels, size)) * wants_x
    return held + max(splits, whole, adapters, _scratch(ROWS * widest, 4), inputs)


def nf4_linear_backward(grads, x, weights, absmax, nested, *rest) -> int:
    return lora_linear_backward(grads, x, weights, *rest, absmax=absmax)


# ---- linear_cross_entropy.h ----------------------------------------------------------------------------------------

BLOCK, CLASSES, CHUNK_BYTES, MIN_ROWS = 64, 384, 56 << 20, 128


def _head(hidden: Tensor, weight: Tensor, kept: Tensor | None, wants: list[bool], keeps_probs: bool) -> int:
    size, depth, vocab = hidden.itemsize, hidden.shape[-1], len(weight)
    rows = len(hidden) if kept is None else len(kept)
    panel = min(CLASSES, _up(vocab, 2))
    panels = -(-vocab // panel)
    slots, stride = min(max(torch.get_num_threads(), 1), panels), _up(depth, 2)
    wants_rows = wants[1] or wants[2]
    probs = (panels if keeps_probs else slots) * panel if wants_rows else 0
    each = probs * (size + (4 // panel if keeps_probs else 0)) + slots * (depth * (2 * size + 4) + 32)
    most = max(MIN_ROWS, CHUNK_BYTES // each // BLOCK * BLOCK)
    chunks = -(-rows // most)
    per_chunk = -(-rows // chunks) if chunks else 0
    capacity = _up(per_chunk, BLOCK if per_chunk > BLOCK else 16)
    tiles = _up(capacity, BLOCK)
    held = (capacity + tiles) * stride * size + slots * (panel * BLOCK * 4 + capacity * (2 * 4 + 3 * 8))
    held += 8 * rows + (slots * panel * stride * size if stride != depth else 0)
    if wants[0]:
        held += slots * (depth * panel * size + panel * BLOCK * size + tiles * depth * 4)
        held += slots * (slots + 1) * BLOCK * depth * 4  # finish_dhidden: a piece for each thread
    if wants_rows:
        held += probs * capacity * size + (panels * capacity * 4 if keeps_probs else 0)
        held += (slots * capacity * depth if keeps_probs else 0) * size
        held += (slots if keeps_probs else 1) * capacity * stride * size
    return held


def linear_cross_entropy(
    hidden, weight, targets, kept, ignore_index, bias, low_hidden, low_weight, class_weight, softcap, logit_scale,
    label_smoothing, z_loss, is_mean, wants,
) -> int:  # fmt: skip
    return _head(hidden, weight, kept, wants, softcap is None or label_smoothing == 0)


def token_stats(hidden, weight, targets, kept, *rest) -> int:
    return _head(hidden, weight, kept, [False] * 5, False)


def token_stats_backward(*args) -> int:
    hidden, weight, _, kept, *_, wants = args[7:]
    return _head(hidden, weight, kept, wants, False)


# ---- attention.h ---------------------------------------------------------------------------------------------------

QUERIES, STEP = 64, 16


def _arena(*pieces: int) -> int:
    return sum(_up(piece, 64) for piece in pieces)


def _attention(q, k, cu_seqlens_q, cu_seqlens_k, causal, window) -> tuple[int, int, int, int]:
    """Padded keys of the longest sequence and of all, padded head dim, and parts of heads that are shared out."""
    threads, columns = torch.get_num_threads(), _up(_up(q.shape[2], 2 if q.dtype == torch.bfloat16 else 1), STEP)
    starts_q = [0, len(q)] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    starts_k = starts_q if cu_seqlens_k is None and cu_seqlens_q is not None else [0, len(k)]
    starts_k = cu_seqlens_k.tolist() if cu_seqlens_k is not None else starts_k
    lengths = [
        (starts_q[i + 1] - starts_q[i], starts_k[i + 1] - starts_k[i])
        for i in range(min(len(starts_q), len(starts_k)) - 1)
    ]
    padded = [_up(keys, STEP) for _, keys in lengths]
    before = 1 << 40 if window is None else window - 1
    costs = [_pair_cost(queries, keys, before, 0 if causal else before) for queries, keys in lengths]
    total, group = sum(costs) * q.shape[1], q.shape[1] // k.shape[1]
    limit = total if threads == 1 else total // (4 * threads)
    parts = 0
    for (queries, _), cost in zip(lengths, costs, strict=True):
        items = -(-queries // QUERIES) * group
        n = min(max((cost * group + limit) // (limit + 1), 1), max(items, 1))
        parts += n * k.shape[1] if n > 1 else 0
    return max(padded, default=0), sum(padded), columns, parts


def _pair_cost(queries: int, keys: int, before: int, after: int) -> int:
    cost = 0
    for first in range(0, queries, QUERIES):
        last = min(queries, first + QUERIES) - 1
        end = min(max(last + keys - queries + after + 1, 0), keys)
        start = min(max(first + keys - queries - before, 0), keys) // PANEL * PANEL
        cost += STEP + max(end - start, 0)
    return cost


def attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale) -> int:
    longest, packed, columns, parts = _attention(q, k, cu_seqlens_q, cu_seqlens_k, causal, window)
    keys = longest * columns * q.itemsize
    each = _arena(keys, keys, 4 * QUERIES, 4 * QUERIES * STEP, 4 * QUERIES * columns)
    shared = 2 * k.shape[1] * packed * columns * q.itemsize if parts else 0
    return torch.get_num_threads() * each + shared


def attention_backward(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale) -> int:
    longest, packed, columns, parts = _attention(q, k, cu_seqlens_q, cu_seqlens_k, causal, window)
    keys, rows, tile = longest * columns, QUERIES * columns * q.itemsize, QUERIES * PANEL * q.itemsize
    each = _arena(rows, rows, tile, tile, *[keys * q.itemsize] * 3, 4 * QUERIES * columns, 256, 256, 4 * keys, 4 * keys)
    shared = 3 * k.shape[1] * packed * columns * q.itemsize if parts else 0
    return torch.get_num_threads() * each + shared + 8 * parts * keys


# ---- row_blocks.h --------------------------------------------------------------------------------------------------


def rms_norm_backward(grad, grad_sum, x, rstd, weight, offset, wants_weight) -> int:
    rows = x.numel() // max(1, x.shape[-1])
    blocks = -(-rows // max(32, -(-rows // 64))) if rows else 0
    copies = 0 if grad.is_contiguous() else nbytes(grad)
    return copies + (4 * blocks * x.shape[-1] if wants_weight else 0)
