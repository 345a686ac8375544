"""What rms_norm and layer_norm share: one forward and one backward kernel over the rows of a matrix.

A program stays on its processor: it keeps the weight in registers, walks over every n-th tile of rows, and loads the next tiles
while it works on one. Every byte is read once and written once; only the weight is read once a program instead of once, and
the weight's gradient passes through one float32 row a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .column_sums import add_up, column_tiles
from .dropout import is_kept, row_keys, rule
from .launch import choose, on_device, processors, rows_of

# Values of dweight and dbias that a program's registers hold beside its row; for wider rows a kernel of its own sums them.
MOST_SUMS = 8192
# Bytes of what LayerNorm loads of a row up to which a program keeps weight and bias; beside wider ones it reads them again.
MOST_KEPT = 49152


@triton.jit
def _parameter(ptr, column, inside, OFFSET: tl.constexpr):
    parameter = inside  # none: not looked at
    if ptr is not None:
        parameter = tl.load(ptr + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
    return parameter


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])  # else a kernel for every 16th seed
def norm_forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, summed_ptr, mean_ptr, rstd_ptr,
    n_rows, x_stride, residual_stride, seed_low, seed_high, threshold, scale,
    EPS: tl.constexpr, OFFSET: tl.constexpr, CASTS_FIRST: tl.constexpr, DROPS: tl.constexpr, KEEPS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = norm(x) or norm(dropout(x) + residual), for RMSNorm without and for LayerNorm with a mean_ptr."""
    column = tl.arange(0, COLUMNS)
    inside = column < D
    if KEEPS:
        weight, bias = _parameter(weight_ptr, column, inside, OFFSET), _parameter(bias_ptr, column, inside, 0.0)
        if CASTS_FIRST:  # offset + weight is a tensor of its own there, in the weight's dtype
            weight = weight.to(weight_ptr.dtype.element_ty).to(tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < n_rows)[:, None] & inside[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        out = row[:, None] * D + column[None, :]
        if residual_ptr is not None:
            if DROPS:
                kept = is_kept(row_keys(row, seed_low, seed_high)[:, None], column[None, :], threshold)
                x = tl.where(kept, x * scale, 0.0)
            at = row[:, None] * residual_stride + column[None, :]
            x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
            x = x.to(summed_ptr.dtype.element_ty).to(tl.float32)
            tl.store(summed_ptr + out, x, mask=mask)
        if mean_ptr is not None:
            mean = tl.sum(x, 1) / D
            tl.store(mean_ptr + row, mean, mask=row < n_rows)
            x = tl.where(inside[None, :], x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)
        tl.store(rstd_ptr + row, rstd, mask=row < n_rows)
        y = x * rstd[:, None]
        if CASTS_FIRST:
            y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        if not KEEPS:
            weight, bias = _parameter(weight_ptr, column, inside, OFFSET), _parameter(bias_ptr, column, inside, 0.0)
        if weight_ptr is not None:
            y *= weight[None, :]
        if bias_ptr is not None:
            y += bias[None, :]
        tl.store(y_ptr + out, y, mask=mask)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])  # else a kernel for every 16th seed
def norm_backward(
    grad_ptr, grad_sum_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, ds_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    n_rows, grad_stride, grad_sum_stride, x_stride, seed_low, seed_high, threshold, scale,
    OFFSET: tl.constexpr, DROPS: tl.constexpr, KEEPS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ds, the gradient of what was normed; dx, that of the branch before dropout; a program's own sums of dweight and dbias."""
    column = tl.arange(0, COLUMNS)
    inside = column < D
    if KEEPS:
        weight = _parameter(weight_ptr, column, inside, OFFSET)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < n_rows)[:, None] & inside[None, :]
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < n_rows, other=0.0)[:, None]
        if mean_ptr is not None:
            normed -= tl.load(mean_ptr + row, mask=row < n_rows, other=0.0)[:, None]
        normed *= rstd
        if dweight_ptr is not None:
            dweight += grad * normed
        if dbias_ptr is not None:
            dbias += grad
        if not KEEPS:
            weight = _parameter(weight_ptr, column, inside, OFFSET)
        if weight_ptr is not None:
            grad *= weight[None, :]
        ds = grad - normed * (tl.sum(grad * normed, 1) / D)[:, None]
        if mean_ptr is not None:
            ds -= (tl.sum(grad, 1) / D)[:, None]
        ds *= rstd
        out = row[:, None] * D + column[None, :]
        if grad_sum_ptr is not None:
            at = row[:, None] * grad_sum_stride + column[None, :]
            ds += tl.load(grad_sum_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(ds_ptr + out, ds, mask=mask)
        if dx_ptr is not None:
            if DROPS:
                kept = is_kept(row_keys(row, seed_low, seed_high)[:, None], column[None, :], threshold)
                ds = tl.where(kept, ds * scale, 0.0)
            tl.store(dx_ptr + out, ds, mask=mask)
    partial = tl.program_id(0) * D + column
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=inside)


