"""What a person sees of a run: a progress bar on a terminal, about twenty plain lines in a log, warnings always.

The bar is redrawn by the training thread when a step ends, so nothing runs in the background, and the cursor stays visible.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console as Terminal
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

LOG_LINES = 20  # progress lines of a whole run where there is no terminal
LOG_WIDTH = 120
# Control characters of foreign text (a data file may hold any) become visible signs, so that they cannot steer the terminal.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class Console:
    """Callback that shows a run. `quiet` leaves only warnings, on stderr.

    Text is printed as it is: no markup, no emoji codes, no line breaks of our own. Use it as a context manager, or call
    `close()` when a run fails, so that the bar does not stay under what is printed next.
    """

    def __init__(self, quiet: bool = False, file: IO[str] | None = None, clock: Callable[[], float] = time.monotonic):
        stream = file or (sys.stderr if quiet else sys.stdout)
        self.quiet = quiet
        self._terminal = Terminal(file=stream, markup=False, emoji=False, highlight=False)
        if not self._terminal.is_terminal:
            self._terminal.width = LOG_WIDTH
        self._clock = clock
        self._has_bar = not quiet and self._terminal.is_terminal and not self._terminal.is_dumb_terminal
        self._progress: Progress | None = None

    # ---- what anyone may print --------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """One line: what was decided, and why."""
        if not self.quiet:
            self._print(Text(_visible(text)))

    def warn(self, text: str) -> None:
        """One line that is shown even when quiet."""
        self._print(Text.assemble(("warning: ", "bold yellow"), _visible(text)))

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table with a title; cells are shown as str()."""
        if self.quiet:
            return
        table = Table(
            title=_visible(title),
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
            show_header=any(columns),
        )
        for column in columns:
            table.add_column(_visible(column), overflow="fold")
        for row in rows:
            table.add_row(*(Text(_visible(str(cell))) for cell in row))
        self._terminal.print(table)

    def show_sample(self, text: Text, title: str) -> None:
        """A decoded example, as fastpt.data.render.show_example marks it."""
        if self.quiet:
            return
        sample = text.copy()
        sample.plain = _visible(sample.plain)  # one sign for one, so the styles keep their places
        if self._terminal.is_terminal:
            self._terminal.print(Panel(sample, title=Text(_visible(title)), title_align="left"))
        else:
            self.say(title)
            self._print(sample)

    # ---- the run ----------------------------------------------------------------------------------------------------

    def on_start(self, trainer: Any) -> None:
        self._total, self._first, self._began = trainer.total_steps, trainer.start_step, self._clock()
        self._last: dict[str, Any] = {}
        self._tokens, self._peak_bytes, self._drawn, self._said = 0, 0, 0.0, -1
        if not self._has_bar:
            return
        counter, state = TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}", markup=False)
        self._progress = Progress(
            counter, BarColumn(bar_width=None), state, console=self._terminal, auto_refresh=False, expand=True
        )
        self._progress.add_task("", total=self._total, completed=self._first)
        self._progress.start()
        self._terminal.show_cursor(True)  # rich hides it, and a killed process could not give it back
        self._stop = weakref.finalize(
            self, self._progress.stop
        )  # also at exit, for a caller that neither ends nor closes

    def on_step(self, trainer: Any, record: dict[str, Any]) -> None:
        step = record["step"]
        if record.get("skipped"):
            self._warn_skipped(record)
        self._last = record
        self._tokens += record.get("tokens") or 0
        self._peak_bytes = max(self._peak_bytes, record.get("peak_bytes") or 0)
        if self.quiet:
            return
        if self._progress is not None:
            now = self._clock()
            if now - self._drawn >= 0.1 or step == self._total:
                self._drawn = now
                self._progress.update(
                    self._progress.task_ids[0], completed=step, description=self._line(record), refresh=True
                )
            return
        part = step * LOG_LINES // max(1, self._total)
        if part != self._said or step == self._first + 1:
            self._said = part
            self.say(f"step {step}/{self._total}  {self._line(record)}")

    def on_evaluate(self, trainer: Any, metrics: dict[str, Any]) -> None:
        shown = "  ".join(
            f"{name} {_number(value)}" for name, value in metrics.items() if isinstance(value, (int, float))
        )
        self.say(f"evaluation after step {self._last.get('step', self._first)}: {shown}")

    def on_save(self, trainer: Any, path: Path) -> None:
        self.say(f"saved {path}")

    def on_end(self, trainer: Any, run: Any) -> None:
        self.close()
        seconds = max(self._clock() - self._began, 1e-9)
        steps = self._last.get("step", self._first) - self._first
        memory = f", peak memory {size(self._peak_bytes)}" if self._peak_bytes else ""
        self.say(
            f"{run.status} after {steps} steps in {duration(seconds)}: {self._tokens / seconds:,.0f} tokens/s in all{memory}"
        )
        self.say(f"report: {run.report}")

    def close(self) -> None:
        """Take the bar away (its last state stays on the screen). Harmless when there is none."""
        if self._progress is not None:
            self._stop()
            self._progress = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _line(self, record: dict[str, Any]) -> str:
        done, left = record["step"] - self._first, self._total - record["step"]
        parts = [
            f"loss {_number(record.get('loss'))}",
            f"reward {_number(record['reward'])}" if "reward" in record else "",
            f"{record['tokens_per_s']:,.0f} tok/s" if record.get("tokens_per_s") else "",
            size(record["peak_bytes"]) if record.get("peak_bytes") else "",
            f"{duration((self._clock() - self._began) / done * left)} left" if left and done > 0 else "",
        ]
        return "  ".join(part for part in parts if part)

    def _warn_skipped(self, record: dict[str, Any]) -> None:
        rows = [str(row) for row in record.get("rows") or ()]
        found = f"loss {record.get('loss')}, gradient norm {record.get('grad_norm')}"
        named = f"; rows: {', '.join(rows)}" if rows else "; each of its rows alone is finite"
        message = f"step {record['step']} SKIPPED, weights unchanged: not finite ({found}){named}"
        if parameters := record.get("skipped_parameters"):
            more = f" and {len(parameters) - 3} more" if len(parameters) > 3 else ""
            message = f"step {record['step']} SKIPPED {', '.join(parameters[:3])}{more}: gradient not finite ({found})"
        self._print(Text.assemble(("warning: ", "bold yellow"), (_visible(message), "bold red")))

    def _print(self, text: Text) -> None:
        self._terminal.print(text, soft_wrap=True)


def size(n_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"


def duration(seconds: float) -> str:
    """75 -> "1:15", 7262 -> "2:01:02"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"


def _visible(text: str) -> str:
    return text.translate(VISIBLE)
