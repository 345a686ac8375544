"""The peers that train a classifier on rows of text: fastpt, and transformers' Trainer in both precisions and with fastpt.fuse.

Dropout as the model's config has it, rows padded to the longest of their batch by transformers' own collator.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from benchmarks.peers import AfterStep, FastptPeer, Job, Peer, arguments, device, reporting


def classes(job: Job) -> int:
    return max(row.label for row in job.rows) + 1


def classifier(job: Job, dtype: torch.dtype) -> torch.nn.Module:
    """The encoder under a new head, the same for all."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=classes(job))
    return model.to(device(), dtype).train()


class FastptClassifier(FastptPeer):
    """fastpt.train."""

    def load(self, dtype: torch.dtype) -> torch.nn.Module:
        return classifier(self.job, dtype)

    def settings(self) -> dict[str, Any]:
        objective = {"name": "classify", "labels": [str(label) for label in range(classes(self.job))]}
        rows = [{"text": row.text, "label": str(row.label)} for row in self.job.rows]
        return {"rows": rows, "objective": objective, "tokenizer": self.job.model, "max_length": self.job.length}


class HfTrainer(Peer):
    """transformers' Trainer with its defaults in float32, but for a fixed learning rate."""

    packages = ("accelerate",)
    is_bf16 = False
    is_fused = False

    def build(self) -> None:
        from transformers import Trainer  # noqa: F401

        self.model = classifier(self.job, torch.float32)

    def train(self, after_step: AfterStep) -> None:
        from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

        if self.is_fused:
            import fastpt

            self.handle = fastpt.fuse(self.model)
        with tempfile.TemporaryDirectory() as folder:
            trainer: Any = reporting(Trainer, after_step)(
                model=self.model,
                args=TrainingArguments(**arguments(self.job, folder), bf16=self.is_bf16 and not self.job.is_fp32),
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
    "fastpt": FastptClassifier,
    "hf-trainer": HfTrainer,
    "hf-trainer-bf16": HfTrainerBf16,
    "hf-trainer+fuse": HfTrainerFused,
}
