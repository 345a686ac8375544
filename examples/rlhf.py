"""RLHF in one script, on pairs of answers that people judged: supervised fine-tuning, a reward model, GRPO against it.

python examples/rlhf.py --model .cache/smollm2 --data llmbar_pairs.jsonl
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
    parser.add_argument("--steps", type=int, default=40, help="of GRPO")
    parser.add_argument("--new-tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/rlhf"))
    options = parser.parse_args()
    pairs = [json.loads(line) for line in options.data.read_text().splitlines()]
    random.Random(options.seed).shuffle(pairs)
    held_out, pairs = pairs[: len(pairs) // 5], pairs[len(pairs) // 5 :]
    common = {"seed": options.seed, "quiet": True}
    fit = {"max_length": 512, "batch_rows": 16}

    def rows(part: list[dict]) -> dict:
        return {"path": part, "too_long": "drop"}

    started = time.monotonic()
    chosen = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    tuned = fastpt.train(options.model, rows(chosen), "sft", output=options.output / "sft", **common, **fit)
    print(f"sft: loss {tuned.history[0]['loss']:.2f} to {tuned.history[-1]['loss']:.2f}", flush=True)
    judge = fastpt.train(
        options.model, rows(pairs), "reward", eval_data=rows(held_out), output=options.output / "reward",
        **{"optim.lr": 2e-4}, **common, **fit,
    )  # fmt: skip
    print(
        f"reward model: {judge.metrics['eval_accuracy']:.2f} of {len(held_out)} held-out pairs judged right", flush=True
    )
    policy = tuned.path / "merged"
    tuned.merge(policy)
    asked = {"rewards": str(judge.path / "model"), "group_size": 8, "max_new_tokens": options.new_tokens, "kl": 0.02}
    run = fastpt.train(
        str(policy), rows([{"prompt": pair["prompt"]} for pair in pairs]), {"name": "grpo", **asked},
        output=options.output / "grpo", max_length=512, batch_rows=4, max_steps=options.steps,
        **{"optim.lr": 1e-4, "optim.warmup": 0}, **common,
    )  # fmt: skip
    rewards = [record["reward"] for record in run.history if "reward" in record]
    third = max(1, len(rewards) // 3)
    print(
        f"grpo: mean reward {sum(rewards[:third]) / third:.2f} over the first {third} of {len(rewards)} steps, "
        f"{sum(rewards[-third:]) / third:.2f} over the last; {time.monotonic() - started:.0f} s in all"
    )


if __name__ == "__main__":
    main()
