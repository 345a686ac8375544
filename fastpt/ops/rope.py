"""rope: rotary position embedding of q and k in one call, from strided projections to contiguous outputs.

The transpose of the rotation is the same rotation with the sines' halves swapped and negated, so one kernel serves
forward and backward, also where cos and sin carry an attention scaling or differ between the halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpt.ops._library import Cost, nbytes, register


def reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition, as Hugging Face's apply_rotary_pos_emb: x * cos + turned(x) * sin on the first R dims."""
    rows = slice(q.shape[0]) if position_ids is None else position_ids
    cos, sin = cos[rows].unsqueeze(1), sin[rows].unsqueeze(1)  # [T, 1, R]
    if transposed:
        sin = -_swapped(sin, interleaved)
    return _rotated(q, cos, sin, interleaved), _rotated(k, cos, sin, interleaved)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    part, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    first, second = (part[..., ::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
    turned = torch.stack((-second, first), -1).flatten(-2) if interleaved else torch.cat((-second, first), -1)
    return torch.cat(((part * cos + turned * sin).to(x.dtype), rest), -1)


def _swapped(x: Tensor, interleaved: bool) -> Tensor:
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else x.roll(x.shape[-1] // 2, -1)


def _cost(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, *_) -> Cost:
    tables = min(q.shape[0], cos.shape[0]) * cos.shape[-1] * (cos.element_size() + sin.element_size())
    rotated = q.shape[0] * (q.shape[1] + k.shape[1]) * cos.shape[-1]
    return Cost(nbytes(q, k, position_ids) + tables, nbytes(q, k), 3 * rotated)


_rope = register(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved, bool transposed) "
    "-> (Tensor, Tensor)",
    reference=reference,
    fake=lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    cost=_cost,
    triton="fastpt.kernels.rope:forward",
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, position_ids, interleaved):
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.interleaved = interleaved
        return _rope(q, k, cos, sin, position_ids, interleaved, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):
        return *_rope(dq, dk, *ctx.saved_tensors, ctx.interleaved, True), None, None, None, None


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, position_ids: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate pairs of the first R dims of every head of q and k by the angles of their token's position.

    Token t uses row position_ids[t] of the tables, or row t. Column j of cos and sin belongs to dim j: pairs are
    (j, j + R/2), or (2j, 2j + 1) when `interleaved` (a table made of two equal halves is then the wrong one: give it
    as `half.repeat_interleave(2, -1)`).

    Shapes: q [T, Hq, K], k [T, Hkv, K], any strides with a contiguous last dim; cos, sin [P, R] of any floating dtype,
        R even, R <= K; position_ids [T] -> contiguous q and k.
    Numerics: float32 inside, one rounding. Backward is the exact transpose. cos and sin get no gradient.
    Raises: RuntimeError when shapes disagree or a position lies outside the tables.
    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864.
    """
    return _Rope.apply(q, k, cos, sin, position_ids, interleaved)
