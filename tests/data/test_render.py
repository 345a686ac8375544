"""Exactly the assistant's tokens are trained, in the context that inference gives them, under any chat template."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

from fastpt.data.formats import Conversation
from fastpt.data.render import (
    ensure_chat_template,
    render_conversation,
    render_text,
    show_example,
    tokenizer_fingerprint,
)
from fastpt.errors import DataError, ModelError


def talk(*contents: str, system: str | None = None, **options) -> Conversation:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return Conversation(([{"role": "system", "content": system}] if system else []) + messages, **options)


def trained_runs(tokenizer, examples):
    """Per example, the decoded runs of trained tokens."""
    shown = []
    for example in examples:
        runs = np.split(np.arange(len(example.input_ids)), np.flatnonzero(np.diff(example.trained)) + 1)
        shown.append([tokenizer.decode(example.input_ids[run]) for run in runs if example.trained[run[0]]])
    return shown


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("chatml", [["Four.<|im_end|>", "Yes ünique 🙂.<|im_end|>"]]),
        ("llama3", [["Four.<|eot|>", "Yes ünique 🙂.<|eot|>"]]),
        ("mistral", [[" Four.</s>", " Yes ünique 🙂.</s>"]]),
        ("phi3", [["Four.<|end|>", "Yes ünique 🙂.<|end|>\n</s>"]]),
        ("deepseek", [["Four.</s>", "Yes ünique 🙂.</s>"]]),
        ("qwen3", [["<think>\n\n</think>\n\nFour.<|im_end|>"], ["<think>\n\n</think>\n\nYes ünique 🙂.<|im_end|>"]]),
        ("open", [[" Four.</s>"], [" Yes ünique 🙂.</s>"]]),
    ],
)
def test_two_turns(make_tokenizer, template, expected):
    tokenizer = make_tokenizer(template)
    conversation = talk("2+2?", "Four.", "Sure?", "Yes ünique 🙂.")
    examples = render_conversation(tokenizer, conversation, "row 1")
    assert trained_runs(tokenizer, examples) == expected
    assert {e.input_ids.dtype for e in examples} == {np.dtype(np.int32)}
    # What precedes the trained part of a first turn is what inference would see.
    if template != "deepseek":  # whose generation prompt opens a think block that such a row does not have
        prompt = tokenizer.apply_chat_template(conversation.messages[:1], add_generation_prompt=True, tokenize=False)
        first = examples[0].input_ids[: int(np.argmax(examples[0].trained))]
        assert tokenizer.decode(first) == prompt


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("chatml", [["<think>\nhm\n</think>\n\nFour.<|im_end|>", "<think>\nok\n</think>\n\nYes.<|im_end|>"]]),
        ("qwen3", [["<think>\nhm\n</think>\n\nFour.<|im_end|>"], ["<think>\nok\n</think>\n\nYes.<|im_end|>"]]),
        # The template deletes reasoning; it is put back after the prompt that opens the think block.
        ("deepseek", [["hm\n</think>\n\nFour.</s>"], ["ok\n</think>\n\nYes.</s>"]]),
    ],
)
def test_reasoning_is_never_lost(make_tokenizer, template, expected):
    tokenizer = make_tokenizer(template)
    conversation = talk("2+2?", "<think>\nhm\n</think>\n\nFour.", "Sure?", "<think>\nok\n</think>\n\nYes.")
    examples = render_conversation(tokenizer, conversation, "row 1")
    assert trained_runs(tokenizer, examples) == expected
    if template != "chatml":
        later = tokenizer.decode(examples[1].input_ids)
        assert "hm" not in later, "the second turn's context is the template's, without the first turn's reasoning"


def test_weights_context_and_prompts(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    conversation = talk("a", "b", "c", "d")
    conversation.messages[1]["weight"] = 0
    conversation.messages[3]["weight"] = 0.5
    (example,) = render_conversation(tokenizer, conversation, "row 1")
    assert trained_runs(tokenizer, [example]) == [["d<|im_end|>"]]
    assert set(example.weights[example.trained].tolist()) == {0.5}
    (example,) = render_conversation(tokenizer, talk("a", "b", "c", "d", first_trained=3), "row 1")
    assert trained_runs(tokenizer, [example]) == [["d<|im_end|>"]]
    opened = Conversation([{"role": "assistant", "content": "Welcome"}, *talk("a", "b").messages])
    assert trained_runs(tokenizer, render_conversation(tokenizer, opened, "x")) == [
        ["Welcome<|im_end|>", "b<|im_end|>"]
    ]


def test_same_words_in_question_and_answer(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    (example,) = render_conversation(tokenizer, talk("yes yes", "yes", "yes", "yes yes"), "row 1")
    assert trained_runs(tokenizer, [example]) == [["yes<|im_end|>", "yes yes<|im_end|>"]]


def test_answer_that_begins_like_the_prompt_ends(make_tokenizer):
    tokenizer = make_tokenizer("deepseek")  # whose prompt ends in "<think>", which the rendered turn does not have
    assert trained_runs(tokenizer, render_conversation(tokenizer, talk("a", "<thin>b"), "x")) == [["<thin>b</s>"]]


def test_merged_tokens_at_the_boundary_are_trained(make_tokenizer):
    """A tokenizer that merges ':' with what follows gives a token that is half prompt, half answer."""
    from tokenizers import Tokenizer, models

    tokenizer = make_tokenizer("open")
    letters = sorted({*"ASISTANT: USER2?Four.\n", "<", "/", "s", ">"})
    vocabulary = {token: i for i, token in enumerate([*letters, ": ", ": F"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", " "), (": ", "F")]))
    backend.add_special_tokens(["</s>"])
    tokenizer = type(tokenizer)(tokenizer_object=backend, eos_token="</s>", chat_template=tokenizer.chat_template)
    (example,) = render_conversation(tokenizer, talk("2?", "Four."), "row 1")
    first = int(np.argmax(example.trained))
    assert tokenizer.convert_ids_to_tokens(int(example.input_ids[first])) == ": F"


def test_special_token_that_takes_white_space_is_not_trained(make_tokenizer):
    from tokenizers import AddedToken

    special = ["<s>", "</s>", "[INST]", AddedToken("[/INST]", special=True, rstrip=True)]
    tokenizer = make_tokenizer("mistral", special=special)
    assert trained_runs(tokenizer, render_conversation(tokenizer, talk("a", "b", "c", "d"), "x")) == [
        ["b</s>", "d</s>"]
    ]


@pytest.mark.parametrize(
    ("template", "conversation", "message"),
    [
        (
            "mistral",
            talk("a", "b", system="s"),
            r"row 7: the chat template refuses .*system, user, assistant \(Only user",
        ),
        (
            "{{ messages[0].content }}",
            talk("a", "b"),
            r"row 7: the chat template leaves out .*message 2 \(assistant\): 'b'",
        ),
        ("{% for m in messages %}{{ m.content[:3] }}<|end|>{% endfor %}", talk("a", "bcdef"), "leaves out .*'bcdef'"),
    ],
)
def test_what_a_template_cannot_take_is_said(make_tokenizer, template, conversation, message):
    with pytest.raises(DataError, match=message):
        render_conversation(make_tokenizer(template), conversation, "row 7")


def test_dropped_tool_call_is_an_error(make_tokenizer):
    conversation = talk("a", "b")
    conversation.messages[1]["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    with pytest.raises(DataError, match=r"leaves out .*'add'"):
        render_conversation(make_tokenizer("chatml"), conversation, "row 7")


def test_plain_template_is_given_and_said(make_tokenizer):
    tokenizer = make_tokenizer(None)
    with pytest.raises(ModelError, match="no chat template"):
        render_conversation(tokenizer, talk("a", "b"), "row 1")
    assert "ChatML" in ensure_chat_template(tokenizer)
    assert ensure_chat_template(tokenizer) is None
    assert trained_runs(tokenizer, render_conversation(tokenizer, talk("a", "b"), "x")) == [["b<|im_end|>"]]
    plain = make_tokenizer(None, special=["<s>", "</s>"])
    assert "a plain one" in ensure_chat_template(plain)
    assert trained_runs(plain, render_conversation(plain, talk("a", "b", "c", "d"), "x")) == [["b</s>", "d</s>"]]
    bare = make_tokenizer(None, special=["<s>"])
    bare.eos_token = None
    with pytest.raises(ModelError, match="nor an eos token"):
        ensure_chat_template(bare)


def test_text_ends_with_one_eos(make_tokenizer):
    tokenizer = make_tokenizer()
    example = render_text(tokenizer, "ab", "row 1")
    assert tokenizer.decode(example.input_ids) == "ab</s>"
    assert example.trained.all()
    assert tokenizer.decode(render_text(tokenizer, "ab</s>", "row 1").input_ids) == "ab</s>"
    assert tokenizer.decode(render_text(tokenizer, "ab", "row 1", add_eos=False).input_ids) == "ab"


def test_truncation_set_in_the_tokenizer_file_does_not_cut(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(8)
    assert len(render_text(tokenizer, "a" * 50, "row 1").input_ids) == 51


def test_shown_example_marks_trained_tokens(make_tokenizer):
    tokenizer = make_tokenizer()
    (example,) = render_conversation(tokenizer, talk("Hi [bold]", "Hello" + "o" * 500), "row 1")
    shown = show_example(example, tokenizer)
    assert shown.plain.startswith("<|im_start|>user\nHi [bold]<|im_end|>\n<|im_start|>assistant\n⟦Helloooo")
    assert " … 306 tokens … " in shown.plain
    assert shown.plain.endswith("o<|im_end|>⟧")


def test_fingerprint_follows_template_and_vocabulary(make_tokenizer):
    prints = {tokenizer_fingerprint(make_tokenizer(t)) for t in ("chatml", "chatml", "llama3")}
    prints.add(tokenizer_fingerprint(make_tokenizer("chatml", special=["<s>", "</s>"])))
    assert len(prints) == 3


def trl_templates():
    trl = pytest.importorskip("trl", reason="trl's chat templates are the oracle")
    return Path(trl.__file__).parent / "chat_templates"


@pytest.mark.parametrize("family", ["llama3", "qwen2_5", "qwen3_instruct_2507", "gemma3", "phi3_5", "cohere2"])
def test_masks_agree_with_hand_patched_templates(make_tokenizer, family):
    """TRL marks the assistant's part in patched copies of real templates; ours is found from the originals."""
    import re

    folder = trl_templates()
    if not (folder / f"{family}_training.jinja").exists():
        pytest.skip(f"this trl has no training template for {family}")
    original, patched = ((folder / f"{family}{suffix}.jinja").read_text() for suffix in ("", "_training"))
    special = sorted(set(re.findall(r"<\|[^<>\n' ]*?\|>|<(?:start|end)_of_turn>", original)))
    tokenizer = make_tokenizer(original, special=["<s>", "</s>", *special])
    conversation = talk("2+2?", "Four.", "Sure?", "Yes.", system="Be brief.")
    (example,) = render_conversation(tokenizer, copy.deepcopy(conversation), "row 1")
    theirs = tokenizer.apply_chat_template(
        conversation.messages, chat_template=patched, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = np.array(theirs["input_ids"]), np.array(theirs["assistant_masks"], bool)
    # They also train the line break around a turn, which no one generates after the end-of-turn token.
    content = np.array([tokenizer.decode([i]).strip() != "" for i in ids])
    length = len(example.input_ids)
    assert np.array_equal(ids[:length], example.input_ids)
    assert np.array_equal((mask & content)[:length], example.trained & content[:length])
    assert not (mask & content)[length:].any()
