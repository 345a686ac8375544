"""Held-out rows under the objective's own measures: of a run, and of a model without one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastpt import models
from fastpt.config import build
from fastpt.console import Console
from fastpt.data.feed import micro_batches
from fastpt.data.tokenised import Tokenised
from fastpt.fusion import fuse
from fastpt.objectives import make_objective
from fastpt.objectives.base import Objective, Scorer
from fastpt.preparation import examples_of, read_rows, settle_max_length
from fastpt.scorer import ModelScorer


def evaluate(model: Any, data: Any, objective: Any = "sft", **config: Any) -> dict[str, float]:
    """What an objective measures of a model on rows, as an evaluation of a training run does; nothing is trained.

    Takes what `fastpt.train` takes; the names are those of a run's metrics without "eval_". A reference is the model itself.
    Raises: ConfigError, DataError, ModelError.
    """
    settings = build({"model": model, "data": data, "objective": objective, **config})
    console = Console(quiet=settings.quiet)
    chosen, device = make_objective(settings.objective), models.choose_device(settings.device)
    dtype, _ = models.choose_precision(settings.precision, device)
    rows = read_rows(settings.data)
    loaded = models.load(
        settings.model, tokenizer=settings.tokenizer, dtype=dtype, device=device,
        trust_remote_code=settings.trust_remote_code, is_quantised=settings.method.name == "qlora", task=chosen.task,
        settings=chosen.survey(rows, None, settings.data.columns), added_tokens=settings.added_tokens,
    )  # fmt: skip
    max_length = settle_max_length(settings, loaded.model, console.say)
    chosen.attach(loaded.model, device, dtype)
    handle, scorer = fuse(loaded.model), ModelScorer(loaded.model)
    micro_tokens = settings.micro_batch_tokens or max(2048, max_length)
    try:
        examples = examples_of(rows, settings.data, chosen, loaded.tokenizer, max_length, console.say)
        chosen.enrich(scorer, examples, micro_tokens, console.say)
        found = evaluate_set(chosen, scorer, loaded.model, examples, micro_tokens)
    finally:
        if isinstance(settings.model, nn.Module):
            handle.remove()
        console.close()
    return {name.removeprefix("eval_"): value for name, value in found.items()}


@torch.no_grad()
def evaluate_set(
    objective: Objective, scorer: Scorer, model: nn.Module, data: Tokenised, micro_tokens: int
) -> dict[str, float]:
    """Metrics of a whole set, named eval_*; the model is in evaluation mode meanwhile."""
    was_training = model.training
    model.eval()
    sums: dict[str, Any] = {}
    count = 0.0
    try:
        for examples in micro_batches(data, micro_tokens):
            batch = scorer.batch(examples)
            for name, value in objective.evaluate(scorer, batch).items():
                sums[name] = sums[name] + value if name in sums else value
            count += batch.count
    finally:
        model.train(was_training)
    return {f"eval_{name}": value for name, value in objective.summarise(sums, count).items()}
