"""The peers that train an encoder-decoder from scratch: fastpt, and transformers' Seq2SeqTrainer in both precisions."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import AfterStep, FastptPeer, Job, Peer, arguments, device, reporting
from benchmarks.translation import LABEL_SMOOTHING, model_of, tokenizer_of


def write_model(folder: Path, rows: list[dict[str, str]]) -> str:
    """The random model of benchmarks.translation, and a tokenizer trained on the rows."""
    tokenizer = tokenizer_of(rows)
    tokenizer.save_pretrained(folder)
    model_of(len(tokenizer), seed=0).save_pretrained(folder)
    return str(folder)


def translator(job: Job, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(job.model, dtype=dtype).to(device()).train()


class FastptTranslator(FastptPeer):
    """fastpt.train; both sides are packed."""

    def load(self, dtype: torch.dtype) -> torch.nn.Module:
        return translator(self.job, dtype)

    def settings(self) -> dict[str, Any]:
        objective = {"name": "seq2seq", "label_smoothing": LABEL_SMOOTHING, "generates": False}
        longest = {"max_length": self.job.length, "micro_batch_tokens": 2 * self.job.length * self.job.batch_rows}
        return {"rows": self.job.rows, "objective": objective, "tokenizer": self.job.model, **longest}


class HfTranslator(Peer):
    """Seq2SeqTrainer with its defaults in float32, but for a fixed learning rate; rows padded by its own collator."""

    packages = ("accelerate",)
    is_bf16 = False

    def build(self) -> None:
        from transformers import Seq2SeqTrainer  # noqa: F401

        self.model = translator(self.job, torch.float32)

    def train(self, after_step: AfterStep) -> None:
        from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

        tokenizer = AutoTokenizer.from_pretrained(self.job.model)
        rows = [
            {**tokenizer(row["source"]), "labels": tokenizer(text_target=row["target"])["input_ids"]}
            for row in self.job.rows
        ]
        with tempfile.TemporaryDirectory() as folder:
            trainer = reporting(Seq2SeqTrainer, after_step, _tokens_of_both_sides)(
                model=self.model,
                args=Seq2SeqTrainingArguments(
                    **arguments(self.job, folder), bf16=self.is_bf16 and not self.job.is_fp32,
                    label_smoothing_factor=LABEL_SMOOTHING,
                ),
                train_dataset=rows,
                data_collator=DataCollatorForSeq2Seq(tokenizer, self.model),
            )  # fmt: skip
            trainer.train()


def _tokens_of_both_sides(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    starts = len(inputs["labels"])  # the decoder's own first tokens, which fastpt counts
    return inputs["attention_mask"].sum() + (inputs["labels"] != -100).sum() + starts


class HfTranslatorBf16(HfTranslator):
    """Under bf16 autocast."""

    is_bf16 = True


TRANSLATORS: dict[str, type[Peer]] = {
    "fastpt": FastptTranslator,
    "hf-trainer": HfTranslator,
    "hf-trainer-bf16": HfTranslatorBf16,
}
