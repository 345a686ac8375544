"""rms_norm, add_rms_norm: y = (offset + w) * x / rms(x); one pass each way, x (or x + residual) and 1/rms are all it saves.

Families round differently: Llama, Qwen, Mistral and Phi-3 round x̂ to the model's dtype *before* the weight, Gemma
multiplies `1 + w` in float32 and rounds once. In bfloat16 the two differ in the last bit of about half of all elements,
hence `casts_first`: a fused model gives what the family's own code gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpt.ops import _workspace
from fastpt.ops._library import Cost, gradient_dtype, nbytes, register


def reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, casts_first: bool = True) -> Tensor:
    """The definition, rounded where Hugging Face's LlamaRMSNorm (casts_first) and Gemma2RMSNorm (not) round."""
    normed = _wide(x) * _rstd(x, eps)
    if casts_first:
        return ((offset + weight) * normed.to(x.dtype)).to(x.dtype)
    return (normed * (offset + weight.to(normed.dtype))).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(_wide(x).pow(2).mean(-1, keepdim=True) + eps)


def reference_forward(x: Tensor, weight: Tensor, eps: float, offset: float, casts_first: bool) -> tuple[Tensor, Tensor]:
    return reference(x, weight, eps, offset, casts_first).contiguous(), _rstd(x, eps).squeeze(-1).contiguous()


def reference_add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, casts_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    summed = (x + residual).contiguous()
    y, rstd = reference_forward(summed, weight, eps, offset, casts_first)
    return y, summed, rstd


def reference_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    offset: float,
    weight_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    grad, normed = grad.to(rstd.dtype), x.to(rstd.dtype) * rstd.unsqueeze(-1)
    scaled = grad * (offset + weight.to(rstd.dtype))
    dx = rstd.unsqueeze(-1) * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    if grad_sum is not None:
        dx = dx + grad_sum
    dweight = rstd.new_empty(0)
    if weight_dtype is not None:
        dweight = (grad * normed).sum_to_size(weight.shape).to(weight_dtype)
    return dx.to(x.dtype).contiguous(), dweight


def _rstd_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


_forward = register(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset, bool casts_first) -> (Tensor, Tensor)",
    reference=reference_forward,
    fake=lambda x, weight, eps, offset, casts_first: (x.new_empty(x.shape), _rstd_like(x)),
    cost=lambda x, weight, *_: Cost(nbytes(x, weight), nbytes(x) + 4 * (x.numel() // x.shape[-1]), 4 * x.numel()),
    triton="fastpt.kernels.rms_norm:forward",
)
_add_forward = register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float offset, bool casts_first) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference_add_forward,
    fake=lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape), _rstd_like(x)),
    cost=lambda x, residual, weight, *_: Cost(
        nbytes(x, residual, weight), 2 * nbytes(x) + 4 * (x.numel() // x.shape[-1]), 5 * x.numel()
    ),
    triton="fastpt.kernels.rms_norm:add_forward",
)
# dx, and dweight, a float32 sum stored in weight_dtype (empty without one); grad_sum is the gradient of x + residual.
_backward = register(
    "rms_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor rstd, Tensor weight, float offset, "
    "ScalarType? weight_dtype) -> (Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda grad, grad_sum, x, rstd, weight, offset, weight_dtype: (
        x.new_empty(x.shape),
        rstd.new_empty(0) if weight_dtype is None else rstd.new_empty(weight.shape, dtype=weight_dtype),
    ),
    cost=lambda grad, grad_sum, x, rstd, weight, offset, weight_dtype: Cost(
        nbytes(grad, grad_sum, x, rstd, weight),
        nbytes(x) + weight.numel() * (0 if weight_dtype is None else weight_dtype.itemsize),
        9 * x.numel(),
    ),
    triton="fastpt.kernels.rms_norm:backward",
    workspace=_workspace.rms_norm_backward,
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset, casts_first):
        y, rstd = _forward(x, weight, eps, offset, casts_first)
        ctx.save_for_backward(x, rstd, weight)
        ctx.offset, ctx.weight_dtype = offset, gradient_dtype(weight)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dweight = _gradients(ctx, grad, None, ctx.needs_input_grad[1])
        return dx, dweight, None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset, casts_first):
        ctx.set_materialize_grads(False)
        y, summed, rstd = _add_forward(x, residual, weight, eps, offset, casts_first)
        ctx.save_for_backward(summed, rstd, weight)
        ctx.offset, ctx.weight_dtype = offset, gradient_dtype(weight)
        return y, summed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_sum):
        if grad is None:  # only the sum was used
            return grad_sum, grad_sum, None, None, None, None
        dx, dweight = _gradients(ctx, grad, grad_sum, ctx.needs_input_grad[2])
        return dx, dx, dweight, None, None, None


def _gradients(ctx: Any, grad: Tensor, grad_sum: Tensor | None, wants_weight: bool) -> tuple[Tensor, Tensor | None]:
    dx, dweight = _backward(grad, grad_sum, *ctx.saved_tensors, ctx.offset, ctx.weight_dtype if wants_weight else None)
    return dx, dweight if wants_weight else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, casts_first: bool = True) -> Tensor:
    """(offset + weight) * x / sqrt(mean(x²) + eps), over the last dim.

    `casts_first` rounds x̂ to x's dtype before the weight (Llama); without it everything is float32 until the one
    rounding at the store (Gemma, with offset=1).

    Shapes: x [..., D], weight [D] -> [..., D] in x's dtype, whatever the weight's.
    Numerics: float32 inside; the weight's gradient is a float32 sum in a fixed order, rounded once to the parameter's
    grad_dtype, and not formed when frozen.
    Raises: RuntimeError when the weight is not [D].
    Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """
    return _RMSNorm.apply(x, weight, eps, offset, casts_first)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, casts_first: bool = True
) -> tuple[Tensor, Tensor]:
    """The pre-norm residual step: returns (rms_norm(s), s) for s = x + residual.

    Saves s alone, which the next layer holds anyway; backward takes the gradients of both outputs in one pass.

    Shapes: x, residual [..., D], weight [D] -> two of [..., D].
    Numerics: s is rounded to the dtype of x + residual before it is normed, as two separate ops would.
    Raises: RuntimeError when the shapes differ.
    """
    if x.dtype != residual.dtype:  # autocast: a float32 stream and a bfloat16 branch
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    return _AddRMSNorm.apply(x, residual, weight, eps, offset, casts_first)
