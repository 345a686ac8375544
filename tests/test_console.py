"""The console: what a log gets, what a terminal gets, and that neither is broken by foreign text."""

import io
import sys
from types import SimpleNamespace

import pytest
from rich.text import Text

from fastpt.console import LOG_LINES, Console, duration, size


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


RUN = SimpleNamespace(status="finished", report="runs/x/report.html")


def trainer(total=400, start=0):
    return SimpleNamespace(total_steps=total, start_step=start)


def record(step, **more):
    return {"step": step, "loss": 1.5, "tokens": 100, "tokens_per_s": 1234.0, "peak_bytes": 3 << 30, **more}


def ticking(seconds_per_call=1.0):
    now = [0.0]

    def clock():
        now[0] += seconds_per_call
        return now[0]

    return clock


def test_log_has_about_twenty_lines_of_progress():
    log = io.StringIO()
    console = Console(file=log, clock=ticking())
    console.on_start(trainer())
    for step in range(1, 401):
        console.on_step(None, record(step))
    lines = log.getvalue().splitlines()
    assert LOG_LINES <= len(lines) <= LOG_LINES + 2
    assert lines[0].startswith("step 1/400")
    assert lines[-1].startswith("step 400/400")
    assert "loss 1.5  1,234 tok/s  3.0 GiB" in lines[-1]
    assert "left" in lines[5]
    assert "\x1b" not in log.getvalue()


def test_remaining_time_counts_from_the_step_resumed_at():
    log = io.StringIO()
    now = [0.0]
    console = Console(file=log, clock=lambda: now[0])
    console.on_start(trainer(total=400, start=300))
    now[0] = 10.0
    console.on_step(None, record(310))
    assert "1:30 left" in log.getvalue()


def test_terminal_shows_a_bar_and_never_hides_the_cursor():
    screen = Screen()
    console = Console(file=screen, clock=ticking())
    console.on_start(trainer(total=10))
    shown, hidden = (screen.getvalue().rfind(code) for code in ("\x1b[?25h", "\x1b[?25l"))
    assert shown > hidden, "the cursor is hidden while the run is on, and a kill would leave it so"
    for step in range(1, 11):
        console.on_step(None, record(step))
    console.on_end(None, RUN)
    written = screen.getvalue()
    assert "10/10" in written
    assert "1,234 tok/s" in written
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l")
    assert "finished after 10 steps" in written
    assert "report: runs/x/report.html" in written


def test_a_failing_run_takes_its_bar_away():
    before = sys.stdout, sys.stderr
    console = Console(file=Screen())

    def fail():
        with console:
            console.on_start(trainer())
            assert (sys.stdout, sys.stderr) != before, "prints of others should go above the bar"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (sys.stdout, sys.stderr) == before
    console.close()  # twice does no harm


def test_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen()
    console = Console(file=screen)
    console.on_start(trainer(total=2))
    console.on_step(None, record(1))
    assert screen.getvalue().startswith("step 1/2")


def test_quiet_prints_warnings_and_skipped_steps_only():
    log = io.StringIO()
    console = Console(quiet=True, file=log)
    console.say("decided")
    console.table("t", ("a",), [("b",)])
    console.show_sample(Text("x"), "sample")
    console.on_start(trainer())
    console.on_step(None, record(1))
    console.on_evaluate(None, {"eval_loss": 1.0})
    console.on_end(None, RUN)
    assert log.getvalue() == ""
    console.warn("disk full")
    console.on_step(None, record(2, loss=float("nan"), grad_norm=1.0, skipped=True, rows=["d.jsonl:7", "d.jsonl:9"]))
    first, second = log.getvalue().splitlines()
    assert first == "warning: disk full"
    assert "step 2 SKIPPED" in second
    assert "d.jsonl:7, d.jsonl:9" in second


def test_skipped_step_without_a_guilty_row_says_so():
    log = io.StringIO()
    console = Console(file=log)
    console.on_start(trainer())
    console.on_step(None, record(1, loss=float("inf"), skipped=True, rows=[]))
    assert "each of its rows alone is finite" in log.getvalue()


def test_foreign_text_is_printed_as_it_is_and_cannot_steer_the_terminal():
    screen = Screen()
    console = Console(file=screen)
    console.say("[bold]a[/bold] :smile: \x1b[2J\r " + "long " * 60)
    written = screen.getvalue()
    assert "[bold]a[/bold] :smile: ␛[2J␍" in written
    assert "\x1b[2J" not in written
    assert len(written.splitlines()) == 1
    console.show_sample(Text("evil \x1b[2J"), "row \x1b]0;x")
    assert "\x1b[2J" not in screen.getvalue()
    assert "\x1b]0" not in screen.getvalue()


def test_sample_keeps_its_marks():
    sample = Text("user: hi\nassistant: ").append("⟦hello\x1b⟧", style="bold green").append(" end")
    log, screen = io.StringIO(), Screen()
    Console(file=log).show_sample(sample, "first example")
    assert log.getvalue() == "first example\nuser: hi\nassistant: ⟦hello␛⟧ end\n"
    Console(file=screen).show_sample(sample, "first example")
    assert "\x1b[1;32m⟦hello␛⟧\x1b[0m end" in screen.getvalue()


def test_evaluation_and_table():
    log = io.StringIO()
    console = Console(file=log)
    console.on_start(trainer())
    console.on_step(None, record(25))
    console.on_evaluate(None, {"eval_loss": 1.23456, "note": "text"})
    console.table("lengths", ("tokens", "rows"), [("0-100", 12)])
    assert "evaluation after step 25: eval_loss 1.235\n" in log.getvalue()
    assert "0-100   12" in log.getvalue()


def test_units():
    assert [size(x) for x in (12, 1536, 3 << 30)] == ["12 B", "1.5 KiB", "3.0 GiB"]
    assert [duration(x) for x in (9, 75, 7262)] == ["0:09", "1:15", "2:01:02"]
