"""embedding's backward in Triton: the tokens sorted by id, then one sum per id, in the tokens' order and without atomics.

A sum is cut at every CHUNK sorted tokens, so that no program adds up a frequent id alone; a second kernel joins the pieces.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import choose, on_device


@triton.jit
def embedding_backward(
    grad_ptr, id_ptr, token_ptr, out_ptr, piece_ptr, tokens, rows, columns, grad_stride, padding_idx,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the piece that begins at its place in the sorted tokens, if one does."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(id_ptr + place)
    goes_on_from_before = tl.load(id_ptr + place - 1, mask=place > 0, other=-1) == row
    is_piece = (place % CHUNK == 0) | (goes_on_from_before == 0)
    if is_piece & (row >= 0) & (row < rows) & (row != padding_idx):
        chunk = place // CHUNK
        stop = tl.minimum((chunk + 1) * CHUNK, tokens)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        at = place
        goes_on = at < stop
        while goes_on:
            here = at + tl.arange(0, ROWS)
            mine = tl.load(id_ptr + here, mask=here < stop, other=-1) == row
            token = tl.load(token_ptr + here, mask=mine, other=0)
            mask = mine[:, None] & (column < columns)[None, :]
            grad = tl.load(grad_ptr + (token * grad_stride)[:, None] + column[None, :], mask=mask, other=0.0)
            total += tl.sum(grad.to(tl.float32), 0)
            at += ROWS
            goes_on = (at < stop) & (tl.sum(mine.to(tl.int32), 0) == ROWS)
        goes_on_after = tl.load(id_ptr + stop, mask=stop < tokens, other=-1) == row
        if goes_on_from_before | goes_on_after:
            slot = 2 * chunk + (goes_on_from_before == 0).to(tl.int64)  # what a chunk begins with, what it ends with
            tl.store(piece_ptr + slot * columns + column, total, mask=column < columns)
        else:
            tl.store(out_ptr + row.to(tl.int64) * columns + column, total, mask=column < columns)


@triton.jit
def embedding_join(
    id_ptr, out_ptr, piece_ptr, tokens, rows, columns, padding_idx, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: the sum that begins in its chunk and ends in a later one, if there is one."""
    chunk = tl.program_id(0).to(tl.int64)
    first, stop = chunk * CHUNK, (chunk + 1) * CHUNK
    row = tl.load(id_ptr + stop - 1, mask=stop < tokens, other=-1)
    began_before = tl.load(id_ptr + first - 1, mask=first > 0, other=-1) == row
    goes_on = tl.load(id_ptr + stop, mask=stop < tokens, other=-1) == row
    if goes_on & (began_before == 0) & (row >= 0) & (row < rows) & (row != padding_idx):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        piece = 2 * chunk + 1
        while goes_on:
            total += tl.load(piece_ptr + piece * columns + column, mask=column < columns, other=0.0)
            stop = (chunk + 1) * CHUNK
            goes_on = tl.load(id_ptr + stop, mask=stop < tokens, other=-1) == row
            chunk += 1
            piece = 2 * chunk
        tl.store(out_ptr + row.to(tl.int64) * columns + column, total, mask=column < columns)


def backward(grad: Tensor, ids: Tensor, rows: int, padding_idx: int, dtype: torch.dtype) -> Tensor:
    if grad.dim() == 0 or grad.shape[:-1] != ids.shape:
        raise RuntimeError(
            f"embedding_backward: grad is {list(grad.shape)}, ids are {list(ids.shape)}; grad must be ids' + [D]"
        )
    columns, tokens = grad.shape[-1], ids.numel()
    out = grad.new_zeros(rows, columns, dtype=dtype)
    if grad.numel() == 0:
        return out
    grad = grad.reshape(tokens, columns)
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    sorted_ids, order = torch.sort(ids.reshape(-1).int(), stable=True)
    launch = choose("embedding_backward", tokens, grad.device)
    chunks, blocks = triton.cdiv(tokens, launch.depth), triton.cdiv(columns, launch.columns)
    pieces = grad.new_empty(2 * chunks, columns, dtype=torch.float32)
    with on_device(grad):
        embedding_backward[(tokens, blocks)](
            grad, sorted_ids, order, out, pieces, tokens, rows, columns, grad.stride(0), padding_idx,
            launch.depth, launch.rows, launch.columns, num_warps=launch.warps,
        )  # fmt: skip
        embedding_join[(chunks, blocks)](
            sorted_ids, out, pieces, tokens, rows, columns, padding_idx, launch.depth, launch.columns,
            num_warps=launch.warps,
        )  # fmt: skip
    return out
