"""What a projection computes right now: nn.Linear or a PEFT LoRA layer read at call time, so PEFT stays the owner.

Weights may be NF4, our own or bitsandbytes'. Whatever else it is (other quantisations, other tuners) only its module can
compute, and what holds it stays unfused.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_state

from fastpt.nf4 import weight_of
from fastpt.ops import Layer, NF4Weight
from fastpt.ops.lora_linear import with_magnitude


class NotFusable(Exception):
    """Why a part runs its original forward; the message is what `explain` prints."""


def check_unhooked(module: nn.Module, path: str) -> None:
    """Raise NotFusable when someone hooked into calls of `module`."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) and any(not _is_capture(hook) for found in hooks for hook in found.values()):
        raise NotFusable(f"hook on {path}")


def check_untouched(module: nn.Module, path: str) -> None:
    """Raise NotFusable when calling `module` does more than its class's forward: a hook, or a forward of its own."""
    check_unhooked(module, path)
    if "forward" in module.__dict__:
        raise NotFusable(f"{path} has a forward of its own")


def check_no_global_hooks() -> None:
    """Raise NotFusable while hooks for every module are set."""
    if module_state._global_forward_hooks or module_state._global_forward_pre_hooks:
        raise NotFusable("global module hooks are set")
    if module_state._global_backward_hooks or module_state._global_backward_pre_hooks:
        raise NotFusable("global module hooks are set")


def _is_capture(hook: Any) -> bool:
    """transformers' own recorder of outputs, inert until outputs are asked for (which the block checks itself)."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


@dataclass(frozen=True, eq=False)
class Projection:
    """y = x Wᵀ + b + scale · dropout(x) Aᵀ Bᵀ, with DoRA's magnitude when given."""

    weight: Any  # Tensor [O, D], or an NF4Weight
    bias: Tensor | None = None  # [O]
    lora_a: Tensor | None = None  # [R, D]
    lora_b: Tensor | None = None  # [O, R]
    scale: float = 1.0
    dropout_p: float = 0.0
    magnitude: Tensor | None = None  # [O]

    def layer(self, dtype: torch.dtype) -> Layer:
        """The projection as the linear op takes it, for products in `dtype`."""
        layer = Layer(self.weight, self.bias, self.lora_a, self.lora_b, self.scale)
        return layer if self.magnitude is None else with_magnitude(layer, self.magnitude, dtype)

    @classmethod
    def read(cls, module: nn.Module, path: str) -> Projection:
        """The state of `module` at this moment; raises NotFusable when only calling it is right."""
        module = unwrapped(module)
        if (rows := trained_rows(module)) is not None:
            return cls._read_rows(*rows, path)
        check_untouched(module, path)
        if (weight := _base_weight(module)) is not None:
            return cls(weight, module.bias)  # type: ignore[arg-type]
        if type(module) not in _lora_kinds():
            raise NotFusable(f"{path} is a {type(module).__name__}")
        return cls._read_lora(module, path)

    @classmethod
    def _read_rows(cls, base: nn.Module, ids: Tensor, values: Tensor, path: str) -> Projection:
        """A head some of whose rows are trained: its weight with these in it, through which their gradient comes."""
        if not _is_plain(base) or base.bias is not None:
            raise NotFusable(f"{path} has trained rows over a {type(base).__name__}")
        return cls(base.weight.index_copy(0, ids, values.to(base.weight)))  # type: ignore[operator, arg-type]

    @classmethod
    def _read_lora(cls, layer: Any, path: str) -> Projection:
        base = layer.base_layer
        weight = _base_weight(base)
        if weight is None or layer.fan_in_fan_out:
            raise NotFusable(f"{path} is a LoRA layer over a {type(base).__name__}")
        check_untouched(base, f"{path}.base_layer")
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if layer.disable_adapters and layer.merged:
            raise NotFusable(f"{path} is merged and disabled, which PEFT undoes in its forward")
        if layer.disable_adapters or layer.merged or not active:
            return cls(weight, base.bias)
        adapters = [_read_adapter(layer, name, path) for name in active]
        if isinstance(weight, NF4Weight) and any(magnitude is not None for *_, magnitude in adapters):
            raise NotFusable(f"{path} has DoRA over a 4-bit weight")
        if len(active) == 1:
            return cls(weight, base.bias, *adapters[0])
        if any(dropout_p > 0 or magnitude is not None for *_, dropout_p, magnitude in adapters):
            raise NotFusable(f"{path} adds up adapters with dropout or DoRA")
        lora_a = torch.cat([a for a, *_ in adapters])
        return cls(weight, base.bias, lora_a, torch.cat([b * scale for _, b, scale, *_ in adapters], dim=1))


