"""Optimizers: fastpt's AdamW, which any trainer can use, and what a run is configured to take."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from fastpt.config import Config
from fastpt.errors import ConfigError
from fastpt.optim.adamw import AdamW
from fastpt.optim.averaging import WeightAverage
from fastpt.optim.groups import parameter_groups, peak_lr
from fastpt.optim.in_backward import StepInBackward
from fastpt.optim.others import OTHERS
from fastpt.optim.start import PullToStart

__all__ = ["AdamW", "PullToStart", "StepInBackward", "clipped_step", "make_optimizer", "weights_for"]


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Raises: ConfigError when nothing is trained, or when the user's function returns no torch optimizer."""
    made = _optimizer(model, config)
    if config.optim.ema is not None:
        made.average = WeightAverage(made, config.optim.ema)  # type: ignore[attr-defined]
    return made


def _optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
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
    if optim.name in OTHERS:
        narrow = next((p for group in groups for p in group["params"] if p.dtype != torch.float32), None)
        if narrow is not None:
            raise ConfigError(
                f'optim.name "{optim.name}" keeps no float32 masters, and weights of this run are {narrow.dtype}: '
                'set precision="fp32", or take "adamw" or "adamw_8bit"'
            )
        return OTHERS[optim.name](groups, peak_lr(config), optim)
    made = AdamW(
        groups, lr=peak_lr(config), betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay,
        rounding_seed=config.seed if optim.rounding == "stochastic" else None,
        bits=8 if optim.name == "adamw_8bit" else 32,
    )  # fmt: skip
    made.allocate()
    return made


def clipped_step(optimizer: torch.optim.Optimizer, scale: float, grad_norm: float, clip: float | None) -> None:
    """One step with the gradients scaled (divided by the token count) and clipped in a single factor, and then dropped."""
    if clip is not None and grad_norm > clip:
        scale *= clip / grad_norm
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if parameters:
        factor = torch.tensor(scale, dtype=torch.float32, device=parameters[0].device)
        if getattr(optimizer, "takes_grad_scale", False):
            optimizer.step(grad_scale=factor)  # type: ignore[call-arg]
        else:
            torch._foreach_mul_([p.grad for p in parameters], factor)
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def weights_for(optimizer: torch.optim.Optimizer, mode: Literal["train", "eval"]) -> None:
    """What is evaluated is not what is trained with a schedule-free optimizer or an average of the weights: here they swap."""
    for one in (optimizer, getattr(optimizer, "average", None)):
        getattr(one, mode, lambda: None)()
