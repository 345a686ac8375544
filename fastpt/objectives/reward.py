"""Reward models: a number for a conversation, larger for the answer that was preferred."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fastpt.data.batches import Batch
from fastpt.data.example import Example
from fastpt.data.pairs import pair_format, ranked_example
from fastpt.objectives._preference_losses import bradley_terry
from fastpt.objectives._rewards import documents_rewards
from fastpt.objectives.base import Objective, Prepare, Scorer


class RewardModel(Objective):
    """Rows have `prompt`, `chosen` and `rejected`, and may have a `margin`. What is trained is a classifier of one output.

    Online objectives take the folder of its run as a reward.
    """

    task: ClassVar[str] = "sequence"

    name: Literal["reward"] = "reward"  # type: ignore[assignment]
    centering: float = Field(0.0, ge=0, description="pull of the two rewards of a pair to a mean of 0, such as 0.01")

    def survey(self, rows: Any, eval_rows: Any, columns: dict[str, str] | None) -> dict[str, Any]:
        return {"num_labels": 1}

    def bind(self, tokenizer: Any, rows: Any, columns: dict[str, str] | None) -> Prepare:
        row_format = pair_format(columns)

        def prepare(row: dict[str, Any], place: str) -> list[Example]:
            return [ranked_example(tokenizer, row, place, row_format)]

        return prepare

    def loss(self, model: Scorer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = documents_rewards(model, batch).view(-1, 2).unbind(1)
        losses = bradley_terry(chosen, rejected, batch.fields["margin"], self.centering)
        chosen, rejected = chosen.detach(), rejected.detach()
        return losses.sum(), {
            "accuracy": (chosen > rejected).float().sum(),
            "margin": (chosen - rejected).sum(),
            "reward_chosen": chosen.sum(),
            "reward_rejected": rejected.sum(),
        }

    def evaluate(self, model: Scorer, batch: Batch) -> dict[str, Any]:
        loss, measures = self.loss(model, batch)
        return {"loss": loss} | measures
