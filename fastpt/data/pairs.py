"""Rows of preferences: a prompt with the answer that was preferred and the one that was not, or with one that was judged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from fastpt.data.example import Example
from fastpt.data.files import Row
from fastpt.data.formats import Conversation, RowFormat, read_messages, read_string, read_system
from fastpt.data.render import conversation_text, encode, render_conversation
from fastpt.errors import DataError


class Pair(NamedTuple):
    chosen: Conversation
    rejected: Conversation


def pair_format(columns: Mapping[str, str] | None) -> RowFormat:
    """Rows with `chosen` and `rejected`, texts or messages, and a `prompt`, unless both begin with its messages."""
    return RowFormat("preference", ("chosen", "rejected"), _read, columns or {})  # type: ignore[arg-type]


def _read(row: Row, place: str) -> Pair:
    chosen, rejected = (_answer(row, side, place) for side in ("chosen", "rejected"))
    if row.get("prompt") is not None:
        prompt = _prompt(row, place)
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
    return Pair(*(_conversation(row, prompt, side) for side in (chosen, rejected)))


def _conversation(row: Row, prompt: list[dict[str, Any]], answer: list[dict[str, Any]]) -> Conversation:
    before = read_system(row) + prompt
    return Conversation(before + answer, row.get("tools") or None, len(before))


def _prompt(row: Row, place: str) -> list[dict[str, Any]]:
    if isinstance(row["prompt"], (str, type(None))):
        return [{"role": "user", "content": read_string(row, "prompt", place)}]
    return read_messages(row, "prompt", place)


def _answer(row: Row, side: str, place: str) -> list[dict[str, Any]]:
    if isinstance(row[side], (str, type(None))):
        return [{"role": "assistant", "content": read_string(row, side, place)}]
    return read_messages(row, side, place)


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
    return joined([_rendered(tokenizer, side, f"{place}: {name}") for name, side in pair._asdict().items()], place)


def _rendered(tokenizer: Any, conversation: Conversation, place: str) -> Example:
    found = render_conversation(tokenizer, conversation, place)
    if len(found) != 1:
        raise DataError(
            f"{place} has {len(found) or 'no'} assistant turns that the chat template renders apart: leave one turn"
        )
    return found[0]


def ranked_example(tokenizer: Any, row: Row, place: str, row_format: RowFormat) -> Example:
    """chosen and rejected as whole conversations, the way a reward model reads them, with the row's `margin` (or 0).

    Trained is what tells them apart. Raises: DataError as pair_example, and for a margin that is no number.
    """
    pair: Pair = row_format.convert(row, place)  # type: ignore[assignment]
    texts = [conversation_text(tokenizer, side, f"{place}: {name}") for name, side in pair._asdict().items()]
    both = [ids for ids, _ in encode(tokenizer, texts, add_special_tokens=False)]
    shortest = min(len(ids) for ids in both)
    differs = both[0][:shortest] != both[1][:shortest]
    if texts[0] == texts[1] or not differs.any():
        raise DataError(
            f"{place} has answers that the chat template renders alike: use a template that renders what tells them apart, "
            "or delete the row"
        )
    sides = [Example(ids, np.arange(len(ids)) >= differs.argmax(), None, place) for ids in both]
    return replace(
        joined(sides, place), fields={"margin": np.array([_margin(row_format.renamed(row), place)], np.float32)}
    )


def _margin(row: Row, place: str) -> float:
    value = row.get("margin")
    value = 0.0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(
            f"{place} has {type(value).__name__} {value!r:.40} as 'margin', where a number is needed: mend the row, or "
            "delete its margin"
        )
    return float(value)


class Judged(NamedTuple):
    answer: Conversation
    is_desirable: bool


def judged_examples(tokenizer: Any, row: Row, place: str, columns: Mapping[str, str] | None) -> list[Example]:
    """An answer and whether it was desirable (field `desirable`), from `prompt`, `completion` and `label`; two from a pair.

    Raises: DataError with the place for missing columns, empty answers, and labels other than true and false.
    """
    row_format = RowFormat("judged", ("prompt", "completion", "label"), _read_judged, columns or {})  # type: ignore[arg-type]
    names = row_format.renamed(row)
    if {"chosen", "rejected"} & names.keys() and "completion" not in names:
        row_format = pair_format(columns)
    found: Any = row_format.convert(row, place)
    judged = [Judged(found.chosen, True), Judged(found.rejected, False)] if isinstance(found, Pair) else [found]
    return [
        replace(joined([_rendered(tokenizer, answer, place)], place), fields={"desirable": np.array([is_desirable])})
        for answer, is_desirable in judged
    ]


def _read_judged(row: Row, place: str) -> Judged:
    answer = _conversation(row, _prompt(row, place), _answer(row, "completion", place))
    label = row["label"].strip().lower() if isinstance(row["label"], str) else row["label"]  # tables hold text
    if label not in (True, False, "true", "false", "1", "0"):
        raise DataError(
            f"{place} has {type(label).__name__} {row['label']!r:.40} as 'label', where true (a desirable answer) or false is "
            "needed: mend or delete the row"
        )
    return Judged(answer, label in (True, "true", "1"))


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
