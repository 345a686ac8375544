"""Supervised fine-tuning: cross-entropy on what the assistant says, and on nothing else."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from fastpt.data.batches import Batch
from fastpt.data.formats import Text, recognise
from fastpt.data.render import render_conversation, render_text
from fastpt.objectives.base import Objective, Prepare, Scorer


class SFT(Objective):
    """Rows are messages, ShareGPT, prompt and completion, Alpaca or plain text; text is trained on in full."""

    name: Literal["sft"] = "sft"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    z_loss: float = Field(0.0, ge=0, description="weight of logsumexp squared (PaLM)")

    def bind(self, tokenizer: Any, rows: Any, columns: dict[str, str] | None) -> Prepare:
        row_format = recognise(rows, columns=columns)

        def prepare(row: dict[str, Any], place: str):
            content = row_format.convert(row, place)
            if isinstance(content, Text):
                return [render_text(tokenizer, content, place)]
            return render_conversation(tokenizer, content, place)

        return prepare

    def loss(self, model: Scorer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = model.hidden(batch)
        return model.cross_entropy(hidden, batch, label_smoothing=self.label_smoothing, z_loss=self.z_loss), {}
