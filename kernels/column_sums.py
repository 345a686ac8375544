"""Sums over rows that many programs share: each stores one float32 row of its own, add_up adds the rows in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import choose, processors


@triton.jit
def column_sums(
    first_ptr, first_out_ptr, second_ptr, second_out_ptr, n_rows, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if first_ptr is not None:
        tl.store(first_out_ptr + column, _sum_of_columns(first_ptr, column, n_rows, d, ROWS, COLUMNS), mask=column < d)
    if second_ptr is not None:
        tl.store(
            second_out_ptr + column, _sum_of_columns(second_ptr, column, n_rows, d, ROWS, COLUMNS), mask=column < d
        )


@triton.jit
def _sum_of_columns(ptr, column, n_rows, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, n_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < n_rows)[:, None] & (column < d)[None, :]
        total += tl.load(ptr + row[:, None] * d + column[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


def add_up(
    first: Tensor | None, second: Tensor | None, *dtypes: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """The column sums of one or two float32 matrices [programs, D], each stored in its dtype, in one launch (none where both
    are None)."""
    partial = first if first is not None else second
    if partial is None:
        return None, None
    n_rows, d = partial.shape
    sums = [None if p is None else p.new_empty(d, dtype=t) for p, t in zip((first, second), dtypes, strict=True)]
    launch = choose("column_sums", d, partial.device)
    column_sums[(triton.cdiv(d, launch.columns),)](
        first, sums[0], second, sums[1], n_rows, d, ROWS=launch.rows, COLUMNS=launch.columns, num_warps=launch.warps
    )
    return sums[0], sums[1]


def column_tiles(kernel: str, x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile of a kernel whose programs own columns of x [rows, D]; the table's size is D.

    Along the second axis lie the blocks of columns, along the first as many programs as the processors then hold.
    """
    n_rows, d = x.shape
    launch = choose(kernel, d, x.device)
    across = triton.cdiv(d, launch.columns)
    down = max(1, processors(x.device) * launch.per_processor // across)
    tile = {"ROWS": launch.rows, "COLUMNS": launch.columns, "STAGES": launch.stages}
    return (min(triton.cdiv(n_rows, launch.rows), down), across), {**tile, "num_warps": launch.warps}
