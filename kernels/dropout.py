"""Which values dropout keeps, in Triton: the hash of fastpt/ops/_dropout.py, so no mask is stored and any tiling agrees."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl


def rule(p: float) -> tuple[int, float]:
    """A value is dropped when its 32 bits lie below the first; what is kept is multiplied by the second."""
    return min(int(p * 2**32), 0xFFFFFFFF), 1 / (1 - p) if p < 1 else 0.0


def words(seeds: Sequence[int]) -> tuple[int, ...]:
    """Three 22-bit words of each seed; odd and never 1, so that no seed gets a kernel compiled for itself."""
    return tuple(1 << 24 | (seed >> 22 * i & 0x3FFFFF) << 1 | 1 for seed in seeds for i in range(3))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def row_keys(first, second, third, rows):
    """uint32 key of each row from the three words of a seed; fewer than 2**31 rows."""
    first = (tl.cast(first, tl.uint32) >> 1) & 0x3FFFFF
    second = (tl.cast(second, tl.uint32) >> 1) & 0x3FFFFF
    third = (tl.cast(third, tl.uint32) >> 1) & 0x3FFFFF
    low = _mix(rows.to(tl.uint32) + (first | (second << 22)))
    return _mix(low ^ ((second >> 10) | (third << 12)))


@triton.jit
def is_kept(keys, columns, THRESHOLD: tl.constexpr):
    """Of keys [M, 1] and columns [1, N]: what is multiplied by the scale; the others are 0."""
    return _mix(keys ^ (columns.to(tl.uint32) * 0x9E3779B9)) >= THRESHOLD
