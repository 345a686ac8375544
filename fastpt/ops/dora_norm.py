"""dora_norm: |W + s B A| of every row, the norm that DoRA divides by; W is read once and the merged weight never stored.

The tile of s B A is added to W's and squared, not |W|² + 2s <W, BA> + s² |BA|²: the products would be as many, and where an
adapter cancels a row of W the three terms would leave nothing but their rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpt.ops._library import Cost, nbytes, register


def reference(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """The definition, in float32 at least."""
    wide = torch.promote_types(torch.promote_types(weight.dtype, lora_a.dtype), torch.float32)
    return torch.addmm(weight.to(wide), lora_b.to(wide), lora_a.to(wide), alpha=scale).norm(dim=1)


def _fake(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(torch.promote_types(weight.dtype, lora_a.dtype), torch.float32)
    return weight.new_empty(weight.shape[0], dtype=wide)


_op = register(
    "dora_norm(Tensor weight, Tensor lora_a, Tensor lora_b, float scale) -> Tensor",
    reference=reference,
    fake=_fake,
    cost=lambda weight, lora_a, lora_b, scale: Cost(
        nbytes(weight, lora_a, lora_b), 4 * weight.shape[0], (2 * len(lora_a) + 3) * weight.numel()
    ),
    triton="fastpt.kernels.dora_norm:forward",
)


@torch.no_grad()
def dora_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """The Euclidean norm of each row of weight + scale * lora_b @ lora_a; a constant for autograd, as in PEFT.

    Shapes: weight [O, D], lora_a [R, D], lora_b [O, R] -> [O], float32 (float64 of float64 inputs).
    Numerics: products and sums in float32, in a fixed order.
    Raises: RuntimeError when the shapes do not fit.
    Source: Liu et al. 2024, https://arxiv.org/abs/2402.09353.
    """
    fits = weight.dim() == lora_a.dim() == lora_b.dim() == 2 and weight.shape[1] == lora_a.shape[1]
    if not fits or lora_b.shape != (len(weight), len(lora_a)) or lora_a.dtype != lora_b.dtype:
        found = ", ".join(f"{[*t.shape]} {t.dtype}" for t in (weight, lora_a, lora_b))
        raise RuntimeError(
            f"dora_norm: weight, lora_a and lora_b are {found}; they must be [O, D], [R, D] and [O, R], the adapter in one dtype"
        )
    return _op(weight, lora_a, lora_b, scale)
