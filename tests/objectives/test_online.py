"""Online RL over whole runs: it learns, batching does not matter, rollouts repeat; bad rewards and prompts are explained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import fastpt
from fastpt.adapters import VALUE_HEAD
from fastpt.data.batches import collate
from fastpt.errors import ConfigError, DataError, TrainingError
from fastpt.objectives import make_objective
from fastpt.objectives.grpo import VARIANTS
from fastpt.trainer import Trainer
from tests.runs import WORDS, run_settings
from tests.tiny import tiny_model

ROWS = [{"prompt": f"say {word}", "answer": word} for word in WORDS]
KINDS = ("grpo", "rloo", "ppo")


def letters(completions):
    """The share of an answer that is the letter a: easy to raise."""
    return [sum(c == "a" for c in one) / 12 for one in completions]


def varied(completions):
    """Different for almost any two answers."""
    return [len(set(one)) + len(one) / 12 for one in completions]


def short(prompts, completions, answer):
    return [-0.01 * len(one) * (word != "") for one, word in zip(completions, answer, strict=True)]


def settings(tmp_path, kind="grpo", objective=(), **changes):
    chosen = {"name": kind, "rewards": varied, "max_new_tokens": 12, **dict(objective)}
    return run_settings(tmp_path, **{"data": ROWS, "objective": chosen} | changes)


def prepared(tmp_path, kind="grpo", objective=(), **changes):
    trainer = Trainer(**settings(tmp_path, kind, objective, **changes))
    trainer.prepare()
    return trainer


def rolled_out(trainer, step=0):
    """The examples of one rollout over the first prompts, by optimizer steps."""
    prompts = [trainer.feed.prompts.data.example(i) for i in range(4)]
    return trainer.objective.collect(trainer.scorer, prompts, step)


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
        collate(examples).input_ids.numel()
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


# What can be wrong


def _raises(completions, answer):
    return [1.0 / (word != "two") for word in answer]


BAD_REWARDS = {
    "raises": (_raises, r"_raises raised ZeroDivisionError .* on row \d+, whose answer is .*: let it return a number"),
    "nan": (
        lambda completions: [float("nan")] * len(completions),
        r"gave nan for row \d+, whose answer is .*finite number",
    ),
    "none": (lambda completions: [None] * len(completions), r"gave None for row \d+"),
    "text": (lambda completions: ["good"] * len(completions), r"gave 'good' for row \d+"),
    "too few": (lambda completions: [1.0], r"returned 1 values for 120 completions \(of row \d+ to row \d+\)"),
    "nothing": (lambda completions: None, r"returned NoneType None: let it return a list"),
}


@pytest.mark.parametrize("case", BAD_REWARDS)
def test_a_bad_reward_is_explained(tmp_path, case):
    function, message = BAD_REWARDS[case]
    with pytest.raises(TrainingError, match=message):
        fastpt.train(**settings(tmp_path, objective={"rewards": function}, batch_rows=len(ROWS)))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            {"rewards": "tests.objectives.test_online:nothing"},
            "cannot be imported .*nothing.*: check module and function",
        ),
        ({"rewards": []}, "give at least one reward"),
        ({"rewards": [3]}, "3 is no reward"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 values for 1 rewards"),
        ({"group_size": 1}, "objective.group_size: .*greater than or equal to 2"),
        ({"overlong_buffer": 13}, "overlong_buffer=13 is more than max_new_tokens=12"),
        ({"max_new_tokens": 300}, "max_length=256 leaves no room for a prompt beside objective.max_new_tokens=300"),
        ({"engine": "vllm"}, "not installed: pip install vllm, or leave engine"),
        ({"rewards": "no/such/folder/model"}, "no/such/folder/model does not exist"),
        ({"rewards": lambda completions, solution: []}, "takes 'solution', but row 1 has only prompt, answer"),
    ],
)
def test_a_bad_setting_is_explained_before_the_first_step(tmp_path, objective, message):
    with pytest.raises((ConfigError, fastpt.errors.ModelError), match=message):
        prepared(tmp_path, objective=objective)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "why"}, r'row 1 has no column "prompt" \(it has question\): .*columns = \{prompt = "question"\}'),
        ({"prompt": ""}, "row 1 has an empty 'prompt'"),
        ({"prompt": None}, "row 1 has nothing"),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "ends with an assistant turn",
        ),
        ({"prompt": "a " * 200}, "longer than max_length=244 tokens"),
        ({"prompt": "a", "when": {1, 2}}, "row 1 holds what rewards cannot be handed"),
    ],
)
def test_a_bad_row_is_explained(tmp_path, row, message):
    objective = {"rewards": lambda completions, **columns: []}
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, objective=objective, data=[row, *[{"prompt": "b"}] * 3])


class _LLM:
    """Stands for vLLM's class: answers with one token, and looks at what it is asked."""

    def __init__(self, model, **options):
        self.options = options

    def generate(self, prompts, sampling, lora_request, use_tqdm):
        assert (Path(lora_request.path) / "adapter_model.safetensors").is_file()
        assert sampling.stop_token_ids == [2]
        assert all(prompt["prompt_token_ids"] for prompt in prompts)
        tokens = [(70, 2), (71, 72)]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens[i % 2])]) for i in range(len(prompts))]


def test_vllm_reads_the_adapter_before_each_rollout(tmp_path, monkeypatch):
    class Request(NamedTuple):
        name: str
        number: int
        path: str

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=_LLM, SamplingParams=SimpleNamespace))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=Request))
    trainer = prepared(tmp_path, objective={"engine": "vllm", "group_size": 2})
    (step,) = rolled_out(trainer)
    assert [int(token) for token in step[0].input_ids[-5:] if token in (70, 2, 71, 72)] == [70, 2, 71, 72]
    with pytest.raises(ConfigError, match="needs an adapter"):
        prepared(tmp_path / "full", objective={"engine": "vllm"}, method="full")


def test_a_reward_is_known_again_by_its_name():
    """The cache and a resumed run compare objectives by what they print."""
    by_name = make_objective({"name": "grpo", "rewards": "tests.objectives.test_online:letters"})
    assert repr(by_name) == repr(make_objective({"name": "grpo", "rewards": letters}))
    assert "0x" not in repr(by_name)


def test_a_reward_model_is_a_reward(tmp_path):
    model = tiny_model("llama", cls="LlamaForSequenceClassification", num_labels=1)
    from tests.tiny import tiny_tokenizer

    model.save_pretrained(tmp_path / "rm")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "rm")
    trainer = prepared(tmp_path, objective={"rewards": [str(tmp_path / "rm"), letters], "group_size": 4})
    scores = trainer.objective._functions[0](["say cat", "say"], ["dog and bird", "x"], [[], []], [{}, {}], ["a", "b"])
    for prompt, answer, score in zip(["say cat", "say"], ["dog and bird", "x"], scores.tolist(), strict=True):
        talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)["input_ids"]
        assert score == pytest.approx(model(ids).logits.item(), abs=1e-5)
    assert rolled_out(trainer)
    tiny_model("llama").save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(fastpt.errors.ModelError, match="is no reward model"):
        prepared(tmp_path, objective={"rewards": str(tmp_path / "lm")})
