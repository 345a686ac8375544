"""A data set as tokens: one pass on worker threads, flat arrays, a length policy that counts what it costs, a cache.

The arrays are memory-mapped from a cache named by the content of the rows and of everything that shaped the tokens.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fastpt.data.example import Example
from fastpt.data.files import Rows
from fastpt.data.pack import Mixture
from fastpt.errors import DataError

POLICIES = ("error", "truncate", "drop", "split")
CHUNK_ROWS = 64
CACHE_VERSION = 2  # raise it when the arrays or their meaning change
Prepare = Callable[[dict, str], list[Example]]


@dataclass
class LengthReport:
    """What became of the rows; one row may give several examples, and the counts below `rows` are of examples."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    too_long: int = 0
    longest: int = 0
    longest_place: str = ""
    truncated_rows: int = 0
    truncated_tokens: int = 0
    split_rows: int = 0
    dropped_rows: int = 0
    dropped_tokens: int = 0
    all_masked_rows: int = 0
    all_masked_places: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = [
            f"{self.rows} rows, {self.examples} examples, {self.tokens} tokens, {self.trained_tokens} of them trained"
        ]
        if self.truncated_rows:
            told.append(f"{self.truncated_rows} truncated ({self.truncated_tokens} tokens lost)")
        if self.split_rows:
            told.append(f"{self.split_rows} split")
        if self.dropped_rows:
            told.append(f"{self.dropped_rows} too long and dropped ({self.dropped_tokens} tokens lost)")
        if self.all_masked_rows:
            first = ", ".join(self.all_masked_places)
            told.append(f"{self.all_masked_rows} dropped without a trained token (first: {first})")
        return "; ".join(told)

    def why_too_long(self, name: str, max_length: int) -> str:
        return (
            f"{self.too_long} of {self.rows} rows of {name or 'the data'} are longer than max_length={max_length} tokens, "
            f"the longest {self.longest} ({self.longest_place}): set too_long='truncate' to cut their ends, "
            "too_long='drop' to leave them out, or raise max_length"
        )

    def why_nothing(self) -> str:
        if self.rows == 0:
            return "it has no rows, so point data at another file"
        if self.dropped_rows and self.dropped_rows >= self.all_masked_rows:
            return (
                f"{self.dropped_rows} of {self.rows} rows are longer than max_length and were dropped, the longest having "
                f"{self.longest} tokens: raise max_length or set too_long='truncate'"
            )
        cut = (
            " after truncation: raise max_length"
            if self.truncated_rows
            else ": check which part of a row is the answer"
        )
        return f"{self.all_masked_rows} of {self.rows} rows have no trained token{cut}"


def check_policy(max_length: int, too_long: str) -> None:
    if too_long not in POLICIES:
        raise DataError(f"too_long is {too_long!r}: choose one of {', '.join(POLICIES)}")
    if max_length < 2:
        raise DataError(f"max_length is {max_length}: it must be at least 2, one token to read and one to predict")


def apply_policy(examples: list[Example], max_length: int, too_long: str, report: LengthReport) -> list[Example]:
    """The examples that are trained, with what happened to the others added to the report."""
    kept: list[Example] = []
    report.rows += 1
    for example in examples:
        if example.longest > report.longest:
            report.longest, report.longest_place = example.longest, example.place
        pieces = [example]
        if example.longest > max_length:
            report.too_long += 1
            pieces = _shortened(example, max_length, too_long, report)
        for piece in pieces:
            if piece.is_empty:
                report.all_masked_rows += 1
                report.all_masked_places += [piece.place] if len(report.all_masked_places) < 5 else []
                continue
            report.examples += 1
            report.tokens += piece.tokens
            report.trained_tokens += sum(piece.trained_tokens)
            kept.append(piece)
    return kept


def _shortened(example: Example, max_length: int, too_long: str, report: LengthReport) -> list[Example]:
    if too_long == "drop":
        report.dropped_rows += 1
        report.dropped_tokens += example.tokens
        return []
    if too_long == "truncate":
        cut = example.truncated(max_length)
        report.truncated_rows += 1
        report.truncated_tokens += example.tokens - cut.tokens
        return [cut]
    if too_long == "split":
        # Neighbours share a token: it ends one piece as a target and opens the next, which never predicts its first.
        report.split_rows += 1
        return [
            example.taking(slice(at, at + max_length)) for at in range(0, len(example.input_ids) - 1, max_length - 1)
        ]
    return [example]


# An example as named columns of any length; what an example lacks has length 0.

PER_TOKEN = ("input_ids", "trained", "weights", "targets")


