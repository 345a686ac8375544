"""Planted faults for gpu_evidence: one sound kernel that triples its input, and five copies of it with a fault each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benchmarks.evidence.case import Bars, Case, Inputs
from benchmarks.evidence.traffic import nbytes


@triton.jit
def sound(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32) * 3.0, mask=at < n)


@triton.jit
def missing_mask(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32) * 3.0)


@triton.jit
def wrong_scale(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32) * 3.06, mask=at < n)


@triton.jit
def unwritten_output(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32) * 3.0, mask=at < n - 1)


@triton.jit
def doubled_read(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    once = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    again = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, once + 2.0 * again, mask=at < n)


@triton.jit
def spilling(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    # A reduction keeps the whole block in registers: more than a thread has.
    tl.store(out_ptr + at, x * 3.0 + tl.max(tl.where(x > 1e30, x, 0.0), 0), mask=at < n)


def case(kernel, block: int = 1024, warps: int = 4) -> Case:
    name = kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__

    def function(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        kernel[(triton.cdiv(x.numel(), block),)](x, out, x.numel(), BLOCK=block, num_warps=warps)
        return out

    def one(*shape: int):
        return lambda make: [Inputs("x".join(map(str, shape)), (make(*shape),))]

    return Case(
        op="tripled",
        name=name,
        function=function,
        reference=lambda x: 3 * x,
        numbers=one(3, 129),
        real=one(4096, 4096),
        traffic=lambda make: one(8, 1024)(make)[0],
        floor=lambda x: (nbytes(x, x), 0),
        bars=Bars(forward=1.0, launches=(1, 0)),
    )


CASES = [
    case(sound),
    case(missing_mask),
    case(wrong_scale),
    case(unwritten_output),
    case(doubled_read),
    case(spilling, block=16384, warps=1),
]
