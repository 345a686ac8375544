"""Tokenised sets: order and places kept, lengths handled as chosen and counted, the cache exact and crash-proof."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from fastpt.data.example import Example
from fastpt.data.sources import load_rows
from fastpt.data.tokenised import tokenise
from fastpt.errors import DataError


def numbers(row, place):
    """`n` tokens counting up; the last `trained` of them trained; one example per entry of `n`."""
    examples = []
    for n in row["n"] if isinstance(row["n"], list) else [row["n"]]:
        trained = np.arange(n) >= n - row.get("trained", n)
        weights = np.full(n, row["weight"], np.float32) if "weight" in row else None
        examples.append(Example(np.arange(n, dtype=np.int32), trained, weights, place))
    return examples


def run(rows, max_length=8, too_long="error", **options):
    options = {"cache_key": None, "cache_dir": None} | options
    return tokenise(load_rows(rows), numbers, max_length=max_length, too_long=too_long, **options)


def test_order_places_and_values():
    made = run([{"n": 2 + i % 5} for i in range(300)] + [{"n": [3, 4], "weight": 0.5}])
    assert made.lengths.tolist() == [2 + i % 5 for i in range(300)] + [3, 4]
    assert made.places[299:] == ["row 300", "row 301", "row 301"]
    example = made.example(301)
    assert example.input_ids.tolist() == [0, 1, 2, 3]
    assert example.input_ids.dtype == np.int32
    assert example.weights.tolist() == [0.5] * 4
    assert made.example(0).weights.tolist() == [1, 1]
    assert made.report.rows == 301
    assert made.report.trained_tokens == sum(made.lengths) - 302, "a first token is never a target"


def test_too_long_is_an_error_unless_chosen():
    rows = [{"n": 3}, {"n": 12}, {"n": 20}]
    with pytest.raises(
        DataError,
        match=r"2 of 3 rows .* longer than max_length=8 tokens, the longest 20 \(row 3\).*too_long='truncate'",
    ):
        run(rows)
    cut = run(rows, too_long="truncate")
    assert cut.lengths.tolist() == [3, 8, 8]
    assert (cut.report.truncated_rows, cut.report.truncated_tokens) == (2, 4 + 12)
    dropped = run(rows, too_long="drop")
    assert dropped.lengths.tolist() == [3]
    assert (dropped.report.dropped_rows, dropped.report.dropped_tokens) == (2, 32)
    assert "2 too long and dropped (32 tokens lost)" in str(dropped.report)
    with pytest.raises(DataError, match="too_long is 'cut': choose one of error, truncate"):
        run(rows, too_long="cut")
    with pytest.raises(DataError, match="max_length is 1"):
        run(rows, max_length=1)


@pytest.mark.parametrize("n", [8, 9, 15, 16, 22, 23])
def test_split_predicts_every_token_once(n):
    made = run([{"n": n}], too_long="split")
    assert made.lengths.max() <= 8
    predicted = [t for i in range(len(made)) for t in made.example(i).input_ids[1:].tolist()]
    assert predicted == list(range(1, n))


def test_rows_without_trained_tokens_are_dropped_and_counted():
    made = run([{"n": 4}, {"n": 4, "trained": 0}, {"n": 20, "trained": 5}, {"n": 1}], too_long="truncate")
    assert made.places == ["row 1"]
    assert made.report.all_masked_rows == 3
    assert made.report.all_masked_places == ["row 2", "row 3", "row 4"]
    with pytest.raises(
        DataError, match="nothing to train on: 1 of 1 rows have no trained token after truncation: raise max_length"
    ):
        run([{"n": 20, "trained": 5}], too_long="truncate")
    with pytest.raises(DataError, match="1 of 1 rows have no trained token: check which part"):
        run([{"n": 4, "trained": 0}])
    with pytest.raises(DataError, match="2 of 2 rows are longer than max_length and were dropped"):
        run([{"n": 20}, {"n": 30}], too_long="drop")


def test_first_bad_row_stops_with_its_place():
    with pytest.raises(KeyError):
        run([{"n": 2}] * 100 + [{}])


def test_cache_is_used_only_for_equal_content(tmp_path):
    rows = [{"n": 3, "weight": 2.0}, {"n": 12}]
    options = {"too_long": "truncate", "cache_key": "k", "cache_dir": tmp_path}
    first = run(rows, **options)
    again = run(rows, **options)
    assert (first.from_cache, again.from_cache) == (False, True)
    assert again.report == first.report
    for i in range(2):
        a, b = first.example(i), again.example(i)
        assert a.place == b.place
        for name in ("input_ids", "trained", "weights"):
            assert np.array_equal(getattr(a, name), getattr(b, name))
    assert not run(rows, **options | {"cache_key": "other"}).from_cache
    assert not run(rows, **options, max_length=9).from_cache
    assert not run([*rows, {"n": 2}], **options).from_cache
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "nothing unfinished is left"


def test_damaged_cache_is_made_anew(tmp_path):
    options = {"cache_key": "k", "cache_dir": tmp_path}
    run([{"n": 3}], **options)
    (folder,) = tmp_path.iterdir()
    tokens = folder / "input_ids.npy"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.warns(UserWarning, match="cannot be read .* made anew"):
        assert run([{"n": 3}], **options).lengths.tolist() == [3]
    assert run([{"n": 3}], **options).from_cache


def test_unwritable_cache_costs_only_the_cache(tmp_path):
    blocked = tmp_path / "file" / "cache"
    blocked.parent.write_text("")
    with pytest.warns(UserWarning, match="could not be cached"):
        assert len(run([{"n": 3}], cache_key="k", cache_dir=blocked)) == 1


def test_interrupted_cache_is_not_taken(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.warns(UserWarning, match="No space left on device"):
        run([{"n": 3}], cache_key="k", cache_dir=tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not run([{"n": 3}], cache_key="k", cache_dir=tmp_path).from_cache


def test_mixture_becomes_ranges_of_examples():
    made = run([{"rows": [{"n": [2, 3]}, {"n": 1}, {"n": 4}], "weight": 2}, {"rows": [{"n": 5}], "weight": 0.5}])
    assert made.mixture == [(0, 3, 2.0), (3, 4, 0.5)]
    assert run([{"n": 2}]).mixture is None


def test_progress_reaches_the_end():
    seen = []
    run([{"n": 2}] * 200, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (200, 200)
