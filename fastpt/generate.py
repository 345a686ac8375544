"""Greedy or sampled answers to conversations, batched with left padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

Conversation = str | list[dict[str, Any]]


@torch.no_grad()
def generate_batch(
    model: nn.Module,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    streamer: Any = None,
) -> list[str]:
    """The model's answer to each conversation (a user message, or a list of messages), without special tokens.

    Greedy at temperature 0. Prompts are grouped by length, so that little is padded; answers come in the order asked.
    """
    prompts = [_prompt_ids(tokenizer, conversation) for conversation in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            texts = _generate(
                model, tokenizer, [prompts[i] for i in chosen], max_new_tokens, temperature, top_p, streamer
            )
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
    finally:
        model.train(was_training)
    return answers


def _prompt_ids(tokenizer: Any, conversation: Conversation) -> list[int]:
    messages = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
    if tokenizer.chat_template is None:
        return tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    streamer: Any,
) -> list[str]:
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    attention_mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    made = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=stop_tokens(model, tokenizer),
        streamer=streamer,
        **sampling,
    )
    return tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's and those of the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None})
