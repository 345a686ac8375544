"""swiglu in Triton: every byte is read once and written once, the next blocks are loaded meanwhile; nothing is overwritten."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_same_shape, launch_elementwise


@triton.jit
def swiglu_forward(gate_ptr, up_ptr, out_ptr, n, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    for block in tl.range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0), num_stages=STAGES):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def swiglu_backward(grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    for block in tl.range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0), num_stages=STAGES):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        tl.store(dgate_ptr + at, grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), mask=inside)
        tl.store(dup_ptr + at, grad * gate * sigmoid, mask=inside)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    check_same_shape("swiglu", gate=gate, up=up)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    launch_elementwise(swiglu_forward, gate, up, out)
    return out


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    check_same_shape("swiglu_backward", grad=grad, gate=gate, up=up)
    dgate, dup = (torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
    launch_elementwise(swiglu_backward, grad, gate, up, dgate, dup)
    return dgate, dup
