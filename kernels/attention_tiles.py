"""What attention's kernels share: which sequence a tile lies in, which keys a query sees, and scores from products.

Rows: the G query heads of one key head are rows of one matrix, row = token * G + head, so a tile of rows reads a key once
for all of them and sums their dK and dV as it goes. No kernel needs to know a sequence's length before it is launched:
sequence n owns the tiles from (its first row) // ROWS + n on, which leaves room for every partial tile, so the grid
follows from the shapes alone and a program finds its sequence by bisection.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bound(cu_ptr, at, tokens):
    """cu_seqlens[at] in int32, held within the tensor: a wrong value must not read or write outside of it."""
    return tl.minimum(tl.maximum(tl.load(cu_ptr + at).to(tl.int32), 0), tokens)


@triton.jit
def find_tile(tile, cu_ptr, sequences, tokens, ROWS: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr):
    """(sequence, first row within it) of a tile of ROWS rows; a tile past its sequence's end has nothing to do."""
    if PACKED:
        low, high = tile * 0, tile * 0 + sequences - 1
        while low < high:
            middle = (low + high + 1) // 2
            first = _bound(cu_ptr, middle, tokens).to(tl.int64) * GROUP // ROWS + middle
            low = tl.where(first <= tile, middle, low)
            high = tl.where(first <= tile, high, middle - 1)
        first = _bound(cu_ptr, low, tokens).to(tl.int64) * GROUP // ROWS + low
        return low, ((tile - first) * ROWS).to(tl.int32)
    else:
        return tile * 0, tile * ROWS


@triton.jit
def bounds(sequence, cu_ptr, tokens, PACKED: tl.constexpr):
    """First token and length of a sequence."""
    if PACKED:
        begin = _bound(cu_ptr, sequence, tokens)
        return begin, tl.maximum(_bound(cu_ptr, sequence + 1, tokens) - begin, 0)
    else:
        return sequence, sequence + tokens


@triton.jit
def sees(query, key, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether queries see keys, both by their place among the keys; blocks that broadcast against each other."""
    if CAUSAL:
        seen = key <= query
        if WINDOW:
            seen = seen & (key > query - window)
    else:
        seen = (key > query - window) & (key < query + window) if WINDOW else key == key + query * 0
    return seen


@triton.jit
def sees_one(query, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether a query sees a single key: the gradient of its score is exactly 0, which dp - delta would miss by a rounding
    of out once dropout has scaled it."""
    low, high = query * 0, query * 0 + keys - 1
    if WINDOW:
        low = tl.maximum(low, query - window + 1)
        high = tl.minimum(high, query + window - 1)
    if CAUSAL:
        high = tl.minimum(high, query)
    return low == high


@triton.jit
def key_range(first, last, keys, window, KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """(low, full_low, full_high, high) for queries from `first` to `last`: keys that some of them see, and in the middle
    whole tiles of KEYS that all of them see, which need no mask."""
    low, high, full_low, full_high = keys * 0, keys, keys * 0, keys
    if CAUSAL:
        high = tl.minimum(high, tl.maximum(last + 1, 0))
        full_high = tl.minimum(full_high, tl.maximum(first + 1, 0))
    if WINDOW:
        low = tl.maximum(first - window + 1, 0) // KEYS * KEYS
        full_low = (tl.maximum(last - window + 1, 0) + KEYS - 1) // KEYS * KEYS
        if not CAUSAL:
            high = tl.minimum(high, tl.maximum(last + window, 0))
            full_high = tl.minimum(full_high, tl.maximum(first + window, 0))
    full_high = full_high // KEYS * KEYS
    some = full_low < full_high
    return low, tl.where(some, full_low, low), tl.where(some, full_high, low), high


@triton.jit
def row_range(
    first, last, queries, shift, window,
    ROWS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The same of rows, for keys from `first` to `last`: rows that see some of them, and between, tiles that see all.
    Query i stands at key i + shift. Rows past the end count as seeing all: their lse makes their weights 0."""
    low, high, full_low, full_high = queries * 0, queries, queries * 0, queries
    if CAUSAL:
        low = tl.maximum(first - shift, 0)
        full_low = tl.maximum(last - shift, 0)
    if WINDOW:
        high = tl.maximum(tl.minimum(high, last + window - shift), 0)
        full_high = tl.maximum(tl.minimum(full_high, first + window - shift), 0)
        if not CAUSAL:
            low = tl.maximum(first - window + 1 - shift, 0)
            full_low = tl.maximum(last - window + 1 - shift, 0)
    low, high = low * GROUP // ROWS * ROWS, high * GROUP
    full_low = (full_low * GROUP + ROWS - 1) // ROWS * ROWS
    full_high = full_high * GROUP // ROWS * ROWS if WINDOW else high
    some = full_low < full_high
    return low, tl.where(some, full_low, high), tl.where(some, full_high, high), high


@triton.jit
def tanh(x):
    """Exact to float32 near 0 too, where 2 sigmoid(2x) - 1 loses what it subtracts."""
    square = x * x
    tail = square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835 - square * (1382 / 155925))))
    near = x + x * square * (tail - 1 / 3)
    return tl.where(square < 0.15, near, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def raised(x, BASE2: tl.constexpr):
    """2 ** x, one instruction, where the scores carry log2(e); e ** x in float32, whose forward and backward then agree
    to the last bit on a weight of 1."""
    return tl.exp2(x) if BASE2 else tl.exp(x)


@triton.jit
def load_tile(at, inside, dim, DIM: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """[rows, PADDED] from pointers; zeros past DIM and, where MASKED, in rows that are not inside."""
    if DIM < PADDED:
        return tl.load(at, mask=inside[:, None] & (dim < DIM)[None, :] if MASKED else (dim < DIM)[None, :], other=0.0)
    elif MASKED:
        return tl.load(at, mask=inside[:, None], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def rows_at(
    base, begin, first, head_k, stride_t, stride_h, ROWS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Pointers [ROWS, PADDED] to base[token, head] of the rows from `first`, a multiple of ROWS, of a sequence."""
    local, dim = tl.arange(0, ROWS), tl.arange(0, PADDED)
    if ROWS % GROUP == 0:  # every tile begins at a token: one pattern of offsets, in 32 bits, serves all of a loop
        base += (begin + first // GROUP).to(tl.int64) * stride_t + (head_k * GROUP).to(tl.int64) * stride_h
        offsets = local // GROUP * stride_t + local % GROUP * stride_h
    else:
        row = first + local
        offsets = (begin + row // GROUP).to(tl.int64) * stride_t
        offsets += (head_k * GROUP + row % GROUP).to(tl.int64) * stride_h
    return base + offsets[:, None] + dim[None, :]


@triton.jit
def load_rows(
    base, begin, first, head_k, inside, stride_t, stride_h,
    ROWS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """[ROWS, PADDED] of base[token, head, :DIM], zeros where not inside."""
    at = rows_at(base, begin, first, head_k, stride_t, stride_h, ROWS, GROUP, PADDED)
    return load_tile(at, inside, tl.arange(0, PADDED), DIM, PADDED, True)


@triton.jit
def store_rows(
    base, begin, first, head_k, inside, values, stride_t,
    ROWS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """base[token, head, :DIM] = values, of a tensor whose heads lie next to each other."""
    at = rows_at(base, begin, first, head_k, stride_t, DIM, ROWS, GROUP, PADDED)
    mask = inside[:, None] & (tl.arange(0, PADDED) < DIM)[None, :] if DIM < PADDED else inside[:, None]
    tl.store(at, values.to(base.dtype.element_ty), mask=mask)
