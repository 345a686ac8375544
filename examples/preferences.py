"""DPO, KTO or a reward model on the human-labelled pairs of LLMBar, and how often the held-out fifth is judged right.

python examples/preferences.py --objective reward --model .cache/smollm2 --data llmbar_pairs.jsonl
(https://github.com/princeton-nlp/LLMBar, MIT: rows with prompt, chosen and rejected)
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import fastpt

# what each calls its judgement of held-out rows, and the rate it learns at
JUDGED = {"dpo": ("eval_accuracy", 1e-4), "kto": ("eval_auc", 1e-4), "reward": ("eval_accuracy", 2e-4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=list(JUDGED), default="dpo")
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--loss", help="loss_type of dpo or kto")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output")
    options = parser.parse_args()
    judged, rate = JUDGED[options.objective]
    rows = [json.loads(line) for line in options.data.read_text().splitlines()]
    random.Random(options.seed).shuffle(rows)
    fifth = len(rows) // 5
    started = time.monotonic()
    run = fastpt.train(
        model=options.model,
        data={"path": rows[fifth:], "too_long": "drop"},
        eval_data={"path": rows[:fifth], "too_long": "drop"},
        objective={"name": options.objective} | ({"loss_type": options.loss} if options.loss else {}),
        max_length=1024,
        batch_rows=32 if options.objective == "kto" else 16,  # whose pairs are two rows
        epochs=options.epochs,
        optim={"lr": options.lr or rate},
        seed=options.seed,
        output=options.output or f"runs/{options.objective}_llmbar",
    )
    found, seconds = run.metrics, time.monotonic() - started
    print(
        f"{len(rows) - fifth} pairs in {seconds:.0f} s; of {fifth} held-out pairs {judged} {found[judged]:.3f}, "
        f"margin {found['eval_margin']:.4f}, loss {found['eval_loss']:.4f} (first step {run.history[0]['loss']:.4f})"
    )


if __name__ == "__main__":
    main()
