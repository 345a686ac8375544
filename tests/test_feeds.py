"""Runs over mixtures and streams: weights per epoch, max_steps, exact resume in the middle of a stream."""

import json

import pytest
import torch

import fastpt
from fastpt.errors import ConfigError
from tests.runs import chat_rows, run_settings


@pytest.fixture
def stream(tmp_path):
    path = tmp_path / "stream.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(30)))
    return {"path": str(path), "streaming": True, "window_rows": 8}


def _weights(run):
    return [p.detach().clone() for p in run.model.parameters() if p.requires_grad]


def test_a_stream_trains_and_resumes_bit_for_bit(tmp_path, stream):
    settings = {"data": stream, "max_steps": 8, "save_steps": 3, "keep_checkpoints": 5}
    straight = fastpt.train(**run_settings(tmp_path / "a", **settings))
    assert straight.metrics["steps"] == 8
    middle = straight.path / "checkpoints/step-00000003"
    resumed = fastpt.train(**run_settings(tmp_path / "b", **settings, resume=middle))
    for a, b in zip(_weights(straight), _weights(resumed), strict=True):
        assert torch.equal(a, b)


def test_a_stream_goes_round(tmp_path, stream):
    run = fastpt.train(**run_settings(tmp_path, data=stream, max_steps=20))
    assert run.metrics["steps"] == 20
    assert run.history[-1]["epoch"] >= 2


def test_a_stream_needs_max_steps_and_cannot_be_evaluated_on(tmp_path, stream):
    with pytest.raises(ConfigError, match="max_steps"):
        fastpt.train(**run_settings(tmp_path, data=stream, max_steps=None))
    with pytest.raises(ConfigError, match="eval_data cannot be streaming"):
        fastpt.train(**run_settings(tmp_path, eval_data=stream))


def test_a_mixture_shows_each_part_as_often_as_its_weight(tmp_path):
    parts = [{"rows": chat_rows(4, seed=1), "weight": 2.0}, {"rows": chat_rows(6, seed=2), "weight": 0.5}]
    run = fastpt.train(**run_settings(tmp_path, data=parts, batch_rows=1, max_steps=None, epochs=1))
    assert run.metrics["steps"] == 2 * 4 + 3
