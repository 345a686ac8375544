"""geglu in Triton, exact and tanh: every byte is read once and written once, the next blocks are loaded meanwhile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gelu import gelu, is_tanh
from .launch import check_same_shape, launch_elementwise


@triton.jit
def geglu_forward(gate_ptr, up_ptr, out_ptr, n, BLOCK: tl.constexpr, STAGES: tl.constexpr, IS_TANH: tl.constexpr):
    for block in tl.range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0), num_stages=STAGES):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        s, _ = gelu(gate, IS_TANH)
        tl.store(out_ptr + at, gate * s * up, mask=inside)


@triton.jit
def geglu_backward(
    grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, BLOCK: tl.constexpr, STAGES: tl.constexpr, IS_TANH: tl.constexpr
):  # fmt: skip
    for block in tl.range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0), num_stages=STAGES):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        s, slope = gelu(gate, IS_TANH)
        tl.store(dgate_ptr + at, grad * up * slope, mask=inside)
        tl.store(dup_ptr + at, grad * gate * s, mask=inside)


def forward(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    check_same_shape("geglu", gate=gate, up=up)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    launch_elementwise(geglu_forward, gate, up, out, IS_TANH=is_tanh("geglu", approximate))
    return out


def backward(grad: Tensor, gate: Tensor, up: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    check_same_shape("geglu_backward", grad=grad, gate=gate, up=up)
    dgate, dup = (torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
    launch_elementwise(geglu_backward, grad, gate, up, dgate, dup, IS_TANH=is_tanh("geglu", approximate))
    return dgate, dup
