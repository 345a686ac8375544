"""dora_norm in Triton: a program squares and adds up its tiles of W + s B A; a second kernel joins the columns' sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import choose, on_device, processors


@triton.jit
def dora_norm(
    weight_ptr, a_ptr, b_ptr, sum_ptr, n_rows, d, rank, weight_stride, chunk, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, HAS_MORE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of squares of ROWS rows over a chunk of the columns: sum [chunks, rows]. A rank above RANKS goes in pieces."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, d)
    at = tl.arange(0, RANKS)
    inside = row < n_rows
    b = tl.load(b_ptr + row[:, None] * rank + at[None, :], mask=inside[:, None] & (at < rank)[None, :], other=0.0)
    total = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        column = first + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < end)[None, :]
        weight = tl.load(weight_ptr + row[:, None] * weight_stride + column[None, :], mask=mask, other=0.0)
        a_mask = (at < rank)[:, None] & (column < end)[None, :]
        a = tl.load(a_ptr + at[:, None] * d + column[None, :], mask=a_mask, other=0.0)
        product = tl.dot(b, a, input_precision="tf32x3")
        if HAS_MORE:  # a loop in the loop: what is around it is not pipelined
            for piece in tl.range(RANKS, rank, RANKS, num_stages=1):
                here = piece + at
                b_mask = inside[:, None] & (here < rank)[None, :]
                more_b = tl.load(b_ptr + row[:, None] * rank + here[None, :], mask=b_mask, other=0.0)
                a_mask = (here < rank)[:, None] & (column < end)[None, :]
                more_a = tl.load(a_ptr + here[:, None] * d + column[None, :], mask=a_mask, other=0.0)
                product = tl.dot(more_b, more_a, product, input_precision="tf32x3")
        merged = weight.to(tl.float32) + scale * product
        total += tl.sum(merged * merged, 1)
    tl.store(sum_ptr + tl.program_id(1).to(tl.int64) * n_rows + row, total, mask=inside)


@triton.jit
def dora_norm_join(sum_ptr, out_ptr, n_rows, chunks, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, chunks, COUNT):
        chunk = first + tl.arange(0, COUNT)
        mask = (chunk < chunks)[:, None] & (row < n_rows)[None, :]
        total += tl.sum(tl.load(sum_ptr + chunk.to(tl.int64)[:, None] * n_rows + row[None, :], mask=mask, other=0.0), 0)
    tl.store(out_ptr + row, tl.sqrt(total), mask=row < n_rows)


def forward(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    n_rows, d = weight.shape
    rank = lora_a.shape[0]
    padded = max(16, triton.next_power_of_2(rank))
    out = weight.new_empty(n_rows, dtype=torch.float32)
    if weight.numel() == 0:
        return out.zero_()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    launch = choose("dora_norm", padded * lora_a.element_size(), weight.device)
    across = triton.cdiv(n_rows, launch.rows)
    steps = triton.cdiv(d, launch.columns)
    wanted = max(1, processors(weight.device) * launch.per_processor // across)
    chunk = launch.columns * triton.cdiv(steps, wanted)
    sums = out.new_empty(triton.cdiv(d, chunk), n_rows)
    ranks = min(padded, launch.depth)
    join = choose("dora_norm_join", n_rows, weight.device)
    with on_device(weight):
        dora_norm[(across, sums.shape[0])](
            weight, lora_a.contiguous(), lora_b.contiguous(), sums, n_rows, d, rank, weight.stride(0), chunk, scale,
            ROWS=launch.rows, COLUMNS=launch.columns, RANKS=ranks, HAS_MORE=rank > ranks,
            STAGES=launch.stages, num_warps=launch.warps,
        )  # fmt: skip
        dora_norm_join[(triton.cdiv(n_rows, join.columns),)](
            sums, out, n_rows, sums.shape[0], COUNT=join.rows, BLOCK=join.columns, num_warps=join.warps
        )
    return out
