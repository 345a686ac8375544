"""What answers are worth: plain Python functions, or a reward model; every way in which one can go wrong is said in a sentence.

A function is called as `reward(prompts=..., completions=..., **columns) -> list of one number per completion`, as in TRL: a
prompt that is a list of messages has a completion that is one too. It gets the columns of the rows that it names, or all of
them where it takes **columns.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpt import models
from fastpt.data.batches import Batch
from fastpt.data.example import Example
from fastpt.data.files import Row
from fastpt.data.formats import Conversation
from fastpt.data.render import conversation_text, encode, ensure_chat_template
from fastpt.errors import ConfigError, ModelError, TrainingError
from fastpt.fusion import fuse
from fastpt.objectives._reference import documents_values
from fastpt.objectives.base import Scorer
from fastpt.scorer import ModelScorer

GIVEN = ("prompts", "completions", "completion_ids")  # besides the columns
SCORED_TOKENS = 4096  # that a reward model reads at a time


class Reward:
    """A reward function; what it prints, its name and the columns it takes, is how caches and resumed runs know it again."""

    def __init__(self, function: Callable[..., Any], name: str | None = None):
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.origin = name or f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', self.name)}"
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # a builtin that does not tell
            parameters = ()  # type: ignore[assignment]
        self.takes_all = not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.wanted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.needed = {p.name for p in parameters if p.name in self.wanted and p.default is p.empty} - {*GIVEN}

    def __repr__(self) -> str:
        return f"Reward({self.origin}: {', '.join([*sorted(self.wanted), *['**'] * self.takes_all])})"

    def check_columns(self, row: Row, place: str) -> None:
        """Raises: ConfigError for a column that the function needs and the row lacks."""
        missing = sorted(self.needed - row.keys())
        if missing:
            raise ConfigError(
                f"reward {self.name} takes {missing[0]!r}, but {place} has only {', '.join(map(str, row))}: add that column, "
                "or name another one in the function's parameters"
            )

    def __call__(self, prompts: list[Any], texts: list[str], ids: list[list[int]], rows: list[Row], places: list[str]):
        """One number for each completion, float32 [D].

        Raises: TrainingError naming function, row and remedy when the function fails or returns anything else.
        """
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        keys = dict.fromkeys(key for row in rows for key in row)
        given: dict[str, list[Any]] = {key: [row.get(key) for row in rows] for key in keys}
        given |= {"prompts": prompts, "completions": completions, "completion_ids": ids}
        given = {key: value for key, value in given.items() if self.takes_all or key in self.wanted}
        try:
            found = self.function(**given)
        except Exception as error:
            raise self._why_it_raised(error, given, texts, places) from error
        return self._checked(found, texts, places)

    def _why_it_raised(self, error: Exception, given: dict, texts: list[str], places: list[str]) -> TrainingError:
        at = next((i for i in range(len(texts)) if self._fails_on({k: [v[i]] for k, v in given.items()})), None)
        where = f"{places[0]} to {places[-1]}" if at is None else f"{places[at]}, whose answer is {texts[at][:60]!r}"
        return TrainingError(
            f"reward {self.name} raised {type(error).__name__} ({error}) on {where}: let it return a number for whatever the "
            "model may say, such as 0.0"
        )

    def _fails_on(self, one: dict[str, list[Any]]) -> bool:
        try:
            self.function(**one)
        except Exception:  # noqa: BLE001  whatever it is, it is what is asked
            return True
        return False

    def _checked(self, found: Any, texts: list[str], places: list[str]) -> torch.Tensor:
        remedy = "let it return a list with one finite number for each completion"
        if isinstance(found, torch.Tensor):
            found = found.tolist()
        if not isinstance(found, Sequence) or isinstance(found, str):
            try:
                found = list(found)
            except TypeError:
                raise TrainingError(
                    f"reward {self.name} returned {type(found).__name__} {found!r:.60}: {remedy}"
                ) from None
        if len(found) != len(texts):
            raise TrainingError(
                f"reward {self.name} returned {len(found)} values for {len(texts)} completions "
                f"(of {places[0]} to {places[-1]}): {remedy}"
            )
        for value, text, place in zip(found, texts, places, strict=True):
            try:
                is_good = value is not None and math.isfinite(float(value))
            except (TypeError, ValueError):
                is_good = False
            if not is_good:
                raise TrainingError(
                    f"reward {self.name} gave {value!r:.40} for {place}, whose answer is {text[:60]!r}: {remedy}"
                )
        return torch.tensor([float(value) for value in found], dtype=torch.float32)


def as_reward(spec: Any) -> Reward | str:
    """A reward from a callable or from "module:function"; a path or hub id of a reward model stays, to be loaded later."""
    if isinstance(spec, Reward):
        return spec
    if callable(spec):
        return Reward(spec)
    if not isinstance(spec, (str, Path)):
        raise ValueError(f"{spec!r} is no reward: give a function, 'module:function', or the path of a reward model")
    module, colon, name = str(spec).partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), name]):
        return str(spec)
    sys.path.insert(0, str(Path.cwd()))  # a config file's functions are beside it, as for `python -m`
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"reward {spec} cannot be imported from {Path.cwd()} ({error}): check module and function"
        ) from None
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise ValueError(f"reward {spec} is {type(function).__name__}, not a function")
    return Reward(function, str(spec))


def load_reward_model(spec: str, device: torch.device, dtype: torch.dtype) -> Reward:
    """A sequence-classification model with one output as a reward: its logit for the whole conversation, read as in training.

    Raises: ModelError when it cannot be loaded, is no such model, or has more outputs.
    """
    _check_kind(spec)
    loaded = models.load(spec, dtype=dtype, device=device, task="sequence", settings={"num_labels": 1})
    model, tokenizer = loaded.model.eval().requires_grad_(False), loaded.tokenizer
    ensure_chat_template(tokenizer)
    fuse(model)
    scorer = ModelScorer(model)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    def reward_model(prompts: list[Any], completions: list[Any]) -> list[float]:
        texts = [_conversation_text(tokenizer, *both) for both in zip(prompts, completions, strict=True)]
        examples = [
            Example(ids, np.zeros(len(ids), bool), None, "", count=1.0).truncated(limit - scorer.first_position)
            for ids, _ in encode(tokenizer, texts, add_special_tokens=False)
        ]
        lengths = [example.tokens for example in examples]
        return np.concatenate(
            documents_values(scorer, lengths, examples.__getitem__, SCORED_TOKENS, documents_rewards)
        ).tolist()

    reward = Reward(reward_model, spec)
    reward.name = Path(spec).name
    return reward


def documents_rewards(model: Scorer, batch: Batch) -> Tensor:
    """[D] float32: what a reward model says of each conversation."""
    return model.class_logits(model.hidden(batch), batch)[:, 0]


def _check_kind(spec: str) -> None:
    """Raises: ModelError for anything but a classifier of one output, or an adapter that makes one."""
    place, config = models.resolve(spec), models.load_config(spec)
    remedy = 'train one with objective "reward"'
    if isinstance(place, Path) and (place / "adapter_config.json").is_file():
        task = json.loads((place / "adapter_config.json").read_text()).get("task_type")
        if task != "SEQ_CLS":
            raise ModelError(f"{spec} is no reward model but an adapter for {task or 'another task'}: {remedy}")
        return
    kind = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    if not kind.endswith("ForSequenceClassification"):
        raise ModelError(f"{spec} is no reward model but a {kind}: {remedy}")
    if config.num_labels != 1:
        raise ModelError(f"{spec} is no reward model but tells {config.num_labels} classes apart: {remedy}")


def _conversation_text(tokenizer: Any, prompt: Any, completion: Any) -> str:
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    return conversation_text(tokenizer, Conversation(before + after), "an answer to it")
