"""PyTorch's memory-efficient attention behind the attention op's arguments: for head sizes that no other kernel takes.

It knows no packs, so sequences go one by one, and its causal mask aligns the first query with the first key, where the op's
aligns the last: queries are padded in front, or those that see nothing left out. No tensor grows with the square of a length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpt.ops.attention import _empty_gradients, _empty_outputs, _sequences

ALIGNED = 32  # the kernels want each head's lse to begin at a multiple


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, lse = _empty_outputs(q)
    for rows, keys in _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        blind, rows, front, square = _aligned(rows, keys, causal)
        out[blind].zero_()
        lse[blind].fill_(float("inf"))
        if rows.stop > rows.start:
            query, key, value = _heads_first(q[rows], front), *_spread(q, k[keys], v[keys])
            found, total = _attend(query, key, value, square, scale)
            out[rows] = found[0, :, front:].transpose(0, 1)
            lse[rows] = total[0, :, front : query.shape[2]].t()
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = _empty_gradients(q, k, v)
    for rows, keys in _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        blind, rows, front, square = _aligned(rows, keys, causal)
        dq[blind].zero_()
        if rows.stop == rows.start:
            dk[keys].zero_()
            dv[keys].zero_()
            continue
        dout, query, found = (_heads_first(x[rows], front) for x in (grad, q, out))
        total = lse.new_full((1, q.shape[1], -(-query.shape[2] // ALIGNED) * ALIGNED), float("inf"))
        total[0, :, front : query.shape[2]] = lse[rows].t()
        key, value = _spread(q, k[keys], v[keys])
        dquery, dkey, dvalue = _attend_backward(dout, query, key, value, found, total, square, scale)
        dq[rows] = dquery[0, :, front:].transpose(0, 1)
        dk[keys], dv[keys] = (_joined(x, k.shape[1]).to(k.dtype) for x in (dkey, dvalue))
    return dq, dk, dv


def _aligned(rows: slice, keys: slice, causal: bool) -> tuple[slice, slice, int, bool]:
    """Queries that see nothing, the others, how many to pad them with in front, and whether the mask is then causal."""
    queries, length = rows.stop - rows.start, keys.stop - keys.start
    blind = (max(queries - length, 0) if causal else 0) if length > 0 else queries
    seeing = slice(rows.start + blind, rows.stop)
    square = causal and seeing.stop - seeing.start > 1
    front = length - (seeing.stop - seeing.start) if square else 0
    return slice(rows.start, seeing.start), seeing, front, square


def _heads_first(x: Tensor, front: int) -> Tensor:
    """[T, H, K] as [1, H, front + T, K], zeros in front."""
    return torch.nn.functional.pad(x, (0, 0, 0, 0, front, 0)).transpose(0, 1)[None]


def _spread(q: Tensor, *of_keys: Tensor) -> tuple[Tensor, ...]:
    """Keys and values [T, Hkv, K] as [1, Hq, T, K]."""
    return tuple(x.repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1)[None] for x in of_keys)


def _joined(gradient: Tensor, heads_kv: int) -> Tensor:
    """[1, Hq, T, K] summed over the query heads of each key head, in float32: [T, Hkv, K]."""
    return gradient[0].unflatten(0, (heads_kv, -1)).sum(1, dtype=torch.float32).transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if q.is_cuda:
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _attend_backward(dout, q, k, v, out, lse, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    if q.is_cuda:
        none = q.new_empty((), dtype=torch.int64)  # the seed of a dropout that is off
        gradients = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            dout, q, k, v, None, out, lse, none, none, 0.0, [True, True, True, False], causal, scale=scale
        )
        return gradients[:3]
    backward_of = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward_of(dout, q, k, v, out, lse[:, :, : q.shape[2]].contiguous(), 0.0, causal, scale=scale)
