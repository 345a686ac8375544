"""Conversations and texts as tokens, with exactly the assistant's own tokens trained, for any chat template.

Each assistant turn is rendered as inference would see it: the prompt is the template over the messages before it, the
turn is what the template adds for it. Turns share one example as long as the longer rendering repeats the shorter one;
where a template rewrites history (Qwen3, gpt-oss, DeepSeek), a turn gets an example of its own.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import xxhash

from fastpt.data.example import Example
from fastpt.data.formats import Conversation, Text
from fastpt.errors import DataError, ModelError

if TYPE_CHECKING:
    from rich.text import Text as RichText

PLAIN_TEMPLATE = (
    "{{ bos }}{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
CHATML_TEMPLATE = (
    "{{ bos }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class _Turn:
    """One assistant turn: the rendering up to its end, where the trained part starts, where it may end."""

    text: str
    start: int
    ends: list[int]  # after each of the special tokens that close the turn, the last one first
    weight: float


@dataclass
class _Document:
    text: str
    spans: list[tuple[int, int, float]]  # trained characters [start, end) and their weight


def render_conversation(tokenizer: Any, conversation: Conversation, place: str) -> list[Example]:
    """Examples that train each assistant turn once, in the context that inference would give it.

    Raises: DataError when the template refuses the conversation or drops part of what is to be trained.
    """
    if tokenizer.chat_template is None:
        raise ModelError("the tokenizer has no chat template: give it one with fastpt.data.render.ensure_chat_template")
    turns = [
        _turn(tokenizer, conversation, index, place)
        for index, message in enumerate(conversation.messages)
        if message["role"] == "assistant" and index >= conversation.first_trained and message.get("weight", 1) > 0
    ]
    documents: list[_Document] = []
    for turn in reversed(turns):
        shared = _shared(turn.text, documents[-1].text) if documents else 0
        end = next((end for end in turn.ends if end <= shared), None)
        if end is None:
            documents.append(_Document(turn.text, []))
        documents[-1].spans.append((turn.start, end or len(turn.text), turn.weight))
    documents.reverse()
    encoded = encode(tokenizer, [document.text for document in documents], add_special_tokens=False)
    return [_example(document, *tokens, place) for document, tokens in zip(documents, encoded, strict=True)]


def conversation_text(tokenizer: Any, conversation: Conversation, place: str) -> str:
    """The whole conversation as the chat template renders it: what a reward model reads.

    Raises: DataError when the template refuses it.
    """
    return render(tokenizer, conversation, len(conversation.messages), False, place)


def _turn(tokenizer: Any, conversation: Conversation, index: int, place: str) -> _Turn:
    message = conversation.messages[index]
    full = render(tokenizer, conversation, index + 1, False, place)
    pieces = _pieces(message)
    start = max(0, full.find(pieces[0])) if pieces else 0  # of a conversation that the assistant opens
    if index:
        prompt = render(tokenizer, conversation, index, True, place)
        # A prompt that ends in "<think>" may share the first letters of the answer.
        found = full.rfind(pieces[0]) if pieces else -1
        shared = len(prompt) if full.startswith(prompt) else _shared(full, prompt)
        start = shared if shared == len(prompt) or found < 0 else min(shared, found)
        if "</think>" in message["content"] and not _holds(full[start:], pieces):
            start, full = len(prompt), _with_reasoning(prompt, full, message)
    if not _holds(full[start:], pieces):
        lost = next(piece for piece in pieces if piece not in full[start:])
        raise DataError(
            f"{place}: the chat template leaves out this of message {index + 1} (assistant): {lost[:60]!r}; "
            "use a template that renders it, or take it out of the row"
        )
    ends = _closing_ends(tokenizer, full, start)
    if not ends:  # nothing would teach the model to stop
        if not tokenizer.eos_token:
            raise ModelError("neither the chat template nor the tokenizer has a token that ends a turn: set eos_token")
        full = full.rstrip() + tokenizer.eos_token
        ends = [len(full)]
    return _Turn(full[: ends[0]], start, ends, float(message.get("weight", 1)))


def render(tokenizer: Any, conversation: Conversation, stop: int, add_generation_prompt: bool, place: str) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            conversation.messages[:stop],
            tools=conversation.tools,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **conversation.template_arguments,
        )
    except (TemplateError, TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        roles = ", ".join(message["role"] for message in conversation.messages[:stop])
        raise DataError(
            f"{place}: the chat template refuses this conversation of {roles} ({error}): change the row to what the model's "
            "template takes, or set another template"
        ) from error


def _pieces(message: dict[str, Any]) -> list[str]:
    """What the trained part must hold, in any order: templates move reasoning and trim space, but lose nothing."""
    reasoning = [message.get(key) for key in ("reasoning_content", "reasoning", "thinking")]
    content = re.split(r"</?think>", message["content"])
    calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
    return [piece.strip() for piece in [*content, *reasoning, *calls] if isinstance(piece, str) and piece.strip()]


def _holds(text: str, pieces: list[str]) -> bool:
    return all(piece in text for piece in pieces)


def _with_reasoning(prompt: str, full: str, message: dict[str, Any]) -> str:
    """The turn under a template that deletes reasoning (DeepSeek-R1): the prompt, the content, the template's own end."""
    content = message["content"].strip()
    before, answer, close = full.rpartition(content.split("</think>")[-1].strip())
    if not before or not answer:
        return full
    if prompt.rstrip().endswith("<think>"):
        content = content.removeprefix("<think>").lstrip("\n")
    return prompt + content + close


