"""KTO against TRL's own trainer on the same tokens, what must not change it, and rows that are wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastpt
from fastpt.data.batches import collate
from fastpt.data.example import Example
from fastpt.data.pairs import joined, judged_examples
from fastpt.data.sources import load_rows
from fastpt.data.tokenised import tokenise
from fastpt.errors import ConfigError, DataError
from fastpt.objectives import make_objective
from fastpt.objectives.kto import area_under_curve, others_of
from fastpt.scorer import ModelScorer
from tests.objectives.invariance import check_invariance
from tests.objectives.test_dpo import TwoModels
from tests.runs import WORDS, run_settings
from tests.tiny import tiny_model, tiny_tokenizer

WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.7}


def judged_rows(count=6):
    """Prompts and answers of different lengths; two of three are desirable."""
    return [
        {
            "prompt": " ".join(WORDS[i : i + 2 + i % 5]),
            "completion": " ".join(WORDS[i + 1 : i + 3 + i % 4]),
            "label": i % 3 != 0,
        }
        for i in range(count)
    ]


def tokenised(rows):
    rows = load_rows(rows)
    prepare = make_objective("kto").bind(tiny_tokenizer(), rows, None)
    return tokenise(rows, prepare, max_length=256, too_long="error", cache_key=None, cache_dir=None)


def ready(objective, scorer, data):
    """The examples of a step over a whole set."""
    objective.enrich(scorer, data, 2048, lambda _: None)
    return objective.collect(scorer, [data.example(i) for i in range(len(data))], 0)[0]


def two_models():
    return TwoModels(tiny_model("llama"), tiny_model("llama", seed=1))


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    torch.manual_seed(0)
    settings = KTOConfig(
        output_dir=str(tmp_path_factory.mktemp("kto")), per_device_train_batch_size=6, report_to="none", use_cpu=True,
        bf16=False, beta=0.3, max_length=256, gradient_checkpointing=False, train_sampling_strategy="sequential", **WEIGHTS,
    )  # fmt: skip
    return KTOTrainer(
        tiny_model("llama"), tiny_model("llama", seed=1), args=settings,
        train_dataset=Dataset.from_list(judged_rows()), processing_class=tiny_tokenizer(),
    )  # fmt: skip


def of_trl(inputs) -> list[Example]:
    """TRL's padded batch as our examples."""
    columns = (inputs[k] for k in ("input_ids", "attention_mask", "completion_mask", "label"))
    found = []
    for ids, mask, answer, label in zip(*columns, strict=True):
        kept = mask.bool()
        side = Example(ids[kept].numpy().astype(np.int32), answer[kept].bool().numpy(), None, "row")
        found.append(joined([side], "row"))
        found[-1].fields["desirable"] = np.array([bool(label)])
    return found


class Whole:
    """Examples as a set that `enrich` can add to."""

    def __init__(self, examples):
        self.examples = examples
        self.lengths = [e.tokens for e in examples]
        self.example = examples.__getitem__

    def __len__(self):
        return len(self.examples)

    def set_field(self, name, arrays):
        for example, array in zip(self.examples, arrays, strict=True):
            example.fields[name] = array


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("swapped", [False, True])  # either way round, so that the divergence is clipped at 0 and not
def test_loss_and_gradients_are_trls(trl_trainer, loss_type, swapped):
    trl_trainer.loss_type, trl_trainer.calculate_KL = loss_type, loss_type == "kto"
    inputs = next(iter(trl_trainer.get_train_dataloader()))
    model, reference = trl_trainer.model, trl_trainer.ref_model
    if swapped:
        first, second = model.state_dict(), reference.state_dict()
        first = {k: v.clone() for k, v in first.items()}
        model.load_state_dict(second)
        reference.load_state_dict(first)
    model.zero_grad()
    expected = trl_trainer.compute_loss(model, dict(inputs))
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    objective = make_objective({"name": "kto", "loss_type": loss_type, "beta": 0.3, **WEIGHTS})
    scorer = TwoModels(model, reference)
    batch = collate(ready(objective, scorer, Whole(of_trl(inputs))))
    loss, measures = objective.loss(scorer, batch)
    (loss / batch.count).backward()
    if loss_type == "kto":
        found = float(measures["divergence"] / batch.count)
        assert found == pytest.approx(trl_trainer._metrics["eval"]["kl"][-1], rel=1e-5)
    torch.testing.assert_close(loss / batch.count, expected, rtol=1e-5, atol=1e-6)
    size = max(float(g.abs().max()) for g in gradients.values())
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad, gradients[name], rtol=1e-5, atol=1e-5 * size, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_packing_accumulation_and_order_change_nothing(loss_type):
    objective, scorer = make_objective({"name": "kto", "loss_type": loss_type, **WEIGHTS}), two_models()
    check_invariance(objective, scorer, ready(objective, scorer, tokenised(judged_rows())))


