"""Rows that are prompts: what online RL lets the model answer, with the columns that rewards judge the answer by."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fastpt.data.example import Example
from fastpt.data.files import Row
from fastpt.data.formats import Conversation, RowFormat, parsed, read_messages, read_string, read_system
from fastpt.data.render import encode, render
from fastpt.errors import DataError


def _read(row: Row, place: str) -> Conversation:
    if isinstance(row["prompt"], (str, type(None))):
        messages = [{"role": "user", "content": read_string(row, "prompt", place)}]
    else:
        messages = read_messages(row, "prompt", place)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{place} ends with an assistant turn, so there is nothing to answer: take that turn out of the row"
        )
    return Conversation(
        messages=read_system(row) + messages,
        tools=parsed(row.get("tools") or None, "tools", place),
        template_arguments=dict(parsed(row.get("chat_template_kwargs") or {}, "chat_template_kwargs", place)),
    )


def prompt_format(columns: Mapping[str, str] | None) -> RowFormat:
    """Rows with a `prompt`, a text or a list of messages."""
    return RowFormat("prompt", ("prompt",), _read, columns or {})


def prompt_example(
    tokenizer: Any, row: Row, place: str, row_format: RowFormat, handed_on: Iterable[str] | None
) -> Example:
    """The prompt's tokens, ready to be answered; `handed_on` names the columns that rewards see (None: all of them).

    Raises: DataError with the place for a row without a prompt, or with values that cannot be handed on.
    """
    if "prompt" not in row_format.renamed(row):
        has = ", ".join(map(str, row)) or "no columns"
        raise DataError(
            f'{place} has no column "prompt" (it has {has}): say which one is the question, as in '
            'data.columns = {prompt = "question"}'
        )
    prompt = row_format.convert(row, place)
    assert isinstance(prompt, Conversation)
    text = render(tokenizer, prompt, len(prompt.messages), True, place)
    ids, _ = encode(tokenizer, [text], add_special_tokens=False)[0]
    renamed = row_format.renamed(row)
    columns = {key: value for key, value in renamed.items() if handed_on is None or key in handed_on}
    columns["prompt"] = renamed["prompt"]
    return Example(ids, np.zeros(len(ids), bool), None, place, count=1.0, fields=_packed(columns, place))


def _packed(columns: Row, place: str) -> dict[str, np.ndarray]:
    """A row as bytes with their number, so that it goes wherever its tokens go: the cache, a stream, a batch."""
    try:
        data = np.frombuffer(json.dumps(columns).encode("utf-8", "surrogatepass"), np.uint8)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{place} holds what rewards cannot be handed ({error}): make it text or a number, or let the reward functions "
            "name the columns that they take instead of **columns"
        ) from None
    return {"row": data, "row_bytes": np.array([len(data)])}


def rows_of(fields: Mapping[str, np.ndarray | Tensor]) -> list[Row]:
    """The columns that `prompt_example` handed on, of one example or of a batch."""
    data, sizes = (np.asarray(fields[name]) for name in ("row", "row_bytes"))
    return [
        json.loads(part.tobytes().decode("utf-8", "surrogatepass")) for part in np.split(data, np.cumsum(sizes)[:-1])
    ]
