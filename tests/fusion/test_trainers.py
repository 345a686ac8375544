"""TRL's SFTTrainer and transformers' Trainer on a fused model: the losses of the unfused one, by the kernels' own head."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import fastpt
from tests.tiny import tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl")
TEXTS = ["The sky is blue.", "Two and two make four, as ever.", "No.", "A longer line of text, to be packed or padded."]


def lora_config():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0)


def sft_trainer(model, folder, **settings):
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2} | settings
    peft_config = settings.pop("peft_config", None)
    args = trl.SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=settings.pop("bf16", False), report_to=[], save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=settings.pop("gradient_checkpointing", False), **settings,
    )  # fmt: skip
    data = Dataset.from_list([{"text": text} for text in TEXTS * 2])
    return trl.SFTTrainer(
        model, args, train_dataset=data, eval_dataset=data.select(range(2)), processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )  # fmt: skip


def curve(trainer):
    torch.manual_seed(0)
    trainer.train()
    evaluation = trainer.evaluate()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    assert len(steps) == 3
    keys = ("loss", "entropy", "mean_token_accuracy", "grad_norm")
    found = [step[key] for step in steps for key in keys if key in step]
    return torch.tensor([*found, evaluation["eval_loss"], evaluation.get("eval_mean_token_accuracy", 0.0)])


@pytest.fixture
def trl_kernel(monkeypatch):
    """How many times TRL's own head was run."""
    from trl.trainer import utils

    calls, original = [], utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", lambda *a: calls.append(1) or original(*a))
    return calls


WORK = {
    "padded": {},
    "packed": {"packing": True, "max_length": 64},
    "checkpointed": {"gradient_checkpointing": True},
    "dft": {"loss_type": "dft"},
}


ORDERS = ["fuse, trainer", "trainer, fuse", "fuse, trainer with peft", "peft, fuse, trainer"]
CASES = [(order, work) for order in ORDERS for work in ("padded", "packed")]
CASES += [("fuse, trainer with peft", work) for work in ("checkpointed", "dft")]


@pytest.mark.parametrize(("order", "work"), CASES)
def test_sft_trainer(order, work, tmp_path, trl_kernel):
    settings = dict(WORK[work])

    def trainer_of(fuses):
        torch.manual_seed(0)
        model = tiny_model("llama")
        if order == "peft, fuse, trainer":
            model = get_peft_model(model, lora_config())
        if fuses and order != "trainer, fuse":
            fastpt.fuse(model)
        peft_config = lora_config() if order == "fuse, trainer with peft" else None
        trainer = sft_trainer(model, tmp_path, peft_config=peft_config, **settings)
        if fuses and order == "trainer, fuse":
            fastpt.fuse(trainer.model)
        return trainer

    expected = curve(trainer_of(False))
    assert trl_kernel
    trl_kernel.clear()
    trainer = trainer_of(True)
    torch.testing.assert_close(curve(trainer), expected, rtol=1e-4, atol=1e-4)
    assert not trl_kernel, "TRL's own head answered"
    handle = fastpt.fuse(trainer.model)  # the one there is
    assert not [patch.fallback for patch in handle.patches if patch.fallback]
    handle.remove()
    trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))
    assert trl_kernel, "after remove() TRL's own head answers again"


def test_sft_trainer_under_bf16_autocast(tmp_path, trl_kernel):
    def trainer_of(fuses):
        torch.manual_seed(0)
        model = tiny_model("qwen3")
        handle = fastpt.fuse(model) if fuses else None
        return sft_trainer(model, tmp_path, peft_config=lora_config(), bf16=True), handle

    expected = curve(trainer_of(False)[0])
    trl_kernel.clear()
    trainer, handle = trainer_of(True)
    torch.testing.assert_close(curve(trainer), expected, rtol=3e-2, atol=3e-2)
    assert not trl_kernel
    assert not [patch.fallback for patch in handle.patches if patch.fallback]


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_transformers_trainer(family, adapter, tmp_path):
    def trainer_of(fuses):
        torch.manual_seed(0)
        model = tiny_model(family)
        if adapter == "lora":
            model = get_peft_model(model, lora_config())
        if fuses:
            fastpt.fuse(model)
        rows = [
            {"input_ids": torch.arange(n, n + 12) % 250 + 3, "labels": torch.arange(n, n + 12) % 250 + 3}
            for n in range(8)
        ]
        if family == "bert":
            rows = [{"input_ids": row["input_ids"], "labels": n % 3} for n, row in enumerate(rows)]
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        return Trainer(model, args, train_dataset=rows, eval_dataset=rows[:2])

    expected = curve(trainer_of(False))
    trainer = trainer_of(True)
    torch.testing.assert_close(curve(trainer), expected, rtol=1e-4, atol=1e-4)
    handle = fastpt.fuse(trainer.model)
    assert not [patch.fallback for patch in handle.patches if patch.fallback]
    predicted = trainer.predict(
        [{"input_ids": torch.arange(3, 15), "labels": torch.arange(3, 15) if family != "bert" else 1}]
    )
    assert predicted.predictions.shape[-1] == (3 if family == "bert" else 272)  # evaluation still has logits
    handle.remove()
