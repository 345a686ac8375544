"""What an objective is, and what it sees of the model: a callable that scores packed tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fastpt.config import Node
from fastpt.data.batches import Batch
from fastpt.data.example import Example
from fastpt.data.tokenised import Tokenised
from fastpt.ops import TokenStats

Prepare = Callable[[dict[str, Any], str], list[Example]]


class Scorer(Protocol):
    """The model as an objective sees it: hidden states and losses of a packed batch, never logits over a vocabulary."""

    has_reference: bool  # whether `reference()` can give the model as it was before training

    @property
    def shares_prefix(self) -> bool:
        """Whether a prompt before several documents is computed once."""

    def batch(self, examples: list[Example]) -> Batch:
        """The examples as one batch on the model's device; a prompt that several documents share is there once if it can be."""

    def size(self, example: Example) -> int:
        """Tokens that an example takes in such a batch."""

    def hidden(self, batch: Batch) -> Tensor:
        """[T, D] after the final norm; of an encoder-decoder, the decoder's."""

    def cross_entropy(self, hidden: Tensor, batch: Batch, **options: float) -> Tensor:
        """Sum of the (weighted) losses of the batch's targets, float32."""

    def stats(self, hidden: Tensor, batch: Batch, *, temperature: float = 1.0) -> TokenStats:
        """Per-token log-probability, entropy, logsumexp and top-1 of the targets, float32 [T]."""

    def divergence(self, hidden: Tensor, batch: Batch, teacher: Scorer, **options: float) -> Tensor:
        """Sum over the batch's (weighted) targets of how far the model is from a teacher there; see ops.linear_divergence."""

    @property
    def device(self) -> Any:
        """Where the model is."""

    def frozen(self) -> AbstractContextManager[None]:
        """Within it there is no gradient and no dropout."""

    def class_logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[D, C] float32, one row per document, by the model's own head over what it pools of it."""

    def token_logits(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, C] float32, by the head of a model for token classification."""

    def reference(self) -> AbstractContextManager[None]:
        """Within it the model answers as it was before training: adapters off, no gradient, no dropout."""

    def of(self, model: Any) -> Scorer:
        """The same for another model, such as a copy that is not trained."""

    def answers(self, sources: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        """Of an encoder-decoder: what it says to each source; options are those of transformers' generate."""

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        """The tokens that follow each prompt; options are those of fastpt.generate.generate_tokens."""


class Objective(Node):
    """Settings and behaviour of one way of training; a new one is a subclass in a file of its own.

    The trainer calls, in this order: `survey` before the model is loaded, `attach` once it is there, `bind` for each data
    set, `enrich` before the first step; then for each step `collect` (where `online`) and `loss`, and for an evaluation
    `evaluate` and `summarise`. `loss` returns the *sum* of the losses, which the trainer divides once per step by the sum of
    `batch.count`, so that accumulation and packing do not change the result. Metrics are sums too, divided likewise, or
    pairs [sum, divisor] with a divisor of their own; they stay on the device until they are logged.
    """

    task: ClassVar[str] = "causal"  # the kind of head: causal, sequence, token, seq2seq (models.HEADS)
    needs_chat_template: ClassVar[bool] = True
    splits_long_rows: ClassVar[bool] = False  # rows over max_length become several examples, whatever data.too_long
    online: ClassVar[bool] = False  # `collect` makes the examples of each step, as of answers to prompts

    name: str

    def survey(self, rows: Any, eval_rows: Any, columns: dict[str, str] | None) -> dict[str, Any]:
        """What the rows ask of the model's config, such as its labels."""
        return {}

    def attach(self, model: Any, device: Any, dtype: Any) -> None:
        """Load or add what the loss needs besides the model: a teacher, a reward model, a value head."""

    def bind(self, tokenizer: Any, rows: Any, columns: dict[str, str] | None) -> Prepare:
        """The function that turns a row of this set, at a place, into examples."""
        raise NotImplementedError

    def enrich(self, model: Scorer, data: Tokenised, micro_tokens: int, say: Callable[[str], None]) -> None:
        """Add to each example what has to be known before training, such as log-probabilities under the reference."""

    def collect(self, model: Scorer, examples: list[Example], step: int) -> list[list[Example]]:
        """Of an online objective: the examples of one or several optimizer steps, from the prompts (or rows) of one."""
        raise NotImplementedError

    @property
    def steps_per_rollout(self) -> int:
        """How many optimizer steps `collect` gives."""
        return 1

    @property
    def added_tokens(self) -> int:
        """Tokens that are added to a row later, for which max_length must leave room."""
        return 0

    def loss(self, model: Scorer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def evaluate(self, model: Scorer, batch: Batch) -> dict[str, Any]:
        """Sums over the batch, as `loss` gives them, or lists, which are joined."""
        return token_measures(model, model.hidden(batch), batch)

    def summarise(self, sums: dict[str, Any], count: float) -> dict[str, float]:
        """The metrics of an evaluation from what `evaluate` gave; the trainer needs none by name but `best_metric`."""
        found = {name: ratio(value, count).item() for name, value in sums.items()}
        if "token_accuracy" in found:
            found["perplexity"] = math.exp(min(found["loss"], 700.0))
        return found


def token_measures(model: Scorer, hidden: Tensor, batch: Batch) -> dict[str, Any]:
    """Sums over the batch's (weighted) targets: loss, token accuracy and entropy."""
    stats = model.stats(hidden, batch)
    kept = batch.kept
    weights = 1.0 if batch.weights is None else batch.weights
    return {
        "loss": -(stats.logprob[kept] * weights).sum(),
        "token_accuracy": (stats.is_top1[kept] * weights).sum(),
        "entropy": (stats.entropy[kept] * weights).sum(),
    }


def ratio(value: Tensor, count: float) -> Tensor:
    """A sum over the step's count, or a pair [sum, divisor] as one number."""
    return value[0] / value[1].clamp(min=1e-12) if value.dim() else value / max(count, 1e-12)
