"""A pull towards the weights that training began with, against forgetting (L2-SP, Li et al. 2018, https://arxiv.org/abs/1802.01483)."""

from __future__ import annotations

import torch
from torch import Tensor


class PullToStart:
    """The gradient of strength / 2 * |w - w_start|^2; it takes a copy of the trained parameters, in their dtype."""

    def __init__(self, optimizer: torch.optim.Optimizer, strength: float):
        self.optimizer, self.strength = optimizer, strength
        self.start = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}

    @torch.no_grad()
    def add_to_gradients(self, count: float) -> None:
        """Of a step whose gradients are still sums, to be divided by `count`."""
        for parameter, start in self.start.items():
            if parameter.grad is not None:
                now: Tensor = self.optimizer.state[parameter].get("master", parameter)
                parameter.grad.add_(now.to(parameter.grad.dtype) - start, alpha=self.strength * count)
