"""Rows that carry a class, several, or a number (`text`, `label`), or a tag for each of their words (`tokens`, `tags`)."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastpt.data.files import Row
from fastpt.errors import ConfigError, DataError

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"  # transformers'
Columns = Mapping[str, str] | None


@dataclass(frozen=True)
class LabelledText:
    """A text, or two that are judged together, and what the row says of it."""

    text: str
    pair: str | None
    label: Any


@dataclass(frozen=True)
class TaggedWords:
    words: list[str]
    tags: list[Any]


def read_text(row: Row, place: str, columns: Columns) -> tuple[str, str | None]:
    """`text`, and `text_pair` where the row has one.

    Raises: DataError for a column that is missing, empty or no text.
    """
    pair = (columns or {}).get("text_pair", "text_pair")
    first = _text(_cell(row, ("text",), place, columns), "text", place)
    return first, None if row.get(pair) is None else _text(row[pair], pair, place)


def read_labelled(row: Row, place: str, columns: Columns) -> LabelledText:
    """Raises: DataError as read_text, and for a label that is missing."""
    return LabelledText(*read_text(row, place, columns), read_label(row, place, columns))


def read_label(row: Row, place: str, columns: Columns) -> Any:
    label = _cell(row, ("label", "labels"), place, columns)
    if label is None or (isinstance(label, float) and math.isnan(label)):
        raise DataError(f"{place} has nothing as its label: give it one or delete the row")
    return label


def read_tags(row: Row, place: str, columns: Columns) -> list[Any]:
    tags = _parsed(_cell(row, ("tags", "labels"), place, columns))
    if not isinstance(tags, list):
        raise DataError(
            f"{place} has {type(tags).__name__} {tags!r:.40} as its tags, where a list is needed: mend the row"
        )
    return tags


def read_tagged(row: Row, place: str, columns: Columns) -> TaggedWords:
    """Raises: DataError for columns that are missing, no lists of words and tags, or of different lengths."""
    words, tags = _parsed(_cell(row, ("tokens",), place, columns)), read_tags(row, place, columns)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(
            f"{place} has {type(words).__name__} {words!r:.40} as its tokens, where a list of words is needed"
        )
    if len(words) != len(tags):
        raise DataError(
            f"{place} has {len(words)} tokens but {len(tags)} tags: give each word one tag, or delete the row"
        )
    if not words:
        raise DataError(f"{place} has no tokens: give it words or delete the row")
    if empty := next((number for number, word in enumerate(words, 1) if not word.strip()), None):
        raise DataError(f"{place} has an empty word (token {empty}): take it and its tag out, or delete the row")
    return TaggedWords(words, tags)


def _cell(row: Row, names: tuple[str, ...], place: str, columns: Columns) -> Any:
    """The value of the first of our columns that the row has under its own name."""
    theirs = [(columns or {}).get(name, name) for name in names]
    found = next((name for name in theirs if name in row), None)
    if found is None:
        has = ", ".join(map(str, row)) or "none"
        raise DataError(
            f"{place} has no column {theirs[0]!r} (it has {has}): say which it is with columns="
            f"{json.dumps({names[0]: '...'})}, or mend the row"
        )
    return row[found]


def _text(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        what = "nothing (None)" if value is None else f"{type(value).__name__} {value!r:.40}"
        raise DataError(f"{place} has {what} as {column!r}, where text is needed: mend or delete the row")
    if not value.strip():
        raise DataError(f"{place} has an empty {column!r}: fill it or delete the row")
    return value


def _parsed(value: Any) -> Any:
    """Lists that csv and parquet files hold as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


@dataclass(frozen=True)
class Classes:
    """What all rows of a set say: the kind of problem, the names of the classes in order, and how often each is said."""

    problem_type: str
    names: tuple[str, ...]
    counts: tuple[int, ...]
    rows: int

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def index(self, label: Any, place: str) -> int:
        """The number of a class; an integer is a name, or else the number itself.

        Raises: DataError for a class that is not among the names.
        """
        found = self._numbers.get(str(label))
        if found is not None:
            return found
        if type(label) is int and 0 <= label < len(self.names) and not _are_integers(self.names):
            return label
        raise DataError(
            f"{place} has the label {label!r:.60}, which the training rows do not have (they have {_listed(self.names)}): "
            "mend or delete the row, or name every class in objective.labels"
        )

    def indices(self, label: Any, place: str) -> list[int]:
        """The numbers of the classes of a multi-label row, which may have none."""
        return [self.index(one, place) for one in _several(label, place)]

    @property
    def imbalance(self) -> str:
        """One sentence about how even the classes are."""
        pairs = sorted(zip(self.counts, self.names, strict=True), key=lambda pair: -pair[0])
        (most, common), (least, rare) = pairs[0], pairs[-1]
        told = f"{len(self.names)} classes; most often {common!r} ({most}), least often {rare!r} ({least})"
        return told if most <= 3 * max(least, 1) else f'{told}: class_weights="balanced" makes them count alike'


