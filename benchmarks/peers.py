"""Who takes part in the benchmark of fine-tuning, each as its users would run it, and what peers of all objectives share.

A peer is built once (model and adapter in memory), then trains on the rows in their order, one optimizer step per batch, and
calls `after_step(loss, tokens)` after each. AdamW, a fixed learning rate, no weight decay and a gradient clip of 1 for all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import IGNORED, Row

AfterStep = Callable[..., None]  # (loss, tokens), and of online RL the seconds of its rollouts


@dataclass(frozen=True)
class Job:
    """What all peers of one run share."""

    model: str
    adapter: str | None  # folder of the saved adapter that all start from; None trains all weights
    rows: list[Any]  # as the objective has them: benchmarks/rows.py
    batch_rows: int
    lr: float
    length: int = 512  # tokens a row at most; of online RL, of an answer
    is_fp32: bool = False  # all peers in float32, for comparing losses; else each in its own precision
    is_quantised: bool = False  # the base in NF4: by fastpt itself, or by bitsandbytes for the others

    @property
    def batches(self) -> list[list[Row]]:
        return [self.rows[i : i + self.batch_rows] for i in range(0, len(self.rows), self.batch_rows)]

    @property
    def is_padded(self) -> bool:
        return len({len(row.input_ids) for row in self.rows}) > 1


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def save_adapter(model: str, folder: str) -> str:
    """Write the LoRA adapter that all peers start from: r = 16, alpha = 32, every linear layer but the head."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(base, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:  # numbers that every precision can hold
            parameter.data = parameter.data.bfloat16().float()
    wrapped.save_pretrained(folder)
    return folder


def load_model(job: Job, dtype: torch.dtype, adapter_dtype: torch.dtype, *, is_ours: bool = False) -> torch.nn.Module:
    """The model in `dtype` with the shared adapter, ready to train; a 4-bit base is fastpt's own where `is_ours`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if is_ours and job.is_quantised:
        from fastpt.models import load

        model = load(job.model, dtype=dtype, device=torch.device(device()), is_quantised=True).model
    else:
        settings = {"quantization_config": _bitsandbytes(dtype)} if job.is_quantised else {}
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, **settings).to(device())
    if job.adapter is not None:
        model = PeftModel.from_pretrained(model, job.adapter, is_trainable=True)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapter_dtype)
    return model.train()


def _bitsandbytes(dtype: torch.dtype) -> Any:
    """QLoRA's settings."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


class Peer:
    """What the worker needs of a peer; `missing` says why it cannot take part here."""

    packages: tuple[str, ...] = ()

    def __init__(self, job: Job):
        self.job = job
        self.model: torch.nn.Module

    @classmethod
    def missing(cls) -> str | None:
        absent = [name for name in cls.packages if find_spec(name) is None]
        return f"needs {' and '.join(absent)}: pip install {' '.join(absent)}" if absent else None

    def build(self) -> None:
        """Import what training needs and put the weights in memory."""
        raise NotImplementedError

    def train(self, after_step: AfterStep) -> None:
        raise NotImplementedError


class HandWritten(Peer):
    """A plain PyTorch loop over the Hugging Face model, everything in bf16, SDPA attention."""

    is_compiled = False

    def build(self) -> None:
        dtype = torch.float32 if self.job.is_fp32 else torch.bfloat16
        self.model = load_model(self.job, dtype, dtype)

    def train(self, after_step: AfterStep) -> None:
        model, trained = self.model, [p for p in self.model.parameters() if p.requires_grad]
        if self.is_compiled:
            # Padded batches change their length: one dynamic graph instead of one graph per length.
            model = torch.compile(self.model, dynamic=self.job.is_padded)  # type: ignore[assignment]
        optimizer = torch.optim.AdamW(trained, lr=self.job.lr, weight_decay=0.0, fused=True)
        for inputs, tokens in self._batches():
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            after_step(loss.item(), tokens)

    def _batches(self) -> Iterator[tuple[dict[str, Tensor], int]]:
        for rows in self.job.batches:
            lengths = [len(row.input_ids) for row in rows]
            inputs = torch.zeros(len(rows), max(lengths), dtype=torch.long)  # [B, T]
            labels, mask = torch.full_like(inputs, IGNORED), torch.zeros_like(inputs)
            for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                inputs[i, :length] = torch.tensor(row.input_ids)
                labels[i, :length] = torch.tensor(row.labels)
                mask[i, :length] = 1
            batch = {"input_ids": inputs, "labels": labels}
            if self.job.is_padded:
                batch["attention_mask"] = mask
            yield {name: value.to(device()) for name, value in batch.items()}, sum(lengths)


class Compiled(HandWritten):
    """The same loop with the model under torch.compile."""

    is_compiled = True

    @classmethod
    def missing(cls) -> str | None:
        compilers = [os.environ.get("CXX", "c++"), "g++", "clang++"]
        return None if any(map(which, compilers)) else "torch.compile needs a C++ compiler: install g++, or set CXX"


