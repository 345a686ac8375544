"""GRPO with a reward that can be checked: SmolLM2-135M-Instruct learns to answer sums of two digits, from right or wrong alone.

python examples/grpo_sums.py --model .cache/smollm2
"""

from __future__ import annotations

import argparse
import random
import re
import time
from typing import Any

import fastpt


def right(completions: list[str], answer: list[str]) -> list[float]:
    """1 where the last number of the completion is the answer."""
    return [float(re.findall(r"\d+", text)[-1:] == [number]) for text, number in zip(completions, answer, strict=True)]


def sums(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """All sums of two numbers from 1 to 9, a fifth of them held out."""
    rows = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(1, 10) for b in range(1, 10)]
    random.Random(seed).shuffle(rows)
    return rows[16:], rows[:16]


class Progress:
    def on_start(self, trainer: Any) -> None:
        self.started = time.monotonic()

    def on_step(self, trainer: Any, record: dict[str, Any]) -> None:
        print(
            f"step {record['step']:3d}  reward {record['reward']:.2f}  tokens an answer {record['completion_tokens']:4.1f}  "
            f"entropy {record['entropy']:.2f}  rollout tokens/s {record['rollout_tokens_per_s']:4.0f}  "
            f"{time.monotonic() - self.started:4.0f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/grpo_sums")
    options = parser.parse_args()
    train, held_out = sums(options.seed)
    run = fastpt.train(
        model=options.model,
        data=train,
        eval_data=held_out,
        objective={"name": "grpo", "rewards": right, "group_size": 8, "max_new_tokens": 24},
        optim={"lr": 2e-4, "warmup": 0},
        batch_rows=12,
        max_steps=options.steps,
        seed=options.seed,
        output=options.output,
        callbacks=[Progress()],
        quiet=True,
    )
    rewards = [record["reward"] for record in run.history if "reward" in record]
    print(
        f"mean reward {rewards[0]:.2f} at the first step, {sum(rewards[-3:]) / len(rewards[-3:]):.2f} over the last three; "
        f"greedy answers to the held-out sums: {run.metrics['eval_reward']:.2f} right"
    )


if __name__ == "__main__":
    main()
