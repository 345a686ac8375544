"""Optimizer of a run: fastpt's AdamW, or the user's own function of the parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from fastpt.config import Config
from fastpt.errors import ConfigError
from fastpt.optim.groups import parameter_groups, peak_lr


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Raises: ConfigError when nothing is trained, or when the user's function returns no torch optimizer."""
    groups = parameter_groups(model, config)
    if not groups:
        raise ConfigError(
            f"method {config.method.name!r} leaves nothing to train; check method.targets and method.train"
        )
    optim = config.optim
    if callable(optim.name):
        made = optim.name(groups)
        if not isinstance(made, torch.optim.Optimizer):
            raise ConfigError(f"optim: {optim.name} returned a {type(made).__name__}, not a torch.optim.Optimizer")
        return made
    from fastpt.optim.adamw import AdamW

    return AdamW(
        groups, lr=peak_lr(config), betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay,
        rounding_seed=config.seed if optim.rounding == "stochastic" else None,
    )  # fmt: skip
