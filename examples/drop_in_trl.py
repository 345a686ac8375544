"""fastpt as a drop-in backend: TRL's SFTTrainer trains the model, fastpt's kernels run it.

python examples/drop_in_trl.py --model .cache/smollm2 [--steps 10]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import fastpt

TICKETS = Path(__file__).parent / "support_tickets" / "train.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", default="runs/drop_in_trl")
    options = parser.parse_args()
    rows = [json.loads(line) for line in TICKETS.read_text().splitlines()]
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(options.model),
        args=SFTConfig(
            output_dir=options.output, max_steps=options.steps, use_cpu=True, report_to="none", logging_steps=1,
            save_strategy="no", per_device_train_batch_size=4, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    with fastpt.fuse(trainer.model):
        fastpt.explain(trainer.model)
        trainer.train()


if __name__ == "__main__":
    main()
