"""The stream of optimizer steps: what the trainer pulls, whether the set is whole or comes as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastpt.data.pack import plan_epoch
from fastpt.data.render import Example
from fastpt.data.tokenised import Tokenised

Step = list[list[Example]]  # micro-batches of one optimizer step


class PlannedFeed:
    """Steps over a tokenised set, epoch after epoch, each in its own seeded order; the position is (epoch, step)."""

    def __init__(
        self, data: Tokenised, *, batch_rows: int | None, batch_tokens: int, micro_tokens: int, seed: int, shuffle: bool
    ):
        self.data = data
        self.settings: dict[str, Any] = {
            "batch_rows": batch_rows,
            "batch_tokens": batch_tokens,
            "micro_tokens": micro_tokens,
            "seed": seed,
            "shuffle": shuffle,
        }
        self.epoch, self.step = 0, 0
        self._plan = self._plan_of(0)

    def _plan_of(self, epoch: int) -> list[list[list[int]]]:
        return plan_epoch(self.data.lengths, epoch=epoch, **self.settings)

    @property
    def steps_per_epoch(self) -> int:
        return len(self._plan)

    @property
    def progress(self) -> float:
        """Epochs done, with the fraction of the one under way."""
        return self.epoch + self.step / max(1, len(self._plan))

    def position(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "step": self.step}

    def seek(self, position: dict[str, Any]) -> None:
        self.epoch, self.step = position["epoch"], position["step"]
        self._plan = self._plan_of(self.epoch)

    def __iter__(self) -> Iterator[Step]:
        while True:
            while self.step < len(self._plan):
                micro_batches = self._plan[self.step]
                self.step += 1
                yield [[self.data.example(i) for i in micro_batch] for micro_batch in micro_batches]
            self.epoch, self.step = self.epoch + 1, 0
            self._plan = self._plan_of(self.epoch)


def micro_batches(data: Tokenised, micro_tokens: int) -> Iterator[list[Example]]:
    """The whole set once, packed, in order: what evaluation runs over."""
    plan = plan_epoch(
        data.lengths,
        batch_rows=None,
        batch_tokens=micro_tokens,
        micro_tokens=micro_tokens,
        seed=0,
        epoch=0,
        shuffle=False,
    )
    for step in plan:
        for micro_batch in step:
            yield [data.example(i) for i in micro_batch]
