"""swiglu: out = silu(gate) * up, fused so the silu(gate) activation is never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpt.ops._library import Cost, nbytes, register


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition. Every kernel is tested against this, in float64 (tests/ops/test_swiglu.py)."""
    return torch.nn.functional.silu(gate) * up


def reference_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dtype = gate.dtype
    grad, gate, up = (t.to(torch.promote_types(dtype, torch.float32)) for t in (grad, gate, up))
    sigmoid = torch.sigmoid(gate)
    return (grad * up * sigmoid * (1 + gate * (1 - sigmoid))).to(dtype), (grad * gate * sigmoid).to(dtype)


_forward = register(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    reference=reference,
    fake=lambda gate, up: gate.new_empty(gate.shape),
    cost=lambda gate, up: Cost(nbytes(gate, up), nbytes(gate), 5 * gate.numel()),
    triton="fastpt.kernels.swiglu:forward",
)
_backward = register(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda grad, gate, up: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
    cost=lambda grad, gate, up: Cost(nbytes(grad, gate, up), nbytes(gate, up), 11 * gate.numel()),
    triton="fastpt.kernels.swiglu:backward",
)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _backward(grad, *ctx.saved_tensors)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up.

    Shapes: gate, up [..., D] of equal shape and dtype -> [..., D], same dtype.
    Numerics: computed in float32 whatever the dtype, rounded once at the store.
    Raises: RuntimeError when the shapes or dtypes differ.
    Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
    """
    return _SwiGLU.apply(gate, up)
