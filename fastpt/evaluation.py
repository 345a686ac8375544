"""The held-out rows under the objective's own measures."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastpt.data.batches import collate
from fastpt.data.feed import micro_batches
from fastpt.data.tokenised import Tokenised
from fastpt.objectives.base import Objective, Scorer


@torch.no_grad()
def evaluate(
    objective: Objective, scorer: Scorer, model: nn.Module, data: Tokenised, micro_tokens: int, device: torch.device
) -> dict[str, float]:
    """Metrics of a whole set, named eval_*; the model is in evaluation mode meanwhile."""
    was_training = model.training
    model.eval()
    sums: dict[str, Any] = {}
    count = 0.0
    try:
        for examples in micro_batches(data, micro_tokens):
            batch = collate(examples).to(device)
            for name, value in objective.evaluate(scorer, batch).items():
                sums[name] = sums[name] + value if name in sums else value
            count += batch.count
    finally:
        model.train(was_training)
    return {f"eval_{name}": value for name, value in objective.summarise(sums, count).items()}
