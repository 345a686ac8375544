"""What an objective is, and what it sees of the model: a callable that scores packed tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fastpt.config import Node
from fastpt.data.batches import Batch
from fastpt.data.render import Example
from fastpt.ops import TokenStats

Prepare = Callable[[dict[str, Any], str], list[Example]]


class Scorer(Protocol):
    """The model as an objective sees it: hidden states and losses of a packed batch, never logits."""

    def hidden(self, batch: Batch) -> Tensor:
        """[T, D] after the final norm."""

    def cross_entropy(self, hidden: Tensor, batch: Batch, **options: float) -> Tensor:
        """Sum of the (weighted) losses of the batch's targets, float32."""

    def stats(self, hidden: Tensor, batch: Batch) -> TokenStats:
        """Per-token log-probability, entropy, logsumexp and top-1 of the targets, float32 [T]."""


class Objective(Node):
    """Settings and behaviour of one way of training; a new one is a subclass in a file of its own.

    `bind` is called once per data set and returns the function that turns a row into examples. `loss` returns the *sum* of
    the losses, which the trainer divides once per step by the sum of `batch.count`, so that accumulation and packing do not
    change the result; metrics are sums too, and stay on the device until they are logged.
    """

    splits_long_rows: ClassVar[bool] = (
        False  # rows longer than max_length become several examples, whatever data.too_long
    )

    name: str

    def bind(self, tokenizer: Any, rows: Any, columns: dict[str, str] | None) -> Prepare:
        raise NotImplementedError

    def loss(self, model: Scorer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def evaluate(self, model: Scorer, batch: Batch) -> dict[str, Tensor]:
        """Sums over the targets; "loss" is required. The trainer divides them by the count of trained tokens."""
        stats = model.stats(model.hidden(batch), batch)
        kept = batch.kept
        weights = 1.0 if batch.weights is None else batch.weights
        return {
            "loss": -(stats.logprob[kept] * weights).sum(),
            "token_accuracy": (stats.is_top1[kept] * weights).sum(),
            "entropy": (stats.entropy[kept] * weights).sum(),
        }
