"""embedding: rows of a weight by index."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpt.ops._library import Cost, gradient_dtype, nbytes, register


def reference(ids: Tensor, weight: Tensor) -> Tensor:
    """The definition."""
    return torch.nn.functional.embedding(ids, weight)


def reference_backward(grad: Tensor, ids: Tensor, rows: int, padding_idx: int, dtype: torch.dtype) -> Tensor:
    """The weight's gradient, summed in float32 and stored in `dtype`; `padding_idx` gets none."""
    grad, ids = grad.flatten(0, -2), ids.flatten()
    kept = ids != padding_idx
    wide = torch.promote_types(grad.dtype, torch.float32)
    zeros = grad.new_zeros(rows, grad.shape[1], dtype=wide)
    return zeros.index_add_(0, ids[kept], grad[kept].to(wide)).to(dtype)


def _cost(ids, weight) -> Cost:
    moved = ids.numel() * weight.shape[1] * weight.element_size()
    return Cost(nbytes(ids) + moved, moved, 0)


def _cost_backward(grad, ids, rows, padding_idx, dtype) -> Cost:
    return Cost(nbytes(ids, grad), dtype.itemsize * min(rows * grad.shape[-1], grad.numel()), grad.numel())


_forward = register(
    "embedding(Tensor ids, Tensor weight) -> Tensor",
    reference=reference,
    fake=lambda ids, weight: weight.new_empty(*ids.shape, weight.shape[1]),
    cost=_cost,
)


_backward = register(
    "embedding_backward(Tensor grad, Tensor ids, int rows, int padding_idx, ScalarType dtype) -> Tensor",
    reference=reference_backward,
    fake=lambda grad, ids, rows, padding_idx, dtype: grad.new_empty(rows, grad.shape[-1], dtype=dtype),
    cost=_cost_backward,
    triton="fastpt.kernels.embedding:backward",
    workspace=lambda grad, ids, rows, padding, dtype: 0 if dtype == torch.float32 else 4 * rows * grad.shape[-1],
)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids, padding_idx):
        ctx.save_for_backward(ids)
        ctx.options = weight.shape[0], padding_idx, gradient_dtype(weight)
        return _forward(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _backward(grad, *ctx.saved_tensors, *ctx.options), None, None


def embedding(ids: Tensor, weight: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """weight[ids]; rows equal to `padding_idx` give the weight no gradient.

    Shapes: ids int64 or int32 [...], weight [V, D] -> [..., D] in the weight's dtype.
    Numerics: the weight's gradient is summed in float32, in the order of the tokens, and rounded once to its grad_dtype.
    Raises: RuntimeError when shapes or dtypes do not fit, IndexError for an id that is not in [0, V).
    """
    if weight.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(
            f"embedding: weight is {tuple(weight.shape)}, ids are {ids.dtype}; they must be [V, D] and int64 or int32"
        )
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return _Embedding.apply(weight, ids.long(), padding)
