"""Answers to conversations: sampling, streaming, and models that decode by their own generate."""

import pytest
import torch

from fastpt.generate import choose, generate_batch, generate_tokens
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_come_in_the_order_asked_and_alone_or_together(family):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    questions = ["a longer question than others", "b", [{"role": "user", "content": "middling"}], "a"]
    together = generate_batch(model, tokenizer, questions, max_new_tokens=7, batch_size=2)
    alone = [generate_batch(model, tokenizer, [question], max_new_tokens=7)[0] for question in questions]
    assert together == alone
    assert generate_batch(model, tokenizer, []) == []
    assert generate_batch(model, tokenizer, ["a"], max_new_tokens=0) == [""]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stop_tokens_end_an_answer(family):
    model, prompt = tiny_model(family), [7, 9, 30]
    (tokens,) = generate_tokens(model, [prompt], stop=[], pad=0, max_new_tokens=9)
    assert len(tokens) == 9
    stop = tokens[4]
    (cut,) = generate_tokens(model, [prompt], stop=[stop], pad=0, max_new_tokens=9)
    assert cut == tokens[: tokens.index(stop) + 1]


class Recorder:
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_streamer_gets_the_prompt_then_each_token_then_the_end(family):
    model, recorder, prompts = tiny_model(family), Recorder(), [[7, 9, 30], [50, 4]]
    made = generate_tokens(model, prompts, stop=[], pad=0, max_new_tokens=3, streamer=recorder)
    by_length = [1, 0] if family == "gpt2" else [0, 1]
    expected = []
    for i in by_length:
        expected += [[prompts[i]], *([token] for token in made[i]), "end"]
    assert recorder.got == expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sampling_follows_the_seed(family):
    model = tiny_model(family)

    def sample(seed):
        torch.manual_seed(seed)
        return generate_tokens(
            model, [[7, 9, 30]] * 3, stop=[], pad=0, max_new_tokens=12, temperature=1.0, top_p=0.95, batch_size=2
        )

    first = sample(1)
    assert first == sample(1)
    assert first != sample(2)


def test_sampled_tokens_follow_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    torch.manual_seed(0)
    counts = choose(logits.expand(20000, -1), 0.7, 1.0).bincount(minlength=4) / 20000
    torch.testing.assert_close(counts, (logits / 0.7).softmax(-1), rtol=0, atol=0.015)


@pytest.mark.parametrize("drawn", [0.0, 1.0])
def test_what_cannot_come_is_never_drawn(monkeypatch, drawn):
    """Not even where the random number is the least or, by rounding, the largest."""
    monkeypatch.setattr(torch, "rand", lambda rows, one, **options: torch.full((rows, one), drawn, dtype=torch.float64))
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    assert choose(logits, 1.0, 1.0).item() == (1 if drawn == 0 else 3)


@pytest.mark.parametrize("size", [10, 5000])
def test_top_p_draws_from_the_smallest_nucleus(size):
    """In a wide flat distribution the nucleus reaches past the first candidates."""
    torch.manual_seed(0)
    logits = torch.randn(3, size) * 0.5
    probabilities = logits.softmax(-1)
    order = probabilities.argsort(-1, descending=True)
    drawn = torch.stack([choose(logits, 1.0, 0.6) for _ in range(3000)], 1)
    for row in range(3):
        sums = probabilities[row, order[row]].cumsum(-1)
        nucleus = order[row, : int((sums < 0.6).sum()) + 1]
        assert set(drawn[row].tolist()) <= set(nucleus.tolist())
        if size == 10:
            assert set(drawn[row].tolist()) == set(nucleus.tolist())
    assert torch.equal(choose(logits, 1.0, 1e-6), logits.argmax(-1))
