"""Examples of several documents, with a source, with targets of their own: cut, expanded, cached, batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastpt.data.batches import collate
from fastpt.data.example import Example
from fastpt.data.sources import load_rows
from fastpt.data.tokenised import LengthReport, apply_policy, tokenise


def pair(prompt: int, *answers: int, place: str = "row", **more) -> Example:
    """Token 1 .. prompt, then answers of 100s and 200s; the documents begin with the last token of the prompt."""
    parts = [np.arange(1, prompt)] + [np.r_[prompt, 100 * i + np.arange(n)] for i, n in enumerate(answers, 1)]
    trained = [np.zeros(prompt - 1, bool)] + [np.arange(n + 1) > 0 for n in answers]
    return Example(
        np.concatenate(parts).astype(np.int32), np.concatenate(trained), None, place,
        documents=tuple(n + 1 for n in answers), prefix=prompt - 1, count=1.0, **more,
    )  # fmt: skip


def test_documents_of_a_pair_read_the_prompt_each():
    batch = collate([pair(4, 2, 3), pair(2, 1, 1)])
    assert batch.input_ids[0].tolist() == [1, 2, 3, 4, 100, 101, 1, 2, 3, 4, 200, 201, 202, 1, 2, 100, 1, 2, 200]
    assert batch.cu_seqlens.tolist() == [0, 6, 13, 16, 19]
    assert batch.position_ids[0].tolist() == [*range(6), *range(7), *range(3), *range(3)]
    assert batch.targets[batch.kept].tolist() == [100, 101, 200, 201, 202, 100, 200]
    assert batch.kept_lengths.tolist() == [2, 3, 1, 1]
    assert batch.count == 2.0


def test_sums_of_documents_and_their_gradients():
    batch = collate([pair(4, 2, 3), pair(2, 1, 1)])
    values = torch.arange(7.0, dtype=torch.float64, requires_grad=True)
    sums = batch.per_document(values)
    assert sums.tolist() == [1, 9, 5, 6]
    sums.backward(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    assert values.grad.tolist() == [1, 1, 2, 2, 2, 3, 4]


def test_truncation_cuts_each_answer_and_drops_pairs_that_lose_one():
    whole = pair(4, 2, 5)
    assert (whole.longest, whole.tokens, whole.trained_tokens) == (9, 12, [2, 5])
    cut = whole.truncated(7)
    assert (cut.documents, cut.prefix, cut.longest) == ((3, 4), 3, 7)
    assert cut.expanded().input_ids.tolist() == [1, 2, 3, 4, 100, 101, 1, 2, 3, 4, 200, 201, 202]
    assert not cut.is_empty
    for length in (4, 3):  # no room for an answer, no room for the prompt
        report = LengthReport()
        assert apply_policy([whole], length, "truncate", report) == []
        assert report.all_masked_rows == 1


def test_what_is_only_read_keeps_its_closing_token():
    untrained = Example(np.arange(9, dtype=np.int32), np.zeros(9, bool), None, "row", count=1.0)
    assert untrained.truncated(4).input_ids.tolist() == [0, 1, 2, 8]
    assert not untrained.is_empty
    classes = np.array([-100, 1, 2, -100], np.int64)
    tagged = Example(np.arange(4, dtype=np.int32), np.zeros(4, bool), None, "row", targets=classes)
    assert (tagged.trained_tokens, tagged.truncated(3).targets.tolist()) == ([2], [-100, 1, -100])
    both = Example(np.arange(3, dtype=np.int32), np.ones(3, bool), None, "row", source=np.arange(8, dtype=np.int32))
    assert (both.longest, both.tokens, both.truncated(4).source.tolist()) == (8, 11, [0, 1, 2, 7])


def test_targets_are_taken_as_they_are_and_sources_packed():
    classes = [np.array([-100, 1], np.int64), np.array([0, -100, 2], np.int64)]
    examples = [
        Example(np.arange(len(c), dtype=np.int32), np.zeros(len(c), bool), None, "row", targets=c, source=np.arange(n))
        for c, n in zip(classes, (4, 2), strict=True)
    ]
    batch = collate(examples)
    assert (batch.kept.tolist(), batch.targets.tolist()) == ([1, 2, 4], [-100, 1, 0, -100, 2])
    assert (batch.kept_lengths.tolist(), batch.count) == ([1, 2], 3.0)
    assert (batch.source.cu_seqlens.tolist(), batch.source.position_ids[0].tolist()) == ([0, 4, 6], [0, 1, 2, 3, 0, 1])
    assert batch.tokens == 11
    assert torch.equal(batch.to("cpu").source.input_ids, batch.source.input_ids)


@pytest.fixture
def rows():
    return load_rows([{"n": n} for n in (2, 3, 1)])


def prepare(row, place):
    fields = {"margin": np.array([row["n"] / 2], np.float32)}
    if row["n"] == 1:
        return [
            Example(np.arange(4, dtype=np.int32), np.ones(4, bool), None, place, source=np.arange(3, dtype=np.int32))
        ]
    return [pair(4, row["n"], 1, place=place, fields=fields)]


def test_the_cache_gives_back_the_same_examples(rows, tmp_path):
    settings = {"max_length": 16, "too_long": "error", "cache_key": "k", "cache_dir": tmp_path}
    made, read = (tokenise(rows, prepare, **settings) for _ in range(2))
    assert (made.from_cache, read.from_cache) == (False, True)
    assert made.lengths.tolist() == [3 + 3 + 2, 3 + 4 + 2, 4 + 3]
    for data in (made, read):
        for i, row in enumerate([{"n": 2}, {"n": 3}, {"n": 1}]):
            (wanted,), got = prepare(row, data.place(i)), data.example(i)
            assert got.input_ids.tolist() == wanted.input_ids.tolist()
            assert (got.documents, got.prefix, got.count, got.place) == (
                wanted.documents, wanted.prefix, wanted.count, wanted.place
            )  # fmt: skip
            assert (got.source is None) == (wanted.source is None)
            assert {k: v.tolist() for k, v in got.fields.items()} == {k: v.tolist() for k, v in wanted.fields.items()}
            assert data.row(i) == row


def test_fields_may_be_added(rows):
    data = tokenise(rows, prepare, max_length=16, too_long="error", cache_key=None, cache_dir=None)
    data.set_field("reference", [np.array([1.0, 2.0]), np.array([3.0]), np.array([4.0])])
    assert [data.example(i).fields["reference"].tolist() for i in range(3)] == [[1.0, 2.0], [3.0], [4.0]]
    assert data.example(1).fields["margin"].tolist() == [1.5]


def test_targets_for_some_rows_only_are_the_objectives_mistake(rows):
    def careless(row, place):
        targets = np.zeros(2, np.int64) if row["n"] == 3 else None
        return [Example(np.arange(2, dtype=np.int32), np.ones(2, bool), None, place, targets=targets)]

    with pytest.raises(ValueError, match="targets to all of its examples or to none"):
        tokenise(rows, careless, max_length=16, too_long="error", cache_key=None, cache_dir=None)
