"""Run a case's call forward and backward: with our kernels, or as the plain PyTorch definition in some dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks.evidence.case import Case, Inputs

CASES = Path(__file__).parent / "cases"


def all_modules() -> list[str]:
    return [f"benchmarks.evidence.cases.{path.stem}" for path in sorted(CASES.glob("*.py")) if path.stem != "__init__"]


def cases_of(module: str) -> list[Case]:
    return import_module(module).CASES


def random(dtype: torch.dtype, seed: int = 0):
    """A `Make` of random numbers, the same in every process: rounded to dtype, so that all sides see the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int, grad: bool = False, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtype or default).requires_grad_(grad)

    default = dtype
    return make


def empty(dtype: torch.dtype):
    """A `Make` of memory that nobody touches."""

    def make(*shape: int, grad: bool = False, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype or default).requires_grad_(grad)

    default = dtype
    return make


@dataclass
class Result:
    outputs: list[Tensor]
    incoming: list[Tensor | None]  # of each output, None where it has no gradient
    gradients: list[Tensor | None]  # of each input that asks for one


def as_leaves(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """The same arguments as new leaves, floating ones cast to dtype; strides stay where nothing is cast."""

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.detach().to(dtype or tensor.dtype).requires_grad_(tensor.requires_grad)

    args, kwargs = tree_map_only(Tensor, leaf, (inputs.args, dict(inputs.kwargs)))
    return Inputs(inputs.name, args, kwargs)


def wanted(inputs: Inputs) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, lambda t: found.append(t) if t.requires_grad else None, (inputs.args, dict(inputs.kwargs)))
    return found


def forward(function: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    result = function(*inputs.args, **inputs.kwargs)
    return [t for t in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(t, Tensor)]


def random_like(outputs: list[Tensor]) -> list[Tensor | None]:
    """Incoming gradients: the same numbers in every process, in each output's dtype."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator).to(o.dtype) if o.requires_grad else None for o in outputs]


def backward(outputs: list[Tensor], inputs: Inputs, incoming: list[Tensor | None]) -> list[Tensor | None]:
    leaves = wanted(inputs)
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, incoming, strict=True) if g is not None]
    if not leaves or not pairs:
        return []
    return list(torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True))


def run(
    function: Callable[..., Any],
    inputs: Inputs,
    dtype: torch.dtype | None = None,
    incoming: list[Tensor | None] | None = None,
) -> Result:
    """Both passes; with a dtype, in it."""
    leaves = as_leaves(inputs, dtype)
    outputs = forward(function, leaves)
    incoming = random_like(outputs) if incoming is None else incoming
    return Result([o.detach() for o in outputs], incoming, backward(outputs, leaves, incoming))
