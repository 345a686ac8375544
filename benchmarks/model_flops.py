"""Model FLOPs of a training step, and what the machine can do at most: the two sides of "how much of the ceiling"."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

CACHED_BYTES = 16 << 20  # a call that moves less than this may find it all in the last-level cache


def training_flops(model: Any, lengths: list[int], kept: int) -> int:
    """Multiply-adds, counted as 2, that one step cannot do without: products forward and backward, nothing recomputed.

    `lengths` are the documents of the step, `kept` of their tokens have a target and reach the head. A frozen weight costs one
    product in backward (for its input), a trained one two. Attention is causal: the masked half is not counted.
    """
    tokens, head = sum(lengths), model.get_output_embeddings()
    flops = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            rows = kept if module is head else tokens
            flops += 2 * rows * module.weight.numel() * (2 + module.weight.requires_grad)
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    attention = 2 * 2 * width * config.num_attention_heads * pairs * config.num_hidden_layers
    return flops + 3 * attention  # two products forward, four backward


@dataclass(frozen=True)
class Ceiling:
    """What this machine reached while nothing else of ours ran."""

    bf16_gflop_per_s: float
    fp32_gflop_per_s: float
    cache_gb_per_s: float
    memory_gb_per_s: float

    @classmethod
    def measure(cls) -> Ceiling:
        """The best of several short measurements of each, on all threads."""
        gemm = {is_bf16: max(gemm_ceiling(is_bf16) for _ in range(4)) for is_bf16 in (True, False)}
        return cls(gemm[True], gemm[False], _copy_rate(4 << 20), _copy_rate(256 << 20))

    def floor_s(self, flops: int, moved_bytes: int) -> float:
        """Seconds that a call with these FLOPs (bf16) and bytes needs at least."""
        rate = self.cache_gb_per_s if moved_bytes < CACHED_BYTES else self.memory_gb_per_s
        return max(flops / self.bf16_gflop_per_s, moved_bytes / rate) / 1e9

    def record(self) -> dict[str, float]:
        return asdict(self)


def gemm_ceiling(is_bf16: bool) -> float:
    """GFLOP/s of one brgemm tile over and over on all threads, for 0.2 s."""
    import fastpt.ops  # noqa: F401  (says so when the native module does not fit)
    from fastpt import _C as native

    return native.gemm_ceiling(is_bf16, 0.2)


def _copy_rate(nbytes: int) -> float:
    """GB/s of reading `nbytes` and writing them elsewhere, the best of many."""
    source, target = torch.ones(nbytes // 4), torch.empty(nbytes // 4)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < 1.0:
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * nbytes / best / 1e9


def nbytes_of(*values: Any) -> int:
    """Bytes of the tensors among the arguments or results of an op."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, (list, tuple)):
            total += nbytes_of(*value)
    return total
