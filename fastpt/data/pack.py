"""Which examples go together: best-fit packs over the whole set, and the steps and micro-batches of an epoch.

Everything here is a pure function of lengths and seeds, so that a resumed run plans what the first one planned.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Mixture = Sequence[tuple[int, int, float]]  # (start, stop, times per epoch) over example indices


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Indices packed by best-fit decreasing: each next longest goes where it leaves the least room.

    An example longer than the capacity gets a pack of its own. Equal lengths are taken in the order given.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room -> packs that have it
    rooms = 0  # bit r is set when a pack has room r, so the least room that fits is one shift and one lowest bit
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        fitting = rooms >> length
        if fitting == 0:
            packs.append([index])
            pack, room = len(packs) - 1, capacity
        else:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            packs[pack].append(index)
            if not with_room[room]:
                rooms ^= 1 << room
        if (left := room - length) > 0:
            with_room.setdefault(left, []).append(pack)
            rooms |= 1 << left
    return packs


def epoch_indices(count: int, mixture: Mixture | None, *, seed: int, epoch: int) -> np.ndarray:
    """The examples that an epoch shows, in order: all of them, or each part of a mixture as often as its weight says.

    The fraction of a weight is a window over one seeded permutation that moves on with the epoch, so that in the long
    run every example is seen equally often.
    """
    if mixture is None:
        return np.arange(count)
    chosen = []
    for part, (start, stop, weight) in enumerate(mixture):
        size = stop - start
        whole = int(weight)
        extra = round((weight - whole) * size)
        order = np.random.default_rng([seed, part]).permutation(size)
        window = order[(np.arange(extra) + epoch * extra) % size] if size else order
        chosen += [start + np.tile(np.arange(size), whole), start + np.sort(window)]
    return np.concatenate(chosen)


def plan_epoch(
    lengths: Sequence[int] | np.ndarray,
    *,
    batch_rows: int | None,
    batch_tokens: int | None,
    micro_tokens: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    mixture: Mixture | None = None,
) -> list[list[list[int]]]:
    """Steps -> micro-batches -> example indices; without a mixture every example exactly once.

    With `batch_rows` a step is that many examples in seeded order (the last may be short), packed into micro-batches
    of at most `micro_tokens`; else the whole set is packed best-fit and a step is as many packs as `batch_tokens` holds.
    An example longer than `micro_tokens` is a micro-batch of its own.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    rng = np.random.default_rng([seed, epoch])
    indices = epoch_indices(len(lengths), mixture, seed=seed, epoch=epoch)
    if shuffle:
        indices = rng.permutation(indices)
    if batch_rows is not None:
        steps = [indices[at : at + batch_rows] for at in range(0, len(indices), batch_rows)]
        return [_packed(lengths, step, micro_tokens) for step in steps]
    batch_tokens = batch_tokens or micro_tokens
    packs = _packed(lengths, indices, min(micro_tokens, batch_tokens))
    if shuffle:
        packs = [packs[i] for i in rng.permutation(len(packs))]
    return _grouped(packs, [int(lengths[pack].sum()) for pack in packs], batch_tokens)


def _packed(lengths: np.ndarray, indices: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit packs of some examples, in the order of their first example."""
    packs = sorted((sorted(pack) for pack in best_fit(lengths[indices], capacity)), key=lambda pack: pack[0])
    return [indices[pack].tolist() for pack in packs]


def _grouped(packs: list[list[int]], tokens: list[int], batch_tokens: int) -> list[list[list[int]]]:
    """Packs taken in order into steps of at most `batch_tokens`, at least one pack a step."""
    steps: list[list[list[int]]] = []
    held = batch_tokens
    for pack, count in zip(packs, tokens, strict=True):
        if held + count > batch_tokens:
            steps.append([])
            held = 0
        steps[-1].append(pack)
        held += count
    return steps
