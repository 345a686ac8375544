"""rope in Triton: q and k of a token in one program, so that the tables are read once for all its heads.

Inputs are read by their strides (projection layout, views of a packed qkv, attention layout); outputs are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import choose, on_device


@triton.jit
def rope(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, position_ptr, tokens, positions,
    q_stride_t, q_stride_h, q_stride_d, k_stride_t, k_stride_h, k_stride_d, cos_stride, sin_stride, position_stride,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens; a tile is [TOKENS, heads, columns]."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    exists = token < tokens
    position = token
    if HAS_POSITIONS:
        position = tl.load(position_ptr + token * position_stride, mask=exists, other=0).to(tl.int64)
    known = (position >= 0) & (position < positions)  # no sync, so no error: an unknown position rotates to NaN
    cos1, cos2 = table_pairs(cos_ptr, position * cos_stride, exists & known, R, HALF_BLOCK, INTERLEAVED)
    sin1, sin2 = table_pairs(sin_ptr, position * sin_stride, exists & known, R, HALF_BLOCK, INTERLEAVED)
    if TRANSPOSED:
        sin1, sin2 = -sin2, -sin1
    rotate(
        q_ptr, q_out_ptr, token, exists, q_stride_t, q_stride_h, q_stride_d, cos1, cos2, sin1, sin2,
        Q_HEADS, K, R, INTERLEAVED, BLOCK, HALF_BLOCK, REST_BLOCK, STAGES,
    )  # fmt: skip
    rotate(
        k_ptr, k_out_ptr, token, exists, k_stride_t, k_stride_h, k_stride_d, cos1, cos2, sin1, sin2,
        K_HEADS, K, R, INTERLEAVED, BLOCK, HALF_BLOCK, REST_BLOCK, STAGES,
    )  # fmt: skip


@triton.jit
def table_pairs(ptr, row, readable, R: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Columns of the first and of the second members of the pairs, each [tokens, 1, HALF_BLOCK], by one wide load."""
    HALF: tl.constexpr = R // 2
    TOKENS: tl.constexpr = row.shape[0]
    at = tl.arange(0, 2 * HALF_BLOCK)
    if INTERLEAVED:
        column, inside = at, at < R
    else:
        column, inside = at // HALF_BLOCK * HALF + at % HALF_BLOCK, at % HALF_BLOCK < HALF
    mask = readable[:, None] & inside[None, :]
    both = tl.load(ptr + row[:, None] + column[None, :], mask=mask, other=float("nan")).to(tl.float32)
    if INTERLEAVED:
        first, second = tl.split(tl.reshape(both, [TOKENS, HALF_BLOCK, 2]))
    else:
        first, second = tl.split(tl.permute(tl.reshape(both, [TOKENS, 2, HALF_BLOCK]), [0, 2, 1]))
    return first[:, None, :], second[:, None, :]


@triton.jit
def rotate(
    x_ptr, out_ptr, token, exists, stride_t, stride_h, stride_d, cos1, cos2, sin1, sin2,
    HEADS: tl.constexpr, K: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = R // 2
    for start in tl.range(0, HEADS, BLOCK, num_stages=STAGES):
        head = start + tl.arange(0, BLOCK)
        mask = exists[:, None, None] & (head < HEADS)[None, :, None]
        row = x_ptr + (token * stride_t)[:, None, None] + (head.to(tl.int64) * stride_h)[None, :, None]
        out_row = out_ptr + (token[:, None, None] * HEADS + head[None, :, None]) * K
        if INTERLEAVED:
            column = tl.arange(0, 2 * HALF_BLOCK)[None, None, :]
            inside = mask & (column < R)
            both = tl.load(row + column * stride_d, mask=inside, other=0.0).to(tl.float32)
            first, second = tl.split(tl.reshape(both, [token.shape[0], BLOCK, HALF_BLOCK, 2]))
            turned = tl.join(first * cos1 - second * sin1, second * cos2 + first * sin2)
            tl.store(out_row + column, tl.reshape(turned, [token.shape[0], BLOCK, 2 * HALF_BLOCK]), mask=inside)
        else:
            column = tl.arange(0, HALF_BLOCK)[None, None, :]
            inside = mask & (column < HALF)
            first = tl.load(row + column * stride_d, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(row + (column + HALF) * stride_d, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_row + column, first * cos1 - second * sin1, mask=inside)
            tl.store(out_row + column + HALF, second * cos2 + first * sin2, mask=inside)
        if R < K:
            rest = R + tl.arange(0, REST_BLOCK)[None, None, :]
            untouched = tl.load(row + rest * stride_d, mask=mask & (rest < K), other=0.0)
            tl.store(out_row + rest, untouched, mask=mask & (rest < K))


def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    check(q, k, cos, sin, position_ids)
    (T, Hq, K), Hkv, R = q.shape, k.shape[1], cos.shape[1]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    cos, sin = (t if t.stride(1) == 1 else t.contiguous() for t in (cos, sin))
    if q_out.numel() + k_out.numel() == 0:
        return q_out, k_out
    launch = choose("rope", T, q.device)
    half_block = triton.next_power_of_2(max(R // 2, 1))
    fewest = triton.next_power_of_2(max(min(Hq, Hkv), 1))  # equal tiles of q and k: one layout, so the tables stay put
    heads = min(fewest, launch.depth)
    rows = max(launch.columns // (2 * half_block * heads), 1)
    with on_device(q):
        rope[(triton.cdiv(T, rows),)](
            q, k, q_out, k_out, cos, sin, position_ids, T, cos.shape[0], *q.stride(), *k.stride(), cos.stride(0),
            sin.stride(0), 1 if position_ids is None else position_ids.stride(0), Hq, Hkv, K, R,
            position_ids is not None, interleaved, transposed, rows, heads, half_block,
            triton.next_power_of_2(max(K - R, 1)), launch.stages, num_warps=launch.warps,
        )  # fmt: skip
    return q_out, k_out


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> None:
    """Raise unless the shapes fit: the kernel would read past the end."""
    if not (q.dim() == k.dim() == 3 and q.shape[::2] == k.shape[::2] and q.dtype == k.dtype):
        raise RuntimeError(
            f"rope: q is {list(q.shape)} {q.dtype}, k is {list(k.shape)} {k.dtype}; they must be [T, Hq, K] and "
            "[T, Hkv, K] of one dtype"
        )
    if not (cos.dim() == 2 and cos.shape == sin.shape and cos.shape[1] % 2 == 0 and cos.shape[1] <= q.shape[2]):
        raise RuntimeError(
            f"rope: cos is {list(cos.shape)}, sin is {list(sin.shape)}; both must be [P, R] with an even R <= {q.shape[2]}"
        )
    if position_ids is not None and position_ids.shape != q.shape[:1]:
        raise RuntimeError(
            f"rope: position_ids are {list(position_ids.shape)} for {q.shape[0]} tokens; flatten them to [T]"
        )
    if position_ids is None and q.shape[0] > cos.shape[0]:
        raise RuntimeError(
            f"rope: {q.shape[0]} tokens, but cos has {cos.shape[0]} rows; pass position_ids or longer tables"
        )
