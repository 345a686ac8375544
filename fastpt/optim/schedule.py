"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from fastpt.config import OptimConfig


def warmup_steps(optim: OptimConfig, total: int) -> int:
    """Steps of linear warm-up: `warmup` itself from 1 on, below 1 a share of `total`."""
    return round(optim.warmup) if optim.warmup >= 1 else math.ceil(optim.warmup * total)


def lr_scale(optim: OptimConfig, step: int, total: int) -> float:
    """What the peak learning rate is multiplied by at `step` (0-based) of `total`.

    cosine and linear fall from 1 to min_lr over the steps after the warm-up; wsd stays at 1 and falls linearly over the
    last tenth (Hu et al. 2024, https://arxiv.org/abs/2404.06395); constant stays.
    """
    warmup = warmup_steps(optim, total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "cosine":
        falling = 0.5 * (1 + math.cos(math.pi * progress))
    elif optim.schedule == "linear":
        falling = 1 - progress
    else:
        falling = min(1.0, (1 - progress) / 0.1)
    return optim.min_lr + (1 - optim.min_lr) * falling
