"""What classification of texts and of words share: the classes of the data, their weights, the model that must fit them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from fastpt.data.files import Row
from fastpt.data.labels import MULTI, REGRESSION, Classes
from fastpt.data.sources import StreamedRows
from fastpt.data.tokenised import Tokenised
from fastpt.errors import ConfigError, ModelError
from fastpt.fusion.class_head import ClassHead
from fastpt.fusion.head import causal_lm
from fastpt.objectives.base import Objective, Scorer


class Labelled(Objective):
    """An objective whose rows carry classes."""

    needs_chat_template: ClassVar[bool] = False

    labels: list[str] | None = Field(
        None, min_length=1, description="classes in order (default: those of the data, sorted)"
    )
    class_weights: Literal["balanced"] | dict[str, float] | None = Field(
        None, description='what a class counts for: "balanced", or numbers by class (1 where none is given)'
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    _classes: Classes = PrivateAttr()
    _weights: list[float] | None = PrivateAttr(None)
    _is_told: bool = PrivateAttr(False)

    def __repr__(self) -> str:
        """Settings, and what the data decided: cached rows and checkpoints are known again by it."""
        found = getattr(self, "_classes", None)
        return f"{super().__repr__()} {found.problem_type, found.names, self._weights}" if found else super().__repr__()

    def survey(self, rows: Any, eval_rows: Any, columns: dict[str, str] | None) -> dict[str, Any]:
        self._classes = found = self._survey(_placed(rows, self.labels), columns)
        self._weights = self._weights_of(found)
        self._is_told = False
        return self._settings()

    def _survey(self, rows: Iterable[tuple[Row, str]], columns: dict[str, str] | None) -> Classes:
        raise NotImplementedError

    def _weights_of(self, found: Classes) -> list[float] | None:
        """The weight of each class; of rows with several labels, that of its positives."""
        if found.problem_type == REGRESSION and (self.class_weights or self.label_smoothing):
            raise ConfigError(
                "class_weights and label_smoothing are for classes, but the labels are numbers; leave them out"
            )
        if self.class_weights is None:
            return None
        if isinstance(self.class_weights, dict):
            given = self.class_weights
            unknown = [name for name in given if name not in found.names]
            wrong = [f"{name}: {weight}" for name, weight in given.items() if not 0 < weight < float("inf")]
            if unknown or wrong:
                which = f"{unknown[0]!r}, which is no class of the data" if unknown else f"{wrong[0]}, not above 0"
                raise ConfigError(f"objective.class_weights has {which}; the classes are {', '.join(found.names[:20])}")
            return [float(given.get(name, 1.0)) for name in found.names]
        if absent := [name for name, count in zip(found.names, found.counts, strict=True) if count == 0]:
            raise ConfigError(
                f"class_weights='balanced' has no row of {absent[0]!r} to go by; give the weights as a table, or add rows"
            )
        if found.problem_type == MULTI:
            return [max(found.rows - count, 1) / count for count in found.counts]
        return [sum(found.counts) / (len(found.names) * count) for count in found.counts]

    def attach(self, model: Any, device: Any, dtype: Any) -> None:
        """Raises: ModelError for a model whose head is another one than the data need."""
        inner = causal_lm(model)
        head = ClassHead.of(model)
        found = self._classes
        outputs = 1 if found.problem_type == REGRESSION else len(found.names)
        if head.is_of_tokens != (self.task == "token"):
            raise ModelError(
                f"{type(inner).__name__} is not for objective {self.name!r}; give the path of the model instead"
            )
        if inner.config.num_labels != outputs:
            raise ModelError(
                f"the head of {type(inner).__name__} has {inner.config.num_labels} outputs, the data need {outputs}; give the "
                "path of the model instead, whose head is then made to fit, or name the head's classes in objective.labels"
            )
        for name, value in self._settings().items():
            setattr(inner.config, name, value)

    def _settings(self) -> dict[str, Any]:
        """What the model's config says of the classes."""
        found = self._classes
        if found.problem_type == REGRESSION:
            return {"num_labels": 1, "problem_type": REGRESSION}
        names = dict(enumerate(found.names))
        return {"id2label": names, "label2id": {n: i for i, n in names.items()}, "problem_type": found.problem_type}

    def enrich(self, model: Scorer, data: Tokenised, micro_tokens: int, say: Callable[[str], None]) -> None:
        if self._classes.problem_type != REGRESSION and not self._is_told:  # once, not for each set
            say(self._classes.imbalance)
        self._is_told = True

    def weights_on(self, device: Any) -> Tensor | None:
        """[C] float32 or None."""
        return None if self._weights is None else torch.tensor(self._weights, dtype=torch.float32, device=device)


def _placed(rows: Any, labels: list[str] | None) -> Iterable[tuple[Row, str]]:
    """All rows with their places; of a stream the first ones, where the classes are given."""
    if not isinstance(rows, StreamedRows):
        return ((rows[i], rows.place(i)) for i in range(len(rows)))
    if labels is None:
        raise ConfigError("a stream does not tell all of its classes beforehand; name them in objective.labels")
    return islice(iter(rows), 256)
