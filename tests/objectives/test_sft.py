"""Supervised fine-tuning: which turns are trained."""

import pytest

from fastpt.data.files import Records
from fastpt.errors import ConfigError
from fastpt.objectives import make_objective
from tests.tiny import tiny_tokenizer

TURNS = [
    {"role": "user", "content": "red"},
    {"role": "assistant", "content": "blue"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
]


@pytest.mark.parametrize(("last_turn_only", "answers"), [(False, ["blue", "two"]), (True, ["two"])])
def test_the_turns_that_are_asked_for_are_trained(last_turn_only, answers):
    tokenizer = tiny_tokenizer()
    prepare = make_objective({"name": "sft", "last_turn_only": last_turn_only}).bind(
        tokenizer, Records([{"messages": TURNS}]), None
    )
    (example,) = prepare({"messages": TURNS}, "rows:1")
    trained = tokenizer.decode(example.input_ids[example.trained].tolist())
    assert [word for word in ("blue", "two") if word in trained] == answers


def test_a_text_has_no_turns():
    with pytest.raises(ConfigError, match="last_turn_only: Extra inputs"):
        make_objective({"name": "pretrain", "last_turn_only": True})
