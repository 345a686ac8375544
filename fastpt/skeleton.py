"""A model in full depth for the memory of a layer or two: weights are zeros that nobody has touched, or shared by all layers.

It is built from the config alone by the model's own code, adapted and fused like the real one; nothing computes with it but what
recognises its parts.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastpt.adapters import apply_method
from fastpt.config import MethodConfig
from fastpt.fusion import fuse
from fastpt.models import quantised_in_place
from fastpt.nf4 import layers_of

_RANDOM = {"normal_", "uniform_", "random_", "bernoulli_", "trunc_normal_", "erfinv_", "clamp_", "mul_", "add_"}


def skeleton(
    config: Any, method: MethodConfig, dtype: torch.dtype, *, is_fused: bool = True, cls: Any = None,
    is_quantised: bool = False,
) -> nn.Module:  # fmt: skip
    """The model of a transformers config, adapted, fused and in train mode, as it would be before its first step."""
    from transformers import AutoModelForCausalLM

    whole = config.get_text_config()
    layers, kinds = whole.num_hidden_layers, getattr(whole, "layer_types", None)
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    text = config.get_text_config()
    built = max(kinds.index(kind) for kind in set(kinds)) + 1 if kinds else 1
    _set_depth(text, built, kinds)
    with _Uninitialised():
        make = AutoModelForCausalLM.from_config if cls is None else cls._from_config
        model = make(config, dtype=dtype)
    _fill(model)
    if is_quantised:
        quantised_in_place(model)
    model = apply_method(model, method)
    if is_fused:
        fuse(model)
    _deepen(model, layers, kinds, built)
    _set_depth(text, layers, kinds)
    return model.train()


def _set_depth(config: Any, layers: int, kinds: list[str] | None) -> None:
    if kinds:
        config.layer_types = kinds[:layers]
    config.num_hidden_layers = layers


class _Uninitialised(TorchDispatchMode):
    """Parameters keep the untouched memory that they were given: what would draw them is left out."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.split("::")[-1] in _RANDOM and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


def _layers_of(model: nn.Module) -> nn.ModuleList:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return next(
        m for m in model.modules() if isinstance(m, nn.ModuleList) and isinstance(m[0], GradientCheckpointingLayer)
    )


def _fill(model: nn.Module) -> None:
    """Small numbers in the layers and the norms, which fusing probes; untouched zeros elsewhere."""
    inside = {id(p) for p in _layers_of(model).parameters()}
    pattern = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        if id(parameter) not in inside and parameter.dim() > 1:
            parameter.data = untouched(parameter.shape, parameter.dtype)
            continue
        numbers = pattern.to(parameter.dtype)
        for part in parameter.data.view(-1).split(len(pattern)):
            part.copy_(numbers[: len(part)])


def untouched(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros that the system has promised and not yet given (torch.zeros writes them)."""
    return torch.from_numpy(np.zeros(shape.numel() * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _deepen(model: nn.Module, layers: int, kinds: list[str] | None, built: int) -> None:
    stack = _layers_of(model)
    for i in range(built, layers):
        stack.append(_twin(stack[kinds.index(kinds[i]) if kinds else 0]))


def _twin(layer: nn.Module) -> nn.Module:
    """A copy with parameters of its own on the same memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data, p.requires_grad) for p in layer.parameters()}
    memo |= {id(b): b for b in layer.buffers()}
    memo |= {id(t): t for _, quantised in layers_of(layer) for t in (quantised.absmax, quantised.nested)}
    return copy.deepcopy(layer, memo)
