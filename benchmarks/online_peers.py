"""The peers that answer prompts and learn from rewards with GRPO's loss "dapo": fastpt, and TRL's GRPOTrainer in both precisions.

Both answer the same prompts as often, with answers of the same length: nothing stops them.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch

from benchmarks.peers import AfterStep, FastptPeer, Peer, arguments, load_model, reporting

GROUP = 8  # answers to a prompt


def reward(completions: Any, **columns: Any) -> list[float]:
    """Differs within almost every group."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [float(sum(map(ord, text)) % 7) for text in texts]


class Stopwatch:
    """Seconds spent in the calls of a function since they were last read."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def around(self, function: Any) -> Any:
        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            found = function(*arguments, **named)
            self._seconds += time.perf_counter() - started
            return found

        return timed

    def read(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class FastptGrpo(FastptPeer):
    """fastpt.train."""

    def settings(self) -> dict[str, Any]:
        from fastpt.objectives import _online, make_objective

        _online.stop_tokens = lambda model, tokenizer: []  # type: ignore[assignment]
        options = {"variant": "dapo", "rewards": reward, "group_size": GROUP, "max_new_tokens": self.job.length}
        objective, self.rollouts = make_objective({"name": "grpo", **options}), Stopwatch()
        object.__setattr__(objective, "_answers", self.rollouts.around(objective._answers))  # type: ignore[attr-defined]
        return {"rows": self.job.rows, "objective": objective, "tokenizer": self.job.model}

    def record(self, record: dict[str, Any], after_step: AfterStep) -> None:
        after_step(record["loss"], len(self.job.batches[0]) * GROUP * self.job.length, self.rollouts.read())


class TrlGrpo(Peer):
    """TRL's GRPOTrainer with its defaults (fp32 weights under bf16 autocast), but for its checkpointing, which is off."""

    packages = ("trl", "datasets")
    dtype = torch.float32

    def build(self) -> None:
        from trl import GRPOTrainer  # noqa: F401

        self.model = load_model(self.job, torch.float32 if self.job.is_fp32 else self.dtype, torch.float32)

    def train(self, after_step: AfterStep) -> None:
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        rollouts, job = Stopwatch(), self.job

        class Timed(GRPOTrainer):
            def _generate(self, *arguments: Any, **named: Any) -> Any:
                return rollouts.around(super()._generate)(*arguments, **named)

        shared = arguments(job, "")
        del shared["train_sampling_strategy"]
        shared["per_device_train_batch_size"] *= GROUP
        with tempfile.TemporaryDirectory() as folder:
            config = GRPOConfig(
                **shared | {"output_dir": folder}, bf16=not job.is_fp32, num_generations=GROUP, beta=0.0,
                max_completion_length=job.length, generation_kwargs={"min_new_tokens": job.length}, shuffle_dataset=False,
                gradient_checkpointing=False, logging_steps=10**6,
            )  # fmt: skip
            report = lambda loss, tokens: after_step(loss, tokens, rollouts.read())  # noqa: E731
            trainer = reporting(Timed, report, lambda inputs: job.batch_rows * GROUP * job.length)(
                model=self.model,
                reward_funcs=reward,
                args=config,
                train_dataset=Dataset.from_list(
                    [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in job.rows]
                ),
                processing_class=AutoTokenizer.from_pretrained(job.model),
            )
            trainer.train()


class TrlGrpoBf16(TrlGrpo):
    """With bf16 weights."""

    dtype = torch.bfloat16


ONLINE_PEERS: dict[str, type[Peer]] = {"fastpt": FastptGrpo, "trl": TrlGrpo, "trl-bf16": TrlGrpoBf16}
