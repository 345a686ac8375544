"""DPO on the human-labelled pairs of LLMBar, and how often the held-out fifth is judged right.

python examples/dpo_llmbar.py --model .cache/smollm2 --data llmbar_pairs.jsonl
(https://github.com/princeton-nlp/LLMBar, MIT: rows with prompt, chosen and rejected)
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import fastpt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--loss", default="sigmoid")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/dpo_llmbar")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.data.read_text().splitlines()]
    random.Random(options.seed).shuffle(rows)
    fifth = len(rows) // 5
    started = time.monotonic()
    run = fastpt.train(
        model=options.model,
        data={"path": rows[fifth:], "too_long": "drop"},
        eval_data={"path": rows[:fifth], "too_long": "drop"},
        objective={"name": "dpo", "loss_type": options.loss},
        max_length=1024,
        batch_rows=16,
        epochs=options.epochs,
        optim={"lr": options.lr},
        seed=options.seed,
        output=options.output,
    )
    found, seconds = run.metrics, time.monotonic() - started
    print(
        f"{len(rows) - fifth} pairs in {seconds:.0f} s; of {fifth} held-out pairs {found['eval_accuracy']:.3f} judged right, "
        f"margin {found['eval_margin']:.4f}, loss {found['eval_loss']:.4f} (0.6931 before)"
    )


if __name__ == "__main__":
    main()
