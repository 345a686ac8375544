"""Direct preference optimisation, the whole family: what is preferred becomes likelier than what is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from fastpt.data.batches import Batch
from fastpt.data.example import Example
from fastpt.data.pairs import pair_example, pair_format
from fastpt.data.tokenised import Tokenised
from fastpt.objectives._preference_losses import LOSSES, REFERENCE_FREE, Options, Pairs
from fastpt.objectives._reference import answers_logprobs, keep_reference, reference_logprobs
from fastpt.objectives.base import Objective, Prepare, Scorer


class DPO(Objective):
    """Rows have `prompt`, `chosen` and `rejected`. The reference is the model as it was before training.

    A fresh adapter is switched off for it; else its log-probabilities are computed once, before the first step.
    """

    name: Literal["dpo"] = "dpo"  # type: ignore[assignment]
    loss_type: list[str] = Field(["sigmoid"], description="one of the losses or several: " + ", ".join(LOSSES))
    loss_weights: list[float] | None = Field(None, description="weight of each loss (default: 1)")
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of labels that may be wrong")
    gamma: float = Field(0.5, ge=0, description="margin of simpo")
    tau: float = Field(0.05, gt=0, description="temperature of discopop")

    @field_validator("loss_type", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        for name in names:
            if name not in LOSSES:
                raise ValueError(f"{name!r} is not a loss; there are {', '.join(LOSSES)}")
        return names

    @model_validator(mode="after")
    def _fits(self) -> DPO:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"loss_weights has {len(self.loss_weights)} values for {len(self.loss_type)} losses")
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise ValueError("exo_pair needs label_smoothing above 0, such as 1e-3")
        return self

    @property
    def needs_reference(self) -> bool:
        return not set(self.loss_type) <= set(REFERENCE_FREE)

    def bind(self, tokenizer: Any, rows: Any, columns: dict[str, str] | None) -> Prepare:
        row_format = pair_format(columns)

        def prepare(row: dict[str, Any], place: str) -> list[Example]:
            return [pair_example(tokenizer, row, place, row_format)]

        return prepare

    def enrich(self, model: Scorer, data: Tokenised, micro_tokens: int, say: Callable[[str], None]) -> None:
        if self.needs_reference:
            keep_reference(model, data, micro_tokens, say)

    def loss(self, model: Scorer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = self._pairs(model, batch)
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        options = Options(self.beta, self.label_smoothing, self.gamma, self.tau)
        each = [weight * LOSSES[name](pairs, options) for name, weight in zip(self.loss_type, weights, strict=True)]
        return torch.stack(each).sum(), self._measures(pairs)

    def evaluate(self, model: Scorer, batch: Batch) -> dict[str, Any]:
        loss, measures = self.loss(model, batch)
        return {"loss": loss} | measures

    def _pairs(self, model: Scorer, batch: Batch) -> Pairs:
        logprobs = answers_logprobs(model, batch)
        reference = reference_logprobs(model, batch) if self.needs_reference else torch.zeros_like(logprobs)
        columns = (logprobs, reference, batch.kept_lengths.to(logprobs.dtype))
        (w, l), (ref_w, ref_l), (tokens_w, tokens_l) = (x.view(-1, 2).unbind(1) for x in columns)  # noqa: E741
        return Pairs(w, l, ref_w, ref_l, tokens_w, tokens_l)

    def _measures(self, pairs: Pairs) -> dict[str, Tensor]:
        """Rewards are beta times the log-ratios to the reference; without one, beta times the log-probabilities a token."""
        both = (pairs.ratio_w, pairs.ratio_l) if self.needs_reference else pairs.means
        chosen, rejected = (self.beta * side.detach() for side in both)
        return {
            "accuracy": (chosen > rejected).float().sum(),
            "margin": (chosen - rejected).sum(),
            "reward_chosen": chosen.sum(),
            "reward_rejected": rejected.sum(),
            "logprob_chosen": pairs.chosen.detach().sum(),
            "logprob_rejected": pairs.rejected.detach().sum(),
        }
