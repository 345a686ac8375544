"""What must not change a step: how its examples are cut into micro-batches, packed and ordered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastpt.data.batches import collate
from fastpt.data.example import Example
from fastpt.objectives.base import Objective


def step(
    objective: Objective, scorer: Any, micro: Sequence[Sequence[Example]]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of a step, divided by its count as the trainer does."""
    parameters = [p for p in scorer.model.parameters() if p.requires_grad]
    total, count = torch.zeros(()), 0.0
    for p in parameters:
        p.grad = None
    for examples in micro:
        batch = collate(list(examples))
        loss, _ = objective.loss(scorer, batch)
        loss.backward()
        total, count = total + loss.detach(), count + batch.count
    return total / count, [p.grad / count for p in parameters if p.grad is not None]


def check_invariance(objective: Objective, scorer: Any, examples: list[Example]) -> None:
    """The same to 1e-5: all together, one by one, in two uneven parts, and in another order."""
    loss, gradients = step(objective, scorer, [examples])
    assert loss.isfinite()
    assert any(bool(g.any()) for g in gradients)
    for micro in ([[e] for e in examples], [examples[:1], examples[1:]], [examples[::-1]]):
        other, others = step(objective, scorer, micro)
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
        size = max(float(g.abs().max()) for g in gradients)
        for a, b in zip(others, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * size)
