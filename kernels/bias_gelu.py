"""bias_gelu in Triton: a program keeps its columns of the bias in registers and sums their gradient in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .column_sums import add_up, column_tiles
from .gelu import gelu, is_tanh
from .launch import check_parameter, check_same_shape, on_device, rows_of


@triton.jit
def bias_gelu_forward(
    x_ptr, bias_ptr, out_ptr, n_rows, x_stride, d,
    IS_TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < n_rows)[:, None] & inside[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            x += bias[None, :]
        s, _ = gelu(x, IS_TANH)
        tl.store(out_ptr + row[:, None] * d + column[None, :], x * s, mask=mask)


@triton.jit
def bias_gelu_backward(
    grad_ptr, x_ptr, bias_ptr, dx_ptr, dbias_ptr, n_rows, grad_stride, x_stride, d,
    IS_TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < n_rows)[:, None] & inside[None, :]
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            x += bias[None, :]
        _, slope = gelu(x, IS_TANH)
        dx = grad * slope
        tl.store(dx_ptr + row[:, None] * d + column[None, :], dx, mask=mask)
        if dbias_ptr is not None:
            dbias += dx
    if dbias_ptr is not None:
        tl.store(dbias_ptr + tl.program_id(0) * d + column, tl.sum(dbias, 0), mask=inside)


def forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    check_parameter("bias_gelu", x, bias=bias)
    out, tanh = torch.empty_like(x, memory_format=torch.contiguous_format), is_tanh("bias_gelu", approximate)
    if x.numel() > 0:
        x, bias = rows_of(x), None if bias is None else bias.contiguous()
        grid, constants = column_tiles("bias_gelu_forward", x)
        with on_device(x):
            bias_gelu_forward[grid](x, bias, out, x.shape[0], x.stride(0), x.shape[1], IS_TANH=tanh, **constants)
    return out


def backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_same_shape("bias_gelu_backward", grad=grad, x=x)
    d, tanh = x.shape[-1], is_tanh("bias_gelu", approximate)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return dx, x.new_zeros(d if bias_dtype else 0, dtype=bias_dtype or torch.float32)
    grad, x, bias = rows_of(grad), rows_of(x), None if bias is None else bias.contiguous()
    grid, constants = column_tiles("bias_gelu_backward", x)
    partial = None if bias_dtype is None else x.new_empty(grid[0], d, dtype=torch.float32)
    with on_device(x):
        bias_gelu_backward[grid](
            grad, x, bias, dx, partial, x.shape[0], grad.stride(0), x.stride(0), d, IS_TANH=tanh, **constants
        )
        dbias, _ = add_up(partial, None, bias_dtype, None)
    return dx, x.new_empty(0, dtype=torch.float32) if dbias is None else dbias
