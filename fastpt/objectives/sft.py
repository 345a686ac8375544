"""Supervised fine-tuning: cross-entropy on what the assistant says, and on nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from fastpt.data.batches import Batch
from fastpt.data.formats import Conversation, Text, recognise
from fastpt.data.render import render_conversation, render_text
from fastpt.objectives.base import Objective, Prepare, Scorer


class CrossEntropy(Objective):
    """The loss of the next token."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    z_loss: float = Field(0.0, ge=0, description="weight of logsumexp squared (PaLM)")

    def loss(self, model: Scorer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = model.hidden(batch)
        return model.cross_entropy(hidden, batch, label_smoothing=self.label_smoothing, z_loss=self.z_loss), {}


class SFT(CrossEntropy):
    """Rows are messages, ShareGPT, prompt and completion, Alpaca or plain text; text is trained on in full."""

    name: Literal["sft"] = "sft"  # type: ignore[assignment]
    last_turn_only: bool = Field(
        False, description="train the assistant's last turn of each conversation, not all of them"
    )

    def bind(self, tokenizer: Any, rows: Any, columns: dict[str, str] | None) -> Prepare:
        row_format = recognise(rows, columns=columns)

        def prepare(row: dict[str, Any], place: str):
            content = row_format.convert(row, place)
            if isinstance(content, Text):
                return [render_text(tokenizer, content, place)]
            if self.last_turn_only:
                content = replace(content, first_trained=last_answer(content))
            return render_conversation(tokenizer, content, place)

        return prepare


def last_answer(conversation: Conversation) -> int:
    """The index of the last message of the assistant (0 where there is none)."""
    roles = [message["role"] for message in conversation.messages]
    return max((i for i, role in enumerate(roles) if role == "assistant"), default=0)
