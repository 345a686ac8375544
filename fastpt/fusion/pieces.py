"""What fused blocks are made of: norms and groups of linear layers, each with its backward, on the raw ops.

A piece is a NamedTuple of tensors and options, read from the modules on every call. Its gradient is a piece of the same
form, so a whole block can be flattened into the arguments of one autograd.Function and its gradients flattened alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpt.ops import Layer

raw = torch.ops.fastpt


class Norm(NamedTuple):
    """An RMS norm with its family's rounding."""

    weight: Tensor  # [D]
    eps: float
    offset: float
    casts_first: bool

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """norm(x) in x's dtype, and 1 / rms(x) for backward."""
        return raw.rms_norm(x, self.weight, self.eps, self.offset, self.casts_first)

    def add_forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(norm(s), s, 1 / rms(s)) of s = x + residual, in the wider of their dtypes."""
        dtype = torch.promote_types(x.dtype, residual.dtype)
        return raw.add_rms_norm(x.to(dtype), residual.to(dtype), self.weight, self.eps, self.offset, self.casts_first)

    def backward(
        self, dy: Tensor, x: Tensor, rstd: Tensor, wants: Norm, grad_sum: Tensor | None = None
    ) -> tuple[Tensor, Norm]:
        """dx (plus grad_sum, another gradient of x) and the norm's own gradient."""
        wants_weight = bool(wants.weight)
        dx, dweight = raw.rms_norm_backward(dy.to(x.dtype), grad_sum, x, rstd, self.weight, self.offset, wants_weight)
        return dx, Norm(dweight if wants_weight else None, None, None, None)  # type: ignore[arg-type]


class Linears(NamedTuple):
    """Linear layers of one input, with or without adapters."""

    layers: tuple[Layer, ...]
    dropout_p: float = 0.0
    seeds: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs, and the low-rank hiddens that backward needs."""
        weights, biases, lora_a, lora_b, scales = zip(*self.layers, strict=True)
        return raw.lora_linear(x, weights, biases, lora_a, lora_b, scales, self.dropout_p, self.seeds)

    def backward(
        self, grads: Sequence[Tensor], x: Tensor, low: Sequence[Tensor], wants: Linears, wants_x: bool = True
    ) -> tuple[Tensor, Linears]:
        """dx (empty when not wanted) and the layers' gradients."""
        weights, _, lora_a, lora_b, scales = zip(*self.layers, strict=True)
        flags = [bool(wanted) for layer in wants.layers for wanted in layer[:4]]
        dx, *found = raw.lora_linear_backward(
            grads, x, weights, lora_a, lora_b, low, scales, self.dropout_p, self.seeds, wants_x, flags
        )
        layers = tuple(
            Layer(*(found[kind][i] if flags[4 * i + kind] else None for kind in range(4)), None)  # type: ignore
            for i in range(len(self.layers))
        )
        return dx, Linears(layers, None, (None,) * len(self.seeds))  # type: ignore[arg-type]


class Activation(NamedTuple):
    """A gated activation: one of ACTIVATIONS."""

    name: str

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.name == "silu":
            return raw.swiglu(gate, up)
        return raw.geglu(gate, up, APPROXIMATIONS[self.name])

    def backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        if self.name == "silu":
            return raw.swiglu_backward(grad, gate, up)
        return raw.geglu_backward(grad, gate, up, APPROXIMATIONS[self.name])


APPROXIMATIONS = {"gelu_tanh": "tanh", "gelu": "none"}


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of matrix products on activations of `dtype`: autocast's where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype
