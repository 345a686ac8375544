"""Distillation: the divergence of transformers' logits, invariance, own answers, and what does not fit."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastpt
from fastpt.data.batches import collate
from fastpt.data.example import Example
from fastpt.data.files import Records
from fastpt.errors import ConfigError, DataError
from fastpt.objectives import make_objective
from fastpt.scorer import ModelScorer
from tests.objectives.invariance import check_invariance
from tests.ops.test_linear_divergence import divergences
from tests.runs import chat_rows, run_settings
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def teacher():
    torch.manual_seed(7)
    return tiny_model("llama", hidden_size=96, num_hidden_layers=3)


def objective_of(teacher, **settings):
    objective = make_objective({"name": "distill", "teacher": teacher, **settings})
    objective.attach(tiny_model("llama"), torch.device("cpu"), torch.float32)
    return objective


def some_examples(count=4):
    draw = np.random.default_rng(0)
    sizes = draw.integers(6, 30, count)
    return [Example(draw.integers(0, 250, n).astype(np.int32), np.arange(n) >= 3, None, f"rows:{n}") for n in sizes]


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_loss_and_gradients_are_those_of_the_logits(teacher, beta, is_fused):
    student, examples = tiny_model("llama"), some_examples()
    plain, plain_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    objective = objective_of(teacher, beta=beta, temperature=1.5, cross_entropy=0.25)
    if is_fused:
        fastpt.fuse(student)
    loss, metrics = objective.loss(ModelScorer(student), collate(examples))
    loss.backward()
    total, divergence = torch.zeros(()), torch.zeros(())
    for one in examples:
        ids = torch.from_numpy(one.input_ids)[None].long()
        logits, theirs = plain(ids).logits[0, 2:-1], plain_teacher(ids).logits[0, 2:-1].detach()
        log_s, log_t = (logits / 1.5).log_softmax(-1), (theirs / 1.5).log_softmax(-1)
        rows = divergences(log_s, log_t, beta).sum()
        divergence = divergence + rows
        total = total + 0.75 * rows + 0.25 * torch.nn.functional.cross_entropy(logits, ids[0, 3:], reduction="sum")
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics["divergence"], divergence, rtol=1e-5, atol=1e-5)
    for p, q in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_how_a_step_is_cut_changes_nothing(teacher):
    examples = some_examples()
    student = fastpt.fuse(tiny_model("llama")).model
    check_invariance(objective_of(teacher, beta=0.5), ModelScorer(student), examples)


@pytest.mark.parametrize("on_policy", [0.0, 0.5])
def test_a_student_comes_nearer_to_its_teacher(tmp_path, teacher, on_policy):
    objective = {"name": "distill", "teacher": teacher, "on_policy": on_policy, "max_new_tokens": 8}
    changes = {"eval_data": chat_rows(6, seed=1), "eval_steps": 4, "max_steps": 8, "method": "full"}
    optim = {"lr": 3e-3, "warmup": 0}
    run = fastpt.train(**run_settings(tmp_path, objective=objective, optim=optim, **changes))
    found = [r["eval_divergence"] for r in run.history if "eval_divergence" in r]
    assert found[-1] < found[0]
    assert run.metrics["eval_loss"] > 0


def test_own_answers_follow_the_prompts_and_depend_on_the_step_alone(teacher):
    objective = objective_of(teacher, on_policy=1.0, max_new_tokens=5)
    student, examples = tiny_model("llama").eval(), some_examples(3)
    objective._model, objective._tokenizer = student, tiny_tokenizer()
    scorer = ModelScorer(student)
    (first,), (again,), (other,) = (objective.collect(scorer, examples, step) for step in (1, 1, 2))
    for given, made in zip(examples, first, strict=True):
        assert np.array_equal(made.input_ids[:3], given.input_ids[:3])
        assert made.trained.tolist() == [False] * 3 + [True] * (len(made.input_ids) - 3)
        assert 1 <= len(made.input_ids) - 3 <= 5
    same = [np.array_equal(a.input_ids, b.input_ids) for a, b in zip(first, again, strict=True)]
    assert all(same)
    assert not all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(first, other, strict=True))
    text = Example(np.arange(5, dtype=np.int32), np.ones(5, bool), None, "texts.jsonl:7")
    with pytest.raises(DataError, match=r"texts.jsonl:7 has no prompt for the student to answer: give prompts"):
        objective.collect(scorer, [text], 1)


def test_own_answers_have_no_cross_entropy(teacher):
    """They are the student's samples, of which the cross-entropy teaches nothing but noise."""
    settings = {"on_policy": 0.5, "max_new_tokens": 5, "cross_entropy": 0.25}
    objective = objective_of(teacher, **settings)
    student, examples = tiny_model("llama").eval(), some_examples(6)
    examples[0] = replace(examples[0], weights=np.full(len(examples[0].input_ids), 0.5, np.float32))
    objective._model, objective._tokenizer = student, tiny_tokenizer()
    scorer = ModelScorer(student)
    (made,) = objective.collect(scorer, examples, 1)
    given = [a for a, b in zip(made, examples, strict=True) if np.array_equal(a.input_ids, b.input_ids)]
    assert 0 < len(given) < len(made)
    loss, metrics = objective.loss(scorer, collate(made))
    batch = collate(given)
    expected = 0.75 * metrics["divergence"] + 0.25 * scorer.cross_entropy(scorer.hidden(batch), batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_no_model_teaches_itself():
    student = tiny_model("llama")
    objective = make_objective({"name": "distill", "teacher": student})
    with pytest.raises(ConfigError, match=r"teacher is the model that is trained.*give its path or a copy"):
        objective.attach(torch.nn.ModuleList([student]), torch.device("cpu"), torch.float32)
    assert all(p.requires_grad for p in student.parameters())


def test_a_plan_of_memory_with_a_teacher_is_refused(teacher):
    with pytest.raises(ConfigError, match="not planned for a teacher: leave memory_limit out"):
        fastpt.plan(tiny_model("llama"), objective={"name": "distill", "teacher": teacher}, max_length=64)


def test_a_teacher_of_another_vocabulary_is_refused(teacher):
    objective = objective_of(tiny_model("llama", vocab_size=64))
    with pytest.raises(ConfigError, match="tells 64 tokens apart, the tokenizer knows"):
        objective.bind(tiny_tokenizer(), Records(chat_rows(2)), None)
    objective = objective_of(teacher)
    other = tiny_tokenizer()
    other.add_tokens(["<another>"])
    objective._teacher_tokenizer = other
    with pytest.raises(ConfigError, match=r"has another vocabulary .* take a teacher of the same family"):
        objective.bind(tiny_tokenizer(), Records(chat_rows(2)), None)
