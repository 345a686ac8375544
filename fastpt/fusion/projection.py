"""What a projection computes right now: nn.Linear or a PEFT LoRA layer read at call time, so PEFT stays the owner.

Whatever else it is (quantised, several adapters, other tuners) is called as the module it is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as module_state

from fastpt.ops import lora_linear


class NotFusable(Exception):
    """Why a part runs its original forward; the message is what `explain` prints."""


def check_untouched(module: nn.Module, path: str) -> None:
    """Raise NotFusable when calling `module` does more than its class's forward: a hook, or a forward of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) and any(not _is_capture(hook) for found in hooks for hook in found.values()):
        raise NotFusable(f"hook on {path}")
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
    """y = x Wᵀ + b + scale · dropout(x) Aᵀ Bᵀ, with DoRA's magnitude when given; or `module`, called as it is."""

    weight: Tensor | None = None  # [O, D]
    bias: Tensor | None = None  # [O]
    lora_a: Tensor | None = None  # [R, D]
    lora_b: Tensor | None = None  # [O, R]
    scale: float = 1.0
    dropout_p: float = 0.0
    magnitude: Tensor | None = None  # [O]
    module: nn.Module | None = None

    def __call__(self, x: Tensor) -> Tensor:  # [..., D] -> [..., O]
        if self.module is not None:
            return self.module(x)
        weight, bias = self.weight, self.bias
        assert weight is not None
        if self.lora_a is None:
            return F.linear(x, weight, bias)
        assert self.lora_b is not None
        return lora_linear(
            x, weight, bias, self.lora_a, self.lora_b, self.scale, dropout_p=self.dropout_p, magnitude=self.magnitude
        )

    @classmethod
    def read(cls, module: nn.Module, path: str) -> Projection:
        """The state of `module` at this moment; raises NotFusable when someone hooked into it."""
        module = unwrapped(module)
        check_untouched(module, path)
        if _is_plain(module):
            return cls(module.weight, module.bias)  # type: ignore[arg-type]
        lora = sys.modules.get("peft.tuners.lora.layer")
        if lora is None or type(module) is not lora.Linear:
            return cls(module=module)
        return cls._read_lora(module, path) or cls(module=module)

    @classmethod
    def _read_lora(cls, layer: Any, path: str) -> Projection | None:
        base = layer.base_layer
        if not _is_plain(base) or layer.fan_in_fan_out:
            return None
        check_untouched(base, f"{path}.base_layer")
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if layer.disable_adapters and layer.merged:
            return None  # PEFT unmerges inside its forward
        if layer.disable_adapters or layer.merged or not active:
            return cls(base.weight, base.bias)
        name = active[0]
        a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        for part in (a, b, dropout):
            check_untouched(part, f"{path}'s adapter")
        is_plain = _is_plain(a) and _is_plain(b) and a.bias is None and b.bias is None
        if len(active) > 1 or not is_plain or type(dropout) not in (nn.Identity, nn.Dropout):
            return None
        dropout_p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        magnitude = None
        if (variant := getattr(layer, "lora_variant", {}).get(name)) is not None:
            if type(variant).__name__ != "DoraLinearVariant" or dropout_p > 0:
                return None  # PEFT drops DoRA's input before both terms
            magnitude = layer.lora_magnitude_vector[name].weight
        return cls(base.weight, base.bias, a.weight, b.weight, layer.scaling[name], dropout_p, magnitude)


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


def out_features(module: nn.Module) -> int:
    """Columns that a projection makes; 0 when it does not say."""
    return int(getattr(unwrapped(module), "out_features", 0))
