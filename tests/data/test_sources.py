"""Rows from every source keep their content and place; what cannot be read says where and what to do."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pytest

from fastpt.data.sources import StreamedRows, load_rows
from fastpt.errors import DataError

ROWS = [{"text": "one"}, {"text": "zwei äöü"}, {"text": "three"}]


def contents(rows):
    return [rows[i] for i in range(len(rows))]


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet", "list", "dataset"])
def test_every_source_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if kind == "jsonl":
        write(path, lines)
    elif kind == "jsonl.gz":
        write(path, gzip.compress(lines.encode()))
    elif kind == "json":
        write(path, json.dumps(ROWS))
    elif kind in ("csv", "tsv"):
        write(path, "text\n" + "".join(row["text"] + "\n" for row in ROWS))
    elif kind == "parquet":
        parquet(path, ROWS)
    spec = path
    if kind == "list":
        spec = ROWS
    elif kind == "dataset":
        import datasets

        spec = datasets.Dataset.from_list(ROWS)
    rows = load_rows(spec)
    assert contents(rows) == ROWS
    assert rows.fingerprint == load_rows(spec).fingerprint
    number = {"csv": 3, "tsv": 3}.get(kind, 2)  # the header is line 1
    assert rows.place(1).endswith(f"{number}")


def test_fingerprint_follows_the_content(tmp_path):
    a = load_rows(write(tmp_path / "a.jsonl", '{"text": "a"}\n')).fingerprint
    assert a == load_rows(write(tmp_path / "b.jsonl", '{"text": "a"}\n')).fingerprint
    assert a != load_rows(write(tmp_path / "c.jsonl", '{"text": "b"}\n')).fingerprint
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    same = load_rows(datasets.Dataset.from_list([*ROWS[::-1]]).select([2, 1, 0])).fingerprint
    assert load_rows(dataset).fingerprint == same
    assert load_rows(dataset).fingerprint != load_rows(dataset.select([1, 0, 2])).fingerprint


def test_bom_crlf_and_blank_lines_are_no_problem(tmp_path):
    path = write(tmp_path / "x.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    rows = load_rows(path)
    assert contents(rows) == [{"text": "a"}, {"text": "b"}]
    assert rows.place(1) == f"{path}:3"
    table = load_rows(write(tmp_path / "x.csv", b'\xef\xbb\xbftext,n\r\n"a, ""b""\r\nc",1\r\nd,2\r\n'))
    assert contents(table) == [{"text": 'a, "b"\r\nc', "n": "1"}, {"text": "d", "n": "2"}]
    assert table.place(1).endswith("x.csv:4")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", b"", r"x\.jsonl has no rows: "),
        ("x.jsonl", b"\n \n", r"x\.jsonl has no rows: "),
        ("x.json", b"[]", r"x\.json has no rows: "),
        ("x.csv", b"text\n", r"x\.csv has no rows: "),
        ("x.jsonl", b'{"a": 1}\n{"a": 2', r"x\.jsonl:2 is not valid JSON .*cut off"),
        ("x.jsonl", b'{"a": 1}\n{"a": oops}\n{"a": 2}\n', r"x\.jsonl:2 is not valid JSON .*mend or delete the line"),
        ("x.jsonl", b'[{"a": 1}, {"a": 2}]', r"x\.jsonl:1 holds a JSON array.*name the file \.json"),
        ("x.jsonl", b'[\n {"a": 1},\n {"a": 2}\n]', r"x\.jsonl:1 .*name it \.json"),
        ("x.jsonl", b'{\n "a": 1\n}\n', r"x\.jsonl:1 .*each object on one line"),
        ("x.jsonl", b'{"a": 1}\n[1]\n', r"x\.jsonl:2 is list \[1\], not an object"),
        ("x.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', r"x\.jsonl:2 is not UTF-8 \(byte 0xe9\).*iconv"),
        ("x.csv", b"text\nok\ncaf\xe9\n", r"x\.csv:3 is not UTF-8"),
        ("x.jsonl", '{"a": 1}\n'.encode("utf-16"), r"x\.jsonl is UTF-16"),
        ("x.json", b'{"a": 1}\n{"a": 2}\n', r"x\.json:2 .*name it \.jsonl"),
        ("x.json", b'[{"a": 1},', r"x\.json:1 is not valid JSON"),
        ("x.json", b'{"a": 1}', r"x\.json holds an object with the keys a"),
        ("x.json", b'["a"]', r"x\.json:1 is str 'a'"),
        ("x.csv", b"a,b\n1,2\n1,2,3\n", r"x\.csv:3 has 3 fields where the first line names 2: put quotes"),
        ("x.csv", b"a,b\n1\n", r"x\.csv:2 has 1 fields"),
        ("x.csv", b'a,b\n1,2\n"1,2\n3,4\n', r"x\.csv:3 is not valid csv .*close the quotes"),
        ("x.csv", b"a,a\n1,2\n", r"x\.csv has two columns named 'a'"),
        ("x.csv", b"a,\n1,2\n", r"x\.csv has no name for column 2"),
        ("x.parquet", b"PAR1 not really", r"x\.parquet is not a readable parquet file"),
        ("x.jsonl.gz", b"not gzip", r"x\.jsonl\.gz cannot be read"),
        ("x.xlsx", b"PK", r"x\.xlsx has an unknown extension: fastpt reads \.jsonl"),
    ],
)
def test_problems_name_place_and_remedy(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(DataError, match=message):
        contents(load_rows(str(path)))


def test_missing_files_and_unknown_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "support.jsonl", '{"text": "a"}\n')
    with pytest.raises(DataError, match=r"no file 'suport\.jsonl' \(did you mean support\.jsonl\?\)"):
        load_rows("suport.jsonl")
    with pytest.raises(DataError, match=r"nor a folder 'nowhere/at'"):
        load_rows("nowhere/at/all.jsonl")
    with pytest.raises(DataError, match=r"no file matches '\*\.csv'"):
        load_rows("*.csv")
    with pytest.raises(
        DataError, match=r"'support' is neither a file here \(did you mean support\.jsonl\?\) nor a data set"
    ):
        load_rows("support")
    with pytest.raises(DataError, match="data is int: give a path"):
        load_rows(3)
    with pytest.raises(DataError, match="has no split 'test'"):
        load_rows("support.jsonl", split="test")


def test_folders_and_globs(tmp_path):
    write(tmp_path / "train-1.jsonl", '{"text": "a"}\n')
    write(tmp_path / "train-2.jsonl", '{"text": "b"}\n{"text": "c"}\n')
    write(tmp_path / "readme.md", "no data")
    rows = load_rows(tmp_path)
    assert [row["text"] for row in contents(rows)] == ["a", "b", "c"]
    assert rows.place(2) == f"{tmp_path / 'train-2.jsonl'}:2"
    assert len(load_rows(str(tmp_path / "train-*.jsonl"))) == 3
    write(tmp_path / "test.jsonl", '{"text": "d"}\n')
    with pytest.raises(DataError, match=r"mixes training data with test\.jsonl"):
        load_rows(tmp_path)
    assert len(load_rows(tmp_path, split="train")) == 3
    with pytest.raises(DataError, match="named after the split 'dev'"):
        load_rows(tmp_path, split="dev")


def test_text_file_is_one_document(tmp_path):
    assert contents(load_rows(write(tmp_path / "book.txt", "one\n\ntwo\n"))) == [{"text": "one\n\ntwo\n"}]


def test_dataset_dict_gives_its_training_split():
    import datasets

    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    )
    assert len(load_rows(splits)) == 3
    assert len(load_rows(splits, split="test")) == 1
    with pytest.raises(DataError, match="no split 'dev': choose one of train, test"):
        load_rows(splits, split="dev")


def test_mixture_keeps_places_and_weights(jsonl):
    path = jsonl(*ROWS)
    rows = load_rows([{"path": path, "weight": 2}, {"rows": ROWS[:2], "weight": 0.5}])
    assert len(rows) == 5
    assert rows.mixture == [(0, 3, 2.0), (3, 5, 0.5)]
    assert rows[4] == ROWS[1]
    assert rows.place(2) == f"{path}:3"
    assert rows.place(4) == "row 2"
    other = load_rows([{"path": path, "weight": 1.5}, {"rows": ROWS[:2], "weight": 0.5}])
    assert rows.fingerprint != other.fingerprint
    for bad, message in [
        ({"path": path, "weight": 0}, "part 1 of the mixture has weight 0"),
        ({"path": path, "weight": "2"}, "part 1 of the mixture has weight '2'"),
        ({"weight": 1, "path": path, "rows": ROWS}, "part 1 of the mixture needs"),
    ]:
        with pytest.raises(DataError, match=message):
            load_rows([bad])


def test_streams_start_anywhere(jsonl):
    import datasets

    path = jsonl(ROWS[0], "", *ROWS[1:])
    local = load_rows(path, streaming=True)
    assert isinstance(local, StreamedRows)
    assert list(local) == [(row, f"{path}:{line}") for row, line in zip(ROWS, (1, 3, 4), strict=True)]
    assert list(local.iterate(2)) == [(2, ROWS[2], f"{path}:4")]
    hub = load_rows(datasets.Dataset.from_list(ROWS).to_iterable_dataset())
    assert [row for row, _ in hub] == ROWS
    assert [(index, row) for index, row, _ in hub.iterate(1)] == [(1, ROWS[1]), (2, ROWS[2])]
    with pytest.raises(DataError, match="a mixture cannot be streamed"):
        load_rows([{"path": path, "weight": 2}], streaming=True)


def test_local_files_need_no_data_library(jsonl):
    code = (
        "import sys; from fastpt.data.sources import load_rows; from fastpt.data.formats import recognise; "
        f"recognise(load_rows({str(jsonl(*ROWS))!r})); "
        "heavy = {'torch', 'datasets', 'pandas', 'pyarrow', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
