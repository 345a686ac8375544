"""The rows that every peer of a training benchmark sees, tokenised once: full rows of text, questions and answers, intents."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from fastpt.errors import DataError

IGNORED = -100


class Row(NamedTuple):
    """One training example: its tokens, and which of them are targets (0 or 1 each)."""

    input_ids: list[int]
    completion_mask: list[int]

    @property
    def labels(self) -> list[int]:
        pairs = zip(self.input_ids, self.completion_mask, strict=True)
        return [token if trained else IGNORED for token, trained in pairs]


class LabelledRow(NamedTuple):
    """One row of text and its class."""

    input_ids: list[int]
    label: int
    text: str


FILES = {
    "packed": "gsm8k_train.jsonl", "gsm8k": "gsm8k_train.jsonl", "clinc150": "clinc150_small.json",
    "llmbar": "llmbar_pairs.jsonl", "multi30k": "multi30k_train.en.gz",
}  # fmt: skip


def default_data(work: str) -> Path:
    """The file of a work in $FASTPT_DATA, or in shared/data beside the repository."""
    folder = os.environ.get("FASTPT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(folder) / FILES[work]


def load(work: str, tokenizer: Any, data: Path | None = None, *, count: int, length: int) -> list[Any]:
    """The first `count` rows of a jsonl file, in its order, none longer than `length` tokens.

    `packed`: the texts of the file one after another, cut into rows of exactly `length`, every token a target.
    `gsm8k`: one row per question through the chat template, only the answer's tokens are targets.
    `clinc150`: pairs of text and class under "train" in a JSON file, in a fixed random order (the file is sorted by class).
    `llmbar`: prompts with a chosen and a rejected answer, in a fixed random order, none cut: longer ones are left out.
    `multi30k`: English sentences as sources, those of the file beside it, .de.gz for .en.gz, as targets.
    `sums`: prompts that ask for a sum, from no file.

    Raises: DataError for a file that is missing, is not jsonl or has too few rows.
    """
    if work == "sums":
        return [
            {"prompt": f"Add {7 * i % 90 + 10} and {13 * i % 80 + 10}, and explain each step of it."}
            for i in range(count)
        ]
    data = data or default_data(work)
    if not data.is_file():
        raise DataError(
            f"no data at {data}: name a file by --data, or set FASTPT_DATA to a folder with {FILES[work]}"
        )  # fmt: skip
    if work == "clinc150":
        return _labelled(tokenizer, data, count, length)
    if work == "multi30k":
        found: Iterator[Any] = _translations(data)
    else:
        make = {"packed": _packed, "gsm8k": _answers, "llmbar": _pairs}[work]
        found = make(tokenizer, _records(data), length)
    rows = list(islice(found, count))
    if len(rows) < count:
        raise DataError(f"{data} gives {len(rows)} rows of {work}, {count} are needed: ask for fewer steps or rows")
    return rows


def _records(data: Path) -> Iterator[dict[str, Any]]:
    with data.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"{data}:{number} is not a JSON object ({error}): the benchmark reads jsonl") from None


def _packed(tokenizer: Any, records: Iterator[dict[str, Any]], length: int) -> Iterator[Row]:
    pending: list[int] = []
    for record in records:
        text = "\n".join(value for value in record.values() if isinstance(value, str))
        pending += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        while len(pending) >= length:
            yield Row(pending[:length], [1] * length)
            pending = pending[length:]


def _answers(tokenizer: Any, records: Iterator[dict[str, Any]], length: int) -> Iterator[Row]:
    def encode(text: str) -> list[int]:  # the template writes the special tokens
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for record in records:
        user = {"role": "user", "content": record["question"]}
        assistant = {"role": "assistant", "content": record["answer"]}
        prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([user, assistant], tokenize=False)
        if not whole.startswith(prompt):
            raise DataError("the chat template renders a prompt differently once it is answered: use --work packed")
        question, answer = encode(prompt), encode(whole[len(prompt) :])
        mask = [0] * len(question) + [1] * len(answer)
        if any(mask[1:length]):  # else the cut left nothing to learn
            yield Row((question + answer)[:length], mask[:length])


def _labelled(tokenizer: Any, data: Path, count: int, length: int) -> list[LabelledRow]:
    try:
        pairs = [(str(text), str(label)) for text, label in json.loads(data.read_text(encoding="utf-8"))["train"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{data} holds no list of [text, class] under "train" ({type(error).__name__}: {error})'
        ) from None
    if len(pairs) < count:
        raise DataError(f"{data} gives {len(pairs)} rows of clinc150, {count} are needed: ask for fewer steps or rows")
    number = {label: i for i, label in enumerate(sorted({label for _, label in pairs}))}
    random.Random(0).shuffle(pairs)
    encoded = tokenizer([text for text, _ in pairs[:count]], truncation=True, max_length=length)["input_ids"]
    return [LabelledRow(ids, number[label], text) for ids, (text, label) in zip(encoded, pairs, strict=False)]


def _pairs(tokenizer: Any, records: Iterator[dict[str, Any]], length: int) -> Iterator[dict[str, str]]:
    rows = list(records)
    random.Random(0).shuffle(rows)
    for row in rows:
        for answer in (row["chosen"], row["rejected"]):
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            if len(tokenizer(text, add_special_tokens=False)["input_ids"]) > length:
                break
        else:
            yield {name: row[name] for name in ("prompt", "chosen", "rejected")}


def _translations(data: Path) -> Iterator[dict[str, str]]:
    other = data.with_name(data.name.replace(".en.gz", ".de.gz"))
    with gzip.open(data, "rt", encoding="utf-8") as english, gzip.open(other, "rt", encoding="utf-8") as german:
        for source, target in zip(english, german, strict=True):
            yield {"source": source.rstrip("\n"), "target": target.rstrip("\n")}
