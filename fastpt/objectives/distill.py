"""Distillation: a student learns a teacher's distributions of the next token, on given answers or on its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from fastpt import models
from fastpt.data.batches import Batch
from fastpt.data.example import Example
from fastpt.errors import ConfigError, DataError
from fastpt.fusion import fuse
from fastpt.generate import stop_tokens
from fastpt.objectives._rollouts import OwnEngine, seeded
from fastpt.objectives.base import Prepare, Scorer, token_measures
from fastpt.objectives.sft import SFT

GIVEN = "given"  # the field that says whether a row's answer is the data's (1) or the student's own (0)


class Distill(SFT):
    """Rows are those of `sft`; what is trained there is where the teacher is asked. It needs the student's vocabulary.

    Generalised knowledge distillation (Agarwal et al. 2024, https://arxiv.org/abs/2306.13649).
    """

    name: Literal["distill"] = "distill"  # type: ignore[assignment]
    teacher: Any = Field(description="hub id, local path or nn.Module of the teacher")
    beta: float = Field(
        0.0, ge=0, le=1, description="0: KL(teacher || student), 1: the reverse, between: their mixture (JSD)"
    )
    temperature: float = Field(1.0, gt=0, description="of both distributions")
    cross_entropy: float = Field(0.0, ge=0, le=1, description="share of the loss that is the cross-entropy of the rows")
    on_policy: float = Field(0.0, ge=0, le=1, description="share of rows whose answer the student gives itself")
    max_new_tokens: int = Field(256, ge=1, description="most tokens of such an answer")
    sampling_temperature: float = Field(1.0, gt=0, description="that it is sampled at")

    _teacher: Any = PrivateAttr(None)
    _teacher_tokenizer: Any = PrivateAttr(None)
    _model: Any = PrivateAttr(None)
    _tokenizer: Any = PrivateAttr(None)
    _seed: int = PrivateAttr(0)

    @property
    def online(self) -> bool:  # type: ignore[override]
        return self.on_policy > 0

    @property
    def added_tokens(self) -> int:
        return self.max_new_tokens if self.online else 0

    def attach(self, model: Any, device: Any, dtype: Any) -> None:
        self._model, self._seed = model, torch.initial_seed()
        if any(part is self.teacher for part in model.modules()):
            raise ConfigError(
                "objective.teacher is the model that is trained, which would teach itself what it is: give its path or a copy"
            )
        if isinstance(self.teacher, nn.Module):
            self._teacher = self.teacher.to(device)
        else:
            loaded = models.load(self.teacher, dtype=dtype, device=device)
            self._teacher, self._teacher_tokenizer = loaded.model, loaded.tokenizer
        self._teacher.eval().requires_grad_(False)
        fuse(self._teacher)

    def bind(self, tokenizer: Any, rows: Any, columns: dict[str, str] | None) -> Prepare:
        self._tokenizer = tokenizer
        theirs, named = self._teacher_tokenizer, self.teacher if isinstance(self.teacher, str) else "the teacher"
        if theirs is not None and theirs.get_vocab() != tokenizer.get_vocab():
            raise ConfigError(
                f"the tokenizer of {named} has another vocabulary ({len(theirs)} tokens) than the student's "
                f"({len(tokenizer)}), so their distributions cannot be compared: take a teacher of the same family"
            )
        smallest = min(len(one.get_output_embeddings().weight) for one in (self._teacher, self._model))
        if smallest < len(tokenizer):
            raise ConfigError(
                f"{named} or the student tells {smallest} tokens apart, the tokenizer knows {len(tokenizer)}"
            )
        return super().bind(tokenizer, rows, columns)

    def collect(self, model: Scorer, examples: list[Example], step: int) -> list[list[Example]]:
        """The rows, a share of them with the student's own answers."""
        draw = np.random.default_rng([self._seed % 2**63, step])
        asked = [i for i, x in enumerate(draw.random(len(examples))) if x < self.on_policy]
        prompts = [_prompt(examples[i]) for i in asked]
        with seeded(int(draw.integers(2**63)), model.device):
            answers = OwnEngine().generate(
                model,
                prompts,
                stop_tokens(self._model, self._tokenizer),
                self.max_new_tokens,
                self.sampling_temperature,
                1.0,
            )
        made = [replace(example, fields=example.fields | {GIVEN: np.ones(1, np.float32)}) for example in examples]
        for i, prompt, answer in zip(asked, prompts, answers, strict=True):
            ids = np.array([*prompt, *answer], np.int32)
            fields = {GIVEN: np.zeros(1, np.float32)}
            made[i] = Example(ids, np.arange(len(ids)) >= len(prompt), None, examples[i].place, fields=fields)
        return [made]

    def loss(self, model: Scorer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = model.hidden(batch)
        divergence = self._divergence(model, hidden, batch)
        total = (1 - self.cross_entropy) * divergence
        if self.cross_entropy:
            options = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
            total = total + self.cross_entropy * model.cross_entropy(hidden, _given(batch), **options)
        return total, {"divergence": divergence}

    def evaluate(self, model: Scorer, batch: Batch) -> dict[str, Any]:
        """The measures of `sft`, the loss among them, and the divergence."""
        hidden = model.hidden(batch)
        return token_measures(model, hidden, batch) | {"divergence": self._divergence(model, hidden, batch)}

    def _divergence(self, model: Scorer, hidden: Tensor, batch: Batch) -> Tensor:
        if self._teacher is None:  # a plan of memory loads nothing
            raise ConfigError(
                "memory is not planned for a teacher: leave memory_limit out; plan its student with objective 'sft', and add the "
                "size of the teacher's weights"
            )
        return model.divergence(hidden, batch, model.of(self._teacher), beta=self.beta, temperature=self.temperature)


def _given(batch: Batch) -> Batch:
    """The batch for the cross-entropy, in which the student's own answers weigh nothing: there they teach only noise."""
    if GIVEN not in batch.fields:
        return batch
    weights = batch.fields[GIVEN].repeat_interleave(batch.kept_lengths, output_size=len(batch.kept))
    return replace(batch, weights=weights if batch.weights is None else weights * batch.weights)


def _prompt(example: Example) -> list[int]:
    """What stands before the first trained token."""
    start = int(example.trained.argmax())
    if start == 0:
        raise DataError(
            f"{example.place} has no prompt for the student to answer: give prompts with completions or messages, or leave "
            "objective.on_policy at 0"
        )
    return example.input_ids[:start].tolist()
