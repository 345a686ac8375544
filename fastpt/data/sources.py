"""Where rows come from: files, folders, the hub, datasets objects, lists, mixtures of these, streams.

Local files need no data library; `datasets` is imported only for the hub and for its own objects.
"""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fastpt.data.files import (
    BLOCK_ROWS,
    READERS,
    Blocks,
    Records,
    Row,
    Rows,
    arrow_fingerprint,
    check_encoding,
    parse_line,
    suffix_of,
)
from fastpt.errors import DataError

__all__ = ["Row", "Rows", "StreamedRows", "load_rows"]

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HELD_OUT = re.compile(r"(^|[^a-z])(test|val|valid|validation|dev|eval)([^a-z]|$)")
PART_KEYS = {"path", "rows", "weight", "split", "name"}


class StreamedRows:
    """Rows read in order without holding the set; every pass, and every `iterate`, starts anew.

    `fingerprint` identifies the source (paths and sizes, or hub id and split), not its content.
    """

    mixture = None

    def __init__(self, name: str, fingerprint: str, read: Callable[[int], Iterator[tuple[int, Row, str]]]):
        self.name = name
        self.fingerprint = fingerprint
        self._read = read

    def iterate(self, start: int = 0) -> Iterator[tuple[int, Row, str]]:
        """(index, row, place) from row `start` on."""
        return self._read(start)

    def __iter__(self) -> Iterator[tuple[Row, str]]:
        return ((row, place) for _, row, place in self._read(0))


def load_rows(spec: Any, *, split: str | None = None, streaming: bool = False) -> Rows | StreamedRows:
    """Rows of a file, folder, glob, hub id, datasets object, list of dicts or mixture.

    A mixture is a list of {"path" or "rows": ..., "weight": w, "split": ..., "name": hub configuration}: w is how many
    times these rows are seen per epoch, its fraction a subset that moves on from epoch to epoch.
    Raises: DataError when nothing is found, when it cannot be read, or when it has no rows.
    """
    rows = _stream(spec, split) if streaming or _is_iterable_dataset(spec) else _load(spec, split)
    if isinstance(rows, Rows) and len(rows) == 0:
        raise DataError(
            f"{rows.name or 'the data set'} has no rows: give it at least one, or point data at another file"
        )
    return rows


def _load(spec: Any, split: str | None) -> Rows:
    if isinstance(spec, Rows):
        return spec
    if isinstance(spec, (str, Path)):
        return _load_path(str(spec), split, None)
    if isinstance(spec, dict) and not _is_datasets(spec, "DatasetDict"):
        return _load_mixture([spec], split)
    if isinstance(spec, (list, tuple)):
        if spec and all(
            isinstance(part, dict) and part.keys() & {"path", "rows"} and part.keys() <= PART_KEYS for part in spec
        ):
            return _load_mixture(spec, split)
        if spec and all(isinstance(part, (str, Path)) for part in spec):
            return Concatenated([_load(part, split) for part in spec])
        return Records(spec)
    if _is_datasets(spec, "DatasetDict"):
        return _load(_pick_split(spec, split, "the DatasetDict"), None)
    if _is_datasets(spec, "Dataset"):
        return _from_dataset(spec, spec.info.dataset_name or "dataset")
    raise DataError(
        f"data is {type(spec).__name__}: give a path, a hub id, a datasets.Dataset, a list of dicts, or a mixture "
        '[{"path": ..., "weight": ...}]'
    )


def _is_datasets(value: Any, name: str) -> bool:
    """Whether value is a class of `datasets`, asked without importing it."""
    return any(t.__name__ == name and t.__module__.split(".")[0] == "datasets" for t in type(value).__mro__)


def _is_iterable_dataset(spec: Any) -> bool:
    return _is_datasets(spec, "IterableDataset")


# Files and folders


def _load_path(spec: str, split: str | None, configuration: str | None) -> Rows:
    path = Path(spec).expanduser()
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        import datasets

        return _load(datasets.load_from_disk(str(path)), split)
    files = _files(spec, split)
    if files is None:
        return _from_dataset(_load_hub(spec, split, configuration), spec)
    return _read_file(files[0]) if len(files) == 1 else Concatenated([_read_file(file) for file in files])