def _columns(example: Example) -> dict[str, np.ndarray]:
    given = {
        "input_ids": example.input_ids,
        "trained": example.trained,
        "weights": example.weights,
        "targets": example.targets,
        "source": example.source,
        "documents": None if example.documents is None else np.array(example.documents, np.int32),
        "prefix": np.array([example.prefix], np.int32) if example.prefix else None,
        "count": None if example.count is None else np.array([example.count]),
    }
    fields = {f"field.{name}": np.asarray(value) for name, value in example.fields.items()}
    return {name: value for name, value in given.items() if value is not None} | fields


def _example(columns: dict[str, np.ndarray], place: str) -> Example:
    one = {name: value for name, value in columns.items() if len(value) or name in PER_TOKEN}
    fields = {name.removeprefix("field."): value for name, value in one.items() if name.startswith("field.")}
    return Example(
        one["input_ids"],
        one["trained"],
        one.get("weights"),
        place,
        targets=one.get("targets"),
        source=one.get("source"),
        documents=tuple(one["documents"].tolist()) if "documents" in one else None,
        prefix=int(one["prefix"][0]) if "prefix" in one else 0,
        count=float(one["count"][0]) if "count" in one else None,
        fields=fields,
    )


class Tokenised:
    """Examples as flat arrays: example i holds `values[offsets[i]:offsets[i + 1]]` of every column."""

    def __init__(self, arrays: dict[str, np.ndarray], rows: Rows, report: LengthReport, from_cache: bool):
        self._values = {name: array for name, array in arrays.items() if not name.endswith("@offsets")}
        self._row_of = self._values.pop("rows")
        self._offsets = {name: arrays[f"{_ruler(name)}@offsets"] for name in self._values}
        self._rows = rows
        self.report = report
        self.from_cache = from_cache
        both = (name for name in ("input_ids", "source") if name in self._values)
        self.lengths: np.ndarray = sum(np.diff(self._offsets[name]) for name in both)  # type: ignore[assignment]  # [N] int64

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def places(self) -> list[str]:
        return [self.place(i) for i in range(len(self))]

    def place(self, index: int) -> str:
        return self._rows.place(int(self._row_of[index]))

    def row(self, index: int) -> dict[str, Any]:
        """The row of the data that an example was made of."""
        return self._rows[int(self._row_of[index])]

    def example(self, index: int) -> Example:
        spans = {name: slice(*offsets[index : index + 2].tolist()) for name, offsets in self._offsets.items()}
        return _example({name: values[spans[name]] for name, values in self._values.items()}, self.place(index))

    def set_field(self, name: str, arrays: list[np.ndarray]) -> None:
        """Give each example a field, such as log-probabilities under a reference model; the cache stays as it is."""
        found = _flat({f"field.{name}": [(i, array) for i, array in enumerate(arrays)]}, len(self))
        self._values[f"field.{name}"] = found[f"field.{name}"]
        self._offsets[f"field.{name}"] = found[f"field.{name}@offsets"]

    def column(self, name: str) -> np.ndarray:
        """All values of a column end to end: "targets", or "field.label"."""
        return self._values[name]

    @property
    def mixture(self) -> Mixture | None:
        """The mixture of the rows, as ranges of examples, for `plan_epoch`."""
        if self._rows.mixture is None:
            return None
        edge = lambda row: int(np.searchsorted(self._row_of, row))  # noqa: E731
        return [(edge(start), edge(stop), weight) for start, stop, weight in self._rows.mixture]


def _ruler(name: str) -> str:
    """The column whose offsets a column shares."""
    return "input_ids" if name in PER_TOKEN else name


def _flat(columns: dict[str, list[tuple[int, np.ndarray]]], count: int) -> dict[str, np.ndarray]:
    """Arrays and offsets of columns given as (example, values)."""
    flat: dict[str, np.ndarray] = {}
    for name, parts in columns.items():
        flat[name] = np.concatenate([values for _, values in parts])
        if name in PER_TOKEN and len(parts) != len(columns["input_ids"]):
            raise ValueError(f"an objective gives {name} to all of its examples or to none")
        if _ruler(name) == name:
            lengths = np.zeros(count, np.int64)
            lengths[[index for index, _ in parts]] = [len(values) for _, values in parts]
            flat[f"{name}@offsets"] = np.concatenate([[0], np.cumsum(lengths)])
    return flat


