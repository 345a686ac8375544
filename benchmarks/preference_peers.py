"""The peers that train on pairs of answers with DPO's loss: fastpt, and TRL's DPOTrainer in both precisions."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from benchmarks.peers import AfterStep, FastptPeer, Peer, arguments, load_model, reporting


class FastptDpo(FastptPeer):
    """fastpt.train; a prompt is computed once for both answers."""

    def settings(self) -> dict[str, Any]:
        return {
            "rows": self.job.rows, "objective": "dpo", "tokenizer": self.job.model, "max_length": 2 * self.job.length,
        }  # fmt: skip


class TrlDpo(Peer):
    """TRL's DPOTrainer with its defaults (fp32 weights under bf16 autocast), but for its checkpointing, which is off."""

    packages = ("trl", "datasets")
    dtype = torch.float32

    def build(self) -> None:
        from trl import DPOTrainer  # noqa: F401

        self.model = load_model(self.job, torch.float32 if self.job.is_fp32 else self.dtype, torch.float32)

    def train(self, after_step: AfterStep) -> None:
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        said = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
        rows = [
            {"prompt": said("user", row["prompt"])} | {k: said("assistant", row[k]) for k in ("chosen", "rejected")}
            for row in self.job.rows
        ]
        with tempfile.TemporaryDirectory() as folder:
            config = DPOConfig(
                **arguments(self.job, folder), bf16=not self.job.is_fp32, max_length=None, gradient_checkpointing=False
            )
            trainer = reporting(DPOTrainer, after_step)(
                model=self.model,
                args=config,
                train_dataset=Dataset.from_list(rows),
                processing_class=AutoTokenizer.from_pretrained(self.job.model),
            )
            trainer.train()


class TrlDpoBf16(TrlDpo):
    """With bf16 weights."""

    dtype = torch.bfloat16


PAIR_PEERS: dict[str, type[Peer]] = {"fastpt": FastptDpo, "trl": TrlDpo, "trl-bf16": TrlDpoBf16}
