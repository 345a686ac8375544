"""Classification of texts: the loss of transformers' own models, packing changes nothing, and every bad row is one sentence."""

import pytest
import torch
from torch.nn import functional as F

import fastpt
from fastpt.adapters import apply_method
from fastpt.config import MethodConfig
from fastpt.data.batches import collate
from fastpt.data.files import Records
from fastpt.errors import ConfigError, DataError, ModelError
from fastpt.objectives import make_objective
from fastpt.scorer import ModelScorer
from tests.objectives.invariance import check_invariance, step
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = ["red sun", "a blue moon over the sea", "tea", "two cats, one dog", "salt and milk"]
SINGLE = [{"text": text, "label": label} for text, label in zip(TEXTS, "abcab", strict=True)]
MULTI = [{"text": t, "label": labels} for t, labels in zip(TEXTS, (["a"], ["b", "c"], [], ["c"], ["a"]), strict=True)]
NUMBERS = [{"text": text, "label": label} for text, label in zip(TEXTS, (0.5, -1.0, 2, 0.25, 3), strict=True)]
KINDS = {"single": SINGLE, "multi": MULTI, "numbers": NUMBERS}
MODELS = {
    "bert": None,
    "roberta": None,
    "distilbert": None,
    "llama": "LlamaForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
}


def bound(rows, model=None, **settings):
    """The objective after the survey of some rows, and their examples."""
    rows = Records(rows, "train.jsonl")
    objective = make_objective({"name": "classify", **settings})
    asked = objective.survey(rows, None, None)
    if model is not None:
        objective.attach(model, "cpu", torch.float32)
    prepare = objective.bind(tiny_tokenizer(), rows, None)
    return objective, [prepare(rows[i], rows.place(i))[0] for i in range(len(rows))], asked


def model_for(family, kind, **changes):
    found = 1 if kind == "numbers" else 3
    return tiny_model(family, cls=MODELS[family], num_labels=found, **changes)


def padded(examples, problem_type, pad):
    """What transformers' own collator would give, padded by a token that the rows do not have."""
    length = max(len(e.input_ids) for e in examples)
    ids = torch.stack(
        [F.pad(torch.tensor(e.input_ids).long(), (0, length - len(e.input_ids)), value=pad) for e in examples]
    )
    mask = torch.stack([(torch.arange(length) < len(e.input_ids)).long() for e in examples])
    labels = torch.stack([torch.tensor(e.fields["label"]) for e in examples])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels if problem_type.startswith("multi") else labels[:, 0],
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MODELS)
def test_loss_and_gradients_are_those_of_transformers(family, kind):
    model = model_for(family, kind)
    objective, examples, asked = bound(KINDS[kind], model)
    theirs = model(**padded(examples, asked["problem_type"], model.config.pad_token_id)).loss
    theirs.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with fastpt.fuse(model):
        loss, _ = step(objective, ModelScorer(model), [examples])
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    size = max(g.abs().max() for g in expected.values())
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in expected), name
        if p.grad is not None:
            assert (p.grad / len(examples) - expected[name]).abs().max() <= 1e-5 * size, name


@pytest.mark.parametrize("settings", [{}, {"class_weights": "balanced", "label_smoothing": 0.1}])
@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_packing_and_order_change_nothing(family, kind, settings):
    if kind == "numbers" and settings:
        pytest.skip("for classes only")
    model = model_for(family, kind)
    objective, examples, _ = bound(KINDS[kind], model, **settings)
    with fastpt.fuse(model):
        check_invariance(objective, ModelScorer(model), examples)


def test_class_weights_and_smoothing_are_torchs_weighted_mean():
    model = model_for("bert", "single")
    objective, examples, _ = bound(SINGLE, model, class_weights={"a": 3.0, "c": 0.5}, label_smoothing=0.2)
    labels = torch.tensor([0, 1, 2, 0, 1])
    with fastpt.fuse(model):
        loss, _ = step(objective, ModelScorer(model), [examples[:2], examples[2:]])
        batch = collate(examples)
        scorer = ModelScorer(model)
        logits = scorer.class_logits(scorer.hidden(batch), batch)
    weights = torch.tensor([3.0, 1.0, 0.5])
    torch.testing.assert_close(loss, F.cross_entropy(logits.detach(), labels, weight=weights, label_smoothing=0.2))