def _shared(a: str, b: str) -> int:
    """Length of the common prefix, by bisection: comparing slices is much faster than comparing letters."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


_SPECIAL: WeakKeyDictionary[Any, tuple[str, ...]] = WeakKeyDictionary()


def _closing_ends(tokenizer: Any, text: str, start: int) -> list[int]:
    """Where the special tokens end that close the text, last first; only white space may stand between them."""
    if tokenizer not in _SPECIAL:
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        _SPECIAL[tokenizer] = tuple(sorted({*added, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True))
    special = _SPECIAL[tokenizer]
    tail, ends = text[start:].rstrip(), []
    while tail.endswith(special):
        ends.append(start + len(tail))
        tail = tail[: -len(next(token for token in special if tail.endswith(token)))].rstrip()
    return ends


def _example(document: _Document, ids: np.ndarray, offsets: np.ndarray, place: str) -> Example:
    trained = np.zeros(len(ids), bool)
    weights = np.ones(len(ids), np.float32)
    for start, end, weight in document.spans:
        span = document.text[start:end]
        letters = end - len(span.lstrip())
        # A token across the start is trained if it holds letters of the answer, not if it is a special token that
        # takes the white space after it.
        inside = (offsets[:, 0] < end) & (offsets[:, 1] > np.where(offsets[:, 0] < start, letters, start))
        chosen = np.flatnonzero(inside)
        covered = document.text[offsets[chosen[0], 0] : offsets[chosen[-1], 1]] if len(chosen) else ""
        if span.strip() not in covered:
            raise DataError(
                f"{place}: the tokenizer's offsets do not cover the answer {span[:40]!r}, so it cannot be marked: "
                "use a fast tokenizer"
            )
        trained |= inside
        weights[inside] = weight
    return Example(ids, trained, None if (weights == 1).all() else weights, place)


def render_text(tokenizer: Any, text: str | Text, place: str, add_eos: bool = True) -> Example:
    """All tokens of a text trained, with the tokenizer's own special tokens around it and eos at its end."""
    text = text.text if isinstance(text, Text) else text
    ids, _ = encode(tokenizer, [text], add_special_tokens=True)[0]
    eos = tokenizer.eos_token_id
    if add_eos and eos is not None and (len(ids) == 0 or ids[-1] != eos):
        ids = np.append(ids, np.int32(eos))
    return Example(ids, np.ones(len(ids), bool), None, place)


def encode_text(tokenizer: Any, text: str, pair: str | None = None) -> tuple[np.ndarray, int]:
    """Tokens [T] of a text, or of two that are judged together, with the tokenizer's special tokens around them.

    The number is where the tokens of the second text begin, T where the model is told of one only. A tokenizer that puts
    nothing between two texts gets a blank line there.
    """
    if pair is not None and tokenizer.num_special_tokens_to_add(True) == tokenizer.num_special_tokens_to_add(False):
        text, pair = f"{text}\n\n{pair}", None
    if tokenizer.is_fast:
        encoding = backend_of(tokenizer).encode_batch([text if pair is None else (text, pair)])[0]
        ids, types = encoding.ids, encoding.type_ids
    else:
        encoded = tokenizer(text, pair)
        ids, types = encoded["input_ids"], encoded.get("token_type_ids", [])
    is_told = pair is not None and "token_type_ids" in tokenizer.model_input_names and 1 in types
    return np.array(ids, np.int32), types.index(1) if is_told else len(ids)


