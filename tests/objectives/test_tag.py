"""Tagging of words: the loss of transformers' own models, words and tokens aligned, entities counted as conlleval does."""

import pytest
import torch
from torch.nn import functional as F

import fastpt
from fastpt.data.files import Records
from fastpt.data.render import encode_words
from fastpt.data.sources import load_rows
from fastpt.errors import DataError
from fastpt.objectives import make_objective
from fastpt.objectives._class_scores import entity_counts, entity_types, spans
from fastpt.scorer import ModelScorer
from tests.objectives.invariance import check_invariance, step
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [
    {"tokens": ["Anna", "sees", "Oslo"], "tags": ["B-person", "O", "B-place"]},
    {"tokens": ["the", "New", "York", "moon"], "tags": ["O", "B-place", "I-place", "O"]},
    {"tokens": ["tea"], "tags": ["O"]},
]
MODELS = {
    "bert": "BertForTokenClassification",
    "roberta": "RobertaForTokenClassification",
    "distilbert": "DistilBertForTokenClassification",
    "llama": "LlamaForTokenClassification",
}


def bound(rows, model=None, **settings):
    rows = Records(rows, "train.jsonl")
    objective = make_objective({"name": "tag", **settings})
    objective.survey(rows, None, None)
    if model is not None:
        objective.attach(model, "cpu", torch.float32)
    prepare = objective.bind(tiny_tokenizer(), rows, None)
    return objective, [prepare(rows[i], rows.place(i))[0] for i in range(len(rows))]


def model_for(family):
    return tiny_model(family, cls=MODELS[family], num_labels=4, classifier_dropout=0.0, seq_classif_dropout=0.0)


@pytest.mark.parametrize("family", MODELS)
def test_loss_and_gradients_are_those_of_transformers(family):
    model = model_for(family)
    objective, examples = bound(ROWS, model)
    length = max(len(e.input_ids) for e in examples)
    padded = lambda values, fill: F.pad(torch.tensor(values).long(), (0, length - len(values)), value=fill)  # noqa: E731
    theirs = model(
        input_ids=torch.stack([padded(e.input_ids, model.config.pad_token_id) for e in examples]),
        attention_mask=torch.stack([padded([1] * len(e.input_ids), 0) for e in examples]),
        labels=torch.stack([padded(e.targets, -100) for e in examples]),
    ).loss
    theirs.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with fastpt.fuse(model):
        loss, _ = step(objective, ModelScorer(model), [examples])
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    size = max(g.abs().max() for g in expected.values())
    for name, p in model.named_parameters():
        if name in expected:
            assert (p.grad / 8 - expected[name]).abs().max() <= 1e-5 * size, name


@pytest.mark.parametrize("settings", [{}, {"class_weights": "balanced", "label_smoothing": 0.1}])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_accumulation_packing_and_order_change_nothing(family, settings):
    model = model_for(family)
    objective, examples = bound(ROWS, model, **settings)
    with fastpt.fuse(model):
        check_invariance(objective, ModelScorer(model), examples)


def test_class_weights_are_torchs_weighted_mean():
    model = model_for("bert")
    objective, examples = bound(ROWS, model, class_weights={"O": 0.25})
    with fastpt.fuse(model):
        scorer = ModelScorer(model)
        loss, _ = step(objective, scorer, [[e] for e in examples])
        alone = [objective._scored(scorer, fastpt.data.batches.collate([e])) for e in examples]
    logits, labels = (torch.cat(parts) for parts in zip(*alone, strict=True))
    assert labels.tolist() == [0, 3, 1, 3, 1, 2, 3, 3]
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 1.0, 1.0, 0.25])))


def tokenizer_with_special_tokens():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    return tokenizer


def test_the_first_token_of_a_word_carries_its_tag():
    words = ["né", "a", "日本", "x,y"]
    ids, firsts = encode_words(tokenizer_with_special_tokens(), words)
    assert ids[[0, -1]].tolist() == [1, 2]
    ends = [*firsts[1:].tolist(), len(ids) - 1]
    read = [tiny_tokenizer().decode(ids[start:stop]) for start, stop in zip(firsts.tolist(), ends, strict=True)]
    assert "".join(read) == "né a 日本 x,y"
    assert [text.strip() for text in read] == words


