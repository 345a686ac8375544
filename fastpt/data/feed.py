"""The stream of optimizer steps: what the trainer pulls, whether the set is whole or comes as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from fastpt.data.batches import StreamPlanner
from fastpt.data.pack import plan_epoch
from fastpt.data.render import Example
from fastpt.data.tokenised import Tokenised

Step = list[list[Example]]  # micro-batches of one optimizer step


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


def micro_batches(data: Tokenised, micro_tokens: int) -> Iterator[list[Example]]:
    """The whole set once, packed, in order: what evaluation runs over."""
    shape: dict[str, Any] = {"batch_rows": None, "batch_tokens": micro_tokens, "micro_tokens": micro_tokens}
    for step in plan_epoch(data.lengths, **shape, seed=0, epoch=0, shuffle=False):
        for micro in step:
            yield [data.example(i) for i in micro]
