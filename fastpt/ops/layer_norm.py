"""layer_norm: y = w * (x - mean) / std + b; one pass each way, saves x and two numbers per row, frozen gradients skipped."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpt.ops._library import Cost, nbytes, register


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
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, wants_weight: bool, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad, normed = grad.to(rstd.dtype), (x.to(rstd.dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    scaled = grad if weight is None else grad * weight.to(rstd.dtype)
    along = (scaled * normed).mean(-1, keepdim=True)
    dx = rstd.unsqueeze(-1) * (scaled - scaled.mean(-1, keepdim=True) - normed * along)
    dweight = (grad * normed).sum_to_size(x.shape[-1]) if wants_weight else rstd.new_empty(0)
    dbias = grad.sum_to_size(x.shape[-1]) if wants_bias else rstd.new_empty(0)
    return dx.to(x.dtype).contiguous(), dweight, dbias


def _row_numbers(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


_forward = register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    reference=reference_forward,
    fake=lambda x, *_: (x.new_empty(x.shape), _row_numbers(x), _row_numbers(x)),
    cost=lambda x, weight, bias, eps: Cost(
        nbytes(x, weight, bias), nbytes(x) + 8 * (x.numel() // x.shape[-1]), 7 * x.numel()
    ),
)
# dx, and dweight and dbias in float32 whatever the parameters' dtype, empty when not wanted.
_backward = register(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, bool wants_weight, "
    "bool wants_bias) -> (Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda grad, x, mean, rstd, weight, wants_weight, wants_bias: (
        x.new_empty(x.shape),
        rstd.new_empty(x.shape[-1] if wants_weight else 0),
        rstd.new_empty(x.shape[-1] if wants_bias else 0),
    ),
    cost=lambda grad, x, mean, rstd, weight, wants_weight, wants_bias: Cost(
        nbytes(grad, x, mean, rstd, weight),
        nbytes(x) + 4 * x.shape[-1] * (wants_weight + wants_bias),
        12 * x.numel(),
    ),
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, mean, rstd = _forward(x, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        _, wants_weight, wants_bias, _ = ctx.needs_input_grad
        dx, dweight, dbias = _backward(grad, *ctx.saved_tensors, wants_weight, wants_bias)
        return dx, dweight if wants_weight else None, dbias if wants_bias else None, None


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """weight * (x - mean(x)) / sqrt(var(x) + eps) + bias, over the last dim.

    Shapes: x [..., D], weight and bias [D] or None -> [..., D] in x's dtype, whatever the parameters'.
    Numerics: float32 inside, one rounding; parameter gradients are float32 sums in a fixed order.
    Raises: RuntimeError when weight or bias is not [D].
    Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450.
    """
    return _LayerNorm.apply(x, weight, bias, eps)
