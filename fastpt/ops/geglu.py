"""geglu: out = gelu(gate) * up, fused so the gelu(gate) activation is never stored; exact and tanh GELU."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpt.ops._library import Cost, nbytes, register


def reference(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """The definition. "tanh" is Hugging Face's gelu_pytorch_tanh (Gemma), "none" its gelu."""
    return torch.nn.functional.gelu(gate, approximate=approximate) * up


def reference_backward(grad: Tensor, gate: Tensor, up: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    dgate = torch.ops.aten.gelu_backward(grad * up, gate, approximate=approximate)
    return dgate, grad * torch.nn.functional.gelu(gate, approximate=approximate)


_forward = register(
    "geglu(Tensor gate, Tensor up, str approximate) -> Tensor",
    reference=reference,
    fake=lambda gate, up, approximate: gate.new_empty(gate.shape),
    cost=lambda gate, up, approximate: Cost(nbytes(gate, up), nbytes(gate), 10 * gate.numel()),
    triton="fastpt.kernels.geglu:forward",
)
_backward = register(
    "geglu_backward(Tensor grad, Tensor gate, Tensor up, str approximate) -> (Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda grad, gate, up, approximate: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
    cost=lambda grad, gate, up, approximate: Cost(nbytes(grad, gate, up), nbytes(gate, up), 20 * gate.numel()),
    triton="fastpt.kernels.geglu:backward",
)


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, approximate):
        ctx.save_for_backward(gate, up)
        ctx.approximate = approximate
        return _forward(gate, up, approximate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *_backward(grad, *ctx.saved_tensors, ctx.approximate), None


def geglu(gate: Tensor, up: Tensor, *, approximate: Literal["tanh", "none"] = "tanh") -> Tensor:
    """gelu(gate) * up.

    Shapes: gate, up [..., D] of equal shape and dtype -> [..., D], same dtype.
    Numerics: computed in float32 whatever the dtype, rounded once at the store.
    Raises: RuntimeError when the shapes or dtypes differ, or `approximate` is neither "tanh" nor "none".
    Source: Shazeer 2020, https://arxiv.org/abs/2002.05202; Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415.
    """
    return _GeGLU.apply(gate, up, approximate)
