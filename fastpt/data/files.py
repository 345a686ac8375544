"""Local files as sequences of rows that know their line.

A .jsonl file is mapped, indexed by line and parsed a row at a time, so that a set costs its index, not its objects,
and every mistake in it can be reported where it is met.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import mmap
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from fastpt.errors import DataError

Row = dict[str, Any]
BLOCK_ROWS = 1024  # rows of an Arrow table that become Python objects at a time


class Rows(Sequence[Row]):
    """Rows with provenance: `rows[i]` is a dict, `rows.place(i)` says where it stands, as in "support.jsonl:17".

    `weight` is how often a mixture shows these rows per epoch; `mixture` lists (start, stop, weight) of its parts.
    Raises: DataError from `rows[i]` when the row cannot be read, with its place and the remedy.
    """

    weight: float = 1.0
    mixture: list[tuple[int, int, float]] | None = None

    def __init__(self, name: str):
        self.name = name

    @property
    def fingerprint(self) -> str:
        """Hash of the content: equal rows in equal order give an equal fingerprint, whatever the file's name."""
        raise NotImplementedError

    def number(self, index: int) -> int:
        """The line, or the row where there are no lines, counted from 1."""
        return index + 1

    def place(self, index: int) -> str:
        return f"{self.name}:{self.number(index)}" if self.name else f"row {self.number(index)}"


class Records(Rows):
    """Rows that already are objects in memory."""

    def __init__(self, records: Sequence[Any], name: str = ""):
        super().__init__(name)
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index):
        return as_row(self._records[index], self.place(index))

    @property
    def fingerprint(self) -> str:
        digest = xxhash.xxh3_128()
        for record in self._records:
            digest.update(json.dumps(record, sort_keys=True, default=repr).encode("utf-8", "surrogatepass"))
            digest.update(b"\n")
        return digest.hexdigest()


class JsonLines(Rows):
    """One JSON object a line; blank lines are passed over and keep their number."""

    def __init__(self, path: Path, name: str):
        super().__init__(name)
        self._bytes = file_bytes(path, name)
        check_encoding(self._bytes, name)
        self._starts, self._lines = array("q"), array("q")
        position, line = (3 if self._bytes[:3] == b"\xef\xbb\xbf" else 0), 1
        while position < len(self._bytes):
            end = self._end(position)
            if self._bytes[position:end].strip():
                self._starts.append(position)
                self._lines.append(line)
            position, line = end + 1, line + 1

    def _end(self, position: int) -> int:
        end = self._bytes.find(b"\n", position)
        return len(self._bytes) if end < 0 else end

    def __len__(self) -> int:
        return len(self._starts)

    def number(self, index: int) -> int:
        return self._lines[index]

    def __getitem__(self, index):
        start = self._starts[index]
        end = self._end(start)
        ends_file = end == len(self._bytes)
        return parse_line(self._bytes[start:end], self.place(index), is_first=index == 0, ends_file=ends_file)

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(self._bytes)


class Table(Rows):
    """A csv or tsv file; a row with too many or too few fields is an error where it is read."""

    def __init__(self, path: Path, name: str, delimiter: str):
        super().__init__(name)
        self._bytes = file_bytes(path, name)
        self._delimiter = delimiter
        self._header: list[str] = []
        self._fields: list[list[str]] = []
        self._lines = array("q")
        limit = csv.field_size_limit(sys.maxsize)  # a long text is no mistake
        try:
            self._read(
                csv.reader(io.StringIO(decoded(self._bytes, name), newline=""), delimiter=delimiter, strict=True)
            )
        finally:
            csv.field_size_limit(limit)

    def _read(self, reader: Any) -> None:
        line = 0
        try:
            for fields in reader:
                if fields and not self._header:
                    self._header = fields
                elif fields:
                    self._fields.append(fields)
                    self._lines.append(line + 1)
                line = reader.line_num
        except csv.Error as error:
            raise DataError(
                f"{self.name}:{line + 1} is not valid csv ({error}): close the quotes of the field, or double the quotes in it"
            ) from error
        unnamed = [i + 1 for i, title in enumerate(self._header) if not title.strip()]
        repeated = sorted({title for title in self._header if self._header.count(title) > 1})
        if unnamed or repeated:
            which = f"no name for column {unnamed[0]}" if unnamed else f"two columns named {repeated[0]!r}"
            raise DataError(f"{self.name} has {which} in its first line: give every column a name of its own")

    def __len__(self) -> int:
        return len(self._fields)

    def number(self, index: int) -> int:
        return self._lines[index]

    def __getitem__(self, index):
        fields = self._fields[index]
        if len(fields) != len(self._header):
            raise DataError(
                f"{self.place(index)} has {len(fields)} fields where the first line names {len(self._header)}: "
                f"put quotes around a field that holds {'a tab' if self._delimiter == chr(9) else 'a comma'}"
            )
        return dict(zip(self._header, fields, strict=True))

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(self._bytes)


