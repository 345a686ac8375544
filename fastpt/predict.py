"""What a trained model says of texts: classes with probabilities, numbers, a tag for each word, or a translation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastpt.data.example import Example
from fastpt.data.labels import MULTI, REGRESSION
from fastpt.data.pack import best_fit
from fastpt.data.render import encode_text, encode_words
from fastpt.fusion.head import causal_lm
from fastpt.scorer import ModelScorer

Text = str | tuple[str, str]  # one text, or two that are judged together


@dataclass(frozen=True)
class Prediction:
    """The class (of several labels: all above one half; of a regression: the number), and the probability of each class."""

    label: str | list[str] | float
    probabilities: dict[str, float]


def predict(model: nn.Module, tokenizer: Any, texts: Sequence[Any], *, micro_tokens: int = 4096) -> list[Any]:
    """By a model for sequence classification a Prediction for each text or pair of texts, in order.

    By one for token classification the tags of each sentence, which is a list of words, or a string that is split at its
    blanks; None where the model reads nothing of a word. What is longer than the model's positions is cut at its end. An
    encoder-decoder's answer to a text is a text, greedy.
    """
    scorer = ModelScorer(model)
    if causal_lm(model).config.is_encoder_decoder:
        return _said(scorer, tokenizer, texts)
    run = _tags if scorer.class_head.is_of_tokens else _predictions
    return run(scorer, tokenizer, texts, micro_tokens)


def _said(scorer: ModelScorer, tokenizer: Any, texts: Sequence[str]) -> list[str]:
    with scorer.frozen():
        sources = [tokenizer(text)["input_ids"] for text in texts]
        made = scorer.answers(sources, max_new_tokens=256, num_beams=1, do_sample=False)
    return tokenizer.batch_decode(made, skip_special_tokens=True)


def _predictions(scorer: ModelScorer, tokenizer: Any, texts: Sequence[Text], micro_tokens: int) -> list[Prediction]:
    examples = []
    for number, text in enumerate(texts):
        ids, second_from = encode_text(tokenizer, *((text,) if isinstance(text, str) else text))
        examples.append(_example(ids, number, scorer, second_from=np.array([second_from])))
    config = causal_lm(scorer.model).config
    return [_prediction(config, logits[0]) for logits in _scored(scorer, examples, micro_tokens)]


def _tags(
    scorer: ModelScorer, tokenizer: Any, sentences: Sequence[str | Sequence[str]], micro_tokens: int
) -> list[list[str | None]]:
    names, found = causal_lm(scorer.model).config.id2label, []
    split = [sentence.split() if isinstance(sentence, str) else list(sentence) for sentence in sentences]
    encoded = [encode_words(tokenizer, words) for words in split]
    examples = [_example(ids, number, scorer) for number, (ids, _) in enumerate(encoded)]
    for logits, (_, firsts) in zip(_scored(scorer, examples, micro_tokens), encoded, strict=True):
        best = logits.argmax(-1).tolist()
        found.append([names[best[at]] if 0 <= at < len(best) else None for at in firsts.tolist()])
    return found


def _example(ids: np.ndarray, number: int, scorer: ModelScorer, **fields: np.ndarray) -> Example:
    limit = getattr(causal_lm(scorer.model).config.get_text_config(), "max_position_embeddings", None)
    example = Example(ids, np.zeros(len(ids), bool), None, f"text {number + 1}", count=1.0, fields=fields)
    return example if limit is None else example.truncated(limit - scorer.first_position)


@torch.no_grad()
def _scored(scorer: ModelScorer, examples: list[Example], micro_tokens: int) -> list[Tensor]:
    """Logits of each example on the CPU, in order: [1, C] of a text, [T, C] of words."""
    found: dict[int, Tensor] = {}
    with scorer.frozen():
        for pack in best_fit([example.tokens for example in examples], micro_tokens):
            batch = scorer.batch([examples[i] for i in pack])
            hidden = scorer.hidden(batch)
            if scorer.class_head.is_of_tokens:
                parts = scorer.token_logits(hidden).cpu().split([len(examples[i].input_ids) for i in pack])
            else:
                parts = scorer.class_logits(hidden, batch).cpu().split(1)
            found.update(zip(pack, parts, strict=True))
    return [found[i] for i in range(len(examples))]


def _prediction(config: Any, logits: Tensor) -> Prediction:
    if config.problem_type == REGRESSION:
        return Prediction(logits.item(), {})
    is_multi = config.problem_type == MULTI
    chances = logits.sigmoid() if is_multi else logits.softmax(-1)
    named = {config.id2label[number]: chance for number, chance in enumerate(chances.tolist())}
    several = [name for name, chance in named.items() if chance > 0.5]
    return Prediction(several if is_multi else config.id2label[int(logits.argmax())], named)
