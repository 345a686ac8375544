"""Rows of preferences: a prompt, the answer that was preferred and the one that was not, as one example of two documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastpt.data.example import Example
from fastpt.data.files import Row
from fastpt.data.formats import Conversation, RowFormat, _messages, _string, _system
from fastpt.data.render import render_conversation
from fastpt.errors import DataError


class Pair(NamedTuple):
    chosen: Conversation
    rejected: Conversation


def pair_format(columns: Mapping[str, str] | None) -> RowFormat:
    """Rows with `chosen` and `rejected`, texts or messages, and a `prompt`, unless both begin with its messages."""
    return RowFormat("preference", ("chosen", "rejected"), _read, columns or {})  # type: ignore[arg-type]


def _read(row: Row, place: str) -> Pair:
    chosen, rejected = (_answer(row, side, place) for side in ("chosen", "rejected"))
    prompt: list[dict[str, Any]] = []
    if row.get("prompt") is not None:
        is_text = isinstance(row["prompt"], str)
        prompt = (
            [{"role": "user", "content": _string(row, "prompt", place)}] if is_text else _messages(row, "prompt", place)
        )
    else:
        shared = sum(1 for _ in _while_equal(chosen, rejected))
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        if shared == 0:
            raise DataError(
                f"{place} has no prompt: chosen and rejected do not begin with the same messages; add a column "
                'prompt, or name it: data.columns = {prompt = "..."}'
            )
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if chosen == rejected:
        raise DataError(f"{place} prefers an answer to the same answer: mend or delete the row")
    prompt = _system(row) + prompt
    both = (Conversation(prompt + side, row.get("tools") or None, len(prompt)) for side in (chosen, rejected))
    return Pair(*both)


def _answer(row: Row, side: str, place: str) -> list[dict[str, Any]]:
    if isinstance(row[side], (str, type(None))):
        return [{"role": "assistant", "content": _string(row, side, place)}]
    return _messages(row, side, place)


def _while_equal(a: list[Any], b: list[Any]):
    for x, y in zip(a, b, strict=False):
        if x != y:
            return
        yield x


def pair_example(tokenizer: Any, row: Row, place: str, row_format: RowFormat) -> Example:
    """chosen and rejected behind their common prompt.

    Raises: DataError with the place for one-sided pairs, empty or equal answers, and answers that a template takes apart.
    """
    pair: Pair = row_format.convert(row, place)  # type: ignore[assignment]
    sides = [render_conversation(tokenizer, side, f"{place}: {name}") for name, side in pair._asdict().items()]
    if any(len(side) != 1 for side in sides):
        raise DataError(
            f"{place} has answers of several assistant turns, which the chat template renders apart: leave one turn"
        )
    return joined([side[0] for side in sides], place)


def joined(sides: list[Example], place: str) -> Example:
    """Documents behind the tokens that they have in common before any is trained, less the last one."""
    shortest = min(len(side.input_ids) for side in sides)
    ids = np.stack([side.input_ids[:shortest] for side in sides])
    differs = (ids != ids[0]).any(0) | np.stack([side.trained[:shortest] for side in sides]).any(0)
    prefix = max(0, (int(differs.argmax()) if differs.any() else shortest) - 1)
    documents = [(side.input_ids[prefix:], side.trained[prefix:]) for side in sides]
    return Example(
        np.concatenate([sides[0].input_ids[:prefix], *(ids for ids, _ in documents)]),
        np.concatenate([np.zeros(prefix, bool), *(trained for _, trained in documents)]),
        None, place, documents=tuple(len(ids) for ids, _ in documents), prefix=prefix, count=1.0,
    )  # fmt: skip