class Blocks(Rows):
    """Rows that are costly to fetch one by one (Arrow), fetched and kept a block at a time."""

    def __init__(self, fetch: Callable[[int, int], list[Row]], length: int, name: str, fingerprint: Callable[[], str]):
        super().__init__(name)
        self._length = length
        self._fingerprint = fingerprint
        self._block = lru_cache(maxsize=8)(
            lambda block: fetch(block * BLOCK_ROWS, min(length, (block + 1) * BLOCK_ROWS))
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if not 0 <= index < self._length:
            raise IndexError(index)
        return self._block(index // BLOCK_ROWS)[index % BLOCK_ROWS]

    @property
    def fingerprint(self) -> str:
        return self._fingerprint()


def arrow_fingerprint(batches: Iterator[Any]) -> str:
    """Hash of Arrow record batches; the schema's metadata, which names files and versions, is left out."""
    digest = xxhash.xxh3_128()
    for batch in batches:
        batch = batch.replace_schema_metadata(None)
        digest.update(str(batch.schema).encode())
        digest.update(batch.serialize())
    return digest.hexdigest()


def read_parquet(path: Path, name: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, memory_map=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name} is not a readable parquet file ({error}): write or fetch it again") from error
    return Blocks(
        lambda start, stop: table.slice(start, stop - start).to_pylist(),
        table.num_rows,
        name,
        lambda: arrow_fingerprint(iter(table.combine_chunks().to_batches(BLOCK_ROWS))),
    )


def read_json(path: Path, name: str) -> Rows:
    """A JSON array of objects, or an object whose only list of objects it is."""
    text = decoded(file_bytes(path, name), name)
    try:
        value = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        remedy = "mend the JSON there, or fetch the file again if it was cut off"
        if error.msg == "Extra data":
            remedy = "the file looks like one object per line, so name it .jsonl"
        raise DataError(f"{name}:{error.lineno} is not valid JSON ({error.msg}): {remedy}") from error
    lists = (
        [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        if isinstance(value, dict)
        else []
    )
    if len(lists) == 1:
        value = lists[0]
    if not isinstance(value, list):
        shape = (
            f"an object with the keys {', '.join(list(value)[:6])}"
            if isinstance(value, dict)
            else f"a {type(value).__name__}"
        )
        raise DataError(
            f"{name} holds {shape}, not a list of rows: write it as [{{...}}, {{...}}] or one object per line in a .jsonl"
        )
    return Records(value, name)


def read_text(path: Path, name: str) -> Rows:
    """A plain text file is one document."""
    text = decoded(file_bytes(path, name), name)
    return Records([{"text": text}] if text.strip() else [], name)


class Conll(Rows):
    """Sentences of a CoNLL file: a word a line, first its text, last its tag; blank lines between sentences."""

    def __init__(self, path: Path, name: str):
        super().__init__(name)
        self._bytes = file_bytes(path, name)
        self._sentences: list[Row] = []
        self._lines = array("q")
        is_inside = False
        for number, line in enumerate(decoded(self._bytes, name).split("\n"), 1):
            fields = line.split("\t" if "\t" in line else None)
            if not line.strip() or fields[0] == "-DOCSTART-":
                is_inside = False
                continue
            if len(fields) < 2:
                raise DataError(
                    f"{name}:{number} has {len(fields)} column, where a word and its tag are needed: mend it"
                )
            if not is_inside:
                self._sentences.append({"tokens": [], "tags": []})
                self._lines.append(number)
            is_inside = True
            self._sentences[-1]["tokens"].append(fields[0].strip())
            self._sentences[-1]["tags"].append(fields[-1].strip())

    def __len__(self) -> int:
        return len(self._sentences)

    def number(self, index: int) -> int:
        return self._lines[index]

    def __getitem__(self, index):
        return self._sentences[index]

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(self._bytes)


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": JsonLines,
    ".json": read_json,
    ".csv": lambda path, name: Table(path, name, ","),
    ".tsv": lambda path, name: Table(path, name, "\t"),
    ".parquet": read_parquet,
    ".conll": Conll,
    ".txt": read_text,
}


def suffix_of(path: Path) -> str:
    """The extension that decides how the file is read, without a .gz after it."""
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()


def file_bytes(path: Path, name: str) -> bytes | mmap.mmap:
    """The file's bytes: mapped, or unpacked when it is gzip."""
    try:
        with open(path, "rb") as file:
            if path.suffix == ".gz":
                return gzip.decompress(file.read())
            # An empty file cannot be mapped.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{name} cannot be read ({error}): check the path and its permissions, or fetch the file again"
        ) from error


def check_encoding(data: bytes | mmap.mmap, name: str) -> None:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{name} is UTF-16: save it as UTF-8, for example with `iconv -f utf-16 -t utf-8`")


def decoded(data: bytes | mmap.mmap, name: str) -> str:
    """The whole file as text, without its byte order mark."""
    check_encoding(data, name)
    try:
        return str(data[:], "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(not_utf8(f"{name}:{line}", data[error.start])) from error


def not_utf8(place: str, byte: int) -> str:
    return (
        f"{place} is not UTF-8 (byte 0x{byte:02x}): save the file as UTF-8, for example with `iconv -f latin1 -t utf-8`"
    )


def parse_line(raw: bytes, place: str, *, is_first: bool, ends_file: bool) -> Row:
    """One line of a .jsonl file as a dict, or a DataError that tells what the line looks like instead."""
    try:
        value = json.loads(str(raw, "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(place, raw[error.start])) from error
    except json.JSONDecodeError as error:
        stripped = raw.strip()
        if is_first and stripped.startswith(b"["):
            remedy = "the file looks like one JSON array, so name it .json or write one object per line"
        elif stripped in (b"{", b"}", b"},") or stripped.endswith(b"{"):
            remedy = "the file looks like indented JSON, so write each object on one line"
        elif ends_file:
            remedy = "the file looks cut off in its last line, so fetch it again or delete that line"
        else:
            remedy = "mend or delete the line"
        raise DataError(f"{place} is not valid JSON ({error.msg} at column {error.colno}): {remedy}") from error
    if isinstance(value, list) and is_first:
        raise DataError(f"{place} holds a JSON array, not an object: name the file .json or write one object per line")
    return as_row(value, place)


def as_row(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"{place} is {type(value).__name__} {value!r:.40}, not an object with named columns: mend or delete the row"
        )
    return value
