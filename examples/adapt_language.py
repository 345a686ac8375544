"""A second language for a small model: continued pre-training on German captions, and what becomes of its English.

Perplexity of held-out text of both languages before and after: trained on the new language alone, and with a replay of the old
one among it.

python examples/adapt_language.py --model .cache/smollm2 --new multi30k_train.de.gz --old multi30k_train.en.gz
(https://github.com/multi30k/dataset, for research: a sentence a line)
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from pathlib import Path

import fastpt

HELD_OUT, SENTENCES = 100, 8  # paragraphs, and sentences of each


def paragraphs(path: Path, seed: int) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    texts = [" ".join(lines[i : i + SENTENCES]) for i in range(0, len(lines) - SENTENCES + 1, SENTENCES)]
    random.Random(seed).shuffle(texts)
    return [{"text": text} for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--new", type=Path, required=True, help="text of the new language, a sentence a line, gzipped")
    parser.add_argument("--old", type=Path, required=True, help="of the language that must not be forgotten")
    parser.add_argument("--rows", type=int, default=2000, help="paragraphs of the new language")
    parser.add_argument(
        "--replay", type=float, default=0.25, help="paragraphs of the old language for each of the new one"
    )
    parser.add_argument("--method", default="full")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/language")
    parser.add_argument("--json", type=Path, help="append the results to this file")
    options = parser.parse_args()
    new, old = paragraphs(options.new, options.seed), paragraphs(options.old, options.seed)
    # The two files say the same: what is replayed must not be what is held out.
    held_out, new, old = {"new": new[:HELD_OUT], "old": old[:HELD_OUT]}, new[HELD_OUT:][: options.rows], old[HELD_OUT:]
    old = old[: int(options.replay * len(new))]

    def perplexity(model: object) -> dict[str, float]:
        given = {"tokenizer": options.model, "max_length": 512, "quiet": True}
        return {
            name: fastpt.evaluate(model, rows, "pretrain", **given)["perplexity"] for name, rows in held_out.items()
        }

    told = {"before": {"perplexity": perplexity(options.model)}}
    for name, rows in {"new language alone": new, "with replay": [*new, *old]}.items():
        started = time.monotonic()
        run = fastpt.train(
            options.model, rows, "pretrain", options.method, max_length=512, batch_tokens=4096, seed=options.seed,
            output=f"{options.output}/{name.replace(' ', '_')}", quiet=True, **{"optim.lr": options.lr},
        )  # fmt: skip
        told[name] = {
            "perplexity": perplexity(run.model),
            "minutes": (time.monotonic() - started) / 60,
            "rows": len(rows),
        }
    for name, found in told.items():
        print(
            f"{name}: perplexity of the new language {found['perplexity']['new']:.2f}, "
            f"of the old {found['perplexity']['old']:.2f}"
        )
    if options.json:
        about = {key: str(value) for key, value in vars(options).items()}
        with options.json.open("a") as file:
            file.write(json.dumps({**told, "settings": about}) + "\n")


if __name__ == "__main__":
    main()
