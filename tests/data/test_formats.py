"""Every known row shape becomes the same conversation; every broken row is named with a remedy."""

from __future__ import annotations

import pytest

from fastpt.data.formats import Conversation, Text, recognise
from fastpt.data.sources import load_rows
from fastpt.errors import DataError

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def convert(row, **options):
    rows = load_rows([row])
    return recognise(rows, **options).convert(rows[0], rows.place(0))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": HI}),
        ("messages", {"messages": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'}),
        ("messages", {"messages": [{**HI[0], "name": None, "tool_calls": None}, HI[1]], "text": None}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, HI[1]]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
        ("sharegpt", {"conversations": HI}),
        ("prompt/completion", {"prompt": "Hi", "completion": "Hello"}),
        ("prompt/completion", {"prompt": HI[:1], "completion": HI[1:]}),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}),
    ],
)
def test_known_shapes_are_one_conversation(name, row):
    assert recognise(load_rows([row])).name == name
    assert convert(row).messages == HI


def test_details_of_shapes():
    assert convert({"text": "plain"}) == Text("plain")
    assert convert({"messages": None, "text": "a table fills what a row lacks with None"}) == Text(
        "a table fills what a row lacks with None"
    )
    assert convert({"instruction": "Add", "input": "2 2", "output": "4"}).messages[0]["content"] == "Add\n\n2 2"
    with_system = convert(
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
    )
    assert [m["role"] for m in with_system.messages] == ["system", "user", "assistant"]
    context = convert({"prompt": [*HI, {"role": "user", "content": "More"}], "completion": "Sure"})
    assert context.first_trained == 3
    asked = convert({"question": "1+1", "answer": "2", "n": 1}, columns={"prompt": "question", "completion": "answer"})
    assert [m["content"] for m in asked.messages] == ["1+1", "2"]


def test_tool_calls_are_objects_as_templates_want_them():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    messages = [
        HI[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        HI[1],
    ]
    conversation = convert({"messages": messages, "tools": tools})
    assert isinstance(conversation, Conversation)
    assert conversation.tools == tools
    assert conversation.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 2}}}],
    }
    sharegpt = convert({"conversations": [
        {"from": "human", "value": "2+2"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "4"}, {"from": "gpt", "value": "4"},
    ], "tools": "[]"})  # fmt: skip
    assert sharegpt.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, "row 1 has nothing \\(None\\) as 'text'"),
        ({"text": 3}, "row 1 has int 3 as 'text'"),
        ({"text": " "}, "row 1 has an empty 'text'"),
        ({"prompt": "Hi", "completion": ""}, "row 1 has an empty 'completion'"),
        ({"prompt": None, "completion": "x"}, "row 1 has nothing \\(None\\) as 'prompt'"),
        ({"instruction": "Hi", "output": None}, "row 1 has nothing \\(None\\) as 'output'"),
        ({"messages": None}, "row 1 has nothing \\(None\\) as 'messages'"),
        ({"messages": []}, "row 1 has an empty list of 'messages'"),
        ({"messages": {"role": "user"}}, "row 1 has dict as 'messages'"),
        ({"messages": "[{"}, "row 1 has 'messages' that is neither a list nor its JSON"),
        ({"messages": ["Hi"]}, "row 1: message 1 is str 'Hi', not an object with role and content"),
        ({"messages": [HI[0], {"role": "assistant", "content": None}]}, "message 2 \\(assistant\\) has no content \\(None\\)"),
        ({"messages": [HI[0], {"role": "assistant", "content": ""}]}, "message 2 \\(assistant\\) is empty"),
        ({"messages": [HI[0], {"role": "assistant", "content": 4}]}, "message 2 has int 4 as content"),
        ({"messages": [{"role": "alien", "content": "Hi"}]}, "message 1 has the role 'alien': use system, user"),
        ({"messages": [{"content": "Hi"}]}, "message 1 has the role None"),
        ({"messages": HI[:1]}, "row 1 has no assistant turn, so there is nothing to train on"),
        ({"messages": [HI[0], {**HI[1], "weight": 0}]}, "only assistant turns of weight 0"),
        ({"messages": [HI[0], {**HI[1], "weight": -1}]}, "message 2 has weight -1"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, HI[1]]}, "part of type 'image_url'"),
        ({"messages": [HI[0], {"role": "assistant", "tool_calls": [{}]}]}, "tool call .* without a function name"),
        ({"question": "a", "answer": "b"}, 'columns={"prompt": "question", "completion": "answer"}'),
        ({}, "row 1 has the columns none"),
    ],
)  # fmt: skip
def test_broken_rows_are_named(row, message):
    with pytest.raises(DataError, match=message):
        convert(row)


def test_all_rows_are_looked_at(jsonl):
    path = jsonl(*[{"text": "a"}] * 300, {"messages": HI}, {"text": "b"})
    with pytest.raises(
        DataError, match=r"mixes rows of 2 formats: 301 text \(first .*:1\), 1 messages \(first .*:301\)"
    ):
        recognise(load_rows(path))
    path = jsonl(*[{"text": "a"}] * 300, {"txt": "b"})
    with pytest.raises(DataError, match=r":301 has the columns txt"):
        recognise(load_rows(path))
    streamed = load_rows(path, streaming=True)  # only sampled, so the odd row shows when it is converted
    row, place = list(streamed)[-1]
    with pytest.raises(DataError, match=r":301 has no column 'text'"):
        recognise(streamed).convert(row, place)


def test_missing_mapped_column_is_named(jsonl):
    columns = {"prompt": "question", "completion": "answer"}
    rows = load_rows(jsonl({"question": "a", "answer": "b"}, {"question": "a"}))
    with pytest.raises(DataError, match=r":2 has the columns question \(with columns="):
        recognise(rows, columns=columns)