def test_the_divergence_is_that_of_the_step_in_any_order():
    objective, scorer, data = make_objective("kto"), two_models(), tokenised(judged_rows())
    objective.enrich(scorer, data, 2048, lambda _: None)
    examples = [data.example(i) for i in range(len(data))]
    found = [objective.collect(scorer, order, 0)[0][0].fields["divergence"] for order in (examples, examples[::-1])]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert objective.collect(scorer, examples[:2], 0)[0][0].fields["divergence"] != pytest.approx(found[0], rel=1e-3)


def test_a_reference_computed_once_is_the_reference():
    objective, data, both = make_objective("kto"), tokenised(judged_rows()), two_models()
    expected = ready(objective, both, tokenised(judged_rows()))[0].fields["divergence"]
    objective.enrich(both.other, data, 2048, lambda _: None)  # before training, the model is the reference
    examples = objective.collect(ModelScorer(both.model), [data.example(i) for i in range(len(data))], 0)[0]
    assert expected > 0
    assert examples[0].fields["divergence"] == pytest.approx(expected, rel=1e-5)


def test_pairs_are_two_rows_whose_divergence_takes_answers_of_other_prompts():
    rows = [
        {"prompt": "red", "chosen": "tea", "rejected": "salt"},
        {"prompt": "blue", "chosen": "sun", "rejected": "moon"},
    ]
    objective, scorer, data = make_objective("kto"), two_models(), tokenised(rows)
    assert [data.example(i).fields["desirable"].item() for i in range(4)] == [True, False, True, False]
    objective.enrich(scorer, data, 2048, lambda _: None)
    tokenizer = tiny_tokenizer()
    for i, (prompt, answer) in enumerate([("red", "sun"), ("red", "moon"), ("blue", "tea"), ("blue", "salt")]):
        (other,) = others_of(data.example(i).fields)
        text = tokenizer.decode(other.input_ids)
        assert prompt in text
        assert answer in text
        assert tokenizer.decode(other.input_ids[other.trained]).startswith(answer)


def test_evaluation_takes_the_divergence_of_the_whole_set():
    """In micro-batches of one row it measures what one batch of all rows does, and what training calls the loss."""
    from fastpt.evaluation import evaluate_set

    objective, scorer, data = make_objective("kto"), two_models(), tokenised(judged_rows())
    examples = ready(objective, scorer, data)
    batch = collate(examples)
    loss, measures = objective.loss(scorer, batch)
    for micro_tokens in (1, 4096):
        found = evaluate_set(objective, scorer, scorer.model, data, micro_tokens)
        assert found["eval_loss"] == pytest.approx(float(loss.detach() / batch.count), rel=1e-5)
        assert found["eval_divergence"] == pytest.approx(float(measures["divergence"] / batch.count), rel=1e-5)
        good, bad = (float(x[0] / x[1]) for x in (measures["reward_desirable"], measures["reward_undesirable"]))
        assert found["eval_margin"] == pytest.approx(good - bad, rel=1e-5)


def test_area_under_curve_by_hand():
    assert area_under_curve(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0, 2.0])) == pytest.approx((1.5 + 3) / 6)


