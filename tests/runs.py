"""A small run for tests: a tiny model, a few chat rows, and settings that finish in a second."""

from __future__ import annotations

import random
from typing import Any

from tests.tiny import tiny_model, tiny_tokenizer

WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "cat",
    "dog",
    "bird",
    "sun",
    "moon",
    "star",
    "tea",
    "milk",
    "salt",
]


def chat_rows(count: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Messages rows of different lengths; the answer repeats the first word of the question."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(2, 9))]
        question, answer = " ".join(words), f"{words[0]} {words[0]}"
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


def run_settings(tmp_path: Any, **changes: Any) -> dict[str, Any]:
    """Keyword arguments for fastpt.train or Trainer."""
    settings: dict[str, Any] = {
        "model": tiny_model("llama"),
        "tokenizer": tiny_tokenizer(),
        "data": chat_rows(),
        "method": {"name": "lora", "rank": 4},
        "output": tmp_path / "run",
        "device": "cpu",
        "precision": "fp32",
        "max_length": 256,
        "batch_rows": 4,
        "max_steps": 6,
        "optim": {"lr": 1e-2, "warmup": 0},
        "quiet": True,
    }
    return {**settings, **changes}
