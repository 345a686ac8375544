"""KTO: single answers, each judged desirable or not, against how far the policy has moved from the reference in general."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from fastpt.data.batches import Batch
from fastpt.data.example import Example
from fastpt.data.pairs import judged_examples
from fastpt.data.tokenised import Tokenised
from fastpt.errors import ConfigError, DataError
from fastpt.objectives._preference_losses import unpaired
from fastpt.objectives._reference import (
    REFERENCE,
    answers_logprobs,
    documents_values,
    keep_reference,
    reference_logprobs,
)
from fastpt.objectives.base import Objective, Prepare, Scorer

# Fields of an example: its prompt with the answer of a row that has another one, the sizes of both, and what the reference
# gives for it; and, once its step begins, the divergence.
OTHER, SIZES, OTHER_REFERENCE, DIVERGENCE = "other", "other_sizes", "other_reference", "divergence"


class KTO(Objective):
    """Rows have `prompt`, `completion` and `label` (true: desirable); a row with `chosen` and `rejected` is two of them.

    The divergence from the reference is estimated before each step, over all its rows, on their prompts with answers of
    other rows: how a step is cut into micro-batches changes nothing.
    """

    online: ClassVar[bool] = True

    name: Literal["kto"] = "kto"  # type: ignore[assignment]
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference")
    desirable_weight: float = Field(1.0, ge=0, description="what a desirable answer counts for")
    undesirable_weight: float = Field(1.0, ge=0, description="what an undesirable answer counts for")
    _micro_tokens: int = PrivateAttr(2048)
    _is_told: bool = PrivateAttr(False)
    _positions: int | None = PrivateAttr(None)  # most that the model has

    @property
    def needs_divergence(self) -> bool:
        return self.loss_type == "kto"

    def survey(self, rows: Any, eval_rows: Any, columns: dict[str, str] | None) -> dict[str, Any]:
        self._is_told = False
        return {}

    def attach(self, model: Any, device: Any, dtype: Any) -> None:
        self._positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def bind(self, tokenizer: Any, rows: Any, columns: dict[str, str] | None) -> Prepare:
        return lambda row, place: judged_examples(tokenizer, row, place, columns)

    def enrich(self, model: Scorer, data: Tokenised, micro_tokens: int, say: Callable[[str], None]) -> None:
        self._micro_tokens = micro_tokens
        if not self._is_told:  # of the rows that are trained, which come first
            say(self._balance(np.concatenate([data.example(i).fields["desirable"] for i in range(len(data))])))
        self._is_told = True
        keep_reference(model, data, micro_tokens, say)
        if not self.needs_divergence:
            return
        others = mismatched(data, self._positions)
        data.set_field(OTHER, [other.input_ids for other in others])
        data.set_field(SIZES, [np.array([other.prefix + 1, len(other.input_ids)]) for other in others])
        if not model.has_reference:
            lengths = [other.tokens for other in others]
            data.set_field(OTHER_REFERENCE, documents_values(model, lengths, others.__getitem__, micro_tokens))

    def _balance(self, desirable: np.ndarray) -> str:
        good, bad = int(desirable.sum()), int((~desirable).sum())
        told = f"{good} desirable and {bad} undesirable answers"
        if not good or not bad:
            kind, other = ("desirable", "false") if good else ("undesirable", "true")
            raise DataError(
                f"all {good + bad} answers are {kind}: kto learns from what sets the two kinds apart, so add rows with label "
                f"{other}" + (', or train on these with objective "sft"' if good else "")
            )
        counted, against = good * self.desirable_weight, bad * self.undesirable_weight
        if not counted or not against or 0.75 <= counted / against <= 1.34:
            return told
        side, weight = ("undesirable", counted / bad) if counted > against else ("desirable", against / good)
        return f"{told}: {side}_weight={weight:.3g} makes both count alike"

    def collect(self, model: Scorer, examples: list[Example], step: int) -> list[list[Example]]:
        """The step's rows as they are, with the divergence over all of them."""
        if not self.needs_divergence:
            return [examples]
        if OTHER not in examples[0].fields:
            raise ConfigError(
                "kto estimates its divergence on answers to other prompts, which a stream does not have at hand: leave "
                'data.streaming out, or use loss_type "apo_zero_unpaired"'
            )
        others = [other for example in examples for other in others_of(example.fields)]
        ratios = documents_values(
            model, [other.tokens for other in others], others.__getitem__, self._micro_tokens, log_ratios
        )
        divergence = np.maximum(np.concatenate(ratios).mean(keepdims=True), 0)
        fields = [{k: v for k, v in one.fields.items() if k in ("desirable", REFERENCE)} for one in examples]
        return [
            [replace(one, fields=own | {DIVERGENCE: divergence}) for one, own in zip(examples, fields, strict=True)]
        ]

    def loss(self, model: Scorer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        desirable = batch.fields["desirable"]
        logprobs = answers_logprobs(model, batch)
        ratios = logprobs - reference_logprobs(model, batch)
        divergence = batch.fields[DIVERGENCE] if self.needs_divergence else torch.zeros_like(ratios)
        measures = {"divergence": divergence.sum()}
        for name, values in (("reward", self.beta * ratios.detach()), ("logprob", logprobs.detach())):
            for kind, weights in (("desirable", desirable.float()), ("undesirable", 1 - desirable.float())):
                measures[f"{name}_{kind}"] = torch.stack([(values * weights).sum(), weights.sum()])
        return self._losses(ratios, desirable, divergence).sum(), measures

    def _losses(self, ratios: Tensor, desirable: Tensor, divergence: Tensor) -> Tensor:
        weights = torch.where(desirable, self.desirable_weight, self.undesirable_weight)
        return weights * unpaired(ratios, desirable, divergence, self.beta)

    def evaluate(self, model: Scorer, batch: Batch) -> dict[str, Any]:
        """Log-ratios of all rows; the divergence is that of the whole set."""
        found = {"ratio": log_ratios(model, batch).tolist(), "desirable": batch.fields["desirable"].tolist()}
        if self.needs_divergence:
            others = others_of(batch.fields)
            lengths = [other.tokens for other in others]
            ratios = documents_values(model, lengths, others.__getitem__, self._micro_tokens, log_ratios)
            found["other"] = np.concatenate(ratios).tolist()
        return found

    def summarise(self, sums: dict[str, Any], count: float) -> dict[str, float]:
        """The loss; the reward of either kind and their difference; auc: how often a desirable answer has the larger reward."""
        ratios, desirable = torch.tensor(sums["ratio"]), torch.tensor(sums["desirable"])
        divergence = torch.tensor(sums.get("other", [0.0])).mean().clamp(min=0)
        found = {
            "loss": self._losses(ratios, desirable, divergence).mean().item(),
            "divergence": divergence.item(),
        }
        good, bad = self.beta * ratios[desirable], self.beta * ratios[~desirable]
        if len(good) and len(bad):
            found |= {"reward_desirable": good.mean().item(), "reward_undesirable": bad.mean().item()}
            found |= {"margin": (good.mean() - bad.mean()).item(), "auc": area_under_curve(good, bad)}
        return found


def log_ratios(model: Scorer, batch: Batch) -> Tensor:
    """log p - log p_ref of each answer, [D]."""
    return answers_logprobs(model, batch) - reference_logprobs(model, batch)


def mismatched(data: Tokenised, most: int | None) -> list[Example]:
    """The prompt of each example with the answer of one before it that has another prompt, cut to at most that many tokens."""
    examples = [data.example(i) for i in range(len(data))]
    prompts = [example.input_ids[: example.prefix + 1] for example in examples]
    is_new = [i == 0 or not np.array_equal(prompts[i], prompts[i - 1]) for i in range(len(examples))]
    starts = np.flatnonzero(is_new)  # of runs of equal prompts, such as the two answers of a pair
    sizes = np.diff([*starts, len(examples)])
    found = []
    for i, run in enumerate(np.cumsum(is_new) - 1):
        at = starts[run - 1] + (i - starts[run]) % sizes[run - 1] if len(starts) > 1 else i - 1
        answer = examples[at].input_ids[examples[at].prefix + 1 :]
        ids = np.concatenate([prompts[i], answer])[:most]
        found.append(_other(ids, len(prompts[i]), examples[i].place))
    return found


def others_of(fields: Mapping[str, np.ndarray | Tensor]) -> list[Example]:
    """What `mismatched` gave to an example, or to the examples of a batch, as examples again."""
    given = {name: np.asarray(value.cpu()) if isinstance(value, Tensor) else value for name, value in fields.items()}
    sizes = given[SIZES].reshape(-1, 2)
    parts = np.split(given[OTHER], np.cumsum(sizes[:, 1])[:-1])
    found = [_other(ids, int(prompt), "") for ids, (prompt, _) in zip(parts, sizes, strict=True)]
    if OTHER_REFERENCE not in given:
        return found
    references = np.split(given[OTHER_REFERENCE], len(found))
    return [replace(one, fields={REFERENCE: value}) for one, value in zip(found, references, strict=True)]


def _other(ids: np.ndarray, prompt: int, place: str) -> Example:
    return Example(
        ids,
        np.arange(len(ids)) >= prompt,
        None,
        place,
        prefix=prompt - 1,
        documents=(len(ids) - prompt + 1,),
        count=1.0,
    )


def area_under_curve(good: Tensor, bad: Tensor) -> float:
    """The share of pairs (good, bad) where the good one is larger, equal ones counting half."""
    ordered = bad.sort().values
    below, up_to = (torch.searchsorted(ordered, good, side=side) for side in ("left", "right"))
    return ((below + up_to).double().mean() / (2 * len(bad))).item()