GOOD = {"prompt": "red", "completion": "tea", "label": True}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": ...}, r"has no column 'label'.*mend or delete"),
        ({"completion": ...}, r"has no column 'completion'"),
        ({"completion": ..., "chosen": "tea"}, r"has no column 'rejected'"),
        ({"label": "maybe"}, r"str 'maybe' as 'label', where true"),
        ({"label": 2}, r"int 2 as 'label'"),
        ({"label": None}, r"None as 'label'"),
        ({"completion": " "}, "empty 'completion'"),
        ({"prompt": None}, r"nothing \(None\) as 'prompt'"),
        ({"completion": [{"role": "user", "content": "tea"}]}, "has no assistant turn"),
    ],
)
def test_wrong_rows_are_named(change, said):
    row = {k: v for k, v in {**GOOD, **change}.items() if v is not ...}
    with pytest.raises(DataError, match=f"rows:7.*{said}"):
        judged_examples(tiny_tokenizer(), row, "rows:7", None)


def test_labels_of_tables_are_text():
    for label, expected in (("True", True), ("false", False), ("0", False), (1, True)):
        (found,) = judged_examples(tiny_tokenizer(), {**GOOD, "label": label}, "row", None)
        assert found.fields["desirable"].tolist() == [expected]


def test_a_prompt_without_room_for_its_answer_is_told():
    rows = load_rows([{**GOOD, "prompt": " ".join(WORDS * 4)}])
    prepare = make_objective("kto").bind(tiny_tokenizer(), rows, None)
    with pytest.raises(DataError, match="no trained token after truncation"):
        tokenise(rows, prepare, max_length=20, too_long="truncate", cache_key=None, cache_dir=None)


@pytest.mark.parametrize("method", [{"name": "lora", "rank": 4}, "full"])
def test_a_run_learns_what_is_desirable(tmp_path, method):
    """A fresh adapter is its own reference; for full training it is computed once: the first loss is 1/2 in both."""
    run = fastpt.train(
        **run_settings(
            tmp_path, method=method, objective="kto", data=judged_rows(8), eval_data=judged_rows(8), max_steps=12,
            batch_rows=8,
        )
    )  # fmt: skip
    assert run.history[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert run.history[0]["divergence"] == pytest.approx(0, abs=1e-5)
    assert run.metrics["eval_auc"] == 1.0
    assert run.metrics["eval_margin"] > 0.1
    assert run.metrics["eval_loss"] < 0.48
    assert math.isfinite(run.metrics["eval_divergence"])


def test_a_stream_is_told(tmp_path):
    import json

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in judged_rows()))
    settings = run_settings(tmp_path, data={"path": str(path), "streaming": True}, max_steps=1)
    with pytest.raises(ConfigError, match=r"leave data.streaming out"):
        fastpt.train(**settings, objective="kto")
    settings |= {"model": tiny_model("llama"), "output": tmp_path / "other"}
    run = fastpt.train(**settings, objective={"name": "kto", "loss_type": "apo_zero_unpaired"})
    assert run.history[0]["loss"] == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize(
    ("weights", "hint"),
    [
        ({}, ": undesirable_weight=2 makes both count alike"),
        ({"undesirable_weight": 2.0}, ""),
        ({"undesirable_weight": 6.0}, ": desirable_weight=3 makes both count alike"),
        ({"undesirable_weight": 0.0}, ""),
    ],
)
def test_uneven_data_is_told(weights, hint):
    said = []
    objective = make_objective({"name": "kto", **weights})
    objective.enrich(ModelScorer(tiny_model("llama")), tokenised(judged_rows()), 2048, said.append)
    assert said[0] == f"4 desirable and 2 undesirable answers{hint}"


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (True, r'all 6 answers are desirable: .* add rows with label false, or train on these with objective "sft"'),
        (False, r"all 6 answers are undesirable: .* add rows with label true$"),
    ],
)
def test_answers_of_one_kind_are_told(tmp_path, label, said):
    rows = [row | {"label": label} for row in judged_rows()]
    with pytest.raises(DataError, match=said):
        fastpt.train(**run_settings(tmp_path, objective="kto", data=rows))
    settings = run_settings(tmp_path, objective="kto", data=judged_rows(), eval_data=rows, max_steps=1)
    assert math.isfinite(fastpt.train(**settings).metrics["eval_loss"])  # they can be judged
