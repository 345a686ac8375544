"""Packed batches for the model, and the planning of streamed sets, whose rows are never all at hand.

A batch is one row of documents end to end without padding; `cu_seqlens` keeps them apart, and the first token of a
document is never predicted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpt.data.example import IGNORED, Example
from fastpt.data.pack import plan_epoch
from fastpt.data.prefix import shared_keys
from fastpt.data.sources import StreamedRows
from fastpt.data.tokenised import LengthReport, apply_policy, check_policy
from fastpt.errors import DataError


@dataclass
class Packed:
    """Documents end to end without padding."""

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, from 0 in each document
    cu_seqlens: Tensor  # [N + 1] int32
    max_seqlen: int

    def to(self, device: torch.device | str) -> Any:
        """The same on a device; copies of pinned memory do not wait."""
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: _moved(one, device) for name, one in value.items()}
    return value.to(device) if isinstance(value, Packed) else value


@dataclass
class Batch(Packed):
    """One micro-batch; `count` is the number of trained tokens, or the sum of their weights, or what its examples say.

    Where prompts are there once for several documents, a prompt is a sequence of cu_seqlens too, and the queries of each
    sequence see the tokens `keys` (prefix.shared_keys).
    """

    targets: Tensor  # [T] int64: the token that position t must predict, -100 where none
    kept: Tensor  # [K] int64: the positions with a target
    kept_lengths: Tensor  # [D] int64: how many of them each document has
    stops: Tensor  # [D] int64: where each document ends
    weights: Tensor | None  # [K] float32
    count: float
    places: list[str]
    tokens: int
    source: Packed | None = None  # the encoder's side
    keys: Tensor | None = None  # [Tk] int64
    cu_seqlens_k: Tensor | None = None  # [N + 1] int32
    max_seqlen_k: int | None = None
    fields: dict[str, Tensor] = field(default_factory=dict)

    def per_document(self, values: Tensor) -> Tensor:
        """Sums of [K] values over the kept positions of each document, [D]; in one order, so deterministic."""
        return torch.segment_reduce(values, "sum", lengths=self.kept_lengths, unsafe=True, initial=0)


def collate(examples: list[Example], shares_prefix: bool = False) -> Batch:
    """The examples end to end as one batch, targets shifted within each document.

    A prompt that several documents share is written before each of them, or once, for a model that `shares_prefix`.
    """
    is_shared = shares_prefix and any(example.shares for example in examples)
    examples = examples if is_shared else [example.expanded() for example in examples]
    ids = np.concatenate([example.input_ids for example in examples])
    offsets = np.cumsum([0, *(len(example.input_ids) for example in examples)])
    bounds = np.concatenate([offset + example.bounds for offset, example in zip(offsets, examples, strict=False)])
    starts, stops = bounds.T  # of the documents
    shared: dict[str, Any] = {}
    if is_shared:
        packed, shared = _sharing(ids, examples)
    else:
        packed = _packed(ids, stops - starts)
    if examples[0].targets is not None:
        targets = np.concatenate([example.targets for example in examples])  # type: ignore[misc]
        kept = target_at = np.flatnonzero(targets != IGNORED)  # [K]
    else:
        trained = np.concatenate([example.trained for example in examples])
        trained[starts[stops > starts]] = False  # nothing comes before the first token of a document
        target_at = np.flatnonzero(trained)
        kept = target_at - 1
        targets = np.full(len(trained), IGNORED, np.int64)
        targets[kept] = packed.input_ids[0].numpy()[target_at]
    weights = None
    if any(example.weights is not None for example in examples):
        ones = [np.ones(len(e.input_ids), np.float32) if e.weights is None else e.weights for e in examples]
        weights = np.concatenate(ones)[target_at].astype(np.float32)
    sources = [example.source for example in examples if example.source is not None]
    return Batch(
        **vars(packed),
        **shared,
        targets=torch.from_numpy(targets),
        kept=torch.from_numpy(kept),
        kept_lengths=torch.from_numpy(np.searchsorted(kept, stops) - np.searchsorted(kept, starts)),
        stops=torch.from_numpy(stops),
        weights=None if weights is None else torch.from_numpy(weights),
        count=_count(examples, len(kept), weights),
        places=[example.place for example in examples],
        tokens=sum(example.tokens for example in examples),
        source=_packed(np.concatenate(sources), np.array([len(one) for one in sources])) if sources else None,
        fields={
            name: torch.from_numpy(np.concatenate([example.fields[name] for example in examples]))
            for name in examples[0].fields
        },
    )


def _packed(ids: np.ndarray, lengths: np.ndarray) -> Packed:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Packed(
        input_ids=torch.from_numpy(ids.astype(np.int64))[None],
        position_ids=torch.from_numpy(np.arange(len(ids)) - np.repeat(starts[:-1], lengths))[None],
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_seqlen=int(lengths.max(initial=0)),
    )


def _sharing(ids: np.ndarray, examples: list[Example]) -> tuple[Packed, dict[str, Any]]:
    """The same with prompts there once, and the keys that its sequences see."""
    arrays = shared_keys([e.prefix for e in examples], [e.documents or (len(e.input_ids),) for e in examples])
    cu_seqlens, keys, cu_seqlens_k, positions = map(torch.from_numpy, arrays)
    longest, longest_k = (int(bounds.diff().max()) for bounds in (cu_seqlens, cu_seqlens_k))
    packed = Packed(torch.from_numpy(ids.astype(np.int64))[None], positions[None], cu_seqlens, longest)
    return packed, {"keys": keys, "cu_seqlens_k": cu_seqlens_k, "max_seqlen_k": longest_k}


def _count(examples: list[Example], kept: int, weights: np.ndarray | None) -> float:
    if examples[0].count is not None:
        return float(sum(example.count or 0.0 for example in examples))
    return float(kept if weights is None else weights.sum(dtype=np.float64))


class StreamPlanner:
    """Steps of micro-batches from a stream, packed within windows of rows; the cursor resumes between two steps.

    What does not fill the last step of a window is carried into the next one, so that all steps but the last are full.
    `state()` after a step, given back to `seek`, goes on with the very next step.
    """

    def __init__(
        self,
        rows: StreamedRows,
        prepare: Callable[[dict, str], list[Example]],
        *,
        max_length: int,
        too_long: str,
        batch_rows: int | None,
        batch_tokens: int | None,
        micro_tokens: int,
        seed: int,
        window_rows: int = 2048,
    ):
        check_policy(max_length, too_long)
        self._rows, self._prepare = rows, prepare
        self._max_length, self._too_long = max_length, too_long
        self._batch: dict[str, Any] = {
            "batch_rows": batch_rows,
            "batch_tokens": batch_tokens,
            "micro_tokens": micro_tokens,
        }
        self._seed, self._window_rows = seed, window_rows
        self.report = LengthReport()
        self._state: dict[str, Any] = {"epoch": 0, "window": 0, "row": 0, "carried": [], "step": 0}

    def state(self) -> dict[str, Any]:
        """The cursor, plain enough for JSON."""
        return dict(self._state)

    def seek(self, state: dict[str, Any]) -> None:
        """Go on, with the next iteration, where `state()` was taken."""
        self._state = dict(state)

    def first_example(self) -> Example:
        """The first example of the stream, for looking at; the cursor stays."""
        return next(example for row, place in self._rows for example in self._prepare(row, place))

    def __iter__(self) -> Iterator[list[list[Example]]]:
        """Steps of one epoch; iterating again goes on with the next epoch."""
        state = self._state
        wanted = {(row, number) for row, number in state["carried"]}
        stream = self._rows.iterate(min([state["row"], *(row for row, _ in wanted)]))
        held: list[tuple[tuple[int, int], Example]] = []
        is_last = False
        while not is_last:
            next_row = self._read_window(stream, held, wanted)
            is_last = next_row is None
            steps, left = self._plan([example for _, example in held], is_last)
            for number in range(state["step"], len(steps)):
                state["step"] = number + 1
                yield [[held[i][1] for i in micro] for micro in steps[number]]
            held = [held[i] for i in left]
            carried = [list(key) for key, _ in held]
            state.update(window=state["window"] + 1, row=next_row, carried=carried, step=0)
        state.update(epoch=state["epoch"] + 1, window=0, row=0, carried=[], step=0)

    def _read_window(self, stream: Iterator[tuple[int, dict, str]], held: list, wanted: set) -> int | None:
        """Add a window of rows to `held`, and of rows before it what was carried; the row after it, None at the end."""
        first = self._state["row"]
        carried_rows = {row for row, _ in wanted}
        window = list(islice(stream, first + self._window_rows - min([first, *carried_rows])))
        taken = [item for item in window if item[0] >= first or item[0] in carried_rows]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            prepared = list(pool.map(lambda item: self._prepare(item[1], item[2]), taken))
        for (row, _, _), examples in zip(taken, prepared, strict=True):
            kept = apply_policy(examples, self._max_length, self._too_long, self.report)
            held += [((row, n), e) for n, e in enumerate(kept) if row >= first or (row, n) in wanted]
        wanted.clear()
        if self._too_long == "error" and self.report.too_long:
            raise DataError(self.report.why_too_long(self._rows.name, self._max_length))
        if window and window[-1][0] + 1 == first + self._window_rows:
            return first + self._window_rows
        if self.report.examples == 0:
            raise DataError(f"{self._rows.name} gives nothing to train on: {self.report.why_nothing()}")
        return None

    def _plan(self, examples: list[Example], is_last: bool) -> tuple[list[list[list[int]]], list[int]]:
        lengths = [len(example.input_ids) for example in examples]
        parts = (self._seed, self._state["epoch"], self._state["window"])
        seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
        steps = plan_epoch(lengths, **self._batch, seed=seed, epoch=0)
        left = [] if is_last or not steps else [i for micro in steps.pop() for i in micro]
        return steps, sorted(left)
