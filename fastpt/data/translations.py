"""Rows of two texts: what an encoder-decoder reads and what it is to say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastpt.data.example import Example
from fastpt.data.files import Row
from fastpt.data.formats import RowFormat, read_string
from fastpt.errors import DataError


class Translation(NamedTuple):
    source: str
    target: str


def translation_format(columns: Mapping[str, str] | None) -> RowFormat:
    """Rows with `source` and `target`; columns also name the languages within a `translation` = {"en": ..., "de": ...}."""
    return RowFormat("translation", ("source", "target"), _read, columns or {})  # type: ignore[arg-type]


def _read(row: Row, place: str) -> Translation:
    texts = Translation(*(read_string(row, side, place) for side in ("source", "target")))
    for side, text in texts._asdict().items():
        if not text.strip():
            raise DataError(f"{place} has an empty {side!r}: mend or delete the row")
    return texts


def read_translation(row: Row, place: str, row_format: RowFormat) -> Translation:
    """Raises: DataError with the place for missing columns and empty texts."""
    inside = row.get("translation")
    return row_format.convert(inside if isinstance(inside, dict) else row, place)  # type: ignore[return-value]


def translation_example(tokenizer: Any, texts: Translation, place: str, prefix: str, start: int) -> Example:
    """Source [S] with the tokenizer's special tokens; the decoder's row [T] begins with its start token, which is not trained."""
    source = tokenizer(prefix + texts.source)["input_ids"]
    target = [start, *tokenizer(text_target=texts.target)["input_ids"]]
    return Example(
        np.array(target, np.int32), np.arange(len(target)) > 0, None, place, source=np.array(source, np.int32),
        fields={"target": np.frombuffer(texts.target.encode(), np.uint8), "target_bytes": np.array([len(texts.target.encode())])},
    )  # fmt: skip


def targets_of(fields: Mapping[str, Any]) -> list[str]:
    """The texts that the rows of a batch are to say."""
    data, sizes = (np.asarray(fields[name].cpu()) for name in ("target", "target_bytes"))
    return [part.tobytes().decode() for part in np.split(data, np.cumsum(sizes)[:-1])]
