"""history.jsonl: one JSON record per logged step or evaluation, appended as they come; and which evaluation was best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastpt.errors import ConfigError


class History(list):
    """The records of a run, in memory and in `path`."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def add(self, record: dict[str, Any]) -> None:
        self.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def keep_until(self, step: int) -> None:
        """Go on from `step`: take up the file's records until then and drop the later ones, which will be made again."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self[:] = [record for record in map(_parsed, lines) if record is not None and record["step"] <= step]
        self.path.write_text("".join(json.dumps(record) + "\n" for record in self))


def read_history(path: Path) -> list[dict[str, Any]]:
    """All whole records of a history file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(_parsed, lines) if record is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    """A record, or None for a last line that a crash cut short."""
    try:
        return json.loads(line)
    except ValueError:
        return None


class Best:
    """The best evaluation by a metric (a leading + maximises it), and how many have come since without a better one.

    `found` is {"step", "metric", "value"} or None. The count goes on until an evaluation is better by more than `min_delta`.
    """

    def __init__(self, metric: str, patience: int | None, min_delta: float):
        self.metric, self.sign = metric.removeprefix("+"), -1 if metric.startswith("+") else 1
        self.patience, self.min_delta = patience, min_delta
        self.found: dict[str, Any] | None = None
        self.since = 0
        self.mark: float | None = None  # the signed value to beat

    def update(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether these metrics are the best so far. Raises: ConfigError when the metric is not among them."""
        if self.metric not in metrics:
            raise ConfigError(
                f"best_metric {self.metric!r} is not among the evaluation's metrics: {', '.join(metrics)}"
            )
        value = metrics[self.metric]
        is_best = self.found is None or self.sign * value < self.sign * self.found["value"]
        if is_best:
            self.found = {"step": step, "metric": self.metric, "value": value}
        if self.mark is None or self.sign * value < self.mark - self.min_delta:
            self.since, self.mark = 0, self.sign * value
        else:
            self.since += 1
        return is_best

    @property
    def is_over(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.since >= self.patience

    def state(self) -> dict[str, Any]:
        return {"found": self.found, "since": self.since, "mark": self.mark}

    def load(self, state: dict[str, Any]) -> None:
        self.found, self.since, self.mark = state["found"], state["since"], state["mark"]