def _read_file(path: Path) -> Rows:
    reader = READERS.get(suffix_of(path))
    if reader is None:
        raise DataError(
            f"{path} has an unknown extension: fastpt reads {', '.join(READERS)} (each also as .gz, parquet apart)"
        )
    return reader(path, str(path))


def _files(spec: str, split: str | None) -> list[Path] | None:
    """The files that spec names, or None when it can only be a hub id."""
    path = Path(spec).expanduser()
    if path.is_file():
        if split not in (None, "train"):
            raise DataError(f"{spec!r} is one file, which has no split {split!r}: name the file of that split instead")
        return [path]
    if path.is_dir():
        return _files_of_split(sorted(p for p in path.iterdir() if suffix_of(p) in READERS), spec, split)
    if glob.has_magic(spec):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        if not found:
            raise DataError(f"no file matches {spec!r}: check the pattern, seen from {Path.cwd()}")
        return found
    if suffix_of(path) in READERS or not HUB_ID.fullmatch(spec):
        raise DataError(f"there is no file {spec!r}{_near(path)}: check the path, seen from {Path.cwd()}")
    return None


def _files_of_split(files: list[Path], folder: str, split: str | None) -> list[Path]:
    if not files:
        raise DataError(f"the folder {folder!r} holds no data: put {', '.join(READERS)} files into it")
    if split is not None:
        chosen = [file for file in files if split in re.split(r"[^a-z0-9]+", file.name.lower())]
        if not chosen:
            raise DataError(
                f"no file in {folder!r} is named after the split {split!r}: it has {', '.join(f.name for f in files[:8])}"
            )
        return chosen
    held_out = [file for file in files if HELD_OUT.search(file.name.lower())]
    if held_out and len(held_out) < len(files):
        raise DataError(
            f"the folder {folder!r} mixes training data with {held_out[0].name}, which looks held out: "
            "give split='train', or name the files"
        )
    return files


def _near(path: Path) -> str:
    """' (did you mean ...?)' with the nearest names in the same folder."""
    if not path.parent.is_dir():
        return f", nor a folder {str(path.parent)!r}"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=3)
    return f" (did you mean {' or '.join(str(path.parent / name) for name in near)}?)" if near else ""


# The hub and datasets objects


def _load_hub(spec: str, split: str | None, configuration: str | None, *, streaming: bool = False) -> Any:
    import datasets

    try:
        loaded = datasets.load_dataset(spec, configuration, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        near = _near(Path(spec)) if "/" not in spec else ""
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"{spec!r} is neither a file here{near} nor a data set that could be loaded from the hub ({reason}): check the name, "
            'the connection and your login, or name a configuration with {"path": ..., "name": ...}'
        ) from error
    return _pick_split(loaded, split, spec) if isinstance(loaded, dict) else loaded


def _pick_split(splits: Any, split: str | None, name: str) -> Any:
    """The named split; without a name the training split, or the only one."""
    wanted = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if wanted not in splits:
        raise DataError(f"{name} has no split {wanted!r}: choose one of {', '.join(splits)} with split=")
    return splits[wanted]


def _from_dataset(dataset: Any, name: str) -> Rows:
    plain = dataset.with_format(None)

    def fetch(start: int, stop: int) -> list[Row]:
        columns = plain[start:stop]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def fingerprint() -> str:
        tables = dataset.with_format("arrow").iter(BLOCK_ROWS)
        return arrow_fingerprint(batch for table in tables for batch in table.combine_chunks().to_batches())

    return Blocks(fetch, len(dataset), name, fingerprint)


# Mixtures


class Concatenated(Rows):
    """Several sets one after the other, each with its own places and its own weight."""

    def __init__(self, parts: Sequence[Rows], weights: Sequence[float] | None = None):
        super().__init__(" + ".join(part.name or "rows" for part in parts))
        self._parts = list(parts)
        self._stops = np.cumsum([len(part) for part in parts])
        if weights is not None:
            starts = [0, *self._stops[:-1].tolist()]
            self.mixture = list(zip(starts, self._stops.tolist(), weights, strict=True))

    def _find(self, index: int) -> tuple[Rows, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._stops, index, side="right"))
        return self._parts[part], index - (int(self._stops[part - 1]) if part else 0)

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, index):
        part, index = self._find(index)
        return part[index]

    def place(self, index: int) -> str:
        part, index = self._find(index)
        return part.place(index)

    @property
    def fingerprint(self) -> str:
        weights = [weight for _, _, weight in self.mixture] if self.mixture else None
        return xxhash.xxh3_128_hexdigest(repr(([part.fingerprint for part in self._parts], weights)).encode())