def encode_words(tokenizer: Any, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [T] of words in a sentence, and of each word the first token of its own [W], -1 where it has none.

    The words are read as a text with blanks between them, so every tokenizer sees what it was trained on.
    """
    ids, offsets = encode(tokenizer, [" ".join(words)], add_special_tokens=True)[0]
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    at = [
        np.flatnonzero((offsets[:, 0] < stop - 1) & (offsets[:, 1] > start))
        for start, stop in pairwise(starts.tolist())
    ]
    firsts = np.array([one[0] if len(one) else -1 for one in at])
    repeated = np.append(False, firsts[1:] == firsts[:-1]) & (firsts >= 0)
    firsts[repeated] = [one[1] if len(one) > 1 else -1 for one, twice in zip(at, repeated, strict=True) if twice]
    return ids, firsts


_SETTING = threading.Lock()


def encode(tokenizer: Any, texts: list[str], *, add_special_tokens: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids [T] and character offsets [T, 2] of each text.

    encode_batch lets go of the interpreter lock, encode does not, so threads help only with the former.
    """
    if not tokenizer.is_fast:
        return [_encode_slowly(tokenizer, text, add_special_tokens) for text in texts]
    encodings = backend_of(tokenizer).encode_batch(texts, add_special_tokens=add_special_tokens)
    return [(np.array(e.ids, np.int32), np.array(e.offsets, np.int64).reshape(-1, 2)) for e in encodings]


def backend_of(tokenizer: Any) -> Any:
    """The tokenizers object of a fast tokenizer, set to neither cut nor pad."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None or backend.padding is not None:
        with _SETTING:  # some tokenizer.json files cut at 128 tokens; every call of the tokenizer itself resets it too
            if backend.truncation is not None or backend.padding is not None:
                backend.no_truncation()
                backend.no_padding()
    return backend


def _encode_slowly(tokenizer: Any, text: str, add_special_tokens: bool) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of a tokenizer that has none: where the decoded prefixes end."""
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    ends = [len(tokenizer.decode(ids[: i + 1], clean_up_tokenization_spaces=False)) for i in range(len(ids))]
    return np.array(ids, np.int32), np.array([[0, *ends[:-1]], ends], np.int64).T.reshape(-1, 2)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of everything that decides which tokens a text becomes, the chat template included."""
    if tokenizer.is_fast:
        model = tokenizer.backend_tokenizer.to_str()
    else:
        model = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    special = json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest((model + special).encode())


def ensure_chat_template(tokenizer: Any) -> str | None:
    """Give a tokenizer without a chat template a plain one; the sentence to say about it, or None."""
    if tokenizer.chat_template is not None:
        return None
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    has_chatml = {"<|im_start|>", "<|im_end|>"} <= added
    if not has_chatml and not tokenizer.eos_token:
        raise ModelError(
            "the tokenizer has neither a chat template nor an eos token, so no turn could end: set eos_token"
        )
    # The template opens with what the tokenizer itself puts before a text.
    prefix = tokenizer("x", add_special_tokens=True)["input_ids"][:1]
    bos = "{{ bos_token }}" if tokenizer.bos_token and prefix == [tokenizer.bos_token_id] else ""
    tokenizer.chat_template = (CHATML_TEMPLATE if has_chatml else PLAIN_TEMPLATE).replace("{{ bos }}", bos)
    kind = (
        "ChatML, whose tokens it knows" if has_chatml else "a plain one ('User:', 'Assistant:', eos after each answer)"
    )
    return f"The tokenizer has no chat template, so it was given {kind}; it is saved with the run."


def show_example(example: Example, tokenizer: Any, *, longest_run: int = 200) -> RichText:
    """The decoded example, its trained tokens bold and between ⟦ ⟧; long runs are shortened in the middle."""
    from rich.text import Text as RichText

    shown = RichText()
    edges = np.flatnonzero(np.diff(example.trained)) + 1
    for run in np.split(np.arange(len(example.input_ids)), edges):
        is_trained = len(run) > 0 and bool(example.trained[run[0]])
        parts = [run] if len(run) <= longest_run else [run[: longest_run // 2], run[-(longest_run // 2) :]]
        texts = [
            tokenizer.decode(example.input_ids[part].tolist(), clean_up_tokenization_spaces=False) for part in parts
        ]
        text = f" … {len(run) - longest_run} tokens … ".join(texts)
        shown.append(f"⟦{text}⟧" if is_trained else text, style="bold green" if is_trained else "dim")
    return shown
