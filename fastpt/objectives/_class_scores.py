"""How good predicted classes, spans and numbers are, from counts that add up over batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


def class_counts(predicted: Tensor, actual: Tensor, classes: int) -> Tensor:
    """[3, C] int64 of class numbers [N]: how often each was right, predicted, and there."""
    right = actual[predicted == actual]
    return torch.stack([torch.bincount(one, minlength=classes) for one in (right, predicted, actual)])


def label_counts(predicted: Tensor, actual: Tensor) -> Tensor:
    """The same of rows with several labels each, bool [N, C]."""
    return torch.stack([(predicted & actual).sum(0), predicted.sum(0), actual.sum(0)])


def f1_scores(counts: Tensor) -> Tensor:
    """[C] float64; of a class that is neither there nor predicted, 0."""
    right, predicted, actual = counts.double()
    return 2 * right / (predicted + actual).clamp(min=1)


def macro_f1(counts: Tensor) -> float:
    """The mean over the classes that are there or predicted (scikit-learn's)."""
    is_met = counts[1:].sum(0) > 0
    return f1_scores(counts)[is_met].mean().item() if is_met.any() else 0.0


def precision_recall_f1(counts: Tensor) -> tuple[float, float, float]:
    """Over all classes together (micro)."""
    right, predicted, actual = counts.double().sum(1).tolist()
    return right / max(predicted, 1), right / max(actual, 1), 2 * right / max(predicted + actual, 1)


# Spans of tags


def entity_types(names: Sequence[str]) -> list[str]:
    """The types of BIO, IOB or BILOU tags ("B-person", "O"), sorted; none where the tags are not of that kind."""
    parts = [name.partition("-") for name in names if name != "O"]
    is_bio = "O" in names and all(mark in tuple("BIESLU") and kind for mark, _, kind in parts)
    return sorted({kind for _, _, kind in parts}) if is_bio else []


def spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(type, start, stop) of the entities that tags mark, as CoNLL's own script reads them.

    An entity also begins where an inside tag follows "O" or another type (Tjong Kim Sang and Buchholz 2000, conlleval).
    """
    kind, start, before = "", 0, "O"
    for at, tag in enumerate([*tags, "O"]):
        mark, _, now = tag.partition("-")
        if kind and (mark in "OBSU" or now != kind or before in "ESLU"):
            yield kind, start, at
            kind = ""
        if mark != "O" and not kind:
            kind, start = now, at
        before = mark


def entity_counts(predicted: Sequence[str], actual: Sequence[str], types: Sequence[str]) -> Tensor:
    """[3, types] int64 of one sentence: entities found exactly, predicted, and there."""
    ours, theirs = set(spans(predicted)), set(spans(actual))
    sets = (ours & theirs, ours, theirs)
    return torch.tensor([[sum(kind == one for kind, _, _ in found) for one in types] for found in sets])


# Numbers


def regression_scores(predicted: Sequence[float], actual: Sequence[float]) -> dict[str, float]:
    """Mean squared error, and correlations, which are 0 where one side does not vary."""
    x, y = np.asarray(predicted, np.float64), np.asarray(actual, np.float64)
    return {
        "mse": float(np.mean((x - y) ** 2)),
        "pearson": _correlation(x, y),
        "spearman": _correlation(_ranks(x), _ranks(y)),
    }


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / scale if scale > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1, equal values sharing the mean of their ranks."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]