def test_balanced_weights_make_each_class_count_alike():
    objective, examples, _ = bound([*SINGLE, {"text": "x", "label": "a"}], class_weights="balanced")
    sums = [sum(e.count for e in examples if e.fields["label"][0] == c) for c in range(3)]
    assert sums == pytest.approx([2.0, 2.0, 2.0])
    objective, _, _ = bound(MULTI, class_weights="balanced")
    assert objective.weights_on("cpu").tolist() == pytest.approx([3 / 2, 4 / 1, 3 / 2])


def test_the_second_of_two_texts_has_types_of_its_own():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )  # fmt: skip
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's
    rows = Records(
        [{"text": "red", "text_pair": "sun", "label": "a"}, {"text": "tea", "text_pair": "milk", "label": "b"}]
    )
    model = tiny_model("bert", num_labels=2)
    objective = make_objective("classify")
    objective.survey(rows, None, None)
    objective.attach(model, "cpu", torch.float32)
    prepare = objective.bind(tokenizer, rows, None)
    examples = [prepare(row, "row")[0] for row in rows]
    expected = []
    for row in rows:
        given = tokenizer(row["text"], row["text_pair"], return_tensors="pt")
        assert given["token_type_ids"].sum() > 0
        expected.append(model(**given).logits)
    with fastpt.fuse(model):
        scorer, batch = ModelScorer(model), collate(examples)
        got = scorer.class_logits(scorer.hidden(batch), batch)
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_two_texts_without_a_token_between_them_get_a_blank_line():
    rows = Records(
        [{"text": "red", "text_pair": "sun", "label": "a"}, {"text": "tea", "text_pair": "milk", "label": "b"}]
    )
    objective = make_objective("classify")
    objective.survey(rows, None, None)
    (example,) = objective.bind(tiny_tokenizer(), rows, None)(rows[0], "row")
    assert tiny_tokenizer().decode(example.input_ids) == "red\n\nsun"


def test_measures_are_those_of_their_definitions():
    objective, _, _ = bound(SINGLE)
    counts = torch.tensor([[1, 0, 2], [2, 1, 2], [1, 2, 2]])  # right, predicted, actual
    found = objective.summarise({"loss": torch.tensor(10.0), "counts": counts}, 5.0)
    assert found == pytest.approx({"loss": 2.0, "accuracy": 3 / 5, "macro_f1": (2 / 3 + 0 + 1) / 3})
    objective, _, _ = bound(MULTI)
    found = objective.summarise({"loss": torch.tensor(1.0), "counts": counts, "exact": torch.tensor(2)}, 4.0)
    assert found["micro_f1"] == pytest.approx(6 / 10)
    assert found["exact_match"] == 0.5
    objective, _, _ = bound(NUMBERS)
    sums = {"loss": torch.tensor(1.0), "predicted": [1.0, 2.0, 3.0, 3.0], "actual": [1.0, 3.0, 2.0, 10.0]}
    found = objective.summarise(sums, 4.0)
    assert found["mse"] == pytest.approx(51 / 4)
    assert found["spearman"] == pytest.approx(0.632455532)  # 3 / sqrt(4.5 * 5): ranks 1, 2, 3.5, 3.5 and 1, 3, 2, 4
    assert found["pearson"] == pytest.approx(7 / (2.75 * 50) ** 0.5)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_learns_and_its_model_is_read_back(tmp_path, family, method):
    folder = tmp_path / "base"
    model_for(family, "single").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rows = [
        {"text": f"{word} {n}", "label": label} for n in range(4) for word, label in (("sun", "day"), ("moon", "night"))
    ]
    run = fastpt.train(
        str(folder), rows, "classify", method, eval_data=rows, output=tmp_path / "run", max_steps=30, batch_rows=8,
        device="cpu", precision="fp32", quiet=True, **{"optim.lr": 3e-3, "optim.warmup": 0},
    )  # fmt: skip
    assert run.metrics["eval_accuracy"] == 1.0
    made = run.predict(["moon 7", "sun 9"])
    assert [one.label for one in made] == ["night", "day"]
    assert sum(made[0].probabilities.values()) == pytest.approx(1)
    again = fastpt.load_run(tmp_path / "run", device="cpu", precision="fp32").predict("moon 7")
    assert again.label == "night"
    assert again.probabilities["night"] == pytest.approx(made[0].probabilities["night"], rel=1e-5)
    report = run.merge(tmp_path / "merged")
    assert report.top1 == 1.0


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama"])
def test_under_an_adapter_all_of_the_head_is_trained_in_full(family):
    plain = model_for(family, "single")
    head = [name for name, _ in plain.named_parameters() if not name.startswith(f"{plain.base_model_prefix}.")]
    model = apply_method(plain, MethodConfig(name="lora", rank=2), "sequence")
    trained = [name.split("base_model.model.")[1] for name, p in model.named_parameters() if p.requires_grad]
    whole = [name.replace("modules_to_save.default.", "") for name in trained if "lora_" not in name]
    assert sorted(whole) == sorted(head)
    assert len(trained) > len(whole)


