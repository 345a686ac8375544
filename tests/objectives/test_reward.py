"""Reward models against TRL's own trainer on the same tokens, what must not change them, and what online RL makes of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastpt
from fastpt.data.batches import collate
from fastpt.data.example import Example
from fastpt.data.pairs import joined, pair_format, ranked_example
from fastpt.data.sources import load_rows
from fastpt.data.tokenised import tokenise
from fastpt.errors import DataError
from fastpt.objectives import make_objective
from fastpt.objectives._preference_losses import bradley_terry
from fastpt.objectives._rewards import load_reward_model
from fastpt.scorer import ModelScorer
from tests.objectives.invariance import check_invariance
from tests.objectives.test_dpo import pair_rows
from tests.runs import WORDS, run_settings
from tests.tiny import tiny_model, tiny_tokenizer


def model():
    return tiny_model("llama", cls="LlamaForSequenceClassification", num_labels=1)


def with_margins(rows):
    return [{**row, "margin": 0.25 * i} for i, row in enumerate(rows)]


def examples_of(rows):
    tokenizer, row_format = tiny_tokenizer(), pair_format(None)
    return [ranked_example(tokenizer, row, f"rows:{i}", row_format) for i, row in enumerate(rows, 1)]


@pytest.mark.parametrize("has_margins", [False, True])
def test_loss_and_gradients_are_trls(tmp_path, has_margins):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(0)
    settings = RewardConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=6, report_to="none", use_cpu=True, bf16=False,
        max_length=256, gradient_checkpointing=False, center_rewards_coefficient=0.1,
    )  # fmt: skip
    rows = with_margins(pair_rows()) if has_margins else pair_rows()
    said = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    theirs = [
        {**row, "prompt": said("user", row["prompt"])} | {k: said("assistant", row[k]) for k in ("chosen", "rejected")}
        for row in rows
    ]
    trainer = RewardTrainer(
        model(), args=settings, train_dataset=Dataset.from_list(theirs), processing_class=tiny_tokenizer()
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    scorer = ModelScorer(trainer.model)
    trainer.model.zero_grad()
    expected = trainer.compute_loss(trainer.model, dict(inputs))
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    batch = collate(of_trl(inputs))
    loss, measures = make_objective({"name": "reward", "centering": 0.1}).loss(scorer, batch)
    (loss / batch.count).backward()
    torch.testing.assert_close(loss / batch.count, expected, rtol=1e-5, atol=1e-6)
    logged = trainer._metrics["eval"]
    for name in ("accuracy", "margin"):
        assert float(measures[name] / batch.count) == pytest.approx(logged[name][-1], rel=1e-5)
    size = max(float(g.abs().max()) for g in gradients.values())
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(
            p.grad, gradients[name], rtol=1e-5, atol=1e-5 * size, msg=lambda m, n=name: f"{n}: {m}"
        )
    tokens = lambda examples: {tuple(e.expanded().input_ids.tolist()) for e in examples}  # noqa: E731
    assert tokens(of_trl(inputs)) == tokens(examples_of(rows))  # what a model reads is what TRL gives it


def of_trl(inputs) -> list[Example]:
    """TRL's batch, [chosen, rejected] rows padded on either side, as our examples."""
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        kept = ids[mask.bool()].numpy().astype(np.int32)
        rows.append(Example(kept, np.arange(len(kept)) == len(kept) - 1, None, "row"))
    half = len(rows) // 2
    found = [joined([rows[i], rows[half + i]], "row") for i in range(half)]
    for i, example in enumerate(found):
        margin = float(inputs["margin"][i]) if "margin" in inputs else 0.0
        example.fields["margin"] = np.array([margin], np.float32)
    return found


def test_loss_by_hand():
    found = bradley_terry(torch.tensor([1.0]), torch.tensor([-0.5]), torch.tensor([0.25]), 0.1)
    assert found.item() == pytest.approx(math.log1p(math.exp(-1.25)) + 0.1 * 0.25, rel=1e-6)


