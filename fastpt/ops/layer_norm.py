"""layer_norm, add_layer_norm: y = w * (x - mean) / std + b; one pass each way, x (or the sum) and two numbers per row saved.

add_layer_norm is a post-norm encoder's step after each branch: dropout, residual and norm in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpt.ops._dropout import drawn_seed, factors
from fastpt.ops._library import Cost, gradient_dtype, nbytes, register


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The definition: torch.nn.functional.layer_norm over the last dim, in x's dtype."""
    weight, bias = (p if p is None else p.to(x.dtype) for p in (weight, bias))
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def reference_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), -1, correction=0)
    return reference(x, weight, bias, eps).contiguous(), mean.contiguous(), torch.rsqrt(var + eps).contiguous()


def reference_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, normed = grad.to(rstd.dtype), (x.to(rstd.dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    scaled = grad if weight is None else grad * weight.to(rstd.dtype)
    along = (scaled * normed).mean(-1, keepdim=True)
    dx = rstd.unsqueeze(-1) * (scaled - scaled.mean(-1, keepdim=True) - normed * along)
    dweight = _stored(grad * normed, weight_dtype)
    dbias = _stored(grad, bias_dtype)
    return dx.to(x.dtype).contiguous(), dweight, dbias


def _stored(gradients: Tensor, dtype: torch.dtype | None) -> Tensor:
    return gradients.new_empty(0) if dtype is None else gradients.sum_to_size(gradients.shape[-1]).to(dtype)


def reference_sum(x: Tensor, residual: Tensor, dropout_p: float, seed: int) -> Tensor:
    """dropout(x) + residual in residual's dtype, rounded once."""
    if dropout_p == 0:
        return (x + residual).to(residual.dtype)
    factor = factors(x.numel() // x.shape[-1], x.shape[-1], dropout_p, seed, x.device).view(x.shape)
    return (x * factor + residual).to(residual.dtype)


def reference_add_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed = reference_sum(x, residual, dropout_p, seed).contiguous()
    y, mean, rstd = reference_forward(summed, weight, bias, eps)
    return y, summed, mean, rstd


def reference_add_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    dropout_p: float,
    seed: int,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ds, dweight, dbias = reference_backward(grad, summed, mean, rstd, weight, weight_dtype, bias_dtype)
    if grad_sum is not None:
        ds = ds + grad_sum
    dx = ds.new_empty(0, dtype=dtype)
    if dropout_p > 0:
        rows = summed.numel() // summed.shape[-1]
        factor = factors(rows, summed.shape[-1], dropout_p, seed, ds.device).view(ds.shape)
        dx = (ds * factor).to(dtype)
    elif dtype != ds.dtype:
        dx = ds.to(dtype)
    return dx, ds, dweight, dbias


def _row_numbers(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


def _empty_gradients(like: Tensor, x: Tensor, *dtypes: torch.dtype | None) -> list[Tensor]:
    return [like.new_empty(0) if d is None else like.new_empty(x.shape[-1], dtype=d) for d in dtypes]


_forward = register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    reference=reference_forward,
    fake=lambda x, *_: (x.new_empty(x.shape), _row_numbers(x), _row_numbers(x)),
    cost=lambda x, weight, bias, eps: Cost(
        nbytes(x, weight, bias), nbytes(x) + 8 * (x.numel() // x.shape[-1]), 7 * x.numel()
    ),
    triton="fastpt.kernels.layer_norm:forward",
)
# dx, and dweight and dbias, float32 sums stored in the dtypes asked for, empty without one.
_backward = register(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
    "ScalarType? weight_dtype, ScalarType? bias_dtype) -> (Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda grad, x, mean, rstd, weight, *dtypes: (x.new_empty(x.shape), *_empty_gradients(rstd, x, *dtypes)),
    cost=lambda grad, x, mean, rstd, weight, *dtypes: Cost(
        nbytes(grad, x, mean, rstd, weight),
        nbytes(x) + nbytes(*_empty_gradients(rstd, x, *dtypes)),
        12 * x.numel(),
    ),
    triton="fastpt.kernels.layer_norm:backward",
)

_add_forward = register(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float dropout_p, int seed) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference_add_forward,
    fake=lambda x, residual, *_: (
        residual.new_empty(x.shape), residual.new_empty(x.shape), _row_numbers(residual), _row_numbers(residual)
    ),
    cost=lambda x, residual, weight, bias, *_: Cost(
        nbytes(x, residual, weight, bias), 2 * nbytes(residual) + 8 * (x.numel() // x.shape[-1]), 8 * x.numel()
    ),
    triton="fastpt.kernels.layer_norm:add_forward",
)  # fmt: skip
# dx in x's dtype (empty where the gradient of the sum is that of x too), the gradient of the sum, dweight, dbias.
_add_backward = register(
    "add_layer_norm_backward(Tensor grad, Tensor? grad_sum, Tensor summed, Tensor mean, Tensor rstd, Tensor? weight, "
    "ScalarType dtype, float dropout_p, int seed, ScalarType? weight_dtype, ScalarType? bias_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference_add_backward,
    fake=lambda grad, grad_sum, summed, mean, rstd, weight, dtype, dropout_p, seed, *dtypes: (
        summed.new_empty(summed.shape if dropout_p > 0 or dtype != summed.dtype else 0, dtype=dtype),
        summed.new_empty(summed.shape),
        *_empty_gradients(rstd, summed, *dtypes),
    ),
    cost=lambda grad, grad_sum, summed, mean, rstd, weight, dtype, dropout_p, seed, *dtypes: Cost(
        nbytes(grad, grad_sum, summed, mean, rstd, weight),
        nbytes(summed)
        + (dropout_p > 0 or dtype != summed.dtype) * summed.numel() * dtype.itemsize
        + nbytes(*_empty_gradients(rstd, summed, *dtypes)),
        14 * summed.numel(),
    ),
    triton="fastpt.kernels.layer_norm:add_backward",
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, mean, rstd = _forward(x, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.dtypes = gradient_dtype(weight), gradient_dtype(bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        _, wants_weight, wants_bias, _ = ctx.needs_input_grad
        dtypes = (d if wants else None for d, wants in zip(ctx.dtypes, (wants_weight, wants_bias), strict=True))
        dx, dweight, dbias = _backward(grad, *ctx.saved_tensors, *dtypes)
        return dx, dweight if wants_weight else None, dbias if wants_bias else None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, dropout_p, seed):
        ctx.set_materialize_grads(False)
        y, summed, mean, rstd = _add_forward(x, residual, weight, bias, eps, dropout_p, seed)
        ctx.save_for_backward(summed, mean, rstd, weight)
        ctx.options, ctx.dtypes = (x.dtype, dropout_p, seed), (gradient_dtype(weight), gradient_dtype(bias))
        ctx.has_dx = dropout_p > 0 or x.dtype != summed.dtype
        return y, summed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_sum):
        summed, mean, rstd, weight = ctx.saved_tensors
        if grad is None:  # only the sum was used
            grad = torch.zeros_like(summed)
        _, _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        dtypes = (d if wants else None for d, wants in zip(ctx.dtypes, (wants_weight, wants_bias), strict=True))
        dx, ds, dweight, dbias = _add_backward(grad, grad_sum, summed, mean, rstd, weight, *ctx.options, *dtypes)
        return (
            dx if ctx.has_dx else ds,
            ds,
            dweight if wants_weight else None,
            dbias if wants_bias else None,
            None,
            None,
            None,
        )


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """weight * (x - mean(x)) / sqrt(var(x) + eps) + bias, over the last dim.

    Shapes: x [..., D], weight and bias [D] or None -> [..., D] in x's dtype, whatever the parameters'.
    Numerics: float32 inside, one rounding; parameter gradients are float32 sums in a fixed order, rounded once
    to the parameters' grad_dtype.
    Raises: RuntimeError when weight or bias is not [D].
    Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450.
    """
    return _LayerNorm.apply(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual step of an encoder: returns (layer_norm(s), s) for s = dropout(x) + residual.

    Saves s and two numbers per row. Dropout's mask is a hash of `seed` (by default one from torch's generator), of the row and
    of the column: never stored, formed again in backward.

    Shapes: x, residual [..., D], weight and bias [D] or None -> two of [..., D] in residual's dtype; x may be bfloat16
    beside a float32 residual, as under autocast.
    Numerics: s is rounded to residual's dtype before it is normed; else as layer_norm.
    Raises: RuntimeError when shapes differ or dropout_p is not in [0, 1].
    Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450; Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html.
    """
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(f"add_layer_norm: dropout_p is {dropout_p}; it must lie between 0 and 1")
    if x.dtype != residual.dtype:  # autocast: a bfloat16 branch beside a float32 stream
        residual = residual.to(torch.promote_types(x.dtype, residual.dtype))
    seed = drawn_seed(dropout_p) if seed is None else seed
    return _AddLayerNorm.apply(x, residual, weight, bias, eps, dropout_p, seed)
