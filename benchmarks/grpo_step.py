"""GRPO steps of fastpt and of TRL, which take turns: python -m benchmarks.grpo_step --model DIR [--rounds 3] [--json FILE].

Both answer the same prompts as often, with answers of the same length (nothing stops them), train a LoRA of the same rank on
all linear layers with loss "dapo", and generate and train in bfloat16 (TRL: float32 weights under autocast, its own default).
Time is processor time, so that what else runs on the machine weighs on neither; the two share a process and take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.train_step import versions

Step = tuple[float, float]  # processor seconds of the rollout, and of the whole step


def prompts(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"Add {7 * i % 90 + 10} and {13 * i % 80 + 10}, and explain each step of it."} for i in range(count)
    ]


def reward(completions: Any, **columns: Any) -> list[float]:
    """Differs within almost every group."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [float(sum(map(ord, text)) % 7) for text in texts]


def by_fastpt(options: argparse.Namespace, folder: str) -> Iterator[Step]:
    from fastpt.objectives import _online
    from fastpt.trainer import Trainer

    _online.stop_tokens = lambda model, tokenizer: []  # type: ignore[assignment]
    trainer = Trainer(
        model=options.model, data=prompts(options.prompts), output=folder, max_steps=options.rounds + 1, quiet=True,
        objective={"name": "grpo", "variant": "dapo", "rewards": reward, "group_size": options.group,
                   "max_new_tokens": options.tokens},
        method={"name": "lora", "rank": 16}, batch_rows=options.prompts, device="cpu", precision="bf16", save_steps=10**6,
    )  # fmt: skip
    trainer.prepare()
    seconds = [0.0]
    answer = trainer.objective._answers

    def timed(*arguments: Any) -> Any:
        started = time.process_time()
        found = answer(*arguments)
        seconds[0] = time.process_time() - started
        return found

    object.__setattr__(trainer.objective, "_answers", timed)
    steps, started = trainer.steps(), time.process_time()
    while True:
        next(steps)
        yield seconds[0], time.process_time() - started
        started = time.process_time()  # the other may have run since


def by_trl(options: argparse.Namespace, folder: str) -> Iterator[Step]:
    import threading

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompts(options.prompts)]
    config = GRPOConfig(
        folder, use_cpu=True, bf16=True, num_generations=options.group, max_completion_length=options.tokens, beta=0.0,
        per_device_train_batch_size=options.prompts * options.group, max_steps=options.rounds + 1, report_to="none",
        generation_kwargs={"min_new_tokens": options.tokens}, gradient_checkpointing=False, save_strategy="no",
        logging_steps=10**6, disable_tqdm=True,
    )  # fmt: skip
    seconds, made, go = [0.0], threading.Semaphore(0), threading.Semaphore(0)

    class Timed(GRPOTrainer):
        def _generate(self, *arguments: Any) -> Any:
            started = time.process_time()
            found = super()._generate(*arguments)
            seconds[0] = time.process_time() - started
            return found

    class Turns(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **named: Any) -> None:
            go.acquire()

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            made.release()

    trainer = Timed(
        options.model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows), callbacks=[Turns()],
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )  # fmt: skip
    threading.Thread(target=trainer.train, daemon=True).start()
    while True:
        started = time.process_time()
        go.release()
        made.acquire()
        yield seconds[0], time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        peers = {"fastpt": by_fastpt(options, f"{folder}/fastpt"), "trl": by_trl(options, f"{folder}/trl")}
        found: dict[str, list[Step]] = {name: [] for name in peers}
        for number in range(options.rounds + 1):
            for name, peer in peers.items():
                taken = next(peer)
                if number:  # the first step warms up
                    found[name].append(taken)
    tokens = options.prompts * options.group * options.tokens
    medians = {name: [statistics.median(part) for part in zip(*steps, strict=True)] for name, steps in found.items()}
    table = Table(
        "", "rollout tokens/s of a core", "step, processor seconds", "rollout", "step", title="GRPO on the CPU"
    )
    for name, (rollout, step) in medians.items():
        ratios = [f"{theirs / ours:.2f}" for theirs, ours in zip(medians["trl"], medians[name], strict=True)]
        table.add_row(name, f"{tokens / rollout:.0f}", f"{step:.1f}", *ratios)
    Console().print(table)
    if options.json:
        record = {"settings": {key: str(value) for key, value in vars(options).items()}, "seconds": found, **versions()}
        with options.json.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
