"""Classification of texts: one class or several of them, or a number; the loss is that of transformers' own models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastpt.data.batches import Batch
from fastpt.data.example import Example
from fastpt.data.files import Row
from fastpt.data.labels import REGRESSION, SINGLE, Classes, number, read_labelled, survey_labels
from fastpt.data.render import encode_text
from fastpt.objectives._class_scores import (
    class_counts,
    label_counts,
    macro_f1,
    precision_recall_f1,
    regression_scores,
)
from fastpt.objectives._labelled import Labelled
from fastpt.objectives.base import Prepare, Scorer, ratio


class Classify(Labelled):
    """Rows have `text` (and `text_pair`) and `label`: a class, a list of classes, or a float, which is a regression target."""

    task: ClassVar[str] = "sequence"

    name: Literal["classify"] = "classify"
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None

    def _survey(self, rows: Iterable[tuple[Row, str]], columns: dict[str, str] | None) -> Classes:
        return survey_labels(rows, columns, self.problem_type, self.labels)

    def bind(self, tokenizer: Any, rows: Any, columns: dict[str, str] | None) -> Prepare:
        classes = self._classes

        def prepare(row: dict[str, Any], place: str) -> list[Example]:
            labelled = read_labelled(row, place, columns)
            ids, second_from = encode_text(tokenizer, labelled.text, labelled.pair)
            fields = {"label": self._encoded(classes, labelled.label, place), "second_from": np.array([second_from])}
            count = 1.0
            if self._weights is not None and classes.problem_type == SINGLE:
                count = self._weights[int(fields["label"][0])]  # torch's weighted mean divides by the weights
            return [Example(ids, np.zeros(len(ids), bool), None, place, count=count, fields=fields)]

        return prepare

    @staticmethod
    def _encoded(classes: Classes, label: Any, place: str) -> np.ndarray:
        """[1] the class or the number, [1, C] of a row with several classes; joined over the rows of a batch."""
        if classes.problem_type == REGRESSION:
            return np.array([number(label, place)], np.float32)
        if classes.problem_type == SINGLE:
            return np.array([classes.index(label, place)], np.int64)
        hot = np.zeros(len(classes.names), np.float32)
        hot[classes.indices(label, place)] = 1
        return hot

    def loss(self, model: Scorer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits, labels = model.class_logits(model.hidden(batch), batch), batch.fields["label"]
        loss = self._loss(logits, labels)
        if self._classes.problem_type != SINGLE:
            return loss, {}
        right = (logits.argmax(-1) == labels).sum().float()
        return loss, {"accuracy": torch.stack([right, torch.full_like(right, len(labels))])}

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum over the rows of what transformers takes the mean of; logits [N, C] float32, labels [N] or [N * C]."""
        weights, smoothing = self.weights_on(logits.device), self.label_smoothing
        if self._classes.problem_type == REGRESSION:
            return F.mse_loss(logits[:, 0], labels, reduction="sum")
        if self._classes.problem_type == SINGLE:
            return F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing, reduction="sum")
        targets = labels.view(logits.shape) * (1 - smoothing) + smoothing / 2
        losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="sum")
        return losses / logits.shape[1]

    def evaluate(self, model: Scorer, batch: Batch) -> dict[str, Any]:
        return self.measure(model.class_logits(model.hidden(batch), batch), batch.fields["label"])

    def measure(self, logits: Tensor, labels: Tensor) -> dict[str, Any]:
        """Sums over rows, of a regression also the numbers themselves; logits [N, C], labels [N] or [N * C]."""
        loss = self._loss(logits, labels)
        if self._classes.problem_type == REGRESSION:
            return {"loss": loss, "predicted": logits[:, 0].tolist(), "actual": labels.tolist()}
        if self._classes.problem_type == SINGLE:
            return {"loss": loss, "counts": class_counts(logits.argmax(-1), labels, logits.shape[1])}
        predicted, actual = logits > 0, labels.view(logits.shape) > 0
        exact = (predicted == actual).all(1).sum()
        return {"loss": loss, "counts": label_counts(predicted, actual), "exact": exact}

    def summarise(self, sums: dict[str, Any], count: float) -> dict[str, float]:
        found = {"loss": ratio(sums["loss"], count).item()}
        if self._classes.problem_type == REGRESSION:
            return found | regression_scores(sums["predicted"], sums["actual"])
        counts = sums["counts"].cpu()
        if self._classes.problem_type == SINGLE:
            return found | {"accuracy": precision_recall_f1(counts)[1], "macro_f1": macro_f1(counts)}
        precision, recall, micro = precision_recall_f1(counts)
        scores = {"precision": precision, "recall": recall, "micro_f1": micro, "macro_f1": macro_f1(counts)}
        return found | scores | {"exact_match": sums["exact"].item() / count}
