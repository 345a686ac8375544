"""An exponential moving average of the trained weights, which is evaluated, saved and delivered in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

AVERAGE, OWN = (
    "average",
    "own",
)  # names in the optimizer's state: the average, and the weights while it stands in for them


class WeightAverage:
    """Follows an optimizer: average <- decay * average + (1 - decay) * weights after each step, in float32.

    The first steps average less, with decay (1 + t) / (10 + t) while that is smaller (as TensorFlow's
    ExponentialMovingAverage), so that the start is soon forgotten. It lives in the optimizer's state, which checkpoints hold:
    4 bytes a trained parameter.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float):
        self.optimizer, self.decay = optimizer, decay
        optimizer.register_step_post_hook(self._update)

    def _states(self, group: dict[str, Any], key: str | None = None) -> list[tuple[Tensor, dict[str, Any]]]:
        """Of the parameters that were stepped, where `key` is given only those that have it."""
        states = [(p, self.optimizer.state[p]) for p in group["params"] if p in self.optimizer.state]
        return [(p, state) for p, state in states if key is None or key in state]

    @torch.no_grad()
    def _update(self, *_: Any) -> None:
        for group in self.optimizer.param_groups:
            step = group["averaged_steps"] = group.get("averaged_steps", 0) + 1
            weight = 1 - min(self.decay, (1 + step) / (10 + step))
            states = self._states(group)
            for parameter, state in states:
                if AVERAGE not in state:
                    state[AVERAGE] = state.get("master", parameter).to(torch.float32, copy=True)
            latest = [state.get("master", parameter).float() for parameter, state in states]
            if states:
                torch._foreach_lerp_([state[AVERAGE] for _, state in states], latest, weight)

    @torch.no_grad()
    def eval(self) -> None:
        """The average stands in for the weights, which the state keeps."""
        for group in self.optimizer.param_groups:
            for parameter, state in self._states(group, AVERAGE):
                if OWN not in state:
                    state[OWN] = parameter.detach().clone()
                    parameter.copy_(state[AVERAGE])

    @torch.no_grad()
    def train(self) -> None:
        """The weights themselves again."""
        for group in self.optimizer.param_groups:
            for parameter, state in self._states(group, OWN):
                parameter.copy_(state.pop(OWN))
