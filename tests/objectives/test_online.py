"""Online RL over whole runs: it learns, batching does not matter, rollouts repeat; bad rewards and prompts are explained."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import fastpt
from fastpt.adapters import VALUE_HEAD
from fastpt.data.batches import collate
from fastpt.errors import TrainingError
from fastpt.objectives.grpo import VARIANTS
from tests.objectives.online import KINDS, ROWS, letters, prepared, rolled_out, settings, short, varied
from tests.runs import WORDS
from tests.tiny import tiny_model


@pytest.mark.parametrize("kind", KINDS)
def test_the_reward_rises(tmp_path, kind):
    objective = {"group_size": 8, "minibatches": 1, "rewards": letters}
    run = fastpt.train(
        **settings(tmp_path, kind, objective, max_steps=24, batch_rows=8, optim={"lr": 2e-2, "warmup": 0})
    )
    reward = [record["reward"] for record in run.history]
    assert np.mean(reward[-4:]) > 3 * np.mean(reward[:4]) > 0
    assert {"reward_std", "entropy", "clip_fraction", "completion_tokens", "truncated", "groups_left_out"} <= set(
        run.history[0]
    )


@pytest.mark.parametrize(("kind", "variant"), [*(("grpo", v) for v in VARIANTS), ("rloo", None), ("ppo", None)])
def test_the_gradient_does_not_depend_on_packing_or_order(tmp_path, kind, variant):
    """One batch, a batch for each group, and groups in another order."""
    objective = {"kl": 0.1, "entropy": 0.01, "group_size": 4, "iterations": 2, "minibatches": 1}
    objective |= {"variant": variant} if variant else {}
    trainer = prepared(tmp_path, kind, objective, max_length=128)
    examples = rolled_out(trainer)[1]

    def gradient(parts):
        total, count = 0.0, 0.0
        for part in parts:
            batch = collate(part)
            loss, _ = trainer.objective.loss(trainer.scorer, batch)
            loss.backward()
            total, count = total + loss.item(), count + batch.count
        grads = torch.cat([p.grad.flatten() / count for p in trainer.parameters if p.grad is not None])
        for p in trainer.parameters:
            p.grad = None
        return total / count, grads

    with torch.no_grad():  # off the policy that answered, so that ratios and clipping matter
        for p in trainer.parameters:
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    loss, grads = gradient([examples])
    assert grads.abs().max() > 0
    for parts in ([[e] for e in examples], [examples[::-1]]):
        other_loss, other = gradient(parts)
        assert other_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
        torch.testing.assert_close(other, grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_may_be_cut_into_several_examples(tmp_path, kind):
    whole = prepared(tmp_path / "a", kind, {"group_size": 4}, max_length=128)
    parts = prepared(tmp_path / "b", kind, {"group_size": 4}, max_length=128, micro_batch_tokens=60)
    found = []
    for trainer in (whole, parts):
        examples = [example for step in rolled_out(trainer) for example in step]
        batch = collate(sorted(examples, key=lambda e: e.place))
        found.append((len(examples), batch.count, trainer.objective.loss(trainer.scorer, batch)[0].item()))
    assert found[1][0] > found[0][0]
    assert found[0][1] == found[1][1]
    assert found[1][2] == pytest.approx(found[0][2], rel=1e-4, abs=1e-5)


def test_micro_batches_hold_what_the_model_sees(tmp_path):
    trainer = prepared(tmp_path, objective={"group_size": 2}, max_length=128, micro_batch_tokens=100)
    micro = [
        trainer.scorer.batch(examples).input_ids.numel()
        for _, step in zip(range(3), trainer.feed, strict=False)
        for examples in step
    ]
    assert len(micro) > 3
    assert max(micro) <= 100


def test_a_rollout_depends_on_seed_and_number_alone(tmp_path):
    trainer = prepared(tmp_path / "a")
    ids = lambda steps: [example.input_ids.tolist() for step in steps for example in step]  # noqa: E731
    first = ids(rolled_out(trainer))
    torch.rand(7)
    state = torch.get_rng_state()
    assert ids(rolled_out(trainer)) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert ids(rolled_out(trainer, step=1)) != first
    assert ids(rolled_out(prepared(tmp_path / "b", seed=1))) != first


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_bit_for_bit_like_a_straight_one(tmp_path, kind):
    objective = {"group_size": 4, "minibatches": 1, "kl": 0.05}
    same = {"max_steps": 6, "save_steps": 3, "keep_checkpoints": 5}
    straight = fastpt.train(**settings(tmp_path / "a", kind, objective, **same))
    middle = straight.path / "checkpoints/step-00000003"
    resumed = fastpt.train(**settings(tmp_path / "b", kind, objective, **same, resume=middle))
    trained = [[p for p in run.model.parameters() if p.requires_grad] for run in (straight, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_value_head_is_saved_beside_the_model(tmp_path, method):
    run = fastpt.train(**settings(tmp_path, "ppo", method=method, max_steps=2))
    from safetensors.torch import load_file

    head = load_file(run.path / f"model/{VALUE_HEAD}.safetensors")
    assert torch.equal(head["weight"], getattr(run.model, VALUE_HEAD).weight)
    assert head["weight"].abs().max() > 0
    weights = next(path for path in (run.path / "model").glob("*model.safetensors"))
    assert not any(VALUE_HEAD in name for name in load_file(weights))


@pytest.mark.parametrize("method", ["lora", "full", "continued"])
def test_the_reference_is_the_model_before_training(tmp_path, method):
    """Without its adapter, or a copy where there is none or where it had been trained before."""
    changes = {"method": method}
    if method == "continued":
        model = get_peft_model(
            tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        )
        changes = {"model": model}
    trainer = prepared(tmp_path, objective={"kl": 0.1, "iterations": 2}, **changes)
    examples = rolled_out(trainer)[0]
    for example in examples:
        np.testing.assert_allclose(example.fields["ref_logprobs"], example.fields["old_logprobs"], atol=1e-5)
    with torch.no_grad():
        for p in trainer.parameters:
            p.add_(0.05 * torch.randn_like(p))
    moved = trainer.objective._scores(trainer.scorer, examples, trainer.objective._reference_logprobs)
    now = trainer.objective._scores(trainer.scorer, examples, trainer.objective._logprobs)
    for example, reference, policy in zip(examples, moved, now, strict=True):
        np.testing.assert_allclose(reference, example.fields["old_logprobs"], atol=1e-5)
        assert np.abs(policy - reference).max() > 1e-2


# Groups and answers


def test_groups_of_equal_rewards_are_left_out_and_counted(tmp_path):
    def by_prompt(prompts, completions):
        return [
            float("a" in one) if prompt.endswith("cat") else 0.5
            for prompt, one in zip(prompts, completions, strict=True)
        ]

    trainer = prepared(tmp_path, objective={"rewards": by_prompt, "group_size": 16})
    prompts = [trainer.feed.prompts.data.example(i) for i in range(len(ROWS))]
    (step,) = trainer.objective.collect(trainer.scorer, prompts, 0)
    (example,) = step
    assert example.place == f"row {WORDS.index('cat') + 1}"
    metrics = trainer.objective.loss(trainer.scorer, collate(step))[1]
    assert metrics["groups_left_out"].tolist() == [len(ROWS) - 1, len(ROWS)]


def test_a_run_whose_rewards_never_differ_ends_with_the_reason(tmp_path):
    with pytest.raises(
        TrainingError, match=r"gave nothing to learn from .* rewards that tell better answers from worse"
    ):
        fastpt.train(**settings(tmp_path, objective={"rewards": lambda completions: [1.0] * len(completions)}))


def _with_answers(trainer, answers):
    trainer.scorer.generate = lambda prompts, **options: [answers[i % len(answers)] for i in range(len(prompts))]
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_answer_is_its_closing_token(tmp_path, kind):
    trainer = _with_answers(prepared(tmp_path, kind, {"group_size": 2, "minibatches": 1}), [[2], [70, 71, 2]])
    seen = []
    trainer.objective._functions[0].function = lambda completions: seen.extend(completions) or [0.0, 1.0] * 4
    (step,) = rolled_out(trainer)
    assert seen[:2] == ["", "de"]
    loss, _ = trainer.objective.loss(trainer.scorer, collate(step))
    assert torch.isfinite(loss)
    assert collate(step).kept_lengths.tolist() == [1, 3] * 4


def test_answers_that_were_cut(tmp_path):
    """Kept, not trained but counted, or punished; the closing token says which are cut."""
    answers = [[70] * 12, [70, 2], [70] * 10 + [2], [71, 71]]
    found = {}
    for truncated in ("keep", "mask", "punish"):
        objective = {"group_size": 4, "truncated": truncated, "overlong_buffer": 4, "rewards": [varied, short]}
        trainer = _with_answers(prepared(tmp_path / truncated, objective=objective), answers)
        (step,) = rolled_out(trainer)
        batch = collate(step)
        found[truncated] = batch.kept_lengths.tolist()[:4], batch.count, step[0].fields["advantages"]
        metrics = trainer.objective.loss(trainer.scorer, batch)[1]
        assert metrics["truncated"].tolist() == [8.0, 16.0]
        assert metrics["reward/short"][0].item() == pytest.approx(-0.01 * 4 * (12 + 1 + 10 + 2))
    assert found["keep"][:2] == ([12, 2, 11, 2], 16.0)
    assert found["mask"][:2] == ([2, 11, 2, 11], 16.0)
    assert found["punish"][0] == [12, 2, 11, 2]
    assert found["punish"][2][0] < found["keep"][2][0]


def test_off_policy_steps(tmp_path):
    trainer = prepared(tmp_path, objective={"iterations": 2, "minibatches": 2})
    assert trainer.objective.steps_per_rollout == 4
    assert trainer.feed.steps_per_epoch == 4 * trainer.feed.prompts.steps_per_epoch
    steps = rolled_out(trainer)
    assert [len(step) for step in steps] == [2, 2, 2, 2]
    assert sorted(e.place for step in steps[:2] for e in step) == sorted(e.place for step in steps[2:] for e in step)
    assert all("old_logprobs" in e.fields for step in steps for e in step)
    run = fastpt.train(**settings(tmp_path / "run", objective={"iterations": 3}, max_steps=6))
    assert run.history[1]["clip_fraction"] >= 0
    assert [r["reward"] for r in run.history[:3]] == [run.history[0]["reward"]] * 3


def test_evaluation_is_the_reward_of_greedy_answers(tmp_path):
    rewards = [letters, short]
    objective = {"rewards": rewards, "reward_weights": [2.0, 1.0]}
    run = fastpt.train(**settings(tmp_path, objective=objective, eval_data=ROWS[:3], max_steps=1))
    texts = [
        fastpt.generate.generate_batch(run.model, run.tokenizer, [row["prompt"]], max_new_tokens=12)[0]
        for row in ROWS[:3]
    ]
    wanted = [letters(texts), short(None, texts, ["x"] * 3)]
    assert run.metrics["eval_reward/letters"] == pytest.approx(np.mean(wanted[0]))
    assert run.metrics["eval_reward"] == pytest.approx(2 * np.mean(wanted[0]) + np.mean(wanted[1]), abs=1e-6)
    assert run.metrics["eval_loss"] == -run.metrics["eval_reward"]


def test_messages_get_messages_and_streams_keep_their_columns(tmp_path):
    rows = [{"question": [{"role": "user", "content": word}], "answer": [word, 3]} for word in WORDS]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def reward(prompts, completions, **columns):
        assert all(
            c[0]["role"] == "assistant" and p[0]["content"] == a[0]
            for p, c, a in zip(prompts, completions, columns["answer"], strict=True)
        )
        return [float(len(c[0]["content"])) for c in completions]

    for streaming in (False, True):
        data = {"path": str(path), "streaming": streaming, "columns": {"prompt": "question"}}
        run = fastpt.train(**settings(tmp_path / str(streaming), objective={"rewards": reward}, data=data, max_steps=2))
        assert run.metrics["steps"] == 2