def test_words_that_the_tokenizer_drops_have_no_tag():
    from tokenizers import normalizers

    tokenizer = tokenizer_with_special_tokens()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("#", "")
    _, firsts = encode_words(tokenizer, ["a", "#", "b"])
    assert [first >= 0 for first in firsts] == [True, False, True]


def test_spans_are_read_as_conlleval_reads_them():
    read = lambda text: list(spans(text.split()))  # noqa: E731
    assert read("B-a I-a O B-a") == [("a", 0, 2), ("a", 3, 4)]
    assert read("I-a I-b B-b I-b") == [("a", 0, 1), ("b", 1, 2), ("b", 2, 4)]
    assert read("B-a I-a L-a I-a U-b S-b E-b") == [("a", 0, 3), ("a", 3, 4), ("b", 4, 5), ("b", 5, 6), ("b", 6, 7)]
    assert read("O O") == []
    assert entity_types(["O", "B-x", "I-x", "B-y"]) == ["x", "y"]
    assert entity_types(["NOUN", "VERB"]) == entity_types(["O", "OTHER"]) == []
    counts = entity_counts(["B-a", "I-a", "O", "B-b"], ["B-a", "O", "O", "B-b"], ["a", "b"])
    assert counts.tolist() == [[0, 1], [1, 1], [1, 1]]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_learns_and_its_model_is_read_back(tmp_path, method):
    folder = tmp_path / "base"
    tiny_model("bert").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rows = ROWS[:2] * 4
    run = fastpt.train(
        str(folder), rows, "tag", method, eval_data=ROWS, output=tmp_path / "run", max_steps=40, batch_rows=8,
        device="cpu", precision="fp32", quiet=True, **{"optim.lr": 5e-3, "optim.warmup": 0},
    )  # fmt: skip
    assert run.metrics["eval_f1"] == 1.0
    assert run.metrics["eval_f1_person"] == 1.0
    assert run.predict(["Anna sees Oslo", ["the", "New", "York", "moon"]]) == [row["tags"] for row in ROWS[:2]]
    again = fastpt.load_run(tmp_path / "run", device="cpu", precision="fp32")
    assert again.predict("Anna sees Oslo") == ROWS[0]["tags"]


BAD = {
    "lengths": ([{"tokens": ["a", "b"], "tags": ["O"]}], "train.jsonl:1 has 2 tokens but 1 tags"),
    "no tags": ([{"tokens": ["a", "b"]}], "train.jsonl:1 has no column 'tags' (it has tokens)"),
    "no words": ([{"tokens": [], "tags": []}], "train.jsonl:1 has no tokens"),
    "empty word": ([{"tokens": ["a", " "], "tags": ["O", "X"]}], "train.jsonl:1 has an empty word (token 2)"),
    "text": ([{"tokens": "a b", "tags": ["O", "X"]}], "train.jsonl:1 has str 'a b' as its tokens"),
    "no list": ([{"tokens": ["a"], "tags": "O"}], "train.jsonl:1 has str 'O' as its tags"),
    "none": ([{"tokens": ["a"], "tags": [None]}], "train.jsonl:1 has NoneType None as a label"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(name):
    rows, sentence = BAD[name]
    with pytest.raises(DataError) as caught:
        bound([*rows, *ROWS])
    assert sentence in str(caught.value)


def test_a_conll_file_is_rows_of_sentences(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("-DOCSTART- -X- O\n\nAnna NNP B-person\nsees VB O\n\n\ntea NN O\n")
    rows = load_rows(path)
    assert list(rows) == [{"tokens": ["Anna", "sees"], "tags": ["B-person", "O"]}, {"tokens": ["tea"], "tags": ["O"]}]
    assert rows.place(1) == f"{path}:7"
    path.write_text("Anna\tB-person\nsees\n")
    with pytest.raises(DataError, match=r"a.conll:2 has 1 column"):
        load_rows(path)
