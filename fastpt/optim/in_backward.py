"""Optimizer steps inside backward: a parameter is updated as soon as its gradient is there, which is then dropped.

The gradients of a model never exist all at once. What needs them all, clipping by their norm and adding up several
micro-batches, cannot be had with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpt import ops
from fastpt.errors import ConfigError
from fastpt.optim.adamw import AdamW


class StepInBackward:
    """Hooks on the parameters of an AdamW that step it. A gradient that is not finite is dropped and its tensor skipped."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        if not isinstance(optimizer, AdamW):
            raise ConfigError(
                f"optim.in_backward needs an optimizer that can step one parameter: adamw or adamw_8bit, not "
                f"{type(optimizer).__name__}"
            )
        self.optimizer = optimizer
        self._scale: Tensor | None = None
        self._squares: list[Tensor] = []
        self._skipped: list[str] = []
        self._handles = []
        for group in optimizer.param_groups:
            names = group.get("names") or [f"parameter {i}" for i in range(len(group["params"]))]
            for name, parameter in zip(names, group["params"], strict=True):
                hook = parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._step(name, p))
                self._handles.append(hook)

    def begin(self, *, micro_batches: int = 1, count: float = 1.0) -> None:
        """Before the backward of a step: its gradients are divided by `count`.

        Raises: ConfigError when the step has more micro-batches than this one.
        """
        if micro_batches > 1:
            raise ConfigError(
                f"optim.in_backward updates as each gradient is ready, so it cannot add up the {micro_batches} "
                "micro-batches of a step: raise micro_batch_tokens, or lower batch_tokens or batch_rows"
            )
        self._scale = torch.tensor(1.0 / max(count, 1e-12))
        self._squares, self._skipped = [], []

    def norm(self) -> Tensor:
        """The norm of the gradients of the last backward, before they were divided; not finite where one was not."""
        return torch.stack(self._squares).sum().sqrt().float() if self._squares else torch.zeros(())

    def skipped(self) -> dict[str, Any]:
        """For the record of the step: nothing, or which parameters' gradients were not finite and changed nothing."""
        return {"skipped": True, "skipped_parameters": self._skipped} if self._skipped else {}

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _step(self, name: str, parameter: Tensor) -> None:
        norm = ops.grad_norm([parameter.grad])  # type: ignore[list-item]
        self._squares.append(norm.double().square())
        if norm.isfinite():  # on a GPU a wait for each tensor: the price of not spoiling its moments
            self.optimizer.step_one(parameter, grad_scale=self._scale)
        else:
            self._skipped.append(name)
        parameter.grad = None
