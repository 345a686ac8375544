"""A second language for a small model: continued pre-training on German captions, and what becomes of its English.

Perplexity of held-out text of both languages before and after: trained on the new language alone, and with a replay of the old
one among it. With --added-tokens, frequent words of the new language become tokens of their own.

python examples/adapt_language.py --model .cache/smollm2 --new multi30k_train.de.gz --old multi30k_train.en.gz
(https://github.com/multi30k/dataset, for research: a sentence a line)
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import fastpt

SENTENCES = 8  # of a paragraph


def paragraphs(path: Path, seed: int) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    texts = [" ".join(lines[i : i + SENTENCES]) for i in range(0, len(lines) - SENTENCES + 1, SENTENCES)]
    random.Random(seed).shuffle(texts)
    return [{"text": text} for text in texts]


def split_words(texts: list[str], tokenizer: Any, count: int) -> list[str]:
    """The most frequent words, with the space before them, that a tokenizer splits in three pieces or more."""
    words = Counter(word for text in texts for word in re.findall(r"(?<= )[^\W\d_]{4,}", text))
    pieces = {word: len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) for word in words}
    return [f" {word}" for word, _ in words.most_common() if pieces[word] >= 3][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--new", type=Path, required=True, help="text of the new language, a sentence a line, gzipped")
    parser.add_argument("--old", type=Path, required=True, help="of the language that must not be forgotten")
    parser.add_argument("--rows", type=int, default=2000, help="paragraphs of the new language")
    parser.add_argument(
        "--replay", type=float, default=0.25, help="paragraphs of the old language for each of the new one"
    )
    parser.add_argument(
        "--added-tokens",
        type=int,
        default=0,
        help="teach it so many frequent words that it splits in three pieces or more",
    )
    parser.add_argument("--held-out", type=int, default=100, help="paragraphs of each language to measure on")
    parser.add_argument("--method", default="full")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/language")
    parser.add_argument("--json", type=Path, help="append the results to this file")
    options = parser.parse_args()
    new, old = paragraphs(options.new, options.seed), paragraphs(options.old, options.seed)
    # The two files say the same: what is replayed must not be what is held out.
    held_out = {"new": new[: options.held_out], "old": old[: options.held_out]}
    new, old = new[options.held_out :][: options.rows], old[options.held_out :]
    old = old[: int(options.replay * len(new))]

    before = AutoTokenizer.from_pretrained(options.model)
    words = split_words([row["text"] for row in new], before, options.added_tokens)

    def measured(model: object, tokenizer: Any) -> dict[str, dict[str, float]]:
        """Perplexity a token, and what can be compared where tokens differ: bits a byte."""
        found: dict[str, dict[str, float]] = {"perplexity": {}, "bits_a_byte": {}, "tokens": {}}
        for name, rows in held_out.items():
            loss = fastpt.evaluate(model, rows, "pretrain", tokenizer=tokenizer, max_length=512, quiet=True)["loss"]
            tokens = sum(len(tokenizer(row["text"])["input_ids"]) for row in rows)
            size = sum(len(row["text"].encode()) for row in rows)
            found["perplexity"][name], found["tokens"][name] = math.exp(loss), tokens
            found["bits_a_byte"][name] = loss * tokens / size / math.log(2)
        return found

    told: dict[str, Any] = {"before": measured(options.model, before)}
    for name, rows in {"new language alone": new, "with replay": [*new, *old]}.items():
        started = time.monotonic()
        run = fastpt.train(
            options.model, rows, "pretrain", options.method, max_length=512, batch_tokens=4096, seed=options.seed,
            output=f"{options.output}/{name.replace(' ', '_')}", quiet=True, added_tokens=words or None,
            **{"optim.lr": options.lr},
        )  # fmt: skip
        minutes = (time.monotonic() - started) / 60
        told[name] = measured(run.model, run.tokenizer) | {"minutes": minutes, "rows": len(rows)}
    for name, found in told.items():
        for side in held_out:
            print(
                f"{name}: {side} language: perplexity {found['perplexity'][side]:.2f}, {found['bits_a_byte'][side]:.3f} bits a "
                f"byte, {found['tokens'][side]} tokens"
            )
    if options.json:
        about = {key: str(value) for key, value in vars(options).items()}
        with options.json.open("a") as file:
            file.write(json.dumps({**told, "settings": about}) + "\n")


if __name__ == "__main__":
    main()
