"""grouped_linear in Triton: one launch for all experts, whose tiles find their expert from the offsets on the device.

Two kernels: rows of tokens times an expert's matrix (xa, y, dy b, dx), and a sum over an expert's tokens (dweight, da, db).
The grid is as large as any routing can need: a tile of rows for every BM tokens and one more for each expert that has any,
and for the rows of none, which are written as zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import choose, on_device
from .lora_gemm import add_low_rank, add_product, store_tile


@triton.jit
def _tile_rows(tile, offsets_ptr, T, E, EXPERTS: tl.constexpr, BM: tl.constexpr):
    """Expert, first row and end of its rows for a tile of rows; E for the rows of no expert, more where there are no more."""
    at = tl.arange(0, EXPERTS)
    begin = tl.load(offsets_ptr + at, mask=at <= E, other=0)
    end = tl.where(at == E, T, tl.load(offsets_ptr + at + 1, mask=at < E, other=0))
    tiles = tl.where(at <= E, (end - begin + BM - 1) // BM, 0)
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(at < expert, tiles, 0), 0)
    row = tl.sum(tl.where(at == expert, begin, 0), 0) + (tile - before) * BM
    return expert, row, tl.sum(tl.where(at == expert, end, 0), 0)


@triton.jit
def grouped_product(x_ptr, offsets_ptr, w_ptr, low_ptr, up_ptr, y_ptr, T, E, D, width, rank, scale, x_stride,
                    w_expert, w_stride, w_step, up_expert, up_stride, up_step, EXPERTS: tl.constexpr, BM: tl.constexpr,
                    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, IS_EVEN: tl.constexpr):  # fmt: skip
    """y = x [T, D] @ w_e [D, width] + scale low [T, rank] @ up_e [rank, width]; rows of no expert are zero.

    Tiles of one expert's columns follow each other, so that its rows stay in L2.
    """
    tile, column = tl.program_id(0) // tl.cdiv(width, BN), (tl.program_id(0) % tl.cdiv(width, BN)) * BN
    expert, row, end = _tile_rows(tile, offsets_ptr, T, E, EXPERTS, BM)
    if expert == E:
        store_tile(tl.zeros((BM, BN), dtype=tl.float32), y_ptr, row, column, end, width, BM, BN)
    if expert < E:
        rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
        which = expert.to(tl.int64)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        if low_ptr is not None:
            acc = add_low_rank(acc, low_ptr, rank, up_ptr + which * up_expert, up_stride, up_step, rows, columns, end, width,
                               rank, BR, x_ptr.dtype.element_ty == tl.float32) * scale  # fmt: skip
        acc = add_product(acc, x_ptr, x_stride, 1, w_ptr + which * w_expert, w_step, w_stride, row, column, end, width, D,
                          BM, BN, BK, IS_EVEN)  # fmt: skip
        store_tile(acc, y_ptr, row, column, end, width, BM, BN)


@triton.jit
def grouped_token_sum(left_ptr, right_ptr, offsets_ptr, out_ptr, M, N, scale, left_stride, right_stride, out_expert,
                      out_stride, out_step, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """out_e [M, N] = scale * the sum over the expert's tokens of left_t right_tᵀ; zero without tokens."""
    column_tiles = tl.cdiv(N, BN)
    row, column = (tl.program_id(0) // column_tiles) * BM, (tl.program_id(0) % column_tiles) * BN
    expert = tl.program_id(1)
    begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(begin, end, BK):
        at = first + tl.arange(0, BK)
        tokens = at.to(tl.int64)[:, None]
        inside = (at < end)[:, None]
        left = tl.load(left_ptr + tokens * left_stride + rows[None, :], mask=inside & (rows < M)[None, :], other=0.0)
        right = tl.load(
            right_ptr + tokens * right_stride + columns[None, :], mask=inside & (columns < N)[None, :], other=0.0
        )
        acc = tl.dot(tl.trans(left), right, acc, input_precision="tf32x3")
    to = out_ptr + expert.to(tl.int64) * out_expert + rows[:, None] * out_stride + columns[None, :] * out_step
    tl.store(to, (acc * scale).to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


def forward(x, offsets, weight, lora_a, lora_b, scale) -> tuple[Tensor, Tensor]:
    _check(x, offsets, weight, lora_a, lora_b)
    x = _rows(x)
    y = x.new_empty(len(x), weight.shape[1])
    xa = x.new_empty(len(x), 0 if lora_a is None else lora_a.shape[1])
    if y.numel() > 0:
        with on_device(x):
            if lora_a is None:
                _product(x, offsets, weight.mT, y)
            else:
                _product(x, offsets, lora_a.contiguous().mT, xa)
                _product(x, offsets, weight.mT, y, xa, lora_b.contiguous().mT, scale)
    return y, xa


def backward(grad, x, offsets, weight, lora_a, lora_b, xa, scale, wants, in_float32=True):
    _check(x, offsets, weight, lora_a, lora_b)
    if grad.shape != (len(x), weight.shape[1]) or grad.dtype != x.dtype:
        raise RuntimeError(f"grouped_linear: grad is {list(grad.shape)} {grad.dtype} for x {list(x.shape)} {x.dtype}")
    grad, x = _rows(grad), _rows(x)
    dx = x.new_empty(x.shape if wants[0] else (0,))
    dweight, da, db = (
        x.new_empty(like.shape if wanted and like is not None else (0,), dtype=torch.float32 if in_float32 else x.dtype)
        for wanted, like in zip(wants[1:], (weight, lora_a, lora_b), strict=True)
    )
    if len(x) == 0:
        for gradient in (dweight, da, db):
            gradient.zero_()
        return dx, dweight, da, db
    with on_device(x):
        dxa = None
        if lora_a is not None and (wants[0] or wants[2]):
            dxa = x.new_empty(len(x), lora_a.shape[1])
            _product(grad, offsets, lora_b.contiguous(), dxa)
        if wants[0]:
            low = () if dxa is None else (dxa, lora_a.contiguous(), scale)
            _product(grad, offsets, weight, dx, *low)
        if wants[1]:
            _token_sum(grad, x, offsets, dweight)
        if wants[2]:
            _token_sum(x, dxa, offsets, da.mT, scale)
        if wants[3]:
            _token_sum(grad, xa, offsets, db, scale)
    return dx, dweight, da, db


def _product(x: Tensor, offsets: Tensor, w: Tensor, y: Tensor, low=None, up=None, scale: float = 1.0) -> None:
    """y = x w_e + scale low up_e for w [E, D, O] and up [E, R, O], views of any strides."""
    (tokens, depth), (experts, _, width) = x.shape, w.shape
    name = "grouped_product" if width > 64 else "grouped_product_narrow"
    launch = choose(name, x.element_size(), x.device)
    row_tiles = tokens // launch.rows + min(experts + 1, tokens)
    rank = 0 if low is None else low.shape[1]
    grouped_product[(row_tiles * triton.cdiv(width, launch.columns),)](
        x, offsets, w, low, up, y, tokens, experts, depth, width, rank, float(scale), x.stride(0), w.stride(0),
        w.stride(2), w.stride(1), *((0, 0, 0) if up is None else up.stride()), EXPERTS=triton.next_power_of_2(experts + 1),
        BM=launch.rows, BN=launch.columns, BK=launch.depth, BR=min(max(triton.next_power_of_2(rank), 16), 32),
        IS_EVEN=depth % launch.depth == 0, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


def _token_sum(left: Tensor, right: Tensor, offsets: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """out_e = scale left_eᵀ right_e for left [T, M], right [T, N] and out [E, M, N] of any strides."""
    experts, rows, columns = out.shape
    name = "grouped_token_sum" if columns > 64 else "grouped_token_sum_narrow"
    launch = choose(name, left.element_size(), left.device)
    grouped_token_sum[(triton.cdiv(rows, launch.rows) * triton.cdiv(columns, launch.columns), experts)](
        left, right, offsets, out, rows, columns, float(scale), left.stride(0), right.stride(0), *out.stride(),
        BM=launch.rows, BN=launch.columns, BK=launch.depth, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _check(x, offsets, weight, lora_a, lora_b) -> None:
    low = [] if lora_a is None or lora_b is None else [lora_a, lora_b]
    is_right = x.dim() == 2 and weight.dim() == 3 and x.shape[1] == weight.shape[2]
    is_right = (
        is_right and offsets.dtype == torch.int32 and offsets.shape == (len(weight) + 1,) and offsets.is_contiguous()
    )
    is_right = is_right and (lora_a is None) == (lora_b is None) and all(t.dtype == x.dtype for t in (weight, *low))
    if is_right and low:
        experts, out, width = weight.shape
        is_right = lora_a.shape == (experts, lora_a.shape[1], width) and lora_b.shape == (experts, out, lora_a.shape[1])
    if not is_right:
        raise RuntimeError(
            f"grouped_linear: x, offsets, weight, lora_a, lora_b are {[list(t.shape) for t in (x, offsets, weight, *low)]}, "
            f"offsets {offsets.dtype}; they must be [T, D], [E + 1] int32, [E, O, D], [E, R, D], [E, O, R] of one dtype"
        )
