"""Batches keep documents apart and shift targets within them; streams plan, carry over and resume exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastpt.data.batches import StreamPlanner, collate
from fastpt.data.example import Example
from fastpt.data.sources import load_rows
from fastpt.errors import DataError


def example(ids, trained, weights=None, place="row"):
    weights = None if weights is None else np.array(weights, np.float32)
    return Example(np.array(ids, np.int32), np.array(trained, bool), weights, place)


def test_two_documents():
    batch = collate([example([10, 11, 12], [1, 0, 1], place="a:1"), example([20, 21], [1, 1], place="a:2")])
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 3
    # Position 2 would predict 20, the first token of the next document: never.
    assert batch.targets.tolist() == [-100, 12, -100, 21, -100]
    assert batch.kept.tolist() == [1, 3]
    assert (batch.weights, batch.count, batch.tokens) == (None, 2.0, 5)
    assert batch.places == ["a:1", "a:2"]
    assert torch.equal(batch.to("cpu").targets, batch.targets)


def test_weights_belong_to_the_predicted_token():
    batch = collate([example([1, 2, 3], [0, 1, 1], [9, 0.5, 2]), example([4, 5], [0, 1])])
    assert batch.weights.tolist() == [0.5, 2, 1]
    assert batch.count == 3.5


@pytest.mark.parametrize("seed", range(5))
def test_batch_of_many_equals_batches_of_one(seed):
    rng = np.random.default_rng(seed)
    examples = [example(rng.integers(0, 99, n), rng.random(n) < 0.5) for n in rng.integers(1, 9, 12)]
    batch, singles = collate(examples), [collate([e]) for e in examples]
    assert torch.equal(batch.targets, torch.cat([single.targets for single in singles]))
    assert torch.equal(batch.position_ids, torch.cat([single.position_ids for single in singles], 1))
    assert batch.count == sum(single.count for single in singles)
    assert torch.equal(batch.kept, torch.nonzero(batch.targets != -100)[:, 0])


def test_collate_leaves_its_examples_alone():
    made = example([1, 2], [1, 1])
    collate([made])
    assert made.trained.tolist() == [True, True]


# Streams


def prepare(row, place):
    return [example([row["id"]] * n, [1] * n, place=f"{place}#{k}") for k, n in enumerate(row["n"])]


@pytest.fixture
def stream(jsonl):
    rng = np.random.default_rng(0)
    rows = [{"id": i, "n": rng.integers(2, 12, 1 + i % 2).tolist()} for i in range(100)]
    return load_rows(jsonl(*rows), streaming=True)


def planner(stream, state=None, **options):
    options = {"batch_rows": None, "batch_tokens": 48, "micro_tokens": 24, "too_long": "error"} | options
    made = StreamPlanner(stream, prepare, max_length=16, seed=0, window_rows=16, **options)
    if state is not None:
        made.seek(state)
    return made


def steps_of(planned):
    return [[[e.place for e in micro] for micro in step] for step in planned]


@pytest.mark.parametrize("batch", [{}, {"batch_rows": 6, "batch_tokens": None}])
def test_stream_shows_everything_once_in_full_steps(stream, batch):
    steps = steps_of(planner(stream, **batch))
    shown = [place for step in steps for micro in step for place in micro]
    assert len(shown) == len(set(shown)) == 150
    if batch:
        assert {sum(map(len, step)) for step in steps[:-1]} == {6}


@pytest.mark.parametrize("batch", [{}, {"batch_rows": 6, "batch_tokens": None}])
def test_stream_resumes_at_every_step(stream, batch):
    whole = planner(stream, **batch)
    straight, states = [], []
    for _ in range(2):
        for step in whole:
            straight.append([[e.place for e in micro] for micro in step])
            states.append(json.loads(json.dumps(whole.state())))
    assert straight[: len(straight) // 2] != straight[len(straight) // 2 :], "epochs differ"
    for at in range(0, len(straight), 5):
        resumed = planner(stream, states[at], **batch)
        rest = steps_of(resumed)
        expected = straight[at + 1 : at + 1 + len(rest)]
        assert rest == expected, f"after step {at}"


def test_stream_applies_the_length_policy(jsonl, stream):
    long = load_rows(jsonl({"id": 1, "n": [4]}, {"id": 2, "n": [30]}, name="long.jsonl"), streaming=True)
    with pytest.raises(DataError, match=r"1 of 2 rows .*longer than max_length=16"):
        list(planner(long))
    dropping = planner(long, too_long="drop")
    assert [[place.split(":")[-1] for place in micro] for step in steps_of(dropping) for micro in step] == [["1#0"]]
    assert dropping.report.dropped_rows == 1
    with pytest.raises(DataError, match="nothing to train on: 1 of 1 rows are longer"):
        list(planner(load_rows(jsonl({"id": 2, "n": [30]}, name="only.jsonl"), streaming=True), too_long="drop"))
    with pytest.raises(DataError, match="nothing to train on: it has no rows"):
        list(planner(load_rows(jsonl(name="none.jsonl"), streaming=True)))
