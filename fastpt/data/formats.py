"""What a row means: the known row shapes, recognised over all rows, and their one canonical form.

Everything that can be wrong with a row is said here, with its place and what to do about it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from fastpt.data.files import Row, Rows
from fastpt.data.sources import StreamedRows
from fastpt.errors import DataError

ROLES = {
    "system": "system", "developer": "developer",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip
STREAM_SAMPLE_ROWS = 256  # of a stream, whose rest is checked row by row as it comes


@dataclass(frozen=True)
class Conversation:
    """Messages as the chat template takes them; assistant turns from message `first_trained` on are trained."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    first_trained: int = 0
    template_arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Text:
    """Plain text, every token of which is trained."""

    text: str


@dataclass(frozen=True)
class RowFormat:
    """A row shape: the columns that make it, and how such a row becomes a Conversation or a Text."""

    name: str
    required: tuple[str, ...]
    read: Callable[[Row, str], Conversation | Text]
    columns: Mapping[str, str] = field(default_factory=dict)  # our name -> the data's name

    def renamed(self, row: Row) -> Row:
        return (
            {**row, **{ours: row[theirs] for ours, theirs in self.columns.items() if theirs in row}}
            if self.columns
            else row
        )

    def convert(self, row: Row, place: str) -> Conversation | Text:
        """The canonical form of one row.

        Raises: DataError with the place when the row is not of this format or holds nothing to train on.
        """
        row = self.renamed(row)
        missing = [self.columns.get(column, column) for column in self.required if column not in row]
        if missing:
            has = ", ".join(map(str, row)) or "no columns"
            raise DataError(
                f"{place} has no column {missing[0]!r}, which {self.name} rows need (it has {has}): mend or delete the row"
            )
        return self.read(row, place)


# Reading each shape


def _read_messages(row: Row, place: str) -> Conversation:
    return _conversation(read_system(row) + read_messages(row, "messages", place), row, place)


def _read_sharegpt(row: Row, place: str) -> Conversation:
    return _conversation(read_system(row) + read_messages(row, "conversations", place), row, place)


def _read_prompt_completion(row: Row, place: str) -> Conversation:
    sides = [
        [{"role": role, "content": read_string(row, column, place)}] if isinstance(row[column], (str, type(None)))
        else read_messages(row, column, place)
        for column, role in (("prompt", "user"), ("completion", "assistant"))
    ]  # fmt: skip
    prompt, completion = read_system(row) + sides[0], sides[1]
    return _conversation(prompt + completion, row, place, first_trained=len(prompt))


def _read_alpaca(row: Row, place: str) -> Conversation:
    request = read_string(row, "instruction", place)
    if row.get("input"):
        request += "\n\n" + read_string(row, "input", place)
    answer = {"role": "assistant", "content": read_string(row, "output", place)}
    return _conversation([*read_system(row), {"role": "user", "content": request}, answer], row, place)


def _read_text(row: Row, place: str) -> Text:
    return Text(read_string(row, "text", place))


FORMATS = [
    RowFormat("messages", ("messages",), _read_messages),
    RowFormat("sharegpt", ("conversations",), _read_sharegpt),
    RowFormat("prompt/completion", ("prompt", "completion"), _read_prompt_completion),
    RowFormat("alpaca", ("instruction", "output"), _read_alpaca),
    RowFormat("text", ("text",), _read_text),
]
# What other data sets call the two sides, for the hint only: a guess must not decide what is trained.
USUAL_PAIRS = [
    ("question", "answer"),
    ("prompt", "response"),
    ("input", "output"),
    ("query", "response"),
    ("source", "target"),
]


def recognise(rows: Rows | StreamedRows, *, columns: Mapping[str, str] | None = None) -> RowFormat:
    """The format of a data set, from all of its rows (of a stream, from the first few hundred).

    `columns` names the data's own columns: {"prompt": "question", "completion": "answer"}.
    Raises: DataError when rows are of no known format or of several.
    """
    if isinstance(rows, StreamedRows):
        pairs: Iterable[tuple[Row, str]] = islice(iter(rows), STREAM_SAMPLE_ROWS)
    else:
        pairs = ((rows[i], rows.place(i)) for i in range(len(rows)))
    kinds: dict[str, tuple[RowFormat, int, str]] = {}
    for row, place in pairs:
        kind = format_of_row(row, place, columns)
        _, count, first = kinds.get(kind.name, (kind, 0, place))
        kinds[kind.name] = (kind, count + 1, first)
    if not kinds:
        raise DataError(f"{rows.name} has no rows: give it at least one, or point data at another file")
    if len(kinds) > 1:
        raise DataError(mixed(rows.name, {name: (count, first) for name, (_, count, first) in kinds.items()}))
    return next(iter(kinds.values()))[0]


def mixed(name: str, kinds: Mapping[str, tuple[int, str]]) -> str:
    listed = ", ".join(f"{count} {kind} (first {place})" for kind, (count, place) in kinds.items())
    remedy = "write all rows in one format, or split the file and mix the parts"
    return f"{name} mixes rows of {len(kinds)} formats: {listed}; {remedy}"


