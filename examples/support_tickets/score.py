"""How many tickets a model gets right: answers are parsed as JSON and compared field by field with the held-out ones.

python examples/support_tickets/score.py RUN   # a run's folder, e.g. runs/support_tickets
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT = Path(__file__).with_name("heldout.jsonl")
FIELDS = ("category", "product", "order", "urgent")
MAX_NEW_TOKENS = 48  # the longest ticket here is 35 tokens of SmolLM2's

Messages = list[dict[str, str]]
Ticket = dict[str, Any]


@dataclass
class Score:
    """Counts over `rows` answers; `right` counts by field. An answer that is no JSON object has no field right."""

    rows: int
    valid: int
    right: dict[str, int]
    exact: int

    @property
    def fields_right(self) -> float:
        """Share of all (row, field) pairs that are right."""
        return sum(self.right.values()) / (self.rows * len(FIELDS))


def parse(answer: str) -> Ticket | None:
    """The ticket in an answer; None unless the whole answer is one JSON object."""
    try:
        ticket = json.loads(answer)
    except ValueError:
        return None
    return ticket if isinstance(ticket, dict) else None


def right_fields(answer: str, ticket: Ticket) -> list[str]:
    """The fields that the answer has exactly as the ticket has them: same type, same text, letter by letter."""
    found = parse(answer) or {}
    return [f for f in FIELDS if f in found and type(found[f]) is type(ticket[f]) and found[f] == ticket[f]]


def score(answers: Sequence[str], tickets: Sequence[Ticket]) -> Score:
    """Compare each answer with its ticket."""
    right = [right_fields(answer, ticket) for answer, ticket in zip(answers, tickets, strict=True)]
    return Score(
        rows=len(tickets),
        valid=sum(parse(answer) is not None for answer in answers),
        right={field: sum(field in fields for fields in right) for field in FIELDS},
        exact=sum(len(fields) == len(FIELDS) for fields in right),
    )


def load(path: Path, rows: int | None = None) -> list[dict[str, Messages]]:
    """The first rows of a jsonl file, all without `rows`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:rows]]


def questions_and_tickets(rows: list[dict[str, Messages]]) -> tuple[list[Messages], list[Ticket]]:
    """The conversations up to the answer, and the tickets that the answers should be."""
    conversations = [row["messages"] for row in rows]
    return [c[:-1] for c in conversations], [json.loads(c[-1]["content"]) for c in conversations]


def table(scores: dict[str, Score]) -> Any:
    """A rich table with one column per score."""
    from rich.table import Table

    rows = next(iter(scores.values())).rows
    result = Table("", *scores, title=f"{rows} held-out messages")
    shares = {
        "valid JSON": [s.valid / s.rows for s in scores.values()],
        **{f"  {field} right": [s.right[field] / s.rows for s in scores.values()] for field in FIELDS},
        "fields right": [s.fields_right for s in scores.values()],
        "exact tickets": [s.exact / s.rows for s in scores.values()],
    }
    for name, values in shares.items():
        result.add_row(name, *(f"{value:.3f}" for value in values))
    return result


def main(folder: str) -> None:
    """Score the held-out rows on a finished run."""
    from rich.console import Console

    import fastpt

    questions, tickets = questions_and_tickets(load(HELD_OUT))
    answers = fastpt.load_run(folder).generate(questions, max_new_tokens=MAX_NEW_TOKENS)
    Console().print(table({folder: score(answers, tickets)}))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