def test_packing_accumulation_and_order_change_nothing():
    check_invariance(
        make_objective({"name": "reward", "centering": 0.01}),
        ModelScorer(model()),
        examples_of(with_margins(pair_rows())),
    )


@pytest.mark.parametrize("method", [{"name": "lora", "rank": 4}, "full"])
def test_a_run_learns_to_rank_and_serves_as_a_reward(tmp_path, method):
    rows = with_margins(pair_rows(8))
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    settings = run_settings(
        tmp_path, model=str(tmp_path / "base"), method=method, objective="reward", data=rows, eval_data=rows,
        max_steps=20, batch_rows=8,
    )  # fmt: skip
    run = fastpt.train(**settings)
    assert run.metrics["eval_accuracy"] == 1.0
    assert run.metrics["eval_margin"] > 1
    assert run.metrics["eval_loss"] < run.history[0]["loss"]
    reward = load_reward_model(str(run.path / "model"), torch.device("cpu"), torch.float32)
    sides = [
        reward.function([row["prompt"] for row in rows], [row[side] for row in rows]) for side in ("chosen", "rejected")
    ]
    chosen, rejected = (sum(side) / len(side) for side in sides)
    assert chosen == pytest.approx(run.metrics["eval_reward_chosen"], rel=1e-4)
    assert rejected == pytest.approx(run.metrics["eval_reward_rejected"], rel=1e-4)


def test_the_saved_model_is_of_transformers(tmp_path):
    from transformers import AutoModelForSequenceClassification

    settings = run_settings(tmp_path, model=model(), method="full", objective="reward", data=pair_rows(), max_steps=2)
    run = fastpt.train(**settings)
    plain = AutoModelForSequenceClassification.from_pretrained(run.path / "model").eval()
    assert plain.config.num_labels == 1
    ids = torch.tensor(examples_of(pair_rows())[0].expanded().input_ids[:12]).long()[None]
    run.model.eval()
    torch.testing.assert_close(plain(input_ids=ids).logits, run.model(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_what_is_shared_is_not_trained():
    (example,) = examples_of([{"prompt": "red one", "chosen": "green tea", "rejected": "green salt"}])
    tokenizer = tiny_tokenizer()
    trained = [tokenizer.decode(example.input_ids[a:b][example.trained[a:b]]) for a, b in example.bounds]
    assert [text.split("<")[0] for text in trained] == ["tea", "salt"]
    assert "green" in tokenizer.decode(example.input_ids[: example.prefix])


GOOD = {"prompt": "red", "chosen": "tea", "rejected": "salt"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chosen": ...}, r"has no column 'chosen'.*mend or delete"),
        ({"rejected": ""}, "empty 'rejected'"),
        ({"rejected": "tea"}, "prefers an answer to the same answer"),
        ({"margin": "wide"}, "str 'wide' as 'margin', where a number is needed"),
        ({"margin": float("nan")}, "float nan as 'margin'"),
    ],
)
def test_wrong_rows_are_named(change, said):
    row = {k: v for k, v in {**GOOD, **change}.items() if v is not ...}
    with pytest.raises(DataError, match=f"rows:7.*{said}"):
        ranked_example(tiny_tokenizer(), row, "rows:7", pair_format(None))


def test_answers_that_a_template_renders_alike_are_told():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }} {% endfor %}"
    with pytest.raises(DataError, match=r"rows:7 has answers that the chat template renders alike"):
        ranked_example(tokenizer, GOOD, "rows:7", pair_format(None))


def test_a_prompt_without_room_for_answers_is_told():
    rows = load_rows([{**GOOD, "prompt": " ".join(WORDS * 4)}])
    prepare = make_objective("reward").bind(tiny_tokenizer(), rows, None)
    with pytest.raises(DataError, match="no trained token after truncation"):
        tokenise(rows, prepare, max_length=20, too_long="truncate", cache_key=None, cache_dir=None)
