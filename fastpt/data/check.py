"""`fastpt check DATA`: everything that can be said about a data set before a run, all its problems at once."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from fastpt.data.example import Example
from fastpt.data.files import Rows
from fastpt.data.formats import Conversation, format_of_row, mixed
from fastpt.data.render import ensure_chat_template, render_conversation, render_text, show_example
from fastpt.data.sources import load_rows
from fastpt.errors import DataError, FastptError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text as RichText

PROBLEMS_SHOWN = 20
BARS = 8


@dataclass
class CheckReport:
    """What `check` found; printable with rich. Lengths are in `unit`, which is words without a tokenizer."""

    source: str
    rows: int = 0
    format: str = ""
    problem_rows: dict[str, int] = field(default_factory=dict)  # the first row's message -> how many rows have it
    notes: list[str] = field(default_factory=list)
    unit: str = "words"
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    trained: int = 0
    max_length: int | None = None
    duplicates: list[tuple[str, str]] = field(default_factory=list)  # (place, place of the first equal row)
    sample: RichText | None = None
    _kinds: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def ok(self) -> bool:
        """Whether a run could start: no row is broken."""
        return self.problem_count == 0

    @property
    def too_long(self) -> int:
        return int((self.lengths > self.max_length).sum()) if self.max_length else 0

    @property
    def lost(self) -> int:
        """Tokens beyond `max_length`, which truncation would lose."""
        return int(np.maximum(self.lengths - self.max_length, 0).sum()) if self.max_length else 0

    @property
    def problem_count(self) -> int:
        return sum(self.problem_rows.values())

    @property
    def problems(self) -> list[str]:
        """One sentence per kind of problem, with the first place that has it."""
        return [
            text if count == 1 else f"{text} (and {count - 1} more rows like it)"
            for text, count in self.problem_rows.items()
        ]

    def add_problem(self, problem: str, place: str = "") -> None:
        """Count a problem; rows that differ only in their place count as one kind."""
        kind = self._kinds.setdefault(problem.replace(place, "") if place else problem, problem)
        self.problem_rows[kind] = self.problem_rows.get(kind, 0) + 1

    def facts(self) -> list[tuple[str, str]]:
        """The findings as (name, value) lines."""
        lines = [("rows", f"{self.rows}"), ("format", self.format or "unknown")]
        total = int(self.lengths.sum())
        if total:
            low, middle, high, top = np.percentile(self.lengths, [5, 50, 95, 100]).astype(int)
            spread = f"median {middle}, 5-95%: {low}-{high}, longest {top}, {total} in all"
            lines += [(f"length in {self.unit}", spread), ("trained", f"{self.trained / total:.1%} of the {self.unit}")]
        if self.max_length:
            share = f" ({self.lost / total:.1%})" if total else ""
            cut = f"{self.too_long} rows, {self.lost} {self.unit} beyond it{share}"
            lines.append((f"over max_length={self.max_length}", cut))
        if self.duplicates:
            first = ", ".join(f"{place} = {earlier}" for place, earlier in self.duplicates[:3])
            lines.append(("exact duplicates", f"{len(self.duplicates)} (first: {first})"))
        else:
            lines.append(("exact duplicates", "none"))
        return lines

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, up to, rows) of bars as wide as a power of two allows."""
        if self.lengths.size == 0:
            return []
        top = int(self.lengths.max()) + 1
        width = 1 << max(0, (top - 1) // BARS).bit_length()
        counts, edges = np.histogram(self.lengths, bins=np.arange(0, top + width, width))
        return [(int(a), int(b), int(c)) for a, b, c in zip(edges[:-1], edges[1:], counts, strict=True)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for name, value in self.facts():
            table.add_row(Text(name, style="dim"), Text(value))
        yield Text(self.source, style="bold")
        yield table
        bars = self.histogram()
        most = max((count for _, _, count in bars), default=1)
        for start, stop, count in bars:
            yield Text(f"{start:>7}-{stop - 1:<7}{'█' * max(bool(count), round(30 * count / most))} {count}")
        for note in self.notes:
            yield Text(note, style="yellow")
        if self.sample is not None:
            yield Text("One row as the model sees it, trained tokens between ⟦ ⟧:", style="dim")
            yield self.sample
        for problem in self.problems[:PROBLEMS_SHOWN]:
            yield Text(problem, style="red")
        if len(self.problems) > PROBLEMS_SHOWN:
            yield Text(f"... and {len(self.problems) - PROBLEMS_SHOWN} more kinds of problem", style="red")
        count = self.problem_count
        verdict = f"{count} problem{'s' * (count > 1)}: mend them first" if count else "ready to train"
        if self.ok and self.too_long:
            verdict += ", once too_long says what to do with the long rows: truncate or drop"
        yield Text(verdict, style="bold green" if self.ok else "bold red")


def check(
    data: Any,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
) -> CheckReport:
    """Read all rows and report problems with file and row, lengths, duplicates, the trained share and a sample.

    Never raises for what is wrong with the data: that is in `report.problems`.
    """
    try:
        rows = load_rows(data, split=split)
    except FastptError as error:
        report = CheckReport(source=data if isinstance(data, str) else type(data).__name__)
        report.add_problem(str(error))
        return report
    if not isinstance(rows, Rows):
        raise DataError(f"{rows.name} is a stream, which has no end to check: check a file or a part of it")
    report = CheckReport(source=rows.name or "data", rows=len(rows), max_length=max_length)
    if tokenizer is not None:
        report.unit = "tokens"
        report.notes += [sentence] if (sentence := ensure_chat_template(tokenizer)) else []
    _check_rows(rows, tokenizer, columns, report)
    return report


def _check_rows(rows: Rows, tokenizer: Any, columns: Mapping[str, str] | None, report: CheckReport) -> None:
    kinds: dict[str, tuple[int, str]] = {}
    seen: dict[int, str] = {}
    lengths: list[int] = []
    for index in range(len(rows)):
        place = rows.place(index)
        try:
            row = rows[index]
            kind = format_of_row(row, place, columns)
            kinds[kind.name] = (kinds.get(kind.name, (0, place))[0] + 1, kinds.get(kind.name, (0, place))[1])
            content = kind.convert(row, place)
            key = xxhash.xxh3_64_intdigest(
                json.dumps(row, sort_keys=True, default=repr).encode("utf-8", "surrogatepass")
            )
            if seen.setdefault(key, place) != place:
                report.duplicates.append((place, seen[key]))
            if tokenizer is None:
                words, trained = _words(content)
                lengths.append(words)
                report.trained += trained
                continue
            examples = _examples(tokenizer, content, place)
        except DataError as error:
            report.add_problem(str(error), place)
            continue
        for example in examples:
            lengths.append(len(example.input_ids))
            report.trained += int(example.trained[1:].sum())
        if report.sample is None:
            report.sample = show_example(examples[0], tokenizer)
    report.lengths = np.array(lengths, np.int64)
    report.format = Counter({name: count for name, (count, _) in kinds.items()}).most_common(1)[0][0] if kinds else ""
    if len(kinds) > 1:
        report.add_problem(mixed(report.source, kinds))


def _examples(tokenizer: Any, content: Any, place: str) -> list[Example]:
    if isinstance(content, Conversation):
        return render_conversation(tokenizer, content, place)
    return [render_text(tokenizer, content, place)]


def _words(content: Any) -> tuple[int, int]:
    """(words, trained words) of a row, without a tokenizer."""
    if not isinstance(content, Conversation):
        count = len(content.text.split())
        return count, count
    counts = [len(message["content"].split()) for message in content.messages]
    trained = sum(
        count
        for index, (count, message) in enumerate(zip(counts, content.messages, strict=True))
        if index >= content.first_trained and message["role"] == "assistant" and message.get("weight", 1) > 0
    )
    return sum(counts), trained