class Trl(Peer):
    """TRL's SFTTrainer with its defaults (fp32 weights under bf16 autocast), but for its checkpointing, which is off."""

    packages = ("trl", "datasets")
    dtype = torch.float32
    is_checkpointed = False
    is_fused = False

    def build(self) -> None:
        import datasets  # noqa: F401
        from trl import SFTTrainer  # noqa: F401

        dtype = torch.bfloat16 if self.job.is_quantised else self.dtype  # what a 4-bit base is unpacked to
        self.model = load_model(self.job, torch.float32 if self.job.is_fp32 else dtype, torch.float32)

    def train(self, after_step: AfterStep) -> None:
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        if self.is_fused:
            import fastpt

            self.handle = fastpt.fuse(self.model)
        with tempfile.TemporaryDirectory() as folder:
            config = SFTConfig(
                **arguments(self.job, folder), bf16=not self.job.is_fp32, max_length=None,
                gradient_checkpointing=self.is_checkpointed, completion_only_loss=True,
            )  # fmt: skip
            trainer = reporting(SFTTrainer, after_step)(
                model=self.model,
                args=config,
                train_dataset=Dataset.from_list([row._asdict() for row in self.job.rows]),
                processing_class=AutoTokenizer.from_pretrained(self.job.model),
            )
            trainer.train()


def arguments(job: Job, folder: str) -> dict[str, Any]:
    """What all of transformers' and TRL's trainers are told: the rows once and in order, a fixed learning rate, no output."""
    return {
        "output_dir": folder, "use_cpu": device() == "cpu", "per_device_train_batch_size": job.batch_rows,
        "num_train_epochs": 1, "learning_rate": job.lr, "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip


def real_tokens(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["attention_mask"].sum()


def reporting(trainer: Any, after_step: AfterStep, count: Callable[[Any], Any] = real_tokens) -> Any:
    """A trainer class that reports each optimizer step: training_step has loss and tokens, on_step_end the moment."""
    from transformers import TrainerCallback

    last: dict[str, Any] = {}

    class Reporting(trainer):
        def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
            last["tokens"] = count(inputs)
            last["loss"] = super().training_step(model, inputs, num_items_in_batch)
            return last["loss"]

    class Report(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            after_step(last["loss"].item(), int(last["tokens"]))

    return lambda **settings: Reporting(**settings, callbacks=[Report()])


class TrlCheckpointed(Trl):
    """With TRL's default gradient checkpointing."""

    is_checkpointed = True


class TrlBf16(Trl):
    """With bf16 weights."""

    dtype = torch.bfloat16


class TrlFused(Trl):
    """With fastpt.fuse on the model."""

    is_fused = True


class FastptPeer(Peer):
    """fastpt.train with its defaults, on a model in the precision that it chooses."""

    def build(self) -> None:
        import fastpt.trainer  # noqa: F401
        from fastpt.models import choose_precision

        self.precision = "fp32" if self.job.is_fp32 else "auto"
        dtype, _ = choose_precision(self.precision, torch.device(device()))
        self.model = self.load(dtype)

    def load(self, dtype: torch.dtype) -> torch.nn.Module:
        return load_model(self.job, dtype, torch.float32, is_ours=True)

    def settings(self) -> dict[str, Any]:
        """The rows and the objective."""
        raise NotImplementedError

    def record(self, record: dict[str, Any], after_step: AfterStep) -> None:
        after_step(record["loss"], record["tokens"])

    def train(self, after_step: AfterStep) -> None:
        import fastpt

        class Report:
            def on_step(_, trainer: Any, record: dict[str, Any]) -> None:
                self.record(record, after_step)

        settings = self.settings()
        with tempfile.TemporaryDirectory() as folder:
            run = fastpt.train(
                model=self.model,
                data={"path": settings.pop("rows"), "shuffle": False},
                method="full" if self.job.adapter is None else "lora",  # on the base that is there, 4-bit or not
                batch_rows=self.job.batch_rows,
                optim={"lr": self.job.lr, "schedule": "constant", "warmup": 0},
                precision=self.precision,
                output=f"{folder}/run",
                callbacks=[Report()],
                quiet=True,
                **settings,
            )
        if run.status == "interrupted":  # the trainer saves and returns; a benchmark has no figures of half a run
            raise SystemExit("stopped by a signal before the last step: nothing to report, run it again to the end")


class Fastpt(FastptPeer):
    """Fine-tuning on rows of tokens."""

    def settings(self) -> dict[str, Any]:
        return {
            "rows": [row._asdict() for row in self.job.rows], "objective": _tokenised_sft(),
            "max_length": max(len(row.input_ids) for row in self.job.rows),
        }  # fmt: skip


def _tokenised_sft() -> Any:
    """fastpt's SFT on rows that are tokens already, as TRL gets them."""
    import numpy as np

    from fastpt.data.example import Example
    from fastpt.objectives.sft import SFT

    class TokenisedSFT(SFT):
        def bind(self, tokenizer: Any, rows: Any, columns: Any) -> Any:
            def prepare(row: dict[str, Any], place: str) -> list[Example]:
                ids, trained = np.array(row["input_ids"], np.int32), np.array(row["completion_mask"], bool)
                return [Example(ids, trained, None, place)]

            return prepare

    return TokenisedSFT()


PEERS: dict[str, type[Peer]] = {
    "fastpt": Fastpt,
    "trl": Trl,
    "trl+fuse": TrlFused,
    "trl-ckpt": TrlCheckpointed,
    "trl-bf16": TrlBf16,
    "hf": HandWritten,
    "hf-compile": Compiled,
}
