"""What the data sheets promise: dense bf16 with float32 accumulation, without sparsity; memory bandwidth; memory."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    name: str
    flop_per_s: float
    bytes_per_s: float

    def floor_s(self, flops: float, moved: float) -> float:
        return max(flops / self.flop_per_s, moved / self.bytes_per_s)


DEVICES = [
    Device("A100 80 GB SXM", 312e12, 2.039e12),
    Device("H100 SXM", 989e12, 3.35e12),
    Device("B200", 2250e12, 8.0e12),
    Device("RTX 4090", 165e12, 1.008e12),
    Device("L4", 121e12, 0.300e12),
]
MEMORIES_GB = (16, 24, 48, 80)
