"""The gradient of attention's sinks: -sum over tokens of exp(sink - lse) times delta = grad . out, for each head.

One program for a tile of tokens of one head; the tiles' sums are added up afterwards, in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_launch import padded, rows_contiguous
from .attention_tiles import load_rows
from .launch import choose, on_device


@triton.jit(do_not_specialize=["tokens"])
def attention_sinks(
    grad_ptr, out_ptr, lse_ptr, sinks_ptr, sums_ptr, stride_gt, stride_gh, stride_ot, stride_oh, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    first = tile * ROWS
    token = first + tl.arange(0, ROWS)
    inside = token < tokens
    grad = load_rows(grad_ptr, tile * 0, first, head, inside, stride_gt, stride_gh, ROWS, 1, DIM, PADDED)
    out = load_rows(out_ptr, tile * 0, first, head, inside, stride_ot, stride_oh, ROWS, 1, DIM, PADDED)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + token.to(tl.int64) * HEADS + head, mask=inside, other=float("inf"))
    weight = tl.exp(tl.load(sinks_ptr + head) - lse)
    tl.store(sums_ptr + tile * HEADS + head, -tl.sum(weight * delta, 0))


def backward(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    shape = out.shape[:2]
    fits = out.dim() == 3 and grad.shape == out.shape and grad.dtype == out.dtype and lse.shape == shape
    if not fits or sinks.shape != shape[1:] or lse.dtype != torch.float32 or sinks.dtype != torch.float32:
        raise RuntimeError(
            f"attention_sinks_backward: grad {list(grad.shape)} {grad.dtype}, out {list(out.shape)} {out.dtype}, lse "
            f"{list(lse.shape)} {lse.dtype}, sinks {list(sinks.shape)} {sinks.dtype}; they must be [Tq, Hq, K] twice of one "
            "dtype, [Tq, Hq] and [Hq] of float32"
        )
    tokens, heads, dim = out.shape
    launch = choose("attention_sinks", padded(dim), out.device)
    sums = lse.new_empty((triton.cdiv(tokens, launch.rows), heads))
    if sums.numel() > 0:
        grad, out = rows_contiguous(grad), rows_contiguous(out)
        with on_device(out):
            attention_sinks[sums.shape](
                grad, out, lse.contiguous(), sinks.contiguous(), sums, *grad.stride()[:2], *out.stride()[:2], tokens,
                HEADS=heads, DIM=dim, PADDED=padded(dim), ROWS=launch.rows, num_warps=launch.warps,
            )  # fmt: skip
    return sums.sum(0)
