"""DPO and reward models trained on LLMBar's pairs by fastpt and by TRL: what they judge right of a held-out fifth, and how long.

    python -m benchmarks.preferences --objective reward --model .cache/smollm2 --side fastpt --json results.jsonl

Both sides see the same pairs, 16 a step, train LoRA of the same rank on all linear layers with the same learning rate (cosine
after a warm-up) for an epoch, each in its own precision, or in float32 (-fp32). Data from $FASTPT_DATA, or shared/data beside
the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import machine

LR = {"dpo": 1e-4, "reward": 2e-4}
BATCH_PAIRS, MICRO_PAIRS, MAX_LENGTH, WARMUP = 16, 4, 1024, 0.03  # a micro-batch of TRL's, which pads it
Row = dict[str, Any]


def rows_of(seed: int) -> tuple[list[Row], list[Row]]:
    """(training pairs, the held-out fifth)."""
    folder = Path(os.environ.get("FASTPT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    rows = [json.loads(line) for line in (folder / "llmbar_pairs.jsonl").read_text().splitlines()]
    random.Random(seed).shuffle(rows)
    return rows[len(rows) // 5 :], rows[: len(rows) // 5]


def by_fastpt(
    objective: str, model: str, rows: list[Row], held_out: list[Row], seed: int, output: str, is_fp32: bool = False
) -> Row:
    import fastpt

    run = fastpt.train(
        model, {"path": rows, "too_long": "truncate"}, objective, eval_data={"path": held_out, "too_long": "truncate"},
        output=output, seed=seed, batch_rows=BATCH_PAIRS, max_length=MAX_LENGTH, eval_steps=10**9, save_steps=10**9,
        quiet=True, precision="fp32" if is_fp32 else "auto", **{"optim.lr": LR[objective], "optim.warmup": WARMUP},
    )  # fmt: skip
    measures = ("eval_accuracy", "eval_margin", "eval_loss")
    return {"train_s": run.metrics["seconds"], "steps": run.metrics["steps"]} | {k: run.metrics[k] for k in measures}


def by_trl(
    objective: str, model: str, rows: list[Row], held_out: list[Row], seed: int, output: str, is_fp32: bool = False
) -> Row:
    """TRL's trainers with their defaults (fp32 weights under bf16 autocast), but for its checkpointing, which is off."""
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    is_dpo = objective == "dpo"
    kind: Any = AutoModelForCausalLM if is_dpo else AutoModelForSequenceClassification
    net = kind.from_pretrained(model, dtype=torch.float32, **({} if is_dpo else {"num_labels": 1}))
    tokenizer = AutoTokenizer.from_pretrained(model)
    net.config.pad_token_id = tokenizer.pad_token_id
    said = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    sets = [
        Dataset.from_list([
            {"prompt": said("user", row["prompt"])} | {k: said("assistant", row[k]) for k in ("chosen", "rejected")}
            for row in part
        ])
        for part in (rows, held_out)
    ]  # fmt: skip
    config, trainer_class = (trl.DPOConfig, trl.DPOTrainer) if is_dpo else (trl.RewardConfig, trl.RewardTrainer)
    adapter = LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM" if is_dpo else "SEQ_CLS",
        modules_to_save=None if is_dpo else ["score"],
    )  # fmt: skip
    arguments = config(
        output_dir=output, use_cpu=not torch.cuda.is_available(), bf16=not is_fp32, seed=seed, num_train_epochs=1,
        per_device_train_batch_size=MICRO_PAIRS, gradient_accumulation_steps=BATCH_PAIRS // MICRO_PAIRS,
        per_device_eval_batch_size=1, max_length=MAX_LENGTH, learning_rate=LR[objective], lr_scheduler_type="cosine",
        warmup_steps=WARMUP, gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
        logging_steps=5,
    )  # fmt: skip
    trainer = trainer_class(
        net, args=arguments, train_dataset=sets[0], eval_dataset=sets[1], processing_class=tokenizer,
        peft_config=adapter,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    found = trainer.evaluate()
    names = ("rewards/accuracies", "rewards/margins") if is_dpo else ("accuracy", "margin")
    told = {"train_s": seconds, "steps": trainer.state.global_step, "eval_loss": found["eval_loss"]}
    return told | {"eval_accuracy": found[f"eval_{names[0]}"], "eval_margin": found[f"eval_{names[1]}"]}


SIDES = {
    "fastpt": by_fastpt, "fastpt-fp32": partial(by_fastpt, is_fp32=True),
    "trl": by_trl, "trl-fp32": partial(by_trl, is_fp32=True),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=list(LR), required=True)
    parser.add_argument("--model", required=True, help="folder or hub id of a decoder")
    parser.add_argument("--side", choices=list(SIDES), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, help="train on the first so many only, to stay within 15 minutes")
    parser.add_argument("--json", type=Path, help="append the result to this file")
    options = parser.parse_args()
    rows, held_out = rows_of(options.seed)
    rows = rows[: options.pairs]
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        found = SIDES[options.side](options.objective, options.model, rows, held_out, options.seed, folder)
    found["cpu_s"] = time.process_time() - started  # of all threads, the evaluation among them
    told = {"objective": options.objective, "side": options.side, "seed": options.seed, "pairs": len(rows), **found}
    line = json.dumps(told | {"lr": LR[options.objective], "model": options.model, "machine": machine()})
    print(line)
    if options.json is not None:
        with options.json.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