def number(label: Any, place: str) -> float:
    """A regression target.

    Raises: DataError for what is no finite number.
    """
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or isinstance(label, bool):
        raise DataError(f"{place} has the label {label!r:.40}, where a finite number is needed: mend or delete the row")
    return value


def survey_labels(
    rows: Iterable[tuple[Row, str]], columns: Columns, problem_type: str | None, names: Iterable[str] | None
) -> Classes:
    """The classes of all rows, sorted (numbers by value), unless `names` gives them.

    A list is several classes, a float a regression target; `problem_type` decides where rows leave it open.
    Raises: DataError for rows without a label or of several kinds, and for less than two classes.
    """
    counts: Counter[Any] = Counter()
    kinds: dict[str, str] = {}
    total = 0
    for row, place in rows:
        label = read_label(row, place, columns)
        total += 1
        if problem_type == REGRESSION:
            number(label, place)
            continue
        several = problem_type == MULTI or isinstance(label, (list, tuple))
        for one in _several(label, place) if several else [label]:
            counts[one] += 1
            kinds.setdefault(_kind_of(one, place), place)
        kinds.setdefault("list" if several else "single", place)
    if problem_type == REGRESSION or kinds.keys() - {"int"} == {"float", "single"}:
        return Classes(REGRESSION, (), (), total)
    if "list" in kinds and "single" in kinds:
        raise _mixed("one label", kinds["single"], "a list of them", kinds["list"])
    found = MULTI if "list" in kinds else SINGLE
    if problem_type not in (None, found):
        raise ConfigError(
            f"objective.problem_type is {problem_type!r}, but the rows have lists of labels; leave it out"
        )
    return _classes(found, counts, kinds, total, names)


def survey_tags(rows: Iterable[tuple[Row, str]], columns: Columns, names: Iterable[str] | None) -> Classes:
    """The classes of all tags, as survey_labels."""
    counts: Counter[Any] = Counter()
    kinds: dict[str, str] = {}
    total = 0
    for row, place in rows:
        tags = read_tags(row, place, columns)
        total += 1
        counts.update(tags)
        for one in tags:
            kinds.setdefault(_kind_of(one, place), place)
    return _classes(SINGLE, counts, kinds, total, names)


def _classes(problem_type: str, counts: Counter[Any], kinds: dict[str, str], rows: int, names: Any) -> Classes:
    of_values = {kind: place for kind, place in kinds.items() if kind not in ("single", "list")}
    if len(of_values) > 1:
        (one, first), (other, second) = list(of_values.items())[:2]
        raise _mixed(f"{one} as label", first, other, second)
    if "float" in of_values:
        raise DataError(f"{of_values['float']} has a float as class: give names or integers")
    given = list(names) if names is not None else sorted({str(one) for one in counts})
    if names is None and _are_integers(given):
        given.sort(key=int)
    if len(given) < 2 and problem_type == SINGLE:
        raise DataError(
            f"the rows have one class only ({_listed(given)}): there is nothing to tell apart, add rows of another"
        )
    if not given:
        raise DataError("no row has any label: fill them in")
    blank = Classes(problem_type, tuple(given), (0,) * len(given), rows)
    said: Counter[int] = Counter()
    for one, count in counts.items():
        said[blank.index(one, "a training row")] += count
    return Classes(problem_type, blank.names, tuple(said[i] for i in range(len(given))), rows)


def _several(label: Any, place: str) -> list[Any]:
    label = _parsed(label)
    if not isinstance(label, (list, tuple)):
        raise DataError(f"{place} has the label {label!r:.40}, where a list of labels is needed: mend the row")
    return list(dict.fromkeys(label))


def _kind_of(label: Any, place: str) -> str:
    for kind in (bool, str, int, float):
        if isinstance(label, kind):
            return {"str": "text"}.get(kind.__name__, kind.__name__)
    raise DataError(
        f"{place} has {type(label).__name__} {label!r:.40} as a label: give text, a number or a list of them"
    )


def _mixed(one: str, first: str, other: str, second: str) -> DataError:
    return DataError(f"{first} has {one}, but {second} has {other}: write all labels in one way")


def _are_integers(names: Iterable[str]) -> bool:
    return all(name.lstrip("-").isdecimal() for name in names)


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
