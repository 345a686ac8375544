"""The peers that train a classifier on rows of text: transformers' Trainer in both precisions, and with fastpt.fuse on the model.

Dropout as the model's config has it, rows padded to the longest of their batch by transformers' own collator.
"""

from __future__ import annotations

import tempfile
from typing import Any

from benchmarks.peers import AfterStep, Peer, device, reporting


class HfTrainer(Peer):
    """transformers' Trainer with its defaults in float32, but for a fixed learning rate."""

    packages = ("accelerate",)
    is_bf16 = False
    is_fused = False

    def build(self) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, Trainer  # noqa: F401

        torch.manual_seed(0)  # of the new head
        labels = max(row.label for row in self.job.rows) + 1
        self.model = AutoModelForSequenceClassification.from_pretrained(self.job.model, num_labels=labels)
        self.model.float().to(device()).train()

    def train(self, after_step: AfterStep) -> None:
        from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

        if self.is_fused:
            import fastpt

            self.handle = fastpt.fuse(self.model)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder, use_cpu=device() == "cpu", bf16=self.is_bf16 and not self.job.is_fp32,
                per_device_train_batch_size=self.job.batch_rows, num_train_epochs=1, learning_rate=self.job.lr,
                lr_scheduler_type="constant", train_sampling_strategy="sequential", save_strategy="no",
                report_to="none", disable_tqdm=True,
            )  # fmt: skip
            trainer: Any = reporting(Trainer, after_step)(
                model=self.model,
                args=arguments,
                train_dataset=[{"input_ids": row.input_ids, "labels": row.label} for row in self.job.rows],
                data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(self.job.model)),
            )
            trainer.train()


class HfTrainerBf16(HfTrainer):
    """Under bf16 autocast."""

    is_bf16 = True


class HfTrainerFused(HfTrainerBf16):
    """Under bf16 autocast, with fastpt.fuse on the model."""

    is_fused = True


CLASSIFIERS: dict[str, type[Peer]] = {
    "hf-trainer": HfTrainer,
    "hf-trainer-bf16": HfTrainerBf16,
    "hf-trainer+fuse": HfTrainerFused,
}
