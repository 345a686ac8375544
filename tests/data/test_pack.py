"""Packs hold every example once, within capacity, nearly full; an epoch's plan follows its seed."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from fastpt.data.pack import best_fit, epoch_indices, plan_epoch


def realistic_lengths(count, capacity, seed=0):
    """Log-normal lengths with a long tail, as instruction data has them."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(5.3, 0.8, count).astype(int) + 8, 1, capacity)


@pytest.mark.parametrize("seed", range(8))
def test_packs_are_a_partition_within_capacity(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 300))
    lengths = rng.integers(1, capacity + 20, int(rng.integers(0, 400)))
    packs = best_fit(lengths, capacity)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    for pack in packs:
        assert len(pack) == 1 or lengths[pack].sum() <= capacity
    # Best fit leaves at most one pack half empty.
    assert sum(lengths[pack].sum() * 2 <= capacity for pack in packs) <= 1


def test_each_goes_where_it_leaves_the_least_room():
    assert best_fit([6, 5, 5, 4], 10) == [[0, 3], [1, 2]]
    assert best_fit([7, 6, 3, 3], 10) == [[0, 2], [1, 3]]
    assert best_fit([12, 3], 10) == [[0], [1]]
    assert best_fit([], 10) == []


@pytest.mark.parametrize("capacity", [1024, 2048, 4096])
def test_realistic_sets_fill_97_percent(capacity):
    lengths = realistic_lengths(2000, capacity)
    packs = best_fit(lengths, capacity)
    assert lengths.sum() / (len(packs) * capacity) >= 0.97


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch", [{"batch_rows": 7, "batch_tokens": None}, {"batch_rows": None, "batch_tokens": 4096}])
def test_epoch_shows_every_example_once(batch, shuffle):
    lengths = realistic_lengths(500, 2048)
    lengths[17] = 3000  # longer than a micro-batch
    plan = plan_epoch(lengths, **batch, micro_tokens=1024, seed=1, epoch=0, shuffle=shuffle)
    assert sorted(i for step in plan for micro in step for i in micro) == list(range(500))
    assert all(len(micro) == 1 or lengths[micro].sum() <= 1024 for step in plan for micro in step)
    sizes = [sum(len(micro) for micro in step) for step in plan]
    if batch["batch_rows"]:
        assert sizes[:-1] == [7] * 71
        assert sizes[-1] == 3
    else:
        tokens = [sum(lengths[micro].sum() for micro in step) for step in plan]
        assert all(count <= 4096 for count in tokens)
        assert np.mean(tokens[:-1]) > 0.9 * 4096
    assert plan == plan_epoch(lengths, **batch, micro_tokens=1024, seed=1, epoch=0, shuffle=shuffle)
    other = plan_epoch(lengths, **batch, micro_tokens=1024, seed=1, epoch=1, shuffle=shuffle)
    assert (plan != other) == shuffle


def test_rows_stay_in_order_without_shuffle():
    plan = plan_epoch([5] * 10, batch_rows=4, batch_tokens=None, micro_tokens=10, seed=0, epoch=0, shuffle=False)
    assert plan == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]]


def test_same_rows_per_step_whatever_the_micro_batch():
    lengths = realistic_lengths(64, 512)
    options = {"batch_rows": 8, "batch_tokens": None, "seed": 3, "epoch": 2}
    a, b = (plan_epoch(lengths, **options, micro_tokens=micro) for micro in (512, 4096))
    assert [sorted(chain(*step)) for step in a] == [sorted(chain(*step)) for step in b]


def test_mixture_weights_are_times_per_epoch():
    mixture = [(0, 10, 2.0), (10, 110, 0.25), (110, 114, 1.5)]
    counts = np.zeros(114, int)
    for epoch in range(4):
        indices = epoch_indices(114, mixture, seed=5, epoch=epoch)
        counts += np.bincount(indices, minlength=114)
        assert len(indices) == 20 + 25 + 6
    assert (counts[:10] == 8).all()
    assert (counts[10:110] == 1).all(), "over four epochs a quarter at a time shows everything once"
    assert (counts[110:] == 6).all()
    plan = plan_epoch([3] * 114, batch_rows=6, batch_tokens=None, micro_tokens=30, seed=5, epoch=0, mixture=mixture)
    assert sum(len(micro) for step in plan for micro in step) == 51
