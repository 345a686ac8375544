"""The stream of optimizer steps: what the trainer pulls, whether the set is whole or comes as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from fastpt.data.batches import StreamPlanner
from fastpt.data.example import Example
from fastpt.data.pack import best_fit, plan_epoch
from fastpt.data.tokenised import Tokenised
from fastpt.errors import TrainingError

Step = list[list[Example]]  # micro-batches of one optimizer step
Collect = Callable[[list[Example], int], list[list[Example]]]  # prompts, number of the rollout -> examples of each step
MOST_EMPTY = 20  # rollouts running without anything to train


class PlannedFeed:
    """Steps over a tokenised set, epoch after epoch, each in its own seeded order; the position is (epoch, step)."""

    def __init__(self, data: Tokenised, fingerprint: str, **settings: Any):
        self.data, self.fingerprint, self.settings = data, fingerprint, settings
        self.seek({"epoch": 0, "step": 0})

    @property
    def steps_per_epoch(self) -> int:
        return len(self._plan)

    @property
    def progress(self) -> float:
        """Epochs done, with the fraction of the one under way."""
        return self._epoch + self._step / len(self._plan)

    @property
    def at_end_of_epoch(self) -> bool:
        return self._step == len(self._plan)

    def sample(self) -> Example:
        return self.data.example(0)

    def summary(self) -> dict[str, Any]:
        return asdict(self.data.report)

    def position(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "step": self._step}

    def seek(self, position: dict[str, Any]) -> None:
        self._epoch, self._step = position["epoch"], position["step"]
        self._plan = plan_epoch(self.data.lengths, epoch=self._epoch, mixture=self.data.mixture, **self.settings)

    def __iter__(self) -> Iterator[Step]:
        while True:
            if self.at_end_of_epoch:
                self.seek({"epoch": self._epoch + 1, "step": 0})
            self._step += 1
            yield [[self.data.example(i) for i in micro] for micro in self._plan[self._step - 1]]


class StreamFeed:
    """Steps over a stream, packed in windows; it has no known length, so a run over it ends by max_steps."""

    steps_per_epoch = 0

    def __init__(self, planner: StreamPlanner, fingerprint: str, **settings: Any):
        self.planner, self.fingerprint, self.settings = planner, fingerprint, settings
        self.at_end_of_epoch = False

    @property
    def progress(self) -> float:
        return float(self.planner.state()["epoch"])

    def sample(self) -> Example:
        return self.planner.first_example()

    def summary(self) -> dict[str, Any]:
        return asdict(self.planner.report)

    def position(self) -> dict[str, Any]:
        return self.planner.state()

    def seek(self, position: dict[str, Any]) -> None:
        self.planner.seek(position)

    def __iter__(self) -> Iterator[Step]:
        while True:
            yield from self.planner


class RolloutFeed:
    """Steps of examples that the model itself makes of a feed's prompts; a resumed run begins with a rollout of its own."""

    def __init__(
        self, prompts: PlannedFeed | StreamFeed, collect: Collect, size: Callable[[Example], int], micro_tokens: int,
        steps_per_rollout: int,
    ):  # fmt: skip
        self.prompts, self.collect, self.size = prompts, collect, size
        self.micro_tokens, self.per_rollout = micro_tokens, steps_per_rollout
        self.fingerprint, self.settings = prompts.fingerprint, prompts.settings
        self.at_end_of_epoch, self._rollouts = False, 0
        self._before = self._position()

    @property
    def steps_per_epoch(self) -> int:
        return self.prompts.steps_per_epoch * self.per_rollout

    @property
    def progress(self) -> float:
        return self.prompts.progress

    def sample(self) -> Example:
        return self.prompts.sample()

    def summary(self) -> dict[str, Any]:
        return self.prompts.summary()

    def _position(self) -> dict[str, Any]:
        return {"prompts": self.prompts.position(), "rollouts": self._rollouts}

    def position(self) -> dict[str, Any]:
        return self._before

    def seek(self, position: dict[str, Any]) -> None:
        self.prompts.seek(position["prompts"])
        self._rollouts, self._before = position["rollouts"], position

    def __iter__(self) -> Iterator[Step]:
        empty = 0
        for micro in self.prompts:
            steps = self.collect([example for one in micro for example in one], self._rollouts)
            self._rollouts += 1
            empty = 0 if steps else empty + 1
            if empty == MOST_EMPTY:
                raise TrainingError(
                    f"{MOST_EMPTY} rollouts running gave nothing to learn from (all answers to a prompt were rewarded "
                    "alike): give rewards that tell better answers from worse, easier prompts, or a higher temperature"
                )
            for number, examples in enumerate(steps, 1):
                self.at_end_of_epoch = False
                if number == len(
                    steps
                ):  # what a checkpoint goes on from; in between that is the rollout's own beginning
                    self._before, self.at_end_of_epoch = self._position(), self.prompts.at_end_of_epoch
                packs = best_fit([self.size(example) for example in examples], self.micro_tokens)
                yield [[examples[i] for i in sorted(pack)] for pack in packs]


def packs(data: Tokenised, micro_tokens: int) -> Iterator[list[int]]:
    """Indices of the whole set once, in packs of at most micro_tokens, in order."""
    shape: dict[str, Any] = {"batch_rows": None, "batch_tokens": micro_tokens, "micro_tokens": micro_tokens}
    for step in plan_epoch(data.lengths, **shape, seed=0, epoch=0, shuffle=False):
        yield from step


def micro_batches(data: Tokenised, micro_tokens: int) -> Iterator[list[Example]]:
    """The same as examples: what evaluation runs over."""
    for pack in packs(data, micro_tokens):
        yield [data.example(i) for i in pack]