def _read_adapter(layer: Any, name: str, path: str) -> tuple[Tensor, Tensor, float, float, Tensor | None]:
    """(a, b, scale, dropout_p, magnitude) of one adapter of a LoRA layer."""
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    for part in (a, b, dropout):
        check_untouched(part, f"{path}'s adapter")
    is_plain = _is_plain(a) and _is_plain(b) and a.bias is None and b.bias is None
    if not is_plain or type(dropout) not in (nn.Identity, nn.Dropout):
        raise NotFusable(f"{path} has an adapter of {type(a).__name__} and {type(dropout).__name__}")
    dropout_p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    magnitude = None
    if (variant := getattr(layer, "lora_variant", {}).get(name)) is not None:
        if type(variant).__name__ != "DoraLinearVariant" or dropout_p > 0:
            raise NotFusable(f"{path} has a {type(variant).__name__} or drops DoRA's input, which only PEFT does")
        magnitude = layer.lora_magnitude_vector[name].weight
    return a.weight, b.weight, layer.scaling[name], dropout_p, magnitude


def _lora_kinds() -> tuple[type, ...]:
    """PEFT's LoRA layers over linear ones, as far as they are imported."""
    modules = (sys.modules.get("peft.tuners.lora.layer"), sys.modules.get("peft.tuners.lora.bnb"))
    names = ("Linear", "Linear4bit")
    return tuple(kind for module, name in zip(modules, names, strict=True) if (kind := getattr(module, name, None)))


def _base_weight(module: nn.Module) -> Any:
    """The weight of a plain linear layer, or of one on a 4-bit weight whose rows are whole bytes; None for anything else."""
    if _is_plain(module):
        return module.weight
    weight = weight_of(module)
    return None if weight is None or weight.shape[1] % 2 else weight


def _is_plain(module: nn.Module) -> bool:
    """A torch Linear whose weight is an ordinary tensor (not quantised, not distributed)."""
    return type(module) is nn.Linear and type(module.weight) in (nn.Parameter, Tensor)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that PEFT's ModulesToSaveWrapper forwards to, or `module` itself."""
    other = sys.modules.get("peft.utils.other")
    if other is None or type(module) is not other.ModulesToSaveWrapper:
        return module
    state: Any = module
    if state.disable_adapters or not state.active_adapters:
        return state.original_module
    return state.modules_to_save[state.active_adapters[0]]


def trained_rows(module: nn.Module) -> tuple[nn.Module, Tensor, Tensor] | None:
    """(layer below, ids [N], rows [N, D]) of PEFT's TrainableTokensWrapper; None for anything else, merged or switched off."""
    other = sys.modules.get("peft.utils.other")
    if other is None or type(module) is not other.TrainableTokensWrapper:
        return None
    layer: Any = module.token_adapter
    active = [name for name in layer.active_adapters if name in layer.trainable_tokens_delta]
    if layer.disable_adapters or layer.merged or len(active) != 1:
        return None
    values = layer.trainable_tokens_delta[active[0]]
    return layer.base_layer, torch.tensor(layer.token_indices[active[0]], device=values.device), values


def out_features(module: nn.Module) -> int:
    """Columns that a projection makes; 0 when it does not say."""
    return int(getattr(unwrapped(module), "out_features", 0))
