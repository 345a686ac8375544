"""What online RL objectives share: prompts are answered, answers rewarded, and groups of answers become examples.

A rollout depends on the seed and its number alone. The examples carry what the loss needs as fields over their trained
tokens (log-probabilities as they were, under the reference, advantages) or over their completions.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Tensor

from fastpt.adapters import is_fresh
from fastpt.data.batches import Batch
from fastpt.data.example import Example
from fastpt.data.files import Row
from fastpt.data.pack import best_fit
from fastpt.data.prompts import prompt_example, prompt_format, rows_of
from fastpt.data.tokenised import Tokenised
from fastpt.generate import stop_tokens
from fastpt.objectives import _policy_losses as losses
from fastpt.objectives._reference import frozen_copy
from fastpt.objectives._rewards import Reward, as_reward, load_reward_model
from fastpt.objectives._rollouts import Group, OwnEngine, VLLMEngine, joined, seeded
from fastpt.objectives.base import Objective, Prepare, Scorer


class Scored(NamedTuple):
    """Trained tokens under the policy, and as they were when it answered; each [K]."""

    logprobs: Tensor
    entropy: Tensor
    old: Tensor


class Online(Objective):
    """Settings and the rollout of online RL; a subclass says what advantages are and what the loss is.

    Rows have a `prompt` (a text or messages) and whatever columns the rewards take.
    """

    online: ClassVar[bool] = True
    learns_from_equals: ClassVar[bool] = False  # whether a group of equal rewards teaches anything

    rewards: list[Any] = Field(description="functions, 'module:function' names, paths of reward models; one or several")
    reward_weights: list[float] | None = Field(None, description="weight of each reward (default: 1)")
    group_size: int = Field(8, ge=1, description="answers to each prompt")
    max_new_tokens: int = Field(256, ge=1, description="most tokens of an answer")
    temperature: float = Field(1.0, gt=0, description="of sampling, and of the log-probabilities that are trained")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus that answers are sampled from")
    kl: float = Field(0.0, ge=0, description="weight of the divergence from the model as it was before training")
    entropy: float = Field(0.0, ge=0, description="weight of a bonus for the entropy of the policy")
    iterations: int = Field(1, ge=1, description="times that each rollout is trained on")
    minibatches: int = Field(1, ge=1, description="optimizer steps of each time")
    truncated: Literal["keep", "mask", "punish"] = Field(
        "keep",
        description="answers cut at max_new_tokens: trained as they are, not trained, or punished for their length",
    )
    overlong_buffer: int | None = Field(
        None,
        ge=1,
        description='last tokens over which "punish" falls from 0 to -1 (default: a fifth of max_new_tokens)',
    )
    engine: Literal["fastpt", "vllm"] = Field("fastpt", description="what makes the rollouts")

    _functions: list[Reward] = PrivateAttr(default_factory=list)
    _tokenizer: Any = PrivateAttr(None)
    _model: Any = PrivateAttr(None)
    _reference: Any = PrivateAttr(None)  # the model as it was, where it cannot answer as that itself
    _engine: Any = PrivateAttr(None)
    _device: Any = PrivateAttr(None)
    _seed: int = PrivateAttr(0)
    _micro_tokens: int = PrivateAttr(2048)
    _told: Any = PrivateAttr(None)  # sums over rollouts that gave nothing to train, told with the next one that does

    @field_validator("rewards", mode="before")
    @classmethod
    def _as_rewards(cls, value: Any) -> list[Reward | str]:
        listed = list(value) if isinstance(value, (list, tuple)) else [value]
        if not listed:
            raise ValueError("give at least one reward: a function, 'module:function', or the path of a reward model")
        return [as_reward(spec) for spec in listed]

    @model_validator(mode="after")
    def _fits(self) -> Online:
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise ValueError(f"reward_weights has {len(self.reward_weights)} values for {len(self.rewards)} rewards")
        if self.overlong_buffer is not None and self.overlong_buffer > self.max_new_tokens:
            raise ValueError(
                f"overlong_buffer={self.overlong_buffer} is more than max_new_tokens={self.max_new_tokens}"
            )
        return self

    @property
    def needs_old(self) -> bool:
        """Whether log-probabilities at the time of the rollout differ from those that are trained, or are asked for."""
        return self.steps_per_rollout > 1

    @property
    def counts_answers(self) -> bool:
        """Whether the loss is a mean over answers; else it is one over their tokens."""
        return False

    @property
    def steps_per_rollout(self) -> int:
        return self.iterations * self.minibatches

    @property
    def added_tokens(self) -> int:
        return self.max_new_tokens

    # ---- set-up -----------------------------------------------------------------------------------------------------

    def attach(self, model: Any, device: Any, dtype: Any) -> None:
        self._model, self._device, self._seed = model, device, torch.initial_seed()
        self._functions = [
            reward if isinstance(reward, Reward) else load_reward_model(reward, device, dtype)
            for reward in self.rewards
        ]
        self._engine = OwnEngine() if self.engine == "fastpt" else VLLMEngine(model)
        if self.kl and not is_fresh(model):
            self._reference = frozen_copy(model)

    def bind(self, tokenizer: Any, rows: Any, columns: dict[str, str] | None) -> Prepare:
        self._tokenizer = tokenizer
        row_format = prompt_format(columns)
        named = [reward for reward in self.rewards if isinstance(reward, Reward)]
        handed_on = None if any(r.takes_all for r in named) else set().union(*(r.wanted for r in named))

        def prepare(row: dict[str, Any], place: str) -> list[Example]:
            for reward in named:
                reward.check_columns(row, place)
            return [prompt_example(tokenizer, row, place, row_format, handed_on)]

        return prepare

    def enrich(self, model: Scorer, data: Tokenised, micro_tokens: int, say: Callable[[str], None]) -> None:
        self._micro_tokens = micro_tokens

    # ---- a rollout --------------------------------------------------------------------------------------------------

    def collect(self, model: Scorer, examples: list[Example], step: int) -> list[list[Example]]:
        started = time.perf_counter()
        seed = int(np.random.SeedSequence([self._seed % 2**63, step]).generate_state(1)[0])
        prompts = [example.input_ids.tolist() for example in examples for _ in range(self.group_size)]
        with seeded(seed, self._device):
            answers = self._answers(model, prompts, self.temperature, self.top_p)
        seconds = time.perf_counter() - started
        by_function, rewards = self._rewards(
            answers, [rows_of(e.fields)[0] for e in examples for _ in range(self.group_size)],
            [e.place for e in examples for _ in range(self.group_size)],
        )  # fmt: skip
        rewards = rewards.view(-1, self.group_size)
        groups = [
            self._group(model, example, answers[at * self.group_size :][: self.group_size], rewards[at])
            for at, example in enumerate(examples)
        ]
        taught = [group for group in groups if group.trained and self._learns_from(group.rewards)]
        told = self._tell(answers, by_function, rewards, len(groups) - len(taught), seconds)
        if not taught:
            self._told = told
            return []
        self._told = None
        self._fill(model, taught)
        return self._steps([example for group in taught for example in group.examples], told, seed)

    def _answers(self, model: Scorer, prompts: list[list[int]], temperature: float, top_p: float) -> list[list[int]]:
        stop = stop_tokens(self._model, self._tokenizer)
        return self._engine.generate(model, prompts, stop, self.max_new_tokens, temperature, top_p)

    def _is_cut(self, answer: list[int]) -> bool:
        return not answer or answer[-1] not in stop_tokens(self._model, self._tokenizer)

    def _rewards(self, answers: list[list[int]], rows: list[Row], places: list[str]) -> tuple[Tensor, Tensor]:
        """[D, F] of each reward, and [D] their weighted sum with the punishment of answers that are too long."""
        texts = self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        prompts = [row["prompt"] for row in rows]
        found = torch.stack([reward(prompts, texts, answers, rows, places) for reward in self._functions], 1)
        total = found @ torch.tensor(self.reward_weights or [1.0] * len(self._functions))
        if self.truncated == "punish":
            lengths = torch.tensor([len(answer) for answer in answers])
            buffer = self.overlong_buffer or max(1, self.max_new_tokens // 5)
            total = total + losses.overlong_punishment(lengths, self.max_new_tokens, buffer)
        return found, total

    def _group(self, model: Scorer, prompt: Example, answers: list[list[int]], rewards: Tensor) -> Group:
        masks = self.truncated == "mask"
        trained = [number for number, answer in enumerate(answers) if answer and not (masks and self._is_cut(answer))]
        before = len(prompt.input_ids) - 1  # tokens before every answer, or once
        once, each = (before, 1) if model.shares_prefix else (0, before + 1)
        room = 0
        parts: list[list[int]] = []
        for number in trained:  # of at most micro_tokens each
            size = each + len(answers[number])
            if room < size or not parts:
                parts.append([])
                room = max(self._micro_tokens - once, size)
            parts[-1].append(number)
            room -= size
        examples = [joined(prompt, [answers[n] for n in part]) for part in parts]
        if self.counts_answers and examples:  # what is not trained counts too
            counts = [len(part) for part in parts]
            counts[0] += len(answers) - len(trained)
            examples = [replace(e, count=float(count)) for e, count in zip(examples, counts, strict=True)]
        return Group(rewards, trained, examples)

    def _learns_from(self, rewards: Tensor) -> bool:
        return self.learns_from_equals or self.kl + self.entropy > 0 or bool((rewards != rewards[0]).any())

    def _fill(self, model: Scorer, groups: list[Group]) -> None:
        """Give the examples of the groups the fields of the loss, and what they count."""
        examples = [example for group in groups for example in group.examples]
        fields: dict[str, list[np.ndarray]] = {}
        if self.needs_old:
            fields["old_logprobs"] = self._scores(model, examples, self._logprobs)
        if self.kl:
            fields["ref_logprobs"] = self._scores(model, examples, self._reference_logprobs)
        for name, arrays in fields.items():
            for example, array in zip(examples, arrays, strict=True):
                example.fields[name] = array
        self._judge(model, groups)

    def _judge(self, model: Scorer, groups: list[Group]) -> None:
        """Give the examples their field `advantages`."""
        raise NotImplementedError

    def _scores(
        self, model: Scorer, examples: list[Example], read: Callable[[Scorer, Batch], Tensor]
    ) -> list[np.ndarray]:
        """What `read` says of each trained token, an array for each example; without a gradient."""
        found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(examples)
        sizes = [model.size(example) for example in examples]
        with model.frozen():
            for pack in best_fit(sizes, self._micro_tokens):
                values = read(model, model.batch([examples[i] for i in pack])).cpu().numpy()
                ends = np.cumsum([sum(examples[i].trained_tokens) for i in pack])
                for i, part in zip(pack, np.split(values, ends[:-1]), strict=True):
                    found[i] = part
        return found

    def scored(self, hidden: Tensor, model: Scorer, batch: Batch) -> Scored:
        stats = model.stats(hidden, batch, temperature=self.temperature)
        logprobs = stats.logprob[batch.kept]
        # Trained on once, the policy that answered is the policy that is trained.
        return Scored(logprobs, stats.entropy[batch.kept], batch.fields.get("old_logprobs", logprobs.detach()))

    def _logprobs(self, model: Scorer, batch: Batch) -> Tensor:
        return model.stats(model.hidden(batch), batch, temperature=self.temperature).logprob[batch.kept]

    def _reference_logprobs(self, model: Scorer, batch: Batch) -> Tensor:
        if self._reference is not None:
            return self._logprobs(model.of(self._reference), batch)
        with model.reference():
            return self._logprobs(model, batch)

    def _steps(self, examples: list[Example], told: np.ndarray, seed: int) -> list[list[Example]]:
        """Every example once an iteration, in an order of its own; each step's first example carries what is told."""
        steps = []
        for iteration in range(self.iterations):
            order = np.random.default_rng([seed, iteration]).permutation(len(examples))
            parts = np.array_split(order, min(self.minibatches, len(examples)))
            for part in parts if self.minibatches > 1 else [np.arange(len(examples))]:
                chosen = [replace(examples[i], fields=examples[i].fields | {"rollout": 0 * told}) for i in part]
                chosen[0].fields["rollout"] = told
                steps.append(chosen)
        return steps

    # ---- what is told of it -----------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        several = [f.name for f in self._functions] if len(self._functions) > 1 else []
        both = [f"{what}/{name}" for name in several for what in ("reward", "reward_std")]
        return [
            "reward",
            "reward_std",
            *both,
            "completion_tokens",
            "truncated",
            "groups_left_out",
            "rollout_tokens_per_s",
        ]

    def _tell(
        self, answers: list[list[int]], by_function: Tensor, rewards: Tensor, left_out: int, seconds: float
    ) -> np.ndarray:
        """[1, 2 M]: sums and divisors of _names, with those of rollouts before that gave nothing to train."""
        count, tokens = len(answers), sum(map(len, answers))

        def mean_and_std(values: Tensor) -> list[float]:
            """Over all answers, and within the groups."""
            grouped = values.view(-1, self.group_size)
            within = grouped.std(1).sum().item() if self.group_size > 1 else 0.0
            return [values.sum().item(), count, within, len(grouped)]

        told = mean_and_std(rewards)
        if len(self._functions) > 1:
            told += [value for column in by_function.T for value in mean_and_std(column)]
        cut = sum(map(self._is_cut, answers))
        told += [tokens, count, cut, count, left_out, len(rewards), tokens, seconds]
        return np.array([told], np.float32) + (0 if self._told is None else self._told)

    def measures(self, batch: Batch, stats: Scored, is_clipped: Tensor) -> dict[str, Tensor]:
        """The metrics of a batch as [sum, divisor], those of its rollout among them."""
        tokens = stats.logprobs.new_full((), len(stats.logprobs))
        clips = is_clipped.new_full((), len(is_clipped))
        found = {
            "entropy": torch.stack([stats.entropy.detach().sum(), tokens]),
            "clip_fraction": torch.stack([is_clipped.sum(), clips]),
        }
        if self.kl:
            divergence = losses.kl_estimate(stats.logprobs.detach(), batch.fields["ref_logprobs"])
            found["kl"] = torch.stack([divergence.sum(), tokens])
        return self.told(batch) | found

    def told(self, batch: Batch) -> dict[str, Tensor]:
        """The metrics of the rollout that this batch belongs to, as [sum, divisor]."""
        pairs = batch.fields["rollout"].sum(0).view(-1, 2)
        return dict(zip(self._names(), pairs, strict=True))

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, model: Scorer, batch: Batch) -> dict[str, Any]:
        """Rewards of the greedy answers to the prompts of a batch."""
        bounds = batch.cu_seqlens.tolist()
        ids = batch.input_ids[0].tolist()
        answers = self._answers(model, [ids[a:b] for a, b in itertools.pairwise(bounds)], 0.0, 1.0)
        fields = {name: value.cpu() for name, value in batch.fields.items()}
        by_function, rewards = self._rewards(answers, rows_of(fields), batch.places)
        found = {"loss": -rewards.sum(), "reward": rewards.sum()}
        if len(self._functions) > 1:
            found |= {
                f"reward/{f.name}": column.sum() for f, column in zip(self._functions, by_function.T, strict=True)
            }
        sizes = {"completion_tokens": sum(map(len, answers)), "truncated": sum(map(self._is_cut, answers))}
        return found | {name: torch.tensor(float(value)) for name, value in sizes.items()}
