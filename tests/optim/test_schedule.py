"""Schedules: warm-up, shape, ends."""

import itertools

import pytest

from fastpt.config import OptimConfig
from fastpt.optim.schedule import lr_scale, warmup_steps


def _curve(total=100, **settings):
    return [lr_scale(OptimConfig(**settings), step, total) for step in range(total)]


def test_warmup_is_a_share_or_a_number():
    assert warmup_steps(OptimConfig(warmup=0.1), 50) == 5
    assert warmup_steps(OptimConfig(warmup=7), 50) == 7
    curve = _curve(warmup=10, schedule="constant")
    assert curve[0] == pytest.approx(1 / 11)
    assert all(a < b for a, b in itertools.pairwise(curve[:11]))
    assert curve[10:] == [1.0] * 90


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_falls_to_min_lr(schedule):
    curve = _curve(warmup=0, schedule=schedule, min_lr=0.1)
    assert curve[0] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(curve))
    assert 0.1 < curve[-1] < 0.2
    assert lr_scale(OptimConfig(warmup=0, schedule=schedule, min_lr=0.1), 100, 100) == pytest.approx(0.1)


def test_shapes_at_the_middle():
    assert _curve(warmup=0, schedule="cosine")[50] == pytest.approx(0.5)
    assert _curve(warmup=0, schedule="linear")[50] == pytest.approx(0.5)
    assert _curve(warmup=0, schedule="wsd")[50] == 1.0
