"""`check` finds every problem in one pass and never raises for the data's sake."""

from __future__ import annotations

import io

from rich.console import Console

from fastpt.data.check import check


def printed(report) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report)
    return console.export_text()


GOOD = {"messages": [{"role": "user", "content": "How are you"}, {"role": "assistant", "content": "Well thanks"}]}


def test_a_good_set(jsonl, make_tokenizer):
    path = jsonl(
        *[{"prompt": f"Say {i}", "completion": "word " * (i + 1)} for i in range(20)],
        {"prompt": "Say 3", "completion": "word " * 4},
    )
    report = check(path, tokenizer=make_tokenizer("chatml"), max_length=100)
    assert report.ok
    assert (report.rows, report.format, report.unit) == (21, "prompt/completion", "tokens")
    assert report.duplicates == [(f"{path}:21", f"{path}:4")]
    assert report.too_long == int((report.lengths > 100).sum()) > 0
    assert report.lost == int((report.lengths - 100).clip(0).sum())
    assert sum(count for _, _, count in report.histogram()) == 21
    text = printed(report)
    assert "⟦word <|im_end|>⟧" in text
    assert "ready to train" in text
    assert f"{report.lost} tokens beyond it" in text


def test_all_problems_are_reported(jsonl):
    none = {"messages": [GOOD["messages"][0], {"role": "assistant", "content": None}]}
    path = jsonl(GOOD, "{oops}", none, GOOD, none, {"text": "odd one out"}, {"words": "?"})
    report = check(path)
    assert not report.ok
    assert (report.rows, report.format, report.unit) == (7, "messages", "words")
    assert report.problem_count == 5
    problems = "\n".join(report.problems)
    for expected in [
        ":2 is not valid JSON",
        ":3: message 2 (assistant) has no content",
        "1 more rows like it",
        ":7 has the columns words",
    ]:
        assert expected in problems
    assert "4 messages (first" in problems
    assert "1 text (first" in problems
    assert report.duplicates == [(f"{path}:4", f"{path}:1")]
    assert report.trained == 4 + 3
    assert "5 problems" in printed(report)


def test_files_that_cannot_be_read_at_all(tmp_path, jsonl):
    for path, expected in [(tmp_path / "no.jsonl", "there is no file"), (jsonl(), "has no rows")]:
        report = check(str(path))
        assert not report.ok
        assert expected in report.problems[0]
        assert "1 problem:" in printed(report)


def test_tokenizer_without_template_is_said(jsonl, make_tokenizer):
    report = check(jsonl(GOOD), tokenizer=make_tokenizer(None))
    assert report.ok
    assert "no chat template" in report.notes[0]
    assert "no chat template" in printed(report)


def test_template_that_refuses_is_a_problem(jsonl, make_tokenizer):
    system = {"messages": [{"role": "system", "content": "Be kind"}, *GOOD["messages"]]}
    report = check(jsonl(GOOD, system), tokenizer=make_tokenizer("mistral"))
    assert report.problem_count == 1
    assert ":2: the chat template refuses" in report.problems[0]
