"""bias_gelu: gelu(x + bias), exact and tanh; saves x alone, and its backward sums the bias's gradient in the same pass."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpt.ops._library import Cost, gradient_dtype, nbytes, register


def reference(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """The definition. "none" is Hugging Face's gelu (BERT), "tanh" its gelu_new and gelu_pytorch_tanh (GPT-2)."""
    return torch.nn.functional.gelu(_biased(x, bias), approximate=approximate)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)


def reference_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    dx = torch.ops.aten.gelu_backward(grad, _biased(x, bias), approximate=approximate)
    dbias = x.new_empty(0, dtype=(wide := torch.promote_types(x.dtype, torch.float32)))
    if bias_dtype is not None:
        dbias = dx.to(wide).sum_to_size(x.shape[-1]).to(bias_dtype)
    return dx.contiguous(), dbias


_forward = register(
    "bias_gelu(Tensor x, Tensor? bias, str approximate) -> Tensor",
    reference=lambda x, bias, approximate: reference(x, bias, approximate).contiguous(),
    fake=lambda x, bias, approximate: x.new_empty(x.shape),
    cost=lambda x, bias, approximate: Cost(nbytes(x, bias), nbytes(x), 11 * x.numel()),
    triton="fastpt.kernels.bias_gelu:forward",
)
# dx, and dbias, a float32 sum stored in bias_dtype, empty without one.
_backward = register(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias, str approximate, ScalarType? bias_dtype) "
    "-> (Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda grad, x, bias, approximate, bias_dtype: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[-1] if bias_dtype else 0, dtype=bias_dtype or torch.promote_types(x.dtype, torch.float32)),
    ),
    cost=lambda grad, x, bias, approximate, bias_dtype: Cost(
        nbytes(grad, x, bias),
        nbytes(x) + x.shape[-1] * (0 if bias_dtype is None else bias_dtype.itemsize),
        17 * x.numel(),
    ),
    triton="fastpt.kernels.bias_gelu:backward",
)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, approximate):
        ctx.save_for_backward(x, bias)
        ctx.approximate, ctx.bias_dtype = approximate, gradient_dtype(bias)
        return _forward(x, bias, approximate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        wants_bias = ctx.needs_input_grad[1]
        dx, dbias = _backward(grad, *ctx.saved_tensors, ctx.approximate, ctx.bias_dtype if wants_bias else None)
        return dx, dbias if wants_bias else None, None


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: Literal["tanh", "none"] = "none") -> Tensor:
    """gelu(x + bias), where x is a product that the bias has not been added to yet; without a bias, gelu(x).

    Shapes: x [..., D], bias [D] or None -> [..., D] in x's dtype, whatever the bias's.
    Numerics: x + bias and GELU in float32, rounded once at the store; dbias is a float32 sum in a fixed order.
    Raises: RuntimeError when bias is not [D], or `approximate` is neither "tanh" nor "none".
    Source: Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415.
    """
    return _BiasGelu.apply(x, bias, approximate)
