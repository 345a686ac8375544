"""A mixture's experts through grouped_linear: a function in transformers' table of experts, and PEFT's adapters on them.

PEFT puts LoRA on the stacked parameters by modules wrapped around the experts, which add B A to all of W in every forward;
here the adapters stay apart from W.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.integrations import moe

from fastpt.fusion.attention import NAME
from fastpt.fusion.patch import Patch
from fastpt.fusion.projection import NotFusable, check_untouched
from fastpt.fusion.recognise import activation_of
from fastpt.ops import embedding, swiglu
from fastpt.ops.grouped_linear import Routing, grouped_linear

FLAGS = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")  # set by transformers' decorator
_known_activations: dict[type, bool] = {}


class Adapter(NamedTuple):
    """LoRA on one stacked parameter."""

    lora_a: Tensor  # [E, R, D]
    lora_b: Tensor  # [E, O, R]
    scale: float


def looks_like_experts(module: nn.Module) -> bool:
    """Whether a module holds its experts stacked and finds its forward in transformers' table."""
    return all(hasattr(module, flag) for flag in FLAGS) and "down_proj" in module._parameters


def check_experts(module: Any) -> None:
    """Raise NotFusable with what grouped_linear does not serve."""
    check_untouched(module, "experts")
    for name in _projections(module):
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.dim() != 3 or weight.is_meta or not weight.is_floating_point():
            raise NotFusable(f"{name} is no stack of matrices")
        if weight.element_size() == 1:
            raise NotFusable(f"{name} is {weight.dtype}")
    if getattr(module, "_is_expert_parallel", False):
        raise NotFusable("its experts are spread over several devices")


def _projections(module: Any) -> tuple[str, str]:
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of a module of stacked experts: hidden_states [T, D], top_k_index and top_k_weights [T, k] -> [T, D]."""
    return _mixture(self, hidden_states, top_k_index, top_k_weights, {})


def _mixture(module: Any, x: Tensor, experts: Tensor, weights: Tensor, adapters: dict[str, Adapter]) -> Tensor:
    routing = Routing(experts, module.num_experts)
    first, last = _projections(module)
    hidden = _linear(module, first, routing.dispatch(x), routing, adapters)
    y = _linear(module, last, _activated(module, hidden), routing, adapters)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    return routing.combine(y, weights).to(x.dtype)


def _linear(module: Any, name: str, x: Tensor, routing: Routing, adapters: dict[str, Adapter]) -> Tensor:
    weight = getattr(module, name)
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)
    y = grouped_linear(x, routing.offsets, weight.mT if module.is_transposed else weight, *adapters.get(name, ()))
    return y + embedding(routing.expert_of_row, getattr(module, f"{name}_bias")) if module.has_bias else y


def _activated(module: Any, hidden: Tensor) -> Tensor:
    if not module.has_gate:
        return module.act_fn(hidden)
    if is_swiglu(module):
        return swiglu(*hidden.chunk(2, -1))
    return module._apply_gate(hidden)


def is_swiglu(module: Any) -> bool:
    """Whether the gate is transformers' own, silu(first half) * second half: of the activation by a probe."""
    if type(module)._apply_gate is not moe._default_apply_gate:
        return False
    kind = type(module.act_fn)
    if kind not in _known_activations:
        _known_activations[kind] = activation_of(module.act_fn) == "silu"
    return _known_activations[kind]


def innermost(module: Any) -> tuple[Any, list[Any]]:
    """The module under PEFT's wrappers of parameters, and the wrappers from the outside in."""
    wrappers = []
    while hasattr(module, "parameter_name") and hasattr(module, "base_layer"):
        wrappers.append(module)
        module = module.base_layer
    return module, wrappers


def adapters_of(experts: Any, wrappers: list[Any]) -> dict[str, Adapter]:
    """The active adapter of each stacked parameter, read now; raises NotFusable where PEFT's own code must run."""
    check_experts(experts)
    found: dict[str, Adapter] = {}
    for depth, wrapper in enumerate(wrappers):
        if depth > 0:
            check_untouched(wrapper, wrapper.parameter_name)
        if wrapper.disable_adapters or wrapper.merged:
            if wrapper.disable_adapters and wrapper.merged:
                raise NotFusable("adapters are merged and disabled")
            continue
        active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
        if not active:
            continue
        name, weight = wrapper.parameter_name, getattr(experts, wrapper.parameter_name)
        if len(active) > 1 or name in found:
            raise NotFusable("several active adapters on the experts")
        if name not in _projections(experts):
            raise NotFusable(f"an adapter on {name}")
        found[name] = _adapter(wrapper, active[0], experts.num_experts)
        out, width = weight.shape[1:] if not experts.is_transposed else weight.shape[:0:-1]
        if found[name].lora_a.shape[::2] != (len(weight), width) or found[name].lora_b.shape[:2] != (len(weight), out):
            raise NotFusable(f"an adapter of another shape on {name}")
    return found


def _adapter(wrapper: Any, name: str, experts: int) -> Adapter:
    """PEFT's stacks: A's rows by expert, then rank; B's columns by rank, then expert."""
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    lora_b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    return Adapter(a.reshape(experts, -1, a.shape[1]), lora_b, float(wrapper.scaling[name]))


def wrapper_forward(patch: Patch) -> Any:
    """A forward for PEFT's outermost wrapper of the parameters of one module of experts."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        experts, wrappers = innermost(self)
        try:
            if not patch.is_active or kwargs or len(args) != 3:
                raise NotFusable("called with other arguments")
            if parametrize.is_parametrized(experts):
                raise NotFusable("its parameters are parametrised")
            adapters = adapters_of(experts, wrappers)
        except NotFusable as reason:
            patch.fallback = str(reason)
            return patch.below(self, *args, **kwargs)
        patch.fallback = None
        return _mixture(experts, *args, adapters)

    return forward


def register() -> None:
    """Put "fastpt" into transformers' table of experts functions."""
    moe.ExpertsInterface.register(NAME, experts_forward)
