"""Continued pre-training on plain text: every token is a target, long documents are split into pieces of max_length."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from fastpt.data.example import Example
from fastpt.data.formats import Text, recognise
from fastpt.data.render import render_text
from fastpt.errors import DataError
from fastpt.objectives.base import Prepare
from fastpt.objectives.sft import CrossEntropy


class Pretrain(CrossEntropy):
    """Rows have a `text` field. The loss is that of supervised fine-tuning with every token trained."""

    splits_long_rows: ClassVar[bool] = True

    name: Literal["pretrain"] = "pretrain"  # type: ignore[assignment]

    def bind(self, tokenizer: Any, rows: Any, columns: dict[str, str] | None) -> Prepare:
        row_format = recognise(rows, columns=columns)

        def prepare(row: dict[str, Any], place: str) -> list[Example]:
            content = row_format.convert(row, place)
            if not isinstance(content, Text):
                raise DataError(
                    f'{place}: objective "pretrain" needs a text field, this row is {row_format.name}; use objective "sft", '
                    'or name the column: data.columns = {text = "..."}'
                )
            return [render_text(tokenizer, content, place)]

        return prepare
