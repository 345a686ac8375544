"""Dropout by seed: which values are kept is a hash of (seed, row, column), so no mask is stored and any tiling agrees.

csrc/common/dropout.h computes the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser on int64 values below 2**32."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & WORD
    return x ^ (x >> 16)


def factors(rows: int, columns: int, p: float, seed: int, device: torch.device) -> Tensor:
    """float64 [rows, columns]: 0 with probability p, else 1 / (1 - p) (0 everywhere for p = 1)."""
    row, column = (torch.arange(n, device=device) for n in (rows, columns))
    low = _mix((row + (seed & WORD)) & WORD)
    key = (_mix(low ^ ((seed >> 32) & WORD)) + (row >> 32)) & WORD
    bits = _mix(key[:, None] ^ ((column * 0x9E3779B9) & WORD))
    scale = torch.tensor(1 / (1 - p) if p < 1 else 0.0, dtype=torch.float32).double()
    return torch.where(bits < min(int(p * 2**32), WORD), 0.0, scale.to(device))


def drawn_seed(p: float) -> int:
    """A seed from torch's generator, which checkpointing replays; 0 where nothing is dropped."""
    return int(torch.randint(2**62, ())) if p > 0 else 0