def tokenise(
    rows: Rows,
    prepare: Prepare,
    *,
    max_length: int,
    too_long: str,
    cache_key: str | None,
    cache_dir: Path | None,
    progress: Callable[[int, int], None] | None = None,
) -> Tokenised:
    """All rows as examples, tokenised on worker threads or taken from the cache.

    `too_long` decides about examples over `max_length`: "error", "truncate" (the end is lost), "drop", or "split" (into
    pieces that lose nothing, for plain text). `cache_key` stands for the tokenizer and all settings that `prepare` uses.
    `progress(rows done, rows in all)` is called now and then.
    Raises: DataError for the first bad row, for rows that are too long under "error", and when nothing is left.
    """
    check_policy(max_length, too_long)
    folder = None
    if cache_key is not None and cache_dir is not None:
        identity = repr((CACHE_VERSION, rows.fingerprint, cache_key, max_length, too_long))
        folder = Path(cache_dir) / xxhash.xxh3_128_hexdigest(identity.encode())
        cached = _load(folder, rows)
        if cached is not None:
            return cached
    report = LengthReport()
    arrays = _tokenise(rows, prepare, max_length, too_long, report, progress)
    if too_long == "error" and report.too_long:
        raise DataError(report.why_too_long(rows.name, max_length))
    if len(arrays["rows"]) == 0:
        raise DataError(f"{rows.name or 'the data'} gives nothing to train on: {report.why_nothing()}")
    if folder is not None:
        _save(folder, arrays, report)
    return Tokenised(arrays, rows, report, from_cache=False)


def _tokenise(
    rows: Rows, prepare: Prepare, max_length: int, too_long: str, report: LengthReport, progress: Any
) -> dict[str, np.ndarray]:
    columns: dict[str, list[tuple[int, np.ndarray]]] = {}
    row_of: list[int] = []
    for index, examples in _prepared(rows, prepare):
        for example in apply_policy(examples, max_length, too_long, report):
            given = _columns(example)
            if "weights" in columns or "weights" in given:  # a row without weights has ones
                given.setdefault("weights", np.broadcast_to(np.float32(1), len(example.input_ids)))
                columns.setdefault("weights", [(i, np.ones(len(v), np.float32)) for i, v in columns.get("trained", [])])
            for name, values in given.items():
                columns.setdefault(name, []).append((len(row_of), values))
            row_of.append(index)
        if progress is not None and ((index + 1) % CHUNK_ROWS == 0 or index + 1 == len(rows)):
            progress(index + 1, len(rows))
    if not row_of:
        return {"rows": np.zeros(0, np.int64)}
    return _flat(columns, len(row_of)) | {"rows": np.array(row_of, np.int64)}


def _prepared(rows: Rows, prepare: Prepare) -> Iterator[tuple[int, list[Example]]]:
    """(row, its examples) in order; chunks are prepared on threads, a few ahead of what is taken."""

    def chunk(start: int) -> list[list[Example]]:
        return [prepare(rows[i], rows.place(i)) for i in range(start, min(start + CHUNK_ROWS, len(rows)))]

    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenise") as pool:
        ahead: deque[tuple[int, Future[list[list[Example]]]]] = deque()
        starts = iter(range(0, len(rows), CHUNK_ROWS))
        try:
            while True:
                while len(ahead) < 2 * workers and (start := next(starts, None)) is not None:
                    ahead.append((start, pool.submit(chunk, start)))
                if not ahead:
                    return
                start, future = ahead.popleft()
                yield from enumerate(future.result(), start)
        finally:
            for _, future in ahead:
                future.cancel()


# The cache: a folder of .npy files, written beside its place and renamed into it.


def _load(folder: Path, rows: Rows) -> Tokenised | None:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in meta["arrays"]}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError) as error:
        warnings.warn(f"the cached tokens in {folder} cannot be read ({error}), so they are made anew", stacklevel=3)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return Tokenised(arrays, rows, LengthReport(**meta["report"]), from_cache=True)


def _save(folder: Path, arrays: dict[str, np.ndarray], report: LengthReport) -> None:
    """Write the cache; a full disk costs the cache, not the run, and is said."""
    unfinished = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        meta = json.dumps({"arrays": list(arrays), "report": asdict(report)}).encode()
        writers: dict[str, Callable[[Any], Any]] = {
            f"{name}.npy": partial(np.save, arr=a) for name, a in arrays.items()
        }
        writers["meta.json"] = lambda file: file.write(meta)
        for name, write in writers.items():
            with open(unfinished / name, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        if not folder.exists():  # another run may have finished the same tokens first
            unfinished.rename(folder)
    except OSError as error:
        warnings.warn(
            f"the tokens could not be cached in {folder.parent} ({error}): free space there; the run goes on",
            stacklevel=3,
        )
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