@triton.jit
def norm_parameter_sums(
    grad_ptr, x_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr, n_rows, grad_stride, x_stride, d,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < n_rows)[:, None] & inside[None, :]
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if dweight_ptr is not None:
            normed = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
            if mean_ptr is not None:
                normed -= tl.load(mean_ptr + row, mask=row < n_rows, other=0.0)[:, None]
            dweight += grad * (normed * tl.load(rstd_ptr + row, mask=row < n_rows, other=0.0)[:, None])
        if dbias_ptr is not None:
            dbias += grad
    partial = tl.program_id(0) * d + column
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=inside)


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, *,
    has_mean: bool, offset: float = 0.0, casts_first: bool = False, dropout_p: float = 0.0, seed: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """y, the sum where there is a residual, the means where LayerNorm wants them, 1 / the standard deviations."""
    like = x if residual is None else residual
    y = torch.empty_like(like, memory_format=torch.contiguous_format)
    summed = None if residual is None else torch.empty_like(y)
    numbers = [like.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(1 + has_mean)]
    mean, rstd = numbers[0] if has_mean else None, numbers[-1]
    if x.numel() == 0:
        return y, summed, *(n if n is None else n.fill_(torch.nan) for n in (mean, rstd))
    x, residual = rows_of(x), None if residual is None else rows_of(residual)
    weight, bias = _dense(weight), _dense(bias)
    keeps = not has_mean or _padded_row(x, residual) <= MOST_KEPT
    grid, constants = _tiles("norm_forward", x, residual, *(() if keeps else (weight, bias)))
    *dropout, scale = rule(dropout_p, seed)
    with on_device(x):
        norm_forward[grid](
            x, residual, weight, bias, y, summed, mean, rstd,
            x.shape[0], x.stride(0), 0 if residual is None else residual.stride(0), *dropout, scale,
            EPS=eps, OFFSET=offset, CASTS_FIRST=casts_first, DROPS=dropout_p > 0, KEEPS=keeps, **constants,
        )  # fmt: skip
    return y, summed, mean, rstd


def launch_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, *,
    weight_dtype: torch.dtype | None, bias_dtype: torch.dtype | None, offset: float = 0.0,
    branch_dtype: torch.dtype | None = None, dropout_p: float = 0.0, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of what was normed, of the branch where it has one of its own, of weight and of bias; empty where not."""
    d = x.shape[-1]
    ds = torch.empty_like(x, memory_format=torch.contiguous_format)
    has_dx = branch_dtype is not None and (dropout_p > 0 or branch_dtype != x.dtype)
    dx = x.new_empty(x.shape if has_dx else 0, dtype=branch_dtype)
    dtypes = (weight_dtype, bias_dtype)
    if x.numel() == 0:
        return ds, dx, *(rstd.new_zeros(0 if t is None else d, dtype=t) for t in dtypes)
    grad, x, grad_sum = rows_of(grad), rows_of(x), None if grad_sum is None else rows_of(grad_sum)
    weight, keeps = _dense(weight), mean is None or _padded_row(x, grad, grad_sum) <= MOST_KEPT
    grid, constants = _tiles("norm_backward", x, grad, grad_sum, None if keeps else weight)
    apart = sum(t is not None for t in dtypes) * d > MOST_SUMS
    sums_grid, sums_constants = column_tiles("norm_parameter_sums", x) if apart else (grid, {})
    partial = [None if t is None else rstd.new_empty(sums_grid[0], d) for t in dtypes]
    *dropout, scale = rule(dropout_p, seed)
    with on_device(x):
        norm_backward[grid](
            grad, grad_sum, x, mean, rstd, weight, ds, dx if has_dx else None,
            *((None, None) if apart else partial),
            x.shape[0], grad.stride(0), 0 if grad_sum is None else grad_sum.stride(0), x.stride(0), *dropout, scale,
            OFFSET=offset, DROPS=dropout_p > 0, KEEPS=keeps, **constants,
        )  # fmt: skip
        if apart:
            norm_parameter_sums[sums_grid](
                grad, x, mean, rstd, *partial, x.shape[0], grad.stride(0), x.stride(0), d, **sums_constants
            )
        sums = add_up(*partial, *dtypes)
    return ds, dx, *(rstd.new_empty(0) if s is None else s for s in sums)


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _padded_row(x: Tensor, *others: Tensor | None) -> int:
    """Bytes of one padded row of everything loaded: what a stage holds of a row."""
    return triton.next_power_of_2(x.shape[1]) * sum(t.element_size() for t in (x, *others) if t is not None)


def _tiles(kernel: str, x: Tensor, *others: Tensor | None) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile; the table's size is the padded row."""
    columns = triton.next_power_of_2(x.shape[1])
    launch = choose(kernel, _padded_row(x, *others), x.device)
    rows = max(1, launch.columns // columns)
    programs = min(triton.cdiv(x.shape[0], rows), processors(x.device) * launch.per_processor)
    tile = {"D": x.shape[1], "ROWS": rows, "COLUMNS": columns, "STAGES": launch.stages}
    return (programs,), {**tile, "num_warps": launch.warps}