def _load_mixture(parts: Sequence[dict], split: str | None) -> Rows:
    loaded, weights = [], []
    for number, part in enumerate(parts, 1):
        weight = part.get("weight", 1.0)
        if unknown := part.keys() - PART_KEYS:
            raise DataError(
                f"part {number} of the mixture has {sorted(unknown)}: it may have {', '.join(sorted(PART_KEYS))}"
            )
        if ("path" in part) == ("rows" in part):
            raise DataError(f'part {number} of the mixture needs "path" or "rows", and not both')
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < 1e6:
            raise DataError(
                f"part {number} of the mixture has weight {weight!r}: give how often per epoch its rows are seen, above 0"
            )
        own_split = part.get("split", split)
        if isinstance(part.get("path"), (str, Path)):
            rows = _load_path(str(part["path"]), own_split, part.get("name"))
        else:
            rows = _load(part.get("rows", part.get("path")), own_split)
        if len(rows) == 0:
            raise DataError(
                f"{rows.name or 'part ' + str(number)} of the mixture has no rows: take it out, or point it at another file"
            )
        rows.weight = float(weight)
        loaded.append(rows)
        weights.append(float(weight))
    return loaded[0] if weights == [1.0] else Concatenated(loaded, weights)


# Streams


def _stream(spec: Any, split: str | None) -> StreamedRows:
    if _is_datasets(spec, "IterableDatasetDict"):
        spec = _pick_split(spec, split, "the IterableDatasetDict")
    if _is_iterable_dataset(spec):
        name = spec.info.dataset_name or "stream"
        return StreamedRows(name, f"stream:{name}:{spec.split}", lambda start: _iterate_dataset(spec, name, start))
    if isinstance(spec, (list, tuple)) and not all(isinstance(part, (str, Path)) for part in spec):
        raise DataError(
            "a mixture cannot be streamed: load it without streaming, or mix with datasets.interleave_datasets"
        )
    specs = [str(part) for part in spec] if isinstance(spec, (list, tuple)) else [str(spec)]
    files: list[Path] = []
    for part in specs:
        found = _files(part, split)
        if found is None and len(specs) == 1:
            read = partial(_iterate_dataset, _load_hub(part, split or "train", None, streaming=True), part)
            return StreamedRows(part, f"{part}:{split}", read)
        files += found or []
    identity = xxhash.xxh3_128_hexdigest(repr([(file.name, file.stat().st_size) for file in files]).encode())
    return StreamedRows(" + ".join(map(str, files)), identity, lambda start: _iterate_files(files, start))


def _iterate_dataset(dataset: Any, name: str, start: int) -> Iterator[tuple[int, Row, str]]:
    for index, row in enumerate(dataset.skip(start) if start else dataset, start):
        yield index, dict(row), f"{name}:{index + 1}"


def _iterate_files(files: list[Path], start: int) -> Iterator[tuple[int, Row, str]]:
    index = 0
    for file in files:
        rows = _iterate_lines(file) if file.suffix == ".jsonl" else _iterate_rows(_read_file(file))
        for parse, place in rows:
            if index >= start:
                yield index, parse(), place
            index += 1


def _iterate_rows(rows: Rows) -> Iterator[tuple[Callable[[], Row], str]]:
    for index in range(len(rows)):
        yield partial(rows.__getitem__, index), rows.place(index)


def _iterate_lines(path: Path) -> Iterator[tuple[Callable[[], Row], str]]:
    """Each line of a .jsonl file, still to be parsed: rows before a resumed position need not be."""
    is_first = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                check_encoding(line, str(path))
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                place = f"{path}:{number}"
                yield partial(parse_line, line, place, is_first=is_first, ends_file=not line.endswith(b"\n")), place
                is_first = False
