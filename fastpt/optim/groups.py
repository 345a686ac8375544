"""Parameter groups: no decay where decay hurts, a larger rate for B under LoRA+, smaller ones for the lower layers."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fastpt.adapters import ADAPTERS
from fastpt.config import Config


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Groups of the trained parameters, each with `params`, `names`, `lr` and `weight_decay`.

    Vectors (norms, biases, DoRA magnitudes) are not decayed. LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354)
    multiplies the learning rate of every lora_B by `method.lora_plus`. `optim.layer_decay` multiplies it once for each layer
    above (ULMFiT, Howard & Ruder 2018, https://arxiv.org/abs/1801.06146; ELECTRA's form): the head has the full rate.
    """
    lr, above = peak_lr(config), layers_above(model)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_b = ".lora_B." in name or ".lora_embedding_B." in name
        rate = lr * config.method.lora_plus if is_b and config.method.lora_plus else lr
        rate *= config.optim.layer_decay ** above[name]
        decay = config.optim.weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault(
            (rate, decay), {"params": [], "names": [], "lr": rate, "initial_lr": rate, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def layers_above(model: nn.Module) -> dict[str, int]:
    """Of each parameter by name: 0 behind the last layer of its stack, 1 in that layer, and most before the first one."""
    found: dict[str, tuple[str, int] | None] = {}
    for name, _ in model.named_parameters():
        match = re.search(r"^(.*?\b(?:layers?|h|blocks?))\.(\d+)\.", name)
        found[name] = (match[1], int(match[2])) if match else None
    depth: dict[str, int] = {}
    for place in filter(None, found.values()):
        depth[place[0]] = max(depth.get(place[0], 0), place[1] + 1)
    first = next((i for i, place in enumerate(found.values()) if place), len(found))
    before = max(depth.values(), default=0) + 1
    return {
        name: depth[place[0]] - place[1] if place else before if depth and i < first else 0
        for i, (name, place) in enumerate(found.items())
    }


def peak_lr(config: Config) -> float:
    """The configured peak learning rate, or the default of the method: 2e-4 for adapters, 2e-5 otherwise."""
    if config.optim.lr is not None:
        return config.optim.lr
    return 2e-4 if config.method.name in ADAPTERS else 2e-5
