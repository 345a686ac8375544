"""A class for each word (named entities, parts of speech); the loss is that of transformers' own models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastpt.data.batches import Batch
from fastpt.data.example import IGNORED, Example
from fastpt.data.files import Row
from fastpt.data.labels import Classes, read_tagged, survey_tags
from fastpt.data.render import encode_words
from fastpt.errors import DataError
from fastpt.objectives._class_scores import (
    class_counts,
    entity_counts,
    entity_types,
    f1_scores,
    macro_f1,
    precision_recall_f1,
)
from fastpt.objectives._labelled import Labelled
from fastpt.objectives.base import Prepare, Scorer, ratio


class Tag(Labelled):
    """Rows have `tokens`, a list of words, and `tags`, one for each of them. A word's first token carries its tag."""

    task: ClassVar[str] = "token"

    name: Literal["tag"] = "tag"

    def _survey(self, rows: Iterable[tuple[Row, str]], columns: dict[str, str] | None) -> Classes:
        return survey_tags(rows, columns, self.labels)

    def bind(self, tokenizer: Any, rows: Any, columns: dict[str, str] | None) -> Prepare:
        def prepare(row: dict[str, Any], place: str) -> list[Example]:
            tagged = read_tagged(row, place, columns)
            ids, firsts = encode_words(tokenizer, tagged.words)
            tags = np.array([self._classes.index(tag, place) for tag in tagged.tags], np.int64)
            is_met = firsts >= 0  # the normaliser may leave nothing of a word
            if not is_met.any():
                raise DataError(f"{place} has no word that the tokenizer knows how to read: mend or delete the row")
            targets = np.full(len(ids), IGNORED, np.int64)
            targets[firsts[is_met]] = tags[is_met]
            weights = None
            if self._weights is not None:
                weights = np.ones(len(ids), np.float32)
                weights[firsts[is_met]] = np.array(self._weights, np.float32)[tags[is_met]]
            return [Example(ids, np.zeros(len(ids), bool), weights, place, targets=targets)]

        return prepare

    def loss(self, model: Scorer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits, labels = self._scored(model, batch)
        right = (logits.argmax(-1) == labels).sum().float()
        return self._loss(logits, labels), {"accuracy": torch.stack([right, torch.full_like(right, len(labels))])}

    def _scored(self, model: Scorer, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [K, C] and classes [K] of the words."""
        hidden = model.hidden(batch).index_select(0, batch.kept)
        return model.token_logits(hidden), batch.targets[batch.kept]

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = self.weights_on(logits.device)
        return F.cross_entropy(logits, labels, weight=weights, label_smoothing=self.label_smoothing, reduction="sum")

    def evaluate(self, model: Scorer, batch: Batch) -> dict[str, Any]:
        return self.measure(*self._scored(model, batch), batch.kept_lengths.tolist())

    def measure(self, logits: Tensor, labels: Tensor, lengths: list[int]) -> dict[str, Any]:
        """Sums over the words of sentences of some lengths; logits [K, C], labels [K]."""
        names, best = self._classes.names, logits.argmax(-1)
        found: dict[str, Any] = {"loss": self._loss(logits, labels), "counts": class_counts(best, labels, len(names))}
        if types := entity_types(names):
            tags = ([names[number] for number in side.tolist()] for side in (best, labels))
            found["entities"] = sum(
                entity_counts(ours, theirs, types)
                for ours, theirs in zip(*(_split(side, lengths) for side in tags), strict=True)
            )
        return found

    def summarise(self, sums: dict[str, Any], count: float) -> dict[str, float]:
        """Of BIO tags the exact entities count: precision, recall, F1 over all of them, and the F1 of each type."""
        counts = sums["counts"].cpu()
        found = {"loss": ratio(sums["loss"], count).item(), "accuracy": precision_recall_f1(counts)[1]}
        if "entities" not in sums:
            return found | {"macro_f1": macro_f1(counts)}
        precision, recall, f1 = precision_recall_f1(sums["entities"])
        types = entity_types(self._classes.names)
        each = zip(types, f1_scores(sums["entities"]).tolist(), strict=True)
        return found | {"precision": precision, "recall": recall, "f1": f1} | {f"f1_{name}": one for name, one in each}


def _split(values: list[str], lengths: list[int]) -> Iterator[list[str]]:
    rest = iter(values)
    return (list(islice(rest, length)) for length in lengths)
