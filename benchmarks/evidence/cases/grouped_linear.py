"""grouped_linear: experts with LoRA on a frozen stack, and experts that are trained; empty experts, few tokens to one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evidence.case import Bars, Case, Inputs, Make
from fastpt.ops import grouped_linear
from fastpt.ops._library import OPS

SCALE = 2.0
DOTS = ("grouped_product", "grouped_token_sum")


def ours(x: Tensor, offsets: Tensor, weight: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return grouped_linear(x, offsets, weight, a, b, SCALE)


def by_expert(x: Tensor, offsets: Tensor, weight: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """PEFT's formula for a linear layer, expert by expert."""
    ends, ys = offsets.tolist(), []
    for e, (begin, end) in enumerate(pairwise(ends)):
        rows = x[begin:end]
        y = F.linear(rows, weight[e])
        ys.append(y if a is None or b is None else y + SCALE * F.linear(F.linear(rows, a[e]), b[e]))
    return torch.cat(ys)


def inputs(
    make: Make,
    name: str,
    counts: Sequence[int],
    width: int,
    out: int,
    rank: int | None,
    dtype: torch.dtype | None = None,
) -> Inputs:
    """Of experts with so many tokens each; without a rank the weights are trained."""
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    slow = "float32 is there to compare with, and every product is three of tf32" if dtype else ""
    x = make(sum(counts), width, grad=True, dtype=dtype)
    weight = make(len(counts), out, width, scale=width**-0.5, grad=rank is None, dtype=dtype)
    if rank is None:
        return Inputs(name, (x, offsets, weight), not_streaming=slow)
    a = make(len(counts), rank, width, scale=width**-0.5, grad=True, dtype=dtype)
    b = make(len(counts), out, rank, grad=True, dtype=dtype)
    return Inputs(name, (x, offsets, weight, a, b), not_streaming=slow)


def numbers_lora(make: Make) -> Iterator[Inputs]:
    yield inputs(make, "3, 0, 70, 1, 0 tokens, 48 to 70, rank 16", (3, 0, 70, 1, 0), 48, 70, 16)
    yield inputs(make, "0 and 130 tokens, 33 to 140, rank 3", (0, 130), 33, 140, 3)
    yield inputs(make, "37 tokens of one expert, 64 to 24, rank 65", (37,), 64, 24, 65)


def numbers_trained(make: Make) -> Iterator[Inputs]:
    yield inputs(make, "3, 0, 70, 1, 0 tokens, 48 to 70", (3, 0, 70, 1, 0), 48, 70, None)
    yield inputs(make, "130 tokens, 33 to 140", (0, 130), 33, 140, None)


QWEN = [256] * 128  # 4096 tokens of Qwen3-30B-A3B, 8 experts each of 128


def real_lora(make: Make) -> Iterator[Inputs]:
    yield inputs(make, "gate and up of Qwen3-30B-A3B, 4096 tokens", QWEN, 2048, 1536, 16)
    yield inputs(make, "down of Qwen3-30B-A3B, 4096 tokens", QWEN, 768, 2048, 16)
    yield inputs(make, "the same in float32", QWEN, 768, 2048, 16, torch.float32)


def real_trained(make: Make) -> Iterator[Inputs]:
    yield inputs(make, "gate and up of Qwen3-30B-A3B, 4096 tokens", QWEN, 2048, 1536, None)
    yield inputs(make, "the same in float32", QWEN, 2048, 1536, None, torch.float32)


def traffic_lora(make: Make) -> Inputs:
    return inputs(make, "512 rows of 4 experts, 512 to 384, rank 16", (192, 0, 64, 256), 512, 384, 16)


def traffic_trained(make: Make) -> Inputs:
    return inputs(make, "512 rows of 4 experts, 512 to 384", (192, 0, 64, 256), 512, 384, None)


def floor(
    x: Tensor, offsets: Tensor, weight: Tensor, a: Tensor | None = None, b: Tensor | None = None
) -> tuple[int, int]:
    """Of the experts that have tokens; the gradients of the others are written all the same."""
    y, xa = x.new_empty(len(x), weight.shape[1], device="meta"), x.new_empty(len(x), 0 if a is None else a.shape[1])
    wants = [True, a is None, a is not None, a is not None]
    forward = OPS["grouped_linear"].cost(x, offsets, weight, a, b, SCALE).bytes
    backward = OPS["grouped_linear_backward"].cost(y, x, offsets, weight, a, b, xa, SCALE, wants).bytes
    used = int((offsets.diff() > 0).sum())
    unread = (len(weight) - used) * sum(t[0].numel() * t.element_size() for t in (weight, a, b) if t is not None)
    return forward - unread, backward - unread


def case(name: str, parts: tuple, bars: tuple[float, float], launches: tuple[int, int]) -> Case:
    numbers, real, traffic = parts
    return Case(
        op="grouped_linear",
        name=name,
        function=ours,
        reference=by_expert,
        numbers=numbers,
        real=real,
        traffic=traffic,
        floor=floor,
        bars=Bars(forward=bars[0], backward=bars[1], launches=launches, tensor_cores=DOTS, gemms=DOTS),
    )


CASES = [
    case("grouped lora", (numbers_lora, real_lora, traffic_lora), (1.3, 1.5), (2, 6)),
    case("grouped trained", (numbers_trained, real_trained, traffic_trained), (1.05, 1.95), (1, 3)),
]
