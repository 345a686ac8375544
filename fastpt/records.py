"""history.jsonl: one JSON record per logged step or evaluation, appended as they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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
