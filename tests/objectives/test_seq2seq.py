"""Encoder-decoders: loss and gradients of transformers' own model, invariance, BLEU, and what does not fit."""

import copy
import sys

import pytest
import torch

import fastpt
from fastpt.data.batches import collate
from fastpt.data.files import Records
from fastpt.errors import ConfigError, DataError, ModelError
from fastpt.fusion import encoder_decoder
from fastpt.objectives import make_objective
from fastpt.scorer import ModelScorer
from tests.objectives.invariance import check_invariance
from tests.runs import run_settings
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [
    {"source": "the red cat", "target": "die rote Katze"},
    {"source": "one dog and two birds by the sea", "target": "ein Hund"},
    {"source": "tea", "target": "Tee mit Milch und viel Zucker"},
]
FAMILIES = ["bart", "marian", "t5"]


def prepared(model, rows=ROWS, **settings):
    objective = make_objective({"name": "seq2seq", **settings})
    objective.attach(model, torch.device("cpu"), torch.float32)
    prepare = objective.bind(tiny_tokenizer(), Records(rows), None)
    return objective, [one for n, row in enumerate(rows, 1) for one in prepare(row, f"rows:{n}")]


def model_of(family):
    model = tiny_model(family)
    if family != "t5":
        model.final_logits_bias.normal_(std=0.3)
    return model


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_transformers(family, smoothing, is_fused):
    model = model_of(family)
    plain = copy.deepcopy(model)
    objective, examples = prepared(model, label_smoothing=smoothing)
    if is_fused:
        fastpt.fuse(model)
    batch = collate(examples)
    loss, _ = objective.loss(ModelScorer(model), batch)
    (loss / batch.count).backward()
    tokenizer = tiny_tokenizer()
    texts = [[row[side] for row in ROWS] for side in ("source", "target")]
    given, labels = (tokenizer(side, padding=True, return_tensors="pt") for side in texts)
    wanted = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    logits = plain(input_ids=given["input_ids"], attention_mask=given["attention_mask"], labels=wanted).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), label_smoothing=smoothing)
    expected.backward()
    torch.testing.assert_close(loss / batch.count, expected, rtol=1e-5, atol=1e-6)
    grads = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in grads.values())
    for name, p in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_sides_are_packed(family, monkeypatch):
    model = model_of(family)
    handle = fastpt.fuse(model)
    assert encoder_decoder.takes_packed(handle), handle.no_packing
    monkeypatch.setattr(encoder_decoder, "_states_of_rows", None)
    objective, examples = prepared(model)
    objective.loss(ModelScorer(model), collate(examples))[0].backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_layers_give_the_same_gradients(family):
    grads, start = [], model_of(family).train()
    for recomputes in (False, True):
        model = copy.deepcopy(start)
        fastpt.fuse(model)
        if recomputes:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        objective, examples = prepared(model)
        objective.loss(ModelScorer(model), collate(examples))[0].backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_attention_weights_are_right_on_average(family):
    model = tiny_model(family, **{"dropout_rate" if family == "t5" else "attention_dropout": 0.1})
    fastpt.fuse(model)
    objective, examples = prepared(model)
    batch, scorer = collate(examples), ModelScorer(model)
    with torch.no_grad():
        without = float(objective.loss(scorer, batch)[0])
        model.train()
        torch.manual_seed(0)
        losses = torch.stack([objective.loss(scorer, batch)[0] for _ in range(40)])
    assert losses.std() > 1e-4 * losses.mean()
    assert float(losses.mean()) == pytest.approx(without, rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_is_itself_on_padded_rows(family):
    """As other trainers and generate() call it: masks of both sides, of equal and unequal lengths, with a cache."""
    model = model_of(family)
    plain = copy.deepcopy(model)
    fastpt.fuse(model)
    for lengths in ((7, 4), (5, 5)):
        ids, labels = (torch.arange(2 * n).view(2, n) * 7 % 200 + 3 for n in lengths)
        mask = torch.ones_like(ids)
        mask[1, 3:] = 0
        labels[0, 2:] = -100
        losses = [one(input_ids=ids, attention_mask=mask, labels=labels).loss for one in (model, plain)]
        torch.testing.assert_close(*losses)
        grads = [
            torch.autograd.grad(loss, next(one.parameters()))[0]
            for loss, one in zip(losses, (model, plain), strict=True)
        ]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
        for beams in (1, 2):
            said = [
                one.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, num_beams=beams, do_sample=False)
                for one in (model, plain)
            ]
            assert torch.equal(*said)