BAD = {
    "no label": ([{"text": "a"}], "train.jsonl:1 has no column 'label' (it has text)"),
    "none": ([{"text": "a", "label": None}], "train.jsonl:1 has nothing as its label"),
    "one class": ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], "one class only ('x')"),
    "two kinds": (
        [{"text": "a", "label": "x"}, {"text": "b", "label": 1}],
        "train.jsonl:1 has text as label, but train.jsonl:2 has int",
    ),
    "lists and not": (
        [{"text": "a", "label": ["x"]}, {"text": "b", "label": "y"}],
        "train.jsonl:2 has one label, but train.jsonl:1 has a list",
    ),
    "empty": ([{"text": " ", "label": "x"}, {"text": "b", "label": "y"}], "train.jsonl:1 has an empty 'text'"),
    "no text": ([{"label": "x"}, {"text": "b", "label": "y"}], "train.jsonl:1 has no column 'text'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(name):
    rows, sentence = BAD[name]
    with pytest.raises(DataError) as caught:
        bound(rows)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_label_that_training_has_not_is_named():
    objective, _, _ = bound(SINGLE)
    held_out = Records([{"text": "x", "label": "zebra"}], "eval.jsonl")
    with pytest.raises(
        DataError, match=r"eval.jsonl:1 has the label 'zebra', which the training rows do not have.*objective.labels"
    ):
        objective.bind(tiny_tokenizer(), held_out, None)(held_out[0], held_out.place(0))


def test_labels_given_are_the_order_and_integers_may_number_them():
    _, examples, asked = bound([{"text": "a", "label": 1}, {"text": "b", "label": 0}], labels=["neg", "pos"])
    assert asked["id2label"] == {0: "neg", 1: "pos"}
    assert [e.fields["label"][0] for e in examples] == [1, 0]
    _, examples, asked = bound([{"text": "a", "label": str(n)} for n in (10, 9, 2)])
    assert list(asked["id2label"].values()) == ["2", "9", "10"]


def test_settings_and_models_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="no class of the data"):
        bound(SINGLE, class_weights={"zebra": 2.0})
    with pytest.raises(ConfigError, match="are for classes"):
        bound(NUMBERS, label_smoothing=0.1)
    with pytest.raises(ModelError, match="has 5 outputs, the data need 3"):
        bound(SINGLE, tiny_model("bert", num_labels=5))
    with pytest.raises(ModelError, match="no classification head"):
        bound(SINGLE, tiny_model("llama"))
    with pytest.raises(ModelError, match="is not for objective 'classify'"):
        bound(SINGLE, tiny_model("bert", cls="BertForTokenClassification"))
