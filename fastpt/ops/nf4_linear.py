"""nf4_linear: lora_linear where weights may be NF4 (nf4.py), frozen, and never in memory as a whole.

The C++ kernel unpacks a panel of a weight where it is multiplied. The numbers are those of lora_linear on the dequantised
weight, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpt.ops import _workspace
from fastpt.ops._library import Cost, autocast, nbytes, register
from fastpt.ops.lora_linear import Layer, _check, layer_gradients, new_seeds, takes_float32
from fastpt.ops.lora_linear import _cost as plain_cost
from fastpt.ops.lora_linear import _cost_backward as plain_cost_backward
from fastpt.ops.lora_linear import _fake as plain_fake
from fastpt.ops.lora_linear import _fake_backward as plain_fake_backward
from fastpt.ops.lora_linear import backward as plain_backward
from fastpt.ops.lora_linear import forward as plain_forward
from fastpt.ops.nf4 import NF4Weight, dequantize


def _dequantized(x, weights, absmax, nested) -> list[Tensor]:
    """The weights as lora_linear takes them."""
    return [
        weight if scales is None else dequantize(weight, scales, more, _shape(weight, scales), x.dtype)
        for weight, scales, more in zip(weights, absmax, nested, strict=True)
    ]


def _shape(weight: Tensor, absmax: Tensor | None) -> list[int]:
    return [weight.shape[0], weight.shape[1] * (1 if absmax is None else 2)]


def _stand_ins(x, weights, absmax) -> list[Tensor]:
    """Weights of the right shape and dtype without values."""
    return [
        weight if scales is None else torch.empty(_shape(weight, scales), dtype=x.dtype, device="meta")
        for weight, scales in zip(weights, absmax, strict=True)
    ]


def reference(x, weights, absmax, nested, biases, lora_a, lora_b, scales, dropout_p, seeds):
    """lora_linear on the dequantised weights."""
    return plain_forward(x, _dequantized(x, weights, absmax, nested), biases, lora_a, lora_b, scales, dropout_p, seeds)


def reference_backward(
    grads, x, weights, absmax, nested, lora_a, lora_b, xas, scales, dropout_p, seeds, wants_x, wants, in_float32=True
):
    """Its backward."""
    found = _dequantized(x, weights, absmax, nested)
    return plain_backward(grads, x, found, lora_a, lora_b, xas, scales, dropout_p, seeds, wants_x, wants, in_float32)


def _fake(x, weights, absmax, nested, *rest):
    return plain_fake(x, _stand_ins(x, weights, absmax), *rest)


def _fake_backward(grads, x, weights, absmax, nested, *rest):
    return plain_fake_backward(grads, x, _stand_ins(x, weights, absmax), *rest)


def _saved(x, weights, absmax, nested) -> Cost:
    """What is not read, against weights of x's dtype."""
    whole = _stand_ins(x, weights, absmax)
    return Cost(nbytes(*weights, *absmax, *nested) - nbytes(*whole), 0, 0)


def _cost(x, weights, absmax, nested, *rest):
    return plain_cost(x, _stand_ins(x, weights, absmax), *rest) + _saved(x, weights, absmax, nested)


def _cost_backward(grads, x, weights, absmax, nested, *rest):
    found = plain_cost_backward(grads, x, _stand_ins(x, weights, absmax), *rest)
    return found + _saved(x, weights, absmax, nested)


forward = register(
    "nf4_linear(Tensor x, Tensor[] weights, Tensor?[] absmax, Tensor?[] nested, Tensor?[] biases, Tensor?[] lora_a, "
    "Tensor?[] lora_b, float[] scales, float dropout_p, int[] seeds) -> (Tensor[], Tensor[])",
    reference=reference,
    fake=_fake,
    cost=_cost,
    workspace=_workspace.nf4_linear,
)
backward = register(
    "nf4_linear_backward(Tensor[] grads, Tensor x, Tensor[] weights, Tensor?[] absmax, Tensor?[] nested, "
    "Tensor?[] lora_a, Tensor?[] lora_b, Tensor[] xas, float[] scales, float dropout_p, int[] seeds, bool wants_x, "
    "bool[] wants, bool in_float32=True) -> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[])",
    reference=reference_backward,
    fake=_fake_backward,
    cost=_cost_backward,
    workspace=_workspace.nf4_linear_backward,
)


def operands(weight: Tensor | NF4Weight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A weight as the op takes it: the tensor, or packed rows with their scales."""
    return (weight.rows, weight.absmax, weight.nested) if isinstance(weight, NF4Weight) else (weight, None, None)


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scales, dropout_p, seeds, *tensors):
        weights, absmax, nested, biases, lora_a, lora_b = (tensors[i::6] for i in range(6))
        ys, xas = forward(x, weights, absmax, nested, biases, lora_a, lora_b, scales, dropout_p, seeds)
        ctx.save_for_backward(x, *weights, *absmax, *nested, *lora_a, *lora_b, *xas)
        ctx.scalars, ctx.in_float32 = (scales, dropout_p, seeds), takes_float32(tensors)
        return tuple(ys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        x, *saved = ctx.saved_tensors
        n = len(saved) // 6
        weights, absmax, nested, lora_a, lora_b, xas = (saved[i * n : (i + 1) * n] for i in range(6))
        wants_x, asked = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        wants = [asked[6 * i + kind] for i in range(n) for kind in (0, 3, 4, 5)]
        found = backward(
            grads, x, weights, absmax, nested, lora_a, lora_b, xas, *ctx.scalars, wants_x, wants, ctx.in_float32
        )  # fmt: skip
        given = layer_gradients(found, wants)
        tensors = [t for i in range(n) for t in (given[4 * i], None, None, *given[4 * i + 1 : 4 * i + 4])]
        return found[0] if wants_x else None, None, None, None, *tensors


def nf4_linear(
    x: Tensor, layers: Sequence[Layer], *, dropout_p: float = 0.0, seeds: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    """linear_group where a layer's weight may be an NF4Weight.

    Shapes, dropout and errors as in linear_group; rows of a 4-bit weight are whole bytes (D even).
    Numerics: a 4-bit weight enters as it is dequantised to x's dtype, and gets no gradient.
    Source: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314.
    """
    (x,) = autocast(x)
    tensors: list[Tensor | None] = []
    for layer in layers:
        weight, absmax, nested = operands(layer.weight)
        _check(x, layer._replace(weight=_stand_ins(x, [weight], [absmax])[0]), dropout_p)
        tensors += [weight, absmax, nested, *layer[1:4]]
    seeds = new_seeds(dropout_p, len(layers)) if seeds is None else list(seeds)
    return _NF4Linear.apply(x, [layer.scale for layer in layers], dropout_p, seeds, *tensors)