def test_a_model_that_numbers_tokens_otherwise_gets_padded_rows(monkeypatch):
    model = model_of("bart")
    plain = copy.deepcopy(model)
    # As if its positions were unknown.
    monkeypatch.setattr(sys.modules["fastpt.fusion.fuse"], "position_patches", lambda module: [])
    handle = fastpt.fuse(model)
    assert not encoder_decoder.takes_packed(handle)
    assert "hidden states are others" in handle.no_packing
    objective, examples = prepared(model)
    losses = [objective.loss(ModelScorer(one), collate(examples))[0] for one in (model, plain)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_how_a_step_is_cut_changes_nothing(family):
    model = model_of(family)
    fastpt.fuse(model)
    objective, examples = prepared(model)
    check_invariance(objective, ModelScorer(model), examples)


@pytest.mark.parametrize("method", ["full", {"name": "lora", "rank": 4}])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_run_learns_and_tells_bleu(tmp_path, family, method):
    pytest.importorskip("sacrebleu")
    changes = {"objective": {"name": "seq2seq", "max_new_tokens": 24}, "eval_data": ROWS[:1], "method": method}
    settings = run_settings(tmp_path, **{"model": tiny_model(family), "data": ROWS[:1] * 8, "max_steps": 30, **changes})
    run = fastpt.train(**settings)
    assert run.history[-2]["loss"] < 0.5 * run.history[0]["loss"]
    assert 0 <= run.metrics["eval_bleu"] <= 100
    assert run.metrics["eval_chrf"] >= 0
    said = run.predict(ROWS[0]["source"])
    assert said == run.predict([ROWS[0]["source"]])[0]
    assert isinstance(said, str)


def test_a_perfect_answer_has_bleu_100():
    pytest.importorskip("sacrebleu")
    objective = make_objective("seq2seq")
    sums = {"loss": torch.tensor(2.0), "said": ["ein Hund und eine Katze"], "wanted": ["ein Hund und eine Katze"]}
    found = objective.summarise(sums, 2.0)
    assert found["bleu"] == pytest.approx(100)
    assert found["loss"] == 1.0


def test_languages_within_a_translation(tmp_path):
    objective = make_objective({"name": "seq2seq", "prefix": "to German: "})
    objective.attach(tiny_model("bart"), None, None)
    tokenizer = tiny_tokenizer()
    rows = [{"translation": {"en": "cat", "de": "Katze"}}]
    (example,) = objective.bind(tokenizer, Records(rows), {"source": "en", "target": "de"})(rows[0], "rows:1")
    assert tokenizer.decode(example.source.tolist(), skip_special_tokens=True) == "to German: cat"
    assert tokenizer.decode(example.input_ids.tolist(), skip_special_tokens=True) == "Katze"
    assert example.trained.tolist() == [False] + [True] * (len(example.input_ids) - 1)


def test_bad_rows_and_models_are_told():
    objective, _ = prepared(tiny_model("bart"))
    prepare = objective.bind(tiny_tokenizer(), Records(ROWS), None)
    with pytest.raises(DataError, match="rows:7 has no column 'target', which translation rows need"):
        prepare({"source": "cat"}, "rows:7")
    with pytest.raises(DataError, match="rows:7 has an empty 'target'"):
        prepare({"source": "cat", "target": "  "}, "rows:7")
    with pytest.raises(ModelError, match="is no encoder-decoder"):
        objective.attach(tiny_model("llama"), None, None)


def test_without_sacrebleu_the_remedy_is_told(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigError, match=r"pip install 'fastpt\[translation\]', or set objective.generates=false"):
        make_objective("seq2seq").attach(tiny_model("bart"), None, None)
