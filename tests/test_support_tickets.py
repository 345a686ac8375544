"""The bundled task: its rows keep the rules of their README, and the score counts what it says."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from fastpt.settings import read_file

FOLDER = Path(__file__).parents[1] / "examples" / "support_tickets"
CATEGORIES = {"shipping", "refund", "billing", "technical", "account", "question"}


@pytest.fixture
def scorer(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return import_module("score")


@pytest.mark.parametrize(("name", "per_category"), [("train", 60), ("heldout", 10)])
def test_rows_keep_the_rules(scorer, name, per_category):
    rows = scorer.load(FOLDER / f"{name}.jsonl")
    counts = dict.fromkeys(CATEGORIES, 0)
    for row in rows:
        system, user, assistant = row["messages"]
        ticket = json.loads(assistant["content"])
        assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
        assert system["content"] == "Write the support ticket as JSON."
        assert tuple(ticket) == scorer.FIELDS
        assert assistant["content"] == json.dumps(ticket, separators=(",", ":"), ensure_ascii=False)
        assert ticket["product"] in user["content"]
        assert ticket["order"] is None or ticket["order"] in user["content"]
        assert type(ticket["urgent"]) is bool
        counts[ticket["category"]] += 1
    assert counts == dict.fromkeys(CATEGORIES, per_category)


def test_held_out_rows_share_nothing_with_the_training_rows(scorer):
    seen = set()
    for name in ("train", "heldout"):
        questions, tickets = scorer.questions_and_tickets(scorer.load(FOLDER / f"{name}.jsonl"))
        for question, ticket in zip(questions, tickets, strict=True):
            for value in {question[-1]["content"], ticket["product"], ticket["order"]} - {None}:
                assert value.lower() not in seen, value
                seen.add(value.lower())


def test_score_counts_fields_of_the_right_type_and_nothing_of_broken_json(scorer):
    ticket = {"category": "refund", "product": "Oak desk", "order": "17", "urgent": True}
    answers = [
        json.dumps(ticket),
        json.dumps({**ticket, "order": 17, "urgent": 1}),  # 1 == True in Python
        json.dumps({"category": "refund"}),
        json.dumps(ticket) + " Anything else?",
        json.dumps([ticket]),
    ]
    found = scorer.score(answers, [ticket] * len(answers))
    assert (found.rows, found.valid, found.exact) == (5, 3, 1)
    assert found.right == {"category": 3, "product": 2, "order": 1, "urgent": 1}
    assert found.fields_right == pytest.approx(7 / 20)


def test_demo_and_toml_are_the_same_run(scorer):
    toml = read_file(FOLDER / "support_tickets.toml")
    for name in ("model", "data", "eval_data", "output"):
        del toml[name]
    assert toml == import_module("demo").SETTINGS