def format_of_row(row: Row, place: str, columns: Mapping[str, str] | None = None) -> RowFormat:
    """The first format whose columns the row has, filled if possible: tables fill what a row lacks with None."""
    formats = [replace(f, columns=columns) for f in FORMATS] if columns else FORMATS
    present = [(f, f.renamed(row)) for f in formats]
    present = [(f, renamed) for f, renamed in present if all(column in renamed for column in f.required)]
    filled = [f for f, renamed in present if all(renamed[column] is not None for column in f.required)]
    if filled or present:
        return filled[0] if filled else present[0][0]
    lowered = {str(column).lower(): column for column in row}
    pair = next((p for p in USUAL_PAIRS if p[0] in lowered and p[1] in lowered), None)
    mapping = (
        {"prompt": lowered[pair[0]], "completion": lowered[pair[1]]} if pair else {"prompt": "...", "completion": "..."}
    )
    has = ", ".join(map(str, row)) or "none"
    asked = f" (with columns={dict(columns)})" if columns else ""
    known = ", ".join(f"{f.name} ({', '.join(f.required)})" for f in FORMATS)
    raise DataError(
        f"{place} has the columns {has}{asked}, which is none of {known}: "
        f"say which is which with columns={json.dumps(mapping)}"
    )


# Parts of rows


def read_string(row: Row, column: str, place: str) -> str:
    value = row[column]
    if value is None or not isinstance(value, str):
        what = "nothing (None)" if value is None else f"{type(value).__name__} {value!r:.40}"
        raise DataError(f"{place} has {what} as {column!r}, where text is needed: mend or delete the row")
    if not value.strip():
        raise DataError(f"{place} has an empty {column!r}: fill it or delete the row")
    return value


def parsed(value: Any, what: str, place: str) -> Any:
    """Csv and parquet files often hold nested values as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place} has {what} that is neither a list nor its JSON ({error.msg}): mend or delete the row"
        ) from error


def read_system(row: Row) -> list[dict[str, Any]]:
    return (
        [{"role": "system", "content": row["system"]}]
        if isinstance(row.get("system"), str) and row["system"].strip()
        else []
    )


def read_messages(row: Row, column: str, place: str) -> list[dict[str, Any]]:
    raw = parsed(row[column], repr(column), place) if row[column] is not None else None
    if not isinstance(raw, list):
        what = "nothing (None)" if raw is None else type(raw).__name__
        raise DataError(f"{place} has {what} as {column!r}, where a list of messages is needed: mend or delete the row")
    if not raw:
        raise DataError(f"{place} has an empty list of {column!r}: delete the row")
    return [_message(message, f"{place}: message {number}") for number, message in enumerate(raw, 1)]


def _message(raw: Any, place: str) -> dict[str, Any]:
    """One message with role and content, from OpenAI's or ShareGPT's names for them; None fields are absent."""
    if not isinstance(raw, dict):
        raise DataError(
            f"{place} is {type(raw).__name__} {raw!r:.40}, not an object with role and content: mend or delete the row"
        )
    message = {key: value for key, value in raw.items() if value is not None and key not in ("from", "value")}
    said = raw.get("role", raw.get("from"))
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise DataError(f"{place} has the role {said!r}: use system, user, assistant or tool")
    content = _flattened(raw.get("content", raw.get("value")), place)
    message["role"] = role
    if said == "function_call":
        call = parsed(content, "a function_call", place)
        message["tool_calls"], content = (call if isinstance(call, list) else [call]), None
    if message.get("tool_calls"):
        message["tool_calls"] = [_tool_call(call, place) for call in parsed(message["tool_calls"], "tool_calls", place)]
    elif content is None:
        raise DataError(f"{place} ({role}) has no content (None): give it text or delete the row")
    elif role == "assistant" and not content.strip():
        raise DataError(f"{place} ({role}) is empty: give it text or delete the row")
    message["content"] = content or ""
    return message


def _flattened(content: Any, place: str) -> str | None:
    """OpenAI's content parts as one string."""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {"type": type(part).__name__} for part in content]
        other = next((part.get("type") for part in parts if not isinstance(part.get("text"), str)), None)
        if other is not None:
            raise DataError(
                f"{place} has a part of type {other!r}: fastpt trains on text, so take the part out or delete the row"
            )
        return "".join(part["text"] for part in parts)
    if content is not None and not isinstance(content, str):
        raise DataError(
            f"{place} has {type(content).__name__} {content!r:.40} as content, where text is needed: mend or delete the row"
        )
    return content


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    """A tool call as templates take it: the arguments an object, where OpenAI writes their JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{place} has the tool call {call!r:.60} without a function name: mend or delete the row")
    arguments = function.get("arguments", function.get("parameters", {}))
    function = {"name": function["name"], "arguments": parsed(arguments or {}, "tool call arguments", place)}
    return {"type": "function", **{k: v for k, v in call.items() if k == "id" and v is not None}, "function": function}


def _conversation(messages: list[dict[str, Any]], row: Row, place: str, first_trained: int = 0) -> Conversation:
    for number, message in enumerate(messages, 1):
        weight = message.get("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise DataError(
                f"{place}: message {number} has weight {weight!r}: use 0 (not trained), 1, or a number between"
            )
    trained = [m for m in messages[first_trained:] if m["role"] == "assistant" and m.get("weight", 1) > 0]
    if not trained:
        why = (
            "only assistant turns of weight 0"
            if any(m["role"] == "assistant" for m in messages[first_trained:])
            else "no assistant turn"
        )
        raise DataError(f"{place} has {why}, so there is nothing to train on: add the answer or delete the row")
    tools = row.get("tools", row.get("functions")) or None
    return Conversation(
        messages=messages,
        tools=parsed(tools, "tools", place),
        first_trained=first_trained,
        template_arguments=dict(parsed(row.get("chat_template_kwargs") or {}, "chat_template_kwargs", place)),
    )
