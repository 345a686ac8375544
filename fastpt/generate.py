"""Greedy or sampled answers to conversations.

Recognised models decode on a static KV cache (fusion/decode.py): a sequence that ends frees its slot, which the next prompt
takes at once. Others go through their own generate(), padded on the left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastpt.fusion.decode import Decoder

PREFILL_TOKENS = 4096  # of prompts packed into one forward: bounds its memory
FIRST_CANDIDATES = 256  # top_p looks at this many tokens before it sorts more

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

    Greedy at temperature 0; sampled from softmax(logits / temperature), cut to the top_p nucleus, above. batch_size is how
    many sequences are decoded at a time (one with a streamer). Answers come in the order asked.
    """
    prompts = [_prompt_ids(tokenizer, conversation) for conversation in conversations]
    made = generate_tokens(
        model, prompts, stop=stop_tokens(model, tokenizer), pad=tokenizer.pad_token_id, max_new_tokens=max_new_tokens,
        temperature=temperature, top_p=top_p, batch_size=batch_size, streamer=streamer,
    )  # fmt: skip
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in made]


@torch.no_grad()
def generate_tokens(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[int],
    pad: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    streamer: Any = None,
) -> list[list[int]]:
    """The tokens that follow each prompt, up to and including the first of `stop`.

    A model that is not fused is fused for the duration, which probes every block: call fastpt.fuse once before many calls.
    `pad` fills the rows of models that decode by their own generate().
    """
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    batch_size = 1 if streamer is not None else min(batch_size, len(prompts))
    was_training = model.training
    model.eval()
    try:
        with _decoder(model, prompts, batch_size, max_new_tokens) as decoder:
            if decoder is None:
                return _by_model(model, prompts, stop, pad, max_new_tokens, temperature, top_p, batch_size, streamer)
            return _by_decoder(decoder, prompts, set(stop), max_new_tokens, temperature, top_p, batch_size, streamer)
    finally:
        model.train(was_training)


def _prompt_ids(tokenizer: Any, conversation: Conversation) -> list[int]:
    messages = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
    if tokenizer.chat_template is None:
        return tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@contextmanager
def _decoder(
    model: nn.Module, prompts: Sequence[Sequence[int]], slots: int, max_new_tokens: int
) -> Iterator[Decoder | None]:
    """A decoder for the model as it is now, or None when only its own generate() is right."""
    from fastpt.errors import ModelError
    from fastpt.fusion.decode import Decoder
    from fastpt.fusion.fuse import fuse, handle_of
    from fastpt.fusion.projection import NotFusable

    handle, decoder, is_ours = handle_of(model), None, False
    capacity = max(len(prompt) for prompt in prompts) + max_new_tokens
    try:
        is_ours = handle is None
        handle = handle or fuse(model)
        decoder = Decoder(handle, model, slots, capacity)
    except (ModelError, NotFusable):  # Decoder's own message tells why
        pass
    try:
        yield decoder
    finally:
        if is_ours and handle is not None:
            handle.remove()


def _by_decoder(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    stop: set[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    slots: int,
    streamer: Any,
) -> list[list[int]]:
    """Continuous batching: one step for all sequences that go on, and a prefill as soon as a slot is free."""
    made: list[list[int]] = [[] for _ in prompts]
    pending, free = deque(range(len(prompts))), list(range(slots))
    running: dict[int, int] = {}  # prompt -> slot

    def take(chosen: Sequence[int], logits: Tensor) -> None:
        tokens = choose(logits, temperature, top_p)
        for i, token in zip(chosen, tokens.tolist(), strict=True):
            made[i].append(token)
            if token in stop or len(made[i]) == max_new_tokens:
                free.append(running.pop(i))
        if streamer is not None:
            streamer.put(tokens)
            if not running:
                streamer.end()

    while pending or running:
        if pending and free:
            chosen = _next_prompts(pending, len(free), prompts)
            running.update((i, free.pop()) for i in chosen)
            if streamer is not None:
                streamer.put(torch.tensor([prompts[i] for i in chosen]))
            take(chosen, decoder.prefill([prompts[i] for i in chosen], [running[i] for i in chosen]))
        else:
            chosen = list(running)
            positions = [len(prompts[i]) + len(made[i]) - 1 for i in chosen]
            take(chosen, decoder.step([made[i][-1] for i in chosen], [running[i] for i in chosen], positions))
    return made


def _next_prompts(pending: deque[int], most: int, prompts: Sequence[Sequence[int]]) -> list[int]:
    """At most `most` prompts, taken from the front, that pack into PREFILL_TOKENS (or one that does not)."""
    chosen: list[int] = []
    tokens = 0
    while pending and len(chosen) < most and (not chosen or tokens + len(prompts[pending[0]]) <= PREFILL_TOKENS):
        chosen.append(pending.popleft())
        tokens += len(prompts[chosen[-1]])
    return chosen


def choose(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token for each row of logits [M, V]: the largest, or drawn with torch's generator."""
    if temperature <= 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if top_p >= 1:
        # One number a row finds its token in the running sum: multinomial draws one for each token of the vocabulary.
        sums = probabilities.cumsum(-1, dtype=torch.float64)
        total = sums[:, -1:]
        drawn = torch.rand(len(sums), 1, dtype=torch.float64, device=sums.device) * total
        drawn = drawn.minimum(
            total.nextafter(torch.zeros_like(total))
        )  # rounding must not pass the last possible token
        return torch.searchsorted(sums, drawn, right=True).squeeze(1)
    count = min(FIRST_CANDIDATES, logits.shape[1])
    top, tokens = probabilities.topk(count)
    if bool((top.sum(-1) < top_p).any()):
        top, tokens = probabilities.sort(dim=-1, descending=True)
    before = top.cumsum(-1) - top  # the nucleus: tokens until their sum reaches top_p, the first always
    kept = top.masked_fill(before >= top_p, 0)
    return tokens.gather(1, kept.multinomial(1)).squeeze(1)


def _by_model(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[int],
    pad: int | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    batch_size: int,
    streamer: Any,
) -> list[list[int]]:
    """The same through model.generate; prompts are grouped by length, so that little is padded."""
    made: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    device = next(model.parameters()).device
    fill = next(iter(stop), 0) if pad is None else pad  # masked, so any token does
    # Nothing of the model's generation config but its stop tokens: the same distribution as with a decoder.
    sampling: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
    if temperature > 0:
        sampling |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in chosen)
        rows = [[fill] * (longest - len(prompts[i])) + list(prompts[i]) for i in chosen]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
        out = model.generate(
            input_ids=torch.tensor(rows, device=device), attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max_new_tokens, pad_token_id=fill, eos_token_id=list(stop) or None, streamer=streamer, **sampling,
        )  # fmt: skip
        for i, tokens in zip(chosen, out[:, longest:].tolist(), strict=True):
            ends = next((n + 1 for n, token in enumerate(tokens) if token in stop), len(tokens))
            made[i] = tokens[:ends]
    return made


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's and those of the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None})
