"""Dropout by seed in Triton: the hash of fastpt/ops/_dropout.py, so no mask is stored and any tiling draws the same bits."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import triton
import triton.language as tl


@triton.jit
def mix_bits(x):
    """MurmurHash3's finaliser on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def row_keys(row, seed_low, seed_high):
    """What dropout draws a row's columns from; `row` int64, the seed's halves as `rule` gives them."""
    low = mix_bits(tl.cast(row, tl.uint32) + tl.cast(seed_low, tl.uint32))
    return mix_bits(low ^ tl.cast(seed_high, tl.uint32)) + tl.cast(row >> 32, tl.uint32)


@triton.jit
def seed_halves(first, second, third):
    """Low and high half of a seed from its three `words`, for row_keys."""
    first = (tl.cast(first, tl.uint32) >> 1) & 0x3FFFFF
    second = (tl.cast(second, tl.uint32) >> 1) & 0x3FFFFF
    third = (tl.cast(third, tl.uint32) >> 1) & 0x3FFFFF
    return first | (second << 22), (second >> 10) | (third << 12)


@triton.jit
def keys_of(rows, seed_words, i: tl.constexpr):
    """row_keys of the i-th of the seeds whose `words` these are."""
    seed = seed_halves(seed_words[3 * i], seed_words[3 * i + 1], seed_words[3 * i + 2])
    return row_keys(tl.cast(rows, tl.int64), seed[0], seed[1])


@triton.jit
def is_kept(keys, column, threshold):
    """Whether a value stays, for blocks of keys and columns (int32) that broadcast against each other."""
    return mix_bits(keys ^ (tl.cast(column, tl.uint32) * 0x9E3779B9)) >= tl.cast(threshold, tl.uint32)


def rule(p: float, seed: int) -> tuple[int, int, int, float]:
    """Low and high half of the seed, the threshold (as int32, whose bits the kernel takes), and 1 / (1 - p)."""
    words = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, min(int(p * 2**32), 0xFFFFFFFF)
    return *struct.unpack("iii", struct.pack("III", *words)), 1 / (1 - p) if p < 1 else 0.0


def words(seeds: Sequence[int]) -> tuple[int, ...]:
    """Three 22-bit words of each seed; odd and never 1, so that no seed in a tuple gets a kernel compiled for itself."""
    return tuple(1 << 24 | (seed >> 22 * i & 0x3FFFFF) << 1 | 1 for seed in seeds for i in range(3))
