"""The model as it was before training: its log-probabilities of answers, and a copy where it cannot answer as that itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fastpt.data.batches import Batch
from fastpt.data.example import Example
from fastpt.data.pack import best_fit
from fastpt.data.tokenised import Tokenised
from fastpt.errors import ConfigError
from fastpt.objectives.base import Scorer

REFERENCE = "reference"  # the field of log-probabilities under the reference, one for each answer


def answers_logprobs(model: Scorer, batch: Batch) -> Tensor:
    """Log-probability of each document's trained tokens, summed; float32 [D]."""
    return batch.per_document(model.stats(model.hidden(batch), batch).logprob[batch.kept])


def reference_logprobs(model: Scorer, batch: Batch) -> Tensor:
    """The same under the reference, [D]: computed before (`keep_reference`), or by switching a fresh adapter off.

    Raises: ConfigError where neither can be.
    """
    if REFERENCE in batch.fields:
        return batch.fields[REFERENCE]
    if not model.has_reference:
        raise ConfigError(
            "the reference of these losses is the model before training: train a fresh adapter on it, or do not "
            "stream the data, so that its log-probabilities can be computed first"
        )
    with model.reference():
        return answers_logprobs(model, batch)


def keep_reference(model: Scorer, data: Tokenised, micro_tokens: int, say: Callable[[str], None]) -> None:
    """Give each example its answers' log-probabilities under the model as it is, unless an adapter can be switched off."""
    if not model.has_reference:
        say(f"log-probabilities of {len(data)} rows under the reference, once")
        data.set_field(REFERENCE, documents_values(model, data.lengths, data.example, micro_tokens))


def documents_values(
    model: Scorer,
    lengths: Sequence[int] | np.ndarray,
    example: Callable[[int], Example],
    micro_tokens: int,
    read: Callable[[Scorer, Batch], Tensor] = answers_logprobs,
) -> list[np.ndarray]:
    """What `read` gives for the documents of examples of some lengths, float32 [documents] each; without a gradient."""
    found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(lengths)
    with model.frozen():
        for pack in best_fit(lengths, micro_tokens):
            examples = [example(i) for i in pack]
            values = read(model, model.batch(examples)).cpu().numpy()
            ends = np.cumsum([len(one.bounds) for one in examples])
            for i, part in zip(pack, np.split(values, ends[:-1]), strict=True):
                found[i] = part
    return found


def frozen_copy(model: Any) -> Any:
    """The model as it is now, fused; what is not trained is shared with it."""
    from fastpt.fusion import fuse

    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    twin = copy.deepcopy(model, shared).eval().requires_grad_(False)
    fuse(twin)
    return twin
