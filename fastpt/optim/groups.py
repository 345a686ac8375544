"""Parameter groups: no decay where decay hurts, a larger rate for B under LoRA+."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastpt.adapters import ADAPTERS
from fastpt.config import Config


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Groups of the trained parameters, each with `params`, `names`, `lr` and `weight_decay`.

    Vectors (norms, biases, DoRA magnitudes) are not decayed. LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354)
    multiplies the learning rate of every lora_B by `method.lora_plus`.
    """
    lr = peak_lr(config)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_b = ".lora_B." in name or ".lora_embedding_B." in name
        rate = lr * config.method.lora_plus if is_b and config.method.lora_plus else lr
        decay = config.optim.weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault(
            (rate, decay), {"params": [], "names": [], "lr": rate, "initial_lr": rate, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def peak_lr(config: Config) -> float:
    """The configured peak learning rate, or the default of the method: 2e-4 for adapters, 2e-5 otherwise."""
    if config.optim.lr is not None:
        return config.optim.lr
    return 2e-4 if config.method.name in ADAPTERS else 2e-5
