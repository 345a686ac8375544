"""After a step that was not finite: which rows did it."""

from __future__ import annotations

from typing import Any

import torch

from fastpt.data.example import Example
from fastpt.objectives.base import Objective, Scorer


def non_finite_rows(objective: Objective, scorer: Scorer, examples: list[Example], parameters: list[Any]) -> list[str]:
    """The places of the examples whose own loss or gradient is not finite; gradients are left cleared.

    Runs each example of the step alone, so it costs about one step; it is called only after a step has failed.
    """
    guilty = []
    for example in examples:
        loss, _ = objective.loss(scorer, scorer.batch([example]))
        bad = not bool(torch.isfinite(loss))
        if not bad:
            loss.backward()
            bad = any(p.grad is not None and not bool(torch.isfinite(p.grad).all()) for p in parameters)
        for parameter in parameters:
            parameter.grad = None
        if bad:
            guilty.append(example.place)
    return guilty
